#include "twin.h"

void expect_reference(const record *rec, uint8_t *const *visible, size_t from, size_t to, double tolerance)
{
    const world *w = rec->w;
    float *expected = malloc(w->rows * world_width(w) * sizeof *expected);
    assert_non_null(expected);
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        assert_ok(cairn_attention_reference(&w->shape, l, w->rows, w->q[l], w->k[l], w->v[l],
                                            visible != NULL ? visible[l] : NULL, expected));
        for (size_t i = from * world_width(w); i < to * world_width(w); i++) {
            if (fabs((double)rec->out[l][i] - (double)expected[i]) <= tolerance) continue;
            fail_msg("layer %u row %zu head %zu: %.9g, the reference says %.9g (tolerance %.3g)", (unsigned)l,
                     i / world_width(w), i / w->shape.head_dim % w->shape.heads, (double)rec->out[l][i],
                     (double)expected[i], tolerance);
        }
    }
    free(expected);
}

/* q.k with the query `distance` slots after the key. */
static double score_at(const cairn_attention_shape *shape, const float *q, const float *k, double distance)
{
    size_t dims = shape->rope_dims != 0 ? shape->rope_dims : shape->head_dim;
    double sum = 0.0;
    for (size_t i = 0; i < shape->head_dim; i++) {
        double x = q[i];
        if (i < dims) { /* x = element i of R(distance) q */
            size_t pair = shape->rope_interleaved ? i / 2 : i % (dims / 2);
            bool second = shape->rope_interleaved ? i % 2 == 1 : i >= dims / 2;
            size_t other = shape->rope_interleaved ? i ^ 1U : second ? i - dims / 2 : i + dims / 2;
            double angle = distance * pow((double)shape->rope_theta, -2.0 * (double)pair / (double)dims);
            if (shape->rope_factors != NULL) angle /= (double)shape->rope_factors[pair];
            x = x * cos(angle) + (second ? 1.0 : -1.0) * (double)q[other] * sin(angle);
        }
        sum += x * (double)k[i];
    }
    return sum / sqrt((double)shape->head_dim);
}

void expected_visible_layer(const world *w, uint32_t l, uint32_t top_k, int32_t window, uint32_t newest,
                            uint8_t **visible)
{
    const cairn_attention_shape *shape = &w->shape;
    size_t slots = world_slots(w), blocks = w->rows / slots, heads = shape->heads, dim = shape->head_dim;
    size_t always = window < 0 ? shape->window_blocks : (size_t)window;
    double *score = malloc((blocks + 1) * sizeof *score);
    *visible = calloc(w->rows * heads * blocks + 1, 1);
    assert_true(score != NULL && *visible != NULL);
    for (size_t r = 0; r < w->rows; r++) {
        for (size_t h = 0; h < heads; h++) {
            uint8_t *seen = *visible + (r * heads + h) * blocks;
            size_t own = r / slots, span = shape->local_layers[l] != 0 ? shape->local_window_blocks : always;
            for (size_t b = 0; b < own; b++) {
                size_t age = own - b, shown = age < shape->clamp_blocks ? age : shape->clamp_blocks;
                const float *landmark =
                    w->k[l] + ((b * slots + slots - 1) * shape->kv_heads + h / (heads / shape->kv_heads)) * dim;
                score[b] = score_at(shape, w->q[l] + (r * heads + h) * dim, landmark,
                                    (double)(shown * slots + r % slots) - (double)(slots - 1));
                seen[b] = age <= span && (w->never == NULL || w->never[b] == 0);
            }
            size_t oldest = newest != 0 && own > newest ? own - newest : 0;
            for (uint32_t k = 0; k < top_k && shape->local_layers[l] == 0; k++) {
                size_t best = SIZE_MAX;
                for (size_t b = oldest; b < own; b++) /* >=: of equals the newest */
                    if (seen[b] == 0 && (w->never == NULL || w->never[b] == 0) &&
                        (best == SIZE_MAX || score[b] >= score[best]))
                        best = b;
                if (best == SIZE_MAX) break;
                seen[best] = 1;
            }
        }
    }
    free(score);
}

void expected_visible(const world *w, uint32_t top_k, int32_t window, uint32_t newest, uint8_t **visible)
{
    for (uint32_t l = 0; l < w->shape.layers; l++) expected_visible_layer(w, l, top_k, window, newest, &visible[l]);
}

void free_visible(uint8_t **visible)
{
    for (uint32_t l = 0; l < WORLD_LAYERS; l++) free(visible[l]), visible[l] = NULL;
}

void expect_picked(const record *rec, uint8_t *const *visible, int32_t window, size_t from, size_t to)
{
    const world *w = rec->w;
    size_t slots = world_slots(w), blocks = w->rows / slots, heads = w->shape.heads;
    size_t always = window < 0 ? w->shape.window_blocks : (size_t)window;
    for (uint32_t l = 0; l < w->shape.layers; l++) {
        for (size_t i = from * heads; i < to * heads; i++) {
            const uint8_t *seen = visible[l] + i * blocks;
            const int64_t *picked = rec->picked[l] + i * rec->k;
            size_t own = i / heads / slots, expected = 0, found = 0;
            size_t span = w->local[l] != 0 ? w->shape.local_window_blocks : always;
            for (size_t b = 0; b + span < own; b++) expected += seen[b];
            for (uint32_t k = 0; k < rec->k; k++) {
                if (picked[k] < 0) continue;
                if ((uint64_t)picked[k] >= blocks || seen[picked[k]] == 0 || (size_t)picked[k] + span >= own)
                    fail_msg("layer %u row %zu head %zu: block %lld was picked, it is not among the best", (unsigned)l,
                             i / heads, i % heads, (long long)picked[k]);
                found++;
            }
            if (found != expected)
                fail_msg("layer %u row %zu head %zu: %zu blocks picked, expected %zu", (unsigned)l, i / heads,
                         i % heads, found, expected);
        }
    }
}

void twin_row(const cairn_attention_shape *shape, uint32_t layer, uint32_t head, const float *q, size_t offset,
              const float *own_k, const float *own_v, const twin_block *blocks, size_t n, double *out,
              twin_result *result)
{
    size_t dim = shape->head_dim, kv = shape->kv_heads, c = shape->block_tokens, g = head / (shape->heads / kv);
    double bias = shape->landmark_bias != NULL ? (double)shape->landmark_bias[layer * shape->heads + head] : 0.0;
    double max = -INFINITY, seen = 0.0, all = 0.0; /* exp-weights of what is visible and of everything */
    double *sum = calloc(dim, sizeof *sum), *mix = calloc(dim, sizeof *mix), *logit = calloc(n + 1, sizeof *logit);
    assert_true(sum != NULL && mix != NULL && logit != NULL);
    q += head * dim;
    for (size_t i = 0; i < n + offset + 1; i++) { /* n virtual keys, then the own tokens */
        bool visible = true;
        double z;
        if (i < n) {
            const twin_block *b = &blocks[i];
            size_t age = b->age;
            if (shape->scheme == CAIRN_POSITION_CLAMPED && age > shape->clamp_blocks) age = shape->clamp_blocks;
            double from = (double)(age * (c + 1) + offset), inside_max = -INFINITY, inside = 0.0;
            z = logit[i] = score_at(shape, q, b->k + (c * kv + g) * dim, from - (double)c) + bias;
            memset(mix, 0, dim * sizeof *mix);
            for (size_t o = 0; o < b->tokens; o++) {
                double y = score_at(shape, q, b->k + (o * kv + g) * dim, from - (double)o);
                double m = fmax(y, inside_max), keep = exp(inside_max - m), part = exp(y - m);
                inside = inside * keep + part;
                for (size_t d = 0; d < dim; d++) mix[d] = mix[d] * keep + part * (double)b->v[(o * kv + g) * dim + d];
                inside_max = m;
            }
            for (size_t d = 0; d < dim && inside > 0.0; d++) mix[d] /= inside;
            visible = b->visible;
        } else {
            size_t o = i - n;
            if (o == c) continue; /* the own landmark */
            z = score_at(shape, q, own_k + (o * kv + g) * dim, (double)(offset - o));
            for (size_t d = 0; d < dim; d++) mix[d] = (double)own_v[(o * kv + g) * dim + d];
        }
        double m = fmax(z, max), keep = exp(max - m), part = exp(z - m);
        all = all * keep + part;
        seen = seen * keep + (visible ? part : 0.0);
        for (size_t d = 0; d < dim; d++) sum[d] = sum[d] * keep + (visible ? part * mix[d] : 0.0);
        max = m;
    }
    for (size_t d = 0; d < dim; d++) out[d] = sum[d] / seen;
    if (result != NULL) {
        result->mass = seen / all;
        for (size_t i = 0; i < n && i < 512; i++) result->gates[i] = exp(logit[i] - max) / all;
    }
    free(sum);
    free(mix);
    free(logit);
}

void twin_own(const world *w, uint32_t layer, uint32_t head, size_t first, size_t tokens, size_t query, double *out)
{
    const cairn_attention_shape *shape = &w->shape;
    size_t dim = shape->head_dim, g = head / (shape->heads / shape->kv_heads);
    double z = 0.0;
    for (size_t d = 0; d < dim; d++) out[d] = 0.0;
    for (size_t row = first; row < first + tokens; row++) {
        size_t at = (row * shape->kv_heads + g) * dim;
        double weight = exp(score_at(shape, w->q[layer] + (query * shape->heads + head) * dim, w->k[layer] + at,
                                     (double)(query - row)));
        z += weight;
        for (size_t d = 0; d < dim; d++) out[d] += weight * (double)w->v[layer][at + d];
    }
    for (size_t d = 0; d < dim; d++) out[d] /= z;
}

void twin_clamped(const world *w, uint32_t layer, size_t row, uint32_t head, const uint8_t *visible, double *out,
                  twin_result *result)
{
    size_t slots = world_slots(w), width = (size_t)w->shape.kv_heads * w->shape.head_dim, n = row / slots;
    twin_block *blocks = malloc((n + 1) * sizeof *blocks);
    assert_non_null(blocks);
    for (size_t b = 0; b < n; b++)
        blocks[b] = (twin_block){.k = w->k[layer] + b * slots * width,
                                 .v = w->v[layer] + b * slots * width,
                                 .tokens = w->shape.block_tokens,
                                 .age = n - b,
                                 .visible = visible == NULL || visible[b] != 0};
    twin_row(&w->shape, layer, head, w->q[layer] + row * w->shape.heads * w->shape.head_dim, row % slots,
             w->k[layer] + n * slots * width, w->v[layer] + n * slots * width, blocks, n, out, result);
    free(blocks);
}

/* The paper's scoring slots put what is older than the newest k' into slot 0; the query's block starts k' + 1 slots
 * after slot 0, plus the blocks the chunk itself has completed before the query. */
static double stingy_score(const world *w, uint32_t layer, size_t row, size_t head, size_t tail_block, size_t rank,
                           size_t n, size_t top_k, size_t block)
{
    const cairn_attention_shape *shape = &w->shape;
    size_t slots = world_slots(w), kept = top_k < n ? top_k : n, dim = shape->head_dim;
    size_t slot = rank + kept < n ? 0 : rank + kept - n + 1;
    size_t age = kept + 1 - slot + row / slots - tail_block;
    const float *landmark =
        w->k[layer] + ((block * slots + slots - 1) * shape->kv_heads + head / (shape->heads / shape->kv_heads)) * dim;
    return score_at(shape, w->q[layer] + (row * shape->heads + head) * dim, landmark,
                    (double)(age * slots + row % slots) - (double)(slots - 1));
}

void twin_stingy(const world *w, uint32_t layer, size_t from, size_t rows, cairn_scope scope, uint32_t top_k,
                 uint32_t newest, bool picked_given, int64_t *picked, int32_t *placed, double *out)
{
    const cairn_attention_shape *shape = &w->shape;
    size_t slots = world_slots(w), heads = shape->heads, dim = shape->head_dim, kv = shape->kv_heads;
    size_t tail_block = from / slots, lo = newest != 0 && tail_block > newest ? tail_block - newest : 0;
    size_t n = tail_block - lo, kept = top_k < n ? top_k : n;
    double *score = malloc((rows * heads * n + 1) * sizeof *score);
    uint8_t *taken = malloc(n + 1);
    twin_block *blocks = malloc((kept + rows + 2) * sizeof *blocks);
    assert_true(score != NULL && taken != NULL && blocks != NULL);

    for (size_t i = 0; i < rows * heads; i++) {
        double sum = 0.0, max = -INFINITY;
        for (size_t b = 0; b < n; b++) {
            double s = stingy_score(w, layer, from + i / heads, i % heads, tail_block, b, n, top_k, lo + b);
            score[i * n + b] = s;
            max = fmax(max, s);
        }
        for (size_t b = 0; b < n; b++) sum += exp(score[i * n + b] - max);
        for (size_t b = 0; b < n && scope != CAIRN_SCOPE_TOKEN_HEAD; b++)
            score[i * n + b] = exp(score[i * n + b] - max) / sum;
    }
    for (size_t b = 0; b < n && scope != CAIRN_SCOPE_TOKEN_HEAD; b++) { /* the maximum over what shares a choice */
        for (size_t i = 0; i < rows * heads; i++) {
            size_t first = scope == CAIRN_SCOPE_HEAD ? i % heads : i / heads * heads;
            if (score[i * n + b] > score[first * n + b]) score[first * n + b] = score[i * n + b];
        }
        for (size_t i = 0; i < rows * heads; i++)
            score[i * n + b] = score[(scope == CAIRN_SCOPE_HEAD ? i % heads : i / heads * heads) * n + b];
    }
    for (size_t i = 0; i < rows * heads; i++) {
        size_t row = from + i / heads, head = i % heads, m = row / slots - tail_block, used = 0;
        memset(taken, 0, n);
        for (size_t k = 0; k < kept && !picked_given; k++) {
            size_t best = SIZE_MAX;
            for (size_t b = 0; b < n; b++)
                if (taken[b] == 0 && (best == SIZE_MAX || score[i * n + b] >= score[i * n + best])) best = b;
            if (best == SIZE_MAX) break;
            taken[best] = 1;
        }
        for (size_t k = 0; k < top_k && picked_given; k++) {
            int64_t id = picked[i * top_k + k];
            if (id < 0) continue;
            assert_in_range(id, lo, lo + n - 1);
            taken[id - (int64_t)lo] = 1;
        }
        for (size_t k = 0; k < top_k; k++) picked[i * top_k + k] = placed[i * top_k + k] = -1;
        for (size_t b = 0; b < n; b++) {
            if (taken[b] == 0) continue;
            size_t slot = used + (b + kept < n ? 0 : 1);
            picked[i * top_k + used] = (int64_t)(lo + b);
            placed[i * top_k + used] = (int32_t)slot;
            blocks[used] = (twin_block){.k = w->k[layer] + (lo + b) * slots * kv * dim,
                                        .v = w->v[layer] + (lo + b) * slots * kv * dim,
                                        .tokens = shape->block_tokens,
                                        .age = kept + 1 - slot + m,
                                        .visible = true};
            used++;
        }
        for (size_t b = 0; b < m; b++) /* completed inside the chunk: all visible, at true positions */
            blocks[used++] = (twin_block){.k = w->k[layer] + (tail_block + b) * slots * kv * dim,
                                          .v = w->v[layer] + (tail_block + b) * slots * kv * dim,
                                          .tokens = shape->block_tokens,
                                          .age = m - b,
                                          .visible = true};
        size_t own = row / slots * slots * kv * dim;
        twin_row(shape, layer, (uint32_t)head, w->q[layer] + row * heads * dim, row % slots, w->k[layer] + own,
                 w->v[layer] + own, blocks, used, out + i * dim, NULL);
    }
    free(score);
    free(taken);
    free(blocks);
}
