/* Preprocessing in one kernel: resize, centre crop, padding, normalization and HWC -> CHW, for a batch of images of any
 * sizes. The arithmetic is Pillow's, in whole numbers; resampling.py makes its tables and says why they suffice.
 *
 * One thread makes one output pixel in all its channels. Threads side by side make pixels side by side, so that writes
 * and reads of the column table are coalesced. Passes are not separated: with antialiasing a value of the first pass is
 * computed again for each output that it belongs to, twice for bilinear, which saves an image between the passes and
 * the wait for it. What that is worth against two kernels has not been measured.
 *
 * It is C as well as CUDA. NVRTC compiles it with CHANNELS defined.
 */

#define PRECISION_BITS (32 - 8 - 2)
#define HALF (1 << (PRECISION_BITS - 1))
#define LEVELS 256
#define FIRST 0
#define COUNT 1
#define WEIGHTS 2

/* Where an image is in the staged bytes: offsets from their beginning. The same as IMAGE_FIELDS in resize_kernel.py. */
struct Image {
    long long pixels; /* uint8 [height, width, CHANNELS] */
    long long columns, rows; /* int32 [2 + taps, outputs] */
    long long width;
    long long rows_first;
};

/* The source pixels of one output along one axis. */
struct Taps {
    const int *weights;
    int weight_step;
    int count;
    long long start; /* of the first source pixel, in bytes */
    long long step;  /* from one source pixel to the next, in bytes */
};

static __device__ struct Taps taps_of(const int *table, int outputs, int output, long long step) {
    struct Taps taps;
    taps.weights = table + WEIGHTS * outputs + output;
    taps.weight_step = outputs;
    taps.count = table[COUNT * outputs + output];
    taps.start = table[FIRST * outputs + output] * step;
    taps.step = step;
    return taps;
}

static __device__ int clip8(int sum) {
    int value = sum >> PRECISION_BITS;
    return value < 0 ? 0 : value > LEVELS - 1 ? LEVELS - 1 : value;
}

/* staged: struct Image [images], and what they point to; normalized: float [CHANNELS, 256], what each byte becomes;
 * target: float [images, CHANNELS, height, width]. The grid's z is the number of images. */
#ifdef __cplusplus
extern "C"
#endif
__global__ void preprocess(const unsigned char *staged, const float *normalized, float *target, int height, int width) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;

    const struct Image image = ((const struct Image *)staged)[blockIdx.z];
    const unsigned char *pixels = staged + image.pixels;
    const struct Taps across = taps_of((const int *)(staged + image.columns), width, x, CHANNELS);
    const struct Taps down = taps_of((const int *)(staged + image.rows), height, y, CHANNELS * image.width);
    const struct Taps first = image.rows_first ? down : across;
    const struct Taps second = image.rows_first ? across : down;

    int sums[CHANNELS];
    for (int channel = 0; channel < CHANNELS; channel++) sums[channel] = HALF;
    for (int outer = 0; outer < second.count; outer++) {
        const unsigned char *line = pixels + second.start + outer * second.step + first.start;
        const int weight = second.weights[(long long)outer * second.weight_step];
        int partial[CHANNELS];
        for (int channel = 0; channel < CHANNELS; channel++) partial[channel] = HALF;
        for (int inner = 0; inner < first.count; inner++) {
            const int factor = first.weights[(long long)inner * first.weight_step];
            for (int channel = 0; channel < CHANNELS; channel++)
                partial[channel] += factor * line[inner * first.step + channel];
        }
        for (int channel = 0; channel < CHANNELS; channel++) sums[channel] += weight * clip8(partial[channel]);
    }

    const long long plane = (long long)height * width;
    float *output = target + blockIdx.z * CHANNELS * plane + (long long)y * width + x;
    for (int channel = 0; channel < CHANNELS; channel++)
        output[channel * plane] = normalized[channel * LEVELS + clip8(sums[channel])];
}
