/* file.c - the sealed part as a file: FAISS's own format, guarded by a hash that is kept elsewhere (the segment
 * record).
 *
 * FAISS believes what it reads, so the bytes are hashed before it sees them, through the very descriptor it then reads.
 * Writing hashes on the way out, so that a disk that returns other bytes is noticed at the next load. */
#include "index_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 20, FOOT_BYTES = 8 };
static const char MAGIC[4] = {'C', 'R', 'N', 'I'};

/* ---- a FILE that hashes what is written to it, and passes it on if there is a descriptor ---- */

typedef struct sink {
    int fd; /* -1: only counts */
    int error;
    size_t bytes;
    cairn_hasher *hasher; /* may be NULL */
} sink;

static ssize_t sink_write(void *cookie, const char *data, size_t bytes)
{
    sink *s = cookie;
    for (size_t done = 0; s->fd >= 0 && done < bytes;) {
        ssize_t n = write(s->fd, data + done, bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            s->error = n < 0 ? errno : EIO;
            return 0; /* stdio's sign of an error */
        }
        done += (size_t)n;
    }
    if (s->hasher != NULL) cairn_hasher_add(s->hasher, data, bytes);
    s->bytes += bytes;
    return (ssize_t)bytes;
}

static cairn_status write_to(const cairn_sealed *sealed, uint32_t dim, sink *s)
{
    FILE *file = fopencookie(s, "w", (cookie_io_functions_t){.write = sink_write});
    if (file == NULL) return cairn_fail(CAIRN_NO_MEMORY, "stream for an index file");
    setvbuf(file, NULL, _IOFBF, 1 << 16);
    cairn_status st = cairn_faiss_write(sealed->faiss, file);
    char foot[FOOT_BYTES];
    memcpy(foot, MAGIC, sizeof MAGIC);
    cairn_put_le32(foot + 4, dim);
    fwrite(foot, sizeof foot, 1, file);
    fwrite(sealed->center, sizeof *sealed->center, dim, file); /* errors stay with the stream: fclose tells */
    if (fclose(file) != 0 && st == CAIRN_OK) st = cairn_fail_errno(s->error != 0 ? s->error : errno, "writing it");
    if (s->error != 0) st = cairn_fail_errno(s->error, "writing it");
    return st;
}

size_t cairn_sealed_file_bytes(const cairn_sealed *sealed, uint32_t dim)
{
    sink s = {.fd = -1};
    return write_to(sealed, dim, &s) == CAIRN_OK ? s.bytes : 0;
}

/* The directory entry is durable only when the directory is. */
static cairn_status sync_directory_of(const char *path)
{
    char *dir = cairn_strdup(path);
    if (dir == NULL) return cairn_fail(CAIRN_NO_MEMORY, "path of %s", path);
    char *slash = strrchr(dir, '/');
    if (slash != NULL) slash[slash == dir] = 0;
    int fd = open(slash != NULL ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cairn_status st = CAIRN_OK;
    if (fd < 0 || fsync(fd) != 0) st = cairn_fail_errno(errno, "syncing the directory of %s", path);
    if (fd >= 0) close(fd);
    cairn_free(dir);
    return st;
}

cairn_status cairn_sealed_save(const cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim, const char *path,
                               uint64_t *out_hash)
{
    static const char unfinished[] = CAIRN_UNFINISHED "XXXXXX";
    cairn_status st;
    cairn_sealed own = {0}; /* FAISS cannot write mapped lists: they are read again */
    char *beside = NULL;
    sink s = {.fd = -1};
    if (sealed->faiss == NULL) return cairn_fail(CAIRN_INVALID, "%s: nothing of the index is sealed yet", path);
    if (sealed->mapped) {
        if ((st = cairn_sealed_load(&own, kind, dim, sealed->rows, sealed->path, sealed->hash, false)) != CAIRN_OK)
            return st;
        sealed = &own;
    }
    size_t length = strlen(path);
    beside = cairn_alloc(length + sizeof unfinished);
    s.hasher = cairn_hasher_new();
    if (beside == NULL || s.hasher == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "writing %s", path);
        goto out;
    }
    memcpy(beside, path, length);
    memcpy(beside + length, unfinished, sizeof unfinished);
    s.fd = mkostemp(beside, O_CLOEXEC);
    if (s.fd < 0) {
        st = cairn_fail_errno(errno, "creating a file beside %s", path);
        goto out;
    }
    if (!cairn_make_private(s.fd)) {
        st = cairn_fail_errno(errno, "mode of a file beside %s", path);
    } else if ((st = write_to(sealed, dim, &s)) != CAIRN_OK) {
        st = cairn_fail_within(st, "%s", path);
    } else if (fsync(s.fd) != 0) {
        st = cairn_fail_errno(errno, "syncing %s", path);
    } else if (rename(beside, path) != 0) {
        st = cairn_fail_errno(errno, "renaming %s to %s", beside, path);
    } else {
        st = sync_directory_of(path);
        if (st == CAIRN_OK) *out_hash = cairn_hasher_value(s.hasher);
        goto out;
    }
    unlink(beside);
out:
    if (s.fd >= 0) close(s.fd);
    cairn_hasher_free(s.hasher);
    cairn_free(beside);
    cairn_sealed_wipe(&own);
    return st;
}

static cairn_status hash_file(int fd, const char *path, uint64_t *hash)
{
    cairn_status st = CAIRN_OK;
    cairn_hasher *hasher = cairn_hasher_new();
    char *buffer = cairn_alloc(READ_BYTES);
    if (hasher == NULL || buffer == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "reading %s", path);
        goto out;
    }
    for (;;) {
        ssize_t n = read(fd, buffer, READ_BYTES);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            st = cairn_fail_errno(errno, "reading %s", path);
            goto out;
        }
        if (n == 0) break;
        cairn_hasher_add(hasher, buffer, (size_t)n);
    }
    *hash = cairn_hasher_value(hasher);
out:
    cairn_hasher_free(hasher);
    cairn_free(buffer);
    return st;
}

/* What follows FAISS's bytes. */
static cairn_status read_center(FILE *file, const char *path, uint32_t dim, float **out)
{
    char foot[FOOT_BYTES + 1]; /* one more than there should be after the center */
    float *center = cairn_alloc_array(dim, sizeof *center);
    if (center == NULL) return cairn_fail(CAIRN_NO_MEMORY, "reading %s", path);
    if (fread(foot, FOOT_BYTES, 1, file) != 1 || memcmp(foot, MAGIC, sizeof MAGIC) != 0 ||
        cairn_get_le32(foot + 4) != dim || fread(center, sizeof *center, dim, file) != dim ||
        fread(foot, 1, 1, file) != 0) {
        cairn_free(center);
        return cairn_fail(CAIRN_CORRUPT, "index file %s does not end with the center of %u dimensions", path, dim);
    }
    *out = center;
    return CAIRN_OK;
}

cairn_status cairn_sealed_load(cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim, size_t rows,
                               const char *path, uint64_t hash, bool map)
{
    cairn_status st;
    cairn_faiss *faiss = NULL;
    char *copy = NULL;
    float *center = NULL;
    FILE *file = NULL;
    struct stat info = {0};
    uint64_t found = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0) {
        st = cairn_fail_errno(errno, "opening index file %s", path);
        goto out;
    }
    if (!S_ISREG(info.st_mode)) {
        st = cairn_fail(CAIRN_CORRUPT, "%s is not a file", path);
        goto out;
    }
    if ((st = hash_file(fd, path, &found)) != CAIRN_OK) goto out;
    if (found != hash) {
        st = cairn_fail(CAIRN_CORRUPT, "index file %s: hash %016llx, expected %016llx", path, (unsigned long long)found,
                        (unsigned long long)hash);
        goto out;
    }
    copy = cairn_strdup(path);
    file = copy != NULL && lseek(fd, 0, SEEK_SET) == 0 ? fdopen(fd, "rb") : NULL;
    if (file == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "reading %s", path);
        goto out;
    }
    st = cairn_faiss_read(file, kind->params, dim, map, &faiss);
    if (st != CAIRN_OK) {
        st = cairn_fail_within(st, "index file %s", path);
    } else if (cairn_faiss_rows(faiss) != rows) {
        st = cairn_fail(CAIRN_CORRUPT, "index file %s holds %zu rows, expected %zu", path, cairn_faiss_rows(faiss),
                        rows);
    } else {
        st = read_center(file, path, dim, &center);
    }
out:
    if (file != NULL) {
        fclose(file);
    } else if (fd >= 0) {
        close(fd);
    }
    cairn_sealed_wipe(sealed);
    if (st != CAIRN_OK) {
        cairn_faiss_free(faiss);
        cairn_free(copy);
        return st;
    }
    *sealed = (cairn_sealed){.faiss = faiss, .rows = rows, .mapped = map, .path = copy, .hash = hash};
    cairn_sealed_set_center(sealed, center, dim);
    /* A mapped index has its centroids in memory and its lists in the page cache: counted as nothing. */
    if (!map) sealed->bytes = (size_t)info.st_size;
    return CAIRN_OK;
}

cairn_status cairn_sealed_unmap(cairn_sealed *sealed, const cairn_kind *kind, uint32_t dim)
{
    cairn_sealed own = {0};
    cairn_status st = cairn_sealed_load(&own, kind, dim, sealed->rows, sealed->path, sealed->hash, false);
    if (st != CAIRN_OK) return st;
    cairn_sealed_wipe(sealed);
    *sealed = own;
    return CAIRN_OK;
}
