/* avx512.c - the table for AVX-512 F, BW, DQ, VL: the bodies over sixteen lanes. Compiled with those flags; nothing
 * here runs before dispatch.c has asked the CPU. */
#include "vec512.h"

#include "twins_internal.h"

/* 32 registers: mixing 6 rows x 4 vectors of dims keeps 24 sums, 4 values and a weight. */
enum { MIX_QUERIES = 6, MIX_WIDE = 4, MIX_WIDE_FOUR = 4 };
enum { PRODUCT_ROWS = 12 }; /* x 2 vectors: the same count */

#include "body_vectors.h"

#include "body_layers.h"
#include "body_matvec.h"
#include "body_product.h"
#include "body_row_softmax.h"
#include "body_scan.h"
#include "body_tile.h"

/* tile_attend where int8 is multiplied as it is. */
static void tile_attend_vnni(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                             float *const *out, float *lse, void *scratch)
{
    attend_by_words(tile, nq, q, weight, out, lse, scratch, cairn_q8_scores_vnni, cairn_q8_mix_vnni);
}

/* clang-format off */
#define TABLE(scan, sketch, most, sum, attend)                                                                                          \
    {                                                                                                                  \
        .name = "avx512", .dot = dot, .dot_rows = dot_rows, .set_bits = set_bits, .axpy = axpy, .scale = scale, .max = max, .exp_shift = exp_shift,                \
        .exp_sum = exp_sum, .above = above, .widen = widen, .narrow = narrow, .rms_norm = rms_norm,                    \
        .silu_mul = silu_mul, .rotate = rotate, .matvec = matvec, .dequant = dequant, .tile_scores = tile_scores,      \
        .tile_mix = tile_mix, .tile_attend = attend, .scan_i8 = scan, .sketch_i8 = sketch, .sketch_most = most, .sketch_sum = sum, .scan_spread = scan_spread, .scan_round = scan_round, .product = product, .gemm = gemm,           \
        .transpose = transpose, .row_softmax = row_softmax, .row_softmax_backward = row_softmax_backward,          \
        .swiglu = swiglu, .swiglu_backward = swiglu_backward, .rms_norm_backward = rms_norm_backward                   \
    }
/* clang-format on */

const cairn_kernels cairn_kernels_avx512_table = TABLE(scan_i8, sketch_i8, SKETCH_MOST, SKETCH_SUM, tile_attend);
const cairn_kernels cairn_kernels_avx512_vnni_table =
    TABLE(cairn_scan_i8_vnni, cairn_sketch_i8_vnni, 127, CAIRN_SKETCH_ANY_SUM, tile_attend_vnni);
