/* test_fetch.c - batches of tiles, through the map and into the RAM tier.
 * labels: threads */
#include "fetch_fixture.h"

#include <sys/stat.h>
#include <sys/wait.h>

/* ---- the same bytes ---- */

static void random_batches(fixture *fx, uint64_t segment, uint64_t seed, size_t tiles, cairn_fetch_mode mode,
                           uint64_t ram)
{
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    test_random r = {seed + 99};
    cairn_tile_id ids[64];
    float mass[64];
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_fetch_new(fx->store, mode, ram, &fetch));
    size_t max = cairn_fetch_batch_max(fetch) < 64 ? cairn_fetch_batch_max(fetch) : 64;
    for (int round = 0; round < 40; round++) {
        size_t n = test_random_below(&r, (uint32_t)max + 1);
        for (size_t i = 0; i < n; i++) {
            ids[i] = i > 0 && test_random_below(&r, 4) == 0
                         ? ids[test_random_below(&r, (uint32_t)i)]
                         : tile_at(fx, segment, test_random_below(&r, (uint32_t)tiles));
            mass[i] = (float)test_random_unit(&r);
        }
        fetch_and_check(fx, fetch, snap, seed, ids, round % 2 ? mass : NULL, n);
        if (mode == CAIRN_FETCH_READ) assert_true(stats_of(fetch).ram_bytes <= ram);
    }
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
}

static void every_type_comes_back_bit_for_bit_in_both_modes(void **state)
{
    (void)state;
    for (int dtype = CAIRN_F32; dtype <= CAIRN_Q8; dtype++) {
        cairn_geometry g = SMALL;
        g.dtype = (cairn_dtype)dtype;
        fixture *fx = fixture_new(g);
        uint64_t segment = fixture_context(fx, "a", 5, SMALL_BLOCKS, 3);
        random_batches(fx, segment, 5, SMALL_TILES, CAIRN_FETCH_MAP, 0);
        random_batches(fx, segment, 5, SMALL_TILES, CAIRN_FETCH_READ, 1 << 20);
        random_batches(fx, segment, 5, SMALL_TILES, CAIRN_FETCH_READ, 256 << 10);
        fixture_free(fx);
    }
}

static void every_size_of_tile_comes_back_bit_for_bit(void **state)
{
    (void)state;
    static const struct {
        uint32_t dim, tokens;
    } shapes[] = {{2, 1}, {4, 7}, {64, 63}, {128, 63}, {128, 64}, {1024, 33}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        cairn_geometry g = {.layers = 2,
                            .kv_heads = 2,
                            .head_dim = shapes[i].dim,
                            .block_tokens = shapes[i].tokens,
                            .dtype = CAIRN_BF16};
        fixture *fx = fixture_new(g);
        uint64_t segment = fixture_context(fx, "a", 6, 9, 0);
        random_batches(fx, segment, 6, 36, CAIRN_FETCH_MAP, 0);
        random_batches(fx, segment, 6, 36, CAIRN_FETCH_READ, 2 << 20);
        fixture_free(fx);
    }
}

static void every_engine_gives_the_same_bytes(void **state)
{
    (void)state;
    cairn_geometry g = SMALL;
    g.head_dim = 128;
    g.block_tokens = 63;
    fixture *fx = fixture_new(g);
    uint64_t segment = fixture_context(fx, "a", 7, SMALL_BLOCKS, 0);
    for (size_t e = 0; e < sizeof engines / sizeof *engines; e++) {
        if (!use_engine(engines[e])) continue;
        random_batches(fx, segment, 7, SMALL_TILES, CAIRN_FETCH_READ, 8 << 20);
        random_batches(fx, segment, 7, SMALL_TILES, CAIRN_FETCH_READ, 1 << 20);
    }
    unsetenv("CAIRN_FETCH_READER");
    fixture_free(fx);
}

static void an_engine_that_does_not_exist_is_refused_by_name(void **state)
{
    (void)state;
    cairn_fetch *fetch = NULL;
    fixture *fx = fixture_new(SMALL);
    setenv("CAIRN_FETCH_READER", "floppy", 1);
    assert_int_equal(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1 << 20, &fetch), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "floppy"));
    assert_null(fetch);
    unsetenv("CAIRN_FETCH_READER");
    fixture_free(fx);
}

static void a_fetch_equals_the_snapshots_own_tiles(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 8, SMALL_BLOCKS, 0);
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        cairn_fetch *fetch = NULL;
        cairn_tile_id ids[SMALL_TILES];
        cairn_tile_view views[SMALL_TILES];
        assert_ok(cairn_fetch_new(fx->store, (cairn_fetch_mode)mode, 2 << 20, &fetch));
        assert_int_equal(cairn_fetch_mode_used(fetch), mode);
        for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, SMALL_TILES - 1 - i);
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, SMALL_TILES));
        assert_ok(cairn_fetch_wait(fetch, views));
        for (size_t i = 0; i < SMALL_TILES; i++) {
            cairn_tile_view view;
            assert_ok(cairn_snapshot_tile(snap, ids[i], &view));
            assert_memory_equal(views[i].keys, view.keys, fixture_tile_bytes(fx));
            assert_int_equal(((uintptr_t)views[i].keys) % 64, 0);
        }
        cairn_fetch_free(fetch);
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

/* ---- the tier ---- */

static void a_batch_larger_than_the_tier_is_refused_and_the_largest_fits(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 9, SMALL_BLOCKS, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1000, &fetch), CAIRN_NO_MEMORY);
    assert_null(fetch);
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 384 << 10, &fetch));
    size_t max = cairn_fetch_batch_max(fetch);
    assert_in_range(max, 1, SMALL_TILES - 1);
    for (int round = 0; round < 3; round++) {
        assert_int_equal(cairn_fetch_submit(fetch, snap, ids, NULL, max + 1), CAIRN_INVALID);
        assert_int_equal(cairn_fetch_wait(fetch, NULL), CAIRN_INVALID);
        fetch_and_check(fx, fetch, snap, 9, ids + round, NULL, max);
        assert_true(stats_of(fetch).ram_bytes <= 384 << 10);
    }
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void the_tier_keeps_what_has_mass_and_lets_go_of_the_rest(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 10, SMALL_BLOCKS, 0);
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (int heavy = 0; heavy <= 1; heavy++) {
        cairn_fetch *fetch = NULL;
        cairn_tile_id ids[SMALL_TILES];
        float mass[SMALL_TILES];
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 384 << 10, &fetch));
        size_t max = cairn_fetch_batch_max(fetch);
        assert_true(max > 16 && max < SMALL_TILES - 16);
        for (size_t i = 0; i < SMALL_TILES; i++) {
            ids[i] = tile_at(fx, segment, i);
            mass[i] = i < 8 && heavy ? 0.5f : 0.01f;
        }
        fetch_and_check(fx, fetch, snap, 10, ids, mass, 8);
        for (size_t i = 8; i < SMALL_TILES; i++) fetch_and_check(fx, fetch, snap, 10, ids + i, mass + i, 1);
        assert_true(stats_of(fetch).evicted_tiles == SMALL_TILES - max);
        /* without the mass the eldest went first */
        assert_int_equal(hits_of(fx, fetch, snap, 10, ids, 8), heavy ? 8 : 0);
        /* and mass decays: tiles that had it once give way to tiles that are asked for again and again */
        for (int again = 0; again < 40; again++)
            for (size_t i = SMALL_TILES - max; i < SMALL_TILES; i++)
                fetch_and_check(fx, fetch, snap, 10, ids + i, mass + i, 1);
        assert_int_equal(hits_of(fx, fetch, snap, 10, ids + SMALL_TILES - max, max), max);
        cairn_fetch_free(fetch);
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void tiles_of_the_batch_are_never_evicted_by_it(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 11, 2 * SMALL_BLOCKS, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    float mass[SMALL_TILES];
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 384 << 10, &fetch));
    size_t max = cairn_fetch_batch_max(fetch);
    assert_in_range(max, 2, SMALL_TILES);
    for (size_t i = 0; i < max; i++) { /* fills the tier with tiles of much mass */
        ids[i] = tile_at(fx, segment, i);
        mass[i] = 100.0f;
    }
    fetch_and_check(fx, fetch, snap, 11, ids, mass, max);
    for (size_t i = 0; i < max; i++) { /* half of them again, and as many new ones that weigh nothing */
        ids[i] = tile_at(fx, segment, i % 2 ? i : SMALL_TILES + i);
        mass[i] = 0.0f;
    }
    uint64_t before = stats_of(fetch).tier_tiles;
    fetch_and_check(fx, fetch, snap, 11, ids, mass, max);
    assert_int_equal(stats_of(fetch).tier_tiles - before, max / 2);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void statistics_add_up(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 12, SMALL_BLOCKS, 0);
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    size_t record = store_tile_bytes(4096, CAIRN_F16, SMALL.block_tokens, SMALL.head_dim);
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        cairn_fetch *fetch = NULL;
        test_random r = {77};
        assert_ok(cairn_fetch_new(fx->store, (cairn_fetch_mode)mode, 320 << 10, &fetch));
        uint64_t asked = 0;
        for (int round = 0; round < 50; round++) {
            cairn_tile_id ids[16];
            size_t n = 1 + test_random_below(&r, 16);
            for (size_t i = 0; i < n; i++) ids[i] = tile_at(fx, segment, test_random_below(&r, SMALL_TILES));
            fetch_and_check(fx, fetch, snap, 12, ids, NULL, n);
            asked += n;
        }
        cairn_fetch_stats s = stats_of(fetch);
        assert_int_equal(s.tiles, asked);
        assert_true(s.wait_ns > 0);
        if (mode == CAIRN_FETCH_MAP) {
            assert_int_equal(s.map_bytes, asked * record);
            assert_int_equal(s.tier_tiles + s.tier_bytes + s.read_bytes + s.evicted_tiles + s.ram_bytes, 0);
        } else {
            uint64_t read_tiles = s.read_bytes / SMALL_SLOT;
            assert_int_equal(s.read_bytes % SMALL_SLOT, 0);
            assert_int_equal(s.tier_tiles + read_tiles, asked);
            assert_int_equal(s.tier_bytes, s.tier_tiles * record);
            assert_int_equal(s.map_bytes, 0);
            assert_int_equal(s.evicted_tiles, read_tiles - cairn_fetch_batch_max(fetch)); /* it has been full */
            assert_true(s.ram_bytes <= 320 << 10 && s.ram_bytes > cairn_fetch_batch_max(fetch) * SMALL_SLOT);
        }
        cairn_fetch_free(fetch);
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

/* Tiles [0, 10) are guessed, [5, 15) wanted. */
static void what_was_read_ahead_is_found_and_the_rest_is_read(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 21, SMALL_BLOCKS, 0);
    cairn_tile_id ids[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
    for (size_t e = 0; e <= sizeof engines / sizeof *engines; e++) {
        const bool map = e == sizeof engines / sizeof *engines;
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_view view;
        if (!map && !use_engine(engines[e])) continue;
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, map ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ, 1 << 20, &fetch));
        cairn_fetch_ahead(fetch, snap, ids, 10);
        assert_int_equal(cairn_fetch_wait(fetch, &view), CAIRN_INVALID); /* nothing was asked for */
        fetch_and_check(fx, fetch, snap, 21, ids + 5, NULL, 10);
        cairn_fetch_stats s = stats_of(fetch);
        assert_int_equal(s.tiles, 10);
        assert_int_equal(s.ahead_tiles, 10);
        assert_int_equal(s.ahead_used, 5);
        assert_int_equal(s.tier_tiles, map ? 0 : 5);
        assert_int_equal(s.read_bytes, map ? 0 : 15 * SMALL_SLOT);
        fetch_and_check(fx, fetch, snap, 21, ids, NULL, 10); /* five of the guess were not used until now */
        assert_int_equal(stats_of(fetch).ahead_used, 10);
        cairn_fetch_ahead(fetch, snap, ids, 15); /* all known */
        cairn_fetch_ahead(fetch, snap, ids + 20, 3);
        cairn_fetch_ahead(fetch, snap, ids + 22, 3);
        assert_int_equal(stats_of(fetch).ahead_tiles, 15);
        const cairn_tile_id none = {segment, SMALL_BLOCKS + 5, 1, 0};
        cairn_fetch_ahead(fetch, snap, &none, 1); /* a guess of something that is not there */
        fetch_and_check(fx, fetch, snap, 21, ids, NULL, 40);
        cairn_fetch_ahead(fetch, snap, ids + 60, 30);
        cairn_fetch_free(fetch); /* with reads in flight */
        cairn_snapshot_end(snap);
    }
    unsetenv("CAIRN_FETCH_READER");
    fixture_free(fx);
}

/* What a guess read in a snapshot that has ended is of no use to a later commit's. */
static void a_guess_of_an_earlier_snapshot_is_forgotten(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 22, SMALL_BLOCKS, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1 << 20, &fetch));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    cairn_fetch_ahead(fetch, snap, ids, 10);
    cairn_snapshot_end(snap);
    fixture_context(fx, "b", 23, 2, 0);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fetch_and_check(fx, fetch, snap, 22, ids, NULL, 10);
    assert_int_equal(stats_of(fetch).ahead_used, 0);
    assert_int_equal(stats_of(fetch).tier_tiles, 0);
    size_t half = cairn_fetch_batch_max(fetch) / 2;
    cairn_fetch_ahead(fetch, snap, ids, half < SMALL_TILES ? half : SMALL_TILES);
    assert_true(stats_of(fetch).ram_bytes <= 1 << 20);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void a_smaller_budget_evicts_and_a_larger_one_is_used(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 13, SMALL_BLOCKS, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    float mass[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) {
        ids[i] = tile_at(fx, segment, i);
        mass[i] = i >= 20 && i < 30 ? 1.0f : 0.01f;
    }
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 2 << 20, &fetch));
    fetch_and_check(fx, fetch, snap, 13, ids, mass, SMALL_TILES);
    uint64_t full = stats_of(fetch).ram_bytes;
    assert_ok(cairn_fetch_set_ram(fetch, 384 << 10));
    assert_true(stats_of(fetch).ram_bytes <= 384 << 10 && stats_of(fetch).ram_bytes < full);
    size_t max = cairn_fetch_batch_max(fetch);
    assert_int_equal(stats_of(fetch).evicted_tiles, SMALL_TILES - max);
    assert_int_equal(hits_of(fx, fetch, snap, 13, ids + 20, 10), 10); /* those with mass stayed */
    assert_int_equal(cairn_fetch_set_ram(fetch, 100), CAIRN_NO_MEMORY);
    assert_int_equal(cairn_fetch_batch_max(fetch), max); /* as before */
    for (uint64_t ram = 384 << 10; ram >= 300 << 10; ram -= 10000) {
        assert_ok(cairn_fetch_set_ram(fetch, ram));
        fetch_and_check(fx, fetch, snap, 13, ids, mass, cairn_fetch_batch_max(fetch));
        assert_true(stats_of(fetch).ram_bytes <= ram);
    }
    assert_ok(cairn_fetch_set_ram(fetch, 2 << 20));
    fetch_and_check(fx, fetch, snap, 13, ids, mass, SMALL_TILES);
    assert_int_equal(hits_of(fx, fetch, snap, 13, ids, SMALL_TILES), SMALL_TILES);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

/* 512 slots of a page make a chunk: while one fills another thread touches the next, within the budget, and whoever
 * frees or shrinks the tier meanwhile gives that back too. */
static void a_tier_grows_by_chunks_that_are_touched_before_they_are_needed(void **state)
{
    enum { CHUNK = 2 << 20, IN_CHUNK = CHUNK / SMALL_SLOT, BLOCKS = 2 * IN_CHUNK / 9 + 40, TILES = BLOCKS * 9 };
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 17, BLOCKS, 0);
    cairn_tile_id *ids = malloc(TILES * sizeof *ids);
    for (size_t i = 0; i < TILES; i++) ids[i] = tile_at(fx, segment, i);
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (uint64_t ram = 4 << 20; ram <= 12 << 20; ram += 4 << 20) {
        cairn_fetch *fetch = NULL;
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, ram, &fetch));
        const size_t room = cairn_fetch_batch_max(fetch), chunks = room / IN_CHUNK;
        assert_in_range(chunks, ram == 4 << 20 ? 1 : 2, ram / CHUNK);
        for (size_t at = 0, n = 32; at + n <= TILES; at += n) {
            fetch_and_check(fx, fetch, snap, 17, ids + at, NULL, n);
            const uint64_t bytes = stats_of(fetch).ram_bytes;
            const size_t used = at + n, begun = (used + IN_CHUNK - 1) / IN_CHUNK;
            const size_t there = begun + (used - (begun - 1) * IN_CHUNK > IN_CHUNK / 2);
            assert_true(bytes <= ram);
            if (there <= chunks) assert_in_range(bytes, there * CHUNK, there * CHUNK + CHUNK / 4);
        }
        assert_int_equal(hits_of(fx, fetch, snap, 17, ids + TILES - TILES % 32 - 32, 32), 32);
        cairn_fetch_free(fetch);
    }
    for (int shrinks = 0; shrinks <= 1; shrinks++) { /* while the second is on its way */
        cairn_fetch *fetch = NULL;
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 8 << 20, &fetch));
        fetch_and_check(fx, fetch, snap, 17, ids, NULL, IN_CHUNK / 2 + 1);
        assert_true(stats_of(fetch).ram_bytes > 2 * CHUNK);
        if (shrinks) {
            assert_ok(cairn_fetch_set_ram(fetch, 7 << 20)); /* which still has room for it */
            assert_true(stats_of(fetch).ram_bytes > 2 * CHUNK);
            assert_ok(cairn_fetch_set_ram(fetch, 1 << 20));
            assert_true(stats_of(fetch).ram_bytes <= 1 << 20);
            assert_ok(cairn_fetch_set_ram(fetch, 8 << 20));
            for (size_t at = 0; at + 256 <= TILES; at += 256) fetch_and_check(fx, fetch, snap, 17, ids + at, NULL, 256);
            assert_true(stats_of(fetch).ram_bytes <= 8 << 20);
        }
        cairn_fetch_free(fetch);
    }
    free(ids);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void the_same_calls_give_the_same_tier(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 14, SMALL_BLOCKS, 0);
    cairn_snapshot *snap = NULL;
    cairn_fetch_stats stats[3];
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (int run = 0; run < 3; run++) { /* whatever the engine and the order in which reads land */
        cairn_fetch *fetch = NULL;
        test_random r = {5};
        if (run == 1) use_engine("pool");
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 640 << 10, &fetch));
        assert_ok(cairn_fetch_set_ram(fetch, 600 << 10));
        unsetenv("CAIRN_FETCH_READER");
        /* the same number of slots whatever the engine keeps for itself */
        uint64_t ram = 600 << 10;
        while (cairn_fetch_batch_max(fetch) > 40) assert_ok(cairn_fetch_set_ram(fetch, ram -= 512));
        assert_int_equal(cairn_fetch_batch_max(fetch), 40);
        for (int round = 0; round < 300; round++) {
            cairn_tile_id ids[24];
            float mass[24];
            for (size_t i = 0; i < 24; i++) {
                ids[i] = tile_at(fx, segment, (test_random_below(&r, SMALL_TILES) * test_random_below(&r, 100)) / 100);
                mass[i] = (float)test_random_unit(&r);
            }
            fetch_and_check(fx, fetch, snap, 14, ids, mass, 24);
        }
        stats[run] = stats_of(fetch);
        cairn_fetch_free(fetch);
    }
    for (int run = 1; run < 3; run++) {
        assert_int_equal(stats[run].tier_tiles, stats[0].tier_tiles);
        assert_int_equal(stats[run].read_bytes, stats[0].read_bytes);
        assert_int_equal(stats[run].evicted_tiles, stats[0].evicted_tiles);
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void cached_tiles_stay_right_when_contexts_come_and_go(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    cairn_fetch *fetch = NULL;
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 8 << 20, &fetch));
    uint64_t last = 0;
    for (uint64_t round = 0; round < 6; round++) {
        cairn_snapshot *snap = NULL;
        cairn_tile_id ids[SMALL_TILES];
        if (round > 0) assert_ok(cairn_context_drop(fx->store, "a"));
        uint64_t segment = fixture_context(fx, "a", 100 + round, SMALL_BLOCKS, 0);
        assert_true(segment > last); /* an id never means another segment */
        last = segment;
        for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_int_equal(hits_of(fx, fetch, snap, 100 + round, ids, SMALL_TILES), 0);
        assert_int_equal(hits_of(fx, fetch, snap, 100 + round, ids, SMALL_TILES), SMALL_TILES);
        cairn_snapshot_end(snap);
    }
    cairn_fetch_free(fetch);
    fixture_free(fx);
}

/* ---- memory ---- */

enum { BIG_BLOCKS = 600, BUDGET = 16 << 20 };
static const cairn_geometry BIG = {.layers = 1, .kv_heads = 8, .head_dim = 128, .block_tokens = 63, .dtype = CAIRN_F16};

/* VmHWM while `rounds` random batches are read from a store of 150 MiB, in a process of its own. */
static uint64_t growth_of(fixture *fx, uint64_t segment, cairn_fetch_mode mode, const char *engine)
{
    int out[2];
    uint64_t grown = 0;
    assert_int_equal(pipe(out), 0);
    pid_t child = fork();
    if (child == 0) {
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_id ids[128];
        cairn_tile_view views[128];
        test_random r = {3};
        volatile uint8_t sum = 0;
        setenv("CAIRN_FETCH_READER", engine, 1);
        fixture_open(fx, false);
        uint64_t before = cairn_peak_rss_bytes();
        if (cairn_snapshot_begin(fx->store, &snap) != CAIRN_OK) _exit(1);
        if (cairn_fetch_new(fx->store, mode, BUDGET, &fetch) != CAIRN_OK) _exit(2);
        for (int round = 0; round < 150; round++) {
            for (size_t i = 0; i < 128; i++) ids[i] = tile_at(fx, segment, test_random_below(&r, BIG_BLOCKS * 8));
            if (cairn_fetch_submit(fetch, snap, ids, NULL, 128) != CAIRN_OK) _exit(3);
            if (cairn_fetch_wait(fetch, views) != CAIRN_OK) _exit(4);
            for (size_t i = 0; i < 128; i++)
                for (size_t b = 0; b < fixture_tile_bytes(fx); b += 512) sum ^= ((const uint8_t *)views[i].keys)[b];
        }
        uint64_t after = cairn_peak_rss_bytes() - before;
        _exit(write(out[1], &after, sizeof after) == sizeof after ? 0 : 5);
    }
    int status = 0;
    close(out[1]);
    assert_int_equal(read(out[0], &grown, sizeof grown), sizeof grown);
    close(out[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    return grown;
}

/* Where a tile lies is remembered for the commit it was looked up in, no longer. */
static void a_dropped_tile_is_not_found_where_it_lay(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    cairn_fetch *fetch = NULL;
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_MAP, 0, &fetch));
    for (uint64_t round = 0; round < 4; round++) {
        cairn_snapshot *before = NULL, *after = NULL;
        cairn_tile_id ids[SMALL_TILES];
        uint64_t segment = fixture_context(fx, "a", 200 + round, SMALL_BLOCKS, 0);
        for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
        assert_ok(cairn_snapshot_begin(fx->store, &before));
        for (int again = 0; again < 2; again++) fetch_and_check(fx, fetch, before, 200 + round, ids, NULL, SMALL_TILES);
        assert_ok(cairn_context_drop(fx->store, "a"));
        fetch_and_check(fx, fetch, before, 200 + round, ids, NULL, SMALL_TILES); /* whose commit still has them */
        cairn_snapshot_end(before);
        assert_ok(cairn_snapshot_begin(fx->store, &after));
        for (size_t i = 0; i < SMALL_TILES; i++)
            assert_int_equal(cairn_fetch_submit(fetch, after, &ids[i], NULL, 1), CAIRN_NOT_FOUND);
        cairn_snapshot_end(after);
    }
    cairn_fetch_free(fetch);
    fixture_free(fx);
}

static void the_process_stays_within_its_budget_over_a_store_many_times_as_large(void **state)
{
    (void)state;
#ifdef __SANITIZE_THREAD__
    skip(); /* its shadow counts as ours */
#endif
    uint64_t id;
    cairn_writer *writer = NULL;
    cairn_context_info info;
    fixture *fx = fixture_new(BIG);
    assert_ok(cairn_context_create(fx->store, "a", &id));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    fixture_commit(fx, writer, 1, 0, BIG_BLOCKS, 0, NULL);
    assert_ok(cairn_writer_info(writer, &info));
    cairn_writer_end(writer);
    cairn_store_close(fx->store);
    fx->store = NULL;
    uint64_t slack = 24 << 20; /* tree pages until they are let go, and LMDB's own */
    uint64_t tile_bytes = (uint64_t)BIG_BLOCKS * 8 * 32768;
    assert_true(tile_bytes > 8 * (uint64_t)BUDGET);
    for (size_t e = 0; e < sizeof engines / sizeof *engines; e++)
        if (use_engine(engines[e])) {
            uint64_t grown = growth_of(fx, info.own_segment, CAIRN_FETCH_READ, engines[e]);
            assert_in_range(grown, BUDGET / 2, BUDGET + slack);
        }
    unsetenv("CAIRN_FETCH_READER");
    /* the witness that this measures something: through the map all of the file comes to count */
    assert_true(growth_of(fx, info.own_segment, CAIRN_FETCH_MAP, "") > tile_bytes * 3 / 4);
    fixture_free(fx);
}

static void auto_says_by_which_numbers_it_chose(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    cairn_fetch *fetch = NULL;
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_AUTO, 1 << 20, &fetch));
    assert_int_equal(cairn_fetch_mode_used(fetch), CAIRN_FETCH_MAP); /* some kilobytes fit anywhere */
    assert_non_null(strstr(cairn_fetch_reason(fetch), "MiB"));
    assert_true(cairn_fetch_batch_max(fetch) == SIZE_MAX);
    cairn_fetch_free(fetch);
    /* a sparse file as large as all memory */
    char *path = test_path(fx->store->env->data.path, "data.mdb");
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(truncate(path, (off_t)cairn_free_ram_bytes()), 0);
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_AUTO, 1 << 20, &fetch));
    assert_int_equal(cairn_fetch_mode_used(fetch), CAIRN_FETCH_READ);
    assert_non_null(strstr(cairn_fetch_reason(fetch), "RAM tier of 1.0 MiB"));
    cairn_fetch_free(fetch);
    assert_int_equal(truncate(path, st.st_size), 0);
    free(path);
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_comes_back_bit_for_bit_in_both_modes),
        cmocka_unit_test(every_size_of_tile_comes_back_bit_for_bit),
        cmocka_unit_test(every_engine_gives_the_same_bytes),
        cmocka_unit_test(an_engine_that_does_not_exist_is_refused_by_name),
        cmocka_unit_test(a_fetch_equals_the_snapshots_own_tiles),
        cmocka_unit_test(a_batch_larger_than_the_tier_is_refused_and_the_largest_fits),
        cmocka_unit_test(the_tier_keeps_what_has_mass_and_lets_go_of_the_rest),
        cmocka_unit_test(tiles_of_the_batch_are_never_evicted_by_it),
        cmocka_unit_test(statistics_add_up),
        cmocka_unit_test(what_was_read_ahead_is_found_and_the_rest_is_read),
        cmocka_unit_test(a_guess_of_an_earlier_snapshot_is_forgotten),
        cmocka_unit_test(a_smaller_budget_evicts_and_a_larger_one_is_used),
        cmocka_unit_test(a_tier_grows_by_chunks_that_are_touched_before_they_are_needed),
        cmocka_unit_test(the_same_calls_give_the_same_tier),
        cmocka_unit_test(cached_tiles_stay_right_when_contexts_come_and_go),
        cmocka_unit_test(a_dropped_tile_is_not_found_where_it_lay),
        cmocka_unit_test(the_process_stays_within_its_budget_over_a_store_many_times_as_large),
        cmocka_unit_test(auto_says_by_which_numbers_it_chose),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
