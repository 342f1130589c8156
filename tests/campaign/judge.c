/* judge.c - what a store holds, for the campaigns: one process instead of a command for each question.
 *
 *   campaign_judge STORE DIR [compact]
 *
 * Checks every record (verify, deep), exports each context to DIR/<number> and prints a line for each: number, tokens,
 * whether its input is complete, name. With `compact` the store is compacted then, checked again, and its numbers
 * printed. Exit code 0, or 4 if there is no store, 1 otherwise with a sentence on stderr. */
#include <cairn/cairn.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NO_STORE = 4, CONTEXTS_MAX = 64 };

typedef struct list {
    cairn_context_info *items;
    size_t n;
} list;

static bool keep(void *arg, const cairn_context_info *info)
{
    list *l = arg;
    l->items[l->n++] = *info;
    return l->n < CONTEXTS_MAX;
}

static int fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, cairn_last_error());
    return 1;
}

static void say(void *arg, const char *sentence)
{
    (void)arg;
    fprintf(stderr, "damage: %s\n", sentence);
}

static int export_all(cairn_store *store, const char *dir, list *l)
{
    cairn_snapshot *snap = NULL;
    if (cairn_snapshot_begin(store, &snap) != CAIRN_OK) return fail("snapshot");
    cairn_status st = cairn_snapshot_contexts(snap, keep, l);
    cairn_snapshot_end(snap);
    if (st != CAIRN_OK) return fail("contexts");
    for (size_t i = 0; i < l->n; i++) {
        char path[4096];
        const cairn_context_info *info = &l->items[i];
        snprintf(path, sizeof path, "%s/%zu", dir, i);
        if (cairn_context_export(store, info->name, path, NULL, NULL) != CAIRN_OK) return fail(info->name);
        printf("%zu\t%" PRIu64 "\t%d\t%s\n", i, info->tokens, info->input.complete, info->name);
    }
    return 0;
}

int main(int argc, char **argv)
{
    cairn_store *store = NULL;
    cairn_store_stat stat;
    list l = {calloc(CONTEXTS_MAX, sizeof *l.items), 0};
    if (argc < 3 || l.items == NULL) return 2;
    cairn_status st = cairn_store_open(argv[1], NULL, &store);
    if (st == CAIRN_NOT_FOUND) return NO_STORE;
    if (st != CAIRN_OK) return fail("open");
    int code = cairn_store_verify(store, true, say, NULL, NULL, NULL) == CAIRN_OK ? 0 : fail("verify");
    if (code == 0) code = export_all(store, argv[2], &l);
    if (code == 0 && argc > 3 && strcmp(argv[3], "compact") == 0) {
        if (cairn_store_compact(store, NULL, NULL) != CAIRN_OK) code = fail("compact");
        if (code == 0 && cairn_store_verify(store, true, say, NULL, NULL, NULL) != CAIRN_OK) code = fail("verify");
        if (code == 0 && cairn_store_stat_get(store, &stat) != CAIRN_OK) code = fail("stat");
        if (code == 0)
            printf("contexts %" PRIu64 ", segments %" PRIu64 ", blocks %" PRIu64 ", tiles %" PRIu64 "\n", stat.contexts,
                   stat.segments, stat.blocks, stat.tiles);
    }
    cairn_store_close(store);
    free(l.items);
    return code;
}
