/* adapt_support.h - a model adapted and written, and how to hold it against its source. */
#ifndef CAIRN_TESTS_ADAPT_SUPPORT_H
#define CAIRN_TESTS_ADAPT_SUPPORT_H

#include "tiny_vocab.h"

#include <model_internal.h>
#include <train_internal.h>

typedef struct fixture {
    char *dir, *source, *written; /* two files in it */
} fixture;

static inline int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->dir = test_make_dir();
    fx->source = test_path(fx->dir, "source.gguf");
    fx->written = test_path(fx->dir, "written.gguf");
    *state = fx;
    return 0;
}
static inline int teardown(void **state)
{
    fixture *fx = *state;
    free(fx->source), free(fx->written);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

/* ---- a model, adapted and written ---- */

typedef struct adapted {
    cairn_model *source, *model; /* before, after */
    cairn_train_layout *layout;
    float *params;
} adapted;

static inline cairn_train_landmarks blocks_of(uint32_t tokens)
{
    cairn_train_landmarks l;
    cairn_train_landmarks_init(&l);
    l.block_tokens = tokens;
    return l;
}

static inline void adapt(const fixture *fx, const char *path, uint32_t block_tokens, cairn_gguf_type type, adapted *a)
{
    cairn_train_landmarks landmarks = blocks_of(block_tokens);
    assert_ok(cairn_model_open(path, &a->source));
    assert_ok(cairn_train_adapt_layout(a->source, &landmarks, &a->layout));
    a->params = malloc(a->layout->total * sizeof *a->params);
    assert_non_null(a->params);
    for (size_t i = 0; i < a->layout->total; i++) a->params[i] = NAN; /* what is not written shows */
    assert_ok(cairn_train_adapt(a->layout, a->source, a->params));
    for (size_t i = 0; i < a->layout->total; i++) assert_true(isfinite(a->params[i]));
    assert_ok(cairn_train_export_like(a->layout, a->params, a->source, 777, type, fx->written));
    assert_ok(cairn_model_open(fx->written, &a->model));
}
static inline void adapted_wipe(adapted *a)
{
    cairn_model_close(a->source);
    cairn_model_close(a->model);
    cairn_train_layout_free(a->layout);
    free(a->params);
}

/* Logits (n, vocab) after each of the tokens. */
static inline float *logits_of(const cairn_model *model, cairn_dtype dtype, const cairn_token *tokens, size_t n)
{
    cairn_session_options opt;
    cairn_session *session;
    cairn_runtime *rt;
    cairn_model_info info;
    cairn_model_info_get(model, &info);
    float *logits = calloc(n * info.vocab, sizeof *logits);
    assert_non_null(logits);
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(model));
    opt.dtype = dtype;
    opt.threads = 1;
    assert_ok(cairn_session_begin(NULL, cairn_model_shape(model), NULL, 0, &opt, &session));
    assert_ok(cairn_runtime_begin(model, session, 2, &rt));
    assert_ok(cairn_runtime_feed_all(rt, tokens, n, logits));
    cairn_runtime_end(rt);
    cairn_session_end(session);
    return logits;
}

/* Old tokens' logits of the two models within one block. */
static inline double furthest_logit(const adapted *a, size_t n, uint64_t seed)
{
    test_random r = {seed};
    cairn_token tokens[64];
    double worst = 0;
    const uint32_t old = a->source->info.vocab, all = a->model->info.vocab;
    assert_true(n <= 64 && n <= a->layout->shape.attention.block_tokens);
    for (size_t i = 0; i < n; i++) tokens[i] = (cairn_token)test_random_below(&r, old - 1); /* the last may be it */
    float *before = logits_of(a->source, CAIRN_F32, tokens, n), *after = logits_of(a->model, CAIRN_F32, tokens, n);
    for (size_t i = 0; i < n; i++)
        for (uint32_t t = 0; t < old; t++)
            if ((cairn_token)t != a->model->info.landmark)
                worst = fmax(worst, fabs((double)before[i * old + t] - (double)after[i * all + t]));
    free(before), free(after);
    return worst;
}

/* ---- weights ---- */

static inline float *weights_of(const gguf *file, const char *name, size_t *n)
{
    const gguf_tensor *t = gguf_find_tensor(file, name);
    assert_non_null(t);
    cairn_wtype type = t->type == CAIRN_GGUF_F32    ? CAIRN_W_F32
                       : t->type == CAIRN_GGUF_F16  ? CAIRN_W_F16
                       : t->type == CAIRN_GGUF_BF16 ? CAIRN_W_BF16
                                                    : CAIRN_W_Q8_0;
    *n = t->dims[0] * t->dims[1];
    float *x = malloc(*n * sizeof *x);
    assert_non_null(x);
    cairn_kernels_ref.dequant(x, t->data, type, (uint32_t)t->dims[0], 0, (uint32_t)t->dims[1]);
    return x;
}

/* All parameters are the source's, the landmark's row is the mean of all others, and a bias is ln C. */
static inline void check_params(const adapted *a)
{
    const size_t landmark = (size_t)a->model->info.landmark;
    for (size_t p = 0; p < a->layout->n_params; p++) {
        const cairn_train_param *param = &a->layout->params[p];
        const float *x = a->params + param->at;
        size_t n, cols = param->cols;
        if (param->kind == CAIRN_TRAIN_LANDMARK_BIAS) {
            for (size_t i = 0; i < cols; i++)
                assert_true(fabs((double)x[i] - log(a->layout->shape.attention.block_tokens)) < 1e-6);
            continue;
        }
        float *old = weights_of(&a->source->file, param->name, &n);
        bool rows = param->kind == CAIRN_TRAIN_EMBEDDING || param->kind == CAIRN_TRAIN_HEAD;
        if (rows) {
            assert_int_equal(param->rows, a->layout->shape.vocab);
            for (size_t c = 0; c < cols; c++) {
                double sum = 0;
                size_t others = 0;
                for (size_t r = 0; r < n / cols; r++)
                    if (r != landmark) sum += (double)old[r * cols + c], others++;
                assert_int_equal(others, param->rows - 1);
                assert_true(fabs((double)x[landmark * cols + c] - sum / (double)others) < 1e-7);
            }
        } else {
            assert_int_equal(n, (size_t)param->rows * cols);
        }
        for (size_t i = 0; i < n; i++)
            if (!(rows && i / cols == landmark)) assert_true(memcmp(&x[i], &old[i], sizeof *x) == 0);
        free(old);
    }
}

/* ---- metadata ---- */

static inline bool starts(gguf_text text, const char *prefix)
{
    return text.bytes >= strlen(prefix) && memcmp(text.data, prefix, strlen(prefix)) == 0;
}

static inline const gguf_value *same_key(const gguf *file, gguf_text key)
{
    for (size_t i = 0; i < file->n_values; i++)
        if (file->values[i].key.bytes == key.bytes && memcmp(file->values[i].key.data, key.data, key.bytes) == 0)
            return &file->values[i];
    fail_msg("key '%s' was lost", gguf_show(key).text);
    return NULL;
}

/* Every key of `before` is in `after`, in the same order and byte for byte. Those in `longer` have one element more,
 * those in `other` another value. */
static inline void check_metadata(const gguf *before, const gguf *after, const char *const *longer,
                                  const char *const *other)
{
    for (size_t i = 0; i < before->n_values; i++) {
        const gguf_value *x = &before->values[i], *y;
        bool grows = false, differs = false;
        if (starts(x->key, "cairn.landmark.")) continue;
        y = same_key(after, x->key);
        for (size_t k = 0; longer[k] != NULL; k++) grows |= gguf_text_is(x->key, longer[k]);
        for (size_t k = 0; other[k] != NULL; k++) differs |= gguf_text_is(x->key, other[k]);
        for (size_t j = 0; j < before->n_values; j++) {
            const gguf_value *z = &before->values[j];
            if (starts(z->key, "cairn.landmark.")) continue;
            assert_int_equal(z->data < x->data, same_key(after, z->key)->data < y->data);
        }
        assert_int_equal(x->type, y->type);
        assert_int_equal(x->array, y->array);
        assert_int_equal(x->count + grows, y->count);
        assert_true(grows ? y->bytes > x->bytes : y->bytes == x->bytes);
        if ((memcmp(x->data, y->data, x->bytes) != 0) != differs)
            fail_msg("the value of '%s' %s", gguf_show(x->key).text, differs ? "stayed" : "changed");
    }
}
#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})

static inline gguf_text last_token(const gguf *file)
{
    const gguf_value *tokens = gguf_find(file, "tokenizer.ggml.tokens");
    gguf_text text = {"", 0};
    size_t at = 0;
    assert_non_null(tokens);
    for (size_t i = 0; i < tokens->count; i++) text = gguf_next_string(tokens, &at);
    return text;
}

static inline int64_t last_integer(const gguf *file, const char *key)
{
    const gguf_value *value = gguf_find(file, key);
    int64_t x = -1;
    assert_true(value != NULL && gguf_value_integer(value, value->count - 1, &x));
    return x;
}

#endif
