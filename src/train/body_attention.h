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
    real *scores;              /* (kept) */
    size_t rings;              /* layers * kv_heads */
    size_t total;              /* numbers in keys */
} TRAIN(memory);

enum { DISTRACTORS_MAX = CAIRN_TRAIN_DISTRACTORS_MAX };
typedef struct TRAIN(distractors) { /* what a guided row sees of kept blocks */
    size_t n;
    size_t block[DISTRACTORS_MAX]; /* in the ring */
    real gate[DISTRACTORS_MAX];
    real *weights;              /* (DISTRACTORS_MAX, B - 1) softmax within each */
    real *said;                 /* (DISTRACTORS_MAX, B - 1) way back: what dout says of each value */
    real mean[DISTRACTORS_MAX]; /* and of each block's */
} TRAIN(distractors);

enum { TOLD_KEYS = 128 };    /* remembered keys at a time: with their transpose 64 KB of L2 at D = 64 */
typedef struct TRAIN(told) { /* guided rows of one block before the keys they are told apart from */
    real *queries;           /* (B, D) turned */
    real *keys_t;            /* (D, TOLD_KEYS) */
    real *scores;            /* (B, TOLD_KEYS) */
    real *shift, *others;    /* (B) */
    real *sums;              /* (B, D) */
} TRAIN(told);

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
    TRAIN(told) told;
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
    real *const buffers[] = {att->keys,
                             att->dkeys,
                             att->keys_t,
                             att->values,
                             att->dvalues,
                             att->values_t,
                             att->queries,
                             att->dqueries,
                             att->scores,
                             att->dscores,
                             att->own,
                             att->down,
                             att->gates,
                             att->dgates,
                             att->means,
                             att->own_gate,
                             att->own_means,
                             att->lnz,
                             att->turned,
                             att->guided,
                             att->guided_rows,
                             att->inside,
                             att->distractors_room,
                             att->told.queries,
                             att->told.keys_t,
                             att->told.scores,
                             att->told.shift,
                             att->told.others,
                             att->told.sums};
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

static bool turns_new(const TRAIN(attention) * att, const cairn_attention_shape *shape, size_t positions, double factor,
                      TRAIN(turns) * t)
{
    const size_t half = att->dims / 2;
    t->factor = (real)factor;
    t->cos = reals(positions, half);
    t->sin = reals(positions, half);
    t->back = reals(positions, half);
    if (t->cos == NULL || t->sin == NULL || t->back == NULL) return false;
    for (size_t p = 0; p < positions; p++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)p * pow((double)shape->rope_theta, -2.0 * (double)i / (double)att->dims);
            if (shape->rope_factors != NULL) angle /= (double)shape->rope_factors[i];
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
    all = all && turns_new(att, shape, B, 1, &att->of_keys);
    all = all && turns_new(att, shape, ages * B, 1 / sqrt((double)D), &att->of_queries);
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
                   {&att->guided_rows, CAIRN_TRAIN_GUIDED_SLOTS, B},
                   {&att->told.queries, B, D},
                   {&att->told.keys_t, D, TOLD_KEYS},
                   {&att->told.scores, B, TOLD_KEYS},
                   {&att->told.shift, B, 1},
                   {&att->told.others, B, 1},
                   {&att->told.sums, B, D}};
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
