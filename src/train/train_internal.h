/* train_internal.h - forward and backward of a landmark transformer over one training window.
 *
 * Every routine that computes exists twice, compiled from one source (body_*.h): *_f32 over our kernels and OpenBLAS,
 * which trains, and *_f64 in plain loops, the witness: central differences in double say whether a gradient is right,
 * and the same text in float is then right too, up to rounding.
 *
 * One object works on one window in one thread. Threads train by having an object and a gradient each, summed in a
 * fixed order, so that a run depends on its seed and number of threads alone.
 */
#ifndef CAIRN_TRAIN_INTERNAL_H
#define CAIRN_TRAIN_INTERNAL_H

#include <cairn/train.h>

#include "base_internal.h"

/* ---- what a model is made of ---- */

typedef struct cairn_train_shape {
    cairn_train_attention mode;      /* LANDMARK unless said otherwise */
    uint32_t segment;                /* rows of a segment, for XL alone */
    cairn_attention_shape attention; /* clamped with landmarks, else dense and all layers alike. Its landmark_bias is
                                        not looked at: it is a parameter here */
    uint32_t vocab;
    uint32_t width;
    uint32_t hidden; /* of SwiGLU */
    float norm_eps;
    bool qk_norm; /* RMSNorm of each head's q and k before rotation: architecture "qwen3", else "llama" */
    bool tied;    /* the head is the embedding */
} cairn_train_shape;

typedef enum cairn_train_kind { /* how a parameter is initialised, and which optimizer it is for */
                                CAIRN_TRAIN_EMBEDDING,
                                CAIRN_TRAIN_MATRIX,
                                CAIRN_TRAIN_HEAD,
                                CAIRN_TRAIN_NORM,
                                CAIRN_TRAIN_LANDMARK_BIAS
} cairn_train_kind;

typedef struct cairn_train_param {
    char name[48]; /* the GGUF tensor; of a landmark bias "blk.N.landmark_bias", which GGUF holds as metadata */
    cairn_train_kind kind;
    uint32_t rows; /* 1 for what is not a matrix */
    uint32_t cols;
    size_t at; /* its first number */
} cairn_train_param;

typedef struct cairn_train_layer { /* where a layer's parameters begin; q, k, v lie in a row, as do gate and up;
                                      landmark_bias in a model with landmarks alone */
    size_t attn_norm, qkv, q_norm, k_norm, landmark_bias, o, ffn_norm, gate_up, down;
} cairn_train_layer;

/* All parameters lie in one array of `total` numbers: gradients, moments and checkpoints are arrays like it. */
typedef struct cairn_train_layout {
    cairn_train_shape shape; /* its arrays are the two below */
    uint8_t *local_layers;
    float *rope_factors; /* or NULL */
    cairn_train_layer *layers;
    cairn_train_param *params;
    size_t n_params;
    size_t embedding, output_norm, head;
    size_t total;
} cairn_train_layout;

/* INVALID / UNSUPPORTED names the field that cannot be. */
cairn_status cairn_train_layout_new(const cairn_train_shape *shape, cairn_train_layout **out);
void cairn_train_layout_free(cairn_train_layout *layout);

/* Parameters to start from: embedding N(0, 0.02), matrices N(0, 1 / columns), those that write to the stream of rows
 * smaller by sqrt(2 layers), norms 1, landmark biases ln(block_tokens), so that a past block weighs as much as its
 * tokens would. The same numbers for the same seed, everywhere. */
void cairn_train_init(const cairn_train_layout *layout, uint64_t seed, float *params);

/* ---- GGUF ---- */

enum { CAIRN_TRAIN_BYTE_VOCAB = 260 }; /* <unk> <s> </s>, 256 bytes, the landmark */

/* The shape of a landmark model with clamped positions (UNSUPPORTED for other positions), or of an ordinary one: DENSE;
 * its arrays are the model's. */
cairn_status cairn_train_shape_of(const cairn_model *model, cairn_train_shape *out);
/* All parameters of a model of the layout's shape (else MISMATCH), in whatever type the file has them. */
cairn_status cairn_train_import(const cairn_train_layout *layout, const cairn_model *model, float *params);
/* Writes a model that cairn_model_open takes: byte vocabulary, matrices as `type`, trained at `window` slots. Without
 * landmarks it is an ordinary one; of XL, cairn.xl.segment says how it was trained. */
cairn_status cairn_train_export(const cairn_train_layout *layout, const float *params, const char *name,
                                uint32_t window, cairn_gguf_type type, const char *path);

/* What the two are made of, for the files of this room. Copies the rows the model has, checking nothing. */
void cairn_train_copy(const cairn_train_layout *layout, const cairn_model *model, float *params);
cairn_status cairn_train_put_landmarks(cairn_gguf_writer *w, const cairn_train_layout *layout, const float *params,
                                       cairn_token landmark, uint32_t window);
cairn_status cairn_train_put_tensors(cairn_gguf_writer *w, const cairn_train_layout *layout, const float *params,
                                     cairn_gguf_type type);

/* ---- training on from a GGUF model (adapt.c) ---- */

typedef struct cairn_train_landmarks { /* what a model without landmarks is given */
    uint32_t block_tokens, clamp_blocks, window_blocks, local_window_blocks, top_k;
    const uint32_t *local_layers; /* (n_local) numbers of layers that never retrieve */
    size_t n_local;
} cairn_train_landmarks;
/* Those of cairn_attention_shape_init, and layer 0 local: its landmark keys come from one embedding row, so they are
 * all equal. */
void cairn_train_landmarks_init(cairn_train_landmarks *landmarks);

/* The layout to train `model` with. One without landmarks gets those of `landmarks` (NULL = the defaults) and a row
 * more in the vocabulary; only a byte vocabulary whose last token is an unused <landmark> stays as it is. One with
 * landmarks keeps its own: MISMATCH if `landmarks` asks for others, UNSUPPORTED if their positions are not clamped. */
cairn_status cairn_train_adapt_layout(const cairn_model *model, const cairn_train_landmarks *landmarks,
                                      cairn_train_layout **out);
/* The id of the landmark in such a layout. */
cairn_token cairn_train_adapt_landmark(const cairn_train_layout *layout, const cairn_model *model);
/* The model's parameters. Of new landmarks: the rows of embedding and head are the mean of all others, as the paper's
 * LLaMA got them (section 4.2), the biases ln(block_tokens). */
cairn_status cairn_train_adapt(const cairn_train_layout *layout, const cairn_model *model, float *params);
/* Writes a model that cairn_model_open takes, with the metadata of `source` as it was, but for what has become untrue:
 * vocab_size, file_type and alignment; the landmark is one token more, tokenizer arrays grow by a control token. */
cairn_status cairn_train_export_like(const cairn_train_layout *layout, const float *params, const cairn_model *source,
                                     uint32_t window, cairn_gguf_type type, const char *path);

/* ---- documents as tokens (tokens.c) ---- */

typedef struct cairn_train_document { /* borrowed */
    const uint8_t *text;              /* (bytes) */
    const float *weights;             /* (bytes) of the loss of predicting each byte; NULL = 1 */
    const uint64_t *places;           /* (bytes) where each byte comes from; NULL = 0, 1, ... */
    size_t bytes;
} cairn_train_document;

typedef struct cairn_train_tokens { /* init with zeros; wipe */
    cairn_token *tokens;            /* (n) */
    float *weights;   /* (n) the largest of a token's bytes; 0 of one without bytes, as SentencePiece's first space */
    uint64_t *places; /* (n) of its first byte, or if it has none, of the next one in the text */
    uint32_t *bytes;  /* (n) how many of the text's it stands for; they add up to all */
    size_t n;
    size_t cap;
} cairn_train_tokens;
/* Encodes as cairn_model_encode does, no BOS, in place of what was in *out, whose room is used again. Any bytes can be
 * given. UNSUPPORTED for a vocabulary that cannot encode. */
cairn_status cairn_train_tokenize(const cairn_model *model, const cairn_train_document *document,
                                  cairn_train_tokens *out);
void cairn_train_tokens_wipe(cairn_train_tokens *tokens);

/* ---- windows ---- */

/* Guidance: rows that are known to need one of a few slots are told so. In the first `heads` heads of the layers from
 * `from_layer` on, such a row adds weight * -ln(sum of the attention weights of its slots) to the loss. Gates alone
 * make this the InfoNCE of van den Oord et al. 2018 over the landmarks the row sees; a window holds few blocks where a
 * context holds thousands, so landmark keys of earlier windows are remembered and compete with the gates in this sum
 * alone (He et al. 2020 call it a queue); they get no gradient.
 *
 * Distractors: whole blocks of earlier windows can be kept too. In every layer that retrieves, a guided row then sees
 * the few of them whose landmarks it likes best, beside all of its window, as it will see the best of thousands at use:
 * an answer must come out right among blocks that look like what is asked for (Tworkowski et al. 2023 train so across a
 * batch). They get no gradient either. */
enum { CAIRN_TRAIN_GUIDED_SLOTS = 12, CAIRN_TRAIN_DISTRACTORS_MAX = 16 };
/* Where a fact stands among those that have digits in its block, whose one landmark key is to say all of them. ANY: it
 * is alone there, stands in more places than one or in the row's own block. */
typedef enum cairn_train_turn { CAIRN_TRAIN_ANY, CAIRN_TRAIN_FIRST, CAIRN_TRAIN_LATER } cairn_train_turn;
typedef struct cairn_train_guided {
    uint32_t row;
    uint32_t n;                               /* 1..CAIRN_TRAIN_GUIDED_SLOTS */
    uint32_t slots[CAIRN_TRAIN_GUIDED_SLOTS]; /* of the window, none a landmark, all before the row */
    cairn_train_turn turn;                    /* of the slots' fact */
} cairn_train_guided;
typedef struct cairn_train_guide {
    const cairn_train_guided *rows; /* ascending */
    size_t n;
    uint32_t from_layer;
    uint32_t heads;
    bool apart; /* even heads are guided to what comes first in a block, odd ones to what comes later */
    float weight;
    bool remember;         /* this window's blocks join those of earlier ones */
    const uint8_t *forget; /* (blocks) 1 = not this one: it answers questions of other windows too; NULL = none */
    uint32_t distractors;  /* at most that many for a row */
    uint32_t rivals;       /* remembered landmark keys that compete, the newest; 0 = all */
} cairn_train_guide;

/* Whether guidance tells head h of the row. */
static inline bool cairn_train_tells(const cairn_train_guide *guide, const cairn_train_guided *row, size_t h)
{
    const size_t turn = row->turn == CAIRN_TRAIN_LATER ? 1 : 0;
    return h < guide->heads && (!guide->apart || row->turn == CAIRN_TRAIN_ANY || h % 2 == turn);
}

/* One window: it starts at a block, has its landmarks in place if there are any and is at most what the model has room
 * for. */
typedef struct cairn_train_window {
    const cairn_token *slots;   /* (rows) */
    const cairn_token *targets; /* (rows) what the row should predict; -1 = nothing, as after a landmark */
    const float *weights;       /* (rows) of the loss; NULL = 1 */
    size_t rows;
    const cairn_train_guide *guide; /* NULL = none */
} cairn_train_window;

/* Targets of a window, block_tokens 0 = without landmarks (paper section 3.1; its code's first convention): a content
 * token predicts the next content token, also across a landmark; a landmark predicts nothing, nor does the last content
 * token, as nothing follows it.
 */
void cairn_train_targets(const cairn_token *slots, size_t rows, uint32_t block_tokens, cairn_token *targets);

/* ---- updates ---- */

typedef struct cairn_train_rates {
    float adam;         /* AdamW's learning rate: embedding, head, norms, biases */
    float muon;         /* Muon's: the matrices of the layers; 0 = AdamW for those too */
    float beta1, beta2; /* AdamW */
    float eps;
    float momentum; /* Muon */
    float decay;    /* of matrices, times the learning rate */
    float clip;     /* the gradient's norm is brought down to this; 0 = left alone */
} cairn_train_rates;
void cairn_train_rates_init(cairn_train_rates *rates); /* what is known to train small models */

/* Both moments of every parameter and the number of updates: with the parameters, all that a checkpoint needs. */
typedef struct cairn_train_optimizer {
    const cairn_train_layout *layout; /* borrowed */
    cairn_pool *pool;                 /* borrowed */
    const struct cairn_kernels *kernels;
    uint64_t updates;
    float *first;    /* (total) AdamW's mean of gradients, Muon's momentum */
    float *second;   /* (total) AdamW's mean of squares; unused for what Muon updates */
    double *squares; /* partial sums of the gradient's norm */
    float *scratch;  /* (workers, scratch_each) of the orthogonalised update */
    size_t scratch_each;
} cairn_train_optimizer;
/* Updates run on `pool`, which does nothing else meanwhile; NULL = in the caller. Their bits are the same either way.
 */
cairn_status cairn_train_optimizer_init(cairn_train_optimizer *opt, const cairn_train_layout *layout, cairn_pool *pool);
void cairn_train_optimizer_wipe(cairn_train_optimizer *opt);
/* One update of params (total) by grads (total); `pace` multiplies both learning rates. *norm: that of the gradient
 * before clipping. INVALID if it is not finite, with nothing changed. */
cairn_status cairn_train_update(cairn_train_optimizer *opt, const cairn_train_rates *rates, double pace, float *params,
                                const float *grads, double *norm);
/* Learning rate pace of update `step` (0, 1, ...) of `steps`: up to 1 over `warmup` updates, then down a half cosine to
 * `floor`; floor = 1 keeps it constant. */
double cairn_train_pace(uint64_t step, uint64_t warmup, uint64_t steps, double floor);

#define real        float
#define TRAIN(name) cairn_train_##name##_f32
#include "body_decls.h"
#undef real
#undef TRAIN

#define real        double
#define TRAIN(name) cairn_train_##name##_f64
#include "body_decls.h"
#undef real
#undef TRAIN

#endif
