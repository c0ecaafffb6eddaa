/* resize.cu for the processor: CUDA's words as C has them, and the launch as a loop over the threads. The exported names
 * are those that the host-memory CUDA driver looks for. */
#include <stddef.h>

#define __global__ static
#define __device__
#define EXPORT __attribute__((visibility("default")))

static _Thread_local struct { unsigned x, y, z; } blockIdx, blockDim, threadIdx;

#define preprocess preprocess_thread
#include RESIZE_CU
#undef preprocess

EXPORT const size_t preprocess_params[] = {sizeof(void *), sizeof(void *), sizeof(void *), sizeof(int), sizeof(int), 0};

static void block_of_threads(void **params) {
    for (threadIdx.z = 0; threadIdx.z < blockDim.z; threadIdx.z++)
        for (threadIdx.y = 0; threadIdx.y < blockDim.y; threadIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                preprocess_thread(*(const unsigned char **)params[0], *(const float **)params[1],
                                  *(float **)params[2], *(int *)params[3], *(int *)params[4]);
}

EXPORT void preprocess(void **params, unsigned grid[3], unsigned block[3]) {
    blockDim.x = block[0], blockDim.y = block[1], blockDim.z = block[2];
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) block_of_threads(params);
}
