/* test_train_attention.c - grouped softmax and the attention of a training window: values, gradients.
 *
 * Witnesses: the reference loops of src/attention, the authors' autograd (golden file), central differences in double.
 */
#include "train_support.h"

#include <train_internal.h>

#include <jansson.h>

/* ---- grouped softmax on score matrices ---- */

typedef struct softmax_case {
    size_t rows;
    uint8_t is_landmark[64];
    double bias;
    double *scores, *upstream, *gradient, *weights;
} softmax_case;

static void case_init(softmax_case *c, test_random *r, size_t rows, double spread, double bias)
{
    c->rows = rows;
    c->bias = bias;
    c->scores = random_doubles(r, rows * rows, spread);
    c->upstream = random_doubles(r, rows * rows, 1);
    c->gradient = random_doubles(r, rows * rows, 1);
    c->weights = random_doubles(r, rows * rows, 1);
}
static void case_wipe(softmax_case *c)
{
    free(c->scores), free(c->upstream), free(c->gradient), free(c->weights);
}

static double softmax_loss(void *arg)
{
    softmax_case *c = arg;
    double sum = 0;
    assert_ok(cairn_train_grouped_softmax_f64(c->scores, c->is_landmark, c->rows, c->bias, c->weights));
    for (size_t i = 0; i < c->rows * c->rows; i++) sum += c->weights[i] * c->upstream[i];
    return sum;
}

/* Windows by name: '.' a token, 'L' a landmark. */
static const char *const windows[] = {
    "...L...L..",             /* from a block on, the last one open */
    "..L...L...L",            /* a partial first block, closed by a landmark */
    "L...L..",                /* a landmark first: row 0 has no key, an empty block a gate */
    "..L",                    /* one block */
    "......",                 /* one open block: plain causal softmax */
    ".",                      /* one key */
    "L",                      /* none */
    ".L.L.LL..",              /* blocks of one, and an empty one in the middle */
    "...............L......", /* one long past block */
};

static void softmax_of(softmax_case *c, test_random *r, const char *window, double spread)
{
    case_init(c, r, strlen(window), spread, 0.7);
    for (size_t i = 0; i < c->rows; i++) c->is_landmark[i] = window[i] == 'L';
}

static void weights_equal_the_reference_loops(void **state)
{
    (void)state;
    test_random r = {1};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
        softmax_case c;
        softmax_of(&c, &r, windows[w], 2);
        size_t n = c.rows * c.rows;
        float *scores = as_floats(c.scores, n), *weights = as_floats(c.scores, n);
        assert_ok(cairn_grouped_softmax(c.scores, c.is_landmark, c.rows, c.bias, c.gradient));
        softmax_loss(&c);
        assert_ok(cairn_train_grouped_softmax_f32(scores, c.is_landmark, c.rows, (float)c.bias, weights));
        for (size_t i = 0; i < n; i++) {
            if (fabs(c.weights[i] - c.gradient[i]) > 1e-12 || fabs((double)weights[i] - c.gradient[i]) > 1e-6)
                fail_msg("window %s cell %zu: %.17g, in float %.9g, expected %.17g", windows[w], i, c.weights[i],
                         (double)weights[i], c.gradient[i]);
        }
        free(scores), free(weights);
        case_wipe(&c);
    }
}

static void gradients_equal_central_differences(void **state)
{
    (void)state;
    test_random r = {2};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
        softmax_case c;
        double dbias;
        softmax_of(&c, &r, windows[w], 1.5);
        size_t n = c.rows * c.rows;
        assert_ok(cairn_train_grouped_softmax_backward_f64(c.scores, c.is_landmark, c.rows, c.bias, c.upstream,
                                                           c.gradient, &dbias));
        expect_below(windows[w], worst_against_differences(c.gradient, c.scores, n, softmax_loss, &c), 1e-5);
        expect_below("bias", worst_against_differences(&dbias, &c.bias, 1, softmax_loss, &c), 1e-5);
        case_wipe(&c);
    }
}

/* [9] A shift of all scores of a softmax changes nothing, so its gradients sum to 0. */
static void gradients_of_each_softmax_sum_to_zero(void **state)
{
    (void)state;
    test_random r = {3};
    softmax_case c;
    double dbias;
    softmax_of(&c, &r, "..L...L...L..", 2);
    assert_ok(cairn_train_grouped_softmax_backward_f64(c.scores, c.is_landmark, c.rows, c.bias, c.upstream, c.gradient,
                                                       &dbias));
    const double *last = c.gradient + (c.rows - 1) * c.rows;
    assert_true(fabs(last[0] + last[1]) < 1e-15);
    assert_true(fabs(last[3] + last[4] + last[5]) < 1e-15);
    assert_true(fabs(last[7] + last[8] + last[9]) < 1e-15);
    assert_true(fabs(last[2] + last[6] + last[10] + last[11] + last[12]) < 1e-15);
    const double *landmark = c.gradient + 10 * c.rows; /* its query does not see its own key */
    assert_true(landmark[10] == 0 && landmark[9] != 0 && landmark[6] != 0);
    case_wipe(&c);
}

/* [10] A gate that underflows to 0 leaves zero gradients, not 0 / 0. */
static void scores_of_a_thousand_give_finite_weights_and_gradients(void **state)
{
    (void)state;
    test_random r = {4};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
        softmax_case c;
        float dbias;
        softmax_of(&c, &r, windows[w], 1);
        size_t n = c.rows * c.rows;
        for (size_t i = 0; i < n; i++) c.scores[i] = c.scores[i] < 0 ? -1000 : 1000;
        float *scores = as_floats(c.scores, n), *upstream = as_floats(c.upstream, n),
              *gradient = as_floats(c.scores, n);
        assert_ok(
            cairn_train_grouped_softmax_backward_f32(scores, c.is_landmark, c.rows, 4, upstream, gradient, &dbias));
        for (size_t i = 0; i < n; i++) assert_true(isfinite(gradient[i]));
        assert_true(isfinite(dbias));
        assert_ok(cairn_train_grouped_softmax_f32(scores, c.is_landmark, c.rows, 4, gradient));
        for (size_t i = 0; i < n; i++) assert_true(gradient[i] >= 0 && gradient[i] <= 1);
        free(scores), free(upstream), free(gradient);
        case_wipe(&c);
    }
}

static size_t flatten(const json_t *value, double *out, size_t at, size_t cap)
{
    size_t i;
    json_t *each;
    if (!json_is_array(value)) {
        assert_true(json_is_number(value) && at < cap);
        out[at] = json_number_value(value);
        return at + 1;
    }
    json_array_foreach(value, i, each) at = flatten(each, out, at, cap);
    return at;
}

static void gradients_equal_the_authors_code(void **state)
{
    (void)state;
    json_error_t error;
    json_t *root = json_load_file(CAIRN_TEST_DATA "/golden/grouped_softmax.json", 0, &error), *each, *index;
    size_t i, n;
    if (root == NULL) fail_msg("%s:%d: %s", error.source, error.line, error.text);
    assert_true(json_array_size(json_object_get(root, "cases")) > 0);
    json_array_foreach(json_object_get(root, "cases"), i, each)
    {
        size_t rows = (size_t)json_integer_value(json_object_get(each, "T"));
        size_t heads = (size_t)json_integer_value(json_object_get(each, "heads"));
        size_t cells = rows * rows;
        double *of[3], worst = 0, worst_f32 = 0;
        const char *const keys[3] = {"scores", "upstream_grad", "grad_scores"};
        uint8_t *is_landmark = calloc(rows, 1);
        double *got = malloc(cells * sizeof *got), dbias;
        float *got_f32 = malloc(cells * sizeof *got_f32), dbias_f32;
        assert_true(is_landmark != NULL && got != NULL && got_f32 != NULL);
        json_array_foreach(json_object_get(each, "landmark_index"), n, index)
        {
            assert_true((size_t)json_integer_value(index) < rows);
            is_landmark[json_integer_value(index)] = 1;
        }
        for (int k = 0; k < 3; k++) {
            of[k] = malloc(heads * cells * sizeof *of[k]);
            assert_non_null(of[k]);
            assert_int_equal(flatten(json_object_get(each, keys[k]), of[k], 0, heads * cells), heads * cells);
        }
        for (size_t h = 0; h < heads; h++) {
            float *scores = as_floats(of[0] + h * cells, cells), *upstream = as_floats(of[1] + h * cells, cells);
            assert_ok(cairn_train_grouped_softmax_backward_f64(of[0] + h * cells, is_landmark, rows, 0,
                                                               of[1] + h * cells, got, &dbias));
            assert_ok(
                cairn_train_grouped_softmax_backward_f32(scores, is_landmark, rows, 0, upstream, got_f32, &dbias_f32));
            for (size_t c = 0; c < cells; c++) {
                worst = fmax(worst, fabs(got[c] - of[2][h * cells + c]));
                worst_f32 = fmax(worst_f32, fabs((double)got_f32[c] - of[2][h * cells + c]));
            }
            free(scores), free(upstream);
        }
        expect_below(json_string_value(json_object_get(each, "name")), worst, 1e-12);
        expect_below("the same in float", worst_f32, 1e-6);
        for (int k = 0; k < 3; k++) free(of[k]);
        free(is_landmark), free(got), free(got_f32);
    }
    json_decref(root);
}

/* ---- attention of a window ---- */

typedef struct layer_spec {
    const char *name;
    uint32_t heads, kv_heads, dim, block_tokens, clamp, rope_dims;
    bool interleaved, local;
    size_t rows;
} layer_spec;

static const layer_spec layers[] = {
    {"two whole blocks", 2, 2, 4, 3, 3, 0, false, false, 8},
    {"older than the clamp, the last block open", 2, 1, 4, 3, 2, 0, false, false, 22},
    {"clamp 1", 2, 2, 6, 4, 1, 0, false, false, 18},
    {"a local layer", 2, 1, 4, 3, 3, 0, false, true, 21},
    {"a local layer and clamp 1", 1, 1, 4, 3, 1, 0, false, true, 21},
    {"interleaved pairs, four of six dims", 4, 2, 6, 2, 2, 4, true, false, 14},
    {"one block", 2, 2, 4, 7, 3, 0, false, false, 8},
    {"one open block", 2, 2, 4, 7, 3, 0, false, false, 5},
    {"one row", 2, 2, 4, 7, 3, 0, false, false, 1},
    {"blocks of one token", 2, 2, 4, 1, 3, 0, false, false, 11},
};
enum { N_LAYERS = sizeof layers / sizeof *layers };

typedef struct layer_case {
    cairn_attention_shape shape;
    uint8_t local[2];
    size_t rows, ld, n_in, n_out;
    double *in;   /* (rows, ld): q, k, v side by side and a column nobody uses */
    double *bias; /* (heads) */
    double *up;   /* (rows, heads, D) dL/dout */
    double *out, *grad, *dbias;
    cairn_train_attention_f64 *att;
} layer_case;

enum { LAYER = 1 };

static cairn_train_qkv_f64 columns(const layer_case *c, double *base)
{
    size_t q = (size_t)c->shape.heads * c->shape.head_dim, kv = (size_t)c->shape.kv_heads * c->shape.head_dim;
    return (cairn_train_qkv_f64){.q = base, .k = base + q, .v = base + q + kv, .ld = c->ld};
}

static void layer_init(layer_case *c, const layer_spec *spec, uint64_t seed)
{
    test_random r = {seed};
    *c = (layer_case){.rows = spec->rows, .local = {0, spec->local}};
    cairn_attention_shape_init(&c->shape, sizeof c->shape);
    c->shape.layers = 2;
    c->shape.heads = spec->heads;
    c->shape.kv_heads = spec->kv_heads;
    c->shape.head_dim = spec->dim;
    c->shape.block_tokens = spec->block_tokens;
    c->shape.clamp_blocks = spec->clamp;
    c->shape.rope_dims = spec->rope_dims;
    c->shape.rope_interleaved = spec->interleaved;
    c->shape.local_layers = c->local;
    c->ld = (size_t)(spec->heads + 2 * spec->kv_heads) * spec->dim + 1;
    c->n_in = c->rows * c->ld;
    c->n_out = c->rows * spec->heads * spec->dim;
    c->in = random_doubles(&r, c->n_in, 1);
    c->bias = random_doubles(&r, spec->heads, 1);
    c->up = random_doubles(&r, c->n_out, 1);
    c->out = random_doubles(&r, c->n_out, 1);
    c->grad = calloc(c->n_in, sizeof *c->grad);
    c->dbias = calloc(spec->heads, sizeof *c->dbias);
    assert_true(c->grad != NULL && c->dbias != NULL);
    /* room for more rows than come: leading dimensions and rows must not be mixed up */
    assert_ok(cairn_train_attention_new_f64(&c->shape, spec->rows + 5, &c->att));
}
static void layer_wipe(layer_case *c)
{
    cairn_train_attention_free_f64(c->att);
    free(c->in), free(c->bias), free(c->up), free(c->out), free(c->grad), free(c->dbias);
}

static double layer_loss(void *arg)
{
    layer_case *c = arg;
    double sum = 0;
    cairn_train_qkv_f64 in = columns(c, c->in);
    cairn_train_attend_f64(c->att, LAYER, c->rows, &in, c->bias, NULL, c->out);
    for (size_t i = 0; i < c->n_out; i++) sum += c->out[i] * c->up[i];
    return sum;
}

static void layer_gradient(layer_case *c)
{
    cairn_train_qkv_f64 in = columns(c, c->in);
    size_t q = (size_t)c->shape.heads * c->shape.head_dim, kv = (size_t)c->shape.kv_heads * c->shape.head_dim;
    cairn_train_attend_backward_f64(c->att, LAYER, c->rows, &in, c->bias, c->up, NULL, 1, c->grad, c->grad + q,
                                    c->grad + q + kv, c->dbias);
}

static void copy_columns(float *to, const layer_case *c, size_t from, size_t n)
{
    for (size_t r = 0; r < c->rows; r++)
        for (size_t i = 0; i < n; i++) to[r * n + i] = (float)c->in[r * c->ld + from + i];
}

static void attention_equals_the_reference_loops(void **state)
{
    (void)state;
    for (size_t s = 0; s < N_LAYERS; s++) {
        layer_case c;
        layer_init(&c, &layers[s], 10 + s);
        size_t q = (size_t)c.shape.heads * c.shape.head_dim, kv = (size_t)c.shape.kv_heads * c.shape.head_dim;
        for (size_t i = 0; i < c.n_in; i++) c.in[i] = (double)(float)c.in[i]; /* the reference takes floats */
        float bias[2 * 8] = {0}, *fin = as_floats(c.in, c.n_in), *fout = as_floats(c.out, c.n_out);
        for (size_t h = 0; h < c.shape.heads; h++)
            c.bias[h] = (double)(bias[LAYER * c.shape.heads + h] = (float)c.bias[h]);
        float *parts = calloc(c.rows * (q + 2 * kv), sizeof *parts), *want = as_floats(c.out, c.n_out);
        assert_non_null(parts);
        copy_columns(parts, &c, 0, q);
        copy_columns(parts + c.rows * q, &c, q, kv);
        copy_columns(parts + c.rows * (q + kv), &c, q + kv, kv);
        c.shape.landmark_bias = bias;
        assert_ok(cairn_attention_reference(&c.shape, LAYER, c.rows, parts, parts + c.rows * q,
                                            parts + c.rows * (q + kv), NULL, want));
        layer_loss(&c);
        cairn_train_attention_f32 *att;
        cairn_train_qkv_f32 in = {fin, fin + q, fin + q + kv, c.ld};
        assert_ok(cairn_train_attention_new_f32(&c.shape, c.rows + 9, &att));
        cairn_train_attend_f32(att, LAYER, c.rows, &in, bias + LAYER * c.shape.heads, NULL, fout);
        for (size_t i = 0; i < c.n_out; i++)
            if (fabs(c.out[i] - (double)want[i]) > 1e-6 || fabsf(fout[i] - want[i]) > 3e-6f)
                fail_msg("%s: number %zu is %.9g, in float %.9g, expected %.9g", layers[s].name, i, c.out[i],
                         (double)fout[i], (double)want[i]);
        cairn_train_attention_free_f32(att);
        free(fin), free(fout), free(parts), free(want);
        layer_wipe(&c);
    }
}

static void attention_gradients_equal_central_differences(void **state)
{
    (void)state;
    for (size_t s = 0; s < N_LAYERS; s++) {
        layer_case c;
        layer_init(&c, &layers[s], 30 + s);
        layer_gradient(&c);
        expect_below(layers[s].name, worst_against_differences(c.grad, c.in, c.n_in, layer_loss, &c), 1e-5);
        expect_below("bias", worst_against_differences(c.dbias, c.bias, c.shape.heads, layer_loss, &c), 1e-5);
        layer_wipe(&c);
    }
}

static void a_landmarks_value_gets_no_gradient_and_its_key_does(void **state)
{
    (void)state;
    layer_case c;
    layer_init(&c, &layers[1], 50);
    layer_gradient(&c);
    cairn_train_qkv_f64 d = columns(&c, c.grad);
    for (size_t r = 0; r < c.rows; r++) {
        bool landmark = r % 4 == 3;
        for (size_t i = 0; i < 4; i++) {
            assert_true((d.v[r * d.ld + i] == 0) == landmark);
            assert_true(d.k[r * d.ld + i] != 0);
        }
        assert_true(c.grad[r * c.ld + c.ld - 1] == 0); /* the column beside is left alone */
    }
    layer_wipe(&c);
}

/* The demo model's head and block, four times the clamp: float against double, relative to the largest entry. */
static void float_gradients_follow_double_ones(void **state)
{
    (void)state;
    const layer_spec demo = {"demo", 3, 3, 32, 63, 3, 0, false, false, 400};
    layer_case c;
    layer_init(&c, &demo, 60);
    layer_gradient(&c);
    size_t q = (size_t)3 * 32;
    float *in = as_floats(c.in, c.n_in), *bias = as_floats(c.bias, 3), *up = as_floats(c.up, c.n_out);
    float *grad = calloc(c.n_in, sizeof *grad), dbias[3] = {0};
    assert_non_null(grad);
    cairn_train_attention_f32 *att;
    cairn_train_qkv_f32 fin = {in, in + q, in + 2 * q, c.ld};
    assert_ok(cairn_train_attention_new_f32(&c.shape, c.rows, &att));
    cairn_train_attend_backward_f32(att, LAYER, c.rows, &fin, bias, up, NULL, 1, grad, grad + q, grad + 2 * q, dbias);
    expect_below("q, k, v", worst_against(grad, c.grad, c.n_in), 2e-5);
    expect_below("bias", worst_against(dbias, c.dbias, 3), 2e-5);
    cairn_train_attention_free_f32(att);
    free(in), free(bias), free(up), free(grad);
    layer_wipe(&c);
}

static void what_cannot_be_trained_is_refused_and_failing_allocations_leave_nothing(void **state)
{
    (void)state;
    layer_case c;
    cairn_train_attention_f32 *att;
    layer_init(&c, &layers[3], 70);
    assert_int_equal(cairn_train_attention_new_f32(&c.shape, 0, &att), CAIRN_INVALID);
    c.shape.scheme = CAIRN_POSITION_STINGY;
    assert_int_equal(cairn_train_attention_new_f32(&c.shape, 16, &att), CAIRN_UNSUPPORTED);
    assert_null(att);
    c.shape.scheme = CAIRN_POSITION_CLAMPED;
    c.shape.heads = 3;
    c.shape.kv_heads = 2;
    assert_int_equal(cairn_train_attention_new_f32(&c.shape, 16, &att), CAIRN_INVALID);
    c.shape.heads = c.shape.kv_heads = 1;
    cairn_status st = CAIRN_NO_MEMORY;
    for (uint64_t n = 1; st != CAIRN_OK; n++) {
        assert_true(n < 50);
        cairn_alloc_fail_at(n);
        st = cairn_train_attention_new_f32(&c.shape, 16, &att);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
    }
    cairn_train_attention_free_f32(att);
    float scores[4] = {0}, weights[4], dbias;
    const uint8_t is_landmark[2] = {0, 0};
    for (uint64_t n = 1; n <= 3; n++) {
        cairn_alloc_fail_at(n);
        assert_int_equal(cairn_train_grouped_softmax_f32(scores, is_landmark, 2, 0, weights), CAIRN_NO_MEMORY);
        cairn_alloc_fail_at(n);
        assert_int_equal(cairn_train_grouped_softmax_backward_f32(scores, is_landmark, 2, 0, scores, weights, &dbias),
                         CAIRN_NO_MEMORY);
    }
    cairn_alloc_fail_at(0);
    layer_wipe(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_equal_the_reference_loops),
        cmocka_unit_test(gradients_equal_central_differences),
        cmocka_unit_test(gradients_of_each_softmax_sum_to_zero),
        cmocka_unit_test(scores_of_a_thousand_give_finite_weights_and_gradients),
        cmocka_unit_test(gradients_equal_the_authors_code),
        cmocka_unit_test(attention_equals_the_reference_loops),
        cmocka_unit_test(attention_gradients_equal_central_differences),
        cmocka_unit_test(a_landmarks_value_gets_no_gradient_and_its_key_does),
        cmocka_unit_test(float_gradients_follow_double_ones),
        cmocka_unit_test(what_cannot_be_trained_is_refused_and_failing_allocations_leave_nothing),
    };
    return cmocka_run_group_tests_name("train_attention", tests, NULL, NULL);
}
