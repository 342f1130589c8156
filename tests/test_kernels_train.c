/* test_kernels_train.c - the kernels of training, every table against definitions in double, at odd shapes, in buffers
 * that end at a page nobody may touch. */
#include "kernels_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static float *copy_of(const float *x, size_t n)
{
    float *y = malloc((n + 1) * sizeof *y);
    assert_non_null(y);
    return memcpy(y, x, n * sizeof *y);
}

/* ---- products ---- */

typedef struct operand { /* rows x cols numbers, `ld` apart, the last one at the end of its memory */
    guarded memory;
    float *at;
    size_t row, col; /* steps of element (i, j) */
} operand;

static operand operand_new(test_random *r, size_t rows, size_t cols, size_t gap, bool transposed)
{
    operand o;
    const size_t outer = transposed ? cols : rows, inner = transposed ? rows : cols, ld = inner + gap;
    o.memory = guarded_random(r, outer == 0 ? 0 : (outer - 1) * ld + inner);
    o.at = o.memory.data;
    o.row = transposed ? 1 : ld;
    o.col = transposed ? ld : 1;
    return o;
}

static void check_product(const char *name, const float *c, const float *was, size_t ldc, size_t m, size_t n, size_t k,
                          const operand *a, const operand *b, bool add)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double want = add ? (double)was[i * ldc + j] : 0, magnitude = fabs(want);
            for (size_t l = 0; l < k; l++) {
                double product = (double)a->at[i * a->row + l * a->col] * (double)b->at[l * b->row + j * b->col];
                want += product, magnitude += fabs(product);
            }
            /* a chain of k rounded additions, but errors of random signs */
            double bound = (4 + 3 * sqrt((double)k)) * 0x1p-24 * magnitude;
            if (!(fabs((double)c[i * ldc + j] - want) <= bound))
                fail_msg("%s, %zux%zux%zu%s: C(%zu, %zu) is %.9g, expected %.9g, bound %.2g", name, m, n, k,
                         add ? " +=" : "", i, j, (double)c[i * ldc + j], want, bound);
        }
        for (size_t j = n; j < ldc && i + 1 < m; j++)
            assert_int_equal(bits_of(c[i * ldc + j]), bits_of(was[i * ldc + j]));
    }
}

static const size_t shapes[][3] = {{1, 1, 1},   {3, 5, 7},    {6, 16, 8},   {12, 32, 5},  {64, 64, 32}, {64, 63, 32},
                                   {13, 17, 1}, {1, 100, 64}, {17, 1, 20},  {4, 4, 0},    {0, 3, 3},    {3, 0, 3},
                                   {7, 33, 96}, {23, 31, 40}, {11, 260, 9}, {250, 40, 12}};
/* more than one piece in each direction */
static const size_t large[][3] = {{500, 300, 20}, {20, 270, 700}, {245, 20, 321}};
enum { SHAPES = sizeof shapes / sizeof *shapes, LARGE = sizeof large / sizeof *large };

static void to_bf16(const cairn_kernels *k, operand *o, size_t n)
{
    uint16_t *halves = malloc((n + 1) * sizeof *halves);
    assert_non_null(halves);
    k->narrow(halves, o->at, CAIRN_BF16, n);
    k->widen(o->at, halves, CAIRN_BF16, n);
    free(halves);
}

/* Operands of products in bf16 are numbers that bf16 holds: then nothing is rounded but sums. */
static void check_products(const cairn_kernels *k, bool bf16)
{
    test_random r = {1};
    float *scratch = malloc(CAIRN_GEMM_SCRATCH * sizeof *scratch);
    assert_non_null(scratch);
    for (size_t s = 0; s < SHAPES + LARGE; s++) {
        const size_t *shape = s < SHAPES ? shapes[s] : large[s - SHAPES], m = shape[0], n = shape[1], d = shape[2];
        for (size_t way = 0; way < 8; way++) { /* A, B transposed, added to */
            operand a = operand_new(&r, m, d, way % 3, way & 1), b = operand_new(&r, d, n, way % 2 * 3, way & 2);
            operand c = operand_new(&r, m, n, way % 4, false);
            const bool add = way & 4;
            const size_t cells = m == 0 ? 0 : (m - 1) * c.row + n;
            float *was = copy_of(c.at, cells);
            if (bf16 && m * d > 0) to_bf16(k, &a, way & 1 ? (d - 1) * a.col + m : (m - 1) * a.row + d);
            if (bf16 && d * n > 0) to_bf16(k, &b, way & 2 ? (n - 1) * b.col + d : (d - 1) * b.row + n);
            k->gemm(m, n, d, a.at, a.row, a.col, b.at, b.row, b.col, c.at, c.row, add, scratch);
            check_product(k->name, c.at, was, c.row, m, n, d, &a, &b, add);
            memcpy(c.at, was, cells * sizeof *was);
            cairn_gemm(k, m, n, d, a.at, a.row, a.col, b.at, b.row, b.col, c.at, c.row, add, scratch);
            check_product("cairn_gemm", c.at, was, c.row, m, n, d, &a, &b, add);
            if (b.col == 1) {
                memcpy(c.at, was, cells * sizeof *was);
                k->product(m, n, d, a.at, a.row, a.col, b.at, b.row, c.at, c.row, add);
                check_product("product", c.at, was, c.row, m, n, d, &a, &b, add);
            }
            free(was);
            guarded_free(&a.memory), guarded_free(&b.memory), guarded_free(&c.memory);
        }
    }
    free(scratch);
}

static void products_agree_with_double_loops_whichever_way_their_operands_lie(void **state)
{
    (void)state;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) check_products(k, false);
}

static void products_in_bf16_of_numbers_it_holds_agree_too(void **state)
{
    (void)state;
    if (cairn_kernels_bf16() == NULL) {
        print_message("no AMX here\n");
        skip();
    }
    check_products(cairn_kernels_bf16(), true);
}

/* Of any numbers a product in bf16 is that of the numbers rounded to nearest even first: what widen(narrow) makes. */
static void products_in_bf16_round_their_operands_to_nearest_even(void **state)
{
    (void)state;
    enum { M = 40, N = 50, K = 70 };
    test_random r = {4};
    const cairn_kernels *k = cairn_kernels_bf16();
    if (k == NULL) skip();
    float c[M * N], rounded[M * N];
    for (int transposed = 0; transposed < 2; transposed++) {
        operand a = operand_new(&r, M, K, 0, transposed), b = operand_new(&r, K, N, 0, false);
        k->product(M, N, K, a.at, a.row, a.col, b.at, b.row, c, N, false);
        to_bf16(k, &a, M * K), to_bf16(k, &b, K * N);
        k->product(M, N, K, a.at, a.row, a.col, b.at, b.row, rounded, N, false);
        check_product("rounded", rounded, NULL, N, M, N, K, &a, &b, false);
        assert_memory_equal(c, rounded, sizeof c);
        guarded_free(&a.memory), guarded_free(&b.memory);
    }
}

/* Windows of any length and blocks cut anywhere give the same bits for a row. */
static void a_row_of_a_product_does_not_depend_on_the_rows_beside_it(void **state)
{
    (void)state;
    enum { M = 250, N = 70, K = 330 };
    test_random r = {2};
    float *scratch = malloc(CAIRN_GEMM_SCRATCH * sizeof *scratch), *all = malloc(M * N * sizeof *all),
          *some = malloc(M * N * sizeof *some);
    assert_true(scratch != NULL && all != NULL && some != NULL);
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int transposed = 0; transposed < 2; transposed++) {
            operand a = operand_new(&r, M, K, 0, transposed), b = operand_new(&r, K, N, 0, false);
            k->gemm(M, N, K, a.at, a.row, a.col, b.at, b.row, b.col, all, N, false, scratch);
            for (size_t first = 0; first < M; first += 31)
                for (size_t m = 1; m < 15 && first + m <= M; m++) {
                    k->gemm(m, N, K, a.at + first * a.row, a.row, a.col, b.at, b.row, b.col, some, N, false, scratch);
                    assert_memory_equal(some, all + first * N, m * N * sizeof *some);
                }
            guarded_free(&a.memory), guarded_free(&b.memory);
        }
    }
    free(scratch), free(all), free(some);
}

static void transposing_moves_every_number_to_its_place(void **state)
{
    (void)state;
    test_random r = {3};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t rows = 0; rows < 11; rows++)
            for (size_t cols = 0; cols < 11; cols++) {
                operand x = operand_new(&r, rows, cols, 2, false), y = operand_new(&r, cols, rows, 3, false);
                const size_t cells = cols == 0 ? 0 : (cols - 1) * y.row + rows;
                float *was = copy_of(y.at, cells);
                k->transpose(y.at, y.row, x.at, x.row, rows, cols);
                for (size_t i = 0; i < cells; i++) {
                    const size_t row = i % y.row, col = i / y.row;
                    const float want = row < rows ? x.at[row * x.row + col] : was[i];
                    assert_int_equal(bits_of(y.at[i]), bits_of(want));
                }
                free(was);
                guarded_free(&x.memory), guarded_free(&y.memory);
            }
}

/* ---- softmax ---- */

static const size_t widths[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49, 55, 56, 57, 62, 63, 64, 65, 100, 127};
enum { WIDTHS = sizeof widths / sizeof *widths, ROWS = 66 };

static size_t seen(bool causal, size_t r, size_t n)
{
    return causal && r + 1 < n ? r + 1 : n;
}

static void softmax_of_rows_agrees_with_its_definition(void **state)
{
    (void)state;
    test_random r = {4};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t w = 0; w < WIDTHS; w++)
            for (size_t way = 0; way < 8; way++) {
                const size_t n = widths[w];
                const bool causal = way & 1, weighted = way & 2;
                operand x = operand_new(&r, ROWS, n, way % 3, false);
                float weights[ROWS], lse[ROWS];
                test_random_fill(&r, weights, ROWS);
                for (size_t i = 0; i < ROWS; i++)
                    for (size_t j = 0; j < n; j++) x.at[i * x.row + j] *= way & 4 ? 300 : 3; /* most underflow */
                float *was = copy_of(x.at, (ROWS - 1) * x.row + n);
                k->row_softmax(x.at, x.row, ROWS, n, causal, weighted ? weights : NULL, way % 3 == 0 ? NULL : lse);
                for (size_t i = 0; i < ROWS; i++) {
                    const size_t sees = seen(causal, i, n);
                    const float *row = was + i * x.row;
                    double most = (double)row[0], sum = 0;
                    for (size_t j = 0; j < sees; j++) most = fmax(most, (double)row[j]);
                    for (size_t j = 0; j < sees; j++) sum += exp((double)row[j] - most);
                    if (way % 3 != 0) assert_true(fabs((double)lse[i] - most - log(sum)) < 3e-7 * (3 + fabs(most)));
                    for (size_t j = 0; j < x.row && i * x.row + j < (ROWS - 1) * x.row + n; j++) {
                        const double shift = (double)row[j] - most; /* rounded to float before exp */
                        double want = j >= sees ? 0 : (weighted ? (double)weights[i] : 1) * exp(shift) / sum;
                        if (j >= n) want = (double)row[j];
                        double bound = j >= sees ? 0 : (1e-6 + 0x1p-24 * fabs(shift)) * fabs(want) + 5e-37;
                        if (!(fabs((double)x.at[i * x.row + j] - want) <= bound))
                            fail_msg("%s, n = %zu, way %zu, row %zu: number %zu is %.9g, expected %.9g", k->name, n,
                                     way, i, j, (double)x.at[i * x.row + j], want);
                    }
                }
                free(was);
                guarded_free(&x.memory);
            }
}

static void the_way_back_through_softmax_agrees_with_its_definition(void **state)
{
    (void)state;
    test_random r = {5};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t w = 0; w < WIDTHS; w++)
            for (size_t way = 0; way < 4; way++) {
                const size_t n = widths[w], ld = n + 2;
                const bool causal = way & 1, known = way & 2;
                operand p = operand_new(&r, ROWS, n, 2, false), u = operand_new(&r, ROWS, n, 2, false);
                float weights[ROWS], means[ROWS], given[ROWS];
                test_random_fill(&r, weights, ROWS), test_random_fill(&r, means, ROWS);
                memcpy(given, means, sizeof given);
                k->row_softmax(p.at, ld, ROWS, n, causal, NULL, NULL);
                float *old_p = copy_of(p.at, (ROWS - 1) * ld + n), *old_u = copy_of(u.at, (ROWS - 1) * ld + n);
                k->row_softmax_backward(p.at, u.at, ld, ROWS, n, causal, weights, means, known);
                for (size_t i = 0; i < ROWS; i++) {
                    const size_t sees = seen(causal, i, n);
                    double mean = 0, weight = (double)weights[i], most = 0;
                    for (size_t j = 0; j < sees; j++) {
                        mean += (double)old_p[i * ld + j] * (double)old_u[i * ld + j];
                        most = fmax(most, fabs((double)old_u[i * ld + j]));
                    }
                    if (known) mean = (double)given[i];
                    assert_true(fabs((double)means[i] - mean) <= 1e-6 * most);
                    for (size_t j = 0; j < ld && i * ld + j < (ROWS - 1) * ld + n; j++) {
                        double share = weight * (double)old_p[i * ld + j], was = (double)old_u[i * ld + j];
                        double want = j < sees ? share * (was - mean) : j < n ? 0 : was;
                        assert_true(fabs((double)u.at[i * ld + j] - want) <= 2e-6 * fabs(share) * (most + fabs(mean)));
                        if (j >= sees) share = (double)old_p[i * ld + j];
                        assert_true(fabs((double)p.at[i * ld + j] - share) <= 1e-7 * fabs(share));
                    }
                }
                free(old_p), free(old_u);
                guarded_free(&p.memory), guarded_free(&u.memory);
            }
}

/* ---- layers ---- */

static const size_t lengths[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 192, 513};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static void the_gated_activation_and_its_gradients_agree_with_their_definitions(void **state)
{
    (void)state;
    test_random r = {6};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t l = 0; l < LENGTHS; l++) {
            const size_t n = lengths[l];
            guarded buffers[6];
            float *at[6];
            for (int i = 0; i < 6; i++) buffers[i] = guarded_random(&r, n), at[i] = buffers[i].data;
            float *out = at[0], *dgate = at[1], *dup = at[2], *dout = at[3], *gate = at[4], *up = at[5];
            for (size_t i = 0; i < n; i++) gate[i] *= i % 3 == 0 ? 50 : 2; /* where exp leaves the range, too */
            for (int back = 0; back < 2; back++) {
                if (back)
                    k->swiglu_backward(out, dgate, dup, dout, gate, up, n);
                else
                    k->swiglu(out, gate, up, n);
                for (size_t i = 0; i < n; i++) {
                    const double g = (double)gate[i], u = (double)up[i], d = (double)dout[i], silu = g * sigmoid(g);
                    /* silu' by its own difference quotient's limit: s + g s (1 - s) */
                    const double slope = sigmoid(g) + g * sigmoid(g) * sigmoid(-g);
                    assert_true(fabs((double)out[i] - silu * u) <= 5e-7 * fabs(silu * u) + 1e-36);
                    if (!back) continue;
                    assert_true(fabs((double)dup[i] - d * silu) <= 5e-7 * fabs(d * silu) + 1e-36);
                    assert_true(fabs((double)dgate[i] - d * u * slope) <= 1e-6 * fabs(d * u) * (1 + fabs(slope)));
                }
            }
            for (int i = 0; i < 6; i++) guarded_free(&buffers[i]);
        }
}

/* sum_i dy_i y_i of a norm, for central differences */
static double norm_loss(const double *x, const double *weight, const float *dy, size_t n, double eps)
{
    double square = 0, sum = 0;
    for (size_t i = 0; i < n; i++) square += x[i] * x[i] / (double)n;
    for (size_t i = 0; i < n; i++) sum += (double)dy[i] * weight[i] * x[i] / sqrt(square + eps);
    return sum;
}

static void the_way_back_through_a_norm_agrees_with_central_differences(void **state)
{
    (void)state;
    test_random r = {7};
    const double h = 1e-4;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t l = 0; l < LENGTHS; l++)
            for (int way = 0; way < 3; way++) { /* written, added, in the place of dy */
                const size_t n = lengths[l];
                guarded gx = guarded_random(&r, n), gw = guarded_random(&r, n), gy = guarded_random(&r, n),
                        gd = guarded_random(&r, n), gg = guarded_random(&r, n);
                float *dy = gy.data, *dx = way == 2 ? dy : gd.data, *dweight = gg.data;
                float *up = copy_of(dy, n), *was_x = copy_of(dx, n), *was_w = copy_of(dweight, n);
                double x[513], w[513];
                for (size_t i = 0; i < n; i++)
                    x[i] = (double)((float *)gx.data)[i], w[i] = (double)((float *)gw.data)[i];
                k->rms_norm_backward(dx, dweight, gx.data, gw.data, dy, n, 1e-2F, way == 1);
                for (size_t i = 0; i < n; i++) {
                    for (int side = 0; side < 2; side++) {
                        double *at = side == 0 ? &x[i] : &w[i], was = *at;
                        *at = was + h;
                        double after = norm_loss(x, w, up, n, (double)1e-2F);
                        *at = was - h;
                        double want = (after - norm_loss(x, w, up, n, (double)1e-2F)) / (2 * h);
                        *at = was;
                        if (side == 1 || way == 1) want += (double)(side == 0 ? was_x : was_w)[i];
                        double got = (double)(side == 0 ? dx : dweight)[i];
                        if (!(fabs(got - want) <= 2e-5 * (1 + fabs(want))))
                            fail_msg("%s: n = %zu, way %d, side %d, %zu: %.9g, expected %.9g", k->name, n, way, side, i,
                                     got, want);
                    }
                }
                free(up), free(was_x), free(was_w);
                guarded_free(&gx), guarded_free(&gw), guarded_free(&gy), guarded_free(&gd), guarded_free(&gg);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_gated_activation_and_its_gradients_agree_with_their_definitions),
        cmocka_unit_test(the_way_back_through_a_norm_agrees_with_central_differences),
        cmocka_unit_test(products_agree_with_double_loops_whichever_way_their_operands_lie),
        cmocka_unit_test(products_in_bf16_of_numbers_it_holds_agree_too),
        cmocka_unit_test(products_in_bf16_round_their_operands_to_nearest_even),
        cmocka_unit_test(a_row_of_a_product_does_not_depend_on_the_rows_beside_it),
        cmocka_unit_test(transposing_moves_every_number_to_its_place),
        cmocka_unit_test(softmax_of_rows_agrees_with_its_definition),
        cmocka_unit_test(the_way_back_through_softmax_agrees_with_its_definition),
    };
    return cmocka_run_group_tests_name("kernels_train", tests, NULL, NULL);
}
