/* body_guide.h - rows that are told what they need (train_internal.h): what is remembered of earlier windows,
 * distractors, guidance.
 */

/* ---- what is remembered ---- */

static real *kept_landmarks(const TRAIN(memory) * m, size_t ring, size_t D, size_t B)
{
    return m->blocks + ring * m->kept * (2 * B - 1) * D;
}
static real *kept_keys(const TRAIN(memory) * m, size_t ring, size_t D, size_t B, size_t block)
{
    return kept_landmarks(m, ring, D, B) + (m->kept + block * (B - 1)) * D;
}
static real *kept_values(const TRAIN(memory) * m, size_t ring, size_t D, size_t B, size_t block)
{
    return kept_keys(m, ring, D, B, m->kept + block);
}

cairn_status TRAIN(attention_remember)(TRAIN(attention) * att, uint32_t layers, size_t keys, size_t blocks)
{
    TRAIN(memory) *m = &att->memory;
    const size_t B = att->B, D = att->D, each = 2 * B - 1, rings = (size_t)layers * att->kv_heads;
    size_t of_blocks = 0, rows = 0, room = 0;
    assert(m->rings == 0);
    if (cairn_mul_size(blocks, each, &of_blocks) && of_blocks <= SIZE_MAX - keys &&
        cairn_mul_size(rings, keys + of_blocks, &rows) && cairn_mul_size(rows, D, &m->total))
        m->keys = cairn_calloc(m->total, sizeof *m->keys);
    m->seen = cairn_calloc(rings, sizeof *m->seen);
    m->scores = reals(blocks, 1);
    att->distractors = cairn_calloc(B, sizeof *att->distractors);
    if (cairn_mul_size(B, 2 * DISTRACTORS_MAX * (B - 1), &room)) att->distractors_room = reals(room, 1);
    if (m->keys == NULL || m->seen == NULL || m->scores == NULL || att->distractors == NULL ||
        att->distractors_room == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%zu landmark keys and %zu blocks to remember in each layer and head", keys,
                          blocks);
    for (size_t j = 0; j < B; j++) {
        att->distractors[j].weights = att->distractors_room + 2 * j * DISTRACTORS_MAX * (B - 1);
        att->distractors[j].said = att->distractors[j].weights + DISTRACTORS_MAX * (B - 1);
    }
    m->blocks = m->keys + rings * keys * D;
    m->room = keys;
    m->kept = blocks;
    m->rings = rings;
    return CAIRN_OK;
}

void TRAIN(attention_memory)(TRAIN(attention) * att, size_t **counters, size_t *n_counters, real **keys, size_t *n_keys)
{
    *counters = att->memory.seen;
    *n_counters = att->memory.rings;
    *keys = att->memory.keys;
    *n_keys = att->memory.total;
}

/* Closed blocks of the window at hand, att->keys, with their values (rows, ld), but for those it says not to. */
static void remember(TRAIN(attention) * att, const cairn_train_guide *guide, size_t ring, size_t rows, const real *v,
                     size_t ld)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, B = att->B;
    for (size_t b = 0; (b + 1) * B <= rows; b++) {
        const real *keys = att->keys + b * B * D, *landmark = keys + (B - 1) * D;
        if (guide->forget != NULL && guide->forget[b] != 0) continue;
        if (m->room > 0)
            memcpy(m->keys + (ring * m->room + m->seen[ring] % m->room) * D, landmark, D * sizeof *m->keys);
        if (m->kept > 0) {
            const size_t at = m->seen[ring] % m->kept;
            real *values = kept_values(m, ring, D, B, at);
            memcpy(kept_landmarks(m, ring, D, B) + at * D, landmark, D * sizeof *m->keys);
            memcpy(kept_keys(m, ring, D, B, at), keys, (B - 1) * D * sizeof *m->keys);
            for (size_t t = 0; t < B - 1; t++) memcpy(values + t * D, v + (b * B + t) * ld, D * sizeof *m->keys);
        }
        m->seen[ring]++;
    }
}

/* ---- distractors ---- */

/* How many a guided row of the layer sees. */
static size_t distractors_of(const TRAIN(attention) * att, uint32_t layer, size_t rows, const cairn_train_guide *guide)
{
    const bool local = att->local_layers != NULL && att->local_layers[layer] != 0;
    return guide == NULL || local || rows <= att->A * att->B || att->memory.kept == 0 ? 0 : guide->distractors;
}

/* The first guided row at or after slot `end`, of those from `first` on. */
static size_t guided_in(const cairn_train_guide *guide, size_t end, size_t first)
{
    while (first < guide->n && guide->rows[first].row < end) first++;
    return first;
}

/* After weigh_groups: the `most` kept blocks with the best landmarks become keys of the row beside those of its window,
 * whose gates and lnz are made to go with them. A block of them is as old as the clamp. */
static void meet_distractors(TRAIN(attention) * att, const query_block *qb, size_t row, size_t most, size_t ring,
                             const TRAIN(qkv) * in, size_t h, real bias)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, B = att->B, j = row - qb->first;
    const size_t n = m->seen[ring] < m->kept ? m->seen[ring] : m->kept;
    TRAIN(distractors) *d = &att->distractors[j];
    real z[DISTRACTORS_MAX], max = 0, sum = 0;
    turn(att, &att->of_queries, att->turned, in->q + row * in->ld + h * D, att->A * B + j, false);
    if (n > 0) vec_matvec(att->kernels, m->scores, kept_landmarks(m, ring, D, B), D, n, att->turned);
    for (d->n = 0; d->n < most && d->n < n; d->n++) {
        size_t best = 0;
        for (size_t i = 1; i < n; i++) best = m->scores[i] > m->scores[best] ? i : best;
        d->block[d->n] = best;
        z[d->n] = m->scores[best] + bias - att->lnz[j];
        max = z[d->n] > max ? z[d->n] : max;
        m->scores[best] = -INFINITY;
    }
    for (size_t i = 0; i < d->n; i++) sum += d->gate[i] = (real)exp((double)(z[i] - max));
    const real window = (real)exp((double)-max), all = window + sum;
    for (size_t i = 0; i < d->n; i++) {
        real *weights = d->weights + i * (B - 1);
        d->gate[i] /= all;
        vec_matvec(att->kernels, weights, kept_keys(m, ring, D, B, d->block[i]), D, B - 1, att->turned);
        vec_row_softmax(att->kernels, weights, B - 1, 1, B - 1, false, NULL, NULL);
    }
    att->inside[j] = window / all;
    att->lnz[j] += max + (real)log((double)all);
    att->own_gate[j] *= att->inside[j];
    for (size_t b = 0; b < qb->I - qb->lo; b++) att->gates[b * B + j] *= att->inside[j];
}

/* What row j has of their values; spends the weights. */
static void add_distractors(TRAIN(attention) * att, size_t j, size_t ring, real *out)
{
    const size_t D = att->D, B = att->B;
    TRAIN(distractors) *d = &att->distractors[j];
    for (size_t i = 0; i < d->n; i++) {
        real *weights = d->weights + i * (B - 1);
        vec_scale(att->kernels, weights, d->gate[i], B - 1);
        product(att->kernels, 1, D, B - 1, weights, B - 1, 1, kept_values(&att->memory, ring, D, B, d->block[i]), D,
                out, D, true);
    }
}

/* Their part of the mean of what dout says of row j's values. */
static real distractors_mean(TRAIN(attention) * att, size_t j, size_t ring, const real *dout)
{
    const size_t D = att->D, B = att->B;
    TRAIN(distractors) *d = &att->distractors[j];
    real sum = 0;
    for (size_t i = 0; i < d->n; i++) {
        real *said = d->said + i * (B - 1);
        vec_matvec(att->kernels, said, kept_values(&att->memory, ring, D, B, d->block[i]), D, B - 1, dout);
        d->mean[i] = vec_dot(att->kernels, d->weights + i * (B - 1), said, B - 1);
        sum += d->gate[i] * d->mean[i];
    }
    return sum;
}

/* After distractors_mean: the gradient of row j's turned query by them, added to att->guided; they get none themselves.
 * `total` is the mean of what dout says of all that the row sees. Returns the sum of the gradients of their gates'
 * logits. */
static real distractors_backward(TRAIN(attention) * att, size_t j, size_t ring, real total)
{
    const size_t D = att->D, B = att->B;
    const TRAIN(memory) *m = &att->memory;
    const TRAIN(distractors) *d = &att->distractors[j];
    real *to = att->guided + j * D, sum = 0;
    for (size_t i = 0; i < d->n; i++) {
        const real *r = d->weights + i * (B - 1);
        real *dy = d->said + i * (B - 1), dz = d->gate[i] * (d->mean[i] - total);
        for (size_t t = 0; t < B - 1; t++) dy[t] = d->gate[i] * r[t] * (dy[t] - d->mean[i]);
        product(att->kernels, 1, D, B - 1, dy, B - 1, 1, kept_keys(m, ring, D, B, d->block[i]), D, to, D, true);
        product(att->kernels, 1, D, 1, &dz, 1, 1, kept_landmarks(m, ring, D, B) + d->block[i] * D, D, to, D, true);
        sum += dz;
    }
    return sum;
}

/* ---- guidance ---- */

/* The newest remembered keys of a ring, which compete: some up to its end, the rest from its begin. */
typedef struct TRAIN(rivals) {
    const real *begin, *from; /* of the ring; of them */
    size_t n, till_end;
} TRAIN(rivals);

static TRAIN(rivals) rivals_of(const TRAIN(attention) * att, size_t ring, const cairn_train_guide *guide)
{
    const TRAIN(memory) *m = &att->memory;
    const size_t all = m->room == 0 ? 0 : m->seen[ring] < m->room ? m->seen[ring] : m->room;
    const size_t n = guide->rivals > 0 && guide->rivals < all ? guide->rivals : all;
    const size_t at = n < all ? (m->seen[ring] - n) % m->room : 0;
    const real *begin = m->keys + ring * m->room * att->D;
    return (TRAIN(rivals)){begin, begin + at * att->D, n, n < m->room - at ? n : m->room - at};
}

/* Adds what n keys say to the told rows, which are turned in told->queries: exp(score - shift) to told->others, and
 * each key times that to told->sums. A piece of keys is gone over once for all rows. */
static void meet_keys(TRAIN(attention) * att, const real *keys, size_t n, size_t rows)
{
    const TRAIN(told) *told = &att->told;
    const size_t D = att->D;
    for (size_t i = 0, some; i < n; i += some, keys += some * D) {
        some = n - i < TOLD_KEYS ? n - i : TOLD_KEYS;
        vec_transpose(att->kernels, told->keys_t, TOLD_KEYS, keys, D, some, D);
        product(att->kernels, rows, some, D, told->queries, D, 1, told->keys_t, TOLD_KEYS, told->scores, TOLD_KEYS,
                false);
        for (size_t r = 0; r < rows; r++)
            told->others[r] += vec_exp(att->kernels, told->scores + r * TOLD_KEYS, told->shift[r], some);
        product(att->kernels, rows, D, some, told->scores, TOLD_KEYS, 1, keys, D, told->sums, D, true);
    }
}

/* Of the told rows, all of one block: others, the sum of exp(score + bias - lnz) over their rivals, and sums, that of
 * the rivals' keys, each times its own. */
static void meet_rivals(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *rows, size_t n,
                        const TRAIN(rivals) * r, const real *q, size_t ld, real bias)
{
    const TRAIN(told) *told = &att->told;
    const size_t D = att->D, B = att->B;
    for (size_t i = 0; i < n; i++) {
        const size_t j = rows[i].row - qb->first;
        turn(att, &att->of_queries, told->queries + i * D, q + rows[i].row * ld, att->A * B + j, false);
        told->shift[i] = att->lnz[j] - bias;
        told->others[i] = 0;
    }
    memset(told->sums, 0, n * D * sizeof *told->sums);
    meet_keys(att, r->from, r->till_end, n);
    meet_keys(att, r->begin, r->n - r->till_end, n);
}

/* Softmax of row j over the tokens of block b. */
static void weigh_row(TRAIN(attention) * att, const query_block *qb, size_t b, size_t j, real *r)
{
    const size_t D = att->D, B = att->B;
    vec_matvec(att->kernels, r, att->keys + b * B * D, D, B - 1, att->queries + (age_of(att, qb, b) * B + j) * D);
    vec_row_softmax(att->kernels, r, B, 1, B - 1, false, NULL, NULL);
}

/* dscores of row j by the tokens of block b, in ds, into gradients of both sides. */
static void row_scores_backward(TRAIN(attention) * att, const query_block *qb, size_t b, size_t j, const real *ds)
{
    const size_t D = att->D, B = att->B, at = (age_of(att, qb, b) * B + j) * D;
    product(att->kernels, B - 1, D, 1, ds, 1, B, att->queries + at, D, att->dkeys + b * B * D, D, true);
    product(att->kernels, 1, D, B - 1, ds, B, 1, att->keys + b * B * D, D, att->dqueries + at, D, true);
}

/* After meet_rivals, for its row `number`: adds the gradient of weight * -ln(share of the row's slots): to att->down
 * and dgates, which hold those of attention, and for tokens of past blocks where dscores go; own holds the weights of
 * own tokens. What remembered keys say of the query goes to att->guided, row j. With p of the softmax over own tokens,
 * landmarks and remembered keys, w_t the slot's weight (p_t, or p_b r_t in a block b), P their sum: dL/dz = p, less the
 * sum of w_t / P in that block; dL/dy_t of a block is its share of P times r_t, less w_t / P. */
static double guide_row(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *row, size_t number,
                        real weight, real *dbias)
{
    const size_t D = att->D, B = att->B;
    const size_t j = row->row - qb->first;
    const real others = att->told.others[number], total = att->inside[j] + others, part = weight / total;
    const real *own = att->own + j * B;
    real *down = att->down + j * B, share = 0; /* P, but for 1 / total */
    for (uint32_t i = 0; i < row->n; i++) {
        const size_t t = row->slots[i], b = t / B;
        real *r = att->guided_rows + i * B;
        if (b == qb->I) {
            share += own[t - qb->first];
            continue;
        }
        weigh_row(att, qb, b, j, r);
        share += att->gates[(b - qb->lo) * B + j] * r[t - b * B];
    }
    if (!(share > 0)) share = (real)1e-30; /* all of it under the smallest number there is */
    for (size_t t = 0; t < qb->own; t++) down[t] += part * own[t];
    for (size_t b = 0; b < qb->I - qb->lo; b++) {
        att->dgates[b * B + j] += part * att->gates[b * B + j];
        *dbias += part * att->gates[b * B + j];
    }
    for (uint32_t i = 0; i < row->n; i++) {
        const size_t t = row->slots[i], b = t / B;
        real *r = att->guided_rows + i * B;
        if (b == qb->I) {
            down[t - qb->first] -= weight * own[t - qb->first] / share;
            continue;
        }
        const size_t gate = (b - qb->lo) * B + j;
        const real of_slot = weight * att->gates[gate] * r[t - b * B] / share;
        att->dgates[gate] -= of_slot;
        *dbias -= of_slot;
        vec_scale(att->kernels, r, of_slot, B - 1);
        r[t - b * B] -= of_slot;
        row_scores_backward(att, qb, b, j, r);
    }
    for (size_t d = 0; d < D; d++) att->guided[j * D + d] += part * att->told.sums[number * D + d];
    *dbias += part * others;
    return -log((double)(share / total));
}

static void add_guided(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *rows, size_t n,
                       real *dq, size_t ld)
{
    const size_t D = att->D;
    for (size_t i = 0; i < n; i++) {
        const size_t j = rows[i].row - qb->first;
        real *to = dq + rows[i].row * ld;
        turn(att, &att->of_queries, att->turned, att->guided + j * D, att->A * att->B + j, true);
        for (size_t d = 0; d < D; d++) to[d] += att->turned[d];
    }
}
