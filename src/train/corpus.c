/* corpus.c - files as one stream of bytes, cut into pieces that belong to one split each.
 *
 * A piece's split follows from a hash of its number in the stream, so it depends on the files and their order alone.
 * Files are mapped: a corpus takes no memory of its own, and must not be cut short while it is open. */
#include "train_internal.h"

#include <cairn/train.h>

#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECE = 64 << 10 };

typedef struct corpus_file {
    uint8_t *data;
    size_t bytes;
} corpus_file;

typedef struct run { /* bytes of one file that follow each other in a split */
    const uint8_t *data;
    uint64_t at; /* in the split */
    uint64_t bytes;
} run;

typedef struct corpus_part {
    run *runs;
    size_t n, room;
    uint64_t bytes;
} corpus_part;

struct cairn_corpus {
    corpus_file *files;
    size_t n, room;
    corpus_part splits[2];
};

void cairn_corpus_close(cairn_corpus *corpus)
{
    if (corpus == NULL) return;
    for (size_t i = 0; i < corpus->n; i++) munmap(corpus->files[i].data, corpus->files[i].bytes);
    for (int s = 0; s < 2; s++) cairn_free(corpus->splits[s].runs);
    cairn_free(corpus->files);
    cairn_free(corpus);
}

static cairn_status add_file(cairn_corpus *c, const char *path)
{
    struct stat info;
    cairn_status st = CAIRN_OK;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0) {
        st = cairn_fail_errno(errno, "text '%s'", path);
        goto out;
    }
    if (!S_ISREG(info.st_mode)) {
        st = cairn_fail(CAIRN_INVALID, "text '%s' is no regular file", path);
        goto out;
    }
    if (info.st_size == 0) goto out; /* nothing to learn here */
    if (c->n == c->room) {
        size_t room = c->room == 0 ? 64 : 2 * c->room;
        corpus_file *more = cairn_grow(c->files, c->n * sizeof *more, room, sizeof *more);
        if (more == NULL) {
            st = cairn_fail(CAIRN_NO_MEMORY, "a corpus of %zu files", c->n + 1);
            goto out;
        }
        c->files = more;
        c->room = room;
    }
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        st = cairn_fail_errno(errno, "mapping text '%s' of %lld bytes", path, (long long)info.st_size);
    else
        c->files[c->n++] = (corpus_file){data, (size_t)info.st_size};
out:
    if (fd >= 0) close(fd);
    return st;
}

static int by_name(const FTSENT **a, const FTSENT **b)
{
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

/* All regular files below `path`, or the file it is. Links below a directory are not followed. */
static cairn_status add_path(cairn_corpus *c, const char *path)
{
    char *copy = cairn_strdup(path);
    char *const roots[] = {copy, NULL};
    FTS *walk = copy == NULL ? NULL : fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, by_name);
    cairn_status st = CAIRN_OK;
    if (walk == NULL) st = cairn_fail_errno(copy == NULL ? ENOMEM : errno, "text '%s'", path);
    for (FTSENT *e; st == CAIRN_OK && (e = fts_read(walk)) != NULL;) {
        if (e->fts_info == FTS_F || (e->fts_level == 0 && e->fts_info == FTS_DEFAULT))
            st = add_file(c, e->fts_accpath);
        else if (e->fts_info == FTS_DNR || e->fts_info == FTS_ERR || e->fts_info == FTS_NS)
            st = cairn_fail_errno(e->fts_errno, "text '%s'", e->fts_path);
    }
    if (walk != NULL) fts_close(walk);
    cairn_free(copy);
    return st;
}

static cairn_status add_run(corpus_part *s, const uint8_t *data, uint64_t bytes)
{
    run *last = s->n == 0 ? NULL : &s->runs[s->n - 1];
    if (last != NULL && last->data + last->bytes == data) {
        last->bytes += bytes;
    } else {
        if (s->n == s->room) {
            size_t room = s->room == 0 ? 64 : 2 * s->room;
            run *more = cairn_grow(s->runs, s->n * sizeof *more, room, sizeof *more);
            if (more == NULL) return cairn_fail(CAIRN_NO_MEMORY, "a corpus of %zu pieces", s->n + 1);
            s->runs = more;
            s->room = room;
        }
        s->runs[s->n++] = (run){data, s->bytes, bytes};
    }
    s->bytes += bytes;
    return CAIRN_OK;
}

static cairn_status cut(cairn_corpus *c, double held_out)
{
    uint64_t at = 0; /* in the stream */
    for (size_t f = 0; f < c->n; f++) {
        for (uint64_t done = 0; done < c->files[f].bytes;) {
            uint8_t number[8];
            cairn_put_le64(number, at / PIECE);
            uint64_t n = PIECE - at % PIECE;
            if (n > c->files[f].bytes - done) n = c->files[f].bytes - done;
            bool held = ldexp((double)(cairn_hash64(number, sizeof number) >> 11), -53) < held_out;
            cairn_status st =
                add_run(&c->splits[held ? CAIRN_SPLIT_HELD_OUT : CAIRN_SPLIT_TRAIN], c->files[f].data + done, n);
            if (st != CAIRN_OK) return st;
            done += n;
            at += n;
        }
    }
    return CAIRN_OK;
}

cairn_status cairn_corpus_open(const char *const *paths, size_t n, double held_out, cairn_corpus **out)
{
    *out = NULL;
    if (!(held_out >= 0 && held_out <= 1))
        return cairn_fail(CAIRN_INVALID, "share of the corpus to hold out is %g, must be 0..1", held_out);
    cairn_corpus *c = cairn_calloc(1, sizeof *c);
    cairn_status st = c == NULL ? cairn_fail(CAIRN_NO_MEMORY, "a corpus") : CAIRN_OK;
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) st = add_path(c, paths[i]);
    if (st == CAIRN_OK) st = cut(c, held_out);
    if (st == CAIRN_OK) {
        uint64_t train = c->splits[CAIRN_SPLIT_TRAIN].bytes, held = c->splits[CAIRN_SPLIT_HELD_OUT].bytes;
        if (train + held == 0)
            st = cairn_fail(CAIRN_INVALID, "the corpus is empty: no byte in %zu paths, the first being '%s'", n,
                            n > 0 ? paths[0] : "");
        else if ((train == 0 && held_out < 1) || (held == 0 && held_out > 0))
            st = cairn_fail(CAIRN_INVALID,
                            "the corpus of %llu bytes leaves nothing for the %s split: pieces of %d bytes, of which "
                            "%.3g are held out",
                            (unsigned long long)(train + held), train == 0 ? "training" : "held-out", PIECE, held_out);
    }
    if (st != CAIRN_OK) {
        cairn_corpus_close(c);
        return st;
    }
    *out = c;
    return CAIRN_OK;
}

uint64_t cairn_corpus_bytes(const cairn_corpus *corpus, cairn_split split)
{
    return corpus->splits[split].bytes;
}
size_t cairn_corpus_files(const cairn_corpus *corpus)
{
    return corpus->n;
}

static size_t run_of(const corpus_part *s, uint64_t at)
{
    size_t low = 0, high = s->n; /* the run is in [low, high) */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        *(s->runs[middle].at <= at ? &low : &high) = middle;
    }
    return low;
}

cairn_status cairn_corpus_read(const cairn_corpus *corpus, cairn_split which, uint64_t at, size_t bytes, void *out)
{
    const corpus_part *s = &corpus->splits[which];
    uint8_t *to = out;
    if (bytes == 0) return CAIRN_OK;
    if (s->bytes == 0)
        return cairn_fail(CAIRN_INVALID, "the corpus has no %s bytes",
                          which == CAIRN_SPLIT_TRAIN ? "training" : "held-out");
    at %= s->bytes;
    for (size_t r = run_of(s, at); bytes > 0; r = r + 1 < s->n ? r + 1 : 0) {
        const uint64_t skip = at - s->runs[r].at;
        const size_t n = bytes < s->runs[r].bytes - skip ? bytes : (size_t)(s->runs[r].bytes - skip);
        memcpy(to, s->runs[r].data + skip, n);
        to += n;
        bytes -= n;
        at = r + 1 < s->n ? s->runs[r + 1].at : 0;
    }
    return CAIRN_OK;
}
