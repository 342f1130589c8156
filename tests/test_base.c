/* test_base.c - what every room stands on: sentences of failure, checked memory, hashing, the thread pool.
 * labels: threads */
#include "support.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- failures ---- */

static void a_failure_keeps_its_sentence_until_the_next_one(void **state)
{
    (void)state;
    assert_int_equal(cairn_fail(CAIRN_CORRUPT, "block %d of '%s'", 7, "book"), CAIRN_CORRUPT);
    assert_string_equal(cairn_last_error(), "block 7 of 'book'");
    assert_int_equal(cairn_fail(CAIRN_BUSY, "again: %s", cairn_last_error()), CAIRN_BUSY);
    assert_string_equal(cairn_last_error(), "again: block 7 of 'book'");
    assert_int_equal(cairn_fail_within(CAIRN_IO, "store '%s'", "s"), CAIRN_IO);
    assert_string_equal(cairn_last_error(), "store 's': again: block 7 of 'book'");
}

static void a_sentence_longer_than_its_room_is_cut_and_ends(void **state)
{
    (void)state;
    char *word = calloc(1, 5001);
    memset(word, 'x', 5000);
    cairn_fail(CAIRN_INVALID, "%s", word);
    size_t whole = strlen(cairn_last_error());
    assert_in_range(whole, 900, 1100);
    cairn_fail_within(CAIRN_INVALID, "%s", word);
    cairn_fail_errno(EIO, "%s", word);
    assert_in_range(strlen(cairn_last_error()), 700, 1100);
    assert_non_null(strstr(cairn_last_error(), strerror(EIO))); /* the reason survives a long name */
    free(word);
}

static void an_errno_becomes_the_status_a_caller_can_act_on(void **state)
{
    (void)state;
    static const struct {
        int err;
        cairn_status status;
    } pairs[] = {{ENOSPC, CAIRN_FULL},      {EDQUOT, CAIRN_FULL}, {ENOMEM, CAIRN_NO_MEMORY},
                 {ENOENT, CAIRN_NOT_FOUND}, {EIO, CAIRN_IO},      {EACCES, CAIRN_IO}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        assert_int_equal(cairn_fail_errno(pairs[i].err, "file '%s'", "f"), pairs[i].status);
        char expected[200];
        snprintf(expected, sizeof expected, "file 'f': %s", strerror(pairs[i].err));
        assert_string_equal(cairn_last_error(), expected);
    }
}

static void *fail_elsewhere(void *arg)
{
    (void)arg;
    bool clean = cairn_last_error()[0] == 0;
    cairn_fail(CAIRN_FULL, "the other thread's");
    return clean ? NULL : "a new thread begins with somebody else's sentence";
}

static void threads_do_not_see_each_others_sentences(void **state)
{
    (void)state;
    cairn_fail(CAIRN_IO, "mine");
    pthread_t thread;
    void *complaint = NULL;
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    assert_int_equal(pthread_join(thread, &complaint), 0);
    assert_null(complaint);
    assert_string_equal(cairn_last_error(), "mine");
}

static void every_status_and_element_type_has_a_name_of_its_own(void **state)
{
    (void)state;
    for (int a = CAIRN_OK; a <= CAIRN_CANCELLED; a++)
        for (int b = CAIRN_OK; b < a; b++)
            assert_string_not_equal(cairn_status_name((cairn_status)a), cairn_status_name((cairn_status)b));
    assert_string_equal(cairn_status_name((cairn_status)(CAIRN_CANCELLED + 1)), "unknown");
    for (int t = CAIRN_F32; t <= CAIRN_Q8; t++) {
        cairn_dtype back = CAIRN_F32;
        assert_ok(cairn_dtype_parse(cairn_dtype_name((cairn_dtype)t), &back));
        assert_int_equal(back, t);
    }
    cairn_dtype unused;
    assert_int_equal(cairn_dtype_parse("f64", &unused), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "f64"));
}

/* ---- memory ---- */

static void sizes_that_overflow_are_refused_instead_of_wrapped(void **state)
{
    (void)state;
    size_t out = 5;
    assert_true(cairn_mul_size(SIZE_MAX / 3, 3, &out));
    assert_false(cairn_mul_size(SIZE_MAX / 3 + 1, 3, &out));
    assert_false(cairn_add_size(SIZE_MAX, 1, &out));
    assert_null(cairn_alloc_array(SIZE_MAX / 8 + 1, 8));
    assert_null(cairn_calloc(SIZE_MAX / 2, 3));
    assert_null(cairn_grow(NULL, 0, SIZE_MAX, 2));
    assert_null(cairn_alloc(SIZE_MAX));
    assert_null(cairn_alloc(SIZE_MAX - 63)); /* rounding up to lines would wrap */
}

static void blocks_start_on_a_line_and_zero_bytes_are_a_block_too(void **state)
{
    (void)state;
    for (size_t bytes = 0; bytes < 300; bytes += 7) {
        uint8_t *block = cairn_calloc(bytes, 1);
        assert_non_null(block);
        assert_int_equal((uintptr_t)block % 64, 0);
        for (size_t i = 0; i < bytes; i++) assert_int_equal(block[i], 0);
        memset(block, 0xff, bytes);
        cairn_free(block);
    }
    cairn_free(NULL);
}

static void growing_keeps_the_bytes_and_a_failure_leaves_the_block_alone(void **state)
{
    (void)state;
    uint32_t *block = cairn_alloc_array(100, sizeof *block);
    for (uint32_t i = 0; i < 100; i++) block[i] = i * i;
    uint32_t *grown = cairn_grow(block, 100 * sizeof *block, 5000, sizeof *block);
    assert_non_null(grown);
    for (uint32_t i = 0; i < 100; i++) assert_int_equal(grown[i], i * i);
    cairn_alloc_fail_at(1);
    assert_null(cairn_grow(grown, 100 * sizeof *grown, 9000, sizeof *grown));
    cairn_alloc_fail_at(0);
    for (uint32_t i = 0; i < 100; i++) assert_int_equal(grown[i], i * i);
    cairn_free(grown);
}

static void the_allocation_named_fails_and_no_other(void **state)
{
    (void)state;
    for (uint64_t n = 1; n <= 5; n++) {
        cairn_alloc_fail_at(n);
        for (uint64_t i = 1; i <= 5; i++) {
            void *block = cairn_alloc(8);
            assert_int_equal(block == NULL, i == n);
            cairn_free(block);
        }
        assert_int_equal(cairn_alloc_fail_at(0), 5);
    }
}

static void mapped_memory_is_zeroed_from_a_huge_page_on_and_only_what_is_used_is_there(void **state)
{
    (void)state;
    const size_t sizes[] = {1, 4097, CAIRN_HUGE_PAGE / 2 - 1, CAIRN_HUGE_PAGE / 2, 3 * (size_t)CAIRN_HUGE_PAGE + 5};
    for (size_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++) {
        const size_t bytes = sizes[i / 2];
        const uint64_t before = cairn_peak_rss_bytes();
        uint8_t *block = cairn_map(bytes, i % 2 == 0);
        assert_non_null(block);
        assert_int_equal((uintptr_t)block % CAIRN_HUGE_PAGE, 0);
        for (size_t at = 0; at < bytes; at++) assert_int_equal(block[at], 0);
        memset(block, 7, bytes);
        cairn_unmap(block, bytes);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)         /* whose shadow counts too */
        assert_true(cairn_peak_rss_bytes() < before + bytes + (512 << 10)); /* the kernel counts in batches per core */
#else
        (void)before;
#endif
    }
    cairn_alloc_fail_at(1);
    assert_null(cairn_map(4096, true));
    cairn_alloc_fail_at(0);
    assert_null(cairn_map(SIZE_MAX - 100, true));
    assert_null(cairn_map(SIZE_MAX / 4, false));
    cairn_unmap(NULL, 5);
}

static void peak_memory_is_what_was_touched_and_does_not_fall(void **state)
{
    (void)state;
    enum { BYTES = 48 << 20 };
    uint64_t before = cairn_peak_rss_bytes();
    uint8_t *block = cairn_alloc(BYTES);
    assert_non_null(block);
    for (size_t i = 0; i < BYTES; i += 1024) block[i] = (uint8_t)i;
    uint64_t during = cairn_peak_rss_bytes();
    uint8_t last = block[BYTES - 1024];
    cairn_free(block);
    assert_int_equal(last, (uint8_t)(BYTES - 1024));
    assert_true(before > 0);
    assert_true(during >= (uint64_t)BYTES);
    assert_true(cairn_peak_rss_bytes() + (1 << 20) >= during); /* the kernel counts in batches per core */
    assert_true(cairn_free_ram_bytes() > 0);
}

/* ---- bytes ---- */

static void numbers_lie_on_disk_in_the_order_the_format_names(void **state)
{
    (void)state;
    static const uint8_t up[8] = {8, 7, 6, 5, 4, 3, 2, 1}, down[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint8_t bytes[8];
    cairn_put_le64(bytes, UINT64_C(0x0102030405060708));
    assert_memory_equal(bytes, up, 8);
    cairn_put_be64(bytes, UINT64_C(0x0102030405060708));
    assert_memory_equal(bytes, down, 8);
    cairn_put_le32(bytes, 0x05060708);
    assert_memory_equal(bytes, up, 4);
    cairn_put_be32(bytes, 0x01020304);
    assert_memory_equal(bytes, down, 4);
    cairn_put_le16(bytes, 0x0708);
    assert_memory_equal(bytes, up, 2);
    cairn_put_be16(bytes, 0x0102);
    assert_memory_equal(bytes, down, 2);
    assert_int_equal(cairn_get_le64(up), UINT64_C(0x0102030405060708));
    assert_int_equal(cairn_get_be64(down), UINT64_C(0x0102030405060708));
    assert_int_equal(cairn_get_le32(up), 0x05060708);
    assert_int_equal(cairn_get_be32(down), 0x01020304);
    assert_int_equal(cairn_get_le16(up), 0x0708);
    assert_int_equal(cairn_get_be16(down), 0x0102);
}

/* Three values of XXH3-64 as its other implementations give them. */
static void the_hash_is_xxh3_64(void **state)
{
    (void)state;
    assert_int_equal(cairn_hash64("", 0), UINT64_C(0x2d06800538d394c2));
    assert_int_equal(cairn_hash64("a", 1), UINT64_C(0xe6c632b61e964e1f));
    assert_int_equal(cairn_hash64("abc", 3), UINT64_C(0x78af5f94892f3950));
}

static void a_hash_in_pieces_is_the_hash_of_the_whole(void **state)
{
    (void)state;
    test_random r = {11};
    uint8_t bytes[3000];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)test_random_u64(&r);
    for (int turn = 0; turn < 200; turn++) {
        size_t n = test_random_below(&r, sizeof bytes + 1), cut = test_random_below(&r, (uint32_t)n + 1);
        uint64_t whole = cairn_hash64(bytes, n);
        assert_int_equal(cairn_hash64_two(bytes, cut, bytes + cut, n - cut), whole);
        cairn_hasher *h = cairn_hasher_new();
        assert_non_null(h);
        for (size_t at = 0; at < n;) {
            size_t step = 1 + test_random_below(&r, 400);
            if (step > n - at) step = n - at;
            cairn_hasher_add(h, bytes + at, step);
            at += step;
            assert_int_equal(cairn_hasher_value(h), cairn_hash64(bytes, at));
        }
        cairn_hasher_free(h);
    }
    cairn_hasher_free(NULL);
}

/* ---- the pool ---- */

typedef struct pool_job {
    size_t n, workers;
    atomic_int *calls; /* (n) */
    uint64_t *values;  /* (n), each written by one item without a lock */
    atomic_bool stranger;
} pool_job;

static void pool_item(void *arg, size_t item, size_t worker)
{
    pool_job *job = arg;
    if (item >= job->n || worker >= job->workers) {
        atomic_store(&job->stranger, true);
        return;
    }
    atomic_fetch_add(&job->calls[item], 1);
    job->values[item] += item * 3 + 1;
}

static void a_pool_runs_every_item_once_and_is_done_when_it_returns(void **state)
{
    (void)state;
    enum { MOST = 300 };
    test_random r = {5};
    for (size_t threads = 1; threads <= 5; threads++) {
        cairn_pool *pool = NULL;
        assert_ok(cairn_pool_new(threads, &pool));
        assert_int_equal(cairn_pool_size(pool), threads);
        for (int turn = 0; turn < 150; turn++) {
            atomic_int calls[MOST] = {0};
            uint64_t values[MOST] = {0};
            pool_job job = {.n = test_random_below(&r, MOST), .workers = threads, .calls = calls, .values = values};
            cairn_pool_run(pool, job.n, pool_item, &job);
            assert_false(atomic_load(&job.stranger));
            for (size_t i = 0; i < MOST; i++) {
                assert_int_equal(atomic_load(&calls[i]), i < job.n);
                assert_int_equal(values[i], i < job.n ? i * 3 + 1 : 0); /* plain writes are seen by the caller */
            }
        }
        cairn_pool_free(pool);
    }
}

static void without_a_pool_the_caller_does_it_all(void **state)
{
    (void)state;
    atomic_int calls[9] = {0};
    uint64_t values[9] = {0};
    pool_job job = {.n = 9, .workers = 1, .calls = calls, .values = values};
    assert_int_equal(cairn_pool_size(NULL), 1);
    cairn_pool_run(NULL, 9, pool_item, &job);
    assert_false(atomic_load(&job.stranger));
    for (size_t i = 0; i < 9; i++) assert_int_equal(atomic_load(&calls[i]), 1);
    cairn_pool_free(NULL);
}

static void a_pool_that_never_ran_ends_too(void **state)
{
    (void)state;
    for (int turn = 0; turn < 50; turn++) {
        cairn_pool *pool = NULL;
        assert_ok(cairn_pool_new(4, &pool));
        cairn_pool_free(pool);
    }
}

static void *mask_of_thread(void *mask)
{
    pthread_sigmask(SIG_SETMASK, NULL, mask);
    return mask;
}

static void a_started_thread_takes_faults_and_no_other_signals(void **state)
{
    (void)state;
    pthread_t thread;
    sigset_t mask, before, after;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    sigemptyset(&mask);
    assert_int_equal(cairn_thread_start(&thread, 0, mask_of_thread, &mask), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int s = 1; s < 32; s++) {
        const bool fault = s == SIGBUS || s == SIGSEGV || s == SIGFPE || s == SIGILL || s == SIGTRAP;
        if (s != SIGKILL && s != SIGSTOP) assert_int_equal(sigismember(&mask, s), !fault);
        assert_int_equal(sigismember(&after, s), sigismember(&before, s));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_failure_keeps_its_sentence_until_the_next_one),
        cmocka_unit_test(a_sentence_longer_than_its_room_is_cut_and_ends),
        cmocka_unit_test(an_errno_becomes_the_status_a_caller_can_act_on),
        cmocka_unit_test(threads_do_not_see_each_others_sentences),
        cmocka_unit_test(every_status_and_element_type_has_a_name_of_its_own),
        cmocka_unit_test(sizes_that_overflow_are_refused_instead_of_wrapped),
        cmocka_unit_test(blocks_start_on_a_line_and_zero_bytes_are_a_block_too),
        cmocka_unit_test(growing_keeps_the_bytes_and_a_failure_leaves_the_block_alone),
        cmocka_unit_test(the_allocation_named_fails_and_no_other),
        cmocka_unit_test(mapped_memory_is_zeroed_from_a_huge_page_on_and_only_what_is_used_is_there),
        cmocka_unit_test(a_started_thread_takes_faults_and_no_other_signals),
        cmocka_unit_test(peak_memory_is_what_was_touched_and_does_not_fall),
        cmocka_unit_test(numbers_lie_on_disk_in_the_order_the_format_names),
        cmocka_unit_test(the_hash_is_xxh3_64),
        cmocka_unit_test(a_hash_in_pieces_is_the_hash_of_the_whole),
        cmocka_unit_test(a_pool_runs_every_item_once_and_is_done_when_it_returns),
        cmocka_unit_test(without_a_pool_the_caller_does_it_all),
        cmocka_unit_test(a_pool_that_never_ran_ends_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
