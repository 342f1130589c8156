/* test_cli.c - the `cairn` command as a person meets it: each command's answer, and what it says when it cannot.
 *
 * Texts are this library's own headers with one sentence about a pass key; the tiny landmark model of models/ reads
 * them. What goes wrong with files, disks and processes is in test_cli_faults.c.
 */
#include "command.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define QUESTION "\nWhat is the pass key? The pass key is "

enum { TEXT_BYTES = 9000 };

typedef struct fixture {
    char *dir, *text, *store;
} fixture;

static fixture fx; /* one store with the contexts "book" (key 48213) and "docs/..."; tests that change it say so */

static int set_up(void **state)
{
    (void)state;
    fx.dir = test_make_dir();
    fx.text = test_path(fx.dir, "book.txt");
    fx.store = test_path(fx.dir, "store");
    write_text(fx.text, TEXT_BYTES, "48213", 3000);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", fx.text), 0);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    command_done();
    free(fx.text);
    free(fx.store);
    test_remove_dir(fx.dir);
    return 0;
}

static char *answer_of(const char *context)
{
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", context, QUESTION);
    assert_code(o, 0);
    return strdup(o->out);
}

static long long tokens_of(const char *context)
{
    const outcome *o = cairn_run("list", fx.store, context, "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    long long tokens = json_number(json_array_get(json_object_get(root, "contexts"), 0), "tokens");
    json_decref(root);
    return tokens;
}

/* ---- help and usage ---- */

static const char *const commands[] = {"ingest", "ask",     "list",    "stat",   "show",   "fork",   "drop", "rename",
                                       "verify", "reindex", "compact", "export", "import", "logits", "bench"};

static void help_names_every_command_and_each_has_a_page_with_an_example(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        assert_says(cairn_run("--help")->out, commands[i]);
        const outcome *o = cairn_run(commands[i], "--help");
        char example[64];
        snprintf(example, sizeof example, "examples:\n  cairn %s", commands[i]);
        assert_code(o, 0);
        assert_says(o->out, "usage: cairn");
        if (strcmp(commands[i], "logits") != 0) assert_says(o->out, example);
        assert_says(o->out, "--json");
        assert_string_equal(o->err, "");
    }
}

static void version_is_the_librarys(void **state)
{
    (void)state;
    char line[64];
    snprintf(line, sizeof line, "cairn %s\n", cairn_version());
    assert_string_equal(cairn_run("--version")->out, line);
}

static void no_command_shows_the_commands_and_is_a_usage_error(void **state)
{
    (void)state;
    const outcome *o = command_run(NULL, 0, (const char *const[]){NULL});
    assert_code(o, 2);
    assert_says(o->err, "ingest");
}

static void a_mistyped_command_or_option_is_answered_with_the_nearest_one(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ingets", "x");
    assert_code(o, 2);
    assert_says(o->err, "did you mean 'ingest'?");
    o = cairn_run("ask", fx.store, "--windw", "3", "x");
    assert_code(o, 2);
    assert_says(o->err, "cairn ask: unknown option '--windw' (did you mean '--window'?)");
    o = cairn_run("frobnicate");
    assert_code(o, 2);
    assert_null(strstr(o->err, "did you mean"));
}

static void an_absurd_value_is_a_usage_error_that_names_option_and_value(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"--ram", "12Q"},
        {"--ram", "-1"},
        {"--ram", "17179869184G"},
        {"--ram", "0"},
        {"--ram", ""},
        {"--threads", "9999"},
        {"--threads", "two"},
        {"--top-k", "-3"},
        {"--top-k", "4x"},
        {"--mass", "1.5"},
        {"--mass", "nan"},
        {"--scope", "heads"},
        {"--fetch", "mmap"},
        {"--tokens", "0"},
        {"--seed", "18446744073709551616"},
        {"--temperature", "-1"},
        {"--top-p", "0"},
        {"--index", "nonsense"},
        {"--chunk-blocks", "100000"},
        {"--window", "1e3"},
        {"--sources=0", NULL},
        {"--sources=many", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *option = cases[i][0], *value = cases[i][1];
        const outcome *o = value != NULL
                               ? cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", option, value, "x")
                               : cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", option, "x");
        char name[32];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(option, "="), option);
        assert_code(o, 2);
        assert_says(o->err, name);
        assert_says(o->err, value != NULL ? value : strchr(option, '=') + 1);
        assert_string_equal(o->out, "");
    }
}

static void what_is_missing_or_too_much_is_named(void **state)
{
    (void)state;
    assert_says(cairn_run("ask", "-m", DEMO_MODEL, "-c", "book")->err, "STORE is missing");
    assert_says(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book")->err, "PROMPT is missing");
    assert_says(cairn_run("ask", fx.store, "-c", "book", "x")->err, "--model FILE is required");
    assert_says(cairn_run("ask", fx.store, "x", "-m")->err, "-m needs a value");
    assert_says(cairn_run("ask", fx.store, "x", "y", "-m", "m", "-c", "c")->err, "one argument too many: 'y'");
    assert_says(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "")->err, "PROMPT is empty");
    assert_says(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, fx.text)->err, "--context NAME is required");
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "x", "--append", "--replace", fx.text), 2);
    assert_code(cairn_run("list", fx.store, "--json=yes"), 2);
    assert_code(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--keep", "--fresh", "x"), 2);
    const char *const scope[] = {"ask",    fx.store, "-m",      DEMO_MODEL, "-c", "book",
                                 "--mass", "0.9",    "--scope", "head",     "x",  NULL};
    assert_code(command_run(NULL, 0, scope), 2);
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--sources", "3", "x");
    assert_code(o, 2);
    assert_says(o->err, "--sources=N");
}

static void with_json_an_error_is_an_object_on_stdout_and_a_sentence_on_stderr(void **state)
{
    (void)state;
    static const struct {
        int code;
        const char *status;
    } expected[] = {{2, "usage"}, {1, "not found"}, {1, "failed"}};
    for (int i = 0; i < 3; i++) {
        const outcome *o = i == 0   ? cairn_run("list", fx.store, "--json", "--no-such-option")
                           : i == 1 ? cairn_run("list", "/nonexistent/store", "--json")
                                    : cairn_run("show", fx.store, "nobody", "--json");
        assert_code(o, expected[i].code);
        json_t *root = command_json(o), *error = json_object_get(root, "error");
        assert_string_equal(json_text(error, "status"), expected[i].status);
        assert_int_equal(json_number(error, "exit"), expected[i].code);
        assert_says(o->err, json_text(error, "message"));
        json_decref(root);
    }
}

static void an_answer_that_cannot_be_written_is_a_failure(void **state)
{
    (void)state;
    char command[512];
    snprintf(command, sizeof command, "'%s' list '%s' >/dev/full 2>/dev/null", CAIRN_COMMAND, fx.store);
    int status = system(command);
    assert_int_equal(WEXITSTATUS(status), 1);
}

/* ---- ingest ---- */

static void ingest_keeps_every_byte_of_the_text_and_show_gives_it_back(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *text = test_read_file(fx.text, &bytes);
    const outcome *o = cairn_run("show", fx.store, "book", "-m", DEMO_MODEL);
    assert_code(o, 0);
    assert_int_equal(o->out_bytes, bytes);
    assert_memory_equal(o->out, text, bytes);
    o = cairn_run("show", fx.store, "book", "-m", DEMO_MODEL, "--from", "1001", "--count", "77");
    assert_int_equal(o->out_bytes, 77); /* token 0 is BOS: token 1001 is byte 1000 */
    assert_memory_equal(o->out, text + 1000, 77);
    assert_int_equal(tokens_of("book"), TEXT_BYTES + 1);
    free(text);
}

static void ingest_again_does_nothing_and_another_text_is_an_error_that_says_so(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", fx.text);
    assert_code(o, 0);
    assert_says(o->out, "nothing to do");
    char *other = test_path(fx.dir, "other.txt");
    write_text(other, 300, NULL, 0);
    o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", other);
    assert_code(o, 1);
    assert_says(o->err, "'book' holds another text");
    assert_says(o->err, "--replace");
    assert_int_equal(tokens_of("book"), TEXT_BYTES + 1);
    free(other);
}

static void append_adds_and_replace_starts_anew(void **state)
{
    (void)state;
    char *a = test_path(fx.dir, "a.txt"), *b = test_path(fx.dir, "b.txt");
    write_text(a, 500, NULL, 0);
    write_text(b, 130, "11111", 20);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "grown", a), 0);
    const outcome *o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "grown", "--append", b);
    assert_code(o, 0);
    assert_says(o->out, "appended");
    assert_int_equal(tokens_of("grown"), 501 + 131);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "grown", "--append", b), 0);
    assert_int_equal(tokens_of("grown"), 501 + 131 + 131); /* as >> would */
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "grown", "--replace", b), 0);
    assert_int_equal(tokens_of("grown"), 131);
    size_t bytes = 0;
    char *text = test_read_file(b, &bytes);
    o = cairn_run("show", fx.store, "grown", "-m", DEMO_MODEL);
    assert_int_equal(o->out_bytes, bytes);
    assert_memory_equal(o->out, text, bytes);
    assert_code(cairn_run("drop", fx.store, "grown"), 0);
    free(text);
    free(a);
    free(b);
}

static void an_appended_context_answers_as_one_ingested_at_once(void **state)
{
    (void)state;
    /* Two FILEs at once and one after the other are the same stream: BOS, first, BOS, second. */
    char *a = test_path(fx.dir, "first.txt"), *b = test_path(fx.dir, "second.txt");
    write_text(a, 1500, "70605", 200);
    write_text(b, 1111, NULL, 0);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "once", a, b), 0);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "twice", a), 0);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "twice", "--append", b), 0);
    assert_int_equal(tokens_of("once"), 1500 + 1111 + 2);
    char *once = strdup(cairn_run("show", fx.store, "once")->out);
    assert_string_equal(cairn_run("show", fx.store, "twice")->out, once);
    char *x = answer_of("once"), *y = answer_of("twice");
    assert_string_equal(x, y);
    assert_code(cairn_run("drop", fx.store, "once", "twice"), 0);
    free(once);
    free(x);
    free(y);
    free(a);
    free(b);
}

static void quiet_says_nothing_when_all_is_well(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", "--quiet", fx.text);
    assert_code(o, 0);
    assert_string_equal(o->out, "");
    assert_string_equal(o->err, "");
}

static void standard_input_is_a_file_like_any_other(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *text = test_read_file(fx.text, &bytes);
    const outcome *o = cairn_run_with(text, bytes, "ingest", fx.store, "-m", DEMO_MODEL, "-c", "book", "-");
    assert_code(o, 0);
    assert_says(o->out, "nothing to do"); /* the same identity as when it came from a file */
    free(text);
}

static void each_makes_one_context_per_file_named_by_its_path_below_the_directory(void **state)
{
    (void)state;
    char *corpus = test_path(fx.dir, "corpus"), *sub = test_path(fx.dir, "corpus/sub");
    char *a = test_path(corpus, "a.txt"), *b = test_path(sub, "b.txt"), *empty = test_path(corpus, "empty");
    mkdir(corpus, 0700);
    mkdir(sub, 0700);
    write_text(a, 400, NULL, 0);
    write_text(b, 700, "39174", 350);
    test_write_file(empty, "", 0);
    for (int again = 0; again < 2; again++) {
        const outcome *o = cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "docs", "--each", corpus, "--json");
        assert_code(o, 0);
        json_t *root = command_json(o), *list = json_object_get(root, "contexts");
        static const char *const expected[] = {"docs/a.txt", "docs/empty", "docs/sub/b.txt"};
        assert_int_equal(json_array_size(list), 3);
        for (size_t i = 0; i < 3; i++) {
            json_t *entry = json_array_get(list, i);
            assert_string_equal(json_text(entry, "name"), expected[i]);
            assert_string_equal(json_text(entry, "state"), again && i != 1 ? "unchanged" : json_text(entry, "state"));
        }
        json_decref(root);
    }
    assert_int_equal(tokens_of("docs/sub/b.txt"), 701);

    char *answer = answer_of("docs/*");
    assert_string_equal(answer, "39174.\n");
    free(answer);
    free(corpus);
    free(sub);
    free(a);
    free(b);
    free(empty);
}

static void a_file_of_a_corpus_that_cannot_be_read_keeps_no_other_out(void **state)
{
    (void)state;
    char *good = test_path(fx.dir, "good.txt"), *store = test_path(fx.dir, "partial");
    write_text(good, 200, NULL, 0);
    char *long_name = malloc(600); /* deeper than a name of a context may be long */
    snprintf(long_name, 600, "%s/%0200d/%0200d/%0150d", fx.dir, 1, 2, 3);
    for (char *slash = strchr(long_name + strlen(fx.dir) + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(long_name, 0700);
        *slash = '/';
    }
    write_text(long_name, 100, NULL, 0);
    const outcome *o = cairn_run("ingest", store, "-m", DEMO_MODEL, "--each", long_name, good, "--json");
    assert_code(o, 1);
    json_t *root = command_json(o), *list = json_object_get(root, "contexts");
    assert_int_equal(json_array_size(list), 2);
    assert_string_equal(json_text(json_array_get(list, 0), "state"), "failed");
    assert_true(strlen(json_text(json_array_get(list, 0), "error")) > 0);
    assert_string_equal(json_text(json_array_get(list, 1), "state"), "ingested");
    json_decref(root);
    free(good);
    free(store);
    free(long_name);
}

/* ---- ask ---- */

static void ask_finds_the_pass_key_and_prints_the_answer_alone(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", QUESTION);
    assert_code(o, 0);
    assert_string_equal(o->out, "48213.\n");
    assert_string_equal(o->err, "");
}

static void sources_name_the_span_the_answer_came_from(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--sources=8", QUESTION);
    assert_code(o, 0);
    assert_string_equal(o->out, "48213.\n");
    assert_says(o->err, "sources:");
    assert_says(o->err, "book, token ");
    assert_says(o->err, "48213");
}

static void json_holds_answer_sources_and_stats(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--json", QUESTION);
    assert_code(o, 0);
    json_t *root = command_json(o), *stats = json_object_get(root, "stats"),
           *sources = json_object_get(root, "sources");
    assert_string_equal(json_text(root, "answer"), "48213.");
    assert_string_equal(json_text(root, "ended"), "stop");
    assert_int_equal(json_number(root, "tokens"), 7);
    assert_true(json_array_size(sources) > 0);
    double before = 1;
    for (size_t i = 0; i < json_array_size(sources); i++) {
        double share = json_real_value(json_object_get(json_array_get(sources, i), "share"));
        assert_true(share > 0 && share <= before);
        before = share;
    }
    assert_int_equal(json_number(stats, "stored_blocks"), (TEXT_BYTES + 1) / 63);
    assert_true(json_number(stats, "stored_blocks_used") > 0);
    assert_true(json_number(stats, "peak_rss_bytes") > 1 << 20);
    assert_true(json_number(stats, "store_bytes") > 1 << 20);
    assert_true(json_is_null(json_object_get(stats, "retained_mass"))); /* it costs, and is for who asks */
    json_decref(root);
    root = command_json(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--json", "--stats", QUESTION));
    const json_t *mass = json_object_get(json_object_get(root, "stats"), "retained_mass");
    assert_true(json_real_value(json_object_get(mass, "mean")) > 0);
    json_decref(root);
}

static void stats_say_what_was_read_and_what_it_cost(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stats", QUESTION);
    assert_code(o, 0);
    static const char *const words[] = {
        "first token", "tokens/s", "of 142 stored ones were used", "per token", "retained", "VmHWM", "store "};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) assert_says(o->err, words[i]);
}

static void fetch_modes_threads_and_budgets_give_the_same_answer(void **state)
{
    (void)state;
    static const char *const variants[][4] = {
        {"--fetch", "map", "--threads", "1"},       {"--fetch", "read", "--threads", "2"},
        {"--fetch", "read", "--ram", "32M"},        {"--index", "exact", "--threads", "1"},
        {"--chunk-blocks", "1", "--fetch", "auto"},
    };
    char *expected =
        strdup(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "", "-n", "40", QUESTION)->out);
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        const char *const *v = variants[i];
        const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "", "-n", "40", v[0],
                                     v[1], v[2], v[3], QUESTION);
        assert_code(o, 0);
        assert_string_equal(o->out, expected);
    }
    free(expected);
}

static void reading_and_asking_stay_within_model_budget_and_64_MiB(void **state)
{
    (void)state;
#ifdef __SANITIZE_ADDRESS__
    skip(); /* its shadow memory is not ours */
#endif
    const long long most = 3756512 + (16 + 64) * 1048576LL;
    char *store = test_path(fx.dir, "small-memory");
    const outcome *o = cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "book", "--fetch", "read", "--ram", "16M",
                                 "--json", fx.text);
    assert_code(o, 0);
    json_t *root = command_json(o);
    assert_in_range(json_number(root, "peak_rss_bytes"), 1, most);
    json_decref(root);
    o = cairn_run("ask", store, "-m", DEMO_MODEL, "-c", "book", "--fetch", "read", "--ram", "16M", "--json", QUESTION);
    assert_code(o, 0);
    root = command_json(o);
    assert_string_equal(json_text(root, "answer"), "48213.");
    assert_in_range(json_number(json_object_get(root, "stats"), "peak_rss_bytes"), 1, most);
    json_decref(root);
    free(store);
}

static void length_and_stop_texts_end_the_answer(void **state)
{
    (void)state;
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "-n", "3", QUESTION);
    assert_string_equal(o->out, "482\n");
    o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "13.", QUESTION);
    assert_string_equal(o->out, "482\n"); /* "1" alone was held back, then known to be part of the stop */
    o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "1x", "--stop", "\\n", QUESTION);
    assert_string_equal(o->out, "48213.\n");
    o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--stop", "", "-n", "30", QUESTION);
    assert_int_equal(o->out_bytes, 31);
}

static void sampling_follows_its_seed(void **state)
{
    (void)state;
    char *texts[3];
    static const char *const seeds[] = {"1", "1", "2"};
    for (int i = 0; i < 3; i++)
        texts[i] = strdup(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--temperature", "1.2", "--seed",
                                    seeds[i], "--stop", "", "-n", "60", "The store is")
                              ->out);
    assert_string_equal(texts[0], texts[1]);
    assert_string_not_equal(texts[0], texts[2]);
    for (int i = 0; i < 3; i++) free(texts[i]);
}

static void the_prompt_may_come_from_standard_input(void **state)
{
    (void)state;
    const outcome *o = cairn_run_with(QUESTION, strlen(QUESTION), "ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "-");
    assert_code(o, 0);
    assert_string_equal(o->out, "48213.\n");
}

static void without_retrieval_the_key_is_out_of_sight(void **state)
{
    (void)state; /* the control: what finds the key is the retrieved block, not the window */
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "--top-k", "0", QUESTION);
    assert_code(o, 0);
    assert_null(strstr(o->out, "48213"));
}

static void an_answer_says_how_many_stored_blocks_it_used(void **state)
{
    (void)state; /* a context that is stored and not used cannot pass unseen */
    long long used[3];
    static const char *const k[] = {"0", "4", "all"};
    for (size_t i = 0; i < 3; i++) {
        const outcome *o =
            cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "book", "-n", "2", "--top-k", k[i], "--json", QUESTION);
        assert_code(o, 0);
        json_t *root = command_json(o);
        json_t *stats = json_object_get(root, "stats");
        assert_int_equal(json_number(stats, "stored_blocks"), (TEXT_BYTES + 1) / 63);
        used[i] = json_number(stats, "stored_blocks_used");
        json_decref(root);
    }
    assert_true(used[0] <= 1); /* the window alone */
    assert_true(used[1] > 4 && used[1] < used[2]);
    assert_int_equal(used[2], (TEXT_BYTES + 1) / 63);
}

static void several_contexts_compete_in_one_search_and_idle_ones_are_named(void **state)
{
    (void)state;
    char *grass = test_path(fx.dir, "grass.txt"), *key = test_path(fx.dir, "key.txt");
    write_text(grass, 900, NULL, 0);
    write_text(key, 1300, "90817", 600);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "m/grass", grass), 0);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "m/key", key), 0);
    static const char *const ways[] = {"m/grass,m/key", "m/key,m/grass", "m/*", "m/[gk]*,m/key"};
    for (size_t i = 0; i < 4; i++) {
        const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", ways[i], "--json", QUESTION);
        assert_code(o, 0);
        json_t *root = command_json(o);
        assert_string_equal(json_text(root, "answer"), "90817.");
        const json_t *best = json_array_get(json_object_get(root, "sources"), 0);
        assert_string_equal(json_text(best, "context"), "m/key");
        json_decref(root);
    }
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "m/key", "--fresh", QUESTION);
    assert_string_equal(o->out, "90817.\n");
    assert_code(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "m/*", "--keep", "x"), 2);
    assert_code(cairn_run("drop", fx.store, "m/grass", "m/key"), 0);
    free(grass);
    free(key);
}

static void keep_adds_prompt_and_answer_to_the_context(void **state)
{
    (void)state;
    assert_code(cairn_run("fork", fx.store, "book", "talk"), 0);
    const outcome *o = cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "talk", "--keep", QUESTION);
    assert_code(o, 0);
    assert_string_equal(o->out, "48213.\n");
    long long more = (long long)strlen(QUESTION "48213.\n");
    assert_int_equal(tokens_of("talk"), TEXT_BYTES + 1 + more);
    assert_int_equal(tokens_of("book"), TEXT_BYTES + 1);
    char from[24];
    snprintf(from, sizeof from, "%d", TEXT_BYTES + 1);
    o = cairn_run("show", fx.store, "talk", "-m", DEMO_MODEL, "--from", from);
    assert_string_equal(o->out, QUESTION "48213.\n");
    assert_code(cairn_run("drop", fx.store, "talk"), 0);
}

/* ---- the other commands ---- */

static void a_fork_answers_like_its_parent_and_lives_on_without_it(void **state)
{
    (void)state;
    char *expected = answer_of("book");
    assert_code(cairn_run("fork", fx.store, "book", "copy"), 0);
    assert_code(cairn_run("fork", fx.store, "copy", "short", "--at", "2900"), 0); /* before the key */
    assert_int_equal(tokens_of("short"), 2900);
    char *answer = answer_of("copy");
    assert_string_equal(answer, expected);
    char *short_answer = answer_of("short");
    assert_null(strstr(short_answer, "48213"));
    assert_code(cairn_run("drop", fx.store, "copy"), 0);
    char *again = answer_of("short");
    assert_string_equal(again, short_answer);
    const outcome *o = cairn_run("fork", fx.store, "short", "book");
    assert_code(o, 1);
    assert_says(o->err, "book");
    assert_code(cairn_run("fork", fx.store, "short", "beyond", "--at", "2901"), 2);
    assert_code(cairn_run("rename", fx.store, "short", "brief"), 0);
    o = cairn_run("list", fx.store);
    assert_says(o->out, "brief");
    assert_null(strstr(o->out, "short"));
    assert_code(cairn_run("rename", fx.store, "brief", "book"), 1);
    assert_code(cairn_run("drop", fx.store, "brief"), 0);
    free(expected);
    free(answer);
    free(short_answer);
    free(again);
}

static void an_unknown_context_is_an_error_that_names_the_nearest(void **state)
{
    (void)state;
    static const char *const what[] = {"drop", "show", "fork", "rename", "export"};
    for (size_t i = 0; i < 5; i++) {
        const outcome *o = i < 2   ? cairn_run(what[i], fx.store, "bok")
                           : i < 4 ? cairn_run(what[i], fx.store, "bok", "x")
                                   : cairn_run(what[i], fx.store, "bok", "/tmp/x");
        assert_code(o, 1);
        assert_says(o->err, "there is no context 'bok' (did you mean 'book'?)");
    }
    assert_says(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "nobody", "x")->err, "there is no context 'nobody'");
    assert_says(cairn_run("ask", fx.store, "-m", DEMO_MODEL, "-c", "no*", "x")->err, "no context matches 'no*'");
    assert_code(cairn_run("list", fx.store, "no*"), 1);
}

static void list_stat_and_show_describe_what_is_there(void **state)
{
    (void)state;
    const outcome *o = cairn_run("list", fx.store, "book");
    assert_code(o, 0);
    assert_says(o->out, "9,001");
    assert_says(o->out, "complete");
    o = cairn_run("stat", fx.store);
    assert_code(o, 0);
    static const char *const words[] = {
        "4 layers (1 to 3 stored)", "3 KV heads of 64", "blocks of 63 tokens", "f16", "segment", "tiers", "SEGMENT"};
    for (size_t i = 0; i < 6; i++) assert_says(o->out, words[i]);
    o = cairn_run("stat", fx.store, "book", "--json");
    json_t *root = command_json(o);
    assert_int_equal(json_number(json_object_get(root, "context"), "tokens"), TEXT_BYTES + 1);
    assert_string_equal(json_text(json_array_get(json_object_get(root, "segments"), 0), "index"), "scan");
    json_decref(root);
    o = cairn_run("show", fx.store, "book", "--blocks", "--from", "47", "--count", "2", "-m", DEMO_MODEL, "--json");
    root = command_json(o);
    const json_t *block = json_array_get(json_object_get(root, "blocks"), 0);
    assert_int_equal(json_array_size(json_object_get(root, "blocks")), 2);
    assert_int_equal(json_number(block, "token"), 47 * 63);
    assert_int_equal(json_number(block, "tokens"), 63);
    json_decref(root);
    assert_code(cairn_run("show", fx.store, "book", "--from", "9001"), 2);
    assert_code(cairn_run("show", fx.store, "book", "--blocks", "--from", "143"), 2);
    o = cairn_run("show", fx.store, "book", "--count", "3"); /* ids without a model: BOS, then 3 + byte */
    assert_string_equal(o->out, "1 50 45\n");
}

static void an_exported_context_answers_the_same_in_another_store(void **state)
{
    (void)state;
    char *file = test_path(fx.dir, "book.cairn"), *other = test_path(fx.dir, "imported");
    char *expected = answer_of("book");
    assert_code(cairn_run("export", fx.store, "book", file), 0);
    assert_code(cairn_run("import", other, file), 0);
    assert_code(cairn_run("import", other, file, "second"), 0);
    const outcome *o = cairn_run("import", other, file);
    assert_code(o, 1);
    assert_says(o->err, "book");
    static const char *const names[] = {"book", "second"};
    for (size_t i = 0; i < 2; i++) {
        o = cairn_run("ask", other, "-m", DEMO_MODEL, "-c", names[i], QUESTION);
        assert_code(o, 0);
        assert_string_equal(o->out, expected);
    }
    size_t bytes = 0;
    char *data = test_read_file(file, &bytes);
    data[bytes / 2] = (char)(data[bytes / 2] ^ 1);
    test_write_file(file, data, bytes);
    assert_code(cairn_run("import", other, file, "third"), 3);
    test_write_file(file, data, bytes / 2);
    assert_int_not_equal(cairn_run("import", other, file, "third")->code, 0);
    assert_null(strstr(cairn_run("list", other)->out, "third"));
    free(data);
    free(expected);
    free(file);
    free(other);
}

static void every_kind_of_index_gives_the_same_answer_and_stat_says_why(void **state)
{
    (void)state;
    char *expected = answer_of("book");
    static const char *const kinds[] = {"flat", "hnsw", "exact", "auto", "scan"};
    for (size_t i = 0; i < 5; i++) {
        assert_code(cairn_run("reindex", fx.store, "-m", DEMO_MODEL, "-c", "book", "--index", kinds[i]), 0);
        const outcome *o = cairn_run("stat", fx.store, "book", "--json");
        json_t *root = command_json(o);
        const json_t *segment = json_array_get(json_object_get(root, "segments"), 0);
        assert_string_equal(json_text(segment, "index_asked"), kinds[i]);
        assert_true(strlen(json_text(segment, "why")) > 0);
        json_decref(root);
        char *answer = answer_of("book");
        assert_string_equal(answer, expected);
        free(answer);
    }
    assert_code(cairn_run("reindex", fx.store, "-m", DEMO_MODEL), 0);
    const outcome *o = cairn_run("reindex", fx.store, "-m", DEMO_MODEL, "--index", "IVFnonsense,Flat");
    assert_code(o, 2);
    assert_says(o->err, "IVFnonsense");
    free(expected);
}

static void compact_gives_pages_back_and_changes_no_answer(void **state)
{
    (void)state;
    char *expected = answer_of("book"), *copy = test_path(fx.dir, "waste.txt");
    write_text(copy, 4000, NULL, 0);
    assert_code(cairn_run("ingest", fx.store, "-m", DEMO_MODEL, "-c", "waste", copy), 0);
    assert_code(cairn_run("drop", fx.store, "waste"), 0);
    const outcome *o = cairn_run("compact", fx.store, "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    assert_true(json_number(root, "bytes_after") < json_number(root, "bytes_before"));
    json_decref(root);
    assert_code(cairn_run("verify", fx.store, "--deep"), 0);
    char *answer = answer_of("book");
    assert_string_equal(answer, expected);
    free(expected);
    free(answer);
    free(copy);
}

static void verify_says_what_it_looked_at(void **state)
{
    (void)state;
    const outcome *o = cairn_run("verify", fx.store, "--deep", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    assert_true(json_is_true(json_object_get(root, "sound")));
    assert_true(json_number(root, "tiles") >= 142 * 9);
    json_decref(root);
    assert_says(cairn_run("verify", fx.store)->out, "sound");
}

static void logits_are_a_distribution_after_each_prefix(void **state)
{
    (void)state; /* equality with llama.cpp's figures: test_cli_logits below, on files of several architectures */
    char *file = test_path(fx.dir, "tokens.json");
    test_write_file(file, "[1, 87, 107, 104, 35, 115]", 26);
    const outcome *o = cairn_run("logits", "-m", DEMO_MODEL, "--tokens", file, "--json", "--top", "300");
    assert_code(o, 0);
    json_t *root = command_json(o), *positions = json_object_get(root, "positions");
    assert_int_equal(json_array_size(positions), 6);
    for (size_t i = 0; i < 6; i++) {
        const json_t *prob = json_object_get(json_array_get(positions, i), "prob");
        double sum = 0, before = 1;
        for (size_t j = 0; j < json_array_size(prob); j++) {
            double p = json_real_value(json_array_get(prob, j));
            assert_true(p >= 0 && p <= before);
            before = p;
            sum += p;
        }
        assert_float_equal(sum, 1, 1e-6);
    }
    json_decref(root);
    static const char *const bad[] = {"[1, 9999]", "[1, -1]", "[]", "{\"ids\": [1]}", "[1,", "[1.5]"};
    for (size_t i = 0; i < 6; i++)
        assert_code(cairn_run_with(bad[i], strlen(bad[i]), "logits", "-m", DEMO_MODEL, "--tokens", "-"), 1);
    free(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(help_names_every_command_and_each_has_a_page_with_an_example),
        cmocka_unit_test(version_is_the_librarys),
        cmocka_unit_test(no_command_shows_the_commands_and_is_a_usage_error),
        cmocka_unit_test(a_mistyped_command_or_option_is_answered_with_the_nearest_one),
        cmocka_unit_test(an_absurd_value_is_a_usage_error_that_names_option_and_value),
        cmocka_unit_test(what_is_missing_or_too_much_is_named),
        cmocka_unit_test(with_json_an_error_is_an_object_on_stdout_and_a_sentence_on_stderr),
        cmocka_unit_test(an_answer_that_cannot_be_written_is_a_failure),
        cmocka_unit_test(ingest_keeps_every_byte_of_the_text_and_show_gives_it_back),
        cmocka_unit_test(ingest_again_does_nothing_and_another_text_is_an_error_that_says_so),
        cmocka_unit_test(append_adds_and_replace_starts_anew),
        cmocka_unit_test(an_appended_context_answers_as_one_ingested_at_once),
        cmocka_unit_test(quiet_says_nothing_when_all_is_well),
        cmocka_unit_test(standard_input_is_a_file_like_any_other),
        cmocka_unit_test(each_makes_one_context_per_file_named_by_its_path_below_the_directory),
        cmocka_unit_test(a_file_of_a_corpus_that_cannot_be_read_keeps_no_other_out),
        cmocka_unit_test(ask_finds_the_pass_key_and_prints_the_answer_alone),
        cmocka_unit_test(sources_name_the_span_the_answer_came_from),
        cmocka_unit_test(json_holds_answer_sources_and_stats),
        cmocka_unit_test(stats_say_what_was_read_and_what_it_cost),
        cmocka_unit_test(fetch_modes_threads_and_budgets_give_the_same_answer),
        cmocka_unit_test(reading_and_asking_stay_within_model_budget_and_64_MiB),
        cmocka_unit_test(length_and_stop_texts_end_the_answer),
        cmocka_unit_test(sampling_follows_its_seed),
        cmocka_unit_test(the_prompt_may_come_from_standard_input),
        cmocka_unit_test(without_retrieval_the_key_is_out_of_sight),
        cmocka_unit_test(an_answer_says_how_many_stored_blocks_it_used),
        cmocka_unit_test(several_contexts_compete_in_one_search_and_idle_ones_are_named),
        cmocka_unit_test(keep_adds_prompt_and_answer_to_the_context),
        cmocka_unit_test(a_fork_answers_like_its_parent_and_lives_on_without_it),
        cmocka_unit_test(an_unknown_context_is_an_error_that_names_the_nearest),
        cmocka_unit_test(list_stat_and_show_describe_what_is_there),
        cmocka_unit_test(an_exported_context_answers_the_same_in_another_store),
        cmocka_unit_test(every_kind_of_index_gives_the_same_answer_and_stat_says_why),
        cmocka_unit_test(compact_gives_pages_back_and_changes_no_answer),
        cmocka_unit_test(verify_says_what_it_looked_at),
        cmocka_unit_test(logits_are_a_distribution_after_each_prefix),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
