/* body_scan.h - the int8 scan without dot-product instructions, over vec512.h or vec256.h: bytes become int16 pairs,
 * whose products add up in int32 lanes without saturation (vpmaddubsw would saturate).
 *
 * A group of 16 rows is dim * 16 bytes; per 64 of them (four dims of each row) and query: 2 broadcasts, 2 * NV madd and
 * 2 * NV additions, with NV vectors to 64 bytes. SCAN_QUERIES queries share the unpacking of the row bytes.
 * AVX2, one Zen 4 core, dim 128, from L3: 1 query 52 GB/s, 4 or 64 queries 142 Gop/s. */

enum { NV = 16 / VL };
enum {
    SCAN_QUERIES = 8 / NV, /* 8 sums stay in registers beside the two halves of the row bytes */
    SCAN_DIM_MAX = 1024,
    SCAN_AHEAD_BYTES = 4096
};

/* Four dims of 16 rows (64 bytes) times those of the queries, onto their sums. */
INLINE void scan_quad(const int NQ, const int8_t *at, size_t j, const int32_t (*even)[SCAN_DIM_MAX / 4],
                      const int32_t (*odd)[SCAN_DIM_MAX / 4], vi *sum)
{
#pragma GCC unroll 2
    for (int h = 0; h < NV; h++) {
        vi x = vi_load(at + h * VL * 4), x_even = vi_even_bytes(x), x_odd = vi_odd_bytes(x);
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) {
            vi s = vi_madd(x_even, vi_set(even[i][j]), sum[i * NV + h]);
            sum[i * NV + h] = vi_madd(x_odd, vi_set(odd[i][j]), s);
        }
    }
}

INLINE void scan_store(const int NQ, const vi *sum, const float *row_scale, const float *q_scale, float *scores,
                       size_t ld)
{
#pragma GCC unroll 8
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 2
        for (int h = 0; h < NV; h++) {
            vf scaled = v_mul(vi_to_f32(sum[i * NV + h]), v_load(row_scale + h * VL));
            v_store(scores + (size_t)i * ld + h * VL, v_mul(scaled, v_set(q_scale[i])));
        }
}

INLINE void scan_queries(const int NQ, const int8_t *rows, const float *row_scale, size_t groups, size_t dim,
                         const int32_t (*even)[SCAN_DIM_MAX / 4], const int32_t (*odd)[SCAN_DIM_MAX / 4],
                         const float *q_scale, float *scores, float *less, size_t ld, const float *bars, uint16_t *over)
{
    const size_t last = dim / 4 - 1;
    for (size_t g = 0; g < groups; g++, rows += 16 * dim, row_scale += 16) {
        vi sum[SCAN_QUERIES * NV];
#pragma GCC unroll 16
        for (int i = 0; i < NQ * NV; i++) sum[i] = vi_zero();
        for (size_t j = 0; j < last; j++) {
            _mm_prefetch((const char *)rows + j * 64 + SCAN_AHEAD_BYTES, _MM_HINT_T0);
            scan_quad(NQ, rows + j * 64, j, even, odd, sum);
        }
        _mm_prefetch((const char *)rows + last * 64 + SCAN_AHEAD_BYTES, _MM_HINT_T0);
        if (less != NULL) scan_store(NQ, sum, row_scale, q_scale, less + g * 16, ld);
        scan_quad(NQ, rows + last * 64, last, even, odd, sum);
        scan_store(NQ, sum, row_scale, q_scale, scores + g * 16, ld);
        if (over == NULL) continue;
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) {
            uint32_t mask = 0;
#pragma GCC unroll 2
            for (int h = 0; h < NV; h++)
                mask |= (uint32_t)v_at_least(v_load(scores + (size_t)i * ld + g * 16 + h * VL), v_set(bars[i]))
                        << h * VL;
            over[(size_t)i * groups + g] = (uint16_t)mask;
        }
    }
}

/* Bytes a and b as the two int16 of a lane */
INLINE int32_t scan_pair(int8_t a, int8_t b)
{
    return (int32_t)((uint32_t)(uint16_t)a | (uint32_t)(uint16_t)b << 16);
}

static void scan_pairs(const int8_t *q, size_t dim, size_t n, int32_t (*even)[SCAN_DIM_MAX / 4],
                       int32_t (*odd)[SCAN_DIM_MAX / 4])
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < dim / 4; j++) {
            const int8_t *at = q + i * dim + 4 * j;
            even[i][j] = scan_pair(at[0], at[2]);
            odd[i][j] = scan_pair(at[1], at[3]);
        }
}

static void scan_i8(const int8_t *rows, const float *row_scale, const int32_t *row_sum, size_t group, size_t groups,
                    size_t dim, const int8_t *q, const float *q_scale, size_t nq, float *scores, float *less, size_t ld,
                    const float *bars, uint16_t *over)
{
    (void)row_sum;
    assert(dim % 4 == 0 && dim <= SCAN_DIM_MAX);
    int32_t even[SCAN_QUERIES][SCAN_DIM_MAX / 4], odd[SCAN_QUERIES][SCAN_DIM_MAX / 4];
    rows += group * 16 * dim;
    row_scale += group * 16;
    for (size_t first = 0, some; first < nq; first += some) {
        size_t left = nq - first;
        some = left >= SCAN_QUERIES ? SCAN_QUERIES : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        scan_pairs(q + first * dim, dim, some, even, odd);
        const float *scales = q_scale + first;
        float *to = scores + first * ld, *less_to = less != NULL ? less + first * ld : NULL;
        const float *bar = over != NULL ? bars + first : NULL;
        uint16_t *over_to = over != NULL ? over + first * groups : NULL;
        if (some == SCAN_QUERIES)
            scan_queries(SCAN_QUERIES, rows, row_scale, groups, dim, even, odd, scales, to, less_to, ld, bar, over_to);
        else if (some == 4)
            scan_queries(4, rows, row_scale, groups, dim, even, odd, scales, to, less_to, ld, bar, over_to);
        else if (some == 2)
            scan_queries(2, rows, row_scale, groups, dim, even, odd, scales, to, less_to, ld, bar, over_to);
        else
            scan_queries(1, rows, row_scale, groups, dim, even, odd, scales, to, less_to, ld, bar, over_to);
    }
}

/* ---- sketches: a bit a row ---- */

/* Sums start at minus what they must reach, so that the sign is the answer. Two products of a row's byte made unsigned,
 * 255 at most, and a number of a query, SKETCH_MOST at most, fit into int16. So do sums of them, whatever overflows on
 * the way, if half the sum by signed bytes does, which is 128 times SKETCH_SUM at most: one operation and two for each
 * query go to 32 bytes. One query alone, which waits for memory, takes three, by sums of 32 bits: 3.6 MB in L3 0.056 ms
 * by those, 0.058 by the others; four queries 0.228 by those, 0.175 by the others (24 dims, one Zen 4 core). Nothing is
 * asked for ahead: 0.073 ms instead of 0.058 with it, of 36 MB in DRAM 1.6 instead of 1.4. */
enum { SKETCH_QUERIES = 4 / NV, SKETCH_MOST = 64, SKETCH_SUM = 255 };

typedef struct sketch_start {
    int32_t alone;         /* where a sum of 32 bits begins, */
    int32_t halves, least; /* its two halves of 16 bits, and what is added to them at last */
} sketch_start;

static sketch_start sketch_start_of(const int8_t *q, size_t dim, int32_t least)
{
    int32_t sum[2] = {0};
    for (size_t j = 0; j < dim; j++) sum[j / 2 % 2] += q[j];
    const uint32_t low = (uint16_t)(-128 * sum[0]), high = (uint16_t)(-128 * sum[1]);
    return (sketch_start){-128 * (sum[0] + sum[1]) - least, (int32_t)(high << 16 | low), -least};
}

INLINE vi sketch_four(const int8_t *q) /* the next four numbers of a query, everywhere */
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return vi_set(four);
}

INLINE uint64_t sketch_bits(const vi sum[4]) /* a bit for each row of four vectors */
{
    return vi_packed_not_negative(vi_pack32(sum[0], sum[1]), vi_pack32(sum[2], sum[3]));
}

/* One query: rows in the order in which they lie. */
INLINE void sketch_alone(const int8_t *rows, size_t blocks, const size_t dim, const int8_t *q,
                         const sketch_start *start, uint64_t *over)
{
    for (size_t g = 0; g < blocks; g++) {
        vi half[2][NV];
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            vi sum[2][NV];
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++, rows += 16 * dim) {
#pragma GCC unroll 2
                for (int h = 0; h < NV; h++) sum[v][h] = vi_set(start->alone);
#pragma GCC unroll 8
                for (size_t j = 0; j < dim; j += 4) {
                    vi x[NV];
#pragma GCC unroll 2
                    for (int h = 0; h < NV; h++) x[h] = vi_unsigned_bytes(vi_load(rows + j * 16 + h * VL * 4));
#pragma GCC unroll 2
                    for (int h = 0; h < NV; h++) sum[v][h] = vi_madd_bytes(x[h], sketch_four(q + j), sum[v][h]);
                }
            }
#pragma GCC unroll 2
            for (int h = 0; h < NV; h++) half[p][h] = vi_pack32(sum[0][h], sum[1][h]);
        }
        uint64_t mask = 0;
#pragma GCC unroll 2
        for (int h = 0; h < NV; h++) mask |= vi_packed_not_negative(half[0][h], half[1][h]) << h * 32;
        over[g] = mask;
    }
}

/* A few: of each 16 rows one vector at a time, so that the registers have room for eight sums. */
INLINE void sketch_few(const int NQ, const int8_t *rows, size_t blocks, const size_t dim, const int8_t *q,
                       const sketch_start *start, uint64_t *over)
{
    for (size_t g = 0; g < blocks; g++, rows += 64 * dim) {
        uint64_t mask[SKETCH_QUERIES] = {0};
#pragma GCC unroll 1
        for (size_t h = 0; h < NV; h++) {
            vi sum[SKETCH_QUERIES][4];
#pragma GCC unroll 16
            for (int i = 0; i < 4 * NQ; i++) sum[i / 4][i % 4] = vi_set(start[i / 4].halves);
#pragma GCC unroll 8
            for (size_t j = 0; j < dim; j += 4) {
                vi by[SKETCH_QUERIES];
#pragma GCC unroll 4
                for (int i = 0; i < NQ; i++) by[i] = sketch_four(q + (size_t)i * dim + j);
#pragma GCC unroll 4
                for (size_t v = 0; v < 4; v++) {
                    const vi x = vi_unsigned_bytes(vi_load(rows + v * 16 * dim + j * 16 + h * VL * 4));
#pragma GCC unroll 4
                    for (int i = 0; i < NQ; i++) sum[i][v] = vi_add_products(x, by[i], sum[i][v]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < NQ; i++) {
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) sum[i][v] = vi_add_halves(sum[i][v], vi_set(start[i].least));
                mask[i] |= sketch_bits(sum[i]) << h * 32;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < NQ; i++) over[(size_t)i * blocks + g] = mask[i];
    }
}

INLINE void sketch_queries(const int NQ, const int8_t *rows, size_t blocks, const size_t dim, const int8_t *q,
                           const sketch_start *start, uint64_t *over)
{
    if (NQ == 1)
        sketch_alone(rows, blocks, dim, q, start, over);
    else
        sketch_few(NQ, rows, blocks, dim, q, start, over);
}

/* The usual widths without a loop over dims. */
INLINE void sketch_widths(const int NQ, const int8_t *rows, size_t blocks, size_t dim, const int8_t *q,
                          const sketch_start *start, uint64_t *over)
{
    switch (dim) {
    case 8: sketch_queries(NQ, rows, blocks, 8, q, start, over); break;
    case 12: sketch_queries(NQ, rows, blocks, 12, q, start, over); break;
    case 16: sketch_queries(NQ, rows, blocks, 16, q, start, over); break;
    case 24: sketch_queries(NQ, rows, blocks, 24, q, start, over); break;
    default: sketch_queries(NQ, rows, blocks, dim, q, start, over);
    }
}

static void sketch_i8(const int8_t *rows, size_t block, size_t blocks, size_t dim, const int8_t *q,
                      const int32_t *least, size_t nq, uint64_t *over)
{
    assert(dim % 4 == 0 && dim <= SCAN_DIM_MAX);
    rows += block * 64 * dim;
    for (size_t first = 0, some; first < nq; first += some) {
        size_t left = nq - first;
        some = left >= SKETCH_QUERIES ? SKETCH_QUERIES : left >= 2 ? 2 : 1;
        const int8_t *at = q + first * dim;
        sketch_start start[SKETCH_QUERIES];
        for (size_t i = 0; i < some; i++) start[i] = sketch_start_of(at + i * dim, dim, least[first + i]);
        uint64_t *to = over + first * blocks;
        if (some == SKETCH_QUERIES)
            sketch_widths(SKETCH_QUERIES, rows, blocks, dim, at, start, to);
        else if (some == 2)
            sketch_widths(2, rows, blocks, dim, at, start, to);
        else
            sketch_widths(1, rows, blocks, dim, at, start, to);
    }
}

/* ---- rows into images ---- */

INLINE vf scan_from(const float *x, const float *center, size_t left)
{
    return left >= VL ? v_sub(v_load(x), v_load(center)) : v_sub(v_load_n(x, left), v_load_n(center, left));
}

static float scan_spread(const float *x, const float *center, size_t n)
{
    vf most = v_zero();
    for (size_t i = 0; i < n; i += VL) {
        vf d = scan_from(x + i, center + i, n - i);
        most = v_max(most, v_max(d, v_sub(v_zero(), d)));
    }
    return v_greatest(most);
}

static void scan_round(const float *x, const float *center, size_t n, float scale, int8_t *values,
                       cairn_scan_rounded *out)
{
    vf sum = v_zero(), squares = v_zero(), left = v_zero();
    for (size_t i = 0; i < n; i += VL) {
        vf d = scan_from(x + i, center + i, n - i);
        vf v = v_max(v_min(v_round(v_div(d, v_set(scale))), v_set(127)), v_set(-127));
        vf miss = v_fnma(v_set(scale), v, d);
        sum = v_add(sum, v);
        squares = v_fma(v, v, squares);
        left = v_fma(miss, miss, left);
        v_store_i8(values + i, v);
    }
    *out = (cairn_scan_rounded){(int32_t)v_sum(sum), v_sum(squares), v_sum(left)};
}
