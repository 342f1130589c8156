/* thread.c - clock, threads and thread pool.
 *
 * A job's items are handed out by an atomic counter, so which worker runs an item depends on timing:
 * callers make results independent of that (one item writes one place, sums are merged in item order).
 * Workers spin briefly before they sleep: at decode a job comes every few tens of microseconds. */
#include "base_internal.h"

#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

static uint64_t clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
uint64_t cairn_now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}
uint64_t cairn_wall_ns(void)
{
    return clock_ns(CLOCK_REALTIME);
}

int cairn_thread_start(pthread_t *out, size_t stack, void *(*run)(void *), void *arg)
{
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}; /* meant for the thread they arise in */
    pthread_attr_t about;
    sigset_t all, old;
    pthread_attr_init(&about);
    if (stack != 0) pthread_attr_setstacksize(&about, stack);
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int err = pthread_create(out, &about, run, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&about);
    return err;
}

enum { MAX_THREADS = 64, SPINS = 2000 };

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

typedef struct worker {
    cairn_pool *pool;
    size_t number;
    pthread_t thread;
} worker;

struct cairn_pool {
    size_t size; /* workers, the caller included */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_cond_t done;
    atomic_uint_fast64_t generation; /* raised under the lock for each job, and to stop */
    atomic_size_t next;              /* item to hand out */
    atomic_size_t joined;            /* started workers inside this job; raised under the lock while it is open */
    bool open;                       /* workers may still join */
    size_t n;
    cairn_pool_fn fn;
    void *arg;
    bool stop;
    worker workers[MAX_THREADS];
};

static void work(cairn_pool *pool, size_t number)
{
    for (size_t i; (i = atomic_fetch_add(&pool->next, 1)) < pool->n;) pool->fn(pool->arg, i, number);
}

/* A worker joins a job while it is open. The caller closes it when no item is left and waits for those who joined,
 * never for one that is still waking up: where a core is taken by somebody else, a job costs what the caller alone
 * needs. */
static void *worker_main(void *p)
{
    worker *w = p;
    cairn_pool *pool = w->pool;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool->generation) == seen; i++) relax();
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
        seen = atomic_load(&pool->generation);
        bool stop = pool->stop;
        bool join = pool->open;
        if (join) atomic_fetch_add(&pool->joined, 1);
        pthread_mutex_unlock(&pool->lock);
        if (stop) return NULL;
        if (!join) continue;
        work(pool, w->number);
        if (atomic_fetch_sub(&pool->joined, 1) == 1) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

cairn_status cairn_pool_new(size_t threads, cairn_pool **out)
{
    *out = NULL;
    if (threads == 0) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        threads = cores > 0 ? (size_t)cores : 1;
    }
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    cairn_pool *pool = cairn_calloc(1, sizeof *pool);
    if (pool == NULL) return cairn_fail(CAIRN_NO_MEMORY, "thread pool of %zu", threads);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->size = 1;
    while (pool->size < threads) {
        worker *w = &pool->workers[pool->size];
        w->pool = pool;
        w->number = pool->size;
        int err = cairn_thread_start(&w->thread, 0, worker_main, w);
        if (err != 0) {
            cairn_pool_free(pool);
            return cairn_fail_errno(err, "starting thread %zu of %zu", w->number + 1, threads);
        }
        pool->size++;
    }
    *out = pool;
    return CAIRN_OK;
}

void cairn_pool_free(cairn_pool *pool)
{
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (size_t i = 1; i < pool->size; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    cairn_free(pool);
}

size_t cairn_pool_size(const cairn_pool *pool)
{
    return pool != NULL ? pool->size : 1;
}

void cairn_pool_run(cairn_pool *pool, size_t n, cairn_pool_fn fn, void *arg)
{
    if (pool == NULL || pool->size == 1 || n <= 1) {
        for (size_t i = 0; i < n; i++) fn(arg, i, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->fn = fn;
    pool->arg = arg;
    pool->n = n;
    atomic_store(&pool->next, 0);
    pool->open = true;
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    work(pool, 0);
    pthread_mutex_lock(&pool->lock);
    pool->open = false;
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < SPINS && atomic_load(&pool->joined) != 0; i++) relax();
    pthread_mutex_lock(&pool->lock);
    while (atomic_load(&pool->joined) != 0) pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
