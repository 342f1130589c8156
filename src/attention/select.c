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

typedef struct reach {             /* what the rows of one group can see; half-open ranges of logical blocks */
    uint64_t far_lo, far_hi;       /* one delta: searched */
    uint64_t near_lo, near_hi;     /* candidates with a delta each */
    uint64_t window_lo, window_hi; /* always visible */
    uint32_t far_delta;
    uint32_t k;      /* blocks to choose, <= candidates */
    bool everything; /* all candidates are visible: nothing to choose */
} reach;

static uint64_t back(uint64_t from, uint64_t by, uint64_t floor_at)
{
    return from > floor_at && from - floor_at > by ? from - by : floor_at;
}

static reach reach_of(const attn_step *step, const attn_line *line, uint32_t layer, const attn_group *group)
{
    const cairn_attention_shape *shape = step->shape;
    const cairn_policy *policy = &step->policy;
    uint64_t base = line->stream_base;
    uint64_t own = group->block;
    bool local = attn_is_local(shape, layer);
    uint64_t candidates_end;
    uint64_t oldest = 0;
    reach r = {0};

    if (shape->scheme == CAIRN_POSITION_DENSE) {
        r.window_lo = base;
        r.window_hi = own;
        return r;
    }
    if (local) { /* never retrieves: its own window only */
        r.window_lo = back(own, shape->local_window_blocks, base);
        r.window_hi = own;
        return r;
    }
    if (shape->scheme == CAIRN_POSITION_CLAMPED) {
        uint64_t window = policy->window_blocks < 0 ? shape->window_blocks : (uint64_t)policy->window_blocks;
        r.window_lo = back(own, window, base);
        r.window_hi = own;
        candidates_end = r.window_lo;
        if (policy->newest != 0) oldest = back(own, policy->newest, 0);
        if (oldest > candidates_end) oldest = candidates_end;
        r.near_lo = back(own, shape->clamp_blocks - 1, base);
        if (r.near_lo > candidates_end) r.near_lo = candidates_end;
        if (r.near_lo < oldest) r.near_lo = oldest;
        r.far_delta = shape->clamp_blocks;
    } else { /* STINGY: blocks completed inside the chunk are all local */
        r.window_lo = line->cached;
        r.window_hi = own;
        candidates_end = line->cached;
        if (policy->newest != 0) oldest = back(candidates_end, policy->newest, 0);
    }
    uint64_t candidates = candidates_end - oldest;
    r.everything = policy->top_k == CAIRN_TOP_K_ALL || policy->top_k >= candidates;
    r.k = r.everything ? (uint32_t)candidates : policy->top_k;
    if (shape->scheme == CAIRN_POSITION_STINGY) { /* the newest k are scored at their own slots */
        r.near_lo = candidates_end - r.k;
        r.far_delta = r.k + 1 + (uint32_t)(own - line->cached);
    }
    r.far_lo = oldest;
    r.far_hi = r.near_lo;
    r.near_hi = candidates_end;
    return r;
}

/* Position difference, in blocks, at which a candidate or window block is scored. */
static uint32_t scoring_delta(const attn_step *step, const attn_line *line, const reach *r, const attn_group *group,
                              uint64_t block)
{
    const cairn_attention_shape *shape = step->shape;
    uint64_t age = group->block - block;
    switch (shape->scheme) {
    case CAIRN_POSITION_CLAMPED:
        if (block < line->stream_base || age > shape->clamp_blocks) return shape->clamp_blocks;
        return (uint32_t)age;
    case CAIRN_POSITION_STINGY:
        if (block < r->far_hi) return r->far_delta;
        return (uint32_t)age; /* slot i+1 of k+1 slots right before the chunk: the true distance */
    default: return (uint32_t)age;
    }
}

static const attn_part *part_of(const attn_line *line, uint64_t block)
{
    size_t lo = 0;
    size_t hi = line->n_parts;
    while (hi - lo > 1) {
        size_t mid = (lo + hi) / 2;
        if (line->parts[mid].first <= block)
            lo = mid;
        else
            hi = mid;
    }
    return &line->parts[lo];
}

void attn_landmark_row(const attn_step *step, const attn_line *line, uint32_t layer, uint32_t head, uint64_t block,
                       float *out)
{
    const cairn_attention_shape *shape = step->shape;
    const attn_recent *recent = &line->recent[layer];
    if (recent->rows != NULL) {
        size_t slot = (size_t)(block % recent->capacity) * shape->kv_heads + head;
        memcpy(out, recent->rows + slot * shape->head_dim, shape->head_dim * sizeof *out);
        return;
    }
    const attn_part *part = part_of(line, block);
    cairn_index_row(part->index[(size_t)layer * shape->kv_heads + head], (uint32_t)(block - part->first) + part->row0,
                    out);
}

static const float *query_of(const attn_step *step, const attn_chunk *chunk, uint32_t head, uint32_t row, uint32_t g)
{
    const cairn_attention_shape *shape = step->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    return chunk->q + ((size_t)row * shape->heads + (size_t)head * per + g) * shape->head_dim;
}

/* out (D) = q scaled by 1/sqrt(D) and turned to position p. */
static void turned(const attn_step *step, float *out, const float *q, size_t p)
{
    attn_rotate(&step->rope, step->kernels, out, q, p);
    step->kernels->scale(out, 1.0f / sqrtf((float)step->shape->head_dim), step->shape->head_dim);
}

/* Position the query is turned to for a landmark `delta` blocks back: delta*B + j - (B-1). */
static size_t landmark_position(const attn_step *step, uint32_t delta, uint32_t offset)
{
    size_t slots = attn_slots(step->shape);
    return (size_t)delta * slots + offset + 1 - slots;
}

static float landmark_score(const attn_step *step, const attn_line *line, uint32_t layer, uint32_t head, uint64_t block,
                            uint32_t delta, uint32_t offset, const float *q, attn_worker *worker)
{
    float *t = worker->row + step->shape->head_dim;
    attn_landmark_row(step, line, layer, head, block, worker->row);
    turned(step, t, q, landmark_position(step, delta, offset));
    return step->kernels->dot(t, worker->row, step->shape->head_dim);
}

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

/* Better first; equal scores: the newer block first. */
static bool beats(float score_a, uint64_t block_a, float score_b, uint64_t block_b)
{
    return score_a > score_b || (score_a == score_b && block_a > block_b);
}

/* Keeps the best k of a descending list; hit ids are logical blocks here. */
static uint32_t keep_best(cairn_index_hit *list, uint32_t n, uint32_t k, uint32_t block, float score)
{
    if (n == k && (k == 0 || !beats(score, block, list[k - 1].score, list[k - 1].id))) return n;
    uint32_t at = n < k ? n++ : k - 1;
    while (at > 0 && beats(score, block, list[at - 1].score, list[at - 1].id)) {
        list[at] = list[at - 1];
        at--;
    }
    list[at] = (cairn_index_hit){block, score};
    return n;
}

static float log_add(float a, float b)
{
    float hi = a > b ? a : b;
    float lo = a > b ? b : a;
    return isinf(lo) && lo < 0 ? hi : hi + log1pf(expf(lo - hi));
}

/* The k best far blocks of every row and head of the unit, into worker->merged (n, k) with worker->found + n counts. */
static cairn_status search_far(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                               attn_worker *worker, const reach *r, bool want_mass)
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
        turned(step, worker->q + i * shape->head_dim,
               query_of(step, chunk, unit->head, group->row0 + row, (uint32_t)(i % per)),
               landmark_position(step, r->far_delta, group->offset0 + row));
    }
    for (size_t p = 0; p < line->n_parts; p++) {
        const attn_part *part = &line->parts[p];
        uint64_t lo = part->first > r->far_lo ? part->first : r->far_lo;
        uint64_t hi = part->first + part->count < r->far_hi ? part->first + part->count : r->far_hi;
        if (lo >= hi) continue;
        uint32_t shift = (uint32_t)part->first - part->row0; /* row + shift = logical block */
        for (size_t i = 0; i < n; i++)
            worker->queries[i] =
                (cairn_index_query){worker->q + i * shape->head_dim, (uint32_t)lo - shift, (uint32_t)hi - shift};
        cairn_status st =
            cairn_index_search(part->index[(size_t)chunk->layer * shape->kv_heads + unit->head], worker->search,
                               worker->queries, n, r->k, worker->hits, worker->found, want_mass ? worker->mass : NULL);
        if (st != CAIRN_OK) return st;
        for (size_t i = 0; i < n; i++) {
            cairn_index_hit *list = worker->merged + i * r->k;
            for (uint32_t h = 0; h < worker->found[i]; h++) {
                const cairn_index_hit *hit = &worker->hits[i * r->k + h];
                count[i] = keep_best(list, count[i], r->k, hit->id + shift, hit->score);
            }
            if (want_mass) {
                worker->lse[2 * i] = log_add(worker->lse[2 * i], worker->mass[i].lse);
                if (worker->mass[i].error > worker->lse[2 * i + 1]) worker->lse[2 * i + 1] = worker->mass[i].error;
            }
        }
    }
    return CAIRN_OK;
}

/* Every block is visible: all scores, straight into picks. */
static cairn_status pick_everything(attn_step *step, const attn_chunk *chunk, const attn_line *line, attn_unit *unit,
                                    attn_worker *worker, const reach *r, attn_pick pick, uint32_t offset,
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
        turned(step, worker->q, q, landmark_position(step, r->far_delta, offset));
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
        uint32_t delta = scoring_delta(step, line, r, &chunk->groups[unit->group], b);
        pick.block = b;
        pick.delta = (int32_t)delta;
        pick.weight = landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker);
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
                                attn_worker *worker, const reach *r, attn_pick pick, uint32_t offset, const float *q,
                                cairn_index_hit *list, uint32_t n, bool scored)
{
    const attn_group *group = &chunk->groups[unit->group];
    cairn_status st = CAIRN_OK;
    bool stingy = step->shape->scheme == CAIRN_POSITION_STINGY;
    pick.retrieved = true;
    if (stingy) qsort(list, n, sizeof *list, by_block);
    for (uint32_t i = 0; i < n && st == CAIRN_OK; i++) {
        pick.block = list[i].id;
        if (stingy) { /* old ones pack left, recent ones right (PAPER 2.4); re-scored where they come to lie */
            uint32_t slot = i + (pick.block >= r->far_hi);
            pick.delta = (int32_t)(r->k + 1 - slot + (uint32_t)(group->block - line->cached));
        } else {
            pick.delta = (int32_t)scoring_delta(step, line, r, group, pick.block);
        }
        pick.weight = scored && !stingy ? list[i].score
                                        : landmark_score(step, line, chunk->layer, unit->head, pick.block,
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

static int pick_order(const void *a, const void *b)
{
    const attn_pick *x = a;
    const attn_pick *y = b;
    if (x->block != y->block) return x->block < y->block ? -1 : 1;
    if (x->row != y->row) return x->row < y->row ? -1 : 1;
    return (x->g > y->g) - (x->g < y->g);
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
        turned(step, worker->q + i * dim, query_of(step, chunk, unit->head, group->row0 + row, (uint32_t)(i % per)),
               group->offset0 + row);
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
    reach r = reach_of(step, line, chunk->layer, group);
    bool shared = step->policy.scope != CAIRN_SCOPE_TOKEN_HEAD && !r.everything;
    bool searching = r.k != 0 && !r.everything && !shared;
    bool want_mass = searching && (step->policy.measure_mass || step->policy.mass > 0 || chunk->rows <= 2);
    unit->n_picks = 0;
    unit->stats = (cairn_step_stats){.mass_min = 1, .mass_kind = CAIRN_MASS_EXACT};

    cairn_status st = CAIRN_OK;
    if ((st = own_scores(step, chunk, unit, worker)) != CAIRN_OK) return st;
    if (searching && (st = search_far(step, chunk, line, unit, worker, &r, want_mass)) != CAIRN_OK) return st;

    for (size_t i = 0; i < n; i++) {
        uint32_t row = (uint32_t)(i / per);
        uint32_t g = (uint32_t)(i % per);
        uint32_t offset = group->offset0 + row;
        const float *q = query_of(step, chunk, unit->head, group->row0 + row, g);
        float *own = unit->own + i * shape->block_tokens;
        uint32_t n_own = attn_own_tokens(shape, group, offset);
        size_t query_head = (size_t)unit->head * per + g;
        float bias = shape->landmark_bias != NULL
                         ? shape->landmark_bias[(size_t)chunk->layer * shape->heads + query_head]
                         : 0.0f;
        attn_pick pick = {.row = group->row0 + row, .g = (uint16_t)g};
        size_t first = unit->n_picks;

        for (uint64_t b = r.window_lo; b < r.window_hi; b++) {
            uint32_t delta = scoring_delta(step, line, &r, group, b);
            pick.block = b;
            pick.delta = (int32_t)delta;
            pick.weight =
                dense ? 0.0f : landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker) + bias;
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
                uint32_t delta = scoring_delta(step, line, &r, group, b);
                float score = landmark_score(step, line, chunk->layer, unit->head, b, delta, offset, q, worker);
                *count = keep_best(list, *count, r.k, (uint32_t)b, score);
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
        if (r.everything) { /* nothing was left out */
            unit->stats.mass_sum += 1;
            unit->stats.mass_rows++;
        }
        normalise(step, unit, first, own, n_own);
    }
    if (unit->n_picks > 1) qsort(unit->picks, unit->n_picks, sizeof *unit->picks, pick_order);
    return CAIRN_OK;
}

/* ---- scopes that share a choice: softmax over all candidates, then a maximum (PAPER 2.3) ---- */

typedef struct shared_job {
    attn_step *step;
    const attn_chunk *chunk;
    const attn_line *line;
    uint64_t most; /* candidates */
    cairn_status *status;
} shared_job;

/* p (candidates) = softmax of one row's landmark scores for one query head. */
static void probabilities(const shared_job *job, const attn_group *group, const reach *r, uint32_t row,
                          uint32_t query_head, attn_worker *worker, float *p)
{
    attn_step *step = job->step;
    const cairn_attention_shape *shape = step->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    uint32_t head = query_head / per;
    const float *q = query_of(step, job->chunk, head, group->row0 + row, query_head % per);
    uint32_t offset = group->offset0 + row;
    size_t n = (size_t)(r->near_hi - r->far_lo);
    turned(step, worker->q, q, landmark_position(step, r->far_delta, offset));
    for (size_t i = 0; i < job->line->n_parts; i++) {
        const attn_part *part = &job->line->parts[i];
        uint64_t lo = part->first > r->far_lo ? part->first : r->far_lo;
        uint64_t hi = part->first + part->count < r->far_hi ? part->first + part->count : r->far_hi;
        if (lo >= hi) continue;
        uint32_t shift = (uint32_t)part->first - part->row0;
        cairn_index_scores(part->index[(size_t)job->chunk->layer * shape->kv_heads + head], worker->q,
                           (uint32_t)lo - shift, (uint32_t)hi - shift, p + (lo - r->far_lo));
    }
    for (uint64_t b = r->near_lo; b < r->near_hi; b++)
        p[b - r->far_lo] = landmark_score(step, job->line, job->chunk->layer, head, b,
                                          scoring_delta(step, job->line, r, group, b), offset, q, worker);
    float m = step->kernels->max(p, n);
    float z = step->kernels->exp_shift(p, m, n);
    step->kernels->scale(p, 1.0f / z, n);
}

static void best_of(const float *p, size_t n, uint64_t first, uint32_t k, cairn_index_hit *list, int64_t *out)
{
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) found = keep_best(list, found, k, (uint32_t)(first + i), p[i]);
    for (uint32_t i = 0; i < found; i++) out[i] = (int64_t)list[i].id;
    for (uint32_t i = found; i < k; i++) out[i] = -1;
}

/* item = query head (HEAD) or chunk row (TOKEN) */
static void shared_item(void *arg, size_t item, size_t number)
{
    shared_job *job = arg;
    attn_step *step = job->step;
    const attn_chunk *chunk = job->chunk;
    attn_worker *worker = &step->workers[number];
    uint32_t k = step->policy.top_k;
    cairn_status st = CAIRN_OK;
    if (job->most > worker->cap_scores) {
        cairn_free(worker->scores);
        worker->cap_scores = 0;
        worker->scores = cairn_alloc_array((size_t)job->most, 2 * sizeof *worker->scores);
        if (worker->scores != NULL)
            worker->cap_scores = (size_t)job->most;
        else
            st = CAIRN_NO_MEMORY;
    }
    job->status[item] = st;
    if (st != CAIRN_OK) return;
    float *p = worker->scores;
    float *best = worker->scores + worker->cap_scores;
    bool stingy = step->shape->scheme == CAIRN_POSITION_STINGY;

    if (step->policy.scope == CAIRN_SCOPE_TOKEN) {
        size_t gi = 0;
        while (item >= chunk->groups[gi].row0 + chunk->groups[gi].rows) gi++;
        const attn_group *group = &chunk->groups[gi];
        reach r = reach_of(step, job->line, chunk->layer, group);
        size_t n = (size_t)(r.near_hi - r.far_lo);
        if (r.everything) return;
        for (uint32_t h = 0; h < step->shape->heads; h++) {
            probabilities(job, group, &r, (uint32_t)item - group->row0, h, worker, h == 0 ? best : p);
            for (size_t i = 0; h != 0 && i < n; i++)
                if (p[i] > best[i]) best[i] = p[i];
        }
        best_of(best, n, r.far_lo, k, worker->hits, step->shared + item * k);
        return;
    }
    bool begun = false;
    for (size_t gi = 0; gi < chunk->n_groups; gi++) {
        const attn_group *group = &chunk->groups[gi];
        reach r = reach_of(step, job->line, chunk->layer, group);
        size_t n = (size_t)(r.near_hi - r.far_lo);
        if (r.everything) continue;
        for (uint32_t row = 0; row < group->rows; row++) {
            probabilities(job, group, &r, row, (uint32_t)item, worker, begun ? p : best);
            for (size_t i = 0; begun && i < n; i++)
                if (p[i] > best[i]) best[i] = p[i];
            begun = true;
        }
        if (!stingy || gi + 1 == chunk->n_groups) {
            int64_t *out = step->shared + (gi * step->shape->heads + item) * k;
            best_of(best, n, r.far_lo, k, worker->hits, out);
            begun = false;
            for (size_t other = 0; stingy && other < gi; other++) /* the whole chunk shares the choice */
                memcpy(step->shared + (other * step->shape->heads + item) * k, out, k * sizeof *out);
        }
    }
}

cairn_status attn_select_shared(attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    const cairn_attention_shape *shape = step->shape;
    bool token = step->policy.scope == CAIRN_SCOPE_TOKEN;
    size_t items = token ? chunk->rows : shape->heads;
    size_t lists = token ? chunk->rows : chunk->n_groups * shape->heads;
    size_t need;
    shared_job job = {.step = step, .chunk = chunk, .line = line};
    for (size_t g = 0; g < chunk->n_groups; g++) {
        reach r = reach_of(step, line, chunk->layer, &chunk->groups[g]);
        if (!r.everything && r.near_hi - r.far_lo > job.most) job.most = r.near_hi - r.far_lo;
    }
    if (!cairn_mul_size(lists, step->policy.top_k != CAIRN_TOP_K_ALL ? step->policy.top_k : 0, &need))
        return cairn_fail(CAIRN_INVALID, "top_k %u is too large for a shared choice", (unsigned)step->policy.top_k);
    if (need > step->cap_shared) {
        cairn_free(step->shared);
        step->cap_shared = 0;
        if ((step->shared = cairn_alloc_array(need, sizeof *step->shared)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "shared choice of %zu blocks", need);
        step->cap_shared = need;
    }
    if (job.most == 0 || need == 0) return CAIRN_OK;
    job.status = cairn_calloc(items, sizeof *job.status);
    if (job.status == NULL) return cairn_fail(CAIRN_NO_MEMORY, "shared choice of %zu rows", items);
    cairn_pool_run(step->pool, items, shared_item, &job);
    cairn_status st = CAIRN_OK;
    for (size_t i = 0; i < items && st == CAIRN_OK; i++) st = job.status[i];
    cairn_free(job.status);
    return st == CAIRN_OK ? st : cairn_fail(st, "scores of %llu blocks", (unsigned long long)job.most);
}
