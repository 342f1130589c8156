/* test_cli_bench.c - `cairn bench`: what it counts against other ways to count it, and what it leaves behind.
 *
 * The corpus is this library's own sources. Recall is that of the tiny landmark model of models/, whose retrieval finds
 * a plain key; bits per byte are those of small random models, against a forward in plain loops (plain_model.h) over
 * the visible sets of twin.h, and against `cairn logits`.
 */
#include "command.h"
#include "plain_model.h"
#include "tiny_model.h"

#include <cairn/train.h>

#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

enum { BOS = 1, BYTE_0 = 3, LANDMARK = 259 };

static struct {
    char *dir, *corpus, *stores, *tiny, *ordinary;
} fx;

/* Real text, one file, so that a test can read the same bytes. */
static int set_up(void **state)
{
    static const char *const files[] = {"src/context/stream.c", "src/context/session.c", "src/model/gguf_read.c"};
    tiny_model m = tiny_model_default();
    (void)state;
    fx.dir = test_make_dir();
    fx.corpus = test_path(fx.dir, "corpus.txt");
    fx.stores = test_path(fx.dir, "stores");
    fx.tiny = test_path(fx.dir, "tiny.gguf");
    fx.ordinary = test_path(fx.dir, "ordinary.gguf");
    assert_int_equal(mkdir(fx.stores, 0700), 0);
    tiny_model_write(&m, fx.tiny);
    m.block_tokens = 0;
    m.seed = 2;
    tiny_model_write(&m, fx.ordinary);
    char *all = NULL;
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char *path = test_path(CAIRN_SOURCE_DIR, files[i]);
        size_t more = 0;
        char *text = test_read_file(path, &more);
        assert_non_null(text);
        assert_non_null(all = realloc(all, bytes + more));
        memcpy(all + bytes, text, more);
        bytes += more;
        free(text);
        free(path);
    }
    test_write_file(fx.corpus, all, bytes);
    free(all);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    command_done();
    free(fx.corpus);
    free(fx.stores);
    free(fx.tiny);
    free(fx.ordinary);
    test_remove_dir(fx.dir);
    return 0;
}

#define PASSKEY(...)                                                                                                   \
    cairn_run("bench", "passkey", "-m", DEMO_MODEL, "--held-out", "1", "--corpus", fx.corpus, "--dir", fx.stores,      \
              __VA_ARGS__)
#define PPL(model, ...)                                                                                                \
    cairn_run("bench", "ppl", "-m", model, "--held-out", "1", "--corpus", fx.corpus, "--dir", fx.stores, __VA_ARGS__)

static json_t *cell_of(const json_t *root, size_t i)
{
    json_t *cell = json_array_get(json_object_get(root, "cells"), i);
    assert_non_null(cell);
    return cell;
}

static double real_of(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_real(value)) fail_msg("'%s' is not a number of the JSON answer", key);
    return json_real_value(value);
}

static size_t entries(const char *dir)
{
    size_t n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d)) != NULL;) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* ---- passkey ---- */

static void a_plain_key_is_found_by_retrieval_and_not_without(void **state)
{
    (void)state;
    /* A key at 90 % of 2,048 tokens ends some 150 before the end: beyond what four layers of one block each reach only
     * for most rows, so the depths stay below. */
    const outcome *o = PASSKEY("--tokens", "2K", "--texts", "6", "--depths", "0.05,0.4,0.8", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    json_t *cell = cell_of(root, 0);
    assert_int_equal(json_number(cell, "right"), 6);
    assert_int_equal(json_number(cell, "asked"), 6);
    assert_int_equal(json_number(cell, "digits_right"), 30);
    assert_int_equal(json_number(cell, "top_k"), 4); /* the model's */
    assert_int_equal(json_number(cell, "tokens"), 2048);
    assert_int_equal(json_number(cell, "text_bytes"), 2048 - 1 - strlen("\nWhat is the pass key? The pass key is "));
    static const int expected[10] = {2, 0, 0, 2, 0, 0, 0, 2, 0, 0}; /* 0.4 of the rest is a little less of the text */
    for (size_t d = 0; d < 10; d++)
        assert_int_equal(json_number(json_array_get(json_object_get(cell, "by_depth"), d), "asked"), expected[d]);
    json_decref(root);

    o = PASSKEY("--tokens", "2K", "--texts", "3", "--depths", "0.05,0.4,0.8", "--no-retrieval", "--json");
    assert_code(o, 0);
    root = command_json(o);
    cell = cell_of(root, 0);
    assert_int_equal(json_number(cell, "asked"), 3);
    assert_int_equal(json_number(cell, "right"), 0);
    assert_true(json_number(cell, "digits_right") < 10);
    json_decref(root);
}

static void questions_about_names_are_counted_for_each_k_and_wrong_ones_are_shown(void **state)
{
    (void)state;
    const outcome *o = PASSKEY("--tokens", "2048", "--texts", "2", "--distractors", "0,6", "--asks", "4", "--top-k",
                               "0,4,all", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    assert_int_equal(json_array_size(json_object_get(root, "cells")), 6);
    for (size_t i = 0; i < 6; i++) {
        json_t *cell = cell_of(root, i), *wrong = json_object_get(cell, "wrong");
        bool named = i >= 3;
        assert_string_equal(json_text(cell, "kind"), named ? "named" : "plain");
        assert_int_equal(json_number(cell, "asked"), named ? 8 : 2);
        assert_int_equal(json_array_size(wrong), json_number(cell, "asked") - json_number(cell, "right"));
        size_t at;
        json_t *one;
        json_array_foreach(wrong, at, one)
        {
            assert_int_equal(strlen(json_text(one, "expected")), 5);
            assert_string_not_equal(json_text(one, "expected"), json_text(one, "answer"));
            assert_int_equal(strlen(json_text(one, "name")), named ? 4 : 0);
        }
        if (i % 3 == 2) assert_string_equal(json_text(cell, "top_k"), "all");
    }
    /* Named keys are hard for this model, but not out of its reach; without memory they are. */
    assert_true(json_number(cell_of(root, 4), "right") > json_number(cell_of(root, 3), "right") + 3);
    json_decref(root);
}

static void a_table_holds_every_cell_and_the_same_seed_gives_the_same_one(void **state)
{
    (void)state;
    char *first = NULL;
    for (int again = 0; again < 2; again++) {
        const outcome *o = PASSKEY("--tokens", "512,1K", "--texts", "2", "--distractors", "3", "--top-k", "1,2",
                                   "--by-depth", "--threads", again == 0 ? "1" : "2", "-q");
        assert_code(o, 0);
        assert_says(o->out, "95 % interval");
        char *depths = strstr(o->out, "\nright by where");
        assert_non_null(depths);
        for (size_t i = 0; i < 4; i++) {
            static const char *const rows[] = {"  512  1 of 4  1", "  512  1 of 4  2", "1,024  1 of 4  1",
                                               "1,024  1 of 4  2"};
            assert_says(o->out, rows[i]);
            assert_says(depths, rows[i]);
        }
        if (again == 0)
            first = strdup(depths);
        else
            assert_string_equal(first, depths);
    }
    free(first);
}

/* Wilson's interval is where |share - p| is z standard errors of p: checked at its ends, not by its formula. */
static void the_interval_ends_where_the_share_is_two_standard_errors_away(void **state)
{
    (void)state;
    const outcome *o =
        PASSKEY("--tokens", "512", "--texts", "4", "--distractors", "3", "--asks", "4", "--top-k", "0,1,4", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    for (size_t i = 0; i < 3; i++) {
        const json_t *cell = cell_of(root, i), *interval = json_object_get(cell, "interval_percent");
        double n = (double)json_number(cell, "asked"), share = (double)json_number(cell, "right") / n;
        assert_near(real_of(cell, "percent"), 100 * share, 1e-6);
        for (size_t end = 0; end < 2; end++) {
            double p = json_real_value(json_array_get(interval, end)) / 100;
            assert_true(end == 0 ? p <= share : p >= share);
            if (p > 0 && p < 1) assert_near(fabs(share - p), 1.959964 * sqrt(p * (1 - p) / n), 1e-6);
        }
    }
    json_decref(root);
}

/* ---- ppl ---- */

static double bits_of(const float *logits, size_t vocab, cairn_token next)
{
    double sum = 0;
    for (size_t i = 0; i < vocab; i++) sum += exp((double)logits[i] - (double)logits[next]);
    return log2(sum);
}

/* The first `length` tokens of the corpus, BOS first; bits (length - 1): what each byte costs the plain model. */
static void plain_bits(const char *path, size_t length, uint32_t block_tokens, uint32_t top_k, int32_t window,
                       double *bits)
{
    size_t bytes = 0, n = 0;
    char *text = test_read_file(fx.corpus, &bytes);
    plain_model *m = plain_model_open(path);
    assert_true(text != NULL && m != NULL && bytes >= length);
    size_t vocab = plain_model_vocab(m);
    cairn_token *slots = calloc(2 * length, sizeof *slots), *next = calloc(2 * length, sizeof *next);
    float *logits = calloc(2 * length * vocab, sizeof *logits);
    assert_true(slots != NULL && next != NULL && logits != NULL);
    for (size_t i = 0; i + 1 < length; i++) {
        next[n] = BYTE_0 + (uint8_t)text[i];
        slots[n++] = i == 0 ? BOS : BYTE_0 + (uint8_t)text[i - 1];
        if ((i + 1) % block_tokens == 0) slots[n++] = LANDMARK;
    }
    world w;
    uint8_t *visible[WORLD_LAYERS] = {NULL};
    plain_model_forward(m, slots, n, top_k, window, &w, visible, logits);
    for (size_t i = 0, at = 0; i < n; i++)
        if (slots[i] != LANDMARK) bits[at++] = bits_of(logits + i * vocab, vocab, next[i]);
    free_visible(visible);
    world_wipe(&w);
    plain_model_close(m);
    free(slots);
    free(next);
    free(logits);
    free(text);
}

static double mean_of(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum / (double)n;
}

static void bits_per_byte_are_those_of_a_forward_in_plain_loops(void **state)
{
    (void)state;
    enum { LENGTH = 300 };
    static const struct {
        const char *k, *window;
        uint32_t top_k;
        int32_t blocks;
    } cases[] = {{"2", NULL, 2, -1}, {"all", NULL, CAIRN_TOP_K_ALL, -1}, {"0", "3", 0, 3}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double bits[LENGTH];
        plain_bits(fx.tiny, LENGTH, 7, cases[i].top_k, cases[i].blocks, bits);
        /* A small budget and small chunks: blocks are committed on the way and come back from the store. */
        const char *args[40] = {"bench",
                                "ppl",
                                "-m",
                                fx.tiny,
                                "--held-out",
                                "1",
                                "--dir",
                                fx.stores,
                                "--dtype",
                                "f32",
                                "--length",
                                "300",
                                "--texts",
                                "1",
                                "--json",
                                "--corpus",
                                fx.corpus,
                                "--ram",
                                "2M",
                                "--chunk-blocks",
                                "4",
                                "--top-k",
                                cases[i].k,
                                cases[i].window != NULL ? "--window" : NULL,
                                cases[i].window};
        const outcome *o = command_run(NULL, 0, args);
        assert_code(o, 0);
        json_t *root = command_json(o);
        const json_t *cell = cell_of(root, 0);
        assert_near(real_of(cell, "bits_per_byte"), mean_of(bits, LENGTH - 1), 2e-5);
        assert_near(real_of(cell, "perplexity"), pow(2, mean_of(bits, LENGTH - 1)), 2e-2);
        assert_int_equal(json_number(cell, "bytes_counted"), LENGTH - 1);
        json_decref(root);

        args[23] = "--last"; /* in the place of --window */
        args[24] = "100";
        if (cases[i].window != NULL) continue;
        o = command_run(NULL, 0, args);
        assert_code(o, 0);
        root = command_json(o);
        assert_near(real_of(cell_of(root, 0), "bits_per_byte"), mean_of(bits + LENGTH - 1 - 100, 100), 2e-5);
        json_decref(root);
    }
}

static void of_an_ordinary_model_they_are_those_of_cairn_logits(void **state)
{
    (void)state;
    enum { LENGTH = 200 };
    size_t bytes = 0;
    char *text = test_read_file(fx.corpus, &bytes), *ids = test_path(fx.dir, "ids.json");
    json_t *tokens = json_array();
    for (size_t i = 0; i < LENGTH; i++)
        json_array_append_new(tokens, json_integer(i == 0 ? BOS : BYTE_0 + (uint8_t)text[i - 1]));
    assert_int_equal(json_dump_file(tokens, ids, 0), 0);
    const outcome *o = cairn_run("logits", "-m", fx.ordinary, "--tokens", ids, "--top", "1000", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    double bits = 0;
    for (size_t i = 0; i + 1 < LENGTH; i++) {
        const json_t *p = json_array_get(json_object_get(root, "positions"), i);
        size_t at;
        json_t *id;
        double probability = 0;
        json_array_foreach(json_object_get(p, "top"), at, id)
        {
            if (json_integer_value(id) == json_integer_value(json_array_get(tokens, i + 1)))
                probability = json_real_value(json_array_get(json_object_get(p, "prob"), at));
        }
        bits -= log2(probability);
    }
    json_decref(root);
    o = PPL(fx.ordinary, "--length", "200", "--texts", "1", "--json");
    assert_code(o, 0);
    root = command_json(o);
    assert_near(real_of(cell_of(root, 0), "bits_per_byte"), bits / (LENGTH - 1), 1e-5);
    assert_near(real_of(cell_of(root, 0), "attended_tokens"), LENGTH / 2.0, 1e-6); /* 1 + ... + 199 over 199 rows */
    assert_true(json_is_null(json_object_get(cell_of(root, 0), "top_k")));
    assert_true(json_is_null(json_object_get(root, "store")));
    json_decref(root);
    json_decref(tokens);
    free(ids);
    free(text);
}

/* The most probable byte after the tokens, by `cairn logits` of an ordinary model; -1 if a token that is none comes
 * first. */
static int next_byte(const char *ids, const json_t *tokens)
{
    assert_int_equal(json_dump_file(tokens, ids, 0), 0);
    const outcome *o = cairn_run("logits", "-m", fx.ordinary, "--tokens", ids, "--top", "1", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    const json_t *positions = json_object_get(root, "positions");
    const json_t *last = json_array_get(positions, json_array_size(positions) - 1);
    json_int_t id = json_integer_value(json_array_get(json_object_get(last, "top"), 0));
    json_decref(root);
    return id >= BYTE_0 && id < BYTE_0 + 256 ? (int)(id - BYTE_0) : -1;
}

static void an_ordinary_model_reads_text_and_question_in_memory(void **state)
{
    (void)state;
    const outcome *o = cairn_run("bench", "passkey", "-m", fx.ordinary, "--held-out", "1", "--corpus", fx.corpus,
                                 "--dir", fx.stores, "--tokens", "300", "--texts", "1", "--seed", "3", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o), *tokens = json_array();
    const json_t *cell = cell_of(root, 0);
    assert_true(json_is_null(json_object_get(cell, "top_k")));
    assert_true(json_is_null(json_object_get(root, "store")));
    assert_true(json_is_false(json_object_get(cell, "retrieval")));
    const char *answer = json_text(json_array_get(json_object_get(cell, "wrong"), 0), "answer");

    cairn_corpus *corpus = NULL;
    cairn_recall_text *text = NULL;
    cairn_recall_options opt;
    cairn_recall_options_init(&opt, sizeof opt);
    opt.bytes = (uint64_t)json_number(cell, "text_bytes");
    opt.plain = true;
    opt.seed = UINT64_C(3) << 32;
    assert_int_equal(cairn_corpus_open((const char *const[]){fx.corpus}, 1, 1, &corpus), CAIRN_OK);
    assert_int_equal(cairn_recall_text_new(corpus, &opt, &text), CAIRN_OK);
    char *ids = test_path(fx.dir, "ids.json");
    size_t bytes = 0;
    const char *said = cairn_recall_text_bytes(text, &bytes), *asked = cairn_recall_text_question(text, 0)->text;
    json_array_append_new(tokens, json_integer(BOS));
    for (size_t i = 0; i < bytes; i++) json_array_append_new(tokens, json_integer(BYTE_0 + (uint8_t)said[i]));
    for (size_t i = 0; asked[i] != 0; i++) json_array_append_new(tokens, json_integer(BYTE_0 + (uint8_t)asked[i]));
    assert_int_equal(json_array_size(tokens), 300);
    int compared = 0, plain = 0;
    for (const char *at = answer; *at != 0; compared++) {
        int byte = next_byte(ids, tokens);
        if (byte < 0) break;                              /* a token that is never said: the answer took the next one */
        bool other = strncmp(at, "\xef\xbf\xbd", 3) == 0; /* U+FFFD stands for a byte that is no UTF-8 */
        if (other)
            assert_true(byte >= 0x80);
        else
            assert_int_equal((uint8_t)*at, byte);
        plain += !other;
        at += other ? 3 : 1;
        json_array_append_new(tokens, json_integer(BYTE_0 + byte));
    }
    assert_true(compared >= 2 && plain >= 1);
    free(ids);
    cairn_recall_text_free(text);
    cairn_corpus_close(corpus);
    json_decref(tokens);
    json_decref(root);
}

/* Every row by itself: own tokens, and in a layer that retrieves its window, its candidates and what it chose. */
static double attended(size_t length, size_t c, size_t k)
{
    size_t rows = length - 1 + (length - 1) / c;
    double sum = 0;
    for (size_t slot = 0; slot < rows; slot++) {
        size_t offset = slot % (c + 1), block = slot / (c + 1), window = block < 1 ? block : 1;
        size_t candidates = block - window, chosen = candidates < k ? candidates : k;
        sum += (double)((offset < c ? offset + 1 : c) + window + candidates + (window + chosen) * c);
    }
    return sum / (double)rows;
}

static void attended_tokens_and_mass_are_what_the_policy_lets_a_row_see(void **state)
{
    (void)state;
    const outcome *o = PPL(DEMO_MODEL, "--length", "1000", "--texts", "2", "--top-k", "2,all", "--json");
    assert_code(o, 0);
    json_t *root = command_json(o);
    const json_t *few = cell_of(root, 0), *all = cell_of(root, 1);
    assert_near(real_of(few, "attended_tokens"), attended(1000, 63, 2), 1e-6);
    assert_near(real_of(all, "attended_tokens"), attended(1000, 63, SIZE_MAX), 1e-6);
    double mass = real_of(json_object_get(few, "retained_mass"), "mean");
    assert_true(mass > 0.1 && mass < 1);
    assert_near(real_of(json_object_get(all, "retained_mass"), "mean"), 1, 1e-9);
    /* A model of text, not of noise (8 bits) and not one that peeks. */
    assert_true(real_of(few, "bits_per_byte") > 0.5 && real_of(few, "bits_per_byte") < 5);
    const json_t *segments = json_object_get(few, "bits_per_byte_of_segments");
    double a = json_real_value(json_array_get(segments, 0)), b = json_real_value(json_array_get(segments, 1));
    assert_near(real_of(few, "bits_per_byte"), (a + b) / 2, 1e-6);
    assert_near(real_of(few, "standard_error"), fabs(a - b) / 2, 1e-6); /* of two values */
    json_decref(root);
}

/* ---- what is left behind, and what cannot be ---- */

static void the_store_is_gone_afterwards_also_after_ctrl_c(void **state)
{
    (void)state;
    static const int signals[] = {SIGINT, SIGTERM};
    assert_code(PPL(fx.tiny, "--length", "64", "--texts", "1"), 0);
    assert_int_equal(entries(fx.stores), 0);
    char *log = test_path(fx.dir, "log");
    for (int i = 0; i < 2; i++) {
        pid_t pid = command_start(log, (const char *const[]){"bench", "passkey", "-m", DEMO_MODEL, "--held-out", "1",
                                                             "--corpus", fx.corpus, "--dir", fx.stores, "--texts",
                                                             "1000", "--tokens", "1K", NULL});
        while (entries(fx.stores) == 0) nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        kill(pid, signals[i]);
        assert_int_equal(command_wait(pid), 1);
        assert_int_equal(entries(fx.stores), 0);
        size_t bytes = 0;
        char *said = test_read_file(log, &bytes);
        assert_says(said, "cairn bench passkey: interrupted after ");
        assert_says(said, " of 1,000 texts");
        free(said);
    }
    free(log);
    const outcome *o = PASSKEY("--tokens", "100000"); /* the store is there when this fails */
    assert_code(o, 1);
    assert_int_equal(entries(fx.stores), 0);
}

static void what_cannot_be_measured_is_said_with_names_and_numbers(void **state)
{
    (void)state;
    const outcome *o = PASSKEY("--tokens", "100000");
    assert_code(o, 1);
    assert_says(o->err, "cairn bench passkey: the corpus is too short: ");
    assert_says(o->err, "a text of 99,960 bytes does not fit");
    o = PASSKEY("--tokens", "500", "--distractors", "50");
    assert_code(o, 1);
    assert_says(o->err, "has no room for");
    o = PPL(DEMO_MODEL, "--length", "30000", "--texts", "3");
    assert_code(o, 1);
    assert_says(o->err, "3 segments of 30,000 tokens are asked for, ");
    o = PPL(DEMO_MODEL, "--length", "100", "--last", "100");
    assert_code(o, 2);
    assert_says(o->err, "--last: 100 is more than the 99 bytes that a segment of 100 tokens predicts");
    o = PASSKEY("--no-retrieval", "--top-k", "4");
    assert_code(o, 2);
    assert_says(o->err, "exclude each other");
    o = PPL(fx.ordinary, "--top-k", "4");
    assert_code(o, 2);
    assert_says(o->err, "has no landmarks");
    o = cairn_run("bench", "passkey", "-m", fx.ordinary, "--held-out", "1", "--corpus", fx.corpus, "--no-retrieval");
    assert_code(o, 2);
    assert_says(o->err, "has no landmarks");
    o = cairn_run("bench", "ppl", "-m", DEMO_MODEL, "--held-out", "1", "--corpus", "/nowhere/at/all");
    assert_code(o, 1);
    assert_says(o->err, "/nowhere/at/all");
    o = PPL(DEMO_MODEL, "--dir", "/nowhere/at/all");
    assert_code(o, 1);
    assert_says(o->err, "cannot make a directory for the store in '/nowhere/at/all'");
    o = cairn_run("bench", "ppl", "-m", DEMO_MODEL, "--json");
    assert_code(o, 2);
    json_t *root = command_json(o);
    const json_t *error = json_object_get(root, "error");
    assert_string_equal(json_text(error, "command"), "bench ppl");
    assert_string_equal(json_text(error, "message"), "--corpus PATH is required");
    json_decref(root);
}

static void a_vocabulary_that_is_not_bytes_is_refused(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *path = test_path(fx.dir, "words.gguf"), *file = test_read_file(fx.tiny, &bytes);
    char *at = memmem(file, bytes, "<0x41>", 6);
    assert_non_null(at);
    memcpy(at, "wordly", 6);
    test_write_file(path, file, bytes);
    const outcome *o = PPL(path, "--texts", "1");
    assert_code(o, 1);
    assert_says(o->err, "is not a byte model: its 260 tokens are not one for each byte");
    free(file);
    free(path);
}

static void absurd_values_are_usage_errors_that_name_them(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"--tokens", "5"},           {"--tokens", "4096,"},  {"--tokens", "1G"},        {"--tokens", "-4096"},
        {"--distractors", "100001"}, {"--distractors", "x"}, {"--texts", "0"},          {"--asks", "0"},
        {"--top-k", "1,,4"},         {"--top-k", "1 4"},     {"--depths", "0.5,2"},     {"--depths", "drawn"},
        {"--held-out", "0"},         {"--held-out", "1.5"},  {"--seed", "99999999999"}, {"--dtype", "f8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const outcome *o = PASSKEY(cases[i][0], cases[i][1]);
        assert_code(o, 2);
        assert_says(o->err, cases[i][0]);
        assert_string_equal(o->out, "");
    }
}

static void help_shows_the_benches_and_a_mistyped_one_is_answered_with_the_nearest(void **state)
{
    (void)state;
    static const char *const names[] = {"passkey", "ppl",    "fetch",  "decode", "attend",
                                        "recall",  "ingest", "resume", "all"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char example[64];
        snprintf(example, sizeof example, "examples:\n  cairn bench %s", names[i]);
        assert_says(cairn_run("bench", "--help")->out, names[i]);
        const outcome *o = cairn_run("bench", names[i], "--help");
        assert_code(o, 0);
        assert_says(o->out, example);
        char *page = strdup(o->out);
        assert_string_equal(cairn_run("help", "bench", names[i])->out, page);
        free(page);
    }
    const outcome *o = cairn_run("bench", "passkye");
    assert_code(o, 2);
    assert_says(o->err, "there is no bench 'passkye' (did you mean 'passkey'?)");
    o = cairn_run("bench");
    assert_code(o, 2);
    assert_says(o->err, "'cairn bench --help' lists them");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_plain_key_is_found_by_retrieval_and_not_without),
        cmocka_unit_test(questions_about_names_are_counted_for_each_k_and_wrong_ones_are_shown),
        cmocka_unit_test(a_table_holds_every_cell_and_the_same_seed_gives_the_same_one),
        cmocka_unit_test(the_interval_ends_where_the_share_is_two_standard_errors_away),
        cmocka_unit_test(bits_per_byte_are_those_of_a_forward_in_plain_loops),
        cmocka_unit_test(of_an_ordinary_model_they_are_those_of_cairn_logits),
        cmocka_unit_test(an_ordinary_model_reads_text_and_question_in_memory),
        cmocka_unit_test(attended_tokens_and_mass_are_what_the_policy_lets_a_row_see),
        cmocka_unit_test(the_store_is_gone_afterwards_also_after_ctrl_c),
        cmocka_unit_test(what_cannot_be_measured_is_said_with_names_and_numbers),
        cmocka_unit_test(a_vocabulary_that_is_not_bytes_is_refused),
        cmocka_unit_test(absurd_values_are_usage_errors_that_name_them),
        cmocka_unit_test(help_shows_the_benches_and_a_mistyped_one_is_answered_with_the_nearest),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
