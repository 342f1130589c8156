/* train_bench.h - a model to train in both types and one window of random slots, for what is said of whole models. */
#ifndef CAIRN_TESTS_TRAIN_BENCH_H
#define CAIRN_TESTS_TRAIN_BENCH_H

#include "train_support.h"

#include <train_internal.h>

typedef struct model_spec {
    uint32_t layers, heads, kv_heads, dim, width, hidden, vocab, block_tokens, clamp;
    bool qwen3, tied, local_first;
} model_spec;

/* The parameters of a model in both types, and one window of random slots. */
typedef struct bench {
    cairn_train_layout *layout;
    size_t rows, total;
    double *params, *grads;
    float *params_f32, *grads_f32;
    cairn_train_model_f64 *model;
    cairn_train_model_f32 *model_f32;
    cairn_token *slots, *targets;
    float *weights;
    cairn_train_window window;
} bench;

static inline cairn_train_shape shape_of(const model_spec *spec)
{
    static uint8_t local[8];
    cairn_train_shape s = {.vocab = spec->vocab,
                           .width = spec->width,
                           .hidden = spec->hidden,
                           .norm_eps = 1e-5F,
                           .qk_norm = spec->qwen3,
                           .tied = spec->tied};
    cairn_attention_shape_init(&s.attention, sizeof s.attention);
    s.attention.layers = spec->layers;
    s.attention.heads = spec->heads;
    s.attention.kv_heads = spec->kv_heads;
    s.attention.head_dim = spec->dim;
    s.attention.block_tokens = spec->block_tokens;
    s.attention.clamp_blocks = spec->clamp;
    s.attention.rope_interleaved = !spec->qwen3;
    memset(local, 0, sizeof local);
    local[0] = spec->local_first;
    s.attention.local_layers = local;
    return s;
}

/* The same model without landmarks. */
static inline cairn_train_shape without_landmarks(cairn_train_shape s, cairn_train_attention mode, uint32_t segment)
{
    s.mode = mode;
    s.segment = segment;
    s.attention.scheme = CAIRN_POSITION_DENSE;
    s.attention.local_layers = NULL;
    return s;
}

/* Every parameter random, norms and biases away from where they start, so that none is special. */
static inline void randomise(bench *b, test_random *r)
{
    for (size_t p = 0; p < b->layout->n_params; p++) {
        const cairn_train_param *param = &b->layout->params[p];
        bool vector = param->kind == CAIRN_TRAIN_NORM || param->kind == CAIRN_TRAIN_LANDMARK_BIAS;
        double spread = vector ? 0.2 : 1.5 / sqrt((double)param->cols);
        for (size_t i = 0; i < (size_t)param->rows * param->cols; i++)
            b->params[param->at + i] = (double)(float)((vector ? 1 : 0) + spread * (double)test_random_normal(r));
    }
    for (size_t i = 0; i < b->total; i++) b->params_f32[i] = (float)b->params[i];
}

static inline void bench_init(bench *b, const cairn_train_shape *shape, size_t rows, uint64_t seed)
{
    test_random r = {seed};
    const uint32_t B = shape->mode == CAIRN_TRAIN_LANDMARK ? shape->attention.block_tokens + 1 : 1;
    *b = (bench){.rows = rows};
    assert_ok(cairn_train_layout_new(shape, &b->layout));
    b->total = b->layout->total;
    b->params = calloc(b->total, sizeof *b->params);
    b->grads = calloc(b->total, sizeof *b->grads);
    b->params_f32 = calloc(b->total, sizeof *b->params_f32);
    b->grads_f32 = calloc(b->total, sizeof *b->grads_f32);
    b->slots = calloc(rows, sizeof *b->slots);
    b->targets = calloc(rows, sizeof *b->targets);
    b->weights = calloc(rows, sizeof *b->weights);
    assert_true(b->params && b->grads && b->params_f32 && b->grads_f32 && b->slots && b->targets && b->weights);
    randomise(b, &r);
    for (size_t i = 0; i < rows; i++) {
        bool landmark = B > 1 && i % B == B - 1;
        b->slots[i] = (cairn_token)(landmark ? shape->vocab - 1 : test_random_below(&r, shape->vocab - 1));
        b->weights[i] = i % 5 == 3 ? 0 : (float)(1 + test_random_below(&r, 3)) / 2; /* 0: the row teaches nothing */
    }
    cairn_train_targets(b->slots, rows, B - 1, b->targets);
    b->window = (cairn_train_window){b->slots, b->targets, b->weights, rows, NULL};
    assert_ok(cairn_train_model_new_f64(b->layout, rows + 3, &b->model));
    assert_ok(cairn_train_model_new_f32(b->layout, rows + 3, &b->model_f32));
}
static inline void bench_wipe(bench *b)
{
    cairn_train_model_free_f64(b->model);
    cairn_train_model_free_f32(b->model_f32);
    cairn_train_layout_free(b->layout);
    free(b->params), free(b->grads), free(b->params_f32), free(b->grads_f32);
    free(b->slots), free(b->targets), free(b->weights);
}

static inline double bench_loss(void *arg)
{
    bench *b = arg;
    cairn_train_forward_f64(b->model, b->params, b->slots, b->rows);
    return cairn_train_loss_f64(b->model, &b->window, 1, NULL, NULL) / 7;
}

static inline void bench_gradient(bench *b)
{
    cairn_train_forward_f64(b->model, b->params, b->slots, b->rows);
    cairn_train_loss_f64(b->model, &b->window, 1.0 / 7, NULL, NULL);
    cairn_train_backward_f64(b->model, b->params, &b->window, b->grads);
}

#endif
