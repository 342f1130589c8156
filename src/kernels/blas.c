/* blas.c - the one file that includes cblas.h. OpenBLAS runs on one thread: callers bring their own.
 *
 * OpenBLAS gives a processor newer than itself the kernels of an old one: 0.3.21 takes Emerald Rapids for a Prescott
 * of 2004, with a sixth of the speed of our own `product` there. Then the best table's products stand in for it. */
#include "kernels_internal.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <strings.h>

#include <cblas.h>

void dsyev_(const char *jobz, const char *uplo, const blasint *n, double *a, const blasint *lda, double *w,
            double *work, const blasint *lwork, blasint *info, size_t jobz_length, size_t uplo_length);

static const cairn_kernels *stand_in; /* NULL = OpenBLAS has kernels for this processor, or we have none */
static char words[80];                /* of cairn_kernels_words */

static void choose(void)
{
    static const char *const old[] = {"prescott",    "core2", "atom",    "penryn",       "dunnington", "nehalem",
                                      "sandybridge", "nano",  "opteron", "opteron_sse3", "barcelona",  "bobcat"};
    const cairn_kernels *best = cairn_kernels_best(); /* AVX2 at least, or the reference */
    const char *core = openblas_get_corename();
    openblas_set_num_threads(1);
    for (size_t i = 0; i < sizeof old / sizeof *old && best != &cairn_kernels_ref; i++)
        if (strcasecmp(core, old[i]) == 0) stand_in = best;
    snprintf(words, sizeof words, "%s, OpenBLAS's %.30s%s", best->name, core, stand_in != NULL ? " replaced" : "");
}

static void begin(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
}

const char *cairn_kernels_words(void)
{
    begin();
    return words;
}

/* C = (add ? C : 0) + A B^T by the stand-in: some columns of B^T at a time, turned on the stack. */
static void own_nt(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t ldb,
                   float *c, size_t ldc, bool add)
{
    enum { WIDE = 32, DEEP = 256 };
    _Alignas(64) float turned[DEEP * WIDE];
    for (size_t j = 0; j < n; j += WIDE)
        for (size_t l = 0; l < k; l += DEEP) {
            size_t wide = n - j < WIDE ? n - j : WIDE, deep = k - l < DEEP ? k - l : DEEP;
            stand_in->transpose(turned, WIDE, b + j * ldb + l, ldb, wide, deep);
            stand_in->product(m, wide, deep, a + l * col, row, col, turned, WIDE, c + j, ldc, add || l > 0);
        }
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
    if (stand_in != NULL) {
        const size_t row = ta == CblasNoTrans ? lda : 1, col = ta == CblasNoTrans ? 1 : lda;
        if (tb == CblasTrans)
            own_nt(m, n, k, a, row, col, b, ldb, c, ldc, add);
        else
            stand_in->product(m, n, k, a, row, col, b, ldb, c, ldc, add);
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

void cairn_gemm_nt_tiles(size_t tiles, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b,
                         size_t ldb, float *c, size_t ldc)
{
    begin();
    if (stand_in != NULL) m *= tiles, tiles = 1;
    for (size_t t = 0; t < tiles; t++) cairn_gemm_nt(m, n, k, a + t * m * lda, lda, b, ldb, c + t * m * ldc, ldc);
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
