/* bench_decode.c - what a generated token costs, against the length of the context behind it.
 *
 * One text grows in the store; at each length sessions go on where it ends and are fed the text that follows, a token
 * at a time. Warm: one session, after steps that are not counted. Cold: for each step the store is closed and its pages
 * are dropped from the page cache, so that the first token after opening meets nothing in memory but landmark keys.
 *
 * Dense attention stands beside it: one row over keys and values of the same number and shape, all in RAM and all
 * attended to, by a session without a store that sees every block: the same kernels, no search, no fetch. It is of the
 * layers that retrieve, as many as the model has; one of them is measured. (An ordinary model's attention, which also
 * turns the query to each block's position, takes longer.)
 */
#include "bench.h"
#include "machine.h"
#include "plot.h"
#include "samples.h"
#include "scratch.h"
#include "synth.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { WARM_UP = 32, DENSE_REPEATS = 5 };

static struct {
    bench_flags bench;
    cli_numbers tokens;
    uint32_t steps, cold;
    bool no_dense;
    const char *plot;
} flags = {.bench = BENCH_FLAGS_INIT, .steps = 1000, .cold = 9};

static const cli_option options[] = {
    BENCH_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "tokens", 0, &flags.tokens, "N,...",
               "lengths of the context, BOS included, ascending (16K,64K,256K,1M)", 64, UINT64_C(1) << 32),
    BENCH_STORED_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_U32, "steps", 0, &flags.steps, "N", "warm steps at each length (1000)", 1, 1000000),
    OPT_NUMBER(CLI_U32, "cold", 0, &flags.cold, "N", "cold steps at each length (9)", 0, 10000),
    OPT_FLAG("no-dense", 0, &flags.no_dense, "leave out dense attention, which keeps all keys and values in RAM"),
    OPT_TEXT("plot", 0, &flags.plot, "FILE.svg", "also draw the figures (needs gnuplot)"),
    BENCH_STORE_OPTIONS(flags.bench),
};

typedef struct steps {                     /* of one kind at one length, with one number of threads */
    samples seconds, attention, processor; /* the last: processor time of all threads */
    double search, fetch, attend, foresee; /* sums of seconds */
    uint64_t tier_bytes, map_bytes, read_bytes, tiles, stored, device_bytes, ahead, ahead_used;
} steps;

typedef struct cell {
    uint64_t tokens;
    uint32_t threads;
    steps warm, cold;
    samples dense, dense_processor; /* seconds of attention of one row in all retrieving layers */
    uint64_t dense_bytes;
    double opening; /* seconds of the last warm session's opening */
} cell;

typedef struct run_state {
    bench b;
    bench_text text;
    plot *plot;
    progress bar;
    uint64_t *lengths; /* whole blocks, so that no tail is run before the first step */
    size_t n_lengths;
    uint32_t threads[2];
    size_t n_threads;
    cell *cells; /* (n_lengths, n_threads) */
    float *logits;
} run_state;

/* ---- steps ---- */

static int step(run_state *r, cairn_session *session, cairn_runtime *runtime, cairn_token token, steps *out)
{
    cairn_step_stats s;
    uint64_t device = machine_read_bytes();
    cairn_session_stats_reset(session);
    uint64_t cpu = machine_cpu_ns(), start = cli_now_ns();
    cairn_status st = cairn_runtime_feed(runtime, &token, 1, r->logits);
    double seconds = (double)(cli_now_ns() - start) * 1e-9, processor = (double)(machine_cpu_ns() - cpu) * 1e-9;
    if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
    if (out == NULL) return bench_stopped(&r->b);
    cairn_session_stats(session, &s);
    out->search += (double)s.search_ns * 1e-9;
    out->fetch += (double)s.fetch_ns * 1e-9;
    out->attend += (double)s.attend_ns * 1e-9;
    out->tier_bytes += s.tier_bytes;
    out->map_bytes += s.map_bytes;
    out->read_bytes += s.read_bytes;
    out->tiles += s.tiles;
    out->stored += s.stored_tiles;
    out->foresee += (double)s.foresee_ns * 1e-9;
    out->ahead += s.ahead_tiles;
    out->ahead_used += s.ahead_used;
    out->device_bytes += machine_read_bytes() - device;
    if (!samples_add(&out->seconds, seconds) || !samples_add(&out->processor, processor) ||
        !samples_add(&out->attention, (double)(s.search_ns + s.fetch_ns + s.attend_ns) * 1e-9))
        return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    return bench_stopped(&r->b);
}

/* A session at the context's end: `skip` steps that are not counted, then `n` that are, of the text from token `from`.
 */
static int run_steps(run_state *r, uint32_t threads, uint64_t from, uint32_t skip, uint32_t n, steps *out,
                     double *opening)
{
    cairn_session_options opt = r->b.options;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    const char *names[] = {r->b.context};
    opt.threads = threads;
    uint64_t start = cli_now_ns();
    cairn_status st = cairn_session_begin(r->b.store, r->b.model.shape, names, 1, &opt, &session);
    if (st == CAIRN_OK) cairn_session_info_get(session, &r->b.machine);
    if (st == CAIRN_OK) st = cairn_runtime_begin(r->b.model.model, session, r->b.flags->session.chunk_blocks, &runtime);
    *opening = (double)(cli_now_ns() - start) * 1e-9;
    int code = st == CAIRN_OK ? -1 : cli_fail_status(r->b.c, st);
    for (uint32_t i = 0; code < 0 && i < skip + n; i++)
        code = step(r, session, runtime, r->text.tokens[from + i], i < skip ? NULL : out);
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    return code;
}

/* Where in the text the tokens are that follow the context: it is the text's begin, or another text. */
static uint64_t after(const run_state *r, const cell *of)
{
    return flags.bench.store != NULL ? bench_has_bos(&r->b) : of->tokens;
}

static int measure_cold(run_state *r, cell *of)
{
    int code = -1;
    double opening;
    for (uint32_t i = 0; code < 0 && i < flags.cold; i++) {
        code = bench_reopen(&r->b, true);
        /* Each begins with another token, which looks for other blocks. */
        if (code < 0) code = run_steps(r, of->threads, after(r, of) + i, 0, 1, &of->cold, &opening);
    }
    return code;
}

/* ---- dense attention in RAM ---- */

static uint32_t retrieving_layers(const cairn_attention_shape *shape)
{
    uint32_t n = 0;
    for (uint32_t l = 0; l < shape->layers; l++) n += shape->local_layers == NULL || !shape->local_layers[l];
    return n;
}

static int measure_dense(run_state *r, uint64_t tokens, cell *of)
{
    const cairn_attention_shape *model = r->b.model.shape;
    synth_flags like = {.layers = 1,
                        .heads = model->heads,
                        .kv_heads = model->kv_heads,
                        .head_dim = model->head_dim,
                        .block_tokens = model->block_tokens,
                        .dtype = r->b.flags->dtype,
                        .seed = r->b.flags->seed};
    synth s;
    cairn_session_options opt;
    cairn_session *session = NULL;
    int code = synth_init(r->b.c, &like, &s);
    size_t width = (size_t)model->heads * model->head_dim;
    float *q = malloc(3 * width * sizeof *q);
    if (code < 0 && q == NULL) code = cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    const cairn_attention_shape shape = s.shape;
    cairn_session_options_init(&opt, sizeof opt, &shape);
    opt.policy.top_k = CAIRN_TOP_K_ALL;
    opt.dtype = s.dtype;
    opt.ram_bytes = UINT64_C(1) << 50; /* all of it stays in RAM */
    opt.threads = of->threads;
    cairn_status st = code < 0 ? cairn_session_begin(NULL, &shape, NULL, 0, &opt, &session) : CAIRN_OK;
    if (st != CAIRN_OK) code = cli_fail_status(r->b.c, st);
    if (code < 0) code = synth_append(r->b.c, &s, session, tokens / shape.block_tokens, false, NULL);
    for (uint32_t i = 0; code < 0 && i <= DENSE_REPEATS; i++) {
        cairn_token id = 0;
        synth_query(&s, false, 0.5, q);
        memcpy(q + width, q, width * sizeof *q); /* any row will do as the newest key and value */
        st = cairn_session_append(session, 0, 1, q + width, q + width);
        uint64_t cpu = machine_cpu_ns(), start = cli_now_ns();
        if (st == CAIRN_OK) st = cairn_session_attend(session, 0, 1, q, q + 2 * width);
        double seconds = (double)(cli_now_ns() - start) * 1e-9 * retrieving_layers(model);
        double processor = (double)(machine_cpu_ns() - cpu) * 1e-9 * retrieving_layers(model);
        if (st == CAIRN_OK) st = cairn_session_advance(session, &id, 1);
        if (st != CAIRN_OK) code = cli_fail_status(r->b.c, st);
        if (code < 0 && i > 0 && (!samples_add(&of->dense, seconds) || !samples_add(&of->dense_processor, processor)))
            code = cli_fail(r->b.c, EXIT_FAILED, "out of memory");
        if (code < 0) code = bench_stopped(&r->b);
    }
    of->dense_bytes = tokens / shape.block_tokens * shape.kv_heads *
                      cairn_tile_payload_bytes(s.dtype, shape.block_tokens, shape.head_dim) * retrieving_layers(model);
    cairn_session_end(session);
    free(q);
    synth_wipe(&s);
    return code;
}

/* ---- the run ---- */

static int plan(run_state *r)
{
    static uint64_t default_tokens[] = {16 << 10, 64 << 10, 256 << 10, 1 << 20};
    cli_numbers tokens = flags.tokens.n > 0 ? flags.tokens : (cli_numbers){default_tokens, 4};
    const uint32_t C = r->b.model.shape->block_tokens;
    uint64_t blocks = 0;
    int code = bench_lengths_check(r->b.c, tokens);
    if (code < 0 && flags.bench.store != NULL) {
        code = bench_stored_blocks(&r->b, &blocks);
        tokens.n = 1;
    }
    if (code >= 0) return code;
    r->threads[r->n_threads++] = r->b.options.threads != 0 ? r->b.options.threads : 1;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (r->b.options.threads == 0 && cores > 1) r->threads[r->n_threads++] = (uint32_t)cores;
    r->n_lengths = tokens.n;
    r->lengths = malloc(tokens.n * sizeof *r->lengths);
    r->cells = calloc(tokens.n * r->n_threads, sizeof *r->cells);
    r->logits = malloc(r->b.model.info.vocab * sizeof *r->logits);
    if (r->lengths == NULL || r->cells == NULL || r->logits == NULL)
        return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
    for (size_t i = 0; i < tokens.n; i++)
        r->lengths[i] = flags.bench.store != NULL ? blocks * C : tokens.items[i] / C * C;
    uint64_t more = WARM_UP + (flags.steps > flags.cold ? flags.steps : flags.cold);
    uint64_t before = flags.bench.store != NULL ? bench_has_bos(&r->b) : r->lengths[tokens.n - 1];
    return bench_text_open(&r->b, before + more, &r->text);
}

static int measure(run_state *r)
{
    int code = -1;
    progress_init(&r->bar, r->b.c, "decode");
    r->bar.unit = "tokens";
    for (size_t l = 0; code < 0 && l < r->n_lengths; l++) {
        if (flags.bench.store == NULL) code = bench_text_grow(&r->text, r->lengths[l], &r->bar, NULL);
        for (size_t t = 0; code < 0 && t < r->n_threads; t++) {
            cell *of = &r->cells[l * r->n_threads + t];
            *of = (cell){.tokens = r->lengths[l], .threads = r->threads[t]};
            code = scratch_warm_cache(r->b.c, bench_path(&r->b));
            if (code < 0) code = run_steps(r, of->threads, after(r, of), WARM_UP, flags.steps, &of->warm, &of->opening);
            if (code < 0) code = measure_cold(r, of);
            if (code < 0 && !flags.no_dense) code = measure_dense(r, of->tokens, of);
        }
    }
    progress_clear(&r->bar);
    return code;
}

/* ---- the report ---- */

static double per_step(double sum, const steps *s)
{
    return s->seconds.n > 0 ? sum / (double)s->seconds.n : 0;
}

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"tokens",  "threads", "state",  "p50 ms",   "p95",
                                        "p99",     "cpu",     "search", "fetch",    "attend",
                                        "KiB/tok", "device",  "ahead",  "dense ms", "dense cpu"};
    static const bool right[] = {true, true, false, true, true, true, true, true,
                                 true, true, true,  true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_lengths * r->n_threads; i++) {
        for (int cold = 0; cold < 2; cold++) {
            cell *of = &r->cells[i];
            steps *s = cold ? &of->cold : &of->warm;
            human h[13], tokens;
            if (s->seconds.n == 0) continue;
            snprintf(h[0].text, sizeof h[0].text, "%u", of->threads);
            const double quantiles[] = {0.5, 0.95, 0.99}, parts[] = {s->search, s->fetch, s->attend};
            for (int k = 0; k < 3; k++) {
                snprintf(h[1 + k].text, sizeof h[0].text, "%.2f", 1e3 * samples_at(&s->seconds, quantiles[k]));
                snprintf(h[4 + k].text, sizeof h[0].text, "%.2f", 1e3 * per_step(parts[k], s));
            }
            double bytes = (double)(s->tier_bytes + s->map_bytes + s->read_bytes);
            snprintf(h[7].text, sizeof h[0].text, "%.0f", per_step(bytes, s) / 1024);
            snprintf(h[8].text, sizeof h[0].text, "%.0f", per_step((double)s->device_bytes, s) / 1024);
            h[9].text[0] = 0;
            if (!cold && of->dense.n > 0)
                snprintf(h[9].text, sizeof h[0].text, "%.2f (%.0f x)", 1e3 * samples_median(&of->dense),
                         samples_median(&of->dense) / samples_median(&s->attention));
            snprintf(h[10].text, sizeof h[0].text, "%.2f", 1e3 * samples_median(&s->processor));
            h[11].text[0] = 0;
            if (!cold && of->dense.n > 0)
                snprintf(h[11].text, sizeof h[0].text, "%.2f", 1e3 * samples_median(&of->dense_processor));
            snprintf(h[12].text, sizeof h[0].text, "-");
            if (s->ahead > 0)
                snprintf(h[12].text, sizeof h[0].text, "%.0f %%", 100 * (double)s->ahead_used / (double)s->stored);
            table_row(t, (const char *const[]){human_count(&tokens, of->tokens), h[0].text, cold ? "cold" : "warm",
                                               h[1].text, h[2].text, h[3].text, h[10].text, h[4].text, h[5].text,
                                               h[6].text, h[7].text, h[8].text, h[12].text, h[9].text, h[11].text});
        }
    }
    table_print(t);
    printf("\ncpu: processor time of all threads, median; other processes disturb it less. ");
    printf("search, fetch, attend: mean ms of a step. KiB/tok: tiles used by a step; device: read for it, as the "
           "kernel\n"
           "counts. ahead: share of the stored tiles that were read, or announced, before the query was known. dense: "
           "attention of the same layers over all keys in RAM, and how many times the warm step's "
           "attention.\n");
}

static json_t *steps_json(steps *s)
{
    double n = s->seconds.n > 0 ? (double)s->seconds.n : 1;
    json_t *all = samples_json(&s->seconds);
    json_object_set_new(all, "p95", json_real(samples_at(&s->seconds, 0.95)));
    json_object_set_new(all, "p99", json_real(samples_at(&s->seconds, 0.99)));
    return json_pack("{s:o, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "seconds", all,
                     "attention_seconds", samples_json(&s->attention), "processor_seconds", samples_json(&s->processor),
                     "search_seconds", s->search / n, "fetch_seconds", s->fetch / n, "attend_seconds", s->attend / n,
                     "tiles", (double)s->tiles / n, "tier_bytes", (double)s->tier_bytes / n, "map_bytes",
                     (double)s->map_bytes / n, "read_bytes", (double)s->read_bytes / n, "device_read_bytes",
                     (double)s->device_bytes / n, "foresee_seconds", s->foresee / n, "ahead_tiles",
                     (double)s->ahead / n, "ahead_used_tiles", (double)s->ahead_used / n, "stored_tiles",
                     (double)s->stored / n);
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_lengths * r->n_threads; i++) {
        cell *of = &r->cells[i];
        json_t *dense = of->dense.n == 0 ? json_null()
                                         : json_pack("{s:o, s:o, s:o, s:f}", "seconds", samples_json(&of->dense),
                                                     "processor_seconds", samples_json(&of->dense_processor), "bytes",
                                                     json_count(of->dense_bytes), "over_warm_attention",
                                                     samples_median(&of->dense) / samples_median(&of->warm.attention));
        json_array_append_new(cells, json_pack("{s:o, s:i, s:o, s:o, s:o, s:f}", "tokens", json_count(of->tokens),
                                               "threads", (int)of->threads, "warm", steps_json(&of->warm), "cold",
                                               of->cold.seconds.n > 0 ? steps_json(&of->cold) : json_null(),
                                               "dense_attention", dense, "opening_seconds", of->opening));
    }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->plot, "a generated token", "tokens of context", "ms", true, true);
    for (size_t t = 0; t < r->n_threads; t++)
        for (int kind = 0; kind < 3; kind++)
            for (size_t l = 0; l < r->n_lengths; l++) {
                static const char *const kinds[] = {"warm", "cold", "dense attention alone"};
                cell *of = &r->cells[l * r->n_threads + t];
                samples *s = kind == 0 ? &of->warm.seconds : kind == 1 ? &of->cold.seconds : &of->dense;
                char name[64];
                snprintf(name, sizeof name, "%s, %u thread%s", kinds[kind], of->threads, of->threads == 1 ? "" : "s");
                if (s->n > 0)
                    plot_point(r->plot, name, (double)of->tokens, 1e3 * samples_median(s), 1e3 * samples_at(s, 0.25),
                               1e3 * samples_at(s, 0.75));
            }
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r;
    int code = bench_stored_check(c, &flags.bench, flags.tokens);
    if (code < 0) code = plot_begin(c, flags.plot, &r.plot);
    if (code < 0) code = bench_begin(c, &flags.bench, true, argc, argv, &r.b);
    if (code < 0) code = plan(&r);
    if (code < 0) code = measure(&r);
    if (code < 0) draw(&r);
    if (code < 0 && c->json) {
        code = cli_answer_on(c, bench_json(&r.b, "decode", cells_json(&r)));
    } else if (code < 0) {
        bench_print_head(&r.b);
        print_cells(&r);
    }
    for (size_t i = 0; r.cells != NULL && i < r.n_lengths * r.n_threads; i++) {
        samples *const all[] = {&r.cells[i].warm.seconds,   &r.cells[i].warm.attention, &r.cells[i].cold.seconds,
                                &r.cells[i].cold.attention, &r.cells[i].dense,          &r.cells[i].warm.processor,
                                &r.cells[i].cold.processor, &r.cells[i].dense_processor};
        for (size_t k = 0; k < CLI_COUNT_OF(all); k++) samples_wipe(all[k]);
    }
    free(r.cells);
    free(r.lengths);
    free(r.logits);
    bench_text_close(&r.text);
    bench_end(&r.b);
    return plot_finish(c, r.plot, code);
}

const cli_command command_bench_decode = {
    .name = "bench decode",
    .summary = "time and bytes of a generated token, against the length of the context",
    .usage = "-m MODEL.gguf --corpus PATH [options] [PATH...]",
    .about =
        "Ingests held-out text up to each length in turn and measures single tokens after it: warm, many in one\n"
        "session; cold, the first one after the store was opened with none of its pages in the page cache. Tokens are\n"
        "those of the text that follows. Without --threads everything is measured with one thread and with one per\n"
        "core. Beside it: dense attention of one row over as many keys and values, all of them in RAM.\n"
        "\n"
        "Lengths are rounded down to whole blocks, so that no part of a block is run again before the first token; of\n"
        "a stored context (--store, --context: only read) what follows its last whole block is, at opening.",
    .example =
        "  cairn bench decode -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --tokens 16K,64K\n"
        "  cairn bench decode -m model.gguf --corpus text --tokens 16K,1M --threads 2 --json --plot decode.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
