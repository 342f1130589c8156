/* test_cli_figures.c - `cairn bench` on the memory hierarchy, at sizes that take seconds: what is counted is what had
 * to be, reports are whole, plots are drawn, nothing is left behind.
 */
#include "command.h"

#include <dirent.h>
#include <sys/stat.h>

static struct {
    char *dir, *stores, *plot;
} fx;

static int set_up(void **state)
{
    (void)state;
    fx.dir = test_make_dir();
    fx.stores = test_path(fx.dir, "stores");
    fx.plot = test_path(fx.dir, "it's a \"plot\".svg");
    assert_int_equal(mkdir(fx.stores, 0700), 0);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    command_done();
    free(fx.stores);
    free(fx.plot);
    test_remove_dir(fx.dir);
    return 0;
}

static void assert_nothing_is_left(void)
{
    DIR *d = opendir(fx.stores);
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') fail_msg("'%s' was left behind", e->d_name);
    closedir(d);
}

/* The JSON answer, its frame checked. */
static json_t *report(const outcome *o, const char *name)
{
    assert_code(o, 0);
    json_t *root = command_json(o);
    assert_string_equal(json_text(root, "bench"), name);
    const json_t *about = json_object_get(root, "machine");
    assert_true(json_number(about, "cores") >= 1);
    assert_true(json_number(about, "ram_bytes") > 1 << 20);
    assert_true(strlen(json_text(about, "processor")) > 0);
    assert_says(json_text(about, "kernel"), "Linux");
    assert_true(strstr(json_text(about, "file_system"), " on ") != NULL);
    assert_true(json_array_size(json_object_get(root, "cells")) > 0);
    assert_nothing_is_left();
    return root;
}

/* The n-th cell whose `key` is that text. */
static const json_t *cell_where(const json_t *root, const char *key, const char *value, size_t n)
{
    size_t i;
    const json_t *cell;
    json_array_foreach(json_object_get(root, "cells"), i, cell)
    {
        const char *is = json_string_value(json_object_get(cell, key));
        if (is != NULL && strcmp(is, value) == 0 && n-- == 0) return cell;
    }
    fail_msg("no cell where %s is '%s'", key, value);
    return NULL;
}

static double real_of(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_real(value)) fail_msg("'%s' is not a number of the JSON answer", key);
    return json_real_value(value);
}

/* Samples: as many as repeats, in order. Returns the median. */
static double assert_samples(const json_t *object, const char *key, long long n)
{
    const json_t *s = json_object_get(object, key);
    assert_int_equal(json_number(s, "n"), n);
    static const char *const order[] = {"min", "q1", "median", "q3", "max"};
    for (size_t i = 0; i + 1 < sizeof order / sizeof *order; i++)
        assert_true(real_of(s, order[i]) <= real_of(s, order[i + 1]));
    return real_of(s, "median");
}

static void assert_plot(const char *series)
{
    size_t bytes = 0;
    char *svg = test_read_file(fx.plot, &bytes);
    assert_non_null(svg);
    assert_says(svg, "<svg");
    assert_says(svg, "</svg>");
    assert_says(svg, series);
    free(svg);
}

/* ---- fetch ---- */

#define FETCH(...)                                                                                                     \
    cairn_run("bench", "fetch", "--dir", fx.stores, "--size", "6M", "--head-dim", "32", "--kv-heads", "4", "--batch",  \
              "8,32", "--repeats", "3", __VA_ARGS__)

static void a_cold_batch_comes_from_the_device_and_a_warm_one_does_not(void **state)
{
    static const char *const modes[] = {"read", "map"};
    (void)state;
    json_t *root = report(FETCH("--json", "--plot", fx.plot), "fetch");
    bool counts = !json_is_null(json_object_get(cell_where(root, "way", "device", 0), "seconds"));
    for (size_t b = 0; b < 2; b++)
        for (size_t m = 0; m < 2; m++) {
            char way[32];
            snprintf(way, sizeof way, "%s cold", modes[m]);
            const json_t *cold = cell_where(root, "way", way, b);
            snprintf(way, sizeof way, "%s mixed", modes[m]);
            const json_t *mixed = cell_where(root, "way", way, b);
            snprintf(way, sizeof way, "%s warm", modes[m]);
            const json_t *warm = cell_where(root, "way", way, b);
            long long tiles = json_number(cold, "batch");
            assert_int_equal(tiles, b == 0 ? 8 : 32);
            assert_int_equal(json_number(cold, "tile_bytes"), 8192);
            assert_int_equal(json_number(cold, "cold_bytes"), 3 * tiles * 8192);
            assert_int_equal(json_number(mixed, "cold_bytes"), 3 * tiles / 2 * 8192);
            assert_int_equal(json_number(warm, "cold_bytes"), 0);
            assert_true(assert_samples(cold, "seconds", 3) > 0);
            if (!counts) continue; /* a file system without a device, where the kernel counts nothing */
            /* The kernel may keep a page that lies beside one of the tree. */
            assert_true(json_number(cold, "device_read_bytes") >= json_number(cold, "cold_bytes") * 3 / 4);
            assert_true(json_number(mixed, "device_read_bytes") >= json_number(mixed, "cold_bytes") * 3 / 4);
            assert_true(json_number(warm, "device_read_bytes") < json_number(cold, "cold_bytes") / 4);
        }
    assert_plot("read cold");
    json_decref(root);
}

static void a_table_names_machine_ways_and_the_device(void **state)
{
    (void)state;
    const outcome *o = FETCH("--seed", "3");
    assert_code(o, 0);
    assert_says(o->out, "machine   ");
    assert_says(o->out, "seed 3");
    assert_says(o->out, "page faults");
    assert_says(o->out, "of the device");
    assert_nothing_is_left();
}

/* ---- decode ---- */

#define WITH_TEXT "-m", DEMO_MODEL, "--held-out", "1", "--corpus", CAIRN_SOURCE_DIR "/src", "--dir", fx.stores

static void a_step_reads_what_is_selected_whatever_is_stored(void **state)
{
    enum { C = 63, HEADS = 3, LAYERS = 3, PAYLOAD = 2 * 2 * C * 64 }; /* of the demo model; its first layer is local */
    (void)state;
    json_t *root = report(cairn_run("bench", "decode", WITH_TEXT, "--tokens", "1K,4K", "--steps", "10", "--cold", "2",
                                    "--threads", "1", "--json", "--plot", fx.plot),
                          "decode");
    double tiles[2];
    for (size_t i = 0; i < 2; i++) {
        const json_t *cell = json_array_get(json_object_get(root, "cells"), i);
        const json_t *warm = json_object_get(cell, "warm"), *cold = json_object_get(cell, "cold");
        const json_t *dense = json_object_get(cell, "dense_attention");
        long long blocks = (i == 0 ? 1024 : 4096) / C;
        assert_int_equal(json_number(cell, "tokens"), blocks * C);
        assert_samples(warm, "seconds", 10);
        assert_samples(cold, "seconds", 2);
        assert_true(assert_samples(warm, "processor_seconds", 10) > 0);
        assert_samples(dense, "seconds", 5);
        assert_int_equal(json_number(dense, "bytes"), blocks * HEADS * LAYERS * PAYLOAD);
        tiles[i] = real_of(warm, "tiles");
        /* Four retrieved blocks and one of the window for each head, and in the first layer the window alone; the
         * session's own blocks come on top after a while. */
        assert_true(tiles[i] >= HEADS * (LAYERS * 5) && tiles[i] <= HEADS * (LAYERS * 5 + 3));
        double bytes = real_of(warm, "tier_bytes") + real_of(warm, "map_bytes") + real_of(warm, "read_bytes");
        assert_true(bytes > tiles[i] / 2 * PAYLOAD && bytes < tiles[i] * (PAYLOAD + 4096));
    }
    assert_true(tiles[0] == tiles[1]);
    assert_plot("warm, 1 thread");
    json_decref(root);
}

/* ---- attend ---- */

static void attention_is_measured_over_the_tiles_that_were_selected(void **state)
{
    enum { HEADS = 2, PAYLOAD = 2 * 63 * 32 + 4 * 32 + 4 * 63 }; /* int8 keys and values, scales of both */
    (void)state;
    json_t *root = report(cairn_run("bench", "attend", "--dir", fx.stores, "--size", "256K", "--head-dim", "32",
                                    "--kv-heads", "2", "--group", "1,3", "--threads", "1,2", "--dtype", "q8",
                                    "--repeats", "3", "--json", "--plot", fx.plot),
                          "attend");
    assert_int_equal(json_array_size(json_object_get(root, "cells")), 4);
    for (size_t i = 0; i < 4; i++) {
        const json_t *cell = json_array_get(json_object_get(root, "cells"), i);
        assert_string_equal(json_text(cell, "dtype"), "q8");
        assert_int_equal(json_number(cell, "group"), i < 2 ? 1 : 3);
        assert_int_equal(json_number(cell, "threads"), 1 + i % 2);
        long long k = (256 << 10) / (PAYLOAD * HEADS);
        assert_int_equal(json_number(cell, "tiles"), k * HEADS); /* heads of a group share their tiles */
        assert_int_equal(json_number(cell, "bytes"), k * HEADS * PAYLOAD);
        double attend = assert_samples(cell, "seconds", 3), memory = assert_samples(cell, "memory_seconds", 3);
        assert_true(attend > 0 && memory > 0 && assert_samples(cell, "share_of_memory", 3) > 0);
    }
    assert_plot("q8, group 3, 2 threads");
    json_decref(root);
}

/* ---- recall ---- */

static void kinds_are_judged_by_the_exact_one(void **state)
{
    (void)state;
    json_t *root = report(cairn_run("bench", "recall", WITH_TEXT, "--tokens", "16K", "--synthetic", "64K", "--heads",
                                    "3", "--queries", "8", "--kind", "exact", "--kind", "scan", "--kind",
                                    "ivf:nprobe=1", "--json", "--plot", fx.plot),
                          "recall");
    assert_int_equal(json_array_size(json_object_get(root, "cells")), 6);
    for (size_t i = 0; i < 6; i++) {
        const json_t *cell = json_array_get(json_object_get(root, "cells"), i);
        bool model = i < 3;
        assert_string_equal(json_text(cell, "keys"), model ? "model" : "synthetic");
        assert_int_equal(json_number(cell, "rows"), (model ? 16384 : 65536) / 63);
        assert_int_equal(json_number(cell, "k"), model ? 4 : 16);
        assert_samples(cell, "search_seconds", 24);
        double recall = real_of(cell, "recall"), kept = real_of(cell, "kept"), mass = real_of(cell, "mass");
        if (i % 3 < 2) { /* both prove their answer */
            assert_true(recall == 1 && kept > 0.999999 && kept < 1.000001);
            assert_true(mass > 0 && mass < 1.000001);
        } else { /* one list of many is not all */
            assert_true(recall < 1 && kept < 1 && recall > 0.05);
        }
        if (model)
            assert_true(real_of(cell, "output_bits") > 0);
        else
            assert_true(json_is_null(json_object_get(cell, "output_bits")));
    }
    assert_true(real_of(cell_where(root, "kind", "exact", 0), "output_bits") ==
                real_of(cell_where(root, "kind", "scan", 0), "output_bits")); /* the same blocks, bit for bit */
    assert_plot("ivf:nprobe=1, model 16,380");
    json_decref(root);
    root = report(cairn_run("bench", "recall", "--synthetic", "64K", "--heads", "2", "--queries", "4", "--kind", "auto",
                            "--json"),
                  "recall");
    const json_t *cell = json_array_get(json_object_get(root, "cells"), 0);
    assert_string_equal(json_text(cell, "made"), "scan");
    assert_says(json_text(cell, "why"), "1040 rows");
    json_decref(root);
}

/* Two thirds of it are shared with the context it was forked from. */
static void a_stored_context_is_judged_as_it_is(void **state)
{
    (void)state;
    enum { SOME = 40 * 63, MORE = 20 * 63 };
    char *store = test_path(fx.dir, "store"), *file = test_path(fx.dir, "text"), text[SOME];
    for (int i = 0; i < SOME; i++) text[i] = (char)(' ' + i * i % 89);
    test_write_file(file, text, SOME);
    assert_code(cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "a", file), 0);
    assert_code(cairn_run("fork", store, "a", "b"), 0);
    test_write_file(file, text + 500, MORE);
    assert_code(cairn_run("ingest", store, "-m", DEMO_MODEL, "-c", "b", "--append", file), 0);
#define OF_STORE "bench", "recall", WITH_TEXT, "--store", store
    json_t *root = report(cairn_run(OF_STORE, "--context", "b", "--queries", "8", "--heads", "2", "--kind", "exact",
                                    "--kind", "scan", "--kind", "auto", "--json"),
                          "recall");
    assert_int_equal(json_array_size(json_object_get(root, "cells")), 3);
    for (size_t i = 0; i < 3; i++) {
        const json_t *cell = json_array_get(json_object_get(root, "cells"), i);
        assert_int_equal(json_number(cell, "rows"), (SOME + MORE) / 63);
        assert_int_equal(json_number(cell, "tokens"), SOME + MORE);
        assert_true(real_of(cell, "recall") == 1 && real_of(cell, "output_bits") >= 0);
    }
    json_decref(root);

    root = report(cairn_run("bench", "decode", WITH_TEXT, "--store", store, "--context", "b", "--steps", "5", "--cold",
                            "2", "--threads", "1", "--no-dense", "--json"),
                  "decode");
    const json_t *cell = json_array_get(json_object_get(root, "cells"), 0);
    assert_int_equal(json_array_size(json_object_get(root, "cells")), 1);
    assert_int_equal(json_number(cell, "tokens"), SOME + MORE);
    assert_samples(json_object_get(cell, "warm"), "seconds", 5);
    assert_samples(json_object_get(cell, "cold"), "seconds", 2);
    json_decref(root);
    root = command_json(cairn_run("list", store, "--json")); /* nothing was added to it */
    for (size_t i = 0; i < 2; i++)
        assert_int_equal(json_number(json_array_get(json_object_get(root, "contexts"), i), "tokens"),
                         1 + SOME + (i == 1) * (1 + MORE));
    json_decref(root);

    const outcome *o = cairn_run(OF_STORE, "--context", "c");
    assert_code(o, 1);
    assert_says(o->err, "no context is named 'c'");
    o = cairn_run(OF_STORE);
    assert_code(o, 2);
    assert_says(o->err, "--store and --context go together");
    o = cairn_run(OF_STORE, "--context", "b", "--tokens", "4K");
    assert_code(o, 2);
    assert_says(o->err, "--tokens does not go with --store");
    free(store);
    free(file);
}

/* ---- ingest ---- */

static void the_stages_of_ingest_add_up_to_its_time(void **state)
{
    (void)state;
    json_t *root = report(cairn_run("bench", "ingest", WITH_TEXT, "--tokens", "1K,4K", "--prefill", "512", "--repeats",
                                    "2", "--json", "--plot", fx.plot),
                          "ingest");
    const json_t *prefill = json_object_get(root, "prefill");
    assert_int_equal(json_number(prefill, "tokens"), 512);
    assert_true(assert_samples(prefill, "seconds", 6) > 0); /* two before the first length and after each */
    double total = 0;
    for (size_t i = 0; i < 2; i++) {
        const json_t *cell = json_array_get(json_object_get(root, "cells"), i);
        const json_t *stages = json_object_get(cell, "stage_seconds");
        long long tokens = json_number(cell, "tokens");
        assert_int_equal(tokens, i == 0 ? 1024 : 4096);
        double seconds = real_of(cell, "seconds"), sum = 0, stretch = i == 0 ? 1024 : 3072;
        const char *name;
        json_t *value;
        json_object_foreach((json_t *)stages, name, value)
        {
            assert_true(json_real_value(value) > 0); /* each takes some time, the model what is left */
            sum += json_real_value(value);
        }
        total += seconds;
        assert_true(sum > 0.999 * seconds && sum < 1.001 * seconds);
        assert_true(real_of(cell, "total_seconds") > 0.999 * total && real_of(cell, "total_seconds") < 1.001 * total);
        assert_true(real_of(cell, "tokens_per_second") * seconds > 0.999 * stretch);
        assert_true(real_of(cell, "average_tokens_per_second") * total > 0.999 * (double)tokens);
        assert_true(json_number(cell, "store_bytes") > tokens / 63 * 3 * 6 * 8112);
    }
    assert_plot("of the stretch");
    json_decref(root);
}

/* ---- resume ---- */

static void a_new_process_reads_little_of_what_is_stored(void **state)
{
    (void)state;
    json_t *root =
        report(cairn_run("bench", "resume", WITH_TEXT, "--tokens", "8K", "--repeats", "2", "--json", "--plot", fx.plot),
               "resume");
    const json_t *cold = cell_where(root, "state", "cold", 0), *warm = cell_where(root, "state", "warm", 0);
    assert_int_equal(json_number(cold, "tokens"), 8192);
    assert_true(json_number(cold, "store_bytes") > 8192 / 63 * 3 * 6 * 8112);
    assert_true(real_of(cold, "read_bytes") < (double)json_number(cold, "store_bytes"));
    assert_true(real_of(warm, "read_bytes") <= real_of(cold, "read_bytes"));
    for (int k = 0; k < 2; k++) {
        const json_t *cell = k == 0 ? cold : warm;
        double first = assert_samples(cell, "first_token_seconds", 2);
        assert_true(first > 0 && first < assert_samples(cell, "process_seconds", 2) + 0.01);
        assert_true(json_number(cell, "peak_rss_bytes") > 1 << 20);
        assert_true(real_of(cell, "ingest_seconds") > 0);
    }
    assert_plot("reading the text anew");
    json_decref(root);
}

/* ---- what all share ---- */

static void the_benches_of_all_run_as_processes_and_their_failure_is_passed_on(void **state)
{
    (void)state;
    const outcome *o =
        cairn_run("bench", "all", "--quick", "-m", DEMO_MODEL, "-c", "/nowhere/at/all", "--dir", fx.stores, "--json");
    assert_code(o, 1);
    assert_says(o->err, "cairn bench decode: ");
    assert_says(o->err, "/nowhere/at/all");
    json_t *root = command_json(o);
    assert_string_equal(json_text(json_object_get(root, "error"), "message"), "bench decode failed");
    json_decref(root);
    assert_nothing_is_left();
}

static void what_cannot_be_drawn_or_made_is_said_before_anything_runs(void **state)
{
    (void)state;
    const outcome *o = FETCH("--plot", "/nowhere/at/all.svg");
    assert_code(o, 1);
    assert_says(o->err, "--plot: cannot write '/nowhere/at/all.svg'");
    o = cairn_run("bench", "fetch", "--dir", "/nowhere/at/all");
    assert_code(o, 1);
    assert_says(o->err, "cannot make a directory for the store in '/nowhere/at/all'");
    o = cairn_run("bench", "decode", WITH_TEXT, "--tokens", "4K,1K");
    assert_code(o, 2);
    assert_says(o->err, "lengths ascend, 1024 does not follow 4096");
    o = cairn_run("bench", "recall", WITH_TEXT, "--tokens", "4K", "--kind", "nonsense");
    assert_code(o, 2);
    assert_says(o->err, "nonsense");
    o = cairn_run("bench", "recall", "--heads", "1");
    assert_code(o, 2);
    assert_says(o->err, "--model FILE or --synthetic N,... is required");
    o = FETCH("--batch", "1000");
    assert_code(o, 2);
    assert_says(o->err, "fewer than a batch of 1000");

    char *path = strdup(getenv("PATH"));
    setenv("PATH", fx.dir, 1);
    o = FETCH("--plot", fx.plot);
    setenv("PATH", path, 1);
    free(path);
    assert_code(o, 1);
    assert_says(o->err, "gnuplot cannot be run");
    assert_nothing_is_left();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_cold_batch_comes_from_the_device_and_a_warm_one_does_not),
        cmocka_unit_test(a_table_names_machine_ways_and_the_device),
        cmocka_unit_test(a_step_reads_what_is_selected_whatever_is_stored),
        cmocka_unit_test(attention_is_measured_over_the_tiles_that_were_selected),
        cmocka_unit_test(kinds_are_judged_by_the_exact_one),
        cmocka_unit_test(a_stored_context_is_judged_as_it_is),
        cmocka_unit_test(the_stages_of_ingest_add_up_to_its_time),
        cmocka_unit_test(a_new_process_reads_little_of_what_is_stored),
        cmocka_unit_test(the_benches_of_all_run_as_processes_and_their_failure_is_passed_on),
        cmocka_unit_test(what_cannot_be_drawn_or_made_is_said_before_anything_runs),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
