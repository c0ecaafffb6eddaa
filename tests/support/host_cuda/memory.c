/* Device memory, pinned memory, copies. */
#include "hostcuda.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define ALIGNMENT 512
#define FRESH 0xC3    /* what new memory holds */
#define POISON 0xA5   /* what freed memory holds */
#define MOST_BLOCKS 4096
#define QUARANTINED 256 /* freed blocks that are kept, so that a late use of them shows */
#define QUARANTINE_BYTES ((size_t)64 << 20)
#define DEVICEMAP 2 /* CU_MEMHOSTALLOC_DEVICEMAP */

typedef struct {
    char *address;
    size_t size;
} Range;

static Object *blocks[MOST_BLOCKS];
static int block_count;
static Range quarantine[QUARANTINED];
static int quarantine_count;
static size_t quarantine_bytes, device_bytes;
static long pageable_copies;

EXPORT long hostcuda_pageable_copies(void) { return pageable_copies; }

static bool within(const char *address, const char *start, size_t size) {
    return address >= start && address < start + size;
}

static Object *block_with(const char *address) {
    for (int i = 0; i < block_count; i++)
        if (within(address, blocks[i]->memory.address, blocks[i]->memory.size)) return blocks[i];
    return NULL;
}

bool is_freed(const char *address) {
    for (int i = 0; i < quarantine_count; i++)
        if (within(address, quarantine[i].address, quarantine[i].size)) return true;
    return false;
}

static bool ends_within(const Object *block, const char *address, size_t size, const char *call) {
    size_t room = (size_t)(block->memory.address + block->memory.size - address);
    if (size > room) misuse("%s: %zu bytes at %p, the block has %zu from there", call, size, (void *)address, room);
    return size <= room;
}

bool is_on_device(const char *address, size_t size, const char *call) {
    Object *block = block_with(address);
    if (!block) {
        misuse("%s: %p is %s", call, (void *)address, is_freed(address) ? "freed memory" : "no memory of the device");
        return false;
    }
    if (block->kind == PINNED_MEMORY && !block->memory.mapped) {
        misuse("%s: the pinned memory %p is not mapped for the device", call, (void *)address);
        return false;
    }
    return ends_within(block, address, size, call);
}

bool is_on_host(const char *address, size_t size, const char *call, bool *pageable) {
    Object *block = block_with(address);
    *pageable = !block;
    if (block ? block->kind != PINNED_MEMORY : is_freed(address)) {
        misuse("%s: %p is %s", call, (void *)address, block ? "memory of the device" : "freed memory");
        return false;
    }
    return !block || ends_within(block, address, size, call);
}

/* ---- allocation ---- */

static CUresult allocated(Kind kind, size_t size, bool mapped, char **address) {
    bool counts = kind == DEVICE_MEMORY || device_is_integrated();
    if (!size) return INVALID_VALUE;
    if (counts && size > device_memory_total() - device_bytes) return OUT_OF_MEMORY;
    if (block_count == MOST_BLOCKS || posix_memalign((void **)address, ALIGNMENT, size)) return OUT_OF_MEMORY;
    memset(*address, FRESH, size);
    Object *block;
    add_object(kind, &block);
    block->memory.address = *address;
    block->memory.size = size;
    block->memory.mapped = mapped;
    blocks[block_count++] = block;
    if (counts) device_bytes += size;
    return SUCCESS;
}

static void release_quarantine(void) {
    for (int i = 0; i < quarantine_count; i++) free(quarantine[i].address);
    quarantine_count = 0;
    quarantine_bytes = 0;
}

static void release_block(int number) {
    Object *block = blocks[number];
    block->alive = false;
    blocks[number] = blocks[--block_count];
    if (block->kind == DEVICE_MEMORY || device_is_integrated()) device_bytes -= block->memory.size;
    memset(block->memory.address, POISON, block->memory.size);
    if (quarantine_count == QUARANTINED || quarantine_bytes > QUARANTINE_BYTES) release_quarantine();
    quarantine_bytes += block->memory.size;
    quarantine[quarantine_count++] = (Range){block->memory.address, block->memory.size};
}

void reset_memory(void) {
    while (block_count) release_block(block_count - 1);
    release_quarantine();
    device_bytes = 0;
    pageable_copies = 0;
}

static CUresult freed(Kind kind, const char *address, const char *call) {
    for (int i = 0; i < block_count; i++) {
        if (blocks[i]->memory.address != address || blocks[i]->kind != kind) continue;
        if (memory_in_use(address, blocks[i]->memory.size)) misuse("%s: queued work uses %p", call, (void *)address);
        release_block(i);
        return SUCCESS;
    }
    misuse("%s: %p is %s", call, (void *)address, is_freed(address) ? "freed already" : "not what was allocated");
    return INVALID_VALUE;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    CUresult code = enter_context("cuMemGetInfo");
    if (!code) {
        *total_bytes = device_memory_total();
        *free_bytes = *total_bytes - device_bytes;
    }
    return leave(code);
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    CUresult code = enter_context("cuMemAlloc");
    if (!code && capture_forbids("cuMemAlloc")) code = CAPTURE_UNSUPPORTED;
    if (!code) code = allocated(DEVICE_MEMORY, size, true, (char **)pointer);
    return leave(code);
}

EXPORT CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    CUresult code = enter_context("cuMemHostAlloc");
    if (!code && capture_forbids("cuMemHostAlloc")) code = CAPTURE_UNSUPPORTED;
    if (!code) code = allocated(PINNED_MEMORY, size, flags & DEVICEMAP, (char **)pointer);
    return leave(code);
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *pointer, void *host, unsigned flags) {
    CUresult code = enter_context("cuMemHostGetDevicePointer");
    if (code) return leave(code);
    if (flags || !is_on_device(host, 1, "cuMemHostGetDevicePointer")) return leave(INVALID_VALUE);
    *pointer = (CUdeviceptr)host; /* equal, as with unified addressing */
    return leave(SUCCESS);
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
    CUresult failure, code = enter_release("cuMemFree", &failure);
    if (!code && capture_forbids("cuMemFree")) code = CAPTURE_UNSUPPORTED;
    if (!code) code = freed(DEVICE_MEMORY, (char *)pointer, "cuMemFree");
    return leave(code ? code : failure);
}

EXPORT CUresult cuMemFreeHost(void *pointer) {
    CUresult failure, code = enter_release("cuMemFreeHost", &failure);
    if (!code && capture_forbids("cuMemFreeHost")) code = CAPTURE_UNSUPPORTED;
    if (!code) code = freed(PINNED_MEMORY, pointer, "cuMemFreeHost");
    return leave(code ? code : failure);
}

/* ---- copies ---- */

static Op *copy(char *target, const char *source, size_t size) {
    Op *op = new_op(COPY);
    op->copy.target = target;
    op->copy.source = source;
    op->copy.size = size;
    return op;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size, Handle stream) {
    static const char *const call = "cuMemcpyHtoDAsync";
    bool pageable;
    CUresult code = enter_context(call);
    if (code) return leave(code);
    Object *queue = usable_stream(stream, call);
    if (!queue) return leave(INVALID_HANDLE);
    if (!is_on_device((char *)target, size, call) || !is_on_host(source, size, call, &pageable))
        return leave(INVALID_VALUE);
    Op *op = copy((char *)target, source, size);
    pageable_copies += pageable;
    if (pageable && !queue->stream.capturing) { /* a real driver has copied the source when it returns */
        op->copy.staged = malloc(size ? size : 1);
        memcpy(op->copy.staged, source, size);
        op->copy.source = op->copy.staged;
    }
    enqueue(queue, op);
    return leave(SUCCESS);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, Handle stream) {
    static const char *const call = "cuMemcpyDtoHAsync";
    bool pageable;
    CUresult code = enter_context(call);
    if (code) return leave(code);
    Object *queue = usable_stream(stream, call);
    if (!queue) return leave(INVALID_HANDLE);
    if (!is_on_device((char *)source, size, call) || !is_on_host(target, size, call, &pageable))
        return leave(INVALID_VALUE);
    enqueue(queue, copy(target, (char *)source, size));
    pageable_copies += pageable;
    if (pageable && !queue->stream.capturing) drain(queue, true); /* a real driver returns when it is done */
    return leave(SUCCESS);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, Handle stream) {
    static const char *const call = "cuMemcpyDtoDAsync";
    CUresult code = enter_context(call);
    if (code) return leave(code);
    Object *queue = usable_stream(stream, call);
    if (!queue) return leave(INVALID_HANDLE);
    if (!is_on_device((char *)target, size, call) || !is_on_device((char *)source, size, call))
        return leave(INVALID_VALUE);
    enqueue(queue, copy((char *)target, (char *)source, size));
    return leave(SUCCESS);
}
