/* ingest.c - text into contexts: begins, goes on after an interruption, adds, replaces.
 *
 * What a context already holds decides what a run does. Its record carries the identity of the text it was made of:
 *
 *   nothing yet, or an empty context      -> all of the text
 *   same text, not complete               -> what is missing, after comparing the stored tokens with the text's
 *   same text, complete                   -> nothing
 *   another text                          -> an error, unless --append or --replace
 *
 * An appended text is identified by its own hash and by the number of tokens that were there before it: the two are
 * hashed together, so that an interrupted append can find its beginning again (see append_base).
 */
#include "input.h"
#include "work.h"

#include <errno.h>
#include <fts.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

static struct {
    const char *model, *context;
    bool each, append, replace;
    int dtype;             /* a cairn_dtype; -1 = the store's, f16 for a new one */
    uint64_t commit_bytes; /* 0 = by --ram */
    session_flags session;
} flags = {.dtype = -1, .session = SESSION_FLAGS_INIT};

static const double COMMIT_SECONDS = 2.0;

static const cli_option options[] = {
    OPT_NEEDED(CLI_TEXT, "model", 'm', &flags.model, "FILE", "the landmark model, a GGUF file"),
    OPT_TEXT("context", 'c', &flags.context, "NAME", "the context; with --each a prefix: NAME/path"),
    OPT_FLAG("each", 0, &flags.each, "a corpus: one context per file, named by its path below DIR"),
    OPT_FLAG("append", 0, &flags.append, "add the text to the context"),
    OPT_FLAG("replace", 0, &flags.replace, "empty the context first"),
    OPT_CHOICE("dtype", &flags.dtype, "f32|f16|bf16|q8", "element type of a new store (f16)"),
    OPT_NUMBER(CLI_SIZE, "commit-bytes", 0, &flags.commit_bytes, "SIZE",
               "commit when this much is pending, or after 2 s (a 16th of --ram, at most 16M)", 1 << 10,
               UINT64_C(1) << 40),
    SESSION_OPTIONS(flags.session),
};

/* One text going into one context. */
typedef struct job {
    cli *c;
    cairn_store *store;
    const model_ref *model;
    const cairn_session_options *session_options;
    const char *name;
    input *in;
    cairn_session *session;
    cairn_runtime *runtime;
    cairn_context_info before; /* as found, lease held */
    cairn_input identity;
    uint64_t base;   /* tokens of the context that come before this text */
    uint64_t skip;   /* tokens of this text that are stored already */
    uint64_t tokens; /* run through the model by this run */
    const char *state;
    double seconds;
    progress *bar;
    uint64_t bar_before, bar_total; /* bytes of the corpus before this text, and of all of it */
} job;

/* ---- what is there, what is to be done ---- */

/* The two numbers as one: what the record of an appended text holds. A text that came first is its own hash. */
static uint64_t append_hash(uint64_t hash, uint64_t base)
{
    uint64_t both[2] = {hash, base};
    return base == 0 ? hash : XXH3_64bits(both, sizeof both);
}

/* Where the interrupted text began, if it was this one: the base whose hash is the record's. At most one hash per
 * stored token, some milliseconds for a million. */
static bool append_base(const cairn_context_info *info, uint64_t bytes, uint64_t hash, uint64_t *base)
{
    if (info->input.bytes != bytes) return false;
    for (uint64_t at = 0; at <= info->tokens; at++) {
        if (append_hash(hash, at) != info->input.hash) continue;
        *base = at;
        return true;
    }
    return false;
}

typedef enum plan { PLAN_START, PLAN_GO_ON, PLAN_NOTHING, PLAN_FAIL } plan;

static plan make_plan(job *j, const cairn_context_info *info, int *code)
{
    human have, text;
    uint64_t base = 0;
    bool same = append_base(info, input_bytes(j->in), input_hash(j->in), &base);
    j->base = info->tokens;
    if (info->tokens == 0) return PLAN_START;
    /* An appended text goes on only under --append: without it the user means a context of this text alone. */
    if (same && !info->input.complete && (base == 0 || flags.append)) {
        j->base = base;
        return PLAN_GO_ON;
    }
    if (same && info->input.complete && base == 0 && !flags.append) return PLAN_NOTHING;
    if (flags.append && info->input.complete) return PLAN_START;
    if (flags.append && info->input.bytes == 0 && info->input.hash == 0) return PLAN_START;
    if (flags.append)
        *code = cli_fail(j->c, EXIT_FAILED,
                         "'%s' holds an interrupted text of %s bytes (%s tokens of it are stored): ingest that one to "
                         "its end before another is appended, or --replace it",
                         info->name, human_count(&text, info->input.bytes), human_count(&have, info->tokens));
    else
        *code = cli_fail(j->c, EXIT_FAILED,
                         "'%s' holds another text (%s bytes, %s tokens stored): --append adds this one, --replace "
                         "starts anew",
                         info->name, human_count(&text, info->input.bytes), human_count(&have, info->tokens));
    return PLAN_FAIL;
}

static cairn_status find_context(job *j, cairn_context_info *info)
{
    cairn_snapshot *snap = NULL;
    cairn_status st = cairn_snapshot_begin(j->store, &snap);
    if (st == CAIRN_OK) st = cairn_snapshot_context(snap, j->name, info);
    cairn_snapshot_end(snap);
    return st;
}

static cairn_status empty_context(job *j)
{
    cairn_writer *writer = NULL;
    cairn_status st = cairn_writer_begin(j->store, j->name, &writer);
    if (st == CAIRN_OK) st = cairn_writer_truncate(writer);
    cairn_writer_end(writer);
    return st;
}

/* The tokens of the text that are stored already are compared, every one of them, and left out. */
static int skip_stored(job *j, cairn_token *text, cairn_token *stored, size_t cap)
{
    cairn_snapshot *snap = NULL;
    token_reader reader = {0};
    cairn_status st = cairn_snapshot_begin(j->store, &snap);
    if (st != CAIRN_OK) return cli_fail_status(j->c, st);
    int code = reader_init(j->c, j->store, snap, &j->before, &reader);
    j->skip = j->before.tokens - j->base;
    for (uint64_t done = 0; code < 0 && done < j->skip;) {
        size_t n = 0, have = 0, want = j->skip - done < cap ? (size_t)(j->skip - done) : cap;
        if ((code = input_next(j->c, j->in, text, want, &n)) >= 0) break;
        if ((st = reader_tokens(&reader, j->base + done, n, stored, &have)) != CAIRN_OK) {
            code = cli_fail_status(j->c, st);
            break;
        }
        size_t at = 0;
        while (at < n && at < have && text[at] == stored[at]) at++;
        const unsigned long long differs = j->base + done + at;
        if (n == 0 || at < n || have < n)
            code = cli_fail(j->c, EXIT_FAILED,
                            "'%s' does not hold the beginning of this text: token %llu differs (was something else "
                            "added to it?); --replace starts anew",
                            j->name, differs);
        done += n;
    }
    reader_wipe(&reader);
    cairn_snapshot_end(snap);
    return code;
}

/* ---- the text through the model ---- */

static cairn_status commit(job *j, bool complete)
{
    j->identity.complete = complete;
    return cairn_session_commit(j->session, &j->identity);
}

static void interrupted(job *j)
{
    human done, all;
    uint64_t bytes = input_bytes(j->in), at = input_position(j->in);
    cli_fail(j->c, EXIT_FAILED, "interrupted: %s of %s bytes (%.0f %%) of '%s' are stored; the same command%s goes on",
             human_count(&done, at), human_count(&all, bytes), bytes > 0 ? 100.0 * (double)at / (double)bytes : 100.0,
             j->name, flags.replace ? " without --replace" : "");
}

static int feed_all(job *j, cairn_token *tokens, size_t chunk)
{
    uint64_t start = cli_now_ns(), committed = start;
    uint64_t items = j->bar->items;
    cairn_store_stat stat = {0};
    j->bar->from += input_position(j->in);
    int code = -1;
    for (;;) {
        size_t n = 0;
        if (cli_stopped()) break;
        if ((code = input_next(j->c, j->in, tokens, chunk, &n)) >= 0) break;
        bool end = n == 0;
        cairn_status st = end ? CAIRN_OK : cairn_runtime_feed(j->runtime, tokens, n, NULL);
        j->tokens += n;
        uint64_t now = cli_now_ns();
        bool due = cairn_session_pending_bytes(j->session) >= flags.commit_bytes ||
                   (double)(now - committed) * 1e-9 >= COMMIT_SECONDS;
        if (st == CAIRN_OK && (due || end)) {
            st = commit(j, end);
            committed = cli_now_ns();
            if (st == CAIRN_OK && j->bar->on && cairn_store_stat_get(j->store, &stat) == CAIRN_OK)
                j->bar->stored_bytes = stat.file_bytes;
        }
        if (st != CAIRN_OK) {
            code = cli_fail_status(j->c, st);
            break;
        }
        if (end) break;
        j->bar->items = items + j->tokens;
        progress_show(j->bar, j->bar_before + input_position(j->in), j->bar_total);
    }
    progress_clear(j->bar);
    j->seconds = (double)(cli_now_ns() - start) * 1e-9;
    if (code >= 0 || !cli_stopped() || j->identity.complete) return code;
    cairn_status st = commit(j, false);
    if (st != CAIRN_OK) return cli_fail_status(j->c, st);
    j->state = "interrupted";
    interrupted(j);
    return EXIT_FAILED;
}

static int run_text(job *j)
{
    /* One feed is one prefill chunk: commits happen between chunks. */
    uint32_t blocks = flags.session.chunk_blocks > 0 ? flags.session.chunk_blocks : 16;
    size_t chunk = (size_t)blocks * cairn_store_geometry(j->store)->block_tokens;
    cairn_token *tokens = malloc(2 * chunk * sizeof *tokens);
    if (tokens == NULL) return cli_fail(j->c, EXIT_FAILED, "out of memory");
    j->identity = (cairn_input){.bytes = input_bytes(j->in), .hash = append_hash(input_hash(j->in), j->base)};
    int code = j->before.tokens > j->base ? skip_stored(j, tokens, tokens + chunk, chunk) : -1;
    if (code < 0) {
        cairn_status st = cairn_runtime_begin(j->model->model, j->session, flags.session.chunk_blocks, &j->runtime);
        code = st == CAIRN_OK ? feed_all(j, tokens, chunk) : cli_fail_status(j->c, st);
    }
    free(tokens);
    return code;
}

/* What makes asking faster is derived data: the text is stored without it. */
static void keep_tail(job *j)
{
    cairn_session_info info;
    if (cairn_runtime_keep_tail(j->runtime) != CAIRN_OK)
        cli_warn(j->c, "the end of '%s' is not kept closed, so asking it together with others takes longer: %s",
                 j->name, cairn_last_error());
    cairn_session_info_get(j->session, &info);
    if (info.warning[0] != 0) cli_warn(j->c, "%s: %s", j->name, info.warning);
}

/* An index is derived data: without it every answer is right and comes from a scan. */
static int build_index(job *j)
{
    progress bar;
    progress_init(&bar, j->c, "index");
    cairn_status st =
        cairn_context_reindex(j->store, j->model->shape, j->name, flags.session.index, progress_callback, &bar);
    progress_clear(&bar);
    if (st == CAIRN_OK) return -1;
    if (st != CAIRN_CANCELLED) return cli_fail_status(j->c, st);
    return cli_fail(j->c, EXIT_FAILED, "interrupted: '%s' is complete but has no index; 'cairn reindex' makes it",
                    j->name);
}

static int ingest_one(job *j)
{
    cairn_context_info info;
    int code = EXIT_FAILED;
    cairn_status st = find_context(j, &info);
    if (st == CAIRN_NOT_FOUND) {
        uint64_t id = 0;
        st = cairn_context_create(j->store, j->name, &id);
        if (st == CAIRN_EXISTS) st = CAIRN_OK; /* made by another process just now: the lease sorts it out */
    } else if (st == CAIRN_OK && flags.replace) {
        st = empty_context(j);
    } else if (st == CAIRN_OK) {
        switch (make_plan(j, &info, &code)) {
        case PLAN_FAIL: return code;
        case PLAN_NOTHING:
            j->before = info;
            j->state = "unchanged";
            return -1;
        case PLAN_START:
        case PLAN_GO_ON: break;
        }
    }
    const char *names[] = {j->name};
    if (st == CAIRN_OK) st = cairn_session_begin(j->store, j->model->shape, names, 1, j->session_options, &j->session);
    /* With the lease in hand nobody else moves the context: what it says now is what is gone by. */
    if (st == CAIRN_OK) st = find_context(j, &j->before);
    if (st != CAIRN_OK) return cli_fail_status(j->c, st);
    switch (make_plan(j, &j->before, &code)) {
    case PLAN_FAIL: return code;
    case PLAN_NOTHING: j->state = "unchanged"; return -1;
    case PLAN_START: j->state = j->base > 0 ? "appended" : "ingested"; break;
    case PLAN_GO_ON: j->state = "resumed"; break;
    }
    if ((code = run_text(j)) >= 0) return code;
    keep_tail(j);
    cairn_runtime_end(j->runtime);
    cairn_session_end(j->session); /* the lease is given back before the index is made */
    j->runtime = NULL;
    j->session = NULL;
    return build_index(j);
}

/* ---- one context or a corpus ---- */

typedef struct run_totals {
    size_t done, unchanged, failed;
    uint64_t tokens;
    double seconds;
} run_totals;

static int ingest_files(job *j, const char *const *paths, size_t n, run_totals *totals, json_t *report)
{
    int code = input_open(j->c, paths, n, j->model->model, &j->in);
    cli_catch_signals(); /* not before: Ctrl-C ends a wait for standard input at once */
    if (code < 0 && !flags.each) j->bar_total = input_bytes(j->in);
    if (code < 0) code = ingest_one(j);
    cairn_runtime_end(j->runtime);
    cairn_session_end(j->session);
    cairn_context_info after = {0};
    bool known = find_context(j, &after) == CAIRN_OK;
    bool unchanged = j->state != NULL && strcmp(j->state, "unchanged") == 0;
    totals->done += code < 0 && !unchanged;
    totals->unchanged += unchanged;
    totals->failed += code >= 0;
    totals->tokens += j->tokens;
    totals->seconds += j->seconds;
    if (report != NULL) {
        json_t *entry =
            json_pack("{s:s, s:s, s:o, s:o, s:o, s:f}", "name", j->name, "state",
                      code < 0        ? j->state
                      : cli_stopped() ? "interrupted"
                                      : "failed",
                      "tokens", json_count(known ? after.tokens : 0), "blocks", json_count(known ? after.blocks : 0),
                      "new_tokens", json_count(j->tokens), "seconds", j->seconds);
        if (entry != NULL && code >= 0) json_object_set_new(entry, "error", json_bytes(j->c->said, strlen(j->c->said)));
        json_array_append_new(report, entry);
    } else if (code < 0 && !j->c->quiet && !flags.each) {
        human tokens, blocks, time, rate;
        if (unchanged)
            printf("nothing to do: '%s' holds all %s tokens of this text\n", j->name,
                   human_count(&tokens, after.tokens));
        else
            printf("%s '%s': %s tokens in %s, %s tokens/s; it holds %s blocks\n", j->state, j->name,
                   human_count(&tokens, j->tokens), human_seconds(&time, j->seconds),
                   human_count(&rate, j->seconds > 0 ? (uint64_t)((double)j->tokens / j->seconds) : 0),
                   human_count(&blocks, after.blocks));
    }
    input_close(j->in);
    return code;
}

/* A file of a corpus: FILE itself, or what is below DIR, in order of path. */
typedef struct corpus_file {
    char *path;
    char *name;
    uint64_t bytes;
} corpus_file;
typedef struct corpus {
    corpus_file *files;
    size_t n;
    uint64_t bytes;
} corpus;

static int corpus_add(cli *c, corpus *all, const char *path, const char *below, uint64_t bytes)
{
    while (strncmp(below, "./", 2) == 0) below += 2;
    while (below[0] == '/') below++;
    corpus_file *files = realloc(all->files, (all->n + 1) * sizeof *files);
    if (files == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    all->files = files;
    corpus_file *f = &files[all->n++];
    *f = (corpus_file){.path = strdup(path), .bytes = bytes};
    all->bytes += bytes;
    if (asprintf(&f->name, "%s%s%s", flags.context != NULL ? flags.context : "", flags.context != NULL ? "/" : "",
                 below) < 0)
        f->name = NULL;
    return f->path != NULL && f->name != NULL ? -1 : cli_fail(c, EXIT_FAILED, "out of memory");
}

static int by_path(const FTSENT **a, const FTSENT **b)
{
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

static int corpus_find(cli *c, char *path, corpus *all)
{
    struct stat st;
    if (stat(path, &st) != 0) return cli_fail(c, EXIT_FAILED, "cannot open '%s': %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode)) return corpus_add(c, all, path, path, (uint64_t)st.st_size);
    char *roots[] = {path, NULL};
    /* Links below are not walked into, so no circle can be: a link to a file counts as the file. */
    FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, by_path);
    if (walk == NULL) return cli_fail(c, EXIT_FAILED, "cannot open '%s': %s", path, strerror(errno));
    int code = -1;
    size_t root = strlen(path);
    for (FTSENT *e; code < 0 && (e = fts_read(walk)) != NULL;) {
        if (e->fts_info == FTS_DNR || e->fts_info == FTS_ERR)
            code = cli_fail(c, EXIT_FAILED, "cannot read '%s': %s", e->fts_path, strerror(e->fts_errno));
        if (e->fts_info != FTS_F && e->fts_info != FTS_SL) continue;
        if (stat(e->fts_path, &st) != 0 || !S_ISREG(st.st_mode)) continue; /* a link to nowhere, to a directory */
        code = corpus_add(c, all, e->fts_path, e->fts_path + root, (uint64_t)st.st_size);
    }
    fts_close(walk);
    return code;
}

static int ingest_corpus(job *common, char **paths, size_t n, run_totals *totals, json_t *report)
{
    corpus all = {0};
    int code = -1;
    for (size_t i = 0; i < n && code < 0; i++) code = corpus_find(common->c, paths[i], &all);
    if (code < 0 && all.n == 0) code = cli_fail(common->c, EXIT_FAILED, "no files below '%s'", paths[0]);
    bool found = code < 0, json = common->c->json;
    char label[48];
    progress bar;
    progress_init(&bar, common->c, label);
    bar.unit = "tokens";
    uint64_t before = 0;
    if (found) common->c->json = false; /* the failure of one file is an entry of the answer, not the answer */
    for (size_t i = 0; found && i < all.n && !cli_stopped(); i++) {
        job j = *common;
        j.name = all.files[i].name;
        j.bar = &bar;
        j.bar_before = before;
        j.bar_total = all.bytes;
        snprintf(label, sizeof label, "file %zu of %zu", i + 1, all.n);
        const char *one[] = {all.files[i].path};
        int failed = ingest_files(&j, one, 1, totals, report);
        if (failed >= 0 && !cli_stopped()) {
            cli_warn(common->c, "'%s' was left out", all.files[i].path); /* one bad file does not keep others out */
            code = failed;
        }
        if (j.state != NULL && strcmp(j.state, "unchanged") == 0) bar.from += all.files[i].bytes;
        before += all.files[i].bytes;
        progress_show(&bar, before, all.bytes);
    }
    progress_clear(&bar);
    if (found && cli_stopped()) {
        human done, of;
        code = cli_fail(common->c, EXIT_FAILED, "interrupted after %s of %s files: the same command goes on",
                        human_count(&done, totals->done + totals->unchanged), human_count(&of, all.n));
    }
    common->c->json = json;
    for (size_t i = 0; i < all.n; i++) {
        free(all.files[i].path);
        free(all.files[i].name);
    }
    free(all.files);
    return code;
}

/* ---- the command ---- */

/* An existing store as it is; a missing one is made for the model. */
static int open_or_create(cli *c, const char *path, const model_ref *model, cairn_store **out)
{
    cairn_dtype dtype = CAIRN_F16;
    if (flags.dtype >= 0) dtype = (cairn_dtype)flags.dtype;
    struct stat st;
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    cairn_status status = cairn_store_open(path, &opt, out);
    if (status == CAIRN_OK) {
        cairn_dtype stored = cairn_store_geometry(*out)->dtype;
        cairn_store_close(*out);
        *out = NULL;
        if (flags.dtype >= 0 && stored != dtype)
            return cli_fail(c, EXIT_FAILED, "the store '%s' holds %s tiles, --dtype asks for %s", path,
                            cairn_dtype_name(stored), cairn_dtype_name(dtype));
        return store_open(c, path, model, false, out);
    }
    if (status != CAIRN_NOT_FOUND && !(status == CAIRN_INVALID && stat(path, &st) == 0))
        return cli_fail_status(c, status);
    opt.create = true;
    opt.model = model->id;
    cairn_model_geometry(model->model, dtype, &opt.geometry);
    status = cairn_store_open(path, &opt, out);
    return status == CAIRN_OK ? -1 : cli_fail_status(c, status);
}

static int run(cli *c, int argc, char **argv)
{
    if (flags.append && flags.replace) return cli_usage(c, "--append and --replace exclude each other");
    if (!flags.each && flags.context == NULL) return cli_usage(c, "--context NAME is required (or --each)");
    model_ref model = {0};
    cairn_store *store = NULL;
    cairn_session_options session;
    run_totals totals = {0};
    json_t *report = NULL;
    int code = model_open(c, flags.model, true, &model);
    if (code < 0) code = session_options(c, &flags.session, &model, &session);
    if (code < 0) code = open_or_create(c, argv[0], &model, &store);
    if (code >= 0) goto out;
    /* Pending blocks are held once by the session and once more by the transaction that writes them: with --ram 32M the
     * whole process stays within budget + 64 MiB at 2 MiB a commit, at 16 MiB it does not (measured 102 and 134 MB). */
    if (flags.commit_bytes == 0) {
        flags.commit_bytes = flags.session.ram_bytes / 16;
        if (flags.commit_bytes > UINT64_C(16) << 20) flags.commit_bytes = UINT64_C(16) << 20;
    }
    session.write = true;
    session.index_kind = NULL; /* --index is what the context keeps, not what this session searches with */
    if (c->json) report = json_array();
    job j = {.c = c, .store = store, .model = &model, .session_options = &session, .name = flags.context};
    progress bar;
    progress_init(&bar, c, flags.context);
    bar.unit = "tokens";
    j.bar = &bar;
    uint64_t start = cli_now_ns();
    code = flags.each ? ingest_corpus(&j, argv + 1, (size_t)(argc - 1), &totals, report)
                      : ingest_files(&j, (const char *const *)argv + 1, (size_t)(argc - 1), &totals, report);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    cairn_store_stat stat = {0};
    cairn_store_stat_get(store, &stat);
    if (flags.each && !c->json && !c->quiet && totals.done + totals.unchanged > 0) {
        human done, same, tokens, time, bytes;
        printf("%s contexts ingested, %s there already, %zu left out: %s tokens in %s; the store has %s\n",
               human_count(&done, totals.done), human_count(&same, totals.unchanged), totals.failed,
               human_count(&tokens, totals.tokens), human_seconds(&time, seconds),
               human_bytes(&bytes, stat.file_bytes));
    }
    if (c->json && !c->answered) {
        json_t *root = json_pack("{s:O, s:o, s:f, s:f, s:o, s:o, s:b}", "contexts", report, "new_tokens",
                                 json_count(totals.tokens), "seconds", seconds, "tokens_per_second",
                                 totals.seconds > 0 ? (double)totals.tokens / totals.seconds : 0.0, "store_bytes",
                                 json_count(stat.file_bytes), "peak_rss_bytes", json_count(cairn_peak_rss_bytes()),
                                 "complete", code < 0);
        int answered = cli_answer(c, root);
        if (code < 0 && answered != EXIT_DONE) code = answered;
    }
out:
    json_decref(report);
    cairn_store_close(store);
    model_close(&model);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_ingest = {
    .name = "ingest",
    .summary = "text into a context; run again, it goes on where it was interrupted",
    .usage = "STORE -m MODEL.gguf -c NAME FILE...   (- is standard input)\n"
             "       cairn ingest STORE -m MODEL.gguf --each DIR|FILE...",
    .about =
        "Runs text through the model once and keeps its K/V memory in the context NAME of STORE, which is made if\n"
        "it does not exist. Several FILEs are one text, each begun by the model's BOS token.\n"
        "\n"
        "Run again with the same text it goes on after an interruption (Ctrl-C, kill, power cut) and does nothing\n"
        "when all is there; another text for the same NAME is an error. Use the same --top-k when going on: what\n"
        "is stored depends on it. Ctrl-C stores what is whole and ends with code 1. After --append the context is\n"
        "known by the text added last.",
    .example = "  cairn ingest library -m models/cairn-tiny-f16.gguf -c book book.txt\n"
               "  cairn ingest library -m models/cairn-tiny-f16.gguf -c docs --each /usr/share/doc/git\n"
               "  zcat log.gz | cairn ingest library -m models/cairn-tiny-f16.gguf -c log --append -",
    CLI_OPTIONS(options),
    .args = (const char *const[]){"STORE", "FILE"},
    .min_args = 2,
    .max_args = -1,
    .run = run,
};
