/* forward.c - the transformer over a chunk of rows, and over one.
 *
 * Per layer (Touvron et al. 2023; Qwen3 adds the norms of q and k):
 *     h = norm(x);  q, k, v = h Wq^T, h Wk^T, h Wv^T;  q, k = norm(q), norm(k) per head
 *     x += attend(q, k, v) Wo^T                        the session keeps k and v, rotates, and attends
 *     h = norm(x);  x += (silu(h Wg^T) * h Wu^T) Wd^T
 *
 * Weights stay in the file's type. A chunk turns a panel of weight rows into f32 once and multiplies all tiles with it
 * (for a tile of 64 rows the conversion is about 6 % of the work, for 16 tiles nothing); one row is multiplied straight
 * from the stored type, where reading the weights is all the cost. */
#include "runtime_internal.h"

enum {
    PANEL_FLOATS =
        128 << 10, /* of converted weights: half an L2 of 1 MiB; half as many were 6 % slower at width 1024 */
    PANEL_ROWS_MIN = 32,
    PANEL_ROWS_MAX = 128,
    CHUNK_BYTES = 32 << 20,  /* of row buffers, where the caller leaves the chunk to us */
    HIDDEN_BYTES = 16 << 20, /* of gate and up */
    POOL_BYTES = 1 << 17,   /* of weights in a matrix-vector step from which threads pay: they spin between a token's */
    PIECE_BYTES = 64 << 10, /* of those, one item */
    CHUNK_BLOCKS_DEFAULT = 16,
    CHUNK_BLOCKS_MAX = 4096,
};

typedef struct products { /* out[i] (tiles * B, rows of w[i]) = a (tiles * B, cols) * w[i]^T */
    cairn_runtime *rt;
    const float *a;
    size_t tiles;
    size_t splits; /* parts the tiles are handed out in */
    size_t n;
    const weight *w[3];
    float *out[3];
    size_t panels[3];
} products;

/* Rows of a panel: depends on the matrix alone, so that its products do not change with threads or chunks. */
static size_t panel_rows(const weight *w)
{
    size_t most = PANEL_FLOATS / w->cols;
    most = most > PANEL_ROWS_MAX ? PANEL_ROWS_MAX : most < PANEL_ROWS_MIN ? PANEL_ROWS_MIN : most;
    size_t panels = (w->rows + most - 1) / most;
    size_t rows = (w->rows + panels - 1) / panels;
    return (rows + 15) / 16 * 16;
}

/* Rows [first, first + n) of a matrix as f32: in place, or converted into the worker's scratch. */
static const float *panel(const cairn_runtime *rt, const weight *w, size_t first, size_t n, size_t worker)
{
    if (w->type == CAIRN_W_F32) return (const float *)(const void *)(w->data + first * weight_row_bytes(w));
    float *to = rt->scratch + worker * rt->scratch_floats;
    rt->kernels->dequant(to, w->data, w->type, w->cols, first, n);
    return to;
}

static void product_item(void *arg, size_t item, size_t worker)
{
    const products *p = arg;
    const size_t B = p->rt->B;
    size_t split = item % p->splits;
    size_t number = item / p->splits;
    size_t i = 0;
    while (number >= p->panels[i]) number -= p->panels[i++];
    const weight *w = p->w[i];
    size_t first = number * panel_rows(w);
    size_t n = w->rows - first < panel_rows(w) ? w->rows - first : panel_rows(w);
    const float *b = panel(p->rt, w, first, n, worker);
    size_t t = p->tiles * split / p->splits, end = p->tiles * (split + 1) / p->splits;
    cairn_gemm_nt_tiles(end - t, B, n, w->cols, p->a + t * B * w->cols, w->cols, b, w->cols,
                        p->out[i] + t * B * w->rows + first, w->rows);
}

static void multiply(products *p)
{
    size_t panels = 0;
    for (size_t i = 0; i < p->n; i++)
        panels += p->panels[i] = (p->w[i]->rows + panel_rows(p->w[i]) - 1) / panel_rows(p->w[i]);
    /* Few panels and many threads: hand out parts of the tiles, at the price of converting a panel more than once. */
    size_t threads = cairn_pool_size(p->rt->pool);
    p->splits = threads > 1 ? (4 * threads + panels - 1) / panels : 1;
    if (p->splits > p->tiles) p->splits = p->tiles;
    cairn_pool_run(p->rt->pool, panels * p->splits, product_item, p);
}

static void multiply_one(cairn_runtime *rt, const weight *w, const float *a, float *out, size_t tiles)
{
    products p = {.rt = rt, .a = a, .tiles = tiles, .n = 1, .w = {w}, .out = {out}};
    multiply(&p);
}

/* ---- rows of a tile, one tile an item ---- */

typedef struct tile_rows {
    cairn_runtime *rt;
    const model_layer *layer;
    const float *norm;  /* (width) */
    const float *added; /* (rows, width): goes to x first; NULL = nothing */
    size_t first;       /* tile of item 0 */
} tile_rows;

/* h = norm(x + added) */
static void norm_item(void *arg, size_t item, size_t worker)
{
    const tile_rows *t = arg;
    const cairn_runtime *rt = t->rt;
    const cairn_model *m = rt->model;
    size_t width = m->info.width;
    (void)worker;
    for (size_t r = (t->first + item) * rt->B; r < (t->first + item + 1) * rt->B; r++) {
        float *x = rt->x + r * width;
        if (t->added != NULL) rt->kernels->axpy(x, 1, t->added + r * width, width);
        if (t->norm != NULL) rt->kernels->rms_norm(rt->h + r * width, x, t->norm, width, m->norm_eps);
    }
}

static void norm_heads(const cairn_runtime *rt, float *x, const float *norm, size_t heads)
{
    size_t dim = rt->model->info.head_dim;
    for (size_t i = 0; i < heads; i++) rt->kernels->rms_norm(x + i * dim, x + i * dim, norm, dim, rt->model->norm_eps);
}

static void head_norm_item(void *arg, size_t item, size_t worker)
{
    const tile_rows *t = arg;
    const cairn_runtime *rt = t->rt;
    const cairn_model_info *info = &rt->model->info;
    size_t row = (t->first + item) * rt->B;
    (void)worker;
    norm_heads(rt, rt->q + row * info->heads * info->head_dim, t->layer->q_norm, (size_t)rt->B * info->heads);
    norm_heads(rt, rt->k + row * info->kv_heads * info->head_dim, t->layer->k_norm, (size_t)rt->B * info->kv_heads);
}

static void silu_item(void *arg, size_t item, size_t worker)
{
    const tile_rows *t = arg;
    const cairn_runtime *rt = t->rt;
    size_t n = (size_t)rt->B * rt->model->info.hidden;
    (void)worker;
    rt->kernels->silu_mul(rt->gate + item * n, rt->up + item * n, n);
}

/* ---- a chunk ---- */

static void clear_padding(cairn_runtime *rt, size_t offset, size_t rows, size_t tiles)
{
    const cairn_model_info *info = &rt->model->info;
    size_t width = info->width;
    size_t attended = (size_t)info->heads * info->head_dim;
    size_t after = tiles * rt->B - offset - rows;
    memset(rt->x, 0, offset * width * sizeof *rt->x);
    memset(rt->attended, 0, offset * attended * sizeof *rt->x);
    memset(rt->x + (offset + rows) * width, 0, after * width * sizeof *rt->x);
    memset(rt->attended + (offset + rows) * attended, 0, after * attended * sizeof *rt->x);
}

static void embed(const cairn_runtime *rt, cairn_token id, float *out)
{
    const weight *e = &rt->model->embedding;
    rt->kernels->dequant(out, e->data, e->type, e->cols, (size_t)id, 1);
}

/* h, q, k, v of tiles [0, tiles) from x (and `added`, which is h). */
static void project(cairn_runtime *rt, const model_layer *layer, size_t tiles)
{
    tile_rows t = {.rt = rt, .layer = layer};
    products p = {.rt = rt,
                  .a = rt->h,
                  .tiles = tiles,
                  .n = 3,
                  .w = {&layer->q, &layer->k, &layer->v},
                  .out = {rt->q, rt->k, rt->v}};
    multiply(&p);
    if (layer->q_norm != NULL) cairn_pool_run(rt->pool, tiles, head_norm_item, &t);
}

/* x += feed-forward(h) for tiles [first, end), leaving the sum to be made in h. */
static void feed_forward(cairn_runtime *rt, const model_layer *layer, size_t first, size_t end)
{
    size_t width = rt->model->info.width;
    for (size_t at = first; at < end; at += rt->hidden_blocks) {
        size_t tiles = end - at < rt->hidden_blocks ? end - at : rt->hidden_blocks;
        float *rows = rt->h + at * rt->B * width;
        tile_rows t = {.rt = rt};
        products p = {
            .rt = rt, .a = rows, .tiles = tiles, .n = 2, .w = {&layer->gate, &layer->up}, .out = {rt->gate, rt->up}};
        multiply(&p);
        cairn_pool_run(rt->pool, tiles, silu_item, &t);
        multiply_one(rt, &layer->down, rt->gate, rows, tiles);
    }
}

/* Output rows in place of h; the caller has h = norm(x). */
typedef struct logits_job {
    cairn_runtime *rt;
    size_t rows;
    size_t offset;
    size_t first; /* tile */
    size_t end;
} logits_job;

static void logits_item(void *arg, size_t item, size_t worker)
{
    const logits_job *job = arg;
    cairn_runtime *rt = job->rt;
    const weight *w = &rt->model->output;
    size_t first = item * panel_rows(w);
    size_t n = w->rows - first < panel_rows(w) ? w->rows - first : panel_rows(w);
    const float *b = panel(rt, w, first, n, worker);
    float *tile = rt->scratch + worker * rt->scratch_floats + rt->panel_floats;
    for (size_t t = job->first; t < job->end; t++) {
        cairn_gemm_nt(rt->B, n, w->cols, rt->h + t * rt->B * w->cols, w->cols, b, w->cols, tile, n);
        for (size_t i = 0; i < rt->B; i++) {
            size_t row = t * rt->B + i; /* of the buffers; the chunk's rows start at offset */
            if (row < job->offset || row - job->offset >= job->rows || rt->logits[row - job->offset] == NULL) continue;
            memcpy(rt->logits[row - job->offset] + first, tile + i * n, n * sizeof *tile);
        }
    }
}

typedef struct vector_products { /* out[i] = w[i] x */
    cairn_runtime *rt;
    const float *x;
    size_t n;
    const weight *w[3];
    float *out[3];
    size_t pieces[3];
} vector_products;

static size_t piece_rows(const weight *w)
{
    size_t rows = PIECE_BYTES / weight_row_bytes(w);
    return rows < 16 ? 16 : rows / 16 * 16;
}

static void vector_item(void *arg, size_t item, size_t worker)
{
    const vector_products *p = arg;
    size_t i = 0;
    (void)worker;
    while (item >= p->pieces[i]) item -= p->pieces[i++];
    const weight *w = p->w[i];
    size_t first = item * piece_rows(w);
    size_t n = w->rows - first < piece_rows(w) ? w->rows - first : piece_rows(w);
    p->rt->kernels->matvec(p->out[i] + first, w->data, w->type, w->cols, first, n, p->x);
}

static void multiply_vector(vector_products *p)
{
    size_t bytes = 0;
    size_t items = 0;
    for (size_t i = 0; i < p->n; i++) {
        bytes += p->w[i]->rows * weight_row_bytes(p->w[i]);
        items += p->pieces[i] = (p->w[i]->rows + piece_rows(p->w[i]) - 1) / piece_rows(p->w[i]);
    }
    cairn_pool_run(bytes >= POOL_BYTES ? p->rt->pool : NULL, items, vector_item, p);
}

static void logits_of_row(cairn_runtime *rt, size_t row, float *out)
{
    const cairn_model *m = rt->model;
    float *h = rt->h + row * m->info.width;
    vector_products p = {.rt = rt, .x = h, .n = 1, .w = {&m->output}, .out = {out}};
    rt->kernels->rms_norm(h, rt->x + row * m->info.width, m->output_norm, m->info.width, m->norm_eps);
    multiply_vector(&p);
}

static void chunk_logits(cairn_runtime *rt, uint32_t offset, size_t rows, size_t first, size_t end, bool many)
{
    if (!many) {
        for (size_t r = 0; r < rows; r++)
            if (rt->logits[r] != NULL) logits_of_row(rt, offset + r, rt->logits[r]);
        return;
    }
    const weight *w = &rt->model->output;
    tile_rows t = {.rt = rt, .norm = rt->model->output_norm, .first = first};
    logits_job job = {.rt = rt, .rows = rows, .offset = offset, .first = first, .end = end};
    cairn_pool_run(rt->pool, end - first, norm_item, &t);
    cairn_pool_run(rt->pool, (w->rows + panel_rows(w) - 1) / panel_rows(w), logits_item, &job);
}

cairn_status forward_chunk(cairn_runtime *rt, uint32_t offset, size_t rows, bool many_logits)
{
    const cairn_model *m = rt->model;
    const size_t kv = (size_t)m->info.kv_heads * m->info.head_dim;
    const size_t heads = (size_t)m->info.heads * m->info.head_dim;
    const size_t tiles = (offset + rows + rt->B - 1) / rt->B;
    size_t first = tiles; /* tiles whose output somebody wants: of the last layer, only they go on after k and v */
    size_t end = 0;
    cairn_status st;
    for (size_t r = 0; r < rows; r++) {
        if (rt->logits[r] == NULL) continue;
        if (first == tiles) first = (offset + r) / rt->B;
        end = (offset + r) / rt->B + 1;
    }

    clear_padding(rt, offset, rows, tiles);
    for (size_t r = 0; r < rows; r++) embed(rt, rt->ids[r], rt->x + (offset + r) * m->info.width);
    tile_rows t = {.rt = rt, .norm = m->layers[0].attn_norm};
    cairn_pool_run(rt->pool, tiles, norm_item, &t);
    for (uint32_t l = 0; l < m->info.layers; l++) {
        const model_layer *layer = &m->layers[l];
        bool last = l + 1 == m->info.layers;
        size_t from = last ? first : 0;
        size_t to = last ? end : tiles;
        project(rt, layer, tiles);
        if ((st = cairn_session_append(rt->session, l, rows, rt->k + offset * kv, rt->v + offset * kv)) != CAIRN_OK)
            return st;
        if (from >= to) { /* nobody looks at the outcome: the K and V of the last layer are all that is left to keep */
            if ((st = cairn_session_learn(rt->session, l, rows, rt->q + offset * heads)) != CAIRN_OK) return st;
            break;
        }
        st = cairn_session_attend(rt->session, l, rows, rt->q + offset * heads, rt->attended + offset * heads);
        if (st != CAIRN_OK) return st;
        multiply_one(rt, &layer->o, rt->attended + from * rt->B * heads, rt->h + from * rt->B * m->info.width,
                     to - from);
        t = (tile_rows){.rt = rt, .norm = layer->ffn_norm, .added = rt->h, .first = from};
        cairn_pool_run(rt->pool, to - from, norm_item, &t);
        feed_forward(rt, layer, from, to);
        t.norm = last ? NULL : m->layers[l + 1].attn_norm;
        cairn_pool_run(rt->pool, to - from, norm_item, &t);
    }
    if ((st = cairn_session_advance(rt->session, rt->ids, rows)) != CAIRN_OK) return st;
    if (first < end) chunk_logits(rt, offset, rows, first, end, many_logits);
    return CAIRN_OK;
}

/* ---- one row ---- */

/* The next layer's query, as if the feed-forward layer before it added nothing: a session can read ahead by it. */
static void foresee(cairn_runtime *rt, uint32_t next)
{
    const cairn_model *m = rt->model;
    const model_layer *layer = &m->layers[next];
    vector_products q = {.rt = rt, .x = rt->h, .n = 1, .w = {&layer->q}, .out = {rt->q}};
    rt->kernels->rms_norm(rt->h, rt->x, layer->attn_norm, m->info.width, m->norm_eps);
    multiply_vector(&q);
    if (layer->q_norm != NULL) norm_heads(rt, rt->q, layer->q_norm, m->info.heads);
    cairn_session_foresee(rt->session, next, rt->q);
}

cairn_status forward_one(cairn_runtime *rt, cairn_token id, float *logits)
{
    const cairn_model *m = rt->model;
    const cairn_kernels *kernels = rt->kernels;
    const size_t width = m->info.width;
    cairn_status st;
    embed(rt, id, rt->x);
    for (uint32_t l = 0; l < m->info.layers; l++) {
        const model_layer *layer = &m->layers[l];
        kernels->rms_norm(rt->h, rt->x, layer->attn_norm, width, m->norm_eps);
        vector_products qkv = {
            .rt = rt, .x = rt->h, .n = 3, .w = {&layer->q, &layer->k, &layer->v}, .out = {rt->q, rt->k, rt->v}};
        multiply_vector(&qkv);
        if (layer->q_norm != NULL) {
            norm_heads(rt, rt->q, layer->q_norm, m->info.heads);
            norm_heads(rt, rt->k, layer->k_norm, m->info.kv_heads);
        }
        if ((st = cairn_session_append(rt->session, l, 1, rt->k, rt->v)) != CAIRN_OK) return st;
        if (l + 1 == m->info.layers && logits == NULL) break;
        if ((st = cairn_session_attend(rt->session, l, 1, rt->q, rt->attended)) != CAIRN_OK) return st;
        vector_products o = {.rt = rt, .x = rt->attended, .n = 1, .w = {&layer->o}, .out = {rt->h}};
        multiply_vector(&o);
        kernels->axpy(rt->x, 1, rt->h, width);
        if (l + 1 < m->info.layers && cairn_session_foresees(rt->session, l + 1)) foresee(rt, l + 1);
        kernels->rms_norm(rt->h, rt->x, layer->ffn_norm, width, m->norm_eps);
        vector_products in = {.rt = rt, .x = rt->h, .n = 2, .w = {&layer->gate, &layer->up}, .out = {rt->gate, rt->up}};
        multiply_vector(&in);
        kernels->silu_mul(rt->gate, rt->up, m->info.hidden);
        vector_products down = {.rt = rt, .x = rt->gate, .n = 1, .w = {&layer->down}, .out = {rt->h}};
        multiply_vector(&down);
        kernels->axpy(rt->x, 1, rt->h, width);
    }
    if ((st = cairn_session_advance(rt->session, &id, 1)) != CAIRN_OK) return st;
    if (logits != NULL) logits_of_row(rt, 0, logits);
    return CAIRN_OK;
}

void forward_first_layer(cairn_runtime *rt, const cairn_token *ids, size_t blocks, float *k, float *v)
{
    const cairn_model *m = rt->model;
    size_t rows = blocks * rt->B;
    size_t kv = (size_t)m->info.kv_heads * m->info.head_dim;
    tile_rows t = {.rt = rt, .norm = m->layers[0].attn_norm};
    for (size_t r = 0; r < rows; r++) embed(rt, ids[r], rt->x + r * m->info.width);
    cairn_pool_run(rt->pool, blocks, norm_item, &t);
    project(rt, &m->layers[0], blocks);
    memcpy(k, rt->k, rows * kv * sizeof *k);
    memcpy(v, rt->v, rows * kv * sizeof *v);
}

/* ---- buffers ---- */

static float *rows_of(size_t rows, size_t width)
{
    size_t n;
    return cairn_mul_size(rows, width, &n) ? cairn_calloc(n, sizeof(float)) : NULL;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

cairn_status forward_init(cairn_runtime *rt)
{
    const cairn_model_info *info = &rt->model->info;
    const size_t q = (size_t)info->heads * info->head_dim;
    const size_t kv = (size_t)info->kv_heads * info->head_dim;
    const size_t B = rt->B;
    size_t block_bytes = B * 2 * (info->width + q + kv) * sizeof(float); /* at most 2^12 * 2^24 * 4: no overflow */
    size_t hidden_bytes = B * 2 * info->hidden * sizeof(float);
    if (rt->chunk_blocks == 0) {
        size_t most = CHUNK_BYTES / block_bytes;
        rt->chunk_blocks = most < 1 ? 1 : most < CHUNK_BLOCKS_DEFAULT ? (uint32_t)most : CHUNK_BLOCKS_DEFAULT;
    }
    if (rt->chunk_blocks > CHUNK_BLOCKS_MAX)
        return cairn_fail(CAIRN_INVALID, "chunks of %u blocks: at most %d", rt->chunk_blocks, CHUNK_BLOCKS_MAX);
    size_t at_once = HIDDEN_BYTES / hidden_bytes;
    rt->hidden_blocks = at_once < 1 ? 1 : at_once < rt->chunk_blocks ? (uint32_t)at_once : rt->chunk_blocks;

    const model_layer *layer = &rt->model->layers[0]; /* all have its shapes */
    const weight *const shapes[6] = {&layer->q, &layer->k, &layer->o, &layer->gate, &layer->down, &rt->model->output};
    for (size_t i = 0; i < 6; i++) rt->panel_floats = larger(rt->panel_floats, panel_rows(shapes[i]) * shapes[i]->cols);
    rt->scratch_floats = rt->panel_floats + B * panel_rows(&rt->model->output);

    size_t rows = rt->chunk_blocks * B;
    rt->ids = cairn_calloc(rows, sizeof *rt->ids);
    rt->logits = cairn_calloc(rows, sizeof *rt->logits);
    rt->x = rows_of(rows, info->width);
    rt->h = rows_of(rows, info->width);
    rt->q = rows_of(rows, q);
    rt->attended = rows_of(rows, q);
    rt->k = rows_of(rows, kv);
    rt->v = rows_of(rows, kv);
    rt->gate = rows_of(rt->hidden_blocks * B, info->hidden);
    rt->up = rows_of(rt->hidden_blocks * B, info->hidden);
    rt->scratch = rows_of(cairn_pool_size(rt->pool), rt->scratch_floats);
    if (rt->ids == NULL || rt->logits == NULL || rt->x == NULL || rt->h == NULL || rt->q == NULL ||
        rt->attended == NULL || rt->k == NULL || rt->v == NULL || rt->gate == NULL || rt->up == NULL ||
        rt->scratch == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "buffers for chunks of %u blocks, %zu bytes each", rt->chunk_blocks,
                          block_bytes);
    return CAIRN_OK;
}

void forward_wipe(cairn_runtime *rt)
{
    cairn_free(rt->ids);
    cairn_free(rt->logits);
    cairn_free(rt->x);
    cairn_free(rt->h);
    cairn_free(rt->q);
    cairn_free(rt->attended);
    cairn_free(rt->k);
    cairn_free(rt->v);
    cairn_free(rt->gate);
    cairn_free(rt->up);
    cairn_free(rt->scratch);
}
