/* manifest.c - which index files belong together: "CRNM", version, count, one XXH3-64 per file, their own XXH3-64.
 *
 *   offset  size  field
 *        0     4  magic 'C' 'R' 'N' 'M'
 *        4     4  version 1
 *        8     4  files n
 *       12     4  reserved 0
 *       16    8n  XXH3-64 of each file, in order of layer and head
 *
 * Little-endian. The segment record holds the XXH3-64 of the whole manifest, so one number ties every file to the
 * store. */
#include "context_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

enum { HEAD = 16 };

typedef struct manifest {
    const uint8_t *bytes;
    size_t n;
} manifest;

static bool write_bytes(FILE *file, const void *arg)
{
    const manifest *m = arg;
    return fwrite(m->bytes, 1, m->n, file) == m->n;
}

cairn_status manifest_write(const char *path, const uint64_t *hashes, uint32_t n, uint64_t *out_hash)
{
    size_t bytes = HEAD + (size_t)n * 8;
    uint8_t *text = cairn_calloc(1, bytes);
    if (text == NULL) return cairn_fail(CAIRN_NO_MEMORY, "manifest of %u index files", (unsigned)n);
    memcpy(text, "CRNM", 4);
    cairn_put_le32(text + 4, 1);
    cairn_put_le32(text + 8, n);
    for (uint32_t i = 0; i < n; i++) cairn_put_le64(text + HEAD + (size_t)i * 8, hashes[i]);
    *out_hash = cairn_hash64(text, bytes);
    cairn_status st = cairn_replace_file(path, write_bytes, &(manifest){text, bytes});
    cairn_free(text);
    return st;
}

cairn_status manifest_read(const char *path, uint64_t hash, uint32_t n, uint64_t *hashes)
{
    size_t bytes = HEAD + (size_t)n * 8;
    uint8_t *text = cairn_alloc(bytes + 1);
    cairn_status st = CAIRN_OK;
    if (text == NULL) return cairn_fail(CAIRN_NO_MEMORY, "manifest of %u index files", (unsigned)n);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        st = cairn_fail_errno(errno, "%s", path);
        goto out;
    }
    ssize_t got = read(fd, text, bytes + 1); /* one more, to see that it ends */
    if (got < 0)
        st = cairn_fail_errno(errno, "reading %s", path);
    else if ((size_t)got != bytes || memcmp(text, "CRNM", 4) != 0 || cairn_get_le32(text + 4) != 1 ||
             cairn_get_le32(text + 8) != n)
        st = cairn_fail(CAIRN_CORRUPT, "%s: %zd bytes, expected a manifest of %u files", path, got, (unsigned)n);
    else if (cairn_hash64(text, bytes) != hash)
        st = cairn_fail(CAIRN_CORRUPT, "%s: hash %016llx, expected %016llx", path,
                        (unsigned long long)cairn_hash64(text, bytes), (unsigned long long)hash);
    for (uint32_t i = 0; st == CAIRN_OK && i < n; i++) hashes[i] = cairn_get_le64(text + HEAD + (size_t)i * 8);
out:
    if (fd >= 0) close(fd);
    cairn_free(text);
    return st;
}
