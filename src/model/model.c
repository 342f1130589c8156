/* model.c - what a GGUF file means: geometry, weights, attention shape, identity. */
#include "model_internal.h"

#include <math.h>
#include <stdio.h>

enum {
    LAYERS_MAX = 4096,
    HEADS_MAX = 4096,
    HEAD_DIM_MAX = 1024,
    WIDTH_MAX = 1 << 20,
    VOCAB_MAX = 1 << 26,
    DENSE_BLOCK_TOKENS = 64, /* an ordinary model's rows are computed and kept in blocks too */
};

/* ---- keys ---- */

typedef struct key_name {
    char text[128];
} key_name;

/* "llama" and "attention.head_count" make "llama.attention.head_count". */
static key_name arch_key(const cairn_model *m, const char *rest)
{
    key_name key;
    snprintf(key.text, sizeof key.text, "%s.%s", m->info.architecture, rest);
    return key;
}

static cairn_status arch_u32(const cairn_model *m, const char *rest, uint32_t *out)
{
    return gguf_u32(&m->file, arch_key(m, rest).text, out);
}

/* One that must be there, from 1 to `most`. */
static cairn_status arch_count(const cairn_model *m, const char *rest, uint32_t most, uint32_t *out)
{
    key_name key = arch_key(m, rest);
    if (gguf_find(&m->file, key.text) == NULL) return cairn_fail(CAIRN_INVALID, "key '%s' is missing", key.text);
    cairn_status st = gguf_u32(&m->file, key.text, out);
    if (st != CAIRN_OK) return st;
    if (*out < 1 || *out > most)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %u, must be 1..%u", key.text, *out, most);
    return CAIRN_OK;
}

/* Keys that would change results if they were passed over. */
static cairn_status refuse_what_we_do_not_do(const cairn_model *m)
{
    static const char *const counts[] = {"expert_count", "attention.sliding_window", "pooling_type",
                                         "rope.dimension_count_swa"};
    static const char *const factors[] = {/* and the value that changes nothing */
                                          "logit_scale",     "embedding_scale",   "residual_scale",
                                          "attention.scale", "rope.scale_linear", "rope.scaling.attn_factor"};
    static const char *const others[] = {"attention.clamp_kqv",         "attention.max_alibi_bias",
                                         "attention.key_length_mla",    "rope.dimension_sections",
                                         "attention.logit_softcapping", "final_logit_softcapping",
                                         "attn_logit_softcapping"};
    cairn_status st;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        key_name key = arch_key(m, counts[i]);
        uint32_t value = 0;
        if ((st = gguf_u32(&m->file, key.text, &value)) != CAIRN_OK) return st;
        if (value != 0) return cairn_fail(CAIRN_UNSUPPORTED, "key '%s' is %u: not supported", key.text, value);
    }
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++) {
        key_name key = arch_key(m, factors[i]);
        float value = 1;
        if ((st = gguf_f32(&m->file, key.text, &value)) != CAIRN_OK) return st;
        if (value != 1 && value != 0)
            return cairn_fail(CAIRN_UNSUPPORTED, "key '%s' is %g: not supported", key.text, (double)value);
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        key_name key = arch_key(m, others[i]);
        if (gguf_find(&m->file, key.text) != NULL)
            return cairn_fail(CAIRN_UNSUPPORTED, "key '%s': not supported", key.text);
    }
    key_name causal_key = arch_key(m, "attention.causal");
    bool causal = true;
    if ((st = gguf_bool(&m->file, causal_key.text, &causal)) != CAIRN_OK) return st;
    if (!causal) return cairn_fail(CAIRN_UNSUPPORTED, "key '%s' is false: not supported", causal_key.text);

    key_name scaling_key = arch_key(m, "rope.scaling.type");
    gguf_text scaling = {"none", 4};
    float factor = 1;
    if ((st = gguf_string(&m->file, scaling_key.text, &scaling)) != CAIRN_OK) return st;
    if ((st = gguf_f32(&m->file, arch_key(m, "rope.scaling.factor").text, &factor)) != CAIRN_OK) return st;
    if (!gguf_text_is(scaling, "none") && !(gguf_text_is(scaling, "linear") && (factor == 1 || factor == 0)))
        return cairn_fail(CAIRN_UNSUPPORTED, "key '%s' is '%s' (factor %g): scaled rotary embeddings are not supported",
                          scaling_key.text, gguf_show(scaling).text, (double)factor);
    return CAIRN_OK;
}

static void read_name(cairn_model *m, const char *fallback)
{
    gguf_text name = {fallback, strlen(fallback)};
    const gguf_value *value = gguf_find(&m->file, "general.name");
    if (value != NULL && !value->array && value->type == GGUF_STRING) {
        size_t at = 0;
        gguf_text given = gguf_next_string(value, &at);
        if (given.bytes != 0) name = given;
    }
    size_t n = name.bytes < sizeof m->info.name ? name.bytes : sizeof m->info.name - 1;
    while (n < name.bytes && n > 0 && ((uint8_t)name.data[n] & 0xc0) == 0x80) n--; /* not inside a character */
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)name.data[i];
        m->info.name[i] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    m->info.name[n] = 0;
}

static cairn_status read_geometry(cairn_model *m)
{
    cairn_model_info *info = &m->info;
    gguf_text architecture = {"", 0};
    cairn_status st;
    if ((st = gguf_string(&m->file, "general.architecture", &architecture)) != CAIRN_OK) return st;
    if (architecture.bytes == 0) return cairn_fail(CAIRN_INVALID, "key 'general.architecture' is missing");
    if (!gguf_text_is(architecture, "llama") && !gguf_text_is(architecture, "qwen3"))
        return cairn_fail(CAIRN_UNSUPPORTED, "architecture '%s': llama and qwen3 are supported",
                          gguf_show(architecture).text);
    memcpy(info->architecture, architecture.data, architecture.bytes);
    if ((st = refuse_what_we_do_not_do(m)) != CAIRN_OK) return st;

    if ((st = arch_count(m, "embedding_length", WIDTH_MAX, &info->width)) != CAIRN_OK) return st;
    if ((st = arch_count(m, "block_count", LAYERS_MAX, &info->layers)) != CAIRN_OK) return st;
    if ((st = arch_count(m, "feed_forward_length", WIDTH_MAX, &info->hidden)) != CAIRN_OK) return st;
    if ((st = arch_count(m, "attention.head_count", HEADS_MAX, &info->heads)) != CAIRN_OK) return st;
    info->kv_heads = info->heads;
    if ((st = arch_u32(m, "attention.head_count_kv", &info->kv_heads)) != CAIRN_OK) return st;
    if (info->kv_heads < 1 || info->heads % info->kv_heads != 0)
        return cairn_fail(CAIRN_INVALID, "%u query heads over %u key/value heads", info->heads, info->kv_heads);

    key_name key_length = arch_key(m, "attention.key_length");
    if (gguf_find(&m->file, key_length.text) == NULL && info->width % info->heads != 0)
        return cairn_fail(CAIRN_INVALID, "key '%s' is missing and width %u is no multiple of %u heads", key_length.text,
                          info->width, info->heads);
    info->head_dim = info->width / info->heads;
    if ((st = gguf_u32(&m->file, key_length.text, &info->head_dim)) != CAIRN_OK) return st;
    if (info->head_dim < 2 || info->head_dim > HEAD_DIM_MAX || info->head_dim % 2 != 0)
        return cairn_fail(CAIRN_INVALID, "heads of %u dimensions: must be even, 2..%d", info->head_dim, HEAD_DIM_MAX);
    uint32_t value_length = info->head_dim;
    if ((st = arch_u32(m, "attention.value_length", &value_length)) != CAIRN_OK) return st;
    if (value_length != info->head_dim)
        return cairn_fail(CAIRN_UNSUPPORTED, "keys of %u and values of %u dimensions", info->head_dim, value_length);

    key_name eps = arch_key(m, "attention.layer_norm_rms_epsilon");
    m->norm_eps = NAN;
    if ((st = gguf_f32(&m->file, eps.text, &m->norm_eps)) != CAIRN_OK) return st;
    if (!(m->norm_eps > 0 && m->norm_eps < 1))
        return cairn_fail(CAIRN_INVALID, "key '%s' is missing or not between 0 and 1", eps.text);
    if ((st = gguf_u32(&m->file, "cairn.xl.segment", &info->xl_segment)) != CAIRN_OK) return st;
    return arch_u32(m, "context_length", &info->train_window);
}

/* ---- tensors ---- */

typedef struct tensor_name {
    char text[72];
} tensor_name;

static tensor_name layer_tensor(uint32_t layer, const char *part)
{
    tensor_name name;
    snprintf(name.text, sizeof name.text, "blk.%u.%s.weight", layer, part);
    return name;
}

static const gguf_tensor *expect(cairn_model *m, const char *name, uint64_t cols, uint64_t rows, cairn_status *st)
{
    const gguf_tensor *t = gguf_find_tensor(&m->file, name);
    if (t == NULL) {
        *st = cairn_fail(CAIRN_INVALID, "tensor '%s' is missing", name);
        return NULL;
    }
    m->file.tensors[t - m->file.tensors].used = true;
    if (t->dims[0] != cols || t->dims[1] != rows || t->dims[2] != 1 || t->dims[3] != 1) {
        *st = cairn_fail(CAIRN_INVALID, "tensor '%s' is %llu x %llu x %llu x %llu, expected %llu x %llu", name,
                         (unsigned long long)t->dims[0], (unsigned long long)t->dims[1], (unsigned long long)t->dims[2],
                         (unsigned long long)t->dims[3], (unsigned long long)cols, (unsigned long long)rows);
        return NULL;
    }
    if (t->type != CAIRN_GGUF_F32 && t->type != CAIRN_GGUF_F16 && t->type != CAIRN_GGUF_BF16 &&
        (t->type != CAIRN_GGUF_Q8_0 || rows == 1)) {
        *st = cairn_fail(CAIRN_UNSUPPORTED,
                         "tensor '%s' has type %s (%u): F32, F16, BF16 and, in matrices, Q8_0 are read", name,
                         gguf_type_name(t->type), t->type);
        return NULL;
    }
    *st = CAIRN_OK;
    return t;
}

static cairn_status read_weight(cairn_model *m, const char *name, uint32_t cols, uint32_t rows, weight *out)
{
    cairn_status st;
    const gguf_tensor *t = expect(m, name, cols, rows, &st);
    if (t == NULL) return st;
    out->data = t->data;
    out->rows = rows;
    out->cols = cols;
    switch (t->type) {
    case CAIRN_GGUF_F32: out->type = CAIRN_W_F32; break;
    case CAIRN_GGUF_F16: out->type = CAIRN_W_F16; break;
    case CAIRN_GGUF_BF16: out->type = CAIRN_W_BF16; break;
    default: out->type = CAIRN_W_Q8_0; break;
    }
    return CAIRN_OK;
}

/* Norm weights are few and used in every row: copied as f32. *at moves through m->norms. */
static cairn_status read_norm(cairn_model *m, const char *name, uint32_t n, float **at, const float **out)
{
    cairn_status st;
    const gguf_tensor *t = expect(m, name, n, 1, &st);
    if (t == NULL) return st;
    cairn_dtype dtype = t->type == CAIRN_GGUF_F32 ? CAIRN_F32 : t->type == CAIRN_GGUF_F16 ? CAIRN_F16 : CAIRN_BF16;
    cairn_kernels_best()->widen(*at, t->data, dtype, n);
    for (uint32_t i = 0; i < n; i++)
        if (!isfinite((*at)[i])) return cairn_fail(CAIRN_INVALID, "tensor '%s': weight %u is not finite", name, i);
    *out = *at;
    *at += n;
    return CAIRN_OK;
}

/* Llama 3.1's: a factor for each pair that rotates, by which it turns slower. */
static cairn_status read_rope_factors(cairn_model *m, float **at)
{
    const char *name = "rope_freqs.weight";
    uint32_t dims = m->info.head_dim;
    cairn_status st;
    if (gguf_find_tensor(&m->file, name) == NULL) return CAIRN_OK;
    if ((st = gguf_u32(&m->file, arch_key(m, "rope.dimension_count").text, &dims)) != CAIRN_OK) return st;
    if (dims > m->info.head_dim) dims = m->info.head_dim; /* refused with its number later */
    return read_norm(m, name, dims / 2, at, &m->rope_factors);
}

static cairn_status read_layer(cairn_model *m, uint32_t i, float **norms)
{
    const cairn_model_info *info = &m->info;
    model_layer *layer = &m->layers[i];
    uint32_t q = info->heads * info->head_dim; /* at most 2^22 */
    uint32_t kv = info->kv_heads * info->head_dim;
    const struct {
        const char *part;
        uint32_t cols, rows;
        weight *to;
    } weights[] = {
        {"attn_q", info->width, q, &layer->q},
        {"attn_k", info->width, kv, &layer->k},
        {"attn_v", info->width, kv, &layer->v},
        {"attn_output", q, info->width, &layer->o},
        {"ffn_gate", info->width, info->hidden, &layer->gate},
        {"ffn_up", info->width, info->hidden, &layer->up},
        {"ffn_down", info->hidden, info->width, &layer->down},
    };
    cairn_status st;
    for (size_t w = 0; w < sizeof weights / sizeof *weights; w++) {
        tensor_name name = layer_tensor(i, weights[w].part);
        st = read_weight(m, name.text, weights[w].cols, weights[w].rows, weights[w].to);
        if (st != CAIRN_OK) return st;
    }
    st = read_norm(m, layer_tensor(i, "attn_norm").text, info->width, norms, &layer->attn_norm);
    if (st != CAIRN_OK) return st;
    st = read_norm(m, layer_tensor(i, "ffn_norm").text, info->width, norms, &layer->ffn_norm);
    if (st != CAIRN_OK || strcmp(info->architecture, "qwen3") != 0) return st;
    st = read_norm(m, layer_tensor(i, "attn_q_norm").text, info->head_dim, norms, &layer->q_norm);
    if (st != CAIRN_OK) return st;
    return read_norm(m, layer_tensor(i, "attn_k_norm").text, info->head_dim, norms, &layer->k_norm);
}

/* A tensor nobody asked for would change results if the file's maker meant it to be used. */
static cairn_status refuse_unused_tensors(const cairn_model *m)
{
    for (size_t i = 0; i < m->file.n_tensors; i++) {
        const gguf_tensor *t = &m->file.tensors[i];
        if (t->used) continue;
        return cairn_fail(CAIRN_UNSUPPORTED, "tensor '%s' is not part of a %s model of %u layers as known here",
                          gguf_show(t->name).text, m->info.architecture, m->info.layers);
    }
    return CAIRN_OK;
}

static cairn_status read_tensors(cairn_model *m)
{
    cairn_model_info *info = &m->info;
    cairn_status st;
    const gguf_tensor *embedding = gguf_find_tensor(&m->file, "token_embd.weight");
    if (embedding == NULL) return cairn_fail(CAIRN_INVALID, "tensor 'token_embd.weight' is missing");
    if (embedding->dims[1] > VOCAB_MAX)
        return cairn_fail(CAIRN_INVALID, "tensor 'token_embd.weight' has %llu rows, more than %d",
                          (unsigned long long)embedding->dims[1], VOCAB_MAX);
    info->vocab = (uint32_t)embedding->dims[1];
    if ((st = read_weight(m, "token_embd.weight", info->width, info->vocab, &m->embedding)) != CAIRN_OK) return st;
    m->output = m->embedding; /* tied, unless the file has its own */
    if (gguf_find_tensor(&m->file, "output.weight") != NULL) {
        st = read_weight(m, "output.weight", info->width, info->vocab, &m->output);
        if (st != CAIRN_OK) return st;
    }

    /* Per layer two norms of the width and perhaps two of the head; one of the width and perhaps the rope factors at
     * the end. The layers have to be there before their tables are made: a file of a few bytes may claim 4096 of them.
     */
    tensor_name last = layer_tensor(info->layers - 1, "attn_norm");
    if (gguf_find_tensor(&m->file, last.text) == NULL)
        return cairn_fail(CAIRN_INVALID, "tensor '%s' is missing", last.text);
    size_t norms =
        (size_t)info->layers * 2 * (info->width + info->head_dim) + info->width + info->head_dim; /* < 2^35 */
    m->layers = cairn_calloc(info->layers, sizeof *m->layers);
    m->norms = cairn_alloc_array(norms, sizeof *m->norms);
    if (m->layers == NULL || m->norms == NULL) return cairn_fail(CAIRN_NO_MEMORY, "tables of %u layers", info->layers);
    float *at = m->norms;
    if ((st = read_norm(m, "output_norm.weight", info->width, &at, &m->output_norm)) != CAIRN_OK) return st;
    for (uint32_t i = 0; i < info->layers; i++)
        if ((st = read_layer(m, i, &at)) != CAIRN_OK) return st;
    if ((st = read_rope_factors(m, &at)) != CAIRN_OK) return st;
    for (size_t i = 0; i < m->file.n_tensors; i++) {
        const uint64_t *d = m->file.tensors[i].dims; /* the bytes exist, so the product is sane */
        info->parameters += d[0] * d[1] * d[2] * d[3];
    }
    return refuse_unused_tensors(m);
}

/* ---- attention ---- */

static cairn_status landmark_u32(const cairn_model *m, const char *key, uint32_t *out)
{
    if (gguf_find(&m->file, key) == NULL)
        return cairn_fail(CAIRN_INVALID, "key '%s' is missing from a landmark model", key);
    return gguf_u32(&m->file, key, out);
}

/* Keys of a later version might mean that this one computes something else. */
static cairn_status refuse_unknown_landmark_keys(const cairn_model *m)
{
    static const char prefix[] = "cairn.landmark.";
    static const char *const known[] = {"token_id", "block_tokens",       "train_window",  "top_k",
                                        "position", "clamp_blocks",       "window_blocks", "local_layers",
                                        "bias",     "local_window_blocks"};
    size_t n = sizeof prefix - 1;
    for (size_t i = 0; i < m->file.n_values; i++) {
        gguf_text key = m->file.values[i].key;
        if (key.bytes < n || memcmp(key.data, prefix, n) != 0) continue;
        gguf_text rest = {key.data + n, key.bytes - n};
        bool found = false;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++) found |= gguf_text_is(rest, known[k]);
        if (!found) return cairn_fail(CAIRN_UNSUPPORTED, "key '%s' is not known", gguf_show(key).text);
        if (gguf_find(&m->file, "cairn.landmark.token_id") == NULL)
            return cairn_fail(CAIRN_INVALID, "key '%s' without 'cairn.landmark.token_id'", gguf_show(key).text);
    }
    return CAIRN_OK;
}

static cairn_status read_local_layers(cairn_model *m)
{
    const char *key = "cairn.landmark.local_layers";
    const gguf_value *value = gguf_find(&m->file, key);
    if (value == NULL || (value->array && value->count == 0)) return CAIRN_OK;
    if (!value->array) return cairn_fail(CAIRN_INVALID, "key '%s' is not an array", key);
    m->local_layers = cairn_calloc(m->info.layers, 1);
    if (m->local_layers == NULL) return cairn_fail(CAIRN_NO_MEMORY, "flags of %u layers", m->info.layers);
    for (size_t i = 0; i < value->count; i++) {
        int64_t layer;
        if (!gguf_value_integer(value, i, &layer)) return cairn_fail(CAIRN_INVALID, "key '%s' holds no integers", key);
        if (layer < 0 || layer >= m->info.layers)
            return cairn_fail(CAIRN_INVALID, "key '%s' names layer %lld of %u", key, (long long)layer, m->info.layers);
        m->local_layers[layer] = 1;
    }
    m->shape.local_layers = m->local_layers;
    return landmark_u32(m, "cairn.landmark.local_window_blocks", &m->shape.local_window_blocks);
}

static cairn_status read_bias(cairn_model *m)
{
    const char *key = "cairn.landmark.bias";
    const gguf_value *value = gguf_find(&m->file, key);
    if (value == NULL) return CAIRN_OK;
    size_t n = (size_t)m->info.layers * m->info.heads; /* at most 2^24 */
    if (!value->array || value->count != n)
        return cairn_fail(CAIRN_INVALID, "key '%s' has %zu elements for %u layers of %u heads", key, value->count,
                          m->info.layers, m->info.heads);
    m->landmark_bias = cairn_alloc_array(n, sizeof *m->landmark_bias);
    if (m->landmark_bias == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu landmark biases", n);
    for (size_t i = 0; i < n; i++) {
        double bias;
        if (!gguf_value_float(value, i, &bias) || !isfinite(bias))
            return cairn_fail(CAIRN_INVALID, "key '%s': element %zu is no finite float", key, i);
        m->landmark_bias[i] = (float)bias;
    }
    m->shape.landmark_bias = m->landmark_bias;
    return CAIRN_OK;
}

static cairn_status read_landmark(cairn_model *m)
{
    cairn_attention_shape *shape = &m->shape;
    uint32_t token = 0;
    gguf_text position = {"", 0};
    cairn_status st;
    m->info.landmark = -1;
    if ((st = refuse_unknown_landmark_keys(m)) != CAIRN_OK) return st;
    if (gguf_find(&m->file, "cairn.landmark.token_id") == NULL) {
        shape->scheme = CAIRN_POSITION_DENSE;
        shape->block_tokens = DENSE_BLOCK_TOKENS;
        shape->top_k = 0;
        return CAIRN_OK;
    }
    if ((st = gguf_u32(&m->file, "cairn.landmark.token_id", &token)) != CAIRN_OK) return st;
    if (token >= m->info.vocab)
        return cairn_fail(CAIRN_INVALID, "key 'cairn.landmark.token_id' is %u, the vocabulary has %u tokens", token,
                          m->info.vocab);
    m->info.landmark = (cairn_token)token;
    if ((st = landmark_u32(m, "cairn.landmark.block_tokens", &shape->block_tokens)) != CAIRN_OK) return st;
    if ((st = landmark_u32(m, "cairn.landmark.top_k", &shape->top_k)) != CAIRN_OK) return st;
    if ((st = gguf_u32(&m->file, "cairn.landmark.train_window", &m->info.train_window)) != CAIRN_OK) return st;
    if ((st = gguf_string(&m->file, "cairn.landmark.position", &position)) != CAIRN_OK) return st;
    if (gguf_text_is(position, "clamped")) {
        shape->scheme = CAIRN_POSITION_CLAMPED;
        if ((st = landmark_u32(m, "cairn.landmark.clamp_blocks", &shape->clamp_blocks)) != CAIRN_OK) return st;
        if ((st = landmark_u32(m, "cairn.landmark.window_blocks", &shape->window_blocks)) != CAIRN_OK) return st;
    } else if (gguf_text_is(position, "stingy")) {
        shape->scheme = CAIRN_POSITION_STINGY;
    } else {
        return cairn_fail(CAIRN_INVALID, "key 'cairn.landmark.position' is '%s': 'clamped' or 'stingy'",
                          gguf_show(position).text);
    }
    if ((st = read_local_layers(m)) != CAIRN_OK) return st;
    return read_bias(m);
}

static cairn_status read_attention(cairn_model *m)
{
    const cairn_model_info *info = &m->info;
    cairn_attention_shape *shape = &m->shape;
    cairn_status st;
    cairn_attention_shape_init(shape, sizeof *shape);
    shape->layers = info->layers;
    shape->heads = info->heads;
    shape->kv_heads = info->kv_heads;
    shape->head_dim = info->head_dim;
    shape->rope_interleaved = strcmp(info->architecture, "llama") == 0;
    shape->rope_dims = info->head_dim;
    shape->rope_theta = 10000;
    key_name dims = arch_key(m, "rope.dimension_count");
    key_name theta = arch_key(m, "rope.freq_base");
    if ((st = gguf_u32(&m->file, dims.text, &shape->rope_dims)) != CAIRN_OK) return st;
    if (shape->rope_dims < 2 || shape->rope_dims > info->head_dim || shape->rope_dims % 2 != 0)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %u for heads of %u dimensions", dims.text, shape->rope_dims,
                          info->head_dim);
    if ((st = gguf_f32(&m->file, theta.text, &shape->rope_theta)) != CAIRN_OK) return st;
    if (!isfinite(shape->rope_theta) || shape->rope_theta <= 0)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %g", theta.text, (double)shape->rope_theta);
    shape->rope_factors = m->rope_factors;
    if ((st = read_landmark(m)) != CAIRN_OK) return st;
    return cairn_attention_shape_check(shape);
}

/* ---- the whole model ---- */

static cairn_status read_vocabulary(cairn_model *m)
{
    cairn_model_info *info = &m->info;
    uint32_t claimed = info->vocab;
    cairn_status st;
    if ((st = arch_u32(m, "vocab_size", &claimed)) != CAIRN_OK) return st;
    if (claimed != info->vocab)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %u, token_embd.weight has %u rows",
                          arch_key(m, "vocab_size").text, claimed, info->vocab);
    if ((st = vocab_read(&m->file, info->vocab, &m->vocab)) != CAIRN_OK) return st;
    info->bos = m->vocab.bos;
    info->eos = m->vocab.eos;
    info->unk = m->vocab.unk;
    info->add_bos = m->vocab.add_bos && info->bos >= 0;
    info->byte_tokens = m->vocab.kind == VOCAB_BYTES;
    return CAIRN_OK;
}

/* Which tokens are never sampled: those without text, and the landmark. The end of text stays possible where it may
 * have been learnt; a vocabulary of bytes is of a model that continues text and has never seen it. */
static cairn_status mask_tokens(cairn_model *m)
{
    const vocab *v = &m->vocab;
    m->masked = cairn_calloc(m->info.vocab, 1);
    if (m->masked == NULL) return cairn_fail(CAIRN_NO_MEMORY, "flags of %u tokens", m->info.vocab);
    for (uint32_t id = 0; v->kinds != NULL && id < v->n; id++) {
        uint8_t kind = v->kinds[id];
        bool end = v->kind != VOCAB_BYTES && (cairn_token)id == v->eos;
        m->masked[id] = !end && (kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN || kind == TOKEN_UNUSED);
    }
    if (m->info.landmark >= 0) m->masked[m->info.landmark] = 1;
    return CAIRN_OK;
}

cairn_status model_from_gguf(gguf *file, const char *name, cairn_model **out)
{
    cairn_status st;
    cairn_model *m = cairn_calloc(1, sizeof *m);
    *out = NULL;
    if (m == NULL) {
        gguf_close(file);
        return cairn_fail(CAIRN_NO_MEMORY, "model %s", name);
    }
    m->file = *file;
    memset(file, 0, sizeof *file);
    m->info.file_bytes = m->file.bytes;
    read_name(m, name);
    if ((st = read_geometry(m)) != CAIRN_OK) goto out;
    if ((st = read_tensors(m)) != CAIRN_OK) goto out;
    if ((st = read_vocabulary(m)) != CAIRN_OK) goto out;
    if ((st = read_attention(m)) != CAIRN_OK) goto out;
    if ((st = mask_tokens(m)) != CAIRN_OK) goto out;
    *out = m;
    m = NULL;
out:
    cairn_model_close(m);
    return st;
}

cairn_status cairn_model_open(const char *path, cairn_model **out)
{
    gguf file;
    *out = NULL;
    cairn_status st = gguf_open(path, &file);
    if (st != CAIRN_OK) return st;
    const char *slash = strrchr(path, '/');
    st = model_from_gguf(&file, slash != NULL ? slash + 1 : path, out);
    return st == CAIRN_OK ? st : cairn_fail_within(st, "model %s", path);
}

void cairn_model_close(cairn_model *model)
{
    if (model == NULL) return;
    vocab_wipe(&model->vocab);
    cairn_free(model->local_layers);
    cairn_free(model->landmark_bias);
    cairn_free(model->layers);
    cairn_free(model->norms);
    cairn_free(model->masked);
    gguf_close(&model->file);
    cairn_free(model);
}

void cairn_model_info_get(const cairn_model *model, cairn_model_info *out)
{
    *out = model->info;
}

const cairn_attention_shape *cairn_model_shape(const cairn_model *model)
{
    return &model->shape;
}

void cairn_model_geometry(const cairn_model *model, cairn_dtype dtype, cairn_geometry *out)
{
    const cairn_attention_shape *shape = &model->shape;
    memset(out, 0, sizeof *out);
    out->layers = shape->layers;
    /* K and V of layer 0 follow from token and offset alone; where nothing old is looked up in it, none are stored. */
    out->first_layer = shape->layers > 1 && shape->local_layers != NULL && shape->local_layers[0] != 0 ? 1 : 0;
    out->kv_heads = shape->kv_heads;
    out->head_dim = shape->head_dim;
    out->block_tokens = shape->block_tokens;
    out->dtype = dtype;
}

cairn_status cairn_model_encode(const cairn_model *model, const void *text, size_t bytes, cairn_token *out, size_t cap,
                                size_t *out_n)
{
    return vocab_encode(&model->vocab, text, bytes, out, cap, out_n);
}

size_t cairn_model_decode(const cairn_model *model, cairn_token token, char *out, size_t cap)
{
    return vocab_decode(&model->vocab, token, out, cap);
}
