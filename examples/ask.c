/* ask.c - a program of your own over libcairn: answers a question from a context that `cairn ingest` made.
 *   ask MODEL.gguf STORE CONTEXT QUESTION */
#include <cairn/cairn.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(call) ((call) == CAIRN_OK ? (void)0 : (fprintf(stderr, "ask: %s\n", cairn_last_error()), exit(1)))

static void ask(cairn_store *store, const cairn_model *model, const char *context, const char *question, float *logits)
{
    cairn_session_options use;
    cairn_session_options_init(&use, sizeof use, cairn_model_shape(model));
    use.ram_bytes = 64 << 20; /* landmark rows, own blocks and tiles together */

    cairn_session *session; /* what may be seen */
    cairn_runtime *run;     /* the model on top of it */
    TRY(cairn_session_begin(store, cairn_model_shape(model), &context, 1, &use, &session));
    TRY(cairn_runtime_begin(model, session, 0, &run));

    cairn_token tokens[4096], token;
    size_t n;
    TRY(cairn_model_encode(model, question, strlen(question), tokens, 4096, &n));
    TRY(cairn_runtime_feed(run, tokens, n < 4096 ? n : 4096, logits));

    char text[64] = "";
    cairn_sampler greedy = {.temperature = 0, .top_p = 1};
    for (int i = 0; i < 64 && strchr(text, '\n') == NULL; i++) {
        TRY(cairn_model_sample(model, logits, &greedy, &token));
        text[cairn_model_decode(model, token, text, sizeof text - 1)] = 0;
        fputs(text, stdout);
        TRY(cairn_runtime_feed(run, &token, 1, logits));
    }
    cairn_runtime_end(run);
    cairn_session_end(session);
}

int main(int argc, char **argv)
{
    if (argc != 5) return fprintf(stderr, "usage: ask MODEL.gguf STORE CONTEXT QUESTION\n"), 2;
    cairn_model *model;
    cairn_store *store;
    TRY(cairn_model_open(argv[1], &model));
    TRY(cairn_store_open(argv[2], NULL, &store));

    cairn_model_info info;
    cairn_model_info_get(model, &info);
    float *logits = malloc(info.vocab * sizeof *logits);
    if (logits != NULL) ask(store, model, argv[3], argv[4], logits);

    free(logits);
    cairn_store_close(store);
    cairn_model_close(model);
    return 0;
}
