/* scratch.c - see scratch.h. */
#include "scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OPEN_DIRS = 16 };

int scratch_make(cli *c, const char *below, char **out)
{
    *out = NULL;
    if (below == NULL) below = getenv("TMPDIR");
    if (below == NULL || below[0] == 0) below = "/tmp";
    char *path = NULL;
    if (asprintf(&path, "%s/cairn-bench-XXXXXX", below) < 0) return cli_fail(c, EXIT_FAILED, "out of memory");
    if (mkdtemp(path) == NULL) {
        int code =
            cli_fail(c, EXIT_FAILED, "cannot make a directory for the store in '%s': %s", below, strerror(errno));
        free(path);
        return code;
    }
    *out = path;
    return -1;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    remove(path);
    return 0;
}

void scratch_remove(char *dir)
{
    if (dir != NULL) nftw(dir, remove_one, OPEN_DIRS, FTW_DEPTH | FTW_PHYS);
    free(dir);
}

static int drop_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)at;
    if (type != FTW_F) return 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT ? 0 : -1;
    int error = fdatasync(fd) != 0 ? errno : posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    errno = error;
    return error != 0 ? -1 : 0;
}

int scratch_drop_cache(cli *c, const char *dir)
{
    if (nftw(dir, drop_one, OPEN_DIRS, FTW_PHYS) == 0) return -1;
    return cli_fail(c, EXIT_FAILED, "cannot drop the pages of '%s' from the page cache: %s", dir, strerror(errno));
}

static uint64_t warm_room;

static int warm_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    static char buffer[1 << 20];
    (void)at;
    if (type != FTW_F || (uint64_t)st->st_size > warm_room) return 0;
    warm_room -= (uint64_t)st->st_size;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT ? 0 : -1;
    ssize_t got;
    while ((got = read(fd, buffer, sizeof buffer)) > 0) {}
    int error = errno;
    close(fd);
    errno = error;
    return got < 0 ? -1 : 0;
}

int scratch_warm_cache(cli *c, const char *dir)
{
    warm_room = cairn_free_ram_bytes() / 2;
    if (nftw(dir, warm_one, OPEN_DIRS, FTW_PHYS) == 0) return -1;
    return cli_fail(c, EXIT_FAILED, "cannot read the files of '%s': %s", dir, strerror(errno));
}

static char *largest_path; /* nftw hands nothing through */
static off_t largest_bytes;

static int look_at(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)at;
    if (type != FTW_F || st->st_size <= largest_bytes) return 0;
    free(largest_path);
    largest_path = strdup(path);
    largest_bytes = st->st_size;
    return 0;
}

char *scratch_largest(const char *dir)
{
    largest_path = NULL;
    largest_bytes = 0;
    nftw(dir, look_at, OPEN_DIRS, FTW_PHYS);
    return largest_path;
}
