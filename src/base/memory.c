/* memory.c - checked, aligned allocation, and what the kernel says about our memory. */
#include "base_internal.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LINE = 64 }; /* cache line, and the width of an AVX-512 register */

static atomic_uint_fast64_t alloc_count;
static atomic_uint_fast64_t alloc_fail; /* 0 = off, else the allocation number that fails */

uint64_t cairn_alloc_fail_at(uint64_t n)
{
    uint64_t made = atomic_exchange(&alloc_count, 0);
    atomic_store(&alloc_fail, n);
    return made;
}

static bool fails_now(void)
{
    return atomic_fetch_add(&alloc_count, 1) + 1 == atomic_load(&alloc_fail);
}

void *cairn_alloc(size_t bytes)
{
    if (fails_now() || bytes > SIZE_MAX - LINE) return NULL;
    size_t rounded = (bytes + LINE - 1) / LINE * LINE; /* aligned_alloc wants a multiple */
    return aligned_alloc(LINE, rounded != 0 ? rounded : LINE);
}

void *cairn_alloc_array(size_t count, size_t size)
{
    size_t bytes;
    return cairn_mul_size(count, size, &bytes) ? cairn_alloc(bytes) : NULL;
}

void *cairn_calloc(size_t count, size_t size)
{
    void *block = cairn_alloc_array(count, size);
    if (block != NULL) memset(block, 0, count * size);
    return block;
}

void *cairn_grow(void *block, size_t old_bytes, size_t count, size_t size)
{
    void *bigger = cairn_alloc_array(count, size);
    if (bigger == NULL) return NULL;
    if (block != NULL) memcpy(bigger, block, old_bytes < count * size ? old_bytes : count * size);
    cairn_free(block);
    return bigger;
}

void cairn_free(void *block)
{
    free(block);
}

static size_t whole_pages(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

void *cairn_map(size_t bytes, bool huge)
{
    if (fails_now() || bytes > SIZE_MAX / 2) return NULL;
    const size_t used = whole_pages(bytes), whole = used + CAIRN_HUGE_PAGE;
    char *p = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return NULL;
    const size_t before = (CAIRN_HUGE_PAGE - (uintptr_t)p % CAIRN_HUGE_PAGE) % CAIRN_HUGE_PAGE;
    if (before > 0) munmap(p, before);
    if (before < CAIRN_HUGE_PAGE) munmap(p + before + used, CAIRN_HUGE_PAGE - before);
    madvise(p + before, used, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); /* that there are none is no error */
    return p + before;
}

void cairn_unmap(void *block, size_t bytes)
{
    if (block != NULL) munmap(block, whole_pages(bytes));
}

char *cairn_strdup(const char *text)
{
    size_t n = strlen(text) + 1;
    char *copy = cairn_alloc(n);
    if (copy != NULL) memcpy(copy, text, n);
    return copy;
}

/* A "Name:   123 kB" line of a /proc file, in bytes. */
static uint64_t proc_kb(const char *path, const char *name)
{
    char line[256];
    uint64_t bytes = 0;
    size_t n = strlen(name);
    FILE *f = fopen(path, "re");
    if (f == NULL) return 0;
    while (fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, name, n) == 0 && line[n] == ':') {
            bytes = strtoull(line + n + 1, NULL, 10) * 1024;
            break;
        }
    fclose(f);
    return bytes;
}

uint64_t cairn_peak_rss_bytes(void)
{
    return proc_kb("/proc/self/status", "VmHWM");
}

uint64_t cairn_free_ram_bytes(void)
{
    return proc_kb("/proc/meminfo", "MemAvailable");
}

uint64_t cairn_file_rss_bytes(void)
{
    unsigned long long size = 0;
    unsigned long long resident = 0;
    unsigned long long shared = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f == NULL) return 0;
    int n = fscanf(f, "%llu %llu %llu", &size, &resident, &shared);
    fclose(f);
    return n == 3 ? (uint64_t)shared * (uint64_t)sysconf(_SC_PAGESIZE) : 0;
}
