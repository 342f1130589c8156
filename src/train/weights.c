/* weights.c - parameters out of a GGUF model, and into one.
 *
 * A model file holds matrices as (rows, cols) under the names the layout has, the landmark biases as metadata; both
 * ends go through the model room, so what is written is what a session will read. */
#include "train_internal.h"

#include "model_internal.h"

#include <stdio.h>

cairn_status cairn_train_shape_of(const cairn_model *model, cairn_train_shape *out)
{
    if (model->shape.scheme != CAIRN_POSITION_CLAMPED && model->shape.scheme != CAIRN_POSITION_DENSE)
        return cairn_fail(CAIRN_UNSUPPORTED,
                          "model '%s' has landmarks whose positions are not clamped, which training "
                          "needs",
                          model->info.name);
    *out = (cairn_train_shape){.mode = model->shape.scheme == CAIRN_POSITION_CLAMPED ? CAIRN_TRAIN_LANDMARK
                                       : model->info.xl_segment > 0                  ? CAIRN_TRAIN_XL
                                                                                     : CAIRN_TRAIN_DENSE,
                               .segment = model->info.xl_segment,
                               .attention = model->shape,
                               .vocab = model->info.vocab,
                               .width = model->info.width,
                               .hidden = model->info.hidden,
                               .norm_eps = model->norm_eps,
                               .qk_norm = model->layers[0].q_norm != NULL,
                               .tied = model->output.data == model->embedding.data};
    return CAIRN_OK;
}

static bool same_shape(const cairn_train_shape *a, const cairn_train_shape *b)
{
    const cairn_attention_shape *x = &a->attention, *y = &b->attention;
    return (a->mode == CAIRN_TRAIN_LANDMARK) == (b->mode == CAIRN_TRAIN_LANDMARK) && a->vocab == b->vocab &&
           a->width == b->width && a->hidden == b->hidden && a->qk_norm == b->qk_norm && a->tied == b->tied &&
           x->layers == y->layers && x->heads == y->heads && x->kv_heads == y->kv_heads && x->head_dim == y->head_dim;
}

cairn_status cairn_train_import(const cairn_train_layout *layout, const cairn_model *model, float *params)
{
    cairn_train_shape theirs = {0};
    cairn_status st = cairn_train_shape_of(model, &theirs);
    if (st != CAIRN_OK) return st;
    if (!same_shape(&layout->shape, &theirs))
        return cairn_fail(CAIRN_MISMATCH, "model '%s' has another shape than the one to train", model->info.name);
    cairn_train_copy(layout, model, params);
    return CAIRN_OK;
}

void cairn_train_copy(const cairn_train_layout *layout, const cairn_model *model, float *params)
{
    const cairn_kernels *kernels = cairn_kernels_best();
    const cairn_train_shape *s = &layout->shape;
    const size_t heads = s->attention.heads, dim = s->attention.head_dim;
    const uint32_t rows = model->info.vocab;
    for (uint32_t l = 0; l < s->attention.layers; l++) {
        const model_layer *from = &model->layers[l];
        const cairn_train_layer *to = &layout->layers[l];
        const struct {
            const weight *w[3];
            size_t at;
        } groups[] = {{{&from->q, &from->k, &from->v}, to->qkv},
                      {{&from->o}, to->o},
                      {{&from->gate, &from->up}, to->gate_up},
                      {{&from->down}, to->down}};
        for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
            float *out = params + groups[g].at;
            for (size_t i = 0; i < 3 && groups[g].w[i] != NULL; i++) {
                const weight *w = groups[g].w[i];
                kernels->dequant(out, w->data, w->type, w->cols, 0, w->rows);
                out += (size_t)w->rows * w->cols;
            }
        }
        memcpy(params + to->attn_norm, from->attn_norm, s->width * sizeof *params);
        memcpy(params + to->ffn_norm, from->ffn_norm, s->width * sizeof *params);
        if (s->qk_norm) {
            memcpy(params + to->q_norm, from->q_norm, dim * sizeof *params);
            memcpy(params + to->k_norm, from->k_norm, dim * sizeof *params);
        }
        for (size_t h = 0; h < heads && s->mode == CAIRN_TRAIN_LANDMARK; h++)
            params[to->landmark_bias + h] =
                model->shape.landmark_bias != NULL ? model->shape.landmark_bias[l * heads + h] : 0;
    }
    memcpy(params + layout->output_norm, model->output_norm, s->width * sizeof *params);
    kernels->dequant(params + layout->embedding, model->embedding.data, model->embedding.type, s->width, 0, rows);
    if (!s->tied) kernels->dequant(params + layout->head, model->output.data, model->output.type, s->width, 0, rows);
}

/* ---- writing ---- */

typedef struct meta_u32 { /* key after "ARCHITECTURE." */
    const char *key;
    uint32_t value;
} meta_u32;

static cairn_status put_architecture(cairn_gguf_writer *w, const cairn_train_shape *s, uint32_t window)
{
    const cairn_attention_shape *a = &s->attention;
    const char *name = s->qk_norm ? "qwen3" : "llama";
    const meta_u32 counts[] = {{"context_length", window},
                               {"embedding_length", s->width},
                               {"block_count", a->layers},
                               {"feed_forward_length", s->hidden},
                               {"attention.head_count", a->heads},
                               {"attention.head_count_kv", a->kv_heads},
                               {"attention.key_length", a->head_dim},
                               {"attention.value_length", a->head_dim},
                               {"rope.dimension_count", a->rope_dims != 0 ? a->rope_dims : a->head_dim}};
    char key[96];
    cairn_status st = cairn_gguf_put_string(w, "general.architecture", name);
    for (size_t i = 0; i < sizeof counts / sizeof *counts && st == CAIRN_OK; i++) {
        snprintf(key, sizeof key, "%s.%s", name, counts[i].key);
        st = cairn_gguf_put_u32(w, key, counts[i].value);
    }
    if (st != CAIRN_OK) return st;
    snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", name);
    if ((st = cairn_gguf_put_f32(w, key, s->norm_eps)) != CAIRN_OK) return st;
    snprintf(key, sizeof key, "%s.rope.freq_base", name);
    return cairn_gguf_put_f32(w, key, a->rope_theta);
}

cairn_status cairn_train_put_landmarks(cairn_gguf_writer *w, const cairn_train_layout *layout, const float *params,
                                       cairn_token landmark, uint32_t window)
{
    const cairn_attention_shape *a = &layout->shape.attention;
    const meta_u32 counts[] = {{"cairn.landmark.token_id", (uint32_t)landmark},
                               {"cairn.landmark.train_window", window},
                               {"cairn.landmark.block_tokens", a->block_tokens},
                               {"cairn.landmark.top_k", a->top_k},
                               {"cairn.landmark.clamp_blocks", a->clamp_blocks},
                               {"cairn.landmark.window_blocks", a->window_blocks},
                               {"cairn.landmark.local_window_blocks", a->local_window_blocks}};
    const size_t heads = a->heads;
    uint32_t *local = cairn_alloc_array(a->layers, sizeof *local);
    float *bias = cairn_alloc_array(a->layers * heads, sizeof *bias);
    size_t n = 0;
    cairn_status st = cairn_gguf_put_string(w, "cairn.landmark.position", "clamped");
    if (local == NULL || bias == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "landmark biases of %u layers", (unsigned)a->layers);
    for (size_t i = 0; i < sizeof counts / sizeof *counts && st == CAIRN_OK; i++)
        st = cairn_gguf_put_u32(w, counts[i].key, counts[i].value);
    if (st != CAIRN_OK) goto out;
    for (uint32_t l = 0; l < a->layers; l++) {
        if (a->local_layers[l] != 0) local[n++] = l;
        memcpy(bias + l * heads, params + layout->layers[l].landmark_bias, heads * sizeof *bias);
    }
    if (n > 0 && (st = cairn_gguf_put_u32s(w, "cairn.landmark.local_layers", local, n)) != CAIRN_OK) goto out;
    st = cairn_gguf_put_f32s(w, "cairn.landmark.bias", bias, a->layers * heads);
out:
    cairn_free(local);
    cairn_free(bias);
    return st;
}

cairn_status cairn_train_put_tensors(cairn_gguf_writer *w, const cairn_train_layout *layout, const float *params,
                                     cairn_gguf_type type)
{
    cairn_status st = CAIRN_OK;
    for (size_t i = 0; i < layout->n_params && st == CAIRN_OK; i++) {
        const cairn_train_param *p = &layout->params[i];
        const uint64_t dims[2] = {p->cols, p->rows};
        if (p->kind == CAIRN_TRAIN_LANDMARK_BIAS) continue;
        bool vector = p->kind == CAIRN_TRAIN_NORM;
        st = cairn_gguf_put_tensor(w, p->name, vector ? CAIRN_GGUF_F32 : type, dims, vector ? 1 : 2, params + p->at);
    }
    const cairn_attention_shape *s = &layout->shape.attention;
    if (st != CAIRN_OK || s->rope_factors == NULL) return st;
    const uint64_t pairs = (s->rope_dims != 0 ? s->rope_dims : s->head_dim) / 2;
    return cairn_gguf_put_tensor(w, "rope_freqs.weight", CAIRN_GGUF_F32, &pairs, 1, s->rope_factors);
}

cairn_status cairn_train_export(const cairn_train_layout *layout, const float *params, const char *name,
                                uint32_t window, cairn_gguf_type type, const char *path)
{
    const cairn_train_shape *s = &layout->shape;
    cairn_gguf_writer *w = NULL;
    cairn_status st;
    if (s->vocab != CAIRN_TRAIN_BYTE_VOCAB)
        return cairn_fail(CAIRN_UNSUPPORTED,
                          "writing a model of %u tokens: only the byte vocabulary of %d with its "
                          "landmark can be written",
                          s->vocab, CAIRN_TRAIN_BYTE_VOCAB);
    if (s->attention.rope_interleaved == s->qk_norm) /* "llama" turns neighbours, "qwen3" halves */
        return cairn_fail(CAIRN_UNSUPPORTED,
                          "writing a model %s norms of q and k whose rotation %s: no architecture "
                          "of GGUF has both",
                          s->qk_norm ? "with" : "without",
                          s->attention.rope_interleaved ? "turns neighbouring dims" : "turns halves");
    if ((st = cairn_gguf_writer_new(&w)) != CAIRN_OK) goto out;
    if ((st = put_architecture(w, s, window)) != CAIRN_OK) goto out;
    if ((st = cairn_gguf_put_string(w, "general.name", name)) != CAIRN_OK) goto out;
    if ((st = cairn_gguf_put_byte_vocab(w, true)) != CAIRN_OK) goto out;
    if (s->mode == CAIRN_TRAIN_LANDMARK)
        st = cairn_train_put_landmarks(w, layout, params, (cairn_token)s->vocab - 1, window);
    else if (s->mode == CAIRN_TRAIN_XL)
        st = cairn_gguf_put_u32(w, "cairn.xl.segment", s->segment);
    if (st != CAIRN_OK) goto out;
    if ((st = cairn_train_put_tensors(w, layout, params, type)) != CAIRN_OK) goto out;
    st = cairn_gguf_writer_save(w, path);
out:
    cairn_gguf_writer_free(w);
    return st;
}
