/* replay.c - runs a fuzz entry over files: every file of the directories named, and every file named. Each is also cut
 * short at up to CUTS places. Prints what it did; fails if there was nothing. */
#include "fuzz.h"

#include <dirent.h>
#include <sys/stat.h>

enum { CUTS = 24 };

static uint8_t *read_file(const char *path, size_t *out_bytes)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) {
        fprintf(stderr, "cannot open %s\n", path);
        exit(2);
    }
    uint8_t *bytes = NULL;
    size_t n = 0, got;
    do {
        bytes = realloc(bytes, n + 65536);
        must(bytes != NULL);
        n += got = fread(bytes + n, 1, 65536, f);
    } while (got != 0);
    fclose(f);
    *out_bytes = n;
    return bytes;
}

static void run(const uint8_t *bytes, size_t n)
{
    uint8_t *exact = fuzz_copy(bytes, n);
    LLVMFuzzerTestOneInput(exact, n);
    free(exact);
}

static size_t replay(const char *path)
{
    size_t n;
    uint8_t *bytes = read_file(path, &n);
    run(bytes, n);
    for (size_t cut = 0; cut < n; cut += n / CUTS + 1) run(bytes, cut);
    free(bytes);
    return 1;
}

int main(int argc, char **argv)
{
    size_t files = 0;
    for (int i = 1; i < argc; i++) {
        DIR *dir = opendir(argv[i]);
        if (dir == NULL) {
            files += replay(argv[i]);
            continue;
        }
        for (struct dirent *e; (e = readdir(dir)) != NULL;) {
            char path[4096];
            if (e->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "%s/%s", argv[i], e->d_name);
            files += replay(path);
        }
        closedir(dir);
    }
    printf("%zu inputs replayed\n", files);
    return files > 0 ? 0 : 1;
}
