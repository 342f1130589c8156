/* env.c - the door every LMDB transaction of the room goes through, the switch to another data directory, and stat. */
#include "store_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- transactions ---- */

/* Counts a transaction in before it begins, so that the map is never moved under one. */
static cairn_status enter(store_env *env)
{
    if (env->pid != getpid())
        return cairn_fail(CAIRN_INVALID, "%s: opened by process %d before a fork; open it again in this one (%d)",
                          env->path, (int)env->pid, (int)getpid());
    pthread_mutex_lock(&env->mutex);
    bool barred = env->exclusive && !pthread_equal(env->exclusive_thread, pthread_self());
    if (!barred) env->live++;
    pthread_mutex_unlock(&env->mutex);
    return barred ? cairn_fail(CAIRN_BUSY, "%s: this process (%d) is compacting it", env->path, (int)getpid())
                  : CAIRN_OK;
}

static void leave(store_env *env)
{
    pthread_mutex_lock(&env->mutex);
    env->live--;
    pthread_mutex_unlock(&env->mutex);
}

/* Another process reserved more and wrote beyond what we mapped: map anew, which takes that nobody here reads. LMDB
 * leaves a failed attempt without any map, so smaller ones follow, down to what the file needs. */
static cairn_status widen(store_env *env)
{
    store_data *data = &env->data;
    MDB_txn *txn = NULL;
    pthread_mutex_lock(&env->mutex);
    cairn_status status = CAIRN_OK;
    if (env->live > 0) {
        status = cairn_fail(CAIRN_BUSY,
                            "%s: another process grew it beyond the %llu bytes mapped here; end this process's "
                            "%zu transactions, or open it with more map_bytes",
                            env->path, (unsigned long long)data->map_bytes, env->live);
        goto out;
    }
    struct stat st;
    uint64_t least = fstat(data->fd, &st) == 0 ? (uint64_t)st.st_size + (uint64_t)st.st_size / 4 : 0;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), bytes = 2 * STORE_MAP_BYTES;
    int rc;
    do {
        bytes = bytes / 2 > least ? bytes / 2 : least;
        rc = mdb_env_set_mapsize(data->env, bytes / page * page); /* rounds up to what the file needs */
    } while (rc == ENOMEM && bytes > least);
    if (rc == 0) rc = mdb_txn_begin(data->env, NULL, MDB_RDONLY, &txn);
    status = rc != 0 ? store_lmdb_fail(data, rc, "widening the map") : store_data_map_changed(data, txn);
    mdb_txn_abort(txn);
out:
    pthread_mutex_unlock(&env->mutex);
    return status;
}

/* LMDB enters a reader at commit N, then copies the roots of N from one of two places that commits use in turn. A
 * process put aside between the two finds N + 2 there, before that one is announced, and its next view is N + 1: back
 * in time. (Seen with LMDB 0.9.24 alone, 10 times in 64 million views on two crowded cores.) While N + 2 is not in the
 * file, what was copied was N. EAGAIN if it always is: the lock file is not this file's. */
static int as_entered(MDB_env *env, MDB_txn *txn)
{
    MDB_envinfo now;
    for (int tries = 0; tries < 1000; tries++) {
        int rc = mdb_env_info(env, &now);
        if (rc != 0 || now.me_last_txnid <= mdb_txn_id(txn) + 1) return rc;
        mdb_txn_reset(txn);
        if ((rc = mdb_txn_renew(txn)) != 0) return rc;
    }
    return EAGAIN;
}

static int begin_lmdb(MDB_env *env, unsigned flags, MDB_txn **out)
{
    int rc = mdb_txn_begin(env, NULL, flags, out);
    if (rc == 0 && (flags & MDB_RDONLY) != 0 && (rc = as_entered(env, *out)) != 0) mdb_txn_abort(*out);
    return rc;
}

static cairn_status begin(store_env *env, unsigned flags, const char *what, MDB_txn **out)
{
    store_data *data = &env->data;
    for (int tries = 0;; tries++) {
        cairn_status status = enter(env);
        if (status != CAIRN_OK) return status;
        int rc = begin_lmdb(data->env, flags, out), dead = 0;
        if (rc == MDB_READERS_FULL && mdb_reader_check(data->env, &dead) == 0 && dead > 0)
            rc = begin_lmdb(data->env, flags, out);
        if (rc == 0) return CAIRN_OK;
        *out = NULL;
        leave(env);
        if (rc != MDB_MAP_RESIZED || tries == 3) return store_lmdb_fail(data, rc, "%s", what);
        if ((status = widen(env)) != CAIRN_OK) return status;
    }
}

cairn_status store_read_begin(cairn_store *store, MDB_txn **out)
{
    return begin(store->env, MDB_RDONLY, "reading", out);
}

cairn_status store_read_renew(cairn_store *store, MDB_txn **txn)
{
    mdb_txn_reset(*txn);
    int rc = mdb_txn_renew(*txn);
    if (rc == 0 && (rc = as_entered(store->env->data.env, *txn)) == 0) return CAIRN_OK;
    store_read_end(store, *txn);
    *txn = NULL;
    return rc == MDB_MAP_RESIZED ? store_read_begin(store, txn) : store_lmdb_fail(&store->env->data, rc, "reading");
}

void store_read_end(cairn_store *store, MDB_txn *txn)
{
    if (txn == NULL || store->env->pid != getpid()) return;
    mdb_txn_abort(txn);
    leave(store->env);
}

cairn_status store_write_begin(cairn_store *store, const char *what, MDB_txn **out)
{
    *out = NULL;
    if (store->read_only)
        return cairn_fail(CAIRN_INVALID, "%s: %s: the store was opened read-only", store->env->path, what);
    cairn_status status = begin(store->env, 0, what, out);
    if (status != CAIRN_OK) return status;
    int gone = 0; /* a killed reader would keep freed pages from reuse: for as long as one ingest goes on */
    mdb_reader_check(store->env->data.env, &gone);
    store_hold_xfsz();
    return CAIRN_OK;
}

cairn_status store_write_commit(cairn_store *store, const char *what, MDB_txn **txn)
{
    int rc = mdb_txn_commit(*txn); /* aborts when it fails */
    *txn = NULL;
    store_release_xfsz();
    if (rc > 0) atomic_store(&store->env->data.commit_error, rc);
    cairn_status status = rc == 0 ? CAIRN_OK : store_lmdb_fail(&store->env->data, rc, "%s", what);
    leave(store->env);
    return status;
}

void store_write_abort(cairn_store *store, MDB_txn *txn)
{
    if (txn == NULL) return;
    mdb_txn_abort(txn);
    store_release_xfsz();
    leave(store->env);
}

/* ---- another data directory in force ---- */

cairn_status store_data_switch(cairn_store *store, store_data *fresh)
{
    store_env *env = store->env;
    assert(env->exclusive);
    assert(env->live == 0);
    int rc = mdb_env_set_flags(fresh->env, MDB_NOSYNC, 0);
    if (rc == 0) rc = mdb_env_sync(fresh->env, 1);
    if (rc != 0) return store_lmdb_fail(fresh, rc, "syncing");
    cairn_status status = store_sync_dir(fresh->path);
    if (status == CAIRN_OK) status = store_current_write(env->path, fresh->number);
    uint32_t now = 0;
    if (status != CAIRN_OK && (store_current_read(env->path, &now) != CAIRN_OK || now != fresh->number)) return status;
    store_data old = env->data; /* renamed: from here on the fresh one is the store, whatever else fails */
    env->data = *fresh;
    *fresh = (store_data){.fd = -1};
    uint32_t number = old.number;
    store_data_close(&old);
    cairn_status removed = store_data_remove(env->path, number);
    return status != CAIRN_OK ? status : removed;
}

/* ---- stat ---- */

static uint64_t dir_bytes(const char *path)
{
    uint64_t sum = 0;
    DIR *dir = opendir(path);
    if (dir == NULL) return 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        struct stat st;
        if (fstatat(dirfd(dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode))
            sum += (uint64_t)st.st_size;
    }
    closedir(dir);
    return sum;
}

/* LMDB prints a heading and a line for each slot in use, or one line that says there are none. */
static int count_reader(const char *line, void *arg)
{
    uint32_t *lines = arg;
    if (line[0] != '(') ++*lines;
    return 0;
}

cairn_status cairn_store_stat_get(cairn_store *store, cairn_store_stat *out)
{
    store_env *env = store->env;
    store_data *data = &env->data;
    MDB_txn *txn;
    MDB_stat stat;
    char path[STORE_PATH_MAX];
    memset(out, 0, sizeof *out);
    cairn_status status = store_join(path, env->path, "index");
    if (status == CAIRN_OK) status = store_read_begin(store, &txn);
    if (status != CAIRN_OK) return status;
    uint64_t pages = 2, entries[DB_COUNT] = {0};
    int rc = 0;
    for (int i = -2; i < DB_COUNT && rc == 0; i++) { /* 0 is the free tree, 1 the main one */
        int db = i < 0 ? 0 : i;
        if ((rc = mdb_stat(txn, i < 0 ? (MDB_dbi)(i + 2) : data->dbi[db], &stat)) != 0) break;
        pages += stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages;
        if (i >= 0) entries[db] = stat.ms_entries;
    }
    MDB_envinfo info;
    struct stat st;
    mdb_env_info(data->env, &info);
    mdb_reader_list(data->env, count_reader, &out->readers);
    if (out->readers > 0) out->readers -= 2; /* the heading, and ourselves */
    store_read_end(store, txn);
    if (rc != 0) return store_lmdb_fail(data, rc, "counting");
    if (fstat(data->fd, &st) != 0) return cairn_fail_errno(errno, "%s", data->path);
    uint64_t all = (uint64_t)info.me_last_pgno + 1;
    out->file_bytes = (uint64_t)st.st_size;
    out->used_bytes = pages * data->page_bytes;
    out->free_bytes = all > pages ? (all - pages) * data->page_bytes : 0;
    out->index_bytes = dir_bytes(path);
    out->contexts = entries[DB_CONTEXT];
    out->segments = entries[DB_SEGMENT];
    out->blocks = entries[DB_TOKENS];
    out->tiles = entries[DB_TILE];
    store_uuid_text(env->identity.uuid, out->uuid);
    return CAIRN_OK;
}

cairn_status cairn_store_index_path(const cairn_store *store, uint64_t segment, uint64_t generation, char *out,
                                    size_t cap)
{
    int n = snprintf(out, cap, "%s/index/%llu-%llu", store->env->path, (unsigned long long)segment,
                     (unsigned long long)generation);
    return n > 0 && (size_t)n < cap
               ? CAIRN_OK
               : cairn_fail(CAIRN_INVALID, "an index file's path needs %d bytes, %zu given", n + 1, cap);
}

cairn_status cairn_store_tail_path(const cairn_store *store, uint64_t context, char *out, size_t cap)
{
    int n = snprintf(out, cap, "%s/index/tail-%llu", store->env->path, (unsigned long long)context);
    return n > 0 && (size_t)n < cap ? CAIRN_OK
                                    : cairn_fail(CAIRN_INVALID, "a tail's path needs %d bytes, %zu given", n + 1, cap);
}
