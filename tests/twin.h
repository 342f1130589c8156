/* twin.h - the outside witness of sessions: streams of random rows, ways to feed them, and a second, plain way to
 * compute what must come out. Shares no code with the attention step. */
#ifndef CAIRN_TESTS_TWIN_H
#define CAIRN_TESTS_TWIN_H

#include "support.h"

#include <cairn/context.h>

#include <math.h>
#include <stdlib.h>

#define assert_near(actual, expected, tolerance)                                                                       \
    do {                                                                                                               \
        double near_a = (double)(actual), near_e = (double)(expected);                                                 \
        if (!(fabs(near_a - near_e) <= (double)(tolerance)))                                                           \
            fail_msg("%s is %.9g, expected %.9g within %.3g", #actual, near_a, near_e, (double)(tolerance));           \
    } while (0)

enum { WORLD_LAYERS = 8, WORLD_HEADS = 64 };

/* A stream: what a model would hand to a session, row by row (slots; row r is a landmark iff r % (C+1) == C). */
typedef struct world {
    cairn_attention_shape shape; /* points into this struct: not to be copied */
    uint8_t local[WORLD_LAYERS];
    float bias[WORLD_LAYERS * WORLD_HEADS];
    size_t rows;
    float *q[WORLD_LAYERS]; /* (rows, heads, D) */
    float *k[WORLD_LAYERS]; /* (rows, kv_heads, D), before rotation */
    float *v[WORLD_LAYERS];
    cairn_token *ids;     /* (rows) */
    uint8_t *never;       /* (blocks) 1 = no such block: keeps attached blocks at their distance; NULL = none */
    uint32_t first_layer; /* of stores made for it */
} world;

typedef struct world_spec {
    uint32_t layers, heads, kv_heads, head_dim, block_tokens;
    cairn_position_scheme scheme;
    bool interleaved, bias;
    size_t rows;
} world_spec;

void world_init(world *w, test_random *r, const world_spec *spec);
void world_random(world *w, test_random *r, cairn_position_scheme scheme, size_t blocks); /* a random spec */
void world_wipe(world *w);
size_t world_slots(const world *w);               /* B; of a dense world C */
size_t world_tokens(const world *w, size_t rows); /* plain tokens among the first rows */

/* What came out of a run: rows outside those fed are NaN / -2. */
typedef struct record {
    const world *w;
    float *out[WORLD_LAYERS];      /* (rows, heads, D) */
    uint32_t k;                    /* ids kept per row and head; 0 = no trace wanted */
    int64_t *picked[WORLD_LAYERS]; /* (rows, heads, k) */
    int32_t *slots[WORLD_LAYERS];
} record;
void record_init(record *rec, const world *w, uint32_t k);
void record_wipe(record *rec);
/* Every bit of rows [from, to) is the same in both. */
void record_same(const record *a, const record *b, size_t from, size_t to);
void record_near(const record *a, const record *b, size_t from, size_t to, double tolerance);

/* Feeds rows [from, to) of the world in chunks of `chunk` rows (0 = of random length), all layers, recording. */
void world_feed(const world *w, cairn_session *s, size_t from, size_t to, size_t chunk, test_random *r, record *rec);

/* Rows [from, to) of every layer against cairn_attention_reference. visible as there, per layer, or NULL = all. */
void expect_reference(const record *rec, uint8_t *const *visible, size_t from, size_t to, double tolerance);
/* The visible sets a clamped policy yields, by this file's own scores: (rows, heads, blocks) per layer, malloc'ed. */
void expected_visible(const world *w, uint32_t top_k, int32_t window, uint32_t newest, uint8_t **visible);
void expected_visible_layer(const world *w, uint32_t layer, uint32_t top_k, int32_t window, uint32_t newest,
                            uint8_t **visible);
void free_visible(uint8_t **visible);
/* The trace of rows [from, to) names exactly the blocks of expected_visible that lie outside the window. */
void expect_picked(const record *rec, uint8_t *const *visible, int32_t window, size_t from, size_t to);

/* ---- one row by streaming virtual keys, double ---- */

typedef struct twin_block {
    const float *k, *v; /* slot o, KV head g at (o * kv_heads + g) * D; the landmark's key at slot C */
    uint32_t tokens;    /* plain tokens, from slot 0; C unless closed early */
    size_t age;   /* whole blocks before the query's block where it is placed; clamped here if the shape says so */
    bool visible; /* else it only counts for the mass */
} twin_block;
typedef struct twin_result {
    double mass;       /* part of all exp-weight that belongs to own tokens and visible blocks */
    double gates[512]; /* share of each block in the weight of all, visible or not */
} twin_result;
/* q (heads, D) of a row at `offset` in its block; own_k, own_v: the rows of that block. out (D). */
void twin_row(const cairn_attention_shape *shape, uint32_t layer, uint32_t head, const float *q, size_t offset,
              const float *own_k, const float *own_v, const twin_block *blocks, size_t n, double *out,
              twin_result *result);

/* Row `query` of the world over nothing but `tokens` keys from row `first` on, all in its own block. */
void twin_own(const world *w, uint32_t layer, uint32_t head, size_t first, size_t tokens, size_t query, double *out);
/* A row of a clamped world that sees `visible` (blocks) of its past blocks. out (D). */
void twin_clamped(const world *w, uint32_t layer, size_t row, uint32_t head, const uint8_t *visible, double *out,
                  twin_result *result);
/* The paper's inference (sections 3.2, 3.3) of one chunk, rows [from, from + rows) of the world, on one layer, stingy
 * positions, everything before the chunk cached: picked and slots (rows, heads, top_k; -1 = none), out (rows, heads,
 * D). picked_given: use `picked` as it is. */
void twin_stingy(const world *w, uint32_t layer, size_t from, size_t rows, cairn_scope scope, uint32_t top_k,
                 uint32_t newest, bool picked_given, int64_t *picked, int32_t *slots, double *out);

/* ---- stores ---- */

/* A new store for the world below dir. */
cairn_store *world_store(const world *w, const char *dir, const char *name, cairn_dtype dtype);
/* Opens the same again. */
cairn_store *world_store_open(const char *dir, const char *name);
/* Writes blocks [first, first + count) of an f32 world into a context without any session: rows rotated here. */
void world_write_blocks(const world *w, cairn_store *store, const char *context, size_t first, size_t count);

typedef struct session_spec { /* zero = defaults */
    const char *const *contexts;
    size_t n;
    uint32_t top_k;    /* 0 = CAIRN_TOP_K_ALL */
    bool no_retrieval; /* k = 0 */
    bool window_set;
    int32_t window;
    uint32_t newest;
    cairn_scope scope;
    float mass;
    bool measure, fresh, write;
    uint32_t threads;
    cairn_fetch_mode fetch;
    uint64_t ram_bytes;
    cairn_dtype dtype;
    const char *index_kind;
} session_spec;
cairn_session *world_session(const world *w, cairn_store *store, const session_spec *spec);

#endif
