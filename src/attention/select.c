/* select.c - which past blocks a row sees, and with which gate.
 *
 * Positions (PAPER 2.4, DESIGN 2). A past block lies `delta` blocks before the row's own block: delta = min(age, A)
 * under CLAMPED, k+1-slot (plus the row's block inside the chunk) for retrieved blocks under STINGY, the true age
 * otherwise. Its landmark, at slot offset B-1 and stored unrotated, is scored by the query turned by delta*B + j -
 * (B-1).
 *
 * All far blocks of a row share one delta, so they are one search in the index; the few nearer ones are scored one by
 * one. The gate of block b is exp(score + bias) over the sum of the own tokens and of what is visible (eq. 1-4 in the
 * virtual-key form, PAPER 1.2), so it is known before any tile is fetched. */
#include "attention_internal.h"

#include <math.h>
#include <stdlib.h>

cairn_status attn_pick_push(attn_unit *unit, const attn_pick *pick)
{
    if (unit->n_picks == unit->cap_picks) {
        size_t cap = unit->cap_picks != 0 ? 2 * unit->cap_picks : 256;
        attn_pick *bigger = cairn_grow(unit->picks, unit->n_picks * sizeof *bigger, cap, sizeof *bigger);
        if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu visible blocks of a step", cap);
        unit->picks = bigger;
        unit->cap_picks = cap;
    }
    unit->picks[unit->n_picks++] = *pick;
    return CAIRN_OK;
}

cairn_status attn_worker_reserve(const attn_step *step, attn_worker *worker, size_t rows, uint32_t k)
{
    if (k == 0) k = 1;
    if (rows <= worker->cap_rows && k <= worker->cap_k) return CAIRN_OK;
    if (rows < worker->cap_rows) rows = worker->cap_rows;
    if (k < worker->cap_k) k = worker->cap_k;
    size_t dim = step->shape->head_dim;
    size_t wide;
    cairn_free(worker->q);
    cairn_free(worker->queries);
    cairn_free(worker->hits);
    cairn_free(worker->merged);
    cairn_free(worker->found);
    cairn_free(worker->mass);
    cairn_free(worker->lse);
    cairn_free(worker->in);
    cairn_free(worker->to);
    cairn_free(worker->weight);
    cairn_free(worker->partial);
    worker->cap_rows = 0;
    worker->q = cairn_alloc_array(rows, dim * sizeof *worker->q);
    worker->queries = cairn_alloc_array(rows, sizeof *worker->queries);
    bool fits = cairn_mul_size(rows, k, &wide);
    worker->hits = fits ? cairn_alloc_array(wide, sizeof *worker->hits) : NULL;
    worker->merged = fits ? cairn_alloc_array(wide, sizeof *worker->merged) : NULL;
    worker->found = cairn_alloc_array(rows, 2 * sizeof *worker->found);
    worker->mass = cairn_alloc_array(rows, sizeof *worker->mass);
    worker->lse = cairn_alloc_array(rows, 2 * sizeof *worker->lse);
    worker->in = cairn_alloc_array(rows, sizeof *worker->in);
    worker->to = cairn_alloc_array(rows, sizeof *worker->to);
    worker->weight = cairn_alloc_array(rows, sizeof *worker->weight);
    worker->partial = cairn_alloc_array(rows, dim * sizeof *worker->partial);
    if (worker->in == NULL || worker->to == NULL || worker->weight == NULL || worker->partial == NULL ||
        worker->q == NULL || worker->queries == NULL || worker->hits == NULL || worker->merged == NULL ||
        worker->found == NULL || worker->mass == NULL || worker->lse == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "search of %zu rows, k = %u", rows, (unsigned)k);
    worker->cap_rows = rows;
    worker->cap_k = k;
    return CAIRN_OK;
}

static float log_add(float a, float b)
{
    float hi = a > b ? a : b;
    float lo = a > b ? b : a;
    return isinf(lo) && lo < 0 ? hi : hi + log1pf(expf(lo - hi));
}

/* The k best far blocks of every row and head of the unit, into worker->merged (n, k) with worker->found + n counts. */
static cairn_status search_far(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                               attn_worker *worker, const attn_reach *r, bool want_mass)
{
    const cairn_attention_shape *shape = step->shape;
    const attn_group *group = &chunk->groups[unit->group];
    uint32_t per = shape->heads / shape->kv_heads;
    size_t n = (size_t)group->rows * per;
    uint32_t *count = worker->found + worker->cap_rows;
    for (size_t i = 0; i < n; i++) {
        count[i] = 0;
        worker->lse[2 * i] = -INFINITY;
        worker->lse[2 * i + 1] = 0;
    }
    if (r->far_hi <= r->far_lo || r->k == 0) return CAIRN_OK;
    for (size_t i = 0; i < n; i++) {
        uint32_t row = (uint32_t)(i / per);
        attn_turned(step, worker->q + i * shape->head_dim,
                    attn_query(step, chunk, unit->head, group->row0 + row, (uint32_t)(i % per)),
                    attn_landmark_position(step, r->far_delta, group->offset0 + row));
    }
    attn_lore *lore = want_mass ? NULL : attn_lore_of(step, chunk->layer, unit->head);
    if (step->watch != NULL) step->watch(step->watch_arg, chunk->layer, unit->head, worker->q, n);
    for (size_t p = 0; p < line->n_parts; p++) {
        const attn_part *part = &line->parts[p];
        uint64_t lo = part->first > r->far_lo ? part->first : r->far_lo;
        uint64_t hi = part->first + part->count < r->far_hi ? part->first + part->count : r->far_hi;
        if (lo >= hi) continue;
        uint32_t shift = (uint32_t)part->first - part->row0; /* row + shift = logical block */
        for (size_t i = 0; i < n; i++)
            worker->queries[i] =
                (cairn_index_query){worker->q + i * shape->head_dim, (uint32_t)lo - shift, (uint32_t)hi - shift};
        if (lore != NULL) attn_lore_hint(lore, part, worker->search);
        cairn_status st =
            cairn_index_search(part->index[(size_t)chunk->layer * shape->kv_heads + unit->head], worker->search,
                               worker->queries, n, r->k, worker->hits, worker->found, want_mass ? worker->mass : NULL);
        if (st != CAIRN_OK) return st;
        for (size_t i = 0; i < n; i++) {
            cairn_index_hit *list = worker->merged + i * r->k;
            for (uint32_t h = 0; h < worker->found[i]; h++) {
                const cairn_index_hit *hit = &worker->hits[i * r->k + h];
                count[i] = attn_keep_best(list, count[i], r->k, hit->id + shift, hit->score);
            }
            if (want_mass) {
                worker->lse[2 * i] = log_add(worker->lse[2 * i], worker->mass[i].lse);
                if (worker->mass[i].error > worker->lse[2 * i + 1]) worker->lse[2 * i + 1] = worker->mass[i].error;
            }
        }
    }
    if (lore != NULL && chunk->n_groups == 1) /* else others read it now: attn_lore_chunk_found */
        for (size_t i = 0; i < n; i++) attn_lore_found(lore, worker->merged + i * r->k, count[i]);
    return CAIRN_OK;
}

/* Picks by block, rows and heads within a block in their order: a stable radix sort, a byte a pass, so two passes up to
 * 65,536 blocks (4M tokens). 384 picks: 4 us against 30 us by comparison sort. */
static cairn_status sort_picks(attn_unit *unit)
{
    size_t n = unit->n_picks;
    uint64_t lo = UINT64_MAX;
    uint64_t hi = 0;
    for (size_t i = 0; i < n; i++) {
        if (unit->picks[i].block < lo) lo = unit->picks[i].block;
        if (unit->picks[i].block > hi) hi = unit->picks[i].block;
    }
    if (n < 2 || lo == hi) return CAIRN_OK;
    if (unit->cap_sorted < unit->cap_picks) {
        cairn_free(unit->sorted);
        unit->cap_sorted = 0;
        if ((unit->sorted = cairn_alloc_array(unit->cap_picks, sizeof *unit->sorted)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "%zu visible blocks of a step", unit->cap_picks);
        unit->cap_sorted = unit->cap_picks;
    }
    for (unsigned shift = 0; shift < 64 && (hi - lo) >> shift != 0; shift += 8) {
        size_t at[257] = {0};
        for (size_t i = 0; i < n; i++) at[((unit->picks[i].block - lo) >> shift & 255) + 1]++;
        for (size_t d = 0; d < 256; d++) at[d + 1] += at[d];
        for (size_t i = 0; i < n; i++) unit->sorted[at[(unit->picks[i].block - lo) >> shift & 255]++] = unit->picks[i];
        attn_pick *swap = unit->picks;
        size_t cap = unit->cap_picks;
        unit->picks = unit->sorted;
        unit->cap_picks = unit->cap_sorted;
        unit->sorted = swap;
        unit->cap_sorted = cap;
    }
    return CAIRN_OK;
}

cairn_status attn_foresee_unit(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                               attn_worker *worker)
{
    const attn_reach r = attn_reach_of(step, line, chunk->layer, &chunk->groups[unit->group]);
    const uint32_t per = step->shape->heads / step->shape->kv_heads;
    unit->n_picks = 0;
    if (r.everything || r.k == 0) return CAIRN_OK;
    cairn_status st = search_far(step, chunk, line, unit, worker, &r, false);
    for (size_t i = 0; i < per && st == CAIRN_OK; i++)
        for (uint32_t h = 0; h < worker->found[worker->cap_rows + i] && st == CAIRN_OK; h++)
            st = attn_pick_push(unit, &(attn_pick){.block = worker->merged[i * r.k + h].id});
    return st == CAIRN_OK ? sort_picks(unit) : st;
}

/* Every block is visible: all scores, straight into picks. */
static cairn_status pick_everything(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                                    attn_worker *worker, const attn_reach *r, attn_pick pick, uint32_t offset,
                                    const float *q)
{
    const cairn_attention_shape *shape = step->shape;
    cairn_status st = CAIRN_OK;
    pick.retrieved = true;
    if (r->far_hi > r->far_lo && shape->scheme == CAIRN_POSITION_CLAMPED) {
        size_t n = (size_t)(r->far_hi - r->far_lo);
        if (n > worker->cap_scores) {
            cairn_free(worker->scores);
            worker->cap_scores = 0;
            if ((worker->scores = cairn_alloc_array(n, 2 * sizeof *worker->scores)) == NULL)
                return cairn_fail(CAIRN_NO_MEMORY, "scores of %zu blocks", n);
            worker->cap_scores = n;
        }
        attn_turned(step, worker->q, q, attn_landmark_position(step, r->far_delta, offset));
        for (size_t p = 0; p < line->n_parts; p++) {
            const attn_part *part = &line->parts[p];
            uint64_t lo = part->first > r->far_lo ? part->first : r->far_lo;
            uint64_t hi = part->first + part->count < r->far_hi ? part->first + part->count : r->far_hi;
            if (lo >= hi) continue;
            uint32_t shift = (uint32_t)part->first - part->row0;
            cairn_index_scores(part->index[(size_t)chunk->layer * shape->kv_heads + unit->head], worker->q,
                               (uint32_t)lo - shift, (uint32_t)hi - shift, worker->scores);
            for (uint64_t b = lo; b < hi && st == CAIRN_OK; b++) {
                pick.block = b;
                pick.delta = (int32_t)r->far_delta;
                pick.weight = worker->scores[b - lo];
                st = attn_pick_push(unit, &pick);
            }
        }
    }
    /* STINGY with k = n: slots 1..n, the true distances, and far is empty. */
    for (uint64_t b = r->near_lo; b < r->near_hi && st == CAIRN_OK; b++) {
        uint32_t delta = attn_scoring_delta(step, line, r, &chunk->groups[unit->group], b);
        pick.block = b;
        pick.delta = (int32_t)delta;
        pick.weight = attn_landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker);
        st = attn_pick_push(unit, &pick);
    }
    return st;
}

static int by_block(const void *a, const void *b)
{
    const cairn_index_hit *x = a;
    const cairn_index_hit *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

/* Chosen blocks of one row and head (descending list of n) to picks. */
static cairn_status pick_chosen(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                                attn_worker *worker, const attn_reach *r, attn_pick pick, uint32_t offset,
                                const float *q, cairn_index_hit *list, uint32_t n, bool scored)
{
    const attn_group *group = &chunk->groups[unit->group];
    cairn_status st = CAIRN_OK;
    bool stingy = step->shape->scheme == CAIRN_POSITION_STINGY;
    pick.retrieved = true;
    if (stingy) qsort(list, n, sizeof *list, by_block);
    for (uint32_t i = 0; i < n && st == CAIRN_OK; i++) {
        pick.block = list[i].id;
        if (stingy) { /* old ones pack left, recent ones right (PAPER 2.4); re-scored where they come to lie */
            uint32_t slot = i + (pick.block >= r->near_hi - n); /* n < k where a mass target needed no more */
            pick.delta = (int32_t)(n + 1 - slot + (uint32_t)(group->block - line->cached));
        } else {
            pick.delta = (int32_t)attn_scoring_delta(step, line, r, group, pick.block);
        }
        pick.weight = scored && !stingy ? list[i].score
                                        : attn_landmark_score(step, line, chunk->layer, unit->head, pick.block,
                                                              (uint32_t)pick.delta, offset, q, worker);
        st = attn_pick_push(unit, &pick);
    }
    return st;
}

/* How many of the best blocks reach the mass target; base = log mass of own tokens and window, all = of everything. */
static uint32_t enough(const cairn_index_hit *list, uint32_t n, float bias, float base, float all, float target)
{
    float have = base;
    uint32_t used = 0;
    while (used < n && have - all < logf(target)) have = log_add(have, list[used++].score + bias);
    return used;
}

/* Turns the logits of one row and head (own scores and picks [first, n_picks)) into gates. */
static void normalise(const attn_step *step, attn_unit *unit, size_t first, float *own, uint32_t n_own)
{
    const cairn_kernels *kernels = step->kernels;
    float m = kernels->max(own, n_own);
    for (size_t i = first; i < unit->n_picks; i++)
        if (unit->picks[i].weight > m) m = unit->picks[i].weight;
    float z = kernels->exp_shift(own, m, n_own);
    for (size_t i = first; i < unit->n_picks; i++) {
        unit->picks[i].weight = expf(unit->picks[i].weight - m);
        z += unit->picks[i].weight;
    }
    float scale = z > 0 ? 1.0f / z : 0.0f;
    kernels->scale(own, scale, n_own);
    for (size_t i = first; i < unit->n_picks; i++) unit->picks[i].weight *= scale;
}

static cairn_status own_scores(attn_step *step, const attn_chunk *chunk, attn_unit *unit, attn_worker *worker)
{
    const cairn_attention_shape *shape = step->shape;
    const attn_group *group = &chunk->groups[unit->group];
    size_t dim = shape->head_dim;
    size_t c = shape->block_tokens;
    uint32_t per = shape->heads / shape->kv_heads;
    size_t n = (size_t)group->rows * per;
    if (n * c > unit->own_cap) {
        cairn_free(unit->own);
        cairn_free(unit->acc);
        unit->own_cap = 0;
        unit->own = cairn_alloc_array(n * c, sizeof *unit->own);
        unit->acc = cairn_alloc_array(n, 2 * sizeof *unit->acc);
        if (unit->own == NULL || unit->acc == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "scores of %zu rows over their own block", n);
        unit->own_cap = n * c;
    }
    size_t at = ((size_t)unit->group * shape->kv_heads + unit->head) * c * dim;
    cairn_tile own = {.dtype = CAIRN_F32,
                      .tokens = group->fill,
                      .head_dim = shape->head_dim,
                      .keys = chunk->own_k + at,
                      .values = chunk->own_v + at};
    for (size_t i = 0; i < n; i++) {
        uint32_t row = (uint32_t)(i / per);
        attn_turned(step, worker->q + i * dim,
                    attn_query(step, chunk, unit->head, group->row0 + row, (uint32_t)(i % per)), group->offset0 + row);
        worker->in[i] = worker->q + i * dim;
    }
    step->kernels->tile_scores(&own, n, worker->in, unit->own, c, worker->tile_scratch);
    for (size_t i = 0; i < n; i++) { /* causal: later tokens of the own block are not there */
        uint32_t seen = attn_own_tokens(shape, group, group->offset0 + (uint32_t)(i / per));
        memset(unit->own + i * c + seen, 0, (c - seen) * sizeof *unit->own);
    }
    return CAIRN_OK;
}

static void count_mass(attn_unit *unit, float base, float visible, float all, float error)
{
    cairn_mass_kind kind = isinf(error) ? CAIRN_MASS_UNKNOWN : error > 0 ? CAIRN_MASS_BOUND : CAIRN_MASS_EXACT;
    if (kind < unit->stats.mass_kind) unit->stats.mass_kind = kind;
    if (kind == CAIRN_MASS_UNKNOWN) return;
    float kept = expf((visible > base ? visible : base) - all);
    if (kept > 1) kept = 1;
    unit->stats.mass_sum += (double)kept;
    unit->stats.mass_rows++;
    if (kept < unit->stats.mass_min) unit->stats.mass_min = kept;
}

cairn_status attn_select(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                         attn_worker *worker)
{
    const cairn_attention_shape *shape = step->shape;
    const cairn_kernels *kernels = step->kernels;
    const attn_group *group = &chunk->groups[unit->group];
    uint32_t per = shape->heads / shape->kv_heads;
    size_t n = (size_t)group->rows * per;
    bool dense = shape->scheme == CAIRN_POSITION_DENSE;
    bool stingy = shape->scheme == CAIRN_POSITION_STINGY;
    attn_reach r = attn_reach_of(step, line, chunk->layer, group);
    bool shared = step->policy.scope != CAIRN_SCOPE_TOKEN_HEAD && !r.everything;
    bool searching = r.k != 0 && !r.everything && !shared;
    bool want_mass = searching && (step->policy.measure_mass || step->policy.mass > 0);
    unit->n_picks = 0;
    attn_forget_rows(worker);
    unit->stats = (cairn_step_stats){.mass_min = 1, .mass_kind = CAIRN_MASS_EXACT};

    cairn_status st = CAIRN_OK;
    if ((st = own_scores(step, chunk, unit, worker)) != CAIRN_OK) return st;
    if (searching && (st = search_far(step, chunk, line, unit, worker, &r, want_mass)) != CAIRN_OK) return st;

    for (size_t i = 0; i < n; i++) {
        uint32_t row = (uint32_t)(i / per);
        uint32_t g = (uint32_t)(i % per);
        uint32_t offset = group->offset0 + row;
        const float *q = attn_query(step, chunk, unit->head, group->row0 + row, g);
        float *own = unit->own + i * shape->block_tokens;
        uint32_t n_own = attn_own_tokens(shape, group, offset);
        size_t query_head = (size_t)unit->head * per + g;
        float bias = shape->landmark_bias != NULL
                         ? shape->landmark_bias[(size_t)chunk->layer * shape->heads + query_head]
                         : 0.0f;
        attn_pick pick = {.row = group->row0 + row, .g = (uint16_t)g};
        size_t first = unit->n_picks;

        for (uint64_t b = r.window_lo; b < r.window_hi; b++) {
            uint32_t delta = attn_scoring_delta(step, line, &r, group, b);
            pick.block = b;
            pick.delta = (int32_t)delta;
            pick.weight =
                dense ? 0.0f
                      : attn_landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker) + bias;
            if ((st = attn_pick_push(unit, &pick)) != CAIRN_OK) return st;
        }
        if (dense) { /* a past block's logit is the log-sum-exp of its scores, known when its tile is read */
            float m = kernels->max(own, n_own);
            unit->acc[2 * i] = m;
            unit->acc[2 * i + 1] = kernels->exp_shift(own, m, n_own);
            continue;
        }

        size_t first_retrieved = unit->n_picks;
        float base = 0;
        float all = 0;
        if (r.everything) {
            st = pick_everything(step, chunk, line, unit, worker, &r, pick, offset, q);
        } else if (shared) {
            const int64_t *chosen =
                step->policy.scope == CAIRN_SCOPE_TOKEN
                    ? step->shared + (size_t)(group->row0 + row) * step->policy.top_k
                    : step->shared + ((size_t)unit->group * shape->heads + query_head) * step->policy.top_k;
            cairn_index_hit *list = worker->hits;
            uint32_t found = 0;
            while (found < r.k && chosen[found] >= 0) {
                list[found] = (cairn_index_hit){(uint32_t)chosen[found], 0};
                found++;
            }
            st = pick_chosen(step, chunk, line, unit, worker, &r, pick, offset, q, list, found, false);
        } else if (searching) {
            cairn_index_hit *list = worker->merged + i * r.k;
            uint32_t *count = worker->found + worker->cap_rows + i;
            float lse = worker->lse[2 * i];
            float error = worker->lse[2 * i + 1];
            for (uint64_t b = r.near_lo; b < r.near_hi; b++) {
                uint32_t delta = attn_scoring_delta(step, line, &r, group, b);
                float score = attn_landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker);
                *count = attn_keep_best(list, *count, r.k, (uint32_t)b, score);
                if (want_mass) lse = log_add(lse, score);
            }
            uint32_t use = *count;
            if (want_mass) {
                float m = kernels->max(own, n_own);
                base = m + logf(kernels->exp_sum(own, m, n_own));
                for (size_t w = first; w < first_retrieved; w++) base = log_add(base, unit->picks[w].weight);
                all = log_add(base, lse + bias + (isinf(error) ? 0 : error));
                if (step->policy.mass > 0 && !isinf(error)) use = enough(list, use, bias, base, all, step->policy.mass);
                float visible = base;
                for (uint32_t h = 0; h < use; h++) visible = log_add(visible, list[h].score + bias);
                count_mass(unit, base, visible, all, error);
            }
            st = pick_chosen(step, chunk, line, unit, worker, &r, pick, offset, q, list, use, !stingy);
        }
        if (st != CAIRN_OK) return st;
        for (size_t w = first_retrieved; w < unit->n_picks; w++) unit->picks[w].weight += bias;
        unit->stats.rows++;
        unit->stats.candidates += r.near_hi > r.far_lo ? r.near_hi - r.far_lo : 0;
        unit->stats.chosen += unit->n_picks - first_retrieved;
        unit->stats.visible += unit->n_picks - first;
        if (!want_mass && !r.everything && r.near_hi > r.far_lo) count_mass(unit, 0, 0, 0, INFINITY); /* not measured */
        if (r.everything) { /* nothing was left out */
            unit->stats.mass_sum += 1;
            unit->stats.mass_rows++;
        }
        normalise(step, unit, first, own, n_own);
    }
    return sort_picks(unit);
}
