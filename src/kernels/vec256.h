/* vec256.h - eight f32 lanes: the same vocabulary as vec512.h, for AVX2 with FMA and F16C. The _n forms go through
 * small buffers where the instruction set has no masks. */
#ifndef CAIRN_KERNELS_VEC256_H
#define CAIRN_KERNELS_VEC256_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m256 vf;
typedef __m256i vi;
enum { VL = 8 };

INLINE vi v_first(size_t n) /* all bits set in the first n lanes */
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf v_zero(void)
{
    return _mm256_setzero_ps();
}
INLINE vf v_set(float x)
{
    return _mm256_set1_ps(x);
}
INLINE vf v_load(const void *p)
{
    return _mm256_loadu_ps(p);
}
INLINE vf v_kept(vf x) /* in a register: not loaded again by each operation that takes it */
{
    __asm__("" : "+x"(x));
    return x;
}
INLINE vf v_load_n(const void *p, size_t n)
{
    return _mm256_maskload_ps(p, v_first(n));
}
INLINE void v_store(void *p, vf x)
{
    _mm256_storeu_ps(p, x);
}
INLINE void v_store_n(void *p, vf x, size_t n)
{
    _mm256_maskstore_ps(p, v_first(n), x);
}
INLINE vf v_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
INLINE vf v_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) /* a * b + c, rounded once */
{
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vf v_fms(vf a, vf b, vf c) /* a * b - c */
{
    return _mm256_fmsub_ps(a, b, c);
}
INLINE vf v_fnma(vf a, vf b, vf c) /* c - a * b */
{
    return _mm256_fnmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) /* b where either is nan */
{
    return _mm256_max_ps(a, b);
}
INLINE vf v_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
/* n lanes of x, the others -inf */
INLINE vf v_or_least(vf x, size_t n)
{
    return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x, _mm256_castsi256_ps(v_first(n)));
}
/* n lanes of x, the others 0 */
INLINE vf v_or_zero(vf x, size_t n)
{
    return _mm256_and_ps(x, _mm256_castsi256_ps(v_first(n)));
}
/* n lanes of x, the others of y */
INLINE vf v_then(vf x, vf y, size_t n)
{
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(v_first(n)));
}
/* Bit i = lane i of a >= lane i of b */
INLINE uint32_t v_at_least(vf a, vf b)
{
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
INLINE vf v_round(vf x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* x * 2^n for integral n in -252..254, in two steps, of which only the second can leave the normal range for x near 1.
 * A nan in n (then x is nan too) gives a nan. */
INLINE vf v_ldexp(vf x, vf n)
{
    vi whole = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, part);
    vi bias = _mm256_set1_epi32(127);
    vf first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(part, bias), 23));
    vf second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}
/* The same for x in [1/2, 2] and n of at least -125: added to the exponent. */
INLINE vf v_ldexp_normal(vf x, vf n)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

/* ---- 16-bit and 8-bit elements ---- */

INLINE __m128i v_bytes_n(const void *p, size_t bytes)
{
    char buffer[16] = {0};
    memcpy(buffer, p, bytes);
    return _mm_loadu_si128((const __m128i_u *)buffer);
}
INLINE vf v_load_f16(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)p));
}
INLINE vf v_set_f16(const void *p) /* one element in every lane */
{
    short bits;
    memcpy(&bits, p, sizeof bits);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
INLINE vf v_load_f16_n(const void *p, size_t n)
{
    return _mm256_cvtph_ps(v_bytes_n(p, 2 * n));
}
INLINE vf v_from_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE vf v_load_bf16(const void *p)
{
    return v_from_bf16(_mm_loadu_si128((const __m128i_u *)p));
}
INLINE vf v_load_bf16_n(const void *p, size_t n)
{
    return v_from_bf16(v_bytes_n(p, 2 * n));
}
INLINE vf v_load_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
}
INLINE vf v_load_i8_n(const void *p, size_t n)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v_bytes_n(p, n)));
}
INLINE __m128i v_to_f16(vf x)
{
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* Nearest even by integers, nan made quiet: see half_narrow_bf16. */
INLINE __m128i v_to_bf16(vf x)
{
    vi b = _mm256_castps_si256(x), upper = _mm256_srli_epi32(b, 16);
    vi odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    vi rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
    vi quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    vi words = _mm256_blendv_epi8(rounded, quiet, nan); /* all below 2^16, so the saturating pack keeps them */
    vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return _mm256_castsi256_si128(packed);
}
INLINE void v_store_f16(void *p, vf x)
{
    _mm_storeu_si128((__m128i_u *)p, v_to_f16(x));
}
INLINE void v_store_f16_n(void *p, vf x, size_t n)
{
    __m128i h = v_to_f16(x);
    memcpy(p, &h, 2 * n);
}
INLINE void v_store_bf16(void *p, vf x)
{
    _mm_storeu_si128((__m128i_u *)p, v_to_bf16(x));
}
INLINE void v_store_bf16_n(void *p, vf x, size_t n)
{
    __m128i h = v_to_bf16(x);
    memcpy(p, &h, 2 * n);
}

/* ---- across lanes ---- */

INLINE vf v_joined(vf a, vf b) /* lanes l and l + 4 added: (a, b) */
{
    return v_add(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
}
INLINE vf v_pairs(vf a, vf b) /* then l and l + 2 */
{
    return v_add(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
}
INLINE vf v_ones(vf a, vf b) /* then l and l + 1 */
{
    return v_add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
/* Lane i = the sum over the lanes of a[i]. A tree: lanes l and l + 4, then l + 2, l + 1, the same for every i and as in
 * v_sum, so that a sum has the same bits wherever it sits. 14 shuffles and 7 additions for 8 sums. */
INLINE vf v_reduce(const vf a[VL])
{
    vf x0 = v_joined(a[0], a[4]), x1 = v_joined(a[1], a[5]);
    vf x2 = v_joined(a[2], a[6]), x3 = v_joined(a[3], a[7]);
    return v_ones(v_pairs(x0, x1), v_pairs(x2, x3));
}
INLINE float v_sum(vf x)
{
    x = v_add(x, _mm256_permute2f128_ps(x, x, 0x01));
    x = v_add(x, _mm256_shuffle_ps(x, x, 0x4e));
    return _mm256_cvtss_f32(v_add(x, _mm256_shuffle_ps(x, x, 0xb1)));
}
INLINE float v_sum_of_fours(vf x) /* four lanes each, then the two of them */
{
    x = v_add(x, _mm256_permute_ps(x, 0xb1));
    x = v_add(x, _mm256_permute_ps(x, 0x4e));
    return _mm256_cvtss_f32(v_add(x, _mm256_permute2f128_ps(x, x, 0x01)));
}
INLINE float v_greatest(vf x)
{
    x = v_max(x, _mm256_permute2f128_ps(x, x, 0x01));
    x = v_max(x, _mm256_shuffle_ps(x, x, 0x4e));
    return _mm256_cvtss_f32(v_max(x, _mm256_shuffle_ps(x, x, 0xb1)));
}
INLINE vf v_swap_neighbours(vf x) /* lanes 2i and 2i + 1 exchanged */
{
    return _mm256_permute_ps(x, 0xb1);
}
INLINE vf v_load_doubled(const float *p) /* VL / 2 elements, each in two lanes */
{
    const vi twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), twice);
}
INLINE vf v_fma_minus_plus(vf a, vf b, vf c) /* a * b - c in even lanes, a * b + c in odd ones */
{
    return _mm256_fmaddsub_ps(a, b, c);
}

/* ---- integers, for the scan ---- */

INLINE vi vi_zero(void)
{
    return _mm256_setzero_si256();
}
INLINE vi vi_set(int32_t x)
{
    return _mm256_set1_epi32(x);
}
INLINE vi vi_load(const void *p)
{
    return _mm256_loadu_si256((const __m256i_u *)p);
}
INLINE vi vi_even_bytes(vi x) /* bytes 0 and 2 of each 32-bit lane as two int16 */
{
    return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
}
INLINE vi vi_odd_bytes(vi x) /* bytes 1 and 3 */
{
    return _mm256_srai_epi16(x, 8);
}
/* c + the sum of the two int16 products of each 32-bit lane. GCC 12 else adds up in an order of its own, for which the
 * registers are too few. */
INLINE vi vi_madd(vi a, vi b, vi c)
{
    c = _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
    __asm__("" : "+x"(c));
    return c;
}
INLINE vi vi_unsigned_bytes(vi x) /* each byte 128 greater */
{
    return _mm256_xor_si256(x, _mm256_set1_epi8((char)0x80));
}
INLINE vi vi_madd_bytes(vi a, vi b, vi c) /* c + the four products, unsigned by signed, of each lane; two fit int16 */
{
    return vi_madd(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1), c);
}
INLINE vi vi_add_products(vi a, vi b, vi c) /* c + the two products, likewise, of each int16 */
{
    c = _mm256_add_epi16(c, _mm256_maddubs_epi16(a, b));
    __asm__("" : "+x"(c)); /* as above */
    return c;
}
INLINE vi vi_add_halves(vi a, vi c) /* c + the two int16 of each lane */
{
    return vi_madd(a, _mm256_set1_epi16(1), c);
}
INLINE vi vi_pack32(vi a, vi b) /* with saturation, to int16: four of a, four of b, in each 128 bits */
{
    return _mm256_packs_epi32(a, b);
}
INLINE uint64_t vi_packed_not_negative(vi a, vi b) /* int16s likewise to bytes; a bit for each that is not negative */
{
    return (uint32_t)~_mm256_movemask_epi8(_mm256_packs_epi16(a, b));
}
INLINE vf vi_to_f32(vi x)
{
    return _mm256_cvtepi32_ps(x);
}

INLINE void v_store_i8(void *p, vf x) /* whole numbers from -128 to 127 */
{
    __m256i whole = _mm256_cvtps_epi32(x);
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i_u *)p, _mm_packs_epi16(half, half));
}

/* Writes the numbers base + i of the set bits of `mask`, ascending; returns how many. */
INLINE size_t v_write_indexes(uint32_t *out, uint32_t mask, uint32_t base)
{
    size_t n = 0;
    for (; mask != 0; mask &= mask - 1) out[n++] = base + (uint32_t)__builtin_ctz(mask);
    return n;
}

#endif
