/* test_runtime.c - streams of tokens through a model and a session: the same bits however they are cut.
 * labels: threads */
#include "tiny_model.h"

#include "context_internal.h"
#include "gguf_internal.h"
#include "kernels_internal.h"

typedef struct fixture {
    char *dir;
    char *path;  /* of the model */
    char *store; /* directory of a store */
    cairn_model *model;
} fixture;

static int setup(void **state)
{
    fixture *fx = calloc(1, sizeof *fx);
    assert_non_null(fx);
    fx->dir = test_make_dir();
    fx->path = test_path(fx->dir, "model.gguf");
    fx->store = test_path(fx->dir, "store");
    *state = fx;
    return 0;
}
static int teardown(void **state)
{
    fixture *fx = *state;
    cairn_model_close(fx->model);
    free(fx->path);
    free(fx->store);
    test_remove_dir(fx->dir);
    free(fx);
    return 0;
}

static void use_model(fixture *fx, const tiny_model *m)
{
    cairn_model_close(fx->model);
    fx->model = NULL;
    tiny_model_write(m, fx->path);
    assert_ok(cairn_model_open(fx->path, &fx->model));
}

static size_t vocab_of(const fixture *fx)
{
    cairn_model_info info;
    cairn_model_info_get(fx->model, &info);
    return info.vocab;
}

static cairn_token *random_bytes(size_t n, uint64_t seed)
{
    test_random r = {seed};
    cairn_token *tokens = calloc(n, sizeof *tokens);
    assert_non_null(tokens);
    tokens[0] = 1;
    for (size_t i = 1; i < n; i++) tokens[i] = 3 + (cairn_token)test_random_below(&r, 256);
    return tokens;
}

typedef struct stream { /* a session in memory and its runtime */
    cairn_session *session;
    cairn_runtime *rt;
} stream;

static stream begin(const fixture *fx, const cairn_attention_shape *shape, cairn_dtype dtype, uint32_t threads,
                    uint32_t chunk_blocks)
{
    stream s;
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, shape);
    opt.dtype = dtype;
    opt.threads = threads;
    assert_ok(cairn_session_begin(NULL, shape, NULL, 0, &opt, &s.session));
    assert_ok(cairn_runtime_begin(fx->model, s.session, chunk_blocks, &s.rt));
    return s;
}
static void end(stream *s)
{
    cairn_runtime_end(s->rt);
    cairn_session_end(s->session);
}

static void expect_same_bits(const char *what, const float *got, const float *expected, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&got[i], &expected[i], sizeof *got) != 0)
            fail_msg("%s: number %zu is %.9g, was %.9g", what, i, (double)got[i], (double)expected[i]);
}

static double largest_difference(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    return worst;
}

/* ---- cutting ---- */

/* logits after every token of pieces of `step` tokens (0: of random sizes from 2 on) */
static void feed_in_pieces(stream *s, const cairn_token *tokens, size_t n, size_t step, size_t vocab, float *logits)
{
    test_random r = {step + 3};
    for (size_t at = 0; at < n;) {
        size_t piece = step != 0 ? step : 2 + test_random_below(&r, 40);
        if (piece > n - at || n - at - piece == 1) piece = n - at; /* one token alone takes the other path */
        assert_ok(cairn_runtime_feed_all(s->rt, tokens + at, piece, logits + at * vocab));
        at += piece;
    }
}

static void check_cuts(fixture *fx, const cairn_attention_shape *shape, cairn_dtype dtype, size_t n)
{
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(n, 4);
    float *whole = calloc(n * vocab, sizeof *whole);
    float *pieces = calloc(n * vocab, sizeof *pieces);
    assert_true(whole != NULL && pieces != NULL);
    stream s = begin(fx, shape, dtype, 1, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, whole));
    end(&s);
    static const struct {
        size_t step;
        uint32_t chunk_blocks;
        uint32_t threads;
    } cuts[] = {{0, 0, 2}, {2, 1, 1}, {0, 1, 3}, {7, 2, 2}, {8, 3, 1}, {50, 4, 2}, {SIZE_MAX, 1, 2}};
    for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
        char what[80];
        memset(pieces, 0, n * vocab * sizeof *pieces);
        s = begin(fx, shape, dtype, cuts[c].threads, cuts[c].chunk_blocks);
        feed_in_pieces(&s, tokens, n, cuts[c].step == SIZE_MAX ? n : cuts[c].step, vocab, pieces);
        snprintf(what, sizeof what, "pieces of %zu, chunks of %u blocks, %u threads", cuts[c].step,
                 cuts[c].chunk_blocks, cuts[c].threads);
        expect_same_bits(what, pieces, whole, n * vocab);
        assert_int_equal(cairn_session_tokens(s.session), n);
        end(&s);
    }
    free(tokens);
    free(whole);
    free(pieces);
}

static void logits_have_the_same_bits_however_the_tokens_are_cut(void **state)
{
    fixture *fx = *state;
    static const struct {
        const char *architecture;
        cairn_gguf_type type;
        cairn_dtype dtype;
        bool local_first;
    } cases[] = {{"qwen3", CAIRN_GGUF_F32, CAIRN_F32, true},
                 {"llama", CAIRN_GGUF_F16, CAIRN_F16, false},
                 {"qwen3", CAIRN_GGUF_Q8_0, CAIRN_Q8, true},
                 {"llama", CAIRN_GGUF_BF16, CAIRN_BF16, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_model m = tiny_model_default();
        m.architecture = cases[i].architecture;
        m.type = cases[i].type;
        m.local_first = cases[i].local_first;
        m.block_tokens = 31; /* wide enough that OpenBLAS would show another number of rows in the bits */
        use_model(fx, &m);
        check_cuts(fx, cairn_model_shape(fx->model), cases[i].dtype, 230);
    }
}

static void the_same_holds_without_landmarks(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    m.block_tokens = 0;
    m.architecture = "llama";
    use_model(fx, &m);
    check_cuts(fx, cairn_model_shape(fx->model), CAIRN_F16, 150);
    m = tiny_model_default(); /* a landmark model used as an ordinary one: blocks of 7 slots */
    use_model(fx, &m);
    cairn_attention_shape dense = *cairn_model_shape(fx->model);
    dense.scheme = CAIRN_POSITION_DENSE;
    check_cuts(fx, &dense, CAIRN_F32, 60);
}

static void feed_gives_the_last_tokens_logits_with_the_same_bits_however_they_are_cut(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    size_t n = 101;
    m.type = CAIRN_GGUF_F16;
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(n, 8);
    float *expected = calloc(vocab, sizeof *expected);
    float *got = calloc(vocab, sizeof *got);
    assert_true(expected != NULL && got != NULL);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F16, 1, 0);
    assert_ok(cairn_runtime_feed(s.rt, tokens, n, expected));
    end(&s);
    for (size_t first = 1; first < n - 1; first += 6) {
        s = begin(fx, cairn_model_shape(fx->model), CAIRN_F16, 2, 3);
        assert_ok(
            cairn_runtime_feed(s.rt, tokens, first, NULL)); /* even one token: without logits it runs as a chunk */
        assert_ok(cairn_runtime_feed(s.rt, tokens + first, n - first, got));
        expect_same_bits("cut in two", got, expected, vocab);
        end(&s);
    }
    free(tokens);
    free(expected);
    free(got);
}

static void decoding_token_by_token_agrees_with_prefill(void **state)
{
    fixture *fx = *state;
    static const cairn_gguf_type types[] = {CAIRN_GGUF_F32, CAIRN_GGUF_F16, CAIRN_GGUF_BF16, CAIRN_GGUF_Q8_0};
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        tiny_model m = tiny_model_default();
        size_t n = 100;
        m.type = types[t];
        use_model(fx, &m);
        size_t vocab = vocab_of(fx);
        cairn_token *tokens = random_bytes(n, 12);
        float *prefill = calloc(n * vocab, sizeof *prefill);
        float *decode = calloc(n * vocab, sizeof *decode);
        assert_true(prefill != NULL && decode != NULL);
        stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 2, 0);
        assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, prefill));
        end(&s);
        s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 2, 0);
        for (size_t i = 0; i < n; i++) assert_ok(cairn_runtime_feed(s.rt, tokens + i, 1, decode + i * vocab));
        end(&s);
        double off = largest_difference(prefill, decode, n * vocab);
        if (!(off <= 1e-4)) fail_msg("weights of type %d: decode is off by %g", (int)types[t], off);
        free(tokens);
        free(prefill);
        free(decode);
    }
}

static void slots_with_landmarks_in_place_equal_tokens_without(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default(); /* C = 7 */
    enum { N = 60 };
    cairn_token slots[N + N / 7];
    size_t n = 0;
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(N, 12);
    for (size_t i = 0; i < N; i++) {
        slots[n++] = tokens[i];
        if (i % 7 == 6) slots[n++] = 259;
    }
    float *a = calloc(N * vocab, sizeof *a);
    float *b = calloc(n * vocab, sizeof *b);
    assert_true(a != NULL && b != NULL);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 2, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, N, a));
    end(&s);
    s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 2, 2);
    assert_ok(cairn_runtime_feed_slots(s.rt, slots, 23, b)); /* ends on a landmark */
    assert_ok(cairn_runtime_feed_slots(s.rt, slots + 23, 8, b + 23 * vocab));
    assert_ok(cairn_runtime_feed_slots(s.rt, slots + 31, n - 31, b + 31 * vocab));
    assert_int_equal(cairn_session_slot(s.session), n);
    size_t row = 0;
    for (size_t i = 0; i < N; i++, row++) {
        expect_same_bits("a token", b + row * vocab, a + i * vocab, vocab);
        if (i % 7 == 6) row++;
    }
    end(&s);
    free(tokens);
    free(a);
    free(b);
}

/* ---- landmarks ---- */

static void a_block_is_closed_in_the_call_that_fills_it(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default(); /* C = 7 */
    use_model(fx, &m);
    cairn_token *tokens = random_bytes(64, 2);
    float *logits = calloc(vocab_of(fx), sizeof *logits);
    assert_non_null(logits);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    assert_ok(cairn_runtime_feed(s.rt, tokens, 7, NULL)); /* a chunk */
    assert_int_equal(cairn_session_slot(s.session), 8);
    assert_ok(cairn_runtime_feed(s.rt, tokens, 6, logits));
    assert_int_equal(cairn_session_slot(s.session), 14);
    assert_ok(cairn_runtime_feed(s.rt, tokens, 1, logits)); /* a step */
    assert_int_equal(cairn_session_slot(s.session), 16);
    assert_ok(cairn_runtime_feed_slots(s.rt, tokens, 7, NULL)); /* the caller owes this one */
    assert_int_equal(cairn_session_slot(s.session), 23);
    assert_ok(cairn_runtime_feed(s.rt, tokens, 1, logits)); /* so it comes first here */
    assert_int_equal(cairn_session_slot(s.session), 25);
    assert_int_equal(cairn_session_tokens(s.session), 22);
    assert_ok(cairn_runtime_feed(s.rt, tokens, 0, NULL));
    assert_int_equal(cairn_session_slot(s.session), 25);
    end(&s);
    free(logits);
    free(tokens);
}

static void wrong_tokens_are_refused_before_anything_runs(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    use_model(fx, &m);
    float *logits = calloc(8 * vocab_of(fx), sizeof *logits);
    assert_non_null(logits);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    const cairn_token high[] = {1, 5, 260};
    const cairn_token negative[] = {1, -1};
    const cairn_token landmark[] = {1, 259};
    const cairn_token eight[] = {1, 4, 5, 6, 7, 8, 9, 10};
    assert_int_equal(cairn_runtime_feed(s.rt, high, 3, logits), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "token 2 of 3 is 260"));
    assert_int_equal(cairn_runtime_feed_all(s.rt, negative, 2, logits), CAIRN_INVALID);
    assert_int_equal(cairn_runtime_feed(s.rt, landmark, 2, logits), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "token 1 of 2 is the landmark"));
    assert_int_equal(cairn_runtime_feed_slots(s.rt, landmark, 2, logits), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "slot 1 is token 259: no landmark is due there"));
    assert_int_equal(cairn_runtime_feed_slots(s.rt, eight, 8, logits), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "slot 7 is token 10: the landmark is due there"));
    assert_int_equal(cairn_runtime_feed(s.rt, NULL, 0, logits), CAIRN_INVALID);
    assert_int_equal(cairn_session_slot(s.session), 0);
    assert_ok(cairn_runtime_feed(s.rt, eight, 8, logits)); /* and all is well still */
    end(&s);
    free(logits);
}

static void a_session_of_another_shape_is_refused(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    cairn_session *session;
    cairn_runtime *rt = NULL;
    use_model(fx, &m);
    cairn_attention_shape other = *cairn_model_shape(fx->model);
    other.heads = 8;
    other.landmark_bias = NULL;
    assert_ok(cairn_session_begin(NULL, &other, NULL, 0, NULL, &session));
    assert_int_equal(cairn_runtime_begin(fx->model, session, 0, &rt), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "layers of 8 heads over 2"));
    assert_null(rt);
    cairn_session_end(session);

    m.block_tokens = 0;
    use_model(fx, &m);
    other = *cairn_model_shape(fx->model);
    other.scheme = CAIRN_POSITION_CLAMPED;
    assert_ok(cairn_session_begin(NULL, &other, NULL, 0, NULL, &session));
    assert_int_equal(cairn_runtime_begin(fx->model, session, 0, &rt), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "landmarks"));
    cairn_session_end(session);
}

/* ---- weights ---- */

/* The same numbers as F32 and as F16: prefill computes with the same floats, so bit for bit the same. */
static void f16_weights_mean_the_numbers_they_hold(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    size_t n = 40;
    m.type = CAIRN_GGUF_F16;
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(n, 21);
    float *half = calloc(n * vocab, sizeof *half);
    float *full = calloc(n * vocab, sizeof *full);
    assert_true(half != NULL && full != NULL);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, half));
    end(&s);

    gguf f;
    assert_ok(gguf_open(fx->path, &f));
    m.type = CAIRN_GGUF_F32;
    char *wide = test_path(fx->dir, "wide.gguf");
    tiny_model_write(&m, wide); /* the unrounded weights, which are now overwritten by the rounded ones */
    size_t bytes;
    uint8_t *file = test_read_file(wide, &bytes);
    gguf g;
    assert_ok(gguf_parse(file, bytes, &g));
    for (size_t i = 0; i < g.n_tensors; i++) {
        const gguf_tensor *from = &f.tensors[i]; /* both tables are sorted by name */
        const gguf_tensor *to = &g.tensors[i];
        if (from->type != CAIRN_GGUF_F16) continue;
        cairn_kernels_ref.widen((void *)(uintptr_t)to->data, from->data, CAIRN_F16, from->dims[0] * from->dims[1]);
    }
    gguf_close(&f);
    gguf_close(&g);
    test_write_file(wide, file, bytes);
    free(file);
    cairn_model_close(fx->model);
    assert_ok(cairn_model_open(wide, &fx->model));
    s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, full));
    end(&s);
    expect_same_bits("f16 against f32", half, full, n * vocab);
    free(wide);
    free(tokens);
    free(half);
    free(full);
}

static void a_model_without_an_output_matrix_uses_its_embedding(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    size_t n = 9;
    m.tied = true;
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(n, 2);
    float *tied = calloc(n * vocab, sizeof *tied);
    float *own = calloc(n * vocab, sizeof *own);
    assert_true(tied != NULL && own != NULL);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, tied));
    end(&s);
    /* The same file with the embedding a second time, as output.weight. */
    cairn_gguf_writer *w = tiny_model_begin(&m);
    gguf f;
    assert_ok(gguf_open(fx->path, &f));
    const gguf_tensor *e = gguf_find_tensor(&f, "token_embd.weight");
    assert_ok(
        cairn_gguf_put_tensor(w, "output.weight", CAIRN_GGUF_F32, e->dims, 2, (const float *)(const void *)e->data));
    gguf_close(&f);
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    cairn_model_close(fx->model);
    assert_ok(cairn_model_open(fx->path, &fx->model));
    s = begin(fx, cairn_model_shape(fx->model), CAIRN_F32, 1, 0);
    assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, own));
    end(&s);
    expect_same_bits("tied", tied, own, n * vocab);
    free(tokens);
    free(tied);
    free(own);
}

/* ---- stored contexts ---- */

static cairn_store *open_store(const fixture *fx, cairn_dtype dtype)
{
    cairn_store_options opt;
    cairn_store *store;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.map_bytes = 64 << 20;
    cairn_model_geometry(fx->model, dtype, &opt.geometry);
    assert_ok(cairn_model_identity(fx->model, &opt.model));
    assert_ok(cairn_store_open(fx->store, &opt, &store));
    return store;
}

static cairn_session *open_session(const fixture *fx, cairn_store *store, const char *const *names, size_t n,
                                   bool write)
{
    cairn_session_options opt;
    cairn_session *session;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
    opt.write = write;
    opt.threads = 2;
    assert_ok(cairn_session_begin(store, cairn_model_shape(fx->model), names, n, &opt, &session));
    return session;
}

static void ingest(const fixture *fx, cairn_store *store, const char *name, const cairn_token *tokens, size_t n)
{
    cairn_runtime *rt;
    cairn_context_create(store, name, NULL);
    cairn_session *session = open_session(fx, store, &name, 1, true);
    assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
    assert_ok(cairn_runtime_feed(rt, tokens, n, NULL));
    assert_ok(cairn_session_commit(session, NULL));
    cairn_runtime_end(rt);
    cairn_session_end(session);
}

static void a_context_reopened_anywhere_goes_on_with_the_same_bits(void **state)
{
    fixture *fx = *state;
    static const cairn_dtype dtypes[] = {CAIRN_F16, CAIRN_Q8, CAIRN_F32};
    static const size_t stops[] = {1, 6, 7, 8, 13, 14, 20, 48, 63};
    tiny_model m = tiny_model_default(); /* C = 7 */
    size_t n = 120;
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_token *tokens = random_bytes(n, 31);
    float *expected = calloc(n * vocab, sizeof *expected);
    float *got = calloc(n * vocab, sizeof *got);
    assert_true(expected != NULL && got != NULL);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        stream s = begin(fx, cairn_model_shape(fx->model), dtypes[d], 1, 0);
        assert_ok(cairn_runtime_feed_all(s.rt, tokens, n, expected));
        end(&s);
        char number[16];
        snprintf(number, sizeof number, "store%zu", d);
        free(fx->store);
        fx->store = test_path(fx->dir, number);
        cairn_store *store = open_store(fx, dtypes[d]);
        for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
            char name[32];
            const char *names[] = {name};
            cairn_runtime *rt;
            snprintf(name, sizeof name, "until %zu", stops[i]);
            ingest(fx, store, name, tokens, stops[i]);
            ingest(fx, store, name, tokens + stops[i], 11); /* and on, in another session */
            size_t at = stops[i] + 11;
            cairn_session *session = open_session(fx, store, names, 1, false);
            assert_ok(cairn_runtime_begin(fx->model, session, 1, &rt));
            assert_int_equal(cairn_session_tokens(session), at);
            assert_ok(cairn_runtime_feed_all(rt, tokens + at, n - at, got + at * vocab));
            expect_same_bits(name, got + at * vocab, expected + at * vocab, (n - at) * vocab);
            cairn_runtime_end(rt);
            cairn_session_end(session);
        }
        cairn_store_close(store);
    }
    free(tokens);
    free(expected);
    free(got);
}

static void many_tails_are_adopted_in_order_whatever_the_threads(void **state)
{
    enum { N = 21 }; /* more than a few threads take at once */
    fixture *fx = *state;
    tiny_model m = tiny_model_default(); /* C = 7 */
    const char *names[N];
    char name[N][16];
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_store *store = open_store(fx, CAIRN_F16);
    cairn_token *tokens = random_bytes(4 * N + 5, 6);
    float *logits[2];
    for (size_t i = 0; i < N; i++) {
        snprintf(name[i], sizeof name[i], "doc %zu", i);
        names[i] = name[i];
        ingest(fx, store, name[i], tokens + 4 * i, 2 + i % 3);
    }
    for (uint32_t i = 0; i < 2; i++) {
        cairn_runtime *rt;
        cairn_session_options opt;
        cairn_session *session;
        cairn_source sources[2 * N];
        uint32_t seen[N] = {0};
        logits[i] = calloc(vocab, sizeof *logits[i]);
        assert_non_null(logits[i]);
        cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
        opt.policy.top_k = CAIRN_TOP_K_ALL;
        opt.threads = 1 + 2 * i;
        assert_ok(cairn_session_begin(store, cairn_model_shape(fx->model), names, N, &opt, &session));
        assert_ok(cairn_model_adopt_tails(fx->model, store, names, N, session));
        assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
        cairn_session_sources_enable(session, true);
        assert_ok(cairn_runtime_feed(rt, tokens + 4 * N, 5, logits[i]));
        size_t n = cairn_session_sources(session, sources, 2 * N);
        for (size_t j = 0; j < n; j++)
            if (sources[j].context < N) seen[sources[j].context] = sources[j].tokens;
        for (uint32_t c = 0; c < N; c++) assert_int_equal(seen[c], 2 + c % 3);
        cairn_runtime_end(rt);
        cairn_session_end(session);
    }
    expect_same_bits("threads", logits[1], logits[0], vocab);
    cairn_store_close(store);
    free(tokens);
    free(logits[0]);
    free(logits[1]);
}

static void documents_shorter_than_a_block_are_found_once_their_tails_are_adopted(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default(); /* C = 7 */
    static const char *const names[] = {"short", "even", "long"};
    use_model(fx, &m);
    size_t vocab = vocab_of(fx);
    cairn_store *store = open_store(fx, CAIRN_F16);
    cairn_token *tokens = random_bytes(40, 5);
    float *without = calloc(vocab, sizeof *without);
    float *with = calloc(vocab, sizeof *with);
    assert_true(without != NULL && with != NULL);
    ingest(fx, store, "short", tokens, 4);
    ingest(fx, store, "even", tokens + 4, 14); /* two whole blocks, no tail */
    ingest(fx, store, "long", tokens + 18, 9); /* a block and two tokens */
    for (int adopt = 0; adopt < 2; adopt++) {
        cairn_runtime *rt;
        cairn_session_options opt;
        cairn_session *session;
        cairn_source sources[16];
        bool seen_short = false;
        bool seen_end = false;
        cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
        opt.policy.top_k = CAIRN_TOP_K_ALL;
        assert_ok(cairn_session_begin(store, cairn_model_shape(fx->model), names, 3, &opt, &session));
        if (adopt) assert_ok(cairn_model_adopt_tails(fx->model, store, names, 3, session));
        assert_ok(cairn_runtime_begin(fx->model, session, 0, &rt));
        cairn_session_sources_enable(session, true);
        assert_ok(cairn_runtime_feed(rt, tokens + 30, 5, adopt ? with : without));
        size_t n = cairn_session_sources(session, sources, 16);
        for (size_t i = 0; i < n; i++) {
            seen_short |= sources[i].context == 0 && sources[i].token == 0 && sources[i].tokens == 4;
            seen_end |= sources[i].context == 2 && sources[i].token == 7 && sources[i].tokens == 2;
        }
        assert_int_equal(seen_short, adopt);
        assert_int_equal(seen_end, adopt);
        cairn_runtime_end(rt);
        cairn_session_end(session);
    }
    assert_true(largest_difference(with, without, vocab) > 1e-3);
    static const char *const absent[] = {"short", "nowhere"};
    cairn_session *session = open_session(fx, store, names, 2, false);
    assert_int_equal(cairn_model_adopt_tails(fx->model, store, absent, 2, session), CAIRN_NOT_FOUND);
    assert_non_null(strstr(cairn_last_error(), "nowhere"));
    cairn_session_end(session);
    cairn_store_close(store);
    free(tokens);
    free(without);
    free(with);
}

static void running_out_of_memory_ends_a_stream_with_a_status(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    use_model(fx, &m);
    cairn_token *tokens = random_bytes(40, 5);
    size_t failed = 0;
    for (uint64_t n = 1;; n++) {
        cairn_session *session;
        cairn_runtime *rt = NULL;
        cairn_session_options opt;
        cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(fx->model));
        opt.threads = 1;
        assert_ok(cairn_session_begin(NULL, cairn_model_shape(fx->model), NULL, 0, &opt, &session));
        cairn_alloc_fail_at(n);
        cairn_status st = cairn_runtime_begin(fx->model, session, 2, &rt);
        if (st == CAIRN_OK) st = cairn_runtime_feed(rt, tokens, 40, NULL);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK && rt != NULL) /* half a chunk is no state to go on from */
            assert_int_equal(cairn_runtime_feed(rt, tokens, 1, NULL), CAIRN_INVALID);
        cairn_runtime_end(rt);
        cairn_session_end(session);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
        failed++;
    }
    assert_true(failed > 10);
    free(tokens);
}

/* Who only reads has no use for the last layer's attention, but whoever asks later has for what was learnt from it. */
static void of_the_last_layer_queries_are_kept_where_nobody_wants_its_outcome(void **state)
{
    fixture *fx = *state;
    enum { C = 3, BLOCKS = 1200 };
    tiny_model m = tiny_model_default();
    m.block_tokens = C;
    use_model(fx, &m);
    cairn_token *tokens = random_bytes(BLOCKS * C, 91);
    stream s = begin(fx, cairn_model_shape(fx->model), CAIRN_F16, 2, 4);
    assert_ok(cairn_runtime_feed(s.rt, tokens, BLOCKS * C, NULL));
    const attn_lore *last = attn_lore_of(&s.session->step, m.layers - 1, 0);
    const attn_lore *before = attn_lore_of(&s.session->step, m.layers - 2, 0);
    assert_true(before->kept >= ATTN_QUERIES_KEPT);
    assert_int_equal(last->kept, before->kept);
    cairn_step_stats stats;
    cairn_session_stats(s.session, &stats);
    assert_true(stats.tiles > 0);
    end(&s);
    free(tokens);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(logits_have_the_same_bits_however_the_tokens_are_cut, setup, teardown),
        cmocka_unit_test_setup_teardown(the_same_holds_without_landmarks, setup, teardown),
        cmocka_unit_test_setup_teardown(feed_gives_the_last_tokens_logits_with_the_same_bits_however_they_are_cut,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(decoding_token_by_token_agrees_with_prefill, setup, teardown),
        cmocka_unit_test_setup_teardown(slots_with_landmarks_in_place_equal_tokens_without, setup, teardown),
        cmocka_unit_test_setup_teardown(a_block_is_closed_in_the_call_that_fills_it, setup, teardown),
        cmocka_unit_test_setup_teardown(wrong_tokens_are_refused_before_anything_runs, setup, teardown),
        cmocka_unit_test_setup_teardown(a_session_of_another_shape_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(f16_weights_mean_the_numbers_they_hold, setup, teardown),
        cmocka_unit_test_setup_teardown(a_model_without_an_output_matrix_uses_its_embedding, setup, teardown),
        cmocka_unit_test_setup_teardown(a_context_reopened_anywhere_goes_on_with_the_same_bits, setup, teardown),
        cmocka_unit_test_setup_teardown(many_tails_are_adopted_in_order_whatever_the_threads, setup, teardown),
        cmocka_unit_test_setup_teardown(documents_shorter_than_a_block_are_found_once_their_tails_are_adopted, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(of_the_last_layer_queries_are_kept_where_nobody_wants_its_outcome, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(running_out_of_memory_ends_a_stream_with_a_status, setup, teardown),
    };
    return cmocka_run_group_tests_name("runtime", tests, NULL, NULL);
}
