/* context.c - contexts: create, fork, drop, rename. Each is one short durable transaction, whatever their size. */
#include "store_internal.h"

cairn_status store_context_put(cairn_store *store, MDB_txn *txn, const context_record *record,
                               const cairn_range *ranges, uint32_t range_count, const cairn_token *tail,
                               uint32_t tail_count)
{
    uint8_t key[KEY_ID_BYTES];
    unsigned long long id = record->id;
    size_t bytes = store_context_bytes(record->name, range_count, tail_count);
    if (bytes == 0 || bytes > UINT32_MAX / 2)
        return cairn_fail(CAIRN_INVALID, "context %llu: a record of %u ranges is too large", id, range_count);
    /* Encoded beside and not through MDB_RESERVE: ranges and tail may point into the record that is replaced */
    uint8_t *encoded = cairn_alloc(bytes);
    if (encoded == NULL) return cairn_fail(CAIRN_NO_MEMORY, "context %llu: a record of %zu bytes", id, bytes);
    store_context_encode(record, ranges, range_count, tail, tail_count, encoded);
    store_key_id(key, record->id);
    MDB_val k = {sizeof key, key}, v = {bytes, encoded};
    int rc = mdb_put(txn, store->env->data.dbi[DB_CONTEXT], &k, &v, 0);
    cairn_free(encoded);
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(&store->env->data, rc, "writing context %llu", id);
}

cairn_range *store_context_ranges(const context_record *record, uint32_t more)
{
    cairn_range *ranges = cairn_alloc_array((size_t)record->range_count + more, sizeof *ranges);
    if (ranges == NULL) {
        cairn_fail(CAIRN_NO_MEMORY, "context %llu: %u ranges", (unsigned long long)record->id, record->range_count);
        return NULL;
    }
    for (uint32_t i = 0; i < record->range_count; i++) ranges[i] = store_context_range(record, i);
    return ranges;
}

static cairn_status name_put(cairn_store *store, MDB_txn *txn, const char *name, uint64_t id)
{
    uint8_t value[8];
    cairn_put_le64(value, id);
    MDB_val k = {strlen(name), (void *)(uintptr_t)name}, v = {sizeof value, value};
    int rc = mdb_put(txn, store->env->data.dbi[DB_NAME], &k, &v, MDB_NOOVERWRITE);
    if (rc == MDB_KEYEXIST)
        return cairn_fail(CAIRN_EXISTS, "%s: a context named '%s' is there already", store->env->path, name);
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(&store->env->data, rc, "writing the name '%s'", name);
}

static cairn_status key_delete(cairn_store *store, MDB_txn *txn, store_db db, const void *key, size_t bytes)
{
    MDB_val k = {bytes, (void *)(uintptr_t)key};
    int rc = mdb_del(txn, store->env->data.dbi[db], &k, NULL);
    if (rc == MDB_NOTFOUND)
        return cairn_fail(CAIRN_CORRUPT, "%s: a record of '%s' is missing", store->env->path, store_db_names[db]);
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(&store->env->data, rc, "deleting from '%s'", store_db_names[db]);
}

/* Gives a new context its id and name. */
static cairn_status enter_context(cairn_store *store, MDB_txn *txn, context_record *record)
{
    uint64_t next_context, next_segment;
    cairn_status status = store_ids_get(store, txn, &next_context, &next_segment);
    if (status != CAIRN_OK) return status;
    record->id = next_context;
    record->created_ns = record->modified_ns = cairn_wall_ns();
    if ((status = name_put(store, txn, record->name, record->id)) != CAIRN_OK) return status;
    return store_ids_put(store, txn, next_context + 1, next_segment);
}

cairn_status cairn_context_create(cairn_store *store, const char *name, uint64_t *out_id)
{
    MDB_txn *txn;
    context_record record = {0};
    cairn_status status = store_name_check(name);
    if (status != CAIRN_OK) return status;
    memcpy(record.name, name, strlen(name) + 1);
    if ((status = store_write_begin(store, "creating a context", &txn)) != CAIRN_OK) return status;
    status = enter_context(store, txn, &record);
    if (status == CAIRN_OK) status = store_context_put(store, txn, &record, NULL, 0, NULL, 0);
    if (status == CAIRN_OK) status = store_write_commit(store, "creating a context", &txn);
    store_write_abort(store, txn);
    if (status == CAIRN_OK && out_id != NULL) *out_id = record.id;
    return status;
}

/* What a fork at `at` tokens keeps of its parent: whole blocks by reference, the rest as tokens. */
static cairn_status cut(cairn_store *store, MDB_txn *txn, const context_record *parent, uint64_t at,
                        cairn_range *ranges, uint32_t *range_count, cairn_token *tail, uint32_t *tail_count)
{
    uint32_t per = cairn_store_geometry(store)->block_tokens;
    uint64_t left = at / per; /* whole blocks still to take */
    uint32_t n = 0, rest = (uint32_t)(at % per);
    for (; n < parent->range_count && left > 0; n++) {
        if (ranges[n].count > left) ranges[n].count = (uint32_t)left;
        left -= ranges[n].count;
    }
    *range_count = n;
    *tail_count = rest;
    if (at / per == parent->blocks) {
        for (uint32_t i = 0; i < rest; i++) tail[i] = store_context_tail(parent, i);
        return CAIRN_OK;
    }
    if (rest == 0) return CAIRN_OK;
    /* the block that is cut: the next one of the range the last whole block is in, or the first of the range after it
     */
    cairn_range last = n > 0 ? store_context_range(parent, n - 1) : (cairn_range){0};
    uint64_t segment = last.segment;
    uint32_t block = n > 0 ? ranges[n - 1].first + ranges[n - 1].count : 0;
    if (n == 0 || ranges[n - 1].count == last.count) {
        cairn_range after = store_context_range(parent, n); /* is there: blocks remain */
        segment = after.segment;
        block = after.first;
    }
    return store_tokens_get(store, txn, 0, segment, block, tail);
}

cairn_status cairn_context_fork(cairn_store *store, const char *parent, const char *name, uint64_t at_tokens,
                                uint64_t *out_id)
{
    uint32_t per = cairn_store_geometry(store)->block_tokens;
    MDB_txn *txn = NULL;
    context_record from, record = {0};
    cairn_range *ranges = NULL;
    cairn_token *tail = NULL;
    uint32_t range_count = 0, tail_count = 0;
    cairn_status status = store_name_check(name);
    if (status == CAIRN_OK) status = store_write_begin(store, "forking a context", &txn);
    if (status != CAIRN_OK) return status;
    if ((status = store_context_named(store, txn, parent, &from)) != CAIRN_OK) goto out;
    uint64_t tokens = from.blocks * per + from.tail_count;
    if (at_tokens == UINT64_MAX) at_tokens = tokens;
    if (at_tokens > tokens) {
        status = cairn_fail(CAIRN_INVALID, "context '%s' has %llu tokens, a fork at %llu is beyond them", parent,
                            (unsigned long long)tokens, (unsigned long long)at_tokens);
        goto out;
    }
    ranges = store_context_ranges(&from, 0);
    tail = cairn_alloc_array(per, sizeof *tail);
    if (ranges == NULL || tail == NULL) {
        status = cairn_fail(CAIRN_NO_MEMORY, "forking '%s': %u ranges", parent, from.range_count);
        goto out;
    }
    if ((status = cut(store, txn, &from, at_tokens, ranges, &range_count, tail, &tail_count)) != CAIRN_OK) goto out;
    memcpy(record.name, name, strlen(name) + 1);
    record.parent = from.id;
    if (at_tokens == tokens) record.input = from.input; /* shorter: the input is no longer what it holds */
    record.input.done_tokens = at_tokens;
    if ((status = store_segment_count(store, txn, ranges, range_count, +1, 0, NULL, NULL)) != CAIRN_OK) goto out;
    if ((status = enter_context(store, txn, &record)) != CAIRN_OK) goto out;
    if ((status = store_context_put(store, txn, &record, ranges, range_count, tail, tail_count)) != CAIRN_OK) goto out;
    status = store_write_commit(store, "forking a context", &txn);
    if (status == CAIRN_OK && out_id != NULL) *out_id = record.id;
out:
    store_write_abort(store, txn);
    cairn_free(ranges);
    cairn_free(tail);
    return status;
}

/* The transaction of a drop; the lease is held. */
static cairn_status remove_context(cairn_store *store, const char *name, uint64_t id, uint64_t **dead, uint32_t *died)
{
    MDB_txn *txn;
    context_record record;
    cairn_range *ranges = NULL;
    uint8_t key[KEY_ID_BYTES];
    cairn_status status = store_write_begin(store, "dropping a context", &txn);
    if (status != CAIRN_OK) return status;
    if ((status = store_context_named(store, txn, name, &record)) != CAIRN_OK) goto out;
    if (record.id != id) {
        status = cairn_fail(CAIRN_BUSY, "context '%s' was replaced by another of that name meanwhile", name);
        goto out;
    }
    ranges = store_context_ranges(&record, 0);
    *dead = cairn_alloc_array(record.range_count, sizeof **dead);
    if (ranges == NULL || *dead == NULL) {
        status = cairn_fail(CAIRN_NO_MEMORY, "dropping '%s': %u ranges", name, record.range_count);
        goto out;
    }
    uint32_t range_count = record.range_count;
    store_key_id(key, id);
    if ((status = store_segment_count(store, txn, ranges, range_count, -1, id, *dead, died)) != CAIRN_OK) goto out;
    if ((status = key_delete(store, txn, DB_NAME, name, strlen(name))) != CAIRN_OK) goto out;
    if ((status = key_delete(store, txn, DB_CONTEXT, key, sizeof key)) != CAIRN_OK) goto out;
    status = store_write_commit(store, "dropping a context", &txn);
out:
    store_write_abort(store, txn);
    cairn_free(ranges);
    return status;
}

static cairn_status id_of(cairn_store *store, const char *name, uint64_t *out)
{
    MDB_txn *txn;
    context_record record;
    cairn_status status = store_read_begin(store, &txn);
    if (status != CAIRN_OK) return status;
    status = store_context_named(store, txn, name, &record);
    store_read_end(store, txn);
    *out = record.id;
    return status;
}

cairn_status cairn_context_drop(cairn_store *store, const char *name)
{
    uint64_t id = 0, *dead = NULL;
    uint32_t died = 0;
    if (store->read_only)
        return cairn_fail(CAIRN_INVALID, "%s: dropping a context: the store was opened read-only", store->env->path);
    cairn_status status = id_of(store, name, &id);
    if (status == CAIRN_OK) status = store_lease_take(store, id, name);
    if (status != CAIRN_OK) return status;
    status = remove_context(store, name, id, &dead, &died);
    if (status == CAIRN_OK) store_remove_tail(store, id);
    store_lease_give(store, id);
    if (status == CAIRN_OK && (status = store_free_segments(store, dead, died)) != CAIRN_OK)
        cairn_fail_within(status, "'%s' is dropped, but not all its space is returned (sweep goes on with that)", name);
    cairn_free(dead);
    return status;
}

cairn_status cairn_context_rename(cairn_store *store, const char *from, const char *to)
{
    MDB_txn *txn;
    context_record record;
    cairn_range *ranges = NULL;
    cairn_token *tail = NULL;
    cairn_status status = store_name_check(to);
    if (status == CAIRN_OK) status = store_write_begin(store, "renaming a context", &txn);
    if (status != CAIRN_OK) return status;
    if ((status = store_context_named(store, txn, from, &record)) != CAIRN_OK || strcmp(from, to) == 0) goto out;
    ranges = store_context_ranges(&record, 0);
    tail = cairn_alloc_array(record.tail_count, sizeof *tail);
    if (ranges == NULL || tail == NULL) {
        status = cairn_fail(CAIRN_NO_MEMORY, "renaming '%s': %u ranges", from, record.range_count);
        goto out;
    }
    for (uint32_t i = 0; i < record.tail_count; i++) tail[i] = store_context_tail(&record, i);
    if ((status = name_put(store, txn, to, record.id)) != CAIRN_OK) goto out;
    if ((status = key_delete(store, txn, DB_NAME, from, strlen(from))) != CAIRN_OK) goto out;
    memcpy(record.name, to, strlen(to) + 1);
    record.modified_ns = cairn_wall_ns();
    if ((status = store_context_put(store, txn, &record, ranges, record.range_count, tail, record.tail_count)) !=
        CAIRN_OK)
        goto out;
    status = store_write_commit(store, "renaming a context", &txn);
out:
    store_write_abort(store, txn);
    cairn_free(ranges);
    cairn_free(tail);
    return status;
}
