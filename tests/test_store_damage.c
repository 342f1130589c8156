/* test_store_damage.c - flipped bytes, lost records, torn pages, short files: found, named, survived. */
#include "store_fixture.h"
#include "store_swap.h"

#include <pages.h>
#include <store_internal.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const cairn_geometry tiny = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 8, .block_tokens = 5, .dtype = CAIRN_F16};
static const cairn_geometry usual = {
    .layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 64, .block_tokens = 63, .dtype = CAIRN_Q8};

/* Two contexts and a fork, and something dropped so that the free list is not empty. Segments 1, 2 (freed), 3. */
static fixture *filled(cairn_geometry geometry)
{
    fixture *fx = fixture_new(geometry);
    fixture_context(fx, "one", 1, 12, 3);
    fixture_context(fx, "two", 2, 30, 0);
    fixture_context(fx, "three", 3, 9, 1);
    assert_ok(cairn_context_fork(fx->store, "one", "fork", 4 * geometry.block_tokens + 2, NULL));
    assert_ok(cairn_context_drop(fx->store, "two"));
    return fx;
}

static char *data_path(const fixture *fx)
{
    return test_path(fx->path, "data-1/data.mdb");
}

/* Changes bytes of the data file behind everybody's back. */
static void patch(const fixture *fx, uint64_t offset, const void *bytes, size_t n)
{
    char *path = data_path(fx);
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, bytes, n, (off_t)offset), n);
    close(fd);
    free(path);
}

static void flip(const fixture *fx, uint64_t offset, unsigned bit)
{
    char *path = data_path(fx);
    uint8_t byte;
    int fd = open(path, O_RDWR);
    assert_int_equal(pread(fd, &byte, 1, (off_t)offset), 1);
    byte ^= (uint8_t)(1u << bit);
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)offset), 1);
    close(fd);
    free(path);
}

static uint64_t offset_of(fixture *fx, store_db db, const void *key, size_t key_bytes)
{
    MDB_txn *txn;
    cairn_span record;
    assert_ok(store_read_begin(fx->store, &txn));
    assert_ok(store_get(fx->store, txn, 0, db, key, key_bytes, &record));
    uint64_t at = (uint64_t)((const uint8_t *)record.data - fx->store->env->data.base);
    store_read_end(fx->store, txn);
    return at;
}

typedef struct sentences {
    char text[64][400];
    size_t n;
} sentences;

static void keep(void *arg, const char *sentence)
{
    sentences *s = arg;
    if (s->n < 64) snprintf(s->text[s->n], sizeof s->text[0], "%s", sentence);
    s->n++;
}

static void assert_found(fixture *fx, bool deep, size_t n, const char *words)
{
    sentences *s = calloc(1, sizeof *s);
    cairn_verify_report report;
    cairn_status status = cairn_store_verify(fx->store, deep, keep, NULL, s, &report);
    bool said = false;
    for (size_t i = 0; i < s->n && i < 64; i++) said |= strstr(s->text[i], words) != NULL;
    if (status != CAIRN_CORRUPT || s->n != n || !said) {
        for (size_t i = 0; i < s->n && i < 64; i++) print_error("damage: %s\n", s->text[i]);
        fail_msg("%s, %zu sentences; expected %zu that say '%s'", cairn_status_name(status), s->n, n, words);
    }
    assert_true(report.damaged >= n);
    free(s);
}

static void assert_clean(fixture *fx)
{
    sentences *s = calloc(1, sizeof *s);
    if (cairn_store_verify(fx->store, true, keep, NULL, s, NULL) != CAIRN_OK) fail_msg("%s", s->text[0]);
    free(s);
}

/* ---- flipped bytes ---- */

static void every_flipped_byte_of_a_tile_is_found_and_its_block_layer_and_head_named(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    uint8_t key[KEY_TILE_BYTES];
    test_random random = {7};
    cairn_tile_id id = {3, 7, 1, 1};
    cairn_snapshot *snap;
    cairn_tile_view view;
    store_key_tile(key, id);
    uint64_t at = offset_of(fx, DB_TILE, key, sizeof key);
    size_t bytes = TILE_HEADER_BYTES + fixture_tile_bytes(fx);
    for (size_t i = 0; i < 150; i++) { /* all of the header, then anywhere */
        size_t byte = i < TILE_HEADER_BYTES ? i : test_random_below(&random, (uint32_t)bytes);
        unsigned bit = test_random_below(&random, 8);
        flip(fx, at + byte, bit);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        cairn_status status = cairn_snapshot_tile(snap, id, &view);
        if (status != CAIRN_CORRUPT && status != CAIRN_UNSUPPORTED) fail_msg("byte %zu: %d", byte, (int)status);
        assert_non_null(strstr(cairn_last_error(), "segment 3 block 7 layer 1 head 1"));
        cairn_snapshot_end(snap);
        if (i % 10 == 0) assert_found(fx, true, 1, "segment 3 block 7 layer 1 head 1");
        flip(fx, at + byte, bit);
    }
    assert_clean(fx);
    flip(fx, at + bytes - 1, 0);
    assert_int_equal(cairn_store_verify(fx->store, false, NULL, NULL, NULL, NULL),
                     CAIRN_OK); /* not deep: no payloads */
    fixture_free(fx);
}

static bool never(void *arg, uint32_t block, cairn_span payload)
{
    (void)arg, (void)block, (void)payload;
    fail_msg("a damaged landmark was handed out");
    return true;
}

static void flipped_bytes_of_tokens_and_landmarks_are_found_on_every_read(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    uint8_t key[KEY_BLOCK_BYTES];
    cairn_token tokens[63];
    cairn_snapshot *snap;
    test_random random = {8};
    store_key_block(key, 1, 4);
    uint64_t token_at = offset_of(fx, DB_TOKENS, key, sizeof key);
    uint64_t landmark_at = offset_of(fx, DB_LANDMARK, key, sizeof key);
    for (size_t i = 0; i < 40; i++) {
        uint64_t offset = test_random_below(&random, (uint32_t)store_tokens_bytes(&fx->geometry));
        flip(fx, token_at + offset, 2);
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_int_not_equal(cairn_snapshot_tokens(snap, 1, 4, 1, tokens), CAIRN_OK);
        assert_non_null(strstr(cairn_last_error(), "segment 1 block 4 tokens"));
        assert_found(fx, i % 2 == 0, 1, "segment 1 block 4 tokens");
        flip(fx, token_at + offset, 2);
        offset = test_random_below(&random, (uint32_t)store_landmark_bytes(&fx->geometry));
        flip(fx, landmark_at + offset, 5);
        assert_int_not_equal(cairn_snapshot_landmarks(snap, 1, 4, 1, never, NULL), CAIRN_OK);
        assert_non_null(strstr(cairn_last_error(), "segment 1 block 4 landmark"));
        cairn_snapshot_end(snap);
        assert_found(fx, i % 2 == 0, 1, "segment 1 block 4 landmark");
        flip(fx, landmark_at + offset, 5);
    }
    assert_clean(fx);
    fixture_free(fx);
}

static void flipped_bytes_of_the_small_records_are_found_and_named(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint8_t key[KEY_ID_BYTES];
    cairn_snapshot *snap;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, "three", &info));
    store_key_id(key, info.id);
    uint64_t at = offset_of(fx, DB_CONTEXT, key, sizeof key);
    flip(fx, at + 33, 1);
    assert_int_equal(cairn_snapshot_context(snap, "three", &info), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "context 3"));
    cairn_snapshot_end(snap);
    /* its segment's reference, owner and name are now without witness: four sentences about one byte */
    assert_found(fx, false, 4, "context 3: hash");
    flip(fx, at + 33, 1);
    store_key_id(key, 1);
    at = offset_of(fx, DB_SEGMENT, key, sizeof key);
    flip(fx, at + 25, 0);
    assert_int_equal(cairn_store_verify(fx->store, false, NULL, NULL, NULL, NULL), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "segment 1: hash"));
    flip(fx, at + 25, 0);
    assert_clean(fx);
    at = offset_of(fx, DB_META, "store", 5);
    flip(fx, at + 8, 0);
    assert_found(fx, false, 1, "store record: hash");
    cairn_store_close(fx->store);
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_CORRUPT);
    flip(fx, at + 4, 1); /* format 3 */
    assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_UNSUPPORTED);
    assert_non_null(strstr(cairn_last_error(), "format 3"));
    fixture_free(fx);
}

/* ---- records that are not what the others say ---- */

static void delete_record(fixture *fx, store_db db, const void *key, size_t bytes)
{
    MDB_txn *txn;
    MDB_val k = {bytes, (void *)(uintptr_t)key};
    assert_ok(store_write_begin(fx->store, "test", &txn));
    assert_int_equal(mdb_del(txn, fx->store->env->data.dbi[db], &k, NULL), 0);
    assert_ok(store_write_commit(fx->store, "test", &txn));
}

static void lost_records_are_named_one_by_one_or_as_a_run(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint8_t key[KEY_TILE_BYTES];
    cairn_snapshot *snap;
    cairn_token tokens[5];
    store_key_block(key, 3, 8); /* the last one */
    delete_record(fx, DB_TOKENS, key, KEY_BLOCK_BYTES);
    assert_found(fx, false, 1, "segment 3 block 8 tokens: missing");
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_snapshot_tokens(snap, 3, 8, 1, tokens), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "segment 3 block 8 tokens: missing"));
    cairn_snapshot_end(snap);
    store_key_block(key, 1, 0);
    delete_record(fx, DB_LANDMARK, key, KEY_BLOCK_BYTES);
    assert_found(fx, false, 2, "segment 1 block 0 landmark: missing");
    store_key_tile(key, (cairn_tile_id){1, 5, 2, 1});
    delete_record(fx, DB_TILE, key, KEY_TILE_BYTES);
    assert_found(fx, true, 3, "segment 1 block 5 layer 2 head 1: missing");
    for (uint16_t head = 0; head < 2; head++)
        for (uint16_t layer = 1; layer < 3; layer++) {
            store_key_tile(key, (cairn_tile_id){1, 6, layer, head});
            delete_record(fx, DB_TILE, key, KEY_TILE_BYTES);
        }
    assert_found(fx, true, 3, "segment 1 block 5 layer 2 head 1 to segment 1 block 6 layer 2 head 1: 5 records");
    fixture_free(fx);
}

static void tiles_in_each_others_place_are_found(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    swap_tiles(fx->store, (cairn_tile_id){1, 2, 2, 1}, (cairn_tile_id){1, 5, 2, 1});
    assert_found(fx, true, 3, "segment 1 block 2 layer 2 head 1: begins at token 25, after block 2's 10");
    assert_found(fx, true, 3, "segment 1 block 5 layer 2 head 1: begins at token 10, after block 5's 25");
    fixture_free(fx);
}

static void records_nobody_refers_to_and_wrong_counts_are_named(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint8_t key[KEY_TILE_BYTES], zeros[8] = {0};
    MDB_txn *txn;
    segment_record segment;
    assert_ok(store_write_begin(fx->store, "test", &txn));
    store_key_tile(key, (cairn_tile_id){1, 12, 1, 0});
    MDB_val k = {KEY_TILE_BYTES, key}, v = {8, zeros};
    assert_int_equal(mdb_put(txn, fx->store->env->data.dbi[DB_TILE], &k, &v, 0), 0);
    assert_ok(store_segment_get(fx->store, txn, 3, &segment));
    segment.info.references = 5;
    assert_ok(store_segment_put(fx->store, txn, &segment));
    k = (MDB_val){5, (void *)"ghost"};
    assert_int_equal(mdb_put(txn, fx->store->env->data.dbi[DB_NAME], &k, &v, 0), 0);
    assert_ok(store_write_commit(fx->store, "test", &txn));
    assert_found(fx, false, 3, "segment 1 block 12 layer 1 head 0: belongs to nothing");
    assert_found(fx, false, 3, "segment 3: 5 references recorded, 1 ranges name it");
    assert_found(fx, false, 3, "name 'ghost': its context 0 is missing");
    fixture_free(fx);
}

static void a_drop_that_stopped_half_way_is_not_damage_and_sweep_finishes_it(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    MDB_txn *txn;
    uint8_t key[KEY_ID_BYTES];
    cairn_range range = {3, 0, 9};
    uint64_t dead;
    uint32_t died;
    cairn_store_stat st;
    uint64_t freed;
    /* what drop's first transaction does, and some of what follows it */
    assert_ok(store_write_begin(fx->store, "test", &txn));
    assert_ok(store_segment_count(fx->store, txn, &range, 1, -1, 3, &dead, &died));
    assert_int_equal(died, 1);
    assert_int_equal(dead, 3);
    MDB_val k = {5, (void *)"three"};
    assert_int_equal(mdb_del(txn, fx->store->env->data.dbi[DB_NAME], &k, NULL), 0);
    store_key_id(key, 3);
    k = (MDB_val){sizeof key, key};
    assert_int_equal(mdb_del(txn, fx->store->env->data.dbi[DB_CONTEXT], &k, NULL), 0);
    uint8_t tile[KEY_TILE_BYTES];
    store_key_tile(tile, (cairn_tile_id){3, 0, 1, 0});
    k = (MDB_val){sizeof tile, tile};
    assert_int_equal(mdb_del(txn, fx->store->env->data.dbi[DB_TILE], &k, NULL), 0);
    assert_ok(store_write_commit(fx->store, "test", &txn));
    assert_clean(fx);
    cairn_snapshot *snap;
    cairn_segment_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_snapshot_segment(snap, 3, &info), CAIRN_NOT_FOUND);
    cairn_snapshot_end(snap);
    assert_ok(cairn_store_sweep(fx->store, &freed));
    assert_int_equal(freed, 9);
    assert_ok(cairn_store_stat_get(fx->store, &st));
    assert_int_equal(st.segments, 1);
    assert_int_equal(st.tiles, 12 * 4);
    assert_clean(fx);
    fixture_free(fx);
}

/* ---- pages ---- */

enum { CHILD_OK = 0, CHILD_CORRUPT = 1, CHILD_OTHER = 2 };

/* Opens and verifies in a process of its own: a crash is told from an answer. */
static int open_and_verify(const fixture *fx)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        cairn_store_options opt;
        cairn_store *store;
        cairn_store_options_init(&opt, sizeof opt);
        opt.map_bytes = (uint64_t)1 << 30;
        cairn_status status = cairn_store_open(fx->path, &opt, &store);
        if (status == CAIRN_OK) {
            status = cairn_store_verify(store, true, NULL, NULL, NULL, NULL);
            cairn_store_close(store);
        }
        _exit(status == CAIRN_OK                                       ? CHILD_OK
              : status == CAIRN_CORRUPT || status == CAIRN_UNSUPPORTED ? CHILD_CORRUPT
                                                                       : CHILD_OTHER);
    }
    int how;
    assert_int_equal(waitpid(pid, &how, 0), pid);
    if (!WIFEXITED(how)) fail_msg("killed by signal %d", WTERMSIG(how));
    return WEXITSTATUS(how);
}

static void close_store(fixture *fx)
{
    cairn_store_close(fx->store);
    fx->store = NULL;
}

/* Which pages the trees and large values use, by the walker itself; the flips below are what checks the walker. */
static uint8_t *used_pages(const fixture *fx, uint64_t *last_page)
{
    page_file file;
    page_tree trees[DB_COUNT];
    char *path = data_path(fx);
    int fd = open(path, O_RDONLY);
    const page_visitor nobody = {0};
    assert_ok(page_file_peek(fd, path, &file));
    if (page_file_at(&file, 1) != CAIRN_OK) {} /* any: find the newest transaction below */
    uint64_t txn[2];
    for (int i = 0; i < 2; i++) assert_int_equal(pread(fd, &txn[i], 8, (off_t)i * file.page_bytes + 16 + 128), 8);
    assert_ok(page_file_at(&file, txn[0] > txn[1] ? txn[0] : txn[1]));
    assert_ok(page_file_keep_used(&file));
    assert_ok(store_trees(&file, trees, NULL, NULL));
    for (int db = 0; db < DB_COUNT; db++)
        assert_ok(page_walk(&file, store_db_names[db], &trees[db], PAGE_WALK_ALL, &nobody));
    assert_ok(page_walk(&file, "free", &file.free_tree, PAGE_WALK_NUMBERS, &nobody));
    close(fd);
    free(path);
    *last_page = file.last_page;
    return file.used;
}

static void any_page_overwritten_is_survived_and_found_if_it_was_in_use(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint64_t last;
    size_t found = 0, unused = 0;
    close_store(fx);
    uint8_t *used = used_pages(fx, &last);
    char *path = data_path(fx);
    size_t bytes;
    uint8_t *whole = test_read_file(path, &bytes);
    for (uint64_t page = 0; page <= last && (page + 1) * 4096 <= bytes; page++) {
        uint8_t junk[4096];
        fixture_bytes(page, 5, junk, sizeof junk);
        patch(fx, page * 4096, junk, sizeof junk);
        bool in_use = page < 2 || (used[page >> 3] >> (page & 7) & 1) != 0;
        int answer = open_and_verify(fx);
        if (answer != (in_use ? CHILD_CORRUPT : CHILD_OK))
            fail_msg("page %llu (%s): answer %d", (unsigned long long)page, in_use ? "in use" : "free", answer);
        in_use ? found++ : unused++;
        patch(fx, page * 4096, whole + page * 4096, 4096);
    }
    assert_true(found > 80);
    assert_true(unused > 80); /* the dropped context's */
    assert_int_equal(open_and_verify(fx), CHILD_OK);
    free(whole);
    free(path);
    cairn_free(used);
    fixture_open(fx, false);
    fixture_free(fx);
}

static void bits_flipped_anywhere_in_tree_pages_never_crash_open_or_verify(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint64_t last;
    test_random random = {99};
    size_t corrupt = 0;
    close_store(fx);
    uint8_t *used = used_pages(fx, &last);
    for (int i = 0; i < 300;) {
        uint64_t page = test_random_below(&random, (uint32_t)last + 1);
        if (page >= 2 && (used[page >> 3] >> (page & 7) & 1) == 0) continue;
        /* half of them in the header and the node offsets, where they do most harm */
        uint64_t offset = page * 4096 + test_random_below(&random, i % 2 == 0 ? 40 : 4096);
        unsigned bit = test_random_below(&random, 8);
        flip(fx, offset, bit);
        corrupt += open_and_verify(fx) == CHILD_CORRUPT;
        flip(fx, offset, bit);
        i++;
    }
    assert_true(corrupt > 100);
    assert_int_equal(open_and_verify(fx), CHILD_OK);
    cairn_free(used);
    fixture_open(fx, false);
    fixture_free(fx);
}

static void damage_in_one_place_does_not_hide_the_rest(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint8_t key[KEY_TILE_BYTES], junk[64] = {0};
    store_key_block(key, 1, 0);
    uint64_t leaf = offset_of(fx, DB_TOKENS, key, KEY_BLOCK_BYTES) / 4096 * 4096; /* a leaf page of the token tree */
    store_key_tile(key, (cairn_tile_id){3, 4, 2, 0});
    uint64_t tile = offset_of(fx, DB_TILE, key, KEY_TILE_BYTES);
    patch(fx, leaf, junk, sizeof junk);
    flip(fx, tile + 60, 3);
    sentences *s = calloc(1, sizeof *s);
    cairn_verify_report report;
    assert_int_equal(cairn_store_verify(fx->store, true, keep, NULL, s, &report), CAIRN_CORRUPT);
    assert_non_null(strstr(s->text[0], "of the 'tokens' tree says it is page 0"));
    bool lost = false, tile_named = false;
    for (size_t i = 0; i < s->n; i++) {
        lost |= strstr(s->text[i], "segment 1 block 0 tokens") != NULL;
        tile_named |= strstr(s->text[i], "segment 3 block 4 layer 2 head 0: hash") != NULL;
    }
    assert_true(lost);
    assert_true(tile_named);
    assert_int_equal(report.tiles, 21 * 4);
    free(s);
    fixture_free(fx);
}

static void a_page_that_is_in_use_and_free_is_found(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    uint8_t key[KEY_TILE_BYTES];
    store_key_tile(key, (cairn_tile_id){3, 4, 2, 0});
    uint64_t page = offset_of(fx, DB_TILE, key, KEY_TILE_BYTES) / 4096;
    /* the free list: find a page number in a free record by its neighbourhood, then put ours in its place */
    MDB_txn *txn;
    MDB_cursor *cursor;
    MDB_val k, v;
    uint64_t at = 0;
    assert_ok(store_read_begin(fx->store, &txn));
    assert_int_equal(mdb_cursor_open(txn, 0, &cursor), 0);
    while (at == 0 && mdb_cursor_get(cursor, &k, &v, MDB_NEXT) == 0)
        if (*(uint64_t *)v.mv_data > 0) at = (uint64_t)((uint8_t *)v.mv_data - fx->store->env->data.base) + 8;
    mdb_cursor_close(cursor);
    store_read_end(fx->store, txn);
    assert_true(at > 0);
    patch(fx, at, &page, 8);
    assert_found(fx, false, 1, "is in use, or free twice");
    fixture_free(fx);
}

/* ---- short files ---- */

static void a_truncated_data_file_is_refused_with_both_sizes_wherever_it_ends(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    cairn_store *store;
    struct stat st;
    size_t bytes;
    test_random random = {5};
    close_store(fx);
    char *path = data_path(fx), needle[64];
    uint8_t *whole = test_read_file(path, &bytes);
    for (int i = 0; i < 60; i++) {
        size_t keep_bytes = i < 20 ? bytes * (size_t)i / 20 : test_random_below(&random, (uint32_t)bytes);
        assert_int_equal(truncate(path, (off_t)keep_bytes), 0);
        int answer = open_and_verify(fx);
        if (answer != CHILD_CORRUPT) fail_msg("%zu of %zu bytes: answer %d", keep_bytes, bytes, answer);
        assert_int_equal(cairn_store_open(fx->path, NULL, &store), CAIRN_CORRUPT);
        if (keep_bytes > 0 && strstr(cairn_last_error(), "truncated") == NULL) fail_msg("%s", cairn_last_error());
        snprintf(needle, sizeof needle, "%zu bytes", keep_bytes);
        assert_non_null(strstr(cairn_last_error(), needle));
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_size, keep_bytes); /* looking did not change it */
        test_write_file(path, whole, bytes);
    }
    assert_int_equal(open_and_verify(fx), CHILD_OK);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(cairn_store_open(fx->path, NULL, &store), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "missing"));
    test_write_file(path, whole, bytes);
    free(whole);
    free(path);
    fixture_open(fx, false);
    fixture_free(fx);
}

static void a_file_truncated_while_it_is_open_is_found_before_it_is_touched(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    uint8_t key[KEY_TILE_BYTES];
    cairn_tile_id id = {3, 8, 1, 1}; /* the tile that was written last */
    cairn_snapshot *snap;
    cairn_tile_view view;
    store_key_tile(key, id);
    uint64_t at = offset_of(fx, DB_TILE, key, sizeof key);
    char *path = data_path(fx);
    size_t bytes;
    uint8_t *whole = test_read_file(path, &bytes);
    assert_int_equal(truncate(path, (off_t)at + 200), 0);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_snapshot_tile(snap, id, &view), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "the file has"));
    cairn_snapshot_end(snap);
    assert_int_equal(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL), CAIRN_CORRUPT);
    int fd = open(path, O_WRONLY);
    assert_int_equal(pwrite(fd, whole, bytes, 0), bytes);
    close(fd);
    assert_clean(fx);
    free(whole);
    free(path);
    fixture_free(fx);
}

static bool stop_at_once(void *arg, uint64_t done, uint64_t total)
{
    (void)done;
    assert_true(total > 0);
    *(int *)arg += 1;
    return false;
}

static bool watch(void *arg, uint64_t done, uint64_t total)
{
    uint64_t *last = arg;
    assert_true(done >= *last);
    assert_true(done <= total);
    *last = done == total ? UINT64_MAX / 2 : done; /* nothing may follow the end but the end */
    return true;
}

static void verify_reports_progress_and_stops_when_told(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    int calls = 0;
    uint64_t last = 0;
    assert_int_equal(cairn_store_verify(fx->store, true, NULL, stop_at_once, &calls, NULL), CAIRN_CANCELLED);
    assert_int_equal(calls, 1);
    assert_ok(cairn_store_verify(fx->store, true, NULL, watch, &last, NULL));
    assert_true(last == UINT64_MAX / 2);
    fixture_free(fx);
}

/* ---- what only the structure tells: every record has its hash, and it is the wrong one ---- */

static void patch_everywhere(const fixture *fx, const void *find, size_t n, size_t at, const void *bytes, size_t m)
{
    char *path = data_path(fx);
    size_t size = 0, found = 0;
    uint8_t *file = test_read_file(path, &size);
    for (uint8_t *p = file; (p = memmem(p, size - (size_t)(p - file), find, n)) != NULL; p += n, found++)
        patch(fx, (uint64_t)(p - file) + at, bytes, m);
    assert_true(found > 0);
    free(file);
    free(path);
}

static void a_tile_that_leads_to_another_tile_is_found_at_open(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    uint8_t one[KEY_TILE_BYTES], other[KEY_TILE_BYTES], page[8];
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    store_key_tile(one, (cairn_tile_id){3, 2, 1, 0});
    store_key_tile(other, (cairn_tile_id){3, 6, 1, 0});
    cairn_put_le64(page, offset_of(fx, DB_TILE, other, sizeof other) / 4096);
    close_store(fx);
    patch_everywhere(fx, one, sizeof one, sizeof one, page, sizeof page);
    assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "which something else uses too"));
    fixture_free(fx);
}

static bool any(void *arg, const cairn_context_info *info)
{
    (void)arg, (void)info;
    return true;
}

static void a_name_that_leads_to_another_context_is_corrupt(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    cairn_snapshot *snap;
    cairn_context_info info;
    uint64_t at = offset_of(fx, DB_NAME, "three", 5);
    flip(fx, at, 1); /* 3 -> 1 */
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_int_equal(cairn_snapshot_context(snap, "three", &info), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "name 'three': its context 1 is named 'one'"));
    assert_int_equal(cairn_snapshot_contexts(snap, any, NULL), CAIRN_CORRUPT);
    cairn_snapshot_end(snap);
    assert_int_equal(cairn_context_drop(fx->store, "three"), CAIRN_CORRUPT); /* and not the other one */
    flip(fx, at, 1);
    assert_clean(fx);
    fixture_free(fx);
}

static void a_longer_run_of_pages_behind_a_tile_is_found(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    uint8_t key[KEY_TILE_BYTES];
    store_key_tile(key, (cairn_tile_id){3, 7, 1, 1});
    uint64_t at = offset_of(fx, DB_TILE, key, sizeof key) - 4; /* the run's length: what freeing it would free */
    flip(fx, at, 5);
    assert_found(fx, true, 1, "a run of");
    flip(fx, at, 5);
    assert_clean(fx);
    fixture_free(fx);
}

static void a_key_in_a_branch_page_that_hides_records_is_found(void **state)
{
    (void)state;
    fixture *fx = filled(usual);
    char *path = data_path(fx);
    size_t size = 0;
    uint64_t last = 0, found = 0;
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    close_store(fx);
    uint8_t *file = test_read_file(path, &size), *used = used_pages(fx, &last);
    for (uint64_t page = 2; page <= last && found == 0; page++) {
        const uint8_t *p = file + page * 4096;
        if ((used[page >> 3] & 1u << (page & 7)) == 0 || cairn_get_le64(p) != page || cairn_get_le16(p + 10) != 1)
            continue;
        unsigned node = cairn_get_le16(p + 18), key = cairn_get_le16(p + node + 6);
        if (key != KEY_TILE_BYTES) continue;
        flip(fx, page * 4096 + node + 8 + 7, 6); /* the segment: after all there are */
        found = page;
    }
    assert_true(found > 0);
    assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "before the key that leads to it"));
    cairn_free(used);
    free(file);
    free(path);
    fixture_free(fx);
}

static uint64_t newest_transaction(const fixture *fx)
{
    char *path = data_path(fx);
    uint64_t number[2];
    int fd = open(path, O_RDONLY);
    for (int i = 0; i < 2; i++) assert_int_equal(pread(fd, &number[i], 8, i * 4096 + 144), 8);
    close(fd);
    free(path);
    return number[0] > number[1] ? number[0] : number[1];
}

static void a_flipped_transaction_number_does_not_take_a_commit_back(void **state)
{
    (void)state;
    fixture *fx = filled(tiny);
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    close_store(fx);
    for (unsigned i = 0; i < 4 * 128; i++) { /* in four states, since one number in two has a neighbour one bit away */
        if (i % 128 == 0) {
            char name[16];
            snprintf(name, sizeof name, "c%u", i);
            assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
            assert_ok(cairn_context_create(fx->store, name, NULL));
            close_store(fx);
        }
        uint64_t at = i / 64 % 2 * 4096 + 144 + i % 64 / 8, now = newest_transaction(fx);
        if (i % 64 == 1 && now % 2 == i / 64 % 2 && (now & 2) != 0)
            continue; /* like a meta page that was not written */
        flip(fx, at, i % 8);
        assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_CORRUPT);
        assert_non_null(strstr(cairn_last_error(), "transaction"));
        flip(fx, at, i % 8);
    }
    assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
    assert_clean(fx);
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_name_that_leads_to_another_context_is_corrupt),
        cmocka_unit_test(a_longer_run_of_pages_behind_a_tile_is_found),
        cmocka_unit_test(a_tile_that_leads_to_another_tile_is_found_at_open),
        cmocka_unit_test(a_key_in_a_branch_page_that_hides_records_is_found),
        cmocka_unit_test(a_flipped_transaction_number_does_not_take_a_commit_back),
        cmocka_unit_test(every_flipped_byte_of_a_tile_is_found_and_its_block_layer_and_head_named),
        cmocka_unit_test(flipped_bytes_of_tokens_and_landmarks_are_found_on_every_read),
        cmocka_unit_test(flipped_bytes_of_the_small_records_are_found_and_named),
        cmocka_unit_test(lost_records_are_named_one_by_one_or_as_a_run),
        cmocka_unit_test(tiles_in_each_others_place_are_found),
        cmocka_unit_test(records_nobody_refers_to_and_wrong_counts_are_named),
        cmocka_unit_test(a_drop_that_stopped_half_way_is_not_damage_and_sweep_finishes_it),
        cmocka_unit_test(any_page_overwritten_is_survived_and_found_if_it_was_in_use),
        cmocka_unit_test(bits_flipped_anywhere_in_tree_pages_never_crash_open_or_verify),
        cmocka_unit_test(damage_in_one_place_does_not_hide_the_rest),
        cmocka_unit_test(a_page_that_is_in_use_and_free_is_found),
        cmocka_unit_test(a_truncated_data_file_is_refused_with_both_sizes_wherever_it_ends),
        cmocka_unit_test(a_file_truncated_while_it_is_open_is_found_before_it_is_touched),
        cmocka_unit_test(verify_reports_progress_and_stops_when_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
