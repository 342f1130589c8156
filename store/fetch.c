/* fetch.c - one call takes all the tiles a step needs.
 *
 * All lookups come first: they touch tree pages only, never the tiles', and cold ones are announced (ahead.c). Then the
 * whole batch is made known before any of it is used: to the kernel's read-ahead (MAP), or as reads into the RAM tier
 * (READ). A cold batch of 128 tiles of 32 KiB took 72 ms when faulted in page by page, 7.4 when announced first, 5.4
 * with direct reads. */
#include "fetch_internal.h"
#include "store_internal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* A tile announced within HEARD_NS is taken to be resident still. A direct-mapped table of what was announced when
 * costs 10 ns a tile; announcing a resident tile again costs a system call of about 1 us. Forgetting, or a tile
 * the kernel dropped meanwhile, costs time and nothing else. */
enum { HEARD_BITS = 15, HEARD_ROOM = 1 << HEARD_BITS, ITEMS_ROUND = 64 };
static const uint64_t HEARD_NS = 2000000000;
typedef struct heard {
    uint64_t page;
    uint64_t when_ns; /* its lowest bit: by a guess, and not asked for since */
} heard;

/* Where tiles lie in the state of one commit: nine of ten that a step takes were taken by one before, and a lookup in
 * the tree costs 0.5 us of cache misses. A direct-mapped table. */
enum { PLACE_BITS = 12, PLACE_ROOM = 1 << PLACE_BITS };
typedef struct place {
    cairn_tile_id id;
    uint64_t at; /* the record, from the begin of the map */
    uint32_t bytes;
    uint32_t turn; /* of the fetch; another one's is of another commit */
} place;

/* A record whose hash was found right is not hashed again while it says the same hash: the bytes behind one are never
 * edited in place, and a page that was reused says another. A direct-mapped table by address in the map. */
enum { CHECKED_BITS = 16, CHECKED_ROOM = 1 << CHECKED_BITS };
typedef struct checked {
    const void *record;
    uint64_t hash; /* in its header */
} checked;

typedef struct item { /* one tile of the batch, in the caller's order */
    cairn_tile_id id;
    const void *record; /* MAP */
    uint32_t bytes;     /* MAP */
    uint32_t slot;      /* READ */
} item;

typedef struct range { /* where one of them lies in the file */
    uint64_t offset;   /* whole pages */
    uint32_t bytes;
    uint32_t item;
} range;

/* What a tile of the batch costs beside its slot (READ). */
enum { BATCH_TILE_COST = sizeof(item) + sizeof(range) + sizeof(read_job) + sizeof(struct iovec) };

struct cairn_fetch {
    cairn_store *store;
    cairn_fetch_mode mode;
    uint32_t data_number; /* of the data directory the reader reads: compact makes a new one */
    bool submitted;
    bool ahead;       /* the batch in flight is a guess, */
    size_t ahead_txn; /* made in the snapshot of this commit */
    uint64_t ram_bytes;
    reader *reader;
    tier *tier;
    size_t slot_bytes;
    heard *heard;
    place *places;
    uint64_t places_txn; /* whose turn it is */
    uint32_t places_data, turn;
    checked *checked; /* of a store whose reads are verified */
    store_leaves *leaves;
    item *items;
    range *ranges;
    read_job *jobs;
    struct iovec *pieces;
    size_t room; /* tiles these four have room for */
    size_t items_n;
    size_t ranges_n; /* distinct tiles to be read, in file order */
    size_t jobs_n;
    cairn_fetch_stats stats;
    char reason[256];
};

/* ---- tree pages in our memory ---- */

void store_trim_data(const store_data *data)
{
    madvise((void *)data->base, data->map_bytes, MADV_DONTNEED);
}

void store_trim_map(cairn_store *store)
{
    enum { LOOKS = 128 };
    static atomic_uint looks;
    if (atomic_fetch_add_explicit(&looks, 1, memory_order_relaxed) % LOOKS == LOOKS - 1) store_trim_grown_map(store);
}

void store_trim_grown_map(cairn_store *store)
{
    enum { GROWTH = 8 << 20 };
    static atomic_uint_fast64_t after_last; /* what mapped files held, all of them */
    uint64_t now = cairn_file_rss_bytes();
    uint64_t then = atomic_load(&after_last);
    if (now >= then && now - then <= GROWTH) return;
    if (now > then) {
        store_trim_data(&store->env->data);
        now = cairn_file_rss_bytes();
    }
    atomic_store(&after_last, now);
}

/* ---- life ---- */

static cairn_status open_reader(cairn_fetch *f)
{
    const store_data *data = &f->store->env->data;
    cairn_status st = reader_open(data->fd, &f->reader);
    if (st != CAIRN_OK) return st;
    f->data_number = data->number;
    return CAIRN_OK;
}

static size_t fixed_bytes(const cairn_fetch *f)
{
    return sizeof *f + reader_ram_bytes(f->reader) + ITEMS_ROUND * BATCH_TILE_COST;
}

static cairn_status too_small(const cairn_fetch *f, uint64_t ram_bytes)
{
    return cairn_fail(CAIRN_NO_MEMORY, "a RAM tier of %" PRIu64 " bytes holds no tile of %zu; it needs %zu", ram_bytes,
                      f->slot_bytes, fixed_bytes(f) + f->slot_bytes + 4096);
}

static cairn_status new_tier(cairn_fetch *f, uint64_t ram_bytes)
{
    cairn_status st = open_reader(f);
    if (st != CAIRN_OK) return st;
    size_t fixed = fixed_bytes(f);
    st = tier_new(f->slot_bytes, BATCH_TILE_COST, ram_bytes > fixed ? ram_bytes - fixed : 0, &f->tier);
    if (st == CAIRN_OK && tier_capacity(f->tier) == 0) st = too_small(f, ram_bytes);
    f->ram_bytes = ram_bytes;
    return st;
}

static const char *mib(uint64_t bytes, char text[32])
{
    snprintf(text, 32, "%.1f MiB", (double)bytes / (1 << 20));
    return text;
}

static cairn_fetch_mode choose(cairn_fetch *f, cairn_fetch_mode mode, uint64_t ram_bytes)
{
    char file_text[32];
    char free_text[32];
    char tier_text[32];
    struct stat st;
    if (mode != CAIRN_FETCH_AUTO) {
        snprintf(f->reason, sizeof f->reason, "%s was asked for", mode == CAIRN_FETCH_MAP ? "map" : "read");
        return mode;
    }
    uint64_t file_bytes = fstat(f->store->env->data.fd, &st) == 0 ? (uint64_t)st.st_size : UINT64_MAX;
    uint64_t free_bytes = cairn_free_ram_bytes();
    bool fits = file_bytes <= free_bytes / 2;
    mode = fits ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
    if (fits)
        snprintf(f->reason, sizeof f->reason, "map: the data file of %s fits in half of the free memory of %s",
                 mib(file_bytes, file_text), mib(free_bytes, free_text));
    else
        snprintf(f->reason, sizeof f->reason,
                 "read: the data file of %s is more than half of the free memory of %s; RAM tier of %s",
                 mib(file_bytes, file_text), mib(free_bytes, free_text), mib(ram_bytes, tier_text));
    return mode;
}

cairn_status cairn_fetch_new(cairn_store *store, cairn_fetch_mode mode, uint64_t ram_bytes, cairn_fetch **out)
{
    assert(store != NULL);
    const cairn_geometry *g = cairn_store_geometry(store);
    uint32_t page = store->env->data.page_bytes;
    *out = NULL;
    cairn_fetch *f = cairn_calloc(1, sizeof *f);
    if (f == NULL) return cairn_fail(CAIRN_NO_MEMORY, "fetch");
    f->store = store;
    f->mode = choose(f, mode, ram_bytes);
    f->leaves = store_leaves_new(store); /* NULL: none are announced */
    size_t record = store_tile_bytes(page, g->dtype, g->block_tokens, g->head_dim);
    f->slot_bytes = (STORE_PAGE_HEADER + record + page - 1) / page * page;
    cairn_status st = CAIRN_OK;
    if (f->mode == CAIRN_FETCH_READ) {
        st = new_tier(f, ram_bytes);
        if (st == CAIRN_OK) {
            size_t n = strlen(f->reason);
            snprintf(f->reason + n, sizeof f->reason - n, " (%s)", reader_name(f->reader));
        }
    } else if ((f->heard = cairn_calloc(HEARD_ROOM, sizeof *f->heard)) == NULL ||
               (f->places = cairn_calloc(PLACE_ROOM, sizeof *f->places)) == NULL ||
               (store->verify_reads && (f->checked = cairn_calloc(CHECKED_ROOM, sizeof *f->checked)) == NULL)) {
        st = cairn_fail(CAIRN_NO_MEMORY, "fetch: tables of announced tiles");
    }
    if (st != CAIRN_OK) {
        cairn_fetch_free(f);
        return st;
    }
    *out = f;
    return CAIRN_OK;
}

void cairn_fetch_free(cairn_fetch *f)
{
    if (f == NULL) return;
    reader_close(f->reader); /* waits for what is in flight, before its memory goes */
    tier_free(f->tier);
    cairn_free(f->heard);
    cairn_free(f->places);
    cairn_free(f->checked);
    store_leaves_free(f->leaves);
    cairn_free(f->items);
    cairn_free(f->ranges);
    cairn_free(f->jobs);
    cairn_free(f->pieces);
    cairn_free(f);
}

cairn_fetch_mode cairn_fetch_mode_used(const cairn_fetch *f)
{
    return f->mode;
}
const char *cairn_fetch_reason(const cairn_fetch *f)
{
    return f->reason;
}
size_t cairn_fetch_batch_max(const cairn_fetch *f)
{
    return f->mode == CAIRN_FETCH_MAP ? SIZE_MAX : tier_capacity(f->tier);
}

void cairn_fetch_stats_get(const cairn_fetch *f, cairn_fetch_stats *out)
{
    *out = f->stats;
    if (f->mode == CAIRN_FETCH_MAP) return;
    size_t batch = f->room > ITEMS_ROUND ? (f->room - ITEMS_ROUND) * BATCH_TILE_COST : 0;
    out->evicted_tiles = tier_evicted(f->tier);
    out->ram_bytes = fixed_bytes(f) + batch + tier_ram_bytes(f->tier);
}

/* ---- a batch ---- */

static void free_batch(cairn_fetch *f)
{
    cairn_free(f->items);
    cairn_free(f->ranges);
    cairn_free(f->jobs);
    cairn_free(f->pieces);
    f->items = NULL;
    f->ranges = NULL;
    f->jobs = NULL;
    f->pieces = NULL;
    f->room = 0;
}

static cairn_status batch_room(cairn_fetch *f, size_t n)
{
    size_t max = cairn_fetch_batch_max(f);
    if (n <= f->room) return CAIRN_OK;
    free_batch(f); /* first, so that old and new never add up */
    if (n < SIZE_MAX - ITEMS_ROUND) n = (n + ITEMS_ROUND - 1) / ITEMS_ROUND * ITEMS_ROUND;
    if (n > max && max > ITEMS_ROUND) n = max;
    f->items = cairn_alloc_array(n, sizeof *f->items);
    f->ranges = cairn_alloc_array(n, sizeof *f->ranges);
    bool ok = f->items != NULL && f->ranges != NULL;
    if (f->mode == CAIRN_FETCH_READ) {
        f->jobs = cairn_alloc_array(n, sizeof *f->jobs);
        f->pieces = cairn_alloc_array(n, sizeof *f->pieces);
        ok = ok && f->jobs != NULL && f->pieces != NULL;
    }
    if (ok) {
        f->room = n;
        return CAIRN_OK;
    }
    free_batch(f);
    return cairn_fail(CAIRN_NO_MEMORY, "a batch of %zu tiles", n);
}

static cairn_status locate(cairn_fetch *f, cairn_snapshot *snap, cairn_tile_id id, cairn_span *record, range *out)
{
    uint64_t offset = 0;
    size_t bytes = 0;
    cairn_status st = store_locate(snap, id, record);
    if (st == CAIRN_NOT_FOUND)
        return cairn_fail(st, "%s: no tile segment %" PRIu64 " block %u layer %u head %u", cairn_store_path(f->store),
                          id.segment, (unsigned)id.block, (unsigned)id.layer, (unsigned)id.head);
    if (st != CAIRN_OK) return st;
    if (!store_file_offset(f->store, *record, &offset, &bytes) || bytes > f->slot_bytes)
        return cairn_fail(CAIRN_CORRUPT,
                          "%s: segment %" PRIu64 " block %u layer %u head %u: record of %zu bytes at page %" PRIu64
                          ", tiles of this store have %zu",
                          cairn_store_path(f->store), id.segment, (unsigned)id.block, (unsigned)id.layer,
                          (unsigned)id.head, record->bytes, offset / f->store->env->data.page_bytes,
                          f->slot_bytes - STORE_PAGE_HEADER);
    out->offset = offset;
    out->bytes = (uint32_t)bytes;
    return CAIRN_OK;
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = ((const range *)a)->offset;
    uint64_t y = ((const range *)b)->offset;
    return x < y ? -1 : x > y;
}

/* ---- MAP ---- */

static void announce(cairn_fetch *f)
{
    int fd = f->store->env->data.fd;
    if (f->ranges_n > 1) qsort(f->ranges, f->ranges_n, sizeof *f->ranges, by_offset);
    for (size_t i = 0, next; i < f->ranges_n; i = next) {
        uint64_t end = f->ranges[i].offset + f->ranges[i].bytes;
        for (next = i + 1; next < f->ranges_n && f->ranges[next].offset <= end; next++)
            if (f->ranges[next].offset == end) end += f->ranges[next].bytes; /* else the same tile again */
        posix_fadvise(fd, (off_t)f->ranges[i].offset, (off_t)(end - f->ranges[i].offset), POSIX_FADV_WILLNEED);
    }
}

/* True if the tile was announced a moment ago; it counts as announced from here on. */
static bool was_heard(cairn_fetch *f, const range *at, uint64_t now)
{
    uint64_t number = at->offset / f->store->env->data.page_bytes;
    heard *h = &f->heard[number * 0x9e3779b97f4a7c15u >> (64 - HEARD_BITS)];
    bool known = h->page == number && h->when_ns != 0 && now - h->when_ns < HEARD_NS;
    if (known && !f->ahead) {
        f->stats.ahead_used += h->when_ns & 1;
        h->when_ns &= ~UINT64_C(1);
    }
    if (!known) *h = (heard){number, (now & ~UINT64_C(1)) | f->ahead};
    return known;
}

static void begin_turn(cairn_fetch *f, const cairn_snapshot *snap)
{
    const uint64_t txn = mdb_txn_id(snap->txn);
    const uint32_t number = f->store->env->data.number;
    if (f->turn != 0 && f->places_txn == txn && f->places_data == number) return;
    f->places_txn = txn;
    f->places_data = number;
    if (++f->turn != 0) return;
    memset(f->places, 0, PLACE_ROOM * sizeof *f->places);
    f->turn = 1;
}

/* locate, of a tile that may have been located in this turn. */
static cairn_status locate_again(cairn_fetch *f, cairn_snapshot *snap, cairn_tile_id id, cairn_span *record, range *out)
{
    const uint8_t *base = (const uint8_t *)f->store->env->data.base;
    place *p = &f->places[tile_mix(id) >> (64 - PLACE_BITS)];
    size_t bytes;
    if (p->turn == f->turn && same_tile(p->id, id) && snap->txn != NULL) {
        *record = (cairn_span){base + p->at, p->bytes};
        if (store_file_offset(f->store, *record, &out->offset, &bytes)) {
            out->bytes = (uint32_t)bytes;
            return CAIRN_OK;
        }
    }
    cairn_status st = locate(f, snap, id, record, out);
    if (st == CAIRN_OK)
        *p = (place){id, (uint64_t)((const uint8_t *)record->data - base), (uint32_t)record->bytes, f->turn};
    return st;
}

static cairn_status submit_map(cairn_fetch *f, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n)
{
    uint64_t now = cairn_now_ns();
    f->ranges_n = 0;
    begin_turn(f, snap);
    store_leaves_announce(f->leaves, snap, ids, n);
    for (size_t i = 0; i < n; i++) {
        cairn_span record;
        range at = {0};
        cairn_status st = locate_again(f, snap, ids[i], &record, &at);
        if (st != CAIRN_OK) return st;
        f->items[i] = (item){.id = ids[i], .record = record.data, .bytes = (uint32_t)record.bytes};
        if (!was_heard(f, &at, now)) f->ranges[f->ranges_n++] = at;
    }
    announce(f);
    if (f->ahead) return CAIRN_OK;
    for (size_t i = 0; i < n; i++) f->stats.map_bytes += f->items[i].bytes;
    return CAIRN_OK;
}

static cairn_status check_mapped(cairn_fetch *f, const item *it, cairn_tile_view *view)
{
    if (f->checked == NULL || it->bytes < TILE_HEADER_BYTES)
        return store_tile_check(f->store, it->id, it->record, it->bytes, false, view);
    checked *c = &f->checked[(uint64_t)(uintptr_t)it->record * 0x9e3779b97f4a7c15u >> (64 - CHECKED_BITS)];
    uint64_t hash = cairn_get_le64((const uint8_t *)it->record + TILE_HASH);
    bool known = c->record == it->record && c->hash == hash;
    cairn_status st = store_tile_check(f->store, it->id, it->record, it->bytes, !known, view);
    if (st == CAIRN_OK) *c = (checked){it->record, hash};
    return st;
}

static cairn_status wait_map(cairn_fetch *f, cairn_tile_view *views)
{
    for (size_t i = 0; i < f->items_n; i++) {
        cairn_status st = check_mapped(f, &f->items[i], &views[i]);
        if (st != CAIRN_OK) return st;
    }
    return CAIRN_OK;
}

/* ---- READ ---- */

/* A guess weighs nothing. */
static float mass_of(const cairn_fetch *f, const float *mass, size_t i)
{
    return f->ahead ? 0 : mass != NULL ? mass[i] : 1.0f;
}

/* Every range gets a slot, and tiles that follow one another in the file become one read. */
static cairn_status plan_reads(cairn_fetch *f, const cairn_tile_id *ids, const float *mass, cairn_fetch_stats *now)
{
    size_t kept = 0;
    f->jobs_n = 0;
    if (f->ranges_n > 1) qsort(f->ranges, f->ranges_n, sizeof *f->ranges, by_offset);
    for (size_t i = 0; i < f->ranges_n; i++) {
        range r = f->ranges[i];
        item *it = &f->items[r.item];
        float m = mass_of(f, mass, r.item);
        if (kept > 0 && f->ranges[kept - 1].offset == r.offset) { /* the same tile, named twice */
            it->slot = tier_find(f->tier, ids[r.item], m);
            now->tier_tiles++;
            now->tier_bytes += tier_record_of(f->tier, it->slot)->bytes;
            continue;
        }
        uint32_t bytes = it->bytes;
        it->slot = tier_take(f->tier, ids[r.item], m);
        if (it->slot == TIER_NONE) {
            for (size_t k = 0; k < kept; k++) tier_drop(f->tier, f->items[f->ranges[k].item].slot);
            return cairn_fail(CAIRN_NO_MEMORY, "RAM tier of %" PRIu64 " bytes: the system gave no more memory",
                              f->ram_bytes);
        }
        *tier_record_of(f->tier, it->slot) =
            (tier_record){.offset = STORE_PAGE_HEADER, .bytes = bytes, .ahead = f->ahead};
        f->ranges[kept] = r;
        f->pieces[kept] = (struct iovec){tier_data(f->tier, it->slot), r.bytes};
        read_job *job = f->jobs_n > 0 ? &f->jobs[f->jobs_n - 1] : NULL;
        if (job != NULL && job->offset + job->bytes == r.offset && job->n_pieces < READER_JOB_PIECES) {
            job->bytes += r.bytes;
            job->n_pieces++;
        } else {
            f->jobs[f->jobs_n++] = (read_job){.pieces = &f->pieces[kept],
                                              .n_pieces = 1,
                                              .first = (uint32_t)kept,
                                              .offset = r.offset,
                                              .bytes = r.bytes};
        }
        now->read_bytes += r.bytes;
        kept++;
    }
    f->ranges_n = kept;
    return CAIRN_OK;
}

/* Waits for what is in flight and checks it. Whatever is not right leaves the tier, and the first of it, in the order
 * of the file, is the answer. */
static cairn_status land(cairn_fetch *f)
{
    cairn_status answer = CAIRN_OK;
    cairn_tile_view view;
    for (read_job *job; (job = reader_next(f->reader)) != NULL;) {
        uint64_t end = 0;
        for (uint32_t k = 0; k < job->n_pieces; k++) {
            uint32_t slot = f->items[f->ranges[job->first + k].item].slot;
            tier_record *rec = tier_record_of(f->tier, slot);
            end += job->pieces[k].iov_len;
            rec->loaded = job->done >= end && store_tile_check(f->store, tier_id(f->tier, slot),
                                                               (const uint8_t *)tier_data(f->tier, slot) + rec->offset,
                                                               rec->bytes, true, &view) == CAIRN_OK;
        }
    }
    for (size_t j = 0; j < f->jobs_n; j++) {
        const read_job *job = &f->jobs[j];
        uint64_t end = 0;
        for (uint32_t k = 0; k < job->n_pieces; k++) {
            uint32_t slot = f->items[f->ranges[job->first + k].item].slot;
            tier_record rec = *tier_record_of(f->tier, slot);
            cairn_tile_id id = tier_id(f->tier, slot);
            end += job->pieces[k].iov_len;
            if (rec.loaded) continue;
            const char *path = f->store->env->data.path;
            uint64_t at = job->offset + job->done;
            if (answer != CAIRN_OK) {
            } else if (job->done >= end) {
                answer = store_tile_check(f->store, id, (const uint8_t *)tier_data(f->tier, slot) + rec.offset,
                                          rec.bytes, true, &view);
            } else if (job->error != 0) {
                answer = cairn_fail_errno(job->error,
                                          "%s/data.mdb: reading %" PRIu64 " bytes at %" PRIu64 " (segment %" PRIu64
                                          " block %u layer %u head %u)",
                                          path, job->bytes - job->done, at, id.segment, (unsigned)id.block,
                                          (unsigned)id.layer, (unsigned)id.head);
                if (answer == CAIRN_NOT_FOUND) answer = CAIRN_IO;
            } else {
                answer = cairn_fail(CAIRN_IO,
                                    "%s/data.mdb: the file ends at %" PRIu64 ", segment %" PRIu64
                                    " block %u layer %u head %u needs it up to %" PRIu64,
                                    path, at, id.segment, (unsigned)id.block, (unsigned)id.layer, (unsigned)id.head,
                                    job->offset + end);
            }
            tier_drop(f->tier, slot);
        }
    }
    f->jobs_n = 0;
    f->ranges_n = 0;
    return answer;
}

/* Nobody waited for this batch. What it read may be of a snapshot that has ended, whose pages may hold another tile by
 * now: none of it is kept. */
static void abandon(cairn_fetch *f)
{
    while (reader_next(f->reader) != NULL) {}
    for (size_t i = 0; i < f->ranges_n; i++) tier_drop(f->tier, f->items[f->ranges[i].item].slot);
    f->jobs_n = 0;
    f->ranges_n = 0;
}

static cairn_status submit_read(cairn_fetch *f, cairn_snapshot *snap, const cairn_tile_id *ids, const float *mass,
                                size_t n)
{
    cairn_fetch_stats now = f->stats; /* in force once nothing can fail any more */
    cairn_status st = CAIRN_OK;
    f->ranges_n = 0;
    store_leaves_announce(f->leaves, snap, ids, n);
    for (size_t i = 0; i < n; i++) {
        item *it = &f->items[i];
        it->slot = tier_find(f->tier, ids[i], mass_of(f, mass, i));
        if (it->slot != TIER_NONE) {
            tier_record *known = tier_record_of(f->tier, it->slot);
            if (f->ahead) continue;
            now.tier_tiles++;
            now.tier_bytes += known->bytes;
            now.ahead_used += known->ahead;
            known->ahead = false;
            continue;
        }
        cairn_span record;
        range *r = &f->ranges[f->ranges_n++];
        r->item = (uint32_t)i;
        if ((st = locate(f, snap, ids[i], &record, r)) != CAIRN_OK) return st;
        it->bytes = (uint32_t)record.bytes;
        store_trim_map(f->store);
    }
    if ((st = plan_reads(f, ids, mass, &now)) != CAIRN_OK) return st;
    f->stats = now;
    reader_start(f->reader, f->jobs, f->jobs_n);
    return CAIRN_OK;
}

static cairn_status wait_read(cairn_fetch *f, cairn_tile_view *views)
{
    cairn_status st = land(f);
    for (size_t i = 0; i < f->items_n && st == CAIRN_OK; i++) {
        uint32_t slot = f->items[i].slot;
        tier_record rec = *tier_record_of(f->tier, slot);
        const uint8_t *record = (const uint8_t *)tier_data(f->tier, slot) + rec.offset;
        st = store_tile_check(f->store, tier_id(f->tier, slot), record, rec.bytes, false, &views[i]);
    }
    return st;
}

/* ---- both ---- */

/* Ends the batch before: nothing in flight, nothing pinned. What a guess read stays if it is of snap's commit. */
static cairn_status settle(cairn_fetch *f, cairn_snapshot *snap)
{
    const bool guessed = f->ahead && snap != NULL && mdb_txn_id(snap->txn) == f->ahead_txn;
    f->submitted = false;
    f->ahead = false;
    if (f->mode == CAIRN_FETCH_MAP) return CAIRN_OK;
    if (f->jobs_n > 0 && guessed)
        (void)land(f); /* what could not be read has left the tier, and is read again if it is asked for */
    else if (f->jobs_n > 0)
        abandon(f);
    tier_unpin(f->tier);
    if (f->data_number == f->store->env->data.number) return CAIRN_OK;
    /* Compacted meanwhile. Tiles in the tier stay right: an id never means another tile. */
    reader_close(f->reader);
    f->reader = NULL;
    return open_reader(f);
}

cairn_status cairn_fetch_submit(cairn_fetch *f, cairn_snapshot *snap, const cairn_tile_id *ids, const float *mass,
                                size_t n)
{
    assert(f != NULL && snap != NULL && snap->store->env == f->store->env);
    assert(ids != NULL || n == 0);
    cairn_status st = settle(f, snap);
    if (st != CAIRN_OK) return st;
    if (n > cairn_fetch_batch_max(f))
        return cairn_fail(CAIRN_INVALID, "a batch of %zu tiles; the RAM tier of %" PRIu64 " bytes holds %zu", n,
                          f->ram_bytes, cairn_fetch_batch_max(f));
    if ((st = batch_room(f, n)) != CAIRN_OK) return st;
    f->items_n = n;
    st = f->mode == CAIRN_FETCH_MAP ? submit_map(f, snap, ids, n) : submit_read(f, snap, ids, mass, n);
    if (st != CAIRN_OK) {
        f->jobs_n = 0;
        return st;
    }
    f->stats.tiles += n;
    f->submitted = true;
    return CAIRN_OK;
}

cairn_status cairn_fetch_wait(cairn_fetch *f, cairn_tile_view *views)
{
    if (!f->submitted) return cairn_fail(CAIRN_INVALID, "fetch: no batch was submitted");
    uint64_t start = cairn_now_ns();
    cairn_status st = f->mode == CAIRN_FETCH_MAP ? wait_map(f, views) : wait_read(f, views);
    f->stats.wait_ns += cairn_now_ns() - start;
    if (st != CAIRN_OK) f->submitted = false;
    return st;
}

void cairn_fetch_ahead(cairn_fetch *f, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n)
{
    assert(f != NULL && snap != NULL && snap->store->env == f->store->env);
    assert(ids != NULL || n == 0);
    if (settle(f, snap) != CAIRN_OK) return;
    if (n > cairn_fetch_batch_max(f) / 2) n = cairn_fetch_batch_max(f) / 2; /* leaves half to what is known to matter */
    if (n == 0 || batch_room(f, n) != CAIRN_OK) return;
    f->items_n = n;
    f->ahead = true;
    f->ahead_txn = mdb_txn_id(snap->txn);
    cairn_status st = f->mode == CAIRN_FETCH_MAP ? submit_map(f, snap, ids, n) : submit_read(f, snap, ids, NULL, n);
    if (st != CAIRN_OK)
        f->jobs_n = 0;
    else
        f->stats.ahead_tiles += f->ranges_n;
    if (f->mode == CAIRN_FETCH_MAP) f->ahead = false;
}

cairn_status cairn_fetch_set_ram(cairn_fetch *f, uint64_t ram_bytes)
{
    if (f->mode == CAIRN_FETCH_MAP) return CAIRN_OK;
    cairn_status st = settle(f, NULL);
    if (st != CAIRN_OK) return st;
    size_t fixed = fixed_bytes(f);
    if (ram_bytes < fixed + f->slot_bytes + 4096) return too_small(f, ram_bytes);
    if (ram_bytes < f->ram_bytes) free_batch(f);
    tier_resize(f->tier, ram_bytes - fixed);
    f->ram_bytes = ram_bytes;
    return CAIRN_OK;
}
