/* slots.c - the paper's "stingy" positions (section 3.3): where retrieved blocks sit before the chunk.
 *
 * A prefix of k' + 1 block slots stands right before the tail and the chunk; k' = min(k, n), n cached blocks. Slot s is
 * the positions P0 + s * B .. P0 + s * B + B - 1. The newest k' blocks are "recent", all others "old".
 *
 *   scoring:    old ........ slot 0        recent, oldest first .... slots 1 .. k'
 *   attention:  chosen old .. slots 0, 1, ... from the left         chosen recent .. up to slot k' from the right
 *
 * so that with k' chosen blocks exactly one slot stays free, between the old and the recent ones: order is kept, and no
 * position ever exceeds the training window however long the context is.
 */
#include <cairn/attention.h>

#include <assert.h>

static size_t recent_first(size_t n, uint32_t k)
{
    return n > k ? n - k : 0;
}

void cairn_stingy_scoring_slots(size_t n, uint32_t k, uint32_t *out)
{
    size_t first = recent_first(n, k);
    for (size_t i = 0; i < n; i++) out[i] = i < first ? 0 : (uint32_t)(i - first + 1);
}

void cairn_stingy_slots(size_t n, uint32_t k, const uint32_t *ranks, size_t chosen, uint32_t *out)
{
    size_t first = recent_first(n, k);
    assert(chosen <= n);
    assert(chosen <= k);
    for (size_t r = 0; r < chosen; r++) {
        assert(ranks[r] < n);
        assert(r == 0 || ranks[r - 1] < ranks[r]);
        out[r] = (uint32_t)r + (ranks[r] >= first ? 1 : 0);
    }
}
