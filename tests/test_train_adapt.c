/* test_train_adapt.c - models of others made models with landmarks, and written back.
 *
 * Witnesses: llama.cpp's probabilities for the parity models, now asked of the written file; the reference kernels and
 * plain loops for every weight and mean; the bytes of the source for all that is said about the model.
 */
#include "adapt_support.h"
#include "rope_factors.h"

#include <jansson.h>
#include <unistd.h>

/* Things files say that no reader of ours looks at, in types our own writer has no call for. */
static void put_odd_metadata(cairn_gguf_writer *w, const char *architecture)
{
    static const uint8_t numbers[] = {1, 2, 3, 4, 5, 6, 7, 0x80};
    char key[64];
    const gguf_value odd[] = {{{"odd.u64", 7}, GGUF_U64, false, 1, numbers, 8},
                              {{"odd.i8s", 7}, GGUF_I8, true, 8, numbers, 8},
                              {{"odd.none", 8}, GGUF_F64, true, 0, numbers, 0},
                              {{"odd.bools", 9}, GGUF_BOOL, true, 2, (const uint8_t *)"\0\1", 2}};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) assert_ok(gguf_put_value(w, &odd[i]));
    snprintf(key, sizeof key, "%s.vocab_size", architecture);
    assert_ok(cairn_gguf_put_u32(w, key, TINY_PIECES));
    assert_ok(cairn_gguf_put_u32(w, "general.file_type", 1));
    assert_ok(cairn_gguf_put_string(w, "general.license", "\xc3\xa9 any"));
    assert_ok(cairn_gguf_put_string(w, "tokenizer.chat_template", ""));
}

static void check_written(const adapted *a)
{
    const cairn_model_info *info = &a->model->info;
    const cairn_attention_shape *shape = cairn_model_shape(a->model);
    assert_string_equal(info->name, a->source->info.name);
    assert_string_equal(info->architecture, a->source->info.architecture);
    assert_int_equal(info->train_window, 777);
    assert_int_equal(info->bos, a->source->info.bos);
    assert_int_equal(info->landmark, info->vocab - 1);
    assert_int_equal(shape->scheme, CAIRN_POSITION_CLAMPED);
    assert_int_equal(shape->block_tokens, a->layout->shape.attention.block_tokens);
    assert_int_equal(shape->clamp_blocks, 3);
    assert_int_equal(shape->window_blocks, 1);
    assert_int_equal(shape->top_k, 4);
    assert_non_null(shape->local_layers);
    for (uint32_t l = 0; l < info->layers; l++) assert_int_equal(shape->local_layers[l], l == 0);
    for (size_t i = 0; i < (size_t)info->layers * info->heads; i++)
        assert_true(fabs((double)shape->landmark_bias[i] - log(shape->block_tokens)) < 1e-6);
}

static void same_tokens_for_text(const adapted *a)
{
    static const char *const texts[] = {"the then\n", " the  the <tool> a\xc3\xa9", "<landmark><landmark1>", "\xff"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        cairn_token x[64], y[64];
        size_t n, m;
        assert_ok(cairn_model_encode(a->source, texts[i], strlen(texts[i]), x, 64, &n));
        assert_ok(cairn_model_encode(a->model, texts[i], strlen(texts[i]), y, 64, &m));
        assert_int_equal(n, m);
        assert_memory_equal(x, y, n * sizeof *x);
    }
}

static void same_text_for_tokens(const adapted *a)
{
    for (uint32_t id = 0; id < a->source->info.vocab; id++) {
        char x[16], y[16];
        size_t n = cairn_model_decode(a->source, (cairn_token)id, x, sizeof x);
        assert_int_equal(n, cairn_model_decode(a->model, (cairn_token)id, y, sizeof y));
        assert_memory_equal(x, y, n);
    }
    char none[4];
    assert_int_equal(cairn_model_decode(a->model, a->model->info.landmark, none, 4), 0);
}

/* ---- a model of pieces ---- */

static tiny_model pieces_model(const char *architecture, cairn_gguf_type type, bool tied)
{
    tiny_model m = tiny_model_default();
    m.architecture = architecture;
    m.type = type;
    m.tied = tied;
    m.block_tokens = 0;
    m.vocab = TINY_PIECES;
    return m;
}

static void a_sentencepiece_model_gets_a_token_more_and_stays_what_it_was(void **state)
{
    const fixture *fx = *state;
    static const struct {
        const char *architecture, *vocab_size;
        cairn_gguf_type from, to;
        bool tied;
        double off;
    } cases[] = {{"llama", "llama.vocab_size", CAIRN_GGUF_F32, CAIRN_GGUF_F32, false, 1e-5},
                 {"qwen3", "qwen3.vocab_size", CAIRN_GGUF_F16, CAIRN_GGUF_F16, true, 1e-3},
                 {"llama", "llama.vocab_size", CAIRN_GGUF_BF16, CAIRN_GGUF_BF16, true, 1e-3},
                 {"qwen3", "qwen3.vocab_size", CAIRN_GGUF_Q8_0, CAIRN_GGUF_Q8_0, false, 1e-3},
                 {"qwen3", "qwen3.vocab_size", CAIRN_GGUF_Q8_0, CAIRN_GGUF_F32, true, 1e-3}};
    static const uint32_t file_types[] = {0, 1, 32, 7, 0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const tiny_model m = pieces_model(cases[i].architecture, cases[i].from, cases[i].tied);
        adapted a;
        cairn_gguf_writer *w = tiny_model_begin(&m);
        tiny_put_spm(w, "<|pad|>");
        put_odd_metadata(w, m.architecture);
        assert_ok(cairn_gguf_writer_save(w, fx->source));
        cairn_gguf_writer_free(w);
        adapt(fx, fx->source, 40, cases[i].to, &a);
        assert_int_equal(a.model->info.vocab, TINY_PIECES + 1);
        assert_int_equal(a.layout->shape.tied, cases[i].tied);
        check_written(&a);
        check_params(&a);
        check_metadata(&a.source->file, &a.model->file,
                       NAMES("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"),
                       file_types[i] == 1 ? NAMES(cases[i].vocab_size)
                                          : NAMES(cases[i].vocab_size, "general.file_type"));
        uint32_t said = 0;
        double score;
        assert_ok(gguf_u32(&a.model->file, cases[i].vocab_size, &said));
        assert_int_equal(said, TINY_PIECES + 1);
        assert_ok(gguf_u32(&a.model->file, "general.file_type", &said));
        assert_int_equal(said, file_types[i]);
        assert_true(gguf_text_is(last_token(&a.model->file), "<landmark>"));
        assert_int_equal(last_integer(&a.model->file, "tokenizer.ggml.token_type"), TINY_CONTROL);
        assert_true(gguf_value_float(gguf_find(&a.model->file, "tokenizer.ggml.scores"), TINY_PIECES, &score));
        assert_true(score == 0);
        assert_int_equal(gguf_find_tensor(&a.model->file, "blk.1.ffn_up.weight")->type, cases[i].to);
        assert_int_equal(gguf_find_tensor(&a.model->file, "blk.1.ffn_norm.weight")->type, CAIRN_GGUF_F32);
        assert_int_equal(a.model->file.n_tensors, a.source->file.n_tensors);
        same_tokens_for_text(&a);
        same_text_for_tokens(&a);
        double off = furthest_logit(&a, 40, i);
        print_message("  %s of type %d as %d: logits %.2g apart\n", m.architecture, cases[i].from, cases[i].to, off);
        assert_true(off <= cases[i].off);
        adapted_wipe(&a);
    }
}

static void a_byte_pair_model_is_given_kinds_so_that_the_landmark_is_no_text(void **state)
{
    const fixture *fx = *state;
    const tiny_model m = pieces_model("qwen3", CAIRN_GGUF_F16, true);
    adapted a;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    tiny_put_bpe(w, "qwen2");
    assert_ok(cairn_gguf_writer_save(w, fx->source));
    cairn_gguf_writer_free(w);
    adapt(fx, fx->source, 20, CAIRN_GGUF_F16, &a);
    assert_int_equal(a.model->info.vocab, TINY_PIECES + 1);
    check_written(&a);
    check_params(&a);
    check_metadata(&a.source->file, &a.model->file, NAMES("tokenizer.ggml.tokens"), NAMES(""));
    same_text_for_tokens(&a);
    const gguf_value *kinds = gguf_find(&a.model->file, "tokenizer.ggml.token_type");
    assert_non_null(kinds);
    assert_int_equal(kinds->count, TINY_PIECES + 1);
    for (size_t i = 0; i < kinds->count; i++) {
        int64_t kind;
        assert_true(gguf_value_integer(kinds, i, &kind));
        assert_int_equal(kind, i < TINY_PIECES ? TINY_NORMAL : TINY_CONTROL);
    }
    assert_null(gguf_find(&a.model->file, "tokenizer.ggml.scores"));
    assert_true(furthest_logit(&a, 20, 5) <= 1e-3);
    adapted_wipe(&a);
}

static void a_model_without_tokenizer_gets_a_row_more(void **state)
{
    const fixture *fx = *state;
    const tiny_model m = pieces_model("llama", CAIRN_GGUF_F32, false);
    adapted a;
    tiny_model_write(&m, fx->source);
    adapt(fx, fx->source, 20, CAIRN_GGUF_F32, &a);
    assert_int_equal(a.model->info.vocab, TINY_PIECES + 1);
    check_written(&a);
    check_params(&a);
    assert_null(gguf_find(&a.model->file, "tokenizer.ggml.tokens"));
    assert_null(gguf_find(&a.model->file, "tokenizer.ggml.token_type"));
    assert_true(furthest_logit(&a, 20, 6) <= 5e-5); /* two orders of summing; OpenBLAS for AVX-512 passes 1e-5 */
    adapted_wipe(&a);
}

static void a_name_that_is_taken_gets_a_number(void **state)
{
    const fixture *fx = *state;
    const tiny_model m = pieces_model("llama", CAIRN_GGUF_F32, false);
    adapted a;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    tiny_put_spm(w, "<landmark>");
    assert_ok(cairn_gguf_writer_save(w, fx->source));
    cairn_gguf_writer_free(w);
    adapt(fx, fx->source, 20, CAIRN_GGUF_F32, &a);
    assert_true(gguf_text_is(last_token(&a.model->file), "<landmark1>"));
    assert_int_equal(a.model->info.landmark, TINY_PIECES);
    same_tokens_for_text(&a);
    adapted_wipe(&a);
}

/* The writer aligns by 32, which is also a multiple of 16: a source that says 16 can be made with it, if its data
 * happens to begin at a multiple of 32. */
static void another_alignment_is_not_said_of_a_file_that_has_the_usual_one(void **state)
{
    const fixture *fx = *state;
    const tiny_model m = pieces_model("llama", CAIRN_GGUF_F32, false);
    bool made = false;
    for (size_t pad = 0; pad < 32 && !made; pad++) {
        adapted a;
        char text[33];
        memset(text, 'x', sizeof text);
        text[pad] = 0;
        cairn_gguf_writer *w = tiny_model_begin(&m);
        assert_ok(cairn_gguf_put_u32(w, "general.alignment", 16));
        assert_ok(cairn_gguf_put_string(w, "pad", text));
        assert_ok(cairn_gguf_writer_save(w, fx->source));
        cairn_gguf_writer_free(w);
        cairn_model *model;
        assert_ok(cairn_model_open(fx->source, &model));
        size_t at = (size_t)(gguf_find_tensor(&model->file, "token_embd.weight")->data - model->file.data);
        cairn_model_close(model);
        if (at % 32 != 0) continue;
        made = true;
        adapt(fx, fx->source, 20, CAIRN_GGUF_F32, &a);
        assert_null(gguf_find(&a.model->file, "general.alignment"));
        check_params(&a);
        assert_true(furthest_logit(&a, 20, 7) <= 1e-5);
        adapted_wipe(&a);
    }
    assert_true(made);
}

/* ---- llama.cpp's word ---- */

/* Largest difference of a probability from llama.cpp's, over 256 prefixes in one block. What it says of the most
 * probable eight is compared among those that are not the landmark (`among`), or as it stands, the landmark being a
 * token llama.cpp's file did not have. */
static double off_llama_cpp(const adapted *a, const char *name, bool among)
{
    json_error_t error;
    json_t *tokens, *positions;
    cairn_token ids[256];
    char file[80];
    const size_t V = a->model->info.vocab, landmark = (size_t)a->model->info.landmark;
    double worst = 0;
    snprintf(file, sizeof file, "parity/%s.llamacpp.json", name);
    char *path = test_path(CAIRN_TEST_DATA, file);
    json_t *root = json_load_file(path, 0, &error);
    if (root == NULL) fail_msg("%s:%d: %s", path, error.line, error.text);
    tokens = json_object_get(root, "tokens");
    positions = json_object_get(root, "positions");
    assert_int_equal(json_array_size(tokens), 256);
    assert_int_equal(json_array_size(positions), 256);
    for (size_t i = 0; i < 256; i++) ids[i] = (cairn_token)json_integer_value(json_array_get(tokens, i));
    float *logits = logits_of(a->model, CAIRN_F16, ids, 256);
    for (size_t i = 0; i < 256; i++) {
        json_t *top = json_object_get(json_array_get(positions, i), "top");
        json_t *prob = json_object_get(json_array_get(positions, i), "prob");
        double ours = 0, theirs = 0;
        assert_int_equal(json_array_size(top), 8);
        for (size_t t = 0; t < V && !among; t++)
            if (t != landmark) ours += exp((double)logits[i * V + t]);
        for (size_t k = 0; k < 8 && among; k++) {
            size_t t = (size_t)json_integer_value(json_array_get(top, k));
            if (t == landmark) continue;
            ours += exp((double)logits[i * V + t]);
            theirs += json_real_value(json_array_get(prob, k));
        }
        for (size_t k = 0; k < 8; k++) {
            size_t t = (size_t)json_integer_value(json_array_get(top, k));
            if (among && t == landmark) continue;
            double p = exp((double)logits[i * V + t]) / ours;
            worst = fmax(worst, fabs(p - json_real_value(json_array_get(prob, k)) / (among ? theirs : 1)));
        }
    }
    free(logits);
    free(path);
    json_decref(root);
    return worst;
}

static const struct {
    const char *name;
    cairn_gguf_type type;
    double off; /* as test_parity's: llama.cpp rounds to 8 bits where we do not */
} parity[] = {
    {"gqa-f16", CAIRN_GGUF_F16, 0.01}, {"qwen3-f16", CAIRN_GGUF_F16, 0.01}, {"mha-q8_0", CAIRN_GGUF_Q8_0, 0.08}};

static void a_byte_model_with_an_unused_landmark_keeps_its_vocabulary_and_what_llama_cpp_says(void **state)
{
    const fixture *fx = *state;
    for (size_t i = 0; i < 3; i++) {
        char file[64];
        adapted a;
        snprintf(file, sizeof file, "parity/%s.gguf", parity[i].name);
        char *path = test_path(CAIRN_TEST_DATA, file);
        adapt(fx, path, 300, parity[i].type, &a);
        assert_int_equal(a.model->info.vocab, 260);
        check_written(&a);
        check_params(&a);
        check_metadata(&a.source->file, &a.model->file, NAMES(""), NAMES(""));
        assert_true(a.model->info.byte_tokens);
        same_tokens_for_text(&a);
        same_text_for_tokens(&a);
        double logits = furthest_logit(&a, 64, i), off = off_llama_cpp(&a, parity[i].name, true);
        print_message("  %s: logits %.2g apart, %.5f off llama.cpp\n", parity[i].name, logits, off);
        assert_true(logits <= 1e-3);
        assert_true(off <= parity[i].off);
        adapted_wipe(&a);
        free(path);
    }
}

/* The same files with their unused token called otherwise: it is a token like any, so there are 261. */
static void a_model_with_a_token_added_predicts_as_llama_cpp_did_without(void **state)
{
    const fixture *fx = *state;
    for (size_t i = 0; i < 3; i++) {
        char file[64];
        size_t bytes, found = 0;
        adapted a;
        snprintf(file, sizeof file, "parity/%s.gguf", parity[i].name);
        char *path = test_path(CAIRN_TEST_DATA, file), *data = test_read_file(path, &bytes);
        for (size_t at = 0; at + 10 <= bytes; at++)
            if (memcmp(data + at, "<landmark>", 10) == 0) data[at + 1] = 'L', found++;
        assert_int_equal(found, 1);
        test_write_file(fx->source, data, bytes);
        free(data);
        adapt(fx, fx->source, 300, parity[i].type, &a);
        assert_int_equal(a.model->info.vocab, 261);
        check_written(&a);
        check_params(&a);
        double logits = furthest_logit(&a, 64, i), off = off_llama_cpp(&a, parity[i].name, false);
        print_message("  %s: logits %.2g apart, %.5f off llama.cpp\n", parity[i].name, logits, off);
        assert_true(logits <= 1e-3);
        assert_true(off <= parity[i].off);
        adapted_wipe(&a);
        free(path);
    }
}

/* ---- what is trained is what was written ---- */

enum { BLOCK = 15 };

static void check_forward(const adapted *a)
{
    enum { ROWS = 90 };
    cairn_train_model_f32 *trained;
    cairn_session_options opt;
    cairn_session *session;
    cairn_runtime *rt;
    cairn_token slots[ROWS];
    test_random r = {8};
    const size_t V = a->model->info.vocab;
    float *logits = calloc(ROWS * V, sizeof *logits);
    assert_non_null(logits);
    for (size_t i = 0; i < ROWS; i++)
        slots[i] = i % (BLOCK + 1) == BLOCK ? a->model->info.landmark : (cairn_token)test_random_below(&r, 259);
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(a->model));
    opt.policy.top_k = CAIRN_TOP_K_ALL;
    opt.dtype = CAIRN_F32;
    assert_ok(cairn_session_begin(NULL, cairn_model_shape(a->model), NULL, 0, &opt, &session));
    assert_ok(cairn_runtime_begin(a->model, session, 2, &rt));
    assert_ok(cairn_runtime_feed_slots(rt, slots, ROWS, logits));
    cairn_runtime_end(rt);
    cairn_session_end(session);
    assert_ok(cairn_train_model_new_f32(a->layout, ROWS, &trained));
    const float *forward = cairn_train_forward_f32(trained, a->params, slots, ROWS);
    for (size_t i = 0; i < ROWS * V; i++) assert_true(fabs((double)logits[i] - (double)forward[i]) < 1e-3);
    cairn_train_model_free_f32(trained);
    free(logits);
}

static void the_trainers_forward_equals_a_session_over_the_written_model(void **state)
{
    const fixture *fx = *state;
    char *factors = test_path(fx->dir, "factors.gguf");
    add_rope_factors(CAIRN_TEST_DATA "/parity/gqa-f16.gguf", factors);
    const char *const sources[] = {CAIRN_TEST_DATA "/parity/gqa-f16.gguf", factors};
    for (int s = 0; s < 2; s++) {
        adapted a;
        adapt(fx, sources[s], BLOCK, CAIRN_GGUF_F32, &a);
        assert_int_equal(cairn_model_shape(a.model)->rope_factors != NULL, s);
        check_forward(&a);
        adapted_wipe(&a);
    }
    free(factors);
}

/* ---- models with landmarks ---- */

static void patch_u32(const char *from, const char *to, const char *key, uint32_t value)
{
    size_t bytes, found = 0, n = strlen(key);
    char *data = test_read_file(from, &bytes);
    assert_non_null(data);
    for (size_t at = 0; at + n + 8 <= bytes; at++)
        if (memcmp(data + at, key, n) == 0) cairn_put_le32(data + at + n + 4, value), found++;
    assert_int_equal(found, 1);
    test_write_file(to, data, bytes);
    free(data);
}

static void a_landmark_model_is_imported_as_it_is_and_keeps_its_landmark(void **state)
{
    const fixture *fx = *state;
    cairn_model *source, *model;
    cairn_train_layout *layout;
    patch_u32(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", fx->source, "cairn.landmark.token_id", 7);
    assert_ok(cairn_model_open(fx->source, &source));
    assert_ok(cairn_train_adapt_layout(source, NULL, &layout));
    assert_int_equal(layout->shape.vocab, 260);
    assert_int_equal(layout->shape.attention.block_tokens, 15);
    assert_int_equal(cairn_train_adapt_landmark(layout, source), 7);
    float *adapted_params = calloc(layout->total, sizeof(float)), *imported = calloc(layout->total, sizeof(float));
    assert_true(adapted_params != NULL && imported != NULL);
    assert_ok(cairn_train_adapt(layout, source, adapted_params));
    assert_ok(cairn_train_import(layout, source, imported));
    assert_memory_equal(adapted_params, imported, layout->total * sizeof(float));
    adapted_params[layout->layers[1].landmark_bias] = 2.5F; /* as if it had learnt */
    assert_ok(cairn_train_export_like(layout, adapted_params, source, 1024, CAIRN_GGUF_F32, fx->written));
    assert_ok(cairn_model_open(fx->written, &model));
    check_metadata(&source->file, &model->file, NAMES(""), NAMES(""));
    assert_int_equal(model->info.landmark, 7);
    assert_int_equal(model->info.train_window, 1024);
    assert_int_equal(model->shape.window_blocks, 2);
    assert_true(model->shape.landmark_bias[2] == 2.5F);
    assert_true(model->shape.landmark_bias[3] == source->shape.landmark_bias[3]);
    cairn_model_close(model);

    /* others than its own cannot be asked for */
    static const uint32_t none = 0;
    cairn_train_landmarks own = {15, 3, 2, 1, 4, &none, 1}, asked = own;
    cairn_train_layout *other;
    assert_ok(cairn_train_adapt_layout(source, &own, &other));
    cairn_train_layout_free(other);
#define refused(change, words)                                                                                         \
    asked = own;                                                                                                       \
    asked.change;                                                                                                      \
    assert_int_equal(cairn_train_adapt_layout(source, &asked, &other), CAIRN_MISMATCH);                                \
    assert_null(other);                                                                                                \
    assert_non_null(strstr(cairn_last_error(), words))
    refused(block_tokens = 31, "block_tokens is 15, not 31");
    refused(clamp_blocks = 4, "clamp_blocks is 3, not 4");
    refused(window_blocks = 0, "window_blocks is 2, not 0");
    refused(top_k = 8, "top_k is 4, not 8");
    refused(n_local = 0, "its layer 0 is local");
#undef refused
    free(adapted_params), free(imported);
    cairn_train_layout_free(layout);
    cairn_model_close(source);
}

/* ---- what cannot be ---- */

static void what_cannot_be_adapted_is_refused_by_name(void **state)
{
    const fixture *fx = *state;
    static const uint32_t far = 3;
    cairn_model *model, *stingy;
    cairn_train_layout *layout, *other;
    cairn_train_landmarks l = blocks_of(0);
    const tiny_model m = pieces_model("llama", CAIRN_GGUF_F32, false);
    tiny_model_write(&m, fx->source);
    assert_ok(cairn_model_open(fx->source, &model));
    assert_int_equal(cairn_train_adapt_layout(model, &l, &layout), CAIRN_INVALID);
    assert_null(layout);
    assert_non_null(strstr(cairn_last_error(), "block_tokens is 0"));
    l = blocks_of(10);
    l.local_layers = &far;
    assert_int_equal(cairn_train_adapt_layout(model, &l, &layout), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "local layer 3 of a model of 3 layers"));
    l.n_local = 0;
    assert_ok(cairn_train_adapt_layout(model, &l, &layout));
    for (uint32_t i = 0; i < 3; i++) assert_int_equal(layout->local_layers[i], 0);

    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/fuzz/gguf/stingy-bpe.gguf", &stingy));
    assert_int_equal(cairn_train_adapt_layout(stingy, NULL, &other), CAIRN_UNSUPPORTED);
    assert_null(other);
    assert_non_null(strstr(cairn_last_error(), "clamped"));
    cairn_model_close(stingy);

    /* another model's layout */
    cairn_model *bytes;
    float *params = calloc(layout->total, sizeof *params);
    assert_non_null(params);
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/parity/gqa-f16.gguf", &bytes));
    assert_int_equal(cairn_train_adapt(layout, bytes, params), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "has 260 tokens with the landmark, the one to train 273"));
    assert_int_equal(cairn_train_export_like(layout, params, bytes, 1, CAIRN_GGUF_F32, fx->written), CAIRN_MISMATCH);
    cairn_model_close(bytes);
    layout->shape.attention.rope_theta = 500000;
    assert_int_equal(cairn_train_export_like(layout, params, model, 1, CAIRN_GGUF_F32, fx->written), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "theta 10000"));
    layout->shape.attention.rope_theta = 10000;
    layout->shape.qk_norm = true;
    assert_int_equal(cairn_train_export_like(layout, params, model, 1, CAIRN_GGUF_F32, fx->written), CAIRN_MISMATCH);
    assert_non_null(strstr(cairn_last_error(), "norms of q and k"));
    layout->shape.qk_norm = false;
    assert_int_equal(cairn_train_export_like(layout, params, model, 1, CAIRN_GGUF_F32, "/nowhere/x"), CAIRN_NOT_FOUND);
    free(params);
    cairn_train_layout_free(layout);
    cairn_model_close(model);

    /* rows that are no whole blocks of Q8_0 */
    tiny_model narrow = m;
    narrow.hidden = 40;
    tiny_model_write(&narrow, fx->source);
    assert_ok(cairn_model_open(fx->source, &model));
    assert_ok(cairn_train_adapt_layout(model, NULL, &layout));
    params = calloc(layout->total, sizeof *params);
    assert_non_null(params);
    assert_int_equal(cairn_train_export_like(layout, params, model, 1, CAIRN_GGUF_Q8_0, fx->written), CAIRN_INVALID);
    assert_non_null(strstr(cairn_last_error(), "'blk.0.ffn_down.weight': rows of 40 elements"));
    assert_int_equal(access(fx->written, F_OK), -1);
    free(params);
    cairn_train_layout_free(layout);
    cairn_model_close(model);
}

static void failing_allocations_leave_nothing(void **state)
{
    const fixture *fx = *state;
    const tiny_model m = pieces_model("qwen3", CAIRN_GGUF_F16, true);
    cairn_model *model;
    cairn_train_layout *layout = NULL;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    tiny_put_bpe(w, "qwen2");
    assert_ok(cairn_gguf_writer_save(w, fx->source));
    cairn_gguf_writer_free(w);
    assert_ok(cairn_model_open(fx->source, &model));
    cairn_status st = CAIRN_NO_MEMORY;
    uint64_t n;
    for (n = 1; st != CAIRN_OK; n++) {
        cairn_alloc_fail_at(n);
        st = cairn_train_adapt_layout(model, NULL, &layout);
        cairn_alloc_fail_at(0);
        if (st != CAIRN_OK) assert_int_equal(st, CAIRN_NO_MEMORY);
        if (st != CAIRN_OK) assert_null(layout);
    }
    assert_true(n > 4);
    float *params = calloc(layout->total, sizeof *params);
    assert_non_null(params);
    cairn_alloc_fail_at(1);
    assert_ok(cairn_train_adapt(layout, model, params)); /* needs none */
    cairn_alloc_fail_at(0);
    st = CAIRN_NO_MEMORY;
    for (n = 1; st != CAIRN_OK; n++) {
        cairn_model *whole = NULL;
        cairn_alloc_fail_at(n);
        st = cairn_train_export_like(layout, params, model, 64, CAIRN_GGUF_F16, fx->written);
        cairn_alloc_fail_at(0);
        if (st == CAIRN_OK) break;
        assert_int_equal(st, CAIRN_NO_MEMORY);
        /* no file, or, where only the directory could not be synced, a whole one */
        cairn_status opened = cairn_model_open(fx->written, &whole);
        assert_true(opened == CAIRN_OK || opened == CAIRN_NOT_FOUND);
        cairn_model_close(whole);
        unlink(fx->written);
    }
    assert_true(n > 50); /* each key and each tensor has its own */
    free(params);
    cairn_train_layout_free(layout);
    cairn_model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_sentencepiece_model_gets_a_token_more_and_stays_what_it_was, setup, teardown),
        cmocka_unit_test_setup_teardown(a_byte_pair_model_is_given_kinds_so_that_the_landmark_is_no_text, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_model_without_tokenizer_gets_a_row_more, setup, teardown),
        cmocka_unit_test_setup_teardown(a_name_that_is_taken_gets_a_number, setup, teardown),
        cmocka_unit_test_setup_teardown(another_alignment_is_not_said_of_a_file_that_has_the_usual_one, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(
            a_byte_model_with_an_unused_landmark_keeps_its_vocabulary_and_what_llama_cpp_says, setup, teardown),
        cmocka_unit_test_setup_teardown(a_model_with_a_token_added_predicts_as_llama_cpp_did_without, setup, teardown),
        cmocka_unit_test_setup_teardown(the_trainers_forward_equals_a_session_over_the_written_model, setup, teardown),
        cmocka_unit_test_setup_teardown(a_landmark_model_is_imported_as_it_is_and_keeps_its_landmark, setup, teardown),
        cmocka_unit_test_setup_teardown(what_cannot_be_adapted_is_refused_by_name, setup, teardown),
        cmocka_unit_test_setup_teardown(failing_allocations_leave_nothing, setup, teardown),
    };
    return cmocka_run_group_tests_name("train_adapt", tests, NULL, NULL);
}
