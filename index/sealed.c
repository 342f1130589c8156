/* sealed.c - the part of an index that FAISS holds: rows [0, sealed).
 *
 * FAISS proposes, Cairn scores: what it returns are ids, scored again from the stored rows, so a score never depends on
 * who found the row. `flat` is proven against these scores and falls back to the scan, so its answers are the exact
 * ones, ties included, whatever BLAS did with the sums of a batch. The other kinds are asked one query at a time: the
 * answer to a row then cannot depend on its batch. */
#include "index_internal.h"

#include <math.h>

enum {
    PIECE_BYTES = 64 << 20, /* of rows widened at a time while building */
    TRAIN_MAX = 65536,      /* rows, for recipes without clusters */
    OVER_MAX = 2048         /* more asked of FAISS than this, and the scan is the shorter way */
};

void cairn_sealed_wipe(cairn_sealed *sealed)
{
    cairn_faiss_free(sealed->faiss);
    cairn_free(sealed->path);
    *sealed = (cairn_sealed){0};
}

/* FAISS refuses to train on what is not finite, and may loop on it in a graph: such a row becomes zero for FAISS. Its
 * true scores are -inf or what the arithmetic says, so it is a poor hit either way. */
static void finite_rows(const cairn_rows *rows, size_t first, size_t n, float *out)
{
    cairn_rows_widen(rows, first, n, out);
    if (rows->norm_max != INFINITY) return;
    for (size_t i = 0; i < n; i++) {
        float *row = out + i * rows->dim;
        bool finite = true;
        for (size_t j = 0; j < rows->dim; j++) finite = finite && isfinite(row[j]) && fabsf(row[j]) < 1e18f;
        if (!finite) memset(row, 0, rows->dim * sizeof *row);
    }
}

/* Trains on rows spread evenly over [0, count): 256 a cluster, and at least 39, repeated if there are fewer, because
 * FAISS's k-means prints a warning below that. */
static cairn_status train(cairn_faiss *faiss, const char *factory, const cairn_rows *rows, size_t count)
{
    if (cairn_faiss_trained(faiss)) return CAIRN_OK;
    size_t clusters = cairn_kind_clusters(factory);
    size_t n = clusters != 0 ? 256 * clusters : TRAIN_MAX;
    if (n > count) n = count > 39 * clusters ? count : 39 * clusters;
    float *sample = cairn_alloc_array(n, rows->dim * sizeof *sample);
    if (sample == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu rows to train '%s' on", n, factory);
    for (size_t i = 0; i < n; i++) finite_rows(rows, n <= count ? i * count / n : i % count, 1, sample + i * rows->dim);
    cairn_status st = cairn_faiss_train(faiss, n, sample);
    cairn_free(sample);
    return st;
}

static cairn_status add(cairn_faiss *faiss, const cairn_rows *rows, size_t first, size_t end)
{
    cairn_status st = CAIRN_OK;
    size_t piece = PIECE_BYTES / (rows->dim * sizeof(float));
    if (piece > end - first) piece = end - first;
    float *wide = cairn_alloc_array(piece, rows->dim * sizeof *wide);
    if (wide == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu rows on their way to FAISS", piece);
    for (; st == CAIRN_OK && first < end; first += piece) {
        if (piece > end - first) piece = end - first;
        finite_rows(rows, first, piece, wide);
        st = cairn_faiss_add(faiss, piece, wide);
    }
    cairn_free(wide);
    return st;
}

cairn_status cairn_sealed_extend(cairn_sealed *sealed, const cairn_kind *kind, const cairn_rows *rows, size_t upto)
{
    cairn_status st = CAIRN_OK;
    if (upto <= sealed->rows) return CAIRN_OK;
    if (sealed->mapped && cairn_sealed_unmap(sealed, kind, rows->dim) != CAIRN_OK)
        cairn_sealed_wipe(sealed); /* the file is gone: made anew from the rows */
    if (sealed->faiss == NULL) {
        char factory[CAIRN_KIND_TEXT];
        char params[CAIRN_KIND_TEXT];
        cairn_kind_for(kind, upto, factory, params);
        if ((st = cairn_faiss_new(factory, params, rows->dim, &sealed->faiss)) != CAIRN_OK) goto out;
        if ((st = train(sealed->faiss, factory, rows, upto)) != CAIRN_OK) goto out;
    }
    if ((st = add(sealed->faiss, rows, sealed->rows, upto)) != CAIRN_OK) goto out;
    if (cairn_faiss_rows(sealed->faiss) != upto) {
        st = cairn_fail(CAIRN_UNSUPPORTED, "FAISS's '%s' holds %zu rows after %zu were given", kind->name,
                        cairn_faiss_rows(sealed->faiss), upto);
        goto out;
    }
    sealed->rows = upto;
    sealed->bytes = cairn_sealed_file_bytes(sealed->faiss);
out:
    if (st != CAIRN_OK) { /* FAISS may hold some of the rows: none of it is kept */
        cairn_sealed_wipe(sealed);
        return cairn_fail_within(st, "sealing %zu rows of %u dimensions as '%s'", upto, rows->dim, kind->name);
    }
    return CAIRN_OK;
}

/* ---- searching ---- */

/* The sealed rows a query may have, and how many hits FAISS is asked for so that enough of them fall inside. 0: scan.
 */
static size_t plan(const cairn_sealed *sealed, const cairn_kind *kind, const cairn_scan_query *query, size_t *want)
{
    size_t end = query->hi < sealed->rows ? query->hi : sealed->rows;
    const cairn_choice *choice = &query->choice;
    if (query->from >= end || choice->k == 0 || query->norm == INFINITY) return 0;
    /* The mass needs every score, and flat has to be exact: the scan gives both in one pass. */
    if (kind->type == CAIRN_KIND_FLAT && choice->want_mass) return 0;
    size_t width = end - query->from;
    *want = choice->k < width ? choice->k : width;
    if (width <= CAIRN_SCAN_SHORT || *want > width / 2) return 0;
    size_t spare = kind->type == CAIRN_KIND_FLAT ? 16 : 0; /* so that ties and roundings around place k are in view */
    double share = (double)width / (double)sealed->rows;
    double ask = (double)(*want + spare) / share;
    if (share < 1) ask = ask * 1.5 + 8;
    if (ask > OVER_MAX || ask > (double)sealed->rows) return 0;
    return (size_t)ask;
}

/* Offers the hits that lie in the query's range, unless they are too few or do not prove the best `want`. */
static void accept(const cairn_sealed *sealed, const cairn_kind *kind, const cairn_rows *rows, cairn_scan_query *query,
                   cairn_index_hit *found, size_t asked, size_t want, const float *scores, const int64_t *ids,
                   cairn_index_scratch *scratch)
{
    size_t end = query->hi < sealed->rows ? query->hi : sealed->rows;
    size_t n = 0;
    for (size_t i = 0; i < asked; i++) {
        if (ids[i] < (int64_t)query->from || ids[i] >= (int64_t)end) continue;
        found[n].id = (uint32_t)ids[i];
        found[n].score = cairn_exact_score(rows, query->q, found[n].id, query->choice.wide);
        n++;
    }
    query->choice.rescored += n;
    if (n < want) return;
    if (kind->type == CAIRN_KIND_FLAT && ids[asked - 1] >= 0) {
        /* Every row FAISS left out has a FAISS score of at most the last one's, and both sides round: want or more
         * rows must be above that for sure. */
        double bar =
            (double)scores[asked - 1] + 2 * cairn_rounding(rows->dim) * (double)query->norm * (double)rows->norm_max;
        size_t above = 0;
        for (size_t i = 0; i < n; i++) above += (double)found[i].score > bar;
        if (above < want) {
            scratch->unproven++;
            return;
        }
    }
    for (size_t i = 0; i < n; i++) cairn_choice_see_one(&query->choice, found[i].id, found[i].score);
    query->choice.mass.unscored = true;
    query->from = (uint32_t)end;
}

/* FAISS's arrays in the scratch: n queries, and n times `ask` scores, ids and found hits. */
static cairn_status reserve(cairn_index_scratch *scratch, uint32_t dim, size_t n, size_t ask)
{
    size_t bytes = n * dim * sizeof(float) + n * ask * (sizeof(int64_t) + sizeof(float)) +
                   ask * sizeof(cairn_index_hit) + 3 * sizeof(int64_t);
    if (bytes <= scratch->faiss_bytes) return CAIRN_OK;
    void *more = cairn_alloc(bytes);
    if (more == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu hits for each of %zu queries", ask, n);
    cairn_free(scratch->faiss);
    scratch->faiss = more;
    scratch->faiss_bytes = bytes;
    return CAIRN_OK;
}

cairn_status cairn_sealed_search(const cairn_sealed *sealed, const cairn_kind *kind, const cairn_rows *rows,
                                 cairn_index_scratch *scratch, size_t n)
{
    size_t member[CAIRN_SCAN_BATCH];
    size_t want[CAIRN_SCAN_BATCH];
    size_t asks[CAIRN_SCAN_BATCH];
    size_t ask = 0;
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        size_t here = plan(sealed, kind, &scratch->query[i], &want[m]);
        if (here == 0) continue;
        member[m] = i;
        asks[m++] = here;
        if (here > ask) ask = here;
    }
    if (m == 0) return CAIRN_OK;
    cairn_status st = reserve(scratch, rows->dim, m, ask);
    if (st != CAIRN_OK) return st;
    int64_t *ids = scratch->faiss; /* (m, ask) */
    float *scores = (float *)(ids + m * ask);
    cairn_index_hit *found = (cairn_index_hit *)(scores + m * ask);
    float *q = (float *)(found + ask);
    for (size_t i = 0; i < m; i++) memcpy(q + i * rows->dim, scratch->query[member[i]].q, rows->dim * sizeof *q);
    bool together = kind->type == CAIRN_KIND_FLAT;
    /* A query FAISS cannot answer is scanned: an index is never a reason to fail. */
    if (together && cairn_faiss_search(sealed->faiss, m, q, ask, scores, ids) != CAIRN_OK) return CAIRN_OK;
    for (size_t i = 0; i < m; i++) {
        size_t asked = together ? ask : asks[i];
        if (!together && cairn_faiss_search(sealed->faiss, 1, q + i * rows->dim, asked, scores, ids) != CAIRN_OK)
            continue;
        size_t at = together ? i * ask : 0;
        accept(sealed, kind, rows, &scratch->query[member[i]], found, asked, want[i], scores + at, ids + at, scratch);
    }
    return CAIRN_OK;
}
