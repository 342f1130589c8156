/* The ends of contexts, kept closed by who read the text: the block is the one its asker would make, bit for bit, and
 * where the file is not good it is made.
 * labels: threads */
#include "tiny_model.h"

#include "context_internal.h"
#include "kernels_internal.h"
#include "store_internal.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { C = 7, N = 8, PROMPT = 5 };
static const size_t lengths[N] = {1, 2, 6, 7, 8, 20, 48, 62}; /* BOS alone, short, whole blocks, and between */

typedef struct fixture {
    char *dir, *path, *at; /* of the model, of the store */
    cairn_model *model;
    cairn_store *store;
    cairn_token *tokens;
    char name[N][16];
    const char *names[N];
} fixture;

static int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    tiny_model m = tiny_model_default(); /* C = 7, layer 0 not stored */
    test_random r = {3};
    cairn_store_options opt;
    assert_non_null(fx);
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "model.gguf");
    fx->at = test_path(fx->dir, "store");
    tiny_model_write(&m, fx->path);
    assert_ok(cairn_model_open(fx->path, &fx->model));
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.map_bytes = 64 << 20;
    cairn_model_geometry(fx->model, CAIRN_F16, &opt.geometry);
    assert_ok(cairn_model_identity(fx->model, &opt.model));
    assert_ok(cairn_store_open(fx->at, &opt, &fx->store));
    fx->tokens = calloc(N * 64 + PROMPT, sizeof *fx->tokens);
    for (size_t i = 0; i < N * 64 + PROMPT; i++)
        fx->tokens[i] = i % 64 == 0 ? 1 : 3 + (cairn_token)test_random_below(&r, 256);
    for (size_t i = 0; i < N; i++) {
        snprintf(fx->name[i], sizeof fx->name[i], "doc %zu", i);
        fx->names[i] = fx->name[i];
    }
    *state = fx;
    return 0;
}

static int teardown(void **state)
{
    fixture *fx = *state;
    cairn_store_close(fx->store);
    cairn_model_close(fx->model);
    test_remove_dir(fx->dir);
    free(fx->path);
    free(fx->at);
    free(fx->tokens);
    free(fx);
    return 0;
}

static cairn_session *open_session(const fixture *fx, const char *const *names, size_t n, bool write, uint32_t threads)
{
    cairn_session_options opt;
    cairn_session *session;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
    opt.write = write;
    opt.threads = threads;
    assert_ok(cairn_session_begin(fx->store, cairn_model_shape(fx->model), names, n, &opt, &session));
    return session;
}

/* Tokens [from, to) of document i into its context, its end kept. */
static void ingest(fixture *fx, size_t i, size_t from, size_t to)
{
    cairn_runtime *rt;
    cairn_context_create(fx->store, fx->names[i], NULL);
    cairn_session *session = open_session(fx, &fx->names[i], 1, true, 1);
    assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
    assert_ok(cairn_runtime_feed(rt, fx->tokens + 64 * i + from, to - from, NULL));
    assert_ok(cairn_session_commit(session, NULL));
    assert_ok(cairn_runtime_keep_tail(rt));
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

static void ingest_all(fixture *fx)
{
    for (size_t i = 0; i < N; i++) ingest(fx, i, 0, lengths[i]);
}

static bool has_tail(size_t length)
{
    return length % C != 0 && length != 1;
}

static char *tail_path(const fixture *fx, uint64_t context)
{
    char *path = malloc(4096);
    assert_non_null(path);
    assert_ok(cairn_store_tail_path(fx->store, context, path, 4096));
    return path;
}

static bool tail_is_kept(const fixture *fx, size_t i)
{
    cairn_session *session = open_session(fx, &fx->names[i], 1, false, 1);
    uint8_t *kept = session_kept_tail(session, 0);
    cairn_session_end(session);
    cairn_free(kept);
    return kept != NULL;
}

/* The adopted blocks of a session over all documents, their tiles and landmarks, and what a prompt answers. */
typedef struct answer {
    size_t blocks, bytes;
    uint8_t *data; /* (blocks, bytes) */
    float *logits;
    size_t vocab;
} answer;

static answer ask_all(const fixture *fx, uint32_t threads)
{
    cairn_model_info info;
    cairn_runtime *rt;
    cairn_model_info_get(fx->model, &info);
    cairn_session *session = open_session(fx, fx->names, N, false, threads);
    assert_ok(cairn_model_adopt_tails(fx->model, fx->store, fx->names, N, session));
    const own_blocks *own = &session->own;
    answer a = {own->n, own->data_bytes, NULL, calloc(info.vocab, sizeof(float)), info.vocab};
    a.data = calloc(a.blocks + 1, a.bytes);
    assert_true(a.data != NULL && a.logits != NULL);
    for (size_t i = 0; i < a.blocks; i++) { /* what lies between the parts is nobody's */
        const cairn_geometry *g = &own->geometry;
        const size_t tiles = g->layers * g->kv_heads,
                     tile = cairn_tile_payload_bytes(g->dtype, own->items[i].fill, g->head_dim);
        const size_t rows = (g->layers - g->first_layer) * g->kv_heads * own->landmark_bytes;
        for (size_t t = 0; t < tiles; t++)
            memcpy(a.data + i * a.bytes + t * tile, own->items[i].data + t * own->tile_bytes, tile);
        memcpy(a.data + i * a.bytes + tiles * tile, own->items[i].data + tiles * own->tile_bytes, rows);
    }
    assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
    assert_ok(cairn_runtime_feed(rt, fx->tokens + N * 64, PROMPT, a.logits));
    cairn_runtime_end(rt);
    cairn_session_end(session);
    return a;
}

/* What is of use of two answers is the same; frees the second. */
static void assert_same_answer(const answer *a, answer *b)
{
    assert_int_equal(a->blocks, b->blocks);
    assert_memory_equal(a->data, b->data, a->blocks * a->bytes);
    assert_memory_equal(a->logits, b->logits, a->vocab * sizeof *a->logits);
    free(b->data);
    free(b->logits);
}

static void a_kept_end_is_the_block_its_asker_would_make(void **state)
{
    fixture *fx = *state;
    ingest_all(fx);
    answer kept = ask_all(fx, 1), threads = ask_all(fx, 3);
    assert_same_answer(&kept, &threads);
    size_t with = 0;
    for (size_t i = 0; i < N; i++) {
        assert_int_equal(tail_is_kept(fx, i), has_tail(lengths[i]));
        with += has_tail(lengths[i]);
    }
    assert_int_equal(kept.blocks, with);
    for (size_t i = 0; i < N; i++) {
        char *path = tail_path(fx, i + 1);
        assert_int_equal(unlink(path), has_tail(lengths[i]) ? 0 : -1);
        free(path);
    }
    answer made = ask_all(fx, 2);
    assert_same_answer(&kept, &made);
    free(kept.data);
    free(kept.logits);
}

static void a_kept_end_is_good_while_the_context_ends_there(void **state)
{
    fixture *fx = *state;
    struct stat info;
    ingest_all(fx);
    char *path = tail_path(fx, 3); /* of "doc 2", 6 tokens */
    assert_true(tail_is_kept(fx, 2));
    /* grown, by who keeps nothing: as long a tail, then a longer text with the same one */
    cairn_session *session = open_session(fx, &fx->names[2], 1, true, 1);
    cairn_runtime *rt;
    assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
    assert_ok(cairn_runtime_feed(rt, fx->tokens, 7, NULL));
    assert_ok(cairn_session_commit(session, NULL));
    cairn_runtime_end(rt);
    cairn_session_end(session);
    assert_int_equal(stat(path, &info), 0);
    assert_false(tail_is_kept(fx, 2));
    ingest(fx, 2, 6, 9);
    assert_true(tail_is_kept(fx, 2));
    /* renamed it is the same context; forked another, which ends where it ends and is made */
    assert_ok(cairn_context_rename(fx->store, fx->names[2], "other"));
    assert_ok(cairn_context_fork(fx->store, "other", fx->names[2], 16, NULL));
    assert_false(tail_is_kept(fx, 2));
    const char *other = "other";
    session = open_session(fx, &other, 1, false, 1);
    uint8_t *kept = session_kept_tail(session, 0);
    assert_non_null(kept);
    cairn_free(kept);
    cairn_session_end(session);
    /* emptied, the file is gone; and dropped */
    cairn_writer *writer;
    assert_ok(cairn_writer_begin(fx->store, "other", &writer));
    assert_ok(cairn_writer_truncate(writer));
    cairn_writer_end(writer);
    assert_int_equal(stat(path, &info), -1);
    free(path);
    path = tail_path(fx, 8);
    assert_int_equal(stat(path, &info), 0);
    assert_ok(cairn_context_drop(fx->store, fx->names[7]));
    assert_int_equal(stat(path, &info), -1);
    /* what a kill between the two left goes when the store is compacted, what is good stays */
    char *left = tail_path(fx, 70), *half = test_path(fx->at, "index/tail-6.new-x"), *good = tail_path(fx, 6);
    int fd = open(left, O_CREAT | O_WRONLY, 0600);
    close(fd);
    fd = open(half, O_CREAT | O_WRONLY, 0600);
    close(fd);
    assert_ok(cairn_store_compact(fx->store, NULL, NULL));
    assert_int_equal(stat(left, &info), -1);
    assert_int_equal(stat(half, &info), -1);
    assert_int_equal(stat(good, &info), 0);
    assert_true(tail_is_kept(fx, 5));
    free(left);
    free(half);
    free(good);
    free(path);
}

static void an_end_is_kept_and_used_under_the_models_own_policy_alone(void **state)
{
    fixture *fx = *state;
    for (int other = 0; other < 2; other++) {
        cairn_session_options opt;
        cairn_session *session;
        cairn_runtime *rt;
        cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
        opt.write = true;
        if (other == 0) opt.policy.top_k++;
        cairn_context_create(fx->store, fx->names[1], NULL);
        assert_ok(cairn_session_begin(fx->store, cairn_model_shape(fx->model), &fx->names[1], 1, &opt, &session));
        assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
        assert_ok(cairn_runtime_feed(rt, fx->tokens, 10, NULL));
        assert_ok(cairn_session_commit(session, NULL));
        assert_int_equal(cairn_session_keep_tail(session), CAIRN_INVALID); /* it is not closed */
        assert_ok(cairn_runtime_keep_tail(rt));
        assert_int_equal(cairn_runtime_feed(rt, fx->tokens, 1, NULL), CAIRN_INVALID); /* nothing may follow */
        cairn_runtime_end(rt);
        cairn_session_end(session);
        assert_int_equal(tail_is_kept(fx, 1), other == 1);
    }
    for (int field = 0; field < 5; field++) {
        cairn_session_options opt;
        cairn_session *session;
        cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
        if (field == 0) opt.policy.top_k = CAIRN_TOP_K_ALL;
        if (field == 1) opt.policy.scope = CAIRN_SCOPE_HEAD;
        if (field == 2) opt.policy.window_blocks = 3;
        if (field == 3) opt.policy.newest = 5;
        if (field == 4) opt.policy.mass = 0.5F;
        assert_ok(cairn_session_begin(fx->store, cairn_model_shape(fx->model), &fx->names[1], 1, &opt, &session));
        assert_null(session_kept_tail(session, 0));
        cairn_session_end(session);
    }
}

static void a_file_that_is_not_what_was_kept_is_done_without(void **state)
{
    fixture *fx = *state;
    ingest_all(fx);
    answer right = ask_all(fx, 2), again;
    char *path = tail_path(fx, 6), *other = test_path(fx->dir, "elsewhere");
    const int fd = open(path, O_RDWR);
    struct stat info;
    assert_int_equal(fstat(fd, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    for (off_t at = 0; at < info.st_size; at += at < 100 ? 1 : 61) {
        uint8_t byte;
        assert_int_equal(pread(fd, &byte, 1, at), 1);
        byte ^= 1;
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        assert_false(tail_is_kept(fx, 5));
        if (at == 30 || at == 161) {
            again = ask_all(fx, 2);
            assert_same_answer(&right, &again);
        }
        byte ^= 1;
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    }
    assert_true(tail_is_kept(fx, 5));
    assert_int_equal(rename(path, other), 0);
    assert_int_equal(symlink(other, path), 0);
    assert_false(tail_is_kept(fx, 5));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_false(tail_is_kept(fx, 5));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_false(tail_is_kept(fx, 5));
    again = ask_all(fx, 2);
    assert_same_answer(&right, &again);
    /* nor can one be kept there: the text is stored, and who reads it is told */
    cairn_runtime *rt;
    cairn_session *session = open_session(fx, &fx->names[5], 1, true, 1);
    assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
    assert_int_not_equal(cairn_runtime_keep_tail(rt), CAIRN_OK);
    assert_non_null(strstr(cairn_last_error(), "tail-6"));
    cairn_runtime_end(rt);
    cairn_session_end(session);
    close(fd);
    free(path);
    free(other);
    free(right.data);
    free(right.logits);
}

static void without_memory_an_end_is_made_or_the_asker_is_told(void **state)
{
    fixture *fx = *state;
    ingest_all(fx);
    cairn_status st = CAIRN_NO_MEMORY;
    for (uint64_t fail = 1; st != CAIRN_OK; fail++) {
        cairn_session *session = open_session(fx, fx->names, N, false, 1);
        cairn_alloc_fail_at(fail);
        st = cairn_model_adopt_tails(fx->model, fx->store, fx->names, N, session);
        const bool failed = cairn_alloc_fail_at(0) >= fail;
        assert_true(fail < 3000 && (st == CAIRN_OK || st == CAIRN_NO_MEMORY));
        cairn_session_end(session);
        if (st == CAIRN_OK && failed) st = CAIRN_NO_MEMORY; /* it was one that could be done without */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_kept_end_is_the_block_its_asker_would_make, setup, teardown),
        cmocka_unit_test_setup_teardown(a_kept_end_is_good_while_the_context_ends_there, setup, teardown),
        cmocka_unit_test_setup_teardown(an_end_is_kept_and_used_under_the_models_own_policy_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(a_file_that_is_not_what_was_kept_is_done_without, setup, teardown),
        cmocka_unit_test_setup_teardown(without_memory_an_end_is_made_or_the_asker_is_told, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
