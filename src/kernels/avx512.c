/* avx512.c - the table for AVX-512 F, BW, DQ, VL: the bodies over sixteen lanes. Compiled with those flags; nothing
 * here runs before dispatch.c has asked the CPU. */
#include "vec512.h"

#include "tile_bytes.h"

#include "twins_internal.h"

/* 32 registers: mixing 6 rows x 4 vectors of dims keeps 24 sums, 4 values and a weight. */
enum { MIX_QUERIES = 6, MIX_WIDE = 4 };
enum { PRODUCT_ROWS = 12 }; /* x 2 vectors: the same count */

#include "body_vectors.h"

#include "body_layers.h"
#include "body_matvec.h"
#include "body_product.h"
#include "body_row_softmax.h"
#include "body_scan.h"
#include "body_tile.h"

/* exp_rows of scores in base 2, for weights that are rounded to 16 bits, added in the order that suits
 * avx512_amx_tile.c: vector by vector, four lanes, then the four of them. */
static void exp2_rows_near(size_t tokens, size_t n, float *p, size_t ld, float *most, float *sum)
{
    const vf least = v_set(BYTES_LEAST);
    for (size_t i = 0; i < n; i++) most[i] = greatest(p + i * ld, tokens);
    for (size_t i = 0; i < n; i++) {
        const vf shift = v_set(most[i]);
        float *row = p + i * ld;
        vf s = v_zero();
        size_t t = 0;
        for (; t + VL <= tokens; t += VL) {
            const vf e = v_exp2_near(v_max(least, v_sub(v_load(row + t), shift)));
            v_store(row + t, e);
            s = v_add(s, e);
        }
        if (t < tokens) {
            const vf x = v_or_least(v_load_n(row + t, tokens - t), tokens - t);
            const vf e = v_exp2_near(v_max(least, v_sub(x, shift)));
            v_store_n(row + t, e, tokens - t);
            s = v_add(s, v_or_zero(e, tokens - t));
        }
        s = v_add(s, _mm512_permute_ps(s, 0xb1));
        s = v_add(s, _mm512_permute_ps(s, 0x4e));
        s = v_add(s, _mm512_shuffle_f32x4(s, s, 0x4e));
        s = v_add(s, _mm512_shuffle_f32x4(s, s, 0xb1));
        sum[i] = _mm512_cvtss_f32(s);
    }
}

/* tile_attend where int8 is multiplied as it is. */
static void tile_attend_vnni(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                             float *const *out, float *lse, void *scratch)
{
    const size_t tokens = tile->tokens;
    if (tokens == 0 || !cairn_q8_fits_vnni(tile)) {
        tile_attend(tile, nq, q, weight, out, lse, scratch);
        return;
    }
    tile_scratch s = tile_scratch_over(scratch, tokens, tile->head_dim);
    tile_stream keys, values;
    begin_streams(tile, nq, &keys, &values);
    for (size_t i = 0, n; i < nq; i += n) {
        float most[TILE_QUERIES], sum[TILE_QUERIES], factor[TILE_QUERIES];
        n = nq - i < TILE_QUERIES ? nq - i : TILE_QUERIES;
        cairn_q8_scores_vnni(tile, n, q + i, s.p, s.p_ld, &s, i == 0 ? &keys : NULL);
        exp2_rows_near(tokens, n, s.p, s.p_ld, most, sum);
        for (size_t j = 0; j < n; j++) factor[j] = weight[i + j] / sum[j];
        for (size_t j = 0; lse != NULL && j < n; j++) lse[i + j] = most[j] * BYTES_LN2 + logf(sum[j]);
        cairn_q8_mix_vnni(tile, n, s.p, s.p_ld, factor, out + i, &s, i == 0 ? &values : NULL);
    }
}

/* clang-format off */
#define TABLE(scan, sketch, attend)                                                                                            \
    {                                                                                                                  \
        .name = "avx512", .dot = dot, .dot_rows = dot_rows, .set_bits = set_bits, .axpy = axpy, .scale = scale, .max = max, .exp_shift = exp_shift,                \
        .exp_sum = exp_sum, .above = above, .widen = widen, .narrow = narrow, .rms_norm = rms_norm,                    \
        .silu_mul = silu_mul, .rotate = rotate, .matvec = matvec, .dequant = dequant, .tile_scores = tile_scores,      \
        .tile_mix = tile_mix, .tile_attend = attend, .scan_i8 = scan, .sketch_i8 = sketch, .scan_spread = scan_spread, .scan_round = scan_round, .product = product, .gemm = gemm,           \
        .transpose = transpose, .row_softmax = row_softmax, .row_softmax_backward = row_softmax_backward,          \
        .swiglu = swiglu, .swiglu_backward = swiglu_backward, .rms_norm_backward = rms_norm_backward                   \
    }
/* clang-format on */

const cairn_kernels cairn_kernels_avx512_table = TABLE(scan_i8, sketch_i8, tile_attend);
const cairn_kernels cairn_kernels_avx512_vnni_table = TABLE(cairn_scan_i8_vnni, cairn_sketch_i8_vnni, tile_attend_vnni);
