/* fetch_uring.c - reads in flight through io_uring: one system call starts a batch. */
#include "fetch_internal.h"

#ifdef CAIRN_HAVE_URING

#include <errno.h>
#include <liburing.h>
#include <sched.h>

struct uring_engine {
    struct io_uring ring;
    size_t flying; /* jobs the kernel has */
    size_t queued; /* entries it has not taken yet */
};

uring_engine *uring_new(void)
{
    uring_engine *u = cairn_calloc(1, sizeof *u);
    if (u == NULL) return NULL;
    /* Refused by seccomp in containers (EPERM) or by sysctl, missing in old kernels (ENOSYS). The ring is used by
     * whichever thread holds the fetch, so the single-issuer modes are not for us. */
    if (io_uring_queue_init(READER_DEPTH, &u->ring, 0) == 0) return u;
    cairn_free(u);
    return NULL;
}

void uring_free(uring_engine *u)
{
    if (u == NULL) return;
    io_uring_queue_exit(&u->ring);
    cairn_free(u);
}

static bool passing(int err)
{
    return err == -EINTR || err == -EAGAIN || err == -EBUSY;
}

/* The ring cannot be used any more, but what the kernel has may still write into our memory: wait for it. */
static bool give_up(uring_engine *u)
{
    while (u->flying > 0) {
        struct io_uring_cqe *cqe;
        int err = io_uring_wait_cqe(&u->ring, &cqe);
        if (err != 0 && !passing(err)) break;
        if (err != 0) continue;
        io_uring_cqe_seen(&u->ring, cqe);
        u->flying--;
    }
    return false;
}

/* Hands the kernel what is queued. When it is short of memory or of room, what flies must land first. */
static bool hand_over(uring_engine *u)
{
    while (u->queued > 0) {
        int n = io_uring_submit(&u->ring);
        if (n == -EINTR) continue;
        if (n <= 0) return u->flying > 0 && (n == 0 || passing(n)) ? true : give_up(u);
        u->queued -= (size_t)n;
        u->flying += (size_t)n;
    }
    return true;
}

bool uring_push(uring_engine *u, int fd, read_job *jobs, size_t n, size_t *started)
{
    while (*started < n && u->flying + u->queued < READER_DEPTH) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
        if (sqe == NULL) break;
        read_job *job = &jobs[*started];
        io_uring_prep_readv(sqe, fd, job->pieces, job->n_pieces, job->offset);
        io_uring_sqe_set_data64(sqe, *started);
        u->queued++;
        ++*started;
    }
    return hand_over(u);
}

/* A read takes 0.1 ms, of which waking up is a third: the caller looks for its completion for a while, giving way to
 * whoever else wants the core, before it sleeps. */
static void look_out(uring_engine *u)
{
    enum { LOOK_NS = 200000 };
    for (const uint64_t begin = cairn_now_ns(); io_uring_cq_ready(&u->ring) == 0 && cairn_now_ns() - begin < LOOK_NS;)
        sched_yield();
}

bool uring_wait(uring_engine *u, size_t *out, int *result)
{
    look_out(u);
    for (;;) {
        struct io_uring_cqe *cqe;
        int err = io_uring_wait_cqe(&u->ring, &cqe);
        if (err == 0) {
            *out = (size_t)io_uring_cqe_get_data64(cqe);
            *result = cqe->res;
            io_uring_cqe_seen(&u->ring, cqe);
            u->flying--;
            return true;
        }
        if (!passing(err)) return give_up(u);
    }
}

#else

uring_engine *uring_new(void)
{
    return NULL;
}
void uring_free(uring_engine *u)
{
    (void)u;
}
bool uring_push(uring_engine *u, int fd, read_job *jobs, size_t n, size_t *started)
{
    (void)u, (void)fd, (void)jobs, (void)n, (void)started;
    return false;
}
bool uring_wait(uring_engine *u, size_t *out, int *result)
{
    (void)u, (void)out, (void)result;
    return false;
}

#endif
