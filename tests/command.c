#include "command.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ARGS_MAX = 40 };

static outcome last;

void command_done(void)
{
    free(last.out);
    free(last.err);
    last = (outcome){0};
}

static int code_of(int status)
{
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static pid_t spawn(int in, int out, int err, const char *const *args)
{
    const char *argv[ARGS_MAX] = {CAIRN_COMMAND};
    for (int i = 0; args[i] != NULL; i++) {
        assert_true(i + 2 < ARGS_MAX);
        argv[i + 1] = args[i];
    }
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid != 0) return pid;
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    execv(CAIRN_COMMAND, (char *const *)(uintptr_t)argv);
    _exit(127);
}

static char *take_file(FILE *f, size_t *bytes)
{
    *bytes = (size_t)lseek(fileno(f), 0, SEEK_END);
    char *text = malloc(*bytes + 1);
    assert_non_null(text);
    assert_int_equal(pread(fileno(f), text, *bytes, 0), *bytes);
    text[*bytes] = 0;
    fclose(f);
    return text;
}

const outcome *command_run(const void *input, size_t bytes, const char *const *args)
{
    FILE *in = tmpfile(), *out = tmpfile(), *err = tmpfile();
    size_t err_bytes = 0;
    assert_true(in != NULL && out != NULL && err != NULL);
    if (bytes > 0) assert_int_equal(pwrite(fileno(in), input, bytes, 0), bytes);
    pid_t pid = spawn(fileno(in), fileno(out), fileno(err), args);
    int code = command_wait(pid);
    command_done();
    last.code = code;
    last.out = take_file(out, &last.out_bytes);
    last.err = take_file(err, &err_bytes);
    fclose(in);
    return &last;
}

pid_t command_start(const char *log, const char *const *args)
{
    int null = open("/dev/null", O_RDWR);
    int to = log != NULL ? open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600) : dup(null);
    assert_true(null >= 0 && to >= 0);
    pid_t pid = spawn(null, to, to, args);
    close(null);
    close(to);
    return pid;
}

int command_wait(pid_t pid)
{
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return code_of(status);
}

json_t *command_json(const outcome *o)
{
    json_error_t error;
    json_t *root = json_loadb(o->out, o->out_bytes, 0, &error);
    if (!json_is_object(root)) fail_msg("stdout is not one JSON object (%s): %s", error.text, o->out);
    return root;
}

long long json_number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_integer(value)) fail_msg("'%s' is not an integer of the JSON answer", key);
    return json_integer_value(value);
}

const char *json_text(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_string(value)) fail_msg("'%s' is not a string of the JSON answer", key);
    return json_string_value(value);
}

void write_text(const char *path, size_t bytes, const char *key, size_t at)
{
    static const char *const files[] = {"store.h", "context.h", "model.h", "index.h", "attention.h"};
    char sentence[128] = "";
    if (key != NULL)
        snprintf(sentence, sizeof sentence, "\nThe pass key is %s. Remember it. %s is the pass key.\n", key, key);
    size_t n = strlen(sentence), have = 0;
    char *text = malloc(bytes + 1);
    assert_non_null(text);
    assert_true(n <= bytes && at <= bytes - n);
    while (have < bytes - n) {
        for (size_t i = 0; i < 5 && have < bytes - n; i++) {
            size_t file_bytes = 0;
            char *name = test_path(CAIRN_SOURCE_DIR "/include/cairn", files[i]);
            char *file = test_read_file(name, &file_bytes);
            assert_non_null(file);
            size_t take = file_bytes < bytes - n - have ? file_bytes : bytes - n - have;
            memcpy(text + have, file, take);
            have += take;
            free(file);
            free(name);
        }
    }
    memmove(text + at + n, text + at, bytes - n - at);
    memcpy(text + at, sentence, n);
    test_write_file(path, text, bytes);
    free(text);
}

static char *found;
static int find_data(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st;
    if (type == FTW_F && strcmp(path + at->base, "data.mdb") == 0) found = strdup(path);
    return 0;
}
char *store_data_file(const char *store)
{
    found = NULL;
    nftw(store, find_data, 16, FTW_PHYS);
    assert_non_null(found);
    return found;
}
