/* store_internal.h - what the files of store/ share. Not installed; tests may look inside.
 *
 *   cairn_store    one per open: the caller's options, and a counted reference to
 *   store_env      one per process and store directory: path, locks, leases, identity, and
 *   store_data     one data directory: the LMDB environment, its databases, its file and map
 *
 * Layout of a store directory (docs/format.md):
 *   current          text "data-<n>\n": the data directory in force; replaced by rename
 *   data-<n>/        data.mdb, lock.mdb
 *   index/           files of the landmark indexes, "<segment>-<generation>..."
 *   lease/           "<context id>": who appends to it
 *   lock             shared by every process that has the store open, exclusive to create and compact
 */
#ifndef CAIRN_STORE_INTERNAL_H
#define CAIRN_STORE_INTERNAL_H

#include <cairn/store.h>

#include <base_internal.h>

#include <assert.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

static_assert(sizeof(size_t) == 8, "LMDB's page numbers and our map are 64-bit");

typedef enum store_db { DB_META, DB_CONTEXT, DB_NAME, DB_SEGMENT, DB_TOKENS, DB_LANDMARK, DB_TILE, DB_COUNT } store_db;
extern const char *const store_db_names[DB_COUNT];

enum {
    STORE_FORMAT = 1,
    STORE_PAGE_HEADER = 16, /* LMDB's, before a large value */
    STORE_READERS_MAX = 1024,
    STORE_PATH_MAX = 4096,
    STORE_FREE_TILES = 256 /* tiles freed in one transaction */
};
#define STORE_MAP_BYTES (UINT64_C(1) << 40)

/* What a store is, written once: the "store" record of `meta`. */
typedef struct store_identity {
    cairn_geometry geometry;
    cairn_model_id model;
    uint8_t uuid[16];
    uint64_t created_ns;
} store_identity;

/* One data directory, open. */
typedef struct store_data {
    MDB_env *env;
    MDB_dbi dbi[DB_COUNT];
    int fd;              /* our own descriptor of data.mdb, buffered, read-only */
    uint32_t number;     /* n of "data-<n>" */
    uint32_t page_bytes; /* LMDB's page size */
    uint64_t map_bytes;  /* address space reserved */
    const uint8_t *base; /* where page 0 is mapped */
    bool read_only;
    atomic_int commit_error;   /* errno of the last commit that failed: after some of them LMDB only says MDB_PANIC */
    char path[STORE_PATH_MAX]; /* of the directory */
} store_data;

typedef struct store_lease store_lease;

/* Shared by all handles of one process on one store. */
typedef struct store_env {
    struct store_env *next; /* registry */
    dev_t device;
    ino_t inode; /* of the store directory */
    pid_t pid;   /* a handle does not survive fork() */
    size_t handles;
    int lock_fd;           /* "<path>/lock"; -1 on a read-only file system without one */
    pthread_mutex_t mutex; /* guards what follows */
    size_t live;           /* transactions of this process, begun or about to be */
    size_t writers;        /* cairn_writer objects */
    bool exclusive;        /* compact has the store to itself, in this thread */
    pthread_t exclusive_thread;
    store_lease *leases;
    store_identity identity;
    store_data data;
    char path[STORE_PATH_MAX];
} store_env;

struct cairn_store {
    store_env *env;
    bool read_only;
    bool verify_reads;
};

struct cairn_snapshot {
    cairn_store *store;
    MDB_txn *txn;        /* NULL after a renew that failed */
    uint64_t file_bytes; /* of the data file when it began: nothing beyond is touched */
    void *scratch;       /* aligned copy of a landmark payload that LMDB keeps inside a leaf page */
    size_t scratch_bytes;
};

/* ---- data.c: one data directory ---- */

/* Makes "<store>/data-<number>" with empty databases and the identity in it, synced. EXISTS if it is there. */
cairn_status store_data_create(const char *store_path, uint32_t number, const store_identity *identity,
                               uint64_t map_bytes, bool no_sync, store_data *out);
/* Opens an existing one and runs the checks at open (format, geometry, pages inside the file). */
cairn_status store_data_open(const char *store_path, uint32_t number, uint64_t map_bytes, bool read_only, bool no_sync,
                             store_data *out, store_identity *identity);
void store_data_close(store_data *data);                                 /* zeroed is fine */
cairn_status store_data_remove(const char *store_path, uint32_t number); /* the directory and the files in it */
/* Reads and replaces "<store>/current". Writing is: beside, synced, renamed, directory synced. */
cairn_status store_current_read(const char *store_path, uint32_t *number);
cairn_status store_current_write(const char *store_path, uint32_t number);
cairn_status store_sync_dir(const char *path);
cairn_status store_join(char out[STORE_PATH_MAX], const char *dir, const char *name); /* "dir/name" */
/* LMDB mapped the file anew: finds the base again. */
cairn_status store_data_map_changed(store_data *data, MDB_txn *txn);
/* Around whatever may write to a data file: makes a reached file size limit an error instead of SIGXFSZ. */
void store_hold_xfsz(void);
void store_release_xfsz(void);

/* Translates LMDB's code: MAP_FULL, ENOSPC, EDQUOT, EFBIG -> FULL; CORRUPTED, PAGE_NOTFOUND, INVALID -> CORRUPT; ...
 * NOT_FOUND for MDB_NOTFOUND, the text left alone. The sentence is "<path>: <what>: <reason with numbers>". */
cairn_status store_lmdb_fail(const store_data *data, int rc, const char *format, ...) CAIRN_PRINTF(3, 4);

/* Where a value is in the data file: whole pages, LMDB's page header included. No page is touched.
 * False if any of it lies outside the map. */
bool store_file_offset(const cairn_store *store, cairn_span record, uint64_t *page_offset, size_t *pages_bytes);

/* fetch.c. For whoever looks up much: call it once a lookup. Each touched tree page maps up to 64 KiB of neighbours
 * that are in the page cache, and they count as ours; when mapped files hold 8 MiB more than after the last time, our
 * map's pages are let go (they stay in the page cache, pointers stay good). Looks at every 128th call. */
void store_trim_map(cairn_store *store);
void store_trim_grown_map(cairn_store *store); /* looks at every call: once a commit */
void store_trim_data(const store_data *data);  /* lets go at once */

/* ---- env.c: transactions; open.c: the store for oneself ---- */

/* Every LMDB transaction of the room begins and ends here, so that a map another process outgrew can be widened. */
cairn_status store_read_begin(cairn_store *store, MDB_txn **out);
/* Moves to the newest state and keeps the reader slot; *txn is NULL when it fails. */
cairn_status store_read_renew(cairn_store *store, MDB_txn **txn);
void store_read_end(cairn_store *store, MDB_txn *txn);                                /* NULL is fine */
cairn_status store_write_begin(cairn_store *store, const char *what, MDB_txn **out);  /* INVALID if read-only */
cairn_status store_write_commit(cairn_store *store, const char *what, MDB_txn **txn); /* *txn is NULL afterwards */
void store_write_abort(cairn_store *store, MDB_txn *txn);                             /* NULL is fine */

/* The store for oneself: no other handle, snapshot or writer in this process and no other process. BUSY says who. */
cairn_status store_exclusive_begin(cairn_store *store);
void store_exclusive_end(cairn_store *store);
/* Under exclusive use: makes `fresh` (opened, complete) the data directory in force: syncs it, writes the pointer,
 * closes and removes the old one. Takes *fresh over in every case but failure before the pointer was renamed. */
cairn_status store_data_switch(cairn_store *store, store_data *fresh);

/* ---- records.c: keys, encoders, decoders. A decoder treats its bytes as hostile. ---- */

enum {
    KEY_ID_BYTES = 8,     /* context, segment */
    KEY_BLOCK_BYTES = 12, /* tokens, landmark */
    KEY_TILE_BYTES = 16,
    TILE_HEADER_BYTES = 48,
    TILE_HASH = 32, /* of the hash in it */
    LANDMARK_HEADER_BYTES = 48,
    TOKENS_HEADER_BYTES = 32,
    IDENTITY_RECORD_BYTES = 136,
    IDS_RECORD_BYTES = 24
};
void store_key_id(uint8_t key[KEY_ID_BYTES], uint64_t id);
void store_key_block(uint8_t key[KEY_BLOCK_BYTES], uint64_t segment, uint32_t block);
void store_key_tile(uint8_t key[KEY_TILE_BYTES], cairn_tile_id id);
cairn_tile_id store_key_tile_parse(const uint8_t key[KEY_TILE_BYTES]);

/* Name: 1..480 bytes of UTF-8 without control characters. */
cairn_status store_name_check(const char *name);
/* A text in a field of `cap` bytes: NUL-terminated, zeros after it. */
bool store_text_ends(const uint8_t *text, size_t cap);
/* Geometry within the limits of store.h and with payload sizes that fit. */
cairn_status store_geometry_check(const cairn_geometry *geometry);
void store_uuid_text(const uint8_t uuid[16], char text[37]);
void store_identity_encode(const store_identity *identity, uint8_t out[IDENTITY_RECORD_BYTES]);
cairn_status store_identity_decode(cairn_span bytes, store_identity *out);
void store_ids_encode(uint64_t next_context, uint64_t next_segment, uint8_t out[IDS_RECORD_BYTES]);
cairn_status store_ids_decode(cairn_span bytes, uint64_t *next_context, uint64_t *next_segment);

typedef struct context_record {
    uint64_t id;
    uint64_t parent;
    uint64_t own_segment; /* 0 = none */
    uint64_t created_ns;
    uint64_t modified_ns;
    cairn_input input;
    char name[CAIRN_NAME_MAX + 1];
    uint32_t range_count;
    uint32_t tail_count;
    uint64_t blocks;           /* sum over the ranges */
    const uint8_t *range_data; /* borrowed from the bytes that were decoded */
    const uint8_t *tail_data;
} context_record;
cairn_status store_context_decode(const cairn_geometry *geometry, uint64_t id, cairn_span bytes, context_record *out);
cairn_range store_context_range(const context_record *record, uint32_t i);
cairn_token store_context_tail(const context_record *record, uint32_t i);
size_t store_context_bytes(const char *name, size_t ranges, size_t tail); /* encoded size; 0 if it overflows */
/* Ranges and tail come from the arrays; range_data, tail_data, counts and blocks of `record` are not looked at. */
void store_context_encode(const context_record *record, const cairn_range *ranges, uint32_t range_count,
                          const cairn_token *tail, uint32_t tail_count, uint8_t *out);

typedef enum segment_state { SEGMENT_OPEN = 0, SEGMENT_SEALED = 1, SEGMENT_DYING = 2 } segment_state;
typedef struct segment_record {
    cairn_segment_info info;
    segment_state state;
    uint64_t owner; /* context that may extend it while it is open; else 0 */
} segment_record;
enum { SEGMENT_RECORD_BYTES = 352 };
cairn_status store_segment_decode(uint64_t id, cairn_span bytes, segment_record *out);
void store_segment_encode(const segment_record *record, uint8_t out[SEGMENT_RECORD_BYTES]);

size_t store_tokens_bytes(const cairn_geometry *geometry);
void store_tokens_encode(const cairn_geometry *geometry, uint64_t segment, uint32_t block, const cairn_token *tokens,
                         uint8_t *out);
cairn_status store_tokens_check(const cairn_geometry *geometry, uint64_t segment, uint32_t block, cairn_span record,
                                cairn_token *out); /* out (block_tokens) may be NULL */

size_t store_landmark_bytes(const cairn_geometry *geometry);
void store_landmark_encode(const cairn_geometry *geometry, uint64_t segment, uint32_t block, const void *payload,
                           uint8_t *out);
cairn_status store_landmark_check(const cairn_geometry *geometry, uint64_t segment, uint32_t block, cairn_span record,
                                  cairn_span *payload);

/* Whole record: header, payload and, for tiny geometries, zeros up to half a page: so that LMDB always keeps a tile as
 * a large value, 16 bytes into a page of its own. */
size_t store_tile_bytes(uint32_t page_bytes, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim);
void store_tile_encode(const cairn_geometry *geometry, cairn_tile_id id, uint64_t first_token, const void *payload,
                       uint8_t *out, size_t out_bytes);
/* Header against id and geometry, payload length, and the hash if asked; fills the view. CORRUPT names the tile.
 * `record` may be the value in the map or a copy of it elsewhere. */
cairn_status store_tile_check(const cairn_store *store, cairn_tile_id id, const void *record, size_t bytes,
                              bool verify_hash, cairn_tile_view *out);

/* The same without a store. Only header_bytes of the record need be there unless the hash is asked for. */
cairn_status store_tile_parse(const cairn_geometry *geometry, uint32_t page_bytes, cairn_tile_id id, const void *record,
                              size_t header_bytes, size_t bytes, bool verify_hash, cairn_tile_view *out);
uint64_t store_tile_first_token(const void *record); /* of a parsed one */

/* The counters behind new ids: the "ids" record of `meta`. Ids start at 1 and are never used twice. */
cairn_status store_ids_get(cairn_store *store, MDB_txn *txn, uint64_t *next_context, uint64_t *next_segment);
cairn_status store_ids_put(cairn_store *store, MDB_txn *txn, uint64_t next_context, uint64_t next_segment);

/* ---- lookups inside a transaction (snapshot.c, context.c, segment.c) ---- */

/* LMDB lookup only: touches tree pages, never the record's own pages. The record lies inside the file. NOT_FOUND leaves
 * the error text alone. */
cairn_status store_locate(cairn_snapshot *snap, cairn_tile_id id, cairn_span *record);

/* ahead.c: a hint to the kernel that landmark records [first, first + count) will be read in order. NULL = none is
 * given, which the others take too. at: before a record is looked up; seen: what its size was. */
typedef struct store_ahead store_ahead;
store_ahead *store_ahead_new(cairn_snapshot *snap, uint64_t segment, uint32_t first, uint32_t count);
void store_ahead_free(store_ahead *ahead);
void store_ahead_at(store_ahead *ahead, uint32_t block);
void store_ahead_seen(store_ahead *ahead, uint32_t block, size_t record_bytes);

/* And that the leaves in which these tiles will be looked up are about to be read, if they are not in memory: what
 * many lookups would wait for one after the other. NULL does nothing. One thread at a time. */
typedef struct store_leaves store_leaves;
store_leaves *store_leaves_new(const cairn_store *store);
void store_leaves_free(store_leaves *leaves);
void store_leaves_announce(store_leaves *leaves, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n);

/* Value of a key; *out lies inside the file (file_bytes). NOT_FOUND leaves the error text alone. */
cairn_status store_get(const cairn_store *store, MDB_txn *txn, uint64_t file_bytes, store_db db, const void *key,
                       size_t key_bytes, cairn_span *out);
cairn_status store_context_id(cairn_store *store, MDB_txn *txn, const char *name, uint64_t *out);
cairn_status store_context_get(cairn_store *store, MDB_txn *txn, uint64_t id, context_record *out);
cairn_status store_context_put(cairn_store *store, MDB_txn *txn, const context_record *record,
                               const cairn_range *ranges, uint32_t range_count, const cairn_token *tail,
                               uint32_t tail_count);
/* The number behind a name has no hash: CORRUPT if it led to a context of another name. */
cairn_status store_context_is(const context_record *record, const void *name, size_t bytes);
/* By name; NOT_FOUND has a sentence. */
cairn_status store_context_named(cairn_store *store, MDB_txn *txn, const char *name, context_record *out);
void store_context_info(const cairn_geometry *geometry, const context_record *record, cairn_context_info *out);
/* Its ranges with room for `more`; NULL and a sentence when out of memory. For cairn_free. */
cairn_range *store_context_ranges(const context_record *record, uint32_t more);
/* Tokens of a block, checked. CORRUPT if the segment should have it, else NOT_FOUND, both with a sentence. */
cairn_status store_tokens_get(cairn_store *store, MDB_txn *txn, uint64_t file_bytes, uint64_t segment, uint32_t block,
                              cairn_token *out);
cairn_status store_segment_get(cairn_store *store, MDB_txn *txn, uint64_t id, segment_record *out);
cairn_status store_segment_put(cairn_store *store, MDB_txn *txn, const segment_record *record);
/* Adds `change` (+1, -1) for each range to the reference counts of the segments they name. A segment that falls to 0 is
 * marked dying; dead (n) gets those and *died their number (both may be NULL when none can die). `leaver` != 0: an
 * open segment this context owned and that lives on is sealed. */
cairn_status store_segment_count(cairn_store *store, MDB_txn *txn, const cairn_range *ranges, uint32_t n, int change,
                                 uint64_t leaver, uint64_t *dead, uint32_t *died);
/* Frees dying segments, each in short transactions. */
cairn_status store_free_segments(cairn_store *store, const uint64_t *segments, uint32_t n);

/* The file of a context's closed tail, if there is one. */
void store_remove_tail(const cairn_store *store, uint64_t context);

/* ---- lease.c ---- */

struct store_lease {
    store_lease *next;
    uint64_t context;
    int fd;
};
cairn_status store_lease_take(cairn_store *store, uint64_t context, const char *name);
void store_lease_give(cairn_store *store, uint64_t context);

#endif
