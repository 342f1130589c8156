/* fault.c - loaded before libc (LD_PRELOAD): counts the file calls of a process below one directory, and makes the Nth
 * of them fail, stop half way, or be the last thing the process does.
 *
 *   CAIRN_FAULT_BELOW   directory: calls on other paths pass untouched
 *   CAIRN_FAULT_KINDS   which calls count, letters (all): W write, S sync, N names (create, rename, unlink, mkdir,
 * rmdir, chmod), T lengths (ftruncate, fallocate), R read, O open without creating, M mmap CAIRN_FAULT_AT      the call
 * that is hit, from 1; 0 or absent: none CAIRN_FAULT_DO      kill      SIGKILL before the call tear      SIGKILL after
 * the first half of a write (other calls: before) short     the first half only is read or written and reported; other
 * calls go on a number  the call fails with this errno and does nothing CAIRN_FAULT_TIMES   how many counted calls from
 * there on are hit (1); 0 = all that follow CAIRN_FAULT_LOG     file: one line a counted call, before it is made: kind,
 * flags, offset, bytes, path, second path; the bytes of writes go to "<file>.data" in the same order
 *
 * Kept small on purpose: one lock, paths of descriptors by /proc/self/fd. What stdio does inside libc is not seen, so a
 * stream for writing is made to write by way of write() here. */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

enum { LINE_MAX_BYTES = 2 * PATH_MAX + 128 };
typedef enum verdict { PASS, HIT_ERROR, HIT_SHORT, HIT_TEAR } verdict;

static struct {
    pthread_once_t once;
    pthread_mutex_t mutex;
    char below[PATH_MAX];
    size_t below_bytes;
    char kinds[16], then[16];
    char what[16];
    long at, times, count;
    int error; /* errno of HIT_ERROR */
    int log, data;
} f = {.once = PTHREAD_ONCE_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER, .log = -1, .data = -1};

static void take(const char *name, char *out, size_t room, const char *otherwise)
{
    const char *value = getenv(name);
    snprintf(out, room, "%s", value != NULL ? value : otherwise);
}

static int raw_open(const char *path)
{
    return (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void set_up(void)
{
    char text[PATH_MAX + 8];
    take("CAIRN_FAULT_BELOW", f.below, sizeof f.below, "");
    f.below_bytes = strlen(f.below);
    take("CAIRN_FAULT_KINDS", f.kinds, sizeof f.kinds, "WSNTROM");
    take("CAIRN_FAULT_THEN", f.then, sizeof f.then, "");
    take("CAIRN_FAULT_DO", f.what, sizeof f.what, "kill");
    take("CAIRN_FAULT_AT", text, sizeof text, "0");
    f.at = strtol(text, NULL, 10);
    take("CAIRN_FAULT_TIMES", text, sizeof text, "1");
    f.times = strtol(text, NULL, 10);
    f.error = (int)strtol(f.what, NULL, 10);
    take("CAIRN_FAULT_LOG", text, PATH_MAX, "");
    if (text[0] == 0) return;
    f.log = raw_open(text);
    strcat(text, ".data");
    f.data = raw_open(text);
}

static void raw_write(int fd, const void *bytes, size_t n)
{
    for (const char *p = bytes; n > 0;) {
        ssize_t wrote = (ssize_t)syscall(SYS_write, fd, p, n);
        if (wrote <= 0) abort();
        p += wrote;
        n -= (size_t)wrote;
    }
}

static int below(const char *path)
{
    return f.below_bytes > 0 && strncmp(path, f.below, f.below_bytes) == 0 &&
           (path[f.below_bytes] == '/' || path[f.below_bytes] == 0);
}

/* Absolute path of a descriptor, or of `path` beside the directory `dir`. 0 if it is not one we watch. */
static int path_of(int dir, const char *path, char out[PATH_MAX])
{
    char link[64];
    pthread_once(&f.once, set_up);
    if (path != NULL && path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return below(out);
    }
    ssize_t n;
    if (dir == AT_FDCWD) {
        n = (ssize_t)syscall(SYS_getcwd, out, PATH_MAX) - 1;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        n = readlink(link, out, PATH_MAX - 1);
    }
    if (n < 0) return 0;
    out[n] = 0;
    if (path != NULL) snprintf(out + n, PATH_MAX - (size_t)n, "/%s", path);
    return below(out);
}

/* The lock is held from here to done(), so that the log has the order in which things happened. */
static verdict count(char kind, int flags, off_t offset, size_t bytes, const char *path, const char *second)
{
    pthread_mutex_lock(&f.mutex);
    if (strchr(f.kinds, kind) == NULL) return PASS;
    f.count++;
    if (f.log >= 0) {
        char line[LINE_MAX_BYTES];
        int n = snprintf(line, sizeof line, "%c\t%d\t%lld\t%zu\t%s\t%s\n", kind, flags, (long long)offset, bytes, path,
                         second != NULL ? second : "");
        raw_write(f.log, line, (size_t)n);
    }
    if (f.at != 0 && f.count > f.at && strchr(f.then, kind) != NULL) {
        f.error = ENOSPC;
        return HIT_ERROR;
    }
    if (f.at == 0 || f.count < f.at || (f.times > 0 && f.count >= f.at + f.times)) return PASS;
    if (strcmp(f.what, "kill") == 0) kill(getpid(), SIGKILL);
    if (strcmp(f.what, "tear") == 0) {
        if (kind != 'W') kill(getpid(), SIGKILL);
        return HIT_TEAR;
    }
    return strcmp(f.what, "short") == 0 ? HIT_SHORT : HIT_ERROR;
}

static void done(void)
{
    int error = errno;
    pthread_mutex_unlock(&f.mutex);
    errno = error;
}

static int fails(void)
{
    errno = f.error;
    return -1;
}

/* ---- data ---- */

static int flags_of(int fd)
{
    return (int)syscall(SYS_fcntl, fd, F_GETFL);
}

static off_t place(int fd)
{
    return flags_of(fd) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
}

/* As many of the pieces as make up `bytes`, the last one cut. */
static int cut(const struct iovec *from, int n, size_t bytes, struct iovec *to)
{
    int k = 0;
    for (; k < n && bytes > 0; k++) {
        to[k] = from[k];
        if (to[k].iov_len > bytes) to[k].iov_len = bytes;
        bytes -= to[k].iov_len;
    }
    return k;
}

/* One body for every read and write: offset < 0 means where the descriptor stands. */
static ssize_t transfer(char kind, int fd, const struct iovec *pieces, int n, off_t offset)
{
    typedef ssize_t (*at_offset)(int, const struct iovec *, int, off_t);
    typedef ssize_t (*at_place)(int, const struct iovec *, int);
    static at_offset real[2];
    static at_place plain[2];
    int w = kind == 'W';
    char path[PATH_MAX];
    struct iovec some[IOV_MAX];
    if (plain[w] == NULL) {
        real[w] = REAL(w ? "pwritev" : "preadv", at_offset);
        plain[w] = REAL(w ? "writev" : "readv", at_place);
    }
    if (!path_of(fd, NULL, path)) return offset < 0 ? plain[w](fd, pieces, n) : real[w](fd, pieces, n, offset);
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += pieces[i].iov_len;
    verdict v = count(kind, flags_of(fd), offset < 0 ? place(fd) : offset, bytes, path, NULL);
    if (w && f.data >= 0)
        for (int i = 0; i < n; i++) raw_write(f.data, pieces[i].iov_base, pieces[i].iov_len);
    ssize_t result = -1;
    if (v == HIT_ERROR) {
        fails();
    } else {
        if (v != PASS && bytes > 1) {
            n = cut(pieces, n, bytes / 2, some);
            pieces = some;
        }
        result = offset < 0 ? plain[w](fd, pieces, n) : real[w](fd, pieces, n, offset);
        if (v == HIT_TEAR) kill(getpid(), SIGKILL);
    }
    done();
    return result;
}

ssize_t write(int fd, const void *data, size_t n)
{
    return transfer('W', fd, &(struct iovec){(void *)(size_t)data, n}, 1, -1);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at)
{
    return transfer('W', fd, &(struct iovec){(void *)(size_t)data, n}, 1, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at)
{
    return pwrite(fd, data, n, at);
}
ssize_t writev(int fd, const struct iovec *v, int n)
{
    return transfer('W', fd, v, n, -1);
}
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at)
{
    return transfer('W', fd, v, n, at);
}
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t at)
{
    return pwritev(fd, v, n, at);
}
ssize_t read(int fd, void *data, size_t n)
{
    return transfer('R', fd, &(struct iovec){data, n}, 1, -1);
}
ssize_t pread(int fd, void *data, size_t n, off_t at)
{
    return transfer('R', fd, &(struct iovec){data, n}, 1, at);
}
ssize_t pread64(int fd, void *data, size_t n, off_t at)
{
    return pread(fd, data, n, at);
}
ssize_t readv(int fd, const struct iovec *v, int n)
{
    return transfer('R', fd, v, n, -1);
}
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at)
{
    return transfer('R', fd, v, n, at);
}
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t at)
{
    return preadv(fd, v, n, at);
}

/* A stream that writes through the above. It has no fileno(): who syncs keeps the descriptor. */
static ssize_t stream_write(void *cookie, const char *data, size_t n)
{
    ssize_t wrote = write((int)(intptr_t)cookie, data, n);
    return wrote < 0 ? 0 : wrote; /* stdio's sign of an error */
}
static int stream_close(void *cookie)
{
    return close((int)(intptr_t)cookie);
}
FILE *fdopen(int fd, const char *mode)
{
    typedef FILE *(*type)(int, const char *);
    char path[PATH_MAX];
    if (mode[0] != 'w' || !path_of(fd, NULL, path)) return REAL("fdopen", type)(fd, mode);
    return fopencookie((void *)(intptr_t)fd, mode,
                       (cookie_io_functions_t){.write = stream_write, .close = stream_close});
}

/* ---- calls that do one thing: real(...) unless it is hit ---- */

#define PLAIN(kind, flags, offset, bytes, path, second, call)                                                          \
    do {                                                                                                               \
        verdict v = count(kind, flags, offset, bytes, path, second);                                                   \
        int result = v == HIT_ERROR ? fails() : (call);                                                                \
        done();                                                                                                        \
        return result;                                                                                                 \
    } while (0)

int fsync(int fd)
{
    typedef int (*type)(int);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("fsync", type)(fd);
    PLAIN('S', 0, 0, 0, path, NULL, REAL("fsync", type)(fd));
}
int fdatasync(int fd)
{
    typedef int (*type)(int);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("fdatasync", type)(fd);
    PLAIN('S', 0, 0, 0, path, NULL, REAL("fdatasync", type)(fd));
}
int ftruncate(int fd, off_t n)
{
    typedef int (*type)(int, off_t);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("ftruncate", type)(fd, n);
    PLAIN('T', 0, n, 0, path, "ftruncate", REAL("ftruncate", type)(fd, n));
}
int ftruncate64(int fd, off_t n)
{
    return ftruncate(fd, n);
}
int fallocate(int fd, int mode, off_t at, off_t n)
{
    typedef int (*type)(int, int, off_t, off_t);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("fallocate", type)(fd, mode, at, n);
    PLAIN('T', mode, at, (size_t)n, path, "fallocate", REAL("fallocate", type)(fd, mode, at, n));
}
int fallocate64(int fd, int mode, off_t at, off_t n)
{
    return fallocate(fd, mode, at, n);
}
int posix_fallocate(int fd, off_t at, off_t n)
{
    typedef int (*type)(int, off_t, off_t);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("posix_fallocate", type)(fd, at, n);
    verdict v = count('T', 0, at, (size_t)n, path, "fallocate");
    int result = v == HIT_ERROR ? f.error : REAL("posix_fallocate", type)(fd, at, n);
    done();
    return result;
}
int posix_fallocate64(int fd, off_t at, off_t n)
{
    return posix_fallocate(fd, at, n);
}

static int open_any(int dir, const char *name, int flags, mode_t mode)
{
    typedef int (*type)(int, const char *, int, ...);
    char path[PATH_MAX];
    if (!path_of(dir, name, path)) return REAL("openat", type)(dir, name, flags, mode);
    int creates = (flags & O_CREAT) != 0 && syscall(SYS_faccessat, dir, name, F_OK) != 0;
    PLAIN(creates || (flags & O_TRUNC) ? 'N' : 'O', flags, 0, 0, path, creates ? "create" : "open",
          REAL("openat", type)(dir, name, flags, mode));
}
#define MODE_ARGUMENT(flags)                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (((flags) & (O_CREAT | O_TMPFILE)) != 0) {                                                                      \
        va_list ap;                                                                                                    \
        va_start(ap, flags);                                                                                           \
        mode = va_arg(ap, mode_t);                                                                                     \
        va_end(ap);                                                                                                    \
    }
int open(const char *name, int flags, ...)
{
    MODE_ARGUMENT(flags)
    return open_any(AT_FDCWD, name, flags, mode);
}
int open64(const char *name, int flags, ...)
{
    MODE_ARGUMENT(flags)
    return open_any(AT_FDCWD, name, flags, mode);
}
int openat(int dir, const char *name, int flags, ...)
{
    MODE_ARGUMENT(flags)
    return open_any(dir, name, flags, mode);
}
int openat64(int dir, const char *name, int flags, ...)
{
    MODE_ARGUMENT(flags)
    return open_any(dir, name, flags, mode);
}

/* The name is chosen inside, so it is logged afterwards: the log's only line that follows its call. */
int mkostemp(char *name, int flags)
{
    typedef int (*type)(char *, int);
    char path[PATH_MAX];
    if (!path_of(AT_FDCWD, name, path)) return REAL("mkostemp", type)(name, flags);
    int log = f.log;
    f.log = -1;
    verdict v = count('N', flags | O_CREAT | O_RDWR, 0, 0, path, "create");
    f.log = log;
    int result = v == HIT_ERROR ? fails() : REAL("mkostemp", type)(name, flags);
    if (log >= 0 && strchr(f.kinds, 'N') != NULL) {
        char line[LINE_MAX_BYTES];
        path_of(AT_FDCWD, name, path);
        int n = snprintf(line, sizeof line, "N\t%d\t0\t0\t%s\tcreate\n", flags | O_CREAT | O_RDWR, path);
        raw_write(log, line, (size_t)n);
    }
    done();
    return result;
}
int mkostemp64(char *name, int flags)
{
    return mkostemp(name, flags);
}

int rename(const char *from, const char *to)
{
    typedef int (*type)(const char *, const char *);
    char a[PATH_MAX], b[PATH_MAX], second[PATH_MAX + 8];
    path_of(AT_FDCWD, from, a);
    if (!path_of(AT_FDCWD, to, b)) return REAL("rename", type)(from, to);
    snprintf(second, sizeof second, "rename %s", b);
    PLAIN('N', 0, 0, 0, a, second, REAL("rename", type)(from, to));
}
int unlinkat(int dir, const char *name, int flags)
{
    typedef int (*type)(int, const char *, int);
    char path[PATH_MAX];
    if (!path_of(dir, name, path)) return REAL("unlinkat", type)(dir, name, flags);
    PLAIN('N', 0, 0, 0, path, flags & AT_REMOVEDIR ? "rmdir" : "unlink", REAL("unlinkat", type)(dir, name, flags));
}
int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}
int rmdir(const char *name)
{
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}
int mkdir(const char *name, mode_t mode)
{
    typedef int (*type)(const char *, mode_t);
    char path[PATH_MAX];
    if (!path_of(AT_FDCWD, name, path)) return REAL("mkdir", type)(name, mode);
    PLAIN('N', (int)mode, 0, 0, path, "mkdir", REAL("mkdir", type)(name, mode));
}
int fchmod(int fd, mode_t mode)
{
    typedef int (*type)(int, mode_t);
    char path[PATH_MAX];
    if (!path_of(fd, NULL, path)) return REAL("fchmod", type)(fd, mode);
    PLAIN('N', (int)mode, 0, 0, path, "chmod", REAL("fchmod", type)(fd, mode));
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    typedef void *(*type)(void *, size_t, int, int, int, off_t);
    char path[PATH_MAX];
    if ((flags & MAP_ANONYMOUS) != 0 || fd < 0 || !path_of(fd, NULL, path))
        return REAL("mmap", type)(at, n, protection, flags, fd, offset);
    verdict v = count('M', flags, offset, n, path, NULL);
    void *result = MAP_FAILED;
    if (v == HIT_ERROR)
        fails();
    else
        result = REAL("mmap", type)(at, n, protection, flags, fd, offset);
    done();
    return result;
}
void *mmap64(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    return mmap(at, n, protection, flags, fd, offset);
}
