/* lesson.c - training windows: text with facts in it and questions about them (docs/training.md says why so). */
#include "lesson_internal.h"

enum { SENTENCE_MAX = 80, FIRST_DIGIT = 3 };

void cairn_train_stage_init(cairn_train_stage *stage)
{
    *stage = (cairn_train_stage){.name = "text",
                                 .steps = 1000,
                                 .window = 512,
                                 .windows = 8,
                                 .warmup = 50,
                                 .adam = 2e-3F,
                                 .muon = 0.02F,
                                 .floor = 0.02F,
                                 .text = 1,
                                 .facts = 4,
                                 .questions = 4,
                                 .plain = 0.5F,
                                 .interleaved = 0.5F,
                                 .short_form = 0.5F,
                                 .text_weight = 1,
                                 .answer_weight = 5};
}

cairn_status cairn_lesson_init(cairn_lesson *lesson, size_t room)
{
    *lesson = (cairn_lesson){.room = room, .mentions_room = room / 4 + 8, .secrets_room = room / 4 + 8};
    lesson->bytes = cairn_alloc(room + SENTENCE_MAX);
    lesson->weights = cairn_alloc_array(room + SENTENCE_MAX, sizeof *lesson->weights);
    lesson->answers = cairn_alloc_array(room + SENTENCE_MAX, sizeof *lesson->answers);
    lesson->mentions = cairn_alloc_array(lesson->mentions_room, sizeof *lesson->mentions);
    lesson->secrets = cairn_alloc_array(lesson->secrets_room, sizeof *lesson->secrets);
    if (lesson->bytes != NULL && lesson->weights != NULL && lesson->answers != NULL && lesson->mentions != NULL &&
        lesson->secrets != NULL)
        return CAIRN_OK;
    cairn_lesson_wipe(lesson);
    return cairn_fail(CAIRN_NO_MEMORY, "a training window of %zu bytes", room);
}

void cairn_lesson_wipe(cairn_lesson *lesson)
{
    cairn_free(lesson->bytes);
    cairn_free(lesson->weights);
    cairn_free(lesson->answers);
    cairn_free(lesson->mentions);
    cairn_free(lesson->secrets);
    *lesson = (cairn_lesson){0};
}

/* ---- writing: past the end nothing is kept ---- */

typedef struct writer {
    cairn_lesson *lesson;
    const cairn_corpus *corpus;
    const cairn_train_stage *stage;
    cairn_random *random;
    size_t end;
    size_t block; /* bytes of a block, 0 = there are none */
} writer;

static bool chance(writer *w, float share)
{
    return cairn_random_unit(w->random) < (double)share;
}

static void put(writer *w, const void *bytes, size_t n, float weight)
{
    cairn_lesson *l = w->lesson;
    if (n > w->end - l->n) n = w->end - l->n;
    memcpy(l->bytes + l->n, bytes, n);
    memset(l->answers + l->n, 0, n * sizeof *l->answers);
    for (size_t i = 0; i < n; i++) l->weights[l->n + i] = weight;
    l->n += n;
}

/* The digits of a secret: worth nothing where nobody can know them, an answer where they were said before. Said twice
 * in one sentence they are near, a matter of copying. */
static void put_digits(writer *w, uint32_t secret, bool answered, bool again)
{
    cairn_lesson *l = w->lesson;
    const size_t at = l->n;
    const float weight = again ? 1 : answered ? w->stage->answer_weight : 0;
    put(w, l->secrets[secret].digits, CAIRN_RECALL_DIGITS, weight);
    if (l->n - at < CAIRN_RECALL_DIGITS) return; /* cut off */
    if (l->n_mentions == l->mentions_room) return;
    l->mentions[l->n_mentions++] = (cairn_mention){secret, (uint32_t)at, answered && !again};
    if (!answered || again) return;
    l->weights[at] *= FIRST_DIGIT; /* it alone has to tell the names apart */
    for (size_t i = 0; i < CAIRN_RECALL_DIGITS; i++) l->answers[at + i] = (uint32_t)l->n_mentions;
}

static bool said_before(const cairn_lesson *l, uint32_t secret)
{
    for (size_t i = 0; i < l->n_mentions; i++)
        if (l->mentions[i].secret == secret) return true;
    return false;
}

/* A name cannot be known where it is first written in a sentence, half known where a question repeats it. */
static void put_sentence(writer *w, cairn_sentence kind, uint32_t secret)
{
    const bool plain = w->lesson->secrets[secret].name[0] == 0;
    bool answered = said_before(w->lesson, secret), named = false, digits = false;
    for (const char *const *p = cairn_sentence_pieces(kind, plain); *p != NULL; p++) {
        if (strcmp(*p, "D") == 0) {
            put_digits(w, secret, answered, digits);
            digits = true;
        } else if (strcmp(*p, "N") == 0) {
            put(w, w->lesson->secrets[secret].name, CAIRN_RECALL_NAME, named ? 0.5F : 0);
            named = true;
        } else {
            put(w, *p, strlen(*p), 1);
        }
    }
}

static const char grass[] =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";

static void put_grass(writer *w, size_t n)
{
    size_t from = (size_t)cairn_random_below(w->random, sizeof grass - 1);
    while (n > 0) {
        size_t some = sizeof grass - 1 - from < n ? sizeof grass - 1 - from : n;
        put(w, grass + from, some, w->stage->text_weight);
        n -= some;
        from = 0;
    }
}

/* Rows of numbers, as tables have them: most of it cannot be predicted, and none of it is a key. */
static void put_numbers(writer *w, size_t n)
{
    const size_t end = w->lesson->n + n;
    const uint64_t columns = 1 + cairn_random_below(w->random, 8), most = 1 + cairn_random_below(w->random, 7);
    static const char *const gaps[] = {" ", "  ", "\t", ", ", " | ", ";"};
    const char *gap = gaps[cairn_random_below(w->random, 6)];
    for (uint64_t column = 0; w->lesson->n < end && w->lesson->n < w->end; column++) {
        char number[8];
        size_t digits = (size_t)(1 + cairn_random_below(w->random, most));
        for (size_t i = 0; i < digits; i++) number[i] = (char)('0' + cairn_random_below(w->random, 10));
        if (digits > end - w->lesson->n) digits = end - w->lesson->n;
        put(w, number, digits, w->stage->text_weight / 4);
        const char *between = (column + 1) % columns == 0 ? "\n" : gap;
        size_t some = strlen(between) < end - w->lesson->n ? strlen(between) : end - w->lesson->n;
        put(w, between, some, w->stage->text_weight / 4);
    }
}

static cairn_status put_text(writer *w, size_t n, float weight)
{
    cairn_lesson *l = w->lesson;
    const uint64_t all = cairn_corpus_bytes(w->corpus, CAIRN_SPLIT_TRAIN);
    const size_t at = l->n;
    if (n > w->end - l->n) n = w->end - l->n;
    memset(l->answers + at, 0, n * sizeof *l->answers);
    for (size_t i = 0; i < n; i++) l->weights[at + i] = weight;
    l->n += n;
    return cairn_corpus_read(w->corpus, CAIRN_SPLIT_TRAIN, cairn_random_below(w->random, all), n, l->bytes + at);
}

static cairn_status put_filling(writer *w, size_t n)
{
    const double draw = cairn_random_unit(w->random);
    if (draw < (double)w->stage->grass)
        put_grass(w, n);
    else if (draw < (double)w->stage->grass + (double)w->stage->numbers)
        put_numbers(w, n);
    else
        return put_text(w, n, w->stage->text_weight);
    return CAIRN_OK;
}

/* ---- dense lessons: facts, then the same facts again and again ---- */

static cairn_status make_dense(writer *w)
{
    cairn_lesson *l = w->lesson;
    const bool in_short = chance(w, w->stage->short_form);
    const bool filled = !in_short && chance(w, 0.5F);
    const uint64_t few = chance(w, 0.5F) ? 2 : in_short ? 6 : 3;
    const size_t n = (size_t)(1 + cairn_random_below(w->random, few));
    const cairn_sentence says = in_short ? CAIRN_SAYS_SHORT : CAIRN_SAYS;
    cairn_status st = CAIRN_OK;
    for (size_t i = 0; i < n; i++) {
        const bool plain = i == 0 && !in_short && chance(w, 0.4F);
        l->secrets[i] = cairn_secret_draw(w->random, plain, l->secrets, i);
        put_sentence(w, says, (uint32_t)i);
    }
    l->n_secrets = n;
    while (l->n < w->end && st == CAIRN_OK) {
        const uint32_t i = (uint32_t)cairn_random_below(w->random, n);
        if (filled && chance(w, 0.5F))
            st = put_text(w, 4 + (size_t)cairn_random_below(w->random, 36), w->stage->text_weight);
        put_sentence(w, !in_short && chance(w, 0.5F) ? CAIRN_ASKS : says, i);
    }
    return st;
}

/* ---- sparse lessons: facts and questions hidden in text ---- */

enum { EVENTS_MAX = 512, FIRST_TOKENS = 4 };

typedef struct event {
    uint32_t secret;
    cairn_sentence kind;
} event;

typedef struct plan {
    event events[EVENTS_MAX];
    size_t n;
    size_t bytes; /* of all sentences */
} plan;

static size_t event_bytes(const cairn_lesson *l, const event *e)
{
    return cairn_sentence_bytes(e->kind, l->secrets[e->secret].name[0] == 0);
}

static void insert(plan *p, size_t at, event e, size_t bytes)
{
    memmove(p->events + at + 1, p->events + at, (p->n - at) * sizeof *p->events);
    p->events[at] = e;
    p->n++;
    p->bytes += bytes;
}

/* Facts in random order, questions after theirs; what does not fit is left out. */
static void make_plan(writer *w, plan *p)
{
    cairn_lesson *l = w->lesson;
    const cairn_train_stage *stage = w->stage;
    const bool plain = chance(w, stage->plain), mixed = chance(w, stage->interleaved);
    const size_t slack = 8;
    size_t facts = (size_t)(1 + cairn_random_below(w->random, stage->facts));
    size_t questions = (size_t)(1 + cairn_random_below(w->random, stage->questions));
    p->n = p->bytes = 0;
    for (size_t i = 0; i < facts && p->n < EVENTS_MAX / 2; i++) {
        const size_t named = plain ? 1 : 0; /* the first of them */
        if (i > named && stage->alike > 0 && chance(w, stage->alike))
            l->secrets[i] = cairn_secret_alike(w->random, &l->secrets[named + cairn_random_below(w->random, i - named)],
                                               l->secrets, i);
        else
            l->secrets[i] = cairn_secret_draw(w->random, plain && i == 0, l->secrets, i);
        const event e = {(uint32_t)i, CAIRN_SAYS};
        /* room for one question at least */
        const size_t least = event_bytes(l, &e) + cairn_sentence_bytes(CAIRN_ASKS, false) + slack;
        if (i > 0 && p->bytes + least > w->end) break;
        insert(p, (size_t)cairn_random_below(w->random, p->n + 1), e, event_bytes(l, &e));
        l->n_secrets = i + 1;
    }
    for (size_t q = 0; q < questions && p->n < EVENTS_MAX; q++) {
        uint32_t secret = (uint32_t)cairn_random_below(w->random, l->n_secrets);
        if (plain && chance(w, 1.0F / 3)) secret = 0;
        const bool named = l->secrets[secret].name[0] != 0;
        const event e = {secret, named && chance(w, stage->said) ? CAIRN_SAYS : CAIRN_ASKS};
        if (p->bytes + event_bytes(l, &e) + slack > w->end) break;
        size_t from = 0;
        while (p->events[from].secret != secret) from++;
        size_t at = mixed ? from + 1 + (size_t)cairn_random_below(w->random, p->n - from) : p->n;
        insert(p, at, e, event_bytes(l, &e));
    }
}

/* Sizes of the gaps before, between and after n sentences: shares like squares of normal numbers, so that some gaps
 * are long and many short. */
static void make_gaps(writer *w, size_t rest, size_t *gaps, size_t n)
{
    double shares[EVENTS_MAX + 1], sum = 0;
    for (size_t i = 0; i <= n; i++) {
        double normal = -3;
        for (int u = 0; u < 6; u++) normal += cairn_random_unit(w->random);
        sum += shares[i] = normal * normal;
    }
    for (size_t i = 0; i <= n; i++) gaps[i] = sum > 0 ? (size_t)((double)rest * shares[i] / sum) : 0;
}

/* How much longer the gap before a fact must be for its digits to begin among the first tokens of a block, away from
 * most of their sentence, or so late that they end in the next one. BOS is the first token of the first block. */
static size_t to_a_cut(writer *w, size_t gap, const event *e)
{
    char sentence[SENTENCE_MAX];
    const size_t digits = cairn_sentence_write(e->kind, &w->lesson->secrets[e->secret], true, sentence);
    const size_t at = (1 + w->lesson->n + gap + digits) % w->block;
    const size_t wanted =
        w->block + FIRST_TOKENS - 1 - cairn_random_below(w->random, FIRST_TOKENS + CAIRN_RECALL_DIGITS - 1);
    return (wanted + w->block - at) % w->block;
}

static cairn_status make_sparse(writer *w)
{
    plan p;
    size_t gaps[EVENTS_MAX + 1], owed = 0; /* by the gaps to come */
    cairn_status st = CAIRN_OK;
    make_plan(w, &p);
    make_gaps(w, p.bytes < w->end ? w->end - p.bytes : 0, gaps, p.n);
    for (size_t i = 0; i < p.n && st == CAIRN_OK; i++) {
        const size_t paid = gaps[i] < owed ? gaps[i] : owed;
        size_t gap = gaps[i] - paid;
        owed -= paid;
        if (w->block > 0 && w->stage->cut > 0 && owed == 0 && p.events[i].kind == CAIRN_SAYS &&
            chance(w, w->stage->cut))
            gap += owed = to_a_cut(w, gap, &p.events[i]);
        st = put_filling(w, gap);
        put_sentence(w, p.events[i].kind, p.events[i].secret);
    }
    return st == CAIRN_OK ? put_filling(w, w->end - w->lesson->n) : st;
}

cairn_status cairn_lesson_make(cairn_lesson *lesson, const cairn_corpus *corpus, const cairn_train_stage *stage,
                               cairn_random *random, size_t bytes, size_t block)
{
    writer w = {lesson, corpus, stage, random, bytes < lesson->room ? bytes : lesson->room, block};
    lesson->n = lesson->n_mentions = lesson->n_secrets = 0;
    const double draw = cairn_random_unit(random);
    if (draw < (double)stage->text) return put_text(&w, w.end, 1);
    if (draw < (double)stage->text + (double)stage->dense) return make_dense(&w);
    return make_sparse(&w);
}
