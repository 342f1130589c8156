/* archive_internal.h - what the export and the import of a context share. The picture of the file is in archive.c. */
#ifndef CAIRN_STORE_ARCHIVE_INTERNAL_H
#define CAIRN_STORE_ARCHIVE_INTERNAL_H

#include "store_internal.h"

enum { ARCHIVE_END_BYTES = 16, ARCHIVE_BATCH_BYTES = 16 << 20 /* read or committed at once */ };

/* The decoded header of an export file and the sizes that follow from it. */
typedef struct archive {
    cairn_geometry geometry;
    cairn_model_id model;
    cairn_context_info info;
    cairn_token tail[4096];
    size_t header_bytes;
    size_t tokens_bytes;
    size_t landmark_bytes;
    size_t tile_bytes;
    size_t tiles; /* of a block */
    size_t block_bytes;
    uint64_t file_bytes;
} archive;

typedef bool (*archive_progress)(void *, uint64_t done, uint64_t total);

/* A file being read. */
typedef struct archive_source {
    const char *path;
    int fd;
    cairn_hasher *hasher; /* over what archive_read has read; may be NULL */
    uint64_t at;
    uint64_t done; /* for progress, of `total` */
    uint64_t total;
    archive_progress progress;
    void *arg;
} archive_source;

/* Opens, and checks the header against the file's size. The caller closes *fd. */
cairn_status archive_open(const char *path, int *fd, archive *out);
void archive_encode_header(const archive *a, uint8_t *out); /* header_bytes */
/* The next `bytes` of the file, all of them or an error. */
cairn_status archive_read(archive_source *s, void *out, size_t bytes);
/* CANCELLED if `progress` says so. */
cairn_status archive_report(archive_progress progress, void *arg, uint64_t done, uint64_t total, const char *what);
/* The i-th tile of a block, by layer and head. */
cairn_tile_id archive_tile(const archive *a, uint64_t segment, uint32_t block, size_t i);

#endif
