/* ahead.c - tree pages that are about to be read from a cold file: of landmark records, and of a batch's tiles.
 *
 * A session reads the landmark records of all its blocks before it can answer. They lie in leaf pages strewn among the
 * tiles, and LMDB runs without read-ahead: page by page, a cold million tokens of the demo model took 0.6 s for 22 MB.
 * The branch pages above, a hundredth of that, say which leaves will be needed; they are announced to the kernel, many
 * at a time, so that the disk's queue is full. Records too large for a leaf (32 layers: 64 KiB) are looked up first,
 * which touches tree pages only, and announced as a window before they are read.
 *
 * The tiles of a step are looked up one by one, each in a leaf of its own: a cold token of a million took 96 reads of a
 * page, one after the other, 4 of its 6 ms. The branch pages say which leaves they will be, before the first lookup.
 *
 * All of this is a hint. What cannot be found out is not announced, and read as before. */
#include "pages.h"
#include "store_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    LEAF_BYTES = 16 << 20,  /* announced before they are read */
    LARGE_BYTES = 16 << 20, /* likewise, of records beside the leaves */
    SAMPLES = 32,           /* pages that are asked whether they are cold */

    GROUP_BLOCKS = 8, /* whose tiles are taken to lie in one leaf */
    SEEN_BITS = 12,   /* groups remembered */
    BATCH_MOST = 128, /* leaves asked about at a time */
    BRANCHES_MOST = 1024,
    PAUSE_MOST = 256 /* batches */
};

struct store_ahead {
    const cairn_store *store;
    cairn_snapshot *snap;
    uint64_t segment;
    uint32_t first, end; /* blocks [first, end) */
    uint32_t window;     /* large records announced at a time; 0 = there are none, or nobody looked yet */
    uint32_t announced;
    bool looked;
    size_t next; /* leaf to be announced */
    size_t n, room;
    struct {
        uint64_t page;
        uint32_t block; /* of its first key */
    } * leaves;
};

static bool is_cold(const store_data *data, uint64_t offset)
{
    unsigned char resident = 1;
    if (offset + data->page_bytes > data->map_bytes) return false;
    return mincore((void *)(uintptr_t)(data->base + offset), data->page_bytes, &resident) == 0 && (resident & 1) == 0;
}

/* The trees of the snapshot's state. */
static bool trees_at(const cairn_snapshot *snap, page_file *file, page_tree trees[DB_COUNT])
{
    const store_data *data = &snap->store->env->data;
    return page_file_peek(data->fd, data->path, file) == CAIRN_OK &&
           page_file_at(file, mdb_txn_id(snap->txn)) == CAIRN_OK && store_trees(file, trees, NULL, NULL) == CAIRN_OK;
}

static void announce_run(const store_data *data, uint64_t from, uint64_t end) /* pages */
{
    posix_fadvise(data->fd, (off_t)(from * data->page_bytes), (off_t)((end - from) * data->page_bytes),
                  POSIX_FADV_WILLNEED);
}

static bool take_leaf(void *arg, cairn_span key, uint64_t page)
{
    store_ahead *a = arg;
    if (a->n == a->room) {
        size_t room = a->room == 0 ? 64 : 2 * a->room;
        void *leaves = cairn_grow(a->leaves, a->n * sizeof *a->leaves, room, sizeof *a->leaves);
        if (leaves == NULL) return false;
        a->leaves = leaves;
        a->room = room;
    }
    a->leaves[a->n].page = page; /* the first leaf may begin with another segment's keys */
    a->leaves[a->n].block = a->n == 0 || key.bytes != KEY_BLOCK_BYTES
                                ? a->first
                                : cairn_get_be32((const uint8_t *)key.data + KEY_BLOCK_BYTES - 4);
    a->n++;
    return true;
}

static void find_leaves(store_ahead *a, uint32_t first)
{
    const store_data *data = &a->store->env->data;
    page_file file;
    page_tree trees[DB_COUNT];
    uint8_t low[KEY_BLOCK_BYTES], high[KEY_BLOCK_BYTES];
    store_key_block(low, a->segment, first);
    store_key_block(high, a->segment, a->end - 1);
    if (!trees_at(a->snap, &file, trees) ||
        page_leaves(&file, store_db_names[DB_LANDMARK], &trees[DB_LANDMARK], (cairn_span){low, sizeof low},
                    (cairn_span){high, sizeof high}, take_leaf, a) != CAIRN_OK)
        a->n = 0;
    bool cold = false;
    for (size_t i = 0; i < SAMPLES && a->n != 0 && !cold; i++)
        cold = is_cold(data, a->leaves[i * (a->n - 1) / (SAMPLES - 1)].page * data->page_bytes);
    if (!cold) a->n = 0;
}

store_ahead *store_ahead_new(cairn_snapshot *snap, uint64_t segment, uint32_t first, uint32_t count)
{
    store_ahead *a = count > SAMPLES ? cairn_calloc(1, sizeof *a) : NULL; /* a few are as well read at once */
    if (a == NULL) return NULL;
    *a = (store_ahead){.store = snap->store, .snap = snap, .segment = segment, .first = first, .end = first + count};
    find_leaves(a, first);
    return a;
}

void store_ahead_free(store_ahead *a)
{
    if (a == NULL) return;
    cairn_free(a->leaves);
    cairn_free(a);
}

/* Large records [block, block + window), unless the first of them is in memory. */
static void announce_large(store_ahead *a, uint32_t block)
{
    const store_data *data = &a->store->env->data;
    const uint32_t end = a->end - block < a->window ? a->end : block + a->window;
    for (uint32_t i = block; i < end; i++) {
        uint8_t key[KEY_BLOCK_BYTES];
        cairn_span record;
        uint64_t offset;
        size_t bytes;
        store_key_block(key, a->segment, i);
        if (store_get(a->store, a->snap->txn, a->snap->file_bytes, DB_LANDMARK, key, sizeof key, &record) != CAIRN_OK ||
            !store_file_offset(a->store, record, &offset, &bytes))
            break;
        if (i == block && !is_cold(data, offset + data->page_bytes)) break;
        posix_fadvise(data->fd, (off_t)offset, (off_t)bytes, POSIX_FADV_WILLNEED);
    }
    a->announced = end;
}

void store_ahead_at(store_ahead *a, uint32_t block)
{
    if (a == NULL) return;
    const store_data *data = &a->store->env->data;
    /* The leaf of `block` and LEAF_BYTES more. */
    size_t most = LEAF_BYTES / data->page_bytes;
    while (a->next < a->n && (a->next < most || a->leaves[a->next - most].block <= block)) {
        uint64_t from = a->leaves[a->next].page, to = from + 1;
        for (a->next++; a->next < a->n && a->leaves[a->next].page == to; a->next++) to++;
        announce_run(data, from, to);
    }
    if (a->window != 0 && block >= a->announced) announce_large(a, block);
}

void store_ahead_seen(store_ahead *a, uint32_t block, size_t record_bytes)
{
    if (a == NULL || a->looked) return;
    a->looked = true;
    if (record_bytes <= a->store->env->data.page_bytes / 2) return; /* LMDB keeps it in the leaf */
    a->window = (uint32_t)(LARGE_BYTES / record_bytes);
    a->announced = block + 1;
}

/* ---- lookups of tiles ---- */

/* Where nothing is cold, asking costs some microseconds a group: each is asked about once while it is remembered, and
 * after a batch whose leaves were all in memory the next ones are let pass, twice as many each time. */
struct store_leaves {
    const cairn_store *store;
    uint64_t txn; /* whose trees these are */
    uint32_t data_number;
    bool known, usable, begun;
    page_file file;
    page_tree tree;
    uint32_t pause, left; /* batches let pass; of them still to come */
    uint64_t seen[1 << SEEN_BITS];
};

typedef struct page_list {
    uint64_t page[BRANCHES_MOST];
    size_t n, room;
} page_list;

static bool take_page(void *arg, cairn_span key, uint64_t page)
{
    page_list *list = arg;
    (void)key;
    list->page[list->n++] = page;
    return list->n < list->room;
}

static int by_number(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void announce_pages(const store_data *data, page_list *list)
{
    qsort(list->page, list->n, sizeof *list->page, by_number);
    for (size_t i = 0, next; i < list->n; i = next) {
        uint64_t end = list->page[i] + 1;
        for (next = i + 1; next < list->n && list->page[next] <= end; next++) end = list->page[next] + 1;
        announce_run(data, list->page[i], end);
    }
}

store_leaves *store_leaves_new(const cairn_store *store)
{
    store_leaves *l = cairn_calloc(1, sizeof *l);
    if (l != NULL) l->store = store;
    return l;
}

void store_leaves_free(store_leaves *leaves)
{
    cairn_free(leaves);
}

static bool trees_of(store_leaves *l, cairn_snapshot *snap)
{
    const store_data *data = &l->store->env->data;
    page_tree trees[DB_COUNT] = {0};
    const uint64_t txn = mdb_txn_id(snap->txn);
    if (l->known && l->txn == txn && l->data_number == data->number) return l->usable;
    l->known = true;
    l->usable = trees_at(snap, &l->file, trees);
    l->txn = txn;
    l->data_number = data->number;
    l->tree = trees[DB_TILE];
    return l->usable;
}

/* The branch pages right above the leaves that may hold tiles between two keys: the leaves of a tree that ends there.
 */
static void announce_branches(store_leaves *l, const uint8_t *low, const uint8_t *high)
{
    page_list list = {.room = BRANCHES_MOST};
    page_tree above = l->tree;
    if (above.depth < 3) return;
    above.depth--;
    (void)page_leaves(&l->file, store_db_names[DB_TILE], &above, (cairn_span){low, KEY_TILE_BYTES},
                      (cairn_span){high, KEY_TILE_BYTES}, take_page, &list);
    announce_pages(&l->store->env->data, &list);
}

void store_leaves_announce(store_leaves *l, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n)
{
    page_list cold = {.room = BATCH_MOST};
    uint8_t keys[BATCH_MOST][KEY_TILE_BYTES];
    size_t some = 0;
    if (l == NULL || n < 2 || (l->left != 0 && l->left-- != 0)) return;
    for (size_t i = 0; i < n && some < BATCH_MOST; i++) {
        const uint64_t group = (ids[i].segment << 32 | ids[i].block / GROUP_BLOCKS) + 1;
        uint64_t *seen = &l->seen[group * 0x9e3779b97f4a7c15u >> (64 - SEEN_BITS)];
        if (*seen != group) store_key_tile(keys[some++], ids[i]);
        *seen = group;
    }
    if (some < 2 || !trees_of(l, snap)) return;
    if (!l->begun) {
        size_t low = 0, high = 0;
        for (size_t i = 1; i < some; i++) {
            if (memcmp(keys[i], keys[low], KEY_TILE_BYTES) < 0) low = i;
            if (memcmp(keys[i], keys[high], KEY_TILE_BYTES) > 0) high = i;
        }
        announce_branches(l, keys[low], keys[high]);
        l->begun = true;
    }
    for (size_t i = 0; i < some; i++) {
        const cairn_span key = {keys[i], KEY_TILE_BYTES};
        const size_t before = cold.n;
        (void)page_leaves(&l->file, store_db_names[DB_TILE], &l->tree, key, key, take_page, &cold);
        if (cold.n > before && !is_cold(&l->store->env->data, cold.page[before] * l->file.page_bytes)) cold.n = before;
        if (cold.n == cold.room) break;
    }
    announce_pages(&l->store->env->data, &cold);
    l->pause = cold.n != 0 ? 0 : l->pause == 0 ? 1 : l->pause < PAUSE_MOST ? 2 * l->pause : l->pause;
    l->left = l->pause;
}
