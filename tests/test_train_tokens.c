/* test_train_tokens.c - documents as tokens, each with the weight and place of the bytes it stands for.
 *
 * Witness: the tokens' own decoded bytes, laid end to end, are the document; a token's bytes are found by counting
 * them.
 */
#include "tiny_vocab.h"

#include <model_internal.h>
#include <train_internal.h>

typedef struct fixture {
    char *dir, *path;
    cairn_model *spm; /* of tiny_put_spm */
} fixture;

static cairn_model *open_tiny(const fixture *fx, const char *kind, bool prefix)
{
    tiny_model m = tiny_model_default();
    cairn_model *model;
    m.block_tokens = 0;
    m.vocab = TINY_PIECES;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    if (strcmp(kind, "spm") == 0) tiny_put_spm(w, "<|pad|>");
    if (strcmp(kind, "bpe") == 0) tiny_put_bpe(w, "qwen2");
    if (strcmp(kind, "words unknown") == 0) tiny_put_bpe(w, "nobody");
    if (!prefix) assert_ok(cairn_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", false));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    assert_ok(cairn_model_open(fx->path, &model));
    return model;
}

static int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "model.gguf");
    fx->spm = open_tiny(fx, "spm", true);
    *state = fx;
    return 0;
}
static int teardown(void **state)
{
    fixture *fx = *state;
    cairn_model_close(fx->spm);
    free(fx->path);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

/* A document whose decoded tokens are it, after `lead` bytes: every token's bytes, weight and place by counting. */
static void check_document(const cairn_model *model, const uint8_t *text, size_t bytes, size_t lead, uint64_t seed)
{
    test_random r = {seed};
    float *weights = calloc(bytes + 1, sizeof *weights);
    uint64_t *places = calloc(bytes + 1, sizeof *places);
    char *back = calloc(bytes + 2, 1);
    cairn_train_tokens t = {0};
    size_t at = 0;
    assert_true(weights != NULL && places != NULL && back != NULL);
    for (size_t i = 0; i < bytes; i++) {
        weights[i] = (float)test_random_below(&r, 20) / 4;
        places[i] = test_random_u64(&r);
    }
    const cairn_train_document d = {text, weights, places, bytes};
    assert_ok(cairn_train_tokenize(model, &d, &t));
    for (size_t i = 0; i < t.n; i++) {
        size_t n = cairn_model_decode(model, t.tokens[i], back + at, bytes + 2 - at);
        size_t from = at < lead ? 0 : at - lead, to = at + n < lead ? 0 : at + n - lead;
        float most = 0;
        assert_int_equal(t.bytes[i], to - from);
        for (size_t b = from; b < to; b++) most = fmaxf(most, weights[b]);
        assert_true(t.weights[i] == most);
        assert_true(t.places[i] == places[from]);
        at += n;
    }
    assert_int_equal(at, bytes + lead);
    if (lead != 0) assert_int_equal(back[0], ' ');
    assert_memory_equal(back + lead, text, bytes);
    free(weights), free(places), free(back);
    cairn_train_tokens_wipe(&t);
}

static void tokens_carry_the_largest_weight_of_their_bytes_and_the_place_of_the_first(void **state)
{
    const fixture *fx = *state;
    test_random r = {4};
    cairn_model *bare = open_tiny(fx, "spm", false), *pairs = open_tiny(fx, "bpe", true);
    for (uint64_t round = 0; round < 300; round++) {
        static const char *const parts[] = {"the ", " the", "he", "in", " ", "e", "\n", "\xc3\xa9", "\xc2\xb5", "t"};
        uint8_t text[256];
        size_t bytes = 0, n = 1 + test_random_below(&r, 40);
        for (size_t i = 0; i < n; i++) {
            const char *part = parts[test_random_below(&r, 10)];
            memcpy(text + bytes, part, strlen(part));
            bytes += strlen(part);
        }
        check_document(fx->spm, text, bytes, 1, round);
        check_document(bare, text, bytes, 0, round);
        check_document(pairs, text, bytes, 0, round);
    }
    cairn_model_close(bare);
    cairn_model_close(pairs);
}

static void byte_tokens_are_the_bytes_themselves(void **state)
{
    (void)state;
    cairn_model *model;
    uint8_t text[256];
    for (int b = 0; b < 256; b++) text[b] = (uint8_t)b;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    check_document(model, text, 256, 0, 1);
    cairn_model_close(model);
}

static void weights_are_1_and_places_count_from_0_unless_said_otherwise(void **state)
{
    const fixture *fx = *state;
    cairn_train_tokens t = {0};
    const cairn_train_document d = {(const uint8_t *)"x the", NULL, NULL, 5};
    assert_ok(cairn_train_tokenize(fx->spm, &d, &t));
    assert_int_equal(t.n, 3); /* space, x, " the": the first space is in no document */
    static const uint32_t bytes[] = {0, 1, 4};
    static const uint64_t places[] = {0, 0, 1};
    static const float weights[] = {0, 1, 1};
    assert_memory_equal(t.bytes, bytes, sizeof bytes);
    assert_memory_equal(t.places, places, sizeof places);
    assert_memory_equal(t.weights, weights, sizeof weights);
    const cairn_train_document empty = {(const uint8_t *)"", NULL, NULL, 0};
    assert_ok(cairn_train_tokenize(fx->spm, &empty, &t));
    assert_int_equal(t.n, 0);
    cairn_train_tokens_wipe(&t);
}

/* User-defined tokens at the start keep the space away; a mark in the text decodes to a space of one byte; a space
 * after a broken character is one byte too. */
static void odd_documents_are_followed_too(void **state)
{
    const fixture *fx = *state;
    static const struct {
        const char *text;
        size_t n;
        uint32_t bytes[8];
    } cases[] = {{"<tool>a", 2, {6, 1}},
                 {"a<tool><tool>", 4, {0, 1, 6, 6}},
                 {TINY_MARK "e", 3, {0, 3, 1}},
                 {"e" TINY_MARK "the ", 3, {0, 1, 7}},
                 {"   ", 4, {0, 1, 1, 1}},
                 {"<|pad|>", 8, {0, 1, 1, 1, 1, 1, 1, 1}}, /* the name of a control token is text */
                 {"\xff\xff a", 5, {0, 1, 1, 1, 1}},
                 {"a\xe2 ", 4, {0, 1, 1, 1}}};
    cairn_train_tokens t = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const cairn_train_document d = {(const uint8_t *)cases[i].text, NULL, NULL, strlen(cases[i].text)};
        assert_ok(cairn_train_tokenize(fx->spm, &d, &t));
        if (t.n != cases[i].n) fail_msg("'%s': %zu tokens", cases[i].text, t.n);
        for (size_t k = 0; k < t.n; k++)
            if (t.bytes[k] != cases[i].bytes[k]) fail_msg("'%s': token %zu has %u bytes", d.text, k, t.bytes[k]);
    }
    cairn_train_tokens_wipe(&t);

    /* a vocabulary without some bytes: they are unknown tokens, one for each */
    cairn_model *model;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/fuzz/gguf/llama-spm.gguf", &model));
    const cairn_train_document d = {(const uint8_t *)"a\xc3\xa9"
                                                     "aaA",
                                    NULL, NULL, 6};
    static const cairn_token ids[] = {6, 0, 0, 7, 3}; /* mark a, two unknown, aa, <0x41> */
    static const uint32_t bytes[] = {1, 1, 1, 2, 1};
    assert_ok(cairn_train_tokenize(model, &d, &t));
    assert_int_equal(t.n, 5);
    assert_memory_equal(t.tokens, ids, sizeof ids);
    assert_memory_equal(t.bytes, bytes, sizeof bytes);
    cairn_train_tokens_wipe(&t);
    cairn_model_close(model);
}

/* Byte tokens and x, no piece for the space: it is spelled as its mark's three bytes, the one before the text too. */
static void spaces_without_a_piece_are_followed_through_three_bytes(void **state)
{
    const fixture *fx = *state;
    static char names[256][8];
    const char *tokens[260] = {"<unk>", "<s>", "</s>"};
    int32_t kinds[260] = {TINY_UNKNOWN, TINY_CONTROL, TINY_CONTROL};
    static const uint32_t bytes[] = {0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0};
    static const uint64_t places[] = {0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3};
    cairn_train_tokens t = {0};
    cairn_model *model;
    tiny_model m = tiny_model_default();
    m.block_tokens = 0;
    m.vocab = 260;
    for (int b = 0; b < 256; b++) {
        snprintf(names[b], sizeof names[b], "<0x%02X>", b);
        tokens[3 + b] = names[b];
        kinds[3 + b] = TINY_BYTE;
    }
    tokens[259] = "x";
    kinds[259] = TINY_NORMAL;
    for (int known = 1; known >= 0; known--) {
        cairn_gguf_writer *w = tiny_model_begin(&m);
        assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", "llama"));
        assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, 260));
        assert_ok(cairn_gguf_put_i32s(w, "tokenizer.ggml.token_type", kinds, 260));
        assert_ok(cairn_gguf_writer_save(w, fx->path));
        cairn_gguf_writer_free(w);
        assert_ok(cairn_model_open(fx->path, &model));
        const cairn_train_document d = {(const uint8_t *)"x x ", NULL, NULL, 4};
        assert_ok(cairn_train_tokenize(model, &d, &t));
        assert_int_equal(t.n, 11);
        assert_memory_equal(t.bytes, bytes, sizeof bytes);
        assert_memory_equal(t.places, places, sizeof places);
        assert_int_equal(t.tokens[0], known ? 3 + 0xe2 : 0);
        cairn_model_close(model);
        kinds[3 + 0xe2] = kinds[3 + 0x96] = kinds[3 + 0x81] = TINY_CONTROL; /* the second time they are unknown */
    }
    cairn_train_tokens_wipe(&t);
}

/* Whatever the bytes: each token's are the next ones. */
static void any_bytes_are_followed_to_their_end(void **state)
{
    const fixture *fx = *state;
    test_random r = {12};
    cairn_train_tokens t = {0};
    for (int round = 0; round < 2000; round++) {
        uint8_t text[40];
        size_t bytes = test_random_below(&r, 40), at = 0, bad = 0;
        for (size_t i = 0; i < bytes; i++) {
            static const uint8_t often[] = {' ', 'e', 't', 'h', 0xe2, 0x96, 0x81, 0xf0, 0xff};
            uint32_t pick = test_random_below(&r, 10);
            text[i] = pick < 9 ? often[pick] : (uint8_t)test_random_u64(&r);
        }
        const cairn_train_document d = {text, NULL, NULL, bytes};
        assert_ok(cairn_train_tokenize(fx->spm, &d, &t));
        for (size_t i = 0; i < t.n; i++) {
            char piece[16];
            size_t n = cairn_model_decode(fx->spm, t.tokens[i], piece, sizeof piece);
            assert_int_equal(t.places[i], at < bytes ? at : bytes - 1);
            assert_true(at + t.bytes[i] <= bytes);
            if (t.bytes[i] == n) bad += memcmp(piece, text + at, n) != 0 && memchr(text + at, ' ', n) == NULL;
            at += t.bytes[i];
        }
        assert_int_equal(at, bytes);
        assert_int_equal(bad, 0);
    }
    cairn_train_tokens_wipe(&t);
}

static void vocabularies_that_cannot_encode_are_refused(void **state)
{
    const fixture *fx = *state;
    static const char *const kinds[] = {"words unknown", "none"}, *const words[] = {"'nobody'", "no vocabulary"};
    for (size_t i = 0; i < 2; i++) {
        cairn_train_tokens t = {0};
        cairn_model *model = open_tiny(fx, kinds[i], true);
        const cairn_train_document d = {(const uint8_t *)"x", NULL, NULL, 1};
        assert_int_equal(cairn_train_tokenize(model, &d, &t), CAIRN_UNSUPPORTED);
        assert_non_null(strstr(cairn_last_error(), words[i]));
        assert_int_equal(t.n, 0);
        cairn_train_tokens_wipe(&t);
        cairn_model_close(model);
    }
}

static void room_is_used_again_and_failing_allocations_leave_nothing(void **state)
{
    const fixture *fx = *state;
    cairn_train_tokens t = {0};
    const cairn_train_document d = {(const uint8_t *)"the hen in the inn", NULL, NULL, 18};
    cairn_status st = CAIRN_NO_MEMORY;
    uint64_t n = 1;
    for (; st != CAIRN_OK; n++) {
        cairn_alloc_fail_at(n);
        st = cairn_train_tokenize(fx->spm, &d, &t);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
        if (st != CAIRN_OK) assert_int_equal(t.n, 0);
    }
    assert_true(n > 6); /* four arrays, a piece, the encoder's */
    const cairn_token *tokens = t.tokens;
    size_t had = t.n;
    assert_true(had > 0);
    assert_ok(cairn_train_tokenize(fx->spm, &d, &t));
    assert_ptr_equal(t.tokens, tokens);
    assert_int_equal(t.n, had);
    cairn_train_tokens_wipe(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(tokens_carry_the_largest_weight_of_their_bytes_and_the_place_of_the_first,
                                        setup, teardown),
        cmocka_unit_test(byte_tokens_are_the_bytes_themselves),
        cmocka_unit_test_setup_teardown(weights_are_1_and_places_count_from_0_unless_said_otherwise, setup, teardown),
        cmocka_unit_test_setup_teardown(odd_documents_are_followed_too, setup, teardown),
        cmocka_unit_test_setup_teardown(spaces_without_a_piece_are_followed_through_three_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(any_bytes_are_followed_to_their_end, setup, teardown),
        cmocka_unit_test_setup_teardown(vocabularies_that_cannot_encode_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(room_is_used_again_and_failing_allocations_leave_nothing, setup, teardown),
    };
    return cmocka_run_group_tests_name("train_tokens", tests, NULL, NULL);
}
