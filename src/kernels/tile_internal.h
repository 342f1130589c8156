/* tile_internal.h - how the tile functions divide their scratch. */
#ifndef CAIRN_KERNELS_TILE_INTERNAL_H
#define CAIRN_KERNELS_TILE_INTERNAL_H

#include "kernels_internal.h"

enum {
    TILE_QUERIES = 64, /* query rows handled at a time */
    TILE_ROWS = 64     /* key rows converted to f32 at a time */
};

typedef struct tile_scratch {
    float *queries; /* (TILE_QUERIES, head_dim): queries with the q8 key scales folded in */
    float *rows;    /* (TILE_ROWS, head_dim): keys as f32 */
    float *p;       /* (TILE_QUERIES, p_ld): scores, then weights */
    size_t p_ld;
    size_t bytes; /* of the whole */
} tile_scratch;

/* Over a buffer at any address; the parts start on 64-byte lines. For T = 63: D = 32 takes 32 KiB, D = 128 80 KiB. */
static inline tile_scratch tile_scratch_over(void *buffer, size_t tokens, size_t head_dim)
{
    size_t dim = (head_dim + 15) / 16 * 16;
    tile_scratch s = {.p_ld = (tokens + 31) / 32 * 32};
    size_t queries = TILE_QUERIES * dim * sizeof(float), rows = TILE_ROWS * dim * sizeof(float);
    s.bytes = queries + rows + TILE_QUERIES * s.p_ld * sizeof(float) + 64;
    if (buffer == NULL) return s;
    char *at = (char *)buffer + (64 - (uintptr_t)buffer % 64) % 64;
    s.queries = (float *)(void *)at;
    s.rows = (float *)(void *)(at + queries);
    s.p = (float *)(void *)(at + queries + rows);
    return s;
}

#endif
