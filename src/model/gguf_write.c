/* gguf_write.c - writes GGUF version 3: keys and tensors gathered in memory, then one file put in place whole. */
#include <cairn/model.h>

#include "gguf_internal.h"
#include "kernels_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { ALIGNMENT = 32, Q8_0_BLOCK = 32, Q8_0_BYTES = 34 };

typedef struct buffer {
    uint8_t *data;
    size_t n;
    size_t cap;
} buffer;

typedef struct out_tensor {
    uint8_t *data;
    size_t bytes;
} out_tensor;

struct cairn_gguf_writer {
    buffer values;  /* encoded keys and values */
    buffer tensors; /* encoded descriptions, their offsets counted from the start of the data */
    buffer names;   /* every key ("k" first) and tensor ("t" first), NUL-terminated: to refuse a second one */
    uint64_t n_values;
    size_t n_tensors;
    size_t cap_tensors;
    out_tensor *data;
    size_t data_bytes; /* padded */
};

static size_t padded(size_t n)
{
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Room for n more bytes, counted as used; NULL when out of memory. */
static uint8_t *extend(buffer *b, size_t n)
{
    size_t needed;
    if (!cairn_add_size(b->n, n, &needed)) return NULL;
    if (needed > b->cap) {
        size_t cap = needed < SIZE_MAX / 2 ? needed * 2 : needed;
        uint8_t *bigger = cairn_grow(b->data, b->n, cap, 1);
        if (bigger == NULL) return NULL;
        b->data = bigger;
        b->cap = cap;
    }
    uint8_t *at = b->data + b->n;
    b->n = needed;
    return at;
}

cairn_status cairn_gguf_writer_new(cairn_gguf_writer **out)
{
    *out = cairn_calloc(1, sizeof **out);
    return *out != NULL ? CAIRN_OK : cairn_fail(CAIRN_NO_MEMORY, "GGUF writer");
}

void cairn_gguf_writer_free(cairn_gguf_writer *w)
{
    if (w == NULL) return;
    for (size_t i = 0; i < w->n_tensors; i++) cairn_free(w->data[i].data);
    cairn_free(w->data);
    cairn_free(w->values.data);
    cairn_free(w->tensors.data);
    cairn_free(w->names.data);
    cairn_free(w);
}

static cairn_status check_new(const cairn_gguf_writer *w, char kind, const char *name)
{
    for (size_t at = 0; at < w->names.n;) {
        const char *known = (const char *)w->names.data + at;
        if (known[0] == kind && strcmp(known + 1, name) == 0)
            return cairn_fail(CAIRN_EXISTS, "%s '%s' was written already", kind == 'k' ? "key" : "tensor", name);
        at += strlen(known) + 1;
    }
    return CAIRN_OK;
}

static bool remember(cairn_gguf_writer *w, char kind, const char *name)
{
    size_t n = strlen(name) + 1;
    uint8_t *at = extend(&w->names, n + 1);
    if (at == NULL) return false;
    *at = (uint8_t)kind;
    memcpy(at + 1, name, n);
    return true;
}

/* ---- values ---- */

static uint8_t *put_text(uint8_t *at, const char *text, size_t bytes)
{
    cairn_put_le64(at, bytes);
    memcpy(at + 8, text, bytes);
    return at + 8 + bytes;
}

/* Begins a value: writes key and type and returns where its `bytes` bytes go; NULL with *st set on failure. */
static uint8_t *begin_value(cairn_gguf_writer *w, const char *key, gguf_value_type type, size_t bytes, cairn_status *st)
{
    size_t key_bytes = strlen(key);
    size_t total;
    if ((*st = check_new(w, 'k', key)) != CAIRN_OK) return NULL;
    if (key_bytes == 0 || key_bytes > 65535) {
        *st = cairn_fail(CAIRN_INVALID, "a key of %zu bytes", key_bytes);
        return NULL;
    }
    size_t before = w->values.n;
    uint8_t *at = cairn_add_size(bytes, 12 + key_bytes, &total) ? extend(&w->values, total) : NULL;
    if (at == NULL || !remember(w, 'k', key)) {
        w->values.n = before;
        *st = cairn_fail(CAIRN_NO_MEMORY, "key '%s' of %zu bytes", key, bytes);
        return NULL;
    }
    at = put_text(at, key, key_bytes);
    cairn_put_le32(at, type);
    w->n_values++;
    return at + 4;
}

/* The same for an array of n elements of `bytes` bytes in all; returns where the first goes. */
static uint8_t *begin_array(cairn_gguf_writer *w, const char *key, gguf_value_type type, size_t n, size_t bytes,
                            cairn_status *st)
{
    size_t total;
    if (!cairn_add_size(bytes, 12, &total)) {
        *st = cairn_fail(CAIRN_INVALID, "key '%s': %zu bytes", key, bytes);
        return NULL;
    }
    uint8_t *at = begin_value(w, key, GGUF_ARRAY, total, st);
    if (at == NULL) return NULL;
    cairn_put_le32(at, type);
    cairn_put_le64(at + 4, n);
    return at + 12;
}

cairn_status cairn_gguf_put_u32(cairn_gguf_writer *w, const char *key, uint32_t value)
{
    cairn_status st;
    uint8_t *at = begin_value(w, key, GGUF_U32, 4, &st);
    if (at != NULL) cairn_put_le32(at, value);
    return st;
}

cairn_status cairn_gguf_put_f32(cairn_gguf_writer *w, const char *key, float value)
{
    cairn_status st;
    uint8_t *at = begin_value(w, key, GGUF_F32, sizeof value, &st);
    if (at != NULL) memcpy(at, &value, sizeof value); /* little-endian hosts only, see CairnOptions.cmake */
    return st;
}

cairn_status cairn_gguf_put_bool(cairn_gguf_writer *w, const char *key, bool value)
{
    cairn_status st;
    uint8_t *at = begin_value(w, key, GGUF_BOOL, 1, &st);
    if (at != NULL) *at = value;
    return st;
}

cairn_status cairn_gguf_put_string(cairn_gguf_writer *w, const char *key, const char *value)
{
    cairn_status st;
    size_t bytes = strlen(value);
    uint8_t *at = begin_value(w, key, GGUF_STRING, 8 + bytes, &st);
    if (at != NULL) put_text(at, value, bytes);
    return st;
}

static cairn_status put_words(cairn_gguf_writer *w, const char *key, gguf_value_type type, const void *values, size_t n)
{
    cairn_status st;
    size_t bytes;
    if (!cairn_mul_size(n, 4, &bytes)) return cairn_fail(CAIRN_INVALID, "key '%s': %zu elements", key, n);
    uint8_t *at = begin_array(w, key, type, n, bytes, &st);
    if (at != NULL && n != 0) memcpy(at, values, bytes);
    return st;
}
cairn_status cairn_gguf_put_u32s(cairn_gguf_writer *w, const char *key, const uint32_t *values, size_t n)
{
    return put_words(w, key, GGUF_U32, values, n);
}
cairn_status cairn_gguf_put_i32s(cairn_gguf_writer *w, const char *key, const int32_t *values, size_t n)
{
    return put_words(w, key, GGUF_I32, values, n);
}
cairn_status cairn_gguf_put_f32s(cairn_gguf_writer *w, const char *key, const float *values, size_t n)
{
    return put_words(w, key, GGUF_F32, values, n);
}

cairn_status cairn_gguf_put_strings(cairn_gguf_writer *w, const char *key, const char *const *values, size_t n)
{
    cairn_status st;
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++)
        if (!cairn_add_size(bytes, 8 + strlen(values[i]), &bytes))
            return cairn_fail(CAIRN_INVALID, "key '%s': %zu strings", key, n);
    uint8_t *at = begin_array(w, key, GGUF_STRING, n, bytes, &st);
    for (size_t i = 0; at != NULL && i < n; i++) at = put_text(at, values[i], strlen(values[i]));
    return st;
}

/* What `value` has, then `bytes` bytes more that make `n` elements more. */
static cairn_status put_again(cairn_gguf_writer *w, const gguf_value *value, const void *more, size_t bytes, size_t n)
{
    cairn_status st;
    size_t total;
    if (memchr(value->key.data, 0, value->key.bytes) != NULL)
        return cairn_fail(CAIRN_INVALID, "key '%s' has a zero byte in it", gguf_show(value->key).text);
    char *key = cairn_alloc(value->key.bytes + 1);
    if (key == NULL || !cairn_add_size(value->bytes, bytes, &total)) {
        cairn_free(key);
        return cairn_fail(CAIRN_NO_MEMORY, "key '%s' of %zu bytes", gguf_show(value->key).text, value->bytes);
    }
    memcpy(key, value->key.data, value->key.bytes);
    key[value->key.bytes] = 0;
    uint8_t *at = value->array ? begin_array(w, key, value->type, value->count + n, total, &st)
                               : begin_value(w, key, value->type, total, &st);
    if (at != NULL && value->bytes != 0) memcpy(at, value->data, value->bytes);
    if (at != NULL && bytes != 0) memcpy(at + value->bytes, more, bytes);
    cairn_free(key);
    return st;
}
cairn_status gguf_put_value(cairn_gguf_writer *w, const gguf_value *value)
{
    return put_again(w, value, NULL, 0, 0);
}
cairn_status gguf_put_longer(cairn_gguf_writer *w, const gguf_value *array, const void *element, size_t bytes)
{
    assert(array->array);
    return put_again(w, array, element, bytes, 1);
}

cairn_status cairn_gguf_put_byte_vocab(cairn_gguf_writer *w, bool landmark)
{
    enum { NORMAL_BYTES = 256, FIRST = 3, ALL = FIRST + NORMAL_BYTES + 1 };
    enum { UNKNOWN = 2, CONTROL = 3, BYTE = 6 }; /* of tokenizer.ggml.token_type */
    char names[NORMAL_BYTES][8];
    const char *tokens[ALL] = {"<unk>", "<s>", "</s>"};
    float scores[ALL] = {0};
    int32_t kinds[ALL] = {UNKNOWN, CONTROL, CONTROL};
    for (int i = 0; i < NORMAL_BYTES; i++) {
        snprintf(names[i], sizeof names[i], "<0x%02X>", i);
        tokens[FIRST + i] = names[i];
        kinds[FIRST + i] = BYTE;
    }
    tokens[ALL - 1] = "<landmark>";
    kinds[ALL - 1] = CONTROL;
    size_t n = landmark ? ALL : ALL - 1;
    cairn_status st;
    if ((st = cairn_gguf_put_string(w, "tokenizer.ggml.model", "llama")) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, n)) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_f32s(w, "tokenizer.ggml.scores", scores, n)) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_i32s(w, "tokenizer.ggml.token_type", kinds, n)) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_u32(w, "tokenizer.ggml.bos_token_id", 1)) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_u32(w, "tokenizer.ggml.eos_token_id", 2)) != CAIRN_OK) return st;
    if ((st = cairn_gguf_put_u32(w, "tokenizer.ggml.unknown_token_id", 0)) != CAIRN_OK) return st;
    return cairn_gguf_put_bool(w, "tokenizer.ggml.add_bos_token", true);
}

/* ---- tensors ---- */

/* Blocks of 32: d = max|x| / 127 as f16, then round(x / d) as int8; d itself is divided by before it is rounded, as
 * ggml's reference quantizer does. */
static void quantize_q8_0(uint8_t *out, const float *x, size_t n, const cairn_kernels *kernels)
{
    for (size_t i = 0; i < n; i += Q8_0_BLOCK, out += Q8_0_BYTES) {
        float largest = 0;
        for (size_t j = 0; j < Q8_0_BLOCK; j++) largest = fmaxf(largest, fabsf(x[i + j]));
        float d = largest / 127.0f;
        float inverse = d != 0 ? 1.0f / d : 0;
        kernels->narrow(out, &d, CAIRN_F16, 1);
        for (size_t j = 0; j < Q8_0_BLOCK; j++) out[2 + j] = (uint8_t)(int8_t)roundf(x[i + j] * inverse);
    }
}

static cairn_status convert(out_tensor *t, const char *name, cairn_gguf_type type, size_t n, const float *data)
{
    const cairn_kernels *kernels = cairn_kernels_best();
    t->data = cairn_alloc(t->bytes);
    if (t->data == NULL) return cairn_fail(CAIRN_NO_MEMORY, "tensor '%s' of %zu bytes", name, t->bytes);
    switch (type) {
    case CAIRN_GGUF_F32: memcpy(t->data, data, t->bytes); break;
    case CAIRN_GGUF_F16: kernels->narrow(t->data, data, CAIRN_F16, n); break;
    case CAIRN_GGUF_BF16: kernels->narrow(t->data, data, CAIRN_BF16, n); break;
    case CAIRN_GGUF_Q8_0: quantize_q8_0(t->data, data, n, kernels); break;
    }
    return CAIRN_OK;
}

cairn_status cairn_gguf_put_tensor(cairn_gguf_writer *w, const char *name, cairn_gguf_type type, const uint64_t *dims,
                                   uint32_t n_dims, const float *data)
{
    size_t name_bytes = strlen(name);
    size_t elements = 1;
    size_t all;
    out_tensor t = {0};
    cairn_status st = check_new(w, 't', name);
    if (st != CAIRN_OK) return st;
    if (name_bytes == 0 || name_bytes > 64)
        return cairn_fail(CAIRN_INVALID, "tensor '%.80s': a name of %zu bytes (1..64)", name, name_bytes);
    if (type != CAIRN_GGUF_F32 && type != CAIRN_GGUF_F16 && type != CAIRN_GGUF_BF16 && type != CAIRN_GGUF_Q8_0)
        return cairn_fail(CAIRN_INVALID, "tensor '%s': type %d cannot be written", name, (int)type);
    if (n_dims < 1 || n_dims > 4) return cairn_fail(CAIRN_INVALID, "tensor '%s': %u dimensions", name, n_dims);
    t.bytes = gguf_row_bytes(type, dims[0]);
    for (uint32_t i = 0; i < n_dims; i++)
        if (dims[i] == 0 || !cairn_mul_size(elements, dims[i], &elements) ||
            (i > 0 && !cairn_mul_size(t.bytes, dims[i], &t.bytes)))
            return cairn_fail(CAIRN_INVALID, "tensor '%s': dimension %u is %llu", name, i, (unsigned long long)dims[i]);
    if (t.bytes == 0)
        return cairn_fail(CAIRN_INVALID, "tensor '%s': rows of %llu elements are no whole %s blocks", name,
                          (unsigned long long)dims[0], gguf_type_name(type));
    if (!cairn_add_size(w->data_bytes, t.bytes, &all) || all > SIZE_MAX - ALIGNMENT)
        return cairn_fail(CAIRN_INVALID, "tensor '%s': %zu bytes", name, t.bytes);

    if (w->n_tensors == w->cap_tensors) {
        size_t cap = w->cap_tensors != 0 ? w->cap_tensors * 2 : 64;
        void *bigger = cairn_grow(w->data, w->n_tensors * sizeof t, cap, sizeof t);
        if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "list of %zu tensors", cap);
        w->data = bigger;
        w->cap_tensors = cap;
    }
    if ((st = convert(&t, name, type, elements, data)) != CAIRN_OK) return st;
    size_t before = w->tensors.n;
    uint8_t *at = extend(&w->tensors, 8 + name_bytes + 4 + 8 * (size_t)n_dims + 4 + 8);
    if (at == NULL || !remember(w, 't', name)) {
        w->tensors.n = before;
        cairn_free(t.data);
        return cairn_fail(CAIRN_NO_MEMORY, "description of tensor '%s'", name);
    }
    at = put_text(at, name, name_bytes);
    cairn_put_le32(at, n_dims);
    for (uint32_t i = 0; i < n_dims; i++) cairn_put_le64(at + 4 + 8 * i, dims[i]);
    at += 4 + 8 * n_dims;
    cairn_put_le32(at, type);
    cairn_put_le64(at + 4, w->data_bytes);
    w->data[w->n_tensors++] = t;
    w->data_bytes = padded(all);
    return CAIRN_OK;
}

/* ---- the file ---- */

static bool put_bytes(FILE *f, const void *data, size_t n)
{
    return n == 0 || fwrite(data, 1, n, f) == n; /* an empty part has no address */
}

static bool write_all(FILE *f, const void *writer)
{
    const cairn_gguf_writer *w = writer;
    static const uint8_t zeros[ALIGNMENT];
    uint8_t header[24] = "GGUF";
    cairn_put_le32(header + 4, 3);
    cairn_put_le64(header + 8, w->n_tensors);
    cairn_put_le64(header + 16, w->n_values);
    size_t n = sizeof header + w->values.n + w->tensors.n;
    if (!put_bytes(f, header, sizeof header)) return false;
    if (!put_bytes(f, w->values.data, w->values.n)) return false;
    if (!put_bytes(f, w->tensors.data, w->tensors.n)) return false;
    if (!put_bytes(f, zeros, padded(n) - n)) return false;
    for (size_t i = 0; i < w->n_tensors; i++) {
        n = w->data[i].bytes;
        if (!put_bytes(f, w->data[i].data, n) || !put_bytes(f, zeros, padded(n) - n)) return false;
    }
    return true;
}

cairn_status cairn_gguf_writer_save(cairn_gguf_writer *w, const char *path)
{
    return cairn_replace_file(path, write_all, w);
}
