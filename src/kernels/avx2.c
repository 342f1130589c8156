/* avx2.c - the table for AVX2 with FMA and F16C: the bodies over eight lanes. Compiled with those flags; nothing here
 * runs before dispatch.c has asked the CPU. */
#include "vec256.h"

#include "twins_internal.h"

/* 16 registers: mixing 6 rows x 2 vectors of dims keeps 12 sums, 2 values and a weight, 4 x 3 one value more. */
enum { MIX_QUERIES = 6, MIX_WIDE = 2, MIX_WIDE_FOUR = 3 };
enum { PRODUCT_ROWS = 6 }; /* x 2 vectors: the same count */

#include "body_vectors.h"

#include "body_layers.h"
#include "body_matvec.h"
#include "body_product.h"
#include "body_row_softmax.h"
#include "body_scan.h"
#include "body_tile.h"

/* tile_attend, of q8 by words where its shape suits them. */
static void tile_attend_avx2(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                             float *const *out, float *lse, void *scratch)
{
    attend_by_words(tile, nq, q, weight, out, lse, scratch, cairn_q8_scores_words, cairn_q8_mix_words);
}

static void tile_attend_two(const cairn_tile *two, const float *const *q, const float *weight, float *const *out,
                            void *scratch)
{
    if (two[0].tokens != 0 && two[0].tokens == two[1].tokens && suits_bytes(&two[0])) {
        attend_two_by_words(two, q, weight, out, scratch, cairn_q8_scores_words, cairn_q8_mix_words);
        return;
    }
    for (size_t t = 0; t < 2; t++) tile_attend_avx2(&two[t], 1, q + t, weight + t, out + t, NULL, scratch);
}

const cairn_kernels cairn_kernels_avx2_table = {
    .name = "avx2",
    .dot = dot,
    .dot_rows = dot_rows,
    .set_bits = set_bits,
    .axpy = axpy,
    .scale = scale,
    .max = max,
    .exp_shift = exp_shift,
    .exp_sum = exp_sum,
    .above = above,
    .widen = widen,
    .narrow = narrow,
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .rotate = rotate,
    .matvec = matvec,
    .dequant = dequant,
    .tile_scores = tile_scores,
    .tile_mix = tile_mix,
    .tile_attend = tile_attend_avx2,
    .tile_attend_two = tile_attend_two,
    .scan_i8 = scan_i8,
    .sketch_most = SKETCH_MOST,
    .sketch_sum = SKETCH_SUM,
    .sketch_i8 = sketch_i8,
    .scan_spread = scan_spread,
    .scan_round = scan_round,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .rms_norm_backward = rms_norm_backward,
    .product = product,
    .gemm = gemm,
    .transpose = transpose,
    .row_softmax = row_softmax,
    .row_softmax_backward = row_softmax_backward,
};
