/* stream.c - a chunk through a session: append rows, attend, advance, commit.
 *
 * Rows of a chunk fall into groups, one for each block they touch. For each layer the group's keys, turned by their
 * offset and rounded like stored tiles, are staged in f32 for the rows of the same block; a block that becomes whole is
 * encoded as a tile and its landmark joins the index at once, so later rows of the same chunk already see it as stored.
 * What is staged of a block that is not whole yet is carried to the next chunk. A chunk of one group, as every decoded
 * token is, is staged where it is carried: copying there and back took 4 to 7 % of a step. */
#include "context_internal.h"

#include <stdlib.h>

static cairn_status reserve_stage(cairn_session *s)
{
    const cairn_geometry *g = &s->geometry;
    size_t one = (size_t)g->kv_heads * g->block_tokens * g->head_dim;
    size_t need;
    if (s->n_groups == 1) return CAIRN_OK;
    if (!cairn_mul_size(s->n_groups * 2, one, &need))
        return cairn_fail(CAIRN_INVALID, "a chunk of %zu blocks", s->n_groups);
    if (need <= s->cap_stage) return CAIRN_OK;
    cairn_free(s->stage);
    s->cap_stage = 0;
    if ((s->stage = cairn_calloc(need, sizeof *s->stage)) == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "a chunk of %zu blocks", s->n_groups);
    s->cap_stage = need;
    return CAIRN_OK;
}

/* Cuts `rows` rows from the present slot into groups and makes own blocks for them. */
static cairn_status start_chunk(cairn_session *s, size_t rows)
{
    uint64_t slots = attn_slots(&s->shape);
    uint32_t c = s->shape.block_tokens;
    size_t n = (size_t)((s->slot % slots + rows + slots - 1) / slots);
    cairn_status st;
    if (rows == 0 || rows > UINT32_MAX / 2) return cairn_fail(CAIRN_INVALID, "a chunk of %zu rows", rows);
    if (s->closed) return cairn_fail(CAIRN_INVALID, "the stream was closed early; nothing may follow its landmark");
    if (s->closing && rows != 1) return cairn_fail(CAIRN_INVALID, "%zu rows where the closing landmark is due", rows);
    if (s->n_refill != 0 && s->n_refilled < s->geometry.first_layer)
        return cairn_fail(CAIRN_INVALID,
                          "layer %u is not stored; give it its window again first (cairn_session_refill)",
                          (unsigned)s->n_refilled);
    if (n > s->cap_groups) {
        cairn_free(s->groups);
        s->cap_groups = 0;
        if ((s->groups = cairn_alloc_array(n, sizeof *s->groups)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "a chunk of %zu blocks", n);
        s->cap_groups = n;
    }
    uint64_t slot = s->slot;
    uint32_t row = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t offset = (uint32_t)(slot % slots);
        uint32_t take = (uint32_t)(slots - offset < rows - row ? slots - offset : rows - row);
        uint64_t block = s->stream_base + slot / slots;
        uint32_t fill = offset + take < c ? offset + take : c;
        if (s->closing) fill = offset, offset = c;
        s->groups[i] = (attn_group){.block = block, .row0 = row, .rows = take, .offset0 = offset, .fill = fill};
        row += take;
        slot += take;
        own_block *b = own_at(&s->own, block);
        if (b == NULL && (st = own_push(&s->own, &b)) != CAIRN_OK) return st;
        b->fill = fill;
    }
    s->n_groups = n;
    for (uint32_t l = 0; l < s->shape.layers; l++)
        if (s->landmarks.recent[l].rows != NULL &&
            (st = recent_reserve(&s->landmarks.recent[l], &s->geometry, s->shape.local_window_blocks + n + 1)) !=
                CAIRN_OK)
            return st;
    if ((st = reserve_stage(s)) != CAIRN_OK) return st;
    s->chunk_rows = (uint32_t)rows;
    s->next_layer = 0;
    return CAIRN_OK;
}

/* Rows of a KV head of a layer's unfinished block: its keys (which = 0) or values. */
static float *carry_rows(const cairn_session *s, uint32_t layer, uint32_t which, uint32_t head)
{
    const cairn_geometry *g = &s->geometry;
    return s->carry + (((size_t)layer * 2 + which) * g->kv_heads + head) * g->block_tokens * g->head_dim;
}
/* The same of a group of this chunk. */
static float *stage_rows(const cairn_session *s, uint32_t layer, uint32_t which, size_t group, uint32_t head)
{
    const cairn_geometry *g = &s->geometry;
    if (s->n_groups == 1) return carry_rows(s, layer, which, head);
    return s->stage + ((which * s->n_groups + group) * g->kv_heads + head) * g->block_tokens * g->head_dim;
}

typedef struct append_job {
    cairn_session *s;
    uint32_t layer;
    const float *k;
    const float *v;
    cairn_status *status; /* (kv_heads) */
} append_job;

static void round_row(const cairn_session *s, float *row)
{
    uint16_t half[1024];
    cairn_dtype dtype = s->geometry.dtype;
    if (dtype != CAIRN_F16 && dtype != CAIRN_BF16)
        return; /* q8 is rounded when the block closes: its scales need all rows */
    s->step.kernels->narrow(half, row, dtype, s->geometry.head_dim);
    s->step.kernels->widen(row, half, dtype, s->geometry.head_dim);
}

/* A landmark row: into the block's record and the index, or the ring of a local layer. */
static cairn_status take_landmark(cairn_session *s, uint32_t layer, uint32_t head, uint64_t block, const float *key)
{
    const cairn_geometry *g = &s->geometry;
    cairn_dtype dtype = cairn_landmark_dtype(g->dtype);
    uint8_t rounded[4096];
    float row[1024];
    s->step.kernels->narrow(rounded, key, dtype, g->head_dim);
    if (layer >= g->first_layer)
        memcpy(own_landmark(&s->own, own_at(&s->own, block), layer, head), rounded, s->own.landmark_bytes);
    attn_recent *recent = &s->landmarks.recent[layer];
    if (recent->rows != NULL) {
        s->step.kernels->widen(row, rounded, dtype, g->head_dim);
        recent_put(recent, g, block, head, row);
        return CAIRN_OK;
    }
    const attn_part *part = &s->landmarks.parts[s->landmarks.n_parts - 1];
    return cairn_index_add(part->index[(size_t)layer * g->kv_heads + head], 1, rounded);
}

static void append_head(void *arg, size_t item, size_t worker)
{
    append_job *job = arg;
    cairn_session *s = job->s;
    const cairn_geometry *g = &s->geometry;
    uint32_t head = (uint32_t)item;
    size_t dim = g->head_dim;
    bool dense = s->shape.scheme == CAIRN_POSITION_DENSE, carried = s->n_groups == 1;
    cairn_status st = CAIRN_OK;
    (void)worker;
    for (size_t gi = 0; gi < s->n_groups && st == CAIRN_OK; gi++) {
        const attn_group *group = &s->groups[gi];
        float *keys = stage_rows(s, job->layer, 0, gi, head);
        float *values = stage_rows(s, job->layer, 1, gi, head);
        uint32_t before = group->offset0 < g->block_tokens ? group->offset0 : group->fill;
        if (before != 0 && !carried) {
            memcpy(keys, carry_rows(s, job->layer, 0, head), before * dim * sizeof *keys);
            memcpy(values, carry_rows(s, job->layer, 1, head), before * dim * sizeof *values);
        }
        bool whole = dense && group->fill == g->block_tokens;
        for (uint32_t i = 0; i < group->rows && st == CAIRN_OK; i++) {
            size_t from = ((size_t)(group->row0 + i) * g->kv_heads + head) * dim;
            uint32_t offset = group->offset0 + i;
            if (offset == g->block_tokens) {
                st = take_landmark(s, job->layer, head, group->block, job->k + from);
                whole = true;
                continue;
            }
            attn_rotate(&s->step.rope, s->step.kernels, keys + offset * dim, job->k + from, offset);
            memcpy(values + offset * dim, job->v + from, dim * sizeof *values);
            round_row(s, keys + offset * dim);
            round_row(s, values + offset * dim);
        }
        if (whole) {
            own_block *b = own_at(&s->own, group->block);
            cairn_tile_encode(s->step.kernels, g->dtype, group->fill, g->head_dim, keys, values,
                              own_tile(&s->own, b, job->layer, head));
        } else if (!carried) {
            memcpy(carry_rows(s, job->layer, 0, head), keys, group->fill * dim * sizeof *keys);
            memcpy(carry_rows(s, job->layer, 1, head), values, group->fill * dim * sizeof *values);
        }
    }
    job->status[item] = st;
}

cairn_status cairn_session_append(cairn_session *s, uint32_t layer, size_t rows, const float *k, const float *v)
{
    cairn_status st;
    if (s->broken) return cairn_fail(CAIRN_INVALID, "an earlier step of this session failed; begin a new one");
    if (layer == 0 && s->chunk_rows == 0 && (st = start_chunk(s, rows)) != CAIRN_OK) {
        s->broken = true;
        return st;
    }
    if (layer != s->next_layer || rows != s->chunk_rows)
        return cairn_fail(CAIRN_INVALID, "append of %zu rows to layer %u; %u rows of layer %u are due", rows,
                          (unsigned)layer, (unsigned)s->chunk_rows, (unsigned)s->next_layer);
    append_job job = {.s = s, .layer = layer, .k = k, .v = v};
    if ((job.status = cairn_calloc(s->geometry.kv_heads, sizeof *job.status)) == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "append to %u heads", (unsigned)s->geometry.kv_heads);
    cairn_pool_run(rows >= 16 ? s->pool : NULL, s->geometry.kv_heads, append_head, &job);
    st = CAIRN_OK;
    for (uint32_t h = 0; h < s->geometry.kv_heads && st == CAIRN_OK; h++)
        if (job.status[h] != CAIRN_OK)
            st = cairn_fail(job.status[h], "landmark of layer %u head %u", (unsigned)layer, (unsigned)h);
    cairn_free(job.status);
    attn_recent *recent = &s->landmarks.recent[layer];
    uint64_t complete = s->stream_base + (s->slot + rows) / attn_slots(&s->shape);
    if (recent->rows != NULL && complete > recent->end) recent->end = complete;
    s->next_layer = layer + 1;
    if (st != CAIRN_OK) s->broken = true;
    return st;
}

attn_line session_line(const cairn_session *s)
{
    return (attn_line){.parts = s->landmarks.parts,
                       .n_parts = s->landmarks.n_parts,
                       .recent = s->landmarks.recent,
                       .stream_base = s->stream_base,
                       .cached = session_complete_blocks(s)};
}

/* The chunk under way in the layer that was appended last. */
static cairn_status begin_attend(cairn_session *s, uint32_t layer, size_t rows, const float *q, attn_chunk *out)
{
    if (s->broken) return cairn_fail(CAIRN_INVALID, "an earlier step of this session failed; begin a new one");
    if (layer + 1 != s->next_layer || rows != s->chunk_rows)
        return cairn_fail(CAIRN_INVALID, "attend of %zu rows in layer %u; append them first", rows, (unsigned)layer);
    *out = (attn_chunk){.layer = layer,
                        .rows = (uint32_t)rows,
                        .groups = s->groups,
                        .n_groups = s->n_groups,
                        .q = q,
                        .own_k = stage_rows(s, layer, 0, 0, 0),
                        .own_v = stage_rows(s, layer, 1, 0, 0)};
    attn_part *last = &s->landmarks.parts[s->landmarks.n_parts - 1];
    uint64_t complete = s->stream_base + (s->slot + rows) / attn_slots(&s->shape);
    last->count = complete > last->first ? complete - last->first : 0;
    return CAIRN_OK;
}

cairn_status cairn_session_attend(cairn_session *s, uint32_t layer, size_t rows, const float *q, float *out)
{
    attn_source source;
    attn_chunk chunk;
    cairn_status st = begin_attend(s, layer, rows, q, &chunk);
    if (st != CAIRN_OK) return st;
    chunk.out = out;
    const attn_line line = session_line(s);
    if ((st = session_source(s, &source)) == CAIRN_OK) st = attn_step_run(&s->step, &chunk, &line, &source);
    if (st != CAIRN_OK) s->broken = true;
    return st;
}

cairn_status cairn_session_learn(cairn_session *s, uint32_t layer, size_t rows, const float *q)
{
    attn_chunk chunk;
    cairn_status st = begin_attend(s, layer, rows, q, &chunk);
    if (st != CAIRN_OK) return st;
    const attn_line line = session_line(s);
    if ((st = attn_step_learn(&s->step, &chunk, &line)) != CAIRN_OK) s->broken = true;
    return st;
}

static cairn_status grow_sources(cairn_session *s)
{
    uint64_t need = session_complete_blocks(s) + 64;
    if (!s->sources || need <= s->step.n_block_mass) return CAIRN_OK;
    need += need / 4;
    double *mass = cairn_calloc((size_t)need, sizeof *mass);
    if (mass == NULL) return cairn_fail(CAIRN_NO_MEMORY, "attention mass of %llu blocks", (unsigned long long)need);
    if (s->step.block_mass != NULL) memcpy(mass, s->step.block_mass, (size_t)s->step.n_block_mass * sizeof *mass);
    cairn_free(s->step.block_mass);
    s->step.block_mass = mass;
    s->step.n_block_mass = need;
    return CAIRN_OK;
}

cairn_status cairn_session_advance(cairn_session *s, const cairn_token *tokens, size_t rows)
{
    if (s->broken) return cairn_fail(CAIRN_INVALID, "an earlier step of this session failed; begin a new one");
    if (rows != s->chunk_rows || s->next_layer != s->shape.layers)
        return cairn_fail(CAIRN_INVALID, "advance by %zu rows; %u rows are through %u of %u layers", rows,
                          (unsigned)s->chunk_rows, (unsigned)s->next_layer, (unsigned)s->shape.layers);
    bool dense = s->shape.scheme == CAIRN_POSITION_DENSE;
    for (size_t i = 0; i < s->tail_due && i < rows; i++) { /* the context's tail comes first; it has no landmark */
        cairn_token expected = s->contexts[0].tail[s->contexts[0].n_tail - s->tail_due + i];
        if (tokens[i] == expected) continue;
        s->broken = true;
        return cairn_fail(CAIRN_INVALID,
                          "slot %llu is token %d of the context's tail, not %d; run the tail again first",
                          (unsigned long long)(s->slot + i), (int)expected, (int)tokens[i]);
    }
    for (size_t gi = 0; gi < s->n_groups; gi++) {
        const attn_group *group = &s->groups[gi];
        own_block *b = own_at(&s->own, group->block);
        for (uint32_t i = 0; i < group->rows; i++)
            if (group->offset0 + i < s->shape.block_tokens) b->tokens[group->offset0 + i] = tokens[group->row0 + i];
        b->complete =
            dense ? group->fill == s->shape.block_tokens : group->offset0 + group->rows > s->shape.block_tokens;
    }
    s->tail_due -= s->tail_due < rows ? s->tail_due : rows;
    s->slot += rows;
    s->chunk_rows = 0;
    s->next_layer = 0;
    if (s->closing) s->closed = true;
    cairn_status st = grow_sources(s);
    if (st == CAIRN_OK && s->own.ram_bytes > s->opt.ram_bytes / 4)
        st = own_spill(&s->own, (size_t)(s->opt.ram_bytes / 4));
    if (st == CAIRN_OK) st = session_budget(s);
    if (st != CAIRN_OK) s->broken = true;
    return st;
}

cairn_status cairn_session_refill(cairn_session *s, uint32_t layer, const float *k, const float *v)
{
    const cairn_geometry *g = &s->geometry;
    size_t dim = g->head_dim;
    size_t blocks = s->n_refill / g->block_tokens;
    if (layer >= g->first_layer)
        return cairn_fail(CAIRN_INVALID, "layer %u is stored; only layers below %u are refilled", (unsigned)layer,
                          (unsigned)g->first_layer);
    if (layer != s->n_refilled || s->chunk_rows != 0)
        return cairn_fail(CAIRN_INVALID, "layers are refilled in order, each once, before the first row; %u are",
                          (unsigned)s->n_refilled);
    float *keys = cairn_calloc(2 * (size_t)g->block_tokens, dim * sizeof *keys);
    if (keys == NULL) return cairn_fail(CAIRN_NO_MEMORY, "refill of %u tokens", (unsigned)g->block_tokens);
    float *values = keys + g->block_tokens * dim;
    cairn_status st = CAIRN_OK;
    for (size_t b = 0; b < blocks && st == CAIRN_OK; b++) {
        uint64_t block = s->n_stored - blocks + b;
        for (uint32_t h = 0; h < g->kv_heads && st == CAIRN_OK; h++) {
            for (uint32_t i = 0; i <= g->block_tokens && st == CAIRN_OK; i++) {
                size_t from = ((b * (g->block_tokens + 1) + i) * g->kv_heads + h) * dim;
                if (i == g->block_tokens) {
                    st = take_landmark(s, layer, h, block, k + from);
                    break;
                }
                attn_rotate(&s->step.rope, s->step.kernels, keys + i * dim, k + from, i);
                memcpy(values + i * dim, v + from, dim * sizeof *values);
                round_row(s, keys + i * dim);
                round_row(s, values + i * dim);
            }
            cairn_tile_encode(s->step.kernels, g->dtype, g->block_tokens, g->head_dim, keys, values,
                              own_tile(&s->own, own_at(&s->own, block), layer, h));
        }
        if (s->landmarks.recent[layer].end <= block) s->landmarks.recent[layer].end = block + 1;
    }
    cairn_free(keys);
    s->n_refilled = layer + 1;
    if (st != CAIRN_OK) s->broken = true;
    return st;
}

cairn_status cairn_session_close_block(cairn_session *s)
{
    uint64_t fill = s->slot % attn_slots(&s->shape);
    if (s->shape.scheme == CAIRN_POSITION_DENSE || fill == 0 || fill >= s->shape.block_tokens || s->chunk_rows != 0 ||
        s->closed)
        return cairn_fail(CAIRN_INVALID, "only a block under way can be closed early; it holds %llu of %u tokens",
                          (unsigned long long)fill, (unsigned)s->shape.block_tokens);
    s->closing = true;
    return CAIRN_OK;
}

cairn_status session_adopt_block(cairn_session *s, const uint8_t *data, size_t stride, const cairn_token *tokens,
                                 uint32_t fill, size_t context)
{
    const cairn_geometry *g = &s->geometry;
    own_block *b = NULL;
    cairn_status st;
    if (s->continues || s->slot != 0 || s->chunk_rows != 0)
        return cairn_fail(CAIRN_INVALID,
                          "blocks are adopted before the first row of a session with a stream of its own");
    uint64_t block = s->n_stored + s->n_adopted;
    if ((st = own_push(&s->own, &b)) != CAIRN_OK) return st;
    /* no more than there is: the room for more tokens is not touched, and so no memory */
    own_copy(&s->own, b->data, s->own.tile_bytes, data, stride, fill);
    memcpy(b->tokens, tokens, fill * sizeof *b->tokens);
    b->fill = fill;
    b->complete = true;
    const attn_part *part = &s->landmarks.parts[s->landmarks.n_parts - 1];
    for (uint32_t l = g->first_layer; l < g->layers && st == CAIRN_OK; l++)
        for (uint32_t h = 0; s->landmarks.recent[l].rows == NULL && h < g->kv_heads && st == CAIRN_OK; h++)
            st = cairn_index_add(part->index[(size_t)l * g->kv_heads + h], 1, own_landmark(&s->own, b, l, h));
    s->contexts[context].adopted = block;
    s->n_adopted++;
    s->stream_base++;
    if (st != CAIRN_OK) s->broken = true;
    return st;
}

cairn_status cairn_session_adopt(cairn_session *s, const cairn_session *donor, size_t context)
{
    if (!donor->closed || donor->own.n == 0 || context >= s->n_contexts)
        return cairn_fail(CAIRN_INVALID, "the donor's last block was not closed early, or context %zu is not attached",
                          context);
    if (memcmp(&donor->geometry, &s->geometry, sizeof s->geometry) != 0)
        return cairn_fail(CAIRN_MISMATCH, "donor and session have different geometries");
    const own_block *from = &donor->own.items[donor->own.n - 1];
    return session_adopt_block(s, from->data, donor->own.tile_bytes, from->tokens, from->fill, context);
}

/* ---- commit ---- */

uint64_t cairn_session_pending_bytes(const cairn_session *s)
{
    uint64_t n = 0;
    for (size_t i = 0; i < s->own.n; i++) n += s->own.items[i].complete && !s->own.items[i].committed;
    return n * s->own.data_bytes;
}

static cairn_status renew_ranges(cairn_session *s)
{
    cairn_status st = cairn_snapshot_renew(s->snap);
    return st == CAIRN_OK ? session_load_ranges(s) : st;
}

/* The next whole blocks, at most `most`, and with the last of them the tail: one durable transaction. */
static cairn_status commit_some(cairn_session *s, size_t most, const cairn_input *input, bool *out_all)
{
    const cairn_geometry *g = &s->geometry;
    cairn_status st = CAIRN_OK;
    size_t first = 0;
    while (first < s->own.n && s->own.items[first].committed) first++;
    size_t n = 0;
    while (first + n < s->own.n && s->own.items[first + n].complete) n++;
    const own_block *tail = first + n < s->own.n ? &s->own.items[first + n] : NULL;
    if (tail != NULL && tail->fill == g->block_tokens)
        return cairn_fail(CAIRN_INVALID, "slot %llu is a landmark's: run it through all layers before the commit",
                          (unsigned long long)s->slot);
    *out_all = n <= most;
    if (!*out_all) {
        n = most;
        tail = NULL;
        input = NULL;
    }
    cairn_block_data *blocks = cairn_alloc_array(n, sizeof *blocks);
    if (blocks == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a commit of %zu blocks", n);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        own_block *b = &s->own.items[first + i];
        if ((st = own_unspill(&s->own, b)) != CAIRN_OK) break;
        blocks[i] = (cairn_block_data){
            .tokens = b->tokens,
            .landmarks = g->first_layer < g->layers ? own_landmark(&s->own, b, g->first_layer, 0) : NULL,
            .tiles = g->first_layer < g->layers ? own_tile(&s->own, b, g->first_layer, 0) : NULL};
    }
    if (st == CAIRN_OK)
        st = cairn_writer_commit(s->writer, blocks, n, tail != NULL ? tail->tokens : NULL,
                                 tail != NULL ? tail->fill : 0, input);
    cairn_free(blocks);
    if (st != CAIRN_OK) return st;
    for (size_t i = 0; i < n; i++) s->own.items[first + i].committed = true;
    if ((st = renew_ranges(s)) != CAIRN_OK) {
        s->broken = true; /* durable all the same */
        return st;
    }
    uint32_t window =
        s->shape.window_blocks > s->shape.local_window_blocks ? s->shape.window_blocks : s->shape.local_window_blocks;
    if (s->opt.policy.window_blocks > (int32_t)window) window = (uint32_t)s->opt.policy.window_blocks;
    size_t committed = first + n;
    own_pop_front(&s->own, committed > window ? committed - window : 0);
    return session_budget(s);
}

cairn_status cairn_session_commit(cairn_session *s, const cairn_input *input)
{
    cairn_status st = CAIRN_OK;
    if (s->writer == NULL) return cairn_fail(CAIRN_INVALID, "this session was not begun for writing");
    if (s->broken || s->chunk_rows != 0 || s->closing || s->closed)
        return cairn_fail(CAIRN_INVALID, "a commit belongs between whole chunks");
    if (s->tail_due != 0) { /* nothing new; the tail must not be lost */
        if (s->tail_due != s->contexts[0].n_tail)
            return cairn_fail(CAIRN_INVALID, "the last %zu tokens of the context's tail were not run again",
                              s->tail_due);
        return cairn_writer_commit(s->writer, NULL, 0, s->contexts[0].tail, s->contexts[0].n_tail, input);
    }
    /* Spilled blocks come back to be written: no more of them at once than the budget's share of own blocks. */
    size_t most = (size_t)(s->opt.ram_bytes / 4) / s->own.data_bytes;
    for (bool all = false; !all && st == CAIRN_OK;) st = commit_some(s, most != 0 ? most : 1, input, &all);
    if (st == CAIRN_OK) scans_keep(s, input != NULL && input->complete);
    return st;
}
