/* tokens.c - a document as a task makes it, byte by byte, as the tokens a model has for it.
 *
 * Tasks speak of bytes: these digits are the answer, that sentence counts half. A vocabulary of pieces cuts elsewhere,
 * so each token is followed to the bytes it stands for: what it decodes to is compared with the text as we go. Any
 * bytes can be followed, also those SentencePiece does not give back as they were:
 *
 *   it puts a space before the text      which is one of no document
 *   spaces become a mark, U+2581         which decodes to a space, also where the text itself has the mark
 *   what is no piece is spelled in bytes a mark too: in broken UTF-8, or where it is no piece
 *   what has no byte token is unknown    one token for each byte, of a mark three */
#include "train_internal.h"

#include "model_internal.h"

static const uint8_t MARK[] = {0xe2, 0x96, 0x81};

typedef struct walker { /* a place in the text */
    const uint8_t *text;
    size_t bytes;
    size_t at;       /* in the space put before it, if there is one, and the text */
    size_t lead;     /* 1 = there is */
    size_t spelling; /* bytes seen of the mark that stands for the space just passed; 0 = all or none */
} walker;

static bool next_is(const walker *w, uint8_t byte)
{
    size_t at = w->at - w->lead; /* may wrap, in the space */
    return w->at < w->lead ? byte == ' ' : at < w->bytes && w->text[at] == byte;
}

static bool pass_byte(walker *w, uint8_t byte)
{
    if (w->spelling != 0) {
        if (byte != MARK[w->spelling]) return false;
        w->spelling = (w->spelling + 1) % sizeof MARK;
    } else if (next_is(w, byte)) {
        w->at++;
    } else if (byte == ' ' && w->at >= w->lead && w->bytes - (w->at - w->lead) >= sizeof MARK &&
               memcmp(w->text + (w->at - w->lead), MARK, sizeof MARK) == 0) {
        w->at += sizeof MARK;
    } else if (byte == MARK[0] && next_is(w, ' ')) {
        w->at++;
        w->spelling = 1;
    } else {
        return false;
    }
    return true;
}

static bool pass_unknown(walker *w)
{
    if (w->spelling == 0 && w->at == w->lead + w->bytes) return false;
    if (w->spelling != 0)
        w->spelling = (w->spelling + 1) % sizeof MARK;
    else
        w->spelling = next_is(w, ' '), w->at++;
    return true;
}

static size_t passed(const walker *w) /* of the text */
{
    return w->at < w->lead ? 0 : w->at - w->lead;
}

/* out->bytes of all tokens, with a space before the text or without. False if they do not spell that. piece has room
 * for more than the text. */
static bool follow(const cairn_model *model, const cairn_train_document *d, size_t lead, char *piece,
                   cairn_train_tokens *out)
{
    walker w = {.text = d->text, .bytes = d->bytes, .lead = lead};
    for (size_t i = 0; i < out->n; i++) {
        const size_t from = passed(&w), n = cairn_model_decode(model, out->tokens[i], piece, 3 * d->bytes + 4);
        if (n == 0 && (out->tokens[i] != model->info.unk || !pass_unknown(&w))) return false;
        for (size_t k = 0; k < n; k++)
            if (!pass_byte(&w, (uint8_t)piece[k])) return false;
        out->bytes[i] = (uint32_t)(passed(&w) - from);
    }
    return w.at == lead + d->bytes && w.spelling == 0;
}

static cairn_status reserve(cairn_train_tokens *t, size_t n)
{
    if (n <= t->cap) return CAIRN_OK;
    cairn_train_tokens_wipe(t);
    t->tokens = cairn_alloc_array(n, sizeof *t->tokens);
    t->weights = cairn_alloc_array(n, sizeof *t->weights);
    t->places = cairn_alloc_array(n, sizeof *t->places);
    t->bytes = cairn_alloc_array(n, sizeof *t->bytes);
    if (t->tokens == NULL || t->weights == NULL || t->places == NULL || t->bytes == NULL) {
        cairn_train_tokens_wipe(t);
        return cairn_fail(CAIRN_NO_MEMORY, "%zu tokens of a document", n);
    }
    t->cap = n;
    return CAIRN_OK;
}

void cairn_train_tokens_wipe(cairn_train_tokens *t)
{
    cairn_free(t->tokens);
    cairn_free(t->weights);
    cairn_free(t->places);
    cairn_free(t->bytes);
    *t = (cairn_train_tokens){0};
}

static cairn_status encode(const cairn_model *model, const cairn_train_document *d, cairn_train_tokens *out, size_t *n)
{
    /* A token for each byte and one for the space before them; more only where spaces are spelled. */
    cairn_status st = reserve(out, d->bytes + 1);
    if (st == CAIRN_OK) st = cairn_model_encode(model, d->text, d->bytes, out->tokens, out->cap, n);
    if (st != CAIRN_OK || *n <= out->cap) return st;
    if ((st = reserve(out, *n)) != CAIRN_OK) return st;
    return cairn_model_encode(model, d->text, d->bytes, out->tokens, out->cap, n);
}

static void weigh(const cairn_train_document *d, cairn_train_tokens *out)
{
    for (size_t i = 0, at = 0; i < out->n; i++) {
        const size_t first = at < d->bytes ? at : d->bytes - 1; /* there are tokens, so there are bytes */
        float most = 0;
        for (size_t end = at + out->bytes[i]; at < end; at++) {
            float here = d->weights != NULL ? d->weights[at] : 1;
            most = here > most ? here : most;
        }
        out->weights[i] = most;
        out->places[i] = d->places != NULL ? d->places[first] : first;
    }
}

cairn_status cairn_train_tokenize(const cairn_model *model, const cairn_train_document *d, cairn_train_tokens *out)
{
    size_t n = 0;
    char *piece = NULL;
    cairn_status st;
    out->n = 0;
    if (d->bytes > INT32_MAX) return cairn_fail(CAIRN_INVALID, "a document of %zu bytes", d->bytes);
    if ((st = encode(model, d, out, &n)) != CAIRN_OK) return st;
    piece = cairn_alloc(3 * d->bytes + 4); /* more than all of it with its spaces spelled */
    if (piece == NULL) return cairn_fail(CAIRN_NO_MEMORY, "decoding a document of %zu bytes", d->bytes);
    out->n = n;
    /* The tokens have one length, so at most one of the two can be. */
    if (follow(model, d, 1, piece, out) || follow(model, d, 0, piece, out)) {
        weigh(d, out);
    } else {
        out->n = 0;
        st = cairn_fail(CAIRN_MISMATCH, "model '%s': the %zu tokens of a document of %zu bytes do not spell it",
                        model->info.name, n, d->bytes);
    }
    cairn_free(piece);
    return st;
}
