/* bench_all.c - the benches of the memory hierarchy one after the other, each as a process of its own: memory, caches
 * and peaks of one do not touch the next. */
#include "bench.h"
#include "child.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static struct {
    const char *model, *dir, *plot;
    cli_texts corpus;
    double held_out;
    uint32_t seed;
    bool quick;
} flags = {.held_out = 0.05};

static const cli_option options[] = {
    OPT_NEEDED(CLI_TEXT, "model", 'm', &flags.model, "FILE", "a GGUF file with a vocabulary of bytes"),
    OPT_NEEDED(CLI_TEXTS, "corpus", 'c', &flags.corpus, "PATH",
               "text: a file or directory; more may follow as arguments"),
    OPT_REAL("held-out", &flags.held_out, "P",
             "the part of it that training left out; 1 = the model never saw any of it (0.05)", 1e-6, 1),
    OPT_FLAG("quick", 0, &flags.quick, "small sizes: some minutes, instead of an hour"),
    OPT_NUMBER(CLI_U32, "seed", 0, &flags.seed, "N", "of each bench (0)", 0, UINT32_MAX),
    OPT_TEXT("plot", 0, &flags.plot, "DIR", "also draw each bench's figures, DIR/fetch.svg and so on (needs gnuplot)"),
    OPT_TEXT("dir", 0, &flags.dir, "DIR", "where stores are made, and removed afterwards ($TMPDIR or /tmp)"),
};

enum { EXTRA_MAX = 16, ARGS_MAX = 48 };

typedef struct part {
    const char *name;
    bool model;                                     /* it reads text with one */
    const char *quick[EXTRA_MAX], *full[EXTRA_MAX]; /* NULL-terminated */
} part;

/* Those with a model and text first: if they cannot be read, it is said at once. */
static const part parts[] = {
    {"decode", true, {"--tokens", "16K,64K", "--steps", "200", "--cold", "5"}, {NULL}},
    {"recall",
     true,
     {"--tokens", "64K", "--synthetic", "256K", "--heads", "3", "--queries", "32"},
     {"--tokens", "64K,1M", "--synthetic", "1M,10M"}},
    {"ingest", true, {"--tokens", "16K,64K", "--repeats", "3"}, {NULL}},
    {"resume", true, {"--tokens", "16K,64K", "--repeats", "5"}, {"--tokens", "16K,256K,1M"}},
    {"fetch", false, {"--size", "256M", "--repeats", "7"}, {"--size", "2G", "--repeats", "15"}},
    {"attend", false, {"--size", "64M", "--repeats", "7"}, {"--size", "128M"}},
};

static int run_part(cli *c, const part *p, int argc, char **argv, json_t *answers)
{
    const char **args = calloc(ARGS_MAX + 2 * flags.corpus.n + (size_t)argc, sizeof *args);
    const char *const *extra = flags.quick ? p->quick : p->full;
    char seed[16], held_out[32], plot[4096];
    size_t n = 0;
    child got;
    if (args == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    snprintf(seed, sizeof seed, "%u", flags.seed);
    snprintf(held_out, sizeof held_out, "%.9g", flags.held_out);
    snprintf(plot, sizeof plot, "%s/%s.svg", flags.plot != NULL ? flags.plot : "", p->name);
    args[n++] = "bench", args[n++] = p->name, args[n++] = "--seed", args[n++] = seed;
    if (c->json) args[n++] = "--json";
    if (c->quiet) args[n++] = "--quiet";
    if (c->progress) args[n++] = "--progress";
    if (flags.dir != NULL) args[n++] = "--dir", args[n++] = flags.dir;
    if (flags.plot != NULL) args[n++] = "--plot", args[n++] = plot;
    for (size_t i = 0; i < EXTRA_MAX && extra[i] != NULL; i++) args[n++] = extra[i];
    if (p->model) {
        args[n++] = "-m", args[n++] = flags.model, args[n++] = "--held-out", args[n++] = held_out;
        for (size_t i = 0; i < flags.corpus.n; i++) args[n++] = "-c", args[n++] = flags.corpus.items[i];
        args[n++] = "--";
        for (int i = 0; i < argc; i++) args[n++] = argv[i];
    }
    if (!c->json) printf("== bench %s\n", p->name);
    int code = child_run(c, args, c->json, &got);
    free(args);
    if (code >= 0) return c->json && !c->answered ? cli_fail(c, code, "bench %s failed", p->name) : code;
    if (c->json) json_object_set(answers, p->name, got.answer);
    if (!c->json) printf("\n");
    child_wipe(&got);
    return cli_stopped() ? cli_fail(c, EXIT_FAILED, "interrupted after bench %s", p->name) : -1;
}

static int run(cli *c, int argc, char **argv)
{
    json_t *answers = json_object();
    uint64_t start = cli_now_ns();
    int code = -1;
    if (flags.plot != NULL && mkdir(flags.plot, 0777) != 0 && errno != EEXIST)
        code = cli_fail(c, EXIT_FAILED, "--plot: cannot make directory '%s': %s", flags.plot, strerror(errno));
    if (code < 0) cli_catch_signals(); /* the bench under way is interrupted too, and tidies up */
    for (size_t i = 0; code < 0 && i < CLI_COUNT_OF(parts); i++) code = run_part(c, &parts[i], argc, argv, answers);
    double seconds = (double)(cli_now_ns() - start) * 1e-9;
    if (code < 0 && c->json)
        code = cli_answer(c, json_pack("{s:s, s:s, s:b, s:f, s:O}", "bench", "all", "version", cairn_version(), "quick",
                                       flags.quick, "seconds", seconds, "benches", answers));
    human took;
    if (code < 0 && !c->quiet) printf("all of it took %s\n", human_seconds(&took, seconds));
    json_decref(answers);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_bench_all = {
    .name = "bench all",
    .summary = "decode, recall, ingest, resume, fetch and attend, one after the other",
    .usage = "-m MODEL.gguf --corpus PATH [--quick] [options] [PATH...]",
    .about = "Runs the benches of the memory hierarchy, each in a process of its own. With --json their answers come "
             "as one\n"
             "object, by name.",
    .example = "  cairn bench all --quick -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc\n"
               "  cairn bench all -m model.gguf --corpus text --json --plot figures",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = -1,
    .run = run,
};
