/* test_archive.c - contexts as files, and stores compacted. */
#include "store_fixture.h"

#include <store_internal.h>

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const cairn_geometry TINY = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16};
static const cairn_geometry PLAIN = {
    .layers = 2, .first_layer = 0, .kv_heads = 4, .head_dim = 64, .block_tokens = 63, .dtype = CAIRN_BF16};

typedef struct shape { /* of a store, to see that nothing changed */
    cairn_store_stat stat;
    uint64_t names;
} shape;

static bool hash_name(void *arg, const cairn_context_info *info)
{
    uint64_t *sum = arg;
    *sum = *sum * 31 + cairn_hash64(info->name, strlen(info->name)) + info->blocks + info->tail_tokens;
    return true;
}

static shape shape_of(fixture *fx)
{
    shape s = {0};
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_store_stat_get(fx->store, &s.stat));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_contexts(snap, hash_name, &s.names));
    cairn_snapshot_end(snap);
    return s;
}

static void check_unchanged(fixture *fx, const shape *before)
{
    shape now = shape_of(fx);
    assert_int_equal(now.stat.contexts, before->stat.contexts);
    assert_int_equal(now.stat.segments, before->stat.segments);
    assert_int_equal(now.stat.blocks, before->stat.blocks);
    assert_int_equal(now.stat.tiles, before->stat.tiles);
    assert_int_equal(now.names, before->names);
}

/* A context holds blocks [0, blocks) of the stream and then `tail` of its tokens. */
static void check_context(fixture *fx, const char *name, uint64_t seed, uint64_t blocks, uint32_t tail)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    cairn_token found[64];
    cairn_token expected[64];
    size_t n = 0;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_int_equal(info.blocks, blocks);
    assert_int_equal(info.tail_tokens, tail);
    fixture_check_blocks(fx, snap, name, seed, 0, blocks);
    assert_ok(cairn_snapshot_tail(snap, info.id, found, 64, &n));
    assert_int_equal(n, tail);
    fixture_tokens(seed, blocks * fx->geometry.block_tokens, expected, tail);
    assert_memory_equal(found, expected, tail * sizeof *found);
    cairn_snapshot_end(snap);
}

static void check_store_is_sound(fixture *fx)
{
    cairn_verify_report report;
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, &report));
    assert_int_equal(report.damaged, 0);
}

static cairn_context_info info_of(fixture *fx, const char *name)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    cairn_snapshot_end(snap);
    return info;
}

static bool stop_at_once(void *arg, uint64_t done, uint64_t total)
{
    (void)arg, (void)done, (void)total;
    return false;
}

typedef struct progress_seen {
    uint64_t calls, last, total;
} progress_seen;

static bool watch(void *arg, uint64_t done, uint64_t total)
{
    progress_seen *seen = arg;
    seen->calls++;
    assert_true(done >= seen->last && done <= total);
    seen->last = done;
    seen->total = total;
    return true;
}

/* ---- export and import ---- */

static void a_context_comes_back_bit_for_bit_in_another_store(void **state)
{
    (void)state;
    for (int dtype = CAIRN_F32; dtype <= CAIRN_Q8; dtype++)
        for (int size = 0; size <= 1; size++) {
            cairn_geometry g = size ? PLAIN : TINY;
            g.dtype = (cairn_dtype)dtype;
            fixture *from = fixture_new(g);
            fixture *to = fixture_new(g);
            char *file = test_path(from->dir, "a.cairn");
            cairn_input input = {.bytes = 12345, .hash = 0xabcdef, .complete = true};
            uint64_t id;
            cairn_writer *writer = NULL;
            progress_seen seen = {0};
            assert_ok(cairn_context_create(from->store, "ein Käse/1", &id));
            assert_ok(cairn_writer_begin(from->store, "ein Käse/1", &writer));
            fixture_commit(from, writer, 3, 0, 7, 2, &input);
            cairn_writer_end(writer);
            fixture_context(to, "other", 4, 2, 1);
            assert_ok(cairn_context_export(from->store, "ein Käse/1", file, watch, &seen));
            assert_true(seen.calls == 7);
            cairn_geometry peeked;
            cairn_model_id model;
            cairn_context_info info;
            assert_ok(cairn_export_peek(file, &peeked, &model, &info));
            assert_memory_equal(&peeked, &g, sizeof g);
            assert_int_equal(model.fingerprint, 0x1234);
            assert_string_equal(model.name, "fixture");
            assert_string_equal(info.name, "ein Käse/1");
            assert_int_equal(info.blocks, 7);
            assert_int_equal(info.tokens, 7 * g.block_tokens + 2);
            assert_int_equal(info.input.bytes, 12345);
            assert_true(info.input.complete);
            assert_ok(cairn_context_import(to->store, file, NULL, NULL, NULL)); /* its own name */
            memset(&seen, 0, sizeof seen);
            assert_ok(cairn_context_import(to->store, file, "renamed", watch, &seen));
            assert_int_equal(seen.last <= seen.total, 1);
            check_context(to, "ein Käse/1", 3, 7, 2);
            check_context(to, "renamed", 3, 7, 2);
            check_context(to, "other", 4, 2, 1);
            info = info_of(to, "renamed");
            assert_int_equal(info.input.bytes, 12345);
            assert_int_equal(info.input.hash, 0xabcdef);
            assert_int_equal(info.input.done_tokens, 7 * g.block_tokens + 2);
            assert_true(info.input.complete);
            assert_int_equal(shape_of(to).stat.contexts, 3); /* nothing unfinished is left */
            check_store_is_sound(to);
            free(file);
            fixture_free(from);
            fixture_free(to);
        }
}

static void a_file_exported_again_from_where_it_was_imported_is_the_same(void **state)
{
    (void)state;
    fixture *from = fixture_new(PLAIN);
    fixture *to = fixture_new(PLAIN);
    char *one = test_path(from->dir, "one");
    char *two = test_path(from->dir, "two");
    size_t n, m;
    fixture_context(from, "a", 9, 5, 3);
    fixture_context(to, "before", 1, 3, 0); /* other ids there */
    assert_ok(cairn_context_export(from->store, "a", one, NULL, NULL));
    assert_ok(cairn_context_import(to->store, one, NULL, NULL, NULL));
    assert_ok(cairn_context_export(to->store, "a", two, NULL, NULL));
    uint8_t *a = test_read_file(one, &n);
    uint8_t *b = test_read_file(two, &m);
    assert_int_equal(n, m);
    size_t header = cairn_get_le32(a + 12); /* times differ there, and in the hash over all */
    assert_memory_equal(a + header, b + header, n - header - 8);
    struct stat st;
    assert_int_equal(stat(one, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    free(a);
    free(b);
    free(one);
    free(two);
    fixture_free(from);
    fixture_free(to);
}

static void a_fork_is_exported_with_what_it_shares(void **state)
{
    (void)state;
    fixture *fx = fixture_new(PLAIN);
    uint64_t id;
    cairn_writer *writer = NULL;
    char *file = test_path(fx->dir, "fork");
    fixture_context(fx, "a", 5, 6, 0);
    assert_ok(cairn_context_fork(fx->store, "a", "b", 4 * 63, &id));
    assert_ok(cairn_writer_begin(fx->store, "b", &writer));
    fixture_commit(fx, writer, 5, 4, 5, 7, NULL); /* goes on as the stream would */
    cairn_writer_end(writer);
    assert_int_equal(info_of(fx, "b").ranges, 2);
    assert_ok(cairn_context_export(fx->store, "b", file, NULL, NULL));
    assert_ok(cairn_context_import(fx->store, file, "c", NULL, NULL));
    assert_int_equal(info_of(fx, "c").ranges, 1);
    check_context(fx, "c", 5, 9, 7);
    free(file);
    fixture_free(fx);
}

static void a_context_of_no_blocks_is_exported_too(void **state)
{
    (void)state;
    fixture *fx = fixture_new(TINY);
    char *file = test_path(fx->dir, "empty");
    uint64_t id;
    assert_ok(cairn_context_create(fx->store, "nothing", &id));
    assert_ok(cairn_context_export(fx->store, "nothing", file, NULL, NULL));
    assert_ok(cairn_context_import(fx->store, file, "nothing again", NULL, NULL));
    check_context(fx, "nothing again", 0, 0, 0);
    fixture_context(fx, "tail", 4, 0, 3);
    assert_ok(cairn_context_export(fx->store, "tail", file, NULL, NULL));
    assert_ok(cairn_context_import(fx->store, file, "tail again", NULL, NULL));
    check_context(fx, "tail again", 4, 0, 3);
    free(file);
    fixture_free(fx);
}

/* A small file, and a store to refuse its damaged twins. */
typedef struct hostile {
    fixture *fx;
    char *file;
    char *bad;
    uint8_t *data;
    size_t bytes;
    shape before;
} hostile;

static hostile hostile_begin(void)
{
    hostile h = {.fx = fixture_new(TINY)};
    h.file = test_path(h.fx->dir, "good");
    h.bad = test_path(h.fx->dir, "bad");
    fixture_context(h.fx, "a", 6, 2, 3);
    assert_ok(cairn_context_export(h.fx->store, "a", h.file, NULL, NULL));
    h.data = test_read_file(h.file, &h.bytes);
    h.before = shape_of(h.fx);
    return h;
}

static void hostile_end(hostile *h)
{
    check_unchanged(h->fx, &h->before);
    assert_ok(cairn_context_import(h->fx->store, h->file, "good", NULL, NULL)); /* the witness */
    free(h->file);
    free(h->bad);
    free(h->data);
    fixture_free(h->fx);
}

static void refuse(hostile *h, const uint8_t *data, size_t bytes)
{
    unlink(h->bad); /* a new file each time: ext4 writes one that was cut to disk at once */
    test_write_file(h->bad, data, bytes);
    cairn_status st = cairn_context_import(h->fx->store, h->bad, "bad", NULL, NULL);
    if (st != CAIRN_CORRUPT && st != CAIRN_INVALID && st != CAIRN_UNSUPPORTED && st != CAIRN_MISMATCH)
        fail_msg("%s: %s", cairn_status_name(st), cairn_last_error());
    assert_non_null(strstr(cairn_last_error(), h->bad));
}

static void every_truncation_is_refused_and_the_store_unchanged(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    for (size_t n = 0; n < h.bytes; n++) {
        refuse(&h, h.data, n);
    }
    hostile_end(&h);
}

static void every_flipped_byte_is_refused_and_the_store_unchanged(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    test_random r = {17};
    for (size_t i = 0; i < h.bytes; i++) {
        uint8_t flip = (uint8_t)(1u << test_random_below(&r, 8));
        h.data[i] ^= flip;
        refuse(&h, h.data, h.bytes);
        h.data[i] ^= flip;
    }
    hostile_end(&h);
}

static void bytes_after_the_end_are_refused(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    uint8_t *longer = malloc(h.bytes + 5000);
    memcpy(longer, h.data, h.bytes);
    memset(longer + h.bytes, 0, 5000);
    for (size_t n = 1; n <= 5000; n += 833) {
        refuse(&h, longer, h.bytes + n);
    }
    free(longer);
    hostile_end(&h);
}

/* The header's hash made right again: what the fields themselves may say. */
static void lying_headers_are_refused(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    size_t header = cairn_get_le32(h.data + 12);
    static const struct {
        size_t at;
        uint64_t value;
        size_t bytes;
    } lies[] = {{8, 2, 4},
                {12, 0, 4},
                {12, 1 << 30, 4},
                {16, UINT64_MAX, 8},
                {24, 0, 4},
                {24, 5000, 4},
                {24, 4, 4},
                {28, 3, 4},
                {32, 1025, 4},
                {36, 3, 4},
                {36, UINT32_MAX, 4},
                {40, 0, 4},
                {40, 4097, 4},
                {44, 2, 4},
                {44, 9, 4},
                {48, 7, 8},
                {120, 3, 8},
                {120, UINT64_MAX, 8},
                {120, 1ull << 33, 8},
                {128, 5, 4},
                {128, UINT32_MAX, 4},
                {132, 0, 4},
                {132, 481, 4},
                {132, UINT32_MAX, 4},
                {168, 2, 4},
                {172, 1, 4},
                {176, 1, 8},
                {176, UINT64_MAX, 8},
                {192, 0xffffffff, 4},
                {204, 7, 1}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t *copy = malloc(h.bytes);
        memcpy(copy, h.data, h.bytes);
        for (size_t b = 0; b < lies[i].bytes; b++) copy[lies[i].at + b] = (uint8_t)(lies[i].value >> 8 * b);
        cairn_put_le64(copy + 184, cairn_hash64_two(copy, 184, copy + 192, header - 192));
        cairn_put_le64(copy + h.bytes - 8, cairn_hash64(copy, h.bytes - 8));
        refuse(&h, copy, h.bytes);
        free(copy);
    }
    hostile_end(&h);
}

static void a_damaged_tile_is_named(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    size_t header = cairn_get_le32(h.data + 12);
    size_t block = cairn_get_le64(h.data + 176);
    size_t tile = 48 + fixture_tile_bytes(h.fx);
    h.data[header + 2 * block - tile + 50] ^= 1; /* the last tile of block 1 */
    test_write_file(h.bad, h.data, h.bytes);
    assert_int_equal(cairn_context_import(h.fx->store, h.bad, "bad", NULL, NULL), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "block 1 layer 2 head 1"));
    hostile_end(&h);
}

static void what_is_not_an_export_is_refused_by_name(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    refuse(&h, (const uint8_t *)"GGUF, not an export", 19);
    assert_int_equal(cairn_export_peek(h.bad, NULL, NULL, NULL), CAIRN_INVALID);
    assert_int_equal(cairn_export_peek("/nonexistent/file", NULL, NULL, NULL), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_context_import(h.fx->store, h.fx->dir, "bad", NULL, NULL), CAIRN_INVALID);
    unlink(h.bad);
    assert_int_equal(mkfifo(h.bad, 0600), 0); /* must not wait for somebody to write */
    assert_int_equal(cairn_context_import(h.fx->store, h.bad, "bad", NULL, NULL), CAIRN_INVALID);
    hostile_end(&h);
}

static void a_store_of_another_shape_or_model_is_named_beside_the_files(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    cairn_geometry g = TINY;
    g.kv_heads = 3;
    fixture *other = fixture_new(g);
    assert_int_equal(cairn_context_import(other->store, h.file, "x", NULL, NULL), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "2 KV heads"));
    assert_non_null(strstr(cairn_last_error(), "3 KV heads"));
    fixture_free(other);
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.geometry = TINY;
    opt.model = (cairn_model_id){.fingerprint = 0x77, .name = "somebody else"};
    char *path = test_path(h.fx->dir, "else");
    cairn_store *store = NULL;
    assert_ok(cairn_store_open(path, &opt, &store));
    assert_int_equal(cairn_context_import(store, h.file, "x", NULL, NULL), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "somebody else"));
    assert_non_null(strstr(cairn_last_error(), "fixture"));
    cairn_store_close(store);
    free(path);
    hostile_end(&h);
}

static void names_that_are_taken_and_contexts_that_are_not_there(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    assert_int_equal(cairn_context_import(h.fx->store, h.file, NULL, NULL, NULL), CAIRN_EXISTS);
    assert_int_equal(cairn_context_import(h.fx->store, h.file, "a\nb", NULL, NULL), CAIRN_INVALID);
    assert_int_equal(cairn_context_export(h.fx->store, "no such", h.bad, NULL, NULL), CAIRN_NOT_FOUND);
    assert_int_equal(access(h.bad, F_OK), -1);
    assert_int_not_equal(cairn_context_export(h.fx->store, "a", "/nonexistent/dir/file", NULL, NULL), CAIRN_OK);
    hostile_end(&h);
}

static void who_is_stopped_leaves_nothing(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    assert_int_equal(cairn_context_export(h.fx->store, "a", h.bad, stop_at_once, NULL), CAIRN_CANCELLED);
    assert_int_equal(access(h.bad, F_OK), -1);
    assert_int_equal(cairn_context_import(h.fx->store, h.file, "bad", stop_at_once, NULL), CAIRN_CANCELLED);
    hostile_end(&h);
}

static bool stop_late(void *arg, uint64_t done, uint64_t total)
{
    (void)arg;
    return done * 4 < total * 3; /* in the second walk, when blocks enter */
}

static void an_import_stopped_half_way_leaves_the_store_as_it_was(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    assert_int_equal(cairn_context_import(h.fx->store, h.file, "bad", stop_late, NULL), CAIRN_CANCELLED);
    hostile_end(&h);
}

static bool kill_late(void *arg, uint64_t done, uint64_t total)
{
    (void)arg;
    if (done * 4 >= total * 3) kill(getpid(), SIGKILL);
    return true;
}

static void an_import_killed_half_way_can_be_done_again(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    cairn_store_close(h.fx->store);
    h.fx->store = NULL;
    pid_t child = fork();
    if (child == 0) {
        fixture_open(h.fx, false);
        cairn_context_import(h.fx->store, h.file, "killed", kill_late, NULL);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status));
    fixture_open(h.fx, false);
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(h.fx->store, &snap));
    assert_int_equal(cairn_snapshot_context(snap, "killed", &info), CAIRN_NOT_FOUND); /* whole or not at all */
    cairn_snapshot_end(snap);
    assert_ok(cairn_context_import(h.fx->store, h.file, "killed", NULL, NULL));
    check_context(h.fx, "killed", 6, 2, 3);
    assert_int_equal(shape_of(h.fx).stat.contexts, 2); /* what the killed one left is gone */
    assert_ok(cairn_context_drop(h.fx->store, "killed"));
    hostile_end(&h);
}

/* ---- compact ---- */

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
    char *files[3];
    const uint64_t segments[3] = {whole, part, 999};
    for (int i = 0; i < 3; i++) {
        assert_ok(cairn_store_index_path(fx->store, segments[i], 1, path, sizeof path));
        files[i] = strdup(path);
        test_write_file(path, "index", 5);
        if (i == 2) break;
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
    assert_int_equal(access(files[1], F_OK), -1);
    assert_int_equal(access(files[2], F_OK), -1);
    for (int i = 0; i < 3; i++) free(files[i]);
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
        cmocka_unit_test(a_context_comes_back_bit_for_bit_in_another_store),
        cmocka_unit_test(a_file_exported_again_from_where_it_was_imported_is_the_same),
        cmocka_unit_test(a_fork_is_exported_with_what_it_shares),
        cmocka_unit_test(a_context_of_no_blocks_is_exported_too),
        cmocka_unit_test(every_truncation_is_refused_and_the_store_unchanged),
        cmocka_unit_test(every_flipped_byte_is_refused_and_the_store_unchanged),
        cmocka_unit_test(bytes_after_the_end_are_refused),
        cmocka_unit_test(lying_headers_are_refused),
        cmocka_unit_test(a_damaged_tile_is_named),
        cmocka_unit_test(what_is_not_an_export_is_refused_by_name),
        cmocka_unit_test(a_store_of_another_shape_or_model_is_named_beside_the_files),
        cmocka_unit_test(names_that_are_taken_and_contexts_that_are_not_there),
        cmocka_unit_test(who_is_stopped_leaves_nothing),
        cmocka_unit_test(an_import_stopped_half_way_leaves_the_store_as_it_was),
        cmocka_unit_test(an_import_killed_half_way_can_be_done_again),
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
