/* The ledger: objects, counts of calls, injected failures, misuse. */
#include "hostcuda.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define BASE ((uintptr_t)0x5EED00000000) /* handles look like pointers and lead nowhere */
#define STEP ((uintptr_t)64)
#define LONGEST_NAME 64
#define MOST_CALLS 256
#define MOST_MISUSES 64

typedef struct {
    char name[LONGEST_NAME];
    long calls;
    long failing; /* the next so many calls fail */
    CUresult code;
} Count;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static Object **objects;
static int object_count, object_room;
static uintptr_t first_number; /* of the objects since the reset; older handles are unknown */
static Count counts[MOST_CALLS];
static int count_of_counts;
static long total_calls;
static long calls_until_failure; /* 0: none is planned */
static CUresult planned_code, lost_code;
static char misuses[MOST_MISUSES][256];
static int misuse_count;
static __thread bool working;
static Object default_streams[DEFAULT_STREAMS] = {{.kind = STREAM, .alive = true}, {.kind = STREAM, .alive = true}};

void lock(void) { pthread_mutex_lock(&mutex); }
void unlock(void) { pthread_mutex_unlock(&mutex); }
void changed(void) { pthread_cond_broadcast(&change); }
void wait_for_change(void) { pthread_cond_wait(&change, &mutex); }
bool *inside_work(void) { return &working; }

uint64_t this_thread(void) {
    static uint64_t last;
    static __thread uint64_t number;
    if (!number) number = __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
    return number;
}

/* ---- objects ---- */

Handle add_object(Kind kind, Object **object) {
    if (object_count == object_room) {
        object_room = object_room ? 2 * object_room : 256;
        objects = realloc(objects, object_room * sizeof *objects);
    }
    Object *added = objects[object_count] = calloc(1, sizeof *added);
    added->kind = kind;
    added->alive = true;
    *object = added;
    return (Handle)(BASE + STEP * (first_number + (uintptr_t)object_count++));
}

Object *object_number(int number) {
    if (number < object_count) return objects[number];
    return number < object_count + DEFAULT_STREAMS ? &default_streams[number - object_count] : NULL;
}

bool is_default_stream(Handle handle) { return (uintptr_t)handle - 1 < DEFAULT_STREAMS; }

Object *object_at(Handle handle) {
    if (is_default_stream(handle)) return &default_streams[(uintptr_t)handle - 1];
    uintptr_t first = BASE + STEP * first_number;
    uintptr_t number = ((uintptr_t)handle - first) / STEP;
    bool known = (uintptr_t)handle >= first && (uintptr_t)handle % STEP == 0 && number < (uintptr_t)object_count;
    return known ? objects[number] : NULL;
}

const char *const KIND_NAMES[KINDS] = {"context", "device",  "pinned", "stream",   "event",
                                              "graph",   "exec",    "module", "function"};

Object *find_object(Kind kind, Handle handle, const char *call) {
    Object *object = object_at(handle);
    if (!object || object->kind != kind) {
        misuse("%s: %p is no %s", call, handle, KIND_NAMES[kind]);
        return NULL;
    }
    if (!object->alive) {
        misuse("%s: the %s %p is destroyed", call, KIND_NAMES[kind], handle);
        return NULL;
    }
    return object;
}

int live(Kind kind) {
    int count = 0;
    for (int i = 0; i < object_count; i++) count += objects[i]->alive && objects[i]->kind == kind;
    return count;
}

static void reset_objects(void) {
    for (int i = 0; i < DEFAULT_STREAMS; i++) {
        clear_queue(&default_streams[i].stream.queue);
        default_streams[i].stream.queued = default_streams[i].stream.done = 0;
    }
    for (int i = 0; i < object_count; i++) {
        Object *object = objects[i];
        if (object->alive && object->kind == STREAM) {
            clear_queue(&object->stream.queue);
            clear_queue(&object->stream.captured);
        }
        if (object->alive && (object->kind == GRAPH || object->kind == EXEC)) clear_queue(&object->nodes);
        free(object);
    }
    first_number += object_count;
    object_count = 0;
}

/* ---- misuse ---- */

void misuse(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (misuse_count < MOST_MISUSES) vsnprintf(misuses[misuse_count], sizeof misuses[0], format, arguments);
    va_end(arguments);
    misuse_count++;
}

/* ---- calls ---- */

static Count *count_of(const char *name) {
    for (int i = 0; i < count_of_counts; i++)
        if (!strcmp(counts[i].name, name)) return &counts[i];
    if (count_of_counts == MOST_CALLS) abort();
    Count *added = &counts[count_of_counts++];
    snprintf(added->name, sizeof added->name, "%s", name);
    return added;
}

/* After these "any further CUDA work will return the same error"; contexts and devices are no work. */
static bool is_sticky(CUresult code) {
    return code == 214 || code == 226 || code == 700 || code == 702 || code == 710 || (code >= 714 && code <= 719) ||
           code == 721 || code == 810 || code == 911;
}

static CUresult planned_failure(const char *call) {
    Count *count = count_of(call);
    CUresult code = SUCCESS;
    count->calls++;
    total_calls++;
    if (count->failing) {
        count->failing--;
        code = count->code;
    }
    if (calls_until_failure && !--calls_until_failure) code = planned_code;
    if (!lost_code && is_sticky(code)) {
        lost_code = code;
        drop_all_work();
    }
    return code;
}

static CUresult refused_inside_work(const char *call) {
    if (!working) return SUCCESS;
    misuse("%s: called in a host function or kernel", call);
    return NOT_PERMITTED;
}

CUresult enter(const char *call) {
    lock();
    CUresult code = planned_failure(call);
    return code ? code : refused_inside_work(call);
}

static CUresult missing_context(const char *call) {
    if (!driver_initialized()) {
        misuse("%s: called before cuInit", call);
        return NOT_INITIALIZED;
    }
    if (!context_is_current()) {
        misuse("%s: no context is current in this thread", call);
        return INVALID_CONTEXT;
    }
    return SUCCESS;
}

CUresult enter_context(const char *call) {
    CUresult code = enter(call);
    if (!code) code = missing_context(call);
    return code ? code : lost_code;
}

CUresult enter_release(const char *call, CUresult *failure) {
    lock();
    *failure = planned_failure(call);
    if (!*failure) *failure = lost_code;
    CUresult code = refused_inside_work(call);
    return code ? code : missing_context(call);
}

CUresult leave(CUresult code) {
    unlock();
    return code;
}

/* ---- for the tests ---- */

static void reset_counts(void) {
    memset(counts, 0, sizeof counts);
    count_of_counts = 0;
    total_calls = calls_until_failure = 0;
    planned_code = lost_code = SUCCESS;
    misuse_count = 0;
}

/* Everything as at the start; objects that are still alive are freed and unknown from here on. */
EXPORT void hostcuda_reset(void) {
    lock();
    reset_memory();
    reset_objects();
    reset_contexts();
    reset_counts();
    unlock();
}

/* As many live objects of a kind ("context", "device", "pinned", "stream", ...); "" for all; -1 for no such kind. */
EXPORT int hostcuda_live(const char *kind) {
    int count = *kind ? -1 : 0;
    lock();
    for (int i = 0; i < FUNCTION; i++) {
        if (!*kind) count += live(i);
        if (!strcmp(kind, KIND_NAMES[i])) count = live(i);
    }
    unlock();
    return count;
}

EXPORT long hostcuda_total_calls(void) {
    lock();
    long calls = total_calls;
    unlock();
    return calls;
}

EXPORT long hostcuda_calls(const char *name) {
    lock();
    long calls = count_of(name)->calls;
    unlock();
    return calls;
}

/* The k-th driver call from now, from 1 on, fails with the code; 0 takes it back. */
EXPORT void hostcuda_fail_call(long k, CUresult code) {
    lock();
    calls_until_failure = k;
    planned_code = code;
    unlock();
}

/* The next n calls of that name fail with the code. */
EXPORT void hostcuda_fail_named(const char *name, long n, CUresult code) {
    lock();
    Count *count = count_of(name);
    count->failing = n;
    count->code = code;
    unlock();
}

EXPORT int hostcuda_misuses(void) {
    lock();
    int count = misuse_count;
    unlock();
    return count;
}

EXPORT void hostcuda_forgive(void) {
    lock();
    misuse_count = 0;
    unlock();
}

/* The text of a misuse, from 0 on; "" where none is kept. */
EXPORT const char *hostcuda_misuse(int number) {
    return number >= 0 && number < misuse_count && number < MOST_MISUSES ? misuses[number] : "";
}

EXPORT const char *hostcuda_last_misuse(void) {
    return hostcuda_misuse(misuse_count < MOST_MISUSES ? misuse_count - 1 : MOST_MISUSES - 1);
}
