/* tile_stream.h - what memory is asked for while a tile is used, for the x86 twins. */
#ifndef CAIRN_KERNELS_TILE_STREAM_H
#define CAIRN_KERNELS_TILE_STREAM_H

#include "kernels_internal.h"

#include <immintrin.h>

/* Near: some 4 KB ahead of the arithmetic, keys, then values, then the keys of the next tile. A line so comes to L1
 * just before its use: what is asked for by the tile, or only as far as L2, is gone from L1 when its turn comes, and
 * then waits for a fill buffer behind all that is still on its way from DRAM. Far, on AMD's processors: as far as L2
 * and a whole tile ahead, as evenly as the arithmetic goes. Their L1 waits for 24 lines at most, those on their way to
 * L2 among them; on Zen 4 random tiles of 8 KB come at 8 GB/s by way of L1, however early they are asked for, at 16 to
 * 20 by way of L2 if they are asked for a few at a time. */
typedef struct tile_stream {
    const char *now, *then; /* of the `bytes` each that are used now, and after them; now NULL: nothing is asked for */
    size_t bytes, ahead;
    size_t before; /* of them asked for before the first is used: bytes >> share, or 0 */
    int share;
    const char *first; /* far: the tile's, if its values lie straight behind its keys */
    bool far;          /* now: what to ask for while as many bytes are used; then NULL, ahead 0 */
} tile_stream;

static inline tile_stream tile_stream_of(const void *now, const void *then, size_t bytes)
{
    enum { AHEAD = 4096 };
    return (tile_stream){now, then, bytes, bytes < AHEAD ? bytes : AHEAD, 0, 0, NULL, false};
}

static inline __attribute__((always_inline)) void ask_between(const tile_stream *s, size_t from, size_t to)
{
    const size_t end = to + s->ahead;
    size_t i = (from + s->ahead + 63) / 64 * 64;
    if (s->far) {
        for (; i < end && i < s->bytes; i += 64) _mm_prefetch(s->now + i, _MM_HINT_T1);
        return;
    }
    for (; i < end && i < s->bytes; i += 64) _mm_prefetch(s->now + i, _MM_HINT_T0);
    for (; i < end && s->then != NULL; i += 64) _mm_prefetch(s->then + (i - s->bytes), _MM_HINT_T0);
}

/* Up to where they have been asked for when `used` of them are about to have been used. */
static inline __attribute__((always_inline)) size_t asked_for(const tile_stream *s, size_t used)
{
    return s->before == 0 ? used : s->before + used - (used >> s->share);
}

/* Bytes [from, to) are about to be used. */
static inline __attribute__((always_inline)) void ask_ahead(const tile_stream *s, size_t from, size_t to)
{
    if (s == NULL || s->now == NULL) return;
    ask_between(s, asked_for(s, from), asked_for(s, to));
}

/* For how many tokens, of `bytes` each, to ask at a time: a multiple of `few`. Of what is far no more than eight lines,
 * for AMD's processors drop what they are asked for while 24 are on their way; and no fewer, so that the loop in
 * between has the registers to itself. */
static inline __attribute__((always_inline)) size_t ask_every(const tile_stream *s, size_t few, size_t bytes)
{
    enum { ALL = 16, FAR = 8 * 64 };
    if (s == NULL) return ALL * few;
    return s->far && FAR / bytes > few ? FAR / bytes / few * few : few;
}

/* What is asked for far ahead within a loop that comes to byte `from`: NULL if nothing is. */
static inline __attribute__((always_inline)) const char *ask_within(const tile_stream *s, size_t from)
{
    return s == NULL || !s->far || s->now == NULL ? NULL : s->now + asked_for(s, from);
}
/* How far that goes while so many bytes are used. */
static inline __attribute__((always_inline)) size_t ask_pace(const tile_stream *s, size_t bytes)
{
    return s == NULL || s->before == 0 ? bytes : bytes - (bytes >> s->share);
}
static inline __attribute__((always_inline)) void ask_far(const char *at, const size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
}
/* And what was asked for two kilobytes ago once more, for some of it was dropped where a tile takes little time. A line
 * that had come costs 0.1 to 0.3 ns. */
static inline __attribute__((always_inline)) void ask_far_twice(const tile_stream *s, const char *at,
                                                                const size_t bytes)
{
    enum { AGO = 2048 };
    ask_far(at, bytes);
    ask_far((size_t)(at - s->first) < AGO ? at : at - AGO, bytes);
}

/* Between keys and values come exponentials, a quarter of the time with four queries: of n steps of that the i-th. */
static inline __attribute__((always_inline)) void ask_before(const tile_stream *s, size_t i, size_t n)
{
    if (s == NULL || s->now == NULL) return;
    ask_between(s, s->before * i / n, s->before * (i + 1) / n);
}

enum { MANY_QUERIES = 16 }; /* from here on the arithmetic outweighs the bytes */

static inline size_t tile_half_bytes(const cairn_tile *tile) /* its keys, and its values as many */
{
    return (size_t)tile->tokens * tile->head_dim * cairn_dtype_size(tile->dtype);
}

static inline size_t tile_bytes(const cairn_tile *tile) /* with scales */
{
    const size_t scales = tile->dtype == CAIRN_Q8 ? ((size_t)tile->tokens + tile->head_dim) * sizeof(float) : 0;
    return 2 * tile_half_bytes(tile) + scales;
}

/* The scales of a q8 tile lie behind its values and are needed before its first key. */
static inline void ask_scales(const cairn_tile *tile)
{
    if (tile->dtype != CAIRN_Q8) return;
    for (size_t i = 0; i < tile->head_dim; i += 16) _mm_prefetch((const char *)(tile->key_scales + i), _MM_HINT_T0);
    for (size_t i = 0; i < tile->tokens; i += 16) _mm_prefetch((const char *)(tile->value_scales + i), _MM_HINT_T0);
}

/* One line of each page of the tile that is attended to some tiles from now: by then its addresses are known, which at
 * the edge of a page costs as much as the arithmetic of a tile of few bytes. */
enum { TILE_PAGE = 4096 };
static inline void touch_later(const cairn_tile *tile)
{
    if (tile->later == NULL) return;
    const size_t bytes = tile_bytes(tile->later);
    for (size_t at = 0; at < bytes; at += TILE_PAGE) _mm_prefetch((const char *)tile->later->keys + at, _MM_HINT_T0);
}

/* What is asked for while nq rows attend to the tile, keys first. Far: Zen 4 stops at a prefetch until its page is
 * found, so those of a tile are looked up together. */
static inline void begin_streams(const cairn_tile *tile, size_t nq, tile_stream *keys, tile_stream *values)
{
    enum { FAR = 6 << 10, EXP_BYTES = 1 << 10 }; /* what comes while a query's exponentials are made */
    const size_t half = tile_half_bytes(tile), all = tile_bytes(tile);
    const bool far = __builtin_cpu_is("amd") != 0, asks = far || nq < MANY_QUERIES;
    const cairn_tile *next = tile->next;
    *keys = tile_stream_of(asks ? tile->keys : NULL, tile->values, half);
    *values = tile_stream_of(asks ? tile->values : NULL, next != NULL ? next->keys : NULL, half);
    if (asks && !tile->coming) {
        for (size_t i = 0; i < keys->ahead; i += 64) _mm_prefetch(keys->now + i, _MM_HINT_T0);
        ask_scales(tile);
    }
    touch_later(tile);
    if (far) {
        if (all < FAR && tile->later != NULL) next = tile->later;
        *keys = (tile_stream){.bytes = half, .far = true};
        *values = (tile_stream){.bytes = half, .share = 2, .far = true};
        if (next != NULL) {
            keys->first = keys->now = next->keys, values->now = next->values;
            values->first = keys->now + half == values->now ? keys->now : values->now;
        }
        while (half >> values->share > EXP_BYTES * nq) values->share++;
        if (nq > 1 || tile->dtype != CAIRN_Q8) /* which the core holds up, not memory */
            values->before = half >> values->share;
    }
    if (asks && next != NULL) ask_scales(next);
}

#endif
