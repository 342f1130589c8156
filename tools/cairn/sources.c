/* sources.c - see sources.h. */
#include "sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SOURCE_TEXT_BYTES = 240 };

static int span_text(cli *c, cairn_store *store, cairn_snapshot *snap, const model_ref *model, source_span *span)
{
    cairn_context_info info;
    token_reader reader = {0};
    int code = context_find(c, snap, span->context, &info);
    if (code < 0) code = reader_init(c, store, snap, &info, &reader);
    if (code >= 0) return code;
    size_t n = 0, bytes = 0;
    cairn_token *tokens = malloc((span->tokens + (size_t)1) * sizeof *tokens);
    cairn_status st = tokens != NULL ? reader_tokens(&reader, span->token, span->tokens, tokens, &n) : CAIRN_NO_MEMORY;
    if (st == CAIRN_OK) {
        char *text = tokens_text(model->model, tokens, n, &bytes);
        if (text != NULL) span->text = printable_text(text, bytes, SOURCE_TEXT_BYTES);
        free(text);
    }
    free(tokens);
    reader_wipe(&reader);
    return st == CAIRN_OK ? -1 : cli_fail_status(c, st);
}

int sources_gather(cli *c, cairn_store *store, const model_ref *model, const name_list *contexts,
                   const cairn_session *session, size_t top, sources *out)
{
    *out = (sources){0};
    cairn_session_info info;
    cairn_session_info_get(session, &info);
    size_t cap = (size_t)(info.old_blocks + info.own_blocks) + 64;
    const size_t most = (size_t)1 << 16; /* an answer of 64 tokens touches far fewer */
    if (cap > most) cap = most;
    cairn_source *found = malloc(cap * sizeof *found);
    bool *seen = calloc(contexts->n, sizeof *seen);
    out->spans = calloc(top + 1, sizeof *out->spans);
    out->idle = calloc(contexts->n, sizeof *out->idle);
    cairn_snapshot *snap = NULL;
    int code = -1;
    if (found == NULL || seen == NULL || out->spans == NULL || out->idle == NULL) {
        code = cli_fail(c, EXIT_FAILED, "out of memory");
        goto out;
    }
    size_t n = cairn_session_sources(session, found, cap);
    if (n > cap) n = cap;
    double all = 0;
    for (size_t i = 0; i < n; i++) {
        if (found[i].context >= contexts->n || !(found[i].mass > 0)) continue;
        out->blocks++;
        all += found[i].mass;
        seen[found[i].context] = true;
    }
    for (size_t i = 0; i < contexts->n; i++)
        if (!seen[i]) out->idle[out->n_idle++] = contexts->items[i];
    cairn_status st = cairn_snapshot_begin(store, &snap);
    if (st != CAIRN_OK) code = cli_fail_status(c, st);
    for (size_t i = 0; i < n && out->n < top && code < 0; i++) {
        if (found[i].context >= contexts->n || !(found[i].mass > 0)) continue;
        source_span *span = &out->spans[out->n++];
        *span = (source_span){.context = contexts->items[found[i].context],
                              .token = found[i].token,
                              .tokens = found[i].tokens,
                              .share = found[i].mass / all};
        code = span_text(c, store, snap, model, span);
    }
out:
    cairn_snapshot_end(snap);
    free(found);
    free(seen);
    if (code >= 0) sources_wipe(out);
    return code;
}

void sources_wipe(sources *s)
{
    for (size_t i = 0; s->spans != NULL && i < s->n; i++) free(s->spans[i].text);
    free(s->spans);
    free(s->idle);
    *s = (sources){0};
}

void sources_print(const sources *s)
{
    if (s->n == 0) fprintf(stderr, "sources: none, no stored block was looked at\n");
    for (size_t i = 0; i < s->n; i++) {
        human at;
        fprintf(stderr, "%s %5.1f %%  %s, token %s: %s\n", i == 0 ? "sources:" : "        ", 100 * s->spans[i].share,
                s->spans[i].context, human_count(&at, s->spans[i].token),
                s->spans[i].text != NULL ? s->spans[i].text : "");
    }
}

json_t *sources_json(const sources *s)
{
    json_t *list = json_array();
    for (size_t i = 0; i < s->n; i++) {
        const source_span *span = &s->spans[i];
        const char *text = span->text != NULL ? span->text : "";
        json_array_append_new(list, json_pack("{s:s, s:o, s:i, s:f, s:o}", "context", span->context, "token",
                                              json_count(span->token), "tokens", (int)span->tokens, "share",
                                              span->share, "text", json_bytes(text, strlen(text))));
    }
    return list;
}
