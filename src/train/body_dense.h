/* body_dense.h - ordinary causal attention over a window, all of it or a segment and the one before: forward, backward.
 *
 * Dense: a row sees every row up to itself, rotated to their true positions. Transformer-XL (Dai et al. 2019): the
 * window is cut into segments; a row sees its own segment up to itself and all of the one before, whose keys and values
 * are a memory: nothing flows back into them. Those keys and values are what they were when that segment was computed,
 * so one pass over the window with this mask and this stop is the recurrence itself; RoPE gives the relative positions.
 * Like body_attention.h it keeps nothing of size (rows, rows) and scores again on the way back, a strip at a time.
 */

enum { STRIP = 64 }; /* rows of queries at a time */

struct TRAIN(dense) {
    kernels_of_real kernels;
    size_t rows_max, heads, kv_heads, D, dims;
    size_t segment; /* rows; 0 = the whole window is one */
    bool interleaved;
    real scale;
    real *cos, *sin;          /* (rows_max, dims / 2) */
    real *keys, *dkeys;       /* (rows_max, D) of one head, rotated */
    real *queries, *dqueries; /* (STRIP, D) rotated */
    real *scores, *dscores;   /* (STRIP, rows_max) */
};

void TRAIN(dense_free)(TRAIN(dense) * d)
{
    if (d == NULL) return;
    real *const buffers[] = {d->cos, d->sin, d->keys, d->dkeys, d->queries, d->dqueries, d->scores, d->dscores};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cairn_free(buffers[i]);
    cairn_free(d);
}

cairn_status TRAIN(dense_new)(const cairn_attention_shape *shape, size_t segment, size_t rows, TRAIN(dense) * *out)
{
    TRAIN(dense) *d = cairn_calloc(1, sizeof *d);
    *out = NULL;
    if (d == NULL) return cairn_fail(CAIRN_NO_MEMORY, "attention of a window");
    d->kernels = best_kernels();
    d->rows_max = rows;
    d->heads = shape->heads;
    d->kv_heads = shape->kv_heads;
    d->D = shape->head_dim;
    d->dims = shape->rope_dims != 0 ? shape->rope_dims : shape->head_dim;
    d->segment = segment;
    d->interleaved = shape->rope_interleaved;
    d->scale = (real)(1 / sqrt((double)shape->head_dim));
    const size_t half = d->dims / 2;
    d->cos = reals(rows, half);
    d->sin = reals(rows, half);
    d->keys = reals(rows, d->D);
    d->dkeys = reals(rows, d->D);
    d->queries = reals(STRIP, d->D);
    d->dqueries = reals(STRIP, d->D);
    d->scores = reals(STRIP, rows);
    d->dscores = reals(STRIP, rows);
    if (d->cos == NULL || d->sin == NULL || d->keys == NULL || d->dkeys == NULL || d->queries == NULL ||
        d->dqueries == NULL || d->scores == NULL || d->dscores == NULL) {
        TRAIN(dense_free)(d);
        return cairn_fail(CAIRN_NO_MEMORY, "attention of a window of %zu slots", rows);
    }
    for (size_t p = 0; p < rows; p++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)p * pow((double)shape->rope_theta, -2.0 * (double)i / (double)d->dims);
            if (shape->rope_factors != NULL) angle /= (double)shape->rope_factors[i];
            d->cos[p * half + i] = (real)cos(angle);
            d->sin[p * half + i] = (real)sin(angle);
        }
    }
    *out = d;
    return CAIRN_OK;
}

/* out (n, D) = scale times rows [first, first + n) of x, rotated to their positions, or back by them. */
static void turn_rows(const TRAIN(dense) * d, real *out, size_t ld_out, const real *x, size_t ld, size_t first,
                      size_t n, bool back, real scale)
{
    const size_t half = d->dims / 2;
    for (size_t r = 0; r < n; r++, out += ld_out, x += ld) {
        const real *c = d->cos + (first + r) * half, *s = d->sin + (first + r) * half;
        const real sign = back ? -scale : scale;
        for (size_t i = 0; i < half; i++) {
            const size_t one = d->interleaved ? 2 * i : i, two = d->interleaved ? one + 1 : i + half;
            const real a = x[one], b = x[two];
            out[one] = a * c[i] * scale - b * s[i] * sign;
            out[two] = b * c[i] * scale + a * s[i] * sign;
        }
        for (size_t i = d->dims; i < d->D; i++) out[i] = x[i] * scale;
    }
}

typedef struct strip { /* rows [first, first + n) of one segment see rows [lo, ...) */
    size_t first, n;
    size_t lo;
    size_t own; /* first row of the segment: what gradients reach */
    size_t columns;
} strip;

/* The strip that begins at `first`; it ends with its segment. */
static strip strip_of(const TRAIN(dense) * d, size_t first, size_t rows)
{
    const size_t segment = d->segment == 0 ? rows : d->segment, own = first / segment * segment;
    const size_t end = own + segment < rows ? own + segment : rows;
    strip s = {.first = first, .n = end - first < STRIP ? end - first : STRIP, .own = own};
    s.lo = own < segment ? 0 : own - segment;
    s.columns = first + s.n - s.lo;
    return s;
}

/* d->scores (n, columns): the softmax of each row over what it sees, 0 beyond. */
static void weigh_strip(TRAIN(dense) * d, const strip *s, const real *q, size_t ld)
{
    turn_rows(d, d->queries, d->D, q + s->first * ld, ld, s->first, s->n, false, d->scale);
    gemm_nt(s->n, s->columns, d->D, d->queries, d->D, d->keys + s->lo * d->D, d->D, d->scores, d->rows_max);
    for (size_t r = 0; r < s->n; r++) {
        real *row = d->scores + r * d->rows_max;
        const size_t seen = s->first + r + 1 - s->lo;
        real sum = vec_exp(d->kernels, row, vec_max(d->kernels, row, seen), seen);
        vec_scale(d->kernels, row, 1 / sum, seen);
        memset(row + seen, 0, (s->columns - seen) * sizeof *row);
    }
}

void TRAIN(dense_attend)(TRAIN(dense) * d, size_t rows, const TRAIN(qkv) * in, real *out)
{
    const size_t D = d->D, group = d->heads / d->kv_heads, ld_out = d->heads * D;
    assert(rows <= d->rows_max);
    for (size_t h = 0; h < d->heads; h++) {
        const real *v = in->v + h / group * D;
        if (h % group == 0) turn_rows(d, d->keys, D, in->k + h / group * D, in->ld, 0, rows, false, 1);
        for (size_t first = 0; first < rows;) {
            const strip s = strip_of(d, first, rows);
            weigh_strip(d, &s, in->q + h * D, in->ld);
            gemm_nn(s.n, D, s.columns, d->scores, d->rows_max, v + s.lo * in->ld, in->ld, out + first * ld_out + h * D,
                    ld_out, false);
            first += s.n;
        }
    }
}

void TRAIN(dense_backward)(TRAIN(dense) * d, size_t rows, const TRAIN(qkv) * in, const real *dout, real *dq, real *dk,
                           real *dv)
{
    const size_t D = d->D, group = d->heads / d->kv_heads, ld = in->ld, ld_out = d->heads * D;
    assert(rows <= d->rows_max);
    for (size_t h = 0; h < d->heads; h++) {
        const size_t kv = h / group * D;
        if (h % group == 0) {
            turn_rows(d, d->keys, D, in->k + kv, ld, 0, rows, false, 1);
            for (size_t r = 0; r < rows; r++) memset(dv + r * ld + kv, 0, D * sizeof *dv);
            memset(d->dkeys, 0, rows * D * sizeof *d->dkeys);
        }
        for (size_t first = 0; first < rows;) {
            const strip s = strip_of(d, first, rows);
            const real *up = dout + first * ld_out + h * D;
            const size_t mine = s.own - s.lo, n_mine = s.columns - mine; /* columns of the own segment */
            weigh_strip(d, &s, in->q + h * D, ld);
            gemm_tn(n_mine, D, s.n, d->scores + mine, d->rows_max, up, ld_out, dv + s.own * ld + kv, ld, true);
            gemm_nt(s.n, s.columns, D, up, ld_out, in->v + s.lo * ld + kv, ld, d->dscores, d->rows_max);
            for (size_t r = 0; r < s.n; r++) { /* dL/dscore = weight (dL/dweight - their mean) */
                const real *w = d->scores + r * d->rows_max;
                real *u = d->dscores + r * d->rows_max;
                const real mean = vec_dot(d->kernels, w, u, s.columns);
                for (size_t i = 0; i < s.columns; i++) u[i] = w[i] * (u[i] - mean);
            }
            gemm_tn(n_mine, D, s.n, d->dscores + mine, d->rows_max, d->queries, D, d->dkeys + s.own * D, D, true);
            gemm_nn(s.n, D, s.columns, d->dscores, d->rows_max, d->keys + s.lo * D, D, d->dqueries, D, false);
            turn_rows(d, dq + first * ld + h * D, ld, d->dqueries, D, first, s.n, true, d->scale);
            first += s.n;
        }
        if ((h + 1) % group == 0) turn_rows(d, dk + kv, ld, d->dkeys, D, 0, rows, true, 1);
    }
}
