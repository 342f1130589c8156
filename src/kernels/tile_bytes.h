/* tile_bytes.h - what the ways to multiply a q8 tile by whole numbers of 16 bits have in common. Those by VNNI and by
 * AMX give the same bits. */
#ifndef CAIRN_KERNELS_TILE_BYTES_H
#define CAIRN_KERNELS_TILE_BYTES_H

/* The largest number of 16 bits of a query, signed, and of a weight; below TINY all round to 0. */
static const float QUERY_MAX = 32639, WEIGHT_MAX = 65535, TINY = 1e-30f;

/* Scores have log2 e in their unit. A weight below 2^LEAST of its greatest is nothing among 16 bits; smaller ones would
 * become subnormal numbers, for each of which the processor takes a hundred cycles. */
#define BYTES_LOG2E 0x1.715476p+0f
#define BYTES_LN2   0x1.62e430p-1f
#define BYTES_LEAST (-115.0f)

#endif
