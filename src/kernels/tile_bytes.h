/* tile_bytes.h - what the ways to multiply a q8 tile by whole numbers of 16 bits have in common. Those by VNNI and by
 * AMX give the same bits. */
#ifndef CAIRN_KERNELS_TILE_BYTES_H
#define CAIRN_KERNELS_TILE_BYTES_H

#include "kernels_internal.h"

enum { BYTES_DIMS = 32, BYTES_DIM_MAX = 512 }; /* sums of numbers of 16 bits stay below 2^31 */

static inline bool suits_bytes(const cairn_tile *tile)
{
    return tile->dtype == CAIRN_Q8 && tile->head_dim % BYTES_DIMS == 0 && tile->head_dim <= BYTES_DIM_MAX;
}

static inline size_t least_of(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* The largest number of 16 bits of a query, signed, and of a weight; below TINY all round to 0. */
static const float QUERY_MAX = 32639, WEIGHT_MAX = 65535, TINY = 1e-30f;

/* Scores have log2 e in their unit. A weight below 2^LEAST of its greatest is nothing among 16 bits; smaller ones would
 * become subnormal numbers, for each of which the processor takes a hundred cycles. */
#define BYTES_LOG2E 0x1.715476p+0f
#define BYTES_LN2   0x1.62e430p-1f
#define BYTES_LEAST (-115.0f)

#endif
