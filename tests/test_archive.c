/* test_archive.c - one context as one file, and back. */
#include "archive_fixture.h"

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

/* Everything right but the place a tile says it has in the stream. */
static void a_tile_of_another_place_is_refused_with_both(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    size_t header = cairn_get_le32(h.data + 12);
    size_t block = cairn_get_le64(h.data + 176);
    size_t bytes = fixture_tile_bytes(h.fx);
    uint8_t *tile = h.data + header + 2 * block - (48 + bytes); /* the last one of block 1 */
    uint64_t first = cairn_get_le64(tile + 16);
    assert_int_equal(first, cairn_store_geometry(h.fx->store)->block_tokens);
    cairn_put_le64(tile + 16, first + 7);
    cairn_put_le64(tile + 32, cairn_hash64_two(tile, 32, tile + 48, bytes));
    cairn_put_le64(h.data + h.bytes - 8, cairn_hash64(h.data, h.bytes - 8));
    refuse(&h, h.data, h.bytes);
    test_write_file(h.bad, h.data, h.bytes);
    assert_int_equal(cairn_context_import(h.fx->store, h.bad, "bad", NULL, NULL), CAIRN_CORRUPT);
    char sentence[100];
    snprintf(sentence, sizeof sentence, "block 1: a tile begins at token %d, expected %d", (int)first + 7, (int)first);
    assert_non_null(strstr(cairn_last_error(), sentence));
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

/* Names do not count in a fingerprint: the same model may be called otherwise where the file was made. */
static void a_file_with_another_name_for_the_same_model_is_taken_and_the_store_keeps_its_own(void **state)
{
    (void)state;
    hostile h = hostile_begin();
    size_t header = cairn_get_le32(h.data + 12), n;
    uint8_t *copy = malloc(h.bytes);
    memcpy(copy, h.data, h.bytes);
    memset(copy + 56, 0, 64);
    memcpy(copy + 56, "elsewhere", 9);
    cairn_put_le64(copy + 184, cairn_hash64_two(copy, 184, copy + 192, header - 192));
    cairn_put_le64(copy + h.bytes - 8, cairn_hash64(copy, h.bytes - 8));
    test_write_file(h.bad, copy, h.bytes);
    cairn_model_id model;
    assert_ok(cairn_export_peek(h.bad, NULL, &model, NULL));
    assert_string_equal(model.name, "elsewhere");
    assert_ok(cairn_context_import(h.fx->store, h.bad, "b", NULL, NULL));
    check_context(h.fx, "b", 6, 2, 3);
    assert_string_equal(cairn_store_model(h.fx->store)->name, "fixture");
    assert_ok(cairn_context_export(h.fx->store, "b", h.bad, NULL, NULL));
    uint8_t *again = test_read_file(h.bad, &n);
    assert_int_equal(n, h.bytes);
    assert_memory_equal(again, h.data, 136); /* the store's name for the model among it; then times */
    assert_memory_equal(again + header, h.data + header, h.bytes - header - 8);
    assert_ok(cairn_context_drop(h.fx->store, "b"));
    free(again);
    free(copy);
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
        cmocka_unit_test(a_tile_of_another_place_is_refused_with_both),
        cmocka_unit_test(what_is_not_an_export_is_refused_by_name),
        cmocka_unit_test(a_store_of_another_shape_or_model_is_named_beside_the_files),
        cmocka_unit_test(a_file_with_another_name_for_the_same_model_is_taken_and_the_store_keeps_its_own),
        cmocka_unit_test(names_that_are_taken_and_contexts_that_are_not_there),
        cmocka_unit_test(who_is_stopped_leaves_nothing),
        cmocka_unit_test(an_import_stopped_half_way_leaves_the_store_as_it_was),
        cmocka_unit_test(an_import_killed_half_way_can_be_done_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
