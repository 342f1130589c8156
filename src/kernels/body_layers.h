/* body_layers.h - the gated activation and the ways back through it and through a norm, over vec512.h or vec256.h;
 * included after body_vectors.h. Every number is read and written once: these are bound by memory. */

INLINE vf v_sigmoid(vf x)
{
    return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x))));
}

static void swiglu(float *out, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(out + i, v_silu_mul(v_load(gate + i), v_load(up + i)));
    if (i < n) v_store_n(out + i, v_silu_mul(v_load_n(gate + i, n - i), v_load_n(up + i, n - i)), n - i);
}

typedef struct swiglu_grads {
    vf out, dgate, dup;
} swiglu_grads;

/* silu(g)' = s (1 + g (1 - s)), s = sigmoid(g) */
INLINE swiglu_grads v_swiglu_backward(vf dout, vf gate, vf up)
{
    const vf s = v_sigmoid(gate), silu = v_mul(gate, s), slope = v_fma(silu, v_sub(v_set(1.0f), s), s);
    return (swiglu_grads){v_mul(silu, up), v_mul(v_mul(dout, up), slope), v_mul(dout, silu)};
}

static void swiglu_backward(float *out, float *dgate, float *dup, const float *dout, const float *gate, const float *up,
                            size_t n)
{
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        const swiglu_grads g = v_swiglu_backward(v_load(dout + i), v_load(gate + i), v_load(up + i));
        v_store(out + i, g.out);
        v_store(dgate + i, g.dgate);
        v_store(dup + i, g.dup);
    }
    if (i == n) return;
    const size_t m = n - i;
    const swiglu_grads g = v_swiglu_backward(v_load_n(dout + i, m), v_load_n(gate + i, m), v_load_n(up + i, m));
    v_store_n(out + i, g.out, m);
    v_store_n(dgate + i, g.dgate, m);
    v_store_n(dup + i, g.dup, m);
}

static void rms_norm_backward(float *dx, float *dweight, const float *x, const float *weight, const float *dy, size_t n,
                              float eps, bool add)
{
    if (n == 0) return;
    vf squares = v_zero(), products = v_zero();
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vf a = v_load(x + i);
        squares = v_fma(a, a, squares);
        products = v_fma(v_mul(v_load(weight + i), v_load(dy + i)), a, products);
    }
    if (i < n) {
        const vf a = v_load_n(x + i, n - i);
        squares = v_fma(a, a, squares);
        products = v_fma(v_mul(v_load_n(weight + i, n - i), v_load_n(dy + i, n - i)), a, products);
    }
    const float factor = (float)(1.0 / sqrt((double)v_sum(squares) / (double)n + eps));
    const vf s = v_set(factor), shared = v_set(v_sum(products) * factor * factor / (float)n);
    for (i = 0; i + VL <= n; i += VL) {
        const vf a = v_load(x + i), d = v_load(dy + i);
        const vf g = v_mul(s, v_fnma(a, shared, v_mul(v_load(weight + i), d)));
        v_store(dweight + i, v_fma(v_mul(s, d), a, v_load(dweight + i)));
        v_store(dx + i, add ? v_add(v_load(dx + i), g) : g);
    }
    if (i == n) return;
    const size_t m = n - i;
    const vf a = v_load_n(x + i, m), d = v_load_n(dy + i, m);
    const vf g = v_mul(s, v_fnma(a, shared, v_mul(v_load_n(weight + i, m), d)));
    v_store_n(dweight + i, v_fma(v_mul(s, d), a, v_load_n(dweight + i, m)), m);
    v_store_n(dx + i, add ? v_add(v_load_n(dx + i, m), g) : g, m);
}
