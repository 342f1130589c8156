/* tails.c - a context's last tokens, fewer than a block, as the block a landmark closes early: kept in a file, so that
 * who attaches the context need not run them through the model again.
 *
 * "<store>/index/tail-<context>":
 *
 *   offset  size  field
 *        0     4  magic 'C' 'R' 'N' 'E'
 *        4     4  version 1
 *        8     8  context
 *       16     8  blocks before it
 *       24     8  segment of the last of them, 0 = there are none
 *       32     4  tokens n, less than C
 *       36     4  reserved 0
 *       40     8  bytes of the block
 *       48     8  hash         XXH3-64 over [0, 48) and [56, end)
 *       56    4n  token ids, i32
 *        .     .  the block: tiles of n tokens of all layers and KV heads, then landmark rows of the stored layers
 *
 * Little-endian. Derived data: what the tokens and the blocks before them give under the model's own policy. It is good
 * while the context ends where it ended, which the file says; written anew whenever that changes, and not synced: what
 * a power cut leaves of it its hash refuses. */
#include "context_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEAD = 56, HASH_AT = 48, VERSION = 1 };
static const char MAGIC[4] = {'C', 'R', 'N', 'E'};

typedef struct tail_file {
    const uint8_t *bytes;
    size_t n;
} tail_file;

/* A closed block depends on what its rows may choose. */
static bool has_models_policy(const cairn_session *s)
{
    const cairn_policy *asked = &s->opt.policy;
    cairn_policy own;
    cairn_policy_init(&own, sizeof own, &s->shape);
    return asked->top_k == own.top_k && asked->scope == own.scope && asked->mass <= 0 &&
           asked->window_blocks == own.window_blocks && asked->newest == own.newest;
}

/* In a file there is no room between a block's tiles. */
static size_t stride_of(const cairn_session *s, size_t tokens)
{
    return cairn_tile_payload_bytes(s->geometry.dtype, (uint32_t)tokens, s->geometry.head_dim);
}

static size_t block_bytes(const cairn_session *s, size_t tokens)
{
    return own_copy(&s->own, NULL, stride_of(s, tokens), NULL, 0, (uint32_t)tokens);
}

static size_t head_bytes(size_t tokens)
{
    return HEAD + tokens * sizeof(cairn_token);
}

/* What the file of an attached context's tail begins with; its tokens follow. */
static void put_head(const cairn_session *s, const attached *a, uint8_t *to)
{
    const uint64_t segment = a->blocks != 0 ? session_range_of(s, a->first + a->blocks - 1)->segment : 0;
    memset(to, 0, HEAD);
    memcpy(to, MAGIC, sizeof MAGIC);
    cairn_put_le32(to + 4, VERSION);
    cairn_put_le64(to + 8, a->id);
    cairn_put_le64(to + 16, a->blocks);
    cairn_put_le64(to + 24, segment);
    cairn_put_le32(to + 32, (uint32_t)a->n_tail);
    cairn_put_le64(to + 40, block_bytes(s, a->n_tail));
    memcpy(to + HEAD, a->tail, a->n_tail * sizeof *a->tail);
}

static uint64_t hash_of(const uint8_t *bytes, size_t n)
{
    return cairn_hash64_two(bytes, HASH_AT, bytes + HASH_AT + 8, n - HASH_AT - 8);
}

static bool write_bytes(FILE *file, const void *arg)
{
    const tail_file *f = arg;
    return fwrite(f->bytes, 1, f->n, file) == f->n;
}

cairn_status cairn_session_keep_tail(cairn_session *s)
{
    char path[4200];
    if (!s->closed || !s->continues || s->own.n == 0)
        return cairn_fail(CAIRN_INVALID, "only the block that ends a stored context, closed early, is kept");
    if (!has_models_policy(s)) return CAIRN_OK;
    const own_block *b = &s->own.items[s->own.n - 1];
    attached a = s->contexts[0];
    a.blocks = s->n_stored; /* commits of this session among them */
    a.tail = b->tokens;
    a.n_tail = b->fill;
    const size_t head = head_bytes(a.n_tail);
    tail_file f = {.n = head + block_bytes(s, a.n_tail)};
    cairn_status st = cairn_store_tail_path(s->store, a.id, path, sizeof path);
    uint8_t *bytes = st == CAIRN_OK ? cairn_alloc(f.n) : NULL;
    if (st == CAIRN_OK && bytes == NULL) st = cairn_fail(CAIRN_NO_MEMORY, "the tail of %zu tokens", a.n_tail);
    if (st == CAIRN_OK) {
        put_head(s, &a, bytes);
        own_copy(&s->own, bytes + head, stride_of(s, a.n_tail), b->data, s->own.tile_bytes, b->fill);
        cairn_put_le64(bytes + HASH_AT, hash_of(bytes, f.n));
        f.bytes = bytes;
        st = cairn_put_file(path, write_bytes, &f);
    }
    cairn_free(bytes);
    return st;
}

/* The whole file, if it has so many bytes. */
static bool read_file(const char *path, uint8_t *to, size_t bytes)
{
    struct stat info;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return false;
    bool right = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && (uint64_t)info.st_size == bytes;
    right = right && read_at(fd, to, bytes, 0);
    close(fd);
    return right;
}

uint8_t *session_kept_tail(const cairn_session *s, size_t context)
{
    char path[4200];
    const attached *a = &s->contexts[context];
    if (a->n_tail == 0 || !has_models_policy(s) ||
        cairn_store_tail_path(s->store, a->id, path, sizeof path) != CAIRN_OK)
        return NULL;
    const size_t head = head_bytes(a->n_tail), n = head + block_bytes(s, a->n_tail);
    uint8_t *bytes = cairn_alloc(n), *expected = cairn_alloc(head);
    bool right = bytes != NULL && expected != NULL && read_file(path, bytes, n);
    if (right) {
        put_head(s, a, expected);
        memcpy(expected + HASH_AT, bytes + HASH_AT, 8);
        right = memcmp(bytes, expected, head) == 0 && hash_of(bytes, n) == cairn_get_le64(bytes + HASH_AT);
    }
    cairn_free(expected);
    if (right) return bytes;
    cairn_free(bytes);
    return NULL;
}

cairn_status session_adopt_kept(cairn_session *s, size_t context, const uint8_t *kept)
{
    const attached *a = &s->contexts[context];
    return session_adopt_block(s, kept + head_bytes(a->n_tail), stride_of(s, a->n_tail), a->tail, (uint32_t)a->n_tail,
                               context);
}
