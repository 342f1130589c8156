/* body_vectors.h - vectors, conversion and layers, written once over vec512.h or vec256.h (included before it) and
 * compiled once for each. A row's arithmetic depends on its own length alone. */
#include "kernels_internal.h"

#include "body_exp.h"

#include <assert.h>
#include <math.h>

/* Element i and the VL - 1 after it of a row of any stored type; q8 without its scale. */
INLINE vf v_load_as(const void *row, cairn_dtype dtype, size_t i)
{
    const char *at = (const char *)row + i * cairn_dtype_size(dtype);
    switch (dtype) {
    case CAIRN_F32: return v_load(at);
    case CAIRN_F16: return v_load_f16(at);
    case CAIRN_BF16: return v_load_bf16(at);
    case CAIRN_Q8: return v_load_i8(at);
    }
    return v_zero();
}
INLINE vf v_load_as_n(const void *row, cairn_dtype dtype, size_t i, size_t n)
{
    const char *at = (const char *)row + i * cairn_dtype_size(dtype);
    switch (dtype) {
    case CAIRN_F32: return v_load_n(at, n);
    case CAIRN_F16: return v_load_f16_n(at, n);
    case CAIRN_BF16: return v_load_bf16_n(at, n);
    case CAIRN_Q8: return v_load_i8_n(at, n);
    }
    return v_zero();
}

/* ---- vectors ---- */

static float dot(const float *a, const float *b, size_t n)
{
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero(); /* four chains hide the latency of fma */
    size_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 = v_fma(v_load(a + i), v_load(b + i), s0);
        s1 = v_fma(v_load(a + i + VL), v_load(b + i + VL), s1);
        s2 = v_fma(v_load(a + i + 2 * VL), v_load(b + i + 2 * VL), s2);
        s3 = v_fma(v_load(a + i + 3 * VL), v_load(b + i + 3 * VL), s3);
    }
    for (; i + VL <= n; i += VL) s0 = v_fma(v_load(a + i), v_load(b + i), s0);
    if (i < n) s1 = v_fma(v_load_n(a + i, n - i), v_load_n(b + i, n - i), s1);
    return v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}

static void axpy(float *y, float alpha, const float *x, size_t n)
{
    vf a = v_set(alpha);
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(y + i, v_fma(a, v_load(x + i), v_load(y + i)));
    if (i < n) v_store_n(y + i, v_fma(a, v_load_n(x + i, n - i), v_load_n(y + i, n - i)), n - i);
}

static void scale(float *x, float alpha, size_t n)
{
    vf a = v_set(alpha);
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(x + i, v_mul(a, v_load(x + i)));
    if (i < n) v_store_n(x + i, v_mul(a, v_load_n(x + i, n - i)), n - i);
}

INLINE float greatest(const float *x, size_t n)
{
    vf m0 = v_set(-INFINITY), m1 = m0; /* v_max keeps its second operand when the first is nan */
    size_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        m0 = v_max(v_load(x + i), m0);
        m1 = v_max(v_load(x + i + VL), m1);
    }
    for (; i + VL <= n; i += VL) m0 = v_max(v_load(x + i), m0);
    if (i < n) m1 = v_max(v_or_least(v_load_n(x + i, n - i), n - i), m1);
    return v_greatest(v_max(m0, m1));
}
static float max(const float *x, size_t n)
{
    return greatest(x, n);
}

INLINE float exp_pass(const float *x, float *out, float shift, size_t n)
{
    vf s = v_set(shift), sum0 = v_zero(), sum1 = v_zero();
    size_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vf e0 = v_exp(v_sub(v_load(x + i), s)), e1 = v_exp(v_sub(v_load(x + i + VL), s));
        if (out != NULL) v_store(out + i, e0), v_store(out + i + VL, e1);
        sum0 = v_add(sum0, e0);
        sum1 = v_add(sum1, e1);
    }
    for (; i + VL <= n; i += VL) {
        vf e = v_exp(v_sub(v_load(x + i), s));
        if (out != NULL) v_store(out + i, e);
        sum0 = v_add(sum0, e);
    }
    if (i < n) {
        vf e = v_exp(v_sub(v_load_n(x + i, n - i), s));
        if (out != NULL) v_store_n(out + i, e, n - i);
        sum1 = v_add(sum1, v_or_zero(e, n - i));
    }
    return v_sum(v_add(sum0, sum1));
}
static float exp_shift(float *x, float shift, size_t n)
{
    return exp_pass(x, x, shift, n);
}
static float exp_sum(const float *x, float shift, size_t n)
{
    return exp_pass(x, NULL, shift, n);
}

/* count <= i, so a whole vector stored at out + count ends before out + n. */
static size_t above(const float *x, float least, size_t n, uint32_t *out)
{
    vf bound = v_set(least);
    size_t count = 0, i = 0;
    for (; i + VL <= n; i += VL) {
        uint32_t mask = v_at_least(v_load(x + i), bound);
        if (mask != 0) count += v_write_indexes(out + count, mask, (uint32_t)i);
    }
    for (; i < n; i++)
        if (x[i] >= least) out[count++] = (uint32_t)i;
    return count;
}

/* Words have no bit, one or two, mostly: written whatever they have, so that no branch can be foreseen wrongly. */
static size_t set_bits(const uint64_t *words, size_t n, uint32_t *out)
{
    const uint64_t top = UINT64_C(1) << 63;
    size_t count = 0;
    for (size_t g = 0; g < n; g++) {
        uint64_t first = words[g], second = first & (first - 1);
        uint32_t base = (uint32_t)(64 * g);
        out[count] = base + (uint32_t)__builtin_ctzll(first | top);
        out[count + 1] = base + (uint32_t)__builtin_ctzll(second | top);
        size_t at = count + 2;
        count += (size_t)__builtin_popcountll(first);
        if (count <= at) continue;
        for (uint64_t left = second & (second - 1); left != 0; left &= left - 1)
            out[at++] = base + (uint32_t)__builtin_ctzll(left);
    }
    return count;
}

/* ---- conversion ---- */

INLINE void widen_as(float *out, const void *in, cairn_dtype dtype, size_t n)
{
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(out + i, v_load_as(in, dtype, i));
    if (i < n) v_store_n(out + i, v_load_as_n(in, dtype, i, n - i), n - i);
}
static void widen(float *out, const void *in, cairn_dtype dtype, size_t n)
{
    assert(dtype != CAIRN_Q8);
    switch (dtype) {
    case CAIRN_F16: widen_as(out, in, CAIRN_F16, n); break;
    case CAIRN_BF16: widen_as(out, in, CAIRN_BF16, n); break;
    default:
        if (n > 0) memcpy(out, in, n * sizeof *out);
    }
}

/* dot over a widened row, in the same order to the last bit, without the row in between */
INLINE float dot_as(const float *a, const void *b, cairn_dtype dtype, const size_t n)
{
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero();
    size_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 = v_fma(v_load(a + i), v_load_as(b, dtype, i), s0);
        s1 = v_fma(v_load(a + i + VL), v_load_as(b, dtype, i + VL), s1);
        s2 = v_fma(v_load(a + i + 2 * VL), v_load_as(b, dtype, i + 2 * VL), s2);
        s3 = v_fma(v_load(a + i + 3 * VL), v_load_as(b, dtype, i + 3 * VL), s3);
    }
    for (; i + VL <= n; i += VL) s0 = v_fma(v_load(a + i), v_load_as(b, dtype, i), s0);
    if (i < n) s1 = v_fma(v_load_n(a + i, n - i), v_load_as_n(b, dtype, i, n - i), s1);
    return v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}
INLINE void dot_rows_as(float *out, const float *q, const char *rows, cairn_dtype dtype, const size_t dim,
                        const uint32_t *at, size_t n)
{
    const size_t row_bytes = dim * (dtype == CAIRN_F32 ? 4 : 2);
    for (size_t i = 0; i < n; i++) out[i] = dot_as(q, rows + at[i] * row_bytes, dtype, dim);
}
static void dot_rows(float *out, const float *q, const void *rows, cairn_dtype dtype, size_t dim, const uint32_t *at,
                     size_t n)
{
    assert(dtype != CAIRN_Q8);
    if (dtype == CAIRN_F16 && dim == 64) /* the demo model's: no loops left */
        dot_rows_as(out, q, rows, CAIRN_F16, 64, at, n);
    else if (dtype == CAIRN_F16)
        dot_rows_as(out, q, rows, CAIRN_F16, dim, at, n);
    else if (dtype == CAIRN_BF16)
        dot_rows_as(out, q, rows, CAIRN_BF16, dim, at, n);
    else
        for (size_t i = 0; i < n; i++) out[i] = dot(q, (const float *)rows + at[i] * dim, dim);
}

static void narrow(void *out, const float *in, cairn_dtype dtype, size_t n)
{
    assert(dtype != CAIRN_Q8);
    size_t i = 0;
    char *to = out;
    switch (dtype) {
    case CAIRN_F16:
        for (; i + VL <= n; i += VL) v_store_f16(to + 2 * i, v_load(in + i));
        if (i < n) v_store_f16_n(to + 2 * i, v_load_n(in + i, n - i), n - i);
        break;
    case CAIRN_BF16:
        for (; i + VL <= n; i += VL) v_store_bf16(to + 2 * i, v_load(in + i));
        if (i < n) v_store_bf16_n(to + 2 * i, v_load_n(in + i, n - i), n - i);
        break;
    default:
        if (n > 0) memcpy(out, in, n * sizeof *in);
    }
}

/* ---- layers ---- */

static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps)
{
    if (n == 0) return;
    vf factor = v_set((float)(1.0 / sqrt((double)dot(x, x, n) / (double)n + eps)));
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(out + i, v_mul(v_mul(v_load(x + i), factor), v_load(weight + i)));
    if (i < n) v_store_n(out + i, v_mul(v_mul(v_load_n(x + i, n - i), factor), v_load_n(weight + i, n - i)), n - i);
}

INLINE vf v_silu_mul(vf gate, vf up)
{
    vf denominator = v_add(v_set(1.0f), v_exp(v_sub(v_zero(), gate)));
    return v_mul(v_div(gate, denominator), up);
}
static void silu_mul(float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(gate + i, v_silu_mul(v_load(gate + i), v_load(up + i)));
    if (i < n) v_store_n(gate + i, v_silu_mul(v_load_n(gate + i, n - i), v_load_n(up + i, n - i)), n - i);
}

static void rotate(float *out, const float *x, const float *cos, const float *sin, size_t n, bool interleaved)
{
    size_t half = n / 2, i = 0;
    if (interleaved) {
        for (; i + VL / 2 <= half; i += VL / 2) {
            vf c = v_load_doubled(cos + i), s = v_load_doubled(sin + i), both = v_load(x + 2 * i);
            v_store(out + 2 * i, v_fma_minus_plus(both, c, v_mul(v_swap_neighbours(both), s)));
        }
        for (; i < half; i++) {
            float x1 = x[2 * i], x2 = x[2 * i + 1];
            out[2 * i] = x1 * cos[i] - x2 * sin[i];
            out[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
        }
        return;
    }
    for (; i + VL <= half; i += VL) {
        vf c = v_load(cos + i), s = v_load(sin + i), x1 = v_load(x + i), x2 = v_load(x + half + i);
        v_store(out + i, v_fms(x1, c, v_mul(x2, s)));
        v_store(out + half + i, v_fma(x2, c, v_mul(x1, s)));
    }
    if (i < half) {
        size_t m = half - i;
        vf c = v_load_n(cos + i, m), s = v_load_n(sin + i, m), x1 = v_load_n(x + i, m), x2 = v_load_n(x + half + i, m);
        v_store_n(out + i, v_fms(x1, c, v_mul(x2, s)), m);
        v_store_n(out + half + i, v_fma(x2, c, v_mul(x1, s)), m);
    }
}
