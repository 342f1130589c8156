/* plan.c - any bytes as the plan of a training run: refused with a sentence, or read. */
#include "fuzz.h"

#include "plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static FILE *quiet;
    if (quiet == NULL) must((quiet = fopen("/dev/null", "w")) != NULL);
    plan p;
    cli c = {.command = "train"};
    FILE *err = stderr;
    stderr = quiet;
    int code = plan_read(&c, fuzz_file(data, size), &p);
    stderr = err;
    must(code == -1 || (code == EXIT_FAILED && c.said[0] != 0));
    if (code == -1) {
        must(p.n > 0 && p.name[sizeof p.name - 1] == 0);
        for (size_t i = 0; i < p.n; i++) must(memchr(p.stages[i].name, 0, sizeof p.stages[i].name) != NULL);
        must(p.options.struct_size == sizeof p.options);
        plan_wipe(&p);
    }
    return 0;
}
