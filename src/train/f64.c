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
enum { GEMM_SCRATCH = 0 };

#include "body_softmax.h"

#include "body_attention.h"

#include "body_dense.h"

#include "body_model.h"
