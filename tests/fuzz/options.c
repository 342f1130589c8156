/* options.c - any bytes as a command line: which command (byte 0), then its arguments, separated by NULs.
 *
 * A usage error with --json prints exactly one JSON object that says so; what is accepted has each number between its
 * bounds, and leaves at least as many arguments as the command needs. */
#include "fuzz.h"

#include "cli.h"

static const cli_command *const groups[] = {
    &command_ingest, &command_ask,     &command_list,    &command_stat,   &command_show,   &command_fork,
    &command_drop,   &command_rename,  &command_verify,  &command_export, &command_import, &command_logits,
    &command_train,  &command_compact, &command_reindex, &command_bench,
};

static const cli_command *pick(unsigned n)
{
    const cli_command *command = groups[n % (sizeof groups / sizeof *groups)];
    if (command->members == NULL) return command;
    return command->members[n / (sizeof groups / sizeof *groups) % command->n_members];
}

static void check_number(const cli_option *o, uint64_t value, bool given)
{
    bool all = (o->kind == CLI_COUNT || o->kind == CLI_COUNTS) && value == UINT32_MAX;
    must(!given || all || (value >= o->min && value <= o->max));
}

/* Lists grow with every run: they are emptied here, and what an accepted line put there is looked at. */
static void check_values(const cli_command *command, bool accepted)
{
    for (size_t i = 0; i < command->n_options; i++) {
        const cli_option *o = &command->options[i];
        if (o->kind == CLI_TEXTS) {
            cli_texts *texts = o->out;
            if (accepted)
                for (size_t j = 0; j < texts->n; j++) must(texts->items[j] != NULL);
            free(texts->items);
            *texts = (cli_texts){0};
        } else if (o->kind == CLI_U64S || o->kind == CLI_SIZES || o->kind == CLI_COUNTS) {
            cli_numbers *list = o->out;
            for (size_t j = 0; j < list->n; j++) check_number(o, list->items[j], true);
            free(list->items);
            *list = (cli_numbers){0};
        } else if (o->kind == CLI_REALS) {
            cli_reals *list = o->out;
            for (size_t j = 0; j < list->n; j++) must(list->items[j] >= o->low && list->items[j] <= o->high);
            free(list->items);
            *list = (cli_reals){0};
        } else if (o->kind == CLI_TEXT) {
            *(const char **)o->out = NULL; /* the argument it points at goes */
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { ARGS = 40 };
    static FILE *quiet;
    if (size < 1) return 0;
    if (quiet == NULL) must((quiet = fopen("/dev/null", "w")) != NULL);
    const cli_command *command = pick(data[0]);
    char *text = malloc(size);
    must(text != NULL);
    memcpy(text, data + 1, size - 1);
    text[size - 1] = 0;
    char *argv[ARGS + 1] = {(char *)(uintptr_t)command->name};
    int argc = 1;
    for (char *p = text; p < text + size - 1 && argc < ARGS; p += strlen(p) + 1) argv[argc++] = p;

    char *said = NULL;
    size_t said_bytes = 0;
    FILE *out = stdout, *err = stderr;
    stdout = open_memstream(&said, &said_bytes);
    must(stdout != NULL);
    stderr = quiet;
    cli c = {.command = command->name};
    int first = 0;
    int code = cli_parse(&c, command, argc, argv, &first);
    fclose(stdout);
    stdout = out;
    stderr = err;

    must(code == -1 || code == EXIT_DONE || code == EXIT_USAGE);
    if (code == -1) {
        must(first >= 1 && argc - first >= command->min_args);
        must(command->max_args < 0 || argc - first <= command->max_args);
    }
    if (code == EXIT_USAGE && c.json) {
        json_error_t error;
        json_t *root = json_loads(said, JSON_REJECT_DUPLICATES, &error);
        must(root != NULL);
        must(strcmp(json_string_value(json_object_get(json_object_get(root, "error"), "status")), "usage") == 0);
        json_decref(root);
    }
    check_values(command, code == -1);
    free(said);
    free(text);
    return 0;
}
