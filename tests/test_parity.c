/* test_parity.c - an ordinary Llama through a DENSE session predicts what llama.cpp predicts.
 *
 * data/parity holds three small models of random weights (grouped-query F16, multi-head Q8_0, qwen3 F16) and, for 256
 * prefixes each (of the first one also with rope factors), the eight most probable next tokens by llama.cpp: full
 * attention on a CPU, K/V rounded to f16. */
#include "rope_factors.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct parity { /* one model, its vectors, and our probabilities */
    cairn_model *model;
    json_t *root;
    cairn_token *tokens;
    size_t n;
    size_t vocab;
    float *p; /* (n, vocab) */
} parity;

static void parity_open(parity *fx, const char *model, const char *json)
{
    cairn_model_info info;
    json_error_t error;
    assert_ok(cairn_model_open(model, &fx->model));
    cairn_model_info_get(fx->model, &info);
    fx->vocab = info.vocab;
    fx->root = json_load_file(json, 0, &error);
    if (fx->root == NULL) fail_msg("%s:%d: %s", json, error.line, error.text);
    json_t *tokens = json_object_get(fx->root, "tokens");
    fx->n = json_array_size(tokens);
    assert_int_equal(fx->n, 256);
    fx->tokens = calloc(fx->n, sizeof *fx->tokens);
    fx->p = calloc(fx->n * fx->vocab, sizeof *fx->p);
    assert_true(fx->tokens != NULL && fx->p != NULL);
    for (size_t i = 0; i < fx->n; i++) fx->tokens[i] = (cairn_token)json_integer_value(json_array_get(tokens, i));
}

static void parity_close(parity *fx)
{
    cairn_model_close(fx->model);
    json_decref(fx->root);
    free(fx->tokens);
    free(fx->p);
}

/* Feeds tokens `step` at a time and turns the logits after each of them into probabilities. */
static void predict(parity *fx, cairn_dtype dtype, size_t step)
{
    cairn_session_options opt;
    cairn_session *session;
    cairn_runtime *rt;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
    opt.dtype = dtype;
    assert_ok(cairn_session_begin(NULL, cairn_model_shape(fx->model), NULL, 0, &opt, &session));
    assert_ok(cairn_runtime_begin(fx->model, session, 2, &rt));
    for (size_t at = 0; at < fx->n; at += step) {
        size_t n = fx->n - at < step ? fx->n - at : step;
        assert_ok(cairn_runtime_feed_all(rt, fx->tokens + at, n, fx->p + at * fx->vocab));
    }
    cairn_runtime_end(rt);
    cairn_session_end(session);
    for (size_t i = 0; i < fx->n; i++) {
        float *row = fx->p + i * fx->vocab;
        double largest = -INFINITY;
        double sum = 0;
        for (size_t t = 0; t < fx->vocab; t++) largest = fmax(largest, (double)row[t]);
        for (size_t t = 0; t < fx->vocab; t++) sum += exp((double)row[t] - largest);
        for (size_t t = 0; t < fx->vocab; t++) row[t] = (float)(exp((double)row[t] - largest) / sum);
    }
}

static void compare(const parity *fx, const char *name, double tolerance)
{
    double worst = 0;
    size_t decided = 0;
    json_t *positions = json_object_get(fx->root, "positions");
    assert_int_equal(json_array_size(positions), fx->n);
    for (size_t i = 0; i < fx->n; i++) {
        const float *row = fx->p + i * fx->vocab;
        json_t *top = json_object_get(json_array_get(positions, i), "top");
        json_t *prob = json_object_get(json_array_get(positions, i), "prob");
        assert_int_equal(json_array_size(top), 8);
        for (size_t k = 0; k < 8; k++) {
            size_t token = (size_t)json_integer_value(json_array_get(top, k));
            double theirs = json_real_value(json_array_get(prob, k));
            double off = fabs(theirs - (double)row[token]);
            if (!(off <= tolerance))
                fail_msg("%s: after token %zu, token %zu has %g, llama.cpp says %g", name, i, token, (double)row[token],
                         theirs);
            worst = fmax(worst, off);
        }
        double lead = json_real_value(json_array_get(prob, 0)) - json_real_value(json_array_get(prob, 1));
        size_t best = 0;
        for (size_t t = 1; t < fx->vocab; t++)
            if (row[t] > row[best]) best = t;
        if (lead <= 0.02) continue;
        assert_int_equal(best, json_integer_value(json_array_get(top, 0)));
        decided++;
    }
    assert_true(decided > fx->n / 4); /* else this compares nothing */
    print_message("%s: largest difference of a probability %.5f; %zu clear winners agree\n", name, worst, decided);
}

static void check(parity *fx, const char *name, double tolerance)
{
    predict(fx, CAIRN_F16, 256);
    compare(fx, name, tolerance);
    predict(fx, CAIRN_F16, 1); /* token by token: the other arithmetic */
    compare(fx, name, tolerance);
    parity_close(fx);
}

static void check_file(const char *name, double tolerance)
{
    char *model, *json;
    parity fx;
    assert_true(asprintf(&model, "%s/parity/%s.gguf", CAIRN_TEST_DATA, name) > 0);
    assert_true(asprintf(&json, "%s/parity/%s.llamacpp.json", CAIRN_TEST_DATA, name) > 0);
    parity_open(&fx, model, json);
    check(&fx, name, tolerance);
    free(model), free(json);
}

static void grouped_query_f16_predicts_as_llama_cpp(void **state)
{
    (void)state;
    check_file("gqa-f16", 0.01);
}
static void qwen3_f16_predicts_as_llama_cpp(void **state)
{
    (void)state;
    check_file("qwen3-f16", 0.01);
}
static void multi_head_q8_0_predicts_as_llama_cpp(void **state)
{
    (void)state;
    check_file("mha-q8_0", 0.08); /* llama.cpp rounds activations to 8 bits there, we do not */
}

static void rope_factors_predict_as_llama_cpp(void **state)
{
    (void)state;
    char *dir = test_make_dir(), *path = test_path(dir, "factors.gguf");
    parity fx;
    add_rope_factors(CAIRN_TEST_DATA "/parity/gqa-f16.gguf", path);
    parity_open(&fx, path, CAIRN_TEST_DATA "/parity/gqa-f16-factors.llamacpp.json");
    check(&fx, "gqa-f16 with rope factors", 0.01);
    free(path);
    test_remove_dir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grouped_query_f16_predicts_as_llama_cpp),
        cmocka_unit_test(qwen3_f16_predicts_as_llama_cpp),
        cmocka_unit_test(multi_head_q8_0_predicts_as_llama_cpp),
        cmocka_unit_test(rope_factors_predict_as_llama_cpp),
    };
    return cmocka_run_group_tests_name("parity", tests, NULL, NULL);
}
