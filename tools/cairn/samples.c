/* samples.c - see samples.h. */
#include "samples.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

bool samples_add(samples *s, double x)
{
    if (s->n == s->cap) {
        size_t cap = s->cap == 0 ? 16 : 2 * s->cap;
        double *grown = realloc(s->x, cap * sizeof *grown);
        if (grown == NULL) return false;
        s->x = grown;
        s->cap = cap;
    }
    s->x[s->n++] = x;
    return true;
}

void samples_wipe(samples *s)
{
    free(s->x);
    *s = (samples){0};
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

double samples_at(samples *s, double p)
{
    if (s->n == 0) return 0;
    qsort(s->x, s->n, sizeof *s->x, ascending);
    double at = p * (double)(s->n - 1);
    size_t low = (size_t)floor(at);
    if (low + 1 >= s->n) return s->x[s->n - 1];
    return s->x[low] + (at - (double)low) * (s->x[low + 1] - s->x[low]);
}

double samples_median(samples *s)
{
    return samples_at(s, 0.5);
}

double samples_mean(const samples *s)
{
    double sum = 0;
    for (size_t i = 0; i < s->n; i++) sum += s->x[i];
    return s->n > 0 ? sum / (double)s->n : 0;
}

json_t *samples_json(samples *s)
{
    return json_pack("{s:o, s:f, s:f, s:f, s:f, s:f}", "n", json_count(s->n), "median", samples_median(s), "min",
                     samples_at(s, 0), "q1", samples_at(s, 0.25), "q3", samples_at(s, 0.75), "max", samples_at(s, 1));
}

const char *human_samples(human *h, samples *s, double scale, int decimals)
{
    snprintf(h->text, sizeof h->text, "%.*f (%.*f - %.*f)", decimals, scale * samples_median(s), decimals,
             scale * samples_at(s, 0.25), decimals, scale * samples_at(s, 0.75));
    return h->text;
}
