/* model_internal.h - a model as the files of this room see it: weights where the file has them, small things copied. */
#ifndef CAIRN_MODEL_INTERNAL_H
#define CAIRN_MODEL_INTERNAL_H

#include <cairn/model.h>

#include "gguf_internal.h"
#include "kernels_internal.h"

/* ---- vocabulary ---- */

typedef enum vocab_kind {
    VOCAB_NONE,  /* the file has no tokens */
    VOCAB_BYTES, /* 256 byte tokens and control tokens: text byte b is byte_ids[b], nothing else happens */
    VOCAB_SPM,   /* SentencePiece pieces with scores, byte tokens for the rest */
    VOCAB_BPE,   /* GPT-2's byte-level pieces and the order they were joined in */
    VOCAB_OTHER
} vocab_kind;

typedef enum token_kind { /* numbers of tokenizer.ggml.token_type */
                          TOKEN_NORMAL = 1,
                          TOKEN_UNKNOWN = 2,
                          TOKEN_CONTROL = 3,
                          TOKEN_USER_DEFINED = 4,
                          TOKEN_UNUSED = 5,
                          TOKEN_BYTE = 6
} token_kind;

typedef struct bpe bpe;

typedef struct vocab {
    vocab_kind kind;
    gguf_text model; /* tokenizer.ggml.model */
    uint32_t n;
    gguf_text *pieces; /* (n), as in the file */
    float *scores;     /* (n) */
    uint8_t *kinds;    /* (n) token_kind */
    uint32_t *sorted;  /* (n_sorted) ids of the pieces text can become, by their bytes */
    uint32_t n_sorted;
    uint32_t *fixed; /* (n_fixed) ids of user-defined tokens, longest first */
    uint32_t n_fixed;
    bool fixed_first[256];     /* bytes a user-defined token can start with */
    cairn_token byte_ids[256]; /* -1 = no such token */
    bool space_prefix;
    bool pieces_cross_words; /* a piece has a space mark after another character: text cannot be cut at words */
    cairn_token bos, eos, unk;
    bool add_bos;
    bpe *bpe; /* VOCAB_BPE's tables */
} vocab;

/* `rows` is what the embedding has: another number of tokens is INVALID. */
cairn_status vocab_read(const gguf *file, uint32_t rows, vocab *out);
void vocab_wipe(vocab *v);
cairn_status vocab_encode(const vocab *v, const uint8_t *text, size_t bytes, cairn_token *out, size_t cap,
                          size_t *out_n);
size_t vocab_decode(const vocab *v, cairn_token token, char *out, size_t cap);

/* ---- weights ---- */

typedef struct weight { /* (rows, cols) row-major, in the mapped file */
    const uint8_t *data;
    cairn_wtype type;
    uint32_t rows;
    uint32_t cols;
} weight;

static inline size_t weight_row_bytes(const weight *w)
{
    return cairn_wtype_row_bytes(w->type, w->cols);
}

typedef struct model_layer {
    weight q, k, v, o, gate, up, down;
    const float *attn_norm; /* (width) */
    const float *ffn_norm;  /* (width) */
    const float *q_norm;    /* (head_dim), qwen3 only, else NULL */
    const float *k_norm;
} model_layer;

struct cairn_model {
    gguf file;
    cairn_model_info info;
    cairn_attention_shape shape; /* its arrays are the three below */
    uint8_t *local_layers;
    float *landmark_bias;
    const float *rope_factors; /* NULL = none */
    vocab vocab;
    float norm_eps;
    weight embedding; /* (vocab, width) */
    weight output;    /* the embedding, if tied */
    const float *output_norm;
    model_layer *layers;
    float *norms;    /* all norm weights as f32, and the rope factors */
    uint8_t *masked; /* (vocab) 1 = never sampled */
};

/* Takes over `file` (which is closed on failure too). `name` is used where the file gives none. */
cairn_status model_from_gguf(gguf *file, const char *name, cairn_model **out);

#endif
