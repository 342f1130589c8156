/* test_store_calls.c - calls of libc below LMDB that fail: this program's mmap and pwrite stand before libc's. */
#include "store_fixture.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static const cairn_geometry tiny = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 8, .block_tokens = 5, .dtype = CAIRN_F16};

enum { HEADS_END = 2 * 4096 }; /* LMDB's two heads are the first pages of the data file */

static size_t map_limit = SIZE_MAX; /* larger maps are refused */
static int map_error, maps_refused;
static int head_error, heads_refused; /* of writes to a head; 0 = none fails */

#pragma GCC visibility push(default) /* LMDB must find these */
void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (bytes > map_limit) {
        maps_refused++;
        errno = map_error;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset)
{
    if (head_error != 0 && offset < HEADS_END) {
        heads_refused++;
        errno = head_error;
        return -1;
    }
    return syscall(SYS_pwrite64, fd, data, bytes, offset);
}
#pragma GCC visibility pop

/* A kernel says ENOMEM where addresses are short, valgrind EINVAL. */
static void a_store_opens_where_there_are_fewer_addresses_than_asked_for(void **state)
{
    (void)state;
    static const int errors[] = {ENOMEM, EINVAL};
    for (int i = 0; i < 2; i++) {
        fixture *fx = fixture_new(tiny);
        fixture_context(fx, "book", 7, 3, 2);
        cairn_store_close(fx->store);
        map_error = errors[i];
        map_limit = (size_t)1 << 30; /* eight are asked for */
        maps_refused = 0;
        fixture_open(fx, true);
        map_limit = SIZE_MAX;
        assert_true(maps_refused > 0);
        cairn_snapshot *snap;
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        fixture_check_blocks(fx, snap, "book", 7, 0, 3);
        cairn_snapshot_end(snap);
        fixture_free(fx);
    }
}

/* A head that cannot be written makes LMDB refuse everything since, with no word of the reason. */
static void a_disk_that_is_full_at_the_head_is_told_as_full_until_the_store_is_opened_again(void **state)
{
    (void)state;
    fixture *fx = fixture_new(tiny);
    uint64_t id;
    fixture_context(fx, "book", 7, 3, 2);
    head_error = ENOSPC;
    assert_int_equal(cairn_context_create(fx->store, "more", &id), CAIRN_FULL);
    assert_true(heads_refused > 0);
    head_error = 0;
    for (int again = 0; again < 2; again++) {
        assert_int_equal(cairn_context_drop(fx->store, "book"), CAIRN_FULL);
        assert_non_null(strstr(cairn_last_error(), "an earlier write failed for good: No space left on device"));
    }
    cairn_store_close(fx->store);
    fixture_open(fx, true);
    cairn_snapshot *snap;
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "book", 7, 0, 3);
    cairn_snapshot_end(snap);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
    assert_ok(cairn_context_create(fx->store, "more", &id));
    fixture_free(fx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_store_opens_where_there_are_fewer_addresses_than_asked_for),
        cmocka_unit_test(a_disk_that_is_full_at_the_head_is_told_as_full_until_the_store_is_opened_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
