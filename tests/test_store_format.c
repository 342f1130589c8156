/* test_store_format.c - the bytes on disk are those docs/format.md draws: read by LMDB and libxxhash alone, with the
 * page's numbers and none of the store's code; and a store written when this was format 1 is still read. */
#include "store_fixture.h"

#include <errno.h>
#include <lmdb.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

static const cairn_geometry tiny = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 8, .block_tokens = 5, .dtype = CAIRN_Q8};

static uint64_t le(const uint8_t *p, unsigned bytes)
{
    uint64_t v = 0;
    for (unsigned i = bytes; i-- > 0;) v = v << 8 | p[i];
    return v;
}

typedef struct raw {
    MDB_env *env;
    MDB_txn *txn;
} raw;

static raw raw_open(const char *store)
{
    raw r;
    char *path = test_path(store, "data-1");
    assert_int_equal(mdb_env_create(&r.env), 0);
    assert_int_equal(mdb_env_set_maxdbs(r.env, 8), 0);
    assert_int_equal(mdb_env_open(r.env, path, MDB_RDONLY | MDB_NOLOCK, 0), 0);
    assert_int_equal(mdb_txn_begin(r.env, NULL, MDB_RDONLY, &r.txn), 0);
    free(path);
    return r;
}

static void raw_close(raw r)
{
    mdb_txn_abort(r.txn);
    mdb_env_close(r.env);
}

/* The value of a key, as LMDB has it. */
static const uint8_t *record(raw r, const char *db, const void *key, size_t key_bytes, size_t *bytes)
{
    MDB_dbi dbi;
    MDB_val k = {key_bytes, (void *)(uintptr_t)key}, v;
    assert_int_equal(mdb_dbi_open(r.txn, db, 0, &dbi), 0);
    if (mdb_get(r.txn, dbi, &k, &v) != 0) fail_msg("no such record in '%s'", db);
    *bytes = v.mv_size;
    return v.mv_data;
}

/* XXH3-64 over all bytes but [from, to). */
static uint64_t hash_without(const uint8_t *p, size_t bytes, size_t from, size_t to)
{
    uint8_t *joined = malloc(bytes);
    memcpy(joined, p, from);
    memcpy(joined + from, p + to, bytes - to);
    uint64_t hash = XXH3_64bits(joined, bytes - (to - from));
    free(joined);
    return hash;
}

static void every_record_has_the_bytes_the_format_page_draws(void **state)
{
    (void)state;
    fixture *fx = fixture_new(tiny);
    uint8_t expected[512];
    size_t n;
    cairn_segment_info index = {.id = 1, .generation = 7, .index_blocks = 2, .index_hash = 0x1122334455667788};
    fixture_context(fx, "name", 1, 3, 2);
    strcpy(index.index_kind, "auto");
    strcpy(index.index_made, "scan");
    strcpy(index.index_why, "small");
    assert_ok(cairn_store_set_index(fx->store, &index));
    assert_ok(cairn_context_fork(fx->store, "name", "\xc3\xa9", 12, NULL));
    cairn_store_close(fx->store);
    fx->store = NULL;
    raw r = raw_open(fx->path);

    const uint8_t *p = record(r, "meta", "store", 5, &n);
    assert_int_equal(n, 136);
    assert_memory_equal(p, "CRNS", 4);
    static const uint32_t identity[] = {1, 3, 1, 2, 8, 5, 3}; /* format, layers, first_layer, heads, D, C, dtype */
    for (size_t i = 0; i < 7; i++) assert_int_equal(le(p + 4 + 4 * i, 4), identity[i]);
    assert_int_equal(le(p + 32, 8), 0x1234);
    assert_string_equal((const char *)p + 40, "fixture");
    assert_int_equal(p[110] >> 4, 4); /* uuid version */
    assert_true(le(p + 120, 8) > 1700000000ull * 1000000000);
    assert_int_equal(le(p + 128, 8), XXH3_64bits(p, 128));

    p = record(r, "meta", "ids", 3, &n);
    assert_int_equal(n, 24);
    assert_int_equal(le(p, 8), 3);
    assert_int_equal(le(p + 8, 8), 2);
    assert_int_equal(le(p + 16, 8), XXH3_64bits(p, 16));

    p = record(r, "name", "\xc3\xa9", 2, &n);
    assert_int_equal(n, 8);
    assert_int_equal(le(p, 8), 2);

    p = record(r, "context", "\0\0\0\0\0\0\0\1", 8, &n);
    assert_int_equal(n, 96 + 16 + 4 * 2 + 4);
    assert_memory_equal(p, "CRNC\1\0\4\0", 8);
    static const uint64_t first[] = {1, 0, 1};
    for (size_t i = 0; i < 3; i++) assert_int_equal(le(p + 8 + 8 * i, 8), first[i]); /* id, parent, own */
    assert_int_equal(le(p + 64, 8), 17);
    static const uint32_t counts[] = {0, 1, 2, 0}; /* flags, ranges, tail, reserved */
    for (size_t i = 0; i < 4; i++) assert_int_equal(le(p + 72 + 4 * i, 4), counts[i]);
    assert_int_equal(le(p + 88, 8), hash_without(p, n, 88, 96));
    assert_memory_equal(p + 96, "\1\0\0\0\0\0\0\0\0\0\0\0\3\0\0\0", 16);
    cairn_token tail[2];
    fixture_tokens(1, 15, tail, 2);
    assert_int_equal(le(p + 112, 4), tail[0]);
    assert_int_equal(le(p + 116, 4), tail[1]);
    assert_memory_equal(p + 120, "name", 4);

    p = record(r, "context", "\0\0\0\0\0\0\0\2", 8, &n); /* the fork: 2 blocks, 2 tokens of the third */
    assert_int_equal(le(p + 16, 8), 1);
    assert_int_equal(le(p + 24, 8), 0);
    assert_memory_equal(p + 96, "\1\0\0\0\0\0\0\0\0\0\0\0\2\0\0\0", 16);
    fixture_tokens(1, 10, tail, 2);
    assert_int_equal(le(p + 112, 4), tail[0]);

    p = record(r, "segment", "\0\0\0\0\0\0\0\1", 8, &n);
    assert_int_equal(n, 352);
    assert_memory_equal(p, "CRNG\1\0\0\0", 8);
    assert_int_equal(le(p + 8, 8), 1);  /* id */
    assert_int_equal(le(p + 16, 8), 1); /* owner */
    assert_int_equal(le(p + 24, 4), 3); /* blocks */
    assert_int_equal(le(p + 28, 4), 2); /* references */
    assert_int_equal(le(p + 32, 8), 7);
    assert_int_equal(le(p + 40, 4), 2);
    assert_int_equal(le(p + 48, 8), 0x1122334455667788);
    assert_string_equal((const char *)p + 56, "auto");
    assert_string_equal((const char *)p + 120, "scan");
    assert_string_equal((const char *)p + 184, "small");
    assert_int_equal(le(p + 344, 8), XXH3_64bits(p, 344));

    p = record(r, "tokens", "\0\0\0\0\0\0\0\1\0\0\0\2", 12, &n);
    assert_int_equal(n, 32 + 4 * 5);
    assert_memory_equal(p, "CRNK\1\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\5\0\0\0", 24);
    assert_int_equal(le(p + 24, 8), hash_without(p, n, 24, 32));
    cairn_token tokens[5];
    fixture_tokens(1, 10, tokens, 5);
    assert_memory_equal(p + 32, tokens, sizeof tokens);

    p = record(r, "landmark", "\0\0\0\0\0\0\0\1\0\0\0\2", 12, &n);
    assert_int_equal(n, 48 + 2 * 2 * 8 * 2);
    assert_memory_equal(p, "CRNL\1\0\1\0\1\0\0\0\0\0\0\0\2\0\0\0\2\0\2\0\10\0\0\0\0\0\0\0", 32);
    assert_int_equal(le(p + 32, 8), hash_without(p, n, 32, 48));
    assert_int_equal(le(p + 40, 8), 0);
    fixture_landmarks(fx, 1, 2, expected);
    assert_memory_equal(p + 48, expected, n - 48);

    p = record(r, "tile", "\0\0\0\0\0\0\0\1\0\0\0\2\0\2\0\1", 16, &n);
    size_t payload = 2 * 5 * 8 + 4 * (8 + 5);
    assert_int_equal(n, 2048); /* half a page */
    assert_memory_equal(p, "CRNT\1\0\3\0\2\0\1\0\5\0\10\0", 16);
    assert_int_equal(le(p + 16, 8), 10); /* first_token */
    assert_int_equal(le(p + 24, 8), payload);
    assert_int_equal(le(p + 32, 8), hash_without(p, n, 32, 48));
    assert_int_equal(le(p + 40, 8), 0);
    fixture_tile(fx, 1, 2, 2, 1, expected);
    assert_memory_equal(p + 48, expected, payload);
    for (size_t i = 48 + payload; i < n; i++) assert_int_equal(p[i], 0);
    assert_int_equal(((uintptr_t)p - 16) % 4096, 0);
    raw_close(r);
    fixture_open(fx, false);
    fixture_free(fx);
}

/* ---- a store from the past ---- */

static void copy_file(const char *from_dir, const char *to_dir, const char *name)
{
    size_t n;
    char *from = test_path(from_dir, name), *to = test_path(to_dir, name);
    void *bytes = test_read_file(from, &n);
    if (bytes == NULL) fail_msg("%s: %s", from, strerror(errno));
    test_write_file(to, bytes, n);
    free(bytes), free(from), free(to);
}

/* tests/data/store-format1 was written by this program with CAIRN_WRITE_GOLDEN set to its path. */
static void write_golden(const char *path)
{
    fixture fx = {.path = (char *)(uintptr_t)path, .geometry = tiny};
    fixture_open(&fx, false);
    fixture_context(&fx, "docs/caf\xc3\xa9.txt", 21, 3, 4);
    assert_ok(cairn_context_fork(fx.store, "docs/caf\xc3\xa9.txt", "fork", 13, NULL));
    cairn_store_close(fx.store);
}

static void a_store_written_as_format_1_is_read_verified_and_extended(void **state)
{
    (void)state;
    const char *golden = getenv("CAIRN_WRITE_GOLDEN");
    if (golden != NULL) write_golden(golden);
    fixture *fx = calloc(1, sizeof *fx);
    fx->geometry = tiny;
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "store");
    char *data = test_path(fx->path, "data-1");
    assert_int_equal(mkdir(fx->path, 0700), 0);
    assert_int_equal(mkdir(data, 0700), 0);
    copy_file(CAIRN_TEST_DATA "/store-format1", fx->path, "current");
    copy_file(CAIRN_TEST_DATA "/store-format1", fx->path, "data-1/data.mdb");
    free(data);
    cairn_snapshot *snap;
    cairn_context_info info;
    cairn_writer *writer;
    fixture_open(fx, true);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "docs/caf\xc3\xa9.txt", 21, 0, 3);
    fixture_check_blocks(fx, snap, "fork", 21, 0, 2);
    assert_ok(cairn_snapshot_context(snap, "fork", &info));
    assert_int_equal(info.tail_tokens, 3);
    cairn_snapshot_end(snap);
    assert_ok(cairn_writer_begin(fx->store, "fork", &writer));
    fixture_commit(fx, writer, 22, 2, 2, 0, NULL);
    cairn_writer_end(writer);
    assert_ok(cairn_context_drop(fx->store, "docs/caf\xc3\xa9.txt"));
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_record_has_the_bytes_the_format_page_draws),
        cmocka_unit_test(a_store_written_as_format_1_is_read_verified_and_extended),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
