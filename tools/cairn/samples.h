/* samples.h - repeated measurements of one thing: median and spread, for tables and for JSON. */
#ifndef CAIRN_CLI_SAMPLES_H
#define CAIRN_CLI_SAMPLES_H

#include "output.h"

typedef struct samples { /* {0} is empty */
    double *x;
    size_t n, cap;
} samples;
bool samples_add(samples *s, double x); /* false: out of memory */
void samples_wipe(samples *s);
/* The p-quantile, 0..1, between neighbours linearly (type 7 of Hyndman and Fan 1996); 0 of none. Sorts. */
double samples_at(samples *s, double p);
double samples_median(samples *s);
double samples_mean(const samples *s);
/* {"n", "median", "min", "q1", "q3", "max"} */
json_t *samples_json(samples *s);
/* "1.25 (1.20 - 1.31)": median and quartiles, each times `scale` with that many decimals. */
const char *human_samples(human *h, samples *s, double scale, int decimals);

#endif
