#include "plain_model.h"

#include <stdio.h>

typedef struct tensor {
    char name[64];
    uint64_t dims[4];
    uint32_t type;
    uint64_t offset;
} tensor;

struct plain_model {
    uint8_t *bytes;
    size_t size, at, data; /* data: where tensors begin */
    tensor *tensors;
    size_t n_tensors;
    char architecture[32];
    uint32_t width, layers, heads, kv_heads, head_dim, hidden, vocab;
    float eps, theta;
    uint32_t block_tokens, clamp_blocks, window_blocks, local_window_blocks;
    uint8_t local[WORLD_LAYERS];
    float bias[WORLD_LAYERS * WORLD_HEADS];
    bool has_bias;
};

static uint64_t take(plain_model *m, size_t bytes)
{
    uint64_t v = 0;
    assert_true(bytes <= m->size - m->at);
    for (size_t i = 0; i < bytes; i++) v |= (uint64_t)m->bytes[m->at + i] << (8 * i);
    m->at += bytes;
    return v;
}
static void take_string(plain_model *m, char *out, size_t cap)
{
    size_t n = (size_t)take(m, 8);
    assert_true(n <= m->size - m->at);
    snprintf(out, cap, "%.*s", (int)n, (const char *)m->bytes + m->at);
    m->at += n;
}
static float as_float(uint64_t bits)
{
    uint32_t low = (uint32_t)bits;
    float f;
    memcpy(&f, &low, sizeof f);
    return f;
}

enum { GGUF_STRING = 8, GGUF_ARRAY = 9, GGUF_FLOAT = 6 };
static const size_t type_bytes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static void meta(plain_model *m, const char *key, uint32_t type)
{
    char text[64] = "";
    uint64_t value = 0;
    if (type == GGUF_STRING) {
        take_string(m, text, sizeof text);
        if (strcmp(key, "general.architecture") == 0) snprintf(m->architecture, sizeof m->architecture, "%.31s", text);
        return;
    }
    if (type == GGUF_ARRAY) {
        uint32_t of = (uint32_t)take(m, 4);
        uint64_t n = take(m, 8);
        if (strcmp(key, "tokenizer.ggml.tokens") == 0) m->vocab = (uint32_t)n;
        for (uint64_t i = 0; i < n; i++) {
            if (of == GGUF_STRING) {
                take_string(m, text, sizeof text);
                continue;
            }
            value = take(m, type_bytes[of]);
            if (strcmp(key, "cairn.landmark.local_layers") == 0 && value < WORLD_LAYERS) m->local[value] = 1;
            if (strcmp(key, "cairn.landmark.bias") == 0) {
                assert_true(i < WORLD_LAYERS * WORLD_HEADS);
                m->bias[i] = as_float(value);
                m->has_bias = true;
            }
        }
        return;
    }
    assert_true(type < 13);
    value = take(m, type_bytes[type]);
    const char *dot = strchr(key, '.'), *tail = dot != NULL ? dot + 1 : key;
    const struct {
        const char *name;
        uint32_t *into;
    } counts[] = {
        {"embedding_length", &m->width},
        {"block_count", &m->layers},
        {"attention.head_count", &m->heads},
        {"attention.head_count_kv", &m->kv_heads},
        {"attention.key_length", &m->head_dim},
        {"feed_forward_length", &m->hidden},
        {"landmark.block_tokens", &m->block_tokens},
        {"landmark.clamp_blocks", &m->clamp_blocks},
        {"landmark.window_blocks", &m->window_blocks},
        {"landmark.local_window_blocks", &m->local_window_blocks},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (strcmp(tail, counts[i].name) == 0) *counts[i].into = (uint32_t)value;
    if (strcmp(tail, "attention.layer_norm_rms_epsilon") == 0) m->eps = as_float(value);
    if (strcmp(tail, "rope.freq_base") == 0) m->theta = as_float(value);
}

static const float *find(const plain_model *m, const char *format, unsigned layer)
{
    char name[64];
    int n = snprintf(name, sizeof name, "blk.%u.%s.weight", layer, format);
    assert_true(n > 0 && (size_t)n < sizeof name);
    if (layer == UINT32_MAX) snprintf(name, sizeof name, "%s.weight", format);
    for (size_t i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0)
            return (const float *)(const void *)(m->bytes + m->data + m->tensors[i].offset); /* malloc'ed, 32-aligned */
    return NULL;
}

plain_model *plain_model_open(const char *path)
{
    plain_model *m = calloc(1, sizeof *m);
    assert_non_null(m);
    m->theta = 10000.0F;
    m->bytes = test_read_file(path, &m->size);
    assert_non_null(m->bytes);
    assert_int_equal(take(m, 4), 0x46554747); /* "GGUF" */
    assert_int_equal(take(m, 4), 3);
    m->n_tensors = (size_t)take(m, 8);
    uint64_t keys = take(m, 8);
    for (uint64_t i = 0; i < keys; i++) {
        char key[128];
        take_string(m, key, sizeof key);
        meta(m, key, (uint32_t)take(m, 4));
    }
    m->tensors = calloc(m->n_tensors, sizeof *m->tensors);
    assert_non_null(m->tensors);
    bool plain = true;
    for (size_t i = 0; i < m->n_tensors; i++) {
        tensor *t = &m->tensors[i];
        take_string(m, t->name, sizeof t->name);
        uint32_t n = (uint32_t)take(m, 4);
        assert_true(n <= 4);
        for (uint32_t d = 0; d < n; d++) t->dims[d] = take(m, 8);
        t->type = (uint32_t)take(m, 4);
        t->offset = take(m, 8);
        plain = plain && t->type == 0;
    }
    m->data = (m->at + 31) / 32 * 32;
    if (m->head_dim == 0 && m->heads > 0) m->head_dim = m->width / m->heads;
    if (m->kv_heads == 0) m->kv_heads = m->heads;
    if (!plain || m->layers > WORLD_LAYERS || m->heads > WORLD_HEADS) {
        print_message("%s: not for the plain forward (F32, at most %d layers, %d heads)\n", path, WORLD_LAYERS,
                      WORLD_HEADS);
        plain_model_close(m);
        return NULL;
    }
    return m;
}

void plain_model_close(plain_model *m)
{
    if (m == NULL) return;
    free(m->bytes);
    free(m->tensors);
    free(m);
}

size_t plain_model_vocab(const plain_model *m)
{
    return m->vocab;
}

/* y (rows) = W (rows, cols) x */
static void product(float *y, const float *weights, size_t rows, size_t cols, const float *x)
{
    for (size_t r = 0; r < rows; r++) {
        double sum = 0.0;
        for (size_t c = 0; c < cols; c++) sum += (double)weights[r * cols + c] * (double)x[c];
        y[r] = (float)sum;
    }
}
static void norm(float *y, const float *x, const float *weight, size_t n, float eps)
{
    double square = 0.0;
    for (size_t i = 0; i < n; i++) square += (double)x[i] * (double)x[i];
    double scale = 1.0 / sqrt(square / (double)n + (double)eps);
    for (size_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * scale * (double)weight[i]);
}

void plain_model_forward(const plain_model *m, const cairn_token *slots, size_t n, uint32_t top_k, int32_t window,
                         world *w, uint8_t **visible, float *logits)
{
    test_random r = {0};
    world_spec spec = {m->layers,
                       m->heads,
                       m->kv_heads,
                       m->head_dim,
                       m->block_tokens,
                       CAIRN_POSITION_CLAMPED,
                       strcmp(m->architecture, "llama") == 0,
                       m->has_bias,
                       n};
    size_t width = m->width, heads = m->heads, kv = m->kv_heads, dim = m->head_dim, inner = heads * dim;
    world_init(w, &r, &spec); /* random rows first; replaced layer by layer */
    memcpy(w->bias, m->bias, sizeof w->bias);
    memcpy(w->local, m->local, sizeof w->local);
    memcpy(w->ids, slots, n * sizeof *slots);
    w->shape.rope_theta = m->theta;
    w->shape.clamp_blocks = m->clamp_blocks;
    w->shape.window_blocks = m->window_blocks;
    w->shape.local_window_blocks = m->local_window_blocks;

    float *x = malloc(n * width * sizeof *x), *h = malloc(width * sizeof *h), *up = malloc(m->hidden * sizeof *up);
    float *gate = malloc(m->hidden * sizeof *gate), *mixed = malloc(n * inner * sizeof *mixed);
    assert_true(x != NULL && h != NULL && up != NULL && gate != NULL && mixed != NULL);
    for (size_t i = 0; i < n; i++)
        memcpy(x + i * width, find(m, "token_embd", UINT32_MAX) + (size_t)slots[i] * width, width * sizeof *x);
    for (uint32_t l = 0; l < m->layers; l++) {
        const float *q_norm = find(m, "attn_q_norm", l), *k_norm = find(m, "attn_k_norm", l);
        for (size_t i = 0; i < n; i++) {
            norm(h, x + i * width, find(m, "attn_norm", l), width, m->eps);
            float *q = w->q[l] + i * inner, *k = w->k[l] + i * kv * dim;
            product(q, find(m, "attn_q", l), inner, width, h);
            product(k, find(m, "attn_k", l), kv * dim, width, h);
            product(w->v[l] + i * kv * dim, find(m, "attn_v", l), kv * dim, width, h);
            for (size_t a = 0; a < heads && q_norm != NULL; a++) norm(q + a * dim, q + a * dim, q_norm, dim, m->eps);
            for (size_t a = 0; a < kv && k_norm != NULL; a++) norm(k + a * dim, k + a * dim, k_norm, dim, m->eps);
        }
        expected_visible_layer(w, l, top_k, window, 0, &visible[l]);
        assert_ok(cairn_attention_reference(&w->shape, l, n, w->q[l], w->k[l], w->v[l], visible[l], mixed));
        for (size_t i = 0; i < n; i++) {
            float *xi = x + i * width;
            product(h, find(m, "attn_output", l), width, inner, mixed + i * inner);
            for (size_t d = 0; d < width; d++) xi[d] += h[d];
            norm(h, xi, find(m, "ffn_norm", l), width, m->eps);
            product(gate, find(m, "ffn_gate", l), m->hidden, width, h);
            product(up, find(m, "ffn_up", l), m->hidden, width, h);
            for (size_t d = 0; d < m->hidden; d++) gate[d] = gate[d] / (1.0F + expf(-gate[d])) * up[d];
            product(h, find(m, "ffn_down", l), width, m->hidden, gate);
            for (size_t d = 0; d < width; d++) xi[d] += h[d];
        }
    }
    const float *head = find(m, "output", UINT32_MAX);
    if (head == NULL) head = find(m, "token_embd", UINT32_MAX);
    for (size_t i = 0; i < n; i++) {
        norm(h, x + i * width, find(m, "output_norm", UINT32_MAX), width, m->eps);
        product(logits + i * m->vocab, head, m->vocab, width, h);
    }
    free(x);
    free(h);
    free(up);
    free(gate);
    free(mixed);
}
