/* work.c - see work.h. */
#include "work.h"

#include <cairn/index.h>

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { READ_BLOCKS = 64 };

/* ---- model and store ---- */

int model_open(cli *c, const char *path, bool landmarks, model_ref *out)
{
    *out = (model_ref){.path = path};
    cairn_status st = cairn_model_open(path, &out->model);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    cairn_model_info_get(out->model, &out->info);
    out->shape = cairn_model_shape(out->model);
    if (landmarks && (out->info.landmark < 0 || out->shape->scheme == CAIRN_POSITION_DENSE)) {
        model_close(out);
        return cli_fail(c, EXIT_FAILED,
                        "'%s' is not a landmark model (no cairn.landmark.* metadata), so no block of "
                        "its memory can be found again",
                        path);
    }
    if ((st = cairn_model_identity(out->model, &out->id)) != CAIRN_OK) {
        int code = cli_fail_status(c, st);
        model_close(out);
        return code;
    }
    return -1;
}

void model_close(model_ref *m)
{
    cairn_model_close(m->model);
    m->model = NULL;
}

int store_open(cli *c, const char *path, const model_ref *model, bool read_only, cairn_store **out)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.read_only = read_only;
    cairn_status st = cairn_store_open(path, &opt, out);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    if (model == NULL) return -1;
    /* Again with the model, so that the library's own sentence names both sides: first the model itself, which a person
     * knows by name, then its geometry. A second open of a store is counted, not repeated. The element type is the
     * store's: a model does not prescribe it. */
    opt.model = model->id;
    for (int with_geometry = 0; with_geometry < 2 && st == CAIRN_OK; with_geometry++) {
        cairn_store *checked = NULL;
        if (with_geometry) cairn_model_geometry(model->model, cairn_store_geometry(*out)->dtype, &opt.geometry);
        st = cairn_store_open(path, &opt, &checked);
        cairn_store_close(checked);
    }
    if (st == CAIRN_OK) return -1;
    int code = cli_fail_status(c, st);
    cairn_store_close(*out);
    *out = NULL;
    return code;
}

/* ---- names ---- */

typedef struct gathering {
    name_list *list;
    const char *pattern;
    cairn_status status;
    size_t matches;
} gathering;

static cairn_status add_name(name_list *list, const char *name)
{
    char **items = realloc(list->items, (list->n + 1) * sizeof *items);
    if (items == NULL) return CAIRN_NO_MEMORY;
    list->items = items;
    if ((items[list->n] = strdup(name)) == NULL) return CAIRN_NO_MEMORY;
    list->n++;
    return CAIRN_OK;
}

static bool has_name(const name_list *list, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(list->items[i], name) == 0) return true;
    return false;
}

static bool gather(void *arg, const cairn_context_info *info)
{
    gathering *g = arg;
    if (fnmatch(g->pattern, info->name, 0) != 0) return true;
    g->matches++;
    g->status = add_name(g->list, info->name);
    return g->status == CAIRN_OK;
}

typedef struct guess {
    const char **names;
    size_t n;
} guess;

static bool gather_guess(void *arg, const cairn_context_info *info)
{
    guess *g = arg;
    const char **grown = realloc(g->names, (g->n + 1) * sizeof *grown);
    if (grown == NULL) return false;
    g->names = grown;
    if ((grown[g->n] = strdup(info->name)) == NULL) return false;
    return ++g->n < 1000; /* a hint is not worth a walk through a whole corpus */
}

static int unknown_context(cli *c, cairn_snapshot *snap, const char *name)
{
    guess g = {0};
    cairn_snapshot_contexts(snap, gather_guess, &g);
    const char *nearest = cli_nearest(name, g.names, g.n);
    int code =
        nearest != NULL ? cli_fail(c, EXIT_FAILED, "there is no context '%s' (did you mean '%s'?)", name, nearest)
        : g.n == 0      ? cli_fail(c, EXIT_FAILED, "there is no context '%s': the store holds none", name)
                   : cli_fail(c, EXIT_FAILED, "there is no context '%s': 'cairn list' shows those there are", name);
    for (size_t i = 0; i < g.n; i++) free((char *)g.names[i]);
    free(g.names);
    return code;
}

int context_find(cli *c, cairn_snapshot *snap, const char *name, cairn_context_info *out)
{
    cairn_status st = cairn_snapshot_context(snap, name, out);
    if (st == CAIRN_NOT_FOUND) return unknown_context(c, snap, name);
    return st == CAIRN_OK ? -1 : cli_fail_status(c, st);
}

/* One name or glob. A context may be called "a*b": what exists under the exact text wins. */
static int find_one(cli *c, cairn_snapshot *snap, const char *text, name_list *out)
{
    cairn_context_info info;
    cairn_status st = cairn_snapshot_context(snap, text, &info);
    if (st == CAIRN_OK) {
        if (has_name(out, out->n, text)) return -1;
        return add_name(out, text) == CAIRN_OK ? -1 : cli_fail(c, EXIT_FAILED, "out of memory");
    }
    if (st != CAIRN_NOT_FOUND && st != CAIRN_INVALID) return cli_fail_status(c, st);
    if (strpbrk(text, "*?[") == NULL) return unknown_context(c, snap, text);

    size_t before = out->n;
    gathering g = {.list = out, .pattern = text};
    st = cairn_snapshot_contexts(snap, gather, &g);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    if (g.status != CAIRN_OK) return cli_fail(c, EXIT_FAILED, "out of memory");
    if (g.matches == 0) return cli_fail(c, EXIT_FAILED, "no context matches '%s'", text);
    size_t kept = before;
    for (size_t i = before; i < out->n; i++) {
        if (has_name(out, before, out->items[i]))
            free(out->items[i]);
        else
            out->items[kept++] = out->items[i];
    }
    out->n = kept;
    return -1;
}

int names_find(cli *c, cairn_snapshot *snap, const cli_texts *texts, name_list *out)
{
    *out = (name_list){0};
    int code = -1;
    for (size_t i = 0; i < texts->n && code < 0; i++) {
        cairn_context_info info;
        if (strchr(texts->items[i], ',') == NULL || cairn_snapshot_context(snap, texts->items[i], &info) == CAIRN_OK) {
            code = find_one(c, snap, texts->items[i], out);
            continue;
        }
        char *copy = strdup(texts->items[i]), *rest = copy, *part;
        if (copy == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
        while (code < 0 && (part = strsep(&rest, ",")) != NULL)
            if (part[0] != 0) code = find_one(c, snap, part, out);
        free(copy);
    }
    if (code < 0 && out->n == 0) code = cli_usage(c, "--context: '%s' names nothing", texts->items[0]);
    if (code >= 0) names_wipe(out);
    return code;
}

void names_wipe(name_list *list)
{
    for (size_t i = 0; i < list->n; i++) free(list->items[i]);
    free(list->items);
    *list = (name_list){0};
}

/* ---- tokens ---- */

int reader_init(cli *c, cairn_store *store, cairn_snapshot *snap, const cairn_context_info *info, token_reader *out)
{
    *out = (token_reader){.snap = snap, .info = *info, .block_tokens = cairn_store_geometry(store)->block_tokens};
    size_t n = 0;
    cairn_status st = cairn_snapshot_ranges(snap, info->id, NULL, 0, &n);
    if (st == CAIRN_OK && n > 0) {
        if ((out->ranges = calloc(n, sizeof *out->ranges)) == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
        st = cairn_snapshot_ranges(snap, info->id, out->ranges, n, &out->n_ranges);
    }
    out->blocks = malloc((size_t)READ_BLOCKS * out->block_tokens * sizeof *out->blocks);
    if (st == CAIRN_OK && out->blocks != NULL) return -1;
    int code = st != CAIRN_OK ? cli_fail_status(c, st) : cli_fail(c, EXIT_FAILED, "out of memory");
    reader_wipe(out);
    return code;
}

void reader_wipe(token_reader *r)
{
    free(r->ranges);
    free(r->blocks);
    *r = (token_reader){0};
}

bool reader_block(const token_reader *r, uint64_t block, uint64_t *segment, uint32_t *number)
{
    for (size_t i = 0; i < r->n_ranges; i++) {
        if (block < r->ranges[i].count) {
            *segment = r->ranges[i].segment;
            *number = r->ranges[i].first + (uint32_t)block;
            return true;
        }
        block -= r->ranges[i].count;
    }
    return false;
}

/* Blocks that follow `block` in its range, itself included. */
static uint32_t run_of(const token_reader *r, uint64_t block)
{
    for (size_t i = 0; i < r->n_ranges; i++) {
        if (block < r->ranges[i].count) return r->ranges[i].count - (uint32_t)block;
        block -= r->ranges[i].count;
    }
    return 0;
}

cairn_status reader_tokens(token_reader *r, uint64_t from, size_t n, cairn_token *out, size_t *out_n)
{
    const uint32_t C = r->block_tokens;
    size_t done = 0;
    while (done < n && from + done < r->info.tokens) {
        uint64_t at = from + done, block = at / C;
        if (block >= r->info.blocks) { /* the tail: fewer than C tokens */
            size_t have = 0, skip = (size_t)(at - r->info.blocks * C);
            cairn_status st = cairn_snapshot_tail(r->snap, r->info.id, r->blocks, C, &have);
            if (st != CAIRN_OK) return st;
            if (have <= skip) break;
            size_t take = have - skip < n - done ? have - skip : n - done;
            memcpy(out + done, r->blocks + skip, take * sizeof *out);
            done += take;
            break;
        }
        uint64_t segment = 0;
        uint32_t number = 0, run = run_of(r, block);
        if (run == 0 || !reader_block(r, block, &segment, &number)) break;
        size_t offset = (size_t)(at % C), wanted = (offset + (n - done) + C - 1) / C;
        uint32_t count = run < READ_BLOCKS ? run : READ_BLOCKS;
        if (wanted < count) count = (uint32_t)wanted;
        cairn_status st = cairn_snapshot_tokens(r->snap, segment, number, count, r->blocks);
        if (st != CAIRN_OK) return st;
        size_t take = (size_t)count * C - offset;
        if (take > n - done) take = n - done;
        memcpy(out + done, r->blocks + offset, take * sizeof *out);
        done += take;
    }
    *out_n = done;
    return CAIRN_OK;
}

char *tokens_text(const cairn_model *model, const cairn_token *tokens, size_t n, size_t *out_bytes)
{
    enum { LONGEST = 256 }; /* bytes of one token */
    size_t cap = 4 * n + LONGEST, at = 0;
    char *text = malloc(cap + 1);
    for (size_t i = 0; text != NULL && i < n; i++) {
        if (cap - at < LONGEST) {
            cap *= 2;
            char *grown = realloc(text, cap + 1);
            if (grown == NULL) free(text);
            if ((text = grown) == NULL) break;
        }
        at += cairn_model_decode(model, tokens[i], text + at, LONGEST);
    }
    if (text == NULL) return NULL;
    text[at] = 0;
    *out_bytes = at;
    return text;
}

/* ---- sessions ---- */

int index_kind_check(cli *c, const char *kind, const model_ref *model)
{
    if (kind == NULL || strcmp(kind, "auto") == 0) return -1;
    if (kind[0] == 0) return cli_usage(c, "--index: '' is no kind of index");
    cairn_index *index = NULL;
    cairn_status st = cairn_index_new(kind, model->shape->head_dim, CAIRN_F32, &index);
    cairn_index_free(index);
    if (st == CAIRN_INVALID) return cli_usage(c, "--index: '%s': %s", kind, cairn_last_error());
    return st == CAIRN_OK ? -1 : cli_fail_status(c, st);
}

int session_options(cli *c, const session_flags *flags, const model_ref *model, cairn_session_options *out)
{
    int code = index_kind_check(c, flags->index, model);
    if (code >= 0) return code;
    cairn_session_options_init(out, sizeof *out, model->shape);
    static const cairn_fetch_mode modes[] = {CAIRN_FETCH_AUTO, CAIRN_FETCH_MAP, CAIRN_FETCH_READ};
    out->fetch = modes[flags->fetch];
    out->read_ahead = flags->read_ahead;
    out->ram_bytes = flags->ram_bytes;
    out->threads = flags->threads;
    /* "auto" is a question for reindex; a session that is told nothing uses what was made. */
    if (flags->index != NULL && strcmp(flags->index, "auto") != 0) out->index_kind = flags->index;
    if (flags->top_k != TOP_K_MODEL) out->policy.top_k = flags->top_k;
    return -1;
}

int policy_check(cli *c, const policy_flags *flags)
{
    if (flags->mass > 0 && flags->scope != CAIRN_SCOPE_TOKEN_HEAD)
        return cli_usage(c, "--mass: needs --scope token+head, where each row and head has its own choice");
    return -1;
}

void policy_set(const policy_flags *flags, cairn_policy *policy)
{
    static const cairn_scope scopes[] = {CAIRN_SCOPE_TOKEN_HEAD, CAIRN_SCOPE_HEAD, CAIRN_SCOPE_TOKEN};
    policy->scope = scopes[flags->scope];
    policy->mass = (float)flags->mass;
    if (flags->window != WINDOW_MODEL) policy->window_blocks = (int32_t)flags->window;
}
