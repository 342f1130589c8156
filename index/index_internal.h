/* index_internal.h - the parts behind include/cairn/index.h. Not installed.
 *
 *   rows.c        the keys themselves (the truth for every score), and beside them their int8 image
 *   select.c      one query's running choice: who may still be among the k best, and the mass seen so far
 *   scan.c        spans of rows past a batch of queries: int8 with a proven bound, or full precision
 *   sketch.c      the same with a few bytes a row, for queries like those it was planned for
 *   sketch_plan.c which dims those bytes hold, and whether they pay
 *   packed.c      all of a scan as bytes, for another process
 *   kind.c        what a kind's name means
 *   sealed.c      the part FAISS holds: built, searched, extended
 *   file.c        the same part as a file
 *   faiss_door.c  the one C file that includes FAISS headers
 *   calibrate.c   which kind is fastest here, on these keys
 *   index.c       the public calls
 */
#ifndef CAIRN_INDEX_INTERNAL_H
#define CAIRN_INDEX_INTERNAL_H

#include <cairn/index.h>

#include "kernels_internal.h"

#include <math.h>
#include <stdio.h>

/* ---- rows ---- */

/* Rows lie in chunks of CHUNK_ROWS, so that adding never moves what is there (only the first chunk grows, by
 * doubling, for the many indexes that stay small). Scanning goes by spans: [0,32) [32,128) [128,512) [512,1024), then
 * every 1024 rows. All rows of a span were quantized around the same centre, the mean of all rows before the span's
 * frame; frames start at 0 (centre 0), 32, 128, 512, 2048, ... So a row's int8 image depends on itself and the rows
 * before it alone, never on how they were added nor on what came later, and neither does anything computed from it. */
enum {
    CAIRN_CHUNK_ROWS = 4096,
    CAIRN_SPAN_ROWS = 1024,
    CAIRN_FRAMES_MAX = 16 /* 32 * 4^14 > 2^32 */
};

/* Memory of a chunk is its own, or a part of a run of huge pages that was mapped for many at once and belongs to the
 * first of them. A fifth of random reads and a sixth of a stream is else looking up small pages. */
typedef struct cairn_part {
    bool in_run;
    void *run; /* NULL: another's */
    size_t run_bytes;
} cairn_part;
static inline void cairn_part_free(const cairn_part *part, void *data)
{
    if (!part->in_run) cairn_free(data);
    cairn_unmap(part->run, part->run_bytes);
}
/* A run for so many new chunks that are full at once, zeroed; NULL where it would not fill half a huge page, or there
 * is no memory for it. A last page that is used by half or more is huge too. */
static inline size_t cairn_run_bytes(size_t chunks, size_t chunk_bytes)
{
    const size_t bytes = chunks * chunk_bytes, rest = bytes % CAIRN_HUGE_PAGE;
    return rest >= CAIRN_HUGE_PAGE / 2 ? bytes - rest + CAIRN_HUGE_PAGE : bytes;
}
static inline char *cairn_run_new(size_t chunks, size_t chunk_bytes)
{
    const size_t bytes = cairn_run_bytes(chunks, chunk_bytes); /* rows are counted in 32 bits */
    return bytes < CAIRN_HUGE_PAGE ? NULL : cairn_map(bytes, true);
}
static inline cairn_part cairn_part_of(char *run, size_t chunks, size_t chunk_bytes, size_t at)
{
    return (cairn_part){true, at == 0 ? run : NULL, at == 0 ? cairn_run_bytes(chunks, chunk_bytes) : 0};
}

typedef struct cairn_row_chunk {
    void *rows;      /* (capacity, dim) of the row type */
    int8_t *image;   /* (capacity, image_dim) interleaved by 16 (kernels_internal.h); NULL: only full precision */
    float *scale;    /* (capacity) */
    int32_t *sum;    /* (capacity) */
    size_t capacity; /* a multiple of 16 */
    cairn_part part; /* of the memory at rows */
} cairn_row_chunk;

typedef struct cairn_rows {
    const cairn_kernels *kernels;
    uint32_t dim;
    uint32_t image_dim; /* dim rounded up to 4, and 4 more: see rows.c */
    cairn_dtype dtype;
    bool imaged; /* rows have an int8 image, */
    bool lean;   /* but those of chunks to come: sketches will do (cairn_index_images) */
    size_t count;
    cairn_row_chunk *chunks; /* grows by doubling */
    size_t chunk_count, chunk_room;
    bool *broken; /* per span: it has rows without an image, so all of it is scored in full precision */
    size_t span_room;
    double *total;  /* (dim) sum of the finite rows so far */
    size_t finite;  /* how many they are */
    float *centers; /* (CAIRN_FRAMES_MAX, dim) */
    double center_norm[CAIRN_FRAMES_MAX];
    float *wide;    /* (dim) scratch of add */
    float norm_max; /* largest |l|, rounded up; INFINITY if a row is not finite */
    size_t bytes;   /* heap held */
} cairn_rows;

cairn_status cairn_rows_init(cairn_rows *rows, uint32_t dim, cairn_dtype dtype, bool imaged);
void cairn_rows_wipe(cairn_rows *rows);
/* All or nothing: on failure the count is as before. */
cairn_status cairn_rows_add(cairn_rows *rows, size_t n, const void *data);
/* Room for so many rows: their chunks, with images unless lean, and a flag for each span. */
cairn_status cairn_rows_reserve(cairn_rows *rows, size_t count);
void cairn_rows_clear(cairn_rows *rows); /* as if none had been added */
/* Makes the images that chunks lack. On failure some lack it still; they are scanned in full precision. */
cairn_status cairn_rows_add_images(cairn_rows *rows);
/* Frees the int8 image of the chunks that lie wholly below `upto`. */
void cairn_rows_drop_image(cairn_rows *rows, size_t upto);
/* n rows from `first` as f32 (n, dim). */
void cairn_rows_widen(const cairn_rows *rows, size_t first, size_t n, float *out);

#define CAIRN_ROW_NORM_MAX 1e18 /* of a finite row */

/* Factor c such that an f32 sum of dim products is off by at most c |a| |b|: twice what n roundings in any order amount
 * to (Higham, section 3.1), and 16 more for the scales and additions around it. */
static inline double cairn_rounding(uint32_t dim)
{
    return ((double)dim + 16) * 0x1p-23;
}
static inline double cairn_norm(const float *x, size_t n)
{
    double squares = 0;
    for (size_t j = 0; j < n; j++) squares += (double)x[j] * (double)x[j];
    return sqrt(squares);
}
/* How a row's image and a query's speak of their errors: see rows.c. */
#define CAIRN_SLACK_STEP 16.0
static inline const int8_t *cairn_row_slack(const cairn_rows *rows, const cairn_row_chunk *chunk, size_t at)
{
    return chunk->image + (at / CAIRN_SCAN_GROUP * rows->image_dim + rows->image_dim - 4) * CAIRN_SCAN_GROUP +
           at % CAIRN_SCAN_GROUP * 4;
}

/* out (m, n) = products of a (m, dim) and b (n, dim), in any order of sums. */
void cairn_rows_products(const cairn_rows *rows, const float *a, size_t m, const float *b, size_t n, float *out);

static inline const void *cairn_rows_at(const cairn_rows *rows, size_t id)
{
    const cairn_row_chunk *chunk = &rows->chunks[id / CAIRN_CHUNK_ROWS];
    return (const char *)chunk->rows + id % CAIRN_CHUNK_ROWS * rows->dim * cairn_dtype_size(rows->dtype);
}
static inline size_t cairn_span_of(size_t row)
{
    return row < 32 ? 0 : row < 128 ? 1 : row < 512 ? 2 : row / CAIRN_SPAN_ROWS + 3;
}
static inline size_t cairn_span_begin(size_t span)
{
    static const size_t first[4] = {0, 32, 128, 512};
    return span < 4 ? first[span] : (span - 3) * CAIRN_SPAN_ROWS;
}
static inline size_t cairn_frame_of(size_t row)
{
    size_t frame = 0;
    for (size_t begin = 32; row >= begin; begin *= 4) frame++;
    return frame;
}

/* ---- one query's choice ---- */

typedef struct cairn_candidate {
    uint32_t id;
    float score;   /* exact, or estimated from the int8 image */
    float highest; /* the exact score is at most this; = score when exact */
    bool exact;
} cairn_candidate;

/* Sums of exp(score - shift), kept apart by how well the scores are known. */
typedef struct cairn_running_mass {
    float shift;  /* the largest score so far */
    double exact; /* rows scored in full precision */
    double image; /* rows known by their image alone */
    double upper; /* the same, each at its upper bound */
    uint64_t image_rows;
    bool unscored; /* there are rows nobody looked at */
} cairn_running_mass;

typedef struct cairn_choice {
    const cairn_rows *rows;
    const float *q;
    uint32_t k;    /* > 0; at most the rows of the range */
    size_t room;   /* of candidates */
    size_t count;  /* of candidates */
    uint32_t kept; /* lower bounds in the heap, at most k */
    float least;   /* the k-th best lower bound so far, -inf before there are k: who cannot reach it is out */
    float *bounds; /* (k) heap of the best lower bounds, smallest first */
    cairn_candidate *candidates; /* (room) */
    bool want_mass;
    cairn_running_mass mass;
    uint64_t rescored; /* rows scored in full precision one by one */
    uint64_t crowded;  /* times the candidates had to be scored before the end of the scan */
} cairn_choice;

/* At least 2 k (select.c). More room means scoring fewer rows that turn out hopeless: at 16,000 harsh rows of 128 and
 * k 16, 96 places scored 160 rows a query, 640 places 30. */
static inline size_t cairn_choice_room(uint32_t k)
{
    return k < 16384 ? 8 * (size_t)k + 512 : 2 * (size_t)k + 98816;
}
void cairn_choice_begin(cairn_choice *choice);
/* Exact scores of rows [first, first + n). `over` is scratch for n indexes. */
void cairn_choice_see(cairn_choice *choice, const float *scores, size_t first, size_t n, uint32_t *over);
/* Upper bounds from the image, each meant plus `bias`. A bound lies above its estimate, and the estimate above the
 * lower bound, by `unit` times scale[i] times what image_slack says (rows.c). `estimates`: for the mass, else NULL. */
typedef struct cairn_image_scores {
    const float *highest, *estimates;
    /* A bit for each row that reached the bar of its query when the kernel ran, from bit first % 16 on; NULL if the
     * query had none. */
    const uint16_t *over;
    size_t first, n;
    float bias;
    float unit;             /* scale of the query */
    int8_t slack_weight[2]; /* of the query: y1, y2 */
} cairn_image_scores;
void cairn_choice_see_image(cairn_choice *choice, const cairn_image_scores *scores, uint32_t *over);
/* What highest must reach for highest + bias to reach the k-th best lower bound so far; -INFINITY before there are k.
 */
float cairn_choice_bar(const cairn_choice *choice, float bias);
/* One row, scored exactly. */
void cairn_choice_see_one(cairn_choice *choice, uint32_t id, float score);
/* The k best, best first, newest first among equals. Returns how many. */
uint32_t cairn_choice_finish(cairn_choice *choice, cairn_index_hit *hits);
cairn_index_mass cairn_choice_mass(const cairn_choice *choice);

/* query . row in full precision; what is not a number ranks last. */
float cairn_exact_score(const cairn_rows *rows, const float *q, size_t id);

/* ---- scanning ---- */

enum {
    CAIRN_SCAN_BATCH = 64,                   /* queries that share one pass */
    CAIRN_SCAN_TOGETHER = 8,                 /* of them, scored in one call of the kernel, */
    CAIRN_SCAN_PIECE = 256,                  /* with so many rows: both stay in L1 */
    CAIRN_SCORE_ROW = CAIRN_SCAN_PIECE + 16, /* a power of two would put all of them on the same cache lines */
    CAIRN_SCAN_SHORT = 256,                  /* a range this short is scored in full precision at once */
    CAIRN_EXACT_ROWS = 64                    /* rows widened at a time */
};

typedef struct cairn_scan_query {
    cairn_choice choice;
    const float *q;
    size_t slot;            /* its place among the queries of the batch */
    uint32_t from, hi;      /* rows still to be scanned: [from, hi) */
    float norm;             /* |q|, rounded up; INFINITY if q is not finite */
    float bias;             /* q . centre of the frame being scanned */
    int8_t slack_weight[2]; /* the last elements of the query's image */
    bool imaged;            /* its int8 image is made */
    bool exact;             /* in full precision from here on */
    bool sketched;          /* has an image for the sketch: */
    double sketch_base;     /* a row's score is at most this, */
    double sketch_unit;     /* and so much for each one of the integer sum */
} cairn_scan_query;

struct cairn_index_scratch {
    cairn_scan_query query[CAIRN_SCAN_BATCH];
    int8_t *image;                    /* (CAIRN_SCAN_BATCH, image_dim), for upper bounds */
    float *scale;                     /* (CAIRN_SCAN_BATCH) */
    float *scores;                    /* (2, CAIRN_SCAN_TOGETHER, CAIRN_SCORE_ROW), at least a chunk's */
    uint32_t *over;                   /* (3, CAIRN_LIST_ROOM) */
    float *wide;                      /* (CAIRN_EXACT_ROWS, dim) */
    int8_t *sketch;                   /* (CAIRN_SCAN_BATCH, width) images for the sketch */
    float *gathered;                  /* (CAIRN_SCAN_BATCH, dim) queries */
    float *products;                  /* (CAIRN_SCAN_BATCH, dim or CAIRN_EXACT_ROWS, the more) of theirs */
    uint32_t hints[CAIRN_EXACT_ROWS]; /* rows for the next search */
    size_t n_hints;
    uint32_t dim;  /* what these arrays were made for */
    void *choices; /* bounds and candidates of a batch */
    size_t choices_bytes;
    void *faiss; /* queries, scores and ids of FAISS */
    size_t faiss_bytes;
    /* Since the scratch was made: for tests and benches. */
    uint64_t searches, rescored, crowded, unproven;
};

typedef struct cairn_sketch cairn_sketch; /* zeroed: none; wipe */

void cairn_scan_prepare(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n);
/* What of rows [begin, end) a query has left, as [*a, *b); false if nothing. */
static inline bool cairn_scan_overlap(const cairn_scan_query *query, size_t begin, size_t end, size_t *a, size_t *b)
{
    *a = query->from > begin ? query->from : begin;
    *b = query->hi < end ? query->hi : end;
    return *a < *b;
}
/* Scans what is left of each of the prepared queries [first, end) of the scratch. sketch may be NULL. */
void cairn_scan(const cairn_rows *rows, const cairn_sketch *sketch, cairn_index_scratch *scratch, size_t first,
                size_t end);
/* Rows that were good for other queries of the batch give queries [first, end) a bar to begin with. */
void cairn_scan_hint(const cairn_rows *rows, cairn_index_scratch *scratch, size_t first, size_t end,
                     const uint32_t *ids, size_t n);

/* ---- sketches: a few bytes a row that rule most rows out (sketch.c, sketch_plan.c) ---- */

enum {
    CAIRN_SKETCH_WIDTH_MAX = 64, /* bytes of a row */
    CAIRN_SKETCH_PIECE = 64      /* rows turned at a time */
};

typedef struct cairn_sketch_chunk {        /* of the same rows as cairn_row_chunk */
    int8_t *rows;                          /* (CAIRN_CHUNK_ROWS, width), interleaved (kernels_internal.h) */
    cairn_part part;                       /* of the memory at rows */
    uint64_t bound[CAIRN_CHUNK_ROWS / 64]; /* a bit a row: has a bound */
    uint32_t *loose;                       /* (loose_room) ascending: rows of the chunk that have none, */
    float *loose_rows;                     /* (loose_room, dim) and what they are */
    size_t loose_count, loose_room;
} cairn_sketch_chunk;

struct cairn_sketch {
    uint32_t width;  /* bytes of a row: width - 1 dims and what is left over; 0: no sketch */
    size_t count;    /* rows [0, count) have one */
    size_t planned;  /* rows there were when a plan was last made, whatever came of it */
    size_t loose;    /* rows without a bound */
    float *center;   /* (dim) */
    float *to_row;   /* (dim, dim): y = to_row (l - center), the dims that tell most first */
    float *to_query; /* (dim, dim): its inverse, transposed */
    float *step;     /* (width - 1) of a level of y, and */
    float *per_step; /* 1 / step */
    float *wide;     /* (2, PIECE, dim) scratch of add */
    float *norms;    /* (dim) of the rows of to_row, rounded up */
    double center_norm;
    double norms_product; /* sum of |row j of to_row| |row j of to_query| */
    double mismatch;      /* |1 - inverse(to_query) to_row|: they are f32 */
    /* sketch.c's h, g, f: weights beside the dims left out, in the row's error, of */
    double head_weight;   /* the rounding of kept dims, divided by */
    double level_weight;  /* levels, times */
    double length_weight; /* l - center, times */
    double slack_step;    /* of the last byte */
    cairn_sketch_chunk *chunks;
    size_t chunk_count;
    size_t bytes; /* heap held */
};

void cairn_sketch_wipe(cairn_sketch *sketch);
/* What f32 leaves open in the score of a query, z its dims turned, for each unit of |l - center|. */
double cairn_sketch_open(const cairn_sketch *sketch, uint32_t dim, const float *z, double norm);
/* What a plan decides: all of the sketch but its rows. width 0: no sketch would pay. queries (n, dim). */
cairn_status cairn_sketch_plan(cairn_sketch *sketch, const cairn_index *index, const float *queries, size_t n,
                               uint32_t k, size_t together);
/* Its pieces, for who has a plan already: room for the numbers of one, what follows from them (false if they cannot be
 * a plan's), room for so many rows, and one row without a bound. */
cairn_status cairn_sketch_make(cairn_sketch *sketch, uint32_t dim);
bool cairn_sketch_width_fits(uint32_t width, uint32_t dim);
bool cairn_sketch_follow(cairn_sketch *sketch, uint32_t dim);
cairn_status cairn_sketch_reserve(cairn_sketch *sketch, size_t count);
cairn_status cairn_sketch_put_loose(cairn_sketch *sketch, const cairn_rows *rows, size_t id);
/* Sketches the rows that have none yet. On failure the count is what was done. */
cairn_status cairn_sketch_extend(cairn_sketch *sketch, const cairn_rows *rows);
/* The images of n prepared queries. */
void cairn_sketch_prepare(const cairn_sketch *sketch, const cairn_rows *rows, cairn_index_scratch *scratch, size_t n);
/* Which rows of a part of a chunk may reach the bars of some queries. */
enum { CAIRN_LIST_ROOM = CAIRN_CHUNK_ROWS + 2 }; /* of one query, whatever passes: two more are written to */
typedef struct cairn_sketch_passed {
    size_t first, blocks; /* rows from `first` on, in blocks of SKETCH_BLOCK; 0 blocks: none */
    uint32_t *at;         /* (room): numbers from `first` on, of the first `listed` queries' rows */
    size_t room, listed;
    size_t begin[CAIRN_SCAN_TOGETHER + 1]; /* of each listed query's in `at`, and the end of the last one's */
    uint64_t over[CAIRN_SCAN_TOGETHER * (CAIRN_CHUNK_ROWS / 64)]; /* (queries, blocks) a bit a row */
} cairn_sketch_passed;

/* Rows [begin, end) of one chunk past queries [first, n), at most TOGETHER, each of which has a bar. Those that pass
 * are asked for: by the time the next rows have been passed over, look finds them near. */
void cairn_sketch_pass(const cairn_sketch *sketch, const cairn_rows *rows, cairn_index_scratch *scratch, size_t first,
                       size_t n, size_t begin, size_t end, cairn_sketch_passed *passed);
/* The same queries: what passed, in full precision. */
void cairn_sketch_look(const cairn_rows *rows, cairn_index_scratch *scratch, size_t first, size_t n,
                       const cairn_sketch_passed *passed);

/* ---- kinds ---- */

typedef enum cairn_kind_type {
    CAIRN_KIND_SCAN,
    CAIRN_KIND_EXACT,
    CAIRN_KIND_FLAT, /* FAISS, every row in f32: proven against our own scores */
    CAIRN_KIND_IVF,  /* FAISS, the number of lists follows from the number of rows */
    CAIRN_KIND_OTHER /* FAISS, by factory string */
} cairn_kind_type;

enum { CAIRN_KIND_TEXT = 128 };

typedef struct cairn_kind {
    cairn_kind_type type;
    char name[CAIRN_KIND_TEXT];    /* as given */
    char factory[CAIRN_KIND_TEXT]; /* for FAISS; of IVF a small stand-in */
    char params[CAIRN_KIND_TEXT];  /* "nprobe=32,..." or "" */
} cairn_kind;

/* Everything that can be said without FAISS: INVALID with the reason. */
cairn_status cairn_kind_parse(const char *text, cairn_kind *out);
/* UNSUPPORTED for a factory string outside the family whose operations are known not to end the process. */
cairn_status cairn_kind_check(const cairn_kind *kind);
/* The factory string and parameters to build with for `rows` rows. */
void cairn_kind_for(const cairn_kind *kind, size_t rows, char factory[CAIRN_KIND_TEXT], char params[CAIRN_KIND_TEXT]);
/* Clusters a factory string trains: so many groups of 39 rows keep FAISS's k-means from complaining. */
size_t cairn_kind_clusters(const char *factory);

/* ---- FAISS ---- */

typedef struct cairn_faiss cairn_faiss; /* new / free */

cairn_status cairn_faiss_new(const char *factory, const char *params, uint32_t dim, cairn_faiss **out);
void cairn_faiss_free(cairn_faiss *faiss);
cairn_status cairn_faiss_set(cairn_faiss *faiss, const char *params); /* "" is fine */
bool cairn_faiss_trained(const cairn_faiss *faiss);
size_t cairn_faiss_rows(const cairn_faiss *faiss);
cairn_status cairn_faiss_train(cairn_faiss *faiss, size_t n, const float *rows);
cairn_status cairn_faiss_add(cairn_faiss *faiss, size_t n, const float *rows);
/* scores and ids (n, k), best first; id -1 = fewer than k were found. */
cairn_status cairn_faiss_search(const cairn_faiss *faiss, size_t n, const float *q, size_t k, float *scores,
                                int64_t *ids);
cairn_status cairn_faiss_write(const cairn_faiss *faiss, FILE *file);
/* Reads up to the end of what FAISS wrote. `file` must come from fdopen or fopen when map is set. CORRUPT if FAISS
 * cannot read it or the dimension or metric are not ours. */
cairn_status cairn_faiss_read(FILE *file, const char *params, uint32_t dim, bool map, cairn_faiss **out);

typedef struct cairn_sealed {
    cairn_faiss *faiss; /* NULL: nothing sealed */
    size_t rows;
    float *center; /* (dim) FAISS holds the rows minus this */
    double center_norm;
    size_t bytes;  /* heap FAISS holds, as the size of what it would write */
    bool mapped;   /* lists are in a mapped file: read only */
    char *path;    /* of the mapped file */
    uint64_t hash; /* likewise */
} cairn_sealed;

void cairn_sealed_wipe(cairn_sealed *sealed);
/* Takes a center (dim), made with cairn_alloc. */
void cairn_sealed_set_center(cairn_sealed *sealed, float *center, uint32_t dim);
/* Rows [sealed->rows, upto) come in. On failure nothing is sealed any more. */
cairn_status cairn_sealed_extend(cairn_sealed *sealed, const cairn_kind *kind, const cairn_rows *rows, size_t upto);
/* Offers what FAISS finds to the prepared queries and moves their `from` past the sealed rows; a query for which that
 * would not be enough keeps its `from`, and is scanned. */
cairn_status cairn_sealed_search(const cairn_sealed *sealed, const cairn_kind *kind, const cairn_rows *rows,
                                 cairn_index_scratch *scratch, size_t n);
cairn_status cairn_sealed_save(const cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim, const char *path,
                               uint64_t *out_hash);
/* On failure nothing is sealed any more. */
cairn_status cairn_sealed_load(cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim, size_t rows,
                               const char *path, uint64_t hash, bool map);
/* Lists in a mapped file cannot be changed: reads the file again, into memory. */
cairn_status cairn_sealed_unmap(cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim);
/* What FAISS would write, in bytes; 0 if it cannot say. */
size_t cairn_sealed_file_bytes(const cairn_sealed *sealed, uint32_t dim);

struct cairn_index {
    cairn_kind kind;
    cairn_rows rows;
    cairn_sketch sketch;
    cairn_sealed sealed;
};

#endif
