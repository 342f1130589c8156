/* test_vocab_bpe.c - byte-pair vocabularies.
 *
 * Witness: llama.cpp's own tokens for a vocabulary whose merges know no borders of words, so that they hang on where
 * the words are cut (data/bpe/README.md); besides, joining by plain loops.
 */
#include "model_fixture.h"
#include "tiny_vocab.h"

#include "vocab_internal.h"

#include <stdio.h>

typedef struct pairs {
    gguf file;
    vocab v;
} pairs;

/* The vocabulary of data/bpe as a model that cuts words like `pre` (NULL: does not say), without the key `but`. */
static void pairs_open(const fixture *fx, const char *pre, const char *but, pairs *out)
{
    static const char *const keys[] = {"tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
                                       "tokenizer.ggml.merges"};
    gguf source;
    cairn_gguf_writer *w;
    assert_ok(gguf_open(CAIRN_TEST_DATA "/bpe/vocab.gguf", &source));
    assert_ok(cairn_gguf_writer_new(&w));
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (but == NULL || strcmp(but, keys[i]) != 0) assert_ok(gguf_put_value(w, gguf_find(&source, keys[i])));
    if (pre != NULL) assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.pre", pre));
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    size_t tokens = gguf_find(&source, "tokenizer.ggml.tokens")->count;
    gguf_close(&source);
    assert_ok(gguf_open(fx->path, &out->file));
    assert_ok(vocab_read(&out->file, (uint32_t)tokens, &out->v));
    assert_int_equal(out->v.kind, VOCAB_BPE);
}
static void pairs_close(pairs *p)
{
    vocab_wipe(&p->v);
    gguf_close(&p->file);
}

static void assert_spells(const vocab *v, const cairn_token *tokens, size_t n, const uint8_t *text, size_t bytes)
{
    char *back = malloc(bytes + 1);
    size_t at = 0;
    assert_non_null(back);
    for (size_t i = 0; i < n; i++) at += vocab_decode(v, tokens[i], back + at, bytes + 1 - at);
    assert_int_equal(at, bytes);
    assert_memory_equal(back, text, bytes);
    free(back);
}

static size_t from_hex(const char *hex, uint8_t *out)
{
    size_t n = 0;
    for (; hex[0] != 0 && hex[0] != '-'; hex += 2, n++) {
        unsigned byte;
        assert_int_equal(sscanf(hex, "%2x", &byte), 1);
        out[n] = (uint8_t)byte;
    }
    return n;
}

static void texts_become_the_tokens_llama_cpp_makes_of_them(void **state)
{
    const fixture *fx = *state;
    enum { ROOM = 1 << 14 };
    static char line[8 * ROOM];
    static uint8_t text[ROOM];
    static cairn_token wanted[ROOM], got[ROOM];
    FILE *lines = fopen(CAIRN_TEST_DATA "/bpe/tokens.txt", "r");
    char now[32] = "";
    pairs p;
    size_t kinds = 0, checked = 0;
    assert_non_null(lines);
    while (fgets(line, sizeof line, lines) != NULL) {
        size_t n = 0, have = 0;
        line[strcspn(line, "\n")] = 0;
        char *rest = NULL, *pre = strtok_r(line, " ", &rest), *hex = strtok_r(NULL, " ", &rest);
        assert_true(pre != NULL && hex != NULL);
        if (strcmp(pre, now) != 0) {
            if (now[0] != 0) pairs_close(&p);
            snprintf(now, sizeof now, "%s", pre);
            pairs_open(fx, pre, NULL, &p);
            kinds++;
        }
        size_t bytes = from_hex(hex, text);
        for (char *id; (id = strtok_r(NULL, " ", &rest)) != NULL; n++) wanted[n] = (cairn_token)atoi(id);
        assert_ok(vocab_encode(&p.v, text, bytes, got, ROOM, &have));
        if (have != n || memcmp(got, wanted, n * sizeof *got) != 0)
            fail_msg("%s, %s: %zu tokens, llama.cpp %zu, or others", pre, hex, have, n);
        assert_spells(&p.v, got, n, text, bytes);
        checked++;
    }
    pairs_close(&p);
    fclose(lines);
    assert_int_equal(kinds, 5);
    assert_int_equal(checked, 589);
}

/* ---- plain loops ---- */

typedef struct plain {
    const pairs *p;
    char texts[2048][64]; /* of merges: "left right" in the file's spelling */
    size_t n;
} plain;

/* The place of "left right" among the merges. */
static size_t rank_of(const plain *all, const char *left, const char *right)
{
    char line[160];
    snprintf(line, sizeof line, "%s %s", left, right);
    for (size_t i = 0; i < all->n; i++)
        if (strcmp(all->texts[i], line) == 0) return i;
    return SIZE_MAX;
}

/* A word by the definition: while any two neighbours were merged in training, the earliest merge, leftmost first. */
static cairn_status encode_plainly(void *state, const uint8_t *word, size_t bytes, token_sink *out)
{
    const plain *all = state;
    char pieces[64][64];
    size_t n = 0;
    assert_true(bytes <= 64);
    for (size_t i = 0; i < bytes; i++) {
        uint32_t b = word[i], other = 0;
        for (uint32_t c = 0; c < b; c++)
            other += !((c >= '!' && c <= '~') || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff));
        bool same = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
        uint32_t c = same ? b : 256 + other;
        if (c < 0x80)
            snprintf(pieces[n++], 64, "%c", (int)c);
        else
            snprintf(pieces[n++], 64, "%c%c", (int)(0xc0 | c >> 6), (int)(0x80 | (c & 0x3f)));
    }
    for (;;) {
        size_t best = SIZE_MAX, where = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            size_t rank = rank_of(all, pieces[i], pieces[i + 1]);
            if (rank < best) best = rank, where = i;
        }
        if (best == SIZE_MAX) break;
        char both[130];
        snprintf(both, sizeof both, "%s%s", pieces[where], pieces[where + 1]);
        assert_true(strlen(both) < sizeof *pieces);
        memcpy(pieces[where], both, strlen(both) + 1);
        memmove(pieces[where + 1], pieces[where + 2], (n - where - 2) * sizeof *pieces);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        cairn_token id = -1;
        for (uint32_t t = 0; t < all->p->v.n; t++)
            if (gguf_text_is(all->p->v.pieces[t], pieces[i])) id = (cairn_token)t;
        assert_true(id >= 0);
        emit(out, id);
    }
    return CAIRN_OK;
}

static void words_are_joined_as_plain_loops_join_them(void **state)
{
    const fixture *fx = *state;
    static plain all;
    pairs p;
    words *cut;
    test_random r = {31};
    pairs_open(fx, "gpt-2", NULL, &p); /* the family that never takes a word whole */
    const gguf_value *merges = gguf_find(&p.file, "tokenizer.ggml.merges");
    assert_true(merges->count > 500 && merges->count <= 2048);
    for (size_t i = 0, at = 0; i < merges->count; i++) {
        gguf_text line = gguf_next_string(merges, &at);
        assert_true(line.bytes < sizeof all.texts[i]);
        snprintf(all.texts[i], sizeof all.texts[i], "%.*s", (int)line.bytes, line.data);
    }
    all.n = merges->count;
    all.p = &p;
    assert_ok(words_new((gguf_text){"gpt-2", 5}, &cut));
    for (int round = 0; round < 400; round++) {
        static const char *const parts[] = {"the", " in", "er", "on", "  ", "\n",  "12",
                                            "7",   "'s",  "é",  "界", ".",  "ing", "t"};
        uint8_t text[64];
        size_t bytes = 0, n = 1 + test_random_below(&r, 12), have = 0;
        cairn_token got[64], wanted[64];
        for (size_t i = 0; i < n; i++) {
            const char *part = parts[test_random_below(&r, 14)];
            memcpy(text + bytes, part, strlen(part));
            bytes += strlen(part);
        }
        token_sink sink = {wanted, 64, 0};
        assert_ok(words_each(cut, text, bytes, encode_plainly, &all, &sink));
        assert_ok(vocab_encode(&p.v, text, bytes, got, 64, &have));
        assert_int_equal(have, sink.n);
        assert_memory_equal(got, wanted, have * sizeof *got);
    }
    words_free(cut);
    pairs_close(&p);
}

/* ---- any bytes ---- */

static void bytes_that_are_no_utf8_come_back_and_disturb_no_neighbour(void **state)
{
    const fixture *fx = *state;
    static const char *const kinds[] = {"llama-bpe", "qwen2", "gpt-2", "smollm", "tekken"};
    test_random r = {32};
    for (size_t k = 0; k < 5; k++) {
        pairs p;
        pairs_open(fx, kinds[k], NULL, &p);
        for (int round = 0; round < 300; round++) {
            uint8_t text[160];
            cairn_token got[160], parts[160];
            size_t bytes = 0, have = 0, n = 0;
            for (size_t i = 0, runs = 1 + test_random_below(&r, 6); i < runs; i++) {
                static const char *const valid[] = {"the end", " 2023 is", "é界 ", "\r\n\n", "don't"};
                static const char *const broken[] = {"\xff", "\xc3", "\xe2\x96", "\xed\xa0\x80", "\xf5", "\x80"};
                const bool good = test_random_below(&r, 2) != 0;
                const char *part = good ? valid[test_random_below(&r, 5)] : broken[test_random_below(&r, 6)];
                size_t some = 0, length = strlen(part);
                memcpy(text + bytes, part, length);
                for (size_t j = 0; j < (good ? 1 : length); j++, n += some)
                    assert_ok(
                        vocab_encode(&p.v, (const uint8_t *)part + j, good ? length : 1, parts + n, 160 - n, &some));
                /* two good ones in a row would be one text */
                text[bytes + length] = 0xfe;
                assert_ok(vocab_encode(&p.v, text + bytes + length, 1, parts + n, 160 - n, &some));
                bytes += length + 1;
                n += some;
            }
            assert_ok(vocab_encode(&p.v, text, bytes, got, 160, &have));
            assert_int_equal(have, n);
            assert_memory_equal(got, parts, n * sizeof *got);
            assert_spells(&p.v, got, have, text, bytes);
        }
        pairs_close(&p);
    }
}

static void a_long_run_of_one_kind_is_encoded(void **state)
{
    const fixture *fx = *state;
    enum { LONG = 1 << 20 };
    static uint8_t text[LONG];
    static cairn_token got[LONG];
    static const char *const kinds[] = {"llama-bpe", "smollm", "tekken"};
    for (size_t k = 0; k < 3; k++) {
        pairs p;
        pairs_open(fx, kinds[k], NULL, &p);
        for (const char *c = " a7.\n"; *c != 0; c++) {
            size_t n = 0;
            memset(text, *c, LONG);
            assert_ok(vocab_encode(&p.v, text, LONG, got, LONG, &n));
            assert_spells(&p.v, got, n, text, LONG);
        }
        pairs_close(&p);
    }
}

/* ---- what cannot be ---- */

static void refuses(const pairs *p, const char *why)
{
    size_t n = 9;
    assert_int_equal(vocab_encode(&p->v, (const uint8_t *)"x", 1, NULL, 0, &n), CAIRN_UNSUPPORTED);
    if (strstr(cairn_last_error(), why) == NULL) fail_msg("'%s' does not say '%s'", cairn_last_error(), why);
    assert_int_equal(n, 0);
}

static void a_vocabulary_that_cannot_encode_says_why_when_text_comes(void **state)
{
    const fixture *fx = *state;
    pairs p;
    pairs_open(fx, NULL, NULL, &p);
    refuses(&p, "does not say how text is cut into words (key 'tokenizer.ggml.pre')");
    pairs_close(&p);
    pairs_open(fx, "made-up", NULL, &p);
    refuses(&p, "how 'made-up' (key 'tokenizer.ggml.pre') cuts text");
    pairs_close(&p);
    pairs_open(fx, "qwen2", "tokenizer.ggml.merges", &p);
    refuses(&p, "key 'tokenizer.ggml.merges' is no array");
    pairs_close(&p);

    /* merges that join nothing, and a byte without a piece */
    static const char *const lines[] = {"a b", "ab", " ", "a c", "a  b"};
    for (size_t i = 0; i < 5; i++) {
        static const char *const pieces[] = {"a", "b", "ab"};
        cairn_gguf_writer *w;
        char why[64];
        assert_ok(cairn_gguf_writer_new(&w));
        assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", "gpt2"));
        assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.pre", "gpt-2"));
        assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", pieces, 3));
        assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.merges", &lines[i], 1));
        assert_ok(cairn_gguf_writer_save(w, fx->path));
        cairn_gguf_writer_free(w);
        assert_ok(gguf_open(fx->path, &p.file));
        assert_ok(vocab_read(&p.file, 3, &p.v));
        snprintf(why, sizeof why, i == 0 ? "no token for byte 0x78%s" : "merge 0, '%s'", i == 0 ? "" : lines[i]);
        refuses(&p, why);
        if (i == 0) {
            cairn_token id;
            size_t n;
            assert_ok(vocab_encode(&p.v, (const uint8_t *)"ab", 2, &id, 1, &n));
            assert_true(n == 1 && id == 2);
        }
        pairs_close(&p);
    }
}

static void bos_comes_before_text_where_the_family_has_it_so(void **state)
{
    const fixture *fx = *state;
    static const char *const kinds[] = {"llama-bpe", "tekken", "qwen2", "gpt-2", "smollm"};
    for (size_t k = 0; k < 5; k++) {
        pairs p;
        pairs_open(fx, kinds[k], NULL, &p);
        assert_int_equal(p.v.add_bos, k < 2);
        pairs_close(&p);
    }
}

static void failing_allocations_leave_nothing(void **state)
{
    const fixture *fx = *state;
    pairs p;
    pairs_open(fx, "llama-bpe", NULL, &p);
    for (int part = 0; part < 2; part++) {
        cairn_status st = CAIRN_NO_MEMORY;
        uint64_t n = 1;
        for (; st != CAIRN_OK; n++) {
            vocab other = {0};
            size_t tokens;
            cairn_alloc_fail_at(n);
            st = part == 0 ? vocab_read(&p.file, p.v.n, &other)
                           : vocab_encode(&p.v, (const uint8_t *)"zqxj kvw\xff", 9, NULL, 0, &tokens);
            cairn_alloc_fail_at(0);
            if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
            vocab_wipe(&other);
        }
        assert_true(n > (part == 0 ? 12 : 4));
    }
    pairs_close(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(texts_become_the_tokens_llama_cpp_makes_of_them, setup, teardown),
        cmocka_unit_test_setup_teardown(words_are_joined_as_plain_loops_join_them, setup, teardown),
        cmocka_unit_test_setup_teardown(bytes_that_are_no_utf8_come_back_and_disturb_no_neighbour, setup, teardown),
        cmocka_unit_test_setup_teardown(a_long_run_of_one_kind_is_encoded, setup, teardown),
        cmocka_unit_test_setup_teardown(a_vocabulary_that_cannot_encode_says_why_when_text_comes, setup, teardown),
        cmocka_unit_test_setup_teardown(bos_comes_before_text_where_the_family_has_it_so, setup, teardown),
        cmocka_unit_test_setup_teardown(failing_allocations_leave_nothing, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
