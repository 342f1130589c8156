/* main.c - the `cairn` command: finds the subcommand, lets it read its options, runs it. */
#include "cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static const cli_command *const commands[] = {
    &command_ingest, &command_ask,    &command_list,   &command_stat,    &command_show,    &command_fork,
    &command_drop,   &command_rename, &command_verify, &command_reindex, &command_compact, &command_export,
    &command_import, &command_logits, &command_train,  &command_bench,
};

static const cli_command *command_named(const cli_command *const *among, size_t n, const char *word)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(cli_last_word(among[i]), word) == 0) return among[i];
    return NULL;
}

static void print_commands(FILE *out)
{
    fprintf(out, "usage: cairn COMMAND [arguments and options]\n\n"
                 "The K/V memory of a transformer on disk: a text is ingested once and asked many times, and only\n"
                 "the blocks that matter are read.\n\ncommands:\n");
    for (size_t i = 0; i < CLI_COUNT_OF(commands); i++)
        fprintf(out, "  %-8s  %s\n", commands[i]->name, commands[i]->summary);
    fprintf(out,
            "\n'cairn COMMAND --help' shows arguments, options and examples; 'cairn --version' the version.\n"
            "exit codes: 0 done, 1 failed, 2 usage, 3 damaged data. With --json stdout carries one JSON object,\n"
            "{\"error\": {\"command\", \"status\", \"message\", \"exit\"}} after a failure.\n\n"
            "examples:\n"
            "  cairn ingest library -m models/cairn-tiny-f16.gguf -c book book.txt\n"
            "  cairn ask library -m models/cairn-tiny-f16.gguf -c book \"What is the pass key? The pass key is\"\n");
}

static int unknown_command(cli *c, const cli_command *const *among, size_t n, const char *word)
{
    enum { MOST = 64 };
    const char *names[MOST];
    const char *what = among == commands ? "command" : "bench";
    if (n > MOST) n = MOST;
    for (size_t i = 0; i < n; i++) names[i] = cli_last_word(among[i]);
    const char *nearest = cli_nearest(word, names, n);
    if (nearest != NULL) return cli_usage(c, "there is no %s '%s' (did you mean '%s'?)", what, word, nearest);
    return cli_usage(c, "there is no %s '%s'", what, word);
}

/* `cairn help bench`, `cairn help bench passkey` */
static int help(cli *c, int argc, char **argv)
{
    const cli_command *about = command_named(commands, CLI_COUNT_OF(commands), argv[2]);
    if (about == NULL) return unknown_command(c, commands, CLI_COUNT_OF(commands), argv[2]);
    if (about->members != NULL && argc > 3) {
        const cli_command *member = command_named(about->members, about->n_members, argv[3]);
        if (member == NULL) return unknown_command(c, about->members, about->n_members, argv[3]);
        about = member;
    }
    cli_print_help(about);
    return EXIT_DONE;
}

/* The member of a group that the next word names. -1 or the exit code. */
static int find_member(cli *c, int argc, char **argv, const cli_command **command)
{
    const cli_command *group = *command;
    if (argc < 3) return cli_usage(c, "which one? 'cairn %s --help' lists them", group->name);
    if (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0) {
        cli_print_help(group);
        return EXIT_DONE;
    }
    if (argv[2][0] == '-') return cli_usage(c, "the name of one comes first, not '%s'", argv[2]);
    *command = command_named(group->members, group->n_members, argv[2]);
    return *command != NULL ? -1 : unknown_command(c, group->members, group->n_members, argv[2]);
}

static int run(cli *c, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--json") == 0) c->json = true; /* for errors before the command's own options are read */
    if (argc < 2) {
        print_commands(stderr);
        return EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--version") == 0 || strcmp(name, "version") == 0) {
        printf("cairn %s\n", cairn_version());
        return EXIT_DONE;
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || (strcmp(name, "help") == 0 && argc == 2)) {
        print_commands(stdout);
        return EXIT_DONE;
    }
    if (strcmp(name, "help") == 0) return help(c, argc, argv);
    if (name[0] == '-') return cli_usage(c, "a command comes first, not '%s'", name);
    const cli_command *command = command_named(commands, CLI_COUNT_OF(commands), name);
    if (command == NULL) return unknown_command(c, commands, CLI_COUNT_OF(commands), name);

    c->command = command->name;
    int word = 1; /* the last one of the command's name */
    if (command->members != NULL) {
        int code = find_member(c, argc, argv, &command);
        if (code >= 0) return code;
        c->command = command->name;
        word = 2;
    }
    c->json = false; /* its own table says what --json is: it may be the value of another option */
    int first = 0;
    int code = cli_parse(c, command, argc - word, argv + word, &first);
    if (code >= 0) return code;
    return command->run(c, argc - word - first, argv + word + first);
}

int main(int argc, char **argv)
{
    /* "Since the process began": loading is processor time, so what was used of it before main() is added. */
    struct timespec used = {0, 0};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    uint64_t before_main = (uint64_t)used.tv_sec * UINT64_C(1000000000) + (uint64_t)used.tv_nsec;
    cli c = {.command = "", .start_ns = cli_now_ns() - before_main};
    int code = run(&c, argc, argv);
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == EXIT_DONE)
        code = cli_fail(&c, EXIT_FAILED, "cannot write to standard output: %s", strerror(errno));
    json_decref(c.warnings);
    return code;
}
