/* archive_fixture.h - what the tests of export, import and compact share: whole contexts checked, and a store's shape.
 */
#ifndef CAIRN_TESTS_ARCHIVE_FIXTURE_H
#define CAIRN_TESTS_ARCHIVE_FIXTURE_H

#include "store_fixture.h"

#include <store_internal.h>

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const cairn_geometry TINY = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16};
static const cairn_geometry PLAIN = {
    .layers = 2, .first_layer = 0, .kv_heads = 4, .head_dim = 64, .block_tokens = 63, .dtype = CAIRN_BF16};

typedef struct shape { /* of a store, to see that nothing changed */
    cairn_store_stat stat;
    uint64_t names;
} shape;

static inline bool hash_name(void *arg, const cairn_context_info *info)
{
    uint64_t *sum = arg;
    *sum = *sum * 31 + cairn_hash64(info->name, strlen(info->name)) + info->blocks + info->tail_tokens;
    return true;
}

static inline shape shape_of(fixture *fx)
{
    shape s = {0};
    cairn_snapshot *snap = NULL;
    assert_ok(cairn_store_stat_get(fx->store, &s.stat));
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_contexts(snap, hash_name, &s.names));
    cairn_snapshot_end(snap);
    return s;
}

static inline void check_unchanged(fixture *fx, const shape *before)
{
    shape now = shape_of(fx);
    assert_int_equal(now.stat.contexts, before->stat.contexts);
    assert_int_equal(now.stat.segments, before->stat.segments);
    assert_int_equal(now.stat.blocks, before->stat.blocks);
    assert_int_equal(now.stat.tiles, before->stat.tiles);
    assert_int_equal(now.names, before->names);
}

/* A context holds blocks [0, blocks) of the stream and then `tail` of its tokens. */
static inline void check_context(fixture *fx, const char *name, uint64_t seed, uint64_t blocks, uint32_t tail)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    cairn_token found[64];
    cairn_token expected[64];
    size_t n = 0;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    assert_int_equal(info.blocks, blocks);
    assert_int_equal(info.tail_tokens, tail);
    fixture_check_blocks(fx, snap, name, seed, 0, blocks);
    assert_ok(cairn_snapshot_tail(snap, info.id, found, 64, &n));
    assert_int_equal(n, tail);
    fixture_tokens(seed, blocks * fx->geometry.block_tokens, expected, tail);
    assert_memory_equal(found, expected, tail * sizeof *found);
    cairn_snapshot_end(snap);
}

static inline void check_store_is_sound(fixture *fx)
{
    cairn_verify_report report;
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, &report));
    assert_int_equal(report.damaged, 0);
}

static inline cairn_context_info info_of(fixture *fx, const char *name)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    assert_ok(cairn_snapshot_context(snap, name, &info));
    cairn_snapshot_end(snap);
    return info;
}

static inline bool stop_at_once(void *arg, uint64_t done, uint64_t total)
{
    (void)arg, (void)done, (void)total;
    return false;
}

typedef struct progress_seen {
    uint64_t calls, last, total;
} progress_seen;

static inline bool watch(void *arg, uint64_t done, uint64_t total)
{
    progress_seen *seen = arg;
    seen->calls++;
    assert_true(done >= seen->last && done <= total);
    seen->last = done;
    seen->total = total;
    return true;
}

#endif
