/* child.h - this command once more, as a new process. */
#ifndef CAIRN_CLI_CHILD_H
#define CAIRN_CLI_CHILD_H

#include "cli.h"

typedef struct child {
    double seconds;      /* from its start to its end, both seen from here */
    uint64_t read_bytes; /* it made the block devices read */
    json_t *answer;      /* what it printed, with --json; NULL if nothing was captured */
} child;
/* Runs `cairn` with the arguments (NULL-terminated, without the program's name) and waits. capture: its standard output
 * is parsed as one JSON object, else it is ours. -1, or the exit code: its own, or that of a failure here, said. */
int child_run(cli *c, const char *const *args, bool capture, child *out);
void child_wipe(child *x);

#endif
