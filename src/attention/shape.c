/* shape.c - what a model's attention may look like, and the policy it asks for by default. */
#include <cairn/attention.h>

#include "base_internal.h"

#include <assert.h>
#include <math.h>

/* Bounds: those of a store's geometry (store.h), and slots of the farthest position within int32. */
enum { LAYERS_MAX = 4096, KV_HEADS_MAX = 1024, HEADS_MAX = 65536, HEAD_DIM_MAX = 1024, BLOCK_TOKENS_MAX = 4096 };

void cairn_attention_shape_init(cairn_attention_shape *shape, size_t struct_size)
{
    assert(struct_size >= sizeof *shape); /* the first version; later ones only grow */
    memset(shape, 0, struct_size);
    shape->struct_size = struct_size;
    shape->block_tokens = 63; /* 64 slots */
    shape->rope_theta = 10000.0F;
    shape->scheme = CAIRN_POSITION_CLAMPED;
    shape->clamp_blocks = 3;
    shape->window_blocks = 1;
    shape->local_window_blocks = 1;
    shape->top_k = 4;
}

static cairn_status check_count(const char *field, uint64_t value, uint64_t least, uint64_t most)
{
    if (value >= least && value <= most) return CAIRN_OK;
    return cairn_fail(CAIRN_INVALID, "attention shape: %s is %llu, must be %llu..%llu", field,
                      (unsigned long long)value, (unsigned long long)least, (unsigned long long)most);
}

cairn_status cairn_attention_shape_check(const cairn_attention_shape *s)
{
    cairn_status st;
    if (s == NULL) return cairn_fail(CAIRN_INVALID, "attention shape: none given");
    if (s->struct_size < sizeof *s)
        return cairn_fail(CAIRN_INVALID, "attention shape: struct_size is %zu, must be at least %zu (use _init)",
                          s->struct_size, sizeof *s);
    if ((st = check_count("layers", s->layers, 1, LAYERS_MAX)) != CAIRN_OK) return st;
    if ((st = check_count("kv_heads", s->kv_heads, 1, KV_HEADS_MAX)) != CAIRN_OK) return st;
    if ((st = check_count("heads", s->heads, 1, HEADS_MAX)) != CAIRN_OK) return st;
    if (s->heads % s->kv_heads != 0)
        return cairn_fail(CAIRN_INVALID, "attention shape: heads is %u, not a multiple of kv_heads %u",
                          (unsigned)s->heads, (unsigned)s->kv_heads);
    if ((st = check_count("head_dim", s->head_dim, 2, HEAD_DIM_MAX)) != CAIRN_OK) return st;
    if (s->head_dim % 2 != 0)
        return cairn_fail(CAIRN_INVALID, "attention shape: head_dim is %u, must be even", (unsigned)s->head_dim);
    if ((st = check_count("block_tokens", s->block_tokens, 1, BLOCK_TOKENS_MAX)) != CAIRN_OK) return st;
    if (!isfinite(s->rope_theta) || s->rope_theta <= 0.0F)
        return cairn_fail(CAIRN_INVALID, "attention shape: rope_theta is %g, must be above 0", (double)s->rope_theta);
    if (s->rope_dims > s->head_dim || s->rope_dims % 2 != 0)
        return cairn_fail(CAIRN_INVALID, "attention shape: rope_dims is %u, must be even and at most head_dim %u",
                          (unsigned)s->rope_dims, (unsigned)s->head_dim);
    const uint32_t pairs = (s->rope_dims != 0 ? s->rope_dims : s->head_dim) / 2;
    for (uint32_t i = 0; s->rope_factors != NULL && i < pairs; i++)
        if (!isfinite(s->rope_factors[i]) || s->rope_factors[i] <= 0.0F)
            return cairn_fail(CAIRN_INVALID, "attention shape: rope_factors[%u] is %g, must be above 0", (unsigned)i,
                              (double)s->rope_factors[i]);
    if ((unsigned)s->scheme > CAIRN_POSITION_DENSE)
        return cairn_fail(CAIRN_INVALID, "attention shape: position scheme %d is unknown", (int)s->scheme);
    if (s->scheme == CAIRN_POSITION_CLAMPED) {
        uint64_t most = INT32_MAX / ((uint64_t)s->block_tokens + 1) - 1; /* (A + 1) * B positions fit an int32 */
        if ((st = check_count("clamp_blocks", s->clamp_blocks, 1, most)) != CAIRN_OK) return st;
    }
    for (uint32_t l = 0; s->local_layers != NULL && l < s->layers; l++)
        if (s->local_layers[l] > 1)
            return cairn_fail(CAIRN_INVALID, "attention shape: local_layers[%u] is %u, must be 0 or 1", (unsigned)l,
                              (unsigned)s->local_layers[l]);
    size_t biases = (size_t)s->layers * s->heads; /* at most 2^28 */
    for (size_t i = 0; s->landmark_bias != NULL && i < biases; i++)
        if (!isfinite(s->landmark_bias[i]))
            return cairn_fail(CAIRN_INVALID, "attention shape: landmark_bias of layer %zu head %zu is not finite",
                              i / s->heads, i % s->heads);
    return CAIRN_OK;
}

void cairn_policy_init(cairn_policy *policy, size_t struct_size, const cairn_attention_shape *shape)
{
    assert(struct_size >= sizeof *policy);
    memset(policy, 0, struct_size);
    policy->struct_size = struct_size;
    policy->top_k = shape != NULL ? shape->top_k : 4;
    policy->scope = CAIRN_SCOPE_TOKEN_HEAD;
    policy->window_blocks = -1;
}
