/* figures.c - see figures.h. */
#include "figures.h"

#include <stdio.h>

int figures_begin(cli *c, const figure_flags *flags, const char *label, figures *out)
{
    *out = (figures){.c = c, .flags = flags, .start_ns = cli_now_ns()};
    progress_init(&out->bar, c, label);
    int code = plot_begin(c, flags->plot, &out->plot);
    if (code < 0) code = scratch_make(c, flags->dir, &out->dir);
    if (code >= 0) return code;
    machine_read(&out->machine, out->dir);
    cli_catch_signals(); /* from here on there is something to remove */
    return -1;
}

int figures_end(figures *f, int code)
{
    progress_clear(&f->bar);
    scratch_remove(f->dir);
    return plot_finish(f->c, f->plot, code);
}

int figures_stopped(figures *f)
{
    return cli_stopped() ? cli_fail(f->c, EXIT_FAILED, "interrupted") : -1;
}

void figures_print_head(const figures *f, const char *what)
{
    char line[512];
    if (f->c->quiet) return;
    printf("machine   %s\nmeasured  %s\n\n", machine_line(&f->machine, line), what);
}

json_t *figures_json(const figures *f, const char *name, uint32_t seed, json_t *cells)
{
    return json_pack("{s:s, s:s, s:o, s:I, s:i, s:f, s:o, s:o}", "bench", name, "version", cairn_version(), "machine",
                     machine_json(&f->machine), "seed", (json_int_t)seed, "repeats", (int)f->flags->repeats, "seconds",
                     (double)(cli_now_ns() - f->start_ns) * 1e-9, "peak_rss_bytes", json_count(cairn_peak_rss_bytes()),
                     "cells", cells);
}
