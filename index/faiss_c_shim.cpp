/* faiss_c_shim.cpp - the functions of FAISS's C API that Cairn calls, over the C++ library.
 *
 * Debian's libfaiss-dev ships the headers of the C API but a library without its symbols. This file defines what
 * faiss_door.c calls and nothing more, with the headers' own declarations in view, so the compiler refuses a signature
 * that differs. Built only where no libfaiss_c is found (cmake/CairnDeps.cmake): its symbols would collide.
 *
 * Every call that can throw goes through guard(): no exception reaches C. One that starts inside an OpenMP region of
 * FAISS cannot be caught by anybody; kind.c keeps to recipes that do not. */
#include <faiss/AutoTune.h>
#include <faiss/Index.h>
#include <faiss/IndexIVF.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/IndexRefine.h>
#include <faiss/impl/FaissException.h>
#include <faiss/index_factory.h>
#include <faiss/index_io.h>
#include <faiss/invlists/OnDiskInvertedLists.h>
#include <faiss/utils/distances.h>

#include <memory>
#include <string>

#include <faiss/c_api/AutoTune_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>
#include <faiss/c_api/index_factory_c.h>
#include <faiss/c_api/index_io_c.h>
#include <faiss/c_api/utils/distances_c.h>

namespace
{

thread_local std::string last_error;

void remember(const char *what) noexcept
{
    try {
        last_error = what;
    } catch (...) {
        last_error.clear();
    }
}

template <class Call> int guard(Call &&call) noexcept
{
    try {
        call();
        return OK;
    } catch (const faiss::FaissException &e) {
        remember(e.what());
        return FAISS_EXCEPT;
    } catch (const std::exception &e) {
        remember(e.what());
        return STD_EXCEPT;
    } catch (...) {
        remember("an exception FAISS does not name");
        return UNKNOWN_EXCEPT;
    }
}

faiss::Index *cpp(FaissIndex *index)
{
    return reinterpret_cast<faiss::Index *>(index);
}
const faiss::Index *cpp(const FaissIndex *index)
{
    return reinterpret_cast<const faiss::Index *>(index);
}

/* Mapped lists come with 32 threads that touch pages ahead of a search, started and joined without a lock: slower than
 * the search itself on lists in RAM, and a race between two searches. None, then. */
void no_prefetch_threads(faiss::Index *index)
{
    if (auto *outer = dynamic_cast<faiss::IndexPreTransform *>(index)) return no_prefetch_threads(outer->index);
    if (auto *outer = dynamic_cast<faiss::IndexRefine *>(index)) return no_prefetch_threads(outer->base_index);
    if (auto *ivf = dynamic_cast<faiss::IndexIVF *>(index))
        if (auto *lists = dynamic_cast<faiss::OnDiskInvertedLists *>(ivf->invlists)) lists->prefetch_nthread = 0;
}

} // namespace

extern "C" {

const char *faiss_get_last_error()
{
    return last_error.c_str();
}

void faiss_Index_free(FaissIndex *index)
{
    delete cpp(index);
}
int faiss_Index_d(const FaissIndex *index)
{
    return static_cast<int>(cpp(index)->d);
}
int faiss_Index_is_trained(const FaissIndex *index)
{
    return cpp(index)->is_trained;
}
idx_t faiss_Index_ntotal(const FaissIndex *index)
{
    return cpp(index)->ntotal;
}
FaissMetricType faiss_Index_metric_type(const FaissIndex *index)
{
    return static_cast<FaissMetricType>(cpp(index)->metric_type);
}
int faiss_Index_train(FaissIndex *index, idx_t n, const float *x)
{
    return guard([&] { cpp(index)->train(n, x); });
}
int faiss_Index_add(FaissIndex *index, idx_t n, const float *x)
{
    return guard([&] { cpp(index)->add(n, x); });
}
int faiss_Index_search(const FaissIndex *index, idx_t n, const float *x, idx_t k, float *distances, idx_t *labels)
{
    return guard([&] { cpp(index)->search(n, x, k, distances, labels); });
}

int faiss_index_factory(FaissIndex **p_index, int d, const char *description, FaissMetricType metric)
{
    return guard([&] {
        *p_index = reinterpret_cast<FaissIndex *>(
            faiss::index_factory(d, description, static_cast<faiss::MetricType>(metric)));
    });
}

int faiss_write_index(const FaissIndex *index, FILE *file)
{
    return guard([&] { faiss::write_index(cpp(index), file); });
}
/* FAISS_IO_FLAG_MMAP of the C header is 1, which the C++ reader does not know: its own flag is meant. */
int faiss_read_index(FILE *file, int io_flags, FaissIndex **p_out)
{
    return guard([&] {
        int flags = io_flags & FAISS_IO_FLAG_READ_ONLY ? faiss::IO_FLAG_READ_ONLY : 0;
        if (io_flags & FAISS_IO_FLAG_MMAP) flags |= faiss::IO_FLAG_MMAP;
        std::unique_ptr<faiss::Index> index(faiss::read_index(file, flags));
        no_prefetch_threads(index.get());
        *p_out = reinterpret_cast<FaissIndex *>(index.release());
    });
}

int faiss_ParameterSpace_new(FaissParameterSpace **space)
{
    return guard([&] { *space = reinterpret_cast<FaissParameterSpace *>(new faiss::ParameterSpace); });
}
void faiss_ParameterSpace_free(FaissParameterSpace *space)
{
    delete reinterpret_cast<faiss::ParameterSpace *>(space);
}
int faiss_ParameterSpace_set_index_parameters(const FaissParameterSpace *space, FaissIndex *index,
                                              const char *description)
{
    return guard(
        [&] { reinterpret_cast<const faiss::ParameterSpace *>(space)->set_index_parameters(cpp(index), description); });
}

void faiss_set_distance_compute_blas_threshold(int value)
{
    faiss::distance_compute_blas_threshold = value;
}

} // extern "C"
