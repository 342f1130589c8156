/* scans.c - the scans of a segment in one file beside the store's other index files, so that a new session has its rows
 * without walking the landmark records, and searches as fast from its first token on as the one that read the text did
 * at its end.
 *
 * "<segment>-<generation>.scan":
 *
 *   offset  size  field
 *        0     4  magic 'C' 'R' 'N' 'J'
 *        4     4  version 1
 *        8     8  segment
 *       16     4  rows R: blocks [0, R)
 *       20     4  parts n: all KV heads of the layers that retrieve, by layer
 *       24    8n  bytes of each part
 *        .     8  hash         XXH3-64 over all before
 *        .     .  the parts, back to back (index/packed.c)
 *
 * Little-endian. A segment's blocks never change, so a file of fewer than there are is as true as it was; the others
 * come from their records. It is written when there are twice as many or another head has learnt, and when a text is
 * all in if there are a sixteenth more. */
#include "context_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

enum {
    HEAD = 24,
    VERSION = 1,
    ROWS_LEAST = 2048, /* the records of fewer are read in a few milliseconds, and nothing is learnt of them */
    NEW_SHARE = 16
};
static const char MAGIC[4] = {'C', 'R', 'N', 'J'};

static size_t head_bytes(size_t parts)
{
    return HEAD + parts * sizeof(uint64_t) + sizeof(uint64_t);
}

/* Heads that retrieve are those with an index: theirs are the parts, in order. */
static cairn_status list_parts(const landmark_set *set, const attn_part *part, cairn_index ***out, size_t *n)
{
    *n = 0;
    *out = cairn_calloc(n_heads(set), sizeof **out);
    if (*out == NULL) return cairn_fail(CAIRN_NO_MEMORY, "scans of %zu heads", n_heads(set));
    for (size_t i = 0; i < n_heads(set); i++)
        if (part->index[i] != NULL) (*out)[(*n)++] = part->index[i];
    return CAIRN_OK;
}

static size_t learnt_heads(const landmark_set *set, const attn_part *part)
{
    size_t n = 0;
    for (size_t i = 0; i < n_heads(set); i++) n += part->index[i] != NULL && cairn_index_learnt(part->index[i]);
    return n;
}

static cairn_status file_path(const cairn_store *store, uint64_t segment, uint64_t generation, char *out, size_t cap)
{
    char base[4096];
    cairn_status st = cairn_store_index_path(store, segment, generation, base, sizeof base);
    if (st == CAIRN_OK) snprintf(out, cap, "%s.scan", base);
    return st;
}

/* ---- reading ---- */

bool read_at(int fd, void *to, size_t bytes, uint64_t at)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        done += (size_t)n;
    }
    return true;
}

typedef struct stretch { /* of the file, a part's */
    int fd;
    uint64_t at, left;
} stretch;

static bool read_on(void *arg, void *data, size_t bytes)
{
    stretch *s = arg;
    if (bytes > s->left || !read_at(s->fd, data, bytes, s->at)) return false;
    s->at += bytes;
    s->left -= bytes;
    return true;
}

/* The stretches of n parts; false if this is not the segment's file, or not whole. */
static bool read_head(int fd, uint64_t segment, size_t n, stretch *parts, uint32_t *rows)
{
    const size_t bytes = head_bytes(n);
    uint8_t *head = cairn_alloc(bytes);
    const off_t end = lseek(fd, 0, SEEK_END);
    uint64_t at = bytes;
    bool right = head != NULL && end >= (off_t)bytes && read_at(fd, head, bytes, 0) &&
                 memcmp(head, MAGIC, sizeof MAGIC) == 0 && cairn_get_le32(head + 4) == VERSION &&
                 cairn_get_le64(head + 8) == segment && cairn_get_le32(head + 20) == n &&
                 cairn_hash64(head, bytes - 8) == cairn_get_le64(head + bytes - 8);
    for (size_t i = 0; right && i < n; i++) {
        parts[i] = (stretch){fd, at, cairn_get_le64(head + HEAD + 8 * i)};
        right = parts[i].left <= (uint64_t)end - at;
        at += right ? parts[i].left : 0;
    }
    if (right) *rows = cairn_get_le32(head + 16);
    cairn_free(head);
    return right && at == (uint64_t)end;
}

typedef struct taking {
    cairn_index **index;
    stretch *parts;
    cairn_status *status; /* of each part */
    uint32_t rows;        /* wanted */
    bool images;
} taking;

static void take_part(void *arg, size_t part, size_t worker)
{
    taking *t = arg;
    (void)worker;
    t->status[part] = cairn_index_unpack(t->index[part], t->rows, t->images, read_on, &t->parts[part]);
    if (t->status[part] == CAIRN_OK && (t->parts[part].left != 0 || cairn_index_count(t->index[part]) != t->rows))
        t->status[part] = CAIRN_CORRUPT;
}

bool scans_kept(const cairn_store *store, const cairn_segment_info *info)
{
    char path[4200];
    return file_path(store, info->id, info->generation, path, sizeof path) == CAIRN_OK && access(path, R_OK) == 0;
}

cairn_status scans_take(landmark_set *set, const attn_part *part, const cairn_store *store,
                        const cairn_segment_info *info, uint32_t upto, bool images, uint32_t *out_rows)
{
    char path[4200];
    taking t = {.images = images};
    size_t n = 0;
    uint32_t rows = 0;
    *out_rows = 0;
    cairn_status st = file_path(store, info->id, info->generation, path, sizeof path);
    const int fd = st == CAIRN_OK ? open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
    if (fd < 0) return st != CAIRN_OK ? st : cairn_fail_errno(errno, "%s", path);
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED);
    if ((st = list_parts(set, part, &t.index, &n)) != CAIRN_OK) goto out;
    t.parts = cairn_calloc(n, sizeof *t.parts);
    t.status = cairn_calloc(n, sizeof *t.status);
    if (t.parts == NULL || t.status == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "scans of %zu heads", n);
        goto out;
    }
    if (!read_head(fd, info->id, n, t.parts, &rows)) {
        st = cairn_fail(CAIRN_CORRUPT, "%s is not what segment %llu's scans were written to", path,
                        (unsigned long long)info->id);
        goto out;
    }
    t.rows = rows < upto ? rows : upto;
    cairn_pool_run(set->pool, n, take_part, &t);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++)
        if (t.status[i] != CAIRN_OK) st = cairn_fail(t.status[i], "%s: part %zu", path, i);
    if (st == CAIRN_OK) *out_rows = t.rows;
    if (st == CAIRN_OK && part == set->parts) {
        set->kept_rows = rows;
        set->kept_learnt = learnt_heads(set, part);
    }
out:
    close(fd);
    cairn_free(t.index);
    cairn_free(t.parts);
    cairn_free(t.status);
    return st;
}

/* ---- writing ---- */

typedef struct writing {
    const uint8_t *head;
    size_t bytes, n;
    cairn_index **index;
} writing;

static bool write_on(void *arg, const void *data, size_t bytes)
{
    return fwrite(data, 1, bytes, (FILE *)arg) == bytes;
}

static bool write_file(FILE *file, const void *arg)
{
    const writing *w = arg;
    bool right = fwrite(w->head, 1, w->bytes, file) == w->bytes;
    for (size_t i = 0; i < w->n && right; i++) right = cairn_index_pack(w->index[i], write_on, file) == CAIRN_OK;
    return right;
}

static cairn_status write_scans(const landmark_set *set, const attn_part *part, const char *path, uint64_t segment,
                                uint32_t rows)
{
    writing w = {0};
    uint8_t *head = NULL;
    cairn_status st = list_parts(set, part, &w.index, &w.n);
    if (st != CAIRN_OK) return st;
    w.bytes = head_bytes(w.n);
    if ((head = cairn_calloc(1, w.bytes)) == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "scans of %zu heads", w.n);
        goto out;
    }
    memcpy(head, MAGIC, sizeof MAGIC);
    cairn_put_le32(head + 4, VERSION);
    cairn_put_le64(head + 8, segment);
    cairn_put_le32(head + 16, rows);
    cairn_put_le32(head + 20, (uint32_t)w.n);
    for (size_t i = 0; i < w.n; i++) {
        if (cairn_index_count(w.index[i]) != rows) goto out; /* blocks that are not stored */
        cairn_put_le64(head + HEAD + 8 * i, cairn_index_packed_bytes(w.index[i]));
    }
    cairn_put_le64(head + w.bytes - 8, cairn_hash64(head, w.bytes - 8));
    w.head = head;
    if (w.n != 0) st = cairn_replace_file(path, write_file, &w);
out:
    cairn_free(head);
    cairn_free(w.index);
    return st;
}

void scans_keep(cairn_session *s, bool all_in)
{
    landmark_set *set = &s->landmarks;
    const attn_part *part = set->parts;
    char path[4200];
    cairn_segment_info info;
    /* the context is one segment from its first block on, and so is the part */
    if (s->n_ranges != 1 || s->ranges[0].block != 0 || set->n_parts != 1 || !set->pooled[0]) return;
    const uint64_t rows = s->ranges[0].count, kept = set->kept_rows;
    if (rows < ROWS_LEAST) return;
    if (rows <= (all_in ? kept + kept / NEW_SHARE : 2 * kept) && learnt_heads(set, part) <= set->kept_learnt) return;
    for (size_t i = 0; i < n_heads(set); i++)
        if (part->index[i] != NULL && strcmp(cairn_index_kind(part->index[i]), "scan") != 0) return;
    cairn_status st = cairn_snapshot_segment(s->snap, s->ranges[0].segment, &info);
    if (st == CAIRN_OK) st = file_path(s->store, info.id, info.generation, path, sizeof path);
    if (st == CAIRN_OK) st = write_scans(set, part, path, info.id, (uint32_t)rows);
    if (st == CAIRN_OK) {
        set->kept_rows = rows;
        set->kept_learnt = learnt_heads(set, part);
        return;
    }
    snprintf(set->warning, sizeof set->warning,
             "the context is stored, but not what makes its next opening faster: %.160s", cairn_last_error());
}

void scans_carry(const cairn_store *store, uint64_t segment, uint64_t from, uint64_t to)
{
    char old[4200], new[4200];
    if (file_path(store, segment, from, old, sizeof old) == CAIRN_OK &&
        file_path(store, segment, to, new, sizeof new) == CAIRN_OK)
        (void)link(old, new); /* without it a session reads the records */
}
