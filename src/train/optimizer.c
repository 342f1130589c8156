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

/* Numbers that orthogonalising a (rows, cols) matrix needs: X, the next X, and two
 * squares of the smaller side. */
static size_t scratch_of(const cairn_train_param *p)
{
    size_t small = p->rows < p->cols ? p->rows : p->cols;
    return 2 * (size_t)p->rows * p->cols + 2 * small * small;
}

cairn_status cairn_train_optimizer_init(cairn_train_optimizer *opt, const cairn_train_layout *layout)
{
    size_t most = 0;
    *opt = (cairn_train_optimizer){.layout = layout};
    for (size_t i = 0; i < layout->n_params; i++)
        if (layout->params[i].kind == CAIRN_TRAIN_MATRIX && scratch_of(&layout->params[i]) > most)
            most = scratch_of(&layout->params[i]);
    opt->first = cairn_calloc(layout->total, sizeof *opt->first);
    opt->second = cairn_calloc(layout->total, sizeof *opt->second);
    opt->scratch = cairn_alloc_array(most, sizeof *opt->scratch);
    if (opt->first != NULL && opt->second != NULL && opt->scratch != NULL) return CAIRN_OK;
    cairn_train_optimizer_wipe(opt);
    return cairn_fail(CAIRN_NO_MEMORY, "moments of %zu parameters", layout->total);
}

void cairn_train_optimizer_wipe(cairn_train_optimizer *opt)
{
    cairn_free(opt->first);
    cairn_free(opt->second);
    cairn_free(opt->scratch);
    *opt = (cairn_train_optimizer){0};
}

/* x (rows, cols) with its singular values brought near 1. The square is of the smaller side: X X^T, or X^T X. */
static void orthogonalise(float *x, size_t rows, size_t cols, float *scratch)
{
    static const float a = 3.4445F, b = -4.7750F, c = 2.0315F;
    const bool wide = rows <= cols;
    const size_t n = rows * cols, small = wide ? rows : cols;
    float *gram = scratch, *poly = gram + small * small, *next = poly + small * small;
    double square = 0;
    for (size_t i = 0; i < n; i++) square += (double)x[i] * (double)x[i];
    const float scale = (float)(1 / (sqrt(square) + 1e-7)); /* no singular value is above 1 then; 0 stays 0 */
    for (size_t i = 0; i < n; i++) x[i] *= scale;
    for (int step = 0; step < NEWTON_SCHULZ_STEPS; step++) {
        if (wide)
            cairn_gemm_nt(small, small, cols, x, cols, x, cols, gram, small);
        else
            cairn_gemm_tn(small, small, rows, x, cols, x, cols, gram, small, false);
        cairn_gemm_nn(small, small, small, gram, small, gram, small, poly, small, false);
        for (size_t i = 0; i < small * small; i++) poly[i] = b * gram[i] + c * poly[i];
        if (wide)
            cairn_gemm_nn(rows, cols, small, poly, small, x, cols, next, cols, false);
        else
            cairn_gemm_nn(rows, cols, small, x, cols, poly, small, next, cols, false);
        for (size_t i = 0; i < n; i++) x[i] = a * x[i] + next[i];
    }
}

static void muon(const cairn_train_param *p, const cairn_train_rates *rates, double pace, float *w, const float *g,
                 float *momentum, float *scratch)
{
    const size_t rows = p->rows, cols = p->cols, n = rows * cols;
    const float rate = (float)(pace * (double)rates->muon), beta = rates->momentum;
    const float step = rate * (rows > cols ? sqrtf((float)rows / (float)cols) : 1);
    float *x = scratch;
    for (size_t i = 0; i < n; i++) {
        momentum[i] = beta * momentum[i] + g[i];
        x[i] = g[i] + beta * momentum[i]; /* Nesterov: one step ahead */
    }
    orthogonalise(x, rows, cols, scratch + n);
    for (size_t i = 0; i < n; i++) w[i] = w[i] * (1 - rate * rates->decay) - step * x[i];
}

static void adamw(const cairn_train_param *p, const cairn_train_rates *rates, double pace, uint64_t updates, float *w,
                  const float *g, float *first, float *second)
{
    const bool decays = p->kind != CAIRN_TRAIN_NORM && p->kind != CAIRN_TRAIN_LANDMARK_BIAS;
    const size_t n = (size_t)p->rows * p->cols;
    const double rate = pace * (double)rates->adam;
    const float keep = decays ? (float)(1 - rate * (double)rates->decay) : 1;
    /* both means start at 0: what they lack of the gradient's size after t updates is 1 - beta^t */
    const float step = (float)(rate / (1 - pow((double)rates->beta1, (double)updates)));
    const float root = (float)sqrt(1 - pow((double)rates->beta2, (double)updates));
    for (size_t i = 0; i < n; i++) {
        first[i] = rates->beta1 * first[i] + (1 - rates->beta1) * g[i];
        second[i] = rates->beta2 * second[i] + (1 - rates->beta2) * g[i] * g[i];
        w[i] = w[i] * keep - step * first[i] / (sqrtf(second[i]) / root + rates->eps);
    }
}

cairn_status cairn_train_update(cairn_train_optimizer *opt, const cairn_train_rates *rates, double pace, float *params,
                                float *grads, double *norm)
{
    const cairn_train_layout *t = opt->layout;
    double square = 0;
    for (size_t i = 0; i < t->total; i++) square += (double)grads[i] * (double)grads[i];
    *norm = sqrt(square);
    if (!isfinite(*norm))
        return cairn_fail(CAIRN_INVALID, "the gradient of update %llu is not finite", (unsigned long long)opt->updates);
    if (rates->clip > 0 && *norm > (double)rates->clip) {
        const float down = (float)((double)rates->clip / *norm);
        for (size_t i = 0; i < t->total; i++) grads[i] *= down;
    }
    opt->updates++;
    for (size_t i = 0; i < t->n_params; i++) {
        const cairn_train_param *p = &t->params[i];
        float *w = params + p->at, *first = opt->first + p->at;
        if (p->kind == CAIRN_TRAIN_MATRIX && rates->muon > 0)
            muon(p, rates, pace, w, grads + p->at, first, opt->scratch);
        else
            adamw(p, rates, pace, opt->updates, w, grads + p->at, first, opt->second + p->at);
    }
    return CAIRN_OK;
}
