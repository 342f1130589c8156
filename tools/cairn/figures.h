/* figures.h - what benches of the memory hierarchy share: a directory, repeats, a plot, the frame of a report. */
#ifndef CAIRN_CLI_FIGURES_H
#define CAIRN_CLI_FIGURES_H

#include "machine.h"
#include "plot.h"
#include "samples.h"
#include "scratch.h"

typedef struct figure_flags {
    const char *dir, *plot;
    uint32_t repeats;
} figure_flags;
#define FIGURE_OPTIONS(f, times)                                                                                       \
    OPT_NUMBER(CLI_U32, "repeats", 0, &(f).repeats, "N",                                                               \
               "measurements of each thing, after one that warms up (" times ")", 1, 100000),                          \
        OPT_TEXT("plot", 0, &(f).plot, "FILE.svg", "also draw the figures (needs gnuplot)"),                           \
        OPT_TEXT("dir", 0, &(f).dir, "DIR", "where stores are made, and removed afterwards ($TMPDIR or /tmp)")

typedef struct figures {
    cli *c;
    const figure_flags *flags;
    machine machine;
    plot *plot;
    char *dir; /* of this run */
    uint64_t start_ns;
    progress bar;
} figures;

/* Makes the directory and the plot; catches Ctrl-C. -1 or the exit code; figures_end either way: it removes the
 * directory, and the plot's file unless `code` is -1, and is the exit code of the command. */
int figures_begin(cli *c, const figure_flags *flags, const char *label, figures *out);
int figures_end(figures *f, int code);
int figures_stopped(figures *f); /* after Ctrl-C the exit code, said; else -1 */
/* The line above a table; not with --quiet. */
void figures_print_head(const figures *f, const char *what);
/* {"bench", "version", "machine", "seed", "repeats", "seconds", "peak_rss_bytes", "cells"}; steals cells. */
json_t *figures_json(const figures *f, const char *name, uint32_t seed, json_t *cells);

#endif
