/* bench.c - `cairn bench NAME`: the benches there are, and what they share (bench.h). */
#include "bench.h"
#include "machine.h"
#include "scratch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the store of a run ---- */

static int make_store(bench *b)
{
    int code = scratch_make(b->c, b->flags->dir, &b->dir);
    if (code >= 0) return code;
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.no_sync = true; /* nobody will want it after a power cut */
    opt.model = b->model.id;
    cairn_model_geometry(b->model.model, (cairn_dtype)b->flags->dtype, &opt.geometry);
    cairn_status st = cairn_store_open(b->dir, &opt, &b->store);
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

static int open_store(bench *b)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.read_only = true;
    opt.model = b->model.id;
    cairn_status st = cairn_store_open(b->flags->store, &opt, &b->store);
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

/* ---- a run ---- */

static int open_corpus(bench *b, int argc, char **argv)
{
    const cli_texts *named = &b->flags->corpus;
    size_t n = named->n + (size_t)argc;
    const char **paths = malloc(n * sizeof *paths);
    if (paths == NULL) return cli_fail(b->c, EXIT_FAILED, "out of memory");
    for (size_t i = 0; i < n; i++) paths[i] = i < named->n ? named->items[i] : argv[i - named->n];
    cairn_status st = cairn_corpus_open(paths, n, b->flags->held_out, &b->corpus);
    free(paths);
    if (st != CAIRN_OK) return cli_fail_status(b->c, st);
    b->held_bytes = cairn_corpus_bytes(b->corpus, CAIRN_SPLIT_HELD_OUT);
    return -1;
}

int bench_begin(cli *c, const bench_flags *flags, bool landmarks, int argc, char **argv, bench *out)
{
    *out = (bench){.c = c, .flags = flags, .start_ns = cli_now_ns()};
    out->context = flags->store != NULL ? flags->context : BENCH_CONTEXT;
    int code = policy_check(c, &flags->policy);
    if (code < 0) code = model_open(c, flags->model, landmarks, &out->model);
    if (code < 0 && !out->model.info.byte_tokens)
        code = cli_fail(c, EXIT_FAILED,
                        "'%s' is not a byte model: its %u tokens are not one for each byte, and lengths here are "
                        "counted in bytes",
                        flags->model, out->model.info.vocab);
    if (code < 0) code = session_options(c, &flags->session, &out->model, &out->options);
    if (code < 0) code = open_corpus(out, argc, argv);
    if (code >= 0) return code;
    policy_set(&flags->policy, &out->options.policy);
    cli_catch_signals(); /* from here on there is something to remove */
    if (flags->store != NULL) return open_store(out);
    return out->model.shape->scheme != CAIRN_POSITION_DENSE ? make_store(out) : -1;
}

void bench_end(bench *b)
{
    cairn_store_close(b->store);
    scratch_remove(b->dir);
    cairn_corpus_close(b->corpus);
    model_close(&b->model);
}

const char *bench_path(const bench *b)
{
    return b->flags->store != NULL ? b->flags->store : b->dir;
}

int bench_stored_check(cli *c, const bench_flags *flags, cli_numbers tokens)
{
    if ((flags->store != NULL) != (flags->context != NULL)) return cli_usage(c, "--store and --context go together");
    if (flags->store == NULL || tokens.n == 0) return -1;
    return cli_usage(c, "--tokens does not go with --store: the context is as long as it is");
}

int bench_stored_blocks(const bench *b, uint64_t *blocks)
{
    cairn_snapshot *snap = NULL;
    cairn_context_info info;
    cairn_status st = cairn_snapshot_begin(b->store, &snap);
    if (st == CAIRN_OK) st = cairn_snapshot_context(snap, b->context, &info);
    cairn_snapshot_end(snap);
    if (st != CAIRN_OK) return cli_fail_status(b->c, st);
    *blocks = info.blocks;
    return -1;
}

int bench_needs_bytes(const bench *b, uint64_t bytes)
{
    human have, need;
    if (bytes <= b->held_bytes) return -1;
    return cli_fail(b->c, EXIT_FAILED,
                    "the corpus is too short: %s bytes of it are held out, a text of %s bytes does not fit; name more "
                    "files (or --held-out 1 if the model was never trained on them)",
                    human_count(&have, b->held_bytes), human_count(&need, bytes));
}

int bench_stream_begin(bench *b, const cairn_session_options *options, bench_stream *out)
{
    cairn_session_options opt = *options;
    const char *names[] = {b->context};
    size_t n = b->store != NULL;
    uint64_t id = 0;
    cairn_status st = CAIRN_OK;
    opt.write = b->store != NULL;
    opt.index_kind = NULL; /* --index is what questions are answered with */
    *out = (bench_stream){0};
    if (b->store != NULL) st = cairn_context_create(b->store, names[0], &id);
    if (st == CAIRN_EXISTS) st = CAIRN_OK; /* it goes on */
    if (st == CAIRN_OK) st = cairn_session_begin(b->store, b->model.shape, names, n, &opt, &out->session);
    if (st == CAIRN_OK)
        st = cairn_runtime_begin(b->model.model, out->session, b->flags->session.chunk_blocks, &out->runtime);
    if (st == CAIRN_OK && b->machine.kernels == NULL) cairn_session_info_get(out->session, &b->machine);
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

int bench_stream_feed(bench *b, bench_stream *s, const cairn_token *tokens, size_t n, float *logits)
{
    int code = bench_stopped(b);
    if (code >= 0) return code;
    cairn_status st = logits != NULL ? cairn_runtime_feed_all(s->runtime, tokens, n, logits)
                                     : cairn_runtime_feed(s->runtime, tokens, n, NULL);
    /* As ingest does: a sixteenth of the budget, so that a commit's second copy stays within it. */
    if (st == CAIRN_OK && b->store != NULL && cairn_session_pending_bytes(s->session) >= b->options.ram_bytes / 16)
        st = cairn_session_commit(s->session, NULL);
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

size_t bench_piece(const bench *b)
{
    uint32_t blocks = b->flags->session.chunk_blocks > 0 ? b->flags->session.chunk_blocks : 16;
    return (size_t)blocks * b->model.shape->block_tokens;
}

int bench_stream_commit(bench *b, bench_stream *s)
{
    cairn_status st = b->store != NULL ? cairn_session_commit(s->session, &(cairn_input){.complete = true}) : CAIRN_OK;
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

void bench_stream_end(bench_stream *s)
{
    cairn_runtime_end(s->runtime);
    cairn_session_end(s->session);
    *s = (bench_stream){0};
}

int bench_drop(bench *b)
{
    cairn_status st = b->store != NULL ? cairn_context_drop(b->store, b->context) : CAIRN_OK;
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

int bench_reopen(bench *b, bool cold)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.no_sync = true;
    cairn_store_close(b->store); /* which unmaps its pages */
    b->store = NULL;
    int code = cold ? scratch_drop_cache(b->c, bench_path(b)) : -1;
    if (code >= 0) return code;
    if (b->flags->store != NULL) return open_store(b);
    cairn_status st = cairn_store_open(b->dir, &opt, &b->store);
    return st == CAIRN_OK ? -1 : cli_fail_status(b->c, st);
}

int bench_stopped(const bench *b)
{
    human done, all;
    if (!cli_stopped()) return -1;
    return cli_fail(b->c, EXIT_FAILED, "interrupted after %s of %s texts", human_count(&done, b->texts_done),
                    human_count(&all, b->texts));
}

bool bench_has_bos(const bench *b)
{
    return b->model.info.add_bos && b->model.info.bos >= 0;
}

cairn_token *bench_encode(const bench *b, bool bos, const char *text, size_t bytes, size_t *n)
{
    size_t first = bos && bench_has_bos(b), more = 0;
    cairn_token *tokens = malloc((first + bytes) * sizeof *tokens);
    if (tokens == NULL) {
        cli_fail(b->c, EXIT_FAILED, "out of memory: %zu tokens", bytes);
        return NULL;
    }
    if (first) tokens[0] = b->model.info.bos;
    cairn_status st = cairn_model_encode(b->model.model, text, bytes, tokens + first, bytes, &more);
    *n = first + more;
    if (st == CAIRN_OK) return tokens;
    cli_fail_status(b->c, st);
    free(tokens);
    return NULL;
}

/* ---- figures ---- */

void bench_wilson(uint64_t right, uint64_t asked, double *low, double *high)
{
    const double z = 1.959964; /* 97.5 % of the normal distribution */
    double n = (double)asked, p = n > 0 ? (double)right / n : 0;
    *low = 0;
    *high = 1;
    if (asked == 0) return;
    double middle = (p + z * z / (2 * n)) / (1 + z * z / n);
    double half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n);
    *low = right == 0 ? 0 : middle - half; /* exactly 0 and 1 at the ends, which rounding misses */
    *high = right == asked ? 1 : middle + half;
}

void bench_mean(const double *x, size_t n, double *mean, double *error)
{
    double sum = 0, square = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    *mean = n > 0 ? sum / (double)n : 0;
    for (size_t i = 0; i < n; i++) square += (x[i] - *mean) * (x[i] - *mean);
    *error = n > 1 ? sqrt(square / (double)(n - 1) / (double)n) : 0;
}

const char *bench_k(human *h, uint64_t top_k)
{
    if (top_k == CAIRN_TOP_K_ALL)
        snprintf(h->text, sizeof h->text, "all");
    else
        human_count(h, top_k);
    return h->text;
}

json_t *bench_k_json(uint64_t top_k)
{
    return top_k == CAIRN_TOP_K_ALL ? json_string("all") : json_count(top_k);
}

void bench_print_head(const bench *b)
{
    if (b->c->quiet) return;
    human held;
    char line[512];
    machine m;
    machine_read(&m, b->dir != NULL ? b->dir : ".");
    printf("model    %s: %s, %.2f M parameters\n", b->flags->model, b->model.info.name,
           (double)b->model.info.parameters * 1e-6);
    printf("corpus   %zu files, %s held out; seed %u\n", cairn_corpus_files(b->corpus),
           human_bytes(&held, b->held_bytes), b->flags->seed);
    printf("machine  %s, %u threads, kernels %s\n\n", machine_line(&m, line), b->machine.threads,
           b->machine.kernels != NULL ? b->machine.kernels : "none");
}

static json_t *shape_json(const cairn_attention_shape *shape)
{
    uint32_t local = 0;
    for (uint32_t l = 0; shape->local_layers != NULL && l < shape->layers; l++) local += shape->local_layers[l] != 0;
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "layers", json_count(shape->layers), "local_layers",
                     json_count(local), "heads", json_count(shape->heads), "kv_heads", json_count(shape->kv_heads),
                     "head_dim", json_count(shape->head_dim), "block_tokens", json_count(shape->block_tokens), "top_k",
                     json_count(shape->top_k));
}

json_t *bench_json(const bench *b, const char *name, json_t *cells)
{
    machine m;
    machine_read(&m, b->dir != NULL ? b->dir : ".");
    json_t *about = machine_json(&m);
    json_object_set_new(about, "threads", json_count(b->machine.threads));
    json_object_set_new(about, "kernels", json_string(b->machine.kernels != NULL ? b->machine.kernels : ""));
    char print[20];
    snprintf(print, sizeof print, "%016llx", (unsigned long long)b->model.id.fingerprint);
    json_t *model = json_pack("{s:o, s:o, s:s, s:o}", "file", json_bytes(b->flags->model, strlen(b->flags->model)),
                              "name", json_bytes(b->model.info.name, strlen(b->model.info.name)), "fingerprint", print,
                              "parameters", json_count(b->model.info.parameters));
    json_object_set_new(model, "attention", shape_json(b->model.shape));
    json_t *corpus = json_pack("{s:o, s:o, s:f}", "files", json_count(cairn_corpus_files(b->corpus)), "held_out_bytes",
                               json_count(b->held_bytes), "held_out", b->flags->held_out);
    json_t *store = b->store == NULL
                        ? json_null()
                        : json_pack("{s:s, s:s, s:s}", "dtype", cairn_dtype_name((cairn_dtype)b->flags->dtype), "index",
                                    b->machine.index, "fetch", b->machine.fetch_reason);
    return json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:I, s:f, s:o, s:o}", "bench", name, "version", cairn_version(),
                     "machine", about, "model", model, "corpus", corpus, "store", store, "seed",
                     (json_int_t)b->flags->seed, "seconds", (double)(cli_now_ns() - b->start_ns) * 1e-9,
                     "peak_rss_bytes", json_count(cairn_peak_rss_bytes()), "cells", cells);
}

/* ---- the benches ---- */

static const cli_command *const benches[] = {&command_bench_passkey, &command_bench_ppl,    &command_bench_fetch,
                                             &command_bench_decode,  &command_bench_attend, &command_bench_recall,
                                             &command_bench_ingest,  &command_bench_resume, &command_bench_all};

const cli_command command_bench = {
    .name = "bench",
    .summary = "figures: keys found, bits per byte, the memory hierarchy against its limits",
    .usage = "NAME [options]",
    .about =
        "Measures a model the way it is used, and the memory hierarchy against what the machine can do. Stores are\n"
        "made for the run and removed afterwards. A table for people; --json holds every cell of it, the machine and\n"
        "the seed.",
    .example = "  cairn bench passkey -m models/cairn-tiny-f16.gguf --held-out 1 --corpus /usr/share/doc --texts 20\n"
               "  cairn bench fetch --size 256M --plot fetch.svg",
    .members = benches,
    .n_members = CLI_COUNT_OF(benches),
};
