/* attention.h - what a model tells Cairn about its attention, how blocks are chosen, what a step reports.
 *
 * The method (Mohtashami & Jaggi 2023, sections 3.1-3.3): the stream is cut into blocks of C tokens, each followed by
 * one landmark; a past block is one virtual key whose logit is its landmark's score and whose value is
 * softmax(q.K_b) V_b; inference sees the own block, a window of recent blocks and the k best of all older ones.
 */
#ifndef CAIRN_ATTENTION_H
#define CAIRN_ATTENTION_H

#include <cairn/base.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cairn_position_scheme {
    CAIRN_POSITION_CLAMPED, /* block of age a sits min(a, clamp_blocks) blocks before the query's block */
    CAIRN_POSITION_STINGY,  /* the paper: retrieved blocks packed into k+1 slots before the chunk (section 3.3) */
    CAIRN_POSITION_DENSE    /* no landmarks at all: ordinary causal attention at true positions */
} cairn_position_scheme;

typedef struct cairn_attention_shape { /* a model's attention; borrowed arrays are copied by whoever keeps it */
    size_t struct_size;
    uint32_t layers;
    uint32_t heads; /* query heads, a multiple of kv_heads */
    uint32_t kv_heads;
    uint32_t head_dim;     /* even */
    uint32_t block_tokens; /* C; a block has C + 1 slots, the last one the landmark (DENSE: C slots, no landmark) */
    float rope_theta;
    uint32_t rope_dims;    /* leading dims of a head that rotate; 0 = all */
    bool rope_interleaved; /* pairs (2i, 2i+1) as in "llama" GGUF files; else (i, i + D/2) as in "qwen3" */
    cairn_position_scheme scheme;
    uint32_t clamp_blocks;        /* A >= 1, CLAMPED only */
    uint32_t window_blocks;       /* newest complete blocks always visible, CLAMPED only */
    uint32_t local_window_blocks; /* the same for local layers */
    const uint8_t *local_layers;  /* (layers) 1 = never retrieves; NULL = none */
    const float *landmark_bias;   /* (layers, heads) added to landmark scores in the group softmax; NULL = 0 */
    uint32_t top_k;               /* the k it was made for: the default */
    const float *rope_factors;    /* (rope_dims / 2) above 0: pair i turns by theta^(-2i/dims) / factor (Llama 3.1);
                                     NULL = 1 */
} cairn_attention_shape;

CAIRN_API void cairn_attention_shape_init(cairn_attention_shape *shape, size_t struct_size);
/* INVALID with the field and the number if the shape cannot be. */
CAIRN_API cairn_status cairn_attention_shape_check(const cairn_attention_shape *shape);

/* Which rows share one choice of blocks (paper section 4.2, table 2). */
typedef enum cairn_scope {
    CAIRN_SCOPE_TOKEN_HEAD, /* each query row and head its own */
    CAIRN_SCOPE_HEAD,       /* per head: max over the chunk's rows ("max over tokens", the offload mode). CLAMPED: over
                               the chunk's rows of one block, which see the same candidates */
    CAIRN_SCOPE_TOKEN       /* per row: max over heads */
} cairn_scope;

#define CAIRN_TOP_K_ALL UINT32_MAX /* every block visible: the training-time forward */

typedef struct cairn_policy {
    size_t struct_size;
    uint32_t top_k; /* k; CAIRN_TOP_K_ALL = all blocks; the model's own by default */
    cairn_scope scope;
    float mass;            /* > 0: the fewest blocks (at most top_k) whose retained mass reaches it. Token+head scope */
    int32_t window_blocks; /* -1 = the model's */
    uint32_t newest;       /* search only the newest c blocks; 0 = all (the authors' FIFO ring) */
    bool measure_mass;     /* report the retained mass of every row: all landmarks are weighed, as much work again as
                              finding the best */
} cairn_policy;
CAIRN_API void cairn_policy_init(cairn_policy *policy, size_t struct_size, const cairn_attention_shape *shape);

/* How sure a retained mass is. */
typedef enum cairn_mass_kind {
    CAIRN_MASS_UNKNOWN, /* landmarks were left unscored, or nobody asked (measure_mass) */
    CAIRN_MASS_BOUND,   /* at least this: int8 scores with their quantization bound */
    CAIRN_MASS_EXACT    /* every landmark was scored in full precision */
} cairn_mass_kind;

typedef struct cairn_step_stats { /* sums over the layers, rows and heads since the last reset */
    uint64_t rows;                /* query rows x heads x layers that searched */
    uint64_t candidates;          /* blocks they could choose from */
    uint64_t chosen;              /* retrieved blocks they chose */
    uint64_t visible;             /* chosen plus window */
    double mass_sum;              /* retained mass, over mass_rows */
    float mass_min;
    uint64_t mass_rows;
    cairn_mass_kind mass_kind;                  /* the weakest of all */
    uint64_t tiles;                             /* distinct tiles used, summed over steps and layers */
    uint64_t stored_tiles;                      /* of those, from the store (not the session's own memory) */
    uint64_t tier_bytes, map_bytes, read_bytes; /* where the stored ones came from */
    uint64_t search_ns, fetch_ns, attend_ns;
    uint64_t foresee_ns;              /* searching for the next layer before its query was known */
    uint64_t ahead_tiles, ahead_used; /* read for it, or announced, and those of them that it asked for */
} cairn_step_stats;

/* ---- the paper's operations on plain arrays: for tests, teaching and other engines ---- */

/* Grouped softmax (eq. 1-4): weights (rows, rows) from scores (rows, rows), scaled, unmasked. Causal and own-landmark
 * masks are part of the operation. is_landmark (rows). bias is added to other blocks' landmark scores. An empty block
 * keeps its gate's mass (row sum < 1); a row without any key is zero. Works in double. */
CAIRN_API cairn_status cairn_grouped_softmax(const double *scores, const uint8_t *is_landmark, size_t rows, double bias,
                                             double *weights);

/* Stingy slots (PAPER 2.4). Scoring slot of each of n cached blocks by age order, oldest first: out (n). */
CAIRN_API void cairn_stingy_scoring_slots(size_t n, uint32_t k, uint32_t *out);
/* Final slots of `chosen` blocks given as ascending ranks in age order (0 = oldest of n): out (chosen). The prefix has
 * min(k, n) + 1 slots, the tail comes right after it. chosen = min(k, n), or call with the smaller k. */
CAIRN_API void cairn_stingy_slots(size_t n, uint32_t k, const uint32_t *ranks, size_t chosen, uint32_t *out);

/* Reference twin "landmark_full" (and, with a shape whose scheme is DENSE, "dense"): one layer's attention of a whole
 * stream at once, plain loops, double accumulation. q (rows, heads, D), k and v (rows, kv_heads, D) before rotation,
 * with landmark rows in place (row r is a landmark iff r % (C+1) == C; never in DENSE). visible (rows, heads, blocks),
 * blocks = rows / (C+1), may be NULL: 1 = this past block may be seen; NULL = all, of a local layer the newest
 * local_window_blocks. INVALID for DENSE, which has no blocks. out (rows, heads, D). STINGY uses true positions
 * (k >= n).
 */
CAIRN_API cairn_status cairn_attention_reference(const cairn_attention_shape *shape, uint32_t layer, size_t rows,
                                                 const float *q, const float *k, const float *v, const uint8_t *visible,
                                                 float *out);

#ifdef __cplusplus
}
#endif
#endif
