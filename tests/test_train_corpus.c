/* test_train_corpus.c - texts in two splits, and recall texts made of them.
 *
 * Witnesses: the files' own bytes, read by the test; plain searches of the text for what the sentences say.
 */
#include "support.h"

#include <cairn/train.h>
#include <recall_internal.h>

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SMALL = 1000, LARGE = 3 << 20 };

/* A directory: a (SMALL bytes), b/c (LARGE bytes), b/empty, b/link to a; every byte of the stream tells its place. */
typedef struct fixture {
    char *dir;
    uint8_t *stream;
} fixture;

static int set_up(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    test_random r = {9};
    fx->dir = test_make_dir();
    fx->stream = malloc(SMALL + LARGE);
    for (size_t i = 0; i < SMALL + LARGE; i++) fx->stream[i] = (uint8_t)test_random_u64(&r);
    char *a = test_path(fx->dir, "a"), *b = test_path(fx->dir, "b"), *c = test_path(b, "c");
    char *empty = test_path(b, "empty"), *link = test_path(b, "link");
    if (mkdir(b, 0700) != 0 || symlink(a, link) != 0) return -1;
    test_write_file(a, fx->stream, SMALL);
    test_write_file(c, fx->stream + SMALL, LARGE);
    test_write_file(empty, "", 0);
    free(a), free(b), free(c), free(empty), free(link);
    *state = fx;
    return 0;
}
static int tear_down(void **state)
{
    fixture *fx = *state;
    test_remove_dir(fx->dir);
    free(fx->stream);
    free(fx);
    return 0;
}

static cairn_corpus *open_corpus(const char *path, double held_out)
{
    cairn_corpus *c = NULL;
    assert_ok(cairn_corpus_open(&path, 1, held_out, &c));
    return c;
}

static void the_splits_share_the_stream_piece_by_piece(void **state)
{
    fixture *fx = *state;
    enum { PIECE = 65536, ALL = SMALL + LARGE };
    cairn_corpus *c = open_corpus(fx->dir, 0.2);
    uint64_t n[2] = {cairn_corpus_bytes(c, CAIRN_SPLIT_TRAIN), cairn_corpus_bytes(c, CAIRN_SPLIT_HELD_OUT)};
    assert_int_equal(n[0] + n[1], ALL);
    assert_int_equal(cairn_corpus_files(c), 2);
    assert_in_range(n[1], 1, ALL / 2); /* 49 pieces at 0.2 */
    uint8_t *got[2] = {malloc(n[0]), malloc(n[1])};
    for (int s = 0; s < 2; s++) assert_ok(cairn_corpus_read(c, (cairn_split)s, 0, n[s], got[s]));
    size_t used[2] = {0, 0};
    for (size_t at = 0; at < ALL; at += PIECE) { /* each piece is next in one split, and only there */
        size_t bytes = ALL - at < PIECE ? ALL - at : PIECE;
        int in = used[0] + bytes <= n[0] && memcmp(got[0] + used[0], fx->stream + at, bytes) == 0 ? 0 : 1;
        assert_true(used[in] + bytes <= n[in]);
        assert_memory_equal(got[in] + used[in], fx->stream + at, bytes);
        used[in] += bytes;
    }
    for (int i = 0; i < 200; i++) { /* any place, over the end too */
        test_random r = {(uint64_t)i};
        uint8_t some[70000];
        uint64_t at = test_random_u64(&r) % (3 * n[0]);
        size_t bytes = test_random_below(&r, sizeof some);
        assert_ok(cairn_corpus_read(c, CAIRN_SPLIT_TRAIN, at, bytes, some));
        for (size_t b = 0; b < bytes; b += 97) assert_int_equal(some[b], got[0][(at + b) % n[0]]);
    }
    free(got[0]), free(got[1]);
    cairn_corpus_close(c);
}

static void what_cannot_be_a_corpus_is_refused_by_name(void **state)
{
    fixture *fx = *state;
    cairn_corpus *c = NULL;
    char *missing = test_path(fx->dir, "nowhere"), *small = test_path(fx->dir, "a"), *b = test_path(fx->dir, "b");
    char *empty = test_path(b, "empty");
    const char *path = missing;
    assert_int_equal(cairn_corpus_open(&path, 1, 0, &c), CAIRN_NOT_FOUND);
    assert_non_null(strstr(cairn_last_error(), "nowhere"));
    path = empty;
    assert_int_equal(cairn_corpus_open(&path, 1, 0, &c), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "empty"));
    path = small; /* one piece: it cannot be in both splits */
    assert_int_equal(cairn_corpus_open(&path, 1, 0.5, &c), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "1000 bytes"));
    assert_ok(cairn_corpus_open(&path, 1, 0, &c));
    char byte;
    assert_int_equal(cairn_corpus_read(c, CAIRN_SPLIT_HELD_OUT, 0, 1, &byte), CAIRN_INVALID);
    cairn_corpus_close(c);
    path = "/dev/null";
    assert_int_equal(cairn_corpus_open(&path, 1, 0, &c), CAIRN_INVALID);
    assert_int_equal(cairn_corpus_open(&path, 1, 1.5, &c), CAIRN_INVALID);
    assert_null(c);
    free(missing), free(small), free(b), free(empty);
}

static void a_recall_text_holds_each_key_once_where_its_question_says(void **state)
{
    fixture *fx = *state;
    cairn_corpus *c = open_corpus(fx->dir, 0.2);
    for (int plain = 0; plain < 2; plain++) {
        cairn_recall_options opt;
        cairn_recall_options_init(&opt, sizeof opt);
        opt.bytes = 20000;
        opt.distractors = 30;
        opt.plain = plain;
        opt.depth = 0.25;
        opt.seed = 77;
        cairn_recall_text *text = NULL;
        assert_ok(cairn_recall_text_new(c, &opt, &text));
        size_t n;
        const char *bytes = cairn_recall_text_bytes(text, &n);
        assert_int_equal(n, 20000);
        assert_int_equal(cairn_recall_text_questions(text), 31);
        for (size_t i = 0; i < 31; i++) {
            const cairn_recall_question *q = cairn_recall_text_question(text, i);
            char says[80];
            if (plain && i == 0)
                snprintf(says, sizeof says, "\nThe pass key is %s. Remember it. %s is the pass key.\n", q->answer,
                         q->answer);
            else
                snprintf(says, sizeof says, "\nThe pass key of %s is %s.\n", q->name, q->answer);
            assert_memory_equal(bytes + q->at, says, strlen(says));
            const char *found = memmem(bytes, n, says, strlen(says));
            assert_ptr_equal(found, bytes + q->at);
            assert_null(memmem(found + 1, n - (size_t)(found + 1 - bytes), says, strlen(says)));
            if (i > 1) assert_true(cairn_recall_text_question(text, i - 1)->at < q->at);
        }
        const cairn_recall_question *q = cairn_recall_text_question(text, 0);
        assert_in_range(q->at, 4300, 5700); /* a quarter of the way, give or take sentences before it */
        if (plain) assert_string_equal(q->text, "\nWhat is the pass key? The pass key is ");
        cairn_recall_text *again = NULL, *other = NULL;
        assert_ok(cairn_recall_text_new(c, &opt, &again));
        assert_memory_equal(cairn_recall_text_bytes(again, &n), bytes, 20000);
        opt.seed = 78;
        assert_ok(cairn_recall_text_new(c, &opt, &other));
        assert_memory_not_equal(cairn_recall_text_bytes(other, &n), bytes, 20000);
        opt.bytes = 500;
        cairn_recall_text_free(other);
        assert_int_equal(cairn_recall_text_new(c, &opt, &other), CAIRN_INVALID);
        assert_null(other);
        cairn_recall_text_free(text);
        cairn_recall_text_free(again);
    }
    cairn_corpus_close(c);
}

static void failing_allocations_leave_nothing(void **state)
{
    fixture *fx = *state;
    const char *path = fx->dir;
    for (uint64_t n = 1;; n++) {
        cairn_corpus *c = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_corpus_open(&path, 1, 0.2, &c);
        cairn_alloc_fail_at(0);
        if (st == CAIRN_OK) {
            cairn_corpus_close(c);
            break;
        }
        assert_int_equal(st, CAIRN_NO_MEMORY);
        assert_null(c);
    }
    cairn_corpus *c = open_corpus(fx->dir, 0.2);
    cairn_recall_options opt;
    cairn_recall_options_init(&opt, sizeof opt);
    for (uint64_t n = 1;; n++) {
        cairn_recall_text *text = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_recall_text_new(c, &opt, &text);
        cairn_alloc_fail_at(0);
        cairn_recall_text_free(text);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
    }
    cairn_corpus_close(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_splits_share_the_stream_piece_by_piece, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_cannot_be_a_corpus_is_refused_by_name, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_recall_text_holds_each_key_once_where_its_question_says, set_up, tear_down),
        cmocka_unit_test_setup_teardown(failing_allocations_leave_nothing, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
