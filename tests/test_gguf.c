/* test_gguf.c - GGUF files: ours, other programs', broken and hostile ones. */
#include "model_fixture.h"
#include "tiny_model.h"

#include <sys/stat.h>
#include <unistd.h>

#include "fuzz/gguf.c" /* the entry itself: what fuzzers found is replayed here */

/* ---- a file byte by byte, as the format describes it and without the library's writer ---- */

typedef struct raw {
    uint8_t bytes[8192];
    size_t n;
} raw;

static void put(raw *r, const void *data, size_t n)
{
    assert_true(n <= sizeof r->bytes - r->n);
    memcpy(r->bytes + r->n, data, n);
    r->n += n;
}
static void put32(raw *r, uint32_t v)
{
    uint8_t b[4];
    cairn_put_le32(b, v);
    put(r, b, 4);
}
static void put64(raw *r, uint64_t v)
{
    uint8_t b[8];
    cairn_put_le64(b, v);
    put(r, b, 8);
}
static void put_text(raw *r, const char *text)
{
    put64(r, strlen(text));
    put(r, text, strlen(text));
}
static void head(raw *r, uint32_t version, uint64_t tensors, uint64_t values)
{
    put(r, "GGUF", 4);
    put32(r, version);
    put64(r, tensors);
    put64(r, values);
}
static void key(raw *r, const char *name, uint32_t type)
{
    put_text(r, name);
    put32(r, type);
}
static void key_u32(raw *r, const char *name, uint32_t value)
{
    key(r, name, GGUF_U32);
    put32(r, value);
}
static void key_array(raw *r, const char *name, uint32_t type, uint64_t n)
{
    key(r, name, GGUF_ARRAY);
    put32(r, type);
    put64(r, n);
}
static void tensor(raw *r, const char *name, uint64_t cols, uint64_t rows, uint32_t type, uint64_t offset)
{
    put_text(r, name);
    put32(r, 2);
    put64(r, cols);
    put64(r, rows);
    put32(r, type);
    put64(r, offset);
}
static void data(raw *r, size_t n)
{
    static const uint8_t zeros[4096];
    put(r, zeros, (32 - r->n % 32) % 32);
    put(r, zeros, n);
}

static void good_file(raw *r)
{
    head(r, 3, 2, 5);
    key(r, "general.architecture", GGUF_STRING);
    put_text(r, "llama");
    key_u32(r, "number", 7);
    key_array(r, "list", GGUF_I32, 3);
    for (uint32_t i = 0; i < 3; i++) put32(r, 0u - i);
    key_array(r, "words", GGUF_STRING, 2);
    put_text(r, "");
    put_text(r, "second");
    key(r, "flag", GGUF_BOOL);
    put(r, "\1", 1);
    tensor(r, "a", 4, 3, CAIRN_GGUF_F32, 0);
    tensor(r, "b", 32, 2, CAIRN_GGUF_Q8_0, 64);
    data(r, 64 + 68);
}

/* Exactly n bytes on the heap, so that the address sanitizer sees one byte too far. */
static cairn_status parse_exact(const void *bytes, size_t n, gguf *out)
{
    uint8_t *copy = malloc(n != 0 ? n : 1);
    assert_non_null(copy);
    if (n != 0) memcpy(copy, bytes, n);
    cairn_status st = gguf_parse(copy, n, out);
    if (st == CAIRN_OK) gguf_close(out);
    free(copy);
    return st;
}

static void a_file_made_by_hand_is_read_as_the_format_says(void **state)
{
    (void)state;
    raw r = {.n = 0};
    gguf f;
    uint32_t number = 0;
    int64_t last;
    size_t at = 0;
    good_file(&r);
    assert_ok(gguf_parse(r.bytes, r.n, &f));
    assert_int_equal(f.n_values, 5);
    assert_int_equal(f.n_tensors, 2);
    assert_ok(gguf_u32(&f, "number", &number));
    assert_int_equal(number, 7);
    assert_true(gguf_value_integer(gguf_find(&f, "list"), 2, &last));
    assert_int_equal(last, -2);
    const gguf_value *words = gguf_find(&f, "words");
    assert_int_equal(gguf_next_string(words, &at).bytes, 0);
    assert_true(gguf_text_is(gguf_next_string(words, &at), "second"));
    assert_int_equal(at, words->bytes);
    const gguf_tensor *b = gguf_find_tensor(&f, "b");
    assert_int_equal(b->bytes, 68);
    assert_ptr_equal(b->data + b->bytes, r.bytes + r.n);
    assert_null(gguf_find(&f, "absent"));
    assert_null(gguf_find_tensor(&f, "c"));
    number = 99;
    assert_ok(gguf_u32(&f, "absent", &number));
    assert_int_equal(number, 99);
    assert_int_equal(gguf_u32(&f, "flag", &number), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "'flag' is of type bool, not an integer"));
    gguf_close(&f);
}

static void every_truncation_of_a_file_is_refused(void **state)
{
    (void)state;
    raw r = {.n = 0};
    gguf f;
    good_file(&r);
    for (size_t n = 0; n < r.n; n++) {
        cairn_status st = parse_exact(r.bytes, n, &f);
        if (st != CAIRN_CORRUPT && st != CAIRN_INVALID) fail_msg("%zu of %zu bytes: %s", n, r.n, cairn_status_name(st));
    }
    assert_ok(parse_exact(r.bytes, r.n, &f));
}

/* ---- hostile files ---- */

static void h_magic(raw *r)
{
    good_file(r);
    r->bytes[0] = 'g';
}
static void h_old(raw *r)
{
    head(r, 1, 0, 0);
}
static void h_big_endian(raw *r)
{
    head(r, 0x03000000, 0, 0);
}
static void h_many_keys(raw *r)
{
    head(r, 3, 0, UINT64_MAX);
    data(r, 64);
}
static void h_many_tensors(raw *r)
{
    head(r, 3, 1u << 30, 0);
    data(r, 64);
}
static void h_key_length(raw *r)
{
    head(r, 3, 0, 1);
    put64(r, UINT64_MAX - 3);
    data(r, 64);
}
static void h_key_empty(raw *r)
{
    head(r, 3, 0, 1);
    key_u32(r, "", 1);
    data(r, 8);
}
static void h_value_type(raw *r)
{
    head(r, 3, 0, 1);
    key(r, "x", 13);
    data(r, 8);
}
static void h_string_length(raw *r)
{
    head(r, 3, 0, 1);
    key(r, "name", GGUF_STRING);
    put64(r, 1000);
    data(r, 8);
}
static void h_nested(raw *r)
{
    head(r, 3, 0, 1);
    key_array(r, "deep", GGUF_ARRAY, 1);
    data(r, 64);
}
static void h_element_type(raw *r)
{
    head(r, 3, 0, 1);
    key_array(r, "odd", 77, 1);
    data(r, 64);
}
static void h_array_wraps(raw *r) /* 2^62 x 4 bytes is 0 in 64 bits */
{
    head(r, 3, 0, 1);
    key_array(r, "long", GGUF_U32, UINT64_C(1) << 62);
    data(r, 64);
}
static void h_array_long(raw *r)
{
    head(r, 3, 0, 1);
    key_array(r, "long", GGUF_F32, 1000);
    data(r, 64);
}
static void h_strings_many(raw *r)
{
    head(r, 3, 0, 1);
    key_array(r, "words", GGUF_STRING, UINT64_C(1) << 61);
    data(r, 64);
}
static void h_strings_short(raw *r)
{
    head(r, 3, 0, 1);
    key_array(r, "words", GGUF_STRING, 3);
    put_text(r, "one");
    put64(r, 5000);
    data(r, 64);
}
static void h_key_twice(raw *r)
{
    head(r, 3, 0, 2);
    key_u32(r, "same", 1);
    key_u32(r, "same", 2);
}
static void h_alignment_zero(raw *r)
{
    head(r, 3, 0, 1);
    key_u32(r, "general.alignment", 0);
}
static void h_alignment_odd(raw *r)
{
    head(r, 3, 0, 1);
    key_u32(r, "general.alignment", 48);
}
static void h_alignment_huge(raw *r)
{
    head(r, 3, 1, 1);
    key_u32(r, "general.alignment", 1u << 31);
    tensor(r, "a", 4, 1, CAIRN_GGUF_F32, 0);
    data(r, 64);
}
static void h_alignment_text(raw *r)
{
    head(r, 3, 0, 1);
    key(r, "general.alignment", GGUF_STRING);
    put_text(r, "32");
}
static void h_name_empty(raw *r)
{
    head(r, 3, 1, 0);
    tensor(r, "", 4, 1, CAIRN_GGUF_F32, 0);
    data(r, 64);
}
static void h_name_long(raw *r)
{
    char name[80];
    memset(name, 'x', 79);
    name[79] = 0;
    head(r, 3, 1, 0);
    tensor(r, name, 4, 1, CAIRN_GGUF_F32, 0);
    data(r, 64);
}
static void h_dims(raw *r, uint32_t n)
{
    head(r, 3, 1, 0);
    put_text(r, "t");
    put32(r, n);
    data(r, 256);
}
static void h_dims_none(raw *r)
{
    h_dims(r, 0);
}
static void h_dims_five(raw *r)
{
    h_dims(r, 5);
}
static void h_one(raw *r, uint64_t cols, uint64_t rows, uint32_t type, uint64_t offset)
{
    head(r, 3, 1, 0);
    tensor(r, "t", cols, rows, type, offset);
    data(r, 64);
}
static void h_dim_zero(raw *r)
{
    h_one(r, 4, 0, CAIRN_GGUF_F32, 0);
}
static void h_dim_negative(raw *r)
{
    h_one(r, 4, UINT64_MAX, CAIRN_GGUF_F32, 0);
}
static void h_dims_wrap(raw *r)
{
    h_one(r, UINT64_C(1) << 33, UINT64_C(1) << 33, CAIRN_GGUF_F16, 0);
}
static void h_row_wraps(raw *r)
{
    h_one(r, UINT64_C(1) << 62, 1, CAIRN_GGUF_F32, 0);
}
static void h_type(raw *r)
{
    h_one(r, 4, 1, 99, 0);
}
static void h_type_withdrawn(raw *r)
{
    h_one(r, 4, 1, 4, 0);
}
static void h_block(raw *r)
{
    h_one(r, 33, 1, CAIRN_GGUF_Q8_0, 0);
}
static void h_offset_odd(raw *r)
{
    h_one(r, 4, 1, CAIRN_GGUF_F32, 4);
}
static void h_offset_far(raw *r)
{
    h_one(r, 4, 1, CAIRN_GGUF_F32, UINT64_MAX - 31);
}
static void h_beyond(raw *r)
{
    h_one(r, 4, 5, CAIRN_GGUF_F32, 0);
}
static void h_overlap(raw *r)
{
    head(r, 3, 2, 0);
    tensor(r, "first", 16, 1, CAIRN_GGUF_F32, 0);
    tensor(r, "second", 4, 1, CAIRN_GGUF_F32, 32);
    data(r, 64);
}
static void h_tensor_twice(raw *r)
{
    head(r, 3, 2, 0);
    tensor(r, "same", 4, 1, CAIRN_GGUF_F32, 0);
    tensor(r, "same", 4, 1, CAIRN_GGUF_F32, 32);
    data(r, 64);
}

static void hostile_files_are_refused_by_the_name_and_number_that_is_wrong(void **state)
{
    (void)state;
    static const struct {
        void (*make)(raw *r);
        cairn_status status;
        const char *message;
    } cases[] = {
        {h_magic, CAIRN_INVALID, "does not start with 'GGUF'"},
        {h_old, CAIRN_UNSUPPORTED, "GGUF version 1"},
        {h_big_endian, CAIRN_UNSUPPORTED, "big-endian"},
        {h_many_keys, CAIRN_CORRUPT, "18446744073709551615 keys in a file of 96 bytes"},
        {h_many_tensors, CAIRN_CORRUPT, "1073741824 tensors in a file of 96 bytes"},
        {h_key_length, CAIRN_CORRUPT, "key 0: a string of 18446744073709551612 bytes at byte 32, the file has 64 more"},
        {h_key_empty, CAIRN_CORRUPT, "key 0 is empty"},
        {h_value_type, CAIRN_CORRUPT, "key 'x': a value of type 13"},
        {h_string_length, CAIRN_CORRUPT, "key 'name': a string of 1000 bytes"},
        {h_nested, CAIRN_UNSUPPORTED, "key 'deep': an array of arrays"},
        {h_element_type, CAIRN_CORRUPT, "key 'odd': array elements of type 77"},
        {h_array_wraps, CAIRN_CORRUPT, "key 'long': an array of 4611686018427387904 x u32"},
        {h_array_long, CAIRN_CORRUPT, "key 'long': an array of 1000 x f32"},
        {h_strings_many, CAIRN_CORRUPT, "key 'words': an array of 2305843009213693952 strings"},
        {h_strings_short, CAIRN_CORRUPT, "key 'words': a string of 5000 bytes"},
        {h_key_twice, CAIRN_CORRUPT, "key 'same' is there twice"},
        {h_alignment_zero, CAIRN_CORRUPT, "general.alignment is 0"},
        {h_alignment_odd, CAIRN_CORRUPT, "general.alignment is 48"},
        {h_alignment_huge, CAIRN_CORRUPT, "tensor 'a' needs 16 bytes at offset 0, the file has 0 bytes of data"},
        {h_alignment_text, CAIRN_INVALID, "'general.alignment' is of type string"},
        {h_name_empty, CAIRN_CORRUPT, "tensor 0 has a name of 0 bytes"},
        {h_name_long, CAIRN_CORRUPT, "tensor 0 has a name of 79 bytes"},
        {h_dims_none, CAIRN_CORRUPT, "tensor 't' has 0 dimensions"},
        {h_dims_five, CAIRN_CORRUPT, "tensor 't' has 5 dimensions"},
        {h_dim_zero, CAIRN_CORRUPT, "tensor 't': dimension 1 is 0"},
        {h_dim_negative, CAIRN_CORRUPT, "tensor 't': dimension 1 is 18446744073709551615"},
        {h_dims_wrap, CAIRN_CORRUPT, "tensor 't': 8589934592 x 8589934592 x 1 x 1 elements overflow"},
        {h_row_wraps, CAIRN_CORRUPT, "tensor 't': rows of 4611686018427387904 elements"},
        {h_type, CAIRN_UNSUPPORTED, "tensor 't' has type 99"},
        {h_type_withdrawn, CAIRN_UNSUPPORTED, "tensor 't' has type 4"},
        {h_block, CAIRN_CORRUPT, "tensor 't': rows of 33 elements are no whole Q8_0 blocks"},
        {h_offset_odd, CAIRN_CORRUPT, "tensor 't' starts at offset 4, which is no multiple of 32"},
        {h_offset_far, CAIRN_CORRUPT, "tensor 't' needs 16 bytes at offset 18446744073709551584"},
        {h_beyond, CAIRN_CORRUPT, "tensor 't' needs 80 bytes at offset 0, the file has 64 bytes of data"},
        {h_overlap, CAIRN_CORRUPT, "tensors 'first' and 'second' overlap by 32 bytes"},
        {h_tensor_twice, CAIRN_CORRUPT, "tensor 'same' is there twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        raw r = {.n = 0};
        gguf f;
        cases[i].make(&r);
        cairn_status st = parse_exact(r.bytes, r.n, &f);
        if (st != cases[i].status || strstr(cairn_last_error(), cases[i].message) == NULL)
            fail_msg("case %zu: %s: %s; expected %s: %s", i, cairn_status_name(st), cairn_last_error(),
                     cairn_status_name(cases[i].status), cases[i].message);
    }
}

static void things_that_are_no_files_are_refused(void **state)
{
    fixture *fx = *state;
    gguf f;
    assert_int_equal(gguf_open(fx->path, &f), CAIRN_NOT_FOUND);
    assert_int_equal(gguf_open(fx->dir, &f), CAIRN_INVALID);
    assert_int_equal(mkfifo(fx->path, 0600), 0);
    assert_int_equal(gguf_open(fx->path, &f), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "not a regular file"));
    assert_int_equal(unlink(fx->path), 0);
    test_write_file(fx->path, "", 0);
    assert_int_equal(gguf_open(fx->path, &f), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "is empty"));
}

/* ---- random damage ---- */

static tiny_model smallest(void)
{
    tiny_model m = tiny_model_default();
    m.width = 8;
    m.heads = 2;
    m.kv_heads = 1;
    m.head_dim = 4;
    m.hidden = 8;
    m.layers = 2;
    return m;
}

static void random_bytes_in_a_model_never_crash_the_reader(void **state)
{
    fixture *fx = *state;
    tiny_model m = smallest();
    test_random r = {5};
    gguf f;
    size_t n;
    tiny_model_write(&m, fx->path);
    uint8_t *bytes = test_read_file(fx->path, &n);
    assert_non_null(bytes);
    assert_ok(gguf_parse(bytes, n, &f));
    size_t header = n;
    for (size_t i = 0; i < f.n_tensors; i++)
        if ((size_t)(f.tensors[i].data - bytes) < header) header = (size_t)(f.tensors[i].data - bytes);
    gguf_close(&f);
    uint8_t *broken = malloc(n);
    assert_non_null(broken);
    for (int round = 0; round < 4000; round++) {
        memcpy(broken, bytes, n);
        for (uint32_t flips = 1 + test_random_below(&r, 4); flips > 0; flips--) {
            uint32_t at = test_random_below(&r, (uint32_t)header);
            broken[at] = test_random_below(&r, 2) == 0 ? (uint8_t)test_random_u64(&r)
                                                       : (uint8_t)(broken[at] ^ 1u << test_random_below(&r, 8));
        }
        LLVMFuzzerTestOneInput(broken, n);
    }
    for (size_t cut = 0; cut < n; cut += cut < header ? 7 : 211) {
        uint8_t *exact = malloc(cut != 0 ? cut : 1);
        assert_non_null(exact);
        memcpy(exact, bytes, cut);
        assert_int_not_equal(gguf_parse(exact, cut, &f), CAIRN_OK);
        free(exact);
    }
    free(broken);
    free(bytes);
}

static void running_out_of_memory_while_reading_is_reported_and_leaks_nothing(void **state)
{
    fixture *fx = *state;
    tiny_model m = smallest();
    tiny_model_write(&m, fx->path);
    for (uint64_t n = 1;; n++) {
        cairn_model *model = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_model_open(fx->path, &model);
        cairn_alloc_fail_at(0);
        if (st == CAIRN_OK) {
            assert_true(n > 5);
            cairn_model_close(model);
            break;
        }
        assert_int_equal(st, CAIRN_NO_MEMORY);
        assert_null(model);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_file_made_by_hand_is_read_as_the_format_says),
        cmocka_unit_test(every_truncation_of_a_file_is_refused),
        cmocka_unit_test(hostile_files_are_refused_by_the_name_and_number_that_is_wrong),
        cmocka_unit_test_setup_teardown(things_that_are_no_files_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(random_bytes_in_a_model_never_crash_the_reader, setup, teardown),
        cmocka_unit_test_setup_teardown(running_out_of_memory_while_reading_is_reported_and_leaks_nothing, setup,
                                        teardown),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
