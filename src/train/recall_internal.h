/* recall_internal.h - the sentences of recall tasks, and random numbers to draw them with. */
#ifndef CAIRN_RECALL_INTERNAL_H
#define CAIRN_RECALL_INTERNAL_H

#include "base_internal.h"

#include <cairn/train.h>

/* SplitMix64 (Steele, Lea & Flood 2014): the same numbers everywhere. */
typedef struct cairn_random {
    uint64_t state;
} cairn_random;
/* Streams of another purpose or numbers never meet: the state is a hash of them all. */
cairn_random cairn_random_of(const char *purpose, uint64_t seed, uint64_t a, uint64_t b);
uint64_t cairn_random_u64(cairn_random *r);
uint64_t cairn_random_below(cairn_random *r, uint64_t n); /* 0 for n = 0 */
double cairn_random_unit(cairn_random *r);                /* [0, 1) */

typedef struct cairn_secret {
    char name[CAIRN_RECALL_NAME + 1]; /* "" = the plain key */
    char digits[CAIRN_RECALL_DIGITS + 1];
} cairn_secret;
/* A secret whose name is none of the n before it. */
cairn_secret cairn_secret_draw(cairn_random *r, bool plain, const cairn_secret *others, size_t n);

/* The same, but the name is that of `like` with two letters changed for each other, or one for a new one; a name of its
 * own if that does not give one soon ("AAAA"). */
cairn_secret cairn_secret_alike(cairn_random *r, const cairn_secret *like, const cairn_secret *others, size_t n);

/* A sentence in pieces; pieces[i] is literal text, "N" stands for the name, "D" for the digits. */
typedef enum cairn_sentence { CAIRN_SAYS, CAIRN_ASKS, CAIRN_SAYS_SHORT } cairn_sentence;
const char *const *cairn_sentence_pieces(cairn_sentence kind, bool plain); /* ends with NULL */
/* Length of a whole sentence. */
size_t cairn_sentence_bytes(cairn_sentence kind, bool plain);
/* Writes it, 0-terminated, up to the first digits if `open`; returns its length. out has room for 80. */
size_t cairn_sentence_write(cairn_sentence kind, const cairn_secret *secret, bool open, char *out);

#endif
