/* bench_ppl.c - how well held-out text is predicted: bits per byte, at what attention.
 *
 * A segment is one context: it is fed through a session over the store as ingest feeds it, so every row retrieves, and
 * what the model expected next is compared with what came. Nothing is carried from one segment to the next. A model
 * without landmarks keeps nothing and runs in memory, with ordinary attention over the whole segment; one trained as
 * Transformer-XL with its own recurrence.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXTS_DEFAULT = 20 };

static struct {
    bench_flags bench;
    cli_numbers lengths, top_k;
    uint32_t texts;
    uint64_t last;
} flags = {.bench = BENCH_FLAGS_INIT};

static const cli_option options[] = {
    BENCH_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "length", 0, &flags.lengths, "N,...", "tokens of a segment, BOS included (4096)", 2,
               100000000),
    OPT_NUMBER(CLI_U32, "texts", 0, &flags.texts, "N", "segments of each length (as many as there are, at most 20)", 1,
               1000000),
    OPT_NUMBER(CLI_COUNTS, "top-k", 0, &flags.top_k, "N|all,...", "blocks retrieved (the model's)", 0, 1000000),
    OPT_NUMBER(CLI_SIZE, "last", 0, &flags.last, "N", "count only the last N bytes of a segment (all)", 1, 100000000),
    BENCH_STORE_OPTIONS(flags.bench),
};

/* ---- what is counted ---- */

typedef struct cell {                /* a length and a k */
    uint64_t length, texts, counted; /* bytes counted of a segment */
    uint64_t top_k;
    double *bits; /* (done) bits per byte of each segment */
    size_t done;
    cairn_step_stats stats; /* sums over the counted rows */
    double own;             /* own tokens of those rows, summed */
    uint64_t rows;          /* they are, landmarks included */
    double seconds;
    uint64_t fed; /* tokens */
} cell;

typedef struct run_state {
    bench b;
    cell *cells;
    size_t n_cells;
    progress bar;
    char label[80];
    uint64_t tokens_done, tokens_all;
} run_state;

static bool dense(const run_state *r)
{
    return r->b.model.shape->scheme == CAIRN_POSITION_DENSE;
}

/* ---- cells ---- */

static int plan_cell(run_state *r, uint64_t length, uint64_t top_k)
{
    cell *of = &r->cells[r->n_cells++];
    human last, most, tokens, fit;
    uint64_t bytes = length - bench_has_bos(&r->b); /* of the text; the first one is not predicted without a BOS */
    *of = (cell){.length = length, .top_k = top_k, .counted = length - 1, .texts = flags.texts};
    int code = bench_needs_bytes(&r->b, bytes);
    if (code >= 0) return code;
    if (flags.last > of->counted)
        return cli_usage(r->b.c, "--last: %s is more than the %s bytes that a segment of %s tokens predicts",
                         human_count(&last, flags.last), human_count(&most, of->counted), human_count(&tokens, length));
    if (flags.last > 0) of->counted = flags.last;
    uint64_t room = r->b.held_bytes / bytes;
    if (flags.texts > room)
        return cli_fail(r->b.c, EXIT_FAILED,
                        "the corpus is too short: %u segments of %s tokens are asked for, %s fit into the %s bytes "
                        "that are held out",
                        flags.texts, human_count(&tokens, length), human_count(&fit, room),
                        human_count(&most, r->b.held_bytes));
    if (of->texts == 0) of->texts = room < TEXTS_DEFAULT ? room : TEXTS_DEFAULT;
    of->bits = calloc(of->texts, sizeof *of->bits);
    if (of->bits == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    r->b.texts += of->texts;
    r->tokens_all += of->texts * length;
    return -1;
}

static int plan(run_state *r)
{
    static uint64_t default_length[] = {4096};
    static uint64_t default_k[1];
    const policy_flags *policy = &flags.bench.policy;
    cli_numbers lengths = flags.lengths.n > 0 ? flags.lengths : (cli_numbers){default_length, 1};
    default_k[0] = r->b.options.policy.top_k;
    cli_numbers k = flags.top_k.n > 0 ? flags.top_k : (cli_numbers){default_k, 1};
    if (dense(r) && (flags.top_k.n > 0 || policy->mass > 0 || policy->scope != 0 || policy->window != WINDOW_MODEL))
        return cli_usage(r->b.c, "'%s' has no landmarks: --top-k, --mass, --scope and --window choose nothing in it",
                         flags.bench.model);
    r->cells = calloc(lengths.n * k.n, sizeof *r->cells);
    if (r->cells == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    for (size_t l = 0; l < lengths.n; l++) {
        for (size_t i = 0; i < k.n; i++) {
            int code = plan_cell(r, lengths.items[l], k.items[i]);
            if (code >= 0) return code;
        }
    }
    r->b.options.policy.measure_mass = true;
    return -1;
}

/* ---- a segment ---- */

/* Bits of `next` under softmax(logits): log2 of the sum of exp(logits - the largest), less its own. */
static double bits_of(const float *logits, uint32_t vocab, cairn_token next)
{
    double sum = 0, most = logits[0];
    for (uint32_t i = 1; i < vocab; i++)
        if (logits[i] > most) most = logits[i];
    for (uint32_t i = 0; i < vocab; i++) sum += exp(logits[i] - most);
    return (log(sum) + most - logits[next]) / log(2);
}

/* Adds up what the session says of the rows since the last reset: slots [from, to). */
static void add_stats(const run_state *r, cell *of, const bench_stream *s, uint64_t from, uint64_t to)
{
    const uint64_t c = r->b.model.shape->block_tokens;
    cairn_step_stats x;
    cairn_session_stats(s->session, &x);
    of->stats.rows += x.rows;
    of->stats.candidates += x.candidates;
    of->stats.chosen += x.chosen;
    of->stats.visible += x.visible;
    of->stats.mass_sum += x.mass_sum;
    of->stats.mass_rows += x.mass_rows;
    if (x.mass_min < of->stats.mass_min) of->stats.mass_min = x.mass_min;
    if (x.mass_kind < of->stats.mass_kind) of->stats.mass_kind = x.mass_kind;
    of->rows += to - from;
    for (uint64_t slot = from; slot < to; slot++) {
        uint64_t offset = slot % (c + 1);
        of->own += (double)(dense(r) ? slot + 1 : offset < c ? offset + 1 : c);
    }
}

/* tokens (length): all but the last are fed, each is followed by a prediction. */
static int run_segment(run_state *r, cell *of, const cairn_token *tokens, float *logits, size_t piece)
{
    const uint32_t vocab = r->b.model.info.vocab;
    const uint64_t rows = of->length - 1, first = rows - of->counted;
    bench_stream s = {0};
    cairn_session_options opt = r->b.options;
    double bits = 0;
    uint64_t start = cli_now_ns(), from = 0;
    opt.policy.top_k = (uint32_t)of->top_k;
    int code = bench_stream_begin(&r->b, &opt, &s);
    for (uint64_t at = 0; code < 0 && at < rows;) {
        bool counts = at >= first;
        uint64_t end = counts ? rows : first;
        size_t n = end - at < piece ? (size_t)(end - at) : piece;
        if (at == first) { /* the figures are those of the counted rows */
            cairn_session_stats_reset(s.session);
            from = cairn_session_slot(s.session);
        }
        code = bench_stream_feed(&r->b, &s, tokens + at, n, counts ? logits : NULL);
        for (size_t i = 0; code < 0 && counts && i < n; i++)
            bits += bits_of(logits + i * vocab, vocab, tokens[at + i + 1]);
        at += n;
        r->bar.items = r->tokens_done + at;
        progress_show(&r->bar, r->tokens_done + at, r->tokens_all);
    }
    if (code < 0) {
        add_stats(r, of, &s, from, cairn_session_slot(s.session));
        cairn_session_info_get(s.session, &r->b.machine);
        of->bits[of->done++] = bits / (double)of->counted;
        of->seconds += (double)(cli_now_ns() - start) * 1e-9;
        of->fed += rows;
        r->tokens_done += of->length;
        r->b.texts_done++;
    }
    bench_stream_end(&s);
    return code < 0 ? bench_drop(&r->b) : code;
}

/* Transformer-XL's recurrence is the trainer's: a row sees its segment of the model and the one before. */
static int score_segment(run_state *r, cell *of, const cairn_token *tokens)
{
    const uint64_t rows = of->length - 1, first = rows - of->counted, piece = r->b.model.info.xl_segment;
    double *nats = malloc((size_t)rows * sizeof *nats), sum = 0;
    uint64_t start = cli_now_ns();
    if (nats == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory: %llu rows", (unsigned long long)rows);
    cairn_status st = cairn_train_score(r->b.model.model, tokens, (size_t)of->length, nats);
    for (uint64_t row = first; st == CAIRN_OK && row < rows; row++) {
        sum += nats[row];
        of->own += (double)(row % piece + 1 + (row >= piece ? piece : 0));
    }
    free(nats);
    if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    of->rows += of->counted;
    of->bits[of->done++] = sum / log(2) / (double)of->counted;
    of->seconds += (double)(cli_now_ns() - start) * 1e-9;
    of->fed += rows;
    r->tokens_done += of->length;
    r->b.texts_done++;
    progress_show(&r->bar, r->tokens_done, r->tokens_all);
    return bench_stopped(&r->b);
}

/* Segment i of n begins at i/n of the held-out text, so none overlap; the seed turns them all around its ring. */
static uint64_t segment_at(const run_state *r, const cell *of, uint64_t i)
{
    uint64_t all = r->b.held_bytes, turn = (flags.bench.seed * UINT64_C(0x9e3779b97f4a7c15)) % all;
    return ((all - all % of->texts) / of->texts * i + turn) % all;
}

static int run_cell(run_state *r, cell *of)
{
    const uint32_t vocab = r->b.model.info.vocab;
    const size_t bytes = (size_t)(of->length - bench_has_bos(&r->b));
    const size_t piece = bench_piece(&r->b);
    char *text = malloc(bytes);
    float *logits = malloc(piece * vocab * sizeof *logits);
    int code = text != NULL && logits != NULL ? -1 : cli_fail(r->b.c, EXIT_FAILED, "out of memory: %zu bytes", bytes);
    human tokens, k;
    of->stats = (cairn_step_stats){.mass_min = 1, .mass_kind = CAIRN_MASS_EXACT};
    for (uint64_t i = 0; code < 0 && i < of->texts; i++) {
        size_t n = 0;
        snprintf(r->label, sizeof r->label, "%s, k %s: segment %llu of %llu", human_count(&tokens, of->length),
                 dense(r) ? "-" : bench_k(&k, of->top_k), (unsigned long long)i + 1, (unsigned long long)of->texts);
        cairn_status st = cairn_corpus_read(r->b.corpus, CAIRN_SPLIT_HELD_OUT, segment_at(r, of, i), bytes, text);
        cairn_token *ids = st == CAIRN_OK ? bench_encode(&r->b, true, text, bytes, &n) : NULL;
        if (st != CAIRN_OK)
            code = cli_fail_status(r->b.c, st);
        else if (ids == NULL)
            code = EXIT_FAILED;
        else
            code = r->b.model.info.xl_segment > 0 ? score_segment(r, of, ids) : run_segment(r, of, ids, logits, piece);
        free(ids);
    }
    free(text);
    free(logits);
    return code;
}

/* ---- the report ---- */

typedef struct figures {
    double bits, error, perplexity, attended, mass, tokens_per_s;
    bool mass_known;
} figures;

static figures figures_of(const run_state *r, const cell *of)
{
    figures f = {0};
    const cairn_step_stats *s = &of->stats;
    bench_mean(of->bits, of->done, &f.bits, &f.error);
    f.perplexity = exp2(f.bits);
    if (of->rows > 0) f.attended = of->own / (double)of->rows;
    if (s->rows > 0) /* landmarks, of candidates and of the window, and whole blocks */
        f.attended += ((double)s->candidates + (double)(s->visible - s->chosen) +
                       (double)s->visible * r->b.model.shape->block_tokens) /
                      (double)s->rows;
    f.mass_known = s->mass_rows > 0 && s->mass_kind != CAIRN_MASS_UNKNOWN;
    if (f.mass_known) f.mass = s->mass_sum / (double)s->mass_rows;
    if (of->seconds > 0) f.tokens_per_s = (double)of->fed / of->seconds;
    return f;
}

static void print_cells(const run_state *r)
{
    static const char *const heads[] = {"tokens",     "k",        "segments", "bits/byte", "+-",
                                        "perplexity", "attended", "mass",     "tokens/s"};
    static const bool right[] = {true, true, true, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        const cell *of = &r->cells[i];
        if (of->done == 0) continue;
        figures f = figures_of(r, of);
        human tokens, k, texts, bits, error, perplexity, attended, mass, rate;
        snprintf(bits.text, sizeof bits.text, "%.4f", f.bits);
        snprintf(error.text, sizeof error.text, of->done > 1 ? "%.4f" : "-", f.error);
        snprintf(perplexity.text, sizeof perplexity.text, "%.4f", f.perplexity);
        snprintf(attended.text, sizeof attended.text, "%.1f", f.attended);
        snprintf(mass.text, sizeof mass.text,
                 !f.mass_known                             ? "-"
                 : of->stats.mass_kind == CAIRN_MASS_EXACT ? "%.4f"
                                                           : ">= %.4f",
                 f.mass);
        table_row(t, (const char *const[]){human_count(&tokens, of->length), dense(r) ? "-" : bench_k(&k, of->top_k),
                                           human_count(&texts, of->done), bits.text, error.text, perplexity.text,
                                           attended.text, mass.text, human_count(&rate, (uint64_t)f.tokens_per_s)});
    }
    table_print(t);
}

static json_t *cells_json(const run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        const cell *of = &r->cells[i];
        figures f = figures_of(r, of);
        json_t *segments = json_array();
        for (size_t j = 0; j < of->done; j++) json_array_append_new(segments, json_real(of->bits[j]));
        json_t *mass = !f.mass_known
                           ? json_null()
                           : json_pack("{s:f, s:f, s:s}", "mean", f.mass, "least", (double)of->stats.mass_min, "kind",
                                       of->stats.mass_kind == CAIRN_MASS_EXACT ? "exact" : "lower bound");
        json_array_append_new(
            cells,
            json_pack("{s:o, s:o, s:o, s:o, s:f, s:f, s:f, s:f, s:o, s:f, s:o}", "length", json_count(of->length),
                      "top_k", dense(r) ? json_null() : bench_k_json(of->top_k), "segments", json_count(of->done),
                      "bytes_counted", json_count(of->done * of->counted), "bits_per_byte", f.bits, "standard_error",
                      f.error, "perplexity", f.perplexity, "attended_tokens", f.attended, "retained_mass", mass,
                      "tokens_per_second", f.tokens_per_s, "bits_per_byte_of_segments", segments));
    }
    return cells;
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r; /* its label is pointed into */
    int code = bench_begin(c, &flags.bench, false, argc, argv, &r.b);
    if (code < 0) code = plan(&r);
    progress_init(&r.bar, c, r.label);
    r.bar.unit = "tokens";
    for (size_t i = 0; code < 0 && i < r.n_cells; i++) code = run_cell(&r, &r.cells[i]);
    progress_clear(&r.bar);
    if (r.b.texts_done > 0 && !c->json) { /* what was measured before Ctrl-C is shown too */
        bench_print_head(&r.b);
        print_cells(&r);
    }
    if (code < 0 && c->json) {
        code = cli_answer_on(c, bench_json(&r.b, "ppl", cells_json(&r)));
    }
    for (size_t i = 0; i < r.n_cells; i++) free(r.cells[i].bits);
    free(r.cells);
    bench_end(&r.b);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_bench_ppl = {
    .name = "bench ppl",
    .summary = "bits per byte and perplexity of held-out text",
    .usage = "-m MODEL.gguf --corpus PATH [options] [PATH...]",
    .about =
        "Feeds segments of held-out text through a store, one context each and every row retrieving, and counts how\n"
        "many bits each next byte cost. Bits per byte is the mean over segments, after it its standard error;\n"
        "perplexity is 2 to that power, per byte. A model without landmarks sees its whole segment instead, one "
        "trained as\n"
        "Transformer-XL the part it is in and the one before.\n"
        "\n"
        "attended  what a row looks at, on average over rows, heads and the layers that retrieve: the tokens of its\n"
        "          own block, every landmark it could choose, and landmark and tokens of each block it chose and of\n"
        "          those in the window\n"
        "mass      the part of all attention that what it saw carries; unknown (-) where nothing was searched",
    .example =
        "  cairn bench ppl -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --top-k 0,2,4,all\n"
        "  cairn bench ppl -m model.gguf --corpus text --length 4K,16K --last 1K --json",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
