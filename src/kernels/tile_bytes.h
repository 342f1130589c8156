/* tile_bytes.h - what the two ways to multiply a q8 tile as bytes have in common, so that their bits are the same. */
#ifndef CAIRN_KERNELS_TILE_BYTES_H
#define CAIRN_KERNELS_TILE_BYTES_H

#include <immintrin.h>

/* The largest number of 16 bits of a query, signed, and of a weight; below TINY all round to 0. */
static const float QUERY_MAX = 32639, WEIGHT_MAX = 65535, TINY = 1e-30f;

/* Scores have log2 e in their unit. A weight below 2^LEAST of its greatest is nothing among 16 bits; smaller ones would
 * become subnormal numbers, for each of which the processor takes a hundred cycles. */
#define BYTES_LOG2E 0x1.715476p+0f
#define BYTES_LN2   0x1.62e430p-1f
#define BYTES_LEAST (-115.0f)

/* In each 128 bits: out[j] has the j-th four bytes of all of x. */
static inline __attribute__((always_inline)) void turn_four(const __m512i x[4], __m512i out[4])
{
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

#endif
