/* plain_model.h - a GGUF reader and a Llama-style forward in plain loops: a witness for the runtime, sharing none of
 * its code. F32 tensors only; bytes are trusted as no product may trust them. */
#ifndef CAIRN_TESTS_PLAIN_MODEL_H
#define CAIRN_TESTS_PLAIN_MODEL_H

#include "twin.h"

typedef struct plain_model plain_model;

/* NULL (with a message) if a tensor it needs is not F32. */
plain_model *plain_model_open(const char *path);
void plain_model_close(plain_model *m);
size_t plain_model_vocab(const plain_model *m);

/* Runs slots (landmarks in place) through all layers. w becomes the world of its q, k, v: what an engine would hand to
 * a session. Row r of head h sees its own block, the newest `window` blocks and the top_k best older ones (local
 * layers: their window), by expected_visible. logits (n, vocab). visible: one array a layer, free_visible. */
void plain_model_forward(const plain_model *m, const cairn_token *slots, size_t n, uint32_t top_k, int32_t window,
                         world *w, uint8_t **visible, float *logits);

#endif
