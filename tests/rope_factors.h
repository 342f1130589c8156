/* rope_factors.h - a model file with rope factors, as Llama 3.1 has them. */
#ifndef CAIRN_TESTS_ROPE_FACTORS_H
#define CAIRN_TESTS_ROPE_FACTORS_H

#include "support.h"

#include <cairn/model.h>

#include "gguf_internal.h"
#include "kernels_internal.h"

#include <stdio.h>
#include <stdlib.h>

/* Llama 3.1's way: pairs turn slower than theta says, each by its factor. llama.cpp's vectors are of this file. */
static inline void add_rope_factors(const char *source, const char *path)
{
    gguf file;
    cairn_gguf_writer *w;
    assert_ok(gguf_open(source, &file));
    assert_ok(cairn_gguf_writer_new(&w));
    for (size_t i = 0; i < file.n_values; i++) assert_ok(gguf_put_value(w, &file.values[i]));
    for (size_t i = 0; i < file.n_tensors; i++) {
        const gguf_tensor *t = &file.tensors[i];
        char name[64];
        size_t n = (size_t)(t->dims[0] * t->dims[1]);
        float *x = malloc(n * sizeof *x);
        assert_non_null(x);
        assert_true(t->type == CAIRN_GGUF_F32 || t->type == CAIRN_GGUF_F16);
        snprintf(name, sizeof name, "%.*s", (int)t->name.bytes, t->name.data);
        cairn_kernels_best()->widen(x, t->data, t->type == CAIRN_GGUF_F32 ? CAIRN_F32 : CAIRN_F16, n);
        assert_ok(cairn_gguf_put_tensor(w, name, (cairn_gguf_type)t->type, t->dims, t->n_dims, x));
        free(x);
    }
    cairn_model *model;
    cairn_model_info info;
    assert_ok(cairn_model_open(source, &model));
    cairn_model_info_get(model, &info);
    cairn_model_close(model);
    float factors[64];
    const uint64_t pairs = info.head_dim / 2;
    for (uint64_t i = 0; i < pairs; i++) factors[i] = 1 + 7 * (float)i / (float)(pairs - 1);
    assert_ok(cairn_gguf_put_tensor(w, "rope_freqs.weight", CAIRN_GGUF_F32, &pairs, 1, factors));
    assert_ok(cairn_gguf_writer_save(w, path));
    cairn_gguf_writer_free(w);
    gguf_close(&file);
}

#endif
