/* test_train_trainer.c - lessons, updates and checkpoints of a whole run.
 * labels: threads
 *
 * Witnesses: the sentences of a lesson read by the test; a run that was never interrupted; files cut, flipped and
 * refused.
 */
#include "support.h"

#include <cairn/train.h>
#include <lesson_internal.h>
#include <trainer_internal.h>

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

/* Text of words, two million bytes of it, and a directory for what is written. */
typedef struct fixture {
    char *dir, *text, *checkpoint, *model;
    cairn_corpus *corpus;
} fixture;

static int set_up(void **state)
{
    enum { BYTES = 2 << 20 };
    static const char *const words[] = {"the ", "stone ", "path ", "over ", "a ", "hill, ", "marks ", "snow.\n"};
    fixture *fx = calloc(1, sizeof *fx);
    test_random r = {3};
    char *text = malloc(BYTES + 8);
    size_t n = 0;
    while (n < BYTES) {
        const char *word = words[test_random_below(&r, 8)];
        memcpy(text + n, word, strlen(word));
        n += strlen(word);
    }
    fx->dir = test_make_dir();
    fx->text = test_path(fx->dir, "text");
    fx->checkpoint = test_path(fx->dir, "checkpoint");
    fx->model = test_path(fx->dir, "model.gguf");
    test_write_file(fx->text, text, n);
    free(text);
    const char *path = fx->text;
    if (cairn_corpus_open(&path, 1, 0.1, &fx->corpus) != CAIRN_OK) return -1;
    *state = fx;
    return 0;
}
static int tear_down(void **state)
{
    fixture *fx = *state;
    cairn_corpus_close(fx->corpus);
    test_remove_dir(fx->dir);
    free(fx->text), free(fx->checkpoint), free(fx->model), free(fx);
    return 0;
}

static cairn_train_stage mixed_stage(void)
{
    cairn_train_stage s;
    cairn_train_stage_init(&s);
    s.steps = 6;
    s.window = 64;
    s.windows = 5;
    s.warmup = 2;
    s.dense = 0.3F;
    s.text = 0.1F;
    s.said = 0.4F;
    s.grass = 0.1F;
    s.numbers = 0.1F;
    s.guide = 0.5F;
    s.distractors = 2;
    return s;
}

static cairn_trainer_options small_model(uint32_t threads)
{
    cairn_trainer_options o;
    cairn_trainer_options_init(&o, sizeof o);
    o.threads = threads;
    o.width = 24;
    o.layers = 3;
    o.heads = o.kv_heads = 2;
    o.head_dim = 8;
    o.hidden = 32;
    o.block_tokens = 15;
    o.guided_layer = 1;
    o.guided_heads = 1;
    o.remembered = 20;
    o.kept_blocks = 6;
    return o;
}

static cairn_trainer *trainer(const fixture *fx, const cairn_trainer_options *o, const cairn_train_stage *stages,
                              size_t n)
{
    cairn_trainer *t = NULL;
    assert_ok(cairn_trainer_new(o, NULL, fx->corpus, stages, n, &t));
    return t;
}

static void run_steps(cairn_trainer *t, int n)
{
    cairn_train_report report;
    for (int i = 0; i < n; i++) assert_ok(cairn_trainer_step(t, &report));
}

/* ---- lessons ---- */

static bool comes_before(const char *text, size_t at, const char *what)
{
    return at >= strlen(what) && memcmp(text + at - strlen(what), what, strlen(what)) == 0;
}

/* Blocks that have a digit of a plain key, found by reading: each of its sentences has one of two texts before it. */
static size_t check_plain_blocks(const cairn_lesson *lesson, const cairn_lesson_window *w, size_t C)
{
    const char *text = (const char *)lesson->bytes;
    uint8_t want[512] = {0};
    size_t n = 0;
    for (size_t i = 0; i + 5 <= lesson->n; i++) {
        if (!comes_before(text, i, "The pass key is ") && !comes_before(text, i, ". Remember it. ")) continue;
        for (size_t d = 0; d < 5; d++) want[(i + d + 1) / C] = 1; /* BOS comes before the text */
    }
    for (size_t b = 0; b < w->rows / (C + 1); b++) {
        assert_int_equal(w->plain_blocks[b], want[b]);
        n += want[b];
    }
    return n;
}

/* Guided rows of a window of bytes with BOS: whose turn it is follows from what else has digits in the block. Returns
 * how many have to share it. */
static size_t check_turns(const cairn_lesson *l, const cairn_lesson_window *w, size_t C)
{
    size_t shared = 0;
    for (size_t g = 0; g < w->n_guided; g++) {
        const cairn_train_guided *row = &w->guided[g];
        const size_t slot = row->slots[0], block = slot / (C + 1);
        size_t before = 0, after = 0; /* digits of the block that are not of the same number */
        for (size_t m = 0; m < l->n_mentions; m++) {
            const size_t begin = 1 + l->mentions[m].at, end = begin + CAIRN_RECALL_DIGITS;
            const size_t at = slot - block; /* content: a landmark stands before each block but the first */
            for (size_t t = begin; t < end && !(at >= begin && at < end); t++)
                if (t / C == block) *(t < at ? &before : &after) += 1;
        }
        const cairn_train_turn want = row->n > 1 || block == row->row / (C + 1) ? CAIRN_TRAIN_ANY
                                      : before > 0                              ? CAIRN_TRAIN_LATER
                                      : after > 0                               ? CAIRN_TRAIN_FIRST
                                                                                : CAIRN_TRAIN_ANY;
        assert_int_equal(row->turn, want);
        shared += want != CAIRN_TRAIN_ANY;
    }
    return shared;
}

static void answers_are_what_the_text_said_and_guided_rows_point_at_it(void **state)
{
    fixture *fx = *state;
    enum { BYTES = 480, C = 15 };
    cairn_lesson lesson;
    cairn_lesson_window w;
    size_t answers = 0, guided = 0, plain = 0, shared = 0;
    assert_ok(cairn_lesson_init(&lesson, 512));
    const cairn_lesson_vocab vocab = {NULL, 1, 259};
    assert_ok(cairn_lesson_window_init(&w, 512, 512));
    for (uint64_t seed = 0; seed < 300; seed++) {
        cairn_train_stage stage = mixed_stage();
        stage.facts = 6;
        stage.questions = 5;
        cairn_random r = cairn_random_of("test", seed, 0, 0);
        assert_ok(cairn_lesson_make(&lesson, fx->corpus, &stage, &r, BYTES, 0));
        assert_int_equal(lesson.n, BYTES);
        for (size_t i = 0; i < BYTES; i++) assert_in_range(lesson.bytes[i], 9, 126);
        for (size_t i = 0; i + 1 < BYTES; i++) { /* every whole answer */
            if (lesson.answers[i] == 0 || (i > 0 && lesson.answers[i - 1] == lesson.answers[i])) continue;
            const cairn_mention *mention = &lesson.mentions[lesson.answers[i] - 1];
            const bool named = lesson.secrets[mention->secret].name[0] != 0;
            assert_int_equal(mention->at, i);
            char fact[40];
            if (named) /* "ABCD is " stands before the digits, in every sentence */
                snprintf(fact, sizeof fact, "%.8s%.5s", lesson.bytes + i - 8, lesson.bytes + i);
            else
                snprintf(fact, sizeof fact, "The pass key is %.5s", lesson.bytes + i);
            const uint8_t *first = memmem(lesson.bytes, BYTES, fact, strlen(fact));
            assert_non_null(first);
            assert_true(first + strlen(fact) <= lesson.bytes + i);
            assert_true(lesson.weights[i] == 3 * stage.answer_weight);
            assert_true(lesson.weights[i + 4] == stage.answer_weight);
            answers++;
        }
        assert_ok(cairn_lesson_to_window(&lesson, &vocab, C, 512, &w));
        assert_int_equal(w.rows, 512);
        for (size_t row = 0, byte = 0; row < 512; row++) {
            if (row % (C + 1) == C) {
                assert_int_equal(w.slots[row], 259);
                assert_int_equal(w.targets[row], -1);
                continue;
            }
            assert_int_equal(w.slots[row], byte == 0 ? 1 : 3 + lesson.bytes[byte - 1]);
            assert_int_equal(w.targets[row], 3 + lesson.bytes[byte]);
            byte++;
        }
        for (size_t g = 0; g < w.n_guided; g++) {
            const cairn_train_guided *row = &w.guided[g];
            assert_true(g == 0 || w.guided[g - 1].row < row->row);
            assert_int_not_equal(w.answers[row->row], 0);
            for (uint32_t i = 0; i < row->n; i++) {
                assert_true(row->slots[i] <= row->row);
                assert_int_equal(w.slots[row->slots[i]], w.targets[row->row]);
            }
            guided++;
        }
        plain += check_plain_blocks(&lesson, &w, C);
        check_turns(&lesson, &w, C);
        assert_ok(cairn_lesson_to_window(&lesson, &vocab, 63, 512, &w));
        shared += check_turns(&lesson, &w, 63);
    }
    print_message("  %zu answers, %zu guided rows, %zu blocks with a plain key, %zu rows that share theirs\n", answers,
                  guided, plain, shared);
    assert_true(answers > 500 && guided > 1000 && plain > 100 && shared > 100);
    cairn_lesson_wipe(&lesson);
    cairn_lesson_window_wipe(&w);
}

/* Facts in 200 lessons of blocks of 63 bytes, and how many of them begin within a block so that it ends in their
 * digits, or so that their digits are among its first four bytes. */
static void count_cut(const fixture *fx, float cut, size_t *facts, size_t *of_them)
{
    enum { BYTES = 1008, C = 63 };
    cairn_lesson lesson;
    *facts = *of_them = 0;
    assert_ok(cairn_lesson_init(&lesson, BYTES));
    for (uint64_t seed = 0; seed < 200; seed++) {
        cairn_train_stage stage = mixed_stage();
        stage.dense = stage.text = stage.said = 0;
        stage.cut = cut;
        cairn_random r = cairn_random_of("test", seed, 0, 0);
        assert_ok(cairn_lesson_make(&lesson, fx->corpus, &stage, &r, BYTES, C));
        assert_int_equal(lesson.n, BYTES);
        for (size_t i = 0; i < lesson.n_mentions; i++) {
            const cairn_mention *m = &lesson.mentions[i];
            const size_t place = (m->at + 1) % C; /* BOS comes before the text */
            bool again = false;                   /* "12345 is the pass key." or a question */
            for (size_t j = 0; j < i; j++) again |= lesson.mentions[j].secret == m->secret;
            if (again) continue;
            ++*facts;
            *of_them += place < 4 || place > C - 5;
        }
    }
    cairn_lesson_wipe(&lesson);
}

static void blocks_end_in_the_digits_of_as_many_facts_as_a_stage_says(void **state)
{
    const fixture *fx = *state;
    size_t facts, by_chance, cut, all;
    count_cut(fx, 0, &facts, &by_chance);
    assert_in_range(100 * by_chance / facts, 8, 18); /* 8 of 63 places */
    count_cut(fx, 0.5F, &facts, &cut);
    assert_in_range(100 * cut / facts, 45, 65);
    count_cut(fx, 1, &facts, &all);
    print_message("  %zu, %zu, %zu of %zu facts\n", by_chance, cut, all, facts);
    assert_in_range(100 * all / facts, 75, 100); /* but where the one before has used up the gaps */
}

/* Names in 200 lessons, and those that an earlier one of their lesson becomes if two of its letters change places or
 * one becomes another. */
static void count_alike(const fixture *fx, float alike, size_t *names, size_t *like_another)
{
    enum { BYTES = 1008, N = CAIRN_RECALL_NAME };
    cairn_lesson lesson;
    *names = *like_another = 0;
    assert_ok(cairn_lesson_init(&lesson, BYTES));
    for (uint64_t seed = 0; seed < 200; seed++) {
        cairn_train_stage stage = mixed_stage();
        stage.dense = stage.text = 0;
        stage.facts = 12;
        stage.alike = alike;
        cairn_random r = cairn_random_of("test", seed, 0, 0);
        assert_ok(cairn_lesson_make(&lesson, fx->corpus, &stage, &r, BYTES, 63));
        size_t first = lesson.secrets[0].name[0] == 0 ? 1 : 0;
        for (size_t i = first + 1; i < lesson.n_secrets; i++) {
            const char *name = lesson.secrets[i].name;
            bool found = false;
            for (size_t j = first; j < i; j++) {
                const char *other = lesson.secrets[j].name;
                size_t differs[N], n = 0;
                for (size_t c = 0; c < N; c++)
                    if (name[c] != other[c]) differs[n++] = c;
                assert_true(n > 0); /* no name twice */
                found |= n == 1 ||
                         (n == 2 && name[differs[0]] == other[differs[1]] && name[differs[1]] == other[differs[0]]);
            }
            ++*names;
            *like_another += found;
        }
    }
    cairn_lesson_wipe(&lesson);
}

static void as_many_names_are_like_another_of_their_window_as_a_stage_says(void **state)
{
    const fixture *fx = *state;
    size_t names, by_chance, half, all;
    count_alike(fx, 0, &names, &by_chance);
    assert_in_range(100 * by_chance / names, 0, 2);
    count_alike(fx, 0.5F, &names, &half);
    assert_in_range(100 * half / names, 42, 58);
    count_alike(fx, 1, &names, &all);
    print_message("  %zu, %zu, %zu of %zu names\n", by_chance, half, all, names);
    assert_in_range(100 * all / names, 97, 100); /* but where every try gave one that was there */
}

/* ---- runs ---- */

static void a_resumed_run_is_the_undisturbed_one_bit_for_bit(void **state)
{
    fixture *fx = *state;
    cairn_train_stage stages[2] = {mixed_stage(), mixed_stage()};
    stages[1].window = 80;
    stages[1].steps = 4;
    const cairn_trainer_options o = small_model(2);
    cairn_trainer *whole = trainer(fx, &o, stages, 2), *first = trainer(fx, &o, stages, 2);
    cairn_trainer *second = trainer(fx, &o, stages, 2);
    run_steps(whole, 10);
    run_steps(first, 7);
    assert_ok(cairn_trainer_save(first, fx->checkpoint));
    assert_ok(cairn_trainer_load(second, fx->checkpoint, false));
    run_steps(second, 3);
    assert_memory_equal(whole->params, second->params, whole->layout->total * sizeof(float));
    cairn_train_report report;
    assert_int_equal(cairn_trainer_step(second, &report), CAIRN_NOT_FOUND);
    assert_int_equal(report.step, 10);
    assert_ok(cairn_trainer_export(whole, "small", CAIRN_GGUF_F16, fx->model));
    cairn_model *model = NULL;
    assert_ok(cairn_model_open(fx->model, &model));
    assert_int_equal(cairn_model_shape(model)->block_tokens, 15);
    cairn_model_close(model);

    /* what is remembered is part of the state: a run that forgot it goes elsewhere */
    cairn_trainer *forgot = trainer(fx, &o, stages, 2);
    assert_ok(cairn_trainer_load(forgot, fx->checkpoint, false));
    size_t *counters, n_counters, n_keys;
    float *keys;
    cairn_train_attention_memory_f32(cairn_train_model_attention_f32(forgot->lanes[0].model), &counters, &n_counters,
                                     &keys, &n_keys);
    assert_true(n_counters == 6 && n_keys == (size_t)6 * (20 + 6 * 31) * 8);
    memset(counters, 0, n_counters * sizeof *counters);
    run_steps(forgot, 3);
    assert_memory_not_equal(whole->params, forgot->params, whole->layout->total * sizeof(float));
    cairn_trainer_free(whole), cairn_trainer_free(first), cairn_trainer_free(second), cairn_trainer_free(forgot);
}

/* A model that reads bytes is taught the same lessons, whether it begins anew or goes on. */
static void a_model_that_goes_on_is_taught_as_much_in_a_window(void **state)
{
    fixture *fx = *state;
    cairn_train_stage stage = mixed_stage();
    const cairn_trainer_options o = small_model(2);
    stage.window = 512; /* facts and questions all over it */
    stage.dense = stage.text = 0;
    cairn_trainer *anew = trainer(fx, &o, &stage, 1), *on = NULL;
    cairn_train_report a, b;
    cairn_model *model = NULL;
    assert_ok(cairn_trainer_export(anew, "small", CAIRN_GGUF_F32, fx->model));
    assert_ok(cairn_model_open(fx->model, &model));
    assert_ok(cairn_trainer_new(&o, model, fx->corpus, &stage, 1, &on));
    for (int i = 0; i < 5; i++) {
        assert_ok(cairn_trainer_step(anew, &a));
        assert_ok(cairn_trainer_step(on, &b));
        assert_int_equal(a.tokens, b.tokens);
        assert_int_equal(a.digits, b.digits);
        assert_int_equal(a.guided, b.guided);
        assert_int_equal(a.named + a.plain, b.named + b.plain);
    }
    cairn_trainer_free(anew), cairn_trainer_free(on);
    cairn_model_close(model);
}

static void a_small_model_learns_its_text_whatever_the_threads(void **state)
{
    fixture *fx = *state;
    cairn_train_stage stage = mixed_stage();
    stage.steps = 60;
    stage.text = 1;
    stage.dense = 0;
    for (uint32_t threads = 1; threads <= 3; threads++) {
        const cairn_trainer_options o = small_model(threads);
        cairn_trainer *t = trainer(fx, &o, &stage, 1);
        cairn_train_report one, last = {0};
        assert_ok(cairn_trainer_step(t, &one));
        const double before = one.text_nats / (double)one.text_tokens;
        assert_in_range(before * 100, 450, 700); /* ln 260 is 5.56 */
        for (int i = 1; i < 60; i++) {
            assert_ok(cairn_trainer_step(t, &one));
            if (i >= 50) cairn_train_report_add(&last, &one);
        }
        assert_int_equal(last.tokens, 10 * 5 * 60);
        const double after = last.text_nats / (double)last.text_tokens;
        print_message("  %u threads: %.2f nats, then %.2f\n", threads, before, after);
        assert_true(after < 2.0); /* eight words, equally likely: about 0.45 nats a byte at best */
        cairn_trainer_free(t);
    }
}

/* The witness is the same run in f32: the first update's loss and gradient, from the same parameters, and what 60 of
 * them make of both. */
static void products_in_bf16_train_as_those_in_f32_do(void **state)
{
    fixture *fx = *state;
    cairn_train_stage stage = mixed_stage();
    stage.steps = 60;
    cairn_trainer_options o = small_model(2);
    double first[2], norm[2], last[2] = {0, 0};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        cairn_trainer *t = NULL;
        o.products = bf16 ? CAIRN_TRAIN_BF16 : CAIRN_TRAIN_F32;
        if (bf16 && cairn_kernels_bf16() == NULL) {
            assert_int_equal(cairn_trainer_new(&o, NULL, fx->corpus, &stage, 1, &t), CAIRN_UNSUPPORTED);
            assert_non_null(strstr(cairn_last_error(), "AMX"));
            o.products = CAIRN_TRAIN_AUTO;
            t = trainer(fx, &o, &stage, 1);
            assert_int_equal(cairn_trainer_products(t), CAIRN_TRAIN_F32);
            cairn_trainer_free(t);
            print_message("no AMX here\n");
            skip();
        }
        t = trainer(fx, &o, &stage, 1);
        assert_int_equal(cairn_trainer_products(t), o.products);
        cairn_train_report one;
        assert_ok(cairn_trainer_step(t, &one));
        first[bf16] = one.text_nats / (double)one.text_tokens;
        norm[bf16] = one.norm;
        for (int i = 1; i < 60; i++) {
            assert_ok(cairn_trainer_step(t, &one));
            if (i >= 50) last[bf16] += one.text_nats / (double)one.text_tokens / 10;
        }
        cairn_trainer_free(t);
    }
    print_message("  f32, bf16: loss %.5f, %.5f nats, gradient %.4f, %.4f; later %.2f, %.2f nats\n", first[0], first[1],
                  norm[0], norm[1], last[0], last[1]);
    assert_true(first[0] != first[1]); /* they are others */
    assert_true(fabs(first[1] - first[0]) < 0.002 * first[0]);
    assert_true(fabs(norm[1] - norm[0]) < 0.02 * norm[0]);
    assert_true(fabs(last[1] - last[0]) < 0.1 * last[0]);
}

static void a_loss_that_is_not_finite_stops_at_its_step_and_changes_nothing(void **state)
{
    fixture *fx = *state;
    const cairn_train_stage stage = mixed_stage();
    const cairn_trainer_options o = small_model(2);
    cairn_trainer *t = trainer(fx, &o, &stage, 1);
    run_steps(t, 2);
    float *before = malloc(t->layout->total * sizeof *before);
    t->params[t->layout->output_norm] = NAN;
    memcpy(before, t->params, t->layout->total * sizeof *before);
    cairn_train_report report;
    assert_int_equal(cairn_trainer_step(t, &report), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "step 2"));
    assert_memory_equal(before, t->params, t->layout->total * sizeof *before);
    free(before);
    cairn_trainer_free(t);
}

/* ---- what is refused ---- */

static void checkpoints_of_other_runs_and_damaged_ones_are_refused_by_name(void **state)
{
    fixture *fx = *state;
    cairn_train_stage stage = mixed_stage();
    cairn_trainer_options o = small_model(2);
    cairn_trainer *t = trainer(fx, &o, &stage, 1);
    run_steps(t, 1);
    assert_ok(cairn_trainer_save(t, fx->checkpoint));
    cairn_trainer_free(t);

    cairn_trainer_options others[5] = {o, o, o, o, o};
    others[0].hidden += 8;
    others[1].threads = 1;
    others[2].seed = 99;
    others[3].remembered = 21;
    others[4].guided_heads = 2;
    const char *const words[5] = {"shape", "2 threads", "seed 1", "remembers", "guided"};
    for (int i = 0; i < 5; i++) {
        t = trainer(fx, &others[i], &stage, 1);
        assert_int_equal(cairn_trainer_load(t, fx->checkpoint, false), CAIRN_MISMATCH);
        assert_non_null(strstr(cairn_last_error(), words[i]));
        cairn_trainer_free(t);
    }
    stage.guide = 0.25F;
    t = trainer(fx, &o, &stage, 1);
    assert_int_equal(cairn_trainer_load(t, fx->checkpoint, false), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "stages"));
    assert_ok(cairn_trainer_load(t, fx->checkpoint, true));

    size_t bytes;
    uint8_t *file = test_read_file(fx->checkpoint, &bytes);
    assert_non_null(file);
    for (size_t at = 0; at < bytes; at += bytes / 50) { /* any byte */
        file[at] ^= 0x10;
        test_write_file(fx->checkpoint, file, bytes);
        cairn_status st = cairn_trainer_load(t, fx->checkpoint, true);
        assert_true(st == CAIRN_CORRUPT || (at < 8 && st == CAIRN_INVALID) || (at < 12 && st == CAIRN_UNSUPPORTED));
        file[at] ^= 0x10;
    }
    for (size_t n = 0; n < bytes; n += 1 + bytes / 40) { /* any length */
        test_write_file(fx->checkpoint, file, n);
        cairn_status st = cairn_trainer_load(t, fx->checkpoint, true);
        assert_true(st == CAIRN_CORRUPT || st == CAIRN_INVALID);
    }
    free(file);
    unlink(fx->checkpoint);
    assert_int_equal(cairn_trainer_load(t, fx->checkpoint, true), CAIRN_NOT_FOUND);
    cairn_trainer_free(t);
}

static void a_disk_that_is_full_leaves_the_old_checkpoint(void **state)
{
    fixture *fx = *state;
    const cairn_train_stage stage = mixed_stage();
    const cairn_trainer_options o = small_model(1);
    cairn_trainer *t = trainer(fx, &o, &stage, 1), *again = trainer(fx, &o, &stage, 1);
    run_steps(t, 1);
    assert_ok(cairn_trainer_save(t, fx->checkpoint));
    run_steps(t, 1);
    struct rlimit was, tight = {.rlim_cur = 20000};
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    tight.rlim_max = was.rlim_max;
    signal(SIGXFSZ, SIG_IGN); /* writes beyond the limit fail then, as on a full disk */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
    cairn_status st = cairn_trainer_save(t, fx->checkpoint);
    cairn_status st_model = cairn_trainer_export(t, "small", CAIRN_GGUF_F16, fx->model);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_int_equal(st, CAIRN_IO);
    assert_int_equal(st_model, CAIRN_IO);
    assert_non_null(strstr(cairn_last_error(), "model.gguf"));
    assert_ok(cairn_trainer_load(again, fx->checkpoint, false));
    assert_int_equal(again->step, 1);
    assert_int_equal(access(fx->model, F_OK), -1);
    cairn_trainer_free(t), cairn_trainer_free(again);
}

static void stages_that_cannot_be_are_refused_by_the_field(void **state)
{
    fixture *fx = *state;
    const cairn_trainer_options o = small_model(1);
    const cairn_train_stage good = mixed_stage();
    cairn_train_stage bad[8] = {good, good, good, good, good, good, good, good};
    bad[0].window = 65;
    bad[1].window = 4 << 20;
    bad[2].dense = 1.5F;
    bad[3].text = 0.9F;
    bad[4].steps = 0;
    bad[5].facts = 0;
    bad[6].adam = NAN;
    bad[7].window = 1 << 20; /* of 1.9 million bytes */
    const char *const words[8] = {"65 slots", "window", "dense", "together", "steps", "facts", "adam", NULL};
    for (int i = 0; i < 7; i++) {
        cairn_trainer *t = NULL;
        assert_int_equal(cairn_trainer_new(&o, NULL, fx->corpus, &bad[i], 1, &t), CAIRN_INVALID);
        assert_non_null(strstr(cairn_last_error(), words[i]));
        assert_null(t);
    }
    const uint32_t apart[2] = {2, 1}; /* no number for it; one guided head has nobody to be apart from */
    const char *const apart_words[2] = {"guided_apart is 2", "1 guided heads"};
    for (int i = 0; i < 2; i++) {
        cairn_trainer_options other = o;
        cairn_trainer *t = NULL;
        other.guided_apart = apart[i];
        assert_int_equal(cairn_trainer_new(&other, NULL, fx->corpus, &good, 1, &t), CAIRN_INVALID);
        assert_non_null(strstr(cairn_last_error(), apart_words[i]));
    }
    char *tiny = test_path(fx->dir, "tiny");
    test_write_file(tiny, "too short", 9);
    const char *path = tiny;
    cairn_corpus *corpus = NULL;
    cairn_trainer *t = NULL;
    assert_ok(cairn_corpus_open(&path, 1, 0, &corpus));
    assert_int_equal(cairn_trainer_new(&o, NULL, corpus, &good, 1, &t), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "9 bytes"));
    assert_int_equal(cairn_trainer_new(&o, NULL, fx->corpus, NULL, 0, &t), CAIRN_INVALID);
    cairn_corpus_close(corpus);
    free(tiny);
}

static void failing_allocations_leave_nothing(void **state)
{
    fixture *fx = *state;
    const cairn_train_stage stage = mixed_stage();
    const cairn_trainer_options o = small_model(1);
    for (uint64_t n = 1;; n++) {
        cairn_trainer *t = NULL;
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_trainer_new(&o, NULL, fx->corpus, &stage, 1, &t);
        cairn_alloc_fail_at(0);
        cairn_trainer_free(t);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
    }
}

#define with_fixture(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        with_fixture(answers_are_what_the_text_said_and_guided_rows_point_at_it),
        with_fixture(blocks_end_in_the_digits_of_as_many_facts_as_a_stage_says),
        with_fixture(as_many_names_are_like_another_of_their_window_as_a_stage_says),
        with_fixture(a_resumed_run_is_the_undisturbed_one_bit_for_bit),
        with_fixture(a_small_model_learns_its_text_whatever_the_threads),
        with_fixture(products_in_bf16_train_as_those_in_f32_do),
        with_fixture(a_model_that_goes_on_is_taught_as_much_in_a_window),
        with_fixture(a_loss_that_is_not_finite_stops_at_its_step_and_changes_nothing),
        with_fixture(checkpoints_of_other_runs_and_damaged_ones_are_refused_by_name),
        with_fixture(a_disk_that_is_full_leaves_the_old_checkpoint),
        with_fixture(stages_that_cannot_be_are_refused_by_the_field),
        with_fixture(failing_allocations_leave_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
