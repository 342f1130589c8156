/* avx512_amx_tile.c - attention of three queries or more to a q8 tile by AMX, for the table of dispatch.c.
 *
 * The numbers are those of avx512_vnni_tile.c, to the last bit: queries times key scales, and weights times value
 * scales, as numbers of 16 bits, two bytes each, hi and lo; sums of bytes are exact. What differs is how they lie.
 *
 * Keys are one factor as they are stored, every fourth of 64 a tile register: none is turned. The other is eight
 * columns, hi of four queries and lo of four. So the scores come with a vector holding four tokens of four queries,
 * lane 4 t + q, and stay so: the greatest, the sum and the unit of four queries take two exchanges of lanes each. For
 * the second product the weights' bytes become eight rows of 64 tokens, four that follow each other in a lane, and the
 * lanes in the order that costs least: tokens 16 j + 4 t at lane 4 t + j. Values are turned to suit it, once for all
 * queries.
 *
 * Operations of D = 32 and four queries: digits 60, scores 100, exponentials 170, weights' digits 150, turning values
 * 100, adding 50, where VNNI takes 1,700; and six products of tiles, 8 or 16 cycles each. T = 63, one core of Emerald
 * Rapids, the best of eight turns, ns for a tile in L1, by VNNI and by AMX (64 queries, us):
 *
 *      D    4 queries      64 queries
 *     32    441, 313        4.8, 4.4
 *     64    662, 431        7.4, 6.0
 *    128  1,212, 710       13.4, 9.1
 *
 * One query was slower so (300 and 379 at D = 32), two as fast: they are left to VNNI.
 *
 * From memory the pace of asking counts as much: in rounds with all of a tile's products at once the same arithmetic
 * was no faster than VNNI's, in forty even pieces it takes two thirds of its time at D = 32.
 */
#include "amx.h"
#include "tile_bytes.h"
#include "tile_internal.h"
#include "tile_stream.h"
#include "twins_internal.h"
#include "vec512.h"

#include "body_exp.h"

#include <math.h>

enum {
    FOUR = 4,     /* queries */
    FEWEST = 3,   /* queries that are worth it */
    LONGEST = 64, /* tokens: what one product of weights sums over */
    SHORTEST = 32 /* tokens */
};

/* Tile registers: the intrinsics want a digit for their assembler's text. */
#define SCORES  0
#define KEYS    1
#define QUERIES 2
#define WEIGHTS 3
#define VALUES  4
#define SUMS    5

static const amx_shapes shapes_of_32 = {
    .palette = 1, .row_bytes = {32, 32, 32, 64, 64, 64}, .rows = {16, 16, 8, 8, 16, 8}};
static const amx_shapes shapes_of_64 = {
    .palette = 1, .row_bytes = {32, 64, 32, 64, 64, 64}, .rows = {16, 16, 16, 8, 16, 8}};

/* 64 keys are read in any case: never beyond the values. */
static bool fits(const cairn_tile *tile)
{
    return suits_bytes(tile) && tile->tokens >= SHORTEST && tile->tokens <= LONGEST;
}

/* ---- what memory is asked for ---- */

/* The tile that comes next, piece by piece while this one is used: as many lines on their way at any moment as there
 * are buffers for, and none that wait for one. */
typedef struct asking {
    const char *line, *until, *end;
    size_t piece; /* bytes */
} asking;

enum { PIECES = 40 };

static asking asking_for(const cairn_tile *tile)
{
    if (tile == NULL) return (asking){0};
    const size_t scales = tile->tokens + tile->head_dim; /* as a payload has them: keys, values, scales */
    const size_t bytes = 2 * (size_t)tile->tokens * tile->head_dim + scales * sizeof(float);
    return (asking){tile->keys, tile->keys, (const char *)tile->keys + bytes, (bytes + PIECES - 1) / PIECES};
}

INLINE void ask(asking *a, size_t pieces)
{
    a->until += pieces * a->piece;
    for (; a->line < a->until; a->line += 64) _mm_prefetch(a->line, _MM_HINT_T0);
}

/* What is left, and then nothing. */
static void ask_rest(asking *a)
{
    a->until = a->end;
    ask(a, 0);
    *a = (asking){0};
}

/* ---- four queries' numbers in each 128 bits ---- */

INLINE __m512i swap_halves(__m512i x)
{
    return _mm512_shuffle_i64x2(x, x, 0x4e);
}
INLINE __m512i swap_quarters(__m512i x)
{
    return _mm512_shuffle_i64x2(x, x, 0xb1);
}

/* The greatest, of lanes 4 t + q, over t: in all four of them. As whole numbers: of floats that are not negative, and
 * what is not a number is greater still, where a maximum of floats forgets it. */
INLINE __m512i greatest_bits(__m512i x)
{
    x = _mm512_max_epi32(x, swap_halves(x));
    return _mm512_max_epi32(x, swap_quarters(x));
}
INLINE __m512 at_least_tiny(__m512i bits)
{
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_castps_si512(_mm512_set1_ps(TINY))));
}
INLINE __m512 over_tokens_max(__m512 x)
{
    x = _mm512_max_ps(x, _mm512_castsi512_ps(swap_halves(_mm512_castps_si512(x))));
    return _mm512_max_ps(x, _mm512_castsi512_ps(swap_quarters(_mm512_castps_si512(x))));
}
INLINE __m512 over_tokens_sum(__m512 x)
{
    x = _mm512_add_ps(x, _mm512_castsi512_ps(swap_halves(_mm512_castps_si512(x))));
    return _mm512_add_ps(x, _mm512_castsi512_ps(swap_quarters(_mm512_castps_si512(x))));
}

/* ---- scores ---- */

INLINE __m512 scaled(const float *q, const float *scales, size_t d)
{
    return _mm512_mul_ps(_mm512_loadu_ps(q + d), _mm512_loadu_ps(scales + d));
}

/* Four queries times the key scales, for each four dims a row of 32 bytes: hi of the first query's four dims, of the
 * others', lo of the first. Returns the unit of query q's scores, in base 2, in lanes 4 t + q. */
static __m512 query_digits(const cairn_tile *tile, const float *const *q, int8_t *to, asking *next)
{
    const size_t dim = tile->head_dim;
    const float *scales = tile->key_scales;
    __m512i most[FOUR];
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) most[i] = _mm512_setzero_si512();
    for (size_t d = 0; d < dim; d += 16)
#pragma GCC unroll 4
        for (int i = 0; i < FOUR; i++)
            most[i] = _mm512_max_epi32(most[i], _mm512_castps_si512(_mm512_abs_ps(scaled(q[i], scales, d))));
    __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(most[0], most[1]), _mm512_unpackhi_epi32(most[0], most[1]));
    __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(most[2], most[3]), _mm512_unpackhi_epi32(most[2], most[3]));
    a = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m512 largest = at_least_tiny(greatest_bits(a));
    ask(next, 4);
    const __m512i inverses = _mm512_castps_si512(_mm512_div_ps(_mm512_set1_ps(QUERY_MAX), largest));
    __m512 inverse[FOUR];
    inverse[0] = _mm512_castsi512_ps(_mm512_shuffle_epi32(inverses, 0x00));
    inverse[1] = _mm512_castsi512_ps(_mm512_shuffle_epi32(inverses, 0x55));
    inverse[2] = _mm512_castsi512_ps(_mm512_shuffle_epi32(inverses, 0xaa));
    inverse[3] = _mm512_castsi512_ps(_mm512_shuffle_epi32(inverses, 0xff));

    const __m512i bytes = _mm512_set4_epi32(0x0e0c0a08, 0x0f0d0b09, 0x06040200, 0x07050301);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (size_t d = 0; d < dim; d += 32, to += 256) {
        __m512i x[FOUR], dims[FOUR];
#pragma GCC unroll 4
        for (int i = 0; i < FOUR; i++) {
            __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(q[i], scales, d), inverse[i]));
            __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(q[i], scales, d + 16), inverse[i]));
            __m512i words = _mm512_packs_epi32(low, high);
            words = _mm512_add_epi16(words, _mm512_set1_epi16(128)); /* hi rounds to nearest: lo is signed */
            words = _mm512_xor_si512(words, _mm512_set1_epi16(128));
            x[i] = _mm512_shuffle_epi8(words, bytes);
        }
        turn_four(x, dims); /* hi of dims 4 j in lane j, lo, and both of dims 16 + 4 j */
        _mm512_store_si512(to, _mm512_permutex2var_epi64(dims[0], first, dims[1]));
        _mm512_store_si512(to + 64, _mm512_permutex2var_epi64(dims[0], second, dims[1]));
        _mm512_store_si512(to + 128, _mm512_permutex2var_epi64(dims[2], first, dims[3]));
        _mm512_store_si512(to + 192, _mm512_permutex2var_epi64(dims[2], second, dims[3]));
    }
    return v_mul(_mm512_div_ps(largest, _mm512_set1_ps(QUERY_MAX)), v_set(BYTES_LOG2E));
}

/* sums[i]: of tokens i, i + 4, ..., i + 60 eight numbers each, hi and lo of four queries. */
INLINE void multiply_keys(const size_t step, const cairn_tile *tile, const int8_t *digits, int32_t sums[FOUR][128],
                          asking *next)
{
    const size_t dim = tile->head_dim;
    const int8_t *keys = tile->keys;
    if (dim == step) _tile_loadd(QUERIES, digits, 32);
    for (size_t i = 0; i < FOUR; i++, keys += dim) {
        ask(next, 2);
        _tile_zero(SCORES);
        for (size_t d = 0; d < dim; d += step) {
            if (dim != step) _tile_loadd(QUERIES, digits + 8 * d, 32);
            _tile_loadd(KEYS, keys + d, 4 * dim);
            _tile_dpbssd(SCORES, KEYS, QUERIES);
        }
        _tile_stored(SCORES, sums[i], 32);
    }
}

/* ---- weights ---- */

/* The sums times the units, -inf where there is no token. Vector 4 j + i holds tokens 16 j + 4 t + i. */
INLINE void take_scores(size_t tokens, int32_t sums[FOUR][128], __m512 units, __m512 score[16])
{
#pragma GCC unroll 4
    for (size_t j = 0; j < FOUR; j++)
#pragma GCC unroll 4
        for (size_t i = 0; i < FOUR; i++) {
            const __m512i x = _mm512_load_si512(&sums[i][32 * j]), y = _mm512_load_si512(&sums[i][32 * j + 16]);
            const __m512i hi = _mm512_shuffle_i32x4(x, y, 0x88), lo = _mm512_shuffle_i32x4(x, y, 0xdd);
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo);
            score[4 * j + i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), units);
        }
#pragma GCC unroll 2
    for (size_t j = SHORTEST / 16; j < FOUR; j++) {
        if (tokens >= 16 * j + 16) continue;
        const uint32_t there = tokens > 16 * j ? (1u << (tokens - 16 * j)) - 1 : 0;
#pragma GCC unroll 4
        for (size_t i = 0; i < FOUR; i++) {
            const __mmask16 lanes = (__mmask16)((there >> i & 0x1111) * 15);
            score[4 * j + i] = _mm512_mask_mov_ps(v_set(-INFINITY), lanes, score[4 * j + i]);
        }
    }
}

/* 2^(score - most) in their places. Returns the sums, added as tile_attend_vnni does. */
INLINE __m512 exponentials(__m512 p[16], __m512 *most, asking *next)
{
    __m512 m[FOUR], sum[FOUR];
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) { /* v_max keeps its second operand when the first is nan */
        m[i] = v_max(p[i + 4], v_max(p[i], _mm512_set1_ps(-INFINITY)));
        m[i] = v_max(p[i + 12], v_max(p[i + 8], m[i]));
    }
    *most = over_tokens_max(v_max(v_max(m[0], m[1]), v_max(m[2], m[3])));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i % 4 == 0) ask(next, 2);
        p[i] = v_exp2_near(v_max(v_set(BYTES_LEAST), v_sub(p[i], *most)));
        sum[i % 4] = i < 4 ? p[i] : v_add(sum[i % 4], p[i]);
    }
    return over_tokens_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

/* p times the value scales as 16-bit numbers: rows of hi of each query, then of lo, 64 bytes each. Returns their unit.
 */
INLINE __m512 weight_digits(const cairn_tile *tile, __m512 p[16], uint8_t *to, asking *next)
{
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    __m512i most[FOUR];
#pragma GCC unroll 4
    for (size_t m = 0; m < FOUR; m++) {
        const size_t left = tile->tokens > 16 * m ? least_of(tile->tokens - 16 * m, 16) : 0;
        const __m512 scales = _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), tile->value_scales + 16 * m);
#pragma GCC unroll 4
        for (size_t i = 0; i < FOUR; i++) {
            const __m512i of = _mm512_add_epi32(each, _mm512_set1_epi32((int)i));
            __m512 *x = &p[4 * m + i];
            *x = v_mul(*x, _mm512_permutexvar_ps(of, scales));
            most[i] = m == 0 ? _mm512_castps_si512(*x) : _mm512_max_epi32(most[i], _mm512_castps_si512(*x));
        }
    }
    const __m512 largest = at_least_tiny(
        greatest_bits(_mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]))));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(WEIGHT_MAX), largest);
    const __m512i bytes = _mm512_set4_epi32(0x0e060c04, 0x0a020800, 0x0f070d05, 0x0b030901);
    __m512i hi[FOUR], lo[FOUR], rows[FOUR];
#pragma GCC unroll 4
    for (int m = 0; m < FOUR; m++) {
        __m512i w[FOUR];
        ask(next, 1);
#pragma GCC unroll 4
        for (int i = 0; i < FOUR; i++) w[i] = _mm512_cvtps_epi32(v_mul(p[4 * m + i], inverse));
        const __m512i x = _mm512_shuffle_epi8(_mm512_packus_epi32(w[0], w[1]), bytes); /* hi of each query's pair, lo */
        const __m512i y = _mm512_shuffle_epi8(_mm512_packus_epi32(w[2], w[3]), bytes);
        hi[m] = _mm512_unpacklo_epi16(x, y), lo[m] = _mm512_unpackhi_epi16(x, y);
    }
    turn_four(hi, rows);
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) _mm512_store_si512(to + 64 * i, rows[i]);
    turn_four(lo, rows);
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) _mm512_store_si512(to + 256 + 64 * i, rows[i]);
    return _mm512_div_ps(largest, _mm512_set1_ps(WEIGHT_MAX));
}

/* ---- mix ---- */

INLINE __m512i two_rows(const int8_t *a, const int8_t *b)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i_u *)a)),
                              _mm256_loadu_si256((const __m256i_u *)b), 1);
}

/* Four values, 32 dims of each: x the first two, y the others. Dim by dim into a row of a tile, dims 16 .. 31 into one
 * of the next tile. */
INLINE void turn_four_values(__m512i x, __m512i y, int8_t *row)
{
    const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
    const __m512i bytes = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    _mm512_store_si512(row, _mm512_shuffle_epi8(_mm512_permutex2var_epi32(x, first, y), bytes));
    _mm512_store_si512(row + 1024, _mm512_shuffle_epi8(_mm512_permutex2var_epi32(x, second, y), bytes));
}

/* Values, for each 16 dims a tile of 16 rows: tokens 16 j + 4 t and the three after them in row 4 t + j. What is there
 * for tokens the tile does not have is multiplied by 0. */
static void turn_values(const cairn_tile *tile, int8_t *to, asking *next)
{
    const size_t dim = tile->head_dim, tokens = tile->tokens;
    const int8_t *a = tile->values, *last = a + (tokens - 1) * dim;
    for (size_t t = 0; t < tokens; t += 16, to += 64)
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++, a += 4 * dim) {
            const size_t left = tokens > t + 4 * i ? tokens - t - 4 * i : 0;
            int8_t *row = to + 256 * i;
            if (i % 2 == 0) ask(next, 1);
            if (dim == 32 && left >= 4) {
                turn_four_values(_mm512_loadu_si512(a), _mm512_loadu_si512(a + 64), row);
                continue;
            }
            if (left == 0) break;
            const int8_t *b = left > 1 ? a + dim : last, *c = left > 2 ? a + 2 * dim : last;
            const int8_t *e = left > 3 ? a + 3 * dim : last;
            for (size_t d = 0; d < dim; d += 32, row += 2048)
                turn_four_values(two_rows(a + d, b + d), two_rows(c + d, e + d), row);
        }
}

/* out[i] += unit[i] times the products of the weights in their tile with the turned values, n queries of four. */
INLINE void mix(size_t dim, const int8_t *turned, const float *unit, size_t n, float *const *out, asking *next)
{
    _Alignas(64) int32_t sums[2][8][16];
    for (size_t d = 0; d < dim; d += 32, turned += 2048) {
        ask(next, 256 / dim);
        _tile_zero(SUMS);
        _tile_loadd(VALUES, turned, 64);
        _tile_dpbusd(SUMS, WEIGHTS, VALUES);
        _tile_stored(SUMS, sums[0], 64);
        _tile_zero(SUMS);
        _tile_loadd(VALUES, turned + 1024, 64);
        _tile_dpbusd(SUMS, WEIGHTS, VALUES);
        _tile_stored(SUMS, sums[1], 64);
        for (size_t i = 0; i < n; i++)
#pragma GCC unroll 2
            for (size_t v = 0; v < 2; v++) {
                float *to = out[i] + d + 16 * v;
                const __m512 hi = _mm512_cvtepi32_ps(_mm512_load_si512(sums[v][i]));
                const __m512 lo = _mm512_cvtepi32_ps(_mm512_load_si512(sums[v][FOUR + i]));
                const __m512 sum = _mm512_fmadd_ps(hi, _mm512_set1_ps(256), lo);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(unit[i]), _mm512_loadu_ps(to)));
            }
    }
}

/* ---- the table's function ---- */

/* Loading the shapes takes 80 ns: once for tiles that follow each other. */
static bool take_registers(const cairn_tile *tile)
{
    const amx_shapes *wanted = tile->head_dim % 64 == 0 ? &shapes_of_64 : &shapes_of_32;
    if (tile->coming && cairn_amx_shapes == wanted) return true;
    if (!cairn_amx_allowed()) return false;
    _tile_loadconfig(wanted);
    cairn_amx_shapes = wanted;
    return true;
}

/* A run's end: a thread that holds them is slower to switch. */
static void give_back_registers(const cairn_tile *tile)
{
    if (tile->next != NULL || cairn_amx_shapes == NULL) return;
    _tile_release();
    cairn_amx_shapes = NULL;
}

void cairn_tile_attend_amx(const cairn_tile *tile, size_t nq, const float *const *q, const float *weight,
                           float *const *out, float *lse, void *scratch)
{
    if (nq < FEWEST || !fits(tile) || !take_registers(tile)) {
        cairn_kernels_avx512_vnni_table.tile_attend(tile, nq, q, weight, out, lse, scratch);
        give_back_registers(tile);
        return;
    }
    const size_t tokens = tile->tokens, dim = tile->head_dim;
    _Alignas(64) int32_t sums[FOUR][128];
    _Alignas(64) uint8_t weights[2 * FOUR * LONGEST];
    _Alignas(64) float unit[16];
    tile_scratch s = tile_scratch_over(scratch, tokens, dim);
    int8_t *turned = (int8_t *)(void *)s.rows, *digits = (int8_t *)(void *)s.queries;
    asking own = asking_for(tile->coming ? NULL : tile), next = asking_for(tile->next);
    touch_later(tile);
    ask_rest(&own);
    for (size_t first = 0; first < nq; first += FOUR) {
        const size_t n = least_of(nq - first, FOUR);
        const float *four[FOUR];
        _Alignas(16) float weigh[FOUR];
        for (size_t i = 0; i < FOUR; i++) {
            const size_t of = first + least_of(i, n - 1);
            four[i] = q[of], weigh[i] = weight[of];
        }
        const __m512 units = query_digits(tile, four, digits, &next);
        WRITTEN();
        if (dim % 64 == 0)
            multiply_keys(64, tile, digits, sums, &next);
        else
            multiply_keys(32, tile, digits, sums, &next);
        if (first == 0) turn_values(tile, turned, &next);

        __m512 p[16], most;
        take_scores(tokens, sums, units, p);
        const __m512 sum = exponentials(p, &most, &next);
        const __m512 factor = _mm512_div_ps(_mm512_broadcast_f32x4(_mm_load_ps(weigh)), sum);
        _mm512_store_ps(unit, v_mul(weight_digits(tile, p, weights, &next), factor));
        WRITTEN();
        _tile_loadd(WEIGHTS, weights, 64);
        mix(dim, turned, unit, n, out + first, &next);
        ask_rest(&next);
        if (lse != NULL) {
            _Alignas(64) float m[16], total[16];
            _mm512_store_ps(m, most);
            _mm512_store_ps(total, sum);
            for (size_t i = 0; i < n; i++) lse[first + i] = m[i] * BYTES_LN2 + logf(total[i]);
        }
    }
    give_back_registers(tile);
}
