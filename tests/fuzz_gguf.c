/* fuzz_gguf.c - libFuzzer entry: any bytes as a model file. test_gguf replays it over data/fuzz/gguf.
 *
 * With clang: -fsanitize=fuzzer,address,undefined over this file, base, kernels, attention/shape.c and the model room's
 * gguf_read.c, gguf_write.c, vocab.c, model.c and identity.c. */
#include "gguf_internal.h"
#include "model_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    gguf file;
    cairn_model *model;
    cairn_model_id id;
    cairn_token tokens[64];
    char text[64];
    size_t n;
    if (gguf_parse(data, size, &file) != CAIRN_OK) return 0;
    for (size_t i = 0; i < file.n_tensors; i++) /* what was promised to be readable is read */
        if (file.tensors[i].bytes != 0)
            text[0] = (char)(file.tensors[i].data[0] ^ file.tensors[i].data[file.tensors[i].bytes - 1]);
    if (model_from_gguf(&file, "fuzz", &model) != CAIRN_OK) return 0;
    if (cairn_model_identity(model, &id) != CAIRN_OK) __builtin_trap();
    size_t sample = size < 48 ? size : 48;
    if (cairn_model_encode(model, data, sample, tokens, 64, &n) == CAIRN_OK)
        for (size_t i = 0; i < n && i < 64; i++)
            if (cairn_model_decode(model, tokens[i], text, sizeof text) > sizeof text) __builtin_trap();
    cairn_model_close(model);
    return 0;
}
