/* Modules and kernels. An image is the text "HOSTCUDA:" and the path of a shared object, which exports for each kernel
 *
 *     void NAME(void **params, unsigned grid[3], unsigned block[3])   the whole launch: it loops over the threads
 *     const size_t NAME_params[]                                      sizes of the parameters, ended by 0
 */
#include "hostcuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define PREFIX "HOSTCUDA:"
#define MOST_PARAMETERS 64
#define MOST_THREADS 1024 /* of a block, on all devices */

static CUresult loaded(Handle *module, const char *image) {
    Object *object;
    if (strncmp(image, PREFIX, strlen(PREFIX))) return INVALID_IMAGE;
    void *library = dlopen(image + strlen(PREFIX), RTLD_NOW | RTLD_LOCAL);
    if (!library) return FILE_NOT_FOUND;
    *module = add_object(MODULE, &object);
    object->module.library = library;
    return SUCCESS;
}

EXPORT CUresult cuModuleLoadData(Handle *module, const void *image) {
    CUresult code = enter_context("cuModuleLoadData");
    if (!code && capture_forbids("cuModuleLoadData")) code = CAPTURE_UNSUPPORTED;
    return leave(code ? code : loaded(module, image));
}

/* The compiler's log is empty: its sizes, CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES and _ERROR_, are written. */
EXPORT CUresult cuModuleLoadDataEx(Handle *module, const void *image, unsigned count, int *options, void **values) {
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 4 || options[i] == 6) values[i] = NULL;
    return cuModuleLoadData(module, image);
}

EXPORT CUresult cuModuleUnload(Handle module) {
    CUresult failure, code = enter_release("cuModuleUnload", &failure);
    if (code) return leave(code);
    Object *function, *object = find_object(MODULE, module, "cuModuleUnload");
    if (!object) return leave(INVALID_HANDLE);
    if (handle_in_use(LAUNCH, module)) misuse("cuModuleUnload: a launch of its kernels is queued");
    for (int i = 0; (function = object_number(i)); i++)
        if (function->kind == FUNCTION && function->function.module == module) function->alive = false;
    object->alive = false; /* the library stays: what is queued still runs */
    return leave(failure);
}

EXPORT CUresult cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    static const size_t none[] = {0};
    char sizes_name[256];
    Object *added;
    CUresult code = enter_context("cuModuleGetFunction");
    if (code) return leave(code);
    Object *object = find_object(MODULE, module, "cuModuleGetFunction");
    if (!object) return leave(INVALID_HANDLE);
    void *kernel = dlsym(object->module.library, name);
    if (!kernel) return leave(NOT_FOUND);
    snprintf(sizes_name, sizeof sizes_name, "%s_params", name);
    const size_t *sizes = dlsym(object->module.library, sizes_name);
    *function = add_object(FUNCTION, &added);
    added->function.module = module;
    *(void **)&added->function.kernel = kernel;
    added->function.sizes = sizes ? sizes : none;
    return leave(SUCCESS);
}

/* Where the parameters lie in a packed buffer: each at the next multiple of its size. */
static size_t unpack(const size_t *sizes, char *buffer, void **params) {
    size_t offset = 0;
    for (int i = 0; sizes[i] && i < MOST_PARAMETERS; i++) {
        offset = (offset + sizes[i] - 1) / sizes[i] * sizes[i];
        params[i] = buffer + offset;
        offset += sizes[i];
    }
    return offset;
}

/* `extra`: {1, buffer, 2, &size, 0}, as CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE. */
static bool packed(const size_t *sizes, void **extra, void **params) {
    char *buffer = NULL;
    size_t size = 0;
    for (; *extra; extra += 2) {
        if (*extra == (void *)1) buffer = extra[1];
        if (*extra == (void *)2) size = *(size_t *)extra[1];
    }
    size_t wanted = unpack(sizes, buffer, params);
    if (size != wanted) misuse("cuLaunchKernel: %zu bytes of parameters, the kernel takes %zu", size, wanted);
    return size == wanted;
}

static bool fits(const unsigned grid[3], const unsigned block[3]) {
    bool some = grid[0] && grid[1] && grid[2] && block[0] && block[1] && block[2];
    return some && grid[1] <= 65535 && grid[2] <= 65535 && block[2] <= 64 &&
           (uint64_t)block[0] * block[1] * block[2] <= MOST_THREADS;
}

EXPORT CUresult cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream, void **params,
                               void **extra) {
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    void *unpacked[MOST_PARAMETERS];
    CUresult code = enter_context("cuLaunchKernel");
    (void)shared_bytes;
    if (code) return leave(code);
    Object *queue = usable_stream(stream, "cuLaunchKernel");
    Object *object = find_object(FUNCTION, function, "cuLaunchKernel");
    if (!queue || !object) return leave(INVALID_HANDLE);
    bool wanted = object->function.sizes[0];
    if (!fits(grid, block) || (wanted && !params && !extra)) return leave(INVALID_VALUE);
    if (!params && extra && !packed(object->function.sizes, extra, unpacked)) return leave(INVALID_VALUE);
    Op *op = new_launch(function, params ? params : unpacked);
    memcpy(op->launch.grid, grid, sizeof grid);
    memcpy(op->launch.block, block, sizeof block);
    enqueue(queue, op);
    return leave(SUCCESS);
}

/* pycuda sets the shape before it launches with the same one. */
EXPORT CUresult cuFuncSetBlockShape(Handle function, int x, int y, int z) {
    CUresult code = enter_context("cuFuncSetBlockShape");
    if (!code && !find_object(FUNCTION, function, "cuFuncSetBlockShape")) code = INVALID_HANDLE;
    return leave(code ? code : x > 0 && y > 0 && z > 0 ? SUCCESS : INVALID_VALUE);
}
