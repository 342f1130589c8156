/* lesson_internal.h - what one training window is made of, before it becomes slots. */
#ifndef CAIRN_LESSON_INTERNAL_H
#define CAIRN_LESSON_INTERNAL_H

#include "recall_internal.h"
#include "train_internal.h"

typedef struct cairn_mention { /* digits of a secret */
    uint32_t secret;
    uint32_t at;   /* of the first digit */
    bool answered; /* said before, so that they can be known */
} cairn_mention;

typedef struct cairn_lesson {
    size_t room, n; /* bytes */
    uint8_t *bytes;
    float *weights;    /* of predicting the byte */
    uint32_t *answers; /* 1 + the mention whose answer the byte is a digit of, 0 = none; never one that is cut off */
    cairn_mention *mentions;
    size_t mentions_room, n_mentions;
    cairn_secret *secrets;
    size_t secrets_room, n_secrets;
} cairn_lesson;

cairn_status cairn_lesson_init(cairn_lesson *lesson, size_t room);
void cairn_lesson_wipe(cairn_lesson *lesson);
/* A new lesson of exactly `bytes` (at most its room) for blocks of `block` bytes, 0 = none: those that a stage's `cut`
 * is about. */
cairn_status cairn_lesson_make(cairn_lesson *lesson, const cairn_corpus *corpus, const cairn_train_stage *stage,
                               cairn_random *random, size_t bytes, size_t block);

/* What bytes become: tokens of a model, or without one byte b as the token 3 + b of the byte vocabulary. */
typedef struct cairn_lesson_vocab {
    const cairn_model *model; /* borrowed; NULL = bytes */
    cairn_token bos;          /* before a window; -1 = none */
    cairn_token landmark;
} cairn_lesson_vocab;

/* A window over a lesson: BOS and all tokens but the last, landmarks in place (block_tokens 0: none); each row predicts
 * the token after its own. */
typedef struct cairn_lesson_window {
    size_t room, rows;
    cairn_token *slots, *targets; /* (rows) */
    float *weights;
    uint32_t *answers; /* (rows) the lesson's, of what the row predicts */
    cairn_train_guided *guided;
    size_t n_guided;
    uint8_t *plain_blocks;     /* (rows) 1 = the block has digits of a plain key, which other windows have others for */
    cairn_train_tokens tokens; /* of the lesson */
    uint32_t *token_of;        /* (bytes of the lesson) */
    size_t token_of_room;
} cairn_lesson_window;

cairn_status cairn_lesson_window_init(cairn_lesson_window *window, size_t rows, size_t bytes);
void cairn_lesson_window_wipe(cairn_lesson_window *window);
/* Content tokens among `rows` slots. */
size_t cairn_lesson_tokens(size_t rows, uint32_t block_tokens);
/* Up to `rows` slots: fewer if the lesson has not tokens enough. */
cairn_status cairn_lesson_to_window(const cairn_lesson *lesson, const cairn_lesson_vocab *vocab, uint32_t block_tokens,
                                    size_t rows, cairn_lesson_window *window);

#endif
