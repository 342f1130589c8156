/* step.c - one attention step of one layer: select, fetch as batches, attend tile by tile, merge.
 *
 * Budget of a decode step (T = 1, k = 4, window 1, D = 32, f16): per KV head 5 tiles of 8 KiB and 5 x 63 x 32 x 4
 * operations; the tiles are the cost. Of a prefill chunk (1,008 tokens): each tile is fetched once however many rows
 * chose it, and within a unit converted once for all the rows that did (as a mixture-of-experts layer dispatches tokens
 * to experts).
 *
 * Gates are final before the first tile arrives (select.c), so tiles are added to the output one after the other, in
 * ascending block order per row, without running maxima; only DENSE, which has no landmarks, keeps (max, denominator).
 */
#include "attention_internal.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>

enum { TILE_ROWS = 64 }; /* query rows a tile kernel takes at a time */

cairn_status attn_step_init(attn_step *step, const cairn_attention_shape *shape, const cairn_policy *policy,
                            cairn_pool *pool)
{
    *step = (attn_step){.shape = shape, .policy = *policy, .kernels = cairn_kernels_best(), .pool = pool};
    step->stats.mass_kind = CAIRN_MASS_EXACT;
    step->stats.mass_min = 1;
    size_t n = cairn_pool_size(pool);
    size_t scratch = cairn_tile_scratch_bytes(shape->block_tokens, shape->head_dim);
    cairn_status st = attn_rope_init(&step->rope, shape);
    if (st != CAIRN_OK) return st;
    if ((step->workers = cairn_calloc(n, sizeof *step->workers)) == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%zu attention workers", n);
    for (size_t i = 0; i < n; i++) {
        attn_worker *w = &step->workers[i];
        if ((st = cairn_index_scratch_new(&w->search)) != CAIRN_OK) return st;
        w->tile_scratch = cairn_alloc(scratch);
        w->row = cairn_alloc_array(1 + ATTN_ROWS_KEPT, shape->head_dim * sizeof *w->row);
        if (w->tile_scratch == NULL || w->row == NULL) return cairn_fail(CAIRN_NO_MEMORY, "attention worker %zu", i);
    }
    return CAIRN_OK;
}

void attn_step_wipe(attn_step *step)
{
    for (size_t i = 0; step->workers != NULL && i < cairn_pool_size(step->pool); i++) {
        attn_worker *w = &step->workers[i];
        cairn_index_scratch_free(w->search);
        cairn_free(w->tile_scratch);
        cairn_free(w->q);
        cairn_free(w->in);
        cairn_free(w->to);
        cairn_free(w->weight);
        cairn_free(w->partial);
        cairn_free(w->scores);
        cairn_free(w->queries);
        cairn_free(w->hits);
        cairn_free(w->merged);
        cairn_free(w->found);
        cairn_free(w->mass);
        cairn_free(w->lse);
        cairn_free(w->row);
    }
    cairn_free(step->workers);
    for (size_t i = 0; i < step->cap_units; i++) {
        cairn_free(step->units[i].picks);
        cairn_free(step->units[i].sorted);
        cairn_free(step->units[i].own);
        cairn_free(step->units[i].acc);
    }
    cairn_free(step->units);
    cairn_free(step->bits);
    cairn_free(step->set);
    cairn_free(step->rank);
    cairn_free(step->requests);
    cairn_free(step->mass);
    cairn_free(step->tiles);
    cairn_free(step->shared);
    cairn_free(step->block_mass);
    attn_lore_wipe(step);
    attn_rope_wipe(&step->rope);
    *step = (attn_step){0};
}

typedef struct run {
    attn_step *step;
    const attn_chunk *chunk;
    const attn_line *line;
    size_t tile0; /* the batch at hand: tiles [tile0, tile1) of the step's list */
    size_t tile1;
} run;

static void select_item(void *arg, size_t item, size_t worker)
{
    run *r = arg;
    attn_unit *unit = &r->step->units[item];
    unit->status = attn_select(r->step, r->chunk, r->line, unit, &r->step->workers[worker]);
    unit->cursor = 0;
    if (unit->status != CAIRN_OK) snprintf(unit->sentence, sizeof unit->sentence, "%s", cairn_last_error());
}

static float *out_of(const run *r, const attn_unit *unit, uint32_t row, uint32_t g)
{
    const cairn_attention_shape *shape = r->step->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    return r->chunk->out + ((size_t)row * shape->heads + (size_t)unit->head * per + g) * shape->head_dim;
}

/* The unit's rows over their own block: out = sum of gates times own values. */
static void own_item(void *arg, size_t item, size_t worker)
{
    run *r = arg;
    const cairn_attention_shape *shape = r->step->shape;
    attn_unit *unit = &r->step->units[item];
    attn_worker *w = &r->step->workers[worker];
    const attn_group *group = &r->chunk->groups[unit->group];
    uint32_t per = shape->heads / shape->kv_heads;
    size_t n = (size_t)group->rows * per;
    size_t c = shape->block_tokens;
    size_t at = ((size_t)unit->group * shape->kv_heads + unit->head) * c * shape->head_dim;
    cairn_tile own = {.dtype = CAIRN_F32,
                      .tokens = group->fill,
                      .head_dim = shape->head_dim,
                      .keys = r->chunk->own_k + at,
                      .values = r->chunk->own_v + at};
    for (size_t i = 0; i < n; i++) {
        w->to[i] = out_of(r, unit, group->row0 + (uint32_t)(i / per), (uint32_t)(i % per));
        memset(w->to[i], 0, shape->head_dim * sizeof(float));
    }
    r->step->kernels->tile_mix(&own, n, unit->own, c, w->to, w->tile_scratch);
}

/* DENSE: adds one tile to (max, denominator, output) of a row; the block's logit is the log-sum-exp of its scores. */
static void merge_dense(float *acc, float *out, const float *values, float lse, size_t dim)
{
    float m = acc[0] > lse ? acc[0] : lse;
    float keep = expf(acc[0] - m);
    float add = expf(lse - m);
    for (size_t d = 0; d < dim; d++) out[d] = out[d] * keep + values[d] * add;
    acc[0] = m;
    acc[1] = acc[1] * keep + add;
}

/* Whether a row's query is turned alike for two of its blocks: all that are as far as the clamp are. */
static bool same_query(const attn_pick *a, const attn_pick *b)
{
    return a->row == b->row && a->g == b->g && a->delta == b->delta;
}

/* What is known of the rows of w->q: whose queries they are. */
typedef struct turned {
    const attn_pick *of[TILE_ROWS];
    size_t n;
} turned;

/* Row i for the kernels: the pick's query, turned unless it is there from the tile before, its gate and its output. */
static void prepare_row(const run *r, const attn_unit *unit, attn_worker *w, turned *known, size_t i,
                        const attn_pick *p)
{
    attn_step *step = r->step;
    const cairn_attention_shape *shape = step->shape;
    const attn_group *group = &r->chunk->groups[unit->group];
    const uint32_t per = shape->heads / shape->kv_heads;
    const size_t dim = shape->head_dim;
    const bool dense = shape->scheme == CAIRN_POSITION_DENSE;
    if (i >= known->n || !same_query(known->of[i], p)) {
        const float *q = r->chunk->q + ((size_t)p->row * shape->heads + (size_t)unit->head * per + p->g) * dim;
        size_t position = (size_t)p->delta * attn_slots(shape) + group->offset0 + (p->row - group->row0);
        attn_rotate(&step->rope, step->kernels, w->q + i * dim, q, position);
        step->kernels->scale(w->q + i * dim, 1.0f / sqrtf((float)dim), dim);
        known->of[i] = p;
        if (i >= known->n) known->n = i + 1;
    }
    w->in[i] = w->q + i * dim;
    w->weight[i] = dense ? 1.0f : p->weight;
    w->to[i] = dense ? w->partial + i * dim : out_of(r, unit, p->row, p->g);
}

/* The tile of pick i; NULL beyond the batch. */
static const cairn_tile *tile_of(const run *r, const attn_unit *unit, size_t i)
{
    return i < unit->n_picks && unit->picks[i].tile < r->tile1 ? &r->step->tiles[unit->picks[i].tile - r->tile0] : NULL;
}

/* Whether pick i, one of the batch, is the only one of its tile. */
static bool is_alone(const run *r, const attn_unit *unit, size_t i)
{
    const cairn_tile *tile = tile_of(r, unit, i);
    return tile_of(r, unit, i + 1) != tile && (i == 0 || tile_of(r, unit, i - 1) != tile);
}

/* Whether tile_attend_two takes the tiles of picks i, one of the batch, and i + 1. */
static bool are_two(const run *r, const attn_unit *unit, const attn_worker *w, size_t i)
{
    const cairn_tile *tile = tile_of(r, unit, i), *then = tile_of(r, unit, i + 1);
    if (tile->dtype != CAIRN_Q8 || r->step->kernels->tile_attend_two == NULL) return false;
    if (r->step->shape->scheme == CAIRN_POSITION_DENSE || w->cap_rows < 2) return false;
    return then != NULL && then->tokens == tile->tokens && is_alone(r, unit, i) && is_alone(r, unit, i + 1);
}

/* The unit's picks whose tiles are in the batch, tile by tile, or two of them at a time. */
static void tiles_item(void *arg, size_t item, size_t worker)
{
    enum { LATER = 4 }; /* tiles */
    run *r = arg;
    attn_step *step = r->step;
    const cairn_attention_shape *shape = step->shape;
    attn_unit *unit = &step->units[item];
    attn_worker *w = &step->workers[worker];
    const attn_group *group = &r->chunk->groups[unit->group];
    uint32_t per = shape->heads / shape->kv_heads;
    size_t dim = shape->head_dim;
    bool dense = shape->scheme == CAIRN_POSITION_DENSE;
    turned known = {.n = 0};
    size_t coming = 0; /* of the next tiles so many have been asked for */
    while (tile_of(r, unit, unit->cursor) != NULL) {
        const size_t at = unit->cursor, together = are_two(r, unit, w, at) ? 2 : 1;
        const attn_pick *first = &unit->picks[at];
        cairn_tile tiles[2];
        size_t n = 0, asked = 0;
        while (n < TILE_ROWS && n < w->cap_rows && at + n < unit->n_picks &&
               (n < together || first[n].tile == first->tile)) {
            prepare_row(r, unit, w, &known, n, &first[n]);
            n++;
        }
        for (size_t t = 0; t < together; t++) {
            tiles[t] = *tile_of(r, unit, at + t);
            tiles[t].coming = t < coming;
            tiles[t].next = tile_of(r, unit, at + n + t);
            if (t == 0 && tiles[t].next == tile_of(r, unit, at)) tiles[t].next = NULL; /* more rows of the same */
            if (tiles[t].next != NULL) asked++;
            tiles[t].later = tile_of(r, unit, at + t + LATER * (together == 2 ? 1 : n));
        }
        coming = asked;
        if (dense) memset(w->partial, 0, n * dim * sizeof *w->partial);
        if (together == 2)
            step->kernels->tile_attend_two(tiles, w->in, w->weight, w->to, w->tile_scratch);
        else
            step->kernels->tile_attend(tiles, n, w->in, w->weight, w->to, dense ? w->lse : NULL, w->tile_scratch);
        for (size_t i = 0; dense && i < n; i++) {
            size_t row = (size_t)(first[i].row - group->row0) * per + first[i].g;
            merge_dense(unit->acc + 2 * row, out_of(r, unit, first[i].row, first[i].g), w->to[i], w->lse[i], dim);
        }
        unit->cursor += n;
    }
}

static void divide_item(void *arg, size_t item, size_t worker)
{
    run *r = arg;
    const cairn_attention_shape *shape = r->step->shape;
    attn_unit *unit = &r->step->units[item];
    const attn_group *group = &r->chunk->groups[unit->group];
    uint32_t per = shape->heads / shape->kv_heads;
    (void)worker;
    for (size_t i = 0; i < (size_t)group->rows * per; i++)
        r->step->kernels->scale(out_of(r, unit, group->row0 + (uint32_t)(i / per), (uint32_t)(i % per)),
                                1.0f / unit->acc[2 * i + 1], shape->head_dim);
}

static cairn_status reserve_units(attn_step *step, size_t n)
{
    if (n <= step->cap_units) return CAIRN_OK;
    attn_unit *bigger = cairn_grow(step->units, step->cap_units * sizeof *bigger, n, sizeof *bigger);
    if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu units of a step", n);
    memset(bigger + step->cap_units, 0, (n - step->cap_units) * sizeof *bigger);
    step->units = bigger;
    step->cap_units = n;
    return CAIRN_OK;
}

/* Any worker may get any unit, so all are made wide enough for the widest. */
static cairn_status reserve_workers(attn_step *step, const attn_chunk *chunk)
{
    size_t widest = 1;
    uint64_t blocks = chunk->groups[chunk->n_groups - 1].block; /* k beyond this means all of them */
    uint32_t k = step->policy.top_k < blocks ? step->policy.top_k : (uint32_t)blocks;
    if (step->policy.top_k == CAIRN_TOP_K_ALL) k = 1;
    for (size_t g = 0; g < chunk->n_groups; g++)
        if (chunk->groups[g].rows > widest) widest = chunk->groups[g].rows;
    widest *= step->shape->heads / step->shape->kv_heads;
    if (widest < 2) widest = 2; /* tiles at a time, for one row */
    cairn_status st = CAIRN_OK;
    for (size_t i = 0; st == CAIRN_OK && i < cairn_pool_size(step->pool); i++)
        st = attn_worker_reserve(step, &step->workers[i], widest, k);
    return st;
}

/* Sets the bits of all picks. The words that have any, ascending, into step->set; returns how many. */
static size_t set_words(attn_step *step, size_t words, size_t heads)
{
    size_t n = 0;
    bool ascending = true;
    for (size_t u = 0; u < step->n_units; u++) {
        const attn_unit *unit = &step->units[u];
        for (size_t i = 0; i < unit->n_picks; i++) {
            const size_t w = words * unit->head + (size_t)(unit->picks[i].block / 64);
            if (step->bits[w] == 0) {
                ascending = ascending && (n == 0 || step->set[n - 1] < w);
                step->set[n++] = w;
            }
            step->bits[w] |= UINT64_C(1) << unit->picks[i].block % 64;
        }
    }
    if (ascending) return n;
    n = 0;
    for (size_t w = 0; w < words * heads; w++)
        if (step->bits[w] != 0) step->set[n++] = w;
    return n;
}

static void clear_words(attn_step *step, size_t set)
{
    for (size_t i = 0; i < set; i++) step->bits[step->set[i]] = 0;
}

/* Numbers the distinct (head, block) pairs of all picks, in order of head and block, without sorting: one bit a block.
 * Of millions of blocks a token chooses a few, in order: only the words it sets are looked at, and all are 0 again at
 * the end. */
static cairn_status list_tiles(attn_step *step, size_t *out_n)
{
    uint32_t heads = step->shape->kv_heads;
    uint64_t end = 0;
    size_t n = 0;
    size_t words;
    for (size_t u = 0; u < step->n_units; u++) {
        const attn_unit *unit = &step->units[u];
        if (unit->n_picks != 0 && unit->picks[unit->n_picks - 1].block >= end)
            end = unit->picks[unit->n_picks - 1].block + 1; /* picks ascend */
    }
    *out_n = 0;
    if (end == 0) return CAIRN_OK;
    words = (size_t)((end + 63) / 64);
    if (words * heads > step->cap_words) {
        cairn_free(step->bits);
        cairn_free(step->rank);
        step->cap_words = 0;
        cairn_free(step->set);
        step->bits = cairn_calloc(words * heads, 2 * sizeof *step->bits);
        step->rank = cairn_alloc_array(words * heads, 2 * sizeof *step->rank);
        step->set = cairn_alloc_array(words * heads, 2 * sizeof *step->set);
        if (step->bits == NULL || step->rank == NULL || step->set == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "%zu words of tiles", words);
        step->cap_words = 2 * words * heads;
    }
    const size_t set = set_words(step, words, heads);
    for (size_t i = 0; i < set; i++) {
        step->rank[step->set[i]] = (uint32_t)n;
        n += (size_t)__builtin_popcountll(step->bits[step->set[i]]);
    }
    if (n > UINT32_MAX) {
        clear_words(step, set);
        return cairn_fail(CAIRN_UNSUPPORTED, "a step of %zu tiles", n);
    }
    if (n > step->cap_requests) {
        size_t cap = n + n / 2;
        cairn_free(step->requests);
        cairn_free(step->mass);
        cairn_free(step->tiles);
        step->cap_requests = 0;
        step->requests = cairn_alloc_array(cap, sizeof *step->requests);
        step->mass = cairn_alloc_array(cap, sizeof *step->mass);
        step->tiles = cairn_alloc_array(cap, sizeof *step->tiles);
        if (step->requests == NULL || step->mass == NULL || step->tiles == NULL) {
            clear_words(step, set);
            return cairn_fail(CAIRN_NO_MEMORY, "a step of %zu tiles", n);
        }
        step->cap_requests = cap;
    }
    for (size_t i = 0; i < set; i++) {
        const size_t w = step->set[i];
        size_t at = step->rank[w];
        for (uint64_t bits = step->bits[w]; bits != 0; bits &= bits - 1)
            step->requests[at++] =
                (attn_request){(w % words) * 64 + (uint64_t)__builtin_ctzll(bits), (uint32_t)(w / words)};
    }
    memset(step->mass, 0, n * sizeof *step->mass);
    for (size_t u = 0; u < step->n_units; u++) {
        attn_unit *unit = &step->units[u];
        for (size_t i = 0; i < unit->n_picks; i++) {
            attn_pick *p = &unit->picks[i];
            size_t w = words * unit->head + (size_t)(p->block / 64);
            uint64_t below = step->bits[w] & ((UINT64_C(1) << p->block % 64) - 1);
            p->tile = step->rank[w] + (uint32_t)__builtin_popcountll(below);
            step->mass[p->tile] += p->weight;
            if (step->block_mass != NULL && p->block < step->n_block_mass)
                step->block_mass[p->block] += (double)p->weight;
        }
    }
    clear_words(step, set);
    *out_n = n;
    return CAIRN_OK;
}

static void add_stats(cairn_step_stats *sum, const cairn_step_stats *x)
{
    sum->rows += x->rows;
    sum->candidates += x->candidates;
    sum->chosen += x->chosen;
    sum->visible += x->visible;
    sum->mass_sum += x->mass_sum;
    sum->mass_rows += x->mass_rows;
    if (x->mass_min < sum->mass_min) sum->mass_min = x->mass_min;
    if (x->mass_kind < sum->mass_kind) sum->mass_kind = x->mass_kind;
}

/* Threads pay where a phase takes longer than waking them, about 20 us on the machine of docs/benchmarks.md. Rough
 * costs: of the search 0.025 ns per int8 product (40 G/s) and 0.1 ns per byte (10 GB/s), 0.05 ns per operation on a
 * tile. */
enum { THREADS_FROM_NS = 40000 };

static cairn_pool *pool_for(const attn_step *step, double ns)
{
    return ns >= THREADS_FROM_NS ? step->pool : NULL;
}

static double search_ns(const attn_step *step, const attn_chunk *chunk)
{
    enum {
        TOGETHER = 64,
        BESIDE = 8
    }; /* queries that share a pass over the landmarks; bytes of one beside its int8s */
    const cairn_attention_shape *shape = step->shape;
    double dim = shape->head_dim;
    double rows = (double)chunk->rows * shape->heads;
    double passes = ceil(rows / shape->kv_heads / TOGETHER) * shape->kv_heads;
    double blocks = attn_is_local(shape, chunk->layer) ? 0 : (double)chunk->groups[chunk->n_groups - 1].block;
    return blocks * (rows * dim * 0.025 + passes * (dim + BESIDE) * 0.1) + rows * dim * shape->block_tokens * 0.1;
}

static double tiles_ns(const attn_step *step)
{
    double ns = 0;
    for (size_t u = 0; u < step->n_units; u++) ns += (double)step->units[u].n_picks;
    return ns * step->shape->block_tokens * step->shape->head_dim * 4 * 0.05;
}

/* Positions the chunk's queries can be turned to. */
static size_t positions_needed(const attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    const cairn_attention_shape *shape = step->shape;
    size_t slots = attn_slots(shape);
    uint64_t last = chunk->groups[chunk->n_groups - 1].block;
    uint64_t blocks = shape->clamp_blocks;
    if (shape->scheme == CAIRN_POSITION_DENSE) blocks = last - line->stream_base;
    if (shape->scheme == CAIRN_POSITION_STINGY) {
        uint64_t k = step->policy.top_k < line->cached ? step->policy.top_k : line->cached;
        blocks = k + 1 + (last - line->cached);
    }
    return (size_t)(blocks + 1) * slots;
}

static cairn_status prepare(attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    const cairn_attention_shape *shape = step->shape;
    step->n_units = chunk->n_groups * shape->kv_heads;
    cairn_status st = reserve_units(step, step->n_units);
    if (st != CAIRN_OK) return st;
    if ((st = attn_rope_reserve(&step->rope, positions_needed(step, chunk, line))) != CAIRN_OK) return st;
    for (size_t u = 0; u < step->n_units; u++) {
        step->units[u].group = (uint32_t)(u / shape->kv_heads);
        step->units[u].head = (uint32_t)(u % shape->kv_heads);
    }
    return reserve_workers(step, chunk);
}

static void foresee_item(void *arg, size_t item, size_t worker)
{
    run *r = arg;
    attn_unit *unit = &r->step->units[item];
    unit->status = attn_foresee_unit(r->step, r->chunk, r->line, unit, &r->step->workers[worker]);
}

cairn_status attn_step_foresee(attn_step *step, const attn_chunk *chunk, const attn_line *line, size_t *n)
{
    run r = {.step = step, .chunk = chunk, .line = line};
    void (*const watch)(void *, uint32_t, uint32_t, const float *, size_t) = step->watch;
    double *const block_mass = step->block_mass;
    *n = 0;
    assert(chunk->rows == 1 && chunk->n_groups == 1);
    cairn_status st = prepare(step, chunk, line);
    if (st != CAIRN_OK) return st;
    step->watch = NULL;
    step->block_mass = NULL;
    cairn_pool_run(pool_for(step, search_ns(step, chunk)), step->n_units, foresee_item, &r);
    for (size_t u = 0; u < step->n_units && st == CAIRN_OK; u++)
        if (step->units[u].status != CAIRN_OK) st = cairn_fail(step->units[u].status, "foreseeing a layer's blocks");
    if (st == CAIRN_OK) st = list_tiles(step, n);
    step->watch = watch;
    step->block_mass = block_mass;
    return st;
}

cairn_status attn_step_learn(attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    if (!attn_searches(step, chunk->layer)) return CAIRN_OK;
    cairn_status st = prepare(step, chunk, line);
    if (st != CAIRN_OK) return st;
    attn_lore_teach(step, chunk, line);
    return attn_lore_keep(step, chunk, line);
}

cairn_status attn_step_run(attn_step *step, const attn_chunk *chunk, const attn_line *line, const attn_source *source)
{
    const cairn_attention_shape *shape = step->shape;
    run r = {.step = step, .chunk = chunk, .line = line};
    size_t n_tiles = 0;
    uint64_t t0 = cairn_now_ns();
    cairn_status st = prepare(step, chunk, line);
    if (st != CAIRN_OK) return st;

    if (step->policy.scope != CAIRN_SCOPE_TOKEN_HEAD && !attn_is_local(shape, chunk->layer) &&
        shape->scheme != CAIRN_POSITION_DENSE && (st = attn_select_shared(step, chunk, line)) != CAIRN_OK)
        return st;
    attn_lore_teach(step, chunk, line);
    cairn_pool_run(pool_for(step, search_ns(step, chunk)), step->n_units, select_item, &r);
    for (size_t u = 0; u < step->n_units; u++) {
        if (step->units[u].status != CAIRN_OK) return cairn_fail(step->units[u].status, "%s", step->units[u].sentence);
        if (!attn_is_local(shape, chunk->layer)) add_stats(&step->stats, &step->units[u].stats);
    }
    if ((st = attn_lore_keep(step, chunk, line)) != CAIRN_OK) return st;
    attn_lore_chunk_found(step, chunk);
    if ((st = list_tiles(step, &n_tiles)) != CAIRN_OK) return st;
    step->stats.tiles += n_tiles;
    step->tiles_last = n_tiles;
    uint64_t t1 = cairn_now_ns();
    step->stats.search_ns += t1 - t0;

    cairn_pool *own_pool = pool_for(step, search_ns(step, chunk));
    cairn_pool *tile_pool = pool_for(step, tiles_ns(step));
    size_t most = n_tiles != 0 ? source->batch_max(source->arg) : 1;
    for (r.tile0 = 0; r.tile0 == 0 || r.tile0 < n_tiles; r.tile0 = r.tile1) {
        r.tile1 = n_tiles - r.tile0 < most ? n_tiles : r.tile0 + most;
        if (r.tile1 > r.tile0) {
            st = source->submit(source->arg, chunk->layer, step->requests + r.tile0, step->mass + r.tile0,
                                r.tile1 - r.tile0);
            if (st != CAIRN_OK) return st;
        }
        uint64_t t2 = cairn_now_ns();
        if (r.tile0 == 0) cairn_pool_run(own_pool, step->n_units, own_item, &r); /* while the tiles fly */
        uint64_t t3 = cairn_now_ns();
        if (r.tile1 == r.tile0) {
            step->stats.attend_ns += t3 - t2;
            break;
        }
        if ((st = source->wait(source->arg, step->tiles)) != CAIRN_OK) return st;
        uint64_t t4 = cairn_now_ns();
        cairn_pool_run(tile_pool, step->n_units, tiles_item, &r);
        uint64_t t5 = cairn_now_ns();
        step->stats.fetch_ns += (t2 - t1) + (t4 - t3);
        step->stats.attend_ns += (t3 - t2) + (t5 - t4);
        t1 = t5;
    }
    if (shape->scheme == CAIRN_POSITION_DENSE) cairn_pool_run(own_pool, step->n_units, divide_item, &r);
    return CAIRN_OK;
}
