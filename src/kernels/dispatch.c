/* dispatch.c - which tables this build has and this CPU can run. Compiled for the plain architecture. */
#include "twins_internal.h"

#include <stdlib.h>

#ifdef CAIRN_HAVE_AVX2
#include <cpuid.h>

/* clang 14 does not know the word "f16c". That the system saves the registers is checked with avx2. */
static bool has_f16c(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const cairn_kernels *cairn_kernels_avx2(void)
{
#ifdef CAIRN_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return &cairn_kernels_avx2_table;
#endif
    return NULL;
}

const cairn_kernels *cairn_kernels_avx512_without_vnni(void)
{
#ifdef CAIRN_HAVE_AVX512
    if (cairn_kernels_avx2() == NULL) return NULL;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return NULL;
    if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) return NULL;
    return &cairn_kernels_avx512_table;
#else
    return NULL;
#endif
}

const cairn_kernels *cairn_kernels_avx512(void)
{
    const cairn_kernels *table = cairn_kernels_avx512_without_vnni();
#ifdef CAIRN_HAVE_AVX512
    if (table != NULL && __builtin_cpu_supports("avx512vnni")) return &cairn_kernels_avx512_vnni_table;
#endif
    return table;
}

const cairn_kernels *cairn_kernels_best(void)
{
    const char *asked =
        getenv("CAIRN_KERNELS"); /* an unknown word, or more than the CPU has, gives the best there is */
    const cairn_kernels *avx2 = cairn_kernels_avx2(), *avx512 = cairn_kernels_avx512();
    if (asked != NULL && strcmp(asked, "ref") == 0) return &cairn_kernels_ref;
    if (avx512 != NULL && (asked == NULL || strcmp(asked, "avx2") != 0)) return avx512;
    return avx2 != NULL ? avx2 : &cairn_kernels_ref;
}
