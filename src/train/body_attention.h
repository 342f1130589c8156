/* body_attention.h - attention of one layer over a training window, clamped positions, forward and backward.
 *
 * A query at offset j of block I sees block J, a = min(I - J, A) blocks back, as if it were exactly a blocks back: its
 * relative position to key offset o is a B + j - o. So each key is rotated by o once, and the query by a B + j for each
 * of a = 0..A; every block A or more back shares the last one. The gates come first: landmarks are few. Then each past
 * block's scores, softmax and products are one tile of (B, B), which stays in L1 and L2. Nothing of size (rows, rows)
 * is kept: the backward pass scores again.
 */

typedef struct TRAIN(memory) { /* rings of what earlier windows held, rotated by its offset, for guided rows */
    size_t room;               /* landmark keys of a layer and KV head; 0 = none */
    size_t kept;               /* whole blocks of a layer and KV head; 0 = none */
    size_t *seen;              /* (layers, kv_heads) how many ever came */
    real *keys;                /* (layers, kv_heads, room, D), then (layers, kv_heads) of kept blocks: */
    real *blocks;              /* landmarks (kept, D), keys (kept, B - 1, D), values (kept, B - 1, D) */
    real *scores;              /* (the larger of room and kept) */
    size_t rings;              /* layers * kv_heads */
    size_t total;              /* numbers in keys */
} TRAIN(memory);

enum { DISTRACTORS_MAX = CAIRN_TRAIN_DISTRACTORS_MAX };
typedef struct TRAIN(distractors) { /* what a guided row sees of kept blocks */
    size_t n;
    size_t block[DISTRACTORS_MAX]; /* in the ring */
    real gate[DISTRACTORS_MAX];
    real *weights; /* (DISTRACTORS_MAX, B - 1) softmax within each */
    real *turned;  /* (D) the row's query, rotated to the oldest age */
} TRAIN(distractors);

typedef struct TRAIN(turns) { /* rotations by a number of positions, `factor` with them */
    real *cos, *sin, *back;   /* (positions, dims / 2); back = -sin: the transpose, which is what a gradient needs */
    real factor;
} TRAIN(turns);

struct TRAIN(attention) {
    kernels_of_real kernels;
    size_t rows_max;
    size_t heads, kv_heads, D, B, A;
    size_t local_window;
    uint8_t *local_layers; /* (layers) or NULL */
    size_t dims;           /* that rotate */
    bool interleaved;
    TRAIN(turns) of_keys;       /* by 0..B - 1 */
    TRAIN(turns) of_queries;    /* by 0..(ages * B) - 1, times 1 / sqrt(D) */
    size_t ld;                  /* of what is kept by columns */
    real *keys, *dkeys;         /* (rows, D) of one KV head, rotated by their offsets */
    real *keys_t;               /* (D, ld) the same by columns */
    real *values, *dvalues;     /* (rows, D) */
    real *values_t;             /* (D, ld) */
    real *queries, *dqueries;   /* (ages, B, D) of one head and block, rotated by a B + j */
    real *scores, *dscores;     /* (B, B) of one head, block of queries and past block */
    real *own, *down;           /* (B, B) of the queries' own block */
    real *gates, *dgates;       /* (blocks, B) of past blocks: S_b, dL/dz_b */
    real *means;                /* (blocks, B) u_b */
    real *own_gate, *own_means; /* (B) */
    real *lnz;                  /* (B) */
    real *turned;               /* (D) */
    TRAIN(memory) memory;
    TRAIN(distractors) * distractors; /* (B) */
    real *distractors_room;           /* their arrays */
    real *inside;                     /* (B) share of a row's attention that distractors leave to its window */
    real *guided;                     /* (B, D) gradients of turned queries by remembered keys */
    real *guided_rows;                /* (GUIDED_SLOTS, B) softmax over the block of a slot */
};

static void turns_wipe(TRAIN(turns) * t)
{
    cairn_free(t->cos);
    cairn_free(t->sin);
    cairn_free(t->back);
}

void TRAIN(attention_free)(TRAIN(attention) * att)
{
    if (att == NULL) return;
    cairn_free(att->local_layers);
    turns_wipe(&att->of_keys);
    turns_wipe(&att->of_queries);
    real *const buffers[] = {
        att->keys,     att->dkeys,           att->keys_t,    att->values, att->dvalues, att->values_t, att->queries,
        att->dqueries, att->scores,          att->dscores,   att->own,    att->down,    att->gates,    att->dgates,
        att->means,    att->own_gate,        att->own_means, att->lnz,    att->turned,  att->guided,   att->guided_rows,
        att->inside,   att->distractors_room};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cairn_free(buffers[i]);
    cairn_free(att->distractors);
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

static bool turns_new(const TRAIN(attention) * att, float theta, size_t positions, double factor, TRAIN(turns) * t)
{
    const size_t half = att->dims / 2;
    t->factor = (real)factor;
    t->cos = reals(positions, half);
    t->sin = reals(positions, half);
    t->back = reals(positions, half);
    if (t->cos == NULL || t->sin == NULL || t->back == NULL) return false;
    for (size_t p = 0; p < positions; p++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)p * pow((double)theta, -2.0 * (double)i / (double)att->dims);
            t->cos[p * half + i] = (real)(factor * cos(angle));
            t->sin[p * half + i] = (real)(factor * sin(angle));
            t->back[p * half + i] = -t->sin[p * half + i];
        }
    }
    return true;
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
    att->ld = (rows + 15) / 16 * 16 + 16; /* an odd number of lines: columns do not share a few sets of L1 */

    const size_t blocks = (rows + att->B - 1) / att->B, B = att->B, D = att->D;
    const size_t ages =
        (att->A < blocks ? att->A + 1 : blocks); /* a window shorter than the clamp never looks further back */
    const bool local = shape->local_layers != NULL;
    if (local) att->local_layers = cairn_alloc_array(shape->layers, 1);
    bool all = !local || att->local_layers != NULL;
    all = all && turns_new(att, shape->rope_theta, B, 1, &att->of_keys);
    all = all && turns_new(att, shape->rope_theta, ages * B, 1 / sqrt((double)D), &att->of_queries);
    const struct {
        real **at;
        size_t rows, columns;
    } buffers[] = {{&att->keys, rows, D},
                   {&att->dkeys, rows, D},
                   {&att->keys_t, D, att->ld},
                   {&att->values, rows, D},
                   {&att->dvalues, rows, D},
                   {&att->values_t, D, att->ld},
                   {&att->queries, ages * B, D},
                   {&att->dqueries, ages * B, D},
                   {&att->scores, B, B},
                   {&att->dscores, B, B},
                   {&att->own, B, B},
                   {&att->down, B, B},
                   {&att->gates, blocks, B},
                   {&att->dgates, blocks, B},
                   {&att->means, blocks, B},
                   {&att->own_gate, B, 1},
                   {&att->own_means, B, 1},
                   {&att->lnz, B, 1},
                   {&att->turned, D, 1},
                   {&att->inside, B, 1},
                   {&att->guided, B, D},
                   {&att->guided_rows, CAIRN_TRAIN_GUIDED_SLOTS, B}};
    for (size_t i = 0; all && i < sizeof buffers / sizeof *buffers; i++)
        all = (*buffers[i].at = reals(buffers[i].rows, buffers[i].columns)) != NULL;
    if (!all) {
        TRAIN(attention_free)(att);
        return cairn_fail(CAIRN_NO_MEMORY, "attention of a window of %zu slots", rows);
    }
    if (local) memcpy(att->local_layers, shape->local_layers, shape->layers);
    *out = att;
    return CAIRN_OK;
}

/* out = x rotated by position p, or by -p, times the factor of the turns. */
static void turn(const TRAIN(attention) * att, const TRAIN(turns) * t, real *out, const real *x, size_t p, bool back)
{
    const size_t half = att->dims / 2;
    vec_rotate(att->kernels, out, x, t->cos + p * half, (back ? t->back : t->sin) + p * half, att->dims,
               att->interleaved);
    for (size_t i = att->dims; i < att->D; i++) out[i] = x[i] * t->factor;
}

/* Keys of a KV head, rotated, by rows and by columns; its values by rows, which the way forth needs, or by columns. */
static void take_head(TRAIN(attention) * att, size_t rows, const real *k, const real *v, size_t ld, bool back)
{
    const size_t D = att->D;
    for (size_t r = 0; r < rows; r++) turn(att, &att->of_keys, att->keys + r * D, k + r * ld, r % att->B, false);
    vec_transpose(att->kernels, att->keys_t, att->ld, att->keys, D, rows, D);
    if (back)
        vec_transpose(att->kernels, att->values_t, att->ld, v, ld, rows, D);
    else
        for (size_t r = 0; r < rows; r++) memcpy(att->values + r * D, v + r * ld, D * sizeof *v);
}

/* One head and the queries of one block, which sees blocks `lo` and up. */
typedef struct query_block {
    size_t I, lo;
    size_t first; /* slot of its row 0 */
    size_t n;     /* rows; fewer than B in an open block */
    size_t own;   /* columns of own tokens: row j sees those up to j, but never the own landmark */
} query_block;

static query_block query_block_of(const TRAIN(attention) * att, uint32_t layer, size_t rows, size_t I)
{
    query_block qb = {.I = I, .first = I * att->B};
    if (att->local_layers != NULL && att->local_layers[layer] != 0 && I > att->local_window)
        qb.lo = I - att->local_window;
    qb.n = rows - qb.first < att->B ? rows - qb.first : att->B;
    qb.own = qb.n < att->B ? qb.n : att->B - 1;
    return qb;
}

static size_t age_of(const TRAIN(attention) * att, const query_block *qb, size_t b)
{
    return qb->I - b < att->A ? qb->I - b : att->A;
}

static void take_queries(TRAIN(attention) * att, const query_block *qb, const real *q, size_t ld)
{
    const size_t D = att->D, B = att->B, oldest = age_of(att, qb, qb->lo);
    for (size_t a = 0; a <= oldest; a++)
        for (size_t j = 0; j < qb->n; j++)
            turn(att, &att->of_queries, att->queries + (a * B + j) * D, q + (qb->first + j) * ld, a * B + j, false);
}

/* out (n, columns) = x (n, D) times what is kept by columns, from slot `first` on. A block's landmark may come along:
 * whole vectors are faster, and nobody looks. */
static void by_columns(const TRAIN(attention) * att, const query_block *qb, const real *x, size_t ld, const real *kept,
                       size_t first, size_t columns, real *out)
{
    product(att->kernels, qb->n, columns, att->D, x, ld, 1, kept + first, att->ld, out, att->B, false);
}

/* The own block is a triangle: strips of its rows, each up to the columns its last row sees, cost five eighths of the
 * square. */
enum { TRIANGLE_ROWS = 16 };

static size_t strip_of_rows(size_t all, size_t first)
{
    return all - first < TRIANGLE_ROWS ? all - first : TRIANGLE_ROWS;
}

/* by_columns for own tokens; beyond the strips `out` is left as it is. */
static void own_by_columns(const TRAIN(attention) * att, const query_block *qb, const real *x, size_t ld,
                           const real *kept, real *out)
{
    for (size_t r = 0; r < qb->n; r += TRIANGLE_ROWS) {
        const size_t rows = strip_of_rows(qb->n, r);
        product(att->kernels, rows, r + rows, att->D, x + r * ld, ld, 1, kept + qb->first, att->ld, out + r * att->B,
                att->B, false);
    }
}

/* out (n, D) = (add ? out : 0) + w (n, own) x (own, D), w a triangle */
static void own_times(const TRAIN(attention) * att, const query_block *qb, const real *w, const real *x, real *out,
                      size_t ld, bool add)
{
    for (size_t r = 0; r < qb->n; r += TRIANGLE_ROWS) {
        const size_t rows = strip_of_rows(qb->n, r), columns = r + rows < qb->own ? r + rows : qb->own;
        product(att->kernels, rows, att->D, columns, w + r * att->B, att->B, 1, x, att->D, out + r * ld, ld, add);
    }
}

/* out (own, D) += w^T x, w (n, own) a triangle */
static void own_transposed_times(const TRAIN(attention) * att, const query_block *qb, const real *w, const real *x,
                                 size_t ld, real *out)
{
    for (size_t c = 0; c < qb->own; c += TRIANGLE_ROWS)
        product(att->kernels, strip_of_rows(qb->own, c), att->D, qb->n - c, w + c * att->B + c, 1, att->B, x + c * ld,
                ld, out + c * att->D, att->D, true);
}

/* att->own: softmax over own tokens, gates: S_b, own_gate: what own tokens have together; lnz. The own tokens are a
 * group like a past block, their gate's logit the log of the sum of their exp. */
static void weigh_groups(TRAIN(attention) * att, const query_block *qb, real bias)
{
    const size_t D = att->D, B = att->B;
    for (size_t b = qb->lo; b < qb->I; b++) {
        real *z = att->gates + (b - qb->lo) * B;
        vec_matvec(att->kernels, z, att->queries + age_of(att, qb, b) * B * D, D, qb->n,
                   att->keys + (b * B + B - 1) * D);
        for (size_t j = 0; j < qb->n; j++) z[j] += bias;
    }
    own_by_columns(att, qb, att->queries, D, att->keys_t, att->own);
    vec_row_softmax(att->kernels, att->own, B, qb->n, qb->own, true, NULL, att->own_gate);
    gate_softmax(att->kernels, qb->n, qb->I - qb->lo, B, att->own_gate, att->gates, att->lnz);
}

/* Softmax r_b,j over the tokens of a past block, times `weights`. */
static void weigh_block(TRAIN(attention) * att, const query_block *qb, size_t b, const real *weights)
{
    by_columns(att, qb, att->queries + age_of(att, qb, b) * att->B * att->D, att->D, att->keys_t, b * att->B, att->B,
               att->scores);
    vec_row_softmax(att->kernels, att->scores, att->B, qb->n, att->B - 1, false, weights, NULL);
}

/* ---- blocks of earlier windows, seen by guided rows (train_internal.h) ---- */

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
    turn(att, &att->of_queries, d->turned, in->q + row * in->ld + h * D, att->A * B + j, false);
    if (n > 0) vec_matvec(att->kernels, m->scores, kept_landmarks(m, ring, D, B), D, n, d->turned);
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
        vec_matvec(att->kernels, weights, kept_keys(m, ring, D, B, d->block[i]), D, B - 1, d->turned);
        vec_row_softmax(att->kernels, weights, B - 1, 1, B - 1, false, NULL, NULL);
    }
    att->inside[j] = window / all;
    att->lnz[j] += max + (real)log((double)all);
    att->own_gate[j] *= att->inside[j];
    for (size_t b = 0; b < qb->I - qb->lo; b++) att->gates[b * B + j] *= att->inside[j];
}

/* What row j has of their values. */
static void add_distractors(TRAIN(attention) * att, size_t j, size_t ring, real *out)
{
    const size_t D = att->D, B = att->B;
    const TRAIN(distractors) *d = &att->distractors[j];
    for (size_t i = 0; i < d->n; i++) {
        const real *values = kept_values(&att->memory, ring, D, B, d->block[i]);
        for (size_t t = 0; t < B - 1; t++) {
            const real weight = d->gate[i] * d->weights[i * (B - 1) + t];
            for (size_t x = 0; x < D; x++) out[x] += weight * values[t * D + x];
        }
    }
}

/* Gradient of row j's turned query by its distractors, added to att->guided; they get none themselves. `total` is the
 * mean of what dout says of all that the row sees. Returns the sum of the gradients of their gates' logits. */
static real distractors_backward(TRAIN(attention) * att, size_t j, size_t ring, const real *dout, real total)
{
    const size_t D = att->D, B = att->B;
    const TRAIN(memory) *m = &att->memory;
    const TRAIN(distractors) *d = &att->distractors[j];
    real *to = att->guided + j * D, *u = att->scores, sum = 0;
    for (size_t i = 0; i < d->n; i++) {
        const real *r = d->weights + i * (B - 1), *landmark = kept_landmarks(m, ring, D, B) + d->block[i] * D;
        vec_matvec(att->kernels, u, kept_values(m, ring, D, B, d->block[i]), D, B - 1, dout);
        const real mean = vec_dot(att->kernels, r, u, B - 1), dz = d->gate[i] * (mean - total);
        for (size_t t = 0; t < B - 1; t++) u[t] = d->gate[i] * r[t] * (u[t] - mean);
        product(att->kernels, 1, D, B - 1, u, B - 1, 1, kept_keys(m, ring, D, B, d->block[i]), D, to, D, true);
        for (size_t x = 0; x < D; x++) to[x] += dz * landmark[x];
        sum += dz;
    }
    return sum;
}

/* Their part of the mean of what dout says of a row's values. */
static real distractors_mean(TRAIN(attention) * att, size_t j, size_t ring, const real *dout)
{
    const size_t D = att->D, B = att->B;
    const TRAIN(distractors) *d = &att->distractors[j];
    real sum = 0;
    for (size_t i = 0; i < d->n; i++) {
        vec_matvec(att->kernels, att->scores, kept_values(&att->memory, ring, D, B, d->block[i]), D, B - 1, dout);
        sum += d->gate[i] * vec_dot(att->kernels, d->weights + i * (B - 1), att->scores, B - 1);
    }
    return sum;
}

void TRAIN(attend)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in, const real *bias,
                   const cairn_train_guide *guide, real *out)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld_out = att->heads * D;
    const size_t distractors = distractors_of(att, layer, rows, guide);
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const size_t ring = layer * att->kv_heads + h / group;
        if (h % group == 0) take_head(att, rows, in->k + h / group * D, in->v + h / group * D, in->ld, false);
        for (size_t I = 0, next = 0; I * B < rows; I++) {
            const query_block qb = query_block_of(att, layer, rows, I);
            const size_t from = next;
            real *to = out + qb.first * ld_out + h * D;
            if (distractors > 0) next = guided_in(guide, qb.first + qb.n, next);
            take_queries(att, &qb, in->q + h * D, in->ld);
            weigh_groups(att, &qb, bias[h]);
            for (size_t i = from; i < next; i++)
                meet_distractors(att, &qb, guide->rows[i].row, distractors, ring, in, h, bias[h]);
            for (size_t j = 0; j < qb.n; j++) vec_scale(att->kernels, att->own + j * B, att->own_gate[j], qb.own);
            own_times(att, &qb, att->own, att->values + qb.first * D, to, ld_out, false);
            for (size_t b = qb.lo; b < I; b++) {
                weigh_block(att, &qb, b, att->gates + (b - qb.lo) * B);
                product(att->kernels, qb.n, D, B - 1, att->scores, B, 1, att->values + b * B * D, D, to, ld_out, true);
            }
            for (size_t i = from; i < next; i++)
                add_distractors(att, guide->rows[i].row - qb.first, ring, out + guide->rows[i].row * ld_out + h * D);
        }
    }
}

/* att->scores and dscores, which hold weights and gradients of scores of the past block b, into gradients of its values
 * and keys and of the queries turned by its age. */
static void block_backward(TRAIN(attention) * att, const query_block *qb, size_t b, const real *dout, size_t ld)
{
    const size_t D = att->D, B = att->B, n = qb->n, first = b * B * D, turned = age_of(att, qb, b) * B * D;
    product(att->kernels, B - 1, D, n, att->scores, 1, B, dout, ld, att->dvalues + first, D, true);
    product(att->kernels, B - 1, D, n, att->dscores, 1, B, att->queries + turned, D, att->dkeys + first, D, true);
    product(att->kernels, n, D, B - 1, att->dscores, B, 1, att->keys + first, D, att->dqueries + turned, D, true);
}

static void own_backward(TRAIN(attention) * att, const query_block *qb, const real *dout, size_t ld)
{
    const size_t D = att->D, first = qb->first * D;
    own_transposed_times(att, qb, att->own, dout, ld, att->dvalues + first);
    own_transposed_times(att, qb, att->down, att->queries, D, att->dkeys + first);
    own_times(att, qb, att->down, att->keys + first, att->dqueries, D, true);
}

/* dgates of past blocks into gradients of landmark keys and turned queries. */
static void landmarks_backward(TRAIN(attention) * att, const query_block *qb)
{
    const size_t D = att->D, B = att->B, n = qb->n;
    for (size_t b = qb->lo, some; b < qb->I; b += some) { /* those of an age at once */
        const size_t a = age_of(att, qb, b), landmark = (b * B + B - 1) * D;
        const real *dz = att->dgates + (b - qb->lo) * B;
        some = a < att->A ? 1 : qb->I - att->A - b + 1;
        product(att->kernels, some, D, n, dz, B, 1, att->queries + a * B * D, D, att->dkeys + landmark, B * D, true);
        product(att->kernels, n, D, some, dz, 1, B, att->keys + landmark, B * D, att->dqueries + a * B * D, D, true);
    }
}

/* The gradients of turned queries, turned back and summed, are dq. */
static void queries_backward(TRAIN(attention) * att, const query_block *qb, real *dq, size_t ld)
{
    const size_t D = att->D, B = att->B, oldest = age_of(att, qb, qb->lo);
    for (size_t j = 0; j < qb->n; j++) {
        real *to = dq + (qb->first + j) * ld;
        turn(att, &att->of_queries, to, att->dqueries + j * D, j, true);
        for (size_t a = 1; a <= oldest; a++) {
            turn(att, &att->of_queries, att->turned, att->dqueries + (a * B + j) * D, a * B + j, true);
            for (size_t i = 0; i < D; i++) to[i] += att->turned[i];
        }
    }
}

/* ---- guidance (train_internal.h) ---- */

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
    m->scores = reals(keys > blocks ? keys : blocks, 1);
    att->distractors = cairn_calloc(B, sizeof *att->distractors);
    if (cairn_mul_size(B, DISTRACTORS_MAX * (B - 1) + D, &room)) att->distractors_room = reals(room, 1);
    if (m->keys == NULL || m->seen == NULL || m->scores == NULL || att->distractors == NULL ||
        att->distractors_room == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%zu landmark keys and %zu blocks to remember in each layer and head", keys,
                          blocks);
    for (size_t j = 0; j < B; j++) {
        att->distractors[j].weights = att->distractors_room + j * DISTRACTORS_MAX * (B - 1);
        att->distractors[j].turned = att->distractors_room + B * DISTRACTORS_MAX * (B - 1) + j * D;
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

/* Scores of what is remembered by att->turned; returns the sum of exp(score + bias - lnz), each left in memory.scores.
 */
static real score_memory(TRAIN(attention) * att, size_t ring, real bias, real lnz)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, n = m->room == 0 ? 0 : m->seen[ring] < m->room ? m->seen[ring] : m->room;
    if (n == 0) return 0;
    vec_matvec(att->kernels, m->scores, m->keys + ring * m->room * D, D, n, att->turned);
    return vec_exp(att->kernels, m->scores, lnz - bias, n);
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

/* Adds the gradient of weight * -ln(share of the row's slots): to att->down and dgates, which hold those of attention,
 * and for tokens of past blocks where dscores go; own holds the weights of own tokens. What remembered keys say of the
 * query goes to att->guided, row j. With p of the softmax over own tokens, landmarks and remembered keys, w_t the
 * slot's weight (p_t, or p_b r_t in a block b), P their sum: dL/dz = p, less the sum of w_t / P in that block; dL/dy_t
 * of a block is its share of P times r_t, less w_t / P. */
static double guide_row(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *row, size_t ring,
                        const real *q, real bias, real weight, real *dbias)
{
    TRAIN(memory) *m = &att->memory;
    const size_t D = att->D, B = att->B, n = m->room == 0 ? 0 : m->seen[ring] < m->room ? m->seen[ring] : m->room;
    const size_t j = row->row - qb->first;
    turn(att, &att->of_queries, att->turned, q, att->A * B + j, false);
    const real others = score_memory(att, ring, bias, att->lnz[j]), total = att->inside[j] + others;
    const real part = weight / total;
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
    vec_scale(att->kernels, m->scores, part, n);
    product(att->kernels, 1, D, n, m->scores, 1, 1, m->keys + ring * m->room * D, D, att->guided + j * D, D, true);
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

/* Gradients of all that a block of queries sees, `guided` rows of it distractors too, but for guidance: att->own and
 * down end as weights and dscores of own tokens, dgates as those of the landmarks' scores, of which the sum is
 * returned. */
static real groups_backward(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *guided, size_t n,
                            size_t ring, const real *dout, size_t ld)
{
    const size_t B = att->B, past = qb->I - qb->lo;
    real *total = att->own_means, sum = 0;
    own_by_columns(att, qb, dout, ld, att->values_t, att->down);
    for (size_t j = 0; j < qb->n; j++)
        total[j] = att->own_gate[j] *
                   vec_dot(att->kernels, att->own + j * B, att->down + j * B, j < qb->own ? j + 1 : qb->own);
    for (size_t b = 0; b < past; b++) {
        const real *gates = att->gates + b * B;
        real *means = att->means + b * B;
        weigh_block(att, qb, qb->lo + b, NULL);
        by_columns(att, qb, dout, ld, att->values_t, (qb->lo + b) * B, B, att->dscores);
        vec_row_softmax_backward(att->kernels, att->scores, att->dscores, B, qb->n, B - 1, false, gates, means, false);
        block_backward(att, qb, qb->lo + b, dout, ld);
        for (size_t j = 0; j < qb->n; j++) total[j] += gates[j] * means[j];
    }
    for (size_t i = 0; i < n; i++) {
        const size_t j = guided[i].row - qb->first;
        total[j] += distractors_mean(att, j, ring, dout + j * ld);
        sum += distractors_backward(att, j, ring, dout + j * ld, total[j]);
    }
    for (size_t b = 0; b < past; b++) {
        const real *gates = att->gates + b * B, *means = att->means + b * B;
        real *dgates = att->dgates + b * B;
        for (size_t j = 0; j < qb->n; j++) sum += dgates[j] = gates[j] * (means[j] - total[j]);
    }
    vec_row_softmax_backward(att->kernels, att->own, att->down, B, qb->n, qb->own, true, att->own_gate, total, true);
    return sum;
}

double TRAIN(attend_backward)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in,
                              const real *bias, const real *dout, const cairn_train_guide *guide, double scale,
                              real *dq, real *dk, real *dv, real *dbias)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld = in->ld, ld_out = att->heads * D;
    const bool local = att->local_layers != NULL && att->local_layers[layer] != 0;
    const bool guides = guide != NULL && !local && layer >= guide->from_layer && rows > att->A * B;
    const size_t distractors = distractors_of(att, layer, rows, guide);
    const bool remembers = guide != NULL && guide->remember && !local && att->memory.rings > 0;
    double guided = 0;
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const size_t kv = h / group * D, ring = layer * att->kv_heads + h / group;
        const bool tells = guides && h < guide->heads;
        const real *q = in->q + h * D;
        if (h % group == 0) {
            take_head(att, rows, in->k + kv, in->v + kv, ld, true);
            memset(att->dkeys, 0, rows * D * sizeof *att->dkeys);
            memset(att->dvalues, 0, rows * D * sizeof *att->dvalues);
        }
        for (size_t I = 0, next = 0; I * B < rows; I++) {
            const query_block qb = query_block_of(att, layer, rows, I);
            const size_t from = next;
            const real *dout_block = dout + qb.first * ld_out + h * D;
            if (tells || distractors > 0) next = guided_in(guide, qb.first + qb.n, next);
            const cairn_train_guided *told = next > from ? guide->rows + from : NULL;
            take_queries(att, &qb, q, ld);
            memset(att->dqueries, 0, (age_of(att, &qb, qb.lo) + 1) * B * D * sizeof *att->dqueries);
            weigh_groups(att, &qb, bias[h]);
            for (size_t i = from; i < next; i++) {
                const size_t j = guide->rows[i].row - qb.first;
                memset(att->guided + j * D, 0, D * sizeof *att->guided);
                att->inside[j] = 1;
                if (distractors > 0) meet_distractors(att, &qb, guide->rows[i].row, distractors, ring, in, h, bias[h]);
            }
            dbias[h] += groups_backward(att, &qb, told, distractors > 0 ? next - from : 0, ring, dout_block, ld_out);
            for (size_t i = from; tells && i < next; i++)
                guided +=
                    (double)guide->weight * guide_row(att, &qb, &guide->rows[i], ring, q + guide->rows[i].row * ld,
                                                      bias[h], (real)(scale * (double)guide->weight), &dbias[h]);
            own_backward(att, &qb, dout_block, ld_out);
            landmarks_backward(att, &qb);
            queries_backward(att, &qb, dq + h * D, ld);
            add_guided(att, &qb, told, next - from, dq + h * D, ld);
        }
        if (remembers && (h + 1) % group == 0 && (att->memory.kept > 0 || (guides && h / group * group < guide->heads)))
            remember(att, guide, ring, rows, in->v + kv, ld);
        if ((h + 1) % group == 0)
            for (size_t r = 0; r < rows; r++) {
                turn(att, &att->of_keys, dk + r * ld + kv, att->dkeys + r * D, r % B, true);
                memcpy(dv + r * ld + kv, att->dvalues + r * D, D * sizeof *dv);
            }
    }
    return guided;
}
