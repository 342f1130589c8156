/* body_row_softmax.h - softmax over the rows of a tile of scores, forward and backward, over vec512.h or vec256.h;
 * included after body_vectors.h.
 *
 * A sum over the lanes, a division and what waits for them take longer than the arithmetic of a row of 64. So rows go
 * through each phase in groups: their maxima, their exp and sums, their products. AVX2, one Zen 4 core, 64 rows of
 * 63: 2.5 us instead of 3.3 row by row in registers; the way back 0.9 instead of 1.3 with masked stores. */

enum { ROW_GROUP = 8 };

/* A row as its phases see it: `whole` numbers in whole vectors, then `rest`. The vector of the rest may reach beyond
 * the row: what lies there is left as it is, but for numbers a causal mask makes 0. */
typedef struct tile_row {
    size_t whole, rest;
    size_t zeros; /* behind the rest, that become 0 */
    bool inside;  /* the vector of the rest lies within what becomes 0, or where later rows or gaps are */
} tile_row;

INLINE tile_row row_of(size_t r, size_t rows, size_t ld, size_t n, bool causal)
{
    tile_row row;
    const size_t sees = causal && r + 1 < n ? r + 1 : n;
    row.rest = sees % VL;
    row.whole = sees - row.rest;
    row.zeros = n - sees;
    row.inside = row.whole + VL <= n || (r + 1 < rows && row.whole + VL <= ld);
    return row;
}

INLINE vf load_rest(const float *x, tile_row row)
{
    return row.inside ? v_load(x + row.whole) : v_load_n(x + row.whole, row.rest);
}
/* Masked stores take a dozen cycles on AMD: a whole vector, with what was there behind the row. */
INLINE void store_rest(float *x, tile_row row, vf rest)
{
    if (!row.inside)
        v_store_n(x + row.whole, rest, row.rest);
    else
        v_store(x + row.whole, v_then(rest, v_load(x + row.whole), row.rest));
}

static void row_softmax(float *x, size_t ld, size_t rows, size_t n, bool causal, const float *weights, float *lse)
{
    for (size_t first = 0; first < rows; first += ROW_GROUP, x += ROW_GROUP * ld) {
        const size_t group = rows - first < ROW_GROUP ? rows - first : ROW_GROUP;
        float shift[ROW_GROUP], sum[ROW_GROUP];
        vf rest[ROW_GROUP];
        for (size_t g = 0; g < group; g++) {
            const tile_row row = row_of(first + g, rows, ld, n, causal);
            const float *at = x + g * ld;
            vf most = v_set(-INFINITY);
            for (size_t i = 0; i < row.whole; i += VL) most = v_max(v_load(at + i), most);
            if (row.rest > 0) most = v_max(v_or_least(load_rest(at, row), row.rest), most);
            shift[g] = v_greatest(most);
        }
        for (size_t g = 0; g < group; g++) {
            const tile_row row = row_of(first + g, rows, ld, n, causal);
            float *at = x + g * ld;
            const vf s = v_set(shift[g]);
            vf all = v_zero();
            for (size_t i = 0; i < row.whole; i += VL) {
                const vf e = v_exp_down(v_sub(v_load(at + i), s));
                v_store(at + i, e);
                all = v_add(all, e);
            }
            rest[g] = v_zero();
            if (row.rest > 0) rest[g] = v_or_zero(v_exp_down(v_sub(load_rest(at, row), s)), row.rest);
            sum[g] = v_sum(v_add(all, rest[g]));
        }
        for (size_t g = 0; g < group; g++) {
            const tile_row row = row_of(first + g, rows, ld, n, causal);
            float *at = x + g * ld;
            const vf factor = v_set((weights != NULL ? weights[first + g] : 1) / sum[g]);
            for (size_t i = 0; i < row.whole; i += VL) v_store(at + i, v_mul(v_load(at + i), factor));
            if (row.rest > 0) store_rest(at, row, v_mul(rest[g], factor));
            if (row.zeros > 0) memset(at + row.whole + row.rest, 0, row.zeros * sizeof *at);
            if (lse != NULL) lse[first + g] = sum[g] > 0 ? shift[g] + logf(sum[g]) : -INFINITY;
        }
    }
}

static void row_softmax_backward(float *p, float *u, size_t ld, size_t rows, size_t n, bool causal,
                                 const float *weights, float *means, bool known)
{
    for (size_t first = 0; first < rows; first += ROW_GROUP, p += ROW_GROUP * ld, u += ROW_GROUP * ld) {
        const size_t group = rows - first < ROW_GROUP ? rows - first : ROW_GROUP;
        for (size_t g = 0; g < group && !known; g++) {
            const tile_row row = row_of(first + g, rows, ld, n, causal);
            means[first + g] = dot(p + g * ld, u + g * ld, row.whole + row.rest);
        }
        for (size_t g = 0; g < group; g++) {
            const tile_row row = row_of(first + g, rows, ld, n, causal);
            float *to_p = p + g * ld, *to_u = u + g * ld;
            const vf weight = v_set(weights[first + g]), mean = v_set(means[first + g]);
            for (size_t i = 0; i < row.whole; i += VL) {
                const vf w = v_mul(weight, v_load(to_p + i));
                v_store(to_p + i, w);
                v_store(to_u + i, v_mul(w, v_sub(v_load(to_u + i), mean)));
            }
            if (row.rest > 0) {
                const vf w = v_mul(weight, load_rest(to_p, row)), d = v_mul(w, v_sub(load_rest(to_u, row), mean));
                store_rest(to_p, row, w);
                store_rest(to_u, row, d);
            }
            if (row.zeros > 0) memset(to_u + row.whole + row.rest, 0, row.zeros * sizeof *u);
        }
    }
}
