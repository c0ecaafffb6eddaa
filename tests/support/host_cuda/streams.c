/* Streams, which do their work when somebody waits for it, and events. */
#include "hostcuda.h"

#include <stdlib.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define NON_BLOCKING 1   /* CU_STREAM_NON_BLOCKING */
#define DISABLE_TIMING 2 /* CU_EVENT_DISABLE_TIMING */

/* ---- doing the work ---- */

static double milliseconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

static void run_first(Object *stream) {
    Op *op = pop_op(&stream->stream.queue);
    stream->stream.busy = true;
    unlock();
    run_op(op);
    lock();
    stream->stream.busy = false;
    stream->stream.done++;
    if (op->kind == RECORD) {
        op->record->milliseconds = milliseconds_now();
        op->record->done = true;
    }
    free_op(op);
    changed();
}

static bool reach(Record *record, bool may_wait);

/* Does what is first; false if that would wait for another thread. */
static bool step(Object *stream, bool may_wait) {
    if (stream->stream.busy) {
        if (may_wait) wait_for_change();
        return may_wait;
    }
    Op *first = stream->stream.queue.first;
    if (first->kind != WAIT || first->record->done) {
        run_first(stream);
        return true;
    }
    Record *record = share(first->record); /* another thread may take the work from the queue meanwhile */
    bool reached = reach(record, may_wait);
    release_record(record);
    return reached;
}

static bool pending(const Object *stream) { return stream->stream.busy || stream->stream.queue.first; }

/* Pulls the stream of the mark up to it. */
static bool reach(Record *record, bool may_wait) {
    while (!record->done) {
        Object *stream = object_at(record->stream);
        if (!stream || !stream->alive || !pending(stream)) return true; /* destroyed, or the device is lost */
        if (!step(stream, may_wait)) return false;
    }
    return true;
}

bool drain(Object *stream, bool may_wait) {
    uint64_t end = stream->stream.queued;
    while (stream->stream.done < end && pending(stream))
        if (!step(stream, may_wait)) return false;
    return true;
}

void drop_all_work(void) {
    Object *object;
    for (int i = 0; (object = object_number(i)); i++)
        if (object->alive && object->kind == STREAM) clear_queue(&object->stream.queue);
    changed();
}

void enqueue(Object *stream, Op *op) {
    push_op(stream->stream.capturing ? &stream->stream.captured : &stream->stream.queue, op);
    if (!stream->stream.capturing) stream->stream.queued++;
}

/* ---- who uses what ---- */

bool memory_in_use(const char *address, size_t size) {
    Object *object;
    for (int i = 0; (object = object_number(i)); i++)
        if (object->alive && object->kind == STREAM && overlaps(&object->stream.queue, address, size)) return true;
    return false;
}

bool handle_in_use(OpKind kind, Handle handle) {
    Object *object;
    for (int i = 0; (object = object_number(i)); i++)
        if (object->alive && object->kind == STREAM && uses(&object->stream.queue, kind, handle)) return true;
    return false;
}

Object *usable_stream(Handle stream, const char *call) {
    if (!stream) misuse("%s: on the default stream", call);
    Object *object = stream ? find_object(STREAM, stream, call) : NULL;
    if (object && object->stream.capturing && object->stream.capturer != this_thread() && object->stream.mode < 2) {
        misuse("%s: another thread captures the stream", call);
        object->stream.invalidated = true;
        return NULL;
    }
    return object;
}

bool capture_forbids(const char *call) {
    Object *object;
    for (int i = 0; (object = object_number(i)); i++) {
        if (!object->alive || object->kind != STREAM || !object->stream.capturing) continue;
        if (object->stream.mode == 2 || (object->stream.mode == 1 && object->stream.capturer != this_thread())) continue;
        object->stream.invalidated = true;
        misuse("%s: not allowed while a stream captures", call);
        return true;
    }
    return false;
}

/* ---- streams ---- */

EXPORT CUresult cuStreamCreate(Handle *stream, unsigned flags) {
    Object *object;
    CUresult code = enter_context("cuStreamCreate");
    if (code) return leave(code);
    if (flags & ~NON_BLOCKING) return leave(INVALID_VALUE);
    if (!(flags & NON_BLOCKING)) misuse("cuStreamCreate: it would wait for the default stream");
    *stream = add_object(STREAM, &object);
    return leave(SUCCESS);
}

EXPORT CUresult cuStreamDestroy_v2(Handle stream) {
    CUresult failure, code = enter_release("cuStreamDestroy", &failure);
    if (code) return leave(code);
    if (is_default_stream(stream)) misuse("cuStreamDestroy: a default stream");
    Object *object = is_default_stream(stream) ? NULL : find_object(STREAM, stream, "cuStreamDestroy");
    if (!object) return leave(INVALID_HANDLE);
    if (pending(object)) misuse("cuStreamDestroy: work is queued in it");
    if (object->stream.capturing) misuse("cuStreamDestroy: it captures");
    clear_queue(&object->stream.queue);
    clear_queue(&object->stream.captured);
    object->alive = false;
    changed();
    return leave(failure);
}

/* A capturing stream can be neither waited for nor asked. */
static CUresult spoiled_capture(Object *stream, const char *call) {
    if (!stream->stream.capturing) return SUCCESS;
    stream->stream.invalidated = true;
    misuse("%s: the stream captures", call);
    return CAPTURE_UNSUPPORTED;
}

/* An injected failure is reported after the wait, as errors of earlier work are; a lost device does nothing. */
EXPORT CUresult cuStreamSynchronize(Handle stream) {
    CUresult failure, code = enter_release("cuStreamSynchronize", &failure);
    if (code) return leave(code);
    Object *object = usable_stream(stream, "cuStreamSynchronize");
    if (!object) return leave(INVALID_HANDLE);
    code = spoiled_capture(object, "cuStreamSynchronize");
    if (code) return leave(code);
    drain(object, true);
    return leave(failure);
}

EXPORT CUresult cuStreamQuery(Handle stream) {
    CUresult code = enter_context("cuStreamQuery");
    if (code) return leave(code);
    Object *object = usable_stream(stream, "cuStreamQuery");
    if (!object) return leave(INVALID_HANDLE);
    code = spoiled_capture(object, "cuStreamQuery");
    if (code) return leave(code);
    return leave(drain(object, false) ? SUCCESS : NOT_READY);
}

EXPORT CUresult cuCtxSynchronize(void) {
    Object *object;
    CUresult failure, code = enter_release("cuCtxSynchronize", &failure);
    if (!code && capture_forbids("cuCtxSynchronize")) code = CAPTURE_UNSUPPORTED;
    if (code) return leave(code);
    for (int i = 0; (object = object_number(i)); i++)
        if (object->alive && object->kind == STREAM) drain(object, true);
    return leave(failure);
}

EXPORT CUresult cuLaunchHostFunc(Handle stream, HostFunction function, void *data) {
    CUresult code = enter_context("cuLaunchHostFunc");
    if (code) return leave(code);
    Object *object = usable_stream(stream, "cuLaunchHostFunc");
    if (!object) return leave(INVALID_HANDLE);
    if (!function) return leave(INVALID_VALUE);
    Op *op = new_op(CALL);
    op->call.function = function;
    op->call.data = data;
    enqueue(object, op);
    return leave(SUCCESS);
}

/* ---- events ---- */

EXPORT CUresult cuEventCreate(Handle *event, unsigned flags) {
    Object *object;
    CUresult code = enter_context("cuEventCreate");
    if (code) return leave(code);
    *event = add_object(EVENT, &object);
    object->event.timed = !(flags & DISABLE_TIMING);
    return leave(SUCCESS);
}

EXPORT CUresult cuEventDestroy_v2(Handle event) {
    CUresult failure, code = enter_release("cuEventDestroy", &failure);
    if (code) return leave(code);
    Object *object = find_object(EVENT, event, "cuEventDestroy");
    if (!object) return leave(INVALID_HANDLE);
    if (object->event.record && !object->event.record->done) misuse("cuEventDestroy: its mark is not passed");
    release_record(object->event.record);
    object->event.record = NULL;
    object->alive = false;
    return leave(failure);
}

/* Event and stream of a call that has both; NULL and misuse noted if one of them is none, or the stream captures. */
static Object *event_in_stream(Handle event, Handle stream, const char *call, Object **queue) {
    *queue = usable_stream(stream, call);
    if (*queue && (*queue)->stream.capturing) {
        misuse("%s: the fake does not capture events", call);
        return NULL;
    }
    return *queue ? find_object(EVENT, event, call) : NULL;
}

EXPORT CUresult cuEventRecord(Handle event, Handle stream) {
    Object *queue;
    CUresult code = enter_context("cuEventRecord");
    if (code) return leave(code);
    Object *object = event_in_stream(event, stream, "cuEventRecord", &queue);
    if (!object) return leave(INVALID_HANDLE);
    Record *record = calloc(1, sizeof *record);
    record->stream = stream;
    release_record(object->event.record);
    object->event.record = share(record);
    Op *op = new_op(RECORD);
    op->record = share(record);
    enqueue(queue, op);
    return leave(SUCCESS);
}

EXPORT CUresult cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
    Object *queue;
    CUresult code = enter_context("cuStreamWaitEvent");
    if (code) return leave(code);
    Object *object = event_in_stream(event, stream, "cuStreamWaitEvent", &queue);
    if (!object) return leave(INVALID_HANDLE);
    if (flags) return leave(INVALID_VALUE);
    if (!object->event.record) return leave(SUCCESS); /* as documented: an event without a mark is passed */
    Op *op = new_op(WAIT);
    op->record = share(object->event.record);
    enqueue(queue, op);
    return leave(SUCCESS);
}

static bool passed(Object *event, bool may_wait) {
    Record *record = event->event.record ? share(event->event.record) : NULL;
    bool reached = !record || reach(record, may_wait);
    release_record(record);
    return reached;
}

EXPORT CUresult cuEventSynchronize(Handle event) {
    CUresult failure, code = enter_release("cuEventSynchronize", &failure);
    if (!code && capture_forbids("cuEventSynchronize")) code = CAPTURE_UNSUPPORTED;
    if (code) return leave(code);
    Object *object = find_object(EVENT, event, "cuEventSynchronize");
    if (!object) return leave(INVALID_HANDLE);
    passed(object, true);
    return leave(failure);
}

EXPORT CUresult cuEventQuery(Handle event) {
    CUresult code = enter_context("cuEventQuery");
    if (!code && capture_forbids("cuEventQuery")) code = CAPTURE_UNSUPPORTED;
    if (code) return leave(code);
    Object *object = find_object(EVENT, event, "cuEventQuery");
    if (!object) return leave(INVALID_HANDLE);
    return leave(passed(object, false) ? SUCCESS : NOT_READY);
}

EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, Handle start, Handle end) {
    static const char *const call = "cuEventElapsedTime";
    CUresult code = enter_context(call);
    if (code) return leave(code);
    Object *first = find_object(EVENT, start, call), *last = find_object(EVENT, end, call);
    if (!first || !last) return leave(INVALID_HANDLE);
    if (!first->event.record || !last->event.record || !first->event.timed || !last->event.timed) {
        misuse("%s: an event has no mark, or keeps no time", call);
        return leave(INVALID_HANDLE);
    }
    if (!first->event.record->done || !last->event.record->done) return leave(NOT_READY);
    *milliseconds = (float)(last->event.record->milliseconds - first->event.record->milliseconds);
    return leave(SUCCESS);
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, Handle start, Handle end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
