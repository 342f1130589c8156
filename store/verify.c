/* verify.c - every record of a store against its hash and against the others.
 *
 * Nothing goes through LMDB's own reading: pages.c walks its trees with every length checked, so damage anywhere is a
 * sentence and not a crash, a bad sector is a sentence and not a signal, and what lies beside the damage is still
 * looked at. A read transaction keeps the pages from reuse meanwhile.
 *
 * Order: meta, segments, contexts (counting references), names; then tokens, landmarks and tiles, each in key order
 * against the records that the segments say must be there; then the free list, which must not hold a page in use. */
#include "pages.h"
#include "store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

typedef struct segment_entry {
    uint64_t id;
    uint64_t owner;
    uint32_t blocks;
    uint32_t references; /* recorded */
    uint64_t counted;
    segment_state state;
} segment_entry;

typedef struct context_entry {
    uint64_t id;
    uint64_t name_hash;
    uint64_t own_segment;
    bool named;
} context_entry;

typedef struct verification {
    cairn_store *store;
    const cairn_geometry *geometry;
    page_file file;
    page_tree trees[DB_COUNT];
    bool deep;
    void (*damage)(void *, const char *);
    bool (*progress)(void *, uint64_t, uint64_t);
    void *arg;
    cairn_verify_report *report;
    char first[600];      /* first sentence */
    cairn_status failure; /* what ends it early: no memory, cancelled */
    uint64_t done, total, next_progress;

    uint8_t *buffer; /* of a large value */
    size_t buffer_bytes;
    segment_entry *segments; /* by id */
    size_t segments_n, segments_room;
    context_entry *contexts; /* by id */
    size_t contexts_n, contexts_room;
    uint64_t next_context, next_segment; /* the counters; 0 = unreadable */

    store_db db;             /* of the walk that runs */
    size_t at;               /* segment whose records come next, */
    uint64_t ordinal;        /* and which of them: see block_record */
    cairn_tile_id last_tile; /* that was looked at, of this segment, */
    uint64_t last_first;     /* and where it begins */
} verification;

static void report(verification *v, uint64_t records, const char *sentence)
{
    if (v->report->damaged == 0) snprintf(v->first, sizeof v->first, "%s", sentence);
    v->report->damaged += records;
    if (v->damage != NULL) v->damage(v->arg, sentence);
}

static void CAIRN_PRINTF(2, 3) damaged(verification *v, const char *format, ...)
{
    char sentence[600];
    va_list ap;
    va_start(ap, format);
    vsnprintf(sentence, sizeof sentence, format, ap);
    va_end(ap);
    report(v, 1, sentence);
}

static void page_damaged(void *arg, const char *sentence)
{
    report(arg, 1, sentence);
}

/* False ends the walk. */
static bool step(verification *v, uint64_t bytes)
{
    v->done += bytes;
    if (v->progress == NULL || v->done < v->next_progress) return true;
    v->next_progress = v->done + (UINT64_C(4) << 20);
    if (v->progress(v->arg, v->done < v->total ? v->done : v->total, v->total)) return true;
    v->failure = cairn_fail(CAIRN_CANCELLED, "%s: verify was stopped", v->store->env->path);
    return false;
}

/* The first `bytes` of a value, wherever it is. NULL: damage was reported, or memory is out (failure). */
static const uint8_t *fetch_value(verification *v, const page_value *value, size_t bytes)
{
    v->report->bytes += bytes;
    if (value->data != NULL) return value->data;
    if (bytes > v->buffer_bytes) {
        cairn_free(v->buffer);
        v->buffer_bytes = 0;
        if ((v->buffer = cairn_alloc(bytes)) == NULL) {
            v->failure = cairn_fail(CAIRN_NO_MEMORY, "verify: a record of %zu bytes", bytes);
            return NULL;
        }
        v->buffer_bytes = bytes;
    }
    bool fixed = v->db == DB_TOKENS || v->db == DB_LANDMARK || v->db == DB_TILE;
    if (page_read_large(&v->file, store_db_names[v->db], value, fixed, v->buffer, bytes) == CAIRN_OK) return v->buffer;
    report(v, 1, cairn_last_error());
    return NULL;
}

static void *grow(verification *v, void *block, size_t n, size_t *room, size_t size)
{
    if (n < *room) return block;
    size_t more = *room != 0 ? *room * 2 : 64;
    void *bigger = cairn_grow(block, n * size, more, size);
    if (bigger != NULL)
        *room = more;
    else
        v->failure = cairn_fail(CAIRN_NO_MEMORY, "verify: %zu records", more);
    return bigger;
}

/* Position of an id in an array of entries that begin with it; n if it is not there. */
static size_t find_entry(const void *entries, size_t n, size_t size, uint64_t id)
{
    size_t lo = 0, hi = n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        uint64_t here;
        memcpy(&here, (const uint8_t *)entries + mid * size, sizeof here);
        if (here == id) return mid;
        if (here < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return n;
}

static segment_entry *find_segment(verification *v, uint64_t id)
{
    size_t i = find_entry(v->segments, v->segments_n, sizeof *v->segments, id);
    return i < v->segments_n ? &v->segments[i] : NULL;
}

static context_entry *find_context(verification *v, uint64_t id)
{
    size_t i = find_entry(v->contexts, v->contexts_n, sizeof *v->contexts, id);
    return i < v->contexts_n ? &v->contexts[i] : NULL;
}

/* ---- the small databases ---- */

static bool meta_record(void *arg, cairn_span key, const page_value *value)
{
    verification *v = arg;
    const uint8_t *bytes = fetch_value(v, value, value->bytes);
    if (bytes == NULL) return v->failure == CAIRN_OK;
    cairn_span span = {bytes, value->bytes};
    if (key.bytes == 5 && memcmp(key.data, "store", 5) == 0) {
        store_identity identity;
        if (store_identity_decode(span, &identity) != CAIRN_OK) report(v, 1, cairn_last_error());
    } else if (key.bytes == 3 && memcmp(key.data, "ids", 3) == 0) {
        if (store_ids_decode(span, &v->next_context, &v->next_segment) != CAIRN_OK) report(v, 1, cairn_last_error());
    } else {
        damaged(v, "meta record '%.*s': unknown", (int)key.bytes, (const char *)key.data);
    }
    return step(v, value->bytes);
}

static bool segment_each(void *arg, cairn_span key, const page_value *value)
{
    verification *v = arg;
    segment_record record;
    v->report->segments++;
    if (key.bytes != KEY_ID_BYTES) {
        damaged(v, "a segment has a key of %zu bytes, expected %d", key.bytes, KEY_ID_BYTES);
        return true;
    }
    uint64_t id = cairn_get_be64(key.data);
    const uint8_t *bytes = fetch_value(v, value, value->bytes);
    if (bytes == NULL) return v->failure == CAIRN_OK;
    if (store_segment_decode(id, (cairn_span){bytes, value->bytes}, &record) != CAIRN_OK) {
        report(v, 1, cairn_last_error());
        return true;
    }
    if (v->next_segment != 0 && id >= v->next_segment)
        damaged(v, "segment %llu: the next new one would be %llu", (unsigned long long)id,
                (unsigned long long)v->next_segment);
    segment_entry *entries = grow(v, v->segments, v->segments_n, &v->segments_room, sizeof *entries);
    if (entries == NULL) return false;
    v->segments = entries;
    v->segments[v->segments_n++] = (segment_entry){.id = id,
                                                   .owner = record.owner,
                                                   .blocks = record.info.blocks,
                                                   .references = record.info.references,
                                                   .state = record.state};
    return step(v, value->bytes);
}

static void check_ranges(verification *v, const context_record *record)
{
    unsigned long long id = record->id;
    for (uint32_t i = 0; i < record->range_count; i++) {
        cairn_range r = store_context_range(record, i);
        segment_entry *s = find_segment(v, r.segment);
        if (s == NULL) {
            damaged(v, "context %llu ('%s') range %u: segment %llu is missing", id, record->name, i,
                    (unsigned long long)r.segment);
            continue;
        }
        s->counted++;
        if (r.first + r.count > s->blocks) /* checked not to wrap when it was decoded */
            damaged(v, "context %llu ('%s') range %u: blocks %u to %u of segment %llu, which has %u", id, record->name,
                    i, r.first, r.first + r.count - 1, (unsigned long long)r.segment, s->blocks);
    }
}

static bool context_each(void *arg, cairn_span key, const page_value *value)
{
    verification *v = arg;
    context_record record;
    v->report->contexts++;
    if (key.bytes != KEY_ID_BYTES) {
        damaged(v, "a context has a key of %zu bytes, expected %d", key.bytes, KEY_ID_BYTES);
        return true;
    }
    uint64_t id = cairn_get_be64(key.data);
    const uint8_t *bytes = fetch_value(v, value, value->bytes);
    if (bytes == NULL) return v->failure == CAIRN_OK;
    if (store_context_decode(v->geometry, id, (cairn_span){bytes, value->bytes}, &record) != CAIRN_OK) {
        report(v, 1, cairn_last_error());
        return true;
    }
    if (v->next_context != 0 && id >= v->next_context)
        damaged(v, "context %llu ('%s'): the next new one would be %llu", (unsigned long long)id, record.name,
                (unsigned long long)v->next_context);
    check_ranges(v, &record);
    context_entry *entries = grow(v, v->contexts, v->contexts_n, &v->contexts_room, sizeof *entries);
    if (entries == NULL) return false;
    v->contexts = entries;
    v->contexts[v->contexts_n++] = (context_entry){
        .id = id, .name_hash = cairn_hash64(record.name, strlen(record.name)), .own_segment = record.own_segment};
    return step(v, value->bytes);
}

static bool name_each(void *arg, cairn_span key, const page_value *value)
{
    verification *v = arg;
    char name[CAIRN_NAME_MAX + 1] = "";
    size_t n = key.bytes < CAIRN_NAME_MAX ? key.bytes : CAIRN_NAME_MAX;
    memcpy(name, key.data, n);
    if (key.bytes > CAIRN_NAME_MAX || strlen(name) != n || store_name_check(name) != CAIRN_OK) {
        damaged(v, "a name of %zu bytes is not one", key.bytes);
        return true;
    }
    const uint8_t *bytes = fetch_value(v, value, value->bytes);
    if (bytes == NULL) return v->failure == CAIRN_OK;
    if (value->bytes != 8) {
        damaged(v, "name '%s': %u bytes, expected 8", name, value->bytes);
        return true;
    }
    uint64_t id = cairn_get_le64(bytes);
    context_entry *context = find_context(v, id);
    if (context == NULL)
        damaged(v, "name '%s': its context %llu is missing", name, (unsigned long long)id);
    else if (context->name_hash != cairn_hash64(name, n))
        damaged(v, "name '%s': its context %llu has another name", name, (unsigned long long)id);
    else
        context->named = true;
    return step(v, value->bytes);
}

static void check_references(verification *v)
{
    for (size_t i = 0; i < v->segments_n; i++) {
        const segment_entry *s = &v->segments[i];
        unsigned long long id = s->id;
        if (s->counted != s->references)
            damaged(v, "segment %llu: %u references recorded, %llu ranges name it", id, s->references,
                    (unsigned long long)s->counted);
        if (s->state != SEGMENT_OPEN) continue;
        const context_entry *owner = find_context(v, s->owner);
        if (owner == NULL || owner->own_segment != s->id)
            damaged(v, "segment %llu: context %llu, which may extend it, %s", id, (unsigned long long)s->owner,
                    owner == NULL ? "is missing" : "does not know");
    }
    for (size_t i = 0; i < v->contexts_n; i++) {
        const context_entry *c = &v->contexts[i];
        unsigned long long id = c->id;
        if (!c->named) damaged(v, "context %llu: no name leads to it", id);
        const segment_entry *own = c->own_segment != 0 ? find_segment(v, c->own_segment) : NULL;
        if (c->own_segment != 0 && (own == NULL || own->state != SEGMENT_OPEN || own->owner != c->id))
            damaged(v, "context %llu: its own segment %llu %s", id, (unsigned long long)c->own_segment,
                    own == NULL ? "is missing" : "is not its own");
    }
}

/* ---- tokens, landmarks, tiles ----
 *
 * Records of a segment are numbered as their keys are ordered: tokens and landmarks by block, tiles by (block, layer,
 * head). The walk meets them in that order; `at` and `ordinal` say which must come next. */

static uint64_t per_block(const verification *v)
{
    const cairn_geometry *g = v->geometry;
    return v->db == DB_TILE ? (uint64_t)(g->layers - g->first_layer) * g->kv_heads : 1;
}

static void name_record(const verification *v, uint64_t segment, uint64_t ordinal, char out[120])
{
    const cairn_geometry *g = v->geometry;
    uint64_t block = ordinal / per_block(v), tile = ordinal % per_block(v);
    if (v->db == DB_TILE)
        snprintf(out, 120, "segment %llu block %llu layer %u head %u", (unsigned long long)segment,
                 (unsigned long long)block, g->first_layer + (uint32_t)(tile / g->kv_heads),
                 (uint32_t)(tile % g->kv_heads));
    else
        snprintf(out, 120, "segment %llu block %llu %s", (unsigned long long)segment, (unsigned long long)block,
                 store_db_names[v->db]);
}

/* Records [v->ordinal, upto) of the segment at v->at did not come. One that is being freed may lack any. */
static void missing(verification *v, uint64_t upto)
{
    const segment_entry *s = &v->segments[v->at];
    char from[120], to[120], sentence[400];
    uint64_t n = upto - v->ordinal;
    if (n == 0 || s->state == SEGMENT_DYING) return;
    name_record(v, s->id, v->ordinal, from);
    name_record(v, s->id, upto - 1, to);
    if (n == 1)
        snprintf(sentence, sizeof sentence, "%s: missing", from);
    else
        snprintf(sentence, sizeof sentence, "%s to %s: %llu records are missing", from, to, (unsigned long long)n);
    report(v, n, sentence);
}

/* Everything up to segment `id` that has not come is missing. */
static void pass_segments(verification *v, uint64_t id)
{
    while (v->at < v->segments_n && v->segments[v->at].id < id) {
        missing(v, v->segments[v->at].blocks * per_block(v));
        v->at++;
        v->ordinal = 0;
    }
}

static bool tile_size_is_possible(const verification *v, uint32_t bytes)
{
    const cairn_geometry *g = v->geometry;
    for (int dtype = CAIRN_F32; dtype <= CAIRN_Q8; dtype++)
        if (bytes == store_tile_bytes(v->file.page_bytes, (cairn_dtype)dtype, g->block_tokens, g->head_dim))
            return true;
    return false;
}

/* Tiles of a block begin at the same token, those of a later one later: LMDB's pages carry no checksum, and a wrong
 * page number may lead to another tile of the same layer and head. */
static void check_place(verification *v, cairn_tile_id id, uint64_t first)
{
    const cairn_tile_id last = v->last_tile;
    const bool known = last.segment == id.segment; /* ids begin at 1 */
    if (first % v->geometry->block_tokens != 0 || (known && id.block == last.block && first != v->last_first) ||
        (known && id.block > last.block && first < v->last_first + v->geometry->block_tokens))
        damaged(v, "segment %llu block %u layer %u head %u: begins at token %llu, after block %u's %llu",
                (unsigned long long)id.segment, id.block, id.layer, id.head, (unsigned long long)first, last.block,
                (unsigned long long)v->last_first);
    v->last_tile = id;
    v->last_first = first;
}

static void check_tile(verification *v, cairn_tile_id id, uint64_t ordinal, const page_value *value)
{
    v->report->tiles++;
    if (!tile_size_is_possible(v, value->bytes)) {
        damaged(v, "segment %llu block %u layer %u head %u: a record of %u bytes cannot be a tile",
                (unsigned long long)id.segment, id.block, id.layer, id.head, value->bytes);
        return;
    }
    /* Reading all headers would read half the store in the slowest way, page by page; so one a block, another one each
     * block, stands for them unless everything is read anyhow. */
    if (!v->deep && ordinal % per_block(v) != id.block % per_block(v)) return;
    size_t bytes = v->deep ? value->bytes : TILE_HEADER_BYTES;
    const uint8_t *record = fetch_value(v, value, bytes);
    if (record == NULL) return;
    if (store_tile_parse(v->geometry, v->file.page_bytes, id, record, bytes, value->bytes, v->deep, NULL) != CAIRN_OK)
        report(v, 1, cairn_last_error());
    else
        check_place(v, id, store_tile_first_token(record));
}

static void check_block(verification *v, uint64_t segment, uint32_t block, const page_value *value)
{
    bool tokens = v->db == DB_TOKENS;
    size_t expected = tokens ? store_tokens_bytes(v->geometry) : store_landmark_bytes(v->geometry);
    if (tokens) v->report->blocks++;
    if (value->bytes != expected) {
        damaged(v, "segment %llu block %u %s: %u bytes, expected %zu", (unsigned long long)segment, block,
                store_db_names[v->db], value->bytes, expected);
        return;
    }
    const uint8_t *record = fetch_value(v, value, value->bytes);
    if (record == NULL) return;
    cairn_span span = {record, value->bytes};
    cairn_status status = tokens ? store_tokens_check(v->geometry, segment, block, span, NULL)
                                 : store_landmark_check(v->geometry, segment, block, span, NULL);
    if (status != CAIRN_OK) report(v, 1, cairn_last_error());
}

static bool block_record(void *arg, cairn_span key, const page_value *value)
{
    verification *v = arg;
    const cairn_geometry *g = v->geometry;
    const char *what = store_db_names[v->db];
    size_t key_bytes = v->db == DB_TILE ? KEY_TILE_BYTES : KEY_BLOCK_BYTES;
    if (key.bytes != key_bytes) {
        damaged(v, "a record of '%s' has a key of %zu bytes, expected %zu", what, key.bytes, key_bytes);
        return true;
    }
    cairn_tile_id id = {.segment = cairn_get_be64(key.data), .block = cairn_get_be32((const uint8_t *)key.data + 8)};
    uint64_t ordinal = id.block;
    bool inside = true;
    if (v->db == DB_TILE) {
        id = store_key_tile_parse(key.data);
        inside = id.layer >= g->first_layer && id.layer < g->layers && id.head < g->kv_heads;
        ordinal = ordinal * per_block(v) + (uint64_t)(id.layer - g->first_layer) * g->kv_heads + id.head;
    }
    pass_segments(v, id.segment);
    bool known = v->at < v->segments_n && v->segments[v->at].id == id.segment;
    if (!known || !inside || id.block >= v->segments[v->at].blocks) {
        if (v->db == DB_TILE)
            damaged(v, "segment %llu block %u layer %u head %u: belongs to nothing", (unsigned long long)id.segment,
                    id.block, id.layer, id.head);
        else
            damaged(v, "segment %llu block %u %s: belongs to nothing", (unsigned long long)id.segment, id.block, what);
        return v->failure == CAIRN_OK;
    }
    missing(v, ordinal);
    v->ordinal = ordinal + 1;
    if (v->db == DB_TILE)
        check_tile(v, id, ordinal, value);
    else
        check_block(v, id.segment, id.block, value);
    bool read = value->data == NULL && (v->deep || v->db != DB_TILE);
    return v->failure == CAIRN_OK && step(v, 32 + (read ? page_run(&v->file, value->bytes) * v->file.page_bytes : 0));
}

/* ---- the whole ---- */

static cairn_status walk(verification *v, store_db db, bool (*record)(void *, cairn_span, const page_value *))
{
    const page_visitor visitor = {.arg = v, .record = record, .damage = page_damaged};
    v->db = db;
    v->at = 0;
    v->ordinal = 0;
    cairn_status status = page_walk(&v->file, store_db_names[db], &v->trees[db], PAGE_WALK_ALL, &visitor);
    if (v->failure != CAIRN_OK) return v->failure;
    if (status != CAIRN_OK && status != CAIRN_CORRUPT) return v->failure = status;
    if (record == block_record) pass_segments(v, UINT64_MAX);
    return CAIRN_OK;
}

static cairn_status walk_everything(verification *v)
{
    cairn_status status = page_file_keep_used(&v->file);
    if (status != CAIRN_OK) return status;
    /* without the main tree there is nothing to walk; damage there was reported */
    status = store_trees(&v->file, v->trees, page_damaged, v);
    if (status != CAIRN_OK) return status == CAIRN_CORRUPT ? CAIRN_OK : status;
    v->total = v->file.free_tree.leaf_pages + v->file.free_tree.overflow_pages;
    for (int db = 0; db < DB_COUNT; db++)
        v->total += v->trees[db].leaf_pages + (db != DB_TILE || v->deep ? v->trees[db].overflow_pages : 0);
    v->total *= v->file.page_bytes;

    static bool (*const each[DB_COUNT])(void *, cairn_span, const page_value *) = {
        [DB_META] = meta_record,    [DB_SEGMENT] = segment_each,  [DB_CONTEXT] = context_each, [DB_NAME] = name_each,
        [DB_TOKENS] = block_record, [DB_LANDMARK] = block_record, [DB_TILE] = block_record};
    static const store_db order[] = {DB_META, DB_SEGMENT, DB_CONTEXT, DB_NAME, DB_TOKENS, DB_LANDMARK, DB_TILE};
    for (size_t i = 0; i < DB_COUNT; i++) {
        if ((status = walk(v, order[i], each[order[i]])) != CAIRN_OK) return status;
        if (order[i] == DB_META && v->trees[DB_META].entries < 2) damaged(v, "meta: a record is missing");
        if (order[i] == DB_NAME) check_references(v);
    }
    status = page_walk_free(&v->file, page_damaged, v);
    if (status != CAIRN_OK && status != CAIRN_CORRUPT) return status;
    if (v->progress != NULL) v->progress(v->arg, v->total, v->total);
    return CAIRN_OK;
}

cairn_status cairn_store_verify(cairn_store *store, bool deep, void (*damage)(void *, const char *),
                                bool (*progress)(void *, uint64_t done, uint64_t total), void *arg,
                                cairn_verify_report *out)
{
    const store_data *data = &store->env->data;
    char path[STORE_PATH_MAX];
    MDB_txn *txn = NULL;
    cairn_verify_report unwanted;
    if (out == NULL) out = &unwanted;
    *out = (cairn_verify_report){0};
    verification v = {.store = store,
                      .geometry = cairn_store_geometry(store),
                      .deep = deep,
                      .damage = damage,
                      .progress = progress,
                      .arg = arg,
                      .report = out,
                      .next_progress = 0};
    cairn_status status = store_join(path, data->path, "data.mdb");
    if (status != CAIRN_OK) return status;
    /* a descriptor of its own, so that this sequential reading and a fetch's random one do not share read-ahead */
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return cairn_fail_errno(errno, "%s", path);
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    if ((status = page_file_peek(fd, path, &v.file)) != CAIRN_OK) {
        if (status == CAIRN_CORRUPT) report(&v, 1, cairn_last_error());
        goto out;
    }
    status = CAIRN_BUSY;
    for (int tries = 0; tries < 10 && status == CAIRN_BUSY; tries++) { /* two commits in between hide our state */
        store_read_end(store, txn);
        txn = NULL;
        if ((status = store_read_begin(store, &txn)) != CAIRN_OK) goto out;
        status = page_file_at(&v.file, mdb_txn_id(txn));
    }
    if (status != CAIRN_OK) goto out;
    status = walk_everything(&v);
out:
    store_read_end(store, txn);
    close(fd);
    cairn_free(v.file.used);
    cairn_free(v.buffer);
    cairn_free(v.segments);
    cairn_free(v.contexts);
    if (status != CAIRN_OK && status != CAIRN_CORRUPT) return status;
    if (out->damaged == 0) return CAIRN_OK;
    return cairn_fail(CAIRN_CORRUPT, "%s: %llu damaged records; the first: %s", store->env->path,
                      (unsigned long long)out->damaged, v.first);
}
