/* test_store.c - blocks, snapshots, writers, the index's bookkeeping: what a caller sees.
 * labels: threads */
#include "store_fixture.h"

#include <store_internal.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static const cairn_geometry tiny = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 8, .block_tokens = 5, .dtype = CAIRN_F16};
static const cairn_geometry usual = {
    .layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 64, .block_tokens = 63, .dtype = CAIRN_F16};

static int setup_tiny(void **state)
{
    *state = fixture_new(tiny);
    return 0;
}
static int teardown(void **state)
{
    fixture_free(*state);
    return 0;
}

static cairn_status open_as(const char *path, bool create, bool read_only, const cairn_geometry *geometry,
                            cairn_store **out)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = create;
    opt.read_only = read_only;
    opt.map_bytes = (uint64_t)1 << 30;
    if (geometry != NULL) opt.geometry = *geometry;
    return cairn_store_open(path, &opt, out);
}

static void assert_says(const char *words)
{
    if (strstr(cairn_last_error(), words) == NULL) fail_msg("'%s' does not say '%s'", cairn_last_error(), words);
}

static cairn_store_stat stat_of(cairn_store *store)
{
    cairn_store_stat st;
    assert_ok(cairn_store_stat_get(store, &st));
    return st;
}

static void print_damage(void *arg, const char *sentence)
{
    (void)arg;
    print_error("damage: %s\n", sentence);
}

static void assert_sound(cairn_store *store)
{
    cairn_verify_report report;
    assert_ok(cairn_store_verify(store, true, print_damage, NULL, NULL, &report));
    assert_ok(cairn_store_verify(store, false, print_damage, NULL, NULL, &report));
}

/* ---- blocks ---- */

static void what_is_committed_comes_back_bit_for_bit(void **state)
{
    (void)state;
    for (int dtype = CAIRN_F32; dtype <= CAIRN_Q8; dtype++)
        for (int which = 0; which < 2; which++) {
            cairn_geometry g = which == 0 ? tiny : usual;
            g.dtype = (cairn_dtype)dtype;
            fixture *fx = fixture_new(g);
            cairn_context_info info;
            cairn_snapshot *snap;
            fixture_context(fx, "a", 11, 9, 3);
            cairn_store_close(fx->store);
            fixture_open(fx, true);
            assert_ok(cairn_snapshot_begin(fx->store, &snap));
            fixture_check_blocks(fx, snap, "a", 11, 0, 9);
            assert_ok(cairn_snapshot_context(snap, "a", &info));
            assert_int_equal(info.blocks, 9);
            assert_int_equal(info.tail_tokens, 3);
            assert_int_equal(info.tokens, 9 * g.block_tokens + 3);
            assert_int_equal(info.ranges, 1);
            assert_int_equal(info.input.done_tokens, info.tokens);
            cairn_token tail[3], expected[3];
            size_t n;
            assert_ok(cairn_snapshot_tail(snap, info.id, tail, 3, &n));
            assert_int_equal(n, 3);
            fixture_tokens(11, 9 * g.block_tokens, expected, 3);
            assert_memory_equal(tail, expected, sizeof tail);
            cairn_snapshot_end(snap);
            assert_sound(fx->store);
            fixture_free(fx);
        }
}

static void a_tile_starts_on_a_64_byte_line_and_its_scales_are_aligned(void **state)
{
    (void)state;
    for (int dtype = CAIRN_F32; dtype <= CAIRN_Q8; dtype++)
        for (int which = 0; which < 3; which++) {
            cairn_geometry g = which == 0 ? tiny : usual;
            if (which == 2) g.head_dim = 6;
            g.dtype = (cairn_dtype)dtype;
            fixture *fx = fixture_new(g);
            uint64_t segment = fixture_context(fx, "a", 1, 3, 0);
            cairn_snapshot *snap;
            assert_ok(cairn_snapshot_begin(fx->store, &snap));
            for (uint32_t block = 0; block < 3; block++) {
                cairn_tile_id id = {segment, block, (uint16_t)g.first_layer, 1};
                cairn_tile_view view;
                cairn_span record;
                uint64_t offset;
                size_t bytes;
                assert_ok(cairn_snapshot_tile(snap, id, &view));
                assert_int_equal((uintptr_t)view.keys % 64, 0);
                assert_int_equal(view.dtype, g.dtype);
                assert_int_equal(view.tokens, g.block_tokens);
                assert_int_equal(view.head_dim, g.head_dim);
                size_t half = (size_t)g.block_tokens * g.head_dim * cairn_dtype_size(g.dtype);
                assert_ptr_equal(view.values, (const uint8_t *)view.keys + half);
                if (g.dtype == CAIRN_Q8) {
                    assert_ptr_equal(view.key_scales, (const uint8_t *)view.values + half);
                    assert_ptr_equal(view.value_scales, view.key_scales + g.head_dim);
                    assert_int_equal((uintptr_t)view.key_scales % 4, 0);
                } else {
                    assert_null(view.key_scales);
                    assert_null(view.value_scales);
                }
                /* and the file has the same bytes where the record is said to be: the witness is pread */
                assert_ok(store_locate(snap, id, &record));
                assert_true(store_file_offset(fx->store, record, &offset, &bytes));
                uint8_t *page = malloc(bytes);
                assert_int_equal(pread(fx->store->env->data.fd, page, bytes, (off_t)offset), bytes);
                assert_int_equal(cairn_get_le64(page), offset / fx->store->env->data.page_bytes);
                assert_memory_equal(page + STORE_PAGE_HEADER, record.data, record.bytes);
                free(page);
            }
            cairn_snapshot_end(snap);
            fixture_free(fx);
        }
}

static void a_full_size_tile_wastes_almost_nothing_of_its_pages(void **state)
{
    (void)state;
    assert_int_equal(store_tile_bytes(4096, CAIRN_F16, 63, 32) + STORE_PAGE_HEADER, 2 * 4096 - 64);
    assert_int_equal(store_tile_bytes(4096, CAIRN_F16, 63, 64) + STORE_PAGE_HEADER, 4 * 4096 - 192);
    assert_int_equal(store_tile_bytes(4096, CAIRN_BF16, 63, 128) + STORE_PAGE_HEADER, 8 * 4096 - 448);
}

static void what_is_not_there_is_not_found_and_a_tile_leaves_the_error_text_alone(void **state)
{
    fixture *fx = *state;
    uint64_t segment = fixture_context(fx, "a", 1, 2, 0);
    cairn_snapshot *snap;
    cairn_tile_view view;
    cairn_context_info info;
    cairn_segment_info seg;
    cairn_token tokens[16];
    cairn_range range;
    size_t n;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    cairn_fail(CAIRN_INVALID, "as it was");
    assert_int_equal(cairn_snapshot_tile(snap, (cairn_tile_id){segment, 2, 1, 0}, &view), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_tile(snap, (cairn_tile_id){segment, 0, 0, 0}, &view), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_tile(snap, (cairn_tile_id){segment, 0, 1, 2}, &view), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_tile(snap, (cairn_tile_id){99, 0, 1, 0}, &view), CAIRN_NOT_FOUND);
    assert_string_equal(cairn_last_error(), "as it was");
    assert_int_equal(cairn_snapshot_context(snap, "b", &info), CAIRN_NOT_FOUND);
    assert_says("'b'");
    assert_int_equal(cairn_snapshot_context_by_id(snap, 99, &info), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_ranges(snap, 99, &range, 1, &n), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_tail(snap, 99, tokens, 1, &n), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_snapshot_tokens(snap, segment, 1, 2, tokens), CAIRN_NOT_FOUND);
    assert_says("no block 2");
    assert_int_equal(cairn_snapshot_segment(snap, 99, &seg), CAIRN_NOT_FOUND);
    cairn_snapshot_end(snap);
    cairn_writer *writer;
    assert_int_equal(cairn_writer_begin(fx->store, "b", &writer), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_context_drop(fx->store, "b"), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_context_rename(fx->store, "b", "c"), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_context_fork(fx->store, "b", "c", 0, NULL), CAIRN_NOT_FOUND);
}

static void a_commit_that_cannot_be_is_refused_and_changes_nothing(void **state)
{
    fixture *fx = *state;
    cairn_writer *writer;
    cairn_context_info info;
    cairn_token tokens[5] = {1, 2, 3, 4, 5};
    fixture_context(fx, "a", 1, 2, 1);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_int_equal(cairn_writer_commit(writer, NULL, 0, tokens, 5, NULL), CAIRN_INVALID);
    assert_says("a block has 5");
    tokens[2] = -1;
    assert_int_equal(cairn_writer_commit(writer, NULL, 0, tokens, 3, NULL), CAIRN_INVALID);
    assert_says("is -1");
    assert_ok(cairn_writer_info(writer, &info));
    assert_int_equal(info.blocks, 2);
    assert_int_equal(info.tail_tokens, 1);
    cairn_writer_end(writer);
    assert_sound(fx->store);
}

static void the_input_says_where_an_interrupted_ingest_stands(void **state)
{
    fixture *fx = *state;
    cairn_writer *writer;
    cairn_context_info info;
    cairn_input input = {.bytes = 1000, .hash = 77, .done_tokens = 12345, .complete = false};
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    fixture_commit(fx, writer, 1, 0, 3, 2, &input);
    cairn_writer_end(writer);
    cairn_store_close(fx->store);
    fixture_open(fx, false);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_ok(cairn_writer_info(writer, &info));
    assert_int_equal(info.input.bytes, 1000);
    assert_int_equal(info.input.hash, 77);
    assert_int_equal(info.input.done_tokens, 17); /* the store counts, not the caller */
    assert_false(info.input.complete);
    assert_ok(cairn_writer_commit(writer, NULL, 0, NULL, 0, NULL)); /* NULL leaves it */
    input.complete = true;
    assert_ok(cairn_writer_commit(writer, NULL, 0, NULL, 0, &input));
    assert_ok(cairn_writer_info(writer, &info));
    assert_true(info.input.complete);
    assert_int_equal(info.input.done_tokens, 15);
    cairn_writer_end(writer);
}

static void names_are_data_and_absurd_ones_are_kept_or_refused(void **state)
{
    fixture *fx = *state;
    static const char *const good[] = {
        "..",           "/etc/passwd", "a/../b", " ", "docs/*", "-rf", "\xc3\xa9t\xc3\xa9", "\xf0\x9f\xaa\xa8",
        "\xee\x80\x80", "current",     "'; drop"};
    static const char *const bad[] = {"",
                                      "a\nb",
                                      "\x7f",
                                      "\xc2\x85",
                                      "\xff",
                                      "\xc3",
                                      "\xc0\xaf",
                                      "\xe0\x80\xaf",
                                      "\xed\xa0\x80",
                                      "\xf4\x90\x80\x80",
                                      "\xf0\x80\x80\xaf",
                                      "\x80",
                                      "a\xe2\x82"};
    char longest[CAIRN_NAME_MAX + 2];
    uint64_t id;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_ok(cairn_context_create(fx->store, good[i], &id));
        assert_int_equal(cairn_context_create(fx->store, good[i], &id), CAIRN_EXISTS);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (cairn_context_create(fx->store, bad[i], &id) != CAIRN_INVALID) fail_msg("bad name %zu was taken", i);
        assert_int_equal(cairn_context_rename(fx->store, "..", bad[i]), CAIRN_INVALID);
        assert_int_equal(cairn_context_fork(fx->store, "..", bad[i], 0, &id), CAIRN_INVALID);
        assert_int_equal(cairn_context_drop(fx->store, bad[i]), CAIRN_INVALID);
    }
    memset(longest, 'n', sizeof longest);
    longest[CAIRN_NAME_MAX + 1] = '\0';
    assert_int_equal(cairn_context_create(fx->store, longest, &id), CAIRN_INVALID);
    longest[CAIRN_NAME_MAX] = '\0';
    assert_ok(cairn_context_create(fx->store, longest, &id));
    cairn_writer *writer;
    assert_ok(cairn_writer_begin(fx->store, "/etc/passwd", &writer)); /* a lease's file is named by number */
    fixture_commit(fx, writer, 5, 0, 1, 0, NULL);
    cairn_writer_end(writer);
    assert_int_equal(stat_of(fx->store).contexts, sizeof good / sizeof *good + 1);
    assert_sound(fx->store);
}

static bool count_in_order(void *arg, const cairn_context_info *info)
{
    char *last = arg;
    assert_true(strcmp(last, info->name) < 0);
    strcpy(last, info->name);
    return strcmp(info->name, "m") != 0;
}

static void contexts_are_listed_in_order_of_name_until_the_caller_has_enough(void **state)
{
    fixture *fx = *state;
    char last[CAIRN_NAME_MAX + 1] = "";
    cairn_snapshot *snap;
    static const char *const names[] = {"z", "b", "a", "m", "aa"};
    for (size_t i = 0; i < 5; i++) assert_ok(cairn_context_create(fx->store, names[i], NULL));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_contexts(snap, count_in_order, last));
    assert_string_equal(last, "m");
    cairn_snapshot_end(snap);
}

/* ---- snapshots ---- */

static void a_snapshot_keeps_its_view_while_others_commit_and_drop(void **state)
{
    fixture *fx = *state;
    cairn_snapshot *snap;
    cairn_writer *writer;
    cairn_context_info info;
    fixture_context(fx, "a", 1, 4, 2);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    fixture_commit(fx, writer, 1, 4, 3, 0, NULL);
    cairn_writer_end(writer);
    assert_ok(cairn_context_drop(fx->store, "a")); /* its pages go to the free list, */
    fixture_context(fx, "b", 2, 40, 0);            /* where nobody may take them yet */
    assert_ok(cairn_snapshot_context(snap, "a", &info));
    assert_int_equal(info.blocks, 4);
    assert_int_equal(info.tail_tokens, 2);
    fixture_check_blocks(fx, snap, "a", 1, 0, 4);
    assert_ok(cairn_snapshot_renew(snap));
    assert_int_equal(cairn_snapshot_context(snap, "a", &info), CAIRN_NOT_FOUND);
    fixture_check_blocks(fx, snap, "b", 2, 0, 40);
    cairn_snapshot_end(snap);
}

typedef struct reading {
    fixture *fx;
    atomic_bool stop;
    atomic_int rounds;
} reading;

static void *read_on(void *arg)
{
    reading *r = arg;
    cairn_snapshot *snap;
    assert_ok(cairn_snapshot_begin(r->fx->store, &snap));
    while (!atomic_load(&r->stop)) {
        cairn_context_info info;
        assert_ok(cairn_snapshot_renew(snap));
        assert_ok(cairn_snapshot_context(snap, "a", &info));
        if (info.blocks > 0) fixture_check_blocks(r->fx, snap, "a", 1, info.blocks - 1, 1);
        atomic_fetch_add(&r->rounds, 1);
    }
    cairn_snapshot_end(snap);
    return NULL;
}

static void threads_read_while_others_write(void **state)
{
    fixture *fx = *state;
    reading r = {.fx = fx};
    pthread_t threads[3];
    cairn_writer *writer;
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&threads[i], NULL, read_on, &r), 0);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    fixture_commit(fx, writer, 1, 0, 60, 0, NULL);
    cairn_writer_end(writer);
    for (int i = 0; i < 20; i++) {
        char name[16];
        snprintf(name, sizeof name, "f%d", i);
        assert_ok(cairn_context_fork(fx->store, "a", name, (uint64_t)i * 7, NULL));
        if (i % 2 == 0) assert_ok(cairn_context_drop(fx->store, name));
    }
    while (atomic_load(&r.rounds) < 30) usleep(1000);
    atomic_store(&r.stop, true);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    assert_sound(fx->store);
}

static void a_thousand_snapshots_are_served_and_one_too_many_says_so(void **state)
{
    fixture *fx = *state;
    static cairn_snapshot *snaps[2000];
    size_t n = 0;
    cairn_status status = CAIRN_OK;
    while (n < 2000 && (status = cairn_snapshot_begin(fx->store, &snaps[n])) == CAIRN_OK) n++;
    assert_true(n >= STORE_READERS_MAX);
    assert_int_equal(status, CAIRN_BUSY);
    assert_says("reader slots");
    for (size_t i = 0; i < n; i++) cairn_snapshot_end(snaps[i]);
    assert_ok(cairn_snapshot_begin(fx->store, &snaps[0]));
    assert_int_equal(stat_of(fx->store).readers, 1);
    cairn_snapshot_end(snaps[0]);
}

/* ---- the index's bookkeeping ---- */

static void index_fields_are_kept_and_the_files_go_with_the_segment(void **state)
{
    fixture *fx = *state;
    cairn_snapshot *snap;
    cairn_segment_info info = {0}, back;
    char path[4096], small[8];
    info.id = fixture_context(fx, "a", 1, 4, 0);
    info.generation = 3;
    info.index_blocks = 4;
    info.index_hash = 0xabcdef;
    strcpy(info.index_kind, "auto");
    strcpy(info.index_made, "ivf:nprobe=32");
    strcpy(info.index_why, "because");
    info.blocks = 99; /* not the index's to say */
    info.references = 99;
    assert_ok(cairn_store_set_index(fx->store, &info));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_segment(snap, info.id, &back));
    cairn_snapshot_end(snap);
    assert_int_equal(back.generation, 3);
    assert_int_equal(back.index_blocks, 4);
    assert_int_equal(back.index_hash, 0xabcdef);
    assert_string_equal(back.index_made, "ivf:nprobe=32");
    assert_int_equal(back.blocks, 4);
    assert_int_equal(back.references, 1);
    info.generation = 2;
    assert_int_equal(cairn_store_set_index(fx->store, &info), CAIRN_INVALID);
    info.generation = 4;
    info.index_blocks = 5;
    assert_int_equal(cairn_store_set_index(fx->store, &info), CAIRN_INVALID);
    info.id = 42;
    assert_int_equal(cairn_store_set_index(fx->store, &info), CAIRN_NOT_FOUND);

    assert_int_equal(cairn_store_index_path(fx->store, back.id, 3, small, sizeof small), CAIRN_INVALID);
    assert_ok(cairn_store_index_path(fx->store, back.id, 3, path, sizeof path - 8));
    strcat(path, ".l1.h0");
    test_write_file(path, "12345", 5);
    char *neighbour = test_path(fx->path, "index/10-3"); /* another segment whose number begins alike */
    test_write_file(neighbour, "123", 3);
    assert_int_equal(stat_of(fx->store).index_bytes, 8);
    assert_ok(cairn_context_drop(fx->store, "a"));
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(stat_of(fx->store).index_bytes, 3);
    free(neighbour);
}

/* ---- running out of memory ---- */

static cairn_status a_days_work(const char *path)
{
    cairn_store *store = NULL;
    cairn_snapshot *snap = NULL;
    cairn_writer *writer = NULL;
    cairn_context_info info;
    static const uint8_t zeros[4096];
    static const cairn_token tokens[5];
    cairn_block_data block = {tokens, zeros, zeros};
    cairn_status status = open_as(path, true, false, &tiny, &store);
    if (status == CAIRN_OK) status = cairn_context_create(store, "a", NULL);
    if (status == CAIRN_OK) status = cairn_writer_begin(store, "a", &writer);
    if (status == CAIRN_OK) status = cairn_writer_commit(writer, &block, 1, tokens, 2, NULL);
    if (status == CAIRN_OK) status = cairn_context_fork(store, "a", "b", 3, NULL);
    if (status == CAIRN_OK) status = cairn_context_rename(store, "b", "c");
    if (status == CAIRN_OK) status = cairn_snapshot_begin(store, &snap);
    if (status == CAIRN_OK) status = cairn_snapshot_context(snap, "c", &info);
    if (status == CAIRN_OK) status = cairn_store_verify(store, true, NULL, NULL, NULL, NULL);
    cairn_snapshot_end(snap);
    if (status == CAIRN_OK) status = cairn_writer_truncate(writer);
    cairn_writer_end(writer);
    if (status == CAIRN_OK) status = cairn_context_drop(store, "c");
    if (status == CAIRN_OK) status = cairn_context_drop(store, "a");
    cairn_store_close(store);
    return status;
}

static void an_allocation_that_fails_is_an_error_and_nothing_worse(void **state)
{
    (void)state;
    char *dir = test_make_dir();
    uint64_t n = 1;
    for (;; n++) {
        char name[32];
        snprintf(name, sizeof name, "s%llu", (unsigned long long)n);
        char *path = test_path(dir, name);
        cairn_alloc_fail_at(n);
        cairn_status status = a_days_work(path);
        uint64_t made = cairn_alloc_fail_at(0);
        free(path);
        if (status == CAIRN_OK) {
            assert_true(made < n);
            break;
        }
        assert_int_equal(status, CAIRN_NO_MEMORY);
    }
    assert_true(n > 10);
    test_remove_dir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_committed_comes_back_bit_for_bit),
        cmocka_unit_test(a_tile_starts_on_a_64_byte_line_and_its_scales_are_aligned),
        cmocka_unit_test(a_full_size_tile_wastes_almost_nothing_of_its_pages),
        cmocka_unit_test_setup_teardown(what_is_not_there_is_not_found_and_a_tile_leaves_the_error_text_alone,
                                        setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(a_commit_that_cannot_be_is_refused_and_changes_nothing, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(the_input_says_where_an_interrupted_ingest_stands, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(names_are_data_and_absurd_ones_are_kept_or_refused, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(contexts_are_listed_in_order_of_name_until_the_caller_has_enough, setup_tiny,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_snapshot_keeps_its_view_while_others_commit_and_drop, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(threads_read_while_others_write, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(a_thousand_snapshots_are_served_and_one_too_many_says_so, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(index_fields_are_kept_and_the_files_go_with_the_segment, setup_tiny, teardown),
        cmocka_unit_test(an_allocation_that_fails_is_an_error_and_nothing_worse),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
