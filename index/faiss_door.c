/* faiss_door.c - the one C file that includes FAISS headers (they put `OK` and `idx_t` in everyone's namespace).
 *
 * FAISS runs on the calling thread alone: Cairn brings its own threads, and libgomp's spinning barriers cost whole
 * scheduler ticks when the cores are shared (8 ms for a 0.5 ms search). The number of OpenMP threads is the calling
 * thread's own setting, so it is set on the way in and given back on the way out. */
#include "index_internal.h"

#include <pthread.h>

#include <faiss/c_api/AutoTune_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>
#include <faiss/c_api/index_factory_c.h>
#include <faiss/c_api/index_io_c.h>
#include <faiss/c_api/utils/distances_c.h>

/* <omp.h> belongs to a compiler rather than to libgomp, and these are all we need of it. */
extern int omp_get_max_threads(void);
extern void omp_set_num_threads(int threads);
extern void openblas_set_num_threads(int threads) __attribute__((weak)); /* another BLAS has no such call */

struct cairn_faiss {
    FaissIndex *index;
};

static void process_settings(void)
{
    if (openblas_set_num_threads != NULL) openblas_set_num_threads(1);
    faiss_set_distance_compute_blas_threshold(
        1); /* Debian's FAISS has scalar inner products: BLAS is 2-9 times faster */
}

static int enter(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, process_settings);
    int threads = omp_get_max_threads();
    if (threads != 1) omp_set_num_threads(1);
    return threads;
}
static void leave(int threads)
{
    if (threads != 1) omp_set_num_threads(threads);
}

/* FAISS's sentence without its function and file: "Error in ... at ./faiss/x.cpp:823: what happened". */
static const char *reason(void)
{
    const char *text = faiss_get_last_error();
    if (text == NULL || *text == 0) return "no reason given";
    for (const char *p = strchr(text, ':'); p != NULL; p = strchr(p + 1, ':')) {
        size_t digits = strspn(p + 1, "0123456789");
        if (digits != 0 && strncmp(p + 1 + digits, ": ", 2) == 0) text = p + digits + 3;
    }
    return text;
}

static cairn_status refused(cairn_status status, int code, const char *doing)
{
    const char *why = reason();
    if (code == STD_EXCEPT && strstr(why, "bad_alloc") != NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "FAISS ran out of memory %s", doing);
    return cairn_fail(status, "FAISS, %s: %.300s", doing, why);
}

static cairn_status set_params(FaissIndex *index, const char *params)
{
    if (*params == 0) return CAIRN_OK;
    FaissParameterSpace *space = NULL;
    int code = faiss_ParameterSpace_new(&space);
    if (code == OK) code = faiss_ParameterSpace_set_index_parameters(space, index, params);
    cairn_status st = CAIRN_OK;
    if (code != OK) {
        char doing[CAIRN_KIND_TEXT + 32];
        snprintf(doing, sizeof doing, "setting '%s'", params);
        st = refused(CAIRN_INVALID, code, doing);
    }
    faiss_ParameterSpace_free(space);
    return st;
}

static cairn_status wrap(FaissIndex *index, cairn_faiss **out)
{
    cairn_faiss *faiss = cairn_alloc(sizeof *faiss);
    if (faiss == NULL) return cairn_fail(CAIRN_NO_MEMORY, "FAISS index");
    faiss->index = index;
    *out = faiss;
    return CAIRN_OK;
}

cairn_status cairn_faiss_new(const char *factory, const char *params, uint32_t dim, cairn_faiss **out)
{
    *out = NULL;
    int threads = enter();
    FaissIndex *index = NULL;
    cairn_status st;
    int code = faiss_index_factory(&index, (int)dim, factory, METRIC_INNER_PRODUCT);
    if (code != OK) {
        index = NULL;
        char doing[CAIRN_KIND_TEXT + 64];
        snprintf(doing, sizeof doing, "making '%s' for %u dimensions", factory, dim);
        st = refused(CAIRN_INVALID, code, doing);
    } else if (faiss_Index_metric_type(index) != METRIC_INNER_PRODUCT) {
        st = cairn_fail(CAIRN_INVALID, "FAISS's '%s' does not search by inner product", factory);
    } else if ((st = set_params(index, params)) == CAIRN_OK) {
        st = wrap(index, out);
    }
    if (st != CAIRN_OK && index != NULL) faiss_Index_free(index);
    leave(threads);
    return st;
}

void cairn_faiss_free(cairn_faiss *faiss)
{
    if (faiss == NULL) return;
    faiss_Index_free(faiss->index);
    cairn_free(faiss);
}

cairn_status cairn_faiss_set(cairn_faiss *faiss, const char *params)
{
    return set_params(faiss->index, params);
}

bool cairn_faiss_trained(const cairn_faiss *faiss)
{
    return faiss_Index_is_trained(faiss->index) != 0;
}

size_t cairn_faiss_rows(const cairn_faiss *faiss)
{
    return (size_t)faiss_Index_ntotal(faiss->index);
}

cairn_status cairn_faiss_train(cairn_faiss *faiss, size_t n, const float *rows)
{
    int threads = enter();
    int code = faiss_Index_train(faiss->index, (idx_t)n, rows);
    cairn_status st = code == OK ? CAIRN_OK : refused(CAIRN_INVALID, code, "training");
    leave(threads);
    return st;
}

cairn_status cairn_faiss_add(cairn_faiss *faiss, size_t n, const float *rows)
{
    int threads = enter();
    int code = faiss_Index_add(faiss->index, (idx_t)n, rows);
    cairn_status st = code == OK ? CAIRN_OK : refused(CAIRN_INVALID, code, "adding rows");
    leave(threads);
    return st;
}

cairn_status cairn_faiss_search(const cairn_faiss *faiss, size_t n, const float *q, size_t k, float *scores,
                                int64_t *ids)
{
    int threads = enter();
    int code = faiss_Index_search(faiss->index, (idx_t)n, q, (idx_t)k, scores, ids);
    cairn_status st = code == OK ? CAIRN_OK : refused(CAIRN_INVALID, code, "searching");
    leave(threads);
    return st;
}

cairn_status cairn_faiss_write(const cairn_faiss *faiss, FILE *file)
{
    int code = faiss_write_index(faiss->index, file);
    return code == OK ? CAIRN_OK : refused(CAIRN_IO, code, "writing");
}

cairn_status cairn_faiss_read(FILE *file, const char *params, uint32_t dim, bool map, cairn_faiss **out)
{
    *out = NULL;
    int threads = enter();
    FaissIndex *index = NULL;
    cairn_status st;
    int code = faiss_read_index(file, map ? FAISS_IO_FLAG_MMAP : 0, &index);
    if (code != OK) {
        index = NULL;
        st = refused(CAIRN_CORRUPT, code, "reading");
    } else if (faiss_Index_d(index) != (int)dim || faiss_Index_metric_type(index) != METRIC_INNER_PRODUCT) {
        st = cairn_fail(CAIRN_CORRUPT, "index of %d dimensions and metric %d, not of %u and inner product",
                        faiss_Index_d(index), (int)faiss_Index_metric_type(index), dim);
    } else if ((st = set_params(index, params)) == CAIRN_OK) {
        st = wrap(index, out);
    }
    if (st != CAIRN_OK && index != NULL) faiss_Index_free(index);
    leave(threads);
    return st;
}
