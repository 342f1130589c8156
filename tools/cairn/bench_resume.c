/* bench_resume.c - from a new process to the first token of an answer.
 *
 * A text is ingested; then `cairn ask` runs as a process of its own, again and again: cold, after the pages of the
 * store were dropped from the page cache, and warm. Its first token is counted from the start of the process: opening
 * the store and the model, loading landmark keys, running the prompt.
 *
 * Beside it, what reading the text took: the time a memory that does not persist costs at each start.
 */
#include "bench.h"
#include "child.h"
#include "plot.h"
#include "samples.h"
#include "scratch.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
    bench_flags bench;
    cli_numbers tokens;
    const char *prompt, *plot;
    uint32_t repeats;
} flags = {.bench = BENCH_FLAGS_INIT, .prompt = "\nWhat is the pass key? The pass key is ", .repeats = 9};

static const cli_option options[] = {
    BENCH_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "tokens", 0, &flags.tokens, "N,...",
               "lengths of the context, BOS included, ascending (16K,256K)", 64, UINT64_C(1) << 32),
    OPT_TEXT("prompt", 0, &flags.prompt, "TEXT", "what is asked (a question of 39 bytes)"),
    OPT_NUMBER(CLI_U32, "repeats", 0, &flags.repeats, "N", "processes of each kind (9)", 1, 10000),
    OPT_TEXT("plot", 0, &flags.plot, "FILE.svg", "also draw the figures (needs gnuplot)"),
    BENCH_STORE_OPTIONS(flags.bench),
};

typedef struct state {               /* of one length: cold or warm */
    samples first, process;          /* seconds */
    uint64_t read_bytes, peak_bytes; /* sum; largest */
} state;

typedef struct cell {
    uint64_t tokens, store_bytes;
    double ingest;   /* seconds to read all of it */
    state states[2]; /* cold, warm */
} cell;
static const char *const state_names[2] = {"cold", "warm"};

typedef struct run_state {
    bench b;
    bench_text text;
    plot *plot;
    progress bar;
    cell *cells;
    size_t n_cells;
} run_state;

/* ---- measuring ---- */

static int ask(run_state *r, state *out)
{
    static const char *const fetches[] = {"auto", "map", "read"};
    const session_flags *s = &flags.bench.session;
    char ram[24], threads[12];
    child got;
    snprintf(ram, sizeof ram, "%llu", (unsigned long long)s->ram_bytes);
    snprintf(threads, sizeof threads, "%u", s->threads);
    const char *args[] = {"ask",
                          r->b.dir,
                          "-m",
                          flags.bench.model,
                          "-c",
                          BENCH_CONTEXT,
                          "-n",
                          "1",
                          "--json",
                          "--fetch",
                          fetches[s->fetch],
                          "--ram",
                          ram,
                          "--threads",
                          threads,
                          "--",
                          flags.prompt,
                          NULL};
    int code = child_run(r->b.c, args, true, &got);
    if (code >= 0) return code;
    double first = 0;
    json_int_t peak = 0;
    const json_t *figures = json_object_get(got.answer, "stats");
    if (json_unpack((json_t *)figures, "{s:F, s:I}", "first_token_seconds", &first, "peak_rss_bytes", &peak) != 0)
        code = cli_fail(r->b.c, EXIT_FAILED, "'cairn ask' did not say when its first token came");
    else if (!samples_add(&out->first, first) || !samples_add(&out->process, got.seconds))
        code = cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    out->read_bytes += got.read_bytes;
    if ((uint64_t)peak > out->peak_bytes) out->peak_bytes = (uint64_t)peak;
    child_wipe(&got);
    return code;
}

static int measure_cell(run_state *r, cell *of, double before)
{
    bench_costs costs;
    cairn_store_stat stat;
    int code = bench_text_grow(&r->text, of->tokens, &r->bar, &costs);
    if (code >= 0) return code;
    of->ingest = before + costs.all;
    cairn_status st = cairn_store_stat_get(r->b.store, &stat);
    if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    of->store_bytes = stat.file_bytes;
    cairn_store_close(r->b.store); /* which unmaps its pages: others have it now */
    r->b.store = NULL;
    for (uint32_t i = 0; code < 0 && i < flags.repeats; i++) {
        code = scratch_drop_cache(r->b.c, r->b.dir);
        if (code < 0) code = ask(r, &of->states[0]);
        if (code < 0) code = bench_stopped(&r->b);
    }
    state warm_up = {0};
    if (code < 0) code = scratch_warm_cache(r->b.c, r->b.dir);
    if (code < 0) code = ask(r, &warm_up);
    samples_wipe(&warm_up.first);
    samples_wipe(&warm_up.process);
    for (uint32_t i = 0; code < 0 && i < flags.repeats; i++) {
        code = ask(r, &of->states[1]);
        if (code < 0) code = bench_stopped(&r->b);
    }
    return code < 0 ? bench_reopen(&r->b, false) : code;
}

static int plan_and_measure(run_state *r)
{
    static uint64_t default_tokens[] = {16 << 10, 256 << 10};
    cli_numbers tokens = flags.tokens.n > 0 ? flags.tokens : (cli_numbers){default_tokens, 2};
    int code = bench_lengths_check(r->b.c, tokens);
    if (code >= 0) return code;
    r->cells = calloc(tokens.n, sizeof *r->cells);
    if (r->cells == NULL) return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    r->n_cells = tokens.n;
    code = bench_text_open(&r->b, tokens.items[tokens.n - 1], &r->text);
    progress_init(&r->bar, r->b.c, "resume");
    r->bar.unit = "tokens";
    for (size_t i = 0; code < 0 && i < tokens.n; i++) {
        r->cells[i].tokens = tokens.items[i];
        code = measure_cell(r, &r->cells[i], i > 0 ? r->cells[i - 1].ingest : 0);
    }
    progress_clear(&r->bar);
    return code;
}

/* ---- the report ---- */

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"tokens",   "state",    "first token ms", "process ms",
                                        "read MiB", "peak RSS", "store",          "reading the text anew"};
    static const bool right[] = {true, false, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++)
        for (int k = 0; k < 2; k++) {
            cell *of = &r->cells[i];
            state *s = &of->states[k];
            human tokens, first, process, read, peak, store, anew;
            snprintf(read.text, sizeof read.text, "%.1f", (double)s->read_bytes / (double)s->first.n / (1 << 20));
            table_row(t, (const char *const[]){
                             human_count(&tokens, of->tokens), state_names[k], human_samples(&first, &s->first, 1e3, 1),
                             human_samples(&process, &s->process, 1e3, 1), read.text, human_bytes(&peak, s->peak_bytes),
                             human_bytes(&store, of->store_bytes), human_seconds(&anew, of->ingest)});
        }
    table_print(t);
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++)
        for (int k = 0; k < 2; k++) {
            cell *of = &r->cells[i];
            state *s = &of->states[k];
            json_array_append_new(
                cells, json_pack("{s:o, s:s, s:o, s:o, s:f, s:o, s:o, s:f}", "tokens", json_count(of->tokens), "state",
                                 state_names[k], "first_token_seconds", samples_json(&s->first), "process_seconds",
                                 samples_json(&s->process), "read_bytes", (double)s->read_bytes / (double)s->first.n,
                                 "peak_rss_bytes", json_count(s->peak_bytes), "store_bytes",
                                 json_count(of->store_bytes), "ingest_seconds", of->ingest));
        }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->plot, "from a new process to the first token", "tokens of context", "ms", true, true);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        for (int k = 0; k < 2; k++) {
            samples *s = &of->states[k].first;
            plot_point(r->plot, state_names[k], (double)of->tokens, 1e3 * samples_median(s), 1e3 * samples_at(s, 0.25),
                       1e3 * samples_at(s, 0.75));
        }
        plot_point(r->plot, "reading the text anew", (double)of->tokens, 1e3 * of->ingest, 1e3 * of->ingest,
                   1e3 * of->ingest);
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
        code = cli_answer_on(c, bench_json(&r.b, "resume", cells_json(&r)));
    } else if (code < 0) {
        bench_print_head(&r.b);
        print_cells(&r);
    }
    for (size_t i = 0; r.cells != NULL && i < r.n_cells; i++)
        for (int k = 0; k < 2; k++) {
            samples_wipe(&r.cells[i].states[k].first);
            samples_wipe(&r.cells[i].states[k].process);
        }
    free(r.cells);
    bench_text_close(&r.text);
    bench_end(&r.b);
    return plot_finish(c, r.plot, code);
}

const cli_command command_bench_resume = {
    .name = "bench resume",
    .summary = "from a new process to the first token, over a stored text",
    .usage = "-m MODEL.gguf --corpus PATH [options] [PATH...]",
    .about =
        "Ingests held-out text and asks about it by 'cairn ask', each time in a new process: cold, with none of the\n"
        "store's pages in the page cache, and warm. The first token is counted from the start of the process. Beside "
        "it\n"
        "the time that reading the text took, which a memory that ends with its process costs at each start.",
    .example =
        "  cairn bench resume -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --tokens 16K,64K\n"
        "  cairn bench resume -m model.gguf --corpus text --fetch read --json --plot resume.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
