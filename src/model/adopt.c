/* adopt.c - the ends of attached contexts, made findable.
 *
 * A context's last tokens, fewer than a block, have no landmark: nothing could retrieve them, and a document shorter
 * than a block would not be there at all. Each such tail is run in a session of its own, where it sees its own context,
 * and closed early by a landmark; the session that attaches the context takes the block over. An empty text adds
 * nothing: a block of BOS alone, which no model was trained on, would draw attention (a fifth of it in test_cli).
 *
 * Who reads a text closes its tail then, and keeps the block beside the store (tails.c): it need only be read here.
 *
 * Tails have nothing to do with one another: each is one thread's work, and the session's threads share them. */
#include "runtime_internal.h"

#include "context_internal.h"

enum {
    TAILS_A_THREAD = 2, /* donors of a thread that wait for their blocks to be taken over */
    RAM_SHARE = 16      /* of the session's budget, what the landmarks of all of them may take; one is always allowed */
};

typedef struct tails {
    const cairn_model *model;
    cairn_store *store;
    const char *const *names;
    const cairn_session *session;
    uint32_t threads;        /* of a donor */
    size_t first;            /* context of item 0 */
    uint8_t **kept;          /* of each item: the file of its block; NULL: there is none, and there is */
    cairn_session **donors;  /* a session that closed it; both NULL: nothing to adopt */
    cairn_status *status_of; /* likewise */
} tails;

/* BOS alone. */
static bool is_empty_text(const cairn_model *model, uint64_t slot, const cairn_token *tail, size_t n)
{
    return n == 1 && tail[0] == model->info.bos && slot == 0;
}

/* A session over one context whose tail is closed. *out stays NULL where there is nothing to close. */
static cairn_status close_tail(const tails *t, size_t context, cairn_session **out)
{
    cairn_session_options opt = t->session->opt; /* the same choice of blocks as the session's own */
    cairn_session *donor = NULL;
    cairn_runtime *rt = NULL;
    const cairn_token *tail;
    size_t n;
    cairn_status st;
    opt.struct_size = sizeof opt;
    opt.fresh = false;
    opt.write = false;
    opt.threads = t->threads;
    st = cairn_session_begin(t->store, cairn_session_shape(t->session), &t->names[context], 1, &opt, &donor);
    if (st != CAIRN_OK) goto out;
    if ((st = cairn_session_tail(donor, &tail, &n)) != CAIRN_OK || n == 0) goto out;
    if (is_empty_text(t->model, cairn_session_slot(donor), tail, n)) goto out;
    if ((st = cairn_runtime_begin(t->model, donor, 1, &rt)) != CAIRN_OK) goto out;
    if ((st = cairn_runtime_close_block(rt)) != CAIRN_OK) goto out;
    *out = donor;
    donor = NULL;
out:
    cairn_runtime_end(rt);
    cairn_session_end(donor);
    return st;
}

static void tail_item(void *arg, size_t item, size_t worker)
{
    const tails *t = arg;
    (void)worker;
    t->status_of[item] = CAIRN_OK;
    if ((t->kept[item] = session_kept_tail(t->session, t->first + item)) != NULL) return;
    t->status_of[item] = close_tail(t, t->first + item, &t->donors[item]);
}

/* How many tails are closed at once, of at most n: each donor holds the landmarks of its context. */
static size_t at_once(const cairn_session *s, size_t first, size_t n)
{
    uint64_t block_bytes = s->n_stored != 0 ? landmarks_bytes(&s->landmarks) / s->n_stored : 0;
    uint64_t bytes = 0;
    size_t some = 0;
    for (; some < n && first + some < s->n_contexts; some++) {
        bytes += s->contexts[first + some].blocks * block_bytes;
        if (bytes > s->opt.ram_bytes / RAM_SHARE) break;
    }
    return some != 0 ? some : 1;
}

static cairn_status adopt_tail(const tails *t, size_t item, cairn_session *session)
{
    size_t context = t->first + item;
    cairn_status st = t->status_of[item];
    if (st != CAIRN_OK) st = close_tail(t, context, &t->donors[item]); /* again: the sentence is another thread's */
    if (st == CAIRN_OK && t->kept[item] != NULL)
        st = session_adopt_kept(session, context, t->kept[item]);
    else if (st == CAIRN_OK && t->donors[item] != NULL)
        st = cairn_session_adopt(session, t->donors[item], context);
    return st == CAIRN_OK ? st : cairn_fail_within(st, "closing the tail of context '%s'", t->names[context]);
}

cairn_status cairn_model_adopt_tails(const cairn_model *model, cairn_store *store, const char *const *names, size_t n,
                                     cairn_session *session)
{
    const size_t most = TAILS_A_THREAD * cairn_pool_size(session->pool);
    tails t = {.model = model, .store = store, .names = names, .session = session};
    cairn_status st = CAIRN_OK;
    t.donors = cairn_calloc(most, sizeof(cairn_session *));
    t.kept = cairn_calloc(most, sizeof(uint8_t *));
    t.status_of = cairn_calloc(most, sizeof *t.status_of);
    if (t.donors == NULL || t.kept == NULL || t.status_of == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "tails of %zu contexts", most);
    for (size_t some; t.first < n && st == CAIRN_OK; t.first += some) {
        some = at_once(session, t.first, n - t.first < most ? n - t.first : most);
        t.threads = some == 1 ? session->opt.threads : 1;
        cairn_pool_run(session->pool, some, tail_item, &t);
        for (size_t i = 0; i < some; i++) {
            if (st == CAIRN_OK) st = adopt_tail(&t, i, session);
            cairn_session_end(t.donors[i]);
            t.donors[i] = NULL;
            cairn_free(t.kept[i]);
        }
    }
    cairn_free(t.donors);
    cairn_free(t.kept);
    cairn_free(t.status_of);
    return st;
}

cairn_status cairn_runtime_keep_tail(cairn_runtime *rt)
{
    const uint64_t slot = cairn_session_slot(rt->session), fill = slot % rt->B;
    const own_blocks *own = &rt->session->own;
    if (!rt->landmarks || fill == 0 || own->n == 0) return CAIRN_OK;
    if (is_empty_text(rt->model, slot - fill, own->items[own->n - 1].tokens, fill)) return CAIRN_OK;
    cairn_status st = cairn_runtime_close_block(rt);
    return st == CAIRN_OK ? cairn_session_keep_tail(rt->session) : st;
}
