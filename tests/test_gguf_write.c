/* test_gguf_write.c - GGUF files we write: read back, compared with other programs' bytes, and put in place whole. */
#include "model_fixture.h"
#include "tiny_model.h"

#include "gguf_internal.h"
#include "kernels_internal.h"

#include <dirent.h>
#include <sys/stat.h>

static void what_the_writer_wrote_is_read_back(void **state)
{
    fixture *fx = *state;
    cairn_gguf_writer *w;
    gguf f;
    const uint32_t numbers[] = {0, UINT32_MAX, 3};
    const float floats[] = {0.5f, -1e30f};
    const char *const words[] = {"", "two words", "\xe2\x96\x81"};
    const float matrix[6] = {1, -2, 0.333251953125f, 4, 65504, -6.103515625e-05f};
    uint32_t u = 0;
    float x = 0;
    bool b = false;
    gguf_text text;
    size_t at = 0;
    double d;
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_u32(w, "u", 42));
    assert_ok(cairn_gguf_put_f32(w, "f", 0.1f));
    assert_ok(cairn_gguf_put_bool(w, "b", true));
    assert_ok(cairn_gguf_put_string(w, "s", "text"));
    assert_ok(cairn_gguf_put_u32s(w, "us", numbers, 3));
    assert_ok(cairn_gguf_put_f32s(w, "fs", floats, 2));
    assert_ok(cairn_gguf_put_strings(w, "ss", words, 3));
    assert_ok(cairn_gguf_put_i32s(w, "empty", NULL, 0));
    assert_ok(cairn_gguf_put_tensor(w, "m", CAIRN_GGUF_F16, (uint64_t[]){3, 2}, 2, matrix));
    assert_ok(cairn_gguf_put_tensor(w, "v", CAIRN_GGUF_F32, (uint64_t[]){6}, 1, matrix));
    assert_ok(cairn_gguf_put_tensor(w, "bf", CAIRN_GGUF_BF16, (uint64_t[]){2}, 1, matrix));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);

    assert_ok(gguf_open(fx->path, &f));
    assert_int_equal(f.n_values, 8);
    assert_int_equal(f.n_tensors, 3);
    assert_ok(gguf_u32(&f, "u", &u));
    assert_int_equal(u, 42);
    assert_ok(gguf_f32(&f, "f", &x));
    assert_true(x == 0.1f);
    assert_ok(gguf_bool(&f, "b", &b));
    assert_true(b);
    assert_ok(gguf_string(&f, "s", &text));
    assert_true(gguf_text_is(text, "text"));
    const gguf_value *us = gguf_find(&f, "us");
    int64_t n;
    assert_int_equal(us->count, 3);
    assert_true(gguf_value_integer(us, 1, &n) && n == UINT32_MAX);
    assert_true(gguf_value_float(gguf_find(&f, "fs"), 1, &d) && d == (double)-1e30f);
    const gguf_value *ss = gguf_find(&f, "ss");
    for (size_t i = 0; i < 3; i++) assert_true(gguf_text_is(gguf_next_string(ss, &at), words[i]));
    assert_int_equal(gguf_find(&f, "empty")->count, 0);
    const gguf_tensor *m = gguf_find_tensor(&f, "m");
    assert_int_equal(m->dims[0], 3);
    assert_int_equal(m->dims[1], 2);
    static const uint16_t halves[6] = {0x3c00, 0xc000, 0x3555, 0x4400, 0x7bff, 0x8400}; /* IEEE 754 by hand */
    assert_memory_equal(m->data, halves, sizeof halves);
    assert_memory_equal(gguf_find_tensor(&f, "v")->data, matrix, sizeof matrix);
    static const uint16_t brain[2] = {0x3f80, 0xc000};
    assert_memory_equal(gguf_find_tensor(&f, "bf")->data, brain, sizeof brain);
    gguf_close(&f);
}

static void values_that_were_read_are_written_again_and_arrays_grow_by_an_element(void **state)
{
    fixture *fx = *state;
    cairn_gguf_writer *w;
    gguf f, g;
    const char *const words[] = {"one", ""};
    static const uint8_t three[8 + 3] = {3, 0, 0, 0, 0, 0, 0, 0, 't', 'w', 'o'}, wide[16] = {1, [8] = 2};
    const gguf_value odd = {{"wide", 4}, GGUF_I64, true, 1, wide, 8},
                     broken = {{"a\0b", 3}, GGUF_U8, false, 1, wide, 1};
    size_t at = 0;
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_strings(w, "words", words, 2));
    assert_ok(cairn_gguf_put_string(w, "text", "two"));
    assert_ok(gguf_put_value(w, &odd));
    assert_int_equal(gguf_put_value(w, &odd), CAIRN_EXISTS);
    assert_int_equal(gguf_put_value(w, &broken), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "'a?b'"));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    assert_ok(gguf_open(fx->path, &f));
    assert_int_equal(f.n_values, 3);
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(gguf_put_longer(w, gguf_find(&f, "words"), three, sizeof three));
    assert_ok(gguf_put_longer(w, gguf_find(&f, "wide"), wide + 8, 8));
    assert_ok(gguf_put_value(w, gguf_find(&f, "text")));
    assert_ok(cairn_gguf_writer_save(w, fx->path)); /* the old file stays mapped */
    cairn_gguf_writer_free(w);
    assert_ok(gguf_open(fx->path, &g));
    const gguf_value *grown = gguf_find(&g, "words"), *text = gguf_find(&g, "text"), *was = gguf_find(&f, "text");
    assert_int_equal(grown->count, 3);
    assert_true(gguf_text_is(gguf_next_string(grown, &at), "one"));
    assert_true(gguf_text_is(gguf_next_string(grown, &at), ""));
    assert_true(gguf_text_is(gguf_next_string(grown, &at), "two"));
    assert_int_equal(gguf_find(&g, "wide")->count, 2);
    assert_int_equal(gguf_find(&g, "wide")->type, GGUF_I64);
    assert_memory_equal(gguf_find(&g, "wide")->data, wide, sizeof wide);
    assert_int_equal(text->bytes, was->bytes);
    assert_memory_equal(text->data, was->data, was->bytes);
    gguf_close(&f);
    gguf_close(&g);
}

static int by_data(const void *a, const void *b)
{
    const uint8_t *x = *(const uint8_t *const *)a;
    const uint8_t *y = *(const uint8_t *const *)b;
    return (x > y) - (x < y);
}

static void copy_value(cairn_gguf_writer *w, const gguf_value *v)
{
    char *name = strndup(v->key.data, v->key.bytes);
    size_t at = 0;
    assert_non_null(name);
    if (v->array && v->type == GGUF_STRING) {
        char **words = calloc(v->count, sizeof *words);
        assert_non_null(words);
        for (size_t i = 0; i < v->count; i++) {
            gguf_text t = gguf_next_string(v, &at);
            words[i] = strndup(t.data, t.bytes);
        }
        assert_ok(cairn_gguf_put_strings(w, name, (const char *const *)words, v->count));
        for (size_t i = 0; i < v->count; i++) free(words[i]);
        free(words);
    } else if (v->array) {
        uint32_t *words = calloc(v->count, sizeof *words);
        assert_non_null(words);
        assert_int_equal(v->bytes, v->count * 4);
        memcpy(words, v->data, v->bytes);
        if (v->type == GGUF_U32)
            assert_ok(cairn_gguf_put_u32s(w, name, words, v->count));
        else if (v->type == GGUF_I32)
            assert_ok(cairn_gguf_put_i32s(w, name, (int32_t *)words, v->count));
        else
            assert_ok(cairn_gguf_put_f32s(w, name, (float *)words, v->count));
        free(words);
    } else if (v->type == GGUF_STRING) {
        gguf_text t = gguf_next_string(v, &at);
        char *copy = strndup(t.data, t.bytes);
        assert_ok(cairn_gguf_put_string(w, name, copy));
        free(copy);
    } else if (v->type == GGUF_F32) {
        float x;
        memcpy(&x, v->data, 4);
        assert_ok(cairn_gguf_put_f32(w, name, x));
    } else if (v->type == GGUF_BOOL) {
        assert_ok(cairn_gguf_put_bool(w, name, v->data[0] != 0));
    } else {
        assert_int_equal(v->type, GGUF_U32);
        assert_ok(cairn_gguf_put_u32(w, name, cairn_get_le32(v->data)));
    }
    free(name);
}

/* The files were written, and their weights rounded and quantized, by other programs. */
static void files_of_other_programs_written_again_are_the_same_bytes(void **state)
{
    fixture *fx = *state;
    static const char *const names[] = {"/golden/clamped_forward.gguf", "/parity/qwen3-f16.gguf",
                                        "/parity/mha-q8_0.gguf"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *source = test_path(CAIRN_TEST_DATA, names[i] + 1);
        cairn_gguf_writer *w;
        gguf f;
        size_t n;
        size_t n_again;
        assert_ok(gguf_open(source, &f));
        assert_ok(cairn_gguf_writer_new(&w));
        const uint8_t *order[128]; /* places tell the order in the file: the tables are sorted by name */
        assert_true(f.n_values <= 128 && f.n_tensors <= 128);
        for (size_t k = 0; k < f.n_values; k++) order[k] = f.values[k].data;
        qsort(order, f.n_values, sizeof *order, by_data);
        for (size_t k = 0; k < f.n_values; k++)
            for (size_t j = 0; j < f.n_values; j++)
                if (f.values[j].data == order[k]) copy_value(w, &f.values[j]);
        for (size_t k = 0; k < f.n_tensors; k++) order[k] = f.tensors[k].data;
        qsort(order, f.n_tensors, sizeof *order, by_data);
        for (size_t k = 0; k < f.n_tensors; k++)
            for (size_t j = 0; j < f.n_tensors; j++) {
                const gguf_tensor *t = &f.tensors[j];
                if (t->data != order[k]) continue;
                char *name = strndup(t->name.data, t->name.bytes);
                float *x = malloc(t->dims[0] * t->dims[1] * sizeof *x);
                assert_non_null(x);
                cairn_wtype type = t->type == CAIRN_GGUF_F32   ? CAIRN_W_F32
                                   : t->type == CAIRN_GGUF_F16 ? CAIRN_W_F16
                                                               : CAIRN_W_Q8_0;
                cairn_kernels_ref.dequant(x, t->data, type, t->dims[0], 0, t->dims[1]);
                assert_ok(cairn_gguf_put_tensor(w, name, (cairn_gguf_type)t->type, t->dims, t->n_dims, x));
                free(x);
                free(name);
            }
        assert_ok(cairn_gguf_writer_save(w, fx->path));
        uint8_t *a = test_read_file(source, &n);
        uint8_t *b = test_read_file(fx->path, &n_again);
        assert_int_equal(n, n_again);
        for (size_t k = 0; k < n; k++)
            if (a[k] != b[k]) fail_msg("%s: byte %zu is %u, was %u", names[i], k, b[k], a[k]);
        free(a);
        free(b);
        cairn_gguf_writer_free(w);
        gguf_close(&f);
        free(source);
    }
}

static void quantized_blocks_hold_the_largest_value_and_zeros_exactly(void **state)
{
    fixture *fx = *state;
    cairn_gguf_writer *w;
    gguf f;
    float x[64] = {0};
    float back[64];
    for (int i = 0; i < 32; i++) x[i] = (float)(i - 20) * 0.25f;
    x[0] = -127 * 0.25f;
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_tensor(w, "t", CAIRN_GGUF_Q8_0, (uint64_t[]){64}, 1, x));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    assert_ok(gguf_open(fx->path, &f));
    cairn_kernels_ref.dequant(back, gguf_find_tensor(&f, "t")->data, CAIRN_W_Q8_0, 64, 0, 1);
    assert_memory_equal(back, x, sizeof x); /* multiples of the scale 0.25, and a block of zeros */
    gguf_close(&f);
}

static void the_writer_refuses_what_a_reader_would(void **state)
{
    fixture *fx = *state;
    cairn_gguf_writer *w;
    const float x[64] = {0};
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_u32(w, "k", 1));
    assert_int_equal(cairn_gguf_put_f32(w, "k", 1), CAIRN_EXISTS);
    assert_int_equal(cairn_gguf_put_u32(w, "", 1), CAIRN_INVALID);
    assert_ok(cairn_gguf_put_tensor(w, "k", CAIRN_GGUF_F32, (uint64_t[]){2}, 1, x)); /* names of another kind */
    assert_int_equal(cairn_gguf_put_tensor(w, "k", CAIRN_GGUF_F32, (uint64_t[]){2}, 1, x), CAIRN_EXISTS);
    assert_int_equal(cairn_gguf_put_tensor(w, "a", CAIRN_GGUF_Q8_0, (uint64_t[]){33}, 1, x), CAIRN_INVALID);
    assert_int_equal(cairn_gguf_put_tensor(w, "b", CAIRN_GGUF_F32, (uint64_t[]){2, 0}, 2, x), CAIRN_INVALID);
    assert_int_equal(cairn_gguf_put_tensor(w, "c", (cairn_gguf_type)2, (uint64_t[]){32}, 1, x), CAIRN_INVALID);
    uint64_t huge[] = {UINT64_C(1) << 33, UINT64_C(1) << 33};
    assert_int_equal(cairn_gguf_put_tensor(w, "d", CAIRN_GGUF_F32, huge, 2, x), CAIRN_INVALID);
    assert_ok(cairn_gguf_writer_save(w, fx->path)); /* and what was refused left no trace */
    cairn_gguf_writer_free(w);
    gguf f;
    assert_ok(gguf_open(fx->path, &f));
    assert_int_equal(f.n_values, 1);
    assert_int_equal(f.n_tensors, 1);
    gguf_close(&f);
}

static size_t entries(const char *path)
{
    size_t n = 0;
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(void **state)
{
    fixture *fx = *state;
    cairn_gguf_writer *w;
    size_t n;
    struct stat info;
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_u32(w, "k", 1));
    char *inside = test_path(fx->path, "x");
    assert_int_equal(cairn_gguf_writer_save(w, inside), CAIRN_NOT_FOUND);
    test_write_file(fx->path, "old", 3);
    assert_int_equal(cairn_gguf_writer_save(w, inside), CAIRN_IO); /* a file is no directory */
    char *old = test_read_file(fx->path, &n);
    assert_int_equal(n, 3);
    free(old);
    assert_int_equal(cairn_gguf_writer_save(w, fx->dir), CAIRN_IO); /* nor can a directory be replaced */
    assert_int_equal(entries(fx->dir), 1);
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    assert_int_equal(entries(fx->dir), 1);
    assert_int_equal(stat(fx->path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    free(inside);
    cairn_gguf_writer_free(w);
}

static void running_out_of_memory_while_writing_is_reported_and_leaks_nothing(void **state)
{
    fixture *fx = *state;
    const float x[4] = {1, 2, 3, 4};
    for (uint64_t n = 1;; n++) {
        cairn_gguf_writer *w = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_gguf_writer_new(&w);
        if (st == CAIRN_OK) st = cairn_gguf_put_string(w, "k", "v");
        if (st == CAIRN_OK) st = cairn_gguf_put_tensor(w, "t", CAIRN_GGUF_F16, (uint64_t[]){4}, 1, x);
        if (st == CAIRN_OK) st = cairn_gguf_writer_save(w, fx->path);
        cairn_alloc_fail_at(0);
        cairn_gguf_writer_free(w);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_the_writer_wrote_is_read_back, setup, teardown),
        cmocka_unit_test_setup_teardown(values_that_were_read_are_written_again_and_arrays_grow_by_an_element, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(files_of_other_programs_written_again_are_the_same_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(quantized_blocks_hold_the_largest_value_and_zeros_exactly, setup, teardown),
        cmocka_unit_test_setup_teardown(the_writer_refuses_what_a_reader_would, setup, teardown),
        cmocka_unit_test_setup_teardown(a_save_that_fails_leaves_the_old_file_and_nothing_beside_it, setup, teardown),
        cmocka_unit_test_setup_teardown(running_out_of_memory_while_writing_is_reported_and_leaks_nothing, setup,
                                        teardown),
    };
    return cmocka_run_group_tests_name("gguf_write", tests, NULL, NULL);
}
