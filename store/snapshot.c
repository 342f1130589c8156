/* snapshot.c - one consistent view and everything that is read through it. */
#include "store_internal.h"

#include <errno.h>
#include <sys/stat.h>

enum { LINE = 64 };

static uint64_t file_bytes_now(const cairn_store *store)
{
    struct stat st;
    return fstat(store->env->data.fd, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* ---- lookups ---- */

cairn_status store_get(const cairn_store *store, MDB_txn *txn, uint64_t file_bytes, store_db db, const void *key,
                       size_t key_bytes, cairn_span *out)
{
    const store_data *data = &store->env->data;
    MDB_val k = {key_bytes, (void *)(uintptr_t)key}, v;
    int rc = mdb_get(txn, data->dbi[db], &k, &v);
    if (rc != 0) return store_lmdb_fail(data, rc, "looking into '%s'", store_db_names[db]);
    /* LMDB checks that a large value begins inside the tree's pages, not that it ends there, nor that the file has
     * them. What a write transaction has just changed lies outside the map, in memory. */
    uint64_t at = (uint64_t)((uintptr_t)v.mv_data - (uintptr_t)data->base);
    if (at < data->map_bytes) {
        if (file_bytes == 0) file_bytes = file_bytes_now(store);
        if (at > file_bytes || v.mv_size > file_bytes - at)
            return cairn_fail(CAIRN_CORRUPT, "%s: a record of '%s' lies at byte %llu and has %zu; the file has %llu",
                              data->path, store_db_names[db], (unsigned long long)at, v.mv_size,
                              (unsigned long long)file_bytes);
    }
    *out = (cairn_span){v.mv_data, v.mv_size};
    return CAIRN_OK;
}

cairn_status store_locate(cairn_snapshot *snap, cairn_tile_id id, cairn_span *record)
{
    uint8_t key[KEY_TILE_BYTES];
    if (snap->txn == NULL) return cairn_fail(CAIRN_INVALID, "the snapshot ended when its renewal failed");
    store_key_tile(key, id);
    return store_get(snap->store, snap->txn, snap->file_bytes, DB_TILE, key, sizeof key, record);
}

cairn_status store_ids_get(cairn_store *store, MDB_txn *txn, uint64_t *next_context, uint64_t *next_segment)
{
    cairn_span bytes = {0};
    cairn_status status = store_get(store, txn, 0, DB_META, "ids", 3, &bytes);
    if (status == CAIRN_NOT_FOUND) return cairn_fail(CAIRN_CORRUPT, "%s: the ids record is missing", store->env->path);
    return status == CAIRN_OK ? store_ids_decode(bytes, next_context, next_segment) : status;
}

cairn_status store_ids_put(cairn_store *store, MDB_txn *txn, uint64_t next_context, uint64_t next_segment)
{
    uint8_t record[IDS_RECORD_BYTES];
    store_ids_encode(next_context, next_segment, record);
    MDB_val key = {3, (void *)"ids"}, value = {sizeof record, record};
    int rc = mdb_put(txn, store->env->data.dbi[DB_META], &key, &value, 0);
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(&store->env->data, rc, "writing the ids record");
}

cairn_status store_context_id(cairn_store *store, MDB_txn *txn, const char *name, uint64_t *out)
{
    cairn_span bytes = {0};
    cairn_status status = store_name_check(name);
    if (status != CAIRN_OK) return status;
    status = store_get(store, txn, 0, DB_NAME, name, strlen(name), &bytes);
    if (status != CAIRN_OK) return status;
    if (bytes.bytes != 8) return cairn_fail(CAIRN_CORRUPT, "name '%s': %zu bytes, expected 8", name, bytes.bytes);
    *out = cairn_get_le64(bytes.data);
    return CAIRN_OK;
}

cairn_status store_context_is(const context_record *record, const void *name, size_t bytes)
{
    if (strlen(record->name) == bytes && memcmp(record->name, name, bytes) == 0) return CAIRN_OK;
    return cairn_fail(CAIRN_CORRUPT, "name '%.*s': its context %llu is named '%s'", (int)bytes, (const char *)name,
                      (unsigned long long)record->id, record->name);
}

cairn_status store_context_named(cairn_store *store, MDB_txn *txn, const char *name, context_record *out)
{
    uint64_t id = 0;
    cairn_status status = store_context_id(store, txn, name, &id);
    if (status == CAIRN_NOT_FOUND)
        return cairn_fail(CAIRN_NOT_FOUND, "%s: no context is named '%s'", store->env->path, name);
    if (status != CAIRN_OK) return status;
    status = store_context_get(store, txn, id, out);
    if (status == CAIRN_NOT_FOUND)
        return cairn_fail(CAIRN_CORRUPT, "name '%s': its context %llu is missing", name, (unsigned long long)id);
    return status == CAIRN_OK ? store_context_is(out, name, strlen(name)) : status;
}

cairn_status store_context_get(cairn_store *store, MDB_txn *txn, uint64_t id, context_record *out)
{
    uint8_t key[KEY_ID_BYTES];
    cairn_span bytes = {0};
    store_key_id(key, id);
    cairn_status status = store_get(store, txn, 0, DB_CONTEXT, key, sizeof key, &bytes);
    return status == CAIRN_OK ? store_context_decode(cairn_store_geometry(store), id, bytes, out) : status;
}

/* ---- the snapshot itself ---- */

cairn_status cairn_snapshot_begin(cairn_store *store, cairn_snapshot **out)
{
    *out = NULL;
    cairn_snapshot *snap = cairn_calloc(1, sizeof *snap);
    if (snap == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%s: a snapshot", store->env->path);
    snap->store = store;
    cairn_status status = store_read_begin(store, &snap->txn);
    if (status != CAIRN_OK) {
        cairn_free(snap);
        return status;
    }
    snap->file_bytes = file_bytes_now(store);
    *out = snap;
    return CAIRN_OK;
}

void cairn_snapshot_end(cairn_snapshot *snap)
{
    if (snap == NULL) return;
    store_read_end(snap->store, snap->txn);
    cairn_free(snap->scratch);
    cairn_free(snap);
}

cairn_status cairn_snapshot_renew(cairn_snapshot *snap)
{
    cairn_status status =
        snap->txn != NULL ? store_read_renew(snap->store, &snap->txn) : store_read_begin(snap->store, &snap->txn);
    snap->file_bytes = file_bytes_now(snap->store);
    return status;
}

static cairn_status alive(const cairn_snapshot *snap)
{
    return snap->txn != NULL ? CAIRN_OK : cairn_fail(CAIRN_INVALID, "the snapshot ended when its renewal failed");
}

/* ---- contexts ---- */

void store_context_info(const cairn_geometry *geometry, const context_record *record, cairn_context_info *out)
{
    memset(out, 0, sizeof *out);
    out->id = record->id;
    out->parent = record->parent;
    memcpy(out->name, record->name, sizeof out->name);
    out->blocks = record->blocks;
    out->tail_tokens = record->tail_count;
    out->tokens = record->blocks * geometry->block_tokens + record->tail_count;
    out->ranges = record->range_count;
    out->own_segment = record->own_segment;
    out->created_ns = record->created_ns;
    out->modified_ns = record->modified_ns;
    out->input = record->input;
}

cairn_status cairn_snapshot_contexts(cairn_snapshot *snap, cairn_context_each each, void *arg)
{
    const store_data *data = &snap->store->env->data;
    cairn_status status = alive(snap);
    if (status != CAIRN_OK) return status;
    MDB_cursor *cursor;
    MDB_val key, value;
    int rc = mdb_cursor_open(snap->txn, data->dbi[DB_NAME], &cursor);
    if (rc != 0) return store_lmdb_fail(data, rc, "listing contexts");
    while (status == CAIRN_OK && (rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        context_record record;
        cairn_context_info info;
        if (value.mv_size != 8) {
            status = cairn_fail(CAIRN_CORRUPT, "name '%.*s': %zu bytes, expected 8", (int)key.mv_size,
                                (const char *)key.mv_data, value.mv_size);
            break;
        }
        status = store_context_get(snap->store, snap->txn, cairn_get_le64(value.mv_data), &record);
        if (status == CAIRN_NOT_FOUND)
            status = cairn_fail(CAIRN_CORRUPT, "name '%.*s': its context %llu is missing", (int)key.mv_size,
                                (const char *)key.mv_data, (unsigned long long)cairn_get_le64(value.mv_data));
        if (status == CAIRN_OK) status = store_context_is(&record, key.mv_data, key.mv_size);
        if (status != CAIRN_OK) break;
        store_context_info(cairn_store_geometry(snap->store), &record, &info);
        if (!each(arg, &info)) {
            rc = MDB_NOTFOUND;
            break;
        }
    }
    mdb_cursor_close(cursor);
    if (status == CAIRN_OK && rc != 0 && rc != MDB_NOTFOUND) status = store_lmdb_fail(data, rc, "listing contexts");
    return status;
}

cairn_status cairn_snapshot_context(cairn_snapshot *snap, const char *name, cairn_context_info *out)
{
    context_record record;
    cairn_status status = alive(snap);
    if (status == CAIRN_OK) status = store_context_named(snap->store, snap->txn, name, &record);
    if (status == CAIRN_OK) store_context_info(cairn_store_geometry(snap->store), &record, out);
    return status;
}

static cairn_status context_by_id(cairn_snapshot *snap, uint64_t id, context_record *out)
{
    cairn_status status = alive(snap);
    if (status == CAIRN_OK) status = store_context_get(snap->store, snap->txn, id, out);
    if (status == CAIRN_NOT_FOUND)
        return cairn_fail(CAIRN_NOT_FOUND, "%s: there is no context %llu", snap->store->env->path,
                          (unsigned long long)id);
    return status;
}

cairn_status cairn_snapshot_context_by_id(cairn_snapshot *snap, uint64_t id, cairn_context_info *out)
{
    context_record record;
    cairn_status status = context_by_id(snap, id, &record);
    if (status == CAIRN_OK) store_context_info(cairn_store_geometry(snap->store), &record, out);
    return status;
}

cairn_status cairn_snapshot_ranges(cairn_snapshot *snap, uint64_t context, cairn_range *ranges, size_t cap,
                                   size_t *out_n)
{
    context_record record;
    cairn_status status = context_by_id(snap, context, &record);
    if (status != CAIRN_OK) return status;
    for (uint32_t i = 0; i < record.range_count && i < cap; i++) ranges[i] = store_context_range(&record, i);
    *out_n = record.range_count;
    return CAIRN_OK;
}

cairn_status cairn_snapshot_tail(cairn_snapshot *snap, uint64_t context, cairn_token *tokens, size_t cap, size_t *out_n)
{
    context_record record;
    cairn_status status = context_by_id(snap, context, &record);
    if (status != CAIRN_OK) return status;
    for (uint32_t i = 0; i < record.tail_count && i < cap; i++) tokens[i] = store_context_tail(&record, i);
    *out_n = record.tail_count;
    return CAIRN_OK;
}

/* ---- blocks ---- */

/* A block record that is not there: damage if its segment should have it. */
static cairn_status block_missing(cairn_store *store, MDB_txn *txn, uint64_t segment, uint32_t block, const char *what)
{
    segment_record record;
    cairn_status status = store_segment_get(store, txn, segment, &record);
    if (status == CAIRN_OK && block < record.info.blocks && record.state != SEGMENT_DYING)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u %s: missing", (unsigned long long)segment, block, what);
    if (status == CAIRN_OK || status == CAIRN_NOT_FOUND)
        return cairn_fail(CAIRN_NOT_FOUND, "segment %llu has no block %u", (unsigned long long)segment, block);
    return status;
}

cairn_status store_tokens_get(cairn_store *store, MDB_txn *txn, uint64_t file_bytes, uint64_t segment, uint32_t block,
                              cairn_token *out)
{
    uint8_t key[KEY_BLOCK_BYTES];
    cairn_span record = {0};
    store_key_block(key, segment, block);
    cairn_status status = store_get(store, txn, file_bytes, DB_TOKENS, key, sizeof key, &record);
    if (status == CAIRN_NOT_FOUND) return block_missing(store, txn, segment, block, "tokens");
    return status == CAIRN_OK ? store_tokens_check(cairn_store_geometry(store), segment, block, record, out) : status;
}

cairn_status cairn_snapshot_tokens(cairn_snapshot *snap, uint64_t segment, uint32_t block, uint32_t count,
                                   cairn_token *out)
{
    size_t per = cairn_store_geometry(snap->store)->block_tokens;
    cairn_status status = alive(snap);
    if (count > UINT32_MAX - block) return cairn_fail(CAIRN_INVALID, "%u blocks from block %u", count, block);
    for (uint32_t i = 0; i < count && status == CAIRN_OK; i++) {
        status = store_tokens_get(snap->store, snap->txn, snap->file_bytes, segment, block + i, out + i * per);
        store_trim_map(snap->store);
    }
    return status;
}

/* LMDB keeps a record that fits half a page inside a leaf page, at any even address: such a payload is copied, so that
 * every payload handed out starts on a 64-byte line. */
static cairn_status align_payload(cairn_snapshot *snap, cairn_span *payload)
{
    if ((uintptr_t)payload->data % LINE == 0) return CAIRN_OK;
    if (snap->scratch_bytes < payload->bytes) {
        cairn_free(snap->scratch);
        snap->scratch_bytes = 0;
        if ((snap->scratch = cairn_alloc(payload->bytes)) == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "%zu bytes of landmark keys", payload->bytes);
        snap->scratch_bytes = payload->bytes;
    }
    memcpy(snap->scratch, payload->data, payload->bytes);
    payload->data = snap->scratch;
    return CAIRN_OK;
}

cairn_status cairn_snapshot_landmarks(cairn_snapshot *snap, uint64_t segment, uint32_t first, uint32_t count,
                                      cairn_landmark_each each, void *arg)
{
    const cairn_geometry *geometry = cairn_store_geometry(snap->store);
    cairn_status status = alive(snap);
    if (count > UINT32_MAX - first) return cairn_fail(CAIRN_INVALID, "%u blocks from block %u", count, first);
    store_ahead *ahead = status == CAIRN_OK ? store_ahead_new(snap, segment, first, count) : NULL;
    for (uint32_t i = 0; i < count && status == CAIRN_OK; i++) {
        uint8_t key[KEY_BLOCK_BYTES];
        cairn_span record = {0}, payload = {0};
        store_key_block(key, segment, first + i);
        store_ahead_at(ahead, first + i);
        status = store_get(snap->store, snap->txn, snap->file_bytes, DB_LANDMARK, key, sizeof key, &record);
        store_ahead_seen(ahead, first + i, record.bytes);
        if (status == CAIRN_NOT_FOUND) status = block_missing(snap->store, snap->txn, segment, first + i, "landmark");
        if (status == CAIRN_OK) status = store_landmark_check(geometry, segment, first + i, record, &payload);
        if (status == CAIRN_OK) status = align_payload(snap, &payload);
        if (status == CAIRN_OK && !each(arg, first + i, payload)) break;
        store_trim_map(snap->store);
    }
    store_ahead_free(ahead);
    return status;
}

cairn_status cairn_snapshot_tile(cairn_snapshot *snap, cairn_tile_id id, cairn_tile_view *out)
{
    cairn_span record = {0};
    cairn_status status = store_locate(snap, id, &record);
    return status == CAIRN_OK ? store_tile_check(snap->store, id, record.data, record.bytes, true, out) : status;
}
