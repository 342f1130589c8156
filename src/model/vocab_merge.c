/* vocab_merge.c - neighbours joined in pairs, the best first, and text between user-defined tokens. */
#include "vocab_internal.h"

typedef struct symbol_pair { /* two neighbours that make a piece */
    float score;
    size_t left;
    size_t right;
    size_t bytes; /* of both when it was found: tells a stale pair */
    uint32_t id;
} symbol_pair;

static bool better(const symbol_pair *a, const symbol_pair *b)
{
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

static void heap_push(merger *m, symbol_pair p)
{
    size_t i = m->n_heap++;
    for (; i > 0 && better(&p, &m->heap[(i - 1) / 2]); i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = p;
}

static symbol_pair heap_pop(merger *m)
{
    symbol_pair top = m->heap[0];
    symbol_pair last = m->heap[--m->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < m->n_heap; i = child) {
        if (child + 1 < m->n_heap && better(&m->heap[child + 1], &m->heap[child])) child++;
        if (!better(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return top;
}

static void try_pair(merger *m, size_t left, size_t right)
{
    symbol_pair p = {.left = left, .right = right};
    if (left == SIZE_MAX || right == SIZE_MAX) return;
    p.bytes = m->symbols[left].bytes + m->symbols[right].bytes;
    if (m->join(m, &m->symbols[left], &m->symbols[right], &p.score, &p.id)) heap_push(m, p);
}

cairn_status merger_reserve(merger *m, size_t bytes)
{
    if (bytes > m->symbols_cap) {
        cairn_free(m->symbols);
        m->symbols = cairn_alloc_array(bytes, sizeof *m->symbols);
        m->symbols_cap = m->symbols != NULL ? bytes : 0;
    }
    /* Each of the n - 1 first pairs and each of at most n - 1 joins with two new neighbours adds to the heap. */
    size_t pairs;
    if (!cairn_mul_size(bytes, 3, &pairs)) pairs = SIZE_MAX;
    if (pairs > m->heap_cap) {
        cairn_free(m->heap);
        m->heap = cairn_alloc_array(pairs, sizeof *m->heap);
        m->heap_cap = m->heap != NULL ? pairs : 0;
    }
    if (m->symbols == NULL || m->heap == NULL)
        return cairn_fail(CAIRN_NO_MEMORY, "encoding a run of %zu bytes of text", bytes);
    return CAIRN_OK;
}

void merger_run(merger *m, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        m->symbols[i].left = i == 0 ? SIZE_MAX : i - 1;
        m->symbols[i].right = i + 1 == n ? SIZE_MAX : i + 1;
    }
    m->n_heap = 0;
    for (size_t i = 1; i < n; i++) try_pair(m, i - 1, i);
    while (m->n_heap != 0) {
        symbol_pair p = heap_pop(m);
        symbol *left = &m->symbols[p.left];
        symbol *right = &m->symbols[p.right];
        if (left->bytes == 0 || right->bytes == 0 || left->bytes + right->bytes != p.bytes) continue;
        left->bytes = p.bytes;
        left->id = p.id;
        right->bytes = 0;
        left->right = right->right;
        if (right->right != SIZE_MAX) m->symbols[right->right].left = p.left;
        try_pair(m, left->left, p.left);
        try_pair(m, p.left, left->right);
    }
}

void merger_wipe(merger *m)
{
    cairn_free(m->symbols);
    cairn_free(m->heap);
    m->symbols = NULL;
    m->heap = NULL;
    m->symbols_cap = m->heap_cap = 0;
}

/* The longest user-defined token at `text`. */
static bool fixed_at(const vocab *v, const uint8_t *text, size_t bytes, uint32_t *id)
{
    if (!v->fixed_first[text[0]]) return false;
    for (uint32_t i = 0; i < v->n_fixed; i++) {
        gguf_text piece = v->pieces[v->fixed[i]];
        if (piece.bytes <= bytes && memcmp(piece.data, text, piece.bytes) == 0) {
            *id = v->fixed[i];
            return true;
        }
    }
    return false;
}

cairn_status vocab_runs(const vocab *v, const uint8_t *text, size_t bytes, vocab_run run, void *state, token_sink *out)
{
    cairn_status st = CAIRN_OK;
    size_t start = 0; /* of the run before the next user-defined token */
    uint32_t id;
    for (size_t i = 0; i < bytes && st == CAIRN_OK;) {
        if (!fixed_at(v, text + i, bytes - i, &id)) {
            i++;
            continue;
        }
        st = run(state, text + start, i - start, start == 0, out);
        emit(out, (cairn_token)id);
        i += v->pieces[id].bytes;
        start = i;
    }
    return st == CAIRN_OK ? run(state, text + start, bytes - start, start == 0, out) : st;
}
