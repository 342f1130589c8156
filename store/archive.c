/* archive.c - one context as one file, to carry it to another store.
 *
 * Export file, format 1. Little-endian.
 *
 *   offset  size   field
 *        0     8   magic         "CAIRNEXP"
 *        8     4   version       1
 *       12     4   header bytes  H: the blocks begin there; a multiple of 64
 *       16     8   file bytes    H + blocks * block bytes + 16
 *       24     4   layers
 *       28     4   first_layer
 *       32     4   kv_heads
 *       36     4   head_dim
 *       40     4   block_tokens  C
 *       44     4   dtype
 *       48     8   fingerprint   of the model
 *       56    64   model name    NUL-terminated, zeros after it; for messages, no part of the identity
 *      120     8   blocks
 *      128     4   tail          T, tokens after the last whole block, < C
 *      132     4   name bytes    N, 1..480
 *      136     8   created       nanoseconds since 1970
 *      144     8   modified
 *      152     8   input bytes   length of what was ingested
 *      160     8   input hash    XXH3-64 of it, 0 = not known
 *      168     4   flags         bit 0: the whole input is in
 *      172     4   reserved      0
 *      176     8   block bytes
 *      184     8   hash          XXH3-64 over [0, 184) and [192, H)
 *      192   4*T   tail          token ids
 *        .     N   name          UTF-8, then zeros up to H
 *
 * Each block: its tokens record, its landmark record, its tile records by layer and head, back to back. They are the
 * store's own records (tile.c), as of segment 0 with the block's number in the context, and tiles carry no padding.
 * The end: "CAIRNEND", then XXH3-64 over everything before it.
 *
 * Every length is known from the geometry, so a file is the right size or refused before anything else is read. */
#include "archive_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    EXP_VERSION = 8,
    EXP_HEADER = 12,
    EXP_FILE = 16,
    EXP_GEOMETRY = 24,
    EXP_FINGERPRINT = 48,
    EXP_MODEL = 56,
    EXP_BLOCKS = 120,
    EXP_TAIL = 128,
    EXP_NAME = 132,
    EXP_CREATED = 136,
    EXP_MODIFIED = 144,
    EXP_INPUT_BYTES = 152,
    EXP_INPUT_HASH = 160,
    EXP_FLAGS = 168,
    EXP_RESERVED = 172,
    EXP_BLOCK_BYTES = 176,
    EXP_HASH = 184,
    EXP_FIXED = 192,
    EXP_HEADER_MAX = 192 + 4 * 4095 + CAIRN_NAME_MAX + 64 /* the longest tail and name */
};
static_assert(EXP_MODEL + sizeof((cairn_model_id *)NULL)->name == EXP_BLOCKS, "picture and model name");

/* Sizes of the parts of a block. False if they overflow. */
static bool measure(archive *a)
{
    const cairn_geometry *g = &a->geometry;
    a->tokens_bytes = store_tokens_bytes(g);
    a->landmark_bytes = store_landmark_bytes(g);
    a->tile_bytes = store_tile_bytes(0, g->dtype, g->block_tokens, g->head_dim);
    a->tiles = (size_t)(g->layers - g->first_layer) * g->kv_heads;
    size_t tiles;
    return cairn_mul_size(a->tiles, a->tile_bytes, &tiles) &&
           cairn_add_size(a->tokens_bytes + a->landmark_bytes, tiles, &a->block_bytes);
}

static bool whole_bytes(const archive *a, uint64_t *out)
{
    uint64_t blocks;
    return !__builtin_mul_overflow(a->info.blocks, (uint64_t)a->block_bytes, &blocks) &&
           !__builtin_add_overflow(blocks, (uint64_t)a->header_bytes + ARCHIVE_END_BYTES, out) && *out <= INT64_MAX;
}

cairn_tile_id archive_tile(const archive *a, uint64_t segment, uint32_t block, size_t i)
{
    return (cairn_tile_id){.segment = segment,
                           .block = block,
                           .layer = (uint16_t)(a->geometry.first_layer + i / a->geometry.kv_heads),
                           .head = (uint16_t)(i % a->geometry.kv_heads)};
}

/* ---- header ---- */

void archive_encode_header(const archive *a, uint8_t *out) /* header_bytes */
{
    const cairn_context_info *info = &a->info;
    const uint32_t shape[6] = {a->geometry.layers,   a->geometry.first_layer,  a->geometry.kv_heads,
                               a->geometry.head_dim, a->geometry.block_tokens, (uint32_t)a->geometry.dtype};
    memset(out, 0, a->header_bytes);
    memcpy(out, "CAIRNEXP", 8);
    cairn_put_le32(out + EXP_VERSION, 1);
    cairn_put_le32(out + EXP_HEADER, (uint32_t)a->header_bytes);
    cairn_put_le64(out + EXP_FILE, a->file_bytes);
    for (size_t i = 0; i < 6; i++) cairn_put_le32(out + EXP_GEOMETRY + 4 * i, shape[i]);
    cairn_put_le64(out + EXP_FINGERPRINT, a->model.fingerprint);
    memcpy(out + EXP_MODEL, a->model.name, strnlen(a->model.name, sizeof a->model.name - 1));
    cairn_put_le64(out + EXP_BLOCKS, info->blocks);
    cairn_put_le32(out + EXP_TAIL, info->tail_tokens);
    cairn_put_le32(out + EXP_NAME, (uint32_t)strlen(info->name));
    cairn_put_le64(out + EXP_CREATED, info->created_ns);
    cairn_put_le64(out + EXP_MODIFIED, info->modified_ns);
    cairn_put_le64(out + EXP_INPUT_BYTES, info->input.bytes);
    cairn_put_le64(out + EXP_INPUT_HASH, info->input.hash);
    cairn_put_le32(out + EXP_FLAGS, info->input.complete ? 1 : 0);
    cairn_put_le64(out + EXP_BLOCK_BYTES, a->block_bytes);
    uint8_t *p = out + EXP_FIXED;
    for (uint32_t i = 0; i < info->tail_tokens; i++, p += 4) cairn_put_le32(p, (uint32_t)a->tail[i]);
    memcpy(p, info->name, strlen(info->name));
    cairn_put_le64(out + EXP_HASH, cairn_hash64_two(out, EXP_HASH, out + EXP_FIXED, a->header_bytes - EXP_FIXED));
}

/* `have` bytes of the file's beginning, of `size` in all. */
static cairn_status decode_header(const char *path, const uint8_t *p, size_t have, uint64_t size, archive *a)
{
    cairn_geometry *g = &a->geometry;
    cairn_context_info *info = &a->info;
    memset(a, 0, sizeof *a);
    if (have < EXP_FIXED || memcmp(p, "CAIRNEXP", 8) != 0)
        return cairn_fail(CAIRN_INVALID, "%s: not an exported context", path);
    if (cairn_get_le32(p + EXP_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "%s: export format %u, this is a reader of format 1", path,
                          cairn_get_le32(p + EXP_VERSION));
    a->header_bytes = cairn_get_le32(p + EXP_HEADER);
    a->file_bytes = cairn_get_le64(p + EXP_FILE);
    if (a->file_bytes != size)
        return cairn_fail(CAIRN_CORRUPT, "%s: %" PRIu64 " bytes, the header says %" PRIu64, path, size, a->file_bytes);
    if (a->header_bytes < EXP_FIXED || a->header_bytes > have || a->header_bytes % 64 != 0)
        return cairn_fail(CAIRN_CORRUPT, "%s: a header of %zu bytes", path, a->header_bytes);
    uint64_t hash = cairn_hash64_two(p, EXP_HASH, p + EXP_FIXED, a->header_bytes - EXP_FIXED);
    if (hash != cairn_get_le64(p + EXP_HASH))
        return cairn_fail(CAIRN_CORRUPT, "%s: header hash %016" PRIx64 ", expected %016" PRIx64, path, hash,
                          cairn_get_le64(p + EXP_HASH));
    if (cairn_get_le32(p + EXP_FLAGS) > 1 || cairn_get_le32(p + EXP_RESERVED) != 0)
        return cairn_fail(CAIRN_UNSUPPORTED, "%s: unknown flags %08x", path, cairn_get_le32(p + EXP_FLAGS));

    uint32_t *const shape[5] = {&g->layers, &g->first_layer, &g->kv_heads, &g->head_dim, &g->block_tokens};
    for (size_t i = 0; i < 5; i++) *shape[i] = cairn_get_le32(p + EXP_GEOMETRY + 4 * i);
    uint32_t dtype = cairn_get_le32(p + EXP_GEOMETRY + 20);
    if (dtype > CAIRN_Q8) return cairn_fail(CAIRN_CORRUPT, "%s: unknown element type %u", path, dtype);
    g->dtype = (cairn_dtype)dtype;
    if (store_geometry_check(g) != CAIRN_OK) return cairn_fail_within(CAIRN_CORRUPT, "%s", path);
    a->model.fingerprint = cairn_get_le64(p + EXP_FINGERPRINT);
    memcpy(a->model.name, p + EXP_MODEL, sizeof a->model.name);
    if (!store_text_ends(p + EXP_MODEL, sizeof a->model.name))
        return cairn_fail(CAIRN_CORRUPT, "%s: the model's name is not NUL-terminated with zeros after it", path);

    info->blocks = cairn_get_le64(p + EXP_BLOCKS);
    info->tail_tokens = cairn_get_le32(p + EXP_TAIL);
    info->created_ns = cairn_get_le64(p + EXP_CREATED);
    info->modified_ns = cairn_get_le64(p + EXP_MODIFIED);
    info->input = (cairn_input){.bytes = cairn_get_le64(p + EXP_INPUT_BYTES),
                                .hash = cairn_get_le64(p + EXP_INPUT_HASH),
                                .complete = cairn_get_le32(p + EXP_FLAGS) == 1};
    size_t name = cairn_get_le32(p + EXP_NAME);
    if (info->tail_tokens >= g->block_tokens || name > CAIRN_NAME_MAX ||
        EXP_FIXED + 4 * (size_t)info->tail_tokens + name > a->header_bytes)
        return cairn_fail(CAIRN_CORRUPT, "%s: a tail of %u tokens and a name of %zu bytes in a header of %zu", path,
                          info->tail_tokens, name, a->header_bytes);
    uint64_t whole;
    if (info->blocks > UINT32_MAX || !measure(a) || cairn_get_le64(p + EXP_BLOCK_BYTES) != a->block_bytes ||
        !whole_bytes(a, &whole) || whole != size)
        return cairn_fail(CAIRN_CORRUPT, "%s: %" PRIu64 " blocks of %zu bytes do not make %" PRIu64, path, info->blocks,
                          a->block_bytes, size);
    info->tokens = info->blocks * g->block_tokens + info->tail_tokens; /* < 2^32 * 2^12 + 2^12 */
    info->input.done_tokens = info->tokens;
    for (uint32_t i = 0; i < info->tail_tokens; i++) {
        a->tail[i] = (cairn_token)cairn_get_le32(p + EXP_FIXED + 4 * (size_t)i);
        if (a->tail[i] < 0) return cairn_fail(CAIRN_CORRUPT, "%s: tail token %u is %d", path, i, a->tail[i]);
    }
    memcpy(info->name, p + EXP_FIXED + 4 * (size_t)info->tail_tokens, name);
    if (strlen(info->name) != name || store_name_check(info->name) != CAIRN_OK)
        return cairn_fail(CAIRN_CORRUPT, "%s: the context's name is not one", path);
    return CAIRN_OK;
}

/* ---- a file being read ---- */

cairn_status archive_read(archive_source *s, void *out, size_t bytes)
{
    for (size_t got = 0; got < bytes;) {
        ssize_t n = pread(s->fd, (char *)out + got, bytes - got, (off_t)(s->at + got));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            cairn_fail_errno(errno, "%s: reading at %" PRIu64, s->path, s->at + got);
            return CAIRN_IO;
        }
        if (n == 0) return cairn_fail(CAIRN_CORRUPT, "%s: the file ends at %" PRIu64, s->path, s->at + got);
        got += (size_t)n;
    }
    s->at += bytes;
    s->done += bytes;
    if (s->hasher != NULL) cairn_hasher_add(s->hasher, out, bytes);
    return CAIRN_OK;
}

cairn_status archive_report(archive_progress progress, void *arg, uint64_t done, uint64_t total, const char *what)
{
    if (progress == NULL || progress(arg, done, total)) return CAIRN_OK;
    return cairn_fail(CAIRN_CANCELLED, "%s: stopped after %" PRIu64 " of %" PRIu64 " bytes", what, done, total);
}

cairn_status archive_open(const char *path, int *fd, archive *a)
{
    struct stat st;
    cairn_status status = CAIRN_OK;
    uint8_t *head = NULL;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hang us before it is refused */
    if (*fd < 0) return cairn_fail_errno(errno, "%s", path);
    if (fstat(*fd, &st) != 0) {
        status = cairn_fail_errno(errno, "%s", path);
        goto out;
    }
    if (!S_ISREG(st.st_mode)) {
        status = cairn_fail(CAIRN_INVALID, "%s: not a regular file", path);
        goto out;
    }
    size_t have = st.st_size < EXP_HEADER_MAX ? (size_t)st.st_size : EXP_HEADER_MAX;
    if ((head = cairn_alloc(have)) == NULL) {
        status = cairn_fail(CAIRN_NO_MEMORY, "%s: header of %zu bytes", path, have);
        goto out;
    }
    archive_source s = {.path = path, .fd = *fd};
    if ((status = archive_read(&s, head, have)) != CAIRN_OK) goto out;
    status = decode_header(path, head, have, (uint64_t)st.st_size, a);
out:
    cairn_free(head);
    if (status != CAIRN_OK) {
        close(*fd);
        *fd = -1;
    }
    return status;
}

cairn_status cairn_export_peek(const char *path, cairn_geometry *geometry, cairn_model_id *model,
                               cairn_context_info *info)
{
    int fd;
    archive *a = cairn_alloc(sizeof *a);
    if (a == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%s: header", path);
    cairn_status st = archive_open(path, &fd, a);
    if (st == CAIRN_OK) {
        close(fd);
        if (geometry != NULL) *geometry = a->geometry;
        if (model != NULL) *model = a->model;
        if (info != NULL) *info = a->info;
    }
    cairn_free(a);
    return st;
}

/* ---- export ---- */

typedef struct sink {
    const char *path;
    int fd;
    cairn_hasher *hasher;
    uint64_t done;
} sink;

static cairn_status write_all(sink *s, const void *data, size_t bytes)
{
    for (size_t put = 0; put < bytes;) {
        ssize_t n = write(s->fd, (const char *)data + put, bytes - put);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return cairn_fail_errno(n < 0 ? errno : EIO, "%s: writing at %" PRIu64, s->path, s->done + put);
        put += (size_t)n;
    }
    cairn_hasher_add(s->hasher, data, bytes);
    s->done += bytes;
    return CAIRN_OK;
}

/* What is read of one block at a time, and where it is put together. */
typedef struct exporter {
    const archive *a;
    cairn_snapshot *snap;
    cairn_fetch *fetch;
    cairn_tile_id *ids;
    cairn_tile_view *views;
    size_t batch; /* tiles a fetch takes */
    cairn_token *tokens;
    uint8_t *block;
} exporter;

typedef struct landmark_copy {
    const archive *a;
    uint32_t number;
    uint8_t *out;
} landmark_copy;

static bool copy_landmark(void *arg, uint32_t block, cairn_span payload)
{
    landmark_copy *copy = arg;
    (void)block, (void)payload.bytes;
    store_landmark_encode(&copy->a->geometry, 0, copy->number, payload.data, copy->out);
    return true;
}

/* Block `block` of `segment`, as block `number` of the context. */
static cairn_status export_block(exporter *x, uint64_t segment, uint32_t block, uint32_t number)
{
    const archive *a = x->a;
    const cairn_geometry *g = &a->geometry;
    uint8_t *p = x->block;
    cairn_status st = cairn_snapshot_tokens(x->snap, segment, block, 1, x->tokens);
    if (st != CAIRN_OK) return st;
    store_tokens_encode(g, 0, number, x->tokens, p);
    p += a->tokens_bytes;
    landmark_copy copy = {a, number, p};
    if ((st = cairn_snapshot_landmarks(x->snap, segment, block, 1, copy_landmark, &copy)) != CAIRN_OK) return st;
    p += a->landmark_bytes;
    for (size_t first = 0; first < a->tiles; first += x->batch) {
        size_t n = a->tiles - first < x->batch ? a->tiles - first : x->batch;
        for (size_t i = 0; i < n; i++) x->ids[i] = archive_tile(a, segment, block, first + i);
        if ((st = cairn_fetch_submit(x->fetch, x->snap, x->ids, NULL, n)) != CAIRN_OK) return st;
        if ((st = cairn_fetch_wait(x->fetch, x->views)) != CAIRN_OK) return st;
        for (size_t i = 0; i < n; i++, p += a->tile_bytes) {
            if (x->views[i].dtype != g->dtype)
                return cairn_fail(CAIRN_UNSUPPORTED,
                                  "segment %" PRIu64 " block %u: a tile of %s in a store of %s cannot be exported",
                                  segment, block, cairn_dtype_name(x->views[i].dtype), cairn_dtype_name(g->dtype));
            store_tile_encode(g, x->ids[i], (uint64_t)number * g->block_tokens, x->views[i].keys, p, a->tile_bytes);
        }
    }
    return CAIRN_OK;
}

static cairn_status export_blocks(exporter *x, sink *s, const cairn_range *ranges, size_t n, archive_progress progress,
                                  void *arg)
{
    uint32_t number = 0;
    for (size_t r = 0; r < n; r++)
        for (uint32_t i = 0; i < ranges[r].count; i++, number++) {
            cairn_status st = export_block(x, ranges[r].segment, ranges[r].first + i, number);
            if (st != CAIRN_OK) return st;
            if ((st = write_all(s, x->block, x->a->block_bytes)) != CAIRN_OK) return st;
            if ((st = archive_report(progress, arg, s->done, x->a->file_bytes, s->path)) != CAIRN_OK) return st;
        }
    return CAIRN_OK;
}

/* Everything that has to be known before the first byte is written. */
static cairn_status survey(cairn_store *store, cairn_snapshot *snap, const char *name, archive *a, cairn_range **ranges,
                           size_t *n)
{
    a->geometry = *cairn_store_geometry(store);
    a->model = *cairn_store_model(store);
    cairn_status st = cairn_snapshot_context(snap, name, &a->info);
    if (st == CAIRN_NOT_FOUND) return cairn_fail(st, "%s: no context '%s'", cairn_store_path(store), name);
    if (st != CAIRN_OK) return st;
    size_t tail = 0;
    if ((st = cairn_snapshot_tail(snap, a->info.id, a->tail, 4096, &tail)) != CAIRN_OK) return st;
    if ((st = cairn_snapshot_ranges(snap, a->info.id, NULL, 0, n)) != CAIRN_OK) return st;
    *ranges = cairn_alloc_array(*n, sizeof **ranges);
    if (*ranges == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%zu ranges", *n);
    if ((st = cairn_snapshot_ranges(snap, a->info.id, *ranges, *n, n)) != CAIRN_OK) return st;
    a->header_bytes = (EXP_FIXED + 4 * tail + strlen(a->info.name) + 63) / 64 * 64;
    if (a->info.blocks > UINT32_MAX || !measure(a) || !whole_bytes(a, &a->file_bytes))
        return cairn_fail(CAIRN_UNSUPPORTED, "context '%s': %" PRIu64 " blocks are too many for one file", name,
                          a->info.blocks);
    return CAIRN_OK;
}

static cairn_status exporter_new(cairn_store *store, exporter *x)
{
    const archive *a = x->a;
    size_t page_rounded = a->tile_bytes + 2 * (size_t)store->env->data.page_bytes;
    x->batch = ARCHIVE_BATCH_BYTES / page_rounded + 1;
    if (x->batch > a->tiles) x->batch = a->tiles;
    x->ids = cairn_alloc_array(x->batch, sizeof *x->ids);
    x->views = cairn_alloc_array(x->batch, sizeof *x->views);
    x->tokens = cairn_alloc_array(a->geometry.block_tokens, sizeof *x->tokens);
    x->block = cairn_alloc(a->block_bytes);
    if (x->ids == NULL || x->views == NULL || x->tokens == NULL || x->block == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "a block of %zu bytes", a->block_bytes);
    /* Into a tier that just holds the batch, so that a failing disk is an error here and not a signal. */
    cairn_status st = cairn_fetch_new(store, CAIRN_FETCH_READ, (1 << 20) + x->batch * (page_rounded + 1024), &x->fetch);
    if (st == CAIRN_OK && x->batch > cairn_fetch_batch_max(x->fetch)) x->batch = cairn_fetch_batch_max(x->fetch);
    return st;
}

static void exporter_free(exporter *x)
{
    cairn_fetch_free(x->fetch);
    cairn_free(x->ids);
    cairn_free(x->views);
    cairn_free(x->tokens);
    cairn_free(x->block);
}

static cairn_status write_header(sink *s, const archive *a)
{
    uint8_t *head = cairn_alloc(a->header_bytes);
    if (head == NULL) return cairn_fail(CAIRN_NO_MEMORY, "header of %zu bytes", a->header_bytes);
    archive_encode_header(a, head);
    cairn_status st = write_all(s, head, a->header_bytes);
    cairn_free(head);
    return st;
}

static cairn_status write_end(sink *s)
{
    uint8_t end[8];
    cairn_status st = write_all(s, "CAIRNEND", 8);
    cairn_put_le64(end, cairn_hasher_value(s->hasher));
    return st == CAIRN_OK ? write_all(s, end, 8) : st;
}

static cairn_status sync_folder_of(const char *path)
{
    char folder[STORE_PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t n = slash == NULL ? 0 : slash == path ? 1 : (size_t)(slash - path);
    snprintf(folder, sizeof folder, "%.*s", slash == NULL ? 1 : (int)n, slash == NULL ? "." : path);
    return store_sync_dir(folder);
}

cairn_status cairn_context_export(cairn_store *store, const char *name, const char *path, archive_progress progress,
                                  void *arg)
{
    char beside[STORE_PATH_MAX];
    cairn_status st = CAIRN_OK;
    cairn_snapshot *snap = NULL;
    cairn_range *ranges = NULL;
    size_t n = 0;
    sink s = {.path = beside, .fd = -1};
    exporter x = {0};
    int len = snprintf(beside, sizeof beside, "%s.part-%ld", path, (long)getpid());
    if (len < 0 || (size_t)len >= sizeof beside) return cairn_fail(CAIRN_INVALID, "%.200s...: path too long", path);
    archive *a = cairn_calloc(1, sizeof *a);
    s.hasher = cairn_hasher_new();
    if (a == NULL || s.hasher == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "exporting '%s'", name);
        goto out;
    }
    if ((st = cairn_snapshot_begin(store, &snap)) != CAIRN_OK) goto out;
    if ((st = survey(store, snap, name, a, &ranges, &n)) != CAIRN_OK) goto out;
    x = (exporter){.a = a, .snap = snap};
    if ((st = exporter_new(store, &x)) != CAIRN_OK) goto out;

    /* Made here, so that nobody else has it open: what a killed export of this number left is put away first. */
    if (unlink(beside) != 0 && errno != ENOENT) {
        st = cairn_fail_errno(errno, "%s", beside);
        goto out;
    }
    s.fd = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (s.fd < 0 || !cairn_make_private(s.fd)) {
        st = cairn_fail_errno(errno, "%s", beside);
        goto out;
    }
    if ((st = write_header(&s, a)) != CAIRN_OK) goto out;
    if ((st = export_blocks(&x, &s, ranges, n, progress, arg)) != CAIRN_OK) goto out;
    if ((st = write_end(&s)) != CAIRN_OK) goto out;
    assert(s.done == a->file_bytes);
    if (fsync(s.fd) != 0 || rename(beside, path) != 0) {
        st = cairn_fail_errno(errno, "%s", path);
        goto out;
    }
    close(s.fd);
    s.fd = -1;
    st = sync_folder_of(path);
out:
    if (s.fd >= 0) {
        close(s.fd);
        unlink(beside);
    }
    exporter_free(&x);
    cairn_free(ranges);
    cairn_snapshot_end(snap);
    cairn_hasher_free(s.hasher);
    cairn_free(a);
    return st;
}
