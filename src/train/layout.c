/* layout.c - where each parameter of a model lies, under the name GGUF has for it, and what it starts from; and what a
 * window's rows predict. */
#include "train_internal.h"

#include <math.h>
#include <stdio.h>

enum { VOCAB_MAX = 1 << 22, WIDTH_MAX = 1 << 20, PARAMS_PER_LAYER = 12 };

static cairn_status check(const cairn_train_shape *s)
{
    const struct {
        const char *field;
        uint32_t value, most;
    } counts[] = {{"vocab", s->vocab, VOCAB_MAX}, {"width", s->width, WIDTH_MAX}, {"hidden", s->hidden, WIDTH_MAX}};
    cairn_status st = cairn_attention_shape_check(&s->attention);
    if (st != CAIRN_OK) return st;
    if (s->mode == CAIRN_TRAIN_LANDMARK && s->attention.scheme != CAIRN_POSITION_CLAMPED)
        return cairn_fail(CAIRN_UNSUPPORTED, "training landmarks with position scheme %d: clamped alone",
                          (int)s->attention.scheme);
    if (s->mode == CAIRN_TRAIN_XL && s->segment == 0)
        return cairn_fail(CAIRN_INVALID, "model to train: a segment of Transformer-XL is 0 slots, must be 1 or more");
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value < 1 || counts[i].value > counts[i].most)
            return cairn_fail(CAIRN_INVALID, "model to train: %s is %u, must be 1..%u", counts[i].field,
                              counts[i].value, counts[i].most);
    if (!isfinite(s->norm_eps) || s->norm_eps <= 0)
        return cairn_fail(CAIRN_INVALID, "model to train: norm_eps is %g, must be above 0", (double)s->norm_eps);
    return CAIRN_OK;
}

/* The next parameter of `layout`, right behind the last one; returns where it begins. Within 2^64: all counts are below
 * 2^22 and there are at most 2^16 matrices. */
static size_t add(cairn_train_layout *layout, cairn_train_kind kind, uint32_t layer, const char *name, size_t rows,
                  size_t cols)
{
    cairn_train_param *p = &layout->params[layout->n_params++];
    *p = (cairn_train_param){.kind = kind, .rows = (uint32_t)rows, .cols = (uint32_t)cols, .at = layout->total};
    if (layer == UINT32_MAX)
        snprintf(p->name, sizeof p->name, "%s.weight", name);
    else
        snprintf(p->name, sizeof p->name, "blk.%u.%s%s", layer, name,
                 kind == CAIRN_TRAIN_LANDMARK_BIAS ? "" : ".weight");
    layout->total += rows * cols;
    return p->at;
}

static void add_layer(cairn_train_layout *t, uint32_t l)
{
    const cairn_train_shape *s = &t->shape;
    const size_t dim = s->attention.head_dim;
    const size_t q = s->attention.heads * dim, kv = s->attention.kv_heads * dim;
    cairn_train_layer *at = &t->layers[l];
    at->attn_norm = add(t, CAIRN_TRAIN_NORM, l, "attn_norm", 1, s->width);
    at->qkv = add(t, CAIRN_TRAIN_MATRIX, l, "attn_q", q, s->width);
    add(t, CAIRN_TRAIN_MATRIX, l, "attn_k", kv, s->width);
    add(t, CAIRN_TRAIN_MATRIX, l, "attn_v", kv, s->width);
    if (s->qk_norm) {
        at->q_norm = add(t, CAIRN_TRAIN_NORM, l, "attn_q_norm", 1, dim);
        at->k_norm = add(t, CAIRN_TRAIN_NORM, l, "attn_k_norm", 1, dim);
    }
    if (s->mode == CAIRN_TRAIN_LANDMARK)
        at->landmark_bias = add(t, CAIRN_TRAIN_LANDMARK_BIAS, l, "landmark_bias", 1, s->attention.heads);
    at->o = add(t, CAIRN_TRAIN_MATRIX, l, "attn_output", s->width, q);
    at->ffn_norm = add(t, CAIRN_TRAIN_NORM, l, "ffn_norm", 1, s->width);
    at->gate_up = add(t, CAIRN_TRAIN_MATRIX, l, "ffn_gate", s->hidden, s->width);
    add(t, CAIRN_TRAIN_MATRIX, l, "ffn_up", s->hidden, s->width);
    at->down = add(t, CAIRN_TRAIN_MATRIX, l, "ffn_down", s->width, s->hidden);
}

cairn_status cairn_train_layout_new(const cairn_train_shape *shape, cairn_train_layout **out)
{
    cairn_status st = check(shape);
    const size_t layers = shape->attention.layers;
    cairn_train_layout *t = NULL;
    *out = NULL;
    if (st != CAIRN_OK) return st;
    t = cairn_calloc(1, sizeof *t);
    if (t != NULL) {
        t->shape = *shape;
        t->shape.attention.local_layers = t->local_layers = cairn_calloc(layers, 1);
        t->shape.attention.landmark_bias = NULL;
        t->shape.attention.rope_factors = NULL;
        t->layers = cairn_calloc(layers, sizeof *t->layers);
        t->params = cairn_calloc(layers * PARAMS_PER_LAYER + 3, sizeof *t->params);
    }
    if (t == NULL || t->local_layers == NULL || t->layers == NULL || t->params == NULL) {
        cairn_train_layout_free(t);
        return cairn_fail(CAIRN_NO_MEMORY, "layout of a model of %zu layers", layers);
    }
    if (shape->attention.rope_factors != NULL) {
        const size_t pairs =
            (shape->attention.rope_dims != 0 ? shape->attention.rope_dims : shape->attention.head_dim) / 2;
        if ((t->rope_factors = cairn_alloc_array(pairs, sizeof *t->rope_factors)) == NULL) {
            cairn_train_layout_free(t);
            return cairn_fail(CAIRN_NO_MEMORY, "rope factors of %zu pairs", pairs);
        }
        memcpy(t->rope_factors, shape->attention.rope_factors, pairs * sizeof *t->rope_factors);
        t->shape.attention.rope_factors = t->rope_factors;
    }
    if (shape->mode == CAIRN_TRAIN_LANDMARK && shape->attention.local_layers != NULL)
        memcpy(t->local_layers, shape->attention.local_layers, layers);
    t->embedding = add(t, CAIRN_TRAIN_EMBEDDING, UINT32_MAX, "token_embd", shape->vocab, shape->width);
    for (uint32_t l = 0; l < layers; l++) add_layer(t, l);
    t->output_norm = add(t, CAIRN_TRAIN_NORM, UINT32_MAX, "output_norm", 1, shape->width);
    t->head = shape->tied ? t->embedding : add(t, CAIRN_TRAIN_HEAD, UINT32_MAX, "output", shape->vocab, shape->width);
    *out = t;
    return CAIRN_OK;
}

void cairn_train_layout_free(cairn_train_layout *layout)
{
    if (layout == NULL) return;
    cairn_free(layout->local_layers);
    cairn_free(layout->rope_factors);
    cairn_free(layout->layers);
    cairn_free(layout->params);
    cairn_free(layout);
}

void cairn_train_targets(const cairn_token *slots, size_t rows, uint32_t block_tokens, cairn_token *targets)
{
    const size_t B = (size_t)block_tokens + 1;
    for (size_t r = 0; r < rows; r++) {
        size_t next = B > 1 && (r + 1) % B == B - 1 ? r + 2 : r + 1; /* over the landmark */
        targets[r] = (B > 1 && r % B == B - 1) || next >= rows ? -1 : slots[next];
    }
}

/* ---- the start ---- */

static uint64_t next_random(uint64_t *state) /* SplitMix64: Steele, Lea & Flood 2014 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15U;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    return z ^ z >> 31;
}

/* Normal with variance 1, as Irwin and Hall: twelve uniform numbers less 6. Sums of integers, no libm: the same bits on
 * every machine, and tails that end at 6. */
static double next_normal(uint64_t *state)
{
    int64_t sum = 0;
    for (int i = 0; i < 6; i++) {
        uint64_t two = next_random(state);
        sum += (int64_t)(two >> 32) + (int64_t)(two & 0xffffffffU);
    }
    return (double)(sum - 6 * ((INT64_C(1) << 32) - 1)) / 4294967296.0;
}

void cairn_train_init(const cairn_train_layout *layout, uint64_t seed, float *params)
{
    const cairn_attention_shape *a = &layout->shape.attention;
    const double narrow = 1 / sqrt(2.0 * (double)a->layers);
    uint64_t state = seed;
    for (size_t i = 0; i < layout->n_params; i++) {
        const cairn_train_param *p = &layout->params[i];
        const size_t n = (size_t)p->rows * p->cols;
        double spread = p->kind == CAIRN_TRAIN_EMBEDDING ? 0.02 : 1 / sqrt((double)p->cols);
        for (uint32_t l = 0; l < a->layers; l++)
            if (p->at == layout->layers[l].o || p->at == layout->layers[l].down) spread *= narrow;
        for (size_t j = 0; j < n; j++) {
            if (p->kind == CAIRN_TRAIN_NORM)
                params[p->at + j] = 1;
            else if (p->kind == CAIRN_TRAIN_LANDMARK_BIAS)
                params[p->at + j] = (float)log((double)a->block_tokens);
            else
                params[p->at + j] = (float)(spread * next_normal(&state));
        }
    }
}
