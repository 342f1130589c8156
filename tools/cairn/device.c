/* device.c - see device.h. The kernel's own asynchronous reads (io_submit) through its system calls, so that the limit
 * does not come from the code whose distance to it is measured, which uses io_uring. */
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH_MAX = 256 };

struct device {
    int fd;
    aio_context_t context;
    size_t bytes, most;
    uint64_t pieces;
    unsigned char *memory; /* (most, bytes) */
};

int device_open(cli *c, const char *path, size_t bytes, size_t most, device **out, char why[160])
{
    struct stat st;
    *out = NULL;
    why[0] = 0;
    device *d = calloc(1, sizeof *d);
    if (d == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    *d = (device){.fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), .bytes = bytes, .most = most};
    if (d->fd < 0 || fstat(d->fd, &st) != 0) {
        snprintf(why, 160, "'%.80s' cannot be opened with O_DIRECT: %s", path, strerror(errno));
        device_close(d);
        return -1;
    }
    d->pieces = (uint64_t)st.st_size / bytes;
    if (syscall(SYS_io_setup, DEPTH_MAX, &d->context) != 0) {
        snprintf(why, 160, "the kernel refuses asynchronous reads: %s", strerror(errno));
        device_close(d);
        return -1;
    }
    void *memory = mmap(NULL, bytes * most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        device_close(d);
        return cli_fail(c, EXIT_FAILED, "out of memory: %zu reads of %zu bytes", most, bytes);
    }
    d->memory = memory;
    *out = d;
    return -1;
}

void device_close(device *d)
{
    if (d == NULL) return;
    if (d->context != 0) syscall(SYS_io_destroy, d->context);
    if (d->memory != NULL) munmap(d->memory, d->bytes * d->most);
    if (d->fd >= 0) close(d->fd);
    free(d);
}

uint64_t device_pieces(const device *d)
{
    return d->pieces;
}

int device_read(cli *c, device *d, const uint64_t *numbers, size_t n, size_t depth, double *seconds)
{
    struct iocb jobs[DEPTH_MAX], *ready[DEPTH_MAX];
    struct io_event events[DEPTH_MAX];
    size_t given = 0, done = 0, free_jobs = depth < DEPTH_MAX ? depth : DEPTH_MAX;
    for (size_t i = 0; i < free_jobs; i++) ready[i] = &jobs[i];
    uint64_t start = cli_now_ns();
    while (done < n) {
        size_t first = free_jobs, more = 0;
        while (free_jobs > 0 && given < n) {
            struct iocb *job = ready[--free_jobs];
            *job = (struct iocb){.aio_lio_opcode = IOCB_CMD_PREAD,
                                 .aio_fildes = (uint32_t)d->fd,
                                 .aio_buf = (uint64_t)(uintptr_t)(d->memory + given * d->bytes),
                                 .aio_nbytes = d->bytes,
                                 .aio_offset = (int64_t)(numbers[given] * d->bytes),
                                 .aio_data = (uint64_t)(uintptr_t)job};
            given++;
            more++;
        }
        /* Taken from the end of the free ones: they lie behind `free_jobs` in the array, in no particular order. */
        for (size_t sent = 0; sent < more;) {
            long took = syscall(SYS_io_submit, d->context, more - sent, ready + first - more + sent);
            if (took <= 0) return cli_fail(c, EXIT_FAILED, "io_submit: %s", strerror(errno));
            sent += (size_t)took;
        }
        long came = syscall(SYS_io_getevents, d->context, 1L, (long)DEPTH_MAX, events, NULL);
        if (came < 0 && errno == EINTR) continue;
        if (came < 0) return cli_fail(c, EXIT_FAILED, "io_getevents: %s", strerror(errno));
        for (long i = 0; i < came; i++) {
            if (events[i].res != (int64_t)d->bytes)
                return cli_fail(c, EXIT_FAILED, "a direct read of %zu bytes gave %lld", d->bytes,
                                (long long)events[i].res);
            ready[free_jobs++] = (struct iocb *)(uintptr_t)events[i].data;
            done++;
        }
    }
    *seconds = (double)(cli_now_ns() - start) * 1e-9;
    return -1;
}
