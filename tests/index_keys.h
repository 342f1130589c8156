/* index_keys.h - keys and queries of real shape, and the witnesses the index tests share. */
#ifndef CAIRN_TESTS_INDEX_KEYS_H
#define CAIRN_TESTS_INDEX_KEYS_H

#include <math.h>
#include <stdlib.h>

#include <index_internal.h>

#include "support.h"

/* ---- keys of real shape: clusters that last over neighbouring rows, a common offset, a decaying spectrum ---- */

typedef struct key_shape {
    float offset;  /* size of the common part */
    float outlier; /* every 16th channel is so many times larger */
} key_shape;
#define MILD  ((key_shape){1.5f, 1})
#define HARSH ((key_shape){8, 10})

static inline void make_keys(test_random *r, key_shape shape, size_t n, uint32_t dim, float *x)
{
    enum { CLUSTERS = 64 };
    float *mean = cairn_alloc_array(dim, sizeof *mean);
    float *spread = cairn_alloc_array(dim, sizeof *spread);
    float *center = cairn_alloc_array((size_t)CLUSTERS * dim, sizeof *center);
    for (uint32_t j = 0; j < dim; j++) {
        mean[j] = shape.offset * test_random_normal(r);
        spread[j] = 2.0f / sqrtf(1 + 0.15f * (float)(j * 37 % dim)) * (j % 16 == 0 ? shape.outlier : 1);
    }
    for (size_t i = 0; i < (size_t)CLUSTERS * dim; i++) center[i] = test_random_normal(r) * spread[i % dim];
    size_t c = 0;
    for (size_t i = 0; i < n; i++) {
        if (test_random_below(r, 8) == 0) c = test_random_below(r, CLUSTERS);
        for (uint32_t j = 0; j < dim; j++)
            x[i * dim + j] = mean[j] + center[c * dim + j] + 0.7f * spread[j] * test_random_normal(r);
    }
    cairn_free(mean);
    cairn_free(spread);
    cairn_free(center);
}

/* Queries that are no keys: mixed, turned by 45 degrees in pairs of channels, with an offset of their own; scaled. */
static inline void make_queries(test_random *r, size_t nq, const float *x, size_t n, uint32_t dim, float *q)
{
    float scale = 1 / sqrtf((float)dim);
    for (size_t i = 0; i < nq; i++) {
        const float *a = x + test_random_below(r, (uint32_t)n) * dim;
        const float *b = x + test_random_below(r, (uint32_t)n) * dim;
        float *o = q + i * dim;
        for (uint32_t j = 0; j < dim; j++) o[j] = 0.7f * a[j] + 0.3f * b[j] + 0.5f * test_random_normal(r);
        for (uint32_t j = 0; j + 1 < dim; j += 2) {
            float u = o[j];
            float v = o[j + 1];
            o[j] = 0.7071f * (u - v);
            o[j + 1] = 0.7071f * (u + v);
        }
        for (uint32_t j = 0; j < dim; j++) o[j] = (o[j] + 1.0f) * scale;
    }
}

typedef struct keys {
    uint32_t dim;
    size_t n, nq;
    cairn_dtype dtype;
    float *wide, *q; /* as made, before rounding to the row type */
    void *rows;
} keys;

static inline keys keys_new(uint64_t seed, key_shape shape, size_t n, size_t nq, uint32_t dim, cairn_dtype dtype)
{
    test_random r = {seed};
    keys k = {.dim = dim, .n = n, .nq = nq, .dtype = dtype};
    k.wide = cairn_alloc_array(n * dim, sizeof *k.wide);
    k.q = cairn_alloc_array(nq * dim, sizeof *k.q);
    k.rows = cairn_alloc_array(n * dim, 4);
    make_keys(&r, shape, n, dim, k.wide);
    make_queries(&r, nq, k.wide, n, dim, k.q);
    cairn_kernels_best()->narrow(k.rows, k.wide, dtype, n * dim);
    return k;
}
static inline void keys_free(keys *k)
{
    cairn_free(k->wide);
    cairn_free(k->q);
    cairn_free(k->rows);
}
static const void *key_at(const keys *k, size_t i)
{
    return (const char *)k->rows + i * k->dim * cairn_dtype_size(k->dtype);
}

static inline cairn_index *index_of(const char *kind, const keys *k)
{
    cairn_index *index = NULL;
    assert_ok(cairn_index_new(kind, k->dim, k->dtype, &index));
    assert_ok(cairn_index_add(index, k->n, k->rows));
    return index;
}
static inline cairn_index_scratch *scratch_new(void)
{
    cairn_index_scratch *scratch = NULL;
    assert_ok(cairn_index_scratch_new(&scratch));
    return scratch;
}

/* ---- the witnesses ---- */

static inline int better_first(const void *a, const void *b)
{
    const cairn_index_hit *x = a;
    const cairn_index_hit *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->id > y->id ? -1 : 1;
}

/* What [lo, hi) sorts to, by the index's own exact scores. */
static inline cairn_index_hit *sorted_hits(const cairn_index *index, const float *q, uint32_t lo, uint32_t hi)
{
    float *scores = cairn_alloc_array(hi - lo, sizeof *scores);
    cairn_index_hit *all = cairn_alloc_array(hi - lo, sizeof *all);
    cairn_index_scores(index, q, lo, hi, scores);
    for (uint32_t i = lo; i < hi; i++) all[i - lo] = (cairn_index_hit){i, scores[i - lo]};
    qsort(all, hi - lo, sizeof *all, better_first);
    cairn_free(scores);
    return all;
}

static inline void assert_search_is_a_full_sort(const cairn_index *index, const cairn_index_query *queries, size_t nq,
                                                uint32_t k)
{
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit *hits = cairn_alloc_array(nq * k + 1, sizeof *hits);
    uint32_t *found = cairn_alloc_array(nq, sizeof *found);
    assert_ok(cairn_index_search(index, scratch, queries, nq, k, hits, found, NULL));
    for (size_t i = 0; i < nq; i++) {
        uint32_t width = queries[i].hi > queries[i].lo ? queries[i].hi - queries[i].lo : 0;
        assert_int_equal(found[i], k < width ? k : width);
        cairn_index_hit *all = sorted_hits(index, queries[i].q, queries[i].lo, queries[i].lo + width);
        for (uint32_t h = 0; h < found[i]; h++) {
            assert_int_equal(hits[i * k + h].id, all[h].id);
            assert_true(hits[i * k + h].score == all[h].score);
        }
        cairn_free(all);
    }
    cairn_free(hits);
    cairn_free(found);
    cairn_index_scratch_free(scratch);
}

static inline cairn_index_query *whole(const keys *k)
{
    cairn_index_query *queries = cairn_alloc_array(k->nq, sizeof *queries);
    for (size_t i = 0; i < k->nq; i++) queries[i] = (cairn_index_query){k->q + i * k->dim, 0, (uint32_t)k->n};
    return queries;
}

#endif
