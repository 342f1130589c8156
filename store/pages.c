/* pages.c - walks LMDB's trees without believing them. See pages.h for the pictures. */
#include "pages.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    PAGE_HEADER = 16,
    NODE_HEADER = 8,
    PAGE_BRANCH = 1,
    PAGE_LEAF = 2,
    PAGE_OVERFLOW = 4,
    PAGE_META = 8,
    NODE_LARGE = 1,
    NODE_SUBTREE = 2,
    META_BYTES = 136,
    META_MAGIC = PAGE_HEADER,
    META_VERSION = PAGE_HEADER + 4,
    META_FREE = PAGE_HEADER + 24,
    META_MAIN = PAGE_HEADER + 72,
    META_LAST = PAGE_HEADER + 120,
    META_TXN = PAGE_HEADER + 128,
    FREE_TREE_FLAGS = 8, /* keys are numbers */
    KEY_MAX = 511,
    DEPTH_MAX = 32, /* LMDB's cursor stack */
    PAGE_BYTES_MIN = 256,
    PAGE_BYTES_MAX = 32768
};
static_assert(META_TXN + 8 == PAGE_HEADER + META_BYTES, "picture and meta page");
#define LMDB_MAGIC UINT32_C(0xBEEFC0DE)
#define NO_ROOT    UINT64_MAX

page_tree page_tree_parse(const void *bytes)
{
    const uint8_t *p = bytes;
    return (page_tree){.flags = cairn_get_le16(p + 4),
                       .depth = cairn_get_le16(p + 6),
                       .branch_pages = cairn_get_le64(p + 8),
                       .leaf_pages = cairn_get_le64(p + 16),
                       .overflow_pages = cairn_get_le64(p + 24),
                       .entries = cairn_get_le64(p + 32),
                       .root = cairn_get_le64(p + 40)};
}

/* The page that a node of a branch page leads to. */
static uint64_t child_in(const uint8_t *node)
{
    return (uint64_t)cairn_get_le32(node) | (uint64_t)cairn_get_le16(node + 4) << 32;
}

/* All of it or an error; errno is set, 0 where the file ends. */
static bool read_at(int fd, void *out, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (uint8_t *)out + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            if (n == 0) errno = 0;
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

static cairn_status read_meta(const page_file *file, unsigned which, uint8_t meta[PAGE_HEADER + META_BYTES])
{
    uint64_t offset = (uint64_t)which * file->page_bytes;
    if (!read_at(file->fd, meta, PAGE_HEADER + META_BYTES, offset)) {
        if (errno != 0) return cairn_fail_errno(errno, "%s: reading meta page %u", file->path, which);
        return cairn_fail(CAIRN_CORRUPT, "%s: truncated: %llu bytes, the two meta pages alone have %llu", file->path,
                          (unsigned long long)file->file_bytes,
                          (unsigned long long)2 * (file->page_bytes != 0 ? file->page_bytes : 4096));
    }
    if (cairn_get_le16(meta + 10) != PAGE_META || cairn_get_le32(meta + META_MAGIC) != LMDB_MAGIC)
        return cairn_fail(CAIRN_CORRUPT, "%s: meta page %u is not LMDB's (magic %08x, expected %08x)", file->path,
                          which, cairn_get_le32(meta + META_MAGIC), LMDB_MAGIC);
    if (cairn_get_le32(meta + META_VERSION) != 1)
        return cairn_fail(CAIRN_UNSUPPORTED, "%s: LMDB data version %u, this library reads version 1", file->path,
                          cairn_get_le32(meta + META_VERSION));
    /* the free tree's flags hold the environment's too, of which we use none: with one set LMDB would map the file
     * elsewhere, for instance */
    if (cairn_get_le16(meta + META_FREE + 4) != FREE_TREE_FLAGS)
        return cairn_fail(CAIRN_CORRUPT, "%s: meta page %u: flags %04x, expected %04x", file->path, which,
                          cairn_get_le16(meta + META_FREE + 4), FREE_TREE_FLAGS);
    return CAIRN_OK;
}

#define KEY_UNREADABLE UINT64_MAX

/* The last key of a free tree, 0 of an empty one. Pages that are not such a tree's are left to the walk to name. */
static uint64_t last_free_key(const page_file *file, const page_tree *tree)
{
    uint8_t header[PAGE_HEADER], node[NODE_HEADER + 8], offset[2];
    uint64_t page = tree->root;
    if (page == NO_ROOT) return 0;
    for (unsigned depth = tree->depth; depth > 0 && depth <= DEPTH_MAX; depth--) {
        if (page >= file->file_bytes / file->page_bytes) break;
        uint64_t at = page * file->page_bytes;
        if (!read_at(file->fd, header, sizeof header, at)) break;
        unsigned lower = cairn_get_le16(header + 12);
        if (cairn_get_le64(header) != page || cairn_get_le16(header + 10) != (depth == 1 ? PAGE_LEAF : PAGE_BRANCH) ||
            lower < PAGE_HEADER + 2 || lower > file->page_bytes || !read_at(file->fd, offset, 2, at + lower - 2))
            break;
        unsigned last = cairn_get_le16(offset);
        if (last > file->page_bytes - sizeof node || !read_at(file->fd, node, sizeof node, at + last)) break;
        if (depth == 1) return cairn_get_le64(node + NODE_HEADER);
        page = child_in(node);
    }
    return KEY_UNREADABLE;
}

/* LMDB believes the meta page with the larger transaction number: a flipped bit in one of them, and the last commit
 * would be gone without a word. But transaction n writes meta page n % 2, so the two are neighbours (in a new file both
 * are 0); and every transaction after the first gives pages back, under its own number, so that its free list ends with
 * it. That must be so of the one in force. The other may hold a later list: after a meta page that could not be written
 * LMDB puts its old number back, not its old trees. So one flip stays that cannot be told from that: the number in
 * force less two. */
static cairn_status check_heads(const page_file *file)
{
    uint8_t meta[2][PAGE_HEADER + META_BYTES], again[sizeof meta[0]];
    uint64_t n[2] = {0, 0}, ends[2] = {0, 0};
    bool good = false, stable = false;
    cairn_status status = CAIRN_OK;
    for (int tries = 0; tries < 100 && !good && !stable; tries++) { /* others may commit between our reads */
        stable = true;
        for (unsigned i = 0; i < 2; i++) {
            if ((status = read_meta(file, i, meta[i])) != CAIRN_OK) return status;
            const page_tree tree = page_tree_parse(meta[i] + META_FREE);
            n[i] = cairn_get_le64(meta[i] + META_TXN);
            ends[i] = last_free_key(file, &tree);
        }
        unsigned now = n[1] > n[0];
        good = ((n[0] == 0 && n[1] == 0) || (n[0] % 2 == 0 && (n[0] + 1 == n[1] || n[1] + 1 == n[0]))) &&
               (n[now] <= 1 || ends[now] == n[now] || ends[now] == KEY_UNREADABLE);
        for (unsigned i = 0; i < 2 && !good; i++) {
            if ((status = read_meta(file, i, again)) != CAIRN_OK) return status;
            stable = stable && memcmp(again, meta[i], sizeof again) == 0;
        }
    }
    if (good) return CAIRN_OK;
    return cairn_fail(CAIRN_CORRUPT,
                      "%s: the two meta pages are of transactions %llu and %llu, with free lists up to %llu and %llu",
                      file->path, (unsigned long long)n[0], (unsigned long long)n[1], (unsigned long long)ends[0],
                      (unsigned long long)ends[1]);
}

cairn_status page_file_peek(int fd, const char *path, page_file *out)
{
    *out = (page_file){.fd = fd, .path = path};
    struct stat st;
    if (fstat(fd, &st) != 0) return cairn_fail_errno(errno, "%s", path);
    out->file_bytes = (uint64_t)st.st_size;
    uint8_t meta[PAGE_HEADER + META_BYTES];
    cairn_status status = read_meta(out, 0, meta);
    if (status != CAIRN_OK) return status;
    uint32_t bytes = cairn_get_le32(meta + META_FREE); /* the free tree's pad field holds the page size */
    if (bytes < PAGE_BYTES_MIN || bytes > PAGE_BYTES_MAX || (bytes & (bytes - 1)) != 0)
        return cairn_fail(CAIRN_CORRUPT, "%s: meta page 0: page size %u", path, bytes);
    out->page_bytes = bytes;
    if (out->file_bytes < 2 * (uint64_t)bytes)
        return cairn_fail(CAIRN_CORRUPT, "%s: truncated: %llu bytes, the two meta pages alone have %llu", path,
                          (unsigned long long)out->file_bytes, 2 * (unsigned long long)bytes);
    for (unsigned which = 0; which < 2; which++) {
        if (which == 1 && (status = read_meta(out, 1, meta)) != CAIRN_OK) return status;
        if (cairn_get_le32(meta + META_FREE) != bytes)
            return cairn_fail(CAIRN_CORRUPT, "%s: meta page %u: page size %u, expected %u", path, which,
                              cairn_get_le32(meta + META_FREE), bytes);
        /* LMDB reserves last page + 1 pages of addresses at once: 2^46 bytes is half of what a process has */
        if (cairn_get_le64(meta + META_LAST) >= (UINT64_C(1) << 46) / bytes)
            return cairn_fail(CAIRN_CORRUPT, "%s: meta page %u: last page %llu of a file of %llu bytes", path, which,
                              (unsigned long long)cairn_get_le64(meta + META_LAST),
                              (unsigned long long)out->file_bytes);
    }
    return check_heads(out);
}

cairn_status page_file_at(page_file *file, uint64_t transaction)
{
    struct stat st;
    if (fstat(file->fd, &st) != 0) return cairn_fail_errno(errno, "%s", file->path);
    file->file_bytes = (uint64_t)st.st_size;
    /* Transaction n writes page n % 2, so two commits from now it is overwritten: read twice, lest it be half and half
     */
    uint8_t meta[PAGE_HEADER + META_BYTES], again[sizeof meta];
    cairn_status status = read_meta(file, (unsigned)(transaction & 1), meta);
    if (status == CAIRN_OK) status = read_meta(file, (unsigned)(transaction & 1), again);
    if (status != CAIRN_OK) return status;
    if (cairn_get_le64(meta + META_TXN) != transaction || memcmp(meta, again, sizeof meta) != 0)
        return cairn_fail(CAIRN_BUSY, "%s: transaction %llu is no longer there (now %llu)", file->path,
                          (unsigned long long)transaction, (unsigned long long)cairn_get_le64(meta + META_TXN));
    file->transaction = transaction;
    file->last_page = cairn_get_le64(meta + META_LAST);
    file->free_tree = page_tree_parse(meta + META_FREE);
    file->main_tree = page_tree_parse(meta + META_MAIN);
    return CAIRN_OK;
}

cairn_status page_file_keep_used(page_file *file)
{
    cairn_free(file->used);
    file->used = cairn_calloc((size_t)(file->last_page / 8) + 1, 1);
    if (file->used == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%s: a bit for each of %llu pages", file->path,
                          (unsigned long long)file->last_page + 1);
    return CAIRN_OK;
}

uint64_t page_run(const page_file *file, uint64_t bytes)
{
    return (PAGE_HEADER - 1 + bytes) / file->page_bytes + 1;
}

/* ---- the walk ---- */

typedef struct walk {
    page_file *file;
    const char *name;
    const page_tree *tree;
    const page_visitor *visitor;
    page_walk_kind kind;
    uint8_t *pages; /* one buffer a level */
    uint64_t branch_pages, leaf_pages, overflow_pages, entries;
    size_t key_bytes; /* the last key seen */
    uint8_t key[KEY_MAX];
    cairn_span least; /* what the branch page above promises of the next key; inside `pages`, no bytes = nothing */
    char first[512];  /* sentence */
    uint64_t damaged;
    bool stop;
} walk;

static void CAIRN_PRINTF(3, 4) damage(walk *w, uint64_t page, const char *format, ...)
{
    char what[300], sentence[512];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    snprintf(sentence, sizeof sentence, "page %llu of the '%s' tree %s", (unsigned long long)page, w->name, what);
    if (w->damaged++ == 0) memcpy(w->first, sentence, sizeof sentence);
    if (w->visitor->damage != NULL) w->visitor->damage(w->visitor->arg, sentence);
}

/* Is the run inside file and tree, and is it the first to claim its pages? */
static bool claim(walk *w, uint64_t from, uint64_t page, uint64_t run)
{
    const page_file *f = w->file;
    if (page < 2 || page > f->last_page || run > f->last_page + 1 - page) {
        damage(w, from, "points at pages %llu to %llu, the last one is %llu", (unsigned long long)page,
               (unsigned long long)(page + run - 1), (unsigned long long)f->last_page);
        return false;
    }
    if ((page + run) * f->page_bytes > f->file_bytes) { /* <= 2^46, see page_file_peek */
        damage(w, from, "points at page %llu, which ends at byte %llu; the file has %llu bytes",
               (unsigned long long)page, (unsigned long long)((page + run) * f->page_bytes),
               (unsigned long long)f->file_bytes);
        return false;
    }
    if (f->used == NULL) return true;
    for (uint64_t i = page; i < page + run; i++) {
        uint8_t bit = (uint8_t)(1u << (i & 7));
        if ((f->used[i >> 3] & bit) != 0) {
            damage(w, from, "points at page %llu, which something else uses too", (unsigned long long)i);
            return false;
        }
        f->used[i >> 3] |= bit;
    }
    return true;
}

static int compare_keys(const walk *w, const uint8_t *key, size_t bytes)
{
    if (w->kind == PAGE_WALK_NUMBERS) {
        uint64_t a = cairn_get_le64(w->key), b = cairn_get_le64(key);
        return a < b ? -1 : a > b;
    }
    size_t n = bytes < w->key_bytes ? bytes : w->key_bytes;
    int order = memcmp(w->key, key, n);
    return order != 0 ? order : w->key_bytes < bytes ? -1 : w->key_bytes > bytes;
}

/* Header and node offsets of a page in memory; everything a node claims lies inside the page. */
static bool page_is_sane(walk *w, uint64_t number, const uint8_t *p, bool leaf, unsigned *out_nodes)
{
    uint32_t size = w->file->page_bytes;
    unsigned flags = cairn_get_le16(p + 10), lower = cairn_get_le16(p + 12), upper = cairn_get_le16(p + 14);
    if (cairn_get_le64(p) != number) {
        damage(w, number, "says it is page %llu", (unsigned long long)cairn_get_le64(p));
        return false;
    }
    if (flags != (leaf ? PAGE_LEAF : PAGE_BRANCH)) {
        damage(w, number, "has flags %04x, expected %04x", flags, leaf ? PAGE_LEAF : PAGE_BRANCH);
        return false;
    }
    if (lower < PAGE_HEADER || lower % 2 != 0 || lower > upper || upper > size) {
        damage(w, number, "has its free space from %u to %u of %u", lower, upper, size);
        return false;
    }
    unsigned nodes = (lower - PAGE_HEADER) / 2;
    if (nodes < (leaf || w->kind == PAGE_WALK_NUMBERS ? 1u : 2u)) {
        damage(w, number, "has %u nodes", nodes);
        return false;
    }
    size_t sum = 0; /* nodes fill the page from `upper` to its end, each at an even offset */
    for (unsigned i = 0; i < nodes; i++) {
        unsigned at = cairn_get_le16(p + PAGE_HEADER + 2 * i);
        if (at < upper || at % 2 != 0 || at + NODE_HEADER > size) {
            damage(w, number, "has node %u at %u of %u", i, at, size);
            return false;
        }
        const uint8_t *node = p + at;
        unsigned node_flags = cairn_get_le16(node + 4), key = cairn_get_le16(node + 6);
        size_t bytes = (size_t)NODE_HEADER + key;
        if (leaf) {
            if ((node_flags & ~(unsigned)(NODE_LARGE | NODE_SUBTREE)) != 0 ||
                node_flags == (NODE_LARGE | NODE_SUBTREE)) {
                damage(w, number, "has node %u with flags %04x", i, node_flags);
                return false;
            }
            bytes += (node_flags & NODE_LARGE) != 0 ? 8 : cairn_get_le32(node);
        }
        if (key > KEY_MAX || (leaf && key == 0) || bytes > size - at) {
            damage(w, number, "has node %u with a key of %u and %zu bytes at %u of %u", i, key, bytes, at, size);
            return false;
        }
        if (w->kind == PAGE_WALK_NUMBERS && key != 8 && (leaf || i > 0)) {
            damage(w, number, "has node %u with a key of %u bytes, expected 8", i, key);
            return false;
        }
        sum += (bytes + 1) & ~(size_t)1;
    }
    if (sum != size - upper) {
        damage(w, number, "has nodes of %zu bytes in a space of %u", sum, size - upper);
        return false;
    }
    *out_nodes = nodes;
    return true;
}

static void visit_leaf(walk *w, uint64_t number, const uint8_t *p, unsigned nodes)
{
    for (unsigned i = 0; i < nodes && !w->stop; i++) {
        const uint8_t *node = p + cairn_get_le16(p + PAGE_HEADER + 2 * i);
        unsigned flags = cairn_get_le16(node + 4);
        cairn_span key = {node + NODE_HEADER, cairn_get_le16(node + 6)};
        page_value value = {.bytes = cairn_get_le32(node), .subtree = (flags & NODE_SUBTREE) != 0};
        const uint8_t *data = node + NODE_HEADER + key.bytes;
        w->entries++;
        if (w->key_bytes != 0 && compare_keys(w, key.data, key.bytes) >= 0) {
            damage(w, number, "has its record %u out of order", i);
            continue;
        }
        memcpy(w->key, key.data, key.bytes);
        w->key_bytes = key.bytes;
        if (w->least.bytes != 0 && compare_keys(w, w->least.data, w->least.bytes) < 0)
            damage(w, number, "begins before the key that leads to it"); /* a lookup would not find it here */
        w->least.bytes = 0;
        if ((flags & NODE_LARGE) != 0) {
            value.page = cairn_get_le64(data);
            uint64_t run = page_run(w->file, value.bytes);
            w->overflow_pages += run;
            if (!claim(w, number, value.page, run)) continue;
        } else {
            value.data = data;
            if (value.subtree && value.bytes != PAGE_TREE_BYTES) {
                damage(w, number, "has a subtree of %u bytes, expected %d", value.bytes, PAGE_TREE_BYTES);
                continue;
            }
        }
        if (w->visitor->record != NULL && !w->visitor->record(w->visitor->arg, key, &value)) w->stop = true;
    }
}

/* Reads a page of the tree into the buffer of its level and checks what it says; NULL where that cannot be. It is
 * claimed already. */
static const uint8_t *enter(walk *w, uint64_t number, unsigned level, bool leaf, unsigned *nodes)
{
    const page_file *f = w->file;
    uint64_t *count = leaf ? &w->leaf_pages : &w->branch_pages;
    if (++*count > (leaf ? w->tree->leaf_pages : w->tree->branch_pages)) { /* a loop, when `used` is not kept */
        damage(w, number, "is one more %s page than the tree's %llu", leaf ? "leaf" : "branch",
               (unsigned long long)*count - 1);
        w->stop = true;
        return NULL;
    }
    uint8_t *p = w->pages + (size_t)level * f->page_bytes;
    if (!read_at(f->fd, p, f->page_bytes, number * f->page_bytes)) {
        damage(w, number, "cannot be read: %s", errno != 0 ? strerror(errno) : "the file ends");
        return NULL;
    }
    return page_is_sane(w, number, p, leaf, nodes) ? p : NULL;
}

/* All the children of a branch page at once, so that a cold file is read with a full queue; those that lie close to
 * each other, as half of a commit's do, by one read. A hint, wherever they point. */
static void announce_children(const page_file *f, const uint8_t *p, unsigned nodes)
{
    enum { CLOSE = 8 };
    for (unsigned i = 0; i < nodes;) {
        const uint64_t from = child_in(p + cairn_get_le16(p + PAGE_HEADER + 2 * i));
        uint64_t end = from + 1;
        for (i++; i < nodes; i++) {
            const uint64_t next = child_in(p + cairn_get_le16(p + PAGE_HEADER + 2 * i));
            if (next < end || next - end >= CLOSE) break;
            end = next + 1;
        }
        posix_fadvise(f->fd, (off_t)(from * f->page_bytes), (off_t)((end - from) * f->page_bytes), POSIX_FADV_WILLNEED);
    }
}

/* Recursion is as deep as the tree says, at most DEPTH_MAX; `from` is the page that pointed here. */
static void walk_page(walk *w, uint64_t from, uint64_t number, unsigned level)
{
    const page_file *f = w->file;
    const bool leaf = level + 1 == w->tree->depth;
    unsigned nodes = 0;
    if (w->stop || !claim(w, from, number, 1)) return;
    const uint8_t *p = enter(w, number, level, leaf, &nodes);
    if (p == NULL) return;
    if (leaf) {
        visit_leaf(w, number, p, nodes);
        return;
    }
    if (w->kind != PAGE_WALK_END) announce_children(f, p, nodes);
    for (unsigned i = w->kind == PAGE_WALK_END ? nodes - 1 : 0; i < nodes && !w->stop; i++) {
        const uint8_t *node = p + cairn_get_le16(p + PAGE_HEADER + 2 * i);
        if (i > 0) { /* the first key of a branch page is never looked at */
            w->least = (cairn_span){node + NODE_HEADER, cairn_get_le16(node + 6)};
            if (w->key_bytes != 0 && compare_keys(w, w->least.data, w->least.bytes) >= 0)
                damage(w, number, "has its key %u not after the records before it", i);
        }
        walk_page(w, number, child_in(node), level + 1);
    }
}

cairn_status page_walk(page_file *file, const char *name, const page_tree *tree, page_walk_kind kind,
                       const page_visitor *visitor)
{
    walk w = {.file = file, .name = name, .tree = tree, .visitor = visitor, .kind = kind};
    if (tree->root == NO_ROOT) {
        if (tree->entries != 0 || tree->depth != 0)
            damage(&w, 0, "is missing: no root, but %llu records", (unsigned long long)tree->entries);
    } else if (tree->depth == 0 || tree->depth > DEPTH_MAX) {
        damage(&w, tree->root, "is the root of a tree %u pages deep", tree->depth);
    } else {
        w.pages = cairn_alloc_array(tree->depth, file->page_bytes);
        if (w.pages == NULL)
            return cairn_fail(CAIRN_NO_MEMORY, "%s: %u pages of the '%s' tree", file->path, tree->depth, name);
        walk_page(&w, tree->root, tree->root, 0);
        if (kind != PAGE_WALK_END && !w.stop && w.damaged == 0 &&
            (w.entries != tree->entries || w.leaf_pages != tree->leaf_pages || w.branch_pages != tree->branch_pages))
            damage(&w, tree->root, "is the root of %llu records on %llu + %llu pages, expected %llu on %llu + %llu",
                   (unsigned long long)w.entries, (unsigned long long)w.leaf_pages, (unsigned long long)w.branch_pages,
                   (unsigned long long)tree->entries, (unsigned long long)tree->leaf_pages,
                   (unsigned long long)tree->branch_pages);
        cairn_free(w.pages);
    }
    if (w.damaged != 0) return cairn_fail(CAIRN_CORRUPT, "%s: %s", file->path, w.first);
    return w.stop ? cairn_fail(CAIRN_CANCELLED, "%s: reading the '%s' tree was stopped", file->path, name) : CAIRN_OK;
}

/* ---- leaves by their parents ---- */

typedef struct leaf_search {
    walk w;
    cairn_span low, high;
    bool (*each)(void *, cairn_span, uint64_t);
    void *arg;
} leaf_search;

static int compare_spans(cairn_span a, cairn_span b)
{
    size_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    int order = n != 0 ? memcmp(a.data, b.data, n) : 0;
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

/* `key`: the least that page `number` may hold. */
static void search_leaves(leaf_search *s, uint64_t from, uint64_t number, unsigned level, cairn_span key)
{
    walk *w = &s->w;
    unsigned nodes = 0;
    if (w->stop || !claim(w, from, number, 1)) return;
    if (level + 1 == w->tree->depth) {
        w->stop = !s->each(s->arg, key, number);
        return;
    }
    const uint8_t *p = enter(w, number, level, false, &nodes);
    if (p == NULL) return;
    for (unsigned i = 0; i < nodes && !w->stop; i++) {
        const uint8_t *node = p + cairn_get_le16(p + PAGE_HEADER + 2 * i), *next = NULL;
        cairn_span least = {node + NODE_HEADER, cairn_get_le16(node + 6)}, most = {0};
        if (i + 1 < nodes) {
            next = p + cairn_get_le16(p + PAGE_HEADER + 2 * (i + 1));
            most = (cairn_span){next + NODE_HEADER, cairn_get_le16(next + 6)};
        }
        if (next != NULL && compare_spans(most, s->low) <= 0) continue;
        if (i > 0 && compare_spans(least, s->high) > 0) break;
        search_leaves(s, number, child_in(node), level + 1, i > 0 ? least : key);
    }
}

cairn_status page_leaves(page_file *file, const char *name, const page_tree *tree, cairn_span low, cairn_span high,
                         bool (*each)(void *arg, cairn_span key, uint64_t page), void *arg)
{
    const page_visitor nobody = {0};
    leaf_search s = {.w = {.file = file, .name = name, .tree = tree, .visitor = &nobody},
                     .low = low,
                     .high = high,
                     .each = each,
                     .arg = arg};
    if (tree->root == NO_ROOT) return CAIRN_OK;
    if (tree->depth == 0 || tree->depth > DEPTH_MAX)
        return cairn_fail(CAIRN_CORRUPT, "%s: page %llu is the root of a '%s' tree %u pages deep", file->path,
                          (unsigned long long)tree->root, name, tree->depth);
    s.w.pages = cairn_alloc_array(tree->depth, file->page_bytes);
    if (s.w.pages == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "%s: %u pages of the '%s' tree", file->path, tree->depth, name);
    search_leaves(&s, tree->root, tree->root, 0, (cairn_span){0});
    cairn_free(s.w.pages);
    return s.w.damaged == 0 ? CAIRN_OK : cairn_fail(CAIRN_CORRUPT, "%s: %s", file->path, s.w.first);
}

cairn_status page_read_large(const page_file *file, const char *name, const page_value *value, bool exact, void *out,
                             size_t bytes)
{
    assert(value->data == NULL && bytes <= value->bytes);
    uint8_t header[PAGE_HEADER];
    uint64_t offset = value->page * file->page_bytes;
    if (!read_at(file->fd, header, sizeof header, offset) || !read_at(file->fd, out, bytes, offset + PAGE_HEADER))
        return errno != 0
                   ? cairn_fail_errno(errno, "%s: reading page %llu", file->path, (unsigned long long)value->page)
                   : cairn_fail(CAIRN_CORRUPT, "%s: the file ends before page %llu", file->path,
                                (unsigned long long)value->page);
    uint64_t number = cairn_get_le64(header);
    unsigned flags = cairn_get_le16(header + 10);
    uint32_t run = cairn_get_le32(header + 12);
    /* LMDB may keep a shorter value in a longer run that it already had */
    uint64_t least = page_run(file, value->bytes);
    if (number != value->page || flags != PAGE_OVERFLOW || run < least || (exact && run != least))
        return cairn_fail(
            CAIRN_CORRUPT,
            "page %llu of the '%s' tree says it is page %llu, flags %04x, a run of %u; expected %04x and %llu",
            (unsigned long long)value->page, name, (unsigned long long)number, flags, run, PAGE_OVERFLOW,
            (unsigned long long)page_run(file, value->bytes));
    return CAIRN_OK;
}

/* ---- the free list: for each transaction, a count and that many page numbers ---- */

typedef struct free_walk {
    page_file *file;
    void (*tell)(void *, const char *);
    void *arg;
    char first[512]; /* sentence */
    bool bad;
    cairn_status failure;
} free_walk;

static void free_damage(void *arg, const char *sentence)
{
    free_walk *f = arg;
    if (!f->bad) snprintf(f->first, sizeof f->first, "%s", sentence);
    f->bad = true;
    if (f->tell != NULL) f->tell(f->arg, sentence);
}

static void check_free_pages(free_walk *f, uint64_t transaction, const uint8_t *list, uint32_t bytes)
{
    page_file *file = f->file;
    char sentence[200];
    uint64_t n = bytes >= 8 ? cairn_get_le64(list) : UINT64_MAX;
    int at = snprintf(sentence, sizeof sentence, "free list of transaction %llu: ", (unsigned long long)transaction);
    if (n > bytes / 8 - 1) {
        snprintf(sentence + at, sizeof sentence - (size_t)at, "%u bytes", bytes);
        free_damage(f, sentence);
        return;
    }
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t page = cairn_get_le64(list + 8 * i);
        bool outside = page < 2 || page > file->last_page;
        uint8_t bit = (uint8_t)(1u << (page & 7));
        if (outside)
            snprintf(sentence + at, sizeof sentence - (size_t)at, "page %llu, the last one is %llu",
                     (unsigned long long)page, (unsigned long long)file->last_page);
        else if ((file->used[page >> 3] & bit) != 0)
            snprintf(sentence + at, sizeof sentence - (size_t)at, "page %llu is in use, or free twice",
                     (unsigned long long)page);
        else {
            file->used[page >> 3] |= bit;
            continue;
        }
        free_damage(f, sentence);
        return;
    }
}

static bool free_record(void *arg, cairn_span key, const page_value *value)
{
    free_walk *f = arg;
    const uint8_t *list = value->data;
    uint8_t *copy = NULL;
    if (list == NULL) {
        if ((copy = cairn_alloc(value->bytes)) == NULL) {
            f->failure = cairn_fail(CAIRN_NO_MEMORY, "free list of %u bytes", value->bytes);
            return false;
        }
        if (page_read_large(f->file, "free", value, false, copy, value->bytes) != CAIRN_OK) {
            free_damage(f, cairn_last_error());
            cairn_free(copy);
            return true;
        }
        list = copy;
    }
    check_free_pages(f, cairn_get_le64(key.data), list, value->bytes);
    cairn_free(copy);
    return true;
}

cairn_status page_walk_free(page_file *file, void (*tell)(void *, const char *), void *arg)
{
    assert(file->used != NULL);
    free_walk f = {.file = file, .tell = tell, .arg = arg};
    const page_visitor visitor = {.arg = &f, .record = free_record, .damage = free_damage};
    cairn_status status = page_walk(file, "free", &file->free_tree, PAGE_WALK_NUMBERS, &visitor);
    if (f.failure != CAIRN_OK) return f.failure;
    if (f.bad) return cairn_fail(CAIRN_CORRUPT, "%s: %s", file->path, f.first);
    return status;
}
