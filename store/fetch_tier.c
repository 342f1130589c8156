/* fetch_tier.c - the RAM tier: slots of whole pages that keep tiles by decayed attention mass.
 *
 * Mass halves while TIER_HALF_LIFE times as many tiles are asked for as the tier holds. In simulated decoding (drifting
 * scores, top 16 of 1000 blocks, 8 heads, tiers of 300 to 1500 tiles) half a tier was at most 0.8 points of hits behind
 * least-recently-used and up to 2.3 ahead; a memory four times as long won 7 where scores stand still and lost 12 where
 * they drift. Decay multiplies everything alike, so it never changes an order: instead of ageing every slot, new mass
 * is written down larger by the age of the tier ("forward decay", Cormode et al. 2009), in logarithms so that nothing
 * overflows:
 *   heat = log2(mass) + age,   heat + m at a later age = log2(2^(heat - age) + m) + age.
 * The coldest slot is the top of a heap. Slots of the batch under way are pinned: they are in no heap.
 *
 * Slots lie in chunks of 2 MiB on huge pages: direct reads into them ran at 1.5 GB/s where small pages, whose every
 * 4 KiB is a segment of its own to the disk, gave 0.9. A chunk that the budget holds only in part, or that comes
 * after one that was given back, is of small pages, so that nothing is resident that no slot uses. The first touch of a
 * huge page takes 0.2 ms, in a guest whose host has to find it 6: another thread touches the next chunk while this one
 * fills.
 *
 * Memory a slot costs besides its pages: slot 40, heap, pins and free list 4 each, table 8 to 16, chunk list at most
 * 32: 100 bytes; while an array grows its old half is there too, at most 40 more. TIER_SLOT_COST covers both. */
#include "fetch_internal.h"

#include <assert.h>
#include <math.h>
#include <sys/mman.h>

enum { TIER_SLOT_COST = 144, TIER_CHUNK = CAIRN_HUGE_PAGE, TIER_FIRST = 64 };
enum { TIER_CHUNKS_FIRST = 16, TOUCH_STACK = 128 << 10, TOUCH_STEP = 4096 };
enum { AT_PIN = UINT32_MAX - 1, AT_FREE = UINT32_MAX };
static const double TIER_HALF_LIFE = 0.5;
static const float TIER_MASS_MIN = 1e-6f; /* a tile nobody looked at is still younger than one from before */

typedef struct slot {
    cairn_tile_id id;
    double heat;
    uint32_t at; /* place in the heap, or AT_PIN, AT_FREE */
    tier_record record;
} slot;
static_assert(sizeof(slot) == 40, "TIER_SLOT_COST counts on it");

typedef struct chunk {
    uint8_t *data;
    bool huge; /* resident as a whole from the first touch */
} chunk;

struct tier {
    size_t slot_bytes;
    size_t per_tile;
    uint64_t budget;
    size_t capacity; /* slots that may be in use */
    size_t used;     /* slots in use */
    size_t room;     /* slots the arrays have room for */
    size_t fresh;    /* slots from here on were never in use */
    slot *slots;
    uint32_t *heap;
    uint32_t *pins;
    uint32_t *spare; /* slots below `fresh` that are free; their pages are given back */
    uint32_t *table; /* open addressing, linear; TIER_NONE = empty */
    size_t heap_n, pins_n, spare_n;
    size_t table_mask;
    chunk *chunks;
    size_t chunks_n, chunks_room;
    size_t chunk_slots;
    size_t chunk_bytes; /* a multiple of TIER_CHUNK where slots are that small */
    bool small_pages;   /* chunks are given back slot by slot */
    uint8_t *next;      /* the chunk that will be added, while `toucher` touches it; else NULL */
    pthread_t toucher;
    uint64_t resident; /* bytes of chunks that may be in memory */
    double age;        /* in half-lives */
    size_t asked;      /* tiles of this batch */
    uint64_t evicted;
};

/* ---- the heap: coldest first ---- */

static bool colder(const tier *t, uint32_t a, uint32_t b)
{
    return t->slots[a].heat < t->slots[b].heat;
}
static void heap_set(tier *t, size_t at, uint32_t s)
{
    t->heap[at] = s;
    t->slots[s].at = (uint32_t)at;
}
static void heap_up(tier *t, size_t at, uint32_t s)
{
    while (at > 0 && colder(t, s, t->heap[(at - 1) / 2])) {
        heap_set(t, at, t->heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    heap_set(t, at, s);
}
static void heap_down(tier *t, size_t at, uint32_t s)
{
    for (size_t child; (child = 2 * at + 1) < t->heap_n; at = child) {
        if (child + 1 < t->heap_n && colder(t, t->heap[child + 1], t->heap[child])) child++;
        if (!colder(t, t->heap[child], s)) break;
        heap_set(t, at, t->heap[child]);
    }
    heap_set(t, at, s);
}
static void heap_remove(tier *t, uint32_t s)
{
    size_t at = t->slots[s].at;
    uint32_t last = t->heap[--t->heap_n];
    if (last == s) return;
    if (at > 0 && colder(t, last, t->heap[(at - 1) / 2]))
        heap_up(t, at, last);
    else
        heap_down(t, at, last);
}

/* ---- the table ---- */

static size_t home(const tier *t, cairn_tile_id id)
{
    return (size_t)tile_mix(id) & t->table_mask;
}
static size_t table_place(const tier *t, cairn_tile_id id) /* of the tile, or of the gap where it belongs */
{
    size_t i = home(t, id);
    while (t->table[i] != TIER_NONE && !same_tile(t->slots[t->table[i]].id, id)) i = (i + 1) & t->table_mask;
    return i;
}
static void table_remove(tier *t, cairn_tile_id id)
{
    size_t gap = table_place(t, id);
    assert(t->table[gap] != TIER_NONE);
    for (size_t i = gap;;) { /* moves back whatever a search would no longer reach across the gap */
        i = (i + 1) & t->table_mask;
        if (t->table[i] == TIER_NONE) break;
        size_t h = home(t, t->slots[t->table[i]].id);
        if (((i - h) & t->table_mask) >= ((i - gap) & t->table_mask)) {
            t->table[gap] = t->table[i];
            gap = i;
        }
    }
    t->table[gap] = TIER_NONE;
}

/* ---- memory ---- */

static size_t kept_bytes(const tier *t) /* all but the slots' pages */
{
    size_t table = t->table != NULL ? (t->table_mask + 1) * sizeof *t->table : 0;
    return sizeof *t + t->room * (sizeof(slot) + 3 * sizeof(uint32_t)) + table + t->chunks_room * sizeof *t->chunks;
}

static bool grow_u32(uint32_t **array, size_t old, size_t n)
{
    uint32_t *bigger = cairn_grow(*array, old * sizeof **array, n, sizeof **array);
    if (bigger != NULL) *array = bigger;
    return bigger != NULL;
}

/* Room for twice as many slots. Each array is grown by itself: an array longer than `room` says is no harm. */
static bool grow(tier *t)
{
    size_t n = t->room == 0 ? TIER_FIRST : 2 * t->room;
    if (n > t->capacity) n = t->capacity;
    size_t table = 16;
    while (table < 2 * n) table *= 2;
    uint32_t *map = cairn_alloc_array(table, sizeof *map);
    if (map == NULL) return false;
    slot *slots = cairn_grow(t->slots, t->room * sizeof *slots, n, sizeof *slots);
    if (slots != NULL) t->slots = slots;
    if (slots == NULL || !grow_u32(&t->heap, t->room, n) || !grow_u32(&t->pins, t->room, n) ||
        !grow_u32(&t->spare, t->room, n)) {
        cairn_free(map);
        return false;
    }
    cairn_free(t->table);
    t->table = map;
    t->table_mask = table - 1;
    t->room = n;
    for (size_t i = 0; i < table; i++) map[i] = TIER_NONE;
    for (size_t s = 0; s < t->fresh; s++)
        if (t->slots[s].at != AT_FREE) map[table_place(t, t->slots[s].id)] = (uint32_t)s;
    return true;
}

static bool next_is_huge(const tier *t)
{
    return !t->small_pages && (t->chunks_n + 1) * t->chunk_slots <= t->capacity;
}

static void *touch(void *arg)
{
    const tier *t = arg;
    for (size_t at = 0; at < t->chunk_bytes; at += TOUCH_STEP) *(volatile uint8_t *)(t->next + at) = 0;
    return NULL;
}

/* Has the next chunk touched, if it will be huge. Without memory or a thread for that it is made when it is needed. */
static void touch_next(tier *t)
{
    if (t->next != NULL || !next_is_huge(t) || (t->next = cairn_map(t->chunk_bytes, true)) == NULL) return;
    if (cairn_thread_start(&t->toucher, TOUCH_STACK, touch, t) == 0) {
        t->resident += t->chunk_bytes;
        return;
    }
    cairn_unmap(t->next, t->chunk_bytes);
    t->next = NULL;
}

static uint8_t *take_next(tier *t) /* NULL: none was touched */
{
    uint8_t *data = t->next;
    if (data == NULL) return NULL;
    pthread_join(t->toucher, NULL);
    t->resident -= t->chunk_bytes;
    t->next = NULL;
    return data;
}

static bool add_chunk(tier *t)
{
    if (t->chunks_n == t->chunks_room) {
        size_t n = t->chunks_room == 0 ? TIER_CHUNKS_FIRST : 2 * t->chunks_room;
        chunk *bigger = cairn_grow(t->chunks, t->chunks_n * sizeof *bigger, n, sizeof *bigger);
        if (bigger == NULL) return false;
        t->chunks = bigger;
        t->chunks_room = n;
    }
    bool huge = next_is_huge(t);
    uint8_t *data = take_next(t);
    if (data == NULL) data = cairn_map(t->chunk_bytes, huge);
    if (data == NULL) return false;
    if (huge) t->resident += t->chunk_bytes;
    t->chunks[t->chunks_n++] = (chunk){data, huge};
    return true;
}

void *tier_data(const tier *t, uint32_t s)
{
    return t->chunks[s / t->chunk_slots].data + s % t->chunk_slots * t->slot_bytes;
}

static void release(tier *t, uint32_t s) /* out of the table and the heap; its pages go back to the system */
{
    table_remove(t, t->slots[s].id);
    if (t->slots[s].at != AT_PIN) heap_remove(t, s);
    t->slots[s].at = AT_FREE;
    if (madvise(tier_data(t, s), t->slot_bytes, MADV_DONTNEED) == 0) t->resident -= t->slot_bytes;
    t->spare[t->spare_n++] = s;
    t->used--;
}

/* ---- life ---- */

static size_t slots_within(const tier *t, uint64_t budget, size_t kept)
{
    size_t each = (t->chunk_bytes + t->chunk_slots - 1) / t->chunk_slots + t->per_tile;
    if (kept == 0) { /* nothing is there yet: what it will take */
        each += TIER_SLOT_COST;
        kept = sizeof *t + TIER_CHUNKS_FIRST * sizeof *t->chunks;
    }
    if (budget < kept) return 0;
    uint64_t n = (budget - kept) / each;
    return n < AT_PIN ? (size_t)n : AT_PIN - 1;
}

cairn_status tier_new(size_t slot_bytes, size_t per_tile, uint64_t budget, tier **out)
{
    *out = NULL;
    tier *t = cairn_calloc(1, sizeof *t);
    if (t == NULL) return cairn_fail(CAIRN_NO_MEMORY, "RAM tier");
    t->slot_bytes = slot_bytes;
    t->per_tile = per_tile;
    t->chunk_slots = slot_bytes < TIER_CHUNK ? TIER_CHUNK / slot_bytes : 1;
    t->chunk_bytes = slot_bytes < TIER_CHUNK ? TIER_CHUNK : slot_bytes;
    t->budget = budget;
    t->capacity = slots_within(t, budget, 0);
    *out = t;
    return CAIRN_OK;
}

static void drop_next(tier *t)
{
    cairn_unmap(take_next(t), t->chunk_bytes);
}

static void empty(tier *t)
{
    drop_next(t);
    for (size_t i = 0; i < t->chunks_n; i++) cairn_unmap(t->chunks[i].data, t->chunk_bytes);
    cairn_free(t->chunks);
    cairn_free(t->slots);
    cairn_free(t->heap);
    cairn_free(t->pins);
    cairn_free(t->spare);
    cairn_free(t->table);
    *t = (tier){.slot_bytes = t->slot_bytes,
                .per_tile = t->per_tile,
                .chunk_slots = t->chunk_slots,
                .chunk_bytes = t->chunk_bytes,
                .budget = t->budget,
                .age = t->age,
                .evicted = t->evicted + t->used};
}

void tier_free(tier *t)
{
    if (t == NULL) return;
    empty(t);
    cairn_free(t);
}

/* What no slot of the last chunk has used, if that is resident as a whole. */
static void give_back_fresh(tier *t)
{
    chunk *last = t->chunks_n > 0 ? &t->chunks[t->chunks_n - 1] : NULL;
    if (last == NULL || !last->huge || t->fresh == t->chunks_n * t->chunk_slots) return;
    uint8_t *from = tier_data(t, (uint32_t)t->fresh);
    const size_t bytes = (size_t)(last->data + t->chunk_bytes - from);
    if (madvise(from, bytes, MADV_DONTNEED) != 0) return;
    t->resident -= bytes;
    last->huge = false;
}

void tier_resize(tier *t, uint64_t budget)
{
    tier_unpin(t);
    size_t capacity = slots_within(t, budget, 0);
    t->budget = budget;
    if (capacity >= t->room) { /* growing, or not yet grown that far */
        t->capacity = capacity;
        if (!next_is_huge(t)) drop_next(t);
        return;
    }
    capacity = slots_within(t, budget, kept_bytes(t)); /* the arrays stay as long as they are */
    if (capacity == 0 || capacity < t->room / 8) {     /* they would weigh more than they are worth */
        empty(t);
        t->capacity = slots_within(t, budget, 0);
        return;
    }
    t->capacity = capacity < t->room ? capacity : t->room;
    for (size_t i = 0; i < t->chunks_n && !t->small_pages; i++)
        madvise(t->chunks[i].data, t->chunk_bytes, MADV_NOHUGEPAGE); /* what is given back must not return in heaps */
    t->small_pages = true;
    drop_next(t);
    give_back_fresh(t);
    while (t->used > t->capacity) {
        release(t, t->heap[0]);
        t->evicted++;
    }
}

size_t tier_capacity(const tier *t)
{
    return t->capacity;
}
uint64_t tier_evicted(const tier *t)
{
    return t->evicted;
}
uint64_t tier_ram_bytes(const tier *t)
{
    return kept_bytes(t) + t->resident;
}
cairn_tile_id tier_id(const tier *t, uint32_t s)
{
    return t->slots[s].id;
}
tier_record *tier_record_of(tier *t, uint32_t s)
{
    return &t->slots[s].record;
}

/* ---- a batch ---- */

static float usable(float mass)
{
    return mass > TIER_MASS_MIN ? (mass < 1e6f ? mass : 1e6f) : TIER_MASS_MIN; /* NaN too is the least */
}

uint32_t tier_find(tier *t, cairn_tile_id id, float mass)
{
    if (t->room == 0) return TIER_NONE;
    uint32_t s = t->table[table_place(t, id)];
    if (s == TIER_NONE) return TIER_NONE;
    t->asked++;
    slot *p = &t->slots[s];
    p->heat = log2(exp2(p->heat - t->age) + (double)usable(mass)) + t->age;
    if (p->at == AT_PIN) return s;
    heap_remove(t, s);
    p->at = AT_PIN;
    t->pins[t->pins_n++] = s;
    return s;
}

/* A free slot with an address, or the coldest one. */
static uint32_t free_slot(tier *t)
{
    if (t->used == t->capacity) {
        assert(t->heap_n > 0); /* a batch is never larger than the capacity */
        uint32_t s = t->heap[0];
        heap_remove(t, s);
        table_remove(t, t->slots[s].id);
        t->evicted++;
        t->used--;
        return s;
    }
    if (t->spare_n > 0) {
        t->resident += t->slot_bytes;
        return t->spare[--t->spare_n];
    }
    if (t->fresh == t->room && !grow(t)) return TIER_NONE;
    if (t->fresh == t->chunks_n * t->chunk_slots && !add_chunk(t)) return TIER_NONE;
    if (!t->chunks[t->fresh / t->chunk_slots].huge) t->resident += t->slot_bytes;
    if (t->fresh % t->chunk_slots == t->chunk_slots / 2) touch_next(t);
    return (uint32_t)t->fresh++;
}

uint32_t tier_take(tier *t, cairn_tile_id id, float mass)
{
    uint32_t s = free_slot(t);
    if (s == TIER_NONE) return s;
    t->asked++;
    t->slots[s] = (slot){.id = id, .heat = log2((double)usable(mass)) + t->age, .at = AT_PIN};
    t->table[table_place(t, id)] = s;
    t->pins[t->pins_n++] = s;
    t->used++;
    return s;
}

void tier_drop(tier *t, uint32_t s)
{
    assert(t->slots[s].at == AT_PIN);
    release(t, s);
}

void tier_unpin(tier *t)
{
    for (size_t i = 0; i < t->pins_n; i++) {
        uint32_t s = t->pins[i];
        if (t->slots[s].at != AT_PIN) continue; /* dropped */
        heap_up(t, t->heap_n++, s);
    }
    t->pins_n = 0;
    if (t->capacity > 0) t->age += (double)t->asked / ((double)t->capacity * TIER_HALF_LIFE);
    t->asked = 0;
}
