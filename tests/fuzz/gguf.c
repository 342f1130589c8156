/* gguf.c - any bytes as a model file. What is accepted can be read, encodes a text and decodes what it encoded. */
#include "fuzz.h"

#include "gguf_internal.h"
#include "model_internal.h"

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
    must(cairn_model_identity(model, &id) == CAIRN_OK);
    size_t sample = size < 48 ? size : 48;
    if (cairn_model_encode(model, data, sample, tokens, 64, &n) == CAIRN_OK)
        for (size_t i = 0; i < n && i < 64; i++)
            must(cairn_model_decode(model, tokens[i], text, sizeof text) <= sizeof text);
    cairn_model_close(model);
    return 0;
}
