/* score.c - what a model without landmarks expected of a text. */
#include "train_internal.h"

#include <cairn/train.h>

static cairn_status check(const cairn_train_shape *shape, const cairn_model_info *info, const cairn_token *tokens,
                          size_t n)
{
    if (shape->mode == CAIRN_TRAIN_LANDMARK)
        return cairn_fail(CAIRN_UNSUPPORTED, "model '%s' has landmarks: a session says what it expects", info->name);
    if (n < 2 || n > UINT32_MAX) return cairn_fail(CAIRN_INVALID, "%zu tokens to score, must be at least 2", n);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= shape->vocab)
            return cairn_fail(CAIRN_INVALID, "token %zu is %d, must be below %u", i, tokens[i], shape->vocab);
    return CAIRN_OK;
}

cairn_status cairn_train_score(const cairn_model *model, const cairn_token *tokens, size_t n, double *nats)
{
    cairn_train_shape shape;
    cairn_train_layout *layout = NULL;
    cairn_train_model_f32 *run = NULL;
    float *params = NULL, *nll = NULL;
    cairn_token *targets = NULL;
    cairn_model_info info;
    cairn_model_info_get(model, &info);
    cairn_status st = cairn_train_shape_of(model, &shape);
    if (st == CAIRN_OK) st = check(&shape, &info, tokens, n);
    if (st == CAIRN_OK) st = cairn_train_layout_new(&shape, &layout);
    if (st == CAIRN_OK) st = cairn_train_model_new_f32(layout, n, &run);
    if (st != CAIRN_OK) goto out;
    params = cairn_alloc_array(layout->total, sizeof *params);
    nll = cairn_alloc_array(n, sizeof *nll);
    targets = cairn_alloc_array(n, sizeof *targets);
    if (params == NULL || nll == NULL || targets == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "%zu parameters of '%s'", layout->total, info.name);
        goto out;
    }
    cairn_train_copy(layout, model, params);
    cairn_train_targets(tokens, n, 0, targets);
    const cairn_train_window window = {tokens, targets, NULL, n, NULL};
    cairn_train_forward_f32(run, params, tokens, n);
    cairn_train_loss_f32(run, &window, 1, nll, NULL);
    for (size_t i = 0; i + 1 < n; i++) nats[i] = (double)nll[i];
out:
    cairn_train_model_free_f32(run);
    cairn_train_layout_free(layout);
    cairn_free(params);
    cairn_free(nll);
    cairn_free(targets);
    return st;
}
