/* store.h - contexts, tokens, landmark keys and K/V tiles on disk, read in place through the map.
 *
 * A store is a directory: one LMDB environment and the files of the landmark indexes. It holds
 * contexts; a context is a list of segment ranges plus a tail of fewer than block_tokens tokens; a
 * segment is an append-only run of blocks; a block is block_tokens tokens, their landmark keys and
 * one tile (K and V) per stored layer and KV head.
 *
 * Lifetimes nest: store > snapshot > view. A view is borrowed and dies with its snapshot; what a
 * fetch hands out dies with the next submit on that fetch.
 *
 * Processes and threads: one writing transaction at a time (they are short), any number of reading
 * processes, which never wait. A context has one appender at a time, which holds a lease. A process
 * opens a given store once: a second open in the same process returns the same environment, counted.
 * After fork() the child must open the store anew; its parent's handles answer INVALID there.
 * The cairn_store handle may be shared by threads; a snapshot, writer or fetch belongs to one thread
 * at a time.
 *
 * Crashes: a commit is whole blocks of all layers together with the new tail, synced to disk before
 * the call returns. A killed process loses only what it had not committed.
 */
#ifndef CAIRN_STORE_H
#define CAIRN_STORE_H

#include <cairn/base.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cairn_store cairn_store;       /* open / close */
typedef struct cairn_snapshot cairn_snapshot; /* begin / end: one consistent view */
typedef struct cairn_writer cairn_writer;     /* begin / end: the appender of one context */
typedef struct cairn_fetch cairn_fetch;       /* new / free: reads batches of tiles, keeps a RAM tier */

/* ---- geometry and identity ---- */

typedef struct cairn_geometry {
    uint32_t layers;       /* of the model, 1..4096 */
    uint32_t first_layer;  /* layers below it are not stored: 0, or 1 when layer 0 is local and its
                              K/V are recomputed from the tokens */
    uint32_t kv_heads;     /* 1..1024 */
    uint32_t head_dim;     /* 1..1024, even */
    uint32_t block_tokens; /* C: plain tokens in a block, 1..4096 */
    cairn_dtype dtype;     /* of new tiles; a reader believes each tile's header */
} cairn_geometry;

typedef struct cairn_model_id { /* the model a store belongs to */
    uint64_t fingerprint;       /* over shape, tokenizer and weights; 0 = unknown, matches nothing but 0 */
    char name[64];              /* for messages; NUL-terminated */
} cairn_model_id;

/* Landmark keys are stored as f32 in an f32 store, as bf16 in a bf16 store, as f16 otherwise. */
CAIRN_API cairn_dtype cairn_landmark_dtype(cairn_dtype tile_dtype);

/* Payload of a tile of `tokens` rows: keys (tokens, head_dim), then values (tokens, head_dim), and for
 * q8 then f32 key scales (head_dim) and f32 value scales (tokens). 0 if the sizes overflow. */
CAIRN_API size_t cairn_tile_payload_bytes(cairn_dtype dtype, uint32_t tokens, uint32_t head_dim);
/* Payload of a block's landmark record: (stored layers, kv_heads, head_dim) of cairn_landmark_dtype. */
CAIRN_API size_t cairn_landmark_payload_bytes(const cairn_geometry *geometry);

/* ---- open and close ---- */

typedef struct cairn_store_options {
    size_t struct_size;
    uint64_t map_bytes;      /* address space reserved, not disk used; default 1 TiB. A smaller map bounds
                                the file: reaching it is CAIRN_FULL, nothing committed is lost */
    bool read_only;          /* never writes; works on a read-only file system */
    bool create;             /* make the store if the directory does not exist or is empty; default false */
    bool verify_reads;       /* check the hash of a tile when a fetch first hands it out; default true. What is read
                                into a RAM tier is checked always; cairn_snapshot_tile and verify do too */
    bool no_sync;            /* for a store nobody relies on yet (import, compact); default false */
    cairn_geometry geometry; /* needed to create; otherwise, if layers != 0, must match the store */
    cairn_model_id model;    /* needed to create; otherwise, if fingerprint != 0, must match the store */
} cairn_store_options;

CAIRN_API void cairn_store_options_init(cairn_store_options *opt, size_t struct_size);

/* On success the caller owns *out; on failure *out is NULL. NOT_FOUND: no store at `path`;
 * MISMATCH: another geometry or model, the message names both; CORRUPT: the checks at open failed
 * (format, geometry, a page number beyond the end of the file); BUSY: another process creates or compacts it, or this
 * one has it open read-only and now wants to write; IO, FULL, NO_MEMORY. `opt` may be NULL. */
CAIRN_API cairn_status cairn_store_open(const char *path, const cairn_store_options *opt, cairn_store **out);
CAIRN_API void cairn_store_close(cairn_store *store); /* NULL is fine, here and in every close */
CAIRN_API const char *cairn_store_path(const cairn_store *store);
CAIRN_API const cairn_geometry *cairn_store_geometry(const cairn_store *store);
CAIRN_API const cairn_model_id *cairn_store_model(const cairn_store *store);

typedef struct cairn_store_stat {
    uint64_t file_bytes;  /* size of the data file */
    uint64_t used_bytes;  /* pages in use, in bytes */
    uint64_t free_bytes;  /* pages waiting for reuse, in bytes */
    uint64_t index_bytes; /* size of all index files */
    uint64_t contexts, segments, blocks, tiles;
    uint32_t readers; /* reader slots in use, all processes */
    char uuid[37];
} cairn_store_stat;
CAIRN_API cairn_status cairn_store_stat_get(cairn_store *store, cairn_store_stat *out);

/* ---- contexts ---- */

enum { CAIRN_NAME_MAX = 480 }; /* bytes of UTF-8; no control characters; data, never a path */

typedef struct cairn_input { /* what was ingested, so that a second run knows where it stands */
    uint64_t bytes;          /* length of the whole input */
    uint64_t hash;           /* XXH3-64 of the whole input; 0 = not known */
    uint64_t done_tokens;    /* tokens committed so far, tail included (filled in by the store) */
    bool complete;           /* the whole input is in */
} cairn_input;

typedef struct cairn_context_info {
    uint64_t id;
    uint64_t parent; /* id of the context it was forked from, 0 = none */
    char name[CAIRN_NAME_MAX + 1];
    uint64_t blocks;      /* whole blocks */
    uint32_t tail_tokens; /* tokens after the last whole block, < block_tokens */
    uint64_t tokens;      /* blocks * block_tokens + tail_tokens */
    uint32_t ranges;      /* segment ranges it consists of */
    uint64_t own_segment; /* the segment it may extend, 0 = none yet */
    uint64_t created_ns;  /* wall clock */
    uint64_t modified_ns;
    cairn_input input;
} cairn_context_info;

typedef struct cairn_range { /* blocks [first, first + count) of a segment */
    uint64_t segment;
    uint32_t first;
    uint32_t count;
} cairn_range;

/* EXISTS if the name is taken; INVALID for a name that is empty, too long, not UTF-8 or holds control characters. */
CAIRN_API cairn_status cairn_context_create(cairn_store *store, const char *name, uint64_t *out_id);
/* A new context sharing the parent's blocks, in constant time. `at_tokens` = UINT64_MAX forks at the end;
 * otherwise the fork keeps that many tokens (whole blocks shared, the rest becomes its tail). */
CAIRN_API cairn_status cairn_context_fork(cairn_store *store, const char *parent, const char *name, uint64_t at_tokens,
                                          uint64_t *out_id);
/* BUSY while another process (or writer) appends to it. Space is returned in short transactions. */
CAIRN_API cairn_status cairn_context_drop(cairn_store *store, const char *name);
CAIRN_API cairn_status cairn_context_rename(cairn_store *store, const char *from, const char *to);
/* Frees the segments nobody refers to that an interrupted drop or truncate left behind; *out_freed counts blocks.
 * Opening a store does not do this. */
CAIRN_API cairn_status cairn_store_sweep(cairn_store *store, uint64_t *out_freed);

/* ---- reading ---- */

CAIRN_API cairn_status cairn_snapshot_begin(cairn_store *store, cairn_snapshot **out);
CAIRN_API void cairn_snapshot_end(cairn_snapshot *snap);
/* Moves to the newest committed state without giving the reader slot back. Views die. */
CAIRN_API cairn_status cairn_snapshot_renew(cairn_snapshot *snap);

/* Calls `each` for every context in order of name; stops early when it returns false. */
typedef bool (*cairn_context_each)(void *arg, const cairn_context_info *info);
CAIRN_API cairn_status cairn_snapshot_contexts(cairn_snapshot *snap, cairn_context_each each, void *arg);
CAIRN_API cairn_status cairn_snapshot_context(cairn_snapshot *snap, const char *name, cairn_context_info *out);
CAIRN_API cairn_status cairn_snapshot_context_by_id(cairn_snapshot *snap, uint64_t id, cairn_context_info *out);
/* Up to `cap` ranges are written; *out_n is how many there are. */
CAIRN_API cairn_status cairn_snapshot_ranges(cairn_snapshot *snap, uint64_t context, cairn_range *ranges, size_t cap,
                                             size_t *out_n);
/* The tokens after the last whole block; up to `cap` are written. */
CAIRN_API cairn_status cairn_snapshot_tail(cairn_snapshot *snap, uint64_t context, cairn_token *tokens, size_t cap,
                                           size_t *out_n);
/* Tokens of `count` blocks from `block`: count * block_tokens ids. Checked against their hash. */
CAIRN_API cairn_status cairn_snapshot_tokens(cairn_snapshot *snap, uint64_t segment, uint32_t block, uint32_t count,
                                             cairn_token *out);
/* Landmark keys, unrotated, of blocks [first, first + count), in order; each record's hash is checked. */
typedef bool (*cairn_landmark_each)(void *arg, uint32_t block, cairn_span payload);
CAIRN_API cairn_status cairn_snapshot_landmarks(cairn_snapshot *snap, uint64_t segment, uint32_t first, uint32_t count,
                                                cairn_landmark_each each, void *arg);

typedef struct cairn_tile_id {
    uint64_t segment;
    uint32_t block;
    uint16_t layer; /* of the model */
    uint16_t head;  /* KV head */
} cairn_tile_id;

typedef struct cairn_tile_view { /* borrowed */
    cairn_tile_id id;
    cairn_dtype dtype;
    uint32_t tokens; /* rows of keys and of values */
    uint32_t head_dim;
    uint64_t first_token;      /* position of row 0 in every context that has the block */
    const void *keys;          /* (tokens, head_dim), rotated by the offset inside the block */
    const void *values;        /* (tokens, head_dim) */
    const float *key_scales;   /* (head_dim), q8 only, else NULL; 4-byte aligned */
    const float *value_scales; /* (tokens), q8 only, else NULL */
} cairn_tile_view;

/* Checks header and hash, whatever verify_reads says: for a step's tiles there is cairn_fetch. NOT_FOUND is an answer
 * and leaves the error text alone. */
CAIRN_API cairn_status cairn_snapshot_tile(cairn_snapshot *snap, cairn_tile_id id, cairn_tile_view *out);

/* ---- fetching a step's tiles as one batch ---- */

typedef enum cairn_fetch_mode {
    CAIRN_FETCH_AUTO, /* by the data file's size against free memory */
    CAIRN_FETCH_MAP,  /* in place through the map, the whole batch announced first */
    CAIRN_FETCH_READ  /* read by batch into a RAM tier of ram_bytes; I/O errors are errors */
} cairn_fetch_mode;

typedef struct cairn_fetch_stats { /* totals since new */
    uint64_t tiles;                /* asked for */
    uint64_t tier_tiles;           /* found in the RAM tier */
    uint64_t tier_bytes;
    uint64_t map_bytes;  /* used in place through the map */
    uint64_t read_bytes; /* read from the file into the tier, in whole pages; the others count records */
    uint64_t wait_ns;    /* time spent in cairn_fetch_wait */
    uint64_t evicted_tiles;
    uint64_t ram_bytes;   /* what the tier holds now */
    uint64_t ahead_tiles; /* announced or read by cairn_fetch_ahead, beside `tiles` */
    uint64_t ahead_used;  /* of them, asked for since */
} cairn_fetch_stats;

/* `ram_bytes` bounds everything the fetch allocates (READ mode); NO_MEMORY says what one tile needs. What is read into
 * the tier is always checked against its hash. io_uring with O_DIRECT is used where it is allowed, else threads with
 * pread; environment variable CAIRN_FETCH_READER (uring, pool, sync; each with "-buffered") chooses instead. */
CAIRN_API cairn_status cairn_fetch_new(cairn_store *store, cairn_fetch_mode mode, uint64_t ram_bytes,
                                       cairn_fetch **out);
CAIRN_API void cairn_fetch_free(cairn_fetch *fetch);
CAIRN_API cairn_fetch_mode cairn_fetch_mode_used(const cairn_fetch *fetch); /* MAP or READ */
CAIRN_API const char *cairn_fetch_reason(const cairn_fetch *fetch);         /* why auto chose it, one sentence */
/* How many tiles one submit may name, so that all of them fit at once; at least 1. SIZE_MAX for MAP. */
CAIRN_API size_t cairn_fetch_batch_max(const cairn_fetch *fetch);
/* Announces or starts reading all `n` tiles. `mass` (n, may be NULL) is the attention mass each is about to get:
 * the RAM tier keeps what gets mass. Ids need not be sorted; duplicates are allowed. The snapshot must
 * stay open until the views are done with. The previous batch's views die. NOT_FOUND names a tile the snapshot does
 * not have, INVALID a batch beyond batch_max; then there is nothing to wait for. */
CAIRN_API cairn_status cairn_fetch_submit(cairn_fetch *fetch, cairn_snapshot *snap, const cairn_tile_id *ids,
                                          const float *mass, size_t n);
/* Waits for the whole batch and fills views[0..n) in the order of the ids. CORRUPT and IO name the tile; what was right
 * of a failed batch stays in the tier, what was not does not. */
CAIRN_API cairn_status cairn_fetch_wait(cairn_fetch *fetch, cairn_tile_view *views);
/* Announces or starts reading tiles that one of the next batches may name, and returns: a guess, so nothing comes of an
 * error here, and the RAM tier lets go of them first. The views of the batch before die; what is in flight is waited
 * for by the next submit, if its snapshot is of the same commit. No more than half of batch_max are taken. */
CAIRN_API void cairn_fetch_ahead(cairn_fetch *fetch, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n);
/* Budget may shrink or grow between batches (a session gives what its landmark rows leave). Views die. NO_MEMORY if
 * it would not hold one tile: then the old budget stays. */
CAIRN_API cairn_status cairn_fetch_set_ram(cairn_fetch *fetch, uint64_t ram_bytes);
CAIRN_API void cairn_fetch_stats_get(const cairn_fetch *fetch, cairn_fetch_stats *out);

/* ---- appending ---- */

typedef struct cairn_block_data { /* one whole block, borrowed for the call */
    const cairn_token *tokens;    /* (block_tokens) */
    const void *landmarks;        /* cairn_landmark_payload_bytes */
    const void *tiles; /* (stored layers, kv_heads) payloads of cairn_tile_payload_bytes each, back to back */
} cairn_block_data;

/* Takes the lease on a context. BUSY: the message names pid, host, command and start of the holder.
 * A lease whose process is gone is taken over. */
CAIRN_API cairn_status cairn_writer_begin(cairn_store *store, const char *context, cairn_writer **out);
CAIRN_API void cairn_writer_end(cairn_writer *writer); /* gives the lease back; uncommitted blocks are gone */
/* One durable transaction: n blocks (0 is fine), the new tail (< block_tokens) and the input's identity
 * (NULL: unchanged). FULL leaves the store as it was. The first append of a fork opens its own segment. */
CAIRN_API cairn_status cairn_writer_commit(cairn_writer *writer, const cairn_block_data *blocks, size_t n,
                                           const cairn_token *tail, size_t tail_tokens, const cairn_input *input);
/* Empties the context it holds (--replace): ranges and tail gone, name and id kept. */
CAIRN_API cairn_status cairn_writer_truncate(cairn_writer *writer);
CAIRN_API cairn_status cairn_writer_info(cairn_writer *writer, cairn_context_info *out);

/* ---- index bookkeeping (the files are the index's, the truth about them is the store's) ---- */

typedef struct cairn_segment_info {
    uint64_t id;
    uint32_t blocks;
    uint32_t references;   /* ranges that name it */
    uint64_t generation;   /* of its index files; 0 = none were ever made */
    char index_kind[64];   /* kind asked for at ingest or reindex; "" = auto */
    char index_made[64];   /* kind that was built ("scan" needs no file) */
    char index_why[160];   /* why, one sentence */
    uint32_t index_blocks; /* blocks [0, index_blocks) are in the files */
    uint64_t index_hash;   /* XXH3-64 over all files of this generation, in order */
} cairn_segment_info;
CAIRN_API cairn_status cairn_snapshot_segment(cairn_snapshot *snap, uint64_t segment, cairn_segment_info *out);
CAIRN_API cairn_status cairn_snapshot_segments(cairn_snapshot *snap, bool (*each)(void *, const cairn_segment_info *),
                                               void *arg);
/* Writes the index fields and raises the generation to info->generation. */
CAIRN_API cairn_status cairn_store_set_index(cairn_store *store, const cairn_segment_info *info);
/* "<store>/index/tail-<context>", which goes with its context. */
CAIRN_API cairn_status cairn_store_tail_path(const cairn_store *store, uint64_t context, char *out, size_t cap);
/* "<store>/index/<segment>-<generation>" without a suffix; the caller appends. */
CAIRN_API cairn_status cairn_store_index_path(const cairn_store *store, uint64_t segment, uint64_t generation,
                                              char *out, size_t cap);

/* ---- care ---- */

typedef struct cairn_verify_report {
    uint64_t contexts, segments, blocks, tiles, bytes; /* looked at */
    uint64_t damaged;                                  /* records that failed */
} cairn_verify_report;
/* Calls `damage` with one sentence per damaged record. All of the structure is read and all small records are checked
 * against their hashes and each other; `deep` reads every tile, else the header of one tile in each block. CORRUPT if
 * anything is damaged. `progress` (may be NULL) is called with bytes done and all. */
CAIRN_API cairn_status cairn_store_verify(cairn_store *store, bool deep, void (*damage)(void *, const char *),
                                          bool (*progress)(void *, uint64_t done, uint64_t total), void *arg,
                                          cairn_verify_report *out);
/* Copies what contexts refer to into a new data file and switches to it; needs the store to itself (BUSY otherwise).
 * Kill-safe: afterwards the store is the old one or the new one. The handle stays usable. */
CAIRN_API cairn_status cairn_store_compact(cairn_store *store, bool (*progress)(void *, uint64_t, uint64_t), void *arg);
/* One context as one file, with hashes; `path` is written beside and renamed. */
CAIRN_API cairn_status cairn_context_export(cairn_store *store, const char *name, const char *path,
                                            bool (*progress)(void *, uint64_t, uint64_t), void *arg);
/* Checks the whole file before anything enters the store. The store must have the file's geometry and fingerprint; it
 * keeps its own name for the model. */
CAIRN_API cairn_status cairn_context_import(cairn_store *store, const char *path, const char *name,
                                            bool (*progress)(void *, uint64_t, uint64_t), void *arg);
/* Geometry and model of an export file, to create a store for it. */
CAIRN_API cairn_status cairn_export_peek(const char *path, cairn_geometry *geometry, cairn_model_id *model,
                                         cairn_context_info *info);

#ifdef __cplusplus
}
#endif
#endif
