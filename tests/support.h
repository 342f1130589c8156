/* support.h - what several test programs need. */
#ifndef CAIRN_TESTS_SUPPORT_H
#define CAIRN_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <base_internal.h>

/* Fails the test with the library's own sentence. */
#define assert_ok(call)                                                                                                \
    do {                                                                                                               \
        cairn_status assert_ok_status = (call);                                                                        \
        if (assert_ok_status != CAIRN_OK)                                                                              \
            fail_msg("%s: %s: %s", #call, cairn_status_name(assert_ok_status), cairn_last_error());                    \
    } while (0)

/* A seeded generator, so that a failing test fails again. */
typedef struct test_random {
    uint64_t state;
} test_random;
uint64_t test_random_u64(test_random *r);
uint32_t test_random_below(test_random *r, uint32_t n);
double test_random_unit(test_random *r);  /* [0, 1) */
float test_random_normal(test_random *r); /* mean 0, variance 1 */
void test_random_fill(test_random *r, float *x, size_t n);

/* A new empty directory below $TMPDIR or /tmp; remove_tree deletes it and all in it. The path is malloc'ed. */
char *test_make_dir(void);
void test_remove_dir(char *path);                          /* frees the path too */
char *test_path(const char *dir, const char *name);        /* malloc'ed "dir/name" */
void *test_read_file(const char *path, size_t *out_bytes); /* malloc'ed; NULL if it cannot be read */
void test_write_file(const char *path, const void *data, size_t bytes);

#endif
