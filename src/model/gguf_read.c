/* gguf_read.c - parses a GGUF file whose every byte may be hostile.
 *
 *   magic "GGUF", u32 version, u64 tensors, u64 values
 *   values:   key string, u32 type, value          string = u64 bytes, bytes
 *   tensors:  name string, u32 n_dims, u64 dims (n_dims, fastest first), u32 type, u64 offset
 *   padding to general.alignment (32 if not given)
 *   data:     a tensor starts at its offset from here, a multiple of the alignment
 *
 * One cursor walks the bytes; each length is compared with what is left before it is believed, so the walk ends within
 * the file whatever it says. Tables grow as entries are really found (an entry costs at least 14 bytes of file), so
 * memory is a small multiple of the file. There is no recursion: arrays of arrays are refused, as ggml does. */
#include "gguf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    GGUF_KEY_BYTES_MAX = 65535,  /* the format's own limit */
    GGUF_NAME_BYTES_MAX = 64,    /* likewise, for tensors */
    GGUF_ENTRIES_MAX = 1 << 20,  /* values, and tensors: far beyond any model */
    GGUF_DEFAULT_ALIGNMENT = 32, /* general.alignment changes it; a multiple of 8 by the format */
};

typedef struct type_size {
    const char *name;
    uint16_t elements; /* in a block */
    uint16_t bytes;
} type_size;

static const uint8_t value_bytes[GGUF_VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* Sizes of ggml's types: known so that the extents of every tensor can be checked, though few of them are computed
 * with. Numbers without a name were withdrawn. */
static const type_size types[] = {
    [0] = {"F32", 1, 4},         [1] = {"F16", 1, 2},         [2] = {"Q4_0", 32, 18},      [3] = {"Q4_1", 32, 20},
    [6] = {"Q5_0", 32, 22},      [7] = {"Q5_1", 32, 24},      [8] = {"Q8_0", 32, 34},      [9] = {"Q8_1", 32, 36},
    [10] = {"Q2_K", 256, 84},    [11] = {"Q3_K", 256, 110},   [12] = {"Q4_K", 256, 144},   [13] = {"Q5_K", 256, 176},
    [14] = {"Q6_K", 256, 210},   [15] = {"Q8_K", 256, 292},   [16] = {"IQ2_XXS", 256, 66}, [17] = {"IQ2_XS", 256, 74},
    [18] = {"IQ3_XXS", 256, 98}, [19] = {"IQ1_S", 256, 50},   [20] = {"IQ4_NL", 32, 18},   [21] = {"IQ3_S", 256, 110},
    [22] = {"IQ2_S", 256, 82},   [23] = {"IQ4_XS", 256, 136}, [24] = {"I8", 1, 1},         [25] = {"I16", 1, 2},
    [26] = {"I32", 1, 4},        [27] = {"I64", 1, 8},        [28] = {"F64", 1, 8},        [29] = {"IQ1_M", 256, 56},
    [30] = {"BF16", 1, 2},       [34] = {"TQ1_0", 256, 54},   [35] = {"TQ2_0", 256, 66},   [39] = {"MXFP4", 32, 17},
};

const char *gguf_type_name(uint32_t type)
{
    return type < sizeof types / sizeof *types ? types[type].name : NULL;
}

size_t gguf_row_bytes(uint32_t type, uint64_t cols)
{
    size_t bytes;
    if (gguf_type_name(type) == NULL || cols % types[type].elements != 0) return 0;
    return cairn_mul_size(cols / types[type].elements, types[type].bytes, &bytes) ? bytes : 0;
}

const char *gguf_value_type_name(uint32_t type)
{
    static const char *const names[GGUF_VALUE_TYPES] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                                        "bool", "string", "array", "u64", "i64", "f64"};
    return type < GGUF_VALUE_TYPES ? names[type] : "unknown";
}

gguf_shown gguf_show(gguf_text text)
{
    gguf_shown shown;
    size_t n = text.bytes <= 63 ? text.bytes : 60;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text.data[i];
        shown.text[i] = c >= 0x20 && c < 0x7f ? (char)c : '?';
    }
    memcpy(shown.text + n, n < text.bytes ? "..." : "", n < text.bytes ? 4 : 1);
    return shown;
}

bool gguf_text_is(gguf_text text, const char *word)
{
    return text.bytes == strlen(word) && memcmp(text.data, word, text.bytes) == 0;
}

/* ---- the cursor ---- */

typedef struct cursor {
    const uint8_t *data;
    size_t at;
    size_t end;
} cursor;

static bool take(cursor *c, size_t bytes, const uint8_t **out)
{
    if (bytes > c->end - c->at) return false;
    *out = c->data + c->at;
    c->at += bytes;
    return true;
}

static cairn_status take_u32(cursor *c, const char *what, uint32_t *out)
{
    const uint8_t *p;
    *out = 0;
    if (!take(c, 4, &p)) return cairn_fail(CAIRN_CORRUPT, "%s: the file ends at byte %zu", what, c->end);
    *out = cairn_get_le32(p);
    return CAIRN_OK;
}

static cairn_status take_u64(cursor *c, const char *what, uint64_t *out)
{
    const uint8_t *p;
    *out = 0;
    if (!take(c, 8, &p)) return cairn_fail(CAIRN_CORRUPT, "%s: the file ends at byte %zu", what, c->end);
    *out = cairn_get_le64(p);
    return CAIRN_OK;
}

static cairn_status take_text(cursor *c, const char *what, gguf_text *out)
{
    uint64_t bytes;
    const uint8_t *p;
    cairn_status st = take_u64(c, what, &bytes);
    if (st != CAIRN_OK) return st;
    if (!take(c, bytes, &p))
        return cairn_fail(CAIRN_CORRUPT, "%s: a string of %llu bytes at byte %zu, the file has %zu more", what,
                          (unsigned long long)bytes, c->at, c->end - c->at);
    *out = (gguf_text){(const char *)p, bytes};
    return CAIRN_OK;
}

/* ---- values ---- */

static cairn_status take_array(cursor *c, const char *what, gguf_value *value)
{
    uint32_t type;
    uint64_t count;
    size_t bytes;
    cairn_status st;
    if ((st = take_u32(c, what, &type)) != CAIRN_OK) return st;
    if ((st = take_u64(c, what, &count)) != CAIRN_OK) return st;
    if (type == GGUF_ARRAY) return cairn_fail(CAIRN_UNSUPPORTED, "%s: an array of arrays", what);
    if (type >= GGUF_VALUE_TYPES) return cairn_fail(CAIRN_CORRUPT, "%s: array elements of type %u", what, type);
    value->array = true;
    value->type = (gguf_value_type)type;
    value->data = c->data + c->at;
    if (type != GGUF_STRING) {
        const uint8_t *p;
        if (!cairn_mul_size(count, value_bytes[type], &bytes) || !take(c, bytes, &p))
            return cairn_fail(CAIRN_CORRUPT, "%s: an array of %llu x %s at byte %zu, the file has %zu bytes more", what,
                              (unsigned long long)count, gguf_value_type_name(type), c->at, c->end - c->at);
        value->bytes = bytes;
    } else {
        size_t start = c->at;
        if (count > (c->end - c->at) / 8) /* each string has 8 bytes of length: no long walk for a lie */
            return cairn_fail(CAIRN_CORRUPT, "%s: an array of %llu strings at byte %zu, the file has %zu bytes more",
                              what, (unsigned long long)count, c->at, c->end - c->at);
        for (uint64_t i = 0; i < count; i++) {
            gguf_text text;
            if ((st = take_text(c, what, &text)) != CAIRN_OK) return st;
        }
        value->bytes = c->at - start;
    }
    value->count = count;
    return CAIRN_OK;
}

static cairn_status take_value(cursor *c, size_t number, gguf_value *value)
{
    char what[128];
    uint32_t type;
    cairn_status st;
    memset(value, 0, sizeof *value);
    snprintf(what, sizeof what, "key %zu", number);
    if ((st = take_text(c, what, &value->key)) != CAIRN_OK) return st;
    if (value->key.bytes == 0) return cairn_fail(CAIRN_CORRUPT, "key %zu is empty", number);
    if (value->key.bytes > GGUF_KEY_BYTES_MAX)
        return cairn_fail(CAIRN_CORRUPT, "key %zu has %zu bytes, more than %d", number, value->key.bytes,
                          GGUF_KEY_BYTES_MAX);
    snprintf(what, sizeof what, "key '%s'", gguf_show(value->key).text);
    if ((st = take_u32(c, what, &type)) != CAIRN_OK) return st;
    if (type >= GGUF_VALUE_TYPES) return cairn_fail(CAIRN_CORRUPT, "%s: a value of type %u", what, type);
    if (type == GGUF_ARRAY) return take_array(c, what, value);

    value->type = (gguf_value_type)type;
    value->count = 1;
    if (type == GGUF_STRING) {
        size_t start = c->at;
        gguf_text text;
        value->data = c->data + start;
        st = take_text(c, what, &text);
        value->bytes = c->at - start;
        return st;
    }
    value->bytes = value_bytes[type];
    if (!take(c, value->bytes, &value->data))
        return cairn_fail(CAIRN_CORRUPT, "%s: the file ends at byte %zu", what, c->end);
    return CAIRN_OK;
}

/* ---- tensors: first all their descriptions, then, when the start of the data is known, their places ---- */

static cairn_status take_tensor(cursor *c, size_t number, gguf_tensor *tensor, uint64_t *offset)
{
    char what[128];
    cairn_status st;
    memset(tensor, 0, sizeof *tensor);
    snprintf(what, sizeof what, "tensor %zu", number);
    if ((st = take_text(c, what, &tensor->name)) != CAIRN_OK) return st;
    if (tensor->name.bytes == 0 || tensor->name.bytes > GGUF_NAME_BYTES_MAX)
        return cairn_fail(CAIRN_CORRUPT, "tensor %zu has a name of %zu bytes (1..%d)", number, tensor->name.bytes,
                          GGUF_NAME_BYTES_MAX);
    snprintf(what, sizeof what, "tensor '%s'", gguf_show(tensor->name).text);
    if ((st = take_u32(c, what, &tensor->n_dims)) != CAIRN_OK) return st;
    if (tensor->n_dims < 1 || tensor->n_dims > 4)
        return cairn_fail(CAIRN_CORRUPT, "%s has %u dimensions (1..4)", what, tensor->n_dims);
    for (uint32_t i = 0; i < 4; i++) tensor->dims[i] = 1;
    for (uint32_t i = 0; i < tensor->n_dims; i++) {
        if ((st = take_u64(c, what, &tensor->dims[i])) != CAIRN_OK) return st;
        if (tensor->dims[i] == 0 || tensor->dims[i] > INT64_MAX)
            return cairn_fail(CAIRN_CORRUPT, "%s: dimension %u is %llu", what, i, (unsigned long long)tensor->dims[i]);
    }
    if ((st = take_u32(c, what, &tensor->type)) != CAIRN_OK) return st;
    if ((st = take_u64(c, what, offset)) != CAIRN_OK) return st;
    if (gguf_type_name(tensor->type) == NULL)
        return cairn_fail(CAIRN_UNSUPPORTED, "%s has type %u, which is not known", what, tensor->type);

    size_t bytes = gguf_row_bytes(tensor->type, tensor->dims[0]);
    if (bytes == 0)
        return cairn_fail(CAIRN_CORRUPT, "%s: rows of %llu elements are no whole %s blocks", what,
                          (unsigned long long)tensor->dims[0], gguf_type_name(tensor->type));
    for (uint32_t i = 1; i < 4; i++)
        if (!cairn_mul_size(bytes, tensor->dims[i], &bytes))
            return cairn_fail(CAIRN_CORRUPT, "%s: %llu x %llu x %llu x %llu elements overflow", what,
                              (unsigned long long)tensor->dims[0], (unsigned long long)tensor->dims[1],
                              (unsigned long long)tensor->dims[2], (unsigned long long)tensor->dims[3]);
    tensor->bytes = bytes;
    return CAIRN_OK;
}

static int by_place(const void *a, const void *b)
{
    const gguf_tensor *x = a;
    const gguf_tensor *y = b;
    return (x->data > y->data) - (x->data < y->data);
}

static cairn_status place_tensors(gguf *file, const uint64_t *offsets, size_t start)
{
    size_t room = start <= file->bytes ? file->bytes - start : 0;
    for (size_t i = 0; i < file->n_tensors; i++) {
        gguf_tensor *t = &file->tensors[i];
        if (offsets[i] % file->alignment != 0)
            return cairn_fail(CAIRN_CORRUPT, "tensor '%s' starts at offset %llu, which is no multiple of %zu",
                              gguf_show(t->name).text, (unsigned long long)offsets[i], file->alignment);
        if (offsets[i] > room || t->bytes > room - offsets[i])
            return cairn_fail(CAIRN_CORRUPT,
                              "tensor '%s' needs %zu bytes at offset %llu, the file has %zu bytes of data",
                              gguf_show(t->name).text, t->bytes, (unsigned long long)offsets[i], room);
        t->data = file->data + start + offsets[i];
    }
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, by_place);
    for (size_t i = 1; i < file->n_tensors; i++) {
        const gguf_tensor *a = &file->tensors[i - 1];
        const gguf_tensor *b = &file->tensors[i];
        if (a->data + a->bytes > b->data)
            return cairn_fail(CAIRN_CORRUPT, "tensors '%s' and '%s' overlap by %zu bytes", gguf_show(a->name).text,
                              gguf_show(b->name).text, (size_t)(a->data + a->bytes - b->data));
    }
    return CAIRN_OK;
}

/* ---- the whole file ---- */

static int compare_text(gguf_text a, gguf_text b)
{
    size_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    int order = memcmp(a.data, b.data, n);
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}
static int by_key(const void *a, const void *b)
{
    return compare_text(((const gguf_value *)a)->key, ((const gguf_value *)b)->key);
}
static int by_name(const void *a, const void *b)
{
    return compare_text(((const gguf_tensor *)a)->name, ((const gguf_tensor *)b)->name);
}

/* Room for one more entry in a table of *cap, doubled as needed; NULL when out of memory, the old table stays. */
static void *reserve(void *table, size_t n, size_t *cap, size_t size)
{
    if (table != NULL && n < *cap) return table;
    size_t wanted = *cap != 0 ? *cap * 2 : 64;
    void *bigger = cairn_grow(table, n * size, wanted, size);
    if (bigger != NULL) *cap = wanted;
    return bigger;
}

static cairn_status read_header(cursor *c, gguf *file, uint64_t *n_tensors, uint64_t *n_values)
{
    const uint8_t *magic;
    cairn_status st;
    if (!take(c, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return cairn_fail(CAIRN_INVALID, "this is not a GGUF file: it does not start with 'GGUF'");
    if ((st = take_u32(c, "GGUF version", &file->version)) != CAIRN_OK) return st;
    if (file->version == 0x02000000 || file->version == 0x03000000)
        return cairn_fail(CAIRN_UNSUPPORTED, "a big-endian GGUF file");
    if (file->version != 2 && file->version != 3)
        return cairn_fail(CAIRN_UNSUPPORTED, "GGUF version %u (2 and 3 are read)", file->version);
    if ((st = take_u64(c, "number of tensors", n_tensors)) != CAIRN_OK) return st;
    if ((st = take_u64(c, "number of keys", n_values)) != CAIRN_OK) return st;
    /* 14 = 8 (key length) + 1 (key) + 4 (type) + 1 (value); 33 = 8 + 1 + 4 + 8 (one dimension) + 4 + 8 */
    size_t left = c->end - c->at;
    if (*n_values > left / 14 || *n_values > GGUF_ENTRIES_MAX)
        return cairn_fail(CAIRN_CORRUPT, "%llu keys in a file of %zu bytes", (unsigned long long)*n_values, c->end);
    if (*n_tensors > left / 33 || *n_tensors > GGUF_ENTRIES_MAX)
        return cairn_fail(CAIRN_CORRUPT, "%llu tensors in a file of %zu bytes", (unsigned long long)*n_tensors, c->end);
    return CAIRN_OK;
}

static cairn_status read_values(cursor *c, gguf *file, uint64_t n)
{
    size_t cap = 0;
    cairn_status st;
    while (file->n_values < n) {
        gguf_value *table = reserve(file->values, file->n_values, &cap, sizeof *table);
        if (table == NULL) return cairn_fail(CAIRN_NO_MEMORY, "table of %zu GGUF keys", file->n_values + 1);
        file->values = table;
        if ((st = take_value(c, file->n_values, &table[file->n_values])) != CAIRN_OK) return st;
        file->n_values++;
    }
    if (n != 0) qsort(file->values, file->n_values, sizeof *file->values, by_key);
    for (size_t i = 1; i < file->n_values; i++)
        if (by_key(&file->values[i - 1], &file->values[i]) == 0)
            return cairn_fail(CAIRN_CORRUPT, "key '%s' is there twice", gguf_show(file->values[i].key).text);

    uint32_t alignment = GGUF_DEFAULT_ALIGNMENT;
    if ((st = gguf_u32(file, "general.alignment", &alignment)) != CAIRN_OK) return st;
    if (alignment < 8 || (alignment & (alignment - 1)) != 0)
        return cairn_fail(CAIRN_CORRUPT, "general.alignment is %u: not a power of two from 8 on", alignment);
    file->alignment = alignment;
    return CAIRN_OK;
}

static cairn_status read_tensors(cursor *c, gguf *file, uint64_t n)
{
    size_t cap = 0;
    size_t cap_offsets = 0;
    uint64_t *offsets = NULL;
    size_t start;
    cairn_status st = CAIRN_OK;
    while (file->n_tensors < n) {
        gguf_tensor *table = reserve(file->tensors, file->n_tensors, &cap, sizeof *table);
        if (table != NULL) file->tensors = table;
        uint64_t *places = reserve(offsets, file->n_tensors, &cap_offsets, sizeof *places);
        if (places != NULL) offsets = places;
        if (table == NULL || places == NULL) {
            st = cairn_fail(CAIRN_NO_MEMORY, "table of %zu GGUF tensors", file->n_tensors + 1);
            goto out;
        }
        st = take_tensor(c, file->n_tensors, &table[file->n_tensors], &places[file->n_tensors]);
        if (st != CAIRN_OK) goto out;
        file->n_tensors++;
    }
    if (offsets == NULL) goto out;                                  /* no tensors */
    start = (c->at + file->alignment - 1) & ~(file->alignment - 1); /* both far below SIZE_MAX / 2 */
    if ((st = place_tensors(file, offsets, start)) != CAIRN_OK) goto out;
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, by_name);
    for (size_t i = 1; i < file->n_tensors; i++)
        if (by_name(&file->tensors[i - 1], &file->tensors[i]) == 0) {
            st = cairn_fail(CAIRN_CORRUPT, "tensor '%s' is there twice", gguf_show(file->tensors[i].name).text);
            goto out;
        }
out:
    cairn_free(offsets);
    return st;
}

cairn_status gguf_parse(const void *data, size_t bytes, gguf *out)
{
    cursor c = {data, 0, bytes};
    uint64_t n_tensors = 0;
    uint64_t n_values = 0;
    cairn_status st;
    *out = (gguf){.data = data, .bytes = bytes, .alignment = GGUF_DEFAULT_ALIGNMENT};
    if ((st = read_header(&c, out, &n_tensors, &n_values)) != CAIRN_OK) goto out;
    if ((st = read_values(&c, out, n_values)) != CAIRN_OK) goto out;
    st = read_tensors(&c, out, n_tensors);
out:
    if (st != CAIRN_OK) gguf_close(out);
    return st;
}

cairn_status gguf_open(const char *path, gguf *out)
{
    struct stat info;
    void *map = MAP_FAILED;
    cairn_status st;
    memset(out, 0, sizeof *out);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (fd < 0) return cairn_fail_errno(errno, "opening model %s", path);
    if (fstat(fd, &info) != 0) {
        st = cairn_fail_errno(errno, "looking at model %s", path);
        goto out;
    }
    if (!S_ISREG(info.st_mode)) {
        st = cairn_fail(CAIRN_INVALID, "model %s is not a regular file", path);
        goto out;
    }
    if (info.st_size == 0) {
        st = cairn_fail(CAIRN_INVALID, "model %s is empty", path);
        goto out;
    }
    size_t bytes = (size_t)info.st_size;
    map = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        st = cairn_fail_errno(errno, "mapping %zu bytes of model %s", bytes, path);
        goto out;
    }
    st = gguf_parse(map, bytes, out);
    if (st == CAIRN_OK) {
        out->map = map;
    } else {
        munmap(map, bytes);
        st = cairn_fail_within(st, "model %s", path);
    }
out:
    close(fd);
    return st;
}

void gguf_close(gguf *file)
{
    cairn_free(file->values);
    cairn_free(file->tensors);
    if (file->map != NULL) munmap(file->map, file->bytes);
    memset(file, 0, sizeof *file);
}

/* ---- looking things up ---- */

const gguf_value *gguf_find(const gguf *file, const char *key)
{
    gguf_value wanted = {.key = {key, strlen(key)}};
    return file->n_values != 0 ? bsearch(&wanted, file->values, file->n_values, sizeof wanted, by_key) : NULL;
}

const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name)
{
    gguf_tensor wanted = {.name = {name, strlen(name)}};
    return file->n_tensors != 0 ? bsearch(&wanted, file->tensors, file->n_tensors, sizeof wanted, by_name) : NULL;
}

bool gguf_value_integer(const gguf_value *value, size_t i, int64_t *out)
{
    const uint8_t *p = value->data + i * value_bytes[value->type];
    switch (value->type) {
    case GGUF_U8: *out = *p; return true;
    case GGUF_I8: *out = *p < 128 ? *p : *p - 256; return true;
    case GGUF_U16: *out = cairn_get_le16(p); return true;
    case GGUF_I16: *out = (int16_t)cairn_get_le16(p); return true;
    case GGUF_U32: *out = cairn_get_le32(p); return true;
    case GGUF_I32: *out = (int32_t)cairn_get_le32(p); return true;
    case GGUF_I64: *out = (int64_t)cairn_get_le64(p); return true;
    case GGUF_U64: *out = (int64_t)cairn_get_le64(p); return *out >= 0;
    default: return false;
    }
}

bool gguf_value_float(const gguf_value *value, size_t i, double *out)
{
    const uint8_t *p = value->data + i * value_bytes[value->type];
    if (value->type == GGUF_F32) {
        uint32_t bits = cairn_get_le32(p);
        float x;
        memcpy(&x, &bits, sizeof x);
        *out = (double)x;
        return true;
    }
    if (value->type == GGUF_F64) {
        uint64_t bits = cairn_get_le64(p);
        memcpy(out, &bits, sizeof *out);
        return true;
    }
    return false;
}

static cairn_status wrong_type(const gguf_value *value, const char *key, const char *wanted)
{
    return cairn_fail(CAIRN_INVALID, "key '%s' is %s%s, not %s", key, value->array ? "an array of " : "of type ",
                      gguf_value_type_name(value->type), wanted);
}

cairn_status gguf_u32(const gguf *file, const char *key, uint32_t *out)
{
    const gguf_value *value = gguf_find(file, key);
    int64_t number;
    if (value == NULL) return CAIRN_OK;
    if (value->array || !gguf_value_integer(value, 0, &number)) return wrong_type(value, key, "an integer");
    if (number < 0 || number > UINT32_MAX)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %lld, out of range", key, (long long)number);
    *out = (uint32_t)number;
    return CAIRN_OK;
}

cairn_status gguf_f32(const gguf *file, const char *key, float *out)
{
    const gguf_value *value = gguf_find(file, key);
    double number;
    if (value == NULL) return CAIRN_OK;
    if (value->array || !gguf_value_float(value, 0, &number)) return wrong_type(value, key, "a float");
    *out = (float)number;
    return CAIRN_OK;
}

cairn_status gguf_bool(const gguf *file, const char *key, bool *out)
{
    const gguf_value *value = gguf_find(file, key);
    if (value == NULL) return CAIRN_OK;
    if (value->array || value->type != GGUF_BOOL) return wrong_type(value, key, "a bool");
    *out = value->data[0] != 0;
    return CAIRN_OK;
}

cairn_status gguf_string(const gguf *file, const char *key, gguf_text *out)
{
    const gguf_value *value = gguf_find(file, key);
    size_t at = 0;
    if (value == NULL) return CAIRN_OK;
    if (value->array || value->type != GGUF_STRING) return wrong_type(value, key, "a string");
    *out = gguf_next_string(value, &at);
    return CAIRN_OK;
}

gguf_text gguf_next_string(const gguf_value *value, size_t *at)
{
    const uint8_t *p = value->data + *at;
    gguf_text text = {(const char *)p + 8, cairn_get_le64(p)};
    *at += 8 + text.bytes;
    return text;
}
