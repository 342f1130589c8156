/* command.h - running the built `cairn` command as a child process, the way a person does. */
#ifndef CAIRN_TESTS_COMMAND_H
#define CAIRN_TESTS_COMMAND_H

#include "support.h"

#include <jansson.h>
#include <sys/types.h>

#define DEMO_MODEL CAIRN_SOURCE_DIR "/models/cairn-tiny-f16.gguf"

typedef struct outcome {
    int code; /* exit code; 128 + signal if one ended it */
    char *out, *err;
    size_t out_bytes;
} outcome;

/* Runs cairn with the arguments up to NULL and waits. The outcome lasts until the next run or command_done. */
#define cairn_run(...) command_run(NULL, 0, (const char *const[]){__VA_ARGS__, NULL})
/* The same with something on its standard input. */
#define cairn_run_with(input, bytes, ...) command_run(input, bytes, (const char *const[]){__VA_ARGS__, NULL})
const outcome *command_run(const void *input, size_t bytes, const char *const *args);
void command_done(void); /* frees what the last run left */

/* Starts it without waiting; output goes to `log` (NULL = /dev/null). */
pid_t command_start(const char *log, const char *const *args);
int command_wait(pid_t pid); /* its code, as in outcome */

/* Fails the test with what the command said. */
#define assert_code(o, expected)                                                                                       \
    do {                                                                                                               \
        if ((o)->code != (expected))                                                                                   \
            fail_msg("exit code %d, expected %d\nstdout: %s\nstderr: %s", (o)->code, expected, (o)->out, (o)->err);    \
    } while (0)
#define assert_says(text, part)                                                                                        \
    do {                                                                                                               \
        if (strstr(text, part) == NULL) fail_msg("'%s' is not in: %s", part, text);                                    \
    } while (0)

json_t *command_json(const outcome *o); /* stdout parsed; fails the test if it is not one JSON object */
long long json_number(const json_t *object, const char *key);
const char *json_text(const json_t *object, const char *key);

/* Real text of `bytes` bytes (the headers of this library), with the sentence about the pass key, if `key` is not NULL,
 * at byte `at`. Written to `path`. */
void write_text(const char *path, size_t bytes, const char *key, size_t at);
/* The data file of a store, malloc'ed path. */
char *store_data_file(const char *store);

#endif
