/* inspect.c - list, stat, show: what a store holds. All three only read. */
#include "work.h"

#include <cairn/index.h>

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *state_of(const cairn_context_info *info)
{
    if (info->input.bytes == 0 && info->input.hash == 0) return info->tokens > 0 ? "-" : "empty";
    return info->input.complete ? "complete" : "interrupted";
}

static json_t *context_json(const cairn_context_info *info, const char *parent)
{
    return json_pack("{s:s, s:o, s:o, s:o, s:i, s:s, s:o, s:o, s:i, s:o}", "name", info->name, "id",
                     json_count(info->id), "tokens", json_count(info->tokens), "blocks", json_count(info->blocks),
                     "tail_tokens", (int)info->tail_tokens, "state", state_of(info), "input_bytes",
                     json_count(info->input.bytes), "modified_ns", json_count(info->modified_ns), "ranges",
                     (int)info->ranges, "parent", parent != NULL ? json_string(parent) : json_null());
}

/* ---- list ---- */

typedef struct listing {
    cairn_snapshot *snap;
    char **patterns;
    int n_patterns;
    table *rows;
    json_t *json;
    size_t n;
} listing;

static bool list_one(void *arg, const cairn_context_info *info)
{
    listing *l = arg;
    bool wanted = l->n_patterns == 0;
    for (int i = 0; i < l->n_patterns && !wanted; i++)
        wanted = strcmp(l->patterns[i], info->name) == 0 || fnmatch(l->patterns[i], info->name, 0) == 0;
    if (!wanted) return true;
    l->n++;
    cairn_context_info parent;
    bool forked = info->parent != 0 && cairn_snapshot_context_by_id(l->snap, info->parent, &parent) == CAIRN_OK;
    if (l->json != NULL) {
        json_array_append_new(l->json, context_json(info, forked ? parent.name : NULL));
        return true;
    }
    human tokens, blocks, modified;
    const char *cells[] = {info->name,
                           human_count(&tokens, info->tokens),
                           human_count(&blocks, info->blocks),
                           state_of(info),
                           human_date(&modified, info->modified_ns),
                           forked ? parent.name : info->parent > 0 ? "(dropped)" : ""};
    table_row(l->rows, cells);
    return true;
}

static int run_list(cli *c, int argc, char **argv)
{
    cairn_store *store = NULL;
    cairn_snapshot *snap = NULL;
    int code = store_open(c, argv[0], NULL, true, &store);
    if (code >= 0) return code;
    static const char *const heads[] = {"NAME", "TOKENS", "BLOCKS", "STATE", "MODIFIED", "FORK OF"};
    static const bool right[] = {false, true, true, false, false, false};
    listing l = {.patterns = argv + 1, .n_patterns = argc - 1};
    cairn_status st = cairn_snapshot_begin(store, &snap);
    l.snap = snap;
    if (c->json)
        l.json = json_array();
    else
        l.rows = table_new(CLI_COUNT_OF(heads), heads, right);
    if (st == CAIRN_OK) st = cairn_snapshot_contexts(snap, list_one, &l);
    if (st != CAIRN_OK)
        code = cli_fail_status(c, st);
    else if (l.n == 0 && argc > 1)
        code = cli_fail(c, EXIT_FAILED, "no context matches '%s'", argv[1]);
    else if (c->json)
        code = cli_answer(c, json_pack("{s:O}", "contexts", l.json));
    else if (l.n == 0 && !c->quiet)
        printf("no contexts\n");
    if (code < 0 && !c->json && l.n > 0) table_print(l.rows), l.rows = NULL;
    table_free(l.rows);
    json_decref(l.json);
    cairn_snapshot_end(snap);
    cairn_store_close(store);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_list = {
    .name = "list",
    .summary = "the contexts of a store",
    .usage = "STORE [GLOB...]",
    .about = "One line per context: its tokens, whole blocks, whether the text it was made of is complete.",
    .example = "  cairn list library\n  cairn list library 'docs/*' --json",
    .args = (const char *const[]){"STORE"},
    .min_args = 1,
    .max_args = -1,
    .run = run_list,
};

/* ---- stat ---- */

typedef struct segment_rows {
    const cairn_range *ranges; /* NULL = all segments */
    size_t n_ranges;
    table *rows;
    json_t *json;
} segment_rows;

static bool stat_segment(void *arg, const cairn_segment_info *info)
{
    segment_rows *s = arg;
    bool wanted = s->ranges == NULL;
    for (size_t i = 0; i < s->n_ranges && !wanted; i++) wanted = s->ranges[i].segment == info->id;
    if (!wanted) return true;
    const char *asked = info->index_kind[0] != 0 ? info->index_kind : "auto";
    const char *made = info->index_made[0] != 0 ? info->index_made : "scan";
    if (s->json != NULL) {
        json_array_append_new(s->json,
                              json_pack("{s:o, s:i, s:i, s:o, s:o, s:i, s:o}", "id", json_count(info->id), "blocks",
                                        (int)info->blocks, "references", (int)info->references, "index_asked",
                                        json_bytes(asked, strlen(asked)), "index", json_bytes(made, strlen(made)),
                                        "index_blocks", (int)info->index_blocks, "why",
                                        json_bytes(info->index_why, strlen(info->index_why))));
        return true;
    }
    human id, blocks, indexed, refs;
    const char *cells[] = {human_count(&id, info->id),
                           human_count(&blocks, info->blocks),
                           human_count(&refs, info->references),
                           asked,
                           made,
                           human_count(&indexed, info->index_blocks),
                           info->index_why[0] != 0 ? info->index_why : "no index was made: every landmark is scanned"};
    table_row(s->rows, cells);
    return true;
}

static int stat_contexts(cli *c, cairn_store *store, cairn_snapshot *snap, const char *name, json_t *json,
                         cairn_range **ranges, size_t *n_ranges)
{
    cairn_context_info info;
    int code = context_find(c, snap, name, &info);
    if (code >= 0) return code;
    cairn_status st = cairn_snapshot_ranges(snap, info.id, NULL, 0, n_ranges);
    *ranges = calloc(*n_ranges + 1, sizeof **ranges);
    if (*ranges == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    if (st == CAIRN_OK) st = cairn_snapshot_ranges(snap, info.id, *ranges, *n_ranges, n_ranges);
    if (st != CAIRN_OK) return cli_fail_status(c, st);
    const cairn_geometry *g = cairn_store_geometry(store);
    uint64_t tile = cairn_tile_payload_bytes(g->dtype, g->block_tokens, g->head_dim);
    uint64_t bytes = info.blocks * (g->layers - g->first_layer) * g->kv_heads * tile;
    if (json != NULL) {
        json_t *context = context_json(&info, NULL);
        json_object_set_new(context, "tile_bytes", json_count(bytes));
        json_object_set_new(json, "context", context);
        return -1;
    }
    human tokens, blocks, size, made, changed;
    printf("context   %s: %s tokens, %s blocks and a tail of %u, %s of tiles, %s\n", info.name,
           human_count(&tokens, info.tokens), human_count(&blocks, info.blocks), info.tail_tokens,
           human_bytes(&size, bytes), state_of(&info));
    printf("          created %s, modified %s; input of %llu bytes, XXH3 %016llx\n", human_date(&made, info.created_ns),
           human_date(&changed, info.modified_ns), (unsigned long long)info.input.bytes,
           (unsigned long long)info.input.hash);
    for (size_t i = 0; i < *n_ranges; i++)
        printf("          segment %llu, blocks %u to %u\n", (unsigned long long)(*ranges)[i].segment,
               (*ranges)[i].first, (*ranges)[i].first + (*ranges)[i].count - 1);
    return -1;
}

static void stat_print(const char *path, const cairn_store *store, const cairn_store_stat *s, const char *tiers)
{
    const cairn_geometry *g = cairn_store_geometry(store);
    const cairn_model_id *m = cairn_store_model(store);
    human a, b, d, e;
    printf("store     %s, %s\n", path, s->uuid);
    char *name = printable_text(m->name, strlen(m->name), sizeof m->name); /* a GGUF file may call itself anything */
    printf("model     %s, fingerprint %016llx\n", name != NULL ? name : "?", (unsigned long long)m->fingerprint);
    free(name);
    printf("geometry  %u layers (%u to %u stored), %u KV heads of %u, blocks of %u tokens, %s tiles of %s\n", g->layers,
           g->first_layer, g->layers - 1, g->kv_heads, g->head_dim, g->block_tokens, cairn_dtype_name(g->dtype),
           human_bytes(&a, cairn_tile_payload_bytes(g->dtype, g->block_tokens, g->head_dim)));
    printf("file      %s: %s in use, %s free for reuse; indexes %s\n", human_bytes(&a, s->file_bytes),
           human_bytes(&b, s->used_bytes), human_bytes(&d, s->free_bytes), human_bytes(&e, s->index_bytes));
    printf("holds     %s contexts, %s segments, %s blocks, %s tiles; %u readers now\n", human_count(&a, s->contexts),
           human_count(&b, s->segments), human_count(&d, s->blocks), human_count(&e, s->tiles), s->readers);
    printf("tiers     %s (%s of memory is free)\n", tiers, human_bytes(&a, cairn_free_ram_bytes()));
}

static json_t *stat_json(const char *path, const cairn_store *store, const cairn_store_stat *s, const char *fetch,
                         const char *tiers)
{
    const cairn_geometry *g = cairn_store_geometry(store);
    const cairn_model_id *m = cairn_store_model(store);
    char fingerprint[24];
    snprintf(fingerprint, sizeof fingerprint, "%016llx", (unsigned long long)m->fingerprint);
    json_t *geometry = json_pack("{s:i, s:i, s:i, s:i, s:i, s:s}", "layers", (int)g->layers, "first_layer",
                                 (int)g->first_layer, "kv_heads", (int)g->kv_heads, "head_dim", (int)g->head_dim,
                                 "block_tokens", (int)g->block_tokens, "dtype", cairn_dtype_name(g->dtype));
    return json_pack("{s:o, s:s, s:{s:o, s:s}, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:i, s:s, s:s}", "path",
                     json_bytes(path, strlen(path)), "uuid", s->uuid, "model", "name",
                     json_bytes(m->name, strlen(m->name)), "fingerprint", fingerprint, "geometry", geometry,
                     "file_bytes", json_count(s->file_bytes), "used_bytes", json_count(s->used_bytes), "free_bytes",
                     json_count(s->free_bytes), "index_bytes", json_count(s->index_bytes), "contexts",
                     json_count(s->contexts), "segment_count", json_count(s->segments), "blocks", json_count(s->blocks),
                     "tiles", json_count(s->tiles), "readers", (int)s->readers, "fetch", fetch, "fetch_why", tiers);
}

static int run_stat(cli *c, int argc, char **argv)
{
    cairn_store *store = NULL;
    cairn_snapshot *snap = NULL;
    cairn_fetch *fetch = NULL;
    cairn_range *ranges = NULL;
    json_t *root = NULL;
    int code = store_open(c, argv[0], NULL, true, &store);
    if (code >= 0) return code;
    cairn_store_stat stat;
    static const char *const heads[] = {"SEGMENT", "BLOCKS", "USED BY", "ASKED", "INDEX", "INDEXED", "WHY"};
    static const bool right[] = {true, true, true, false, false, true, false};
    segment_rows rows = {0};
    cairn_status st = cairn_store_stat_get(store, &stat);
    if (st == CAIRN_OK) st = cairn_snapshot_begin(store, &snap);
    /* What `ask` would do now: the store's size against free memory, with a small tier. */
    if (st == CAIRN_OK) st = cairn_fetch_new(store, CAIRN_FETCH_AUTO, UINT64_C(8) << 20, &fetch);
    if (st != CAIRN_OK) {
        code = cli_fail_status(c, st);
        goto out;
    }
    const char *mode = cairn_fetch_mode_used(fetch) == CAIRN_FETCH_MAP ? "map" : "read";
    if (c->json)
        root = stat_json(argv[0], store, &stat, mode, cairn_fetch_reason(fetch));
    else
        stat_print(argv[0], store, &stat, cairn_fetch_reason(fetch));
    if (argc > 1 && (code = stat_contexts(c, store, snap, argv[1], root, &ranges, &rows.n_ranges)) >= 0) goto out;
    rows.ranges = ranges;
    if (c->json)
        rows.json = json_array();
    else
        rows.rows = table_new(CLI_COUNT_OF(heads), heads, right);
    if ((st = cairn_snapshot_segments(snap, stat_segment, &rows)) != CAIRN_OK) {
        code = cli_fail_status(c, st);
    } else if (c->json) {
        json_object_set(root, "segments", rows.json);
        code = cli_answer(c, json_incref(root));
    } else if (stat.segments > 0) {
        putchar('\n');
        table_print(rows.rows);
        rows.rows = NULL;
    }
out:
    table_free(rows.rows);
    json_decref(rows.json);
    json_decref(root);
    free(ranges);
    cairn_fetch_free(fetch);
    cairn_snapshot_end(snap);
    cairn_store_close(store);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_stat = {
    .name = "stat",
    .summary = "sizes, tiers, indexes and why they were chosen",
    .usage = "STORE [NAME]",
    .about =
        "The store as a whole and its segments (of NAME: those of one context): bytes on disk, how tiles would be\n"
        "reached now, which index was asked for, which was made, how many blocks it covers, and why.",
    .example = "  cairn stat library\n  cairn stat library book --json",
    .args = (const char *const[]){"STORE"},
    .min_args = 1,
    .max_args = 2,
    .run = run_stat,
};

/* ---- show ---- */

static struct {
    const char *model;
    bool blocks;
    uint64_t from, count;
} show = {.count = UINT64_MAX};

static const cli_option show_options[] = {
    OPT_TEXT("model", 'm', &show.model, "FILE", "the model: shows text; without it token ids"),
    OPT_FLAG("blocks", 0, &show.blocks, "a line per block: number, first token, where it is stored, what it says"),
    OPT_NUMBER(CLI_U64, "from", 0, &show.from, "N", "first token, or with --blocks first block (0)", 0, UINT64_MAX),
    OPT_NUMBER(CLI_U64, "count", 0, &show.count, "N", "how many of them (all)", 1, UINT64_MAX),
};

/* Ids as text, "1 187 192": what is shown without a model. */
static char *ids_text(const cairn_token *tokens, size_t n)
{
    char *text = malloc(12 * n + 1);
    size_t at = 0;
    for (size_t i = 0; text != NULL && i < n; i++)
        at += (size_t)sprintf(text + at, "%s%d", i > 0 ? " " : "", tokens[i]);
    if (text != NULL) text[at] = 0;
    return text;
}

static int show_tokens(cli *c, token_reader *reader, const cairn_model *model)
{
    enum { PIECE = 4096 };
    cairn_token *tokens = malloc(PIECE * sizeof *tokens);
    if (tokens == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    json_t *ids = c->json ? json_array() : NULL;
    char *all = NULL;
    size_t all_bytes = 0;
    int code = -1;
    for (uint64_t done = 0; code < 0 && done < show.count;) {
        size_t n = 0, want = show.count - done < PIECE ? (size_t)(show.count - done) : PIECE;
        cairn_status st = reader_tokens(reader, show.from + done, want, tokens, &n);
        if (st != CAIRN_OK) code = cli_fail_status(c, st);
        if (code >= 0 || n == 0) break;
        size_t bytes = 0;
        char *text = model != NULL ? tokens_text(model, tokens, n, &bytes) : ids_text(tokens, n);
        if (text == NULL) {
            code = cli_fail(c, EXIT_FAILED, "out of memory");
            break;
        }
        for (size_t i = 0; ids != NULL && i < n; i++) json_array_append_new(ids, json_integer(tokens[i]));
        if (!c->json && model != NULL)
            fwrite(text, 1, bytes, stdout);
        else if (!c->json)
            puts(text);
        if (c->json && model != NULL) {
            char *grown = realloc(all, all_bytes + bytes + 1);
            if (grown != NULL) memcpy(grown + all_bytes, text, bytes), all = grown, all_bytes += bytes;
        }
        free(text);
        done += n;
    }
    if (code < 0 && c->json) {
        json_t *root =
            json_pack("{s:s, s:o, s:O}", "context", reader->info.name, "from", json_count(show.from), "tokens", ids);
        if (model != NULL) json_object_set_new(root, "text", json_bytes(all != NULL ? all : "", all_bytes));
        code = cli_answer(c, root);
    }
    json_decref(ids);
    free(all);
    free(tokens);
    return code;
}

static int show_blocks(cli *c, token_reader *reader, const cairn_model *model)
{
    const uint32_t C = reader->block_tokens;
    cairn_token *tokens = malloc(C * sizeof *tokens);
    if (tokens == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    json_t *list = c->json ? json_array() : NULL;
    uint64_t all = reader->info.blocks + (reader->info.tail_tokens > 0);
    int code = -1;
    for (uint64_t b = show.from; code < 0 && b < all && b - show.from < show.count; b++) {
        uint64_t segment = 0, first = b * C;
        uint32_t number = 0;
        size_t n = 0, bytes = 0;
        cairn_status st = reader_tokens(reader, first, C, tokens, &n);
        if (st != CAIRN_OK) {
            code = cli_fail_status(c, st);
            break;
        }
        bool stored = reader_block(reader, b, &segment, &number);
        char *raw = model != NULL ? tokens_text(model, tokens, n, &bytes) : ids_text(tokens, n);
        if (raw != NULL && model == NULL) bytes = strlen(raw);
        char *text = raw != NULL ? printable_text(raw, bytes, 4096) : NULL;
        const char *words = text != NULL ? text : "";
        if (list != NULL) {
            json_t *entry =
                json_pack("{s:o, s:o, s:i}", "block", json_count(b), "token", json_count(first), "tokens", (int)n);
            json_object_set_new(entry, "segment", stored ? json_count(segment) : json_null());
            json_object_set_new(entry, "segment_block", stored ? json_count(number) : json_null());
            if (model != NULL) json_object_set_new(entry, "text", json_bytes(words, strlen(words)));
            json_array_append_new(list, entry);
        } else if (stored) {
            printf("%8llu  token %-10llu segment %llu block %-8u  %s\n", (unsigned long long)b,
                   (unsigned long long)first, (unsigned long long)segment, number, words);
        } else {
            printf("%8llu  token %-10llu tail of %-14zu  %s\n", (unsigned long long)b, (unsigned long long)first, n,
                   words);
        }
        free(raw);
        free(text);
    }
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:s, s:O}", "context", reader->info.name, "blocks", list));
    json_decref(list);
    free(tokens);
    return code;
}

static int run_show(cli *c, int argc, char **argv)
{
    (void)argc;
    model_ref model = {0};
    cairn_store *store = NULL;
    cairn_snapshot *snap = NULL;
    cairn_context_info info = {0};
    token_reader reader = {0};
    int code = show.model != NULL ? model_open(c, show.model, true, &model) : -1;
    if (code < 0) code = store_open(c, argv[0], show.model != NULL ? &model : NULL, true, &store);
    if (code < 0) {
        cairn_status st = cairn_snapshot_begin(store, &snap);
        if (st != CAIRN_OK) code = cli_fail_status(c, st);
    }
    if (code < 0) code = context_find(c, snap, argv[1], &info);
    if (code < 0) code = reader_init(c, store, snap, &info, &reader);
    uint64_t have = show.blocks ? info.blocks + (info.tail_tokens > 0) : info.tokens;
    if (code < 0 && show.from > 0 && show.from >= have)
        code = cli_usage(c, "--from: %llu is beyond the end, '%s' has %llu %s", (unsigned long long)show.from, argv[1],
                         (unsigned long long)have, show.blocks ? "blocks" : "tokens");
    if (code < 0) code = show.blocks ? show_blocks(c, &reader, model.model) : show_tokens(c, &reader, model.model);
    reader_wipe(&reader);
    cairn_snapshot_end(snap);
    cairn_store_close(store);
    model_close(&model);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_show = {
    .name = "show",
    .summary = "the tokens, the text or the blocks of a context",
    .usage = "STORE NAME [-m MODEL.gguf] [--blocks] [--from N] [--count N]",
    .about = "With a model the text of the context, byte for byte; without one its token ids.",
    .example = "  cairn show library book -m models/cairn-tiny-f16.gguf --from 1000 --count 200\n"
               "  cairn show library book --blocks --count 10",
    CLI_OPTIONS(show_options),
    .args = (const char *const[]){"STORE", "NAME"},
    .min_args = 2,
    .max_args = 2,
    .run = run_show,
};
