/* verify.c - every record of a store, and the names of what is damaged. */
#include "work.h"

#include <stdio.h>
#include <string.h>

static struct {
    bool deep;
} flags;
static const cli_option options[] = {
    OPT_FLAG("deep", 0, &flags.deep, "read every tile, not a sample"),
};

enum { SAID_MAX = 1000 }; /* a store that lost a disk has millions */

typedef struct findings { /* progress first: the callback of progress and of damage get the same pointer */
    progress bar;
    cli *c;
    json_t *damaged;
    uint64_t n;
} findings;

static void on_damage(void *arg, const char *sentence)
{
    findings *f = arg;
    if (f->n++ >= SAID_MAX) return;
    progress_clear(&f->bar);
    if (f->c->json)
        json_array_append_new(f->damaged, json_bytes(sentence, strlen(sentence)));
    else
        printf("damaged: %s\n", sentence);
}

static int run(cli *c, int argc, char **argv)
{
    (void)argc;
    cairn_store *store = NULL;
    cairn_verify_report report = {0};
    findings f = {.c = c};
    int code = store_open(c, argv[0], NULL, true, &store);
    if (code >= 0) return code;
    cli_catch_signals();
    f.damaged = json_array();
    progress_init(&f.bar, c, "verify");
    uint64_t start = cli_now_ns();
    cairn_status st = cairn_store_verify(store, flags.deep, on_damage, progress_callback, &f, &report);
    progress_clear(&f.bar);
    human contexts, blocks, tiles, bytes, time;
    if (st == CAIRN_CANCELLED) {
        code = cli_fail(c, EXIT_FAILED, "interrupted after %s", human_bytes(&bytes, report.bytes));
    } else if (st != CAIRN_OK && f.n == 0) {
        code = cli_fail_status(c, st);
    } else if (c->json) {
        code = cli_answer(c, json_pack("{s:b, s:O, s:o, s:o, s:o, s:o, s:o, s:o, s:b}", "sound", st == CAIRN_OK,
                                       "damaged", f.damaged, "damaged_count", json_count(report.damaged), "contexts",
                                       json_count(report.contexts), "segments", json_count(report.segments), "blocks",
                                       json_count(report.blocks), "tiles", json_count(report.tiles), "bytes",
                                       json_count(report.bytes), "deep", flags.deep));
        if (code == EXIT_DONE && st != CAIRN_OK) code = cli_exit_code(st);
    } else {
        if (f.n > SAID_MAX) printf("... and %llu more\n", (unsigned long long)(f.n - SAID_MAX));
        if (st != CAIRN_OK)
            code = cli_fail(c, cli_exit_code(st), "%llu damaged records in '%s'", (unsigned long long)f.n, argv[0]);
        else if (!c->quiet)
            printf("sound: %s contexts, %s blocks, %s tiles%s, %s read in %s\n",
                   human_count(&contexts, report.contexts), human_count(&blocks, report.blocks),
                   human_count(&tiles, report.tiles), flags.deep ? "" : " (a sample; --deep reads all)",
                   human_bytes(&bytes, report.bytes), human_seconds(&time, (double)(cli_now_ns() - start) * 1e-9));
    }
    json_decref(f.damaged);
    cairn_store_close(store);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_verify = {
    .name = "verify",
    .summary = "every record checked; exit 3 and the names of what is damaged",
    .usage = "STORE [--deep]",
    .about =
        "Checks the structure, all small records and a sample of the tiles against their hashes; with --deep every\n"
        "tile. Each damaged record is a line on stdout. Index files are derived data and not part of it.",
    .example = "  cairn verify library --deep",
    CLI_OPTIONS(options),
    .args = (const char *const[]){"STORE"},
    .min_args = 1,
    .max_args = 1,
    .run = run,
};
