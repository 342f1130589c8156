/* sealed.c - the part of an index that FAISS holds: rows [0, sealed).
 *
 * FAISS proposes, Cairn scores: what it returns are ids, scored again from the stored rows, so a score never depends on
 * who found the row. FAISS is given the rows minus their mean: that shifts all scores of a query alike, so the order is
 * the same, and clusters, codes and graphs describe what distinguishes the keys instead of what they share (recall@8 on
 * shifted keys: IVF16,SQ8 with one probe 0.46 -> 0.58, PCA24,Flat 0.12 -> 0.72). `flat` is proven against these scores
 * and falls back to the scan, so its answers are the exact ones, ties included, whatever BLAS did with the sums of a
 * batch. The other kinds are asked one query at a time: the answer to a row then cannot depend on its batch. */
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
    cairn_free(sealed->center);
    cairn_free(sealed->path);
    *sealed = (cairn_sealed){0};
}

void cairn_sealed_set_center(cairn_sealed *sealed, float *center, uint32_t dim)
{
    double squares = 0;
    for (size_t i = 0; i < dim; i++) squares += (double)center[i] * (double)center[i];
    sealed->center = center;
    sealed->center_norm = sqrt(squares);
}

static bool is_finite(const float *row, size_t dim)
{
    double squares = 0;
    for (size_t i = 0; i < dim; i++) squares += (double)row[i] * (double)row[i];
    return squares < 1e36; /* as in rows.c; false for nan */
}

/* The mean of the finite rows of [0, count). */
static cairn_status center_of(cairn_sealed *sealed, const cairn_rows *rows, size_t count)
{
    float *center = cairn_alloc_array(rows->dim, sizeof *center);
    float *row = cairn_alloc_array(rows->dim, sizeof *row);
    double *total = cairn_calloc(rows->dim, sizeof *total);
    if (center == NULL || row == NULL || total == NULL) {
        cairn_free(center);
        cairn_free(row);
        cairn_free(total);
        return cairn_fail(CAIRN_NO_MEMORY, "mean of %zu rows", count);
    }
    size_t finite = 0;
    for (size_t i = 0; i < count; i++) {
        cairn_rows_widen(rows, i, 1, row);
        if (!is_finite(row, rows->dim)) continue;
        for (size_t j = 0; j < rows->dim; j++) total[j] += (double)row[j];
        finite++;
    }
    for (size_t j = 0; j < rows->dim; j++) center[j] = finite != 0 ? (float)(total[j] / (double)finite) : 0;
    cairn_free(row);
    cairn_free(total);
    cairn_sealed_set_center(sealed, center, rows->dim);
    return CAIRN_OK;
}

/* n rows as FAISS gets them. It refuses to train on what is not finite, and may loop on it in a graph: such a row
 * becomes zero. Its true scores are -inf or what the arithmetic says, so it is a poor hit either way. */
static void faiss_rows(const cairn_rows *rows, const float *center, size_t first, size_t n, float *out)
{
    cairn_rows_widen(rows, first, n, out);
    for (size_t i = 0; i < n; i++) {
        float *row = out + i * rows->dim;
        if (rows->norm_max == INFINITY && !is_finite(row, rows->dim)) {
            memset(row, 0, rows->dim * sizeof *row);
        } else {
            for (size_t j = 0; j < rows->dim; j++) row[j] -= center[j];
        }
    }
}

/* Trains on rows spread evenly over [0, count): 256 a cluster, and at least 39, repeated if there are fewer, because
 * FAISS's k-means prints a warning below that. */
static cairn_status train(const cairn_sealed *sealed, const char *factory, const cairn_rows *rows, size_t count)
{
    if (cairn_faiss_trained(sealed->faiss)) return CAIRN_OK;
    size_t clusters = cairn_kind_clusters(factory);
    size_t n = clusters != 0 ? 256 * clusters : TRAIN_MAX;
    if (n > count) n = count > 39 * clusters ? count : 39 * clusters;
    float *sample = cairn_alloc_array(n, rows->dim * sizeof *sample);
    if (sample == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu rows to train '%s' on", n, factory);
    for (size_t i = 0; i < n; i++)
        faiss_rows(rows, sealed->center, n <= count ? i * count / n : i % count, 1, sample + i * rows->dim);
    cairn_status st = cairn_faiss_train(sealed->faiss, n, sample);
    cairn_free(sample);
    return st;
}

static cairn_status add(const cairn_sealed *sealed, const cairn_rows *rows, size_t first, size_t end)
{
    cairn_status st = CAIRN_OK;
    size_t piece = PIECE_BYTES / (rows->dim * sizeof(float));
    if (piece > end - first) piece = end - first;
    float *wide = cairn_alloc_array(piece, rows->dim * sizeof *wide);
    if (wide == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu rows on their way to FAISS", piece);
    for (; st == CAIRN_OK && first < end; first += piece) {
        if (piece > end - first) piece = end - first;
        faiss_rows(rows, sealed->center, first, piece, wide);
        st = cairn_faiss_add(sealed->faiss, piece, wide);
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
        if ((st = center_of(sealed, rows, upto)) != CAIRN_OK) goto out;
        if ((st = train(sealed, factory, rows, upto)) != CAIRN_OK) goto out;
    }
    if ((st = add(sealed, rows, sealed->rows, upto)) != CAIRN_OK) goto out;
    if (cairn_faiss_rows(sealed->faiss) != upto) {
        st = cairn_fail(CAIRN_UNSUPPORTED, "FAISS's '%s' holds %zu rows after %zu were given", kind->name,
                        cairn_faiss_rows(sealed->faiss), upto);
        goto out;
    }
    sealed->rows = upto;
    sealed->bytes = cairn_sealed_file_bytes(sealed, rows->dim);
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
        found[n].score = cairn_exact_score(rows, query->q, found[n].id);
        n++;
    }
    query->choice.rescored += n;
    if (n < want) return;
    if (kind->type == CAIRN_KIND_FLAT && ids[asked - 1] >= 0) {
        /* FAISS left out rows with q.(l - c) up to its last score; want or more rows must be above that for sure,
         * with both sides rounded (l - c, its product, q.c and our own q.l). */
        double bar =
            (double)scores[asked - 1] + (double)rows->kernels->dot(query->q, sealed->center, rows->dim) +
            2 * cairn_rounding(rows->dim) * (double)query->norm * ((double)rows->norm_max + sealed->center_norm);
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
        /* The mass needs every score, and flat promises exact ones: the scan in full precision gives both. */
        if (kind->type == CAIRN_KIND_FLAT && scratch->query[i].choice.want_mass) scratch->query[i].exact = true;
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
