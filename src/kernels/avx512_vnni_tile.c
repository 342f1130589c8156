/* avx512_vnni_tile.c - a q8 tile's scores and mix by vpdpbusd, for the attention of avx512.c.
 *
 * By f32 an int8 element costs a conversion of two operations and a fma for each query, a score a tree over its lanes:
 * at D = 32 with four queries to a KV head three quarters of the time the tile takes to arrive (docs/benchmarks.md).
 * Here the other factor becomes whole numbers of 16 bits, two bytes, hi and lo: a query times the key scales as
 * u (256 hi + lo), |256 hi + lo| <= 32,639, a row's exp times the value scales as w (256 hi + lo) <= 65,535 w. Sums of
 * bytes are exact in int32; what is lost is half of u and w: 2^-16 of the largest factor, where the tile itself has
 * lost 2^-8 of each of its own.
 *
 * Four dims of a key, or four tokens of a value's dim, must lie in a lane: the tile is turned into L1 first, once for
 * all queries. Operations of 16 tokens x 32 dims: turning keys 40, values 24, then for each query 16 and 16. T = 63,
 * Emerald Rapids, one core, ns for a tile in L1, by f32 and by bytes:
 *
 *      D    1 query       4 queries        64 queries
 *     32    300, 260      690, 440       8,500, 5,300
 *     64    480, 390      990, 660      12,700, 7,500
 *    128    770, 690    1,690, 1,110    21,500, 12,900
 */
#include "tile_bytes.h"
#include "tile_internal.h"
#include "tile_stream.h"
#include "twins_internal.h"
#include "vec512.h"
#include "vec512_vnni.h"

#include <math.h>

enum {
    PIECE = 4 * TILE_ROWS, /* tokens turned at a time: what the scratch's rows of f32 have room for */
    CHUNK = BYTES_DIMS     /* dims turned at a time */
};

/* ---- scores ---- */

/* Rows a and b, dims [0, 32): those of a first. Rows from `tokens` on are zeros, if there may be any. */
INLINE __m512i two_rows(const bool full, const int8_t *rows, size_t dim, size_t a, size_t b, size_t tokens)
{
    const __m256i none = _mm256_setzero_si256();
    __m256i low = full || a < tokens ? _mm256_loadu_si256((const __m256i_u *)(rows + a * dim)) : none;
    __m256i high = full || b < tokens ? _mm256_loadu_si256((const __m256i_u *)(rows + b * dim)) : none;
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* 16 keys, unsigned: to[j] has dims 4 j .. 4 j + 3 of key t in lane t. */
INLINE void turn_keys(const bool full, const int8_t *keys, size_t dim, size_t tokens, __m512i *to)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (size_t d = 0; d < dim; d += CHUNK, keys += CHUNK, to += CHUNK / 4) {
        __m512i x[8], low[4], high[4];
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++) {
            size_t row = i / 4 * 8 + i % 4;
            x[i] = two_rows(full, keys, dim, row, row + 4, tokens);
        }
        turn_four(x, low);
        turn_four(x + 4, high);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            to[j] = _mm512_xor_si512(_mm512_shuffle_i32x4(low[j], high[j], 0x88), flip);
            to[4 + j] = _mm512_xor_si512(_mm512_shuffle_i32x4(low[j], high[j], 0xdd), flip);
        }
    }
}

/* Numbers of 16 bits, 32 in words that two vectors of 16 were packed to: hi of four, lo of four, and so on in order. */
INLINE __m512i by_digits(__m512i words)
{
    const __m512i bytes = _mm512_set4_epi32(0x0e0c0a08, 0x0f0d0b09, 0x06040200, 0x07050301);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(words, bytes));
}

/* The greatest of lanes that are not negative; what is not a number is greater still. By their bits: a maximum of
 * floats forgets a nan. At least TINY. */
INLINE float largest_of(__m512i bits)
{
    const int32_t most = _mm512_reduce_max_epi32(bits);
    float x;
    memcpy(&x, &most, sizeof x);
    return x < TINY ? TINY : x;
}
INLINE __m512i greater_of(__m512i bits, __m512 x)
{
    return _mm512_max_epi32(bits, _mm512_castps_si512(x));
}

typedef struct digits {
    const int8_t *bytes; /* (2 D): hi of four dims, lo of four dims, and so on */
    float unit;
    int32_t offset; /* 128 times the sum of the numbers: keys are unsigned */
} digits;

/* q times the key scales, into `to` (2 D bytes). */
static digits query_digits(const cairn_tile *tile, const float *q, int8_t *to)
{
    const size_t dim = tile->head_dim;
    const float *scales = tile->key_scales;
    __m512i most = _mm512_setzero_si512();
    for (size_t d = 0; d < dim; d += 16) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(q + d), _mm512_loadu_ps(scales + d));
        most = greater_of(most, _mm512_abs_ps(x));
    }
    const float largest = largest_of(most);
    const __m512 inverse = _mm512_set1_ps(QUERY_MAX / largest);
    __m512i sum = _mm512_setzero_si512();
    for (size_t d = 0; d < dim; d += CHUNK) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(q + d), _mm512_loadu_ps(scales + d));
        __m512 y = _mm512_mul_ps(_mm512_loadu_ps(q + d + 16), _mm512_loadu_ps(scales + d + 16));
        __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)),
                                           _mm512_cvtps_epi32(_mm512_mul_ps(y, inverse)));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
        words = _mm512_add_epi16(words, _mm512_set1_epi16(128)); /* hi rounds to nearest: lo is signed */
        words = _mm512_xor_si512(words, _mm512_set1_epi16(128));
        _mm512_storeu_si512(to + 2 * d, by_digits(words));
    }
    return (digits){to, largest / QUERY_MAX * BYTES_LOG2E, (int32_t)(128u * (uint32_t)_mm512_reduce_add_epi32(sum))};
}

/* QB queries against the turned keys of n tokens, in whole vectors of scores. Meanwhile asks for half as many bytes,
 * from `from` on. */
INLINE void score_turned(const int QB, const __m512i *keys, size_t n, size_t dim, const digits *q, float *scores,
                         size_t ld, const tile_stream *ahead, size_t from)
{
    for (size_t t = 0; t < n; t += 16, keys += dim / 4) {
        ask_ahead(ahead, from + t * dim / 2, from + least_of(t + 16, n) * dim / 2);
        __m512i hi[4], lo[4];
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) hi[i] = lo[i] = _mm512_setzero_si512();
        for (size_t j = 0; j < dim; j += CHUNK) {
#pragma GCC unroll 8
            for (size_t d = j; d < j + CHUNK; d += 4) {
                const __m512i x = _mm512_load_si512(keys + d / 4);
#pragma GCC unroll 4
                for (int i = 0; i < QB; i++) {
                    hi[i] = add_four_dims(hi[i], x, q[i].bytes + 2 * d);
                    lo[i] = add_four_dims(lo[i], x, q[i].bytes + 2 * d + 4);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) {
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]);
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(q[i].offset));
            __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(q[i].unit));
            _mm512_store_ps(scores + (size_t)i * ld + t, score);
        }
    }
}

void cairn_q8_scores_vnni(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                          const tile_scratch *scratch, const tile_stream *ahead)
{
    const size_t tokens = tile->tokens, dim = tile->head_dim;
    digits all[TILE_QUERIES];
    int8_t *room = (int8_t *)(void *)scratch->queries;
    __m512i *turned = (__m512i *)(void *)scratch->rows;
    for (size_t i = 0; i < nq; i++) all[i] = query_digits(tile, q[i], room + i * 2 * dim);
    for (size_t first = 0, n; first < tokens; first += n, scores += PIECE) {
        const int8_t *keys = (const int8_t *)tile->keys + first * dim;
        const size_t quarter = (n = least_of(tokens - first, PIECE)) * dim / 4;
        const tile_stream *asks = ahead;
        size_t at = first * dim;
        ask_ahead(ahead, at, at + quarter);
        for (size_t t = 0; t < n; t += 16) {
            __m512i *to = turned + t / 16 * dim / 4;
            if (n - t >= 16)
                turn_keys(true, keys + t * dim, dim, 16, to);
            else
                turn_keys(false, keys + t * dim, dim, n - t, to);
        }
        at += quarter;
        for (size_t i = 0, some; i < nq; i += some, asks = NULL) {
            some = nq - i >= 4 ? 4 : nq - i >= 2 ? 2 : 1;
            float *to = scores + i * ld;
            switch (some) {
            case 4: score_turned(4, turned, n, dim, all + i, to, ld, asks, at); break;
            case 2: score_turned(2, turned, n, dim, all + i, to, ld, asks, at); break;
            default: score_turned(1, turned, n, dim, all + i, to, ld, asks, at);
            }
        }
        ask_ahead(ahead, at + n * dim / 2, (first + n) * dim);
    }
}

/* ---- mix ---- */

/* Four values: dims 0 .. 15 of all, dim by dim, and dims 16 .. 31. */
INLINE void turn_values(const bool full, const int8_t *values, size_t dim, size_t tokens, __m512i *to)
{
    const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
    const __m512i bytes = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    for (size_t d = 0; d < dim; d += CHUNK, values += CHUNK, to += 2) {
        __m512i a = two_rows(full, values, dim, 0, 1, tokens), b = two_rows(full, values, dim, 2, 3, tokens);
        to[0] = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(a, first, b), bytes);
        to[1] = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(a, second, b), bytes);
    }
}

/* p times the value scales as numbers of 16 bits, in its own place: hi of four tokens, lo of four tokens, and so on,
 * zeros up to a multiple of 32. Returns their unit. */
static float weight_digits(const cairn_tile *tile, float *p)
{
    const size_t tokens = tile->tokens, wide = (tokens + 31) / 32 * 32;
    const float *scales = tile->value_scales;
    __m512i most = _mm512_setzero_si512();
    size_t t = 0;
    for (; t + 16 <= tokens; t += 16) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(p + t), _mm512_loadu_ps(scales + t));
        most = greater_of(most, x);
        _mm512_store_ps(p + t, x);
    }
    for (; t < wide; t += 16) {
        const __mmask16 some = t < tokens ? (__mmask16)((1u << (tokens - t)) - 1) : 0;
        __m512 x = _mm512_maskz_mul_ps(some, _mm512_load_ps(p + t), _mm512_maskz_loadu_ps(some, scales + t));
        most = greater_of(most, x);
        _mm512_store_ps(p + t, x);
    }
    const float largest = largest_of(most);
    const __m512 inverse = _mm512_set1_ps(WEIGHT_MAX / largest);
    for (t = 0; t < wide; t += 32) {
        __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(p + t), inverse));
        __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(p + t + 16), inverse));
        _mm512_store_si512((char *)p + 2 * t, by_digits(_mm512_packus_epi32(x, y)));
    }
    return largest / WEIGHT_MAX;
}

INLINE __m512i all_four(const char *bytes)
{
    return _mm512_broadcastd_epi32(_mm_loadu_si32(bytes));
}

/* out[i] += unit[i] times what the digits at w + i * stride make of 32 dims of n turned values, `step` vectors from
 * four tokens to the next. */
INLINE void mix_turned(const int QB, const __m512i *values, size_t step, size_t n, const char *w, size_t stride,
                       const float *unit, float *const *out, size_t d, const tile_stream *ahead, size_t from)
{
    __m512i hi[4][2], lo[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++) hi[i][0] = hi[i][1] = lo[i][0] = lo[i][1] = _mm512_setzero_si512();
    for (size_t t = 0; t < n; t += 4, values += step, w += 8) {
        if (t % 16 == 0) ask_ahead(ahead, from + t * CHUNK / 2, from + least_of(t + 16, n) * CHUNK / 2);
        const __m512i x = _mm512_load_si512(values), y = _mm512_load_si512(values + 1);
#pragma GCC unroll 4
        for (int i = 0; i < QB; i++) {
            const __m512i a = all_four(w + (size_t)i * stride), b = all_four(w + (size_t)i * stride + 4);
            hi[i][0] = add_four(hi[i][0], a, x), hi[i][1] = add_four(hi[i][1], a, y);
            lo[i][0] = add_four(lo[i][0], b, x), lo[i][1] = add_four(lo[i][1], b, y);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < QB; i++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            float *to = out[i] + d + 16 * (size_t)v;
            __m512 sum =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(hi[i][v]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(lo[i][v]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(unit[i]), _mm512_loadu_ps(to)));
        }
}

void cairn_q8_mix_vnni(const cairn_tile *tile, size_t nq, float *p, size_t ld, const float *factor, float *const *out,
                       const tile_scratch *scratch, const tile_stream *ahead)
{
    const size_t tokens = tile->tokens, dim = tile->head_dim, step = dim / 16;
    float unit[TILE_QUERIES];
    __m512i *turned = (__m512i *)(void *)scratch->rows;
    for (size_t i = 0; i < nq; i++) {
        const size_t bytes = least_of(tokens, PIECE) * dim / 4;
        ask_ahead(ahead, bytes * i / nq, bytes * (i + 1) / nq);
        unit[i] = weight_digits(tile, p + i * ld) * factor[i];
    }
    for (size_t first = 0, n; first < tokens; first += n) {
        const int8_t *values = (const int8_t *)tile->values + first * dim;
        const char *w = (const char *)p + 2 * first;
        n = least_of(tokens - first, PIECE);
        size_t at = first * dim, begin = n * dim / 4; /* asked for above, or here */
        if (first != 0) ask_ahead(ahead, at, at + begin);
        ask_ahead(ahead, at + begin, at + 2 * begin);
        size_t t = 0;
        for (; t + 4 <= n; t += 4) turn_values(true, values + t * dim, dim, 4, turned + t / 4 * step);
        if (t < n) turn_values(false, values + t * dim, dim, n - t, turned + t / 4 * step);
        for (size_t d = 0; d < dim; d += CHUNK) {
            const tile_stream *asks = ahead;
            for (size_t i = 0, some; i < nq; i += some, asks = NULL) {
                const char *own = w + i * ld * sizeof *p;
                const size_t from = at + 2 * begin + n * d / 2;
                some = nq - i >= 4 ? 4 : nq - i >= 2 ? 2 : 1;
#define MIX(QB) mix_turned(QB, turned + d / 16, step, n, own, ld * sizeof *p, unit + i, out + i, d, asks, from)
                switch (some) {
                case 4: MIX(4); break;
                case 2: MIX(2); break;
                default: MIX(1);
                }
#undef MIX
            }
        }
    }
}
