/* lesson_window.c - a lesson as the slots of one training window, and the rows guidance can be given to. */
#include "lesson_internal.h"

enum { FIRST_BYTE = 3 }; /* of the byte vocabulary */

cairn_status cairn_lesson_window_init(cairn_lesson_window *window, size_t rows, size_t bytes)
{
    *window = (cairn_lesson_window){.room = rows, .token_of_room = bytes};
    window->slots = cairn_alloc_array(rows, sizeof *window->slots);
    window->targets = cairn_alloc_array(rows, sizeof *window->targets);
    window->weights = cairn_alloc_array(rows, sizeof *window->weights);
    window->answers = cairn_alloc_array(rows, sizeof *window->answers);
    window->guided = cairn_alloc_array(rows, sizeof *window->guided);
    window->plain_blocks = cairn_alloc(rows);
    window->token_of = cairn_alloc_array(bytes, sizeof *window->token_of);
    if (window->slots != NULL && window->targets != NULL && window->weights != NULL && window->answers != NULL &&
        window->guided != NULL && window->plain_blocks != NULL && window->token_of != NULL)
        return CAIRN_OK;
    cairn_lesson_window_wipe(window);
    return cairn_fail(CAIRN_NO_MEMORY, "a training window of %zu slots", rows);
}

void cairn_lesson_window_wipe(cairn_lesson_window *window)
{
    cairn_free(window->slots);
    cairn_free(window->targets);
    cairn_free(window->weights);
    cairn_free(window->answers);
    cairn_free(window->guided);
    cairn_free(window->plain_blocks);
    cairn_free(window->token_of);
    cairn_train_tokens_wipe(&window->tokens);
    *window = (cairn_lesson_window){0};
}

size_t cairn_lesson_tokens(size_t rows, uint32_t block_tokens)
{
    return block_tokens == 0 ? rows : rows - rows / ((size_t)block_tokens + 1);
}

/* ---- tokens of a lesson: token t stands for bytes [places[t], places[t] + bytes[t]) ---- */

static void *room_for(void *old, size_t old_n, size_t n, size_t size, bool *good)
{
    void *more = cairn_grow(old, old_n * size, n, size);
    if (more == NULL) *good = false;
    return more != NULL ? more : old;
}

static cairn_status bytes_as_tokens(const cairn_lesson *lesson, cairn_train_tokens *t)
{
    if (t->cap < lesson->n) {
        bool good = true;
        t->tokens = room_for(t->tokens, t->cap, lesson->n, sizeof *t->tokens, &good);
        t->weights = room_for(t->weights, t->cap, lesson->n, sizeof *t->weights, &good);
        t->places = room_for(t->places, t->cap, lesson->n, sizeof *t->places, &good);
        t->bytes = room_for(t->bytes, t->cap, lesson->n, sizeof *t->bytes, &good);
        if (!good) return cairn_fail(CAIRN_NO_MEMORY, "a training window of %zu tokens", lesson->n);
        t->cap = lesson->n;
    }
    t->n = lesson->n;
    for (size_t i = 0; i < t->n; i++) {
        t->tokens[i] = FIRST_BYTE + lesson->bytes[i];
        t->weights[i] = lesson->weights[i];
        t->places[i] = i;
        t->bytes[i] = 1;
    }
    return CAIRN_OK;
}

static cairn_status tokenize(const cairn_lesson *lesson, const cairn_lesson_vocab *vocab, cairn_lesson_window *w)
{
    const cairn_train_document document = {.text = lesson->bytes, .weights = lesson->weights, .bytes = lesson->n};
    cairn_status st = vocab->model == NULL ? bytes_as_tokens(lesson, &w->tokens)
                                           : cairn_train_tokenize(vocab->model, &document, &w->tokens);
    if (st != CAIRN_OK) return st;
    for (size_t t = 0; t < w->tokens.n; t++)
        for (size_t i = 0; i < w->tokens.bytes[t] && w->tokens.places[t] + i < w->token_of_room; i++)
            w->token_of[w->tokens.places[t] + i] = (uint32_t)t;
    return CAIRN_OK;
}

/* The answer a token is part of: that of any of its bytes, as a token may begin before the digits. */
static uint32_t answer_of(const cairn_lesson *lesson, const cairn_train_tokens *t, size_t token)
{
    for (size_t i = 0; i < t->bytes[token]; i++) {
        const uint32_t answer = lesson->answers[t->places[token] + i];
        if (answer != 0) return answer;
    }
    return 0;
}

/* ---- guidance ---- */

static uint32_t slot_of(size_t content, size_t C)
{
    return (uint32_t)(content + content / C);
}

/* Where digit i of mention m stands. */
static uint32_t slot_of_digit(const cairn_lesson *l, const cairn_lesson_window *w, size_t C, size_t lead, size_t m,
                              uint32_t i)
{
    return slot_of(lead + w->token_of[l->mentions[m].at + i], C);
}

/* Whether mention m is the first in the block of its digit i, or comes after another. */
static cairn_train_turn turn_of(const cairn_lesson *l, const cairn_lesson_window *w, size_t C, size_t lead, size_t m,
                                uint32_t i)
{
    const size_t block = slot_of_digit(l, w, C, lead, m, i) / (C + 1);
    if (m > 0 && slot_of_digit(l, w, C, lead, m - 1, CAIRN_RECALL_DIGITS - 1) / (C + 1) == block)
        return CAIRN_TRAIN_LATER;
    const bool shared = m + 1 < l->n_mentions && slot_of_digit(l, w, C, lead, m + 1, 0) / (C + 1) == block;
    return shared ? CAIRN_TRAIN_FIRST : CAIRN_TRAIN_ANY;
}

/* Token t is content lead + t of the window and predicted by the one before. A row that predicts part of an answer is
 * guided to the slots where those digits stood before, if they are not too many to name. */
static void guide(const cairn_lesson *l, size_t C, size_t lead, cairn_lesson_window *w)
{
    w->n_guided = 0;
    memset(w->plain_blocks, 0, w->room);
    for (size_t m = 0; m < l->n_mentions; m++) {
        const cairn_mention *mention = &l->mentions[m];
        for (uint32_t i = 0; i < CAIRN_RECALL_DIGITS && l->secrets[mention->secret].name[0] == 0; i++) {
            const size_t slot = slot_of(lead + w->token_of[mention->at + i], C);
            if (slot < w->rows) w->plain_blocks[slot / (C + 1)] = 1;
        }
        for (uint32_t i = 0, token = UINT32_MAX; i < CAIRN_RECALL_DIGITS && mention->answered; i++) {
            if (w->token_of[mention->at + i] == token) continue; /* several digits in one token */
            token = w->token_of[mention->at + i];
            if (lead + token == 0) continue; /* nothing comes before it */
            cairn_train_guided g = {.row = slot_of(lead + token - 1, C)};
            bool fits = g.row < w->rows && w->n_guided < w->room;
            for (size_t e = 0; e < m && fits; e++) {
                if (l->mentions[e].secret != mention->secret) continue;
                fits = g.n < CAIRN_TRAIN_GUIDED_SLOTS;
                if (!fits) break;
                g.slots[g.n] = slot_of_digit(l, w, C, lead, e, i);
                if (g.slots[g.n] > g.row) continue;
                const bool own = g.slots[g.n] / (C + 1) == g.row / (C + 1);
                g.turn = own || g.n > 0 ? CAIRN_TRAIN_ANY : turn_of(l, w, C, lead, e, i);
                g.n++;
            }
            if (fits && g.n > 0) w->guided[w->n_guided++] = g;
        }
    }
}

cairn_status cairn_lesson_to_window(const cairn_lesson *lesson, const cairn_lesson_vocab *vocab, uint32_t block_tokens,
                                    size_t rows, cairn_lesson_window *w)
{
    const size_t B = (size_t)block_tokens + 1, lead = vocab->bos >= 0 ? 1 : 0;
    const cairn_train_tokens *t = &w->tokens;
    cairn_status st = tokenize(lesson, vocab, w);
    if (st != CAIRN_OK) return st;
    size_t r = 0;
    for (size_t content = 0; r < rows; r++) {
        if (block_tokens > 0 && r % B == B - 1) {
            w->slots[r] = vocab->landmark;
            w->targets[r] = -1;
            w->weights[r] = 0;
            w->answers[r] = 0;
            continue;
        }
        const size_t next = content + 1 - lead; /* the token this row predicts */
        if (next >= t->n) break;
        w->slots[r] = next == 0 ? vocab->bos : t->tokens[next - 1];
        w->targets[r] = t->tokens[next];
        w->weights[r] = t->weights[next];
        w->answers[r] = answer_of(lesson, t, next);
        content++;
    }
    w->rows = r;
    w->n_guided = 0;
    if (block_tokens > 0) guide(lesson, block_tokens, lead, w);
    return CAIRN_OK;
}
