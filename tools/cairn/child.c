/* child.c - see child.h. */
#include "child.h"

#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 512 }; /* of ru_inblock, whatever the device */
extern char **environ;

static json_t *parse(FILE *f)
{
    rewind(f);
    return json_loadf(f, 0, NULL);
}

int child_run(cli *c, const char *const *args, bool capture, child *out)
{
    size_t n = 0;
    *out = (child){0};
    while (args[n] != NULL) n++;
    char **argv = calloc(n + 2, sizeof *argv);
    if (argv == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
    argv[0] = "cairn";
    for (size_t i = 0; i < n; i++) argv[i + 1] = (char *)args[i];
    FILE *f = capture ? tmpfile() : NULL;
    if (capture && f == NULL) {
        free(argv);
        return cli_fail(c, EXIT_FAILED, "cannot make a temporary file: %s", strerror(errno));
    }
    posix_spawn_file_actions_t actions;
    struct rusage used;
    pid_t pid = 0;
    int status = 0;
    fflush(stdout);
    posix_spawn_file_actions_init(&actions);
    if (f != NULL) posix_spawn_file_actions_adddup2(&actions, fileno(f), STDOUT_FILENO);
    uint64_t start = cli_now_ns();
    int error = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, environ);
    while (error == 0 && wait4(pid, &status, 0, &used) < 0)
        if (errno != EINTR) error = errno;
    out->seconds = (double)(cli_now_ns() - start) * 1e-9;
    posix_spawn_file_actions_destroy(&actions);
    free(argv);
    int code = -1;
    if (error != 0) {
        code = cli_fail(c, EXIT_FAILED, "cannot run '%s' as a process of its own: %s", args[0], strerror(error));
    } else {
        out->read_bytes = (uint64_t)used.ru_inblock * BLOCK;
        if (f != NULL) out->answer = parse(f);
        if (!WIFEXITED(status))
            code = cli_fail(c, EXIT_FAILED, "'%s' was ended by signal %d", args[0], WTERMSIG(status));
        else if (WEXITSTATUS(status) != 0)
            code = WEXITSTATUS(status); /* it has said why */
        else if (capture && out->answer == NULL)
            code = cli_fail(c, EXIT_FAILED, "'%s' printed no JSON", args[0]);
    }
    if (f != NULL) fclose(f);
    if (code >= 0) child_wipe(out);
    return code;
}

void child_wipe(child *x)
{
    json_decref(x->answer);
    *x = (child){0};
}
