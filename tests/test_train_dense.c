/* test_train_dense.c - training without landmarks: a window's causal attention, and Transformer-XL's segments.
 *
 * Witnesses: plain loops over complex rotations, in which Transformer-XL's memory is an array of its own that central
 * differences do not touch; a session with dense positions on the model written out.
 */
#include "train_support.h"

#include <cairn/model.h>
#include <train_internal.h>

#include <complex.h>

enum { HEADS = 4, KV = 2, D = 6, F = (HEADS + 2 * KV) * D, ROWS_MAX = 150 };

typedef struct bench {
    size_t rows, segment;
    bool interleaved;
    double *in, *memory; /* (rows, F); memory: what a segment sees of the one before, equal but another array */
    double *up;          /* (rows, HEADS, D) */
    cairn_attention_shape shape;
    cairn_train_dense_f64 *dense;
} bench;

static void bench_init(bench *b, size_t rows, size_t segment, bool interleaved)
{
    test_random r = {rows + segment};
    *b = (bench){.rows = rows, .segment = segment, .interleaved = interleaved};
    b->in = random_doubles(&r, rows * F, 1);
    b->memory = random_doubles(&r, rows * F, 1);
    memcpy(b->memory, b->in, rows * F * sizeof *b->in);
    b->up = random_doubles(&r, rows * HEADS * D, 1);
    cairn_attention_shape_init(&b->shape, sizeof b->shape);
    b->shape.scheme = CAIRN_POSITION_DENSE;
    b->shape.layers = 1;
    b->shape.heads = HEADS;
    b->shape.kv_heads = KV;
    b->shape.head_dim = D;
    b->shape.rope_interleaved = interleaved;
    assert_ok(cairn_train_dense_new_f64(&b->shape, segment, ROWS_MAX, &b->dense));
}
static void bench_wipe(bench *b)
{
    cairn_train_dense_free_f64(b->dense);
    free(b->in), free(b->memory), free(b->up);
}

static cairn_train_qkv_f64 qkv_of(const double *in)
{
    return (cairn_train_qkv_f64){in, in + (size_t)HEADS * D, in + (size_t)(HEADS + KV) * D, F};
}

static double score(const bench *b, const double *q, const double *k, size_t distance)
{
    double sum = 0;
    for (size_t i = 0; i < D / 2; i++) {
        const size_t one = b->interleaved ? 2 * i : i, two = b->interleaved ? one + 1 : i + D / 2;
        const double complex turn = cexp(I * (double)distance * pow(10000, -2.0 * (double)i / D));
        sum += creal((q[one] + q[two] * I) * turn * conj(k[one] + k[two] * I));
    }
    return sum / sqrt(D);
}

/* out (D) of one row and head: keys and values of its own segment from `in`, of the one before from `memory`. */
static void attend_row(const bench *b, size_t h, size_t row, double *out)
{
    const size_t segment = b->segment == 0 ? b->rows : b->segment, own = row / segment * segment;
    const size_t k = (HEADS + h / (HEADS / KV)) * D, v = k + (size_t)KV * D;
    double weights[ROWS_MAX], all = 0;
    for (size_t t = own < segment ? 0 : own - segment; t <= row; t++) {
        const double *from = (t >= own ? b->in : b->memory) + t * F;
        all += weights[t] = exp(score(b, b->in + row * F + h * D, from + k, row - t));
    }
    memset(out, 0, D * sizeof *out);
    for (size_t t = own < segment ? 0 : own - segment; t <= row; t++)
        for (size_t i = 0; i < D; i++) out[i] += weights[t] / all * ((t >= own ? b->in : b->memory) + t * F)[v + i];
}

#ifdef __SANITIZE_ADDRESS__ /* whose build shows what memory is touched; the plain one, that numbers agree */
enum { ROWS_APART = ROWS_MAX };
#else
enum { ROWS_APART = 66 };
#endif

static double loss(void *arg)
{
    const bench *b = arg;
    double sum = 0, out[D];
    for (size_t row = 0; row < b->rows; row++) {
        for (size_t h = 0; h < HEADS; h++) {
            attend_row(b, h, row, out);
            for (size_t i = 0; i < D; i++) sum += b->up[(row * HEADS + h) * D + i] * out[i];
        }
    }
    return sum;
}

static void attention_and_its_gradient_equal_the_definition(void **state)
{
    (void)state;
    const struct {
        const char *name;
        size_t rows, segment;
        bool interleaved;
    } cases[] = {{"dense", 23, 0, false},
                 {"dense, neighbours turn", 9, 0, true},
                 {"one row", 1, 0, false},
                 {"more rows than a strip", 70, 0, false},
                 {"segments of 6", 20, 6, false},
                 {"segments of 6, neighbours turn", 18, 6, true},
                 {"segments of one row", 5, 1, false},
                 {"a segment longer than a strip", 140, 68, false}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        bench b;
        bench_init(&b, cases[c].rows, cases[c].segment, cases[c].interleaved);
        print_message(" %s\n", cases[c].name);
        double *out = calloc(b.rows * HEADS * D, sizeof *out), *want = calloc(b.rows * HEADS * D, sizeof *want);
        double *grad = calloc(b.rows * F, sizeof *grad);
        const cairn_train_qkv_f64 in = qkv_of(b.in);
        cairn_train_dense_attend_f64(b.dense, b.rows, &in, out);
        double worst = 0;
        for (size_t row = 0; row < b.rows; row++)
            for (size_t h = 0; h < HEADS; h++) attend_row(&b, h, row, want + (row * HEADS + h) * D);
        for (size_t i = 0; i < b.rows * HEADS * D; i++) worst = fmax(worst, fabs(out[i] - want[i]));
        expect_below("attention", worst, 1e-12);
        cairn_train_dense_backward_f64(b.dense, b.rows, &in, b.up, grad, grad + (size_t)HEADS * D,
                                       grad + (size_t)(HEADS + KV) * D);
        if (b.rows < 50) /* differences of all of 140 rows take long; one row of each strip shows that they agree */
            expect_below("gradient", worst_against_differences(grad, b.in, b.rows * F, loss, &b), 1e-5);
        else
            for (size_t row = 1; row < b.rows; row += ROWS_APART)
                expect_below("gradient of a row",
                             worst_against_differences(grad + row * F, b.in + row * F, F, loss, &b), 1e-5);
        free(out), free(want), free(grad);
        bench_wipe(&b);
    }
}

static void float_follows_double(void **state)
{
    (void)state;
    bench b;
    bench_init(&b, 140, 50, false);
    cairn_train_dense_f32 *dense = NULL;
    assert_ok(cairn_train_dense_new_f32(&b.shape, 50, ROWS_MAX, &dense));
    float *in = as_floats(b.in, b.rows * F), *up = as_floats(b.up, b.rows * HEADS * D);
    float *out = calloc(b.rows * HEADS * D, sizeof *out), *grad = calloc(b.rows * F, sizeof *grad);
    double *want = calloc(b.rows * HEADS * D, sizeof *want), *want_grad = calloc(b.rows * F, sizeof *want_grad);
    const cairn_train_qkv_f64 wide = qkv_of(b.in);
    const cairn_train_qkv_f32 narrow = {in, in + (size_t)HEADS * D, in + (size_t)(HEADS + KV) * D, F};
    cairn_train_dense_attend_f64(b.dense, b.rows, &wide, want);
    cairn_train_dense_attend_f32(dense, b.rows, &narrow, out);
    expect_below("attention", worst_against(out, want, b.rows * HEADS * D), 1e-5);
    cairn_train_dense_backward_f64(b.dense, b.rows, &wide, b.up, want_grad, want_grad + (size_t)HEADS * D,
                                   want_grad + (size_t)(HEADS + KV) * D);
    cairn_train_dense_backward_f32(dense, b.rows, &narrow, up, grad, grad + (size_t)HEADS * D,
                                   grad + (size_t)(HEADS + KV) * D);
    expect_below("gradient", worst_against(grad, want_grad, b.rows * F), 1e-5);
    cairn_train_dense_free_f32(dense);
    free(in), free(up), free(out), free(grad), free(want), free(want_grad);
    bench_wipe(&b);
}

/* ---- the model ---- */

static cairn_train_shape model_shape(cairn_train_attention mode, uint32_t segment)
{
    cairn_train_shape s = {.mode = mode,
                           .segment = segment,
                           .vocab = CAIRN_TRAIN_BYTE_VOCAB,
                           .width = 24,
                           .hidden = 20,
                           .norm_eps = 1e-5F,
                           .qk_norm = true};
    cairn_attention_shape_init(&s.attention, sizeof s.attention);
    s.attention.scheme = CAIRN_POSITION_DENSE;
    s.attention.layers = 2;
    s.attention.heads = 2;
    s.attention.kv_heads = 1;
    s.attention.head_dim = 8;
    return s;
}

typedef struct learner {
    cairn_train_layout *layout;
    cairn_train_model_f64 *model;
    double *params, *grads;
    float *params_f32;
    cairn_token slots[40], targets[40];
    cairn_train_window window;
} learner;

static void learner_init(learner *l, const cairn_train_shape *shape)
{
    test_random r = {5};
    *l = (learner){0};
    assert_ok(cairn_train_layout_new(shape, &l->layout));
    assert_ok(cairn_train_model_new_f64(l->layout, 40, &l->model));
    l->params_f32 = calloc(l->layout->total, sizeof *l->params_f32);
    l->params = calloc(l->layout->total, sizeof *l->params);
    l->grads = calloc(l->layout->total, sizeof *l->grads);
    cairn_train_init(l->layout, 3, l->params_f32);
    for (size_t i = 0; i < l->layout->total; i++) l->params[i] = (double)l->params_f32[i];
    for (size_t i = 0; i < 40; i++) l->slots[i] = (cairn_token)test_random_below(&r, 30);
    cairn_train_targets(l->slots, 40, 0, l->targets);
    l->window = (cairn_train_window){l->slots, l->targets, NULL, 40, NULL};
}
static void learner_wipe(learner *l)
{
    cairn_train_model_free_f64(l->model);
    cairn_train_layout_free(l->layout);
    free(l->params), free(l->grads), free(l->params_f32);
}
static double learner_loss(void *arg)
{
    learner *l = arg;
    cairn_train_forward_f64(l->model, l->params, l->slots, 40);
    return cairn_train_loss_f64(l->model, &l->window, 1, NULL, NULL);
}

static void a_segment_as_long_as_the_window_is_dense(void **state)
{
    (void)state;
    learner a, b;
    const cairn_train_shape dense = model_shape(CAIRN_TRAIN_DENSE, 0), one = model_shape(CAIRN_TRAIN_XL, 40);
    learner_init(&a, &dense);
    learner_init(&b, &one);
    assert_true(learner_loss(&a) == learner_loss(&b));
    cairn_train_backward_f64(a.model, a.params, &a.window, a.grads);
    cairn_train_backward_f64(b.model, b.params, &b.window, b.grads);
    assert_memory_equal(a.grads, b.grads, a.layout->total * sizeof *a.grads);
    learner_wipe(&b);
    const cairn_train_shape four = model_shape(CAIRN_TRAIN_XL, 10);
    learner_init(&b, &four);
    assert_true(learner_loss(&a) != learner_loss(&b));
    learner_wipe(&a), learner_wipe(&b);
}

/* What a model sees of a segment does not go further back than layers * segment rows. */
static void segments_far_back_change_nothing(void **state)
{
    (void)state;
    learner l;
    const cairn_train_shape shape = model_shape(CAIRN_TRAIN_XL, 10); /* two layers */
    const size_t V = CAIRN_TRAIN_BYTE_VOCAB;
    learner_init(&l, &shape);
    double *before = malloc(40 * V * sizeof *before);
    memcpy(before, cairn_train_forward_f64(l.model, l.params, l.slots, 40), 40 * V * sizeof *before);
    l.slots[5] = (l.slots[5] + 1) % 30;
    const double *after = cairn_train_forward_f64(l.model, l.params, l.slots, 40);
    assert_memory_equal(before, after, 5 * V * sizeof *before);
    for (size_t r = 5; r < 20; r++) assert_memory_not_equal(before + r * V, after + r * V, V * sizeof *before);
    assert_memory_not_equal(before + 25 * V, after + 25 * V, V * sizeof *before); /* two steps of memory */
    assert_memory_equal(before + 30 * V, after + 30 * V, 10 * V * sizeof *before);
    free(before);
    learner_wipe(&l);
}

static void training_forward_equals_a_session_over_the_model_written_out(void **state)
{
    (void)state;
    learner l;
    const cairn_train_shape shape = model_shape(CAIRN_TRAIN_DENSE, 0);
    const size_t V = CAIRN_TRAIN_BYTE_VOCAB;
    char *dir = test_make_dir(), *path = test_path(dir, "dense.gguf");
    learner_init(&l, &shape);
    assert_ok(cairn_train_export(l.layout, l.params_f32, "dense", 512, CAIRN_GGUF_F32, path));
    cairn_model *model = NULL;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    cairn_session_options opt;
    assert_ok(cairn_model_open(path, &model));
    const cairn_attention_shape *read = cairn_model_shape(model);
    assert_int_equal(read->scheme, CAIRN_POSITION_DENSE);
    cairn_session_options_init(&opt, sizeof opt, read);
    opt.threads = 1;
    assert_ok(cairn_session_begin(NULL, read, NULL, 0, &opt, &session));
    assert_ok(cairn_runtime_begin(model, session, 0, &runtime));
    float *logits = malloc(40 * V * sizeof *logits);
    assert_ok(cairn_runtime_feed_all(runtime, l.slots, 40, logits));
    const double *trained = cairn_train_forward_f64(l.model, l.params, l.slots, 40);
    double worst = 0;
    for (size_t i = 0; i < 40 * V; i++) worst = fmax(worst, fabs((double)logits[i] - trained[i]));
    expect_below("logits", worst, 1e-3);
    cairn_train_shape again;
    cairn_train_layout *layout = NULL;
    assert_ok(cairn_train_shape_of(model, &again));
    assert_int_equal(again.mode, CAIRN_TRAIN_DENSE);
    assert_ok(cairn_train_layout_new(&again, &layout));
    float *params = calloc(layout->total, sizeof *params);
    assert_ok(cairn_train_import(layout, model, params));
    assert_memory_equal(params, l.params_f32, layout->total * sizeof *params);
    free(params), free(logits);
    cairn_train_layout_free(layout);
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    cairn_model_close(model);
    learner_wipe(&l);
    free(path);
    test_remove_dir(dir);
}

/* The model in a file says how it was trained: its score is the loss of a learner with that recurrence. */
static void a_file_is_scored_as_it_was_trained(void **state)
{
    (void)state;
    const cairn_train_shape shapes[] = {model_shape(CAIRN_TRAIN_DENSE, 0), model_shape(CAIRN_TRAIN_XL, 10)};
    char *dir = test_make_dir(), *path = test_path(dir, "model.gguf");
    for (int i = 0; i < 2; i++) {
        learner l;
        double nats[39], sum = 0;
        cairn_model *model = NULL;
        learner_init(&l, &shapes[i]);
        assert_ok(cairn_train_export(l.layout, l.params_f32, "scored", 512, CAIRN_GGUF_F32, path));
        assert_ok(cairn_model_open(path, &model));
        assert_ok(cairn_train_score(model, l.slots, 40, nats));
        for (int t = 0; t < 39; t++) sum += nats[t];
        expect_below("score", fabs(sum - learner_loss(&l)) / sum, 1e-6);
        l.slots[7] = CAIRN_TRAIN_BYTE_VOCAB;
        assert_int_equal(cairn_train_score(model, l.slots, 40, nats), CAIRN_INVALID);
        assert_non_null(strstr(cairn_last_error(), "token 7 is 260"));
        assert_int_equal(cairn_train_score(model, l.slots, 1, nats), CAIRN_INVALID);
        cairn_model_close(model);
        learner_wipe(&l);
    }
    cairn_model *landmarks = NULL;
    assert_ok(cairn_model_open(CAIRN_SOURCE_DIR "/models/cairn-tiny-f16.gguf", &landmarks));
    const cairn_token two[] = {1, 2};
    double nat;
    assert_int_equal(cairn_train_score(landmarks, two, 2, &nat), CAIRN_UNSUPPORTED);
    cairn_model_close(landmarks);
    free(path);
    test_remove_dir(dir);
}

static void failing_allocations_leave_nothing(void **state)
{
    (void)state;
    const cairn_train_shape shape = model_shape(CAIRN_TRAIN_XL, 8);
    cairn_train_layout *layout = NULL;
    assert_ok(cairn_train_layout_new(&shape, &layout));
    for (uint64_t n = 1;; n++) {
        cairn_train_model_f32 *model = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_train_model_new_f32(layout, 40, &model);
        cairn_alloc_fail_at(0);
        cairn_train_model_free_f32(model);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
    }
    cairn_train_layout_free(layout);
    const cairn_train_shape none = model_shape(CAIRN_TRAIN_XL, 0);
    assert_int_equal(cairn_train_layout_new(&none, &layout), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "segment"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_and_its_gradient_equal_the_definition),
        cmocka_unit_test(float_follows_double),
        cmocka_unit_test(a_segment_as_long_as_the_window_is_dense),
        cmocka_unit_test(segments_far_back_change_nothing),
        cmocka_unit_test(training_forward_equals_a_session_over_the_model_written_out),
        cmocka_unit_test(a_file_is_scored_as_it_was_trained),
        cmocka_unit_test(failing_allocations_leave_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
