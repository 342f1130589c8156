/* select.c - one query's choice of the k best rows, proven exact.
 *
 * Every score comes as an interval. The k-th best lower bound seen so far, `least`, can only rise, and k rows are
 * surely at least that good; so a row whose upper bound is below it is out for good, and whoever remains at the end
 * contains the exact k best. They are scored in full precision, the most promising first, until the next one's upper
 * bound cannot reach the k-th exact score.
 *
 * With int8 images this scores about 1.5 k rows on the demo model's keys, up to 3 k on harsher ones (tests/test_index.c
 * counts them). Where it cannot keep few (many equal rows, hopeless quantization), the candidates are scored whenever
 * their array is full, which turns into the full exact scan, in the same memory. */
#include "index_internal.h"

#include <math.h>
#include <stdlib.h>

static bool better(float score, uint32_t id, const cairn_index_hit *than)
{
    return score > than->score || (score == than->score && id > than->id);
}

void cairn_choice_begin(cairn_choice *c)
{
    c->count = 0;
    c->kept = 0;
    c->least = -INFINITY;
    c->mass = (cairn_running_mass){.shift = -INFINITY};
    c->rescored = 0;
    c->crowded = 0;
}

/* ---- the k best lower bounds: a heap with the smallest on top ---- */

static void bounds_sink(cairn_choice *c, float bound)
{
    float *heap = c->bounds;
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= c->k) break;
        if (child + 1 < c->k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= bound) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = bound;
    if (heap[0] > c->least) c->least = heap[0];
}

static void bounds_push(cairn_choice *c, float bound)
{
    if (c->kept == c->k) {
        if (bound > c->bounds[0]) bounds_sink(c, bound);
        return;
    }
    uint32_t at = c->kept++;
    for (; at != 0 && c->bounds[(at - 1) / 2] > bound; at = (at - 1) / 2) c->bounds[at] = c->bounds[(at - 1) / 2];
    c->bounds[at] = bound;
    if (c->kept == c->k && c->bounds[0] > c->least) c->least = c->bounds[0];
}

/* ---- mass ---- */

/* Sums are kept relative to the largest score. False if there is nothing to add. */
static bool mass_shift(cairn_running_mass *m, float most)
{
    if (most == -INFINITY || m->shift == INFINITY) return false;
    if (most > m->shift) {
        double shrink = exp((double)m->shift - (double)most);
        m->exact *= shrink;
        m->image *= shrink;
        m->upper *= shrink;
        m->shift = most;
    }
    return most != INFINITY; /* an infinite score leaves an infinite sum, whatever else there is */
}

static void weigh(cairn_choice *c, const float *scores, size_t n)
{
    if (mass_shift(&c->mass, c->rows->kernels->max(scores, n)))
        c->mass.exact += (double)c->rows->kernels->exp_sum(scores, c->mass.shift, n);
}

static void weigh_image(cairn_choice *c, const cairn_image_scores *s)
{
    cairn_running_mass *m = &c->mass;
    const cairn_kernels *kernels = c->rows->kernels;
    if (!mass_shift(m, kernels->max(s->estimates, s->n) + s->bias)) return;
    m->image += (double)kernels->exp_sum(s->estimates, m->shift - s->bias, s->n);
    m->upper += (double)kernels->exp_sum(s->highest, m->shift - s->bias, s->n);
    m->image_rows += s->n;
}

static void weigh_one(cairn_choice *c, float score)
{
    if (mass_shift(&c->mass, score)) c->mass.exact += exp((double)score - (double)c->mass.shift);
}

/* A row known by its image is now known exactly. */
static void mass_move(cairn_choice *c, const cairn_candidate *old, float score)
{
    cairn_running_mass *m = &c->mass;
    if (--m->image_rows == 0) {
        m->image = 0;
        m->upper = 0;
    } else if (m->shift != INFINITY) {
        m->image = fmax(m->image - exp((double)old->score - (double)m->shift), 0);
        m->upper = fmax(m->upper - exp((double)old->highest - (double)m->shift), m->image);
    }
    weigh_one(c, score);
}

cairn_index_mass cairn_choice_mass(const cairn_choice *c)
{
    const cairn_running_mass *m = &c->mass;
    cairn_index_mass out = {.lse = -INFINITY, .error = m->unscored ? INFINITY : 0};
    double total = m->exact + m->image;
    if (m->shift == INFINITY) {
        out.lse = INFINITY;
    } else if (total > 0) {
        out.lse = (float)((double)m->shift + log(total));
        /* An estimate s is off by at most its slack e, so the sum lies between those of exp(s - e) and exp(s + e), and
         * the upper one is further away in the logarithm, because e^e - 1 >= 1 - e^-e. 1e-5 covers the f32 rounding of
         * exp and of sums, and of taking rows out of a sum they were part of. */
        if (m->image_rows != 0 && !m->unscored)
            out.error = (float)log((m->exact + fmax(m->upper, m->image)) / total) + 1e-5f;
    }
    return out;
}

/* ---- candidates ---- */

float cairn_exact_score(const cairn_rows *rows, const float *q, size_t id)
{
    const uint32_t at = 0;
    float score;
    rows->kernels->dot_rows(&score, q, cairn_rows_at(rows, id), rows->dtype, rows->dim, &at, 1);
    return isnan(score) ? -INFINITY : score;
}

static void make_exact(cairn_choice *c, cairn_candidate *candidate)
{
    if (candidate->exact) return;
    float score = cairn_exact_score(c->rows, c->q, candidate->id);
    if (c->want_mass) mass_move(c, candidate, score);
    candidate->score = score;
    candidate->highest = score;
    candidate->exact = true;
    c->rescored++;
}

static void drop_hopeless(cairn_choice *c)
{
    size_t kept = 0;
    for (size_t i = 0; i < c->count; i++)
        if (c->candidates[i].highest >= c->least) c->candidates[kept++] = c->candidates[i];
    c->count = kept;
}

static int by_score(const void *a, const void *b) /* best first, newest first among equals */
{
    const cairn_candidate *x = a;
    const cairn_candidate *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->id > y->id ? -1 : x->id < y->id;
}

/* The array is full. If dropping the hopeless leaves it more than half full, score the rest and keep k. */
static void make_room(cairn_choice *c)
{
    drop_hopeless(c);
    if (c->count <= c->room / 2) return;
    c->crowded++;
    for (size_t i = 0; i < c->count; i++) make_exact(c, &c->candidates[i]);
    qsort(c->candidates, c->count, sizeof *c->candidates, by_score);
    c->count = c->k; /* room / 2 >= k, so there were as many */
    c->kept = c->k;
    for (uint32_t i = 0; i < c->k; i++) c->bounds[i] = c->candidates[c->k - 1 - i].score; /* ascending is a heap */
    if (c->bounds[0] > c->least) c->least = c->bounds[0];
}

static inline void offer(cairn_choice *c, uint32_t id, float lowest, float score, float highest, bool exact)
{
    if (highest < c->least) return;
    if (c->count == c->room) {
        make_room(c);
        if (highest < c->least) return;
    }
    c->candidates[c->count++] = (cairn_candidate){id, score, highest, exact};
    bounds_push(c, lowest);
}

/* Newest rows first, since what is near is often alike, and in small steps as long as there is no bar. */
static size_t step_before(const cairn_choice *c, size_t end, size_t n)
{
    size_t step = c->least == -INFINITY ? 32 : n - end < 512 ? 4 * (n - end) + 32 : end;
    return end > step ? end - step : 0;
}

void cairn_choice_see(cairn_choice *c, const float *scores, size_t first, size_t n, uint32_t *over)
{
    if (c->want_mass) weigh(c, scores, n);
    if (c->k == 0) return;
    for (size_t end = n, begin; end != 0; end = begin) {
        begin = step_before(c, end, n);
        size_t found = c->rows->kernels->above(scores + begin, c->least, end - begin, over);
        for (size_t i = 0; i < found; i++) {
            size_t at = begin + over[i];
            offer(c, (uint32_t)(first + at), scores[at], scores[at], scores[at], true);
        }
    }
}

/* In double, then down to the next float. */
float cairn_choice_bar(const cairn_choice *c, float bias)
{
    double bar = (double)c->least - (double)bias;
    float least = (float)bar;
    return (double)least > bar ? nextafterf(least, -INFINITY) : least;
}

static void offer_image(cairn_choice *c, const cairn_image_scores *s, size_t at)
{
    const cairn_row_chunk *chunk = &c->rows->chunks[s->first / CAIRN_CHUNK_ROWS];
    size_t row = s->first % CAIRN_CHUNK_ROWS + at;
    const int8_t *x = cairn_row_slack(c->rows, chunk, row);
    float slack = (float)(x[0] * s->slack_weight[0] + x[1] * s->slack_weight[1]) * chunk->scale[row] * s->unit;
    float highest = s->highest[at] + s->bias;
    offer(c, (uint32_t)(s->first + at), highest - 2 * slack, highest - slack, highest, false);
}

/* Newest groups first; rows outside [0, n) have bits too. */
static void see_over(cairn_choice *c, const cairn_image_scores *s)
{
    size_t skip = s->first % CAIRN_SCAN_GROUP;
    for (size_t g = (skip + s->n - 1) / CAIRN_SCAN_GROUP + 1; g-- > 0;)
        for (uint32_t mask = s->over[g]; mask != 0; mask &= mask - 1) {
            size_t at = g * CAIRN_SCAN_GROUP + (size_t)__builtin_ctz(mask);
            if (at >= skip && at - skip < s->n) offer_image(c, s, at - skip);
        }
}

void cairn_choice_see_image(cairn_choice *c, const cairn_image_scores *s, uint32_t *over)
{
    if (c->want_mass) weigh_image(c, s);
    if (c->k == 0) return;
    if (s->over != NULL) {
        see_over(c, s);
        return;
    }
    for (size_t end = s->n, begin; end != 0; end = begin) {
        begin = step_before(c, end, s->n);
        size_t found = c->rows->kernels->above(s->highest + begin, cairn_choice_bar(c, s->bias), end - begin, over);
        for (size_t i = 0; i < found; i++) offer_image(c, s, begin + over[i]);
    }
}

void cairn_choice_see_one(cairn_choice *c, uint32_t id, float score)
{
    if (c->want_mass) weigh_one(c, score);
    if (c->k != 0) offer(c, id, score, score, score, true);
}

/* Into the n best hits, if among them. */
static uint32_t put_hit(const cairn_choice *c, const cairn_candidate *candidate, cairn_index_hit *hits, uint32_t n)
{
    if (n == c->k && !better(candidate->score, candidate->id, &hits[n - 1])) return n;
    uint32_t at = n < c->k ? n++ : n - 1;
    for (; at != 0 && better(candidate->score, candidate->id, &hits[at - 1]); at--) hits[at] = hits[at - 1];
    hits[at] = (cairn_index_hit){candidate->id, candidate->score};
    return n;
}

static void sort_by_highest(cairn_candidate *a, size_t n) /* Shell's sort, best first: n is some tens */
{
    static const size_t gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof *gaps; g++)
        for (size_t i = gaps[g]; i < n; i++) {
            cairn_candidate moved = a[i];
            size_t at = i;
            for (; at >= gaps[g] && a[at - gaps[g]].highest < moved.highest; at -= gaps[g]) a[at] = a[at - gaps[g]];
            a[at] = moved;
        }
}

uint32_t cairn_choice_finish(cairn_choice *c, cairn_index_hit *hits)
{
    enum { FEW = 64, AHEAD = 32 };
    drop_hopeless(c);
    if (c->k > FEW) { /* inserting one by one would be quadratic in k */
        for (size_t i = 0; i < c->count; i++) make_exact(c, &c->candidates[i]);
        qsort(c->candidates, c->count, sizeof *c->candidates, by_score);
        uint32_t n = c->count < c->k ? (uint32_t)c->count : c->k;
        for (uint32_t i = 0; i < n; i++) hits[i] = (cairn_index_hit){c->candidates[i].id, c->candidates[i].score};
        return n;
    }
    uint32_t n = 0;
    size_t open = 0; /* candidates not known exactly: all that a sketch let through are */
    for (size_t i = 0; i < c->count; i++) {
        if (c->candidates[i].exact)
            n = put_hit(c, &c->candidates[i], hits, n);
        else
            c->candidates[open++] = c->candidates[i];
    }
    sort_by_highest(c->candidates, open);
    for (size_t i = 0; i < open && i < AHEAD; i++) __builtin_prefetch(cairn_rows_at(c->rows, c->candidates[i].id));
    for (size_t i = 0; i < open; i++) {
        if (n == c->k && c->candidates[i].highest < hits[n - 1].score) break; /* nor can any after it */
        make_exact(c, &c->candidates[i]);
        n = put_hit(c, &c->candidates[i], hits, n);
    }
    return n;
}
