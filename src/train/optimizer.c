/* optimizer.c - Muon for the matrices of the layers, AdamW for the rest, the pace of both.
 *
 * Muon (Jordan et al. 2024): the momentum of a matrix's gradient, brought near the closest matrix whose singular values
 * are 1 by five steps of X <- a X + (b X X^T + c (X X^T)^2) X. The polynomial raises small singular values fast and
 * leaves all of them within about [0.7, 1.2] instead of at 1, which is enough and saves steps. q, k and v are three
 * matrices, gate and up two, as the layout has them. AdamW: Loshchilov & Hutter 2019. */
#include "train_internal.h"

#include "kernels_internal.h"

#include <math.h>

enum { NEWTON_SCHULZ_STEPS = 5 };
enum { CHUNK = 1 << 16 }; /* numbers of the gradient to a partial sum: the norm does not depend on the threads */

void cairn_train_rates_init(cairn_train_rates *rates)
{
    *rates = (cairn_train_rates){.adam = 2e-3F,
                                 .muon = 0.02F,
                                 .beta1 = 0.9F,
                                 .beta2 = 0.95F,
                                 .eps = 1e-8F,
                                 .momentum = 0.95F,
                                 .decay = 0.05F,
                                 .clip = 1};
}

double cairn_train_pace(uint64_t step, uint64_t warmup, uint64_t steps, double floor)
{
    if (step < warmup) return (double)(step + 1) / (double)warmup;
    double done = steps > warmup ? (double)(step - warmup) / (double)(steps - warmup) : 1;
    return floor + (1 - floor) * 0.5 * (1 + cos(acos(-1.0) * fmin(done, 1)));
}

/* Numbers that orthogonalising a (rows, cols) matrix needs: X, the next X, two squares of the smaller side. */
static size_t scratch_of(const cairn_train_param *p)
{
    size_t small = p->rows < p->cols ? p->rows : p->cols;
    return 2 * (size_t)p->rows * p->cols + 2 * small * small + CAIRN_GEMM_SCRATCH;
}

static size_t chunks_of(const cairn_train_layout *layout)
{
    return (layout->total + CHUNK - 1) / CHUNK;
}

cairn_status cairn_train_optimizer_init(cairn_train_optimizer *opt, const cairn_train_layout *layout, cairn_pool *pool)
{
    size_t most = 0;
    *opt = (cairn_train_optimizer){.layout = layout, .pool = pool, .kernels = cairn_kernels_best()};
    for (size_t i = 0; i < layout->n_params; i++)
        if (layout->params[i].kind == CAIRN_TRAIN_MATRIX && scratch_of(&layout->params[i]) > most)
            most = scratch_of(&layout->params[i]);
    opt->scratch_each = (most + 15) / 16 * 16; /* no cache line is shared */
    opt->first = cairn_calloc(layout->total, sizeof *opt->first);
    opt->second = cairn_calloc(layout->total, sizeof *opt->second);
    opt->squares = cairn_alloc_array(chunks_of(layout), sizeof *opt->squares);
    size_t scratch;
    if (cairn_mul_size(opt->scratch_each, cairn_pool_size(pool), &scratch))
        opt->scratch = cairn_alloc_array(scratch, sizeof *opt->scratch);
    if (opt->first != NULL && opt->second != NULL && opt->squares != NULL && opt->scratch != NULL) return CAIRN_OK;
    cairn_train_optimizer_wipe(opt);
    return cairn_fail(CAIRN_NO_MEMORY, "moments of %zu parameters", layout->total);
}

void cairn_train_optimizer_wipe(cairn_train_optimizer *opt)
{
    cairn_free(opt->first);
    cairn_free(opt->second);
    cairn_free(opt->squares);
    cairn_free(opt->scratch);
    *opt = (cairn_train_optimizer){0};
}

/* In double and in one order, eight chains side by side: one chain waits four cycles for each addition. */
static double sum_of_squares(const float *x, size_t n)
{
    double sum[8] = {0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (size_t j = 0; j < 8; j++) sum[j] += (double)x[i + j] * (double)x[i + j];
    for (; i < n; i++) sum[0] += (double)x[i] * (double)x[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* C (n, n) = A B, known to be symmetric: columns in groups, from the group's first row down, and what lies above the
 * diagonal from below it. B's element (l, j) is at b[l * brow + j * bcol]. */
static void symmetric(const cairn_kernels *kn, size_t n, size_t k, const float *a, size_t lda, const float *b,
                      size_t brow, size_t bcol, float *c, float *scratch)
{
    enum { GROUP = 32 };
    for (size_t j = 0, wide; j < n; j += wide) {
        wide = n - j < GROUP ? n - j : GROUP;
        cairn_gemm(kn, n - j, wide, k, a + j * lda, lda, 1, b + j * bcol, brow, bcol, c + j * n + j, n, false, scratch);
        const size_t below = j + wide;
        kn->transpose(c + j * n + below, n, c + below * n + j, n, n - below, wide);
    }
}

/* x (rows, cols), rows <= cols, with its singular values brought near 1. x and next take turns; returns the last. */
static float *orthogonalise(const cairn_kernels *kn, float *x, float *next, size_t rows, size_t cols, float *scratch)
{
    static const float a = 3.4445F, b = -4.7750F, c = 2.0315F;
    const size_t n = rows * cols;
    float *gram = scratch, *poly = gram + rows * rows, *panels = poly + rows * rows;
    const float scale =
        (float)(1 / (sqrt(sum_of_squares(x, n)) + 1e-7)); /* no singular value is above 1 then; 0 stays 0 */
    kn->scale(x, scale, n);
    for (int step = 0; step < NEWTON_SCHULZ_STEPS; step++) {
        symmetric(kn, rows, cols, x, cols, x, 1, cols, gram, panels);
        symmetric(kn, rows, rows, gram, rows, gram, rows, 1, poly, panels);
        for (size_t i = 0; i < rows * rows; i++) poly[i] = b * gram[i] + c * poly[i];
        for (size_t i = 0; i < rows; i++) poly[i * rows + i] += a;
        cairn_gemm(kn, rows, cols, rows, poly, rows, 1, x, cols, 1, next, cols, false, panels);
        float *swap = x;
        x = next;
        next = swap;
    }
    return x;
}

/* ---- one update ---- */

typedef struct update {
    cairn_train_optimizer *opt;
    const cairn_train_rates *rates;
    double pace;
    float down; /* clips the gradient */
    float *params;
    const float *grads;
} update;

/* A tall matrix is orthogonalised lying down, so that the square is of the smaller side. */
static void muon(const update *u, const cairn_train_param *p, float *scratch)
{
    const cairn_kernels *kn = u->opt->kernels;
    const size_t rows = p->rows, cols = p->cols, n = rows * cols;
    const bool tall = rows > cols;
    const float rate = (float)(u->pace * (double)u->rates->muon), beta = u->rates->momentum, down = u->down;
    const float step = rate * (tall ? sqrtf((float)rows / (float)cols) : 1);
    const float keep = 1 - rate * u->rates->decay;
    const float *restrict g = u->grads + p->at;
    float *restrict w = u->params + p->at, *restrict momentum = u->opt->first + p->at;
    float *x = scratch, *other = x + n;
    for (size_t i = 0; i < n; i++) {
        momentum[i] = beta * momentum[i] + down * g[i];
        x[i] = down * g[i] + beta * momentum[i]; /* Nesterov: one step ahead */
    }
    if (tall) {
        kn->transpose(other, rows, x, cols, rows, cols);
        x = other;
        other = scratch;
    }
    const float *made = orthogonalise(kn, x, other, tall ? cols : rows, tall ? rows : cols, scratch + 2 * n);
    if (tall) {
        float *upright = made == scratch ? scratch + n : scratch;
        kn->transpose(upright, cols, made, rows, cols, rows);
        made = upright;
    }
    for (size_t i = 0; i < n; i++) w[i] = w[i] * keep - step * made[i];
}

static void adamw(const update *u, const cairn_train_param *p)
{
    const cairn_train_rates *rates = u->rates;
    const bool decays = p->kind != CAIRN_TRAIN_NORM && p->kind != CAIRN_TRAIN_LANDMARK_BIAS;
    const size_t n = (size_t)p->rows * p->cols;
    const double rate = u->pace * (double)rates->adam, updates = (double)u->opt->updates;
    const float keep = decays ? (float)(1 - rate * (double)rates->decay) : 1;
    /* both means start at 0: what they lack of the gradient's size after t updates is 1 - beta^t */
    const float step = (float)(rate / (1 - pow((double)rates->beta1, updates)));
    const float root = (float)sqrt(1 - pow((double)rates->beta2, updates));
    const float beta1 = rates->beta1, beta2 = rates->beta2, eps = rates->eps, down = u->down;
    const float *restrict grads = u->grads + p->at;
    float *restrict w = u->params + p->at;
    float *restrict first = u->opt->first + p->at, *restrict second = u->opt->second + p->at;
    for (size_t i = 0; i < n; i++) {
        const float g = down * grads[i];
        first[i] = beta1 * first[i] + (1 - beta1) * g;
        second[i] = beta2 * second[i] + (1 - beta2) * g * g;
        w[i] = w[i] * keep - step * first[i] / (sqrtf(second[i]) / root + eps);
    }
}

/* A parameter is one item: it reads and writes its own numbers, so threads change no bit. */
static void update_item(void *arg, size_t item, size_t worker)
{
    const update *u = arg;
    const cairn_train_param *p = &u->opt->layout->params[item];
    if (p->kind == CAIRN_TRAIN_MATRIX && u->rates->muon > 0)
        muon(u, p, u->opt->scratch + worker * u->opt->scratch_each);
    else
        adamw(u, p);
}

static void square_item(void *arg, size_t item, size_t worker)
{
    const update *u = arg;
    const size_t from = item * CHUNK, left = u->opt->layout->total - from;
    (void)worker;
    u->opt->squares[item] = sum_of_squares(u->grads + from, left < CHUNK ? left : CHUNK);
}

cairn_status cairn_train_update(cairn_train_optimizer *opt, const cairn_train_rates *rates, double pace, float *params,
                                const float *grads, double *norm)
{
    update u = {opt, rates, pace, 1, params, grads};
    const size_t chunks = chunks_of(opt->layout);
    double square = 0;
    cairn_pool_run(opt->pool, chunks, square_item, &u);
    for (size_t i = 0; i < chunks; i++) square += opt->squares[i];
    *norm = sqrt(square);
    if (!isfinite(*norm))
        return cairn_fail(CAIRN_INVALID, "the gradient of update %llu is not finite", (unsigned long long)opt->updates);
    if (rates->clip > 0 && *norm > (double)rates->clip) u.down = (float)((double)rates->clip / *norm);
    opt->updates++;
    cairn_pool_run(opt->pool, opt->layout->n_params, update_item, &u);
    return CAIRN_OK;
}
