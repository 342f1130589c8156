/* error.c - status names and each thread's last sentence. */
#include "base_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

enum { SENTENCE = 1024 };
static _Thread_local char sentence[SENTENCE];

const char *cairn_version(void)
{
    return CAIRN_VERSION;
}

const char *cairn_last_error(void)
{
    return sentence;
}

const char *cairn_status_name(cairn_status status)
{
    static const char *const names[] = {"ok",   "not found", "exists",   "invalid",   "i/o error",   "full",
                                        "busy", "corrupt",   "mismatch", "no memory", "unsupported", "cancelled"};
    size_t i = (size_t)status;
    return i < sizeof names / sizeof *names ? names[i] : "unknown";
}

cairn_status cairn_fail(cairn_status status, const char *format, ...)
{
    char text[SENTENCE]; /* an argument may be the old sentence itself */
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    memcpy(sentence, text, sizeof sentence);
    return status;
}

cairn_status cairn_fail_errno(int err, const char *format, ...)
{
    char text[SENTENCE];
    char reason[128];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    const char *why = strerror_r(err, reason, sizeof reason); /* GNU form */
    snprintf(sentence, sizeof sentence, "%.800s: %s", text, why);
    switch (err) {
    case ENOSPC:
    case EDQUOT: return CAIRN_FULL;
    case ENOMEM: return CAIRN_NO_MEMORY;
    case ENOENT: return CAIRN_NOT_FOUND;
    default: return CAIRN_IO;
    }
}

cairn_status cairn_fail_within(cairn_status status, const char *format, ...)
{
    char text[SENTENCE];
    char old[SENTENCE];
    memcpy(old, sentence, sizeof old);
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    snprintf(sentence, sizeof sentence, "%.400s: %.600s", text, old);
    return status;
}

const char *cairn_dtype_name(cairn_dtype dtype)
{
    static const char *const names[] = {"f32", "f16", "bf16", "q8"};
    size_t i = (size_t)dtype;
    return i < sizeof names / sizeof *names ? names[i] : "unknown";
}

cairn_status cairn_dtype_parse(const char *text, cairn_dtype *out)
{
    for (int i = CAIRN_F32; i <= CAIRN_Q8; i++)
        if (strcmp(text, cairn_dtype_name((cairn_dtype)i)) == 0) {
            *out = (cairn_dtype)i;
            return CAIRN_OK;
        }
    return cairn_fail(CAIRN_INVALID, "element type '%.40s' is not one of f32, f16, bf16, q8", text);
}
