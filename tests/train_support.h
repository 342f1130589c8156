/* train_support.h - central differences, and how far gradients may be from them. */
#ifndef CAIRN_TESTS_TRAIN_SUPPORT_H
#define CAIRN_TESTS_TRAIN_SUPPORT_H

#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef double (*loss_fn)(void *arg);

/* dL/d*x by four points: its own error is of order h^4 and of rounding / h, both far below 1e-8 here. */
static inline double central_difference(loss_fn loss, void *arg, double *x)
{
    const double h = 3e-4, was = *x;
    double at[4];
    const double steps[4] = {-2, -1, 1, 2};
    for (int i = 0; i < 4; i++) {
        *x = was + steps[i] * h;
        at[i] = loss(arg);
    }
    *x = was;
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h);
}

static inline double largest_of(const double *x, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs(x[i]));
    return most;
}

/* Largest relative error of gradient (n) against central differences over x (n). Entries a thousand times smaller than
 * the array's largest are measured against that thousandth: a sum that cancels has no relative precision. */
static inline double worst_against_differences(const double *gradient, double *x, size_t n, loss_fn loss, void *arg)
{
    double worst = 0, floor = fmax(1e-3 * largest_of(gradient, n), 1e-6);
    for (size_t i = 0; i < n; i++) {
        double d = central_difference(loss, arg, &x[i]), off = fabs(gradient[i] - d);
        worst = fmax(worst, off / fmax(fmax(fabs(d), fabs(gradient[i])), floor));
    }
    return worst;
}

/* Largest difference of float from double, relative to the largest entry. */
static inline double worst_against(const float *got, const double *want, size_t n)
{
    double worst = 0, scale = largest_of(want, n);
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)got[i] - want[i]) / fmax(scale, 1e-30));
    return worst;
}

#define expect_below(what, got, bound)                                                                                 \
    do {                                                                                                               \
        double expect_value = (got);                                                                                   \
        print_message("  %s: %.2g\n", what, expect_value);                                                             \
        if (!(expect_value <= (bound))) fail_msg("%s: %g, at most %g", what, expect_value, (double)(bound));           \
    } while (0)

static inline double *random_doubles(test_random *r, size_t n, double spread)
{
    double *x = malloc((n + 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) x[i] = spread * (double)test_random_normal(r);
    return x;
}

static inline float *as_floats(const double *x, size_t n)
{
    float *y = malloc((n + 1) * sizeof *y);
    assert_non_null(y);
    for (size_t i = 0; i < n; i++) y[i] = (float)x[i];
    return y;
}

#endif
