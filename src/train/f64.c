/* f64.c - the bodies in double and plain loops: the witness of f32.c. Never fast, never used to train. */
#include "train_internal.h"

#include <assert.h>
#include <math.h>

#define real        double
#define TRAIN(name) cairn_train_##name##_f64

typedef const void *kernels_of_real; /* there are none */
#define best_kernels() NULL

static double vec_dot(kernels_of_real kn, const double *a, const double *b, size_t n)
{
    double sum = 0.0;
    (void)kn;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}
static void vec_scale(kernels_of_real kn, double *x, double a, size_t n)
{
    (void)kn;
    for (size_t i = 0; i < n; i++) x[i] *= a;
}
static double vec_max(kernels_of_real kn, const double *x, size_t n)
{
    double max = -INFINITY;
    (void)kn;
    for (size_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
}
static double vec_exp(kernels_of_real kn, double *x, double shift, size_t n)
{
    double sum = 0.0;
    (void)kn;
    for (size_t i = 0; i < n; i++) sum += x[i] = exp(x[i] - shift);
    return sum;
}

static void vec_norm(kernels_of_real kn, double *out, const double *x, const double *weight, size_t n, float eps)
{
    const double s = 1 / sqrt(vec_dot(kn, x, x, n) / (double)n + (double)eps);
    for (size_t i = 0; i < n; i++) out[i] = x[i] * s * weight[i];
}
static void vec_norm_backward(kernels_of_real kn, double *dx, double *dweight, const double *x, const double *weight,
                              const double *dy, size_t n, float eps, bool add)
{
    const double s = 1 / sqrt(vec_dot(kn, x, x, n) / (double)n + (double)eps);
    double shared = 0;
    for (size_t i = 0; i < n; i++) shared += weight[i] * dy[i] * x[i] * s * s / (double)n;
    for (size_t i = 0; i < n; i++) {
        const double d = dy[i];
        dweight[i] += s * d * x[i];
        dx[i] = (add ? dx[i] : 0) + s * (weight[i] * d - x[i] * shared);
    }
}
static void vec_swiglu(kernels_of_real kn, double *out, const double *gate, const double *up, size_t n)
{
    (void)kn;
    for (size_t i = 0; i < n; i++) out[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
}
static void vec_swiglu_backward(kernels_of_real kn, double *out, double *dgate, double *dup, const double *dout,
                                const double *gate, const double *up, size_t n)
{
    (void)kn;
    for (size_t i = 0; i < n; i++) { /* silu(g)' = s (1 + g (1 - s)), s = sigmoid(g) */
        const double s = 1 / (1 + exp(-gate[i])), silu = gate[i] * s;
        out[i] = silu * up[i];
        dgate[i] = dout[i] * up[i] * (s + silu * (1 - s));
        dup[i] = dout[i] * silu;
    }
}
static void vec_rotate(kernels_of_real kn, double *out, const double *x, const double *cos, const double *sin, size_t n,
                       bool interleaved)
{
    (void)kn;
    for (size_t i = 0; i < n / 2; i++) {
        const size_t one = interleaved ? 2 * i : i, two = interleaved ? one + 1 : i + n / 2;
        const double a = x[one], b = x[two];
        out[one] = a * cos[i] - b * sin[i];
        out[two] = b * cos[i] + a * sin[i];
    }
}
static void vec_transpose(kernels_of_real kn, double *out, size_t ld_out, const double *x, size_t ld, size_t rows,
                          size_t cols)
{
    (void)kn;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) out[c * ld_out + r] = x[r * ld + c];
}
static void vec_matvec(kernels_of_real kn, double *y, const double *x, size_t D, size_t n, const double *w)
{
    for (size_t i = 0; i < n; i++) y[i] = vec_dot(kn, x + i * D, w, D);
}
static void vec_row_softmax(kernels_of_real kn, double *x, size_t ld, size_t rows, size_t n, bool causal,
                            const double *weights, double *lse)
{
    for (size_t r = 0; r < rows; r++, x += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n;
        const double max = vec_max(kn, x, sees), sum = vec_exp(kn, x, max, sees);
        if (lse != NULL) lse[r] = max + log(sum); /* -inf of nothing */
        vec_scale(kn, x, (weights != NULL ? weights[r] : 1) / sum, sees);
        for (size_t i = sees; i < n; i++) x[i] = 0;
    }
}
static void vec_row_softmax_backward(kernels_of_real kn, double *p, double *u, size_t ld, size_t rows, size_t n,
                                     bool causal, const double *weights, double *means, bool known)
{
    for (size_t r = 0; r < rows; r++, p += ld, u += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n;
        if (!known) means[r] = vec_dot(kn, p, u, sees);
        for (size_t i = 0; i < n; i++) {
            if (i < sees) p[i] *= weights[r];
            u[i] = i < sees ? p[i] * (u[i] - means[r]) : 0;
        }
    }
}

/* c (m, n) = (add ? c : 0) + a b; a's element (i, l) is at i * row + l * col, b's (l, j) at l * brow + j * bcol */
static void gemm(kernels_of_real kn, size_t m, size_t n, size_t k, const double *a, size_t row, size_t col,
                 const double *b, size_t brow, size_t bcol, double *c, size_t ldc, bool add, double *scratch)
{
    (void)kn, (void)scratch;
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double sum = add ? c[i * ldc + j] : 0.0;
            for (size_t l = 0; l < k; l++) sum += a[i * row + l * col] * b[l * brow + j * bcol];
            c[i * ldc + j] = sum;
        }
    }
}
#define gemm_nt(m, n, k, a, lda, b, ldb, c, ldc)      gemm(NULL, m, n, k, a, lda, 1, b, 1, ldb, c, ldc, false, NULL)
#define gemm_nn(m, n, k, a, lda, b, ldb, c, ldc, add) gemm(NULL, m, n, k, a, lda, 1, b, ldb, 1, c, ldc, add, NULL)
#define gemm_tn(m, n, k, a, lda, b, ldb, c, ldc, add) gemm(NULL, m, n, k, a, 1, lda, b, ldb, 1, c, ldc, add, NULL)
#define product(kn, m, n, k, a, row, col, b, ldb, c, ldc, add)                                                         \
    gemm(kn, m, n, k, a, row, col, b, ldb, 1, c, ldc, add, NULL)
enum { GEMM_SCRATCH = 0 };

#include "body_softmax.h"

#include "body_attention.h"

#include "body_guide.h"

#include "body_attend.h"

#include "body_dense.h"

#include "body_model.h"
