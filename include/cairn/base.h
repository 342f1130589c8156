/* base.h - what every Cairn header shares: status codes, element types, spans.
 *
 * Errors: every call that can fail returns a cairn_status. cairn_last_error() gives the calling
 * thread's sentence about its most recent failure, with the names and numbers a person needs.
 * The library never exits and never prints.
 *
 * Threads: unless a header says otherwise, an object belongs to one thread at a time and different
 * objects may be used by different threads at once.
 */
#ifndef CAIRN_BASE_H
#define CAIRN_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define CAIRN_API          __attribute__((visibility("default")))
#define CAIRN_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define CAIRN_API
#define CAIRN_PRINTF(f, a)
#endif

typedef enum cairn_status {
    CAIRN_OK = 0,
    CAIRN_NOT_FOUND,   /* an answer rather than a fault: no such context, tile, file */
    CAIRN_EXISTS,      /* the name is taken */
    CAIRN_INVALID,     /* an argument, option or input file that cannot be used */
    CAIRN_IO,          /* the operating system refused a read, write, open or sync */
    CAIRN_FULL,        /* disk, map or quota is full; what was committed is intact */
    CAIRN_BUSY,        /* somebody else holds it; the message says who */
    CAIRN_CORRUPT,     /* stored bytes are damaged; the message names the record */
    CAIRN_MISMATCH,    /* store and model (or two stores) do not belong together */
    CAIRN_NO_MEMORY,   /* an allocation, or a memory budget, is too small */
    CAIRN_UNSUPPORTED, /* valid, but not something this build or machine can do */
    CAIRN_CANCELLED    /* the caller asked to stop */
} cairn_status;

/* Type of stored elements. Numbers are part of the file format. */
typedef enum cairn_dtype {
    CAIRN_F32 = 0,
    CAIRN_F16 = 1,
    CAIRN_BF16 = 2,
    CAIRN_Q8 = 3 /* int8; keys scaled per channel, values per token */
} cairn_dtype;

typedef int32_t cairn_token; /* vocabulary id; negative is never valid */

typedef struct cairn_span { /* borrowed bytes */
    const void *data;
    size_t bytes;
} cairn_span;

CAIRN_API const char *cairn_version(void);                    /* "0.1.0" */
CAIRN_API const char *cairn_status_name(cairn_status status); /* "not found", "corrupt", ... */
CAIRN_API const char *cairn_last_error(void);                 /* this thread's last sentence, "" if none; never NULL */

CAIRN_API const char *cairn_dtype_name(cairn_dtype dtype); /* "f32", "f16", "bf16", "q8" */
CAIRN_API cairn_status cairn_dtype_parse(const char *text, cairn_dtype *out);

/* What this process uses, read from the kernel (ru_maxrss is inherited through exec, VmHWM is not). */
CAIRN_API uint64_t cairn_peak_rss_bytes(void); /* VmHWM; 0 where unknown */
CAIRN_API uint64_t cairn_free_ram_bytes(void); /* MemAvailable; 0 where unknown */

#ifdef __cplusplus
}
#endif
#endif
