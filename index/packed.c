/* packed.c - a scan as bytes: its rows, what it knows of them, and what it has learnt, so that another process begins
 * where this one ends, without a look at each row.
 *
 *   offset  size    field
 *        0     4    magic 'C' 'R' 'N' 'H'
 *        4     4    version 1
 *        8     4    dim D
 *       12     4    dtype of the rows
 *       16     4    width w, bytes of a row's sketch: 8, 12, 16, 24, 32, 48, 64, less than D; 0: none
 *       20     4    rows R, >= 1
 *       24     4    finite rows
 *       28     4    largest length   f32, INFINITY if a row is not finite
 *       32    32    weights h, g, f of sketch.c and its slack step, f64; zeros without a sketch
 *       64     8D   sum of the finite rows, f64
 *        .     4DF  centres of their F frames, f32
 *        .     S    a byte for each of their S spans: 1 = has a row that is not finite
 *   with a sketch:
 *        .     4D   centre, f32
 *        .     4DD  to_row
 *        .     4DD  to_query
 *        .     4(w-1) step of a level
 *   then for every 4,096 rows, the last time for n <= 4,096 of them, b = ceil(n / 64):
 *        .     .    rows (n, D)
 *     with a sketch:
 *        .     4    loose L
 *        .     4L   loose rows       ascending, less than n
 *        .     8b   bound            a bit a row: all but the loose ones
 *        .     64wb sketch           interleaved by 64 rows (kernels_internal.h)
 *   at the end:
 *        .     8    hash             XXH3-64 over all before
 *
 * Little-endian. Lengths follow from what was read before and are compared with it; numbers that follow from others are
 * made again. */
#include "index_internal.h"

#include <math.h>

enum { VERSION = 1, HEAD = 64, FOOT = 8 };
static const char MAGIC[4] = {'C', 'R', 'N', 'H'};

static size_t blocks_of(size_t n)
{
    return (n + CAIRN_SKETCH_BLOCK - 1) / CAIRN_SKETCH_BLOCK;
}

static size_t rows_in_chunk(size_t rows, size_t chunk)
{
    const size_t left = rows - chunk * CAIRN_CHUNK_ROWS;
    return left < CAIRN_CHUNK_ROWS ? left : CAIRN_CHUNK_ROWS;
}

static size_t row_bytes(const cairn_rows *rows)
{
    return rows->dim * cairn_dtype_size(rows->dtype);
}

static size_t frames_of(size_t rows)
{
    return cairn_frame_of(rows - 1) + 1;
}

static size_t spans_of(size_t rows)
{
    return cairn_span_of(rows - 1) + 1;
}

/* to_row and to_query lie back to back. */
static size_t matrices_bytes(uint32_t dim)
{
    return 2 * (size_t)dim * dim * sizeof(float);
}

bool cairn_index_learnt(const cairn_index *index)
{
    return index->sketch.width != 0;
}

size_t cairn_index_packed_bytes(const cairn_index *index)
{
    const cairn_rows *rows = &index->rows;
    const cairn_sketch *s = &index->sketch;
    const uint32_t dim = rows->dim;
    if (index->kind.type != CAIRN_KIND_SCAN || rows->count == 0) return 0;
    size_t bytes = HEAD + dim * sizeof(double) + frames_of(rows->count) * dim * sizeof(float) + spans_of(rows->count) +
                   rows->count * row_bytes(rows) + FOOT;
    if (s->width == 0) return bytes;
    bytes += (dim + s->width - 1) * sizeof(float) + matrices_bytes(dim);
    for (size_t c = 0; c * CAIRN_CHUNK_ROWS < rows->count; c++)
        bytes += sizeof(uint32_t) * (1 + s->chunks[c].loose_count) +
                 blocks_of(rows_in_chunk(rows->count, c)) * (sizeof(uint64_t) + CAIRN_SKETCH_BLOCK * (size_t)s->width);
    return bytes;
}

/* ---- packing ---- */

typedef struct sink {
    bool (*write)(void *arg, const void *data, size_t bytes);
    void *arg;
    cairn_hasher *hasher;
    bool right;
} sink;

static void put(sink *s, const void *data, size_t bytes)
{
    if (!s->right || bytes == 0) return;
    cairn_hasher_add(s->hasher, data, bytes);
    s->right = s->write(s->arg, data, bytes);
}

static void put_chunk(sink *to, const cairn_rows *rows, const cairn_sketch *s, size_t c)
{
    const size_t n = rows_in_chunk(rows->count, c), blocks = blocks_of(n);
    put(to, rows->chunks[c].rows, n * row_bytes(rows));
    if (s->width == 0) return;
    const cairn_sketch_chunk *chunk = &s->chunks[c];
    const uint32_t loose = (uint32_t)chunk->loose_count;
    put(to, &loose, sizeof loose);
    put(to, chunk->loose, chunk->loose_count * sizeof *chunk->loose);
    put(to, chunk->bound, blocks * sizeof *chunk->bound);
    put(to, chunk->rows, blocks * CAIRN_SKETCH_BLOCK * s->width);
}

cairn_status cairn_index_pack(const cairn_index *index, bool (*write)(void *arg, const void *data, size_t bytes),
                              void *arg)
{
    const cairn_rows *rows = &index->rows;
    const cairn_sketch *s = &index->sketch;
    const uint32_t dim = rows->dim;
    const double weights[] = {s->head_weight, s->level_weight, s->length_weight, s->slack_step};
    uint8_t head[HEAD] = {0};
    uint8_t foot[FOOT];
    if (cairn_index_packed_bytes(index) == 0)
        return cairn_fail(CAIRN_INVALID, "%zu rows of kind '%s' are nothing to pack", rows->count, index->kind.name);
    sink to = {write, arg, cairn_hasher_new(), true};
    if (to.hasher == NULL) return cairn_fail(CAIRN_NO_MEMORY, "hash of %zu rows", rows->count);
    memcpy(head, MAGIC, sizeof MAGIC);
    cairn_put_le32(head + 4, VERSION);
    cairn_put_le32(head + 8, dim);
    cairn_put_le32(head + 12, (uint32_t)rows->dtype);
    cairn_put_le32(head + 16, s->width);
    cairn_put_le32(head + 20, (uint32_t)rows->count);
    cairn_put_le32(head + 24, (uint32_t)rows->finite);
    memcpy(head + 28, &rows->norm_max, sizeof rows->norm_max);
    if (s->width != 0) memcpy(head + 32, weights, sizeof weights);
    put(&to, head, sizeof head);
    put(&to, rows->total, dim * sizeof *rows->total);
    put(&to, rows->centers, frames_of(rows->count) * dim * sizeof *rows->centers);
    for (size_t i = 0; i < spans_of(rows->count); i++) put(&to, &(uint8_t){rows->broken[i]}, 1);
    if (s->width != 0) {
        put(&to, s->center, dim * sizeof *s->center);
        put(&to, s->to_row, matrices_bytes(dim));
        put(&to, s->step, (s->width - 1) * sizeof *s->step);
    }
    for (size_t c = 0; c * CAIRN_CHUNK_ROWS < rows->count; c++) put_chunk(&to, rows, s, c);
    cairn_put_le64(foot, cairn_hasher_value(to.hasher));
    put(&to, foot, sizeof foot);
    cairn_hasher_free(to.hasher);
    return to.right ? CAIRN_OK : cairn_fail(CAIRN_IO, "packing %zu rows: they are not taken", rows->count);
}

/* ---- unpacking ---- */

typedef struct source {
    bool (*read)(void *arg, void *data, size_t bytes);
    void *arg;
    cairn_hasher *hasher;
    cairn_status status; /* NO_MEMORY, or OK: what is not right otherwise is the bytes */
} source;

static bool get(source *s, void *data, size_t bytes)
{
    if (bytes == 0) return true;
    if (!s->read(s->arg, data, bytes)) return false;
    cairn_hasher_add(s->hasher, data, bytes);
    return true;
}

static bool worked(source *s, cairn_status st)
{
    s->status = st;
    return st == CAIRN_OK;
}

static bool all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return false;
    return true;
}

typedef struct packed {
    cairn_index *index;
    size_t rows;   /* R */
    size_t wanted; /* rows [0, wanted), at most R */
    uint32_t width;
    uint8_t head[HEAD];
    void *piece; /* (CHUNK_ROWS, D) where the rows are not wanted as they are */
} packed;

/* What is known of all rows. Where only some are wanted it is found out again. */
static bool get_state(source *s, packed *p)
{
    cairn_rows *rows = &p->index->rows;
    const size_t dim = rows->dim, frames = frames_of(p->rows), spans = spans_of(p->rows);
    double *total = cairn_alloc_array(dim, sizeof *total);
    float *centers = cairn_alloc_array(frames * dim, sizeof *centers);
    uint8_t *broken = cairn_alloc(spans);
    bool right = worked(s, total != NULL && centers != NULL && broken != NULL
                               ? CAIRN_OK
                               : cairn_fail(CAIRN_NO_MEMORY, "unpacking %zu rows", p->rows)) &&
                 get(s, total, dim * sizeof *total) && get(s, centers, frames * dim * sizeof *centers) &&
                 get(s, broken, spans);
    /* what sums and means of finite rows can be: images made around others might never fit (rows.c) */
    const double finite = cairn_get_le32(p->head + 24);
    for (size_t i = 0; right && i < dim; i++) right = fabs(total[i]) <= CAIRN_ROW_NORM_MAX * finite;
    for (size_t f = 0; right && f < frames; f++) right = cairn_norm(centers + f * dim, dim) <= CAIRN_ROW_NORM_MAX;
    for (size_t i = 0; right && i < spans; i++) right = broken[i] <= 1;
    if (right && p->wanted == p->rows && worked(s, cairn_rows_reserve(rows, p->rows))) {
        memcpy(rows->total, total, dim * sizeof *total);
        memcpy(rows->centers, centers, frames * dim * sizeof *centers);
        for (size_t f = 0; f < frames; f++) rows->center_norm[f] = cairn_norm(centers + f * dim, dim);
        for (size_t i = 0; i < spans; i++) rows->broken[i] = broken[i] != 0;
        rows->finite = cairn_get_le32(p->head + 24);
        memcpy(&rows->norm_max, p->head + 28, sizeof rows->norm_max);
        right = rows->finite <= p->rows && rows->norm_max >= 0; /* not NaN */
    }
    cairn_free(total);
    cairn_free(centers);
    cairn_free(broken);
    return right && s->status == CAIRN_OK;
}

static bool get_plan(source *s, const packed *p, cairn_sketch *sketch)
{
    const uint32_t dim = p->index->rows.dim;
    double weights[4];
    sketch->width = p->width;
    sketch->planned = p->wanted;
    if (!worked(s, cairn_sketch_make(sketch, dim)) || !worked(s, cairn_sketch_reserve(sketch, p->wanted)) ||
        !get(s, sketch->center, dim * sizeof *sketch->center) || !get(s, sketch->to_row, matrices_bytes(dim)) ||
        !get(s, sketch->step, (sketch->width - 1) * sizeof *sketch->step))
        return false;
    memcpy(weights, p->head + 32, sizeof weights);
    sketch->head_weight = weights[0];
    sketch->level_weight = weights[1];
    sketch->length_weight = weights[2];
    sketch->slack_step = weights[3];
    return all_finite(sketch->center, dim) && all_finite(sketch->to_row, 2 * (size_t)dim * dim) &&
           cairn_sketch_follow(sketch, dim);
}

static bool get_rows(source *s, packed *p, size_t c, size_t n)
{
    cairn_rows *rows = &p->index->rows;
    const size_t begin = c * CAIRN_CHUNK_ROWS;
    if (p->wanted == p->rows) {
        rows->count = begin + n;
        return get(s, rows->chunks[c].rows, n * row_bytes(rows));
    }
    if (!get(s, p->piece, n * row_bytes(rows))) return false;
    const size_t left = begin < p->wanted ? p->wanted - begin : 0;
    return worked(s, cairn_rows_add(rows, left < n ? left : n, p->piece));
}

/* The sketch of a chunk's n rows; of one that is wanted in part, or not at all, nothing is kept. */
static bool get_sketch(source *s, const packed *p, cairn_sketch *sketch, size_t c, size_t n)
{
    const size_t begin = c * CAIRN_CHUNK_ROWS, blocks = blocks_of(n), row_block = CAIRN_SKETCH_BLOCK * (size_t)p->width;
    const bool whole = begin + n <= p->wanted;
    uint32_t loose = 0;
    uint64_t bound[CAIRN_CHUNK_ROWS / CAIRN_SKETCH_BLOCK];
    uint32_t ids[CAIRN_CHUNK_ROWS];
    int8_t unwanted[CAIRN_SKETCH_BLOCK * CAIRN_SKETCH_WIDTH_MAX];
    if (!get(s, &loose, sizeof loose) || loose > n || !get(s, ids, loose * sizeof *ids) ||
        !get(s, bound, blocks * sizeof *bound))
        return false;
    if (whole && !get(s, sketch->chunks[c].rows, blocks * row_block)) return false;
    for (size_t b = 0; !whole && b < blocks; b++)
        if (!get(s, unwanted, row_block)) return false;
    uint32_t next = 0;
    for (size_t i = 0; i < blocks * CAIRN_SKETCH_BLOCK; i++) { /* a row is loose or has a bound */
        const bool is_loose = next < loose && ids[next] == i;
        const bool has = (bound[i / 64] >> i % 64 & 1) != 0;
        if (has != (i < n && !is_loose) || (is_loose && i >= n)) return false;
        next += is_loose;
        if (whole && is_loose && !worked(s, cairn_sketch_put_loose(sketch, &p->index->rows, begin + i))) return false;
    }
    if (whole) {
        memcpy(sketch->chunks[c].bound, bound, blocks * sizeof *bound);
        sketch->count = begin + n;
    }
    return next == loose;
}

static bool get_all(source *s, packed *p, cairn_sketch *sketch)
{
    uint8_t foot[FOOT];
    if (!get_state(s, p) || (p->width != 0 && !get_plan(s, p, sketch))) return false;
    for (size_t c = 0; c * CAIRN_CHUNK_ROWS < p->rows; c++) {
        const size_t n = rows_in_chunk(p->rows, c);
        if (!get_rows(s, p, c, n) || (p->width != 0 && !get_sketch(s, p, sketch, c, n))) return false;
    }
    const uint64_t hash = cairn_hasher_value(s->hasher);
    return get(s, foot, sizeof foot) && cairn_get_le64(foot) == hash;
}

static bool get_head(source *s, packed *p, size_t upto)
{
    const cairn_rows *rows = &p->index->rows;
    if (!get(s, p->head, sizeof p->head) || memcmp(p->head, MAGIC, sizeof MAGIC) != 0 ||
        cairn_get_le32(p->head + 4) != VERSION || cairn_get_le32(p->head + 8) != rows->dim ||
        cairn_get_le32(p->head + 12) != (uint32_t)rows->dtype)
        return false;
    p->width = cairn_get_le32(p->head + 16);
    p->rows = cairn_get_le32(p->head + 20);
    p->wanted = p->rows < upto ? p->rows : upto;
    return p->rows != 0 && p->rows < UINT32_MAX && (p->width == 0 || cairn_sketch_width_fits(p->width, rows->dim));
}

cairn_status cairn_index_unpack(cairn_index *index, size_t upto, bool images,
                                bool (*read)(void *arg, void *data, size_t bytes), void *arg)
{
    if (index->kind.type != CAIRN_KIND_SCAN || index->rows.count != 0)
        return cairn_fail(CAIRN_INVALID, "an index of kind '%s' with %zu rows is nothing to unpack into",
                          index->kind.name, index->rows.count);
    cairn_sketch sketch = {0};
    packed p = {.index = index};
    source s = {read, arg, cairn_hasher_new(), CAIRN_OK};
    if (s.hasher == NULL) return cairn_fail(CAIRN_NO_MEMORY, "hash of packed rows");
    index->rows.lean = true; /* until all is known: images are made at the end, if at all */
    bool right = get_head(&s, &p, upto);
    if (right && p.wanted != p.rows)
        right = worked(&s, (p.piece = cairn_alloc_array(CAIRN_CHUNK_ROWS, row_bytes(&index->rows))) != NULL
                               ? CAIRN_OK
                               : cairn_fail(CAIRN_NO_MEMORY, "unpacking %zu rows", p.rows));
    right = right && get_all(&s, &p, &sketch);
    if (right && sketch.width != 0) right = worked(&s, cairn_sketch_extend(&sketch, &index->rows));
    if (right && (images || sketch.width == 0)) right = worked(&s, cairn_index_images(index, true));
    cairn_free(p.piece);
    cairn_hasher_free(s.hasher);
    if (right) {
        index->sketch = sketch;
        return CAIRN_OK;
    }
    cairn_sketch_wipe(&sketch);
    cairn_rows_clear(&index->rows);
    index->rows.lean = false;
    return s.status != CAIRN_OK
               ? s.status
               : cairn_fail(CAIRN_CORRUPT,
                            "packed rows of %u dimensions, sketch %u wide: not what they were or should be",
                            (unsigned)index->rows.dim, (unsigned)p.width);
}
