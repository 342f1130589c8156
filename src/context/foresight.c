/* foresight.c - reading tiles of the next layer before its query is known.
 *
 * The stream of rows changes little from layer to layer, so the next layer's query can be guessed from what goes into
 * the feed-forward layer before it. The tiles the guess would choose fly while that layer is computed. Right or wrong,
 * a guess costs a search, and a wrong one reads tiles for nothing: it pays where a device answers late and has
 * throughput to spare, not on the one of docs/benchmarks.md, so it is off unless asked for. No answer depends on it. */
#include "context_internal.h"

bool cairn_session_foresees(const cairn_session *s, uint32_t layer)
{
    return s->opt.read_ahead && s->fetch != NULL && s->n_ranges != 0 && !s->broken && s->chunk_rows == 1 &&
           layer < s->shape.layers && layer >= s->geometry.first_layer && attn_searches(&s->step, layer);
}

void cairn_session_foresee(cairn_session *s, uint32_t layer, const float *q)
{
    attn_line line = session_line(s);
    attn_chunk chunk = {.layer = layer, .rows = 1, .groups = s->groups, .n_groups = s->n_groups, .q = q};
    size_t found = 0, n = 0;
    if (!cairn_session_foresees(s, layer) || layer != s->next_layer) return;
    uint64_t start = cairn_now_ns();
    if (attn_step_foresee(&s->step, &chunk, &line, &found) != CAIRN_OK || session_reserve_ids(s, found) != CAIRN_OK)
        return; /* a guess less */
    for (size_t i = 0; i < found; i++) {
        const attn_request *wanted = &s->step.requests[i];
        if (own_at(&s->own, wanted->block) != NULL) continue;
        const stored_range *r = session_range_of(s, wanted->block);
        s->ids[n++] = (cairn_tile_id){.segment = r->segment,
                                      .block = r->block + (uint32_t)(wanted->block - r->first),
                                      .layer = (uint16_t)layer,
                                      .head = (uint16_t)wanted->head};
    }
    cairn_fetch_ahead(s->fetch, s->snap, s->ids, n);
    s->step.stats.foresee_ns += cairn_now_ns() - start;
}
