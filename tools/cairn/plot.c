/* plot.c - see plot.h. The file is opened first and is gnuplot's standard output, the commands and the data are an
 * unlinked file that is its standard input: no name passes through a shell or needs gnuplot's quotes. */
#include "plot.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SERIES_MAX = 48 };
extern char **environ;

typedef struct point {
    double x, y, low, high;
} point;

typedef struct series {
    char name[80];
    point *points;
    size_t n;
} series;

struct plot {
    const char *path;
    int fd;
    char title[160], x[80], y[80];
    bool log_x, log_y, lost;
    series series[SERIES_MAX];
    size_t n;
};

/* Runs gnuplot with those descriptors; *status as waitpid gives it. 0 or errno. */
static int run_gnuplot(char *const *argv, int in, int out, int *status)
{
    posix_spawn_file_actions_t actions;
    pid_t pid = 0;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
    int error = posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    while (error == 0 && waitpid(pid, status, 0) < 0)
        if (errno != EINTR) error = errno;
    return error;
}

int plot_begin(cli *c, const char *path, plot **out)
{
    char *const argv[] = {"gnuplot", "--version", NULL};
    *out = NULL;
    if (path == NULL) return -1;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), status = 0;
    int error = run_gnuplot(argv, null, null, &status);
    if (null >= 0) close(null);
    if (error != 0 || status != 0)
        return cli_fail(c, EXIT_FAILED, "--plot: gnuplot cannot be run (%s); Debian's package is gnuplot-nox",
                        error != 0 ? strerror(error) : "it failed");
    plot *p = calloc(1, sizeof *p);
    if (p == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    p->path = path;
    p->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (p->fd < 0) {
        free(p);
        return cli_fail(c, EXIT_FAILED, "--plot: cannot write '%s': %s", path, strerror(errno));
    }
    *out = p;
    return -1;
}

void plot_axes(plot *p, const char *title, const char *x, const char *y, bool log_x, bool log_y)
{
    if (p == NULL) return;
    snprintf(p->title, sizeof p->title, "%s", title);
    snprintf(p->x, sizeof p->x, "%s", x);
    snprintf(p->y, sizeof p->y, "%s", y);
    p->log_x = log_x;
    p->log_y = log_y;
}

void plot_point(plot *p, const char *name, double x, double y, double low, double high)
{
    size_t i = 0;
    if (p == NULL) return;
    while (i < p->n && strcmp(p->series[i].name, name) != 0) i++;
    if (i == SERIES_MAX) return;
    if (i == p->n) snprintf(p->series[p->n++].name, sizeof p->series[i].name, "%s", name);
    series *s = &p->series[i];
    point *grown = realloc(s->points, (s->n + 1) * sizeof *grown);
    p->lost |= grown == NULL;
    if (grown == NULL) return;
    s->points = grown;
    s->points[s->n++] = (point){x, y, low, high};
}

/* In gnuplot's single quotes a quote is doubled and nothing else means anything. */
static void put_quoted(FILE *f, const char *text)
{
    putc('\'', f);
    for (; *text != 0; text++) {
        if (*text == '\'') putc('\'', f);
        putc(*text, f);
    }
    putc('\'', f);
}

static void put_script(FILE *f, const plot *p)
{
    for (size_t i = 0; i < p->n; i++) {
        fprintf(f, "$series%zu << END\n", i);
        for (size_t k = 0; k < p->series[i].n; k++) {
            point at = p->series[i].points[k];
            fprintf(f, "%.9g %.9g %.9g %.9g\n", at.x, at.y, at.low, at.high);
        }
        fputs("END\n", f);
    }
    fputs("set terminal svg size 900,560 background 'white' noenhanced\nset grid\nset key outside right\n", f);
    fputs("set title ", f), put_quoted(f, p->title);
    fputs("\nset xlabel ", f), put_quoted(f, p->x);
    fputs("\nset ylabel ", f), put_quoted(f, p->y);
    fputs(p->log_x ? "\nset logscale x 2" : "\nset offsets graph 0.05, graph 0.05, 0, 0", f);
    fputs(p->log_y ? "\nset logscale y\nplot " : "\nset yrange [0:*]\nplot ", f);
    for (size_t i = 0; i < p->n; i++) {
        fprintf(f, "%s$series%zu with yerrorlines pointtype %zu title ", i > 0 ? ", " : "", i, i % 15 + 1);
        put_quoted(f, p->series[i].name);
    }
    putc('\n', f);
}

static void wipe(plot *p)
{
    for (size_t i = 0; i < p->n; i++) free(p->series[i].points);
    close(p->fd);
    free(p);
}

static int draw(cli *c, plot *p)
{
    char *const argv[] = {"gnuplot", "-", NULL};
    int code = -1, status = 0;
    FILE *f = tmpfile();
    if (f != NULL) put_script(f, p);
    if (f == NULL || p->lost || fflush(f) != 0 || lseek(fileno(f), 0, SEEK_SET) != 0) {
        code = cli_fail(c, EXIT_FAILED, "--plot: cannot write what gnuplot shall draw: %s", strerror(errno));
    } else {
        int error = run_gnuplot(argv, fileno(f), p->fd, &status);
        if (error != 0 || status != 0)
            code = cli_fail(c, EXIT_FAILED, "--plot: gnuplot did not draw '%s' (%s)", p->path,
                            error != 0 ? strerror(error) : "it failed");
    }
    if (f != NULL) fclose(f);
    return code;
}

int plot_finish(cli *c, plot *p, int code)
{
    if (p != NULL && code < 0) code = draw(c, p);
    if (p != NULL && code >= 0) unlink(p->path);
    if (p != NULL) wipe(p);
    return code < 0 ? EXIT_DONE : code;
}
