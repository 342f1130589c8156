/* test_store_crash.c - several processes, killed processes, full disks, small address spaces, read-only media. */
#include "store_fixture.h"

#include <store_internal.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const cairn_geometry small = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 32, .block_tokens = 63, .dtype = CAIRN_F16};

/* A child speaks to its parent by one byte at a time. */
typedef struct child {
    pid_t pid;
    int from, to;
} child;

static child start(void (*body)(int in, int out, void *arg), void *arg)
{
    int up[2], down[2];
    assert_int_equal(pipe(up), 0);
    assert_int_equal(pipe(down), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        close(up[0]);
        close(down[1]);
        setenv("CMOCKA_TEST_ABORT", "1", 1); /* a failed assert must not jump back into the parent's list of tests */
        body(down[0], up[1], arg);
        _exit(0);
    }
    close(up[1]);
    close(down[0]);
    return (child){pid, up[0], down[1]};
}

static void tell(int fd)
{
    if (write(fd, "x", 1) != 1) _exit(90);
}

static bool hear(int fd)
{
    char c;
    return read(fd, &c, 1) == 1;
}

static int end(child c)
{
    int how;
    /* a byte and not just the end of the pipe, whose writing end later children hold too */
    if (write(c.to, "x", 1) != 1) assert_int_equal(errno, EPIPE);
    close(c.to);
    assert_int_equal(waitpid(c.pid, &how, 0), c.pid);
    close(c.from);
    if (WIFSIGNALED(how)) return -WTERMSIG(how);
    return WEXITSTATUS(how);
}

static void kill_child(child c)
{
    kill(c.pid, SIGKILL);
    assert_int_equal(end(c), -SIGKILL);
}

/* In a child there is no test to fail: its exit status says which line did. */
#define must(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "child, line %d: %s: %s\n", __LINE__, #condition, cairn_last_error());                     \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static cairn_status open_store(const char *path, bool create, uint64_t map_bytes, cairn_store **out)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = create;
    opt.map_bytes = map_bytes;
    if (create) opt.geometry = small;
    return cairn_store_open(path, &opt, out);
}

static fixture *new_fixture(void)
{
    fixture *fx = calloc(1, sizeof *fx);
    fx->geometry = small;
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "store");
    return fx;
}

static void assert_clean(cairn_store *store)
{
    if (cairn_store_verify(store, true, NULL, NULL, NULL, NULL) != CAIRN_OK) fail_msg("%s", cairn_last_error());
}

/* Blocks [first, first + n) of the stream `seed` in one commit, and `tail` tokens after them. */
static cairn_status commit(fixture *fx, cairn_writer *writer, uint64_t seed, uint64_t first, size_t n, size_t tail)
{
    enum { MOST = 8, C = 63 };
    static cairn_token tokens[MOST + 1][C];
    size_t landmark = cairn_landmark_payload_bytes(&fx->geometry), tile = fixture_tile_bytes(fx),
           tiles = fixture_tiles(fx);
    uint8_t *room = malloc(MOST * (landmark + tile * tiles));
    cairn_block_data data[MOST];
    for (size_t i = 0; i < n; i++) {
        uint8_t *landmarks = room + i * (landmark + tile * tiles), *payload = landmarks + landmark;
        fixture_tokens(seed, (first + i) * C, tokens[i], C);
        fixture_landmarks(fx, seed, first + i, landmarks);
        for (size_t t = 0; t < tiles; t++)
            fixture_tile(fx, seed, first + i, (unsigned)(fx->geometry.first_layer + t / fx->geometry.kv_heads),
                         (unsigned)(t % fx->geometry.kv_heads), payload + t * tile);
        data[i] = (cairn_block_data){tokens[i], landmarks, payload};
    }
    fixture_tokens(seed, (first + n) * C, tokens[MOST], tail);
    cairn_status status = cairn_writer_commit(writer, data, n, tokens[MOST], tail, NULL);
    free(room);
    return status;
}

/* ---- two processes, one context ---- */

static void hold_lease(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_writer *writer;
    must(open_store(fx->path, false, 0, &fx->store) == CAIRN_OK);
    must(cairn_writer_begin(fx->store, "a", &writer) == CAIRN_OK);
    tell(out);
    hear(in);
    cairn_writer_end(writer);
    cairn_store_close(fx->store);
}

static void a_second_process_is_told_who_appends_and_takes_over_when_that_one_is_gone(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    cairn_writer *writer;
    char pid[32];
    for (int killed = 0; killed < 2; killed++) {
        assert_ok(open_store(fx->path, true, 0, &fx->store));
        if (killed == 0) assert_ok(cairn_context_create(fx->store, "a", NULL));
        cairn_store_close(fx->store);
        child c = start(hold_lease, fx);
        assert_true(hear(c.from));
        assert_ok(open_store(fx->path, false, 0, &fx->store));
        assert_int_equal(cairn_writer_begin(fx->store, "a", &writer), CAIRN_BUSY);
        snprintf(pid, sizeof pid, "pid %d on ", (int)c.pid);
        assert_non_null(strstr(cairn_last_error(), pid));
        assert_non_null(strstr(cairn_last_error(), "since 2"));
        assert_non_null(strstr(cairn_last_error(), program_invocation_short_name));
        assert_int_equal(cairn_context_drop(fx->store, "a"), CAIRN_BUSY);
        assert_ok(cairn_context_fork(fx->store, "a", killed ? "b" : "c", UINT64_MAX, NULL)); /* goes on meanwhile */
        if (killed)
            kill_child(c);
        else
            assert_int_equal(end(c), 0);
        assert_ok(cairn_writer_begin(fx->store, "a", &writer));
        assert_ok(commit(fx, writer, 1, (uint64_t)killed, 1, 0));
        cairn_writer_end(writer);
        assert_clean(fx->store);
        cairn_store_close(fx->store);
        fx->store = NULL;
    }
    fixture_free(fx);
}

static void use_parents_handle(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_snapshot *snap;
    cairn_store *own;
    (void)in, (void)out;
    must(cairn_snapshot_begin(fx->store, &snap) == CAIRN_INVALID);
    must(strstr(cairn_last_error(), "fork") != NULL);
    must(cairn_context_create(fx->store, "b", NULL) == CAIRN_INVALID);
    must(open_store(fx->path, false, 0, &own) == CAIRN_OK);
    must(own->env != fx->store->env);
    must(cairn_context_create(own, "b", NULL) == CAIRN_OK);
    cairn_store_close(own);
    cairn_store_close(fx->store);
}

static void a_handle_does_not_survive_a_fork_but_the_child_may_open_its_own(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    cairn_writer *writer;
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_int_equal(end(start(use_parents_handle, fx)), 0);
    assert_ok(commit(fx, writer, 1, 0, 2, 0)); /* the parent's is as it was */
    cairn_writer_end(writer);
    assert_clean(fx->store);
    fixture_free(fx);
}

static void open_late(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_store_stat st;
    must(hear(in));
    must(open_store(fx->path, true, 0, &fx->store) == CAIRN_OK);
    must(cairn_store_stat_get(fx->store, &st) == CAIRN_OK);
    must(write(out, st.uuid, 36) == 36);
    cairn_store_close(fx->store);
}

static void processes_that_create_one_store_at_once_get_the_same_one(void **state)
{
    (void)state;
    for (int round = 0; round < 5; round++) {
        fixture *fx = new_fixture();
        child c[6];
        char uuid[6][37] = {{0}};
        for (int i = 0; i < 6; i++) c[i] = start(open_late, fx);
        for (int i = 0; i < 6; i++) tell(c[i].to);
        for (int i = 0; i < 6; i++) {
            assert_int_equal(read(c[i].from, uuid[i], 36), 36);
            assert_int_equal(end(c[i]), 0);
            assert_string_equal(uuid[i], uuid[0]);
        }
        fixture_free(fx);
    }
}

/* ---- killed ---- */

static void work_until_killed(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_writer *writer;
    cairn_context_info info;
    test_random random = {(uint64_t)getpid()};
    (void)in;
    must(open_store(fx->path, false, 0, &fx->store) == CAIRN_OK);
    must(cairn_writer_begin(fx->store, "a", &writer) == CAIRN_OK);
    must(cairn_writer_info(writer, &info) == CAIRN_OK);
    tell(out);
    for (uint64_t at = info.blocks;;) {
        size_t n = test_random_below(&random, 4), tail = test_random_below(&random, 63);
        char name[32];
        must(commit(fx, writer, 77, at, n, tail) == CAIRN_OK);
        at += n;
        snprintf(name, sizeof name, "f%u", test_random_below(&random, 2));
        cairn_status status =
            cairn_context_fork(fx->store, "a", name, test_random_below(&random, (uint32_t)at * 63 + 1), NULL);
        must(status == CAIRN_OK || status == CAIRN_EXISTS);
        if (status == CAIRN_EXISTS) must(cairn_context_drop(fx->store, name) == CAIRN_OK);
        if (at > 130) { /* start over, so that freeing is interrupted too: 520 tiles, three transactions */
            must(cairn_writer_truncate(writer) == CAIRN_OK);
            at = 0;
        }
    }
}

static void after_kill_9_at_any_moment_contexts_hold_whole_blocks_and_verify_is_clean(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    test_random random = {4242};
    uint64_t blocks = 0, freed;
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    cairn_store_close(fx->store);
    for (int round = 0; round < 60; round++) {
        child c = start(work_until_killed, fx);
        assert_true(hear(c.from));
        usleep(test_random_below(&random, 40000));
        kill_child(c);
        assert_ok(open_store(fx->path, false, 0, &fx->store));
        assert_clean(fx->store);
        cairn_snapshot *snap;
        cairn_context_info info;
        cairn_token tail[63], expected[63];
        size_t n;
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_snapshot_context(snap, "a", &info));
        if (info.blocks > 6) fixture_check_blocks(fx, snap, "a", 77, info.blocks - 6, 6);
        assert_ok(cairn_snapshot_tail(snap, info.id, tail, 63, &n));
        fixture_tokens(77, info.blocks * 63, expected, n);
        assert_memory_equal(tail, expected, n * sizeof *tail);
        assert_int_equal(info.input.done_tokens, info.tokens);
        cairn_snapshot_end(snap);
        assert_ok(cairn_store_sweep(fx->store, &freed));
        assert_clean(fx->store);
        cairn_store_close(fx->store);
        blocks += info.blocks;
    }
    assert_true(blocks > 100);
    fx->store = NULL;
    fixture_free(fx);
}

static void drop_until_killed(int in, int out, void *arg)
{
    fixture *fx = arg;
    (void)in;
    must(open_store(fx->path, false, 0, &fx->store) == CAIRN_OK);
    tell(out);
    must(cairn_context_drop(fx->store, "a") == CAIRN_OK);
    cairn_store_close(fx->store);
}

static void a_drop_killed_half_way_leaves_no_context_and_sweep_returns_the_rest(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    test_random random = {31};
    int half = 0;
    for (int round = 0; round < 40 && (round < 8 || half == 0); round++) {
        cairn_writer *writer;
        cairn_store_stat st;
        uint64_t freed;
        assert_ok(open_store(fx->path, true, 0, &fx->store));
        assert_ok(cairn_context_create(fx->store, "a", NULL));
        assert_ok(cairn_writer_begin(fx->store, "a", &writer));
        for (uint64_t i = 0; i < 256; i += 8)
            assert_ok(commit(fx, writer, 2, i, 8, 0)); /* 1024 tiles: 5 transactions */
        cairn_writer_end(writer);
        cairn_store_close(fx->store);
        child c = start(drop_until_killed, fx);
        assert_true(hear(c.from));
        usleep(test_random_below(&random, 15000));
        kill(c.pid, SIGKILL);
        end(c);
        assert_ok(open_store(fx->path, false, 0, &fx->store));
        assert_clean(fx->store);
        assert_ok(cairn_store_stat_get(fx->store, &st));
        if (st.contexts == 1) { /* killed before the first transaction: nothing has happened */
            assert_int_equal(st.tiles, 1024);
            assert_ok(cairn_context_drop(fx->store, "a"));
        } else {
            assert_ok(cairn_store_sweep(fx->store, &freed));
            assert_int_equal(freed > 0, st.blocks > 0);
            half += freed > 0;
        }
        assert_ok(cairn_store_stat_get(fx->store, &st));
        assert_int_equal(st.tiles + st.blocks + st.segments + st.contexts, 0);
        assert_clean(fx->store);
        cairn_store_close(fx->store);
    }
    assert_true(half > 0);
    fx->store = NULL;
    fixture_free(fx);
}

static void create_until_killed(int in, int out, void *arg)
{
    fixture *fx = arg;
    (void)in;
    tell(out);
    must(open_store(fx->path, true, 0, &fx->store) == CAIRN_OK);
    cairn_store_close(fx->store);
}

static void a_creation_killed_at_any_moment_is_finished_by_the_next(void **state)
{
    (void)state;
    int unfinished = 0;
    test_random random = {17};
    for (int round = 0; round < 60; round++) {
        fixture *fx = new_fixture();
        child c = start(create_until_killed, fx);
        assert_true(hear(c.from));
        usleep(test_random_below(&random, 6000));
        kill(c.pid, SIGKILL);
        end(c);
        cairn_status status = open_store(fx->path, false, 0, &fx->store);
        if (status != CAIRN_OK) {
            assert_int_equal(status, CAIRN_NOT_FOUND); /* never a store that is not one */
            unfinished++;
            assert_ok(open_store(fx->path, true, 0, &fx->store));
        }
        assert_clean(fx->store);
        assert_ok(cairn_context_create(fx->store, "a", NULL));
        fixture_free(fx);
    }
    assert_true(unfinished > 0);
}

/* ---- full ---- */

/* Commits until something gives; then the store must be good, a drop must make room, and work must go on. */
static void fill_and_recover(fixture *fx, const char *words)
{
    cairn_writer *writer;
    cairn_context_info before, after;
    cairn_status status = CAIRN_OK;
    uint64_t at = 0;
    assert_ok(cairn_context_create(fx->store, "victim", NULL));
    assert_ok(cairn_writer_begin(fx->store, "victim", &writer));
    assert_ok(commit(fx, writer, 3, 0, 8, 5));
    cairn_writer_end(writer);
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    for (; at < 4000 && status == CAIRN_OK; at += 4) {
        assert_ok(cairn_writer_info(writer, &before));
        status = commit(fx, writer, 1, at, 4, 3);
    }
    if (status != CAIRN_FULL || strstr(cairn_last_error(), words) == NULL ||
        strstr(cairn_last_error(), fx->path) == NULL)
        fail_msg("%s after %llu blocks: %s", cairn_status_name(status), (unsigned long long)at, cairn_last_error());
    assert_true(before.blocks > 8);
    assert_ok(cairn_writer_info(writer, &after)); /* nothing of the failed commit */
    assert_int_equal(after.blocks, before.blocks);
    assert_clean(fx->store);
    assert_ok(cairn_context_drop(fx->store, "victim"));
    assert_ok(commit(fx, writer, 1, before.blocks, 1, 0));
    assert_ok(commit(fx, writer, 1, before.blocks + 1, 1, 0));
    cairn_writer_end(writer);
    cairn_snapshot *snap;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "a", 1, 0, before.blocks + 2);
    cairn_snapshot_end(snap);
    assert_clean(fx->store);
}

static void a_full_map_is_full_and_a_drop_makes_room_again(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    assert_ok(open_store(fx->path, true, 2 << 20, &fx->store));
    fill_and_recover(fx, "the map of 2097152 bytes is full");
    cairn_store_close(fx->store);
    assert_ok(open_store(fx->path, false, 64 << 20, &fx->store)); /* a larger map, and there is room */
    cairn_writer *writer;
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_ok(commit(fx, writer, 1, 0, 8, 0));
    cairn_writer_end(writer);
    fixture_free(fx);
}

static bool mount_small(const char *dir, const char *size)
{
    return mount("tmpfs", dir, "tmpfs", 0, size) == 0;
}

static void a_full_disk_is_full_and_a_drop_makes_room_again(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    if (!mount_small(fx->dir, "size=3m")) {
        fixture_free(fx);
        skip(); /* needs root; the limit on file sizes below is tested without */
    }
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    fill_and_recover(fx, "no space left");
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(umount(fx->dir), 0);
    fixture_free(fx);
}

static void a_file_size_limit_is_full_and_not_a_signal(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    struct rlimit old, limit;
    sigset_t pending, mask;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit = (struct rlimit){3 << 20, old.rlim_max};
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0); /* SIGXFSZ at its default would end us */
    fill_and_recover(fx, "limit on a file's size");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    sigpending(&pending);
    assert_int_equal(sigismember(&pending, SIGXFSZ), 0);
    sigprocmask(SIG_SETMASK, NULL, &mask);
    assert_int_equal(sigismember(&mask, SIGXFSZ), 0);
    cairn_writer *writer;
    assert_ok(cairn_writer_begin(fx->store, "a", &writer)); /* the limit gone, work goes on */
    assert_ok(commit(fx, writer, 1, 0, 8, 0));
    cairn_writer_end(writer);
    assert_clean(fx->store);
    fixture_free(fx);
}

static void create_on_a_full_disk_is_full_and_leaves_no_store(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    if (!mount_small(fx->dir, "size=64k")) {
        fixture_free(fx);
        skip();
    }
    assert_int_equal(open_store(fx->path, true, 0, &fx->store), CAIRN_FULL);
    assert_int_equal(open_store(fx->path, false, 0, &fx->store), CAIRN_NOT_FOUND);
    assert_int_equal(mount("tmpfs", fx->dir, "tmpfs", MS_REMOUNT, "size=4m"), 0);
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_clean(fx->store);
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(umount(fx->dir), 0);
    fixture_free(fx);
}

/* ---- address space ---- */

static void work_in_little_address_space(int in, int out, void *arg)
{
    fixture *fx = arg;
    const struct rlimit limit = {(rlim_t)600 << 20, RLIM_INFINITY};
    cairn_writer *writer;
    (void)in, (void)out;
    setrlimit(RLIMIT_AS, &limit);
    must(open_store(fx->path, true, 0, &fx->store) == CAIRN_OK);
    must(fx->store->env->data.map_bytes < (uint64_t)600 << 20);
    must(fx->store->env->data.map_bytes >= (uint64_t)64 << 20);
    must(cairn_context_create(fx->store, "a", NULL) == CAIRN_OK);
    must(cairn_writer_begin(fx->store, "a", &writer) == CAIRN_OK);
    for (uint64_t i = 0; i < 4; i++) must(commit(fx, writer, 1, i * 8, 8, 0) == CAIRN_OK);
    cairn_writer_end(writer);
    cairn_store_close(fx->store);
}

static void where_addresses_are_few_a_smaller_map_is_reserved(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* they take terabytes of addresses themselves */
#endif
    fixture *fx = new_fixture();
    assert_int_equal(end(start(work_in_little_address_space, fx)), 0);
    assert_ok(open_store(fx->path, false, 0, &fx->store));
    assert_true(fx->store->env->data.map_bytes == STORE_MAP_BYTES);
    assert_clean(fx->store);
    fixture_free(fx);
}

static void read_while_the_file_outgrows_the_map(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_snapshot *snap, *other;
    cairn_context_info info;
    must(open_store(fx->path, false, 1 << 20, &fx->store) == CAIRN_OK);
    must(cairn_snapshot_begin(fx->store, &snap) == CAIRN_OK);
    tell(out);
    must(hear(in));                                                                 /* the file is beyond our map now */
    must(cairn_snapshot_context(snap, "a", &info) == CAIRN_OK && info.blocks == 8); /* the old view stands */
    must(cairn_snapshot_begin(fx->store, &other) == CAIRN_BUSY);                    /* the map cannot move under it */
    must(strstr(cairn_last_error(), "another process grew it") != NULL);
    must(cairn_snapshot_renew(snap) == CAIRN_OK);
    must(cairn_snapshot_context(snap, "a", &info) == CAIRN_OK && info.blocks == 408);
    fixture_check_blocks(fx, snap, "a", 5, 400, 8);
    must(cairn_snapshot_begin(fx->store, &other) == CAIRN_OK);
    cairn_snapshot_end(other);
    cairn_snapshot_end(snap);
    must(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL) == CAIRN_OK);
    cairn_store_close(fx->store);
}

static void a_file_grown_by_another_process_is_mapped_anew(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    cairn_writer *writer;
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    assert_ok(commit(fx, writer, 5, 0, 8, 0));
    child c = start(read_while_the_file_outgrows_the_map, fx);
    assert_true(hear(c.from));
    for (uint64_t i = 1; i <= 50; i++) assert_ok(commit(fx, writer, 5, i * 8, 8, 0));
    cairn_writer_end(writer);
    tell(c.to);
    assert_int_equal(end(c), 0);
    fixture_free(fx);
}

/* ---- many readers, read-only media ---- */

static void read_on(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_snapshot *snap;
    cairn_context_info info;
    uint64_t last = 0;
    struct pollfd stop = {.fd = in, .events = POLLIN};
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.read_only = true;
    must(cairn_store_open(fx->path, &opt, &fx->store) == CAIRN_OK);
    tell(out);
    for (;;) {
        must(cairn_snapshot_begin(fx->store, &snap) == CAIRN_OK);
        must(cairn_snapshot_context(snap, "a", &info) == CAIRN_OK);
        must(info.blocks >= last); /* never back in time */
        if (info.blocks > 2) fixture_check_blocks(fx, snap, "a", 6, info.blocks - 2, 2);
        last = info.blocks;
        cairn_snapshot_end(snap);
        if (poll(&stop, 1, 0) != 0) break;
    }
    must(last > 0);
    cairn_store_close(fx->store);
}

static void many_reading_processes_see_whole_commits_while_one_writes(void **state)
{
    (void)state;
    enum { READERS = 12 };
    fixture *fx = new_fixture();
    cairn_writer *writer;
    cairn_store_stat st;
    child c[READERS];
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    cairn_store_close(fx->store);
    for (int i = 0; i < READERS; i++) c[i] = start(read_on, fx);
    assert_ok(open_store(fx->path, false, 0, &fx->store));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    for (int i = 0; i < READERS; i++) assert_true(hear(c[i].from));
    for (uint64_t i = 0; i < 60; i++) {
        assert_ok(commit(fx, writer, 6, i * 2, 2, (size_t)i));
        if (i == 20) kill(c[0].pid, SIGKILL); /* its slot must not hold pages for ever */
    }
    cairn_writer_end(writer);
    for (int i = 0; i < READERS; i++) assert_int_equal(end(c[i]), i == 0 ? -SIGKILL : 0);
    assert_clean(fx->store);
    cairn_store_close(fx->store);
    assert_ok(open_store(fx->path, false, 0, &fx->store));
    assert_ok(cairn_store_stat_get(fx->store, &st));
    assert_int_equal(st.readers, 0);
    fixture_free(fx);
}

/* What a reader finds that LMDB entered at a commit and that was put aside for two more before it copied the roots. */
static void a_view_is_never_of_a_later_commit_than_the_one_it_is_entered_at(void **state)
{
    (void)state;
    /* in lock.mdb, after magic, format and the readers' mutex: the number of the last commit that readers see */
    enum { ANNOUNCED = 8 + sizeof(pthread_mutex_t) };
    fixture *fx = new_fixture();
    cairn_snapshot *snap, *held;
    cairn_context_info info;
    fixture_open(fx, false);
    fixture_context(fx, "a", 9, 5, 2);
    assert_ok(cairn_snapshot_begin(fx->store, &held));
    char *lock = test_path(fx->path, "data-1/lock.mdb");
    int fd = open(lock, O_RDWR | O_CLOEXEC);
    uint64_t last = 0;
    MDB_envinfo now_in_file;
    assert_int_equal(pread(fd, &last, sizeof last, ANNOUNCED), sizeof last);
    assert_int_equal(mdb_env_info(fx->store->env->data.env, &now_in_file), 0);
    assert_int_equal(last, now_in_file.me_last_txnid);
    for (uint64_t back = 1; back <= 2; back++) {
        uint64_t now = last - back;
        assert_int_equal(pwrite(fd, &now, sizeof now, ANNOUNCED), sizeof now);
        cairn_status status = cairn_snapshot_begin(fx->store, &snap);
        if (back == 1) { /* the last one is in the file and not announced: the one before it is seen */
            assert_ok(status);
            cairn_snapshot_end(snap);
            continue;
        }
        assert_int_equal(status, CAIRN_BUSY);
        assert_non_null(strstr(cairn_last_error(), "lock file"));
        assert_int_equal(cairn_snapshot_renew(held), CAIRN_BUSY);
        assert_int_equal(cairn_snapshot_context(held, "a", &info), CAIRN_INVALID);
    }
    assert_int_equal(pwrite(fd, &last, sizeof last, ANNOUNCED), sizeof last);
    close(fd);
    free(lock);
    assert_ok(cairn_snapshot_renew(held));
    fixture_check_blocks(fx, held, "a", 9, 0, 5);
    cairn_snapshot_end(held);
    assert_clean(fx->store);
    fixture_free(fx);
}

static void look_and_stay(int in, int out, void *arg)
{
    fixture *fx = arg;
    cairn_snapshot *snap;
    must(open_store(fx->path, false, 0, &fx->store) == CAIRN_OK);
    must(cairn_snapshot_begin(fx->store, &snap) == CAIRN_OK);
    tell(out);
    hear(in); /* until it is killed */
}

static void a_reader_killed_while_an_ingest_goes_on_does_not_make_the_file_grow(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    cairn_writer *writer;
    cairn_store_stat before, after;
    assert_ok(open_store(fx->path, true, 0, &fx->store));
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_ok(cairn_writer_begin(fx->store, "a", &writer)); /* held all the time, as by an ingest of hours */
    assert_ok(commit(fx, writer, 5, 0, 8, 0));
    child c = start(look_and_stay, fx);
    assert_true(hear(c.from));
    kill(c.pid, SIGKILL);
    assert_int_equal(end(c), -SIGKILL);
    for (uint64_t i = 0; i < 20; i++) assert_ok(commit(fx, writer, 5, 8, 0, 1 + i % 50));
    assert_ok(cairn_store_stat_get(fx->store, &before));
    for (uint64_t i = 0; i < 200; i++) assert_ok(commit(fx, writer, 5, 8, 0, 1 + i % 50));
    assert_ok(cairn_store_stat_get(fx->store, &after));
    assert_int_equal(after.file_bytes, before.file_bytes);
    assert_int_equal(after.readers, 0);
    cairn_writer_end(writer);
    assert_clean(fx->store);
    fixture_free(fx);
}

static void a_store_on_a_read_only_file_system_is_read_without_leaving_a_trace(void **state)
{
    (void)state;
    fixture *fx = new_fixture();
    cairn_snapshot *snap;
    if (!mount_small(fx->dir, "size=8m")) {
        fixture_free(fx);
        skip();
    }
    fixture_open(fx, false);
    fixture_context(fx, "a", 9, 5, 2);
    cairn_store_close(fx->store);
    char *lock = test_path(fx->path, "data-1/lock.mdb");
    assert_int_equal(unlink(lock), 0);
    assert_int_equal(mount("tmpfs", fx->dir, "tmpfs", MS_REMOUNT | MS_RDONLY, NULL), 0);
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    assert_int_equal(cairn_store_open(fx->path, &opt, &fx->store), CAIRN_IO);
    assert_non_null(strstr(cairn_last_error(), "read-only"));
    opt.read_only = true;
    assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "a", 9, 0, 5);
    cairn_snapshot_end(snap);
    assert_clean(fx->store);
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(access(lock, F_OK), -1);
    free(lock);
    assert_int_equal(umount(fx->dir), 0);
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_second_process_is_told_who_appends_and_takes_over_when_that_one_is_gone),
        cmocka_unit_test(a_handle_does_not_survive_a_fork_but_the_child_may_open_its_own),
        cmocka_unit_test(processes_that_create_one_store_at_once_get_the_same_one),
        cmocka_unit_test(after_kill_9_at_any_moment_contexts_hold_whole_blocks_and_verify_is_clean),
        cmocka_unit_test(a_drop_killed_half_way_leaves_no_context_and_sweep_returns_the_rest),
        cmocka_unit_test(a_creation_killed_at_any_moment_is_finished_by_the_next),
        cmocka_unit_test(a_full_map_is_full_and_a_drop_makes_room_again),
        cmocka_unit_test(a_full_disk_is_full_and_a_drop_makes_room_again),
        cmocka_unit_test(a_file_size_limit_is_full_and_not_a_signal),
        cmocka_unit_test(create_on_a_full_disk_is_full_and_leaves_no_store),
        cmocka_unit_test(where_addresses_are_few_a_smaller_map_is_reserved),
        cmocka_unit_test(a_file_grown_by_another_process_is_mapped_anew),
        cmocka_unit_test(many_reading_processes_see_whole_commits_while_one_writes),
        cmocka_unit_test(a_view_is_never_of_a_later_commit_than_the_one_it_is_entered_at),
        cmocka_unit_test(a_reader_killed_while_an_ingest_goes_on_does_not_make_the_file_grow),
        cmocka_unit_test(a_store_on_a_read_only_file_system_is_read_without_leaving_a_trace),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
