/* trainer.c - updates, one after the other: lessons made, windows run by lanes, gradients summed, parameters moved.
 *
 * Every window's lesson follows from (seed, step, number in the step) alone; a lane runs windows i, i + lanes, ... and
 * lanes are summed in order. So a run depends on the seed and the number of lanes, never on timing, and its state
 * between two updates is the parameters, the moments and the lanes' remembered keys. */
#include "trainer_internal.h"

#include <math.h>
#include <stdio.h>

enum { WINDOW_MAX = 1 << 20, WINDOWS_MAX = 1 << 16, CHUNK = 1 << 14 };
enum { BYTES_PER_TOKEN = 16, SAMPLE = 64 << 10 }; /* at most; bytes of text by which they are counted */

void cairn_trainer_options_init(cairn_trainer_options *opt, size_t struct_size)
{
    const cairn_trainer_options all = {.struct_size = struct_size,
                                       .seed = 1,
                                       .width = 192,
                                       .layers = 4,
                                       .heads = 6,
                                       .kv_heads = 6,
                                       .head_dim = 32,
                                       .hidden = 512,
                                       .block_tokens = 63,
                                       .clamp_blocks = 3,
                                       .window_blocks = 1,
                                       .top_k = 4,
                                       .local_layers = 1,
                                       .local_window_blocks = 1,
                                       .guided_layer = 2,
                                       .guided_heads = 3,
                                       .remembered = 512,
                                       .rope_theta = 10000};
    memcpy(opt, &all, struct_size < sizeof all ? struct_size : sizeof all);
}

/* ---- what can be trained ---- */

static cairn_status check_share(const cairn_train_stage *s, const char *what, float value)
{
    if (value >= 0 && value <= 1) return CAIRN_OK;
    return cairn_fail(CAIRN_INVALID, "stage '%s': %s is %g, must be 0..1", s->name, what, (double)value);
}

static cairn_status check_count(const cairn_train_stage *s, const char *what, uint64_t value, uint64_t least,
                                uint64_t most)
{
    if (value >= least && value <= most) return CAIRN_OK;
    return cairn_fail(CAIRN_INVALID, "stage '%s': %s is %llu, must be %llu..%llu", s->name, what,
                      (unsigned long long)value, (unsigned long long)least, (unsigned long long)most);
}

static cairn_status check_rate(const cairn_train_stage *s, const char *what, float value, float most)
{
    if (value >= 0 && value <= most) return CAIRN_OK;
    return cairn_fail(CAIRN_INVALID, "stage '%s': %s is %g, must be 0..%g", s->name, what, (double)value, (double)most);
}

/* Slots that a window is whole numbers of: its blocks, or the segments of XL. */
static uint32_t unit_of(const cairn_trainer *t)
{
    return t->opt.attention == CAIRN_TRAIN_LANDMARK ? t->opt.block_tokens + 1
           : t->opt.attention == CAIRN_TRAIN_XL     ? t->opt.segment
                                                    : 1;
}

/* Content tokens of a block; 0 = no landmarks stand between blocks. */
static uint32_t block_tokens_of(const cairn_trainer *t)
{
    return t->opt.attention == CAIRN_TRAIN_LANDMARK ? t->opt.block_tokens : 0;
}

static cairn_status check_stage(const cairn_train_stage *s, uint32_t unit, const cairn_corpus *corpus)
{
    const struct {
        const char *what;
        float value;
    } shares[] = {{"dense", s->dense},
                  {"text", s->text},
                  {"dense and text together", s->dense + s->text},
                  {"plain", s->plain},
                  {"said", s->said},
                  {"interleaved", s->interleaved},
                  {"short_form", s->short_form},
                  {"grass", s->grass},
                  {"numbers", s->numbers},
                  {"cut", s->cut},
                  {"alike", s->alike},
                  {"floor", s->floor}};
    cairn_status st = check_count(s, "steps", s->steps, 1, UINT32_MAX);
    if (st == CAIRN_OK) st = check_count(s, "window", s->window, 2 * (uint64_t)unit, WINDOW_MAX);
    if (st == CAIRN_OK) st = check_count(s, "windows", s->windows, 1, WINDOWS_MAX);
    if (st == CAIRN_OK) st = check_count(s, "facts", s->facts, 1, 1000);
    if (st == CAIRN_OK) st = check_count(s, "questions", s->questions, 1, 1000);
    if (st == CAIRN_OK) st = check_rate(s, "adam", s->adam, 10);
    if (st == CAIRN_OK) st = check_rate(s, "muon", s->muon, 10);
    if (st == CAIRN_OK) st = check_rate(s, "text_weight", s->text_weight, 1e6F);
    if (st == CAIRN_OK) st = check_rate(s, "answer_weight", s->answer_weight, 1e6F);
    if (st == CAIRN_OK) st = check_rate(s, "guide", s->guide, 1e6F);
    if (st == CAIRN_OK) st = check_count(s, "distractors", s->distractors, 0, CAIRN_TRAIN_DISTRACTORS_MAX);
    for (size_t i = 0; i < sizeof shares / sizeof *shares && st == CAIRN_OK; i++)
        st = check_share(s, shares[i].what, shares[i].value);
    if (st != CAIRN_OK) return st;
    if (s->window % unit != 0)
        return cairn_fail(CAIRN_INVALID, "stage '%s': a window of %u slots is no whole number of blocks of %u", s->name,
                          s->window, unit);
    const uint64_t text = cairn_corpus_bytes(corpus, CAIRN_SPLIT_TRAIN);
    if (text < s->window)
        return cairn_fail(CAIRN_INVALID, "the corpus has %llu bytes to train on, stage '%s' has windows of %u",
                          (unsigned long long)text, s->name, s->window);
    return CAIRN_OK;
}

static cairn_train_shape shape_of(cairn_trainer *t)
{
    const cairn_trainer_options *o = &t->opt;
    cairn_train_shape s = {
        .vocab = CAIRN_TRAIN_BYTE_VOCAB, .width = o->width, .hidden = o->hidden, .norm_eps = 1e-5F, .qk_norm = true};
    s.mode = o->attention;
    s.segment = o->segment;
    cairn_attention_shape_init(&s.attention, sizeof s.attention);
    s.attention.scheme = o->attention == CAIRN_TRAIN_LANDMARK ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_DENSE;
    s.attention.layers = o->layers;
    s.attention.heads = o->heads;
    s.attention.kv_heads = o->kv_heads;
    s.attention.head_dim = o->head_dim;
    s.attention.rope_theta = o->rope_theta;
    s.attention.block_tokens = o->block_tokens;
    s.attention.clamp_blocks = o->clamp_blocks;
    s.attention.window_blocks = o->window_blocks;
    s.attention.local_window_blocks = o->local_window_blocks;
    s.attention.top_k = o->top_k;
    s.attention.local_layers = t->local_layers;
    return s;
}

/* A new model of the options' shape. */
static cairn_status begin_anew(cairn_trainer *t)
{
    if (t->opt.layers == 0 || t->opt.layers > 1024)
        return cairn_fail(CAIRN_INVALID, "a model of %u layers, must be 1..1024", t->opt.layers);
    t->local_layers = cairn_calloc(t->opt.layers, 1);
    if (t->local_layers == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a model of %u layers", t->opt.layers);
    for (uint32_t l = 0; l < t->opt.layers && l < t->opt.local_layers; l++) t->local_layers[l] = 1;
    const cairn_train_shape shape = shape_of(t);
    t->vocab = (cairn_lesson_vocab){NULL, 1, CAIRN_TRAIN_BYTE_VOCAB - 1};
    return cairn_train_layout_new(&shape, &t->layout);
}

/* The shape of `source`; the options become what it has. Landmarks are the options', if it has none of its own. */
static cairn_status begin_from(cairn_trainer *t, const cairn_model *source)
{
    cairn_trainer_options *o = &t->opt;
    cairn_model_info info;
    cairn_model_info_get(source, &info);
    uint32_t *local = cairn_alloc_array(info.layers, sizeof *local);
    if (local == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a model of %u layers", info.layers);
    if (o->attention != CAIRN_TRAIN_LANDMARK) {
        cairn_free(local);
        return cairn_fail(CAIRN_UNSUPPORTED,
                          "training '%s' on without landmarks: a model is trained on with landmarks alone", info.name);
    }
    for (uint32_t l = 0; l < info.layers; l++) local[l] = l;
    const cairn_train_landmarks landmarks = {.block_tokens = o->block_tokens,
                                             .clamp_blocks = o->clamp_blocks,
                                             .window_blocks = o->window_blocks,
                                             .local_window_blocks = o->local_window_blocks,
                                             .top_k = o->top_k,
                                             .local_layers = local,
                                             .n_local = o->local_layers < info.layers ? o->local_layers : info.layers};
    cairn_status st = cairn_train_adapt_layout(source, info.landmark < 0 ? &landmarks : NULL, &t->layout);
    cairn_free(local);
    if (st != CAIRN_OK) return st;
    const cairn_train_shape *s = &t->layout->shape;
    o->width = s->width;
    o->layers = s->attention.layers;
    o->heads = s->attention.heads;
    o->kv_heads = s->attention.kv_heads;
    o->head_dim = s->attention.head_dim;
    o->rope_theta = s->attention.rope_theta;
    o->hidden = s->hidden;
    o->block_tokens = s->attention.block_tokens;
    o->clamp_blocks = s->attention.clamp_blocks;
    o->window_blocks = s->attention.window_blocks;
    o->local_window_blocks = s->attention.local_window_blocks;
    o->top_k = s->attention.top_k;
    t->source = source;
    t->vocab =
        (cairn_lesson_vocab){source, info.add_bos ? info.bos : -1, cairn_train_adapt_landmark(t->layout, source)};
    return CAIRN_OK;
}

/* ---- how long a lesson is ---- */

/* A lesson that is cut off loses its last questions, one that is short wastes a window: as many bytes as the corpus has
 * for so many tokens. Facts have more tokens to a byte than other text. */
static cairn_status count_bytes(cairn_trainer *t)
{
    const cairn_model *model = t->vocab.model;
    cairn_train_tokens tokens = {0};
    cairn_model_info info;
    t->bytes_per_token = 1;
    if (model == NULL) return CAIRN_OK;
    cairn_model_info_get(model, &info);
    if (info.byte_tokens) return CAIRN_OK;
    const uint64_t all = cairn_corpus_bytes(t->corpus, CAIRN_SPLIT_TRAIN);
    const size_t n = all < SAMPLE ? (size_t)all : SAMPLE;
    uint8_t *text = cairn_alloc(n);
    if (text == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu bytes of text", n);
    cairn_status st = cairn_corpus_read(t->corpus, CAIRN_SPLIT_TRAIN, 0, n, text);
    if (st == CAIRN_OK) st = cairn_train_tokenize(model, &(cairn_train_document){.text = text, .bytes = n}, &tokens);
    if (st == CAIRN_OK && tokens.n > 0) t->bytes_per_token = (double)n / (double)tokens.n;
    if (t->bytes_per_token > BYTES_PER_TOKEN) t->bytes_per_token = BYTES_PER_TOKEN;
    cairn_train_tokens_wipe(&tokens);
    cairn_free(text);
    return st;
}

static size_t lesson_bytes(const cairn_trainer *t, size_t tokens)
{
    return (size_t)((double)tokens * t->bytes_per_token);
}

/* ---- life ---- */

static void lane_wipe(cairn_lane *lane)
{
    cairn_train_model_free_f32(lane->model);
    cairn_lesson_wipe(&lane->lesson);
    cairn_lesson_window_wipe(&lane->window);
    cairn_free(lane->grads);
    cairn_free(lane->nll);
    cairn_free(lane->right);
}

static cairn_status lane_init(cairn_lane *lane, const cairn_trainer *t)
{
    const uint32_t rows = t->window_max;
    bool guides = false;
    const size_t bytes = lesson_bytes(t, rows);
    cairn_status st = cairn_train_model_new_f32(t->layout, rows, &lane->model);
    if (st == CAIRN_OK) cairn_train_model_use_f32(lane->model, t->kernels);
    if (st == CAIRN_OK) st = cairn_lesson_init(&lane->lesson, bytes);
    if (st == CAIRN_OK) st = cairn_lesson_window_init(&lane->window, rows, bytes);
    if (st != CAIRN_OK) return st;
    lane->grads = cairn_calloc(t->layout->total, sizeof *lane->grads);
    lane->nll = cairn_alloc_array(rows, sizeof *lane->nll);
    lane->right = cairn_alloc(rows);
    if (lane->grads == NULL || lane->nll == NULL || lane->right == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "gradients of %zu parameters", t->layout->total);
    for (size_t i = 0; i < t->n_stages; i++) guides |= t->stages[i].guide > 0;
    if (!guides || t->opt.remembered + t->opt.kept_blocks == 0 || t->opt.attention != CAIRN_TRAIN_LANDMARK)
        return CAIRN_OK;
    return cairn_train_attention_remember_f32(cairn_train_model_attention_f32(lane->model), t->opt.layers,
                                              t->opt.remembered, t->opt.kept_blocks);
}

void cairn_trainer_free(cairn_trainer *t)
{
    if (t == NULL) return;
    for (size_t i = 0; t->lanes != NULL && i < t->n_lanes; i++) lane_wipe(&t->lanes[i]);
    cairn_free(t->lanes);
    cairn_train_optimizer_wipe(&t->optimizer);
    cairn_train_layout_free(t->layout);
    cairn_pool_free(t->pool);
    cairn_free(t->params);
    cairn_free(t->local_layers);
    cairn_free(t->stages);
    cairn_free(t);
}

/* The kernels that make such products; the option becomes F32 or BF16. */
static cairn_status choose_products(cairn_trainer *t)
{
    const cairn_kernels *bf16 = cairn_kernels_bf16();
    if (t->opt.products == CAIRN_TRAIN_AUTO) t->opt.products = bf16 != NULL ? CAIRN_TRAIN_BF16 : CAIRN_TRAIN_F32;
    t->kernels = t->opt.products == CAIRN_TRAIN_BF16 ? bf16 : cairn_kernels_best();
    if (t->kernels != NULL) return CAIRN_OK;
    return cairn_fail(CAIRN_UNSUPPORTED, "products in bf16: this processor, system or build has no AMX");
}

static cairn_status check_guidance(const cairn_trainer_options *o)
{
    const uint32_t heads = o->guided_heads < o->heads ? o->guided_heads : o->heads;
    if (o->guided_apart > 1)
        return cairn_fail(CAIRN_INVALID, "guided_apart is %u, must be 0 or 1", (unsigned)o->guided_apart);
    if (o->guided_apart == 1 && heads < 2)
        return cairn_fail(CAIRN_INVALID, "guided_apart with %u guided heads, must be two at least", (unsigned)heads);
    return CAIRN_OK;
}

static cairn_status trainer_init(cairn_trainer *t, const cairn_model *source, const cairn_train_stage *stages, size_t n)
{
    if (n == 0) return cairn_fail(CAIRN_INVALID, "no stage to train");
    cairn_status st = choose_products(t);
    if (st == CAIRN_OK) st = source == NULL ? begin_anew(t) : begin_from(t, source);
    if (st == CAIRN_OK) st = check_guidance(&t->opt);
    if (st == CAIRN_OK) st = count_bytes(t);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        st = check_stage(&stages[i], unit_of(t), t->corpus);
        t->steps += stages[i].steps;
        if (stages[i].window > t->window_max) t->window_max = stages[i].window;
    }
    if (st != CAIRN_OK) return st;
    t->stages = cairn_alloc_array(n, sizeof *t->stages);
    if (t->stages == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu stages", n);
    memcpy(t->stages, stages, n * sizeof *stages);
    t->n_stages = n;

    if ((st = cairn_pool_new(t->opt.threads, &t->pool)) != CAIRN_OK) return st;
    if ((st = cairn_train_optimizer_init(&t->optimizer, t->layout, t->pool)) != CAIRN_OK) return st;
    t->optimizer.kernels = t->kernels;
    t->params = cairn_alloc_array(t->layout->total, sizeof *t->params);
    if (t->params == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu parameters", t->layout->total);
    if (source == NULL)
        cairn_train_init(t->layout, t->opt.seed, t->params);
    else if ((st = cairn_train_adapt(t->layout, source, t->params)) != CAIRN_OK)
        return st;
    cairn_train_rates_init(&t->rates);
    t->n_lanes = cairn_pool_size(t->pool);
    t->lanes = cairn_calloc(t->n_lanes, sizeof *t->lanes);
    if (t->lanes == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu workers", t->n_lanes);
    for (size_t i = 0; i < t->n_lanes && st == CAIRN_OK; i++) st = lane_init(&t->lanes[i], t);
    return st;
}

cairn_status cairn_trainer_new(const cairn_trainer_options *opt, const cairn_model *source, const cairn_corpus *corpus,
                               const cairn_train_stage *stages, size_t n, cairn_trainer **out)
{
    cairn_trainer *t = cairn_calloc(1, sizeof *t);
    *out = NULL;
    if (t == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a trainer");
    cairn_trainer_options_init(&t->opt, sizeof t->opt);
    memcpy(&t->opt, opt, opt->struct_size < sizeof t->opt ? opt->struct_size : sizeof t->opt);
    t->opt.struct_size = sizeof t->opt;
    t->corpus = corpus;
    cairn_status st = trainer_init(t, source, stages, n);
    if (st != CAIRN_OK) {
        cairn_trainer_free(t);
        return st;
    }
    *out = t;
    return CAIRN_OK;
}

/* ---- one update ---- */

typedef struct job {
    cairn_trainer *trainer;
    const cairn_train_stage *stage;
    double scale;
} job;

static cairn_random random_of(const cairn_trainer *t, size_t window)
{
    return cairn_random_of("training", t->opt.seed, t->step, window);
}

/* Text, digits and answers of the window just run. */
static void count_rows(cairn_lane *lane)
{
    const cairn_lesson_window *w = &lane->window;
    cairn_train_report *r = &lane->report;
    uint32_t answer = 0;
    bool right = true;
    for (size_t i = 0; i <= w->rows; i++) {
        if (i < w->rows && w->targets[i] < 0) continue;
        const uint32_t next = i < w->rows ? w->answers[i] : 0;
        if (answer != 0 && next != answer) { /* it ends here */
            const bool plain = lane->lesson.secrets[lane->lesson.mentions[answer - 1].secret].name[0] == 0;
            *(plain ? &r->plain : &r->named) += 1;
            *(plain ? &r->plain_right : &r->named_right) += right;
        }
        if (next != answer) right = true;
        answer = next;
        if (i == w->rows) break;
        r->tokens++;
        if (answer == 0) {
            if (w->weights[i] > 0) r->text_tokens++, r->text_nats += (double)lane->nll[i];
            continue;
        }
        r->digits++;
        r->digit_nats += (double)lane->nll[i];
        right = right && lane->right[i] != 0;
    }
}

static cairn_status make_window(const cairn_trainer *t, const cairn_train_stage *stage, cairn_lane *lane, size_t number)
{
    const uint32_t C = block_tokens_of(t);
    const size_t tokens = cairn_lesson_tokens(stage->window, C);
    cairn_random random = random_of(t, number);
    cairn_status st = cairn_lesson_make(&lane->lesson, t->corpus, stage, &random, lesson_bytes(t, tokens), C);
    return st == CAIRN_OK ? cairn_lesson_to_window(&lane->lesson, &t->vocab, C, stage->window, &lane->window) : st;
}

static void run_lane(void *arg, size_t item, size_t worker)
{
    const job *j = arg;
    const cairn_trainer *t = j->trainer;
    cairn_lane *lane = &t->lanes[item];
    (void)worker;
    lane->loss = lane->weight = 0;
    lane->report = (cairn_train_report){0};
    memset(lane->grads, 0, t->layout->total * sizeof *lane->grads);
    for (size_t number = item; number < j->stage->windows; number += t->n_lanes) {
        cairn_lesson_window *w = &lane->window;
        if ((lane->status = make_window(t, j->stage, lane, number)) != CAIRN_OK) {
            snprintf(lane->error, sizeof lane->error, "%s", cairn_last_error());
            return;
        }
        const cairn_train_guide guide = {.rows = w->guided,
                                         .n = w->n_guided,
                                         .from_layer = t->opt.guided_layer,
                                         .heads = t->opt.guided_heads,
                                         .apart = t->opt.guided_apart != 0,
                                         .weight = j->stage->guide,
                                         .remember = true,
                                         .forget = w->plain_blocks,
                                         .distractors = j->stage->distractors,
                                         .rivals = j->stage->rivals};
        const bool guides = j->stage->guide > 0 && t->opt.attention == CAIRN_TRAIN_LANDMARK;
        const cairn_train_window window = {w->slots, w->targets, w->weights, w->rows, guides ? &guide : NULL};
        for (size_t i = 0; i < w->rows; i++) lane->weight += w->targets[i] < 0 ? 0 : (double)w->weights[i];
        cairn_train_forward_guided_f32(lane->model, t->params, w->slots, w->rows, window.guide);
        lane->loss += cairn_train_loss_f32(lane->model, &window, j->scale, lane->nll, lane->right);
        double guided = cairn_train_backward_f32(lane->model, t->params, &window, lane->grads);
        lane->loss += guided;
        count_rows(lane);
        if (guides && t->opt.guided_layer < t->opt.layers) {
            uint64_t terms = 0;
            for (size_t i = 0; i < w->n_guided; i++)
                for (uint32_t h = 0; h < t->opt.heads; h++) terms += cairn_train_tells(&guide, &w->guided[i], h);
            lane->report.guided += terms * (t->opt.layers - t->opt.guided_layer);
            lane->report.guide_nats += guided / (double)j->stage->guide;
        }
    }
}

static void sum_lanes(void *arg, size_t item, size_t worker)
{
    const job *j = arg;
    const cairn_trainer *t = j->trainer;
    const size_t begin = item * CHUNK, end = begin + CHUNK < t->layout->total ? begin + CHUNK : t->layout->total;
    float *sum = t->lanes[0].grads;
    (void)worker;
    for (size_t lane = 1; lane < t->n_lanes; lane++)
        for (size_t i = begin; i < end; i++) sum[i] += t->lanes[lane].grads[i];
    for (size_t i = begin; i < end; i++) sum[i] *= (float)j->scale;
}

void cairn_train_report_add(cairn_train_report *sum, const cairn_train_report *one)
{
    sum->step = one->step;
    sum->steps = one->steps;
    sum->stage = one->stage;
    sum->pace = one->pace;
    sum->norm = fmax(sum->norm, one->norm);
    sum->tokens += one->tokens;
    sum->text_nats += one->text_nats;
    sum->digit_nats += one->digit_nats;
    sum->guide_nats += one->guide_nats;
    sum->text_tokens += one->text_tokens;
    sum->digits += one->digits;
    sum->guided += one->guided;
    sum->plain += one->plain;
    sum->plain_right += one->plain_right;
    sum->named += one->named;
    sum->named_right += one->named_right;
}

cairn_status cairn_trainer_step(cairn_trainer *t, cairn_train_report *report)
{
    uint64_t within = t->step;
    size_t s = 0;
    while (s < t->n_stages && within >= t->stages[s].steps) within -= t->stages[s++].steps;
    *report = (cairn_train_report){.step = t->step, .steps = t->steps, .stage = s};
    if (s == t->n_stages) return CAIRN_NOT_FOUND;
    const cairn_train_stage *stage = &t->stages[s];
    job j = {t, stage, 1};
    cairn_pool_run(t->pool, t->n_lanes, run_lane, &j);
    double loss = 0, weight = 0;
    for (size_t i = 0; i < t->n_lanes; i++) {
        const cairn_lane *lane = &t->lanes[i];
        if (lane->status != CAIRN_OK) return cairn_fail(lane->status, "%s", lane->error);
        loss += lane->loss;
        weight += lane->weight;
        cairn_train_report_add(report, &lane->report);
    }
    if (!isfinite(loss))
        return cairn_fail(CAIRN_INVALID, "the loss of step %llu (stage '%s') is not finite: %g",
                          (unsigned long long)t->step, stage->name, loss);
    j.scale = weight > 0 ? 1 / weight : 1;
    cairn_pool_run(t->pool, (t->layout->total + CHUNK - 1) / CHUNK, sum_lanes, &j);
    t->rates.adam = stage->adam;
    t->rates.muon = stage->muon;
    const double pace = cairn_train_pace(within, stage->warmup, stage->steps, (double)stage->floor);
    double norm = 0;
    cairn_status st = cairn_train_update(&t->optimizer, &t->rates, pace, t->params, t->lanes[0].grads, &norm);
    if (st != CAIRN_OK)
        return cairn_fail_within(st, "step %llu (stage '%s')", (unsigned long long)t->step, stage->name);
    t->step++;
    report->step = t->step;
    report->steps = t->steps;
    report->stage = s;
    report->norm = norm;
    report->pace = pace;
    return CAIRN_OK;
}

/* ---- the model ---- */

cairn_status cairn_trainer_export(const cairn_trainer *t, const char *name, cairn_gguf_type type, const char *path)
{
    if (t->source != NULL) return cairn_train_export_like(t->layout, t->params, t->source, t->window_max, type, path);
    return cairn_train_export(t->layout, t->params, name, t->window_max, type, path);
}

uint64_t cairn_trainer_parameters(const cairn_trainer *t)
{
    return t->layout->total;
}
cairn_train_products cairn_trainer_products(const cairn_trainer *t)
{
    return t->opt.products;
}

uint32_t cairn_trainer_threads(const cairn_trainer *t)
{
    return (uint32_t)t->n_lanes;
}
