/* train.h - texts to learn from, recall tasks, and the trainer of landmark models.
 *
 * A corpus is files as bytes, in two splits that share no byte. A recall task hides sentences in its text and asks for
 * them: the paper's pass key, and keys by name among other names (docs/training.md). Training and evaluation draw from
 * the same sentences through different streams of random numbers: no evaluation seed gives a text that was trained on.
 *
 * The trainer runs stages one after the other, writes a checkpoint now and then, and goes on from one bit for bit. The
 * same seed and number of threads give the same model on the same kind of processor.
 *
 * Threads: a corpus may be shared by threads; a trainer belongs to one, and runs workers of its own.
 */
#ifndef CAIRN_TRAIN_H
#define CAIRN_TRAIN_H

#include <cairn/model.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- texts ---- */

typedef struct cairn_corpus cairn_corpus; /* open / close: mapped files */
typedef enum cairn_split { CAIRN_SPLIT_TRAIN, CAIRN_SPLIT_HELD_OUT } cairn_split;

/* Files and directories (all regular files below, in the order of their paths). Every 64 KiB of the stream they make
 * belongs to one split, by a hash of its position: about `held_out` of them (0..1) are held out. INVALID if there is no
 * byte in a split that should have some; NOT_FOUND / IO names the path. Files must not be cut short while it is open.
 */
CAIRN_API cairn_status cairn_corpus_open(const char *const *paths, size_t n, double held_out, cairn_corpus **out);
CAIRN_API void cairn_corpus_close(cairn_corpus *corpus);
CAIRN_API uint64_t cairn_corpus_bytes(const cairn_corpus *corpus, cairn_split split);
CAIRN_API size_t cairn_corpus_files(const cairn_corpus *corpus);
/* Bytes [at, at + bytes) of a split, whose end is followed by its begin. INVALID if it is empty. */
CAIRN_API cairn_status cairn_corpus_read(const cairn_corpus *corpus, cairn_split split, uint64_t at, size_t bytes,
                                         void *out);

/* ---- recall: a text with keys hidden in it, and questions ---- */

enum { CAIRN_RECALL_DIGITS = 5, CAIRN_RECALL_NAME = 4 };

typedef struct cairn_recall_options {
    size_t struct_size;
    uint64_t bytes;       /* of the text; a question comes on top */
    uint32_t distractors; /* names that are not asked for first; with `plain` every name is one */
    bool plain;           /* "The pass key is N." among the names; else the key asked for has a name too */
    double depth;         /* where the key asked for stands, 0 = at the begin, 1 = at the end; < 0 = drawn */
    uint64_t seed;
} cairn_recall_options;
CAIRN_API void cairn_recall_options_init(cairn_recall_options *opt, size_t struct_size);

typedef struct cairn_recall_question {
    char text[80];                        /* ends where the digits begin */
    char answer[CAIRN_RECALL_DIGITS + 1]; /* 0-terminated */
    char name[CAIRN_RECALL_NAME + 1];     /* "" for the plain key */
    uint64_t at;                          /* where its sentence begins in the text */
} cairn_recall_question;

typedef struct cairn_recall_text cairn_recall_text; /* new / free */
/* Held-out text with the sentences in it. The first question is for the key at `depth`; those for the distractors
 * follow, in order of their places. INVALID if the sentences do not fit into the text. */
CAIRN_API cairn_status cairn_recall_text_new(const cairn_corpus *corpus, const cairn_recall_options *opt,
                                             cairn_recall_text **out);
CAIRN_API void cairn_recall_text_free(cairn_recall_text *text);
CAIRN_API const char *cairn_recall_text_bytes(const cairn_recall_text *text, size_t *bytes); /* 0-terminated too */
CAIRN_API size_t cairn_recall_text_questions(const cairn_recall_text *text);
CAIRN_API const cairn_recall_question *cairn_recall_text_question(const cairn_recall_text *text, size_t i);

#ifdef __cplusplus
}
#endif
#endif
