/* test_vocab.c - text to tokens, tokens to text, and the choice of the next token. */
#include "model_fixture.h"
#include "tiny_model.h"

#include "model_internal.h"

/* ---- bytes ---- */

static void every_byte_is_one_token_and_comes_back(void **state)
{
    (void)state;
    cairn_model *model;
    uint8_t text[256];
    cairn_token tokens[256];
    size_t n;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    for (int b = 0; b < 256; b++) text[b] = (uint8_t)b;
    assert_ok(cairn_model_encode(model, text, 256, tokens, 256, &n));
    assert_int_equal(n, 256);
    for (int b = 0; b < 256; b++) {
        char out[4];
        assert_int_equal(tokens[b], 3 + b);
        assert_int_equal(cairn_model_decode(model, tokens[b], out, sizeof out), 1);
        assert_int_equal((uint8_t)out[0], b);
    }
    static const cairn_token silent[] = {0, 1, 2, 259, 260, -1, INT32_MAX};
    for (size_t i = 0; i < sizeof silent / sizeof *silent; i++) {
        char out[4];
        assert_int_equal(cairn_model_decode(model, silent[i], out, sizeof out), 0);
    }
    cairn_model_close(model);
}

static void a_short_buffer_gets_the_first_tokens_and_the_number_of_all(void **state)
{
    (void)state;
    cairn_model *model;
    cairn_token tokens[3] = {-7, -7, -7};
    size_t n = 99;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    assert_ok(cairn_model_encode(model, "hello", 5, NULL, 0, &n));
    assert_int_equal(n, 5);
    assert_ok(cairn_model_encode(model, "hello", 5, tokens, 2, &n));
    assert_int_equal(n, 5);
    assert_int_equal(tokens[1], 3 + 'e');
    assert_int_equal(tokens[2], -7);
    assert_ok(cairn_model_encode(model, "", 0, tokens, 2, &n));
    assert_int_equal(n, 0);
    cairn_model_close(model);
}

/* ---- SentencePiece ---- */

#define MARK "\xe2\x96\x81"

typedef struct piece {
    const char *text;
    float score;
    int32_t kind;
} piece;

/* A vocabulary alone, in a file that has no tensors. */
static void vocab_open(const fixture *fx, const char *model, const piece *pieces, uint32_t n, bool prefix, gguf *file,
                       vocab *v)
{
    cairn_gguf_writer *w;
    const char **texts = calloc(n, sizeof *texts);
    float *scores = calloc(n, sizeof *scores);
    int32_t *kinds = calloc(n, sizeof *kinds);
    assert_true(texts != NULL && scores != NULL && kinds != NULL);
    for (uint32_t i = 0; i < n; i++) {
        texts[i] = pieces[i].text;
        scores[i] = pieces[i].score;
        kinds[i] = pieces[i].kind;
    }
    assert_ok(cairn_gguf_writer_new(&w));
    assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", model));
    assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", texts, n));
    assert_ok(cairn_gguf_put_f32s(w, "tokenizer.ggml.scores", scores, n));
    assert_ok(cairn_gguf_put_i32s(w, "tokenizer.ggml.token_type", kinds, n));
    if (!prefix) assert_ok(cairn_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", false));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    free(texts);
    free(scores);
    free(kinds);
    assert_ok(gguf_open(fx->path, file));
    assert_ok(vocab_read(file, n, v));
}

static void expect_tokens(const vocab *v, const char *text, const cairn_token *expected, size_t n)
{
    cairn_token tokens[64];
    size_t got;
    assert_ok(vocab_encode(v, (const uint8_t *)text, strlen(text), tokens, 64, &got));
    if (got != n) fail_msg("'%s': %zu tokens, expected %zu", text, got, n);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] != expected[i]) fail_msg("'%s': token %zu is %d, expected %d", text, i, tokens[i], expected[i]);
}
#define EXPECT(v, text, ...)                                                                                           \
    expect_tokens(v, text, (const cairn_token[]){__VA_ARGS__},                                                         \
                  sizeof((const cairn_token[]){__VA_ARGS__}) / sizeof(cairn_token))

/* Worked out by hand from the rule: the neighbouring pair of the best score is joined first. */
static void pieces_are_joined_by_score_and_the_rest_is_spelled_in_bytes(void **state)
{
    fixture *fx = *state;
    static const piece pieces[] = {
        {"<unk>", 0, 2},  {"<s>", 0, 3},  {"</s>", 0, 3},    {"<0xC3>", 0, 6},   {"<0xA9>", 0, 6},
        {MARK, -1, 1},    {"a", -2, 1},   {"b", -3, 1},      {"c", -4, 1},       {"ab", -5, 1},
        {"bc", -4.5f, 1}, {"abc", -6, 1}, {MARK "a", -7, 1}, {"<tool>", 0, 4},   {"s", -8, 1},
        {"<", -9, 1},     {">", -10, 1},  {"<s", -1, 1},     {MARK MARK, -2, 1}, {"s>", -1, 1},
    };
    gguf file;
    vocab v;
    vocab_open(fx, "llama", pieces, sizeof pieces / sizeof *pieces, true, &file, &v);
    EXPECT(&v, "a", 12);      /* the text starts with a mark */
    EXPECT(&v, "abc", 5, 11); /* bc (-4.5) before ab (-5), then a + bc = abc (-6) before mark + a (-7) */
    EXPECT(&v, "ab", 5, 9);   /* ab (-5) goes before mark + a (-7) */
    EXPECT(&v, "a a", 12, 12);
    EXPECT(&v, " a", 18, 6);           /* two marks join (-2) before mark + a (-7) */
    EXPECT(&v, "\xc3\xa9", 5, 3, 4);   /* e acute: no piece, two bytes */
    EXPECT(&v, "d", 5, 0);             /* no byte token for d either: unknown */
    EXPECT(&v, "a<tool>b", 12, 13, 7); /* a user-defined token stands for itself */
    EXPECT(&v, "<s>", 5, 17, 16);      /* text never turns into a control token */
    EXPECT(&v, MARK "a", 18, 6);       /* a mark in the text is a space */
    vocab_wipe(&v);
    gguf_close(&file);
    vocab_open(fx, "llama", pieces, sizeof pieces / sizeof *pieces, false, &file, &v);
    EXPECT(&v, "a", 6);
    EXPECT(&v, "a a", 6, 12);
    char out[16];
    assert_int_equal(vocab_decode(&v, 12, out, sizeof out), 2);
    assert_memory_equal(out, " a", 2);
    assert_int_equal(vocab_decode(&v, 4, out, sizeof out), 1);
    assert_int_equal((uint8_t)out[0], 0xa9);
    assert_int_equal(vocab_decode(&v, 13, out, sizeof out), 6);
    assert_memory_equal(out, "<tool>", 6);
    assert_int_equal(vocab_decode(&v, 13, out, 3), 3);
    assert_int_equal(vocab_decode(&v, 0, out, sizeof out), 0);
    assert_int_equal(vocab_decode(&v, 1, out, sizeof out), 0);
    vocab_wipe(&v);
    gguf_close(&file);
}

/* The rule in the plainest way: look at all neighbours, join the best, again. Single bytes only as characters. */
static size_t join_plainly(const piece *pieces, uint32_t n, const char *text, cairn_token *out)
{
    char word[256][64];
    size_t words = 0;
    for (size_t i = 0; text[i] != 0; i++) {
        if (text[i] == ' ')
            strcpy(word[words++], MARK);
        else
            snprintf(word[words++], sizeof word[0], "%c", text[i]);
    }
    for (;;) {
        size_t best = SIZE_MAX;
        float score = -INFINITY;
        for (size_t i = 0; i + 1 < words; i++) {
            char both[128];
            snprintf(both, sizeof both, "%s%s", word[i], word[i + 1]);
            for (uint32_t p = 0; p < n; p++)
                if (pieces[p].kind == 1 && strcmp(pieces[p].text, both) == 0 && pieces[p].score > score) {
                    best = i;
                    score = pieces[p].score;
                }
        }
        if (best == SIZE_MAX) break;
        memmove(word[best] + strlen(word[best]), word[best + 1], strlen(word[best + 1]) + 1);
        memmove(word + best + 1, word + best + 2, (words - best - 2) * sizeof word[0]);
        words--;
    }
    for (size_t i = 0; i < words; i++) {
        out[i] = 0;
        for (uint32_t p = 0; p < n; p++)
            if (strcmp(pieces[p].text, word[i]) == 0) out[i] = (cairn_token)p;
    }
    return words;
}

static void joining_word_by_word_equals_joining_the_whole_text_plainly(void **state)
{
    fixture *fx = *state;
    test_random r = {11};
    enum { MOST = 60 };
    for (int round = 0; round < 12; round++) {
        static char texts[MOST][24];
        piece pieces[MOST] = {{"<unk>", 0, 2}, {"<s>", 0, 3}, {"</s>", 0, 3}, {MARK, -1, 1},
                              {"x", -2, 1},    {"y", -3, 1},  {"z", -4, 1}};
        uint32_t n = 7;
        bool cross = round % 2 == 1; /* pieces with a mark in the middle: the text cannot be cut at words */
        while (n < MOST) {
            size_t length = 2 + test_random_below(&r, 3);
            texts[n][0] = 0;
            for (size_t i = 0; i < length; i++) {
                static const char *const letters[] = {"x", "y", "z", MARK};
                strcat(texts[n], letters[test_random_below(&r, i == 0 || cross ? 4 : 3)]);
            }
            bool again = false;
            for (uint32_t i = 3; i < n; i++) again |= strcmp(pieces[i].text, texts[n]) == 0;
            if (again) continue;
            pieces[n] = (piece){texts[n], -(float)test_random_below(&r, 20), 1}; /* equal scores: leftmost first */
            n++;
        }
        gguf file;
        vocab v;
        vocab_open(fx, "llama", pieces, n, false, &file, &v);
        assert_int_equal(v.pieces_cross_words, cross);
        for (int t = 0; t < 40; t++) {
            char text[101];
            cairn_token expected[128];
            cairn_token got[128];
            size_t n_got;
            size_t length = test_random_below(&r, 100);
            for (size_t i = 0; i < length; i++) text[i] = "xyz "[test_random_below(&r, 4)];
            text[length] = 0;
            size_t n_expected = join_plainly(pieces, n, text, expected);
            assert_ok(vocab_encode(&v, (const uint8_t *)text, length, got, 128, &n_got));
            if (n_got != n_expected) fail_msg("'%s': %zu tokens, plainly %zu", text, n_got, n_expected);
            for (size_t i = 0; i < n_got; i++)
                if (got[i] != expected[i]) fail_msg("'%s': token %zu is %d, plainly %d", text, i, got[i], expected[i]);
        }
        vocab_wipe(&v);
        gguf_close(&file);
    }
}

static void text_comes_back_from_a_sentencepiece_vocabulary_with_its_first_space(void **state)
{
    fixture *fx = *state;
    static piece pieces[3 + 256 + 5] = {{"<unk>", 0, 2}, {"<s>", 0, 3}, {"</s>", 0, 3}};
    static char names[256][8];
    test_random r = {3};
    gguf file;
    vocab v;
    for (int b = 0; b < 256; b++) {
        snprintf(names[b], sizeof names[b], "<0x%02X>", b);
        pieces[3 + b] = (piece){names[b], 0, 6};
    }
    pieces[259] = (piece){MARK, -1, 1};
    pieces[260] = (piece){"e", -2, 1};
    pieces[261] = (piece){"ee", -3, 1};
    pieces[262] = (piece){MARK "e", -2, 1};
    pieces[263] = (piece){"e" MARK "e", -4, 1};
    for (int round = 0; round < 400; round++) {
        if (round % 200 == 0) {
            bool across = round == 200; /* a piece spans words: the text is joined as a whole */
            if (across) {
                vocab_wipe(&v);
                gguf_close(&file);
            }
            vocab_open(fx, "llama", pieces, 263 + across, true, &file, &v);
            assert_int_equal(v.kind, VOCAB_SPM);
            assert_int_equal(v.bos, 1); /* not in the file: SentencePiece's own */
            assert_int_equal(v.pieces_cross_words, across);
        }
        uint8_t text[64];
        cairn_token tokens[256];
        char back[512];
        size_t n;
        size_t at = 0;
        size_t bytes = 1 + test_random_below(&r, 63);
        for (size_t i = 0; i < bytes; i++)
            text[i] =
                test_random_below(&r, 3) == 0 ? (uint8_t)test_random_u64(&r) : (uint8_t) "e "[test_random_below(&r, 2)];
        assert_ok(vocab_encode(&v, text, bytes, tokens, 256, &n));
        assert_true(n <= 256);
        for (size_t i = 0; i < n; i++) at += vocab_decode(&v, tokens[i], back + at, sizeof back - at);
        assert_int_equal(at, bytes + 1);
        assert_int_equal(back[0], ' ');
        assert_memory_equal(back + 1, text, bytes);
    }
    vocab_wipe(&v);
    gguf_close(&file);
}

/* ---- others ---- */

static void byte_pairs_are_decoded_whether_or_not_text_can_be_encoded(void **state)
{
    fixture *fx = *state;
    static const piece pieces[] = {
        {"\xc4\xa0the", 0, 1}, {"\xc4\x8a", 0, 1}, {"\xc3\x83\xc2\xa9", 0, 1}, {"<|end|>", 0, 3}, {"<fim>", 0, 4}};
    gguf file;
    vocab v;
    char out[16];
    size_t n = 5;
    vocab_open(fx, "gpt2", pieces, 5, true, &file, &v);
    assert_int_equal(vocab_decode(&v, 0, out, sizeof out), 4); /* U+0120 is the space */
    assert_memory_equal(out, " the", 4);
    assert_int_equal(vocab_decode(&v, 1, out, sizeof out), 1); /* U+010A the newline */
    assert_memory_equal(out, "\n", 1);
    assert_int_equal(vocab_decode(&v, 2, out, sizeof out), 2); /* U+00C3 U+00A9: e acute in UTF-8 */
    assert_memory_equal(out, "\xc3\xa9", 2);
    assert_int_equal(vocab_decode(&v, 3, out, sizeof out), 0);
    assert_int_equal(vocab_decode(&v, 4, out, sizeof out), 5);
    assert_int_equal(vocab_encode(&v, (const uint8_t *)"x", 1, NULL, 0, &n), CAIRN_UNSUPPORTED);
    assert_non_null(strstr(cairn_last_error(), "key 'tokenizer.ggml.pre'"));
    assert_int_equal(n, 0);
    vocab_wipe(&v);
    gguf_close(&file);
}

/* GPT-2's table of characters, made the way its authors made it. */
static void all_256_bytes_have_their_gpt2_character(void **state)
{
    fixture *fx = *state;
    static piece pieces[256];
    static char texts[256][4];
    gguf file;
    vocab v;
    uint32_t other = 0;
    for (uint32_t b = 0; b < 256; b++) {
        bool same = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
        uint32_t c = same ? b : 256 + other++;
        if (c < 0x80)
            snprintf(texts[b], sizeof texts[b], "%c", (int)c);
        else
            snprintf(texts[b], sizeof texts[b], "%c%c", (int)(0xc0 | c >> 6), (int)(0x80 | (c & 0x3f)));
        pieces[b] = (piece){texts[b], 0, 1};
    }
    vocab_open(fx, "gpt2", pieces, 256, true, &file, &v);
    for (int b = 0; b < 256; b++) {
        char out[4];
        assert_int_equal(vocab_decode(&v, b, out, sizeof out), 1);
        assert_int_equal((uint8_t)out[0], b);
    }
    vocab_wipe(&v);
    gguf_close(&file);
}

static void damaged_vocabularies_are_refused_by_key_and_token(void **state)
{
    fixture *fx = *state;
    static const piece bad_kind[] = {{"a", 0, 1}, {"b", 0, 7}};
    static const piece bad_score[] = {{"a", 0, 1}, {"b", INFINITY, 1}};
    const struct {
        const piece *pieces;
        uint32_t rows;
        const char *message;
    } cases[] = {{bad_kind, 2, "'tokenizer.ggml.token_type': token 1 has no kind"},
                 {bad_score, 2, "'tokenizer.ggml.scores': token 1 has no finite score"},
                 {bad_kind, 3, "'tokenizer.ggml.tokens' has 2 tokens, token_embd.weight 3 rows"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cairn_gguf_writer *w;
        gguf file;
        vocab v;
        const char *texts[] = {cases[i].pieces[0].text, cases[i].pieces[1].text};
        const float scores[] = {cases[i].pieces[0].score, cases[i].pieces[1].score};
        const int32_t kinds[] = {cases[i].pieces[0].kind, cases[i].pieces[1].kind};
        assert_ok(cairn_gguf_writer_new(&w));
        assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", "llama"));
        assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", texts, 2));
        assert_ok(cairn_gguf_put_f32s(w, "tokenizer.ggml.scores", scores, 2));
        assert_ok(cairn_gguf_put_i32s(w, "tokenizer.ggml.token_type", kinds, 2));
        assert_ok(cairn_gguf_writer_save(w, fx->path));
        cairn_gguf_writer_free(w);
        assert_ok(gguf_open(fx->path, &file));
        assert_int_equal(vocab_read(&file, cases[i].rows, &v), CAIRN_INVALID);
        assert_non_null(strstr(cairn_last_error(), cases[i].message));
        vocab_wipe(&v);
        gguf_close(&file);
    }
}

/* ---- sampling ---- */

enum { VOCAB = 260 };

static cairn_model *byte_model(void)
{
    cairn_model *model;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    return model;
}

static void greedy_sampling_takes_the_best_token_that_can_be_said_and_the_lowest_of_equals(void **state)
{
    (void)state;
    cairn_model *model = byte_model();
    cairn_sampler greedy = {.temperature = 0};
    cairn_token token;
    float logits[VOCAB] = {0};
    logits[0] = logits[1] = logits[2] = logits[259] = 100; /* unknown, control, the landmark */
    logits[50] = logits[40] = 3;
    logits[45] = NAN;
    assert_ok(cairn_model_sample(model, logits, &greedy, &token));
    assert_int_equal(token, 40);
    for (int i = 3; i < 259; i++) logits[i] = -INFINITY;
    assert_int_equal(cairn_model_sample(model, logits, &greedy, &token), CAIRN_INVALID);
    cairn_model_close(model);
}

static void samples_come_as_often_as_their_probability_says(void **state)
{
    (void)state;
    cairn_model *model = byte_model();
    cairn_sampler sampler = {.temperature = 2, .top_p = 1, .state = 77};
    enum { DRAWS = 20000 };
    int seen[VOCAB] = {0};
    float logits[VOCAB];
    for (int i = 0; i < VOCAB; i++) logits[i] = -INFINITY;
    logits[1] = 50;
    logits[10] = 2 * logf(0.5f);
    logits[11] = 2 * logf(0.3f);
    logits[200] = 2 * logf(0.2f);
    for (int i = 0; i < DRAWS; i++) {
        cairn_token token;
        assert_ok(cairn_model_sample(model, logits, &sampler, &token));
        seen[token]++;
    }
    assert_int_equal(seen[10] + seen[11] + seen[200], DRAWS);
    /* 4 standard deviations of a binomial share of 20000: at most 0.014 */
    assert_true(abs(seen[10] - DRAWS / 2) < 280);
    assert_true(abs(seen[11] - DRAWS * 3 / 10) < 280);
    cairn_model_close(model);
}

static void top_p_keeps_the_fewest_of_the_likeliest_that_reach_it(void **state)
{
    (void)state;
    cairn_model *model = byte_model();
    const struct {
        float top_p;
        bool second, third;
    } cases[] = {
        {0.4f, false, false}, {0.5f, false, false}, {0.51f, true, false}, {0.79f, true, false}, {0.9f, true, true}};
    float logits[VOCAB];
    for (int i = 0; i < VOCAB; i++) logits[i] = -INFINITY;
    logits[10] = logf(0.2f);
    logits[11] = logf(0.5f) + 1e-4f;
    logits[200] = logf(0.3f);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        cairn_sampler sampler = {.temperature = 1, .top_p = cases[c].top_p, .state = c};
        bool seen[VOCAB] = {false};
        for (int i = 0; i < 400; i++) {
            cairn_token token;
            assert_ok(cairn_model_sample(model, logits, &sampler, &token));
            seen[token] = true;
        }
        assert_true(seen[11]);
        assert_int_equal(seen[200], cases[c].second);
        assert_int_equal(seen[10], cases[c].third);
    }
    cairn_model_close(model);
}

static void the_same_seed_gives_the_same_tokens_and_bad_settings_are_refused(void **state)
{
    (void)state;
    cairn_model *model = byte_model();
    float logits[VOCAB];
    test_random r = {9};
    test_random_fill(&r, logits, VOCAB);
    cairn_sampler a = {.temperature = 1, .top_p = 0.95f, .state = 5};
    cairn_sampler b = a;
    cairn_token x;
    cairn_token y;
    bool varied = false;
    cairn_token first = -1;
    for (int i = 0; i < 50; i++) {
        assert_ok(cairn_model_sample(model, logits, &a, &x));
        assert_ok(cairn_model_sample(model, logits, &b, &y));
        assert_int_equal(x, y);
        if (first >= 0) varied |= x != first;
        first = x;
    }
    assert_true(varied);
    const cairn_sampler bad[] = {{.temperature = -1, .top_p = 1},       {.temperature = NAN, .top_p = 1},
                                 {.temperature = INFINITY, .top_p = 1}, {.temperature = 1, .top_p = 0},
                                 {.temperature = 1, .top_p = 1.5f},     {.temperature = 1, .top_p = NAN}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cairn_sampler s = bad[i];
        assert_int_equal(cairn_model_sample(model, logits, &s, &x), CAIRN_INVALID);
    }
    cairn_model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_byte_is_one_token_and_comes_back),
        cmocka_unit_test(a_short_buffer_gets_the_first_tokens_and_the_number_of_all),
        cmocka_unit_test_setup_teardown(pieces_are_joined_by_score_and_the_rest_is_spelled_in_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(joining_word_by_word_equals_joining_the_whole_text_plainly, setup, teardown),
        cmocka_unit_test_setup_teardown(text_comes_back_from_a_sentencepiece_vocabulary_with_its_first_space, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(byte_pairs_are_decoded_whether_or_not_text_can_be_encoded, setup, teardown),
        cmocka_unit_test_setup_teardown(all_256_bytes_have_their_gpt2_character, setup, teardown),
        cmocka_unit_test_setup_teardown(damaged_vocabularies_are_refused_by_key_and_token, setup, teardown),
        cmocka_unit_test(greedy_sampling_takes_the_best_token_that_can_be_said_and_the_lowest_of_equals),
        cmocka_unit_test(samples_come_as_often_as_their_probability_says),
        cmocka_unit_test(top_p_keeps_the_fewest_of_the_likeliest_that_reach_it),
        cmocka_unit_test(the_same_seed_gives_the_same_tokens_and_bad_settings_are_refused),
    };
    return cmocka_run_group_tests_name("vocab", tests, NULL, NULL);
}
