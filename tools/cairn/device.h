/* device.h - how fast the device itself gives pieces of a file: direct reads, many in flight, nothing else. */
#ifndef CAIRN_CLI_DEVICE_H
#define CAIRN_CLI_DEVICE_H

#include "cli.h"

typedef struct device device;

/* `most` pieces of `bytes` (a multiple of 4096) each will be read at once from `path`. UNSUPPORTED where the file
 * system takes no O_DIRECT or the kernel no asynchronous reads: *why says which. -1 or the exit code, said; *out NULL
 * without an exit code: it cannot be measured here. */
int device_open(cli *c, const char *path, size_t bytes, size_t most, device **out, char why[160]);
void device_close(device *d);
/* Reads pieces at the given numbers (offset = number * bytes), `depth` in flight; *seconds. */
int device_read(cli *c, device *d, const uint64_t *numbers, size_t n, size_t depth, double *seconds);
uint64_t device_pieces(const device *d); /* of the file */

#endif
