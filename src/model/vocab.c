/* vocab.c - text to tokens and back.
 *
 * Three kinds of vocabulary. Byte tokens: one token a byte, no rules. SentencePiece ("llama" in GGUF): the text starts
 * with a space mark, spaces become the mark U+2581, and among neighbouring symbols the pair whose union is the piece of
 * the best score is joined until none is left; what is no piece is spelled in byte tokens. GPT-2 byte-level pieces are
 * decoded only: encoding needs the pre-tokenizer each model was made with, and a near miss would be silent damage.
 *
 * Text is data: only normal and user-defined pieces come out of it, never a control token that happens to be spelled.
 */
#include "model_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char MARK[] = "\xe2\x96\x81"; /* U+2581, SentencePiece's space */
enum { MARK_BYTES = 3 };

/* ---- reading ---- */

static bool has_mark(const char *text, size_t bytes)
{
    return bytes >= MARK_BYTES && memcmp(text, MARK, MARK_BYTES) == 0;
}

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

static int compare_pieces(gguf_text a, gguf_text b)
{
    size_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    int order = n != 0 ? memcmp(a.data, b.data, n) : 0;
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
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
        if (v->kinds[id] == TOKEN_NORMAL || v->kinds[id] == TOKEN_USER_DEFINED) {
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
    index_pieces(v);
    v->kind = kind_of(v);

    bool spm = v->kind == VOCAB_SPM || v->kind == VOCAB_BYTES;
    if (spm) v->unk = 0, v->bos = 1, v->eos = 2; /* SentencePiece's own, where the file is silent */
    v->add_bos = spm;
    v->space_prefix = true;
    if ((st = read_special(file, "tokenizer.ggml.bos_token_id", rows, &v->bos)) != CAIRN_OK) return st;
    if ((st = read_special(file, "tokenizer.ggml.eos_token_id", rows, &v->eos)) != CAIRN_OK) return st;
    if ((st = read_special(file, "tokenizer.ggml.unknown_token_id", rows, &v->unk)) != CAIRN_OK) return st;
    if ((st = gguf_bool(file, "tokenizer.ggml.add_bos_token", &v->add_bos)) != CAIRN_OK) return st;
    return gguf_bool(file, "tokenizer.ggml.add_space_prefix", &v->space_prefix);
}

void vocab_wipe(vocab *v)
{
    cairn_free(v->pieces);
    cairn_free(v->scores);
    cairn_free(v->kinds);
    cairn_free(v->sorted);
    cairn_free(v->fixed);
    memset(v, 0, sizeof *v);
}

/* ---- encoding ---- */

typedef struct sink {
    cairn_token *out;
    size_t cap;
    size_t n; /* all ids, also those beyond cap */
} sink;

static void emit(sink *s, cairn_token id)
{
    if (s->n < s->cap) s->out[s->n] = id;
    s->n++;
}

static bool find_piece(const vocab *v, const char *text, size_t bytes, uint32_t *id)
{
    gguf_text wanted = {text, bytes};
    uint32_t low = 0;
    uint32_t high = v->n_sorted;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = compare_pieces(v->pieces[v->sorted[middle]], wanted);
        if (order == 0) {
            *id = v->sorted[middle];
            return true;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return false;
}

typedef struct symbol { /* a run of the word's bytes; joined into its left neighbour it has none */
    size_t at;
    size_t bytes;
    size_t left; /* SIZE_MAX = none */
    size_t right;
} symbol;

typedef struct pair { /* two neighbours that make a piece */
    float score;
    size_t left;
    size_t right;
    size_t bytes; /* of both when it was found: tells a stale pair */
} pair;

typedef struct merger { /* buffers of one word, kept for the next */
    const vocab *v;
    char *text;
    size_t text_cap;
    symbol *symbols;
    size_t symbols_cap;
    pair *heap; /* best score on top, then leftmost */
    size_t n_heap;
    size_t heap_cap;
} merger;

static bool better(const pair *a, const pair *b)
{
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

static void heap_push(merger *m, pair p)
{
    size_t i = m->n_heap++;
    for (; i > 0 && better(&p, &m->heap[(i - 1) / 2]); i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = p;
}

static pair heap_pop(merger *m)
{
    pair top = m->heap[0];
    pair last = m->heap[--m->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < m->n_heap; i = child) {
        if (child + 1 < m->n_heap && better(&m->heap[child + 1], &m->heap[child])) child++;
        if (!better(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return top;
}

static void try_pair(merger *m, size_t left, size_t right)
{
    uint32_t id;
    if (left == SIZE_MAX || right == SIZE_MAX) return;
    size_t bytes = m->symbols[left].bytes + m->symbols[right].bytes;
    if (find_piece(m->v, m->text + m->symbols[left].at, bytes, &id))
        heap_push(m, (pair){m->v->scores[id], left, right, bytes});
}

static cairn_status emit_symbol(const vocab *v, const char *text, size_t bytes, sink *out)
{
    uint32_t id;
    if (find_piece(v, text, bytes, &id)) {
        emit(out, (cairn_token)id);
        return CAIRN_OK;
    }
    for (size_t i = 0; i < bytes; i++) {
        uint8_t b = (uint8_t)text[i];
        cairn_token token = v->byte_ids[b] >= 0 ? v->byte_ids[b] : v->unk;
        if (token < 0) return cairn_fail(CAIRN_UNSUPPORTED, "the vocabulary has no token for byte 0x%02X", b);
        emit(out, token);
    }
    return CAIRN_OK;
}

/* m->text holds `bytes` bytes with spaces turned into marks: joins pairs, best score first, and emits. */
static cairn_status merge_word(merger *m, size_t bytes, sink *out)
{
    static const uint8_t utf8_bytes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4}; /* by the high nibble */
    size_t n = 0;
    if (bytes > m->symbols_cap) {
        cairn_free(m->symbols);
        m->symbols = cairn_alloc_array(bytes, sizeof *m->symbols);
        m->symbols_cap = m->symbols != NULL ? bytes : 0;
    }
    /* Each of the n - 1 first pairs and each of at most n - 1 joins with two new neighbours adds to the heap. */
    size_t pairs;
    if (!cairn_mul_size(bytes, 3, &pairs)) pairs = SIZE_MAX;
    if (pairs > m->heap_cap) {
        cairn_free(m->heap);
        m->heap = cairn_alloc_array(pairs, sizeof *m->heap);
        m->heap_cap = m->heap != NULL ? pairs : 0;
    }
    if (m->symbols == NULL || m->heap == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "encoding a run of %zu bytes of text", bytes);

    for (size_t at = 0; at < bytes; n++) {
        size_t wanted = utf8_bytes[(uint8_t)m->text[at] >> 4];
        size_t length = 1; /* a character cut short ends before the next one: a space after it stays a space */
        while (length < wanted && length < bytes - at && ((uint8_t)m->text[at + length] & 0xc0) == 0x80) length++;
        m->symbols[n] = (symbol){at, length, n == 0 ? SIZE_MAX : n - 1, n + 1};
        at += length;
    }
    m->symbols[n - 1].right = SIZE_MAX;
    m->n_heap = 0;
    for (size_t i = 1; i < n; i++) try_pair(m, i - 1, i);
    while (m->n_heap != 0) {
        pair p = heap_pop(m);
        symbol *left = &m->symbols[p.left];
        symbol *right = &m->symbols[p.right];
        if (left->bytes == 0 || right->bytes == 0 || left->bytes + right->bytes != p.bytes) continue;
        left->bytes = p.bytes;
        right->bytes = 0;
        left->right = right->right;
        if (right->right != SIZE_MAX) m->symbols[right->right].left = p.left;
        try_pair(m, left->left, p.left);
        try_pair(m, p.left, left->right);
    }
    for (size_t i = 0; i != SIZE_MAX; i = m->symbols[i].right) {
        cairn_status st = emit_symbol(m->v, m->text + m->symbols[i].at, m->symbols[i].bytes, out);
        if (st != CAIRN_OK) return st;
    }
    return CAIRN_OK;
}

/* End of the word that starts at `text`: marks or spaces, then other characters. No piece spans two words (unless
 * pieces_cross_words), so words can be merged one by one, in a few bytes of memory instead of the text's. */
static size_t word_bytes(const uint8_t *text, size_t bytes)
{
    size_t i = 0;
    for (;;) {
        if (i < bytes && text[i] == ' ')
            i++;
        else if (has_mark((const char *)text + i, bytes - i))
            i += MARK_BYTES;
        else
            break;
    }
    while (i < bytes && text[i] != ' ' && !has_mark((const char *)text + i, bytes - i)) i++;
    return i;
}

static cairn_status encode_plain(merger *m, const uint8_t *text, size_t bytes, bool prefix, sink *out)
{
    while (bytes != 0) {
        size_t n = m->v->pieces_cross_words ? bytes : word_bytes(text, bytes);
        size_t needed;
        if (!cairn_mul_size(n, MARK_BYTES, &needed) || !cairn_add_size(needed, MARK_BYTES, &needed))
            return cairn_fail(CAIRN_NO_MEMORY, "encoding %zu bytes of text", n);
        if (m->text == NULL || needed > m->text_cap) {
            cairn_free(m->text);
            m->text = cairn_alloc(needed);
            if (m->text == NULL) return cairn_fail(CAIRN_NO_MEMORY, "encoding %zu bytes of text", n);
            m->text_cap = needed;
        }
        size_t at = 0;
        if (prefix) {
            memcpy(m->text, MARK, MARK_BYTES);
            at = MARK_BYTES;
        }
        for (size_t i = 0; i < n; i++) {
            if (text[i] == ' ') {
                memcpy(m->text + at, MARK, MARK_BYTES);
                at += MARK_BYTES;
            } else {
                m->text[at++] = (char)text[i];
            }
        }
        cairn_status st = merge_word(m, at, out);
        if (st != CAIRN_OK) return st;
        prefix = false;
        text += n;
        bytes -= n;
    }
    return CAIRN_OK;
}

/* The longest user-defined token at `text`. */
static bool fixed_at(const vocab *v, const uint8_t *text, size_t bytes, uint32_t *id)
{
    if (!v->fixed_first[text[0]]) return false;
    for (uint32_t i = 0; i < v->n_fixed; i++) {
        gguf_text piece = v->pieces[v->fixed[i]];
        if (piece.bytes <= bytes && memcmp(piece.data, text, piece.bytes) == 0) {
            *id = v->fixed[i];
            return true;
        }
    }
    return false;
}

static cairn_status encode_spm(const vocab *v, const uint8_t *text, size_t bytes, sink *out)
{
    merger m = {.v = v};
    cairn_status st = CAIRN_OK;
    size_t start = 0; /* of the run before the next user-defined token */
    uint32_t id;
    for (size_t i = 0; i < bytes && st == CAIRN_OK;) {
        if (!fixed_at(v, text + i, bytes - i, &id)) {
            i++;
            continue;
        }
        st = encode_plain(&m, text + start, i - start, start == 0 && v->space_prefix, out);
        emit(out, (cairn_token)id);
        i += v->pieces[id].bytes;
        start = i;
    }
    if (st == CAIRN_OK) st = encode_plain(&m, text + start, bytes - start, start == 0 && v->space_prefix, out);
    cairn_free(m.text);
    cairn_free(m.symbols);
    cairn_free(m.heap);
    return st;
}

cairn_status vocab_encode(const vocab *v, const uint8_t *text, size_t bytes, cairn_token *out, size_t cap,
                          size_t *out_n)
{
    sink s = {out, cap, 0};
    cairn_status st = CAIRN_OK;
    *out_n = 0;
    switch (v->kind) {
    case VOCAB_BYTES:
        for (size_t i = 0; i < bytes; i++) emit(&s, v->byte_ids[text[i]]);
        break;
    case VOCAB_SPM: st = encode_spm(v, text, bytes, &s); break;
    case VOCAB_NONE: return cairn_fail(CAIRN_UNSUPPORTED, "the model has no vocabulary: it takes token ids only");
    default:
        return cairn_fail(CAIRN_UNSUPPORTED,
                          "text cannot be encoded with a '%s' vocabulary here (only 'llama', SentencePiece, can): give "
                          "token ids",
                          gguf_show(v->model).text);
    }
    *out_n = s.n;
    return st;
}

/* ---- decoding ---- */

/* GPT-2 spells bytes as printable characters: 33..126, 161..172 and 174..255 as themselves, the others, in order, as
 * 256, 257, ... Returns the byte, or -1 for a character that stands for none. */
static int gpt2_byte(uint32_t character)
{
    if ((character >= 33 && character <= 126) || (character >= 161 && character <= 172) ||
        (character >= 174 && character <= 255))
        return (int)character;
    if (character < 256 || character >= 256 + 68) return -1;
    uint32_t i = character - 256; /* 0..32, 127..160, 173 */
    return (int)(i < 33 ? i : i < 67 ? 127 + (i - 33) : 173);
}

static size_t put_byte(char *out, size_t cap, size_t n, uint8_t b)
{
    if (n < cap) out[n] = (char)b;
    return n + 1;
}

static size_t decode_gpt2(gguf_text piece, char *out, size_t cap)
{
    size_t n = 0;
    for (size_t i = 0; i < piece.bytes; i++) {
        uint8_t a = (uint8_t)piece.data[i];
        uint8_t b = i + 1 < piece.bytes ? (uint8_t)piece.data[i + 1] : 0;
        int byte = a < 0x80                                   ? gpt2_byte(a)
                   : (a & 0xe0) == 0xc0 && (b & 0xc0) == 0x80 ? gpt2_byte((uint32_t)(a & 0x1f) << 6 | (b & 0x3f))
                                                              : -1;
        if (byte >= 0 && a >= 0x80) i++;
        n = put_byte(out, cap, n, byte >= 0 ? (uint8_t)byte : a);
    }
    return n;
}

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
            n = decode_gpt2(piece, out, cap);
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
