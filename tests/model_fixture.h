/* model_fixture.h - a directory of a test's own and the path of a model file in it. */
#ifndef CAIRN_TESTS_MODEL_FIXTURE_H
#define CAIRN_TESTS_MODEL_FIXTURE_H

#include "support.h"

#include <stdlib.h>

typedef struct fixture {
    char *dir;
    char *path; /* of a file in it */
} fixture;

static inline int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "model.gguf");
    *state = fx;
    return 0;
}
static inline int teardown(void **state)
{
    fixture *fx = *state;
    free(fx->path);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

#endif
