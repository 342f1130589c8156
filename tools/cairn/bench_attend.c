/* bench_attend.c - attention over selected tiles, beside how fast memory can be read at all.
 *
 * A session over a store without a model attends one row at a time, in `map` mode with all pages in memory. Each row's
 * query is another, so that it selects other blocks; the heads that share a KV head ask for the same ones, so that each
 * tile is used by all of them. Tiles of a step together are larger than the caches. The time is that of the attention
 * alone, as the session's statistics tell it: tiles have been looked up, but none of their bytes read.
 *
 * Beside it, between the steps: the sum of as many bytes of memory, by as many threads.
 */
#include "bench.h"
#include "figures.h"
#include "synth.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { THREADS_MAX = 64, WARM_UP = 1 };

static struct {
    figure_flags figure;
    synth_flags synth;
    cli_numbers head_dims, groups, threads;
    uint64_t bytes;
    int dtype; /* 0 = all of them */
} flags = {.figure = {.repeats = 15}, .synth = SYNTH_FLAGS_INIT, .bytes = 128 << 20};

static const cli_option options[] = {
    OPT_NUMBER(CLI_SIZE, "size", 0, &flags.bytes, "SIZE", "of the tiles one step attends to (128M)", 1 << 16,
               UINT64_C(1) << 40),
    OPT_NUMBER(CLI_U64S, "head-dim", 0, &flags.head_dims, "N,...", "(32,64,128)", 2, 1020),
    OPT_NUMBER(CLI_U64S, "group", 0, &flags.groups, "N,...", "query heads for each KV head (1,4)", 1, 64),
    OPT_NUMBER(CLI_U64S, "threads", 0, &flags.threads, "N,...", "(1 and one per core)", 1, THREADS_MAX),
    OPT_CHOICE("dtype", &flags.dtype, "all|f32|f16|bf16|q8", "element type of the tiles (all: f16, bf16 and q8)"),
    SYNTH_OPTIONS(flags.synth),
    FIGURE_OPTIONS(flags.figure, "15"),
};

typedef struct cell {
    cairn_dtype dtype;
    uint32_t head_dim, group, threads;
    uint64_t bytes; /* keys and values of a step's tiles */
    uint64_t tiles;
    samples attend, read; /* seconds; of memory, for as many bytes */
    samples share;        /* read over attend, pair by pair: 1 is the speed of memory */
} cell;

typedef struct run_state {
    figures f;
    unsigned char *memory; /* what is summed */
    size_t memory_bytes;
    cell *cells;
    size_t n_cells, done;
    const char *kernels;
} run_state;

/* ---- memory ---- */

typedef struct reader {
    const uint64_t *words;
    size_t n;
    uint64_t sum;
} reader;

/* Eight sums at once, so that no addition waits for the one before. */
static void *sum_words(void *arg)
{
    reader *r = arg;
    uint64_t s[8] = {0};
    for (size_t i = 0; i + 8 <= r->n; i += 8)
        for (size_t k = 0; k < 8; k++) s[k] += r->words[i + k];
    for (size_t k = 0; k < 8; k++) r->sum += s[k];
    return NULL;
}

static double read_memory(run_state *r, size_t bytes, uint32_t threads)
{
    static volatile uint64_t keep; /* so that the sum is needed */
    pthread_t id[THREADS_MAX];
    reader part[THREADS_MAX];
    bool started[THREADS_MAX] = {false};
    size_t words = bytes / sizeof(uint64_t) / threads / 8 * 8;
    uint64_t start = cli_now_ns();
    for (uint32_t t = 0; t < threads; t++)
        part[t] = (reader){.words = (const uint64_t *)(const void *)r->memory + t * words, .n = words};
    for (uint32_t t = 1; t < threads; t++) started[t] = pthread_create(&id[t], NULL, sum_words, &part[t]) == 0;
    sum_words(&part[0]);
    for (uint32_t t = 1; t < threads; t++)
        if (started[t])
            pthread_join(id[t], NULL);
        else
            sum_words(&part[t]);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    for (uint32_t t = 0; t < threads; t++) keep += part[t].sum;
    return seconds;
}

/* ---- attention ---- */

static int attend_once(run_state *r, synth *s, cairn_session *session, cell *of, float *rows, bool count)
{
    const size_t width = (size_t)of->group * s->shape.kv_heads * s->shape.head_dim;
    cairn_step_stats stats;
    cairn_token id = 0;
    synth_query(s, true, 0.5, rows);
    memcpy(rows + width, rows, width * sizeof *rows); /* any row will do as the newest key and value */
    cairn_session_stats_reset(session);
    cairn_status st = cairn_session_append(session, 0, 1, rows + width, rows + width);
    if (st == CAIRN_OK) st = cairn_session_attend(session, 0, 1, rows, rows + 2 * width);
    if (st == CAIRN_OK) st = cairn_session_advance(session, &id, 1);
    if (st != CAIRN_OK) return cli_fail_status(r->f.c, st);
    cairn_session_stats(session, &stats);
    of->tiles = stats.tiles;
    of->bytes = stats.tiles * cairn_tile_payload_bytes(s->dtype, s->shape.block_tokens, s->shape.head_dim);
    if (of->bytes > r->memory_bytes)
        return cli_fail(r->f.c, EXIT_FAILED, "a step of %llu bytes", (unsigned long long)of->bytes);
    double attend = (double)stats.attend_ns * 1e-9, read = read_memory(r, of->bytes, of->threads);
    if (count &&
        (!samples_add(&of->attend, attend) || !samples_add(&of->read, read) || !samples_add(&of->share, read / attend)))
        return cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    return figures_stopped(&r->f);
}

static int measure_cell(run_state *r, synth *s, cairn_store *store, uint32_t k, cell *of)
{
    cairn_session_options opt;
    cairn_session_info info;
    cairn_session *session = NULL;
    const char *names[] = {BENCH_CONTEXT};
    s->shape.heads = s->shape.kv_heads * of->group;
    cairn_session_options_init(&opt, sizeof opt, &s->shape);
    opt.fetch = CAIRN_FETCH_MAP;
    opt.policy.top_k = k;
    opt.threads = of->threads;
    opt.ram_bytes = BENCH_ANY_RAM;
    opt.fresh = true; /* no tail, the same own block for all */
    size_t width = (size_t)s->shape.heads * s->shape.head_dim;
    float *rows = malloc(3 * width * sizeof *rows);
    if (rows == NULL) return cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    cairn_status st = cairn_session_begin(store, &s->shape, names, 1, &opt, &session);
    int code = st == CAIRN_OK ? -1 : cli_fail_status(r->f.c, st);
    if (code < 0) {
        cairn_session_info_get(session, &info);
        r->kernels = info.kernels;
    }
    for (uint32_t i = 0; code < 0 && i < WARM_UP + flags.figure.repeats; i++) {
        code = attend_once(r, s, session, of, rows, i >= WARM_UP);
        progress_show(&r->f.bar, ++r->done, r->n_cells * (WARM_UP + flags.figure.repeats));
    }
    cairn_session_end(session);
    free(rows);
    return code;
}

/* Every page into memory and into our page tables: a step that faults measures the kernel. */
static int touch_tiles(run_state *r, cairn_store *store)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    cairn_range range;
    cairn_tile_view view;
    size_t n = 0;
    cairn_status st = cairn_snapshot_begin(store, &snap);
    if (st == CAIRN_OK) st = cairn_snapshot_context(snap, BENCH_CONTEXT, &info);
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, &range, 1, &n);
    for (uint32_t b = 0; st == CAIRN_OK && b < range.count; b++)
        for (uint32_t h = 0; st == CAIRN_OK && h < flags.synth.kv_heads; h++)
            st = cairn_snapshot_tile(snap, (cairn_tile_id){range.segment, range.first + b, 0, (uint16_t)h}, &view);
    cairn_snapshot_end(snap);
    return st == CAIRN_OK ? -1 : cli_fail_status(r->f.c, st);
}

/* One store serves all groups and thread counts of an element type and head dimension. */
static int measure_store(run_state *r, cell *cells, size_t n)
{
    synth s;
    synth_flags like = flags.synth;
    cairn_store *store = NULL;
    char *dir = NULL;
    like.dtype = (int)cells[0].dtype;
    like.head_dim = cells[0].head_dim;
    like.heads = like.kv_heads;
    int code = synth_init(r->f.c, &like, &s);
    size_t tile = cairn_tile_payload_bytes(cells[0].dtype, like.block_tokens, like.head_dim);
    uint64_t k = flags.bytes / (tile * like.kv_heads);
    if (k == 0) k = 1;
    if (code < 0) code = scratch_make(r->f.c, r->f.dir, &dir);
    if (code < 0) code = synth_store(r->f.c, &s, dir, &store);
    /* Twice what a step selects, so that there is something to choose. */
    if (code < 0) code = synth_context(r->f.c, &s, store, BENCH_CONTEXT, 2 * k + 2, NULL);
    if (code < 0) code = touch_tiles(r, store);
    for (size_t i = 0; code < 0 && i < n; i++) code = measure_cell(r, &s, store, (uint32_t)k, &cells[i]);
    cairn_store_close(store);
    scratch_remove(dir);
    synth_wipe(&s);
    return code;
}

/* ---- the run ---- */

static int plan(run_state *r)
{
    static uint64_t default_dims[] = {32, 64, 128}, default_groups[] = {1, 4}, default_threads[2] = {1};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    default_threads[1] = cores < THREADS_MAX ? (uint64_t)cores : THREADS_MAX;
    cli_numbers dims = flags.head_dims.n > 0 ? flags.head_dims : (cli_numbers){default_dims, 3};
    cli_numbers groups = flags.groups.n > 0 ? flags.groups : (cli_numbers){default_groups, 2};
    cli_numbers threads = flags.threads.n > 0 ? flags.threads : (cli_numbers){default_threads, cores > 1 ? 2 : 1};
    static const cairn_dtype all[] = {CAIRN_F16, CAIRN_BF16, CAIRN_Q8};
    size_t n_types = flags.dtype == 0 ? CLI_COUNT_OF(all) : 1, per_store = groups.n * threads.n;
    r->cells = calloc(n_types * dims.n * per_store, sizeof *r->cells);
    if (r->cells == NULL) return cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    for (size_t d = 0; d < n_types; d++)
        for (size_t h = 0; h < dims.n; h++)
            for (size_t i = 0; i < per_store; i++)
                r->cells[r->n_cells++] = (cell){.dtype = flags.dtype == 0 ? all[d] : (cairn_dtype)(flags.dtype - 1),
                                                .head_dim = (uint32_t)dims.items[h],
                                                .group = (uint32_t)groups.items[i / threads.n],
                                                .threads = (uint32_t)threads.items[i % threads.n]};
    r->memory_bytes = 2 * flags.bytes + (64 << 20);
    void *memory = mmap(NULL, r->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return cli_fail(r->f.c, EXIT_FAILED, "out of memory: %zu bytes to be read", r->memory_bytes);
    memset(memory, 1, r->memory_bytes); /* pages of its own, not the kernel's one page of zeros */
    r->memory = memory;
    int code = -1;
    for (size_t at = 0; code < 0 && at < r->n_cells; at += per_store) code = measure_store(r, r->cells + at, per_store);
    return code;
}

static double gigabytes(const cell *of, double seconds)
{
    return seconds > 0 ? (double)of->bytes / seconds * 1e-9 : 0;
}

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"type",    "head dim",    "group",
                                        "threads", "tiles MiB",   "ms (quartiles)",
                                        "GB/s",    "memory GB/s", "of memory (quartiles)"};
    static const bool right[] = {false, true, true, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        human h[8];
        snprintf(h[0].text, sizeof h[0].text, "%u", of->head_dim);
        snprintf(h[1].text, sizeof h[0].text, "%u", of->group);
        snprintf(h[2].text, sizeof h[0].text, "%u", of->threads);
        snprintf(h[3].text, sizeof h[0].text, "%.1f", (double)of->bytes / (1 << 20));
        snprintf(h[4].text, sizeof h[0].text, "%.1f", gigabytes(of, samples_median(&of->attend)));
        snprintf(h[5].text, sizeof h[0].text, "%.1f", gigabytes(of, samples_median(&of->read)));
        table_row(t, (const char *const[]){cairn_dtype_name(of->dtype), h[0].text, h[1].text, h[2].text, h[3].text,
                                           human_samples(&h[6], &of->attend, 1e3, 2), h[4].text, h[5].text,
                                           human_samples(&h[7], &of->share, 1, 2)});
    }
    table_print(t);
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        json_array_append_new(cells, json_pack("{s:s, s:i, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:f, s:f, s:s}", "dtype",
                                               cairn_dtype_name(of->dtype), "head_dim", (int)of->head_dim, "group",
                                               (int)of->group, "threads", (int)of->threads, "tiles",
                                               json_count(of->tiles), "bytes", json_count(of->bytes), "seconds",
                                               samples_json(&of->attend), "memory_seconds", samples_json(&of->read),
                                               "share_of_memory", samples_json(&of->share), "gb_per_second",
                                               gigabytes(of, samples_median(&of->attend)), "memory_gb_per_second",
                                               gigabytes(of, samples_median(&of->read)), "kernels", r->kernels));
    }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->f.plot, "attention over selected tiles", "head dimension", "share of the speed of memory", true,
              false);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        char name[64];
        snprintf(name, sizeof name, "%s, group %u, %u thread%s", cairn_dtype_name(of->dtype), of->group, of->threads,
                 of->threads == 1 ? "" : "s");
        plot_point(r->f.plot, name, of->head_dim, samples_median(&of->share), samples_at(&of->share, 0.25),
                   samples_at(&of->share, 0.75));
    }
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r;
    (void)argc, (void)argv;
    int code = figures_begin(c, &flags.figure, "attend", &r.f);
    if (code < 0) code = plan(&r);
    progress_clear(&r.f.bar);
    if (code < 0) draw(&r);
    if (code < 0 && c->json) {
        code = cli_answer_on(c, figures_json(&r.f, "attend", flags.synth.seed, cells_json(&r)));
    } else if (code < 0) {
        char what[160];
        snprintf(what, sizeof what, "%u steps of one row each, %u KV heads, kernels %s, seed %u", flags.figure.repeats,
                 flags.synth.kv_heads, r.kernels, flags.synth.seed);
        figures_print_head(&r.f, what);
        print_cells(&r);
    }
    for (size_t i = 0; r.cells != NULL && i < r.n_cells; i++) {
        samples_wipe(&r.cells[i].attend);
        samples_wipe(&r.cells[i].read);
        samples_wipe(&r.cells[i].share);
    }
    free(r.cells);
    if (r.memory != NULL) munmap(r.memory, r.memory_bytes);
    return figures_end(&r.f, code);
}

const cli_command command_bench_attend = {
    .name = "bench attend",
    .summary = "attention over selected tiles, beside the speed of memory",
    .usage = "[options]",
    .about =
        "Fills a store, selects tiles of it that are larger in total than the processor's caches, and attends to\n"
        "them, all pages being in memory. Between the steps as many bytes of memory are summed up by as many threads:\n"
        "what no attention can be faster than. Query heads of a group share a KV head and its tiles.",
    .example = "  cairn bench attend\n"
               "  cairn bench attend --dtype f16 --head-dim 128 --group 1,4,8 --threads 1 --json --plot attend.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = 0,
    .run = run,
};
