/* test_train_model.c - the decoder's forward, loss and gradients over a training window.
 *
 * Witnesses: central differences in double, a session that retrieves everything, an independent PyTorch forward (golden
 * file), the definition of cross entropy.
 */
#include "train_bench.h"

#include <cairn/model.h>

#include <jansson.h>

static const model_spec small = {2, 2, 1, 4, 12, 10, 11, 3, 2, true, false, true};
static const model_spec bytes = {3, 4, 2, 16, 48, 80, CAIRN_TRAIN_BYTE_VOCAB, 7, 3, true, false, true};

/* ---- gradients ---- */

static void every_parameters_gradient_equals_central_differences(void **state)
{
    (void)state;
    const struct {
        const char *name;
        model_spec spec;
        size_t rows;
    } cases[] = {
        {"qwen3, beyond the clamp, the last block open", small, 22},
        {"llama, tied, all layers see all blocks", {2, 2, 2, 4, 8, 6, 9, 3, 1, false, true, false}, 16},
        {"one block", {1, 2, 1, 4, 8, 6, 9, 4, 3, true, false, false}, 5},
        {"one open block", {1, 2, 1, 4, 8, 6, 9, 4, 3, true, false, true}, 3},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        bench b;
        cairn_train_shape shape = shape_of(&cases[c].spec);
        bench_init(&b, &shape, cases[c].rows, 100 + c);
        bench_gradient(&b);
        print_message(" %s, %zu parameters\n", cases[c].name, b.total);
        for (size_t p = 0; p < b.layout->n_params; p++) {
            const cairn_train_param *param = &b.layout->params[p];
            expect_below(param->name,
                         worst_against_differences(b.grads + param->at, b.params + param->at,
                                                   (size_t)param->rows * param->cols, bench_loss, &b),
                         1e-5);
        }
        bench_wipe(&b);
    }
}

static void float_gradients_follow_double_ones(void **state)
{
    (void)state;
    bench b;
    model_spec spec = bytes;
    spec.block_tokens = 15;
    cairn_train_shape shape = shape_of(&spec);
    bench_init(&b, &shape, 150, 7);
    bench_gradient(&b);
    cairn_train_forward_f32(b.model_f32, b.params_f32, b.slots, b.rows);
    cairn_train_loss_f32(b.model_f32, &b.window, 1.0 / 7, NULL, NULL);
    cairn_train_backward_f32(b.model_f32, b.params_f32, &b.window, b.grads_f32);
    double worst = 0;
    for (size_t p = 0; p < b.layout->n_params; p++) {
        const cairn_train_param *param = &b.layout->params[p];
        double off = worst_against(b.grads_f32 + param->at, b.grads + param->at, (size_t)param->rows * param->cols);
        if (off > 1e-4) fail_msg("%s: %g of its largest entry", param->name, off);
        worst = fmax(worst, off);
    }
    expect_below("the worst parameter", worst, 1e-4);

    /* a second window adds: the same once more is twice as much, bit for bit */
    float *once = malloc(b.total * sizeof *once);
    assert_non_null(once);
    memcpy(once, b.grads_f32, b.total * sizeof *once);
    memset(b.grads_f32, 0, b.total * sizeof *once);
    for (int twice = 0; twice < 2; twice++) {
        cairn_train_forward_f32(b.model_f32, b.params_f32, b.slots, b.rows);
        cairn_train_loss_f32(b.model_f32, &b.window, 1.0 / 7, NULL, NULL);
        cairn_train_backward_f32(b.model_f32, b.params_f32, &b.window, b.grads_f32);
        if (twice == 0) assert_memory_equal(b.grads_f32, once, b.total * sizeof *once);
    }
    for (size_t i = 0; i < b.total; i++) b.grads[i] = 2 * (double)once[i];
    expect_below("twice", worst_against(b.grads_f32, b.grads, b.total), 1e-6);
    free(once);
    bench_wipe(&b);
}

/* ---- loss and targets ---- */

static void the_loss_is_the_weighted_cross_entropy_of_rows_with_a_target(void **state)
{
    (void)state;
    bench b;
    cairn_train_shape shape = shape_of(&small);
    bench_init(&b, &shape, 21, 3);
    const size_t V = shape.vocab;
    double want = 0, plain = 0, nll[21];
    uint8_t right[21];
    double *logits = malloc(b.rows * V * sizeof *logits);
    assert_non_null(logits);
    const double *out = cairn_train_forward_f64(b.model, b.params, b.slots, b.rows);
    memcpy(logits, out, b.rows * V * sizeof *logits);
    /* make one row right */
    b.targets[1] = 0;
    for (size_t i = 0; i < V; i++)
        if (logits[V + i] > logits[V + (size_t)b.targets[1]]) b.targets[1] = (cairn_token)i;
    double got = cairn_train_loss_f64(b.model, &b.window, 0.5, nll, right);
    for (size_t r = 0; r < b.rows; r++) {
        double sum = 0, row = 0;
        size_t best = 0;
        for (size_t i = 0; i < V; i++) {
            sum += exp(logits[r * V + i]);
            if (logits[r * V + i] > logits[r * V + best]) best = i;
        }
        if (b.targets[r] >= 0) row = log(sum) - logits[r * V + (size_t)b.targets[r]];
        want += (double)b.weights[r] * row;
        plain += row;
        assert_true(fabs(nll[r] - row) < 1e-12);
        assert_int_equal(right[r], b.targets[r] >= 0 && best == (size_t)b.targets[r]);
        for (size_t i = 0; i < V; i++) {
            double d = exp(logits[r * V + i]) / sum - (b.targets[r] == (cairn_token)i ? 1 : 0);
            assert_true(fabs(out[r * V + i] - (b.targets[r] < 0 ? 0 : 0.5 * (double)b.weights[r] * d)) < 1e-12);
        }
    }
    assert_true(right[1]);
    assert_true(fabs(got - want) < 1e-11);
    b.window.weights = NULL;
    cairn_train_forward_f64(b.model, b.params, b.slots, b.rows);
    assert_true(fabs(cairn_train_loss_f64(b.model, &b.window, 1, NULL, NULL) - plain) < 1e-11);
    free(logits);
    bench_wipe(&b);
}

/* [25] */
static void a_token_predicts_over_a_landmark_which_predicts_nothing(void **state)
{
    (void)state;
    const cairn_token slots[] = {10, 11, 12, 99, 13, 14, 15, 99, 16}, want[] = {11, 12, 13, -1, 14, 15, 16, -1, -1};
    const cairn_token cut[] = {11, 12, -1, -1};
    cairn_token targets[9];
    cairn_train_targets(slots, 9, 3, targets);
    assert_memory_equal(targets, want, sizeof want);
    cairn_train_targets(slots, 4, 3, targets);
    assert_memory_equal(targets, cut, sizeof cut);
    cairn_train_targets(slots, 9, 0, targets); /* without landmarks */
    assert_memory_equal(targets, slots + 1, 8 * sizeof *slots);
    assert_int_equal(targets[8], -1);
}

static void later_slots_change_no_earlier_logit(void **state)
{
    (void)state;
    bench b;
    cairn_train_shape shape = shape_of(&small);
    bench_init(&b, &shape, 22, 5);
    const size_t V = shape.vocab;
    double *before = malloc(b.rows * V * sizeof *before);
    assert_non_null(before);
    memcpy(before, cairn_train_forward_f64(b.model, b.params, b.slots, b.rows), b.rows * V * sizeof *before);
    b.slots[9] = (b.slots[9] + 1) % 10;
    const double *after = cairn_train_forward_f64(b.model, b.params, b.slots, b.rows);
    assert_memory_equal(before, after, 9 * V * sizeof *before);
    for (size_t r = 9; r < b.rows; r++) assert_true(memcmp(before + r * V, after + r * V, V * sizeof *before) != 0);
    free(before);
    bench_wipe(&b);
}

/* ---- the other forwards ---- */

static double furthest(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    return worst;
}

static void session_logits(const cairn_model *model, const cairn_token *slots, size_t n, float *logits)
{
    cairn_session_options opt;
    cairn_session *session;
    cairn_runtime *rt;
    const cairn_attention_shape *shape = cairn_model_shape(model);
    cairn_session_options_init(&opt, sizeof opt, shape);
    opt.policy.top_k = CAIRN_TOP_K_ALL;
    opt.dtype = CAIRN_F32;
    opt.threads = 1;
    assert_ok(cairn_session_begin(NULL, shape, NULL, 0, &opt, &session));
    assert_ok(cairn_runtime_begin(model, session, 2, &rt));
    assert_ok(cairn_runtime_feed_slots(rt, slots, n, logits));
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

static void training_forward_equals_a_session_that_sees_all_blocks(void **state)
{
    (void)state;
    const model_spec llama = {2, 2, 2, 16, 32, 48, CAIRN_TRAIN_BYTE_VOCAB, 5, 2, false, true, false};
    const model_spec *specs[] = {&bytes, &llama};
    char *dir = test_make_dir(), *path = test_path(dir, "model.gguf");
    for (size_t s = 0; s < 2; s++) {
        bench b;
        cairn_model *model;
        cairn_model_info info;
        cairn_train_shape shape = shape_of(specs[s]);
        bench_init(&b, &shape, 131, 20 + s);
        assert_ok(cairn_train_export(b.layout, b.params_f32, "trained", 256, CAIRN_GGUF_F32, path));
        assert_ok(cairn_model_open(path, &model));
        cairn_model_info_get(model, &info);
        assert_string_equal(info.name, "trained");
        assert_string_equal(info.architecture, specs[s]->qwen3 ? "qwen3" : "llama");
        assert_int_equal(info.train_window, 256);
        assert_int_equal(info.landmark, CAIRN_TRAIN_BYTE_VOCAB - 1);
        float *logits = calloc(b.rows * shape.vocab, sizeof *logits);
        assert_non_null(logits);
        session_logits(model, b.slots, b.rows, logits);
        const float *trained = cairn_train_forward_f32(b.model_f32, b.params_f32, b.slots, b.rows);
        expect_below(info.architecture, furthest(logits, trained, b.rows * shape.vocab), 1e-4);

        /* and what was written is what is read */
        cairn_train_shape read;
        cairn_train_layout *layout;
        assert_ok(cairn_train_shape_of(model, &read));
        assert_ok(cairn_train_layout_new(&read, &layout));
        assert_int_equal(layout->total, b.total);
        memset(b.grads_f32, 0, b.total * sizeof(float));
        assert_ok(cairn_train_import(layout, model, b.grads_f32));
        assert_memory_equal(b.grads_f32, b.params_f32, b.total * sizeof(float));
        cairn_train_layout_free(layout);
        cairn_model_close(model);
        free(logits);
        bench_wipe(&b);
    }
    free(path);
    test_remove_dir(dir);
}

static void training_forward_equals_an_independent_one(void **state)
{
    (void)state;
    json_error_t error;
    json_t *root = json_load_file(CAIRN_TEST_DATA "/golden/clamped_forward.json", 0, &error), *run, *value;
    if (root == NULL) fail_msg("%s:%d: %s", error.source, error.line, error.text);
    cairn_model *model;
    cairn_train_shape shape;
    bench b;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    assert_ok(cairn_train_shape_of(model, &shape));
    const json_t *tokens = json_object_get(root, "tokens"), *positions = json_object_get(root, "positions");
    bench_init(&b, &shape, json_array_size(tokens), 1);
    assert_ok(cairn_train_import(b.layout, model, b.params_f32));
    for (size_t i = 0; i < b.rows; i++) b.slots[i] = (cairn_token)json_integer_value(json_array_get(tokens, i));
    const float *logits = cairn_train_forward_f32(b.model_f32, b.params_f32, b.slots, b.rows);
    run = json_array_get(json_object_get(root, "runs"), 0);
    assert_string_equal(json_string_value(json_object_get(run, "k")), "all");
    const json_t *want = json_object_get(run, "logits");
    double worst = 0;
    assert_true(json_array_size(positions) > 0 && json_array_size(want) == json_array_size(positions));
    for (size_t p = 0; p < json_array_size(positions); p++) {
        size_t row = (size_t)json_integer_value(json_array_get(positions, p)), i;
        assert_int_equal(json_array_size(json_array_get(want, p)), shape.vocab);
        json_array_foreach(json_array_get(want, p), i, value) worst =
            fmax(worst, fabs((double)logits[row * shape.vocab + i] - json_number_value(value)));
    }
    expect_below("logits", worst, 2e-3);
    cairn_model_close(model);
    bench_wipe(&b);
    json_decref(root);
}

/* ---- what cannot be ---- */

static void shapes_that_cannot_be_trained_are_refused_by_the_field(void **state)
{
    (void)state;
    cairn_train_layout *layout;
    const cairn_train_shape good = shape_of(&small);
    cairn_train_shape s = good;
#define refused(change, status, words)                                                                                 \
    s = good;                                                                                                          \
    s.change;                                                                                                          \
    assert_int_equal(cairn_train_layout_new(&s, &layout), status);                                                     \
    assert_null(layout);                                                                                               \
    assert_non_null(strstr(cairn_last_error(), words))
    refused(vocab = 0, CAIRN_INVALID, "vocab is 0");
    refused(width = UINT32_MAX, CAIRN_INVALID, "width is 4294967295");
    refused(hidden = 0, CAIRN_INVALID, "hidden is 0");
    refused(norm_eps = NAN, CAIRN_INVALID, "norm_eps is");
    refused(attention.head_dim = 3, CAIRN_INVALID, "head_dim is 3");
    refused(attention.scheme = CAIRN_POSITION_DENSE, CAIRN_UNSUPPORTED, "clamped alone");
#undef refused

    bench b;
    bench_init(&b, &good, 8, 1);
    assert_int_equal(cairn_train_export(b.layout, b.params_f32, "x", 8, CAIRN_GGUF_F32, "/nowhere/x.gguf"),
                     CAIRN_UNSUPPORTED);
    assert_non_null(strstr(cairn_last_error(), "11 tokens"));
    cairn_model *model;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    assert_int_equal(cairn_train_import(b.layout, model, b.params_f32), CAIRN_MISMATCH);
    cairn_model_close(model);
    bench_wipe(&b);
    model_spec odd = bytes;
    odd.qwen3 = false;
    s = shape_of(&odd);
    s.attention.rope_interleaved = false;
    bench_init(&b, &s, 8, 1);
    assert_int_equal(cairn_train_export(b.layout, b.params_f32, "x", 8, CAIRN_GGUF_F32, "/nowhere/x.gguf"),
                     CAIRN_UNSUPPORTED);
    bench_wipe(&b);
}

static void failing_allocations_leave_nothing(void **state)
{
    (void)state;
    cairn_train_layout *layout = NULL;
    cairn_train_model_f32 *model = NULL;
    const cairn_train_shape shape = shape_of(&small);
    cairn_status st = CAIRN_NO_MEMORY;
    for (uint64_t n = 1; st != CAIRN_OK; n++) {
        assert_true(n < 20);
        cairn_alloc_fail_at(n);
        st = cairn_train_layout_new(&shape, &layout);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
    }
    st = CAIRN_NO_MEMORY;
    for (uint64_t n = 1; st != CAIRN_OK; n++) {
        assert_true(n < 100);
        cairn_alloc_fail_at(n);
        st = cairn_train_model_new_f32(layout, 16, &model);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
    }
    cairn_train_model_free_f32(model);
    cairn_train_layout_free(layout);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_parameters_gradient_equals_central_differences),
        cmocka_unit_test(float_gradients_follow_double_ones),
        cmocka_unit_test(the_loss_is_the_weighted_cross_entropy_of_rows_with_a_target),
        cmocka_unit_test(a_token_predicts_over_a_landmark_which_predicts_nothing),
        cmocka_unit_test(later_slots_change_no_earlier_logit),
        cmocka_unit_test(training_forward_equals_a_session_that_sees_all_blocks),
        cmocka_unit_test(training_forward_equals_an_independent_one),
        cmocka_unit_test(shapes_that_cannot_be_trained_are_refused_by_the_field),
        cmocka_unit_test(failing_allocations_leave_nothing),
    };
    return cmocka_run_group_tests_name("train_model", tests, NULL, NULL);
}
