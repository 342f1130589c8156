/* context.h - sessions: the live use of stored contexts by one model.
 *
 * An inference engine does, for every chunk of T rows (T = 1 when generating):
 *
 *     for each layer: compute q, k, v (before rotation)
 *         cairn_session_append(s, layer, T, k, v);
 *         cairn_session_attend(s, layer, T, q, out);
 *     cairn_session_advance(s, ids, T);
 *
 * Where nobody needs the outcome of the last layer (ingest), its attend may be left out, or be a cairn_session_learn.
 * Rows are slots of the stream: every (C+1)-th row is a landmark. cairn_session_landmark_due tells when; the engine
 * feeds the landmark's token like any other row. Keys are given BEFORE rotary embedding; Cairn rotates.
 *
 * What a session sees. One context, not fresh: the stream goes on where the context ends; its tail (fewer than C
 * tokens) must be run again first (cairn_session_tail). Several contexts, or fresh: the session has a stream of its own
 * from slot 0 and every attached block is old. The session's own blocks live in its memory until commit (or until its
 * end).
 *
 * A session belongs to one thread at a time; it runs its own worker threads.
 */
#ifndef CAIRN_CONTEXT_H
#define CAIRN_CONTEXT_H

#include <cairn/attention.h>
#include <cairn/store.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cairn_session cairn_session;

typedef struct cairn_session_options {
    size_t struct_size;
    cairn_policy policy;    /* cairn_policy_init has been called on it by _init */
    cairn_fetch_mode fetch; /* AUTO */
    uint64_t ram_bytes;     /* budget of the session: landmark rows, RAM tier, own blocks; default 256 MiB */
    uint32_t threads;       /* 0 = one per core */
    bool fresh;             /* a stream of its own even over one context */
    bool write;             /* takes the lease on its one context; commit is allowed */
    cairn_dtype dtype;      /* rounding of a session without a store; default F32 */
    const char *index_kind; /* overrides the stored kind for this session; NULL = as stored */
    bool read_ahead;        /* of the next layer (cairn_session_foresee); default false */
} cairn_session_options;
CAIRN_API void cairn_session_options_init(cairn_session_options *opt, size_t struct_size,
                                          const cairn_attention_shape *shape);

/* store NULL and n = 0: a session in memory only. n = 0 with a store: fresh and empty. The shape must fit the store's
 * geometry (MISMATCH). BUSY if `write` and another holds the lease. NO_MEMORY names the budget that is too small. */
CAIRN_API cairn_status cairn_session_begin(cairn_store *store, const cairn_attention_shape *shape,
                                           const char *const *contexts, size_t n, const cairn_session_options *opt,
                                           cairn_session **out);
CAIRN_API void cairn_session_end(cairn_session *session);
/* The shape it was begun with; lives as long as the session. */
CAIRN_API const cairn_attention_shape *cairn_session_shape(const cairn_session *session);

/* Tokens that must be run through the model first, from slot cairn_session_slot: the context's tail. May be empty. */
CAIRN_API cairn_status cairn_session_tail(const cairn_session *session, const cairn_token **tokens, size_t *n);
/* Layers below the store's first_layer need their window again: the tokens of the last blocks, whole blocks in order
 * (n = blocks * C). The engine computes k and v of layer `layer` for each block's C + 1 slots and hands them to
 * cairn_session_refill in the same order, (blocks * (C+1), kv_heads, D), landmark rows in place: layer by layer, before
 * the first append, which is INVALID without. */
CAIRN_API cairn_status cairn_session_refill_tokens(const cairn_session *session, const cairn_token **tokens, size_t *n);
CAIRN_API cairn_status cairn_session_refill(cairn_session *session, uint32_t layer, const float *k, const float *v);

CAIRN_API uint64_t
cairn_session_slot(const cairn_session *session); /* slots of the stream so far, landmarks included */
CAIRN_API uint64_t cairn_session_tokens(const cairn_session *session); /* plain tokens of the stream so far */
/* True if the slot `ahead` slots from now is a landmark's. */
CAIRN_API bool cairn_session_landmark_due(const cairn_session *session, size_t ahead);

/* k, v (rows, kv_heads, head_dim). All layers of a chunk get the same number of rows, in order of layers. */
CAIRN_API cairn_status cairn_session_append(cairn_session *session, uint32_t layer, size_t rows, const float *k,
                                            const float *v);
/* q, out (rows, heads, head_dim); q before rotation, unscaled. */
CAIRN_API cairn_status cairn_session_attend(cairn_session *session, uint32_t layer, size_t rows, const float *q,
                                            float *out);
/* Instead of an attend that may be left out: what searches become faster by is learnt from a few of its queries, and
 * nothing is searched or fetched. q as attend's. No answer depends on it. */
CAIRN_API cairn_status cairn_session_learn(cairn_session *session, uint32_t layer, size_t rows, const float *q);
/* Reading ahead, for chunks of one row. After attend in layer l - 1 an engine may guess the query of layer `layer` = l,
 * (heads, head_dim), as attend will get it: that of the row as it is before the feed-forward layer comes close. The
 * tiles it would fetch are read while the engine computes. What a step answers does not depend on it, and a guess that
 * fails is no error. foresees: whether it is wanted now, before anything is computed for it. */
CAIRN_API bool cairn_session_foresees(const cairn_session *session, uint32_t layer);
CAIRN_API void cairn_session_foresee(cairn_session *session, uint32_t layer, const float *q);

/* Ends the chunk. tokens (rows): the ids of the rows, landmark rows included. INVALID if a context's tail is due and
 * they are not its tokens. */
CAIRN_API cairn_status cairn_session_advance(cairn_session *session, const cairn_token *tokens, size_t rows);

/* Writes the session's whole blocks and its tail to its context: durable when it returns. More blocks than a quarter of
 * ram_bytes go in several transactions; a crash in between leaves the context with fewer whole blocks. INVALID while a
 * landmark is due (a block whose tokens are all there is whole only with its landmark), and when the context's tail has
 * been run again only in part. */
CAIRN_API cairn_status cairn_session_commit(cairn_session *session, const cairn_input *input);
CAIRN_API uint64_t cairn_session_pending_bytes(const cairn_session *session); /* what a commit would write */

/* Closing a stream early: the next row is a landmark at offset C although only n < C tokens precede it. Only for a
 * session whose blocks another session adopts; nothing may follow the landmark, nothing can be committed. */
CAIRN_API cairn_status cairn_session_close_block(cairn_session *session);
/* Makes the donor's last (early closed) block one more old block of `session`, in RAM; `context` is the number of the
 * attached context it ends. Only before the first append. */
CAIRN_API cairn_status cairn_session_adopt(cairn_session *session, const cairn_session *donor, size_t context);
/* Of a session that goes on with a stored context, whose tail is committed and then closed early: keeps that block
 * beside the store's indexes, so that who attaches the context need not make it again. Derived data, good until the
 * context grows; nothing is kept of a session with another policy than the model's. */
CAIRN_API cairn_status cairn_session_keep_tail(cairn_session *session);

/* ---- what happened ---- */

CAIRN_API void cairn_session_stats(const cairn_session *session, cairn_step_stats *out); /* since the last reset */
CAIRN_API void cairn_session_stats_reset(cairn_session *session);
/* From the next step on, whether the retained mass of every row is reported (cairn_policy.measure_mass). */
CAIRN_API void cairn_session_mass_enable(cairn_session *session, bool on);

typedef struct cairn_source { /* a block and the attention mass it got since the last reset, over all layers and heads
                               */
    size_t context;           /* number of the attached context; SIZE_MAX = the session's own stream */
    uint64_t block;           /* block of that context */
    uint64_t token;           /* first token of the block, counted in that context */
    uint32_t tokens;          /* plain tokens in it */
    double mass;
} cairn_source;
/* The blocks with the most mass, best first. Off until _enable(true); costs little. */
CAIRN_API void cairn_session_sources_enable(cairn_session *session, bool on);
CAIRN_API size_t cairn_session_sources(const cairn_session *session, cairn_source *out, size_t cap);

/* Retrieved blocks of the last attend, before anything was foreseen after it: for tests and benches. selected (rows,
 * heads, k): stream or attached block numbers in order of age (stingy) or best first (clamped), -1 = none; slots
 * likewise (stingy; may be NULL). */
CAIRN_API cairn_status cairn_session_trace_enable(cairn_session *session, bool on);
CAIRN_API cairn_status cairn_session_trace(const cairn_session *session, size_t rows, uint32_t k, int64_t *selected,
                                           int32_t *slots);

/* Sees every batch of queries that far blocks are searched with, as they are searched: turned and scaled,
 * (n, head_dim), of one layer and KV head, so that an index can be tried on real queries. Called by the session's
 * worker threads, several at once. NULL: nobody watches. */
typedef void (*cairn_search_watch)(void *arg, uint32_t layer, uint32_t kv_head, const float *queries, size_t n);
CAIRN_API void cairn_session_watch(cairn_session *session, cairn_search_watch watch, void *arg);

typedef struct cairn_session_info {
    uint64_t old_blocks;     /* attached or stored blocks it can retrieve from */
    uint64_t own_blocks;     /* blocks of this session not yet committed */
    uint64_t landmark_bytes; /* RAM of landmark rows and indexes */
    uint64_t tier_bytes;     /* RAM tier now */
    uint64_t own_bytes;      /* RAM of own blocks */
    uint64_t spilled_bytes;  /* own blocks in the temporary file */
    cairn_fetch_mode fetch;
    char fetch_reason[200];
    char index[64]; /* kinds in use */
    const char *kernels;
    uint32_t threads;
    char warning[256]; /* something a person should know (a damaged index that is scanned instead), "" = nothing */
} cairn_session_info;
CAIRN_API void cairn_session_info_get(const cairn_session *session, cairn_session_info *out);

/* ---- indexes of stored contexts ---- */

/* Builds (or builds anew) the index files of every segment of a context; kind NULL = as asked before, "auto"
 * calibrates. Derived data: safe to interrupt. */
CAIRN_API cairn_status cairn_context_reindex(cairn_store *store, const cairn_attention_shape *shape,
                                             const char *context, const char *kind,
                                             bool (*progress)(void *, uint64_t, uint64_t), void *arg);

#ifdef __cplusplus
}
#endif
#endif
