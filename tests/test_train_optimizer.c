/* test_train_optimizer.c - where training starts, updates, and that together they learn.
 *
 * Witnesses: the definitions of AdamW and of Muon's iteration in double, written another way.
 */
#include "train_support.h"

#include <train_internal.h>

static cairn_train_layout *layout_of(uint32_t width, uint32_t hidden, uint32_t vocab)
{
    cairn_train_layout *layout;
    const uint8_t local[2] = {1, 0};
    cairn_train_shape s = {.vocab = vocab, .width = width, .hidden = hidden, .norm_eps = 1e-5F, .qk_norm = true};
    cairn_attention_shape_init(&s.attention, sizeof s.attention);
    s.attention.layers = 2;
    s.attention.heads = s.attention.kv_heads = 2;
    s.attention.head_dim = 8;
    s.attention.block_tokens = 7;
    s.attention.local_layers = local;
    assert_ok(cairn_train_layout_new(&s, &layout));
    return layout;
}

static float *random_floats(test_random *r, size_t n)
{
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    test_random_fill(r, x, n);
    return x;
}

static float *copy_of(const float *x, size_t n)
{
    float *y = malloc(n * sizeof *y);
    assert_non_null(y);
    return memcpy(y, x, n * sizeof *y);
}

/* ---- AdamW ---- */

static void adamw_follows_its_definition(void **state)
{
    (void)state;
    test_random r = {1};
    cairn_train_layout *t = layout_of(16, 24, 20);
    cairn_train_optimizer opt;
    cairn_train_rates rates;
    double norm;
    assert_ok(cairn_train_optimizer_init(&opt, t, NULL));
    cairn_train_rates_init(&rates);
    rates.muon = 0;
    rates.clip = 0;
    float *w = random_floats(&r, t->total);
    double *want = calloc(t->total, sizeof *want), *m = calloc(t->total, sizeof *m), *v = calloc(t->total, sizeof *v);
    assert_true(want != NULL && m != NULL && v != NULL);
    for (size_t i = 0; i < t->total; i++) want[i] = (double)w[i];
    for (int update = 1; update <= 4; update++) {
        float *g = random_floats(&r, t->total);
        double pace = 1.0 / update, rate = 2e-3 * pace;
        for (size_t p = 0; p < t->n_params; p++) {
            const cairn_train_param *param = &t->params[p];
            bool vector = param->rows == 1; /* norms and biases, which do not decay */
            for (size_t i = param->at; i < param->at + (size_t)param->rows * param->cols; i++) {
                double d = (double)g[i];
                m[i] = 0.9 * m[i] + 0.1 * d;
                v[i] = 0.95 * v[i] + 0.05 * d * d;
                double mean = m[i] / (1 - pow(0.9, update)), square = v[i] / (1 - pow(0.95, update));
                want[i] -= rate * ((vector ? 0 : 0.05 * want[i]) + mean / (sqrt(square) + 1e-8));
            }
        }
        assert_ok(cairn_train_update(&opt, &rates, pace, w, g, &norm));
        free(g);
    }
    for (size_t i = 0; i < t->total; i++)
        if (fabs((double)w[i] - want[i]) > 2e-6) fail_msg("%zu: %.9g, expected %.9g", i, (double)w[i], want[i]);
    free(w), free(want), free(m), free(v);
    cairn_train_optimizer_wipe(&opt);
    cairn_train_layout_free(t);
}

/* ---- Muon ---- */

/* The iteration on X (rows, cols) in double, always as (X X^T): for a tall matrix that is the larger square, another
 * computation of the same thing, since (X X^T) X = X (X^T X). */
static void orthogonalised(double *x, size_t rows, size_t cols)
{
    double *gram = calloc(rows * rows, sizeof *gram), *twice = calloc(rows * cols, sizeof *twice),
           *once = calloc(rows * cols, sizeof *once), square = 0;
    assert_true(gram != NULL && twice != NULL && once != NULL);
    for (size_t i = 0; i < rows * cols; i++) square += x[i] * x[i];
    for (size_t i = 0; i < rows * cols; i++) x[i] /= sqrt(square) + 1e-7;
    for (int step = 0; step < 5; step++) {
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < rows; j++) {
                gram[i * rows + j] = 0;
                for (size_t k = 0; k < cols; k++) gram[i * rows + j] += x[i * cols + k] * x[j * cols + k];
            }
        for (int pass = 0; pass < 2; pass++) {
            const double *in = pass == 0 ? x : once;
            double *out = pass == 0 ? once : twice;
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < cols; j++) {
                    out[i * cols + j] = 0;
                    for (size_t k = 0; k < rows; k++) out[i * cols + j] += gram[i * rows + k] * in[k * cols + j];
                }
        }
        for (size_t i = 0; i < rows * cols; i++) x[i] = 3.4445 * x[i] - 4.7750 * once[i] + 2.0315 * twice[i];
    }
    free(gram), free(once), free(twice);
}

static void muon_steps_along_the_orthogonalised_momentum(void **state)
{
    (void)state;
    test_random r = {2};
    cairn_train_layout *t = layout_of(16, 40, 20);
    cairn_train_optimizer opt;
    cairn_train_rates rates;
    double norm, worst = 0;
    assert_ok(cairn_train_optimizer_init(&opt, t, NULL));
    cairn_train_rates_init(&rates);
    rates.clip = 0;
    float *g1 = random_floats(&r, t->total), *g2 = random_floats(&r, t->total), *w = random_floats(&r, t->total);
    float *first = copy_of(g1, t->total), *second = copy_of(g2, t->total);
    assert_ok(cairn_train_update(&opt, &rates, 1, w, first, &norm));
    float *before = copy_of(w, t->total);
    assert_ok(cairn_train_update(&opt, &rates, 0.5, w, second, &norm));
    bool tall = false, wide = false;
    for (size_t p = 0; p < t->n_params; p++) {
        const cairn_train_param *param = &t->params[p];
        const size_t rows = param->rows, cols = param->cols, n = rows * cols;
        if (param->kind != CAIRN_TRAIN_MATRIX) continue;
        tall = tall || rows > cols;
        wide = wide || rows < cols;
        double *x = malloc(n * sizeof *x), scale = rows > cols ? sqrt((double)rows / (double)cols) : 1;
        assert_non_null(x);
        for (size_t i = 0; i < n; i++) { /* momentum after two gradients, and Nesterov's look ahead */
            double a = (double)g1[param->at + i], b = (double)g2[param->at + i];
            x[i] = b + 0.95 * (0.95 * a + b);
        }
        orthogonalised(x, rows, cols);
        /* an orthogonal matrix has a square norm of its smaller side; the iteration stops near that */
        double square = 0, small = (double)(rows < cols ? rows : cols);
        for (size_t i = 0; i < n; i++) square += x[i] * x[i];
        assert_true(square > 0.5 * small && square < 1.4 * small);
        for (size_t i = 0; i < n; i++) {
            double old = (double)before[param->at + i], want = old - 0.01 * (0.05 * old + scale * x[i]);
            worst = fmax(worst, fabs((double)w[param->at + i] - want));
        }
        free(x);
    }
    assert_true(tall && wide);
    expect_below("weights", worst, 1e-6);
    free(g1), free(g2), free(first), free(second), free(w), free(before);
    cairn_train_optimizer_wipe(&opt);
    cairn_train_layout_free(t);
}

static void threads_change_no_bit_of_an_update(void **state)
{
    (void)state;
    cairn_train_layout *t = layout_of(48, 112, 1800); /* more numbers than one partial sum of the norm takes */
    cairn_train_rates rates;
    cairn_pool *pool;
    float *w[2];
    double norm[2];
    cairn_train_rates_init(&rates);
    assert_ok(cairn_pool_new(3, &pool));
    for (int threaded = 0; threaded < 2; threaded++) {
        test_random r = {4};
        cairn_train_optimizer opt;
        assert_ok(cairn_train_optimizer_init(&opt, t, threaded ? pool : NULL));
        w[threaded] = random_floats(&r, t->total);
        for (int update = 0; update < 3; update++) {
            float *g = random_floats(&r, t->total);
            assert_ok(cairn_train_update(&opt, &rates, 1, w[threaded], g, &norm[threaded]));
            free(g);
        }
        cairn_train_optimizer_wipe(&opt);
    }
    assert_true(norm[0] == norm[1]);
    assert_memory_equal(w[0], w[1], t->total * sizeof *w[0]);
    free(w[0]), free(w[1]);
    cairn_pool_free(pool);
    cairn_train_layout_free(t);
}

/* ---- clipping, what is not finite, pace ---- */

static void a_long_gradient_is_shortened_and_an_endless_one_changes_nothing(void **state)
{
    (void)state;
    test_random r = {3};
    cairn_train_layout *t = layout_of(16, 24, 20);
    cairn_train_optimizer opt;
    cairn_train_rates rates;
    double norm, square = 0;
    assert_ok(cairn_train_optimizer_init(&opt, t, NULL));
    cairn_train_rates_init(&rates);
    float *w = random_floats(&r, t->total), *g = random_floats(&r, t->total), *was = copy_of(g, t->total);
    for (size_t i = 0; i < t->total; i++) square += (double)g[i] * (double)g[i];
    assert_ok(cairn_train_update(&opt, &rates, 1, w, g, &norm));
    assert_true(fabs(norm - sqrt(square)) < 1e-9);
    for (size_t i = 0; i < t->params[0].rows; i++) /* of the embedding: AdamW's first mean is a tenth of the gradient */
        assert_true(fabs((double)opt.first[i] - 0.1 * (double)was[i] / norm) < 1e-8);
    float *weights = copy_of(w, t->total), *moments = copy_of(opt.first, t->total);
    for (int bad = 0; bad < 2; bad++) {
        memcpy(g, was, t->total * sizeof *g);
        g[t->total / 2] = bad == 0 ? NAN : INFINITY;
        assert_int_equal(cairn_train_update(&opt, &rates, 1, w, g, &norm), CAIRN_INVALID);
        assert_non_null(strstr(cairn_last_error(), "update 1 is not finite"));
        assert_int_equal(opt.updates, 1);
        assert_memory_equal(w, weights, t->total * sizeof *w);
        assert_memory_equal(opt.first, moments, t->total * sizeof *w);
    }
    free(w), free(g), free(was), free(weights), free(moments);
    cairn_train_optimizer_wipe(&opt);
    for (uint64_t n = 1; n <= 4; n++) {
        cairn_alloc_fail_at(n);
        assert_int_equal(cairn_train_optimizer_init(&opt, t, NULL), CAIRN_NO_MEMORY);
        cairn_alloc_fail_at(0);
        assert_null(opt.first);
    }
    cairn_train_layout_free(t);
}

static void pace_warms_up_and_falls_along_a_half_cosine(void **state)
{
    (void)state;
    assert_true(fabs(cairn_train_pace(0, 20, 100, 0.02) - 0.05) < 1e-12);
    assert_true(cairn_train_pace(19, 20, 100, 0.02) == 1);
    assert_true(cairn_train_pace(20, 20, 100, 0.02) == 1);
    assert_true(fabs(cairn_train_pace(60, 20, 100, 0.02) - 0.51) < 1e-12);
    assert_true(fabs(cairn_train_pace(100, 20, 100, 0.02) - 0.02) < 1e-12);
    assert_true(fabs(cairn_train_pace(1000, 20, 100, 0.02) - 0.02) < 1e-12);
    assert_true(cairn_train_pace(70, 20, 100, 1) == 1);
    assert_true(cairn_train_pace(0, 0, 0, 0.5) == 0.5);
}

/* ---- the start, and learning ---- */

static void parameters_start_with_the_spread_of_their_kind(void **state)
{
    (void)state;
    cairn_train_layout *t = layout_of(64, 96, 260);
    float *w = calloc(t->total, sizeof *w), *again = calloc(t->total, sizeof *again);
    assert_true(w != NULL && again != NULL);
    cairn_train_init(t, 5, w);
    cairn_train_init(t, 5, again);
    assert_memory_equal(w, again, t->total * sizeof *w);
    cairn_train_init(t, 6, again);
    for (size_t p = 0; p < t->n_params; p++) {
        const cairn_train_param *param = &t->params[p];
        const size_t n = (size_t)param->rows * param->cols;
        const float *x = w + param->at;
        double mean = 0, square = 0, want = 1 / sqrt((double)param->cols);
        for (size_t i = 0; i < n; i++) mean += (double)x[i] / (double)n;
        for (size_t i = 0; i < n; i++) square += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
        if (param->kind == CAIRN_TRAIN_NORM || param->kind == CAIRN_TRAIN_LANDMARK_BIAS) {
            assert_true(square < 1e-12);
            assert_true(fabs(mean - (param->kind == CAIRN_TRAIN_NORM ? 1 : log(7))) < 1e-6);
            continue;
        }
        if (param->kind == CAIRN_TRAIN_EMBEDDING) want = 0.02;
        if (strstr(param->name, "output.weight") != NULL && param->name[0] == 'b') want /= 2; /* sqrt(2 * 2 layers) */
        if (strstr(param->name, "ffn_down") != NULL) want /= 2;
        /* five standard errors of both */
        if (fabs(mean) > 5 * want / sqrt((double)n) || fabs(sqrt(square) / want - 1) > 5 / sqrt(2.0 * (double)n))
            fail_msg("%s: mean %g, spread %g, expected %g", param->name, mean, sqrt(square), want);
        assert_memory_not_equal(x, again + param->at, n * sizeof *x);
    }
    free(w), free(again);
    cairn_train_layout_free(t);
}

/* Windows whose second half repeats the first: after training, the repeated half is predicted, the first cannot be. */
static double learn(const cairn_train_layout *t, float *w, uint64_t updates, double *first)
{
    enum { ROWS = 32, B = 8 };
    test_random r = {9};
    cairn_train_model_f32 *model;
    cairn_train_optimizer opt;
    cairn_train_rates rates;
    cairn_token slots[ROWS], targets[ROWS];
    float weights[ROWS], *g = malloc(t->total * sizeof *g);
    double loss = 0, norm;
    assert_non_null(g);
    assert_ok(cairn_train_model_new_f32(t, ROWS, &model));
    assert_ok(cairn_train_optimizer_init(&opt, t, NULL));
    cairn_train_rates_init(&rates);
    cairn_train_init(t, 1, w);
    for (uint64_t u = 0; u < updates; u++) {
        memset(g, 0, t->total * sizeof *g);
        loss = 0;
        for (int window = 0; window < 8; window++) {
            size_t judged = 0;
            for (size_t i = 0; i < ROWS; i++) {
                slots[i] = i < ROWS / 2 ? (cairn_token)test_random_below(&r, 12) : slots[i - ROWS / 2];
                if (i % B == B - 1) slots[i] = 12;
            }
            cairn_train_targets(slots, ROWS, B - 1, targets);
            for (size_t i = 0; i < ROWS; i++) judged += (weights[i] = i >= ROWS / 2 && targets[i] >= 0) > 0;
            cairn_train_window in = {slots, targets, weights, ROWS, NULL};
            cairn_train_forward_f32(model, w, slots, ROWS);
            loss += cairn_train_loss_f32(model, &in, 1.0 / (8.0 * (double)judged), NULL, NULL) / (8.0 * (double)judged);
            cairn_train_backward_f32(model, w, &in, g);
        }
        if (u == 0) *first = loss;
        assert_ok(cairn_train_update(&opt, &rates, cairn_train_pace(u, 10, updates, 0.1), w, g, &norm));
    }
    cairn_train_model_free_f32(model);
    cairn_train_optimizer_wipe(&opt);
    free(g);
    return loss;
}

static void a_small_model_learns_to_repeat_what_stands_two_blocks_back_twice_the_same(void **state)
{
    (void)state;
    cairn_train_layout *t = layout_of(32, 48, 13);
    float *w = malloc(t->total * sizeof *w), *again = malloc(t->total * sizeof *again);
    double first;
    assert_true(w != NULL && again != NULL);
    double loss = learn(t, w, 250, &first);
    print_message("  nats per repeated token: %.3f, then %.3f\n", first, loss);
    assert_true(fabs(first - log(13)) < 1);
    assert_true(loss < 1); /* chance is ln 12 = 2.48 */
    assert_true(learn(t, again, 250, &first) == loss);
    assert_memory_equal(w, again, t->total * sizeof *w);
    free(w), free(again);
    cairn_train_layout_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(adamw_follows_its_definition),
        cmocka_unit_test(muon_steps_along_the_orthogonalised_momentum),
        cmocka_unit_test(threads_change_no_bit_of_an_update),
        cmocka_unit_test(a_long_gradient_is_shortened_and_an_endless_one_changes_nothing),
        cmocka_unit_test(pace_warms_up_and_falls_along_a_half_cosine),
        cmocka_unit_test(parameters_start_with_the_spread_of_their_kind),
        cmocka_unit_test(a_small_model_learns_to_repeat_what_stands_two_blocks_back_twice_the_same),
    };
    return cmocka_run_group_tests_name("train_optimizer", tests, NULL, NULL);
}
