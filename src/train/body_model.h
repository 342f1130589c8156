/* body_model.h - the decoder over one window, forward and backward.
 *
 * Per layer (Touvron et al. 2023; Qwen3 adds the norms of q and k), x (rows, width):
 *     h = norm(x);  q, k, v = h Wqkv^T;  q, k = norm(q), norm(k) per head;  x += attend(q, k, v) Wo^T
 *     h = norm(x);  g, u = h Wgu^T;                                         x += (silu(g) u) Wd^T
 * Kept for the way back: both x, qkv before their norms, what attention gave, g and u. Norms and silu are cheap and are
 * done again; attention scores again (body_attention.h). At the demo shape a window of 512 keeps 17 MB.
 */

typedef struct layer_kept {
    real *x;        /* (rows, width) what came in */
    real *qkv;      /* (rows, F) before the norms of q and k */
    real *attended; /* (rows, heads * D) */
    real *x_ffn;    /* (rows, width) after attention */
    real *gate_up;  /* (rows, 2 hidden) */
} layer_kept;

struct TRAIN(model) {
    const cairn_train_layout *layout;
    kernels_of_real kernels;
    TRAIN(attention) * attention; /* with landmarks, */
    TRAIN(dense) * dense;         /* or without */
    size_t rows_max;
    size_t width, hidden, vocab;
    size_t heads, kv_heads, D;
    size_t Q, KV, F; /* numbers of q, of k, of q, k and v of a row */
    layer_kept *layers;
    real *x;       /* (rows, width) what goes on */
    real *h;       /* (rows, width) normed */
    real *qkv;     /* (rows, F) normed */
    real *act;     /* (rows, hidden) silu(g) u */
    real *logits;  /* (rows, vocab) */
    real *dx, *dh; /* (rows, width) */
    real *dqkv;    /* (rows, F) */
    real *dattended;
    real *dgate_up; /* (rows, 2 hidden) */
    real *dact;     /* (rows, hidden) */
    real *scratch;  /* (GEMM_SCRATCH) */
    double scale;   /* loss's */
};

void TRAIN(model_free)(TRAIN(model) * m)
{
    if (m == NULL) return;
    TRAIN(attention_free)(m->attention);
    TRAIN(dense_free)(m->dense);
    for (uint32_t l = 0; m->layers != NULL && l < m->layout->shape.attention.layers; l++) {
        cairn_free(m->layers[l].x);
        cairn_free(m->layers[l].qkv);
        cairn_free(m->layers[l].attended);
        cairn_free(m->layers[l].x_ffn);
        cairn_free(m->layers[l].gate_up);
    }
    real *const buffers[] = {m->x,  m->h,    m->qkv,       m->act,      m->logits, m->dx,
                             m->dh, m->dqkv, m->dattended, m->dgate_up, m->dact,   m->scratch};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cairn_free(buffers[i]);
    cairn_free(m->layers);
    cairn_free(m);
}

TRAIN(attention) * TRAIN(model_attention)(TRAIN(model) * m)
{
    return m->attention;
}

void TRAIN(model_use)(TRAIN(model) * m, const struct cairn_kernels *kernels)
{
    m->kernels = kernels;
    if (m->attention != NULL) m->attention->kernels = kernels;
    if (m->dense != NULL) m->dense->kernels = kernels;
}

cairn_status TRAIN(model_new)(const cairn_train_layout *layout, size_t rows, TRAIN(model) * *out)
{
    const cairn_train_shape *s = &layout->shape;
    const uint32_t layers = s->attention.layers;
    TRAIN(model) *m = cairn_calloc(1, sizeof *m);
    *out = NULL;
    if (m == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a model to train");
    m->layout = layout;
    m->kernels = best_kernels();
    m->rows_max = rows;
    m->width = s->width;
    m->hidden = s->hidden;
    m->vocab = s->vocab;
    m->heads = s->attention.heads;
    m->kv_heads = s->attention.kv_heads;
    m->D = s->attention.head_dim;
    m->Q = m->heads * m->D;
    m->KV = m->kv_heads * m->D;
    m->F = m->Q + 2 * m->KV;
    cairn_status st =
        s->mode == CAIRN_TRAIN_LANDMARK
            ? TRAIN(attention_new)(&s->attention, rows, &m->attention)
            : TRAIN(dense_new)(&s->attention, s->mode == CAIRN_TRAIN_XL ? s->segment : 0, rows, &m->dense);
    if (st != CAIRN_OK) {
        TRAIN(model_free)(m);
        return st;
    }
    m->layers = cairn_calloc(layers, sizeof *m->layers);
    bool all = m->layers != NULL;
    for (uint32_t l = 0; all && l < layers; l++) {
        layer_kept *k = &m->layers[l];
        all = (k->x = reals(rows, m->width)) != NULL && (k->qkv = reals(rows, m->F)) != NULL &&
              (k->attended = reals(rows, m->Q)) != NULL && (k->x_ffn = reals(rows, m->width)) != NULL &&
              (k->gate_up = reals(rows, 2 * m->hidden)) != NULL;
    }
    m->x = reals(rows, m->width);
    m->h = reals(rows, m->width);
    m->qkv = reals(rows, m->F);
    m->act = reals(rows, m->hidden);
    m->logits = reals(rows, m->vocab);
    m->dx = reals(rows, m->width);
    m->dh = reals(rows, m->width);
    m->dqkv = reals(rows, m->F);
    m->dattended = reals(rows, m->Q);
    m->dgate_up = reals(rows, 2 * m->hidden);
    m->dact = reals(rows, m->hidden);
    m->scratch = reals(GEMM_SCRATCH, 1);
    if (!all || m->x == NULL || m->h == NULL || m->qkv == NULL || m->act == NULL || m->logits == NULL ||
        m->dx == NULL || m->dh == NULL || m->dqkv == NULL || m->dattended == NULL || m->dgate_up == NULL ||
        m->dact == NULL || m->scratch == NULL) {
        TRAIN(model_free)(m);
        return cairn_fail(CAIRN_NO_MEMORY, "activations of a window of %zu slots", rows);
    }
    *out = m;
    return CAIRN_OK;
}

/* ---- products of a window's rows x (rows, in), y (rows, out) and a matrix w (out, in) or its gradient ---- */

static void rows_forward(const TRAIN(model) * m, size_t rows, const real *x, size_t in, const real *w, size_t out,
                         real *y, bool add)
{
    gemm(m->kernels, rows, out, in, x, in, 1, w, 1, in, y, out, add, m->scratch);
}
static void rows_backward(const TRAIN(model) * m, size_t rows, const real *dy, size_t out, const real *w, size_t in,
                          real *dx)
{
    gemm(m->kernels, rows, in, out, dy, out, 1, w, in, 1, dx, in, false, m->scratch);
}
static void matrix_backward(const TRAIN(model) * m, size_t rows, const real *dy, size_t out, const real *x, size_t in,
                            real *dw)
{
    gemm(m->kernels, out, in, rows, dy, 1, out, x, in, 1, dw, in, true, m->scratch);
}

/* ---- pieces ---- */

static void norm_rows(const TRAIN(model) * m, real *out, const real *x, const real *weight, size_t rows)
{
    const size_t n = m->width;
    for (size_t r = 0; r < rows; r++)
        vec_norm(m->kernels, out + r * n, x + r * n, weight, n, m->layout->shape.norm_eps);
}

/* dx from m->dh: added to or, where nothing else reaches x, written */
static void norm_rows_backward(const TRAIN(model) * m, real *dx, real *dweight, const real *x, const real *weight,
                               size_t rows, bool add)
{
    const size_t n = m->width;
    for (size_t r = 0; r < rows; r++)
        vec_norm_backward(m->kernels, dx + r * n, dweight, x + r * n, weight, m->dh + r * n, n,
                          m->layout->shape.norm_eps, add);
}

/* act = silu(g) u */
static void swiglu_rows(const TRAIN(model) * m, const real *gate_up, size_t rows)
{
    const size_t n = m->hidden;
    for (size_t r = 0; r < rows; r++)
        vec_swiglu(m->kernels, m->act + r * n, gate_up + 2 * r * n, gate_up + 2 * r * n + n, n);
}

/* act again, and dgate_up from dact */
static void swiglu_rows_backward(const TRAIN(model) * m, const real *gate_up, size_t rows)
{
    const size_t n = m->hidden;
    for (size_t r = 0; r < rows; r++) {
        const real *g = gate_up + 2 * r * n;
        real *dg = m->dgate_up + 2 * r * n;
        vec_swiglu_backward(m->kernels, m->act + r * n, dg, dg + n, m->dact + r * n, g, g + n, n);
    }
}

/* q, k, v of a layer as attention takes them */
static TRAIN(qkv) attention_input(TRAIN(model) * m, const real *params, const cairn_train_layer *at,
                                  const layer_kept *kept, size_t rows)
{
    const real *base = m->layout->shape.qk_norm ? m->qkv : kept->qkv;
    for (size_t r = 0; r < rows && base == m->qkv; r++) {
        for (size_t h = 0; h < m->heads + m->kv_heads; h++) {
            const size_t x = r * m->F + h * m->D;
            vec_norm(m->kernels, m->qkv + x, kept->qkv + x, params + (h < m->heads ? at->q_norm : at->k_norm), m->D,
                     m->layout->shape.norm_eps);
        }
    }
    return (TRAIN(qkv)){.q = base, .k = base + m->Q, .v = kept->qkv + m->Q + m->KV, .ld = m->F};
}

static void norm_heads_backward(TRAIN(model) * m, const real *params, const cairn_train_layer *at,
                                const layer_kept *kept, size_t rows, real *grads)
{
    if (!m->layout->shape.qk_norm) return;
    for (size_t r = 0; r < rows; r++) {
        for (size_t h = 0; h < m->heads + m->kv_heads; h++) {
            const size_t weight = h < m->heads ? at->q_norm : at->k_norm;
            real *d = m->dqkv + r * m->F + h * m->D;
            vec_norm_backward(m->kernels, d, grads + weight, kept->qkv + r * m->F + h * m->D, params + weight, d, m->D,
                              m->layout->shape.norm_eps, false);
        }
    }
}

static void add_rows(real *to, const real *x, size_t n)
{
    for (size_t i = 0; i < n; i++) to[i] += x[i];
}

/* ---- forward ---- */

static void layer_forward(TRAIN(model) * m, const real *params, uint32_t l, size_t rows, const cairn_train_guide *guide)
{
    const cairn_train_layer *at = &m->layout->layers[l];
    layer_kept *kept = &m->layers[l];
    const size_t W = m->width;
    memcpy(kept->x, m->x, rows * W * sizeof *m->x);
    norm_rows(m, m->h, m->x, params + at->attn_norm, rows);
    rows_forward(m, rows, m->h, W, params + at->qkv, m->F, kept->qkv, false);
    TRAIN(qkv) in = attention_input(m, params, at, kept, rows);
    if (m->dense != NULL)
        TRAIN(dense_attend)(m->dense, rows, &in, kept->attended);
    else
        TRAIN(attend)(m->attention, l, rows, &in, params + at->landmark_bias, guide, kept->attended);
    rows_forward(m, rows, kept->attended, m->Q, params + at->o, W, m->x, true);

    memcpy(kept->x_ffn, m->x, rows * W * sizeof *m->x);
    norm_rows(m, m->h, m->x, params + at->ffn_norm, rows);
    rows_forward(m, rows, m->h, W, params + at->gate_up, 2 * m->hidden, kept->gate_up, false);
    swiglu_rows(m, kept->gate_up, rows);
    rows_forward(m, rows, m->act, m->hidden, params + at->down, W, m->x, true);
}

const real *TRAIN(forward_guided)(TRAIN(model) * m, const real *params, const cairn_token *slots, size_t rows,
                                  const cairn_train_guide *guide)
{
    const cairn_train_layout *t = m->layout;
    assert(rows <= m->rows_max);
    for (size_t r = 0; r < rows; r++) {
        assert(slots[r] >= 0 && (size_t)slots[r] < m->vocab);
        memcpy(m->x + r * m->width, params + t->embedding + (size_t)slots[r] * m->width, m->width * sizeof *m->x);
    }
    for (uint32_t l = 0; l < t->shape.attention.layers; l++) layer_forward(m, params, l, rows, guide);
    norm_rows(m, m->h, m->x, params + t->output_norm, rows);
    rows_forward(m, rows, m->h, m->width, params + t->head, m->vocab, m->logits, false);
    return m->logits;
}
const real *TRAIN(forward)(TRAIN(model) * m, const real *params, const cairn_token *slots, size_t rows)
{
    return TRAIN(forward_guided)(m, params, slots, rows, NULL);
}

double TRAIN(loss)(TRAIN(model) * m, const cairn_train_window *window, double scale, real *nll, uint8_t *right)
{
    const size_t V = m->vocab;
    double total = 0;
    m->scale = scale;
    for (size_t r = 0; r < window->rows; r++) {
        real *logits = m->logits + r * V;
        cairn_token target = window->targets[r];
        double weight = window->weights == NULL ? 1 : (double)window->weights[r];
        if (nll != NULL) nll[r] = 0;
        if (right != NULL) right[r] = 0;
        if (target < 0) {
            memset(logits, 0, V * sizeof *logits);
            continue;
        }
        assert((size_t)target < V);
        real max = vec_max(m->kernels, logits, V), of_target = logits[target];
        if (right != NULL) {
            size_t best = 0;
            while (best + 1 < V && !(logits[best] >= max)) best++;
            right[r] = best == (size_t)target;
        }
        real sum = vec_exp(m->kernels, logits, max, V);
        double minus_ln_p = log((double)sum) + (double)max - (double)of_target;
        total += weight * minus_ln_p;
        if (nll != NULL) nll[r] = (real)minus_ln_p;
        vec_scale(m->kernels, logits, (real)(weight * scale / (double)sum), V);
        logits[target] -= (real)(weight * scale);
    }
    return total;
}

/* ---- backward ---- */

/* m->dx: dL/d what goes out of the layer, in; dL/d what came in, out */
static double layer_backward(TRAIN(model) * m, const real *params, uint32_t l, const cairn_train_window *window,
                             real *grads)
{
    const size_t rows = window->rows;
    const cairn_train_layer *at = &m->layout->layers[l];
    const layer_kept *kept = &m->layers[l];
    const size_t W = m->width, H = m->hidden, Q = m->Q, F = m->F;

    rows_backward(m, rows, m->dx, W, params + at->down, H, m->dact);
    swiglu_rows_backward(m, kept->gate_up, rows);
    matrix_backward(m, rows, m->dx, W, m->act, H, grads + at->down);
    norm_rows(m, m->h, kept->x_ffn, params + at->ffn_norm, rows);
    matrix_backward(m, rows, m->dgate_up, 2 * H, m->h, W, grads + at->gate_up);
    rows_backward(m, rows, m->dgate_up, 2 * H, params + at->gate_up, W, m->dh);
    norm_rows_backward(m, m->dx, grads + at->ffn_norm, kept->x_ffn, params + at->ffn_norm, rows, true);

    rows_backward(m, rows, m->dx, W, params + at->o, Q, m->dattended);
    matrix_backward(m, rows, m->dx, W, kept->attended, Q, grads + at->o);
    TRAIN(qkv) in = attention_input(m, params, at, kept, rows);
    double guided = 0;
    if (m->dense != NULL)
        TRAIN(dense_backward)(m->dense, rows, &in, m->dattended, m->dqkv, m->dqkv + Q, m->dqkv + Q + m->KV);
    else
        guided =
            TRAIN(attend_backward)(m->attention, l, rows, &in, params + at->landmark_bias, m->dattended, window->guide,
                                   m->scale, m->dqkv, m->dqkv + Q, m->dqkv + Q + m->KV, grads + at->landmark_bias);
    norm_heads_backward(m, params, at, kept, rows, grads);
    norm_rows(m, m->h, kept->x, params + at->attn_norm, rows);
    matrix_backward(m, rows, m->dqkv, F, m->h, W, grads + at->qkv);
    rows_backward(m, rows, m->dqkv, F, params + at->qkv, W, m->dh);
    norm_rows_backward(m, m->dx, grads + at->attn_norm, kept->x, params + at->attn_norm, rows, true);
    return guided;
}

double TRAIN(backward)(TRAIN(model) * m, const real *params, const cairn_train_window *window, real *grads)
{
    const cairn_train_layout *t = m->layout;
    const size_t rows = window->rows, W = m->width;
    norm_rows(m, m->h, m->x, params + t->output_norm, rows);
    matrix_backward(m, rows, m->logits, m->vocab, m->h, W, grads + t->head);
    rows_backward(m, rows, m->logits, m->vocab, params + t->head, W, m->dh);
    norm_rows_backward(m, m->dx, grads + t->output_norm, m->x, params + t->output_norm, rows, false);
    double guided = 0;
    for (uint32_t l = t->shape.attention.layers; l-- > 0;) guided += layer_backward(m, params, l, window, grads);
    for (size_t r = 0; r < rows; r++) add_rows(grads + t->embedding + (size_t)window->slots[r] * W, m->dx + r * W, W);
    return guided;
}
