/* archive_import.c - an exported context enters a store: all of it, checked, or nothing. */
#include "archive_internal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

/* Checks block `number` in `block`; the payloads are copied where asked. */
static cairn_status check_block(const archive *a, const char *path, uint32_t number, const uint8_t *block,
                                cairn_token *tokens, uint8_t *landmarks, uint8_t *tiles)
{
    const cairn_geometry *g = &a->geometry;
    const uint8_t *p = block;
    cairn_span payload;
    cairn_status st = store_tokens_check(g, 0, number, (cairn_span){p, a->tokens_bytes}, tokens);
    if (st != CAIRN_OK) return cairn_fail_within(st, "%s", path);
    p += a->tokens_bytes;
    st = store_landmark_check(g, 0, number, (cairn_span){p, a->landmark_bytes}, &payload);
    if (st != CAIRN_OK) return cairn_fail_within(st, "%s", path);
    if (landmarks != NULL) memcpy(landmarks, payload.data, payload.bytes);
    p += a->landmark_bytes;
    size_t tile_payload = a->tile_bytes - TILE_HEADER_BYTES;
    for (size_t i = 0; i < a->tiles; i++, p += a->tile_bytes) {
        cairn_tile_view view;
        st = store_tile_parse(g, 0, archive_tile(a, 0, number, i), p, a->tile_bytes, a->tile_bytes, true, &view);
        if (st != CAIRN_OK) return cairn_fail_within(st, "%s", path);
        if (view.dtype != g->dtype)
            return cairn_fail(CAIRN_CORRUPT, "%s: block %u: a tile of %s in a file of %s", path, number,
                              cairn_dtype_name(view.dtype), cairn_dtype_name(g->dtype));
        uint64_t first = (uint64_t)number * g->block_tokens;
        if (store_tile_first_token(p) != first)
            return cairn_fail(CAIRN_CORRUPT, "%s: block %u: a tile begins at token %" PRIu64 ", expected %" PRIu64,
                              path, number, store_tile_first_token(p), first);
        if (tiles != NULL) memcpy(tiles + i * tile_payload, p + TILE_HEADER_BYTES, tile_payload);
    }
    return CAIRN_OK;
}

/* The header's bytes again, for the hash over the whole: they must still be those that were decoded. */
static cairn_status begin_blocks(archive_source *s, const archive *a)
{
    uint8_t *twice = cairn_alloc_array(2, a->header_bytes);
    if (twice == NULL) return cairn_fail(CAIRN_NO_MEMORY, "header of %zu bytes", a->header_bytes);
    s->at = 0;
    cairn_status st = archive_read(s, twice, a->header_bytes);
    archive_encode_header(a, twice + a->header_bytes);
    if (st == CAIRN_OK && memcmp(twice, twice + a->header_bytes, a->header_bytes) != 0)
        st = cairn_fail(CAIRN_CORRUPT, "%s: the header holds what it should not", s->path);
    cairn_free(twice);
    return st;
}

static cairn_status check_end(archive_source *s)
{
    uint8_t end[ARCHIVE_END_BYTES];
    cairn_status st = archive_read(s, end, 8);
    uint64_t hash = cairn_hasher_value(s->hasher);
    if (st == CAIRN_OK) st = archive_read(s, end + 8, 8);
    if (st != CAIRN_OK) return st;
    if (memcmp(end, "CAIRNEND", 8) != 0 || hash != cairn_get_le64(end + 8))
        return cairn_fail(CAIRN_CORRUPT, "%s: hash over the whole %016" PRIx64 ", expected %016" PRIx64, s->path, hash,
                          cairn_get_le64(end + 8));
    return CAIRN_OK;
}

/* First walk: nothing enters the store before all of the file is known to be right. */
static cairn_status check_whole(archive_source *s, const archive *a)
{
    cairn_status st = CAIRN_OK;
    uint8_t *block = cairn_alloc(a->block_bytes);
    s->hasher = cairn_hasher_new();
    if (block == NULL || s->hasher == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "%s: a block of %zu bytes", s->path, a->block_bytes);
    if (st == CAIRN_OK) st = begin_blocks(s, a);
    for (uint64_t b = 0; b < a->info.blocks && st == CAIRN_OK; b++) {
        if ((st = archive_read(s, block, a->block_bytes)) != CAIRN_OK) break;
        if ((st = check_block(a, s->path, (uint32_t)b, block, NULL, NULL, NULL)) != CAIRN_OK) break;
        st = archive_report(s->progress, s->arg, s->done, s->total, s->path);
    }
    if (st == CAIRN_OK) st = check_end(s);
    cairn_hasher_free(s->hasher);
    s->hasher = NULL;
    cairn_free(block);
    return st;
}

/* Second walk: into a context of another name, so that `name` is there whole or not at all. What is copied is checked
 * again as it is read: the file may have changed in between. */
static cairn_status copy_blocks(archive_source *s, const archive *a, cairn_store *store, cairn_writer *writer)
{
    size_t group = ARCHIVE_BATCH_BYTES / a->block_bytes + 1;
    if (group > a->info.blocks) group = (size_t)a->info.blocks;
    size_t tiles_bytes = a->tiles * (a->tile_bytes - TILE_HEADER_BYTES);
    size_t landmark_bytes = a->landmark_bytes - LANDMARK_HEADER_BYTES;
    size_t C = a->geometry.block_tokens;
    cairn_status st = CAIRN_OK;
    cairn_block_data *data = cairn_alloc_array(group, sizeof *data);
    cairn_token *tokens = cairn_alloc_array(group, C * sizeof *tokens);
    uint8_t *landmarks = cairn_alloc_array(group, landmark_bytes);
    uint8_t *tiles = cairn_alloc_array(group, tiles_bytes);
    uint8_t *block = cairn_alloc(a->block_bytes);
    s->hasher = cairn_hasher_new();
    if (data == NULL || tokens == NULL || landmarks == NULL || tiles == NULL || block == NULL || s->hasher == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "%s: %zu blocks of %zu bytes", s->path, group, a->block_bytes);
    if (st == CAIRN_OK) st = begin_blocks(s, a);
    uint64_t left = a->info.blocks;
    for (size_t n = 0; left > 0 && st == CAIRN_OK; n = 0) {
        for (; n < group && left > 0 && st == CAIRN_OK; n++, left--) {
            data[n] = (cairn_block_data){tokens + n * C, landmarks + n * landmark_bytes, tiles + n * tiles_bytes};
            st = archive_read(s, block, a->block_bytes);
            if (st == CAIRN_OK)
                st = check_block(a, s->path, (uint32_t)(a->info.blocks - left), block, tokens + n * C,
                                 landmarks + n * landmark_bytes, tiles + n * tiles_bytes);
        }
        if (st == CAIRN_OK) st = cairn_writer_commit(writer, data, n, NULL, 0, NULL);
        store_trim_data(&store->env->data);
        if (st == CAIRN_OK) st = archive_report(s->progress, s->arg, s->done, s->total, s->path);
    }
    if (st == CAIRN_OK) st = check_end(s);
    if (st == CAIRN_OK) st = cairn_writer_commit(writer, NULL, 0, a->tail, a->info.tail_tokens, &a->info.input);
    cairn_hasher_free(s->hasher);
    s->hasher = NULL;
    cairn_free(data);
    cairn_free(tokens);
    cairn_free(landmarks);
    cairn_free(tiles);
    cairn_free(block);
    return st;
}

static cairn_status copy_into(cairn_store *store, archive_source *s, const archive *a, const char *name)
{
    char unfinished[64];
    uint64_t id;
    cairn_writer *writer = NULL;
    snprintf(unfinished, sizeof unfinished, ".import-%016" PRIx64, cairn_hash64(name, strlen(name)));
    cairn_status st = cairn_context_drop(store, unfinished); /* of an import that was killed */
    if (st != CAIRN_OK && st != CAIRN_NOT_FOUND) return st;
    if ((st = cairn_context_create(store, unfinished, &id)) != CAIRN_OK) return st;
    st = cairn_writer_begin(store, unfinished, &writer);
    if (st == CAIRN_OK) st = copy_blocks(s, a, store, writer);
    cairn_writer_end(writer);
    if (st == CAIRN_OK) st = cairn_context_rename(store, unfinished, name);
    if (st == CAIRN_OK) return st;
    char why[1024];
    snprintf(why, sizeof why, "%s", cairn_last_error());
    cairn_context_drop(store, unfinished); /* if even this fails, the next import of this name drops it */
    return cairn_fail(st, "%s", why);
}

static bool same_shape(const cairn_geometry *a, const cairn_geometry *b)
{
    return a->layers == b->layers && a->first_layer == b->first_layer && a->kv_heads == b->kv_heads &&
           a->head_dim == b->head_dim && a->block_tokens == b->block_tokens && a->dtype == b->dtype;
}

static cairn_status check_belongs(cairn_store *store, const char *path, const archive *a)
{
    const cairn_geometry *f = &a->geometry;
    const cairn_geometry *g = cairn_store_geometry(store);
    const cairn_model_id *model = cairn_store_model(store);
    if (!same_shape(f, g))
        return cairn_fail(CAIRN_MISMATCH,
                          "%s has layers %u..%u, %u KV heads of %u, blocks of %u, %s; the store %s has layers %u..%u, "
                          "%u KV heads of %u, blocks of %u, %s",
                          path, f->first_layer, f->layers - 1, f->kv_heads, f->head_dim, f->block_tokens,
                          cairn_dtype_name(f->dtype), cairn_store_path(store), g->first_layer, g->layers - 1,
                          g->kv_heads, g->head_dim, g->block_tokens, cairn_dtype_name(g->dtype));
    if (a->model.fingerprint != model->fingerprint)
        return cairn_fail(CAIRN_MISMATCH,
                          "%s was made with model '%s' (%016" PRIx64 "); the store %s belongs to '%s' (%016" PRIx64 ")",
                          path, a->model.name, a->model.fingerprint, cairn_store_path(store), model->name,
                          model->fingerprint);
    return CAIRN_OK;
}

static cairn_status check_free_name(cairn_store *store, const char *name)
{
    cairn_snapshot *snap;
    cairn_context_info info;
    cairn_status st = store_name_check(name);
    if (st != CAIRN_OK) return st;
    if ((st = cairn_snapshot_begin(store, &snap)) != CAIRN_OK) return st;
    st = cairn_snapshot_context(snap, name, &info);
    cairn_snapshot_end(snap);
    if (st == CAIRN_OK)
        return cairn_fail(CAIRN_EXISTS, "%s: there is a context '%s' already", cairn_store_path(store), name);
    return st == CAIRN_NOT_FOUND ? CAIRN_OK : st;
}

cairn_status cairn_context_import(cairn_store *store, const char *path, const char *name, archive_progress progress,
                                  void *arg)
{
    archive_source s = {.path = path, .fd = -1, .progress = progress, .arg = arg};
    archive *a = cairn_alloc(sizeof *a);
    if (a == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%s: header", path);
    cairn_status st = archive_open(path, &s.fd, a);
    if (st != CAIRN_OK) goto out;
    if (name == NULL) name = a->info.name;
    if ((st = check_belongs(store, path, a)) != CAIRN_OK) goto out;
    if ((st = check_free_name(store, name)) != CAIRN_OK) goto out;
    posix_fadvise(s.fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    s.total = 2 * a->file_bytes;
    if ((st = check_whole(&s, a)) != CAIRN_OK) goto out;
    st = copy_into(store, &s, a, name);
out:
    if (s.fd >= 0) close(s.fd);
    cairn_free(a);
    return st;
}
