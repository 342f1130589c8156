/* body_product.h - matrix products for training, over vec512.h or vec256.h; included after body_vectors.h.
 *
 * A register tile is PRODUCT_ROWS x 2 vectors of C: per step of k two loads of B, PRODUCT_ROWS broadcasts of A and
 * twice as many fma. `product` takes both operands as they lie, for what stays in L1 (the tiles of attention); `gemm`
 * copies pieces of B, and of a transposed A, into panels in the order of their use, as Goto & van de Geijn 2008 do. An
 * element of C is one chain of fma over k, in pieces of at most GEMM_DEPTH, whatever the shape: rows do not depend on
 * how many there are.
 *
 * AVX2, one Zen 4 core of 90.8 GFLOPS, a window of 512 rows of the demo model, GFLOPS (OpenBLAS 0.3.21 the same day):
 *     512 x 1024 x 192  x W^T   86 (77)      512 x 192 x 1024  dy W    85 (79)      1024 x 192 x 512  dy^T x  84 (79)
 *     512 x  576 x 192          88 (75)      512 x 512 x  192          87 (77)       192 x 512 x 512          80 (80)
 *     64 x 64 x 32, `product`   66 (46)       64 x  32 x   64          68 (42)  */

enum {
    PRODUCT_WIDE = 2 * VL, /* columns of a panel of B */
    GEMM_DEPTH = 320,      /* a panel of B is at most 20 KB, or 40 with 16 lanes: L1 keeps it over all rows of A */
    GEMM_WIDE = 256,       /* columns of B packed at a time */
    GEMM_TALL = 240        /* rows of A at a time: its 300 KB stay in L2 beside those of B */
};

/* C (M, n) = (add ? C : 0) + A B, n <= PRODUCT_WIDE; `whole`: n = PRODUCT_WIDE, and no lane is masked. */
INLINE void register_tile(const int M, const bool whole, size_t n, size_t k, const float *a, size_t row, size_t col,
                          const float *b, size_t ldb, float *c, size_t ldc, bool add)
{
    const size_t n0 = n < VL ? n : VL, n1 = n - n0;
    const float *third[PRODUCT_ROWS / 3]; /* x86 scales an index by 1, 2, 4, 8: three rows go by one pointer */
    vf sum[PRODUCT_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < (M + 2) / 3; i++) third[i] = a + 3 * (size_t)i * row;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        __builtin_prefetch(c + (size_t)i * ldc, 1); /* C comes while the sums are made */
        __builtin_prefetch(c + (size_t)i * ldc + (whole ? PRODUCT_WIDE - 1 : 0), 1);
        sum[i][0] = sum[i][1] = v_zero();
    }
    for (size_t l = 0; l < k; l++) {
        const vf b0 = whole ? v_load(b) : v_load_n(b, n0), b1 = whole ? v_load(b + VL) : v_load_n(b + VL, n1);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const vf x = v_set(third[i / 3][(size_t)(i % 3) * row]);
            sum[i][0] = v_fma(x, b0, sum[i][0]);
            sum[i][1] = v_fma(x, b1, sum[i][1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < (M + 2) / 3; i++) third[i] += col;
        b += ldb;
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        float *to = c + (size_t)i * ldc;
        if (whole) {
            v_store(to, add ? v_add(v_load(to), sum[i][0]) : sum[i][0]);
            v_store(to + VL, add ? v_add(v_load(to + VL), sum[i][1]) : sum[i][1]);
        } else {
            v_store_n(to, add ? v_add(v_load_n(to, n0), sum[i][0]) : sum[i][0], n0);
            v_store_n(to + VL, add ? v_add(v_load_n(to + VL, n1), sum[i][1]) : sum[i][1], n1);
        }
    }
}

/* One panel of B against all rows of A, of which each PRODUCT_ROWS begin `step` behind the last. */
INLINE void panel(const bool whole, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, size_t step,
                  const float *b, size_t ldb, float *c, size_t ldc, bool add)
{
    for (; m >= PRODUCT_ROWS; m -= PRODUCT_ROWS, a += step, c += PRODUCT_ROWS * ldc)
        register_tile(PRODUCT_ROWS, whole, n, k, a, row, col, b, ldb, c, ldc, add);
    size_t i = 0;
#define ROWS(M)                                                                                                        \
    if (i + (M) <= m) register_tile(M, whole, n, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add), i += (M)
    if (PRODUCT_ROWS > 6) ROWS(6);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}
/* Not inline: one copy of each serves product and gemm. */
static __attribute__((noinline)) void panel_whole(size_t m, size_t k, const float *a, size_t row, size_t col,
                                                  size_t step, const float *b, size_t ldb, float *c, size_t ldc,
                                                  bool add)
{
    panel(true, m, PRODUCT_WIDE, k, a, row, col, step, b, ldb, c, ldc, add);
}
static __attribute__((noinline)) void panel_part(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                                                 size_t step, const float *b, size_t ldb, float *c, size_t ldc,
                                                 bool add)
{
    panel(false, m, n, k, a, row, col, step, b, ldb, c, ldc, add);
}
INLINE void any_panel(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, size_t step, const float *b,
                      size_t ldb, float *c, size_t ldc, bool add)
{
    if (n == PRODUCT_WIDE)
        panel_whole(m, k, a, row, col, step, b, ldb, c, ldc, add);
    else
        panel_part(m, n, k, a, row, col, step, b, ldb, c, ldc, add);
}

static void product(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t ldb,
                    float *c, size_t ldc, bool add)
{
    for (size_t j = 0; j < n; j += PRODUCT_WIDE)
        any_panel(m, n - j < PRODUCT_WIDE ? n - j : PRODUCT_WIDE, k, a, row, col, PRODUCT_ROWS * row, b + j, ldb, c + j,
                  ldc, add);
}

/* ---- copies ---- */

/* Four rows of x become four columns of out. */
INLINE void transpose_four(float *out, size_t ld_out, const float *x, size_t ld, size_t cols)
{
    size_t c = 0;
    for (; c + 4 <= cols; c += 4) {
        __m128 r0 = _mm_loadu_ps(x + c), r1 = _mm_loadu_ps(x + ld + c);
        __m128 r2 = _mm_loadu_ps(x + 2 * ld + c), r3 = _mm_loadu_ps(x + 3 * ld + c);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        _mm_storeu_ps(out + c * ld_out, r0);
        _mm_storeu_ps(out + (c + 1) * ld_out, r1);
        _mm_storeu_ps(out + (c + 2) * ld_out, r2);
        _mm_storeu_ps(out + (c + 3) * ld_out, r3);
    }
    for (; c < cols; c++)
        for (size_t r = 0; r < 4; r++) out[c * ld_out + r] = x[r * ld + c];
}
static void transpose(float *out, size_t ld_out, const float *x, size_t ld, size_t rows, size_t cols)
{
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) transpose_four(out + r, ld_out, x + r * ld, ld, cols);
    for (; r < rows; r++)
        for (size_t c = 0; c < cols; c++) out[c * ld_out + r] = x[r * ld + c];
}

enum { PACK_DEPTH = 8 }; /* rows read side by side: all of them stay in L1, however far apart */

INLINE void pack_line(float *out, const float *b, size_t n) /* n numbers, then zeros */
{
    if (n == PRODUCT_WIDE) {
        v_store(out, v_load(b));
        v_store(out + VL, v_load(b + VL));
        return;
    }
    v_store(out, v_load_n(b, n < VL ? n : VL));
    v_store(out + VL, v_load_n(b + VL, n < VL ? 0 : n - VL));
}

/* B (k, n) to panels (k, PRODUCT_WIDE), zeros behind column n; its elements lie row by row (col = 1) or column by
 * column (row = 1). */
static void pack_columns(float *out, const float *b, size_t row, size_t col, size_t k, size_t n)
{
    const size_t each = k * PRODUCT_WIDE;
    if (col == 1) {
        for (size_t l = 0; l < k; l += PACK_DEPTH)
            for (size_t j = 0; j < n; j += PRODUCT_WIDE)
                for (size_t i = l; i < k && i < l + PACK_DEPTH; i++) {
                    _mm_prefetch((const char *)(b + (i + PACK_DEPTH) * row + j), _MM_HINT_T0);
                    pack_line(out + j * k + i * PRODUCT_WIDE, b + i * row + j,
                              n - j < PRODUCT_WIDE ? n - j : PRODUCT_WIDE);
                }
        return;
    }
    for (size_t j = 0; j < n; j += PRODUCT_WIDE, out += each) {
        const size_t some = n - j < PRODUCT_WIDE ? n - j : PRODUCT_WIDE;
        if (some < PRODUCT_WIDE) memset(out, 0, each * sizeof *out);
        transpose(out, PRODUCT_WIDE, b + j * col, col, some, k);
    }
}

/* A (m, k) that lies column by column (row = 1), to panels (k, PRODUCT_ROWS), packed_size apart. What lies behind row m
 * in the last panel is never read. */
enum { PACKED_GAP = 16 };
INLINE size_t packed_size(size_t k)
{
    return k * PRODUCT_ROWS + PACKED_GAP;
}
static void pack_rows(float *out, const float *a, size_t col, size_t m, size_t k)
{
    for (size_t l = 0; l < k; l += PACK_DEPTH) {
        const size_t deep = k - l < PACK_DEPTH ? k - l : PACK_DEPTH;
        const float *from = a + l * col;
        float *panel_of = out + l * PRODUCT_ROWS;
        for (size_t i = 0; i < m; i += PRODUCT_ROWS, panel_of += packed_size(k)) {
            float *to = panel_of;
            if (i + VL <= m) { /* the last lanes are written over by the next row, those of the last row by nobody */
                for (size_t d = 0; d < deep; d++, to += PRODUCT_ROWS) {
                    _mm_prefetch((const char *)(from + (d + PACK_DEPTH) * col + i), _MM_HINT_T0);
                    v_store(to, v_load(from + d * col + i));
                }
                continue;
            }
            for (size_t d = 0; d < deep; d++, to += PRODUCT_ROWS)
                for (size_t r = 0; r < PRODUCT_ROWS && i + r < m; r++) to[r] = from[d * col + i + r];
        }
    }
}

/* ---- gemm ---- */

static_assert((int)PRODUCT_ROWS <= (int)VL, "a row of a packed panel of A is one vector");
static_assert((size_t)GEMM_WIDE * GEMM_DEPTH +
                      (size_t)GEMM_TALL / PRODUCT_ROWS * (GEMM_DEPTH * PRODUCT_ROWS + PACKED_GAP) <=
                  CAIRN_GEMM_SCRATCH,
              "scratch of gemm");

static void gemm(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t brow,
                 size_t bcol, float *c, size_t ldc, bool add, float *scratch)
{
    assert(row == 1 || col == 1);
    assert(brow == 1 || bcol == 1);
    float *packed_b = scratch, *packed_a = scratch + (size_t)GEMM_WIDE * GEMM_DEPTH;
    const size_t pieces = k == 0 ? 1 : (k + GEMM_DEPTH - 1) / GEMM_DEPTH, depth = (k + pieces - 1) / pieces;
    for (size_t l = 0, deep; l < k || l == 0; l += deep, add = true) {
        deep = k - l < depth ? k - l : depth;
        for (size_t j = 0; j < n; j += GEMM_WIDE) {
            const size_t wide = n - j < GEMM_WIDE ? n - j : GEMM_WIDE;
            pack_columns(packed_b, b + l * brow + j * bcol, brow, bcol, deep, wide);
            for (size_t i = 0; i < m; i += GEMM_TALL) {
                const size_t tall = m - i < GEMM_TALL ? m - i : GEMM_TALL;
                const float *rows = a + i * row + l * col;
                if (col != 1) pack_rows(packed_a, rows, col, tall, deep);
                for (size_t p = 0; p < wide; p += PRODUCT_WIDE) {
                    const float *columns = packed_b + p * deep;
                    const size_t some = wide - p < PRODUCT_WIDE ? wide - p : PRODUCT_WIDE;
                    float *to = c + i * ldc + j + p;
                    if (col == 1)
                        any_panel(tall, some, deep, rows, row, 1, PRODUCT_ROWS * row, columns, PRODUCT_WIDE, to, ldc,
                                  add);
                    else
                        any_panel(tall, some, deep, packed_a, 1, PRODUCT_ROWS, packed_size(deep), columns, PRODUCT_WIDE,
                                  to, ldc, add);
                }
            }
        }
        if (deep == 0) break;
    }
}
