/* machine.h - what a figure was measured on, and what the kernel counts for this process. */
#ifndef CAIRN_CLI_MACHINE_H
#define CAIRN_CLI_MACHINE_H

#include "output.h"

typedef struct machine {
    char processor[128], kernel[128]; /* "unknown" where /proc does not say */
    char file_system[160];            /* "ext4 on /dev/vda", of the directory asked about */
    long cores;
    uint64_t ram_bytes;
} machine;
void machine_read(machine *m, const char *dir);
/* One line: "AMD EPYC, 2 cores, 23.5 GiB of RAM, Linux 6.1, ext4 on /dev/vda". */
const char *machine_line(const machine *m, char out[512]);
json_t *machine_json(const machine *m);

/* Bytes this process made the block devices read so far (/proc/self/io); UINT64_MAX where the kernel does not count. */
uint64_t machine_read_bytes(void);
/* Processor time of this process so far, all its threads: what other processes on a shared machine disturb least. */
uint64_t machine_cpu_ns(void);

#endif
