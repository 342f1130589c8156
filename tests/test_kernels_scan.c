/* The int8 scan and the sketches of every table against sums of whole numbers written here, in buffers that end at a
 * page nobody may touch. */
#include "kernels_support.h"

#include <math.h>
#include <stdlib.h>

static void scan_scores_are_the_exact_integer_sums_in_every_table(void **state)
{
    (void)state;
    test_random r = {10};
    const size_t dims[] = {4, 8, 12, 20, 32, 36, 64, 100, 128, 132, 256, 1024},
                 queries[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 64};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t d = 0; d < 12; d++) {
            for (size_t m = 0; m < 10; m++) {
                size_t dim = dims[d], nq = queries[m], groups = 1 + test_random_below(&r, 5), rows = 16 * groups;
                guarded gr = guarded_new(rows * dim), gq = guarded_new(nq * dim), gs = guarded_random(&r, rows);
                int8_t *data = gr.data, *q = gq.data;
                for (size_t i = 0; i < rows * dim; i++) data[i] = (int8_t)((int)test_random_below(&r, 256) - 128);
                for (size_t i = 0; i < nq * dim; i++) q[i] = (int8_t)((int)test_random_below(&r, 256) - 128);
                if (m % 2)
                    memset(data, -128, rows * dim), memset(q, m % 4 == 1 ? -128 : 127, nq * dim); /* the extremes */
                float *scale = gs.data, *q_scale = malloc(nq * sizeof *q_scale);
                int32_t *sums = calloc(rows, sizeof *sums);
                for (size_t row = 0; row < rows; row++)
                    for (size_t j = 0; j < dim; j++)
                        sums[row] += data[row / 16 * 16 * dim + j / 4 * 64 + row % 16 * 4 + j % 4];
                test_random_fill(&r, q_scale, nq);
                size_t first = test_random_below(&r, (uint32_t)groups), n = groups - first, ld = 16 * n + 3;
                float *scores = malloc(nq * ld * sizeof *scores), *less = malloc(nq * ld * sizeof *less);
                bool both = (d + m) % 3 != 0;
                for (size_t i = 0; i < nq * ld; i++) scores[i] = less[i] = 77;
                const int32_t *row_sums = d % 2 ? NULL : sums;
                uint16_t *over = malloc((nq * n + 1) * sizeof *over);
                float *bars = malloc(nq * sizeof *bars);
                over[nq * n] = 0x5a5a; /* behind the last one nothing is written */
                k->scan_i8(data, scale, row_sums, first, n, dim, q, q_scale, nq, scores, NULL, ld, NULL, NULL);
                for (size_t i = 0; i < nq; i++) /* a score that is there, so that equal counts; nothing; everything */
                    bars[i] = i % 5 == 3   ? INFINITY
                              : i % 5 == 4 ? -INFINITY
                                           : scores[i * ld + test_random_below(&r, (uint32_t)(16 * n))];
                for (size_t i = 0; i < nq * ld; i++) scores[i] = 77;
                k->scan_i8(data, scale, row_sums, first, n, dim, q, q_scale, nq, scores, both ? less : NULL, ld, bars,
                           over);
                for (size_t i = 0; i < nq; i++)
                    for (size_t c = 0; c < 16 * n; c++)
                        assert_int_equal(over[i * n + c / 16] >> c % 16 & 1, scores[i * ld + c] >= bars[i]);
                assert_int_equal(over[nq * n], 0x5a5a);
                free(over), free(bars);
                for (size_t i = 0; i < nq; i++)
                    for (size_t c = 0; c < ld; c++) {
                        if (c >= 16 * n) { /* between rows of scores nothing is written */
                            assert_int_equal(bits_of(scores[i * ld + c]), bits_of(77.0f));
                            assert_int_equal(bits_of(less[i * ld + c]), bits_of(77.0f));
                            continue;
                        }
                        size_t row = 16 * first + c;
                        int64_t sum = 0, before = 0; /* the last four dims */
                        for (size_t j = 0; j < dim; j++) {
                            if (j == dim - 4) before = sum;
                            sum +=
                                (int64_t)data[row / 16 * 16 * dim + j / 4 * 64 + row % 16 * 4 + j % 4] * q[i * dim + j];
                        }
                        float scaled = (float)before * scale[row];
                        assert_int_equal(bits_of(less[i * ld + c]), bits_of(both ? scaled * q_scale[i] : 77.0f));
                        scaled = (float)sum * scale[row];
                        assert_int_equal(bits_of(scores[i * ld + c]), bits_of(scaled * q_scale[i]));
                    }
                free(scores), free(less), free(sums), free(q_scale);
                guarded_free(&gr), guarded_free(&gq), guarded_free(&gs);
            }
        }
    }
}

/* As large as the table allows: each of two halves of a query's numbers in turn takes what the ones before it have left
 * of what they may sum to. */
static void within_sketch_sum(const cairn_kernels *k, int8_t *q, size_t dim)
{
    int left[2] = {k->sketch_sum, k->sketch_sum};
    for (size_t j = 0; j < dim; j++) {
        int *room = &left[j / 2 % 2], size = abs(q[j]) < *room ? abs(q[j]) : *room;
        q[j] = (int8_t)(q[j] < 0 ? -size : size);
        *room -= size;
    }
}

static void sketches_say_which_integer_sums_reach_the_least_in_every_table(void **state)
{
    (void)state;
    test_random r = {12};
    const size_t dims[] = {4, 8, 12, 16, 24, 48, 100, 1024}, queries[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 64};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t d = 0; d < 8; d++)
            for (size_t m = 0; m < 10; m++) {
                size_t dim = dims[d], nq = queries[m], groups = 1 + test_random_below(&r, 5), rows = 64 * groups;
                size_t first = test_random_below(&r, (uint32_t)groups), n = groups - first;
                guarded gr = guarded_new(rows * dim), gq = guarded_new(nq * dim);
                int8_t *data = gr.data, *q = gq.data;
                for (size_t i = 0; i < rows * dim; i++) data[i] = (int8_t)((int)test_random_below(&r, 256) - 128);
                for (size_t i = 0; i < nq * dim; i++) q[i] = (int8_t)((int)test_random_below(&r, 129) - 64);
                const int most = d % 2 ? -k->sketch_most : k->sketch_most;
                if (m % 3 == 1) memset(data, d % 3 ? -128 : 127, rows * dim), memset(q, most, nq * dim);
                for (size_t i = 0; i < nq; i++) within_sketch_sum(k, q + i * dim, dim);
                int32_t *sums = calloc(nq * 64 * n, sizeof *sums), least[64];
                for (size_t i = 0; i < nq; i++) {
                    for (size_t c = 0; c < 64 * n; c++)
                        for (size_t j = 0; j < dim; j++)
                            sums[i * 64 * n + c] += data[(first + c / 64) * 64 * dim + c / 4 % 4 * 16 * dim +
                                                         j / 4 * 64 + (c % 64 / 16 * 4 + c % 4) * 4 + j % 4] *
                                                    q[i * dim + j];
                    least[i] = i % 5 == 3 ? 1 << 29 /* nothing; everything; a sum that is there; one more than it */
                               : i % 5 == 4
                                   ? -(1 << 29)
                                   : sums[i * 64 * n + test_random_below(&r, (uint32_t)(64 * n))] + (i % 5 == 1);
                }
                uint64_t *over = malloc((nq * n + 1) * sizeof *over);
                over[nq * n] = 0x5a5a;
                k->sketch_i8(data, first, n, dim, q, least, nq, over);
                for (size_t i = 0; i < nq; i++)
                    for (size_t c = 0; c < 64 * n; c++)
                        assert_int_equal(over[i * n + c / 64] >> c % 64 & 1, sums[i * 64 * n + c] >= least[i]);
                assert_int_equal(over[nq * n], 0x5a5a);
                free(over), free(sums);
                guarded_free(&gr), guarded_free(&gq);
            }
}

static void scan_images_are_the_nearest_integers_in_every_table(void **state)
{
    (void)state;
    test_random r = {17};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t n = 1; n <= 1024; n += n < 70 ? 1 : 53) {
            guarded gx = guarded_random(&r, n), gc = guarded_random(&r, n), gv = guarded_new((n + 15) / 16 * 16);
            const float *x = gx.data, *c = gc.data;
            int8_t *v = gv.data;
            float most = 0;
            for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i] - c[i]));
            assert_int_equal(bits_of(k->scan_spread(x, c, n)), bits_of(most));
            const float tight = most / (n % 5 == 0 ? 400 : 127); /* a fifth is held back at +-127 */
            double left = 0;
            int64_t sum = 0, squares = 0;
            cairn_scan_rounded out;
            k->scan_round(x, c, n, tight, v, &out);
            for (size_t i = 0; i < n; i++) {
                float want = rintf((x[i] - c[i]) / tight);
                want = want > 127 ? 127 : want < -127 ? -127 : want;
                assert_int_equal(v[i], (int)want);
                double miss = (double)x[i] - (double)c[i] - (double)tight * (double)want;
                left += miss * miss;
                sum += v[i];
                squares += v[i] * v[i];
            }
            assert_int_equal(out.sum, sum);
            assert_true(out.squares == (float)squares);
            assert_true(fabs(sqrt((double)out.left) - sqrt(left)) <=
                        1e-4 * sqrt(left) + 1e-5 * sqrt((double)n) * (double)tight);
            guarded_free(&gx), guarded_free(&gc), guarded_free(&gv);
        }
    }
}

static void scan_rows_quantize_within_half_a_step_and_pad_with_zeros(void **state)
{
    (void)state;
    test_random r = {11};
    for (size_t dim = 1; dim < 140; dim++) {
        guarded gx = guarded_random(&r, dim), gv = guarded_new((dim + 3) / 4 * 4);
        float *x = gx.data, most = 0;
        int8_t *v = gv.data;
        if (dim == 9) memset(x, 0, dim * sizeof *x);
        if (dim % 10 == 0)
            for (size_t i = 0; i < dim; i++) x[i] *= 1e-38f; /* the scale becomes subnormal */
        int32_t sum = -1, want_sum = 0;
        memset(v, 99, (dim + 3) / 4 * 4);
        float scale = cairn_scan_quantize(x, dim, v, &sum);
        for (size_t i = 0; i < dim; i++) most = fmaxf(most, fabsf(x[i]));
        assert_int_equal(bits_of(scale), bits_of(most / 127));
        for (size_t i = 0; i < dim; i++) {
            assert_true(fabs((double)scale * v[i] - x[i]) <= 0.5000001 * scale + 0x1p-149);
            want_sum += v[i];
        }
        for (size_t i = dim; i % 4 != 0; i++) assert_int_equal(v[i], 0);
        assert_int_equal(sum, want_sum);
        guarded_free(&gx), guarded_free(&gv);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scan_scores_are_the_exact_integer_sums_in_every_table),
        cmocka_unit_test(sketches_say_which_integer_sums_reach_the_least_in_every_table),
        cmocka_unit_test(scan_images_are_the_nearest_integers_in_every_table),
        cmocka_unit_test(scan_rows_quantize_within_half_a_step_and_pad_with_zeros),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
