/* records.c - keys and the small records: identity, ids, contexts, segments. Pictures here and in docs/format.md.
 *
 * All fields little-endian, all keys big-endian so that byte order is numeric order. A hash is XXH3-64. Decoders
 * treat their bytes as hostile: lengths first, then the hash, then every field against its limits. */
#include "store_internal.h"

#include <stdio.h>

const char *const store_db_names[DB_COUNT] = {"meta", "context", "name", "segment", "tokens", "landmark", "tile"};

void store_key_id(uint8_t key[KEY_ID_BYTES], uint64_t id)
{
    cairn_put_be64(key, id);
}

void store_key_block(uint8_t key[KEY_BLOCK_BYTES], uint64_t segment, uint32_t block)
{
    cairn_put_be64(key, segment);
    cairn_put_be32(key + 8, block);
}

void store_key_tile(uint8_t key[KEY_TILE_BYTES], cairn_tile_id id)
{
    cairn_put_be64(key, id.segment);
    cairn_put_be32(key + 8, id.block);
    cairn_put_be16(key + 12, id.layer);
    cairn_put_be16(key + 14, id.head);
}

cairn_tile_id store_key_tile_parse(const uint8_t key[KEY_TILE_BYTES])
{
    return (cairn_tile_id){.segment = cairn_get_be64(key),
                           .block = cairn_get_be32(key + 8),
                           .layer = cairn_get_be16(key + 12),
                           .head = cairn_get_be16(key + 14)};
}

/* Length of the UTF-8 sequence at s, 0 if it is not one (RFC 3629: no overlong forms, no surrogates, at most
 * U+10FFFF). A NUL ends the text, so a continuation byte is never read beyond it. */
static size_t utf8_length(const uint8_t *s, uint32_t *code)
{
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : 0;
    if (s[0] >= 0xf0 && s[0] <= 0xf4) n = 4;
    if (n == 0) return 0;
    uint32_t c = n == 1 ? s[0] : s[0] & (0xffu >> (n + 1));
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    if ((n == 3 && c < 0x800) || (n == 4 && c < 0x10000) || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) return 0;
    *code = c;
    return n;
}

cairn_status store_name_check(const char *name)
{
    if (name == NULL || name[0] == '\0') return cairn_fail(CAIRN_INVALID, "a context's name is empty");
    size_t bytes = strnlen(name, CAIRN_NAME_MAX + 1);
    if (bytes > CAIRN_NAME_MAX)
        return cairn_fail(CAIRN_INVALID, "context name '%.40s...' is longer than %d bytes", name, CAIRN_NAME_MAX);
    for (size_t i = 0, n; i < bytes; i += n) {
        uint32_t code = 0;
        n = utf8_length((const uint8_t *)name + i, &code);
        if (n == 0) return cairn_fail(CAIRN_INVALID, "a context's name is not UTF-8 at byte %zu", i);
        if (code < 0x20 || (code >= 0x7f && code < 0xa0))
            return cairn_fail(CAIRN_INVALID, "a context's name has the control character U+%04X at byte %zu", code, i);
    }
    return CAIRN_OK;
}

bool store_text_ends(const uint8_t *text, size_t cap)
{
    size_t n = strnlen((const char *)text, cap);
    if (n == cap) return false;
    for (size_t i = n; i < cap; i++)
        if (text[i] != 0) return false;
    return true;
}

void store_uuid_text(const uint8_t uuid[16], char text[37])
{
    size_t at = 0;
    for (size_t i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text[at++] = '-';
        snprintf(text + at, 3, "%02x", uuid[i]);
        at += 2;
    }
}

/* ---- identity: `meta` key "store", written once ----
 *
 *   offset  size   field
 *        0     4   magic         'C' 'R' 'N' 'S'
 *        4     4   format        1
 *        8     4   layers
 *       12     4   first_layer   layers below it have no landmark keys and no tiles
 *       16     4   kv_heads
 *       20     4   head_dim
 *       24     4   block_tokens
 *       28     4   dtype         0 = f32, 1 = f16, 2 = bf16, 3 = q8: of new tiles
 *       32     8   fingerprint   of the model; 0 = unknown
 *       40    64   model name    NUL-terminated, zeros after it
 *      104    16   uuid
 *      120     8   created       nanoseconds since 1970
 *      128     8   hash          over [0, 128)
 */
enum {
    ID_FORMAT = 4,
    ID_LAYERS = 8,
    ID_FIRST_LAYER = 12,
    ID_KV_HEADS = 16,
    ID_HEAD_DIM = 20,
    ID_BLOCK_TOKENS = 24,
    ID_DTYPE = 28,
    ID_FINGERPRINT = 32,
    ID_MODEL = 40,
    ID_UUID = 104,
    ID_CREATED = 120,
    ID_HASH = 128
};
static_assert(ID_HASH + 8 == IDENTITY_RECORD_BYTES, "picture and size");
static_assert(ID_MODEL + sizeof((cairn_model_id *)NULL)->name == ID_UUID, "picture and model name");

void store_identity_encode(const store_identity *identity, uint8_t out[IDENTITY_RECORD_BYTES])
{
    const cairn_geometry *g = &identity->geometry;
    memset(out, 0, IDENTITY_RECORD_BYTES);
    memcpy(out, "CRNS", 4);
    cairn_put_le32(out + ID_FORMAT, STORE_FORMAT);
    cairn_put_le32(out + ID_LAYERS, g->layers);
    cairn_put_le32(out + ID_FIRST_LAYER, g->first_layer);
    cairn_put_le32(out + ID_KV_HEADS, g->kv_heads);
    cairn_put_le32(out + ID_HEAD_DIM, g->head_dim);
    cairn_put_le32(out + ID_BLOCK_TOKENS, g->block_tokens);
    cairn_put_le32(out + ID_DTYPE, (uint32_t)g->dtype);
    cairn_put_le64(out + ID_FINGERPRINT, identity->model.fingerprint);
    size_t name = strnlen(identity->model.name, sizeof identity->model.name - 1);
    memcpy(out + ID_MODEL, identity->model.name, name);
    memcpy(out + ID_UUID, identity->uuid, sizeof identity->uuid);
    cairn_put_le64(out + ID_CREATED, identity->created_ns);
    cairn_put_le64(out + ID_HASH, cairn_hash64(out, ID_HASH));
}

cairn_status store_identity_decode(cairn_span bytes, store_identity *out)
{
    const uint8_t *p = bytes.data;
    memset(out, 0, sizeof *out);
    if (bytes.bytes < 8 || memcmp(p, "CRNS", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT, "store record: not one (%zu bytes)", bytes.bytes);
    uint32_t format = cairn_get_le32(p + ID_FORMAT);
    if (format != STORE_FORMAT)
        return cairn_fail(CAIRN_UNSUPPORTED, "store format %u; this library knows format %d", format, STORE_FORMAT);
    if (bytes.bytes != IDENTITY_RECORD_BYTES)
        return cairn_fail(CAIRN_CORRUPT, "store record: %zu bytes, expected %d", bytes.bytes, IDENTITY_RECORD_BYTES);
    uint64_t hash = cairn_hash64(p, ID_HASH);
    if (hash != cairn_get_le64(p + ID_HASH))
        return cairn_fail(CAIRN_CORRUPT, "store record: hash %016llx, expected %016llx", (unsigned long long)hash,
                          (unsigned long long)cairn_get_le64(p + ID_HASH));
    uint32_t dtype = cairn_get_le32(p + ID_DTYPE);
    if (dtype > CAIRN_Q8) return cairn_fail(CAIRN_CORRUPT, "store record: element type %u", dtype);
    out->geometry = (cairn_geometry){.layers = cairn_get_le32(p + ID_LAYERS),
                                     .first_layer = cairn_get_le32(p + ID_FIRST_LAYER),
                                     .kv_heads = cairn_get_le32(p + ID_KV_HEADS),
                                     .head_dim = cairn_get_le32(p + ID_HEAD_DIM),
                                     .block_tokens = cairn_get_le32(p + ID_BLOCK_TOKENS),
                                     .dtype = (cairn_dtype)dtype};
    if (store_geometry_check(&out->geometry) != CAIRN_OK) return cairn_fail_within(CAIRN_CORRUPT, "store record");
    if (!store_text_ends(p + ID_MODEL, sizeof out->model.name))
        return cairn_fail(CAIRN_CORRUPT, "store record: the model's name is not NUL-terminated with zeros after it");
    out->model.fingerprint = cairn_get_le64(p + ID_FINGERPRINT);
    memcpy(out->model.name, p + ID_MODEL, sizeof out->model.name);
    memcpy(out->uuid, p + ID_UUID, sizeof out->uuid);
    out->created_ns = cairn_get_le64(p + ID_CREATED);
    return CAIRN_OK;
}

/* ---- ids: `meta` key "ids" ----
 *
 *        0     8   next context id, from 1; never used twice
 *        8     8   next segment id, from 1; never used twice, so an index file's name never means two things
 *       16     8   hash over [0, 16)
 */
void store_ids_encode(uint64_t next_context, uint64_t next_segment, uint8_t out[IDS_RECORD_BYTES])
{
    cairn_put_le64(out, next_context);
    cairn_put_le64(out + 8, next_segment);
    cairn_put_le64(out + 16, cairn_hash64(out, 16));
}

cairn_status store_ids_decode(cairn_span bytes, uint64_t *next_context, uint64_t *next_segment)
{
    const uint8_t *p = bytes.data;
    if (bytes.bytes != IDS_RECORD_BYTES)
        return cairn_fail(CAIRN_CORRUPT, "ids record: %zu bytes, expected %d", bytes.bytes, IDS_RECORD_BYTES);
    uint64_t hash = cairn_hash64(p, 16);
    if (hash != cairn_get_le64(p + 16))
        return cairn_fail(CAIRN_CORRUPT, "ids record: hash %016llx, expected %016llx", (unsigned long long)hash,
                          (unsigned long long)cairn_get_le64(p + 16));
    *next_context = cairn_get_le64(p);
    *next_segment = cairn_get_le64(p + 8);
    if (*next_context == 0 || *next_segment == 0) return cairn_fail(CAIRN_CORRUPT, "ids record: an id of 0 is next");
    return CAIRN_OK;
}

/* ---- context: key context id ----
 *
 *   offset  size   field
 *        0     4   magic         'C' 'R' 'N' 'C'
 *        4     2   version       1
 *        6     2   name_bytes    N, 1..480
 *        8     8   id            as in the key
 *       16     8   parent        context it was forked from, 0 = none
 *       24     8   own_segment   segment it may extend, 0 = none yet
 *       32     8   created       nanoseconds since 1970
 *       40     8   modified
 *       48     8   input bytes   length of the whole input
 *       56     8   input hash    of the whole input, 0 = not known
 *       64     8   input tokens  committed so far, tail included
 *       72     4   flags         bit 0: the whole input is in
 *       76     4   ranges        R
 *       80     4   tail          T, tokens after the last whole block, < block_tokens
 *       84     4   reserved      0
 *       88     8   hash          over [0, 88) and [96, end)
 *       96  16*R   ranges        segment u64, first block u32, blocks u32, in stream order
 *        .   4*T   tail          token ids
 *        .     N   name          UTF-8
 */
enum {
    CTX_VERSION = 4,
    CTX_NAME_BYTES = 6,
    CTX_ID = 8,
    CTX_PARENT = 16,
    CTX_OWN = 24,
    CTX_CREATED = 32,
    CTX_MODIFIED = 40,
    CTX_INPUT_BYTES = 48,
    CTX_INPUT_HASH = 56,
    CTX_INPUT_TOKENS = 64,
    CTX_FLAGS = 72,
    CTX_RANGES = 76,
    CTX_TAIL = 80,
    CTX_RESERVED = 84,
    CTX_HASH = 88,
    CTX_HEADER = 96,
    RANGE_BYTES = 16
};
static_assert(CTX_HASH + 8 == CTX_HEADER, "picture and header");

size_t store_context_bytes(const char *name, size_t ranges, size_t tail)
{
    size_t a, b, sum;
    if (!cairn_mul_size(ranges, RANGE_BYTES, &a) || !cairn_mul_size(tail, 4, &b)) return 0;
    if (!cairn_add_size(a, b, &sum) || !cairn_add_size(sum, CTX_HEADER + strlen(name), &sum)) return 0;
    return sum;
}

void store_context_encode(const context_record *record, const cairn_range *ranges, uint32_t range_count,
                          const cairn_token *tail, uint32_t tail_count, uint8_t *out)
{
    size_t name = strlen(record->name);
    assert(name <= CAIRN_NAME_MAX);
    memset(out, 0, CTX_HEADER);
    memcpy(out, "CRNC", 4);
    cairn_put_le16(out + CTX_VERSION, 1);
    cairn_put_le16(out + CTX_NAME_BYTES, (uint16_t)name);
    cairn_put_le64(out + CTX_ID, record->id);
    cairn_put_le64(out + CTX_PARENT, record->parent);
    cairn_put_le64(out + CTX_OWN, record->own_segment);
    cairn_put_le64(out + CTX_CREATED, record->created_ns);
    cairn_put_le64(out + CTX_MODIFIED, record->modified_ns);
    cairn_put_le64(out + CTX_INPUT_BYTES, record->input.bytes);
    cairn_put_le64(out + CTX_INPUT_HASH, record->input.hash);
    cairn_put_le64(out + CTX_INPUT_TOKENS, record->input.done_tokens);
    cairn_put_le32(out + CTX_FLAGS, record->input.complete ? 1 : 0);
    cairn_put_le32(out + CTX_RANGES, range_count);
    cairn_put_le32(out + CTX_TAIL, tail_count);
    uint8_t *p = out + CTX_HEADER;
    for (uint32_t i = 0; i < range_count; i++, p += RANGE_BYTES) {
        cairn_put_le64(p, ranges[i].segment);
        cairn_put_le32(p + 8, ranges[i].first);
        cairn_put_le32(p + 12, ranges[i].count);
    }
    for (uint32_t i = 0; i < tail_count; i++, p += 4) cairn_put_le32(p, (uint32_t)tail[i]);
    memcpy(p, record->name, name);
    p += name;
    cairn_put_le64(out + CTX_HASH, cairn_hash64_two(out, CTX_HASH, out + CTX_HEADER, (size_t)(p - out) - CTX_HEADER));
}

cairn_range store_context_range(const context_record *record, uint32_t i)
{
    assert(i < record->range_count);
    const uint8_t *p = record->range_data + (size_t)i * RANGE_BYTES;
    return (cairn_range){.segment = cairn_get_le64(p), .first = cairn_get_le32(p + 8), .count = cairn_get_le32(p + 12)};
}

cairn_token store_context_tail(const context_record *record, uint32_t i)
{
    assert(i < record->tail_count);
    return (cairn_token)cairn_get_le32(record->tail_data + (size_t)i * 4);
}

cairn_status store_context_decode(const cairn_geometry *geometry, uint64_t id, cairn_span bytes, context_record *out)
{
    unsigned long long n = id; /* for messages */
    const uint8_t *p = bytes.data;
    memset(out, 0, sizeof *out);
    if (bytes.bytes < CTX_HEADER || memcmp(p, "CRNC", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT, "context %llu: not a context record (%zu bytes)", n, bytes.bytes);
    if (cairn_get_le16(p + CTX_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "context %llu: record version %u", n, cairn_get_le16(p + CTX_VERSION));
    size_t name = cairn_get_le16(p + CTX_NAME_BYTES);
    uint32_t ranges = cairn_get_le32(p + CTX_RANGES);
    uint32_t tail = cairn_get_le32(p + CTX_TAIL);
    /* 16 * 2^32 + 4 * 2^32 + 2^16 + 96 < 2^37: no overflow in 64 bits */
    size_t whole = CTX_HEADER + (size_t)ranges * RANGE_BYTES + (size_t)tail * 4 + name;
    if (bytes.bytes != whole)
        return cairn_fail(CAIRN_CORRUPT,
                          "context %llu: %zu bytes, but %u ranges, %u tail tokens and a name of %zu make %zu", n,
                          bytes.bytes, ranges, tail, name, whole);
    uint64_t hash = cairn_hash64_two(p, CTX_HASH, p + CTX_HEADER, whole - CTX_HEADER);
    if (hash != cairn_get_le64(p + CTX_HASH))
        return cairn_fail(CAIRN_CORRUPT, "context %llu: hash %016llx, expected %016llx", n, (unsigned long long)hash,
                          (unsigned long long)cairn_get_le64(p + CTX_HASH));
    if (cairn_get_le64(p + CTX_ID) != id)
        return cairn_fail(CAIRN_CORRUPT, "context %llu: the record says it is context %llu", n,
                          (unsigned long long)cairn_get_le64(p + CTX_ID));
    if (cairn_get_le32(p + CTX_FLAGS) > 1 || cairn_get_le32(p + CTX_RESERVED) != 0)
        return cairn_fail(CAIRN_UNSUPPORTED, "context %llu: unknown flags %08x", n, cairn_get_le32(p + CTX_FLAGS));
    if (name > CAIRN_NAME_MAX) return cairn_fail(CAIRN_CORRUPT, "context %llu: a name of %zu bytes", n, name);
    if (tail >= geometry->block_tokens)
        return cairn_fail(CAIRN_CORRUPT, "context %llu: a tail of %u tokens, blocks have %u", n, tail,
                          geometry->block_tokens);

    out->id = id;
    out->parent = cairn_get_le64(p + CTX_PARENT);
    out->own_segment = cairn_get_le64(p + CTX_OWN);
    out->created_ns = cairn_get_le64(p + CTX_CREATED);
    out->modified_ns = cairn_get_le64(p + CTX_MODIFIED);
    out->input = (cairn_input){.bytes = cairn_get_le64(p + CTX_INPUT_BYTES),
                               .hash = cairn_get_le64(p + CTX_INPUT_HASH),
                               .done_tokens = cairn_get_le64(p + CTX_INPUT_TOKENS),
                               .complete = cairn_get_le32(p + CTX_FLAGS) == 1};
    out->range_count = ranges;
    out->tail_count = tail;
    out->range_data = p + CTX_HEADER;
    out->tail_data = out->range_data + (size_t)ranges * RANGE_BYTES;
    memcpy(out->name, out->tail_data + (size_t)tail * 4, name);
    if (strlen(out->name) != name || store_name_check(out->name) != CAIRN_OK)
        return cairn_fail(CAIRN_CORRUPT, "context %llu: its name is not one", n);
    for (uint32_t i = 0; i < ranges; i++) {
        cairn_range r = store_context_range(out, i);
        if (r.segment == 0 || r.count == 0 || r.count > UINT32_MAX - r.first)
            return cairn_fail(CAIRN_CORRUPT, "context %llu range %u: %u blocks from block %u of segment %llu", n, i,
                              r.count, r.first, (unsigned long long)r.segment);
        out->blocks += r.count; /* < 2^32 * 2^32 */
    }
    if (out->blocks > UINT64_MAX / 2 / geometry->block_tokens)
        return cairn_fail(CAIRN_CORRUPT, "context %llu: %llu blocks", n, (unsigned long long)out->blocks);
    for (uint32_t i = 0; i < tail; i++)
        if (store_context_tail(out, i) < 0)
            return cairn_fail(CAIRN_CORRUPT, "context %llu: tail token %u is %d", n, i, store_context_tail(out, i));
    return CAIRN_OK;
}

/* ---- segment: key segment id ----
 *
 *   offset  size   field
 *        0     4   magic         'C' 'R' 'N' 'G'
 *        4     2   version       1
 *        6     2   state         0 = open, 1 = sealed (nobody extends it), 2 = dying (being freed)
 *        8     8   id            as in the key
 *       16     8   owner         context that extends it while open, else 0
 *       24     4   blocks
 *       28     4   references    ranges that name it, over all contexts
 *       32     8   generation    of its index files, 0 = none were ever made
 *       40     4   index_blocks  blocks [0, index_blocks) are in the files
 *       44     4   reserved      0
 *       48     8   index_hash    over all files of this generation, in order
 *       56    64   index_kind    asked for; NUL-terminated, zeros after it
 *      120    64   index_made    built
 *      184   160   index_why     one sentence
 *      344     8   hash          over [0, 344)
 */
enum {
    SEG_VERSION = 4,
    SEG_STATE = 6,
    SEG_ID = 8,
    SEG_OWNER = 16,
    SEG_BLOCKS = 24,
    SEG_REFERENCES = 28,
    SEG_GENERATION = 32,
    SEG_INDEX_BLOCKS = 40,
    SEG_RESERVED = 44,
    SEG_INDEX_HASH = 48,
    SEG_KIND = 56,
    SEG_MADE = 120,
    SEG_WHY = 184,
    SEG_HASH = 344
};
static_assert(SEG_HASH + 8 == SEGMENT_RECORD_BYTES, "picture and size");
static_assert(SEG_KIND + sizeof((cairn_segment_info *)NULL)->index_kind == SEG_MADE, "picture and index_kind");
static_assert(SEG_MADE + sizeof((cairn_segment_info *)NULL)->index_made == SEG_WHY, "picture and index_made");
static_assert(SEG_WHY + sizeof((cairn_segment_info *)NULL)->index_why == SEG_HASH, "picture and index_why");

static void put_text(uint8_t *out, const char *text, size_t cap)
{
    memcpy(out, text, strnlen(text, cap - 1)); /* `out` was zeroed */
}

void store_segment_encode(const segment_record *record, uint8_t out[SEGMENT_RECORD_BYTES])
{
    const cairn_segment_info *info = &record->info;
    memset(out, 0, SEGMENT_RECORD_BYTES);
    memcpy(out, "CRNG", 4);
    cairn_put_le16(out + SEG_VERSION, 1);
    cairn_put_le16(out + SEG_STATE, (uint16_t)record->state);
    cairn_put_le64(out + SEG_ID, info->id);
    cairn_put_le64(out + SEG_OWNER, record->owner);
    cairn_put_le32(out + SEG_BLOCKS, info->blocks);
    cairn_put_le32(out + SEG_REFERENCES, info->references);
    cairn_put_le64(out + SEG_GENERATION, info->generation);
    cairn_put_le32(out + SEG_INDEX_BLOCKS, info->index_blocks);
    cairn_put_le64(out + SEG_INDEX_HASH, info->index_hash);
    put_text(out + SEG_KIND, info->index_kind, sizeof info->index_kind);
    put_text(out + SEG_MADE, info->index_made, sizeof info->index_made);
    put_text(out + SEG_WHY, info->index_why, sizeof info->index_why);
    cairn_put_le64(out + SEG_HASH, cairn_hash64(out, SEG_HASH));
}

cairn_status store_segment_decode(uint64_t id, cairn_span bytes, segment_record *out)
{
    unsigned long long n = id;
    const uint8_t *p = bytes.data;
    memset(out, 0, sizeof *out);
    if (bytes.bytes < 8 || memcmp(p, "CRNG", 4) != 0)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: not a segment record (%zu bytes)", n, bytes.bytes);
    if (cairn_get_le16(p + SEG_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "segment %llu: record version %u", n, cairn_get_le16(p + SEG_VERSION));
    if (bytes.bytes != SEGMENT_RECORD_BYTES)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: %zu bytes, expected %d", n, bytes.bytes, SEGMENT_RECORD_BYTES);
    uint64_t hash = cairn_hash64(p, SEG_HASH);
    if (hash != cairn_get_le64(p + SEG_HASH))
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: hash %016llx, expected %016llx", n, (unsigned long long)hash,
                          (unsigned long long)cairn_get_le64(p + SEG_HASH));
    if (cairn_get_le64(p + SEG_ID) != id)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: the record says it is segment %llu", n,
                          (unsigned long long)cairn_get_le64(p + SEG_ID));
    unsigned state = cairn_get_le16(p + SEG_STATE);
    if (state > SEGMENT_DYING || cairn_get_le32(p + SEG_RESERVED) != 0)
        return cairn_fail(CAIRN_UNSUPPORTED, "segment %llu: unknown state %u", n, state);
    if (!store_text_ends(p + SEG_KIND, SEG_MADE - SEG_KIND) || !store_text_ends(p + SEG_MADE, SEG_WHY - SEG_MADE) ||
        !store_text_ends(p + SEG_WHY, SEG_HASH - SEG_WHY))
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: a text of its index is not NUL-terminated with zeros after it",
                          n);

    cairn_segment_info *info = &out->info;
    out->state = (segment_state)state;
    out->owner = cairn_get_le64(p + SEG_OWNER);
    info->id = id;
    info->blocks = cairn_get_le32(p + SEG_BLOCKS);
    info->references = cairn_get_le32(p + SEG_REFERENCES);
    info->generation = cairn_get_le64(p + SEG_GENERATION);
    info->index_blocks = cairn_get_le32(p + SEG_INDEX_BLOCKS);
    info->index_hash = cairn_get_le64(p + SEG_INDEX_HASH);
    memcpy(info->index_kind, p + SEG_KIND, sizeof info->index_kind);
    memcpy(info->index_made, p + SEG_MADE, sizeof info->index_made);
    memcpy(info->index_why, p + SEG_WHY, sizeof info->index_why);
    if (info->index_blocks > info->blocks)
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: %u of %u blocks are indexed", n, info->index_blocks,
                          info->blocks);
    if ((state == SEGMENT_OPEN) != (out->owner != 0) || (state == SEGMENT_DYING) != (info->references == 0))
        return cairn_fail(CAIRN_CORRUPT, "segment %llu: state %u, owner %llu and %u references do not agree", n, state,
                          (unsigned long long)out->owner, info->references);
    return CAIRN_OK;
}
