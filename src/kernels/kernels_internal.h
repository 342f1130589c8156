/* kernels_internal.h - arithmetic: one table of plain loops (the definition of right) and faster twins
 * chosen at run time; behind a second door, OpenBLAS.
 *
 * Chunk invariance: the result for one row (one query, one tile, one weight row) never depends, in any bit, on
 * how many other rows are in the call. Prefill in chunks of any size, with any number of threads, then gives the
 * same bits; sessions build on that. Between tables results differ by rounding, within the bounds tests state.
 * Integer work (the int8 scan) is identical in every table.
 *
 * All pointers may be unaligned and all lengths odd; dims of 1..1024 work, multiples of 16 are fast.
 */
#ifndef CAIRN_KERNELS_INTERNAL_H
#define CAIRN_KERNELS_INTERNAL_H

#include "base_internal.h"

/* K and V of one block, one layer, one KV head, as stored. Mirrors cairn_tile_view without the store. */
typedef struct cairn_tile {
    cairn_dtype dtype;
    uint32_t tokens;           /* T */
    uint32_t head_dim;         /* D */
    const void *keys;          /* (T, D) */
    const void *values;        /* (T, D) */
    const float *key_scales;   /* (D), q8 only */
    const float *value_scales; /* (T), q8 only */
    /* For tile_attend: the tiles that are attended to right after this one and some tiles from now, of the same shape,
     * whose bytes are asked for while this one is used (NULL: not known), and whether this one's were so. None of the
     * three changes a result. */
    const struct cairn_tile *next, *later;
    bool coming;
} cairn_tile;

/* Weight matrices as GGUF stores them, row-major (rows, cols). */
typedef enum cairn_wtype {
    CAIRN_W_F32,
    CAIRN_W_F16,
    CAIRN_W_BF16,
    CAIRN_W_Q8_0 /* blocks of 32: f16 scale, 32 int8; 34 bytes */
} cairn_wtype;
size_t cairn_wtype_row_bytes(cairn_wtype type, size_t cols); /* 0 if cols does not fit the type */

/* What scan_round says of its values v: exact sums of v and v v (below 2^24), and in f32 that of (x - center - scale
 * v)^2.
 */
typedef struct cairn_scan_rounded {
    int32_t sum;
    float squares, left;
} cairn_scan_rounded;

enum { CAIRN_SCAN_GROUP = 16 }; /* rows interleaved in the int8 scan */
enum {
    CAIRN_SKETCH_BLOCK = 64,           /* rows interleaved in a sketch */
    CAIRN_SKETCH_ANY_SUM = 127 * 1024, /* of a query: no limit */
};
/* Where the first four dims of a row are; the next four are 64 bytes on. */
static inline size_t cairn_sketch_at(size_t row, size_t dim)
{
    return row / 64 * 64 * dim + row / 4 % 4 * 16 * dim + (row % 64 / 16 * 4 + row % 4) * 4;
}
enum { CAIRN_GEMM_SCRATCH = 160 << 10 }; /* numbers gemm packs its operands into */

typedef struct cairn_kernels {
    const char *name; /* "ref", "avx2", "avx512": benches print it */

    /* ---- vectors of f32 ---- */
    float (*dot)(const float *a, const float *b, size_t n);
    void (*axpy)(float *y, float alpha, const float *x, size_t n); /* y += alpha * x */
    void (*scale)(float *x, float alpha, size_t n);
    float (*max)(const float *x, size_t n); /* -inf for n = 0 */
    /* x[i] = exp(x[i] - shift), returns the sum; exp to 2 ulp, exp(-inf) = 0, exact 1 at 0. */
    float (*exp_shift)(float *x, float shift, size_t n);
    float (*exp_sum)(const float *x, float shift, size_t n); /* the same sum without storing */
    /* Indexes (ascending) of the x[i] >= least; out has room for n. Returns how many. */
    size_t (*above)(const float *x, float least, size_t n, uint32_t *out);
    /* Numbers (ascending) of the bits set in n words; out has room for two more than there are. Returns how many. */
    size_t (*set_bits)(const uint64_t *words, size_t n, uint32_t *out);

    /* ---- conversion: F32 copies; to F16/BF16 rounds to nearest even, overflow to inf as IEEE does ---- */
    void (*widen)(float *out, const void *in, cairn_dtype dtype, size_t n);  /* F32, F16, BF16 */
    void (*narrow)(void *out, const float *in, cairn_dtype dtype, size_t n); /* F32, F16, BF16 */
    /* out[i] = q . row at[i] of rows (.., dim), what dot gives for the widened row, to the last bit; dim <= 1024 */
    void (*dot_rows)(float *out, const float *q, const void *rows, cairn_dtype dtype, size_t dim, const uint32_t *at,
                     size_t n);

    /* ---- layers ---- */
    void (*rms_norm)(float *out, const float *x, const float *weight, size_t n, float eps); /* out may be x */
    void (*silu_mul)(float *gate, const float *up, size_t n);                               /* gate = silu(gate) * up */
    /* out = x rotated by the angle whose cos and sin are given, (n/2) each. Half split: pairs (i, i + n/2);
     * interleaved: pairs (2i, 2i+1). (x1, x2) -> (x1 c - x2 s, x2 c + x1 s). out may be x. */
    void (*rotate)(float *out, const float *x, const float *cos, const float *sin, size_t n, bool interleaved);
    /* y[r] = W[r] . x for rows [first, first + n): one token's product, straight from the stored type. */
    void (*matvec)(float *y, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n,
                   const float *x);
    /* rows [first, first + n) of a weight matrix as f32, (n, cols) */
    void (*dequant)(float *out, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n);

    /* ---- attention over one tile; q rows are scaled and rotated already. Gathered: q[i], out[i] are row pointers ----
     */
    /* scores[i * ld + t] = q[i] . key t, t < tile->tokens */
    void (*tile_scores)(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                        void *scratch);
    /* out[i] += sum_t p[i * ld + t] * value t */
    void (*tile_mix)(const cairn_tile *tile, size_t nq, const float *p, size_t ld, float *const *out, void *scratch);
    /* The whole virtual key (paper section 3.1): r = softmax(q K^T); out[i] += weight[i] * r V; lse[i] (may be NULL) =
     * log-sum-exp of the scores. tokens = 0 adds nothing and gives lse = -inf. Of q8, but for the
     * reference and AVX-512 without VNNI, where D is a multiple of 32 up to 512, both products are of 16 bits by 8:
     * within 2^-16 of the largest q x key scale, and r x value scale, a term (avx512_vnni_tile.c). tile->next = NULL
     * ends a run of tiles: what it took of the processor is given back. */
    void (*tile_attend)(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                        float *const *out, float *lse, void *scratch);
    /* The same bits of two q8 tiles of one shape that follow each other, for a row each, in less time; `next` and
     * `later` say what follows both. NULL where it is no faster. */
    void (*tile_attend_two)(const cairn_tile *two, const float *const *q, const float *weight, float *const *out,
                            void *scratch);

    /* ---- int8 scan: rows interleaved by 16, dim padded to a multiple of 4 with zeros ----
     * element (row r, dim j) is at (r/16)*16*dim + (j/4)*64 + (r%16)*4 + j%4.
     * score = ((float)sum * row_scale[r]) * q_scale, sum exact in int32. Scores rows [16*group, 16*(group+groups)):
     * scores[i * ld + (r - 16*group)]. row_sum[r] = sum of the row's int8 values: no table needs it now,
     * NULL is fine (the unsigned trick goes by the query's sum, which costs no bytes per row). 4 <= dim <= 1024.
     * less, or NULL: the scores without the last four dims, laid out alike, for the price of storing them.
     * over, or NULL: bit b of over[i * groups + g] says whether row b of the g-th group scored at least bars[i]. */
    void (*scan_i8)(const int8_t *rows, const float *row_scale, const int32_t *row_sum, size_t group, size_t groups,
                    size_t dim, const int8_t *q, const float *q_scale, size_t nq, float *scores, float *less, size_t ld,
                    const float *bars, uint16_t *over);

    /* Which rows reach sum_j row_j q_ij >= least[i]: bit b of over[i * blocks + g] is row b of the g-th block of 64.
     * Of the 16 rows that share a vector, four follow each other, so that packing vectors puts the bits in order:
     * element (row r, dim j) is at (r/64)*64*dim + (r/4%4)*16*dim + (j/4)*64 + (r%64/16*4 + r%4)*4 + j%4
     * (cairn_sketch_at). Exact, if |q_ij| <= sketch_most, 127 or less, and the sum of |q_ij| over half the dims, those
     * with j % 4 < 2 or the others, is at most sketch_sum. |least| <= 2^29; 4 <= dim <= 1024, a multiple of 4. */
    int sketch_most, sketch_sum;
    void (*sketch_i8)(const int8_t *rows, size_t block, size_t blocks, size_t dim, const int8_t *q,
                      const int32_t *least, size_t nq, uint64_t *over);

    /* Rows into images. spread: the largest |x - center|. round: values[i] = (x[i] - center[i]) / scale to the nearest
     * integer within +-127; room for n rounded up to 16, whose rest may be overwritten. All finite, n <= 1024. */
    float (*scan_spread)(const float *x, const float *center, size_t n);
    void (*scan_round)(const float *x, const float *center, size_t n, float scale, int8_t *values,
                       cairn_scan_rounded *out);

    /* ---- training: layers, products, softmax over tiles of scores ---- */

    void (*swiglu)(float *out, const float *gate, const float *up, size_t n); /* silu(gate) * up */
    /* out again, and the gradients of both from that of out */
    void (*swiglu_backward)(float *out, float *dgate, float *dup, const float *dout, const float *gate, const float *up,
                            size_t n);
    /* y = s w x, s = 1 / sqrt(mean of x^2 + eps): dx_i = s (w_i dy_i - x_i s^2 / n sum_j w_j dy_j x_j), added to dx if
     * `add`; dweight_i += s dy_i x_i. dx may be dy. */
    void (*rms_norm_backward)(float *dx, float *dweight, const float *x, const float *weight, const float *dy, size_t n,
                              float eps, bool add);

    /* C (m, n) = (add ? C : 0) + A B. A's element (i, l) lies at a[i * row + l * col], B's (l, j) at b[l * ldb + j];
     * nothing is copied: for what lies in L1. */
    void (*product)(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t ldb,
                    float *c, size_t ldc, bool add);
    /* The same for products of any size: B's element (l, j) lies at b[l * brow + j * bcol]. Of row and col one is 1, of
     * brow and bcol too. scratch: CAIRN_GEMM_SCRATCH numbers. */
    void (*gemm)(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t brow,
                 size_t bcol, float *c, size_t ldc, bool add, float *scratch);
    /* out (cols, rows), rows ld_out apart, = x (rows, cols) transposed */
    void (*transpose)(float *out, size_t ld_out, const float *x, size_t ld, size_t rows, size_t cols);
    /* Row r of x (rows, n), rows ld apart, becomes weights[r] (NULL = 1) times its softmax; causal: of its first r + 1
     * numbers, and 0 behind. lse[r] (may be NULL) = ln sum exp of what it was. exp is to 2 ulp but never below 4e-38.
     */
    void (*row_softmax)(float *x, size_t ld, size_t rows, size_t n, bool causal, const float *weights, float *lse);
    /* The way back, p (rows, n) softmax rows without weights, u (rows, n) gradients by what p's tokens weigh, both ld
     * apart: means[r] = sum p u, unless they are `known`; then u = weights[r] p (u - means[r]) and p = weights[r] p.
     * Where causal masks, u becomes 0. */
    void (*row_softmax_backward)(float *p, float *u, size_t ld, size_t rows, size_t n, bool causal,
                                 const float *weights, float *means, bool known);
} cairn_kernels;

extern const cairn_kernels cairn_kernels_ref;
const cairn_kernels *cairn_kernels_avx2(void);   /* NULL where the CPU or the build has none (needs AVX2, FMA, F16C) */
const cairn_kernels *cairn_kernels_avx512(void); /* NULL likewise (F, BW, DQ, VL; VNNI used when there) */
/* The same but for tile_attend of q8, by AMX, from the first call on if the system then lets the process have its
 * state; a stack for signals must have room for it (sysconf(_SC_MINSIGSTKSZ)). NULL where the CPU has no AMX. */
const cairn_kernels *cairn_kernels_amx(void);
/* The best table but with products in bf16, by AMX: `product` and `gemm` round their operands to nearest even as they
 * pack them and sum in f32; those of fewer than 8 rows, or over fewer than 8 numbers, stay f32. The one table whose
 * rows may depend on how many there are: for training, which asks for it. NULL where the CPU has no AMX, where the
 * system keeps it from the process, or where CAIRN_KERNELS asks for less. */
const cairn_kernels *cairn_kernels_bf16(void);
/* The best this CPU can run; CAIRN_KERNELS=ref|avx2|avx512 in the environment asks for a lesser one. */
const cairn_kernels *cairn_kernels_best(void);

/* Scratch the tile functions need for nq <= 64 rows of this shape at a time (more rows are cut up inside). */
size_t cairn_tile_scratch_bytes(uint32_t tokens, uint32_t head_dim);

/* f32 rows to a tile payload (keys, values, q8 scales: see cairn_tile_payload_bytes) and back to a cairn_tile over it.
 * q8: key scale per channel = max|k|/127 over the tokens, value scale per token; 0 rows give scale 0. */
void cairn_tile_encode(const cairn_kernels *kernels, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim,
                       const float *keys, const float *values, void *payload);
cairn_tile cairn_tile_over(const void *payload, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim);

/* One row to int8: values[dim padded], returns the scale (max|x|/127); *sum = sum of the int8 values. */
float cairn_scan_quantize(const float *row, size_t dim, int8_t *values, int32_t *sum);

/* ---- matrix products through OpenBLAS (the only file that includes cblas.h), one thread, called from our own ----
 * Where OpenBLAS takes the processor for one without AVX2 the best table's products stand in. */

const char *cairn_kernels_words(void); /* the best table and OpenBLAS's core: "avx512, OpenBLAS's SkylakeX" */

/* C (m, n) = A (m, k) * B (n, k)^T; row-major, leading dimensions in elements. */
void cairn_gemm_nt(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc);
/* The same for `tiles` pieces of m rows that follow each other in A and C: a row does not depend on how many there are,
 * as it may on m. */
void cairn_gemm_nt_tiles(size_t tiles, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b,
                         size_t ldb, float *c, size_t ldc);
/* What a gradient needs besides: C (m, n) = A (m, k) * B (k, n), and C (m, n) = A (k, m)^T * B (k, n). add: += */
void cairn_gemm_nn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc, bool add);
void cairn_gemm_tn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                   size_t ldc, bool add);

/* Eigenvalues, ascending, and orthonormal eigenvectors of a symmetric matrix (n, n), by LAPACK's dsyev: row i of a
 * becomes the i-th vector. work: CAIRN_EIGEN_WORK n numbers. False if a holds what is not a number. */
enum { CAIRN_EIGEN_WORK = 34 };
bool cairn_eigen(size_t n, double *a, double *values, double *work);

/* The table's gemm and product, or OpenBLAS where the table is the reference: what trains on processors without a
 * twin. */
void cairn_gemm(const cairn_kernels *kernels, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                const float *b, size_t brow, size_t bcol, float *c, size_t ldc, bool add, float *scratch);
void cairn_product(const cairn_kernels *kernels, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                   const float *b, size_t ldb, float *c, size_t ldc, bool add);

#endif
