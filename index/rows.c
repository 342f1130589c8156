/* rows.c - the keys as they were given, and their int8 image for the scan.
 *
 * Why a centre. Landmark keys share a large common part, which adds the same amount to every score of a query but, left
 * in, decides the int8 step: in the demo model it is 7 to 8 long and what distinguishes the keys about 0.5. With
 * l = c + l', a score is q.c + q.l': q.c costs one product per query and frame, and only l' is quantized. Any centre is
 * right, since errors are measured, not assumed; the mean of the earlier rows makes them small.
 *
 * How the bound travels. With l^ and q^ the images as real numbers,
 *     q.l = q.c + q^.l^ + q.(l' - l^) + (q - q^).l^
 * and by Cauchy-Schwarz the last two are at most |q| e + r n, with e = |l' - l^|, n = |l^|, r = |q - q^|. Keys have
 * heavy tails (the largest e of 1024 rows is ten times the median), so one bound for many rows would be useless, and
 * computing one per score would cost as much as the score. Instead the images have four more elements: the row's hold
 * x1 = ceil(16 e / row scale), x2 = ceil(n / (16 row scale)), the query's y1 = ceil(|q| / (16 query scale)),
 * y2 = ceil(16 r / query scale). Then
 *     row scale * query scale * (q^.l^ as integers + x1 y1 + x2 y2)
 * is an upper bound of q.l', and the kernel computes it like any inner product; a query with y1 = y2 = 0 gets the
 * estimate itself. 16 balances the two factors: both stay below 8 sqrt(D), whatever the vectors. e also takes in all
 * f32 rounding of scores, which is proportional to |q| too. */
#include "index_internal.h"

#include <math.h>

enum { FIRST_ROWS = 64, SLACK_ELEMENTS = 4 };
/* With the least |q| of scan.c, no product of scales underflows; nor, by more than is allowed for, a sum of squares. */
static const float SCALE_MIN = 1e-17f;

cairn_status cairn_rows_init(cairn_rows *rows, uint32_t dim, cairn_dtype dtype, bool imaged)
{
    *rows = (cairn_rows){.kernels = cairn_kernels_best(), .dim = dim, .dtype = dtype, .imaged = imaged};
    rows->image_dim = (dim + 3) / 4 * 4 + SLACK_ELEMENTS;
    rows->total = cairn_calloc(dim, sizeof *rows->total);
    rows->centers = cairn_calloc((size_t)CAIRN_FRAMES_MAX * dim, sizeof *rows->centers);
    rows->wide = cairn_alloc_array(dim, sizeof *rows->wide);
    if (rows->total == NULL || rows->centers == NULL || rows->wide == NULL) {
        cairn_rows_wipe(rows);
        return cairn_fail(CAIRN_NO_MEMORY, "index of %u-dimensional rows", dim);
    }
    rows->bytes = dim * (sizeof *rows->total + (CAIRN_FRAMES_MAX + 1) * sizeof *rows->centers);
    return CAIRN_OK;
}

static void image_free(cairn_row_chunk *chunk)
{
    cairn_free(chunk->image);
    cairn_free(chunk->scale);
    cairn_free(chunk->sum);
    chunk->image = NULL;
    chunk->scale = NULL;
    chunk->sum = NULL;
}

void cairn_rows_wipe(cairn_rows *rows)
{
    for (size_t i = 0; i < rows->chunk_count; i++) {
        cairn_part_free(&rows->chunks[i].part, rows->chunks[i].rows);
        image_free(&rows->chunks[i]);
    }
    cairn_free(rows->chunks);
    cairn_free(rows->broken);
    cairn_free(rows->total);
    cairn_free(rows->centers);
    cairn_free(rows->wide);
    *rows = (cairn_rows){0};
}

static size_t row_bytes(const cairn_rows *rows)
{
    return rows->dim * cairn_dtype_size(rows->dtype);
}
static size_t image_bytes(const cairn_rows *rows) /* of a row */
{
    return rows->image_dim + sizeof(float) + sizeof(int32_t);
}

static bool image_new(const cairn_rows *rows, cairn_row_chunk *chunk)
{
    chunk->image = cairn_calloc(chunk->capacity, rows->image_dim);
    chunk->scale = cairn_calloc(chunk->capacity, sizeof *chunk->scale);
    chunk->sum = cairn_calloc(chunk->capacity, sizeof *chunk->sum);
    return chunk->image != NULL && chunk->scale != NULL && chunk->sum != NULL;
}

/* A larger copy of a chunk, its rows at `place` if that is given, of which `part` tells whose it is. The rest of the
 * image is zero, so a group of 16 that is not full yet is defined. */
static cairn_status chunk_grow(cairn_rows *rows, cairn_row_chunk *chunk, size_t capacity, void *place, cairn_part part)
{
    size_t old = chunk->capacity;
    cairn_row_chunk bigger = {.capacity = capacity, .rows = place, .part = part};
    bool imaged = rows->imaged && (old == 0 ? !rows->lean : chunk->image != NULL);
    if (place == NULL) bigger.rows = cairn_alloc(capacity * row_bytes(rows));
    bool complete = bigger.rows != NULL;
    if (imaged) complete = image_new(rows, &bigger) && complete;
    if (!complete) {
        cairn_part_free(&bigger.part, bigger.rows);
        image_free(&bigger);
        return cairn_fail(CAIRN_NO_MEMORY, "%zu rows of %u dimensions after %zu", capacity, rows->dim, rows->count);
    }
    if (old != 0) memcpy(bigger.rows, chunk->rows, old * row_bytes(rows));
    if (old != 0 && imaged) {
        memcpy(bigger.image, chunk->image, old * rows->image_dim);
        memcpy(bigger.scale, chunk->scale, old * sizeof *chunk->scale);
        memcpy(bigger.sum, chunk->sum, old * sizeof *chunk->sum);
    }
    cairn_part_free(&chunk->part, chunk->rows);
    image_free(chunk);
    rows->bytes += (capacity - old) * (row_bytes(rows) + (imaged ? image_bytes(rows) : 0));
    *chunk = bigger;
    return CAIRN_OK;
}

/* An array that doubles: room for at least `count` elements. */
static cairn_status array_reserve(cairn_rows *rows, void **array, size_t *room, size_t count, size_t size)
{
    if (count <= *room) return CAIRN_OK;
    size_t more = *room < 8 ? 8 : *room;
    while (more < count) more *= 2;
    void *bigger = cairn_grow(*array, *room * size, more, size);
    if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "directory of %zu rows", rows->count);
    rows->bytes += (more - *room) * size;
    *array = bigger;
    *room = more;
    return CAIRN_OK;
}

cairn_status cairn_rows_reserve(cairn_rows *rows, size_t count)
{
    cairn_status st;
    size_t chunks = (count + CAIRN_CHUNK_ROWS - 1) / CAIRN_CHUNK_ROWS;
    void *array = rows->chunks;
    if ((st = array_reserve(rows, &array, &rows->chunk_room, chunks, sizeof *rows->chunks)) != CAIRN_OK) return st;
    rows->chunks = array;
    array = rows->broken;
    st = array_reserve(rows, &array, &rows->span_room, cairn_span_of(count) + 1, sizeof *rows->broken);
    if (st != CAIRN_OK) return st;
    rows->broken = array;
    const size_t first = rows->chunk_count, chunk_bytes = CAIRN_CHUNK_ROWS * row_bytes(rows);
    const size_t full = count / CAIRN_CHUNK_ROWS, fresh = full > first ? full - first : 0;
    char *run = NULL;
    for (size_t i = 0; i < chunks; i++) {
        if (i == first) run = cairn_run_new(fresh, chunk_bytes); /* which that chunk owns from here on */
        if (i == rows->chunk_count) rows->chunks[rows->chunk_count++] = (cairn_row_chunk){0};
        cairn_row_chunk *chunk = &rows->chunks[i];
        if (run != NULL && i >= first && i < full) {
            const cairn_part part = cairn_part_of(run, fresh, chunk_bytes, i - first);
            st = chunk_grow(rows, chunk, CAIRN_CHUNK_ROWS, run + (i - first) * chunk_bytes, part);
            if (st != CAIRN_OK) return st;
            continue;
        }
        size_t need = count - i * CAIRN_CHUNK_ROWS;
        size_t capacity = chunk->capacity;
        if (capacity < FIRST_ROWS) capacity = i == 0 ? FIRST_ROWS : CAIRN_CHUNK_ROWS;
        while (capacity < need && capacity < CAIRN_CHUNK_ROWS) capacity *= 2;
        if (capacity != chunk->capacity && (st = chunk_grow(rows, chunk, capacity, NULL, (cairn_part){0})) != CAIRN_OK)
            return st;
    }
    return CAIRN_OK;
}

/* The centre of a frame that begins at this row: the mean so far. */
static void frame_begin(cairn_rows *rows, size_t frame)
{
    float *center = rows->centers + frame * rows->dim;
    double squares = 0;
    for (size_t i = 0; i < rows->dim; i++) {
        center[i] = rows->finite != 0 ? (float)(rows->total[i] / (double)rows->finite) : 0;
        squares += (double)center[i] * (double)center[i];
    }
    rows->center_norm[frame] = sqrt(squares);
}

/* Row `id` is in place: its image, if its chunk has room for it. */
static void row_image(cairn_rows *rows, size_t id, const float *row)
{
    size_t frame = cairn_frame_of(id);
    cairn_row_chunk *chunk = &rows->chunks[id / CAIRN_CHUNK_ROWS];
    if (chunk->image == NULL) return;
    const float *center = rows->centers + frame * rows->dim;
    const cairn_kernels *kernels = rows->kernels;
    const size_t dim = rows->dim;
    /* A row that hardly differs from its centre: steps finer than the rounding of scores would say nothing. */
    double rounding = cairn_rounding(rows->dim);
    float scale =
        fmaxf(kernels->scan_spread(row, center, dim) / 127, (float)(rounding * rows->center_norm[frame]) + SCALE_MIN);
    int8_t values[1024];
    cairn_scan_rounded image;
    double x1;
    double x2;
    for (;; scale *= 2) { /* once, but for vectors made to be awkward */
        kernels->scan_round(row, center, dim, scale, values, &image);
        /* What is left over came in f32: each difference is right to 2^-24 of its up to 128 steps, and the sum of
         * their squares to a dim-th as often. */
        double left =
            sqrt((double)image.left) * (1 + (double)dim * 0x1p-23) + sqrt((double)dim) * 0x1p-16 * (double)scale;
        double n = sqrt((double)image.squares) * (double)scale;
        double e = left + rounding * (2 * rows->center_norm[frame] + n + left);
        x1 = ceil(e / (double)scale * CAIRN_SLACK_STEP * 1.000001);
        x2 = ceil(n / (double)scale / CAIRN_SLACK_STEP * 1.000001);
        if (x1 <= 127 && x2 <= 127) break;
    }
    size_t at = id % CAIRN_CHUNK_ROWS;
    int8_t *to = chunk->image + at / CAIRN_SCAN_GROUP * CAIRN_SCAN_GROUP * rows->image_dim + at % CAIRN_SCAN_GROUP * 4;
    for (size_t i = dim; i % 4 != 0; i++) values[i] = 0;
    for (size_t i = 0; i < dim; i += 4) memcpy(to + i * 16, values + i, 4);
    to += (rows->image_dim - SLACK_ELEMENTS) / 4 * 64;
    to[0] = (int8_t)x1;
    to[1] = (int8_t)x2;
    chunk->sum[at] = image.sum + to[0] + to[1];
    chunk->scale[at] = scale;
}

static void row_added(cairn_rows *rows, size_t id)
{
    double parts[4] = {0}; /* four sums at a time: one would wait for each addition */
    rows->kernels->widen(rows->wide, cairn_rows_at(rows, id), rows->dtype, rows->dim);
    for (size_t i = 0; i < rows->dim; i++) parts[i % 4] += (double)rows->wide[i] * (double)rows->wide[i];
    double squares = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    /* a norm of so much is as good as infinite: sums and bounds would overflow */
    bool finite = squares < CAIRN_ROW_NORM_MAX * CAIRN_ROW_NORM_MAX;
    float norm = finite ? (float)(sqrt(squares) * 1.000001) : INFINITY;
    if (norm > rows->norm_max) rows->norm_max = norm;
    if (rows->imaged) {
        size_t span = cairn_span_of(id);
        if (id == cairn_span_begin(span)) {
            rows->broken[span] = false;
            if (id == 0 || cairn_frame_of(id) != cairn_frame_of(id - 1)) frame_begin(rows, cairn_frame_of(id));
        }
        rows->broken[span] |= !finite;
        if (finite) row_image(rows, id, rows->wide);
    }
    if (!finite) return;
    for (size_t i = 0; i < rows->dim; i++) rows->total[i] += (double)rows->wide[i];
    rows->finite++;
}

cairn_status cairn_rows_add(cairn_rows *rows, size_t n, const void *data)
{
    size_t count;
    if (!cairn_add_size(rows->count, n, &count) || count >= UINT32_MAX)
        return cairn_fail(CAIRN_INVALID, "%zu rows more than %zu: an index numbers them in 32 bits", n, rows->count);
    if (n == 0) return CAIRN_OK;
    cairn_status st = cairn_rows_reserve(rows, count);
    if (st != CAIRN_OK) return st;
    size_t bytes = row_bytes(rows);
    for (size_t i = 0; i < n; i++, rows->count++) {
        cairn_row_chunk *chunk = &rows->chunks[rows->count / CAIRN_CHUNK_ROWS];
        memcpy((char *)chunk->rows + rows->count % CAIRN_CHUNK_ROWS * bytes, (const char *)data + i * bytes, bytes);
        row_added(rows, rows->count);
    }
    return CAIRN_OK;
}

cairn_status cairn_rows_add_images(cairn_rows *rows)
{
    for (size_t i = 0; rows->imaged && i < rows->chunk_count; i++) {
        cairn_row_chunk *chunk = &rows->chunks[i];
        const size_t begin = i * CAIRN_CHUNK_ROWS;
        if (chunk->image != NULL || begin >= rows->count) continue;
        if (!image_new(rows, chunk)) {
            image_free(chunk);
            return cairn_fail(CAIRN_NO_MEMORY, "images of %zu rows of %u dimensions", chunk->capacity, rows->dim);
        }
        rows->bytes += chunk->capacity * image_bytes(rows);
        for (size_t id = begin; id < rows->count && id < begin + CAIRN_CHUNK_ROWS; id++) {
            if (rows->broken[cairn_span_of(id)]) continue;
            cairn_rows_widen(rows, id, 1, rows->wide);
            if (cairn_norm(rows->wide, rows->dim) < CAIRN_ROW_NORM_MAX)
                row_image(rows, id, rows->wide);
            else
                rows->broken[cairn_span_of(id)] = true; /* a packed one may say otherwise */
        }
    }
    return CAIRN_OK;
}

void cairn_rows_clear(cairn_rows *rows)
{
    for (size_t i = 0; i < rows->chunk_count; i++) {
        cairn_row_chunk *chunk = &rows->chunks[i];
        rows->bytes -= chunk->capacity * (row_bytes(rows) + (chunk->image != NULL ? image_bytes(rows) : 0));
        cairn_part_free(&chunk->part, chunk->rows);
        image_free(chunk);
    }
    rows->chunk_count = 0;
    rows->count = 0;
    rows->finite = 0;
    rows->norm_max = 0;
    memset(rows->total, 0, rows->dim * sizeof *rows->total);
}

void cairn_rows_drop_image(cairn_rows *rows, size_t upto)
{
    for (size_t i = 0; i < rows->chunk_count && (i + 1) * CAIRN_CHUNK_ROWS <= upto; i++) {
        cairn_row_chunk *chunk = &rows->chunks[i];
        if (chunk->image == NULL) continue;
        rows->bytes -= chunk->capacity * image_bytes(rows);
        image_free(chunk);
    }
}

void cairn_rows_widen(const cairn_rows *rows, size_t first, size_t n, float *out)
{
    while (n != 0) {
        size_t here = CAIRN_CHUNK_ROWS - first % CAIRN_CHUNK_ROWS;
        if (here > n) here = n;
        rows->kernels->widen(out, cairn_rows_at(rows, first), rows->dtype, here * rows->dim);
        out += here * rows->dim;
        first += here;
        n -= here;
    }
}

void cairn_rows_products(const cairn_rows *rows, const float *a, size_t m, const float *b, size_t n, float *out)
{
    enum { PAYS_FROM = 4 };
    const size_t dim = rows->dim;
    if (m >= PAYS_FROM) {
        cairn_gemm_nt(m, n, dim, a, dim, b, dim, out, n);
        return;
    }
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) out[i * n + j] = rows->kernels->dot(a + i * dim, b + j * dim, dim);
}
