/* scan.c - spans of rows past a batch of queries.
 *
 * The sketch, for D = 32: a piece of 256 rows is 9 KiB of int8 image, in L1 with the scores of 8 queries (8 KiB) while
 * all 64 queries of a prefill batch pass over it. A score costs 36 bytes of multiply-adds, its conversion and, in the
 * kernel, one comparison with the query's bar, so that rows below it are looked at no more. Measured on the demo
 * model's keys (16,644 rows, k 4, Cascade Lake, VNNI): 12.9 us a query in batches of 64, 40 us alone, most of it bytes
 * from L3.
 *
 * What the kernel gives are upper bounds already (rows.c); select.c proves the choice from them. */
#include "index_internal.h"

#include <math.h>

/* |q| of a scanned query. Rows have less than 1e18 too, so no bound overflows; their scale is at least 1e-18 and the
 * query's |q| / (127 sqrt(D)), so no score of an integer but 0 underflows. */
static const float NORM_MAX = 1e18f;
static const float NORM_MIN = 1e-15f;
/* At most 1,024 products and as many sums of a score, each of which may be flushed to 0, in either of two orders. */
static const double UNDERFLOW = 0x1p-114;

void cairn_scan_prepare(const cairn_rows *rows, cairn_index_scratch *scratch, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        cairn_scan_query *query = &scratch->query[i];
        double squares = 0;
        for (size_t j = 0; j < rows->dim; j++) squares += (double)query->q[j] * (double)query->q[j];
        query->norm = squares < (double)NORM_MAX * (double)NORM_MAX ? (float)(sqrt(squares) * 1.000001) : INFINITY;
        query->exact = !rows->imaged || query->norm == INFINITY || query->norm < NORM_MIN ||
                       query->hi - query->from <= CAIRN_SCAN_SHORT;
        query->imaged = false;
    }
}

/* The image of query i, when it is first wanted: sketches mostly leave nothing for it. */
static void image_query(const cairn_rows *rows, cairn_index_scratch *scratch, size_t i)
{
    cairn_scan_query *query = &scratch->query[i];
    if (query->exact || query->imaged) return;
    int8_t *image = scratch->image + i * rows->image_dim;
    int32_t sum;
    memset(image, 0, rows->image_dim);
    float scale = scratch->scale[i] = cairn_scan_quantize(query->q, rows->dim, image, &sum);
    double squares = 0;
    for (size_t j = 0; j < rows->dim; j++) {
        double miss = (double)query->q[j] - (double)scale * image[j];
        squares += miss * miss;
    }
    double y1 = ceil((double)query->norm / (double)scale / CAIRN_SLACK_STEP * 1.000001);
    double y2 = ceil(sqrt(squares) / (double)scale * CAIRN_SLACK_STEP * 1.000001);
    query->imaged = y1 <= 127 && y2 <= 127;
    if (!query->imaged) { /* only if made to be awkward, in 250 dimensions or more */
        query->exact = true;
        query->sketched = false;
        return;
    }
    image[rows->image_dim - 4] = query->slack_weight[0] = (int8_t)y1;
    image[rows->image_dim - 3] = query->slack_weight[1] = (int8_t)y2;
}

static void scan_exact(const cairn_rows *rows, cairn_index_scratch *scratch, size_t i0, size_t n, size_t begin,
                       size_t end, bool all)
{
    for (size_t first = begin, next; first < end; first = next) {
        next = first / CAIRN_EXACT_ROWS * CAIRN_EXACT_ROWS + CAIRN_EXACT_ROWS; /* a grid the batch has no say in */
        if (next > end) next = end;
        const float *wide = NULL;
        for (size_t i = i0; i < n; i++) {
            cairn_scan_query *query = &scratch->query[i];
            size_t a;
            size_t b;
            if ((!all && !query->exact) || !cairn_scan_overlap(query, first, next, &a, &b)) continue;
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
            cairn_choice_see(&query->choice, scores, a, b - a, scratch->over);
        }
    }
}

/* Rows [begin, end), at most a piece, past queries [i0, n), at most TOGETHER. */
static void scan_piece(const cairn_rows *rows, cairn_index_scratch *scratch, size_t i0, size_t n, size_t begin,
                       size_t end)
{
    const cairn_row_chunk *chunk = &rows->chunks[begin / CAIRN_CHUNK_ROWS];
    size_t chunk_first = begin / CAIRN_CHUNK_ROWS * CAIRN_CHUNK_ROWS;
    float *estimates = scratch->scores + (size_t)CAIRN_SCAN_TOGETHER * CAIRN_SCORE_ROW;
    float bars[CAIRN_SCAN_TOGETHER];
    uint16_t over[CAIRN_SCAN_TOGETHER * (CAIRN_SCAN_PIECE / CAIRN_SCAN_GROUP)];
    size_t first = n; /* queries and rows of this call: the hull of what is wanted */
    size_t last = 0;
    size_t low = end;
    size_t high = begin;
    for (size_t j = i0; j < n; j++) {
        size_t a;
        size_t b;
        if (scratch->query[j].exact || !cairn_scan_overlap(&scratch->query[j], begin, end, &a, &b)) continue;
        if (first == n) first = j;
        last = j;
        if (a < low) low = a;
        if (b > high) high = b;
    }
    if (first == n) return;
    bool mass = scratch->query[first].choice.want_mass; /* all of a batch or none */
    size_t group = (low - chunk_first) / CAIRN_SCAN_GROUP;
    size_t groups = (high - chunk_first + CAIRN_SCAN_GROUP - 1) / CAIRN_SCAN_GROUP - group;
    for (size_t j = first; j <= last; j++)
        bars[j - first] = cairn_choice_bar(&scratch->query[j].choice, scratch->query[j].bias);
    /* An estimate is an upper bound without the slack, which stands in the last four elements. */
    rows->kernels->scan_i8(chunk->image, chunk->scale, chunk->sum, group, groups, rows->image_dim,
                           scratch->image + first * rows->image_dim, scratch->scale + first, last - first + 1,
                           scratch->scores, mass ? estimates : NULL, CAIRN_SCORE_ROW, bars, over);
    for (size_t j = first; j <= last; j++) {
        cairn_scan_query *query = &scratch->query[j];
        size_t a;
        size_t b;
        if (query->exact || !cairn_scan_overlap(query, begin, end, &a, &b)) continue;
        size_t at = a - chunk_first - group * CAIRN_SCAN_GROUP;
        cairn_image_scores scores = {.highest = scratch->scores + (j - first) * CAIRN_SCORE_ROW + at,
                                     .estimates = mass ? estimates + (j - first) * CAIRN_SCORE_ROW + at : NULL,
                                     .first = a,
                                     .n = b - a,
                                     .bias = query->bias,
                                     .unit = scratch->scale[j],
                                     .slack_weight = {query->slack_weight[0], query->slack_weight[1]}};
        if (bars[j - first] != -INFINITY) scores.over = over + (j - first) * groups + at / CAIRN_SCAN_GROUP;
        cairn_choice_see_image(&query->choice, &scores, scratch->over);
    }
}

static void scan_image(const cairn_rows *rows, cairn_index_scratch *scratch, size_t i0, size_t n, size_t begin,
                       size_t end)
{
    for (size_t i = i0; i < n; i++) image_query(rows, scratch, i);
    for (size_t piece = (end - 1) / CAIRN_SCAN_PIECE + 1; piece-- > begin / CAIRN_SCAN_PIECE;) {
        size_t from = piece * CAIRN_SCAN_PIECE;
        size_t upto = from + CAIRN_SCAN_PIECE < end ? from + CAIRN_SCAN_PIECE : end;
        if (from < begin) from = begin;
        for (size_t i = i0; i < n; i += CAIRN_SCAN_TOGETHER)
            scan_piece(rows, scratch, i, n - i < CAIRN_SCAN_TOGETHER ? n : i + CAIRN_SCAN_TOGETHER, from, upto);
    }
}

/* The image, if there is one, and what has to be in full precision. */
static void scan_plain(const cairn_rows *rows, bool image, cairn_index_scratch *scratch, size_t i0, size_t n,
                       size_t begin, size_t end)
{
    if (i0 == n) return;
    if (image) scan_image(rows, scratch, i0, n, begin, end);
    scan_exact(rows, scratch, i0, n, begin, end, !image);
}

static bool ready_for_sketch(const cairn_sketch *sketch, const cairn_index_scratch *scratch, size_t i0, size_t n,
                             size_t end)
{
    if (sketch == NULL || end > sketch->count) return false;
    for (size_t i = i0; i < n; i++)
        if (!scratch->query[i].sketched || scratch->query[i].choice.least == -INFINITY) return false;
    return true;
}

/* Rows [begin, end) of one span: by the sketch wherever all of a few queries have a bar. */
static void scan_span(const cairn_rows *rows, const cairn_sketch *sketch, bool image, cairn_index_scratch *scratch,
                      size_t i0, size_t n, size_t begin, size_t end)
{
    size_t plain = i0; /* queries [plain, i) wait */
    for (size_t i = i0, upto; i < n; i = upto) {
        cairn_sketch_passed passed = {.at = scratch->over, .room = 2 * CAIRN_LIST_ROOM};
        upto = n - i < CAIRN_SCAN_TOGETHER ? n : i + CAIRN_SCAN_TOGETHER;
        if (!ready_for_sketch(sketch, scratch, i, upto, end)) continue;
        scan_plain(rows, image, scratch, plain, i, begin, end);
        cairn_sketch_pass(sketch, rows, scratch, i, upto, begin, end, &passed);
        cairn_sketch_look(rows, scratch, i, upto, &passed);
        plain = upto;
    }
    scan_plain(rows, image, scratch, plain, n, begin, end);
}

/* The rows of a span. frame: that of the centre whose products with the queries are known. */
static void see_span(const cairn_rows *rows, const cairn_sketch *sketch, cairn_index_scratch *scratch, size_t i0,
                     size_t n, size_t span, size_t *frame)
{
    size_t begin = cairn_span_begin(span);
    size_t end = cairn_span_begin(span + 1);
    if (end > rows->count) end = rows->count;
    bool image = rows->chunks[begin / CAIRN_CHUNK_ROWS].image != NULL && !rows->broken[span];
    if (image && *frame != cairn_frame_of(begin)) {
        *frame = cairn_frame_of(begin);
        const float *center = rows->centers + *frame * rows->dim;
        for (size_t i = i0; i < n; i++)
            scratch->query[i].bias = rows->kernels->dot(scratch->query[i].q, center, rows->dim);
    }
    scan_span(rows, sketch, image, scratch, i0, n, begin, end);
}

/* Rows [begin, end) by the sketch alone, for a few queries: a chunk at a time, upwards, as processors foresee it, what
 * passed of one looked at when the next one has been passed over. */
static void scan_chunks(const cairn_rows *rows, const cairn_sketch *sketch, cairn_index_scratch *scratch, size_t i0,
                        size_t n, size_t begin, size_t end)
{
    cairn_sketch_passed passed[2];
    size_t turn = 0;
    for (size_t i = 0; i < 2; i++) {
        passed[i].blocks = 0;
        passed[i].at = scratch->over + i * CAIRN_LIST_ROOM;
        passed[i].room = CAIRN_LIST_ROOM;
    }
    for (size_t at = begin, next; at < end; at = next, turn = 1 - turn) {
        next = (at / CAIRN_CHUNK_ROWS + 1) * CAIRN_CHUNK_ROWS;
        if (next > end) next = end;
        cairn_sketch_pass(sketch, rows, scratch, i0, n, at, next, &passed[turn]);
        cairn_sketch_look(rows, scratch, i0, n, &passed[1 - turn]);
    }
    cairn_sketch_look(rows, scratch, i0, n, &passed[1 - turn]);
}

/* Newest rows first, since what is near is often alike: all of them, or until a few queries all have a bar and some
 * rows have raised it (of the demo model's keys at a million tokens a sixth more are looked at than if all
 * went downwards, without those spans nearly twice as many). */
enum { NEWEST_SPANS = 4 };
void cairn_scan(const cairn_rows *rows, const cairn_sketch *sketch, cairn_index_scratch *scratch, size_t i0, size_t n)
{
    size_t low = SIZE_MAX;
    size_t high = 0;
    for (size_t i = i0; i < n; i++) {
        const cairn_scan_query *query = &scratch->query[i];
        if (query->from >= query->hi) continue;
        if (query->from < low) low = query->from;
        if (query->hi > high) high = query->hi;
    }
    if (low >= high) return;
    size_t frame = SIZE_MAX;
    const size_t top = cairn_span_of(high - 1) + 1;
    for (size_t span = top; span-- > cairn_span_of(low);) {
        const size_t end = cairn_span_begin(span + 1);
        if (top - span > NEWEST_SPANS && n - i0 <= CAIRN_SCAN_TOGETHER &&
            ready_for_sketch(sketch, scratch, i0, n, end)) {
            scan_chunks(rows, sketch, scratch, i0, n, low, end);
            return;
        }
        see_span(rows, sketch, scratch, i0, n, span, &frame);
    }
}

/* The k-th best of the rows' scores, less what rounding may make of a row's score elsewhere, for each unit of |q|. */
static void hint_query(cairn_scan_query *query, const uint32_t *ids, const float *scores, double rounding, size_t n)
{
    float best[CAIRN_EXACT_ROWS]; /* the k best so far, best first */
    const size_t k = query->choice.k;
    size_t kept = 0;
    if (k == 0 || k > n || query->norm == INFINITY) return;
    for (size_t r = 0; r < n; r++) {
        if (ids[r] < query->from || ids[r] >= query->hi) continue;
        float score = (float)((double)scores[r] - rounding * (double)query->norm - UNDERFLOW);
        if (isnan(score) || (kept == k && score <= best[k - 1])) continue;
        size_t at = kept < k ? kept++ : k - 1;
        for (; at != 0 && best[at - 1] < score; at--) best[at] = best[at - 1];
        best[at] = score;
    }
    if (kept == k && best[k - 1] > query->choice.least) query->choice.least = best[k - 1];
}

void cairn_scan_hint(const cairn_rows *rows, cairn_index_scratch *scratch, size_t first, size_t end,
                     const uint32_t *ids, size_t n)
{
    const size_t dim = rows->dim;
    const size_t row_bytes = dim * cairn_dtype_size(rows->dtype);
    /* of the longest row; to a float twice more, and that of the norm. Not finite: no score is a bar */
    const double rounding = (double)rows->norm_max * (cairn_rounding(rows->dim) * 1.001 + 0x1p-22);
    float *queries = scratch->gathered;
    float *scores = scratch->products;
    for (size_t r = 0; r < n; r++) { /* from anywhere: all of them on their way at once */
        const char *row = cairn_rows_at(rows, ids[r]);
        for (size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(row + at);
    }
    for (size_t r = 0; r < n; r++) cairn_rows_widen(rows, ids[r], 1, scratch->wide + r * dim);
    for (size_t i = first; i < end; i++)
        memcpy(queries + (i - first) * dim, scratch->query[i].q, dim * sizeof *queries);
    cairn_rows_products(rows, queries, end - first, scratch->wide, n, scores);
    for (size_t i = first; i < end; i++) hint_query(&scratch->query[i], ids, scores + (i - first) * n, rounding, n);
}
