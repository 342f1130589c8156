/* Landmark search with FAISS: every kind against the exact one, the sealed part growing, its file, its faults. */
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>

#include "index_keys.h"

/* FAISS 1.7.3 forgets what it had read when a file ends early: its leak, not one of ours. */
extern void __lsan_disable(void) __attribute__((weak));
extern void __lsan_enable(void) __attribute__((weak));

static cairn_index *sealed_index(const char *kind, const keys *k, size_t upto)
{
    cairn_index *index = index_of(kind, k);
    assert_ok(cairn_index_seal(index, upto));
    assert_int_equal(cairn_index_sealed(index), upto);
    return index;
}

/* Share of the exact k best that a search returns; scores must be the stored rows' own, order and ties as promised. */
static double recall(const cairn_index *index, const cairn_index_query *queries, size_t nq, uint32_t k)
{
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit *hits = cairn_alloc_array(nq * k, sizeof *hits);
    uint32_t *found = cairn_alloc_array(nq, sizeof *found);
    size_t got = 0;
    size_t all = 0;
    assert_ok(cairn_index_search(index, scratch, queries, nq, k, hits, found, NULL));
    for (size_t i = 0; i < nq; i++) {
        uint32_t width = queries[i].hi - queries[i].lo;
        const cairn_index_hit *mine = hits + i * k;
        cairn_index_hit *truth = sorted_hits(index, queries[i].q, queries[i].lo, queries[i].hi);
        uint32_t want = k < width ? k : width;
        assert_int_equal(found[i], want);
        for (uint32_t h = 0; h < found[i]; h++) {
            float score;
            assert_true(mine[h].id >= queries[i].lo && mine[h].id < queries[i].hi);
            cairn_index_scores(index, queries[i].q, mine[h].id, mine[h].id + 1, &score);
            assert_true(mine[h].score == score);
            if (h != 0) assert_int_equal(better_first(&mine[h - 1], &mine[h]), -1);
            for (uint32_t t = 0; t < want; t++) got += truth[t].id == mine[h].id;
        }
        all += want;
        cairn_free(truth);
    }
    cairn_free(hits);
    cairn_free(found);
    cairn_index_scratch_free(scratch);
    return (double)got / (double)all;
}

static void every_kind_finds_most_of_the_best_and_flat_all(void **state)
{
    (void)state;
    /* Trained codes are small here: the polysemous order of 256 codes takes FAISS seconds, and so does OPQ's rotation,
     * which was tried by hand: OPQ8,PQ8x4np and OPQ4,PQ4x4np, file and map included. */
    const struct {
        const char *kind;
        uint32_t dim;
        double least;
    } kinds[] = {
        {"flat", 32, 1},        {"Flat", 32, 1},          {"sq8", 32, 0.9},
        {"ivf", 32, 0.7},       {"ivf:nprobe=32", 32, 1}, {"IVF16,Flat:nprobe=16", 32, 1},
        {"IVF16,SQ8", 32, 0.3}, {"SQfp16", 32, 0.95},     {"hnsw", 32, 0.9},
        {"HNSW8,SQ8", 32, 0.7}, {"PCA24,Flat", 32, 0.4},  {"IVF8_HNSW8,Flat:nprobe=8,quantizer_efSearch=32", 32, 0.9},
        {"PQ16x4np", 32, 0.3},  {"PQ2x2", 4, 0.02},       {"IVF4,PQ8x4np,RFlat:nprobe=4,k_factor_rf=8", 32, 0.4},
        {"RR,SQ8", 32, 0.9},    {"L2norm,Flat", 32, 0.3}, {"IVF4,PQ16x4fs:nprobe=4", 32, 0.2},
        {"PQ16x4fs", 32, 0.2},  {"Pad48,HNSW8", 32, 0.6}, {"ITQ,Flat", 32, 0.3}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        bool graph = strstr(kinds[i].kind, "HNSW") != NULL || strcmp(kinds[i].kind, "hnsw") == 0;
        size_t n = graph ? 900 : 3000; /* Debian's FAISS builds graphs slowly */
        keys k = keys_new(100, MILD, n + 300, 24, kinds[i].dim, CAIRN_F16);
        cairn_index *index = sealed_index(kinds[i].kind, &k, n / 2);
        assert_string_equal(cairn_index_kind(index), kinds[i].kind);
        assert_ok(cairn_index_seal(index, n)); /* extends */
        assert_ok(cairn_index_seal(index, n / 2));
        assert_int_equal(cairn_index_sealed(index), n);
        cairn_index_query *queries = whole(&k);
        double got = recall(index, queries, k.nq, 8);
        print_message("%-48s recall@8 %.2f, %zu bytes\n", kinds[i].kind, got, cairn_index_bytes(index));
        assert_true(got >= kinds[i].least);
        for (size_t q = 0; q < k.nq; q++) queries[q] = (cairn_index_query){queries[q].q, 100, (uint32_t)n - 50};
        recall(index, queries, k.nq, 8);
        cairn_free(queries);
        cairn_index_free(index);
        keys_free(&k);
    }
}

static void flat_is_exact_over_dims_types_ranges_and_ties(void **state)
{
    (void)state;
    const uint32_t dims[] = {4, 17, 64, 128};
    const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_BF16, CAIRN_F32};
    test_random r = {3};
    for (size_t d = 0; d < 4; d++) {
        keys k = keys_new(200 + d, d % 2 == 0 ? MILD : HARSH, 2500, 70, dims[d], dtypes[d % 3]);
        for (size_t i = 0; i < 600; i++) { /* some rows several times */
            size_t bytes = k.dim * cairn_dtype_size(k.dtype);
            memcpy((char *)k.rows + test_random_below(&r, 2500) * bytes, key_at(&k, test_random_below(&r, 40)), bytes);
        }
        cairn_index *index = sealed_index("flat", &k, 2000);
        cairn_index_query *queries = whole(&k);
        assert_search_is_a_full_sort(index, queries, k.nq, 9);
        assert_search_is_a_full_sort(index, queries, k.nq, 300);
        for (size_t i = 0; i < k.nq; i++) {
            queries[i].lo = test_random_below(&r, 2501);
            queries[i].hi = test_random_below(&r, 2501);
        }
        assert_search_is_a_full_sort(index, queries, k.nq, 5);
        cairn_free(queries);
        cairn_index_free(index);
        keys_free(&k);
    }
    keys k = keys_new(210, MILD, 3000, 3, 32, CAIRN_F32); /* all rows identical: FAISS cannot say which */
    for (size_t i = 1; i < k.n; i++) memcpy((float *)k.rows + i * 32, k.rows, 128);
    cairn_index *index = sealed_index("flat", &k, 3000);
    cairn_index_query *queries = whole(&k);
    assert_search_is_a_full_sort(index, queries, k.nq, 6);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[18];
    uint32_t found[3];
    assert_ok(cairn_index_search(index, scratch, queries, 3, 6, hits, found, NULL));
    assert_int_equal(scratch->unproven, 3);
    assert_int_equal(hits[0].id, 2999);
    cairn_index_scratch_free(scratch);
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

static void flat_is_proven_by_faiss_alone_on_ordinary_keys(void **state)
{
    (void)state;
    keys k = keys_new(220, MILD, 5000, 64, 32, CAIRN_F16);
    cairn_index *index = sealed_index("flat", &k, 5000);
    cairn_index_query *queries = whole(&k);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[64 * 4];
    uint32_t found[64];
    assert_ok(cairn_index_search(index, scratch, queries, 64, 4, hits, found, NULL));
    assert_int_equal(scratch->unproven, 0);
    assert_true(scratch->rescored < 64 * 40); /* nothing was scanned */
    cairn_index_scratch_free(scratch);
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

static void rows_after_the_seal_are_found_at_once(void **state)
{
    (void)state;
    const char *const kinds[] = {"flat", "ivf", "sq8"};
    keys k = keys_new(230, MILD, 1200, 1, 32, CAIRN_F16);
    for (size_t i = 0; i < 3; i++) {
        cairn_index *index = NULL;
        assert_ok(cairn_index_new(kinds[i], k.dim, k.dtype, &index));
        assert_ok(cairn_index_add(index, 1000, k.rows));
        assert_ok(cairn_index_seal(index, 1000));
        cairn_index_scratch *scratch = scratch_new();
        for (size_t row = 1000; row < 1200; row++) {
            float q[32];
            uint32_t found;
            cairn_index_hit hit;
            assert_ok(cairn_index_add(index, 1, key_at(&k, row)));
            cairn_index_row(index, (uint32_t)row, q);
            for (size_t j = 0; j < 32; j++) q[j] *= 3;
            cairn_index_query query = {q, 0, (uint32_t)row + 1};
            assert_ok(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, NULL));
            float own;
            cairn_index_scores(index, q, (uint32_t)row, (uint32_t)row + 1, &own);
            assert_true(hit.score >= own); /* it, or one even better */
        }
        assert_int_equal(cairn_index_sealed(index), 1000);
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
    }
    keys_free(&k);
}

static void an_answer_does_not_depend_on_its_batch(void **state)
{
    (void)state;
    const char *const kinds[] = {"flat", "ivf:nprobe=3", "sq8", "hnsw:efSearch=16"};
    keys k = keys_new(240, MILD, 1000, 70, 32, CAIRN_F16);
    for (size_t i = 0; i < 4; i++) {
        cairn_index *index = sealed_index(kinds[i], &k, 900);
        cairn_index_query *queries = whole(&k);
        for (size_t q = 0; q < k.nq; q++) queries[q].hi = (uint32_t)(930 + q);
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_hit together[70 * 5];
        uint32_t found[70];
        assert_ok(cairn_index_search(index, scratch, queries, k.nq, 5, together, found, NULL));
        for (size_t q = 0; q < k.nq; q++) {
            cairn_index_hit alone[5];
            uint32_t n;
            assert_ok(cairn_index_search(index, scratch, queries + q, 1, 5, alone, &n, NULL));
            assert_memory_equal(alone, together + q * 5, sizeof alone);
        }
        cairn_index_scratch_free(scratch);
        cairn_free(queries);
        cairn_index_free(index);
    }
    keys_free(&k);
}

static void mass_is_exact_with_flat_and_unknown_where_lists_were_skipped(void **state)
{
    (void)state;
    keys k = keys_new(250, MILD, 2000, 2, 32, CAIRN_F16);
    const char *const kinds[] = {"exact", "flat", "ivf:nprobe=2"};
    cairn_index_mass mass[3];
    for (size_t i = 0; i < 3; i++) {
        cairn_index *index = sealed_index(kinds[i], &k, i == 0 ? 0 : 2000);
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_hit hits[4];
        uint32_t found;
        cairn_index_query query = {k.q, 0, 2000};
        assert_ok(cairn_index_search(index, scratch, &query, 1, 4, hits, &found, &mass[i]));
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
    }
    assert_memory_equal(&mass[0], &mass[1], sizeof mass[0]);
    assert_true(mass[1].error == 0);
    assert_true(mass[2].error == INFINITY);
    assert_true(mass[2].lse <= mass[0].lse + 1e-5f); /* of the rows it saw */
    keys_free(&k);
}

static void what_is_not_a_number_does_not_stop_a_seal(void **state)
{
    (void)state;
    keys k = keys_new(260, MILD, 1500, 4, 32, CAIRN_F32);
    float *rows = k.rows;
    rows[7 * 32 + 1] = NAN;
    for (size_t j = 0; j < 32; j++) rows[900 * 32 + j] = 3e38f;
    const char *const kinds[] = {"flat", "ivf", "sq8"};
    for (size_t i = 0; i < 3; i++) {
        cairn_index *index = sealed_index(kinds[i], &k, 1400);
        cairn_index_query query = {k.q, 1, 1500};
        if (i == 0) assert_search_is_a_full_sort(index, &query, 1, 5);
        recall(index, &query, 1, 5);
        cairn_index_free(index);
    }
    keys_free(&k);
}

/* ---- kinds ---- */

static void assert_refused(const char *kind, uint32_t dim, cairn_status status, const char *because)
{
    cairn_index *index = (cairn_index *)&index;
    assert_int_equal(cairn_index_new(kind, dim, CAIRN_F16, &index), status);
    assert_null(index);
    if (strstr(cairn_last_error(), because) == NULL) fail_msg("'%s' does not say '%s'", cairn_last_error(), because);
    if (strstr(cairn_last_error(), ".cpp") != NULL) fail_msg("'%s' names FAISS's sources", cairn_last_error());
}

static void a_kind_that_cannot_be_is_refused_with_the_reason(void **state)
{
    (void)state;
    assert_refused("NoSuchIndex", 32, CAIRN_INVALID, "could not parse index string NoSuchIndex");
    assert_refused("PQ7", 32, CAIRN_INVALID, "multiple of the number of subquantizers"); /* FAISS's own words */
    assert_refused("flat:nprobe=4", 32, CAIRN_INVALID, "could not set parameter nprobe");
    assert_refused("LSH", 32, CAIRN_INVALID, "metric");
    assert_refused("ivf:probes=4", 32, CAIRN_INVALID, "'probes=4' is not one of nprobe");
    assert_refused("ivf:nprobe", 32, CAIRN_INVALID, "nprobe");
    assert_refused("ivf:nprobe=0", 32, CAIRN_INVALID, "not a number in 1..");
    assert_refused("ivf:nprobe=4x", 32, CAIRN_INVALID, "nprobe=4x");
    assert_refused("ivf:nprobe=-4", 32, CAIRN_INVALID, "nprobe=-4");
    assert_refused("ivf:", 32, CAIRN_INVALID, "''");
    assert_refused("ivf:verbose=1", 32, CAIRN_INVALID, "verbose"); /* it would print */
    assert_refused("scan:k=4", 32, CAIRN_INVALID, "no parameters");
    assert_refused("auto", 32, CAIRN_INVALID, "calibration");
    assert_refused("PQ0", 32, CAIRN_INVALID, "0 is not in 1..");               /* FAISS would divide by it */
    assert_refused("PQ1x40", 32, CAIRN_INVALID, "40 is not in 1..16");         /* or allocate 2^40 */
    assert_refused("IVF99999999999,Flat", 32, CAIRN_INVALID, "is not in 1.."); /* likewise */
    assert_refused("IVF8(Index3),Flat", 32, CAIRN_INVALID, "'('");             /* or stop the process */
    assert_refused("IVF8,Flat\n", 32, CAIRN_INVALID, "does not belong");
    assert_refused("NSG32", 32, CAIRN_UNSUPPORTED, "not let in");
    assert_refused("IDMap,Flat", 32, CAIRN_UNSUPPORTED, "not let in");
    assert_refused("scan", 0, CAIRN_INVALID, "0 dimensions");
    assert_refused("scan", 4000, CAIRN_INVALID, "4000 dimensions");
    char long_kind[200];
    memset(long_kind, 'a', sizeof long_kind);
    long_kind[199] = 0;
    assert_refused(long_kind, 32, CAIRN_INVALID, "199 characters");
    cairn_index *index = NULL;
    assert_int_equal(cairn_index_new("scan", 32, CAIRN_Q8, &index), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "q8"));
}

static void scan_kinds_need_no_file(void **state)
{
    (void)state;
    assert_true(cairn_index_is_scan("scan") && cairn_index_is_scan("exact") && cairn_index_is_scan(""));
    assert_false(cairn_index_is_scan("flat") || cairn_index_is_scan("ivf") || cairn_index_is_scan("IVF4,Flat"));
    keys k = keys_new(270, MILD, 10, 1, 8, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    uint64_t hash;
    assert_ok(cairn_index_seal(index, 10)); /* nothing to do */
    assert_int_equal(cairn_index_sealed(index), 0);
    assert_int_equal(cairn_index_save(index, "/nonexistent/x", &hash), CAIRN_INVALID);
    assert_int_equal(cairn_index_load(index, "/nonexistent/x", 0, 10, false), CAIRN_INVALID);
    assert_int_equal(cairn_index_seal(index, 11), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "11 rows"));
    cairn_index_free(index);
    keys_free(&k);
}

/* ---- files ---- */

typedef struct file_fixture {
    char *dir, *path;
    keys k;
    cairn_index_query *queries;
    cairn_index *index; /* ivf, sealed, saved */
    uint64_t hash;
} file_fixture;

static int file_setup(void **state)
{
    file_fixture *fx = cairn_calloc(1, sizeof *fx);
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "a.index");
    fx->k = keys_new(300, MILD, 2000, 10, 32, CAIRN_F16);
    fx->queries = whole(&fx->k);
    fx->index = sealed_index("ivf:nprobe=4", &fx->k, 1800);
    assert_ok(cairn_index_save(fx->index, fx->path, &fx->hash));
    *state = fx;
    return 0;
}
static int file_teardown(void **state)
{
    file_fixture *fx = *state;
    cairn_index_free(fx->index);
    cairn_free(fx->queries);
    keys_free(&fx->k);
    free(fx->path);
    test_remove_dir(fx->dir);
    cairn_free(fx);
    return 0;
}

static void assert_same_answers(const file_fixture *fx, const cairn_index *a, const cairn_index *b)
{
    cairn_index_hit hits[2][10 * 6];
    uint32_t found[10];
    cairn_index_scratch *scratch = scratch_new();
    assert_ok(cairn_index_search(a, scratch, fx->queries, 10, 6, hits[0], found, NULL));
    assert_ok(cairn_index_search(b, scratch, fx->queries, 10, 6, hits[1], found, NULL));
    assert_memory_equal(hits[0], hits[1], sizeof hits[0]);
    cairn_index_scratch_free(scratch);
}

static size_t files_in(const char *dir)
{
    size_t n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    while (readdir(d) != NULL) n++;
    closedir(d);
    return n - 2;
}

static void a_saved_index_answers_the_same_when_loaded_or_mapped(void **state)
{
    file_fixture *fx = *state;
    struct stat info;
    assert_int_equal(stat(fx->path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    assert_int_equal(files_in(fx->dir), 1); /* nothing beside it */
    size_t bytes;
    char *data = test_read_file(fx->path, &bytes);
    assert_true(cairn_hash64(data, bytes) == fx->hash);
    free(data);
    for (int map = 0; map < 2; map++) {
        cairn_index *loaded = index_of("ivf:nprobe=4", &fx->k);
        assert_ok(cairn_index_load(loaded, fx->path, fx->hash, 1800, map));
        assert_int_equal(cairn_index_sealed(loaded), 1800);
        assert_same_answers(fx, fx->index, loaded);
        cairn_index_free(loaded);
    }
}

static void a_mapped_index_can_be_extended_and_saved(void **state)
{
    file_fixture *fx = *state;
    char *copy = test_path(fx->dir, "b.index");
    uint64_t hash = 0;
    cairn_index *mapped = index_of("ivf:nprobe=4", &fx->k);
    assert_ok(cairn_index_load(mapped, fx->path, fx->hash, 1800, true));
    assert_ok(cairn_index_save(mapped, copy, &hash));
    assert_ok(cairn_index_load(mapped, copy, hash, 1800, true));
    assert_same_answers(fx, fx->index, mapped);
    assert_ok(cairn_index_seal(fx->index, 2000));
    assert_ok(cairn_index_seal(mapped, 2000));
    assert_int_equal(cairn_index_sealed(mapped), 2000);
    assert_same_answers(fx, fx->index, mapped);
    assert_ok(cairn_index_load(mapped, fx->path, fx->hash, 1800, true));
    assert_int_equal(remove(fx->path), 0); /* the map lives on; extending then starts anew */
    recall(mapped, fx->queries, 10, 6);
    assert_ok(cairn_index_seal(mapped, 1900));
    assert_int_equal(cairn_index_sealed(mapped), 1900);
    recall(mapped, fx->queries, 10, 6);
    cairn_index_free(mapped);
    free(copy);
}

static void expect_unsealed_but_right(const file_fixture *fx, cairn_index *index)
{
    assert_int_equal(cairn_index_sealed(index), 0);
    assert_search_is_a_full_sort(index, fx->queries, 10, 6);
}

static void a_damaged_file_is_corrupt_and_the_index_still_right(void **state)
{
    file_fixture *fx = *state;
    size_t bytes;
    char *data = test_read_file(fx->path, &bytes);
    char *bad = test_path(fx->dir, "bad.index");
    const size_t at[] = {0, 5, bytes / 2, bytes - 1};
    for (size_t i = 0; i < 4; i++) { /* the hash notices */
        cairn_index *index = index_of("ivf:nprobe=4", &fx->k);
        assert_ok(cairn_index_load(index, fx->path, fx->hash, 1800, false)); /* was sealed before */
        data[at[i]] ^= 16;
        test_write_file(bad, data, bytes);
        data[at[i]] ^= 16;
        assert_int_equal(cairn_index_load(index, bad, fx->hash, 1800, i % 2), CAIRN_CORRUPT);
        assert_non_null(strstr(cairn_last_error(), "bad.index"));
        assert_non_null(strstr(cairn_last_error(), "hash"));
        expect_unsealed_but_right(fx, index);
        cairn_index_free(index);
    }
    for (size_t i = 0; i < 3; i++) { /* the hash fits, but FAISS cannot read it */
        size_t cut = i == 0 ? 0 : i == 1 ? 40 : bytes / 2;
        cairn_index *index = index_of("ivf", &fx->k);
        test_write_file(bad, data, cut);
        if (__lsan_disable != NULL) __lsan_disable();
        assert_int_equal(cairn_index_load(index, bad, cairn_hash64(data, cut), 1800, false), CAIRN_CORRUPT);
        if (__lsan_enable != NULL) __lsan_enable();
        expect_unsealed_but_right(fx, index);
        cairn_index_free(index);
    }
    free(bad);
    free(data);
}

static void a_failed_allocation_never_leaves_a_wrong_index(void **state)
{
    file_fixture *fx = *state;
    char *copy = test_path(fx->dir, "b.index");
    for (uint64_t fail = 1;; fail++) {
        cairn_index *index = index_of("ivf:nprobe=4", &fx->k);
        uint64_t hash = 0;
        cairn_alloc_fail_at(fail);
        cairn_status st = cairn_index_load(index, fx->path, fx->hash, 1800, true);
        if (st == CAIRN_OK) st = cairn_index_save(index, copy, &hash);
        if (st == CAIRN_OK) st = cairn_index_seal(index, 1900);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) {
            assert_int_equal(st, CAIRN_NO_MEMORY);
            size_t sealed = cairn_index_sealed(index);
            assert_true(sealed == 0 || sealed == 1800);
            if (sealed == 0) expect_unsealed_but_right(fx, index);
        }
        recall(index, fx->queries, 10, 6);
        cairn_index_free(index);
        if (st == CAIRN_OK) {
            assert_true(fail > 10);
            break;
        }
    }
    free(copy);
}

static void a_file_that_is_not_there_or_not_ours_leaves_the_index_unsealed(void **state)
{
    file_fixture *fx = *state;
    cairn_index *index = index_of("ivf", &fx->k);
    char *none = test_path(fx->dir, "none");
    assert_int_equal(cairn_index_load(index, none, fx->hash, 1800, false), CAIRN_NOT_FOUND);
    expect_unsealed_but_right(fx, index);
    assert_int_equal(cairn_index_load(index, fx->dir, fx->hash, 1800, false), CAIRN_CORRUPT);
    assert_int_equal(cairn_index_load(index, fx->path, fx->hash, 1799, false), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "1800 rows, expected 1799"));
    expect_unsealed_but_right(fx, index);
    assert_int_equal(cairn_index_load(index, fx->path, fx->hash, 2001, false), CAIRN_INVALID);
    cairn_index_free(index);
    keys other = keys_new(301, MILD, 1800, 1, 16, CAIRN_F16);
    index = index_of("ivf", &other);
    assert_int_equal(cairn_index_load(index, fx->path, fx->hash, 1800, true), CAIRN_CORRUPT);
    assert_non_null(strstr(cairn_last_error(), "32 dimensions"));
    assert_int_equal(cairn_index_sealed(index), 0);
    uint64_t hash = 0;
    assert_int_equal(cairn_index_save(index, none, &hash), CAIRN_INVALID); /* nothing sealed */
    cairn_index_free(index);
    keys_free(&other);
    char *nowhere = test_path(fx->dir, "no/such/place");
    assert_int_equal(cairn_index_save(fx->index, nowhere, &hash), CAIRN_NOT_FOUND);
    assert_int_equal(cairn_index_save(fx->index, "/dev/full/x", &hash), CAIRN_IO);
    free(nowhere);
    free(none);
}

static void every_recipe_goes_through_a_file(void **state)
{
    file_fixture *fx = *state;
    const char *const kinds[] = {"flat",    "sq8",          "IVF8,SQ8",      "hnsw",    "PCA16,IVF8,Flat",
                                 "PQ8x4np", "IVF4,PQ8x4np", "IVF4,PQ8x4fsr", "RR,Flat", "IVF8_HNSW4,Flat",
                                 "ITQ,SQ4", "Flat,RFlat",   "L2norm,HNSW8",  "PQ8x4fs", "IVF4,SQfp16,RFlat"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        cairn_index *index = sealed_index(kinds[i], &fx->k, 400);
        uint64_t hash = 0;
        assert_ok(cairn_index_save(index, fx->path, &hash)); /* over the old one */
        for (int map = 0; map < 2; map++) {
            cairn_index *loaded = index_of(kinds[i], &fx->k);
            assert_ok(cairn_index_load(loaded, fx->path, hash, 400, map));
            assert_same_answers(fx, index, loaded);
            assert_ok(cairn_index_seal(loaded, 500));
            recall(loaded, fx->queries, 10, 6);
            cairn_index_free(loaded);
        }
        cairn_index_free(index);
    }
}

/* ---- calibration ---- */

/* Calibrates a thousand rows of an index of kind `of`. */
static cairn_status calibrate_few(const char *of, char kind[64], char why[160])
{
    keys k = keys_new(400, MILD, 1000, 4, 32, CAIRN_F16);
    cairn_index *index = index_of(of, &k);
    cairn_status st = cairn_index_calibrate(index, k.q, k.nq, 4, 1000, kind, why);
    cairn_index_free(index);
    keys_free(&k);
    return st;
}

static void few_rows_are_scanned_without_asking(void **state)
{
    (void)state;
    char kind[64];
    char why[160];
    assert_ok(calibrate_few("scan", kind, why));
    assert_string_equal(kind, "scan");
    assert_non_null(strstr(why, "1000 rows"));
}

static void calibration_names_a_kind_that_works_and_says_what_it_measured(void **state)
{
    (void)state;
    keys k = keys_new(401, MILD, 20500, 40, 16, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    for (int own = 0; own < 2; own++) {
        char kind[64];
        char why[160];
        assert_ok(cairn_index_calibrate(index, own ? NULL : k.q, own ? 0 : k.nq, 4, 1500, kind, why));
        print_message("%s: %s\n", kind, why);
        assert_non_null(strstr(why, "20500 rows"));
        assert_non_null(strstr(why, "scan"));
        cairn_index *named = NULL;
        assert_ok(cairn_index_new(kind, k.dim, k.dtype, &named));
        cairn_index_free(named);
        assert_ok(cairn_index_calibrate(index, k.q, k.nq, 4, 0, kind, why)); /* no time: no builds */
        assert_true(cairn_index_is_scan(kind));
    }
    cairn_index_free(index);
    keys_free(&k);
}

/* A scan over rows without images is full precision: it would be timed as slow as "exact", and lose against it. */
static void rows_without_images_are_not_calibrated(void **state)
{
    (void)state;
    char kind[64];
    char why[160];
    assert_int_equal(calibrate_few("exact", kind, why), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "'exact'"));
}

/* ---- threads ---- */

typedef struct seeker {
    const file_fixture *fx;
    const cairn_index *index;
    cairn_index_hit hits[10 * 6];
    cairn_status status;
} seeker;

static void *seek(void *arg)
{
    seeker *s = arg;
    cairn_index_scratch *scratch = NULL;
    uint32_t found[10];
    s->status = cairn_index_scratch_new(&scratch);
    for (int round = 0; round < 30 && s->status == CAIRN_OK; round++)
        s->status = cairn_index_search(s->index, scratch, s->fx->queries, 10, 6, s->hits, found, NULL);
    cairn_index_scratch_free(scratch);
    return NULL;
}

static void two_threads_search_one_sealed_index(void **state)
{
    file_fixture *fx = *state;
    cairn_index *mapped = index_of("ivf:nprobe=4", &fx->k);
    assert_ok(cairn_index_load(mapped, fx->path, fx->hash, 1800, true));
    const cairn_index *const indexes[] = {fx->index, mapped};
    for (size_t i = 0; i < 2; i++) {
        seeker seekers[3];
        pthread_t threads[2];
        for (size_t s = 0; s < 3; s++) {
            seekers[s].fx = fx;
            seekers[s].index = indexes[i];
        }
        for (size_t s = 0; s < 2; s++) assert_int_equal(pthread_create(&threads[s], NULL, seek, &seekers[s]), 0);
        seek(&seekers[2]);
        for (size_t s = 0; s < 2; s++) pthread_join(threads[s], NULL);
        for (size_t s = 0; s < 3; s++) {
            assert_int_equal(seekers[s].status, CAIRN_OK);
            assert_memory_equal(seekers[s].hits, seekers[2].hits, sizeof seekers[2].hits);
        }
    }
    cairn_index_free(mapped);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kind_finds_most_of_the_best_and_flat_all),
        cmocka_unit_test(flat_is_exact_over_dims_types_ranges_and_ties),
        cmocka_unit_test(flat_is_proven_by_faiss_alone_on_ordinary_keys),
        cmocka_unit_test(rows_after_the_seal_are_found_at_once),
        cmocka_unit_test(an_answer_does_not_depend_on_its_batch),
        cmocka_unit_test(mass_is_exact_with_flat_and_unknown_where_lists_were_skipped),
        cmocka_unit_test(what_is_not_a_number_does_not_stop_a_seal),
        cmocka_unit_test(a_kind_that_cannot_be_is_refused_with_the_reason),
        cmocka_unit_test(scan_kinds_need_no_file),
        cmocka_unit_test_setup_teardown(a_saved_index_answers_the_same_when_loaded_or_mapped, file_setup,
                                        file_teardown),
        cmocka_unit_test_setup_teardown(a_mapped_index_can_be_extended_and_saved, file_setup, file_teardown),
        cmocka_unit_test_setup_teardown(a_damaged_file_is_corrupt_and_the_index_still_right, file_setup, file_teardown),
        cmocka_unit_test_setup_teardown(a_file_that_is_not_there_or_not_ours_leaves_the_index_unsealed, file_setup,
                                        file_teardown),
        cmocka_unit_test_setup_teardown(a_failed_allocation_never_leaves_a_wrong_index, file_setup, file_teardown),
        cmocka_unit_test_setup_teardown(every_recipe_goes_through_a_file, file_setup, file_teardown),
        cmocka_unit_test(few_rows_are_scanned_without_asking),
        cmocka_unit_test(calibration_names_a_kind_that_works_and_says_what_it_measured),
        cmocka_unit_test(rows_without_images_are_not_calibrated),
        cmocka_unit_test_setup_teardown(two_threads_search_one_sealed_index, file_setup, file_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
