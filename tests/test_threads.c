/* test_threads.c - several sessions in one process, each with its own threads: answering at once, forking what is being
 * ingested, building an index while others ask.
 * labels: threads */
#include "must.h"
#include "tiny_model.h"

#include <cairn/cairn.h>

#include <pthread.h>
#include <stdatomic.h>

enum { VOCAB = 260, TEXT = 350, STEP = 25 };

typedef struct fixture {
    char *dir, *store_path;
    cairn_model *model;
    cairn_store *store;
    cairn_token text[TEXT];
    atomic_bool stop;
} fixture;

static int set_up(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    tiny_model m = tiny_model_default();
    cairn_store_options opt;
    fx->dir = test_make_dir();
    fx->store_path = test_path(fx->dir, "store");
    char *path = test_path(fx->dir, "model.gguf");
    tiny_model_write(&m, path);
    assert_ok(cairn_model_open(path, &fx->model));
    free(path);
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.no_sync = true;
    opt.map_bytes = 1 << 28;
    cairn_model_geometry(fx->model, CAIRN_F16, &opt.geometry);
    assert_ok(cairn_model_identity(fx->model, &opt.model));
    assert_ok(cairn_store_open(fx->store_path, &opt, &fx->store));
    for (size_t i = 0; i < TEXT; i++) fx->text[i] = 3 + (cairn_token)(i * i * 7 % 251);
    *state = fx;
    return 0;
}

static int tear_down(void **state)
{
    fixture *fx = *state;
    cairn_store_close(fx->store);
    cairn_model_close(fx->model);
    free(fx->store_path);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

/* The whole text in commits of STEP tokens. */
static void ingest(fixture *fx, const char *context, uint32_t threads)
{
    cairn_session *session;
    cairn_runtime *rt;
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
    opt.threads = threads;
    opt.write = true;
    must(cairn_session_begin(fx->store, cairn_model_shape(fx->model), &context, 1, &opt, &session) == CAIRN_OK);
    must(cairn_runtime_begin(fx->model, session, 2, &rt) == CAIRN_OK);
    for (size_t at = 0; at < TEXT; at += STEP) {
        must(cairn_runtime_feed(rt, fx->text + at, STEP, NULL) == CAIRN_OK);
        must(cairn_session_commit(session, NULL) == CAIRN_OK);
    }
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

typedef struct answer {
    fixture *fx;
    const char *context;
    cairn_fetch_mode fetch;
    uint32_t threads;
    size_t rounds;
    float logits[VOCAB]; /* of the last round */
} answer;

static void ask(answer *a)
{
    static const cairn_token prompt[] = {70, 71, 72, 73, 74, 75, 76, 77, 78};
    cairn_session *session;
    cairn_runtime *rt;
    cairn_session_options opt;
    const cairn_model *model = a->fx->model;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(model));
    opt.threads = a->threads;
    opt.fetch = a->fetch;
    opt.ram_bytes = 1 << 20;
    must(cairn_session_begin(a->fx->store, cairn_model_shape(model), &a->context, 1, &opt, &session) == CAIRN_OK);
    must(cairn_runtime_begin(model, session, 1, &rt) == CAIRN_OK);
    must(cairn_runtime_feed(rt, prompt, sizeof prompt / sizeof *prompt, a->logits) == CAIRN_OK);
    must(cairn_runtime_feed(rt, prompt, 1, a->logits) == CAIRN_OK);
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

static void *ask_on(void *arg)
{
    answer *a = arg;
    float first[VOCAB];
    for (size_t i = 0; i < a->rounds; i++) {
        ask(a);
        if (i == 0) memcpy(first, a->logits, sizeof first);
        must(memcmp(first, a->logits, sizeof first) == 0);
    }
    return NULL;
}

static void sessions_in_one_process_answer_at_once_as_each_does_alone(void **state)
{
    fixture *fx = *state;
    enum { ASKERS = 4 };
    pthread_t threads[ASKERS];
    answer alone = {.fx = fx, .context = "a", .fetch = CAIRN_FETCH_MAP, .threads = 1};
    answer each[ASKERS];
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    ingest(fx, "a", 1);
    ask(&alone);
    for (size_t i = 0; i < ASKERS; i++) {
        each[i] = (answer){.fx = fx,
                           .context = "a",
                           .fetch = i % 2 == 0 ? CAIRN_FETCH_READ : CAIRN_FETCH_MAP,
                           .threads = (uint32_t)(1 + i % 3),
                           .rounds = 8};
        assert_int_equal(pthread_create(&threads[i], NULL, ask_on, &each[i]), 0);
    }
    for (size_t i = 0; i < ASKERS; i++) pthread_join(threads[i], NULL);
    for (size_t i = 0; i < ASKERS; i++) assert_memory_equal(each[i].logits, alone.logits, sizeof alone.logits);
}

static void *ingest_on(void *arg)
{
    fixture *fx = arg;
    ingest(fx, "a", 2);
    atomic_store(&fx->stop, true);
    return NULL;
}

static void forks_of_what_is_being_ingested_hold_whole_blocks_and_answer(void **state)
{
    fixture *fx = *state;
    pthread_t writer;
    size_t forks = 0;
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    assert_int_equal(pthread_create(&writer, NULL, ingest_on, fx), 0);
    for (uint64_t last = 0; !atomic_load(&fx->stop); forks++) {
        cairn_snapshot *snap;
        cairn_context_info info;
        cairn_token tail[8];
        size_t n;
        assert_ok(cairn_context_fork(fx->store, "a", "fork", UINT64_MAX, NULL));
        assert_ok(cairn_snapshot_begin(fx->store, &snap));
        assert_ok(cairn_snapshot_context(snap, "fork", &info));
        assert_int_equal(info.tokens % STEP, 0); /* what was committed, no more and no less */
        assert_true(info.tokens >= last);
        last = info.tokens;
        assert_ok(cairn_snapshot_tail(snap, info.id, tail, 8, &n));
        assert_memory_equal(tail, fx->text + info.blocks * 7, n * sizeof *tail);
        cairn_snapshot_end(snap);
        if (info.blocks > 0) ask(&(answer){.fx = fx, .context = "fork", .fetch = CAIRN_FETCH_MAP, .threads = 2});
        assert_ok(cairn_context_drop(fx->store, "fork"));
    }
    pthread_join(writer, NULL);
    assert_true(forks > 0);
    /* The forks changed nothing: an undisturbed context answers the same. */
    answer disturbed = {.fx = fx, .context = "a", .fetch = CAIRN_FETCH_MAP, .threads = 1}, undisturbed = disturbed;
    undisturbed.context = "b";
    assert_ok(cairn_context_create(fx->store, "b", NULL));
    ingest(fx, "b", 1);
    ask(&disturbed);
    ask(&undisturbed);
    assert_memory_equal(disturbed.logits, undisturbed.logits, sizeof undisturbed.logits);
    assert_ok(cairn_store_verify(fx->store, true, NULL, NULL, NULL, NULL));
}

static void an_index_may_be_built_while_others_ask(void **state)
{
    fixture *fx = *state;
    static const char *const kinds[] = {"flat", "scan", "exact", "flat"};
    pthread_t asker;
    assert_ok(cairn_context_create(fx->store, "a", NULL));
    ingest(fx, "a", 1);
    answer a = {.fx = fx, .context = "a", .fetch = CAIRN_FETCH_MAP, .threads = 2, .rounds = 10};
    assert_int_equal(pthread_create(&asker, NULL, ask_on, &a), 0);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        assert_ok(cairn_context_reindex(fx->store, cairn_model_shape(fx->model), "a", kinds[i], NULL, NULL));
    pthread_join(asker, NULL);
}

#define with_fixture(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        with_fixture(sessions_in_one_process_answer_at_once_as_each_does_alone),
        with_fixture(forks_of_what_is_being_ingested_hold_whole_blocks_and_answer),
        with_fixture(an_index_may_be_built_while_others_ask),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
