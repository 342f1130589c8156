/* must.h - an assertion for where cmocka's cannot be used: in threads of a test's own, and in fuzz entries. */
#ifndef CAIRN_TESTS_MUST_H
#define CAIRN_TESTS_MUST_H

#include <cairn/base.h>

#include <stdio.h>
#include <stdlib.h>

/* Ends the process, like a crash, with the sentence that goes with it. */
#define must(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition,               \
                    cairn_last_error());                                                                               \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
