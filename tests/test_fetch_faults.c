/* test_fetch_faults.c - damaged tiles, cut files, refused reads: errors that name the tile, and nothing wrong kept. */
#include "fetch_fixture.h"

#include <sys/stat.h>
#include <sys/wait.h>

/* Where a tile's record lies in the data file, and that file. */
static uint64_t tile_offset(fixture *fx, cairn_tile_id id, char **path)
{
    cairn_snapshot *snap = NULL;
    cairn_span record;
    uint64_t offset = 0;
    size_t bytes = 0;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(store_locate(snap, id, &record));
    assert_true(store_file_offset(fx->store, record, &offset, &bytes));
    cairn_snapshot_end(snap);
    *path = test_path(fx->store->env->data.path, "data.mdb");
    return offset + STORE_PAGE_HEADER;
}

static void flip(const char *path, uint64_t offset)
{
    uint8_t byte;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pread(fd, &byte, 1, (off_t)offset), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)offset), 1);
    assert_int_equal(fsync(fd), 0);
    close(fd);
}

static void a_flipped_byte_is_corrupt_and_names_the_tile(void **state)
{
    (void)state;
    for (size_t e = 0; e < sizeof engines / sizeof *engines; e++) {
        if (!use_engine(engines[e])) continue;
        fixture *fx = fixture_new(SMALL);
        uint64_t segment = fixture_context(fx, "a", 15, SMALL_BLOCKS, 0);
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        char *path;
        cairn_tile_id ids[8];
        cairn_tile_view views[8];
        for (size_t i = 0; i < 8; i++) ids[i] = tile_at(fx, segment, 50 + i);
        uint64_t at = tile_offset(fx, ids[3], &path) + 48 + 100;
        flip(path, at);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1 << 20, &fetch));
        char name[64];
        snprintf(name, sizeof name, "segment %llu block %u layer %u head %u", (unsigned long long)segment, ids[3].block,
                 ids[3].layer, ids[3].head);
        for (int again = 0; again < 2; again++) {
            assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 8));
            assert_int_equal(cairn_fetch_wait(fetch, views), CAIRN_CORRUPT);
            assert_non_null(strstr(cairn_last_error(), name));
        }
        assert_int_equal(hits_of(fx, fetch, snap, 15, ids, 3), 3); /* the others of the batch were right */
        flip(path, at);
        assert_int_equal(hits_of(fx, fetch, snap, 15, ids, 8), 7); /* and the damaged one was not kept */
        cairn_fetch_free(fetch);
        cairn_snapshot_end(snap);
        free(path);
        fixture_free(fx);
    }
    unsetenv("CAIRN_FETCH_READER");
}

static void through_the_map_hashes_are_checked_when_the_store_was_opened_so(void **state)
{
    (void)state;
    for (int verify = 0; verify <= 1; verify++) {
        fixture *fx = fixture_new(SMALL);
        uint64_t segment = fixture_context(fx, "a", 16, 2, 0);
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_view view;
        char *path;
        cairn_tile_id id = tile_at(fx, segment, 4);
        uint64_t at = tile_offset(fx, id, &path);
        flip(path, at + 48);
        cairn_store_close(fx->store);
        fixture_open(fx, verify == 1);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_MAP, 0, &fetch));
        assert_ok(cairn_fetch_submit(fetch, snap, &id, NULL, 1));
        assert_int_equal(cairn_fetch_wait(fetch, &view), verify ? CAIRN_CORRUPT : CAIRN_OK);
        cairn_fetch_free(fetch);
        cairn_snapshot_end(snap);
        free(path);
        fixture_free(fx);
    }
}

static void without_options_a_tile_is_checked_when_it_is_first_touched(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 16, 3, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_view views[2];
    char *path;
    cairn_tile_id ids[2] = {tile_at(fx, segment, 4), tile_at(fx, segment, 5)};
    uint64_t at = tile_offset(fx, ids[1], &path);
    cairn_store_close(fx->store);
    assert_ok(cairn_store_open(fx->path, NULL, &fx->store));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_MAP, 0, &fetch));
    assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 1));
    assert_ok(cairn_fetch_wait(fetch, views));
    flip(path, at + 48);
    for (int again = 0; again < 2; again++) { /* a tile that failed is not taken for one that was checked */
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 2));
        assert_int_equal(cairn_fetch_wait(fetch, views), CAIRN_CORRUPT);
    }
    flip(path, at + 48);
    for (int again = 0; again < 2; again++) {
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 2));
        assert_ok(cairn_fetch_wait(fetch, views));
    }
    flip(path, at + 40); /* reserved: headers are looked at each time */
    assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 2));
    assert_int_not_equal(cairn_fetch_wait(fetch, views), CAIRN_OK);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    free(path);
    fixture_free(fx);
}

static void a_file_cut_under_the_reader_is_an_error_and_not_a_signal(void **state)
{
    (void)state;
    for (size_t e = 0; e < sizeof engines / sizeof *engines; e++) {
        if (!use_engine(engines[e])) continue;
        cairn_geometry g = SMALL;
        g.block_tokens = 63;
        g.head_dim = 128; /* eight pages */
        fixture *fx = fixture_new(g);
        uint64_t segment = fixture_context(fx, "a", 17, SMALL_BLOCKS, 0);
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        char *path;
        cairn_tile_id ids[4];
        cairn_tile_view views[4];
        struct stat st;
        for (size_t i = 0; i < 4; i++) ids[i] = tile_at(fx, segment, 40 + i);
        uint64_t at = tile_offset(fx, ids[2], &path);
        assert_int_equal(stat(path, &st), 0);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 4 << 20, &fetch));
        /* lookups happen before the cut; the tree's own pages are LMDB's map and beyond our help */
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 1));
        assert_ok(cairn_fetch_wait(fetch, views));
        char *copy = test_path(fx->dir, "copy");
        size_t bytes;
        void *data = test_read_file(path, &bytes);
        test_write_file(copy, data, bytes);
        free(data);
        /* the descriptor the reader opened is of a file that is cut in the middle of the third tile */
        reader *r;
        int fd = open(copy, O_RDWR | O_CLOEXEC);
        assert_ok(reader_open(fd, &r));
        assert_int_equal(ftruncate(fd, (off_t)(at + 5000)), 0);
        void *memory = NULL;
        assert_int_equal(posix_memalign(&memory, 4096, 4 * 32768), 0);
        struct iovec pieces[4];
        read_job jobs[4] = {0};
        for (size_t i = 0; i < 4; i++) {
            free(path);
            pieces[i] = (struct iovec){(char *)memory + i * 32768, 32768};
            jobs[i] = (read_job){.pieces = &pieces[i],
                                 .n_pieces = 1,
                                 .first = (uint32_t)i,
                                 .bytes = 32768,
                                 .offset = tile_offset(fx, ids[i], &path) - 16};
        }
        reader_start(r, jobs, 4);
        size_t landed = 0;
        for (read_job *job; (job = reader_next(r)) != NULL; landed++) {
            assert_int_equal(job->error, 0);
            uint64_t expected = job->offset + 32768 <= at + 5000 ? 32768
                                : job->offset < at + 5000        ? at + 5000 - job->offset
                                                                 : 0;
            assert_int_equal(job->done, expected);
        }
        assert_int_equal(landed, 4);
        reader_close(r);
        close(fd);
        free(memory);
        free(copy);
        free(path);
        cairn_fetch_free(fetch);
        cairn_snapshot_end(snap);
        fixture_free(fx);
    }
    unsetenv("CAIRN_FETCH_READER");
}

/* In a child, because a signal would end it: the data file itself is cut behind an open store. */
static void a_store_cut_under_a_reading_process_is_an_error_there(void **state)
{
    (void)state;
    cairn_geometry g = SMALL;
    g.block_tokens = 63;
    g.head_dim = 128;
    fixture *fx = fixture_new(g);
    uint64_t segment = fixture_context(fx, "a", 18, SMALL_BLOCKS, 0);
    char *path;
    size_t lowest = 0;
    uint64_t cut = UINT64_MAX;
    for (size_t i = 0; i < SMALL_TILES; i++) { /* where the upper half of the tiles begins */
        uint64_t at = tile_offset(fx, tile_at(fx, segment, i), &path);
        if (i > SMALL_TILES / 2 && at < cut) {
            cut = at;
            lowest = i;
        }
        if (i + 1 < SMALL_TILES) free(path);
    }
    cairn_tile_id id = tile_at(fx, segment, lowest);
    cairn_store_close(fx->store);
    fx->store = NULL;
    pid_t child = fork();
    if (child == 0) {
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_view view;
        cairn_span record;
        fixture_open(fx, false);
        if (cairn_snapshot_begin(fx->store, &snap) != CAIRN_OK) _exit(10);
        if (cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 4 << 20, &fetch) != CAIRN_OK) _exit(11);
        if (store_locate(snap, id, &record) != CAIRN_OK) _exit(12); /* its tree pages are in memory now */
        cairn_status st = cairn_fetch_submit(fetch, snap, &id, NULL, 1);
        if (st != CAIRN_OK || cairn_fetch_wait(fetch, &view) != CAIRN_OK) _exit(13);
        cairn_fetch_free(fetch);
        if (cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 4 << 20, &fetch) != CAIRN_OK) _exit(14);
        if (truncate(path, (off_t)(cut + 4096)) != 0) _exit(15);
        st = cairn_fetch_submit(fetch, snap, &id, NULL, 1);
        if (st == CAIRN_OK) st = cairn_fetch_wait(fetch, &view);
        if (st != CAIRN_IO) _exit(16);
        _exit(strstr(cairn_last_error(), "the file ends") != NULL && strstr(cairn_last_error(), path) != NULL ? 0 : 17);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    /* a lookup after the cut may need a tree page beyond it, which only LMDB's own map can give: then it is SIGBUS and
     * says nothing about the reader; the tree of this small store lies before the cut or was read already */
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    free(path);
    fixture_free(fx);
}

static void a_read_the_system_refuses_says_where_and_why(void **state)
{
    (void)state;
    for (size_t e = 3; e < sizeof engines / sizeof *engines; e++) { /* the buffered ones read by the store's number */
        if (!use_engine(engines[e])) continue;
        fixture *fx = fixture_new(SMALL);
        uint64_t segment = fixture_context(fx, "a", 22, SMALL_BLOCKS, 0);
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_view views[4];
        cairn_tile_id ids[4];
        for (size_t i = 0; i < 4; i++) ids[i] = tile_at(fx, segment, 3 * i);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1 << 20, &fetch));
        fetch_and_check(fx, fetch, snap, 22, ids, NULL, 1);
        int fd = fx->store->env->data.fd;
        int saved = dup(fd);
        int deaf = open("/dev/null", O_WRONLY | O_CLOEXEC); /* reading it is EBADF */
        assert_int_equal(dup2(deaf, fd), fd);
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 4));
        assert_int_equal(cairn_fetch_wait(fetch, views), CAIRN_IO);
        assert_non_null(strstr(cairn_last_error(), "data.mdb: reading 4096 bytes at "));
        assert_non_null(strstr(cairn_last_error(), "Bad file descriptor"));
        assert_non_null(strstr(cairn_last_error(), "layer "));
        assert_int_equal(dup2(saved, fd), fd);
        assert_int_equal(hits_of(fx, fetch, snap, 22, ids, 4), 1); /* only what was read before */
        close(deaf);
        close(saved);
        cairn_fetch_free(fetch);
        cairn_snapshot_end(snap);
        fixture_free(fx);
    }
    unsetenv("CAIRN_FETCH_READER");
}

static void a_ring_that_breaks_is_left_for_plain_reads(void **state)
{
    (void)state;
    if (!use_engine("uring")) skip();
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 23, SMALL_BLOCKS, 0);
    cairn_fetch *fetch = NULL;
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, (i * 41) % SMALL_TILES);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 1 << 20, &fetch));
    fetch_and_check(fx, fetch, snap, 23, ids, NULL, 20);
    int broken = 0;
    for (int fd = 3; fd < 256; fd++) { /* the kernel's side of the ring is gone */
        char link[64], target[256] = {0};
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, target, sizeof target - 1) < 0 || strstr(target, "io_uring") == NULL) continue;
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        assert_int_equal(dup2(null, fd), fd);
        close(null);
        broken++;
    }
    assert_int_equal(broken, 1);
    for (int round = 0; round < 3; round++) fetch_and_check(fx, fetch, snap, 23, ids, NULL, SMALL_TILES);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    fixture_free(fx);
    unsetenv("CAIRN_FETCH_READER");
}

static void a_tile_that_is_not_there_is_named_and_the_next_batch_works(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 19, 4, 0);
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        cairn_fetch *fetch = NULL;
        cairn_tile_id ids[4];
        for (size_t i = 0; i < 4; i++) ids[i] = tile_at(fx, segment, i);
        assert_ok(cairn_fetch_new(fx->store, (cairn_fetch_mode)mode, 1 << 20, &fetch));
        ids[2].block = 4;
        assert_int_equal(cairn_fetch_submit(fetch, snap, ids, NULL, 4), CAIRN_NOT_FOUND);
        assert_non_null(strstr(cairn_last_error(), "block 4 layer 1 head 2"));
        assert_int_equal(cairn_fetch_wait(fetch, NULL), CAIRN_INVALID);
        assert_int_equal(stats_of(fetch).tiles, 0);
        ids[2].block = 3;
        fetch_and_check(fx, fetch, snap, 19, ids, NULL, 4);
        cairn_fetch_free(fetch);
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void a_batch_nobody_waits_for_does_no_harm(void **state)
{
    (void)state;
    for (size_t e = 0; e < sizeof engines / sizeof *engines; e++) {
        if (!use_engine(engines[e])) continue;
        fixture *fx = fixture_new(SMALL);
        uint64_t segment = fixture_context(fx, "a", 20, SMALL_BLOCKS, 0);
        cairn_fetch *fetch = NULL;
        cairn_snapshot *snap = NULL;
        cairn_tile_id ids[SMALL_TILES];
        for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, (i * 37) % SMALL_TILES);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 4 << 20, &fetch));
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, 90)); /* more reads than fly at once */
        assert_ok(cairn_fetch_submit(fetch, snap, ids + 10, NULL, 90));
        fetch_and_check(fx, fetch, snap, 20, ids, NULL, SMALL_TILES);
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, SMALL_TILES));
        assert_ok(cairn_fetch_set_ram(fetch, 2 << 20));
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, SMALL_TILES));
        cairn_fetch_free(fetch);
        assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_READ, 4 << 20, &fetch));
        assert_ok(cairn_fetch_submit(fetch, snap, ids, NULL, SMALL_TILES));
        cairn_fetch_free(fetch);
        cairn_snapshot_end(snap);
        fixture_free(fx);
    }
    unsetenv("CAIRN_FETCH_READER");
}

static void allocations_that_fail_are_errors_and_the_next_batch_works(void **state)
{
    (void)state;
    fixture *fx = fixture_new(SMALL);
    uint64_t segment = fixture_context(fx, "a", 21, SMALL_BLOCKS, 0);
    cairn_snapshot *snap = NULL;
    cairn_tile_id ids[SMALL_TILES];
    cairn_tile_view views[SMALL_TILES];
    for (size_t i = 0; i < SMALL_TILES; i++) ids[i] = tile_at(fx, segment, i);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    for (int mode = CAIRN_FETCH_MAP; mode <= CAIRN_FETCH_READ; mode++) {
        bool done = false;
        for (uint64_t nth = 1; !done; nth++) {
            cairn_fetch *fetch = NULL;
            assert_true(nth < 100);
            cairn_alloc_fail_at(nth);
            cairn_status st = cairn_fetch_new(fx->store, (cairn_fetch_mode)mode, 2 << 20, &fetch);
            if (st == CAIRN_OK) st = cairn_fetch_submit(fetch, snap, ids, NULL, SMALL_TILES);
            if (st == CAIRN_OK) st = cairn_fetch_wait(fetch, views);
            done = st == CAIRN_OK && cairn_alloc_fail_at(0) < nth;
            cairn_alloc_fail_at(0);
            if (!done && st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
            if (fetch != NULL) fetch_and_check(fx, fetch, snap, 21, ids, NULL, SMALL_TILES);
            cairn_fetch_free(fetch);
        }
    }
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_flipped_byte_is_corrupt_and_names_the_tile),
        cmocka_unit_test(through_the_map_hashes_are_checked_when_the_store_was_opened_so),
        cmocka_unit_test(without_options_a_tile_is_checked_when_it_is_first_touched),
        cmocka_unit_test(a_file_cut_under_the_reader_is_an_error_and_not_a_signal),
        cmocka_unit_test(a_store_cut_under_a_reading_process_is_an_error_there),
        cmocka_unit_test(a_read_the_system_refuses_says_where_and_why),
        cmocka_unit_test(a_ring_that_breaks_is_left_for_plain_reads),
        cmocka_unit_test(a_tile_that_is_not_there_is_named_and_the_next_batch_works),
        cmocka_unit_test(a_batch_nobody_waits_for_does_no_harm),
        cmocka_unit_test(allocations_that_fail_are_errors_and_the_next_batch_works),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
