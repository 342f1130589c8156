/* vocab_bpe.c - byte pairs, GPT-2's way: a word begins as its bytes, and of the pairs of neighbours that were joined in
 * training the one joined earliest is joined until there is none. Pieces and merges are spelled in GPT-2's printable
 * characters in the file; here they are bytes.
 *
 * Two open hash tables: pieces by their bytes, merges by the ids of both sides. For Llama 3's 128,000 pieces and
 * 280,000 merges 12 MB. */
#include "vocab_internal.h"

#include <stdio.h>

enum {
    MERGES_MAX = 1 << 24, /* ranks are exact as floats */
    NOT_THERE = -1
};

typedef struct merge {
    uint32_t left, right;
    uint32_t id; /* of both; UINT32_MAX = an empty place */
    uint32_t rank;
} merge;

struct bpe {
    char *raw;        /* bytes of all pieces, one after the other */
    size_t *at;       /* (n + 1) */
    uint32_t *places; /* id + 1 of a piece that text can become, 0 = empty */
    size_t n_places;  /* a power of two */
    merge *merges;
    size_t n_merges; /* places, a power of two */
    cairn_token byte_ids[256];
    words *words;
    char trouble[256]; /* why no text can be encoded, or empty */
};

/* ---- spelling ---- */

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

size_t bpe_decode(gguf_text piece, char *out, size_t cap)
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

/* ---- tables ---- */

static size_t places_for(size_t n) /* at most half full */
{
    size_t places = 16;
    while (places < 2 * n) places *= 2;
    return places;
}

/* The place of these bytes: theirs, or an empty one. */
static uint32_t *place_of(const bpe *b, const char *bytes, size_t n)
{
    size_t i = (size_t)cairn_hash64(bytes, n) & (b->n_places - 1);
    for (;; i = (i + 1) & (b->n_places - 1)) {
        if (b->places[i] == 0) break;
        uint32_t id = b->places[i] - 1;
        if (b->at[id + 1] - b->at[id] == n && memcmp(b->raw + b->at[id], bytes, n) == 0) break;
    }
    return &b->places[i];
}

static int64_t find_piece(const bpe *b, const char *bytes, size_t n)
{
    uint32_t place = n != 0 ? *place_of(b, bytes, n) : 0;
    return place != 0 ? (int64_t)place - 1 : NOT_THERE;
}

static merge *merge_of(const bpe *b, uint32_t left, uint32_t right)
{
    uint64_t mixed = ((uint64_t)left << 32 | right) * UINT64_C(0x9e3779b97f4a7c15);
    size_t i = (size_t)(mixed >> 32) & (b->n_merges - 1);
    while (b->merges[i].id != UINT32_MAX && (b->merges[i].left != left || b->merges[i].right != right))
        i = (i + 1) & (b->n_merges - 1);
    return &b->merges[i];
}

static cairn_status read_pieces(bpe *b, const vocab *v)
{
    size_t total = 0;
    for (uint32_t id = 0; id < v->n; id++) total += v->pieces[id].bytes; /* they lie in a file */
    b->n_places = places_for(v->n);
    b->raw = cairn_alloc(total + 1);
    b->at = cairn_alloc_array((size_t)v->n + 1, sizeof *b->at);
    b->places = cairn_calloc(b->n_places, sizeof *b->places);
    if (b->raw == NULL || b->at == NULL || b->places == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "vocabulary of %u tokens", v->n);
    b->at[0] = 0;
    for (uint32_t id = 0; id < v->n; id++) {
        char *to = b->raw + b->at[id];
        size_t bytes = bpe_decode(v->pieces[id], to, v->pieces[id].bytes);
        bool text = v->kinds[id] == TOKEN_NORMAL || v->kinds[id] == TOKEN_USER_DEFINED;
        b->at[id + 1] = b->at[id] + bytes;
        if (text && bytes != 0) *place_of(b, to, bytes) = id + 1; /* of equal pieces the last one counts */
    }
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        b->byte_ids[byte] = (cairn_token)find_piece(b, &c, 1);
    }
    return CAIRN_OK;
}

/* Merge `rank`, "left right". False if the vocabulary does not have all three. */
static bool add_merge(bpe *b, gguf_text line, uint32_t rank, char *room)
{
    const char *space = line.bytes > 1 ? memchr(line.data + 1, ' ', line.bytes - 1) : NULL;
    if (space == NULL) return false;
    gguf_text left = {line.data, (size_t)(space - line.data)};
    gguf_text right = {space + 1, line.bytes - left.bytes - 1};
    size_t n = bpe_decode(left, room, line.bytes);
    size_t all = n + bpe_decode(right, room + n, line.bytes - n);
    int64_t a = find_piece(b, room, n), c = find_piece(b, room + n, all - n), both = find_piece(b, room, all);
    if (a < 0 || c < 0 || both < 0) return false;
    merge *m = merge_of(b, (uint32_t)a, (uint32_t)c);
    if (m->id == UINT32_MAX) *m = (merge){(uint32_t)a, (uint32_t)c, (uint32_t)both, rank}; /* else an earlier one */
    return true;
}

static cairn_status read_merges(bpe *b, const gguf *file)
{
    const gguf_value *lines = gguf_find(file, "tokenizer.ggml.merges");
    if (lines == NULL || !lines->array || lines->type != GGUF_STRING || lines->count > MERGES_MAX) {
        snprintf(b->trouble, sizeof b->trouble, "key 'tokenizer.ggml.merges' is no array of at most %d strings",
                 MERGES_MAX);
        return CAIRN_OK;
    }
    size_t longest = 0;
    for (size_t i = 0, at = 0; i < lines->count; i++) {
        size_t bytes = gguf_next_string(lines, &at).bytes;
        if (bytes > longest) longest = bytes;
    }
    b->n_merges = places_for(lines->count);
    b->merges = cairn_alloc_array(b->n_merges, sizeof *b->merges);
    char *room = cairn_alloc(longest + 1);
    if (b->merges == NULL || room == NULL) {
        cairn_free(room);
        return cairn_fail(CAIRN_NO_MEMORY, "%zu merges", lines->count);
    }
    memset(b->merges, 0xff, b->n_merges * sizeof *b->merges);
    for (size_t i = 0, at = 0; i < lines->count && b->trouble[0] == 0; i++) {
        gguf_text line = gguf_next_string(lines, &at);
        if (!add_merge(b, line, (uint32_t)i, room))
            snprintf(b->trouble, sizeof b->trouble, "merge %zu, '%s', joins no two pieces of the vocabulary to a third",
                     i, gguf_show(line).text);
    }
    cairn_free(room);
    return CAIRN_OK;
}

cairn_status bpe_new(const gguf *file, vocab *v)
{
    gguf_text pre = {0};
    cairn_status st;
    bpe *b = v->bpe = cairn_calloc(1, sizeof *b);
    if (b == NULL) return cairn_fail(CAIRN_NO_MEMORY, "vocabulary of %u tokens", v->n);
    if ((st = gguf_string(file, "tokenizer.ggml.pre", &pre)) != CAIRN_OK) return st;
    if ((st = words_new(pre, &b->words)) != CAIRN_OK) return st;
    if (b->words == NULL) {
        snprintf(b->trouble, sizeof b->trouble,
                 pre.bytes != 0 ? "how '%s' (key 'tokenizer.ggml.pre') cuts text into words is not known here"
                                : "the file does not say how text is cut into words (key 'tokenizer.ggml.pre')%s",
                 pre.bytes != 0 ? gguf_show(pre).text : "");
        return CAIRN_OK;
    }
    v->add_bos = words_after_bos(b->words);
    if ((st = read_pieces(b, v)) != CAIRN_OK) return st;
    return read_merges(b, file);
}

void bpe_free(bpe *b)
{
    if (b == NULL) return;
    words_free(b->words);
    cairn_free(b->raw);
    cairn_free(b->at);
    cairn_free(b->places);
    cairn_free(b->merges);
    cairn_free(b);
}

/* ---- encoding ---- */

static bool join(const merger *m, const symbol *left, const symbol *right, float *score, uint32_t *id)
{
    const merge *found = merge_of(m->v->bpe, left->id, right->id);
    if (found->id == UINT32_MAX) return false;
    *score = -(float)found->rank;
    *id = found->id;
    return true;
}

static cairn_status encode_word(void *state, const uint8_t *word, size_t bytes, token_sink *out)
{
    merger *m = state;
    const bpe *b = m->v->bpe;
    if (words_whole_first(b->words)) {
        int64_t id = find_piece(b, (const char *)word, bytes);
        if (id >= 0) {
            emit(out, (cairn_token)id);
            return CAIRN_OK;
        }
    }
    cairn_status st = merger_reserve(m, bytes);
    if (st != CAIRN_OK) return st;
    for (size_t i = 0; i < bytes; i++) {
        cairn_token id = b->byte_ids[word[i]];
        if (id < 0) return cairn_fail(CAIRN_UNSUPPORTED, "the vocabulary has no token for byte 0x%02X", word[i]);
        m->symbols[i] = (symbol){.at = i, .bytes = 1, .id = (uint32_t)id};
    }
    merger_run(m, bytes);
    for (size_t i = 0; i != SIZE_MAX; i = m->symbols[i].right) emit(out, (cairn_token)m->symbols[i].id);
    return CAIRN_OK;
}

static cairn_status encode_run(void *state, const uint8_t *text, size_t bytes, bool first, token_sink *out)
{
    (void)first;
    const merger *m = state;
    return words_each(m->v->bpe->words, text, bytes, encode_word, state, out);
}

cairn_status bpe_encode(const vocab *v, const uint8_t *text, size_t bytes, token_sink *out)
{
    merger m = {.join = join, .v = v};
    if (v->bpe->trouble[0] != 0)
        return cairn_fail(CAIRN_UNSUPPORTED, "text cannot be encoded with this vocabulary of byte pairs: %s",
                          v->bpe->trouble);
    cairn_status st = vocab_runs(v, text, bytes, encode_run, &m, out);
    merger_wipe(&m);
    return st;
}
