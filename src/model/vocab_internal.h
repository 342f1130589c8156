/* vocab_internal.h - what the vocabularies share: where ids go, and neighbours joined in pairs. */
#ifndef CAIRN_VOCAB_INTERNAL_H
#define CAIRN_VOCAB_INTERNAL_H

#include "model_internal.h"

typedef struct token_sink {
    cairn_token *out;
    size_t cap;
    size_t n; /* all ids, also those beyond cap */
} token_sink;

static inline void emit(token_sink *s, cairn_token id)
{
    if (s->n < s->cap) s->out[s->n] = id;
    s->n++;
}

static inline size_t put_byte(char *out, size_t cap, size_t n, uint8_t b)
{
    if (n < cap) out[n] = (char)b;
    return n + 1;
}

/* ---- SentencePiece's space ---- */

static const char MARK[] = "\xe2\x96\x81"; /* U+2581 */
enum { MARK_BYTES = 3 };

static inline bool has_mark(const char *text, size_t bytes)
{
    return bytes >= MARK_BYTES && memcmp(text, MARK, MARK_BYTES) == 0;
}

static inline int compare_pieces(gguf_text a, gguf_text b)
{
    size_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    int order = n != 0 ? memcmp(a.data, b.data, n) : 0;
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

/* ---- joining neighbours: SentencePiece and byte pairs differ in which pairs there are ---- */

typedef struct symbol { /* a run of the word's bytes; joined into its left neighbour it has none */
    size_t at;
    size_t bytes;
    size_t left; /* SIZE_MAX = none */
    size_t right;
    uint32_t id; /* for `join` */
} symbol;

typedef struct merger { /* buffers of one word, kept for the next */
    /* Whether two neighbours make a piece, how good it is (the best comes first, of equals the leftmost) and its id. */
    bool (*join)(const struct merger *m, const symbol *left, const symbol *right, float *score, uint32_t *id);
    const vocab *v;
    const char *text; /* for `join` */
    symbol *symbols;
    size_t symbols_cap;
    struct symbol_pair *heap;
    size_t n_heap;
    size_t heap_cap;
} merger;

cairn_status merger_reserve(merger *m, size_t bytes); /* for as many symbols */
/* Joins n > 0 symbols, whose at, bytes and id are set, until no pair is left; they are linked by `right` from the first
 * one on. */
void merger_run(merger *m, size_t n);
void merger_wipe(merger *m);

/* Text between user-defined tokens, one after the other; these are emitted here. */
typedef cairn_status (*vocab_run)(void *state, const uint8_t *text, size_t bytes, bool first, token_sink *out);
cairn_status vocab_runs(const vocab *v, const uint8_t *text, size_t bytes, vocab_run run, void *state, token_sink *out);

/* ---- the words of byte pairs: no piece spans two of them ---- */

typedef struct words words;
/* By the name that tokenizer.ggml.pre gives; *out stays NULL if it is not known here. */
cairn_status words_new(gguf_text pre, words **out);
void words_free(words *w);
bool words_whole_first(const words *w); /* a word that is a piece is taken as it is, whatever the merges say */
bool words_after_bos(const words *w);   /* text follows BOS where the file does not say */
/* Any bytes: what is no UTF-8 is a word for each byte. */
typedef cairn_status (*words_take)(void *state, const uint8_t *word, size_t bytes, token_sink *out);
cairn_status words_each(const words *w, const uint8_t *text, size_t bytes, words_take take, void *state,
                        token_sink *out);

/* ---- one file each ---- */

cairn_status spm_encode(const vocab *v, const uint8_t *text, size_t bytes, token_sink *out);

/* Byte pairs: tables over v's pieces and the file's merges. A vocabulary that cannot be encoded with is read all the
 * same: why not is said when text comes. */
cairn_status bpe_new(const gguf *file, vocab *v);
void bpe_free(bpe *b);
cairn_status bpe_encode(const vocab *v, const uint8_t *text, size_t bytes, token_sink *out);
size_t bpe_decode(gguf_text piece, char *out, size_t cap); /* bytes of a piece: all of them, cap written */

#endif
