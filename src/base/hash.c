/* hash.c - the one door to libxxhash. */
#include "base_internal.h"

#define XXH_STATIC_LINKING_ONLY /* the state struct, so it can live on the stack */
#include <xxhash.h>

uint64_t cairn_hash64(const void *data, size_t bytes)
{
    return XXH3_64bits(data, bytes);
}

uint64_t cairn_hash64_two(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    XXH3_state_t state; /* 576 bytes, on the stack: verification must not allocate */
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, a, a_bytes);
    XXH3_64bits_update(&state, b, b_bytes);
    return XXH3_64bits_digest(&state);
}

cairn_hasher *cairn_hasher_new(void)
{
    XXH3_state_t *state = cairn_alloc(sizeof *state);
    if (state != NULL) XXH3_64bits_reset(state);
    return (cairn_hasher *)state;
}

void cairn_hasher_add(cairn_hasher *h, const void *data, size_t bytes)
{
    XXH3_64bits_update((XXH3_state_t *)h, data, bytes);
}

uint64_t cairn_hasher_value(const cairn_hasher *h)
{
    return XXH3_64bits_digest((const XXH3_state_t *)h);
}

void cairn_hasher_free(cairn_hasher *h)
{
    cairn_free(h);
}
