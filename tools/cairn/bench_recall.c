/* bench_recall.c - what each kind of index finds, keeps and costs.
 *
 * Two sources of keys and queries. A model's: text is ingested, and while the text that follows runs through a session,
 * the queries of every search are kept as they were searched. Synthetic ones of a larger model's shape (synth.h).
 *
 * Every kind answers the same queries one at a time, head after head, as a step does, and each of its answers is timed
 * beside one of the exact scan ("scan"; it has learnt from other queries, as in a session) and judged by the index that
 * scores every row in full precision ("exact"): recall   share of the exact k best that are among its k kept     gate
 * mass of its hits as a share of that of the exact k best mass     gate mass of its hits as a share of that of all
 * landmarks For a model also what comes of it: the same tokens through sessions that search with that kind, and how far
 * their next-token distributions are from those of a session to which every block is visible (Kullback-Leibler, bits).
 */
#include "bench.h"
#include "machine.h"
#include "plot.h"
#include "samples.h"
#include "synth.h"

#include <cairn/index.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LESSON = 64 }; /* queries a scan learns from, beside those it is asked */

static struct {
    bench_flags bench;
    cli_numbers tokens, synthetic;
    cli_texts kinds;
    synth_flags synth;
    uint32_t heads, queries, k;
    double far;
    bool no_output, no_learning;
    const char *plot;
} flags = {.bench = BENCH_FLAGS_INIT, .synth = SYNTH_FLAGS_INIT, .heads = 6, .queries = 64, .k = 16, .far = 0.5};

static const cli_option options[] = {
    OPT_TEXT("model", 'm', &flags.bench.model, "FILE", "a GGUF file with a vocabulary of bytes: its keys and queries"),
    OPT_TEXTS("corpus", 'c', &flags.bench.corpus, "PATH",
              "text for it: a file or directory; more may follow as arguments"),
    OPT_REAL("held-out", &flags.bench.held_out, "P",
             "the part of it that training left out; 1 = the model never saw any of it (0.05)", 1e-6, 1),
    OPT_NUMBER(CLI_SIZES, "tokens", 0, &flags.tokens, "N,...", "lengths of the text, ascending (64K,256K)", 64,
               UINT64_C(1) << 32),
    BENCH_STORED_OPTIONS(flags.bench),
    OPT_NUMBER(CLI_SIZES, "synthetic", 0, &flags.synthetic, "N,...", "tokens' worth of synthetic keys (none)", 64,
               UINT64_C(1) << 32),
    OPT_NUMBER(CLI_U32, "head-dim", 0, &flags.synth.head_dim, "N", "of synthetic keys (128)", 2, 1020),
    OPT_NUMBER(CLI_U32, "k", 0, &flags.k, "N", "best of synthetic keys searched for; a model has its own (16)", 1,
               4096),
    OPT_REAL("far", &flags.far, "P", "how unlike the keys synthetic queries are (0.5)", 0, 1),
    OPT_TEXTS("kind", 0, &flags.kinds, "KIND",
              "may be given again (auto, scan, flat, sq8, ivf:nprobe=8, =32, =128); hnsw takes long to build"),
    OPT_NUMBER(CLI_U32, "heads", 0, &flags.heads, "N", "KV heads searched, spread over the layers (6)", 1, 4096),
    OPT_NUMBER(CLI_U32, "queries", 0, &flags.queries, "N", "of each head (64)", 1, 100000),
    OPT_FLAG("no-learning", 0, &flags.no_learning, "the scan as it is before it has learnt from queries"),
    OPT_FLAG("no-output", 0, &flags.no_output, "leave out what comes of it, which needs attention over all blocks"),
    OPT_NUMBER(CLI_U32, "seed", 0, &flags.bench.seed, "N", "of synthetic keys and queries (0)", 0, UINT32_MAX),
    OPT_TEXT("plot", 0, &flags.plot, "FILE.svg", "also draw the figures (needs gnuplot)"),
    OPT_TEXT("dir", 0, &flags.bench.dir, "DIR", "where the store is made ($TMPDIR or /tmp)"),
};

typedef struct keys { /* of one source and length */
    const char *source;
    uint64_t tokens;
    size_t heads, n, m, dim, cap; /* n rows and m queries of each head */
    cairn_dtype dtype;
    uint8_t *rows;     /* (heads, n, dim) */
    float *queries;    /* (heads, cap, dim) */
    uint32_t *wanted;  /* (heads) layer * kv_heads + KV head */
    uint32_t kv_heads; /* of the model */
    size_t *have;      /* (heads) queries so far */
    uint32_t k;
} keys;

typedef struct cell {
    const char *source;
    uint64_t tokens, rows;
    size_t dim;
    uint32_t k;
    char kind[80], made[80], why[200];
    double build;                /* seconds, mean of a head */
    uint64_t bytes;              /* of the index of a head, rows included */
    samples search, scan, share; /* seconds of one query; of the exact scan beside it; search over scan */
    samples recall, kept, mass;
    samples output; /* bits */
} cell;

typedef struct run_state {
    bench b;
    bench_text text;
    machine machine;
    plot *plot;
    progress bar;
    cell *cells;
    size_t n_cells;
    const cairn_token *after; /* what is run after the keys' text */
    float *dense;             /* (queries, vocab) logits when every block is visible */
} run_state;

static int no_memory(run_state *r)
{
    return cli_fail(r->b.c, EXIT_FAILED, "out of memory");
}

/* ---- keys ---- */

static void keys_wipe(keys *x)
{
    free(x->rows);
    free(x->queries);
    free(x->wanted);
    free(x->have);
    *x = (keys){0};
}

static int keys_room(run_state *r, keys *x)
{
    size_t row = x->dim * (x->dtype == CAIRN_F32 ? 4 : 2);
    x->rows = malloc(x->heads * x->n * row);
    x->queries = malloc(x->heads * x->cap * x->dim * sizeof(float));
    x->wanted = malloc(x->heads * sizeof *x->wanted);
    x->have = calloc(x->heads, sizeof *x->have);
    return x->rows != NULL && x->queries != NULL && x->wanted != NULL && x->have != NULL ? -1 : no_memory(r);
}

/* bf16 by rounding to nearest, ties to even. */
static uint16_t half_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static int synthetic_keys(run_state *r, uint64_t tokens, keys *x)
{
    synth_flags like = flags.synth;
    like.heads = like.kv_heads = like.layers = 1;
    like.seed = flags.bench.seed;
    *x = (keys){.source = "synthetic",
                .tokens = tokens,
                .heads = flags.heads,
                .n = tokens / like.block_tokens,
                .m = flags.queries,
                .cap = flags.queries + LESSON,
                .dim = like.head_dim,
                .dtype = CAIRN_BF16,
                .k = flags.k};
    int code = keys_room(r, x);
    float *rows = code < 0 ? malloc(x->n * x->dim * sizeof *rows) : NULL;
    if (code < 0 && rows == NULL) code = no_memory(r);
    for (size_t h = 0; code < 0 && h < x->heads; h++) {
        synth s;
        if ((code = synth_init(r->b.c, &like, &s)) < 0) {
            synth_landmarks(&s, x->n, rows);
            uint16_t *to = (uint16_t *)(void *)x->rows + h * x->n * x->dim;
            for (size_t i = 0; i < x->n * x->dim; i++) to[i] = half_of(rows[i]);
            for (size_t i = 0; i < x->cap; i++)
                synth_search(&s, rows + synth_below(&s, x->n) * x->dim, flags.far,
                             x->queries + (h * x->cap + i) * x->dim);
        }
        synth_wipe(&s);
        like.seed += 1000003; /* another head */
    }
    free(rows);
    return code;
}

typedef struct loader {
    keys *x;
    uint32_t first_layer;
    size_t n;
} loader;

static bool take_landmarks(void *arg, uint32_t block, cairn_span payload)
{
    loader *l = arg;
    size_t row = l->x->dim * (l->x->dtype == CAIRN_F32 ? 4 : 2);
    (void)block;
    for (size_t h = 0; h < l->x->heads; h++) {
        size_t at = l->x->wanted[h] - (size_t)l->first_layer * l->x->kv_heads;
        memcpy(l->x->rows + (h * l->x->n + l->n) * row, (const uint8_t *)payload.data + at * row, row);
    }
    l->n++;
    return true;
}

static void take_queries(void *arg, uint32_t layer, uint32_t kv_head, const float *queries, size_t n)
{
    keys *x = arg;
    for (size_t h = 0; h < x->heads; h++) {
        if (x->wanted[h] != layer * x->kv_heads + kv_head) continue;
        for (size_t i = 0; i < n && x->have[h] < x->cap; i++)
            memcpy(x->queries + (h * x->cap + x->have[h]++) * x->dim, queries + i * x->dim, x->dim * sizeof *queries);
    }
}

/* Of the first x->n blocks of the context. */
static cairn_status load_landmarks(run_state *r, loader *l)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    size_t n = 0;
    cairn_range *ranges = NULL;
    cairn_status st = cairn_snapshot_begin(r->b.store, &snap);
    if (st == CAIRN_OK) st = cairn_snapshot_context(snap, r->b.context, &info);
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, NULL, 0, &n);
    if (st == CAIRN_OK && (ranges = malloc((n + 1) * sizeof *ranges)) == NULL) st = CAIRN_NO_MEMORY;
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, ranges, n, &n);
    for (size_t i = 0; i < n && st == CAIRN_OK && l->n < l->x->n; i++) {
        size_t some = ranges[i].count < l->x->n - l->n ? ranges[i].count : l->x->n - l->n;
        st = cairn_snapshot_landmarks(snap, ranges[i].segment, ranges[i].first, (uint32_t)some, take_landmarks, l);
    }
    cairn_snapshot_end(snap);
    free(ranges);
    return st;
}

/* The text's landmark keys and the queries of the tokens that follow it. */
static int model_keys(run_state *r, uint64_t tokens, keys *x)
{
    const cairn_attention_shape *shape = r->b.model.shape;
    const cairn_geometry *g = cairn_store_geometry(r->b.store);
    size_t pairs = 0;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    const char *names[] = {r->b.context};
    cairn_session_options opt = r->b.options;
    opt.threads = 1; /* so that queries come one batch after the other */
    opt.ram_bytes = BENCH_ANY_RAM;
    opt.index_kind = "scan";
    uint32_t per = shape->heads / shape->kv_heads;
    for (uint32_t l = g->first_layer; l < shape->layers; l++)
        if (shape->local_layers == NULL || !shape->local_layers[l]) pairs += shape->kv_heads;
    *x = (keys){.source = "model",
                .tokens = tokens,
                .heads = pairs < flags.heads ? pairs : flags.heads,
                .n = tokens / shape->block_tokens,
                .cap = flags.queries + LESSON,
                .dim = shape->head_dim,
                .dtype = cairn_landmark_dtype(g->dtype),
                .kv_heads = shape->kv_heads,
                .k = shape->top_k};
    int code = keys_room(r, x);
    size_t pair = 0, h = 0;
    for (uint32_t l = g->first_layer; code < 0 && l < shape->layers; l++)
        for (uint32_t i = 0; (shape->local_layers == NULL || !shape->local_layers[l]) && i < shape->kv_heads;
             i++, pair++)
            if (h < x->heads && pair == h * pairs / x->heads) x->wanted[h++] = l * shape->kv_heads + i;
    loader load = {.x = x, .first_layer = g->first_layer};
    cairn_status st = code < 0 ? load_landmarks(r, &load) : CAIRN_OK;
    if (code < 0 && st == CAIRN_OK) st = cairn_session_begin(r->b.store, shape, names, 1, &opt, &session);
    if (code < 0 && st == CAIRN_OK) cairn_session_info_get(session, &r->b.machine);
    if (code < 0 && st == CAIRN_OK) cairn_session_watch(session, take_queries, x);
    if (code < 0 && st == CAIRN_OK) st = cairn_runtime_begin(r->b.model.model, session, 0, &runtime);
    uint64_t steps = (x->cap + per - 1) / per;
    for (uint64_t i = 0; code < 0 && st == CAIRN_OK && i < steps; i++)
        st = cairn_runtime_feed(runtime, r->after + i, 1, r->dense); /* with logits: the last layer too */
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    if (code < 0 && st != CAIRN_OK) code = cli_fail_status(r->b.c, st);
    if (code >= 0) return code;
    x->m = flags.queries;
    for (h = 0; h < x->heads; h++)
        if (x->have[h] < x->cap) x->m = 0;
    if (x->m == 0)
        return cli_fail(r->b.c, EXIT_FAILED, "%llu tokens are too few: nothing is far enough back to be searched for",
                        (unsigned long long)tokens);
    return -1;
}

/* ---- one kind ---- */

typedef struct set { /* an index of each head */
    cairn_index **index;
    size_t n;
} set;

static void set_free(set *s)
{
    for (size_t i = 0; s->index != NULL && i < s->n; i++) cairn_index_free(s->index[i]);
    free(s->index);
    *s = (set){0};
}

static int set_new(run_state *r, const keys *x, const char *kind, set *out, double *seconds)
{
    size_t row = x->dim * (x->dtype == CAIRN_F32 ? 4 : 2);
    *out = (set){.index = calloc(x->heads, sizeof *out->index), .n = x->heads};
    if (out->index == NULL) return no_memory(r);
    uint64_t start = cli_now_ns();
    for (size_t h = 0; h < x->heads; h++) {
        cairn_status st = cairn_index_new(kind, (uint32_t)x->dim, x->dtype, &out->index[h]);
        if (st == CAIRN_OK) st = cairn_index_add(out->index[h], x->n, x->rows + h * x->n * row);
        if (st == CAIRN_OK) st = cairn_index_seal(out->index[h], x->n);
        if (st == CAIRN_OK &&
            cairn_index_may_learn(out->index[h])) /* as a session lets it, from others than are timed */
            st = cairn_index_learn(out->index[h], x->queries + (h * x->cap + x->m) * x->dim, LESSON, x->k, 1);
        if (st != CAIRN_OK) return cli_fail_status(r->b.c, st);
        if (cli_stopped()) return cli_fail(r->b.c, EXIT_FAILED, "interrupted while building '%s'", kind);
    }
    *seconds = (double)(cli_now_ns() - start) * 1e-9 / (double)x->heads;
    return -1;
}

static int search(run_state *r, const cairn_index *index, cairn_index_scratch *scratch, const keys *x, const float *q,
                  cairn_index_hit *hits, uint32_t *found, cairn_index_mass *mass, double *seconds)
{
    cairn_index_query query = {q, 0, (uint32_t)x->n};
    uint64_t start = cli_now_ns();
    cairn_status st = cairn_index_search(index, scratch, &query, 1, x->k, hits, found, mass);
    *seconds = (double)(cli_now_ns() - start) * 1e-9;
    return st == CAIRN_OK ? -1 : cli_fail_status(r->b.c, st);
}

/* exp(score - base) summed: a gate mass without its denominator. */
static double gates(const cairn_index_hit *hits, uint32_t n, double base)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += exp((double)hits[i].score - base);
    return sum;
}

static bool judge(cell *of, const cairn_index_hit *hits, uint32_t found, const cairn_index_hit *best, uint32_t n_best,
                  double lse)
{
    uint32_t common = 0;
    for (uint32_t i = 0; i < n_best; i++)
        for (uint32_t k = 0; k < found; k++) common += hits[k].id == best[i].id;
    double mine = gates(hits, found, lse), most = gates(best, n_best, lse);
    return samples_add(&of->recall, n_best > 0 ? (double)common / n_best : 1) &&
           samples_add(&of->kept, most > 0 ? mine / most : 1) && samples_add(&of->mass, mine);
}

static int measure_kind(run_state *r, const keys *x, const set *exact, const set *scan, cell *of)
{
    set own;
    cairn_index_scratch *scratch = NULL;
    cairn_index_hit *hits = malloc(3 * (size_t)x->k * sizeof *hits);
    int code = set_new(r, x, of->made, &own, &of->build);
    if (code < 0 && hits == NULL) code = no_memory(r);
    cairn_status st = code < 0 ? cairn_index_scratch_new(&scratch) : CAIRN_OK;
    if (st != CAIRN_OK) code = cli_fail_status(r->b.c, st);
    if (code < 0) of->bytes = cairn_index_bytes(own.index[0]);
    /* The first query of each head is asked twice: once to warm up. */
    for (size_t i = 0; code < 0 && i <= x->m; i++)
        for (size_t h = 0; code < 0 && h < x->heads; h++) {
            const float *q = x->queries + (h * x->cap + (i > 0 ? i - 1 : 0)) * x->dim;
            uint32_t found[3];
            cairn_index_mass mass;
            double seconds, scan_seconds, unused;
            /* In turn, so that neither always finds the caches the other left. */
            if (i % 2 == 0) code = search(r, scan->index[h], scratch, x, q, hits, &found[0], NULL, &scan_seconds);
            if (code < 0) code = search(r, own.index[h], scratch, x, q, hits + x->k, &found[1], NULL, &seconds);
            if (code < 0 && i % 2 != 0)
                code = search(r, scan->index[h], scratch, x, q, hits, &found[0], NULL, &scan_seconds);
            if (code < 0) code = search(r, exact->index[h], scratch, x, q, hits + 2 * x->k, &found[2], &mass, &unused);
            if (code >= 0 || i == 0) continue;
            if (!judge(of, hits + x->k, found[1], hits + 2 * x->k, found[2], (double)mass.lse) ||
                !samples_add(&of->search, seconds) || !samples_add(&of->scan, scan_seconds) ||
                !samples_add(&of->share, seconds / scan_seconds))
                code = no_memory(r);
            if (cli_stopped()) code = cli_fail(r->b.c, EXIT_FAILED, "interrupted");
        }
    cairn_index_scratch_free(scratch);
    free(hits);
    set_free(&own);
    return code;
}

/* ---- what comes of it ---- */

/* Runs the tokens after the text; NULL kind: every block visible, logits are kept; else compared with those. */
static int run_tokens(run_state *r, const char *kind, samples *out)
{
    const uint32_t vocab = r->b.model.info.vocab;
    cairn_session_options opt = r->b.options;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    const char *names[] = {r->b.context};
    opt.index_kind = kind;
    opt.ram_bytes = BENCH_ANY_RAM;
    if (kind == NULL) opt.policy.top_k = CAIRN_TOP_K_ALL;
    float *logits = malloc(vocab * sizeof *logits);
    if (logits == NULL) return no_memory(r);
    cairn_status st = cairn_session_begin(r->b.store, r->b.model.shape, names, 1, &opt, &session);
    if (st == CAIRN_OK) st = cairn_runtime_begin(r->b.model.model, session, 0, &runtime);
    for (uint32_t i = 0; st == CAIRN_OK && i < flags.queries && !cli_stopped(); i++) {
        float *dense = r->dense + (size_t)i * vocab;
        st = cairn_runtime_feed(runtime, r->after + i, 1, kind == NULL ? dense : logits);
        if (kind == NULL || st != CAIRN_OK) continue;
        double most[2] = {dense[0], logits[0]}, sum[2] = {0, 0}, bits = 0;
        for (uint32_t v = 0; v < vocab; v++) {
            most[0] = fmax(most[0], dense[v]);
            most[1] = fmax(most[1], logits[v]);
        }
        for (uint32_t v = 0; v < vocab; v++) {
            sum[0] += exp(dense[v] - most[0]);
            sum[1] += exp(logits[v] - most[1]);
        }
        for (uint32_t v = 0; v < vocab; v++) {
            double p = dense[v] - most[0] - log(sum[0]), q = logits[v] - most[1] - log(sum[1]);
            bits += exp(p) * (p - q) / log(2);
        }
        if (!samples_add(out, bits)) st = CAIRN_NO_MEMORY;
    }
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    free(logits);
    if (cli_stopped()) return cli_fail(r->b.c, EXIT_FAILED, "interrupted");
    return st == CAIRN_OK ? -1 : cli_fail_status(r->b.c, st);
}

/* ---- the run ---- */

static bool go_on(void *arg, uint64_t done, uint64_t total)
{
    (void)arg, (void)done, (void)total;
    return !cli_stopped();
}

/* What `auto` means for these keys: of a stored text what reindex makes of it, else a calibration on the keys alone. */
static int resolve_auto(run_state *r, const keys *x, const set *scan, cell *of)
{
    cairn_status st;
    char why[160] = "";
    if (strcmp(x->source, "synthetic") == 0) {
        st = cairn_index_calibrate(scan->index[0], NULL, 0, x->k, 2000, of->made, why);
    } else {
        cairn_snapshot *snap = NULL;
        cairn_context_info info;
        cairn_range range;
        cairn_segment_info segment;
        size_t n = 0;
        st = CAIRN_OK; /* one that was there already keeps the index it has */
        if (flags.bench.store == NULL)
            st = cairn_context_reindex(r->b.store, r->b.model.shape, r->b.context, "auto", go_on, NULL);
        if (st == CAIRN_OK) st = cairn_snapshot_begin(r->b.store, &snap);
        if (st == CAIRN_OK) st = cairn_snapshot_context(snap, r->b.context, &info);
        if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, &range, 1, &n);
        if (st == CAIRN_OK) st = cairn_snapshot_segment(snap, range.segment, &segment);
        cairn_snapshot_end(snap);
        if (st == CAIRN_OK)
            snprintf(of->made, sizeof of->made, "%s", segment.index_made[0] != 0 ? segment.index_made : "scan");
        if (st == CAIRN_OK) snprintf(why, sizeof why, "%s", segment.index_why);
    }
    snprintf(of->why, sizeof of->why, "%s", why);
    return st == CAIRN_OK ? -1 : cli_fail_status(r->b.c, st);
}

static int measure_keys(run_state *r, const keys *x, cell *cells, size_t n)
{
    set exact = {0}, scan = {0};
    double unused;
    bool output = strcmp(x->source, "model") == 0 && !flags.no_output;
    int code = set_new(r, x, "exact", &exact, &unused);
    if (code < 0) code = set_new(r, x, "scan", &scan, &unused);
    if (code < 0 && output) code = run_tokens(r, NULL, NULL);
    for (size_t i = 0; code < 0 && i < n; i++) {
        cell *of = &cells[i];
        of->source = x->source;
        of->tokens = x->tokens;
        of->rows = x->n;
        of->dim = x->dim;
        of->k = x->k;
        snprintf(of->made, sizeof of->made, "%s", of->kind);
        if (strcmp(of->kind, "auto") == 0) code = resolve_auto(r, x, &scan, of);
        if (code < 0) code = measure_kind(r, x, &exact, &scan, of);
        if (code < 0 && output) code = run_tokens(r, of->made, &of->output);
        progress_show(&r->bar, (uint64_t)(of - r->cells) + 1, r->n_cells);
    }
    set_free(&exact);
    set_free(&scan);
    return code;
}

/* Texts that are ingested: each length goes on from the one before. */
static int measure_texts(run_state *r, cli_numbers tokens, size_t n_kinds)
{
    const uint32_t C = r->b.model.shape->block_tokens;
    int code = bench_text_open(&r->b, tokens.items[tokens.n - 1] / C * C + flags.queries + LESSON, &r->text);
    for (size_t i = 0; code < 0 && i < tokens.n; i++) {
        const uint64_t whole = tokens.items[i] / C * C;
        keys x = {0};
        code = bench_text_grow(&r->text, whole, NULL, NULL);
        r->after = r->text.tokens + whole;
        if (code < 0) code = model_keys(r, whole, &x);
        if (code < 0) code = measure_keys(r, &x, r->cells + i * n_kinds, n_kinds);
        keys_wipe(&x);
    }
    return code;
}

/* A context that is there already, with the text's begin after it. */
static int measure_stored(run_state *r, size_t n_kinds)
{
    keys x = {0};
    uint64_t blocks = 0;
    int code = bench_stored_blocks(&r->b, &blocks);
    const size_t bos = bench_has_bos(&r->b);
    if (code < 0) code = bench_text_open(&r->b, bos + flags.queries + LESSON, &r->text);
    r->after = code < 0 ? r->text.tokens + bos : NULL;
    if (code < 0) code = model_keys(r, blocks * r->b.model.shape->block_tokens, &x);
    if (code < 0) code = measure_keys(r, &x, r->cells, n_kinds);
    keys_wipe(&x);
    return code;
}

static int plan_and_measure(run_state *r, int argc, char **argv)
{
    static const char *default_kinds[] = {"auto",         "scan",          "flat",          "sq8",
                                          "ivf:nprobe=8", "ivf:nprobe=32", "ivf:nprobe=128"};
    static uint64_t default_tokens[] = {64 << 10, 256 << 10};
    cli_texts kinds = flags.kinds.n > 0 ? flags.kinds : (cli_texts){default_kinds, CLI_COUNT_OF(default_kinds)};
    cli_numbers tokens =
        flags.tokens.n > 0 ? flags.tokens : (cli_numbers){default_tokens, CLI_COUNT_OF(default_tokens)};
    const size_t contexts = flags.bench.model == NULL ? 0 : flags.bench.store != NULL ? 1 : tokens.n;
    int code = bench_lengths_check(r->b.c, tokens);
    if (code >= 0) return code;
    r->n_cells = (contexts + flags.synthetic.n) * kinds.n;
    r->cells = calloc(r->n_cells, sizeof *r->cells);
    if (r->cells == NULL) return no_memory(r);
    for (size_t i = 0; i < r->n_cells; i++)
        snprintf(r->cells[i].kind, sizeof r->cells[i].kind, "%s", kinds.items[i % kinds.n]);
    if (contexts > 0) {
        code = bench_begin(r->b.c, &flags.bench, true, argc, argv, &r->b);
        for (size_t i = 0; i < kinds.n && code < 0; i++) code = index_kind_check(r->b.c, kinds.items[i], &r->b.model);
        r->dense = code < 0 ? malloc((size_t)flags.queries * r->b.model.info.vocab * sizeof *r->dense) : NULL;
        if (code < 0 && r->dense == NULL) code = no_memory(r);
        if (code < 0) code = flags.bench.store != NULL ? measure_stored(r, kinds.n) : measure_texts(r, tokens, kinds.n);
    }
    cli_catch_signals();
    for (size_t i = 0; code < 0 && i < flags.synthetic.n; i++) {
        keys x = {0};
        code = synthetic_keys(r, flags.synthetic.items[i], &x);
        if (code < 0) code = measure_keys(r, &x, r->cells + (contexts + i) * kinds.n, kinds.n);
        keys_wipe(&x);
    }
    return code;
}

/* ---- the report ---- */

static void print_cells(run_state *r)
{
    static const char *const heads[] = {"keys",     "tokens",   "dim",    "k",         "kind",   "build s", "search us",
                                        "x scan's", "recall@k", "kept %", "kept p1 %", "mass %", "KL bits"};
    static const bool right[] = {false, true, true, true, false, true, true, true, true, true, true, true, true};
    table *t = table_new(CLI_COUNT_OF(heads), heads, right);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        human h[9], tokens, dim;
        char kind[200];
        snprintf(kind, sizeof kind, "%s%s%s", of->kind, strcmp(of->kind, "auto") == 0 ? " = " : "",
                 strcmp(of->kind, "auto") == 0 ? of->made : "");
        snprintf(dim.text, sizeof dim.text, "%zu", of->dim);
        snprintf(h[0].text, sizeof h[0].text, "%u", of->k);
        snprintf(h[1].text, sizeof h[0].text, "%.2f", of->build);
        human_samples(&h[2], &of->search, 1e6, 0);
        snprintf(h[3].text, sizeof h[0].text, "%.2f", samples_median(&of->search) / samples_median(&of->scan));
        snprintf(h[4].text, sizeof h[0].text, "%.3f", samples_mean(&of->recall));
        snprintf(h[5].text, sizeof h[0].text, "%.2f", 100 * samples_mean(&of->kept));
        snprintf(h[6].text, sizeof h[0].text, "%.2f", 100 * samples_at(&of->kept, 0.01));
        snprintf(h[7].text, sizeof h[0].text, "%.1f", 100 * samples_mean(&of->mass));
        snprintf(h[8].text, sizeof h[0].text, of->output.n > 0 ? "%.4f" : "-", samples_mean(&of->output));
        table_row(t, (const char *const[]){of->source, human_count(&tokens, of->tokens), dim.text, h[0].text, kind,
                                           h[1].text, h[2].text, h[3].text, h[4].text, h[5].text, h[6].text, h[7].text,
                                           h[8].text});
    }
    table_print(t);
    for (size_t i = 0; i < r->n_cells; i++) {
        human tokens;
        if (r->cells[i].why[0] != 0)
            printf("auto, %s %s: %s\n", r->cells[i].source, human_count(&tokens, r->cells[i].tokens), r->cells[i].why);
    }
}

static json_t *cells_json(run_state *r)
{
    json_t *cells = json_array();
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        json_t *one = json_pack("{s:s, s:o, s:o, s:i, s:i, s:s, s:s, s:s, s:f, s:o}", "keys", of->source, "tokens",
                                json_count(of->tokens), "rows", json_count(of->rows), "dim", (int)of->dim, "k",
                                (int)of->k, "kind", of->kind, "made", of->made, "why", of->why, "build_seconds",
                                of->build, "index_bytes", json_count(of->bytes));
        json_t *more = json_pack("{s:o, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:o}", "search_seconds",
                                 samples_json(&of->search), "scan_seconds", samples_json(&of->scan), "over_scan",
                                 samples_json(&of->share), "recall", samples_mean(&of->recall), "kept",
                                 samples_mean(&of->kept), "kept_p1", samples_at(&of->kept, 0.01), "mass",
                                 samples_mean(&of->mass), "mass_p1", samples_at(&of->mass, 0.01), "output_bits",
                                 of->output.n > 0 ? json_real(samples_mean(&of->output)) : json_null());
        json_object_update(one, more);
        json_decref(more);
        json_array_append_new(cells, one);
    }
    return cells;
}

static void draw(run_state *r)
{
    plot_axes(r->plot, "kinds of index", "microseconds of a search", "share of the exact k best's gate mass", true,
              false);
    for (size_t i = 0; i < r->n_cells; i++) {
        cell *of = &r->cells[i];
        human tokens;
        char name[128];
        snprintf(name, sizeof name, "%s, %s %s", of->kind, of->source, human_count(&tokens, of->tokens));
        plot_point(r->plot, name, 1e6 * samples_median(&of->search), samples_mean(&of->kept),
                   samples_at(&of->kept, 0.01), samples_mean(&of->kept));
    }
}

static json_t *report_json(run_state *r)
{
    json_t *root = flags.bench.model != NULL
                       ? bench_json(&r->b, "recall", cells_json(r))
                       : json_pack("{s:s, s:s, s:o, s:I, s:o, s:o}", "bench", "recall", "version", cairn_version(),
                                   "machine", machine_json(&r->machine), "seed", (json_int_t)flags.bench.seed,
                                   "peak_rss_bytes", json_count(cairn_peak_rss_bytes()), "cells", cells_json(r));
    return root;
}

static int run(cli *c, int argc, char **argv)
{
    static run_state r;
    r.b.c = c;
    if (flags.bench.model == NULL && flags.synthetic.n == 0)
        return cli_usage(c, "--model FILE or --synthetic N,... is required: where keys come from");
    if (flags.bench.model != NULL && flags.bench.corpus.n + (size_t)argc == 0)
        return cli_usage(c, "--corpus PATH is required with --model");
    if (flags.bench.store != NULL && flags.bench.model == NULL)
        return cli_usage(c, "--store is asked with the --model it was made with");
    int code = bench_stored_check(c, &flags.bench, flags.tokens);
    if (code < 0) code = plot_begin(c, flags.plot, &r.plot);
    machine_read(&r.machine, ".");
    progress_init(&r.bar, c, "recall");
    if (code < 0) code = plan_and_measure(&r, argc, argv);
    progress_clear(&r.bar);
    if (code < 0) draw(&r);
    if (code < 0 && c->json) {
        code = cli_answer_on(c, report_json(&r));
    } else if (code < 0) {
        char line[512];
        if (flags.bench.model != NULL)
            bench_print_head(&r.b);
        else if (!c->quiet)
            printf("machine  %s\n\n", machine_line(&r.machine, line));
        print_cells(&r);
    }
    for (size_t i = 0; r.cells != NULL && i < r.n_cells; i++) {
        samples *const all[] = {&r.cells[i].search, &r.cells[i].scan, &r.cells[i].share, &r.cells[i].recall,
                                &r.cells[i].kept,   &r.cells[i].mass, &r.cells[i].output};
        for (size_t k = 0; k < CLI_COUNT_OF(all); k++) samples_wipe(all[k]);
    }
    free(r.cells);
    free(r.dense);
    bench_text_close(&r.text);
    bench_end(&r.b);
    return plot_finish(c, r.plot, code);
}

const cli_command command_bench_recall = {
    .name = "bench recall",
    .summary = "what each kind of index finds, keeps and costs",
    .usage = "[-m MODEL.gguf --corpus PATH] [--synthetic N,...] [options] [PATH...]",
    .about =
        "Searches landmark keys with every kind of index, beside the exact scan. Keys and queries are a model's, of\n"
        "text that is ingested (or of a context that is stored) and of the tokens after it, or synthetic ones of a\n"
        "larger model's shape.\n"
        "\n"
        "search: of one query, median and quartiles; x scan's: beside the exact scan's in the same run. recall@k: "
        "share\n"
        "of the exact k best that were found; kept: their gate mass, as a share of the exact ones', mean and first\n"
        "percentile; mass: as a share of all landmarks'. KL: how far the model's next-token distributions are from\n"
        "those of attention over all blocks.",
    .example =
        "  cairn bench recall -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --tokens 64K\n"
        "  cairn bench recall --synthetic 1M,10M --heads 2 --kind scan --kind ivf:nprobe=64 --json --plot recall.svg",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
