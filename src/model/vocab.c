/* vocab.c - text to tokens and back.
 *
 * Three kinds of vocabulary. Byte tokens: one token a byte, no rules. SentencePiece ("llama" in GGUF) is encoded in
 * vocab_spm.c, byte pairs ("gpt2") in vocab_bpe.c.
 *
 * Text is data: only normal and user-defined pieces come out of it, never a control token that happens to be spelled.
 */
#include "vocab_internal.h"

#include <math.h>
#include <stdlib.h>

/* ---- reading ---- */

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* "<0x0A>" is 10; -1 if the piece is no byte's name. */
static int byte_of_piece(gguf_text piece)
{
    const char *p = piece.data;
    if (piece.bytes != 6 || p[0] != '<' || p[1] != '0' || p[2] != 'x' || p[5] != '>') return -1;
    int high = hex_digit(p[3]);
    int low = hex_digit(p[4]);
    return high >= 0 && low >= 0 ? high * 16 + low : -1;
}

static bool crosses_words(gguf_text piece)
{
    bool other = false; /* a character that is no mark was seen */
    for (size_t i = 0; i < piece.bytes; i++) {
        if (!has_mark(piece.data + i, piece.bytes - i)) {
            other = true;
        } else {
            if (other) return true;
            i += MARK_BYTES - 1;
        }
    }
    return false;
}

static int by_piece(const void *a, const void *b, void *arg)
{
    const vocab *v = arg;
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;
    int order = compare_pieces(v->pieces[x], v->pieces[y]);
    return order != 0 ? order : (x > y) - (x < y);
}
static int by_length(const void *a, const void *b, void *arg)
{
    const vocab *v = arg;
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;
    size_t m = v->pieces[x].bytes;
    size_t n = v->pieces[y].bytes;
    return m != n ? (m < n) - (m > n) : (x > y) - (x < y);
}

/* The tables encoding searches. */
static void index_pieces(vocab *v)
{
    for (uint32_t id = 0; id < v->n; id++) {
        gguf_text piece = v->pieces[id];
        if (piece.bytes == 0) continue;
        if (v->kind == VOCAB_SPM && (v->kinds[id] == TOKEN_NORMAL || v->kinds[id] == TOKEN_USER_DEFINED)) {
            v->sorted[v->n_sorted++] = id;
            v->pieces_cross_words |= crosses_words(piece);
        }
        if (v->kinds[id] == TOKEN_USER_DEFINED) {
            v->fixed[v->n_fixed++] = id;
            v->fixed_first[(uint8_t)piece.data[0]] = true;
        }
    }
    qsort_r(v->sorted, v->n_sorted, sizeof *v->sorted, by_piece, v);
    qsort_r(v->fixed, v->n_fixed, sizeof *v->fixed, by_length, v);
    uint32_t kept = 0; /* of equal pieces the last id counts, as in llama.cpp */
    for (uint32_t i = 0; i < v->n_sorted; i++) {
        bool again = kept != 0 && compare_pieces(v->pieces[v->sorted[kept - 1]], v->pieces[v->sorted[i]]) == 0;
        v->sorted[again ? kept - 1 : kept++] = v->sorted[i];
    }
    v->n_sorted = kept;
}

static cairn_status read_kinds(const gguf *file, vocab *v)
{
    const gguf_value *value = gguf_find(file, "tokenizer.ggml.token_type");
    memset(v->kinds, TOKEN_NORMAL, v->n);
    if (value == NULL) return CAIRN_OK;
    if (!value->array || value->count != v->n)
        return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.token_type' has %zu elements for %u tokens", value->count,
                          v->n);
    for (uint32_t i = 0; i < v->n; i++) {
        int64_t kind;
        if (!gguf_value_integer(value, i, &kind) || kind < 0 || kind > TOKEN_BYTE)
            return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.token_type': token %u has no kind from 0 to %d", i,
                              TOKEN_BYTE);
        v->kinds[i] = (uint8_t)kind;
    }
    return CAIRN_OK;
}

static cairn_status read_scores(const gguf *file, vocab *v)
{
    const gguf_value *value = gguf_find(file, "tokenizer.ggml.scores");
    memset(v->scores, 0, v->n * sizeof *v->scores);
    if (value == NULL) return CAIRN_OK;
    if (!value->array || value->count != v->n)
        return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.scores' has %zu elements for %u tokens", value->count,
                          v->n);
    for (uint32_t i = 0; i < v->n; i++) {
        double score;
        if (!gguf_value_float(value, i, &score) || !isfinite(score))
            return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.scores': token %u has no finite score", i);
        v->scores[i] = (float)score;
    }
    return CAIRN_OK;
}

static cairn_status read_special(const gguf *file, const char *key, uint32_t n, cairn_token *id)
{
    uint32_t number = *id < 0 || (uint32_t)*id >= n ? UINT32_MAX : (uint32_t)*id;
    cairn_status st = gguf_u32(file, key, &number);
    if (st != CAIRN_OK) return st;
    if (number != UINT32_MAX && number >= n)
        return cairn_fail(CAIRN_INVALID, "key '%s' is %u, the vocabulary has %u tokens", key, number, n);
    *id = number == UINT32_MAX ? -1 : (cairn_token)number; /* UINT32_MAX is how files say "none" */
    return CAIRN_OK;
}

static vocab_kind kind_of(const vocab *v)
{
    if (gguf_text_is(v->model, "gpt2")) return VOCAB_BPE;
    if (!gguf_text_is(v->model, "llama")) return VOCAB_OTHER;
    for (uint32_t id = 0; id < v->n; id++)
        if (v->kinds[id] == TOKEN_NORMAL || v->kinds[id] == TOKEN_USER_DEFINED) return VOCAB_SPM;
    for (int b = 0; b < 256; b++)
        if (v->byte_ids[b] < 0) return VOCAB_SPM;
    return VOCAB_BYTES;
}

cairn_status vocab_read(const gguf *file, uint32_t rows, vocab *v)
{
    const gguf_value *tokens = gguf_find(file, "tokenizer.ggml.tokens");
    cairn_status st;
    memset(v, 0, sizeof *v);
    for (int b = 0; b < 256; b++) v->byte_ids[b] = -1;
    v->bos = v->eos = v->unk = -1;
    v->n = rows;
    if ((st = gguf_string(file, "tokenizer.ggml.model", &v->model)) != CAIRN_OK) return st;
    if (tokens == NULL) return CAIRN_OK; /* VOCAB_NONE: ids only */
    if (!tokens->array || tokens->type != GGUF_STRING)
        return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.tokens' is not an array of strings");
    if (tokens->count != rows)
        return cairn_fail(CAIRN_INVALID, "key 'tokenizer.ggml.tokens' has %zu tokens, token_embd.weight %u rows",
                          tokens->count, rows);

    v->pieces = cairn_alloc_array(rows, sizeof *v->pieces);
    v->scores = cairn_alloc_array(rows, sizeof *v->scores);
    v->kinds = cairn_alloc(rows);
    v->sorted = cairn_alloc_array(rows, sizeof *v->sorted);
    v->fixed = cairn_alloc_array(rows, sizeof *v->fixed);
    if (v->pieces == NULL || v->scores == NULL || v->kinds == NULL || v->sorted == NULL || v->fixed == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "vocabulary of %u tokens", rows);
    for (size_t i = 0, at = 0; i < rows; i++) v->pieces[i] = gguf_next_string(tokens, &at);
    if ((st = read_kinds(file, v)) != CAIRN_OK) return st;
    if ((st = read_scores(file, v)) != CAIRN_OK) return st;
    for (uint32_t id = 0; id < rows; id++) {
        int b = v->kinds[id] == TOKEN_BYTE ? byte_of_piece(v->pieces[id]) : -1;
        if (b >= 0) v->byte_ids[b] = (cairn_token)id;
    }
    v->kind = kind_of(v);
    index_pieces(v);

    bool spm = v->kind == VOCAB_SPM || v->kind == VOCAB_BYTES;
    if (spm) v->unk = 0, v->bos = 1, v->eos = 2; /* SentencePiece's own, where the file is silent */
    v->add_bos = spm;
    v->space_prefix = true;
    if (v->kind == VOCAB_BPE && (st = bpe_new(file, v)) != CAIRN_OK) return st;
    if ((st = read_special(file, "tokenizer.ggml.bos_token_id", rows, &v->bos)) != CAIRN_OK) return st;
    if ((st = read_special(file, "tokenizer.ggml.eos_token_id", rows, &v->eos)) != CAIRN_OK) return st;
    if ((st = read_special(file, "tokenizer.ggml.unknown_token_id", rows, &v->unk)) != CAIRN_OK) return st;
    if ((st = gguf_bool(file, "tokenizer.ggml.add_bos_token", &v->add_bos)) != CAIRN_OK) return st;
    return gguf_bool(file, "tokenizer.ggml.add_space_prefix", &v->space_prefix);
}

void vocab_wipe(vocab *v)
{
    bpe_free(v->bpe);
    cairn_free(v->pieces);
    cairn_free(v->scores);
    cairn_free(v->kinds);
    cairn_free(v->sorted);
    cairn_free(v->fixed);
    memset(v, 0, sizeof *v);
}

/* ---- encoding ---- */

cairn_status vocab_encode(const vocab *v, const uint8_t *text, size_t bytes, cairn_token *out, size_t cap,
                          size_t *out_n)
{
    token_sink s = {out, cap, 0};
    cairn_status st = CAIRN_OK;
    *out_n = 0;
    switch (v->kind) {
    case VOCAB_BYTES:
        for (size_t i = 0; i < bytes; i++) emit(&s, v->byte_ids[text[i]]);
        break;
    case VOCAB_SPM: st = spm_encode(v, text, bytes, &s); break;
    case VOCAB_BPE: st = bpe_encode(v, text, bytes, &s); break;
    case VOCAB_NONE: return cairn_fail(CAIRN_UNSUPPORTED, "the model has no vocabulary: it takes token ids only");
    default:
        return cairn_fail(
            CAIRN_UNSUPPORTED,
            "text cannot be encoded with a '%s' vocabulary here ('llama', SentencePiece, and 'gpt2', byte "
            "pairs, can): give token ids",
            gguf_show(v->model).text);
    }
    *out_n = s.n;
    return st;
}

/* ---- decoding ---- */

size_t vocab_decode(const vocab *v, cairn_token token, char *out, size_t cap)
{
    size_t n = 0;
    if (v->kind == VOCAB_NONE || token < 0 || (uint32_t)token >= v->n) return 0;
    gguf_text piece = v->pieces[token];
    switch (v->kinds[token]) {
    case TOKEN_BYTE: {
        int b = byte_of_piece(piece);
        n = b >= 0 ? put_byte(out, cap, 0, (uint8_t)b) : 0;
        break;
    }
    case TOKEN_NORMAL:
        if (v->kind == VOCAB_BPE) {
            n = bpe_decode(piece, out, cap);
            break;
        }
        for (size_t i = 0; i < piece.bytes; i++) {
            bool mark = has_mark(piece.data + i, piece.bytes - i);
            n = put_byte(out, cap, n, mark ? ' ' : (uint8_t)piece.data[i]);
            if (mark) i += MARK_BYTES - 1;
        }
        break;
    case TOKEN_USER_DEFINED:
        for (; n < piece.bytes;) n = put_byte(out, cap, n, (uint8_t)piece.data[n]);
        break;
    default: break; /* control, unknown, unused */
    }
    return n < cap ? n : cap;
}
