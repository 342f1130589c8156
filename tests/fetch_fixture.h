/* fetch_fixture.h - batches of tiles asked for and checked, for the tests of fetching. */
#ifndef CAIRN_TESTS_FETCH_FIXTURE_H
#define CAIRN_TESTS_FETCH_FIXTURE_H

#include "store_fixture.h"

#include <fetch_internal.h>
#include <store_internal.h>

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static const cairn_geometry SMALL = {
    .layers = 4, .first_layer = 1, .kv_heads = 3, .head_dim = 32, .block_tokens = 15, .dtype = CAIRN_F16};
enum { SMALL_BLOCKS = 12, SMALL_TILES = SMALL_BLOCKS * 3 * 3, SMALL_SLOT = 4096 };

static const char *const engines[] = {"uring", "pool", "sync", "uring-buffered", "pool-buffered", "sync-buffered"};

static inline bool use_engine(const char *name)
{
    reader *r;
    setenv("CAIRN_FETCH_READER", name, 1);
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    cairn_status st = reader_open(fd, &r);
    reader_close(r);
    close(fd);
    if (st == CAIRN_UNSUPPORTED) unsetenv("CAIRN_FETCH_READER");
    return st == CAIRN_OK;
}

/* The i-th tile of a segment, by block, layer, head. */
static inline cairn_tile_id tile_at(const fixture *fx, uint64_t segment, size_t i)
{
    size_t per_block = fixture_tiles(fx);
    size_t t = i % per_block;
    return (cairn_tile_id){segment, (uint32_t)(i / per_block),
                           (uint16_t)(fx->geometry.first_layer + t / fx->geometry.kv_heads),
                           (uint16_t)(t % fx->geometry.kv_heads)};
}

static inline void check_view(const fixture *fx, uint64_t seed, cairn_tile_id id, const cairn_tile_view *view)
{
    size_t bytes = fixture_tile_bytes(fx);
    uint8_t *expected = malloc(bytes);
    fixture_tile(fx, seed, id.block, id.layer, id.head, expected);
    assert_int_equal(view->id.segment, id.segment);
    assert_int_equal(view->id.block, id.block);
    assert_int_equal(view->id.layer, id.layer);
    assert_int_equal(view->id.head, id.head);
    assert_int_equal(view->dtype, fx->geometry.dtype);
    assert_int_equal(view->tokens, fx->geometry.block_tokens);
    assert_int_equal(view->head_dim, fx->geometry.head_dim);
    assert_memory_equal(view->keys, expected, bytes);
    size_t half = (size_t)view->tokens * view->head_dim * cairn_dtype_size(view->dtype);
    assert_ptr_equal(view->values, (const uint8_t *)view->keys + half);
    if (view->dtype == CAIRN_Q8) {
        assert_memory_equal(view->key_scales, expected + 2 * half, view->head_dim * 4);
        assert_memory_equal(view->value_scales, expected + 2 * half + view->head_dim * 4, view->tokens * 4);
    } else {
        assert_null(view->key_scales);
        assert_null(view->value_scales);
    }
    free(expected);
}

/* One batch, every view of it checked against the bytes that were written. */
static inline void fetch_and_check(const fixture *fx, cairn_fetch *fetch, cairn_snapshot *snap, uint64_t seed,
                                   const cairn_tile_id *ids, const float *mass, size_t n)
{
    cairn_tile_view *views = malloc((n + 1) * sizeof *views);
    assert_ok(cairn_fetch_submit(fetch, snap, ids, mass, n));
    assert_ok(cairn_fetch_wait(fetch, views));
    for (size_t i = 0; i < n; i++) check_view(fx, seed, ids[i], &views[i]);
    free(views);
}

static inline cairn_fetch_stats stats_of(const cairn_fetch *fetch)
{
    cairn_fetch_stats stats;
    cairn_fetch_stats_get(fetch, &stats);
    return stats;
}

/* Tiles in the tier, by asking for them. */
static inline uint64_t hits_of(const fixture *fx, cairn_fetch *fetch, cairn_snapshot *snap, uint64_t seed,
                               const cairn_tile_id *ids, size_t n)
{
    uint64_t before = stats_of(fetch).tier_tiles;
    fetch_and_check(fx, fetch, snap, seed, ids, NULL, n);
    return stats_of(fetch).tier_tiles - before;
}

#endif
