/* test_grouped_softmax.c - the paper's grouped softmax on plain arrays, the shape it needs and the stingy slots.
 *
 * Numbers in brackets are the method's test oracles in docs. The witness is the virtual-key form, written here a second
 * way: blocks streamed one after the other with a running maximum and denominator, no tables.
 */
#include "twin.h"

enum { ROWS_MAX = 40 };

/* A random window: landmarks anywhere, but never an empty block unless asked for. */
static size_t random_window(test_random *r, uint8_t *is_landmark, bool empty_blocks)
{
    size_t rows = 1 + test_random_below(r, ROWS_MAX);
    uint32_t one_in = 2 + test_random_below(r, 6);
    for (size_t i = 0; i < rows; i++) {
        bool may = empty_blocks || (i > 0 && is_landmark[i - 1] == 0);
        is_landmark[i] = may && test_random_below(r, one_in) == 0;
    }
    return rows;
}

static double *random_scores(test_random *r, size_t rows, double spread)
{
    double *scores = malloc(rows * rows * sizeof *scores);
    assert_non_null(scores);
    for (size_t i = 0; i < rows * rows; i++) scores[i] = spread * (double)test_random_normal(r);
    return scores;
}

static double *weights_of(const double *scores, const uint8_t *is_landmark, size_t rows, double bias)
{
    double *weights = malloc(rows * rows * sizeof *weights);
    assert_non_null(weights);
    for (size_t i = 0; i < rows * rows; i++) weights[i] = NAN; /* every cell must be written */
    assert_ok(cairn_grouped_softmax(scores, is_landmark, rows, bias, weights));
    return weights;
}

/* Twin: sum_j w_ij v_j for scalar values v, streaming over blocks. A past block is one key with logit z + bias and
 * value softmax(y).v; own tokens are keys of their own. Returns 0 where there is no key. */
static double streamed(const double *score, const uint8_t *is_landmark, size_t i, double bias, const double *v)
{
    double max = -INFINITY, denominator = 0.0, sum = 0.0;
    size_t own_begin = i;
    while (own_begin > 0 && is_landmark[own_begin - 1] == 0) own_begin--;
    double block_max = -INFINITY, block_sum = 0.0, block_mix = 0.0;
    for (size_t j = 0; j <= i; j++) {
        double logit, value;
        if (j >= own_begin) {
            if (is_landmark[j] != 0) continue; /* the own landmark */
            logit = score[j];
            value = v[j];
        } else if (is_landmark[j] == 0) { /* a token of a past block: into the block's own partial */
            double m = fmax(block_max, score[j]);
            double keep = exp(block_max - m), part = exp(score[j] - m);
            block_sum = block_sum * keep + part;
            block_mix = block_mix * keep + part * v[j];
            block_max = m;
            continue;
        } else { /* its landmark closes the block */
            logit = score[j] + bias;
            value = block_sum > 0.0 ? block_mix / block_sum : 0.0;
            block_max = -INFINITY;
            block_sum = block_mix = 0.0;
        }
        double m = fmax(max, logit), keep = exp(max - m), part = exp(logit - m);
        denominator = denominator * keep + part;
        sum = sum * keep + part * value;
        max = m;
    }
    return denominator > 0.0 ? sum / denominator : 0.0;
}

/* [1], paper figure 4 */
static void equal_scores_share_as_in_the_papers_figure_4(void **state)
{
    (void)state;
    double scores[81];
    uint8_t is_landmark[9] = {0, 0, 1, 0, 0, 1, 0, 0, 1};
    for (size_t i = 0; i < 81; i++) scores[i] = 1.0;
    double *w = weights_of(scores, is_landmark, 9, 0.0);
    const double token6[9] = {1.0 / 6, 1.0 / 6, 0, 1.0 / 6, 1.0 / 6, 0, 1.0 / 3, 0, 0};
    const double landmark8[9] = {1.0 / 8, 1.0 / 8, 0, 1.0 / 8, 1.0 / 8, 0, 1.0 / 4, 1.0 / 4, 0};
    for (size_t j = 0; j < 9; j++) {
        assert_near(w[6 * 9 + j], token6[j], 1e-15);
        assert_near(w[8 * 9 + j], landmark8[j], 1e-15);
    }
    free(w);
}

/* [2] */
static void rows_of_full_blocks_sum_to_one_and_landmarks_and_the_future_weigh_nothing(void **state)
{
    (void)state;
    test_random r = {2};
    uint8_t is_landmark[ROWS_MAX];
    for (int n = 0; n < 200; n++) {
        size_t rows = random_window(&r, is_landmark, false);
        double *scores = random_scores(&r, rows, 3.0), *w = weights_of(scores, is_landmark, rows, 0.7);
        for (size_t i = 0; i < rows; i++) {
            double sum = 0.0;
            for (size_t j = 0; j < rows; j++) {
                sum += w[i * rows + j];
                if (is_landmark[j] != 0 || j > i) assert_true(w[i * rows + j] == 0.0);
            }
            assert_near(sum, 1.0, 1e-12);
        }
        free(scores);
        free(w);
    }
}

/* [3] */
static void a_window_without_landmarks_is_causal_softmax(void **state)
{
    (void)state;
    test_random r = {3};
    uint8_t none[ROWS_MAX] = {0};
    for (size_t rows = 1; rows <= ROWS_MAX; rows += 3) {
        double *scores = random_scores(&r, rows, 2.0), *w = weights_of(scores, none, rows, 5.0);
        for (size_t i = 0; i < rows; i++) {
            double z = 0.0;
            for (size_t j = 0; j <= i; j++) z += exp(scores[i * rows + j]);
            for (size_t j = 0; j <= i; j++) assert_near(w[i * rows + j], exp(scores[i * rows + j]) / z, 1e-14);
        }
        free(scores);
        free(w);
    }
}

/* [4] */
static void an_empty_first_block_keeps_its_gates_mass_and_row_0_is_zero(void **state)
{
    (void)state;
    test_random r = {4};
    for (int n = 0; n < 50; n++) {
        uint8_t is_landmark[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
        double *scores = random_scores(&r, 9, 2.0), *w = weights_of(scores, is_landmark, 9, 0.0);
        for (size_t j = 0; j < 9; j++) assert_true(w[j] == 0.0);
        for (size_t i = 1; i < 9; i++) {
            const double *s = scores + i * 9;
            double z = exp(s[0]), sum = 0.0; /* own group: the empty block's landmark first */
            for (size_t j = i <= 4 ? 1 : 5; j <= i; j++) z += is_landmark[j] == 0 ? exp(s[j]) : 0.0;
            if (i > 4) z += exp(s[4]);
            for (size_t j = 0; j < 9; j++) sum += w[i * 9 + j];
            assert_near(sum, 1.0 - exp(s[0]) / z, 1e-13);
        }
        free(scores);
        free(w);
    }
}

/* [5], [11]: landmark rows included, with and without empty blocks */
static void the_table_form_equals_virtual_keys_streamed_with_a_running_maximum(void **state)
{
    (void)state;
    test_random r = {5};
    uint8_t is_landmark[ROWS_MAX];
    for (int n = 0; n < 300; n++) {
        size_t rows = random_window(&r, is_landmark, n % 3 == 0);
        double v[ROWS_MAX], bias = n % 2 == 0 ? 0.0 : 2.0 * (double)test_random_normal(&r);
        for (size_t j = 0; j < rows; j++) v[j] = (double)test_random_normal(&r);
        double *scores = random_scores(&r, rows, 4.0), *w = weights_of(scores, is_landmark, rows, bias);
        for (size_t i = 0; i < rows; i++) {
            double sum = 0.0;
            for (size_t j = 0; j < rows; j++) sum += w[i * rows + j] * v[j];
            assert_near(sum, streamed(scores + i * rows, is_landmark, i, bias, v), 1e-12);
        }
        free(scores);
        free(w);
    }
}

/* [6] */
static void a_constant_added_to_one_group_changes_no_weight(void **state)
{
    (void)state;
    test_random r = {6};
    const uint8_t is_landmark[14] = {0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0};
    double *scores = random_scores(&r, 14, 2.0), *before = weights_of(scores, is_landmark, 14, 1.0);
    for (size_t i = 0; i < 14; i++)
        for (size_t j = 4; j < 7; j++)
            scores[i * 14 + j] += i > 7 ? 13.5 : 0.0; /* tokens of block 1, once it is past */
    for (size_t i = 12; i < 14; i++)
        for (size_t j = 0; j < 14; j++)
            if (is_landmark[j] != 0 || j >= 12) scores[i * 14 + j] -= 7.25; /* the own group of the last rows */
    double *after = weights_of(scores, is_landmark, 14, 1.0);
    for (size_t c = 0; c < 14 * 14; c++) assert_near(after[c], before[c], 1e-13);
    free(scores);
    free(before);
    free(after);
}

/* [7] */
static void a_higher_landmark_score_moves_mass_to_its_block_and_keeps_the_ratios_inside(void **state)
{
    (void)state;
    test_random r = {7};
    const uint8_t is_landmark[10] = {0, 0, 0, 1, 0, 0, 0, 1, 0, 0};
    double *scores = random_scores(&r, 10, 1.5), last = -1.0, ratio = NAN;
    for (double z = -4.0; z <= 8.0; z += 0.5) {
        scores[9 * 10 + 3] = z;
        double *w = weights_of(scores, is_landmark, 10, 0.0);
        double mass = w[90] + w[91] + w[92];
        assert_true(mass > last);
        last = mass;
        if (!isnan(ratio)) assert_near(w[90] / w[92], ratio, 1e-12);
        ratio = w[90] / w[92];
        free(w);
    }
    assert_true(last > 0.9);
    free(scores);
}

/* [8] */
static void permuting_whole_past_blocks_permutes_their_weights(void **state)
{
    (void)state;
    test_random r = {8};
    const uint8_t is_landmark[18] = {0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0};
    const size_t order[4] = {2, 0, 3, 1};
    double *scores = random_scores(&r, 18, 2.0), *moved = malloc(18 * 18 * sizeof *moved);
    assert_non_null(moved);
    memcpy(moved, scores, 18 * 18 * sizeof *moved);
    for (size_t b = 0; b < 4; b++)
        for (size_t o = 0; o < 4; o++) moved[17 * 18 + b * 4 + o] = scores[17 * 18 + order[b] * 4 + o];
    double *w = weights_of(scores, is_landmark, 18, 0.5), *p = weights_of(moved, is_landmark, 18, 0.5);
    for (size_t b = 0; b < 4; b++)
        for (size_t o = 0; o < 4; o++) assert_near(p[17 * 18 + b * 4 + o], w[17 * 18 + order[b] * 4 + o], 1e-14);
    for (size_t j = 16; j < 18; j++) assert_near(p[17 * 18 + j], w[17 * 18 + j], 1e-14);
    free(scores);
    free(moved);
    free(w);
    free(p);
}

/* [10] */
static void scores_of_a_thousand_give_finite_weights_that_sum_to_one(void **state)
{
    (void)state;
    test_random r = {10};
    uint8_t is_landmark[ROWS_MAX];
    for (int n = 0; n < 100; n++) {
        size_t rows = random_window(&r, is_landmark, false);
        double *scores = random_scores(&r, rows, 1.0);
        for (size_t i = 0; i < rows * rows; i++) scores[i] = scores[i] > 0 ? 1000.0 : -1000.0;
        double *w = weights_of(scores, is_landmark, rows, -3.0);
        for (size_t i = 0; i < rows; i++) {
            double sum = 0.0;
            for (size_t j = 0; j < rows; j++) {
                assert_true(isfinite(w[i * rows + j]) && w[i * rows + j] >= 0.0);
                sum += w[i * rows + j];
            }
            assert_near(sum, 1.0, 1e-12);
        }
        free(scores);
        free(w);
    }
}

static void the_bias_is_a_factor_on_every_past_block_and_on_nothing_else(void **state)
{
    (void)state;
    test_random r = {77};
    const uint8_t is_landmark[7] = {0, 0, 1, 0, 0, 1, 0};
    double *scores = random_scores(&r, 7, 1.0), bias = log(63.0);
    double *plain = weights_of(scores, is_landmark, 7, 0.0), *biased = weights_of(scores, is_landmark, 7, bias);
    double past = plain[42] + plain[43] + plain[45] + plain[46], z = 63.0 * past + plain[48];
    assert_near(biased[48], plain[48] / z, 1e-14);
    for (size_t j = 0; j < 6; j++) assert_near(biased[42 + j], 63.0 * plain[42 + j] / z, 1e-14);
    free(scores);
    free(plain);
    free(biased);
}

/* [18] */
static void stingy_slots_are_the_papers_examples(void **state)
{
    (void)state;
    const uint32_t ranks[3][4] = {{2, 5, 7, 9}, {0, 1, 2, 3}, {6, 7, 8, 9}};
    const uint32_t slots[3][4] = {{0, 1, 3, 4}, {0, 1, 2, 3}, {1, 2, 3, 4}};
    for (size_t c = 0; c < 3; c++) {
        uint32_t out[4];
        cairn_stingy_slots(10, 4, ranks[c], 4, out);
        assert_memory_equal(out, slots[c], sizeof out);
    }
    uint32_t scoring[10];
    const uint32_t expected[10] = {0, 0, 0, 0, 0, 0, 1, 2, 3, 4};
    cairn_stingy_scoring_slots(10, 4, scoring);
    assert_memory_equal(scoring, expected, sizeof expected);
    /* fewer blocks than k, and exactly k: slots 1..n are their true positions */
    for (size_t n = 1; n <= 4; n++) {
        uint32_t all[4] = {0, 1, 2, 3}, out[4];
        cairn_stingy_scoring_slots(n, 4, scoring);
        cairn_stingy_slots(n, 4, all, n, out);
        for (uint32_t i = 0; i < n; i++) {
            assert_int_equal(scoring[i], i + 1);
            assert_int_equal(out[i], i + 1);
        }
    }
}

/* [18], [20] */
static void stingy_slots_rise_leave_one_free_and_never_pass_k_however_many_blocks(void **state)
{
    (void)state;
    test_random r = {18};
    for (int c = 0; c < 2000; c++) {
        uint32_t k = 1 + test_random_below(&r, 9), ranks[9], slots[9];
        size_t n = k + 1 + test_random_below(&r, c % 2 == 0 ? 20 : 1000000);
        for (uint32_t i = 0; i < k; i++) { /* a random ascending choice, half of it among the newest */
            uint32_t low = i == 0 ? 0 : ranks[i - 1] + 1, room = (uint32_t)n - low - (k - 1 - i);
            ranks[i] = low + (test_random_below(&r, 2) == 0 && room > k ? room - k : 0) +
                       test_random_below(&r, room < k ? room : k);
            if (ranks[i] > n - (k - i)) ranks[i] = (uint32_t)(n - (k - i));
        }
        cairn_stingy_slots(n, k, ranks, k, slots);
        uint32_t used = 0;
        for (uint32_t i = 0; i < k; i++) {
            assert_true(i == 0 || slots[i] > slots[i - 1]);
            assert_true(slots[i] <= k);
            used |= 1u << slots[i];
            if (ranks[i] < n - k) assert_true(slots[i] < k); /* old: never the slot just before the chunk */
        }
        assert_int_equal(__builtin_popcount(used), k);
    }
    uint32_t *scoring = malloc(1000000 * sizeof *scoring);
    assert_non_null(scoring);
    cairn_stingy_scoring_slots(1000000, 4, scoring);
    for (size_t i = 0; i < 999996; i++) assert_int_equal(scoring[i], 0);
    for (uint32_t i = 0; i < 4; i++) assert_int_equal(scoring[999996 + i], i + 1);
    free(scoring);
}

static void expect_invalid(const cairn_attention_shape *shape, const char *field)
{
    assert_int_equal(cairn_attention_shape_check(shape), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), field));
}

static void a_shape_that_cannot_be_is_refused_with_the_field_named(void **state)
{
    (void)state;
    uint8_t local[2] = {1, 0};
    float bias[8] = {0};
    cairn_attention_shape good, s;
    cairn_attention_shape_init(&good, sizeof good);
    good.layers = 2;
    good.heads = 4;
    good.kv_heads = 2;
    good.head_dim = 8;
    good.local_layers = local;
    good.landmark_bias = bias;
    assert_ok(cairn_attention_shape_check(&good));

    s = good, s.struct_size = 0, expect_invalid(&s, "struct_size");
    s = good, s.layers = 0, expect_invalid(&s, "layers");
    s = good, s.kv_heads = 0, expect_invalid(&s, "kv_heads");
    s = good, s.kv_heads = 3, expect_invalid(&s, "kv_heads 3");
    s = good, s.heads = 0, expect_invalid(&s, "heads");
    s = good, s.head_dim = 7, expect_invalid(&s, "head_dim is 7");
    s = good, s.head_dim = 2000, expect_invalid(&s, "2000");
    s = good, s.block_tokens = 0, expect_invalid(&s, "block_tokens");
    s = good, s.rope_theta = -1.0F, expect_invalid(&s, "rope_theta");
    s = good, s.rope_theta = NAN, expect_invalid(&s, "rope_theta");
    s = good, s.rope_dims = 3, expect_invalid(&s, "rope_dims");
    s = good, s.rope_dims = 10, expect_invalid(&s, "rope_dims");
    s = good, s.scheme = (cairn_position_scheme)9, expect_invalid(&s, "scheme");
    s = good, s.clamp_blocks = 0, expect_invalid(&s, "clamp_blocks");
    s = good, s.clamp_blocks = UINT32_MAX, expect_invalid(&s, "clamp_blocks");
    local[1] = 2;
    expect_invalid(&good, "local_layers[1]");
    local[1] = 0;
    bias[5] = INFINITY;
    expect_invalid(&good, "layer 1 head 1");
}

static void the_default_policy_is_the_models_own(void **state)
{
    (void)state;
    cairn_attention_shape shape;
    cairn_policy policy;
    cairn_attention_shape_init(&shape, sizeof shape);
    shape.top_k = 7;
    cairn_policy_init(&policy, sizeof policy, &shape);
    assert_int_equal(policy.struct_size, sizeof policy);
    assert_int_equal(policy.top_k, 7);
    assert_int_equal(policy.scope, CAIRN_SCOPE_TOKEN_HEAD);
    assert_int_equal(policy.window_blocks, -1);
    assert_int_equal(policy.newest, 0);
    assert_true(policy.mass == 0.0F);
    assert_false(policy.measure_mass);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equal_scores_share_as_in_the_papers_figure_4),
        cmocka_unit_test(rows_of_full_blocks_sum_to_one_and_landmarks_and_the_future_weigh_nothing),
        cmocka_unit_test(a_window_without_landmarks_is_causal_softmax),
        cmocka_unit_test(an_empty_first_block_keeps_its_gates_mass_and_row_0_is_zero),
        cmocka_unit_test(the_table_form_equals_virtual_keys_streamed_with_a_running_maximum),
        cmocka_unit_test(a_constant_added_to_one_group_changes_no_weight),
        cmocka_unit_test(a_higher_landmark_score_moves_mass_to_its_block_and_keeps_the_ratios_inside),
        cmocka_unit_test(permuting_whole_past_blocks_permutes_their_weights),
        cmocka_unit_test(scores_of_a_thousand_give_finite_weights_that_sum_to_one),
        cmocka_unit_test(the_bias_is_a_factor_on_every_past_block_and_on_nothing_else),
        cmocka_unit_test(stingy_slots_are_the_papers_examples),
        cmocka_unit_test(stingy_slots_rise_leave_one_free_and_never_pass_k_however_many_blocks),
        cmocka_unit_test(a_shape_that_cannot_be_is_refused_with_the_field_named),
        cmocka_unit_test(the_default_policy_is_the_models_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
