/* test_store_contexts.c - fork, append, truncate, drop, rename against a model that keeps every token in memory. */
#include "store_fixture.h"

#include <store_internal.h>

#include <stdio.h>
#include <unistd.h>

/* first_layer 0, small: most of the cost of a round is the store's, not the fixture's */
static const cairn_geometry small = {
    .layers = 2, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 4, .dtype = CAIRN_Q8};

enum { CONTEXTS = 12, BLOCKS = 400, C = 4, TILES = 2 };

/* The witness: a context is a list of block contents (each by a number that seeds all its bytes) and a tail. */
typedef struct model_context {
    bool there;
    char name[16];
    uint64_t blocks[BLOCKS];
    size_t n;
    cairn_token tail[C];
    size_t tail_n;
} model_context;

typedef struct model {
    fixture *fx;
    model_context of[CONTEXTS];
    uint64_t next_block;
    unsigned renames;
    test_random random;
} model;

static void block_tokens(uint64_t number, cairn_token out[C])
{
    for (int i = 0; i < C; i++) out[i] = (cairn_token)((number * 131 + (uint64_t)i * 7) % 60000);
}

static void append(model *m, model_context *c, size_t n, size_t tail)
{
    fixture *fx = m->fx;
    size_t tile = fixture_tile_bytes(fx) * TILES, landmark = cairn_landmark_payload_bytes(&fx->geometry);
    cairn_block_data data[16];
    cairn_token tokens[16][C];
    uint8_t *room = malloc(16 * (tile + landmark));
    cairn_writer *writer;
    assert_true(n <= 16);
    if (c->n + n > BLOCKS) n = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t number = m->next_block++;
        uint8_t *tiles = room + i * (tile + landmark);
        block_tokens(number, tokens[i]);
        fixture_bytes(number, 1, tiles, tile);
        fixture_bytes(number, 2, tiles + tile, landmark);
        data[i] = (cairn_block_data){tokens[i], tiles + tile, tiles};
        c->blocks[c->n++] = number;
    }
    c->tail_n = tail;
    for (size_t i = 0; i < tail; i++) c->tail[i] = (cairn_token)test_random_below(&m->random, 60000);
    assert_ok(cairn_writer_begin(fx->store, c->name, &writer));
    assert_ok(cairn_writer_commit(writer, data, n, c->tail, tail, NULL));
    cairn_writer_end(writer);
    free(room);
}

static void fork_at(model *m, const model_context *from, model_context *to, uint64_t at)
{
    assert_ok(cairn_context_fork(m->fx->store, from->name, to->name, at, NULL));
    if (at == UINT64_MAX) at = from->n * C + from->tail_n;
    to->there = true;
    to->n = at / C;
    to->tail_n = at % C;
    memcpy(to->blocks, from->blocks, to->n * sizeof *to->blocks);
    cairn_token block[C];
    if (to->n < from->n)
        block_tokens(from->blocks[to->n], block);
    else
        memcpy(block, from->tail, sizeof block);
    memcpy(to->tail, block, to->tail_n * sizeof *block);
}

typedef struct landmark_check {
    fixture *fx;
    uint64_t number;
} landmark_check;

static bool same_landmark(void *arg, uint32_t block, cairn_span payload)
{
    const landmark_check *check = arg;
    uint8_t expected[64];
    (void)block;
    assert_true(payload.bytes <= sizeof expected);
    assert_int_equal((uintptr_t)payload.data % 64, 0);
    fixture_bytes(check->number, 2, expected, payload.bytes);
    assert_memory_equal(payload.data, expected, payload.bytes);
    return true;
}

static void check_context(model *m, cairn_snapshot *snap, const model_context *c)
{
    cairn_context_info info;
    cairn_range ranges[BLOCKS];
    cairn_token tail[C], tokens[C], expected[C];
    uint8_t tile[256];
    size_t n, at = 0, tile_bytes = fixture_tile_bytes(m->fx);
    assert_ok(cairn_snapshot_context(snap, c->name, &info));
    assert_int_equal(info.blocks, c->n);
    assert_int_equal(info.tokens, c->n * C + c->tail_n);
    assert_ok(cairn_snapshot_tail(snap, info.id, tail, C, &n));
    assert_int_equal(n, c->tail_n);
    assert_memory_equal(tail, c->tail, n * sizeof *tail);
    assert_ok(cairn_snapshot_ranges(snap, info.id, ranges, BLOCKS, &n));
    for (size_t r = 0; r < n; r++)
        for (uint32_t i = 0; i < ranges[r].count; i++, at++) {
            uint64_t number = c->blocks[at], segment = ranges[r].segment;
            uint32_t block = ranges[r].first + i;
            cairn_tile_view view;
            landmark_check check = {m->fx, number};
            block_tokens(number, expected);
            assert_ok(cairn_snapshot_tokens(snap, segment, block, 1, tokens));
            assert_memory_equal(tokens, expected, sizeof tokens);
            assert_ok(cairn_snapshot_landmarks(snap, segment, block, 1, same_landmark, &check));
            uint16_t head = (uint16_t)(at % TILES);
            assert_ok(cairn_snapshot_tile(snap, (cairn_tile_id){segment, block, 1, head}, &view));
            uint8_t both[512];
            fixture_bytes(number, 1, both, tile_bytes * TILES);
            memcpy(tile, both + head * tile_bytes, tile_bytes);
            assert_memory_equal(view.keys, tile, tile_bytes);
        }
    assert_int_equal(at, c->n);
}

static bool add_references(void *arg, const cairn_segment_info *info)
{
    *(uint64_t *)arg += info->references;
    return true;
}

static void check_everything(model *m)
{
    cairn_snapshot *snap;
    cairn_verify_report report;
    uint64_t ranges = 0, references = 0, contexts = 0;
    assert_ok(cairn_snapshot_begin(m->fx->store, &snap));
    for (size_t i = 0; i < CONTEXTS; i++)
        if (m->of[i].there) {
            cairn_context_info info;
            check_context(m, snap, &m->of[i]);
            assert_ok(cairn_snapshot_context(snap, m->of[i].name, &info));
            ranges += info.ranges;
            contexts++;
        }
    assert_ok(cairn_snapshot_segments(snap, add_references, &references));
    assert_int_equal(references, ranges);
    cairn_snapshot_end(snap);
    assert_ok(cairn_store_verify(m->fx->store, true, NULL, NULL, NULL, &report));
    assert_int_equal(report.contexts, contexts);
}

static void one_step(model *m)
{
    model_context *c = &m->of[test_random_below(&m->random, CONTEXTS)];
    model_context *other = &m->of[test_random_below(&m->random, CONTEXTS)];
    cairn_writer *writer;
    uint32_t what = test_random_below(&m->random, 16);
    if (!c->there) {
        if (other->there && what < 12) {
            uint64_t tokens = other->n * C + other->tail_n;
            uint64_t at = what < 2 ? UINT64_MAX : test_random_below(&m->random, (uint32_t)tokens + 1);
            fork_at(m, other, c, at);
        } else {
            assert_ok(cairn_context_create(m->fx->store, c->name, NULL));
            c->there = true;
            c->n = c->tail_n = 0;
        }
        return;
    }
    if (what < 9) {
        append(m, c, test_random_below(&m->random, 6), test_random_below(&m->random, C));
    } else if (what < 12) {
        assert_ok(cairn_context_drop(m->fx->store, c->name));
        c->there = false;
    } else if (what == 12) {
        assert_ok(cairn_writer_begin(m->fx->store, c->name, &writer));
        assert_ok(cairn_writer_truncate(writer));
        cairn_writer_end(writer);
        c->n = c->tail_n = 0;
    } else if (what == 13) {
        char to[16];
        snprintf(to, sizeof to, "r%u", m->renames++);
        assert_ok(cairn_context_rename(m->fx->store, c->name, to));
        memcpy(c->name, to, sizeof to);
    } else if (other->there) { /* names that are taken stay so */
        assert_int_equal(cairn_context_rename(m->fx->store, c->name, other->name),
                         c == other ? CAIRN_OK : CAIRN_EXISTS);
        assert_int_equal(cairn_context_fork(m->fx->store, c->name, other->name, 0, NULL), CAIRN_EXISTS);
        assert_int_equal(cairn_context_fork(m->fx->store, c->name, "beyond", c->n * C + c->tail_n + 1, NULL),
                         CAIRN_INVALID);
    }
}

static void contexts_equal_the_model_after_every_thirty_random_steps_and_all_space_comes_back(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    model *m = calloc(1, sizeof *m);
    cairn_store_stat empty, full, after;
    m->fx = fx;
    m->random.state = 2024;
    for (int i = 0; i < CONTEXTS; i++) snprintf(m->of[i].name, sizeof m->of[i].name, "c%d", i);
    assert_ok(cairn_store_stat_get(fx->store, &empty));
    for (int i = 0; i < 600; i++) {
        one_step(m);
        if (i % 30 == 29) check_everything(m);
    }
    assert_ok(cairn_store_stat_get(fx->store, &full));
    for (int i = 0; i < CONTEXTS; i++)
        if (m->of[i].there) assert_ok(cairn_context_drop(fx->store, m->of[i].name));
    assert_ok(cairn_store_stat_get(fx->store, &after));
    assert_int_equal(after.contexts, 0);
    assert_int_equal(after.segments, 0);
    assert_int_equal(after.blocks, 0);
    assert_int_equal(after.tiles, 0);
    assert_true(full.used_bytes > empty.used_bytes + 100 * 4096);
    assert_true(after.used_bytes < empty.used_bytes + 8 * 4096); /* the free list itself takes a few pages */
    assert_true(after.free_bytes > full.free_bytes);
    uint64_t freed;
    assert_ok(cairn_store_sweep(fx->store, &freed));
    assert_int_equal(freed, 0);
    free(m);
    fixture_free(fx);
}

static uint32_t references_of(fixture *fx, uint64_t segment)
{
    cairn_snapshot *snap;
    cairn_segment_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    cairn_status status = cairn_snapshot_segment(snap, segment, &info);
    cairn_snapshot_end(snap);
    return status == CAIRN_OK ? info.references : 0;
}

static cairn_context_info info_of(fixture *fx, const char *name)
{
    cairn_snapshot *snap;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    cairn_snapshot_end(snap);
    return info;
}

static void append_blocks(fixture *fx, const char *name, uint64_t seed, uint64_t first, size_t n)
{
    cairn_writer *writer;
    assert_ok(cairn_writer_begin(fx->store, name, &writer));
    fixture_commit(fx, writer, seed, first, n, 0, NULL);
    cairn_writer_end(writer);
}

static void a_fork_shares_until_it_appends_and_the_owner_goes_on_extending(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    uint64_t segment = fixture_context(fx, "parent", 1, 5, 2);
    assert_ok(cairn_context_fork(fx->store, "parent", "fork", UINT64_MAX, NULL));
    assert_int_equal(references_of(fx, segment), 2);
    assert_int_equal(info_of(fx, "fork").own_segment, 0);
    assert_int_equal(info_of(fx, "fork").parent, info_of(fx, "parent").id);
    assert_int_equal(info_of(fx, "fork").tail_tokens, 2);
    append_blocks(fx, "fork", 2, 5, 2);
    append_blocks(fx, "parent", 3, 5, 1);
    cairn_context_info fork = info_of(fx, "fork"), parent = info_of(fx, "parent");
    assert_int_equal(fork.ranges, 2);
    assert_int_not_equal(fork.own_segment, segment);
    assert_int_equal(parent.ranges, 1);
    assert_int_equal(parent.own_segment, segment);
    assert_int_equal(references_of(fx, segment), 2);
    assert_int_equal(references_of(fx, fork.own_segment), 1);
    cairn_snapshot *snap;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "fork", 1, 0, 5);
    fixture_check_blocks(fx, snap, "fork", 2, 5, 2);
    fixture_check_blocks(fx, snap, "parent", 3, 5, 1);
    cairn_snapshot_end(snap);

    /* the owner leaves: what the fork shares stays, and nobody extends it any more */
    assert_ok(cairn_context_drop(fx->store, "parent"));
    assert_int_equal(references_of(fx, segment), 1);
    assert_int_equal(references_of(fx, fork.own_segment), 1);
    append_blocks(fx, "fork", 2, 7, 1);
    assert_int_equal(info_of(fx, "fork").ranges, 2);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    assert_ok(cairn_context_drop(fx->store, "fork"));
    assert_int_equal(references_of(fx, segment), 0);
    fixture_free(fx);
}

static void a_truncated_context_keeps_name_and_id_and_leaves_its_forks_alone(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    uint64_t segment = fixture_context(fx, "a", 1, 5, 2);
    uint64_t id = info_of(fx, "a").id;
    cairn_writer *writer;
    assert_ok(cairn_context_fork(fx->store, "a", "b", 13, NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_ok(cairn_writer_truncate(writer));
    fixture_commit(fx, writer, 9, 0, 2, 1, NULL);
    cairn_writer_end(writer);
    cairn_context_info a = info_of(fx, "a"), b = info_of(fx, "b");
    assert_int_equal(a.id, id);
    assert_int_equal(a.blocks, 2);
    assert_int_not_equal(a.own_segment, segment);
    assert_int_equal(b.blocks, 3);
    assert_int_equal(b.tail_tokens, 1);
    assert_int_equal(references_of(fx, segment), 1);
    cairn_snapshot *snap;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "a", 9, 0, 2);
    fixture_check_blocks(fx, snap, "b", 1, 0, 3);
    cairn_snapshot_end(snap);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    fixture_free(fx);
}

static void a_second_writer_in_one_process_is_busy_and_forks_and_others_are_not(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    cairn_writer *writer, *second;
    char pid[32];
    fixture_context(fx, "a", 1, 2, 0);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_int_equal(cairn_writer_begin(fx->store, "a", &second), CAIRN_BUSY);
    assert_null(second);
    snprintf(pid, sizeof pid, "pid %d", (int)getpid());
    assert_non_null(strstr(cairn_last_error(), pid));
    assert_int_equal(cairn_context_drop(fx->store, "a"), CAIRN_BUSY);
    assert_ok(cairn_context_fork(fx->store, "a", "b", UINT64_MAX, NULL));
    assert_ok(cairn_writer_begin(fx->store, "b", &second));
    fixture_commit(fx, second, 2, 2, 1, 0, NULL);
    assert_ok(cairn_context_rename(fx->store, "a", "renamed")); /* the writer holds the context, not its name */
    fixture_commit(fx, writer, 1, 2, 1, 0, NULL);
    cairn_writer_end(writer);
    assert_ok(cairn_context_drop(fx->store, "renamed"));
    cairn_writer_end(second);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    fixture_free(fx);
}

static void dropping_frees_large_contexts_in_short_transactions(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    cairn_store_stat before, after;
    fixture_context(fx, "large", 1, 3 * STORE_FREE_TILES, 0); /* 6 batches of tiles */
    fixture_context(fx, "other", 2, 3, 0);
    assert_ok(cairn_store_stat_get(fx->store, &before));
    MDB_envinfo info;
    mdb_env_info(fx->store->env->data.env, &info);
    size_t last = info.me_last_txnid;
    assert_ok(cairn_context_drop(fx->store, "large"));
    mdb_env_info(fx->store->env->data.env, &info);
    assert_true(info.me_last_txnid - last >= 7);
    assert_ok(cairn_store_stat_get(fx->store, &after));
    assert_int_equal(after.tiles, 3 * TILES);
    assert_int_equal(after.segments, 1);
    assert_true(after.free_bytes >= before.free_bytes + (uint64_t)3 * STORE_FREE_TILES * TILES * 4096);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    fixture_context(fx, "again", 3, 3 * STORE_FREE_TILES, 0); /* goes where the first one was */
    cairn_store_stat reused;
    assert_ok(cairn_store_stat_get(fx->store, &reused));
    assert_true(reused.file_bytes < before.file_bytes + before.file_bytes / 10);
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(contexts_equal_the_model_after_every_thirty_random_steps_and_all_space_comes_back),
        cmocka_unit_test(a_fork_shares_until_it_appends_and_the_owner_goes_on_extending),
        cmocka_unit_test(a_truncated_context_keeps_name_and_id_and_leaves_its_forks_alone),
        cmocka_unit_test(a_second_writer_in_one_process_is_busy_and_forks_and_others_are_not),
        cmocka_unit_test(dropping_frees_large_contexts_in_short_transactions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
