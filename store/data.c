/* data.c - one data directory: its LMDB environment, made, opened with all the checks, closed, removed. */
#include "pages.h"
#include "store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { LOCK_FILE_BYTES = 72 * 1024, SHORT_WRITE_BYTES = 1 << 20, WALK_PAGES_MAX = 4096 };
#define MAP_BYTES_MIN (UINT64_C(1) << 20)

cairn_status store_join(char out[STORE_PATH_MAX], const char *dir, const char *name)
{
    size_t a = strlen(dir), b = strlen(name);
    if (a + 1 + b >= STORE_PATH_MAX)
        return cairn_fail(CAIRN_INVALID, "%.200s...: the path is longer than %d bytes", dir, STORE_PATH_MAX - 1);
    memcpy(out, dir, a);
    out[a] = '/';
    memcpy(out + a + 1, name, b + 1);
    return CAIRN_OK;
}

cairn_status store_sync_dir(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return cairn_fail_errno(errno, "%s: opening the directory", path);
    int err = fsync(fd) != 0 ? errno : 0;
    close(fd);
    return err != 0 ? cairn_fail_errno(err, "%s: syncing the directory", path) : CAIRN_OK;
}

/* ---- the pointer file ---- */

cairn_status store_current_read(const char *store_path, uint32_t *number)
{
    char path[STORE_PATH_MAX], text[32];
    cairn_status status = store_join(path, store_path, "current");
    if (status != CAIRN_OK) return status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT) return CAIRN_NOT_FOUND;
    if (fd < 0) return cairn_fail_errno(errno, "%s", path);
    ssize_t n = read(fd, text, sizeof text - 1);
    int err = errno;
    close(fd);
    if (n < 0) return cairn_fail_errno(err, "%s", path);
    text[n] = '\0';
    /* exactly "data-<n>\n", n = 1 .. 999999999 without leading zeros */
    char again[32];
    unsigned long value = strncmp(text, "data-", 5) == 0 ? strtoul(text + 5, NULL, 10) : 0;
    snprintf(again, sizeof again, "data-%lu\n", value);
    if (value == 0 || value > 999999999 || strlen(text) != (size_t)n || strcmp(text, again) != 0)
        return cairn_fail(CAIRN_CORRUPT, "%s: does not name a data directory (%zd bytes)", path, n);
    *number = (uint32_t)value;
    return CAIRN_OK;
}

cairn_status store_current_write(const char *store_path, uint32_t number)
{
    char path[STORE_PATH_MAX], beside[STORE_PATH_MAX], text[32];
    cairn_status status = store_join(path, store_path, "current");
    if (status == CAIRN_OK) status = store_join(beside, store_path, "current.new");
    if (status != CAIRN_OK) return status;
    int n = snprintf(text, sizeof text, "data-%u\n", number);
    if (unlink(beside) != 0 && errno != ENOENT) return cairn_fail_errno(errno, "%s", beside);
    int fd = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return cairn_fail_errno(errno, "%s", beside);
    ssize_t wrote = write(fd, text, (size_t)n);
    int err = wrote < 0 ? errno : wrote != n ? ENOSPC : fchmod(fd, 0600) != 0 || fsync(fd) != 0 ? errno : 0;
    close(fd);
    if (err == 0 && rename(beside, path) != 0) err = errno;
    if (err != 0) {
        unlink(beside);
        return cairn_fail_errno(err, "%s", path);
    }
    return store_sync_dir(store_path);
}

/* ---- what LMDB's codes mean ---- */

static uint64_t file_bytes_of(const store_data *data)
{
    struct stat st;
    return data->fd >= 0 && fstat(data->fd, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* LMDB turns a short write into EIO; nearly always it means there is no room left. */
static int why_short(const store_data *data)
{
    struct statvfs fs;
    struct rlimit limit;
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
        file_bytes_of(data) + SHORT_WRITE_BYTES > limit.rlim_cur)
        return EFBIG;
    if (fstatvfs(data->fd, &fs) == 0 && (uint64_t)fs.f_bavail * fs.f_frsize < SHORT_WRITE_BYTES) return ENOSPC;
    return EIO;
}

/* LMDB could not write a head and refuses everything since. */
static cairn_status panic(const store_data *data, const char *what)
{
    int rc = atomic_load(&data->commit_error);
    if (rc == EIO) rc = why_short(data);
    return cairn_fail(rc == ENOSPC || rc == EDQUOT || rc == EFBIG ? CAIRN_FULL : CAIRN_IO,
                      "%s: %s: an earlier write failed for good%s%s; close the store and open it again", data->path,
                      what, rc > 0 ? ": " : "", rc > 0 ? mdb_strerror(rc) : "");
}

cairn_status store_lmdb_fail(const store_data *data, int rc, const char *format, ...)
{
    if (rc == MDB_NOTFOUND) return CAIRN_NOT_FOUND;
    char what[512];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    unsigned long long file = file_bytes_of(data), map = data->map_bytes;
    if (rc == EIO) rc = why_short(data);
    switch (rc) {
    case MDB_MAP_FULL:
        return cairn_fail(CAIRN_FULL,
                          "%s: %s: the map of %llu bytes is full (the file has %llu); open with more map_bytes",
                          data->path, what, map, file);
    case ENOSPC:
        return cairn_fail(CAIRN_FULL, "%s: %s: no space left on the device (the file has %llu bytes)", data->path, what,
                          file);
    case EDQUOT:
        return cairn_fail(CAIRN_FULL, "%s: %s: the disk quota is used up (the file has %llu bytes)", data->path, what,
                          file);
    case EFBIG:
        return cairn_fail(CAIRN_FULL, "%s: %s: the limit on a file's size is reached (the file has %llu bytes)",
                          data->path, what, file);
    case EAGAIN:
        return cairn_fail(CAIRN_BUSY,
                          "%s: %s: the file is commits ahead of its lock file; was one of the two replaced? End all "
                          "processes that use the store, and open it again",
                          data->path, what);
    case MDB_TXN_FULL:
        return cairn_fail(CAIRN_INVALID,
                          "%s: %s: more than one transaction can hold (131071 changed pages or values); "
                          "commit fewer blocks at a time",
                          data->path, what);
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
        return cairn_fail(CAIRN_CORRUPT, "%s: %s: LMDB found a damaged page (%s); the file has %llu bytes; run verify",
                          data->path, what, mdb_strerror(rc), file);
    case MDB_VERSION_MISMATCH:
        return cairn_fail(CAIRN_UNSUPPORTED, "%s: %s: written or locked by another version of LMDB", data->path, what);
    case MDB_READERS_FULL:
        return cairn_fail(CAIRN_BUSY, "%s: %s: all %d reader slots are in use", data->path, what, STORE_READERS_MAX);
    case MDB_PANIC: return panic(data, what);
    case ENOMEM:
        return cairn_fail(CAIRN_NO_MEMORY, "%s: %s: out of memory or addresses (map %llu bytes)", data->path, what,
                          map);
    default: break;
    }
    if (rc < 0 || rc == EINVAL) return cairn_fail(CAIRN_IO, "%s: %s: %s", data->path, what, mdb_strerror(rc));
    cairn_status status = cairn_fail_errno(rc, "%s: %s", data->path, what);
    return status == CAIRN_NOT_FOUND ? CAIRN_IO : status;
}

/* ---- SIGXFSZ ----
 *
 * A file that reaches RLIMIT_FSIZE raises SIGXFSZ, which ends the process unless someone cares. A library must turn
 * that into FULL: the signal goes to the thread that wrote, so blocking it there makes the write return EFBIG, and the
 * pending signal is eaten before the mask is put back. */

static _Thread_local struct {
    sigset_t old;
    bool pending;
    unsigned depth; /* they may nest */
} held;

void store_hold_xfsz(void)
{
    sigset_t xfsz, pending;
    if (held.depth++ > 0) return;
    sigemptyset(&xfsz);
    sigaddset(&xfsz, SIGXFSZ);
    sigpending(&pending);
    held.pending = sigismember(&pending, SIGXFSZ) == 1;
    pthread_sigmask(SIG_BLOCK, &xfsz, &held.old);
}

void store_release_xfsz(void)
{
    sigset_t xfsz, pending;
    assert(held.depth > 0);
    if (--held.depth > 0) return;
    sigpending(&pending);
    if (!held.pending && sigismember(&pending, SIGXFSZ) == 1) {
        sigemptyset(&xfsz);
        sigaddset(&xfsz, SIGXFSZ);
        const struct timespec now = {0, 0};
        while (sigtimedwait(&xfsz, NULL, &now) < 0 && errno == EINTR) {}
    }
    pthread_sigmask(SIG_SETMASK, &held.old, NULL);
}

/* ---- opening the environment ---- */

/* A file with mode 0600 whatever the umask, and with `bytes` of blocks allocated. */
static cairn_status prepare_file(const char *dir, const char *name, off_t bytes)
{
    char path[STORE_PATH_MAX];
    cairn_status status = store_join(path, dir, name);
    if (status != CAIRN_OK) return status;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (fd < 0) return cairn_fail_errno(errno, "%s", path);
    int err = bytes > 0 && fallocate(fd, 0, 0, bytes) != 0 ? errno : 0;
    if (err == EOPNOTSUPP || err == ENOSYS) err = 0;
    if (fchmod(fd, 0600) != 0 && err == 0 && errno != EPERM) err = errno;
    close(fd);
    return err != 0 ? cairn_fail_errno(err, "%s: %lld bytes", path, (long long)bytes) : CAIRN_OK;
}

/* The lock file's pages are written through a map, where a full disk is a signal: so its blocks are allocated before
 * LMDB maps it. LMDB takes a larger file as room for more readers. Opened and closed before LMDB locks it, since
 * closing any descriptor of a file drops a process's locks on it. */
static cairn_status prepare_lock_file(const char *dir)
{
    char path[STORE_PATH_MAX];
    struct stat st;
    cairn_status status = store_join(path, dir, "lock.mdb");
    if (status != CAIRN_OK) return status;
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_size >= LOCK_FILE_BYTES &&
        st.st_blocks * 512 >= LOCK_FILE_BYTES)
        return CAIRN_OK;
    return prepare_file(dir, "lock.mdb", LOCK_FILE_BYTES);
}

/* Reserves addresses: as many as asked for, else fewer, but never fewer than the file needs. Valgrind says EINVAL where
 * a kernel says ENOMEM. */
static cairn_status open_env(store_data *data, uint64_t map_bytes, uint64_t file_bytes, unsigned flags)
{
    uint64_t least = file_bytes + file_bytes / 4 > MAP_BYTES_MIN ? file_bytes + file_bytes / 4 : MAP_BYTES_MIN;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t bytes = map_bytes;; bytes = bytes / 2 > least ? bytes / 2 : least) {
        bytes = bytes / page * page;
        data->map_bytes = bytes;
        int rc = mdb_env_create(&data->env);
        if (rc != 0) return store_lmdb_fail(data, rc, "making an environment");
        if ((rc = mdb_env_set_maxdbs(data->env, DB_COUNT)) == 0 &&
            (rc = mdb_env_set_maxreaders(data->env, STORE_READERS_MAX)) == 0 &&
            (rc = mdb_env_set_mapsize(data->env, bytes)) == 0)
            rc = mdb_env_open(data->env, data->path, flags, 0600);
        MDB_envinfo info;
        if (rc == 0 && (rc = mdb_env_info(data->env, &info)) == 0) {
            data->map_bytes = info.me_mapsize; /* never less than the file needs */
            return CAIRN_OK;
        }
        mdb_env_close(data->env);
        data->env = NULL;
        if ((rc != ENOMEM && rc != EINVAL) || bytes <= least) return store_lmdb_fail(data, rc, "opening");
    }
}

/* Where page 0 is mapped. LMDB does not say (me_mapaddr is NULL without a fixed map), but any value's address lies
 * inside the map, and the kernel knows which mapping that is. Where /proc is missing, the small value's own page tells:
 * its header starts with its number. */
static cairn_status find_base(store_data *data, const void *value)
{
    uintptr_t at = (uintptr_t)value, base = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (maps != NULL) {
        char *line = NULL;
        size_t cap = 0;
        while (base == 0 && getline(&line, &cap, maps) > 0) {
            unsigned long start, end, offset;
            if (sscanf(line, "%lx-%lx %*s %lx", &start, &end, &offset) == 3 && at >= start && at < end)
                base = start - offset;
        }
        free(line);
        fclose(maps);
    }
    if (base == 0 && data->page_bytes <= (uint64_t)sysconf(_SC_PAGESIZE)) {
        uintptr_t page = at & ~((uintptr_t)data->page_bytes - 1);
        base = page - cairn_get_le64((const void *)page) * data->page_bytes;
    }
    if (base == 0 || at - base >= data->map_bytes)
        return cairn_fail(CAIRN_UNSUPPORTED, "%s: the place of LMDB's map cannot be found", data->path);
    data->base = (const uint8_t *)base;
    return CAIRN_OK;
}

cairn_status store_data_map_changed(store_data *data, MDB_txn *txn)
{
    MDB_envinfo info;
    MDB_val key = {5, (void *)"store"}, value;
    mdb_env_info(data->env, &info);
    data->map_bytes = info.me_mapsize;
    int rc = mdb_get(txn, data->dbi[DB_META], &key, &value);
    if (rc != 0) return store_lmdb_fail(data, rc, "reading the store record");
    return find_base(data, value.mv_data);
}

bool store_file_offset(const cairn_store *store, cairn_span record, uint64_t *page_offset, size_t *pages_bytes)
{
    const store_data *data = &store->env->data;
    uint64_t at = (uint64_t)((uintptr_t)record.data - (uintptr_t)data->base);
    if ((uintptr_t)record.data < (uintptr_t)data->base || at >= data->map_bytes || record.bytes > data->map_bytes - at)
        return false;
    uint64_t page = data->page_bytes;
    uint64_t first = at / page * page;
    *page_offset = first;
    *pages_bytes = (size_t)((at + record.bytes + page - 1) / page * page - first);
    return true;
}

/* ---- the checks at open ---- */

typedef struct trees {
    page_tree of[DB_COUNT];
    bool found[DB_COUNT];
} trees;

static bool collect_tree(void *arg, cairn_span key, const page_value *value)
{
    trees *t = arg;
    for (int db = 0; db < DB_COUNT; db++)
        if (value->subtree && strlen(store_db_names[db]) == key.bytes &&
            memcmp(store_db_names[db], key.data, key.bytes) == 0) {
            t->of[db] = page_tree_parse(value->data);
            t->found[db] = true;
        }
    return true;
}

cairn_status store_trees(page_file *file, page_tree *out, void (*damage)(void *, const char *), void *arg)
{
    trees t = {0};
    const page_visitor visitor = {.arg = &t, .record = collect_tree};
    cairn_status status = page_walk(file, "main", &file->main_tree, PAGE_WALK_ALL, &visitor);
    if (status != CAIRN_OK && damage != NULL) damage(arg, cairn_last_error());
    if (status == CAIRN_OK && file->main_tree.flags != 0)
        status = cairn_fail(CAIRN_CORRUPT, "%s: the main tree has flags %04x", file->path, file->main_tree.flags);
    for (int db = 0; db < DB_COUNT && status == CAIRN_OK; db++) {
        if (!t.found[db])
            status = cairn_fail(CAIRN_CORRUPT, "%s: there is no '%s' database in it", file->path, store_db_names[db]);
        else if (t.of[db].flags != 0)
            status = cairn_fail(CAIRN_CORRUPT, "%s: the '%s' database has flags %04x", file->path, store_db_names[db],
                                t.of[db].flags);
        if (status != CAIRN_OK && damage != NULL) damage(arg, cairn_last_error());
    }
    memcpy(out, t.of, sizeof t.of);
    return status;
}

/* Every page the trees reach must lie inside the file. All of them are walked, and the free list must name none of
 * them: a flipped bit in a pointer leads to what somebody else uses, or to a page that was this one's before a change
 * and is free now, where every record has the right hash and is the wrong one. Where the trees are large (16 MiB of
 * leaves: half a million tokens of the demo model) the ones of tokens, landmarks and tiles are walked only to their
 * ends, unless the file ends before its last page: LMDB trims nothing, but that is legal when the last pages are free.
 */
static cairn_status check_pages(page_file *file)
{
    page_tree of[DB_COUNT];
    const page_visitor nobody = {0};
    uint64_t needed = (file->last_page + 1) * file->page_bytes;
    bool is_short = file->file_bytes < needed;
    cairn_status status = page_file_keep_used(file);
    if (status == CAIRN_OK) status = store_trees(file, of, NULL, NULL);
    uint64_t leaves = file->free_tree.leaf_pages + file->free_tree.overflow_pages;
    for (int db = 0; db < DB_COUNT && status == CAIRN_OK; db++) leaves += of[db].leaf_pages;
    bool whole = is_short || leaves <= WALK_PAGES_MAX;
    for (int db = 0; db < DB_COUNT && status == CAIRN_OK; db++) {
        bool large = db == DB_TOKENS || db == DB_LANDMARK || db == DB_TILE;
        status = page_walk(file, store_db_names[db], &of[db], large && !whole ? PAGE_WALK_END : PAGE_WALK_ALL, &nobody);
    }
    if (status == CAIRN_OK && whole) status = page_walk_free(file, NULL, NULL);
    cairn_free(file->used);
    file->used = NULL;
    if (status == CAIRN_CORRUPT && is_short)
        return cairn_fail_within(status, "truncated: %llu bytes where the last page ends at %llu",
                                 (unsigned long long)file->file_bytes, (unsigned long long)needed);
    return status;
}

static cairn_status check_and_open_databases(store_data *data, page_file *file, store_identity *identity)
{
    cairn_status status = CAIRN_BUSY;
    MDB_txn *txn = NULL;
    int dead = 0, rc = 0;
    if (!data->read_only) mdb_reader_check(data->env, &dead); /* slots of dead readers keep pages from reuse */
    for (int tries = 0; tries < 3 && status == CAIRN_BUSY; tries++) {
        mdb_txn_abort(txn);
        txn = NULL;
        rc = mdb_txn_begin(data->env, NULL, MDB_RDONLY, &txn);
        if (rc == MDB_READERS_FULL && mdb_reader_check(data->env, &dead) == 0 && dead > 0)
            rc = mdb_txn_begin(data->env, NULL, MDB_RDONLY, &txn);
        if (rc != 0) return store_lmdb_fail(data, rc, "reading");
        status = page_file_at(file, mdb_txn_id(txn));
    }
    if (status != CAIRN_OK || (status = check_pages(file)) != CAIRN_OK) goto out;

    for (int db = 0; db < DB_COUNT; db++)
        if ((rc = mdb_dbi_open(txn, store_db_names[db], 0, &data->dbi[db])) != 0) {
            status = store_lmdb_fail(data, rc, "opening database '%s'", store_db_names[db]);
            if (status == CAIRN_NOT_FOUND)
                status = cairn_fail(CAIRN_CORRUPT, "%s: there is no '%s' database", data->path, store_db_names[db]);
            goto out;
        }
    MDB_val key = {5, (void *)"store"}, value;
    if ((rc = mdb_get(txn, data->dbi[DB_META], &key, &value)) != 0) {
        status = rc == MDB_NOTFOUND ? cairn_fail(CAIRN_CORRUPT, "%s: the store record is missing", data->path)
                                    : store_lmdb_fail(data, rc, "reading the store record");
        goto out;
    }
    status = store_identity_decode((cairn_span){value.mv_data, value.mv_size}, identity);
    if (status != CAIRN_OK) {
        cairn_fail_within(status, "%s", data->path);
        goto out;
    }
    if ((status = find_base(data, value.mv_data)) != CAIRN_OK) goto out;
    rc = mdb_txn_commit(txn); /* keeps the database handles */
    txn = NULL;
    if (rc != 0) status = store_lmdb_fail(data, rc, "reading");
out:
    mdb_txn_abort(txn);
    return status;
}

static cairn_status data_path(const char *store_path, uint32_t number, char out[STORE_PATH_MAX])
{
    char name[32];
    snprintf(name, sizeof name, "data-%u", number);
    return store_join(out, store_path, name);
}

cairn_status store_data_open(const char *store_path, uint32_t number, uint64_t map_bytes, bool read_only, bool no_sync,
                             store_data *out, store_identity *identity)
{
    char file_path[STORE_PATH_MAX];
    struct statvfs fs;
    struct stat st;
    page_file file = {0};
    *out = (store_data){.fd = -1, .number = number, .read_only = read_only};
    cairn_status status = data_path(store_path, number, out->path);
    if (status == CAIRN_OK) status = store_join(file_path, out->path, "data.mdb");
    if (status != CAIRN_OK) goto out;
    if (lstat(out->path, &st) == 0 && !S_ISDIR(st.st_mode)) { /* a link could lead anywhere */
        status = cairn_fail(CAIRN_CORRUPT, "%s: is not a directory", out->path);
        goto out;
    }
    if (lstat(file_path, &st) == 0 && !S_ISREG(st.st_mode)) {
        status = cairn_fail(CAIRN_CORRUPT, "%s: is not a file", file_path);
        goto out;
    }
    out->fd = open(file_path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (out->fd < 0) {
        status = errno == ENOENT ? cairn_fail(CAIRN_CORRUPT, "%s: the data file is missing", file_path)
                                 : cairn_fail_errno(errno, "%s", file_path);
        goto out;
    }
    if ((status = page_file_peek(out->fd, file_path, &file)) != CAIRN_OK) goto out;
    out->page_bytes = file.page_bytes;

    unsigned flags = MDB_NORDAHEAD | MDB_NOTLS;
    if (read_only) flags |= MDB_RDONLY;
    if (no_sync) flags |= MDB_NOSYNC;
    bool frozen = statvfs(out->path, &fs) == 0 && (fs.f_flag & ST_RDONLY) != 0;
    if (frozen && !read_only) {
        status = cairn_fail(CAIRN_IO, "%s: the file system is read-only; open the store read-only", out->path);
        goto out;
    }
    if (frozen)
        flags |= MDB_NOLOCK; /* nobody can write, so no reader needs a slot */
    else if ((status = prepare_lock_file(out->path)) != CAIRN_OK)
        goto out;
    if ((status = open_env(out, map_bytes, file.file_bytes, flags)) != CAIRN_OK) goto out;
    status = check_and_open_databases(out, &file, identity);
out:
    if (status != CAIRN_OK) store_data_close(out);
    return status;
}

void store_data_close(store_data *data)
{
    if (data->env != NULL) mdb_env_close(data->env);
    if (data->path[0] != '\0' && data->fd >= 0) close(data->fd); /* a zeroed one has neither */
    *data = (store_data){.fd = -1};
}

/* ---- making and removing ---- */

static cairn_status write_empty(store_data *data, const store_identity *identity)
{
    uint8_t record[IDENTITY_RECORD_BYTES], ids[IDS_RECORD_BYTES];
    MDB_txn *txn = NULL;
    int rc = mdb_txn_begin(data->env, NULL, 0, &txn);
    for (int db = 0; db < DB_COUNT && rc == 0; db++)
        rc = mdb_dbi_open(txn, store_db_names[db], MDB_CREATE, &data->dbi[db]);
    store_identity_encode(identity, record);
    store_ids_encode(1, 1, ids);
    MDB_val store_key = {5, (void *)"store"}, store_value = {sizeof record, record};
    MDB_val ids_key = {3, (void *)"ids"}, ids_value = {sizeof ids, ids};
    if (rc == 0) rc = mdb_put(txn, data->dbi[DB_META], &store_key, &store_value, 0);
    if (rc == 0) rc = mdb_put(txn, data->dbi[DB_META], &ids_key, &ids_value, 0);
    if (rc == 0) {
        rc = mdb_txn_commit(txn);
        txn = NULL;
    }
    mdb_txn_abort(txn);
    if (rc == 0) rc = mdb_env_sync(data->env, 1);
    return rc == 0 ? CAIRN_OK : store_lmdb_fail(data, rc, "making an empty store");
}

cairn_status store_data_create(const char *store_path, uint32_t number, const store_identity *identity,
                               uint64_t map_bytes, bool no_sync, store_data *out)
{
    store_data data = {.fd = -1, .number = number};
    store_identity again;
    cairn_status status = data_path(store_path, number, data.path);
    *out = (store_data){.fd = -1};
    if (status != CAIRN_OK) return status;
    if (mkdir(data.path, 0700) != 0)
        return errno == EEXIST ? cairn_fail(CAIRN_EXISTS, "%s: is there already", data.path)
                               : cairn_fail_errno(errno, "%s", data.path);
    store_hold_xfsz();
    if (chmod(data.path, 0700) != 0) status = cairn_fail_errno(errno, "%s", data.path);
    if (status == CAIRN_OK) status = prepare_lock_file(data.path);
    if (status == CAIRN_OK) status = prepare_file(data.path, "data.mdb", 0); /* LMDB fills an empty one */
    if (status == CAIRN_OK) status = open_env(&data, map_bytes, 0, MDB_NORDAHEAD | MDB_NOTLS);
    if (status == CAIRN_OK) status = write_empty(&data, identity);
    if (status == CAIRN_OK) status = store_sync_dir(data.path);
    store_data_close(&data);
    store_release_xfsz();
    if (status == CAIRN_OK) status = store_sync_dir(store_path);
    if (status == CAIRN_OK) status = store_data_open(store_path, number, map_bytes, false, no_sync, out, &again);
    return status;
}

cairn_status store_data_remove(const char *store_path, uint32_t number)
{
    char path[STORE_PATH_MAX], file[STORE_PATH_MAX];
    cairn_status status = data_path(store_path, number, path);
    if (status != CAIRN_OK) return status;
    struct stat st;
    if (lstat(path, &st) == 0 && !S_ISDIR(st.st_mode)) /* what a link points at is not ours */
        return unlink(path) == 0 ? CAIRN_OK : cairn_fail_errno(errno, "%s", path);
    static const char *const names[] = {"data.mdb", "lock.mdb"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if ((status = store_join(file, path, names[i])) != CAIRN_OK) return status;
        if (unlink(file) != 0 && errno != ENOENT) return cairn_fail_errno(errno, "%s", file);
    }
    if (rmdir(path) != 0 && errno != ENOENT) return cairn_fail_errno(errno, "%s", path);
    return CAIRN_OK;
}
