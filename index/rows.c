/* rows.c - the keys as they were given, and their int8 image for the scan.
 *
 * Why a centre: landmark keys share a large common part (a mean per channel), which adds the same amount to every
 * score of a query but, left in, makes max|l| and so the int8 step several times larger. With l = c + l', a score is
 * q.c + q.l': q.c costs one product per query and frame, and only l' is quantized. Any centre is right, since the
 * residual |l - c - l^| is measured, not assumed; the mean of the earlier rows makes it small. */
#include "index_internal.h"

#include <math.h>

enum { FIRST_ROWS = 64 };

static float round_up(double x)
{
    return (float)(x * 1.000001 + 1e-37); /* the float is at least x: 1e-6 is 16 roundings to nearest */
}

cairn_status cairn_rows_init(cairn_rows *rows, uint32_t dim, cairn_dtype dtype, bool imaged)
{
    *rows = (cairn_rows){.kernels = cairn_kernels_best(), .dim = dim, .dtype = dtype, .imaged = imaged};
    rows->image_dim = (dim + 3) / 4 * 4;
    rows->total = cairn_calloc(dim, sizeof *rows->total);
    rows->centers = cairn_calloc((size_t)CAIRN_FRAMES_MAX * dim, sizeof *rows->centers);
    rows->wide = cairn_alloc_array(2 * (size_t)dim, sizeof *rows->wide);
    if (rows->total == NULL || rows->centers == NULL || rows->wide == NULL) {
        cairn_rows_wipe(rows);
        return cairn_fail(CAIRN_NO_MEMORY, "index of %u-dimensional rows", dim);
    }
    rows->bytes = dim * (sizeof *rows->total + (CAIRN_FRAMES_MAX + 2) * sizeof *rows->centers);
    return CAIRN_OK;
}

static void image_free(cairn_row_chunk *chunk)
{
    cairn_free(chunk->image);
    cairn_free(chunk->scale);
    cairn_free(chunk->sum);
    cairn_free(chunk->residual);
    cairn_free(chunk->image_norm);
    chunk->image = NULL;
    chunk->scale = NULL;
    chunk->sum = NULL;
    chunk->residual = NULL;
    chunk->image_norm = NULL;
}

void cairn_rows_wipe(cairn_rows *rows)
{
    for (size_t i = 0; i < rows->chunk_count; i++) {
        cairn_free(rows->chunks[i].rows);
        image_free(&rows->chunks[i]);
    }
    cairn_free(rows->chunks);
    cairn_free(rows->spans);
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
    return rows->image_dim + 3 * sizeof(float) + sizeof(int32_t);
}

/* A larger copy of a chunk. The rest of the image is zero, so a group of 16 that is not full yet is defined. */
static cairn_status chunk_grow(cairn_rows *rows, cairn_row_chunk *chunk, size_t capacity)
{
    size_t old = chunk->capacity;
    cairn_row_chunk bigger = {.capacity = capacity};
    bool imaged = rows->imaged && (old == 0 || chunk->image != NULL);
    bool complete = (bigger.rows = cairn_alloc(capacity * row_bytes(rows))) != NULL;
    if (imaged) {
        bigger.image = cairn_calloc(capacity, rows->image_dim);
        bigger.scale = cairn_calloc(capacity, sizeof *bigger.scale);
        bigger.sum = cairn_calloc(capacity, sizeof *bigger.sum);
        bigger.residual = cairn_calloc(capacity, sizeof *bigger.residual);
        bigger.image_norm = cairn_calloc(capacity, sizeof *bigger.image_norm);
        complete = complete && bigger.image != NULL && bigger.scale != NULL && bigger.sum != NULL &&
                   bigger.residual != NULL && bigger.image_norm != NULL;
    }
    if (!complete) {
        cairn_free(bigger.rows);
        image_free(&bigger);
        return cairn_fail(CAIRN_NO_MEMORY, "%zu rows of %u dimensions after %zu", capacity, rows->dim, rows->count);
    }
    if (old != 0) memcpy(bigger.rows, chunk->rows, old * row_bytes(rows));
    if (old != 0 && imaged) {
        memcpy(bigger.image, chunk->image, old * rows->image_dim);
        memcpy(bigger.scale, chunk->scale, old * sizeof *chunk->scale);
        memcpy(bigger.sum, chunk->sum, old * sizeof *chunk->sum);
        memcpy(bigger.residual, chunk->residual, old * sizeof *chunk->residual);
        memcpy(bigger.image_norm, chunk->image_norm, old * sizeof *chunk->image_norm);
    }
    cairn_free(chunk->rows);
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

static cairn_status reserve(cairn_rows *rows, size_t count)
{
    cairn_status st;
    size_t chunks = (count + CAIRN_CHUNK_ROWS - 1) / CAIRN_CHUNK_ROWS;
    void *array = rows->chunks;
    if ((st = array_reserve(rows, &array, &rows->chunk_room, chunks, sizeof *rows->chunks)) != CAIRN_OK) return st;
    rows->chunks = array;
    array = rows->spans;
    if ((st = array_reserve(rows, &array, &rows->span_room, cairn_span_of(count) + 1, sizeof *rows->spans)) != CAIRN_OK)
        return st;
    rows->spans = array;
    for (size_t i = 0; i < chunks; i++) {
        if (i == rows->chunk_count) rows->chunks[rows->chunk_count++] = (cairn_row_chunk){0};
        cairn_row_chunk *chunk = &rows->chunks[i];
        size_t need = count - i * CAIRN_CHUNK_ROWS;
        size_t capacity = chunk->capacity;
        if (capacity < FIRST_ROWS) capacity = i == 0 ? FIRST_ROWS : CAIRN_CHUNK_ROWS;
        while (capacity < need && capacity < CAIRN_CHUNK_ROWS) capacity *= 2;
        if (capacity != chunk->capacity && (st = chunk_grow(rows, chunk, capacity)) != CAIRN_OK) return st;
    }
    return CAIRN_OK;
}

/* The centre of a frame that begins at this row: the mean so far. */
static void frame_begin(cairn_rows *rows, size_t row)
{
    float *center = rows->centers + cairn_frame_of(row) * rows->dim;
    for (size_t i = 0; i < rows->dim; i++)
        center[i] = rows->finite != 0 ? (float)(rows->total[i] / (double)rows->finite) : 0;
}

/* Row `id` is in place: its int8 image, and what the span must know of it. */
static void row_image(cairn_rows *rows, size_t id, const float *row, bool finite)
{
    size_t span = cairn_span_of(id);
    if (id == cairn_span_begin(span)) {
        rows->spans[span] = (cairn_row_span){0};
        if (cairn_frame_of(id) != cairn_frame_of(id - (id != 0)) || id == 0) frame_begin(rows, id);
    }
    cairn_row_chunk *chunk = &rows->chunks[id / CAIRN_CHUNK_ROWS];
    size_t at = id % CAIRN_CHUNK_ROWS;
    if (chunk->image == NULL) return;
    if (!finite) { /* the image stays zero, and the bound sends the whole span to full precision */
        chunk->residual[at] = INFINITY;
        rows->spans[span].residual = INFINITY;
        return;
    }
    const float *center = rows->centers + cairn_frame_of(id) * rows->dim;
    float *apart = rows->wide + rows->dim;
    int8_t values[1024];
    for (size_t i = 0; i < rows->dim; i++) apart[i] = row[i] - center[i];
    float scale = cairn_scan_quantize(apart, rows->dim, values, &chunk->sum[at]);
    int8_t *image = chunk->image + at / CAIRN_SCAN_GROUP * CAIRN_SCAN_GROUP * rows->image_dim + at % 16 * 4;
    double residual = 0;
    double squares = 0;
    for (size_t i = 0; i < rows->dim; i++) {
        double miss = (double)row[i] - center[i] - (double)scale * values[i];
        residual += miss * miss;
        squares += (double)values[i] * values[i];
        image[i / 4 * 64 + i % 4] = values[i];
    }
    chunk->scale[at] = scale;
    chunk->residual[at] = round_up(sqrt(residual));
    chunk->image_norm[at] = round_up(sqrt(squares) * (double)scale);
    if (chunk->residual[at] > rows->spans[span].residual) rows->spans[span].residual = chunk->residual[at];
    if (chunk->image_norm[at] > rows->spans[span].image_norm) rows->spans[span].image_norm = chunk->image_norm[at];
}

static void row_added(cairn_rows *rows, size_t id)
{
    double squares = 0;
    rows->kernels->widen(rows->wide, cairn_rows_at(rows, id), rows->dtype, rows->dim);
    for (size_t i = 0; i < rows->dim; i++) squares += (double)rows->wide[i] * rows->wide[i];
    bool finite =
        isfinite((float)squares); /* squares in double cannot overflow, their float can: then as good as inf */
    float norm = finite ? round_up(sqrt(squares)) : INFINITY;
    if (norm > rows->norm_max) rows->norm_max = norm;
    if (rows->imaged) row_image(rows, id, rows->wide, finite);
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
    cairn_status st = reserve(rows, count);
    if (st != CAIRN_OK) return st;
    size_t bytes = row_bytes(rows);
    for (size_t i = 0; i < n; i++, rows->count++) {
        cairn_row_chunk *chunk = &rows->chunks[rows->count / CAIRN_CHUNK_ROWS];
        memcpy((char *)chunk->rows + rows->count % CAIRN_CHUNK_ROWS * bytes, (const char *)data + i * bytes, bytes);
        row_added(rows, rows->count);
    }
    return CAIRN_OK;
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
