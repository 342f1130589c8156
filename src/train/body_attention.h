/* body_attention.h - attention of one layer over a training window, clamped positions, forward and backward.
 *
 * A query at offset j of block I sees block J, a = min(I - J, A) blocks back, as if it were exactly a blocks back: its
 * relative position to key offset o is a B + j - o. So each key is rotated by o once, and the query by a B + j for each
 * of a = 0..A; every block A or more back shares the last one and is scored by one product. Nothing of size
 * (rows, rows) is kept: the backward pass scores again, one block of queries at a time.
 */

typedef struct TRAIN(memory) { /* a ring of landmark keys, rotated by their offset, for guided rows */
    size_t room;               /* keys of a layer and KV head; 0 = none */
    size_t *seen;              /* (layers, kv_heads) how many ever came */
    real *keys;                /* (layers, kv_heads, room, D) */
    real *scores;              /* (room) */
    size_t rings;              /* layers * kv_heads */
} TRAIN(memory);

struct TRAIN(attention) {
    kernels_of_real kernels;
    size_t rows_max;
    size_t heads, kv_heads, D, B, A;
    size_t local_window;
    uint8_t *local_layers; /* (layers) or NULL */
    size_t dims;           /* that rotate */
    bool interleaved;
    real scale;
    real *cos, *sin;          /* ((A + 1) B, dims / 2) */
    uint32_t *ends;           /* (blocks) where landmarks stand */
    real *keys, *dkeys;       /* (rows, D) of one head, rotated by their offsets */
    real *queries, *dqueries; /* (B, D) of one head and block, rotated by a B + j */
    real *scores, *dscores;   /* (B, rows_max) of one head and block of queries */
    real *gates;              /* (B, blocks) */
    real *means;              /* (blocks) */
    real *turned;             /* (D) */
    TRAIN(memory) memory;
    real *guided; /* (B, D) gradients of turned queries by remembered keys */
};

void TRAIN(attention_free)(TRAIN(attention) * att)
{
    if (att == NULL) return;
    cairn_free(att->local_layers);
    cairn_free(att->cos);
    cairn_free(att->sin);
    cairn_free(att->ends);
    cairn_free(att->keys);
    cairn_free(att->dkeys);
    cairn_free(att->queries);
    cairn_free(att->dqueries);
    cairn_free(att->scores);
    cairn_free(att->dscores);
    cairn_free(att->gates);
    cairn_free(att->means);
    cairn_free(att->turned);
    cairn_free(att->guided);
    cairn_free(att->memory.seen);
    cairn_free(att->memory.keys);
    cairn_free(att->memory.scores);
    cairn_free(att);
}

static real *reals(size_t a, size_t b)
{
    size_t n;
    return cairn_mul_size(a, b, &n) ? cairn_alloc_array(n, sizeof(real)) : NULL;
}

cairn_status TRAIN(attention_new)(const cairn_attention_shape *shape, size_t rows, TRAIN(attention) * *out)
{
    cairn_status st = cairn_attention_shape_check(shape);
    TRAIN(attention) *att = NULL;
    *out = NULL;
    if (st != CAIRN_OK) return st;
    if (shape->scheme != CAIRN_POSITION_CLAMPED)
        return cairn_fail(CAIRN_UNSUPPORTED, "training with position scheme %d: clamped alone", (int)shape->scheme);
    if (rows == 0 || rows > UINT32_MAX) return cairn_fail(CAIRN_INVALID, "a training window of %zu slots", rows);
    if ((att = cairn_calloc(1, sizeof *att)) == NULL) return cairn_fail(CAIRN_NO_MEMORY, "attention of a window");
    att->kernels = best_kernels();
    att->rows_max = rows;
    att->heads = shape->heads;
    att->kv_heads = shape->kv_heads;
    att->D = shape->head_dim;
    att->B = (size_t)shape->block_tokens + 1;
    att->A = shape->clamp_blocks;
    att->local_window = shape->local_window_blocks;
    att->dims = shape->rope_dims != 0 ? shape->rope_dims : shape->head_dim;
    att->interleaved = shape->rope_interleaved;
    att->scale = (real)(1 / sqrt((double)shape->head_dim));

    size_t blocks = (rows + att->B - 1) / att->B, half = att->dims / 2;
    size_t ages =
        (att->A < blocks ? att->A + 1 : blocks); /* a window shorter than the clamp never looks further back */
    size_t positions = ages * att->B;
    bool local = shape->local_layers != NULL;
    if (local) att->local_layers = cairn_alloc_array(shape->layers, 1);
    att->cos = reals(positions, half);
    att->sin = reals(positions, half);
    att->ends = cairn_alloc_array(blocks, sizeof *att->ends);
    att->keys = reals(rows, att->D);
    att->dkeys = reals(rows, att->D);
    att->queries = reals(att->B, att->D);
    att->dqueries = reals(att->B, att->D);
    att->scores = reals(att->B, rows);
    att->dscores = reals(att->B, rows);
    att->gates = reals(att->B, blocks);
    att->means = reals(blocks, 1);
    att->turned = reals(att->D, 1);
    att->guided = reals(att->B, att->D);
    if ((local && att->local_layers == NULL) || att->cos == NULL || att->sin == NULL || att->ends == NULL ||
        att->keys == NULL || att->dkeys == NULL || att->queries == NULL || att->dqueries == NULL ||
        att->scores == NULL || att->dscores == NULL || att->gates == NULL || att->means == NULL ||
        att->turned == NULL || att->guided == NULL) {
        TRAIN(attention_free)(att);
        return cairn_fail(CAIRN_NO_MEMORY, "attention of a window of %zu slots", rows);
    }
    if (local) memcpy(att->local_layers, shape->local_layers, shape->layers);
    for (size_t b = 0; b < blocks; b++) att->ends[b] = (uint32_t)(b * att->B + att->B - 1);
    for (size_t p = 0; p < positions; p++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)p * pow((double)shape->rope_theta, -2.0 * (double)i / (double)att->dims);
            att->cos[p * half + i] = (real)cos(angle);
            att->sin[p * half + i] = (real)sin(angle);
        }
    }
    *out = att;
    return CAIRN_OK;
}

/* out = scale * x rotated by position p, or by -p: the transpose, which is what a gradient needs. */
static void rotate(const TRAIN(attention) * att, real *out, const real *x, size_t p, bool back, real scale)
{
    const size_t half = att->dims / 2;
    const real *c = att->cos + p * half, *s = att->sin + p * half;
    const real sign = back ? -scale : scale;
    for (size_t i = 0; i < half; i++) {
        const size_t one = att->interleaved ? 2 * i : i, two = att->interleaved ? one + 1 : i + half;
        out[one] = x[one] * c[i] * scale - x[two] * s[i] * sign;
        out[two] = x[two] * c[i] * scale + x[one] * s[i] * sign;
    }
    for (size_t i = att->dims; i < att->D; i++) out[i] = x[i] * scale;
}

/* One head and the queries of one block. Columns of scores are slots from that of block `lo` on, the oldest visible. */
typedef struct query_block {
    size_t I, lo;
    size_t first; /* slot of its row 0 */
    size_t n;     /* rows; fewer than B in an open block */
    size_t columns;
} query_block;

static query_block query_block_of(const TRAIN(attention) * att, uint32_t layer, size_t rows, size_t I)
{
    query_block qb = {.I = I, .first = I * att->B};
    if (att->local_layers != NULL && att->local_layers[layer] != 0 && I > att->local_window)
        qb.lo = I - att->local_window;
    qb.n = rows - qb.first < att->B ? rows - qb.first : att->B;
    qb.columns = qb.first + qb.n - qb.lo * att->B;
    return qb;
}

static size_t ages_of(const TRAIN(attention) * att, const query_block *qb)
{
    return (qb->I - qb->lo < att->A ? qb->I - qb->lo : att->A) + 1;
}

/* Slots [*first, *first + returned) that lie a blocks back, clamped. */
static size_t slots_of_age(const TRAIN(attention) * att, const query_block *qb, size_t a, size_t *first)
{
    size_t from = a < att->A ? qb->I - a : qb->lo;
    *first = from * att->B;
    return a == 0 ? qb->n : (qb->I - a + 1 - from) * att->B;
}

static void rotate_queries(TRAIN(attention) * att, const query_block *qb, size_t a, const real *q, size_t ld)
{
    for (size_t j = 0; j < qb->n; j++)
        rotate(att, att->queries + j * att->D, q + (qb->first + j) * ld, a * att->B + j, false, att->scale);
}

/* scores of one block of queries; q is the head's column of the window. */
static void score_block(TRAIN(attention) * att, const query_block *qb, const real *q, size_t ld)
{
    const size_t D = att->D;
    for (size_t a = 0; a < ages_of(att, qb); a++) {
        size_t from, n = slots_of_age(att, qb, a, &from);
        rotate_queries(att, qb, a, q, ld);
        gemm_nt(qb->n, n, D, att->queries, D, att->keys + from * D, D, att->scores + (from - qb->lo * att->B),
                att->rows_max);
    }
}

/* Row j of a block of queries sees its own tokens up to j, but never the own landmark (j = B - 1). */
static group_row row_of_block(const TRAIN(attention) * att, const query_block *qb, size_t j)
{
    size_t past = qb->I - qb->lo, begin = past * att->B;
    return (group_row){.ends = att->ends, .blocks = past, .begin = begin, .end = begin + (j + 1 < att->B ? j + 1 : j)};
}

void TRAIN(attend)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in, const real *bias,
                   real *out)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld_out = att->heads * D;
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const real *v = in->v + h / group * D;
        if (h % group == 0)
            for (size_t r = 0; r < rows; r++)
                rotate(att, att->keys + r * D, in->k + r * in->ld + h / group * D, r % B, false, 1);
        for (size_t I = 0; I * B < rows; I++) {
            query_block qb = query_block_of(att, layer, rows, I);
            score_block(att, &qb, in->q + h * D, in->ld);
            for (size_t j = 0; j < qb.n; j++) {
                group_row g = row_of_block(att, &qb, j);
                real *s = att->scores + j * att->rows_max;
                row_forward(att->kernels, &g, bias[h], s, att->gates);
                row_weights(att->kernels, &g, s, att->gates);
                memset(s + g.end, 0, (qb.columns - g.end) * sizeof *s);
            }
            gemm_nn(qb.n, D, qb.columns, att->scores, att->rows_max, v + qb.lo * B * in->ld, in->ld,
                    out + qb.first * ld_out + h * D, ld_out, false);
        }
    }
}

/* dscores of one block of queries into dq of its rows and dkeys of what they saw. */
static void scores_backward(TRAIN(attention) * att, const query_block *qb, const real *q, real *dq, size_t ld)
{
    const size_t D = att->D, B = att->B;
    for (size_t a = 0; a < ages_of(att, qb); a++) {
        size_t from, n = slots_of_age(att, qb, a, &from);
        const real *ds = att->dscores + (from - qb->lo * B);
        rotate_queries(att, qb, a, q, ld);
        gemm_tn(n, D, qb->n, ds, att->rows_max, att->queries, D, att->dkeys + from * D, D, true);
        gemm_nn(qb->n, D, n, ds, att->rows_max, att->keys + from * D, D, att->dqueries, D, false);
        for (size_t j = 0; j < qb->n; j++) {
            real *to = dq + (qb->first + j) * ld;
            rotate(att, att->turned, att->dqueries + j * D, a * B + j, true, att->scale);
            for (size_t i = 0; i < D; i++) to[i] = (a == 0 ? 0 : to[i]) + att->turned[i];
        }
    }
}

/* ---- guidance (train_internal.h) ---- */

cairn_status TRAIN(attention_remember)(TRAIN(attention) * att, uint32_t layers, size_t keys)
{
    TRAIN(memory) *m = &att->memory;
    size_t rings = (size_t)layers * att->kv_heads, all = 0;
    assert(m->room == 0);
    if (cairn_mul_size(rings, keys, &all)) m->keys = reals(all, att->D);
    m->seen = cairn_calloc(rings, sizeof *m->seen);
    m->scores = reals(keys, 1);
    if (m->keys == NULL || m->seen == NULL || m->scores == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%zu landmark keys to remember in each layer and head", keys);
    memset(m->keys, 0, all * att->D * sizeof *m->keys);
    m->room = keys;
    m->rings = rings;
    return CAIRN_OK;
}

void TRAIN(attention_memory)(TRAIN(attention) * att, size_t **counters, size_t *n_counters, real **keys, size_t *n_keys)
{
    *counters = att->memory.seen;
    *n_counters = att->memory.rings;
    *keys = att->memory.keys;
    *n_keys = att->memory.rings * att->memory.room * att->D;
}

/* Landmark keys of the window at hand, att->keys. */
static void remember(TRAIN(attention) * att, size_t ring, size_t rows)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D;
    if (m->room == 0) return;
    for (size_t r = att->B - 1; r < rows; r += att->B)
        memcpy(m->keys + (ring * m->room + m->seen[ring]++ % m->room) * D, att->keys + r * D, D * sizeof *m->keys);
}

/* Scores of what is remembered by att->turned; returns the sum of exp(score + bias - lnz), each left in memory.scores.
 */
static real score_memory(TRAIN(attention) * att, size_t ring, real bias, real lnz)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, n = m->room == 0 ? 0 : m->seen[ring] < m->room ? m->seen[ring] : m->room;
    for (size_t i = 0; i < n; i++)
        m->scores[i] = vec_dot(att->kernels, att->turned, m->keys + (ring * m->room + i) * D, D);
    return n == 0 ? 0 : vec_exp(att->kernels, m->scores, lnz - bias, n);
}

/* Adds the gradient of weight * -ln(share of the row's slots) to u, which row_backward left; s, gates, lnz are
 * row_forward's. What remembered keys say of the query goes to att->guided, row j. With p of the softmax over own
 * tokens, landmarks and remembered keys, w_t the slot's weight (p_t, or p_b r_t in a block b), P their sum: dL/dz = p,
 * less the sum of w_t / P in that block; dL/dy_t of a block is its share of P times r_t, less w_t / P. */
static double guide_row(TRAIN(attention) * att, const group_row *g, const cairn_train_guided *row, size_t ring,
                        size_t j, const real *q, real bias, real lnz, real weight, const real *s, const real *gates,
                        real *u, real *dbias)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, B = att->B, n = m->room == 0 ? 0 : m->seen[ring] < m->room ? m->seen[ring] : m->room;
    rotate(att, att->turned, q, att->A * B + j, false, att->scale);
    const real others = score_memory(att, ring, bias, lnz), total = 1 + others, own = weight / total;
    real share = 0; /* P, but for 1 / total */
    for (uint32_t i = 0; i < row->n; i++) {
        const uint32_t t = row->slots[i];
        share += t >= g->begin ? s[t] : gates[t / B] * s[t];
    }
    if (!(share > 0)) share = (real)1e-30; /* all of it under the smallest number there is */
    for (size_t t = g->begin; t < g->end; t++) u[t] += own * s[t];
    for (size_t b = 0; b < g->blocks; b++) {
        u[g->ends[b]] += own * gates[b];
        *dbias += own * gates[b];
    }
    for (uint32_t i = 0; i < row->n; i++) {
        const uint32_t t = row->slots[i];
        const size_t b = t / B;
        if (t >= g->begin) {
            u[t] -= weight * s[t] / share;
            continue;
        }
        const real part = weight * gates[b] * s[t] / share;
        u[g->ends[b]] -= part;
        *dbias -= part;
        u[t] -= part;
        for (size_t y = block_begin(g, b); y < g->ends[b]; y++) u[y] += part * s[y];
    }
    real *dq = att->guided + j * D;
    for (size_t i = 0; i < D; i++) dq[i] = 0;
    for (size_t i = 0; i < n; i++) {
        const real *key = m->keys + (ring * m->room + i) * D, p = own * m->scores[i];
        for (size_t d = 0; d < D; d++) dq[d] += p * key[d];
    }
    *dbias += own * others;
    return -log((double)(share / total));
}

/* The guided rows of a block: *first moves to the first one at or after its end. */
static size_t guided_in(const cairn_train_guide *guide, size_t end, size_t first)
{
    while (first < guide->n && guide->rows[first].row < end) first++;
    return first;
}

static void add_guided(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *rows, size_t n,
                       real *dq, size_t ld)
{
    const size_t D = att->D;
    for (size_t i = 0; i < n; i++) {
        const size_t j = rows[i].row - qb->first;
        real *to = dq + rows[i].row * ld;
        rotate(att, att->turned, att->guided + j * D, att->A * att->B + j, true, att->scale);
        for (size_t d = 0; d < D; d++) to[d] += att->turned[d];
    }
}

double TRAIN(attend_backward)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in,
                              const real *bias, const real *dout, const cairn_train_guide *guide, double scale,
                              real *dq, real *dk, real *dv, real *dbias)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld = in->ld, ld_out = att->heads * D;
    const bool local = att->local_layers != NULL && att->local_layers[layer] != 0;
    const bool guides = guide != NULL && !local && layer >= guide->from_layer && rows > att->A * B;
    double guided = 0;
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const size_t kv = h / group * D, ring = layer * att->kv_heads + h / group;
        if (h % group == 0) {
            for (size_t r = 0; r < rows; r++) {
                rotate(att, att->keys + r * D, in->k + r * ld + kv, r % B, false, 1);
                memset(dv + r * ld + kv, 0, D * sizeof *dv);
            }
            memset(att->dkeys, 0, rows * D * sizeof *att->dkeys);
        }
        for (size_t I = 0, next = 0; I * B < rows; I++) {
            query_block qb = query_block_of(att, layer, rows, I);
            const size_t seen = qb.lo * B * ld + kv; /* the oldest visible row of k and v */
            const size_t from = next;
            const real *dout_block = dout + qb.first * ld_out + h * D;
            if (guides && h < guide->heads) next = guided_in(guide, qb.first + qb.n, next);
            score_block(att, &qb, in->q + h * D, ld);
            gemm_nt(qb.n, qb.columns, D, dout_block, ld_out, in->v + seen, ld, att->dscores, att->rows_max);
            for (size_t j = 0, at = from; j < qb.n; j++) {
                group_row g = row_of_block(att, &qb, j);
                real *s = att->scores + j * att->rows_max, *u = att->dscores + j * att->rows_max;
                real lnz = row_forward(att->kernels, &g, bias[h], s, att->gates);
                dbias[h] += row_backward(att->kernels, &g, s, att->gates, u, att->means);
                if (at < next && guide->rows[at].row == qb.first + j)
                    guided += (double)guide->weight * guide_row(att, &g, &guide->rows[at++], ring, j,
                                                                in->q + (qb.first + j) * ld + h * D, bias[h], lnz,
                                                                (real)(scale * (double)guide->weight), s, att->gates, u,
                                                                &dbias[h]);
                row_weights(att->kernels, &g, s, att->gates);
                memset(s + g.end, 0, (qb.columns - g.end) * sizeof *s);
                memset(u + g.end, 0, (qb.columns - g.end) * sizeof *u);
            }
            gemm_tn(qb.columns, D, qb.n, att->scores, att->rows_max, dout_block, ld_out, dv + seen, ld, true);
            scores_backward(att, &qb, in->q + h * D, dq + h * D, ld);
            add_guided(att, &qb, guides ? guide->rows + from : NULL, next - from, dq + h * D, ld);
        }
        if (guides && guide->remember && (h + 1) % group == 0 && h / group * group < guide->heads)
            remember(att, ring, rows);
        if ((h + 1) % group == 0)
            for (size_t r = 0; r < rows; r++) rotate(att, dk + r * ld + kv, att->dkeys + r * D, r % B, true, 1);
    }
    return guided;
}
