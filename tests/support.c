#include "support.h"

#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

uint64_t test_random_u64(test_random *r) /* splitmix64 (Steele, Lea, Flood 2014) */
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
uint32_t test_random_below(test_random *r, uint32_t n)
{
    return (uint32_t)((test_random_u64(r) >> 32) * n >> 32);
}
double test_random_unit(test_random *r)
{
    return (double)(test_random_u64(r) >> 11) * 0x1p-53;
}
float test_random_normal(test_random *r)
{
    double u = 1.0 - test_random_unit(r);
    double v = test_random_unit(r);
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}
void test_random_fill(test_random *r, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = test_random_normal(r);
}

char *test_make_dir(void)
{
    const char *base = getenv("TMPDIR");
    char *path = NULL;
    assert_true(asprintf(&path, "%s/cairn-test-XXXXXX", base != NULL ? base : "/tmp") > 0);
    assert_non_null(mkdtemp(path));
    return path;
}
static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}
void test_remove_dir(char *path)
{
    if (path == NULL) return;
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    free(path);
}
char *test_path(const char *dir, const char *name)
{
    char *path = NULL;
    assert_true(asprintf(&path, "%s/%s", dir, name) > 0);
    return path;
}
void *test_read_file(const char *path, size_t *out_bytes)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) return NULL;
    fseek(f, 0, SEEK_END);
    size_t n = (size_t)ftell(f);
    rewind(f);
    char *data = malloc(n + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, n, f), n);
    data[n] = 0;
    fclose(f);
    *out_bytes = n;
    return data;
}
void test_write_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}
