/* vocab_spm.c - SentencePiece: the text starts with a space mark, spaces become the mark U+2581, and among neighbouring
 * symbols the pair whose union is the piece of the best score is joined until none is left; what is no piece is spelled
 * in byte tokens. */
#include "vocab_internal.h"

typedef struct speller { /* buffers of one word, kept for the next */
    merger merger;
    char *text; /* the word, with marks */
    size_t text_cap;
} speller;

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

static bool join(const merger *m, const symbol *left, const symbol *right, float *score, uint32_t *id)
{
    if (!find_piece(m->v, m->text + left->at, left->bytes + right->bytes, id)) return false;
    *score = m->v->scores[*id];
    return true;
}

static cairn_status emit_symbol(const vocab *v, const char *text, size_t bytes, token_sink *out)
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

/* s->text holds `bytes` bytes with spaces turned into marks: joins pairs, best score first, and emits. */
static cairn_status merge_word(speller *s, size_t bytes, token_sink *out)
{
    static const uint8_t utf8_bytes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4}; /* by the high nibble */
    merger *m = &s->merger;
    size_t n = 0;
    cairn_status st = merger_reserve(m, bytes);
    if (st != CAIRN_OK) return st;
    for (size_t at = 0; at < bytes; n++) {
        size_t wanted = utf8_bytes[(uint8_t)s->text[at] >> 4];
        size_t length = 1; /* a character cut short ends before the next one: a space after it stays a space */
        while (length < wanted && length < bytes - at && ((uint8_t)s->text[at + length] & 0xc0) == 0x80) length++;
        m->symbols[n] = (symbol){.at = at, .bytes = length};
        at += length;
    }
    m->text = s->text;
    merger_run(m, n);
    for (size_t i = 0; i != SIZE_MAX; i = m->symbols[i].right)
        if ((st = emit_symbol(m->v, s->text + m->symbols[i].at, m->symbols[i].bytes, out)) != CAIRN_OK) return st;
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

/* Text between user-defined tokens. */
static cairn_status encode_run(void *state, const uint8_t *text, size_t bytes, bool first, token_sink *out)
{
    speller *s = state;
    const vocab *v = s->merger.v;
    bool prefix = first && v->space_prefix;
    while (bytes != 0) {
        size_t n = v->pieces_cross_words ? bytes : word_bytes(text, bytes);
        size_t needed;
        if (!cairn_mul_size(n, MARK_BYTES, &needed) || !cairn_add_size(needed, MARK_BYTES, &needed))
            return cairn_fail(CAIRN_NO_MEMORY, "encoding %zu bytes of text", n);
        if (s->text == NULL || needed > s->text_cap) {
            cairn_free(s->text);
            s->text = cairn_alloc(needed);
            if (s->text == NULL) return cairn_fail(CAIRN_NO_MEMORY, "encoding %zu bytes of text", n);
            s->text_cap = needed;
        }
        size_t at = 0;
        if (prefix) {
            memcpy(s->text, MARK, MARK_BYTES);
            at = MARK_BYTES;
        }
        for (size_t i = 0; i < n; i++) {
            if (text[i] == ' ') {
                memcpy(s->text + at, MARK, MARK_BYTES);
                at += MARK_BYTES;
            } else {
                s->text[at++] = (char)text[i];
            }
        }
        cairn_status st = merge_word(s, at, out);
        if (st != CAIRN_OK) return st;
        prefix = false;
        text += n;
        bytes -= n;
    }
    return CAIRN_OK;
}

cairn_status spm_encode(const vocab *v, const uint8_t *text, size_t bytes, token_sink *out)
{
    speller s = {.merger = {.join = join, .v = v}};
    cairn_status st = vocab_runs(v, text, bytes, encode_run, &s, out);
    merger_wipe(&s.merger);
    cairn_free(s.text);
    return st;
}
