/* session.c - beginning and ending a session: contexts to one line of blocks, budgets, leases. */
#include "context_internal.h"

#include <stdio.h>

enum { TIER_LEAST = 262144 }; /* bytes; a few tiles of any common shape */

void cairn_session_options_init(cairn_session_options *opt, size_t struct_size, const cairn_attention_shape *shape)
{
    cairn_session_options full = {
        .struct_size = struct_size, .fetch = CAIRN_FETCH_AUTO, .ram_bytes = UINT64_C(256) << 20, .dtype = CAIRN_F32};
    cairn_policy_init(&full.policy, sizeof full.policy, shape);
    memset(opt, 0, struct_size);
    memcpy(opt, &full, struct_size < sizeof full ? struct_size : sizeof full);
    opt->struct_size = struct_size;
}

static cairn_status copy_shape(cairn_session *s, const cairn_attention_shape *shape)
{
    s->shape = *shape;
    s->shape.local_layers = NULL;
    s->shape.landmark_bias = NULL;
    s->shape.rope_factors = NULL;
    if (shape->local_layers != NULL) {
        uint8_t *local = cairn_alloc(shape->layers);
        if (local == NULL) return cairn_fail(CAIRN_NO_MEMORY, "local layers of %u", (unsigned)shape->layers);
        memcpy(local, shape->local_layers, shape->layers);
        s->shape.local_layers = local;
    }
    if (shape->landmark_bias != NULL) {
        size_t n = (size_t)shape->layers * shape->heads;
        float *bias = cairn_alloc_array(n, sizeof *bias);
        if (bias == NULL) return cairn_fail(CAIRN_NO_MEMORY, "landmark bias of %zu heads", n);
        memcpy(bias, shape->landmark_bias, n * sizeof *bias);
        s->shape.landmark_bias = bias;
    }
    if (shape->rope_factors != NULL) {
        size_t n = (shape->rope_dims != 0 ? shape->rope_dims : shape->head_dim) / 2;
        float *factors = cairn_alloc_array(n, sizeof *factors);
        if (factors == NULL) return cairn_fail(CAIRN_NO_MEMORY, "rope factors of %zu pairs", n);
        memcpy(factors, shape->rope_factors, n * sizeof *factors);
        s->shape.rope_factors = factors;
    }
    return CAIRN_OK;
}

static cairn_status check_store(const cairn_session *s)
{
    const cairn_geometry *g = &s->geometry;
    const cairn_attention_shape *shape = &s->shape;
    if (shape->scheme == CAIRN_POSITION_DENSE)
        return cairn_fail(CAIRN_INVALID, "a model without landmarks has nothing to keep in a store");
    if (g->layers != shape->layers || g->kv_heads != shape->kv_heads || g->head_dim != shape->head_dim ||
        g->block_tokens != shape->block_tokens)
        return cairn_fail(
            CAIRN_MISMATCH,
            "store %s holds %u layers, %u KV heads of %u, blocks of %u tokens; the model has %u, %u of %u, %u",
            cairn_store_path(s->store), (unsigned)g->layers, (unsigned)g->kv_heads, (unsigned)g->head_dim,
            (unsigned)g->block_tokens, (unsigned)shape->layers, (unsigned)shape->kv_heads, (unsigned)shape->head_dim,
            (unsigned)shape->block_tokens);
    for (uint32_t l = 0; l < g->first_layer; l++)
        if (!attn_is_local(shape, l))
            return cairn_fail(CAIRN_MISMATCH, "store %s has no tiles of layer %u, which the model retrieves from",
                              cairn_store_path(s->store), (unsigned)l);
    return CAIRN_OK;
}

/* The stored blocks of all contexts, in order of name and age. */
cairn_status session_load_ranges(cairn_session *s)
{
    uint64_t at = 0;
    size_t total = 0;
    cairn_status st;
    s->n_ranges = 0;
    for (size_t c = 0; c < s->n_contexts; c++) {
        size_t n = 0;
        if ((st = cairn_snapshot_ranges(s->snap, s->contexts[c].id, NULL, 0, &n)) != CAIRN_OK) return st;
        total += n;
    }
    cairn_range *ranges = cairn_alloc_array(total, sizeof *ranges);
    cairn_free(s->ranges);
    s->ranges = cairn_alloc_array(total, sizeof *s->ranges);
    if (ranges == NULL || s->ranges == NULL) {
        cairn_free(ranges);
        return cairn_fail(CAIRN_NO_MEMORY, "%zu segment ranges", total);
    }
    for (size_t c = 0; c < s->n_contexts; c++) {
        size_t n = 0;
        if ((st = cairn_snapshot_ranges(s->snap, s->contexts[c].id, ranges, total, &n)) != CAIRN_OK) break;
        s->contexts[c].first = at;
        for (size_t i = 0; i < n && s->n_ranges < total; i++) {
            if (ranges[i].count == 0) continue;
            s->ranges[s->n_ranges++] =
                (stored_range){at, ranges[i].count, ranges[i].segment, ranges[i].first, (uint32_t)c};
            at += ranges[i].count;
        }
        s->contexts[c].blocks = at - s->contexts[c].first;
    }
    cairn_free(ranges);
    s->n_stored = at;
    return st == CAIRN_OK && at > UINT32_MAX
               ? cairn_fail(CAIRN_UNSUPPORTED, "%llu blocks in one session", (unsigned long long)at)
               : st;
}

static cairn_status open_contexts(cairn_session *s, const char *const *names, size_t n)
{
    cairn_status st;
    s->contexts = cairn_calloc(n, sizeof *s->contexts);
    if (s->contexts == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu contexts", n);
    s->n_contexts = n;
    for (size_t c = 0; c < n; c++) {
        attached *a = &s->contexts[c];
        cairn_context_info info;
        a->adopted = UINT64_MAX;
        for (size_t i = 0; i < c; i++) /* its blocks would count twice */
            if (strcmp(names[i], names[c]) == 0)
                return cairn_fail(CAIRN_INVALID, "context '%s' is named twice", names[c]);
        st = cairn_snapshot_context(s->snap, names[c], &info);
        if (st == CAIRN_NOT_FOUND)
            return cairn_fail(st, "no context '%s' in store %s", names[c], cairn_store_path(s->store));
        if (st != CAIRN_OK) return st;
        a->id = info.id;
        if (info.tail_tokens == 0) continue;
        if ((a->tail = cairn_calloc(info.tail_tokens, sizeof *a->tail)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "tail of %u tokens", (unsigned)info.tail_tokens);
        if ((st = cairn_snapshot_tail(s->snap, a->id, a->tail, info.tail_tokens, &a->n_tail)) != CAIRN_OK) return st;
        if (a->n_tail > info.tail_tokens)
            return cairn_fail(CAIRN_CORRUPT, "context '%s': tail of %zu tokens, record says %u", names[c], a->n_tail,
                              (unsigned)info.tail_tokens);
    }
    return session_load_ranges(s);
}

/* Layers below first_layer are not stored: the window's blocks must be computed again from their tokens. */
static cairn_status plan_refill(cairn_session *s)
{
    const cairn_geometry *g = &s->geometry;
    uint64_t window = s->shape.local_window_blocks < s->n_stored ? s->shape.local_window_blocks : s->n_stored;
    if (g->first_layer == 0 || !s->continues || window == 0) return CAIRN_OK;
    s->n_refill = (size_t)window * g->block_tokens;
    if ((s->refill = cairn_alloc_array(s->n_refill, sizeof *s->refill)) == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%zu tokens of the local window", s->n_refill);
    s->own.first = s->n_stored - window;
    cairn_token *to = s->refill;
    for (uint64_t b = s->own.first; b < s->n_stored; b++, to += g->block_tokens) {
        const stored_range *r = s->ranges;
        while (b >= r->first + r->count) r++;
        cairn_status st = cairn_snapshot_tokens(s->snap, r->segment, r->block + (uint32_t)(b - r->first), 1, to);
        if (st != CAIRN_OK) return st;
        own_block *block = NULL;
        if ((st = own_push(&s->own, &block)) != CAIRN_OK) return st;
        memcpy(block->tokens, to, g->block_tokens * sizeof *to);
        block->fill = g->block_tokens;
        block->complete = true;
        block->committed = true;
        block->stored_tiles = false;
    }
    return CAIRN_OK;
}

cairn_status session_budget(cairn_session *s)
{
    s->step.learn_bytes = UINT64_MAX;
    if (s->fetch == NULL) return CAIRN_OK;
    uint64_t landmarks = landmarks_bytes(&s->landmarks) + s->step.lore_bytes;
    uint64_t own = s->opt.ram_bytes / 4 > s->own.ram_bytes ? s->own.ram_bytes : s->opt.ram_bytes / 4;
    if (s->writer !=
        NULL) { /* a commit holds its blocks twice; a fixed share, so that the tier need not breathe with it */
        uint64_t share = s->opt.ram_bytes / 16 * 3;
        own = 2 * own > share ? 2 * own : share;
    }
    uint64_t used = landmarks + own + s->own.data_bytes;
    uint64_t rest = s->opt.ram_bytes > used ? s->opt.ram_bytes - used : 0;
    bool tier = cairn_fetch_mode_used(s->fetch) == CAIRN_FETCH_READ;
    if (rest < (tier ? TIER_LEAST : 1)) { /* what makes searches faster goes first */
        landmarks_unlearn(&s->landmarks);
        attn_lore_wipe(&s->step);
        uint64_t less = landmarks - landmarks_bytes(&s->landmarks);
        landmarks -= less;
        used -= less;
        rest = s->opt.ram_bytes > used ? s->opt.ram_bytes - used : 0;
    }
    if (rest < (tier ? TIER_LEAST : 1))
        return cairn_fail(CAIRN_NO_MEMORY,
                          "ram budget of %llu bytes, at least %llu are needed: landmark rows take %llu, own blocks "
                          "%llu%s",
                          (unsigned long long)s->opt.ram_bytes, (unsigned long long)used + (tier ? TIER_LEAST : 1),
                          (unsigned long long)landmarks, (unsigned long long)own + s->own.data_bytes,
                          tier ? ", and at least 262144 must be left for tiles" : "");
    s->step.learn_bytes = rest / 4;
    if (!tier) return CAIRN_OK;
    if (rest >= s->tier_given && rest - s->tier_given <= s->tier_given / 16) return CAIRN_OK;
    s->tier_given = rest;
    return cairn_fetch_set_ram(s->fetch, rest);
}

static cairn_status begin(cairn_session *s, const char *const *names, size_t n)
{
    cairn_status st;
    size_t carry;
    const char *kind = s->opt.index_kind != NULL ? s->index_kind : NULL;
    if ((st = cairn_pool_new(s->opt.threads, &s->pool)) != CAIRN_OK) return st;
    if (s->store != NULL) {
        s->geometry = *cairn_store_geometry(s->store);
        if ((st = check_store(s)) != CAIRN_OK) return st;
        if (s->opt.write && (st = cairn_writer_begin(s->store, names[0], &s->writer)) != CAIRN_OK) return st;
        if ((st = cairn_snapshot_begin(s->store, &s->snap)) != CAIRN_OK) return st;
    } else {
        s->geometry = (cairn_geometry){.layers = s->shape.layers,
                                       .kv_heads = s->shape.kv_heads,
                                       .head_dim = s->shape.head_dim,
                                       .block_tokens = s->shape.block_tokens,
                                       .dtype = s->opt.dtype};
    }
    if (n != 0 && (st = open_contexts(s, names, n)) != CAIRN_OK) return st;
    if ((st = own_init(&s->own, &s->geometry, s->n_stored)) != CAIRN_OK) return st;
    if ((st = plan_refill(s)) != CAIRN_OK) return st;
    s->stream_base = s->continues ? 0 : s->n_stored;
    s->tail_due = s->continues ? s->contexts[0].n_tail : 0;
    s->slot = s->continues ? s->n_stored * attn_slots(&s->shape) : 0;

    if ((st = landmarks_init(&s->landmarks, &s->shape, &s->geometry, s->pool)) != CAIRN_OK) return st;
    const bool mass = s->opt.policy.measure_mass || s->opt.policy.mass > 0;
    if ((st = landmarks_load(&s->landmarks, s->store, s->snap, s->ranges, s->n_ranges, kind, mass)) != CAIRN_OK)
        return st;
    if (s->continues && (st = landmarks_load_recent(&s->landmarks, s->snap, s->ranges, s->n_ranges)) != CAIRN_OK)
        return st;
    if ((st = landmarks_open_tail(&s->landmarks, s->n_stored, kind)) != CAIRN_OK) return st;
    if ((st = attn_step_init(&s->step, &s->shape, &s->opt.policy, s->pool)) != CAIRN_OK) return st;

    size_t rows = (size_t)s->geometry.kv_heads * s->geometry.block_tokens * s->geometry.head_dim;
    if (!cairn_mul_size(rows, 2 * (size_t)s->geometry.layers, &carry) ||
        (s->carry = cairn_calloc(carry, sizeof *s->carry)) == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "rows of the block under way, %zu per layer", 2 * rows);
    if (s->store == NULL) return CAIRN_OK;
    if ((st = cairn_fetch_new(s->store, s->opt.fetch, s->opt.ram_bytes / 2, &s->fetch)) != CAIRN_OK) return st;
    return session_budget(s);
}

cairn_status cairn_session_begin(cairn_store *store, const cairn_attention_shape *shape, const char *const *contexts,
                                 size_t n, const cairn_session_options *opt, cairn_session **out)
{
    *out = NULL;
    cairn_status st = cairn_attention_shape_check(shape);
    if (st != CAIRN_OK) return st;
    if (store == NULL && n != 0) return cairn_fail(CAIRN_INVALID, "%zu contexts without a store", n);
    cairn_session *s = cairn_calloc(1, sizeof *s);
    if (s == NULL) return cairn_fail(CAIRN_NO_MEMORY, "session");
    s->own.spill_fd = -1;
    s->store = store;
    cairn_session_options_init(&s->opt, sizeof s->opt, shape);
    if (opt != NULL) memcpy(&s->opt, opt, opt->struct_size < sizeof s->opt ? opt->struct_size : sizeof s->opt);
    s->continues = n == 1 && !s->opt.fresh;
    if (s->opt.index_kind != NULL) {
        snprintf(s->index_kind, sizeof s->index_kind, "%s", s->opt.index_kind);
        s->opt.index_kind = s->index_kind;
    }
    if (s->opt.write && !s->continues)
        st = cairn_fail(CAIRN_INVALID, "writing needs one context that goes on, not %zu contexts%s", n,
                        s->opt.fresh ? " seen fresh" : "");
    if (st == CAIRN_OK) st = copy_shape(s, shape);
    if (st == CAIRN_OK) st = begin(s, contexts, n);
    if (st != CAIRN_OK) {
        cairn_session_end(s);
        return st;
    }
    *out = s;
    return CAIRN_OK;
}

void cairn_session_end(cairn_session *s)
{
    if (s == NULL) return;
    cairn_fetch_free(s->fetch);
    attn_step_wipe(&s->step);
    if (s->landmarks.shape != NULL) landmarks_wipe(&s->landmarks);
    own_wipe(&s->own);
    cairn_snapshot_end(s->snap);
    cairn_writer_end(s->writer);
    cairn_pool_free(s->pool);
    for (size_t c = 0; c < s->n_contexts; c++) cairn_free(s->contexts[c].tail);
    cairn_free(s->contexts);
    cairn_free(s->ranges);
    cairn_free(s->refill);
    cairn_free(s->groups);
    cairn_free(s->stage);
    cairn_free(s->carry);
    cairn_free(s->ids);
    cairn_free(s->id_mass);
    cairn_free(s->id_at);
    cairn_free(s->id_token);
    cairn_free(s->direct);
    cairn_free(s->views);
    cairn_free(s->spill_scratch);
    cairn_free((void *)(uintptr_t)s->shape.local_layers);
    cairn_free((void *)(uintptr_t)s->shape.landmark_bias);
    cairn_free((void *)(uintptr_t)s->shape.rope_factors);
    cairn_free(s);
}

const cairn_attention_shape *cairn_session_shape(const cairn_session *s)
{
    return &s->shape;
}

cairn_status cairn_session_tail(const cairn_session *s, const cairn_token **tokens, size_t *n)
{
    *tokens = s->continues ? s->contexts[0].tail : NULL;
    *n = s->continues ? s->contexts[0].n_tail : 0;
    return CAIRN_OK;
}

cairn_status cairn_session_refill_tokens(const cairn_session *s, const cairn_token **tokens, size_t *n)
{
    *tokens = s->refill;
    *n = s->n_refill;
    return CAIRN_OK;
}

uint64_t cairn_session_slot(const cairn_session *s)
{
    return s->slot;
}

uint64_t cairn_session_tokens(const cairn_session *s)
{
    uint64_t slots = attn_slots(&s->shape);
    return s->slot / slots * s->shape.block_tokens + s->slot % slots;
}

bool cairn_session_landmark_due(const cairn_session *s, size_t ahead)
{
    if (s->shape.scheme == CAIRN_POSITION_DENSE) return false;
    if (s->closing) return ahead == 0;
    return (s->slot + ahead) % attn_slots(&s->shape) == s->shape.block_tokens;
}

uint64_t session_complete_blocks(const cairn_session *s)
{
    return s->stream_base + s->slot / attn_slots(&s->shape);
}
