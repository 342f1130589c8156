/* body_softmax.h - softmax over the rows of a tile of scores, forward and backward, over vec512.h or vec256.h; included
 * after body_vectors.h. A row of up to 64 numbers, the block of the models we train, stays in registers. */

enum { ROW_VECTORS = 64 / VL };

/* v_exp for x <= 0, where a result needs to be no smaller than e^-86 = 4.5e-38: no subnormals, so one step scales. */
INLINE vf v_exp_down(vf x)
{
    x = v_max(v_set(-86.0f), x); /* a nan passes through */
    vf n = v_round(v_mul(x, v_set(0x1.715476p+0f)));
    vf r = v_fnma(n, v_set(0x1.62e430p-1f), x);
    r = v_fnma(n, v_set(-0x1.05c610p-29f), r);
    vf q = v_set(0x1.6a2402p-10f);
    q = v_fma(q, r, v_set(0x1.123a00p-7f));
    q = v_fma(q, r, v_set(0x1.5558f2p-5f));
    q = v_fma(q, r, v_set(0x1.555492p-3f));
    q = v_fma(q, r, v_set(0x1.fffffcp-2f));
    vf p = v_add(v_fma(v_mul(r, r), q, r), v_set(1.0f));
    return v_ldexp_normal(p, n);
}

/* Of the last vector of a row of n = (ROW_VECTORS - 1) VL + last numbers, `last` lanes are there. */
INLINE float softmax_registers(float *x, size_t last, float weight, float *sum_out)
{
    vf e[ROW_VECTORS], most = v_set(-INFINITY), sum = v_zero();
    enum { LAST = ROW_VECTORS - 1 };
#pragma GCC unroll 8
    for (int i = 0; i < LAST; i++) e[i] = v_load(x + i * VL);
    e[LAST] = v_or_least(v_load_n(x + LAST * VL, last), last);
#pragma GCC unroll 8
    for (int i = 0; i < ROW_VECTORS; i++) most = v_max(e[i], most);
    const float shift = v_greatest(most);
    const vf s = v_set(shift);
#pragma GCC unroll 8
    for (int i = 0; i < ROW_VECTORS; i++) {
        e[i] = v_exp_down(v_sub(e[i], s));
        if (i == LAST) e[i] = v_or_zero(e[i], last);
        sum = v_add(sum, e[i]);
    }
    *sum_out = v_sum(sum);
    const vf factor = v_set(weight / *sum_out);
#pragma GCC unroll 8
    for (int i = 0; i < LAST; i++) v_store(x + i * VL, v_mul(e[i], factor));
    v_store_n(x + LAST * VL, v_mul(e[LAST], factor), last);
    return shift;
}

INLINE float softmax_memory(float *x, size_t n, float weight, float *sum_out)
{
    const float shift = greatest(x, n);
    const vf s = v_set(shift);
    vf sum = v_zero();
    for (size_t i = 0; i < n; i += VL) {
        const size_t some = n - i < VL ? n - i : VL;
        const vf e = v_or_zero(v_exp_down(v_sub(v_load_n(x + i, some), s)), some);
        v_store_n(x + i, e, some);
        sum = v_add(sum, e);
    }
    *sum_out = v_sum(sum);
    scale(x, weight / *sum_out, n);
    return shift;
}

static void row_softmax(float *x, size_t ld, size_t rows, size_t n, bool causal, const float *weights, float *lse)
{
    for (size_t r = 0; r < rows; r++, x += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n, registers = (ROW_VECTORS - 1) * VL;
        const float weight = weights != NULL ? weights[r] : 1;
        float shift = -INFINITY, sum = 0;
        if (sees > registers && sees <= registers + VL)
            shift = softmax_registers(x, sees - registers, weight, &sum);
        else if (sees > 0)
            shift = softmax_memory(x, sees, weight, &sum);
        if (lse != NULL) lse[r] = sum > 0 ? shift + logf(sum) : -INFINITY;
        if (sees < n) memset(x + sees, 0, (n - sees) * sizeof *x);
    }
}

static void row_softmax_backward(float *p, float *u, size_t ld, size_t rows, size_t n, bool causal,
                                 const float *weights, float *means, bool known)
{
    for (size_t r = 0; r < rows; r++, p += ld, u += ld) {
        const size_t sees = causal && r + 1 < n ? r + 1 : n;
        if (!known) means[r] = dot(p, u, sees);
        const vf weight = v_set(weights[r]), mean = v_set(means[r]);
        size_t i = 0;
        for (; i + VL <= sees; i += VL) {
            const vf w = v_mul(weight, v_load(p + i));
            v_store(p + i, w);
            v_store(u + i, v_mul(w, v_sub(v_load(u + i), mean)));
        }
        if (i < sees) {
            const vf w = v_mul(weight, v_load_n(p + i, sees - i));
            v_store_n(p + i, w, sees - i);
            v_store_n(u + i, v_mul(w, v_sub(v_load_n(u + i, sees - i), mean)), sees - i);
        }
        if (sees < n) memset(u + sees, 0, (n - sees) * sizeof *u);
    }
}
