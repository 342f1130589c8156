/* gguf_internal.h - a GGUF file as a checked table of contents over its bytes.
 *
 * Everything here borrows from the bytes that were parsed: nothing is copied but the two tables, whose sizes are
 * bounded by the bytes that were there to describe them. What gguf_parse accepts can be read without further checks of
 * lengths: every string, array and tensor lies inside the bytes, tensors do not overlap, names are unique.
 */
#ifndef CAIRN_GGUF_INTERNAL_H
#define CAIRN_GGUF_INTERNAL_H

#include <cairn/model.h>

#include "base_internal.h"

typedef struct gguf_text { /* borrowed bytes, not terminated, any content */
    const char *data;
    size_t bytes;
} gguf_text;

typedef enum gguf_value_type { /* numbers of the format */
                               GGUF_U8,
                               GGUF_I8,
                               GGUF_U16,
                               GGUF_I16,
                               GGUF_U32,
                               GGUF_I32,
                               GGUF_F32,
                               GGUF_BOOL,
                               GGUF_STRING,
                               GGUF_ARRAY,
                               GGUF_U64,
                               GGUF_I64,
                               GGUF_F64,
                               GGUF_VALUE_TYPES
} gguf_value_type;

typedef struct gguf_value {
    gguf_text key;
    gguf_value_type type; /* of the elements, if it is an array */
    bool array;
    size_t count;        /* 1 unless an array */
    const uint8_t *data; /* elements as stored, little-endian, unaligned */
    size_t bytes;
} gguf_value;

typedef struct gguf_tensor {
    gguf_text name;
    uint32_t type; /* ggml number: a CAIRN_GGUF_* or one of those gguf_type_name knows */
    uint32_t n_dims;
    uint64_t dims[4]; /* fastest first; 1 beyond n_dims */
    const uint8_t *data;
    size_t bytes;
    bool used; /* for the reader's reader: somebody asked for it */
} gguf_tensor;

typedef struct gguf {
    const uint8_t *data; /* all of the file */
    size_t bytes;
    void *map; /* gguf_close unmaps it; NULL = the caller's bytes */
    uint32_t version;
    size_t alignment;
    size_t n_values;
    gguf_value *values; /* sorted by key */
    size_t n_tensors;
    gguf_tensor *tensors; /* sorted by name */
} gguf;

/* Maps and parses. INVALID: not a GGUF file; CORRUPT: a broken one, the message says which key or tensor and the
 * numbers; UNSUPPORTED: another version or byte order. */
cairn_status gguf_open(const char *path, gguf *out);
/* The same over bytes the caller keeps. */
cairn_status gguf_parse(const void *data, size_t bytes, gguf *out);
void gguf_close(gguf *file); /* a zeroed one is fine */

const gguf_value *gguf_find(const gguf *file, const char *key); /* NULL if there is none */
const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name);

/* Scalars. A missing key leaves *out alone and is OK; another type, or a number that does not fit, is INVALID and
 * named. gguf_u32 takes any integer type, gguf_f32 either float. */
cairn_status gguf_u32(const gguf *file, const char *key, uint32_t *out);
cairn_status gguf_f32(const gguf *file, const char *key, float *out);
cairn_status gguf_bool(const gguf *file, const char *key, bool *out);
cairn_status gguf_string(const gguf *file, const char *key, gguf_text *out);

/* Elements of an array of integers or floats by number. */
bool gguf_value_integer(const gguf_value *value, size_t i, int64_t *out); /* false: not an integer that fits */
bool gguf_value_float(const gguf_value *value, size_t i, double *out);    /* false: not a float */

/* Walks an array of strings: *at starts at 0. */
gguf_text gguf_next_string(const gguf_value *value, size_t *at);

/* ---- writing what was read (gguf_write.c) ---- */

/* A key and its value, byte for byte. INVALID for a key with a zero byte in it, which the writer cannot name. */
cairn_status gguf_put_value(cairn_gguf_writer *w, const gguf_value *value);
/* An array of the file with one element more, given as the file stores it: a string with its length before it. */
cairn_status gguf_put_longer(cairn_gguf_writer *w, const gguf_value *array, const void *element, size_t bytes);

bool gguf_text_is(gguf_text text, const char *word);
/* For messages: printable, at most 63 bytes, "..." where cut. */
typedef struct gguf_shown {
    char text[72];
} gguf_shown;
gguf_shown gguf_show(gguf_text text);

const char *gguf_value_type_name(uint32_t type);
const char *gguf_type_name(uint32_t type); /* "Q4_K"; NULL for a number no file has */
/* Bytes of a row of `cols` elements; 0 if the type is unknown or cols is not a multiple of its block. */
size_t gguf_row_bytes(uint32_t type, uint64_t cols);

#endif
