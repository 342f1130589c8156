/* half.h - f16 and bf16 by integer arithmetic: what the conversion instructions of every twin must agree with, bit
 * for bit. IEEE 754 binary16: 1 sign, 5 exponent (bias 15), 10 fraction bits; bfloat16: the upper half of a binary32.
 */
#ifndef CAIRN_KERNELS_HALF_H
#define CAIRN_KERNELS_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t half_bits_of(float x)
{
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}
static inline float half_float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float half_widen_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 31) /* inf, or nan made quiet with its payload kept */
        return half_float_of(sign | 0x7f800000 | fraction << 13 | (fraction != 0 ? 0x400000 : 0));
    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24, exact in f32 */
        float magnitude = (float)fraction * 0x1p-24f;
        return half_float_of(sign | half_bits_of(magnitude));
    }
    return half_float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

/* To nearest, ties to even; beyond 65504 + half a step to inf. */
static inline uint16_t half_narrow_f16(float x)
{
    uint32_t b = half_bits_of(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    if (magnitude > 0x7f800000) /* nan: quiet, upper payload bits kept */
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x47800000) /* 65536 and more */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude >=
        0x38800000) { /* normal, 2^-14 and more: drop 13 bits; a carry walks into the exponent, and to inf */
        uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        return (uint16_t)(sign | (rounded - 0x38000000) >> 13);
    }
    if (magnitude < 0x33000000) /* below 2^-25, half the smallest subnormal; the tie at 2^-25 itself goes to even, 0 */
        return (uint16_t)sign;
    /* Subnormal: units of 2^-24. significand * 2^(exponent - 150) = significand >> (126 - exponent) units. */
    uint32_t exponent = magnitude >> 23, significand = (magnitude & 0x7fffff) | 0x800000;
    uint32_t shift = 126 - exponent; /* 14..24 */
    uint32_t units = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    if (rest > half || (rest == half && (units & 1))) units++;
    return (uint16_t)(sign | units);
}

static inline float half_widen_bf16(uint16_t h)
{
    return half_float_of((uint32_t)h << 16);
}

/* Integer arithmetic here and in the twins: the AVX512_BF16 instruction flushes subnormals to zero. */
static inline uint16_t half_narrow_bf16(float x)
{
    uint32_t b = half_bits_of(x);
    if ((b & 0x7fffffff) > 0x7f800000) return (uint16_t)(b >> 16 | 0x40);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

#endif
