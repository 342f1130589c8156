/* lesson_internal.h - what one training window is made of, before it becomes slots. */
#ifndef CAIRN_LESSON_INTERNAL_H
#define CAIRN_LESSON_INTERNAL_H

#include "recall_internal.h"
#include "train_internal.h"

typedef enum cairn_lesson_tag { CAIRN_LESSON_TEXT, CAIRN_LESSON_PLAIN, CAIRN_LESSON_NAMED } cairn_lesson_tag;

typedef struct cairn_mention { /* digits of a secret */
    uint32_t secret;
    uint32_t at;   /* of the first digit */
    bool answered; /* said before, so that they can be known */
} cairn_mention;

typedef struct cairn_lesson {
    size_t room, n; /* bytes */
    uint8_t *bytes;
    float *weights; /* of predicting the byte */
    uint8_t *tags;  /* what answer the byte is a digit of; answers cut off at the end are text */
    cairn_mention *mentions;
    size_t mentions_room, n_mentions;
    cairn_secret *secrets;
    size_t secrets_room, n_secrets;
} cairn_lesson;

cairn_status cairn_lesson_init(cairn_lesson *lesson, size_t room);
void cairn_lesson_wipe(cairn_lesson *lesson);
/* A new lesson of exactly `bytes` (at most its room). */
cairn_status cairn_lesson_make(cairn_lesson *lesson, const cairn_corpus *corpus, const cairn_train_stage *stage,
                               cairn_random *random, size_t bytes);

/* A window over a lesson: BOS and all bytes but the last, landmarks in place (block_tokens 0: none); each row predicts
 * the byte after its own. */
typedef struct cairn_lesson_window {
    size_t room, rows;
    cairn_token *slots, *targets; /* (rows) */
    float *weights;
    uint8_t *tags; /* (rows) of what the row predicts */
    cairn_train_guided *guided;
    size_t n_guided;
} cairn_lesson_window;

cairn_status cairn_lesson_window_init(cairn_lesson_window *window, size_t room);
void cairn_lesson_window_wipe(cairn_lesson_window *window);
/* Content tokens among `rows` slots. */
size_t cairn_lesson_tokens(size_t rows, uint32_t block_tokens);
/* Byte b is token first_byte + b. */
void cairn_lesson_to_window(const cairn_lesson *lesson, uint32_t block_tokens, cairn_token bos, cairn_token first_byte,
                            cairn_token landmark, size_t rows, cairn_lesson_window *window);

#endif
