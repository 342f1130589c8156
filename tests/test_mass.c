/* test_mass.c - the attention mass a session says it kept, against gates computed in double from the definition: own
 * visible tokens and all landmarks a row may see share one denominator; retained is the part of what is visible. */
#include "twin.h"

#include <stdio.h>

static void make(world *w, test_random *r, cairn_position_scheme scheme, size_t blocks)
{
    world_random(w, r, scheme, blocks);
    for (uint32_t l = 0; l < w->shape.layers; l++) /* scores spread out, so that masses differ */
        for (size_t i = 0; i < w->rows * w->shape.heads * w->shape.head_dim; i++) w->q[l][i] *= 1.5F;
}

/* What a session reports must be true: equal when it says exact, not above the truth when it says bound. */
static void expect_mass(const cairn_step_stats *stats, double sum, double least, double rows)
{
    double mean = sum / rows, reported = stats->mass_sum / rows;
    assert_true(rows > 0.0);
    if (stats->mass_kind == CAIRN_MASS_UNKNOWN) return;
    assert_int_equal(stats->mass_rows, (uint64_t)rows);
    if (!(reported <= mean + 2e-5) || !((double)stats->mass_min <= least + 2e-5))
        fail_msg("mass %.7f, least %.7f reported; the truth is %.7f, %.7f", reported, (double)stats->mass_min, mean,
                 least);
    if (stats->mass_kind == CAIRN_MASS_EXACT) {
        assert_near(reported, mean, 2e-5);
        assert_near(stats->mass_min, least, 2e-5);
    } else {
        assert_true(reported >= mean - 0.1); /* a bound nobody could use would be as good as unknown */
    }
}

static void the_mass_of_every_step_is_exact_or_a_true_lower_bound(void **state)
{
    (void)state;
    static const char *const kinds[] = {"exact", "scan", NULL};
    test_random r = {41};
    for (int n = 0; n < 6; n++) {
        world w;
        record rec;
        make(&w, &r, CAIRN_POSITION_CLAMPED, 9);
        uint32_t k = 1 + (uint32_t)n % 3, heads = w.shape.heads;
        record_init(&rec, &w, k);
        session_spec spec = {.top_k = k, .measure = n % 2 == 1, .index_kind = kinds[n % 3]};
        cairn_session *s = world_session(&w, NULL, &spec);
        cairn_session_mass_enable(s, true); /* of those that did not ask at the start */
        for (size_t row = 0; row < w.rows;) {
            size_t rows = n % 2 == 0 ? 1 : 1 + test_random_below(&r, 20);
            if (rows > w.rows - row) rows = w.rows - row;
            cairn_session_stats_reset(s);
            world_feed(&w, s, row, row + rows, rows, NULL, &rec);
            double sum = 0.0, least = 2.0, count = 0.0;
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                for (size_t i = row * heads; i < (row + rows) * heads; i++) {
                    uint8_t visible[16] = {0};
                    size_t own = i / heads / world_slots(&w), window = w.shape.window_blocks;
                    for (size_t b = 0; b < own; b++) visible[b] = own - b <= window;
                    for (uint32_t x = 0; x < k; x++)
                        if (rec.picked[l][i * k + x] >= 0) visible[rec.picked[l][i * k + x]] = 1;
                    double out[64];
                    twin_result result;
                    twin_clamped(&w, l, i / heads, (uint32_t)(i % heads), visible, out, &result);
                    sum += result.mass;
                    least = fmin(least, result.mass);
                    count += 1.0;
                }
            }
            cairn_step_stats stats;
            cairn_session_stats(s, &stats);
            assert_int_equal(stats.rows, (uint64_t)count);
            if (n % 3 == 0) assert_int_equal(stats.mass_kind, CAIRN_MASS_EXACT);
            assert_int_not_equal(stats.mass_kind, CAIRN_MASS_UNKNOWN); /* every landmark was scored */
            expect_mass(&stats, sum, least, count);
            row += rows;
        }
        cairn_session_end(s);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

static void all_blocks_keep_all_mass(void **state)
{
    (void)state;
    test_random r = {42};
    world w;
    make(&w, &r, CAIRN_POSITION_CLAMPED, 8);
    cairn_session *s = world_session(&w, NULL, &(session_spec){.measure = true});
    world_feed(&w, s, 0, w.rows, 0, &r, NULL);
    cairn_step_stats stats;
    cairn_session_stats(s, &stats);
    assert_int_equal(stats.mass_kind, CAIRN_MASS_EXACT);
    assert_near(stats.mass_min, 1.0, 1e-6);
    assert_near(stats.mass_sum, (double)stats.mass_rows, 1e-6 * (double)stats.mass_rows);
    cairn_session_end(s);
    world_wipe(&w);
}

static void mass_nobody_asked_for_is_unknown(void **state)
{
    (void)state;
    test_random r = {47};
    world w;
    make(&w, &r, CAIRN_POSITION_CLAMPED, 8);
    cairn_session *s = world_session(&w, NULL, &(session_spec){.top_k = 1});
    world_feed(&w, s, 0, w.rows, 1, &r, NULL);
    cairn_step_stats stats;
    cairn_session_stats(s, &stats);
    assert_int_equal(stats.mass_kind, CAIRN_MASS_UNKNOWN);
    cairn_session_end(s);
    world_wipe(&w);
}

/* The fewest blocks whose mass reaches the target, at most top_k. */
static void a_mass_target_takes_the_fewest_blocks_that_reach_it(void **state)
{
    (void)state;
    enum { K = 6 };
    test_random r = {43};
    size_t counts[K + 1] = {0};
    for (int n = 0; n < 6; n++) {
        world w;
        record rec;
        make(&w, &r, CAIRN_POSITION_CLAMPED, 12);
        float target = 0.5F + 0.15F * (float)(n % 4);
        uint32_t heads = w.shape.heads;
        bool exact = n % 2 == 0;
        record_init(&rec, &w, K);
        session_spec spec = {.top_k = K, .mass = target, .measure = true, .index_kind = exact ? "exact" : "scan"};
        cairn_session *s = world_session(&w, NULL, &spec);
        world_feed(&w, s, 0, w.rows, n < 3 ? 1 : 0, &r, &rec);
        cairn_session_end(s);
        for (uint32_t l = 0; l < w.shape.layers; l++) {
            for (size_t i = 0; i < w.rows * heads; i++) {
                const int64_t *picked = rec.picked[l] + i * K;
                uint8_t visible[16] = {0};
                size_t own = i / heads / world_slots(&w), found = 0, fewest = 0;
                twin_result result;
                double out[64];
                for (size_t b = 0; b < own; b++) visible[b] = own - b <= w.shape.window_blocks;
                twin_clamped(&w, l, i / heads, (uint32_t)(i % heads), visible, out, &result);
                double mass = result.mass;
                bool near = false; /* too near the target to call */
                for (; fewest < K && mass < (double)target; fewest++) {
                    size_t best = SIZE_MAX;
                    for (size_t b = 0; b < own; b++)
                        if (visible[b] == 0 && (best == SIZE_MAX || result.gates[b] > result.gates[best])) best = b;
                    if (best == SIZE_MAX) break;
                    visible[best] = 1;
                    mass += result.gates[best];
                    near = near || fabs(mass - (double)target) < 1e-4;
                }
                while (found < K && picked[found] >= 0) {
                    if (!near && found < fewest && visible[picked[found]] == 0)
                        fail_msg("layer %u row %zu head %zu: block %lld is not among the best", (unsigned)l, i / heads,
                                 i % heads, (long long)picked[found]);
                    found++;
                }
                if (near) continue;
                if (exact ? found != fewest : found < fewest || found > fewest + 2)
                    fail_msg("layer %u row %zu head %zu: %zu blocks for mass %.2f, %zu reach it", (unsigned)l,
                             i / heads, i % heads, found, (double)target, fewest);
                counts[found]++;
            }
        }
        /* and the output is that of the choice */
        uint8_t *visible[WORLD_LAYERS] = {NULL};
        size_t blocks = w.rows / world_slots(&w);
        expected_visible(&w, 0, -1, 0, visible);
        for (uint32_t l = 0; l < w.shape.layers; l++)
            for (size_t i = 0; i < w.rows * heads; i++)
                for (size_t k = 0; k < K; k++)
                    if (rec.picked[l][i * K + k] >= 0) visible[l][i * blocks + (size_t)rec.picked[l][i * K + k]] = 1;
        expect_reference(&rec, visible, 0, w.rows, 1e-4);
        free_visible(visible);
        record_wipe(&rec);
        world_wipe(&w);
    }
    for (size_t k = 0; k <= K; k++) assert_true(counts[k] > 0); /* every number of blocks occurred */
}

/* Under stingy positions the mass is that of the search scores: landmarks at their scoring slots. */
static void stingy_mass_is_that_of_the_search_scores(void **state)
{
    (void)state;
    enum { K = 2 };
    test_random r = {44};
    for (int n = 0; n < 3; n++) {
        world w;
        record rec;
        make(&w, &r, CAIRN_POSITION_STINGY, 9);
        uint32_t heads = w.shape.heads;
        size_t slots = world_slots(&w), kv = (size_t)w.shape.kv_heads * w.shape.head_dim;
        record_init(&rec, &w, K);
        cairn_session *s = world_session(&w, NULL, &(session_spec){.top_k = K, .measure = true, .index_kind = "exact"});
        for (size_t row = 0; row < w.rows; row++) {
            cairn_session_stats_reset(s);
            world_feed(&w, s, row, row + 1, 1, NULL, &rec);
            size_t cached = row / slots, kept = cached < K ? cached : K;
            double sum = 0.0, least = 2.0, count = 0.0;
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                for (uint32_t h = 0; h < heads; h++) {
                    twin_block blocks[16];
                    twin_result result;
                    double out[64];
                    for (size_t b = 0; b < cached; b++) {
                        size_t slot = b + kept < cached ? 0 : b + kept - cached + 1;
                        const int64_t *picked = rec.picked[l] + (row * heads + h) * K;
                        blocks[b] = (twin_block){w.k[l] + b * slots * kv, w.v[l] + b * slots * kv, w.shape.block_tokens,
                                                 kept + 1 - slot, picked[0] == (int64_t)b || picked[1] == (int64_t)b};
                    }
                    twin_row(&w.shape, l, h, w.q[l] + row * heads * w.shape.head_dim, row % slots,
                             w.k[l] + cached * slots * kv, w.v[l] + cached * slots * kv, blocks, cached, out, &result);
                    sum += result.mass;
                    least = fmin(least, result.mass);
                    count += 1.0;
                }
            }
            cairn_step_stats stats;
            cairn_session_stats(s, &stats);
            assert_int_equal(stats.mass_kind, CAIRN_MASS_EXACT);
            expect_mass(&stats, sum, least, count);
        }
        cairn_session_end(s);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* A choice of fewer than k blocks sits in as many slots + 1, as if k had been that few. */
static void a_mass_target_under_stingy_positions_packs_what_it_chose_before_the_chunk(void **state)
{
    (void)state;
    enum { K = 4 };
    test_random r = {46};
    size_t counts[K + 1] = {0};
    for (int n = 0; n < 4; n++) {
        world w;
        record rec;
        make(&w, &r, CAIRN_POSITION_STINGY, 10);
        size_t heads = w.shape.heads, dim = w.shape.head_dim;
        record_init(&rec, &w, K);
        session_spec spec = {.top_k = K, .mass = 0.4F + 0.1F * (float)n, .index_kind = "exact"};
        cairn_session *s = world_session(&w, NULL, &spec);
        world_feed(&w, s, 0, w.rows, 1, NULL, &rec);
        cairn_session_end(s);
        for (uint32_t l = 0; l < w.shape.layers; l++) {
            for (size_t i = 0; i < w.rows * heads; i++) {
                uint32_t used = 0;
                int64_t picked[WORLD_HEADS * K];
                int32_t slots[WORLD_HEADS * K];
                double *out = malloc(world_width(&w) * sizeof *out);
                assert_non_null(out);
                while (used < K && rec.picked[l][i * K + used] >= 0) used++;
                for (size_t h = 0; h < heads; h++)
                    memcpy(picked + h * used, rec.picked[l] + i * K, used * sizeof *picked);
                twin_stingy(&w, l, i / heads, 1, CAIRN_SCOPE_TOKEN_HEAD, used, 0, true, picked, slots, out);
                for (size_t d = 0; d < dim; d++) assert_near(rec.out[l][i * dim + d], out[i % heads * dim + d], 1e-4);
                for (size_t k = 0; k < used; k++)
                    assert_int_equal(rec.slots[l][i * K + k], slots[i % heads * used + k]);
                counts[used]++;
                free(out);
            }
        }
        record_wipe(&rec);
        world_wipe(&w);
    }
    for (size_t k = 0; k <= K; k++) assert_true(counts[k] > 0);
}

/* Every kind of index over stored blocks: the truth or less, or it says it does not know. */
static void no_kind_of_index_reports_more_mass_than_there_is(void **state)
{
    (void)state;
    enum { OLD = 400, K = 3, ROWS = 3, HEADS = 4 };
    static const char *const kinds[] = {"scan", "exact", "flat", "sq8", "ivf", "hnsw"};
    test_random r = {45};
    world w;
    world_spec spec = {1, HEADS, 2, 16, 3, CAIRN_POSITION_CLAMPED, true, true, OLD * 4 + ROWS};
    world_init(&w, &r, &spec);
    const char *name = "old";
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
    assert_ok(cairn_context_create(store, name, NULL));
    world_write_blocks(&w, store, name, 0, OLD);
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        record rec;
        record_init(&rec, &w, K);
        assert_ok(cairn_context_reindex(store, &w.shape, name, kinds[kind], NULL, NULL));
        session_spec session = {.contexts = &name, .n = 1, .top_k = K, .measure = true, .index_kind = kinds[kind]};
        cairn_session *s = world_session(&w, store, &session);
        for (size_t row = (size_t)OLD * 4; row < w.rows; row++) {
            cairn_session_stats_reset(s);
            world_feed(&w, s, row, row + 1, 1, NULL, &rec);
            double sum = 0.0, least = 2.0;
            for (uint32_t h = 0; h < HEADS; h++) {
                uint8_t visible[OLD + 1] = {0};
                for (size_t b = OLD - w.shape.window_blocks; b < OLD; b++) visible[b] = 1;
                for (size_t k = 0; k < K; k++) {
                    int64_t block = rec.picked[0][(row * HEADS + h) * K + k];
                    assert_in_range(block, 0, OLD - 1 - w.shape.window_blocks);
                    visible[block] = 1;
                }
                twin_result result;
                double out[16];
                twin_clamped(&w, 0, row, h, visible, out, &result);
                for (size_t d = 0; d < 16; d++) assert_near(rec.out[0][(row * HEADS + h) * 16 + d], out[d], 1e-4);
                sum += result.mass;
                least = fmin(least, result.mass);
            }
            cairn_step_stats stats;
            cairn_session_stats(s, &stats);
            if (row == (size_t)OLD * 4)
                print_message("  %-6s mass %.4f of %.4f, %s\n", kinds[kind], stats.mass_sum / HEADS, sum / HEADS,
                              stats.mass_kind == CAIRN_MASS_EXACT   ? "exact"
                              : stats.mass_kind == CAIRN_MASS_BOUND ? "bound"
                                                                    : "unknown");
            expect_mass(&stats, sum, least, HEADS);
        }
        cairn_session_end(s);
        record_wipe(&rec);
    }
    cairn_store_close(store);
    test_remove_dir(dir);
    world_wipe(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_mass_of_every_step_is_exact_or_a_true_lower_bound),
        cmocka_unit_test(all_blocks_keep_all_mass),
        cmocka_unit_test(mass_nobody_asked_for_is_unknown),
        cmocka_unit_test(a_mass_target_takes_the_fewest_blocks_that_reach_it),
        cmocka_unit_test(stingy_mass_is_that_of_the_search_scores),
        cmocka_unit_test(a_mass_target_under_stingy_positions_packs_what_it_chose_before_the_chunk),
        cmocka_unit_test(no_kind_of_index_reports_more_mass_than_there_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
