/* body_tile.h - attention over one tile, over vec512.h or vec256.h; included after body_vectors.h.
 *
 * Chunk invariance. A score is VL partial sums (lane l takes dims l, l + VL, ... in order, each by fma) and one tree
 * over the lanes; the mix of one dim is one chain of fma over the tokens in order. Neither order depends on how
 * queries, tokens or dims are blocked, so the blocking is free to follow the shape. Zero lanes beyond head_dim add
 * nothing.
 */
#include "tile_internal.h"

enum { MANY_QUERIES = 16 }; /* from here on the arithmetic outweighs the bytes */

/* ---- scores ---- */

/* QB queries x TB = VL / QB keys: VL vectors of partial sums, one tree, VL scores. n < TB keys when not `full`. */
INLINE void score_block(const int QB, const bool full, cairn_dtype dtype, const char *keys, size_t stride, size_t dim,
                        const float *const *q, size_t n, float *scores, size_t ld)
{
    const int TB = VL / QB;
    vf sum[VL], query[4];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) sum[i] = v_zero();
    size_t d = 0;
    for (; d + VL <= dim; d += VL) {
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) query[i] = v_load(q[i] + d);
#pragma GCC unroll 16
        for (int t = 0; t < TB; t++) {
            if (!full && (size_t)t >= n) continue;
            vf key = v_load_as(keys + (size_t)t * stride, dtype, d);
#pragma GCC unroll 4
            for (int i = 0; i < QB; i++) sum[i * TB + t] = v_fma(key, query[i], sum[i * TB + t]);
        }
    }
    if (d < dim) {
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) query[i] = v_load_n(q[i] + d, dim - d);
#pragma GCC unroll 16
        for (int t = 0; t < TB; t++) {
            if (!full && (size_t)t >= n) continue;
            vf key = v_load_as_n(keys + (size_t)t * stride, dtype, d, dim - d);
#pragma GCC unroll 4
            for (int i = 0; i < QB; i++) sum[i * TB + t] = v_fma(key, query[i], sum[i * TB + t]);
        }
    }
    float block[VL];
    v_store(block, v_reduce(sum));
    size_t count = full ? (size_t)TB : n;
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) memcpy(scores + (size_t)i * ld, block + i * TB, count * sizeof(float));
}

/* QB queries against all keys. The last block overlaps the one before it instead of running short. */
INLINE void score_queries(const int QB, cairn_dtype dtype, const char *keys, size_t stride, size_t tokens, size_t dim,
                          const float *const *q, float *scores, size_t ld)
{
    const size_t TB = (size_t)(VL / QB);
    if (tokens < TB) {
        score_block(QB, false, dtype, keys, stride, dim, q, tokens, scores, ld);
        return;
    }
    for (size_t t = 0; t < tokens; t += TB) {
        if (t + TB > tokens) t = tokens - TB;
        score_block(QB, true, dtype, keys + t * stride, stride, dim, q, TB, scores + t, ld);
    }
}

INLINE void score_rows(cairn_dtype dtype, const char *keys, size_t tokens, size_t dim, size_t nq, const float *const *q,
                       float *scores, size_t ld)
{
    size_t stride = dim * cairn_dtype_size(dtype), i = 0;
    for (; i + 4 <= nq; i += 4) score_queries(4, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld);
    if (i + 2 <= nq) {
        score_queries(2, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld);
        i += 2;
    }
    if (i < nq) score_queries(1, dtype, keys, stride, tokens, dim, q + i, scores + i * ld, ld);
}

/* The rows as f32 in the scratch, so that many queries share one conversion: exact, so no bit changes. */
INLINE void score_widened(cairn_dtype dtype, const char *keys, size_t tokens, size_t dim, size_t nq,
                          const float *const *q, float *scores, size_t ld, float *rows)
{
    for (size_t t = 0, n; t < tokens; t += n) {
        n = tokens - t < TILE_ROWS ? tokens - t : TILE_ROWS;
        widen_as(rows, keys + t * dim * cairn_dtype_size(dtype), dtype, n * dim);
        score_rows(CAIRN_F32, (const char *)rows, n, dim, nq, q, scores + t, ld);
    }
}

/* Scores of at most TILE_QUERIES rows. */
static void score_tile(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                       const tile_scratch *scratch)
{
    size_t tokens = tile->tokens, dim = tile->head_dim;
    const bool widened = nq >= MANY_QUERIES;
    const float *folded[TILE_QUERIES];
    if (tile->dtype == CAIRN_Q8) { /* (q * scale) . int8: the scales of the channels go into the query once */
        for (size_t i = 0; i < nq; i++) {
            float *to = scratch->queries + i * dim;
            size_t d = 0;
            for (; d + VL <= dim; d += VL) v_store(to + d, v_mul(v_load(q[i] + d), v_load(tile->key_scales + d)));
            if (d < dim)
                v_store_n(to + d, v_mul(v_load_n(q[i] + d, dim - d), v_load_n(tile->key_scales + d, dim - d)), dim - d);
            folded[i] = to;
        }
        q = folded;
    }
#define SCORE_AS(DTYPE)                                                                                                \
    widened ? score_widened(DTYPE, tile->keys, tokens, dim, nq, q, scores, ld, scratch->rows)                          \
            : score_rows(DTYPE, tile->keys, tokens, dim, nq, q, scores, ld)
    switch (tile->dtype) {
    case CAIRN_F32: score_rows(CAIRN_F32, tile->keys, tokens, dim, nq, q, scores, ld); break;
    case CAIRN_F16: SCORE_AS(CAIRN_F16); break;
    case CAIRN_BF16: SCORE_AS(CAIRN_BF16); break;
    case CAIRN_Q8: SCORE_AS(CAIRN_Q8); break;
    }
#undef SCORE_AS
}

/* ---- mix ---- */

/* QB rows x DB vectors of dims, tokens in order. n < VL lanes when not `full` (then DB = 1). */
INLINE void mix_block(const int QB, const int DB, const bool full, cairn_dtype dtype, const char *values, size_t stride,
                      size_t tokens, size_t first, size_t n, const float *p, size_t ld, float *const *out)
{
    vf sum[32], value[8];
#pragma GCC unroll 32
    for (int i = 0; i < QB * DB; i++) sum[i] = v_zero();
    for (size_t t = 0; t < tokens; t++) {
        const char *row = values + t * stride;
#pragma GCC unroll 8
        for (int b = 0; b < DB; b++)
            value[b] = full ? v_load_as(row, dtype, first + (size_t)b * VL) : v_load_as_n(row, dtype, first, n);
#pragma GCC unroll 8
        for (int i = 0; i < QB; i++) {
            vf weight = v_set(p[(size_t)i * ld + t]);
#pragma GCC unroll 8
            for (int b = 0; b < DB; b++) sum[i * DB + b] = v_fma(weight, value[b], sum[i * DB + b]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 8
        for (int b = 0; b < DB; b++) {
            float *to = out[i] + first + (size_t)b * VL;
            if (full)
                v_store(to, v_add(v_load(to), sum[i * DB + b]));
            else
                v_store_n(to, v_add(v_load_n(to, n), sum[i * DB + b]), n);
        }
}

/* All dims of QB rows, in the widest blocks that still fit the registers: QB * WIDE accumulators. */
INLINE void mix_queries(const int QB, const int WIDE, cairn_dtype dtype, const char *values, size_t tokens, size_t dim,
                        const float *p, size_t ld, float *const *out)
{
    size_t stride = dim * cairn_dtype_size(dtype), d = 0;
    for (; d + (size_t)WIDE * VL <= dim; d += (size_t)WIDE * VL)
        mix_block(QB, WIDE, true, dtype, values, stride, tokens, d, VL, p, ld, out);
    if (WIDE > 2)
        for (; d + 2 * VL <= dim; d += 2 * VL) mix_block(QB, 2, true, dtype, values, stride, tokens, d, VL, p, ld, out);
    for (; d + VL <= dim; d += VL) mix_block(QB, 1, true, dtype, values, stride, tokens, d, VL, p, ld, out);
    if (d < dim) mix_block(QB, 1, false, dtype, values, stride, tokens, d, dim - d, p, ld, out);
}

INLINE void mix_rows(cairn_dtype dtype, const char *values, size_t tokens, size_t dim, size_t nq, const float *p,
                     size_t ld, float *const *out)
{
    size_t i = 0;
    for (; i + MIX_QUERIES <= nq; i += MIX_QUERIES)
        mix_queries(MIX_QUERIES, MIX_WIDE, dtype, values, tokens, dim, p + i * ld, ld, out + i);
    for (; i + 2 <= nq; i += 2) mix_queries(2, MIX_WIDE, dtype, values, tokens, dim, p + i * ld, ld, out + i);
    if (i < nq) mix_queries(1, 8, dtype, values, tokens, dim, p + i * ld, ld, out + i);
}

/* p holds the weights, the value scales of q8 folded in. */
static void mix_tile(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out)
{
    size_t tokens = tile->tokens, dim = tile->head_dim;
    switch (tile->dtype) {
    case CAIRN_F32: mix_rows(CAIRN_F32, tile->values, tokens, dim, nq, p, ld, out); break;
    case CAIRN_F16: mix_rows(CAIRN_F16, tile->values, tokens, dim, nq, p, ld, out); break;
    case CAIRN_BF16: mix_rows(CAIRN_BF16, tile->values, tokens, dim, nq, p, ld, out); break;
    case CAIRN_Q8: mix_rows(CAIRN_Q8, tile->values, tokens, dim, nq, p, ld, out); break;
    }
}

/* to[t] = p[t] * factor (* the value scale of token t) */
INLINE void fold_value_scales(const cairn_tile *tile, const float *p, float factor, float *to)
{
    vf f = v_set(factor);
    size_t t = 0, tokens = tile->tokens;
    if (tile->dtype != CAIRN_Q8) {
        for (; t + VL <= tokens; t += VL) v_store(to + t, v_mul(v_load(p + t), f));
        if (t < tokens) v_store_n(to + t, v_mul(v_load_n(p + t, tokens - t), f), tokens - t);
        return;
    }
    const float *scales = tile->value_scales;
    for (; t + VL <= tokens; t += VL) v_store(to + t, v_mul(v_mul(v_load(p + t), f), v_load(scales + t)));
    if (t < tokens) {
        size_t n = tokens - t;
        v_store_n(to + t, v_mul(v_mul(v_load_n(p + t, n), f), v_load_n(scales + t, n)), n);
    }
}

/* ---- the table's three ---- */

static void tile_scores(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                        void *scratch)
{
    tile_scratch s = tile_scratch_over(scratch, tile->tokens, tile->head_dim);
    if (tile->tokens == 0) return;
    for (size_t i = 0, n; i < nq; i += n) {
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        score_tile(tile, n, q + i, scores + i * ld, ld, &s);
    }
}

static void tile_mix(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out, void *scratch)
{
    if (tile->tokens == 0) return;
    if (tile->dtype != CAIRN_Q8) {
        mix_tile(tile, nq, p, ld, out);
        return;
    }
    tile_scratch s = tile_scratch_over(scratch, tile->tokens, tile->head_dim);
    for (size_t i = 0, n; i < nq; i += n) {
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        for (size_t j = 0; j < n; j++) fold_value_scales(tile, p + (i + j) * ld, 1.0f, s.p + j * s.p_ld);
        mix_tile(tile, n, s.p, s.p_ld, out + i);
    }
}

/* Asks for a tile as a whole before the first row is used: a few rows are done with it long before the hardware has
 * noticed a stream. Every other line, since lines come in pairs. Random f16 tiles from DRAM, D = 32 / 64 / 128, one
 * row: 1145 / 2370 / 3900 -> 950 / 1640 / 3230 ns; from L2 it costs 5 %. */
INLINE void announce(const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 128) _mm_prefetch((const char *)data + i, _MM_HINT_T1);
}

static void tile_attend(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                        float *const *out, float *lse, void *scratch)
{
    size_t tokens = tile->tokens, bytes = tokens * tile->head_dim * cairn_dtype_size(tile->dtype);
    tile_scratch s = tile_scratch_over(scratch, tokens, tile->head_dim);
    if (nq < MANY_QUERIES) announce(tile->keys, bytes), announce(tile->values, bytes);
    for (size_t i = 0, n; i < nq; i += n) {
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        if (tokens > 0) score_tile(tile, n, q + i, s.p, s.p_ld, &s);
        for (size_t j = 0; j < n; j++) {
            float *row = s.p + j * s.p_ld, most = max(row, tokens);
            float sum = exp_shift(row, most, tokens);
            if (lse != NULL) lse[i + j] = most + logf(sum); /* -inf for no tokens */
            fold_value_scales(tile, row, weight[i + j] / sum, row);
        }
        if (tokens > 0) mix_tile(tile, n, s.p, s.p_ld, out + i);
    }
}
