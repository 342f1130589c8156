/* dispatch.c - which tables this build has and this CPU can run. Compiled for the plain architecture. */
#include "twins_internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

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

#ifdef CAIRN_HAVE_AMX

/* Bits of CPUID's leaf 7 and of XCR0, and the call by which a process asks Linux for the state of tiles, 8 KB a thread.
 */
enum { AMX_OF_EDX = 1 << 22 | 1 << 24, BF16_OF_EAX_1 = 1 << 5, TILES_OF_XCR0 = 3 << 17 };
enum { ASK_FOR_STATE = 0x1023, TILE_STATE = 18 };

static bool has_amx(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & AMX_OF_EDX) != AMX_OF_EDX) return false;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & BF16_OF_EAX_1) == 0) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* there is one: AVX-512 is in use */
    if ((low & TILES_OF_XCR0) != TILES_OF_XCR0) return false;
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_STATE) == 0;
}

static cairn_kernels by_amx; /* named when it can be used */

static void make_table(void)
{
    const cairn_kernels *base = cairn_kernels_avx512();
    if (base == NULL || !has_amx()) return;
    by_amx = *base;
    by_amx.name = "avx512, AMX";
    by_amx.product = cairn_product_amx;
    by_amx.gemm = cairn_gemm_amx;
}
#endif

const cairn_kernels *cairn_kernels_bf16(void)
{
#ifdef CAIRN_HAVE_AMX
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_table);
    if (by_amx.name != NULL && cairn_kernels_best() == cairn_kernels_avx512()) return &by_amx;
#endif
    return NULL;
}
