/* avx512_vnni.c - the int8 scan by vpdpbusd, which adds four byte products to an int32 lane, unsigned by signed.
 *
 * The rows become unsigned (x + 128 = x ^ 0x80, one operation for all queries), so a lane holds
 * sum((x + 128) q) = sum(x q) + 128 sum(q), and 128 sum(q) belongs to the query alone: the row sums are not needed, nor
 * their 4 bytes a row. 255 * 128 * 1024 dims < 2^25: exact in int32.
 *
 * Per 64 row bytes (16 rows, four dims): one load, one xor, and a vpdpbusd with a broadcast operand for each query.
 * One Zen 4 core, dim 128, from L3: 1 query 72 GB/s of rows, 4 queries 52 (420 Gop/s), 64 queries 430 Gop/s of 470;
 * from DRAM 25 GB/s with 1 or 4 queries.
 */
#include "twins_internal.h"
#include "vec512_vnni.h"

#include <assert.h>

enum { AHEAD_BYTES = 4096 };

/* NQ queries over the groups: 8 sums cover the latency of 5 cycles; of fewer queries, each has two (CHAINS), one for
 * even and one for odd quads of dims. */
INLINE void scan_queries(const int NQ, const int CHAINS, const int8_t *rows, const float *row_scale, size_t groups,
                         size_t dim, const int8_t *q, const float *q_scale, const __m512i *offset,
                         const __m512i *offset_less, float *scores, float *less, size_t ld, const float *bars,
                         uint16_t *over)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    const size_t last = dim - 4;
    for (size_t g = 0; g < groups; g++, rows += 16 * dim, row_scale += 16) {
        __m512i sum[8], odd[8];
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) sum[i] = offset_less[i], odd[i] = _mm512_setzero_si512();
        size_t j = 0;
        for (; j + 4 * (size_t)CHAINS <= last; j += 4 * (size_t)CHAINS) {
            const int8_t *at = rows + j * 16;
            _mm_prefetch((const char *)at + AHEAD_BYTES, _MM_HINT_T0);
            __m512i x = _mm512_xor_si512(_mm512_loadu_si512(at), flip);
#pragma GCC unroll 8
            for (int i = 0; i < NQ; i++) sum[i] = add_four_dims(sum[i], x, q + (size_t)i * dim + j);
            if (CHAINS == 1) continue;
            _mm_prefetch((const char *)at + AHEAD_BYTES + 64, _MM_HINT_T0);
            x = _mm512_xor_si512(_mm512_loadu_si512(at + 64), flip);
#pragma GCC unroll 8
            for (int i = 0; i < NQ; i++) odd[i] = add_four_dims(odd[i], x, q + (size_t)i * dim + j + 4);
        }
        if (j < last) {
            __m512i x = _mm512_xor_si512(_mm512_loadu_si512(rows + j * 16), flip);
#pragma GCC unroll 8
            for (int i = 0; i < NQ; i++) sum[i] = add_four_dims(sum[i], x, q + (size_t)i * dim + j);
        }
        _mm_prefetch((const char *)rows + last * 16 + AHEAD_BYTES, _MM_HINT_T0);
        __m512i x = _mm512_xor_si512(_mm512_loadu_si512(rows + last * 16), flip);
        __m512 scale = _mm512_loadu_ps(row_scale);
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) {
            const __m512 q_scaled = _mm512_set1_ps(q_scale[i]);
            float *to = scores + (size_t)i * ld + g * 16;
            if (CHAINS == 2) sum[i] = _mm512_add_epi32(sum[i], odd[i]);
            if (less != NULL) {
                __m512 before = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i]), scale);
                _mm512_storeu_ps(less + (size_t)i * ld + g * 16, _mm512_mul_ps(before, q_scaled));
            }
            sum[i] = add_four_dims(_mm512_add_epi32(sum[i], offset[i]), x, q + (size_t)i * dim + last);
            __m512 score = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[i]), scale), q_scaled);
            _mm512_storeu_ps(to, score);
            if (over != NULL)
                over[(size_t)i * groups + g] = _mm512_cmp_ps_mask(score, _mm512_set1_ps(bars[i]), _CMP_GE_OQ);
        }
    }
}

void cairn_scan_i8_vnni(const int8_t *rows, const float *row_scale, const int32_t *row_sum, size_t group, size_t groups,
                        size_t dim, const int8_t *q, const float *q_scale, size_t nq, float *scores, float *less,
                        size_t ld, const float *bars, uint16_t *over)
{
    (void)row_sum;
    assert(dim % 4 == 0);
    rows += group * 16 * dim;
    row_scale += group * 16;
    for (size_t first = 0, some; first < nq; first += some) {
        size_t left = nq - first;
        some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int8_t *at = q + first * dim;
        __m512i offset[8], offset_less[8]; /* of the last four dims, and of those before */
        for (size_t i = 0; i < some; i++) {
            int32_t sum = 0, end = 0;
            for (size_t j = 0; j + 4 < dim; j++) sum += at[i * dim + j];
            for (size_t j = dim - 4; j < dim; j++) end += at[i * dim + j];
            offset_less[i] = _mm512_set1_epi32(-128 * sum);
            offset[i] = _mm512_set1_epi32(-128 * end);
        }
        const float *scale = q_scale + first;
        float *to = scores + first * ld, *less_to = less != NULL ? less + first * ld : NULL;
        const float *bar = over != NULL ? bars + first : NULL;
        uint16_t *over_to = over != NULL ? over + first * groups : NULL;
#define SCAN(nq, chains)                                                                                               \
    scan_queries(nq, chains, rows, row_scale, groups, dim, at, scale, offset, offset_less, to, less_to, ld, bar,       \
                 over_to)
        switch (some) {
        case 8: SCAN(8, 1); break;
        case 4: SCAN(4, 2); break;
        case 2: SCAN(2, 2); break;
        default: SCAN(1, 2);
        }
#undef SCAN
    }
}

/* Sums start at minus what they must reach, so the sign is the answer. The port that multiplies also makes masks: four
 * vectors of sums are packed to bytes first, elsewhere, and give 64 bits at once. */
INLINE void sketch_queries(const int NQ, const int8_t *rows, size_t blocks, const size_t dim, const int8_t *q,
                           const int32_t *start, uint64_t *over)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (size_t g = 0; g < blocks; g++) {
        __m512i half[2][8];
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            __m512i sum[2][8];
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++, rows += 16 * dim) {
#pragma GCC unroll 8
                for (int i = 0; i < NQ; i++) sum[v][i] = _mm512_set1_epi32(start[i]);
#pragma GCC unroll 6
                for (size_t j = 0; j < dim; j += 4) {
                    const int8_t *at = rows + j * 16;
                    _mm_prefetch((const char *)at + AHEAD_BYTES, _MM_HINT_T0);
                    __m512i x = _mm512_xor_si512(_mm512_loadu_si512(at), flip);
#pragma GCC unroll 8
                    for (int i = 0; i < NQ; i++) sum[v][i] = add_four_dims(sum[v][i], x, q + (size_t)i * dim + j);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < NQ; i++) half[p][i] = _mm512_packs_epi32(sum[0][i], sum[1][i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++)
            over[(size_t)i * blocks + g] = ~(uint64_t)_mm512_movepi8_mask(_mm512_packs_epi16(half[0][i], half[1][i]));
    }
}

/* The usual widths without a loop over dims. */
INLINE void sketch_widths(const int NQ, const int8_t *rows, size_t blocks, size_t dim, const int8_t *q,
                          const int32_t *start, uint64_t *over)
{
    switch (dim) {
    case 8: sketch_queries(NQ, rows, blocks, 8, q, start, over); break;
    case 12: sketch_queries(NQ, rows, blocks, 12, q, start, over); break;
    case 16: sketch_queries(NQ, rows, blocks, 16, q, start, over); break;
    case 24: sketch_queries(NQ, rows, blocks, 24, q, start, over); break;
    default: sketch_queries(NQ, rows, blocks, dim, q, start, over);
    }
}

void cairn_sketch_i8_vnni(const int8_t *rows, size_t block, size_t blocks, size_t dim, const int8_t *q,
                          const int32_t *least, size_t nq, uint64_t *over)
{
    assert(dim % 4 == 0);
    rows += block * 64 * dim;
    for (size_t first = 0, some; first < nq; first += some) {
        size_t left = nq - first;
        some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int8_t *at = q + first * dim;
        int32_t start[8];
        for (size_t i = 0; i < some; i++) {
            int32_t sum = 0;
            for (size_t j = 0; j < dim; j++) sum += at[i * dim + j];
            start[i] = -128 * sum - least[first + i];
        }
        uint64_t *to = over + first * blocks;
        switch (some) {
        case 8: sketch_widths(8, rows, blocks, dim, at, start, to); break;
        case 4: sketch_widths(4, rows, blocks, dim, at, start, to); break;
        case 2: sketch_widths(2, rows, blocks, dim, at, start, to); break;
        default: sketch_widths(1, rows, blocks, dim, at, start, to);
        }
    }
}
