/* body_matvec.h - products with stored weights, over vec512.h or vec256.h. Decoding is bound by the bytes of these
 * rows: they are converted on the way into the registers, once, and never written back. On Zen 4 the conversions set
 * the pace inside the caches, two cycles for 16 weights of f16 or int8: 512 x 192 from L2, avx512, f32 104 GB/s, bf16
 * 69, f16 56, Q8_0 22; 2048 x 1024 from L3 80, 72, 59, 23. */

enum { Q8_BLOCK = 32, Q8_BLOCK_BYTES = 34, ROWS_AT_ONCE = 4, ASK_AHEAD = 6144 };

INLINE cairn_dtype dtype_of(cairn_wtype type)
{
    return type == CAIRN_W_F32 ? CAIRN_F32 : type == CAIRN_W_F16 ? CAIRN_F16 : CAIRN_BF16;
}

/* Partial sums of ROWS_AT_ONCE rows: two chains a row (vectors 2i and 2i + 1), added at the end. The loads of x are
 * shared by the rows. More rows at once would map to the same cache sets when a row is a multiple of 4 KiB. The bytes
 * `ahead` of these, those of rows to come, are asked for on the way: 4096 x 4096 from DRAM, f16 18 -> 20..24 GB/s,
 * Q8_0 10 -> 18 (the other core busy); in L2 it costs f32 10 % and the others nothing. The next four rows are too near
 * where they are short: of 384 bytes, out of DRAM, they came at 12 GB/s. */
INLINE void row_sums(vf out[ROWS_AT_ONCE], const char *const row[ROWS_AT_ONCE], cairn_wtype type, size_t cols,
                     const float *x, size_t ahead)
{
    vf sum[2 * ROWS_AT_ONCE];
    size_t c = 0;
#pragma GCC unroll 8
    for (int r = 0; r < 2 * ROWS_AT_ONCE; r++) sum[r] = v_zero();
    if (type == CAIRN_W_Q8_0) {
        for (; c < cols; c += Q8_BLOCK) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                const char *block = row[r] + c / Q8_BLOCK * Q8_BLOCK_BYTES;
                _mm_prefetch(block + ahead, _MM_HINT_T1);
                vf product = v_mul(v_load_i8(block + 2), v_load(x + c));
#pragma GCC unroll 4
                for (int i = VL; i < Q8_BLOCK; i += VL)
                    product = v_fma(v_load_i8(block + 2 + i), v_load(x + c + i), product);
                sum[r] = v_fma(v_set_f16(block), product, sum[r]);
            }
        }
    } else {
        const cairn_dtype dtype = dtype_of(type);
        const size_t size = cairn_dtype_size(dtype);
        for (; c + 2 * VL <= cols; c += 2 * VL) {
            vf x0 = v_load(x + c), x1 = v_load(x + c + VL);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                if (2 * VL * size >= 64 || c * size % 64 == 0) /* once a line */
                    _mm_prefetch(row[r] + c * size + ahead, _MM_HINT_T1);
                sum[r] = v_fma(v_load_as(row[r], dtype, c), x0, sum[r]);
                sum[ROWS_AT_ONCE + r] = v_fma(v_load_as(row[r], dtype, c + VL), x1, sum[ROWS_AT_ONCE + r]);
            }
        }
        while (c < cols) { /* at most one whole vector and a rest */
            size_t n = cols - c < VL ? cols - c : VL;
            vf x0 = v_load_n(x + c, n);
            for (int r = 0; r < ROWS_AT_ONCE; r++) sum[r] = v_fma(v_load_as_n(row[r], dtype, c, n), x0, sum[r]);
            c += n;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE; r++) out[r] = v_add(sum[r], sum[ROWS_AT_ONCE + r]);
}

/* VL rows share one reduction; a last, shorter group repeats its last row. */
INLINE void matvec_as(float *y, const char *weights, cairn_wtype type, size_t cols, size_t row_bytes, size_t n,
                      const float *x)
{
    const size_t four = ROWS_AT_ONCE * row_bytes, ahead = four == 0 ? 0 : (ASK_AHEAD + four - 1) / four * four;
    for (size_t r = 0; r < n; r += VL) {
        size_t some = n - r < VL ? n - r : VL;
        vf sum[VL];
        for (size_t j = 0; j < VL; j += ROWS_AT_ONCE) {
            const char *row[ROWS_AT_ONCE];
            if (j >= some) {
                for (size_t i = 0; i < ROWS_AT_ONCE; i++) sum[j + i] = v_zero();
                continue;
            }
            for (size_t i = 0; i < ROWS_AT_ONCE; i++)
                row[i] = weights + (r + (j + i < some ? j + i : some - 1)) * row_bytes;
            row_sums(sum + j, row, type, cols, x, ahead);
        }
        if (some == VL)
            v_store(y + r, v_reduce(sum));
        else
            v_store_n(y + r, v_reduce(sum), some);
    }
}

static void matvec(float *y, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n, const float *x)
{
    size_t row_bytes = cairn_wtype_row_bytes(type, cols);
    const char *at = (const char *)weights + first * row_bytes;
    switch (type) {
    case CAIRN_W_F32: matvec_as(y, at, CAIRN_W_F32, cols, row_bytes, n, x); break;
    case CAIRN_W_F16: matvec_as(y, at, CAIRN_W_F16, cols, row_bytes, n, x); break;
    case CAIRN_W_BF16: matvec_as(y, at, CAIRN_W_BF16, cols, row_bytes, n, x); break;
    case CAIRN_W_Q8_0: matvec_as(y, at, CAIRN_W_Q8_0, cols, row_bytes, n, x); break;
    }
}

static void dequant(float *out, const void *weights, cairn_wtype type, size_t cols, size_t first, size_t n)
{
    const char *at = (const char *)weights + first * cairn_wtype_row_bytes(type, cols);
    if (type != CAIRN_W_Q8_0) { /* rows lie back to back, in and out */
        widen(out, at, dtype_of(type), n * cols);
        return;
    }
    for (size_t b = 0; b < n * (cols / Q8_BLOCK); b++, at += Q8_BLOCK_BYTES, out += Q8_BLOCK) {
        vf s = v_set_f16(at);
        for (size_t i = 0; i < Q8_BLOCK; i += VL) v_store(out + i, v_mul(s, v_load_i8(at + 2 + i)));
    }
}
