/* What a scan learns from queries: the sketch of its rows, that it rules rows out and changes no hit.
 *
 * The witness of every search is a full sort over cairn_index_scores; of bounds, products in double. */
#include "index_keys.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* Keys that fill few directions and queries that look along others, as those of trained models do. */
static keys keys_of_few_directions(uint64_t seed, size_t n, size_t nq, uint32_t dim, cairn_dtype dtype)
{
    keys k = keys_new(seed, MILD, n, nq, dim, dtype);
    for (size_t i = 0; i < n * dim; i++) k.wide[i] /= 1 + 0.5f * (float)(i % dim);
    for (size_t i = 0; i < nq * dim; i++) k.q[i] *= 1 + 0.2f * (float)((i * 7) % dim);
    cairn_kernels_best()->narrow(k.rows, k.wide, dtype, n * dim);
    return k;
}

static uint64_t rescored(const cairn_index *index, const keys *k, size_t from, size_t together, uint32_t best)
{
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit *hits = cairn_alloc_array(together * best, sizeof *hits);
    uint32_t found[64];
    cairn_index_query queries[64];
    for (size_t i = 0; i < together; i++)
        queries[i] = (cairn_index_query){k->q + (from + i) * k->dim, 0, (uint32_t)cairn_index_count(index)};
    assert_ok(cairn_index_search(index, scratch, queries, together, best, hits, found, NULL));
    uint64_t n = scratch->rescored;
    cairn_free(hits);
    cairn_index_scratch_free(scratch);
    return n;
}

static void what_was_learnt_changes_no_hit(void **state)
{
    (void)state;
    const uint32_t dims[] = {16, 32, 50, 64, 128};
    const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_BF16, CAIRN_F32};
    test_random r = {50};
    for (size_t d = 0; d < 5; d++) {
        keys k = keys_of_few_directions(50 + d, 9000, 96, dims[d], dtypes[d % 3]);
        cairn_index *index = NULL;
        assert_ok(cairn_index_new("scan", k.dim, k.dtype, &index));
        assert_ok(cairn_index_add(index, 1023, k.rows));
        assert_false(cairn_index_will_learn(index));
        assert_ok(cairn_index_add(index, 1024, key_at(&k, 1023)));
        assert_true(cairn_index_will_learn(index)); /* soon */
        assert_false(cairn_index_may_learn(index));
        assert_ok(cairn_index_add(index, 3000, key_at(&k, 2047)));
        assert_true(cairn_index_may_learn(index));
        assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
        assert_false(cairn_index_may_learn(index));
        assert_true(index->sketch.width != 0);
        for (size_t n = 5047; n < 9000; n += 13) /* rows that come later are in it at once */
            assert_ok(cairn_index_add(index, 9000 - n < 13 ? 9000 - n : 13, key_at(&k, n)));
        assert_int_equal(index->sketch.count, 9000);
        cairn_index_query queries[64];
        for (size_t i = 0; i < 64; i++) queries[i] = (cairn_index_query){k.q + (32 + i) * k.dim, 0, 9000};
        const uint32_t ks[] = {4, 200};
        for (size_t i = 0; i < 2; i++) {
            assert_search_is_a_full_sort(index, queries, 64, ks[i]);
            for (size_t j = 0; j < 4; j++) assert_search_is_a_full_sort(index, queries + j, 1, ks[i]);
        }
        for (size_t i = 0; i < 64; i++) {
            queries[i].lo = test_random_below(&r, 9001);
            queries[i].hi = test_random_below(&r, 9001);
        }
        assert_search_is_a_full_sort(index, queries, 64, 5);
        for (size_t i = 0; i < 64; i += 4) { /* few go upwards by chunks */
            assert_search_is_a_full_sort(index, queries + i, 1, 5);
            assert_search_is_a_full_sort(index, queries + i, 4, 5);
        }
        /* and it is used: of 9,000 rows few are looked at */
        assert_true(rescored(index, &k, 32, 64, 4) < 64 * 9000 / 20);
        size_t bytes = cairn_index_bytes(index);
        size_t sketch = index->sketch.bytes;
        cairn_index_unlearn(index);
        assert_int_equal(cairn_index_bytes(index), bytes - sketch);
        assert_false(cairn_index_may_learn(index));
        assert_search_is_a_full_sort(index, queries, 64, 5);
        cairn_index_free(index);
        keys_free(&k);
    }
}

/* Tables of lesser processors make other bounds of the same numbers. */
static void every_table_of_kernels_finds_the_same_through_a_sketch(void **state)
{
    (void)state;
    const char *const tables[] = {"ref", "avx2", "avx512"};
    keys k = keys_of_few_directions(61, 6000, 64, 32, CAIRN_F16);
    for (size_t t = 0; t < 3; t++) {
        setenv("CAIRN_KERNELS", tables[t], 1);
        cairn_index *index = index_of("scan", &k);
        assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
        assert_true(index->sketch.width != 0);
        cairn_index_query *queries = whole(&k);
        assert_search_is_a_full_sort(index, queries, k.nq, 4);
        cairn_free(queries);
        cairn_index_free(index);
    }
    unsetenv("CAIRN_KERNELS");
    keys_free(&k);
}

/* No score is above its bound, taken from the sketch's own numbers. */
static void a_sketch_bounds_every_score(void **state)
{
    (void)state;
    for (uint32_t dim = 16; dim <= 128; dim *= 2) {
        keys k = keys_of_few_directions(70 + dim, 4000, 48, dim, CAIRN_F16);
        for (size_t i = 0; i < 40; i++) /* some rows far from the others: without a bound, or with a wide one */
            for (size_t j = 0; j < dim; j++) k.wide[(i * 97 + 5) * dim + j] *= (float)(1 + i % 10);
        cairn_kernels_best()->narrow(k.rows, k.wide, k.dtype, k.n * dim);
        cairn_index *index = index_of("scan", &k);
        assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
        const cairn_sketch *s = &index->sketch;
        assert_true(s->width != 0);
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_hit hit;
        uint32_t found;
        double slack = 0;
        double spread = 0;
        size_t loose = 0;
        float wide[128];
        for (size_t c = 0; c < s->chunk_count; c++) loose += s->chunks[c].loose_count;
        assert_in_range(loose, 1, k.n / 50);
        for (size_t i = 0; i < k.nq; i++) {
            cairn_index_query query = {k.q + i * dim, 0, (uint32_t)k.n};
            assert_ok(cairn_index_search(index, scratch, &query, 1, 1, &hit, &found, NULL));
            const cairn_scan_query *q = &scratch->query[0];
            assert_true(q->sketched);
            double mean = 0;
            for (size_t j = 0; j < dim; j++) mean += (double)s->center[j] * (double)query.q[j];
            for (uint32_t id = 0; id < k.n; id++) {
                const cairn_sketch_chunk *chunk = &s->chunks[id / CAIRN_CHUNK_ROWS];
                if (!(chunk->bound[id % CAIRN_CHUNK_ROWS / 64] >> id % 64 & 1)) continue;
                const int8_t *row = chunk->rows + cairn_sketch_at(id % CAIRN_CHUNK_ROWS, s->width);
                int32_t sum = 0;
                for (size_t j = 0; j < s->width; j++) sum += row[j / 4 * 64 + j % 4] * scratch->sketch[j];
                double score = 0;
                cairn_index_row(index, id, wide);
                for (size_t j = 0; j < dim; j++) score += (double)wide[j] * (double)query.q[j];
                double above = q->sketch_base + q->sketch_unit * sum - score;
                assert_true(above >= 0);
                slack += above;
                spread += fabs(score - mean);
            }
        }
        assert_true(slack < 2.7 * spread); /* with such rows among them; and says something */
        cairn_index_scratch_free(scratch);
        cairn_index_free(index);
        keys_free(&k);
    }
}

static void awkward_rows_and_queries_are_found_through_a_sketch(void **state)
{
    (void)state;
    enum { N = 6000, D = 32 };
    keys k = keys_of_few_directions(80, N, 64, D, CAIRN_F32);
    memcpy(k.wide + 100 * D, k.wide + 5000 * D, 64 * D * sizeof *k.wide); /* ties */
    for (size_t j = 0; j < D; j++) {
        k.wide[3000 * D + j] *= 1e6f; /* comes when there is a sketch */
        k.wide[3001 * D + j] *= 1e-30f;
        k.wide[3002 * D + j] = 0;
        k.q[40 * D + j] = 0;
        k.q[41 * D + j] *= 1e-20f;
        k.q[42 * D + j] *= 1e12f;
    }
    k.wide[1500 * D] = INFINITY;
    k.wide[1501 * D + 3] = NAN;
    cairn_kernels_best()->narrow(k.rows, k.wide, k.dtype, (size_t)N * D);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", D, CAIRN_F32, &index));
    assert_ok(cairn_index_add(index, 3000, k.rows));
    assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
    assert_true(index->sketch.width != 0);
    assert_ok(cairn_index_add(index, N - 3000, key_at(&k, 3000)));
    cairn_index_query *queries = whole(&k);
    assert_search_is_a_full_sort(index, queries, 40, 4);
    assert_search_is_a_full_sort(index, queries, 64, 4);
    assert_search_is_a_full_sort(index, queries + 40, 3, 80);
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

static void nothing_is_kept_where_a_sketch_would_not_pay(void **state)
{
    (void)state;
    enum { N = 5000, D = 64 };
    test_random r = {90};
    float *rows = cairn_alloc_array((size_t)N * D, sizeof *rows);
    float *q = cairn_alloc_array((size_t)64 * D, sizeof *q);
    for (size_t i = 0; i < (size_t)N * D; i++) rows[i] = test_random_normal(&r); /* the same in all directions */
    for (size_t i = 0; i < (size_t)64 * D; i++) q[i] = test_random_normal(&r);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", D, CAIRN_F32, &index));
    assert_ok(cairn_index_add(index, N, rows));
    size_t bytes = cairn_index_bytes(index);
    assert_ok(cairn_index_learn(index, q, 64, 4, 64));
    assert_int_equal(index->sketch.width, 0);
    assert_int_equal(cairn_index_bytes(index), bytes);
    assert_false(cairn_index_may_learn(index));    /* nor asked again before it has doubled */
    memset(rows, 0, (size_t)N * D * sizeof *rows); /* nor of rows or queries that are all nothing */
    assert_ok(cairn_index_add(index, N, rows));
    assert_true(cairn_index_may_learn(index));
    memset(q, 0, (size_t)64 * D * sizeof *q);
    assert_ok(cairn_index_learn(index, q, 64, 4, 64));
    assert_int_equal(index->sketch.width, 0);
    cairn_index_free(index);
    cairn_free(rows);
    cairn_free(q);
}

static void learning_without_memory_learns_nothing_and_loses_nothing(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(91, 5000, 48, 32, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    cairn_index_query *queries = whole(&k);
    cairn_status st = CAIRN_NO_MEMORY;
    for (uint64_t fail = 1; st != CAIRN_OK; fail++) {
        cairn_alloc_fail_at(fail);
        st = cairn_index_learn(index, k.q, 32, 4, 64);
        cairn_alloc_fail_at(0);
        assert_true(fail < 100 && (st == CAIRN_OK || st == CAIRN_NO_MEMORY));
        assert_int_equal(index->sketch.width != 0, st == CAIRN_OK);
        assert_search_is_a_full_sort(index, queries + 32, 4, 4);
    }
    cairn_free(queries);
    cairn_index_free(index);
    keys_free(&k);
}

static void hints_change_no_hit_and_save_looks(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(92, 9000, 64, 32, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
    uint64_t looks[2] = {0};
    for (size_t i = 32; i < 64; i++) {
        cairn_index_hit *all = sorted_hits(index, k.q + i * k.dim, 0, 9000);
        for (size_t hinted = 0; hinted < 2; hinted++) {
            cairn_index_scratch *scratch = scratch_new();
            const uint32_t rows[] = {all[2].id, all[7].id, all[5].id,  all[5].id,
                                     all[9].id, 9000,      UINT32_MAX, all[30].id};
            cairn_index_hit hits[4];
            uint32_t found;
            cairn_index_query query = {k.q + i * k.dim, 0, 9000};
            if (hinted) cairn_index_hint(scratch, rows, 8);
            assert_ok(cairn_index_search(index, scratch, &query, 1, 4, hits, &found, NULL));
            looks[hinted] += scratch->rescored;
            for (size_t h = 0; h < 4; h++) {
                assert_int_equal(hits[h].id, all[h].id);
                assert_true(hits[h].score == all[h].score);
            }
            const uint32_t one[] = {all[0].id, all[0].id, all[0].id, all[0].id}; /* is no bar for four */
            if (hinted) cairn_index_hint(scratch, one, 4);
            assert_ok(cairn_index_search(index, scratch, &query, 1, 4, hits, &found, NULL));
            assert_int_equal(found, 4);
            for (size_t h = 0; h < 4; h++) assert_int_equal(hits[h].id, all[h].id);
            query.hi = 40; /* hints hold for one search, and rows out of range for none */
            assert_ok(cairn_index_search(index, scratch, &query, 1, 4, hits, &found, NULL));
            assert_int_equal(found, 4);
            cairn_index_scratch_free(scratch);
        }
        cairn_free(all);
    }
    assert_true(looks[1] < looks[0]);
    cairn_index_free(index);
    keys_free(&k);
}

/* The first queries of a batch begin with the hints, the others with what those found: none needs the int8 image. */
static void a_batch_with_hints_needs_no_image(void **state)
{
    (void)state;
    enum { N = 9000, BATCH = 32, PILOTS = 8, K = 4 };
    keys k = keys_of_few_directions(93, N, 64, 32, CAIRN_F16);
    cairn_index *index = index_of("scan", &k);
    assert_ok(cairn_index_learn(index, k.q, 32, K, 64));
    assert_true(index->sketch.width != 0);
    cairn_index_query queries[BATCH];
    cairn_index_hit *all[BATCH];
    uint32_t good[PILOTS * K];
    for (size_t i = 0; i < BATCH; i++) {
        queries[i] = (cairn_index_query){k.q + (32 + i) * k.dim, 0, N};
        all[i] = sorted_hits(index, queries[i].q, 0, N);
    }
    for (size_t i = 0; i < PILOTS * K; i++) good[i] = all[i / K * (BATCH / PILOTS)][i % K + 1].id; /* not the best */
    for (size_t hinted = 0; hinted < 2; hinted++) {
        cairn_index_scratch *scratch = scratch_new();
        cairn_index_hit hits[BATCH * K];
        uint32_t found[BATCH];
        size_t imaged = 0;
        if (hinted) cairn_index_hint(scratch, good, PILOTS * K);
        assert_ok(cairn_index_search(index, scratch, queries, BATCH, K, hits, found, NULL));
        for (size_t i = 0; i < BATCH; i++) {
            imaged += scratch->query[i].imaged;
            assert_int_equal(found[i], K);
            for (size_t h = 0; h < K; h++) {
                assert_int_equal(hits[i * K + h].id, all[i][h].id);
                assert_true(hits[i * K + h].score == all[i][h].score);
            }
        }
        assert_int_equal(imaged, hinted ? 0 : PILOTS);
        cairn_index_scratch_free(scratch);
    }
    for (size_t i = 0; i < BATCH; i++) cairn_free(all[i]);
    cairn_index_free(index);
    keys_free(&k);
}

/* Where products underflow to nothing (programs built with -ffast-math flush them), sums in another order differ by
 * more than a share of them: a bar from hints must not be too high for the rows it came from. */
static void hints_hold_where_products_underflow(void **state)
{
    (void)state;
#ifdef __SSE__
    const unsigned mode = _MM_GET_FLUSH_ZERO_MODE();
    _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
#endif
    enum { N = 3000, BATCH = 32, K = 4 };
    static const float sizes[] = {3e-19f, 1e-19f, 5e-20f, 2e-20f};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        keys k = keys_of_few_directions(94 + s, N, 64, BATCH, CAIRN_F32);
        float *rows = k.rows;
        for (size_t i = 0; i < (size_t)N * k.dim; i++) rows[i] *= sizes[s];
        for (size_t i = 0; i < (size_t)BATCH * k.dim; i++) k.q[i] *= sizes[s];
        cairn_index *index = index_of("scan", &k);
        cairn_index_query queries[BATCH];
        for (size_t i = 0; i < BATCH; i++) queries[i] = (cairn_index_query){k.q + i * k.dim, 0, N};
        for (size_t i = 0; i < BATCH; i++) {
            cairn_index_scratch *scratch = scratch_new();
            cairn_index_hit *all = sorted_hits(index, queries[i].q, 0, N), hits[BATCH * K];
            uint32_t found[BATCH], good[K];
            for (size_t h = 0; h < K; h++) good[h] = all[h].id;
            cairn_index_hint(scratch, good, K);
            assert_ok(cairn_index_search(index, scratch, queries, BATCH, K, hits, found, NULL));
            assert_int_equal(found[i], K);
            for (size_t h = 0; h < K; h++) assert_int_equal(hits[i * K + h].id, all[h].id);
            cairn_free(all);
            cairn_index_scratch_free(scratch);
        }
        cairn_index_free(index);
        keys_free(&k);
    }
#ifdef __SSE__
    _MM_SET_FLUSH_ZERO_MODE(mode);
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_learnt_changes_no_hit),
        cmocka_unit_test(every_table_of_kernels_finds_the_same_through_a_sketch),
        cmocka_unit_test(a_sketch_bounds_every_score),
        cmocka_unit_test(awkward_rows_and_queries_are_found_through_a_sketch),
        cmocka_unit_test(nothing_is_kept_where_a_sketch_would_not_pay),
        cmocka_unit_test(learning_without_memory_learns_nothing_and_loses_nothing),
        cmocka_unit_test(hints_change_no_hit_and_save_looks),
        cmocka_unit_test(a_batch_with_hints_needs_no_image),
        cmocka_unit_test(hints_hold_where_products_underflow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
