/* The driver, its devices and the primary context; each thread has a stack of contexts. */
#include "hostcuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define DEEPEST 32

typedef struct {
    uint64_t generation; /* of the reset it belongs to */
    int depth;
    Handle contexts[DEEPEST];
} Stack;

static bool initialized;
static int devices, major_capability, minor_capability, driver_version;
static bool integrated;
static size_t total_memory;
static Handle primary;
static int retained;
static uint64_t generation;
static pthread_key_t stack_key;

static void stack_ends(void *pointer) {
    Stack *stack = pointer;
    lock();
    if (stack->depth && stack->generation == generation) misuse("a thread ended with a context current");
    unlock();
    free(stack);
}

__attribute__((constructor)) static void start(void) {
    pthread_key_create(&stack_key, stack_ends);
    reset_contexts();
}

void reset_contexts(void) {
    initialized = false;
    devices = 1;
    major_capability = 8;
    minor_capability = 7;
    driver_version = 13000;
    integrated = false;
    total_memory = (size_t)1 << 30;
    primary = NULL;
    retained = 0;
    generation++;
}

static Stack *stack_here(void) {
    Stack *stack = pthread_getspecific(stack_key);
    if (!stack) {
        stack = calloc(1, sizeof *stack);
        pthread_setspecific(stack_key, stack);
    }
    if (stack->generation != generation) {
        stack->generation = generation;
        stack->depth = 0;
    }
    return stack;
}

static Handle top(void) {
    Stack *stack = stack_here();
    return stack->depth ? stack->contexts[stack->depth - 1] : NULL;
}

bool driver_initialized(void) { return initialized; }
size_t device_memory_total(void) { return total_memory; }
bool device_is_integrated(void) { return integrated; }

bool context_is_current(void) {
    Object *context = object_at(top());
    return context && context->alive;
}

/* ---- for the tests ---- */

EXPORT void hostcuda_set_devices(int count) { devices = count; }
EXPORT void hostcuda_set_driver_version(int version) { driver_version = version; }

EXPORT void hostcuda_set_device(int major, int minor, int shares_memory, size_t memory) {
    major_capability = major;
    minor_capability = minor;
    integrated = shares_memory;
    total_memory = memory;
}

/* ---- the driver and its devices ---- */

EXPORT CUresult cuInit(unsigned flags) {
    CUresult code = enter("cuInit");
    if (code) return leave(code);
    if (flags) return leave(INVALID_VALUE);
    if (!devices) return leave(NO_DEVICE);
    initialized = true;
    return leave(SUCCESS);
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    CUresult code = enter("cuDriverGetVersion");
    if (!code) *version = driver_version;
    return leave(code);
}

static CUresult enter_device(const char *call, CUdevice device) {
    CUresult code = enter(call);
    if (code) return code;
    if (!initialized) {
        misuse("%s: called before cuInit", call);
        return NOT_INITIALIZED;
    }
    return device < 0 || device >= devices ? INVALID_DEVICE : SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    CUresult code = enter_device("cuDeviceGetCount", 0);
    if (!code) *count = devices;
    return leave(code);
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CUresult code = enter_device("cuDeviceGet", ordinal);
    if (!code) *device = ordinal;
    return leave(code);
}

EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    CUresult code = enter_device("cuDeviceGetName", device);
    if (!code) snprintf(name, size, "Host memory (a fake)");
    return leave(code);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    CUresult code = enter_device("cuDeviceTotalMem", device);
    if (!code) *bytes = total_memory;
    return leave(code);
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    CUresult code = enter_device("cuDeviceGetAttribute", device);
    if (code) return leave(code);
    switch (attribute) {
        case 18: *value = integrated; break;       /* INTEGRATED */
        case 19: *value = 1; break;                /* CAN_MAP_HOST_MEMORY */
        case 41: *value = 1; break;                /* UNIFIED_ADDRESSING */
        case 75: *value = major_capability; break; /* COMPUTE_CAPABILITY_MAJOR */
        case 76: *value = minor_capability; break; /* COMPUTE_CAPABILITY_MINOR */
        default: misuse("cuDeviceGetAttribute: the fake does not have %d", attribute); code = INVALID_VALUE;
    }
    return leave(code);
}

EXPORT CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    CUresult code = enter_device("cuDeviceComputeCapability", device);
    if (!code) *major = major_capability, *minor = minor_capability;
    return leave(code);
}

/* ---- contexts ---- */

EXPORT CUresult cuDevicePrimaryCtxRetain(Handle *context, CUdevice device) {
    CUresult code = enter_device("cuDevicePrimaryCtxRetain", device);
    if (code) return leave(code);
    if (!retained++) {
        Object *object;
        primary = add_object(CONTEXT, &object);
    }
    *context = primary;
    return leave(SUCCESS);
}

static void destroy_primary(void) {
    object_at(primary)->alive = false;
    for (Kind kind = DEVICE_MEMORY; kind < FUNCTION; kind++)
        if (live(kind)) misuse("cuDevicePrimaryCtxRelease: %d %s still alive", live(kind), KIND_NAMES[kind]);
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CUresult code = enter_device("cuDevicePrimaryCtxRelease", device);
    if (!initialized || code == INVALID_DEVICE || code == NOT_PERMITTED) return leave(code);
    if (!retained) {
        misuse("cuDevicePrimaryCtxRelease: it is not retained");
        return leave(INVALID_CONTEXT);
    }
    if (!--retained) destroy_primary();
    return leave(code);
}

static CUresult pushed(Handle context) {
    Stack *stack = stack_here();
    Object *object = object_at(context);
    if (!object || object->kind != CONTEXT) {
        misuse("cuCtxPushCurrent: %p is no context", context);
        return INVALID_CONTEXT;
    }
    if (!object->alive) {
        misuse("cuCtxPushCurrent: the context is destroyed");
        return CONTEXT_IS_DESTROYED;
    }
    if (stack->depth == DEEPEST) return INVALID_VALUE;
    stack->contexts[stack->depth++] = context;
    return SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(Handle context) {
    CUresult code = enter("cuCtxPushCurrent");
    return leave(code ? code : pushed(context));
}

/* Pops even where a failure is injected: what is reported then happened earlier. */
EXPORT CUresult cuCtxPopCurrent_v2(Handle *context) {
    CUresult code = enter("cuCtxPopCurrent");
    Stack *stack = stack_here();
    if (!stack->depth) {
        misuse("cuCtxPopCurrent: no context is current in this thread");
        return leave(INVALID_CONTEXT);
    }
    Handle popped = stack->contexts[--stack->depth];
    if (context) *context = popped;
    return leave(code);
}

EXPORT CUresult cuCtxGetCurrent(Handle *context) {
    CUresult code = enter("cuCtxGetCurrent");
    if (!code) *context = top();
    return leave(code);
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    CUresult code = enter_context("cuCtxGetDevice");
    if (!code) *device = 0;
    return leave(code);
}
