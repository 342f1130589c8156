/* body_softmax.h - one row of grouped softmax, forward and backward, and the same over whole score matrices.
 *
 * A row sees `blocks` past blocks and its own tokens. Past block b has tokens [begin(b), ends[b]) and its landmark at
 * slot ends[b], where begin(b) is one past the landmark before. The block is one virtual key: its logit z_b is the
 * landmark's score plus the bias, its value the softmax r_b over its tokens. Own tokens and all z_b share one softmax
 * S: weight of an own token j       S_j weight of a token j of block b S_b r_b,j        (a landmark's own value has
 * none) With u_j = dL/dweight_j, u_b = sum_j r_b,j u_j and u = sum_own S_j u_j + sum_b S_b u_b: dL/dscore_j = S_j (u_j
 * - u)    dL/dz_b = S_b (u_b - u)    dL/dy_b,j = S_b r_b,j (u_j - u_b)
 */

typedef struct group_row {
    const uint32_t *ends; /* (blocks) */
    size_t blocks;
    size_t begin, end; /* own tokens */
} group_row;

static size_t block_begin(const group_row *g, size_t b)
{
    return b == 0 ? 0 : (size_t)g->ends[b - 1] + 1;
}

/* s: scores in; out S_j of own tokens, r_b,j of the others. gates (blocks): S_b. Landmark slots become 0. Each softmax
 * is taken relative to its own maximum, which cancels. Returns ln Z of the group of own tokens and z_b. */
static real row_forward(kernels_of_real kn, const group_row *g, real bias, real *s, real *gates)
{
    for (size_t b = 0; b < g->blocks; b++) {
        size_t begin = block_begin(g, b), n = g->ends[b] - begin;
        gates[b] = s[g->ends[b]] + bias;
        s[g->ends[b]] = 0;
        if (n == 0) continue; /* an empty block: its gate has nothing to give */
        real sum = vec_exp(kn, s + begin, vec_max(kn, s + begin, n), n);
        vec_scale(kn, s + begin, 1 / sum, n);
    }
    size_t own = g->end - g->begin;
    if (own + g->blocks == 0) return -INFINITY;
    real max_own = vec_max(kn, s + g->begin, own), max_gate = vec_max(kn, gates, g->blocks);
    real max = max_own > max_gate ? max_own : max_gate;
    real sum = vec_exp(kn, s + g->begin, max, own) + vec_exp(kn, gates, max, g->blocks);
    vec_scale(kn, s + g->begin, 1 / sum, own);
    vec_scale(kn, gates, 1 / sum, g->blocks);
    return max + (real)log((double)sum);
}

/* s, gates as row_forward left them; u: dL/dweight in, dL/dscore out, at landmark slots dL/dz_b. `means` (blocks) is
 * scratch. Returns sum_b dL/dz_b, the gradient of the bias. */
static real row_backward(kernels_of_real kn, const group_row *g, const real *s, const real *gates, real *u, real *means)
{
    real total = vec_dot(kn, s + g->begin, u + g->begin, g->end - g->begin);
    real dbias = 0;
    for (size_t b = 0; b < g->blocks; b++) {
        size_t begin = block_begin(g, b);
        means[b] = vec_dot(kn, s + begin, u + begin, g->ends[b] - begin);
    }
    total += vec_dot(kn, gates, means, g->blocks);
    for (size_t b = 0; b < g->blocks; b++) {
        for (size_t j = block_begin(g, b); j < g->ends[b]; j++) u[j] = gates[b] * s[j] * (u[j] - means[b]);
        dbias += u[g->ends[b]] = gates[b] * (means[b] - total);
    }
    for (size_t j = g->begin; j < g->end; j++) u[j] = s[j] * (u[j] - total);
    return dbias;
}

/* r_b,j to weights S_b r_b,j. */
static void row_weights(kernels_of_real kn, const group_row *g, real *s, const real *gates)
{
    for (size_t b = 0; b < g->blocks; b++) {
        size_t begin = block_begin(g, b);
        vec_scale(kn, s + begin, gates[b], g->ends[b] - begin);
    }
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
        row_forward(kn, &g, bias, w, walk.gates);
        row_weights(kn, &g, w, walk.gates);
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
        row_forward(kn, &g, bias, s, walk.gates);
        *dbias += row_backward(kn, &g, s, walk.gates, u, walk.means);
    }
    cairn_free(s);
    walk_end(&walk);
    return st;
}
