/* archive.c - any bytes as an export file that is imported into a store.
 *
 *   byte 0   bit 0: file size and header hash are put right first; bit 1: the hashes of all records; bit 2: the hash at
 *            the end
 *   then     the file
 *
 * What is refused leaves the store as it was: no context, no segment, nothing half there. What is accepted comes out of
 * the store again bit for bit, but for the times in the header and the model's name, which is then the store's; and the
 * store is sound. */
#include "fuzz.h"

#include "store_internal.h"
#include "support.h"

static const cairn_geometry geometry = {
    .layers = 2, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16};
static char *dir;
static cairn_store *store;

static void finish(void)
{
    cairn_store_close(store);
    test_remove_dir(dir);
}

static void begin(void)
{
    cairn_store_options opt;
    dir = test_make_dir();
    char *path = test_path(dir, "store");
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.no_sync = true;
    opt.map_bytes = 1 << 30;
    opt.geometry = geometry;
    opt.model = (cairn_model_id){.fingerprint = 0x1234, .name = "fuzz"};
    must(cairn_store_open(path, &opt, &store) == CAIRN_OK);
    free(path);
    atexit(finish);
}

static void put_right(uint8_t *file, size_t size, unsigned flags)
{
    if (size < 192) return;
    size_t header = cairn_get_le32(file + 12);
    if ((flags & 1) != 0) {
        cairn_put_le64(file + 16, size);
        if (header <= size) fuzz_seal(file, header, 184, 192);
    }
    const size_t parts[] = {store_tokens_bytes(&geometry), store_landmark_bytes(&geometry)};
    const size_t tile = store_tile_bytes(0, geometry.dtype, geometry.block_tokens, geometry.head_dim);
    const size_t tiles = (size_t)(geometry.layers - geometry.first_layer) * geometry.kv_heads;
    const size_t block = parts[0] + parts[1] + tiles * tile;
    if ((flags & 2) != 0 && header <= size)
        for (size_t at = header; size - at >= block + 16; at += block) {
            uint8_t *p = file + at;
            fuzz_seal(p, parts[0], 24, 32);
            fuzz_seal(p += parts[0], parts[1], 32, 48);
            p += parts[1];
            for (size_t i = 0; i < tiles; i++, p += tile) fuzz_seal(p, tile, 32, 48);
        }
    if ((flags & 4) != 0) cairn_put_le64(file + size - 8, cairn_hash64(file, size - 8));
}

static void check_same(const char *name, const uint8_t *file, size_t size)
{
    char path[300];
    snprintf(path, sizeof path, "%s/again", dir);
    must(cairn_context_export(store, name, path, NULL, NULL) == CAIRN_OK);
    FILE *f = fopen(path, "rb");
    uint8_t *again = malloc(size + 1);
    must(f != NULL && again != NULL);
    must(fread(again, 1, size + 1, f) == size);
    fclose(f);
    size_t header = cairn_get_le32(file + 12);
    must(memcmp(file, again, 56) == 0); /* the model's name follows: the fingerprint alone decides */
    must(memcmp(again + 56, cairn_store_model(store)->name, 64) == 0);
    must(memcmp(file + 120, again + 120, 136 - 120) == 0); /* created and modified follow */
    must(memcmp(file + 152, again + 152, 184 - 152) == 0);
    must(memcmp(file + 192, again + 192, header - 192) == 0);
    must(memcmp(file + header, again + header, size - header - 8) == 0);
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    if (store == NULL) begin();
    uint8_t *file = fuzz_copy(data + 1, size - 1);
    put_right(file, --size, data[0]);
    const char *path = fuzz_file(file, size);
    cairn_geometry g;
    cairn_model_id model;
    cairn_context_info info;
    cairn_store_stat stat;
    cairn_status peeked = cairn_export_peek(path, &g, &model, &info);
    cairn_status st = cairn_context_import(store, path, NULL, NULL, NULL);
    if (st == CAIRN_OK) {
        must(peeked == CAIRN_OK);
        check_same(info.name, file, size);
        must(cairn_store_verify(store, true, NULL, NULL, NULL, &(cairn_verify_report){0}) == CAIRN_OK);
        must(cairn_context_drop(store, info.name) == CAIRN_OK);
    }
    must(cairn_store_stat_get(store, &stat) == CAIRN_OK);
    must(stat.contexts == 0 && stat.segments == 0 && stat.blocks == 0 && stat.tiles == 0);
    free(file);
    return 0;
}
