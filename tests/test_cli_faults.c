/* test_cli_faults.c - the `cairn` command when files, disks and processes go wrong: what it says, which code it ends
 * with, and that nothing which was committed is lost.
 */
#include "command.h"

#include <cairn/cairn.h>

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define QUESTION "\nWhat is the pass key? The pass key is "

enum { TEXT_BYTES = 6000 };

typedef struct fixture {
    char *dir, *text, *store; /* the store is read only by the tests; copies are damaged */
} fixture;

static fixture fx;

static int set_up(void **state)
{
    (void)state;
    fx.dir = test_make_dir();
    fx.text = test_path(fx.dir, "book.txt");
    fx.store = test_path(fx.dir, "undisturbed");
    write_text(fx.text, TEXT_BYTES, "31415", 2000);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", fx.text), 0);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    command_done();
    free(fx.text);
    free(fx.store);
    test_remove_dir(fx.dir);
    return 0;
}

static char *copy_of_store(const char *name)
{
    char *copy = test_path(fx.dir, name), command[1024];
    snprintf(command, sizeof command, "cp -r '%s' '%s'", fx.store, copy);
    assert_int_equal(system(command), 0);
    return copy;
}

static void pause_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* ---- models and texts ---- */

static void a_truncated_model_is_refused_by_name_and_makes_no_store(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *model = test_read_file(DEMO_MODEL, &bytes), *path = test_path(fx.dir, "cut.gguf");
    char *store = test_path(fx.dir, "never");
    assert_non_null(model);
    const size_t cuts[] = {0, 3, 40, 2000, bytes / 2, bytes - 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        test_write_file(path, model, cuts[i]);
        const outcome *o = cairn_run("ingest", store, "-m", path, "-c", "x", fx.text);
        assert_true(o->code == 1 || o->code == 3);
        assert_says(o->err, "cairn ingest: ");
        assert_says(o->err, "cut.gguf");
        assert_int_equal(access(store, F_OK), -1);
    }
    const outcome *o = cairn_run("ask", fx.store, "-m", "/nonexistent.gguf", "-c", "book", "x");
    assert_code(o, 1);
    assert_says(o->err, "/nonexistent.gguf");
    free(model);
    free(path);
    free(store);
}

static void a_model_without_landmarks_cannot_fill_a_store(void **state)
{
    (void)state;
    char *store = test_path(fx.dir, "never");
    const outcome *o = cairn_run("ingest", store, "-m", CAIRN_TEST_DATA "/parity/qwen3-f16.gguf", "-c", "x", fx.text);
    assert_code(o, 1);
    assert_says(o->err, "not a landmark model");
    assert_int_equal(access(store, F_OK), -1);
    free(store);
}

static void another_model_than_the_stores_is_refused_and_both_are_named(void **state)
{
    (void)state;
    const char *other = CAIRN_TEST_DATA "/golden/clamped_forward.gguf";
    static const char *const ways[][4] = {
        {"ingest", "-c", "x", NULL}, {"ask", "-c", "book", "x"}, {"show", "book", NULL}, {"reindex", "-c", "book"}};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        const outcome *o = command_run(NULL, 0,
                                       (const char *const[]){ways[i][0], fx.store, "-m", other, ways[i][1], ways[i][2],
                                                             i == 0 ? fx.text : ways[i][3], NULL});
        assert_code(o, 1);
        assert_says(o->err, "belongs to model 'cairn-tiny' (fingerprint ");
        assert_says(o->err, "not to 'clamped_forward' (");
    }
    const outcome *o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "x", "--dtype", "q8", fx.text);
    assert_code(o, 1);
    assert_says(o->err, "f16");
    assert_null(strstr(cairn_run("list", fx.store)->out, "x "));
}

static void a_text_that_cannot_be_read_is_named_and_makes_no_context(void **state)
{
    (void)state;
    char *copy = copy_of_store("unreadable");
    const outcome *o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "-c", "x", fx.dir);
    assert_code(o, 1);
    assert_says(o->err, "is a directory");
    assert_says(o->err, "--each");
    o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "-c", "x", fx.text, "/nonexistent/text");
    assert_code(o, 1);
    assert_says(o->err, "/nonexistent/text");
    o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "-c", "x", "/proc/self/mem"); /* opens, and fails to read */
    assert_code(o, 1);
    assert_says(o->err, "/proc/self/mem");
    o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "--each", "/nonexistent/corpus");
    assert_code(o, 1);
    assert_says(o->err, "/nonexistent/corpus");
    o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "-c", "bad\nname", fx.text);
    assert_code(o, 1);
    o = cairn_run("list", copy, "--json");
    json_t *root = command_json(o);
    assert_int_equal(json_array_size(json_object_get(root, "contexts")), 1);
    json_decref(root);
    free(copy);
}

static void a_store_that_is_none_is_an_error_in_every_command(void **state)
{
    (void)state;
    char *empty = test_path(fx.dir, "none"), *file = test_path(fx.dir, "a-file");
    test_write_file(file, "text", 4);
    const char *const *lines[] = {
        (const char *const[]){"list", empty, NULL},
        (const char *const[]){"stat", empty, NULL},
        (const char *const[]){"show", empty, "x", NULL},
        (const char *const[]){"fork", empty, "x", "y", NULL},
        (const char *const[]){"drop", empty, "x", NULL},
        (const char *const[]){"rename", empty, "x", "y", NULL},
        (const char *const[]){"verify", empty, NULL},
        (const char *const[]){"compact", empty, NULL},
        (const char *const[]){"export", empty, "x", "f", NULL},
        (const char *const[]){"ask", empty, "-m", DEMO_MODEL, "-c", "x", "y", NULL},
        (const char *const[]){"reindex", empty, "-m", DEMO_MODEL, NULL},
        (const char *const[]){"ingest", file, "-m", DEMO_MODEL, "-c", "x", fx.text, NULL},
        (const char *const[]){"list", file, NULL},
        (const char *const[]){"import", empty, file, NULL},
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        const outcome *o = command_run(NULL, 0, lines[i]);
        if (o->code != 1 && o->code != 3) fail_msg("%s: exit code %d: %s", lines[i][0], o->code, o->err);
        assert_says(o->err, "cairn ");
        assert_int_equal(access(empty, F_OK), -1);
    }
    free(empty);
    free(file);
}

/* ---- other processes ---- */

static void a_second_writer_is_told_who_holds_the_context(void **state)
{
    (void)state;
    char *copy = copy_of_store("held"), pid[32];
    cairn_store *store = NULL;
    cairn_writer *writer = NULL;
    assert_ok(cairn_store_open(copy, NULL, &store));
    assert_ok(cairn_writer_begin(store, "book", &writer));
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    const outcome *o = cairn_run("ingest", copy, "-m", DEMO_MODEL, "-c", "book", "--append", fx.text);
    assert_code(o, 1);
    assert_says(o->err, pid);
    assert_code(cairn_run("ask", copy, "-m", DEMO_MODEL, "-c", "book", "--keep", "x"), 1);
    assert_code(cairn_run("drop", copy, "book"), 1);
    /* Reading, and writing elsewhere, go on meanwhile. */
    o = cairn_run("ask", copy, "-m", DEMO_MODEL, "-c", "book", QUESTION);
    assert_code(o, 0);
    assert_string_equal(o->out, "31415.\n");
    assert_code(cairn_run("fork", copy, "book", "branch"), 0);
    cairn_writer_end(writer);
    assert_code(cairn_run("drop", copy, "book"), 0);
    cairn_store_close(store);
    free(copy);
}

/* The export of a context without what may differ between two ingests of one text: the times (136 to 152) and the
 * hashes over them (184 to 192, and the last 8 bytes). */
static char *content_of(const char *store, size_t *bytes)
{
    char *file = test_path(fx.dir, "content.cairn");
    assert_code(cairn_run("export", store, "book", file), 0);
    char *data = test_read_file(file, bytes);
    assert_true(*bytes > 1000);
    memset(data + 136, 0, 16);
    memset(data + 184, 0, 8);
    memset(data + *bytes - 8, 0, 8);
    unlink(file);
    free(file);
    return data;
}

static void assert_equals_undisturbed(const char *store)
{
    size_t n = 0, expected_n = 0;
    char *expected = content_of(fx.store, &expected_n), *content = content_of(store, &n);
    assert_int_equal(n, expected_n);
    assert_memory_equal(content, expected, n);
    free(content);
    free(expected);
    assert_code(cairn_run("verify", store, "--deep"), 0);
    char *answer = strdup(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "", QUESTION)->out);
    const outcome *o = cairn_run("ask", store, "-m", DEMO_MODEL, "-c", "book", "--stop", "", QUESTION);
    assert_string_equal(o->out, answer);
    free(answer);
}

/* Small chunks and commits, so that there is something to be killed between. */
#define SLOW_INGEST(store)                                                                                             \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        "ingest", store, "-m", DEMO_MODEL, "-c", "book", "--chunk-blocks", "3", "--commit-bytes", "1M", fx.text, NULL  \
    }

static long long stored_tokens(const char *store)
{
    const outcome *o = cairn_run("list", store, "--json");
    if (o->code != 0) return -1; /* killed before the store was made */
    json_t *root = command_json(o), *list = json_object_get(root, "contexts");
    long long tokens = json_array_size(list) > 0 ? json_number(json_array_get(list, 0), "tokens") : 0;
    json_decref(root);
    return tokens;
}

static void an_ingest_killed_five_times_ends_as_an_undisturbed_one(void **state)
{
    (void)state;
    char *store = test_path(fx.dir, "killed");
    test_random r = {20240501};
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    char *whole = test_path(fx.dir, "timing");
    assert_int_equal(command_wait(command_start(NULL, SLOW_INGEST(whole))), 0);
    clock_gettime(CLOCK_MONOTONIC, &b);
    uint32_t whole_ms = (uint32_t)((b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000);
    int killed = 0;
    long long before = 0;
    for (int i = 0; i < 5; i++) {
        pid_t pid = command_start(NULL, SLOW_INGEST(store));
        pause_ms(30 + test_random_below(&r, whole_ms / 4));
        kill(pid, SIGKILL);
        killed += command_wait(pid) == 128 + SIGKILL;
        long long now = stored_tokens(store);
        assert_true(now >= before); /* what was committed stays */
        before = now;
    }
    assert_int_equal(killed, 5);
    assert_true(before > 0);
    const outcome *o = command_run(NULL, 0, SLOW_INGEST(store));
    assert_code(o, 0);
    assert_says(o->out, "resumed");
    assert_equals_undisturbed(store);
    o = command_run(NULL, 0, SLOW_INGEST(store));
    assert_says(o->out, "nothing to do");
    free(store);
    free(whole);
}

static void interrupted_it_keeps_what_is_whole_and_says_how_to_go_on(void **state)
{
    (void)state;
    static const int signals[] = {SIGINT, SIGTERM};
    for (int i = 0; i < 2; i++) {
        char *store = test_path(fx.dir, i == 0 ? "sigint" : "sigterm"), *log = test_path(fx.dir, "log");
        pid_t pid = command_start(log, SLOW_INGEST(store));
        while (stored_tokens(store) <= 0) pause_ms(10);
        kill(pid, signals[i]);
        assert_int_equal(command_wait(pid), 1);
        size_t bytes = 0;
        char *said = test_read_file(log, &bytes);
        assert_says(said, "cairn ingest: interrupted: ");
        assert_says(said, "the same command goes on");
        long long stored = stored_tokens(store);
        assert_true(stored > 0 && stored < TEXT_BYTES + 1);
        assert_says(cairn_run("list", store)->out, "interrupted");
        assert_code(cairn_run("verify", store, "--deep"), 0);
        /* It can be asked as it is, with a warning. */
        const outcome *o = cairn_run("ask", store, "-m", DEMO_MODEL, "-c", "book", "-n", "1", "x");
        assert_code(o, 0);
        assert_says(o->err, "warning: 'book' is not complete");
        o = cairn_run("ask", store, "-m", DEMO_MODEL, "-c", "book", "--keep", "-n", "1", "x");
        assert_code(o, 1);
        assert_says(o->err, "is not complete");
        /* Another text must not go on from here. */
        char *other = test_path(fx.dir, "other.txt");
        write_text(other, 400, "1", 3);
        o = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", other);
        assert_code(o, 1);
        assert_says(o->err, "holds another text");
        o = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", "--append", other);
        assert_code(o, 1);
        assert_says(o->err, "interrupted text");
        o = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", fx.text);
        assert_code(o, 0);
        assert_says(o->out, "resumed");
        assert_equals_undisturbed(store);
        free(said);
        free(other);
        free(store);
        free(log);
    }
}

static void an_interrupted_append_finds_its_beginning_again(void **state)
{
    (void)state;
    char *store = test_path(fx.dir, "appended"), *first = test_path(fx.dir, "first.txt");
    write_text(first, 1234, NULL, 0);
    assert_code(cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", first), 0);
    const char *const append[] = {"ingest",         store, "-m",       DEMO_MODEL, "-c", "book", "--chunk-blocks", "3",
                                  "--commit-bytes", "1M",  "--append", fx.text,    NULL};
    pid_t pid = command_start(NULL, append);
    while (stored_tokens(store) <= 1235) pause_ms(10);
    kill(pid, SIGKILL);
    assert_int_equal(command_wait(pid), 128 + SIGKILL);
    assert_true(stored_tokens(store) < 1235 + TEXT_BYTES + 1);
    /* Without --append the user means a context of this text alone, which it is not. */
    assert_code(cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", fx.text), 1);
    const outcome *o = command_run(NULL, 0, append);
    assert_code(o, 0);
    assert_says(o->out, "resumed");
    assert_int_equal(stored_tokens(store), 1235 + TEXT_BYTES + 1);
    char *both = test_path(fx.dir, "both");
    assert_code(cairn_run("ingest", both, "-m", DEMO_MODEL, "-c", "book", first, fx.text), 0);
    char *expected = strdup(cairn_run("show", both, "book")->out);
    assert_string_equal(cairn_run("show", store, "book")->out, expected);
    free(expected);
    free(both);
    free(first);
    free(store);
}

/* ---- the disk ---- */

static void a_full_disk_stops_an_ingest_that_goes_on_when_there_is_room(void **state)
{
    (void)state;
    char *disk = test_path(fx.dir, "disk"), *store = test_path(disk, "store");
    mkdir(disk, 0700);
    if (mount("tmpfs", disk, "tmpfs", 0, "size=10m") != 0) {
        print_message("skipped: a small file system cannot be mounted here (%s)\n", strerror(errno));
        free(disk);
        free(store);
        skip();
    }
    const outcome *o = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", "--chunk-blocks", "3",
                                 "--commit-bytes", "2M", fx.text);
    int full_code = o->code;
    char *said = strdup(o->err);
    long long stored = stored_tokens(store);
    int sound = cairn_run("verify", store, "--deep")->code;
    int grown = mount("tmpfs", disk, "tmpfs", MS_REMOUNT, "size=256m");
    int resumed = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", fx.text)->code;
    size_t n = 0, expected_n = 0;
    char *content = resumed == 0 ? content_of(store, &n) : NULL;
    umount(disk); /* before anything can fail: a mounted disk outlives the test */
    char *expected = content_of(fx.store, &expected_n);
    assert_int_equal(full_code, 1);
    assert_says(said, "cairn ingest: ");
    assert_true(strstr(said, "full") != NULL || strstr(said, "space") != NULL || strstr(said, "No space") != NULL);
    assert_true(stored > 0 && stored < TEXT_BYTES);
    assert_int_equal(sound, 0);
    assert_int_equal(grown, 0);
    assert_int_equal(resumed, 0);
    assert_int_equal(n, expected_n);
    assert_memory_equal(content, expected, n);
    free(said);
    free(content);
    free(expected);
    free(disk);
    free(store);
}

static void a_flipped_byte_in_a_tile_is_found_by_verify_and_named(void **state)
{
    (void)state;
    char *copy = copy_of_store("flipped"), *path = store_data_file(copy);
    size_t bytes = 0, at = 0;
    uint8_t *data = test_read_file(path, &bytes);
    for (size_t i = 0, seen = 0; i + 48 < bytes && seen < 1000; i += 16) /* some tile in the middle of the book */
        if (memcmp(data + i, "CRNT", 4) == 0) at = i, seen++;
    assert_true(at > 0);
    unsigned layer = cairn_get_le16(data + at + 8), head = cairn_get_le16(data + at + 10);
    data[at + 48 + 100] ^= 0x10;
    test_write_file(path, data, bytes);
    const outcome *o = cairn_run("verify", copy, "--deep");
    assert_code(o, 3);
    char name[64];
    snprintf(name, sizeof name, "layer %u head %u", layer, head);
    assert_says(o->out, name);
    assert_says(o->out, "block ");
    assert_says(o->err, "1 damaged");
    o = cairn_run("verify", copy, "--deep", "--json");
    assert_code(o, 3);
    json_t *root = command_json(o);
    assert_true(json_is_false(json_object_get(root, "sound")));
    assert_int_equal(json_array_size(json_object_get(root, "damaged")), 1);
    json_decref(root);
    char *file = test_path(fx.dir, "damaged.cairn");
    assert_code(cairn_run("export", copy, "book", file), 3);
    assert_int_equal(access(file, F_OK), -1);
    free(file);
    free(data);
    free(path);
    free(copy);
}

static void a_data_file_cut_short_is_damaged_data(void **state)
{
    (void)state;
    char *copy = copy_of_store("cut"), *path = store_data_file(copy);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(truncate(path, st.st_size / 2), 0);
    static const char *const what[] = {"list", "verify", "stat"};
    for (size_t i = 0; i < 3; i++) {
        const outcome *o = cairn_run(what[i], copy);
        assert_code(o, 3);
        assert_says(o->err, what[i]);
    }
    free(path);
    free(copy);
}

static int remove_index_file(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)at;
    if (type == FTW_F && strstr(path, "/index/") != NULL) unlink(path);
    return 0;
}
static int break_index_file(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)at;
    if (type != FTW_F || strstr(path, "/index/") == NULL) return 0;
    return truncate(path, st->st_size / 2);
}

static void a_deleted_or_damaged_index_costs_a_warning_and_no_answer(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        char *copy = copy_of_store(i == 0 ? "unindexed" : "misindexed");
        assert_code(cairn_run("reindex", copy, "-m", DEMO_MODEL, "--index", "hnsw"), 0);
        const outcome *o = cairn_run("ask", copy, "-m", DEMO_MODEL, "-c", "book", QUESTION);
        assert_code(o, 0);
        assert_string_equal(o->err, "");
        assert_int_equal(nftw(copy, i == 0 ? remove_index_file : break_index_file, 16, FTW_PHYS), 0);
        o = cairn_run("ask", copy, "-m", DEMO_MODEL, "-c", "book", QUESTION);
        assert_code(o, 0);
        assert_string_equal(o->out, "31415.\n");
        assert_says(o->err, "warning: index");
        assert_says(o->err, "reindex");
        assert_code(cairn_run("reindex", copy, "-m", DEMO_MODEL), 0);
        o = cairn_run("ask", copy, "-m", DEMO_MODEL, "-c", "book", QUESTION);
        assert_string_equal(o->out, "31415.\n");
        assert_string_equal(o->err, "");
        free(copy);
    }
}

/* ---- another engine's figures ---- */

static void logits_equal_llama_cpps(void **state)
{
    (void)state;
    /* ggml rounds the activations that meet f16 weights to f16 and those that meet q8_0 weights to 8 bits, and its K
     * and V to f16; here all of them are f32. The bounds are that rounding's, seen as 2.4e-3, 3.8e-2 and 1.1e-3. */
    static const char *const names[] = {"gqa-f16", "mha-q8_0", "qwen3-f16"};
    static const double most[] = {4e-3, 6e-2, 2e-3}, mean_most[] = {3e-4, 4e-3, 1.5e-4};
    for (size_t m = 0; m < 3; m++) {
        char model[512], tokens[512];
        snprintf(model, sizeof model, CAIRN_TEST_DATA "/parity/%s.gguf", names[m]);
        snprintf(tokens, sizeof tokens, CAIRN_TEST_DATA "/parity/%s.llamacpp.json", names[m]);
        const outcome *o = cairn_run("logits", "-m", model, "--tokens", tokens, "--top", "300", "--json");
        assert_code(o, 0);
        json_t *ours = command_json(o), *theirs = json_load_file(tokens, 0, NULL);
        const json_t *a = json_object_get(ours, "positions"), *b = json_object_get(theirs, "positions");
        assert_true(json_equal(json_object_get(ours, "tokens"), json_object_get(theirs, "tokens")));
        assert_int_equal(json_array_size(a), json_array_size(b));
        double worst = 0, sum = 0, n = 0;
        for (size_t i = 0; i < json_array_size(b); i++) {
            const json_t *ids = json_object_get(json_array_get(b, i), "top");
            const json_t *prob = json_object_get(json_array_get(b, i), "prob");
            const json_t *our_ids = json_object_get(json_array_get(a, i), "top");
            const json_t *our_prob = json_object_get(json_array_get(a, i), "prob");
            for (size_t j = 0; j < json_array_size(ids); j++) {
                size_t at = 0;
                while (!json_equal(json_array_get(our_ids, at), json_array_get(ids, j))) at++;
                double d = json_real_value(json_array_get(our_prob, at)) - json_real_value(json_array_get(prob, j));
                if (d < 0) d = -d;
                sum += d;
                n++;
                if (d > worst) worst = d;
            }
        }
        print_message("%s: a probability differs by %.1e at most, %.1e on average\n", names[m], worst, sum / n);
        assert_true(worst < most[m]);
        assert_true(sum / n < mean_most[m]);
        json_decref(ours);
        json_decref(theirs);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_truncated_model_is_refused_by_name_and_makes_no_store),
        cmocka_unit_test(a_model_without_landmarks_cannot_fill_a_store),
        cmocka_unit_test(another_model_than_the_stores_is_refused_and_both_are_named),
        cmocka_unit_test(a_text_that_cannot_be_read_is_named_and_makes_no_context),
        cmocka_unit_test(a_store_that_is_none_is_an_error_in_every_command),
        cmocka_unit_test(a_second_writer_is_told_who_holds_the_context),
        cmocka_unit_test(an_ingest_killed_five_times_ends_as_an_undisturbed_one),
        cmocka_unit_test(interrupted_it_keeps_what_is_whole_and_says_how_to_go_on),
        cmocka_unit_test(an_interrupted_append_finds_its_beginning_again),
        cmocka_unit_test(a_full_disk_stops_an_ingest_that_goes_on_when_there_is_room),
        cmocka_unit_test(a_flipped_byte_in_a_tile_is_found_by_verify_and_named),
        cmocka_unit_test(a_data_file_cut_short_is_damaged_data),
        cmocka_unit_test(a_deleted_or_damaged_index_costs_a_warning_and_no_answer),
        cmocka_unit_test(logits_equal_llama_cpps),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
