/* Attention over one tile: every table against plain attention in double, and the chunk-invariance contract bit for
 * bit. Payloads sit at odd addresses; scratch has exactly the promised bytes and ends at a page nobody may touch. */
#include "kernels_support.h"

#include <amx.h>

#include <math.h>
#include <stdlib.h>

static const cairn_dtype dtypes[] = {CAIRN_F32, CAIRN_F16, CAIRN_BF16, CAIRN_Q8};
enum { DTYPES = 4, QUERIES = 130 };

/* A random tile with its queries, and what its bytes mean in double. */
typedef struct fixture {
    uint32_t tokens, dim;
    cairn_dtype dtype;
    cairn_tile tile;
    double *keys, *values; /* (tokens, dim) as stored, scales applied */
    float *raw_keys, *raw_values;
    float *q; /* (QUERIES, dim) */
    const float *q_rows[QUERIES];
    void *scratch;
    guarded payload_memory, scratch_memory;
} fixture;

static size_t payload_bytes(cairn_dtype dtype, size_t tokens, size_t dim)
{
    size_t scales = dtype == CAIRN_Q8 ? 4 * (tokens + dim) : 0;
    return 2 * tokens * dim * cairn_dtype_size(dtype) + scales;
}

/* Element i of a span by its definition, without the kernels. */
static double stored(const void *base, cairn_dtype dtype, size_t i)
{
    const char *at = (const char *)base + i * cairn_dtype_size(dtype);
    uint32_t b = 0;
    float x;
    memcpy(&b, at, cairn_dtype_size(dtype));
    if (dtype == CAIRN_Q8) return (int8_t)b;
    if (dtype == CAIRN_F16) return f16_value(b);
    if (dtype == CAIRN_BF16) b <<= 16;
    memcpy(&x, &b, sizeof x);
    return x;
}
static double scale_at(const float *scales, size_t i)
{
    float x;
    memcpy(&x, (const char *)scales + 4 * i, sizeof x);
    return x;
}

static fixture fixture_new(test_random *r, cairn_dtype dtype, uint32_t tokens, uint32_t dim, size_t offset)
{
    fixture f = {.tokens = tokens, .dim = dim, .dtype = dtype};
    size_t n = (size_t)tokens * dim;
    f.raw_keys = malloc((n + 1) * sizeof *f.raw_keys), f.raw_values = malloc((n + 1) * sizeof *f.raw_values);
    f.keys = malloc((n + 1) * sizeof *f.keys), f.values = malloc((n + 1) * sizeof *f.values);
    f.q = malloc(QUERIES * (size_t)dim * sizeof *f.q);
    test_random_fill(r, f.raw_keys, n), test_random_fill(r, f.raw_values, n);
    test_random_fill(r, f.q, QUERIES * (size_t)dim);
    for (size_t i = 0; i < QUERIES * (size_t)dim; i++) f.q[i] *= 2 / sqrtf((float)dim);
    for (size_t i = 0; i < QUERIES; i++) f.q_rows[i] = f.q + i * dim;
    f.payload_memory = guarded_new(payload_bytes(dtype, tokens, dim) + offset);
    f.scratch_memory = guarded_new(cairn_tile_scratch_bytes(tokens, dim));
    f.scratch = f.scratch_memory.data;
    void *payload = f.payload_memory.data;
    cairn_tile_encode(&cairn_kernels_ref, dtype, tokens, dim, f.raw_keys, f.raw_values, payload);
    f.tile = cairn_tile_over(payload, dtype, tokens, dim);
    for (size_t i = 0; i < n; i++) {
        f.keys[i] = stored(f.tile.keys, dtype, i), f.values[i] = stored(f.tile.values, dtype, i);
        if (dtype == CAIRN_Q8)
            f.keys[i] *= scale_at(f.tile.key_scales, i % dim), f.values[i] *= scale_at(f.tile.value_scales, i / dim);
    }
    return f;
}
static void fixture_free(fixture *f)
{
    free(f->raw_keys), free(f->raw_values), free(f->keys), free(f->values), free(f->q);
    guarded_free(&f->payload_memory), guarded_free(&f->scratch_memory);
}

#define CLOSE(k, f, got, want, bound, what)                                                                            \
    do {                                                                                                               \
        double got_ = (got), want_ = (want), bound_ = (bound);                                                         \
        if (!(fabs(got_ - want_) <= bound_))                                                                           \
            fail_msg("%s %s %s T=%u D=%u: got %.9g, expected %.9g, bound %.3g", (k)->name, what,                       \
                     cairn_dtype_name((f)->dtype), (f)->tokens, (f)->dim, got_, want_, bound_);                        \
    } while (0)

static const double EPS = 0x1p-24;

/* Where attention to q8 multiplies int8 by numbers of 16 bits: how far a score may be off, half a unit a dim, its unit
 * the largest q x scale / 32,639; 0 elsewhere. */
static double score_rounding(const cairn_kernels *k, const fixture *f, const float *q)
{
    double largest = 0;
    if (k == &cairn_kernels_ref || k == cairn_kernels_avx512_without_vnni() || f->dtype != CAIRN_Q8 || f->dim % 32 != 0)
        return 0;
    for (size_t d = 0; d < f->dim; d++) largest = fmax(largest, fabs(q[d] * scale_at(f->tile.key_scales, d)));
    return f->dim * 127 * largest / 32639 / 2;
}

/* And into how many parts the largest weight times its value scale is divided. */
static double weight_max(const cairn_kernels *k)
{
    return k == cairn_kernels_avx2() ? 32767 : 65535;
}

/* Scores, mix and attention of rows [0, nq) against double loops. */
static void check_against_double(const cairn_kernels *k, const fixture *f, size_t nq, test_random *r)
{
    size_t T = f->tokens, D = f->dim, ld = T + 5;
    float *scores = malloc((nq * ld + 1) * sizeof *scores), *out = malloc(nq * D * sizeof *out),
          *lse = malloc(nq * sizeof *lse);
    float *before = malloc(nq * D * sizeof *before), **rows = malloc(nq * sizeof *rows),
          *weight = malloc(nq * sizeof *weight);
    double *p = malloc((T + 1) * sizeof *p);
    for (size_t i = 0; i < nq * ld; i++) scores[i] = 77;
    for (size_t i = 0; i < nq; i++) rows[i] = out + i * D, weight[i] = (float)test_random_unit(r);
    test_random_fill(r, before, nq * D);

    k->tile_scores(&f->tile, nq, f->q_rows, scores, ld, f->scratch);
    for (size_t i = 0; i < nq; i++)
        for (size_t t = 0; t < ld; t++) {
            if (t >= T) { /* the room between rows is not ours */
                assert_true(scores[i * ld + t] == 77);
                continue;
            }
            double want = 0, magnitude = 0;
            for (size_t d = 0; d < D; d++) {
                double product = f->q_rows[i][d] * f->keys[t * D + d];
                want += product, magnitude += fabs(product);
            }
            CLOSE(k, f, scores[i * ld + t], want, ((double)D / 8 + 10) * EPS * magnitude, "scores");
        }

    memcpy(out, before, nq * D * sizeof *out);
    k->tile_mix(&f->tile, nq, scores, ld, rows, f->scratch);
    for (size_t i = 0; i < nq; i++)
        for (size_t d = 0; d < D; d++) {
            double want = before[i * D + d], magnitude = fabs(want);
            for (size_t t = 0; t < T; t++) {
                double product = (double)scores[i * ld + t] * f->values[t * D + d];
                want += product, magnitude += fabs(product);
            }
            CLOSE(k, f, out[i * D + d], want, ((double)T + 8) * EPS * magnitude, "mix");
        }

    memcpy(out, before, nq * D * sizeof *out);
    k->tile_attend(&f->tile, nq, f->q_rows, weight, rows, lse, f->scratch);
    for (size_t i = 0; i < nq; i++) {
        double most = -INFINITY, sum = 0, largest = 0;
        const double rounding = score_rounding(k, f, f->q_rows[i]);
        for (size_t t = 0; t < T; t++) {
            p[t] = 0;
            for (size_t d = 0; d < D; d++) p[t] += f->q_rows[i][d] * f->keys[t * D + d];
            most = fmax(most, p[t]);
        }
        for (size_t t = 0; t < T; t++) sum += p[t] = exp(p[t] - most);
        for (size_t t = 0; rounding != 0 && t < T; t++)
            largest = fmax(largest, p[t] / sum * scale_at(f->tile.value_scales, t));
        if (T == 0)
            assert_true(isinf(lse[i]) && lse[i] < 0);
        else
            CLOSE(k, f, lse[i], most + log(sum), 2e-6 * (1 + fabs(most)) + rounding, "lse");
        for (size_t d = 0; d < D; d++) {
            double mixed = 0, magnitude = 0;
            for (size_t t = 0; t < T; t++) {
                mixed += p[t] / sum * f->values[t * D + d];
                magnitude += p[t] / sum * fabs(f->values[t * D + d]);
            }
            double want = before[i * D + d] + weight[i] * mixed;
            if (T == 0)
                assert_true(out[i * D + d] == before[i * D + d]);
            else
                CLOSE(k, f, out[i * D + d], want,
                      weight[i] * ((4e-6 + expm1(2 * rounding)) * magnitude +
                                   (double)T * 127 * largest / weight_max(k) / 2) +
                          2 * EPS * fabs(want),
                      "attend");
        }
    }
    memcpy(out, before, nq * D * sizeof *out);
    k->tile_attend(&f->tile, nq, f->q_rows, weight, rows, NULL, f->scratch); /* lse is optional */
    free(scores), free(out), free(lse), free(before), free(rows), free(weight), free(p);
}

static void tiles_of_every_type_and_shape_agree_with_attention_in_double(void **state)
{
    (void)state;
    test_random r = {21};
    const uint32_t dims[] = {2, 4, 6, 10, 16, 18, 24, 32, 36, 48, 64, 80, 96, 112, 128, 130, 256};
    const uint32_t tokens[] = {0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 100};
    const size_t queries[] = {1, 2, 3, 4, 5, 6, 7, 9, 13};
    size_t turn = 0;
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            for (size_t d = 0; d < 17; d++) {
                for (size_t t = 0; t < 14; t++) {
                    fixture f = fixture_new(&r, dtypes[type], tokens[t], dims[d], turn % 3);
                    check_against_double(k, &f, queries[turn % 9], &r);
                    turn++;
                    fixture_free(&f);
                }
            }
        }
    }
}

static void large_shapes_and_batches_agree_with_attention_in_double(void **state)
{
    (void)state;
    test_random r = {22};
    const uint32_t shapes[][3] = {{63, 128, 64},  {63, 32, 65},  {64, 64, 130},
                                  {130, 1024, 3}, {4096, 64, 2}, {63, 36, 66}};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            for (size_t s = 0; s < 6; s++) {
                fixture f = fixture_new(&r, dtypes[type], shapes[s][0], shapes[s][1], s % 2);
                check_against_double(k, &f, shapes[s][2], &r);
                fixture_free(&f);
            }
        }
    }
}

static void zero_queries_write_nothing(void **state)
{
    (void)state;
    test_random r = {23};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            fixture f = fixture_new(&r, dtypes[type], 7, 6, 0);
            k->tile_scores(&f.tile, 0, f.q_rows, NULL, 7, f.scratch);
            k->tile_mix(&f.tile, 0, NULL, 7, NULL, f.scratch);
            k->tile_attend(&f.tile, 0, f.q_rows, NULL, NULL, NULL, f.scratch);
            fixture_free(&f);
        }
    }
}

/* A row that has no numbers keeps that to itself, and a channel a million times the others loses nothing but their last
 * digits. */
static void q8_rows_and_scales_out_of_the_ordinary_stay_in_their_place(void **state)
{
    (void)state;
    enum { T = 63, D = 64, N = 5 };
    test_random r = {29};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        fixture f = fixture_new(&r, CAIRN_Q8, T, D, 0);
        float out[N * D], again[N * D], *rows[N], weight[N], lse[N];
        for (size_t i = 0; i < N; i++) rows[i] = out + i * D, weight[i] = 1;
        memset(f.q + 1 * D, 0, D * sizeof *f.q);
        f.q[2 * D + 7] = NAN, f.q[3 * D + 9] = INFINITY;
        memset(out, 0, sizeof out);
        k->tile_attend(&f.tile, N, f.q_rows, weight, rows, lse, f.scratch);
        for (size_t d = 0; d < D; d++) {
            double mean = 0;
            for (size_t t = 0; t < T; t++) mean += f.values[t * D + d] / T;
            CLOSE(k, &f, out[1 * D + d], mean, 2e-4 * (1 + fabs(mean)), "mean of equal scores");
            assert_true(isnan(out[2 * D + d]) && isnan(out[3 * D + d]));
            assert_true(isfinite(out[0 * D + d]) && isfinite(out[4 * D + d]));
        }
        float scales[D];
        memcpy(again, out, sizeof again);
        memcpy(scales, f.tile.key_scales, sizeof scales);
        scales[5] *= 1e6f;
        f.q[0 * D + 5] = 0, f.q[4 * D + 5] *= 1e-6f;
        f.tile.key_scales = scales;
        memset(out, 0, sizeof out);
        k->tile_attend(&f.tile, N, f.q_rows, weight, rows, lse, f.scratch);
        for (size_t d = 0; d < D; d++) CLOSE(k, &f, out[4 * D + d], again[4 * D + d], 1e-3, "a channel apart");
        fixture_free(&f);
    }
}

/* Tiles that follow each other, told so, as a step attends to them; in between, on the same thread, products that use
 * the same registers. */
static void a_run_of_q8_tiles_by_amx_has_the_bits_of_each_alone_by_vnni(void **state)
{
    (void)state;
    enum { TILES = 5, N = 4 };
    const cairn_kernels *amx = cairn_kernels_amx(), *vnni = cairn_kernels_avx512(), *bf16 = cairn_kernels_bf16();
    const uint32_t shapes[][2] = {{63, 32}, {64, 64}, {32, 96}, {47, 128}, {50, 256}, {63, 512}};
    if (amx == NULL) skip();
    test_random r = {31};
    for (size_t s = 0; s < 6; s++) {
        const size_t D = shapes[s][1];
        fixture f[TILES];
        float out[N * 512] = {0}, want[N * 512] = {0}, weight[N], *rows[N], *want_rows[N], lse[2][N], c[64], want_c[64];
        for (size_t i = 0; i < TILES; i++) f[i] = fixture_new(&r, CAIRN_Q8, shapes[s][0], shapes[s][1], s % 3);
        for (size_t i = 0; i < N; i++) {
            rows[i] = out + i * D, want_rows[i] = want + i * D;
            weight[i] = (float)test_random_unit(&r);
        }
        if (bf16 != NULL) bf16->product(8, 8, 32, f[0].q, 32, 1, f[1].q, 8, want_c, 8, false);
        for (size_t i = 0; i < TILES; i++) {
            const size_t nq =
                i == 2 || (i == TILES - 1 && s % 2) ? 1 : N; /* fewer are left to VNNI, inside a run too */
            f[i].tile.coming = i > 0;
            f[i].tile.next = i + 1 < TILES ? &f[i + 1].tile : NULL;
            amx->tile_attend(&f[i].tile, nq, f[i].q_rows, weight, rows, i % 2 ? lse[0] : NULL, f[0].scratch);
            vnni->tile_attend(&f[i].tile, nq, f[i].q_rows, weight, want_rows, i % 2 ? lse[1] : NULL, f[1].scratch);
            if (i % 2) assert_memory_equal(lse[0], lse[1], nq * sizeof(float));
            assert_memory_equal(out, want, N * D * sizeof *out);
            if (i + 1 == TILES) assert_null(cairn_amx_shapes); /* given back */
            if (bf16 == NULL) continue;
            bf16->product(8, 8, 32, f[0].q, 32, 1, f[1].q, 8, c, 8, false);
            assert_memory_equal(c, want_c, sizeof c);
        }
        for (size_t i = 0; i < TILES; i++) fixture_free(&f[i]);
    }
}

static void two_q8_tiles_at_a_time_have_the_bits_of_each_alone(void **state)
{
    (void)state;
    const uint32_t shapes[][3] = {{63, 63, 32}, {64, 64, 64}, {50, 50, 128}, {5, 5, 256}, {63, 63, 40}, {63, 62, 64}};
    test_random r = {33};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;)
        for (size_t s = 0; s < 6 && k->tile_attend_two != NULL; s++)
            for (int one_row = 0; one_row <= 1; one_row++) { /* both add to it, in their order */
                const size_t D = shapes[s][2];
                fixture f[4];
                cairn_tile two[2];
                float out[2 * 256] = {0}, want[2 * 256] = {0}, weight[2] = {0.7f, 0.2f};
                float *rows[2] = {out, one_row ? out : out + D}, *want_rows[2] = {want, one_row ? want : want + D};
                const float *q[2] = {NULL};
                for (size_t i = 0; i < 4; i++) f[i] = fixture_new(&r, CAIRN_Q8, shapes[s][i % 2], shapes[s][2], s % 3);
                for (size_t i = 0; i < 2; i++) {
                    q[i] = f[i].q_rows[0];
                    two[i] = f[i].tile;
                    two[i].next = s % 2 == 0 ? &f[2 + i].tile : NULL;
                    two[i].later = s % 3 == 0 ? &f[3 - i].tile : NULL;
                    two[i].coming = one_row;
                }
                k->tile_attend_two(two, q, weight, rows, f[2].scratch);
                for (size_t i = 0; i < 2; i++)
                    k->tile_attend(&f[i].tile, 1, &q[i], &weight[i], &want_rows[i], NULL, f[3].scratch);
                assert_memory_equal(out, want, sizeof out);
                for (size_t i = 0; i < 4; i++) fixture_free(&f[i]);
            }
}

/* Memory is asked for ahead by three ways, of small tiles and large, few queries and many. */
static void what_follows_a_tile_changes_no_bit(void **state)
{
    (void)state;
    enum { TILES = 5, N = 17 };
    test_random r = {32};
    const uint32_t dims[] = {32, 64, 128, 40};
    const size_t queries[] = {1, 2, 4, 5, N};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (size_t s = 0; s < 4 * DTYPES; s++) {
            const size_t D = dims[s / DTYPES];
            fixture f[TILES];
            float out[N * 128] = {0}, want[N * 128] = {0}, weight[N], *rows[N], *want_rows[N];
            for (size_t i = 0; i < TILES; i++) f[i] = fixture_new(&r, dtypes[s % DTYPES], 63, dims[s / DTYPES], s % 2);
            for (size_t i = 0; i < N; i++) {
                rows[i] = out + i * D, want_rows[i] = want + i * D;
                weight[i] = (float)test_random_unit(&r);
            }
            for (size_t i = 0; i < TILES; i++) {
                cairn_tile run = f[i].tile;
                run.coming = i > 0;
                run.next = i + 1 < TILES ? &f[i + 1].tile : NULL;
                run.later = i + 4 < TILES ? &f[i + 4].tile : NULL;
                k->tile_attend(&run, queries[i], f[i].q_rows, weight, rows, NULL, f[0].scratch);
                k->tile_attend(&f[i].tile, queries[i], f[i].q_rows, weight, want_rows, NULL, f[1].scratch);
                assert_memory_equal(out, want, N * D * sizeof *out);
            }
            for (size_t i = 0; i < TILES; i++) fixture_free(&f[i]);
        }
    }
}

/* ---- chunk invariance ---- */

static void a_row_has_the_same_bits_alone_and_in_any_batch(void **state)
{
    (void)state;
    test_random r = {24};
    const uint32_t shapes[][2] = {{63, 32}, {63, 64}, {63, 128}, {16, 16}, {5, 4}, {30, 20}, {64, 80}, {100, 36}};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            for (size_t s = 0; s < 8; s++) {
                size_t T = shapes[s][0], D = shapes[s][1];
                fixture f = fixture_new(&r, dtypes[type], shapes[s][0], shapes[s][1], 0);
                float *scores = malloc(QUERIES * T * sizeof *scores), *out = calloc(QUERIES * D, sizeof *out);
                float *mixed = calloc(QUERIES * D, sizeof *mixed), weight[QUERIES], lse[QUERIES], *rows[QUERIES],
                      *mixed_rows[QUERIES];
                for (size_t i = 0; i < QUERIES; i++)
                    rows[i] = out + i * D, mixed_rows[i] = mixed + i * D, weight[i] = (float)test_random_unit(&r);
                k->tile_scores(&f.tile, QUERIES, f.q_rows, scores, T, f.scratch);
                k->tile_mix(&f.tile, QUERIES, scores, T, mixed_rows, f.scratch);
                k->tile_attend(&f.tile, QUERIES, f.q_rows, weight, rows, lse, f.scratch);
                for (size_t nq = 1; nq < 70; nq += nq < 12 ? 1 : 13) {
                    size_t first = test_random_below(&r, (uint32_t)(QUERIES - nq + 1)), ld = T + 3;
                    float *part = malloc(nq * ld * sizeof *part), *part_out = calloc(nq * D, sizeof *part_out),
                          part_lse[QUERIES], *part_rows[QUERIES];
                    for (size_t i = 0; i < nq; i++) part_rows[i] = part_out + (nq - 1 - i) * D; /* in any place */
                    k->tile_scores(&f.tile, nq, f.q_rows + first, part, ld, f.scratch);
                    for (size_t i = 0; i < nq; i++)
                        assert_memory_equal(part + i * ld, scores + (first + i) * T, T * sizeof *part);
                    k->tile_mix(&f.tile, nq, part, ld, part_rows, f.scratch);
                    for (size_t i = 0; i < nq; i++)
                        assert_memory_equal(part_rows[i], mixed_rows[first + i], D * sizeof *part_out);
                    memset(part_out, 0, nq * D * sizeof *part_out);
                    k->tile_attend(&f.tile, nq, f.q_rows + first, weight + first, part_rows, part_lse, f.scratch);
                    for (size_t i = 0; i < nq; i++) {
                        assert_memory_equal(part_rows[i], rows[first + i], D * sizeof *part_out);
                        assert_memory_equal(&part_lse[i], &lse[first + i], sizeof *lse);
                    }
                    free(part), free(part_out);
                }
                free(scores), free(out), free(mixed);
                fixture_free(&f);
            }
        }
    }
}

static void a_token_has_the_same_score_however_many_follow_it(void **state)
{
    (void)state;
    test_random r = {25};
    const uint32_t dims[] = {4, 20, 32, 64, 128};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            for (size_t s = 0; s < 5; s++) {
                enum { T = 70 };
                fixture f = fixture_new(&r, dtypes[type], T, dims[s], 0);
                float scores[5 * T], part[5 * T];
                k->tile_scores(&f.tile, 5, f.q_rows, scores, T, f.scratch);
                for (uint32_t tokens = 0; tokens <= T; tokens++) {
                    cairn_tile shorter = f.tile; /* scales belong to the whole tile here: only the count changes */
                    shorter.tokens = tokens;
                    for (size_t nq = 1; nq <= 5; nq += 2) {
                        k->tile_scores(&shorter, nq, f.q_rows, part, T, f.scratch);
                        for (size_t i = 0; i < nq; i++)
                            assert_memory_equal(part + i * T, scores + i * T, tokens * sizeof *part);
                    }
                }
                fixture_free(&f);
            }
        }
    }
}

static void own_rows_in_f32_rounded_to_f16_score_like_the_stored_f16_tile(void **state)
{
    (void)state;
    test_random r = {26};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 1; type < 3; type++) {
            enum { T = 37, D = 48 };
            fixture f = fixture_new(&r, dtypes[type], T, D, 0);
            float rounded[2 * T * D], a[3 * T], b[3 * T], out_a[3 * D] = {0}, out_b[3 * D] = {0};
            float *rows_a[3] = {out_a, out_a + D, out_a + 2 * D}, *rows_b[3] = {out_b, out_b + D, out_b + 2 * D};
            k->widen(rounded, f.tile.keys, dtypes[type], T * D);
            k->widen(rounded + T * D, f.tile.values, dtypes[type], T * D);
            cairn_tile own = cairn_tile_over(rounded, CAIRN_F32, T, D);
            k->tile_scores(&f.tile, 3, f.q_rows, a, T, f.scratch);
            k->tile_scores(&own, 3, f.q_rows, b, T, f.scratch);
            assert_memory_equal(a, b, sizeof a);
            k->tile_mix(&f.tile, 3, a, T, rows_a, f.scratch);
            k->tile_mix(&own, 3, a, T, rows_b, f.scratch);
            assert_memory_equal(out_a, out_b, sizeof out_a);
            fixture_free(&f);
        }
    }
}

/* ---- encoding ---- */

static void q8_tiles_are_within_half_a_step_of_what_went_in(void **state)
{
    (void)state;
    test_random r = {27};
    for (uint32_t dim = 2; dim < 70; dim += 6) {
        uint32_t tokens = 1 + test_random_below(&r, 64);
        fixture f = fixture_new(&r, CAIRN_Q8, tokens, dim, 0);
        for (size_t d = 0; d < dim; d++) {
            double most = 0;
            for (size_t t = 0; t < tokens; t++) most = fmax(most, fabs(f.raw_keys[t * dim + d]));
            CLOSE(&cairn_kernels_ref, &f, scale_at(f.tile.key_scales, d), most / 127, 1e-7 * most, "key scale");
            for (size_t t = 0; t < tokens; t++)
                CLOSE(&cairn_kernels_ref, &f, f.keys[t * dim + d], f.raw_keys[t * dim + d], most / 127 * 0.500001,
                      "key");
        }
        for (size_t t = 0; t < tokens; t++) {
            double most = 0;
            for (size_t d = 0; d < dim; d++) most = fmax(most, fabs(f.raw_values[t * dim + d]));
            CLOSE(&cairn_kernels_ref, &f, scale_at(f.tile.value_scales, t), most / 127, 1e-7 * most, "value scale");
            for (size_t d = 0; d < dim; d++)
                CLOSE(&cairn_kernels_ref, &f, f.values[t * dim + d], f.raw_values[t * dim + d], most / 127 * 0.500001,
                      "value");
        }
        fixture_free(&f);
    }
}

static void q8_tiles_of_zeros_and_of_no_tokens_are_zeros(void **state)
{
    (void)state;
    float zeros[3 * 4] = {0};
    char payload[2 * 3 * 4 + 4 * (3 + 4)];
    memset(payload, 0x55, sizeof payload);
    cairn_tile_encode(&cairn_kernels_ref, CAIRN_Q8, 3, 4, zeros, zeros, payload);
    for (size_t i = 0; i < sizeof payload; i++) assert_int_equal(payload[i], 0);
    memset(payload, 0x55, sizeof payload);
    cairn_tile_encode(&cairn_kernels_ref, CAIRN_Q8, 0, 4, NULL, NULL, payload);
    for (size_t i = 0; i < 16; i++) assert_int_equal(payload[i], 0); /* four key scales */
    assert_int_equal(payload[16], 0x55);
}

static void encoding_is_the_same_payload_in_every_table(void **state)
{
    (void)state;
    test_random r = {28};
    for (const cairn_kernels *k = NULL; (k = next_table(k)) != NULL;) {
        for (int type = 0; type < DTYPES; type++) {
            fixture f = fixture_new(&r, dtypes[type], 63, 36, 0);
            size_t bytes = payload_bytes(dtypes[type], 63, 36);
            char *payload = malloc(bytes);
            cairn_tile_encode(k, dtypes[type], 63, 36, f.raw_keys, f.raw_values, payload);
            assert_memory_equal(payload, f.tile.keys, bytes);
            free(payload);
            fixture_free(&f);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tiles_of_every_type_and_shape_agree_with_attention_in_double),
        cmocka_unit_test(large_shapes_and_batches_agree_with_attention_in_double),
        cmocka_unit_test(zero_queries_write_nothing),
        cmocka_unit_test(q8_rows_and_scales_out_of_the_ordinary_stay_in_their_place),
        cmocka_unit_test(a_run_of_q8_tiles_by_amx_has_the_bits_of_each_alone_by_vnni),
        cmocka_unit_test(two_q8_tiles_at_a_time_have_the_bits_of_each_alone),
        cmocka_unit_test(what_follows_a_tile_changes_no_bit),
        cmocka_unit_test(a_row_has_the_same_bits_alone_and_in_any_batch),
        cmocka_unit_test(a_token_has_the_same_score_however_many_follow_it),
        cmocka_unit_test(own_rows_in_f32_rounded_to_f16_score_like_the_stored_f16_tile),
        cmocka_unit_test(q8_tiles_are_within_half_a_step_of_what_went_in),
        cmocka_unit_test(q8_tiles_of_zeros_and_of_no_tokens_are_zeros),
        cmocka_unit_test(encoding_is_the_same_payload_in_every_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
