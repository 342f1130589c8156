/* cli.h - what every subcommand of `cairn` shares: its table entry, its options, its way of failing.
 *
 * A subcommand is one cli_command: words for --help, a table of options, and run(). main.c finds it, options.c fills
 * the variables its table points at, run() does the work and returns the exit code. One run is one process, so options
 * live in file-level statics with their defaults.
 *
 * Answers go to stdout; errors, warnings and progress to stderr as "cairn ask: <sentence>". With --json stdout carries
 * exactly one JSON object, {"error": {...}} when the command failed (the sentence is on stderr all the same).
 */
#ifndef CAIRN_CLI_H
#define CAIRN_CLI_H

#include <cairn/base.h>

#include <jansson.h>

enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_DAMAGED = 3 };

typedef struct cli {
    const char *command; /* "ask"; "" before one is known */
    bool json;
    bool quiet;        /* no summary, no progress */
    bool progress;     /* progress even when stderr is no terminal */
    uint64_t start_ns; /* monotonic clock when the process began */
    json_t *warnings;  /* strings, reported in the JSON answer; NULL = none yet */
    bool answered;     /* stdout carries its JSON object */
    char said[2048];   /* the last sentence of a failure */
} cli;

/* ---- options ---- */

typedef enum cli_kind {
    CLI_FLAG,     /* bool */
    CLI_TEXT,     /* const char *, as given */
    CLI_TEXTS,    /* cli_texts: may be given several times */
    CLI_U32,      /* uint32_t in [min, max] */
    CLI_U64,      /* uint64_t in [min, max] */
    CLI_COUNT,    /* uint32_t in [min, max], or "all" = UINT32_MAX */
    CLI_OPTIONAL, /* uint32_t in [min, max]; the value is optional (--sources, --sources=9), `low` if left out */
    CLI_REAL,     /* double in [low, high] */
    CLI_SIZE,     /* uint64_t bytes in [min, max]: 4096, 256M, 1G (powers of 1024) */
    CLI_U64S,     /* cli_numbers: whole numbers separated by commas */
    CLI_SIZES,    /* cli_numbers: sizes separated by commas */
    CLI_COUNTS,   /* cli_numbers: counts separated by commas, "all" = UINT32_MAX */
    CLI_REALS,    /* cli_reals: numbers in [low, high] separated by commas */
    CLI_CHOICE    /* int: number of the word in `arg`, "auto|map|read" */
} cli_kind;

typedef struct cli_texts {
    const char **items;
    size_t n;
} cli_texts;

typedef struct cli_numbers { /* given again, an option adds to its list */
    uint64_t *items;
    size_t n;
} cli_numbers;

typedef struct cli_reals {
    double *items;
    size_t n;
} cli_reals;

typedef struct cli_option {
    const char *name; /* without the dashes */
    void *out;
    const char *arg; /* what --help calls the value; the words of a CHOICE */
    const char *help;
    uint64_t min, max;
    double low, high;
    cli_kind kind;
    char letter; /* short form, 0 = none */
    bool required;
} cli_option;

/* Rows of a table. */
#define OPT_FLAG(name, letter, out, help)                                                                              \
    {                                                                                                                  \
        name, out, NULL, help, 0, 0, 0, 0, CLI_FLAG, letter, false                                                     \
    }
#define OPT_TEXT(name, letter, out, arg, help)                                                                         \
    {                                                                                                                  \
        name, out, arg, help, 0, 0, 0, 0, CLI_TEXT, letter, false                                                      \
    }
#define OPT_TEXTS(name, letter, out, arg, help)                                                                        \
    {                                                                                                                  \
        name, out, arg, help, 0, 0, 0, 0, CLI_TEXTS, letter, false                                                     \
    }
#define OPT_NEEDED(kind, name, letter, out, arg, help)                                                                 \
    {                                                                                                                  \
        name, out, arg, help, 0, 0, 0, 0, kind, letter, true                                                           \
    }
#define OPT_CHOICE(name, out, words, help)                                                                             \
    {                                                                                                                  \
        name, out, words, help, 0, 0, 0, 0, CLI_CHOICE, 0, false                                                       \
    }
#define OPT_REAL(name, out, arg, help, low, high)                                                                      \
    {                                                                                                                  \
        name, out, arg, help, 0, 0, low, high, CLI_REAL, 0, false                                                      \
    }
#define OPT_REALS(name, out, arg, help, low, high)                                                                     \
    {                                                                                                                  \
        name, out, arg, help, 0, 0, low, high, CLI_REALS, 0, false                                                     \
    }
#define OPT_NUMBER(kind, name, letter, out, arg, help, min, max)                                                       \
    {                                                                                                                  \
        name, out, arg, help, min, max, 0, 0, kind, letter, false                                                      \
    }
#define OPT_OPTIONAL(name, out, arg, help, min, max, fallback)                                                         \
    {                                                                                                                  \
        name, out, arg, help, min, max, fallback, 0, CLI_OPTIONAL, 0, false                                            \
    }

typedef struct cli_command {
    const char *name;
    const char *summary; /* one line for `cairn --help` */
    const char *usage;   /* what follows the name: "STORE FROM TO [--at TOKENS]" */
    const char *about;   /* paragraphs for its own --help */
    const char *example; /* whole command lines */
    const cli_option *options;
    size_t n_options;
    const char *const *args; /* names of the required positional arguments, in order */
    int min_args;
    int max_args; /* -1 = any number */
    int (*run)(cli *c, int argc, char **argv);
    /* A group instead: "bench" is followed by the last word of one of its members, "bench passkey". It has no options
     * and no run() of its own. */
    const struct cli_command *const *members;
    size_t n_members;
} cli_command;

#define CLI_COUNT_OF(array) (sizeof(array) / sizeof(array)[0])
#define CLI_OPTIONS(table)  .options = (table), .n_options = CLI_COUNT_OF(table)

extern const cli_command command_ingest, command_ask, command_list, command_stat, command_show, command_fork,
    command_drop, command_rename, command_verify, command_reindex, command_compact, command_export, command_import,
    command_logits, command_train, command_bench;

/* Fills the variables of the command's table from argv[1..]; --json, --quiet, --progress and --help belong to every
 * command. Returns -1 to go on (positional arguments are then argv[*first..argc)) or the exit code. */
int cli_parse(cli *c, const cli_command *command, int argc, char **argv, int *first);
void cli_print_help(const cli_command *command);
const char *cli_last_word(const cli_command *member); /* "passkey" of "bench passkey" */
/* The candidate nearest to `word` if it could be a slip of the fingers, else NULL. */
const char *cli_nearest(const char *word, const char *const *candidates, size_t n);

/* Numbers as people type them. False for anything else, or if it does not fit. */
bool cli_parse_u64(const char *text, uint64_t *out);
bool cli_parse_size(const char *text, uint64_t *out);
bool cli_parse_real(const char *text, double *out);

/* ---- failing ---- */

int cli_fail(cli *c, int code, const char *format, ...) CAIRN_PRINTF(3, 4); /* says it, returns code */
int cli_usage(cli *c, const char *format, ...) CAIRN_PRINTF(2, 3);          /* EXIT_USAGE, and where the help is */
/* The library's last sentence; the exit code that belongs to its status. */
int cli_fail_status(cli *c, cairn_status status);
int cli_exit_code(cairn_status status);
void cli_warn(cli *c, const char *format, ...) CAIRN_PRINTF(2, 3);

/* Ctrl-C and SIGTERM set a flag instead of ending the process; a second one ends it. */
void cli_catch_signals(void);
bool cli_stopped(void);

/* For the library's progress callbacks. */
uint64_t cli_now_ns(void); /* monotonic */

#endif
