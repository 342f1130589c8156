/* body_softmax.h - grouped softmax: the gates of rows, and all of it over whole score matrices.
 *
 * A row sees `blocks` past blocks and its own tokens. Past block b has tokens [begin(b), ends[b]) and its landmark at
 * slot ends[b], where begin(b) is one past the landmark before. The block is one virtual key: its logit z_b is the
 * landmark's score plus the bias, its value the softmax r_b over its tokens. Own tokens and all z_b share one softmax
 * S: the own tokens are a group as well, r over them and S_own of all, with logit ln sum exp of their scores. The
 * weight of token j of a group is S r_j; a landmark's own value has none. With u_j = dL/dweight_j, u_b = sum_j r_b,j
 * u_j and u = sum over groups of S u_b:
 *     past blocks     dL/dy_b,j = S_b r_b,j (u_j - u_b)     dL/dz_b = S_b (u_b - u)
 *     own tokens      dL/dscore_j = S_own r_j (u_j - u)
 */

/* Of n rows: own (n) and gates (blocks, n; rows ld apart) from logits to shares of one softmax, lnz (n) the log of its
 * sum. A row without any key gets zeros. */
static void gate_softmax(kernels_of_real kn, size_t n, size_t blocks, size_t ld, real *own, real *gates, real *lnz)
{
    real *max = lnz; /* until the sums are known */
    for (size_t j = 0; j < n; j++) max[j] = own[j];
    for (size_t b = 0; b < blocks; b++)
        for (size_t j = 0; j < n; j++) max[j] = gates[b * ld + j] > max[j] ? gates[b * ld + j] : max[j];
    for (size_t b = 0; b <= blocks; b++) {
        real *z = b < blocks ? gates + b * ld : own;
        for (size_t j = 0; j < n; j++) z[j] = max[j] > -INFINITY ? z[j] - max[j] : -INFINITY;
        vec_exp(kn, z, 0, n);
    }
    for (size_t j = 0; j < n; j++) {
        real sum = own[j];
        for (size_t b = 0; b < blocks; b++) sum += gates[b * ld + j];
        const real share = sum > 0 ? 1 / sum : 0;
        own[j] *= share;
        for (size_t b = 0; b < blocks; b++) gates[b * ld + j] *= share;
        lnz[j] = max[j] + (real)log((double)sum);
    }
}

typedef struct group_row {
    const uint32_t *ends; /* (blocks) */
    size_t blocks;
    size_t begin, end; /* own tokens */
} group_row;

static size_t block_begin(const group_row *g, size_t b)
{
    return b == 0 ? 0 : (size_t)g->ends[b - 1] + 1;
}

/* s: scores in, r of each group out, 0 at landmarks; gates (blocks). Returns S_own. */
static real row_forward(kernels_of_real kn, const group_row *g, real bias, real *s, real *gates)
{
    real own, lnz;
    for (size_t b = 0; b < g->blocks; b++) {
        size_t begin = block_begin(g, b), n = g->ends[b] - begin;
        gates[b] = s[g->ends[b]] + bias;
        s[g->ends[b]] = 0;
        vec_row_softmax(kn, s + begin, n, 1, n, false, NULL, NULL); /* none: the gate has nothing to give */
    }
    const size_t n = g->end - g->begin;
    vec_row_softmax(kn, s + g->begin, n, 1, n, false, NULL, &own);
    gate_softmax(kn, 1, g->blocks, 1, &own, gates, &lnz);
    return own;
}

/* s, gates, own as row_forward left them; u: dL/dweight in, dL/dscore out, at landmark slots dL/dz_b. `means` (blocks)
 * is scratch. Returns sum_b dL/dz_b, the gradient of the bias. */
static real row_backward(kernels_of_real kn, const group_row *g, real *s, const real *gates, real own, real *u,
                         real *means)
{
    const size_t n_own = g->end - g->begin;
    real total = own * vec_dot(kn, s + g->begin, u + g->begin, n_own), dbias = 0;
    for (size_t b = 0; b < g->blocks; b++) {
        size_t begin = block_begin(g, b), n = g->ends[b] - begin;
        vec_row_softmax_backward(kn, s + begin, u + begin, n, 1, n, false, gates + b, means + b, false);
        total += gates[b] * means[b];
    }
    for (size_t b = 0; b < g->blocks; b++) dbias += u[g->ends[b]] = gates[b] * (means[b] - total);
    vec_row_softmax_backward(kn, s + g->begin, u + g->begin, n_own, 1, n_own, false, &own, &total, true);
    return dbias;
}

/* ---- over a matrix of scores ---- */

typedef struct group_walk { /* goes down the rows of a window */
    uint32_t *ends;         /* (rows) landmarks so far */
    real *gates;            /* (rows) */
    real *means;            /* (rows) */
} group_walk;

static cairn_status walk_begin(group_walk *walk, size_t rows)
{
    assert(rows <= UINT32_MAX);
    walk->ends = cairn_alloc_array(rows, sizeof *walk->ends);
    walk->gates = cairn_alloc_array(rows, sizeof *walk->gates);
    walk->means = cairn_alloc_array(rows, sizeof *walk->means);
    if (walk->ends != NULL && walk->gates != NULL && walk->means != NULL) return CAIRN_OK;
    return cairn_fail(CAIRN_NO_MEMORY, "grouped softmax of %zu rows", rows);
}
static void walk_end(group_walk *walk)
{
    cairn_free(walk->ends);
    cairn_free(walk->gates);
    cairn_free(walk->means);
}

/* Row i of *g, which holds row i - 1; a landmark belongs to the block it closes and does not see itself. */
static void walk_row(group_walk *walk, const uint8_t *is_landmark, size_t i, group_row *g)
{
    if (i > 0 && is_landmark[i - 1] != 0) {
        walk->ends[g->blocks++] = (uint32_t)(i - 1);
        g->begin = i;
    }
    g->end = is_landmark[i] != 0 ? i : i + 1;
}

cairn_status TRAIN(grouped_softmax)(const real *scores, const uint8_t *is_landmark, size_t rows, real bias,
                                    real *weights)
{
    kernels_of_real kn = best_kernels();
    group_walk walk = {0};
    cairn_status st = walk_begin(&walk, rows);
    group_row g = {.ends = walk.ends};
    for (size_t i = 0; i < rows && st == CAIRN_OK; i++) {
        real *w = weights + i * rows;
        walk_row(&walk, is_landmark, i, &g);
        memcpy(w, scores + i * rows, g.end * sizeof *w);
        memset(w + g.end, 0, (rows - g.end) * sizeof *w);
        const real own = row_forward(kn, &g, bias, w, walk.gates);
        for (size_t b = 0; b < g.blocks; b++)
            vec_scale(kn, w + block_begin(&g, b), walk.gates[b], g.ends[b] - block_begin(&g, b));
        vec_scale(kn, w + g.begin, own, g.end - g.begin);
    }
    walk_end(&walk);
    return st;
}

cairn_status TRAIN(grouped_softmax_backward)(const real *scores, const uint8_t *is_landmark, size_t rows, real bias,
                                             const real *dweights, real *dscores, real *dbias)
{
    kernels_of_real kn = best_kernels();
    group_walk walk = {0};
    cairn_status st = walk_begin(&walk, rows);
    group_row g = {.ends = walk.ends};
    real *s = cairn_alloc_array(rows, sizeof *s);
    if (st == CAIRN_OK && s == NULL) st = cairn_fail(CAIRN_NO_MEMORY, "grouped softmax of %zu rows", rows);
    *dbias = 0;
    for (size_t i = 0; i < rows && st == CAIRN_OK; i++) {
        real *u = dscores + i * rows;
        walk_row(&walk, is_landmark, i, &g);
        memcpy(s, scores + i * rows, g.end * sizeof *s);
        memcpy(u, dweights + i * rows, g.end * sizeof *u);
        memset(u + g.end, 0, (rows - g.end) * sizeof *u);
        const real own = row_forward(kn, &g, bias, s, walk.gates);
        *dbias += row_backward(kn, &g, s, walk.gates, own, u, walk.means);
    }
    cairn_free(s);
    walk_end(&walk);
    return st;
}
