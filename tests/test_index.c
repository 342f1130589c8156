/* Landmark search without FAISS: rows, the int8 scan and its proof, ranges, ties, mass.
 *
 * The witness is a full sort over scores accumulated in double from the rows as they were given (converted here, not by
 * the library), and for equality to the last bit a full sort of cairn_index_scores.
 * labels: threads */
#include <pthread.h>

#include "index_keys.h"

/* The element types, written out: what a row means does not come from the library's own conversion. */
static float from_half(uint16_t h)
{
    int exponent = h >> 10 & 31;
    int mantissa = h & 1023;
    float v = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
              : exponent == 0 ? ldexpf((float)mantissa, -24)
                              : ldexpf((float)(1024 + mantissa), exponent - 25);
    return h & 0x8000 ? -v : v;
}
static float from_bf16(uint16_t b)
{
    uint32_t bits = (uint32_t)b << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
static double element(const void *rows, cairn_dtype dtype, size_t i)
{
    if (dtype == CAIRN_F32) return (double)((const float *)rows)[i];
    uint16_t v = ((const uint16_t *)rows)[i];
    return (double)(dtype == CAIRN_F16 ? from_half(v) : from_bf16(v));
}

/* ---- scores ---- */

static void scores_are_the_inner_products_of_the_stored_rows(void **state)
{
    (void)state;
    const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16};
    for (size_t t = 0; t < 3; t++)
        for (uint32_t dim = 4; dim <= 128; dim += 31) {
            keys k = keys_new(dim, MILD, 300, 2, dim, dtypes[t]);
            cairn_index *index = index_of("scan", &k);
            float scores[300];
            float row[128];
            cairn_index_scores(index, k.q, 0, 300, scores);
            for (size_t i = 0; i < k.n; i++) {
                double sum = 0;
                double size = 0;
                cairn_index_row(index, (uint32_t)i, row);
                for (uint32_t j = 0; j < dim; j++) {
                    double x = element(k.rows, k.dtype, i * dim + j);
                    assert_true((double)row[j] == x);
                    sum += x * (double)k.q[j];
                    size += fabs(x * (double)k.q[j]);
                }
                assert_true(fabs(sum - (double)scores[i]) <= size * dim * 6e-8);
            }
            float part[7];
            cairn_index_scores(index, k.q, 140, 147, part);
            assert_memory_equal(part, scores + 140, sizeof part);
            cairn_index_free(index);
            keys_free(&k);
        }
}

/* ---- the k best ---- */

static void scan_and_exact_give_what_a_full_sort_gives(void **state)
{
    (void)state;
    const uint32_t dims[] = {4, 7, 32, 64, 100, 128};
    const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_BF16, CAIRN_F32};
    const size_t sizes[] = {1, 17, 300, 5000};
    const uint32_t ks[] = {1, 4, 16, 90};
    const char *const kinds[] = {"scan", "exact"};
    for (size_t d = 0; d < 6; d++)
        for (size_t s = 0; s < 4; s++) {
            keys k = keys_new(d * 10 + s, d % 2 == 0 ? MILD : HARSH, sizes[s], 9, dims[d], dtypes[(d + s) % 3]);
            cairn_index_query *queries = whole(&k);
            for (size_t kind = 0; kind < 2; kind++) {
                cairn_index *index = index_of(kinds[kind], &k);
                assert_string_equal(cairn_index_kind(index), kinds[kind]);
                for (size_t i = 0; i < 4; i++) assert_search_is_a_full_sort(index, queries, k.nq, ks[i]);
                cairn_index_free(index);
            }
            cairn_free(queries);
            keys_free(&k);
        }
}

static void only_rows_of_the_range_count(void **state)
{
    (void)state;
    test_random r = {5};
    keys k = keys_new(5, MILD, 6000, 70, 32, CAIRN_F16);
    const char *const kinds[] = {"scan", "exact"};
    for (size_t kind = 0; kind < 2; kind++) {
        cairn_index *index = index_of(kinds[kind], &k);
        cairn_index_query *queries = whole(&k);
        for (size_t i = 0; i < k.nq; i++) {
            queries[i].lo = test_random_below(&r, 6001);
            queries[i].hi = test_random_below(&r, 6001); /* half of them empty */
        }
        queries[0] = (cairn_index_query){k.q, 4095, 4097};
        queries[1] = (cairn_index_query){k.q, 31, 6000};
        queries[2] = (cairn_index_query){k.q, 1024, 2048};
        assert_search_is_a_full_sort(index, queries, k.nq, 7);
        cairn_free(queries);
        cairn_index_free(index);
    }
    keys_free(&k);
}

static void a_range_beyond_the_rows_is_refused_with_its_numbers(void **state)
{
    (void)state;
    keys k = keys_new(6, MILD, 40, 1, 8, CAIRN_F32);
    cairn_index *index = index_of("scan", &k);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_query query = {k.q, 5, 41};
    cairn_index_hit hit;
    uint32_t found;
    assert_int_equal(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, NULL), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "[5, 41) of 40"));
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    keys_free(&k);
}

static void no_rows_no_queries_and_k_zero_are_answers(void **state)
{
    (void)state;
    keys k = keys_new(7, MILD, 700, 3, 16, CAIRN_F16);
    cairn_index *empty = NULL;
    assert_ok(cairn_index_new("", k.dim, k.dtype, &empty));
    assert_string_equal(cairn_index_kind(empty), "scan");
    cairn_index *index = index_of("scan", &k);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_query query = {k.q, 0, 0};
    cairn_index_hit hits[4];
    uint32_t found = 9;
    cairn_index_mass mass;
    assert_ok(cairn_index_search(empty, scratch, &query, 1, 4, hits, &found, &mass));
    assert_int_equal(found, 0);
    assert_true(mass.lse == -INFINITY && mass.error == 0);
    assert_ok(cairn_index_search(index, scratch, NULL, 0, 4, hits, &found, NULL));
    query.hi = 700;
    assert_ok(cairn_index_search(index, scratch, &query, 1, 0, hits, &found, &mass));
    assert_int_equal(found, 0);
    assert_true(isfinite(mass.lse));
    assert_ok(cairn_index_search(index, scratch, &query, 1, 0, NULL, &found, NULL));
    assert_int_equal(found, 0);
    assert_ok(cairn_index_add(index, 0, NULL));
    assert_int_equal(cairn_index_count(index), 700);
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    cairn_index_free(empty);
    keys_free(&k);
}

static void equal_rows_come_newest_first(void **state)
{
    (void)state;
    enum { N = 5000, D = 32 };
    float *rows = cairn_alloc_array((size_t)N * D, sizeof *rows);
    float q[D];
    test_random r = {8};
    test_random_fill(&r, q, D);
    test_random_fill(&r, rows, D);
    for (size_t i = 1; i < N; i++) memcpy(rows + i * D, rows, D * sizeof *rows); /* all the same */
    const char *const kinds[] = {"scan", "exact"};
    for (size_t kind = 0; kind < 2; kind++) {
        cairn_index *index = NULL;
        assert_ok(cairn_index_new(kinds[kind], D, CAIRN_F32, &index));
        assert_ok(cairn_index_add(index, N, rows));
        const cairn_index_query queries[] = {{q, 0, N}, {q, 100, 4000}, {q, 0, 50}};
        for (uint32_t k = 1; k < 200; k += 66) {
            assert_search_is_a_full_sort(index, queries, 3, k);
            cairn_index_scratch *scratch = scratch_new();
            cairn_index_hit hits[200];
            uint32_t found;
            assert_ok(cairn_index_search(index, scratch, queries, 1, k, hits, &found, NULL));
            for (uint32_t h = 0; h < k; h++) assert_int_equal(hits[h].id, N - 1 - h);
            cairn_index_scratch_free(scratch);
        }
        cairn_index_free(index);
    }
    /* Pairs: each row is there twice, far apart. */
    test_random_fill(&r, rows, (size_t)N / 2 * D);
    memcpy(rows + N / 2 * D, rows, (size_t)N / 2 * D * sizeof *rows);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", D, CAIRN_F32, &index));
    assert_ok(cairn_index_add(index, N, rows));
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[8];
    uint32_t found;
    assert_ok(cairn_index_search(index, scratch, &(cairn_index_query){q, 0, N}, 1, 8, hits, &found, NULL));
    for (size_t h = 0; h < 8; h += 2) assert_int_equal(hits[h].id, hits[h + 1].id + N / 2);
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    cairn_free(rows);
}

/* Rows whose int8 images are all alike, although their scores are not: nothing can be proven from the image. */
static void a_scan_that_int8_cannot_decide_is_still_exact(void **state)
{
    (void)state;
    enum { N = 5000, D = 32 };
    float *rows = cairn_calloc((size_t)N * D, sizeof *rows);
    float q[D];
    test_random r = {9};
    test_random_fill(&r, q, D);
    for (size_t i = 0; i < N; i++) {
        rows[i * D] = i % 2 == 0 ? 1e4f : -1e4f; /* the step is 79 */
        for (size_t j = 1; j < D; j++) rows[i * D + j] = test_random_normal(&r);
    }
    q[0] = 0;
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", D, CAIRN_F32, &index));
    assert_ok(cairn_index_add(index, N, rows));
    cairn_index_query query = {q, 0, N};
    assert_search_is_a_full_sort(index, &query, 1, 5);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[5];
    uint32_t found;
    assert_ok(cairn_index_search(index, scratch, &query, 1, 5, hits, &found, NULL));
    assert_true(scratch->crowded > 0); /* the candidates did not fit, and were scored */
    assert_true(scratch->rescored <= N);
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    cairn_free(rows);
}

static void tiny_and_huge_numbers_change_nothing(void **state)
{
    (void)state;
    const float row_sizes[] = {1, 1e-20f, 1e-38f, 1e15f};
    const float query_sizes[] = {1, 1e-14f, 1e-30f, 0, 1e17f};
    for (size_t r = 0; r < 4; r++) {
        keys k = keys_new(90 + r, MILD, 2000, 3, 32, CAIRN_F32);
        for (size_t i = 0; i < k.n * 32; i++) ((float *)k.rows)[i] *= row_sizes[r];
        cairn_index *index = index_of("scan", &k);
        cairn_index_query *queries = whole(&k);
        for (size_t s = 0; s < 5; s++) {
            float q[3 * 32];
            for (size_t i = 0; i < 96; i++) q[i] = k.q[i] * query_sizes[s];
            for (size_t i = 0; i < 3; i++) queries[i].q = q + i * 32;
            assert_search_is_a_full_sort(index, queries, 3, 5);
        }
        cairn_free(queries);
        cairn_index_free(index);
        keys_free(&k);
    }
    float one_hot[300] = {0}; /* and shapes that are the worst for a scale per vector */
    test_random random = {91};
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", 300, CAIRN_F32, &index));
    for (size_t i = 0; i < 1500; i++) {
        float row[300];
        for (size_t j = 0; j < 300; j++) row[j] = i % 3 == 0 ? (test_random_below(&random, 2) ? 1.0f : -1.0f) : 0;
        if (i % 3 == 1) row[test_random_below(&random, 300)] = 50;
        if (i % 3 == 2) test_random_fill(&random, row, 300);
        assert_ok(cairn_index_add(index, 1, row));
    }
    float flat[300];
    for (size_t j = 0; j < 300; j++) flat[j] = j % 2 == 0 ? 1 : -1;
    one_hot[7] = 3;
    const cairn_index_query queries[] = {{one_hot, 0, 1500}, {flat, 0, 1500}};
    assert_search_is_a_full_sort(index, queries, 2, 5);
    cairn_index_free(index);
}

/* Every score lies within what its image says, at both ends, and some touch the ends: rows and queries whose rounding
 * errors all point the same way. */
static void the_image_bounds_every_score(void **state)
{
    (void)state;
    enum { D = 32, N = 3000 };
    keys k = keys_new(95, HARSH, N, 40, D, CAIRN_F32);
    float *rows = k.rows;
    for (size_t i = 0; i < 32; i++) /* around centre 0: no error of their own, or the same in each element */
        for (size_t j = 0; j < D; j++) rows[i * D + j] = j == 0 ? 127 : i % 2 == 0 ? 127 : (float)(i + j) + 0.49f;
    for (size_t i = 0; i < 10; i++)
        for (size_t j = 0; j < D; j++)
            k.q[i * D + j] = j == 0 ? 127 : (float)(j % (i + 1)) + (i % 2 == 0 ? 0.49f : -0.49f);
    cairn_index *index = index_of("scan", &k);
    cairn_index_query *queries = whole(&k);
    const cairn_kernels *kernels = cairn_kernels_best();
    double nearest = INFINITY;
    for (size_t i = 0; i < k.nq; i++) {
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_hit hit;
        uint32_t found;
        assert_ok(cairn_index_search(index, scratch, queries + i, 1, 1, &hit, &found, NULL)); /* prepares its image */
        for (size_t row = 0; row < N; row++) {
            const cairn_row_chunk *chunk = &index->rows.chunks[0];
            float upper[16];
            kernels->scan_i8(chunk->image, chunk->scale, chunk->sum, row / 16, 1, index->rows.image_dim, scratch->image,
                             scratch->scale, 1, upper, NULL, 16, NULL, NULL);
            const int8_t *x = cairn_row_slack(&index->rows, chunk, row);
            const int8_t *y = scratch->query[0].slack_weight;
            double slack = (double)(x[0] * y[0] + x[1] * y[1]) * (double)chunk->scale[row] * (double)scratch->scale[0];
            double score = 0;
            const float *center = index->rows.centers + cairn_frame_of(row) * D;
            for (size_t j = 0; j < D; j++)
                score += (double)k.q[i * D + j] * ((double)rows[row * D + j] - (double)center[j]);
            double above = (double)upper[row % 16] - score;
            assert_true(above >= 0);
            assert_true(above <= 2 * slack);
            if (above / (2 * slack) < nearest) nearest = above / (2 * slack);
        }
        cairn_index_scratch_free(scratch);
    }
    print_message("the nearest score comes within %.3f of its interval's width to the end\n", nearest);
    assert_true(nearest < 0.05); /* the ends are needed */
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

/* Row 0 looks better by int8 than row 1, by 30 whole steps, and yet is worse: each of its
 * elements was rounded up, each of row 1's down. */
static void the_best_row_is_found_though_its_image_looks_far_worse(void **state)
{
    (void)state;
    enum { D = 32, N = 400 };
    float rows[N * D];
    float q[D];
    test_random r = {96};
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < D; j++) {
            float whole = i < 2 ? (j == 0 ? 127.0f : 80.0f - (i == 1 && j > 1 ? 1.0f : 0.0f)) : -50.0f;
            rows[i * D + j] = whole + (i >= 2 ? test_random_normal(&r) : j == 0 ? 0 : i == 0 ? -0.49f : 0.49f);
        }
    for (size_t j = 0; j < D; j++) q[j] = 127;
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", D, CAIRN_F32, &index));
    assert_ok(cairn_index_add(index, N, rows));
    const cairn_index_query query = {q, 0, N};
    assert_search_is_a_full_sort(index, &query, 1, 1);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hit;
    uint32_t found;
    assert_ok(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, NULL));
    assert_int_equal(hit.id, 1);
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
}

/* The bound must not be so loose that the scan is an exact scan in disguise. */
static void the_proof_costs_few_full_precision_scores(void **state)
{
    (void)state;
    const struct {
        uint32_t dim, k;
        double most; /* rows scored in full precision per query, as a multiple of k */
    } cases[] = {{32, 4, 4}, {64, 8, 4}, {128, 16, 6}};
    for (size_t c = 0; c < 3; c++) {
        keys k = keys_new(20 + c, MILD, 16000, 64, cases[c].dim, CAIRN_F16);
        cairn_index *index = index_of("scan", &k);
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_query *queries = whole(&k);
        cairn_index_hit *hits = cairn_alloc_array(k.nq * cases[c].k, sizeof *hits);
        uint32_t found[64];
        assert_ok(cairn_index_search(index, scratch, queries, k.nq, cases[c].k, hits, found, NULL));
        double each = (double)scratch->rescored / (double)scratch->searches;
        print_message("16,000 rows of %u, k %u: %.1f scored in full precision, %.2f times crowded\n", cases[c].dim,
                      cases[c].k, each, (double)scratch->crowded / (double)scratch->searches);
        assert_true(each >= cases[c].k);
        assert_true(each <= cases[c].most * cases[c].k);
        cairn_free(hits);
        cairn_free(queries);
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
        keys_free(&k);
    }
}

static void what_is_not_a_number_ranks_last_and_harms_nobody(void **state)
{
    (void)state;
    keys k = keys_new(11, MILD, 3000, 4, 32, CAIRN_F32);
    float *rows = k.rows;
    rows[700 * 32 + 3] = NAN;
    rows[701 * 32 + 3] = INFINITY;
    rows[701 * 32 + 4] = -INFINITY;
    for (size_t j = 0; j < 32; j++) rows[2500 * 32 + j] = 3e38f; /* overflows every sum */
    const char *const kinds[] = {"scan", "exact"};
    cairn_index_hit first[2][20];
    for (size_t kind = 0; kind < 2; kind++) {
        cairn_index *index = index_of(kinds[kind], &k);
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_query query = {k.q, 600, 800};
        cairn_index_hit all[200];
        uint32_t found;
        assert_ok(cairn_index_search(index, scratch, &query, 1, 200, all, &found, NULL));
        assert_int_equal(found, 200);
        for (size_t i = 0; i < 200; i++) assert_true(all[i].score == all[i].score);
        assert_true(all[199].score == -INFINITY && all[199].id == 700);
        query = (cairn_index_query){k.q, 0, 3000};
        assert_search_is_a_full_sort(index, &query, 1, 20);
        assert_ok(cairn_index_search(index, scratch, &query, 1, 20, first[kind], &found, NULL));
        float bad[32] = {NAN};
        cairn_index_mass mass;
        query.q = bad;
        assert_ok(cairn_index_search(index, scratch, &query, 1, 20, all, &found, &mass));
        assert_int_equal(found, 20);
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
    }
    assert_memory_equal(first[0], first[1], sizeof first[0]);
    keys_free(&k);
}

/* ---- growing ---- */

static void a_row_is_found_the_moment_it_is_added(void **state)
{
    (void)state;
    keys k = keys_new(12, MILD, 1500, 1, 32, CAIRN_F16);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", k.dim, k.dtype, &index));
    cairn_index_scratch *scratch = scratch_new();
    for (size_t i = 0; i < k.n; i++) {
        assert_ok(cairn_index_add(index, 1, key_at(&k, i)));
        float q[32];
        for (size_t j = 0; j < 32; j++) q[j] = 100 * k.wide[i * 32 + j]; /* by far its own best */
        cairn_index_hit hit;
        uint32_t found;
        cairn_index_query query = {q, (uint32_t)(i > 40 ? i - 40 : 0), (uint32_t)i + 1};
        assert_ok(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, NULL));
        cairn_index_hit *all = sorted_hits(index, q, query.lo, query.hi);
        assert_int_equal(hit.id, all[0].id);
        cairn_free(all);
    }
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    keys_free(&k);
}

static void answers_do_not_depend_on_how_rows_and_queries_came(void **state)
{
    (void)state;
    keys k = keys_new(13, MILD, 9000, 130, 32, CAIRN_F16);
    cairn_index *at_once = index_of("scan", &k);
    cairn_index *by_parts = NULL;
    assert_ok(cairn_index_new("scan", k.dim, k.dtype, &by_parts));
    for (size_t i = 0, n = 1; i < k.n; i += n, n = n * 7 % 97 + 1) {
        if (n > k.n - i) n = k.n - i;
        assert_ok(cairn_index_add(by_parts, n, key_at(&k, i)));
    }
    cairn_index_query *queries = whole(&k);
    test_random r = {14};
    for (size_t i = 0; i < k.nq; i++) { /* a chunk: nearly the same ranges; some others between */
        queries[i].lo = i % 5 == 0 ? test_random_below(&r, 3000) : 0;
        queries[i].hi = (uint32_t)(i % 11 == 0 ? 200 + i : 8000 + i);
    }
    enum { K = 6 };
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit together[130 * K];
    uint32_t found[130];
    cairn_index_mass mass[130];
    assert_ok(cairn_index_search(at_once, scratch, queries, k.nq, K, together, found, mass));
    for (size_t i = 0; i < k.nq; i++) {
        cairn_index_hit alone[K];
        uint32_t n;
        cairn_index_mass m;
        assert_ok(cairn_index_search(by_parts, scratch, queries + i, 1, K, alone, &n, &m));
        assert_int_equal(n, found[i]);
        assert_memory_equal(alone, together + i * K, n * sizeof *alone);
        assert_memory_equal(&m, &mass[i], sizeof m);
        assert_ok(cairn_index_search(by_parts, scratch, queries + i, 1, K, alone, &n, NULL)); /* nor on the mass */
        assert_memory_equal(alone, together + i * K, n * sizeof *alone);
    }
    /* Rows added later change nothing for a range that ends before them: a chunk's own blocks may be in or not. */
    cairn_index *shorter = NULL;
    assert_ok(cairn_index_new("scan", k.dim, k.dtype, &shorter));
    assert_ok(cairn_index_add(shorter, 8001, k.rows));
    cairn_index_query query = {queries[1].q, 0, 8001};
    cairn_index_hit alone[2][K];
    cairn_index_mass m[2];
    uint32_t n;
    assert_ok(cairn_index_search(shorter, scratch, &query, 1, K, alone[0], &n, &m[0]));
    assert_ok(cairn_index_search(at_once, scratch, &query, 1, K, alone[1], &n, &m[1]));
    assert_memory_equal(alone[0], alone[1], sizeof alone[0]);
    assert_memory_equal(&m[0], &m[1], sizeof m[0]);
    cairn_index_scratch_free(scratch);
    cairn_free(queries);
    cairn_index_free(shorter);
    cairn_index_free(at_once);
    cairn_index_free(by_parts);
    keys_free(&k);
}

static void memory_grows_with_the_rows_and_by_chunks(void **state)
{
    (void)state;
    keys k = keys_new(15, MILD, 20000, 1, 32, CAIRN_F16);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", k.dim, k.dtype, &index));
    assert_true(cairn_index_bytes(index) < 8 << 10);
    size_t most = 0;
    for (size_t i = 0; i < k.n; i++) {
        size_t before = cairn_index_bytes(index);
        assert_ok(cairn_index_add(index, 1, key_at(&k, i)));
        size_t step = cairn_index_bytes(index) - before;
        if (step > most) most = step;
        if (i == 99) assert_true(cairn_index_bytes(index) < 32 << 10); /* a short document is cheap */
    }
    size_t each = 32 * 2 + 36 + 8; /* row; image, scale and sum */
    assert_true(most <= 4096 * each + 4096);
    assert_true(cairn_index_bytes(index) >= k.n * each);
    assert_true(cairn_index_bytes(index) <= (k.n + 4096) * each + (16 << 10));
    cairn_index_free(index);
    keys_free(&k);
}

static void a_failed_allocation_leaves_everything_as_it_was(void **state)
{
    (void)state;
    keys k = keys_new(16, MILD, 9000, 2, 16, CAIRN_F16);
    cairn_index_hit hits[2][5];
    cairn_index_hit wanted[5];
    uint32_t found[2];
    cairn_index *whole_index = index_of("scan", &k);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_query query = {k.q, 0, 9000};
    assert_ok(cairn_index_search(whole_index, scratch, &query, 1, 5, wanted, found, NULL));
    cairn_index_scratch_free(scratch);
    for (uint64_t fail = 1;; fail++) {
        cairn_index *index = NULL;
        scratch = NULL;
        cairn_alloc_fail_at(fail);
        cairn_status st = cairn_index_new("scan", k.dim, k.dtype, &index);
        if (st == CAIRN_OK) st = cairn_index_add(index, k.n, k.rows);
        if (st == CAIRN_OK) st = cairn_index_scratch_new(&scratch);
        if (st == CAIRN_OK) st = cairn_index_search(index, scratch, &query, 1, 5, hits[0], found, NULL);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) {
            assert_int_equal(st, CAIRN_NO_MEMORY);
            if (index != NULL && cairn_index_count(index) == 0) assert_ok(cairn_index_add(index, k.n, k.rows));
            if (index != NULL && scratch == NULL) assert_ok(cairn_index_scratch_new(&scratch));
            if (index != NULL) assert_ok(cairn_index_search(index, scratch, &query, 1, 5, hits[0], found, NULL));
        }
        if (index != NULL) assert_memory_equal(hits[0], wanted, sizeof wanted);
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
        if (st == CAIRN_OK) {
            assert_true(fail > 15); /* it did fail in many places before */
            break;
        }
    }
    cairn_index_free(whole_index);
    keys_free(&k);
}

/* ---- mass ---- */

static void the_mass_is_the_log_sum_of_all_scores_within_its_error(void **state)
{
    (void)state;
    const char *const kinds[] = {"scan", "exact"};
    const uint32_t dims[] = {32, 128, 5};
    for (size_t d = 0; d < 3; d++) {
        keys k = keys_new(30 + d, d == 2 ? HARSH : MILD, 5000, 12, dims[d], CAIRN_F16);
        cairn_index_query *queries = whole(&k);
        queries[3].lo = 2000;
        queries[4].hi = 100;
        queries[5].hi = 1;
        queries[6].hi = 300;
        queries[7].lo = 5000;
        for (size_t kind = 0; kind < 2; kind++) {
            cairn_index *index = index_of(kinds[kind], &k);
            cairn_index_scratch *scratch = scratch_new();
            cairn_index_hit hits[12 * 8];
            uint32_t found[12];
            cairn_index_mass mass[12];
            assert_ok(cairn_index_search(index, scratch, queries, 12, 8, hits, found, mass));
            for (size_t i = 0; i < 12; i++) {
                double most = -INFINITY;
                double sum = 0;
                double *scores = cairn_alloc_array(k.n, sizeof *scores);
                for (uint32_t row = queries[i].lo; row < queries[i].hi; row++) {
                    double s = 0;
                    for (uint32_t j = 0; j < k.dim; j++)
                        s += element(k.rows, k.dtype, row * k.dim + j) * (double)queries[i].q[j];
                    scores[row] = s;
                    if (s > most) most = s;
                }
                for (uint32_t row = queries[i].lo; row < queries[i].hi; row++) sum += exp(scores[row] - most);
                cairn_free(scores);
                if (queries[i].lo == queries[i].hi) {
                    assert_true(mass[i].lse == -INFINITY && mass[i].error == 0);
                    continue;
                }
                double lse = most + log(sum);
                assert_true(fabs((double)mass[i].lse - lse) <= (double)mass[i].error + 2e-5 * (1 + fabs(lse)));
                assert_true(isfinite(mass[i].error));
                bool exact = kind == 1 || queries[i].hi - queries[i].lo <= CAIRN_SCAN_SHORT;
                assert_int_equal(mass[i].error == 0, exact);
                if (d < 2) assert_true(mass[i].error < 1); /* a bound that says something */
            }
            cairn_index_scratch_free(scratch);
            cairn_index_free(index);
        }
        cairn_free(queries);
        keys_free(&k);
    }
}

static void mass_survives_scores_too_large_for_exp(void **state)
{
    (void)state;
    keys k = keys_new(40, MILD, 2000, 1, 32, CAIRN_F32);
    for (size_t j = 0; j < 32; j++) k.q[j] *= 1000;
    cairn_index *index = index_of("scan", &k);
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hit;
    uint32_t found;
    cairn_index_mass mass;
    cairn_index_query query = {k.q, 0, 2000};
    assert_ok(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, &mass));
    assert_true(hit.score > 1000); /* exp of it is infinite */
    assert_true(isfinite(mass.lse));
    assert_true((double)mass.lse >= (double)hit.score - (double)mass.error - 0.01 * fabs((double)hit.score));
    cairn_index_scratch_free(scratch);
    cairn_index_free(index);
    keys_free(&k);
}

/* ---- threads ---- */

typedef struct seeker {
    const cairn_index *index;
    const cairn_index_query *queries;
    size_t nq;
    cairn_index_hit *hits; /* (nq, 4) */
    cairn_status status;
} seeker;

static void *seek(void *arg)
{
    seeker *s = arg;
    cairn_index_scratch *scratch = NULL;
    s->status = cairn_index_scratch_new(&scratch);
    uint32_t found[64];
    for (int round = 0; round < 20 && s->status == CAIRN_OK; round++)
        s->status = cairn_index_search(s->index, scratch, s->queries, s->nq, 4, s->hits, found, NULL);
    cairn_index_scratch_free(scratch);
    return NULL;
}

static void two_threads_search_one_index(void **state)
{
    (void)state;
    keys k = keys_new(41, MILD, 4000, 64, 32, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    cairn_index_query *queries = whole(&k);
    cairn_index_hit hits[3][64 * 4];
    seeker seekers[3];
    pthread_t threads[2];
    for (size_t i = 0; i < 3; i++) seekers[i] = (seeker){index, queries, k.nq, hits[i], CAIRN_OK};
    for (size_t i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, seek, &seekers[i]), 0);
    seek(&seekers[2]);
    for (size_t i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(seekers[i].status, CAIRN_OK);
        assert_memory_equal(hits[i], hits[2], sizeof hits[2]);
    }
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scores_are_the_inner_products_of_the_stored_rows),
        cmocka_unit_test(scan_and_exact_give_what_a_full_sort_gives),
        cmocka_unit_test(only_rows_of_the_range_count),
        cmocka_unit_test(a_range_beyond_the_rows_is_refused_with_its_numbers),
        cmocka_unit_test(no_rows_no_queries_and_k_zero_are_answers),
        cmocka_unit_test(equal_rows_come_newest_first),
        cmocka_unit_test(a_scan_that_int8_cannot_decide_is_still_exact),
        cmocka_unit_test(tiny_and_huge_numbers_change_nothing),
        cmocka_unit_test(the_image_bounds_every_score),
        cmocka_unit_test(the_best_row_is_found_though_its_image_looks_far_worse),
        cmocka_unit_test(the_proof_costs_few_full_precision_scores),
        cmocka_unit_test(what_is_not_a_number_ranks_last_and_harms_nobody),
        cmocka_unit_test(a_row_is_found_the_moment_it_is_added),
        cmocka_unit_test(answers_do_not_depend_on_how_rows_and_queries_came),
        cmocka_unit_test(memory_grows_with_the_rows_and_by_chunks),
        cmocka_unit_test(a_failed_allocation_leaves_everything_as_it_was),
        cmocka_unit_test(the_mass_is_the_log_sum_of_all_scores_within_its_error),
        cmocka_unit_test(mass_survives_scores_too_large_for_exp),
        cmocka_unit_test(two_threads_search_one_index),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
