/* body_exp.h - exp, over vec512.h or vec256.h; included after it. */
#ifndef CAIRN_KERNELS_BODY_EXP_H
#define CAIRN_KERNELS_BODY_EXP_H

/* e^x = 2^*n times what is returned, for |x| <= 104. x = n ln2 + r, |r| <= ln2 / 2, e^r = 1 + r + r^2 q(r), q the
 * minimax polynomial of degree 4 (relative error of e^r 3e-9, before rounding). */
INLINE vf v_exp_parts(vf x, vf *n)
{
    *n = v_round(v_mul(x, v_set(0x1.715476p+0f))); /* x / ln2 */
    vf r = v_fnma(*n, v_set(0x1.62e430p-1f), x);   /* ln2 in two parts; the product is exact inside the fma */
    r = v_fnma(*n, v_set(-0x1.05c610p-29f), r);
    vf q = v_set(0x1.6a2402p-10f);
    q = v_fma(q, r, v_set(0x1.123a00p-7f));
    q = v_fma(q, r, v_set(0x1.5558f2p-5f));
    q = v_fma(q, r, v_set(0x1.555492p-3f));
    q = v_fma(q, r, v_set(0x1.fffffcp-2f));
    return v_add(v_fma(v_mul(r, r), q, r), v_set(1.0f));
}

/* exp(x) to 2 ulp (1.01 measured over all floats), exact 1 at 0, subnormal results included. The clamp keeps inf - inf
 * out of r; beyond it the results are 0 and inf all the same. A nan passes through. */
INLINE vf v_exp(vf x)
{
    vf n, p = v_exp_parts(v_min(v_set(89.0f), v_max(v_set(-104.0f), x)), &n);
    return v_ldexp(p, n);
}

/* v_exp for x <= 0, where a result needs to be no smaller than e^-86 = 4.5e-38: no subnormals, so one step scales. */
INLINE vf v_exp_down(vf x)
{
    vf n, p = v_exp_parts(v_max(v_set(-86.0f), x), &n); /* a nan passes through */
    return v_ldexp_normal(p, n);
}

/* 2^x for -125 <= x <= 127, exact 1 at 0, else within 5e-7: for what is then rounded to 16 bits. The polynomial is the
 * minimax one of degree 5 with 1 for its constant, over |x| <= 1/2. */
INLINE vf v_exp2_near(vf x)
{
    vf n = v_round(x), r = v_sub(x, n);
    vf p = v_set(0x1.23a608p-10f);
    p = v_fma(p, r, v_set(0x1.3cbea8p-7f));
    p = v_fma(p, r, v_set(0x1.c74322p-5f));
    p = v_fma(p, r, v_set(0x1.ebfa4ep-3f));
    p = v_fma(p, r, v_set(0x1.62e39ep-1f));
    return v_ldexp_normal(v_fma(p, r, v_set(1.0f)), n);
}

#endif
