/* train.c - trains a landmark model from text: a plan's stages, checkpoints on the way, a GGUF file at the end. */
#include "plan.h"
#include "work.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { AS_PLANNED = 3 }; /* of --attention */

static struct {
    const char *out, *plan, *checkpoint, *log, *init;
    cli_texts corpus;
    double held_out, minutes;
    uint64_t seed, steps;
    uint32_t threads, report;
    int type, attention, products;
    bool fresh, other_stages;
} flags = {
    .held_out = 0.05, .minutes = 5, .seed = UINT64_MAX, .report = 50, .threads = UINT32_MAX, .attention = AS_PLANNED};

static const cli_option options[] = {
    OPT_NEEDED(CLI_TEXT, "out", 'o', &flags.out, "FILE.gguf",
               "the model; written with every checkpoint and at the end"),
    OPT_NEEDED(CLI_TEXT, "plan", 'p', &flags.plan, "FILE.json",
               "model, seed and stages (docs/training.md); - is stdin"),
    OPT_NEEDED(CLI_TEXTS, "corpus", 'c', &flags.corpus, "PATH", "a text file or a directory of them; may be repeated"),
    OPT_REAL("held-out", &flags.held_out, "SHARE", "of the corpus, never trained on (0.05)", 0, 1),
    OPT_TEXT("init", 0, &flags.init, "MODEL.gguf",
             "start from this model: its shape, weights and tokenizer; the plan gives it landmarks if it has none"),
    OPT_TEXT("checkpoint", 0, &flags.checkpoint, "FILE", "state to go on from (OUT.checkpoint)"),
    OPT_REAL("minutes", &flags.minutes, "N", "between checkpoints (5)", 0.01, 1e6),
    OPT_FLAG("fresh", 0, &flags.fresh, "begin anew although there is a checkpoint"),
    OPT_FLAG("other-stages", 0, &flags.other_stages, "go on although the plan's stages or guided heads were changed"),
    OPT_NUMBER(CLI_U64, "steps", 0, &flags.steps, "N", "end this run after N updates; 0 = when the plan is done (0)", 0,
               UINT32_MAX),
    OPT_TEXT("log", 0, &flags.log, "FILE.jsonl", "append a line of JSON per report"),
    OPT_NUMBER(CLI_U32, "report", 0, &flags.report, "N", "updates between reports (50)", 1, 1000000),
    OPT_CHOICE("attention", &flags.attention, "landmark|dense|xl|plan",
               "instead of the plan's: to compare the three on the same data (plan)"),
    OPT_NUMBER(CLI_U64, "seed", 0, &flags.seed, "N", "instead of the plan's", 0, UINT64_MAX - 1),
    OPT_NUMBER(CLI_U32, "threads", 0, &flags.threads, "N", "instead of the plan's; 0 = one per core", 0, 64),
    OPT_CHOICE("products", &flags.products, "auto|f32|bf16",
               "operands of matrix products; auto: bf16 where the processor has AMX"),
    OPT_CHOICE("type", &flags.type, "f16|f32", "of the matrices in the file (f16)"),
};

typedef struct run_state {
    cli *c;
    plan plan;
    cairn_corpus *corpus;
    model_ref init; /* none: a new model */
    cairn_trainer *trainer;
    char *checkpoint;
    FILE *log;
    bool shown;
    uint64_t begun_ns, saved_ns, reported_ns;
    uint64_t tokens;        /* of this run */
    cairn_train_report sum; /* since the last report */
} run_state;

static double seconds_since(uint64_t ns)
{
    return (double)(cli_now_ns() - ns) * 1e-9;
}

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

/* ---- what is told ---- */

static double bits_per_byte(const cairn_train_report *r)
{
    return ratio(r->text_nats, (double)r->text_tokens) / M_LN2;
}

static json_t *report_json(const run_state *s, double rate)
{
    const cairn_train_report *r = &s->sum;
    json_t *o = json_pack("{s:I, s:I, s:s, s:f, s:f}", "step", (json_int_t)r->step, "steps", (json_int_t)r->steps,
                          "stage", s->plan.stages[r->stage].name, "pace", r->pace, "gradient_norm", r->norm);
    json_object_set_new(o, "tokens", json_count(r->tokens));
    json_object_set_new(o, "tokens_per_second", json_real(rate));
    json_object_set_new(o, "seconds", json_real(seconds_since(s->begun_ns)));
    if (r->text_tokens > 0) json_object_set_new(o, "text_bits_per_byte", json_real(bits_per_byte(r)));
    if (r->digits > 0) json_object_set_new(o, "digit_nats", json_real(ratio(r->digit_nats, (double)r->digits)));
    if (r->guided > 0) json_object_set_new(o, "guide_nats", json_real(ratio(r->guide_nats, (double)r->guided)));
    json_object_set_new(o, "plain_answers", json_count(r->plain));
    json_object_set_new(o, "plain_right", json_count(r->plain_right));
    json_object_set_new(o, "named_answers", json_count(r->named));
    json_object_set_new(o, "named_right", json_count(r->named_right));
    return o;
}

static double seconds_left(const run_state *s, double rate)
{
    double tokens = 0;
    uint64_t first = 0;
    for (size_t i = 0; i < s->plan.n; i++) {
        const cairn_train_stage *stage = &s->plan.stages[i];
        uint64_t end = first + stage->steps, from = s->sum.step > first ? s->sum.step : first;
        if (end > from) tokens += (double)(end - from) * (double)stage->windows * (double)stage->window;
        first = end;
    }
    const double C = s->plan.options.block_tokens; /* landmarks are not counted as tokens */
    return ratio(s->plan.options.attention == CAIRN_TRAIN_LANDMARK ? tokens * C / (C + 1) : tokens, rate);
}

/* One line, and one of the log; the sums begin anew. Returns -1, or an exit code if the log cannot be written. */
static int report(run_state *s)
{
    const cairn_train_report *r = &s->sum;
    const double rate = ratio((double)r->tokens, seconds_since(s->reported_ns));
    int code = -1;
    if (s->shown) {
        human left;
        fprintf(stderr,
                "%s: step %llu of %llu, %s: text %.3f bits/byte, digits %.3f nats, guide %.2f, plain %llu/%llu, "
                "named %llu/%llu, %.0f tokens/s, %s left\n",
                s->plan.name, (unsigned long long)r->step, (unsigned long long)r->steps, s->plan.stages[r->stage].name,
                bits_per_byte(r), ratio(r->digit_nats, (double)r->digits), ratio(r->guide_nats, (double)r->guided),
                (unsigned long long)r->plain_right, (unsigned long long)r->plain, (unsigned long long)r->named_right,
                (unsigned long long)r->named, rate, human_seconds(&left, seconds_left(s, rate)));
    }
    if (s->log != NULL) {
        json_t *line = report_json(s, rate);
        if (json_dumpf(line, s->log, JSON_COMPACT | JSON_REAL_PRECISION(6)) != 0 || fputc('\n', s->log) == EOF ||
            fflush(s->log) != 0)
            code = cli_fail(s->c, EXIT_FAILED, "log '%s': %s", flags.log, strerror(errno));
        json_decref(line);
    }
    s->sum = (cairn_train_report){.step = r->step, .steps = r->steps, .stage = r->stage};
    s->reported_ns = cli_now_ns();
    return code;
}

/* ---- what is kept ---- */

static int save(run_state *s)
{
    cairn_status st = cairn_trainer_save(s->trainer, s->checkpoint);
    if (st == CAIRN_OK)
        st = cairn_trainer_export(s->trainer, s->plan.name, flags.type == 0 ? CAIRN_GGUF_F16 : CAIRN_GGUF_F32,
                                  flags.out);
    s->saved_ns = cli_now_ns();
    return st == CAIRN_OK ? -1 : cli_fail_status(s->c, st);
}

static int load(run_state *s)
{
    if (flags.fresh || access(s->checkpoint, F_OK) != 0) return -1;
    cairn_status st = cairn_trainer_load(s->trainer, s->checkpoint, flags.other_stages);
    return st == CAIRN_OK ? -1 : cli_fail_status(s->c, st);
}

/* ---- the run ---- */

static int begin(run_state *s)
{
    cairn_status st;
    int code = plan_read(s->c, flags.plan, &s->plan);
    if (code >= 0) return code;
    if (flags.seed != UINT64_MAX) s->plan.options.seed = flags.seed;
    if (flags.threads != UINT32_MAX) s->plan.options.threads = flags.threads;
    s->plan.options.products = (cairn_train_products)flags.products;
    if (flags.attention != AS_PLANNED) s->plan.options.attention = (cairn_train_attention)flags.attention;
    if (flags.checkpoint != NULL)
        s->checkpoint = strdup(flags.checkpoint);
    else if (asprintf(&s->checkpoint, "%s.checkpoint", flags.out) < 0)
        s->checkpoint = NULL;
    if (s->checkpoint == NULL) return cli_fail(s->c, EXIT_FAILED, "out of memory");
    if (flags.log != NULL && (s->log = fopen(flags.log, "ae")) == NULL)
        return cli_fail(s->c, EXIT_FAILED, "log '%s': %s", flags.log, strerror(errno));
    if (flags.init != NULL && (code = model_open(s->c, flags.init, false, &s->init)) >= 0) return code;
    if ((st = cairn_corpus_open(flags.corpus.items, flags.corpus.n, flags.held_out, &s->corpus)) != CAIRN_OK ||
        (st = cairn_trainer_new(&s->plan.options, s->init.model, s->corpus, s->plan.stages, s->plan.n, &s->trainer)) !=
            CAIRN_OK)
        return cli_fail_status(s->c, st);
    return load(s);
}

static int train(run_state *s, bool *over)
{
    s->begun_ns = s->saved_ns = s->reported_ns = cli_now_ns();
    int code = -1;
    *over = false;
    for (uint64_t n = 0; code < 0 && !cli_stopped() && (flags.steps == 0 || n < flags.steps); n++) {
        cairn_train_report one;
        cairn_status st = cairn_trainer_step(s->trainer, &one);
        if (st == CAIRN_NOT_FOUND) {
            s->sum.step = one.step;
            s->sum.steps = one.steps;
            *over = true;
            break;
        }
        if (st !=
            CAIRN_OK) { /* the parameters of the last good step are the ones in memory, but may be on their way out */
            cli_fail_status(s->c, st);
            return cli_fail(s->c, EXIT_FAILED, "stopped; the last checkpoint is '%s'", s->checkpoint);
        }
        const bool new_stage = s->sum.tokens > 0 && one.stage != s->sum.stage;
        if (new_stage) code = report(s);
        cairn_train_report_add(&s->sum, &one);
        s->tokens += one.tokens;
        if (code < 0 && one.step % flags.report == 0) code = report(s);
        if (code < 0 && seconds_since(s->saved_ns) > flags.minutes * 60) code = save(s);
    }
    if (code < 0 && s->sum.tokens > 0) code = report(s);
    return code < 0 ? save(s) : code;
}

static int run(cli *c, int argc, char **argv)
{
    (void)argc, (void)argv;
    run_state s = {.c = c, .shown = !c->quiet && (c->progress || isatty(STDERR_FILENO) == 1)};
    bool over = false;
    cli_catch_signals();
    int code = begin(&s);
    if (code < 0 && s.shown)
        fprintf(
            stderr,
            "%s: %llu parameters, %u threads, products in %s, %zu texts with %llu bytes to train on, %llu held out\n",
            s.plan.name, (unsigned long long)cairn_trainer_parameters(s.trainer), cairn_trainer_threads(s.trainer),
            cairn_trainer_products(s.trainer) == CAIRN_TRAIN_BF16 ? "bf16" : "f32", cairn_corpus_files(s.corpus),
            (unsigned long long)cairn_corpus_bytes(s.corpus, CAIRN_SPLIT_TRAIN),
            (unsigned long long)cairn_corpus_bytes(s.corpus, CAIRN_SPLIT_HELD_OUT));
    if (code < 0) code = train(&s, &over);
    if (code < 0) {
        const double seconds = seconds_since(s.begun_ns), rate = ratio((double)s.tokens, seconds);
        if (c->json) {
            code = cli_answer(c, json_pack("{s:s, s:s, s:I, s:I, s:b, s:I, s:f, s:f, s:I}", "model", flags.out,
                                           "checkpoint", s.checkpoint, "step", (json_int_t)s.sum.step, "steps",
                                           (json_int_t)s.sum.steps, "complete", over, "tokens", (json_int_t)s.tokens,
                                           "seconds", seconds, "tokens_per_second", rate, "peak_rss_bytes",
                                           (json_int_t)cairn_peak_rss_bytes()));
        } else {
            human tokens, time;
            if (!c->quiet)
                printf("%s '%s' at step %llu of %llu: %s tokens in %s, %.0f tokens/s\n", over ? "finished" : "stopped",
                       flags.out, (unsigned long long)s.sum.step, (unsigned long long)s.sum.steps,
                       human_count(&tokens, s.tokens), human_seconds(&time, seconds), rate);
        }
        if (code < 0 && cli_stopped()) code = EXIT_FAILED;
    }
    if (s.log != NULL) fclose(s.log);
    cairn_trainer_free(s.trainer);
    cairn_corpus_close(s.corpus);
    model_close(&s.init);
    plan_wipe(&s.plan);
    free(s.checkpoint);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_train = {
    .name = "train",
    .summary = "trains a landmark model from text",
    .usage = "-p PLAN.json -c TEXT... -o MODEL.gguf [--log FILE.jsonl] [--progress] [--json]",
    .about =
        "Trains a landmark model on text files, in the stages of a plan. The same command run again goes on from the\n"
        "last checkpoint, bit for bit, and does nothing when all stages are done. Ctrl-C leaves a checkpoint.\n"
        "Reports: bits per byte of text (training data), nats per digit of an answer, -ln of the share that the\n"
        "gates give to the right blocks (guide), answers right of asked (plain and by name).",
    .example = "  tools/corpus.sh corpus\n"
               "  cairn train -p models/tiny.json -c corpus -o tiny.gguf --progress",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = 0,
    .run = run,
};
