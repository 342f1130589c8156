/* avx2_q8_tile.c - a q8 tile's scores and mix by vpmaddwd, for the attention of avx2.c.
 *
 * What avx512_vnni_tile.c does by bytes, by words of 16 bits: a query times the key scales as u x, |x| <= 32,639, a
 * row's exp times the value scales as w x, x <= 32,767. One vpmaddwd takes 16 products where a fma takes 8, and an int8
 * becomes a word in half an operation where it becomes a float in two eighths; sums of words are exact in int32, so
 * that neither order nor blocking shows. What is lost is half of u and w: 2^-16 of the largest factor.
 *
 * Few queries: four against two keys, a tree over the lanes. Of many, 16 keys are turned, so that a lane is a key and
 * there are no trees. Operations of 16 tokens x 32 dims: of few queries 64 each and 42 for the trees, 32 for all;
 * turning 224, then 64 each and 16 broadcasts; values 64 each and 16 broadcasts, 64 for all. T = 63, Zen 4, ns for a
 * tile in L2, by f32 and by words:
 *
 *      D    1 query       4 queries
 *     32    400, 260        840, 640
 *     64    520, 370      1,330, 970
 *    128    910, 605      2,390, 1,640
 */
#include "tile_bytes.h"
#include "tile_internal.h"
#include "tile_stream.h"
#include "twins_internal.h"
#include "vec256.h"

enum {
    PIECE = 256,       /* tokens whose values are summed as whole numbers */
    GROUP = 16,        /* keys turned at a time */
    MANY = 8,          /* queries from which on keys are turned, */
    MANY_OF_SHORT = 3, /* of SHORT dims */
    SHORT = 32
};
static const float WORD_MAX = 32767;

/* ---- factors as words ---- */

/* The greatest of lanes that are not negative; what is not a number is greater still. By their bits: a maximum of
 * floats forgets a nan. At least TINY. */
INLINE float largest_of(vi bits)
{
    bits = _mm256_max_epi32(bits, _mm256_permute2x128_si256(bits, bits, 0x01));
    bits = _mm256_max_epi32(bits, _mm256_shuffle_epi32(bits, 0x4e));
    bits = _mm256_max_epi32(bits, _mm256_shuffle_epi32(bits, 0xb1));
    const float x = _mm256_cvtss_f32(_mm256_castsi256_ps(bits));
    return x < TINY ? TINY : x;
}

/* 16 numbers as words, in order. */
INLINE vi words_of(vf x, vf y, vf inverse)
{
    vi words = _mm256_packs_epi32(_mm256_cvtps_epi32(v_mul(x, inverse)), _mm256_cvtps_epi32(v_mul(y, inverse)));
    return _mm256_permute4x64_epi64(words, 0xd8);
}

/* q times the key scales, into `to` (D). Returns their unit, times log2 e. */
static float query_words(const cairn_tile *tile, const float *q, int16_t *to)
{
    const vf sign = v_set(-0.0f);
    const size_t dim = tile->head_dim;
    const float *scales = tile->key_scales;
    vi most = vi_zero();
    for (size_t d = 0; d < dim; d += VL) {
        vf x = _mm256_andnot_ps(sign, v_mul(v_load(q + d), v_load(scales + d)));
        most = _mm256_max_epi32(most, _mm256_castps_si256(x));
    }
    const float largest = largest_of(most);
    const vf inverse = v_set(QUERY_MAX / largest);
    for (size_t d = 0; d < dim; d += 2 * VL) {
        vf x = v_mul(v_load(q + d), v_load(scales + d)), y = v_mul(v_load(q + d + VL), v_load(scales + d + VL));
        _mm256_storeu_si256((__m256i_u *)(void *)(to + d), words_of(x, y, inverse));
    }
    return largest / QUERY_MAX * BYTES_LOG2E;
}

/* p times the value scales as words, in its own place, zeros up to a multiple of 32. Returns their unit. */
static float weight_words(const cairn_tile *tile, float *p)
{
    const size_t tokens = tile->tokens, wide = (tokens + 31) / 32 * 32;
    const float *scales = tile->value_scales;
    vi most = vi_zero();
    size_t t = 0;
    for (; t + VL <= tokens; t += VL) {
        vf x = v_mul(v_load(p + t), v_load(scales + t));
        most = _mm256_max_epi32(most, _mm256_castps_si256(x));
        v_store(p + t, x);
    }
    for (; t < wide; t += VL) {
        const size_t n = t < tokens ? tokens - t : 0;
        vf x = n > 0 ? v_mul(v_load_n(p + t, n), v_load_n(scales + t, n)) : v_zero();
        most = _mm256_max_epi32(most, _mm256_castps_si256(x));
        v_store(p + t, x);
    }
    const float largest = largest_of(most);
    const vf inverse = v_set(WORD_MAX / largest);
    for (t = 0; t < wide; t += 2 * VL)
        _mm256_storeu_si256((__m256i_u *)((char *)p + 2 * t), words_of(v_load(p + t), v_load(p + t + VL), inverse));
    return largest / WORD_MAX;
}

INLINE void turn_four(const vi x[4], vi out[4]) /* in each 128 bits: out[j] has the j-th four bytes of all of x */
{
    vi a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    vi c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
}

/* n words of four rows, a multiple of 16, so that a query's next two are four numbers on. */
static void interleave(const int16_t *rows, size_t stride, size_t n, int32_t *to)
{
    for (size_t at = 0; at < n; at += 16, to += 32) {
        vi x[4], out[4];
        for (size_t i = 0; i < 4; i++) x[i] = vi_load(rows + i * stride + at);
        turn_four(x, out);
        for (size_t j = 0; j < 4; j++) {
            _mm_storeu_si128((__m128i_u *)(void *)(to + 4 * j), _mm256_castsi256_si128(out[j]));
            _mm_storeu_si128((__m128i_u *)(void *)(to + 16 + 4 * j), _mm256_extracti128_si256(out[j], 1));
        }
    }
}

/* ---- scores ---- */

INLINE vi words_at(const int8_t *bytes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i_u *)(const void *)bytes));
}

INLINE vi query_at(const int16_t *words)
{
    vi query = vi_load(words);
    __asm__("" : "+x"(query)); /* see v_kept */
    return query;
}

/* QB queries, `stride` words apart, against 8 / QB keys. ask: as many bytes are asked for meanwhile, unless NULL. */
INLINE void score_block(const int QB, const int8_t *keys, size_t dim, const int16_t *q, size_t stride,
                        const float *unit, float *scores, size_t ld, const tile_stream *ahead, const char *ask)
{
    const int TB = VL / QB;
    const size_t three = 3 * dim;
    const int8_t *fourth[2] = {keys, keys + 4 * dim}; /* see body_tile.h */
    vi sum[VL], pair[4], four[2];
    float block[VL];
#pragma GCC unroll 8
    for (int i = 0; i < VL; i++) sum[i] = vi_zero();
    for (size_t d = 0; d < dim; d += 16) {
        vi key[VL], query = query_at(q + d);
        if (ask != NULL) ask_far_twice(ahead, ask, 16 * (size_t)TB), ask += 16 * TB;
#pragma GCC unroll 8
        for (int t = 0; t < TB; t++) {
            key[t] = words_at(fourth[t / 4] + (t % 4 == 3 ? three : (size_t)(t % 4) * dim));
            if (QB == 1)
                sum[t] = vi_madd(key[t], query, sum[t]); /* as it is loaded: the sums take half of 16 registers */
        }
#pragma GCC unroll 4
        for (int i = 0; QB > 1 && i < QB; i++) {
            if (i > 0) query = query_at(q + (size_t)i * stride + d);
#pragma GCC unroll 8
            for (int t = 0; t < TB; t++) sum[i * TB + t] = vi_madd(key[t], query, sum[i * TB + t]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < (TB + 3) / 4; i++) fourth[i] += 16;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        pair[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(sum[2 * i], sum[2 * i + 1]),
                                   _mm256_unpackhi_epi32(sum[2 * i], sum[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                                   _mm256_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
    const vi all = _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                                    _mm256_permute2x128_si256(four[0], four[1], 0x31));
    v_store(block, v_mul(vi_to_f32(all), v_load(unit)));
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) memcpy(scores + (size_t)i * ld, block + i * TB, (size_t)TB * sizeof(float));
}

/* QB queries against all keys, at least 8. The last block overlaps the one before it. */
INLINE void score_few(const int QB, const int8_t *keys, size_t dim, size_t tokens, const int16_t *q, size_t stride,
                      const float *unit, float *scores, size_t ld, const tile_stream *ahead)
{
    const size_t TB = (size_t)(VL / QB);
    float units[VL];
    const char *ask = QB == 1 ? ask_within(ahead, 0) : NULL; /* 8 keys of 16 dims are whole lines */
    for (size_t i = 0; i < VL; i++) units[i] = unit[i / TB];
    for (size_t t = 0; t < tokens;) {
        const size_t end = least_of(t + VL, tokens);
        if (ask == NULL) ask_ahead(ahead, t * dim, end * dim);
        for (; t < end; t += TB) {
            if (t + TB > tokens) t = tokens - TB;
            score_block(QB, keys + t * dim, dim, q, stride, units, scores + t, ld, ahead,
                        ask != NULL ? ask + t * dim : NULL);
        }
    }
}

/* GROUP keys as words, the rows from `tokens` on being the last one: for every two dims a vector of keys 0 .. 7 and one
 * of 8 .. 15. */
INLINE void turn_keys(const int8_t *keys, size_t dim, size_t tokens, vi *to)
{
    const int8_t *row[GROUP];
#pragma GCC unroll 16
    for (size_t i = 0; i < GROUP; i++) row[i] = keys + least_of(i, tokens - 1) * dim;
    for (size_t d = 0; d < dim; d += 8, to += 8)
#pragma GCC unroll 2
        for (size_t h = 0; h < 2; h++) {
            vi x[4], out[4];
#pragma GCC unroll 4
            for (size_t i = 0; i < 4; i++)
                x[i] = _mm256_cvtepi8_epi16(
                    _mm_unpacklo_epi64(_mm_loadu_si64(row[8 * h + i] + d), _mm_loadu_si64(row[8 * h + i + 4] + d)));
            turn_four(x, out);
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++) to[2 * j + h] = out[j];
        }
}

/* QB queries against GROUP turned keys. by: their words, interleaved. */
INLINE void score_turned(const int QB, const vi *keys, size_t dim, const float *unit, const int32_t *by, float *scores,
                         size_t ld)
{
    vi sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) sum[i][0] = sum[i][1] = vi_zero();
    for (size_t d = 0; d < dim; d += 2, keys += 2, by += 4)
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) {
            const vi two = vi_set(by[i]);
            sum[i][0] = vi_madd(keys[0], two, sum[i][0]);
            sum[i][1] = vi_madd(keys[1], two, sum[i][1]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 2
        for (size_t h = 0; h < 2; h++)
            v_store(scores + (size_t)i * ld + h * VL, v_mul(vi_to_f32(sum[i][h]), v_set(unit[i])));
}

/* FOUR(4) for each four of nq queries, from the i-th on, and at last FOUR of how many are left. */
#define IN_FOURS(nq, FOUR)                                                                                             \
    for (size_t i = 0; i < (nq); i += 4) switch ((nq)-i) {                                                             \
        case 1: FOUR(1); break;                                                                                        \
        case 2: FOUR(2); break;                                                                                        \
        case 3: FOUR(3); break;                                                                                        \
        default: FOUR(4);                                                                                              \
        }

void cairn_q8_scores_words(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                           const tile_scratch *scratch, const tile_stream *ahead)
{
    const size_t tokens = tile->tokens, dim = tile->head_dim;
    const int8_t *keys = tile->keys;
    float unit[TILE_QUERIES];
    int16_t *words = (int16_t *)(void *)scratch->rows; /* later turned keys */
    if (nq < (dim > SHORT ? MANY : MANY_OF_SHORT) && tokens >= VL) {
        for (size_t i = 0; i < nq; i++) unit[i] = query_words(tile, q[i], words + i * dim);
#define SCORE(QB)                                                                                                      \
    score_few(QB, keys, dim, tokens, words + i * dim, dim, unit + i, scores + i * ld, ld, i == 0 ? ahead : NULL)
        size_t i = 0;
        for (; i + 4 <= nq; i += 4) SCORE(4);
        for (; i + 2 <= nq; i += 2) SCORE(2);
        if (i < nq) SCORE(1);
#undef SCORE
        return;
    }
    int32_t *fours = (int32_t *)(void *)scratch->queries;
    vi *turned = (vi *)(void *)scratch->rows;
    for (size_t i = 0; i < nq; i++) {
        unit[i] = query_words(tile, q[i], words + i % 4 * dim);
        if (i % 4 == 3 || i + 1 == nq) interleave(words, dim, dim, fours + i / 4 * 2 * dim);
    }
    for (size_t t = 0; t < tokens; t += GROUP) {
        const size_t n = least_of(GROUP, tokens - t), half = n * dim / 2;
        ask_ahead(ahead, t * dim, t * dim + half);
        turn_keys(keys + t * dim, dim, n, turned);
        ask_ahead(ahead, t * dim + half, (t + n) * dim);
#define SCORE(QB) score_turned(QB, turned, dim, unit + i, fours + i / 2 * dim, scores + i * ld + t, ld)
        IN_FOURS(nq, SCORE)
#undef SCORE
    }
}

/* ---- mix ---- */

/* What two values, at a and b, add to 16 WIDE dims of QB sums. */
INLINE void mix_two(const int QB, const int WIDE, const int8_t *a, const int8_t *b, const char *by, vi sum[4][8])
{
    vi x[8];
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; v++) {
        const vi one = words_at(a + 16 * v), other = words_at(b + 16 * v);
        x[2 * v] = _mm256_unpacklo_epi16(one, other), x[2 * v + 1] = _mm256_unpackhi_epi16(one, other);
    }
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) {
        int32_t two_weights;
        memcpy(&two_weights, by + (size_t)i * sizeof two_weights, sizeof two_weights);
        const vi two = vi_set(two_weights);
#pragma GCC unroll 8
        for (int v = 0; v < 2 * WIDE; v++) sum[i][v] = vi_madd(x[v], two, sum[i][v]);
    }
}

/* out[i] += unit[i] times what the weights make of 16 WIDE dims of n values. by: the weights' words,
 * interleaved unless QB = 1. */
INLINE void mix_words(const int QB, const int WIDE, const int8_t *values, size_t dim, size_t n, const char *by,
                      const float *unit, float *const *out, const tile_stream *ahead, size_t from, size_t each)
{
    vi sum[4][8];
    const size_t step = (QB == 1 ? 1 : 4) * sizeof(int32_t);
    const bool within = QB == 1 && 32 * WIDE >= 64; /* what two tokens take is whole lines, and nothing came before */
    const size_t some = ask_every(ahead, 4, each);
    const char *ask = within ? ask_within(ahead, from) : NULL;
    size_t t = 0;
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * WIDE; v++) sum[i][v] = vi_zero();
    while (t + 2 <= n) {
        const size_t end = least_of(t + some, n / 2 * 2);
        if (ask == NULL) ask_ahead(ahead, from + t * each, from + end * each);
#pragma GCC unroll 2
        for (; t < end; t += 2, values += 2 * dim, by += step) {
            if (within && ask != NULL) ask_far_twice(ahead, ask, 32 * (size_t)WIDE), ask += 32 * WIDE;
            mix_two(QB, WIDE, values, values + dim, by, sum);
        }
    }
    if (t < n) { /* the second one's weight is 0 */
        ask_ahead(ahead, from + t * each, from + n * each);
        mix_two(QB, WIDE, values, values, by, sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * WIDE; v++) {
            float *to = out[i] + 8 * (size_t)v;
            const vi *own = &sum[i][v / 2 * 2]; /* of dims 0 .. 3 and 8 .. 11, and of the others */
            const vi s = v % 2 == 0 ? _mm256_permute2x128_si256(own[0], own[1], 0x20)
                                    : _mm256_permute2x128_si256(own[0], own[1], 0x31);
            v_store(to, v_fma(vi_to_f32(s), v_set(unit[i]), v_load(to)));
        }
}

/* All dims of QB rows. ahead as for mix_queries (body_tile.h). */
INLINE void mix_all(const int QB, const int8_t *values, size_t dim, size_t n, const char *by, const float *unit,
                    float *const *out, const tile_stream *ahead, size_t from)
{
    const int WIDE = QB == 1 ? 4 : QB == 2 ? 2 : 1;
    const bool far = ahead != NULL && ahead->far;
    size_t d = 0;
#define MIX(WIDE)                                                                                                      \
    for (; d + 16 * (size_t)(WIDE) <= dim; d += 16 * (size_t)(WIDE), ahead = far ? ahead : NULL) {                     \
        float *to[4];                                                                                                  \
        for (int i = 0; i < QB; i++) to[i] = out[i] + d;                                                               \
        mix_words(QB, WIDE, values + d, dim, n, by, unit, to, ahead, from + (far ? n * d : 0),                         \
                  far ? 16 * (size_t)(WIDE) : dim);                                                                    \
    }
    MIX(WIDE)
    if (WIDE > 2) MIX(2)
#undef MIX
}

void cairn_q8_mix_words(const cairn_tile *tile, size_t nq, float *p, size_t ld, const float *factor, float *const *out,
                        const tile_scratch *scratch, const tile_stream *ahead)
{
    const size_t tokens = tile->tokens, dim = tile->head_dim;
    int32_t four[2 * PIECE];
    float unit[TILE_QUERIES];
    (void)scratch;
    for (size_t i = 0; i < nq; i++) unit[i] = weight_words(tile, p + i * ld) * factor[i];
    for (size_t first = 0, n; first < tokens; first += n) {
        const int8_t *values = (const int8_t *)tile->values + first * dim;
        const tile_stream *asks = ahead;
        n = least_of(tokens - first, PIECE);
#define MIX(QB)                                                                                                        \
    {                                                                                                                  \
        const int16_t *words = (const int16_t *)(const void *)(p + i * ld) + first;                                    \
        if (QB > 1) interleave(words, 2 * ld, (n + 31) / 32 * 32, four);                                               \
        mix_all(QB, values, dim, n, QB > 1 ? (const char *)four : (const char *)words, unit + i, out + i, asks,        \
                first * dim);                                                                                          \
        asks = NULL;                                                                                                   \
    }
        IN_FOURS(nq, MIX)
#undef MIX
    }
}
