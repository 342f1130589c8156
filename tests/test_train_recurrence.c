/* test_train_recurrence.c - whole models without landmarks: one pass over a window is the recurrence it stands for.
 *
 * Witness: a decoder in plain loops that is called once for each segment, as Transformer-XL is defined (Dai et al.
 * 2019). It is handed the keys and values the call before made in every layer, as an array. Central differences of its
 * loss with those arrays held still are the gradient that stops at the memory.
 */
#include "train_bench.h"

#include <complex.h>

enum { LAYERS = 2, ROWS = 22, KV_MAX = 8, WIDTH_MAX = 12, HIDDEN_MAX = 10, VOCAB_MAX = 11, F_MAX = 24 };

/* ---- the decoder ---- */

typedef struct memory { /* of one segment: keys after their norm, before rotation */
    size_t rows;
    double k[LAYERS][ROWS][KV_MAX], v[LAYERS][ROWS][KV_MAX];
} memory;

static void product(double *y, const double *w, size_t rows, size_t cols, const double *x)
{
    for (size_t r = 0; r < rows; r++) {
        y[r] = 0;
        for (size_t c = 0; c < cols; c++) y[r] += w[r * cols + c] * x[c];
    }
}

static void norm(const cairn_train_layout *t, double *y, const double *x, const double *weight, size_t n)
{
    double square = 0;
    for (size_t i = 0; i < n; i++) square += x[i] * x[i];
    for (size_t i = 0; i < n; i++) y[i] = x[i] / sqrt(square / (double)n + (double)t->shape.norm_eps) * weight[i];
}

static double score(const cairn_attention_shape *a, const double *q, const double *k, size_t distance)
{
    const size_t D = a->head_dim;
    double sum = 0;
    for (size_t i = 0; i < D / 2; i++) {
        const size_t one = a->rope_interleaved ? 2 * i : i, two = a->rope_interleaved ? one + 1 : i + D / 2;
        const double angle = (double)distance * pow((double)a->rope_theta, -2.0 * (double)i / (double)D);
        sum += creal((q[one] + q[two] * I) * cexp(I * angle) * conj(k[one] + k[two] * I));
    }
    return sum / sqrt((double)D);
}

/* out (heads, D) of row r, whose q is (heads, D): over all rows of `before` (NULL = none) and rows 0..r of `own`. */
static void attend(const cairn_attention_shape *a, uint32_t l, size_t r, const double *q, const memory *before,
                   const memory *own, double *out)
{
    const size_t D = a->head_dim, past = before == NULL ? 0 : before->rows;
    double weights[2 * ROWS];
    for (size_t h = 0; h < a->heads; h++) {
        const size_t kv = h / (a->heads / a->kv_heads) * D;
        double all = 0;
        for (size_t t = 0; t <= past + r; t++) {
            const double *k = t < past ? before->k[l][t] : own->k[l][t - past];
            all += weights[t] = exp(score(a, q + h * D, k + kv, past + r - t));
        }
        for (size_t i = 0; i < D; i++) {
            out[h * D + i] = 0;
            for (size_t t = 0; t <= past + r; t++)
                out[h * D + i] += weights[t] / all * (t < past ? before->v[l][t] : own->v[l][t - past])[kv + i];
        }
    }
}

/* One call: logits (n, vocab) of slots (n) after `before`; *own is what the next call sees of this one. */
static void run_segment(const cairn_train_layout *t, const double *params, const cairn_token *slots, size_t n,
                        const memory *before, memory *own, double *logits)
{
    const cairn_train_shape *s = &t->shape;
    const size_t W = s->width, H = s->hidden, D = s->attention.head_dim;
    const size_t Q = s->attention.heads * D, KV = s->attention.kv_heads * D;
    static double x[ROWS][WIDTH_MAX], f[ROWS][F_MAX]; /* too much for a stack on top of two memories */
    double h[WIDTH_MAX], y[WIDTH_MAX], attended[F_MAX], gate_up[2 * HIDDEN_MAX];
    own->rows = n;
    for (size_t r = 0; r < n; r++) memcpy(x[r], params + t->embedding + (size_t)slots[r] * W, W * sizeof *params);
    for (uint32_t l = 0; l < s->attention.layers; l++) {
        const cairn_train_layer *at = &t->layers[l];
        for (size_t r = 0; r < n; r++) {
            norm(t, h, x[r], params + at->attn_norm, W);
            product(f[r], params + at->qkv, Q + 2 * KV, W, h);
            for (size_t i = 0; s->qk_norm && i < Q + KV; i += D)
                norm(t, f[r] + i, f[r] + i, params + (i < Q ? at->q_norm : at->k_norm), D);
            memcpy(own->k[l][r], f[r] + Q, KV * sizeof *f[r]);
            memcpy(own->v[l][r], f[r] + Q + KV, KV * sizeof *f[r]);
        }
        for (size_t r = 0; r < n; r++) {
            attend(&s->attention, l, r, f[r], before, own, attended);
            product(y, params + at->o, W, Q, attended);
            for (size_t i = 0; i < W; i++) x[r][i] += y[i];
            norm(t, h, x[r], params + at->ffn_norm, W);
            product(gate_up, params + at->gate_up, 2 * H, W, h);
            for (size_t i = 0; i < H; i++) gate_up[i] *= gate_up[H + i] / (1 + exp(-gate_up[i]));
            product(y, params + at->down, W, H, gate_up);
            for (size_t i = 0; i < W; i++) x[r][i] += y[i];
        }
    }
    for (size_t r = 0; r < n; r++) {
        norm(t, h, x[r], params + t->output_norm, W);
        product(logits + r * s->vocab, params + t->head, s->vocab, W, h);
    }
}

/* ---- a window of segments ---- */

typedef struct recurrence {
    bench b;
    size_t segment;
    bool still;   /* a segment sees `kept` of the one before instead of what that one has just made */
    memory *kept; /* (ROWS) one a segment; what the last run made that did not hold them still */
    double logits[ROWS * VOCAB_MAX];
} recurrence;

static void run_recurrence(recurrence *x)
{
    static memory unused;
    const size_t V = x->b.layout->shape.vocab;
    for (size_t from = 0, s = 0; from < x->b.rows; from += x->segment, s++) {
        const size_t n = x->b.rows - from < x->segment ? x->b.rows - from : x->segment;
        run_segment(x->b.layout, x->b.params, x->b.slots + from, n, s == 0 ? NULL : &x->kept[s - 1],
                    x->still ? &unused : &x->kept[s], x->logits + from * V);
    }
}

/* As bench_loss: the weighted sum, / 7. */
static double recurrence_loss(void *arg)
{
    recurrence *x = arg;
    const size_t V = x->b.layout->shape.vocab;
    double total = 0;
    run_recurrence(x);
    for (size_t r = 0; r < x->b.rows; r++) {
        const double *logits = x->logits + r * V;
        double sum = 0;
        if (x->b.targets[r] < 0) continue;
        for (size_t i = 0; i < V; i++) sum += exp(logits[i]);
        total += (double)x->b.weights[r] * (log(sum) - logits[x->b.targets[r]]);
    }
    return total / 7;
}

static const struct recurrence_case {
    const char *name;
    model_spec spec;
    cairn_train_attention mode;
    uint32_t segment;
    size_t rows;
} cases[] = {
    {"XL, qwen3, the last segment open", {2, 2, 1, 4, 12, 10, 11, 3, 2, true, false, true}, CAIRN_TRAIN_XL, 6, 22},
    {"XL, llama, tied", {2, 2, 2, 4, 8, 6, 9, 3, 1, false, true, false}, CAIRN_TRAIN_XL, 4, 16},
    {"XL, segments of one row", {2, 2, 1, 4, 8, 6, 9, 3, 1, true, true, false}, CAIRN_TRAIN_XL, 1, 5},
    {"dense, qwen3", {2, 2, 1, 4, 12, 10, 11, 3, 2, true, false, true}, CAIRN_TRAIN_DENSE, 0, 22},
    {"dense, llama, tied", {2, 2, 2, 4, 8, 6, 9, 3, 1, false, true, false}, CAIRN_TRAIN_DENSE, 0, 16},
};
enum { CASES = sizeof cases / sizeof *cases };

static void recurrence_init(recurrence *x, size_t number)
{
    const struct recurrence_case *c = &cases[number];
    const cairn_train_shape shape = without_landmarks(shape_of(&c->spec), c->mode, c->segment);
    *x = (recurrence){.segment = c->mode == CAIRN_TRAIN_XL ? c->segment : c->rows};
    bench_init(&x->b, &shape, c->rows, 200 + number);
    assert_true(c->rows <= ROWS && shape.attention.kv_heads * shape.attention.head_dim <= KV_MAX);
    assert_true(shape.width <= WIDTH_MAX && shape.hidden <= HIDDEN_MAX && shape.vocab <= VOCAB_MAX);
    x->kept = calloc(ROWS, sizeof *x->kept);
    assert_non_null(x->kept);
}
static void recurrence_wipe(recurrence *x)
{
    bench_wipe(&x->b);
    free(x->kept);
}

static void one_pass_is_one_call_for_each_segment(void **state)
{
    (void)state;
    for (size_t c = 0; c < CASES; c++) {
        recurrence x;
        recurrence_init(&x, c);
        run_recurrence(&x);
        const double *logits = cairn_train_forward_f64(x.b.model, x.b.params, x.b.slots, x.b.rows);
        double worst = 0;
        for (size_t i = 0; i < x.b.rows * x.b.layout->shape.vocab; i++)
            worst = fmax(worst, fabs(logits[i] - x.logits[i]));
        expect_below(cases[c].name, worst, 1e-11);
        recurrence_wipe(&x);
    }
}

static void every_parameters_gradient_equals_differences_with_the_memory_held_still(void **state)
{
    (void)state;
    for (size_t c = 0; c < CASES; c++) {
        recurrence x;
        recurrence_init(&x, c);
        run_recurrence(&x);
        x.still = true; /* kept: at the parameters as they are, whatever a difference does to them */
        bench_gradient(&x.b);
        print_message(" %s, %zu parameters\n", cases[c].name, x.b.total);
        for (size_t p = 0; p < x.b.layout->n_params; p++) {
            const cairn_train_param *param = &x.b.layout->params[p];
            expect_below(param->name,
                         worst_against_differences(x.b.grads + param->at, x.b.params + param->at,
                                                   (size_t)param->rows * param->cols, recurrence_loss, &x),
                         1e-5);
        }
        /* The stop is there to be seen: with a memory that moves, the differences are others; dense has none. */
        x.still = false;
        const size_t n = (size_t)x.b.layout->shape.width * x.b.layout->shape.attention.head_dim; /* of the first q */
        double moved = worst_against_differences(x.b.grads + x.b.layout->layers[0].qkv,
                                                 x.b.params + x.b.layout->layers[0].qkv, n, recurrence_loss, &x);
        if (cases[c].mode == CAIRN_TRAIN_DENSE)
            expect_below("the same with nothing held", moved, 1e-5);
        else if (moved < 0.01)
            fail_msg("%s: a moving memory has the same gradient to %g", cases[c].name, moved);
        recurrence_wipe(&x);
    }
}

/* ---- beside the other modes ---- */

static const cairn_train_param *param_named(const cairn_train_layout *layout, const char *name)
{
    for (size_t p = 0; p < layout->n_params; p++)
        if (strcmp(layout->params[p].name, name) == 0) return &layout->params[p];
    fail_msg("no parameter '%s'", name);
    return NULL;
}

/* Own tokens alone make the grouped softmax of the first block an ordinary one. */
static void dense_is_landmark_attention_in_a_block_longer_than_the_window(void **state)
{
    (void)state;
    model_spec spec = {2, 4, 2, 4, 12, 10, 11, 22, 2, true, false, false};
    for (int llama = 0; llama < 2; llama++) {
        spec.qwen3 = llama == 0;
        bench a, b;
        const cairn_train_shape landmark = shape_of(&spec);
        const cairn_train_shape dense = without_landmarks(landmark, CAIRN_TRAIN_DENSE, 0);
        bench_init(&a, &landmark, 22, 40);
        bench_init(&b, &dense, 22, 41);
        for (size_t p = 0; p < b.layout->n_params; p++) {
            const cairn_train_param *to = &b.layout->params[p], *from = param_named(a.layout, to->name);
            memcpy(b.params + to->at, a.params + from->at, (size_t)to->rows * to->cols * sizeof *b.params);
        }
        memcpy(b.slots, a.slots, a.rows * sizeof *b.slots);
        memcpy(b.weights, a.weights, a.rows * sizeof *b.weights);
        cairn_train_targets(b.slots, b.rows, 0, b.targets);
        assert_memory_equal(a.targets, b.targets, a.rows * sizeof *a.targets);
        const double *want = cairn_train_forward_f64(a.model, a.params, a.slots, a.rows);
        const double *got = cairn_train_forward_f64(b.model, b.params, b.slots, b.rows);
        double worst = 0;
        for (size_t i = 0; i < a.rows * landmark.vocab; i++) worst = fmax(worst, fabs(got[i] - want[i]));
        expect_below("logits", worst, 1e-12);
        bench_gradient(&a);
        bench_gradient(&b);
        worst = 0;
        for (size_t p = 0; p < a.layout->n_params; p++) {
            const cairn_train_param *of = &a.layout->params[p];
            const double *d = a.grads + of->at;
            const size_t n = (size_t)of->rows * of->cols;
            if (of->kind == CAIRN_TRAIN_LANDMARK_BIAS) {
                assert_true(largest_of(d, n) == 0);
                continue;
            }
            const double *e = b.grads + param_named(b.layout, of->name)->at;
            for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs(d[i] - e[i]) / largest_of(d, n));
        }
        expect_below("gradients", worst, 1e-11);
        bench_wipe(&a), bench_wipe(&b);
    }
}

/* So that a comparison of the three is one of the attention. */
static void all_modes_start_from_the_same_matrices(void **state)
{
    (void)state;
    const model_spec spec = {2, 2, 1, 4, 12, 10, 11, 3, 2, true, false, true};
    const cairn_train_shape landmark = shape_of(&spec), xl = without_landmarks(landmark, CAIRN_TRAIN_XL, 4);
    cairn_train_layout *a, *b;
    assert_ok(cairn_train_layout_new(&landmark, &a));
    assert_ok(cairn_train_layout_new(&xl, &b));
    assert_int_equal(a->total, b->total + 2 * 2); /* a bias for each head and layer */
    float *from = calloc(a->total, sizeof *from), *to = calloc(b->total, sizeof *to);
    assert_true(from != NULL && to != NULL);
    cairn_train_init(a, 9, from);
    cairn_train_init(b, 9, to);
    for (size_t p = 0; p < b->n_params; p++) {
        const cairn_train_param *of = &b->params[p];
        assert_memory_equal(to + of->at, from + param_named(a, of->name)->at, (size_t)of->rows * of->cols * sizeof *to);
    }
    free(from), free(to);
    cairn_train_layout_free(a);
    cairn_train_layout_free(b);
}

/* ---- in float ---- */

static void float_gradients_follow_double_ones(void **state)
{
    (void)state;
    const model_spec spec = {2, 4, 2, 16, 48, 80, 40, 7, 3, true, false, false};
    const uint32_t segments[] = {0, 70, 24}; /* dense; longer than a strip of queries; shorter */
    for (size_t c = 0; c < 3; c++) {
        bench b;
        const cairn_train_shape shape =
            without_landmarks(shape_of(&spec), segments[c] == 0 ? CAIRN_TRAIN_DENSE : CAIRN_TRAIN_XL, segments[c]);
        bench_init(&b, &shape, 150, 7 + c);
        bench_gradient(&b);
        const double *want = cairn_train_forward_f64(b.model, b.params, b.slots, b.rows);
        const float *got = cairn_train_forward_f32(b.model_f32, b.params_f32, b.slots, b.rows);
        expect_below("logits", worst_against(got, want, b.rows * shape.vocab), 1e-5);
        cairn_train_loss_f32(b.model_f32, &b.window, 1.0 / 7, NULL, NULL);
        cairn_train_backward_f32(b.model_f32, b.params_f32, &b.window, b.grads_f32);
        double worst = 0;
        for (size_t p = 0; p < b.layout->n_params; p++) {
            const cairn_train_param *of = &b.layout->params[p];
            double off = worst_against(b.grads_f32 + of->at, b.grads + of->at, (size_t)of->rows * of->cols);
            if (off > 1e-4) fail_msg("%s: %g of its largest entry", of->name, off);
            worst = fmax(worst, off);
        }
        expect_below("the worst parameter", worst, 1e-4);
        bench_wipe(&b);
    }
}

static void later_tokens_change_no_earlier_logit(void **state)
{
    (void)state;
    for (size_t c = 0; c < CASES; c++) {
        recurrence x;
        recurrence_init(&x, c);
        bench *b = &x.b;
        const size_t V = b->layout->shape.vocab, row = b->rows / 2;
        memcpy(x.logits, cairn_train_forward_f64(b->model, b->params, b->slots, b->rows), b->rows * V * sizeof(double));
        b->slots[row] = (b->slots[row] + 1) % (cairn_token)(V - 1);
        const double *after = cairn_train_forward_f64(b->model, b->params, b->slots, b->rows);
        assert_memory_equal(x.logits, after, row * V * sizeof *after);
        assert_memory_not_equal(x.logits + row * V, after + row * V, V * sizeof *after);
        recurrence_wipe(&x);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_pass_is_one_call_for_each_segment),
        cmocka_unit_test(every_parameters_gradient_equals_differences_with_the_memory_held_still),
        cmocka_unit_test(dense_is_landmark_attention_in_a_block_longer_than_the_window),
        cmocka_unit_test(all_modes_start_from_the_same_matrices),
        cmocka_unit_test(float_gradients_follow_double_ones),
        cmocka_unit_test(later_tokens_change_no_earlier_logit),
    };
    return cmocka_run_group_tests_name("train_recurrence", tests, NULL, NULL);
}
