/* base_internal.h - what every room inside the library may use. Not installed. */
#ifndef CAIRN_BASE_INTERNAL_H
#define CAIRN_BASE_INTERNAL_H

#include <cairn/base.h>

#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* ---- errors ---- */

/* Remembers the sentence for cairn_last_error() and returns `status`, so callers can return it. */
cairn_status cairn_fail(cairn_status status, const char *format, ...) CAIRN_PRINTF(2, 3);
/* The same, with ": <strerror(err)>" added; ENOSPC and EDQUOT become CAIRN_FULL, ENOMEM
 * CAIRN_NO_MEMORY, ENOENT CAIRN_NOT_FOUND, everything else CAIRN_IO. */
cairn_status cairn_fail_errno(int err, const char *format, ...) CAIRN_PRINTF(2, 3);
/* Puts "prefix: " before the current sentence (context for an error of a lower room). */
cairn_status cairn_fail_within(cairn_status status, const char *format, ...) CAIRN_PRINTF(2, 3);

/* ---- memory: products are checked, blocks start on a 64-byte line, zero sizes are valid ---- */

void *cairn_alloc(size_t bytes);                    /* uninitialised; NULL when out of memory */
void *cairn_calloc(size_t count, size_t size);      /* zeroed */
void *cairn_alloc_array(size_t count, size_t size); /* uninitialised */
/* Grows (or makes, with NULL) to count * size bytes; old_bytes are kept. On failure the old block is untouched. */
void *cairn_grow(void *block, size_t old_bytes, size_t count, size_t size);
void cairn_free(void *block); /* NULL is fine */
/* Zeroed memory in pages of its own, from a boundary of CAIRN_HUGE_PAGE on; NULL when out of memory. Where it fills
 * huge pages it consists of such if the system has them, the rest of small ones; unless `huge`, all of small ones for
 * good. */
enum { CAIRN_HUGE_PAGE = 2 << 20 };
void *cairn_map(size_t bytes, bool huge);
void cairn_unmap(void *block, size_t bytes); /* NULL is fine */
char *cairn_strdup(const char *text);

/* Test hook: the n-th allocation from now on (1 = the next) fails once; 0 switches it off.
 * Returns how many allocations happened since the last call. */
uint64_t cairn_alloc_fail_at(uint64_t n);

static inline bool cairn_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool cairn_add_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

/* ---- bytes on disk: little-endian fields, big-endian keys ---- */

static inline void cairn_put_le16(void *p, uint16_t v)
{
    uint8_t *b = p;
    b[0] = (uint8_t)v;
    b[1] = (uint8_t)(v >> 8);
}
static inline void cairn_put_le32(void *p, uint32_t v)
{
    uint8_t *b = p;
    for (int i = 0; i < 4; i++) b[i] = (uint8_t)(v >> (8 * i));
}
static inline void cairn_put_le64(void *p, uint64_t v)
{
    uint8_t *b = p;
    for (int i = 0; i < 8; i++) b[i] = (uint8_t)(v >> (8 * i));
}
static inline uint16_t cairn_get_le16(const void *p)
{
    const uint8_t *b = p;
    return (uint16_t)(b[0] | b[1] << 8);
}
static inline uint32_t cairn_get_le32(const void *p)
{
    const uint8_t *b = p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}
static inline uint64_t cairn_get_le64(const void *p)
{
    const uint8_t *b = p;
    return (uint64_t)cairn_get_le32(b) | (uint64_t)cairn_get_le32(b + 4) << 32;
}
static inline void cairn_put_be16(void *p, uint16_t v)
{
    uint8_t *b = p;
    b[0] = (uint8_t)(v >> 8);
    b[1] = (uint8_t)v;
}
static inline void cairn_put_be32(void *p, uint32_t v)
{
    uint8_t *b = p;
    for (int i = 0; i < 4; i++) b[i] = (uint8_t)(v >> (24 - 8 * i));
}
static inline void cairn_put_be64(void *p, uint64_t v)
{
    uint8_t *b = p;
    for (int i = 0; i < 8; i++) b[i] = (uint8_t)(v >> (56 - 8 * i));
}
static inline uint16_t cairn_get_be16(const void *p)
{
    const uint8_t *b = p;
    return (uint16_t)(b[0] << 8 | b[1]);
}
static inline uint32_t cairn_get_be32(const void *p)
{
    const uint8_t *b = p;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | (uint32_t)b[3];
}
static inline uint64_t cairn_get_be64(const void *p)
{
    const uint8_t *b = p;
    return (uint64_t)cairn_get_be32(b) << 32 | (uint64_t)cairn_get_be32(b + 4);
}

/* ---- hashing: XXH3-64, one door to libxxhash ---- */

typedef struct cairn_hasher cairn_hasher;
uint64_t cairn_hash64(const void *data, size_t bytes);
cairn_hasher *cairn_hasher_new(void);
void cairn_hasher_add(cairn_hasher *h, const void *data, size_t bytes);
uint64_t cairn_hasher_value(const cairn_hasher *h); /* of all bytes so far; more may be added */
void cairn_hasher_free(cairn_hasher *h);
/* Two pieces without allocation: XXH3-64 of a followed by b. */
uint64_t cairn_hash64_two(const void *a, size_t a_bytes, const void *b, size_t b_bytes);

/* ---- files ---- */

/* Mode 0600 whatever the umask: a K/V memory is as private as its text. False, with errno, if it cannot be; a file
 * system that has no modes is no failure. */
bool cairn_make_private(int fd);

/* In the names of files that are not whole yet, followed by six characters: what a kill leaves can be told. */
#define CAIRN_UNFINISHED ".new-"

/* `write` fills a file beside `path` (0600), which then takes its place: readers see the old one or all of the new one,
 * and after a crash too. On failure (write returned false, with errno) the old one is as it was. */
cairn_status cairn_replace_file(const char *path, bool (*write)(FILE *file, const void *arg), const void *arg);
/* The same without waiting for the disk, for what can be made again and says itself whether it is whole. */
cairn_status cairn_put_file(const char *path, bool (*write)(FILE *file, const void *arg), const void *arg);

/* ---- clock ---- */

uint64_t cairn_now_ns(void);  /* monotonic */
uint64_t cairn_wall_ns(void); /* since 1970 */

/* ---- threads ---- */

/* Starts a thread that takes no signals but for its own faults: a program's handlers run on its own threads. stack:
 * bytes, 0 as the system has it. Returns 0, or why there is none (an errno). */
int cairn_thread_start(pthread_t *out, size_t stack, void *(*run)(void *), void *arg);

/* A pool of n workers, the caller being one of them. */

typedef struct cairn_pool cairn_pool;
typedef void (*cairn_pool_fn)(void *arg, size_t item, size_t worker); /* worker < cairn_pool_size */

/* threads = 0: one per online core (at most 64). A pool runs one job at a time. */
cairn_status cairn_pool_new(size_t threads, cairn_pool **out);
void cairn_pool_free(cairn_pool *pool);
size_t cairn_pool_size(const cairn_pool *pool); /* 1 for NULL */
/* Calls fn for items 0..n-1, each once, in any order and on any worker; returns when all are done.
 * With a NULL pool or n = 1 everything runs in the caller. */
void cairn_pool_run(cairn_pool *pool, size_t n, cairn_pool_fn fn, void *arg);

/* RssFile + RssShmem of this process (statm "shared"), in bytes: what mapped files hold resident. */
uint64_t cairn_file_rss_bytes(void);

/* Bytes per element of keys and values; 1 for q8 (its scales are counted by the tile layout). */
static inline size_t cairn_dtype_size(cairn_dtype dtype)
{
    return dtype == CAIRN_F32 ? 4 : dtype == CAIRN_Q8 ? 1 : 2;
}

#endif
