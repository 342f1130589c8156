/* body_tile.h - attention over one tile, over vec512.h or vec256.h; included after body_vectors.h.
 *
 * Chunk invariance. A score is VL partial sums (lane l takes dims l, l + VL, ... in order, each by fma) and one tree
 * over the lanes; the mix of one dim is one chain of fma over the tokens in order. Neither order depends on how
 * queries, tokens or dims are blocked, so the blocking is free to follow the shape. Zero lanes beyond head_dim add
 * nothing.
 *
 * A tile of T tokens, f16, is 4 T D bytes; a query costs T D fma for its scores, T D for the mix, T exp. With few
 * queries the conversion of f16 sets the pace (two cycles for 16 elements on Zen 4: at most 60 GB/s), with many the
 * fma. T = 63, avx512, one core, ns for a tile:
 *
 *      D    1 query, L2       from L3      4 queries, L2      64 queries (fma peak 113 GFLOPS)
 *     32    245 (33 GB/s)     270 (30)       640 (50 GF)       8,400 (61 GF)
 *     64    410 (39)          440 (37)       970 (66 GF)      12,400 (84 GF)
 *    128    690 (47)          735 (44)     1,660 (78 GF)      21,800 (95 GF)
 */
#include "tile_bytes.h"
#include "tile_internal.h"
#include "tile_stream.h"
#include "twins_internal.h"

/* ---- scores ---- */

/* QB queries x TB = VL / QB keys: VL vectors of partial sums, one tree, VL scores. dim is a multiple of VL. ask: as
 * many bytes are asked for meanwhile, unless NULL. */
INLINE void score_block(const int QB, cairn_dtype dtype, const char *keys, size_t stride, size_t dim,
                        const float *const *q, float *scores, size_t ld, const char *ask)
{
    const int TB = VL / QB;
    const size_t three = 3 * stride, step = VL * cairn_dtype_size(dtype);
    const char *fourth[VL / 4]; /* x86 scales an index by 1 and 2: four rows go by one pointer */
    vf sum[VL], query[4];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) sum[i] = v_zero();
#pragma GCC unroll 4
    for (int i = 0; i < (TB + 3) / 4; i++) fourth[i] = keys + 4 * (size_t)i * stride;
    for (size_t d = 0; d < dim; d += VL) {
        if (ask != NULL) ask_far(ask, (size_t)TB * step), ask += (size_t)TB * step;
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) query[i] = v_kept(v_load(q[i] + d));
#pragma GCC unroll 16
        for (int t = 0; t < TB; t++) {
            vf key = v_load_as(fourth[t / 4] + (t % 4 == 3 ? three : (size_t)(t % 4) * stride), dtype, 0);
#pragma GCC unroll 4
            for (int i = 0; i < QB; i++) sum[i * TB + t] = v_fma(key, query[i], sum[i * TB + t]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (TB + 3) / 4; i++) fourth[i] += step;
    }
    float block[VL];
    v_store(block, v_reduce(sum));
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) memcpy(scores + (size_t)i * ld, block + i * TB, (size_t)TB * sizeof(float));
}

/* QB queries against all keys, at least VL of them. The last block overlaps the one before it instead of running short:
 * a score has the same bits whichever block it comes from. */
INLINE void score_queries(const int QB, cairn_dtype dtype, const char *keys, size_t stride, size_t tokens, size_t dim,
                          const float *const *q, float *scores, size_t ld, const tile_stream *ahead)
{
    const size_t TB = (size_t)(VL / QB), some = ask_every(ahead, TB, stride);
    const bool within = TB * VL * cairn_dtype_size(dtype) >= 64; /* a block's dims are whole lines */
    const char *ask = within ? ask_within(ahead, 0) : NULL;
    for (size_t t = 0; t < tokens;) {
        const size_t end = t + some < tokens ? t + some : tokens;
        if (ask == NULL) ask_ahead(ahead, t * stride, end * stride);
        for (; t < end; t += TB) {
            if (t + TB > tokens) t = tokens - TB;
            score_block(QB, dtype, keys + t * stride, stride, dim, q, scores + t, ld,
                        ask != NULL ? ask + t * stride : NULL);
        }
    }
}

INLINE void score_rows(cairn_dtype dtype, const char *keys, size_t tokens, size_t dim, size_t nq, const float *const *q,
                       float *scores, size_t ld, const tile_stream *ahead)
{
    size_t stride = dim * cairn_dtype_size(dtype), i = 0;
    for (; i + 4 <= nq; i += 4, ahead = NULL)
        score_queries(4, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld, ahead);
    if (i + 2 <= nq) {
        score_queries(2, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld, ahead);
        ahead = NULL;
        i += 2;
    }
    if (i < nq) score_queries(1, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld, ahead);
}

/* The queries as rows of whole vectors, zeros behind their end, the q8 key scales folded in: (q * scale) . int8. */
static void pad_queries(const cairn_tile *tile, size_t nq, const float *const *q, size_t wide, const float **out,
                        float *to)
{
    size_t dim = tile->head_dim;
    for (size_t i = 0; i < nq; i++, to += wide) {
        for (size_t d = 0; d < dim; d += VL) {
            size_t n = dim - d < VL ? dim - d : VL;
            vf x = v_load_n(q[i] + d, n);
            v_store(to + d, tile->dtype == CAIRN_Q8 ? v_mul(x, v_load_n(tile->key_scales + d, n)) : x);
        }
        out[i] = to;
    }
}

/* n rows as f32 of whole vectors, zeros behind their end. */
INLINE void pad_keys_as(cairn_dtype dtype, const char *keys, size_t n, size_t dim, size_t wide, float *out)
{
    if (dim == wide) {
        widen_as(out, keys, dtype, n * dim);
        return;
    }
    for (size_t t = 0; t < n; t++, keys += dim * cairn_dtype_size(dtype), out += wide)
        for (size_t d = 0; d < dim; d += VL) v_store(out + d, v_load_as_n(keys, dtype, d, dim - d < VL ? dim - d : VL));
}
static void pad_keys(cairn_dtype dtype, const char *keys, size_t n, size_t dim, size_t wide, float *out)
{
    switch (dtype) {
    case CAIRN_F32: pad_keys_as(CAIRN_F32, keys, n, dim, wide, out); break;
    case CAIRN_F16: pad_keys_as(CAIRN_F16, keys, n, dim, wide, out); break;
    case CAIRN_BF16: pad_keys_as(CAIRN_BF16, keys, n, dim, wide, out); break;
    case CAIRN_Q8: pad_keys_as(CAIRN_Q8, keys, n, dim, wide, out); break;
    }
}

/* Through f32 rows in the scratch: when many queries share one conversion, and for shapes the blocks do not fit
 * (head_dim not a multiple of VL, fewer than VL rows). Conversion is exact, so no bit changes. */
static void score_padded(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                         const tile_scratch *scratch, size_t wide)
{
    size_t tokens = tile->tokens, dim = tile->head_dim, row_bytes = dim * cairn_dtype_size(tile->dtype);
    for (size_t t = 0, n; t < tokens; t += n) {
        n = tokens - t < TILE_ROWS ? tokens - t : TILE_ROWS;
        pad_keys(tile->dtype, (const char *)tile->keys + t * row_bytes, n, dim, wide, scratch->rows);
        if (n >= VL) {
            score_rows(CAIRN_F32, (const char *)scratch->rows, n, wide, nq, q, scores + t, ld, NULL);
            continue;
        }
        memset(scratch->rows + n * wide, 0, (VL - n) * wide * sizeof(float));
        for (size_t i = 0; i < nq; i += 4) {
            float some[4 * VL];
            size_t m = nq - i < 4 ? nq - i : 4;
            score_rows(CAIRN_F32, (const char *)scratch->rows, VL, wide, m, q + i, some, VL, NULL);
            for (size_t j = 0; j < m; j++) memcpy(scores + (i + j) * ld + t, some + j * VL, n * sizeof(float));
        }
    }
}

/* Scores of at most TILE_QUERIES rows. ahead: what to ask for meanwhile, or NULL. */
static void score_tile(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                       const tile_scratch *scratch, const tile_stream *ahead)
{
    size_t tokens = tile->tokens, dim = tile->head_dim, wide = (dim + VL - 1) / VL * VL;
    const float *padded[TILE_QUERIES];
    if (tile->dtype == CAIRN_Q8 || wide != dim) {
        pad_queries(tile, nq, q, wide, padded, scratch->queries);
        q = padded;
    }
    if (wide != dim || tokens < VL || (nq >= MANY_QUERIES && tile->dtype != CAIRN_F32)) {
        ask_ahead(ahead, 0, tokens * dim * cairn_dtype_size(tile->dtype));
        score_padded(tile, nq, q, scores, ld, scratch, wide);
        return;
    }
    switch (tile->dtype) {
    case CAIRN_F32: score_rows(CAIRN_F32, tile->keys, tokens, dim, nq, q, scores, ld, ahead); break;
    case CAIRN_F16: score_rows(CAIRN_F16, tile->keys, tokens, dim, nq, q, scores, ld, ahead); break;
    case CAIRN_BF16: score_rows(CAIRN_BF16, tile->keys, tokens, dim, nq, q, scores, ld, ahead); break;
    case CAIRN_Q8: score_rows(CAIRN_Q8, tile->keys, tokens, dim, nq, q, scores, ld, ahead); break;
    }
}

/* ---- mix ---- */

/* out += factor times the mix of QB rows x DB vectors of dims, tokens in order. n < VL lanes when not `full` (then
 * DB = 1). Meanwhile `each` bytes a token are asked for, from `from` on. */
INLINE void mix_block(const int QB, const int DB, const bool full, cairn_dtype dtype, const char *values, size_t stride,
                      size_t tokens, size_t first, size_t n, const float *p, size_t ld, float *const *out,
                      const float *factor, const tile_stream *ahead, size_t from, size_t each)
{
    vf sum[32], value[8];
#pragma GCC unroll 32
    for (int i = 0; i < QB * DB; i++) sum[i] = v_zero();
    const size_t some = ask_every(ahead, 4, each), step = VL * cairn_dtype_size(dtype);
    const bool within = QB == 1 && full && (size_t)DB * step >= 64;
    const size_t pace = ask_pace(ahead, (size_t)DB * step);
    const char *row = values + first * cairn_dtype_size(dtype), *ask = within ? ask_within(ahead, from) : NULL;
    for (size_t t = 0; t < tokens;) {
        const size_t end = t + some < tokens ? t + some : tokens;
        if (ask == NULL) ask_ahead(ahead, from + t * each, from + end * each);
        for (; t < end; t++, row += stride) {
            if (QB == 1 && full) { /* each value used as it is loaded: the sums take half of 16 registers */
                const vf weight = v_kept(v_set(p[t]));
                if (within && ask != NULL) ask_far(ask, (size_t)DB * step), ask += pace;
#pragma GCC unroll 8
                for (int b = 0; b < DB; b++)
                    sum[b] = v_fma(weight, v_load_as(row + (size_t)b * step, dtype, 0), sum[b]);
                continue;
            }
#pragma GCC unroll 8
            for (int b = 0; b < DB; b++)
                value[b] = full ? v_load_as(row + (size_t)b * step, dtype, 0) : v_load_as_n(row, dtype, 0, n);
#pragma GCC unroll 8
            for (int i = 0; i < QB; i++) {
                vf weight = v_set(p[(size_t)i * ld + t]);
#pragma GCC unroll 8
                for (int b = 0; b < DB; b++) sum[i * DB + b] = v_fma(weight, value[b], sum[i * DB + b]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 8
        for (int b = 0; b < DB; b++) {
            float *to = out[i] + first + (size_t)b * VL;
            const vf by = v_set(factor[i]);
            if (full)
                v_store(to, v_fma(by, sum[i * DB + b], v_load(to)));
            else
                v_store_n(to, v_fma(by, sum[i * DB + b], v_load_n(to, n)), n);
        }
}

/* All dims of QB rows, in the widest blocks that still fit the registers: QB * WIDE accumulators. The first block of
 * dims asks for all that comes near, each for its share of what comes far. */
INLINE void mix_queries(const int QB, const int WIDE, cairn_dtype dtype, const char *values, size_t tokens, size_t dim,
                        const float *p, size_t ld, float *const *out, const float *factor, const tile_stream *ahead)
{
    const size_t size = cairn_dtype_size(dtype), stride = dim * size;
    const bool far = ahead != NULL && ahead->far;
    size_t d = 0;
#define MIX(DB)                                                                                                        \
    for (; d + (size_t)(DB)*VL <= dim; d += (size_t)(DB)*VL, ahead = far ? ahead : NULL)                               \
    mix_block(QB, DB, true, dtype, values, stride, tokens, d, VL, p, ld, out, factor, ahead,                           \
              far ? tokens *d *size : 0, far ? (size_t)(DB)*VL *size : stride)
    MIX(WIDE);
    if (WIDE > 4) MIX(4);
    if (WIDE > 2) MIX(2);
    MIX(1);
#undef MIX
    if (d < dim)
        for (size_t i = 0; i < (size_t)QB; i++)
            mix_block(1, 1, false, dtype, values, stride, tokens, d, dim - d, p + i * ld, ld, out + i, factor + i, NULL,
                      0, 0);
}

INLINE void mix_rows(cairn_dtype dtype, const char *values, size_t tokens, size_t dim, size_t nq, const float *p,
                     size_t ld, float *const *out, const float *factor, const tile_stream *ahead)
{
    size_t i = 0;
    for (; i + MIX_QUERIES <= nq; i += MIX_QUERIES, ahead = NULL)
        mix_queries(MIX_QUERIES, MIX_WIDE, dtype, values, tokens, dim, p + i * ld, ld, out + i, factor + i, ahead);
    if (i + 4 <= nq) { /* a group of four shares one conversion */
        mix_queries(4, MIX_WIDE_FOUR, dtype, values, tokens, dim, p + i * ld, ld, out + i, factor + i, ahead);
        ahead = NULL;
        i += 4;
    }
    for (; i + 2 <= nq; i += 2, ahead = NULL)
        mix_queries(2, MIX_WIDE, dtype, values, tokens, dim, p + i * ld, ld, out + i, factor + i, ahead);
    if (i < nq) mix_queries(1, 8, dtype, values, tokens, dim, p + i * ld, ld, out + i, factor + i, ahead);
}

/* p holds the weights of a row but for its factor, the value scales of q8 folded in. ahead: as for scores. */
static void mix_tile(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out,
                     const float *factor, const tile_stream *ahead)
{
    size_t tokens = tile->tokens, dim = tile->head_dim;
    switch (tile->dtype) {
    case CAIRN_F32: mix_rows(CAIRN_F32, tile->values, tokens, dim, nq, p, ld, out, factor, ahead); break;
    case CAIRN_F16: mix_rows(CAIRN_F16, tile->values, tokens, dim, nq, p, ld, out, factor, ahead); break;
    case CAIRN_BF16: mix_rows(CAIRN_BF16, tile->values, tokens, dim, nq, p, ld, out, factor, ahead); break;
    case CAIRN_Q8: mix_rows(CAIRN_Q8, tile->values, tokens, dim, nq, p, ld, out, factor, ahead); break;
    }
}

/* to[t] = p[t] * the value scale of token t */
INLINE void fold_value_scales(const cairn_tile *tile, const float *p, float *to)
{
    const float *scales = tile->value_scales;
    size_t t = 0, tokens = tile->tokens;
    for (; t + VL <= tokens; t += VL) v_store(to + t, v_mul(v_load(p + t), v_load(scales + t)));
    if (t < tokens) v_store_n(to + t, v_mul(v_load_n(p + t, tokens - t), v_load_n(scales + t, tokens - t)), tokens - t);
}

/* ---- the table's three ---- */

static void tile_scores(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                        void *scratch)
{
    tile_scratch s = tile_scratch_over(scratch, tile->tokens, tile->head_dim);
    if (tile->tokens == 0) return;
    for (size_t i = 0, n; i < nq; i += n) {
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        score_tile(tile, n, q + i, scores + i * ld, ld, &s, NULL);
    }
}

static void tile_mix(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out, void *scratch)
{
    tile_scratch s = tile_scratch_over(scratch, tile->tokens, tile->head_dim);
    float ones[TILE_QUERIES];
    if (tile->tokens == 0) return;
    for (size_t i = 0; i < TILE_QUERIES; i++) ones[i] = 1.0f;
    for (size_t i = 0, n; i < nq; i += n) {
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        if (tile->dtype != CAIRN_Q8) {
            mix_tile(tile, n, p + i * ld, ld, out + i, ones, NULL);
            continue;
        }
        for (size_t j = 0; j < n; j++) fold_value_scales(tile, p + (i + j) * ld, s.p + j * s.p_ld);
        mix_tile(tile, n, s.p, s.p_ld, out + i, ones, NULL);
    }
}

/* The vector of a row of `tokens` scores or weights from t on. A row of the scratch has room for whole vectors: those
 * of the end are loaded whole and stored whole, for AVX2 stores lanes one by one. */
INLINE vf row_scores(const float *row, size_t t, size_t tokens)
{
    const vf x = v_load(row + t);
    return t + VL <= tokens ? x : v_or_least(x, tokens - t);
}
INLINE void row_weights(float *row, size_t t, size_t tokens, vf e, vf *sum)
{
    if (t + VL > tokens) e = v_or_zero(e, tokens - t);
    v_store(row + t, e);
    *sum = v_add(*sum, e);
}

static void greatest_of_rows(size_t tokens, size_t n, const float *p, size_t ld, float *most)
{
    for (size_t i = 0; i < n; i++) {
        const float *row = p + i * ld;
        vf m = v_set(-INFINITY); /* v_max keeps its second operand when the first is nan */
        for (size_t t = 0; t < tokens; t += VL) m = v_max(row_scores(row, t, tokens), m);
        most[i] = v_greatest(m);
    }
}

/* Scores to exp(score - most), zeros behind them, and their sums. Step by step over all rows rather than row by row:
 * each step is short and its rows are independent, so that several are under way at once; a row's own chain (greatest,
 * exp, sum) is 100 cycles long. `near`: of scores in base 2, for weights that are rounded to 16 bits, added in the
 * order that suits avx512_amx_tile.c: vector by vector, four lanes, then those sums. */
INLINE void exp_rows(const bool near, size_t tokens, size_t n, float *p, size_t ld, float *most, float *sum,
                     const tile_stream *ahead)
{
    greatest_of_rows(tokens, n, p, ld, most);
    for (size_t i = 0; i < n; i++) {
        const vf shift = v_set(most[i]);
        float *row = p + i * ld;
        vf s = v_zero();
        ask_before(ahead, i, n);
        for (size_t t = 0; t < tokens; t += VL) {
            const vf x = v_sub(row_scores(row, t, tokens), shift);
            row_weights(row, t, tokens, near ? v_exp2_near(v_max(v_set(BYTES_LEAST), x)) : v_exp_down(x), &s);
        }
        sum[i] = near ? v_sum_of_fours(s) : v_sum(s);
    }
}

static void tile_attend(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                        float *const *out, float *lse, void *scratch)
{
    const size_t tokens = tile->tokens;
    if (tokens == 0) {
        for (size_t i = 0; lse != NULL && i < nq; i++) lse[i] = -INFINITY;
        return;
    }
    tile_scratch s = tile_scratch_over(scratch, tokens, tile->head_dim);
    tile_stream keys, values;
    begin_streams(tile, nq, &keys, &values);
    if (nq >= 3 && !values.far) values.share = 2, values.before = values.bytes / 4;
    for (size_t i = 0, n; i < nq; i += n) {
        float most[TILE_QUERIES], sum[TILE_QUERIES], factor[TILE_QUERIES];
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        score_tile(tile, n, q + i, s.p, s.p_ld, &s, i == 0 ? &keys : NULL);
        exp_rows(false, tokens, n, s.p, s.p_ld, most, sum, i == 0 ? &values : NULL);
        for (size_t j = 0; j < n; j++) factor[j] = weight[i + j] / sum[j];
        for (size_t j = 0; tile->dtype == CAIRN_Q8 && j < n; j++)
            fold_value_scales(tile, s.p + j * s.p_ld, s.p + j * s.p_ld);
        for (size_t j = 0; lse != NULL && j < n; j++) lse[i + j] = most[j] + logf(sum[j]);
        mix_tile(tile, n, s.p, s.p_ld, out + i, factor, i == 0 ? &values : NULL);
    }
}

/* ---- q8 by whole numbers of 16 bits ---- */

/* tile_attend, of a tile that suits them by the two functions given (twins_internal.h). */
INLINE void attend_by_words(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                            float *const *out, float *lse, void *scratch, cairn_q8_scores *scores, cairn_q8_mix *mix)
{
    const size_t tokens = tile->tokens;
    tile_stream keys, values;
    if (tokens == 0 || !suits_bytes(tile)) {
        tile_attend(tile, nq, q, weight, out, lse, scratch);
        return;
    }
    tile_scratch s = tile_scratch_over(scratch, tokens, tile->head_dim);
    begin_streams(tile, nq, &keys, &values);
    for (size_t i = 0, n; i < nq; i += n) {
        float most[TILE_QUERIES], sum[TILE_QUERIES], factor[TILE_QUERIES];
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        scores(tile, n, q + i, s.p, s.p_ld, &s, i == 0 ? &keys : NULL);
        exp_rows(true, tokens, n, s.p, s.p_ld, most, sum, i == 0 ? &values : NULL);
        for (size_t j = 0; j < n; j++) factor[j] = weight[i + j] / sum[j];
        for (size_t j = 0; lse != NULL && j < n; j++) lse[i + j] = most[j] * BYTES_LN2 + logf(sum[j]);
        mix(tile, n, s.p, s.p_ld, factor, out + i, &s, i == 0 ? &values : NULL);
    }
}

/* The same of two tiles of one shape, for a row each. What stands between a tile's products, the greatest,
 * exponentials, a unit, is one chain of latencies, and two of them take hardly longer than one. */
INLINE void attend_two_by_words(const cairn_tile *two, const float *const *q, const float *weight, float *const *out,
                                void *scratch, cairn_q8_scores *scores, cairn_q8_mix *mix)
{
    const size_t tokens = two[0].tokens;
    tile_stream keys[2], values[2];
    float most[2], sum[2];
    tile_scratch s = tile_scratch_over(scratch, tokens, two[0].head_dim);
    for (size_t t = 0; t < 2; t++) begin_streams(&two[t], 1, &keys[t], &values[t]);
    for (size_t t = 0; t < 2; t++) scores(&two[t], 1, q + t, s.p + t * s.p_ld, s.p_ld, &s, &keys[t]);
    exp_rows(true, tokens, 2, s.p, s.p_ld, most, sum, NULL); /* one row asks for nothing here */
    for (size_t t = 0; t < 2; t++) {
        const float factor = weight[t] / sum[t];
        mix(&two[t], 1, s.p + t * s.p_ld, s.p_ld, &factor, out + t, &s, &values[t]);
    }
}
