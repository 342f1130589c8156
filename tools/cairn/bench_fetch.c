/* bench_fetch.c - a step's tiles from the file: how far from the device's own limit, how far from naive page faults.
 *
 * Every batch takes tiles that nobody has touched since the file's pages were dropped from the page cache, until there
 * are none left: then the store is closed, which unmaps its pages, they are dropped again, and all tiles are fresh once
 * more. What the kernel counts as read from the device stands beside what was asked for and shows that cold was cold.
 *
 * The pages of LMDB's tree are warmed first, by fetching one tile of every few: a step of a session that has run for a
 * while meets them warm too.
 */
#include "bench.h"
#include "device.h"
#include "figures.h"
#include "synth.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, TREE_STRIDE = 32, DEPTH_OF_READ = 128, SETTLE = 128 };

static struct {
    figure_flags figure;
    synth_flags synth;
    cli_numbers batch;
    uint64_t bytes;
} flags = {.figure = {.repeats = 9}, .synth = SYNTH_FLAGS_INIT, .bytes = UINT64_C(1) << 30};

static const cli_option options[] = {
    OPT_NUMBER(CLI_U64S, "batch", 0, &flags.batch, "N,...", "tiles fetched at once (32,128,512)", 1, 65536),
    OPT_NUMBER(CLI_SIZE, "size", 0, &flags.bytes, "SIZE", "of the store's tiles (1G)", 1 << 20, UINT64_C(1) << 42),
    OPT_NUMBER(CLI_U32, "head-dim", 0, &flags.synth.head_dim, "N",
               "with f16 a tile is 8 KiB at 32, 16 at 64, 32 at 128 (128)", 2, 1024),
    OPT_CHOICE("dtype", &flags.synth.dtype, "f32|f16|bf16|q8", "element type of the tiles (f16)"),
    SYNTH_OPTIONS(flags.synth),
    FIGURE_OPTIONS(flags.figure, "9"),
};

/* What is measured of each batch size. */
enum { READ_COLD, READ_MIXED, READ_WARM, MAP_COLD, MAP_MIXED, MAP_WARM, FAULTS, WAYS };
static const char *const way_names[WAYS] = {"read cold", "read mixed", "read warm",  "map cold",
                                            "map mixed", "map warm",   "page faults"};

typedef struct cell {
    size_t batch;
    samples seconds[WAYS];  /* of a batch */
    samples device;         /* seconds of the device for the same number of reads, paired with READ_COLD */
    samples limit;          /* device over READ_COLD, pair by pair: 1 is the device's own speed */
    samples gain;           /* FAULTS over MAP_COLD, pair by pair */
    uint64_t counted[WAYS]; /* read_bytes of the kernel, all repeats */
    uint64_t asked[WAYS];   /* bytes of the tiles that had to come from the device, all repeats */
} cell;

typedef struct run_state {
    figures f;
    synth synth;
    cairn_store *store;
    cairn_snapshot *snap;
    cairn_fetch *fetch[2]; /* READ, MAP */
    device *device;
    char no_device[160];
    uint64_t segment;
    cairn_tile_id *deck; /* tiles nobody touched, from `next` on */
    size_t deck_n, next;
    cairn_tile_id *ids; /* of a batch */
    cairn_tile_view *views;
    uint64_t *numbers; /* of a batch of direct reads */
    size_t tile_bytes; /* in the file, whole pages */
    size_t most;       /* largest batch */
    cell *cells;
    size_t n_cells;
    uint64_t touched; /* keeps the compiler from leaving out what reads memory */
} run_state;

/* ---- the store, and cold ---- */

static void close_store(run_state *r)
{
    for (int i = 0; i < 2; i++) cairn_fetch_free(r->fetch[i]);
    r->fetch[0] = r->fetch[1] = NULL;
    cairn_snapshot_end(r->snap);
    cairn_store_close(r->store);
    r->snap = NULL;
    r->store = NULL;
}

static cairn_status open_store(run_state *r)
{
    static const cairn_fetch_mode modes[2] = {CAIRN_FETCH_READ, CAIRN_FETCH_MAP};
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.no_sync = true;
    cairn_status st = cairn_store_open(r->f.dir, &opt, &r->store);
    if (st == CAIRN_OK) st = cairn_snapshot_begin(r->store, &r->snap);
    /* Room for a warm batch beside a mixed one; no more, so that slots are soon used again, as in a session. */
    uint64_t ram = (uint64_t)2 * r->most * (r->tile_bytes + 512) + (4 << 20);
    for (int i = 0; i < 2 && st == CAIRN_OK; i++) st = cairn_fetch_new(r->store, modes[i], ram, &r->fetch[i]);
    return st;
}

static void shuffle(run_state *r)
{
    for (size_t i = r->deck_n - 1; i > 0; i--) {
        size_t k = (size_t)synth_below(&r->synth, i + 1);
        cairn_tile_id t = r->deck[i];
        r->deck[i] = r->deck[k];
        r->deck[k] = t;
    }
    r->next = 0;
}

/* Every tile of the store, but those that warm the tree. */
static int warm_tree_and_deal(run_state *r)
{
    cairn_geometry g = *cairn_store_geometry(r->store);
    cairn_context_info info;
    cairn_range range;
    size_t n = 0;
    cairn_status st = cairn_snapshot_context(r->snap, BENCH_CONTEXT, &info);
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(r->snap, info.id, &range, 1, &n);
    r->deck_n = 0;
    for (uint32_t b = 0; st == CAIRN_OK && b < range.count; b++)
        for (uint32_t l = 0; l < g.layers; l++)
            for (uint32_t h = 0; st == CAIRN_OK && h < g.kv_heads; h++) {
                cairn_tile_id id = {range.segment, range.first + b, (uint16_t)l, (uint16_t)h};
                if (n++ % TREE_STRIDE != 0) {
                    r->deck[r->deck_n++] = id;
                    continue;
                }
                st = cairn_fetch_submit(r->fetch[0], r->snap, &id, NULL, 1);
                if (st == CAIRN_OK) st = cairn_fetch_wait(r->fetch[0], r->views);
            }
    if (st != CAIRN_OK) return cli_fail_status(r->f.c, st);
    shuffle(r);
    return -1;
}

static int cool(run_state *r)
{
    close_store(r);
    int code = scratch_drop_cache(r->f.c, r->f.dir);
    if (code >= 0) return code;
    cairn_status st = open_store(r);
    return st == CAIRN_OK ? warm_tree_and_deal(r) : cli_fail_status(r->f.c, st);
}

/* `n` fresh tiles. */
static int deal(run_state *r, size_t n, cairn_tile_id *out)
{
    if (r->deck_n - r->next < n) {
        int code = cool(r);
        if (code >= 0) return code;
    }
    memcpy(out, r->deck + r->next, n * sizeof *out);
    r->next += n;
    return -1;
}

/* ---- one batch, each way ---- */

/* Reads all bytes of a tile, as attention will. */
static void touch(run_state *r, const cairn_tile_view *view)
{
    const uint64_t *words = view->keys;
    size_t n = cairn_tile_payload_bytes(view->dtype, view->tokens, view->head_dim) / sizeof *words;
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += words[i];
    r->touched += sum;
}

static int fetch_batch(run_state *r, cell *of, int way, size_t n, size_t fresh)
{
    bool map = way >= MAP_COLD;
    cairn_fetch *fetch = r->fetch[map];
    uint64_t before = machine_read_bytes(), start = cli_now_ns();
    cairn_status st = cairn_fetch_submit(fetch, r->snap, r->ids, NULL, n);
    if (st == CAIRN_OK) st = cairn_fetch_wait(fetch, r->views);
    /* A mapped tile is there when it has been touched; one that was read just now has been, by its hash. */
    for (size_t i = 0; way != READ_COLD && st == CAIRN_OK && i < n; i++) touch(r, &r->views[i]);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    if (st != CAIRN_OK) return cli_fail_status(r->f.c, st);
    of->counted[way] += machine_read_bytes() - before;
    of->asked[way] += fresh * r->tile_bytes;
    return samples_add(&of->seconds[way], seconds) ? -1 : cli_fail(r->f.c, EXIT_FAILED, "out of memory");
}

static int fault_batch(run_state *r, cell *of, size_t n)
{
    uint64_t before = machine_read_bytes(), start = cli_now_ns();
    cairn_status st = CAIRN_OK;
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) st = cairn_snapshot_tile(r->snap, r->ids[i], &r->views[i]);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    if (st != CAIRN_OK) return cli_fail_status(r->f.c, st);
    of->counted[FAULTS] += machine_read_bytes() - before;
    of->asked[FAULTS] += n * r->tile_bytes;
    return samples_add(&of->seconds[FAULTS], seconds) ? -1 : cli_fail(r->f.c, EXIT_FAILED, "out of memory");
}

static int device_batch(run_state *r, cell *of, size_t n)
{
    double seconds = 0;
    if (r->device == NULL) return -1;
    for (size_t i = 0; i < n; i++) r->numbers[i] = synth_below(&r->synth, device_pieces(r->device));
    int code = device_read(r->f.c, r->device, r->numbers, n, DEPTH_OF_READ, &seconds);
    if (code < 0 && !samples_add(&of->device, seconds)) code = cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    return code;
}

static double last_of(const samples *s)
{
    return s->n > 0 ? s->x[s->n - 1] : 0;
}

/* Cold, at once again (warm), then half of them again with as many fresh ones. */
static int three_states(run_state *r, cell *of, int cold)
{
    size_t n = of->batch;
    int code = deal(r, n, r->ids);
    if (code < 0) code = fetch_batch(r, of, cold, n, n);
    if (code < 0) code = fetch_batch(r, of, cold + READ_WARM, n, 0);
    if (code < 0) code = deal(r, n / 2, r->ids);
    return code < 0 ? fetch_batch(r, of, cold + READ_MIXED, n, n / 2) : code;
}

/* A fetch in `read` mode gives back, every SETTLE lookups, what has piled up of the map in memory: here the pages that
 * the ways through the map used meanwhile, which no session in `read` mode has. Uncounted, it is over before the pair.
 */
static int settle(run_state *r)
{
    cairn_status st = CAIRN_OK;
    for (size_t left = SETTLE, n; st == CAIRN_OK && left > 0; left -= n) {
        n = left < r->most ? left : r->most;
        int code = deal(r, n, r->ids);
        if (code >= 0) return code;
        st = cairn_fetch_submit(r->fetch[0], r->snap, r->ids, NULL, n);
        if (st == CAIRN_OK) st = cairn_fetch_wait(r->fetch[0], r->views);
    }
    return st == CAIRN_OK ? -1 : cli_fail_status(r->f.c, st);
}

/* The order within a pair alternates, so that a drift of the device favours neither. Samples are kept in the order they
 * were taken until all are: pairs are of the same round. */
static int round_of(run_state *r, cell *of, bool device_first)
{
    int code = settle(r);
    if (code < 0 && device_first) code = device_batch(r, of, of->batch);
    if (code < 0) code = three_states(r, of, READ_COLD);
    if (code < 0 && !device_first) code = device_batch(r, of, of->batch);
    if (code < 0 && device_first) code = deal(r, of->batch, r->ids);
    if (code < 0 && device_first) code = fault_batch(r, of, of->batch);
    if (code < 0) code = three_states(r, of, MAP_COLD);
    if (code < 0 && !device_first) code = deal(r, of->batch, r->ids);
    if (code < 0 && !device_first) code = fault_batch(r, of, of->batch);
    bool kept = true;
    if (code < 0 && r->device != NULL)
        kept = samples_add(&of->limit, last_of(&of->device) / last_of(&of->seconds[READ_COLD]));
    if (code < 0 && kept)
        kept = samples_add(&of->gain, last_of(&of->seconds[FAULTS]) / last_of(&of->seconds[MAP_COLD]));
    if (!kept) code = cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    return code < 0 ? figures_stopped(&r->f) : code;
}

static void wipe_cell(cell *of)
{
    for (int w = 0; w < WAYS; w++) samples_wipe(&of->seconds[w]);
    samples_wipe(&of->device);
    samples_wipe(&of->limit);
    samples_wipe(&of->gain);
    *of = (cell){.batch = of->batch};
}

static int measure(run_state *r)
{
    uint64_t all = (uint64_t)r->n_cells * (flags.figure.repeats + 1), done = 0;
    r->f.bar.label = "fetch";
    for (uint32_t i = 0; i <= flags.figure.repeats; i++)
        for (size_t k = 0; k < r->n_cells; k++) {
            int code = round_of(r, &r->cells[k], i % 2 == 0);
            if (code >= 0) return code;
            progress_show(&r->f.bar, ++done, all);
            if (i == 0) wipe_cell(&r->cells[k]); /* that was the warm-up */
        }
    return -1;
}

/* ---- making it ---- */

static int plan(run_state *r)
{
    static uint64_t default_batch[] = {32, 128, 512};
    cli_numbers batch = flags.batch.n > 0 ? flags.batch : (cli_numbers){default_batch, 3};
    const cairn_attention_shape *shape = &r->synth.shape;
    for (size_t i = 0; i < batch.n; i++)
        if (batch.items[i] > r->most) r->most = (size_t)batch.items[i];
    size_t tiles_a_block = (size_t)shape->layers * shape->kv_heads;
    size_t record = 16 + 48 + cairn_tile_payload_bytes(r->synth.dtype, shape->block_tokens, shape->head_dim);
    r->tile_bytes = (record + PAGE - 1) / PAGE * PAGE; /* LMDB's page header, ours, keys and values (docs/format.md) */
    uint64_t blocks = flags.bytes / (r->tile_bytes * tiles_a_block), tiles = blocks * tiles_a_block;
    if (tiles - tiles / TREE_STRIDE < r->most + 1) {
        human size;
        return cli_usage(r->f.c, "--size: a store of %s holds %llu tiles of %zu bytes, fewer than a batch of %zu",
                         human_bytes(&size, flags.bytes), (unsigned long long)tiles, r->tile_bytes, r->most);
    }
    r->n_cells = batch.n;
    r->cells = calloc(batch.n, sizeof *r->cells);
    r->deck = malloc(tiles * sizeof *r->deck);
    r->ids = malloc(r->most * sizeof *r->ids);
    r->views = malloc(r->most * sizeof *r->views);
    r->numbers = malloc(r->most * sizeof *r->numbers);
    if (r->cells == NULL || r->deck == NULL || r->ids == NULL || r->views == NULL || r->numbers == NULL)
        return cli_fail(r->f.c, EXIT_FAILED, "out of memory");
    for (size_t i = 0; i < batch.n; i++) r->cells[i].batch = (size_t)batch.items[i];
    int code = synth_store(r->f.c, &r->synth, r->f.dir, &r->store);
    if (code < 0) code = synth_context(r->f.c, &r->synth, r->store, BENCH_CONTEXT, blocks, &r->f.bar);
    if (code < 0) code = cool(r);
    if (code >= 0) return code;
    char *data = scratch_largest(r->f.dir);
    if (data == NULL) return cli_fail(r->f.c, EXIT_FAILED, "no data file below '%s'", r->f.dir);
    code = device_open(r->f.c, data, r->tile_bytes, r->most, &r->device, r->no_device);
    if (code < 0 && r->device == NULL) cli_warn(r->f.c, "the device's own limit is not measured: %s", r->no_device);
    free(data);
    return code;
}

/* ---- the report ---- */

static double gigabytes(const run_state *r, size_t tiles, double seconds)
{
    return seconds > 0 ? (double)(tiles * r->tile_bytes) / seconds * 1e-9 : 0;
}

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"tiles", "way", "ms (quartiles)", "GB/s", "read from device / asked", "beside"};
    static const bool right[] = {true, false, true, true, true, false};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        human batch, ms, rate, ratio, beside;
        if (of->device.n > 0) {
            snprintf(rate.text, sizeof rate.text, "%.2f", gigabytes(r, of->batch, samples_median(&of->device)));
            table_row(t, (const char *const[]){human_count(&batch, of->batch), "device, O_DIRECT",
                                               human_samples(&ms, &of->device, 1e3, 2), rate.text, "", ""});
        }
        for (int w = 0; w < WAYS; w++) {
            snprintf(rate.text, sizeof rate.text, "%.2f", gigabytes(r, of->batch, samples_median(&of->seconds[w])));
            ratio.text[0] = beside.text[0] = 0;
            if (of->asked[w] > 0)
                snprintf(ratio.text, sizeof ratio.text, "%.2f", (double)of->counted[w] / (double)of->asked[w]);
            else
                snprintf(ratio.text, sizeof ratio.text, "%llu B", (unsigned long long)of->counted[w]);
            if (w == READ_COLD && of->limit.n > 0)
                snprintf(beside.text, sizeof beside.text, "%.2f of the device", samples_median(&of->limit));
            if (w == MAP_COLD)
                snprintf(beside.text, sizeof beside.text, "%.1f x page faults", samples_median(&of->gain));
            table_row(t, (const char *const[]){human_count(&batch, of->batch), way_names[w],
                                               human_samples(&ms, &of->seconds[w], 1e3, 2), rate.text, ratio.text,
                                               beside.text});
        }
    }
    table_print(t);
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        for (int w = 0; w < WAYS; w++)
            json_array_append_new(
                cells,
                json_pack("{s:o, s:o, s:s, s:o, s:f, s:o, s:o}", "batch", json_count(of->batch), "tile_bytes",
                          json_count(r->tile_bytes), "way", way_names[w], "seconds", samples_json(&of->seconds[w]),
                          "gb_per_second", gigabytes(r, of->batch, samples_median(&of->seconds[w])),
                          "device_read_bytes", json_count(of->counted[w]), "cold_bytes", json_count(of->asked[w])));
        json_array_append_new(cells, json_pack("{s:o, s:o, s:s, s:o, s:f, s:i}", "batch", json_count(of->batch),
                                               "tile_bytes", json_count(r->tile_bytes), "way", "device", "seconds",
                                               r->device != NULL ? samples_json(&of->device) : json_null(),
                                               "gb_per_second", gigabytes(r, of->batch, samples_median(&of->device)),
                                               "depth", (int)DEPTH_OF_READ));
        json_array_append_new(cells, json_pack("{s:o, s:s, s:o, s:o}", "batch", json_count(of->batch), "way", "ratios",
                                               "read_cold_of_device",
                                               r->device != NULL ? samples_json(&of->limit) : json_null(),
                                               "map_cold_over_page_faults", samples_json(&of->gain)));
    }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->f.plot, "fetching a batch of tiles", "tiles", "GB/s", true, true);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        for (int w = 0; w <= WAYS; w++) {
            samples *s = w < WAYS ? &of->seconds[w] : &of->device;
            if (s->n == 0) continue;
            plot_point(r->f.plot, w < WAYS ? way_names[w] : "device, O_DIRECT", (double)of->batch,
                       gigabytes(r, of->batch, samples_median(s)), gigabytes(r, of->batch, samples_at(s, 0.75)),
                       gigabytes(r, of->batch, samples_at(s, 0.25)));
        }
    }
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r;
    (void)argc, (void)argv;
    int code = synth_init(c, &flags.synth, &r.synth);
    if (code < 0) code = figures_begin(c, &flags.figure, "store", &r.f);
    if (code < 0) code = plan(&r);
    if (code < 0) code = measure(&r);
    progress_clear(&r.f.bar);
    if (code < 0) draw(&r);
    if (code < 0 && c->json) {
        code = cli_answer_on(c, figures_json(&r.f, "fetch", flags.synth.seed, cells_json(&r)));
    } else if (code < 0) {
        human size, tile;
        char what[160];
        snprintf(what, sizeof what, "batches of tiles of %s out of %s, %u times each, seed %u",
                 human_bytes(&tile, r.tile_bytes), human_bytes(&size, flags.bytes), flags.figure.repeats,
                 flags.synth.seed);
        figures_print_head(&r.f, what);
        print_cells(&r);
    }
    close_store(&r);
    device_close(r.device);
    for (size_t i = 0; i < r.n_cells && r.cells != NULL; i++) wipe_cell(&r.cells[i]);
    free(r.cells);
    free(r.deck);
    free(r.ids);
    free(r.views);
    free(r.numbers);
    synth_wipe(&r.synth);
    return figures_end(&r.f, code);
}

const cli_command command_bench_fetch = {
    .name = "bench fetch",
    .summary = "a step's tiles from the file, beside the device and beside page faults",
    .usage = "[options]",
    .about =
        "Fills a store with tiles and fetches random ones of them in batches, as a step of a session does: from the\n"
        "file (cold), from where the fetch keeps them (warm), and half of each (mixed); in 'read' mode, which reads\n"
        "into a RAM tier, and in 'map' mode, which reads ahead and uses the page cache in place. Beside them, in the\n"
        "same round: direct reads of as many pieces of the same size from the same file, as many in flight and "
        "nothing\n"
        "else done with them (the device's limit), and the same tiles touched page by page (page faults).\n"
        "\n"
        "Cold tiles have not been touched since the store was closed and its pages dropped from the page cache; the\n"
        "bytes the kernel counted as read from the device stand beside the bytes that had to come from there.",
    .example = "  cairn bench fetch\n"
               "  cairn bench fetch --head-dim 32 --batch 32,128 --size 256M --repeats 5 --json --plot fetch.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = 0,
    .run = run,
};
