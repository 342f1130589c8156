/* sample.c - the next token out of logits: greedy, or by chance within the likeliest part (nucleus, Holtzman et al.
 * 2020). */
#include "model_internal.h"

#include <math.h>
#include <stdlib.h>

typedef struct candidate {
    double p;
    cairn_token id;
} candidate;

static double draw(uint64_t *state) /* [0, 1): splitmix64 (Steele, Lea, Flood 2014) */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

static int likelier_first(const void *a, const void *b)
{
    const candidate *x = a;
    const candidate *y = b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* The best token that may be sampled: masked ones and those that are not numbers are passed over; -1 = none is left. */
static cairn_token best(const cairn_model *model, const float *logits)
{
    cairn_token id = -1;
    for (uint32_t i = 0; i < model->info.vocab; i++)
        if (!model->masked[i] && logits[i] > -INFINITY && (id < 0 || logits[i] > logits[id])) id = (cairn_token)i;
    return id;
}

cairn_status cairn_model_sample(const cairn_model *model, const float *logits, cairn_sampler *sampler, cairn_token *out)
{
    const double temperature = (double)sampler->temperature;
    const double top_p = (double)sampler->top_p;
    if (!(temperature >= 0) || !isfinite(temperature))
        return cairn_fail(CAIRN_INVALID, "temperature %g: must be 0 or above", temperature);
    cairn_token greedy = best(model, logits);
    if (greedy < 0) return cairn_fail(CAIRN_INVALID, "none of %u logits can be sampled from", model->info.vocab);
    *out = greedy;
    if (temperature == 0) return CAIRN_OK;
    if (!(top_p > 0 && top_p <= 1)) return cairn_fail(CAIRN_INVALID, "top-p %g: must be above 0, at most 1", top_p);
    if (logits[greedy] == INFINITY) return CAIRN_OK;

    size_t n = 0;
    double sum = 0;
    candidate *c = cairn_alloc_array(model->info.vocab, sizeof *c);
    if (c == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%u candidates", model->info.vocab);
    for (uint32_t i = 0; i < model->info.vocab; i++) {
        if (model->masked[i] || !(logits[i] > -INFINITY)) continue;
        double p = exp(((double)logits[i] - (double)logits[greedy]) / temperature);
        c[n++] = (candidate){p, (cairn_token)i};
        sum += p;
    }
    if (top_p < 1) { /* the fewest of the likeliest that have this share */
        double share = 0;
        size_t kept = 0;
        qsort(c, n, sizeof *c, likelier_first);
        while (kept < n && share < top_p * sum) share += c[kept++].p;
        n = kept;
        sum = share;
    }
    double at = draw(&sampler->state) * sum;
    size_t i = 0;
    while (i + 1 < n && at >= c[i].p) at -= c[i++].p;
    *out = c[i].id;
    cairn_free(c);
    return CAIRN_OK;
}
