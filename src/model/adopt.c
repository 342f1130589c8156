/* adopt.c - the ends of attached contexts, made findable.
 *
 * A context's last tokens, fewer than a block, have no landmark: nothing could retrieve them, and a document shorter
 * than a block would not be there at all. Each such tail is run in a session of its own, where it sees its own context,
 * and closed early by a landmark; the session that attaches the context takes the block over. An empty text adds
 * nothing: a block of BOS alone, which no model was trained on, would draw attention (a fifth of it in test_cli). */
#include "model_internal.h"

#include "context_internal.h"

static cairn_status adopt_tail(const cairn_model *model, cairn_store *store, const char *const *name, size_t number,
                               cairn_session *session)
{
    cairn_session_options opt = session->opt; /* the same choice of blocks as the session's own */
    cairn_session *donor = NULL;
    cairn_runtime *rt = NULL;
    const cairn_token *tail;
    size_t n;
    cairn_status st;
    opt.struct_size = sizeof opt;
    opt.fresh = false;
    opt.write = false;
    if ((st = cairn_session_begin(store, cairn_session_shape(session), name, 1, &opt, &donor)) != CAIRN_OK) goto out;
    if ((st = cairn_session_tail(donor, &tail, &n)) != CAIRN_OK || n == 0) goto out;
    if (n == 1 && tail[0] == model->info.bos && cairn_session_slot(donor) == 0) goto out; /* an empty text */
    if ((st = cairn_runtime_begin(model, donor, 1, &rt)) != CAIRN_OK) goto out;
    if ((st = cairn_runtime_close_block(rt)) != CAIRN_OK) goto out;
    st = cairn_session_adopt(session, donor, number);
out:
    cairn_runtime_end(rt);
    cairn_session_end(donor);
    return st;
}

cairn_status cairn_model_adopt_tails(const cairn_model *model, cairn_store *store, const char *const *names, size_t n,
                                     cairn_session *session)
{
    for (size_t i = 0; i < n; i++) {
        cairn_status st = adopt_tail(model, store, &names[i], i, session);
        if (st != CAIRN_OK) return cairn_fail_within(st, "closing the tail of context '%s'", names[i]);
    }
    return CAIRN_OK;
}
