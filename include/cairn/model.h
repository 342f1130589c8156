/* model.h - GGUF files and the runtime: a Llama-style model whose only K/V memory is a session.
 *
 * Architectures "llama" (RMSNorm, RoPE in interleaved pairs, GQA, SwiGLU) and "qwen3" (the same with RMSNorm on q and k
 * per head and half-split RoPE). Weights F32, F16, BF16, Q8_0, used from the mapped file. A file with cairn.landmark.*
 * metadata is a landmark model; without, it is an ordinary Llama, usable for cairn_model_logits.
 *
 * Threads: a cairn_model may be shared by threads; a cairn_runtime belongs to one thread at a time.
 */
#ifndef CAIRN_MODEL_H
#define CAIRN_MODEL_H

#include <cairn/context.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cairn_model cairn_model;     /* open / close: a mapped GGUF file */
typedef struct cairn_runtime cairn_runtime; /* begin / end: buffers of one stream, over a session */

/* INVALID / CORRUPT names the key, tensor and number that is wrong; UNSUPPORTED an architecture or weight type. */
CAIRN_API cairn_status cairn_model_open(const char *path, cairn_model **out);
CAIRN_API void cairn_model_close(cairn_model *model);

typedef struct cairn_model_info {
    char name[64];
    char architecture[32];
    uint32_t vocab, width, layers, heads, kv_heads, head_dim, hidden;
    uint64_t parameters;
    uint64_t file_bytes;
    uint32_t train_window;     /* slots; 0 = not said */
    uint32_t xl_segment;       /* slots; 0 = not trained as Transformer-XL */
    cairn_token bos, eos, unk; /* -1 = none */
    cairn_token landmark;      /* -1 = not a landmark model */
    bool byte_tokens;          /* vocabulary of byte tokens */
    bool add_bos;
} cairn_model_info;
CAIRN_API void cairn_model_info_get(const cairn_model *model, cairn_model_info *out);
/* The attention shape (arrays live as long as the model). For an ordinary model the scheme is DENSE. */
CAIRN_API const cairn_attention_shape *cairn_model_shape(const cairn_model *model);
/* Fingerprint over shape, tokenizer and weights, and the name: what a store remembers. */
CAIRN_API cairn_status cairn_model_identity(const cairn_model *model, cairn_model_id *out);
/* The geometry a store for this model should have; dtype as asked. */
CAIRN_API void cairn_model_geometry(const cairn_model *model, cairn_dtype dtype, cairn_geometry *out);

/* ---- text ---- */

/* Any bytes to tokens (no BOS added). *out_n ids are written to out (cap of them at most); call with cap 0 to size.
 * UNSUPPORTED for a vocabulary this runtime cannot encode with. */
CAIRN_API cairn_status cairn_model_encode(const cairn_model *model, const void *text, size_t bytes, cairn_token *out,
                                          size_t cap, size_t *out_n);
/* Bytes of one token: up to cap; returns their number (0 for control tokens). A SentencePiece vocabulary puts a space
 * before a text when it encodes; decoding leaves it there. */
CAIRN_API size_t cairn_model_decode(const cairn_model *model, cairn_token token, char *out, size_t cap);

/* ---- a stream ---- */

/* Runs the session's refill and tail first. The session outlives the runtime and is not owned. chunk_blocks: prefill
 * unit in blocks (0 = 16, fewer for a wide model: at most 32 MiB of rows). MISMATCH if session and model do not fit;
 * the scheme is the session's, so a landmark model over a DENSE session is an ordinary one. */
CAIRN_API cairn_status cairn_runtime_begin(const cairn_model *model, cairn_session *session, uint32_t chunk_blocks,
                                           cairn_runtime **out);
CAIRN_API void cairn_runtime_end(cairn_runtime *runtime);
/* Feeds plain tokens; landmarks are put in where due, the one that closes a block with the block's last token. logits
 * (vocab) of the last plain token, may be NULL (faster). One token with logits runs through matrix-vector products;
 * everything else as chunks through OpenBLAS, where a row's bits do not depend on how the tokens were cut into calls.
 * INVALID for a token that is not in the vocabulary, before anything runs; after any other failure the stream is over.
 */
CAIRN_API cairn_status cairn_runtime_feed(cairn_runtime *runtime, const cairn_token *tokens, size_t n, float *logits);
/* The same, logits (n, vocab) after every one of the tokens. */
CAIRN_API cairn_status cairn_runtime_feed_all(cairn_runtime *runtime, const cairn_token *tokens, size_t n,
                                              float *logits);
/* Feeds slots as they are, landmark ids included where the session says they are due (INVALID otherwise):
 * logits (n, vocab), may be NULL. */
CAIRN_API cairn_status cairn_runtime_feed_slots(cairn_runtime *runtime, const cairn_token *slots, size_t n,
                                                float *logits);
/* Closes the current block early with a landmark, for cairn_session_adopt. */
CAIRN_API cairn_status cairn_runtime_close_block(cairn_runtime *runtime);

/* Ends a stream whose context is committed: its last tokens, if they are no whole block, are closed as
 * cairn_model_adopt_tails would, and kept for it (cairn_session_keep_tail). Nothing may follow. */
CAIRN_API cairn_status cairn_runtime_keep_tail(cairn_runtime *runtime);
/* Over attached contexts: closes each one's tail in a session of its own, unless it was kept, and adopts the block
 * (DESIGN: a document shorter than a block can still be found). The session's threads share the tails, with bits that
 * do not depend on them; what they hold at once beside the session is 2 tails a thread whose landmarks fit 1/16 of
 * ram_bytes, or one. `names` as given to cairn_session_begin. Call before cairn_runtime_begin. */
CAIRN_API cairn_status cairn_model_adopt_tails(const cairn_model *model, cairn_store *store, const char *const *names,
                                               size_t n, cairn_session *session);

/* ---- sampling ---- */

typedef struct cairn_sampler {
    float temperature; /* 0 = greedy */
    float top_p;       /* 1 = all */
    uint64_t state;    /* seed; changes with every draw */
} cairn_sampler;
/* Picks the next token; ids the model never learnt to predict (control tokens, the landmark) are masked, the end of
 * text (eos) only in a vocabulary of bytes. logits (vocab) are left alone. Greedy ties: the lowest id; top_p is not
 * looked at.
 */
CAIRN_API cairn_status cairn_model_sample(const cairn_model *model, const float *logits, cairn_sampler *sampler,
                                          cairn_token *out);

/* ---- GGUF writing (the trainer, tests, conversions) ---- */

typedef struct cairn_gguf_writer cairn_gguf_writer;
typedef enum cairn_gguf_type {
    CAIRN_GGUF_F32 = 0,
    CAIRN_GGUF_F16 = 1,
    CAIRN_GGUF_Q8_0 = 8,
    CAIRN_GGUF_BF16 = 30
} cairn_gguf_type;
CAIRN_API cairn_status cairn_gguf_writer_new(cairn_gguf_writer **out);
CAIRN_API void cairn_gguf_writer_free(cairn_gguf_writer *w);
CAIRN_API cairn_status cairn_gguf_put_u32(cairn_gguf_writer *w, const char *key, uint32_t value);
CAIRN_API cairn_status cairn_gguf_put_f32(cairn_gguf_writer *w, const char *key, float value);
CAIRN_API cairn_status cairn_gguf_put_bool(cairn_gguf_writer *w, const char *key, bool value);
CAIRN_API cairn_status cairn_gguf_put_string(cairn_gguf_writer *w, const char *key, const char *value);
CAIRN_API cairn_status cairn_gguf_put_u32s(cairn_gguf_writer *w, const char *key, const uint32_t *values, size_t n);
CAIRN_API cairn_status cairn_gguf_put_i32s(cairn_gguf_writer *w, const char *key, const int32_t *values, size_t n);
CAIRN_API cairn_status cairn_gguf_put_f32s(cairn_gguf_writer *w, const char *key, const float *values, size_t n);
CAIRN_API cairn_status cairn_gguf_put_strings(cairn_gguf_writer *w, const char *key, const char *const *values,
                                              size_t n);
/* The standard byte vocabulary: <unk> <s> </s> <0x00>..<0xFF> and, if landmark, <landmark> = 259. */
CAIRN_API cairn_status cairn_gguf_put_byte_vocab(cairn_gguf_writer *w, bool landmark);
/* dims as GGUF lists them (fastest first); data f32, converted to `type` when written; copied. */
CAIRN_API cairn_status cairn_gguf_put_tensor(cairn_gguf_writer *w, const char *name, cairn_gguf_type type,
                                             const uint64_t *dims, uint32_t n_dims, const float *data);
CAIRN_API cairn_status cairn_gguf_writer_save(cairn_gguf_writer *w, const char *path); /* beside, synced, renamed */

#ifdef __cplusplus
}
#endif
#endif
