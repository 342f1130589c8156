/* vec512.h - sixteen f32 lanes: the vocabulary the body_*.h files are written in, for AVX-512 (F, BW, DQ, VL).
 * vec256.h says the same with eight lanes. Every load and store takes any address; the _n forms touch exactly n
 * elements, n <= VL, and give zeros in the other lanes. */
#ifndef CAIRN_KERNELS_VEC512_H
#define CAIRN_KERNELS_VEC512_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m512 vf;
typedef __m512i vi;
enum { VL = 16 };

INLINE __mmask16 v_first(size_t n)
{
    return (__mmask16)((1u << n) - 1);
}
INLINE vf v_zero(void)
{
    return _mm512_setzero_ps();
}
INLINE vf v_set(float x)
{
    return _mm512_set1_ps(x);
}
INLINE vf v_load(const void *p)
{
    return _mm512_loadu_ps(p);
}
INLINE vf v_kept(vf x) /* as the compiler likes: of 32 registers there are enough */
{
    return x;
}
INLINE vf v_load_n(const void *p, size_t n)
{
    return _mm512_maskz_loadu_ps(v_first(n), p);
}
INLINE void v_store(void *p, vf x)
{
    _mm512_storeu_ps(p, x);
}
INLINE void v_store_n(void *p, vf x, size_t n)
{
    _mm512_mask_storeu_ps(p, v_first(n), x);
}
INLINE vf v_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
INLINE vf v_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) /* a * b + c, rounded once */
{
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vf v_fms(vf a, vf b, vf c) /* a * b - c */
{
    return _mm512_fmsub_ps(a, b, c);
}
INLINE vf v_fnma(vf a, vf b, vf c) /* c - a * b */
{
    return _mm512_fnmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) /* b where either is nan */
{
    return _mm512_max_ps(a, b);
}
INLINE vf v_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
/* n lanes of x, the others -inf */
INLINE vf v_or_least(vf x, size_t n)
{
    return _mm512_mask_blend_ps(v_first(n), _mm512_set1_ps(-__builtin_inff()), x);
}
/* n lanes of x, the others 0 */
INLINE vf v_or_zero(vf x, size_t n)
{
    return _mm512_maskz_mov_ps(v_first(n), x);
}
/* n lanes of x, the others of y */
INLINE vf v_then(vf x, vf y, size_t n)
{
    return _mm512_mask_blend_ps(v_first(n), y, x);
}
/* Bit i = lane i of a >= lane i of b */
INLINE uint32_t v_at_least(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
INLINE vf v_round(vf x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* x * 2^n for integral n, overflow to inf, rounded once where it leaves the normal range */
INLINE vf v_ldexp(vf x, vf n)
{
    return _mm512_scalef_ps(x, n);
}
INLINE vf v_ldexp_normal(vf x, vf n) /* the same; with eight lanes it is cheaper */
{
    return _mm512_scalef_ps(x, n);
}

/* ---- 16-bit and 8-bit elements ---- */

INLINE vf v_load_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)p));
}
INLINE vf v_set_f16(const void *p) /* one element in every lane */
{
    short bits;
    memcpy(&bits, p, sizeof bits);
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
INLINE vf v_load_f16_n(const void *p, size_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_first(n), p));
}
/* One masked permutation puts 16 bits into each upper half: widening and a shift take half as long again (Zen 4). */
INLINE vf v_from_bf16(__m256i h)
{
    const __m512i from = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(h)));
}
INLINE vf v_load_bf16(const void *p)
{
    return v_from_bf16(_mm256_loadu_si256((const __m256i_u *)p));
}
INLINE vf v_load_bf16_n(const void *p, size_t n)
{
    return v_from_bf16(_mm256_maskz_loadu_epi16(v_first(n), p));
}
INLINE vf v_load_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)p)));
}
INLINE vf v_load_i8_n(const void *p, size_t n)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(v_first(n), p)));
}
INLINE __m256i v_to_f16(vf x)
{
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* Nearest even by integers, nan made quiet: see half_narrow_bf16. */
INLINE __m256i v_to_bf16(vf x)
{
    __m512i b = _mm512_castps_si512(x), upper = _mm512_srli_epi32(b, 16);
    __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
}
INLINE void v_store_f16(void *p, vf x)
{
    _mm256_storeu_si256((__m256i_u *)p, v_to_f16(x));
}
INLINE void v_store_f16_n(void *p, vf x, size_t n)
{
    _mm256_mask_storeu_epi16(p, v_first(n), v_to_f16(x));
}
INLINE void v_store_bf16(void *p, vf x)
{
    _mm256_storeu_si256((__m256i_u *)p, v_to_bf16(x));
}
INLINE void v_store_bf16_n(void *p, vf x, size_t n)
{
    _mm256_mask_storeu_epi16(p, v_first(n), v_to_bf16(x));
}

/* ---- across lanes ---- */

INLINE vf v_halves(vf a, vf b) /* lanes l and l + 8 added: (a, b) */
{
    return v_add(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
INLINE vf v_quarters(vf a, vf b) /* then l and l + 4 */
{
    return v_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE vf v_pairs(vf a, vf b) /* then l and l + 2 */
{
    return v_add(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
INLINE vf v_ones(vf a, vf b) /* then l and l + 1 */
{
    return v_add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
/* Lane i = the sum over the lanes of a[i]. A tree: lanes l and l + 8, then l + 4, l + 2, l + 1, the same for every i
 * and as in v_sum, so that a sum has the same bits wherever it sits. 30 shuffles and 15 additions for 16 sums. */
INLINE vf v_reduce(const vf a[VL])
{
    /* v_ones leaves the b-th member of its k-th input at lane 4b + k: they go in transposed. */
    vf x0 = v_quarters(v_halves(a[0], a[4]), v_halves(a[8], a[12]));
    vf x1 = v_quarters(v_halves(a[1], a[5]), v_halves(a[9], a[13]));
    vf x2 = v_quarters(v_halves(a[2], a[6]), v_halves(a[10], a[14]));
    vf x3 = v_quarters(v_halves(a[3], a[7]), v_halves(a[11], a[15]));
    return v_ones(v_pairs(x0, x1), v_pairs(x2, x3));
}
INLINE float v_sum(vf x)
{
    x = v_add(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = v_add(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = v_add(x, _mm512_shuffle_ps(x, x, 0x4e));
    return _mm512_cvtss_f32(v_add(x, _mm512_shuffle_ps(x, x, 0xb1)));
}
INLINE float v_greatest(vf x)
{
    return _mm512_reduce_max_ps(x);
}
INLINE vf v_swap_neighbours(vf x) /* lanes 2i and 2i + 1 exchanged */
{
    return _mm512_permute_ps(x, 0xb1);
}
INLINE vf v_load_doubled(const float *p) /* VL / 2 elements, each in two lanes */
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
INLINE vf v_fma_minus_plus(vf a, vf b, vf c) /* a * b - c in even lanes, a * b + c in odd ones */
{
    return _mm512_fmaddsub_ps(a, b, c);
}

INLINE float v_sum_of_fours(vf x) /* four lanes each, then the four of them */
{
    x = v_add(x, _mm512_permute_ps(x, 0xb1));
    x = v_add(x, _mm512_permute_ps(x, 0x4e));
    x = v_add(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return _mm512_cvtss_f32(v_add(x, _mm512_shuffle_f32x4(x, x, 0xb1)));
}
/* In each 128 bits: out[j] has the j-th four bytes of all of x. */
INLINE void turn_four(const __m512i x[4], __m512i out[4])
{
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

/* ---- integers, for the scan ---- */

INLINE vi vi_zero(void)
{
    return _mm512_setzero_si512();
}
INLINE vi vi_set(int32_t x)
{
    return _mm512_set1_epi32(x);
}
INLINE vi vi_load(const void *p)
{
    return _mm512_loadu_si512(p);
}
INLINE vi vi_even_bytes(vi x) /* bytes 0 and 2 of each 32-bit lane as two int16 */
{
    return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
}
INLINE vi vi_odd_bytes(vi x) /* bytes 1 and 3 */
{
    return _mm512_srai_epi16(x, 8);
}
INLINE vi vi_madd(vi a, vi b, vi c) /* c + the sum of the two int16 products of each 32-bit lane */
{
    return _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
}
INLINE vi vi_unsigned_bytes(vi x) /* each byte 128 greater */
{
    return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80));
}
INLINE vi vi_madd_bytes(vi a, vi b, vi c) /* c + the four products, unsigned by signed, of each lane; two fit int16 */
{
    return vi_madd(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1), c);
}
INLINE vi vi_add_products(vi a, vi b, vi c) /* c + the two products, likewise, of each int16 */
{
    return _mm512_add_epi16(c, _mm512_maddubs_epi16(a, b));
}
INLINE vi vi_add_halves(vi a, vi c) /* c + the two int16 of each lane */
{
    return vi_madd(a, _mm512_set1_epi16(1), c);
}
INLINE vi vi_pack32(vi a, vi b) /* with saturation, to int16: four of a, four of b, in each 128 bits */
{
    return _mm512_packs_epi32(a, b);
}
INLINE uint64_t vi_packed_not_negative(vi a, vi b) /* int16s likewise to bytes; a bit for each that is not negative */
{
    return ~(uint64_t)_mm512_movepi8_mask(_mm512_packs_epi16(a, b));
}
INLINE vf vi_to_f32(vi x)
{
    return _mm512_cvtepi32_ps(x);
}
INLINE void v_store_i8(void *p, vf x) /* whole numbers from -128 to 127 */
{
    _mm_storeu_si128((__m128i_u *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

/* Writes the numbers base + i of the set bits of `mask`, ascending, with room for VL of them; returns how many.
 * Compressed in the register: the storing form of the instruction takes over 100 cycles on Zen 4. */
INLINE size_t v_write_indexes(uint32_t *out, uint32_t mask, uint32_t base)
{
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32((int)base), lanes);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)mask, index));
    return (size_t)__builtin_popcount(mask);
}

#endif
