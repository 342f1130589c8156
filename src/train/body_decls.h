/* body_decls.h - declarations in terms of `real` and TRAIN(name); train_internal.h includes it once for each type. */

/* ---- grouped softmax on plain arrays (paper eq. 1-4), in the form where a past block is one virtual key ---- */

/* weights (rows, rows) from scores (rows, rows), scaled, unmasked: causal and own-landmark masks are part of it,
 * landmarks may stand anywhere. is_landmark (rows); bias is added to the scores of other blocks' landmarks. An empty
 * block keeps its gate's mass; a row without any key is zero. NO_MEMORY alone. */
cairn_status TRAIN(grouped_softmax)(const real *scores, const uint8_t *is_landmark, size_t rows, real bias,
                                    real *weights);
/* dscores (rows, rows) and *dbias from dweights (rows, rows) at those scores; 0 where a key is masked. */
cairn_status TRAIN(grouped_softmax_backward)(const real *scores, const uint8_t *is_landmark, size_t rows, real bias,
                                             const real *dweights, real *dscores, real *dbias);

/* ---- attention of one layer over a window that starts at a block ---- */

/* Rows of a matrix are `ld` apart, so that q, k and v may be columns of one product. All before rotation. */
typedef struct TRAIN(qkv) {
    const real *q; /* (rows, heads, D) */
    const real *k; /* (rows, kv_heads, D) */
    const real *v; /* (rows, kv_heads, D) */
    size_t ld;
} TRAIN(qkv);

typedef struct TRAIN(attention) TRAIN(attention); /* tables and scratch for windows of up to `rows` slots */

/* Clamped positions alone: UNSUPPORTED for another scheme. */
cairn_status TRAIN(attention_new)(const cairn_attention_shape *shape, size_t rows, TRAIN(attention) * *out);
void TRAIN(attention_free)(TRAIN(attention) * att);
/* What is remembered, for a checkpoint: counters and keys, as arrays that may be written to; empty without. */
void TRAIN(attention_memory)(TRAIN(attention) * att, size_t **counters, size_t *n_counters, real **keys,
                             size_t *n_keys);
/* out (rows, heads, D). Row r is a landmark iff r % (C+1) == C; the last block may be open. All past blocks are
 * visible, in a local layer the newest local_window_blocks. bias (heads), added to landmark scores. guide: for its
 * distractors; NULL = none. */
void TRAIN(attend)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in, const real *bias,
                   const cairn_train_guide *guide, real *out);
/* dq, dk, dv (as in `in`, with its ld) are written, dbias (heads) is added to. guide may be NULL; `scale` is that of
 * its terms' gradient. Returns the sum of its terms. */
double TRAIN(attend_backward)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in,
                              const real *bias, const real *dout, const cairn_train_guide *guide, double scale,
                              real *dq, real *dk, real *dv, real *dbias);
/* What guided rows are to tell apart from their window: room in every layer and KV head for `keys` landmark keys of
 * earlier windows, and for `blocks` of their blocks as distractors; none to begin with. */
cairn_status TRAIN(attention_remember)(TRAIN(attention) * att, uint32_t layers, size_t keys, size_t blocks);

/* ---- ordinary causal attention over a window (body_dense.h) ---- */

typedef struct TRAIN(dense) TRAIN(dense); /* tables and scratch for windows of up to `rows` slots */

/* segment 0: a row sees all before it. Else Transformer-XL's: its segment and the one before. */
cairn_status TRAIN(dense_new)(const cairn_attention_shape *shape, size_t segment, size_t rows, TRAIN(dense) * *out);
void TRAIN(dense_free)(TRAIN(dense) * dense);
void TRAIN(dense_attend)(TRAIN(dense) * dense, size_t rows, const TRAIN(qkv) * in, real *out);
void TRAIN(dense_backward)(TRAIN(dense) * dense, size_t rows, const TRAIN(qkv) * in, const real *dout, real *dq,
                           real *dk, real *dv);

/* ---- the model ---- */

typedef struct TRAIN(model) TRAIN(model); /* the activations of one window */

/* For windows of up to `rows` slots. The layout is borrowed. */
cairn_status TRAIN(model_new)(const cairn_train_layout *layout, size_t rows, TRAIN(model) * *out);
void TRAIN(model_free)(TRAIN(model) * model);
/* Kernels to compute with instead of cairn_kernels_best; in double there are none. */
void TRAIN(model_use)(TRAIN(model) * model, const struct cairn_kernels *kernels);
/* The attention it works with, for what is remembered; NULL without landmarks. */
TRAIN(attention) * TRAIN(model_attention)(TRAIN(model) * model);

/* Logits (rows, vocab), the model's own until the next call. Slots must be in the vocabulary. */
const real *TRAIN(forward)(TRAIN(model) * model, const real *params, const cairn_token *slots, size_t rows);
/* The same where guided rows see distractors: the guide that backward will get. */
const real *TRAIN(forward_guided)(TRAIN(model) * model, const real *params, const cairn_token *slots, size_t rows,
                                  const cairn_train_guide *guide);
/* After forward of this window: the sum of weight * -ln p(target). nll and right (rows) may be NULL: -ln p(target), and
 * whether the target has the largest logit (the lowest id among equals); 0 where there is no target. The logits become
 * scale * dL/dlogits: for a mean over several windows, scale is 1 / the sum of all their weights. */
double TRAIN(loss)(TRAIN(model) * model, const cairn_train_window *window, double scale, real *nll, uint8_t *right);
/* After loss of this window: adds to grads (total). Returns the sum of the window's guidance, 0 without. */
double TRAIN(backward)(TRAIN(model) * model, const real *params, const cairn_train_window *window, real *grads);
