/* output.c - see output.h. Also where a command fails: one sentence on stderr, one object on stdout with --json. */
#include "output.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- failing ---- */

static progress *shown; /* the line that stands on the terminal, to be cleared before another is written */

/* Sentences quote names of files, models and contexts that a stranger may have chosen. */
static void say(const cli *c, const char *kind, const char *sentence)
{
    if (shown != NULL) progress_clear(shown);
    char *plain = plain_text(sentence);
    fprintf(stderr, "cairn%s%s: %s%s\n", c->command[0] != 0 ? " " : "", c->command, kind,
            plain != NULL ? plain : "out of memory");
    free(plain);
}

static void fail_json(cli *c, int code, const char *status, const char *sentence)
{
    snprintf(c->said, sizeof c->said, "%s", sentence);
    if (!c->json || c->answered) return;
    c->answered = true;
    json_t *root = json_pack("{s:{s:s, s:s, s:o, s:i}}", "error", "command", c->command, "status", status, "message",
                             json_bytes(sentence, strlen(sentence)), "exit", code);
    if (root == NULL) return;
    if (c->warnings != NULL) json_object_set(root, "warnings", c->warnings);
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(root);
}

int cli_fail(cli *c, int code, const char *format, ...)
{
    char sentence[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    say(c, "", sentence);
    fail_json(c, code, code == EXIT_DAMAGED ? "corrupt" : "failed", sentence);
    return code;
}

int cli_usage(cli *c, const char *format, ...)
{
    char sentence[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    say(c, "", sentence);
    fprintf(stderr, "'cairn %s%s--help' tells more\n", c->command, c->command[0] != 0 ? " " : "");
    fail_json(c, EXIT_USAGE, "usage", sentence);
    return EXIT_USAGE;
}

int cli_exit_code(cairn_status status)
{
    return status == CAIRN_OK ? EXIT_DONE : status == CAIRN_CORRUPT ? EXIT_DAMAGED : EXIT_FAILED;
}

int cli_fail_status(cli *c, cairn_status status)
{
    const char *sentence = cairn_last_error();
    if (sentence[0] == 0) sentence = cairn_status_name(status);
    say(c, "", sentence);
    fail_json(c, cli_exit_code(status), cairn_status_name(status), sentence);
    return cli_exit_code(status);
}

void cli_warn(cli *c, const char *format, ...)
{
    char sentence[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    say(c, "warning: ", sentence);
    if (c->warnings == NULL) c->warnings = json_array();
    if (c->warnings != NULL) json_array_append_new(c->warnings, json_bytes(sentence, strlen(sentence)));
}

/* ---- signals and time ---- */

static volatile sig_atomic_t stopped;

static void on_signal(int number)
{
    (void)number;
    stopped = 1;
}

void cli_catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool cli_stopped(void)
{
    return stopped != 0;
}

uint64_t cli_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* ---- for people ---- */

const char *human_bytes(human *h, uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    size_t unit = 0;
    for (; value >= 1024 && unit + 1 < CLI_COUNT_OF(units); unit++) value /= 1024;
    snprintf(h->text, sizeof h->text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return h->text;
}

const char *human_count(human *h, uint64_t n)
{
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n);
    size_t at = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) h->text[at++] = ',';
        h->text[at++] = digits[i];
    }
    h->text[at] = 0;
    return h->text;
}

const char *human_seconds(human *h, double seconds)
{
    if (seconds < 0.0995)
        snprintf(h->text, sizeof h->text, "%.1f ms", seconds * 1e3);
    else if (seconds < 59.95)
        snprintf(h->text, sizeof h->text, "%.*f s", seconds < 9.995 ? 2 : 1, seconds);
    else if (seconds < 3600)
        snprintf(h->text, sizeof h->text, "%d min %02d s", (int)seconds / 60, (int)seconds % 60);
    else
        snprintf(h->text, sizeof h->text, "%.0f h %02d min", (seconds - (double)((int64_t)seconds % 3600)) / 3600,
                 (int)((int64_t)seconds % 3600 / 60));
    return h->text;
}

const char *human_date(human *h, uint64_t wall_ns)
{
    time_t seconds = (time_t)(wall_ns / UINT64_C(1000000000));
    struct tm local;
    if (wall_ns == 0 || localtime_r(&seconds, &local) == NULL ||
        strftime(h->text, sizeof h->text, "%Y-%m-%d %H:%M:%S", &local) == 0)
        snprintf(h->text, sizeof h->text, "-");
    return h->text;
}

/* Length of the well-formed UTF-8 character at s (n bytes left), 0 if there is none (Unicode 15, table 3-7). */
static size_t utf8_length(const unsigned char *s, size_t n)
{
    unsigned char a = s[0];
    if (a < 0x80) return 1;
    size_t length = a >= 0xc2 && a <= 0xdf ? 2 : a >= 0xe0 && a <= 0xef ? 3 : a >= 0xf0 && a <= 0xf4 ? 4 : 0;
    if (length == 0 || length > n) return 0;
    unsigned char low = a == 0xe0 ? 0xa0 : a == 0xf0 ? 0x90 : 0x80;
    unsigned char high = a == 0xed ? 0x9f : a == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    return length;
}

/* C0, DEL and C1 (U+0080..U+009F, two bytes from 0xc2) can drive a terminal. */
static bool is_control(const unsigned char *s, size_t length)
{
    return length == 1 ? s[0] < 0x20 || s[0] == 0x7f : length == 2 && s[0] == 0xc2 && s[1] < 0xa0;
}

char *plain_text(const char *text)
{
    size_t n = strlen(text), at = 0;
    char *out = malloc(n + 1);
    if (out == NULL) return NULL;
    for (size_t i = 0; i < n;) {
        size_t length = utf8_length((const unsigned char *)text + i, n - i);
        if (length == 0 || is_control((const unsigned char *)text + i, length))
            out[at++] = '?';
        else
            memcpy(out + at, text + i, length), at += length;
        i += length == 0 ? 1 : length;
    }
    out[at] = 0;
    return out;
}

char *printable_text(const char *bytes, size_t n, size_t max_bytes)
{
    char *text = malloc(max_bytes + sizeof "...");
    if (text == NULL) return NULL;
    const unsigned char *s = (const unsigned char *)bytes;
    size_t at = 0;
    bool blank = false; /* a blank is due before the next character; none leads or trails */
    for (size_t i = 0; i < n;) {
        size_t length = utf8_length(s + i, n - i);
        if (s[i] == ' ' || is_control(s + i, length)) {
            blank = at > 0;
            i += length;
            continue;
        }
        size_t out = length == 0 ? 1 : length;
        if (at + blank + out > max_bytes) {
            memcpy(text + at, "...", 3);
            at += 3;
            break;
        }
        if (blank) text[at++] = ' ';
        blank = false;
        if (length == 0)
            text[at++] = '?';
        else
            memcpy(text + at, s + i, length), at += length;
        i += out;
    }
    text[at] = 0;
    return text;
}

/* ---- tables ---- */

struct table {
    size_t columns, rows, cap;
    const bool *right;
    char **cells; /* (rows, columns) */
};

static void table_add(table *t, const char *const *cells)
{
    if (t->rows == t->cap) {
        size_t cap = t->cap == 0 ? 64 : 2 * t->cap;
        char **grown = realloc(t->cells, cap * t->columns * sizeof *grown);
        if (grown == NULL) return;
        t->cells = grown;
        t->cap = cap;
    }
    for (size_t i = 0; i < t->columns; i++) /* a store may come from a stranger: no text of it drives the terminal */
        t->cells[t->rows * t->columns + i] = plain_text(cells[i]);
    t->rows++;
}

table *table_new(size_t columns, const char *const *heads, const bool *right)
{
    table *t = calloc(1, sizeof *t);
    if (t == NULL) return NULL;
    t->columns = columns;
    t->right = right;
    table_add(t, heads);
    return t;
}

void table_row(table *t, const char *const *cells)
{
    if (t != NULL) table_add(t, cells);
}

static size_t columns_of(const char *text) /* characters, not bytes */
{
    size_t n = 0;
    for (; *text != 0; text++) n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

void table_print(table *t)
{
    enum { COLUMNS_MAX = 16 };
    size_t width[COLUMNS_MAX] = {0};
    if (t == NULL || t->columns > COLUMNS_MAX) return table_free(t);
    for (size_t i = 0; i < t->rows * t->columns; i++) {
        size_t n = t->cells[i] != NULL ? columns_of(t->cells[i]) : 0;
        if (n > width[i % t->columns]) width[i % t->columns] = n;
    }
    for (size_t i = 0; i < t->rows * t->columns; i++) {
        size_t column = i % t->columns;
        const char *cell = t->cells[i] != NULL ? t->cells[i] : "";
        int pad = (int)(width[column] - columns_of(cell));
        bool last = column + 1 == t->columns;
        if (column > 0) fputs("  ", stdout);
        if (t->right[column]) printf("%*s", pad, "");
        fputs(cell, stdout);
        if (!t->right[column] && !last) printf("%*s", pad, "");
        if (last) putchar('\n');
    }
    table_free(t);
}

void table_free(table *t)
{
    if (t == NULL) return;
    for (size_t i = 0; i < t->rows * t->columns; i++) free(t->cells[i]);
    free(t->cells);
    free(t);
}

/* ---- JSON ---- */

json_t *json_bytes(const char *bytes, size_t n)
{
    const unsigned char *s = (const unsigned char *)bytes;
    char *text = malloc(3 * n + 1); /* U+FFFD takes three bytes */
    if (text == NULL) return NULL;
    size_t at = 0;
    for (size_t i = 0; i < n;) {
        size_t length = utf8_length(s + i, n - i);
        memcpy(text + at, length > 0 ? bytes + i : "\xef\xbf\xbd", length > 0 ? length : 3);
        at += length > 0 ? length : 3;
        i += length > 0 ? length : 1;
    }
    json_t *value = json_stringn_nocheck(text, at);
    free(text);
    return value;
}

json_t *json_count(uint64_t n)
{
    return json_integer((json_int_t)n);
}

int cli_answer(cli *c, json_t *root)
{
    if (root == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    c->answered = true;
    if (c->warnings != NULL) json_object_set(root, "warnings", c->warnings);
    bool written = json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) == 0 && putchar('\n') != EOF;
    json_decref(root);
    return written ? EXIT_DONE : cli_fail(c, EXIT_FAILED, "cannot write the answer: %s", strerror(errno));
}

int cli_answer_on(cli *c, json_t *root)
{
    int code = cli_answer(c, root);
    return code == EXIT_DONE ? -1 : code;
}

/* ---- progress ---- */

void progress_init(progress *p, const cli *c, const char *label)
{
    *p = (progress){.label = label, .start_ns = cli_now_ns()};
    p->terminal = isatty(STDERR_FILENO) == 1;
    p->on = !c->quiet && (p->terminal || c->progress);
    p->shown_ns = p->start_ns;
}

void progress_show(progress *p, uint64_t done, uint64_t total)
{
    enum { BAR = 20 };
    uint64_t now = cli_now_ns();
    if (!p->on || now - p->shown_ns < (p->terminal ? 200000000u : 1000000000u)) return;
    p->shown_ns = now;
    double seconds = (double)(now - p->start_ns) * 1e-9;
    double part = total > 0 ? (double)done / (double)total : 0;
    if (part > 1) part = 1;
    char bar[BAR + 1];
    memset(bar, '.', BAR);
    memset(bar, '#', (size_t)(part * BAR));
    bar[BAR] = 0;
    human bytes, all, left, rate, stored;
    double speed = (double)(done - p->from) / seconds;
    char line[256];
    int n = snprintf(line, sizeof line, "%.60s [%s] %3.0f %%  %s of %s", p->label, bar, part * 100,
                     human_bytes(&bytes, done), human_bytes(&all, total));
    if (p->unit != NULL)
        n += snprintf(line + n, sizeof line - (size_t)n, "  %s %s/s",
                      human_count(&rate, (uint64_t)((double)p->items / seconds)), p->unit);
    else
        n += snprintf(line + n, sizeof line - (size_t)n, "  %s/s", human_bytes(&rate, (uint64_t)speed));
    if (p->stored_bytes > 0)
        n += snprintf(line + n, sizeof line - (size_t)n, "  store %s", human_bytes(&stored, p->stored_bytes));
    if (speed > 0 && total > done)
        n += snprintf(line + n, sizeof line - (size_t)n, "  %s left",
                      human_seconds(&left, (double)(total - done) / speed));
    if (p->terminal)
        fprintf(stderr, "\r%s%*s", line, (int)(p->width > (size_t)n ? p->width - (size_t)n : 0), "");
    else
        fprintf(stderr, "%s\n", line);
    p->width = p->terminal ? (size_t)n : 0;
    shown = p->terminal ? p : NULL;
}

void progress_clear(progress *p)
{
    if (p->width > 0) fprintf(stderr, "\r%*s\r", (int)p->width, "");
    p->width = 0;
    if (shown == p) shown = NULL;
}

bool progress_callback(void *arg, uint64_t done, uint64_t total)
{
    progress_show(arg, done, total);
    return !cli_stopped();
}
