/* landmarks.c - the landmark rows of stored blocks, loaded into one index per (layer, KV head).
 *
 * Ranges whose segment has files of a FAISS kind become parts of their own; all others, small documents above all,
 * share pooled scan matrices, so that a corpus of thousands of documents is still one search. The rows come from the
 * store's landmark records, which are the truth; an index file is only ever a faster way to search them: missing, stale
 * or damaged files are noticed, named in `warning`, and the rows are scanned instead. */
#include "context_internal.h"

#include <stdio.h>

enum { BATCH = 256, DIM_MAX = 1024 }; /* BATCH: blocks turned from (layer, head, D) records to rows at a time */

static bool retrieves(const landmark_set *set, uint32_t layer)
{
    return set->shape->scheme != CAIRN_POSITION_DENSE && layer >= set->geometry.first_layer &&
           !attn_is_local(set->shape, layer);
}

cairn_status landmarks_init(landmark_set *set, const cairn_attention_shape *shape, const cairn_geometry *geometry,
                            cairn_pool *pool)
{
    *set = (landmark_set){.shape = shape, .geometry = *geometry, .pool = pool};
    set->recent = cairn_calloc(shape->layers, sizeof *set->recent);
    if (set->recent == NULL) return cairn_fail(CAIRN_NO_MEMORY, "landmarks of %u layers", (unsigned)shape->layers);
    for (uint32_t l = 0; l < shape->layers; l++)
        if (!retrieves(set, l) && shape->scheme != CAIRN_POSITION_DENSE) {
            cairn_status st = recent_reserve(&set->recent[l], geometry, shape->local_window_blocks + 2u);
            if (st != CAIRN_OK) return st;
        }
    return CAIRN_OK;
}

static void part_wipe(landmark_set *set, attn_part *part)
{
    cairn_index **index = (cairn_index **)(uintptr_t)part->index;
    for (size_t i = 0; index != NULL && i < n_heads(set); i++) cairn_index_free(index[i]);
    cairn_free(index);
    *part = (attn_part){0};
}

void landmarks_wipe(landmark_set *set)
{
    for (size_t p = 0; p < set->n_parts; p++) part_wipe(set, &set->parts[p]);
    cairn_free(set->parts);
    cairn_free(set->pooled);
    for (uint32_t l = 0; set->recent != NULL && l < set->shape->layers; l++) cairn_free(set->recent[l].rows);
    cairn_free(set->recent);
    *set = (landmark_set){0};
}

cairn_status recent_reserve(attn_recent *recent, const cairn_geometry *geometry, uint64_t capacity)
{
    if (recent->rows != NULL && capacity <= recent->capacity) return CAIRN_OK;
    size_t block = (size_t)geometry->kv_heads * geometry->head_dim;
    float *rows = cairn_alloc_array((size_t)capacity, block * sizeof *rows);
    if (rows == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%llu recent landmarks", (unsigned long long)capacity);
    uint64_t first = recent->end > recent->capacity ? recent->end - recent->capacity : 0;
    for (uint64_t b = first; b < recent->end; b++)
        memcpy(rows + (size_t)(b % capacity) * block, recent->rows + (size_t)(b % recent->capacity) * block,
               block * sizeof *rows);
    cairn_free(recent->rows);
    recent->rows = rows;
    recent->capacity = capacity;
    return CAIRN_OK;
}

void recent_put(attn_recent *recent, const cairn_geometry *geometry, uint64_t block, uint32_t head, const float *row)
{
    size_t slot = (size_t)(block % recent->capacity) * geometry->kv_heads + head;
    memcpy(recent->rows + slot * geometry->head_dim, row, geometry->head_dim * sizeof *row);
}

typedef struct recent_loader {
    landmark_set *set;
    uint64_t block; /* logical */
} recent_loader;

static bool take_recent(void *arg, uint32_t block, cairn_span payload)
{
    recent_loader *load = arg;
    landmark_set *set = load->set;
    const cairn_geometry *g = &set->geometry;
    cairn_dtype dtype = cairn_landmark_dtype(g->dtype);
    size_t row_bytes = g->head_dim * cairn_dtype_size(dtype);
    float row[DIM_MAX];
    (void)block;
    for (size_t i = 0; i < (size_t)(g->layers - g->first_layer) * g->kv_heads; i++) {
        attn_recent *recent = &set->recent[g->first_layer + i / g->kv_heads];
        if (recent->rows == NULL) continue;
        cairn_kernels_best()->widen(row, (const uint8_t *)payload.data + i * row_bytes, dtype, g->head_dim);
        recent_put(recent, g, load->block, (uint32_t)(i % g->kv_heads), row);
        if (recent->end <= load->block) recent->end = load->block + 1;
    }
    return true;
}

/* Local layers gate their window by landmarks too: the rows of the line's last blocks. */
cairn_status landmarks_load_recent(landmark_set *set, cairn_snapshot *snap, const stored_range *ranges, size_t n)
{
    cairn_status st = CAIRN_OK;
    uint64_t end = n != 0 ? ranges[n - 1].first + ranges[n - 1].count : 0;
    uint64_t lo = end > set->shape->local_window_blocks ? end - set->shape->local_window_blocks : 0;
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        const stored_range *r = &ranges[i];
        uint64_t from = r->first > lo ? r->first : lo;
        for (uint64_t b = from; b < r->first + r->count && st == CAIRN_OK; b++) {
            recent_loader load = {set, b};
            st = cairn_snapshot_landmarks(snap, r->segment, r->block + (uint32_t)(b - r->first), 1, take_recent, &load);
        }
    }
    return st;
}

static cairn_status part_push(landmark_set *set, uint64_t first, uint32_t row0, const char *kind, bool pooled)
{
    cairn_status st = CAIRN_OK;
    if (set->n_parts == set->cap_parts) {
        size_t cap = set->cap_parts != 0 ? 2 * set->cap_parts : 4;
        attn_part *parts = cairn_grow(set->parts, set->n_parts * sizeof *parts, cap, sizeof *parts);
        if (parts == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu index parts", cap);
        set->parts = parts;
        bool *flags = cairn_grow(set->pooled, set->n_parts * sizeof *flags, cap, sizeof *flags);
        if (flags == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu index parts", cap);
        set->pooled = flags;
        set->cap_parts = cap;
    }
    cairn_index **index = cairn_calloc(n_heads(set), sizeof *index);
    if (index == NULL) return cairn_fail(CAIRN_NO_MEMORY, "indexes of %zu heads", n_heads(set));
    set->parts[set->n_parts] = (attn_part){.first = first, .row0 = row0, .index = index};
    set->pooled[set->n_parts++] = pooled;
    for (uint32_t l = 0; l < set->shape->layers && st == CAIRN_OK; l++)
        for (uint32_t h = 0; retrieves(set, l) && h < set->shape->kv_heads && st == CAIRN_OK; h++)
            st = cairn_index_new(kind, set->geometry.head_dim, cairn_landmark_dtype(set->geometry.dtype),
                                 &index[(size_t)l * set->shape->kv_heads + h]);
    return st;
}

cairn_status landmarks_open_tail(landmark_set *set, uint64_t first, const char *kind)
{
    if (set->n_parts != 0 && set->pooled[set->n_parts - 1]) return CAIRN_OK;
    return part_push(set, first, 0, kind != NULL && cairn_index_is_scan(kind) && *kind != 0 ? kind : "scan", true);
}

/* ---- turning records into rows ---- */

typedef struct loader {
    landmark_set *set;
    attn_part *part; /* rows go here */
    bool mass;       /* will be asked for */
    uint32_t n;      /* records waiting */
    size_t heads;    /* stored layers x kv_heads */
    size_t row_bytes;
    uint8_t *rows;           /* (heads, BATCH, D) landmark dtype */
    cairn_status *status_of; /* (heads) */
    cairn_status status;
} loader;

static void add_rows(void *arg, size_t head, size_t worker)
{
    loader *load = arg;
    const cairn_geometry *g = &load->set->geometry;
    cairn_index *index = load->part->index[(size_t)g->first_layer * g->kv_heads + head];
    (void)worker;
    load->status_of[head] =
        index != NULL ? cairn_index_add(index, load->n, load->rows + head * BATCH * load->row_bytes) : CAIRN_OK;
}

/* Images cost more than the records they are made from: a head is a worker's. Of small documents it is not worth waking
 * one (20 us; a row takes 0.2). */
static cairn_status flush_rows(loader *load)
{
    cairn_pool_run(load->n == BATCH ? load->set->pool : NULL, load->heads, add_rows, load);
    for (size_t i = 0; i < load->heads; i++)
        if (load->status_of[i] != CAIRN_OK)
            return cairn_fail(load->status_of[i], "%u landmark rows for the index of head %zu", (unsigned)load->n, i);
    load->n = 0;
    return CAIRN_OK;
}

static bool take_record(void *arg, uint32_t block, cairn_span payload)
{
    loader *load = arg;
    const uint8_t *from = payload.data;
    (void)block;
    for (size_t i = 0; i < load->heads; i++)
        memcpy(load->rows + (i * BATCH + load->n) * load->row_bytes, from + i * load->row_bytes, load->row_bytes);
    if (++load->n == BATCH) load->status = flush_rows(load);
    return load->status == CAIRN_OK;
}

/* ---- index files ---- */

void index_file_name(char *out, size_t cap, const char *base, uint32_t layer, uint32_t head)
{
    snprintf(out, cap, "%s-l%u-h%u.faiss", base, (unsigned)layer, (unsigned)head);
}

/* Gives a part whose rows are loaded its sealed indexes from the segment's files. Trouble is a warning, not a failure.
 */
static void load_files(landmark_set *set, attn_part *part, cairn_store *store, const cairn_segment_info *info)
{
    char base[4096];
    char path[4200];
    const cairn_geometry *g = &set->geometry;
    uint32_t files = 0;
    uint32_t n = 0;
    for (uint32_t l = 0; l < g->layers; l++) n += retrieves(set, l) ? g->kv_heads : 0;
    uint64_t *hashes = cairn_calloc(n != 0 ? n : 1, sizeof *hashes);
    cairn_status st = hashes != NULL ? CAIRN_OK : cairn_fail(CAIRN_NO_MEMORY, "hashes of %u index files", (unsigned)n);
    if (st == CAIRN_OK) st = cairn_store_index_path(store, info->id, info->generation, base, sizeof base);
    if (st == CAIRN_OK) {
        snprintf(path, sizeof path, "%s.manifest", base);
        st = manifest_read(path, info->index_hash, n, hashes);
    }
    for (uint32_t l = 0; l < g->layers && st == CAIRN_OK; l++)
        for (uint32_t h = 0; retrieves(set, l) && h < g->kv_heads && st == CAIRN_OK; h++) {
            index_file_name(path, sizeof path, base, l, h);
            st = cairn_index_load(part->index[(size_t)l * g->kv_heads + h], path, hashes[files++], info->index_blocks,
                                  true);
        }
    cairn_free(hashes);
    if (st != CAIRN_OK)
        snprintf(set->warning, sizeof set->warning,
                 "index of segment %llu is not usable (%.120s); its landmarks are scanned, 'cairn reindex' rebuilds it",
                 (unsigned long long)info->id, cairn_last_error());
}

/* Kind of the last part; "" if no layer retrieves. */
static const char *last_kind(const landmark_set *set)
{
    const attn_part *part = &set->parts[set->n_parts - 1];
    for (size_t i = 0; i < n_heads(set); i++)
        if (part->index[i] != NULL) return cairn_index_kind(part->index[i]);
    return "";
}

/* The rows of a new last part from the segment's file of scans: the first `*taken`. A file that is not right is left
 * alone. */
static cairn_status take_scans(landmark_set *set, const loader *load, cairn_store *store,
                               const cairn_segment_info *info, uint32_t count, uint32_t *taken)
{
    attn_part *part = &set->parts[set->n_parts - 1];
    cairn_status st = scans_take(set, part, store, info, count, load->mass, taken);
    if (st == CAIRN_OK) return CAIRN_OK;
    snprintf(set->warning, sizeof set->warning,
             "the index file of segment %llu is not usable (%.120s); opening takes longer, and what it had learnt is "
             "learnt again",
             (unsigned long long)info->id, cairn_last_error());
    for (size_t i = 0; i < n_heads(set); i++) {
        cairn_index **index = (cairn_index **)(uintptr_t)&part->index[i];
        if (*index == NULL) continue;
        cairn_index_free(*index);
        st = cairn_index_new("scan", set->geometry.head_dim, cairn_landmark_dtype(set->geometry.dtype), index);
        if (st != CAIRN_OK) return st;
    }
    return CAIRN_OK;
}

static cairn_status load_range(landmark_set *set, loader *load, cairn_store *store, cairn_snapshot *snap,
                               const stored_range *range, const char *kind)
{
    cairn_segment_info info;
    cairn_status st = cairn_snapshot_segment(snap, range->segment, &info);
    if (st != CAIRN_OK) return st;
    bool files = kind == NULL && info.generation != 0 && !cairn_index_is_scan(info.index_made);
    bool asked = kind != NULL && !cairn_index_is_scan(kind);
    bool made =
        kind == NULL && info.generation != 0 && *info.index_made != 0; /* "exact" has no files, yet is a choice */
    const char *use = made ? info.index_made : kind != NULL && *kind != 0 ? kind : "scan";
    uint32_t first = range->block;
    uint32_t count = (uint32_t)range->count, taken = 0;
    if (files || asked) { /* the sealed part counts rows from the segment's start */
        first = 0;
        count = range->block + (uint32_t)range->count;
        if (files && info.index_blocks > count) count = info.index_blocks;
        if ((st = part_push(set, range->first, range->block, use, false)) != CAIRN_OK) return st;
    } else {
        const bool kept = first == 0 && strcmp(use, "scan") == 0 && scans_kept(store, &info);
        if (kept || set->n_parts == 0 || !set->pooled[set->n_parts - 1] || strcmp(last_kind(set), use) != 0)
            st = part_push(set, range->first, 0, use, true);
        if (st == CAIRN_OK && kept) st = take_scans(set, load, store, &info, count, &taken);
        if (st != CAIRN_OK) return st;
    }
    load->part = &set->parts[set->n_parts - 1];
    if (taken < count)
        st = cairn_snapshot_landmarks(snap, range->segment, first + taken, count - taken, take_record, load);
    if (st == CAIRN_OK) st = load->status;
    if (st == CAIRN_OK && load->n != 0) st = flush_rows(load);
    if (st != CAIRN_OK) return st;
    load->part->count += range->count;
    if (files) load_files(set, load->part, store, &info);
    for (size_t i = 0; asked && st == CAIRN_OK && i < n_heads(set); i++)
        if (load->part->index[i] != NULL)
            st = cairn_index_seal(load->part->index[i], cairn_index_count(load->part->index[i]));
    if (strstr(set->kinds, use) == NULL) {
        size_t used = strlen(set->kinds);
        snprintf(set->kinds + used, sizeof set->kinds - used, "%s%s", used != 0 ? "," : "", use);
    }
    return st;
}

cairn_status landmarks_load(landmark_set *set, cairn_store *store, cairn_snapshot *snap, const stored_range *ranges,
                            size_t n, const char *kind, bool mass)
{
    const cairn_geometry *g = &set->geometry;
    loader load = {.set = set,
                   .mass = mass,
                   .heads = (size_t)(g->layers - g->first_layer) * g->kv_heads,
                   .row_bytes = g->head_dim * cairn_dtype_size(cairn_landmark_dtype(g->dtype)),
                   .status = CAIRN_OK};
    if (n == 0 || load.heads == 0) return CAIRN_OK;
    load.rows = cairn_alloc_array(load.heads * BATCH, load.row_bytes);
    load.status_of = cairn_calloc(load.heads, sizeof *load.status_of);
    cairn_status st = load.rows != NULL && load.status_of != NULL
                          ? CAIRN_OK
                          : cairn_fail(CAIRN_NO_MEMORY, "landmark rows of %d blocks", BATCH);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) st = load_range(set, &load, store, snap, &ranges[i], kind);
    cairn_free(load.rows);
    cairn_free(load.status_of);
    return st;
}

static void weigh_head(void *arg, size_t head, size_t worker)
{
    const attn_part *part = arg;
    (void)worker;
    if (part->index[head] != NULL) (void)cairn_index_images(part->index[head], true); /* no memory: slower */
}

void landmarks_weigh(landmark_set *set)
{
    for (size_t p = 0; p < set->n_parts; p++) cairn_pool_run(set->pool, n_heads(set), weigh_head, &set->parts[p]);
}

void landmarks_unlearn(landmark_set *set)
{
    for (size_t p = 0; p < set->n_parts; p++)
        for (size_t i = 0; i < n_heads(set); i++)
            if (set->parts[p].index[i] != NULL) cairn_index_unlearn(set->parts[p].index[i]);
}

size_t landmarks_bytes(const landmark_set *set)
{
    size_t bytes = 0;
    for (size_t p = 0; p < set->n_parts; p++)
        for (size_t i = 0; i < n_heads(set); i++)
            if (set->parts[p].index[i] != NULL) bytes += cairn_index_bytes(set->parts[p].index[i]);
    for (uint32_t l = 0; l < set->shape->layers; l++)
        if (set->recent[l].rows != NULL)
            bytes += (size_t)set->recent[l].capacity * set->geometry.kv_heads * set->geometry.head_dim * sizeof(float);
    return bytes;
}
