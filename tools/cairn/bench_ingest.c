/* bench_ingest.c - tokens a second on the way into a store, against the length of the context, and where the time goes.
 *
 * One text is ingested as 'cairn ingest' does it and is looked at when it reaches each length: what the stretch since
 * the length before took, and everything up to there. Search, fetch and attention are the session's own count, commit
 * is the time in its call, the rest is the model: products with weights, norms, what is appended.
 *
 * Beside it the speed of the same model over its first 4,096 tokens in memory alone: no store, nothing far away. It is
 * measured before the first length and after each, as a machine's speed changes over the minutes a long text takes.
 */
#include "bench.h"
#include "plot.h"
#include "samples.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
    bench_flags bench;
    cli_numbers tokens;
    uint32_t repeats;
    uint64_t prefill;
    const char *plot;
} flags = {.bench = BENCH_FLAGS_INIT, .repeats = 5, .prefill = 4096};

static const cli_option options[] = {
    BENCH_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "tokens", 0, &flags.tokens, "N,...",
               "lengths looked at, BOS included, ascending (16K,64K,256K,1M)", 64, UINT64_C(1) << 32),
    OPT_NUMBER(CLI_SIZE, "prefill", 0, &flags.prefill, "N", "tokens run in memory for comparison (4096)", 64, 1 << 20),
    OPT_NUMBER(CLI_U32, "repeats", 0, &flags.repeats, "N", "of those at a time, after one that warms up (5)", 1, 1000),
    OPT_TEXT("plot", 0, &flags.plot, "FILE.svg", "also draw the figures (needs gnuplot)"),
    BENCH_STORE_OPTIONS(flags.bench),
};

enum { MODEL, SEARCH, FETCH, ATTEND, COMMIT, STAGES };
static const char *const stage_names[STAGES] = {"model", "search", "fetch", "attend", "commit"};

typedef struct cell {
    uint64_t tokens;
    bench_costs stretch, all; /* since the length before; since the begin */
    uint64_t store_bytes, peak_bytes;
    double index; /* seconds of `reindex` at this length */
} cell;

typedef struct run_state {
    bench b;
    bench_text text;
    plot *plot;
    progress bar;
    cell *cells;
    size_t n_cells;
    samples prefill; /* seconds */
} run_state;

static bool go_on(void *arg, uint64_t done, uint64_t total)
{
    (void)arg, (void)done, (void)total;
    return !cli_stopped();
}

/* ---- measuring ---- */

static int measure_prefill(run_state *r)
{
    int code = -1;
    for (uint32_t i = 0; code < 0 && i <= flags.repeats; i++) {
        cairn_session_options opt = r->b.options;
        cairn_session *session = NULL;
        cairn_runtime *runtime = NULL;
        opt.dtype = (cairn_dtype)flags.bench.dtype;
        uint64_t start = cli_now_ns();
        cairn_status st = cairn_session_begin(NULL, r->b.model.shape, NULL, 0, &opt, &session);
        if (st == CAIRN_OK)
            st = cairn_runtime_begin(r->b.model.model, session, flags.bench.session.chunk_blocks, &runtime);
        if (st == CAIRN_OK) st = cairn_runtime_feed(runtime, r->text.tokens, flags.prefill, NULL);
        double seconds = (double)(cli_now_ns() - start) * 1e-9;
        cairn_runtime_end(runtime);
        cairn_session_end(session);
        code = st == CAIRN_OK ? bench_stopped(&r->b) : cli_fail_status(r->b.c, st);
        if (code < 0 && i > 0 && !samples_add(&r->prefill, seconds))
            code = cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    }
    return code;
}

static void add(bench_costs *sum, const bench_costs *x)
{
    sum->tokens += x->tokens;
    sum->all += x->all;
    sum->search += x->search;
    sum->fetch += x->fetch;
    sum->attend += x->attend;
    sum->commit += x->commit;
}

static int measure_cell(run_state *r, size_t i)
{
    cell *of = &r->cells[i];
    cairn_store_stat stat;
    int code = bench_text_grow(&r->text, of->tokens, &r->bar, &of->stretch);
    if (code >= 0) return code;
    if (i > 0) of->all = r->cells[i - 1].all;
    add(&of->all, &of->stretch);
    uint64_t start = cli_now_ns();
    cairn_status st =
        cairn_context_reindex(r->b.store, r->b.model.shape, BENCH_CONTEXT, flags.bench.session.index, go_on, NULL);
    of->index = (double)(cli_now_ns() - start) * 1e-9;
    if (st == CAIRN_CANCELLED) return bench_stopped(&r->b);
    if (st == CAIRN_OK) st = cairn_store_stat_get(r->b.store, &stat);
    if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    of->store_bytes = stat.file_bytes;
    of->peak_bytes = cairn_peak_rss_bytes();
    return -1;
}

static int plan_and_measure(run_state *r)
{
    static uint64_t default_tokens[] = {16 << 10, 64 << 10, 256 << 10, 1 << 20};
    cli_numbers tokens = flags.tokens.n > 0 ? flags.tokens : (cli_numbers){default_tokens, 4};
    int code = bench_lengths_check(r->b.c, tokens);
    if (code >= 0) return code;
    uint64_t last = tokens.items[tokens.n - 1];
    r->cells = calloc(tokens.n, sizeof *r->cells);
    if (r->cells == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    code = bench_text_open(&r->b, last > flags.prefill ? last : flags.prefill, &r->text);
    progress_init(&r->bar, r->b.c, "ingest");
    r->bar.unit = "tokens";
    if (code < 0) code = measure_prefill(r);
    for (size_t i = 0; code < 0 && i < tokens.n; i++) {
        r->cells[i].tokens = tokens.items[i];
        if ((code = measure_cell(r, i)) < 0) r->n_cells = i + 1;
        if (code < 0) code = measure_prefill(r);
    }
    progress_clear(&r->bar);
    return code;
}

/* ---- the report ---- */

static double rate(const bench_costs *x)
{
    return x->all > 0 ? (double)x->tokens / x->all : 0;
}

static double prefill_rate(run_state *r)
{
    double seconds = samples_median(&r->prefill);
    return seconds > 0 ? (double)flags.prefill / seconds : 0;
}

static void stages_of(const bench_costs *x, double out[STAGES])
{
    out[SEARCH] = x->search;
    out[FETCH] = x->fetch;
    out[ATTEND] = x->attend;
    out[COMMIT] = x->commit;
    out[MODEL] = x->all - x->search - x->fetch - x->attend - x->commit;
}

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"tokens",   "tokens/s here", "tokens/s so far", "of prefill",
                                        "model %",  "search %",      "fetch %",         "attend %",
                                        "commit %", "index s",       "store",           "peak RSS"};
    static const bool right[] = {true, true, true, true, true, true, true, true, true, true, true, true};
    human n, speed;
    snprintf(speed.text, sizeof speed.text, "%.0f", prefill_rate(r));
    printf("prefill of %s tokens in memory: %s tokens/s (median of %zu)\n", human_count(&n, flags.prefill), speed.text,
           r->prefill.n);
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        double stages[STAGES];
        human h[5], tokens, share[STAGES], store, peak;
        stages_of(&of->stretch, stages);
        for (int k = 0; k < STAGES; k++)
            snprintf(share[k].text, sizeof share[k].text, "%.0f", 100 * stages[k] / of->stretch.all);
        snprintf(h[0].text, sizeof h[0].text, "%.0f", rate(&of->stretch));
        snprintf(h[1].text, sizeof h[0].text, "%.0f", rate(&of->all));
        snprintf(h[2].text, sizeof h[0].text, "%.2f", rate(&of->all) / prefill_rate(r));
        snprintf(h[3].text, sizeof h[0].text, "%.2f", of->index);
        table_row(t, (const char *const[]){human_count(&tokens, of->tokens), h[0].text, h[1].text, h[2].text,
                                           share[MODEL].text, share[SEARCH].text, share[FETCH].text, share[ATTEND].text,
                                           share[COMMIT].text, h[3].text, human_bytes(&store, of->store_bytes),
                                           human_bytes(&peak, of->peak_bytes)});
    }
    table_print(t);
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        double here[STAGES], all[STAGES];
        json_t *shares = json_object(), *sums = json_object();
        stages_of(&of->stretch, here);
        stages_of(&of->all, all);
        for (int k = 0; k < STAGES; k++) {
            json_object_set_new(shares, stage_names[k], json_real(here[k]));
            json_object_set_new(sums, stage_names[k], json_real(all[k]));
        }
        json_array_append_new(
            cells, json_pack("{s:o, s:f, s:f, s:f, s:f, s:f, s:o, s:o, s:f, s:o, s:o}", "tokens",
                             json_count(of->tokens), "tokens_per_second", rate(&of->stretch), "seconds",
                             of->stretch.all, "average_tokens_per_second", rate(&of->all), "total_seconds", of->all.all,
                             "average_of_prefill", rate(&of->all) / prefill_rate(r), "stage_seconds", shares,
                             "total_stage_seconds", sums, "index_seconds", of->index, "store_bytes",
                             json_count(of->store_bytes), "peak_rss_bytes", json_count(of->peak_bytes)));
    }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->plot, "ingest", "tokens of context", "tokens/s", true, false);
    for (size_t i = 0; i < r->n_cells; i++) {
        double here = rate(&r->cells[i].stretch), all = rate(&r->cells[i].all), x = (double)r->cells[i].tokens;
        plot_point(r->plot, "of the stretch", x, here, here, here);
        plot_point(r->plot, "so far", x, all, all, all);
        plot_point(r->plot, "prefill in memory", x, prefill_rate(r), prefill_rate(r), prefill_rate(r));
    }
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r;
    int code = plot_begin(c, flags.plot, &r.plot);
    if (code < 0) code = bench_begin(c, &flags.bench, true, argc, argv, &r.b);
    if (code < 0) code = plan_and_measure(&r);
    if (code < 0) draw(&r);
    if (code < 0 && c->json) {
        json_t *root = bench_json(&r.b, "ingest", cells_json(&r));
        json_object_set_new(root, "prefill",
                            json_pack("{s:o, s:o, s:f}", "tokens", json_count(flags.prefill), "seconds",
                                      samples_json(&r.prefill), "tokens_per_second", prefill_rate(&r)));
        code = cli_answer_on(c, root);
    } else if (!c->json && r.n_cells > 0) { /* what was found before Ctrl-C is shown too */
        bench_print_head(&r.b);
        print_cells(&r);
    }
    samples_wipe(&r.prefill);
    free(r.cells);
    bench_text_close(&r.text);
    bench_end(&r.b);
    return plot_finish(c, r.plot, code);
}

const cli_command command_bench_ingest = {
    .name = "bench ingest",
    .summary = "tokens a second into a store, against the length of the context",
    .usage = "-m MODEL.gguf --corpus PATH [options] [PATH...]",
    .about =
        "Ingests held-out text and says at each length how fast the last stretch and all of it went, which share of "
        "the\n"
        "stretch's time the model, the search of landmarks, the fetch of tiles, attention and commits took, and how "
        "long\n"
        "an index over it takes to build (--index; auto). Beside it: the same model over its first tokens in memory.",
    .example =
        "  cairn bench ingest -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --tokens 16K,64K\n"
        "  cairn bench ingest -m model.gguf --corpus text --fetch read --ram 64M --json --plot ingest.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
