/* output.h - numbers and texts as people and as JSON read them, tables, and the progress line. */
#ifndef CAIRN_CLI_OUTPUT_H
#define CAIRN_CLI_OUTPUT_H

#include "cli.h"

/* ---- for people; each returns its buffer ---- */

typedef struct human {
    char text[48];
} human;
const char *human_bytes(human *h, uint64_t bytes);   /* "1.4 GiB" */
const char *human_count(human *h, uint64_t n);       /* "1,048,576" */
const char *human_seconds(human *h, double seconds); /* "1 min 20 s" */
const char *human_date(human *h, uint64_t wall_ns);  /* "2024-05-01 13:37:00", local time */

/* Text that may hold any bytes on one line of a terminal: runs of blanks and control characters become one blank,
 * bytes that are not UTF-8 a '?', at most max_bytes (then "..."). malloc'ed; NULL when out of memory. */
char *printable_text(const char *bytes, size_t n, size_t max_bytes);

/* The same text with a '?' for each control character and each byte that is not UTF-8. malloc'ed; NULL when out of
 * memory. */
char *plain_text(const char *text);

/* Columns are as wide as their widest cell; a column with right[i] is flush right. Cells are copied, as plain_text. */
typedef struct table table;
table *table_new(size_t columns, const char *const *heads, const bool *right);
void table_row(table *t, const char *const *cells);
void table_print(table *t); /* frees it */
void table_free(table *t);

/* ---- JSON ---- */

/* Any bytes as a JSON string; what is not UTF-8 becomes U+FFFD. */
json_t *json_bytes(const char *bytes, size_t n);
json_t *json_count(uint64_t n); /* integers beyond 2^63 - 1 (a fork "at the end") do not occur in output */
/* Prints the command's one answer and frees it; returns EXIT_DONE, or EXIT_FAILED if stdout refuses. */
int cli_answer(cli *c, json_t *root);
int cli_answer_on(cli *c, json_t *root); /* the same, but -1 for EXIT_DONE: there is more to do */

/* ---- progress: one line, rewritten on a terminal, a line a second elsewhere (only with --progress) ---- */

typedef struct progress {
    bool on;
    bool terminal;
    uint64_t start_ns;
    uint64_t shown_ns;
    size_t width; /* of the line that stands there */
    const char *label;
    const char *unit; /* "tokens": a rate of `items` is shown; NULL = bytes per second of done */
    uint64_t from;    /* what was done before this run (resume): not part of the rate */
    uint64_t items;
    uint64_t stored_bytes; /* 0 = not shown */
} progress;

void progress_init(progress *p, const cli *c, const char *label);
void progress_show(progress *p, uint64_t done, uint64_t total); /* cheap: draws at most 5 times a second */
void progress_clear(progress *p);                               /* before any other line on stderr */
/* The library's callback; arg is a progress. False once Ctrl-C was pressed. */
bool progress_callback(void *arg, uint64_t done, uint64_t total);

#endif
