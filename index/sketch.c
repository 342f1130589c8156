/* sketch.c - a few bytes a row that rule most rows out.
 *
 * Landmark keys and the queries that look for them fill few directions, and not the same ones. With an invertible T,
 * q.l' = (B'q).(T l') where B = 1/T and l' = l - c; sketch_plan.c chooses T so that as much as possible of the product
 * is in the first dims of both (on the demo model's keys, D = 32: of 11 dims all but 1 % of the rows are ruled out by
 * the k-th best score). A row keeps w - 1 dims in bytes and one byte of what is left over:
 *
 *   y = T l',  y_j = s_j v_j + e_j for j < w - 1, v whole numbers;     z = B'q, p_j = z_j s_j = u p^_j + d_j
 *   q.l' = sum_j p_j v_j + sum_(kept) z_j e_j + sum_(others) z_j y_j + o |l'|
 *        <= u sum_j p^_j v_j + A E,
 *           A = |(z_others, h z_kept, d / g, o / f)|,  E = |(y_others, e / h, g v, f l')|
 *
 * by Cauchy-Schwarz, for any h, g, f > 0, which make the parts of A go with those of E; o is what f32 leaves open (T
 * and B are rounded, so are y and z). E goes up to the next of 255 steps into the last byte and A into the query's, so
 * the kernel's integer sum is the bound, and all of it is compared with one whole number a query: no conversion,
 * nothing stored but a bit a row. Rows with an E beyond 255 steps are loose: always looked at.
 *
 * Rows that may reach the bar are scored in full precision. So the choice is proven as by the int8 image, and is the
 * same; only the time depends on how well the sketch fits.
 *
 * The sketch, D = 32, w = 12: 16 rows and a query cost 3 vpdpbusd and a sign mask against 9, a conversion, two
 * multiplications and a store; 12 bytes a row against 40. */
#include "index_internal.h"

#include <math.h>

static const double LEAST_MAX = 0x1p29; /* of the kernel */

void cairn_sketch_wipe(cairn_sketch *sketch)
{
    for (size_t i = 0; i < sketch->chunk_count; i++) {
        cairn_part_free(&sketch->chunks[i].part, sketch->chunks[i].rows);
        cairn_free(sketch->chunks[i].loose);
        cairn_free(sketch->chunks[i].loose_rows);
    }
    cairn_free(sketch->chunks);
    cairn_free(sketch->center); /* and with it the matrices */
    *sketch = (cairn_sketch){0};
}

cairn_status cairn_sketch_reserve(cairn_sketch *sketch, size_t count)
{
    size_t chunks = (count + CAIRN_CHUNK_ROWS - 1) / CAIRN_CHUNK_ROWS;
    if (chunks <= sketch->chunk_count) return CAIRN_OK;
    size_t row_bytes = (size_t)CAIRN_CHUNK_ROWS * sketch->width;
    cairn_sketch_chunk *more = cairn_grow(sketch->chunks, sketch->chunk_count * sizeof *more, chunks, sizeof *more);
    if (more == NULL) return cairn_fail(CAIRN_NO_MEMORY, "sketch of %zu rows", count);
    sketch->chunks = more;
    const size_t first = sketch->chunk_count, full = count / CAIRN_CHUNK_ROWS, fresh = full > first ? full - first : 0;
    char *run = cairn_run_new(fresh, row_bytes);
    while (sketch->chunk_count < chunks) {
        const size_t at = sketch->chunk_count - first;
        cairn_sketch_chunk *chunk = &more[sketch->chunk_count];
        *chunk = (cairn_sketch_chunk){0};
        if (run != NULL && at < fresh) {
            chunk->part = cairn_part_of(run, fresh, row_bytes, at);
            chunk->rows = (int8_t *)run + at * row_bytes;
        } else {
            chunk->rows = cairn_calloc(1, row_bytes); /* a block that is not full yet is defined */
        }
        if (chunk->rows == NULL) return cairn_fail(CAIRN_NO_MEMORY, "sketch of %zu rows", count);
        sketch->chunk_count++;
        sketch->bytes += row_bytes + sizeof *chunk;
    }
    return CAIRN_OK;
}

cairn_status cairn_sketch_put_loose(cairn_sketch *sketch, const cairn_rows *rows, size_t id)
{
    cairn_sketch_chunk *chunk = &sketch->chunks[id / CAIRN_CHUNK_ROWS];
    const size_t row_bytes = rows->dim * sizeof(float);
    if (chunk->loose_count == chunk->loose_room) {
        size_t room = chunk->loose_room != 0 ? 2 * chunk->loose_room : 16;
        uint32_t *loose = cairn_grow(chunk->loose, chunk->loose_count * sizeof *loose, room, sizeof *loose);
        if (loose != NULL) chunk->loose = loose;
        float *values =
            loose == NULL ? NULL : cairn_grow(chunk->loose_rows, chunk->loose_count * row_bytes, room, row_bytes);
        if (values == NULL) return cairn_fail(CAIRN_NO_MEMORY, "sketch of %zu rows", rows->count);
        chunk->loose_rows = values;
        sketch->bytes += (room - chunk->loose_room) * (row_bytes + sizeof *loose);
        chunk->loose_room = room;
    }
    cairn_rows_widen(rows, id, 1, chunk->loose_rows + chunk->loose_count * rows->dim);
    chunk->loose[chunk->loose_count++] = (uint32_t)(id % CAIRN_CHUNK_ROWS);
    return CAIRN_OK;
}

/* Row `id` from l' and y. */
static cairn_status put_row(cairn_sketch *sketch, const cairn_rows *rows, size_t id, const float *left, const float *y)
{
    const uint32_t dim = rows->dim;
    const size_t kept = sketch->width - 1;
    const cairn_kernels *kernels = rows->kernels;
    int8_t values[CAIRN_SKETCH_WIDTH_MAX] = {0};
    float levels[CAIRN_SKETCH_WIDTH_MAX];
    float misses[CAIRN_SKETCH_WIDTH_MAX];
    for (size_t j = 0; j < kept; j++) {
        float v = y[j] * sketch->per_step[j];
        v = v < 127 ? v : 127; /* nor what is not a number; its length will tell */
        v = v > -127 ? v : -127;
        int whole = (int)(v + (v < 0 ? -0.5f : 0.5f));
        values[j] = (int8_t)whole;
        levels[j] = (float)whole;
        misses[j] = y[j] - sketch->step[j] * levels[j];
    }
    double length = (double)kernels->dot(left, left, dim) * pow(sketch->length_weight, 2);
    double level = (double)kernels->dot(levels, levels, kept) * pow(sketch->level_weight, 2);
    double miss = (double)kernels->dot(misses, misses, kept) / pow(sketch->head_weight, 2);
    double others = (double)kernels->dot(y + kept, y + kept, dim - kept);
    double error = sqrt(others + miss + level + length) * (1 + 0x1p-12); /* f32 sums of up to 1024 squares */
    double steps = error / sketch->slack_step;
    cairn_sketch_chunk *chunk = &sketch->chunks[id / CAIRN_CHUNK_ROWS];
    size_t at = id % CAIRN_CHUNK_ROWS;
    if (!(steps <= 254.9)) return cairn_sketch_put_loose(sketch, rows, id); /* or not a number */
    chunk->bound[at / CAIRN_SKETCH_BLOCK] |= UINT64_C(1) << at % CAIRN_SKETCH_BLOCK;
    values[kept] = (int8_t)((int)steps + 1 - 128);
    int8_t *to = chunk->rows + cairn_sketch_at(at, sketch->width);
    for (size_t j = 0; j < sketch->width; j += 4) memcpy(to + j * 16, values + j, 4);
    return CAIRN_OK;
}

cairn_status cairn_sketch_extend(cairn_sketch *sketch, const cairn_rows *rows)
{
    const uint32_t dim = rows->dim;
    cairn_status st = cairn_sketch_reserve(sketch, rows->count);
    if (st != CAIRN_OK) return st;
    float *wide = sketch->wide;
    float *turned = wide + (size_t)CAIRN_SKETCH_PIECE * dim;
    while (sketch->count < rows->count) {
        size_t n = rows->count - sketch->count;
        if (n > CAIRN_SKETCH_PIECE) n = CAIRN_SKETCH_PIECE;
        cairn_rows_widen(rows, sketch->count, n, wide);
        for (size_t r = 0; r < n; r++) rows->kernels->axpy(wide + r * dim, -1, sketch->center, dim);
        cairn_rows_products(rows, wide, n, sketch->to_row, dim, turned);
        for (size_t r = 0; r < n; r++, sketch->count++) {
            st = put_row(sketch, rows, sketch->count, wide + r * dim, turned + r * dim);
            if (st != CAIRN_OK) return st;
        }
    }
    return CAIRN_OK;
}

/* y_j is off by at most c |T_j| |l'|, z_j by c |B_j| |q|, and |y_j| <= |T_j| |l'|; the score itself as everywhere. */
double cairn_sketch_open(const cairn_sketch *sketch, uint32_t dim, const float *z, double norm)
{
    const double rounding = cairn_rounding(dim); /* twice c */
    double weighed = 0;
    for (size_t j = 0; j < dim; j++) weighed += fabs((double)z[j]) * (double)sketch->norms[j];
    return (weighed + sketch->norms_product * norm) * rounding / 2 + (sketch->mismatch + rounding) * norm;
}

/* Whether the slack has room in its byte, and beside the numbers that are summed with it. */
static bool fits(double slack, double sum, double unit, double largest, double largest_sum)
{
    return slack <= largest * unit && sum + slack <= largest_sum * unit;
}

/* The image of a query, z its dims turned. */
static void prepare_one(const cairn_sketch *sketch, const cairn_rows *rows, cairn_index_scratch *scratch, size_t at,
                        const float *z)
{
    cairn_scan_query *query = &scratch->query[at];
    const uint32_t dim = rows->dim;
    const size_t kept = sketch->width - 1;
    int8_t *image = scratch->sketch + at * sketch->width;
    query->sketched = false;
    if (query->exact) return;
    double parts[CAIRN_SKETCH_WIDTH_MAX];
    double most = 0;
    double sum[2] = {0}; /* of the two halves whose sums the kernel limits: the last byte is of the second */
    for (size_t j = 0; j < kept; j++) {
        parts[j] = (double)z[j] * (double)sketch->step[j];
        most = fmax(most, fabs(parts[j]));
        sum[j / 2 % 2] += fabs(parts[j]);
    }
    double q = (double)query->norm;
    double head = cairn_norm(z, kept) * sketch->head_weight;
    double tail = cairn_norm(z + kept, dim - kept);
    double open = cairn_sketch_open(sketch, dim, z, q) / sketch->length_weight;
    double known = head * head + tail * tail + open * open;
    double slack = sqrt(known) * sketch->slack_step;
    double unit = 0;
    const double largest = rows->kernels->sketch_most - 0.1; /* of the image, its last byte rounded up */
    const double largest_sum = rows->kernels->sketch_sum - (double)(kept + 4) / 4; /* each of half of it by 0.5 */
    /* The larger a step of the image, the more it leaves open, which must fit into its last byte: room is made once. */
    for (int i = 0; i < 2; i++) {
        const double room = i == 0 ? 1 : 0.95;
        unit = fmax(fmax(most, slack) / largest, fmax(sum[0], sum[1] + slack) / largest_sum) / room;
        if (!(unit > 1e-30 && unit < 1e30)) return;
        double miss = 0;
        for (size_t j = 0; j < kept; j++) {
            double whole = rint(parts[j] / unit);
            double d = parts[j] - whole * unit;
            image[j] = (int8_t)whole;
            miss += d * d;
        }
        slack = sqrt(known + miss / (sketch->level_weight * sketch->level_weight)) * sketch->slack_step * 1.000001;
        if (fits(slack, sum[1], unit, largest, largest_sum)) break;
    }
    if (!fits(slack, sum[1], unit, largest, largest_sum)) return;
    image[kept] = (int8_t)ceil(slack / unit);
    double bias = 0;
    for (size_t j = 0; j < dim; j++) bias += (double)query->q[j] * (double)sketch->center[j];
    query->sketch_base = bias + cairn_rounding(dim) * q * sketch->center_norm +
                         unit * 128 * image[kept]; /* the last byte of rows is less 128 */
    query->sketch_unit = unit;
    query->sketched = isfinite(query->sketch_base);
}

void cairn_sketch_prepare(const cairn_sketch *sketch, const cairn_rows *rows, cairn_index_scratch *scratch, size_t n)
{
    const size_t dim = rows->dim;
    float *queries = scratch->gathered;
    float *turned = scratch->products;
    for (size_t i = 0; i < n; i++) memcpy(queries + i * dim, scratch->query[i].q, dim * sizeof *queries);
    cairn_rows_products(rows, queries, n, sketch->to_query, dim, turned);
    for (size_t i = 0; i < n; i++) prepare_one(sketch, rows, scratch, i, turned + i * dim);
}

/* The least integer sum with which a row may reach the k-th best so far. */
static int32_t least_sum(const cairn_scan_query *query)
{
    double least = floor(((double)query->choice.least - query->sketch_base) / query->sketch_unit * (1 - 1e-12) - 1e-3);
    return (int32_t)fmin(fmax(least, -LEAST_MAX), LEAST_MAX);
}

/* The rows that may reach the bar of query j: their number. */
static size_t list_passed(const cairn_rows *rows, const cairn_sketch_passed *passed, size_t j, uint32_t *at)
{
    return rows->kernels->set_bits(passed->over + j * passed->blocks, passed->blocks, at);
}

/* Lists those of the next query, if there is room whatever passed, and asks for them. */
static void list_next(const cairn_rows *rows, cairn_sketch_passed *passed)
{
    const size_t j = passed->listed, begin = passed->begin[j], row_bytes = rows->dim * cairn_dtype_size(rows->dtype);
    if (passed->room - begin < passed->blocks * CAIRN_SKETCH_BLOCK + 2) return;
    const char *data = cairn_rows_at(rows, passed->first);
    const size_t found = list_passed(rows, passed, j, passed->at + begin);
    for (size_t i = 0; i < found; i++)
        for (size_t byte = 0; byte < row_bytes; byte += 64)
            __builtin_prefetch(data + passed->at[begin + i] * row_bytes + byte, 0, 2);
    passed->begin[j + 1] = begin + found;
    passed->listed++;
}

/* Rows of [a, b) without a bound. */
static void see_loose(const cairn_rows *rows, cairn_choice *choice, const cairn_sketch_chunk *chunk, size_t chunk_first,
                      size_t a, size_t b)
{
    for (size_t i = 0; i < chunk->loose_count; i++) {
        size_t id = chunk_first + chunk->loose[i];
        if (id < a || id >= b) continue;
        float score = rows->kernels->dot(choice->q, chunk->loose_rows + i * rows->dim, rows->dim);
        choice->rescored++;
        if (score >= choice->least) cairn_choice_see_one(choice, (uint32_t)id, score);
    }
}

/* Of one query's bits those of rows [a, b) that have a bound. */
static void mask_bits(uint64_t *over, const uint64_t *bound, size_t blocks, size_t a, size_t b)
{
    for (size_t g = 0; g < blocks; g++) over[g] &= bound[g];
    for (size_t g = 0; g < a / CAIRN_SKETCH_BLOCK; g++) over[g] = 0;
    over[a / CAIRN_SKETCH_BLOCK] &= ~UINT64_C(0) << a % CAIRN_SKETCH_BLOCK;
    for (size_t g = (b - 1) / CAIRN_SKETCH_BLOCK + 1; g < blocks; g++) over[g] = 0;
    over[(b - 1) / CAIRN_SKETCH_BLOCK] &= ~UINT64_C(0) >> (63 - (b - 1) % CAIRN_SKETCH_BLOCK);
}

void cairn_sketch_pass(const cairn_sketch *sketch, const cairn_rows *rows, cairn_index_scratch *scratch, size_t i0,
                       size_t n, size_t begin, size_t end, cairn_sketch_passed *passed)
{
    const cairn_sketch_chunk *chunk = &sketch->chunks[begin / CAIRN_CHUNK_ROWS];
    size_t chunk_first = begin / CAIRN_CHUNK_ROWS * CAIRN_CHUNK_ROWS;
    int32_t least[CAIRN_SCAN_TOGETHER];
    size_t low = end; /* rows of this call: the hull of what is wanted */
    size_t high = begin;
    passed->blocks = 0;
    for (size_t j = i0; j < n; j++) {
        size_t a;
        size_t b;
        if (cairn_scan_overlap(&scratch->query[j], begin, end, &a, &b)) {
            see_loose(rows, &scratch->query[j].choice, chunk, chunk_first, a, b);
            if (a < low) low = a;
            if (b > high) high = b;
        }
        least[j - i0] = least_sum(&scratch->query[j]);
    }
    if (low >= high) return;
    const size_t block = (low - chunk_first) / CAIRN_SKETCH_BLOCK;
    const size_t blocks = (high - chunk_first + CAIRN_SKETCH_BLOCK - 1) / CAIRN_SKETCH_BLOCK - block;
    const size_t first = chunk_first + block * CAIRN_SKETCH_BLOCK;
    passed->first = first;
    passed->blocks = blocks;
    passed->listed = passed->begin[0] = 0;
    rows->kernels->sketch_i8(chunk->rows, block, blocks, sketch->width, scratch->sketch + i0 * sketch->width, least,
                             n - i0, passed->over);
    for (size_t j = 0; j < n - i0; j++) {
        uint64_t *over = passed->over + j * blocks;
        size_t a;
        size_t b;
        if (cairn_scan_overlap(&scratch->query[i0 + j], begin, end, &a, &b))
            mask_bits(over, chunk->bound + block, blocks, a > first ? a - first : 0, b - first);
        else
            memset(over, 0, blocks * sizeof *over);
        if (passed->listed == j) list_next(rows, passed);
    }
}

void cairn_sketch_look(const cairn_rows *rows, cairn_index_scratch *scratch, size_t i0, size_t n,
                       const cairn_sketch_passed *passed)
{
    float *scores = scratch->scores;
    if (passed->blocks == 0) return;
    const char *data = cairn_rows_at(rows, passed->first);
    for (size_t j = 0; j < n - i0; j++) {
        cairn_choice *choice = &scratch->query[i0 + j].choice;
        uint32_t *at = scratch->over + 2 * CAIRN_LIST_ROOM;
        size_t found;
        if (j < passed->listed) {
            at = passed->at + passed->begin[j];
            found = passed->begin[j + 1] - passed->begin[j];
        } else {
            found = list_passed(rows, passed, j, at);
        }
        choice->rescored += found;
        rows->kernels->dot_rows(scores, choice->q, data, rows->dtype, rows->dim, at, found);
        for (size_t i = 0; i < found; i++)
            if (scores[i] >= choice->least) cairn_choice_see_one(choice, (uint32_t)(passed->first + at[i]), scores[i]);
    }
}
