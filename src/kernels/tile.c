/* tile.c - f32 rows into tile payloads and int8 scan rows: what is stored, the same for every table. */
#include "tile_internal.h"

#include <math.h>

size_t cairn_wtype_row_bytes(cairn_wtype type, size_t cols)
{
    size_t bytes = 0;
    switch (type) {
    case CAIRN_W_F32: return cairn_mul_size(cols, 4, &bytes) ? bytes : 0;
    case CAIRN_W_F16:
    case CAIRN_W_BF16: return cairn_mul_size(cols, 2, &bytes) ? bytes : 0;
    case CAIRN_W_Q8_0: return cols % 32 == 0 && cairn_mul_size(cols / 32, 34, &bytes) ? bytes : 0;
    }
    return 0;
}

size_t cairn_tile_scratch_bytes(uint32_t tokens, uint32_t head_dim)
{
    return tile_scratch_over(NULL, tokens, head_dim).bytes;
}

/* x / scale to the nearest integer (ties to even) within +-127; nan becomes -127, so nothing here is undefined. */
static int8_t quantize_one(float x, float scale)
{
    float v = x / scale;
    if (!(v > -127.0f)) return -127;
    if (v > 127.0f) return 127;
    return (int8_t)lrintf(v);
}

static float largest_magnitude(const float *x, size_t n, size_t stride)
{
    float most = 0;
    for (size_t i = 0; i < n; i++) {
        float magnitude = fabsf(x[i * stride]);
        if (magnitude > most) most = magnitude;
    }
    return most;
}

/* n elements, `stride` apart in x and in out, sharing one scale, which is returned: max|x| / 127. The error of
 * scale * value is at most scale / 2. Division, not multiplication by the inverse: 1 / scale overflows for tiny rows.
 */
static float quantize(const float *x, int8_t *out, size_t n, size_t stride)
{
    float scale = largest_magnitude(x, n, stride) / 127.0f;
    for (size_t i = 0; i < n; i++) out[i * stride] = scale > 0 ? quantize_one(x[i * stride], scale) : 0;
    return scale;
}

void cairn_tile_encode(const cairn_kernels *kernels, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim,
                       const float *keys, const float *values, void *payload)
{
    size_t count = (size_t)tokens * head_dim;
    char *out_keys = payload, *out_values = out_keys + count * cairn_dtype_size(dtype);
    if (dtype != CAIRN_Q8) {
        kernels->narrow(out_keys, keys, dtype, count);
        kernels->narrow(out_values, values, dtype, count);
        return;
    }
    char *key_scales = out_values + count, *value_scales = key_scales + head_dim * sizeof(float);
    for (size_t d = 0; d < head_dim; d++) {
        float scale = quantize(keys + d, (int8_t *)out_keys + d, tokens, head_dim);
        memcpy(key_scales + d * sizeof scale, &scale, sizeof scale);
    }
    for (size_t t = 0; t < tokens; t++) {
        float scale = quantize(values + t * head_dim, (int8_t *)out_values + t * head_dim, head_dim, 1);
        memcpy(value_scales + t * sizeof scale, &scale, sizeof scale);
    }
}

cairn_tile cairn_tile_over(const void *payload, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim)
{
    size_t count = (size_t)tokens * head_dim;
    const char *keys = payload, *values = keys + count * cairn_dtype_size(dtype);
    cairn_tile tile = {.dtype = dtype, .tokens = tokens, .head_dim = head_dim, .keys = keys, .values = values};
    if (dtype == CAIRN_Q8) {
        tile.key_scales = (const float *)(const void *)(values + count);
        tile.value_scales = tile.key_scales + head_dim;
    }
    return tile;
}

float cairn_scan_quantize(const float *row, size_t dim, int8_t *values, int32_t *sum)
{
    float scale = quantize(row, values, dim, 1);
    int32_t total = 0;
    for (size_t i = 0; i < dim; i++) total += values[i];
    for (size_t i = dim; i % 4 != 0; i++) values[i] = 0;
    *sum = total;
    return scale;
}
