/* replace.c - a file that appears whole or not at all. */
#include "base_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

bool cairn_make_private(int fd)
{
    return fchmod(fd, 0600) == 0 || errno == EPERM || errno == ENOTSUP;
}

/* A new name in a directory is safe on disk only when the directory is. */
static cairn_status sync_directory(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *dir = slash == NULL ? cairn_strdup(".") : slash == path ? cairn_strdup("/") : cairn_strdup(path);
    if (dir == NULL) return cairn_fail(CAIRN_NO_MEMORY, "name of the directory of %s", path);
    if (slash != NULL && slash != path) dir[slash - path] = 0;
    cairn_status st = CAIRN_OK;
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) != 0) st = cairn_fail_errno(errno, "syncing directory %s", dir);
    if (fd >= 0) close(fd);
    cairn_free(dir);
    return st;
}

static cairn_status replace(const char *path, bool (*write)(FILE *file, const void *arg), const void *arg, bool sync)
{
    static const char suffix[] = CAIRN_UNFINISHED "XXXXXX";
    size_t n = strlen(path);
    cairn_status st = CAIRN_OK;
    FILE *f = NULL;
    int fd = -1;
    char *beside = cairn_alloc(n + sizeof suffix);
    if (beside == NULL) return cairn_fail(CAIRN_NO_MEMORY, "name of a file beside %s", path);
    memcpy(beside, path, n);
    memcpy(beside + n, suffix, sizeof suffix);
    fd = mkostemp(beside, O_CLOEXEC);
    if (fd < 0) {
        st = cairn_fail_errno(errno, "creating %s", beside);
        goto out;
    }
    if (!cairn_make_private(fd)) {
        st = cairn_fail_errno(errno, "mode of %s", beside);
        close(fd);
        goto out;
    }
    f = fdopen(fd, "wb");
    if (f == NULL) {
        st = cairn_fail_errno(errno, "writing %s", beside);
        close(fd);
        goto out;
    }
    if (!write(f, arg) || fflush(f) != 0 || (sync && fsync(fd) != 0)) {
        st = cairn_fail_errno(errno, "writing %s", beside);
        goto out;
    }
    int closed = fclose(f);
    f = NULL;
    if (closed != 0 || rename(beside, path) != 0) {
        st = cairn_fail_errno(errno, "putting %s in place", path);
        goto out;
    }
    fd = -1;
    if (sync) st = sync_directory(path);
out:
    if (f != NULL) fclose(f);
    if (fd >= 0) unlink(beside);
    cairn_free(beside);
    return st;
}

cairn_status cairn_replace_file(const char *path, bool (*write)(FILE *file, const void *arg), const void *arg)
{
    return replace(path, write, arg, true);
}

cairn_status cairn_put_file(const char *path, bool (*write)(FILE *file, const void *arg), const void *arg)
{
    return replace(path, write, arg, false);
}
