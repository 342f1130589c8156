/* reach.c - what the rows of a group can see, at which distance, and how a landmark is scored there.
 *
 * Positions (PAPER 2.4, DESIGN 2). A past block lies `delta` blocks before the row's own block: delta = min(age, A)
 * under CLAMPED, k+1-slot (plus the row's block inside the chunk) for retrieved blocks under STINGY, the true age
 * otherwise. Its landmark, at slot offset B-1 and stored unrotated, is scored by the query turned by delta*B + j -
 * (B-1). */
#include "attention_internal.h"

#include <math.h>

static uint64_t back(uint64_t from, uint64_t by, uint64_t floor_at)
{
    return from > floor_at && from - floor_at > by ? from - by : floor_at;
}

attn_reach attn_reach_of(const attn_step *step, const attn_line *line, uint32_t layer, const attn_group *group)
{
    const cairn_attention_shape *shape = step->shape;
    const cairn_policy *policy = &step->policy;
    uint64_t base = line->stream_base;
    uint64_t own = group->block;
    bool local = attn_is_local(shape, layer);
    uint64_t candidates_end;
    uint64_t oldest = 0;
    attn_reach r = {0};

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
    /* with a mass target even a handful of candidates may be more than it takes */
    r.everything = policy->top_k == CAIRN_TOP_K_ALL || (policy->top_k >= candidates && policy->mass <= 0);
    r.k = policy->top_k < candidates ? policy->top_k : (uint32_t)candidates;
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
uint32_t attn_scoring_delta(const attn_step *step, const attn_line *line, const attn_reach *r, const attn_group *group,
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

/* The kept landmark rows are of one layer and head. */
void attn_forget_rows(attn_worker *worker)
{
    for (size_t i = 0; i < ATTN_ROWS_KEPT; i++) worker->row_block[i] = UINT64_MAX;
}

const float *attn_query(const attn_step *step, const attn_chunk *chunk, uint32_t head, uint32_t row, uint32_t g)
{
    const cairn_attention_shape *shape = step->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    return chunk->q + ((size_t)row * shape->heads + (size_t)head * per + g) * shape->head_dim;
}

/* out (D) = q scaled by 1/sqrt(D) and turned to position p. */
void attn_turned(const attn_step *step, float *out, const float *q, size_t p)
{
    attn_rotate(&step->rope, step->kernels, out, q, p);
    step->kernels->scale(out, 1.0f / sqrtf((float)step->shape->head_dim), step->shape->head_dim);
}

/* Position the query is turned to for a landmark `delta` blocks back: delta*B + j - (B-1). */
size_t attn_landmark_position(const attn_step *step, uint32_t delta, uint32_t offset)
{
    size_t slots = attn_slots(step->shape);
    return (size_t)delta * slots + offset + 1 - slots;
}

float attn_landmark_score(const attn_step *step, const attn_line *line, uint32_t layer, uint32_t head, uint64_t block,
                          uint32_t delta, uint32_t offset, const float *q, attn_worker *worker)
{
    size_t dim = step->shape->head_dim;
    float *t = worker->row;
    float *row = worker->row + (1 + block % ATTN_ROWS_KEPT) * dim; /* neighbouring rows ask for the same few blocks */
    if (worker->row_block[block % ATTN_ROWS_KEPT] != block) {
        attn_landmark_row(step, line, layer, head, block, row);
        worker->row_block[block % ATTN_ROWS_KEPT] = block;
    }
    attn_turned(step, t, q, attn_landmark_position(step, delta, offset));
    return step->kernels->dot(t, row, dim);
}

/* Better first; equal scores: the newer block first. */
static bool beats(float score_a, uint64_t block_a, float score_b, uint64_t block_b)
{
    return score_a > score_b || (score_a == score_b && block_a > block_b);
}

/* Keeps the best k of a descending list; hit ids are logical blocks here. */
uint32_t attn_keep_best(cairn_index_hit *list, uint32_t n, uint32_t k, uint32_t block, float score)
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
