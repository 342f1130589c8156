/* flips.c - bit flips everywhere in a store: what verify finds, and what a reader gets.
 *
 *   campaign_flips [--seed N] [--flips N] [--json FILE] [--list]
 *   campaign_flips --cost        what checking a tile's hash costs a fetch
 *
 * A small store is made, every byte of its data file is put into a class by walking LMDB's trees, and seeded bits are
 * flipped one at a time: half of them anywhere, a quarter in pages of trees, the rest in the two heads and in LMDB's
 * headers of large values. Each flip is tried in processes of their own, with a time limit: (1) open and verify deep;
 * (2) open and read every token, landmark and tile of every context, tiles through the map without hashes; (3) the same
 * with the hash of every tile checked. A reading is "same", "error", "wrong" (other bytes than before, and nobody said
 * so), "signal" or "hang".
 *
 * Then the same for the pointer, for index files (a flipped one must not load) and for an export file (it must not be
 * imported, and the store be as before).
 *
 * Must hold: verify finds each flip in a byte that is not slack; slack changes nothing; reading with hashes is never
 * wrong, a signal or a hang. --list prints each flip that verify did not find. Exit code 1 if something did not hold.
 */
#include "store_fixture.h"

#include <index_internal.h>
#include <pages.h>
#include <store_internal.h>

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const cairn_geometry GEOMETRY = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 32, .block_tokens = 63, .dtype = CAIRN_F16};
enum { PAGE = 4096, LIMIT_S = 20, FORKS = 60, HEAD = 16, META_END = 152 };

/* ---- classes of bytes ---- */

typedef enum class {
    UNUSED,      /* free pages, space between nodes, padding, ends of pages */
    STATISTICS,  /* LMDB's counts of large pages, and fields it writes and does not read */
    HEAD_NEW,    /* the meta page in force */
    HEAD_OLD,    /* the one before it */
    TREE_HEADER, /* of branch and leaf pages, node offsets */
    TREE_NODE,   /* node headers and keys */
    TREE_RECORD, /* where a tree begins */
    FREE_LIST,
    SMALL_RECORD, /* identity, counters, contexts, names, segments */
    TOKENS,
    LANDMARK,
    TILE,
    LARGE_HEADER, /* LMDB's header of a large value */
    CLASSES
} class;
static const char *const class_names[CLASSES] = {"slack",
                                                 "statistics of LMDB",
                                                 "head in force",
                                                 "head before it",
                                                 "tree page header",
                                                 "tree node and key",
                                                 "tree record",
                                                 "free list",
                                                 "small record",
                                                 "tokens",
                                                 "landmark",
                                                 "tile",
                                                 "header of a large value"};

typedef enum outcome { NONE, SAME, ERROR, WRONG, SIGNAL, HANG, OUTCOMES } outcome;
static const char *const outcome_names[OUTCOMES] = {"none", "same", "error", "wrong", "signal", "hang"};

static struct {
    fixture *fx;
    char *data_path;
    uint8_t *file, *class_of; /* a copy of the data file, and a class for each byte */
    uint64_t bytes;
    uint64_t digest; /* of all that can be read */
    outcome *shared; /* what a child found: [0] verify, [1] map, [2] hashed */
    bool list;
    int broken;
    uint64_t known; /* flips of the one bit that is known to take a commit back */
    uint64_t flips[CLASSES], found[CLASSES], plain[CLASSES][OUTCOMES], hashed[CLASSES][OUTCOMES];
} t;

static volatile sig_atomic_t enough; /* SIGTERM: the figures so far */
static void stop_early(int number)
{
    (void)number;
    enough = 1;
}

static void mark(uint64_t at, uint64_t n, class c)
{
    memset(t.class_of + at, (int)c, n);
}

static const uint8_t *page_at(uint64_t number)
{
    return t.file + number * PAGE;
}

/* A tree's own record: pad, flags, depth, branch, leaf, overflow pages, entries, root. */
static void classify_root(uint64_t at, class c)
{
    mark(at, PAGE_TREE_BYTES, c);
    mark(at, 4, STATISTICS);
    mark(at + 24, 8, STATISTICS);
}

static void classify_head(unsigned which, class c)
{
    uint64_t at = (uint64_t)which * PAGE;
    mark(at, META_END, c);
    mark(at + 40 + 24, 8, STATISTICS);
    classify_root(at + 88, c);
    mark(at, 10, STATISTICS);      /* page number, padding */
    mark(at + 12, 4, STATISTICS);  /* bounds of free space */
    mark(at + 24, 16, STATISTICS); /* address and size of a map: ours are given at open */
}

/* The tree is known to be sound: the walk of pages.c has been over it. */
static void classify_tree(uint64_t number, unsigned depth, class records)
{
    const uint8_t *p = page_at(number);
    uint64_t at = number * PAGE;
    unsigned lower = cairn_get_le16(p + 12);
    mark(at, lower, TREE_HEADER);
    mark(at + 8, 2, UNUSED); /* padding of the header */
    for (unsigned i = 0; i < (lower - HEAD) / 2; i++) {
        unsigned offset = cairn_get_le16(p + HEAD + 2 * i);
        const uint8_t *node = p + offset;
        unsigned key = cairn_get_le16(node + 6);
        mark(at + offset, 8 + key, TREE_NODE);
        if (depth > 1) { /* a branch page: the first key is never looked at */
            if (i == 0) mark(at + offset + 8, key, UNUSED);
            classify_tree((uint64_t)cairn_get_le32(node) | (uint64_t)cairn_get_le16(node + 4) << 32, depth - 1,
                          records);
        } else if ((cairn_get_le16(node + 4) & 1) != 0) { /* a large value */
            uint64_t large = cairn_get_le64(node + 8 + key);
            mark(at + offset + 8 + key, 8, TREE_NODE);
            mark(large * PAGE, HEAD, LARGE_HEADER);
            mark(large * PAGE + 8, 2, UNUSED);
            mark(large * PAGE + HEAD, cairn_get_le32(node), records);
        } else if (records == TREE_RECORD) {
            classify_root(at + offset + 8 + key, records);
        } else {
            mark(at + offset + 8 + key, cairn_get_le32(node), records);
        }
    }
}

static void classify(void)
{
    static const class records[DB_COUNT] = {
        [DB_META] = SMALL_RECORD, [DB_CONTEXT] = SMALL_RECORD, [DB_NAME] = SMALL_RECORD, [DB_SEGMENT] = SMALL_RECORD,
        [DB_TOKENS] = TOKENS,     [DB_LANDMARK] = LANDMARK,    [DB_TILE] = TILE};
    page_file file;
    page_tree trees[DB_COUNT];
    int fd = open(t.data_path, O_RDONLY);
    uint64_t txn[2] = {cairn_get_le64(page_at(0) + 144), cairn_get_le64(page_at(1) + 144)};
    unsigned now = txn[1] > txn[0];
    assert_ok(page_file_peek(fd, t.data_path, &file));
    assert_ok(page_file_at(&file, txn[now]));
    assert_ok(store_trees(&file, trees, NULL, NULL));
    close(fd);
    mark(0, t.bytes, UNUSED);
    classify_head(now, HEAD_NEW);
    classify_head(1 - now, HEAD_OLD);
    classify_tree(file.main_tree.root, file.main_tree.depth, TREE_RECORD);
    if (file.free_tree.root != UINT64_MAX) classify_tree(file.free_tree.root, file.free_tree.depth, FREE_LIST);
    for (int db = 0; db < DB_COUNT; db++)
        if (trees[db].root != UINT64_MAX) classify_tree(trees[db].root, trees[db].depth, records[db]);
}

/* ---- reading everything ---- */

typedef struct reading {
    cairn_store *store;
    cairn_snapshot *snap;
    cairn_fetch *fetch;
    cairn_hasher *sum;
    cairn_status status;
} reading;

static bool add_landmark(void *arg, uint32_t block, cairn_span payload)
{
    reading *r = arg;
    (void)block;
    cairn_hasher_add(r->sum, payload.data, payload.bytes);
    return true;
}

static cairn_status read_block(reading *r, uint64_t segment, uint32_t block)
{
    const cairn_geometry *g = cairn_store_geometry(r->store);
    cairn_token tokens[63];
    cairn_tile_id ids[8];
    cairn_tile_view views[8];
    size_t n = 0;
    cairn_status st = cairn_snapshot_tokens(r->snap, segment, block, 1, tokens);
    if (st != CAIRN_OK) return st;
    cairn_hasher_add(r->sum, tokens, sizeof tokens);
    if ((st = cairn_snapshot_landmarks(r->snap, segment, block, 1, add_landmark, r)) != CAIRN_OK) return st;
    for (uint32_t layer = g->first_layer; layer < g->layers && n < 8; layer++)
        for (uint32_t head = 0; head < g->kv_heads && n < 8; head++)
            ids[n++] = (cairn_tile_id){segment, block, (uint16_t)layer, (uint16_t)head};
    if ((st = cairn_fetch_submit(r->fetch, r->snap, ids, NULL, n)) != CAIRN_OK) return st;
    if ((st = cairn_fetch_wait(r->fetch, views)) != CAIRN_OK) return st;
    for (size_t i = 0; i < n; i++)
        cairn_hasher_add(r->sum, views[i].keys, cairn_tile_payload_bytes(g->dtype, g->block_tokens, g->head_dim));
    return CAIRN_OK;
}

static bool read_context(void *arg, const cairn_context_info *info)
{
    reading *r = arg;
    cairn_range ranges[16];
    cairn_token tail[63];
    cairn_segment_info segment;
    size_t n = 0, m = 0;
    cairn_hasher_add(r->sum, info->name, strlen(info->name));
    cairn_hasher_add(r->sum, &info->tokens, sizeof info->tokens);
    r->status = cairn_snapshot_ranges(r->snap, info->id, ranges, 16, &n);
    if (r->status == CAIRN_OK) r->status = cairn_snapshot_tail(r->snap, info->id, tail, 63, &m);
    if (r->status != CAIRN_OK) return false;
    cairn_hasher_add(r->sum, tail, m * sizeof *tail);
    for (size_t i = 0; i < n && r->status == CAIRN_OK; i++) {
        r->status = cairn_snapshot_segment(r->snap, ranges[i].segment, &segment);
        for (uint32_t b = 0; b < ranges[i].count && r->status == CAIRN_OK; b++)
            r->status = read_block(r, ranges[i].segment, ranges[i].first + b);
    }
    return r->status == CAIRN_OK;
}

static cairn_status read_all(bool hashes, uint64_t *digest)
{
    reading r = {.sum = cairn_hasher_new()};
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.read_only = true;
    opt.verify_reads = hashes;
    opt.map_bytes = (uint64_t)1 << 30;
    cairn_status st = cairn_store_open(t.fx->path, &opt, &r.store);
    if (st == CAIRN_OK) st = cairn_snapshot_begin(r.store, &r.snap);
    if (st == CAIRN_OK) st = cairn_fetch_new(r.store, CAIRN_FETCH_MAP, 0, &r.fetch);
    if (st == CAIRN_OK) st = cairn_snapshot_contexts(r.snap, read_context, &r);
    if (st == CAIRN_OK) st = r.status;
    *digest = cairn_hasher_value(r.sum);
    cairn_fetch_free(r.fetch);
    cairn_snapshot_end(r.snap);
    cairn_store_close(r.store);
    cairn_hasher_free(r.sum);
    return st;
}

static outcome verify_all(void)
{
    cairn_store_options opt;
    cairn_store *store = NULL;
    cairn_store_options_init(&opt, sizeof opt);
    opt.read_only = true;
    opt.map_bytes = (uint64_t)1 << 30;
    cairn_status st = cairn_store_open(t.fx->path, &opt, &store);
    if (st == CAIRN_OK) st = cairn_store_verify(store, true, NULL, NULL, NULL, NULL);
    cairn_store_close(store);
    return st == CAIRN_OK ? SAME : ERROR;
}

/* ---- one flip ---- */

static void run_parts(int from)
{
    for (int part = from; part < 3; part++) {
        uint64_t digest = 0;
        if (part == 0)
            t.shared[part] = verify_all();
        else
            t.shared[part] = read_all(part == 2, &digest) != CAIRN_OK ? ERROR : digest == t.digest ? SAME : WRONG;
    }
}

/* All parts in one process; what a signal or the time limit ended goes on in the next. */
static void try_flip(void)
{
    for (int part = 0; part < 3; part++) t.shared[part] = NONE;
    for (int part = 0; part < 3;) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            signal(SIGALRM, SIG_DFL);
            signal(SIGTERM, SIG_IGN);
            alarm(LIMIT_S);
            run_parts(part);
            _exit(0);
        }
        int how = 0;
        assert_int_equal(waitpid(pid, &how, 0), pid);
        while (part < 3 && t.shared[part] != NONE) part++;
        if (part < 3) t.shared[part++] = WIFSIGNALED(how) && WTERMSIG(how) == SIGALRM ? HANG : SIGNAL;
    }
}

static void flip(int fd, const uint8_t *whole, uint64_t at, unsigned bit, bool on)
{
    uint8_t byte = whole[at] ^ (uint8_t)(on ? 1u << bit : 0);
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
}

static void complain(const char *what, uint64_t at, unsigned bit, const char *why)
{
    if (t.broken++ < 50)
        printf("flips: BROKEN: %s, byte %llu (%llu of page %llu), bit %u: %s\n", what, (unsigned long long)at,
               (unsigned long long)(at % PAGE), (unsigned long long)(at / PAGE), bit, why);
}

static void flip_data(uint64_t at, unsigned bit, int fd)
{
    class c = (class)t.class_of[at];
    flip(fd, t.file, at, bit, true);
    try_flip();
    flip(fd, t.file, at, bit, false);
    outcome verified = t.shared[0], plain = t.shared[1], hashed = t.shared[2];
    t.flips[c]++;
    t.found[c] += verified == ERROR;
    t.plain[c][plain]++;
    t.hashed[c][hashed]++;
    if (verified == SIGNAL || verified == HANG) complain(class_names[c], at, bit, "verify does not survive it");
    if (c == UNUSED || c == STATISTICS) {
        if (plain != SAME || hashed != SAME) complain(class_names[c], at, bit, outcome_names[plain]);
        return;
    }
    if (at % PAGE == 144 && bit == 1 && c == HEAD_NEW && (t.file[at] & 2) != 0) { /* see check_heads in pages.c */
        t.known++;
        return;
    }
    if (verified == SAME) {
        if (t.list)
            printf("flips: not found: %s, byte %llu of page %llu, bit %u: %s\n", class_names[c],
                   (unsigned long long)(at % PAGE), (unsigned long long)(at / PAGE), bit, outcome_names[plain]);
        if (plain != SAME || hashed != SAME) complain(class_names[c], at, bit, "verify finds nothing");
    }
    if (hashed == WRONG || hashed == SIGNAL || hashed == HANG) complain(class_names[c], at, bit, outcome_names[hashed]);
    if (plain == SIGNAL || plain == HANG || (plain == WRONG && c != TILE))
        complain(class_names[c], at, bit, outcome_names[plain]);
}

/* ---- the store ---- */

static void make_store(void)
{
    t.fx = fixture_new(GEOMETRY);
    fixture_context(t.fx, "one", 1, 24, 3);
    fixture_context(t.fx, "two", 2, 20, 0);
    fixture_context(t.fx, "three", 3, 9, 1);
    for (int i = 0; i < FORKS; i++) { /* so that the small trees have branch pages too */
        char name[200];
        memset(name, 'n', sizeof name);
        snprintf(name + 150, 40, "-%d", i);
        assert_ok(cairn_context_fork(t.fx->store, "one", name, (uint64_t)(i % 3) * 63 + (uint64_t)i, NULL));
    }
    assert_ok(cairn_context_drop(t.fx->store, "two"));
    cairn_store_close(t.fx->store);
    t.fx->store = NULL;
    size_t bytes = 0;
    t.data_path = test_path(t.fx->path, "data-1/data.mdb");
    t.file = test_read_file(t.data_path, &bytes);
    t.bytes = bytes;
    t.class_of = calloc(1, bytes);
    assert_non_null(t.class_of);
    classify();
    assert_ok(read_all(true, &t.digest));
}

static void flip_data_file(test_random *r, uint32_t n)
{
    uint64_t *trees = malloc(t.bytes * sizeof *trees);
    uint64_t *larges = malloc(t.bytes / PAGE * sizeof *larges);
    size_t trees_n = 0, larges_n = 0;
    for (uint64_t page = 0; page < t.bytes / PAGE; page++) {
        if ((class)t.class_of[page * PAGE] == LARGE_HEADER) larges[larges_n++] = page * PAGE;
        if (page < 2 || (class)t.class_of[page * PAGE] == TREE_HEADER)
            for (uint64_t i = 0; i < PAGE; i++)
                if (t.class_of[page * PAGE + i] != UNUSED || i % 8 == 0) trees[trees_n++] = page * PAGE + i;
    }
    int fd = open(t.data_path, O_WRONLY);
    assert_true(fd >= 0);
    for (uint32_t i = 0; i < n && !enough; i++) {
        uint64_t at = i % 4 < 2    ? test_random_u64(r) % t.bytes
                      : i % 4 == 2 ? trees[test_random_u64(r) % trees_n]
                      : i % 8 == 3 ? i / 8 % 2 * PAGE + test_random_below(r, META_END)
                                   : larges[test_random_u64(r) % larges_n] + test_random_below(r, HEAD);
        flip_data(at, test_random_below(r, 8), fd);
    }
    close(fd);
    free(trees);
    free(larges);
}

/* ---- the other files ---- */

typedef struct other {
    const char *name;
    uint64_t flips, refused, same;
} other;

static void flip_pointer(other *o)
{
    char *path = test_path(t.fx->path, "current");
    size_t bytes = 0;
    uint8_t *whole = test_read_file(path, &bytes);
    int fd = open(path, O_WRONLY);
    for (uint64_t at = 0; at < bytes; at++)
        for (unsigned bit = 0; bit < 8; bit++) {
            cairn_store_options opt;
            cairn_store *store = NULL;
            cairn_store_options_init(&opt, sizeof opt);
            opt.create = true; /* as an ingest opens it */
            opt.geometry = GEOMETRY;
            flip(fd, whole, at, bit, true);
            cairn_status st = cairn_store_open(t.fx->path, &opt, &store);
            cairn_store_close(store);
            flip(fd, whole, at, bit, false);
            uint64_t digest = 0;
            o->flips++;
            o->refused += st != CAIRN_OK;
            if (st == CAIRN_OK) complain("pointer", at, bit, "opened");
            if (read_all(true, &digest) != CAIRN_OK || digest != t.digest)
                complain("pointer", at, bit, "the store was lost by opening it");
        }
    close(fd);
    free(whole);
    free(path);
}

static void flip_index_files(other *o, test_random *r, uint32_t n)
{
    enum { D = 32, ROWS = 500 };
    static const char *const kinds[] = {"flat", "sq8", "ivf", "hnsw"};
    float *rows = malloc(ROWS * D * sizeof *rows);
    test_random_fill(r, rows, ROWS * D);
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        cairn_index *index = NULL;
        uint64_t hash = 0;
        size_t bytes = 0;
        char *path = test_path(t.fx->dir, kinds[k]);
        assert_ok(cairn_index_new(kinds[k], D, CAIRN_F32, &index));
        assert_ok(cairn_index_add(index, ROWS, rows));
        assert_ok(cairn_index_seal(index, ROWS));
        assert_ok(cairn_index_save(index, path, &hash));
        cairn_index_free(index);
        uint8_t *whole = test_read_file(path, &bytes);
        int fd = open(path, O_WRONLY);
        for (uint32_t i = 0; i < n; i++) {
            uint64_t at = test_random_u64(r) % bytes;
            unsigned bit = test_random_below(r, 8);
            assert_ok(cairn_index_new(kinds[k], D, CAIRN_F32, &index));
            assert_ok(cairn_index_add(index, ROWS, rows));
            flip(fd, whole, at, bit, true);
            cairn_status st = cairn_index_load(index, path, hash, ROWS, i % 2 == 1);
            flip(fd, whole, at, bit, false);
            cairn_index_free(index);
            o->flips++;
            o->refused += st == CAIRN_CORRUPT;
            if (st != CAIRN_CORRUPT) complain(kinds[k], at, bit, "the index file was loaded");
        }
        close(fd);
        free(whole);
        free(path);
    }
    free(rows);
}

static void flip_export_file(other *o, test_random *r, uint32_t n)
{
    char *path = test_path(t.fx->dir, "three.cairn");
    size_t bytes = 0;
    fixture_open(t.fx, false);
    assert_ok(cairn_context_export(t.fx->store, "three", path, NULL, NULL));
    uint8_t *whole = test_read_file(path, &bytes);
    int fd = open(path, O_WRONLY);
    cairn_store_stat before, after;
    assert_ok(cairn_store_stat_get(t.fx->store, &before));
    for (uint32_t i = 0; i < n; i++) {
        uint64_t at = i < 192 * 8 ? i / 8 : test_random_u64(r) % bytes; /* each bit of the header, then anywhere */
        unsigned bit = i < 192 * 8 ? i % 8 : test_random_below(r, 8);
        flip(fd, whole, at, bit, true);
        cairn_status st = cairn_context_import(t.fx->store, path, "copy", NULL, NULL);
        flip(fd, whole, at, bit, false);
        assert_ok(cairn_store_stat_get(t.fx->store, &after));
        o->flips++;
        o->refused += st != CAIRN_OK;
        if (st == CAIRN_OK) complain("export file", at, bit, "it was imported");
        if (memcmp(&before.contexts, &after.contexts, 4 * sizeof before.contexts) != 0)
            complain("export file", at, bit, "something of it is in the store");
    }
    close(fd);
    free(whole);
    free(path);
    cairn_store_close(t.fx->store);
    t.fx->store = NULL;
}

/* ---- what checking costs ----
 *
 * Head dimension 128: tiles of 32 KiB in the page cache, fetched through the map in batches of 128, all of them in each
 * pass, each line of them read as attention does. The first pass of a fetch maps the pages and hashes, later ones look
 * the hash up. Time is the thread's own. */

/* Of this thread: others on the machine do not count, but for the bandwidth they take. */
static double cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static double pass_ns(cairn_fetch *fetch, cairn_snapshot *snap, const cairn_tile_id *ids, size_t n, double *sum)
{
    cairn_tile_view views[128];
    double start = cpu_ns();
    for (size_t i = 0; i < n; i += 128) {
        assert_ok(cairn_fetch_submit(fetch, snap, ids + i, NULL, 128));
        assert_ok(cairn_fetch_wait(fetch, views));
        for (size_t k = 0; k < 128; k++) { /* and every line of it is read, as attention does */
            const uint64_t *words = views[k].keys;
            for (size_t w = 0; w < 2 * 63 * 128 * 2 / 8; w += 8) *sum += (double)words[w];
        }
    }
    return cpu_ns() - start;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void measure(void)
{
    enum { TILES = 4096, ROUNDS = 15, WAYS = 4 };
    static const char *const names[WAYS] = {"first touch, not checked", "first touch, checked", "later, not checked",
                                            "later, checked before"};
    cairn_geometry g = {.layers = 1, .kv_heads = 4, .head_dim = 128, .block_tokens = 63, .dtype = CAIRN_F16};
    fixture *fx = fixture_new(g);
    uint64_t segment = fixture_context(fx, "a", 1, TILES / 4, 0);
    cairn_tile_id *ids = malloc(TILES * sizeof *ids);
    double ns[WAYS][ROUNDS], sum = 0;
    size_t tile = fixture_tile_bytes(fx);
    for (size_t i = 0; i < TILES; i++) ids[i] = (cairn_tile_id){segment, (uint32_t)(i / 4), 0, (uint16_t)(i % 4)};
    for (int round = 0; round < ROUNDS; round++)
        for (int checked = 0; checked < 2; checked++) { /* in turn, so that other work on the machine hits both */
            cairn_snapshot *snap = NULL;
            cairn_fetch *fetch = NULL;
            cairn_store_close(fx->store);
            fixture_open(fx, checked);
            assert_ok(cairn_snapshot_begin(fx->store, &snap));
            assert_ok(cairn_fetch_new(fx->store, CAIRN_FETCH_MAP, 0, &fetch));
            ns[checked][round] = pass_ns(fetch, snap, ids, TILES, &sum);
            ns[2 + checked][round] = pass_ns(fetch, snap, ids, TILES, &sum);
            cairn_fetch_free(fetch);
            cairn_snapshot_end(snap);
        }
    for (int i = 0; i < WAYS; i++) {
        qsort(ns[i], ROUNDS, sizeof ns[i][0], by_value);
        printf("cost: %-26s %7.2f us a tile of %zu bytes, %6.2f GB/s (median of %d passes over %d tiles; best %.2f)\n",
               names[i], ns[i][ROUNDS / 2] / TILES * 1e-3, tile, (double)tile * TILES / ns[i][ROUNDS / 2], ROUNDS,
               TILES, ns[i][0] / TILES * 1e-3);
    }
    if (sum == 0.5) printf("never\n"); /* so that reading is not thrown out */
    free(ids);
    fixture_free(fx);
}

/* ---- what came out ---- */

static void say(FILE *out, const other *others, size_t n, uint64_t seed, double seconds, bool json)
{
    if (json) fprintf(out, "{\"campaign\": \"flips\", \"seed\": %llu, \"classes\": [", (unsigned long long)seed);
    if (!json)
        fprintf(out, "flips: %-24s %8s %8s | map: same error wrong signal hang | hashed: same error wrong\n",
                "bytes of", "flips", "found");
    for (int c = 0; c < CLASSES; c++) {
        const uint64_t *p = t.plain[c], *h = t.hashed[c];
        fprintf(out,
                json
                    ? "%s{\"name\": \"%s\", \"flips\": %llu, \"found\": %llu, \"map\": [%llu, %llu, %llu, %llu, %llu], "
                      "\"hashed\": [%llu, %llu, %llu]}"
                    : "%sflips: %-24s %8llu %8llu | %9llu %5llu %5llu %6llu %4llu | %12llu %5llu %5llu\n",
                json && c > 0 ? ", " : "", class_names[c], (unsigned long long)t.flips[c],
                (unsigned long long)t.found[c], (unsigned long long)p[SAME], (unsigned long long)p[ERROR],
                (unsigned long long)p[WRONG], (unsigned long long)p[SIGNAL], (unsigned long long)p[HANG],
                (unsigned long long)h[SAME], (unsigned long long)h[ERROR], (unsigned long long)h[WRONG]);
    }
    if (json) fprintf(out, "], \"files\": [");
    for (size_t i = 0; i < n; i++)
        fprintf(out, json ? "%s{\"name\": \"%s\", \"flips\": %llu, \"refused\": %llu}" : "%sflips: %-24s %8llu %8llu\n",
                json && i > 0 ? ", " : "", others[i].name, (unsigned long long)others[i].flips,
                (unsigned long long)others[i].refused);
    if (json)
        fprintf(out, "], \"broken\": %d, \"seconds\": %.1f}\n", t.broken, seconds);
    else
        fprintf(out, "flips: seed %llu, %.0f s: %d findings; %llu flips of the bit that takes a commit back\n",
                (unsigned long long)seed, seconds, t.broken, (unsigned long long)t.known);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"seed", required_argument, NULL, 's'}, {"flips", required_argument, NULL, 'n'},
        {"json", required_argument, NULL, 'j'}, {"list", no_argument, NULL, 'l'},
        {"cost", no_argument, NULL, 'c'},       {NULL, 0, NULL, 0}};
    uint64_t seed = 1, flips = 1000, start = cairn_now_ns();
    const char *json = NULL;
    bool cost = false;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == 's') seed = strtoull(optarg, NULL, 10);
        if (o == 'n') flips = strtoull(optarg, NULL, 10);
        if (o == 'j') json = optarg;
        if (o == 'l') t.list = true;
        if (o == 'c') cost = true;
        if (o == '?') return 2;
    }
    setenv("CMOCKA_TEST_ABORT", "1", 1); /* there is no list of tests to jump back into */
    if (cost) {
        measure();
        return 0;
    }
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    t.shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    signal(SIGTERM, stop_early);
    test_random r = {seed};
    other others[] = {{.name = "pointer 'current'"}, {.name = "index files"}, {.name = "export file"}};
    make_store();
    flip_data_file(&r, (uint32_t)flips);
    flip_pointer(&others[0]);
    flip_index_files(&others[1], &r, enough ? 1 : (uint32_t)(flips / 40 + 1));
    flip_export_file(&others[2], &r, enough ? 1 : (uint32_t)(flips / 5 + 1));
    double seconds = (double)(cairn_now_ns() - start) * 1e-9;
    say(stdout, others, 3, seed, seconds, false);
    FILE *out = json != NULL ? fopen(json, "w") : NULL;
    if (out != NULL) say(out, others, 3, seed, seconds, true);
    if (out != NULL) fclose(out);
    fixture_free(t.fx);
    return t.broken > 0;
}
