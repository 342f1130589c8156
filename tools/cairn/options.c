/* options.c - the command line as a table: getopt_long reads it, --help prints it. */
#include "cli.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OPTION_MAX = 40, LONG_VALUE = 256 };

static bool option_json, option_quiet, option_progress, option_help;
static const cli_option common_options[] = {
    OPT_FLAG("json", 0, &option_json, "one JSON object on stdout, errors included"),
    OPT_FLAG("progress", 0, &option_progress, "progress on stderr even if it is not a terminal"),
    OPT_FLAG("quiet", 'q', &option_quiet, "no progress, no summary"),
    OPT_FLAG("help", 'h', &option_help, "this page"),
};

/* ---- numbers ---- */

bool cli_parse_u64(const char *text, uint64_t *out)
{
    if (!isdigit((unsigned char)text[0])) return false; /* strtoull takes blanks and signs, people did not mean them */
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *end != 0) return false;
    *out = value;
    return true;
}

bool cli_parse_size(const char *text, uint64_t *out)
{
    if (!isdigit((unsigned char)text[0])) return false;
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0) return false;
    unsigned shift = 0;
    if (*end != 0) {
        static const char suffixes[] = "KMGT";
        const char *at = strchr(suffixes, toupper((unsigned char)*end));
        if (at == NULL) return false;
        shift = 10 * (unsigned)(at - suffixes + 1);
        end++;
        if (strcmp(end, "") != 0 && strcasecmp(end, "B") != 0 && strcasecmp(end, "iB") != 0) return false;
    }
    return !__builtin_mul_overflow((uint64_t)value, UINT64_C(1) << shift, out);
}

bool cli_parse_real(const char *text, double *out)
{
    char *end = NULL;
    if (text[0] == 0 || isspace((unsigned char)text[0])) return false;
    double value = strtod(text, &end);
    if (*end != 0 || !isfinite(value)) return false;
    *out = value;
    return true;
}

/* ---- one value ---- */

static int choice_of(const char *words, const char *value)
{
    size_t length = strlen(value);
    for (int i = 0;; i++) {
        const char *bar = strchr(words, '|');
        size_t n = bar != NULL ? (size_t)(bar - words) : strlen(words);
        if (n == length && strncmp(words, value, n) == 0) return i;
        if (bar == NULL) return -1;
        words = bar + 1;
    }
}

static int read_number(cli *c, const cli_option *o, const char *value, uint64_t *out)
{
    bool size = o->kind == CLI_SIZE || o->kind == CLI_SIZES;
    *out = UINT32_MAX;
    if ((o->kind == CLI_COUNT || o->kind == CLI_COUNTS) && strcmp(value, "all") == 0) return -1;
    if (!(size ? cli_parse_size(value, out) : cli_parse_u64(value, out)))
        return cli_usage(c, "--%s: '%s' is not a %s", o->name, value,
                         size ? "size such as 4096, 256M or 1G" : "whole number that fits");
    if (*out < o->min || *out > o->max)
        return cli_usage(c, "--%s: %s is not between %llu and %llu", o->name, value, (unsigned long long)o->min,
                         (unsigned long long)o->max);
    return -1;
}

static int set_number(cli *c, const cli_option *o, const char *value)
{
    uint64_t number = 0;
    int code = read_number(c, o, value, &number);
    if (code >= 0) return code;
    if (o->kind == CLI_SIZE || o->kind == CLI_U64)
        *(uint64_t *)o->out = number;
    else
        *(uint32_t *)o->out = (uint32_t)number;
    return -1;
}

static int read_real(cli *c, const cli_option *o, const char *value, double *out)
{
    if (!cli_parse_real(value, out)) return cli_usage(c, "--%s: '%s' is not a number", o->name, value);
    if (*out < o->low || *out > o->high)
        return cli_usage(c, "--%s: %s is not between %g and %g", o->name, value, o->low, o->high);
    return -1;
}

static int add_number(cli *c, const cli_option *o, const char *value)
{
    cli_numbers *list = o->out;
    uint64_t *items = realloc(list->items, (list->n + 1) * sizeof *items);
    if (items == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    list->items = items;
    int code = read_number(c, o, value, &items[list->n]);
    if (code < 0) list->n++;
    return code;
}

static int add_real(cli *c, const cli_option *o, const char *value)
{
    cli_reals *list = o->out;
    double *items = realloc(list->items, (list->n + 1) * sizeof *items);
    if (items == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    list->items = items;
    int code = read_real(c, o, value, &items[list->n]);
    if (code < 0) list->n++;
    return code;
}

/* "4,16,all": an empty part is a mistake like any other. */
static int set_list(cli *c, const cli_option *o, const char *value)
{
    char *copy = strdup(value), *rest = copy, *part;
    int code = copy != NULL ? -1 : cli_fail(c, EXIT_FAILED, "out of memory");
    while (code < 0 && (part = strsep(&rest, ",")) != NULL)
        code = o->kind == CLI_REALS ? add_real(c, o, part) : add_number(c, o, part);
    free(copy);
    return code;
}

static int set_option(cli *c, const cli_option *o, const char *value)
{
    switch (o->kind) {
    case CLI_U64S:
    case CLI_SIZES:
    case CLI_COUNTS:
    case CLI_REALS: return set_list(c, o, value);
    case CLI_FLAG: *(bool *)o->out = true; return -1;
    case CLI_TEXT: *(const char **)o->out = value; return -1;
    case CLI_TEXTS: {
        cli_texts *texts = o->out;
        const char **items = realloc(texts->items, (texts->n + 1) * sizeof *items);
        if (items == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
        texts->items = items;
        texts->items[texts->n++] = value;
        return -1;
    }
    case CLI_OPTIONAL:
        if (value == NULL) {
            *(uint32_t *)o->out = (uint32_t)o->low;
            return -1;
        }
        return set_number(c, o, value);
    case CLI_U32:
    case CLI_U64:
    case CLI_COUNT:
    case CLI_SIZE: return set_number(c, o, value);
    case CLI_REAL: {
        double real = 0;
        int code = read_real(c, o, value, &real);
        if (code < 0) *(double *)o->out = real;
        return code;
    }
    case CLI_CHOICE: {
        int choice = choice_of(o->arg, value);
        if (choice < 0) return cli_usage(c, "--%s: '%s' is none of %s", o->name, value, o->arg);
        *(int *)o->out = choice;
        return -1;
    }
    }
    return cli_usage(c, "--%s cannot be set", o->name);
}

/* ---- the whole line ---- */

static const cli_option *option_at(const cli_command *command, size_t i)
{
    return i < command->n_options ? &command->options[i] : &common_options[i - command->n_options];
}

static int unknown_option(cli *c, const cli_command *command, const char *word)
{
    const char *names[OPTION_MAX];
    size_t n = command->n_options + CLI_COUNT_OF(common_options);
    for (size_t i = 0; i < n; i++) names[i] = option_at(command, i)->name;
    char given[64];
    snprintf(given, sizeof given, "%.*s", (int)strcspn(word + 2, "="), word + 2);
    const char *nearest = cli_nearest(given, names, n);
    if (nearest != NULL) return cli_usage(c, "unknown option '--%s' (did you mean '--%s'?)", given, nearest);
    return cli_usage(c, "unknown option '--%s'", given);
}

int cli_parse(cli *c, const cli_command *command, int argc, char **argv, int *first)
{
    struct option longs[OPTION_MAX + 1] = {{0}};
    char shorts[3 * OPTION_MAX] = ":"; /* a leading colon: a missing value is reported as such */
    bool given[OPTION_MAX] = {false};
    size_t n = command->n_options + CLI_COUNT_OF(common_options);
    if (n > OPTION_MAX) abort();
    for (size_t i = 0; i < n; i++) {
        const cli_option *o = option_at(command, i);
        int has = o->kind == CLI_FLAG ? no_argument : o->kind == CLI_OPTIONAL ? optional_argument : required_argument;
        longs[i] = (struct option){o->name, has, NULL, LONG_VALUE + (int)i};
        if (o->letter == 0) continue;
        size_t end = strlen(shorts);
        shorts[end] = o->letter;
        if (has == required_argument) shorts[end + 1] = ':';
    }
    /* Seen before anything can go wrong, so that a usage error is JSON too. */
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--json") == 0) c->json = true;

    option_json = option_quiet = option_progress = option_help = false; /* said by this line or not at all */
    opterr = 0;
    optind = 0; /* glibc: forgets the line before, too */
    int found;
    while ((found = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        if (found == '?' || found == ':') {
            if (optopt >= LONG_VALUE) {
                const char *name = longs[optopt - LONG_VALUE].name;
                return found == ':' ? cli_usage(c, "--%s needs a value", name)
                                    : cli_usage(c, "--%s takes no value", name);
            }
            if (optopt == 0) return unknown_option(c, command, argv[optind - 1]);
            if (found == ':') return cli_usage(c, "-%c needs a value", optopt);
            return cli_usage(c, "unknown option '-%c'", optopt);
        }
        size_t i = 0;
        if (found >= LONG_VALUE)
            i = (size_t)(found - LONG_VALUE);
        else
            while (option_at(command, i)->letter != found) i++;
        given[i] = true;
        int code = set_option(c, option_at(command, i), optarg);
        if (code >= 0) return code;
    }
    if (option_help) {
        cli_print_help(command);
        return EXIT_DONE;
    }
    c->json = option_json;
    c->quiet = option_quiet;
    c->progress = option_progress;
    for (size_t i = 0; i < n; i++) {
        const cli_option *o = option_at(command, i);
        if (o->required && !given[i]) return cli_usage(c, "--%s %s is required", o->name, o->arg);
    }
    int positional = argc - optind;
    if (positional < command->min_args) return cli_usage(c, "%s is missing", command->args[positional]);
    if (command->max_args >= 0 && positional > command->max_args) {
        const char *extra = argv[optind + command->max_args];
        for (size_t i = 0; i < command->n_options; i++)
            if (command->options[i].kind == CLI_OPTIONAL && given[i])
                return cli_usage(c, "one argument too many: '%s' (a value of --%s is written --%s=%s)", extra,
                                 command->options[i].name, command->options[i].name, command->options[i].arg);
        return cli_usage(c, "one argument too many: '%s'", extra);
    }
    *first = optind;
    return -1;
}

/* ---- help ---- */

static void print_option(const cli_option *o)
{
    char left[80];
    const char *arg = o->kind == CLI_FLAG ? "" : o->arg;
    const char *open = o->kind == CLI_FLAG ? "" : o->kind == CLI_OPTIONAL ? "[=" : " ";
    const char *close = o->kind == CLI_OPTIONAL ? "]" : "";
    if (o->letter != 0)
        snprintf(left, sizeof left, "-%c, --%s%s%s%s", o->letter, o->name, open, arg, close);
    else
        snprintf(left, sizeof left, "    --%s%s%s%s", o->name, open, arg, close);
    if (strlen(left) > 28)
        printf("  %s\n  %-28s  %s\n", left, "", o->help);
    else
        printf("  %-28s  %s\n", left, o->help);
}

const char *cli_last_word(const cli_command *member)
{
    const char *blank = strrchr(member->name, ' ');
    return blank != NULL ? blank + 1 : member->name;
}

void cli_print_help(const cli_command *command)
{
    if (command->members != NULL) {
        printf("usage: cairn %s %s\n\n%s\n\n", command->name, command->usage, command->about);
        for (size_t i = 0; i < command->n_members; i++)
            printf("  %-8s  %s\n", cli_last_word(command->members[i]), command->members[i]->summary);
        printf("\n'cairn %s %s --help' shows its options; each has --json and --progress.\n\nexamples:\n%s\n",
               command->name, cli_last_word(command->members[0]), command->example);
        return;
    }
    printf("usage: cairn %s %s\n\n%s\n\noptions:\n", command->name, command->usage, command->about);
    for (size_t i = 0; i < command->n_options + CLI_COUNT_OF(common_options); i++) print_option(option_at(command, i));
    printf("\nexamples:\n%s\n", command->example);
}

/* Edits between two words: insert, delete, replace, swap of neighbours (Damerau 1964). Long words are never near. */
static size_t distance(const char *a, const char *b)
{
    enum { LONGEST = 31 };
    size_t n = strlen(a), m = strlen(b);
    if (n > LONGEST || m > LONGEST) return SIZE_MAX;
    size_t d[LONGEST + 1][LONGEST + 1];
    for (size_t i = 0; i <= n; i++) d[i][0] = i;
    for (size_t j = 0; j <= m; j++) d[0][j] = j;
    for (size_t i = 1; i <= n; i++) {
        for (size_t j = 1; j <= m; j++) {
            size_t best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            if (d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
            if (d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[i - 2][j - 2] + 1 < best)
                best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    }
    return d[n][m];
}

const char *cli_nearest(const char *word, const char *const *candidates, size_t n)
{
    const char *best = NULL;
    size_t best_distance = strlen(word) <= 3 ? 1 : 2;
    for (size_t i = 0; i < n; i++) {
        if (strlen(word) >= 2 && strncmp(word, candidates[i], strlen(word)) == 0) return candidates[i];
        size_t edits = distance(word, candidates[i]);
        if (edits > best_distance || (best != NULL && edits == best_distance)) continue;
        best_distance = edits;
        best = candidates[i];
    }
    return best;
}
