/* tile.c - geometry, and the records of a block: tokens, landmark keys, tiles. Pictures here and in docs/format.md.
 *
 * A block's records are written once and never edited in place. All three carry an XXH3-64 of everything else in them.
 */
#include "store_internal.h"

/* ---- geometry ---- */

cairn_dtype cairn_landmark_dtype(cairn_dtype tile_dtype)
{
    return tile_dtype == CAIRN_F32 || tile_dtype == CAIRN_BF16 ? tile_dtype : CAIRN_F16;
}

size_t cairn_tile_payload_bytes(cairn_dtype dtype, uint32_t tokens, uint32_t head_dim)
{
    size_t elements, bytes, scales;
    if (!cairn_mul_size(2 * (size_t)tokens, head_dim, &elements)) return 0;
    if (!cairn_mul_size(elements, cairn_dtype_size(dtype), &bytes)) return 0;
    if (dtype != CAIRN_Q8) return bytes;
    if (!cairn_mul_size((size_t)tokens + head_dim, sizeof(float), &scales)) return 0;
    return cairn_add_size(bytes, scales, &bytes) ? bytes : 0;
}

size_t cairn_landmark_payload_bytes(const cairn_geometry *geometry)
{
    size_t rows, bytes;
    if (geometry->first_layer > geometry->layers) return 0;
    if (!cairn_mul_size(geometry->layers - geometry->first_layer, geometry->kv_heads, &rows)) return 0;
    if (!cairn_mul_size(rows, geometry->head_dim, &bytes)) return 0;
    return cairn_mul_size(bytes, cairn_dtype_size(cairn_landmark_dtype(geometry->dtype)), &bytes) ? bytes : 0;
}

cairn_status store_geometry_check(const cairn_geometry *g)
{
    if (g->layers < 1 || g->layers > 4096)
        return cairn_fail(CAIRN_INVALID, "geometry: %u layers, must be 1..4096", g->layers);
    if (g->first_layer >= g->layers)
        return cairn_fail(CAIRN_INVALID, "geometry: the first stored layer is %u of %u", g->first_layer, g->layers);
    if (g->kv_heads < 1 || g->kv_heads > 1024)
        return cairn_fail(CAIRN_INVALID, "geometry: %u KV heads, must be 1..1024", g->kv_heads);
    if (g->head_dim < 2 || g->head_dim > 1024 || g->head_dim % 2 != 0)
        return cairn_fail(CAIRN_INVALID, "geometry: head dim %u, must be even and 2..1024", g->head_dim);
    if (g->block_tokens < 1 || g->block_tokens > 4096)
        return cairn_fail(CAIRN_INVALID, "geometry: %u tokens a block, must be 1..4096", g->block_tokens);
    if ((unsigned)g->dtype > CAIRN_Q8)
        return cairn_fail(CAIRN_INVALID, "geometry: unknown element type %u", (unsigned)g->dtype);
    /* Largest tile 2 * 4096 * 1024 * 4 = 32 MiB. Landmark record: 4096 * 1024 * 1024 * 4 = 16 GiB would not fit LMDB's
     * 32-bit value size. */
    size_t landmark = cairn_landmark_payload_bytes(g);
    if (landmark > UINT32_MAX / 2)
        return cairn_fail(CAIRN_INVALID, "geometry: %zu bytes of landmark keys in a block, at most %u", landmark,
                          UINT32_MAX / 2);
    return CAIRN_OK;
}

/* ---- tokens: key segment, block ----
 *
 *   offset  size   field
 *        0     4   magic      'C' 'R' 'N' 'K'
 *        4     2   version    1
 *        6     2   reserved   0
 *        8     8   segment    as in the key
 *       16     4   block      as in the key
 *       20     4   tokens     C
 *       24     8   hash       over [0, 24) and [32, end)
 *       32   4*C   token ids
 */
enum { TOK_VERSION = 4, TOK_RESERVED = 6, TOK_SEGMENT = 8, TOK_BLOCK = 16, TOK_COUNT = 20, TOK_HASH = 24 };
static_assert(TOK_HASH + 8 == TOKENS_HEADER_BYTES, "picture and header");

size_t store_tokens_bytes(const cairn_geometry *geometry)
{
    return TOKENS_HEADER_BYTES + (size_t)geometry->block_tokens * 4;
}

void store_tokens_encode(const cairn_geometry *geometry, uint64_t segment, uint32_t block, const cairn_token *tokens,
                         uint8_t *out)
{
    memset(out, 0, TOKENS_HEADER_BYTES);
    memcpy(out, "CRNK", 4);
    cairn_put_le16(out + TOK_VERSION, 1);
    cairn_put_le64(out + TOK_SEGMENT, segment);
    cairn_put_le32(out + TOK_BLOCK, block);
    cairn_put_le32(out + TOK_COUNT, geometry->block_tokens);
    uint8_t *p = out + TOKENS_HEADER_BYTES;
    for (uint32_t i = 0; i < geometry->block_tokens; i++) cairn_put_le32(p + (size_t)i * 4, (uint32_t)tokens[i]);
    cairn_put_le64(out + TOK_HASH,
                   cairn_hash64_two(out, TOK_HASH, p, store_tokens_bytes(geometry) - TOKENS_HEADER_BYTES));
}

cairn_status store_tokens_check(const cairn_geometry *geometry, uint64_t segment, uint32_t block, cairn_span record,
                                cairn_token *out)
{
    unsigned long long s = segment;
    const uint8_t *p = record.data;
    size_t whole = store_tokens_bytes(geometry);
    if (record.bytes != whole || memcmp(p, "CRNK", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT,
                          "segment %llu block %u tokens: not a record of %u tokens (%zu bytes, expected %zu)", s, block,
                          geometry->block_tokens, record.bytes, whole);
    if (cairn_get_le16(p + TOK_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "segment %llu block %u tokens: record version %u", s, block,
                          cairn_get_le16(p + TOK_VERSION));
    uint64_t hash = cairn_hash64_two(p, TOK_HASH, p + TOKENS_HEADER_BYTES, whole - TOKENS_HEADER_BYTES);
    if (hash != cairn_get_le64(p + TOK_HASH))
        return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u tokens: hash %016llx, expected %016llx", s, block,
                          (unsigned long long)hash, (unsigned long long)cairn_get_le64(p + TOK_HASH));
    if (cairn_get_le64(p + TOK_SEGMENT) != segment || cairn_get_le32(p + TOK_BLOCK) != block ||
        cairn_get_le32(p + TOK_COUNT) != geometry->block_tokens || cairn_get_le16(p + TOK_RESERVED) != 0)
        return cairn_fail(CAIRN_CORRUPT,
                          "segment %llu block %u tokens: the record says segment %llu block %u, %u tokens", s, block,
                          (unsigned long long)cairn_get_le64(p + TOK_SEGMENT), cairn_get_le32(p + TOK_BLOCK),
                          cairn_get_le32(p + TOK_COUNT));
    for (uint32_t i = 0; i < geometry->block_tokens; i++) {
        cairn_token token = (cairn_token)cairn_get_le32(p + TOKENS_HEADER_BYTES + (size_t)i * 4);
        if (token < 0)
            return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u tokens: token %u is %d", s, block, i, token);
        if (out != NULL) out[i] = token;
    }
    return CAIRN_OK;
}

/* ---- landmark keys: key segment, block ----
 *
 *   offset  size   field
 *        0     4   magic      'C' 'R' 'N' 'L'
 *        4     2   version    1
 *        6     2   dtype      of the keys: f32, f16 or bf16
 *        8     8   segment    as in the key
 *       16     4   block      as in the key
 *       20     2   layers     L, stored layers
 *       22     2   kv_heads   H
 *       24     2   head_dim   D
 *       26     6   reserved   0
 *       32     8   hash       over [0, 32) and [48, end)
 *       40     8   reserved   0
 *       48     .   keys (L, H, D), before rotation
 */
enum {
    LMK_VERSION = 4,
    LMK_DTYPE = 6,
    LMK_SEGMENT = 8,
    LMK_BLOCK = 16,
    LMK_LAYERS = 20,
    LMK_HEADS = 22,
    LMK_DIM = 24,
    LMK_RESERVED = 26,
    LMK_HASH = 32,
    LMK_RESERVED2 = 40
};
static_assert(LMK_RESERVED2 + 8 == LANDMARK_HEADER_BYTES, "picture and header");

size_t store_landmark_bytes(const cairn_geometry *geometry)
{
    return LANDMARK_HEADER_BYTES + cairn_landmark_payload_bytes(geometry);
}

void store_landmark_encode(const cairn_geometry *geometry, uint64_t segment, uint32_t block, const void *payload,
                           uint8_t *out)
{
    size_t bytes = cairn_landmark_payload_bytes(geometry);
    memset(out, 0, LANDMARK_HEADER_BYTES);
    memcpy(out, "CRNL", 4);
    cairn_put_le16(out + LMK_VERSION, 1);
    cairn_put_le16(out + LMK_DTYPE, (uint16_t)cairn_landmark_dtype(geometry->dtype));
    cairn_put_le64(out + LMK_SEGMENT, segment);
    cairn_put_le32(out + LMK_BLOCK, block);
    cairn_put_le16(out + LMK_LAYERS, (uint16_t)(geometry->layers - geometry->first_layer));
    cairn_put_le16(out + LMK_HEADS, (uint16_t)geometry->kv_heads);
    cairn_put_le16(out + LMK_DIM, (uint16_t)geometry->head_dim);
    memcpy(out + LANDMARK_HEADER_BYTES, payload, bytes);
    cairn_put_le64(out + LMK_HASH, cairn_hash64_two(out, LMK_HASH, out + LANDMARK_HEADER_BYTES, bytes));
}

cairn_status store_landmark_check(const cairn_geometry *geometry, uint64_t segment, uint32_t block, cairn_span record,
                                  cairn_span *payload)
{
    unsigned long long s = segment;
    const uint8_t *p = record.data;
    size_t whole = store_landmark_bytes(geometry);
    if (record.bytes != whole || memcmp(p, "CRNL", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT,
                          "segment %llu block %u landmark: not a landmark record (%zu bytes, expected %zu)", s, block,
                          record.bytes, whole);
    if (cairn_get_le16(p + LMK_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "segment %llu block %u landmark: record version %u", s, block,
                          cairn_get_le16(p + LMK_VERSION));
    uint64_t hash = cairn_hash64_two(p, LMK_HASH, p + LANDMARK_HEADER_BYTES, whole - LANDMARK_HEADER_BYTES);
    if (hash != cairn_get_le64(p + LMK_HASH))
        return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u landmark: hash %016llx, expected %016llx", s, block,
                          (unsigned long long)hash, (unsigned long long)cairn_get_le64(p + LMK_HASH));
    static const uint8_t zeros[8];
    if (cairn_get_le64(p + LMK_SEGMENT) != segment || cairn_get_le32(p + LMK_BLOCK) != block ||
        cairn_get_le16(p + LMK_DTYPE) != (unsigned)cairn_landmark_dtype(geometry->dtype) ||
        cairn_get_le16(p + LMK_LAYERS) != geometry->layers - geometry->first_layer ||
        cairn_get_le16(p + LMK_HEADS) != geometry->kv_heads || cairn_get_le16(p + LMK_DIM) != geometry->head_dim ||
        memcmp(p + LMK_RESERVED, zeros, LMK_HASH - LMK_RESERVED) != 0 || memcmp(p + LMK_RESERVED2, zeros, 8) != 0)
        return cairn_fail(
            CAIRN_CORRUPT,
            "segment %llu block %u landmark: the record says segment %llu block %u, %u layers of %u heads of %u", s,
            block, (unsigned long long)cairn_get_le64(p + LMK_SEGMENT), cairn_get_le32(p + LMK_BLOCK),
            cairn_get_le16(p + LMK_LAYERS), cairn_get_le16(p + LMK_HEADS), cairn_get_le16(p + LMK_DIM));
    if (payload != NULL) *payload = (cairn_span){p + LANDMARK_HEADER_BYTES, whole - LANDMARK_HEADER_BYTES};
    return CAIRN_OK;
}

/* ---- tile: key segment, block, layer, head ----
 *
 *   offset  size   field
 *        0     4   magic          'C' 'R' 'N' 'T'
 *        4     2   version        1
 *        6     2   dtype          0 = f32, 1 = f16, 2 = bf16, 3 = q8
 *        8     2   layer
 *       10     2   kv_head
 *       12     2   tokens         T, rows of K and of V
 *       14     2   head_dim       D
 *       16     8   first_token    stream position of row 0, in every context that has the block
 *       24     8   payload_bytes  2 * T * D * element size (+ 4 * (D + T) of scales for q8), or the record is corrupt
 *       32     8   hash           XXH3-64 over [0, 32) and [48, end)
 *       40     8   reserved       0, or the record is from a future we do not know
 *       48     .   keys (T, D), then values (T, D); q8: then f32 key scales (D), then f32 value scales (T)
 *        .     .   zeros, up to half a page, where the payload is smaller than that
 *
 * Why 48: LMDB starts a large value 16 bytes into its first page, so the payload falls on a 64-byte line. Why the
 * zeros: LMDB keeps a value that fits half a page inside a leaf page, at any even address; a record of half a page
 * never fits, so every tile has pages of its own, whose place in the file is known without reading them. Tiles of real
 * models are larger and carry none. The payload is read in place, so the build refuses big-endian hosts.
 *
 * Segment and block are not in the header: compact moves tiles without rewriting them. first_token is the same in every
 * context that has the block, so whoever knows the place knows whether LMDB led to the right tile. */
enum {
    TILE_VERSION = 4,
    TILE_DTYPE = 6,
    TILE_LAYER = 8,
    TILE_HEAD = 10,
    TILE_TOKENS = 12,
    TILE_DIM = 14,
    TILE_FIRST = 16,
    TILE_PAYLOAD = 24,
    TILE_RESERVED = 40
};
static_assert(TILE_RESERVED + 8 == TILE_HEADER_BYTES, "picture and header");
static_assert((STORE_PAGE_HEADER + TILE_HEADER_BYTES) % 64 == 0, "the payload falls on a 64-byte line");

size_t store_tile_bytes(uint32_t page_bytes, cairn_dtype dtype, uint32_t tokens, uint32_t head_dim)
{
    size_t bytes = TILE_HEADER_BYTES + cairn_tile_payload_bytes(dtype, tokens, head_dim);
    return bytes > page_bytes / 2 ? bytes : page_bytes / 2;
}

void store_tile_encode(const cairn_geometry *geometry, cairn_tile_id id, uint64_t first_token, const void *payload,
                       uint8_t *out, size_t out_bytes)
{
    size_t bytes = cairn_tile_payload_bytes(geometry->dtype, geometry->block_tokens, geometry->head_dim);
    assert(out_bytes >= TILE_HEADER_BYTES + bytes);
    memset(out, 0, TILE_HEADER_BYTES);
    memcpy(out, "CRNT", 4);
    cairn_put_le16(out + TILE_VERSION, 1);
    cairn_put_le16(out + TILE_DTYPE, (uint16_t)geometry->dtype);
    cairn_put_le16(out + TILE_LAYER, id.layer);
    cairn_put_le16(out + TILE_HEAD, id.head);
    cairn_put_le16(out + TILE_TOKENS, (uint16_t)geometry->block_tokens);
    cairn_put_le16(out + TILE_DIM, (uint16_t)geometry->head_dim);
    cairn_put_le64(out + TILE_FIRST, first_token);
    cairn_put_le64(out + TILE_PAYLOAD, bytes);
    memcpy(out + TILE_HEADER_BYTES, payload, bytes);
    memset(out + TILE_HEADER_BYTES + bytes, 0, out_bytes - TILE_HEADER_BYTES - bytes);
    cairn_put_le64(out + TILE_HASH,
                   cairn_hash64_two(out, TILE_HASH, out + TILE_HEADER_BYTES, out_bytes - TILE_HEADER_BYTES));
}

static cairn_status tile_corrupt(cairn_tile_id id, const char *what, uint64_t found, uint64_t expected)
{
    return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u layer %u head %u: %s %llu, expected %llu",
                      (unsigned long long)id.segment, id.block, id.layer, id.head, what, (unsigned long long)found,
                      (unsigned long long)expected);
}

cairn_status store_tile_parse(const cairn_geometry *geometry, uint32_t page_bytes, cairn_tile_id id, const void *record,
                              size_t header_bytes, size_t bytes, bool verify_hash, cairn_tile_view *out)
{
    const uint8_t *p = record;
    if (header_bytes < TILE_HEADER_BYTES || bytes < TILE_HEADER_BYTES)
        return tile_corrupt(id, "record bytes", bytes, TILE_HEADER_BYTES);
    if (memcmp(p, "CRNT", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u layer %u head %u: not a tile (magic %02x%02x%02x%02x)",
                          (unsigned long long)id.segment, id.block, id.layer, id.head, p[0], p[1], p[2], p[3]);
    if (cairn_get_le16(p + TILE_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "segment %llu block %u layer %u head %u: tile version %u",
                          (unsigned long long)id.segment, id.block, id.layer, id.head,
                          cairn_get_le16(p + TILE_VERSION));
    unsigned dtype = cairn_get_le16(p + TILE_DTYPE);
    uint32_t tokens = cairn_get_le16(p + TILE_TOKENS);
    uint32_t dim = cairn_get_le16(p + TILE_DIM);
    if (dtype > CAIRN_Q8) return tile_corrupt(id, "element type", dtype, (uint64_t)geometry->dtype);
    if (cairn_get_le16(p + TILE_LAYER) != id.layer)
        return tile_corrupt(id, "the record says layer", cairn_get_le16(p + TILE_LAYER), id.layer);
    if (cairn_get_le16(p + TILE_HEAD) != id.head)
        return tile_corrupt(id, "the record says head", cairn_get_le16(p + TILE_HEAD), id.head);
    if (tokens != geometry->block_tokens) return tile_corrupt(id, "tokens", tokens, geometry->block_tokens);
    if (dim != geometry->head_dim) return tile_corrupt(id, "head dim", dim, geometry->head_dim);
    size_t payload = cairn_tile_payload_bytes((cairn_dtype)dtype, tokens, dim);
    if (cairn_get_le64(p + TILE_PAYLOAD) != payload)
        return tile_corrupt(id, "payload bytes", cairn_get_le64(p + TILE_PAYLOAD), payload);
    if (cairn_get_le64(p + TILE_RESERVED) != 0)
        return tile_corrupt(id, "reserved", cairn_get_le64(p + TILE_RESERVED), 0);
    size_t whole = store_tile_bytes(page_bytes, (cairn_dtype)dtype, tokens, dim);
    if (bytes != whole) return tile_corrupt(id, "record bytes", bytes, whole);
    if (verify_hash) {
        assert(header_bytes == bytes);
        uint64_t hash = cairn_hash64_two(p, TILE_HASH, p + TILE_HEADER_BYTES, bytes - TILE_HEADER_BYTES);
        if (hash != cairn_get_le64(p + TILE_HASH))
            return cairn_fail(CAIRN_CORRUPT, "segment %llu block %u layer %u head %u: hash %016llx, expected %016llx",
                              (unsigned long long)id.segment, id.block, id.layer, id.head, (unsigned long long)hash,
                              (unsigned long long)cairn_get_le64(p + TILE_HASH));
    }
    if (out == NULL) return CAIRN_OK;

    size_t half = (size_t)tokens * dim * cairn_dtype_size((cairn_dtype)dtype); /* <= 4096 * 1024 * 4 */
    const uint8_t *keys = p + TILE_HEADER_BYTES;
    *out = (cairn_tile_view){.id = id,
                             .dtype = (cairn_dtype)dtype,
                             .tokens = tokens,
                             .head_dim = dim,
                             .first_token = cairn_get_le64(p + TILE_FIRST),
                             .keys = keys,
                             .values = keys + half};
    if (dtype == CAIRN_Q8) {
        /* head_dim is even, so 2 * T * D is a multiple of 4 and the scales are aligned when the payload is */
        out->key_scales = (const void *)(keys + 2 * half);
        out->value_scales = out->key_scales + dim;
    }
    return CAIRN_OK;
}

uint64_t store_tile_first_token(const void *record)
{
    return cairn_get_le64((const uint8_t *)record + TILE_FIRST);
}

cairn_status store_tile_check(const cairn_store *store, cairn_tile_id id, const void *record, size_t bytes,
                              bool verify_hash, cairn_tile_view *out)
{
    return store_tile_parse(&store->env->identity.geometry, store->env->data.page_bytes, id, record, bytes, bytes,
                            verify_hash, out);
}
