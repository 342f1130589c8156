/* test_semantics.c - what a session over stored contexts sees: reopen, fork, attach, fresh, early-closed tails,
 * refilled layers, windows, keeping, spilling. Random rows stand for a model; the witness is whole-stream attention in
 * double loops over the same visible set, or a session nobody disturbed, bit for bit. All with GQA, most with a bias.
 *
 * labels: threads
 */
#include "twin.h"

#include <stdio.h>

enum { K = 2 };

typedef struct fixture {
    test_random r;
    char *dir;
    cairn_store *store;
} fixture;

static int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->r.state = 2024;
    fx->dir = test_make_dir();
    *state = fx;
    return 0;
}
static int teardown(void **state)
{
    fixture *fx = *state;
    cairn_store_close(fx->store);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

static void new_store(fixture *fx, const world *w, const char *context)
{
    cairn_store_close(fx->store);
    static int number;
    char name[32];
    snprintf(name, sizeof name, "store-%d", number++);
    fx->store = world_store(w, fx->dir, name, CAIRN_F32);
    if (context != NULL) assert_ok(cairn_context_create(fx->store, context, NULL));
}

/* Hands refill and tail to a session that continues a context of this world; returns the row it then stands at. */
static size_t rerun(const world *w, cairn_session *s, test_random *r)
{
    size_t slots = world_slots(w), kv = (size_t)w->shape.kv_heads * w->shape.head_dim;
    const cairn_token *tokens;
    size_t n, at = (size_t)cairn_session_slot(s);
    assert_ok(cairn_session_refill_tokens(s, &tokens, &n));
    assert_int_equal(n % w->shape.block_tokens, 0);
    size_t first = at - n / w->shape.block_tokens * slots;
    for (size_t i = 0; i < n; i++) /* the last blocks before the tail */
        assert_int_equal(tokens[i], w->ids[first + i / w->shape.block_tokens * slots + i % w->shape.block_tokens]);
    for (uint32_t l = 0; l < w->first_layer && n > 0; l++)
        assert_ok(cairn_session_refill(s, l, w->k[l] + first * kv, w->v[l] + first * kv));
    assert_ok(cairn_session_tail(s, &tokens, &n));
    assert_true(n < w->shape.block_tokens);
    assert_memory_equal(tokens, w->ids + at, n * sizeof *tokens);
    if (n > 0) world_feed(w, s, at, at + n, test_random_below(r, 2) == 0 ? 0 : n, r, NULL);
    return at + n;
}

/* Rows [from, to) into a context, committed; the session begins, reruns and ends here. */
static void extend(fixture *fx, const world *w, const char *context, size_t from, size_t to, record *rec)
{
    session_spec spec = {.contexts = &context, .n = 1, .top_k = K, .write = true};
    cairn_session *s = world_session(w, fx->store, &spec);
    assert_int_equal(rerun(w, s, &fx->r), from);
    world_feed(w, s, from, to, 0, &fx->r, rec);
    assert_ok(cairn_session_commit(s, NULL));
    cairn_session_end(s);
}

static void undisturbed(const world *w, record *rec)
{
    cairn_session *s = world_session(w, NULL, &(session_spec){.top_k = K});
    world_feed(w, s, 0, w->rows, w->rows, NULL, rec);
    cairn_session_end(s);
}

static void expect_chosen_reference(const record *rec, size_t from, size_t to, uint32_t top_k)
{
    uint8_t *visible[WORLD_LAYERS] = {NULL};
    expected_visible(rec->w, top_k, -1, 0, visible);
    expect_reference(rec, visible, from, to, 1e-4);
    free_visible(visible);
}

/* The row that holds plain token t of the stream. */
static size_t row_of(const world *w, size_t token)
{
    return token / w->shape.block_tokens * world_slots(w) + token % w->shape.block_tokens;
}

static void a_reopened_context_goes_on_bit_for_bit_as_if_never_closed(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 6; n++) {
        world w;
        record whole, rec;
        world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 9);
        w.local[0] = n % 2 == 1;
        record_init(&whole, &w, 0);
        record_init(&rec, &w, 0);
        undisturbed(&w, &whole);
        expect_chosen_reference(&whole, 0, w.rows, K);
        new_store(fx, &w, "text");
        for (size_t at = 0; at < w.rows;) {
            size_t to = world_commit_point(&w, at + 1 + test_random_below(&fx->r, (uint32_t)(w.rows - at)));
            extend(fx, &w, "text", at, to, &rec);
            at = to;
        }
        record_same(&whole, &rec, 0, w.rows);
        record_wipe(&whole);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* `b` becomes `a` up to row `rows`, its own from there. */
static void share_prefix(const world *a, world *b, size_t rows)
{
    size_t q = (size_t)a->shape.heads * a->shape.head_dim, kv = (size_t)a->shape.kv_heads * a->shape.head_dim;
    for (uint32_t l = 0; l < a->shape.layers; l++) {
        memcpy(b->q[l], a->q[l], rows * q * sizeof(float));
        memcpy(b->k[l], a->k[l], rows * kv * sizeof(float));
        memcpy(b->v[l], a->v[l], rows * kv * sizeof(float));
    }
    memcpy(b->ids, a->ids, rows * sizeof *b->ids);
}

static void a_fork_shares_the_past_and_parts_there_and_neither_sees_the_others_future(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 6; n++) {
        world_spec spec = {2, 4, 2, 8, 5, CAIRN_POSITION_CLAMPED, n % 2 == 0, true, 70};
        world parent, child, grand;
        record rec_parent, rec_child, rec_grand, whole;
        world_init(&parent, &fx->r, &spec);
        world_init(&child, &fx->r, &spec);
        world_init(&grand, &fx->r, &spec);
        memcpy(child.bias, parent.bias, sizeof parent.bias);
        memcpy(grand.bias, parent.bias, sizeof parent.bias);
        /* fork points: a block's edge, inside a block, right at the parent's end */
        size_t end = world_commit_point(&parent, 40 + (size_t)n);
        size_t tokens = n == 1 ? 25 : world_tokens(&parent, end) - (n % 3 == 0 ? 0 : 7 * (size_t)n / 2);
        size_t parting = row_of(&parent, tokens);
        share_prefix(&parent, &child, parting);
        record_init(&rec_parent, &parent, 0);
        record_init(&rec_child, &child, 0);
        record_init(&rec_grand, &grand, 0);
        record_init(&whole, &parent, 0);

        new_store(fx, &parent, "parent");
        extend(fx, &parent, "parent", 0, end, &rec_parent);
        assert_ok(cairn_context_fork(fx->store, "parent", "child", n % 3 == 0 ? UINT64_MAX : tokens, NULL));
        if (n % 3 == 0) parting = end, share_prefix(&parent, &child, parting); /* tokens is the end */
        size_t child_end = world_commit_point(&child, parting + 11), parent_end = world_commit_point(&parent, end + 8);
        extend(fx, &child, "child", parting, child_end, &rec_child);
        extend(fx, &parent, "parent", end, parent_end, &rec_parent);
        share_prefix(&child, &grand, child_end);
        assert_ok(cairn_context_fork(fx->store, "child", "grand", UINT64_MAX, NULL));
        extend(fx, &grand, "grand", child_end, grand.rows, &rec_grand);
        extend(fx, &child, "child", child_end, child.rows, &rec_child);
        extend(fx, &parent, "parent", parent_end, parent.rows, &rec_parent);

        undisturbed(&parent, &whole);
        record_same(&whole, &rec_parent, 0, parent.rows);
        expect_chosen_reference(&rec_parent, 0, parent.rows, K);
        whole.w = &child;
        undisturbed(&child, &whole);
        record_same(&whole, &rec_child, parting, child.rows);
        expect_chosen_reference(&rec_child, parting, child.rows, K);
        whole.w = &grand;
        undisturbed(&grand, &whole);
        record_same(&whole, &rec_grand, child_end, grand.rows);

        record_wipe(&whole);
        record_wipe(&rec_parent);
        record_wipe(&rec_child);
        record_wipe(&rec_grand);
        world_wipe(&parent);
        world_wipe(&child);
        world_wipe(&grand);
    }
}

/* A world whose first blocks are attached (in the order of the names), then blocks that do not exist, so many that all
 * attached ones have the age an attached block has, then the session's own stream. */
typedef struct attached {
    world w;
    size_t old;   /* attached blocks */
    size_t start; /* row of the own stream's slot 0 */
} attached;

static void attached_init(attached *a, test_random *r, size_t old, size_t own_rows)
{
    world_random(&a->w, r, CAIRN_POSITION_CLAMPED, old + 8 + own_rows / 4 + 1);
    size_t slots = world_slots(&a->w);
    a->w.local[0] = test_random_below(r, 2) == 0;
    a->w.shape.local_window_blocks = 1 + test_random_below(r, 3);
    size_t gap = 4; /* clamp_blocks is 1..4, the windows 0..3 */
    a->old = old;
    a->start = (old + gap) * slots;
    assert_true(a->start + own_rows <= a->w.rows);
    a->w.rows = a->start + own_rows;
    a->w.never = calloc(a->w.rows / slots + 1, 1);
    assert_non_null(a->w.never);
    memset(a->w.never + old, 1, gap);
}

static void run_attached(fixture *fx, const attached *a, const session_spec *spec, size_t chunk, record *rec)
{
    cairn_session *s = world_session(&a->w, fx->store, spec);
    cairn_session_info info;
    cairn_session_info_get(s, &info);
    assert_int_equal(info.old_blocks, a->old);
    assert_int_equal(cairn_session_slot(s), 0);
    const cairn_token *tokens;
    size_t n;
    assert_ok(cairn_session_tail(s, &tokens, &n));
    assert_int_equal(n, 0);
    world_feed(&a->w, s, a->start, a->w.rows, chunk, &fx->r, rec);
    cairn_session_end(s);
}

static void several_contexts_are_old_blocks_of_a_stream_of_the_sessions_own(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 6; n++) {
        attached a;
        record rec, again;
        attached_init(&a, &fx->r, 7, 60);
        record_init(&rec, &a.w, 0);
        record_init(&again, &a.w, 0);
        new_store(fx, &a.w, "one");
        assert_ok(cairn_context_create(fx->store, "two", NULL));
        assert_ok(cairn_context_create(fx->store, "none", NULL)); /* empty */
        world_write_blocks(&a.w, fx->store, "one", 0, 3);
        world_write_blocks(&a.w, fx->store, "two", 3, 2);
        assert_ok(cairn_context_fork(fx->store, "two", "fork", world_tokens(&a.w, 1 * world_slots(&a.w)), NULL));
        /* the fork keeps the first block of "two" and has one of its own: world block 5 must look like block 3 */
        size_t slots = world_slots(&a.w), kv = (size_t)a.w.shape.kv_heads * a.w.shape.head_dim;
        for (uint32_t l = 0; l < a.w.shape.layers; l++) {
            memcpy(a.w.k[l] + 5 * slots * kv, a.w.k[l] + 3 * slots * kv, slots * kv * sizeof(float));
            memcpy(a.w.v[l] + 5 * slots * kv, a.w.v[l] + 3 * slots * kv, slots * kv * sizeof(float));
        }
        world_write_blocks(&a.w, fx->store, "fork", 6, 1);
        const char *const names[] = {"one", "two", "none", "fork"};
        session_spec spec = {.contexts = names, .n = 4, .top_k = n == 0 ? 0 : (uint32_t)n, .threads = 1};
        run_attached(fx, &a, &spec, 0, &rec);
        expect_chosen_reference(&rec, a.start, a.w.rows, n == 0 ? CAIRN_TOP_K_ALL : (uint32_t)n);
        spec.threads = 2;
        spec.fetch = CAIRN_FETCH_READ;
        run_attached(fx, &a, &spec, n % 2 == 0 ? 1 : 0, &again);
        record_same(&rec, &again, a.start, a.w.rows);
        record_wipe(&rec);
        record_wipe(&again);
        world_wipe(&a.w);
    }
}

static void a_fresh_session_over_one_context_sees_it_as_old_and_leaves_it_alone(void **state)
{
    fixture *fx = *state;
    attached a;
    record rec;
    const char *name = "text";
    attached_init(&a, &fx->r, 6, 40);
    record_init(&rec, &a.w, 0);
    new_store(fx, &a.w, name);
    world_write_blocks(&a.w, fx->store, name, 0, 6);
    run_attached(fx, &a, &(session_spec){.contexts = &name, .n = 1, .fresh = true, .top_k = 3}, 0, &rec);
    expect_chosen_reference(&rec, a.start, a.w.rows, 3);
    cairn_snapshot *snap;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_int_equal(info.blocks, 6);
    assert_int_equal(info.tail_tokens, 0);
    cairn_snapshot_end(snap);
    record_wipe(&rec);
    world_wipe(&a.w);
}

/* Stingy positions know slots, not ages: attached blocks are the cache the first chunk finds. */
static void attached_blocks_fill_the_papers_slots_like_cached_ones(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 4; n++) {
        world w;
        record rec;
        world_random(&w, &fx->r, CAIRN_POSITION_STINGY, 9);
        size_t old = 1 + 2 * (size_t)n, slots = world_slots(&w), heads = w.shape.heads; /* fewer than k, and more */
        record_init(&rec, &w, 3);
        new_store(fx, &w, "one");
        assert_ok(cairn_context_create(fx->store, "two", NULL));
        world_write_blocks(&w, fx->store, "one", 0, old / 2);
        world_write_blocks(&w, fx->store, "two", old / 2, old - old / 2);
        const char *const names[] = {"one", "two"};
        cairn_session *s = world_session(&w, fx->store, &(session_spec){.contexts = names, .n = 2, .top_k = 3});
        for (size_t at = old * slots; at < w.rows;) {
            size_t rows = 1 + test_random_below(&fx->r, (uint32_t)(2 * slots));
            if (rows > w.rows - at) rows = w.rows - at;
            world_feed(&w, s, at, at + rows, rows, &fx->r, &rec);
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                int64_t *picked = malloc(rows * heads * 3 * sizeof *picked);
                int32_t *placed = malloc(rows * heads * 3 * sizeof *placed);
                double *out = malloc(rows * world_width(&w) * sizeof *out);
                assert_true(picked != NULL && placed != NULL && out != NULL);
                twin_stingy(&w, l, at, rows, CAIRN_SCOPE_TOKEN_HEAD, 3, 0, false, picked, placed, out);
                for (size_t i = 0; i < rows * heads * 3; i++)
                    if (picked[i] >= 0) assert_int_equal(rec.slots[l][at * heads * 3 + i], placed[i]);
                for (size_t i = 0; i < rows * world_width(&w); i++)
                    assert_near(rec.out[l][at * world_width(&w) + i], out[i], 1e-4);
                free(picked);
                free(placed);
                free(out);
            }
            at += rows;
        }
        cairn_session_end(s);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

/* A context shorter than a block: its tail, closed early by a landmark at offset C, is one more old block. */
static void an_early_closed_tail_is_one_more_old_block_of_fewer_tokens(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 5; n++) {
        attached a;
        attached_init(&a, &fx->r, 4, 30);
        world *w = &a.w;
        size_t slots = world_slots(w), c = slots - 1, kv = (size_t)w->shape.kv_heads * w->shape.head_dim;
        size_t width = (size_t)w->shape.heads * w->shape.head_dim;
        uint32_t tokens[2] = {1 + (uint32_t)n % (uint32_t)(c - 1), (uint32_t)c - 1};
        new_store(fx, w, "one");
        assert_ok(cairn_context_create(fx->store, "two", NULL));
        world_write_blocks(w, fx->store, "one", 0, 2); /* block 2 is its tail; context two is block 3, all tail */
        const char *const names[] = {"one", "two"};
        session_spec spec = {.contexts = names, .n = 2, .top_k = n == 0 ? 0 : 1};
        cairn_session *s = world_session(w, fx->store, &spec);
        for (size_t i = 0; i < 2; i++) {
            cairn_session *donor = world_session(w, NULL, &(session_spec){.top_k = 1});
            size_t row = (2 + i) * slots;
            world_feed(w, donor, row, row + tokens[i], 0, &fx->r, NULL);
            assert_ok(cairn_session_close_block(donor));
            assert_true(cairn_session_landmark_due(donor, 0));
            float out[256];
            assert_true(width <= 256);
            for (uint32_t l = 0; l < w->shape.layers; l++) {
                assert_ok(cairn_session_append(donor, l, 1, w->k[l] + (row + c) * kv, w->v[l] + (row + c) * kv));
                assert_ok(cairn_session_attend(donor, l, 1, w->q[l] + (row + c) * width, out));
                for (uint32_t h = 0; h < w->shape.heads; h++) { /* the landmark's own row, at offset C */
                    double expected[64];
                    twin_own(w, l, h, row, tokens[i], row + c, expected);
                    for (size_t d = 0; d < w->shape.head_dim; d++)
                        assert_near(out[h * w->shape.head_dim + d], expected[d], 1e-4);
                }
            }
            assert_ok(cairn_session_advance(donor, w->ids + row + c, 1));
            /* nothing may follow the landmark, nothing can be committed */
            assert_int_equal(cairn_session_append(donor, 0, 1, w->k[0], w->v[0]), CAIRN_INVALID);
            assert_ok(cairn_session_adopt(s, donor, i));
            cairn_session_end(donor);
        }
        cairn_session_info info;
        cairn_session_info_get(s, &info);
        assert_int_equal(info.old_blocks, 4);
        record rec;
        record_init(&rec, w, 0);
        world_feed(w, s, a.start, w->rows, 0, &fx->r, &rec);
        cairn_session_end(s);

        uint8_t *visible[WORLD_LAYERS] = {NULL};
        expected_visible(w, n == 0 ? CAIRN_TOP_K_ALL : 1, -1, 0, visible);
        size_t blocks = w->rows / slots;
        for (uint32_t l = 0; l < w->shape.layers; l++) {
            for (size_t i = a.start * w->shape.heads; i < w->rows * w->shape.heads; i++) {
                size_t row = i / w->shape.heads, own = row / slots, used = 0;
                twin_block seen[64];
                double expected[64];
                for (size_t b = 0; b < own; b++) {
                    if (visible[l][i * blocks + b] == 0) continue;
                    assert_true(used < 64);
                    seen[used++] = (twin_block){w->k[l] + b * slots * kv, w->v[l] + b * slots * kv,
                                                b == 2 || b == 3 ? tokens[b - 2] : (uint32_t)c, own - b, true};
                }
                twin_row(&w->shape, l, (uint32_t)(i % w->shape.heads), w->q[l] + row * width, row % slots,
                         w->k[l] + own * slots * kv, w->v[l] + own * slots * kv, seen, used, expected, NULL);
                for (size_t d = 0; d < w->shape.head_dim; d++)
                    assert_near(rec.out[l][i * w->shape.head_dim + d], expected[d], 1e-4);
            }
        }
        free_visible(visible);
        record_wipe(&rec);
        world_wipe(w);
    }
}

static void an_early_closed_session_cannot_be_committed_and_adoption_comes_before_the_first_row(void **state)
{
    fixture *fx = *state;
    world w;
    const char *name = "text";
    world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 3);
    size_t slots = world_slots(&w);
    new_store(fx, &w, name);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = true};
    cairn_session *donor = world_session(&w, fx->store, &spec);
    world_feed(&w, donor, 0, 2, 0, &fx->r, NULL);
    assert_ok(cairn_session_close_block(donor));
    for (uint32_t l = 0; l < w.shape.layers; l++) assert_ok(cairn_session_append(donor, l, 1, w.k[l], w.v[l]));
    assert_ok(cairn_session_advance(donor, w.ids, 1));
    assert_int_equal(cairn_session_commit(donor, NULL), CAIRN_INVALID);
    cairn_session *s = world_session(&w, NULL, &(session_spec){.top_k = K});
    world_feed(&w, s, 0, slots + 1, 0, &fx->r, NULL);
    assert_int_equal(cairn_session_adopt(s, donor, 0), CAIRN_INVALID);
    cairn_session_end(s);
    cairn_session_end(donor);
    world_wipe(&w);
}

static void layers_that_are_not_stored_are_refilled_and_go_on_bit_for_bit(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 6; n++) {
        world w;
        record whole, rec;
        world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 8);
        if (w.shape.layers == 1) {
            world_wipe(&w);
            continue;
        }
        w.first_layer = 1;
        w.local[0] = 1;
        w.shape.local_window_blocks = (uint32_t)n % 4;
        record_init(&whole, &w, 0);
        record_init(&rec, &w, 0);
        undisturbed(&w, &whole);
        expect_chosen_reference(&whole, 0, w.rows, K);
        new_store(fx, &w, "text");
        for (size_t at = 0; at < w.rows;) {
            size_t to = world_commit_point(&w, at + 1 + test_random_below(&fx->r, (uint32_t)(w.rows - at)));
            extend(fx, &w, "text", at, to, &rec);
            at = to;
        }
        record_same(&whole, &rec, 0, w.rows);
        /* a fork in the middle of a block needs the blocks before its own tail */
        size_t tokens = world_tokens(&w, w.rows / 2);
        assert_ok(cairn_context_fork(fx->store, "text", "fork", tokens, NULL));
        extend(fx, &w, "fork", row_of(&w, tokens), w.rows, &rec);
        record_same(&whole, &rec, row_of(&w, tokens), w.rows);
        record_wipe(&whole);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

static void layers_that_are_not_stored_must_be_refilled_first_and_once(void **state)
{
    fixture *fx = *state;
    world w;
    const char *name = "text";
    world_spec shape = {2, 4, 2, 8, 5, CAIRN_POSITION_CLAMPED, false, true, 40};
    world_init(&w, &fx->r, &shape);
    w.first_layer = 1;
    w.local[0] = 1;
    new_store(fx, &w, name);
    extend(fx, &w, name, 0, 20, NULL);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K};
    cairn_session *s = world_session(&w, fx->store, &spec);
    const cairn_token *tokens;
    size_t n, kv = (size_t)2 * 8, first = 12; /* local_window_blocks is 1: block 2, rows 12..17 */
    assert_ok(cairn_session_refill_tokens(s, &tokens, &n));
    assert_int_equal(n, 5);
    assert_int_equal(cairn_session_append(s, 0, 1, w.k[0] + 18 * kv, w.v[0] + 18 * kv), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "refill"));
    cairn_session_end(s);
    s = world_session(&w, fx->store, &spec);
    assert_ok(cairn_session_refill(s, 0, w.k[0] + first * kv, w.v[0] + first * kv));
    assert_int_equal(cairn_session_refill(s, 0, w.k[0] + first * kv, w.v[0] + first * kv), CAIRN_INVALID);
    assert_int_equal(cairn_session_refill(s, 1, w.k[1] + first * kv, w.v[1] + first * kv), CAIRN_INVALID);
    world_feed(&w, s, 18, 20, 0, &fx->r, NULL);
    cairn_session_end(s);
    w.local[0] = 0; /* the model retrieves from a layer the store does not have */
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, &w.shape);
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &s), CAIRN_MISMATCH);
    world_wipe(&w);
}

static uint64_t tokens_stored(fixture *fx, const char *name);

static void a_tail_is_neither_forgotten_nor_replaced(void **state)
{
    fixture *fx = *state;
    world w;
    const char *name = "text";
    world_spec shape = {2, 4, 2, 8, 5, CAIRN_POSITION_CLAMPED, false, true, 40};
    world_init(&w, &fx->r, &shape);
    new_store(fx, &w, name);
    extend(fx, &w, name, 0, 22, NULL); /* 3 blocks and 4 tokens */
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = true};
    cairn_session *s = world_session(&w, fx->store, &spec);
    assert_ok(cairn_session_commit(s, &(cairn_input){.bytes = 9, .complete = true})); /* nothing was run */
    assert_int_equal(tokens_stored(fx, name), 19);
    world_feed(&w, s, 18, 20, 0, &fx->r, NULL);
    assert_int_equal(cairn_session_commit(s, NULL), CAIRN_INVALID); /* half of it was */
    assert_non_null(strstr(cairn_last_error(), "tail"));
    world_feed(&w, s, 20, 31, 0, &fx->r, NULL);
    assert_ok(cairn_session_commit(s, NULL));
    world_feed(&w, s, 31, 33, 0, &fx->r, NULL); /* and on after a commit, past the old tail's length in a block */
    assert_ok(cairn_session_commit(s, NULL));
    cairn_session_end(s);
    assert_int_equal(tokens_stored(fx, name), world_tokens(&w, 33));
    s = world_session(&w, fx->store, &spec);
    w.ids[31]++; /* another token than the tail's second */
    for (uint32_t l = 0; l < 2; l++) {
        float out[3 * 32];
        assert_ok(cairn_session_append(s, l, 3, w.k[l] + 30 * 16, w.v[l] + 30 * 16));
        assert_ok(cairn_session_attend(s, l, 3, w.q[l] + 30 * 32, out));
    }
    assert_int_equal(cairn_session_advance(s, w.ids + 30, 3), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "slot 31"));
    assert_int_equal(cairn_session_commit(s, NULL), CAIRN_INVALID);
    cairn_session_end(s);
    assert_int_equal(tokens_stored(fx, name), world_tokens(&w, 33));
    world_wipe(&w);
}

/* Ingesting needs no outcome of the last layer: its K and V are all that is kept. */
static void leaving_out_the_last_layers_attend_changes_nothing_later(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 3; n++) {
        world w;
        record whole, rec;
        world_random(&w, &fx->r, n == 2 ? CAIRN_POSITION_STINGY : CAIRN_POSITION_CLAMPED, 8);
        w.local[w.shape.layers - 1] = n == 1;
        record_init(&whole, &w, 0);
        record_init(&rec, &w, 0);
        undisturbed(&w, &whole);
        size_t half = w.rows / 2, kv = (size_t)w.shape.kv_heads * w.shape.head_dim, width = world_width(&w);
        cairn_session *s = world_session(&w, NULL, &(session_spec){.top_k = K});
        for (size_t at = 0, rows; at < half; at += rows) {
            rows = n == 2 ? half : 1 + test_random_below(&fx->r, (uint32_t)(half - at));
            for (uint32_t l = 0; l < w.shape.layers; l++) {
                assert_ok(cairn_session_append(s, l, rows, w.k[l] + at * kv, w.v[l] + at * kv));
                if (l + 1 == w.shape.layers) continue;
                assert_ok(cairn_session_attend(s, l, rows, w.q[l] + at * width, rec.out[l] + at * width));
            }
            assert_ok(cairn_session_advance(s, w.ids + at, rows));
        }
        if (n == 2) { /* stingy: what a chunk sees depends on where it begins, so both are cut here */
            cairn_session *other = world_session(&w, NULL, &(session_spec){.top_k = K});
            world_feed(&w, other, 0, half, half, NULL, &whole);
            world_feed(&w, other, half, w.rows, w.rows - half, NULL, &whole);
            cairn_session_end(other);
        }
        world_feed(&w, s, half, w.rows, w.rows - half, NULL, &rec);
        cairn_session_end(s);
        record_same(&whole, &rec, half, w.rows);
        record_wipe(&whole);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

static void windows_and_local_layers_see_what_the_policy_says_and_no_more(void **state)
{
    fixture *fx = *state;
    for (int n = 0; n < 10; n++) {
        world w;
        record rec;
        uint8_t *visible[WORLD_LAYERS] = {NULL};
        world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 8);
        for (uint32_t l = 0; l < w.shape.layers; l++) w.local[l] = test_random_below(&fx->r, 2) == 0;
        w.shape.local_window_blocks = test_random_below(&fx->r, 4);
        int32_t window = n == 9 ? 50 : (int32_t)test_random_below(&fx->r, 5) - 1;
        uint32_t top_k = test_random_below(&fx->r, 3);
        record_init(&rec, &w, 3);
        session_spec spec = {.top_k = top_k, .no_retrieval = top_k == 0, .window_set = true, .window = window};
        cairn_session *s = world_session(&w, NULL, &spec);
        world_feed(&w, s, 0, w.rows, 0, &fx->r, &rec);
        cairn_session_end(s);
        expected_visible(&w, top_k, window, 0, visible);
        expect_reference(&rec, visible, 0, w.rows, 1e-4);
        expect_picked(&rec, visible, window, 0, w.rows);
        free_visible(visible);
        record_wipe(&rec);
        world_wipe(&w);
    }
}

static uint64_t tokens_stored(fixture *fx, const char *name)
{
    cairn_snapshot *snap;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    cairn_snapshot_end(snap);
    return info.tokens;
}

static void what_is_asked_goes_on_from_the_tail_and_is_gone_unless_committed(void **state)
{
    fixture *fx = *state;
    world w;
    record whole, rec;
    const char *name = "text";
    world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 9);
    record_init(&whole, &w, 0);
    record_init(&rec, &w, 0);
    undisturbed(&w, &whole);
    new_store(fx, &w, name);
    size_t half = world_commit_point(&w, w.rows / 2);
    extend(fx, &w, name, 0, half, &rec);
    for (int keep = 0; keep < 2; keep++) {
        session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = keep == 1};
        cairn_session *s = world_session(&w, fx->store, &spec);
        assert_int_equal(rerun(&w, s, &fx->r), half);
        world_feed(&w, s, half, w.rows, 0, &fx->r, &rec);
        record_same(&whole, &rec, 0, w.rows);
        if (keep == 0) {
            assert_int_equal(cairn_session_commit(s, NULL), CAIRN_INVALID);
        } else {
            assert_true(cairn_session_pending_bytes(s) > 0);
            assert_ok(cairn_session_commit(s, NULL));
            assert_int_equal(cairn_session_pending_bytes(s), 0);
        }
        cairn_session_end(s);
        assert_int_equal(tokens_stored(fx, name), world_tokens(&w, keep == 0 ? half : w.rows));
    }
    /* several contexts: nobody's to commit */
    assert_ok(cairn_context_create(fx->store, "other", NULL));
    const char *const both[] = {name, "other"};
    cairn_session *s = world_session(&w, fx->store, &(session_spec){.contexts = both, .n = 2, .top_k = K});
    world_feed(&w, s, 0, 2 * world_slots(&w), 0, &fx->r, NULL);
    assert_int_equal(cairn_session_commit(s, NULL), CAIRN_INVALID);
    cairn_session_end(s);
    record_wipe(&whole);
    record_wipe(&rec);
    world_wipe(&w);
}

static void own_blocks_beyond_the_budget_are_spilled_and_still_read_and_committed(void **state)
{
    fixture *fx = *state;
    world w;
    record whole, rec;
    world_spec shape = {3, 4, 2, 32, 15, CAIRN_POSITION_CLAMPED, false, true, 16 * 150 + 5};
    world_init(&w, &fx->r, &shape);
    record_init(&whole, &w, 0);
    record_init(&rec, &w, 0);
    undisturbed(&w, &whole); /* 150 blocks x 6 tiles x 3840 bytes = 3.4 MB */
    const char *name = "text";
    new_store(fx, &w, name);
    for (int stored = 0; stored < 2; stored++) {
        session_spec spec = {.top_k = K, .ram_bytes = 2 << 20};
        if (stored == 1) spec.contexts = &name, spec.n = 1, spec.write = true;
        cairn_session *s = world_session(&w, stored == 1 ? fx->store : NULL, &spec);
        world_feed(&w, s, 0, w.rows, 0, &fx->r, &rec);
        cairn_session_info info;
        cairn_session_info_get(s, &info);
        print_message("  own blocks %llu: %llu bytes in RAM, %llu spilled\n", (unsigned long long)info.own_blocks,
                      (unsigned long long)info.own_bytes, (unsigned long long)info.spilled_bytes);
        assert_true(info.spilled_bytes > 0);
        assert_true(info.own_bytes + info.landmark_bytes + info.tier_bytes <= 2 << 20);
        record_same(&whole, &rec, 0, w.rows);
        if (stored == 1) {
            assert_ok(cairn_session_commit(s, NULL));
            cairn_session_info_get(s, &info);
            assert_int_equal(info.own_blocks, 0);
        }
        cairn_session_end(s);
    }
    /* what was spilled and then committed reads back */
    cairn_session *s = world_session(&w, fx->store, &(session_spec){.contexts = &name, .n = 1, .top_k = K});
    assert_int_equal(rerun(&w, s, &fx->r), w.rows);
    cairn_session_end(s);
    assert_ok(cairn_context_fork(fx->store, name, "fork", world_tokens(&w, w.rows - 40), NULL));
    extend(fx, &w, "fork", w.rows - 40, w.rows, &rec);
    record_same(&whole, &rec, w.rows - 40, w.rows);
    record_wipe(&whole);
    record_wipe(&rec);
    world_wipe(&w);
}

static void sources_carry_the_mass_each_block_got(void **state)
{
    fixture *fx = *state;
    attached a;
    attached_init(&a, &fx->r, 5, 9);
    world *w = &a.w;
    size_t slots = world_slots(w);
    new_store(fx, w, "one");
    assert_ok(cairn_context_create(fx->store, "two", NULL));
    world_write_blocks(w, fx->store, "one", 0, 3);
    world_write_blocks(w, fx->store, "two", 3, 2);
    const char *const names[] = {"one", "two"};
    cairn_session *s = world_session(w, fx->store, &(session_spec){.contexts = names, .n = 2});
    cairn_session_sources_enable(s, true);
    world_feed(w, s, a.start, w->rows, 0, &fx->r, NULL);
    double mass[64] = {0};
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t i = a.start * w->shape.heads; i < w->rows * w->shape.heads; i++) {
            uint8_t exists[64];
            double out[64];
            twin_result result;
            size_t row = i / w->shape.heads;
            for (size_t b = 0; b < row / slots; b++)
                exists[b] = !w->never[b] && (w->local[l] == 0 || row / slots - b <= w->shape.local_window_blocks);
            twin_clamped(w, l, row, (uint32_t)(i % w->shape.heads), exists, out, &result);
            for (size_t b = 0; b < row / slots; b++) mass[b] += exists[b] ? result.gates[b] / result.mass : 0.0;
        }
    }
    cairn_source sources[16];
    size_t n = cairn_session_sources(s, sources, 16), own = (w->rows - a.start) / slots;
    assert_true(n >= 5 && n <= 5 + own + 1);
    double found = 0.0, expected = 0.0;
    for (size_t i = 0; i < n; i++) {
        assert_true(i == 0 || sources[i].mass <= sources[i - 1].mass);
        size_t block = sources[i].context == SIZE_MAX ? a.start / slots + (size_t)sources[i].block
                                                      : (sources[i].context == 0 ? 0 : 3) + (size_t)sources[i].block;
        if (block >= w->rows / slots) continue; /* the open block, if it is listed */
        assert_near(sources[i].mass, mass[block], 1e-3);
        assert_int_equal(sources[i].token, sources[i].block * w->shape.block_tokens);
        assert_int_equal(sources[i].tokens, w->shape.block_tokens);
        found += sources[i].mass;
    }
    for (size_t b = 0; b < 5; b++) expected += mass[b];
    assert_true(found >= expected - 1e-2);
    cairn_session_end(s);
    world_wipe(w);
}

static void a_store_of_another_shape_and_a_second_appender_are_refused(void **state)
{
    fixture *fx = *state;
    world w;
    const char *name = "text";
    world_random(&w, &fx->r, CAIRN_POSITION_CLAMPED, 3);
    new_store(fx, &w, name);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = true};
    cairn_session *first = world_session(&w, fx->store, &spec), *second = NULL;
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, &w.shape);
    opt.write = true;
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second), CAIRN_BUSY);
    assert_null(second);
    opt.write = false;
    assert_ok(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second)); /* reading is always free */
    cairn_session_end(second);
    cairn_session_end(first);
    const char *missing = "nobody";
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &missing, 1, &opt, &second), CAIRN_NOT_FOUND);
    w.shape.head_dim += 2;
    w.shape.rope_dims = 0;
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second), CAIRN_MISMATCH);
    w.shape.head_dim -= 2;
    w.shape.block_tokens += 1;
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second), CAIRN_MISMATCH);
    w.shape.block_tokens -= 1;
    opt.ram_bytes = 1; /* too little, and the error says what is enough */
    assert_int_equal(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second), CAIRN_NO_MEMORY);
    const char *least = strstr(cairn_last_error(), "at least ");
    assert_non_null(least);
    opt.ram_bytes = strtoull(least + strlen("at least "), NULL, 10);
    assert_ok(cairn_session_begin(fx->store, &w.shape, &name, 1, &opt, &second));
    cairn_session_end(second);
    world_wipe(&w);
}

int main(void)
{
#define semantics_test(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        semantics_test(a_reopened_context_goes_on_bit_for_bit_as_if_never_closed),
        semantics_test(a_fork_shares_the_past_and_parts_there_and_neither_sees_the_others_future),
        semantics_test(several_contexts_are_old_blocks_of_a_stream_of_the_sessions_own),
        semantics_test(a_fresh_session_over_one_context_sees_it_as_old_and_leaves_it_alone),
        semantics_test(attached_blocks_fill_the_papers_slots_like_cached_ones),
        semantics_test(an_early_closed_tail_is_one_more_old_block_of_fewer_tokens),
        semantics_test(an_early_closed_session_cannot_be_committed_and_adoption_comes_before_the_first_row),
        semantics_test(layers_that_are_not_stored_are_refilled_and_go_on_bit_for_bit),
        semantics_test(layers_that_are_not_stored_must_be_refilled_first_and_once),
        semantics_test(a_tail_is_neither_forgotten_nor_replaced),
        semantics_test(leaving_out_the_last_layers_attend_changes_nothing_later),
        semantics_test(windows_and_local_layers_see_what_the_policy_says_and_no_more),
        semantics_test(what_is_asked_goes_on_from_the_tail_and_is_gone_unless_committed),
        semantics_test(own_blocks_beyond_the_budget_are_spilled_and_still_read_and_committed),
        semantics_test(sources_carry_the_mass_each_block_got),
        semantics_test(a_store_of_another_shape_and_a_second_appender_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
