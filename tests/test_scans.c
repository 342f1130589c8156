/* The scans of a segment in a file: the next session begins with them and answers the same; without a good file it does
 * without.
 * labels: threads
 *
 * The witness is a session that scans in full precision. */
#include "world.h"

#include <context_internal.h>
#include <index_internal.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCKS = 2400, B = 5, D = 32, CHUNK = 500, TAIL = 60, K = 3 };

/* Rows of which a sketch pays. */
static void long_world(world *w, test_random *r)
{
    world_spec spec = {1, 4, 2, D, B - 1, CAIRN_POSITION_CLAMPED, false, false, (size_t)BLOCKS * B};
    world_init(w, r, &spec);
    w->shape.rope_dims = 2;
    w->shape.clamp_blocks = 2;
    w->shape.window_blocks = 1;
    for (size_t i = 0; i < w->rows * 2 * D; i++) w->k[0][i] /= 1 + 3 * (float)(i % D);
}

static char *scan_file(const char *dir, const char *name)
{
    char *index = test_path(dir, "store/index"), *path = test_path(index, name);
    free(index);
    return path;
}

static long file_bytes(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? (long)st.st_size : -1;
}

/* Rows [from, to) of the world into the context, committed every `commit` rows and at the end. */
static void ingest(const world *w, cairn_store *store, const char *name, size_t from, size_t to, size_t commit)
{
    test_random r = {7};
    record rec;
    record_init(&rec, w, 0);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = true, .threads = 2};
    cairn_session *s = world_session(w, store, &spec);
    assert_int_equal(cairn_session_slot(s), from);
    while (from < to) {
        const size_t next = from + commit < to ? from + commit : to;
        const cairn_input input = {.complete = next == to};
        world_feed(w, s, from, next, CHUNK, &r, &rec);
        assert_ok(cairn_session_commit(s, &input));
        from = next;
    }
    cairn_session_end(s);
    record_wipe(&rec);
}

/* The last rows of the world after a context that ends where they begin. */
static void ask(const world *w, cairn_store *store, const char *name, const char *kind, record *rec,
                cairn_session **keep)
{
    test_random r = {8};
    record_init(rec, w, K);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .index_kind = kind, .threads = 2};
    cairn_session *s = world_session(w, store, &spec);
    assert_ok(cairn_session_trace_enable(s, true));
    world_feed(w, s, w->rows - TAIL, w->rows - TAIL / 2, 10, &r, rec);
    world_feed(w, s, w->rows - TAIL / 2, w->rows, 1, &r, rec);
    *keep = s;
}

static void assert_asked_alike(const world *w, cairn_store *store, bool from_file)
{
    record rec, exact;
    cairn_session *s, *e;
    cairn_session_info info;
    ask(w, store, "text", NULL, &rec, &s);
    ask(w, store, "text", "exact", &exact, &e);
    record_same(&rec, &exact, w->rows - TAIL, w->rows);
    cairn_session_info_get(s, &info);
    size_t learnt = 0;
    for (size_t h = 0; h < 2; h++) learnt += cairn_index_learnt(s->landmarks.parts[0].index[h]);
    assert_int_equal(learnt != 0, from_file);
    assert_int_equal(s->landmarks.kept_rows != 0, from_file);
    assert_string_equal(from_file ? info.warning : "", "");
    cairn_session_end(s);
    cairn_session_end(e);
    record_wipe(&rec);
    record_wipe(&exact);
}

static void a_new_session_begins_with_what_the_one_that_read_the_text_had_learnt(void **state)
{
    (void)state;
    test_random r = {50};
    world w;
    long_world(&w, &r);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F16);
    char *path = scan_file(dir, "1-0.scan"), *next = scan_file(dir, "1-1.scan");
    assert_ok(cairn_context_create(store, "text", NULL));
    /* too few rows, then enough; a sixteenth more, and less than that */
    ingest(&w, store, "text", 0, 2000 * B, 200 * B);
    assert_int_equal(file_bytes(path), -1);
    ingest(&w, store, "text", 2000 * B, 2300 * B, 60 * B);
    const long first = file_bytes(path);
    assert_true(first > 0);
    ingest(&w, store, "text", 2300 * B, w.rows - TAIL, CHUNK); /* 88 blocks more */
    assert_int_equal(file_bytes(path), first);
    assert_asked_alike(&w, store, true); /* the rows of the file, and the others' records */

    /* it survives what the segment survives: a reindex to the same kind, a compaction */
    assert_ok(cairn_context_reindex(store, &w.shape, "text", "scan", NULL, NULL));
    assert_int_equal(file_bytes(path), -1);
    assert_int_equal(file_bytes(next), first);
    assert_asked_alike(&w, store, true);
    assert_ok(cairn_store_compact(store, NULL, NULL));
    assert_int_equal(file_bytes(next), first);
    assert_asked_alike(&w, store, true);
    /* a fork that ends before the file does, in blocks of its own */
    assert_ok(cairn_context_fork(store, "text", "fork", (uint64_t)2200 * (B - 1), NULL));
    ingest(&w, store, "fork", 2200 * B, w.rows - TAIL, CHUNK);
    record rec, exact;
    cairn_session *s, *e;
    ask(&w, store, "fork", NULL, &rec, &s);
    ask(&w, store, "fork", "exact", &exact, &e);
    record_same(&rec, &exact, w.rows - TAIL, w.rows);
    assert_true(cairn_index_learnt(s->landmarks.parts[0].index[0]) ||
                cairn_index_learnt(s->landmarks.parts[0].index[1]));
    cairn_session_end(s);
    cairn_session_end(e);
    record_wipe(&rec);
    record_wipe(&exact);
    /* and goes with it */
    assert_ok(cairn_context_drop(store, "fork"));
    assert_ok(cairn_context_drop(store, "text"));
    assert_ok(cairn_store_sweep(store, NULL));
    assert_int_equal(file_bytes(next), -1);
    cairn_store_close(store);
    free(path);
    free(next);
    test_remove_dir(dir);
    world_wipe(&w);
}

/* Who never says that all is in, as an engine that writes on and on. */
static void a_stream_without_end_leaves_a_file_whenever_it_has_doubled(void **state)
{
    (void)state;
    static const size_t commits[] = {1500, 2100, 2300, 2388};
    const char *name = "text";
    test_random r = {53};
    world w;
    record rec;
    long_world(&w, &r);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F16);
    char *path = scan_file(dir, "1-0.scan");
    assert_ok(cairn_context_create(store, name, NULL));
    record_init(&rec, &w, 0);
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .write = true, .threads = 2};
    cairn_session *s = world_session(&w, store, &spec);
    long sizes[4];
    for (size_t i = 0, at = 0; i < 4; at = commits[i++] * B) {
        world_feed(&w, s, at, commits[i] * B, CHUNK, &r, &rec);
        assert_ok(cairn_session_commit(s, NULL));
        sizes[i] = file_bytes(path);
    }
    assert_int_equal(sizes[0], -1);
    assert_true(sizes[1] > 0);
    assert_int_equal(sizes[2], sizes[1]);
    assert_int_equal(sizes[3], sizes[1]);
    cairn_session_end(s);
    assert_asked_alike(&w, store, true);
    cairn_store_close(store);
    free(path);
    test_remove_dir(dir);
    record_wipe(&rec);
    world_wipe(&w);
}

/* Each has its own file and part; a short one between them has none. The same text twice: of equals the newest. */
static void long_contexts_asked_together_begin_with_what_was_learnt_of_each(void **state)
{
    (void)state;
    static const char *const names[] = {"text", "short", "twin"};
    test_random r = {54};
    world w;
    record rec[2];
    long_world(&w, &r);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F16);
    for (size_t i = 0; i < 3; i++) {
        assert_ok(cairn_context_create(store, names[i], NULL));
        ingest(&w, store, names[i], 0, i == 1 ? 300 * B : w.rows - TAIL, 800 * B);
    }
    for (size_t run = 0; run < 2; run++) {
        record_init(&rec[run], &w, K);
        session_spec spec = {
            .contexts = names, .n = 3, .top_k = K, .index_kind = run == 0 ? NULL : "exact", .threads = 2};
        cairn_session *s = world_session(&w, store, &spec);
        assert_int_equal(s->landmarks.n_parts, run == 0 ? 2 : 1);
        for (size_t p = 0; run == 0 && p < 2; p++)
            assert_true(cairn_index_learnt(s->landmarks.parts[p].index[0]) ||
                        cairn_index_learnt(s->landmarks.parts[p].index[1]));
        assert_ok(cairn_session_trace_enable(s, true));
        world_feed(&w, s, w.rows - TAIL, w.rows - TAIL / 2, 10, &r, &rec[run]);
        world_feed(&w, s, w.rows - TAIL / 2, w.rows, 1, &r, &rec[run]);
        cairn_session_end(s);
    }
    record_same(&rec[0], &rec[1], w.rows - TAIL, w.rows);
    record_wipe(&rec[0]);
    record_wipe(&rec[1]);
    cairn_store_close(store);
    test_remove_dir(dir);
    world_wipe(&w);
}

static void flip(const char *path, long at)
{
    int fd = open(path, O_RDWR);
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

/* A session begins, and names the segment in its warning. */
static bool warns(const world *w, cairn_store *store)
{
    const char *name = "text";
    session_spec spec = {.contexts = &name, .n = 1, .top_k = K};
    cairn_session *s = world_session(w, store, &spec);
    cairn_session_info info;
    cairn_session_info_get(s, &info);
    cairn_session_end(s);
    return strstr(info.warning, "segment 1") != NULL;
}

static void a_file_of_scans_that_is_not_right_is_named_and_done_without(void **state)
{
    (void)state;
    test_random r = {51};
    world w;
    long_world(&w, &r);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F16);
    char *path = scan_file(dir, "1-0.scan"), *other = scan_file(dir, "1-0.other");
    assert_ok(cairn_context_create(store, "text", NULL));
    ingest(&w, store, "text", 0, w.rows - TAIL, 400 * B);
    const long n = file_bytes(path);
    assert_true(n > 0);
    assert_asked_alike(&w, store, true);
    const long places[] = {0, 5, 8, 17, 25, 44, 60, 200, n / 2, n - 30000, n - 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        flip(path, places[i]);
        assert_true(warns(&w, store));
        if (i == 8) assert_asked_alike(&w, store, false);
        flip(path, places[i]);
    }
    /* what is no file, or not all of it; and a link is not followed */
    assert_int_equal(rename(path, other), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_true(warns(&w, store));
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_true(warns(&w, store));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink(other, path), 0);
    assert_true(warns(&w, store));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(truncate(other, n - 8), 0);
    assert_int_equal(rename(other, path), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(truncate(path, 0), 0);
    assert_true(warns(&w, store));
    cairn_store_close(store);
    free(path);
    free(other);
    test_remove_dir(dir);
    world_wipe(&w);
}

/* The mass is of all landmarks: who asks for it has images, from the beginning or from then on. */
static void mass_is_the_same_with_a_file_of_scans(void **state)
{
    (void)state;
    test_random r = {52};
    world w;
    long_world(&w, &r);
    char *dir = test_make_dir();
    cairn_store *store = world_store(&w, dir, "store", CAIRN_F16);
    char *path = scan_file(dir, "1-0.scan");
    assert_ok(cairn_context_create(store, "text", NULL));
    ingest(&w, store, "text", 0, w.rows - TAIL, 400 * B);
    double mean[3];
    for (size_t run = 0; run < 3; run++) { /* asked for at begin, later, and without a file */
        const char *name = "text";
        record rec;
        record_init(&rec, &w, 0);
        if (run == 2) assert_int_equal(unlink(path), 0);
        session_spec spec = {.contexts = &name, .n = 1, .top_k = K, .measure = run != 1};
        cairn_session *s = world_session(&w, store, &spec);
        assert_int_equal(s->landmarks.parts[0].index[0]->rows.chunks[0].image == NULL &&
                             s->landmarks.parts[0].index[1]->rows.chunks[0].image == NULL,
                         run == 1);
        if (run == 1) cairn_session_mass_enable(s, true);
        assert_non_null(s->landmarks.parts[0].index[0]->rows.chunks[0].image);
        world_feed(&w, s, w.rows - TAIL, w.rows, 1, &r, &rec);
        cairn_step_stats stats;
        cairn_session_stats(s, &stats);
        assert_true(stats.mass_rows != 0);
        mean[run] = stats.mass_sum / (double)stats.mass_rows;
        cairn_session_end(s);
        record_wipe(&rec);
    }
    assert_true(mean[0] == mean[1] && mean[1] == mean[2]);
    cairn_store_close(store);
    free(path);
    test_remove_dir(dir);
    world_wipe(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_new_session_begins_with_what_the_one_that_read_the_text_had_learnt),
        cmocka_unit_test(a_stream_without_end_leaves_a_file_whenever_it_has_doubled),
        cmocka_unit_test(long_contexts_asked_together_begin_with_what_was_learnt_of_each),
        cmocka_unit_test(a_file_of_scans_that_is_not_right_is_named_and_done_without),
        cmocka_unit_test(mass_is_the_same_with_a_file_of_scans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
