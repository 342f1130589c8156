/* runtime_internal.h - buffers of a stream and the forward pass over them. */
#ifndef CAIRN_RUNTIME_INTERNAL_H
#define CAIRN_RUNTIME_INTERNAL_H

#include "model_internal.h"

/* Rows lie in tiles of B rows, one tile a block: the row of slot s is row s % B of tile s / B. Products are computed
 * tile by tile with the rows that are not part of the chunk zeroed, so each row meets the same arithmetic at the same
 * place whatever else is in the chunk, and its bits depend on nothing but its own history. */
struct cairn_runtime {
    const cairn_model *model;
    cairn_session *session;
    const cairn_kernels *kernels;
    cairn_pool *pool; /* the session's: two pools on the same cores would spin against each other */
    bool landmarks;   /* the session's stream has them */
    bool broken;      /* a chunk failed half way */
    uint32_t B;       /* slots of a block */
    uint32_t chunk_blocks;
    uint32_t hidden_blocks; /* tiles at a time in the feed-forward part, whose rows are the widest */

    cairn_token *ids; /* (chunk_blocks * B) of the chunk's rows, from the first */
    float **logits;   /* likewise: where a row's logits go; NULL = nowhere */

    float *x;        /* (chunk_blocks * B, width) residual stream */
    float *h;        /* the same shape: normed rows in, products out */
    float *q;        /* (chunk_blocks * B, heads * D) */
    float *attended; /* the same shape */
    float *k;        /* (chunk_blocks * B, kv_heads * D) */
    float *v;        /* the same shape */
    float *gate;     /* (hidden_blocks * B, hidden) */
    float *up;       /* the same shape */
    float *scratch;  /* (threads, scratch_floats): a weight panel as f32, then a tile of logits */
    size_t panel_floats;
    size_t scratch_floats;
};

cairn_status forward_init(cairn_runtime *rt);
void forward_wipe(cairn_runtime *rt);

/* The chunk's rows are rt->ids[0..rows), the first at offset `offset` of its block; all layers, then advance, then the
 * logits rt->logits asks for. many_logits: through matrix products (feed_all), else row by row. */
cairn_status forward_chunk(cairn_runtime *rt, uint32_t offset, size_t rows, bool many_logits);
/* One row by matrix-vector products. */
cairn_status forward_one(cairn_runtime *rt, cairn_token id, float *logits);
/* k and v of layer 0 for whole blocks: ids (blocks * B), k and v (blocks * B, kv_heads * D). blocks <= chunk_blocks. */
void forward_first_layer(cairn_runtime *rt, const cairn_token *ids, size_t blocks, float *k, float *v);

#endif
