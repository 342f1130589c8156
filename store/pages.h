/* pages.h - LMDB's file format (data version 1), read page by page with every length checked.
 *
 * LMDB believes its own pages: a damaged or hostile one can crash it. So the trees that are read at open, and all of
 * them in verify, are first walked by this: pread only (a bad sector is an error, not a signal), no page touched twice,
 * nothing outside the file. The caller holds an LMDB read transaction meanwhile, so no page is reused under the walk.
 *
 *   page           pgno u64, pad u16, flags u16 (1 = branch, 2 = leaf, 4 = overflow, 8 = meta), lower u16, upper u16
 *                  (overflow: run length u32 in their place), then u16 offsets of nodes, nodes from the far end
 *   node           lo u16, hi u16 (leaf: value bytes; branch, with flags: child), flags u16, key bytes u16, key, value
 *   meta, at 16    magic, version u32; address, map size u64; free tree, main tree 48; last page, transaction u64
 *   tree           pad u32, flags u16, depth u16; branch, leaf, overflow pages, entries, root u64
 */
#ifndef CAIRN_STORE_PAGES_H
#define CAIRN_STORE_PAGES_H

#include "base_internal.h"

typedef struct page_tree {
    uint64_t branch_pages, leaf_pages, overflow_pages, entries, root;
    uint16_t flags, depth;
} page_tree;

typedef struct page_file {
    int fd;           /* borrowed */
    const char *path; /* borrowed; for messages */
    uint64_t file_bytes;
    uint32_t page_bytes;
    uint64_t last_page;   /* the file may legally end before it, when the last pages are free */
    uint64_t transaction; /* whose state this is */
    page_tree free_tree, main_tree;
    uint8_t *used; /* a bit per page that a walk reached; NULL = not kept */
} page_file;

/* Looks at what never changes in the two meta pages, before LMDB is let near the file: CORRUPT, UNSUPPORTED. */
cairn_status page_file_peek(int fd, const char *path, page_file *out);
/* Fills in the state of `transaction`, which the caller has open. BUSY if its meta page is gone (no lock was held). */
cairn_status page_file_at(page_file *file, uint64_t transaction);
/* Starts keeping `used`. free(3) is cairn_free(file->used). */
cairn_status page_file_keep_used(page_file *file);

typedef struct page_value {
    const void *data; /* inside a leaf page; NULL for a large value */
    uint64_t page;    /* first page of a large value: it lies inside the file */
    uint32_t bytes;
    bool subtree; /* data is a page_tree of 48 bytes */
} page_value;

enum { PAGE_TREE_BYTES = 48 };
page_tree page_tree_parse(const void *bytes);

typedef struct page_visitor {
    void *arg;
    /* Every record in order of key; false stops the walk. May be NULL. The key and value are borrowed for the call. */
    bool (*record)(void *arg, cairn_span key, const page_value *value);
    /* One sentence per damaged page. May be NULL. */
    void (*damage)(void *arg, const char *sentence);
} page_visitor;

typedef enum page_walk_kind {
    PAGE_WALK_ALL,
    PAGE_WALK_END,    /* the path to the last leaf, and its records */
    PAGE_WALK_NUMBERS /* all; keys are numbers of 8 bytes in host order: the free tree */
} page_walk_kind;

/* CORRUPT if a page was damaged (the first sentence is the error text), CANCELLED if the visitor stopped it. Damage
 * loses the records below it, not the rest. */
cairn_status page_walk(page_file *file, const char *name, const page_tree *tree, page_walk_kind kind,
                       const page_visitor *visitor);

/* Numbers of the leaf pages that may hold keys from `low` to `high` (in memcmp's order), in that order, with the least
 * key each may hold (empty for the first of all). The leaves themselves are not read; false from `each` ends it. */
cairn_status page_leaves(page_file *file, const char *name, const page_tree *tree, cairn_span low, cairn_span high,
                         bool (*each)(void *arg, cairn_span key, uint64_t page), void *arg);

/* The free list, which must name no page twice and none that a walk has reached: `used` must be kept. Same errors; each
 * sentence goes to `tell` (may be NULL). */
cairn_status page_walk_free(page_file *file, void (*tell)(void *, const char *), void *arg);

/* data.c: the trees of the named databases (DB_COUNT of them), every page of the main tree checked on the way. `damage`
 * (may be NULL) gets each sentence. */
cairn_status store_trees(page_file *file, page_tree *out, void (*damage)(void *, const char *), void *arg);

/* Reads the first `bytes` bytes of a large value, and checks the page header before it. `exact`: values of
 * this tree never change their size, so the run is as long as it must be: freeing it would free what follows. */
cairn_status page_read_large(const page_file *file, const char *name, const page_value *value, bool exact, void *out,
                             size_t bytes);
/* Pages of a large value: LMDB puts a header of 16 bytes before it. */
uint64_t page_run(const page_file *file, uint64_t bytes);

#endif
