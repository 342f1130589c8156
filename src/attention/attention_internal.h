/* attention_internal.h - one attention step over blocks whose tiles somebody else can fetch.
 *
 * The step knows nothing of stores and sessions. It sees a line of past blocks numbered 0, 1, 2, ... in order of age
 * ("logical" blocks: stored, attached and own ones alike), their landmark rows in indexes, the rows of the chunk's own
 * blocks in f32, and a source that turns (block, KV head) into tiles, one batch at a time.
 *
 * Work is cut into units: one KV head and the chunk rows of one own block. Units are independent, each handles its past
 * blocks in ascending order, so neither threads nor arrival nor chunking change a bit of the result.
 */
#ifndef CAIRN_ATTENTION_INTERNAL_H
#define CAIRN_ATTENTION_INTERNAL_H

#include <cairn/attention.h>
#include <cairn/index.h>

#include "base_internal.h"
#include "kernels_internal.h"

/* ---- rotary embedding: cos and sin of position p, (rope_dims / 2) each ---- */

typedef struct attn_rope {
    uint32_t head_dim;
    uint32_t dims; /* leading dims that rotate */
    bool interleaved;
    double theta;
    const float *factors; /* the shape's, or NULL */
    size_t positions;     /* in the table */
    float *cos;           /* (positions, dims / 2) */
    float *sin;
} attn_rope;

cairn_status attn_rope_init(attn_rope *rope, const cairn_attention_shape *shape);
void attn_rope_wipe(attn_rope *rope);
cairn_status attn_rope_reserve(attn_rope *rope, size_t positions); /* not while units run */
/* out (head_dim) = x at position p < positions; out may be x. */
void attn_rotate(const attn_rope *rope, const cairn_kernels *kernels, float *out, const float *x, size_t p);

/* ---- the line of past blocks ---- */

typedef struct attn_part { /* logical blocks [first, first + count), row r of the index = block first + r - row0 */
    uint64_t first;
    uint64_t count;
    uint32_t row0;
    cairn_index *const *index; /* (layers, kv_heads); NULL entries where a layer has none */
} attn_part;

/* The landmark rows of recent blocks of a layer that never retrieves: a ring by block number, f32. */
typedef struct attn_recent {
    uint64_t capacity; /* blocks */
    uint64_t end;      /* one past the newest; the newest `capacity` blocks are there */
    float *rows;       /* (capacity, kv_heads, head_dim) */
} attn_recent;

typedef struct attn_line {
    const attn_part *parts;
    size_t n_parts;
    const attn_recent *recent; /* (layers); rows NULL where the parts serve */
    uint64_t stream_base;      /* logical number of the stream's block 0; older ones are attached, of unbounded age */
    uint64_t cached;           /* STINGY: blocks complete before this chunk */
} attn_line;

/* ---- the chunk ---- */

typedef struct attn_group { /* the chunk's rows of one own block */
    uint64_t block;         /* logical number it has or will have */
    uint32_t row0;          /* first row in the chunk */
    uint32_t rows;
    uint32_t offset0; /* slot offset of the first row inside the block */
    uint32_t fill;    /* plain tokens the block holds after this chunk's rows */
} attn_group;

typedef struct attn_chunk {
    uint32_t layer;
    uint32_t rows;
    const attn_group *groups;
    size_t n_groups;
    const float *q;     /* (rows, heads, D), unrotated, unscaled */
    float *out;         /* (rows, heads, D) */
    const float *own_k; /* (groups, kv_heads, C, D), rotated by the offset, rounded like tiles */
    const float *own_v;
} attn_chunk;

typedef struct attn_request {
    uint64_t block;
    uint32_t head;
} attn_request;

typedef struct attn_source {
    void *arg;
    size_t (*batch_max)(void *arg);
    cairn_status (*submit)(void *arg, uint32_t layer, const attn_request *requests, const float *mass, size_t n);
    cairn_status (*wait)(void *arg, cairn_tile *tiles); /* in the order of the requests; valid until the next submit */
} attn_source;

/* ---- the step ---- */

typedef struct attn_pick { /* a visible past block of one row and head */
    uint64_t block;
    uint32_t row;   /* in the chunk */
    uint16_t g;     /* query head within the KV head's group */
    bool retrieved; /* chosen by search, not by the window */
    int32_t delta;  /* blocks between it and the row's block, as positions see it */
    float weight;   /* log gate first, then the gate S_b itself */
    uint32_t tile;  /* number of its tile in the step's list */
} attn_pick;

typedef struct attn_unit {
    uint32_t head;
    uint32_t group;
    attn_pick *picks;
    size_t n_picks;
    size_t cap_picks;
    attn_pick *sorted; /* the other half of the sort */
    size_t cap_sorted;
    size_t cursor;
    float *own; /* (rows * G, C) gates of the own tokens; DENSE: (max, denominator) follow in acc */
    size_t own_cap;
    float *acc; /* DENSE: (rows * G, 2) running max and denominator */
    cairn_step_stats stats;
    cairn_status status;
    char sentence[256];
} attn_unit;

enum { ATTN_ROWS_KEPT = 8 };

typedef struct attn_worker { /* one per thread */
    cairn_index_scratch *search;
    void *tile_scratch;
    float *q;         /* rotated queries (cap_rows, D) */
    const float **in; /* (cap_rows) gathered rows for the tile kernels */
    float **to;
    float *weight;
    float *partial; /* DENSE: (cap_rows, D) one tile's values */
    float *scores;  /* scope scores over all blocks */
    size_t cap_scores;
    cairn_index_query *queries;
    cairn_index_hit *hits;
    cairn_index_hit *merged;
    uint32_t *found;
    cairn_index_mass *mass;
    float *lse;      /* (rows * G, 2): log-sum-exp of the far landmarks and its error */
    size_t cap_rows; /* queries the arrays above hold */
    uint32_t cap_k;
    float *row; /* (1 + ATTN_ROWS_KEPT, D): a turned query, then landmark rows by block number */
    uint64_t row_block[ATTN_ROWS_KEPT];
} attn_worker;

enum { ATTN_QUERIES_KEPT = 128, ATTN_FOUND_KEPT = 32 };

typedef struct attn_lore { /* of one layer and KV head (lore.c) */
    float *queries;        /* (ATTN_QUERIES_KEPT, D) a ring of those for far landmarks; NULL before there were any */
    uint64_t kept;         /* so many went in */
    uint64_t worth;        /* of the layer's first head: tokens so far, those read alone more (lore.c) */
    uint64_t found[ATTN_FOUND_KEPT]; /* far blocks the last tokens chose, newest first */
    size_t n_found;
} attn_lore;

typedef struct attn_step { /* buffers kept between steps */
    const cairn_attention_shape *shape;
    cairn_policy policy;
    const cairn_kernels *kernels;
    cairn_pool *pool;
    attn_rope rope;
    attn_worker *workers;
    attn_unit *units;
    size_t n_units;
    size_t cap_units;
    uint64_t *bits; /* (kv_heads, words): tiles wanted; 0 between two lists */
    size_t *set;    /* (kv_heads, words) which of them are not 0 */
    uint32_t *rank; /* (kv_heads, words): number of the word's first tile */
    size_t cap_words;
    attn_request *requests;
    float *mass;
    cairn_tile *tiles;
    size_t cap_requests;
    int64_t *shared; /* scopes HEAD and TOKEN: chosen blocks, see select.c */
    size_t cap_shared;
    attn_lore *lore;      /* (layers, kv_heads); NULL before an index wants it */
    size_t lore_bytes;    /* of all that */
    uint64_t learn_bytes; /* what all that indexes learn may take; set by the session */
    uint32_t rest;        /* calls of attn_step_run until a token lets another layer learn */
    cairn_step_stats stats;
    double *block_mass; /* per logical block, when sources are wanted; owned by the session */
    uint64_t n_block_mass;
    uint64_t tiles_last; /* distinct tiles of the last run */
    void (*watch)(void *, uint32_t layer, uint32_t head, const float *queries, size_t n); /* NULL: nobody watches */
    void *watch_arg;
} attn_step;

cairn_status attn_step_init(attn_step *step, const cairn_attention_shape *shape, const cairn_policy *policy,
                            cairn_pool *pool);
void attn_step_wipe(attn_step *step);
cairn_status attn_step_run(attn_step *step, const attn_chunk *chunk, const attn_line *line, const attn_source *source);
/* Of a chunk whose outcome nobody wants (out is not used): the layer's indexes learn from its queries all the same. */
cairn_status attn_step_learn(attn_step *step, const attn_chunk *chunk, const attn_line *line);

/* Searches a layer with a query that is only a guess of what it will be asked, of a chunk of one row (its `out` and own
 * keys are not looked at): step->requests gets the far blocks it would choose, *n of them, distinct, until the next
 * run. The next search begins with what it found. No statistics are kept, nobody watches. */
cairn_status attn_step_foresee(attn_step *step, const attn_chunk *chunk, const attn_line *line, size_t *n);
/* Whether the layer is searched row by row for a few blocks at all. */
bool attn_searches(const attn_step *step, uint32_t layer);

/* ---- inside the room ---- */

/* Slots of a block: C + 1, or C in DENSE. */
static inline uint32_t attn_slots(const cairn_attention_shape *shape)
{
    return shape->block_tokens + (shape->scheme != CAIRN_POSITION_DENSE);
}
static inline bool attn_is_local(const cairn_attention_shape *shape, uint32_t layer)
{
    return shape->local_layers != NULL && shape->local_layers[layer] != 0;
}
/* Own tokens a row at `offset` may see. */
static inline uint32_t attn_own_tokens(const cairn_attention_shape *shape, const attn_group *group, uint32_t offset)
{
    return offset >= shape->block_tokens ? group->fill : offset + 1;
}
typedef struct attn_reach {        /* what the rows of one group can see; half-open ranges of logical blocks */
    uint64_t far_lo, far_hi;       /* one delta: searched */
    uint64_t near_lo, near_hi;     /* candidates with a delta each */
    uint64_t window_lo, window_hi; /* always visible */
    uint32_t far_delta;
    uint32_t k;      /* blocks to choose, <= candidates */
    bool everything; /* all candidates are visible: nothing to choose */
} attn_reach;

attn_reach attn_reach_of(const attn_step *step, const attn_line *line, uint32_t layer, const attn_group *group);
/* Blocks between `block` and the group's, as the positions it is scored at see it. */
uint32_t attn_scoring_delta(const attn_step *step, const attn_line *line, const attn_reach *r, const attn_group *group,
                            uint64_t block);
const float *attn_query(const attn_step *step, const attn_chunk *chunk, uint32_t head, uint32_t row, uint32_t g);
/* out (D) = q scaled by 1/sqrt(D) and turned to position p. */
void attn_turned(const attn_step *step, float *out, const float *q, size_t p);
/* Position a query at slot `offset` is turned to for a landmark `delta` blocks back: delta*B + offset - (B-1). */
size_t attn_landmark_position(const attn_step *step, uint32_t delta, uint32_t offset);
float attn_landmark_score(const attn_step *step, const attn_line *line, uint32_t layer, uint32_t head, uint64_t block,
                          uint32_t delta, uint32_t offset, const float *q, attn_worker *worker);
/* The worker keeps a few landmark rows of one layer and head: forget them when either changes. */
void attn_forget_rows(attn_worker *worker);
/* Keeps the best k of a list in descending order, equal scores newest first; ids are logical blocks. Returns its
 * length. */
uint32_t attn_keep_best(cairn_index_hit *list, uint32_t n, uint32_t k, uint32_t block, float score);
/* Landmark row of a past block, f32, into `out` (D). */
void attn_landmark_row(const attn_step *step, const attn_line *line, uint32_t layer, uint32_t head, uint64_t block,
                       float *out);
cairn_status attn_pick_push(attn_unit *unit, const attn_pick *pick);
/* Fills unit->picks with every visible past block of the unit's rows, weight = log gate (score + bias). */
cairn_status attn_select(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                         attn_worker *worker);
/* Fills unit->picks with the far blocks a one-row unit would choose; only their numbers count. */
cairn_status attn_foresee_unit(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                               attn_worker *worker);

/* ---- lore.c ---- */

/* Keeps some of the chunk's queries if an index of the layer may learn from them. */
cairn_status attn_lore_keep(attn_step *step, const attn_chunk *chunk, const attn_line *line);
/* Lets the layer's indexes learn from the queries of earlier chunks, if there are enough. */
void attn_lore_teach(attn_step *step, const attn_chunk *chunk, const attn_line *line);
void attn_lore_wipe(attn_step *step);
/* NULL while nothing is kept. What was found belongs to the head's unit while units run: for chunks of one group. */
attn_lore *attn_lore_of(const attn_step *step, uint32_t layer, uint32_t head);
void attn_lore_hint(const attn_lore *lore, const attn_part *part, cairn_index_scratch *search);
void attn_lore_found(attn_lore *lore, const cairn_index_hit *hits, size_t n);
/* The same of a chunk of several blocks, when all of its units have chosen. */
void attn_lore_chunk_found(attn_step *step, const attn_chunk *chunk);

/* Scopes HEAD and TOKEN: fills step->shared before the units run. */
cairn_status attn_select_shared(attn_step *step, const attn_chunk *chunk, const attn_line *line);
cairn_status attn_worker_reserve(const attn_step *step, attn_worker *worker, size_t rows, uint32_t k);

#endif
