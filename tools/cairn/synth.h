/* synth.h - a store filled without a model: keys and values of a given geometry, for benches of what does not depend on
 * what they mean. Landmark keys are drawn as those of real models look (docs/benchmarks.md): a common part, clusters
 * that persist over neighbouring blocks, a few directions with most of the variance. Seeded. */
#ifndef CAIRN_CLI_SYNTH_H
#define CAIRN_CLI_SYNTH_H

#include "output.h"

#include <cairn/context.h>

typedef struct synth_flags { /* the geometry of Llama-3-8B's attention, one layer of it */
    uint32_t layers, heads, kv_heads, head_dim, block_tokens;
    int dtype; /* cairn_dtype */
    uint32_t seed;
} synth_flags;
#define SYNTH_FLAGS_INIT                                                                                               \
    {                                                                                                                  \
        .layers = 1, .heads = 32, .kv_heads = 8, .head_dim = 128, .block_tokens = 63, .dtype = CAIRN_F16               \
    }
#define SYNTH_OPTIONS(f)                                                                                               \
    OPT_NUMBER(CLI_U32, "layers", 0, &(f).layers, "N", "layers of the store (1)", 1, 4096),                            \
        OPT_NUMBER(CLI_U32, "kv-heads", 0, &(f).kv_heads, "N", "KV heads (8)", 1, 1024),                               \
        OPT_NUMBER(CLI_U32, "seed", 0, &(f).seed, "N", "of keys, values and choices (0)", 0, UINT32_MAX)

typedef struct synth {
    cairn_attention_shape shape;
    cairn_dtype dtype;
    uint64_t random;
    float *stock;   /* (STOCK_ROWS, head_dim) random rows, of which all others are copies */
    float *common;  /* (layers, kv_heads, head_dim) what all landmark keys of a head share */
    float *cluster; /* the same shape: the centre of the cluster the stream is in */
    float *spread;  /* (head_dim) how much each direction varies */
} synth;
int synth_init(cli *c, const synth_flags *flags, synth *out);
void synth_wipe(synth *s);

uint64_t synth_random(synth *s);            /* any 64 bits */
uint64_t synth_below(synth *s, uint64_t n); /* 0 .. n - 1 */
double synth_unit(synth *s);                /* 0 .. 1 */

/* An empty store of the geometry in `dir`, which exists and is empty. */
int synth_store(cli *c, const synth *s, const char *dir, cairn_store **out);
/* Appends rows until the session has `blocks` whole blocks more, without attending; commits if it may. */
int synth_append(cli *c, synth *s, cairn_session *session, uint64_t blocks, bool commit, progress *bar);
/* A new context with that many blocks. */
int synth_context(cli *c, synth *s, cairn_store *store, const char *name, uint64_t blocks, progress *bar);
/* Landmark keys (n, head_dim) of the first KV head for n blocks that follow one another, and a query that looks for
 * blocks like `key`, mixed with what is unlike all of them: `far` 0 .. 1. Scaled as a search is. */
void synth_landmarks(synth *s, size_t n, float *keys);
void synth_search(synth *s, const float *key, double far, float *q);
/* A query of every head (heads, head_dim), not yet rotated; those of one KV head are alike if `alike`. Like a key of
 * the stream (`far` 0) or unlike all of them (1). */
void synth_query(synth *s, bool alike, double far, float *q);

#endif
