/* records.c - any bytes as a record of the store.
 *
 *   byte 0   which record, and a context's name as the last kind
 *   byte 1   bit 0: the record's hash is put right first; bit 1: a tile without padding, as in an export file
 *   byte 2   which geometry
 *   then     the record
 *
 * What is accepted is all there, and encoding what was read gives the same bytes: nothing in a record is looked over.
 */
#include "fuzz.h"

#include "store_internal.h"

enum { IDENTITY, IDS, CONTEXT, SEGMENT, TOKENS, LANDMARK, TILE, NAME, KINDS };
enum { ID = 7, BLOCK = 3, LAYER = 1, HEAD = 1 };

static const cairn_geometry geometries[] = {
    {.layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16},
    {.layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 8, .block_tokens = 7, .dtype = CAIRN_Q8},
    {.layers = 2, .first_layer = 1, .kv_heads = 2, .head_dim = 6, .block_tokens = 3, .dtype = CAIRN_F32},
    {.layers = 4, .first_layer = 0, .kv_heads = 2, .head_dim = 2, .block_tokens = 1, .dtype = CAIRN_BF16},
};

static uint64_t sum(const void *data, size_t bytes) /* touches all of it */
{
    uint64_t total = 0;
    for (size_t i = 0; i < bytes; i++) total = total * 31 + ((const uint8_t *)data)[i];
    return total;
}

static void check_context(const cairn_geometry *g, cairn_span record)
{
    context_record c;
    if (store_context_decode(g, ID, record, &c) != CAIRN_OK) return;
    cairn_range *ranges = malloc(((size_t)c.range_count + 1) * sizeof *ranges);
    cairn_token *tail = malloc(((size_t)c.tail_count + 1) * sizeof *tail);
    uint8_t *again = malloc(record.bytes);
    must(ranges != NULL && tail != NULL && again != NULL);
    for (uint32_t i = 0; i < c.range_count; i++) ranges[i] = store_context_range(&c, i);
    for (uint32_t i = 0; i < c.tail_count; i++) tail[i] = store_context_tail(&c, i);
    must(store_context_bytes(c.name, c.range_count, c.tail_count) == record.bytes);
    store_context_encode(&c, ranges, c.range_count, tail, c.tail_count, again);
    must(memcmp(again, record.data, record.bytes) == 0);
    cairn_context_info info;
    store_context_info(g, &c, &info);
    must(strcmp(info.name, c.name) == 0);
    must(info.tokens == c.blocks * g->block_tokens + c.tail_count);
    free(ranges);
    free(tail);
    free(again);
}

static void check_tokens(const cairn_geometry *g, cairn_span record)
{
    cairn_token tokens[8];
    if (store_tokens_check(g, ID, BLOCK, record, tokens) != CAIRN_OK) return;
    uint8_t *again = malloc(record.bytes);
    must(again != NULL);
    store_tokens_encode(g, ID, BLOCK, tokens, again);
    must(memcmp(again, record.data, record.bytes) == 0);
    free(again);
}

static void check_landmark(const cairn_geometry *g, cairn_span record)
{
    cairn_span payload;
    if (store_landmark_check(g, ID, BLOCK, record, &payload) != CAIRN_OK) return;
    must(payload.bytes == cairn_landmark_payload_bytes(g));
    uint8_t *again = malloc(record.bytes);
    must(again != NULL);
    store_landmark_encode(g, ID, BLOCK, payload.data, again);
    must(memcmp(again, record.data, record.bytes) == 0);
    free(again);
}

static void check_tile(const cairn_geometry *g, uint32_t page, cairn_span record)
{
    const cairn_tile_id id = {.segment = ID, .block = BLOCK, .layer = LAYER, .head = HEAD};
    cairn_tile_view view;
    /* The header alone must not promise what only the whole record can hold. */
    if (store_tile_parse(g, page, id, record.data, record.bytes, record.bytes, false, &view) != CAIRN_OK) return;
    must(cairn_tile_payload_bytes(view.dtype, view.tokens, view.head_dim) + TILE_HEADER_BYTES <= record.bytes);
    size_t half = (size_t)view.tokens * view.head_dim * cairn_dtype_size(view.dtype);
    uint64_t seen = sum(view.keys, half) + sum(view.values, half);
    if (view.dtype == CAIRN_Q8) {
        must(view.key_scales != NULL && view.value_scales != NULL);
        seen += sum(view.key_scales, view.head_dim * sizeof(float));
        seen += sum(view.value_scales, view.tokens * sizeof(float));
    }
    must(seen != 1 || view.keys != NULL); /* keeps the loops */
    if (store_tile_parse(g, page, id, record.data, record.bytes, record.bytes, true, &view) != CAIRN_OK) return;
    /* A reader goes by the type in the tile's header: what is written again is a tile of that type. */
    cairn_geometry as = *g;
    as.dtype = view.dtype;
    uint8_t *again = malloc(record.bytes);
    must(again != NULL);
    store_tile_encode(&as, id, cairn_get_le64((const uint8_t *)record.data + 16), view.keys, again, record.bytes);
    size_t payload = TILE_HEADER_BYTES + cairn_tile_payload_bytes(view.dtype, view.tokens, view.head_dim);
    must(memcmp(again + 40, (const uint8_t *)record.data + 40, payload - 40) == 0);
    must(memcmp(again, record.data, 32) == 0);
    free(again);
}

static void check_name(const uint8_t *bytes, size_t size)
{
    char *name = malloc(size + 1);
    must(name != NULL);
    memcpy(name, bytes, size);
    name[size] = 0;
    if (store_name_check(name) == CAIRN_OK) {
        must(name[0] != 0 && strlen(name) <= CAIRN_NAME_MAX);
        for (const uint8_t *p = (const uint8_t *)name; *p != 0; p++) {
            must(*p >= 0x20 && *p != 0x7f && *p != 0xc0 && *p != 0xc1 && *p < 0xf5);
            must(*p != 0xc2 || p[1] >= 0xa0);
        }
    }
    free(name);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        size_t at, from;
    } hash[KINDS] = {[IDENTITY] = {128, 136}, [IDS] = {16, 24},      [CONTEXT] = {88, 96}, [SEGMENT] = {344, 352},
                     [TOKENS] = {24, 32},     [LANDMARK] = {32, 48}, [TILE] = {32, 48}};
    if (size < 3) return 0;
    unsigned kind = data[0] % KINDS;
    const cairn_geometry *g = &geometries[data[2] % (sizeof geometries / sizeof *geometries)];
    bool sealed = (data[1] & 1) != 0;
    uint32_t page = (data[1] & 2) != 0 ? 0 : 4096;
    uint8_t *record = fuzz_copy(data + 3, size - 3);
    cairn_span span = {record, size - 3};
    if (kind == NAME) {
        check_name(record, span.bytes);
        free(record);
        return 0;
    }
    if (sealed) fuzz_seal(record, span.bytes, hash[kind].at, hash[kind].from);

    store_identity identity;
    segment_record segment;
    uint64_t next[2];
    uint8_t again[SEGMENT_RECORD_BYTES];
    switch (kind) {
    case IDENTITY:
        if (store_identity_decode(span, &identity) != CAIRN_OK) break;
        must(store_geometry_check(&identity.geometry) == CAIRN_OK);
        store_identity_encode(&identity, again);
        must(memcmp(again, record, IDENTITY_RECORD_BYTES) == 0);
        break;
    case IDS:
        if (store_ids_decode(span, &next[0], &next[1]) != CAIRN_OK) break;
        store_ids_encode(next[0], next[1], again);
        must(memcmp(again, record, IDS_RECORD_BYTES) == 0);
        break;
    case SEGMENT:
        if (store_segment_decode(ID, span, &segment) != CAIRN_OK) break;
        store_segment_encode(&segment, again);
        must(memcmp(again, record, SEGMENT_RECORD_BYTES) == 0);
        break;
    case CONTEXT: check_context(g, span); break;
    case TOKENS: check_tokens(g, span); break;
    case LANDMARK: check_landmark(g, span); break;
    case TILE: check_tile(g, page, span); break;
    default: break;
    }
    free(record);
    return 0;
}
