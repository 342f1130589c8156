/* blas.c - the one file that includes cblas.h. OpenBLAS runs on one thread: callers bring their own. */
#include "kernels_internal.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>

#include <cblas.h>

void dsyev_(const char *jobz, const char *uplo, const blasint *n, double *a, const blasint *lda, double *w,
            double *work, const blasint *lwork, blasint *info, size_t jobz_length, size_t uplo_length);

static void one_thread(void)
{
    openblas_set_num_threads(1);
}

static void begin(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, one_thread);
}

/* C = (add ? C : 0) + op(A) op(B); rows and columns of op(A) are m and k, of op(B) k and n. */
static void gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, size_t m, size_t n, size_t k, const float *a, size_t lda,
                 const float *b, size_t ldb, float *c, size_t ldc, bool add)
{
    assert(m <= INT_MAX && n <= INT_MAX && k <= INT_MAX);
    assert(lda >= (ta == CblasNoTrans ? k : m) && lda <= INT_MAX);
    assert(ldb >= (tb == CblasNoTrans ? n : k) && ldb <= INT_MAX);
    assert(ldc >= n && ldc <= INT_MAX);
    begin();
    if (m == 0 || n == 0) return;
    if (k == 0) { /* an empty sum; BLAS wants leading dimensions of at least 1 */
        for (size_t i = 0; i < m && !add; i++) memset(c + i * ldc, 0, n * sizeof *c);
        return;
    }
    cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, 1.0f, a, (blasint)lda, b, (blasint)ldb,
                add ? 1.0f : 0.0f, c, (blasint)ldc);
}

void cairn_gemm(const cairn_kernels *kernels, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                const float *b, size_t brow, size_t bcol, float *c, size_t ldc, bool add, float *scratch)
{
    if (kernels != &cairn_kernels_ref)
        kernels->gemm(m, n, k, a, row, col, b, brow, bcol, c, ldc, add, scratch);
    else /* a single row may come with any step to the next */
        gemm(col == 1 ? CblasNoTrans : CblasTrans, bcol == 1 ? CblasNoTrans : CblasTrans, m, n, k, a,
             col != 1  ? col
             : row > k ? row
                       : k,
             b,
             bcol != 1  ? bcol
             : brow > n ? brow
                        : n,
             c, ldc, add);
}

void cairn_product(const cairn_kernels *kernels, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                   const float *b, size_t ldb, float *c, size_t ldc, bool add)
{
    if (kernels != &cairn_kernels_ref)
        kernels->product(m, n, k, a, row, col, b, ldb, c, ldc, add);
    else
        cairn_gemm(kernels, m, n, k, a, row, col, b, ldb, 1, c, ldc, add, NULL);
}

void cairn_gemm_nt(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc)
{
    gemm(CblasNoTrans, CblasTrans, m, n, k, a, lda, b, ldb, c, ldc, false);
}

void cairn_gemm_nn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc, bool add)
{
    gemm(CblasNoTrans, CblasNoTrans, m, n, k, a, lda, b, ldb, c, ldc, add);
}

void cairn_gemm_tn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc, bool add)
{
    gemm(CblasTrans, CblasNoTrans, m, n, k, a, lda, b, ldb, c, ldc, add);
}

bool cairn_eigen(size_t n, double *a, double *values, double *work)
{
    assert(n > 0 && n <= INT_MAX / CAIRN_EIGEN_WORK);
    blasint size = (blasint)n;
    blasint works = CAIRN_EIGEN_WORK * size;
    blasint info = 0;
    for (size_t i = 0; i < n * n; i++)
        if (!isfinite(a[i])) return false; /* dsyev may not come back */
    begin();
    dsyev_("V", "U", &size, a, &size, values, work, &works, &info, 1, 1);
    return info == 0;
}
