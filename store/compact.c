/* compact.c - copies what contexts refer to into a new data directory and switches to it.
 *
 * Segments that are referred to whole keep their id, and with it their index files. Of any other segment the blocks
 * somebody refers to move together into a new one, in order: contexts that shared them still do, and the context that
 * may extend the old one (its last range ends where the segment ends) may extend the new one. New ids are above all
 * that were ever used, so an id never means another tile, in no cache and in no index file's name.
 *
 * Everything is written in key order, database after database, in transactions of 2 MiB without syncing (measured:
 * 1.1-1.7 GB/s against 0.43 durable), synced once, and only then named by the pointer file: a kill leaves the old store
 * or the new one, and perhaps a directory nobody names, which the next open removes. */
#include "store_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { COMMIT_BYTES = 2 << 20, TRIM_COMMITS = 8, BATCH_BYTES = 16 << 20, DATA_NUMBER_MAX = 999999999 };

typedef struct piece { /* blocks that stay together */
    uint64_t segment;
    uint32_t first;
    uint32_t count;
    uint32_t new_first;
} piece;

typedef struct part { /* a segment somebody refers to */
    segment_record record;
    uint64_t new_id;
    uint32_t blocks; /* that are referred to */
    uint32_t references;
    size_t first; /* pieces [first, first + n) */
    size_t n;
} part;

typedef struct compaction {
    cairn_store *store;
    cairn_snapshot *snap;
    piece *pieces; /* by segment and first block */
    size_t pieces_n, pieces_room;
    part *parts; /* by old id */
    size_t parts_n;
    uint64_t next_context, next_segment;
    store_data fresh;
    MDB_txn *txn;
    size_t pending; /* bytes in txn */
    size_t commits;
    uint64_t done, total;
    bool (*progress)(void *, uint64_t, uint64_t);
    void *arg;
} compaction;

/* ---- the plan ---- */

static cairn_status each_record(compaction *c, store_db db,
                                cairn_status (*each)(compaction *, cairn_span key, cairn_span value))
{
    const store_data *data = &c->store->env->data;
    MDB_cursor *cursor = NULL;
    MDB_val key, value;
    cairn_status st = CAIRN_OK;
    int rc = mdb_cursor_open(c->snap->txn, data->dbi[db], &cursor);
    if (rc != 0) return store_lmdb_fail(data, rc, "reading '%s'", store_db_names[db]);
    while (st == CAIRN_OK && (rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0)
        st = each(c, (cairn_span){key.mv_data, key.mv_size}, (cairn_span){value.mv_data, value.mv_size});
    mdb_cursor_close(cursor);
    if (st != CAIRN_OK || rc == MDB_NOTFOUND) return st;
    return store_lmdb_fail(data, rc, "reading '%s'", store_db_names[db]);
}

static cairn_status decode_context(compaction *c, cairn_span key, cairn_span value, context_record *out)
{
    if (key.bytes != KEY_ID_BYTES) return cairn_fail(CAIRN_CORRUPT, "a context key of %zu bytes", key.bytes);
    return store_context_decode(cairn_store_geometry(c->store), cairn_get_be64(key.data), value, out);
}

static cairn_status collect_ranges(compaction *c, cairn_span key, cairn_span value)
{
    context_record record;
    cairn_status st = decode_context(c, key, value, &record);
    if (st != CAIRN_OK) return st;
    for (uint32_t i = 0; i < record.range_count; i++) {
        cairn_range r = store_context_range(&record, i);
        if (c->pieces_n == c->pieces_room) {
            size_t room = c->pieces_room == 0 ? 64 : 2 * c->pieces_room;
            piece *bigger = cairn_grow(c->pieces, c->pieces_n * sizeof *bigger, room, sizeof *bigger);
            if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu ranges", room);
            c->pieces = bigger;
            c->pieces_room = room;
        }
        c->pieces[c->pieces_n++] = (piece){.segment = r.segment, .first = r.first, .count = r.count};
    }
    return CAIRN_OK;
}

static int by_place(const void *a, const void *b)
{
    const piece *x = a;
    const piece *y = b;
    if (x->segment != y->segment) return x->segment < y->segment ? -1 : 1;
    return x->first < y->first ? -1 : x->first > y->first;
}

/* Ranges that overlap or touch become one piece. */
static void unite(compaction *c)
{
    size_t n = 0;
    if (c->pieces_n > 1) qsort(c->pieces, c->pieces_n, sizeof *c->pieces, by_place);
    for (size_t i = 0; i < c->pieces_n; i++) {
        piece p = c->pieces[i];
        piece *last = n > 0 ? &c->pieces[n - 1] : NULL;
        uint64_t end = last != NULL ? (uint64_t)last->first + last->count : 0;
        if (last != NULL && last->segment == p.segment && p.first <= end) {
            if ((uint64_t)p.first + p.count > end) last->count = p.first + p.count - last->first;
        } else {
            c->pieces[n++] = p;
        }
    }
    c->pieces_n = n;
}

static bool whole(const compaction *c, const part *p)
{
    return p->n == 1 && c->pieces[p->first].first == 0 && p->blocks == p->record.info.blocks;
}

static cairn_status plan_parts(compaction *c)
{
    size_t n = 0;
    c->parts = cairn_alloc_array(c->pieces_n, sizeof *c->parts); /* a piece or more each */
    if (c->parts == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu segments", c->pieces_n);
    for (size_t i = 0; i < c->pieces_n; n++) {
        part *p = &c->parts[n];
        uint64_t id = c->pieces[i].segment;
        *p = (part){.first = i, .new_id = id};
        cairn_status st = store_segment_get(c->store, c->snap->txn, id, &p->record);
        if (st == CAIRN_NOT_FOUND)
            return cairn_fail(CAIRN_CORRUPT, "a context names segment %" PRIu64 ", which is not there", id);
        if (st != CAIRN_OK) return st;
        for (; i < c->pieces_n && c->pieces[i].segment == id; i++, p->n++) {
            piece *q = &c->pieces[i];
            if ((uint64_t)q->first + q->count > p->record.info.blocks)
                return cairn_fail(CAIRN_CORRUPT, "a context names blocks %u..%u of segment %" PRIu64 ", which has %u",
                                  q->first, q->first + q->count - 1, id, p->record.info.blocks);
            q->new_first = p->blocks;
            p->blocks += q->count;
        }
        if (!whole(c, p)) {
            if (id >= c->next_segment || c->next_segment == UINT64_MAX)
                return cairn_fail(CAIRN_CORRUPT, "segment %" PRIu64 ", but the next would be %" PRIu64, id,
                                  c->next_segment);
            p->new_id = c->next_segment++;
        }
    }
    c->parts_n = n;
    return CAIRN_OK;
}

static part *part_of(const compaction *c, uint64_t segment)
{
    size_t low = 0;
    size_t high = c->parts_n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (c->parts[mid].record.info.id < segment)
            low = mid + 1;
        else
            high = mid;
    }
    return low < c->parts_n && c->parts[low].record.info.id == segment ? &c->parts[low] : NULL;
}

static cairn_range moved(const compaction *c, cairn_range r, part **out)
{
    part *p = part_of(c, r.segment);
    assert(p != NULL); /* the ranges are what the parts were made of */
    size_t i = p->first;
    while (r.first >= (uint64_t)c->pieces[i].first + c->pieces[i].count) i++;
    *out = p;
    return (cairn_range){p->new_id, c->pieces[i].new_first + (r.first - c->pieces[i].first), r.count};
}

/* ---- writing ---- */

static cairn_status commit(compaction *c)
{
    if (c->txn == NULL) return CAIRN_OK;
    int rc = mdb_txn_commit(c->txn);
    c->txn = NULL;
    c->pending = 0;
    if (++c->commits % TRIM_COMMITS == 0) { /* tree pages of both, with what fault-around maps beside them */
        store_trim_data(&c->fresh);
        store_trim_data(&c->store->env->data);
    }
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(&c->fresh, rc, "compacting");
}

static cairn_status put(compaction *c, store_db db, const void *key, size_t key_bytes, cairn_span value, unsigned flags)
{
    int rc = 0;
    if (c->pending >= COMMIT_BYTES) {
        cairn_status st = commit(c);
        if (st != CAIRN_OK) return st;
    }
    if (c->txn == NULL && (rc = mdb_txn_begin(c->fresh.env, NULL, 0, &c->txn)) != 0)
        return store_lmdb_fail(&c->fresh, rc, "compacting");
    MDB_val k = {key_bytes, (void *)key};
    MDB_val v = {value.bytes, (void *)value.data};
    if ((rc = mdb_put(c->txn, c->fresh.dbi[db], &k, &v, flags)) != 0)
        return store_lmdb_fail(&c->fresh, rc, "compacting: '%s'", store_db_names[db]);
    c->pending += value.bytes + 64;
    return CAIRN_OK;
}

static cairn_status advance(compaction *c, uint64_t bytes)
{
    c->done += bytes;
    if (c->progress == NULL || c->progress(c->arg, c->done, c->total)) return CAIRN_OK;
    return cairn_fail(CAIRN_CANCELLED, "%s: compacting stopped after %" PRIu64 " of %" PRIu64 " bytes",
                      cairn_store_path(c->store), c->done, c->total);
}

static cairn_status copy_meta(compaction *c, cairn_span key, cairn_span value)
{
    uint8_t ids[IDS_RECORD_BYTES];
    if (key.bytes == 5 && memcmp(key.data, "store", 5) == 0) return CAIRN_OK; /* written when it was made */
    if (key.bytes == 3 && memcmp(key.data, "ids", 3) == 0) {
        store_ids_encode(c->next_context, c->next_segment, ids);
        value = (cairn_span){ids, sizeof ids};
    }
    return put(c, DB_META, key.data, key.bytes, value, 0);
}

static cairn_status copy_name(compaction *c, cairn_span key, cairn_span value)
{
    return put(c, DB_NAME, key.data, key.bytes, value, MDB_APPEND);
}

/* The context's ranges where they are now. It goes on extending its segment if it still ends where that ends. */
static cairn_status copy_context(compaction *c, cairn_span key, cairn_span value)
{
    context_record record;
    part *p = NULL;
    cairn_range *ranges = NULL;
    cairn_token *tail = NULL;
    uint8_t *bytes = NULL;
    cairn_status st = decode_context(c, key, value, &record);
    if (st != CAIRN_OK) return st;
    size_t size = store_context_bytes(record.name, record.range_count, record.tail_count);
    ranges = cairn_alloc_array(record.range_count, sizeof *ranges);
    tail = cairn_alloc_array(record.tail_count, sizeof *tail);
    bytes = cairn_alloc(size);
    if (size == 0 || ranges == NULL || tail == NULL || bytes == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "context '%s' of %u ranges", record.name, record.range_count);
        goto out;
    }
    uint64_t own = 0;
    for (uint32_t i = 0; i < record.range_count; i++) {
        ranges[i] = moved(c, store_context_range(&record, i), &p);
        p->references++;
        if (i + 1 == record.range_count && p->record.info.id == record.own_segment && p->record.owner == record.id &&
            ranges[i].first + ranges[i].count == p->blocks)
            own = p->new_id;
    }
    if (own == 0 && (p = part_of(c, record.own_segment)) != NULL && p->record.owner == record.id) p->record.owner = 0;
    for (uint32_t i = 0; i < record.tail_count; i++) tail[i] = store_context_tail(&record, i);
    record.own_segment = own;
    store_context_encode(&record, ranges, record.range_count, tail, record.tail_count, bytes);
    st = put(c, DB_CONTEXT, key.data, key.bytes, (cairn_span){bytes, size}, MDB_APPEND);
out:
    cairn_free(ranges);
    cairn_free(tail);
    cairn_free(bytes);
    return st;
}

/* An index of moved blocks is made anew: generation 0 says there is none yet. The kind asked for stays. */
static cairn_status write_segment(compaction *c, const part *p)
{
    uint8_t key[KEY_ID_BYTES];
    uint8_t bytes[SEGMENT_RECORD_BYTES];
    segment_record record = p->record;
    context_record owner;
    record.info.references = p->references;
    if (record.owner != 0 && (store_context_get(c->store, c->snap->txn, record.owner, &owner) != CAIRN_OK ||
                              owner.own_segment != record.info.id))
        record.owner = 0; /* it was dropped */
    record.state = record.owner != 0 ? SEGMENT_OPEN : SEGMENT_SEALED;
    if (p->new_id != record.info.id) {
        record.info = (cairn_segment_info){.id = p->new_id, .blocks = p->blocks, .references = p->references};
        memcpy(record.info.index_kind, p->record.info.index_kind, sizeof record.info.index_kind);
    }
    store_key_id(key, p->new_id);
    store_segment_encode(&record, bytes);
    return put(c, DB_SEGMENT, key, sizeof key, (cairn_span){bytes, sizeof bytes}, MDB_APPEND);
}

static cairn_status copy_tokens(compaction *c, const part *p)
{
    const cairn_geometry *g = cairn_store_geometry(c->store);
    uint8_t key[KEY_BLOCK_BYTES];
    size_t size = store_tokens_bytes(g);
    cairn_token *tokens = cairn_alloc_array(g->block_tokens, sizeof *tokens);
    uint8_t *bytes = cairn_alloc(size);
    cairn_status st = tokens != NULL && bytes != NULL ? CAIRN_OK : cairn_fail(CAIRN_NO_MEMORY, "tokens of a block");
    uint32_t number = 0;
    for (size_t i = p->first; i < p->first + p->n; i++)
        for (uint32_t b = 0; b < c->pieces[i].count && st == CAIRN_OK; b++, number++) {
            st = cairn_snapshot_tokens(c->snap, p->record.info.id, c->pieces[i].first + b, 1, tokens);
            if (st != CAIRN_OK) break;
            store_key_block(key, p->new_id, number);
            store_tokens_encode(g, p->new_id, number, tokens, bytes);
            st = put(c, DB_TOKENS, key, sizeof key, (cairn_span){bytes, size}, MDB_APPEND);
        }
    cairn_free(tokens);
    cairn_free(bytes);
    return st;
}

typedef struct landmark_copy {
    compaction *c;
    uint64_t segment;
    uint32_t number;
    uint8_t *bytes;
    size_t size;
    cairn_status st;
} landmark_copy;

static bool copy_landmark(void *arg, uint32_t block, cairn_span payload)
{
    landmark_copy *copy = arg;
    uint8_t key[KEY_BLOCK_BYTES];
    (void)block;
    store_key_block(key, copy->segment, copy->number);
    store_landmark_encode(cairn_store_geometry(copy->c->store), copy->segment, copy->number, payload.data, copy->bytes);
    copy->number++;
    copy->st = put(copy->c, DB_LANDMARK, key, sizeof key, (cairn_span){copy->bytes, copy->size}, MDB_APPEND);
    return copy->st == CAIRN_OK;
}

static cairn_status copy_landmarks(compaction *c, const part *p)
{
    size_t size = store_landmark_bytes(cairn_store_geometry(c->store));
    landmark_copy copy = {.c = c, .segment = p->new_id, .bytes = cairn_alloc(size), .size = size};
    if (copy.bytes == NULL) return cairn_fail(CAIRN_NO_MEMORY, "landmark record of %zu bytes", size);
    cairn_status st = CAIRN_OK;
    for (size_t i = p->first; i < p->first + p->n && st == CAIRN_OK; i++) {
        const piece *q = &c->pieces[i];
        st = cairn_snapshot_landmarks(c->snap, q->segment, q->first, q->count, copy_landmark, &copy);
        if (copy.st != CAIRN_OK) st = copy.st;
        if (st == CAIRN_OK) st = advance(c, (uint64_t)size * q->count);
    }
    cairn_free(copy.bytes);
    return st;
}

/* ---- tiles: one batch is read while the one before it is written ---- */

typedef struct batch {
    cairn_fetch *fetch;
    cairn_tile_id *from;
    cairn_tile_id *to;
    cairn_tile_view *views;
    size_t n;
} batch;

typedef struct tile_walk { /* over all tiles, in the order they are written */
    part **order;          /* by new id */
    size_t part, piece;    /* piece counts within the part */
    uint32_t block;        /* within the piece */
    uint32_t layer, head;
} tile_walk;

static bool next_tile(const compaction *c, tile_walk *w, cairn_tile_id *from, cairn_tile_id *to)
{
    const cairn_geometry *g = cairn_store_geometry(c->store);
    if (w->part == c->parts_n) return false;
    const part *p = w->order[w->part];
    const piece *q = &c->pieces[p->first + w->piece];
    *from = (cairn_tile_id){q->segment, q->first + w->block, (uint16_t)w->layer, (uint16_t)w->head};
    *to = (cairn_tile_id){p->new_id, q->new_first + w->block, (uint16_t)w->layer, (uint16_t)w->head};
    if (++w->head < g->kv_heads) return true;
    w->head = 0;
    if (++w->layer < g->layers) return true;
    w->layer = g->first_layer;
    if (++w->block < q->count) return true;
    w->block = 0;
    if (++w->piece < p->n) return true;
    w->piece = 0;
    w->part++;
    return true;
}

/* A damaged tile stops the whole: what is refused here would be lost, and what is copied unseen is damage kept. */
static cairn_status read_batch(compaction *c, tile_walk *w, batch *b)
{
    size_t max = cairn_fetch_batch_max(b->fetch);
    for (b->n = 0; b->n < max && next_tile(c, w, &b->from[b->n], &b->to[b->n]);) b->n++;
    return cairn_fetch_submit(b->fetch, c->snap, b->from, NULL, b->n);
}

static cairn_status write_batch(compaction *c, batch *b)
{
    uint8_t key[KEY_TILE_BYTES];
    cairn_status st = cairn_fetch_wait(b->fetch, b->views);
    uint64_t bytes = 0;
    for (size_t i = 0; i < b->n && st == CAIRN_OK; i++) {
        const cairn_tile_view *v = &b->views[i];
        size_t size = store_tile_bytes(c->fresh.page_bytes, v->dtype, v->tokens, v->head_dim);
        store_key_tile(key, b->to[i]);
        st = put(c, DB_TILE, key, sizeof key, (cairn_span){(const uint8_t *)v->keys - TILE_HEADER_BYTES, size},
                 MDB_APPEND);
        bytes += size;
    }
    return st == CAIRN_OK ? advance(c, bytes) : st;
}

static cairn_status batch_new(compaction *c, batch *b)
{
    const cairn_geometry *g = cairn_store_geometry(c->store);
    size_t page = c->store->env->data.page_bytes;
    size_t each = store_tile_bytes((uint32_t)page, g->dtype, g->block_tokens, g->head_dim) + 2 * page + 1024;
    cairn_status st = cairn_fetch_new(c->store, CAIRN_FETCH_READ, (1 << 20) + each + BATCH_BYTES, &b->fetch);
    if (st != CAIRN_OK) return st;
    size_t max = cairn_fetch_batch_max(b->fetch);
    b->from = cairn_alloc_array(max, sizeof *b->from);
    b->to = cairn_alloc_array(max, sizeof *b->to);
    b->views = cairn_alloc_array(max, sizeof *b->views);
    if (b->from != NULL && b->to != NULL && b->views != NULL) return CAIRN_OK;
    return cairn_fail(CAIRN_NO_MEMORY, "a batch of %zu tiles", max);
}

static void batch_free(batch *b)
{
    cairn_fetch_free(b->fetch);
    cairn_free(b->from);
    cairn_free(b->to);
    cairn_free(b->views);
}

static cairn_status copy_tiles(compaction *c, part **order)
{
    tile_walk walk = {.order = order, .layer = cairn_store_geometry(c->store)->first_layer};
    batch two[2] = {{0}, {0}};
    cairn_status st = batch_new(c, &two[0]);
    if (st == CAIRN_OK) st = batch_new(c, &two[1]);
    if (st == CAIRN_OK) st = read_batch(c, &walk, &two[0]);
    for (size_t turn = 0; st == CAIRN_OK && two[turn & 1].n > 0; turn++) {
        st = read_batch(c, &walk, &two[(turn + 1) & 1]);
        if (st == CAIRN_OK) st = write_batch(c, &two[turn & 1]);
    }
    batch_free(&two[0]);
    batch_free(&two[1]);
    return st;
}

/* ---- the whole ---- */

static int by_new_id(const void *a, const void *b)
{
    uint64_t x = (*(part *const *)a)->new_id;
    uint64_t y = (*(part *const *)b)->new_id;
    return x < y ? -1 : x > y;
}

static cairn_status plan(compaction *c)
{
    const cairn_geometry *g = cairn_store_geometry(c->store);
    cairn_status st = store_ids_get(c->store, c->snap->txn, &c->next_context, &c->next_segment);
    if (st != CAIRN_OK) return st;
    if ((st = each_record(c, DB_CONTEXT, collect_ranges)) != CAIRN_OK) return st;
    unite(c);
    if ((st = plan_parts(c)) != CAIRN_OK) return st;
    uint64_t tiles = (uint64_t)(g->layers - g->first_layer) * g->kv_heads;
    uint64_t block = store_landmark_bytes(g) +
                     tiles * store_tile_bytes(c->store->env->data.page_bytes, g->dtype, g->block_tokens, g->head_dim);
    for (size_t i = 0; i < c->parts_n; i++) c->total += c->parts[i].blocks * block;
    return CAIRN_OK;
}

static cairn_status copy(compaction *c)
{
    part **order = cairn_alloc_array(c->parts_n, sizeof *order);
    if (order == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu segments", c->parts_n);
    for (size_t i = 0; i < c->parts_n; i++) order[i] = &c->parts[i];
    if (c->parts_n > 0) qsort(order, c->parts_n, sizeof *order, by_new_id);
    cairn_status st = each_record(c, DB_META, copy_meta);
    if (st == CAIRN_OK) st = each_record(c, DB_NAME, copy_name);
    if (st == CAIRN_OK) st = each_record(c, DB_CONTEXT, copy_context);
    for (size_t i = 0; i < c->parts_n && st == CAIRN_OK; i++) st = write_segment(c, order[i]);
    for (size_t i = 0; i < c->parts_n && st == CAIRN_OK; i++) st = copy_tokens(c, order[i]);
    for (size_t i = 0; i < c->parts_n && st == CAIRN_OK; i++) st = copy_landmarks(c, order[i]);
    if (st == CAIRN_OK) st = copy_tiles(c, order);
    if (st == CAIRN_OK) st = commit(c);
    cairn_free(order);
    return st;
}

static bool context_is_gone(cairn_store *store, uint64_t id)
{
    MDB_txn *txn;
    context_record record;
    if (store_read_begin(store, &txn) != CAIRN_OK) return false;
    const bool gone = store_context_get(store, txn, id, &record) == CAIRN_NOT_FOUND;
    store_read_end(store, txn);
    return gone;
}

/* Index files of segments that are no more, of generations not in force, tails of contexts that are no more, and
 * half-written ones: what a killed reindex left, or a removal that a power cut undid. Nobody writes one now: we have
 * the store to ourselves. Files are named "<segment>-<generation>..." or "tail-<context>"; what is not is not ours. */
static void remove_stale_indexes(const compaction *c)
{
    char path[STORE_PATH_MAX];
    if (store_join(path, cairn_store_path(c->store), "index") != CAIRN_OK) return;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (dir == NULL && fd >= 0) close(fd);
    if (dir == NULL) return;
    for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        unsigned long long segment, generation, context;
        const bool unfinished = strstr(entry->d_name, CAIRN_UNFINISHED) != NULL;
        if (sscanf(entry->d_name, "tail-%20llu", &context) == 1 && (unfinished || context_is_gone(c->store, context)))
            unlinkat(dirfd(dir), entry->d_name, 0);
        if (sscanf(entry->d_name, "%20llu-%20llu", &segment, &generation) != 2) continue;
        const part *p = part_of(c, segment);
        if (p == NULL || p->new_id != segment || p->record.info.generation != generation || unfinished)
            unlinkat(dirfd(dir), entry->d_name, 0);
    }
    closedir(dir);
}

cairn_status cairn_store_compact(cairn_store *store, bool (*progress)(void *, uint64_t, uint64_t), void *arg)
{
    compaction c = {.store = store, .fresh = {.fd = -1}, .progress = progress, .arg = arg};
    uint32_t number = 0;
    uint32_t current = 0;
    cairn_status st = store_exclusive_begin(store);
    if (st != CAIRN_OK) return st;
    const store_data *old = &store->env->data;
    const char *path = cairn_store_path(store);
    if ((st = cairn_snapshot_begin(store, &c.snap)) != CAIRN_OK) goto out;
    if ((st = plan(&c)) != CAIRN_OK) goto out;
    number = old->number < DATA_NUMBER_MAX ? old->number + 1 : 1;
    store_data_remove(path, number); /* of a compact that failed */
    if ((st = store_data_create(path, number, &store->env->identity, old->map_bytes, true, &c.fresh)) != CAIRN_OK)
        goto out;
    store_hold_xfsz();
    st = copy(&c);
    if (c.txn != NULL) mdb_txn_abort(c.txn);
    store_release_xfsz();
    if (st != CAIRN_OK) goto out;
    cairn_snapshot_end(c.snap);
    c.snap = NULL;
    if ((st = store_data_switch(store, &c.fresh)) != CAIRN_OK) goto out;
    remove_stale_indexes(&c);
out:
    cairn_snapshot_end(c.snap);
    if (st != CAIRN_OK && number != 0 && store_current_read(path, &current) == CAIRN_OK && current != number) {
        store_data_close(&c.fresh); /* not switched to */
        store_data_remove(path, number);
    }
    store_exclusive_end(store);
    cairn_free(c.pieces);
    cairn_free(c.parts);
    return st;
}
