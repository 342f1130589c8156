/* test_compact.c - stores compacted: space, sharing, ids, indexes, kills. */
#include "archive_fixture.h"

static uint64_t file_bytes(fixture *fx)
{
    cairn_store_stat stat;
    assert_ok(cairn_store_stat_get(fx->store, &stat));
    return stat.file_bytes;
}

static void compact_returns_the_space_of_what_was_dropped(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    progress_seen seen = {0};
    fixture_context(fx, "big", 1, 40, 0);
    fixture_context(fx, "small", 2, 4, 9);
    uint64_t full = file_bytes(fx);
    assert_ok(cairn_context_drop(fx->store, "big"));
    assert_true(file_bytes(fx) > full * 9 / 10); /* LMDB gives nothing back by itself */
    assert_ok(cairn_store_compact(fx->store, watch, &seen));
    assert_true(seen.calls > 0 && seen.last == seen.total);
    assert_true(file_bytes(fx) < full / 5);
    check_context(fx, "small", 2, 4, 9);
    check_store_is_sound(fx);
    cairn_store_close(fx->store); /* and is the store that is opened next */
    fixture_open(fx, false);
    check_context(fx, "small", 2, 4, 9);
    fixture_context(fx, "more", 3, 5, 0);
    check_context(fx, "more", 3, 5, 0);
    fixture_free(fx);
}

static cairn_segment_info segment_info(fixture *fx, uint64_t segment, cairn_status *status)
{
    cairn_snapshot *snap = NULL;
    cairn_segment_info info = {0};
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    *status = cairn_snapshot_segment(snap, segment, &info);
    cairn_snapshot_end(snap);
    return info;
}

static size_t ranges_of(fixture *fx, const char *name, cairn_range *out)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    size_t n = 0;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_ok(cairn_snapshot_ranges(snap, info.id, out, 8, &n));
    cairn_snapshot_end(snap);
    return n;
}

static void compact_keeps_only_the_ranges_forks_refer_to_and_shares_them_still(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    uint64_t id;
    cairn_writer *writer = NULL;
    cairn_range one[8], two[8];
    cairn_status st;
    uint64_t parent = fixture_context(fx, "parent", 1, 20, 3);
    assert_ok(cairn_context_fork(fx->store, "parent", "ten", 10 * 63, &id));
    assert_ok(cairn_context_fork(fx->store, "parent", "six", 6 * 63 + 5, &id));
    assert_ok(cairn_writer_begin(fx->store, "ten", &writer));
    fixture_commit(fx, writer, 1, 10, 3, 2, NULL);
    cairn_writer_end(writer);
    assert_ok(cairn_context_drop(fx->store, "parent"));
    assert_int_equal(shape_of(fx).stat.blocks, 23);
    uint64_t full = file_bytes(fx);
    uint64_t own = info_of(fx, "ten").own_segment;
    assert_ok(cairn_store_compact(fx->store, NULL, NULL));
    assert_true(file_bytes(fx) < full * 3 / 4);
    assert_int_equal(shape_of(fx).stat.blocks, 13);
    assert_int_equal(shape_of(fx).stat.segments, 2);
    check_context(fx, "ten", 1, 13, 2);
    check_context(fx, "six", 1, 6, 5);
    assert_int_equal(ranges_of(fx, "ten", one), 2);
    assert_int_equal(ranges_of(fx, "six", two), 1);
    assert_int_equal(one[0].segment, two[0].segment); /* one copy of what both hold */
    assert_int_equal(one[0].count, 10);
    assert_int_equal(two[0].count, 6);
    assert_int_not_equal(one[0].segment, parent); /* other blocks, so another id, and no old one */
    assert_true(one[0].segment > own);
    assert_int_equal(one[1].segment, own); /* referred to whole: as it was */
    assert_int_equal(segment_info(fx, one[0].segment, &st).references, 2);
    assert_int_equal(st, CAIRN_OK);
    segment_info(fx, parent, &st);
    assert_int_equal(st, CAIRN_NOT_FOUND);
    check_store_is_sound(fx);
    /* whoever could append can, and only to what is its own */
    assert_ok(cairn_writer_begin(fx->store, "ten", &writer));
    fixture_commit(fx, writer, 1, 13, 2, 0, NULL);
    cairn_writer_end(writer);
    assert_int_equal(ranges_of(fx, "ten", one), 2);
    check_context(fx, "ten", 1, 15, 0);
    assert_ok(cairn_writer_begin(fx->store, "six", &writer));
    fixture_commit(fx, writer, 1, 6, 2, 0, NULL);
    cairn_writer_end(writer);
    assert_int_equal(ranges_of(fx, "six", two), 2);
    check_context(fx, "six", 1, 8, 0);
    check_store_is_sound(fx);
    fixture_free(fx);
}

static void ids_are_never_used_twice_across_a_compact(void **state)
{
    (void)state;
    fixture *fx = fixture_new(TINY);
    uint64_t id, again;
    uint64_t first = fixture_context(fx, "a", 1, 2, 0);
    uint64_t second = fixture_context(fx, "b", 2, 2, 0);
    assert_ok(cairn_context_create(fx->store, "c", &id));
    assert_ok(cairn_context_drop(fx->store, "c"));
    assert_ok(cairn_context_drop(fx->store, "b"));
    assert_ok(cairn_context_drop(fx->store, "a"));
    assert_ok(cairn_store_compact(fx->store, NULL, NULL)); /* of an empty store */
    assert_int_equal(shape_of(fx).stat.segments, 0);
    assert_ok(cairn_context_create(fx->store, "d", &again));
    assert_true(again > id);
    uint64_t third = fixture_context(fx, "e", 3, 1, 0);
    assert_true(third > second && second > first);
    fixture_free(fx);
}

static void a_fetch_that_was_there_before_reads_on_after(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    uint64_t fork;
    fixture_context(fx, "a", 1, 6, 0);
    fixture_context(fx, "b", 2, 6, 0);
    assert_ok(cairn_context_fork(fx->store, "a", "half", 3 * 63, &fork));
    assert_ok(cairn_context_drop(fx->store, "a"));
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        cairn_fetch *fetch = NULL;
        assert_ok(cairn_fetch_new(fx->store, (cairn_fetch_mode)mode, 1 << 20, &fetch));
        for (int round = 0; round < 2; round++) {
            const char *const names[] = {"half", "b"};
            for (int c = 0; c < 2; c++) {
                cairn_snapshot *snap = NULL;
                cairn_tile_view view;
                cairn_range range[8];
                uint8_t expected[63 * 64 * 2 * 2];
                ranges_of(fx, names[c], range);
                cairn_tile_id tile = {range[0].segment, range[0].first + 2, 1, 3};
                assert_ok(cairn_snapshot_begin(fx->store, &snap));
                assert_ok(cairn_fetch_submit(fetch, snap, &tile, NULL, 1));
                assert_ok(cairn_fetch_wait(fetch, &view));
                fixture_tile(fx, (uint64_t)c + 1, 2, 1, 3, expected);
                assert_memory_equal(view.keys, expected, sizeof expected);
                cairn_snapshot_end(snap);
            }
            assert_ok(cairn_store_compact(fx->store, NULL, NULL));
        }
        cairn_fetch_free(fetch);
    }
    fixture_free(fx);
}

static void an_index_stays_with_what_stays_and_goes_with_what_moves(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    cairn_status st;
    uint64_t id;
    cairn_range range[8];
    uint64_t whole = fixture_context(fx, "whole", 1, 4, 0);
    uint64_t part = fixture_context(fx, "part", 2, 8, 0);
    char path[4096];
    char *files[5];
    const uint64_t segments[5] = {whole, part, 999, whole, whole};
    for (int i = 0; i < 5; i++) {
        assert_ok(cairn_store_index_path(fx->store, segments[i], i == 3 ? 2 : 1, path, sizeof path));
        if (i == 4) strcat(path, "-l0-h0.faiss.new-a1B2c3"); /* what a killed reindex leaves */
        files[i] = strdup(path);
        test_write_file(path, "index", 5);
        if (i >= 2) continue;
        cairn_segment_info info = segment_info(fx, segments[i], &st);
        info.generation = 1;
        info.index_blocks = info.blocks;
        info.index_hash = 42;
        strcpy(info.index_kind, "hnsw");
        strcpy(info.index_made, "hnsw");
        assert_ok(cairn_store_set_index(fx->store, &info));
    }
    assert_ok(cairn_context_fork(fx->store, "part", "fork", 5 * 63, &id));
    assert_ok(cairn_context_drop(fx->store, "part"));
    assert_ok(cairn_store_compact(fx->store, NULL, NULL));
    cairn_segment_info info = segment_info(fx, whole, &st);
    assert_int_equal(st, CAIRN_OK);
    assert_int_equal(info.generation, 1);
    assert_int_equal(info.index_hash, 42);
    assert_int_equal(info.index_blocks, 4);
    ranges_of(fx, "fork", range);
    info = segment_info(fx, range[0].segment, &st);
    assert_int_equal(st, CAIRN_OK);
    assert_int_equal(info.generation, 0);
    assert_int_equal(info.index_blocks, 0);
    assert_string_equal(info.index_made, "");
    assert_string_equal(info.index_kind, "hnsw"); /* the wish stays */
    assert_int_equal(access(files[0], F_OK), 0);
    for (int i = 1; i < 5; i++) assert_int_equal(access(files[i], F_OK), -1);
    for (int i = 0; i < 5; i++) free(files[i]);
    fixture_free(fx);
}

static void compact_follows_no_link_out_of_the_store(void **state)
{
    (void)state;
    fixture *fx = fixture_new(TINY);
    char *index = test_path(fx->path, "index");
    char *outside = test_path(fx->dir, "outside");
    char *file = test_path(outside, "77-1.index");
    fixture_context(fx, "a", 1, 2, 0);
    assert_int_equal(mkdir(outside, 0700), 0);
    test_write_file(file, "mine", 4);
    assert_int_equal(rmdir(index), 0);
    assert_int_equal(symlink(outside, index), 0);
    assert_ok(cairn_store_compact(fx->store, NULL, NULL));
    assert_int_equal(access(file, F_OK), 0);
    free(index);
    free(outside);
    free(file);
    fixture_free(fx);
}

static void compact_needs_the_store_to_itself(void **state)
{
    (void)state;
    fixture *fx = fixture_new(TINY);
    fixture_context(fx, "a", 1, 3, 0);
    cairn_snapshot *snap = NULL;
    cairn_writer *writer = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_store_compact(fx->store, NULL, NULL), CAIRN_BUSY);
    cairn_snapshot_end(snap);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_int_equal(cairn_store_compact(fx->store, NULL, NULL), CAIRN_BUSY);
    cairn_writer_end(writer);
    int ready[2], done[2];
    char byte;
    assert_int_equal(pipe(ready), 0);
    assert_int_equal(pipe(done), 0);
    cairn_store_close(fx->store);
    fx->store = NULL;
    pid_t child = fork();
    if (child == 0) {
        cairn_store_options opt;
        cairn_store_options_init(&opt, sizeof opt);
        opt.read_only = true;
        cairn_store *reader = NULL;
        if (cairn_store_open(fx->path, &opt, &reader) != CAIRN_OK) _exit(1);
        if (write(ready[1], "x", 1) != 1 || read(done[0], &byte, 1) != 1) _exit(2);
        cairn_store_close(reader);
        _exit(0);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    fixture_open(fx, false);
    assert_int_equal(cairn_store_compact(fx->store, NULL, NULL), CAIRN_BUSY);
    char pid[32];
    snprintf(pid, sizeof pid, "%d", (int)child);
    assert_non_null(strstr(cairn_last_error(), pid));
    assert_int_equal(write(done[1], "x", 1), 1);
    int status = 0;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
    assert_ok(cairn_store_compact(fx->store, NULL, NULL));
    check_context(fx, "a", 1, 3, 0);
    for (int i = 0; i < 2; i++) {
        close(ready[i]);
        close(done[i]);
    }
    fixture_free(fx);
}

static void a_compact_that_is_stopped_or_meets_damage_leaves_the_old_store(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    fixture_context(fx, "a", 1, 5, 1);
    uint32_t number = fx->store->env->data.number;
    assert_int_equal(cairn_store_compact(fx->store, stop_at_once, NULL), CAIRN_CANCELLED);
    assert_int_equal(fx->store->env->data.number, number);
    check_context(fx, "a", 1, 5, 1);
    char name[32];
    snprintf(name, sizeof name, "data-%u", number + 1);
    char *left = test_path(fx->path, name);
    assert_int_equal(access(left, F_OK), -1);
    free(left);
    cairn_snapshot *snap = NULL;
    cairn_span record;
    uint64_t offset = 0;
    size_t bytes = 0;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    cairn_range range[8];
    ranges_of(fx, "a", range);
    assert_ok(store_locate(snap, (cairn_tile_id){range[0].segment, 3, 1, 2}, &record));
    assert_true(store_file_offset(fx->store, record, &offset, &bytes));
    cairn_snapshot_end(snap);
    char *path = test_path(fx->store->env->data.path, "data.mdb");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "damage", 6, (off_t)offset + 500), 6);
    close(fd);
    free(path);
    assert_int_equal(cairn_store_compact(fx->store, NULL, NULL), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "block 3 layer 1 head 2"));
    assert_int_equal(fx->store->env->data.number, number);
    fixture_free(fx);
}

/* Killed at a random moment: afterwards every context is there, whichever store it is. */
static void a_compact_killed_at_any_moment_leaves_one_whole_store(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    test_random r = {23};
    uint64_t id;
    fixture_context(fx, "parent", 1, 12, 3);
    fixture_context(fx, "other", 2, 6, 0);
    assert_ok(cairn_context_fork(fx->store, "parent", "fork", 7 * 63, &id));
    assert_ok(cairn_context_drop(fx->store, "parent"));
    unsigned killed = 0, finished = 0;
    uint64_t longest = 30000; /* us; grows and shrinks so that kills and ends both come about */
    for (int round = 0; round < 40; round++) {
        cairn_store_close(fx->store);
        fx->store = NULL;
        pid_t child = fork();
        if (child == 0) {
            fixture_open(fx, false);
            _exit(cairn_store_compact(fx->store, NULL, NULL) == CAIRN_OK ? 0 : 1);
        }
        uint64_t wait_us = test_random_below(&r, (uint32_t)longest);
        const struct timespec pause = {(time_t)(wait_us / 1000000), (long)(wait_us % 1000000) * 1000};
        nanosleep(&pause, NULL);
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) {
            killed++;
            longest += longest / 4;
        } else {
            assert_int_equal(status, 0);
            finished++;
            longest = longest > 2000 ? longest - longest / 4 : longest;
        }
        fixture_open(fx, false);
        check_context(fx, "fork", 1, 7, 0);
        check_context(fx, "other", 2, 6, 0);
        check_store_is_sound(fx);
    }
    assert_true(killed >= 5 && finished >= 5);
    /* nothing is left lying about but the store in force */
    char *twin = test_path(fx->path, "current.new");
    assert_int_equal(access(twin, F_OK), -1);
    free(twin);
    for (uint32_t n = 1; n < fx->store->env->data.number + 3; n++) {
        char name[32];
        snprintf(name, sizeof name, "data-%u", n);
        char *dir = test_path(fx->path, name);
        assert_int_equal(access(dir, F_OK), n == fx->store->env->data.number ? 0 : -1);
        free(dir);
    }
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(compact_returns_the_space_of_what_was_dropped),
        cmocka_unit_test(compact_keeps_only_the_ranges_forks_refer_to_and_shares_them_still),
        cmocka_unit_test(ids_are_never_used_twice_across_a_compact),
        cmocka_unit_test(a_fetch_that_was_there_before_reads_on_after),
        cmocka_unit_test(an_index_stays_with_what_stays_and_goes_with_what_moves),
        cmocka_unit_test(compact_follows_no_link_out_of_the_store),
        cmocka_unit_test(compact_needs_the_store_to_itself),
        cmocka_unit_test(a_compact_that_is_stopped_or_meets_damage_leaves_the_old_store),
        cmocka_unit_test(a_compact_killed_at_any_moment_leaves_one_whole_store),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
