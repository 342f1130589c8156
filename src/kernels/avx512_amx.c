/* avx512_amx.c - matrix products whose operands are rounded to bf16 as they are packed; sums are f32, by AMX: eight
 * tile registers of 1 KB, of which four hold 32 x 32 sums. Compiled with its flags; dispatch.c asks the processor and
 * the system before.
 *
 * Both operands become tiles of 16 x 32 numbers, zeros where there are none. Of A a tile is 16 rows of 32 numbers along
 * k; of B 16 pairs of rows, in each of which the two numbers of a column lie side by side. 16 rows of A, or columns of
 * B, are a panel: its tiles follow each other along k.
 *
 * One core of Emerald Rapids in a slow hour, packing included, GFLOPS (avx512's f32 in the same run):
 *     1024 x  576 x 192, x W^T  353 (110)    1024 x 192 x 1024, dy W    376 (103)    64 x 64 x 64, `product`  271 (119)
 *     1024 x 1024 x 192         355 (110)    1024 x 192 x 1024, dy^T x  350 (111)    A transposed, C +=       219 (121)
 *     1024 x  512 x 192         386 (120)     192 x 512 x 1024          325 (114)    16 x 64 x 64             245 (115)
 */
#include "amx.h"
#include "twins_internal.h"

#include <assert.h>

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
enum {
    SIDE = 16,           /* rows of a panel, pairs of a tile */
    DEPTH = 32,          /* numbers along k of a tile */
    TILE = SIDE * DEPTH, /* numbers of a tile */
    DEEP = 512,          /* along k at a time, at most */
    OF_A = 96 << 10,     /* numbers of A packed at a time, */
    OF_B = 220 << 10,    /* and of B: both stay in L2 */
    FEW = 8,             /* a product of fewer rows, or over fewer numbers, is not worth the packing: it is f32 */
    SMALL = 64,
    SHALLOW = 128 /* `product` takes pieces of SMALL rows and columns, SHALLOW deep */
};

INLINE size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}
INLINE size_t up_to(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}
INLINE __mmask16 lanes(size_t n)
{
    return (__mmask16)((1u << least(n, 16)) - 1);
}

/* ---- packing ---- */

/* Of four vectors' lanes of 128 bits: the even ones of two each, then the odd ones. */
INLINE void part_lanes(__m512i to[SIDE], const __m512i from[SIDE])
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        to[i] = _mm512_shuffle_i32x4(from[i], from[i + 4], 0x88);
        to[i + 4] = _mm512_shuffle_i32x4(from[i + 8], from[i + 12], 0x88);
        to[i + 8] = _mm512_shuffle_i32x4(from[i], from[i + 4], 0xdd);
        to[i + 12] = _mm512_shuffle_i32x4(from[i + 8], from[i + 12], 0xdd);
    }
}
/* 16 x 16 numbers of 32 bits, transposed: pairs, fours and whole lanes change places. */
INLINE void transpose(__m512i r[SIDE])
{
    __m512i t[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    part_lanes(t, r);
    part_lanes(r, t);
}

/* Keeps the compiler from holding sixteen pointers, one for each line, where one that walks will do. */
#define WALKS(pointer) __asm__("" : "+r"(pointer))

/* Lines along k: line i of the tile is 32 numbers from x + i * ld. */
INLINE void lines_along(const bool whole, __m512i r[SIDE], const float *x, size_t ld, size_t n, size_t k)
{
    const __mmask16 low = lanes(k), high = k > 16 ? lanes(k - 16) : 0;
#pragma GCC unroll 16
    for (size_t i = 0; i < SIDE; i++, x += ld) {
        if (!whole && i >= n) {
            r[i] = _mm512_setzero_si512();
            continue;
        }
        WALKS(x);
        const __m512 x0 = whole ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(low, x);
        const __m512 x1 = whole ? _mm512_loadu_ps(x + 16) : _mm512_maskz_loadu_ps(high, x + 16);
        r[i] = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    }
}
/* Lines across: line i is the numbers 2i and 2i + 1 along k, ld apart, of 16 columns side by side. */
INLINE void lines_across(const bool whole, __m512i r[SIDE], const float *x, size_t ld, size_t n, size_t k)
{
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 16
    for (size_t i = 0; i < SIDE; i++, x += 2 * ld) {
        WALKS(x);
        const __mmask16 first = 2 * i < k ? lanes(n) : 0, second = 2 * i + 1 < k ? lanes(n) : 0;
        const __m512 x0 = whole ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(first, x);
        const __m512 x1 = whole ? _mm512_loadu_ps(x + ld) : _mm512_maskz_loadu_ps(second, x + ld);
        r[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
    }
}

INLINE void pack_tile(const bool whole, const bool along, const bool turn, bf16 *out, const float *x, size_t ld,
                      size_t n, size_t k)
{
    __m512i r[SIDE];
    if (along)
        lines_along(whole, r, x, ld, n, k);
    else
        lines_across(whole, r, x, ld, n, k);
    if (turn) transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(out + i * DEPTH, r[i]);
}

INLINE void pack_tile_at(const bool along, const bool turn, bf16 *out, const float *x, size_t ld, size_t n, size_t k)
{
    if (n >= SIDE && k >= DEPTH)
        pack_tile(true, along, turn, out, x, ld, SIDE, DEPTH);
    else
        pack_tile(false, along, turn, out, x, ld, n, k);
}
/* Memory is gone through in its own order: what lies along k by panels, what lies across by steps. */
INLINE void pack_along(const bool turn, bf16 *out, const float *x, size_t ld, size_t n, size_t k)
{
    for (size_t i = 0; i < n; i += SIDE)
        for (size_t l = 0; l < k; l += DEPTH, out += TILE)
            pack_tile_at(true, turn, out, x + i * ld + l, ld, n - i, k - l);
}
INLINE void pack_across(const bool turn, bf16 *out, const float *x, size_t ld, size_t n, size_t k)
{
    const size_t panel = up_to(k, DEPTH) * SIDE;
    for (size_t l = 0; l < k; l += DEPTH, out += TILE)
        for (size_t i = 0; i < n; i += SIDE)
            pack_tile_at(false, turn, out + i / SIDE * panel, x + l * ld + i, ld, n - i, k - l);
}

/* n rows of A, or columns of B, k numbers each: one of the two steps between them and along k is 1. */
static void pack_a(bf16 *out, const float *a, size_t row, size_t col, size_t m, size_t k)
{
    if (col == 1)
        pack_along(false, out, a, row, m, k);
    else
        pack_across(true, out, a, col, m, k);
}
static void pack_b(bf16 *out, const float *b, size_t brow, size_t bcol, size_t n, size_t k)
{
    if (bcol == 1)
        pack_across(false, out, b, brow, n, k);
    else
        pack_along(true, out, b, bcol, n, k);
}

/* ---- tiles ---- */

/* Up to 16 sums of a row of C. */
INLINE void put_line(__m512 sums, size_t n, float *c, bool add)
{
    if (add) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(lanes(n), c));
    _mm512_mask_storeu_ps(c, lanes(n), sums);
}

/* Every tile 16 rows of 64 bytes. Loading that can take half a microsecond, so a thread does it for each gemm, as
 * others may have used tiles since the last one, but for a product only if this room did. */
static const amx_shapes whole_tiles = {
    .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
static void begin(void)
{
    _tile_loadconfig(&whole_tiles);
    cairn_amx_shapes = &whole_tiles;
}

/* C (m, n) = (add ? C : 0) + A B of up to 32 x 32, `steps` tiles deep: sums in tiles 0 and 1 of the upper rows, 2 and 3
 * of the lower ones. */
static void sums(size_t m, size_t n, size_t steps, const bf16 *a, const bf16 *b, float *c, size_t ldc, bool add)
{
    const bool lower = m > SIDE, right = n > SIDE;
    const bf16 *a2 = a + steps * TILE, *b2 = b + steps * TILE;
    const bool whole = m % SIDE == 0 && n % SIDE == 0;
    const size_t bytes = ldc * sizeof *c;
    WRITTEN();
    if (whole && add) {
        _tile_loadd(0, c, bytes);
        if (right) _tile_loadd(1, c + SIDE, bytes);
        if (lower) _tile_loadd(2, c + SIDE * ldc, bytes);
        if (lower && right) _tile_loadd(3, c + SIDE * ldc + SIDE, bytes);
    } else {
        _tile_zero(0);
        if (right) _tile_zero(1);
        if (lower) _tile_zero(2);
        if (lower && right) _tile_zero(3);
    }
    for (size_t s = 0; s < steps; s++, a += TILE, a2 += TILE, b += TILE, b2 += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
            _tile_loadd(7, b2, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (lower) {
            _tile_loadd(5, a2, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (right) _tile_dpbf16ps(3, 5, 7);
        }
    }
    if (whole) {
        _tile_stored(0, c, bytes);
        if (right) _tile_stored(1, c + SIDE, bytes);
        if (lower) _tile_stored(2, c + SIDE * ldc, bytes);
        if (lower && right) _tile_stored(3, c + SIDE * ldc + SIDE, bytes);
        return;
    }
    _Alignas(64) float edge[4][SIDE * SIDE];
    _tile_stored(0, edge[0], 64);
    if (right) _tile_stored(1, edge[1], 64);
    if (lower) _tile_stored(2, edge[2], 64);
    if (lower && right) _tile_stored(3, edge[3], 64);
    for (size_t i = 0; i < m; i++) {
        const float *line = edge[i / SIDE * 2] + i % SIDE * SIDE;
        put_line(_mm512_load_ps(line), n, c + i * ldc, add);
        if (right) put_line(_mm512_load_ps(line + SIDE * SIDE), n - SIDE, c + i * ldc + SIDE, add);
    }
}

static void multiply(size_t m, size_t n, size_t steps, const bf16 *a, const bf16 *b, float *c, size_t ldc, bool add)
{
    const size_t panel = steps * TILE;
    for (size_t j = 0; j < n; j += 32, b += 2 * panel) {
        const bf16 *rows = a;
        for (size_t i = 0; i < m; i += 32, rows += 2 * panel)
            sums(least(m - i, 32), least(n - j, 32), steps, rows, b, c + i * ldc + j, ldc, add);
    }
}

/* ---- products ---- */

static_assert((OF_A + OF_B) * sizeof(bf16) + 64 <= CAIRN_GEMM_SCRATCH * sizeof(float), "scratch of gemm");

/* Room for pieces of both operands, and the largest piece: `deep` along k, `tall` rows of A, `wide` columns of B. */
typedef struct pieces {
    bf16 *a, *b;
    size_t deep, tall, wide;
} pieces;

static void by_pieces(const pieces *p, size_t m, size_t n, size_t k, const float *a, size_t row, size_t col,
                      const float *b, size_t brow, size_t bcol, float *c, size_t ldc, bool add)
{
    for (size_t l = 0; l < k; l += p->deep, add = true) {
        const size_t deep = least(k - l, p->deep), steps = up_to(deep, DEPTH) / DEPTH;
        for (size_t j = 0; j < n; j += p->wide) {
            const size_t wide = least(n - j, p->wide);
            pack_b(p->b, b + l * brow + j * bcol, brow, bcol, wide, deep);
            for (size_t i = 0; i < m; i += p->tall) {
                const size_t tall = least(m - i, p->tall);
                pack_a(p->a, a + i * row + l * col, row, col, tall, deep);
                multiply(tall, wide, steps, p->a, p->b, c + i * ldc + j, ldc, add);
            }
        }
    }
}

void cairn_gemm_amx(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t brow,
                    size_t bcol, float *c, size_t ldc, bool add, float *scratch)
{
    if (m < FEW || k < FEW) {
        cairn_kernels_avx512_table.gemm(m, n, k, a, row, col, b, brow, bcol, c, ldc, add, scratch);
        return;
    }
    bf16 *packed = (bf16 *)(((uintptr_t)scratch + 63) / 64 * 64);
    const size_t parts = (k + DEEP - 1) / DEEP, deep = up_to((k + parts - 1) / parts, DEPTH);
    const pieces p = {packed, packed + OF_A, deep, OF_A / deep / 32 * 32, OF_B / deep / 32 * 32};
    begin();
    by_pieces(&p, m, n, k, a, row, col, b, brow, bcol, c, ldc, add);
}

void cairn_product_amx(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t ldb,
                       float *c, size_t ldc, bool add)
{
    if (m < FEW || k < FEW || (row != 1 && col != 1)) {
        cairn_kernels_avx512_table.product(m, n, k, a, row, col, b, ldb, c, ldc, add);
        return;
    }
    _Alignas(64) bf16 packed[2][SMALL * SHALLOW];
    const pieces p = {packed[0], packed[1], SHALLOW, SMALL, SMALL};
    if (cairn_amx_shapes != &whole_tiles) begin();
    by_pieces(&p, m, n, k, a, row, col, b, ldb, 1, c, ldc, add);
}
