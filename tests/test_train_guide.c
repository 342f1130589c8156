/* test_train_guide.c - guidance: rows told which block they need, among the landmarks they see and remembered ones;
 * distractors: whole blocks of earlier windows that such rows see.
 *
 * Witness: the definition of guidance in plain loops over complex rotations, central differences in double, and for
 * distractors attention over one longer window that begins with the earlier one.
 */
#include "train_support.h"

#include <train_internal.h>

#include <complex.h>

enum { HEADS = 4, KV = 2, D = 6, C = 3, B = C + 1, A = 2, ROWS = 21, LAYER = 1, F = (HEADS + 2 * KV) * D, KEYS = 5 };

/* One window, what is remembered before it (as unrotated keys), and everything that goes with them. */
typedef struct bench {
    double *in;      /* (ROWS, F): q, k, v */
    double *earlier; /* (ROWS, F): the window whose landmark keys are remembered */
    double *up;      /* (ROWS, HEADS, D) */
    double *grad;    /* as in */
    double bias[HEADS], dbias[HEADS];
    size_t remembered; /* landmark keys of `earlier` that compete, the newest */
    cairn_train_guide guide;
    cairn_train_attention_f64 *att;
} bench;

static const cairn_train_guided guided_rows[] = {{9, 1, {5}, CAIRN_TRAIN_FIRST},
                                                 {10, 3, {0, 5, 9}, 0},
                                                 {16, 1, {14}, CAIRN_TRAIN_LATER},
                                                 {19, 1, {2}, CAIRN_TRAIN_LATER},
                                                 {20, 3, {17, 8, 10}, 0}};

static double complex turned(const double *x, size_t i, double p) /* pair i of a row, rotated by position p */
{
    return (x[i] + x[i + D / 2] * I) * cexp(I * p * pow(10000, -2.0 * (double)i / D));
}

/* Score of a query by a key that is `distance` slots before it. */
static double score(const double *q, const double *k, double distance)
{
    double sum = 0;
    for (size_t i = 0; i < D / 2; i++) sum += creal(turned(q, i, distance) * conj(turned(k, i, 0)));
    return sum / sqrt(D);
}

/* exp of a token's score within its block, of row's own tokens' or a landmark's */
static double power(const bench *b, size_t h, size_t row, size_t t)
{
    const size_t block = row / B, p = t / B;
    const double age = (double)(block - p < A ? block - p : A);
    const double distance = age * B + (double)(row % B) - (double)(t % B);
    const double *k = b->in + t * F + (HEADS + h / (HEADS / KV)) * D;
    return exp(score(b->in + row * F + h * D, k, distance) + (t % B == C ? b->bias[h] : 0));
}

static double term(const bench *b, size_t h, const cairn_train_guided *row)
{
    const size_t block = row->row / B, j = row->row % B, blocks = ROWS / B;
    const double *q = b->in + row->row * F + h * D;
    double all = 0, target = 0;
    for (size_t t = block * B; t <= row->row && t % B != C; t++) all += power(b, h, row->row, t);
    for (size_t p = 0; p < block; p++) all += power(b, h, row->row, p * B + C);
    for (uint32_t i = 0; i < row->n; i++) {
        const size_t t = row->slots[i], p = t / B;
        double inside = 0;
        for (size_t y = p * B; y < p * B + C; y++) inside += power(b, h, row->row, y);
        target += power(b, h, row->row, t) * (p == block ? 1 : power(b, h, row->row, p * B + C) / inside);
    }
    for (size_t i = 0; i < b->remembered; i++) {
        const double *k = b->earlier + ((blocks - 1 - i) * B + C) * F + (HEADS + h / (HEADS / KV)) * D;
        all += exp(b->bias[h] + score(q, k, A * B + (double)j - C));
    }
    return -log(target / all);
}

static cairn_train_qkv_f64 qkv_of(const double *in)
{
    return (cairn_train_qkv_f64){in, in + (size_t)HEADS * D, in + (size_t)(HEADS + KV) * D, F};
}

static double guided_loss(const bench *b)
{
    double sum = 0;
    for (size_t h = 0; h < b->guide.heads; h++)
        for (size_t i = 0; i < b->guide.n; i++) {
            const cairn_train_guided *row = &b->guide.rows[i];
            if (b->guide.apart && row->turn != CAIRN_TRAIN_ANY && (row->turn == CAIRN_TRAIN_FIRST) != (h % 2 == 0))
                continue;
            sum += (double)b->guide.weight * term(b, h, row);
        }
    return sum;
}

/* What attention alone gives, and the terms. */
static double loss(void *arg)
{
    bench *b = arg;
    cairn_train_qkv_f64 in = qkv_of(b->in);
    double out[ROWS * HEADS * D], sum = 0;
    cairn_train_attend_f64(b->att, LAYER, ROWS, &in, b->bias, &b->guide, out);
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) sum += b->up[i] * out[i];
    return sum + guided_loss(b);
}

static double backward(bench *b, const double *in, const cairn_train_guide *guide)
{
    cairn_train_qkv_f64 qkv = qkv_of(in);
    double *g = b->grad;
    memset(b->dbias, 0, sizeof b->dbias);
    return cairn_train_attend_backward_f64(b->att, LAYER, ROWS, &qkv, b->bias, b->up, guide, 1, g,
                                           g + (size_t)HEADS * D, g + (size_t)(HEADS + KV) * D, b->dbias);
}

static void shape_init(cairn_attention_shape *shape)
{
    static const uint8_t local[LAYER + 1] = {1, 0};
    cairn_attention_shape_init(shape, sizeof *shape);
    shape->layers = LAYER + 1;
    shape->heads = HEADS;
    shape->kv_heads = KV;
    shape->head_dim = D;
    shape->block_tokens = C;
    shape->clamp_blocks = A;
    shape->local_layers = local;
}

static void bench_init(bench *b, size_t remember, size_t kept)
{
    test_random r = {42};
    cairn_attention_shape shape;
    shape_init(&shape);
    *b = (bench){.in = random_doubles(&r, (size_t)ROWS * F, 1),
                 .earlier = random_doubles(&r, (size_t)ROWS * F, 1),
                 .up = random_doubles(&r, (size_t)ROWS * HEADS * D, 1),
                 .grad = random_doubles(&r, (size_t)ROWS * F, 1),
                 .guide = {.rows = guided_rows,
                           .n = sizeof guided_rows / sizeof *guided_rows,
                           .from_layer = 1,
                           .heads = 3,
                           .weight = 0.7F}};
    for (size_t h = 0; h < HEADS; h++) b->bias[h] = 0.3 * (double)h;
    assert_ok(cairn_train_attention_new_f64(&shape, ROWS, &b->att));
    if (remember + kept == 0) return;
    assert_ok(cairn_train_attention_remember_f64(b->att, LAYER + 1, remember, kept));
    cairn_train_guide keep = b->guide;
    keep.remember = true;
    backward(b, b->earlier, &keep);
    b->remembered = ROWS / B < remember ? ROWS / B : remember;
}
static void bench_wipe(bench *b)
{
    cairn_train_attention_free_f64(b->att);
    free(b->in), free(b->earlier), free(b->up), free(b->grad);
}

static void guidance_and_its_gradient_equal_the_definition(void **state)
{
    (void)state;
    static const struct {
        size_t remembered, kept;
        uint32_t distractors, rivals;
        bool apart;
    } cases[] = {{0, 0, 0, 0, false},    /* none */
                 {KEYS, 0, 0, 0, false}, /* all five of the earlier window */
                 {3, 0, 0, 0, false},    /* the newest three, as there is room for no more */
                 {KEYS, 0, 0, 2, false}, /* the newest two of five */
                 {4, 0, 0, 3, false},    /* the newest three of four, in a ring that begins in their midst */
                 {3, 0, 0, 9, false},     {KEYS, KEYS, 2, 0, false}, {3, 4, 4, 1, false},
                 {0, KEYS, 16, 0, false}, {KEYS, 0, 0, 0, true}, /* each head with what is its turn */
                 {3, KEYS, 2, 0, true}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        bench b;
        bench_init(&b, cases[c].remembered, cases[c].kept);
        b.guide.distractors = cases[c].distractors;
        assert_int_equal(b.remembered, cases[c].remembered);
        b.guide.rivals = cases[c].rivals;
        b.guide.apart = cases[c].apart;
        if (cases[c].rivals > 0 && cases[c].rivals < b.remembered) b.remembered = cases[c].rivals;
        double terms = backward(&b, b.in, &b.guide), want = guided_loss(&b);
        expect_below("sum of the terms", fabs(terms - want) / want, 1e-12);
        expect_below("gradient", worst_against_differences(b.grad, b.in, (size_t)ROWS * F, loss, &b), 1e-5);
        expect_below("gradient of the biases", worst_against_differences(b.dbias, b.bias, HEADS, loss, &b), 1e-5);
        bench_wipe(&b);
    }
}

static void heads_and_layers_outside_are_left_alone(void **state)
{
    (void)state;
    bench b;
    bench_init(&b, 0, 0);
    double *without = malloc((size_t)ROWS * F * sizeof *without);
    assert_non_null(without);
    assert_true(backward(&b, b.in, NULL) == 0);
    memcpy(without, b.grad, (size_t)ROWS * F * sizeof *without);
    b.guide.from_layer = LAYER + 1;
    assert_true(backward(&b, b.in, &b.guide) == 0);
    assert_memory_equal(without, b.grad, (size_t)ROWS * F * sizeof *without);
    b.guide.from_layer = LAYER;
    b.guide.heads = 1;
    assert_true(backward(&b, b.in, &b.guide) > 0);
    for (size_t r = 0; r < ROWS; r++) /* queries of the other heads, keys of the other KV head */
        for (size_t i = D; i < F; i++)
            if (i < (size_t)HEADS * D || i >= (size_t)(HEADS + 1) * D)
                assert_true(without[r * F + i] == b.grad[r * F + i]);
    free(without);
    bench_wipe(&b);
}

/* Blocks as far back as the clamp or further all look alike, so an earlier window's blocks are, to a row whose own
 * window has blocks enough, what they would be in front of that window. */
static void a_row_that_sees_all_kept_blocks_sees_one_longer_window(void **state)
{
    (void)state;
    enum { EARLIER = KEYS * B, ALL = EARLIER + ROWS };
    bench b, both;
    bench_init(&b, 0, KEYS);
    b.guide.distractors = KEYS;
    double *in = malloc((size_t)ALL * F * sizeof *in), out[ROWS * HEADS * D], plain[ROWS * HEADS * D];
    double *want = malloc((size_t)ALL * HEADS * D * sizeof *want), worst = 0;
    cairn_attention_shape shape;
    assert_true(in != NULL && want != NULL);
    memcpy(in, b.earlier, (size_t)EARLIER * F * sizeof *in);
    memcpy(in + (size_t)EARLIER * F, b.in, (size_t)ROWS * F * sizeof *in);
    shape_init(&shape);
    assert_ok(cairn_train_attention_new_f64(&shape, ALL, &both.att));
    const cairn_train_qkv_f64 window = qkv_of(b.in), longer = qkv_of(in);
    cairn_train_attend_f64(both.att, LAYER, ALL, &longer, b.bias, NULL, want);
    cairn_train_attend_f64(b.att, LAYER, ROWS, &window, b.bias, &b.guide, out);
    cairn_train_attend_f64(b.att, LAYER, ROWS, &window, b.bias, NULL, plain);
    for (size_t i = 0, next = 0; i < ROWS; i++) {
        const size_t row = (size_t)HEADS * D * sizeof *out, at = i * HEADS * D;
        const bool guided = next < b.guide.n && b.guide.rows[next].row == i;
        next += guided;
        if (!guided) assert_memory_equal(out + at, plain + at, row);
        for (size_t x = 0; guided && x < (size_t)HEADS * D; x++)
            worst = fmax(worst, fabs(out[at + x] - want[(EARLIER + i) * HEADS * D + x]));
    }
    expect_below("rows that see kept blocks", worst, 1e-12);
    assert_true(memcmp(out, plain, sizeof out) != 0);
    cairn_train_attention_free_f64(both.att);
    free(in), free(want);
    bench_wipe(&b);
}

static void forgotten_blocks_are_not_kept(void **state)
{
    (void)state;
    static const uint8_t forget[] = {1, 0, 1, 1, 0};
    bench b, all;
    double out[ROWS * HEADS * D], want[ROWS * HEADS * D];
    bench_init(&all, 0, 2); /* the newest two: 3 and 4 */
    bench_init(&b, 0, 0);
    assert_ok(cairn_train_attention_remember_f64(b.att, LAYER + 1, 0, 2));
    cairn_train_guide keep = b.guide;
    keep.remember = true;
    keep.forget = forget; /* so 1 and 4 are left */
    backward(&b, b.earlier, &keep);
    memmove(b.earlier + 3 * (size_t)B * F, b.earlier + (size_t)B * F, (size_t)B * F * sizeof *b.earlier);
    keep.forget = NULL;
    backward(&all, b.earlier, &keep);
    b.guide.distractors = 2;
    const cairn_train_qkv_f64 in = qkv_of(b.in);
    cairn_train_attend_f64(b.att, LAYER, ROWS, &in, b.bias, &b.guide, out);
    cairn_train_attend_f64(all.att, LAYER, ROWS, &in, b.bias, &b.guide, want);
    assert_memory_equal(out, want, sizeof out);
    bench_wipe(&b), bench_wipe(&all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(guidance_and_its_gradient_equal_the_definition),
        cmocka_unit_test(a_row_that_sees_all_kept_blocks_sees_one_longer_window),
        cmocka_unit_test(forgotten_blocks_are_not_kept),
        cmocka_unit_test(heads_and_layers_outside_are_left_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
