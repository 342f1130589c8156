/* recall.c - the sentences that hide a key and ask for it, and evaluation texts made of them.
 *
 * The plain key is the paper's (section 4.2, in fewer words); keys by name are ours. Sentences begin and end with a
 * newline, so that they stand alone wherever they are put into a text. */
#include "recall_internal.h"

#include <stdlib.h>

/* ---- random numbers ---- */

uint64_t cairn_random_u64(cairn_random *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15U;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    return z ^ z >> 31;
}
uint64_t cairn_random_below(cairn_random *r, uint64_t n)
{
    return (uint64_t)((unsigned __int128)cairn_random_u64(r) * n >> 64);
}
double cairn_random_unit(cairn_random *r)
{
    return (double)(cairn_random_u64(r) >> 11) * 0x1p-53;
}
cairn_random cairn_random_of(const char *purpose, uint64_t seed, uint64_t a, uint64_t b)
{
    uint8_t numbers[24];
    cairn_put_le64(numbers, seed);
    cairn_put_le64(numbers + 8, a);
    cairn_put_le64(numbers + 16, b);
    return (cairn_random){cairn_hash64_two(purpose, strlen(purpose), numbers, sizeof numbers)};
}

/* ---- sentences ---- */

static const char *const plain_says[] = {"\nThe pass key is ",  "D", ". Remember it. ", "D",
                                         " is the pass key.\n", NULL};
static const char *const plain_asks[] = {"\nWhat is the pass key? The pass key is ", "D", ".\n", NULL};
static const char *const named_says[] = {"\nThe pass key of ", "N", " is ", "D", ".\n", NULL};
static const char *const named_asks[] = {
    "\nWhat is the pass key of ", "N", "? The pass key of ", "N", " is ", "D", ".\n", NULL};
static const char *const named_short[] = {" ", "N", " is ", "D", ".", NULL};

const char *const *cairn_sentence_pieces(cairn_sentence kind, bool plain)
{
    if (plain) return kind == CAIRN_ASKS ? plain_asks : plain_says;
    return kind == CAIRN_ASKS ? named_asks : kind == CAIRN_SAYS ? named_says : named_short;
}

static size_t piece_bytes(const char *piece)
{
    return strcmp(piece, "D") == 0   ? (size_t)CAIRN_RECALL_DIGITS
           : strcmp(piece, "N") == 0 ? (size_t)CAIRN_RECALL_NAME
                                     : strlen(piece);
}

size_t cairn_sentence_bytes(cairn_sentence kind, bool plain)
{
    size_t n = 0;
    for (const char *const *p = cairn_sentence_pieces(kind, plain); *p != NULL; p++) n += piece_bytes(*p);
    return n;
}

size_t cairn_sentence_write(cairn_sentence kind, const cairn_secret *secret, bool open, char *out)
{
    size_t n = 0;
    for (const char *const *p = cairn_sentence_pieces(kind, secret->name[0] == 0); *p != NULL; p++) {
        const bool digits = strcmp(*p, "D") == 0;
        if (digits && open) break;
        memcpy(out + n, digits ? secret->digits : strcmp(*p, "N") == 0 ? secret->name : *p, piece_bytes(*p));
        n += piece_bytes(*p);
    }
    out[n] = 0;
    return n;
}

static bool is_taken(const char *name, const cairn_secret *others, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(others[i].name, name) == 0) return true;
    return false;
}

cairn_secret cairn_secret_draw(cairn_random *r, bool plain, const cairn_secret *others, size_t n)
{
    cairn_secret s = {0};
    for (int i = 0; i < CAIRN_RECALL_DIGITS; i++) s.digits[i] = (char)('0' + cairn_random_below(r, 10));
    while (!plain) {
        for (int i = 0; i < CAIRN_RECALL_NAME; i++) s.name[i] = (char)('A' + cairn_random_below(r, 26));
        if (!is_taken(s.name, others, n)) break;
    }
    return s;
}

cairn_secret cairn_secret_alike(cairn_random *r, const cairn_secret *like, const cairn_secret *others, size_t n)
{
    enum { TRIES = 8 };
    cairn_secret s = cairn_secret_draw(r, false, others, n);
    char name[CAIRN_RECALL_NAME + 1] = "";
    for (int i = 0; i < TRIES; i++) {
        const uint64_t one = cairn_random_below(r, CAIRN_RECALL_NAME), other = cairn_random_below(r, CAIRN_RECALL_NAME);
        memcpy(name, like->name, sizeof name);
        if (cairn_random_below(r, 2) == 0)
            name[one] = like->name[other], name[other] = like->name[one];
        else
            name[one] = (char)('A' + cairn_random_below(r, 26));
        if (is_taken(name, others, n)) continue;
        memcpy(s.name, name, sizeof name);
        break;
    }
    return s;
}

/* ---- evaluation texts ---- */

struct cairn_recall_text {
    char *bytes;
    size_t n_bytes;
    cairn_recall_question *questions;
    size_t n;
};

void cairn_recall_options_init(cairn_recall_options *opt, size_t struct_size)
{
    const cairn_recall_options all = {
        .struct_size = struct_size, .bytes = 16384, .plain = true, .depth = -1, .seed = 1};
    memcpy(opt, &all, struct_size < sizeof all ? struct_size : sizeof all);
}

void cairn_recall_text_free(cairn_recall_text *text)
{
    if (text == NULL) return;
    cairn_free(text->bytes);
    cairn_free(text->questions);
    cairn_free(text);
}

typedef struct hidden { /* a sentence and how much of the text comes before it */
    uint64_t before;
    size_t secret;
} hidden;

static int by_place(const void *a, const void *b)
{
    const hidden *x = a, *y = b;
    if (x->before != y->before) return x->before < y->before ? -1 : 1;
    return (x->secret > y->secret) - (x->secret < y->secret);
}

/* Fills `text` with the sentences where `places` (n, ascending) say and the corpus in between. */
static cairn_status fill(cairn_recall_text *text, const cairn_corpus *corpus, uint64_t from, const hidden *places,
                         const cairn_secret *secrets, size_t n)
{
    uint64_t read = 0;
    size_t at = 0, asked = 1;
    for (size_t i = 0; i <= n; i++) {
        size_t more = i < n ? (size_t)(places[i].before - read) : text->n_bytes - at;
        cairn_status st = cairn_corpus_read(corpus, CAIRN_SPLIT_HELD_OUT, from + read, more, text->bytes + at);
        if (st != CAIRN_OK) return st;
        read += more;
        at += more;
        if (i == n) break;
        char sentence[80];
        const cairn_secret *s = &secrets[places[i].secret];
        cairn_recall_question *q = &text->questions[places[i].secret == 0 ? 0 : asked++];
        *q = (cairn_recall_question){.at = at};
        cairn_sentence_write(CAIRN_ASKS, s, true, q->text);
        memcpy(q->answer, s->digits, sizeof q->answer);
        memcpy(q->name, s->name, sizeof q->name);
        size_t bytes = cairn_sentence_write(CAIRN_SAYS, s, false, sentence);
        memcpy(text->bytes + at, sentence, bytes);
        at += bytes;
    }
    text->bytes[text->n_bytes] = 0;
    return CAIRN_OK;
}

cairn_status cairn_recall_text_new(const cairn_corpus *corpus, const cairn_recall_options *opt, cairn_recall_text **out)
{
    cairn_recall_options o;
    cairn_recall_options_init(&o, sizeof o);
    memcpy(&o, opt, opt->struct_size < sizeof o ? opt->struct_size : sizeof o);
    cairn_random r = cairn_random_of("recall evaluation", o.seed, 0, 0);
    const size_t n = (size_t)o.distractors + 1;
    const uint64_t sentences =
        cairn_sentence_bytes(CAIRN_SAYS, o.plain) + (uint64_t)o.distractors * cairn_sentence_bytes(CAIRN_SAYS, false);
    cairn_recall_text *text = NULL;
    cairn_secret *secrets = NULL;
    hidden *places = NULL;
    cairn_status st = CAIRN_OK;
    *out = NULL;
    if (o.bytes > SIZE_MAX - 1 || sentences > o.bytes)
        return cairn_fail(CAIRN_INVALID, "a text of %llu bytes has no room for %llu bytes of sentences with %zu keys",
                          (unsigned long long)o.bytes, (unsigned long long)sentences, n);
    if (!(o.depth <= 1)) return cairn_fail(CAIRN_INVALID, "depth %g of the key, must be at most 1", o.depth);
    text = cairn_calloc(1, sizeof *text);
    secrets = cairn_calloc(n, sizeof *secrets);
    places = cairn_calloc(n, sizeof *places);
    if (text != NULL) {
        *text = (cairn_recall_text){.bytes = cairn_alloc((size_t)o.bytes + 1),
                                    .n_bytes = (size_t)o.bytes,
                                    .questions = cairn_calloc(n, sizeof *text->questions),
                                    .n = n};
    }
    if (text == NULL || secrets == NULL || places == NULL || text->bytes == NULL || text->questions == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "a text of %llu bytes with %zu keys", (unsigned long long)o.bytes, n);
        goto out;
    }
    const uint64_t rest = o.bytes - sentences; /* bytes of the corpus in it */
    for (size_t i = 0; i < n; i++) {
        secrets[i] = cairn_secret_draw(&r, o.plain && i == 0, secrets, i);
        places[i] = (hidden){cairn_random_below(&r, rest + 1), i};
    }
    if (o.depth >= 0) places[0].before = (uint64_t)(o.depth * (double)rest);
    uint64_t from = cairn_random_below(&r, cairn_corpus_bytes(corpus, CAIRN_SPLIT_HELD_OUT));
    qsort(places, n, sizeof *places, by_place);
    st = fill(text, corpus, from, places, secrets, n);
out:
    cairn_free(secrets);
    cairn_free(places);
    if (st != CAIRN_OK) {
        cairn_recall_text_free(text);
        return st;
    }
    *out = text;
    return CAIRN_OK;
}

const char *cairn_recall_text_bytes(const cairn_recall_text *text, size_t *bytes)
{
    *bytes = text->n_bytes;
    return text->bytes;
}
size_t cairn_recall_text_questions(const cairn_recall_text *text)
{
    return text->n;
}
const cairn_recall_question *cairn_recall_text_question(const cairn_recall_text *text, size_t i)
{
    return &text->questions[i];
}
