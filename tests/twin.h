/* twin.h - the outside witness of sessions: a second, plain way to compute what must come out. Shares no code with the
 * attention step, and is itself checked against the golden vectors (test_golden.c). */
#ifndef CAIRN_TESTS_TWIN_H
#define CAIRN_TESTS_TWIN_H

#include "world.h"

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

#endif
