/* rope.c - rotary embedding (Su et al. 2021): pair i of a head turns by position * theta^(-2i/dims).
 *
 * Where the shape has factors, pair i turns as much slower (Llama 3.1).
 *
 * Angles are formed in double and rounded once, so that a table entry is the same however long the table is. The table
 * stops at TABLE_MAX positions (4 MiB at head dim 16 pairs); beyond it, which only exact modes reach, angles are
 * computed per call by the same formula. */
#include "attention_internal.h"

#include <math.h>

enum { TABLE_MAX = 1 << 15, DIMS_MAX = 1024 };

/* speeds (dims / 2): what each pair turns by in a slot. */
static void speeds_of(const attn_rope *rope, double *speeds)
{
    for (uint32_t i = 0; i < rope->dims / 2; i++) speeds[i] = pow(rope->theta, -2.0 * i / rope->dims);
}

static void angles(const attn_rope *rope, const double *speeds, size_t p, float *cos_out, float *sin_out)
{
    for (uint32_t i = 0; i < rope->dims / 2; i++) {
        double a = (double)p * speeds[i];
        if (rope->factors != NULL) a /= (double)rope->factors[i];
        cos_out[i] = (float)cos(a);
        sin_out[i] = (float)sin(a);
    }
}

cairn_status attn_rope_init(attn_rope *rope, const cairn_attention_shape *shape)
{
    *rope = (attn_rope){
        .head_dim = shape->head_dim,
        .dims = shape->rope_dims != 0 ? shape->rope_dims : shape->head_dim,
        .interleaved = shape->rope_interleaved,
        .theta = (double)shape->rope_theta,
        .factors = shape->rope_factors,
    };
    return attn_rope_reserve(rope, 4 * (size_t)attn_slots(shape));
}

void attn_rope_wipe(attn_rope *rope)
{
    cairn_free(rope->cos);
    cairn_free(rope->sin);
    *rope = (attn_rope){0};
}

cairn_status attn_rope_reserve(attn_rope *rope, size_t positions)
{
    if (positions > TABLE_MAX) positions = TABLE_MAX;
    if (positions <= rope->positions) return CAIRN_OK;
    if (positions < 2 * rope->positions) positions = 2 * rope->positions; /* dense streams grow slot by slot */
    size_t pairs = rope->dims / 2;
    float *c = cairn_alloc_array(positions, pairs * sizeof *c);
    float *s = cairn_alloc_array(positions, pairs * sizeof *s);
    if (c == NULL || s == NULL) {
        cairn_free(c);
        cairn_free(s);
        return cairn_fail(CAIRN_NO_MEMORY, "rotary table of %zu positions", positions);
    }
    double speeds[DIMS_MAX / 2];
    speeds_of(rope, speeds);
    for (size_t p = 0; p < positions; p++) angles(rope, speeds, p, c + p * pairs, s + p * pairs);
    cairn_free(rope->cos);
    cairn_free(rope->sin);
    rope->cos = c;
    rope->sin = s;
    rope->positions = positions;
    return CAIRN_OK;
}

void attn_rotate(const attn_rope *rope, const cairn_kernels *kernels, float *out, const float *x, size_t p)
{
    size_t pairs = rope->dims / 2;
    if (p < rope->positions) {
        kernels->rotate(out, x, rope->cos + p * pairs, rope->sin + p * pairs, rope->dims, rope->interleaved);
    } else {
        float c[DIMS_MAX / 2];
        float s[DIMS_MAX / 2];
        double speeds[DIMS_MAX / 2];
        speeds_of(rope, speeds);
        angles(rope, speeds, p, c, s);
        kernels->rotate(out, x, c, s, rope->dims, rope->interleaved);
    }
    if (out != x && rope->dims < rope->head_dim)
        memcpy(out + rope->dims, x + rope->dims, (rope->head_dim - rope->dims) * sizeof *out);
}
