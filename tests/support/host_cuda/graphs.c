/* Capture of a stream, graphs, and what is instantiated from them. */
#include "hostcuda.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT CUresult cuStreamBeginCapture_v2(Handle stream, int mode) {
    CUresult code = enter_context("cuStreamBeginCapture");
    if (code) return leave(code);
    Object *object = usable_stream(stream, "cuStreamBeginCapture");
    if (!object) return leave(INVALID_HANDLE);
    if (mode < 0 || mode > 2) return leave(INVALID_VALUE);
    if (is_default_stream(stream)) {
        misuse("cuStreamBeginCapture: a default stream");
        return leave(CAPTURE_UNSUPPORTED);
    }
    if (object->stream.capturing) {
        misuse("cuStreamBeginCapture: it captures already");
        return leave(ILLEGAL_STATE);
    }
    object->stream.capturing = true;
    object->stream.invalidated = false;
    object->stream.mode = mode;
    object->stream.capturer = this_thread();
    return leave(SUCCESS);
}

/* The code with which a capture cannot be ended here, or 0. */
static CUresult wrong_end(const Object *stream) {
    if (!stream->stream.capturing) {
        misuse("cuStreamEndCapture: it does not capture");
        return ILLEGAL_STATE;
    }
    if (stream->stream.mode < 2 && stream->stream.capturer != this_thread()) {
        misuse("cuStreamEndCapture: another thread began");
        return CAPTURE_WRONG_THREAD;
    }
    return SUCCESS;
}

/* The capture is over in any case. */
EXPORT CUresult cuStreamEndCapture(Handle stream, Handle *graph) {
    CUresult failure, code = enter_release("cuStreamEndCapture", &failure);
    Object *added, *object = code ? NULL : find_object(STREAM, stream, "cuStreamEndCapture");
    *graph = NULL;
    if (!object) return leave(code ? code : INVALID_HANDLE);
    code = wrong_end(object);
    if (code) return leave(code);
    object->stream.capturing = false;
    if (object->stream.invalidated && !failure) failure = CAPTURE_INVALIDATED;
    if (failure) {
        clear_queue(&object->stream.captured);
        return leave(failure);
    }
    *graph = add_object(GRAPH, &added);
    added->nodes = object->stream.captured;
    object->stream.captured = (Queue){0};
    return leave(SUCCESS);
}

EXPORT CUresult cuStreamIsCapturing(Handle stream, int *status) {
    CUresult code = enter_context("cuStreamIsCapturing");
    if (code) return leave(code);
    Object *object = find_object(STREAM, stream, "cuStreamIsCapturing");
    if (!object) return leave(INVALID_HANDLE);
    *status = !object->stream.capturing ? 0 : object->stream.invalidated ? 2 : 1;
    return leave(SUCCESS);
}

EXPORT CUresult cuGraphInstantiateWithFlags(Handle *exec, Handle graph, uint64_t flags) {
    Object *added;
    CUresult code = enter_context("cuGraphInstantiate");
    if (code) return leave(code);
    Object *object = find_object(GRAPH, graph, "cuGraphInstantiate");
    if (!object) return leave(INVALID_HANDLE);
    if (flags) return leave(INVALID_VALUE);
    *exec = add_object(EXEC, &added);
    for (const Op *op = object->nodes.first; op; op = op->next) push_op(&added->nodes, copy_of(op));
    return leave(SUCCESS);
}

static bool copies_freed_memory(const Queue *nodes) {
    for (const Op *op = nodes->first; op; op = op->next)
        if (op->kind == COPY && (is_freed(op->copy.target) || is_freed(op->copy.source))) return true;
    return false;
}

EXPORT CUresult cuGraphLaunch(Handle exec, Handle stream) {
    CUresult code = enter_context("cuGraphLaunch");
    if (code) return leave(code);
    Object *queue = usable_stream(stream, "cuGraphLaunch");
    Object *object = find_object(EXEC, exec, "cuGraphLaunch");
    if (!queue || !object) return leave(INVALID_HANDLE);
    if (copies_freed_memory(&object->nodes)) {
        misuse("cuGraphLaunch: it copies from or to freed memory");
        return leave(INVALID_VALUE);
    }
    Op *op = new_op(GRAPH_LAUNCH);
    op->graph.exec = exec;
    op->graph.nodes = &object->nodes;
    enqueue(queue, op);
    return leave(SUCCESS);
}

static CUresult destroyed(Kind kind, Handle handle, const char *call) {
    Object *object = find_object(kind, handle, call);
    if (!object) return INVALID_HANDLE;
    bool used = kind == EXEC && handle_in_use(GRAPH_LAUNCH, handle);
    if (used) misuse("%s: a launch of it is queued", call);
    if (!used) clear_queue(&object->nodes); /* else the queue still points to them */
    object->alive = false;
    return SUCCESS;
}

EXPORT CUresult cuGraphDestroy(Handle graph) {
    CUresult failure, code = enter_release("cuGraphDestroy", &failure);
    if (!code) code = destroyed(GRAPH, graph, "cuGraphDestroy");
    return leave(code ? code : failure);
}

EXPORT CUresult cuGraphExecDestroy(Handle exec) {
    CUresult failure, code = enter_release("cuGraphExecDestroy", &failure);
    if (!code) code = destroyed(EXEC, exec, "cuGraphExecDestroy");
    return leave(code ? code : failure);
}
