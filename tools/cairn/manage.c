/* manage.c - fork, drop, rename, reindex, compact, export, import: what changes a store besides text. */
#include "work.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int finish(cairn_store *store, int code)
{
    cairn_store_close(store);
    return code < 0 ? EXIT_DONE : code;
}

static int find_info(cli *c, cairn_store *store, const char *name, cairn_context_info *out)
{
    cairn_snapshot *snap = NULL;
    cairn_status st = cairn_snapshot_begin(store, &snap);
    int code = st == CAIRN_OK ? context_find(c, snap, name, out) : cli_fail_status(c, st);
    cairn_snapshot_end(snap);
    return code;
}

/* ---- fork ---- */

static struct {
    uint64_t at;
} fork_flags = {.at = UINT64_MAX};
static const cli_option fork_options[] = {
    OPT_NUMBER(CLI_U64, "at", 0, &fork_flags.at, "TOKENS", "keep this many tokens (all)", 0, UINT64_MAX - 1),
};

static int run_fork(cli *c, int argc, char **argv)
{
    (void)argc;
    cairn_store *store = NULL;
    cairn_context_info info = {0};
    uint64_t id = 0;
    int code = store_open(c, argv[0], NULL, false, &store);
    if (code < 0) code = find_info(c, store, argv[1], &info); /* for the hint that names a similar one */
    if (code < 0 && fork_flags.at != UINT64_MAX && fork_flags.at > info.tokens)
        code = cli_usage(c, "--at: %llu is beyond the end, '%s' has %llu tokens", (unsigned long long)fork_flags.at,
                         argv[1], (unsigned long long)info.tokens);
    if (code < 0) {
        cairn_status st = cairn_context_fork(store, argv[1], argv[2], fork_flags.at, &id);
        code = st == CAIRN_OK ? find_info(c, store, argv[2], &info) : cli_fail_status(c, st);
    }
    human tokens, blocks;
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:s, s:s, s:o, s:o, s:i}", "forked", argv[1], "name", argv[2], "tokens",
                                       json_count(info.tokens), "blocks", json_count(info.blocks), "tail_tokens",
                                       (int)info.tail_tokens));
    else if (code < 0 && !c->quiet)
        printf("forked '%s' to '%s': %s tokens, %s blocks shared\n", argv[1], argv[2],
               human_count(&tokens, info.tokens), human_count(&blocks, info.blocks));
    return finish(store, code);
}

const cli_command command_fork = {
    .name = "fork",
    .summary = "a branch of a context, in constant time",
    .usage = "STORE FROM TO [--at TOKENS]",
    .about = "TO shares the whole blocks of FROM and can be asked, appended to and dropped by itself.",
    .example = "  cairn fork library book draft\n  cairn fork library book chapter-1 --at 20000",
    CLI_OPTIONS(fork_options),
    .args = (const char *const[]){"STORE", "FROM", "TO"},
    .min_args = 3,
    .max_args = 3,
    .run = run_fork,
};

/* ---- drop, rename ---- */

static int run_drop(cli *c, int argc, char **argv)
{
    cairn_store *store = NULL;
    cairn_context_info info = {0};
    uint64_t swept = 0;
    int code = store_open(c, argv[0], NULL, false, &store);
    for (int i = 1; i < argc && code < 0; i++) code = find_info(c, store, argv[i], &info); /* all or none */
    json_t *names = json_array();
    for (int i = 1; i < argc && code < 0; i++) {
        cairn_status st = cairn_context_drop(store, argv[i]);
        if (st != CAIRN_OK)
            code = cli_fail_status(c, st);
        else
            json_array_append_new(names, json_string(argv[i]));
        if (st == CAIRN_OK && !c->json && !c->quiet) printf("dropped '%s'\n", argv[i]);
    }
    if (code < 0) { /* and what an interrupted drop left behind */
        cairn_status st = cairn_store_sweep(store, &swept);
        if (st != CAIRN_OK) code = cli_fail_status(c, st);
    }
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:O, s:o}", "dropped", names, "swept_blocks", json_count(swept)));
    json_decref(names);
    return finish(store, code);
}

const cli_command command_drop = {
    .name = "drop",
    .summary = "forget contexts; their space is used again",
    .usage = "STORE NAME...",
    .about = "Blocks another context shares stay. The pages become free inside the file; 'cairn compact' returns them\n"
             "to the disk.",
    .example = "  cairn drop library draft",
    .args = (const char *const[]){"STORE", "NAME"},
    .min_args = 2,
    .max_args = -1,
    .run = run_drop,
};

static int run_rename(cli *c, int argc, char **argv)
{
    (void)argc;
    cairn_store *store = NULL;
    cairn_context_info info = {0};
    int code = store_open(c, argv[0], NULL, false, &store);
    if (code < 0) code = find_info(c, store, argv[1], &info);
    if (code < 0) {
        cairn_status st = cairn_context_rename(store, argv[1], argv[2]);
        if (st != CAIRN_OK) code = cli_fail_status(c, st);
    }
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:s, s:s}", "renamed", argv[1], "name", argv[2]));
    else if (code < 0 && !c->quiet)
        printf("renamed '%s' to '%s'\n", argv[1], argv[2]);
    return finish(store, code);
}

const cli_command command_rename = {
    .name = "rename",
    .summary = "another name for a context",
    .usage = "STORE FROM TO",
    .about = "Nothing else changes. A name that is taken is an error.",
    .example = "  cairn rename library draft final",
    .args = (const char *const[]){"STORE", "FROM", "TO"},
    .min_args = 3,
    .max_args = 3,
    .run = run_rename,
};

/* ---- reindex ---- */

static struct {
    const char *model, *kind;
    cli_texts contexts;
} reindex_flags;
static const cli_option reindex_options[] = {
    OPT_NEEDED(CLI_TEXT, "model", 'm', &reindex_flags.model, "FILE", "the model the store was made with"),
    OPT_TEXTS("context", 'c', &reindex_flags.contexts, "NAMES", "a context, several by commas, or a glob (all)"),
    OPT_TEXT("index", 0, &reindex_flags.kind, "KIND",
             "auto, scan, exact, flat, sq8, ivf, hnsw, or a FAISS factory string (as asked before)"),
};

static int reindex_names(cli *c, cairn_store *store, const model_ref *model, const name_list *list)
{
    int code = -1;
    char label[64];
    progress bar;
    for (size_t i = 0; i < list->n && code < 0; i++) {
        snprintf(label, sizeof label, "%.40s", list->items[i]);
        progress_init(&bar, c, label);
        cairn_status st =
            cairn_context_reindex(store, model->shape, list->items[i], reindex_flags.kind, progress_callback, &bar);
        progress_clear(&bar);
        if (st == CAIRN_CANCELLED)
            code = cli_fail(c, EXIT_FAILED, "interrupted at '%s': what has no index is scanned", list->items[i]);
        else if (st != CAIRN_OK)
            code = cli_fail_status(c, st);
    }
    return code;
}

static int run_reindex(cli *c, int argc, char **argv)
{
    (void)argc;
    model_ref model = {0};
    cairn_store *store = NULL;
    cairn_snapshot *snap = NULL;
    name_list list = {0};
    static const char *everything[] = {"*"};
    int code = model_open(c, reindex_flags.model, true, &model);
    if (code < 0) code = index_kind_check(c, reindex_flags.kind, &model);
    if (code < 0) code = store_open(c, argv[0], &model, false, &store);
    if (code < 0) {
        cairn_status st = cairn_snapshot_begin(store, &snap);
        if (reindex_flags.contexts.n == 0) reindex_flags.contexts = (cli_texts){everything, 1};
        code = st == CAIRN_OK ? names_find(c, snap, &reindex_flags.contexts, &list) : cli_fail_status(c, st);
        cairn_snapshot_end(snap);
    }
    cli_catch_signals();
    uint64_t start = cli_now_ns();
    if (code < 0) code = reindex_names(c, store, &model, &list);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    human n, time;
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:o, s:f}", "contexts", json_count(list.n), "seconds", seconds));
    else if (code < 0 && !c->quiet)
        printf("indexed %s contexts in %s\n", human_count(&n, list.n), human_seconds(&time, seconds));
    names_wipe(&list);
    model_close(&model);
    return finish(store, code);
}

const cli_command command_reindex = {
    .name = "reindex",
    .summary = "landmark indexes anew",
    .usage = "STORE -m MODEL.gguf [-c NAMES] [--index KIND]",
    .about = "Builds the index files of contexts from their landmark keys. An index is derived data: without it, or\n"
             "when its files are damaged, answers are the same and come from a scan. 'auto' measures on this machine.",
    .example = "  cairn reindex library -m models/cairn-tiny-f16.gguf\n"
               "  cairn reindex library -m models/cairn-tiny-f16.gguf -c book --index hnsw",
    CLI_OPTIONS(reindex_options),
    .args = (const char *const[]){"STORE"},
    .min_args = 1,
    .max_args = 1,
    .run = run_reindex,
};

/* ---- compact ---- */

static int run_compact(cli *c, int argc, char **argv)
{
    (void)argc;
    cairn_store *store = NULL;
    cairn_store_stat before = {0}, after = {0};
    progress bar;
    int code = store_open(c, argv[0], NULL, false, &store);
    if (code >= 0) return code;
    cli_catch_signals();
    progress_init(&bar, c, "compact");
    cairn_status st = cairn_store_stat_get(store, &before);
    if (st == CAIRN_OK) st = cairn_store_compact(store, progress_callback, &bar);
    progress_clear(&bar);
    if (st == CAIRN_OK) st = cairn_store_stat_get(store, &after);
    human a, b;
    if (st == CAIRN_CANCELLED)
        code = cli_fail(c, EXIT_FAILED, "interrupted: the store is as it was");
    else if (st != CAIRN_OK)
        code = cli_fail_status(c, st);
    else if (c->json)
        code = cli_answer(c, json_pack("{s:o, s:o}", "bytes_before", json_count(before.file_bytes), "bytes_after",
                                       json_count(after.file_bytes)));
    else if (!c->quiet)
        printf("compacted: %s, was %s\n", human_bytes(&a, after.file_bytes), human_bytes(&b, before.file_bytes));
    return finish(store, code);
}

const cli_command command_compact = {
    .name = "compact",
    .summary = "free pages returned to the disk",
    .usage = "STORE",
    .about = "Copies what contexts refer to into a new data file and switches to it; needs the store to itself.\n"
             "Killed at any moment, the store is the old one or the new one.",
    .example = "  cairn compact library",
    .args = (const char *const[]){"STORE"},
    .min_args = 1,
    .max_args = 1,
    .run = run_compact,
};

/* ---- export, import ---- */

static int run_export(cli *c, int argc, char **argv)
{
    (void)argc;
    cairn_store *store = NULL;
    cairn_context_info info = {0};
    progress bar;
    int code = store_open(c, argv[0], NULL, true, &store);
    if (code < 0) code = find_info(c, store, argv[1], &info);
    if (code >= 0) return finish(store, code);
    cli_catch_signals();
    progress_init(&bar, c, "export");
    cairn_status st = cairn_context_export(store, argv[1], argv[2], progress_callback, &bar);
    progress_clear(&bar);
    struct stat file = {0};
    human tokens, bytes;
    if (st == CAIRN_CANCELLED)
        code = cli_fail(c, EXIT_FAILED, "interrupted: '%s' was not written", argv[2]);
    else if (st != CAIRN_OK)
        code = cli_fail_status(c, st);
    else if (stat(argv[2], &file) != 0)
        code = cli_fail(c, EXIT_FAILED, "cannot open '%s': %s", argv[2], strerror(errno));
    else if (c->json)
        code = cli_answer(c, json_pack("{s:s, s:o, s:o, s:o}", "exported", argv[1], "file",
                                       json_bytes(argv[2], strlen(argv[2])), "tokens", json_count(info.tokens), "bytes",
                                       json_count((uint64_t)file.st_size)));
    else if (!c->quiet)
        printf("exported '%s': %s tokens, %s\n", argv[1], human_count(&tokens, info.tokens),
               human_bytes(&bytes, (uint64_t)file.st_size));
    return finish(store, code);
}

const cli_command command_export = {
    .name = "export",
    .summary = "one context as one file",
    .usage = "STORE NAME FILE",
    .about =
        "FILE holds the tokens, landmark keys and tiles of the context with their hashes. It is written beside its\n"
        "name and renamed when whole.",
    .example = "  cairn export library book book.cairn",
    .args = (const char *const[]){"STORE", "NAME", "FILE"},
    .min_args = 3,
    .max_args = 3,
    .run = run_export,
};

static int run_import(cli *c, int argc, char **argv)
{
    cairn_store *store = NULL;
    cairn_store_options opt;
    cairn_context_info info = {0}, now = {0};
    progress bar;
    cairn_store_options_init(&opt, sizeof opt);
    cairn_status st = cairn_export_peek(argv[1], &opt.geometry, &opt.model, &info);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    const char *name = argc > 2 ? argv[2] : info.name;
    opt.create = true;
    if ((st = cairn_store_open(argv[0], &opt, &store)) != CAIRN_OK) return cli_fail_status(c, st);
    cli_catch_signals();
    progress_init(&bar, c, "import");
    st = cairn_context_import(store, argv[1], name, progress_callback, &bar);
    progress_clear(&bar);
    int code = -1;
    human tokens, blocks;
    if (st == CAIRN_CANCELLED)
        code = cli_fail(c, EXIT_FAILED, "interrupted: nothing of '%s' is in the store", argv[1]);
    else if (st != CAIRN_OK)
        code = cli_fail_status(c, st);
    else if ((code = find_info(c, store, name, &now)) >= 0)
        ;
    else if (c->json)
        code = cli_answer(c, json_pack("{s:s, s:o, s:o}", "imported", name, "tokens", json_count(now.tokens), "blocks",
                                       json_count(now.blocks)));
    else if (!c->quiet)
        printf("imported '%s': %s tokens, %s blocks\n", name, human_count(&tokens, now.tokens),
               human_count(&blocks, now.blocks));
    return finish(store, code);
}

const cli_command command_import = {
    .name = "import",
    .summary = "an exported context into a store, checked on the way in",
    .usage = "STORE FILE [NAME]",
    .about =
        "The whole file is checked before anything enters the store, which is made if it does not exist. Its model\n"
        "and geometry must be the file's. 'cairn reindex' builds the index; until then landmarks are scanned.",
    .example = "  cairn import other-library book.cairn\n  cairn import other-library book.cairn copy",
    .args = (const char *const[]){"STORE", "FILE"},
    .min_args = 2,
    .max_args = 3,
    .run = run_import,
};
