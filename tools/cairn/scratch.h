/* scratch.h - the directory of a bench's own: made for a run, removed with all that is in it. */
#ifndef CAIRN_CLI_SCRATCH_H
#define CAIRN_CLI_SCRATCH_H

#include "cli.h"

/* A new directory below `below` (NULL: $TMPDIR or /tmp), malloc'ed path. -1 or the exit code, said. */
int scratch_make(cli *c, const char *below, char **out);
void scratch_remove(char *dir); /* and frees the path; NULL is fine */
/* Writes every file below out to the device and drops its pages from the page cache. Pages that somebody has mapped
 * stay: close the store before. */
int scratch_drop_cache(cli *c, const char *dir);
/* Reads every file below once, so that its pages are in the page cache, as far as they fit into half of free memory. */
int scratch_warm_cache(cli *c, const char *dir);
/* Path of the largest file below, malloc'ed: of a store, its data file. NULL: none, or out of memory. */
char *scratch_largest(const char *dir);

#endif
