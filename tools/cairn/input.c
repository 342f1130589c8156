/* input.c - see input.h. */
#include "input.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { PIECE_BYTES = 1 << 16 };

typedef struct input_file {
    const char *name; /* for messages */
    int fd;
    uint64_t bytes;
    uint64_t hash;
} input_file;

struct input {
    const cairn_model *model;
    cairn_model_info info;
    input_file *files;
    size_t n;
    uint64_t bytes;
    uint64_t hash;
    /* where the stream stands */
    size_t file;
    bool begun;          /* this file's BOS was given */
    uint64_t at;         /* bytes of this file that were read */
    uint64_t before;     /* bytes of the files before it */
    XXH3_state_t *state; /* of this file, second reading */
    char *piece;         /* the bytes being encoded */
    uint64_t last;       /* how many of them there were */
    size_t piece_cap;
    cairn_token *tokens; /* encoded and not yet handed out: [next, have) */
    size_t tokens_cap, next, have;
};

static int failed_read(cli *c, const input_file *f)
{
    return cli_fail(c, EXIT_FAILED, "cannot read '%s': %s", f->name, strerror(errno));
}

/* Whole pieces, whatever read() likes to give; fewer bytes only at the end. */
static ssize_t read_piece(int fd, char *out, size_t bytes, uint64_t offset)
{
    size_t got = 0;
    while (got < bytes) {
        ssize_t n = pread(fd, out + got, bytes - got, (off_t)(offset + got));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        if (n == 0) break;
        got += (size_t)n;
    }
    return (ssize_t)got;
}

/* A pipe can be read once; its copy in a nameless file can be read again. */
static int spool(cli *c, input_file *f, char *piece)
{
    FILE *copy = tmpfile();
    if (copy == NULL) return cli_fail(c, EXIT_FAILED, "no temporary file for '%s': %s", f->name, strerror(errno));
    int to = dup(fileno(copy));
    fclose(copy);
    if (to < 0) return cli_fail(c, EXIT_FAILED, "no temporary file for '%s': %s", f->name, strerror(errno));
    for (;;) {
        ssize_t n = read(f->fd, piece, PIECE_BYTES);
        if (n < 0 && errno == EINTR && !cli_stopped()) continue;
        if (n < 0) {
            close(to);
            return cli_stopped() ? cli_fail(c, EXIT_FAILED, "interrupted while reading '%s'", f->name)
                                 : failed_read(c, f);
        }
        if (n == 0) break;
        for (ssize_t done = 0; done < n;) {
            ssize_t w = write(to, piece + done, (size_t)(n - done));
            if (w < 0 && errno == EINTR) continue;
            if (w < 0) {
                close(to);
                return cli_fail(c, EXIT_FAILED, "copying '%s' to a temporary file: %s", f->name, strerror(errno));
            }
            done += w;
        }
    }
    if (f->fd != STDIN_FILENO) close(f->fd);
    f->fd = to;
    return -1;
}

static int open_file(cli *c, const char *path, input_file *f, char *piece)
{
    bool is_stdin = strcmp(path, "-") == 0;
    *f = (input_file){.name = is_stdin ? "standard input" : path, .fd = STDIN_FILENO};
    if (!is_stdin && (f->fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
        return cli_fail(c, EXIT_FAILED, "cannot open '%s': %s", path, strerror(errno));
    struct stat st;
    if (fstat(f->fd, &st) != 0) return failed_read(c, f);
    if (S_ISDIR(st.st_mode)) return cli_fail(c, EXIT_FAILED, "'%s' is a directory: --each ingests its files", path);
    if (is_stdin || !S_ISREG(st.st_mode)) {
        int code = spool(c, f, piece);
        if (code >= 0) return code;
    }
    XXH3_state_t *state = XXH3_createState();
    if (state == NULL || XXH3_64bits_reset(state) != XXH_OK) return cli_fail(c, EXIT_FAILED, "out of memory");
    ssize_t n = 0;
    while (!cli_stopped() && (n = read_piece(f->fd, piece, PIECE_BYTES, f->bytes)) > 0) {
        XXH3_64bits_update(state, piece, (size_t)n);
        f->bytes += (uint64_t)n;
    }
    f->hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    if (n < 0) return failed_read(c, f);
    return cli_stopped() ? cli_fail(c, EXIT_FAILED, "interrupted while reading '%s'", f->name) : -1;
}

int input_open(cli *c, const char *const *paths, size_t n, const cairn_model *model, input **out)
{
    *out = NULL;
    input *in = calloc(1, sizeof *in);
    if (in == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    int code = -1;
    in->model = model;
    cairn_model_info_get(model, &in->info);
    in->piece_cap = PIECE_BYTES;
    in->piece = malloc(in->piece_cap);
    in->state = XXH3_createState();
    in->files = calloc(n, sizeof *in->files);
    if (in->piece == NULL || in->state == NULL || in->files == NULL) {
        code = cli_fail(c, EXIT_FAILED, "out of memory");
        goto out;
    }
    for (; in->n < n; in->n++) in->files[in->n].fd = -1;
    for (size_t i = 0; i < n; i++) {
        if ((code = open_file(c, paths[i], &in->files[i], in->piece)) >= 0) goto out;
        in->bytes += in->files[i].bytes;
        uint64_t border[3] = {in->hash, in->files[i].hash, in->files[i].bytes};
        in->hash = n == 1 ? in->files[i].hash : XXH3_64bits(border, sizeof border);
    }
    *out = in;
    in = NULL;
out:
    input_close(in);
    return code;
}

void input_close(input *in)
{
    if (in == NULL) return;
    for (size_t i = 0; in->files != NULL && i < in->n; i++)
        if (in->files[i].fd > STDIN_FILENO) close(in->files[i].fd);
    XXH3_freeState(in->state);
    free(in->files);
    free(in->piece);
    free(in->tokens);
    free(in);
}

uint64_t input_bytes(const input *in)
{
    return in->bytes;
}

uint64_t input_hash(const input *in)
{
    return in->hash;
}

uint64_t input_position(const input *in)
{
    /* Of the last piece, the part whose tokens were handed out. */
    double waiting = in->have == 0 ? 0 : (double)(in->have - in->next) / (double)in->have;
    return in->before + in->at - (uint64_t)(waiting * (double)in->last);
}

/* Reads and encodes the next piece of the current file into in->tokens. *more = false at its end. */
static int refill(cli *c, input *in, bool *more)
{
    const input_file *f = &in->files[in->file];
    uint64_t left = f->bytes - in->at;
    uint64_t want = in->info.byte_tokens && left > PIECE_BYTES ? PIECE_BYTES : left;
    *more = want > 0;
    if (want == 0) return -1;
    if (want > in->piece_cap) {
        char *grown = want > SIZE_MAX / 8 ? NULL : realloc(in->piece, (size_t)want);
        if (grown == NULL) return cli_fail(c, EXIT_FAILED, "out of memory: '%s' is encoded as a whole", f->name);
        in->piece = grown;
        in->piece_cap = (size_t)want;
    }
    ssize_t got = read_piece(f->fd, in->piece, (size_t)want, in->at);
    if (got < 0) return failed_read(c, f);
    if ((uint64_t)got < want) return cli_fail(c, EXIT_FAILED, "'%s' became shorter while it was read", f->name);
    XXH3_64bits_update(in->state, in->piece, (size_t)want);
    in->at += want;
    in->last = want;

    size_t n = 0;
    cairn_status st = cairn_model_encode(in->model, in->piece, (size_t)want, in->tokens, in->tokens_cap, &n);
    if (st == CAIRN_OK && n > in->tokens_cap) {
        free(in->tokens);
        in->tokens = n > SIZE_MAX / sizeof *in->tokens ? NULL : malloc(n * sizeof *in->tokens);
        in->tokens_cap = in->tokens != NULL ? n : 0;
        if (in->tokens == NULL) return cli_fail(c, EXIT_FAILED, "out of memory: %zu tokens", n);
        st = cairn_model_encode(in->model, in->piece, (size_t)want, in->tokens, in->tokens_cap, &n);
    }
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    in->next = 0;
    in->have = n;
    return -1;
}

int input_next(cli *c, input *in, cairn_token *tokens, size_t cap, size_t *out_n)
{
    size_t n = 0;
    while (n < cap && in->file < in->n) {
        if (!in->begun) {
            in->begun = true;
            XXH3_64bits_reset(in->state);
            if (in->info.add_bos && in->info.bos >= 0) {
                tokens[n++] = in->info.bos;
                continue;
            }
        }
        if (in->next < in->have) {
            size_t take = in->have - in->next < cap - n ? in->have - in->next : cap - n;
            memcpy(tokens + n, in->tokens + in->next, take * sizeof *tokens);
            in->next += take;
            n += take;
            continue;
        }
        bool more = false;
        int code = refill(c, in, &more);
        if (code >= 0) return code;
        if (more) continue;
        const input_file *f = &in->files[in->file];
        if (XXH3_64bits_digest(in->state) != f->hash)
            return cli_fail(c, EXIT_FAILED, "'%s' changed while it was read: --replace starts anew", f->name);
        in->before += f->bytes;
        in->file++;
        in->at = 0;
        in->begun = false;
        in->next = in->have = 0;
    }
    *out_n = n;
    return -1;
}
