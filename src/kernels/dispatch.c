/* dispatch.c - which tables this build has and this CPU can run. Compiled for the plain architecture. */
#include "amx.h"
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

_Thread_local const amx_shapes *cairn_amx_shapes;

#ifdef CAIRN_HAVE_AMX

/* Bits of CPUID's leaf 7 and of XCR0, and the call by which a process asks Linux for the state of tiles, 8 KB a thread.
 */
enum { AMX_OF_EDX = 1 << 22 | 1 << 24 | 1 << 25, BF16_OF_EAX_1 = 1 << 5, TILES_OF_XCR0 = 3 << 17 };
enum { ASK_FOR_STATE = 0x1023, TILE_STATE = 18 };

static bool has_amx(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || ((int)d & AMX_OF_EDX) != AMX_OF_EDX) return false;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & BF16_OF_EAX_1) == 0) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* there is one: AVX-512 is in use */
    return (low & TILES_OF_XCR0) == TILES_OF_XCR0;
}

static bool allowed;
static void ask_for_state(void)
{
    allowed = syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_STATE) == 0;
}
bool cairn_amx_allowed(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_for_state);
    return allowed;
}

static cairn_kernels by_bytes, by_bf16; /* named when they can be used */

static void make_tables(void)
{
    const cairn_kernels *base = cairn_kernels_avx512();
    if (base != &cairn_kernels_avx512_vnni_table || !has_amx()) return;
    by_bytes = *base;
    by_bytes.name = "avx512, AMX";
    by_bytes.tile_attend = cairn_tile_attend_amx;
    by_bf16 = by_bytes;
    by_bf16.product = cairn_product_amx;
    by_bf16.gemm = cairn_gemm_amx;
}
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;
#endif

const cairn_kernels *cairn_kernels_amx(void)
{
#ifdef CAIRN_HAVE_AMX
    pthread_once(&tables_once, make_tables);
    if (by_bytes.name != NULL) return &by_bytes;
#endif
    return NULL;
}

const cairn_kernels *cairn_kernels_best(void)
{
    /* an unknown word, or more than the CPU has, gives the best there is */
    const char *asked = getenv("CAIRN_KERNELS");
    const cairn_kernels *avx2 = cairn_kernels_avx2(), *avx512 = cairn_kernels_avx512(), *amx = cairn_kernels_amx();
    if (asked != NULL && strcmp(asked, "ref") == 0) return &cairn_kernels_ref;
    if (asked != NULL && strcmp(asked, "avx2") == 0) return avx2 != NULL ? avx2 : &cairn_kernels_ref;
    if (amx != NULL && (asked == NULL || strcmp(asked, "avx512") != 0)) return amx;
    if (avx512 != NULL) return avx512;
    return avx2 != NULL ? avx2 : &cairn_kernels_ref;
}

const cairn_kernels *cairn_kernels_bf16(void)
{
#ifdef CAIRN_HAVE_AMX
    const cairn_kernels *best = cairn_kernels_best();
    if (best == &by_bytes && cairn_amx_allowed()) return &by_bf16;
#endif
    return NULL;
}
