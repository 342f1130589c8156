/* index.h - top-k search over the landmark keys of one (layer, KV head).
 *
 * Rows are unrotated landmark keys, numbered 0, 1, 2, ... in the order they were added; the metric is the
 * inner product (paper section 3.2: the blocks with the largest landmark scores). An index is a sealed
 * part of some kind plus a tail scanned exactly, so a row can be found the moment it is added.
 *
 * Kinds: "scan" (int8 rows, the best candidates re-scored in full precision), "exact" (every row in full
 * precision: the twin the others are judged by), and over FAISS "flat", "sq8", "ivf", "hnsw" or any
 * FAISS factory string ("IVF256,Flat", "HNSW16,SQ8", ...; options after a colon: "ivf:nprobe=32").
 * Scores returned are always exact: query times the stored row, accumulated in f32 in a fixed order; what is not a
 * number counts as -inf and ranks last. "scan" and "flat" prove their k best for each query and fall back to full
 * precision where they cannot: they give what "exact" gives, bit for bit. No answer depends on what else is in a call,
 * on threads, or on how rows were added.
 *
 * Ties break newest (largest id) first; where an approximate FAISS kind decides at the k-th place among equals, the set
 * is what FAISS gives.
 *
 * Threads: searches of one index may run in parallel, each with its own scratch; add, learn, unlearn, seal,
 * load do not overlap with anything.
 */
#ifndef CAIRN_INDEX_H
#define CAIRN_INDEX_H

#include <cairn/base.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cairn_index cairn_index;                 /* new / free */
typedef struct cairn_index_scratch cairn_index_scratch; /* new / free: one per searching thread */

/* dim: 1..1020. row_dtype: F32, F16 or BF16, how rows are kept. INVALID: a kind FAISS's factory refuses, with its
 * reason; UNSUPPORTED: a recipe FAISS knows but whose operations may end the process. */
CAIRN_API cairn_status cairn_index_new(const char *kind, uint32_t dim, cairn_dtype row_dtype, cairn_index **out);
CAIRN_API void cairn_index_free(cairn_index *index);
CAIRN_API const char *cairn_index_kind(const cairn_index *index);
CAIRN_API bool cairn_index_is_scan(const char *kind); /* kinds that need no file: scan, exact, "" */

/* Appends n rows of row_dtype elements (n, dim). */
CAIRN_API cairn_status cairn_index_add(cairn_index *index, size_t n, const void *rows);
CAIRN_API size_t cairn_index_count(const cairn_index *index);
CAIRN_API size_t cairn_index_sealed(const cairn_index *index); /* rows [0, sealed) are in the kind's own structure */
/* Brings rows [0, upto) into the sealed part (training it at the first call). No-op for scan and exact. */
CAIRN_API cairn_status cairn_index_seal(cairn_index *index, size_t upto);
/* Shows a scan queries like those to come (n, dim), the k they ask with and about how many ask together. If its rows
 * are such that it pays, it keeps a sketch of them, some bytes a row, and passes over several times as many rows a
 * second from then on. No hit depends on it. may_learn: there are enough rows, and twice as many as last time.
 * NO_MEMORY: nothing was learnt. */
CAIRN_API bool cairn_index_may_learn(const cairn_index *index);
CAIRN_API cairn_status cairn_index_learn(cairn_index *index, const float *queries, size_t n, uint32_t k,
                                         size_t together);
/* Whether it soon may learn, and queries are worth keeping: from half the rows on that it first learns with. */
CAIRN_API bool cairn_index_will_learn(const cairn_index *index);
CAIRN_API void cairn_index_unlearn(cairn_index *index);       /* gives its memory back; not to be learnt soon again */
CAIRN_API size_t cairn_index_bytes(const cairn_index *index); /* heap it holds, rows included */
CAIRN_API bool cairn_index_learnt(const cairn_index *index);  /* there is a sketch */
/* A scan that has learnt and is asked for no mass can do without int8 images, a third of its memory. Off: rows to come
 * get none. On (the default): those that lack are made; NO_MEMORY: some lack still. Where one lacks and the sketch does
 * not do, rows are scored in full precision. No hit depends on it. */
CAIRN_API cairn_status cairn_index_images(cairn_index *index, bool on);

/* A scan as bytes (index/packed.c): rows, what is known of them, what was learnt; _bytes: how many, 0 = no scan or no
 * rows. They are checked as they are read, hash last: CORRUPT, and the index is as it was. Into an empty index; of more
 * than `upto` rows the first. images: see above; where nothing was learnt they are made anyway. read and write get and
 * put so many bytes, next to the last ones; false = cannot. */
CAIRN_API size_t cairn_index_packed_bytes(const cairn_index *index);
CAIRN_API cairn_status cairn_index_pack(const cairn_index *index,
                                        bool (*write)(void *arg, const void *data, size_t bytes), void *arg);
CAIRN_API cairn_status cairn_index_unpack(cairn_index *index, size_t upto, bool images,
                                          bool (*read)(void *arg, void *data, size_t bytes), void *arg);
/* Row `id` as f32 (dim). */
CAIRN_API void cairn_index_row(const cairn_index *index, uint32_t id, float *out);

typedef struct cairn_index_hit {
    uint32_t id;
    float score; /* query . row, exact */
} cairn_index_hit;

typedef struct cairn_index_query {
    const float *q; /* (dim) */
    uint32_t lo;    /* only rows [lo, hi) count */
    uint32_t hi;
} cairn_index_query;

/* What one query learnt about the rows it did not choose: log-sum-exp over all rows of [lo, hi). */
typedef struct cairn_index_mass {
    float lse;   /* log sum exp(score); -inf for an empty range */
    float error; /* |true - lse| is at most this: 0 every row in full precision (exact, flat, ranges of up to 256
                    rows), > 0 a quantization bound (scan), INFINITY where rows were left unscored: lse is then that of
                    the rows which were */
} cairn_index_mass;

CAIRN_API cairn_status cairn_index_scratch_new(cairn_index_scratch **out);
CAIRN_API void cairn_index_scratch_free(cairn_index_scratch *scratch);

/* Rows that may be good for the next search with this scratch, as what the last token's query found: up to 64, copied,
 * each counted once. It sets out with a bar then. No hit depends on it. */
CAIRN_API void cairn_index_hint(cairn_index_scratch *scratch, const uint32_t *rows, size_t n);

/* For each of nq queries the k best rows of its range, best first, ties newest first: hits (nq, k), found (nq).
 * mass (nq) may be NULL; asking for it costs a pass over the scores. A batch shares work: rows of a prefill chunk
 * that share a rotation belong in one call. */
CAIRN_API cairn_status cairn_index_search(const cairn_index *index, cairn_index_scratch *scratch,
                                          const cairn_index_query *queries, size_t nq, uint32_t k,
                                          cairn_index_hit *hits, uint32_t *found, cairn_index_mass *mass);
/* Exact scores of rows [lo, hi): out (hi - lo). Used by the scopes that need a softmax over all landmarks. */
CAIRN_API void cairn_index_scores(const cairn_index *index, const float *q, uint32_t lo, uint32_t hi, float *out);

/* The sealed part as a file (not for scan kinds, nor before the first seal: INVALID): FAISS's own format, then the mean
 * of the rows, which FAISS holds them without. Written beside, synced, renamed. *out_hash is XXH3-64 of it. */
CAIRN_API cairn_status cairn_index_save(const cairn_index *index, const char *path, uint64_t *out_hash);
/* Replaces the sealed part by the file's; `sealed` rows must already have been added. The file is believed only if its
 * hash is `hash`, and its dimension, metric and count fit: else CORRUPT or NOT_FOUND and the index is left unsealed
 * (still right: everything is scanned). `map` maps inverted lists where FAISS can. */
CAIRN_API cairn_status cairn_index_load(cairn_index *index, const char *path, uint64_t hash, size_t sealed, bool map);

/* `auto`: which kind is fastest at equal answers for these rows on this machine? Times the candidate kinds on up to 64
 * of the given queries (n_queries, dim; or of the rows themselves when queries is NULL), one at a time, within about
 * budget_ms. Equal: the hits hold 99 % of the gate mass of the exact k best, on average; any other kind must be a tenth
 * faster than the scan. Writes the kind's name and one sentence why. Below 20,000 rows the answer is "scan" at once.
 * The rows must be those of a kind with int8 images, "scan" or one of FAISS's (else INVALID). */
CAIRN_API cairn_status cairn_index_calibrate(const cairn_index *rows, const float *queries, size_t n_queries,
                                             uint32_t k, uint32_t budget_ms, char kind[64], char why[160]);

#ifdef __cplusplus
}
#endif
#endif
