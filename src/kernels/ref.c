/* ref.c - the definition of right: plain loops, sums in double, rounded to float once at the end. */
#include "half.h"
#include "kernels_internal.h"

#include <assert.h>
#include <math.h>

enum { Q8_BLOCK = 32, Q8_BLOCK_BYTES = 34 };

/* ---- vectors ---- */

static float ref_dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return (float)sum;
}

static void ref_axpy(float *y, float alpha, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) y[i] += alpha * x[i];
}

static void ref_scale(float *x, float alpha, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] *= alpha;
}

static float ref_max(const float *x, size_t n)
{
    float most = -INFINITY;
    for (size_t i = 0; i < n; i++)
        if (x[i] > most) most = x[i]; /* a nan is never more */
    return most;
}

static float ref_exp_shift(float *x, float shift, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] = expf(x[i] - shift);
    return (float)sum;
}

static float ref_exp_sum(const float *x, float shift, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += expf(x[i] - shift);
    return (float)sum;
}

static size_t ref_above(const float *x, float least, size_t n, uint32_t *out)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        if (x[i] >= least) out[count++] = (uint32_t)i;
    return count;
}

/* ---- conversion; `in` may sit at any byte ---- */

static uint16_t load16(const void *base, size_t i)
{
    uint16_t v;
    memcpy(&v, (const char *)base + 2 * i, sizeof v);
    return v;
}
static void store16(void *base, size_t i, uint16_t v)
{
    memcpy((char *)base + 2 * i, &v, sizeof v);
}
static float load_f32(const void *base, size_t i)
{
    float v;
    memcpy(&v, (const char *)base + 4 * i, sizeof v);
    return v;
}

/* Element i of a tile's span; q8 without its scale. */
static float element(const void *base, cairn_dtype dtype, size_t i)
{
    switch (dtype) {
    case CAIRN_F32: return load_f32(base, i);
    case CAIRN_F16: return half_widen_f16(load16(base, i));
    case CAIRN_BF16: return half_widen_bf16(load16(base, i));
    case CAIRN_Q8: return ((const int8_t *)base)[i];
    }
    return 0;
}

static void ref_widen(float *out, const void *in, cairn_dtype dtype, size_t n)
{
    assert(dtype != CAIRN_Q8);
    for (size_t i = 0; i < n; i++) out[i] = element(in, dtype, i);
}

static void ref_narrow(void *out, const float *in, cairn_dtype dtype, size_t n)
{
    assert(dtype != CAIRN_Q8);
    switch (dtype) {
    case CAIRN_F16:
        for (size_t i = 0; i < n; i++) store16(out, i, half_narrow_f16(in[i]));
        break;
    case CAIRN_BF16:
        for (size_t i = 0; i < n; i++) store16(out, i, half_narrow_bf16(in[i]));
        break;
    default:
        if (n > 0) memcpy(out, in, n * sizeof *in);
    }
}

/* ---- layers ---- */

static void ref_rms_norm(float *out, const float *x, const float *weight, size_t n, float eps)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    float factor = n > 0 ? (float)(1.0 / sqrt(sum / (double)n + eps)) : 0;
    for (size_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static void ref_silu_mul(float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

static void ref_rotate(float *out, const float *x, const float *cos, const float *sin, size_t n, bool interleaved)
{
    size_t half = n / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    for (size_t i = 0; i < half; i++) {
        float x1 = x[i * step], x2 = x[i * step + apart];
        out[i * step] = x1 * cos[i] - x2 * sin[i];
        out[i * step + apart] = x2 * cos[i] + x1 * sin[i];
    }
}

/* Weight (row, col) of a matrix whose rows take row_bytes. */
static float weight_at(const void *weights, cairn_wtype type, size_t row_bytes, size_t row, size_t col)
{
    const char *at = (const char *)weights + row * row_bytes;
    switch (type) {
    case CAIRN_W_F32: return load_f32(at, col);
    case CAIRN_W_F16: return half_widen_f16(load16(at, col));
    case CAIRN_W_BF16: return half_widen_bf16(load16(at, col));
    case CAIRN_W_Q8_0: {
        const char *block = at + col / Q8_BLOCK * Q8_BLOCK_BYTES;
        return half_widen_f16(load16(block, 0)) * (float)((const int8_t *)block)[2 + col % Q8_BLOCK];
    }
    }
    return 0;
}

static void ref_matvec(float *y, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n,
                       const float *x)
{
    size_t row_bytes = cairn_wtype_row_bytes(type, cols);
    for (size_t r = 0; r < n; r++) {
        double sum = 0;
        for (size_t c = 0; c < cols; c++) sum += (double)weight_at(weights, type, row_bytes, first + r, c) * x[c];
        y[r] = (float)sum;
    }
}

static void ref_dequant(float *out, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n)
{
    size_t row_bytes = cairn_wtype_row_bytes(type, cols);
    for (size_t r = 0; r < n; r++)
        for (size_t c = 0; c < cols; c++) out[r * cols + c] = weight_at(weights, type, row_bytes, first + r, c);
}

/* ---- tiles ---- */

static void ref_tile_scores(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                            void *scratch)
{
    (void)scratch;
    size_t dim = tile->head_dim;
    for (size_t i = 0; i < nq; i++)
        for (size_t t = 0; t < tile->tokens; t++) {
            double sum = 0;
            for (size_t d = 0; d < dim; d++) {
                double key = element(tile->keys, tile->dtype, t * dim + d);
                if (tile->dtype == CAIRN_Q8) key *= load_f32(tile->key_scales, d);
                sum += key * q[i][d];
            }
            scores[i * ld + t] = (float)sum;
        }
}

/* out += sum_t p[t] * factor * value t, for one row */
static void mix_row(const cairn_tile *tile, const float *p, double factor, float *out)
{
    size_t dim = tile->head_dim;
    for (size_t d = 0; d < dim; d++) {
        double sum = 0;
        for (size_t t = 0; t < tile->tokens; t++) {
            double value = element(tile->values, tile->dtype, t * dim + d);
            if (tile->dtype == CAIRN_Q8) value *= load_f32(tile->value_scales, t);
            sum += p[t] * value;
        }
        out[d] += (float)(sum * factor);
    }
}

static void ref_tile_mix(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out, void *scratch)
{
    (void)scratch;
    if (tile->tokens == 0) return;
    for (size_t i = 0; i < nq; i++) mix_row(tile, p + i * ld, 1, out[i]);
}

static void ref_tile_attend(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                            float *const *out, float *lse, void *scratch)
{
    float *p = scratch;
    for (size_t i = 0; i < nq; i++) {
        if (tile->tokens == 0) {
            if (lse != NULL) lse[i] = -INFINITY;
            continue;
        }
        ref_tile_scores(tile, 1, q + i, p, tile->tokens, NULL);
        float most = ref_max(p, tile->tokens), sum = ref_exp_shift(p, most, tile->tokens);
        if (lse != NULL) lse[i] = most + logf(sum);
        mix_row(tile, p, (double)weight[i] / sum, out[i]);
    }
}

/* ---- int8 scan ---- */

static void ref_scan_i8(const int8_t *rows, const float *row_scale, const int32_t *row_sum, size_t group, size_t groups,
                        size_t dim, const int8_t *q, const float *q_scale, size_t nq, float *scores, float *less,
                        size_t ld, const float *bars, uint16_t *over)
{
    (void)row_sum;
    for (size_t i = 0; i < nq; i++)
        for (size_t g = 0; g < groups; g++) {
            if (over != NULL) over[i * groups + g] = 0;
            for (size_t r = 0; r < CAIRN_SCAN_GROUP; r++) {
                const int8_t *at = rows + (group + g) * CAIRN_SCAN_GROUP * dim + r * 4;
                const float scale = row_scale[(group + g) * CAIRN_SCAN_GROUP + r];
                const size_t to = i * ld + g * CAIRN_SCAN_GROUP + r;
                int32_t sum = 0;
                for (size_t j = 0; j < dim; j++) {
                    if (j + 4 == dim && less != NULL) less[to] = (float)sum * scale * q_scale[i];
                    sum += at[j / 4 * 64 + j % 4] * q[i * dim + j];
                }
                scores[to] = (float)sum * scale * q_scale[i];
                if (over != NULL && scores[to] >= bars[i]) over[i * groups + g] |= (uint16_t)(1U << r);
            }
        }
}

static void ref_sketch_i8(const int8_t *rows, size_t block, size_t blocks, size_t dim, const int8_t *q,
                          const int32_t *least, size_t nq, uint64_t *over)
{
    for (size_t i = 0; i < nq; i++)
        for (size_t g = 0; g < blocks; g++) {
            over[i * blocks + g] = 0;
            for (size_t r = 0; r < CAIRN_SKETCH_BLOCK; r++) {
                const int8_t *at = rows + cairn_sketch_at((block + g) * CAIRN_SKETCH_BLOCK + r, dim);
                int32_t sum = 0;
                for (size_t j = 0; j < dim; j++) sum += at[j / 4 * 64 + j % 4] * q[i * dim + j];
                over[i * blocks + g] |= (uint64_t)(sum >= least[i]) << r;
            }
        }
}

static float ref_scan_spread(const float *x, const float *center, size_t n)
{
    float most = 0;
    for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i] - center[i]));
    return most;
}

static void ref_scan_round(const float *x, const float *center, size_t n, float scale, int8_t *values,
                           cairn_scan_rounded *out)
{
    double left = 0;
    int32_t sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        const float d = x[i] - center[i], v = fmaxf(fminf(rintf(d / scale), 127), -127);
        const double miss = (double)d - (double)scale * (double)v;
        values[i] = (int8_t)v;
        sum += (int32_t)v;
        squares += (int32_t)(v * v);
        left += miss * miss;
    }
    *out = (cairn_scan_rounded){sum, (float)squares, (float)left};
}

/* ---- training ---- */

static void ref_swiglu_backward(float *out, float *dgate, float *dup, const float *dout, const float *gate,
                                const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double g = gate[i], s = 1 / (1 + exp(-g)), silu = g * s;
        const float d = dout[i];
        out[i] = (float)(silu * up[i]);
        dgate[i] = (float)(d * (double)up[i] * (s + silu * (1 - s)));
        dup[i] = (float)(d * silu);
    }
}

static void ref_swiglu(float *out, const float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = (float)(gate[i] / (1 + exp(-(double)gate[i])) * up[i]);
}

static void ref_rms_norm_backward(float *dx, float *dweight, const float *x, const float *weight, const float *dy,
                                  size_t n, float eps, bool add)
{
    double square = 0, shared = 0;
    for (size_t i = 0; i < n; i++) square += (double)x[i] * x[i];
    for (size_t i = 0; i < n; i++) shared += (double)weight[i] * dy[i] * x[i];
    const double s = 1 / sqrt(square / (double)n + eps);
    for (size_t i = 0; i < n; i++) {
        const double d = dy[i];
        dweight[i] += (float)(s * d * x[i]);
        dx[i] = (float)((add ? dx[i] : 0) + s * (weight[i] * d - x[i] * shared * s * s / (double)n));
    }
}

static void ref_gemm(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t brow,
                     size_t bcol, float *c, size_t ldc, bool add, float *scratch)
{
    (void)scratch;
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = add ? (double)c[i * ldc + j] : 0;
            for (size_t l = 0; l < k; l++) sum += (double)a[i * row + l * col] * b[l * brow + j * bcol];
            c[i * ldc + j] = (float)sum;
        }
}

static void ref_product(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b,
                        size_t ldb, float *c, size_t ldc, bool add)
{
    ref_gemm(m, n, k, a, row, col, b, ldb, 1, c, ldc, add, NULL);
}

static void ref_transpose(float *out, size_t ld_out, const float *x, size_t ld, size_t rows, size_t cols)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) out[c * ld_out + r] = x[r * ld + c];
}

static void ref_row_softmax(float *x, size_t ld, size_t rows, size_t n, bool causal, const float *weights, float *lse)
{
    for (size_t r = 0; r < rows; r++, x += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n;
        const double most = ref_max(x, sees);
        double sum = 0;
        for (size_t i = 0; i < sees; i++) sum += exp(x[i] - most);
        if (lse != NULL) lse[r] = sees > 0 ? (float)(most + log(sum)) : -INFINITY;
        for (size_t i = 0; i < n; i++)
            x[i] = i < sees ? (float)((weights != NULL ? weights[r] : 1) * exp(x[i] - most) / sum) : 0;
    }
}

static void ref_row_softmax_backward(float *p, float *u, size_t ld, size_t rows, size_t n, bool causal,
                                     const float *weights, float *means, bool known)
{
    for (size_t r = 0; r < rows; r++, p += ld, u += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n;
        if (!known) means[r] = ref_dot(p, u, sees);
        for (size_t i = 0; i < n; i++) {
            p[i] = i < sees ? weights[r] * p[i] : p[i];
            u[i] = i < sees ? p[i] * (u[i] - means[r]) : 0;
        }
    }
}

static size_t ref_set_bits(const uint64_t *words, size_t n, uint32_t *out)
{
    size_t count = 0;
    for (size_t i = 0; i < 64 * n; i++)
        if (words[i / 64] >> i % 64 & 1) out[count++] = (uint32_t)i;
    return count;
}

static void ref_dot_rows(float *out, const float *q, const void *rows, cairn_dtype dtype, size_t dim,
                         const uint32_t *at, size_t n)
{
    float row[1024];
    for (size_t i = 0; i < n; i++) {
        ref_widen(row, (const char *)rows + at[i] * dim * cairn_dtype_size(dtype), dtype, dim);
        out[i] = ref_dot(q, row, dim);
    }
}

const cairn_kernels cairn_kernels_ref = {
    .name = "ref",
    .dot = ref_dot,
    .dot_rows = ref_dot_rows,
    .set_bits = ref_set_bits,
    .axpy = ref_axpy,
    .scale = ref_scale,
    .max = ref_max,
    .exp_shift = ref_exp_shift,
    .exp_sum = ref_exp_sum,
    .above = ref_above,
    .widen = ref_widen,
    .narrow = ref_narrow,
    .rms_norm = ref_rms_norm,
    .silu_mul = ref_silu_mul,
    .rotate = ref_rotate,
    .matvec = ref_matvec,
    .dequant = ref_dequant,
    .tile_scores = ref_tile_scores,
    .tile_mix = ref_tile_mix,
    .tile_attend = ref_tile_attend,
    .scan_i8 = ref_scan_i8,
    .sketch_most = 127,
    .sketch_sum = CAIRN_SKETCH_ANY_SUM,
    .sketch_i8 = ref_sketch_i8,
    .scan_spread = ref_scan_spread,
    .scan_round = ref_scan_round,
    .swiglu = ref_swiglu,
    .swiglu_backward = ref_swiglu_backward,
    .rms_norm_backward = ref_rms_norm_backward,
    .product = ref_product,
    .gemm = ref_gemm,
    .transpose = ref_transpose,
    .row_softmax = ref_row_softmax,
    .row_softmax_backward = ref_row_softmax_backward,
};
