/* report.c - what happened in a session: statistics, sources of an answer, the trace tests read. */
#include "context_internal.h"

#include <stdio.h>
#include <stdlib.h>

void cairn_session_stats(const cairn_session *s, cairn_step_stats *out)
{
    cairn_fetch_stats now = {0};
    *out = s->step.stats;
    if (s->fetch == NULL) return;
    cairn_fetch_stats_get(s->fetch, &now);
    out->tier_bytes = now.tier_bytes - s->fetch_base.tier_bytes;
    out->map_bytes = now.map_bytes - s->fetch_base.map_bytes;
    out->read_bytes = now.read_bytes - s->fetch_base.read_bytes;
    out->ahead_tiles = now.ahead_tiles - s->fetch_base.ahead_tiles;
    out->ahead_used = now.ahead_used - s->fetch_base.ahead_used;
}

void cairn_session_stats_reset(cairn_session *s)
{
    s->step.stats = (cairn_step_stats){.mass_min = 1, .mass_kind = CAIRN_MASS_EXACT};
    if (s->fetch != NULL) cairn_fetch_stats_get(s->fetch, &s->fetch_base);
    if (s->step.block_mass != NULL)
        memset(s->step.block_mass, 0, (size_t)s->step.n_block_mass * sizeof *s->step.block_mass);
}

void cairn_session_mass_enable(cairn_session *s, bool on)
{
    s->step.policy.measure_mass = on;
    if (on) landmarks_weigh(&s->landmarks);
}

void cairn_session_sources_enable(cairn_session *s, bool on)
{
    s->sources = on;
    cairn_free(s->step.block_mass);
    s->step.block_mass = NULL;
    s->step.n_block_mass = 0;
    if (!on) return;
    uint64_t n = session_complete_blocks(s) + 64;
    s->step.block_mass = cairn_calloc((size_t)n, sizeof *s->step.block_mass);
    if (s->step.block_mass != NULL) s->step.n_block_mass = n;
}

/* Which context a logical block belongs to, as its user counts. */
static cairn_source source_of(const cairn_session *s, uint64_t block, double mass)
{
    uint32_t c = s->geometry.block_tokens;
    const own_block *own = own_at(&s->own, block);
    cairn_source source = {.context = SIZE_MAX, .block = block - s->stream_base, .tokens = c, .mass = mass};
    if (own != NULL && !own->committed) source.tokens = own->fill;
    for (size_t i = 0; i < s->n_contexts; i++) {
        const attached *a = &s->contexts[i];
        if (block == a->adopted || (block >= a->first && block < a->first + a->blocks)) {
            source.context = i;
            source.block = block == a->adopted ? a->blocks : block - a->first;
            break;
        }
    }
    source.token = source.block * c;
    return source;
}

static int by_mass(const void *a, const void *b)
{
    const cairn_source *x = a;
    const cairn_source *y = b;
    if (x->mass != y->mass) return x->mass > y->mass ? -1 : 1;
    return (x->token < y->token) - (x->token > y->token);
}

size_t cairn_session_sources(const cairn_session *s, cairn_source *out, size_t cap)
{
    size_t n = 0;
    double least = 0; /* of the kept ones, once `out` is full */
    for (uint64_t b = 0; b < s->step.n_block_mass; b++) {
        double mass = s->step.block_mass[b];
        if (mass <= 0 || (n == cap && mass <= least)) continue;
        if (cap == 0) return 0;
        size_t at = n < cap ? n++ : cap - 1;
        out[at] = source_of(s, b, mass);
        if (n == cap) {
            qsort(out, n, sizeof *out, by_mass);
            least = out[n - 1].mass;
        }
    }
    qsort(out, n, sizeof *out, by_mass);
    return n;
}

cairn_status cairn_session_trace_enable(cairn_session *s, bool on)
{
    s->trace = on;
    return CAIRN_OK;
}

void cairn_session_watch(cairn_session *s, cairn_search_watch watch, void *arg)
{
    s->step.watch = watch;
    s->step.watch_arg = arg;
}

static int best_first(const void *a, const void *b)
{
    const attn_pick *x = a;
    const attn_pick *y = b;
    if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
    return (x->block < y->block) - (x->block > y->block);
}

cairn_status cairn_session_trace(const cairn_session *s, size_t rows, uint32_t k, int64_t *selected, int32_t *slots)
{
    const cairn_attention_shape *shape = &s->shape;
    uint32_t per = shape->heads / shape->kv_heads;
    bool stingy = shape->scheme == CAIRN_POSITION_STINGY;
    size_t lists = rows * shape->heads;
    if (!s->trace) return cairn_fail(CAIRN_INVALID, "the trace was not enabled");
    for (size_t i = 0; i < lists * k; i++) {
        selected[i] = -1;
        if (slots != NULL) slots[i] = -1;
    }
    attn_pick *mine = cairn_alloc_array(k != 0 ? k : 1, sizeof *mine);
    if (mine == NULL) return cairn_fail(CAIRN_NO_MEMORY, "trace of %u blocks", (unsigned)k);
    for (size_t u = 0; u < s->step.n_units; u++) {
        const attn_unit *unit = &s->step.units[u];
        const attn_group *group = &s->groups[unit->group];
        for (size_t list = 0; list < (size_t)group->rows * per; list++) {
            uint32_t row = group->row0 + (uint32_t)(list / per);
            uint32_t n = 0;
            if (row >= rows) continue;
            for (size_t p = 0; p < unit->n_picks; p++) {
                const attn_pick *pick = &unit->picks[p];
                if (!pick->retrieved || pick->row != row || pick->g != list % per) continue;
                if (n < k) {
                    mine[n++] = *pick;
                    continue;
                }
                uint32_t worst = 0; /* asked for fewer than were chosen: the best of them */
                for (uint32_t i = 1; i < n; i++)
                    if (best_first(&mine[i], &mine[worst]) > 0) worst = i;
                if (n != 0 && best_first(pick, &mine[worst]) < 0) {
                    memmove(mine + worst, mine + worst + 1, (n - 1 - worst) * sizeof *mine);
                    mine[n - 1] = *pick;
                }
            }
            if (!stingy) qsort(mine, n, sizeof *mine, best_first);
            size_t at = ((size_t)row * shape->heads + (size_t)unit->head * per + list % per) * k;
            /* delta = prefix slots - slot + blocks of the chunk before the row's; the prefix is min(k, n) + 1 slots */
            uint64_t inside = group->block - s->groups[0].block;
            for (uint32_t i = 0; i < n; i++) {
                selected[at + i] = (int64_t)mine[i].block;
                if (slots != NULL && stingy) slots[at + i] = (int32_t)(n + 1 + inside) - mine[i].delta;
            }
        }
    }
    cairn_free(mine);
    return CAIRN_OK;
}

void cairn_session_info_get(const cairn_session *s, cairn_session_info *out)
{
    *out = (cairn_session_info){.old_blocks = s->n_stored + s->n_adopted,
                                .landmark_bytes = landmarks_bytes(&s->landmarks),
                                .own_bytes = s->own.ram_bytes,
                                .spilled_bytes = s->own.spill_bytes,
                                .fetch = CAIRN_FETCH_MAP,
                                .kernels = cairn_kernels_words(),
                                .threads = (uint32_t)cairn_pool_size(s->pool)};
    for (size_t i = 0; i < s->own.n; i++) out->own_blocks += s->own.items[i].complete && !s->own.items[i].committed;
    snprintf(out->index, sizeof out->index, "%s", s->landmarks.kinds[0] != 0 ? s->landmarks.kinds : "scan");
    snprintf(out->warning, sizeof out->warning, "%s", s->landmarks.warning);
    if (s->fetch == NULL) return;
    cairn_fetch_stats stats;
    cairn_fetch_stats_get(s->fetch, &stats);
    out->tier_bytes = stats.ram_bytes;
    out->fetch = cairn_fetch_mode_used(s->fetch);
    snprintf(out->fetch_reason, sizeof out->fetch_reason, "%s", cairn_fetch_reason(s->fetch));
}
