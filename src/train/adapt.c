/* adapt.c - training on from a model somebody else trained: what Mohtashami & Jaggi did to LLaMA (section 4.2).
 *
 * A model without landmarks gets one token more, the landmark, whose rows are the mean of all others, as in the
 * authors' code; no logit of an old token changes. Within its first block it is the model it was; how to use past
 * blocks it has to learn. Writing it back keeps all the file said about it. */
#include "train_internal.h"

#include "model_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const uint32_t first_layer = 0;

void cairn_train_landmarks_init(cairn_train_landmarks *landmarks)
{
    cairn_attention_shape shape;
    cairn_attention_shape_init(&shape, sizeof shape);
    *landmarks = (cairn_train_landmarks){.block_tokens = shape.block_tokens,
                                         .clamp_blocks = shape.clamp_blocks,
                                         .window_blocks = shape.window_blocks,
                                         .local_window_blocks = shape.local_window_blocks,
                                         .top_k = shape.top_k,
                                         .local_layers = &first_layer,
                                         .n_local = 1};
}

/* Our own dense models have it (cairn_gguf_put_byte_vocab): in no text, so never trained. */
static bool has_spare_landmark(const cairn_model *model)
{
    const vocab *v = &model->vocab;
    uint32_t last = v->n - 1;
    return model->info.landmark < 0 && v->kind == VOCAB_BYTES && v->n == CAIRN_TRAIN_BYTE_VOCAB &&
           v->kinds[last] == TOKEN_CONTROL && gguf_text_is(v->pieces[last], "<landmark>");
}

/* flags (layers) of the numbers in `landmarks`. */
static cairn_status mark_local(const cairn_train_landmarks *landmarks, uint32_t layers, uint8_t *flags)
{
    for (size_t i = 0; i < landmarks->n_local; i++) {
        if (landmarks->local_layers[i] >= layers)
            return cairn_fail(CAIRN_INVALID, "local layer %u of a model of %u layers", landmarks->local_layers[i],
                              layers);
        flags[landmarks->local_layers[i]] = 1;
    }
    return CAIRN_OK;
}

static cairn_status check_own(const cairn_model *model, const cairn_train_landmarks *asked, const uint8_t *local)
{
    const cairn_attention_shape *own = &model->shape;
    const struct {
        const char *field;
        uint32_t own, asked;
    } numbers[] = {{"block_tokens", own->block_tokens, asked->block_tokens},
                   {"clamp_blocks", own->clamp_blocks, asked->clamp_blocks},
                   {"window_blocks", own->window_blocks, asked->window_blocks},
                   {"local_window_blocks", own->local_window_blocks, asked->local_window_blocks},
                   {"top_k", own->top_k, asked->top_k}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].own != numbers[i].asked)
            return cairn_fail(CAIRN_MISMATCH, "model '%s' has landmarks of its own: %s is %u, not %u", model->info.name,
                              numbers[i].field, numbers[i].own, numbers[i].asked);
    for (uint32_t l = 0; l < own->layers; l++) {
        bool is = own->local_layers != NULL && own->local_layers[l] != 0;
        if (is != (local[l] != 0))
            return cairn_fail(CAIRN_MISMATCH, "model '%s' has landmarks of its own: its layer %u is %s",
                              model->info.name, l, is ? "local" : "not local");
    }
    return CAIRN_OK;
}

cairn_status cairn_train_adapt_layout(const cairn_model *model, const cairn_train_landmarks *landmarks,
                                      cairn_train_layout **out)
{
    cairn_train_landmarks defaults;
    cairn_train_shape shape = {0};
    cairn_status st = CAIRN_OK;
    const uint32_t layers = model->info.layers;
    uint8_t *local = cairn_calloc(layers, 1);
    *out = NULL;
    if (local == NULL) return cairn_fail(CAIRN_NO_MEMORY, "flags of %u layers", layers);
    cairn_train_landmarks_init(&defaults);
    const cairn_train_landmarks *chosen = landmarks != NULL ? landmarks : &defaults;
    if ((st = mark_local(chosen, layers, local)) != CAIRN_OK) goto out;
    if (model->info.landmark >= 0) {
        if ((st = cairn_train_shape_of(model, &shape)) != CAIRN_OK) goto out;
        if (landmarks != NULL && (st = check_own(model, landmarks, local)) != CAIRN_OK) goto out;
    } else {
        if ((st = cairn_train_shape_of(model, &shape)) != CAIRN_OK) goto out;
        shape.mode = CAIRN_TRAIN_LANDMARK;
        shape.segment = 0;
        shape.vocab += has_spare_landmark(model) ? 0 : 1;
        shape.attention.scheme = CAIRN_POSITION_CLAMPED;
        shape.attention.block_tokens = chosen->block_tokens;
        shape.attention.clamp_blocks = chosen->clamp_blocks;
        shape.attention.window_blocks = chosen->window_blocks;
        shape.attention.local_window_blocks = chosen->local_window_blocks;
        shape.attention.local_layers = local;
        shape.attention.top_k = chosen->top_k;
    }
    st = cairn_train_layout_new(&shape, out);
out:
    cairn_free(local);
    return st;
}

cairn_token cairn_train_adapt_landmark(const cairn_train_layout *layout, const cairn_model *model)
{
    return model->info.landmark >= 0 ? model->info.landmark : (cairn_token)layout->shape.vocab - 1;
}

/* Is `layout` what cairn_train_adapt_layout makes of `model`? */
static cairn_status check_fit(const cairn_train_layout *layout, const cairn_model *model)
{
    cairn_train_shape theirs;
    cairn_status st = cairn_train_shape_of(model, &theirs);
    if (st != CAIRN_OK) return st;
    const cairn_train_shape *ours = &layout->shape;
    const cairn_attention_shape *x = &ours->attention, *y = &theirs.attention;
    const uint32_t tokens = theirs.vocab + (model->info.landmark >= 0 || has_spare_landmark(model) ? 0 : 1);
    const uint32_t rope_dims = x->rope_dims != 0 ? x->rope_dims : x->head_dim;
    const struct {
        const char *field;
        uint32_t ours, theirs;
    } numbers[] = {{"tokens with the landmark", ours->vocab, tokens},
                   {"columns", ours->width, theirs.width},
                   {"columns of SwiGLU", ours->hidden, theirs.hidden},
                   {"layers", x->layers, y->layers},
                   {"heads", x->heads, y->heads},
                   {"key/value heads", x->kv_heads, y->kv_heads},
                   {"dimensions of a head", x->head_dim, y->head_dim},
                   {"rotating dimensions", rope_dims, y->rope_dims}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].ours != numbers[i].theirs)
            return cairn_fail(CAIRN_MISMATCH, "model '%s' has %u %s, the one to train %u", model->info.name,
                              numbers[i].theirs, numbers[i].field, numbers[i].ours);
    if (ours->qk_norm != theirs.qk_norm || ours->tied != theirs.tied || x->rope_interleaved != y->rope_interleaved)
        return cairn_fail(
            CAIRN_MISMATCH,
            "model '%s' and the one to train differ in norms of q and k, in a head of their own or in the "
            "pairs that rotate",
            model->info.name);
    const size_t factors = (x->rope_factors != NULL ? rope_dims / 2 : 0) * sizeof *x->rope_factors;
    if ((x->rope_factors != NULL) != (y->rope_factors != NULL) ||
        (factors != 0 && memcmp(x->rope_factors, y->rope_factors, factors) != 0))
        return cairn_fail(CAIRN_MISMATCH, "model '%s' and the one to train differ in their rope factors",
                          model->info.name);
    if (x->rope_theta != y->rope_theta || ours->norm_eps != theirs.norm_eps)
        return cairn_fail(CAIRN_MISMATCH, "model '%s' has theta %g and epsilon %g, the one to train %g and %g",
                          model->info.name, (double)y->rope_theta, (double)theirs.norm_eps, (double)x->rope_theta,
                          (double)ours->norm_eps);
    return CAIRN_OK;
}

/* Row `at` of (rows, cols) becomes the mean of the others, summed in double: a vocabulary has up to millions. A few
 * columns at a time, so that no memory is needed. */
static void set_to_mean(float *matrix, size_t rows, size_t cols, size_t at)
{
    enum { STRIP = 64 };
    for (size_t from = 0; from < cols; from += STRIP) {
        double sums[STRIP] = {0};
        const size_t n = cols - from < STRIP ? cols - from : STRIP;
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < n && r != at; c++) sums[c] += (double)matrix[r * cols + from + c];
        for (size_t c = 0; c < n; c++) matrix[at * cols + from + c] = (float)(sums[c] / (double)(rows - 1));
    }
}

cairn_status cairn_train_adapt(const cairn_train_layout *layout, const cairn_model *model, float *params)
{
    const cairn_train_shape *s = &layout->shape;
    const size_t landmark = (size_t)cairn_train_adapt_landmark(layout, model), heads = s->attention.heads;
    if (model->info.landmark >= 0) return cairn_train_import(layout, model, params);
    cairn_status st = check_fit(layout, model);
    if (st != CAIRN_OK) return st;
    cairn_train_copy(layout, model, params);
    set_to_mean(params + layout->embedding, s->vocab, s->width, landmark);
    if (!s->tied) set_to_mean(params + layout->head, s->vocab, s->width, landmark);
    for (uint32_t l = 0; l < s->attention.layers; l++)
        for (size_t h = 0; h < heads; h++)
            params[layout->layers[l].landmark_bias + h] = (float)log((double)s->attention.block_tokens);
    return CAIRN_OK;
}

/* ---- writing it back ---- */

enum { ELEMENT_BYTES_MAX = 8 };

typedef struct addition { /* what changes in the file's metadata */
    const cairn_model *source;
    bool token; /* one more, of this name */
    char name[40];
    uint32_t file_type;  /* ggml's number for "mostly F16" and the like */
    char vocab_size[48]; /* keys */
} addition;

static uint32_t file_type_of(cairn_gguf_type type)
{
    switch (type) {
    case CAIRN_GGUF_F16: return 1;
    case CAIRN_GGUF_Q8_0: return 7;
    case CAIRN_GGUF_BF16: return 32;
    default: return 0; /* all F32 */
    }
}

/* "<landmark>", or with a number if the vocabulary has a piece of that name: llama.cpp takes none twice. */
static void choose_name(addition *add)
{
    const vocab *v = &add->source->vocab;
    bool taken = true;
    for (uint32_t number = 0; taken; number++) { /* ends: there are fewer pieces than numbers */
        if (number == 0)
            snprintf(add->name, sizeof add->name, "<landmark>");
        else
            snprintf(add->name, sizeof add->name, "<landmark%u>", number);
        taken = false;
        for (uint32_t id = 0; id < v->n && v->pieces != NULL && !taken; id++)
            taken = gguf_text_is(v->pieces[id], add->name);
    }
}

static cairn_status put_tokens(cairn_gguf_writer *w, const gguf_value *tokens, const addition *add)
{
    uint8_t element[8 + sizeof add->name];
    const uint32_t n = add->source->vocab.n;
    const size_t bytes = strlen(add->name);
    cairn_put_le64(element, bytes);
    memcpy(element + 8, add->name, bytes);
    cairn_status st = gguf_put_longer(w, tokens, element, 8 + bytes);
    if (st != CAIRN_OK || gguf_find(&add->source->file, "tokenizer.ggml.token_type") != NULL) return st;

    /* Without kinds all tokens are text, which the landmark is not. */
    int32_t *kinds = cairn_alloc_array((size_t)n + 1, sizeof *kinds);
    if (kinds == NULL) return cairn_fail(CAIRN_NO_MEMORY, "kinds of %u tokens", n + 1);
    for (uint32_t id = 0; id < n; id++) kinds[id] = TOKEN_NORMAL;
    kinds[n] = TOKEN_CONTROL;
    st = cairn_gguf_put_i32s(w, "tokenizer.ggml.token_type", kinds, (size_t)n + 1);
    cairn_free(kinds);
    return st;
}

static cairn_status put_key(cairn_gguf_writer *w, const gguf_value *value, const addition *add)
{
    static const char landmark[] = "cairn.landmark."; /* written anew */
    const gguf_text key = value->key;
    uint8_t element[ELEMENT_BYTES_MAX] = {0}; /* a score of 0, in whatever type */
    const size_t bytes = value->count != 0 ? value->bytes / value->count : 0;
    if (key.bytes >= sizeof landmark - 1 && memcmp(key.data, landmark, sizeof landmark - 1) == 0) return CAIRN_OK;
    if (gguf_text_is(key, "general.alignment")) return CAIRN_OK; /* the writer's is the format's default */
    if (gguf_text_is(key, "general.file_type")) return cairn_gguf_put_u32(w, "general.file_type", add->file_type);
    if (!add->token) return gguf_put_value(w, value);
    if (gguf_text_is(key, add->vocab_size)) return cairn_gguf_put_u32(w, add->vocab_size, add->source->info.vocab + 1);
    if (gguf_text_is(key, "tokenizer.ggml.tokens")) return put_tokens(w, value, add);
    if (add->source->vocab.pieces == NULL) return gguf_put_value(w, value);
    if (gguf_text_is(key, "tokenizer.ggml.scores")) return gguf_put_longer(w, value, element, bytes);
    element[0] = TOKEN_CONTROL; /* little-endian: the same in every type of integer */
    if (gguf_text_is(key, "tokenizer.ggml.token_type")) return gguf_put_longer(w, value, element, bytes);
    return gguf_put_value(w, value);
}

static int by_place(const void *a, const void *b)
{
    const gguf_value *x = a, *y = b;
    return (x->data > y->data) - (x->data < y->data);
}

/* All keys, in the order of the file: the table is sorted by name. */
static cairn_status put_metadata(cairn_gguf_writer *w, const addition *add)
{
    const gguf *file = &add->source->file;
    cairn_status st = CAIRN_OK;
    gguf_value *values = cairn_alloc_array(file->n_values, sizeof *values);
    if (values == NULL) return cairn_fail(CAIRN_NO_MEMORY, "list of %zu keys", file->n_values);
    memcpy(values, file->values, file->n_values * sizeof *values);
    qsort(values, file->n_values, sizeof *values, by_place);
    for (size_t i = 0; i < file->n_values && st == CAIRN_OK; i++) st = put_key(w, &values[i], add);
    cairn_free(values);
    return st;
}

cairn_status cairn_train_export_like(const cairn_train_layout *layout, const float *params, const cairn_model *source,
                                     uint32_t window, cairn_gguf_type type, const char *path)
{
    addition add = {
        .source = source, .token = layout->shape.vocab != source->info.vocab, .file_type = file_type_of(type)};
    cairn_gguf_writer *w = NULL;
    cairn_status st = check_fit(layout, source);
    if (st != CAIRN_OK) return st;
    snprintf(add.vocab_size, sizeof add.vocab_size, "%s.vocab_size", source->info.architecture);
    if (add.token) choose_name(&add);
    if ((st = cairn_gguf_writer_new(&w)) != CAIRN_OK) goto out;
    if ((st = put_metadata(w, &add)) != CAIRN_OK) goto out;
    st = cairn_train_put_landmarks(w, layout, params, cairn_train_adapt_landmark(layout, source), window);
    if (st != CAIRN_OK) goto out;
    if ((st = cairn_train_put_tensors(w, layout, params, type)) != CAIRN_OK) goto out;
    st = cairn_gguf_writer_save(w, path);
out:
    cairn_gguf_writer_free(w);
    return st;
}
