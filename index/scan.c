/* scan.c - spans of rows past a batch of queries.
 *
 * The sketch, for D = 32 and 1024 rows a span: 32 KiB of int8 rows, in L2 while all 64 queries of a prefill batch pass
 * over them, 4 at a time; their scores (16 KiB) stay in L1 until the next 4. A score costs 2 bytes of
 * multiply-adds at D = 32 plus its conversion, and one comparison against the query's running bar.
 *
 * The bound. With c the span's centre, l = c + l', l^ and q^ the int8 images as real numbers:
 *   q.l = q.c + q.l' = q.c + q^.l^ + q.(l' - l^) + (q - q^).l^
 * so |q.l - (q.c + q^.l^)| <= |q| |l' - l^| + |q - q^| |l^| by Cauchy-Schwarz: four norms, all measured. The int8 sum
 * is exact (127^2 * 1024 < 2^24), what remains is f32 rounding, which cairn_rounding covers. */
#include "index_internal.h"

#include <math.h>

static const float NORM_MAX = 1e18f; /* of a query, times 2e19 of a row (rows.c): no bound overflows */

float cairn_rounding(uint32_t dim, float a_norm, float b_norm)
{
    /* A sum of n products, in any order, is off by at most n 2^-24 |a| |b| (Higham, section 3.1, to first order); twice
     * that, and 16 more roundings, pay for the higher orders, the scales and the additions around it. */
    return ((float)dim + 16) * 0x1p-23f * a_norm * b_norm + 1e-30f;
}

static float norm_of(const float *x, size_t n)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    float norm = (float)(sqrt(squares) * 1.000001);
    return isfinite((float)squares) ? norm : INFINITY;
}

void cairn_scan_prepare(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        cairn_scan_query *query = &scratch->query[i];
        query->norm = norm_of(query->q, rows->dim);
        query->residual = 0;
        query->exact = !rows->imaged || !(query->norm < NORM_MAX) || query->hi - query->from <= CAIRN_SCAN_SHORT;
        if (query->exact) continue;
        int8_t *image = scratch->image + i * rows->image_dim;
        int32_t sum;
        scratch->scale[i] = cairn_scan_quantize(query->q, rows->dim, image, &sum);
        double squares = 0;
        for (size_t j = 0; j < rows->dim; j++) {
            double miss = (double)query->q[j] - (double)scratch->scale[i] * image[j];
            squares += miss * miss;
        }
        query->residual = (float)(sqrt(squares) * 1.000001);
    }
}

/* What of rows [begin, end) a query has left. */
static bool overlap(const cairn_scan_query *query, size_t begin, size_t end, size_t *a, size_t *b)
{
    *a = query->from > begin ? query->from : begin;
    *b = query->hi < end ? query->hi : end;
    return *a < *b;
}

static void scan_exact(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n, size_t begin, size_t end,
                       bool all)
{
    for (size_t first = begin, next; first < end; first = next) {
        next = first / CAIRN_EXACT_ROWS * CAIRN_EXACT_ROWS + CAIRN_EXACT_ROWS; /* a grid the batch has no say in */
        if (next > end) next = end;
        const float *wide = NULL;
        for (size_t i = 0; i < n; i++) {
            cairn_scan_query *query = &scratch->query[i];
            size_t a;
            size_t b;
            if ((!all && !query->exact) || !overlap(query, first, next, &a, &b)) continue;
            if (wide == NULL && rows->dtype == CAIRN_F32) wide = cairn_rows_at(rows, first);
            if (wide == NULL) {
                rows->kernels->widen(scratch->wide, cairn_rows_at(rows, first), rows->dtype,
                                     (next - first) * rows->dim);
                wide = scratch->wide;
            }
            float *scores = scratch->scores;
            for (size_t r = a; r < b; r++) {
                float score = rows->kernels->dot(query->q, wide + (r - first) * rows->dim, rows->dim);
                scores[r - a] = isnan(score) ? -INFINITY : score;
            }
            cairn_choice_see(&query->choice, scores, a, b - a, 0, NULL, scratch->over);
        }
    }
}

/* The largest residual and image norm of the rows of [begin, end) below hi. Rows from hi on must not count even if they
 * are there: a query's answer, its mass and its error do not depend on what was added behind its range. */
static cairn_row_span span_below(const cairn_rows *rows, size_t begin, size_t end, size_t hi)
{
    const cairn_row_chunk *chunk = &rows->chunks[begin / CAIRN_CHUNK_ROWS];
    size_t at = begin % CAIRN_CHUNK_ROWS;
    if (hi >= end) return rows->spans[cairn_span_of(begin)];
    return (cairn_row_span){rows->kernels->max(chunk->residual + at, hi - begin),
                            rows->kernels->max(chunk->image_norm + at, hi - begin)};
}

static void scan_image(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n, size_t begin, size_t end,
                       float center_norm)
{
    const cairn_row_chunk *chunk = &rows->chunks[begin / CAIRN_CHUNK_ROWS];
    size_t chunk_first = begin / CAIRN_CHUNK_ROWS * CAIRN_CHUNK_ROWS;
    size_t span_hi = 0; /* the hi that `span` was found for */
    cairn_row_span span = {0};
    for (size_t i = 0; i < n; i += CAIRN_SCAN_TOGETHER) {
        size_t first = n; /* queries and rows of this call: the hull of what is wanted */
        size_t last = 0;
        size_t low = end;
        size_t high = begin;
        for (size_t j = i; j < n && j < i + CAIRN_SCAN_TOGETHER; j++) {
            size_t a;
            size_t b;
            if (scratch->query[j].exact || !overlap(&scratch->query[j], begin, end, &a, &b)) continue;
            if (first == n) first = j;
            last = j;
            if (a < low) low = a;
            if (b > high) high = b;
        }
        if (first == n) continue;
        size_t group = (low - chunk_first) / CAIRN_SCAN_GROUP;
        size_t groups = (high - chunk_first + CAIRN_SCAN_GROUP - 1) / CAIRN_SCAN_GROUP - group;
        size_t scored = chunk_first + group * CAIRN_SCAN_GROUP; /* row of the first score */
        rows->kernels->scan_i8(chunk->image, chunk->scale, chunk->sum, group, groups, rows->image_dim,
                               scratch->image + first * rows->image_dim, scratch->scale + first, last - first + 1,
                               scratch->scores, CAIRN_SPAN_ROWS);
        for (size_t j = first; j <= last; j++) {
            cairn_scan_query *query = &scratch->query[j];
            size_t a;
            size_t b;
            if (query->exact || !overlap(query, begin, end, &a, &b)) continue;
            if (span_hi != b) span = span_below(rows, begin, end, span_hi = b);
            cairn_slack slack = {
                .q_norm = query->norm,
                .q_residual = query->residual,
                .rounding = cairn_rounding(rows->dim, query->norm, 2 * center_norm + span.image_norm + span.residual),
                .residual = chunk->residual + (a - chunk_first),
                .image_norm = chunk->image_norm + (a - chunk_first)};
            slack.most = query->norm * span.residual + query->residual * span.image_norm + slack.rounding;
            const float *scores = scratch->scores + (j - first) * CAIRN_SPAN_ROWS + (a - scored);
            cairn_choice_see(&query->choice, scores, a, b - a, query->bias, &slack, scratch->over);
        }
    }
}

void cairn_scan(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n)
{
    size_t low = SIZE_MAX;
    size_t high = 0;
    for (size_t i = 0; i < n; i++) {
        const cairn_scan_query *query = &scratch->query[i];
        if (query->from >= query->hi) continue;
        if (query->from < low) low = query->from;
        if (query->hi > high) high = query->hi;
    }
    size_t frame = SIZE_MAX;
    float center_norm = 0;
    for (size_t span = low < high ? cairn_span_of(low) : 0; low < high; span++, low = cairn_span_begin(span)) {
        size_t begin = cairn_span_begin(span);
        size_t end = cairn_span_begin(span + 1);
        if (end > rows->count) end = rows->count;
        bool image = rows->chunks[begin / CAIRN_CHUNK_ROWS].image != NULL && rows->spans[span].residual != INFINITY;
        if (image && frame != cairn_frame_of(begin)) {
            frame = cairn_frame_of(begin);
            const float *center = rows->centers + frame * rows->dim;
            center_norm = norm_of(center, rows->dim);
            for (size_t i = 0; i < n; i++)
                scratch->query[i].bias = rows->kernels->dot(scratch->query[i].q, center, rows->dim);
        }
        if (image) scan_image(rows, scratch, n, begin, end, center_norm);
        scan_exact(rows, scratch, n, begin, end, !image);
    }
}
