/* A scan as bytes: what is unpacked answers as what was packed, from less; what is not what it was is refused.
 *
 * The witness of every search is a full sort over cairn_index_scores. */
#include "index_keys.h"

/* ---- bytes ---- */

typedef struct bytes {
    uint8_t *data;
    size_t n, at, room;
} bytes;

static bool bytes_write(void *arg, const void *data, size_t n)
{
    bytes *b = arg;
    if (n > b->room - b->n) return false;
    memcpy(b->data + b->n, data, n);
    b->n += n;
    return true;
}

static bool bytes_read(void *arg, void *data, size_t n)
{
    bytes *b = arg;
    if (n > b->n - b->at) return false;
    memcpy(data, b->data + b->at, n);
    b->at += n;
    return true;
}

static bytes packed(const cairn_index *index)
{
    const size_t n = cairn_index_packed_bytes(index);
    bytes b = {.data = cairn_alloc(n), .room = n};
    assert_ok(cairn_index_pack(index, bytes_write, &b));
    assert_int_equal(b.n, n);
    return b;
}

static cairn_status unpack(bytes *b, uint32_t dim, cairn_dtype dtype, size_t upto, bool images, cairn_index **out)
{
    b->at = 0;
    assert_ok(cairn_index_new("scan", dim, dtype, out));
    return cairn_index_unpack(*out, upto, images, bytes_read, b);
}

/* The first dims of keys and queries weigh most, so that a sketch pays. */
static keys keys_of_few_directions(uint64_t seed, size_t n, size_t nq, uint32_t dim, cairn_dtype dtype)
{
    keys k = keys_new(seed, MILD, n, nq, dim, dtype);
    for (size_t i = 0; i < n * dim; i++) k.wide[i] /= 1 + 0.5f * (float)(i % dim);
    for (size_t i = 0; i < nq * dim; i++) k.q[i] *= 1 + 0.2f * (float)((i * 7) % dim);
    for (size_t i = 0; i < n; i += 997) /* some without a bound */
        for (size_t j = 0; j < dim; j++) k.wide[i * dim + j] *= 30;
    cairn_kernels_best()->narrow(k.rows, k.wide, dtype, n * dim);
    return k;
}

static void assert_rows_are_the_keys(const cairn_index *index, const keys *k)
{
    float row[128], given[128];
    for (uint32_t i = 0; i < cairn_index_count(index); i++) {
        cairn_index_row(index, i, row);
        cairn_kernels_best()->widen(given, key_at(k, i), k->dtype, k->dim);
        assert_memory_equal(row, given, k->dim * sizeof *row);
    }
}

static void assert_answers(const cairn_index *index, const keys *k)
{
    const uint32_t n = (uint32_t)cairn_index_count(index);
    cairn_index_query queries[32];
    for (size_t i = 0; i < 32; i++) queries[i] = (cairn_index_query){k->q + (32 + i) * k->dim, 0, n};
    assert_search_is_a_full_sort(index, queries, 32, 4);
    assert_search_is_a_full_sort(index, queries + 7, 1, 4);
    assert_search_is_a_full_sort(index, queries + 9, 3, 200);
    for (size_t i = 0; i < 32; i++) queries[i].lo = (uint32_t)(i * 97 % n);
    assert_search_is_a_full_sort(index, queries, 32, 5);
}

static void assert_same_mass(const cairn_index *a, const cairn_index *b, const keys *k)
{
    cairn_index_scratch *scratch = scratch_new();
    cairn_index_hit hits[4];
    uint32_t found;
    for (size_t i = 32; i < 48; i++) {
        cairn_index_mass mass[2];
        const cairn_index_query query = {k->q + i * k->dim, 0, (uint32_t)cairn_index_count(a)};
        assert_ok(cairn_index_search(a, scratch, &query, 1, 4, hits, &found, &mass[0]));
        assert_ok(cairn_index_search(b, scratch, &query, 1, 4, hits, &found, &mass[1]));
        assert_memory_equal(&mass[0], &mass[1], sizeof mass[0]);
    }
    cairn_index_scratch_free(scratch);
}

static void what_is_unpacked_is_what_was_packed(void **state)
{
    (void)state;
    const uint32_t dims[] = {16, 50, 64, 128, 64};
    const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_BF16, CAIRN_F32, CAIRN_F16, CAIRN_F16};
    for (size_t d = 0; d < 5; d++) {
        const bool learns = d < 4;
        keys k = keys_of_few_directions(10 + d, 9000, 96, dims[d], dtypes[d]);
        cairn_index *from = index_of("scan", &k), *lean, *imaged, *again;
        if (learns) assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
        assert_int_equal(cairn_index_learnt(from), learns);
        bytes b = packed(from);
        assert_ok(unpack(&b, k.dim, k.dtype, SIZE_MAX, false, &lean));
        assert_int_equal(b.at, b.n);
        assert_ok(unpack(&b, k.dim, k.dtype, SIZE_MAX, true, &imaged));
        assert_int_equal(cairn_index_count(lean), 9000);
        assert_int_equal(cairn_index_learnt(lean), learns);
        assert_int_equal(lean->rows.chunks[0].image == NULL, learns); /* without a sketch it is wanted */
        assert_non_null(imaged->rows.chunks[2].image);
        /* from half of a huge page on its full chunks lie side by side in such pages */
        const size_t chunk_bytes = CAIRN_CHUNK_ROWS * k.dim * cairn_dtype_size(k.dtype);
        const cairn_row_chunk *chunks = lean->rows.chunks;
        assert_int_equal(chunks[0].part.in_run, 2 * chunk_bytes >= CAIRN_HUGE_PAGE / 2);
        assert_int_equal(chunks[1].part.in_run, chunks[0].part.in_run);
        assert_int_equal((char *)chunks[1].rows - (char *)chunks[0].rows == (ptrdiff_t)chunk_bytes,
                         chunks[0].part.in_run);
        assert_false(chunks[2].part.in_run);
        if (learns) assert_true(cairn_index_bytes(lean) < cairn_index_bytes(imaged) * 4 / 5);
        assert_int_equal(cairn_index_bytes(imaged), cairn_index_bytes(from));
        assert_rows_are_the_keys(lean, &k);
        assert_answers(lean, &k);
        assert_answers(imaged, &k);
        assert_same_mass(from, imaged, &k);
        bytes same = packed(lean);
        assert_int_equal(same.n, b.n);
        assert_memory_equal(same.data, b.data, b.n);
        /* nor does anything in it depend on images coming later, or rows */
        assert_ok(cairn_index_images(lean, true));
        assert_same_mass(from, lean, &k);
        assert_ok(cairn_index_add(from, 700, key_at(&k, 100)));
        assert_ok(cairn_index_add(imaged, 700, key_at(&k, 100)));
        assert_same_mass(from, imaged, &k);
        assert_answers(imaged, &k);
        assert_int_equal(imaged->sketch.count, learns ? 9700 : 0);
        bytes more[] = {packed(from), packed(imaged)};
        assert_int_equal(more[0].n, more[1].n);
        assert_memory_equal(more[0].data, more[1].data, more[0].n);
        assert_ok(unpack(&more[1], k.dim, k.dtype, SIZE_MAX, false, &again));
        assert_answers(again, &k);
        cairn_index_free(from);
        cairn_index_free(lean);
        cairn_index_free(imaged);
        cairn_index_free(again);
        cairn_free(b.data);
        cairn_free(same.data);
        cairn_free(more[0].data);
        cairn_free(more[1].data);
        keys_free(&k);
    }
}

/* A fork has the first blocks of a segment: its rows are a part of the file's. */
static void the_first_rows_of_a_pack_are_an_index_too(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(20, 9000, 96, 64, CAIRN_F16);
    k.wide[5000 * 64] = INFINITY;
    k.wide[1 * 64 + 3] = NAN;
    cairn_kernels_best()->narrow(k.rows, k.wide, k.dtype, 9000 * 64);
    cairn_index *from = index_of("scan", &k);
    assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
    assert_true(cairn_index_learnt(from));
    bytes b = packed(from);
    const size_t uptos[] = {1, 63, 300, 4095, 4096, 4097, 8192, 8999, 9000, 9001};
    for (size_t i = 0; i < sizeof uptos / sizeof *uptos; i++) {
        cairn_index *part, *plain;
        const size_t n = uptos[i] < 9000 ? uptos[i] : 9000;
        assert_ok(unpack(&b, 64, k.dtype, uptos[i], i % 2 == 0, &part));
        assert_int_equal(cairn_index_count(part), n);
        assert_int_equal(part->sketch.count, n);
        assert_answers(part, &k);
        assert_ok(cairn_index_new("scan", 64, k.dtype, &plain));
        assert_ok(cairn_index_add(plain, n, k.rows));
        assert_ok(cairn_index_images(part, true));
        assert_same_mass(plain, part, &k);
        assert_ok(cairn_index_add(part, 9000 - n, key_at(&k, n)));
        assert_answers(part, &k);
        assert_int_equal(part->sketch.count, 9000);
        cairn_index_free(part);
        cairn_index_free(plain);
    }
    cairn_index_free(from);
    cairn_free(b.data);
    keys_free(&k);
}

static void rows_without_images_are_found_with_and_without_a_sketch(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(30, 6000, 96, 32, CAIRN_F16);
    cairn_index *index = NULL;
    assert_ok(cairn_index_new("scan", 32, CAIRN_F16, &index));
    assert_ok(cairn_index_images(index, false));
    assert_ok(cairn_index_add(index, 6000, k.rows));
    assert_answers(index, &k); /* in full precision */
    assert_null(index->rows.chunks[0].image);
    assert_ok(cairn_index_learn(index, k.q, 32, 4, 64));
    assert_true(cairn_index_learnt(index));
    assert_answers(index, &k);
    assert_null(index->rows.chunks[0].image);
    cairn_index_unlearn(index);
    assert_answers(index, &k);
    /* where no sketch pays images are made after all */
    for (size_t i = 0; i < 64 * 32; i++) k.q[i] = 0;
    assert_ok(cairn_index_learn(index, k.q, 64, 4, 64));
    assert_false(cairn_index_learnt(index));
    assert_non_null(index->rows.chunks[0].image);
    cairn_index_free(index);
    keys_free(&k);
}

static void a_pack_with_a_flipped_byte_or_without_its_end_is_refused(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(40, 1000, 96, 32, CAIRN_F16);
    cairn_index *from = index_of("scan", &k), *to = NULL;
    assert_ok(cairn_index_learn(from, k.q, 32, 1, 64));
    assert_true(cairn_index_learnt(from));
    bytes b = packed(from);
    assert_ok(cairn_index_new("scan", 32, CAIRN_F16, &to));
    const size_t empty = cairn_index_bytes(to), whole = b.n;
    for (size_t i = 0; i < whole; i += i < 1000 ? 1 : 13) {
        b.data[i] ^= (uint8_t)(1 << i % 8);
        b.at = 0;
        assert_int_equal(cairn_index_unpack(to, SIZE_MAX, i % 2 == 0, bytes_read, &b), CAIRN_CORRUPT);
        assert_int_equal(cairn_index_count(to), 0);
        assert_false(cairn_index_learnt(to));
        b.data[i] ^= (uint8_t)(1 << i % 8);
    }
    for (b.n = 0; b.n < whole; b.n += b.n < 100 ? 1 : 17) {
        b.at = 0;
        assert_int_equal(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b), CAIRN_CORRUPT);
    }
    assert_in_range(cairn_index_bytes(to), empty, empty + 4096); /* its directories stay */
    b.n = whole;
    b.at = 0;
    assert_ok(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b)); /* and it is as good as new */
    assert_answers(to, &k);
    b.at = 0; /* not twice, not another type or dimension, not another kind */
    assert_int_equal(cairn_index_unpack(to, SIZE_MAX, false, bytes_read, &b), CAIRN_INVALID);
    cairn_index *other = NULL;
    assert_int_equal(unpack(&b, 32, CAIRN_BF16, SIZE_MAX, false, &other), CAIRN_CORRUPT);
    cairn_index_free(other);
    assert_int_equal(unpack(&b, 16, CAIRN_F16, SIZE_MAX, false, &other), CAIRN_CORRUPT);
    cairn_index_free(other);
    assert_ok(cairn_index_new("exact", 32, CAIRN_F16, &other));
    b.at = 0;
    assert_int_equal(cairn_index_unpack(other, SIZE_MAX, false, bytes_read, &b), CAIRN_INVALID);
    assert_int_equal(cairn_index_packed_bytes(other), 0);
    cairn_index_free(other);
    cairn_index_free(from);
    cairn_index_free(to);
    cairn_free(b.data);
    keys_free(&k);
}

static void unpacking_without_memory_leaves_an_index_that_works(void **state)
{
    (void)state;
    keys k = keys_of_few_directions(41, 5000, 96, 64, CAIRN_F32); /* a full chunk: half a huge page */
    cairn_index *from = index_of("scan", &k), *to = NULL;
    assert_ok(cairn_index_learn(from, k.q, 32, 4, 64));
    bytes b = packed(from);
    cairn_status st = CAIRN_NO_MEMORY;
    for (size_t part = 0; part < 3; part++) {
        st = CAIRN_NO_MEMORY;
        for (uint64_t fail = 1; st != CAIRN_OK; fail++) {
            assert_ok(cairn_index_new("scan", 64, CAIRN_F32, &to));
            b.at = 0;
            cairn_alloc_fail_at(fail);
            st = cairn_index_unpack(to, part == 0 ? 4500 : 5000, part == 1, bytes_read, &b);
            cairn_alloc_fail_at(0);
            assert_true(fail < 200 && (st == CAIRN_OK || st == CAIRN_NO_MEMORY));
            if (st != CAIRN_OK) {
                const cairn_index_query query = {k.q + 40 * k.dim, 0, 5000};
                assert_int_equal(cairn_index_count(to), 0);
                assert_ok(cairn_index_add(to, 5000, k.rows));
                assert_search_is_a_full_sort(to, &query, 1, 4);
            }
            cairn_index_free(to);
        }
    }
    cairn_index_free(from);
    cairn_free(b.data);
    keys_free(&k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_unpacked_is_what_was_packed),
        cmocka_unit_test(the_first_rows_of_a_pack_are_an_index_too),
        cmocka_unit_test(rows_without_images_are_found_with_and_without_a_sketch),
        cmocka_unit_test(a_pack_with_a_flipped_byte_or_without_its_end_is_refused),
        cmocka_unit_test(unpacking_without_memory_leaves_an_index_that_works),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
