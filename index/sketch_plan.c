/* sketch_plan.c - which dims a sketch keeps, and whether it pays.
 *
 * T is what control theory calls a balancing transform: with M the second moments of the queries and C those of the
 * rows, T = S^-1/4 U' M^1/2 where U S U' = M^1/2 C M^1/2. Then the moments of T l' and of its partner B'q, B = 1/T, are
 * both diagonal and equal, S^1/2, so cutting the last dims loses the least of the products. A tenth of M's mean
 * variance is added in every direction: the next queries may differ from those seen.
 *
 * How many dims: the rows a sketch would let through are counted, with half of the queries as the sample and the other
 * half asked, and what a row costs either way decides. Nothing is timed, so the plan is the same wherever the rows and
 * queries are. */
#include "index_internal.h"

#include <math.h>

enum { FIT_ROWS = 2048, TRIAL_ROWS = 512, TRIAL_QUERIES = 8, DIM_MIN = 16 };
static const double SMOOTH = 0.1;
static const double LEVELS = 10;        /* standard deviations in 127 levels: the tails are heavy */
static const double LEAST_STEP = 1e-20; /* of the last byte */
static const double FARTHEST = 8;       /* standard deviations above the mean, beyond which a row is loose */
static const uint32_t WIDTHS[] = {8, 12, 16, 24, 32, 48, 64};
enum { N_WIDTHS = sizeof WIDTHS / sizeof *WIDTHS };

/* What a row costs in nanoseconds, one core of docs/benchmarks.md: passed over by a sketch or the image, looked at. Its
 * bytes come from L3 or beyond, once for all queries of a search. */
static double bytes_ns(uint32_t bytes, size_t together)
{
    return 0.1 * bytes / (double)together;
}
static double sketch_ns(uint32_t width, size_t together)
{
    return 0.03 + 0.008 * width + bytes_ns(width, together);
}
static double scan_ns(uint32_t dim, size_t together)
{
    return 0.3 + 0.013 * dim + bytes_ns(dim + 12, together);
}
static double look_ns(uint32_t dim, size_t together)
{
    return 14 + 0.15 * dim + 20 / (double)together;
}

typedef struct plan {
    cairn_sketch *sketch;
    const cairn_index *index;
    uint32_t dim;
    const float *queries; /* (n_queries, dim) */
    float *asked;         /* (n_queries, dim) z */
    size_t n_queries, together;
    uint32_t k;
    size_t n_rows;     /* of the sample */
    float *rows;       /* (FIT_ROWS, dim) l' */
    float *turned;     /* (FIT_ROWS, dim) y */
    float *products;   /* (dim, dim) */
    double *spread;    /* (dim, dim) C */
    double *work;      /* 5 (dim, dim), 2 dim, LAPACK's */
    double *deviation; /* (dim) of y */
} plan;

static double *matrix(const plan *p, size_t i)
{
    return p->work + i * p->dim * p->dim;
}

/* out = a b, square; transposed: a b'. */
static void multiply(uint32_t dim, const double *a, const double *b, bool transposed, double *out)
{
    for (size_t i = 0; i < dim; i++)
        for (size_t j = 0; j < dim; j++) {
            double sum = 0;
            for (size_t l = 0; l < dim; l++) sum += a[i * dim + l] * (transposed ? b[j * dim + l] : b[l * dim + j]);
            out[i * dim + j] = sum;
        }
}

/* out = V' f(values) V, rows of V eigenvectors */
static void recompose(uint32_t dim, const double *vectors, const double *values, double power, double *out)
{
    memset(out, 0, (size_t)dim * dim * sizeof *out);
    for (size_t e = 0; e < dim; e++) {
        const double *v = vectors + e * dim;
        double f = pow(values[e], power);
        for (size_t i = 0; i < dim; i++)
            for (size_t j = 0; j < dim; j++) out[i * dim + j] += f * v[i] * v[j];
    }
}

/* T and its partner for these queries, into the sketch. False if the numbers do not allow it. */
static bool balance(plan *p, const float *queries, size_t n)
{
    const uint32_t dim = p->dim;
    const size_t all = (size_t)dim * dim;
    double *moments = matrix(p, 0);
    double *root = matrix(p, 1);
    double *inverse_root = matrix(p, 2);
    double *whole = matrix(p, 3);
    double *other = matrix(p, 4);
    double *values = p->work + 5 * all;
    double *lapack = values + 2 * dim;
    double trace = 0;
    memset(p->products, 0, all * sizeof *p->products);
    cairn_gemm_tn(dim, dim, n, queries, dim, queries, dim, p->products, dim, true);
    for (size_t i = 0; i < dim; i++) trace += (double)p->products[i * dim + i] / (double)n;
    if (!(trace > 1e-24 && trace < 1e24)) return false;
    for (size_t i = 0; i < all; i++) moments[i] = (double)p->products[i] / (double)n;
    for (size_t i = 0; i < dim; i++) moments[i * dim + i] += SMOOTH * trace / dim;
    if (!cairn_eigen(dim, moments, values, lapack)) return false;
    if (!(values[0] > trace / dim * SMOOTH / 2)) return false;
    recompose(dim, moments, values, 0.5, root);
    recompose(dim, moments, values, -0.5, inverse_root);
    multiply(dim, root, p->spread, false, other);
    multiply(dim, other, root, false, whole);
    if (!cairn_eigen(dim, whole, values, lapack)) return false; /* ascending: the last one tells most */
    double largest = values[dim - 1];
    if (!(largest > 1e-30 && largest < 1e30)) return false;
    cairn_sketch *s = p->sketch;
    multiply(dim, whole, root, false, moments);
    multiply(dim, whole, inverse_root, false, other);
    for (size_t j = 0; j < dim; j++) {
        size_t from = dim - 1 - j;
        double scale = pow(fmax(values[from], 1e-8 * largest) / largest, 0.25) * pow(largest, 0.25);
        for (size_t i = 0; i < dim; i++) {
            s->to_row[j * dim + i] = (float)(moments[from * dim + i] / scale);
            s->to_query[j * dim + i] = (float)(other[from * dim + i] * scale);
        }
    }
    return true;
}

/* The sample's rows and the queries, turned. */
static void turn(plan *p)
{
    const uint32_t dim = p->dim;
    cairn_gemm_nt(p->n_rows, dim, dim, p->rows, dim, p->sketch->to_row, dim, p->turned, dim);
    cairn_gemm_nt(p->n_queries, dim, dim, p->queries, dim, p->sketch->to_query, dim, p->asked, dim);
    for (size_t j = 0; j < dim; j++) {
        double squares = 0;
        for (size_t r = 0; r < p->n_rows; r++)
            squares += (double)p->turned[r * dim + j] * (double)p->turned[r * dim + j];
        p->deviation[j] = sqrt(squares / (double)p->n_rows);
    }
}

/* A level of y_j. */
static double step_of(const plan *p, size_t j)
{
    return p->deviation[j] * LEVELS / 127;
}

/* A step of a turned query's image: its largest part fills 127 of them. Some kernels allow 64, but what is learnt here
 * is kept in a file that other machines read. */
static double query_step(const plan *p, const float *z, size_t kept)
{
    double most = 0;
    for (size_t j = 0; j < kept; j++) most = fmax(most, fabs((double)z[j]) * step_of(p, j));
    return most / 127;
}

/* How much rounding a query to its image leaves open. */
static double query_miss(const plan *p, const float *z, size_t kept)
{
    return query_step(p, z, kept) * sqrt((double)kept / 12);
}

/* How many of the sample's rows each width lets through, of one turned query whose k-th best score is `bar`. */
static void count_passing(const plan *p, const float *z, double bar, size_t step, uint64_t passed[N_WIDTHS])
{
    const uint32_t dim = p->dim;
    double tail[N_WIDTHS];
    double blur[N_WIDTHS]; /* what rounding to levels adds to the bound */
    double miss[N_WIDTHS]; /* and rounding the query, for a level */
    size_t w = 0;
    for (; w < N_WIDTHS && WIDTHS[w] < dim; w++) {
        const size_t kept = WIDTHS[w] - 1;
        double levels = 0;
        for (size_t j = 0; j < kept; j++) levels += pow(step_of(p, j), 2) / 12;
        tail[w] = cairn_norm(z + kept, dim - kept);
        blur[w] = cairn_norm(z, kept) * sqrt(levels);
        miss[w] = query_miss(p, z, kept);
    }
    for (size_t r = 0; r < p->n_rows; r += step) {
        const float *y = p->turned + r * dim;
        double part = 0;
        double left = 0;
        double levels = 0; /* squares */
        size_t j = 0;
        for (size_t i = 0; i < dim; i++) left += (double)y[i] * (double)y[i];
        for (size_t i = 0; i < w; i++) {
            for (; j < WIDTHS[i] - 1; j++) {
                part += (double)y[j] * (double)z[j];
                left -= (double)y[j] * (double)y[j];
                levels += pow((double)y[j] / step_of(p, j), 2);
            }
            double slack = blur[i] + miss[i] * sqrt(levels) + tail[i] * sqrt(fmax(left, 0));
            passed[i] += part + slack >= bar;
        }
    }
}

/* The cheapest width, 0 if it is none. */
static cairn_status choose_width(plan *p, uint32_t *out)
{
    const cairn_index *index = p->index;
    const uint32_t dim = p->dim;
    size_t half = p->n_queries / 2;
    size_t asked = p->n_queries - half < TRIAL_QUERIES ? p->n_queries - half : TRIAL_QUERIES;
    size_t step = (p->n_rows + TRIAL_ROWS - 1) / TRIAL_ROWS;
    uint64_t passed[N_WIDTHS] = {0};
    cairn_index_scratch *scratch = NULL;
    cairn_index_hit *hits = cairn_alloc_array(p->k, sizeof *hits);
    cairn_status st = hits != NULL ? cairn_index_scratch_new(&scratch) : cairn_fail(CAIRN_NO_MEMORY, "sketch");
    *out = 0;
    turn(p);
    for (size_t i = 0; i < asked && st == CAIRN_OK; i++) {
        const size_t at = (half + i * (p->n_queries - half) / asked) * dim;
        const float *q = p->queries + at;
        cairn_index_query query = {q, 0, (uint32_t)index->rows.count};
        uint32_t found = 0;
        st = cairn_index_search(index, scratch, &query, 1, p->k, hits, &found, NULL);
        if (st != CAIRN_OK || found == 0) break;
        double bias = 0;
        for (size_t j = 0; j < dim; j++) bias += (double)q[j] * (double)p->sketch->center[j];
        count_passing(p, p->asked + at, (double)hits[found - 1].score - bias, step, passed);
    }
    cairn_index_scratch_free(scratch);
    cairn_free(hits);
    if (st != CAIRN_OK) return st;
    double best = 0.7 * scan_ns(dim, p->together); /* for less it is not worth its memory */
    double shown = (double)(asked * ((p->n_rows + step - 1) / step));
    for (size_t w = 0; w < N_WIDTHS && WIDTHS[w] < dim; w++) {
        double ns = sketch_ns(WIDTHS[w], p->together) + (double)passed[w] / shown * look_ns(dim, p->together);
        if (ns >= best) continue;
        best = ns;
        *out = WIDTHS[w];
    }
    return CAIRN_OK;
}

typedef struct tally {
    double sum, squares;
} tally;
static void count(tally *t, double x)
{
    t->sum += x;
    t->squares += x * x;
}
static double farthest(const tally *t, size_t n)
{
    double mean = t->sum / (double)n;
    return mean + FARTHEST * sqrt(fmax(t->squares / (double)n - mean * mean, 0));
}

/* Mean sizes of what the slack of a score is made of, in queries and rows of the sample. */
typedef struct sizes {
    double tail, head, miss, open;       /* A without weights */
    double others, error, level, length; /* E */
} sizes;

static double row_levels(const plan *p, const float *y, size_t kept)
{
    double sum = 0;
    for (size_t j = 0; j < kept; j++) {
        double v = fmin(fabs((double)y[j]) * (double)p->sketch->per_step[j], 127);
        sum += v * v;
    }
    return sqrt(sum);
}

static sizes sizes_of(const plan *p, size_t kept)
{
    const uint32_t dim = p->dim;
    const double each_query = 1 / (double)p->n_queries, each_row = 1 / (double)p->n_rows;
    sizes s = {0};
    for (size_t i = 0; i < p->n_queries; i++) {
        const float *z = p->asked + i * dim;
        s.tail += cairn_norm(z + kept, dim - kept) * each_query;
        s.head += cairn_norm(z, kept) * each_query;
        s.miss += query_miss(p, z, kept) * each_query;
        s.open += cairn_sketch_open(p->sketch, dim, z, cairn_norm(p->queries + i * dim, dim)) * each_query;
    }
    for (size_t j = 0; j < kept; j++) s.error += (double)p->sketch->step[j] * (double)p->sketch->step[j] / 12;
    s.error = sqrt(s.error);
    for (size_t r = 0; r < p->n_rows; r++) {
        const float *y = p->turned + r * dim;
        s.others += cairn_norm(y + kept, dim - kept) * each_row;
        s.level += row_levels(p, y, kept) * each_row;
        s.length += cairn_norm(p->rows + r * dim, dim) * each_row;
    }
    return s;
}

/* Both factors of the slack are rounded up, the row's to `steps` on average, the query's to steps of its image: how
 * much larger a step of the row makes them alike. */
static double coarser(const plan *p, size_t kept, const sizes *of, double steps)
{
    const cairn_sketch *s = p->sketch;
    double weight = 0;
    for (size_t i = 0; i < p->n_queries; i++) {
        const float *z = p->asked + i * p->dim;
        const double step = query_step(p, z, kept);
        double head = hypot(cairn_norm(z, kept) * s->head_weight, query_miss(p, z, kept) / s->level_weight);
        double rest = hypot(cairn_norm(z + kept, p->dim - kept), of->open / s->length_weight);
        if (step > 0) weight += hypot(head, rest) * s->slack_step / step / (double)p->n_queries;
    }
    return weight > 0 && weight < steps ? sqrt(steps / weight) : 1;
}

/* What rounding leaves open: norms, and 1 - to_query' to_row, in double. */
static bool set_rounding(cairn_sketch *s, uint32_t dim)
{
    double mismatch = 0;
    for (size_t i = 0; i < dim; i++)
        for (size_t j = 0; j < dim; j++) {
            double sum = i == j ? -1 : 0;
            for (size_t l = 0; l < dim; l++) sum += (double)s->to_query[l * dim + i] * (double)s->to_row[l * dim + j];
            mismatch += sum * sum;
        }
    s->mismatch = sqrt(mismatch) * 1.000001;
    s->norms_product = 0;
    for (size_t j = 0; j < dim; j++) {
        double norm = cairn_norm(s->to_row + j * dim, dim) * 1.000001;
        s->norms[j] = (float)norm * 1.000001f;
        s->norms_product += norm * cairn_norm(s->to_query + j * dim, dim) * 1.000001;
    }
    s->center_norm = cairn_norm(s->center, dim) * 1.000001;
    return isfinite(s->mismatch) && isfinite(s->norms_product);
}

static bool is_weight(double w)
{
    return w > 1e-12 && w < 1e12;
}

static bool weights_fit(const cairn_sketch *s)
{
    return is_weight(s->head_weight) && is_weight(s->level_weight) && is_weight(s->length_weight);
}

static bool set_levels(cairn_sketch *s, size_t kept)
{
    for (size_t j = 0; j < kept; j++) {
        if (!(s->step[j] > 1e-20f && s->step[j] < 1e20f)) return false;
        s->per_step[j] = 1 / s->step[j];
    }
    return true;
}

bool cairn_sketch_follow(cairn_sketch *sketch, uint32_t dim)
{
    return set_levels(sketch, sketch->width - 1) && set_rounding(sketch, dim) && weights_fit(sketch) &&
           sketch->slack_step > LEAST_STEP && isfinite(sketch->slack_step);
}

bool cairn_sketch_width_fits(uint32_t width, uint32_t dim)
{
    for (size_t i = 0; i < N_WIDTHS; i++)
        if (WIDTHS[i] == width) return width < dim && dim >= DIM_MIN;
    return false;
}

cairn_status cairn_sketch_make(cairn_sketch *sketch, uint32_t dim)
{
    const size_t all = (size_t)dim * dim;
    const size_t numbers =
        2 * (size_t)dim + 2 * all + 2 * CAIRN_SKETCH_WIDTH_MAX + 2 * (size_t)CAIRN_SKETCH_PIECE * dim;
    sketch->center = cairn_calloc(numbers, sizeof *sketch->center);
    if (sketch->center == NULL) return cairn_fail(CAIRN_NO_MEMORY, "sketch of %u dimensions", (unsigned)dim);
    sketch->norms = sketch->center + dim;
    sketch->to_row = sketch->norms + dim;
    sketch->to_query = sketch->to_row + all;
    sketch->step = sketch->to_query + all;
    sketch->per_step = sketch->step + CAIRN_SKETCH_WIDTH_MAX;
    sketch->wide = sketch->per_step + CAIRN_SKETCH_WIDTH_MAX;
    sketch->bytes = numbers * sizeof *sketch->center;
    return CAIRN_OK;
}

/* Steps and weights for `width`, from the sample: each part of A beside the tail is to E's as the tail is to it. */
static bool set_steps(plan *p, uint32_t width)
{
    cairn_sketch *s = p->sketch;
    const uint32_t dim = p->dim;
    const size_t kept = width - 1;
    for (size_t j = 0; j < kept; j++) s->step[j] = (float)step_of(p, j);
    if (!set_levels(s, kept) || !set_rounding(s, dim)) return false;
    const sizes z = sizes_of(p, kept);
    s->head_weight = sqrt(z.error * z.tail / (z.others * z.head));
    s->level_weight = sqrt(z.miss * z.others / (z.level * z.tail));
    s->length_weight = sqrt(z.open * z.others / (z.length * z.tail));
    if (!weights_fit(s)) return false;
    tally errors = {0};
    for (size_t r = 0; r < p->n_rows; r++) {
        const float *y = p->turned + r * dim;
        double kept_part = hypot(z.error / s->head_weight, row_levels(p, y, kept) * s->level_weight);
        double rest = hypot(cairn_norm(y + kept, dim - kept), cairn_norm(p->rows + r * dim, dim) * s->length_weight);
        count(&errors, hypot(kept_part, rest));
    }
    s->slack_step = farthest(&errors, p->n_rows) / 255;
    if (!(s->slack_step > LEAST_STEP)) return false;
    s->slack_step *= coarser(p, kept, &z, errors.sum / (double)p->n_rows / s->slack_step);
    return true;
}

/* Rows less the mean, evenly from all of them, and their second moments. */
static void sample_rows(plan *p)
{
    const cairn_rows *rows = &p->index->rows;
    const uint32_t dim = p->dim;
    const size_t all = (size_t)dim * dim;
    size_t want = rows->count < FIT_ROWS ? rows->count : FIT_ROWS;
    for (size_t j = 0; j < dim; j++)
        p->sketch->center[j] = rows->finite != 0 ? (float)(rows->total[j] / (double)rows->finite) : 0;
    for (size_t i = 0; i < want; i++) {
        float *to = p->rows + p->n_rows * dim;
        cairn_rows_widen(rows, (size_t)((uint64_t)i * rows->count / want), 1, to);
        for (size_t j = 0; j < dim; j++) to[j] -= p->sketch->center[j];
        p->n_rows += cairn_norm(to, dim) < 1e12;
    }
    memset(p->products, 0, all * sizeof *p->products);
    cairn_gemm_tn(dim, dim, p->n_rows, p->rows, dim, p->rows, dim, p->products, dim, true);
    for (size_t i = 0; i < all; i++) p->spread[i] = (double)p->products[i] / (double)(p->n_rows + (p->n_rows == 0));
}

cairn_status cairn_sketch_plan(cairn_sketch *sketch, const cairn_index *index, const float *queries, size_t n,
                               uint32_t k, size_t together)
{
    const uint32_t dim = index->rows.dim;
    const size_t all = (size_t)dim * dim;
    const size_t works = 5 * all + 2 * dim + CAIRN_EIGEN_WORK * (size_t)dim;
    plan p = {
        .sketch = sketch, .index = index, .dim = dim, .queries = queries, .n_queries = n, .together = together, .k = k};
    cairn_sketch_wipe(sketch);
    sketch->planned = index->rows.count;
    if (dim < DIM_MIN || n < 2 || k == 0) return CAIRN_OK;
    cairn_status st = cairn_sketch_make(sketch, dim);
    uint32_t width = 0;
    if (st != CAIRN_OK) goto out;
    p.rows = cairn_alloc_array((2 * (size_t)FIT_ROWS + n) * dim + all, sizeof *p.rows);
    p.spread = cairn_alloc_array(all + works + dim, sizeof *p.spread);
    if (p.rows == NULL || p.spread == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "sketch of %zu rows", index->rows.count);
        goto out;
    }
    p.turned = p.rows + (size_t)FIT_ROWS * dim;
    p.products = p.turned + (size_t)FIT_ROWS * dim;
    p.asked = p.products + all;
    p.work = p.spread + all;
    p.deviation = p.work + works;
    sample_rows(&p);
    if (p.n_rows < TRIAL_ROWS / 2 || !balance(&p, queries, n / 2)) goto out;
    if ((st = choose_width(&p, &width)) != CAIRN_OK || width == 0) goto out;
    if (!balance(&p, queries, n)) {
        width = 0;
        goto out;
    }
    turn(&p);
    if (!set_steps(&p, width)) width = 0;
out:
    cairn_free(p.rows);
    cairn_free(p.spread);
    if (st != CAIRN_OK || width == 0) {
        size_t planned = sketch->planned;
        cairn_sketch_wipe(sketch);
        sketch->planned = planned;
        return st;
    }
    sketch->width = width;
    return CAIRN_OK;
}
