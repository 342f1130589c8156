/* identity.c - one number that tells whether a store belongs to a model.
 *
 * XXH3-64 over, in this order and little-endian: a version word; the architecture; the geometry and attention shape;
 * the tokenizer's kind, pieces, scores and kinds as the file has them; of each tensor, in order of names, its name,
 * type, dimensions and data. The file's name, general.name and all other keys do not count, nor does the order of
 * tensors.
 *
 * Files above 256 MiB would take long to read for a number: there, each tensor above 64 KiB gives 16 windows of 4 KiB,
 * spread evenly from its first byte to its last. Another training run or quantization changes nearly every window; a
 * change made between the windows goes unnoticed. */
#include "model_internal.h"

enum {
    IDENTITY_VERSION = 1,
    WHOLE_FILE_BYTES = 256 << 20,
    WHOLE_TENSOR_BYTES = 64 << 10,
    WINDOW_BYTES = 4096,
    WINDOWS = 16,
};

static void add_u64(cairn_hasher *h, uint64_t value)
{
    uint8_t bytes[8];
    cairn_put_le64(bytes, value);
    cairn_hasher_add(h, bytes, sizeof bytes);
}

static void add_f32(cairn_hasher *h, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    add_u64(h, bits);
}

static void add_text(cairn_hasher *h, const void *data, size_t bytes)
{
    add_u64(h, bytes);
    if (bytes != 0) cairn_hasher_add(h, data, bytes);
}

static void add_shape(cairn_hasher *h, const cairn_model *m)
{
    const cairn_model_info *info = &m->info;
    const cairn_attention_shape *s = &m->shape;
    add_text(h, info->architecture, strlen(info->architecture));
    const uint64_t numbers[] = {info->vocab,      info->width,
                                info->hidden,     s->layers,
                                s->heads,         s->kv_heads,
                                s->head_dim,      s->block_tokens,
                                s->rope_dims,     s->rope_interleaved,
                                s->scheme,        s->clamp_blocks,
                                s->window_blocks, s->local_window_blocks,
                                s->top_k,         (uint64_t)info->landmark};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) add_u64(h, numbers[i]);
    add_f32(h, s->rope_theta);
    add_f32(h, m->norm_eps);
    add_text(h, s->local_layers, s->local_layers != NULL ? s->layers : 0);
    size_t biases = s->landmark_bias != NULL ? (size_t)s->layers * s->heads : 0;
    add_u64(h, biases);
    for (size_t i = 0; i < biases; i++) add_f32(h, s->landmark_bias[i]);
}

static void add_key(cairn_hasher *h, const cairn_model *m, const char *key)
{
    const gguf_value *value = gguf_find(&m->file, key);
    add_text(h, value != NULL ? value->data : NULL, value != NULL ? value->bytes : 0);
}

static void add_tensor(cairn_hasher *h, const gguf_tensor *t, bool whole)
{
    add_text(h, t->name.data, t->name.bytes);
    add_u64(h, t->type);
    for (int i = 0; i < 4; i++) add_u64(h, t->dims[i]);
    add_u64(h, t->bytes);
    if (whole || t->bytes <= WHOLE_TENSOR_BYTES) {
        cairn_hasher_add(h, t->data, t->bytes);
        return;
    }
    size_t last = t->bytes - WINDOW_BYTES; /* start of the last window */
    for (size_t i = 0; i < WINDOWS; i++)
        cairn_hasher_add(h, t->data + last / (WINDOWS - 1) * i + last % (WINDOWS - 1) * i / (WINDOWS - 1),
                         WINDOW_BYTES);
}

cairn_status cairn_model_identity(const cairn_model *model, cairn_model_id *out)
{
    memset(out, 0, sizeof *out);
    cairn_hasher *h = cairn_hasher_new();
    if (h == NULL) return cairn_fail(CAIRN_NO_MEMORY, "fingerprint of model %s", model->info.name);
    add_u64(h, IDENTITY_VERSION);
    add_shape(h, model);
    add_text(h, model->vocab.model.data, model->vocab.model.bytes);
    add_key(h, model, "tokenizer.ggml.tokens");
    add_key(h, model, "tokenizer.ggml.scores");
    add_key(h, model, "tokenizer.ggml.token_type");
    add_u64(h, (uint64_t)model->info.bos);
    for (size_t i = 0; i < model->file.n_tensors; i++)
        add_tensor(h, &model->file.tensors[i], model->file.bytes <= WHOLE_FILE_BYTES);
    out->fingerprint = cairn_hasher_value(h);
    if (out->fingerprint == 0) out->fingerprint = 1; /* 0 means unknown */
    memcpy(out->name, model->info.name, sizeof out->name);
    cairn_hasher_free(h);
    return CAIRN_OK;
}
