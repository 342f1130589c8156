/* world.h - streams of random rows standing for a model, and ways to run them through sessions and stores. */
#ifndef CAIRN_TESTS_WORLD_H
#define CAIRN_TESTS_WORLD_H

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

enum { WORLD_LAYERS = 8, WORLD_HEADS = 64, WORLD_PAIRS = 16 };

/* A stream: what a model would hand to a session, row by row (slots; row r is a landmark iff r % (C+1) == C). */
typedef struct world {
    cairn_attention_shape shape; /* points into this struct: not to be copied */
    uint8_t local[WORLD_LAYERS];
    float bias[WORLD_LAYERS * WORLD_HEADS];
    float factors[WORLD_PAIRS]; /* of a random world's pairs */
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
size_t world_width(const world *w);               /* heads x D */

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
    bool measure, fresh, write, read_ahead;
    uint32_t threads;
    cairn_fetch_mode fetch;
    uint64_t ram_bytes;
    cairn_dtype dtype;
    const char *index_kind;
} session_spec;
cairn_session *world_session(const world *w, cairn_store *store, const session_spec *spec);

/* ---- whole runs ---- */

/* All rows through a session in memory, in chunks of `chunk` rows (0 = of random length). */
void world_run_memory(const world *w, const session_spec *spec, size_t chunk, uint64_t seed, record *rec);
/* The same through a store, committed and closed and opened again `reopens` times at random rows, the tail rerun. */
void world_run_disk(const world *w, const session_spec *spec, cairn_dtype dtype, size_t reopens, uint64_t seed,
                    record *rec);
/* The row, or the next if a commit cannot be there: between a block's last token and its landmark. */
size_t world_commit_point(const world *w, size_t row);

#endif
