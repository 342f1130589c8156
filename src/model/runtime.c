/* runtime.c - a stream of tokens over a session: which rows go into which chunk.
 *
 * Chunks follow the block grid of the stream: they end at multiples of chunk_blocks blocks from its slot 0, whatever
 * the calls looked like. A landmark that closes a block runs in the same call as the block's last token, so what a
 * commit finds between two calls is whole. */
#include "runtime_internal.h"

#include "context_internal.h"

typedef enum wanted { NO_LOGITS, LAST_LOGITS, ALL_LOGITS } wanted;

static cairn_status check_shape(const cairn_runtime *rt, const cairn_attention_shape *shape)
{
    const cairn_model_info *info = &rt->model->info;
    if (shape->layers != info->layers || shape->heads != info->heads || shape->kv_heads != info->kv_heads ||
        shape->head_dim != info->head_dim)
        return cairn_fail(CAIRN_MISMATCH,
                          "the session has %u layers of %u heads over %u of %u dimensions, model %s %u, %u, %u and %u",
                          shape->layers, shape->heads, shape->kv_heads, shape->head_dim, info->name, info->layers,
                          info->heads, info->kv_heads, info->head_dim);
    if (rt->landmarks && info->landmark < 0)
        return cairn_fail(CAIRN_MISMATCH, "the session's stream has landmarks, model %s has none", info->name);
    return CAIRN_OK;
}

/* Slots of the chunk grid left from the present one. */
static size_t room(const cairn_runtime *rt, uint32_t *offset)
{
    uint64_t slot = cairn_session_slot(rt->session);
    uint64_t grid = (uint64_t)rt->chunk_blocks * rt->B;
    *offset = (uint32_t)(slot % rt->B);
    return (size_t)(grid - slot % grid);
}

static cairn_status run_chunk(cairn_runtime *rt, uint32_t offset, size_t rows, bool many_logits)
{
    cairn_status st = forward_chunk(rt, offset, rows, many_logits);
    if (st != CAIRN_OK) rt->broken = true;
    return st;
}

static cairn_status run_one(cairn_runtime *rt, cairn_token id, float *logits)
{
    cairn_status st = forward_one(rt, id, logits);
    if (st != CAIRN_OK) rt->broken = true;
    return st;
}

/* Plain tokens through chunks, landmarks put in where due. */
static cairn_status run_tokens(cairn_runtime *rt, const cairn_token *tokens, size_t n, float *logits, wanted want)
{
    const size_t width = rt->model->info.vocab; /* of a row of logits */
    for (size_t done = 0; done < n;) {
        uint32_t offset;
        size_t most = room(rt, &offset);
        size_t rows = 0;
        for (; rows < most; rows++) {
            rt->logits[rows] = NULL;
            if (cairn_session_landmark_due(rt->session, rows)) {
                rt->ids[rows] = rt->model->info.landmark;
            } else if (done < n) {
                if (want == ALL_LOGITS) rt->logits[rows] = logits + done * width;
                if (want == LAST_LOGITS && done + 1 == n) rt->logits[rows] = logits;
                rt->ids[rows] = tokens[done++];
            } else {
                break;
            }
        }
        cairn_status st = run_chunk(rt, offset, rows, want == ALL_LOGITS);
        if (st != CAIRN_OK) return st;
    }
    return CAIRN_OK;
}

/* One token by matrix-vector products, and the landmark it may make due. */
static cairn_status run_step(cairn_runtime *rt, cairn_token token, float *logits)
{
    cairn_token landmark = rt->model->info.landmark;
    cairn_status st = CAIRN_OK;
    if (cairn_session_landmark_due(rt->session, 0)) st = run_one(rt, landmark, NULL);
    if (st == CAIRN_OK) st = run_one(rt, token, logits);
    if (st == CAIRN_OK && cairn_session_landmark_due(rt->session, 0)) st = run_one(rt, landmark, NULL);
    return st;
}

static cairn_status check_token(const cairn_runtime *rt, const cairn_token *tokens, size_t i, size_t n)
{
    if (tokens[i] >= 0 && (uint32_t)tokens[i] < rt->model->info.vocab) return CAIRN_OK;
    return cairn_fail(CAIRN_INVALID, "token %zu of %zu is %d, model %s has %u", i, n, tokens[i], rt->model->info.name,
                      rt->model->info.vocab);
}

static cairn_status check_ready(const cairn_runtime *rt)
{
    return rt->broken
               ? cairn_fail(CAIRN_INVALID, "an earlier feed of this runtime failed half way; begin a new session")
               : CAIRN_OK;
}

/* Before anything runs, so that a refused call changes nothing. */
static cairn_status check_plain(const cairn_runtime *rt, const cairn_token *tokens, size_t n)
{
    cairn_status st = check_ready(rt);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        st = check_token(rt, tokens, i, n);
        if (st == CAIRN_OK && tokens[i] == rt->model->info.landmark)
            st = cairn_fail(CAIRN_INVALID, "token %zu of %zu is the landmark (%d), which is put in where due", i, n,
                            tokens[i]);
    }
    return st;
}

cairn_status cairn_runtime_feed(cairn_runtime *rt, const cairn_token *tokens, size_t n, float *logits)
{
    cairn_status st = check_plain(rt, tokens, n);
    if (st != CAIRN_OK) return st;
    if (n == 0 && logits != NULL) return cairn_fail(CAIRN_INVALID, "logits after no token");
    if (n == 1 && logits != NULL) return run_step(rt, tokens[0], logits);
    return run_tokens(rt, tokens, n, logits, logits != NULL ? LAST_LOGITS : NO_LOGITS);
}

cairn_status cairn_runtime_feed_all(cairn_runtime *rt, const cairn_token *tokens, size_t n, float *logits)
{
    cairn_status st = check_plain(rt, tokens, n);
    if (st != CAIRN_OK) return st;
    if (n == 1 && logits != NULL) return run_step(rt, tokens[0], logits);
    return run_tokens(rt, tokens, n, logits, logits != NULL ? ALL_LOGITS : NO_LOGITS);
}

cairn_status cairn_runtime_feed_slots(cairn_runtime *rt, const cairn_token *slots, size_t n, float *logits)
{
    const size_t width = rt->model->info.vocab; /* of a row of logits */
    cairn_status st = check_ready(rt);
    for (size_t i = 0; i < n && st == CAIRN_OK; i++) {
        bool due = cairn_session_landmark_due(rt->session, i);
        st = check_token(rt, slots, i, n);
        if (st == CAIRN_OK && rt->model->info.landmark >= 0 && (slots[i] == rt->model->info.landmark) != due)
            st = cairn_fail(CAIRN_INVALID, "slot %llu is token %d: %s",
                            (unsigned long long)cairn_session_slot(rt->session) + i, slots[i],
                            due ? "the landmark is due there" : "no landmark is due there");
    }
    if (st == CAIRN_OK && n == 1 && logits != NULL) return run_one(rt, slots[0], logits);
    for (size_t done = 0; done < n && st == CAIRN_OK;) {
        uint32_t offset;
        size_t rows = room(rt, &offset);
        if (rows > n - done) rows = n - done;
        memcpy(rt->ids, slots + done, rows * sizeof *slots);
        for (size_t r = 0; r < rows; r++) rt->logits[r] = logits != NULL ? logits + (done + r) * width : NULL;
        st = run_chunk(rt, offset, rows, true);
        done += rows;
    }
    return st;
}

cairn_status cairn_runtime_close_block(cairn_runtime *rt)
{
    cairn_status st = check_ready(rt);
    if (st == CAIRN_OK) st = cairn_session_close_block(rt->session);
    if (st != CAIRN_OK) return st;
    return run_one(rt, rt->model->info.landmark, NULL);
}

/* ---- begin: what the session has lost is computed again ---- */

static cairn_status refill(cairn_runtime *rt)
{
    const cairn_model_info *info = &rt->model->info;
    const size_t C = rt->B - 1;
    const size_t row = (size_t)info->kv_heads * info->head_dim;
    const cairn_token *tokens;
    size_t n;
    size_t floats;
    float *k = NULL;
    float *v = NULL;
    cairn_status st = cairn_session_refill_tokens(rt->session, &tokens, &n);
    if (st != CAIRN_OK || n == 0) return st;
    size_t blocks = n / C;
    if (!cairn_mul_size(blocks * rt->B, row, &floats)) floats = SIZE_MAX;
    k = cairn_alloc_array(floats, sizeof *k);
    v = cairn_alloc_array(floats, sizeof *v);
    if (k == NULL || v == NULL) {
        st = cairn_fail(CAIRN_NO_MEMORY, "layer 0 of %zu blocks", blocks);
        goto out;
    }
    for (size_t done = 0; done < blocks;) {
        size_t some = blocks - done < rt->chunk_blocks ? blocks - done : rt->chunk_blocks;
        for (size_t b = 0; b < some; b++) {
            const cairn_token *block = tokens + (done + b) * C;
            for (size_t i = 0; i < C && st == CAIRN_OK; i++) st = check_token(rt, block, i, C);
            if (st != CAIRN_OK) goto out;
            memcpy(rt->ids + b * rt->B, block, C * sizeof *block);
            rt->ids[b * rt->B + C] = info->landmark;
        }
        size_t at = done * rt->B * row;
        forward_first_layer(rt, rt->ids, some, k + at, v + at);
        done += some;
    }
    st = cairn_session_refill(rt->session, 0, k, v);
out:
    cairn_free(k);
    cairn_free(v);
    return st;
}

static cairn_status rerun_tail(cairn_runtime *rt)
{
    const cairn_token *tokens;
    size_t n;
    cairn_status st = cairn_session_tail(rt->session, &tokens, &n);
    if (st == CAIRN_OK) st = check_plain(rt, tokens, n);
    if (st == CAIRN_OK) st = run_tokens(rt, tokens, n, NULL, NO_LOGITS);
    return st != CAIRN_OK ? cairn_fail_within(st, "running the %zu tokens of the context's tail again", n) : st;
}

cairn_status cairn_runtime_begin(const cairn_model *model, cairn_session *session, uint32_t chunk_blocks,
                                 cairn_runtime **out)
{
    const cairn_attention_shape *shape = cairn_session_shape(session);
    cairn_status st;
    *out = NULL;
    cairn_runtime *rt = cairn_calloc(1, sizeof *rt);
    if (rt == NULL) return cairn_fail(CAIRN_NO_MEMORY, "runtime");
    rt->model = model;
    rt->session = session;
    rt->kernels = cairn_kernels_best();
    rt->pool = session->pool;
    rt->chunk_blocks = chunk_blocks;
    rt->landmarks = shape->scheme != CAIRN_POSITION_DENSE;
    rt->B = shape->block_tokens + (rt->landmarks ? 1 : 0);
    if ((st = check_shape(rt, shape)) != CAIRN_OK) goto out;
    if ((st = forward_init(rt)) != CAIRN_OK) goto out;
    if ((st = refill(rt)) != CAIRN_OK) goto out;
    if ((st = rerun_tail(rt)) != CAIRN_OK) goto out;
    *out = rt;
    rt = NULL;
out:
    cairn_runtime_end(rt);
    return st;
}

void cairn_runtime_end(cairn_runtime *rt)
{
    if (rt == NULL) return;
    forward_wipe(rt);
    cairn_free(rt);
}
