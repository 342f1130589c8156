/* own.c - blocks a session computed itself: in RAM, spilled to an unlinked temporary file when there are too many. */
#include "context_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

cairn_status own_init(own_blocks *own, const cairn_geometry *geometry, uint64_t first)
{
    const cairn_geometry *g = geometry;
    size_t tiles;
    size_t landmarks;
    *own = (own_blocks){.geometry = *g, .first = first, .spill_fd = -1};
    own->tile_bytes = cairn_tile_payload_bytes(g->dtype, g->block_tokens, g->head_dim);
    own->landmark_bytes = g->head_dim * cairn_dtype_size(cairn_landmark_dtype(g->dtype));
    if (own->tile_bytes == 0 || !cairn_mul_size((size_t)g->layers * g->kv_heads, own->tile_bytes, &tiles) ||
        !cairn_mul_size((size_t)g->layers * g->kv_heads, own->landmark_bytes, &landmarks) ||
        !cairn_add_size(tiles, landmarks, &own->data_bytes))
        return cairn_fail(CAIRN_INVALID, "a block of %u tokens, %u layers, %u KV heads of %u is too large",
                          (unsigned)g->block_tokens, (unsigned)g->layers, (unsigned)g->kv_heads, (unsigned)g->head_dim);
    return CAIRN_OK;
}

static void drop_data(own_blocks *own, own_block *b)
{
    if (b->data != NULL) own->ram_bytes -= own->data_bytes;
    cairn_free(b->data);
    b->data = NULL;
}

void own_wipe(own_blocks *own)
{
    for (size_t i = 0; i < own->n; i++) {
        drop_data(own, &own->items[i]);
        cairn_free(own->items[i].tokens);
    }
    cairn_free(own->items);
    if (own->spill_fd >= 0) close(own->spill_fd);
    *own = (own_blocks){.spill_fd = -1};
}

cairn_status own_push(own_blocks *own, own_block **out)
{
    if (own->n == own->cap) {
        size_t cap = own->cap != 0 ? 2 * own->cap : 64;
        own_block *bigger = cairn_grow(own->items, own->n * sizeof *bigger, cap, sizeof *bigger);
        if (bigger == NULL) return cairn_fail(CAIRN_NO_MEMORY, "list of %zu own blocks", cap);
        own->items = bigger;
        own->cap = cap;
    }
    own_block b = {.spilled_at = -1, .stored_tiles = true};
    b.data = cairn_alloc(own->data_bytes);
    b.tokens = cairn_calloc(own->geometry.block_tokens, sizeof *b.tokens);
    if (b.data == NULL || b.tokens == NULL) {
        cairn_free(b.data);
        cairn_free(b.tokens);
        return cairn_fail(CAIRN_NO_MEMORY, "own block of %zu bytes", own->data_bytes);
    }
    own->ram_bytes += own->data_bytes;
    own->items[own->n] = b;
    *out = &own->items[own->n++];
    return CAIRN_OK;
}

void own_pop_front(own_blocks *own, size_t n)
{
    if (n == 0) return;
    for (size_t i = 0; i < n; i++) {
        drop_data(own, &own->items[i]);
        cairn_free(own->items[i].tokens);
    }
    memmove(own->items, own->items + n, (own->n - n) * sizeof *own->items);
    own->n -= n;
    own->first += n;
    own->spill_next = own->spill_next > n ? own->spill_next - n : 0;
}

own_block *own_at(const own_blocks *own, uint64_t block)
{
    return block >= own->first && block - own->first < own->n ? &own->items[block - own->first] : NULL;
}

uint8_t *own_tile(const own_blocks *own, const own_block *b, uint32_t layer, uint32_t head)
{
    return b->data + ((size_t)layer * own->geometry.kv_heads + head) * own->tile_bytes;
}

uint8_t *own_landmark(const own_blocks *own, const own_block *b, uint32_t layer, uint32_t head)
{
    const cairn_geometry *g = &own->geometry;
    uint8_t *rows = b->data + (size_t)g->layers * g->kv_heads * own->tile_bytes;
    return rows + ((size_t)(layer - g->first_layer) * g->kv_heads + head) * own->landmark_bytes;
}

size_t own_copy(const own_blocks *own, uint8_t *to, size_t to_stride, const uint8_t *from, size_t from_stride,
                uint32_t tokens)
{
    const cairn_geometry *g = &own->geometry;
    const size_t tiles = (size_t)g->layers * g->kv_heads;
    const size_t tile = cairn_tile_payload_bytes(g->dtype, tokens, g->head_dim);
    const size_t rows = (size_t)(g->layers - g->first_layer) * g->kv_heads * own->landmark_bytes;
    for (size_t i = 0; to != NULL && i < tiles; i++) memcpy(to + i * to_stride, from + i * from_stride, tile);
    if (to != NULL) memcpy(to + tiles * to_stride, from + tiles * from_stride, rows);
    return tiles * to_stride + rows;
}

static cairn_status open_spill(own_blocks *own)
{
    if (own->spill_fd >= 0) return CAIRN_OK;
    const char *dir = getenv("TMPDIR");
    if (dir == NULL || *dir == 0) dir = "/tmp";
    own->spill_fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (own->spill_fd < 0) { /* a file system without O_TMPFILE */
        char path[4096];
        snprintf(path, sizeof path, "%s/cairn-spill-XXXXXX", dir);
        own->spill_fd = mkostemp(path, O_CLOEXEC);
        if (own->spill_fd < 0) return cairn_fail_errno(errno, "temporary file in %s for own blocks", dir);
        unlink(path);
    }
    return CAIRN_OK;
}

static cairn_status whole_io(own_blocks *own, bool writing, void *data, size_t bytes, off_t at)
{
    uint8_t *p = data;
    while (bytes != 0) {
        ssize_t r = writing ? pwrite(own->spill_fd, p, bytes, at) : pread(own->spill_fd, p, bytes, at);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0)
            return cairn_fail_errno(r < 0 ? errno : EIO, "%s %zu bytes at %lld of the temporary file of own blocks",
                                    writing ? "writing" : "reading", bytes, (long long)at);
        p += r;
        at += r;
        bytes -= (size_t)r;
    }
    return CAIRN_OK;
}

cairn_status own_spill(own_blocks *own, size_t budget)
{
    for (; own->ram_bytes > budget && own->spill_next < own->n; own->spill_next++) {
        own_block *b = &own->items[own->spill_next];
        if (!b->complete) break;
        if (b->data == NULL || b->committed || !b->stored_tiles) continue;
        cairn_status st = open_spill(own);
        if (st != CAIRN_OK) return st;
        if (b->spilled_at < 0) { /* written once: a block does not change */
            if ((st = whole_io(own, true, b->data, own->data_bytes, own->spill_end)) != CAIRN_OK) return st;
            b->spilled_at = own->spill_end;
            own->spill_end += (off_t)own->data_bytes;
            own->spill_bytes += own->data_bytes;
        }
        drop_data(own, b);
    }
    return CAIRN_OK;
}

cairn_status own_unspill(own_blocks *own, own_block *b)
{
    if (b->data != NULL) return CAIRN_OK;
    b->data = cairn_alloc(own->data_bytes);
    if (b->data == NULL) return cairn_fail(CAIRN_NO_MEMORY, "own block of %zu bytes", own->data_bytes);
    own->ram_bytes += own->data_bytes;
    cairn_status st = whole_io(own, false, b->data, own->data_bytes, b->spilled_at);
    if (st != CAIRN_OK) drop_data(own, b);
    own->spill_next = 0;
    return st;
}

cairn_status own_read_tile(own_blocks *own, const own_block *b, uint32_t layer, uint32_t head, void *out)
{
    size_t at = ((size_t)layer * own->geometry.kv_heads + head) * own->tile_bytes;
    return whole_io(own, false, out, own->tile_bytes, b->spilled_at + (off_t)at);
}
