/* fetch_pool.c - reads in flight through threads that sleep in pread: the engine where io_uring is refused. */
#include "fetch_internal.h"

#include <errno.h>

struct pool_engine {
    int fd;
    int direct_fd; /* -1: through the page cache */
    pthread_mutex_t lock;
    pthread_cond_t work;
    pthread_cond_t done;
    read_job *jobs;
    size_t n;
    size_t next;      /* the first job no thread has taken */
    read_job *landed; /* finished and not yet handed out, linked through next_landed */
    bool stop;
    size_t threads;
    pthread_t thread[READER_THREADS];
};

static void read_one(const pool_engine *p, read_job *job)
{
    ssize_t got = -1;
    if (p->direct_fd >= 0) got = preadv(p->direct_fd, job->pieces, (int)job->n_pieces, (off_t)job->offset);
    if (got > 0) job->done = (uint64_t)got;
    if (job->done < job->bytes) reader_finish(p->fd, job);
}

static void *thread_main(void *arg)
{
    pool_engine *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (p->next == p->n && !p->stop) pthread_cond_wait(&p->work, &p->lock);
        if (p->stop) break;
        read_job *job = &p->jobs[p->next++];
        pthread_mutex_unlock(&p->lock);
        read_one(p, job);
        pthread_mutex_lock(&p->lock);
        job->next_landed = p->landed;
        p->landed = job;
        pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

pool_engine *pool_new(int fd, int direct_fd, size_t threads)
{
    pool_engine *p = cairn_calloc(1, sizeof *p);
    if (p == NULL) return NULL;
    p->fd = fd;
    p->direct_fd = direct_fd;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    while (p->threads < threads && p->threads < READER_THREADS &&
           cairn_thread_start(&p->thread[p->threads], READER_STACK, thread_main, p) == 0)
        p->threads++;
    if (p->threads > 0) return p; /* fewer than asked for read more slowly, and as well */
    pool_free(p);
    return NULL;
}

void pool_free(pool_engine *p)
{
    if (p == NULL) return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (size_t i = 0; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->lock);
    cairn_free(p);
}

void pool_start(pool_engine *p, read_job *jobs, size_t n)
{
    pthread_mutex_lock(&p->lock);
    p->jobs = jobs;
    p->n = n;
    p->next = 0;
    p->landed = NULL;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
}

read_job *pool_wait(pool_engine *p)
{
    pthread_mutex_lock(&p->lock);
    while (p->landed == NULL) pthread_cond_wait(&p->done, &p->lock);
    read_job *job = p->landed;
    p->landed = job->next_landed;
    pthread_mutex_unlock(&p->lock);
    return job;
}
