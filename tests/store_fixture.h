/* store_fixture.h - a store filled with bytes that follow from a seed, so that whatever comes back can be told. */
#ifndef CAIRN_TESTS_STORE_FIXTURE_H
#define CAIRN_TESTS_STORE_FIXTURE_H

#include "support.h"

#include <cairn/store.h>

#include <stdlib.h>

typedef struct fixture {
    char *dir;  /* removed at the end */
    char *path; /* of the store in it */
    cairn_geometry geometry;
    cairn_store *store;
} fixture;

static inline void fixture_bytes(uint64_t seed, uint64_t what, void *out, size_t bytes)
{
    test_random r = {seed * 0x9e3779b97f4a7c15u ^ what};
    uint8_t *p = out;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t v = test_random_u64(&r);
        memcpy(p + i, &v, bytes - i < 8 ? bytes - i : 8);
    }
}

static inline size_t fixture_tile_bytes(const fixture *fx)
{
    return cairn_tile_payload_bytes(fx->geometry.dtype, fx->geometry.block_tokens, fx->geometry.head_dim);
}
static inline size_t fixture_tiles(const fixture *fx)
{
    return (size_t)(fx->geometry.layers - fx->geometry.first_layer) * fx->geometry.kv_heads;
}
/* What the i-th block of the stream `seed` holds. */
static inline void fixture_tile(const fixture *fx, uint64_t seed, uint64_t block, unsigned layer, unsigned head,
                                void *out)
{
    fixture_bytes(seed, block << 32 | (uint64_t)layer << 16 | head, out, fixture_tile_bytes(fx));
}
static inline void fixture_tokens(uint64_t seed, uint64_t first, cairn_token *out, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = (cairn_token)((seed * 7919 + (first + i) * 31) % 50021);
}
static inline void fixture_landmarks(const fixture *fx, uint64_t seed, uint64_t block, void *out)
{
    fixture_bytes(seed, 1ull << 63 | block, out, cairn_landmark_payload_bytes(&fx->geometry));
}

static inline void fixture_open(fixture *fx, bool verify)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.verify_reads = verify;
    opt.geometry = fx->geometry;
    opt.model = (cairn_model_id){.fingerprint = 0x1234, .name = "fixture"};
    opt.map_bytes = (uint64_t)8 << 30;
    opt.no_sync = true; /* nobody relies on it */
    assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
}

static inline fixture *fixture_new(cairn_geometry geometry)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->geometry = geometry;
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "store");
    fixture_open(fx, false);
    return fx;
}

static inline void fixture_free(fixture *fx)
{
    cairn_store_close(fx->store);
    free(fx->path);
    test_remove_dir(fx->dir);
    free(fx);
}

/* Blocks [first, first + n) of the stream to the context of that writer, and then a tail of `tail` tokens. */
static inline void fixture_commit(fixture *fx, cairn_writer *writer, uint64_t seed, uint64_t first, size_t n,
                                  size_t tail, const cairn_input *input)
{
    size_t C = fx->geometry.block_tokens;
    size_t tile = fixture_tile_bytes(fx);
    size_t landmark = cairn_landmark_payload_bytes(&fx->geometry);
    size_t tiles = fixture_tiles(fx);
    cairn_token *tokens = malloc((C + tail + 1) * sizeof *tokens);
    uint8_t *landmarks = malloc(landmark);
    uint8_t *data = malloc(tile * tiles);
    for (size_t i = 0; i < n; i++) {
        cairn_block_data block = {tokens, landmarks, data};
        fixture_tokens(seed, (first + i) * C, tokens, C);
        fixture_landmarks(fx, seed, first + i, landmarks);
        for (size_t t = 0; t < tiles; t++)
            fixture_tile(fx, seed, first + i, (unsigned)(fx->geometry.first_layer + t / fx->geometry.kv_heads),
                         (unsigned)(t % fx->geometry.kv_heads), data + t * tile);
        assert_ok(cairn_writer_commit(writer, &block, 1, NULL, 0, NULL));
    }
    fixture_tokens(seed, (first + n) * C, tokens, tail);
    assert_ok(cairn_writer_commit(writer, NULL, 0, tokens, tail, input));
    free(tokens);
    free(landmarks);
    free(data);
}

/* A context of `blocks` blocks and a tail. Returns its first segment. */
static inline uint64_t fixture_context(fixture *fx, const char *name, uint64_t seed, size_t blocks, size_t tail)
{
    uint64_t id;
    cairn_writer *writer = NULL;
    cairn_context_info info;
    assert_ok(cairn_context_create(fx->store, name, &id));
    assert_ok(cairn_writer_begin(fx->store, name, &writer));
    fixture_commit(fx, writer, seed, 0, blocks, tail, NULL);
    assert_ok(cairn_writer_info(writer, &info));
    cairn_writer_end(writer);
    return info.own_segment;
}

/* Blocks [first, first + n) of a context hold those of the stream, by way of the snapshot. */
static inline void fixture_check_blocks(fixture *fx, cairn_snapshot *snap, const char *name, uint64_t seed,
                                        uint64_t first, uint64_t n);

typedef struct fixture_landmark_witness {
    const fixture *fx;
    uint64_t seed;
    uint64_t block; /* of the stream */
    uint64_t seen;
} fixture_landmark_witness;

static inline bool fixture_check_landmark(void *arg, uint32_t block, cairn_span payload)
{
    fixture_landmark_witness *w = arg;
    (void)block;
    size_t bytes = cairn_landmark_payload_bytes(&w->fx->geometry);
    uint8_t *expected = malloc(bytes);
    fixture_landmarks(w->fx, w->seed, w->block + w->seen, expected);
    assert_int_equal(payload.bytes, bytes);
    assert_memory_equal(payload.data, expected, bytes);
    w->seen++;
    free(expected);
    return true;
}

static inline void fixture_check_block(fixture *fx, cairn_snapshot *snap, uint64_t segment, uint32_t block,
                                       uint64_t seed, uint64_t number)
{
    const cairn_geometry *g = &fx->geometry;
    size_t tile = fixture_tile_bytes(fx);
    uint8_t *expected = malloc(tile);
    cairn_token *tokens = malloc(2 * g->block_tokens * sizeof *tokens);
    fixture_tokens(seed, number * g->block_tokens, tokens, g->block_tokens);
    assert_ok(cairn_snapshot_tokens(snap, segment, block, 1, tokens + g->block_tokens));
    assert_memory_equal(tokens, tokens + g->block_tokens, g->block_tokens * sizeof *tokens);
    fixture_landmark_witness w = {fx, seed, number, 0};
    assert_ok(cairn_snapshot_landmarks(snap, segment, block, 1, fixture_check_landmark, &w));
    assert_int_equal(w.seen, 1);
    for (uint32_t layer = g->first_layer; layer < g->layers; layer++)
        for (uint32_t head = 0; head < g->kv_heads; head++) {
            cairn_tile_view view;
            assert_ok(
                cairn_snapshot_tile(snap, (cairn_tile_id){segment, block, (uint16_t)layer, (uint16_t)head}, &view));
            fixture_tile(fx, seed, number, layer, head, expected);
            assert_memory_equal(view.keys, expected, tile);
        }
    free(tokens);
    free(expected);
}

static inline void fixture_check_blocks(fixture *fx, cairn_snapshot *snap, const char *name, uint64_t seed,
                                        uint64_t first, uint64_t n)
{
    cairn_context_info info;
    cairn_range ranges[64];
    size_t count = 0;
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_ok(cairn_snapshot_ranges(snap, info.id, ranges, 64, &count));
    assert_true(count <= 64);
    uint64_t at = 0;
    for (size_t r = 0; r < count; r++)
        for (uint32_t i = 0; i < ranges[r].count; i++, at++)
            if (at >= first && at < first + n)
                fixture_check_block(fx, snap, ranges[r].segment, ranges[r].first + i, seed, at);
    assert_true(at >= first + n);
}

#endif
