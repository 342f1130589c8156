/* twins_internal.h - the tables behind the getters of dispatch.c; touch one only after its CPU check. */
#ifndef CAIRN_KERNELS_TWINS_INTERNAL_H
#define CAIRN_KERNELS_TWINS_INTERNAL_H

#include "kernels_internal.h"

struct tile_scratch;
struct tile_stream;

extern const cairn_kernels cairn_kernels_avx2_table;
extern const cairn_kernels cairn_kernels_avx512_table;
extern const cairn_kernels cairn_kernels_avx512_vnni_table; /* the same but for the scan and attention to q8: */
void cairn_scan_i8_vnni(const int8_t *rows, const float *row_scale, const int32_t *row_sum, size_t group, size_t groups,
                        size_t dim, const int8_t *q, const float *q_scale, size_t nq, float *scores, float *less,
                        size_t ld, const float *bars, uint16_t *over);
void cairn_sketch_i8_vnni(const int8_t *rows, size_t block, size_t blocks, size_t dim, const int8_t *q,
                          const int32_t *least, size_t nq, uint64_t *over);

/* Scores times log2 e of at most 64 queries to a q8 tile, each times the key scales rounded to 2^-16 of its largest
 * number, in rows of whole vectors (scratch->p). ahead: what to ask for meanwhile, or NULL. */
typedef void cairn_q8_scores(const cairn_tile *tile, size_t nq, const float *const *q, float *scores, size_t ld,
                             const struct tile_scratch *scratch, const struct tile_stream *ahead);
/* out[i] += factor[i] * sum_t p[i * ld + t] * value t, p at least 0 and, times the value scales, rounded likewise; p is
 * used up. */
typedef void cairn_q8_mix(const cairn_tile *tile, size_t nq, float *p, size_t ld, const float *factor,
                          float *const *out, const struct tile_scratch *scratch, const struct tile_stream *ahead);

/* By VNNI, and by AVX2's products of words, of a tile that suits_bytes (tile_bytes.h): D a multiple of 32 up to 512. */
cairn_q8_scores cairn_q8_scores_vnni, cairn_q8_scores_words;
cairn_q8_mix cairn_q8_mix_vnni, cairn_q8_mix_words;

/* tile_attend of cairn_kernels_amx: q8, D a multiple of 32 up to 512, 16 to 64 tokens; of others the VNNI table's. */
void cairn_tile_attend_amx(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                           float *const *out, float *lse, void *scratch);

/* product and gemm of the bf16 table */
void cairn_product_amx(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t ldb,
                       float *c, size_t ldc, bool add);
void cairn_gemm_amx(size_t m, size_t n, size_t k, const float *a, size_t row, size_t col, const float *b, size_t brow,
                    size_t bcol, float *c, size_t ldc, bool add, float *scratch);

/* What a CPU without VNNI would get, for tests; NULL like cairn_kernels_avx512. */
const cairn_kernels *cairn_kernels_avx512_without_vnni(void);

#endif
