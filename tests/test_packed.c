/* A scan as bytes, and a segment's scans as a file: what is unpacked answers as what was packed, from less; what is not
 * what it was is refused, and a session does without.
 * labels: threads
 *
 * The witness of every search is a full sort over cairn_index_scores, of sessions one that scans in full precision. */
#include "index_keys.h"

#include <context_internal.h>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "world.h"

/* ---- bytes ---- */

typedef struct bytes {
    uint8_t *data;
    size_t n, at, room;
} bytes;

static bool bytes_write(void *arg, const void *data, size_t n)
{
    bytes *b = arg;
    if (n > b->room - b->n) return false;
    memcpy(b->data + b->n, data, n);
    b->n += n;
    return true;
}

static bool bytes_read(void *arg, void *data, size_t n)
{
    bytes *b = arg;
    if (n > b->n - b->at) return false;
    memcpy(data, b->data + b->at, n);
    b->at += n;
    return true;
}

static bytes packed(const cairn_index *index)
{
    const size_t n = cairn_index_packed_bytes(index);
    bytes b = {.data = cairn_alloc(n), .room = n};
    assert_ok(cairn_index_pack(index, bytes_write, &b));
    assert_int_equal(b.n, n);
    return b;
}

static cairn_status unpack(bytes *b, uint32_t dim, cairn_dtype dtype, size_t upto, bool images, cairn_index **out)
{
    b->at = 0;
    assert_ok(cairn_index_new("scan", dim, dtype, out));
    return cairn_index_unpack(*out, upto, images, bytes_read, b);
}

/* The first dims of keys and queries weigh most, so that a sketch pays. */
static keys keys_of_few_directions(uint64_t seed, size_t n, size_t nq, uint32_t dim, cairn_dtype dtype)
{
    keys k = keys_new(seed, MILD, n, nq, dim, dtype);
    for (size_t i = 0; i < n * dim; i++) k.wide[i] /= 1 + 0.5f * (float)(i % dim);
    for (size_t i = 0; i < nq * dim; i++) k.q[i] *= 1 + 0.2f * (float)((i * 7) % dim);
    for (size_t i = 0; i < n; i += 997) /* some without a bound */
        for (size_t j = 0; j < dim; j++) k.wide[i * dim + j] *= 30;
    cairn_kernels_best()->narrow(k.rows, k.wide, dtype, n * dim);
    return k;
}

static void assert_rows_are_the_keys(const cairn_index *index, const keys *k)
{
    float row[128], given[128];
    for (uint32_t i = 0; i < cairn_index_count(index); i++) {
        cairn_index_row(index, i, row);
        cairn_kernels_best()->widen(given, key_at(k, i), k->dtype, k->dim);
        assert_memory_equal(row, given, k->dim * sizeof *row);
    }
}

static void assert_answers(const cairn_index *index, const keys *k)
{
    const uint32_t n = (uint32_t)cairn_index_count(index);
    cairn_index_query queries[64];
    for (size_t i = 0; i < 64; i++) queries[i] = (cairn_index_query){k->q + (32 + i) * k->dim, 0, n};
    assert_search_is_a_full_sort(index, queries, 64, 4);
    assert_search_is_a_full_sort(index, queries + 7, 1, 4);
    assert_search_is_a_full_sort(index, queries + 9, 3, 200);
    for (size_t i = 0; i < 64; i++) queries[i].lo = (uint32_t)(i * 97 % n);
    assert_search_is_a_full_sort(index, queries, 64, 5);
}

static void assert_same_mass(const cairn_index *a, const cairn_index *b, const keys *k)
{
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[4];
    uint32_t found;
    for (size_t i = 32; i < 48; i++) {
        cairn_index_mass mass[2];
        const cairn_index_query query = {k->q + i * k->dim, 0, (uint32_t)cairn_index_count(a)};
        assert_ok(cairn_index_search(a, scratch, &query, 1, 4, hits, &found, &mass[0]));
        assert_ok(cairn_index_search(b, scratch, &query, 1, 4, hits, &found, &mass[1]));
        assert_memory_equal(&mass[0], &mass[1], sizeof mass[0]);
    }
    cairn_index_scratch_free(scratch);
}

static void what_is_unpacked_is_what_was_packed(void **state)
{
    (void)state;
    const uint32_t dims[] = {16, 50, 64, 128, 64};
    const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_BF16, CAIRN_F32, CAIRN_F16, CAIRN_F16};
    for (size_t d = 0; d < 5; d++) {
        const bool learns = d < 4;
        keys k = keys_of_few_directions(10 + d, 9000, 96, dims[d], dtypes[d]);
        cairn_index *from = index_of("scan", &k), *lean, *imaged, *again;
        if (learns) assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
        assert_int_equal(cairn_index_learnt(from), learns);
        bytes b = packed(from);
        assert_ok(unpack(&b, k.dim, k.dtype, SIZE_MAX, false, &lean));
        assert_int_equal(b.at, b.n);
        assert_ok(unpack(&b, k.dim, k.dtype, SIZE_MAX, true, &imaged));
        assert_int_equal(cairn_index_count(lean), 9000);
        assert_int_equal(cairn_index_learnt(lean), learns);
        assert_int_equal(lean->rows.chunks[0].image == NULL, learns); /* without a sketch it is wanted */
        assert_non_null(imaged->rows.chunks[2].image);
        if (learns) assert_true(cairn_index_bytes(lean) < cairn_index_bytes(imaged) * 4 / 5);
        assert_int_equal(cairn_index_bytes(imaged), cairn_index_bytes(from));
        assert_rows_are_the_keys(lean, &k);
        assert_answers(lean, &k);
        assert_answers(imaged, &k);
        assert_same_mass(from, imaged, &k);
        bytes same = packed(lean);
        assert_int_equal(same.n, b.n);
        assert_memory_equal(same.data, b.data, b.n);
        /* nor does anything in it depend on images coming later, or rows */
        assert_ok(cairn_index_images(lean, true));
        assert_same_mass(from, lean, &k);
        assert_ok(cairn_index_add(from, 700, key_at(&k, 100)));
        assert_ok(cairn_index_add(imaged, 700, key_at(&k, 100)));
        assert_same_mass(from, imaged, &k);
        assert_answers(imaged, &k);
        assert_int_equal(imaged->sketch.count, learns ? 9700 : 0);
        bytes more[] = {packed(from), packed(imaged)};
        assert_int_equal(more[0].n, more[1].n);
        assert_memory_equal(more[0].data, more[1].data, more[0].n);
        assert_ok(unpack(&more[1], k.dim, k.dtype, SIZE_MAX, false, &again));
        assert_answers(again, &k);
        cairn_index_free(from);
        cairn_index_free(lean);
        cairn_index_free(imaged);
        cairn_index_free(again);
        cairn_free(b.data);
        cairn_free(same.data);
        cairn_free(more[0].data);
        cairn_free(more[1].data);
        keys_free(&k);
    }
}

/* A fork has the first blocks of a segment: its rows are a part of the file's. */
static void the_first_rows_of_a_pack_are_an_index_too(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(20, 9000, 96, 64, CAIRN_F16);
    k.wide[5000 * 64] = INFINITY;
    k.wide[1 * 64 + 3] = NAN;
    cairn_kernels_best()->narrow(k.rows, k.wide, k.dtype, 9000 * 64);
    cairn_index *from = index_of("scan", &k);
    assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
    assert_true(cairn_index_learnt(from));
    bytes b = packed(from);
    const size_t uptos[] = {1, 63, 300, 4095, 4096, 4097, 8192, 8999, 9000, 9001};
    for (size_t i = 0; i < sizeof uptos / sizeof *uptos; i++) {
        cairn_index *part, *plain;
        const size_t n = uptos[i] < 9000 ? uptos[i] : 9000;
        assert_ok(unpack(&b, 64, k.dtype, uptos[i], i % 2 == 0, &part));
        assert_int_equal(cairn_index_count(part), n);
        assert_int_equal(part->sketch.count, n);
        assert_answers(part, &k);
        assert_ok(cairn_index_new("scan", 64, k.dtype, &plain));
        assert_ok(cairn_index_add(plain, n, k.rows));
        assert_ok(cairn_index_images(part, true));
        assert_same_mass(plain, part, &k);
        assert_ok(cairn_index_add(part, 9000 - n, key_at(&k, n)));
        assert_answers(part, &k);
        assert_int_equal(part->sketch.count, 9000);
        cairn_index_free(part);
        cairn_index_free(plain);
    }
    cairn_index_free(from);
    cairn_free(b.data);
    keys_free(&k);
}

static void rows_without_images_are_found_with_and_without_a_sketch(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(30, 6000, 96, 32, CAIRN_F16);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", 32, CAIRN_F16, &index));
    assert_ok(cairn_index_images(index, false));
    assert_ok(cairn_index_add(index, 6000, k.rows));
    assert_answers(index, &k); /* in full precision */
    assert_null(index->rows.chunks[0].image);
    assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
    assert_true(cairn_index_learnt(index));
    assert_answers(index, &k);
    assert_null(index->rows.chunks[0].image);
    cairn_index_unlearn(index);
    assert_answers(index, &k);
    /* where no sketch pays images are made after all */
    for (size_t i = 0; i < 64 * 32; i++) k.q[i] = 0;
    assert_ok(cairn_index_learn(index, k.q, 64, 4, 64));
    assert_false(cairn_index_learnt(index));
    assert_non_null(index->rows.chunks[0].image);
    cairn_index_free(index);
    keys_free(&k);
}

static void a_pack_with_a_flipped_byte_or_without_its_end_is_refused(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(40, 1000, 96, 32, CAIRN_F16);
    cairn_index *from = index_of("scan", &k), *to = NULL;
    assert_ok(cairn_index_learn(from, k.q, 32, 1, 64));
    assert_true(cairn_index_learnt(from));
    bytes b = packed(from);
    assert_ok(cairn_index_new("scan", 32, CAIRN_F16, &to));
    const size_t empty = cairn_index_bytes(to), whole = b.n;
    for (size_t i = 0; i < whole; i += i < 1000 ? 1 : 13) {
        b.data[i] ^= (uint8_t)(1 << i % 8);
        b.at = 0;
        assert_int_equal(cairn_index_unpack(to, SIZE_MAX, i % 2 == 0, bytes_read, &b), CAIRN_CORRUPT);
        assert_int_equal(cairn_index_count(to), 0);
        assert_false(cairn_index_learnt(to));
        b.data[i] ^= (uint8_t)(1 << i % 8);
    }
    for (b.n = 0; b.n < whole; b.n += b.n < 100 ? 1 : 17) {
        b.at = 0;
        assert_int_equal(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b), CAIRN_CORRUPT);
    }
    assert_in_range(cairn_index_bytes(to), empty, empty + 4096); /* its directories stay */
    b.n = whole;
    b.at = 0;
    assert_ok(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b)); /* and it is as good as new */
    assert_answers(to, &k);
    b.at = 0; /* not twice, not another type or dimension, not another kind */
    assert_int_equal(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b), CAIRN_INVALID);
    cairn_index *other = NULL;
    assert_int_equal(unpack(&b, 32, CAIRN_BF16, SIZE_MAX, false, &other), CAIRN_CORRUPT);
    cairn_index_free(other);
    assert_int_equal(unpack(&b, 16, CAIRN_F16, SIZE_MAX, false, &other), CAIRN_CORRUPT);
    cairn_index_free(other);
    assert_ok(cairn_index_new("exact", 32, CAIRN_F16, &other));
    b.at = 0;
    assert_int_equal(cairn_index_unpack(other, SIZE_MAX, false, bytes_read, &b), CAIRN_INVALID);
    assert_int_equal(cairn_index_packed_bytes(other), 0);
    cairn_index_free(other);
    cairn_index_free(from);
    cairn_index_free(to);
    cairn_free(b.data);
    keys_free(&k);
}

static void unpacking_without_memory_leaves_an_index_that_works(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(41, 5000, 96, 32, CAIRN_F16);
    cairn_index *from = index_of("scan", &k), *to = NULL;
    assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
    bytes b = packed(from);
    cairn_status st = CAIRN_NO_MEMORY;
    for (size_t part = 0; part < 3; part++) {
        st = CAIRN_NO_MEMORY;
        for (uint64_t fail = 1; st != CAIRN_OK; fail++) {
            assert_ok(cairn_index_new("scan", 32, CAIRN_F16, &to));
            b.at = 0;
            cairn_alloc_fail_at(fail);
            st = cairn_index_unpack(to, part == 0 ? 4500 : 5000, part == 1, bytes_read, &b);
            cairn_alloc_fail_at(0);
            assert_true(fail < 200 && (st == CAIRN_OK || st == CAIRN_NO_MEMORY));
            if (st != CAIRN_OK) {
                assert_int_equal(cairn_index_count(to), 0);
                assert_ok(cairn_index_add(to, 5000, k.rows));
                assert_answers(to, &k);
            }
            cairn_index_free(to);
        }
    }
    cairn_index_free(from);
    cairn_free(b.data);
    keys_free(&k);
}

/* ---- a segment's scans ---- */

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
        const char *name = "text";
        session_spec spec = {.contexts = &name, .n = 1, .top_k = K};
        cairn_session *s = world_session(&w, store, &spec);
        cairn_session_info info;
        cairn_session_info_get(s, &info);
        assert_non_null(strstr(info.warning, "segment 1"));
        cairn_session_end(s);
        if (i % 4 == 0) assert_asked_alike(&w, store, false);
        flip(path, places[i]);
    }
    /* what is no file, or not all of it; and a link is not followed */
    assert_int_equal(rename(path, other), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink(other, path), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(truncate(other, n - 8), 0);
    assert_int_equal(rename(other, path), 0);
    assert_asked_alike(&w, store, false);
    assert_int_equal(truncate(path, 0), 0);
    assert_asked_alike(&w, store, false);
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
        cmocka_unit_test(what_is_unpacked_is_what_was_packed),
        cmocka_unit_test(the_first_rows_of_a_pack_are_an_index_too),
        cmocka_unit_test(rows_without_images_are_found_with_and_without_a_sketch),
        cmocka_unit_test(a_pack_with_a_flipped_byte_or_without_its_end_is_refused),
        cmocka_unit_test(unpacking_without_memory_leaves_an_index_that_works),
        cmocka_unit_test(a_new_session_begins_with_what_the_one_that_read_the_text_had_learnt),
        cmocka_unit_test(a_stream_without_end_leaves_a_file_whenever_it_has_doubled),
        cmocka_unit_test(long_contexts_asked_together_begin_with_what_was_learnt_of_each),
        cmocka_unit_test(a_file_of_scans_that_is_not_right_is_named_and_done_without),
        cmocka_unit_test(mass_is_the_same_with_a_file_of_scans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
