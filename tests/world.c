#include "world.h"

#include <stdio.h>

/* ---- streams ---- */

static float *random_rows(test_random *r, size_t rows, size_t heads, size_t dim)
{
    float *x = malloc(rows * heads * dim * sizeof *x + 1);
    assert_non_null(x);
    test_random_fill(r, x, rows * heads * dim);
    return x;
}

void world_init(world *w, test_random *r, const world_spec *spec)
{
    memset(w, 0, sizeof *w);
    assert_true(spec->layers <= WORLD_LAYERS && spec->heads <= WORLD_HEADS);
    cairn_attention_shape_init(&w->shape, sizeof w->shape);
    w->shape.layers = spec->layers;
    w->shape.heads = spec->heads;
    w->shape.kv_heads = spec->kv_heads;
    w->shape.head_dim = spec->head_dim;
    w->shape.block_tokens = spec->block_tokens;
    w->shape.rope_interleaved = spec->interleaved;
    w->shape.scheme = spec->scheme;
    w->shape.local_layers = w->local;
    if (spec->bias) {
        for (size_t i = 0; i < (size_t)spec->layers * spec->heads; i++)
            w->bias[i] = logf((float)spec->block_tokens) + 0.3F * test_random_normal(r);
        w->shape.landmark_bias = w->bias;
    }
    w->rows = spec->rows;
    for (uint32_t l = 0; l < spec->layers; l++) {
        w->q[l] = random_rows(r, w->rows, spec->heads, spec->head_dim);
        w->k[l] = random_rows(r, w->rows, spec->kv_heads, spec->head_dim);
        w->v[l] = random_rows(r, w->rows, spec->kv_heads, spec->head_dim);
    }
    w->ids = malloc(w->rows * sizeof *w->ids + 1);
    assert_non_null(w->ids);
    for (size_t i = 0; i < w->rows; i++) w->ids[i] = (cairn_token)test_random_below(r, 50000);
}

void world_random(world *w, test_random *r, cairn_position_scheme scheme, size_t blocks)
{
    world_spec spec = {.layers = 1 + test_random_below(r, 3),
                       .kv_heads = 1 + test_random_below(r, 2),
                       .head_dim = 4 + 2 * test_random_below(r, 15),
                       .block_tokens = 3 + test_random_below(r, 13),
                       .scheme = scheme,
                       .interleaved = test_random_below(r, 2) == 0,
                       .bias = test_random_below(r, 3) != 0};
    spec.heads = spec.kv_heads * (2 + test_random_below(r, 3));
    spec.rows = blocks * (spec.block_tokens + 1) + test_random_below(r, spec.block_tokens);
    world_init(w, r, &spec);
    w->shape.clamp_blocks = 1 + test_random_below(r, 4);
    w->shape.window_blocks = test_random_below(r, 4);
    w->shape.rope_dims = test_random_below(r, 3) == 0 ? spec.head_dim / 4 * 2 : 0;
    for (size_t i = 0; i < WORLD_PAIRS; i++) w->factors[i] = 1 + 7 * (float)test_random_unit(r);
    if (test_random_below(r, 3) == 0) w->shape.rope_factors = w->factors;
}

void world_wipe(world *w)
{
    for (uint32_t l = 0; l < WORLD_LAYERS; l++) free(w->q[l]), free(w->k[l]), free(w->v[l]);
    free(w->ids);
    free(w->never);
    memset(w, 0, sizeof *w);
}

size_t world_slots(const world *w)
{
    return w->shape.block_tokens + (w->shape.scheme == CAIRN_POSITION_DENSE ? 0U : 1U);
}

size_t world_tokens(const world *w, size_t rows)
{
    size_t slots = world_slots(w);
    return rows / slots * w->shape.block_tokens + rows % slots;
}

/* ---- records ---- */

size_t world_width(const world *w)
{
    return (size_t)w->shape.heads * w->shape.head_dim;
}

void record_init(record *rec, const world *w, uint32_t k)
{
    memset(rec, 0, sizeof *rec);
    rec->w = w;
    rec->k = k;
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        size_t n = w->rows * world_width(w), ids = w->rows * w->shape.heads * k;
        rec->out[l] = malloc(n * sizeof *rec->out[l] + 1);
        rec->picked[l] = malloc(ids * sizeof *rec->picked[l] + 1);
        rec->slots[l] = malloc(ids * sizeof *rec->slots[l] + 1);
        assert_true(rec->out[l] != NULL && rec->picked[l] != NULL && rec->slots[l] != NULL);
        for (size_t i = 0; i < n; i++) rec->out[l][i] = NAN;
        for (size_t i = 0; i < ids; i++) rec->picked[l][i] = -2;
        for (size_t i = 0; i < ids; i++) rec->slots[l][i] = -2;
    }
}

void record_wipe(record *rec)
{
    for (uint32_t l = 0; l < WORLD_LAYERS; l++) free(rec->out[l]), free(rec->picked[l]), free(rec->slots[l]);
    memset(rec, 0, sizeof *rec);
}

void record_near(const record *a, const record *b, size_t from, size_t to, double tolerance)
{
    const world *w = a->w;
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t i = from * world_width(w); i < to * world_width(w); i++) {
            if (fabs((double)a->out[l][i] - (double)b->out[l][i]) <= tolerance) continue;
            fail_msg("layer %u row %zu head %zu: %.9g and %.9g differ by more than %.3g", (unsigned)l,
                     i / world_width(w), i / w->shape.head_dim % w->shape.heads, (double)a->out[l][i],
                     (double)b->out[l][i], tolerance);
        }
    }
}

void record_same(const record *a, const record *b, size_t from, size_t to)
{
    const world *w = a->w;
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t r = from; r < to; r++) {
            const float *x = a->out[l] + r * world_width(w), *y = b->out[l] + r * world_width(w);
            if (memcmp(x, y, world_width(w) * sizeof *x) == 0 && !isnan(x[0])) continue;
            size_t i = 0;
            while (i + 1 < world_width(w) && memcmp(x + i, y + i, sizeof *x) == 0) i++;
            fail_msg("layer %u row %zu head %zu: %.9g is not bit for bit %.9g", (unsigned)l, r, i / w->shape.head_dim,
                     (double)x[i], (double)y[i]);
        }
    }
}

void world_feed(const world *w, cairn_session *s, size_t from, size_t to, size_t chunk, test_random *r, record *rec)
{
    size_t kv = (size_t)w->shape.kv_heads * w->shape.head_dim;
    bool dense = w->shape.scheme == CAIRN_POSITION_DENSE;
    if (rec != NULL && rec->k > 0) assert_ok(cairn_session_trace_enable(s, true));
    float *unused = malloc((to - from) * world_width(w) * sizeof *unused + 1);
    assert_non_null(unused);
    for (size_t at = from; at < to;) {
        size_t n = chunk != 0 ? chunk : 1 + test_random_below(r, (uint32_t)(3 * world_slots(w)));
        if (n > to - at) n = to - at;
        for (size_t i = 0; i < n && !dense; i++) /* the session's count of landmarks is this file's */
            assert_int_equal(cairn_session_landmark_due(s, i),
                             (cairn_session_slot(s) + i) % world_slots(w) == w->shape.block_tokens);
        for (uint32_t l = 0; l < w->shape.layers; l++) {
            float *out = rec != NULL ? rec->out[l] + at * world_width(w) : unused;
            assert_ok(cairn_session_append(s, l, n, w->k[l] + at * kv, w->v[l] + at * kv));
            assert_ok(cairn_session_attend(s, l, n, w->q[l] + at * world_width(w), out));
            if (rec == NULL || rec->k == 0) continue;
            size_t id = at * w->shape.heads * rec->k;
            assert_ok(cairn_session_trace(s, n, rec->k, rec->picked[l] + id, rec->slots[l] + id));
        }
        assert_ok(cairn_session_advance(s, w->ids + at, n));
        at += n;
    }
    free(unused);
}

/* ---- stores and sessions ---- */

cairn_store *world_store(const world *w, const char *dir, const char *name, cairn_dtype dtype)
{
    cairn_store_options opt;
    cairn_store *store = NULL;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.map_bytes = (uint64_t)1 << 32;
    opt.geometry = (cairn_geometry){.layers = w->shape.layers,
                                    .first_layer = w->first_layer,
                                    .kv_heads = w->shape.kv_heads,
                                    .head_dim = w->shape.head_dim,
                                    .block_tokens = w->shape.block_tokens,
                                    .dtype = dtype};
    snprintf(opt.model.name, sizeof opt.model.name, "random rows");
    opt.model.fingerprint = 77;
    char *path = test_path(dir, name);
    assert_ok(cairn_store_open(path, &opt, &store));
    free(path);
    return store;
}

cairn_store *world_store_open(const char *dir, const char *name)
{
    cairn_store_options opt;
    cairn_store *store = NULL;
    cairn_store_options_init(&opt, sizeof opt);
    opt.map_bytes = (uint64_t)1 << 32;
    char *path = test_path(dir, name);
    assert_ok(cairn_store_open(path, &opt, &store));
    free(path);
    return store;
}

void world_write_blocks(const world *w, cairn_store *store, const char *context, size_t first, size_t count)
{
    const cairn_attention_shape *shape = &w->shape;
    const cairn_geometry *geometry = cairn_store_geometry(store);
    size_t c = shape->block_tokens, dim = shape->head_dim, kv = shape->kv_heads, slots = c + 1;
    size_t layers = shape->layers - geometry->first_layer, dims = shape->rope_dims != 0 ? shape->rope_dims : dim;
    assert_int_equal(geometry->dtype, CAIRN_F32);
    enum { BATCH = 256 };
    size_t tile = 2 * c * dim;
    assert_int_equal(cairn_tile_payload_bytes(CAIRN_F32, (uint32_t)c, (uint32_t)dim), tile * sizeof(float));
    float *tiles = malloc(BATCH * layers * kv * tile * sizeof *tiles);
    float *landmarks = malloc(BATCH * layers * kv * dim * sizeof *landmarks);
    double *cosine = malloc(c * dims * sizeof *cosine), *sine = malloc(c * dims * sizeof *sine);
    assert_true(tiles != NULL && landmarks != NULL && cosine != NULL && sine != NULL);
    for (size_t o = 0; o < c; o++) {
        for (size_t i = 0; i < dims; i++) {
            size_t pair = shape->rope_interleaved ? i / 2 : i % (dims / 2);
            double angle = (double)o * pow((double)shape->rope_theta, -2.0 * (double)pair / (double)dims);
            if (shape->rope_factors != NULL) angle /= (double)shape->rope_factors[pair];
            cosine[o * dims + i] = cos(angle);
            sine[o * dims + i] = sin(angle);
        }
    }
    cairn_writer *writer = NULL;
    assert_ok(cairn_writer_begin(store, context, &writer));
    for (size_t done = 0; done < count;) {
        cairn_block_data blocks[BATCH];
        size_t n = count - done < BATCH ? count - done : BATCH;
        cairn_token *tokens = malloc(n * c * sizeof *tokens);
        assert_non_null(tokens);
        for (size_t i = 0; i < n; i++) {
            size_t row = (first + done + i) * slots;
            memcpy(tokens + i * c, w->ids + row, c * sizeof *tokens);
            for (size_t lg = 0; lg < layers * kv; lg++) {
                size_t l = geometry->first_layer + lg / kv, g = lg % kv;
                float *keys = tiles + (i * layers * kv + lg) * tile, *values = keys + c * dim;
                for (size_t o = 0; o < c; o++) {
                    const float *k = w->k[l] + ((row + o) * kv + g) * dim;
                    memcpy(keys + o * dim, k, dim * sizeof *k);
                    for (size_t x = 0; x < dims; x++) {
                        bool second = shape->rope_interleaved ? x % 2 == 1 : x >= dims / 2;
                        size_t y = shape->rope_interleaved ? x ^ 1U : second ? x - dims / 2 : x + dims / 2;
                        keys[o * dim + x] = (float)((double)k[x] * cosine[o * dims + x] +
                                                    (second ? 1.0 : -1.0) * (double)k[y] * sine[o * dims + x]);
                    }
                    memcpy(values + o * dim, w->v[l] + ((row + o) * kv + g) * dim, dim * sizeof *values);
                }
                memcpy(landmarks + (i * layers * kv + lg) * dim, w->k[l] + ((row + c) * kv + g) * dim,
                       dim * sizeof *landmarks);
            }
            blocks[i] =
                (cairn_block_data){tokens + i * c, landmarks + i * layers * kv * dim, tiles + i * layers * kv * tile};
        }
        assert_ok(cairn_writer_commit(writer, blocks, n, NULL, 0, NULL));
        free(tokens);
        done += n;
    }
    cairn_writer_end(writer);
    free(tiles);
    free(landmarks);
    free(cosine);
    free(sine);
}

cairn_session *world_session(const world *w, cairn_store *store, const session_spec *spec)
{
    cairn_session_options opt;
    cairn_session *s = NULL;
    cairn_session_options_init(&opt, sizeof opt, &w->shape);
    opt.policy.top_k = spec->no_retrieval ? 0 : spec->top_k != 0 ? spec->top_k : CAIRN_TOP_K_ALL;
    if (spec->window_set) opt.policy.window_blocks = spec->window;
    opt.policy.newest = spec->newest;
    opt.policy.scope = spec->scope;
    opt.policy.mass = spec->mass;
    opt.policy.measure_mass = spec->measure;
    opt.fetch = spec->fetch;
    if (spec->ram_bytes != 0) opt.ram_bytes = spec->ram_bytes;
    opt.threads = spec->threads != 0 ? spec->threads : 1;
    opt.fresh = spec->fresh;
    opt.write = spec->write;
    opt.dtype = spec->dtype;
    opt.index_kind = spec->index_kind;
    opt.read_ahead = spec->read_ahead;
    assert_ok(cairn_session_begin(store, &w->shape, spec->contexts, spec->n, &opt, &s));
    return s;
}

/* ---- whole runs ---- */

void world_run_memory(const world *w, const session_spec *spec, size_t chunk, uint64_t seed, record *rec)
{
    test_random r = {seed};
    cairn_session *s = world_session(w, NULL, spec);
    world_feed(w, s, 0, w->rows, chunk, &r, rec);
    cairn_session_end(s);
}

size_t world_commit_point(const world *w, size_t row)
{
    return row % world_slots(w) == w->shape.block_tokens ? row + 1 : row;
}

void world_run_disk(const world *w, const session_spec *base, cairn_dtype dtype, size_t reopens, uint64_t seed,
                    record *rec)
{
    const char *name = "stream";
    session_spec spec = *base;
    spec.contexts = &name;
    spec.n = 1;
    spec.write = true;
    test_random r = {seed};
    char *dir = test_make_dir();
    cairn_store *store = world_store(w, dir, "store", dtype);
    assert_ok(cairn_context_create(store, name, NULL));
    size_t at = 0;
    for (size_t i = 0; i <= reopens; i++) {
        size_t to =
            i == reopens ? w->rows : world_commit_point(w, at + test_random_below(&r, (uint32_t)(w->rows - at + 1)));
        cairn_session *s = world_session(w, store, &spec);
        const cairn_token *tail;
        size_t n, slot = (size_t)cairn_session_slot(s);
        assert_ok(cairn_session_tail(s, &tail, &n));
        assert_int_equal(slot, at / world_slots(w) * world_slots(w));
        assert_int_equal(n, at - slot);
        if (n > 0) world_feed(w, s, slot, at, i % 2 == 0 ? n : 1, &r, NULL);
        size_t half = world_commit_point(w, at + test_random_below(&r, (uint32_t)(to - at + 1)));
        if (half > to) half = to;
        world_feed(w, s, at, half, 0, &r, rec);
        if (i % 2 == 1) assert_ok(cairn_session_commit(s, NULL)); /* and go on */
        world_feed(w, s, half, to, 0, &r, rec);
        assert_ok(cairn_session_commit(s, NULL));
        assert_int_equal(cairn_session_pending_bytes(s), 0);
        cairn_session_end(s);
        cairn_store_close(store);
        store = world_store_open(dir, "store");
        at = to;
    }
    cairn_store_close(store);
    test_remove_dir(dir);
}
