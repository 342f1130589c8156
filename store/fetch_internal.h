/* fetch_internal.h - the two parts a fetch is made of: a reader of file ranges, and the RAM tier that keeps tiles.
 *
 * The reader knows nothing of tiles: it takes a batch of jobs, each a run of file pages and the places in memory
 * it goes to, and hands them back in any order. Three engines do that: io_uring, a pool of threads with pread, and
 * (should both be refused) pread in the caller. Each with O_DIRECT where the file system takes it. */
#ifndef CAIRN_STORE_FETCH_INTERNAL_H
#define CAIRN_STORE_FETCH_INTERNAL_H

#include "base_internal.h"

#include <cairn/store.h>

#include <sys/uio.h>

/* ---- tiles in tables ---- */

static inline uint64_t tile_mix(cairn_tile_id id) /* all 64 bits are good */
{
    uint64_t z = id.segment * 0x9e3779b97f4a7c15u ^ ((uint64_t)id.block << 32 | (uint64_t)id.layer << 16 | id.head);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline bool same_tile(cairn_tile_id a, cairn_tile_id b)
{
    return a.segment == b.segment && a.block == b.block && a.layer == b.layer && a.head == b.head;
}

/* ---- reader ---- */

enum {
    READER_DEPTH = 128,      /* reads in flight: a layer's batch, so that all of it flies while the caller computes */
    READER_THREADS = 16,     /* of the pool: 73-100 % of io_uring's rate at 16 */
    READER_JOB_PIECES = 32,  /* places in memory one job may fill */
    READER_STACK = 128 << 10 /* address space of a pool thread's stack */
};

typedef struct read_job {
    struct iovec *pieces; /* whole pages each, in file order; unchanged by the reader */
    uint32_t n_pieces;
    uint32_t first; /* for the caller */
    uint64_t offset;
    uint64_t bytes; /* sum of the pieces */
    uint64_t done;  /* bytes in place when the job is handed back; fewer than bytes with error 0: the file ends */
    int error;      /* errno of a failed read, else 0 */
    bool given;     /* handed back */
    struct read_job *next_landed; /* the pool's */
} read_job;

typedef enum reader_engine { READER_ANY, READER_URING, READER_POOL, READER_SYNC } reader_engine;

typedef struct reader reader;

/* `fd` is the data file, open for reading, and stays the caller's. Environment variable CAIRN_FETCH_READER names
 * the engine: uring, pool or sync, with "-buffered" appended to do without O_DIRECT. */
cairn_status reader_open(int fd, reader **out);
void reader_close(reader *r);
const char *reader_name(const reader *r); /* "io_uring, O_DIRECT" */
size_t reader_ram_bytes(const reader *r); /* at most, once it runs */
/* Starts the batch and returns at once; jobs belong to the reader until reader_next has given each back. */
void reader_start(reader *r, read_job *jobs, size_t n);
/* Another finished job, waiting for one if need be; NULL when all have been given back. */
read_job *reader_next(reader *r);
/* Reads what is still missing of a job in the caller, through the page cache, so that no alignment matters. */
void reader_finish(int fd, read_job *job);

/* ---- the engines, for reader.c alone ---- */

typedef struct uring_engine uring_engine;
uring_engine *uring_new(void); /* NULL: not built in, or the kernel says no */
void uring_free(uring_engine *u);
/* Takes jobs from *started on, as many as fit in flight. False: the ring is of no more use; nothing is in flight. */
bool uring_push(uring_engine *u, int fd, read_job *jobs, size_t n, size_t *started);
/* Waits for one; *out is its index, *result bytes or -errno. False as above. */
bool uring_wait(uring_engine *u, size_t *out, int *result);

typedef struct pool_engine pool_engine;
pool_engine *pool_new(int fd, int direct_fd, size_t threads); /* NULL: no thread could be started */
void pool_free(pool_engine *p);
void pool_start(pool_engine *p, read_job *jobs, size_t n);
read_job *pool_wait(pool_engine *p); /* another finished job; only as often as jobs were started */

/* ---- RAM tier ---- */

enum { TIER_NONE = UINT32_MAX };

typedef struct tier tier;

/* Slots of `slot_bytes` (a page multiple), at most as many as `budget` holds with all that is kept about them.
 * `per_tile` bytes a tile of the caller's own count too. Nothing is allocated before it is used. */
cairn_status tier_new(size_t slot_bytes, size_t per_tile, uint64_t budget, tier **out);
void tier_free(tier *t);
size_t tier_capacity(const tier *t); /* slots; 0 if the budget holds none */
uint64_t tier_ram_bytes(const tier *t);
uint64_t tier_evicted(const tier *t);
/* Unpins everything; a smaller budget evicts the tiles with the least mass. */
void tier_resize(tier *t, uint64_t budget);

/* A batch: found and taken slots are pinned until tier_unpin. `mass` adds to the slot's decayed mass. */
uint32_t tier_find(tier *t, cairn_tile_id id, float mass); /* TIER_NONE: not here */
/* A slot for a tile that is not here, evicting the unpinned tile with the least mass; TIER_NONE: no memory. */
uint32_t tier_take(tier *t, cairn_tile_id id, float mass);
void tier_drop(tier *t, uint32_t slot); /* forgets a tile whose read failed */
void tier_unpin(tier *t);               /* and ages what is there by one batch */
void *tier_data(const tier *t, uint32_t slot);
cairn_tile_id tier_id(const tier *t, uint32_t slot);

/* Where the record lies in the slot. */
typedef struct tier_record {
    uint32_t offset;
    uint32_t bytes;
    bool loaded; /* read and checked */
    bool ahead;  /* by cairn_fetch_ahead, and not asked for since */
} tier_record;
tier_record *tier_record_of(tier *t, uint32_t slot);

#endif
