/* test_store_ahead.c - read-ahead of landmark records and of tiles' leaves: which pages hold a range, and that they
 * come into memory. */
#include "store_fixture.h"

#include <pages.h>
#include <store_internal.h>

#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static const cairn_geometry small = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 32, .block_tokens = 7, .dtype = CAIRN_F16};
/* Landmark records of 16 KiB, which LMDB keeps beside its leaves. */
static const cairn_geometry wide = {
    .layers = 16, .first_layer = 0, .kv_heads = 8, .head_dim = 64, .block_tokens = 1, .dtype = CAIRN_F16};

typedef struct pages_found {
    uint64_t page[4096];
    size_t n, most;
} pages_found;

static bool take(void *arg, cairn_span key, uint64_t page)
{
    pages_found *found = arg;
    assert_true(found->n < 4096);
    assert_true(key.bytes == 0 || key.bytes == KEY_BLOCK_BYTES);
    found->page[found->n++] = page;
    return found->n < found->most;
}

static void trees_of(cairn_snapshot *snap, page_file *file, page_tree trees[DB_COUNT])
{
    const store_data *data = &snap->store->env->data;
    assert_ok(page_file_peek(data->fd, data->path, file));
    assert_ok(page_file_at(file, mdb_txn_id(snap->txn)));
    assert_ok(store_trees(file, trees, NULL, NULL));
}

/* The root of a tree, a branch page, with bounds that cannot be. */
static void damage_root(cairn_snapshot *snap, store_db db)
{
    const store_data *data = &snap->store->env->data;
    page_file file;
    page_tree trees[DB_COUNT];
    trees_of(snap, &file, trees);
    assert_true(trees[db].depth >= 2);
    char *path = test_path(data->path, "data.mdb");
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    const uint64_t far = UINT64_MAX;
    assert_int_equal(pwrite(fd, &far, 4, (off_t)(trees[db].root * data->page_bytes + 12)), 4);
    close(fd);
    free(path);
}

static void end_damaged(fixture *fx, cairn_snapshot *snap)
{
    cairn_snapshot_end(snap);
    cairn_store_close(fx->store);
    fx->store = NULL;
    fixture_free(fx);
}

static cairn_status leaves(cairn_snapshot *snap, uint64_t segment, uint32_t first, uint32_t last, pages_found *out)
{
    page_file file;
    page_tree trees[DB_COUNT];
    uint8_t low[KEY_BLOCK_BYTES], high[KEY_BLOCK_BYTES];
    store_key_block(low, segment, first);
    store_key_block(high, segment, last);
    trees_of(snap, &file, trees);
    out->n = 0;
    return page_leaves(&file, "landmark", &trees[DB_LANDMARK], (cairn_span){low, sizeof low},
                       (cairn_span){high, sizeof high}, take, out);
}

/* The page a small record lies in, by LMDB's own answer. */
static uint64_t page_of(cairn_snapshot *snap, uint64_t segment, uint32_t block)
{
    uint8_t key[KEY_BLOCK_BYTES];
    cairn_span record;
    uint64_t offset;
    size_t bytes;
    store_key_block(key, segment, block);
    assert_ok(store_get(snap->store, snap->txn, snap->file_bytes, DB_LANDMARK, key, sizeof key, &record));
    assert_true(store_file_offset(snap->store, record, &offset, &bytes));
    return offset / snap->store->env->data.page_bytes;
}

static void the_leaves_of_a_range_are_those_that_hold_its_records(void **state)
{
    (void)state;
    enum { SEGMENTS = 3, BLOCKS = 700 };
    fixture *fx = fixture_new(small);
    cairn_snapshot *snap = NULL;
    uint64_t segment[SEGMENTS];
    static const char *const names[SEGMENTS] = {"a", "b", "c"};
    for (int i = 0; i < SEGMENTS; i++) segment[i] = fixture_context(fx, names[i], (uint64_t)i + 1, BLOCKS, 0);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    static pages_found found;
    found.most = SIZE_MAX;
    static const uint32_t ranges[][2] = {{0, BLOCKS - 1}, {0, 0}, {BLOCKS - 1, BLOCKS - 1}, {100, 350}, {17, 18}};
    for (int s = 0; s < SEGMENTS; s++)
        for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++) {
            assert_ok(leaves(snap, segment[s], ranges[r][0], ranges[r][1], &found));
            size_t at = 0; /* every record lies in one of them, in their order */
            for (uint32_t b = ranges[r][0]; b <= ranges[r][1]; b++) {
                uint64_t page = page_of(snap, segment[s], b);
                while (at < found.n && found.page[at] != page) at++;
                if (at == found.n)
                    fail_msg("block %u is on page %llu, which is not there", b, (unsigned long long)page);
            }
            assert_true(found.n - at <= 1); /* and the last ones, but for one whose least key is beyond, are theirs */
            size_t first = 0;
            while (found.page[first] != page_of(snap, segment[s], ranges[r][0])) first++;
            assert_true(first <= 1);
        }
    found.most = 2;
    assert_ok(leaves(snap, segment[0], 0, BLOCKS - 1, &found));
    assert_int_equal(found.n, 2);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void a_damaged_branch_page_is_an_error_and_nothing_worse(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    cairn_snapshot *snap = NULL;
    uint64_t segment = fixture_context(fx, "a", 1, 700, 0);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    static pages_found found;
    found.most = SIZE_MAX;
    damage_root(snap, DB_LANDMARK);
    assert_int_equal(leaves(snap, segment, 0, 699, &found), CAIRN_CORRUPT);
    end_damaged(fx, snap);
}

static bool resident(const store_data *data, uint64_t page)
{
    unsigned char in_memory = 0;
    assert_int_equal(mincore((void *)(uintptr_t)(data->base + page * data->page_bytes), data->page_bytes, &in_memory),
                     0);
    return (in_memory & 1) != 0;
}

/* A store opened anew, none of whose landmark pages is mapped yet, and its file dropped from memory; false where files
 * live in memory. */
static bool cool(fixture *fx, cairn_snapshot **snap, uint64_t some_page)
{
    cairn_store_close(fx->store);
    fixture_open(fx, false);
    const store_data *data = &fx->store->env->data;
    char *path = test_path(data->path, "data.mdb");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fsync(fd), 0);
    assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    close(fd);
    free(path);
    assert_ok(cairn_snapshot_begin(fx->store, snap));
    return !resident(data, some_page);
}

static bool count_up(void *arg, uint32_t block, cairn_span payload)
{
    uint32_t *n = arg;
    (void)payload;
    assert_int_equal(block, *n);
    ++*n;
    return true;
}

static void cold_records_come_into_memory_before_they_are_read(void **state)
{
    (void)state;
    static const cairn_geometry *const geometries[] = {&small, &wide};
    for (int g = 0; g < 2; g++) {
        fixture *fx = fixture_new(*geometries[g]);
        cairn_snapshot *snap = NULL;
        uint64_t segment = fixture_context(fx, "a", 1, 300, 0), pages[300];
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        for (uint32_t b = 0; b < 300; b++) pages[b] = page_of(snap, segment, b);
        cairn_snapshot_end(snap);
        if (!cool(fx, &snap, pages[150])) {
            cairn_snapshot_end(snap);
            fixture_free(fx);
            skip(); /* this file system keeps files in memory */
        }
        store_ahead *ahead = store_ahead_new(snap, segment, 0, 300);
        assert_non_null(ahead);
        store_ahead_at(ahead, 0);
        store_ahead_seen(ahead, 0, cairn_landmark_payload_bytes(&fx->geometry));
        store_ahead_at(ahead, 1);
        const store_data *data = &fx->store->env->data;
        for (int wait = 0; wait < 2000 && !(resident(data, pages[150]) && resident(data, pages[299])); wait++)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        assert_true(resident(data, pages[150]));
        assert_true(resident(data, pages[299]));
        store_ahead_free(ahead);
        uint32_t n = 0;
        assert_ok(cairn_snapshot_landmarks(snap, segment, 0, 300, count_up, &n));
        assert_int_equal(n, 300);
        cairn_snapshot_end(snap);
        fixture_free(fx);
    }
}

/* How often the kernel has to read the file while these tiles are looked up. */
static long reads_of_lookups(cairn_snapshot *snap, const cairn_tile_id *ids, size_t n)
{
    struct rusage before, after;
    cairn_span record;
    assert_int_equal(getrusage(RUSAGE_SELF, &before), 0);
    for (size_t i = 0; i < n; i++) assert_ok(store_locate(snap, ids[i], &record));
    assert_int_equal(getrusage(RUSAGE_SELF, &after), 0);
    return after.ru_majflt - before.ru_majflt;
}

static void cold_leaves_of_tiles_come_into_memory_before_they_are_looked_up(void **state)
{
    (void)state;
    enum { BLOCKS = 700, TILES = 40 };
    fixture *fx = fixture_new(small);
    cairn_snapshot *snap = NULL;
    const uint64_t segment = fixture_context(fx, "a", 1, BLOCKS, 0);
    cairn_tile_id ids[TILES];
    for (uint32_t i = 0; i < TILES; i++)
        ids[i] = (cairn_tile_id){segment, (i * 17 + 9) % TILES * 17, (uint16_t)(1 + i % 2), (uint16_t)(i / 2 % 2)};
    (void)cool(fx, &snap, 2);
    if (reads_of_lookups(snap, ids, TILES) < TILES / 4) {
        cairn_snapshot_end(snap);
        fixture_free(fx);
        skip(); /* this file system keeps files in memory */
    }
    long reads = LONG_MAX;
    for (int tries = 0; tries < 5 && reads > 2; tries++) { /* how long the disk takes is not ours to say */
        cairn_snapshot_end(snap);
        (void)cool(fx, &snap, 2);
        store_leaves *leaves = store_leaves_new(fx->store);
        assert_non_null(leaves);
        store_leaves_announce(leaves, snap, ids, TILES);
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        reads = reads_of_lookups(snap, ids, TILES);
        for (int again = 0; again < 600; again++)
            store_leaves_announce(leaves, snap, ids, TILES); /* none is cold now */
        store_leaves_free(leaves);
    }
    assert_true(reads <= 2); /* the pages above them */
    store_leaves_announce(NULL, snap, ids, TILES);
    cairn_snapshot_end(snap);
    fixture_free(fx);
}

static void leaves_that_cannot_be_found_are_not_announced(void **state)
{
    (void)state;
    fixture *fx = fixture_new(small);
    cairn_snapshot *snap = NULL;
    const uint64_t segment = fixture_context(fx, "a", 1, 700, 0);
    const cairn_tile_id ids[] = {
        {segment, 3, 1, 0}, {segment, 300, 2, 1}, {segment, 699, 1, 1}, {segment + 9, 1, 1, 0}};
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    damage_root(snap, DB_TILE);
    store_leaves *leaves = store_leaves_new(fx->store);
    assert_non_null(leaves);
    for (int i = 0; i < 3; i++) store_leaves_announce(leaves, snap, ids, sizeof ids / sizeof *ids);
    store_leaves_free(leaves);
    end_damaged(fx, snap);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_leaves_of_a_range_are_those_that_hold_its_records),
        cmocka_unit_test(a_damaged_branch_page_is_an_error_and_nothing_worse),
        cmocka_unit_test(cold_records_come_into_memory_before_they_are_read),
        cmocka_unit_test(cold_leaves_of_tiles_come_into_memory_before_they_are_looked_up),
        cmocka_unit_test(leaves_that_cannot_be_found_are_not_announced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
