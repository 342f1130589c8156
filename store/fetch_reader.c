/* fetch_reader.c - a batch of file ranges read by the best engine this machine allows.
 *
 * Measured here on cold 32 KiB tiles, 128 a batch: io_uring with O_DIRECT 0.78 GB/s, 16 threads with O_DIRECT
 * 0.81, 16 threads through the page cache 0.57, one thread 0.24. Containers often forbid io_uring, and some file
 * systems O_DIRECT, so both are tried when a reader is opened and once more whenever one of them fails. */
#include "fetch_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct reader {
    reader_engine engine;
    int fd;        /* the caller's, through the page cache */
    int direct_fd; /* O_DIRECT, or -1 */
    uring_engine *uring;
    pool_engine *pool;
    read_job *jobs; /* of the batch under way */
    size_t n;
    size_t started;
    size_t given;
    char name[48];
};

/* The same file again with O_DIRECT: by number, because its path may meanwhile name another file. One page is read
 * to see whether the file system means it. */
static int open_direct(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int direct = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (direct < 0) return -1;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *probe = aligned_alloc(page, page);
    ssize_t got = probe != NULL ? pread(direct, probe, page, 0) : -1;
    free(probe);
    if (got >= 0) return direct;
    close(direct);
    return -1;
}

/* CAIRN_FETCH_READER, or READER_ANY. */
static cairn_status forced_engine(reader_engine *engine, bool *direct)
{
    static const struct {
        const char *name;
        reader_engine engine;
    } names[] = {{"uring", READER_URING}, {"pool", READER_POOL}, {"sync", READER_SYNC}};
    const char *text = getenv("CAIRN_FETCH_READER");
    *engine = READER_ANY;
    *direct = true;
    if (text == NULL || text[0] == 0) return CAIRN_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t n = strlen(names[i].name);
        if (strncmp(text, names[i].name, n) != 0) continue;
        *engine = names[i].engine;
        if (text[n] == 0) return CAIRN_OK;
        *direct = false;
        if (strcmp(text + n, "-buffered") == 0) return CAIRN_OK;
    }
    return cairn_fail(CAIRN_INVALID, "CAIRN_FETCH_READER is '%.40s': use uring, pool or sync, perhaps with -buffered",
                      text);
}

static void describe(reader *r)
{
    static const char *const names[] = {"", "io_uring", "pread by threads", "pread"};
    snprintf(r->name, sizeof r->name, "%s, %s", names[r->engine], r->direct_fd >= 0 ? "O_DIRECT" : "buffered");
}

cairn_status reader_open(int fd, reader **out)
{
    reader_engine engine;
    bool direct;
    *out = NULL;
    cairn_status st = forced_engine(&engine, &direct);
    if (st != CAIRN_OK) return st;
    reader *r = cairn_calloc(1, sizeof *r);
    if (r == NULL) return cairn_fail(CAIRN_NO_MEMORY, "reader of tiles");
    r->fd = fd;
    r->direct_fd = direct ? open_direct(fd) : -1;
    if (engine == READER_ANY || engine == READER_URING) {
        r->uring = uring_new();
        if (r->uring != NULL)
            r->engine = READER_URING;
        else if (engine == READER_URING) {
            reader_close(r);
            return cairn_fail(CAIRN_UNSUPPORTED, "CAIRN_FETCH_READER is uring, but io_uring is not available here");
        }
    }
    if (r->engine == READER_ANY && engine != READER_SYNC) {
        r->pool = pool_new(fd, r->direct_fd, READER_THREADS);
        if (r->pool != NULL) r->engine = READER_POOL;
    }
    if (r->engine == READER_ANY) r->engine = READER_SYNC;
    describe(r);
    *out = r;
    return CAIRN_OK;
}

void reader_close(reader *r)
{
    if (r == NULL) return;
    while (reader_next(r) != NULL) {}
    uring_free(r->uring);
    pool_free(r->pool);
    if (r->direct_fd >= 0) close(r->direct_fd);
    cairn_free(r);
}

const char *reader_name(const reader *r)
{
    return r->name;
}

size_t reader_ram_bytes(const reader *r)
{
    if (r == NULL) return 0;
    /* a ring of 128: 8 KiB of entries, 4 KiB of completions, the rest of their pages; a thread touches two pages of
     * its stack and one for its descriptor */
    size_t engine = r->engine == READER_URING ? 24 << 10 : r->engine == READER_POOL ? READER_THREADS * (16 << 10) : 0;
    return sizeof *r + engine;
}

void reader_finish(int fd, read_job *job)
{
    uint64_t at = 0;
    job->error = 0;
    for (uint32_t i = 0; i < job->n_pieces; i++) {
        const struct iovec *piece = &job->pieces[i];
        uint64_t end = at + piece->iov_len;
        while (job->done < end) {
            size_t skip = (size_t)(job->done - at);
            ssize_t got =
                pread(fd, (char *)piece->iov_base + skip, piece->iov_len - skip, (off_t)(job->offset + job->done));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) job->error = errno;
            if (got <= 0) return;
            job->done += (uint64_t)got;
        }
        at = end;
    }
}

/* Through the page cache the kernel must be told first: a read returns only when its own pages are there. */
static void announce(const reader *r)
{
    for (size_t i = 0; i < r->n; i++)
        posix_fadvise(r->fd, (off_t)r->jobs[i].offset, (off_t)r->jobs[i].bytes, POSIX_FADV_WILLNEED);
}

/* The ring failed and is idle: what has not been read is read by the caller from now on. */
static void leave_uring(reader *r)
{
    uring_free(r->uring);
    r->uring = NULL;
    r->engine = READER_SYNC;
    describe(r);
}

void reader_start(reader *r, read_job *jobs, size_t n)
{
    while (reader_next(r) != NULL) { /* a batch nobody waited for */
    }
    r->jobs = jobs;
    r->n = n;
    r->started = 0;
    r->given = 0;
    for (size_t i = 0; i < n; i++) {
        jobs[i].done = 0;
        jobs[i].error = 0;
        jobs[i].given = false;
    }
    if (n == 0) return;
    if (r->direct_fd < 0 || r->engine == READER_SYNC) announce(r);
    int fd = r->direct_fd >= 0 ? r->direct_fd : r->fd;
    if (r->engine == READER_POOL) pool_start(r->pool, jobs, n);
    if (r->engine == READER_URING && !uring_push(r->uring, fd, jobs, n, &r->started)) {
        leave_uring(r);
        r->started = 0;
    }
}

static read_job *give(reader *r, size_t i)
{
    r->given++;
    r->jobs[i].given = true;
    return &r->jobs[i];
}

read_job *reader_next(reader *r)
{
    if (r->given == r->n) return NULL;
    if (r->engine == READER_POOL) return give(r, (size_t)(pool_wait(r->pool) - r->jobs));
    if (r->engine == READER_URING) {
        int fd = r->direct_fd >= 0 ? r->direct_fd : r->fd;
        size_t i;
        int result;
        if (uring_push(r->uring, fd, r->jobs, r->n, &r->started) && uring_wait(r->uring, &i, &result)) {
            read_job *job = &r->jobs[i];
            job->done = result > 0 ? (uint64_t)result : 0;
            if (job->done < job->bytes) reader_finish(r->fd, job); /* short or refused: see what pread says */
            return give(r, i);
        }
        leave_uring(r);
        r->started = 0;
    }
    while (r->jobs[r->started].given) r->started++;
    read_job *job = &r->jobs[r->started];
    reader_finish(r->fd, job);
    return give(r, r->started);
}
