/* lore.c - what the last tokens asked for and found, so that the next searches are faster.
 *
 * An index learns from queries which dims of its rows tell them apart (cairn_index_learn), and what it learns must be
 * true until it has twice the rows. So a few of every chunk are kept, from all over it: a query turns with its offset
 * in its block, and one offset's queries are not like another's. They are shown to an index before a later chunk's
 * search: never in the chunk that made them, so a first token does not wait for it. And the blocks the last tokens
 * chose are likely good for the next one: they give its search a bar to begin with. No choice depends on either. */
#include "attention_internal.h"

/* Learning costs what it saves in some 120 tokens read one by one, or 1,000 in chunks, whose searches share passes
 * (docs/benchmarks.md): who asks for a short answer should not pay for it. */
enum { TEACH_FROM = 1000, ALONE = 8, FEW = 8 };
enum { KEPT_EACH = 16 }; /* queries of a chunk */

bool attn_searches(const attn_step *step, uint32_t layer)
{
    const cairn_attention_shape *shape = step->shape;
    return shape->scheme != CAIRN_POSITION_DENSE && !attn_is_local(shape, layer) &&
           step->policy.scope == CAIRN_SCOPE_TOKEN_HEAD && step->policy.top_k != 0 &&
           step->policy.top_k != CAIRN_TOP_K_ALL;
}

/* Where the mass is wanted every row is weighed, and nothing is learnt. */
static bool learns(const attn_step *step, uint32_t layer)
{
    return attn_searches(step, layer) && !(step->policy.measure_mass || step->policy.mass > 0);
}

attn_lore *attn_lore_of(const attn_step *step, uint32_t layer, uint32_t head)
{
    return step->lore != NULL ? &step->lore[(size_t)layer * step->shape->kv_heads + head] : NULL;
}

void attn_lore_wipe(attn_step *step)
{
    size_t n = step->lore != NULL ? (size_t)step->shape->layers * step->shape->kv_heads : 0;
    for (size_t i = 0; i < n; i++) cairn_free(step->lore[i].queries);
    cairn_free(step->lore);
    step->lore = NULL;
    step->lore_bytes = 0;
}

/* All heads of a layer have as many rows. */
static bool may_learn(const attn_step *step, const attn_line *line, uint32_t layer, size_t part)
{
    return cairn_index_may_learn(line->parts[part].index[(size_t)layer * step->shape->kv_heads]);
}

/* Row of the chunk for the i-th of `take` queries, the `number`-th kept: anywhere in its share of the rows (Fibonacci
 * hashing: Knuth, TAOCP vol. 3, 6.4), as rows so many blocks apart would all have one offset. */
static uint32_t row_to_keep(uint32_t rows, uint32_t take, uint32_t i, uint64_t number)
{
    const uint64_t begin = (uint64_t)i * rows / take, share = (uint64_t)(i + 1) * rows / take - begin;
    return (uint32_t)(begin + ((uint32_t)(number * 2654435769U) * share >> 32));
}

/* Whether an index of the layer may learn soon. */
static bool wanted(const attn_step *step, const attn_line *line, uint32_t layer)
{
    bool any = false;
    if (!learns(step, layer)) return false;
    for (size_t p = 0; p < line->n_parts; p++)
        any = any || cairn_index_will_learn(line->parts[p].index[(size_t)layer * step->shape->kv_heads]);
    return any;
}

cairn_status attn_lore_keep(attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    const cairn_attention_shape *shape = step->shape;
    const size_t dim = shape->head_dim;
    const uint32_t per = shape->heads / shape->kv_heads;
    if (!wanted(step, line, chunk->layer)) return CAIRN_OK;
    if (step->lore == NULL) {
        const size_t heads = (size_t)shape->layers * shape->kv_heads;
        if (heads * (sizeof *step->lore + ATTN_QUERIES_KEPT * dim * sizeof(float)) > step->learn_bytes) return CAIRN_OK;
        if ((step->lore = cairn_calloc(heads, sizeof *step->lore)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "queries of %u layers", (unsigned)shape->layers);
        step->lore_bytes = heads * sizeof *step->lore;
    }
    const uint32_t take = chunk->rows < KEPT_EACH ? chunk->rows : KEPT_EACH;
    const uint64_t before = attn_lore_of(step, chunk->layer, 0)->kept;
    const attn_group *group = chunk->groups;
    for (uint32_t i = 0; i < take; i++) {
        uint32_t row = row_to_keep(chunk->rows, take, i, before + i);
        while (row >= group->row0 + group->rows) group++;
        attn_reach r = attn_reach_of(step, line, chunk->layer, group);
        if (r.everything || r.k == 0 || r.far_hi <= r.far_lo) continue;
        size_t position = attn_landmark_position(step, r.far_delta, group->offset0 + (row - group->row0));
        for (uint32_t h = 0; h < shape->kv_heads; h++) {
            attn_lore *lore = attn_lore_of(step, chunk->layer, h);
            if (lore->queries == NULL) {
                if ((lore->queries = cairn_alloc_array(ATTN_QUERIES_KEPT, dim * sizeof *lore->queries)) == NULL)
                    return cairn_fail(CAIRN_NO_MEMORY, "queries of layer %u", (unsigned)chunk->layer);
                step->lore_bytes += ATTN_QUERIES_KEPT * dim * sizeof *lore->queries;
            }
            attn_turned(step, lore->queries + lore->kept % ATTN_QUERIES_KEPT * dim,
                        attn_query(step, chunk, h, row, (uint32_t)(lore->kept % per)), position);
            lore->kept++;
        }
    }
    attn_lore *first = attn_lore_of(step, chunk->layer, 0);
    first->worth += (uint64_t)chunk->rows * (chunk->rows <= FEW ? ALONE : 1);
    return CAIRN_OK;
}

typedef struct lesson {
    attn_step *step;
    const attn_part *part;
    uint32_t layer;
    size_t together;
} lesson;

static void teach_item(void *arg, size_t head, size_t worker)
{
    lesson *l = arg;
    const attn_lore *lore = attn_lore_of(l->step, l->layer, (uint32_t)head);
    cairn_index *index = l->part->index[(size_t)l->layer * l->step->shape->kv_heads + head];
    size_t n = lore->kept < ATTN_QUERIES_KEPT ? (size_t)lore->kept : ATTN_QUERIES_KEPT;
    (void)worker;
    if (cairn_index_may_learn(index)) cairn_index_learn(index, lore->queries, n, l->step->policy.top_k, l->together);
}

void attn_lore_teach(attn_step *step, const attn_chunk *chunk, const attn_line *line)
{
    const cairn_attention_shape *shape = step->shape;
    const attn_lore *lore = attn_lore_of(step, chunk->layer, 0);
    if (step->rest > 0) {
        step->rest--;
        if (chunk->rows <= FEW) return; /* a token waits for one layer of one part at most */
    }
    if (lore == NULL || lore->queries == NULL || lore->worth < TEACH_FROM) return;
    for (size_t p = 0; p < line->n_parts; p++) {
        if (!may_learn(step, line, chunk->layer, p)) continue;
        /* every layer will want as much */
        uint64_t rows = (line->parts[p].count + line->parts[p].row0) * shape->kv_heads * shape->layers;
        if (rows * (shape->head_dim / 2) > step->learn_bytes) continue;
        lesson l = {step, &line->parts[p], chunk->layer, chunk->rows <= FEW ? 1 : shape->block_tokens};
        cairn_pool_run(step->pool, shape->kv_heads, teach_item, &l); /* no memory: the index scans on as it did */
        step->rest = shape->layers - 1;
        if (chunk->rows <= FEW) return;
    }
}

void attn_lore_hint(const attn_lore *lore, const attn_part *part, cairn_index_scratch *search)
{
    uint32_t rows[ATTN_FOUND_KEPT];
    size_t n = 0;
    for (size_t i = 0; i < lore->n_found; i++)
        if (lore->found[i] >= part->first && lore->found[i] < part->first + part->count)
            rows[n++] = (uint32_t)(lore->found[i] - part->first) + part->row0;
    cairn_index_hint(search, rows, n);
}

void attn_lore_found(attn_lore *lore, const cairn_index_hit *hits, size_t n)
{
    for (size_t i = n; i-- > 0;) { /* the best one comes first */
        size_t at = 0;
        while (at < lore->n_found && lore->found[at] != hits[i].id) at++;
        if (at == ATTN_FOUND_KEPT)
            at--;
        else if (at == lore->n_found)
            lore->n_found++;
        memmove(lore->found + 1, lore->found, at * sizeof *lore->found);
        lore->found[0] = hits[i].id;
    }
}

/* Of some rows of one of the last blocks, evenly, as an index takes those that go first: a query turns with its offset,
 * so the next chunk's begin with what their like has found. */
void attn_lore_chunk_found(attn_step *step, const attn_chunk *chunk)
{
    const cairn_attention_shape *shape = step->shape;
    if (chunk->n_groups == 1 || step->lore == NULL || !attn_searches(step, chunk->layer)) return;
    const size_t last = chunk->n_groups - 1;
    const size_t g = chunk->groups[last].rows < chunk->groups[last - 1].rows ? last - 1 : last;
    const attn_group *group = &chunk->groups[g];
    const uint32_t each = step->policy.top_k * (shape->heads / shape->kv_heads);
    const uint32_t rows = each < ATTN_FOUND_KEPT ? ATTN_FOUND_KEPT / each : 1;
    for (uint32_t h = 0; h < shape->kv_heads; h++) {
        attn_lore *lore = attn_lore_of(step, chunk->layer, h);
        const attn_unit *unit = &step->units[g * shape->kv_heads + h];
        lore->n_found = 0;
        for (size_t i = 0; i < unit->n_picks && lore->n_found < ATTN_FOUND_KEPT; i++) { /* by block */
            const attn_pick *pick = &unit->picks[i];
            if (!pick->retrieved || (pick->row - group->row0) * rows % group->rows >= rows) continue;
            if (lore->n_found != 0 && lore->found[lore->n_found - 1] == pick->block) continue;
            lore->found[lore->n_found++] = pick->block;
        }
    }
}
