/* tiny_model.h - writes small models of random weights, for the tests of the model room. */
#ifndef CAIRN_TESTS_TINY_MODEL_H
#define CAIRN_TESTS_TINY_MODEL_H

#include "support.h"

#include <cairn/model.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct tiny_model {
    const char *architecture;
    uint32_t width, layers, heads, kv_heads, head_dim, hidden;
    cairn_gguf_type type; /* of matrices */
    bool tied;
    uint32_t block_tokens; /* C; 0 = an ordinary model */
    const char *position;  /* "clamped" or "stingy" */
    bool local_first;      /* layer 0 never retrieves */
    uint64_t seed;
    uint32_t vocab; /* rows, for a tokenizer the test puts in itself; 0 = the byte vocabulary */
} tiny_model;

static inline tiny_model tiny_model_default(void)
{
    return (tiny_model){.architecture = "qwen3",
                        .width = 64,
                        .layers = 3,
                        .heads = 4,
                        .kv_heads = 2,
                        .head_dim = 16,
                        .hidden = 96,
                        .type = CAIRN_GGUF_F32,
                        .block_tokens = 7,
                        .position = "clamped",
                        .local_first = true,
                        .seed = 1};
}

static inline void tiny_put_matrix(cairn_gguf_writer *w, const tiny_model *m, test_random *r, const char *name,
                                   uint64_t cols, uint64_t rows)
{
    float *x = malloc(cols * rows * sizeof *x);
    assert_non_null(x);
    test_random_fill(r, x, cols * rows);
    for (uint64_t i = 0; i < cols * rows; i++) x[i] *= 1.5f / sqrtf((float)cols);
    assert_ok(cairn_gguf_put_tensor(w, name, m->type, (uint64_t[]){cols, rows}, 2, x));
    free(x);
}

static inline void tiny_put_norm(cairn_gguf_writer *w, test_random *r, const char *name, uint64_t n)
{
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (uint64_t i = 0; i < n; i++) x[i] = 1 + 0.2f * test_random_normal(r);
    assert_ok(cairn_gguf_put_tensor(w, name, CAIRN_GGUF_F32, (uint64_t[]){n}, 1, x));
    free(x);
}

static inline void tiny_put_u32(cairn_gguf_writer *w, const tiny_model *m, const char *rest, uint32_t value)
{
    char key[96];
    snprintf(key, sizeof key, "%s.%s", m->architecture, rest);
    assert_ok(cairn_gguf_put_u32(w, key, value));
}

/* Everything but saving, so that a test can add what should not be there. */
static inline cairn_gguf_writer *tiny_model_begin(const tiny_model *m)
{
    cairn_gguf_writer *w;
    char key[96];
    test_random r = {m->seed};
    bool landmark = m->block_tokens != 0;
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_string(w, "general.architecture", m->architecture));
    assert_ok(cairn_gguf_put_string(w, "general.name", "tiny"));
    tiny_put_u32(w, m, "context_length", 512);
    tiny_put_u32(w, m, "embedding_length", m->width);
    tiny_put_u32(w, m, "block_count", m->layers);
    tiny_put_u32(w, m, "feed_forward_length", m->hidden);
    tiny_put_u32(w, m, "attention.head_count", m->heads);
    tiny_put_u32(w, m, "attention.head_count_kv", m->kv_heads);
    tiny_put_u32(w, m, "attention.key_length", m->head_dim);
    tiny_put_u32(w, m, "attention.value_length", m->head_dim);
    snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", m->architecture);
    assert_ok(cairn_gguf_put_f32(w, key, 1e-5f));
    if (m->vocab == 0) assert_ok(cairn_gguf_put_byte_vocab(w, landmark));
    if (landmark) {
        uint32_t local = 0;
        float bias[64];
        for (uint32_t i = 0; i < m->layers * m->heads; i++) bias[i] = 1 + 0.1f * test_random_normal(&r);
        assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.token_id", 259));
        assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.block_tokens", m->block_tokens));
        assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.top_k", 2));
        assert_ok(cairn_gguf_put_string(w, "cairn.landmark.position", m->position));
        assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.clamp_blocks", 3));
        assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.window_blocks", 1));
        if (m->local_first) {
            assert_ok(cairn_gguf_put_u32s(w, "cairn.landmark.local_layers", &local, 1));
            assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.local_window_blocks", 1));
        }
        assert_ok(cairn_gguf_put_f32s(w, "cairn.landmark.bias", bias, m->layers * m->heads));
    }
    uint32_t vocab = m->vocab != 0 ? m->vocab : landmark ? 260 : 259;
    tiny_put_matrix(w, m, &r, "token_embd.weight", m->width, vocab);
    tiny_put_norm(w, &r, "output_norm.weight", m->width);
    if (!m->tied) tiny_put_matrix(w, m, &r, "output.weight", m->width, vocab);
    for (uint32_t l = 0; l < m->layers; l++) {
        const struct {
            const char *name;
            uint32_t cols, rows;
        } parts[] = {{"attn_norm", m->width, 0},
                     {"attn_q", m->width, m->heads * m->head_dim},
                     {"attn_k", m->width, m->kv_heads * m->head_dim},
                     {"attn_v", m->width, m->kv_heads * m->head_dim},
                     {"attn_output", m->heads * m->head_dim, m->width},
                     {"attn_q_norm", m->head_dim, 0},
                     {"attn_k_norm", m->head_dim, 0},
                     {"ffn_norm", m->width, 0},
                     {"ffn_gate", m->width, m->hidden},
                     {"ffn_up", m->width, m->hidden},
                     {"ffn_down", m->hidden, m->width}};
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            if (strcmp(m->architecture, "qwen3") != 0 && strstr(parts[i].name, "_norm") != NULL &&
                (strstr(parts[i].name, "_q_") != NULL || strstr(parts[i].name, "_k_") != NULL))
                continue;
            snprintf(key, sizeof key, "blk.%u.%s.weight", l, parts[i].name);
            if (parts[i].rows == 0)
                tiny_put_norm(w, &r, key, parts[i].cols);
            else
                tiny_put_matrix(w, m, &r, key, parts[i].cols, parts[i].rows);
        }
    }
    return w;
}

static inline void tiny_model_write(const tiny_model *m, const char *path)
{
    cairn_gguf_writer *w = tiny_model_begin(m);
    assert_ok(cairn_gguf_writer_save(w, path));
    cairn_gguf_writer_free(w);
}

#endif
