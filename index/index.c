/* index.c - the public calls: rows, the sealed part, and a search over both. */
#include "index_internal.h"

#include <math.h>

enum {
    DIM_MAX = 1024,             /* int8 sums of more would not be exact in f32 (scan.c) */
    CHOICES_BYTES_MAX = 8 << 20 /* of a batch; larger k means smaller batches */
};

bool cairn_index_is_scan(const char *kind)
{
    return kind == NULL || *kind == 0 || strcmp(kind, "scan") == 0 || strcmp(kind, "exact") == 0;
}

static bool is_faiss(const cairn_index *index)
{
    return index->kind.type != CAIRN_KIND_SCAN && index->kind.type != CAIRN_KIND_EXACT;
}

cairn_status cairn_index_new(const char *kind, uint32_t dim, cairn_dtype row_dtype, cairn_index **out)
{
    *out = NULL;
    if (dim == 0 || dim > DIM_MAX)
        return cairn_fail(CAIRN_INVALID, "index of %u dimensions: between 1 and %d are possible", dim, DIM_MAX);
    if (row_dtype != CAIRN_F32 && row_dtype != CAIRN_F16 && row_dtype != CAIRN_BF16)
        return cairn_fail(CAIRN_INVALID, "index rows of type %s: f32, f16 or bf16 are possible",
                          cairn_dtype_name(row_dtype));
    cairn_status st;
    cairn_index *index = cairn_calloc(1, sizeof *index);
    if (index == NULL) return cairn_fail(CAIRN_NO_MEMORY, "index");
    if ((st = cairn_kind_parse(kind, &index->kind)) != CAIRN_OK) goto out;
    if (is_faiss(index)) { /* FAISS is asked now, so that a bad recipe is found before there are rows */
        cairn_faiss *trial = NULL;
        st = cairn_faiss_new(index->kind.factory, index->kind.params, dim, &trial);
        cairn_faiss_free(trial);
        if (st == CAIRN_OK) st = cairn_kind_check(&index->kind);
        if (st != CAIRN_OK) {
            if (st != CAIRN_UNSUPPORTED) st = cairn_fail_within(st, "index kind '%s'", index->kind.name);
            goto out;
        }
    }
    st = cairn_rows_init(&index->rows, dim, row_dtype, index->kind.type != CAIRN_KIND_EXACT);
out:
    if (st != CAIRN_OK) {
        cairn_free(index);
        return st;
    }
    *out = index;
    return CAIRN_OK;
}

void cairn_index_free(cairn_index *index)
{
    if (index == NULL) return;
    cairn_sealed_wipe(&index->sealed);
    cairn_sketch_wipe(&index->sketch);
    cairn_rows_wipe(&index->rows);
    cairn_free(index);
}

const char *cairn_index_kind(const cairn_index *index)
{
    return index->kind.name;
}

cairn_status cairn_index_add(cairn_index *index, size_t n, const void *rows)
{
    cairn_status st = cairn_rows_add(&index->rows, n, rows);
    if (st == CAIRN_OK && index->sketch.width != 0 && cairn_sketch_extend(&index->sketch, &index->rows) != CAIRN_OK)
        cairn_index_unlearn(index); /* no memory for it: the rows are there all the same */
    return st;
}

/* Below so many rows a sketch saves less than it costs; a new one for every doubling costs twice the last one in all.
 */
enum { LEARN_ROWS = 2048 };

bool cairn_index_may_learn(const cairn_index *index)
{
    return index->kind.type == CAIRN_KIND_SCAN && index->rows.count >= LEARN_ROWS &&
           index->rows.count >= 2 * index->sketch.planned;
}

bool cairn_index_will_learn(const cairn_index *index)
{
    return index->kind.type == CAIRN_KIND_SCAN && index->rows.count >= LEARN_ROWS / 2;
}

cairn_status cairn_index_learn(cairn_index *index, const float *queries, size_t n, uint32_t k, size_t together)
{
    if (index->kind.type != CAIRN_KIND_SCAN) return CAIRN_OK;
    if (k > LEARN_ROWS / 8) k = LEARN_ROWS / 8;
    cairn_status st = cairn_sketch_plan(&index->sketch, index, queries, n, k, together != 0 ? together : 1);
    if (st == CAIRN_OK && index->sketch.width != 0) st = cairn_sketch_extend(&index->sketch, &index->rows);
    if (st != CAIRN_OK) cairn_index_unlearn(index);
    if (index->sketch.width == 0 && index->rows.lean && cairn_index_images(index, true) != CAIRN_OK)
        return CAIRN_NO_MEMORY;
    return st;
}

cairn_status cairn_index_images(cairn_index *index, bool on)
{
    index->rows.lean = !on;
    return on && !is_faiss(index) ? cairn_rows_add_images(&index->rows) : CAIRN_OK;
}

size_t cairn_index_count(const cairn_index *index)
{
    return index->rows.count;
}

size_t cairn_index_sealed(const cairn_index *index)
{
    return index->sealed.rows;
}

size_t cairn_index_bytes(const cairn_index *index)
{
    return sizeof *index + index->rows.bytes + index->sketch.bytes + index->sealed.bytes;
}

void cairn_index_row(const cairn_index *index, uint32_t id, float *out)
{
    cairn_rows_widen(&index->rows, id, 1, out);
}

cairn_status cairn_index_seal(cairn_index *index, size_t upto)
{
    if (upto > index->rows.count)
        return cairn_fail(CAIRN_INVALID, "sealing %zu rows of an index that has %zu", upto, index->rows.count);
    if (!is_faiss(index) || upto <= index->sealed.rows) return CAIRN_OK;
    cairn_status st = cairn_sealed_extend(&index->sealed, &index->kind, &index->rows, upto);
    if (st == CAIRN_OK) cairn_rows_drop_image(&index->rows, upto);
    return st;
}

cairn_status cairn_index_save(const cairn_index *index, const char *path, uint64_t *out_hash)
{
    if (!is_faiss(index))
        return cairn_fail(CAIRN_INVALID, "%s: an index of kind '%s' needs no file", path, index->kind.name);
    return cairn_sealed_save(&index->sealed, &index->kind, index->rows.dim, path, out_hash);
}

cairn_status cairn_index_load(cairn_index *index, const char *path, uint64_t hash, size_t sealed, bool map)
{
    if (!is_faiss(index))
        return cairn_fail(CAIRN_INVALID, "%s: an index of kind '%s' has no file", path, index->kind.name);
    cairn_status st;
    if (sealed > index->rows.count) {
        cairn_sealed_wipe(&index->sealed);
        return cairn_fail(CAIRN_INVALID, "%s: %zu rows sealed, but the index has %zu", path, sealed, index->rows.count);
    }
    st = cairn_sealed_load(&index->sealed, &index->kind, index->rows.dim, sealed, path, hash, map);
    if (st == CAIRN_OK) cairn_rows_drop_image(&index->rows, sealed);
    return st;
}

void cairn_index_unlearn(cairn_index *index)
{
    cairn_sketch_wipe(&index->sketch);
    index->sketch.planned = index->rows.count;
}

/* ---- searching ---- */

cairn_status cairn_index_scratch_new(cairn_index_scratch **out)
{
    *out = cairn_calloc(1, sizeof **out);
    return *out != NULL ? CAIRN_OK : cairn_fail(CAIRN_NO_MEMORY, "search scratch");
}

static void scratch_wipe(cairn_index_scratch *scratch)
{
    cairn_free(scratch->image);
    cairn_free(scratch->scale);
    cairn_free(scratch->scores);
    cairn_free(scratch->over);
    cairn_free(scratch->wide);
    cairn_free(scratch->sketch);
    cairn_free(scratch->gathered);
    cairn_free(scratch->products);
    scratch->sketch = NULL;
    scratch->gathered = NULL;
    scratch->products = NULL;
    scratch->image = NULL;
    scratch->scale = NULL;
    scratch->scores = NULL;
    scratch->over = NULL;
    scratch->wide = NULL;
    scratch->dim = 0;
}

void cairn_index_scratch_free(cairn_index_scratch *scratch)
{
    if (scratch == NULL) return;
    scratch_wipe(scratch);
    cairn_free(scratch->choices);
    cairn_free(scratch->faiss);
    cairn_free(scratch);
}

void cairn_index_hint(cairn_index_scratch *scratch, const uint32_t *rows, size_t n)
{
    scratch->n_hints = 0;
    for (size_t i = 0; i < n && scratch->n_hints < CAIRN_EXACT_ROWS; i++) {
        size_t same = 0;
        while (same < scratch->n_hints && scratch->hints[same] != rows[i]) same++; /* k different rows make a bar */
        if (same == scratch->n_hints) scratch->hints[scratch->n_hints++] = rows[i];
    }
}

static cairn_status scratch_reserve(cairn_index_scratch *scratch, const cairn_rows *rows, size_t choices_bytes)
{
    if (scratch->dim < rows->dim) {
        scratch_wipe(scratch);
        scratch->image = cairn_calloc(CAIRN_SCAN_BATCH, rows->image_dim);
        scratch->scale = cairn_calloc(CAIRN_SCAN_BATCH, sizeof *scratch->scale);
        scratch->scores = cairn_alloc_array(2 * CAIRN_SCAN_TOGETHER * CAIRN_SCORE_ROW, sizeof *scratch->scores);
        scratch->over = cairn_alloc_array(3 * CAIRN_LIST_ROOM, sizeof *scratch->over);
        scratch->wide = cairn_alloc_array(CAIRN_EXACT_ROWS * (size_t)rows->dim, sizeof *scratch->wide);
        scratch->sketch = cairn_calloc(CAIRN_SCAN_BATCH, CAIRN_SKETCH_WIDTH_MAX);
        const size_t most = rows->dim > CAIRN_EXACT_ROWS ? rows->dim : CAIRN_EXACT_ROWS;
        scratch->gathered = cairn_alloc_array(CAIRN_SCAN_BATCH * (size_t)rows->dim, sizeof *scratch->gathered);
        scratch->products = cairn_alloc_array(CAIRN_SCAN_BATCH * most, sizeof *scratch->products);
        if (scratch->sketch == NULL || scratch->gathered == NULL || scratch->products == NULL ||
            scratch->image == NULL || scratch->scale == NULL || scratch->scores == NULL || scratch->over == NULL ||
            scratch->wide == NULL) {
            scratch_wipe(scratch);
            return cairn_fail(CAIRN_NO_MEMORY, "search scratch for %u dimensions", rows->dim);
        }
        scratch->dim = rows->dim;
    }
    if (scratch->choices_bytes < choices_bytes) {
        void *more = cairn_alloc(choices_bytes);
        if (more == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu bytes of search candidates", choices_bytes);
        cairn_free(scratch->choices);
        scratch->choices = more;
        scratch->choices_bytes = choices_bytes;
    }
    return CAIRN_OK;
}

static size_t choice_bytes(uint32_t k)
{
    return ((size_t)k * sizeof(float) + 15) / 16 * 16 + cairn_choice_room(k) * sizeof(cairn_candidate);
}

/* Queries of a prefill chunk are alike. So some of them go first, and the rows they chose give the others a bar to
 * begin with, which saves most of the candidates of their first rows (a third of the time at 10,000 rows). What is
 * found does not depend on it; which rows are scored in full precision does, and with that the last bits of a mass: so
 * not when one is asked for. Rows beyond L2 would be fetched twice for it. */
enum { PILOTS_MOST = 8, PILOTS_LEAST = 4, PILOT_SHARE = 4, PILOT_BYTES = 2 << 20 };

/* How many go first: at most a quarter, and no more than all of their k rows can be widened at once. */
static size_t pilots_of(const cairn_index *index, const cairn_index_query *queries, size_t n, uint32_t k, bool mass)
{
    size_t width = queries[0].hi > queries[0].lo ? queries[0].hi - queries[0].lo : 0;
    if (mass || k == 0 || !index->rows.imaged) return 0;
    if (width <= CAIRN_SCAN_SHORT || width * index->rows.image_dim > PILOT_BYTES) return 0;
    for (size_t pilots = PILOTS_MOST; pilots >= PILOTS_LEAST; pilots /= 2)
        if (pilots * PILOT_SHARE <= n && pilots * k <= CAIRN_EXACT_ROWS) return pilots;
    return 0;
}

static void query_begin(const cairn_index *index, cairn_index_scratch *scratch, size_t at, size_t slot,
                        const cairn_index_query *asked, uint32_t k, uint32_t most, bool mass)
{
    cairn_scan_query *query = &scratch->query[at];
    cairn_choice *choice = &query->choice;
    char *own = (char *)scratch->choices + at * choice_bytes(most);
    query->q = asked->q;
    query->slot = slot;
    query->from = asked->lo;
    query->hi = asked->hi > asked->lo ? asked->hi : asked->lo;
    uint32_t width = query->hi - query->from;
    choice->rows = &index->rows;
    choice->q = asked->q;
    choice->k = k < width ? k : width;
    choice->room = cairn_choice_room(choice->k);
    choice->bounds = (float *)(void *)own;
    choice->candidates =
        (cairn_candidate *)(void *)(own + choice_bytes(most) - cairn_choice_room(most) * sizeof(cairn_candidate));
    choice->want_mass = mass;
    cairn_choice_begin(choice);
}

static void query_end(cairn_index_scratch *scratch, size_t at, uint32_t k, cairn_index_hit *hits, uint32_t *found,
                      cairn_index_mass *mass)
{
    cairn_choice *choice = &scratch->query[at].choice;
    size_t slot = scratch->query[at].slot;
    found[slot] = cairn_choice_finish(choice, hits + slot * k);
    if (mass != NULL) mass[slot] = cairn_choice_mass(choice);
    scratch->searches++;
    scratch->rescored += choice->rescored;
    scratch->crowded += choice->crowded;
}

/* The first queries of the scratch are done: what they found helps the others. */
static void hint_others(const cairn_index *index, cairn_index_scratch *scratch, size_t pilots, size_t n, uint32_t k,
                        const cairn_index_hit *hits, const uint32_t *found)
{
    uint32_t ids[CAIRN_EXACT_ROWS];
    size_t count = 0;
    for (size_t p = 0; p < pilots; p++)
        for (size_t h = 0; h < found[scratch->query[p].slot]; h++) {
            uint32_t id = hits[scratch->query[p].slot * k + h].id;
            size_t same = 0;
            while (same < count && ids[same] != id) same++; /* k different rows make a bar */
            if (same == count) ids[count++] = id;
        }
    cairn_scan_hint(&index->rows, scratch, pilots, n, ids, count);
}

static cairn_status search_batch(const cairn_index *index, cairn_index_scratch *scratch,
                                 const cairn_index_query *queries, size_t n, uint32_t k, uint32_t most,
                                 cairn_index_hit *hits, uint32_t *found, cairn_index_mass *mass)
{
    const cairn_rows *rows = &index->rows;
    cairn_status st = scratch_reserve(scratch, rows, n * choice_bytes(most));
    if (st != CAIRN_OK) return st;
    size_t pilots = pilots_of(index, queries, n, k, mass != NULL);
    size_t others = pilots;
    for (size_t i = 0; i < n; i++) {
        bool pilot = pilots != 0 && i * pilots % n < pilots; /* evenly */
        size_t at = pilot ? i * pilots / n : others++;
        query_begin(index, scratch, at, i, &queries[i], k, most, mass != NULL);
    }
    const cairn_sketch *sketch = index->sketch.width != 0 && mass == NULL && k != 0 ? &index->sketch : NULL;
    cairn_scan_prepare(rows, scratch, n);
    if (sketch != NULL) cairn_sketch_prepare(sketch, rows, scratch, n);
    if (scratch->n_hints != 0 && mass == NULL && index->sealed.faiss == NULL)
        cairn_scan_hint(rows, scratch, 0, pilots != 0 ? pilots : n, scratch->hints, scratch->n_hints);
    if (index->sealed.faiss != NULL &&
        (st = cairn_sealed_search(&index->sealed, &index->kind, rows, scratch, n)) != CAIRN_OK)
        return st;
    if (pilots != 0) {
        cairn_scan(rows, sketch, scratch, 0, pilots);
        for (size_t i = 0; i < pilots; i++) query_end(scratch, i, k, hits, found, mass);
        hint_others(index, scratch, pilots, n, k, hits, found);
    }
    if (mass != NULL || k != 0) cairn_scan(rows, sketch, scratch, pilots, n);
    for (size_t i = pilots; i < n; i++) query_end(scratch, i, k, hits, found, mass);
    return CAIRN_OK;
}

cairn_status cairn_index_search(const cairn_index *index, cairn_index_scratch *scratch,
                                const cairn_index_query *queries, size_t nq, uint32_t k, cairn_index_hit *hits,
                                uint32_t *found, cairn_index_mass *mass)
{
    uint32_t most = 0; /* hits any of the queries can have */
    for (size_t i = 0; i < nq; i++) {
        if (queries[i].hi > index->rows.count)
            return cairn_fail(CAIRN_INVALID, "query %zu asks for rows [%u, %u) of %zu", i, queries[i].lo, queries[i].hi,
                              index->rows.count);
        uint32_t width = queries[i].hi > queries[i].lo ? queries[i].hi - queries[i].lo : 0;
        uint32_t here = k < width ? k : width;
        if (here > most) most = here;
    }
    size_t hints = 0;
    for (size_t i = 0; i < scratch->n_hints; i++)
        if (scratch->hints[i] < index->rows.count) scratch->hints[hints++] = scratch->hints[i];
    scratch->n_hints = hints;
    size_t batch = 1;
    while (batch < CAIRN_SCAN_BATCH && (batch + 1) * choice_bytes(most) <= CHOICES_BYTES_MAX) batch++;
    for (size_t i = 0; i < nq; i += batch) {
        size_t n = nq - i < batch ? nq - i : batch;
        cairn_status st = search_batch(index, scratch, queries + i, n, k, most, hits + i * k, found + i,
                                       mass != NULL ? mass + i : NULL);
        if (st != CAIRN_OK) return st;
    }
    scratch->n_hints = 0;
    return CAIRN_OK;
}

void cairn_index_scores(const cairn_index *index, const float *q, uint32_t lo, uint32_t hi, float *out)
{
    for (size_t id = lo; id < hi; id++) out[id - lo] = cairn_exact_score(&index->rows, q, id);
}
