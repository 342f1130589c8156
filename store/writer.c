/* writer.c - the appender of one context: whole blocks of all layers, durable when commit returns. */
#include "store_internal.h"

#include <stdio.h>
#include <unistd.h>

struct cairn_writer {
    cairn_store *store;
    uint64_t context;
    char name[CAIRN_NAME_MAX + 1]; /* when it began, for messages */
};

cairn_status cairn_writer_begin(cairn_store *store, const char *context, cairn_writer **out)
{
    MDB_txn *txn;
    context_record record;
    *out = NULL;
    if (store->read_only)
        return cairn_fail(CAIRN_INVALID, "%s: appending to a context: the store was opened read-only",
                          store->env->path);
    cairn_writer *writer = cairn_calloc(1, sizeof *writer);
    if (writer == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a writer of context '%.100s'", context);
    writer->store = store;
    cairn_status status = store_read_begin(store, &txn);
    if (status != CAIRN_OK) goto out;
    status = store_context_named(store, txn, context, &record);
    store_read_end(store, txn);
    if (status != CAIRN_OK) goto out;
    writer->context = record.id;
    memcpy(writer->name, record.name, sizeof writer->name);
    if ((status = store_lease_take(store, record.id, context)) != CAIRN_OK) goto out;

    /* it may have been dropped before the lease was ours */
    if ((status = store_read_begin(store, &txn)) == CAIRN_OK) {
        status = store_context_get(store, txn, writer->context, &record);
        if (status == CAIRN_NOT_FOUND)
            status = cairn_fail(CAIRN_NOT_FOUND, "%s: context '%s' was just dropped", store->env->path, context);
        store_read_end(store, txn);
    }
    if (status != CAIRN_OK) store_lease_give(store, writer->context);
out:
    if (status != CAIRN_OK) {
        cairn_free(writer);
        return status;
    }
    pthread_mutex_lock(&store->env->mutex);
    store->env->writers++;
    pthread_mutex_unlock(&store->env->mutex);
    *out = writer;
    return CAIRN_OK;
}

void cairn_writer_end(cairn_writer *writer)
{
    if (writer == NULL) return;
    store_env *env = writer->store->env;
    store_lease_give(writer->store, writer->context);
    if (env->pid == getpid()) {
        pthread_mutex_lock(&env->mutex);
        env->writers--;
        pthread_mutex_unlock(&env->mutex);
    }
    cairn_free(writer);
}

/* ---- commit ---- */

/* A cursor that appends while new keys stand behind all there are, which is LMDB's fast way and fills pages to the
 * brim; a segment that is not the last one of the key space is written the ordinary way. */
typedef struct appender {
    MDB_cursor *cursor;
    unsigned flags;
} appender;

static int appender_open(const store_data *data, MDB_txn *txn, store_db db, const void *key, size_t key_bytes,
                         appender *out)
{
    MDB_val last, value;
    int rc = mdb_cursor_open(txn, data->dbi[db], &out->cursor);
    if (rc != 0) {
        out->cursor = NULL;
        return rc;
    }
    out->flags = MDB_RESERVE;
    rc = mdb_cursor_get(out->cursor, &last, &value, MDB_LAST);
    if (rc == MDB_NOTFOUND || (rc == 0 && last.mv_size == key_bytes && memcmp(last.mv_data, key, key_bytes) < 0))
        out->flags |= MDB_APPEND;
    else
        out->flags |= MDB_NOOVERWRITE;
    return rc == MDB_NOTFOUND ? 0 : rc;
}

/* Room for a value; the caller fills it before anything else is done with the transaction. */
static int appender_put(appender *a, const void *key, size_t key_bytes, size_t bytes, void **out)
{
    MDB_val k = {key_bytes, (void *)(uintptr_t)key}, v = {bytes, NULL};
    int rc = mdb_cursor_put(a->cursor, &k, &v, a->flags);
    *out = v.mv_data;
    return rc;
}

/* Order of writing: tokens and landmark keys of all blocks, then tiles by (block, layer, head), so that a commit's
 * tiles are one run of the file. */
static int put_blocks(cairn_store *store, MDB_txn *txn, uint64_t segment, uint32_t first, uint64_t stream_block,
                      const cairn_block_data *blocks, size_t n)
{
    const cairn_geometry *g = cairn_store_geometry(store);
    const store_data *data = &store->env->data;
    uint8_t block_key[KEY_BLOCK_BYTES], tile_key[KEY_TILE_BYTES];
    appender tokens = {0}, landmarks = {0}, tiles = {0};
    void *at;
    size_t payload = cairn_tile_payload_bytes(g->dtype, g->block_tokens, g->head_dim);
    size_t record = store_tile_bytes(data->page_bytes, g->dtype, g->block_tokens, g->head_dim);
    cairn_tile_id id = {.segment = segment, .block = first, .layer = (uint16_t)g->first_layer};
    store_key_block(block_key, segment, first);
    store_key_tile(tile_key, id);
    int rc = appender_open(data, txn, DB_TOKENS, block_key, sizeof block_key, &tokens);
    if (rc == 0) rc = appender_open(data, txn, DB_LANDMARK, block_key, sizeof block_key, &landmarks);
    if (rc == 0) rc = appender_open(data, txn, DB_TILE, tile_key, sizeof tile_key, &tiles);
    for (size_t i = 0; i < n && rc == 0; i++) {
        uint32_t block = first + (uint32_t)i;
        store_key_block(block_key, segment, block);
        rc = appender_put(&tokens, block_key, sizeof block_key, store_tokens_bytes(g), &at);
        if (rc == 0) store_tokens_encode(g, segment, block, blocks[i].tokens, at);
        if (rc == 0) rc = appender_put(&landmarks, block_key, sizeof block_key, store_landmark_bytes(g), &at);
        if (rc == 0) store_landmark_encode(g, segment, block, blocks[i].landmarks, at);
    }
    for (size_t i = 0; i < n && rc == 0; i++) {
        const uint8_t *from = blocks[i].tiles;
        uint64_t first_token = (stream_block + i) * g->block_tokens;
        id.block = first + (uint32_t)i;
        for (uint32_t layer = g->first_layer; layer < g->layers && rc == 0; layer++)
            for (uint32_t head = 0; head < g->kv_heads && rc == 0; head++, from += payload) {
                id.layer = (uint16_t)layer;
                id.head = (uint16_t)head;
                store_key_tile(tile_key, id);
                rc = appender_put(&tiles, tile_key, sizeof tile_key, record, &at);
                if (rc == 0) store_tile_encode(g, id, first_token, from, at, record);
            }
    }
    if (tokens.cursor != NULL) mdb_cursor_close(tokens.cursor);
    if (landmarks.cursor != NULL) mdb_cursor_close(landmarks.cursor);
    if (tiles.cursor != NULL) mdb_cursor_close(tiles.cursor);
    return rc;
}

/* The segment new blocks go to: the context's own, if its last range ends where that ends; else a new one. */
static cairn_status open_segment(cairn_store *store, MDB_txn *txn, context_record *record, cairn_range *ranges,
                                 uint32_t *range_count, size_t n, segment_record *out)
{
    cairn_status status;
    if (record->own_segment != 0) {
        status = store_segment_get(store, txn, record->own_segment, out);
        if (status == CAIRN_NOT_FOUND)
            status = cairn_fail(CAIRN_CORRUPT, "segment %llu: missing, though context %llu owns it",
                                (unsigned long long)record->own_segment, (unsigned long long)record->id);
        if (status != CAIRN_OK) return status;
        cairn_range *last = *range_count > 0 ? &ranges[*range_count - 1] : NULL;
        if (out->state == SEGMENT_OPEN && out->owner == record->id && last != NULL && last->segment == out->info.id &&
            last->first + last->count == out->info.blocks && n <= UINT32_MAX - 1 - out->info.blocks) {
            last->count += (uint32_t)n;
            return CAIRN_OK;
        }
        if (out->owner == record->id) { /* it goes on without us */
            out->owner = 0;
            out->state = SEGMENT_SEALED;
            if ((status = store_segment_put(store, txn, out)) != CAIRN_OK) return status;
        }
    }
    uint64_t next_context, next_segment;
    if ((status = store_ids_get(store, txn, &next_context, &next_segment)) != CAIRN_OK) return status;
    *out = (segment_record){.info = {.id = next_segment, .references = 1}, .state = SEGMENT_OPEN, .owner = record->id};
    record->own_segment = next_segment;
    ranges[(*range_count)++] = (cairn_range){.segment = next_segment, .first = 0, .count = (uint32_t)n};
    return store_ids_put(store, txn, next_context, next_segment + 1);
}

static cairn_status check_tokens(const cairn_writer *writer, const cairn_token *tokens, size_t n, const char *what,
                                 size_t number)
{
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0)
            return cairn_fail(CAIRN_INVALID, "context '%s': token %zu of %s %zu is %d", writer->name, i, what, number,
                              tokens[i]);
    return CAIRN_OK;
}

static cairn_status context_of(cairn_writer *writer, MDB_txn *txn, context_record *out)
{
    cairn_status status = store_context_get(writer->store, txn, writer->context, out);
    if (status == CAIRN_NOT_FOUND)
        return cairn_fail(CAIRN_CORRUPT, "context %llu ('%s'): gone, though this process holds its lease",
                          (unsigned long long)writer->context, writer->name);
    return status;
}

cairn_status cairn_writer_commit(cairn_writer *writer, const cairn_block_data *blocks, size_t n,
                                 const cairn_token *tail, size_t tail_tokens, const cairn_input *input)
{
    cairn_store *store = writer->store;
    const cairn_geometry *g = cairn_store_geometry(store);
    MDB_txn *txn = NULL;
    context_record record;
    segment_record segment;
    cairn_range *ranges = NULL;
    if (tail_tokens >= g->block_tokens)
        return cairn_fail(CAIRN_INVALID, "context '%s': a tail of %zu tokens, a block has %u", writer->name,
                          tail_tokens, g->block_tokens);
    if (n > UINT32_MAX - 1) return cairn_fail(CAIRN_INVALID, "context '%s': %zu blocks in one commit", writer->name, n);
    cairn_status status = check_tokens(writer, tail, tail_tokens, "the tail of", n);
    for (size_t i = 0; i < n && status == CAIRN_OK; i++)
        status = check_tokens(writer, blocks[i].tokens, g->block_tokens, "block", i);
    if (status != CAIRN_OK) return status;

    if ((status = store_write_begin(store, "committing blocks", &txn)) != CAIRN_OK) return status;
    if ((status = context_of(writer, txn, &record)) != CAIRN_OK) goto out;
    uint32_t range_count = record.range_count;
    if ((ranges = store_context_ranges(&record, 1)) == NULL) {
        status = CAIRN_NO_MEMORY;
        goto out;
    }
    if (n > 0) {
        if ((status = open_segment(store, txn, &record, ranges, &range_count, n, &segment)) != CAIRN_OK) goto out;
        int rc = put_blocks(store, txn, segment.info.id, segment.info.blocks, record.blocks, blocks, n);
        if (rc != 0) {
            status = rc == MDB_KEYEXIST
                         ? cairn_fail(CAIRN_CORRUPT, "segment %llu: has records beyond its %u blocks",
                                      (unsigned long long)segment.info.id, segment.info.blocks)
                         : store_lmdb_fail(&store->env->data, rc, "committing %zu blocks (%zu tiles) to '%s'", n,
                                           n * (g->layers - g->first_layer) * g->kv_heads, record.name);
            goto out;
        }
        segment.info.blocks += (uint32_t)n;
        if ((status = store_segment_put(store, txn, &segment)) != CAIRN_OK) goto out;
    }
    if (input != NULL) record.input = *input;
    record.input.done_tokens = (record.blocks + n) * g->block_tokens + tail_tokens;
    record.modified_ns = cairn_wall_ns();
    status = store_context_put(store, txn, &record, ranges, range_count, tail, (uint32_t)tail_tokens);
    if (status == CAIRN_OK) {
        char what[640];
        snprintf(what, sizeof what, "committing %zu blocks to '%s'", n, record.name);
        status = store_write_commit(store, what, &txn);
    }
    if (status == CAIRN_OK) store_trim_grown_map(store); /* the walk touched tree pages among what it wrote */
out:
    store_write_abort(store, txn);
    cairn_free(ranges);
    return status;
}

cairn_status cairn_writer_truncate(cairn_writer *writer)
{
    cairn_store *store = writer->store;
    MDB_txn *txn;
    context_record record;
    cairn_range *ranges = NULL;
    uint64_t *dead = NULL;
    uint32_t died = 0;
    cairn_status status = store_write_begin(store, "emptying a context", &txn);
    if (status != CAIRN_OK) return status;
    if ((status = context_of(writer, txn, &record)) != CAIRN_OK) goto out;
    ranges = store_context_ranges(&record, 0);
    dead = cairn_alloc_array(record.range_count, sizeof *dead);
    if (ranges == NULL || dead == NULL) {
        status = cairn_fail(CAIRN_NO_MEMORY, "emptying '%s': %u ranges", record.name, record.range_count);
        goto out;
    }
    status = store_segment_count(store, txn, ranges, record.range_count, -1, record.id, dead, &died);
    if (status != CAIRN_OK) goto out;
    record.own_segment = 0;
    record.input = (cairn_input){0};
    record.modified_ns = cairn_wall_ns();
    if ((status = store_context_put(store, txn, &record, NULL, 0, NULL, 0)) != CAIRN_OK) goto out;
    status = store_write_commit(store, "emptying a context", &txn);
    if (status == CAIRN_OK) store_remove_tail(store, record.id);
out:
    store_write_abort(store, txn);
    cairn_free(ranges);
    if (status == CAIRN_OK) status = store_free_segments(store, dead, died);
    cairn_free(dead);
    return status;
}

cairn_status cairn_writer_info(cairn_writer *writer, cairn_context_info *out)
{
    MDB_txn *txn;
    context_record record;
    cairn_status status = store_read_begin(writer->store, &txn);
    if (status != CAIRN_OK) return status;
    status = context_of(writer, txn, &record);
    if (status == CAIRN_OK) store_context_info(cairn_store_geometry(writer->store), &record, out);
    store_read_end(writer->store, txn);
    return status;
}
