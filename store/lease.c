/* lease.c - one appender at a time for a context.
 *
 * A lease is a record lock (fcntl) on "<store>/lease/<context id>". It dies with its process however that ends, and is
 * not inherited by fork. Such locks do not keep threads of one process apart, and closing any descriptor of the file
 * gives them up: so the process's own leases are on a list, which is asked first, and a held file is opened once. The
 * text in the file tells a person who holds it; it is never believed for anything else. */
#include "store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static cairn_status lease_path(const store_env *env, uint64_t context, char out[STORE_PATH_MAX])
{
    char name[48];
    snprintf(name, sizeof name, "lease/%llu", (unsigned long long)context);
    return store_join(out, env->path, name);
}

/* The command line as one line; anything odd in it becomes a '?'. */
static void printable(char *text, size_t n, char end)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < 0x20 || (unsigned char)text[i] == 0x7f) text[i] = text[i] == '\0' ? ' ' : '?';
    while (n > 0 && text[n - 1] == ' ') n--;
    text[n] = end;
}

static void write_text(int fd)
{
    char host[65] = "?", command[257] = "?", start[32] = "?", text[512];
    gethostname(host, sizeof host - 1);
    host[sizeof host - 1] = '\0';
    int cmd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    if (cmd >= 0) {
        ssize_t n = read(cmd, command, sizeof command - 1);
        if (n > 0) printable(command, (size_t)n, '\0');
        close(cmd);
    }
    time_t now = time(NULL);
    struct tm utc;
    if (gmtime_r(&now, &utc) != NULL) strftime(start, sizeof start, "%Y-%m-%d %H:%M:%S UTC", &utc);
    int n = snprintf(text, sizeof text, "pid %d on %s since %s: %s\n", (int)getpid(), host, start, command);
    /* for a person's eyes: a lease whose text could not be written is still a lease */
    if (n > 0 && ftruncate(fd, 0) == 0 && pwrite(fd, text, (size_t)n, 0) < 0) errno = 0;
}

static cairn_status busy(int fd, const char *name)
{
    char text[400];
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int holder = fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK ? (int)lock.l_pid : 0;
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    size_t length = n > 0 ? (size_t)n : 0;
    while (length > 0 && text[length - 1] == '\n') length--;
    printable(text, length, '\0');
    char start[32];
    snprintf(start, sizeof start, "pid %d ", holder);
    if (holder == 0 || strncmp(text, start, strlen(start)) == 0) /* the text is its holder's */
        return cairn_fail(CAIRN_BUSY, "context '%s' is being appended to by %s", name,
                          length > 0 ? text : "another process");
    return cairn_fail(CAIRN_BUSY, "context '%s' is being appended to by pid %d", name, holder);
}

/* Locks the file that is there now: a holder that leaves unlinks it first, so what we opened may be gone already. */
static cairn_status lock_file(const char *path, const char *name, int *out)
{
    for (;;) {
        struct stat opened, there;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0) return cairn_fail_errno(errno, "%s", path);
        if (fcntl(fd, F_SETLK, &lock) != 0) {
            cairn_status status =
                errno == EAGAIN || errno == EACCES ? busy(fd, name) : cairn_fail_errno(errno, "%s", path);
            close(fd);
            return status;
        }
        if (fstat(fd, &opened) == 0 && stat(path, &there) == 0 && opened.st_ino == there.st_ino &&
            opened.st_dev == there.st_dev) {
            fchmod(fd, 0600);
            *out = fd;
            return CAIRN_OK;
        }
        close(fd);
    }
}

cairn_status store_lease_take(cairn_store *store, uint64_t context, const char *name)
{
    store_env *env = store->env;
    char path[STORE_PATH_MAX];
    cairn_status status = lease_path(env, context, path);
    if (status != CAIRN_OK) return status;
    store_lease *lease = cairn_calloc(1, sizeof *lease);
    if (lease == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a lease on context '%s'", name);
    lease->context = context;
    pthread_mutex_lock(&env->mutex);
    for (const store_lease *l = env->leases; l != NULL && status == CAIRN_OK; l = l->next)
        if (l->context == context)
            status = cairn_fail(CAIRN_BUSY, "context '%s' is being appended to by this process (pid %d)", name,
                                (int)getpid());
    if (status == CAIRN_OK) status = lock_file(path, name, &lease->fd);
    if (status == CAIRN_OK) {
        write_text(lease->fd);
        lease->next = env->leases;
        env->leases = lease;
        lease = NULL;
    }
    pthread_mutex_unlock(&env->mutex);
    cairn_free(lease);
    return status;
}

void store_lease_give(cairn_store *store, uint64_t context)
{
    store_env *env = store->env;
    char path[STORE_PATH_MAX];
    if (env->pid != getpid()) return; /* the parent's */
    pthread_mutex_lock(&env->mutex);
    store_lease **at = &env->leases;
    while (*at != NULL && (*at)->context != context) at = &(*at)->next;
    store_lease *lease = *at;
    if (lease != NULL) {
        *at = lease->next;
        if (lease_path(env, context, path) == CAIRN_OK) unlink(path); /* while it is still ours */
        close(lease->fd);
        cairn_free(lease);
    }
    pthread_mutex_unlock(&env->mutex);
}
