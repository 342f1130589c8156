/* Every table against definitions written here in double (the reference table included, so that it is not its own
 * witness), over odd lengths and unaligned starts, in buffers that end at a page nobody may touch. */
#include "kernels_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define CLOSE(name, got, want, bound, ...)                                                                             \
    do {                                                                                                               \
        double got_ = (got), want_ = (want), bound_ = (bound);                                                         \
        if (!(fabs(got_ - want_) <= bound_)) {                                                                         \
            printf(__VA_ARGS__);                                                                                       \
            fail_msg(" %s: got %.9g, expected %.9g, bound %.3g", name, got_, want_, bound_);                           \
        }                                                                                                              \
    } while (0)

static const double EPS = 0x1p-24; /* half an ulp of 1 */

/* ---- vectors ---- */

static const size_t lengths[] = {0,  1,  2,  3,  5,  7,  8,  9,  15, 16, 17,  23,  31,  32,  33,   47,
                                 48, 49, 63, 64, 65, 79, 80, 95, 96, 97, 127, 128, 129, 255, 1000, 4097};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void dot_axpy_and_scale_agree_with_double_loops_at_every_length(void **state)
{
    (void)state;
    test_random r = {1};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t l = 0; l < LENGTHS; l++) {
            size_t n = lengths[l];
            guarded a = guarded_random(&r, n), b = guarded_random(&r, n), y = guarded_random(&r, n);
            const float *x = a.data, *z = b.data;
            float *out = y.data;
            double sum = 0, magnitude = 0;
            for (size_t i = 0; i < n; i++) sum += (double)x[i] * z[i], magnitude += fabs((double)x[i] * z[i]);
            CLOSE(k->name, k->dot(x, z, n), sum, ((double)n / 8 + 8) * EPS * magnitude, "dot n=%zu", n);

            float *before = malloc((n + 1) * sizeof *before), alpha = 0.37f;
            memcpy(before, out, n * sizeof *before);
            k->axpy(out, alpha, x, n);
            for (size_t i = 0; i < n; i++) {
                double product = (double)alpha * x[i];
                CLOSE(k->name, out[i], before[i] + product, 2 * EPS * (fabs(product) + fabs(out[i])),
                      "axpy n=%zu i=%zu", n, i);
            }
            memcpy(before, out, n * sizeof *before);
            k->scale(out, alpha, n);
            for (size_t i = 0; i < n; i++) assert_int_equal(bits_of(out[i]), bits_of(before[i] * alpha));
            free(before);
            guarded_free(&a), guarded_free(&b), guarded_free(&y);
        }
    }
}

static void max_finds_the_greatest_ignores_nan_and_is_minus_infinity_of_nothing(void **state)
{
    (void)state;
    test_random r = {2};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t l = 0; l < LENGTHS; l++) {
            size_t n = lengths[l];
            guarded g = guarded_random(&r, n);
            float *x = g.data, want = -INFINITY;
            for (size_t i = 0; i < n; i++) x[i] -= 10; /* so that a zero lane would show */
            for (size_t i = 0; i < n; i++) want = x[i] > want ? x[i] : want;
            assert_int_equal(bits_of(k->max(x, n)), bits_of(want));
            if (n > 2) {
                size_t at = test_random_below(&r, (uint32_t)n - 1);
                x[at] = NAN;
                x[at + 1] = -3;
                assert_int_equal(bits_of(k->max(x, n)), bits_of(-3.0f));
                x[n / 2] = INFINITY;
                assert_int_equal(bits_of(k->max(x, n)), bits_of(INFINITY));
            }
            for (size_t i = 0; i < n; i++) x[i] = -INFINITY;
            assert_int_equal(bits_of(k->max(x, n)), bits_of(-INFINITY));
            guarded_free(&g);
        }
    }
}

/* Distance from the true value in ulps of the float nearest to it (subnormals: units of 2^-149). */
static double ulps_off(float got, double want)
{
    if (isinf(got) && want > 0x1.ffffffp127) return 0;
    int exponent = ilogb(want);
    double ulp = ldexp(1, exponent < -126 ? -149 : exponent - 23);
    return fabs(got - want) / ulp;
}

static void exp_is_within_two_ulp_of_libm_over_the_whole_range_and_exact_at_zero(void **state)
{
    (void)state;
    enum { N = 1024 };
    float x[N], e[N];
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        double worst = 0;
        uint32_t last = bits_of(110.0f);
        for (int sign = 0; sign < 2; sign++)
            for (uint32_t b = 0; b < last;) {
                size_t n = 0;
                for (; n < N && b < last; n++, b += 2503) x[n] = e[n] = float_of(b | (uint32_t)sign << 31);
                k->exp_shift(e, 0, n);
                for (size_t i = 0; i < n; i++) {
                    double off = ulps_off(e[i], exp((double)x[i]));
                    if (off > 2) fail_msg("%s: exp(%.9g) = %.9g is %.2f ulp off", k->name, x[i], e[i], off);
                    worst = off > worst ? off : worst;
                }
            }
        printf("  %s: exp within %.3f ulp\n", k->name, worst);
        float special[] = {0.0f, -0.0f, -INFINITY, INFINITY, -200, 200, -1e30f, 1e30f, NAN};
        k->exp_shift(special, 0, 9);
        float want[] = {1, 1, 0, INFINITY, 0, INFINITY, 0, INFINITY};
        for (int i = 0; i < 8; i++) assert_int_equal(bits_of(special[i]), bits_of(want[i]));
        assert_true(isnan(special[8]));
    }
}

static void exp_shift_and_exp_sum_give_the_same_sum_and_the_sum_of_what_is_stored(void **state)
{
    (void)state;
    test_random r = {3};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t l = 0; l < LENGTHS; l++) {
            size_t n = lengths[l];
            guarded g = guarded_random(&r, n);
            float *x = g.data, shift = k->max(x, n);
            float sum = k->exp_sum(x, shift, n), again = k->exp_shift(x, shift, n);
            assert_int_equal(bits_of(sum), bits_of(again));
            double want = 0;
            for (size_t i = 0; i < n; i++) want += x[i];
            CLOSE(k->name, sum, want, ((double)n / 16 + 4) * EPS * want, "exp_sum n=%zu", n);
            guarded_free(&g);
        }
    }
}

static void above_lists_ascending_indexes_equal_ones_included_and_nan_left_out(void **state)
{
    (void)state;
    test_random r = {4};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t l = 0; l < LENGTHS; l++) {
            for (int round = 0; round < 4; round++) {
                size_t n = lengths[l];
                guarded g = guarded_random(&r, n), o = guarded_new(n * sizeof(uint32_t));
                float *x = g.data, least = round == 0 ? -100 : round == 1 ? 100 : 0.5f;
                uint32_t *out = o.data;
                for (size_t i = 0; i < n; i += 3) x[i] = i % 2 ? NAN : 0.5f;
                size_t found = k->above(x, least, n, out), at = 0;
                for (size_t i = 0; i < n; i++)
                    if (x[i] >= least) {
                        assert_true(at < found);
                        assert_int_equal(out[at++], i);
                    }
                assert_int_equal(at, found);
                guarded_free(&g), guarded_free(&o);
            }
        }
    }
}

static void set_bits_lists_every_bit_of_words_thin_and_full(void **state)
{
    (void)state;
    test_random r = {13};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t n = 0; n <= 16; n++)
            for (uint32_t of = 1; of <= 256; of *= 4) { /* one bit in so many */
                uint64_t words[16] = {0};
                size_t bits = 0, at = 0;
                for (size_t i = 0; i < 64 * n; i++)
                    if (test_random_below(&r, of) == 0) words[i / 64] |= UINT64_C(1) << i % 64, bits++;
                guarded o = guarded_new((bits + 2) * sizeof(uint32_t));
                uint32_t *out = o.data;
                assert_int_equal(k->set_bits(words, n, out), bits);
                for (size_t i = 0; i < 64 * n; i++)
                    if (words[i / 64] >> i % 64 & 1) assert_int_equal(out[at++], i);
                guarded_free(&o);
            }
}

/* ---- conversion ---- */

static void dot_rows_gives_the_bits_of_dot_over_widened_rows(void **state)
{
    (void)state;
    enum { ROWS = 9 };
    const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16};
    const uint32_t at[] = {8, 0, 3, 3, 7};
    test_random r = {14};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t t = 0; t < 3; t++)
            for (size_t dim = 1; dim <= 260; dim += dim < 70 ? 1 : 19) {
                guarded wide = guarded_random(&r, ROWS * dim), q = guarded_random(&r, dim);
                guarded rows = guarded_new(ROWS * dim * cairn_dtype_size(dtypes[t]));
                float out[5], row[260];
                k->narrow(rows.data, wide.data, dtypes[t], ROWS * dim);
                k->dot_rows(out, q.data, rows.data, dtypes[t], dim, at, 5);
                for (size_t i = 0; i < 5; i++) {
                    k->widen(row, (const char *)rows.data + at[i] * dim * cairn_dtype_size(dtypes[t]), dtypes[t], dim);
                    assert_int_equal(bits_of(out[i]), bits_of(k->dot(q.data, row, dim)));
                }
                guarded_free(&wide), guarded_free(&q), guarded_free(&rows);
            }
}

static void every_f16_and_bf16_pattern_widens_to_its_value(void **state)
{
    (void)state;
    enum { ALL = 65536 };
    uint16_t *in = malloc(ALL * sizeof *in);
    float *out = malloc(ALL * sizeof *out);
    for (size_t i = 0; i < ALL; i++) in[i] = (uint16_t)i;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        k->widen(out, in, CAIRN_F16, ALL);
        for (size_t i = 0; i < ALL; i++) {
            double want = f16_value((uint16_t)i);
            if (isnan(want)) { /* quiet, payload kept */
                uint32_t sign = (uint32_t)(i & 0x8000) << 16, payload = (uint32_t)(i & 1023) << 13;
                assert_int_equal(bits_of(out[i]), sign | 0x7fc00000 | payload);
            } else
                assert_int_equal(bits_of(out[i]), bits_of((float)want));
#ifdef __FLT16_MANT_DIG__
            _Float16 h;
            memcpy(&h, &in[i], sizeof h);
            if (!isnan(want)) assert_int_equal(bits_of(out[i]), bits_of((float)h));
#endif
        }
        k->widen(out, in, CAIRN_BF16, ALL);
        for (size_t i = 0; i < ALL; i++) assert_int_equal(bits_of(out[i]), (uint32_t)i << 16);
    }
    free(in), free(out);
}

static uint16_t narrow_one(const cairn_kernels *k, cairn_dtype dtype, float x)
{
    float in[17];
    uint16_t out[17];
    for (int i = 0; i < 17; i++) in[i] = x;
    k->narrow(out, in, dtype, 17);
    for (int i = 1; i < 17; i++) assert_int_equal(out[i], out[0]); /* vector and rest alike */
    return out[0];
}

static void every_f16_survives_the_round_trip_and_every_midpoint_goes_to_the_even_neighbour(void **state)
{
    (void)state;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (uint32_t i = 0; i < 0x7c00; i++) {
            for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
                float flip = sign ? -1 : 1, here = flip * (float)f16_value((uint16_t)i);
                /* what follows 65504 for rounding is 65536, which is stored as inf */
                float next = flip * (i == 0x7bff ? 65536.0f : (float)f16_value((uint16_t)(i + 1)));
                float middle = (here + next) / 2; /* exact: 12 bits */
                uint16_t low = (uint16_t)(sign | i), high = (uint16_t)(sign | (i + 1));
                assert_int_equal(narrow_one(k, CAIRN_F16, here), low);
                assert_int_equal(narrow_one(k, CAIRN_F16, middle), i % 2 ? high : low);
                assert_int_equal(narrow_one(k, CAIRN_F16, nextafterf(middle, here)), low);
                assert_int_equal(narrow_one(k, CAIRN_F16, nextafterf(middle, next)), high);
            }
        }
    }
}

static void every_bf16_survives_the_round_trip_and_every_midpoint_goes_to_the_even_neighbour(void **state)
{
    (void)state;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (uint32_t i = 0; i < 0x7f80; i++) {
            for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
                uint16_t low = (uint16_t)(sign | i), high = (uint16_t)(sign | (i + 1));
                uint32_t here = (uint32_t)low << 16;
                assert_int_equal(narrow_one(k, CAIRN_BF16, float_of(here)), low);
                assert_int_equal(narrow_one(k, CAIRN_BF16, float_of(here | 0x7fff)), low);
                assert_int_equal(narrow_one(k, CAIRN_BF16, float_of(here | 0x8000)), i % 2 ? high : low);
                assert_int_equal(narrow_one(k, CAIRN_BF16, float_of(here | 0x8001)), high);
            }
        }
    }
}

static void narrowing_inf_nan_and_random_floats_agrees_in_every_table(void **state)
{
    (void)state;
    test_random r = {5};
    enum { N = 100003 };
    float *in = malloc(N * sizeof *in);
    uint16_t *out = malloc(N * sizeof *out), *want = malloc(N * sizeof *want);
    for (size_t i = 0; i < N; i++) in[i] = float_of((uint32_t)test_random_u64(&r));
    in[0] = INFINITY, in[1] = -INFINITY, in[2] = NAN, in[3] = float_of(0x7f800001), in[4] = float_of(0xffbfffff);
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < 2; type++) {
            cairn_dtype dtype = type ? CAIRN_BF16 : CAIRN_F16;
            k->narrow(out, in, dtype, N);
            cairn_kernels_ref.narrow(want, in, dtype, N);
            assert_memory_equal(out, want, N * sizeof *out);
            assert_int_equal(out[0], type ? 0x7f80 : 0x7c00);
            assert_int_equal(out[1], type ? 0xff80 : 0xfc00);
            float back[5];
            k->widen(back, out, dtype, 5);
            for (int i = 2; i < 5; i++) assert_true(isnan(back[i]));
        }
#ifdef __FLT16_MANT_DIG__
        k->narrow(out, in, CAIRN_F16, N);
        for (size_t i = 0; i < N; i++) {
            if (isnan(in[i])) continue;
            _Float16 h = (_Float16)in[i];
            assert_memory_equal(&h, &out[i], sizeof h);
        }
#endif
        float same[7];
        k->narrow(same, in, CAIRN_F32, 7);
        assert_memory_equal(same, in, sizeof same);
        k->widen(same, in + 7, CAIRN_F32, 7);
        assert_memory_equal(same, in + 7, sizeof same);
    }
    free(in), free(out), free(want);
}

static void conversion_touches_only_its_elements_at_any_byte(void **state)
{
    (void)state;
    test_random r = {6};
    const cairn_dtype types[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < 3; type++) {
            for (size_t n = 0; n < 70; n++) {
                size_t bytes = n * cairn_dtype_size(types[type]);
                guarded x = guarded_random(&r, n), back = guarded_new(n * sizeof(float)), half = guarded_new(bytes + 1);
                char *odd = half.data; /* an odd address, one byte before the last element's end */
                odd[bytes] = 0x5a;
                k->narrow(odd, x.data, types[type], n);
                assert_int_equal(odd[bytes], 0x5a);
                memmove(odd + 1, odd, bytes); /* and again ending at the page */
                k->widen(back.data, odd + 1, types[type], n);
                const float *a = x.data, *b = back.data;
                for (size_t i = 0; i < n; i++)
                    CLOSE(k->name, b[i], a[i],
                          fabsf(a[i]) * (type == 0   ? 0
                                         : type == 1 ? 0x1p-11
                                                     : 0x1p-8) +
                              0x1p-25,
                          "n=%zu", n);
                guarded_free(&x), guarded_free(&back), guarded_free(&half);
            }
        }
    }
}

/* ---- layers ---- */

static void rms_norm_and_silu_agree_with_double_formulas_in_place_too(void **state)
{
    (void)state;
    test_random r = {7};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t l = 0; l < LENGTHS; l++) {
            size_t n = lengths[l];
            guarded a = guarded_random(&r, n), b = guarded_random(&r, n), c = guarded_new(n * sizeof(float));
            float *x = a.data, *weight = b.data, *out = c.data;
            double squares = 0;
            for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
            k->rms_norm(out, x, weight, n, 1e-5f);
            for (size_t i = 0; i < n; i++) {
                double want = x[i] / sqrt(squares / (double)n + (double)1e-5f) * weight[i];
                CLOSE(k->name, out[i], want, ((double)n / 16 + 12) * EPS * fabs(want), "rms_norm n=%zu", n);
            }
            k->silu_mul(x, weight, n); /* x was the gate: compare through a copy */
            guarded_free(&a);
            a = guarded_random(&r, n);
            x = a.data;
            for (size_t i = 0; i < n; i++) x[i] *= 20;
            float *gate = malloc((n + 1) * sizeof *gate);
            memcpy(gate, x, n * sizeof *gate);
            k->silu_mul(x, weight, n);
            for (size_t i = 0; i < n; i++) {
                double want = gate[i] / (1 + exp(-(double)gate[i])) * weight[i];
                CLOSE(k->name, x[i], want, 12 * EPS * fabs(want) + 1e-44, "silu n=%zu gate=%g", n, gate[i]);
            }
            memcpy(x, gate, n * sizeof *gate);
            k->rms_norm(out, x, weight, n, 0.5f);
            k->rms_norm(x, x, weight, n, 0.5f);
            assert_memory_equal(x, out, n * sizeof *x);
            free(gate);
            guarded_free(&a), guarded_free(&b), guarded_free(&c);
        }
    }
}

static void rotation_turns_pairs_in_both_layouts_and_in_place(void **state)
{
    (void)state;
    test_random r = {8};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t n = 0; n <= 140; n += 2) {
            for (int interleaved = 0; interleaved < 2; interleaved++) {
                size_t half = n / 2;
                guarded gx = guarded_random(&r, n), gc = guarded_new(half * sizeof(float)),
                        gs = guarded_new(half * sizeof(float)), go = guarded_new(n * sizeof(float));
                float *x = gx.data, *c = gc.data, *s = gs.data, *out = go.data;
                for (size_t i = 0; i < half; i++) {
                    double angle = 100 * test_random_unit(&r);
                    c[i] = (float)cos(angle), s[i] = (float)sin(angle);
                }
                k->rotate(out, x, c, s, n, interleaved);
                for (size_t i = 0; i < half; i++) {
                    size_t one = interleaved ? 2 * i : i, two = interleaved ? 2 * i + 1 : i + half;
                    double w1 = (double)x[one] * c[i] - (double)x[two] * s[i],
                           w2 = (double)x[two] * c[i] + (double)x[one] * s[i];
                    double bound = 3 * EPS * (fabs(x[one]) + fabs(x[two]));
                    CLOSE(k->name, out[one], w1, bound, "rotate n=%zu i=%zu", n, i);
                    CLOSE(k->name, out[two], w2, bound, "rotate n=%zu i=%zu", n, i);
                }
                k->rotate(x, x, c, s, n, interleaved);
                assert_memory_equal(x, out, n * sizeof *x);
                guarded_free(&gx), guarded_free(&gc), guarded_free(&gs), guarded_free(&go);
            }
        }
    }
}

/* ---- weights ---- */

/* A random matrix of the type, ending at a guard page, and its values in double. */
static guarded random_weights(test_random *r, cairn_wtype type, size_t rows, size_t cols, double *values)
{
    size_t row_bytes = cairn_wtype_row_bytes(type, cols);
    guarded g = guarded_new(rows * row_bytes);
    for (size_t row = 0; row < rows; row++)
        for (size_t c = 0; c < cols; c++) {
            char *at = (char *)g.data + row * row_bytes;
            float x = test_random_normal(r);
            double *value = values + row * cols + c;
            uint16_t h;
            switch (type) {
            case CAIRN_W_F32: memcpy(at + 4 * c, &x, 4), *value = x; break;
            case CAIRN_W_F16:
                h = (uint16_t)(test_random_below(r, 0x7c00) | (uint32_t)test_random_below(r, 2) << 15);
                memcpy(at + 2 * c, &h, 2), *value = f16_value(h);
                break;
            case CAIRN_W_BF16:
                h = (uint16_t)(bits_of(x) >> 16);
                memcpy(at + 2 * c, &h, 2), *value = float_of((uint32_t)h << 16);
                break;
            case CAIRN_W_Q8_0: {
                char *block = at + c / 32 * 34;
                int8_t q = (int8_t)((int)test_random_below(r, 256) - 128);
                if (c % 32 == 0) {
                    h = (uint16_t)test_random_below(r, 0x3c00);
                    memcpy(block, &h, 2);
                }
                memcpy(&h, block, 2);
                block[2 + c % 32] = (char)q, *value = f16_value(h) * q;
            }
            }
        }
    return g;
}

static void matvec_and_dequant_agree_with_double_loops_and_no_row_depends_on_the_range(void **state)
{
    (void)state;
    test_random r = {9};
    const size_t shapes[][2] = {{1, 32}, {3, 64}, {5, 96},  {16, 32},  {17, 192}, {40, 192},
                                {21, 1}, {7, 17}, {33, 40}, {18, 135}, {6, 4096}, {2, 0}};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            for (int t = 0; t < 4; t++) {
                cairn_wtype type = (cairn_wtype)t;
                size_t rows = shapes[s][0], cols = shapes[s][1];
                if (type == CAIRN_W_Q8_0 && cols % 32 != 0) continue;
                double *values = malloc((rows * cols + 1) * sizeof *values);
                guarded w = random_weights(&r, type, rows, cols, values), gx = guarded_random(&r, cols),
                        gy = guarded_new(rows * sizeof(float)), gd = guarded_new(rows * cols * sizeof(float));
                const float *x = gx.data;
                float *y = gy.data, *dense = gd.data;
                k->matvec(y, w.data, type, cols, 0, rows, x);
                k->dequant(dense, w.data, type, cols, 0, rows);
                for (size_t row = 0; row < rows; row++) {
                    double want = 0, magnitude = 0;
                    for (size_t c = 0; c < cols; c++) {
                        double product = values[row * cols + c] * x[c];
                        want += product, magnitude += fabs(product);
                        assert_int_equal(bits_of(dense[row * cols + c]), bits_of((float)values[row * cols + c]));
                    }
                    CLOSE(k->name, y[row], want, ((double)cols / 16 + 12) * EPS * magnitude, "matvec type %d %zux%zu",
                          t, rows, cols);
                }
                for (int i = 0; i < 20; i++) {
                    size_t first = test_random_below(&r, (uint32_t)rows),
                           n = 1 + test_random_below(&r, (uint32_t)(rows - first));
                    float *part = (float *)gy.data + rows - n, *saved = malloc(rows * sizeof *saved);
                    k->matvec(saved, w.data, type, cols, 0, rows, x);
                    k->matvec(part, w.data, type, cols, first, n, x);
                    assert_memory_equal(part, saved + first, n * sizeof *part);
                    k->dequant((float *)gd.data + (rows - n) * cols, w.data, type, cols, first, n);
                    const float *tail = (const float *)gd.data + (rows - n) * cols;
                    for (size_t c = 0; c < n * cols; c++)
                        assert_int_equal(bits_of(tail[c]), bits_of((float)values[first * cols + c]));
                    free(saved);
                }
                free(values);
                guarded_free(&w), guarded_free(&gx), guarded_free(&gy), guarded_free(&gd);
            }
        }
    }
}

static void row_bytes_are_those_of_the_file_format_and_zero_where_the_type_does_not_fit(void **state)
{
    (void)state;
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_F32, 5), 20);
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_F16, 5), 10);
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_BF16, 7), 14);
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_Q8_0, 64), 68);
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_Q8_0, 33), 0);
    assert_int_equal(cairn_wtype_row_bytes(CAIRN_W_F32, SIZE_MAX / 2), 0);
}

/* ---- BLAS ---- */

static void gemm_agrees_with_double_loops_and_respects_leading_dimensions(void **state)
{
    (void)state;
    test_random r = {12};
    const size_t shapes[][3] = {{1, 1, 1},   {3, 5, 7}, {64, 48, 33}, {1, 100, 64},
                                {17, 1, 20}, {4, 4, 0}, {0, 3, 3},    {130, 70, 300}};
    for (size_t s = 0; s < 8; s++) {
        size_t m = shapes[s][0], n = shapes[s][1], k = shapes[s][2], lda = k + 3, ldb = k + 1, ldc = n + 2;
        float *a = malloc((m * lda + 1) * sizeof *a), *b = malloc((n * ldb + 1) * sizeof *b),
              *c = malloc((m * ldc + 1) * sizeof *c);
        test_random_fill(&r, a, m * lda), test_random_fill(&r, b, n * ldb), test_random_fill(&r, c, m * ldc);
        for (size_t i = 0; i < m; i++) c[i * ldc + n] = 5;
        cairn_gemm_nt(m, n, k, a, lda, b, ldb, c, ldc);
        for (size_t i = 0; i < m; i++) {
            for (size_t j = 0; j < n; j++) {
                double want = 0, size = 0;
                for (size_t l = 0; l < k; l++) {
                    double term = (double)a[i * lda + l] * b[j * ldb + l];
                    want += term, size += fabs(term);
                }
                CLOSE("gemm", c[i * ldc + j], want, k <= 100 ? 1e-5 : (double)(k + 1) * EPS * size, "shape %zu", s);
            }
            assert_int_equal(bits_of(c[i * ldc + n]), bits_of(5.0f));
        }
        free(a), free(b), free(c);
    }
}

static void a_row_of_gemm_has_the_same_bits_however_many_tiles_there_are(void **state)
{
    (void)state;
    enum { TILES = 5, M = 64, N = 70, K = 300 };
    test_random r = {14};
    float *a = malloc(TILES * M * K * sizeof *a), *b = malloc(N * K * sizeof *b);
    float *all = malloc(TILES * M * N * sizeof *all), *one = malloc(M * N * sizeof *one);
    test_random_fill(&r, a, TILES * M * K), test_random_fill(&r, b, N * K);
    cairn_gemm_nt_tiles(TILES, M, N, K, a, K, b, K, all, N);
    for (size_t t = 0; t < TILES; t++) {
        cairn_gemm_nt(M, N, K, a + t * M * K, K, b, K, one, N);
        assert_memory_equal(one, all + t * M * N, M * N * sizeof *one);
    }
    free(a), free(b), free(all), free(one);
}

static void reports_name_the_table_and_what_openblas_took_the_processor_for(void **state)
{
    (void)state;
    const char *words = cairn_kernels_words(), *asked = getenv("OPENBLAS_CORETYPE");
    const cairn_kernels *best = cairn_kernels_best();
    assert_memory_equal(words, best->name, strlen(best->name));
    if (asked != NULL && strcmp(asked, "Prescott") == 0)
        assert_string_equal(words + strlen(best->name),
                            best == &cairn_kernels_ref ? ", OpenBLAS's Prescott" : ", OpenBLAS's Prescott replaced");
}

/* A and B by element, whichever way round they are stored */
static void gemm_for_gradients_agrees_with_double_loops_and_adds_if_asked(void **state)
{
    (void)state;
    test_random r = {13};
    const size_t shapes[][3] = {{1, 1, 1},   {3, 5, 7}, {64, 48, 33}, {1, 100, 64},
                                {17, 1, 20}, {4, 4, 0}, {0, 3, 3},    {130, 70, 300}};
    for (size_t s = 0; s < 4 * 8; s++) {
        size_t m = shapes[s / 4][0], n = shapes[s / 4][1], k = shapes[s / 4][2];
        bool tn = (s & 1) != 0, add = (s & 2) != 0;
        size_t row = tn ? 1 : k + 3, col = tn ? m + 3 : 1; /* steps of A's element (i, l) */
        size_t ldb = n + 1, ldc = n + 2;
        float *a = malloc((m * row + k * col + 1) * sizeof *a), *b = malloc((k * ldb + 1) * sizeof *b),
              *c = malloc((m * ldc + 1) * sizeof *c), *was = malloc((m * ldc + 1) * sizeof *was);
        test_random_fill(&r, a, m * row + k * col), test_random_fill(&r, b, k * ldb), test_random_fill(&r, c, m * ldc);
        memcpy(was, c, m * ldc * sizeof *c);
        (tn ? cairn_gemm_tn : cairn_gemm_nn)(m, n, k, a, tn ? col : row, b, ldb, c, ldc, add);
        for (size_t i = 0; i < m; i++) {
            for (size_t j = 0; j < n; j++) {
                double want = add ? (double)was[i * ldc + j] : 0, size = fabs(want);
                for (size_t l = 0; l < k; l++) {
                    double term = (double)a[i * row + l * col] * b[l * ldb + j];
                    want += term, size += fabs(term);
                }
                CLOSE("gemm", c[i * ldc + j], want, k <= 100 ? 1e-5 : (double)(k + 1) * EPS * size, "shape %zu, %s%s",
                      s / 4, tn ? "tn" : "nn", add ? " +=" : "");
            }
            assert_int_equal(bits_of(c[i * ldc + n]), bits_of(was[i * ldc + n]));
        }
        free(a), free(b), free(c), free(was);
    }
}

/* ---- dispatch ---- */

static void the_environment_asks_for_a_lesser_table_and_nonsense_gives_the_best(void **state)
{
    (void)state;
    const char *saved = getenv("CAIRN_KERNELS");
    char *copy = saved != NULL ? strdup(saved) : NULL;
    const cairn_kernels *avx2 = cairn_kernels_avx2(), *avx512 = cairn_kernels_avx512();
    const cairn_kernels *plain = avx512 != NULL ? avx512 : avx2 != NULL ? avx2 : &cairn_kernels_ref;
    const cairn_kernels *amx = cairn_kernels_amx(), *best = amx != NULL ? amx : plain;
    unsetenv("CAIRN_KERNELS");
    assert_ptr_equal(cairn_kernels_best(), best);
    setenv("CAIRN_KERNELS", "ref", 1);
    assert_ptr_equal(cairn_kernels_best(), &cairn_kernels_ref);
    setenv("CAIRN_KERNELS", "avx2", 1);
    assert_ptr_equal(cairn_kernels_best(), avx2 != NULL ? avx2 : &cairn_kernels_ref);
    setenv("CAIRN_KERNELS", "avx512", 1);
    assert_ptr_equal(cairn_kernels_best(), plain);
    assert_null(cairn_kernels_bf16());
    setenv("CAIRN_KERNELS", "avx9000", 1);
    assert_ptr_equal(cairn_kernels_best(), best);
    if (copy != NULL)
        setenv("CAIRN_KERNELS", copy, 1);
    else
        unsetenv("CAIRN_KERNELS");
    free(copy);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dot_axpy_and_scale_agree_with_double_loops_at_every_length),
        cmocka_unit_test(max_finds_the_greatest_ignores_nan_and_is_minus_infinity_of_nothing),
        cmocka_unit_test(exp_is_within_two_ulp_of_libm_over_the_whole_range_and_exact_at_zero),
        cmocka_unit_test(exp_shift_and_exp_sum_give_the_same_sum_and_the_sum_of_what_is_stored),
        cmocka_unit_test(set_bits_lists_every_bit_of_words_thin_and_full),
        cmocka_unit_test(dot_rows_gives_the_bits_of_dot_over_widened_rows),
        cmocka_unit_test(above_lists_ascending_indexes_equal_ones_included_and_nan_left_out),
        cmocka_unit_test(every_f16_and_bf16_pattern_widens_to_its_value),
        cmocka_unit_test(every_f16_survives_the_round_trip_and_every_midpoint_goes_to_the_even_neighbour),
        cmocka_unit_test(every_bf16_survives_the_round_trip_and_every_midpoint_goes_to_the_even_neighbour),
        cmocka_unit_test(narrowing_inf_nan_and_random_floats_agrees_in_every_table),
        cmocka_unit_test(conversion_touches_only_its_elements_at_any_byte),
        cmocka_unit_test(rms_norm_and_silu_agree_with_double_formulas_in_place_too),
        cmocka_unit_test(rotation_turns_pairs_in_both_layouts_and_in_place),
        cmocka_unit_test(matvec_and_dequant_agree_with_double_loops_and_no_row_depends_on_the_range),
        cmocka_unit_test(row_bytes_are_those_of_the_file_format_and_zero_where_the_type_does_not_fit),
        cmocka_unit_test(gemm_agrees_with_double_loops_and_respects_leading_dimensions),
        cmocka_unit_test(gemm_for_gradients_agrees_with_double_loops_and_adds_if_asked),
        cmocka_unit_test(a_row_of_gemm_has_the_same_bits_however_many_tiles_there_are),
        cmocka_unit_test(reports_name_the_table_and_what_openblas_took_the_processor_for),
        cmocka_unit_test(the_environment_asks_for_a_lesser_table_and_nonsense_gives_the_best),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
