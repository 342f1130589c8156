/* scope.c - choices that rows or heads share: softmax over all candidates, then a maximum (PAPER 2.3).
 *
 * Exact scores of every candidate are needed, so the index serves as plain rows here. */
#include "attention_internal.h"

typedef struct shared_job {
    attn_step *step;
    const attn_chunk *chunk;
    const attn_line *line;
    uint64_t most; /* candidates */
    cairn_status *status;
} shared_job;

/* p (candidates) = softmax of one row's landmark scores for one query head. */
static void probabilities(const shared_job *job, const attn_group *group, const attn_reach *r, uint32_t row,
                          uint32_t query_head, attn_worker *worker, float *p)
{
    attn_step *step = job->step;
    const cairn_attention_shape *shape = step->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    uint32_t head = query_head / per;
    const float *q = attn_query(step, job->chunk, head, group->row0 + row, query_head % per);
    uint32_t offset = group->offset0 + row;
    size_t n = (size_t)(r->near_hi - r->far_lo);
    attn_forget_rows(worker);
    attn_turned(step, worker->q, q, attn_landmark_position(step, r->far_delta, offset));
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
        p[b - r->far_lo] = attn_landmark_score(step, job->line, job->chunk->layer, head, b,
                                               attn_scoring_delta(step, job->line, r, group, b), offset, q, worker);
    float m = step->kernels->max(p, n);
    float z = step->kernels->exp_shift(p, m, n);
    step->kernels->scale(p, 1.0f / z, n);
}

static void best_of(const float *p, size_t n, uint64_t first, uint32_t k, cairn_index_hit *list, int64_t *out)
{
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) found = attn_keep_best(list, found, k, (uint32_t)(first + i), p[i]);
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
        attn_reach r = attn_reach_of(step, job->line, chunk->layer, group);
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
        attn_reach r = attn_reach_of(step, job->line, chunk->layer, group);
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
        attn_reach r = attn_reach_of(step, line, chunk->layer, &chunk->groups[g]);
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
