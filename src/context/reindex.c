/* reindex.c - builds the index files of a context's segments from the stored landmark keys.
 *
 * New files get a new generation, the segment record is switched last, the old generation's files go after that: a
 * killed reindex leaves the old index or the new one. Scan kinds need no files; choosing one only records the choice.
 */
#include "context_internal.h"

#include <stdio.h>
#include <unistd.h>

typedef struct builder {
    cairn_store *store;
    const cairn_attention_shape *shape;
    cairn_geometry geometry;
    uint64_t done;
    uint64_t total; /* blocks x heads, once loaded and once built */
    bool (*progress)(void *, uint64_t, uint64_t);
    void *arg;
} builder;

typedef struct rows_job { /* landmark rows of one head out of the records */
    cairn_index *index;
    size_t offset; /* of the head's row in a record's payload */
    cairn_status status;
} rows_job;

static bool take_row(void *arg, uint32_t block, cairn_span payload)
{
    rows_job *job = arg;
    (void)block;
    job->status = cairn_index_add(job->index, 1, (const uint8_t *)payload.data + job->offset);
    return job->status == CAIRN_OK;
}

static bool indexed(const builder *b, uint32_t layer)
{
    return layer >= b->geometry.first_layer && !attn_is_local(b->shape, layer);
}

static cairn_status load_head(const builder *b, cairn_snapshot *snap, const cairn_segment_info *info, uint32_t layer,
                              uint32_t head, const char *kind, cairn_index **out)
{
    const cairn_geometry *g = &b->geometry;
    cairn_dtype dtype = cairn_landmark_dtype(g->dtype);
    cairn_status st = cairn_index_new(kind, g->head_dim, dtype, out);
    if (st != CAIRN_OK) return st;
    rows_job job = {.index = *out,
                    .offset = ((size_t)(layer - g->first_layer) * g->kv_heads + head) * g->head_dim *
                              cairn_dtype_size(dtype)};
    st = cairn_snapshot_landmarks(snap, info->id, 0, info->blocks, take_row, &job);
    return st == CAIRN_OK ? job.status : st;
}

static cairn_status tell(builder *b, uint64_t more)
{
    b->done += more;
    if (b->progress != NULL && !b->progress(b->arg, b->done, b->total))
        return cairn_fail(CAIRN_CANCELLED, "reindex stopped; the index in use is unchanged");
    return CAIRN_OK;
}

/* Deletes the files of one generation; those that are not there do not matter. */
static void remove_generation(const builder *b, uint64_t segment, uint64_t generation)
{
    char base[4096];
    char path[4200];
    if (cairn_store_index_path(b->store, segment, generation, base, sizeof base) != CAIRN_OK) return;
    for (uint32_t l = 0; l < b->geometry.layers; l++)
        for (uint32_t h = 0; h < b->geometry.kv_heads; h++) {
            index_file_name(path, sizeof path, base, l, h);
            unlink(path);
        }
    snprintf(path, sizeof path, "%s.manifest", base);
    unlink(path);
    snprintf(path, sizeof path, "%s.scan", base);
    unlink(path);
}

static cairn_status build_files(builder *b, cairn_snapshot *snap, const cairn_segment_info *info, const char *kind,
                                uint64_t generation, uint64_t *out_hash)
{
    char base[4096];
    char path[4200];
    const cairn_geometry *g = &b->geometry;
    uint32_t n = 0;
    cairn_status st = cairn_store_index_path(b->store, info->id, generation, base, sizeof base);
    uint64_t *hashes = cairn_calloc((size_t)g->layers * g->kv_heads, sizeof *hashes);
    if (hashes == NULL) return cairn_fail(CAIRN_NO_MEMORY, "hashes of %u heads", (unsigned)(g->layers * g->kv_heads));
    for (uint32_t l = 0; l < g->layers && st == CAIRN_OK; l++)
        for (uint32_t h = 0; indexed(b, l) && h < g->kv_heads && st == CAIRN_OK; h++) {
            cairn_index *index = NULL;
            index_file_name(path, sizeof path, base, l, h);
            if ((st = load_head(b, snap, info, l, h, kind, &index)) == CAIRN_OK &&
                (st = cairn_index_seal(index, info->blocks)) == CAIRN_OK &&
                (st = cairn_index_save(index, path, &hashes[n++])) == CAIRN_OK)
                st = tell(b, info->blocks);
            cairn_index_free(index);
        }
    if (st == CAIRN_OK) {
        snprintf(path, sizeof path, "%s.manifest", base);
        st = manifest_write(path, hashes, n, out_hash);
    }
    if (st != CAIRN_OK) remove_generation(b, info->id, generation);
    cairn_free(hashes);
    return st;
}

static cairn_status reindex_segment(builder *b, cairn_snapshot *snap, uint64_t segment, const char *kind)
{
    cairn_segment_info info;
    char made[64];
    char why[160] = "asked for";
    uint64_t hash = 0;
    cairn_status st = cairn_snapshot_segment(snap, segment, &info);
    if (st != CAIRN_OK) return st;
    uint64_t old = info.generation;
    const char *asked = kind != NULL ? kind : info.index_kind;
    bool automatic = *asked == 0 || strcmp(asked, "auto") == 0;
    snprintf(made, sizeof made, "%s", asked);
    if (automatic) { /* one retrieving head speaks for all: they have the same number of rows */
        uint32_t layer = 0;
        cairn_index *rows = NULL;
        while (layer + 1 < b->shape->layers && !indexed(b, layer)) layer++;
        st = load_head(b, snap, &info, layer, 0, "scan", &rows);
        if (st == CAIRN_OK)
            st = cairn_index_calibrate(rows, NULL, 0, b->shape->top_k != 0 ? b->shape->top_k : 1, 2000, made, why);
        cairn_index_free(rows);
        if (st != CAIRN_OK) return st;
    }
    uint64_t generation = old + 1;
    bool files = !cairn_index_is_scan(made);
    if (files && (st = build_files(b, snap, &info, made, generation, &hash)) != CAIRN_OK) return st;
    snprintf(info.index_kind, sizeof info.index_kind, "%s", automatic ? "auto" : asked);
    snprintf(info.index_made, sizeof info.index_made, "%s", made);
    snprintf(info.index_why, sizeof info.index_why, "%s", why);
    info.generation = generation;
    info.index_blocks = files ? info.blocks : 0;
    info.index_hash = hash;
    if (!files) scans_carry(b->store, segment, old, generation);
    st = cairn_store_set_index(b->store, &info);
    remove_generation(b, segment, st == CAIRN_OK ? old : generation);
    return st;
}

cairn_status cairn_context_reindex(cairn_store *store, const cairn_attention_shape *shape, const char *context,
                                   const char *kind, bool (*progress)(void *, uint64_t, uint64_t), void *arg)
{
    cairn_snapshot *snap = NULL;
    cairn_range *ranges = NULL;
    cairn_context_info info;
    size_t n = 0;
    builder b = {
        .store = store, .shape = shape, .geometry = *cairn_store_geometry(store), .progress = progress, .arg = arg};
    cairn_status st = cairn_attention_shape_check(shape);
    if (st == CAIRN_OK && (b.geometry.layers != shape->layers || b.geometry.kv_heads != shape->kv_heads ||
                           b.geometry.head_dim != shape->head_dim))
        st = cairn_fail(CAIRN_MISMATCH, "store %s does not have the model's %u layers, %u KV heads of %u",
                        cairn_store_path(store), (unsigned)shape->layers, (unsigned)shape->kv_heads,
                        (unsigned)shape->head_dim);
    if (st == CAIRN_OK && kind != NULL && *kind != 0 &&
        strcmp(kind, "auto") != 0) { /* a bad kind is refused before any work */
        cairn_index *probe = NULL;
        st = cairn_index_new(kind, b.geometry.head_dim, cairn_landmark_dtype(b.geometry.dtype), &probe);
        cairn_index_free(probe);
    }
    if (st == CAIRN_OK) st = cairn_snapshot_begin(store, &snap);
    if (st == CAIRN_OK) {
        st = cairn_snapshot_context(snap, context, &info);
        if (st == CAIRN_NOT_FOUND) st = cairn_fail(st, "no context '%s' in store %s", context, cairn_store_path(store));
    }
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, NULL, 0, &n);
    if (st == CAIRN_OK && (ranges = cairn_alloc_array(n, sizeof *ranges)) == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "%zu segment ranges", n);
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, ranges, n, &n);
    uint32_t heads = 0;
    for (uint32_t l = 0; l < shape->layers; l++) heads += indexed(&b, l) ? shape->kv_heads : 0;
    for (size_t i = 0; st == CAIRN_OK && i < n; i++) b.total += (uint64_t)ranges[i].count * heads;
    for (size_t i = 0; st == CAIRN_OK && i < n; i++) {
        bool seen = false; /* a context may name a segment twice */
        for (size_t j = 0; j < i; j++) seen = seen || ranges[j].segment == ranges[i].segment;
        if (!seen) st = reindex_segment(&b, snap, ranges[i].segment, kind);
    }
    cairn_free(ranges);
    cairn_snapshot_end(snap);
    return st;
}
