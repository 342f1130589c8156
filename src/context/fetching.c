/* fetching.c - where the tiles of a step come from: own blocks in RAM, own blocks spilled, the store. */
#include "context_internal.h"

enum { SPILL_BATCH = 512 }; /* spilled tiles in one batch */

static size_t batch_max(void *arg)
{
    cairn_session *s = arg;
    size_t most = s->fetch != NULL ? cairn_fetch_batch_max(s->fetch) : SIZE_MAX;
    return s->own.spill_bytes != 0 && most > SPILL_BATCH ? SPILL_BATCH : most;
}

const stored_range *session_range_of(const cairn_session *s, uint64_t block)
{
    size_t lo = 0;
    size_t hi = s->n_ranges;
    while (hi - lo > 1) {
        size_t mid = (lo + hi) / 2;
        if (s->ranges[mid].first <= block)
            lo = mid;
        else
            hi = mid;
    }
    return &s->ranges[lo];
}

cairn_status session_reserve_ids(cairn_session *s, size_t n)
{
    if (n <= s->cap_ids) return CAIRN_OK;
    n += n / 2;
    cairn_free(s->ids);
    cairn_free(s->id_mass);
    cairn_free(s->id_at);
    cairn_free(s->id_token);
    cairn_free(s->direct);
    cairn_free(s->views);
    s->cap_ids = 0;
    s->ids = cairn_alloc_array(n, sizeof *s->ids);
    s->id_mass = cairn_alloc_array(n, sizeof *s->id_mass);
    s->id_at = cairn_alloc_array(n, sizeof *s->id_at);
    s->id_token = cairn_alloc_array(n, sizeof *s->id_token);
    s->direct = cairn_alloc_array(n, sizeof *s->direct);
    s->views = cairn_alloc_array(n, sizeof *s->views);
    if (s->ids == NULL || s->id_mass == NULL || s->id_at == NULL || s->id_token == NULL || s->direct == NULL ||
        s->views == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "a batch of %zu tiles", n);
    s->cap_ids = n;
    return CAIRN_OK;
}

static cairn_status submit(void *arg, uint32_t layer, const attn_request *requests, const float *mass, size_t n)
{
    cairn_session *s = arg;
    const cairn_geometry *g = &s->geometry;
    size_t spilled = 0;
    cairn_status st = session_reserve_ids(s, n);
    if (st != CAIRN_OK) return st;
    s->n_ids = 0;
    s->n_requests = n;
    for (size_t i = 0; i < n; i++) {
        const own_block *b = own_at(&s->own, requests[i].block);
        if (b != NULL && (b->stored_tiles || layer < g->first_layer)) {
            if (b->data != NULL) {
                s->direct[i] =
                    cairn_tile_over(own_tile(&s->own, b, layer, requests[i].head), g->dtype, b->fill, g->head_dim);
                continue;
            }
            if (s->cap_spill < (spilled + 1) * s->own.tile_bytes) { /* grown to a whole batch at the first use */
                cairn_free(s->spill_scratch);
                s->cap_spill = SPILL_BATCH * s->own.tile_bytes;
                if ((s->spill_scratch = cairn_alloc(s->cap_spill)) == NULL) {
                    s->cap_spill = 0;
                    return cairn_fail(CAIRN_NO_MEMORY, "%d spilled tiles", SPILL_BATCH);
                }
            }
            uint8_t *to = s->spill_scratch + spilled++ * s->own.tile_bytes;
            if ((st = own_read_tile(&s->own, b, layer, requests[i].head, to)) != CAIRN_OK) return st;
            s->direct[i] = cairn_tile_over(to, g->dtype, b->fill, g->head_dim);
            continue;
        }
        const stored_range *r = session_range_of(s, requests[i].block);
        s->ids[s->n_ids] = (cairn_tile_id){.segment = r->segment,
                                           .block = r->block + (uint32_t)(requests[i].block - r->first),
                                           .layer = (uint16_t)layer,
                                           .head = (uint16_t)requests[i].head};
        s->id_mass[s->n_ids] = mass[i];
        s->id_token[s->n_ids] = (requests[i].block - s->contexts[r->context].first) * g->block_tokens;
        s->id_at[s->n_ids++] = i;
        s->direct[i].keys = NULL;
    }
    s->step.stats.stored_tiles += s->n_ids;
    return s->n_ids != 0 ? cairn_fetch_submit(s->fetch, s->snap, s->ids, s->id_mass, s->n_ids) : CAIRN_OK;
}

static cairn_status wait(void *arg, cairn_tile *tiles)
{
    cairn_session *s = arg;
    if (s->n_ids != 0) {
        cairn_status st = cairn_fetch_wait(s->fetch, s->views);
        if (st != CAIRN_OK) return st;
    }
    memcpy(tiles, s->direct, s->n_requests * sizeof *tiles);
    for (size_t i = 0; i < s->n_ids; i++) {
        const cairn_tile_view *v = &s->views[i];
        if (v->head_dim != s->geometry.head_dim || v->tokens > s->geometry.block_tokens)
            return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u layer %u head %u: tile of %u x %u",
                              (unsigned long long)v->id.segment, (unsigned)v->id.block, (unsigned)v->id.layer,
                              (unsigned)v->id.head, (unsigned)v->tokens, (unsigned)v->head_dim);
        if (v->first_token !=
            s->id_token[i]) /* LMDB's pages carry no checksum: a flipped page number leads elsewhere */
            return cairn_fail(
                CAIRN_CORRUPT,
                "segment %llu block %u layer %u head %u: the tile begins at token %llu, not %llu; run verify",
                (unsigned long long)v->id.segment, (unsigned)v->id.block, (unsigned)v->id.layer, (unsigned)v->id.head,
                (unsigned long long)v->first_token, (unsigned long long)s->id_token[i]);
        tiles[s->id_at[i]] = (cairn_tile){.dtype = v->dtype,
                                          .tokens = v->tokens,
                                          .head_dim = v->head_dim,
                                          .keys = v->keys,
                                          .values = v->values,
                                          .key_scales = v->key_scales,
                                          .value_scales = v->value_scales};
    }
    return CAIRN_OK;
}

cairn_status session_source(cairn_session *s, attn_source *out)
{
    *out = (attn_source){.arg = s, .batch_max = batch_max, .submit = submit, .wait = wait};
    return CAIRN_OK;
}
