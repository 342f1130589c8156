/* env.c - opening and closing stores, one environment per process and directory; the door every transaction goes
 * through.
 *
 * Locks, outermost first: registry (opens and closes), env->mutex (counts), LMDB's own. None is held while a
 * transaction runs, so readers never wait. "<store>/lock" is a record lock (fcntl): it dies with its process and is
 * not inherited by fork, but closing any descriptor of the file gives it up, so it is opened once. */
#include "store_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum { LOCK_WAIT_MS = 5000, LOCK_POLL_MS = 10 };

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static store_env *registry;

/* A fork while another thread opens a store must not leave the child a locked registry. */
static void registry_acquire(void)
{
    pthread_mutex_lock(&registry_lock);
}
static void registry_release(void)
{
    pthread_mutex_unlock(&registry_lock);
}
static void watch_forks(void)
{
    pthread_atfork(registry_acquire, registry_release, registry_release);
}

/* ---- options ---- */

void cairn_store_options_init(cairn_store_options *opt, size_t struct_size)
{
    cairn_store_options full;
    memset(&full, 0, sizeof full);
    full.map_bytes = STORE_MAP_BYTES;
    full.verify_reads = true;
    memset(opt, 0, struct_size);
    memcpy(opt, &full, struct_size < sizeof full ? struct_size : sizeof full);
    opt->struct_size = struct_size;
}

static cairn_status options_take(const cairn_store_options *opt, cairn_store_options *out)
{
    cairn_store_options_init(out, sizeof *out);
    if (opt == NULL) return CAIRN_OK;
    if (opt->struct_size < sizeof opt->struct_size)
        return cairn_fail(CAIRN_INVALID, "store options: struct_size %zu; call cairn_store_options_init first",
                          opt->struct_size);
    memcpy(out, opt, opt->struct_size < sizeof *out ? opt->struct_size : sizeof *out);
    out->struct_size = sizeof *out;
    if (out->map_bytes == 0) out->map_bytes = STORE_MAP_BYTES;
    if (memchr(out->model.name, 0, sizeof out->model.name) == NULL)
        return cairn_fail(CAIRN_INVALID, "store options: the model's name does not end");
    return CAIRN_OK;
}

static void geometry_text(const cairn_geometry *g, char out[160])
{
    snprintf(out, 160, "%u layers (stored from %u), %u KV heads, head dim %u, %u tokens a block, %s", g->layers,
             g->first_layer, g->kv_heads, g->head_dim, g->block_tokens, cairn_dtype_name(g->dtype));
}

static cairn_status check_match(const char *path, const store_identity *identity, const cairn_store_options *opt)
{
    const cairn_geometry *a = &identity->geometry, *b = &opt->geometry;
    if (b->layers != 0 && (a->layers != b->layers || a->first_layer != b->first_layer || a->kv_heads != b->kv_heads ||
                           a->head_dim != b->head_dim || a->block_tokens != b->block_tokens || a->dtype != b->dtype)) {
        char have[160], want[160];
        geometry_text(a, have);
        geometry_text(b, want);
        return cairn_fail(CAIRN_MISMATCH, "%s: the store has %s; asked for %s", path, have, want);
    }
    if (opt->model.fingerprint != 0 && opt->model.fingerprint != identity->model.fingerprint)
        return cairn_fail(CAIRN_MISMATCH,
                          "%s: the store belongs to model '%s' (fingerprint %016llx), not to '%s' (%016llx)", path,
                          identity->model.name, (unsigned long long)identity->model.fingerprint, opt->model.name,
                          (unsigned long long)opt->model.fingerprint);
    return CAIRN_OK;
}

/* ---- the lock file ---- */

static bool lock_try(int fd, short type)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &lock) == 0;
}

static pid_t lock_holder(int fd, short type)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
    return fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK ? lock.l_pid : 0;
}

/* Creating takes milliseconds, so an opener waits for it; compact takes long, so it gives up. */
static cairn_status lock_wait(const char *path, int fd, short type)
{
    for (int waited = 0; !lock_try(fd, type); waited += LOCK_POLL_MS) {
        if (errno != EAGAIN && errno != EACCES && errno != EINTR) return cairn_fail_errno(errno, "%s/lock", path);
        if (waited >= LOCK_WAIT_MS)
            return cairn_fail(CAIRN_BUSY, "%s: process %d has the store to itself (it creates or compacts it)", path,
                              (int)lock_holder(fd, type));
        const struct timespec pause = {0, LOCK_POLL_MS * 1000000L};
        nanosleep(&pause, NULL);
    }
    return CAIRN_OK;
}

static cairn_status lock_open(const char *path, bool read_only, int *out)
{
    char file[STORE_PATH_MAX];
    cairn_status status = store_join(file, path, "lock");
    if (status != CAIRN_OK) return status;
    const int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK; /* a link or a pipe there is none of ours */
    int fd = read_only ? open(file, O_RDONLY | flags) : open(file, O_RDWR | O_CREAT | flags, 0600);
    struct statvfs fs;
    if (fd < 0 && errno == ENOENT && read_only && statvfs(path, &fs) == 0 && (fs.f_flag & ST_RDONLY) != 0) {
        *out = -1; /* nobody can write here */
        return CAIRN_OK;
    }
    if (fd < 0 && errno == ENOENT) fd = open(file, O_RDWR | O_CREAT | flags, 0600);
    if (fd < 0 && errno == EROFS)
        return cairn_fail(CAIRN_IO, "%s: the file system is read-only; open the store read-only", path);
    if (fd < 0) return cairn_fail_errno(errno, "%s", file);
    if (!read_only) fchmod(fd, 0600);
    *out = fd;
    return CAIRN_OK;
}

/* ---- creating ---- */

static bool is_data_dir(const char *name, uint32_t *number)
{
    char again[32];
    unsigned long n = strncmp(name, "data-", 5) == 0 ? strtoul(name + 5, NULL, 10) : 0;
    snprintf(again, sizeof again, "data-%lu", n);
    *number = (uint32_t)n;
    return n > 0 && n <= 999999999 && strcmp(again, name) == 0;
}

typedef enum dir_state { DIR_EMPTY, DIR_HALF_MADE, DIR_STORE, DIR_FOREIGN } dir_state;

/* What a directory is: half-made means it holds nothing but what creation makes before the pointer. */
static cairn_status look_at_dir(const char *path, dir_state *out)
{
    DIR *dir = opendir(path);
    if (dir == NULL) return cairn_fail_errno(errno, "%s", path);
    *out = DIR_EMPTY;
    uint32_t number;
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        const char *n = e->d_name;
        if (strcmp(n, ".") == 0 || strcmp(n, "..") == 0) continue;
        if (strcmp(n, "current") == 0) {
            *out = DIR_STORE;
            break;
        }
        if (is_data_dir(n, &number) || strcmp(n, "lock") == 0 || strcmp(n, "index") == 0 || strcmp(n, "lease") == 0 ||
            strcmp(n, "current.new") == 0) {
            if (*out == DIR_EMPTY) *out = DIR_HALF_MADE;
        } else {
            *out = DIR_FOREIGN;
            cairn_fail(CAIRN_INVALID, "%s: is not a store and not empty (it holds '%.100s')", path, n);
        }
    }
    closedir(dir);
    return CAIRN_OK;
}

/* Data directories the pointer does not name: what a creation or a compact left when it was killed. Nobody can be
 * making one now, for that takes the lock exclusively and we hold it. */
static cairn_status remove_leftovers(const char *path, uint32_t current)
{
    cairn_status status = CAIRN_OK;
    char beside[STORE_PATH_MAX];
    if (store_join(beside, path, "current.new") == CAIRN_OK) unlink(beside);
    DIR *dir = opendir(path);
    if (dir == NULL) return cairn_fail_errno(errno, "%s", path);
    for (struct dirent *e; status == CAIRN_OK && (e = readdir(dir)) != NULL;) {
        uint32_t number;
        if (is_data_dir(e->d_name, &number) && number != current) status = store_data_remove(path, number);
    }
    closedir(dir);
    return status;
}

/* Makes a directory of the store that is not there, which is also how a copy that lost its empty ones is mended. */
static cairn_status make_dir(const char *path, const char *name)
{
    char full[STORE_PATH_MAX];
    cairn_status status = store_join(full, path, name);
    if (status != CAIRN_OK) return status;
    struct stat st;
    if (lstat(full, &st) == 0) {
        if (S_ISDIR(st.st_mode)) return CAIRN_OK;
        return cairn_fail(CAIRN_CORRUPT, "%s: is not a directory", full); /* a link could lead anywhere */
    }
    if (mkdir(full, 0700) != 0 && errno != EEXIST) return cairn_fail_errno(errno, "%s", full);
    return chmod(full, 0700) == 0 ? CAIRN_OK : cairn_fail_errno(errno, "%s", full);
}

/* A creation that was killed left no contexts. Where there are some, it is the pointer that was lost. */
static cairn_status refuse_to_bury(const char *path, uint64_t map_bytes)
{
    cairn_status status = CAIRN_OK;
    DIR *dir = opendir(path);
    if (dir == NULL) return cairn_fail_errno(errno, "%s", path);
    for (struct dirent *e; status == CAIRN_OK && (e = readdir(dir)) != NULL;) {
        uint32_t number;
        store_identity identity;
        store_data data;
        MDB_txn *txn = NULL;
        MDB_stat contexts = {0};
        if (!is_data_dir(e->d_name, &number) ||
            store_data_open(path, number, map_bytes, false, false, &data, &identity) != CAIRN_OK)
            continue;
        if (mdb_txn_begin(data.env, NULL, MDB_RDONLY, &txn) == 0) mdb_stat(txn, data.dbi[DB_CONTEXT], &contexts);
        mdb_txn_abort(txn);
        store_data_close(&data);
        if (contexts.ms_entries > 0)
            status = cairn_fail(CAIRN_CORRUPT,
                                "%s/current is missing, but %s holds %zu contexts: a line '%s' in a file of that name "
                                "brings them back",
                                path, e->d_name, contexts.ms_entries, e->d_name);
    }
    closedir(dir);
    return status;
}

/* Under the exclusive lock. The pointer is written last: before it, there is no store. */
static cairn_status create(const char *path, const cairn_store_options *opt)
{
    store_identity identity = {.geometry = opt->geometry, .model = opt->model, .created_ns = cairn_wall_ns()};
    store_data data;
    if (getrandom(identity.uuid, sizeof identity.uuid, 0) != (ssize_t)sizeof identity.uuid)
        return cairn_fail_errno(errno, "%s: random bytes for the store's name", path);
    identity.uuid[6] = (uint8_t)((identity.uuid[6] & 0x0f) | 0x40); /* version 4, RFC 4122 */
    identity.uuid[8] = (uint8_t)((identity.uuid[8] & 0x3f) | 0x80);
    cairn_status status = refuse_to_bury(path, opt->map_bytes);
    if (status == CAIRN_OK) status = remove_leftovers(path, 0);
    if (status == CAIRN_OK) status = make_dir(path, "index");
    if (status == CAIRN_OK) status = make_dir(path, "lease");
    if (status == CAIRN_OK) status = store_data_create(path, 1, &identity, opt->map_bytes, false, &data);
    if (status != CAIRN_OK) return status;
    store_data_close(&data);
    return store_current_write(path, 1);
}

static cairn_status make_store_dir(const char *path)
{
    if (mkdir(path, 0700) != 0 && errno != EEXIST) /* another process may be as quick */
        return cairn_fail_errno(errno, "%s: making the directory", path);
    if (chmod(path, 0700) != 0) return cairn_fail_errno(errno, "%s", path);
    char parent[STORE_PATH_MAX];
    cairn_status status = store_join(parent, path, "..");
    return status == CAIRN_OK ? store_sync_dir(parent) : status;
}

/* ---- open and close ---- */

static void env_free(store_env *env)
{
    if (env == NULL) return;
    store_data_close(&env->data);
    if (env->lock_fd >= 0) close(env->lock_fd); /* gives the lock up */
    pthread_mutex_destroy(&env->mutex);
    cairn_free(env);
}

static cairn_status env_open(const char *path, const struct stat *st, const cairn_store_options *opt, store_env **out)
{
    store_env *env = cairn_calloc(1, sizeof *env);
    if (env == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%s: opening", path);
    *env = (store_env){.device = st->st_dev, .inode = st->st_ino, .pid = getpid(), .lock_fd = -1, .data = {.fd = -1}};
    pthread_mutex_init(&env->mutex, NULL);
    memcpy(env->path, path, strlen(path) + 1);

    uint32_t number = 0;
    dir_state state = DIR_EMPTY;
    cairn_status status = look_at_dir(path, &state);
    if (status != CAIRN_OK) goto out;
    bool may_create = opt->create && !opt->read_only;
    if (state == DIR_FOREIGN) {
        status = may_create ? CAIRN_INVALID
                            : cairn_fail(CAIRN_NOT_FOUND, "no store at '%s': the directory is not one", path);
        goto out;
    }
    if (state != DIR_STORE && !may_create) {
        status = cairn_fail(CAIRN_NOT_FOUND,
                            state == DIR_EMPTY ? "no store at '%s': the directory is empty"
                                               : "no store at '%s': its creation was begun and not finished",
                            path);
        goto out;
    }
    if (state != DIR_STORE && (status = store_geometry_check(&opt->geometry)) != CAIRN_OK) {
        cairn_fail_within(status, "creating '%s'", path);
        goto out;
    }
    if ((status = lock_open(path, opt->read_only, &env->lock_fd)) != CAIRN_OK) goto out;
    if (state != DIR_STORE) {
        if ((status = lock_wait(path, env->lock_fd, F_WRLCK)) != CAIRN_OK) goto out;
        status = store_current_read(path, &number); /* another process may have been faster */
        if (status == CAIRN_NOT_FOUND) status = create(path, opt);
        if (status != CAIRN_OK) goto out;
    }
    if (env->lock_fd >= 0 && (status = lock_wait(path, env->lock_fd, F_RDLCK)) != CAIRN_OK) goto out;
    if ((status = store_current_read(path, &number)) == CAIRN_NOT_FOUND)
        status = cairn_fail(CAIRN_NOT_FOUND, "no store at '%s'", path);
    if (status == CAIRN_OK && !opt->read_only) status = make_dir(path, "index");
    if (status == CAIRN_OK && !opt->read_only) status = make_dir(path, "lease");
    if (status == CAIRN_OK)
        status =
            store_data_open(path, number, opt->map_bytes, opt->read_only, opt->no_sync, &env->data, &env->identity);
    /* Only now: a pointer with a flipped bit names another directory, and the store would be the leftover. */
    if (status == CAIRN_OK && !opt->read_only) status = remove_leftovers(path, number);
out:
    if (status != CAIRN_OK) {
        env_free(env);
        env = NULL;
    }
    *out = env;
    return status;
}

static store_env **registry_find(const struct stat *st)
{
    store_env **at = &registry;
    while (*at != NULL && ((*at)->device != st->st_dev || (*at)->inode != st->st_ino || (*at)->pid != getpid()))
        at = &(*at)->next;
    return at;
}

/* Under the registry lock. */
static cairn_status open_locked(const char *path, const cairn_store_options *opt, cairn_store *handle)
{
    struct stat st;
    char real[PATH_MAX];
    if (stat(path, &st) != 0) {
        if (errno != ENOENT) return cairn_fail_errno(errno, "%s", path);
        if (!opt->create || opt->read_only) return cairn_fail(CAIRN_NOT_FOUND, "no store at '%s'", path);
        cairn_status status = store_geometry_check(&opt->geometry);
        if (status != CAIRN_OK) return cairn_fail_within(status, "creating '%s'", path);
        if ((status = make_store_dir(path)) != CAIRN_OK) return status;
        if (stat(path, &st) != 0) return cairn_fail_errno(errno, "%s", path);
    }
    if (!S_ISDIR(st.st_mode)) return cairn_fail(CAIRN_INVALID, "'%s' is not a directory, so not a store", path);
    if (realpath(path, real) == NULL) return cairn_fail_errno(errno, "%s", path);

    store_env *env = *registry_find(&st);
    cairn_status status = CAIRN_OK;
    if (env == NULL) {
        if ((status = env_open(real, &st, opt, &env)) != CAIRN_OK) return status;
        if ((status = check_match(real, &env->identity, opt)) != CAIRN_OK) {
            env_free(env);
            return status;
        }
        env->next = registry;
        registry = env;
    } else {
        if ((status = check_match(real, &env->identity, opt)) != CAIRN_OK) return status;
        if (env->data.read_only && !opt->read_only)
            return cairn_fail(CAIRN_BUSY, "%s: this process has it open read-only; close that first", real);
        pthread_mutex_lock(&env->mutex);
        bool exclusive = env->exclusive;
        pthread_mutex_unlock(&env->mutex);
        if (exclusive) return cairn_fail(CAIRN_BUSY, "%s: this process (%d) is compacting it", real, (int)getpid());
        if (!opt->no_sync && !env->data.read_only) { /* one handle that relies on the store makes it durable for all */
            unsigned flags = 0;
            int rc = mdb_env_get_flags(env->data.env, &flags);
            if (rc == 0 && (flags & MDB_NOSYNC) != 0 && (rc = mdb_env_set_flags(env->data.env, MDB_NOSYNC, 0)) == 0)
                rc = mdb_env_sync(env->data.env, 1);
            if (rc != 0) return store_lmdb_fail(&env->data, rc, "syncing");
        }
    }
    env->handles++;
    handle->env = env;
    handle->read_only = opt->read_only;
    handle->verify_reads = opt->verify_reads;
    return CAIRN_OK;
}

cairn_status cairn_store_open(const char *path, const cairn_store_options *opt, cairn_store **out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    cairn_store_options full;
    *out = NULL;
    pthread_once(&once, watch_forks);
    if (path == NULL || path[0] == '\0') return cairn_fail(CAIRN_INVALID, "a store's path is empty");
    cairn_status status = options_take(opt, &full);
    if (status != CAIRN_OK) return status;
    cairn_store *handle = cairn_calloc(1, sizeof *handle);
    if (handle == NULL) return cairn_fail(CAIRN_NO_MEMORY, "%s: opening", path);
    registry_acquire();
    status = open_locked(path, &full, handle);
    registry_release();
    if (status == CAIRN_OK)
        *out = handle;
    else
        cairn_free(handle);
    return status;
}

void cairn_store_close(cairn_store *store)
{
    if (store == NULL) return;
    store_env *env = store->env;
    registry_acquire();
    if (env->pid == getpid() && --env->handles == 0) { /* after a fork the parent's environment is left alone */
        assert(env->live == 0);
        assert(env->writers == 0);
        store_env **at = &registry;
        while (*at != env) at = &(*at)->next;
        *at = env->next;
        unsigned flags = 0;
        if (mdb_env_get_flags(env->data.env, &flags) == 0 && (flags & (MDB_NOSYNC | MDB_RDONLY)) == MDB_NOSYNC)
            mdb_env_sync(env->data.env, 1);
        env_free(env);
    }
    registry_release();
    cairn_free(store);
}

const char *cairn_store_path(const cairn_store *store)
{
    return store->env->path;
}

const cairn_geometry *cairn_store_geometry(const cairn_store *store)
{
    return &store->env->identity.geometry;
}

const cairn_model_id *cairn_store_model(const cairn_store *store)
{
    return &store->env->identity.model;
}

/* ---- the store for oneself ---- */

cairn_status store_exclusive_begin(cairn_store *store)
{
    store_env *env = store->env;
    if (store->read_only) return cairn_fail(CAIRN_INVALID, "%s: the store was opened read-only", env->path);
    if (env->pid != getpid())
        return cairn_fail(CAIRN_INVALID, "%s: opened by process %d before a fork", env->path, (int)env->pid);
    registry_acquire(); /* no open meanwhile */
    pthread_mutex_lock(&env->mutex);
    cairn_status status = CAIRN_OK;
    if (env->exclusive || env->handles > 1 || env->live > 0 || env->writers > 0)
        status =
            cairn_fail(CAIRN_BUSY, "%s: this process (%d) has %zu other handles, %zu snapshots and %zu writers on it",
                       env->path, (int)getpid(), env->handles - 1, env->live, env->writers);
    else if (!lock_try(env->lock_fd, F_WRLCK)) {
        int err = errno;
        pid_t pid = lock_holder(env->lock_fd, F_WRLCK);
        status = err == EAGAIN || err == EACCES
                     ? cairn_fail(CAIRN_BUSY, "%s: process %d has it open too", env->path, (int)pid)
                     : cairn_fail_errno(err, "%s/lock", env->path);
    }
    if (status == CAIRN_OK) {
        env->exclusive = true;
        env->exclusive_thread = pthread_self();
    }
    pthread_mutex_unlock(&env->mutex);
    registry_release();
    return status;
}

void store_exclusive_end(cairn_store *store)
{
    store_env *env = store->env;
    pthread_mutex_lock(&env->mutex);
    lock_try(env->lock_fd, F_RDLCK); /* to a weaker lock: nobody can be in the way */
    env->exclusive = false;
    pthread_mutex_unlock(&env->mutex);
}
