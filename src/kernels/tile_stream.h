/* tile_stream.h - what memory is asked for while a tile is used, for the x86 twins. */
#ifndef CAIRN_KERNELS_TILE_STREAM_H
#define CAIRN_KERNELS_TILE_STREAM_H

#include <stddef.h>

#include <immintrin.h>

/* Some 4 KB ahead of the arithmetic: keys, then values, then the keys of the next tile. A line so comes to L1 just
 * before its use: what is asked for by the tile, or only as far as L2, is gone from L1 when its turn comes, and then
 * waits for a fill buffer behind all that is still on its way from DRAM. */
typedef struct tile_stream {
    const char *now, *then; /* of the `bytes` each that are used now, and after them; now NULL: nothing is asked for */
    size_t bytes, ahead;
} tile_stream;

static inline tile_stream tile_stream_of(const void *now, const void *then, size_t bytes)
{
    enum { AHEAD = 4096 };
    return (tile_stream){now, then, bytes, bytes < AHEAD ? bytes : AHEAD};
}

/* Bytes [from, to) are about to be used. */
static inline __attribute__((always_inline)) void ask_ahead(const tile_stream *s, size_t from, size_t to)
{
    if (s == NULL || s->now == NULL) return;
    const size_t end = to + s->ahead;
    size_t i = (from + s->ahead + 63) / 64 * 64;
    for (; i < end && i < s->bytes; i += 64) _mm_prefetch(s->now + i, _MM_HINT_T0);
    for (; i < end && s->then != NULL; i += 64) _mm_prefetch(s->then + (i - s->bytes), _MM_HINT_T0);
}

#endif
