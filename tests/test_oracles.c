/* test_oracles.c - the method's oracles that concern inference, on real sessions (numbers in brackets).
 *
 * Shapes are random: GQA (heads over 1 or 2 KV heads), learnt bias or none, interleaved or half-split rotation, whole
 * or partial rotation, C = 3..15, D = 4..32, several layers. The witnesses are cairn_attention_reference and the plain
 * rows of twin.c. Oracles 1-7 and 18 on plain arrays are in test_grouped_softmax.c, 16 and 17 in test_golden.c, 8
 * and 19-23 and 27 in test_retrieval.c, mass in test_mass.c.
 *
 * labels: threads
 */
#include "twin.h"

#include <kernels_internal.h>

#include <stdio.h>

/* Against double loops: f32 sums of at most 32 products and of some hundred weights, values up to about 4. */
static const double f32_tolerance = 1e-4;

enum { TIGHT = 5 << 18 }; /* bytes: about the least a session takes */

/* ---- all blocks visible: every way of running equals one-shot training attention ---- */

static void every_way_of_running_equals_one_shot(cairn_position_scheme scheme, uint64_t seed)
{
    test_random r = {seed};
    for (int n = 0; n < 6; n++) {
        world w;
        record whole, rec;
        world_random(&w, &r, scheme, 3 + test_random_below(&r, 6));
        print_message("  %zu rows, %u layers, %u/%u heads of %u, C %u, %s%s\n", w.rows, (unsigned)w.shape.layers,
                      (unsigned)w.shape.heads, (unsigned)w.shape.kv_heads, (unsigned)w.shape.head_dim,
                      (unsigned)w.shape.block_tokens, w.shape.rope_interleaved ? "interleaved" : "half split",
                      w.shape.landmark_bias != NULL ? ", bias" : "");
        record_init(&whole, &w, 0);
        record_init(&rec, &w, 0);
        session_spec spec = {.window_set = scheme == CAIRN_POSITION_CLAMPED, .window = n % 3};
        world_run_memory(&w, &spec, w.rows, 1, &whole);
        expect_reference(&whole, NULL, 0, w.rows, f32_tolerance);
        static const size_t chunks[] = {1, 0, 0, 2, 5};
        for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
            spec.threads = 1 + (uint32_t)c % 2;
            world_run_memory(&w, &spec, chunks[c], r.state + c, &rec);
            if (scheme == CAIRN_POSITION_STINGY)
                record_near(&whole, &rec, 0, w.rows, f32_tolerance);
            else
                record_same(&whole, &rec, 0, w.rows);
        }
        for (int mode = 0; mode < 3 && scheme != CAIRN_POSITION_DENSE; mode++) {
            spec.fetch = mode == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
            spec.ram_bytes = mode == 2 ? TIGHT : 0;
            world_run_disk(&w, &spec, CAIRN_F32, (size_t)mode + 1, r.state, &rec);
            if (scheme == CAIRN_POSITION_STINGY)
                record_near(&whole, &rec, 0, w.rows, f32_tolerance);
            else
                record_same(&whole, &rec, 0, w.rows);
        }
        record_wipe(&whole);
        record_wipe(&rec);
        world_wipe(&w);
    }
}
/* [12], [14], [24] */
static void clamped_with_all_blocks_equals_one_shot_at_any_chunking_from_memory_map_and_reads(void **state)
{
    (void)state;
    every_way_of_running_equals_one_shot(CAIRN_POSITION_CLAMPED, 12);
}
static void stingy_with_all_blocks_equals_one_shot_at_any_chunking_from_memory_map_and_reads(void **state)
{
    (void)state;
    every_way_of_running_equals_one_shot(CAIRN_POSITION_STINGY, 112);
}
static void dense_is_causal_attention_at_any_chunking(void **state)
{
    (void)state;
    every_way_of_running_equals_one_shot(CAIRN_POSITION_DENSE, 212);
}

/* [13], [21] */
static void the_three_scopes_are_one_when_k_covers_all_blocks(void **state)
{
    (void)state;
    test_random r = {13};
    for (int n = 0; n < 4; n++) {
        world w;
        record a, b;
        world_random(&w, &r, n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY, 5);
        record_init(&a, &w, 0);
        record_init(&b, &w, 0);
        for (uint32_t k = 5; k < 8; k++) {
            world_run_memory(&w, &(session_spec){.top_k = k}, 0, 7, &a);
            expect_reference(&a, NULL, 0, w.rows, f32_tolerance);
            world_run_memory(&w, &(session_spec){.top_k = k, .scope = CAIRN_SCOPE_HEAD}, 0, 8, &b);
            record_near(&a, &b, 0, w.rows, 1e-5);
            world_run_memory(&w, &(session_spec){.top_k = k, .scope = CAIRN_SCOPE_TOKEN}, 0, 9, &b);
            record_near(&a, &b, 0, w.rows, 1e-5);
        }
        record_wipe(&a);
        record_wipe(&b);
        world_wipe(&w);
    }
}

/* Error of a rounded element: u relative. Scores move by at most u |q||k| / sqrt(D), about 2 u sqrt(D) for normal rows,
 * weights by twice that, and values by u |v|, |v| < 5; q8 rounds to max/254, u about 4/254 of a row's unit spread. */
static double tolerance_of(cairn_dtype dtype, uint32_t dim)
{
    double u = dtype == CAIRN_F16 ? 0x1p-11 : dtype == CAIRN_BF16 ? 0x1p-8 : dtype == CAIRN_Q8 ? 4.0 / 254 : 0x1p-24;
    return f32_tolerance + 5.0 * u * (1.0 + 0.5 * sqrt((double)dim));
}

/* [10], [24] */
static void every_element_type_is_bit_for_bit_the_same_resident_and_from_disk_and_near_the_reference(void **state)
{
    (void)state;
    static const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16, CAIRN_Q8};
    test_random r = {24};
    for (int n = 0; n < 4; n++) {
        world w;
        record resident, rec;
        world_random(&w, &r, CAIRN_POSITION_CLAMPED, 7);
        w.local[0] = n % 2 == 0;
        w.shape.local_window_blocks = 2;
        record_init(&resident, &w, 0);
        record_init(&rec, &w, 0);
        for (size_t d = 0; d < 4; d++) {
            session_spec spec = {.dtype = dtypes[d]};
            world_run_memory(&w, &spec, w.rows, 1, &resident);
            expect_reference(&resident, NULL, 0, w.rows, tolerance_of(dtypes[d], w.shape.head_dim));
            world_run_memory(&w, &spec, 0, r.state, &rec);
            record_same(&resident, &rec, 0, w.rows);
            spec.fetch = d % 2 == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
            world_run_disk(&w, &spec, dtypes[d], 2, r.state, &rec);
            record_same(&resident, &rec, 0, w.rows);
            /* the same when only some blocks are chosen */
            spec.top_k = 2;
            world_run_memory(&w, &spec, w.rows, 1, &resident);
            spec.threads = 2;
            spec.fetch = d % 2 == 0 ? CAIRN_FETCH_READ : CAIRN_FETCH_MAP;
            spec.ram_bytes = TIGHT;
            world_run_disk(&w, &spec, dtypes[d], 2, r.state, &rec);
            record_same(&resident, &rec, 0, w.rows);
        }
        record_wipe(&resident);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* Rows are rounded to the element type when they come in, not when their block closes: what a row sees of its own block
 * is what later rows see of it. */
static void a_token_that_sees_only_itself_gets_its_value_as_the_store_will_keep_it(void **state)
{
    (void)state;
    static const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16};
    test_random r = {25};
    for (size_t d = 0; d < 3; d++) {
        world w;
        record rec;
        world_random(&w, &r, CAIRN_POSITION_CLAMPED, 4);
        record_init(&rec, &w, 0);
        world_run_memory(&w, &(session_spec){.no_retrieval = true, .window_set = true, .dtype = dtypes[d]}, 0, 1, &rec);
        size_t dim = w.shape.head_dim, per = w.shape.heads / w.shape.kv_heads;
        for (size_t row = 0; row < w.rows; row += world_slots(&w)) {
            for (size_t h = 0; h < w.shape.heads; h++) {
                float kept[64];
                uint8_t stored[256];
                cairn_kernels_ref.narrow(stored, w.v[0] + (row * w.shape.kv_heads + h / per) * dim, dtypes[d], dim);
                cairn_kernels_ref.widen(kept, stored, dtypes[d], dim);
                for (size_t x = 0; x < dim; x++)
                    assert_near(rec.out[0][(row * w.shape.heads + h) * dim + x], kept[x], 1e-7);
            }
        }
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* [24]: a store several times the budget, every block of it read again and again */
static void a_budget_far_below_the_store_changes_no_bit(void **state)
{
    (void)state;
    test_random r = {124};
    world w;
    record whole, rec;
    const char *name = "text";
    world_spec spec = {3, 4, 2, 32, 15, CAIRN_POSITION_CLAMPED, false, true, (size_t)16 * 240 + 40};
    world_init(&w, &r, &spec);
    record_init(&whole, &w, 0);
    record_init(&rec, &w, 0);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
    assert_ok(cairn_context_create(store, name, NULL));
    world_write_blocks(&w, store, name, 0, 240); /* 240 blocks x 6 tiles x 3840 bytes = 5.5 MB */
    for (int mode = 0; mode < 4; mode++) {
        session_spec session = {
            .contexts = &name, .n = 1, .top_k = mode < 3 ? 40 : 0, .threads = 1 + (uint32_t)mode % 2};
        session.fetch = mode == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
        session.ram_bytes = mode >= 2 ? TIGHT : 0;
        cairn_session *s = world_session(&w, store, &session);
        world_feed(&w, s, (size_t)16 * 240, w.rows, 0, &r, mode == 0 ? &whole : &rec);
        cairn_session_info info;
        cairn_step_stats stats;
        cairn_session_info_get(s, &info);
        cairn_session_stats(s, &stats);
        assert_int_equal(info.fetch, session.fetch);
        if (mode == 0) assert_true(stats.map_bytes > 0 && stats.read_bytes == 0);
        if (mode == 1) assert_true(stats.tier_bytes > 0 && stats.read_bytes < 6 << 20);
        if (mode >= 2) {
            assert_true(stats.read_bytes > 2 * TIGHT); /* it had to let go of tiles and read them again */
            assert_true(info.tier_bytes + info.landmark_bytes + info.own_bytes <= TIGHT);
        }
        cairn_session_end(s);
        if (mode == 1 || mode == 2) record_same(&whole, &rec, (size_t)16 * 240, w.rows);
    }
    for (size_t row = (size_t)16 * 240 + 7; row < w.rows; row += 11) { /* all blocks: the plain twin's rows */
        for (uint32_t h = 0; h < 4; h++) {
            double out[32];
            twin_clamped(&w, 2, row, h, NULL, out, NULL);
            for (size_t d = 0; d < 32; d++) assert_near(rec.out[2][(row * 4 + h) * 32 + d], out[d], f32_tolerance);
        }
    }
    cairn_store_close(store);
    test_remove_dir(dir);
    record_wipe(&whole);
    record_wipe(&rec);
    world_wipe(&w);
}

/* [10] */
static void scores_of_a_thousand_stay_finite(void **state)
{
    (void)state;
    test_random r = {10};
    for (int n = 0; n < 4; n++) {
        world w;
        record rec;
        world_random(&w, &r, n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY, 6);
        for (uint32_t l = 0; l < w.shape.layers; l++)
            for (size_t i = 0; i < w.rows * w.shape.heads * w.shape.head_dim; i++) w.q[l][i] *= 400.0F;
        record_init(&rec, &w, 0);
        world_run_memory(&w, &(session_spec){0}, 0, 3, &rec);
        /* a score of 1000 has an ulp of 6e-5, its sum some ulps of error, and so the weights */
        expect_reference(&rec, NULL, 0, w.rows, 2e-2);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* [11] and PAPER 1.3: landmark values are never used, and a landmark does not see itself */
static void landmark_values_and_a_landmarks_key_at_its_own_row_change_no_bit(void **state)
{
    (void)state;
    test_random r = {11};
    for (int n = 0; n < 4; n++) {
        world w;
        record a, b;
        world_random(&w, &r, n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY, 6);
        record_init(&a, &w, 0);
        record_init(&b, &w, 0);
        session_spec spec = {.top_k = 2};
        world_run_memory(&w, &spec, 7, 3, &a);
        size_t slots = world_slots(&w), kv = (size_t)w.shape.kv_heads * w.shape.head_dim, last = 6 * slots - 1;
        for (uint32_t l = 0; l < w.shape.layers; l++) {
            for (size_t row = slots - 1; row < w.rows; row += slots) test_random_fill(&r, w.v[l] + row * kv, kv);
            test_random_fill(&r, w.k[l] + last * kv, kv); /* the last landmark's key: nobody up to it has seen it */
        }
        world_run_memory(&w, &spec, 7, 3, &b);
        record_same(&a, &b, 0, last + 1);
        record_wipe(&a);
        record_wipe(&b);
        world_wipe(&w);
    }
}

/* ---- what is stored ---- */

/* [15] */
static void blocks_on_disk_are_the_same_however_the_stream_was_cut_and_hold_rotated_rows(void **state)
{
    (void)state;
    static const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_Q8};
    test_random r = {15};
    for (size_t d = 0; d < 3; d++) {
        world w;
        world_random(&w, &r, d % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY, 6);
        char *dir = test_make_dir();
        cairn_store *stores[4];
        const char *const names[4] = {"a", "b", "c", "d"};
        const char *context = "stream";
        for (size_t i = 0; i < (dtypes[d] == CAIRN_F32 ? 4U : 3U); i++) {
            stores[i] = world_store(&w, dir, names[i], dtypes[d]);
            assert_ok(cairn_context_create(stores[i], context, NULL));
            if (i == 3) { /* written without a session */
                world_write_blocks(&w, stores[i], context, 0, 6);
                continue;
            }
            session_spec spec = {.contexts = &context, .n = 1, .top_k = 2, .write = true};
            cairn_session *s = world_session(&w, stores[i], &spec);
            for (size_t at = 0; at < w.rows;) {
                size_t to =
                    i == 0 ? w.rows : world_commit_point(&w, at + 1 + test_random_below(&r, (uint32_t)(w.rows - at)));
                world_feed(&w, s, at, to, i == 1 ? 1 : 0, &r, NULL);
                assert_ok(cairn_session_commit(s, NULL));
                at = to;
            }
            cairn_session_end(s);
        }
        cairn_snapshot *snaps[4];
        for (size_t i = 0; i < (dtypes[d] == CAIRN_F32 ? 4U : 3U); i++)
            assert_ok(cairn_snapshot_begin(stores[i], &snaps[i]));
        size_t payload = cairn_tile_payload_bytes(dtypes[d], w.shape.block_tokens, w.shape.head_dim);
        size_t elements = (size_t)w.shape.block_tokens * w.shape.head_dim;
        for (uint32_t b = 0; b < 6; b++) {
            for (uint32_t lg = 0; lg < w.shape.layers * w.shape.kv_heads; lg++) {
                cairn_tile_view view[4];
                for (size_t i = 0; i < (dtypes[d] == CAIRN_F32 ? 4U : 3U); i++) {
                    cairn_context_info info;
                    assert_ok(cairn_snapshot_context(snaps[i], context, &info));
                    assert_int_equal(info.blocks, 6);
                    cairn_tile_id id = {.segment = info.own_segment,
                                        .block = b,
                                        .layer = (uint16_t)(lg / w.shape.kv_heads),
                                        .head = (uint16_t)(lg % w.shape.kv_heads)};
                    assert_ok(cairn_snapshot_tile(snaps[i], id, &view[i]));
                    assert_int_equal(view[i].dtype, dtypes[d]);
                    if (i < 3) assert_memory_equal(view[i].keys, view[0].keys, payload);
                }
                for (size_t x = 0; x < elements && dtypes[d] == CAIRN_F32; x++) {
                    assert_near(((const float *)view[0].keys)[x], ((const float *)view[3].keys)[x], 1e-6);
                    assert_near(((const float *)view[0].values)[x], ((const float *)view[3].values)[x], 0);
                }
            }
        }
        for (size_t i = 0; i < (dtypes[d] == CAIRN_F32 ? 4U : 3U); i++) {
            cairn_snapshot_end(snaps[i]);
            cairn_store_close(stores[i]);
        }
        test_remove_dir(dir);
        world_wipe(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clamped_with_all_blocks_equals_one_shot_at_any_chunking_from_memory_map_and_reads),
        cmocka_unit_test(stingy_with_all_blocks_equals_one_shot_at_any_chunking_from_memory_map_and_reads),
        cmocka_unit_test(dense_is_causal_attention_at_any_chunking),
        cmocka_unit_test(the_three_scopes_are_one_when_k_covers_all_blocks),
        cmocka_unit_test(every_element_type_is_bit_for_bit_the_same_resident_and_from_disk_and_near_the_reference),
        cmocka_unit_test(a_token_that_sees_only_itself_gets_its_value_as_the_store_will_keep_it),
        cmocka_unit_test(a_budget_far_below_the_store_changes_no_bit),
        cmocka_unit_test(scores_of_a_thousand_stay_finite),
        cmocka_unit_test(landmark_values_and_a_landmarks_key_at_its_own_row_change_no_bit),
        cmocka_unit_test(blocks_on_disk_are_the_same_however_the_stream_was_cut_and_hold_rotated_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
