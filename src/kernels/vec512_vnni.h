/* vec512_vnni.h - vpdpbusd: four byte products, unsigned by signed, added to each int32 lane. */
#ifndef CAIRN_KERNELS_VEC512_VNNI_H
#define CAIRN_KERNELS_VEC512_VNNI_H

#include <stdint.h>

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* sum plus, in each lane, four unsigned bytes of x times q[0..3]. GCC 12 makes of the intrinsic a copy of the sum and a
 * broadcast of its own, two thirds of the kernel's time: the processor broadcasts as it loads. */
INLINE __m512i add_four_dims(__m512i sum, __m512i x, const int8_t *q)
{
    typedef struct four {
        int8_t dims[4];
    } four;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*(const four *)q));
    return sum;
}

/* The same for four unsigned bytes of w and four signed ones of x in each lane. */
INLINE __m512i add_four(__m512i sum, __m512i w, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

#endif
