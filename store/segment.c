/* segment.c - segments: records, reference counts, freeing, and the index's bookkeeping.
 *
 * A segment's reference count is the number of ranges that name it, over all contexts. The transaction that takes the
 * last range away marks it dying; its records are then freed in short transactions, tiles first and the segment's own
 * record last, so that whoever comes after an interruption finds it and goes on. */
#include "store_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

cairn_status store_segment_get(cairn_store *store, MDB_txn *txn, uint64_t id, segment_record *out)
{
    uint8_t key[KEY_ID_BYTES];
    cairn_span bytes = {0};
    store_key_id(key, id);
    cairn_status status = store_get(store, txn, 0, DB_SEGMENT, key, sizeof key, &bytes);
    return status == CAIRN_OK ? store_segment_decode(id, bytes, out) : status;
}

cairn_status store_segment_put(cairn_store *store, MDB_txn *txn, const segment_record *record)
{
    uint8_t key[KEY_ID_BYTES], bytes[SEGMENT_RECORD_BYTES];
    store_key_id(key, record->info.id);
    store_segment_encode(record, bytes);
    MDB_val k = {sizeof key, key}, v = {sizeof bytes, bytes};
    int rc = mdb_put(txn, store->env->data.dbi[DB_SEGMENT], &k, &v, 0);
    return rc == 0
               ? CAIRN_OK
               : store_lmdb_fail(&store->env->data, rc, "writing segment %llu", (unsigned long long)record->info.id);
}

cairn_status store_segment_count(cairn_store *store, MDB_txn *txn, const cairn_range *ranges, uint32_t n, int change,
                                 uint64_t leaver, uint64_t *dead, uint32_t *died)
{
    if (died != NULL) *died = 0;
    for (uint32_t i = 0; i < n; i++) {
        segment_record record;
        unsigned long long id = ranges[i].segment;
        cairn_status status = store_segment_get(store, txn, ranges[i].segment, &record);
        if (status == CAIRN_NOT_FOUND)
            return cairn_fail(CAIRN_CORRUPT, "segment %llu: missing, though a context refers to it", id);
        if (status != CAIRN_OK) return status;
        cairn_segment_info *info = &record.info;
        if (record.state == SEGMENT_DYING || (change < 0 && info->references < (uint32_t)-change) ||
            (change > 0 && info->references > UINT32_MAX - (uint32_t)change))
            return cairn_fail(CAIRN_CORRUPT, "segment %llu: %u references, state %d, and a context changes them by %d",
                              id, info->references, (int)record.state, change);
        info->references += (uint32_t)change; /* two's complement: -1 subtracts */
        if (leaver != 0 && record.owner == leaver) {
            record.owner = 0;
            record.state = SEGMENT_SEALED;
        }
        if (info->references == 0) {
            record.owner = 0;
            record.state = SEGMENT_DYING;
            if (died != NULL) dead[(*died)++] = info->id;
        }
        if ((status = store_segment_put(store, txn, &record)) != CAIRN_OK) return status;
    }
    return CAIRN_OK;
}

/* ---- freeing ---- */

/* Deleting a large value reads its first page, where the length of its run is. Announcing those pages first turns a
 * batch of single faults into one batch of reads; nothing else of the tiles is read. */
static void announce_first_pages(cairn_store *store, MDB_cursor *cursor, uint64_t segment, uint32_t tiles)
{
    const store_data *data = &store->env->data;
    uint8_t from[KEY_TILE_BYTES];
    store_key_tile(from, (cairn_tile_id){.segment = segment});
    MDB_val key = {sizeof from, from}, value;
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    for (uint32_t i = 0; i < tiles && rc == 0 && key.mv_size == sizeof from && memcmp(key.mv_data, from, 8) == 0; i++) {
        uint64_t offset;
        size_t bytes;
        if (store_file_offset(store, (cairn_span){value.mv_data, value.mv_size}, &offset, &bytes))
            posix_fadvise(data->fd, (off_t)offset, (off_t)data->page_bytes, POSIX_FADV_WILLNEED);
        rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT);
    }
}

/* Deletes up to `most` records whose key begins with the segment; *n is how many there were. */
static cairn_status delete_some(cairn_store *store, MDB_txn *txn, store_db db, uint64_t segment, uint32_t most,
                                uint32_t *n)
{
    const store_data *data = &store->env->data;
    MDB_cursor *cursor;
    uint8_t from[KEY_ID_BYTES];
    *n = 0;
    int rc = mdb_cursor_open(txn, data->dbi[db], &cursor);
    if (rc != 0) return store_lmdb_fail(data, rc, "freeing segment %llu", (unsigned long long)segment);
    if (db == DB_TILE) announce_first_pages(store, cursor, segment, most);
    store_key_id(from, segment);
    MDB_val key = {sizeof from, from}, value;
    for (rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE); rc == 0 && *n < most;
         rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        if (key.mv_size < sizeof from || memcmp(key.mv_data, from, sizeof from) != 0) break;
        if ((rc = mdb_cursor_del(cursor, 0)) != 0) break;
        ++*n;
    }
    mdb_cursor_close(cursor);
    return rc == 0 || rc == MDB_NOTFOUND
               ? CAIRN_OK
               : store_lmdb_fail(data, rc, "freeing segment %llu", (unsigned long long)segment);
}

static void remove_index_files(const cairn_store *store, uint64_t segment)
{
    char path[STORE_PATH_MAX], prefix[32];
    int n = snprintf(prefix, sizeof prefix, "%llu-", (unsigned long long)segment);
    if (store_join(path, store->env->path, "index") != CAIRN_OK) return;
    DIR *dir = opendir(path);
    if (dir == NULL) return;
    for (struct dirent *e; (e = readdir(dir)) != NULL;)
        if (strncmp(e->d_name, prefix, (size_t)n) == 0) unlinkat(dirfd(dir), e->d_name, 0);
    closedir(dir);
}

void store_remove_tail(const cairn_store *store, uint64_t context)
{
    char path[STORE_PATH_MAX];
    if (cairn_store_tail_path(store, context, path, sizeof path) == CAIRN_OK) unlink(path);
}

/* One short transaction. *done: nothing of the segment is left. */
static cairn_status free_batch(cairn_store *store, uint64_t segment, uint32_t most, uint64_t *blocks, bool *done)
{
    MDB_txn *txn;
    segment_record record;
    uint32_t tiles = 0, tokens = 0, landmarks = 0;
    *done = false;
    cairn_status status = store_write_begin(store, "freeing space", &txn);
    if (status != CAIRN_OK) return status;
    status = store_segment_get(store, txn, segment, &record);
    if (status == CAIRN_NOT_FOUND) { /* somebody else finished it */
        *done = true;
        status = CAIRN_OK;
        goto out;
    }
    if (status == CAIRN_OK && record.state != SEGMENT_DYING)
        status = cairn_fail(CAIRN_CORRUPT, "segment %llu: came back to life", (unsigned long long)segment);
    if (status == CAIRN_OK) status = delete_some(store, txn, DB_TILE, segment, most, &tiles);
    if (status == CAIRN_OK && tiles < most) {
        status = delete_some(store, txn, DB_LANDMARK, segment, most, &landmarks);
        if (status == CAIRN_OK) status = delete_some(store, txn, DB_TOKENS, segment, most, &tokens);
        if (status == CAIRN_OK && landmarks < most && tokens < most) {
            uint8_t key[KEY_ID_BYTES];
            store_key_id(key, segment);
            MDB_val k = {sizeof key, key};
            int rc = mdb_del(txn, store->env->data.dbi[DB_SEGMENT], &k, NULL);
            if (rc != 0)
                status = store_lmdb_fail(&store->env->data, rc, "freeing segment %llu", (unsigned long long)segment);
            else
                *done = true;
        }
    }
    if (status == CAIRN_OK) status = store_write_commit(store, "freeing space", &txn);
    if (status == CAIRN_OK) *blocks += tokens;
    if (status == CAIRN_OK && *done) remove_index_files(store, segment);
out:
    store_write_abort(store, txn);
    return status;
}

/* The first dying segment after `after`; 0 = none. */
static cairn_status next_dying(cairn_store *store, uint64_t after, uint64_t *out)
{
    const store_data *data = &store->env->data;
    MDB_txn *txn;
    MDB_cursor *cursor;
    uint8_t from[KEY_ID_BYTES];
    *out = 0;
    cairn_status status = store_read_begin(store, &txn);
    if (status != CAIRN_OK) return status;
    int rc = mdb_cursor_open(txn, data->dbi[DB_SEGMENT], &cursor);
    if (rc == 0) {
        store_key_id(from, after + 1);
        MDB_val key = {sizeof from, from}, value;
        for (rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE); rc == 0 && *out == 0;
             rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
            segment_record record;
            uint64_t id = key.mv_size == KEY_ID_BYTES ? cairn_get_be64(key.mv_data) : 0;
            status = store_segment_decode(id, (cairn_span){value.mv_data, value.mv_size}, &record);
            if (status != CAIRN_OK) break;
            if (record.state == SEGMENT_DYING) *out = id;
        }
        mdb_cursor_close(cursor);
    }
    store_read_end(store, txn);
    if (status == CAIRN_OK && rc != 0 && rc != MDB_NOTFOUND)
        status = store_lmdb_fail(data, rc, "looking for dying segments");
    return status;
}

static cairn_status free_segment(cairn_store *store, uint64_t segment, uint64_t *blocks)
{
    uint32_t most = STORE_FREE_TILES;
    char full[1024] = "";
    cairn_status status = CAIRN_OK;
    for (bool done = false; !done && status == CAIRN_OK;) {
        status = free_batch(store, segment, most, blocks, &done);
        /* Freeing takes a few pages before it gives any: on a full disk less at a time may still fit */
        if (status == CAIRN_FULL && most > 4) {
            most /= 4;
            status = CAIRN_OK;
            snprintf(full, sizeof full, "%s", cairn_last_error());
        } else if (status == CAIRN_IO && full[0] != 0) {
            status = cairn_fail(CAIRN_FULL, "%s", full); /* LMDB gave up at the first: that one says why */
        }
    }
    return status;
}

cairn_status store_free_segments(cairn_store *store, const uint64_t *segments, uint32_t n)
{
    uint64_t blocks = 0;
    cairn_status status = CAIRN_OK;
    for (uint32_t i = 0; i < n && status == CAIRN_OK; i++) status = free_segment(store, segments[i], &blocks);
    return status;
}

cairn_status cairn_store_sweep(cairn_store *store, uint64_t *out_freed)
{
    uint64_t segment = 0, freed = 0;
    cairn_status status = CAIRN_OK;
    if (store->read_only)
        return cairn_fail(CAIRN_INVALID, "%s: sweeping: the store was opened read-only", store->env->path);
    while (status == CAIRN_OK && (status = next_dying(store, segment, &segment)) == CAIRN_OK && segment != 0)
        status = free_segment(store, segment, &freed);
    if (out_freed != NULL) *out_freed = freed;
    return status;
}

/* ---- the index's bookkeeping ---- */

cairn_status cairn_snapshot_segment(cairn_snapshot *snap, uint64_t segment, cairn_segment_info *out)
{
    segment_record record;
    if (snap->txn == NULL) return cairn_fail(CAIRN_INVALID, "the snapshot ended when its renewal failed");
    cairn_status status = store_segment_get(snap->store, snap->txn, segment, &record);
    if (status == CAIRN_NOT_FOUND || (status == CAIRN_OK && record.state == SEGMENT_DYING))
        return cairn_fail(CAIRN_NOT_FOUND, "%s: there is no segment %llu", snap->store->env->path,
                          (unsigned long long)segment);
    if (status == CAIRN_OK) *out = record.info;
    return status;
}

cairn_status cairn_snapshot_segments(cairn_snapshot *snap, bool (*each)(void *, const cairn_segment_info *), void *arg)
{
    const store_data *data = &snap->store->env->data;
    MDB_cursor *cursor;
    MDB_val key, value;
    cairn_status status = CAIRN_OK;
    if (snap->txn == NULL) return cairn_fail(CAIRN_INVALID, "the snapshot ended when its renewal failed");
    int rc = mdb_cursor_open(snap->txn, data->dbi[DB_SEGMENT], &cursor);
    if (rc != 0) return store_lmdb_fail(data, rc, "listing segments");
    while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        segment_record record;
        uint64_t id = key.mv_size == KEY_ID_BYTES ? cairn_get_be64(key.mv_data) : 0;
        status = store_segment_decode(id, (cairn_span){value.mv_data, value.mv_size}, &record);
        if (status != CAIRN_OK) break;
        if (record.state != SEGMENT_DYING && !each(arg, &record.info)) break;
    }
    mdb_cursor_close(cursor);
    if (status == CAIRN_OK && rc != 0 && rc != MDB_NOTFOUND) status = store_lmdb_fail(data, rc, "listing segments");
    return status;
}

cairn_status cairn_store_set_index(cairn_store *store, const cairn_segment_info *info)
{
    MDB_txn *txn;
    segment_record record;
    unsigned long long id = info->id;
    cairn_status status = store_write_begin(store, "writing index fields", &txn);
    if (status != CAIRN_OK) return status;
    status = store_segment_get(store, txn, info->id, &record);
    if (status == CAIRN_NOT_FOUND || (status == CAIRN_OK && record.state == SEGMENT_DYING))
        status = cairn_fail(CAIRN_NOT_FOUND, "%s: there is no segment %llu", store->env->path, id);
    if (status == CAIRN_OK && info->index_blocks > record.info.blocks)
        status = cairn_fail(CAIRN_INVALID, "segment %llu: an index of %u blocks, it has %u", id, info->index_blocks,
                            record.info.blocks);
    if (status == CAIRN_OK && info->generation < record.info.generation)
        status = cairn_fail(CAIRN_INVALID, "segment %llu: index generation %llu after %llu", id,
                            (unsigned long long)info->generation, (unsigned long long)record.info.generation);
    if (status == CAIRN_OK) {
        cairn_segment_info *to = &record.info;
        to->generation = info->generation;
        to->index_blocks = info->index_blocks;
        to->index_hash = info->index_hash;
        memcpy(to->index_kind, info->index_kind, sizeof to->index_kind);
        memcpy(to->index_made, info->index_made, sizeof to->index_made);
        memcpy(to->index_why, info->index_why, sizeof to->index_why);
        status = store_segment_put(store, txn, &record);
    }
    if (status == CAIRN_OK) status = store_write_commit(store, "writing index fields", &txn);
    store_write_abort(store, txn);
    return status;
}
