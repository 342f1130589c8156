/* readers.c - one process writes, many read, some of them are killed and replaced at random moments.
 *
 *   campaign_readers [--minutes M | --seconds S] [--readers N] [--seed N] [--dir DIR]
 *
 * The writer appends batches of BATCH blocks to CONTEXTS contexts, synced to disk as in real life, and drops one that
 * has grown to LONGEST blocks for a new one. Everything in a block follows from the context's name and the block's
 * number, the tail's length from the number of blocks. Readers take snapshots, hold some of them for a while, and check
 * that
 *   - a context holds whole batches and the tail that was committed with them, and never goes back;
 *   - three of its blocks, read by snapshot or by fetch, hold every byte they should, also after a while;
 *   - nothing takes long because a commit is going on: the time of "begin a snapshot, find a context, look up a tile"
 * is kept apart for calls during which the writer was inside a commit. The supervisor kills a reader every KILL_MS on
 * average and starts another, and at the end wants the store sound, no reader slot left over, and what the writer drops
 * used again, whoever was killed while looking at it: once the readers are gone, the writer alone goes through
 * 2 CONTEXTS contexts more, in a file that grows by a tenth at most. A run of two minutes or more also wants the file
 * to be no larger at the end than after a third of the time, within a tenth; before that it is still filling, with what
 * commits use up while a view is held.
 *
 * Prints one line of figures; the exit status is 0 only if all of this held. */
#include "store_fixture.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { READERS_MAX = 512, CONTEXTS = 4, BATCH = 16, LONGEST = 192, KILL_MS = 150, FILLED_SECONDS = 120 };

static const cairn_geometry SHAPE = {
    .layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 64, .block_tokens = 31, .dtype = CAIRN_F16};

typedef struct tally { /* of one place in the table; several processes one after the other */
    atomic_ullong snapshots, blocks;
    atomic_ullong worst_ns;           /* of a look-up */
    atomic_ullong worst_in_commit_ns; /* of one that overlapped a commit */
    atomic_ullong in_commit;          /* how many did */
    atomic_ullong total_ns;
} tally;

typedef struct board { /* shared by all processes */
    atomic_ullong commits;
    atomic_ullong commit_ns, worst_commit_ns;
    atomic_bool committing;
    atomic_bool readers_stop, writer_stop;
    atomic_ullong drops;
    tally readers[READERS_MAX];
} board;

static board *all;
static char *path;
static uint64_t seed = 1;

#define must(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: process %ld: %s does not hold; last error: %s\n", __FILE__, __LINE__,              \
                    (long)getpid(), #condition, cairn_last_error());                                                   \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static void raise_to(atomic_ullong *most, uint64_t value)
{
    unsigned long long was = atomic_load(most);
    while (value > was && !atomic_compare_exchange_weak(most, &was, value)) {}
}

static void pause_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
}

static cairn_store *open_store(bool create, bool read_only)
{
    cairn_store_options opt;
    cairn_store *store;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = create;
    opt.read_only = read_only;
    opt.map_bytes = (uint64_t)8 << 30;
    opt.geometry = SHAPE;
    opt.model = (cairn_model_id){.fingerprint = 0x1234, .name = "fixture"};
    must(cairn_store_open(path, &opt, &store) == CAIRN_OK);
    return store;
}

/* "a <seed>": what its blocks hold. */
static uint64_t seed_of(const char *name)
{
    return strtoull(name + 2, NULL, 10);
}
static size_t tail_of(uint64_t blocks)
{
    return (size_t)(blocks / BATCH % SHAPE.block_tokens);
}

/* ---- the writer ---- */

typedef struct batch {
    cairn_block_data blocks[BATCH];
    cairn_token tokens[BATCH * 32];
    cairn_token tail[32];
    uint8_t *landmarks, *tiles;
} batch;

static void fill_batch(const fixture *fx, batch *b, uint64_t stream, uint64_t first)
{
    size_t landmark = cairn_landmark_payload_bytes(&SHAPE), tile = fixture_tile_bytes(fx), tiles = fixture_tiles(fx);
    for (size_t i = 0; i < BATCH; i++) {
        uint64_t number = first + i;
        fixture_tokens(stream, number * SHAPE.block_tokens, b->tokens + i * SHAPE.block_tokens, SHAPE.block_tokens);
        fixture_landmarks(fx, stream, number, b->landmarks + i * landmark);
        for (size_t t = 0; t < tiles; t++)
            fixture_tile(fx, stream, number, (unsigned)(t / SHAPE.kv_heads), (unsigned)(t % SHAPE.kv_heads),
                         b->tiles + (i * tiles + t) * tile);
        b->blocks[i] = (cairn_block_data){b->tokens + i * SHAPE.block_tokens, b->landmarks + i * landmark,
                                          b->tiles + i * tiles * tile};
    }
    fixture_tokens(stream, (first + BATCH) * SHAPE.block_tokens, b->tail, tail_of(first + BATCH));
}

static void write_on(void)
{
    fixture fx = {.geometry = SHAPE};
    batch b = {.landmarks = malloc(BATCH * cairn_landmark_payload_bytes(&SHAPE)),
               .tiles = malloc(BATCH * fixture_tiles(&fx) * fixture_tile_bytes(&fx))};
    test_random r = {seed};
    cairn_store *store = open_store(false, false);
    cairn_writer *writers[CONTEXTS] = {NULL};
    char names[CONTEXTS][32];
    uint64_t blocks[CONTEXTS] = {0}, next = seed * 1000;
    must(b.landmarks != NULL && b.tiles != NULL);
    while (!atomic_load(&all->writer_stop)) {
        size_t i = test_random_below(&r, CONTEXTS);
        if (writers[i] != NULL && blocks[i] >= LONGEST) {
            cairn_writer_end(writers[i]);
            writers[i] = NULL;
            must(cairn_context_drop(store, names[i]) == CAIRN_OK);
            atomic_fetch_add(&all->drops, 1);
        }
        if (writers[i] == NULL) {
            snprintf(names[i], sizeof names[i], "a %llu", (unsigned long long)next++);
            must(cairn_context_create(store, names[i], NULL) == CAIRN_OK);
            must(cairn_writer_begin(store, names[i], &writers[i]) == CAIRN_OK);
            blocks[i] = 0;
        }
        fill_batch(&fx, &b, seed_of(names[i]), blocks[i]);
        uint64_t began = cairn_now_ns();
        atomic_store(&all->committing, true);
        must(cairn_writer_commit(writers[i], b.blocks, BATCH, b.tail, tail_of(blocks[i] + BATCH), NULL) == CAIRN_OK);
        atomic_fetch_add(&all->commits, 1);
        atomic_store(&all->committing, false);
        uint64_t took = cairn_now_ns() - began;
        atomic_fetch_add(&all->commit_ns, took);
        raise_to(&all->worst_commit_ns, took);
        blocks[i] += BATCH;
        pause_ms(test_random_below(&r, 20));
    }
    for (size_t i = 0; i < CONTEXTS; i++) cairn_writer_end(writers[i]);
    cairn_store_close(store);
}

/* ---- a reader ---- */

typedef struct choice { /* one context of those that are there, at random */
    test_random *r;
    uint32_t seen;
    cairn_context_info info;
} choice;

static bool choose(void *arg, const cairn_context_info *info)
{
    choice *c = arg;
    if (info->blocks == 0) return true; /* just made */
    if (test_random_below(c->r, ++c->seen) == 0) c->info = *info;
    return true;
}

static void check_three(fixture *fx, cairn_snapshot *snap, cairn_fetch *fetch, test_random *r,
                        const cairn_context_info *info, const cairn_range *range)
{
    uint64_t stream = seed_of(info->name);
    size_t tile = fixture_tile_bytes(fx);
    for (int i = 0; i < 3; i++) {
        uint32_t block = test_random_below(r, (uint32_t)info->blocks);
        fixture_check_block(fx, snap, range->segment, block, stream, block);
        cairn_tile_id ids[4];
        cairn_tile_view views[4];
        uint8_t expected[2 * 31 * 64 * 2];
        must(tile == sizeof expected);
        for (uint16_t t = 0; t < 4; t++) ids[t] = (cairn_tile_id){range->segment, block, t / 2, t % 2};
        must(cairn_fetch_submit(fetch, snap, ids, NULL, 4) == CAIRN_OK);
        must(cairn_fetch_wait(fetch, views) == CAIRN_OK);
        for (unsigned t = 0; t < 4; t++) {
            fixture_tile(fx, stream, block, t / 2, t % 2, expected);
            must(memcmp(views[t].keys, expected, tile) == 0);
        }
    }
}

static void read_on(size_t place, uint64_t life)
{
    tally *mine = &all->readers[place];
    fixture fx = {.geometry = SHAPE};
    test_random r = {seed * 7919 + place * 104729 + life};
    fx.store = open_store(false, test_random_below(&r, 2) == 0);
    cairn_fetch *fetch;
    cairn_fetch_mode mode = test_random_below(&r, 2) == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
    must(cairn_fetch_new(fx.store, mode, 1 << 20, &fetch) == CAIRN_OK);
    char last_name[CAIRN_NAME_MAX + 1] = "";
    uint64_t last_blocks = 0;
    while (!atomic_load(&all->readers_stop)) {
        cairn_snapshot *snap;
        choice c = {.r = &r};
        cairn_range range;
        cairn_tile_view view;
        size_t n;
        bool overlapped = atomic_load(&all->committing);
        unsigned long long commits = atomic_load(&all->commits);
        uint64_t began = cairn_now_ns();
        must(cairn_snapshot_begin(fx.store, &snap) == CAIRN_OK);
        must(cairn_snapshot_contexts(snap, choose, &c) == CAIRN_OK);
        if (c.seen != 0) {
            must(cairn_snapshot_ranges(snap, c.info.id, &range, 1, &n) == CAIRN_OK && n == 1);
            must(cairn_snapshot_tile(snap, (cairn_tile_id){range.segment, 0, 0, 0}, &view) == CAIRN_OK);
        }
        uint64_t took = cairn_now_ns() - began;
        overlapped = overlapped || atomic_load(&all->committing) || atomic_load(&all->commits) != commits;
        raise_to(overlapped ? &mine->worst_in_commit_ns : &mine->worst_ns, took);
        atomic_fetch_add(&mine->in_commit, overlapped);
        atomic_fetch_add(&mine->total_ns, took);
        atomic_fetch_add(&mine->snapshots, 1);
        if (c.seen != 0) {
            cairn_token tail[32], expected[32];
            must(c.info.blocks % BATCH == 0 && range.first == 0 && range.count == c.info.blocks);
            must(c.info.tail_tokens == tail_of(c.info.blocks));
            must(cairn_snapshot_tail(snap, c.info.id, tail, 32, &n) == CAIRN_OK && n == c.info.tail_tokens);
            fixture_tokens(seed_of(c.info.name), c.info.blocks * SHAPE.block_tokens, expected, n);
            must(memcmp(tail, expected, n * sizeof *tail) == 0);
            must(strcmp(c.info.name, last_name) != 0 || c.info.blocks >= last_blocks);
            snprintf(last_name, sizeof last_name, "%s", c.info.name);
            last_blocks = c.info.blocks;
            check_three(&fx, snap, fetch, &r, &c.info, &range);
            atomic_fetch_add(&mine->blocks, 3);
            if (test_random_below(&r, 8) == 0) { /* the view stands, whatever is dropped meanwhile */
                pause_ms(test_random_below(&r, 400));
                check_three(&fx, snap, fetch, &r, &c.info, &range);
            }
        }
        cairn_snapshot_end(snap);
        pause_ms(test_random_below(&r, 30));
    }
    cairn_fetch_free(fetch);
    cairn_store_close(fx.store);
}

/* ---- the supervisor ---- */

static pid_t start_reader(size_t place, uint64_t life)
{
    pid_t pid = fork();
    if (pid == 0) {
        read_on(place, life);
        _exit(0);
    }
    return pid;
}

static uint64_t file_bytes(void)
{
    char file[4096];
    struct stat st;
    snprintf(file, sizeof file, "%s/data-1/data.mdb", path);
    return stat(file, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* True if the process ended as it should: by our hand (killed) or well. */
static bool ended_well(pid_t pid, bool killed)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    if (killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return true;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

typedef struct sizes { /* of the data file; 0 if not looked at */
    uint64_t third;    /* after a third of the time */
    uint64_t crowd;    /* when the last reader had ended */
    uint64_t alone;    /* when the writer had gone on alone */
} sizes;

/* True if the file is at most a tenth larger than it was. */
static bool held(const char *since, uint64_t was, uint64_t is)
{
    if (was == 0 || is <= was + was / 10) return true;
    printf("readers: the data file grew from %llu to %llu bytes %s\n", (unsigned long long)was, (unsigned long long)is,
           since);
    return false;
}

static int report(double seconds, size_t readers, uint64_t kills, const sizes *file, uint64_t failed)
{
    unsigned long long snapshots = 0, blocks = 0, in_commit = 0, total = 0, worst = 0, worst_in = 0;
    for (size_t i = 0; i < readers; i++) {
        const tally *t = &all->readers[i];
        snapshots += t->snapshots, blocks += t->blocks, in_commit += t->in_commit, total += t->total_ns;
        if (t->worst_ns > worst) worst = t->worst_ns;
        if (t->worst_in_commit_ns > worst_in) worst_in = t->worst_in_commit_ns;
    }
    unsigned long long commits = all->commits;
    printf(
        "readers: %.1f min, %zu readers, %llu killed; %llu commits of %d blocks, %llu contexts dropped, a commit "
        "%.1f ms, longest %.0f ms; %llu snapshots, %llu blocks checked; a look-up %.2f ms, longest %.0f ms alone and "
        "%.0f ms during a commit (%llu of them); data file %.1f MiB after a third, %.1f MiB when the readers ended, "
        "%.1f MiB when the writer had gone on alone; %llu failed\n",
        seconds / 60, readers, (unsigned long long)kills, commits, BATCH, (unsigned long long)all->drops,
        commits != 0 ? (double)all->commit_ns * 1e-6 / (double)commits : 0, (double)all->worst_commit_ns * 1e-6,
        snapshots, blocks, snapshots != 0 ? (double)total * 1e-6 / (double)snapshots : 0, (double)worst * 1e-6,
        (double)worst_in * 1e-6, in_commit, (double)file->third / 1048576, (double)file->crowd / 1048576,
        (double)file->alone / 1048576, (unsigned long long)failed);
    if (failed != 0 || snapshots == 0 || commits == 0) return 1;
    if (!held("while the writer was alone", file->crowd, file->alone)) return 1;
    return seconds < FILLED_SECONDS || held("after a third of the time", file->third, file->crowd) ? 0 : 1;
}

/* The writer goes through 2 CONTEXTS contexts with nobody looking; false if it does not. */
static bool alone(pid_t writer)
{
    unsigned long long until = atomic_load(&all->drops) + (unsigned long long)(2 * CONTEXTS);
    for (int ms = 0; atomic_load(&all->drops) < until; ms += 10) {
        if (ms > 120000 || kill(writer, 0) != 0) return false;
        pause_ms(10);
    }
    return true;
}

static int supervise(double seconds, size_t readers)
{
    static pid_t pids[READERS_MAX];
    test_random r = {seed};
    uint64_t kills = 0, lives = 0, failed = 0;
    sizes file = {0};
    cairn_store_close(open_store(true, false));
    pid_t writer = fork();
    if (writer == 0) {
        write_on();
        _exit(0);
    }
    for (size_t i = 0; i < readers; i++) pids[i] = start_reader(i, lives++);
    uint64_t began = cairn_now_ns();
    for (double past = 0; past < seconds; past = (double)(cairn_now_ns() - began) * 1e-9) {
        pause_ms(test_random_below(&r, 2 * KILL_MS));
        if (past > seconds / 3 && file.third == 0) file.third = file_bytes();
        int status;
        pid_t gone = waitpid(-1, &status, WNOHANG);
        if (gone > 0) { /* nobody ends before the time */
            failed++;
            if (gone == writer) break;
            for (size_t i = 0; i < readers; i++)
                if (pids[i] == gone) pids[i] = start_reader(i, lives++);
            if (failed > 20) break;
        }
        size_t i = test_random_below(&r, (uint32_t)readers);
        kill(pids[i], SIGKILL);
        failed += !ended_well(pids[i], true);
        kills++;
        pids[i] = start_reader(i, lives++);
    }
    atomic_store(&all->readers_stop, true);
    for (size_t i = 0; i < readers; i++) failed += !ended_well(pids[i], false);
    double lasted = (double)(cairn_now_ns() - began) * 1e-9;
    file.crowd = file_bytes();
    failed += failed == 0 && !alone(writer);
    atomic_store(&all->writer_stop, true);
    failed += !ended_well(writer, false);
    file.alone = file_bytes();
    cairn_store *store = open_store(false, false);
    cairn_store_stat st;
    cairn_verify_report verified;
    must(cairn_store_verify(store, true, NULL, NULL, NULL, &verified) == CAIRN_OK);
    must(verified.damaged == 0);
    must(cairn_store_stat_get(store, &st) == CAIRN_OK);
    must(st.readers == 0);
    cairn_store_close(store);
    return report(lasted, readers, kills, &file, failed);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"minutes", 1, NULL, 'm'}, {"seconds", 1, NULL, 's'},
                                          {"readers", 1, NULL, 'r'}, {"seed", 1, NULL, 'x'},
                                          {"dir", 1, NULL, 'd'},     {0}};
    double seconds = 60;
    size_t readers = 64;
    for (int o; (o = getopt_long(argc, argv, "", longs, NULL)) != -1;) switch (o) {
        case 'm': seconds = 60 * strtod(optarg, NULL); break;
        case 's': seconds = strtod(optarg, NULL); break;
        case 'r': readers = strtoul(optarg, NULL, 10); break;
        case 'x': seed = strtoull(optarg, NULL, 10); break;
        case 'd': setenv("TMPDIR", optarg, 1); break;
        default:
            fprintf(stderr,
                    "usage: campaign_readers [--minutes M | --seconds S] [--readers N] [--seed N] [--dir DIR]\n");
            return 2;
        }
    if (readers < 1 || readers > READERS_MAX || seconds <= 0) {
        fprintf(stderr, "readers: 1 to %d readers, and some time\n", READERS_MAX);
        return 2;
    }
    setenv("CMOCKA_TEST_ABORT", "1", 1); /* a failed assert of the fixture ends its process */
    char *dir = test_make_dir();
    path = test_path(dir, "store");
    all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(all != MAP_FAILED);
    int code = supervise(seconds, readers);
    free(path);
    test_remove_dir(dir);
    return code;
}
