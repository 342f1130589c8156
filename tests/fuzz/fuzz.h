/* fuzz.h - what the fuzz entries share. An entry is one file with libFuzzer's LLVMFuzzerTestOneInput: any bytes as one
 * kind of input. It must come back without a crash, a leak or undefined behaviour, and what was accepted must keep what
 * the entry's comment promises.
 *
 * tests/campaign/fuzz builds the entries with clang and libFuzzer and runs them; in every other build replay.c hands
 * them the files of data/fuzz/<entry> as an ordinary test. */
#ifndef CAIRN_TESTS_FUZZ_H
#define CAIRN_TESTS_FUZZ_H

#include "must.h"

#include <base_internal.h>

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* An exact copy on the heap, so that one byte too many is seen. */
static inline uint8_t *fuzz_copy(const void *data, size_t size)
{
    uint8_t *copy = malloc(size != 0 ? size : 1);
    must(copy != NULL);
    if (size != 0) memcpy(copy, data, size);
    return copy;
}

/* The bytes as a file in memory; the path is good until the next call. */
static inline const char *fuzz_file(const void *data, size_t size)
{
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        must(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    must(ftruncate(fd, 0) == 0);
    for (size_t put = 0; put < size;) {
        ssize_t n = pwrite(fd, (const char *)data + put, size - put, (off_t)put);
        must(n > 0);
        put += (size_t)n;
    }
    return path;
}

/* A hash put right after a mutation, so that what lies behind the check is reached: XXH3-64 over [0, at) and
 * [from, size), stored at `at`. */
static inline void fuzz_seal(uint8_t *record, size_t size, size_t at, size_t from)
{
    if (size < at + 8) return;
    if (from > size) from = size;
    cairn_put_le64(record + at, cairn_hash64_two(record, at, record + from, size - from));
}

#endif
