/* context_internal.h - the parts of a session: its own blocks, its landmark rows, its stored ranges. */
#ifndef CAIRN_CONTEXT_INTERNAL_H
#define CAIRN_CONTEXT_INTERNAL_H

#include <cairn/context.h>
#include <cairn/index.h>

#include "attention_internal.h"
#include "base_internal.h"
#include "kernels_internal.h"

#include <sys/types.h>

/* ---- own blocks: what the session computed itself, until commit (or the end) ----
 *
 * One allocation a block: tiles of all layers (layers, kv_heads) at a fixed stride, lowest layers first, then the
 * landmark rows of the stored layers. So the part a commit writes lies back to back, as cairn_block_data wants it. */
typedef struct own_block {
    uint8_t *data;       /* NULL while spilled */
    cairn_token *tokens; /* (C) */
    uint32_t fill;       /* plain tokens */
    bool complete;
    bool committed;    /* the store has it; kept for the window */
    bool stored_tiles; /* tiles of the stored layers are here too (not for a refilled window block) */
    off_t spilled_at;  /* in the temporary file; -1 = not there */
} own_block;

typedef struct own_blocks {
    cairn_geometry geometry;
    size_t tile_bytes;
    size_t landmark_bytes; /* one row, one head */
    size_t data_bytes;     /* one block */
    uint64_t first;        /* logical number of items[0] */
    own_block *items;
    size_t n;
    size_t cap;
    size_t ram_bytes;   /* held by data */
    size_t spill_bytes; /* in the temporary file */
    size_t spill_next;  /* items below it are spilled or committed: where to look next */
    int spill_fd;       /* -1 = none */
    off_t spill_end;
} own_blocks;

cairn_status own_init(own_blocks *own, const cairn_geometry *geometry, uint64_t first);
void own_wipe(own_blocks *own);
cairn_status own_push(own_blocks *own, own_block **out); /* one more, empty, at the end */
void own_pop_front(own_blocks *own, size_t n);
own_block *own_at(const own_blocks *own, uint64_t block); /* NULL if it is not among them */
uint8_t *own_tile(const own_blocks *own, const own_block *b, uint32_t layer, uint32_t head);
uint8_t *own_landmark(const own_blocks *own, const own_block *b, uint32_t layer, uint32_t head);
/* A block's data of so many tokens: tiles of all layers, `stride` bytes from one to the next, then landmark rows.
 * Returns the bytes it takes there; `to` NULL: nothing is copied. */
size_t own_copy(const own_blocks *own, uint8_t *to, size_t to_stride, const uint8_t *from, size_t from_stride,
                uint32_t tokens);
/* Moves complete blocks, oldest first, to an unlinked temporary file until at most `budget` bytes stay in RAM. */
cairn_status own_spill(own_blocks *own, size_t budget);
cairn_status own_unspill(own_blocks *own, own_block *b); /* back into RAM */
cairn_status own_read_tile(own_blocks *own, const own_block *b, uint32_t layer, uint32_t head, void *out);

/* ---- landmark rows: parts of the line of past blocks ---- */

typedef struct landmark_set {
    const cairn_attention_shape *shape;
    cairn_geometry geometry;
    cairn_pool *pool; /* the session's */
    attn_part *parts;
    bool *pooled; /* (n_parts) scan kinds that may be extended */
    size_t n_parts;
    size_t cap_parts;
    attn_recent *recent; /* (layers) for local layers */
    uint64_t kept_rows;  /* in the file of the first part's scans; 0 = there is none */
    size_t kept_learnt;  /* heads of it that have learnt */
    char kinds[64];
    char warning[256];
} landmark_set;

static inline size_t n_heads(const landmark_set *set) /* of parts' indexes */
{
    return (size_t)set->shape->layers * set->shape->kv_heads;
}

typedef struct stored_range { /* logical blocks [first, first + count) */
    uint64_t first;
    uint64_t count;
    uint64_t segment;
    uint32_t block; /* of the segment */
    uint32_t context;
} stored_range;

cairn_status landmarks_init(landmark_set *set, const cairn_attention_shape *shape, const cairn_geometry *geometry,
                            cairn_pool *pool);
void landmarks_wipe(landmark_set *set);
/* Reads the rows of all ranges; kind NULL = as each segment says; mass: searches will ask for it. */
cairn_status landmarks_load(landmark_set *set, cairn_store *store, cairn_snapshot *snap, const stored_range *ranges,
                            size_t n, const char *kind, bool mass);
/* As where the mass is asked for from now on. */
void landmarks_weigh(landmark_set *set);
cairn_status landmarks_load_recent(landmark_set *set, cairn_snapshot *snap, const stored_range *ranges, size_t n);
/* Opens a pooled part at the end, for the session's own blocks, if the last one cannot take them. */
cairn_status landmarks_open_tail(landmark_set *set, uint64_t first, const char *kind);
size_t landmarks_bytes(const landmark_set *set);
/* Gives back what the indexes hold beyond their rows. */
void landmarks_unlearn(landmark_set *set);
cairn_status recent_reserve(attn_recent *recent, const cairn_geometry *geometry, uint64_t capacity);
void recent_put(attn_recent *recent, const cairn_geometry *geometry, uint64_t block, uint32_t head, const float *row);

/* Index files of a segment: "<index path>-l<layer>-h<head>.faiss" and "<index path>.manifest". */
cairn_status manifest_write(const char *path, const uint64_t *hashes, uint32_t n, uint64_t *out_hash);
cairn_status manifest_read(const char *path, uint64_t hash, uint32_t n, uint64_t *hashes);
void index_file_name(char *out, size_t cap, const char *base, uint32_t layer, uint32_t head);

/* ---- a segment's scans in a file: "<index path>.scan" ---- */

bool scans_kept(const cairn_store *store, const cairn_segment_info *info); /* there is one for this segment */
/* Into a part that has no rows yet: blocks [0, *out_rows) of the segment, at most `upto`. On failure the part's indexes
 * are of no use. */
cairn_status scans_take(landmark_set *set, const attn_part *part, const cairn_store *store,
                        const cairn_segment_info *info, uint32_t upto, bool images, uint32_t *out_rows);
/* After a commit, if it is time. Trouble is a warning. all_in: the text is, nothing more is expected soon. */
void scans_keep(cairn_session *s, bool all_in);
/* The same file for another generation of the segment's index. */
void scans_carry(const cairn_store *store, uint64_t segment, uint64_t from, uint64_t to);
/* So many bytes of a file; false if it has not as many there, or cannot be read. */
bool read_at(int fd, void *to, size_t bytes, uint64_t at);

/* ---- the session ---- */

typedef struct attached { /* one context as it was at begin */
    uint64_t id;
    uint64_t first; /* logical */
    uint64_t blocks;
    cairn_token *tail;
    size_t n_tail;
    uint64_t adopted; /* logical number of its early closed tail block, UINT64_MAX = none */
} attached;

struct cairn_session {
    cairn_store *store;
    cairn_snapshot *snap;
    cairn_writer *writer;
    cairn_fetch *fetch;
    cairn_pool *pool;
    cairn_attention_shape shape; /* arrays are the session's own */
    cairn_session_options opt;
    char index_kind[64];
    cairn_geometry geometry;
    attached *contexts;
    size_t n_contexts;
    bool continues; /* one context, its stream goes on */
    stored_range *ranges;
    size_t n_ranges;
    uint64_t n_stored;
    uint64_t n_adopted;
    uint64_t stream_base;
    uint64_t slot; /* of the stream */
    cairn_token *refill;
    size_t n_refill;     /* tokens */
    uint32_t n_refilled; /* layers given again, of geometry.first_layer */
    size_t tail_due;     /* tokens of the context's tail not run again yet */
    landmark_set landmarks;
    own_blocks own;
    attn_step step;

    /* the chunk under way */
    uint32_t chunk_rows; /* 0 = none */
    uint32_t next_layer; /* that append expects */
    attn_group *groups;
    size_t n_groups;
    size_t cap_groups;
    float *stage; /* keys (groups, kv_heads, C, D), then values */
    size_t cap_stage;
    float *carry; /* (layers, 2, kv_heads, C, D): the incomplete block's rows */
    bool closing; /* the next row is a landmark that closes the block early */
    bool closed;
    bool broken; /* a chunk failed half way */

    /* the batch under way */
    cairn_tile_id *ids;
    float *id_mass;
    size_t *id_at;
    uint64_t *id_token; /* first token each must begin with */
    size_t n_ids;
    size_t n_requests;
    size_t cap_ids;
    cairn_tile *direct;
    cairn_tile_view *views;
    uint8_t *spill_scratch;
    size_t cap_spill;

    uint64_t tier_given; /* bytes last granted to the fetch */
    cairn_fetch_stats fetch_base;
    bool sources;
    bool trace;
};

/* One more old block, before the first row: the early closed end of an attached context, of `fill` tokens. data: its
 * tiles, `stride` bytes from one to the next, and behind them its landmark rows. */
cairn_status session_adopt_block(cairn_session *s, const uint8_t *data, size_t stride, const cairn_token *tokens,
                                 uint32_t fill, size_t context);
/* The file cairn_session_keep_tail has written for an attached context, if it is still its end; the caller frees it.
 * NULL: nothing. May run in parallel. Then its block is adopted. */
uint8_t *session_kept_tail(const cairn_session *s, size_t context);
cairn_status session_adopt_kept(cairn_session *s, size_t context, const uint8_t *kept);
cairn_status session_source(cairn_session *s, attn_source *out);              /* fetching for the step */
const stored_range *session_range_of(const cairn_session *s, uint64_t block); /* of a stored block */
attn_line session_line(const cairn_session *s);
cairn_status session_reserve_ids(cairn_session *s, size_t n); /* room for a batch of tiles */
void session_count_misses(cairn_session *s);                  /* after a step of one row */
cairn_status session_budget(cairn_session *s);                /* shares ram_bytes out again */
cairn_status session_load_ranges(cairn_session *s);
uint64_t session_complete_blocks(const cairn_session *s); /* logical, before the chunk under way */

#endif
