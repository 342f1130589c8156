/* logits.c - next-token probabilities after each prefix of a list of tokens, to compare with another engine.
 *
 * Ordinary causal attention at true positions, no landmarks, whatever the model: what llama.cpp computes for the same
 * file. Input and output have one form: {"tokens": [...], "positions": [{"top": [ids], "prob": [...]}, ...]}.
 */
#include "work.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *model, *tokens;
    uint32_t top, threads;
} flags = {.top = 8};

static const cli_option options[] = {
    OPT_NEEDED(CLI_TEXT, "model", 'm', &flags.model, "FILE", "a GGUF file, landmark model or not"),
    OPT_NEEDED(CLI_TEXT, "tokens", 't', &flags.tokens, "FILE",
               "JSON: a list of ids, or an object with \"tokens\"; - is stdin"),
    OPT_NUMBER(CLI_U32, "top", 0, &flags.top, "N", "how many probabilities per position (8)", 1, 100000),
    OPT_NUMBER(CLI_U32, "threads", 0, &flags.threads, "N", "worker threads; 0 = one per core (0)", 0, 256),
};

static int read_tokens(cli *c, const cairn_model_info *info, cairn_token **out, size_t *out_n)
{
    json_error_t error;
    json_t *root =
        strcmp(flags.tokens, "-") == 0 ? json_loadf(stdin, 0, &error) : json_load_file(flags.tokens, 0, &error);
    if (root == NULL)
        return cli_fail(c, EXIT_FAILED, "'%s' is not JSON: %s (line %d)", flags.tokens, error.text, error.line);
    const json_t *list = json_is_object(root) ? json_object_get(root, "tokens") : root;
    int code = -1;
    size_t n = json_array_size(list); /* 0 for what is no array */
    cairn_token *tokens = malloc((n + 1) * sizeof *tokens);
    if (n == 0)
        code = cli_fail(c, EXIT_FAILED, "'%s' holds neither a list of token ids nor an object with \"tokens\"",
                        flags.tokens);
    else if (tokens == NULL)
        code = cli_fail(c, EXIT_FAILED, "out of memory: %zu tokens", n);
    for (size_t i = 0; tokens != NULL && i < n && code < 0; i++) {
        const json_t *item = json_array_get(list, i);
        json_int_t id = json_integer_value(item);
        if (!json_is_integer(item) || id < 0 || id >= (json_int_t)info->vocab)
            code = cli_fail(c, EXIT_FAILED, "'%s': token %zu is not an id below %u", flags.tokens, i, info->vocab);
        else
            tokens[i] = (cairn_token)id;
    }
    json_decref(root);
    if (code >= 0) {
        free(tokens);
        return code;
    }
    *out = tokens;
    *out_n = n;
    return -1;
}

/* top (n): the ids of the n largest logits, best first, the lower id first among equals. Insertion into a short sorted
 * list: n is 8, the vocabulary is walked once. */
static void best(const float *logits, uint32_t vocab, uint32_t *top, uint32_t n)
{
    uint32_t have = 0;
    for (uint32_t id = 0; id < vocab; id++) {
        if (have == n && !(logits[id] > logits[top[n - 1]])) continue;
        uint32_t at = have < n ? have++ : n - 1;
        for (; at > 0 && logits[id] > logits[top[at - 1]]; at--) top[at] = top[at - 1];
        top[at] = id;
    }
}

static json_t *position_json(const float *logits, uint32_t vocab, uint32_t *top, uint32_t n)
{
    best(logits, vocab, top, n);
    double sum = 0, most = logits[top[0]];
    for (uint32_t id = 0; id < vocab; id++) sum += exp(logits[id] - most);
    json_t *ids = json_array(), *probabilities = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(ids, json_integer(top[i]));
        json_array_append_new(probabilities, json_real(exp(logits[top[i]] - most) / sum));
    }
    return json_pack("{s:o, s:o}", "top", ids, "prob", probabilities);
}

static void position_print(size_t i, cairn_token token, const json_t *position)
{
    const json_t *ids = json_object_get(position, "top"), *probabilities = json_object_get(position, "prob");
    printf("%6zu  after %-6d ", i, token);
    for (size_t j = 0; j < json_array_size(ids); j++)
        printf("  %lld %.4f", (long long)json_integer_value(json_array_get(ids, j)),
               json_real_value(json_array_get(probabilities, j)));
    putchar('\n');
}

static int compute(cli *c, const model_ref *model, const cairn_token *tokens, size_t n, json_t *positions)
{
    enum { PIECE = 64 }; /* logits of a piece are (PIECE, vocab) */
    const uint32_t vocab = model->info.vocab, top_n = flags.top < vocab ? flags.top : vocab;
    if (model->info.xl_segment > 0 && n > 2 * (size_t)model->info.xl_segment)
        return cli_fail(c, EXIT_FAILED,
                        "'%s' was trained as Transformer-XL: beyond two segments of %u slots a row no longer sees all "
                        "before it, as it would here; %zu tokens are too many ('cairn bench ppl' follows segments)",
                        flags.model, model->info.xl_segment, n);
    cairn_attention_shape shape = *model->shape;
    shape.scheme = CAIRN_POSITION_DENSE;
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, &shape);
    opt.threads = flags.threads;
    cairn_session *session = NULL;
    cairn_runtime *runtime = NULL;
    float *logits = calloc(PIECE, vocab * sizeof *logits);
    uint32_t *top = calloc(top_n, sizeof *top);
    cairn_status st = CAIRN_OK;
    int code = logits != NULL && top != NULL ? -1 : cli_fail(c, EXIT_FAILED, "out of memory: %u logits", vocab);
    if (code >= 0) goto out;
    if ((st = cairn_session_begin(NULL, &shape, NULL, 0, &opt, &session)) != CAIRN_OK) goto out;
    if ((st = cairn_runtime_begin(model->model, session, 0, &runtime)) != CAIRN_OK) goto out;
    for (size_t done = 0; done < n;) {
        size_t rows = n - done < PIECE ? n - done : PIECE;
        if ((st = cairn_runtime_feed_all(runtime, tokens + done, rows, logits)) != CAIRN_OK) goto out;
        for (size_t i = 0; i < rows; i++) {
            json_t *position = position_json(logits + i * vocab, vocab, top, top_n);
            if (!c->json) position_print(done + i, tokens[done + i], position);
            if (c->json)
                json_array_append_new(positions, position);
            else
                json_decref(position);
        }
        done += rows;
    }
out:
    cairn_runtime_end(runtime);
    cairn_session_end(session);
    free(logits);
    free(top);
    return code >= 0 ? code : st == CAIRN_OK ? -1 : cli_fail_status(c, st);
}

static int run(cli *c, int argc, char **argv)
{
    (void)argc, (void)argv;
    model_ref model = {0};
    cairn_token *tokens = NULL;
    size_t n = 0;
    json_t *positions = json_array();
    int code = model_open(c, flags.model, false, &model);
    if (code < 0) code = read_tokens(c, &model.info, &tokens, &n);
    if (code < 0) code = compute(c, &model, tokens, n, positions);
    if (code < 0 && c->json) {
        json_t *ids = json_array();
        for (size_t i = 0; i < n; i++) json_array_append_new(ids, json_integer(tokens[i]));
        code = cli_answer(c, json_pack("{s:s, s:o, s:O}", "about",
                                       "next-token probabilities by cairn (full attention, no landmarks) after each "
                                       "prefix of tokens[]",
                                       "tokens", ids, "positions", positions));
    }
    json_decref(positions);
    free(tokens);
    model_close(&model);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_logits = {
    .name = "logits",
    .summary = "next-token probabilities, to compare with another engine",
    .usage = "-m MODEL.gguf --tokens FILE.json [--top N] [--json]",
    .about =
        "Feeds a list of token ids to the model as an ordinary Llama (full causal attention, no landmarks, no store)\n"
        "and shows the likeliest next tokens after each prefix.",
    .example = "  echo '[1, 75, 104, 111, 111, 114]' | cairn logits -m models/cairn-tiny-f16.gguf --tokens - --top 4",
    CLI_OPTIONS(options),
    .args = (const char *const[]){""},
    .min_args = 0,
    .max_args = 0,
    .run = run,
};
