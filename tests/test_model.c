/* test_model.c - what a model file means: geometry, attention, identity, and which files are refused and why. */
#include "model_fixture.h"
#include "tiny_model.h"

#include "gguf_internal.h"

#include <fcntl.h>
#include <unistd.h>

static cairn_model *written(const fixture *fx, const tiny_model *m)
{
    cairn_model *model;
    tiny_model_write(m, fx->path);
    assert_ok(cairn_model_open(fx->path, &model));
    return model;
}

/* ---- meaning ---- */

/* The numbers were read out of the file by another program. */
static void the_clamped_golden_model_has_the_attention_its_keys_say(void **state)
{
    (void)state;
    cairn_model *model;
    cairn_model_info info;
    cairn_geometry g;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/golden/clamped_forward.gguf", &model));
    cairn_model_info_get(model, &info);
    assert_string_equal(info.name, "clamped_forward");
    assert_string_equal(info.architecture, "qwen3");
    assert_int_equal(info.vocab, 260);
    assert_int_equal(info.width, 32);
    assert_int_equal(info.layers, 3);
    assert_int_equal(info.hidden, 48);
    assert_int_equal(info.landmark, 259);
    assert_int_equal(info.bos, 1);
    assert_int_equal(info.eos, 2);
    assert_int_equal(info.unk, 0);
    assert_true(info.byte_tokens && info.add_bos);
    assert_int_equal(info.train_window, 512);
    assert_int_equal(info.file_bytes, 181536);
    /* embedding, output and their norm; per layer 4 projections, 3 feed-forward matrices, norms 2 x 32 and 2 x 16 */
    assert_int_equal(info.parameters, 2 * 260 * 32 + 32 + 3 * (4 * 32 * 32 + 3 * 32 * 48 + 64 + 32));
    const cairn_attention_shape *s = cairn_model_shape(model);
    assert_int_equal(s->scheme, CAIRN_POSITION_CLAMPED);
    assert_int_equal(s->layers, 3);
    assert_int_equal(s->heads, 2);
    assert_int_equal(s->kv_heads, 2);
    assert_int_equal(s->head_dim, 16);
    assert_int_equal(s->block_tokens, 15);
    assert_int_equal(s->clamp_blocks, 3);
    assert_int_equal(s->window_blocks, 2);
    assert_int_equal(s->local_window_blocks, 1);
    assert_int_equal(s->top_k, 4);
    assert_false(s->rope_interleaved);
    assert_true(s->rope_theta == 10000);
    static const uint8_t local[] = {1, 0, 0};
    assert_memory_equal(s->local_layers, local, 3);
    assert_true(s->landmark_bias[0] == 2.694632053375244f && s->landmark_bias[5] == 2.4377050399780273f);
    cairn_model_geometry(model, CAIRN_Q8, &g);
    assert_int_equal(g.layers, 3);
    assert_int_equal(g.first_layer, 1); /* layer 0 is local */
    assert_int_equal(g.kv_heads, 2);
    assert_int_equal(g.head_dim, 16);
    assert_int_equal(g.block_tokens, 15);
    assert_int_equal(g.dtype, CAIRN_Q8);
    cairn_model_close(model);
}

static void a_model_without_landmarks_is_dense_and_llama_turns_interleaved_pairs(void **state)
{
    (void)state;
    cairn_model *model;
    cairn_model_info info;
    cairn_geometry g;
    assert_ok(cairn_model_open(CAIRN_TEST_DATA "/parity/gqa-f16.gguf", &model));
    cairn_model_info_get(model, &info);
    assert_int_equal(info.landmark, -1);
    assert_int_equal(info.heads, 8);
    assert_int_equal(info.kv_heads, 2);
    const cairn_attention_shape *s = cairn_model_shape(model);
    assert_int_equal(s->scheme, CAIRN_POSITION_DENSE);
    assert_true(s->rope_interleaved);
    assert_null(s->local_layers);
    assert_null(s->landmark_bias);
    cairn_model_geometry(model, CAIRN_F16, &g);
    assert_int_equal(g.first_layer, 0);
    cairn_model_close(model);
}

static void a_model_that_retrieves_in_layer_0_stores_it(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    cairn_geometry g;
    m.local_first = false;
    cairn_model *model = written(fx, &m);
    cairn_model_geometry(model, CAIRN_F16, &g);
    assert_int_equal(g.first_layer, 0);
    cairn_model_close(model);
}

static void a_stingy_model_is_read_as_one(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    m.position = "stingy";
    cairn_model *model = written(fx, &m);
    assert_int_equal(cairn_model_shape(model)->scheme, CAIRN_POSITION_STINGY);
    cairn_model_close(model);
}

/* ---- identity ---- */

static uint64_t fingerprint(const char *path)
{
    cairn_model *model;
    cairn_model_id id;
    assert_ok(cairn_model_open(path, &model));
    assert_ok(cairn_model_identity(model, &id));
    cairn_model_close(model);
    assert_int_not_equal(id.fingerprint, 0);
    return id.fingerprint;
}

static uint64_t fingerprint_of(const fixture *fx, const tiny_model *m)
{
    tiny_model_write(m, fx->path);
    return fingerprint(fx->path);
}

/* Finds the key in the file's bytes and puts a new u32 behind its type. */
static void patch_u32(const char *path, const char *key, uint32_t value)
{
    size_t n;
    uint8_t *bytes = test_read_file(path, &n);
    assert_non_null(bytes);
    uint8_t *at = memmem(bytes, n, key, strlen(key));
    assert_non_null(at);
    cairn_put_le32(at + strlen(key) + 4, value);
    test_write_file(path, bytes, n);
    free(bytes);
}

static void patch_text(const char *path, const char *from, const char *to)
{
    size_t n;
    uint8_t *bytes = test_read_file(path, &n);
    assert_non_null(bytes);
    assert_int_equal(strlen(from), strlen(to));
    uint8_t *at = memmem(bytes, n, from, strlen(from));
    assert_non_null(at);
    memcpy(at, to, strlen(to));
    test_write_file(path, bytes, n);
    free(bytes);
}

static void the_fingerprint_follows_weights_shape_and_tokenizer_but_not_names(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    uint64_t first = fingerprint_of(fx, &m);
    assert_int_equal(fingerprint_of(fx, &m), first);
    patch_text(fx->path, "tiny", "TINY"); /* general.name */
    assert_int_equal(fingerprint(fx->path), first);
    char *moved = test_path(fx->dir, "elsewhere.gguf");
    assert_int_equal(rename(fx->path, moved), 0);
    assert_int_equal(fingerprint(moved), first);
    free(moved);

    tiny_model_write(&m, fx->path);
    patch_u32(fx->path, "cairn.landmark.clamp_blocks", 4);
    assert_int_not_equal(fingerprint(fx->path), first);
    tiny_model_write(&m, fx->path);
    patch_text(fx->path, "<0x41>", "<0x4z>");
    assert_int_not_equal(fingerprint(fx->path), first);
    m.seed++;
    assert_int_not_equal(fingerprint_of(fx, &m), first);
    m.seed--;
    m.type = CAIRN_GGUF_F16;
    assert_int_not_equal(fingerprint_of(fx, &m), first);

    m = tiny_model_default(); /* one bit of the last weight */
    tiny_model_write(&m, fx->path);
    size_t n;
    uint8_t *bytes = test_read_file(fx->path, &n);
    assert_non_null(bytes);
    bytes[n - 1] ^= 1;
    test_write_file(fx->path, bytes, n);
    free(bytes);
    assert_int_not_equal(fingerprint(fx->path), first);
}

/* A file of zeros above 256 MiB (sparse: it takes no room), whose embedding is sampled. */
static void a_large_files_fingerprint_samples_each_large_tensor_from_end_to_end(void **state)
{
    fixture *fx = *state;
    enum { WIDTH = 1024, VOCAB = 80000 };
    tiny_model m = tiny_model_default();
    size_t n;
    uint64_t all = (uint64_t)WIDTH * VOCAB * 4;
    m.width = WIDTH;
    m.layers = 1;
    m.heads = m.kv_heads = 2;
    m.hidden = 16;
    m.tied = true;
    m.block_tokens = 0;
    tiny_model_write(&m, fx->path);
    gguf f;
    assert_ok(gguf_open(fx->path, &f));
    assert_int_equal(gguf_find_tensor(&f, "token_embd.weight")->dims[1], 259);
    size_t start = (size_t)(gguf_find_tensor(&f, "token_embd.weight")->data - f.data); /* it comes first */
    gguf_close(&f);

    /* The embedding moves behind the other tensors and grows; the vocabulary's arrays get another name. */
    uint8_t *bytes = test_read_file(fx->path, &n);
    assert_non_null(bytes);
    uint8_t *info = memmem(bytes, n, "token_embd.weight", 17);
    assert_non_null(info);
    cairn_put_le64(info + 17 + 4 + 8, VOCAB);
    uint64_t offset = (n - start + 31) / 32 * 32;
    cairn_put_le64(info + 17 + 4 + 16 + 4, offset);
    test_write_file(fx->path, bytes, n);
    free(bytes);
    patch_text(fx->path, "tokenizer.ggml.tokens", "tokenizer.xxxx.tokens");
    assert_int_equal(truncate(fx->path, (off_t)(start + offset + all)), 0);

    uint64_t zeros = fingerprint(fx->path);
    int fd = open(fx->path, O_RDWR);
    assert_true(fd >= 0);
    const off_t first = (off_t)(start + offset);
    const off_t places[] = {first, first + 4095, first + (off_t)all - 1, first + (off_t)all - 4096};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        assert_int_equal(pwrite(fd, "\1", 1, places[i]), 1);
        assert_int_not_equal(fingerprint(fx->path), zeros);
        assert_int_equal(pwrite(fd, "", 1, places[i]), 1);
    }
    assert_int_equal(fingerprint(fx->path), zeros);
    assert_int_equal(pwrite(fd, "\1", 1, first + 4096), 1); /* between windows: what sampling gives up */
    assert_int_equal(fingerprint(fx->path), zeros);
    close(fd);
}

/* ---- files that are refused ---- */

static void add_few_rope_factors(cairn_gguf_writer *w)
{
    const float x[7] = {1, 1, 1, 1, 1, 1, 1};
    assert_ok(cairn_gguf_put_tensor(w, "rope_freqs.weight", CAIRN_GGUF_F32, (uint64_t[]){7}, 1, x));
}
static void add_a_rope_factor_of_0(cairn_gguf_writer *w)
{
    const float x[8] = {1, 1, 1, 0, 1, 1, 1, 1};
    assert_ok(cairn_gguf_put_tensor(w, "rope_freqs.weight", CAIRN_GGUF_F32, (uint64_t[]){8}, 1, x));
}
static void add_bias(cairn_gguf_writer *w)
{
    const float x[64] = {0};
    assert_ok(cairn_gguf_put_tensor(w, "blk.1.attn_q.bias", CAIRN_GGUF_F32, (uint64_t[]){64}, 1, x));
}
static void add_layer(cairn_gguf_writer *w)
{
    const float x[64] = {0};
    assert_ok(cairn_gguf_put_tensor(w, "blk.3.attn_norm.weight", CAIRN_GGUF_F32, (uint64_t[]){64}, 1, x));
}
static void add_scaling(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_string(w, "qwen3.rope.scaling.type", "yarn"));
    assert_ok(cairn_gguf_put_f32(w, "qwen3.rope.scaling.factor", 4));
}
static void add_linear_scaling(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_string(w, "qwen3.rope.scaling.type", "linear"));
    assert_ok(cairn_gguf_put_f32(w, "qwen3.rope.scaling.factor", 2));
}
static void add_experts(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_u32(w, "qwen3.expert_count", 8));
}
static void add_sliding_window(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_u32(w, "qwen3.attention.sliding_window", 4096));
}
static void add_logit_scale(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_f32(w, "qwen3.logit_scale", 0.0625f));
}
static void add_two_way(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_bool(w, "qwen3.attention.causal", false));
}
static void add_unknown_landmark_key(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_u32(w, "cairn.landmark.levels", 2));
}
static void add_vocab_size(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_u32(w, "qwen3.vocab_size", 300));
}
static void add_odd_rope(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_u32(w, "qwen3.rope.dimension_count", 18));
}
static void add_bad_theta(cairn_gguf_writer *w)
{
    assert_ok(cairn_gguf_put_f32(w, "qwen3.rope.freq_base", -1));
}

static void files_with_something_else_in_them_are_refused_by_its_name(void **state)
{
    fixture *fx = *state;
    static const struct {
        void (*add)(cairn_gguf_writer *w);
        cairn_status status;
        const char *message;
    } cases[] = {
        {add_few_rope_factors, CAIRN_INVALID, "tensor 'rope_freqs.weight' is 7"},
        {add_a_rope_factor_of_0, CAIRN_INVALID, "rope_factors[3] is 0"},
        {add_bias, CAIRN_UNSUPPORTED, "tensor 'blk.1.attn_q.bias' is not part of a qwen3 model of 3 layers"},
        {add_layer, CAIRN_UNSUPPORTED, "tensor 'blk.3.attn_norm.weight' is not part"},
        {add_scaling, CAIRN_UNSUPPORTED, "'qwen3.rope.scaling.type' is 'yarn' (factor 4)"},
        {add_linear_scaling, CAIRN_UNSUPPORTED, "'qwen3.rope.scaling.type' is 'linear' (factor 2)"},
        {add_experts, CAIRN_UNSUPPORTED, "'qwen3.expert_count' is 8"},
        {add_sliding_window, CAIRN_UNSUPPORTED, "'qwen3.attention.sliding_window' is 4096"},
        {add_logit_scale, CAIRN_UNSUPPORTED, "'qwen3.logit_scale' is 0.0625"},
        {add_two_way, CAIRN_UNSUPPORTED, "'qwen3.attention.causal' is false"},
        {add_unknown_landmark_key, CAIRN_UNSUPPORTED, "'cairn.landmark.levels' is not known"},
        {add_vocab_size, CAIRN_INVALID, "'qwen3.vocab_size' is 300, token_embd.weight has 260 rows"},
        {add_odd_rope, CAIRN_INVALID, "'qwen3.rope.dimension_count' is 18 for heads of 16"},
        {add_bad_theta, CAIRN_INVALID, "'qwen3.rope.freq_base' is -1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_model m = tiny_model_default();
        cairn_model *model = NULL;
        cairn_gguf_writer *w = tiny_model_begin(&m);
        cases[i].add(w);
        assert_ok(cairn_gguf_writer_save(w, fx->path));
        cairn_gguf_writer_free(w);
        cairn_status st = cairn_model_open(fx->path, &model);
        if (st != cases[i].status || strstr(cairn_last_error(), cases[i].message) == NULL)
            fail_msg("case %zu: %s: %s; expected %s: %s", i, cairn_status_name(st), cairn_last_error(),
                     cairn_status_name(cases[i].status), cases[i].message);
        assert_null(model);
        assert_non_null(strstr(cairn_last_error(), fx->path));
    }
}

static void files_with_a_wrong_number_are_refused_by_its_key(void **state)
{
    fixture *fx = *state;
    static const struct {
        const char *key;
        uint32_t value;
        cairn_status status;
        const char *message;
    } cases[] = {
        {"qwen3.embedding_length", 0, CAIRN_INVALID, "'qwen3.embedding_length' is 0, must be 1.."},
        {"qwen3.embedding_length", 63, CAIRN_INVALID, "'token_embd.weight' is 64 x 260 x 1 x 1, expected 63 x 260"},
        {"qwen3.block_count", UINT32_MAX, CAIRN_INVALID, "'qwen3.block_count' is 4294967295"},
        {"qwen3.block_count", 4096, CAIRN_INVALID, "'blk.4095.attn_norm.weight' is missing"},
        {"qwen3.block_count", 2, CAIRN_UNSUPPORTED, "is not part of a qwen3 model of 2 layers"},
        {"qwen3.attention.head_count_kv", 0, CAIRN_INVALID, "4 query heads over 0"},
        {"qwen3.attention.head_count_kv", 3, CAIRN_INVALID, "4 query heads over 3"},
        {"qwen3.attention.head_count", 5000, CAIRN_INVALID, "'qwen3.attention.head_count' is 5000"},
        {"qwen3.attention.key_length", 15, CAIRN_INVALID, "heads of 15 dimensions"},
        {"qwen3.attention.value_length", 8, CAIRN_UNSUPPORTED, "keys of 16 and values of 8"},
        {"qwen3.attention.layer_norm_rms_epsilon", 0xff800000, CAIRN_INVALID, "layer_norm_rms_epsilon"},
        {"qwen3.feed_forward_length", 95, CAIRN_INVALID,
         "'blk.0.ffn_gate.weight' is 64 x 96 x 1 x 1, expected 64 x 95"},
        {"tokenizer.ggml.bos_token_id", 260, CAIRN_INVALID, "'tokenizer.ggml.bos_token_id' is 260"},
        {"cairn.landmark.token_id", 260, CAIRN_INVALID, "'cairn.landmark.token_id' is 260"},
        {"cairn.landmark.block_tokens", 0, CAIRN_INVALID, "block_tokens is 0"},
        {"cairn.landmark.block_tokens", 5000, CAIRN_INVALID, "block_tokens is 5000"},
        {"cairn.landmark.clamp_blocks", 0, CAIRN_INVALID, "clamp_blocks is 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_model m = tiny_model_default();
        cairn_model *model = NULL;
        tiny_model_write(&m, fx->path);
        patch_u32(fx->path, cases[i].key, cases[i].value);
        cairn_status st = cairn_model_open(fx->path, &model);
        if (st != cases[i].status || strstr(cairn_last_error(), cases[i].message) == NULL)
            fail_msg("case %zu: %s: %s; expected %s: %s", i, cairn_status_name(st), cairn_last_error(),
                     cairn_status_name(cases[i].status), cases[i].message);
        assert_null(model);
    }
}

static void files_with_a_part_under_another_name_are_refused(void **state)
{
    fixture *fx = *state;
    static const struct {
        const char *from, *to;
        cairn_status status;
        const char *message;
    } cases[] = {
        {"general.architecture", "general.architectura", CAIRN_INVALID, "'general.architecture' is missing"},
        {"qwen3.embedding_length", "qwen3.embedding_lengtX", CAIRN_INVALID, "'qwen3.embedding_length' is missing"},
        {"token_embd.weight", "token_embd.weighX", CAIRN_INVALID, "'token_embd.weight' is missing"},
        {"output_norm.weight", "output_norm.weighX", CAIRN_INVALID, "'output_norm.weight' is missing"},
        {"blk.1.attn_k_norm.weight", "blk.1.attn_k_norm.weighX", CAIRN_INVALID,
         "'blk.1.attn_k_norm.weight' is missing"},
        {"cairn.landmark.token_id", "cairn.Xandmark.token_id", CAIRN_INVALID, "without 'cairn.landmark.token_id'"},
        {"cairn.landmark.block_tokens", "cairn.Xandmark.block_tokens", CAIRN_INVALID,
         "'cairn.landmark.block_tokens' is missing"},
        {"cairn.landmark.position", "cairn.Xandmark.position", CAIRN_INVALID, "'cairn.landmark.position' is ''"},
        {"clamped", "clumped", CAIRN_INVALID, "'cairn.landmark.position' is 'clumped'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_model m = tiny_model_default();
        cairn_model *model = NULL;
        tiny_model_write(&m, fx->path);
        patch_text(fx->path, cases[i].from, cases[i].to);
        cairn_status st = cairn_model_open(fx->path, &model);
        if (st != cases[i].status || strstr(cairn_last_error(), cases[i].message) == NULL)
            fail_msg("case %zu: %s: %s; expected %s: %s", i, cairn_status_name(st), cairn_last_error(),
                     cairn_status_name(cases[i].status), cases[i].message);
        assert_null(model);
    }
    tiny_model m = tiny_model_default();
    cairn_model *model = NULL;
    m.architecture = "gemma"; /* the writer does not mind */
    tiny_model_write(&m, fx->path);
    assert_int_equal(cairn_model_open(fx->path, &model), CAIRN_UNSUPPORTED);
    assert_non_null(strstr(cairn_last_error(), "architecture 'gemma'"));
}

static void a_weight_type_we_do_not_compute_with_is_named(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    cairn_model *model = NULL;
    size_t n;
    m.width = m.hidden = 64;
    tiny_model_write(&m, fx->path);
    uint8_t *bytes = test_read_file(fx->path, &n);
    assert_non_null(bytes);
    uint8_t *at = memmem(bytes, n, "blk.2.ffn_up.weight", 19);
    assert_non_null(at);
    cairn_put_le32(at + 19 + 4 + 16, 2); /* Q4_0: smaller, so it still lies inside the file */
    test_write_file(fx->path, bytes, n);
    free(bytes);
    assert_int_equal(cairn_model_open(fx->path, &model), CAIRN_UNSUPPORTED);
    assert_non_null(strstr(cairn_last_error(), "tensor 'blk.2.ffn_up.weight' has type Q4_0 (2)"));
}

static void control_characters_in_a_name_are_shown_as_question_marks(void **state)
{
    fixture *fx = *state;
    tiny_model m = tiny_model_default();
    cairn_model *model;
    cairn_model_info info;
    cairn_gguf_writer *w = tiny_model_begin(&m);
    assert_ok(cairn_gguf_writer_save(w, fx->path));
    cairn_gguf_writer_free(w);
    patch_text(fx->path, "tiny", "t\n\x1by");
    assert_ok(cairn_model_open(fx->path, &model));
    cairn_model_info_get(model, &info);
    assert_string_equal(info.name, "t??y");
    cairn_model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_clamped_golden_model_has_the_attention_its_keys_say),
        cmocka_unit_test(a_model_without_landmarks_is_dense_and_llama_turns_interleaved_pairs),
        cmocka_unit_test_setup_teardown(a_model_that_retrieves_in_layer_0_stores_it, setup, teardown),
        cmocka_unit_test_setup_teardown(a_stingy_model_is_read_as_one, setup, teardown),
        cmocka_unit_test_setup_teardown(the_fingerprint_follows_weights_shape_and_tokenizer_but_not_names, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_large_files_fingerprint_samples_each_large_tensor_from_end_to_end, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(files_with_something_else_in_them_are_refused_by_its_name, setup, teardown),
        cmocka_unit_test_setup_teardown(files_with_a_wrong_number_are_refused_by_its_key, setup, teardown),
        cmocka_unit_test_setup_teardown(files_with_a_part_under_another_name_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(a_weight_type_we_do_not_compute_with_is_named, setup, teardown),
        cmocka_unit_test_setup_teardown(control_characters_in_a_name_are_shown_as_question_marks, setup, teardown),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
