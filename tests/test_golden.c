/* test_golden.c - vectors made by other programs: the paper's authors' own code, and an independent PyTorch one.
 *
 *     test_golden [DIR]        DIR defaults to tests/data/golden
 *
 * runs every file of the four kinds it finds in DIR, by name: grouped_softmax.json, retrieval_step.json,
 * llama_step.json, clamped_forward.json (+ .gguf). Other files of the same form under those names work too: shapes, k,
 * block sizes and numbers of steps come from the files.
 */
#include "plain_model.h"

#include <cairn/model.h>

#include <jansson.h>

#include <stdio.h>

static const char *directory = CAIRN_TEST_DATA "/golden";

/* ---- JSON ---- */

static json_t *load(const char *name)
{
    char *path = test_path(directory, name);
    size_t bytes;
    char *text = test_read_file(path, &bytes);
    json_t *root = NULL;
    if (text != NULL) {
        json_error_t error;
        root = json_loads(text, JSON_REJECT_DUPLICATES, &error);
        if (root == NULL) fail_msg("%s:%d: %s", path, error.line, error.text);
    } else {
        print_message("%s: not there, skipped\n", path);
    }
    free(text);
    free(path);
    return root;
}

static json_t *member(const json_t *object, const char *key)
{
    json_t *value = json_object_get(object, key);
    if (value == NULL) fail_msg("key '%s' is missing", key);
    return value;
}
static size_t number(const json_t *object, const char *key)
{
    json_t *value = member(object, key);
    if (!json_is_integer(value) || json_integer_value(value) < 0) fail_msg("'%s' is not a count", key);
    return (size_t)json_integer_value(value);
}
static size_t number_or(const json_t *object, const char *key, size_t otherwise)
{
    return json_is_integer(json_object_get(object, key)) ? number(object, key) : otherwise;
}

static size_t flatten(const json_t *value, double *out, size_t at, size_t cap)
{
    if (json_is_array(value)) {
        size_t i;
        json_t *each;
        json_array_foreach(value, i, each) at = flatten(each, out, at, cap);
        return at;
    }
    if (!json_is_number(value) || at >= cap) fail_msg("an array is not numbers of the shape expected");
    out[at] = json_number_value(value);
    return at + 1;
}
/* A nested list of exactly n numbers, malloc'ed. */
static double *numbers(const json_t *value, size_t n)
{
    double *out = malloc(n * sizeof *out + 1);
    assert_non_null(out);
    size_t found = flatten(value, out, 0, n);
    if (found != n) fail_msg("%zu numbers where %zu are expected", found, n);
    return out;
}

/* ---- grouped_softmax.json ---- */

/* C if landmarks stand exactly at every (C+1)-th row, as in a stream from slot 0; else 0. */
static size_t regular_block(const uint8_t *is_landmark, size_t rows)
{
    size_t c = 0;
    while (c < rows && is_landmark[c] == 0) c++;
    for (size_t r = 0; c > 0 && r < rows; r++)
        if (is_landmark[r] != (r % (c + 1) == c)) return 0;
    return c;
}

/* The same weights out of a session: key j and value j are the unit vector e_j in dims that do not rotate, so the score
 * of (i, j) is dim j of query i and the output of row i is its weights. */
static void softmax_through_a_session(const uint8_t *is_landmark, size_t rows, size_t heads, const double *scores,
                                      const double *weights, cairn_position_scheme scheme, size_t chunk)
{
    size_t dim = (rows + 3) / 2 * 2;
    double largest = 0.0;
    world w;
    test_random r = {1};
    world_spec spec = {.layers = 1,
                       .heads = (uint32_t)heads,
                       .kv_heads = 1,
                       .head_dim = (uint32_t)dim,
                       .block_tokens = (uint32_t)regular_block(is_landmark, rows),
                       .scheme = scheme,
                       .rows = rows};
    world_init(&w, &r, &spec);
    w.shape.rope_dims = 2; /* dims 0 and 1 rotate and stay zero */
    memset(w.q[0], 0, rows * heads * dim * sizeof(float));
    memset(w.k[0], 0, rows * dim * sizeof(float));
    memset(w.v[0], 0, rows * dim * sizeof(float));
    for (size_t j = 0; j < rows; j++) {
        w.k[0][j * dim + 2 + j] = 1.0F;
        w.v[0][j * dim + 2 + j] = 1.0F;
        for (size_t h = 0; h < heads; h++) {
            for (size_t c = 0; c <= j; c++) {
                double s = scores[(h * rows + j) * rows + c];
                if (fabs(s) > largest) largest = fabs(s);
                w.q[0][(j * heads + h) * dim + 2 + c] = (float)(s * sqrt((double)dim));
            }
        }
    }
    record rec;
    record_init(&rec, &w, 0);
    cairn_session *s = world_session(&w, NULL, &(session_spec){0});
    world_feed(&w, s, 0, rows, chunk, &r, &rec);
    cairn_session_end(s);
    /* A score of size m carries m * 2^-23 of rounding into exp, so a weight carries as much relative error. */
    double tolerance = 2e-6 + 4.0 * largest * 0x1p-23;
    for (size_t h = 0; h < heads; h++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < rows; j++)
                assert_near(rec.out[0][(i * heads + h) * dim + 2 + j], weights[(h * rows + i) * rows + j], tolerance);
    record_wipe(&rec);
    world_wipe(&w);
}

static void grouped_softmax_equals_the_authors_code(void **state)
{
    (void)state;
    json_t *root = load("grouped_softmax.json"), *c;
    if (root == NULL) skip();
    size_t i, n;
    json_array_foreach(member(root, "cases"), i, c)
    {
        size_t rows = number(c, "T"), heads = number(c, "heads"), cells = heads * rows * rows;
        print_message("  case %s: %zu rows, %zu heads\n", json_string_value(member(c, "name")), rows, heads);
        uint8_t *is_landmark = calloc(rows + 1, 1);
        assert_non_null(is_landmark);
        json_t *index;
        json_array_foreach(member(c, "landmark_index"), n, index)
        {
            assert_in_range(json_integer_value(index), 0, rows - 1);
            is_landmark[json_integer_value(index)] = 1;
        }
        double *scores = numbers(member(c, "scores"), cells), *weights = numbers(member(c, "weights"), cells);
        double *sums = numbers(member(c, "row_sum"), heads * rows), *ours = malloc(cells * sizeof *ours);
        assert_non_null(ours);
        for (size_t h = 0; h < heads; h++)
            assert_ok(cairn_grouped_softmax(scores + h * rows * rows, is_landmark, rows, 0.0, ours + h * rows * rows));
        for (size_t x = 0; x < cells; x++) assert_near(ours[x], weights[x], 1e-12);
        for (size_t row = 0; row < heads * rows; row++) {
            double sum = 0.0;
            for (size_t j = 0; j < rows; j++) sum += ours[row * rows + j];
            assert_near(sum, sums[row], 1e-12);
        }
        if (regular_block(is_landmark, rows) > 0 && heads <= WORLD_HEADS) {
            softmax_through_a_session(is_landmark, rows, heads, scores, weights, CAIRN_POSITION_CLAMPED, 0);
            softmax_through_a_session(is_landmark, rows, heads, scores, weights, CAIRN_POSITION_STINGY, rows);
            softmax_through_a_session(is_landmark, rows, heads, scores, weights, CAIRN_POSITION_STINGY, 1);
        }
        free(is_landmark);
        free(scores);
        free(weights);
        free(sums);
        free(ours);
    }
    json_decref(root);
}

/* ---- retrieval_step.json and llama_step.json: one stream, chunk by chunk, through a real session ---- */

typedef struct golden_run {
    world w;
    const json_t *run;
    size_t steps;
    size_t *from; /* (steps + 1) first row of each step */
    cairn_scope scope;
    uint32_t top_k;
    uint32_t newest;
} golden_run;

typedef enum drive {
    DRIVE_MEMORY,      /* no store */
    DRIVE_OWN,         /* a store, committed once at the end: blocks stay the session's own */
    DRIVE_COMMIT,      /* committed after each step, the session goes on */
    DRIVE_REOPEN_MAP,  /* committed, closed and opened again after each step; tail run again; tiles through the map */
    DRIVE_REOPEN_READ, /* the same, tiles read in batches */
    DRIVES
} drive;
static const char *const drive_names[DRIVES] = {"memory", "own", "commit", "reopen map", "reopen read"};

static void check_step(const golden_run *g, const record *rec, size_t step)
{
    const json_t *s = json_array_get(member(g->run, "steps"), step);
    size_t heads = g->w.shape.heads, dim = g->w.shape.head_dim, from = g->from[step], rows = g->from[step + 1] - from;
    double *out = numbers(member(s, "out"), heads * rows * dim);
    for (size_t h = 0; h < heads; h++) {
        for (size_t r = 0; r < rows; r++) {
            for (size_t d = 0; d < dim; d++) {
                double ours = (double)rec->out[0][((from + r) * heads + h) * dim + d];
                double theirs = out[(h * rows + r) * dim + d];
                if (!(fabs(ours - theirs) <= 1e-5))
                    fail_msg("step %zu row %zu head %zu dim %zu: %.9g, the file says %.9g", step, r, h, d, ours,
                             theirs);
            }
        }
    }
    free(out);
    const json_t *ids = json_object_get(s, "selected_block_id"), *slots = json_object_get(s, "selected_slot");
    for (size_t h = 0; h < heads; h++) {
        for (size_t r = 0; r < rows; r++) {
            const int64_t *picked = rec->picked[0] + ((from + r) * heads + h) * rec->k;
            const int32_t *placed = rec->slots[0] + ((from + r) * heads + h) * rec->k;
            const json_t *id = ids != NULL ? json_array_get(json_array_get(ids, h), r) : NULL;
            const json_t *slot = slots != NULL ? json_array_get(json_array_get(slots, h), r) : NULL;
            for (size_t k = 0; k < rec->k; k++) {
                long long theirs = k < json_array_size(id) ? json_integer_value(json_array_get(id, k)) : -1;
                if (picked[k] != theirs)
                    fail_msg("step %zu row %zu head %zu: retrieved block %zu is %lld, the file says %lld", step, r, h,
                             k, (long long)picked[k], theirs);
                if (theirs < 0) continue;
                assert_true(k < json_array_size(slot));
                long long place = json_integer_value(json_array_get(slot, k));
                if (placed[k] != place)
                    fail_msg("step %zu row %zu head %zu: block %lld sits in slot %d, the file says %lld", step, r, h,
                             theirs, placed[k], place);
            }
        }
    }
}

static void drive_run(const golden_run *g, drive how)
{
    const char *name = "stream";
    char *dir = test_make_dir();
    cairn_store *store = NULL;
    session_spec spec = {.contexts = &name,
                         .n = 1,
                         .top_k = g->top_k,
                         .no_retrieval = g->top_k == 0,
                         .scope = g->scope,
                         .newest = g->newest,
                         .write = true,
                         .fetch = how == DRIVE_REOPEN_READ ? CAIRN_FETCH_READ : CAIRN_FETCH_MAP};
    if (how == DRIVE_MEMORY) {
        spec = (session_spec){.top_k = g->top_k, .no_retrieval = g->top_k == 0, .scope = g->scope, .newest = g->newest};
    } else {
        store = world_store(&g->w, dir, "store", CAIRN_F32);
        assert_ok(cairn_context_create(store, name, NULL));
    }
    record rec;
    record_init(&rec, &g->w, g->top_k > 0 ? g->top_k : 1);
    cairn_session *s = world_session(&g->w, store, &spec);
    for (size_t step = 0; step < g->steps; step++) {
        world_feed(&g->w, s, g->from[step], g->from[step + 1], g->from[step + 1] - g->from[step], NULL, &rec);
        check_step(g, &rec, step);
        assert_int_equal(cairn_session_slot(s), g->from[step + 1]);
        assert_int_equal(cairn_session_tokens(s), world_tokens(&g->w, g->from[step + 1]));
        if (g->from[step + 1] % world_slots(&g->w) == g->w.shape.block_tokens) continue; /* its landmark is due */
        if (how >= DRIVE_COMMIT || (how == DRIVE_OWN && step + 1 == g->steps)) assert_ok(cairn_session_commit(s, NULL));
        if (how < DRIVE_REOPEN_MAP) continue;
        cairn_session_end(s);
        cairn_store_close(store);
        store = world_store_open(dir, "store");
        s = world_session(&g->w, store, &spec);
        const cairn_token *tail;
        size_t n, at = (size_t)cairn_session_slot(s), slots = world_slots(&g->w);
        assert_ok(cairn_session_tail(s, &tail, &n));
        assert_int_equal(n, g->from[step + 1] % slots);
        assert_int_equal(at, g->from[step + 1] - n);
        assert_memory_equal(tail, g->w.ids + at, n * sizeof *tail);
        if (n > 0) world_feed(&g->w, s, at, at + n, n, NULL, NULL);
    }
    cairn_session_end(s);
    cairn_store_close(store);
    record_wipe(&rec);
    test_remove_dir(dir);
}

/* The same steps by the plain twin of tests/twin.c, so that the witness used elsewhere is itself witnessed. */
static void check_twin(const golden_run *g)
{
    const cairn_attention_shape *shape = &g->w.shape;
    record rec;
    record_init(&rec, &g->w, g->top_k);
    for (size_t step = 0; step < g->steps; step++) {
        size_t from = g->from[step], rows = g->from[step + 1] - from, width = (size_t)shape->heads * shape->head_dim;
        double *out = malloc(rows * width * sizeof *out);
        assert_non_null(out);
        twin_stingy(&g->w, 0, from, rows, g->scope, g->top_k, g->newest, false,
                    rec.picked[0] + from * shape->heads * g->top_k, rec.slots[0] + from * shape->heads * g->top_k, out);
        for (size_t i = 0; i < rows * width; i++) rec.out[0][from * width + i] = (float)out[i];
        check_step(g, &rec, step);
        free(out);

        const json_t *by_age =
            json_object_get(json_array_get(member(g->run, "steps"), step), "landmark_scoring_slot_by_age");
        uint32_t scoring[64];
        if (by_age == NULL || json_array_size(by_age) > 64) continue;
        cairn_stingy_scoring_slots(json_array_size(by_age), g->top_k, scoring);
        for (size_t i = 0; i < json_array_size(by_age); i++)
            assert_int_equal(scoring[i], json_integer_value(json_array_get(by_age, i)));
    }
    record_wipe(&rec);
}

/* Gathers q, k, v of all steps of a run; what a run does not store is that of the first run. */
static void gather(golden_run *g, const json_t *root, const json_t *run, bool interleaved)
{
    const json_t *config = member(root, "config"), *steps = member(run, "steps");
    const json_t *first = member(json_array_get(member(root, "runs"), 0), "steps");
    test_random r = {3};
    world_spec spec = {.layers = 1,
                       .heads = (uint32_t)number(config, "n_head"),
                       .head_dim = (uint32_t)number(config, "head_dim"),
                       .block_tokens = (uint32_t)number(config, "block_tokens"),
                       .scheme = CAIRN_POSITION_STINGY,
                       .interleaved = interleaved};
    spec.kv_heads = (uint32_t)number_or(config, "n_kv_head", spec.heads);
    g->run = run;
    g->steps = json_array_size(steps);
    g->from = calloc(g->steps + 1, sizeof *g->from);
    assert_non_null(g->from);
    for (size_t i = 0; i < g->steps; i++) g->from[i + 1] = g->from[i] + number(json_array_get(steps, i), "rows");
    spec.rows = g->from[g->steps];
    world_init(&g->w, &r, &spec);
    g->top_k = (uint32_t)number_or(run, "top_k", number_or(config, "top_k", 0));
    g->newest = (uint32_t)number_or(config, "mem_cache_size", 0);
    for (size_t i = 0; i < g->steps; i++) {
        const json_t *step = json_array_get(steps, i);
        const json_t *source = json_object_get(step, "q") != NULL ? step : json_array_get(first, i);
        size_t rows = g->from[i + 1] - g->from[i];
        const char *const names[3] = {"q", "k", "v"};
        float *const into[3] = {g->w.q[0], g->w.k[0], g->w.v[0]};
        for (size_t x = 0; x < 3; x++) { /* [head][row][dim] -> (row, head, dim) */
            size_t heads = x == 0 ? spec.heads : spec.kv_heads, dim = spec.head_dim;
            double *data = numbers(member(source, names[x]), heads * rows * dim);
            for (size_t h = 0; h < heads; h++)
                for (size_t row = 0; row < rows; row++)
                    for (size_t d = 0; d < dim; d++)
                        into[x][((g->from[i] + row) * heads + h) * dim + d] = (float)data[(h * rows + row) * dim + d];
            free(data);
        }
        double *is_landmark = numbers(member(step, "is_landmark"), rows);
        for (size_t row = 0; row < rows; row++)
            assert_true((is_landmark[row] != 0.0) ==
                        ((g->from[i] + row) % (spec.block_tokens + 1) == spec.block_tokens));
        free(is_landmark);
    }
}

static void drive_file(const char *file, const char *label, bool interleaved)
{
    json_t *root = load(file), *run;
    if (root == NULL) skip();
    const char *rope = json_string_value(json_object_get(member(root, "config"), "rope"));
    if (rope != NULL && strstr(rope, "interleaved") != NULL) interleaved = true;
    if (rope != NULL && strstr(rope, "half") != NULL) interleaved = false;
    size_t i;
    json_array_foreach(member(root, "runs"), i, run)
    {
        golden_run g = {0};
        gather(&g, root, run, interleaved);
        const char *selection = json_string_value(member(run, label));
        assert_non_null(selection);
        bool tokens = strstr(selection, "over_tokens") != NULL || strstr(selection, "over tokens") != NULL;
        bool heads = strstr(selection, "over_heads") != NULL || strstr(selection, "over heads") != NULL;
        g.scope = tokens || strncmp(selection, "offload", 7) == 0 ? CAIRN_SCOPE_HEAD
                  : heads                                         ? CAIRN_SCOPE_TOKEN
                                                                  : CAIRN_SCOPE_TOKEN_HEAD;
        check_twin(&g);
        for (drive how = DRIVE_MEMORY; how < DRIVES; how++) {
            print_message("  run %zu (%s, k %u), %s: %zu steps\n", i, selection, (unsigned)g.top_k, drive_names[how],
                          g.steps);
            drive_run(&g, how);
        }
        free(g.from);
        world_wipe(&g.w);
    }
    json_decref(root);
}

static void retrieval_steps_equal_the_authors_cache_with_its_ring(void **state)
{
    (void)state;
    drive_file("retrieval_step.json", "selection", true);
}
static void retrieval_steps_equal_the_authors_llama_code(void **state)
{
    (void)state;
    drive_file("llama_step.json", "mode", false);
}

/* ---- clamped_forward.json: a whole model ---- */

typedef struct forward {
    const json_t *root;
    char *path;
    cairn_model *model;
    size_t vocab;
    const cairn_attention_shape *shape;
    cairn_token *slots;
    size_t n;
} forward;

static cairn_session *forward_session(const forward *f, const json_t *run, cairn_store *store, cairn_fetch_mode fetch,
                                      uint64_t ram_bytes)
{
    const char *name = "stream";
    cairn_session *s = NULL;
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, f->shape);
    const json_t *k = member(run, "k");
    opt.policy.top_k = json_is_integer(k) ? (uint32_t)json_integer_value(k) : CAIRN_TOP_K_ALL;
    opt.policy.window_blocks = (int32_t)number(run, "window_blocks");
    opt.fetch = fetch;
    if (ram_bytes != 0) opt.ram_bytes = ram_bytes;
    opt.write = store != NULL;
    opt.threads = 2;
    assert_ok(cairn_session_begin(store, f->shape, &name, store != NULL, &opt, &s));
    return s;
}

static void check_logits(const forward *f, const json_t *run, const float *logits, size_t from, const char *how)
{
    const json_t *positions = member(f->root, "positions"), *all = member(run, "logits");
    double worst = 0.0;
    for (size_t p = 0; p < json_array_size(positions); p++) {
        size_t at = (size_t)json_integer_value(json_array_get(positions, p));
        assert_true(at < f->n);
        if (at < from) continue;
        double *expected = numbers(json_array_get(all, p), f->vocab);
        for (size_t t = 0; t < f->vocab; t++) {
            double ours = (double)logits[at * f->vocab + t], off = fabs(ours - expected[t]);
            if (!(off <= 2e-3))
                fail_msg("%s: slot %zu token %zu: logit %.6f, the file says %.6f", how, at, t, ours, expected[t]);
            worst = fmax(worst, off);
        }
        free(expected);
    }
    print_message("    %-28s largest difference %.1e\n", how, worst);
}

/* `selected` of the last layer for the slot just fed alone. */
static void check_selected(const forward *f, const json_t *run, const cairn_session *s, size_t slot)
{
    const json_t *positions = member(f->root, "positions"), *layers = json_object_get(run, "selected");
    if (layers == NULL) return;
    for (size_t p = 0; p < json_array_size(positions); p++) {
        if ((size_t)json_integer_value(json_array_get(positions, p)) != slot) continue;
        const json_t *heads = json_array_get(layers, json_array_size(layers) - 1);
        uint32_t k = (uint32_t)json_array_size(json_array_get(json_array_get(heads, 0), p));
        int64_t *picked = malloc(f->shape->heads * (size_t)k * sizeof *picked + 1);
        assert_non_null(picked);
        assert_ok(cairn_session_trace(s, 1, k, picked, NULL));
        for (size_t h = 0; h < f->shape->heads; h++) {
            for (size_t rank = 0; rank < k; rank++) {
                json_t *id = json_array_get(json_array_get(json_array_get(heads, h), p), rank);
                if (picked[h * k + rank] != json_integer_value(id))
                    fail_msg("slot %zu head %zu rank %zu: block %lld, the file says %lld", slot, h, rank,
                             (long long)picked[h * k + rank], (long long)json_integer_value(id));
            }
        }
        free(picked);
    }
}

/* chunk = 0: pieces of random length. */
static void feed_pieces(const forward *f, cairn_runtime *runtime, size_t from, size_t to, size_t chunk, test_random *r,
                        float *logits)
{
    for (size_t at = from; at < to;) {
        size_t n = chunk != 0 ? chunk : 1 + test_random_below(r, 40);
        if (n > to - at) n = to - at;
        assert_ok(cairn_runtime_feed_slots(runtime, f->slots + at, n, logits + at * f->vocab));
        at += n;
    }
}

static void run_forward(const forward *f, const json_t *run)
{
    test_random r = {9};
    cairn_runtime *runtime = NULL;
    float *logits = malloc(f->n * f->vocab * sizeof *logits);
    assert_non_null(logits);
    char how[80];

    static const size_t chunks[] = {SIZE_MAX, 0, 0, 7, 16, 33};
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        for (size_t x = 0; x < f->n * f->vocab; x++) logits[x] = NAN;
        cairn_session *s = forward_session(f, run, NULL, CAIRN_FETCH_AUTO, 0);
        assert_ok(cairn_runtime_begin(f->model, s, (uint32_t)i, &runtime));
        feed_pieces(f, runtime, 0, f->n, chunks[i] == SIZE_MAX ? f->n : chunks[i], &r, logits);
        snprintf(how, sizeof how, "memory, pieces %s %zu", i == 0 ? "all" : "of", i == 0 ? f->n : chunks[i]);
        check_logits(f, run, logits, 0, how);
        cairn_runtime_end(runtime);
        cairn_session_end(s);
    }

    cairn_session *s = forward_session(f, run, NULL, CAIRN_FETCH_AUTO, 0); /* slot by slot, with the choices */
    assert_ok(cairn_runtime_begin(f->model, s, 0, &runtime));
    assert_ok(cairn_session_trace_enable(s, true));
    for (size_t at = 0; at < f->n; at++) {
        assert_ok(cairn_runtime_feed_slots(runtime, f->slots + at, 1, logits + at * f->vocab));
        check_selected(f, run, s, at);
    }
    check_logits(f, run, logits, 0, "memory, slot by slot");
    cairn_runtime_end(runtime);
    cairn_session_end(s);

    /* A store: half of it committed, everything closed, opened again, the rest fed. Cut inside a block, at its edge and
     * one token before its end;
     * tiles by the map, by batches, and by batches under a small budget. */
    size_t block = f->shape->block_tokens + 1;
    size_t cuts[3] = {f->n / 2, f->n / 2 / block * block, f->n / 2 / block * block + block - 2};
    static const cairn_fetch_mode modes[3] = {CAIRN_FETCH_MAP, CAIRN_FETCH_READ, CAIRN_FETCH_READ};
    for (size_t i = 0; i < 3; i++) {
        char *dir = test_make_dir(), *path = test_path(dir, "store");
        cairn_store *store = NULL;
        cairn_store_options opt;
        cairn_store_options_init(&opt, sizeof opt);
        opt.create = true;
        opt.map_bytes = (uint64_t)1 << 30;
        cairn_model_geometry(f->model, CAIRN_F32, &opt.geometry);
        assert_ok(cairn_model_identity(f->model, &opt.model));
        assert_ok(cairn_store_open(path, &opt, &store));
        assert_ok(cairn_context_create(store, "stream", NULL));
        for (size_t x = 0; x < f->n * f->vocab; x++) logits[x] = NAN;
        uint64_t ram = i == 2 ? 4 << 20 : 0;
        for (size_t half = 0; half < 2; half++) {
            s = forward_session(f, run, store, modes[i], ram);
            assert_ok(cairn_runtime_begin(f->model, s, 2, &runtime));
            size_t from = half == 0 ? 0 : cuts[i], to = half == 0 ? cuts[i] : f->n;
            assert_int_equal(cairn_session_slot(s), from);
            feed_pieces(f, runtime, from, to, i == 1 ? 0 : to - from, &r, logits);
            cairn_runtime_end(runtime);
            assert_ok(cairn_session_commit(s, NULL));
            cairn_session_end(s);
            cairn_store_close(store);
            opt.create = false;
            assert_ok(cairn_store_open(path, &opt, &store));
        }
        snprintf(how, sizeof how, "store %s, reopened at %zu",
                 i == 0   ? "map"
                 : i == 1 ? "read"
                          : "read 4 MiB",
                 cuts[i]);
        check_logits(f, run, logits, 0, how);
        cairn_store_close(store);
        free(path);
        test_remove_dir(dir);
    }
    free(logits);
}

/* A forward in plain loops whose attention is cairn_attention_reference; its q, k, v then go through a session, so that
 * every retrieving layer's choices meet the file's and not only the last one's. */
static void plain_forward_and_session(const forward *f, const json_t *run, const plain_model *plain)
{
    world w;
    record rec;
    uint8_t *visible[WORLD_LAYERS] = {NULL};
    float *logits = malloc(f->n * f->vocab * sizeof *logits);
    assert_non_null(logits);
    const json_t *k = member(run, "k"), *layers = json_object_get(run, "selected");
    const json_t *positions = member(f->root, "positions");
    uint32_t top_k = json_is_integer(k) ? (uint32_t)json_integer_value(k) : CAIRN_TOP_K_ALL;
    int32_t window = (int32_t)number(run, "window_blocks");
    plain_model_forward(plain, f->slots, f->n, top_k, window, &w, visible, logits);
    check_logits(f, run, logits, 0, "plain loops");

    session_spec spec = {.top_k = top_k, .no_retrieval = top_k == 0, .window_set = true, .window = window};
    record_init(&rec, &w, top_k < 64 ? top_k : 0);
    cairn_session *s = world_session(&w, NULL, &spec);
    test_random r = {5};
    world_feed(&w, s, 0, f->n, 0, &r, &rec);
    cairn_session_end(s);
    expect_reference(&rec, visible, 0, f->n, 1e-4);
    for (size_t l = 0; l < json_array_size(layers); l++) {
        for (size_t h = 0; h < w.shape.heads; h++) {
            for (size_t p = 0; p < json_array_size(positions) && rec.k > 0; p++) {
                size_t at = (size_t)json_integer_value(json_array_get(positions, p));
                for (size_t rank = 0; rank < rec.k; rank++) {
                    const json_t *id =
                        json_array_get(json_array_get(json_array_get(json_array_get(layers, l), h), p), rank);
                    int64_t ours = rec.picked[l + 1][(at * w.shape.heads + h) * rec.k + rank];
                    if (ours != json_integer_value(id))
                        fail_msg("layer %zu slot %zu head %zu rank %zu: block %lld, the file says %lld", l + 1, at, h,
                                 rank, (long long)ours, (long long)json_integer_value(id));
                }
            }
        }
    }
    free_visible(visible);
    record_wipe(&rec);
    world_wipe(&w);
    free(logits);
}

static json_t *load_forward(forward *f)
{
    json_t *root = load("clamped_forward.json");
    if (root == NULL) return NULL;
    f->root = root;
    f->path = test_path(directory, json_string_value(member(root, "model")));
    f->n = json_array_size(member(root, "tokens"));
    double *tokens = numbers(member(root, "tokens"), f->n);
    f->slots = malloc(f->n * sizeof *f->slots);
    assert_non_null(f->slots);
    for (size_t i = 0; i < f->n; i++) f->slots[i] = (cairn_token)tokens[i];
    free(tokens);
    return root;
}

static void the_plain_forward_and_every_layers_choices_equal_the_independent_forward(void **state)
{
    (void)state;
    forward f = {0};
    json_t *root = load_forward(&f), *run;
    if (root == NULL) skip();
    plain_model *plain = plain_model_open(f.path);
    size_t i;
    if (plain != NULL) {
        f.vocab = plain_model_vocab(plain);
        json_array_foreach(member(root, "runs"), i, run) plain_forward_and_session(&f, run, plain);
    }
    plain_model_close(plain);
    free(f.slots);
    free(f.path);
    json_decref(root);
}

static void logits_of_the_clamped_model_equal_an_independent_forward(void **state)
{
    (void)state;
    forward f = {0};
    cairn_model_info info;
    json_t *root = load_forward(&f), *run;
    if (root == NULL) skip();
    assert_ok(cairn_model_open(f.path, &f.model));
    cairn_model_info_get(f.model, &info);
    f.vocab = info.vocab;
    f.shape = cairn_model_shape(f.model);
    assert_int_equal(f.shape->block_tokens, number(root, "block_tokens"));
    assert_int_equal(f.shape->scheme, CAIRN_POSITION_CLAMPED);
    size_t i;
    json_array_foreach(member(root, "runs"), i, run)
    {
        const json_t *k = member(run, "k");
        print_message("  run %zu: k %d, window %zu\n", i, json_is_integer(k) ? (int)json_integer_value(k) : -1,
                      number(run, "window_blocks"));
        run_forward(&f, run);
    }
    free(f.slots);
    free(f.path);
    cairn_model_close(f.model);
    json_decref(root);
}

static void the_directory_holds_at_least_one_golden_file(void **state)
{
    (void)state;
    static const char *const names[] = {"grouped_softmax.json", "retrieval_step.json", "llama_step.json",
                                        "clamped_forward.json"};
    size_t found = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = test_path(directory, names[i]);
        FILE *file = fopen(path, "rb");
        if (file != NULL) found++, fclose(file);
        free(path);
    }
    if (found == 0) fail_msg("%s holds none of the golden files", directory);
    if (strcmp(directory, CAIRN_TEST_DATA "/golden") == 0) assert_int_equal(found, 4);
}

int main(int argc, char **argv)
{
    if (argc > 2) {
        fprintf(stderr, "usage: test_golden [DIR]\n");
        return 2;
    }
    if (argc == 2) directory = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_directory_holds_at_least_one_golden_file),
        cmocka_unit_test(grouped_softmax_equals_the_authors_code),
        cmocka_unit_test(retrieval_steps_equal_the_authors_cache_with_its_ring),
        cmocka_unit_test(retrieval_steps_equal_the_authors_llama_code),
        cmocka_unit_test(the_plain_forward_and_every_layers_choices_equal_the_independent_forward),
        cmocka_unit_test(logits_of_the_clamped_model_equal_an_independent_forward),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
