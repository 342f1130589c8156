/* test_retrieval.c - which blocks a session retrieves, and that its output is attention over just those (numbers in
 * brackets: the method's oracles). Random shapes as in test_oracles.c; the witnesses are twin.c's own scores and rows.
 *
 * labels: threads
 */
#include "twin.h"

#include "store_swap.h"

#include <context_internal.h>
#include <index_internal.h>

/* Against double loops: f32 sums of at most 32 products and of some hundred weights, values up to about 4. */
static const double f32_tolerance = 1e-4;

enum { TIGHT = 5 << 18 }; /* bytes: about the least a session takes */

/* A session over old blocks written without one; own rows follow them in the world but are a stream of their own. */
static void run_over_old_blocks(const world *w, const size_t *order, size_t old, const session_spec *base, size_t chunk,
                                record *rec)
{
    const char *name = "old";
    session_spec spec = *base;
    spec.contexts = &name;
    spec.n = 1;
    spec.fresh = true;
    char *dir = test_make_dir();
    test_random r = {chunk};
    cairn_store *store = world_store(w, dir, "store", CAIRN_F32);
    assert_ok(cairn_context_create(store, name, NULL));
    for (size_t b = 0; b < old; b++) world_write_blocks(w, store, name, order != NULL ? order[b] : b, 1);
    cairn_session *s = world_session(w, store, &spec);
    world_feed(w, s, old * world_slots(w), w->rows, chunk, &r, rec);
    cairn_session_end(s);
    cairn_store_close(store);
    test_remove_dir(dir);
}

/* [8] */
static void permuting_old_blocks_changes_nothing(void **state)
{
    (void)state;
    static const size_t order[9] = {3, 8, 0, 5, 1, 7, 2, 6, 4};
    test_random r = {8};
    for (int n = 0; n < 3; n++) {
        world w;
        record a, b;
        world_random(&w, &r, CAIRN_POSITION_CLAMPED, 11);
        record_init(&a, &w, 4);
        record_init(&b, &w, 4);
        session_spec spec = {.top_k = n == 0 ? 0 : 4};
        run_over_old_blocks(&w, NULL, 9, &spec, 5, &a);
        run_over_old_blocks(&w, order, 9, &spec, 5, &b);
        record_near(&a, &b, 9 * world_slots(&w), w.rows, 1e-5);
        size_t from = 9 * world_slots(&w) * w.shape.heads * 4, to = (9 * world_slots(&w) + 1) * w.shape.heads * 4;
        for (size_t i = from; i < to && n > 0; i++) /* best first: the same blocks under their new numbers */
            assert_int_equal(order[b.picked[0][i]], a.picked[0][i]);
        record_wipe(&a);
        record_wipe(&b);
        world_wipe(&w);
    }
}

/* [22] */
static void keys_and_values_of_unselected_blocks_change_no_bit(void **state)
{
    (void)state;
    enum { OLD = 24, K = 2 };
    test_random r = {22};
    for (int n = 0; n < 4; n++) {
        world w;
        record a, b;
        world_spec spec = {2,     4,    2,          16, 5, n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY,
                           n > 1, true, OLD * 6 + 2};
        world_init(&w, &r, &spec);
        size_t slots = 6, kv = (size_t)2 * 16; /* and two rows after the old blocks: few are chosen */
        record_init(&a, &w, K);
        record_init(&b, &w, K);
        session_spec session = {.top_k = K, .window_set = n % 2 == 0, .window = 0, .fetch = CAIRN_FETCH_READ};
        run_over_old_blocks(&w, NULL, OLD, &session, 2, &a);
        size_t changed = 0;
        for (uint32_t l = 0; l < 2; l++) {
            bool used[OLD] = {false};
            for (size_t i = OLD * slots * 4 * K; i < w.rows * 4 * K; i++)
                if (a.picked[l][i] >= 0) used[a.picked[l][i]] = true;
            for (size_t block = 0; block < OLD; block++) {
                if (used[block]) continue;
                test_random_fill(&r, w.k[l] + block * slots * kv, (slots - 1) * kv); /* the landmark stays */
                test_random_fill(&r, w.v[l] + block * slots * kv, (slots - 1) * kv);
                changed++;
            }
        }
        assert_true(changed >= OLD / 2);
        run_over_old_blocks(&w, NULL, OLD, &session, 2, &b);
        record_same(&a, &b, OLD * slots, w.rows);
        for (uint32_t l = 0; l < 2; l++)
            assert_memory_equal(a.picked[l] + OLD * slots * 4 * K, b.picked[l] + OLD * slots * 4 * K,
                                2 * 4 * K * sizeof(int64_t));
        record_wipe(&a);
        record_wipe(&b);
        world_wipe(&w);
    }
}

/* [27]: layer 0 of a model that retrieves there has one landmark key for all blocks */
static void equal_landmarks_are_chosen_newest_first_whatever_the_threads_and_chunks(void **state)
{
    (void)state;
    static const char *const kinds[] = {"scan", "exact", NULL};
    test_random r = {27};
    for (int n = 0; n < 2; n++) {
        bool clamped = n == 0;
        world w;
        record rec, first;
        world_spec spec = {1, 4, 2, 8, 4, clamped ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY, false, false, 52};
        world_init(&w, &r, &spec);
        w.shape.rope_dims = 2;
        w.shape.clamp_blocks = 2;
        w.shape.window_blocks = 1;
        for (size_t row = 4; row < w.rows; row += 5) { /* what rotates is zero: no position can break the tie */
            memcpy(w.k[0] + row * 16, w.k[0] + 4 * 16, 16 * sizeof(float));
            for (size_t g = 0; g < 2; g++) w.k[0][row * 16 + g * 8] = w.k[0][row * 16 + g * 8 + 1] = 0.0F;
        }
        record_init(&rec, &w, 3);
        record_init(&first, &w, 3);
        for (size_t run = 0; run < 6; run++) {
            session_spec session = {.top_k = 3, .threads = 1 + (uint32_t)run % 2, .index_kind = kinds[run / 2]};
            size_t chunk = clamped ? (run < 2 ? 1 : 0) : 5; /* stingy: what a chunk completes is local */
            world_run_memory(&w, &session, chunk, run, run == 0 ? &first : &rec);
            if (run > 0) record_same(&first, &rec, 0, w.rows);
            const record *now = run == 0 ? &first : &rec;
            for (size_t i = 0; i < w.rows * 4; i++) {
                int64_t block = (int64_t)(i / 4 / 5), newest = clamped ? block - 2 : block - 1;
                for (int64_t k = 0; k < 3; k++) {
                    int64_t have = newest + 1 < 3 ? newest + 1 : 3;
                    int64_t expected = clamped ? newest - k : newest - have + 1 + k; /* stingy: in order of age */
                    assert_int_equal(now->picked[0][i * 3 + (size_t)k], k < have ? expected : -1);
                }
            }
        }
        record_wipe(&rec);
        record_wipe(&first);
        world_wipe(&w);
    }
}

/* Long enough for the indexes to learn from the session's queries; then token by token, with hints. */
static void what_a_session_lets_its_indexes_learn_changes_no_bit(void **state)
{
    (void)state;
    enum { BLOCKS = 2400, B = 5, D = 32, TAIL = 40 };
    test_random r = {28};
    world w;
    record recs[2];
    world_spec spec = {1, 4, 2, D, B - 1, CAIRN_POSITION_CLAMPED, false, false, (size_t)BLOCKS * B};
    world_init(&w, &r, &spec);
    w.shape.rope_dims = 2;
    w.shape.clamp_blocks = 2;
    w.shape.window_blocks = 1;
    for (size_t i = 0; i < w.rows * 2 * D; i++) w.k[0][i] /= 1 + 3 * (float)(i % D); /* few directions */
    for (size_t run = 0; run < 2; run++) {
        record_init(&recs[run], &w, 3);
        session_spec session = {.top_k = 3, .threads = 2, .index_kind = run == 0 ? "scan" : "exact"};
        cairn_session *s = world_session(&w, NULL, &session);
        assert_ok(cairn_session_trace_enable(s, true));
        world_feed(&w, s, 0, w.rows - TAIL, 500, &r, &recs[run]);
        world_feed(&w, s, w.rows - TAIL, w.rows, 1, &r, &recs[run]);
        const size_t of_a_head = sizeof(attn_lore) + ATTN_QUERIES_KEPT * D * sizeof(float);
        assert_int_equal(s->step.lore_bytes, run == 0 ? 2 * of_a_head : 0);
        size_t learnt = 0; /* heads; of random ones not each finds that it pays */
        for (size_t h = 0; h < 2; h++) {
            const cairn_index *index = s->landmarks.parts[0].index[h];
            learnt += index->sketch.width != 0 && index->sketch.count == BLOCKS;
            assert_in_range(index->sketch.planned, run == 0 ? 2048 : 0, run == 0 ? BLOCKS : 0);
            if (run == 0) assert_in_range(s->step.lore[h].n_found, 3, ATTN_FOUND_KEPT);
        }
        assert_int_equal(learnt != 0, run == 0);
        cairn_session_end(s);
    }
    record_same(&recs[0], &recs[1], 0, w.rows);
    record_wipe(&recs[0]);
    record_wipe(&recs[1]);
    world_wipe(&w);
}

/* Queries that differ in nothing but their offset in the block: of chunks of so many blocks all offsets are kept, and
 * what rows of one of the last blocks chose. */
static void queries_are_kept_from_all_over_a_chunk(void **state)
{
    (void)state;
    enum { BLOCKS = 2200, B = 5, D = 32, CHUNK = 16 * B * 5 };
    test_random r = {30};
    world w;
    record rec;
    const world_spec spec = {1, 1, 1, D, B - 1, CAIRN_POSITION_CLAMPED, false, false, (size_t)BLOCKS * B};
    world_init(&w, &r, &spec);
    record_init(&rec, &w, 3);
    for (size_t row = 1; row < w.rows; row++) memcpy(w.q[0] + row * D, w.q[0], D * sizeof(float));
    const session_spec session = {.top_k = 3, .threads = 1, .index_kind = "scan"};
    cairn_session *s = world_session(&w, NULL, &session);
    world_feed(&w, s, 0, w.rows - w.rows % CHUNK, CHUNK, &r, &rec);
    const attn_lore *lore = &s->step.lore[0];
    size_t different = 0;
    assert_true(lore->kept >= ATTN_QUERIES_KEPT);
    for (size_t i = 0; i < ATTN_QUERIES_KEPT; i++) {
        size_t same = 0;
        while (memcmp(lore->queries + same * D, lore->queries + i * D, D * sizeof(float)) != 0) same++;
        different += same == i;
    }
    assert_int_equal(different, B);
    assert_in_range(lore->n_found, 3, ATTN_FOUND_KEPT);
    for (size_t i = 0; i < lore->n_found; i++) {
        assert_true(lore->found[i] < BLOCKS);
        assert_true(i == 0 || lore->found[i] > lore->found[i - 1]);
    }
    cairn_session_end(s);
    record_wipe(&rec);
    world_wipe(&w);
}

/* Learning takes as long as many tokens do. */
static void a_token_waits_while_one_layer_learns_and_no_more(void **state)
{
    (void)state;
    enum { LAYERS = 3, BLOCKS = 2400, B = 5, D = 32, TAIL = 140 };
    test_random r = {29};
    world w;
    record rec;
    const world_spec spec = {LAYERS, 2, 1, D, B - 1, CAIRN_POSITION_CLAMPED, false, false, (size_t)BLOCKS * B};
    world_init(&w, &r, &spec);
    record_init(&rec, &w, 3);
    const session_spec session = {.top_k = 3, .threads = 1, .index_kind = "scan"};
    cairn_session *s = world_session(&w, NULL, &session);
    s->step.policy.measure_mass = true; /* then nothing is learnt */
    world_feed(&w, s, 0, w.rows - TAIL, 500, &r, &rec);
    s->step.policy.measure_mass = false;
    size_t before = 0;
    for (size_t row = w.rows - TAIL; row < w.rows; row++) {
        size_t learnt = 0;
        world_feed(&w, s, row, row + 1, 1, &r, &rec);
        for (size_t l = 0; l < LAYERS; l++) learnt += s->landmarks.parts[0].index[l]->sketch.planned != 0;
        assert_in_range(learnt, before, before + 1);
        before = learnt;
    }
    assert_int_equal(before, LAYERS);
    cairn_session_end(s);
    record_wipe(&rec);
    world_wipe(&w);
}

/* Every hash is right, and no page is used twice. */
static void a_tile_in_anothers_place_is_an_error_in_every_context_that_has_it(void **state)
{
    (void)state;
    enum { OLD = 8 };
    test_random r = {33};
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        world w;
        const world_spec spec = {2, 2, 2, 16, 6, CAIRN_POSITION_CLAMPED, false, false, (size_t)(OLD + 1) * 7};
        const char *names[] = {"other", "book", "part"};
        char *dir = test_make_dir();
        uint64_t id;
        float out[2 * 16];
        world_init(&w, &r, &spec);
        cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
        for (int i = 0; i < 2; i++) {
            assert_ok(cairn_context_create(store, names[i], &id));
            world_write_blocks(&w, store, names[i], 0, i == 0 ? 3 : OLD);
        }
        assert_ok(cairn_context_fork(store, "book", "part", 5 * 6, &id));
        for (int swapped = 0; swapped < 2; swapped++) {
            if (swapped) swap_tiles(store, (cairn_tile_id){2, 1, 1, 1}, (cairn_tile_id){2, 4, 1, 1});
            for (int first = 1; first < 3; first++) { /* a context that goes on, and others beside it */
                for (size_t n = 1; n <= 2; n++) {
                    const char *used[] = {n == 1 ? names[first] : names[0], names[first]};
                    session_spec session = {.contexts = used, .n = n, .fetch = (cairn_fetch_mode)mode};
                    cairn_session *s = world_session(&w, store, &session);
                    cairn_status st = CAIRN_OK;
                    for (uint32_t l = 0; l < 2 && st == CAIRN_OK; l++) {
                        assert_ok(cairn_session_append(s, l, 1, w.k[l], w.v[l]));
                        st = cairn_session_attend(s, l, 1, w.q[l], out);
                    }
                    assert_int_equal(st, swapped ? CAIRN_CORRUPT : CAIRN_OK);
                    if (swapped)
                        assert_non_null(strstr(cairn_last_error(),
                                               "segment 2 block 1 layer 1 head 1: the tile begins at "
                                               "token 24, not 6; run verify"));
                    cairn_session_end(s);
                }
            }
        }
        world_wipe(&w);
        cairn_store_close(store);
        test_remove_dir(dir);
    }
}

/* k of n blocks, clamped: the choice by other scores, the output by the reference over that choice. */
static void clamped_retrieval_chooses_the_best_landmarks_and_equals_the_reference_over_them(void **state)
{
    (void)state;
    test_random r = {30};
    for (int n = 0; n < 8; n++) {
        world w;
        record rec, again;
        uint8_t *visible[WORLD_LAYERS] = {NULL};
        world_random(&w, &r, CAIRN_POSITION_CLAMPED, 12);
        for (uint32_t l = 0; l < w.shape.layers; l++) w.local[l] = l == 0 && n % 2 == 1;
        uint32_t k = 1 + test_random_below(&r, 4), newest = n % 4 == 3 ? 5 : 0;
        record_init(&rec, &w, k);
        record_init(&again, &w, k);
        session_spec spec = {.top_k = k, .newest = newest};
        world_run_memory(&w, &spec, 0, r.state, &rec);
        expected_visible(&w, k, -1, newest, visible);
        expect_picked(&rec, visible, -1, 0, w.rows);
        expect_reference(&rec, visible, 0, w.rows, f32_tolerance);
        spec.threads = 2;
        spec.index_kind = n % 2 == 0 ? "exact" : "scan";
        world_run_memory(&w, &spec, 1, r.state, &again);
        record_same(&rec, &again, 0, w.rows);
        spec.fetch = CAIRN_FETCH_READ;
        spec.ram_bytes = TIGHT;
        world_run_disk(&w, &spec, CAIRN_F32, 3, r.state, &again);
        record_same(&rec, &again, 0, w.rows);
        free_visible(visible);
        record_wipe(&rec);
        record_wipe(&again);
        world_wipe(&w);
    }
}

/* Clamped positions, a choice shared by the chunk's rows of one block (head) or by a row's heads (token): softmax over
 * the blocks to choose from, the maximum over what shares the choice, the k best. */
static void clamped_shared_scopes_choose_by_the_maximum_of_softmaxed_landmark_scores(void **state)
{
    (void)state;
    test_random r = {33};
    for (int n = 0; n < 8; n++) {
        world w;
        record rec;
        uint8_t *visible[WORLD_LAYERS] = {NULL};
        world_random(&w, &r, CAIRN_POSITION_CLAMPED, 10);
        cairn_scope scope = n % 2 == 0 ? CAIRN_SCOPE_HEAD : CAIRN_SCOPE_TOKEN;
        uint32_t k = 1 + test_random_below(&r, 3);
        size_t heads = w.shape.heads, slots = world_slots(&w), blocks = w.rows / slots;
        session_spec spec = {.top_k = k, .scope = scope, .threads = 1 + (uint32_t)n % 2};
        record_init(&rec, &w, k);
        expected_visible(&w, 0, -1, 0, visible); /* windows; the choices are added below */
        double *score = malloc(w.rows * heads * (blocks + 1) * sizeof *score);
        assert_non_null(score);
        cairn_session *s = world_session(&w, NULL, &spec);
        for (size_t at = 0; at < w.rows;) {
            size_t rows = 1 + test_random_below(&r, (uint32_t)(2 * slots));
            if (rows > w.rows - at) rows = w.rows - at;
            world_feed(&w, s, at, at + rows, rows, &r, &rec);
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                for (size_t i = at * heads; i < (at + rows) * heads; i++) {
                    size_t own = i / heads / slots, window = w.shape.window_blocks,
                           old = own > window ? own - window : 0;
                    double out[64], sum = 0.0;
                    twin_result all;
                    twin_clamped(&w, l, i / heads, (uint32_t)(i % heads), NULL, out, &all);
                    for (size_t b = 0; b < old; b++) sum += all.gates[b]; /* gates are softmaxed scores, unscaled */
                    for (size_t b = 0; b < old; b++) score[i * blocks + b] = all.gates[b] / sum;
                }
                for (size_t i = at * heads; i < (at + rows) * heads; i++) {
                    size_t own = i / heads / slots, window = w.shape.window_blocks,
                           old = own > window ? own - window : 0;
                    double best[64] = {0};
                    for (size_t j = at * heads; j < (at + rows) * heads; j++) {
                        bool shared = scope == CAIRN_SCOPE_HEAD ? j % heads == i % heads && j / heads / slots == own
                                                                : j / heads == i / heads;
                        for (size_t b = 0; b < old && shared; b++) best[b] = fmax(best[b], score[j * blocks + b]);
                    }
                    for (uint32_t x = 0; x < k && x < old; x++) {
                        size_t top = 0;
                        for (size_t b = 0; b < old; b++)
                            if (best[b] >= best[top]) top = b;
                        visible[l][i * blocks + top] = 1;
                        best[top] = -1.0;
                    }
                }
            }
            at += rows;
        }
        cairn_session_end(s);
        expect_picked(&rec, visible, -1, 0, w.rows);
        expect_reference(&rec, visible, 0, w.rows, f32_tolerance);
        free(score);
        free_visible(visible);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* k of n blocks, stingy, all scopes: slots and outputs of the paper's inference in plain loops. */
static void stingy_retrieval_equals_the_papers_inference_in_plain_loops_in_every_scope(void **state)
{
    (void)state;
    test_random r = {31};
    for (int n = 0; n < 9; n++) {
        world w;
        record rec;
        world_random(&w, &r, CAIRN_POSITION_STINGY, 10);
        uint32_t k = 1 + test_random_below(&r, 4), newest = n % 3 == 2 ? k + 1 + test_random_below(&r, 3) : 0;
        cairn_scope scope = (cairn_scope)(n % 3);
        size_t heads = w.shape.heads, width = heads * w.shape.head_dim;
        session_spec spec = {.top_k = k, .newest = newest, .scope = scope, .threads = 1 + (uint32_t)n % 2};
        record_init(&rec, &w, k);
        cairn_session *s = world_session(&w, NULL, &spec);
        for (size_t at = 0; at < w.rows;) {
            size_t rows = 1 + test_random_below(&r, (uint32_t)(2 * world_slots(&w)));
            if (rows > w.rows - at) rows = w.rows - at;
            world_feed(&w, s, at, at + rows, rows, &r, &rec);
            int64_t *picked = malloc(rows * heads * k * sizeof *picked);
            int32_t *slots = malloc(rows * heads * k * sizeof *slots);
            double *out = malloc(rows * width * sizeof *out);
            assert_true(picked != NULL && slots != NULL && out != NULL);
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                size_t first = at * heads * k;
                twin_stingy(&w, l, at, rows, scope, k, newest, false, picked, slots, out);
                for (size_t i = 0; i < rows * heads * k; i++) {
                    assert_int_equal(rec.picked[l][first + i], picked[i]);
                    if (picked[i] >= 0) assert_int_equal(rec.slots[l][first + i], slots[i]);
                }
                for (size_t i = 0; i < rows * width; i++)
                    assert_near(rec.out[l][at * width + i], out[i], f32_tolerance);
            }
            free(picked);
            free(slots);
            free(out);
            at += rows;
        }
        cairn_session_end(s);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* [21] */
static void one_row_makes_the_head_scope_and_one_head_the_token_scope_the_plain_one(void **state)
{
    (void)state;
    test_random r = {21};
    for (int n = 0; n < 4; n++) {
        cairn_position_scheme scheme = n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY;
        uint32_t heads = n < 2 ? 4 : 1;
        world w;
        record a, b;
        world_spec spec = {2, heads, 1, 8, 4, scheme, true, true, 60};
        world_init(&w, &r, &spec);
        record_init(&a, &w, 2);
        record_init(&b, &w, 2);
        size_t chunk = n < 2 ? 1 : 7;
        world_run_memory(&w, &(session_spec){.top_k = 2}, chunk, 0, &a);
        world_run_memory(&w, &(session_spec){.top_k = 2, .scope = n < 2 ? CAIRN_SCOPE_HEAD : CAIRN_SCOPE_TOKEN}, chunk,
                         0, &b);
        record_near(&a, &b, 0, w.rows, 1e-6);
        for (uint32_t l = 0; l < 2; l++)
            assert_memory_equal(a.picked[l], b.picked[l], w.rows * heads * 2 * sizeof(int64_t));
        record_wipe(&a);
        record_wipe(&b);
        world_wipe(&w);
    }
}

/* [19], [23] */
static void only_the_newest_c_blocks_count_however_long_the_stream_before_them(void **state)
{
    (void)state;
    enum { NEWEST = 5, SKIPPED = 4, BLOCKS = 13 };
    test_random r = {23};
    for (int n = 0; n < 4; n++) {
        world w;
        record longer, shorter;
        world_random(&w, &r, n % 2 == 0 ? CAIRN_POSITION_STINGY : CAIRN_POSITION_CLAMPED, BLOCKS);
        record_init(&longer, &w, 0);
        record_init(&shorter, &w, 0);
        size_t slots = world_slots(&w), start = SKIPPED * slots;
        session_spec spec = {.top_k = 2, .newest = NEWEST};
        world_run_memory(&w, &spec, slots, 0, &longer);
        cairn_session *s = world_session(&w, NULL, &spec); /* a cache that never saw the first blocks */
        world_feed(&w, s, start, w.rows, slots, NULL, &shorter);
        cairn_session_end(s);
        size_t from = (SKIPPED + NEWEST + w.shape.window_blocks) * slots;
        record_near(&longer, &shorter, from, w.rows, 1e-6);
        record_wipe(&longer);
        record_wipe(&shorter);
        world_wipe(&w);
    }
}

/* [20], [22]: a needle at any depth of a million tokens; positions stay within the window */
typedef struct watched { /* the last search of a session with one head */
    float q[4];
    size_t searches;
} watched;

static void watch_search(void *arg, uint32_t layer, uint32_t kv_head, const float *queries, size_t n)
{
    watched *w = arg;
    assert_int_equal(layer, 0);
    assert_int_equal(kv_head, 0);
    assert_int_equal(n, 1);
    memcpy(w->q, queries, sizeof w->q);
    w->searches++;
}

/* The stored landmark the watched query scores highest: what the search must have found. */
static size_t best_for(const watched *seen, const world *w, size_t blocks, size_t slots, size_t dim)
{
    size_t best = 0;
    double most = -INFINITY;
    for (size_t b = 0; b < blocks; b++) {
        const float *landmark = w->k[0] + (b * slots + slots - 1) * dim;
        double score = 0;
        for (size_t d = 0; d < dim; d++) score += (double)seen->q[d] * (double)landmark[d];
        if (score > most) most = score, best = b;
    }
    return best;
}

static void a_needle_in_a_million_tokens_is_found_at_any_depth_at_bounded_positions(void **state)
{
    (void)state;
    enum { C = 63, B = C + 1, OLD = 15873, K = 2, D = 4 };
    test_random r = {20};
    world w;
    world_spec spec = {1, 1, 1, D, C, CAIRN_POSITION_STINGY, false, false, (size_t)OLD * B + 4};
    world_init(&w, &r, &spec);
    w.shape.rope_dims = 2; /* dims 2 and 3 carry the needle's direction, wherever it is placed */
    w.shape.clamp_blocks = 3;
    w.shape.window_blocks = 1;
    static const size_t needles[4] = {0, OLD / 3, OLD - 700, OLD - 5};
    for (size_t i = 0; i < 4; i++) {
        float *query = w.q[0] + ((size_t)OLD * B + i) * D, *landmark = w.k[0] + (needles[i] * B + C) * D;
        query[0] = query[1] = 0.0F;
        query[2] = cosf(1.1F * (float)(i * i)); /* angles no two of which lie equally far from a third */
        query[3] = sinf(1.1F * (float)(i * i));
        landmark[0] = landmark[1] = 0.0F;
        landmark[2] = 40.0F * query[2];
        landmark[3] = 40.0F * query[3];
    }
    const char *name = "haystack";
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
    assert_ok(cairn_context_create(store, name, NULL));
    world_write_blocks(&w, store, name, 0, OLD);
    for (int scheme = 0; scheme < 2; scheme++) {
        w.shape.scheme = scheme == 0 ? CAIRN_POSITION_STINGY : CAIRN_POSITION_CLAMPED;
        session_spec session = {.contexts = &name, .n = 1, .top_k = K, .fetch = CAIRN_FETCH_READ};
        cairn_session *s = world_session(&w, store, &session);
        assert_int_equal(cairn_session_tokens(s), (uint64_t)OLD * C);
        assert_ok(cairn_session_trace_enable(s, true));
        watched seen = {.searches = 0};
        cairn_session_watch(s, watch_search, &seen);
        for (size_t i = 0; i < 4; i++) {
            size_t row = (size_t)OLD * B + i;
            float out[D];
            double expected[D];
            int64_t picked[K], twin_picked[K];
            int32_t slots[K], twin_slots[K];
            assert_ok(cairn_session_append(s, 0, 1, w.k[0] + row * D, w.v[0] + row * D));
            assert_ok(cairn_session_attend(s, 0, 1, w.q[0] + row * D, out));
            assert_ok(cairn_session_trace(s, 1, K, picked, slots));
            assert_true(picked[0] == (int64_t)needles[i] || picked[1] == (int64_t)needles[i]);
            if (scheme == 0) {
                twin_stingy(&w, 0, row, 1, CAIRN_SCOPE_TOKEN_HEAD, K, 0, false, twin_picked, twin_slots, expected);
                for (size_t k = 0; k < K; k++) {
                    assert_int_equal(picked[k], twin_picked[k]);
                    assert_int_equal(slots[k], twin_slots[k]);
                    assert_in_range(slots[k], 0, K);
                }
            } else {
                twin_block blocks[K + 1];
                for (size_t k = 0; k <= K; k++) {
                    size_t b = k == K ? OLD - 1 : (size_t)picked[k];
                    blocks[k] = (twin_block){w.k[0] + b * B * D, w.v[0] + b * B * D, C, OLD - b, true};
                }
                assert_true(picked[0] == (int64_t)needles[i]);
                assert_int_equal(seen.searches, i + 1);
                if (i < 3) assert_int_equal(best_for(&seen, &w, OLD, B, D), needles[i]); /* the last is not far */
                twin_row(&w.shape, 0, 0, w.q[0] + row * D, i, w.k[0] + (size_t)OLD * B * D,
                         w.v[0] + (size_t)OLD * B * D, blocks, K + 1, expected, NULL);
            }
            for (size_t d = 0; d < D; d++) assert_near(out[d], expected[d], f32_tolerance);
            assert_ok(cairn_session_advance(s, w.ids + row, 1));
        }
        cairn_step_stats stats;
        cairn_session_stats(s, &stats);
        assert_true(stats.tiles <= 4 * (K + 1)); /* of 15873 */
        cairn_session_end(s);
    }
    cairn_store_close(store);
    test_remove_dir(dir);
    world_wipe(&w);
}

/* ---- indexes over stored blocks ---- */

enum { INDEXED_HEADS = 4, INDEXED_K = 5, INDEXED_ROWS = 6 };

static void indexed_world(world *w, test_random *r, size_t old)
{
    world_spec spec = {2, INDEXED_HEADS, 2, 16, 3, CAIRN_POSITION_CLAMPED, true, true, old * 4 + INDEXED_ROWS};
    world_init(w, r, &spec);
    w->shape.clamp_blocks = 3;
    w->shape.window_blocks = 1;
}

/* How many of the best K blocks below `old`, by this file's own gates, the session named; all rows, heads, layers. */
static double recall(const world *w, const record *rec, size_t old)
{
    size_t found = 0, wanted = 0;
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t i = old * 4 * INDEXED_HEADS; i < w->rows * INDEXED_HEADS; i++) {
            double out[16];
            twin_result all;
            size_t candidates = i / INDEXED_HEADS / 4 - w->shape.window_blocks;
            twin_clamped(w, l, i / INDEXED_HEADS, (uint32_t)(i % INDEXED_HEADS), NULL, out, &all);
            for (size_t k = 0; k < INDEXED_K; k++) {
                size_t best = 0;
                for (size_t b = 1; b < candidates; b++)
                    if (all.gates[b] >= all.gates[best]) best = b;
                all.gates[best] = -1.0;
                wanted++;
                for (size_t x = 0; x < INDEXED_K; x++) found += rec->picked[l][i * INDEXED_K + x] == (int64_t)best;
            }
        }
    }
    return (double)found / (double)wanted;
}

/* And the output is attention over just what it named. */
static void expect_output_of_the_choice(const world *w, const record *rec, size_t old)
{
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t i = old * 4 * INDEXED_HEADS; i < w->rows * INDEXED_HEADS; i++) {
            uint8_t visible[512] = {0};
            double out[16];
            size_t own = i / INDEXED_HEADS / 4;
            for (size_t b = own - w->shape.window_blocks; b < own; b++) visible[b] = 1;
            for (size_t x = 0; x < INDEXED_K; x++) {
                assert_in_range(rec->picked[l][i * INDEXED_K + x], 0, own - w->shape.window_blocks - 1);
                visible[rec->picked[l][i * INDEXED_K + x]] = 1;
            }
            twin_clamped(w, l, i / INDEXED_HEADS, (uint32_t)(i % INDEXED_HEADS), visible, out, NULL);
            for (size_t d = 0; d < 16; d++) assert_near(rec->out[l][i * 16 + d], out[d], f32_tolerance);
        }
    }
}

/* The session takes the kind the context was indexed with. */
static double run_indexed(const world *w, cairn_store *store, const char *name, const char *kind, size_t old)
{
    record rec;
    test_random r = {5};
    record_init(&rec, w, INDEXED_K);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = INDEXED_K};
    cairn_session *s = world_session(w, store, &spec);
    assert_int_equal(cairn_session_slot(s), old * 4);
    world_feed(w, s, old * 4, w->rows, 0, &r, &rec);
    cairn_session_info info;
    cairn_session_info_get(s, &info);
    assert_string_equal(info.warning, "");
    if (strncmp(info.index, kind, strlen(kind)) != 0) fail_msg("indexed as %s, searched as %s", kind, info.index);
    cairn_session_end(s);
    expect_output_of_the_choice(w, &rec, old);
    double share = recall(w, &rec, old);
    print_message("  %-12s recall %.3f (%s)\n", name, share, info.index);
    record_wipe(&rec);
    return share;
}

static void indexed_blocks_the_unindexed_end_and_a_forks_part_of_a_segment_are_all_searched(void **state)
{
    (void)state;
    enum { INDEXED = 330, OLD = 420, FORKED = 200 };
    static const struct {
        const char *kind;
        double least;
    } kinds[] = {{"scan", 1.0}, {"exact", 1.0}, {"flat", 1.0}, {"sq8", 0.9}, {"ivf:nprobe=64", 0.95}, {"hnsw", 0.9}};
    test_random r = {50};
    world w;
    indexed_world(&w, &r, OLD);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *dir = test_make_dir();
        cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
        assert_ok(cairn_context_create(store, "text", NULL));
        world_write_blocks(&w, store, "text", 0, INDEXED);
        assert_ok(cairn_context_reindex(store, &w.shape, "text", kinds[i].kind, NULL, NULL));
        world_write_blocks(&w, store, "text", INDEXED, OLD - INDEXED); /* after the index was made */
        print_message("  %s\n", kinds[i].kind);
        assert_true(run_indexed(&w, store, "text", kinds[i].kind, OLD) >= kinds[i].least);
        /* a fork inside the indexed part, with blocks of its own */
        assert_ok(cairn_context_fork(store, "text", "fork", (uint64_t)FORKED * 3, NULL));
        world_write_blocks(&w, store, "fork", FORKED, 20);
        world part;
        test_random again = {50};
        indexed_world(&part, &again, OLD); /* the same rows, ended earlier */
        memcpy(part.ids, w.ids, w.rows * sizeof *w.ids);
        part.rows = (FORKED + 20) * 4 + INDEXED_ROWS;
        assert_true(run_indexed(&part, store, "fork", kinds[i].kind, FORKED + 20) >= kinds[i].least);
        world_wipe(&part);
        cairn_store_close(store);
        test_remove_dir(dir);
    }
    world_wipe(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(permuting_old_blocks_changes_nothing),
        cmocka_unit_test(keys_and_values_of_unselected_blocks_change_no_bit),
        cmocka_unit_test(equal_landmarks_are_chosen_newest_first_whatever_the_threads_and_chunks),
        cmocka_unit_test(what_a_session_lets_its_indexes_learn_changes_no_bit),
        cmocka_unit_test(queries_are_kept_from_all_over_a_chunk),
        cmocka_unit_test(a_token_waits_while_one_layer_learns_and_no_more),
        cmocka_unit_test(a_tile_in_anothers_place_is_an_error_in_every_context_that_has_it),
        cmocka_unit_test(clamped_retrieval_chooses_the_best_landmarks_and_equals_the_reference_over_them),
        cmocka_unit_test(stingy_retrieval_equals_the_papers_inference_in_plain_loops_in_every_scope),
        cmocka_unit_test(clamped_shared_scopes_choose_by_the_maximum_of_softmaxed_landmark_scores),
        cmocka_unit_test(one_row_makes_the_head_scope_and_one_head_the_token_scope_the_plain_one),
        cmocka_unit_test(only_the_newest_c_blocks_count_however_long_the_stream_before_them),
        cmocka_unit_test(a_needle_in_a_million_tokens_is_found_at_any_depth_at_bounded_positions),
        cmocka_unit_test(indexed_blocks_the_unindexed_end_and_a_forks_part_of_a_segment_are_all_searched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
