/* machine.c - see machine.h. */
#include "machine.h"

#include <limits.h>
#include <mntent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

/* The first "model name" of /proc/cpuinfo. */
static void processor_name(char *out, size_t cap)
{
    FILE *f = fopen("/proc/cpuinfo", "re");
    char line[256];
    snprintf(out, cap, "unknown");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        if (strncmp(line, "model name", 10) != 0 || strchr(line, ':') == NULL) continue;
        const char *name = strchr(line, ':') + 1;
        name += strspn(name, " \t");
        snprintf(out, cap, "%.*s", (int)strcspn(name, "\n"), name);
        break;
    }
    if (f != NULL) fclose(f);
}

static bool lies_below(const char *path, const char *dir)
{
    size_t n = strlen(dir);
    if (strcmp(dir, "/") == 0) return true;
    return strncmp(path, dir, n) == 0 && (path[n] == 0 || path[n] == '/');
}

/* The mount with the longest directory that `dir` lies below; of equals the last, which covers the others. */
static void file_system_of(const char *dir, char *out, size_t cap)
{
    char path[PATH_MAX];
    size_t longest = 0;
    snprintf(out, cap, "unknown");
    if (realpath(dir, path) == NULL) return;
    FILE *f = setmntent("/proc/self/mounts", "re");
    for (struct mntent *e; f != NULL && (e = getmntent(f)) != NULL;) {
        size_t n = strlen(e->mnt_dir);
        if (n < longest || !lies_below(path, e->mnt_dir)) continue;
        longest = n;
        snprintf(out, cap, "%.40s on %.100s", e->mnt_type, e->mnt_fsname);
    }
    if (f != NULL) endmntent(f);
}

void machine_read(machine *m, const char *dir)
{
    struct utsname u;
    struct sysinfo s;
    *m = (machine){.cores = sysconf(_SC_NPROCESSORS_ONLN)};
    processor_name(m->processor, sizeof m->processor);
    snprintf(m->kernel, sizeof m->kernel, "unknown");
    if (uname(&u) == 0) snprintf(m->kernel, sizeof m->kernel, "%.50s %.70s", u.sysname, u.release);
    if (sysinfo(&s) == 0) m->ram_bytes = (uint64_t)s.totalram * s.mem_unit;
    file_system_of(dir, m->file_system, sizeof m->file_system);
}

const char *machine_line(const machine *m, char out[512])
{
    human ram;
    snprintf(out, 512, "%s, %ld cores, %s of RAM, %s, %s", m->processor, m->cores, human_bytes(&ram, m->ram_bytes),
             m->kernel, m->file_system);
    return out;
}

json_t *machine_json(const machine *m)
{
    return json_pack("{s:o, s:i, s:o, s:o, s:o, s:o}", "processor", json_bytes(m->processor, strlen(m->processor)),
                     "cores", (int)m->cores, "ram_bytes", json_count(m->ram_bytes), "free_ram_bytes",
                     json_count(cairn_free_ram_bytes()), "kernel", json_bytes(m->kernel, strlen(m->kernel)),
                     "file_system", json_bytes(m->file_system, strlen(m->file_system)));
}

uint64_t machine_read_bytes(void)
{
    FILE *f = fopen("/proc/self/io", "re");
    char line[128];
    unsigned long long bytes = UINT64_MAX;
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "read_bytes: %llu", &bytes) == 1) break;
    if (f != NULL) fclose(f);
    return (uint64_t)bytes;
}

uint64_t machine_cpu_ns(void)
{
    struct timespec t = {0, 0};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}
