/* bench_passkey.c - keys hidden in long texts, asked for over the store: does retrieval find them?
 *
 * A cell is a length and a kind. Each of its texts is ingested once, with the model's own k, and asked its questions
 * for every k of --top-k: a question is a session that goes on where the text ends and is never committed, so each of
 * them meets the same memory. Greedy; an answer counts when all its digits are right. A model without landmarks keeps
 * nothing: it reads text and question in memory, each time anew, with ordinary attention over all of it.
 */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DECILES = 10 };

static struct {
    bench_flags bench;
    cli_numbers tokens, distractors, top_k;
    cli_reals depths;
    uint32_t texts, asks;
    bool no_retrieval, by_depth;
} flags = {.bench = BENCH_FLAGS_INIT, .texts = 20, .asks = 1};

static const cli_option options[] = {
    BENCH_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "tokens", 0, &flags.tokens, "N,...", "lengths of the stream: BOS, text and question (4096)",
               192, 100000000),
    OPT_NUMBER(CLI_U64S, "distractors", 0, &flags.distractors, "N,...",
               "kinds: 0 = the plain key alone, N = a key by name among N others (0)", 0, 100000),
    OPT_NUMBER(CLI_U32, "texts", 0, &flags.texts, "N", "texts of each length and kind (20)", 1, 1000000),
    OPT_NUMBER(CLI_U32, "asks", 0, &flags.asks, "N",
               "questions to each text with names; to a plain one there is one (1)", 1, 100001),
    OPT_NUMBER(CLI_COUNTS, "top-k", 0, &flags.top_k, "N|all,...", "blocks retrieved while asking (the model's)", 0,
               1000000),
    OPT_REALS("depths", &flags.depths, "P,...",
              "where the key asked for first stands, 0 begin, 1 end, text by text in turn (drawn)", 0, 1),
    OPT_FLAG("by-depth", 0, &flags.by_depth, "also by tenths of the text in which the key stands"),
    OPT_FLAG("no-retrieval", 0, &flags.no_retrieval, "the control: neither reading nor asking sees beyond the window"),
    BENCH_STORE_OPTIONS(flags.bench),
};

/* ---- what is counted ---- */

typedef struct tally { /* of one cell and one k */
    uint64_t asked, right, digits, asked_at[DECILES], right_at[DECILES];
    double seconds; /* of all questions */
    json_t *wrong;  /* with --json */
} tally;

typedef struct cell {
    uint64_t tokens;
    uint64_t text_bytes; /* what is left of tokens after BOS and question */
    uint32_t distractors;
    uint64_t texts; /* done */
    double seconds; /* of all ingests */
    tally *of_k;    /* (n_k) */
} cell;

typedef struct run_state {
    bench b;
    cell *cells;
    size_t n_cells;
    uint64_t *top_k;
    size_t n_k;
    cairn_session_options ingest;
    progress bar;
    char label[80];
    uint64_t tokens_done, tokens_all;
} run_state;

static cairn_recall_options recall_options(const cell *of, uint32_t text)
{
    cairn_recall_options opt;
    cairn_recall_options_init(&opt, sizeof opt);
    opt.bytes = of->text_bytes;
    opt.distractors = of->distractors;
    opt.plain = of->distractors == 0;
    if (flags.depths.n > 0) opt.depth = flags.depths.items[text % flags.depths.n];
    opt.seed = (uint64_t)flags.bench.seed << 32 | text; /* no two seeds share a text */
    return opt;
}

static bool dense(const run_state *r)
{
    return r->b.model.shape->scheme == CAIRN_POSITION_DENSE;
}

static void kind_words(const cell *of, human *out)
{
    human n;
    if (of->distractors == 0)
        snprintf(out->text, sizeof out->text, "plain");
    else
        snprintf(out->text, sizeof out->text, "1 of %s", human_count(&n, (uint64_t)of->distractors + 1));
}

/* ---- cells ---- */

/* The text is as long as BOS and question leave it; a first text tells how long a question of this kind is, and whether
 * its sentences fit, before anything has run for an hour. */
static int plan_cell(run_state *r, cell *of)
{
    cairn_recall_text *text = NULL;
    of->text_bytes = of->tokens - sizeof(cairn_recall_question){0}.text;
    for (int again = 0; again < 2; again++) {
        cairn_recall_options opt = recall_options(of, 0);
        cairn_status st = cairn_recall_text_new(r->b.corpus, &opt, &text);
        if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
        of->text_bytes = of->tokens - bench_has_bos(&r->b) - strlen(cairn_recall_text_question(text, 0)->text);
        cairn_recall_text_free(text);
    }
    return bench_needs_bytes(&r->b, of->text_bytes);
}

static int plan(run_state *r)
{
    static uint64_t default_tokens[] = {4096}, default_distractors[] = {0}, nothing[] = {0};
    static uint64_t default_k[1];
    cli_numbers tokens = flags.tokens.n > 0 ? flags.tokens : (cli_numbers){default_tokens, 1};
    cli_numbers kinds = flags.distractors.n > 0 ? flags.distractors : (cli_numbers){default_distractors, 1};
    r->ingest = r->b.options;
    cairn_policy_init(&r->ingest.policy, sizeof r->ingest.policy, r->b.model.shape);
    default_k[0] = r->ingest.policy.top_k;
    const policy_flags *policy = &flags.bench.policy;
    if (dense(r) && (flags.no_retrieval || flags.top_k.n > 0 || policy->mass > 0 || policy->scope != 0 ||
                     policy->window != WINDOW_MODEL))
        return cli_usage(r->b.c,
                         "'%s' has no landmarks: --top-k, --mass, --scope, --window and --no-retrieval choose nothing "
                         "in it",
                         flags.bench.model);
    if (r->b.model.info.xl_segment > 0)
        return cli_fail(r->b.c, EXIT_FAILED,
                        "'%s' was trained as Transformer-XL over segments of %u slots, which 'cairn bench ppl' alone "
                        "follows; here it would attend to everything",
                        flags.bench.model, r->b.model.info.xl_segment);
    cli_numbers k = flags.no_retrieval  ? (cli_numbers){nothing, 1}
                    : flags.top_k.n > 0 ? flags.top_k
                                        : (cli_numbers){default_k, 1};
    if (flags.no_retrieval) r->ingest.policy.top_k = 0;
    r->top_k = k.items;
    r->n_k = k.n;
    r->cells = calloc(tokens.n * kinds.n, sizeof *r->cells);
    if (r->cells == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    for (size_t t = 0; t < tokens.n; t++) {
        for (size_t d = 0; d < kinds.n; d++) {
            cell *of = &r->cells[r->n_cells++];
            *of = (cell){.tokens = tokens.items[t], .distractors = (uint32_t)kinds.items[d]};
            if ((of->of_k = calloc(k.n, sizeof *of->of_k)) == NULL)
                return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
            for (size_t i = 0; r->b.c->json && i < k.n; i++) of->of_k[i].wrong = json_array();
            int code = plan_cell(r, of);
            if (code >= 0) return code;
            r->tokens_all += of->tokens * flags.texts;
            r->b.texts += flags.texts;
        }
    }
    return -1;
}

/* ---- a text and its questions ---- */

static bool go_on(void *arg, uint64_t done, uint64_t total)
{
    (void)arg, (void)done, (void)total;
    return !cli_stopped();
}

/* Feeds the text to a new stream, which is the caller's to end. */
static int read_text(run_state *r, const cairn_recall_text *text, bench_stream *stream)
{
    size_t bytes = 0, n = 0;
    const char *said = cairn_recall_text_bytes(text, &bytes);
    cairn_token *tokens = bench_encode(&r->b, true, said, bytes, &n);
    int code = tokens != NULL ? -1 : EXIT_FAILED;
    if (code < 0) code = bench_stream_begin(&r->b, &r->ingest, stream);
    const size_t chunk = bench_piece(&r->b);
    for (size_t at = 0; code < 0 && at < n; at += chunk) {
        code = bench_stream_feed(&r->b, stream, tokens + at, n - at < chunk ? n - at : chunk, NULL);
        r->bar.items = r->tokens_done + at;
        progress_show(&r->bar, r->tokens_done + at, r->tokens_all);
    }
    free(tokens);
    return code;
}

static int ingest(run_state *r, cell *of, const cairn_recall_text *text)
{
    bench_stream stream = {0};
    uint64_t start = cli_now_ns();
    int code = read_text(r, text, &stream);
    if (code < 0) code = bench_stream_commit(&r->b, &stream);
    bench_stream_end(&stream);
    if (code < 0) {
        const char *kind = flags.bench.session.index;
        cairn_status st = cairn_context_reindex(r->b.store, r->b.model.shape, BENCH_CONTEXT, kind, go_on, NULL);
        if (st == CAIRN_CANCELLED) return bench_stopped(&r->b);
        if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    }
    of->seconds += (double)(cli_now_ns() - start) * 1e-9;
    return code;
}

/* The model's next characters after a question, at most as many as digits are asked for. answer is 0-terminated. */
static cairn_status answer_to(const bench *b, cairn_runtime *runtime, const cairn_token *question, size_t n,
                              float *logits, char answer[CAIRN_RECALL_DIGITS + 1])
{
    cairn_sampler greedy = {.temperature = 0, .top_p = 1};
    size_t have = 0;
    cairn_status st = cairn_runtime_feed(runtime, question, n, logits);
    while (st == CAIRN_OK) {
        cairn_token token = -1;
        if ((st = cairn_model_sample(b->model.model, logits, &greedy, &token)) != CAIRN_OK) break;
        if (token == b->model.info.eos || cairn_model_decode(b->model.model, token, answer + have, 1) == 0) break;
        if (++have == CAIRN_RECALL_DIGITS) break;
        st = cairn_runtime_feed(runtime, &token, 1, logits);
    }
    answer[have] = 0;
    return st;
}

static int ask(run_state *r, const cairn_recall_question *question, uint64_t top_k, float *logits,
               char answer[CAIRN_RECALL_DIGITS + 1], double *seconds)
{
    bench *b = &r->b;
    cairn_session_options opt = b->options;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    size_t n = 0;
    const char *names[] = {BENCH_CONTEXT};
    opt.policy.top_k = (uint32_t)top_k;
    cairn_token *tokens = bench_encode(b, false, question->text, strlen(question->text), &n);
    if (tokens == NULL) return EXIT_FAILED;
    uint64_t start = cli_now_ns();
    cairn_status st = cairn_session_begin(b->store, b->model.shape, names, 1, &opt, &session);
    if (st == CAIRN_OK) cairn_session_info_get(session, &b->machine);
    if (st == CAIRN_OK) st = cairn_runtime_begin(b->model.model, session, flags.bench.session.chunk_blocks, &runtime);
    if (st == CAIRN_OK) st = answer_to(b, runtime, tokens, n, logits, answer);
    *seconds += (double)(cli_now_ns() - start) * 1e-9;
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    free(tokens);
    return st == CAIRN_OK ? bench_stopped(b) : cli_fail_status(b->c, st);
}

/* As ask, of a model that keeps nothing: the text is read again first, which counts as the text's time. */
static int ask_anew(run_state *r, cell *of, const cairn_recall_text *text, const cairn_recall_question *question,
                    float *logits, char answer[CAIRN_RECALL_DIGITS + 1], double *seconds)
{
    bench_stream stream = {0};
    size_t n = 0;
    uint64_t start = cli_now_ns();
    int code = read_text(r, text, &stream);
    uint64_t read = cli_now_ns();
    if (code < 0) {
        cairn_token *tokens = bench_encode(&r->b, false, question->text, strlen(question->text), &n);
        cairn_status st = CAIRN_OK;
        if (tokens == NULL)
            code = EXIT_FAILED;
        else if ((st = answer_to(&r->b, stream.runtime, tokens, n, logits, answer)) != CAIRN_OK)
            code = cli_fail_status(r->b.c, st);
        free(tokens);
    }
    bench_stream_end(&stream);
    of->seconds += (double)(read - start) * 1e-9;
    *seconds += (double)(cli_now_ns() - read) * 1e-9;
    return code < 0 ? bench_stopped(&r->b) : code;
}

static void count(tally *t, const cell *of, uint32_t text, const cairn_recall_question *q, const char *answer)
{
    size_t tenth = (size_t)(q->at * DECILES / of->text_bytes);
    bool right = strcmp(answer, q->answer) == 0;
    if (tenth >= DECILES) tenth = DECILES - 1;
    t->asked++;
    t->right += right;
    t->asked_at[tenth]++;
    t->right_at[tenth] += right;
    for (size_t i = 0; answer[i] != 0; i++) t->digits += answer[i] == q->answer[i];
    if (right || t->wrong == NULL) return;
    json_array_append_new(t->wrong, json_pack("{s:i, s:s, s:f, s:s, s:o}", "text", (int)text, "name", q->name, "depth",
                                              (double)q->at / (double)of->text_bytes, "expected", q->answer, "answer",
                                              json_bytes(answer, strlen(answer))));
}

static int run_text(run_state *r, cell *of, uint32_t number, float *logits)
{
    cairn_recall_text *text = NULL;
    cairn_recall_options opt = recall_options(of, number);
    cairn_status st = cairn_recall_text_new(r->b.corpus, &opt, &text);
    if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    int code = dense(r) ? -1 : ingest(r, of, text);
    size_t others = cairn_recall_text_questions(text) - 1;
    size_t asks = of->distractors == 0 ? 1 : flags.asks < others + 1 ? flags.asks : others + 1;
    for (size_t a = 0; code < 0 && a < asks; a++) {
        /* The further ones are spread evenly over the distractors, which come in order of their places. */
        size_t which = a == 0 ? 0 : 1 + (2 * a - 1) * others / (2 * (asks - 1));
        const cairn_recall_question *q = cairn_recall_text_question(text, which);
        for (size_t k = 0; code < 0 && k < r->n_k; k++) {
            char answer[CAIRN_RECALL_DIGITS + 1] = "";
            double *seconds = &of->of_k[k].seconds;
            code = dense(r) ? ask_anew(r, of, text, q, logits, answer, seconds)
                            : ask(r, q, r->top_k[k], logits, answer, seconds);
            if (code < 0) count(&of->of_k[k], of, number, q, answer);
        }
    }
    cairn_recall_text_free(text);
    if (code < 0) code = bench_drop(&r->b);
    if (code >= 0) return code;
    of->texts++;
    r->b.texts_done++;
    r->tokens_done += of->tokens;
    return -1;
}

static int measure(run_state *r)
{
    float *logits = malloc(r->b.model.info.vocab * sizeof *logits);
    int code = logits != NULL ? -1 : cli_fail(r->b.c, EXIT_FAILED, "out of memory: %u logits", r->b.model.info.vocab);
    progress_init(&r->bar, r->b.c, r->label);
    r->bar.unit = "tokens";
    for (size_t i = 0; i < r->n_cells && code < 0; i++) {
        human tokens, kind;
        kind_words(&r->cells[i], &kind);
        for (uint32_t t = 0; t < flags.texts && code < 0; t++) {
            snprintf(r->label, sizeof r->label, "%s %s: text %u of %u", human_count(&tokens, r->cells[i].tokens),
                     kind.text, t + 1, flags.texts);
            code = run_text(r, &r->cells[i], t, logits);
        }
    }
    progress_clear(&r->bar);
    free(logits);
    return code;
}

/* ---- the report ---- */

static double percent(uint64_t right, uint64_t asked)
{
    return asked > 0 ? 100 * (double)right / (double)asked : 0;
}

static void k_words(const run_state *r, size_t k, human *out)
{
    if (dense(r))
        snprintf(out->text, sizeof out->text, "-");
    else if (flags.no_retrieval)
        snprintf(out->text, sizeof out->text, "none");
    else
        bench_k(out, r->top_k[k]);
}

static void print_cells(const run_state *r)
{
    static const char *const heads[] = {"tokens", "key", "k", "right", "%", "95 % interval", "text", "question"};
    static const bool right[] = {true, false, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        const cell *of = &r->cells[i];
        for (size_t k = 0; k < r->n_k; k++) {
            const tally *n = &of->of_k[k];
            human tokens, kind, blocks, score, share, interval, text, question;
            double low, high;
            if (n->asked == 0) continue; /* interrupted before it */
            bench_wilson(n->right, n->asked, &low, &high);
            kind_words(of, &kind);
            k_words(r, k, &blocks);
            snprintf(score.text, sizeof score.text, "%llu/%llu", (unsigned long long)n->right,
                     (unsigned long long)n->asked);
            snprintf(share.text, sizeof share.text, "%.1f", percent(n->right, n->asked));
            snprintf(interval.text, sizeof interval.text, "%.1f - %.1f", 100 * low, 100 * high);
            human_seconds(&text, of->texts > 0 ? of->seconds / (double)of->texts : of->seconds);
            human_seconds(&question, n->seconds / (double)n->asked);
            table_row(t, (const char *const[]){human_count(&tokens, of->tokens), kind.text, blocks.text, score.text,
                                               share.text, interval.text, text.text, question.text});
        }
    }
    table_print(t);
}

static void print_depths(const run_state *r)
{
    static const char *const heads[] = {"tokens", "key",  "k",    "0 %",  "10 %", "20 %", "30 %",
                                        "40 %",   "50 %", "60 %", "70 %", "80 %", "90 %"};
    static const bool right[] = {true, false, true, true, true, true, true, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        for (size_t k = 0; k < r->n_k; k++) {
            const tally *n = &r->cells[i].of_k[k];
            human tokens, kind, blocks, at[DECILES];
            if (n->asked == 0) continue;
            kind_words(&r->cells[i], &kind);
            k_words(r, k, &blocks);
            const char *row[3 + DECILES] = {human_count(&tokens, r->cells[i].tokens), kind.text, blocks.text};
            for (size_t d = 0; d < DECILES; d++) {
                snprintf(at[d].text, sizeof at[d].text, "%llu/%llu", (unsigned long long)n->right_at[d],
                         (unsigned long long)n->asked_at[d]);
                row[3 + d] = n->asked_at[d] > 0 ? at[d].text : "-";
            }
            table_row(t, row);
        }
    }
    printf("\nright by where the key stands\n");
    table_print(t);
}

static json_t *cells_json(const run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        const cell *of = &r->cells[i];
        for (size_t k = 0; k < r->n_k; k++) {
            const tally *n = &of->of_k[k];
            double low, high;
            bench_wilson(n->right, n->asked, &low, &high);
            json_t *depths = json_array();
            for (size_t d = 0; d < DECILES; d++)
                json_array_append_new(depths, json_pack("{s:o, s:o}", "asked", json_count(n->asked_at[d]), "right",
                                                        json_count(n->right_at[d])));
            json_t *one =
                json_pack("{s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o}", "text_bytes", json_count(of->text_bytes),
                          "tokens", json_count(of->tokens), "kind", of->distractors == 0 ? "plain" : "named",
                          "distractors", json_count(of->distractors), "top_k",
                          dense(r) ? json_null() : bench_k_json(r->top_k[k]), "texts", json_count(of->texts), "asked",
                          json_count(n->asked), "right", json_count(n->right), "digits_right", json_count(n->digits));
            json_t *more =
                json_pack("{s:f, s:[f,f], s:b, s:f, s:f, s:o, s:O}", "percent", percent(n->right, n->asked),
                          "interval_percent", 100 * low, 100 * high, "retrieval", !dense(r) && !flags.no_retrieval,
                          "text_seconds", of->texts > 0 ? of->seconds / (double)of->texts : 0.0, "question_seconds",
                          n->asked > 0 ? n->seconds / (double)n->asked : 0.0, "by_depth", depths, "wrong", n->wrong);
            json_object_update(one, more);
            json_decref(more);
            json_array_append_new(cells, one);
        }
    }
    return cells;
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r; /* its label is pointed into */
    if (flags.no_retrieval && flags.top_k.n > 0) return cli_usage(c, "--no-retrieval and --top-k exclude each other");
    int code = bench_begin(c, &flags.bench, false, argc, argv, &r.b);
    if (code < 0) code = plan(&r);
    if (code < 0) code = measure(&r);
    if (r.b.texts_done > 0 && !c->json) { /* what was found before Ctrl-C is shown too */
        bench_print_head(&r.b);
        print_cells(&r);
        if (flags.by_depth) print_depths(&r);
    }
    if (code < 0 && c->json) {
        code = cli_answer_on(c, bench_json(&r.b, "passkey", cells_json(&r)));
    }
    for (size_t i = 0; i < r.n_cells; i++) {
        for (size_t k = 0; r.cells[i].of_k != NULL && k < r.n_k; k++) json_decref(r.cells[i].of_k[k].wrong);
        free(r.cells[i].of_k);
    }
    free(r.cells);
    bench_end(&r.b);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_bench_passkey = {
    .name = "bench passkey",
    .summary = "keys hidden in long texts, asked for over the store",
    .usage = "-m MODEL.gguf --corpus PATH [options] [PATH...]",
    .about =
        "Hides sentences such as \"The pass key of ABCD is 12345.\" in held-out text, ingests the text into a store "
        "and\n"
        "asks for the digits, greedily: right is what has all five. Each question is a stream of its own over the\n"
        "stored text. --top-k, --mass, --scope and --window are those of the questions; texts are ingested with the\n"
        "model's own policy, as 'cairn ingest' does. With --no-retrieval neither sees more than the window, which a\n"
        "key is in only by chance: what is found then was found without memory. A model without landmarks reads text\n"
        "and question in memory, once for each question, and attends to all of it.\n"
        "\n"
        "The interval is Wilson's, of questions taken as independent. The columns text and question are mean times:\n"
        "a text from its first token to its index, a question from the opening of its session to its last digit.",
    .example =
        "  cairn bench passkey -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --tokens 4K,16K\n"
        "  cairn bench passkey -m model.gguf --corpus text --distractors 0,10,100 --asks 5 --top-k 1,4,all --json",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
