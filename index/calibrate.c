/* calibrate.c - which kind is fastest at equal answers, on this machine, for these keys.
 *
 * The rule. Every candidate answers the same queries, one at a time as generating does. Its answers are equal enough
 * when they hold at least 99 % of the gate mass the exact k best hold, on average over the queries: sum exp(score) over
 * its hits / the same over the exact ones (a hit missed is worth what its block would have weighed, no more). The
 * fastest of those wins, but any other kind must beat the scan by a tenth: FAISS costs a file, a build and more memory,
 * and full precision twice the bytes in a session, where more heads than the one that is timed here share the cache.
 *
 * Below SMALL rows there is nothing to measure: the scan takes 15 microseconds, and at 19,047 rows of the demo model
 * FAISS took 67 (flat) and 225 (ivf at 99 %). */
#include "index_internal.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

enum { SMALL = 20000, QUERIES_MAX = 64, PROBE_ROWS = 1000 };
static const double EQUAL = 0.99;
static const double WORTH = 0.9;
static const double BLAS_FLOPS = 20e9; /* a low guess: what k-means gets out of sgemm on one core */

typedef struct trial {
    const cairn_rows *rows;
    cairn_index_scratch *scratch;
    float *queries; /* (n, dim) */
    size_t n;
    uint32_t k;
    cairn_index_hit *truth; /* (n, k) */
    uint32_t *truth_found;  /* (n) */
    cairn_index_hit *hits;  /* (k) */
    uint64_t deadline;
    double best_us; /* to be beaten */
    char *kind;
    char why[512];
    size_t why_length;
} trial;

static void say(trial *t, const char *format, ...) CAIRN_PRINTF(2, 3);
static void say(trial *t, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(t->why + t->why_length, sizeof t->why - t->why_length, format, ap);
    va_end(ap);
    if (n > 0) t->why_length += (size_t)n;
    if (t->why_length > sizeof t->why - 1) t->why_length = sizeof t->why - 1;
}

static double mass_of(const cairn_index_hit *hits, uint32_t n, float most)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += exp((double)hits[i].score - (double)most);
    return sum;
}

/* Microseconds a query, the better of two passes (the first one warms), and the share of the exact mass. */
static cairn_status measure(trial *t, const cairn_index *index, double *us, double *share)
{
    *us = INFINITY;
    for (int pass = 0; pass < 2; pass++) {
        double shares = 0;
        uint64_t spent = 0;
        for (size_t i = 0; i < t->n; i++) {
            cairn_index_query query = {t->queries + i * t->rows->dim, 0, (uint32_t)t->rows->count};
            uint32_t found;
            uint64_t begin = cairn_now_ns();
            cairn_status st = cairn_index_search(index, t->scratch, &query, 1, t->k, t->hits, &found, NULL);
            if (st != CAIRN_OK) return st;
            spent += cairn_now_ns() - begin;
            const cairn_index_hit *truth = t->truth + i * t->k;
            double whole = mass_of(truth, t->truth_found[i], truth[0].score);
            shares += whole > 0 ? mass_of(t->hits, found, truth[0].score) / whole : 1;
        }
        *share = shares / (double)t->n;
        *us = fmin(*us, (double)spent / (double)t->n / 1000);
        if (cairn_now_ns() > t->deadline) break;
    }
    return CAIRN_OK;
}

static cairn_index view_of(const trial *t, cairn_kind kind)
{
    cairn_index view = {.kind = kind, .rows = *t->rows};
    if (kind.type == CAIRN_KIND_EXACT) view.rows.imaged = false;
    return view;
}

static void consider(trial *t, const char *name, const char *kind, double us, double share)
{
    say(t, "%s%s %.0f us", t->why_length != 0 ? ", " : "", name, us);
    if (share < 0.9995) say(t, " (%.3f)", share);
    if (share < EQUAL || us > t->best_us) return;
    t->best_us = us;
    snprintf(t->kind, 64, "%.63s", kind);
}

static cairn_status try_kind(trial *t, const char *kind)
{
    cairn_kind parsed;
    double us = 0;
    double share = 0;
    cairn_status st = cairn_kind_parse(kind, &parsed);
    if (st != CAIRN_OK) return st;
    cairn_index view = view_of(t, parsed);
    /* A scan that learnt from half of them, as it will have in a session. */
    if (t->n >= 2) st = cairn_index_learn(&view, t->queries, t->n / 2, t->k, 1);
    if (st == CAIRN_OK && (st = measure(t, &view, &us, &share)) == CAIRN_OK) consider(t, kind, kind, us, share);
    cairn_sketch_wipe(&view.sketch);
    return st;
}

/* Builds a FAISS kind over the rows, then tries it with each of the parameters ("" ends them). */
static cairn_status try_faiss(trial *t, const char *name, const char *factory, const char *const *params,
                              double build_seconds)
{
    uint64_t now = cairn_now_ns();
    double left = t->deadline > now ? (double)(t->deadline - now) / 1e9 : 0;
    if (build_seconds > left) {
        say(t, ", %s would take %.0f s to build", name, build_seconds);
        return CAIRN_OK;
    }
    cairn_kind parsed;
    cairn_status st = cairn_kind_parse(factory, &parsed);
    if (st != CAIRN_OK) return st;
    cairn_index view = view_of(t, parsed);
    st = cairn_sealed_extend(&view.sealed, &parsed, t->rows, t->rows->count);
    for (size_t i = 0; st == CAIRN_OK && (i == 0 || (params[i] != NULL && cairn_now_ns() < t->deadline)); i++) {
        char kind[CAIRN_KIND_TEXT];
        double us = 0;
        double share = 0;
        snprintf(kind, sizeof kind, "%s%s%s", factory, params[i] != NULL ? ":" : "",
                 params[i] != NULL ? params[i] : "");
        if (params[i] != NULL && (st = cairn_faiss_set(view.sealed.faiss, params[i])) != CAIRN_OK) break;
        if ((st = measure(t, &view, &us, &share)) == CAIRN_OK) consider(t, name, kind, us, share);
        if (params[i] == NULL || share >= EQUAL) break; /* the parameters go from fast to thorough */
    }
    cairn_sealed_wipe(&view.sealed);
    return st;
}

static cairn_status try_all(trial *t)
{
    cairn_status st;
    double n = (double)t->rows->count;
    double dim = (double)t->rows->dim;
    if ((st = try_kind(t, "scan")) != CAIRN_OK) return st;
    t->best_us *= WORTH; /* for the others to beat */
    if ((st = try_kind(t, "exact")) != CAIRN_OK) return st;
    if ((st = try_faiss(t, "flat", "flat", (const char *const[]){NULL}, n * dim * 4 / 5e8)) != CAIRN_OK) return st;

    cairn_kind ivf;
    char factory[CAIRN_KIND_TEXT];
    char params[CAIRN_KIND_TEXT];
    if ((st = cairn_kind_parse("ivf", &ivf)) != CAIRN_OK) return st;
    cairn_kind_for(&ivf, t->rows->count, factory, params);
    size_t lists = cairn_kind_clusters(factory);
    char probe[3][32];
    const char *probes[4] = {probe[0], probe[1], probe[2], NULL};
    for (size_t i = 0; i < 3; i++)
        snprintf(probe[i], sizeof probe[i], "nprobe=%zu", lists >> (4 - i) != 0 ? lists >> (4 - i) : 1);
    double train = 2 * 10 * 256 * (double)lists * (double)lists * dim / BLAS_FLOPS; /* 10 iterations of k-means */
    if ((st = try_faiss(t, "ivf", factory, probes, train + 2 * n * (double)lists * dim / BLAS_FLOPS)) != CAIRN_OK)
        return st;

    /* A graph takes n log n insertions of a cost nobody knows beforehand: a small one tells. */
    cairn_rows few = *t->rows;
    few.count = PROBE_ROWS;
    cairn_kind hnsw;
    cairn_sealed small = {0};
    if ((st = cairn_kind_parse("hnsw", &hnsw)) != CAIRN_OK) return st;
    uint64_t begin = cairn_now_ns();
    if (begin >= t->deadline) return CAIRN_OK;
    if ((st = cairn_sealed_extend(&small, &hnsw, &few, few.count)) != CAIRN_OK) return st;
    double seconds = (double)(cairn_now_ns() - begin) / 1e9 * n / PROBE_ROWS * log(n) / log(PROBE_ROWS);
    cairn_sealed_wipe(&small);
    return try_faiss(t, "hnsw", "hnsw", (const char *const[]){"efSearch=64", "efSearch=128", "efSearch=256", NULL},
                     seconds);
}

cairn_status cairn_index_calibrate(const cairn_index *index, const float *queries, size_t n_queries, uint32_t k,
                                   uint32_t budget_ms, char kind[64], char why[160])
{
    const cairn_rows *rows = &index->rows;
    snprintf(kind, 64, "scan");
    if (!rows->imaged)
        return cairn_fail(CAIRN_INVALID,
                          "calibrating the rows of a '%s' index, must be those of a scan: others have no "
                          "int8 images to time",
                          cairn_index_kind(index));
    if (rows->count < SMALL || k == 0 || k > rows->count || (queries != NULL && n_queries == 0)) {
        snprintf(why, 160, "%zu rows: below %d the exact int8 scan takes microseconds and nothing is faster",
                 rows->count, SMALL);
        return CAIRN_OK;
    }
    cairn_status st = CAIRN_OK;
    size_t all = queries != NULL ? n_queries : rows->count;
    size_t n = all < QUERIES_MAX ? all : QUERIES_MAX;
    trial t = {.rows = rows, .n = n, .k = k, .kind = kind, .best_us = INFINITY};
    t.deadline = cairn_now_ns() + (uint64_t)budget_ms * 1000000u;
    t.queries = cairn_alloc_array(n, rows->dim * sizeof *t.queries);
    t.truth = cairn_alloc_array(n * k, sizeof *t.truth);
    t.truth_found = cairn_alloc_array(n, sizeof *t.truth_found);
    t.hits = cairn_alloc_array(k, sizeof *t.hits);
    if (t.queries == NULL || t.truth == NULL || t.truth_found == NULL || t.hits == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "calibrating with %zu queries", n);
        goto out;
    }
    if ((st = cairn_index_scratch_new(&t.scratch)) != CAIRN_OK) goto out;
    float scale = 1 / sqrtf((float)rows->dim); /* queries come scaled; rows in their place do not */
    for (size_t i = 0; i < n; i++) {
        float *q = t.queries + i * rows->dim;
        size_t from = i * all / n;
        if (queries != NULL) {
            memcpy(q, queries + from * rows->dim, rows->dim * sizeof *q);
        } else {
            cairn_rows_widen(rows, from, 1, q);
            rows->kernels->scale(q, scale, rows->dim);
        }
    }
    cairn_kind exact;
    if ((st = cairn_kind_parse("exact", &exact)) != CAIRN_OK) goto out;
    cairn_index twin = view_of(&t, exact);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        cairn_index_query query = {t.queries + i * rows->dim, 0, (uint32_t)rows->count};
        st = cairn_index_search(&twin, t.scratch, &query, 1, k, t.truth + i * k, &t.truth_found[i], NULL);
    }
    if (st == CAIRN_OK) st = try_all(&t);
    if (st == CAIRN_OK) snprintf(why, 160, "%zu rows, k %u: %.130s", rows->count, k, t.why);
out:
    cairn_index_scratch_free(t.scratch);
    cairn_free(t.queries);
    cairn_free(t.truth);
    cairn_free(t.truth_found);
    cairn_free(t.hits);
    return st;
}
