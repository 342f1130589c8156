/* test_cli_train.c - `cairn train` as a person runs it: plans, going on, stopping, what is refused.
 *
 * Witnesses: a run that was never stopped; the log read as JSON; a file that `cairn ask` can use.
 */
#include "command.h"
#include "tiny_vocab.h"

#include <cairn/model.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char plan_text[] =
    "{\"name\": \"small\",\n"
    " \"model\": {\"width\": 32, \"layers\": 2, \"heads\": 2, \"kv_heads\": 2, \"head_dim\": 16, \"hidden\": 48,\n"
    "             \"block_tokens\": 15, \"guided_layer\": 1, \"guided_heads\": 1, \"remembered\": 16, \"threads\": "
    "2},\n"
    " \"stages\": [{\"name\": \"first\", \"steps\": 6, \"window\": 128, \"windows\": 4, \"warmup\": 2, \"text\": 0.2,\n"
    "               \"dense\": 0.4, \"guide\": 0.5},\n"
    "              {\"name\": \"second\", \"steps\": 6, \"windows\": 3}]}\n";

typedef struct fixture {
    char *dir, *text, *plan, *model, *log;
} fixture;

static int set_up(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    fx->dir = test_make_dir();
    fx->text = test_path(fx->dir, "text");
    fx->plan = test_path(fx->dir, "plan.json");
    fx->model = test_path(fx->dir, "model.gguf");
    fx->log = test_path(fx->dir, "log.jsonl");
    write_text(fx->text, 1500000, NULL, 0);
    test_write_file(fx->plan, plan_text, strlen(plan_text));
    *state = fx;
    return 0;
}
static int tear_down(void **state)
{
    fixture *fx = *state;
    command_done();
    test_remove_dir(fx->dir);
    free(fx->text), free(fx->plan), free(fx->model), free(fx->log), free(fx);
    return 0;
}

static void a_run_in_two_halves_gives_the_file_of_a_whole_one(void **state)
{
    fixture *fx = *state;
    char *whole = test_path(fx->dir, "whole.gguf");
    const outcome *o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", whole, "--json");
    assert_code(o, 0);
    json_t *answer = command_json(o);
    assert_int_equal(json_number(answer, "step"), 12);
    assert_true(json_is_true(json_object_get(answer, "complete")));
    assert_int_equal(json_number(answer, "tokens"), 6 * (4 + 3) * 120); /* 128 slots, 8 of them landmarks */
    json_decref(answer);

    o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--steps", "7");
    assert_code(o, 0);
    assert_says(o->out, "step 7 of 12");
    o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model);
    assert_code(o, 0);
    assert_says(o->out, "finished");
    size_t a_bytes, b_bytes;
    void *a = test_read_file(whole, &a_bytes), *b = test_read_file(fx->model, &b_bytes);
    assert_non_null(a);
    assert_non_null(b);
    assert_int_equal(a_bytes, b_bytes);
    assert_memory_equal(a, b, a_bytes);
    free(a), free(b);

    o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--json"); /* there is nothing left to do */
    assert_code(o, 0);
    answer = command_json(o);
    assert_int_equal(json_number(answer, "tokens"), 0);
    assert_true(json_is_true(json_object_get(answer, "complete")));
    json_decref(answer);

    char *store = test_path(fx->dir, "store");
    assert_code(cairn_run("ingest", store, "-m", whole, "-c", "text", fx->plan), 0);
    assert_code(cairn_run("ask", store, "-m", whole, "-c", "text", "-n", "2", "name"), 0);
    free(store), free(whole);
}

static void the_log_has_a_line_of_json_for_each_report(void **state)
{
    fixture *fx = *state;
    const outcome *o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--log", fx->log, "--report",
                                 "4", "--progress");
    assert_code(o, 0);
    assert_says(o->err, "step 4 of 12, first");
    assert_says(o->err, "tokens/s");
    FILE *f = fopen(fx->log, "r");
    assert_non_null(f);
    static const long long steps[] = {4, 6, 8, 12}; /* a stage's last updates are not mixed with the next one's */
    char line[2000];
    size_t n = 0;
    for (; fgets(line, sizeof line, f) != NULL; n++) {
        json_t *report = json_loads(line, 0, NULL);
        assert_non_null(report);
        assert_true(n < 4);
        assert_int_equal(json_number(report, "step"), steps[n]);
        assert_string_equal(json_text(report, "stage"), n < 2 ? "first" : "second");
        assert_in_range(100 * json_real_value(json_object_get(report, "text_bits_per_byte")), 300, 1000);
        assert_true(json_number(report, "plain_right") <= json_number(report, "plain_answers"));
        json_decref(report);
    }
    assert_int_equal(n, 4);
    fclose(f);
}

/* The plan with `from` replaced by `to`. */
static void write_plan(const fixture *fx, const char *from, const char *to)
{
    char changed[sizeof plan_text + 200];
    const char *at = strstr(plan_text, from);
    assert_non_null(at);
    int n = snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - plan_text), plan_text, to, at + strlen(from));
    test_write_file(fx->plan, changed, (size_t)n);
}

/* A model of others (llama.cpp opens it too), trained on as it is: its shape, its vocabulary, its name. */
static void a_model_of_others_is_trained_on_with_its_own_tokenizer(void **state)
{
    fixture *fx = *state;
    const char *source = CAIRN_TEST_DATA "/parity/gqa-f16.gguf";
    const outcome *o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--init", source, "--steps",
                                 "7", "--progress", "--log", fx->log, "--report", "6");
    assert_code(o, 0);
    cairn_model *theirs = NULL, *ours = NULL;
    assert_ok(cairn_model_open(source, &theirs));
    assert_ok(cairn_model_open(fx->model, &ours));
    cairn_model_info a, b;
    cairn_model_info_get(theirs, &a);
    cairn_model_info_get(ours, &b);
    assert_int_equal(a.landmark, -1);
    assert_int_equal(b.landmark, 259); /* a byte vocabulary with a <landmark> that was never used */
    assert_int_equal(b.vocab, a.vocab);
    assert_string_equal(a.name, b.name);
    assert_int_equal(cairn_model_shape(ours)->block_tokens, 15);
    static const char text[] = "The pass key is 12345.";
    cairn_token before[64], after[64];
    size_t n, m;
    assert_ok(cairn_model_encode(theirs, text, sizeof text - 1, before, 64, &n));
    assert_ok(cairn_model_encode(ours, text, sizeof text - 1, after, 64, &m));
    assert_int_equal(n, m);
    assert_memory_equal(before, after, n * sizeof *before);
    cairn_model_close(theirs), cairn_model_close(ours);
    char *store = test_path(fx->dir, "store");
    assert_code(cairn_run("ingest", store, "-m", fx->model, "-c", "text", fx->plan), 0);
    assert_code(cairn_run("ask", store, "-m", fx->model, "-c", "text", "-n", "2", "name"), 0);
    free(store);
    /* and again from the result, which has landmarks of its own */
    char *more = test_path(fx->dir, "more.gguf");
    assert_code(cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", more, "--init", fx->model, "--steps", "1"), 0);
    free(more);
}

/* Byte pairs: trained with, read and asked as text, the landmark no part of it. */
static void a_model_of_byte_pairs_is_trained_on_and_asked(void **state)
{
    fixture *fx = *state;
    char *source = test_path(fx->dir, "pairs.gguf"), *store = test_path(fx->dir, "store");
    tiny_model m = tiny_model_default();
    m.block_tokens = 0;
    m.vocab = TINY_PIECES;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    tiny_put_bpe(w, "llama-bpe");
    assert_ok(cairn_gguf_writer_save(w, source));
    cairn_gguf_writer_free(w);
    assert_code(cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--init", source, "--steps", "7"),
                0);
    assert_code(cairn_run("ingest", store, "-m", fx->model, "-c", "text", fx->plan, "--json"), 0);
    const outcome *o = cairn_run("ask", store, "-m", fx->model, "-c", "text", "-n", "3", "--json", " the name");
    assert_code(o, 0);
    json_t *answer = command_json(o);
    assert_int_equal(json_number(answer, "tokens"), 3);
    json_decref(answer);
    free(source), free(store);
}

/* Its attention is known to `bench ppl` alone: the others must not run it as if it saw everything. */
static void a_transformer_xl_is_refused_where_its_segments_are_not_followed(void **state)
{
    fixture *fx = *state;
    write_plan(fx, "\"block_tokens\"", "\"attention\": \"xl\", \"segment\": 32, \"block_tokens\"");
    assert_code(cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--steps", "1"), 0);
    char *ids = test_path(fx->dir, "ids.json");
    json_t *tokens = json_array();
    for (int i = 0; i < 64; i++) json_array_append_new(tokens, json_integer(65 + i % 3));
    assert_int_equal(json_dump_file(tokens, ids, 0), 0);
    assert_code(cairn_run("logits", "-m", fx->model, "--tokens", ids), 0);
    json_array_append_new(tokens, json_integer(65));
    assert_int_equal(json_dump_file(tokens, ids, 0), 0);
    const outcome *o = cairn_run("logits", "-m", fx->model, "--tokens", ids);
    assert_code(o, 1);
    assert_says(o->err, "beyond two segments of 32 slots");
    assert_says(o->err, "65 tokens are too many");
    o = cairn_run("bench", "passkey", "-m", fx->model, "-c", fx->text, "--held-out", "1");
    assert_code(o, 1);
    assert_says(o->err, "Transformer-XL over segments of 32 slots");
    assert_code(cairn_run("bench", "ppl", "-m", fx->model, "-c", fx->text, "--held-out", "1", "--length", "100",
                          "--texts", "1"),
                0);
    json_decref(tokens);
    free(ids);
}

static void ctrl_c_leaves_a_checkpoint_to_go_on_from(void **state)
{
    fixture *fx = *state;
    write_plan(fx, "\"steps\": 6, \"window\"", "\"steps\": 99999, \"window\"");
    pid_t pid = command_start(NULL, (const char *const[]){"train", "-p", fx->plan, "-c", fx->text, "-o", fx->model,
                                                          "--minutes", "0.01", NULL});
    for (int i = 0; i < 300 && access(fx->model, F_OK) != 0; i++) usleep(100000); /* the first checkpoint */
    kill(pid, SIGINT);
    assert_int_equal(command_wait(pid), 1);
    const outcome *o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--steps", "1", "--json");
    assert_code(o, 0);
    json_t *answer = command_json(o);
    assert_true(json_number(answer, "step") > 1);
    json_decref(answer);
}

static void what_cannot_be_trained_is_refused_in_words(void **state)
{
    fixture *fx = *state;
    const struct {
        const char *from, *to, *says;
    } plans[] = {
        {"\"warmup\"", "\"warmap\"", "did you mean 'warmup'"},
        {"\"steps\": 6, \"window\"", "\"steps\": -6, \"window\"", "'steps' should be a whole number"},
        {"\"steps\": 6, \"window\"", "\"steps\": 0, \"window\"", "stage 'first': steps is 0"},
        {"128", "130", "130 slots is no whole number of blocks of 16"},
        {"\"width\": 32", "\"width\": \"wide\"", "'width' should be a whole number"},
        {"\"head_dim\": 16", "\"head_dim\": 0", "head_dim"},
        {"]}", "", "line"},
        {"\"stages\"", "\"stagez\"", "no list of \"stages\""},
    };
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        write_plan(fx, plans[i].from, plans[i].to);
        const outcome *o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model);
        assert_code(o, 1);
        assert_says(o->err, plans[i].says);
        assert_int_equal(access(fx->model, F_OK), -1);
    }
    test_write_file(fx->plan, plan_text, strlen(plan_text));
    char *tiny = test_path(fx->dir, "tiny"), *nowhere = test_path(fx->dir, "nowhere");
    test_write_file(tiny, "short", 5);
    const outcome *o = cairn_run("train", "-p", fx->plan, "-c", tiny, "-o", fx->model, "--held-out", "0");
    assert_code(o, 1);
    assert_says(o->err, "5 bytes to train on");
    test_write_file(tiny, "", 0);
    o = cairn_run("train", "-p", fx->plan, "-c", tiny, "-o", fx->model);
    assert_code(o, 1);
    assert_says(o->err, "empty");
    o = cairn_run("train", "-p", fx->plan, "-c", nowhere, "-o", fx->model);
    assert_code(o, 1);
    assert_says(o->err, "nowhere");
    o = cairn_run("train", "-p", nowhere, "-c", fx->text, "-o", fx->model);
    assert_code(o, 1);
    assert_says(o->err, "nowhere");
    o = cairn_run("train", "-c", fx->text, "-o", fx->model);
    assert_code(o, 2);
    assert_says(o->err, "--plan");

    assert_code(cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--steps", "1"), 0);
    write_plan(fx, "\"hidden\": 48", "\"hidden\": 64");
    o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model);
    assert_code(o, 1);
    assert_says(o->err, "another shape");
    o = cairn_run("train", "-p", fx->plan, "-c", fx->text, "-o", fx->model, "--fresh", "--steps", "1");
    assert_code(o, 0);
    free(tiny), free(nowhere);
}

#define with_fixture(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        with_fixture(a_run_in_two_halves_gives_the_file_of_a_whole_one),
        with_fixture(the_log_has_a_line_of_json_for_each_report),
        with_fixture(a_model_of_others_is_trained_on_with_its_own_tokenizer),
        with_fixture(a_model_of_byte_pairs_is_trained_on_and_asked),
        with_fixture(a_transformer_xl_is_refused_where_its_segments_are_not_followed),
        with_fixture(ctrl_c_leaves_a_checkpoint_to_go_on_from),
        with_fixture(what_cannot_be_trained_is_refused_in_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
