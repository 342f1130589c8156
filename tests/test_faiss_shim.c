/* The C API of FAISS as its own headers declare it: each function we call has the header's type (the compiler says so),
 * is there (the linker says so), and behaves (the tests say so) - over the shim or over a real libfaiss_c. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <faiss/c_api/AutoTune_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>
#include <faiss/c_api/index_factory_c.h>
#include <faiss/c_api/index_io_c.h>
#include <faiss/c_api/utils/distances_c.h>

#include "support.h"

/* Types written out by hand from the headers: a changed declaration is a compile error here. */
static const char *(*const last_error)(void) = faiss_get_last_error;
static void (*const index_free)(FaissIndex *) = faiss_Index_free;
static int (*const index_d)(const FaissIndex *) = faiss_Index_d;
static int (*const index_is_trained)(const FaissIndex *) = faiss_Index_is_trained;
static idx_t (*const index_ntotal)(const FaissIndex *) = faiss_Index_ntotal;
static FaissMetricType (*const index_metric)(const FaissIndex *) = faiss_Index_metric_type;
static int (*const index_train)(FaissIndex *, idx_t, const float *) = faiss_Index_train;
static int (*const index_add)(FaissIndex *, idx_t, const float *) = faiss_Index_add;
static int (*const index_search)(const FaissIndex *, idx_t, const float *, idx_t, float *,
                                 idx_t *) = faiss_Index_search;
static int (*const factory)(FaissIndex **, int, const char *, FaissMetricType) = faiss_index_factory;
static int (*const write_file)(const FaissIndex *, FILE *) = faiss_write_index;
static int (*const read_file)(FILE *, int, FaissIndex **) = faiss_read_index;
static int (*const space_new)(FaissParameterSpace **) = faiss_ParameterSpace_new;
static void (*const space_free)(FaissParameterSpace *) = faiss_ParameterSpace_free;
static int (*const space_set)(const FaissParameterSpace *, FaissIndex *,
                              const char *) = faiss_ParameterSpace_set_index_parameters;
static void (*const set_blas)(int) = faiss_set_distance_compute_blas_threshold;

enum { N = 640, D = 16, K = 5 };

static void fill(float *x)
{
    test_random r = {7};
    test_random_fill(&r, x, N * D);
}

static FaissIndex *make(const char *recipe, const float *x)
{
    FaissIndex *index = NULL;
    assert_int_equal(factory(&index, D, recipe, METRIC_INNER_PRODUCT), OK);
    assert_int_equal(index_train(index, N, x), OK);
    assert_int_equal(index_add(index, N, x), OK);
    assert_int_equal(index_ntotal(index), N);
    return index;
}

static void an_index_keeps_what_it_was_made_with(void **state)
{
    (void)state;
    FaissIndex *index = NULL;
    assert_int_equal(factory(&index, D, "IVF4,Flat", METRIC_INNER_PRODUCT), OK);
    assert_int_equal(index_d(index), D);
    assert_int_equal(index_metric(index), METRIC_INNER_PRODUCT);
    assert_int_equal(index_ntotal(index), 0);
    assert_false(index_is_trained(index));
    index_free(index);
    assert_int_equal(factory(&index, D, "Flat", METRIC_L2), OK);
    assert_int_equal(index_metric(index), METRIC_L2);
    assert_true(index_is_trained(index));
    index_free(index);
}

static void a_flat_search_returns_the_largest_inner_products_in_order(void **state)
{
    (void)state;
    static float x[N * D];
    fill(x);
    FaissIndex *index = make("Flat", x);
    for (int blas = 0; blas < 2; blas++) {
        set_blas(blas != 0 ? 1 : 1000);
        float score[K];
        idx_t id[K];
        assert_int_equal(index_search(index, 1, x + 3 * D, K, score, id), OK);
        int better = 0; /* rows above the last hit, counted by hand */
        for (int i = 0; i < N; i++) {
            double sum = 0;
            for (int j = 0; j < D; j++) sum += (double)x[i * D + j] * x[3 * D + j];
            better += sum > (double)score[K - 1] + 1e-4;
            for (int h = 0; h < K; h++)
                if (id[h] == i) assert_true(fabs(sum - (double)score[h]) < 1e-4);
        }
        assert_true(better <= K - 1);
        for (int h = 1; h < K; h++) assert_true(score[h] <= score[h - 1]);
    }
    set_blas(1);
    index_free(index);
}

static void too_few_hits_are_padded_with_minus_one(void **state)
{
    (void)state;
    FaissIndex *index = NULL;
    const float one[D] = {1};
    float score[K];
    idx_t id[K];
    assert_int_equal(factory(&index, D, "Flat", METRIC_INNER_PRODUCT), OK);
    assert_int_equal(index_add(index, 1, one), OK);
    assert_int_equal(index_search(index, 1, one, K, score, id), OK);
    assert_int_equal(id[0], 0);
    for (int i = 1; i < K; i++) assert_int_equal(id[i], -1);
    index_free(index);
}

static void parameters_change_what_is_searched(void **state)
{
    (void)state;
    static float x[N * D];
    fill(x);
    FaissIndex *index = make("IVF16,Flat", x);
    FaissParameterSpace *space = NULL;
    assert_int_equal(space_new(&space), OK);
    float score[N];
    static idx_t id[N];
    int found[2];
    const char *const params[2] = {"nprobe=1", "nprobe=16"};
    for (int p = 0; p < 2; p++) {
        assert_int_equal(space_set(space, index, params[p]), OK);
        assert_int_equal(index_search(index, 1, x, N, score, id), OK);
        found[p] = 0;
        for (int i = 0; i < N; i++) found[p] += id[i] >= 0;
    }
    assert_true(found[0] < N);
    assert_int_equal(found[1], N);
    space_free(space);
    index_free(index);
}

static void a_file_gives_back_the_same_answers_in_memory_and_mapped(void **state)
{
    (void)state;
    static float x[N * D];
    fill(x);
    char *dir = test_make_dir();
    char *path = test_path(dir, "ivf");
    FaissIndex *index = make("IVF8,Flat", x);
    float score[2][K];
    idx_t id[2][K];
    assert_int_equal(index_search(index, 1, x + 9 * D, K, score[0], id[0]), OK);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(write_file(index, file), OK);
    assert_int_equal(fclose(file), 0);
    index_free(index);
    const int flags[2] = {0, FAISS_IO_FLAG_MMAP};
    for (int f = 0; f < 2; f++) {
        file = fopen(path, "rb");
        assert_non_null(file);
        assert_int_equal(read_file(file, flags[f], &index), OK);
        fclose(file); /* a map outlives its descriptor */
        assert_int_equal(index_search(index, 1, x + 9 * D, K, score[1], id[1]), OK);
        assert_memory_equal(id[0], id[1], sizeof id[0]);
        assert_memory_equal(score[0], score[1], sizeof score[0]);
        index_free(index);
    }
    free(path);
    test_remove_dir(dir);
}

static void exceptions_arrive_as_codes_and_sentences(void **state)
{
    (void)state;
    FaissIndex *index = NULL;
    assert_int_not_equal(factory(&index, D, "NoSuchIndex", METRIC_INNER_PRODUCT), OK);
    assert_non_null(strstr(last_error(), "NoSuchIndex"));
    assert_int_not_equal(factory(&index, D, "PQ7", METRIC_INNER_PRODUCT), OK); /* 7 does not divide 16 */
    FILE *file = tmpfile();
    assert_non_null(file);
    fputs("this is no index", file);
    rewind(file);
    assert_int_not_equal(read_file(file, 0, &index), OK);
    fclose(file);
    FaissParameterSpace *space = NULL;
    assert_int_equal(space_new(&space), OK);
    assert_int_equal(factory(&index, D, "Flat", METRIC_INNER_PRODUCT), OK);
    assert_int_not_equal(space_set(space, index, "nprobe=3"), OK);
    assert_non_null(strstr(last_error(), "nprobe"));
    assert_int_not_equal(index_search(index, 1, (const float[D]){0}, 0, NULL, NULL), OK); /* k = 0 */
    space_free(space);
    index_free(index);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_index_keeps_what_it_was_made_with),
        cmocka_unit_test(a_flat_search_returns_the_largest_inner_products_in_order),
        cmocka_unit_test(too_few_hits_are_padded_with_minus_one),
        cmocka_unit_test(parameters_change_what_is_searched),
        cmocka_unit_test(a_file_gives_back_the_same_answers_in_memory_and_mapped),
        cmocka_unit_test(exceptions_arrive_as_codes_and_sentences),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
