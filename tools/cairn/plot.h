/* plot.h - a bench's figures as an SVG drawn by gnuplot. */
#ifndef CAIRN_CLI_PLOT_H
#define CAIRN_CLI_PLOT_H

#include "cli.h"

typedef struct plot plot;

/* `path` NULL: *out is NULL, and every call below does nothing with it. Fails, before anything is measured, if gnuplot
 * is not installed or the file cannot be written. */
int plot_begin(cli *c, const char *path, plot **out);
void plot_axes(plot *p, const char *title, const char *x, const char *y, bool log_x, bool log_y);
/* Points of one series are joined in the order given. low and high are its spread; equal to y: no bar. */
void plot_point(plot *p, const char *series, double x, double y, double low, double high);
/* Draws if `code` is -1; else the file that nothing was drawn into is removed. Frees. The exit code of the command. */
int plot_finish(cli *c, plot *p, int code);

#endif
