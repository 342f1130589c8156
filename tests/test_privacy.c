/* test_privacy.c - who may read what Cairn writes, where names may lead, and what a stranger's names do to a terminal.
 */
#include "command.h"
#include "tiny_model.h"

#include <cairn/cairn.h>

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct place {
    char *dir, *model_path, *store_path;
    cairn_model *model;
    cairn_store *store;
} place;

static place place_new(void)
{
    place p = {.dir = test_make_dir()};
    tiny_model m = tiny_model_default();
    p.model_path = test_path(p.dir, "model.gguf");
    p.store_path = test_path(p.dir, "store");
    tiny_model_write(&m, p.model_path);
    assert_ok(cairn_model_open(p.model_path, &p.model));
    return p;
}

static void place_open(place *p)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.no_sync = true;
    opt.map_bytes = 1 << 28;
    cairn_model_geometry(p->model, CAIRN_F16, &opt.geometry);
    assert_ok(cairn_model_identity(p->model, &opt.model));
    assert_ok(cairn_store_open(p->store_path, &opt, &p->store));
}

static void place_free(place *p)
{
    cairn_store_close(p->store);
    cairn_model_close(p->model);
    free(p->model_path);
    free(p->store_path);
    test_remove_dir(p->dir);
}

/* A context of the bytes of a text. */
static void ingest(place *p, const char *context, const char *text)
{
    cairn_session *session;
    cairn_runtime *rt;
    cairn_session_options opt;
    cairn_token tokens[1024];
    size_t n;
    assert_ok(cairn_model_encode(p->model, text, strlen(text), tokens, 1024, &n));
    assert_true(n <= 1024);
    assert_ok(cairn_context_create(p->store, context, NULL));
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(p->model));
    opt.threads = 1;
    opt.write = true;
    assert_ok(cairn_session_begin(p->store, cairn_model_shape(p->model), &context, 1, &opt, &session));
    assert_ok(cairn_runtime_begin(p->model, session, 4, &rt));
    assert_ok(cairn_runtime_feed(rt, tokens, n, NULL));
    assert_ok(cairn_session_commit(session, NULL));
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

/* ---- modes ---- */

static size_t seen;

static int is_private(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)at;
    mode_t wanted = type == FTW_D ? 0700 : 0600;
    seen++;
    if ((st->st_mode & 07777) != wanted) fail_msg("%s has mode %04o", path, st->st_mode & 07777);
    return 0;
}

static void everything_that_is_written_is_private_whatever_the_umask(void **state)
{
    (void)state;
    static const mode_t masks[] = {0, 022, 0777};
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        place p = place_new();
        char *file = test_path(p.dir, "book.cairn"), *saved = test_path(p.dir, "saved.gguf"),
             *checkpoint = test_path(p.dir, "checkpoint"), *text = test_path(p.dir, "text");
        cairn_writer *writer;
        cairn_corpus *corpus;
        cairn_trainer *trainer;
        cairn_trainer_options o;
        cairn_train_stage stage;
        tiny_model m = tiny_model_default();
        test_write_file(text, file, strlen(file)); /* the tests' own: modes of these are not looked at */
        char *padded = calloc(1, 4096);
        assert_non_null(padded);
        memset(padded, 'x', 4095);
        test_write_file(text, padded, 4095);
        free(padded);
        mode_t old = umask(masks[i]);
        place_open(&p);
        ingest(&p, "book", "some text that is somewhat longer than a block of seven tokens");
        assert_ok(cairn_context_reindex(p.store, cairn_model_shape(p.model), "book", "flat", NULL, NULL));
        assert_ok(cairn_context_export(p.store, "book", file, NULL, NULL));
        assert_ok(cairn_context_import(p.store, file, "again", NULL, NULL));
        assert_ok(cairn_store_compact(p.store, NULL, NULL));
        assert_ok(cairn_writer_begin(p.store, "book", &writer)); /* a lease */
        tiny_model_write(&m, saved);
        assert_ok(cairn_corpus_open((const char *const[]){text}, 1, 0, &corpus));
        cairn_trainer_options_init(&o, sizeof o);
        o.threads = 1, o.width = 16, o.layers = 1, o.heads = 1, o.kv_heads = 1, o.head_dim = 8, o.hidden = 16;
        o.block_tokens = 7;
        cairn_train_stage_init(&stage);
        stage.steps = 1, stage.window = 32, stage.windows = 1;
        assert_ok(cairn_trainer_new(&o, NULL, corpus, &stage, 1, &trainer));
        assert_ok(cairn_trainer_save(trainer, checkpoint));
        umask(old);
        seen = 0;
        assert_int_equal(nftw(p.store_path, is_private, 16, FTW_PHYS), 0);
        assert_true(seen >= 14); /* directories, data, locks, a lease, an index of four files and its manifest */
        assert_int_equal(nftw(file, is_private, 16, FTW_PHYS), 0);
        assert_int_equal(nftw(saved, is_private, 16, FTW_PHYS), 0);
        assert_int_equal(nftw(checkpoint, is_private, 16, FTW_PHYS), 0);
        cairn_trainer_free(trainer);
        cairn_corpus_close(corpus);
        cairn_writer_end(writer);
        free(file);
        free(saved);
        free(checkpoint);
        free(text);
        place_free(&p);
    }
}

static void an_export_is_not_written_into_a_file_somebody_else_made(void **state)
{
    (void)state;
    place p = place_new();
    char *file = test_path(p.dir, "book.cairn"), *beside = NULL;
    size_t n;
    place_open(&p);
    ingest(&p, "book", "text");
    /* Where the export is put together before it takes its name. */
    assert_true(asprintf(&beside, "%s.part-%ld", file, (long)getpid()) > 0);
    test_write_file(beside, "mine", 4);
    FILE *held = fopen(beside, "rb");
    assert_non_null(held);
    assert_int_equal(chmod(beside, 0666), 0);
    assert_ok(cairn_context_export(p.store, "book", file, NULL, NULL));
    char letter[64];
    assert_int_equal(fread(letter, 1, sizeof letter, held), 4); /* what it had open shows nothing of the export */
    fclose(held);
    assert_int_equal(nftw(file, is_private, 16, FTW_PHYS), 0);
    char *bytes = test_read_file(file, &n);
    assert_non_null(bytes);
    assert_true(n > 200);
    free(bytes);
    free(beside);
    free(file);
    place_free(&p);
}

/* ---- names ---- */

static uint64_t tree_hash; /* of all paths but those in it that a store is made of anyway */
static const char *tree_root;

static int add_path(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    const char *rest = path + strlen(tree_root);
    if (strstr(rest, "/lease/") == NULL) tree_hash += cairn_hash64(rest, strlen(rest));
    return 0;
}

static uint64_t paths_below(const char *dir)
{
    tree_hash = 0;
    tree_root = dir;
    assert_int_equal(nftw(dir, add_path, 16, FTW_PHYS), 0);
    return tree_hash;
}

static void names_never_become_paths(void **state)
{
    (void)state;
    static const char *const names[] = {"../outside", "/tmp/outside", "a/../../outside", ".",
                                        "..",         "index/x",      "data-1",          "current",
                                        "lock",       "-rf",          "$(boom)",         "a;b|c"};
    place p = place_new();
    char *file = test_path(p.dir, "book.cairn");
    place_open(&p);
    ingest(&p, "book", "some text that is somewhat longer than a block");
    assert_ok(cairn_context_export(p.store, "book", file, NULL, NULL));
    uint64_t before = paths_below(p.dir);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        cairn_writer *writer;
        char other[64];
        snprintf(other, sizeof other, "%s/renamed", names[i]);
        assert_ok(cairn_context_fork(p.store, "book", names[i], UINT64_MAX, NULL));
        assert_ok(cairn_writer_begin(p.store, names[i], &writer));
        assert_int_equal(paths_below(p.dir), before);
        cairn_writer_end(writer);
        assert_ok(cairn_context_reindex(p.store, cairn_model_shape(p.model), names[i], "scan", NULL, NULL));
        assert_ok(cairn_context_rename(p.store, names[i], other));
        assert_ok(cairn_context_import(p.store, file, names[i], NULL, NULL));
        assert_int_equal(paths_below(p.dir), before);
        assert_ok(cairn_context_drop(p.store, names[i]));
        assert_ok(cairn_context_drop(p.store, other));
    }
    assert_int_equal(paths_below(p.dir), before);
    free(file);
    place_free(&p);
}

static void names_of_4_KiB_and_with_control_characters_are_refused_by_every_call(void **state)
{
    (void)state;
    place p = place_new();
    char *file = test_path(p.dir, "book.cairn"), longest[4097];
    memset(longest, 'n', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    const char *const names[] = {longest, "a\x1b[31m", "\r", "a\tb", "\x01", "", "a\xc2\x9b", "\xff"};
    place_open(&p);
    ingest(&p, "book", "text");
    assert_ok(cairn_context_export(p.store, "book", file, NULL, NULL));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_int_equal(cairn_context_create(p.store, names[i], NULL), CAIRN_INVALID);
        assert_int_equal(cairn_context_fork(p.store, "book", names[i], UINT64_MAX, NULL), CAIRN_INVALID);
        assert_int_equal(cairn_context_rename(p.store, "book", names[i]), CAIRN_INVALID);
        assert_int_equal(cairn_context_import(p.store, file, names[i], NULL, NULL), CAIRN_INVALID);
        assert_true(strlen(cairn_last_error()) < 200);
    }
    cairn_store_stat stat;
    assert_ok(cairn_store_stat_get(p.store, &stat));
    assert_int_equal(stat.contexts, 1);
    free(file);
    place_free(&p);
}

static void no_name_of_a_stranger_drives_the_terminal(void **state)
{
    (void)state;
    place p = place_new();
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    cairn_model_geometry(p.model, CAIRN_F16, &opt.geometry);
    opt.model = (cairn_model_id){.fingerprint = 7, .name = "\x1b]0;boo\x07\x1b[2J\xc2\x9b"};
    assert_ok(cairn_store_open(p.store_path, &opt, &p.store));
    cairn_store_close(p.store);
    p.store = NULL;
    char *missing = test_path(p.dir, "\x1b[5m.txt");
    const outcome *o = cairn_run("ask", p.store_path, "-m", p.model_path, "-c", "x", "y");
    assert_code(o, 1);
    assert_says(o->err, "belongs to model '?]0;boo??[2J?'");
    assert_null(strchr(o->err, '\x1b'));
    o = cairn_run("stat", p.store_path);
    assert_code(o, 0);
    assert_null(strchr(o->out, '\x1b'));
    o = cairn_run("ingest", p.store_path, "-m", p.model_path, "-c", "x", missing);
    assert_code(o, 1);
    assert_null(strchr(o->err, '\x1b'));
    o = cairn_run("stat", p.store_path, "\x1b[5m");
    assert_null(strchr(o->err, '\x1b'));
    command_done();
    free(missing);
    place_free(&p);
}

/* ---- what stays on disk ---- */

static bool found; /* anywhere */
static const char *wanted;

static int search_file(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)at;
    if (type != FTW_F) return 0;
    size_t n;
    char *bytes = test_read_file(path, &n);
    assert_non_null(bytes);
    found = found || memmem(bytes, n, wanted, strlen(wanted)) != NULL;
    free(bytes);
    return 0;
}

static bool on_disk(const char *store, const char *text)
{
    found = false;
    wanted = text;
    assert_int_equal(nftw(store, search_file, 16, FTW_PHYS), 0);
    return found;
}

static void after_compact_no_byte_is_left_of_what_was_dropped(void **state)
{
    (void)state;
    static const char name[] = "a name nobody else has";
    place p = place_new();
    place_open(&p);
    ingest(&p, "book", "a text that stays here for good");
    ingest(&p, name, "the secret of the other text");
    assert_true(on_disk(p.store_path, name));
    /* The first block's ids as they lie in its record: "the sec", a token 3 more than its byte. */
    char ids[7 * 4 + 1];
    for (size_t i = 0; i < 7; i++) cairn_put_le32(ids + 4 * i, 3u + (uint8_t) "the sec"[i]);
    cairn_range range;
    cairn_context_info info;
    cairn_snapshot *snap;
    cairn_tile_view view;
    size_t n;
    assert_ok(cairn_snapshot_begin(p.store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_ok(cairn_snapshot_ranges(snap, info.id, &range, 1, &n));
    assert_ok(cairn_snapshot_tile(snap, (cairn_tile_id){range.segment, 1, 1, 0}, &view));
    uint8_t tile[128];
    memcpy(tile, view.keys, sizeof tile);
    cairn_snapshot_end(snap);
    assert_ok(cairn_context_drop(p.store, name));
    assert_ok(cairn_store_compact(p.store, NULL, NULL));
    assert_false(on_disk(p.store_path, name));
    char *data = test_path(p.store_path, "data-2/data.mdb");
    uint8_t *bytes = test_read_file(data, &n);
    assert_non_null(bytes);
    assert_null(memmem(bytes, n, tile, sizeof tile));
    assert_null(memmem(bytes, n, ids, sizeof ids - 1));
    assert_non_null(memmem(bytes, n, "book", 4));
    free(bytes);
    free(data);
    place_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everything_that_is_written_is_private_whatever_the_umask),
        cmocka_unit_test(an_export_is_not_written_into_a_file_somebody_else_made),
        cmocka_unit_test(names_never_become_paths),
        cmocka_unit_test(names_of_4_KiB_and_with_control_characters_are_refused_by_every_call),
        cmocka_unit_test(no_name_of_a_stranger_drives_the_terminal),
        cmocka_unit_test(after_compact_no_byte_is_left_of_what_was_dropped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
