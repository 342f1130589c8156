/* synth.c - see synth.h. */
#include "synth.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STOCK_ROWS = 8192, CHUNK_BLOCKS = 16, CLUSTER_BLOCKS = 24 };

/* ---- random numbers: splitmix64 (Steele, Lea, Flood 2014) ---- */

uint64_t synth_random(synth *s)
{
    uint64_t z = s->random += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t synth_below(synth *s, uint64_t n)
{
    return synth_random(s) % n; /* n is tiny beside 2^64 */
}

double synth_unit(synth *s)
{
    return (double)(synth_random(s) >> 11) * 0x1p-53;
}

/* Mean 0, variance 1: twelve uniform numbers less six, near enough to a normal one. */
static float normal(synth *s)
{
    uint64_t a = synth_random(s), b = synth_random(s), c = synth_random(s);
    uint64_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (a >> 16 * i & 0xffff) + (b >> 16 * i & 0xffff) + (c >> 16 * i & 0xffff);
    return (float)((double)sum / 65536.0 - 6.0);
}

/* ---- */

int synth_init(cli *c, const synth_flags *flags, synth *out)
{
    *out = (synth){.random = flags->seed, .dtype = (cairn_dtype)flags->dtype};
    cairn_attention_shape *shape = &out->shape;
    cairn_attention_shape_init(shape, sizeof *shape);
    shape->layers = flags->layers;
    shape->heads = flags->heads;
    shape->kv_heads = flags->kv_heads;
    shape->head_dim = flags->head_dim;
    shape->block_tokens = flags->block_tokens;
    shape->rope_theta = 500000;
    shape->scheme = CAIRN_POSITION_CLAMPED;
    shape->clamp_blocks = 2;
    shape->window_blocks = 1;
    shape->top_k = 16;
    cairn_status st = cairn_attention_shape_check(shape);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    size_t D = shape->head_dim, heads = (size_t)shape->layers * shape->kv_heads;
    out->stock = malloc(STOCK_ROWS * D * sizeof(float));
    out->common = malloc(heads * D * sizeof(float));
    out->cluster = malloc(heads * D * sizeof(float));
    out->spread = malloc(D * sizeof(float));
    if (out->stock == NULL || out->common == NULL || out->cluster == NULL || out->spread == NULL)
        return cli_fail(c, EXIT_FAILED, "out of memory");
    for (size_t i = 0; i < STOCK_ROWS * D; i++) out->stock[i] = normal(out);
    for (size_t d = 0; d < D; d++) out->spread[d] = 2.0f / sqrtf(1.0f + 0.25f * (float)d); /* power of d: 4, 3.2, ... */
    for (size_t i = 0; i < heads * D; i++) out->common[i] = 1.5f * out->spread[i % D] * normal(out);
    for (size_t i = 0; i < heads * D; i++) out->cluster[i] = out->spread[i % D] * normal(out);
    return -1;
}

void synth_wipe(synth *s)
{
    free(s->stock);
    free(s->common);
    free(s->cluster);
    free(s->spread);
    *s = (synth){0};
}

int synth_store(cli *c, const synth *s, const char *dir, cairn_store **out)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.no_sync = true; /* nobody will want it after a power cut */
    opt.geometry = (cairn_geometry){.layers = s->shape.layers,
                                    .kv_heads = s->shape.kv_heads,
                                    .head_dim = s->shape.head_dim,
                                    .block_tokens = s->shape.block_tokens,
                                    .dtype = s->dtype};
    snprintf(opt.model.name, sizeof opt.model.name, "synthetic keys");
    cairn_status st = cairn_store_open(dir, &opt, out);
    return st == CAIRN_OK ? -1 : cli_fail_status(c, st);
}

/* Landmark keys (kv_heads, D) of a layer for the next block. */
static void next_landmark(synth *s, uint32_t layer, float *out)
{
    const size_t D = s->shape.head_dim;
    for (uint32_t h = 0; h < s->shape.kv_heads; h++) {
        size_t at = ((size_t)layer * s->shape.kv_heads + h) * D;
        if (synth_below(s, CLUSTER_BLOCKS) == 0)
            for (size_t d = 0; d < D; d++) s->cluster[at + d] = s->spread[d] * normal(s);
        const float *noise = s->stock + synth_below(s, STOCK_ROWS) * D;
        for (size_t d = 0; d < D; d++)
            out[h * D + d] = s->common[at + d] + s->cluster[at + d] + 0.5f * s->spread[d] * noise[d];
    }
}

int synth_append(cli *c, synth *s, cairn_session *session, uint64_t blocks, bool commit, progress *bar)
{
    const cairn_attention_shape *shape = cairn_session_shape(session); /* of a dense twin, perhaps */
    const bool dense = shape->scheme == CAIRN_POSITION_DENSE;
    const size_t B = shape->block_tokens + !dense, row = (size_t)shape->kv_heads * shape->head_dim;
    const size_t rows_max = CHUNK_BLOCKS * B;
    float *k = malloc(rows_max * row * sizeof *k), *v = malloc(rows_max * row * sizeof *v);
    cairn_token *ids = calloc(rows_max, sizeof *ids);
    int code = k != NULL && v != NULL && ids != NULL ? -1 : cli_fail(c, EXIT_FAILED, "out of memory");
    cairn_status st = CAIRN_OK;
    for (uint64_t done = 0; code < 0 && st == CAIRN_OK && done < blocks;) {
        size_t n = blocks - done < CHUNK_BLOCKS ? (size_t)(blocks - done) : CHUNK_BLOCKS;
        for (uint32_t l = 0; l < shape->layers && st == CAIRN_OK; l++) {
            for (size_t i = 0; i < n * B; i++) {
                size_t most = STOCK_ROWS - shape->kv_heads; /* heads take rows that follow one another */
                memcpy(k + i * row, s->stock + synth_below(s, most) * shape->head_dim, row * sizeof *k);
                memcpy(v + i * row, s->stock + synth_below(s, most) * shape->head_dim, row * sizeof *v);
                if (!dense && i % B == shape->block_tokens) next_landmark(s, l, k + i * row);
            }
            st = cairn_session_append(session, l, n * B, k, v);
        }
        if (st == CAIRN_OK) st = cairn_session_advance(session, ids, n * B);
        if (st == CAIRN_OK && commit && cairn_session_pending_bytes(session) >= 32 << 20)
            st = cairn_session_commit(session, NULL);
        done += n;
        if (bar != NULL) progress_show(bar, done, blocks);
        if (cli_stopped()) code = cli_fail(c, EXIT_FAILED, "interrupted while making a store");
    }
    if (code < 0 && st == CAIRN_OK && commit) st = cairn_session_commit(session, NULL);
    if (code < 0 && st != CAIRN_OK) code = cli_fail_status(c, st);
    free(k);
    free(v);
    free(ids);
    return code;
}

int synth_context(cli *c, synth *s, cairn_store *store, const char *name, uint64_t blocks, progress *bar)
{
    cairn_session_options opt;
    cairn_session *session = NULL;
    uint64_t id = 0;
    cairn_session_options_init(&opt, sizeof opt, &s->shape);
    opt.write = true;
    opt.ram_bytes = UINT64_C(1) << 30;
    cairn_status st = cairn_context_create(store, name, &id);
    if (st == CAIRN_OK) st = cairn_session_begin(store, &s->shape, &name, 1, &opt, &session);
    int code = st == CAIRN_OK ? synth_append(c, s, session, blocks, true, bar) : cli_fail_status(c, st);
    cairn_session_end(session);
    return code;
}

void synth_query(synth *s, bool alike, double far, float *q)
{
    const cairn_attention_shape *shape = &s->shape;
    const size_t D = shape->head_dim, per = shape->heads / shape->kv_heads;
    float mix = (float)far;
    for (uint32_t h = 0; h < shape->heads; h++) {
        if (alike && h % per != 0) {
            memcpy(q + h * D, q + (h - h % per) * D, D * sizeof *q);
            continue;
        }
        const float *own = s->cluster + h / per * D; /* of layer 0 */
        for (size_t d = 0; d < D; d++) q[h * D + d] = (1 - mix) * own[d] + (0.3f + mix) * s->spread[d] * normal(s);
    }
}

void synth_landmarks(synth *s, size_t n, float *keys)
{
    assert(s->shape.kv_heads == 1);
    for (size_t i = 0; i < n; i++) next_landmark(s, 0, keys + i * s->shape.head_dim);
}

void synth_search(synth *s, const float *key, double far, float *q)
{
    const size_t D = s->shape.head_dim;
    float mix = (float)far, scale = 1.0f / sqrtf((float)D);
    for (size_t d = 0; d < D; d++)
        q[d] = scale * ((1 - mix) * (key[d] - s->common[d]) + (0.3f + mix) * s->spread[d] * normal(s));
}
