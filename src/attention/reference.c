/* reference.c - the paper's equations in plain double loops: the definition of right for everything that is fast.
 *
 * B = C + 1 slots of a block, the last one its landmark; a row is a slot of the stream. Equation numbers are those of
 * Mohtashami & Jaggi 2023, section 3.1. Nothing here is shared with the attention step that sessions run.
 */
#include <cairn/attention.h>

#include "base_internal.h"

#include <math.h>

/* Numerator table of one softmax: p[j] = exp(score[j] + bias_j - max) for the members, returns their sum. The maximum
 * cancels in the quotient; it only keeps exp in range. A group without members (or all at -inf) sums to 0. */
typedef struct group_sum {
    double max, sum;
} group_sum;

static void group_max(group_sum *g, double score)
{
    if (score > g->max) g->max = score;
}
static double group_part(const group_sum *g, double score)
{
    return g->max == -INFINITY ? 0.0 : exp(score - g->max);
}

/* First slot after `j`'s block, that is one past the landmark that closes it; `rows` for the last, open block. */
static size_t block_end(const uint8_t *is_landmark, size_t rows, size_t j)
{
    while (j < rows && is_landmark[j] == 0) j++;
    return j < rows ? j + 1 : rows;
}

/* Weights of one query row i over keys 0..rows-1 (equations 2-4). absent (rows) masks keys besides the causal and the
 * own-landmark mask; NULL = none. */
static void grouped_row(const double *scores, const uint8_t *is_landmark, const uint8_t *absent, size_t rows, size_t i,
                        double bias, double *weights)
{
    for (size_t j = 0; j < rows; j++) weights[j] = 0.0;

    /* The query's own block: it ends at the first landmark at or after i. A landmark belongs to the block it closes. */
    size_t own_end = block_end(is_landmark, rows, i);
    size_t own_begin = i;
    while (own_begin > 0 && is_landmark[own_begin - 1] == 0) own_begin--;

    /* Own group: plain tokens of the own block up to i, and the landmarks of all earlier blocks. */
    group_sum own = {-INFINITY, 0.0};
    for (size_t j = 0; j <= i; j++) {
        if (absent != NULL && absent[j] != 0) continue;
        if (is_landmark[j] == 0 && j >= own_begin && j < own_end) group_max(&own, scores[j]);
        if (is_landmark[j] != 0 && j < own_begin) group_max(&own, scores[j] + bias);
    }
    for (size_t j = 0; j <= i; j++) {
        if (absent != NULL && absent[j] != 0) continue;
        if (is_landmark[j] == 0 && j >= own_begin && j < own_end) own.sum += group_part(&own, scores[j]);
        if (is_landmark[j] != 0 && j < own_begin) own.sum += group_part(&own, scores[j] + bias);
    }
    if (own.sum == 0.0) return; /* no key at all: a window that starts with a landmark, row 0 */
    for (size_t j = own_begin; j <= i; j++)
        if (is_landmark[j] == 0 && (absent == NULL || absent[j] == 0))
            weights[j] = group_part(&own, scores[j]) / own.sum;

    /* Earlier blocks: softmax inside the block times the gate, the probability of its landmark in the own group. An
     * empty block has nobody to pass its gate to. */
    for (size_t begin = 0; begin < own_begin;) {
        size_t landmark = block_end(is_landmark, rows, begin) - 1;
        if (absent == NULL || absent[landmark] == 0) {
            double gate = group_part(&own, scores[landmark] + bias) / own.sum;
            group_sum inside = {-INFINITY, 0.0};
            for (size_t j = begin; j < landmark; j++)
                if (absent == NULL || absent[j] == 0) group_max(&inside, scores[j]);
            for (size_t j = begin; j < landmark; j++)
                if (absent == NULL || absent[j] == 0) inside.sum += group_part(&inside, scores[j]);
            for (size_t j = begin; inside.sum > 0.0 && j < landmark; j++)
                if (absent == NULL || absent[j] == 0) weights[j] = gate * group_part(&inside, scores[j]) / inside.sum;
        }
        begin = landmark + 1;
    }
}

cairn_status cairn_grouped_softmax(const double *scores, const uint8_t *is_landmark, size_t rows, double bias,
                                   double *weights)
{
    size_t cells;
    if (!cairn_mul_size(rows, rows, &cells) || !cairn_mul_size(cells, sizeof(double), &cells))
        return cairn_fail(CAIRN_INVALID, "grouped softmax over %zu rows: too many", rows);
    if (rows > 0 && (scores == NULL || is_landmark == NULL || weights == NULL))
        return cairn_fail(CAIRN_INVALID, "grouped softmax over %zu rows without scores, landmarks or weights", rows);
    for (size_t i = 0; i < rows; i++)
        grouped_row(scores + i * rows, is_landmark, NULL, rows, i, bias, weights + i * rows);
    return CAIRN_OK;
}

/* ---- attention of a whole stream ---- */

typedef struct rope_table { /* cos and sin of distance * theta^(-2i/dims): (distances, dims / 2) each */
    size_t pairs;
    double *cos, *sin;
} rope_table;

static void rope_wipe(rope_table *t)
{
    cairn_free(t->cos);
    cairn_free(t->sin);
    *t = (rope_table){0};
}

static cairn_status rope_init(rope_table *t, const cairn_attention_shape *shape, size_t distances)
{
    size_t dims = shape->rope_dims == 0 ? shape->head_dim : shape->rope_dims, cells;
    t->pairs = dims / 2;
    if (!cairn_mul_size(distances, t->pairs, &cells))
        return cairn_fail(CAIRN_INVALID, "reference attention over %zu rows: too many", distances);
    t->cos = cairn_alloc_array(cells, sizeof *t->cos);
    t->sin = cairn_alloc_array(cells, sizeof *t->sin);
    if (t->cos == NULL || t->sin == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "rotations of %zu distances by %zu pairs", distances, t->pairs);
    for (size_t d = 0; d < distances; d++) {
        for (size_t i = 0; i < t->pairs; i++) {
            double angle = (double)d * pow((double)shape->rope_theta, -2.0 * (double)i / (double)dims);
            if (shape->rope_factors != NULL) angle /= (double)shape->rope_factors[i];
            t->cos[d * t->pairs + i] = cos(angle);
            t->sin[d * t->pairs + i] = sin(angle);
        }
    }
    return CAIRN_OK;
}

/* (R(p)q).(R(c)k) with p - c = distance. Each pair is a complex number; the product turns by the distance alone. */
static double rotated_dot(const rope_table *rope, const cairn_attention_shape *shape, const float *q, const float *k,
                          size_t distance)
{
    const double *cosine = rope->cos + distance * rope->pairs;
    const double *sine = rope->sin + distance * rope->pairs;
    double sum = 0.0;
    for (size_t i = 0; i < rope->pairs; i++) {
        size_t a = shape->rope_interleaved ? 2 * i : i;
        size_t b = shape->rope_interleaved ? 2 * i + 1 : i + rope->pairs;
        double qa = q[a], qb = q[b], ka = k[a], kb = k[b];
        sum += (qa * ka + qb * kb) * cosine[i] + (qa * kb - qb * ka) * sine[i];
    }
    for (size_t i = 2 * rope->pairs; i < shape->head_dim; i++) sum += (double)q[i] * (double)k[i];
    return sum;
}

/* Slots between query row r and key row c under the shape's position scheme. */
static size_t distance_of(const cairn_attention_shape *shape, size_t r, size_t c)
{
    size_t slots = shape->block_tokens + 1;
    size_t age = r / slots - c / slots;
    if (shape->scheme != CAIRN_POSITION_CLAMPED || age <= shape->clamp_blocks) return r - c;
    return shape->clamp_blocks * slots + r % slots - c % slots;
}

cairn_status cairn_attention_reference(const cairn_attention_shape *shape, uint32_t layer, size_t rows, const float *q,
                                       const float *k, const float *v, const uint8_t *visible, float *out)
{
    rope_table rope = {0};
    double *scores = NULL, *weights = NULL, *sum = NULL;
    uint8_t *is_landmark = NULL, *absent = NULL;
    cairn_status st = cairn_attention_shape_check(shape);
    if (st != CAIRN_OK) return st;
    if (layer >= shape->layers)
        return cairn_fail(CAIRN_INVALID, "layer %u of %u layers", (unsigned)layer, (unsigned)shape->layers);
    bool dense = shape->scheme == CAIRN_POSITION_DENSE;
    if (dense && visible != NULL) return cairn_fail(CAIRN_INVALID, "dense attention has no blocks to choose from");
    if (rows == 0) return CAIRN_OK;

    size_t heads = shape->heads, kv_heads = shape->kv_heads, dim = shape->head_dim;
    size_t slots = (size_t)shape->block_tokens + 1, blocks = dense ? 0 : rows / slots;
    bool local = visible == NULL && shape->local_layers != NULL && shape->local_layers[layer] != 0;
    if ((st = rope_init(&rope, shape, rows)) != CAIRN_OK) goto out;
    scores = cairn_alloc_array(rows, sizeof *scores);
    weights = cairn_alloc_array(rows, sizeof *weights);
    sum = cairn_alloc_array(dim, sizeof *sum);
    is_landmark = cairn_calloc(rows, sizeof *is_landmark);
    absent = cairn_calloc(rows, sizeof *absent);
    if (scores == NULL || weights == NULL || sum == NULL || is_landmark == NULL || absent == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "reference attention over %zu rows", rows);
        goto out;
    }
    for (size_t r = 0; !dense && r < rows; r++) is_landmark[r] = r % slots == shape->block_tokens;

    for (size_t h = 0; h < heads; h++) {
        size_t kv = h / (heads / kv_heads); /* the KV head this query head reads */
        double bias = shape->landmark_bias != NULL ? (double)shape->landmark_bias[layer * heads + h] : 0.0;
        for (size_t r = 0; r < rows; r++) {
            const float *query = q + (r * heads + h) * dim;
            for (size_t b = 0; b < blocks && b < r / slots; b++) { /* a block is seen whole or not at all */
                bool seen = !local || r / slots - b <= shape->local_window_blocks;
                if (visible != NULL) seen = visible[(r * heads + h) * blocks + b] != 0;
                memset(absent + b * slots, !seen, slots);
            }
            for (size_t c = 0; c <= r; c++) {
                if (absent[c] != 0) continue;
                scores[c] = rotated_dot(&rope, shape, query, k + (c * kv_heads + kv) * dim, distance_of(shape, r, c)) /
                            sqrt((double)dim);
            }
            grouped_row(scores, is_landmark, absent, r + 1, r, bias, weights);
            for (size_t d = 0; d < dim; d++) sum[d] = 0.0;
            for (size_t c = 0; c <= r; c++) {
                const float *value = v + (c * kv_heads + kv) * dim;
                if (weights[c] == 0.0) continue; /* also keeps a landmark's value, whatever it holds, out */
                for (size_t d = 0; d < dim; d++) sum[d] += weights[c] * (double)value[d];
            }
            for (size_t d = 0; d < dim; d++) out[(r * heads + h) * dim + d] = (float)sum[d];
        }
        memset(absent, 0, rows);
    }
out:
    rope_wipe(&rope);
    cairn_free(scores);
    cairn_free(weights);
    cairn_free(sum);
    cairn_free(is_landmark);
    cairn_free(absent);
    return st;
}
