/* kernels_support.h - what the kernel tests share: the tables this machine can run, memory that ends at a page nobody
 * may touch, bits of floats. */
#ifndef CAIRN_TESTS_KERNELS_SUPPORT_H
#define CAIRN_TESTS_KERNELS_SUPPORT_H

#include "support.h"

#include <kernels_internal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <twins_internal.h>

/* for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;): the reference first, then each twin once; or of
 * these five, from 0 on, those whose digits CAIRN_TEST_TABLES names, where time is short (tests/campaign/emulated). */
static inline const cairn_kernels *next_table(const cairn_kernels *k)
{
    const cairn_kernels *all[] = {&cairn_kernels_ref, cairn_kernels_avx2(), cairn_kernels_avx512_without_vnni(),
                                  cairn_kernels_avx512(), cairn_kernels_amx()};
    size_t i = 0;
    if (k != NULL) { /* its last place: without VNNI two entries are the same */
        for (size_t j = 0; j < 5; j++)
            if (all[j] == k) i = j + 1;
    }
    const char *only = getenv("CAIRN_TEST_TABLES");
    while (i < 5 && (all[i] == NULL || (only != NULL && strchr(only, '0' + (int)i) == NULL))) i++;
    return i < 5 ? all[i] : NULL;
}

typedef struct guarded {
    char *map;
    size_t map_bytes;
    void *data; /* the last byte lies before an inaccessible page */
} guarded;

static inline guarded guarded_new(size_t bytes)
{
    size_t page = 4096, inside = (bytes + page - 1) / page * page;
    guarded g = {.map_bytes = inside + page};
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(g.map != MAP_FAILED);
    assert_int_equal(mprotect(g.map + inside, page, PROT_NONE), 0);
    g.data = g.map + inside - bytes;
    return g;
}
static inline void guarded_free(guarded *g)
{
    munmap(g->map, g->map_bytes);
}

static inline guarded guarded_random(test_random *r, size_t n)
{
    guarded g = guarded_new(n * sizeof(float));
    test_random_fill(r, g.data, n);
    return g;
}

static inline uint32_t bits_of(float x)
{
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}
static inline float float_of(uint32_t b)
{
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* The value of a binary16 pattern by its definition. */
static inline double f16_value(uint32_t h)
{
    int exponent = (int)(h >> 10 & 31), fraction = (int)(h & 1023);
    double magnitude = exponent == 0 ? __builtin_ldexp(fraction, -24) : __builtin_ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) magnitude = fraction == 0 ? __builtin_inf() : __builtin_nan("");
    return h & 0x8000 ? -magnitude : magnitude;
}

#endif
