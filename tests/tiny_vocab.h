/* tiny_vocab.h - small tokenizers of pieces for tiny models (their vocab = TINY_PIECES). */
#ifndef CAIRN_TESTS_TINY_VOCAB_H
#define CAIRN_TESTS_TINY_VOCAB_H

#include "tiny_model.h"

#include "gguf_internal.h"

#define TINY_MARK "\xe2\x96\x81" /* SentencePiece's space */

enum { TINY_PIECES = 272, TINY_NORMAL = 1, TINY_UNKNOWN = 2, TINY_CONTROL = 3, TINY_USER = 4, TINY_BYTE = 6 };

/* SentencePiece: the specials, 256 bytes, 13 more, of which the last is user-defined. Scores and kinds in unusual types
 * (f64, u8), as the format allows. `last` takes the place of the last piece but one. */
static inline void tiny_put_spm(cairn_gguf_writer *w, const char *last)
{
    static const char *const more[] = {
        TINY_MARK, "e", "t", "h", "he", TINY_MARK "t", TINY_MARK "the", TINY_MARK "the" TINY_MARK, "a", "in", "\n"};
    static char names[256][8];
    const char *tokens[TINY_PIECES] = {"<unk>", "<s>", "</s>"};
    double scores[TINY_PIECES] = {0};
    uint8_t kinds[TINY_PIECES] = {TINY_UNKNOWN, TINY_CONTROL, TINY_CONTROL};
    for (int b = 0; b < 256; b++) {
        snprintf(names[b], sizeof names[b], "<0x%02X>", b);
        tokens[3 + b] = names[b];
        kinds[3 + b] = TINY_BYTE;
    }
    for (size_t i = 0; i < 11; i++) {
        tokens[259 + i] = more[i];
        scores[259 + i] = -1.0 - (double)((i * 7) % 11);
        kinds[259 + i] = TINY_NORMAL;
    }
    tokens[270] = last;
    kinds[270] = TINY_CONTROL;
    tokens[271] = "<tool>";
    kinds[271] = TINY_USER;
    assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", "llama"));
    assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, TINY_PIECES));
    const gguf_value values[] = {
        {{"tokenizer.ggml.scores", 21}, GGUF_F64, true, TINY_PIECES, (uint8_t *)scores, sizeof scores},
        {{"tokenizer.ggml.token_type", 25}, GGUF_U8, true, TINY_PIECES, kinds, sizeof kinds}};
    for (size_t i = 0; i < 2; i++) assert_ok(gguf_put_value(w, &values[i]));
    assert_ok(cairn_gguf_put_u32(w, "tokenizer.ggml.bos_token_id", 1));
}

/* GPT-2's: a character for each byte and joined ones, merges, neither scores nor kinds. pre: how words are cut. */
static inline void tiny_put_bpe(cairn_gguf_writer *w, const char *pre)
{
    static char names[TINY_PIECES][8];
    static const char *const merges[] = {"t h", "th e", "\xc4\xa0 the"}, *const joined[] = {"th", "the", "\xc4\xa0the"};
    const char *tokens[TINY_PIECES];
    uint32_t other = 0;
    for (uint32_t b = 0; b < TINY_PIECES; b++) {
        bool same = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
        uint32_t c = same ? b : 256 + other++;
        if (b >= 256 && b < 259)
            snprintf(names[b], sizeof names[b], "%s", joined[b - 256]);
        else if (b >= 256)
            snprintf(names[b], sizeof names[b], "x%u", b);
        else if (c < 0x80)
            snprintf(names[b], sizeof names[b], "%c", (int)c);
        else
            snprintf(names[b], sizeof names[b], "%c%c", (int)(0xc0 | c >> 6), (int)(0x80 | (c & 0x3f)));
        tokens[b] = names[b];
    }
    assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.model", "gpt2"));
    assert_ok(cairn_gguf_put_string(w, "tokenizer.ggml.pre", pre));
    assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, TINY_PIECES));
    assert_ok(cairn_gguf_put_strings(w, "tokenizer.ggml.merges", merges, 3));
}

#endif
