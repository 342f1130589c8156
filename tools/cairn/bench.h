/* bench.h - what the benches share: a model, held-out text, a store of their own, the words of a report. */
#ifndef CAIRN_CLI_BENCH_H
#define CAIRN_CLI_BENCH_H

#include "work.h"

#include <cairn/train.h>

/* ---- options of every bench that reads text ---- */

typedef struct bench_flags {
    const char *model, *dir;
    const char *store, *context; /* one that is there already, read alone; NULL = the bench makes its own */
    cli_texts corpus;
    double held_out;
    int dtype; /* cairn_dtype */
    uint32_t seed;
    policy_flags policy;
    session_flags session;
} bench_flags;
#define BENCH_FLAGS_INIT                                                                                               \
    {                                                                                                                  \
        .held_out = 0.05, .dtype = CAIRN_F16, .policy = POLICY_FLAGS_INIT, .session = SESSION_FLAGS_INIT               \
    }
/* The first and the last rows of a bench's table; its own come in between. */
#define BENCH_OPTIONS(f)                                                                                               \
    OPT_NEEDED(CLI_TEXT, "model", 'm', &(f).model, "FILE", "a GGUF file with a vocabulary of bytes"),                  \
        OPT_NEEDED(CLI_TEXTS, "corpus", 'c', &(f).corpus, "PATH",                                                      \
                   "text: a file or directory; more may follow as arguments"),                                         \
        OPT_REAL("held-out", &(f).held_out, "P",                                                                       \
                 "the part of it that training left out; 1 = the model never saw any of it (0.05)", 1e-6, 1),          \
        OPT_NUMBER(CLI_U32, "seed", 0, &(f).seed, "N", "of the choice of texts (0)", 0, UINT32_MAX)
#define BENCH_STORE_OPTIONS(f)                                                                                         \
    POLICY_OPTIONS((f).policy), OPT_TEXT("dir", 0, &(f).dir, "DIR", "where the store is made ($TMPDIR or /tmp)"),      \
        OPT_CHOICE("dtype", &(f).dtype, "f32|f16|bf16|q8", "element type of the store (f16)"),                         \
        SESSION_OPTIONS_BUT_K((f).session)

/* A context that is there already, instead of text that is ingested. */
#define BENCH_STORED_OPTIONS(f)                                                                                        \
    OPT_TEXT("store", 0, &(f).store, "STORE", "ask a stored context instead, as if the text followed it"),             \
        OPT_TEXT("context", 0, &(f).context, "NAME", "that one")

/* ---- a run ---- */

#define BENCH_ANY_RAM (UINT64_C(1) << 34) /* of a session whose budget is not what is measured */

typedef struct bench {
    cli *c;
    const bench_flags *flags;
    model_ref model;
    cairn_corpus *corpus;
    uint64_t held_bytes; /* of the corpus */
    cairn_session_options options;
    char *dir;                  /* of the store, made for this run; NULL if it was there already */
    const char *context;        /* what is read and written in it */
    cairn_store *store;         /* NULL for a model without landmarks, which keeps nothing */
    cairn_session_info machine; /* of a session: kernels, threads, index, tiers */
    uint64_t start_ns;
    uint64_t texts, texts_done; /* for the sentence after Ctrl-C */
} bench;

/* Opens what the flags name and the further corpus paths of the command line; catches Ctrl-C. -1 or the exit code;
 * bench_end either way: it removes the store. landmarks: only a landmark model will do. */
int bench_begin(cli *c, const bench_flags *flags, bool landmarks, int argc, char **argv, bench *out);
void bench_end(bench *b);
const char *bench_path(const bench *b); /* of its store */
/* A usage error unless --store and --context are both given, with no lengths, or neither. */
int bench_stored_check(cli *c, const bench_flags *flags, cli_numbers tokens);
/* Whole blocks of the context that is there already. */
int bench_stored_blocks(const bench *b, uint64_t *blocks);
/* Fails unless the held-out text has that many bytes. */
int bench_needs_bytes(const bench *b, uint64_t bytes);

/* A stream that fills the bench's context, new or going on where it ends; without a store, a stream in memory. */
typedef struct bench_stream {
    cairn_session *session;
    cairn_runtime *runtime;
} bench_stream;
#define BENCH_CONTEXT "text" /* in a store of its own */
int bench_stream_begin(bench *b, const cairn_session_options *options, bench_stream *out);
/* logits (n, vocab) or NULL. What has piled up is committed. */
int bench_stream_feed(bench *b, bench_stream *s, const cairn_token *tokens, size_t n, float *logits);
size_t bench_piece(const bench *b); /* tokens of a prefill chunk: what is best fed at once */
int bench_stream_commit(bench *b, bench_stream *s);
void bench_stream_end(bench_stream *s);
int bench_drop(bench *b);              /* the context */
int bench_reopen(bench *b, bool cold); /* the store; cold: its pages are dropped from the page cache in between */
int bench_stopped(const bench *b);     /* after Ctrl-C the exit code, said; else -1 */
/* Text as tokens, malloc'ed, after BOS if asked for and the model has one; NULL after a failure, said. */
cairn_token *bench_encode(const bench *b, bool bos, const char *text, size_t bytes, size_t *n);
bool bench_has_bos(const bench *b);

/* ---- one long text that grows in the store ---- */

typedef struct bench_text {
    bench *b;
    cairn_token *tokens; /* BOS, if the model has one, and held-out text from its begin */
    size_t n;
    uint64_t stored; /* of them in the context */
} bench_text;
typedef struct bench_costs { /* of growing, seconds */
    uint64_t tokens;
    double all, search, fetch, attend, commit; /* the rest of `all` is the model's own work */
} bench_costs;
int bench_lengths_check(cli *c, cli_numbers tokens); /* a usage error unless they ascend, as the text does */
int bench_text_open(bench *b, uint64_t tokens, bench_text *out);
void bench_text_close(bench_text *t);
/* Ingests up to token `to`, as 'cairn ingest' does. costs (may be NULL) are of this call alone. */
int bench_text_grow(bench_text *t, uint64_t to, progress *bar, bench_costs *costs);

/* ---- figures ---- */

/* Wilson's 95 % interval of a share (Wilson 1927): honest near 0 and 1 too, where the usual one has no width. */
void bench_wilson(uint64_t right, uint64_t asked, double *low, double *high);
/* Mean and its standard error (0 for fewer than two). */
void bench_mean(const double *x, size_t n, double *mean, double *error);
const char *bench_k(human *h, uint64_t top_k); /* "4", "all" */
json_t *bench_k_json(uint64_t top_k);

/* The lines above a table: model, corpus, machine. */
void bench_print_head(const bench *b);
/* {"bench", "version", "machine", "model", "corpus", "seed", ..., "cells"}; steals cells. */
json_t *bench_json(const bench *b, const char *name, json_t *cells);

extern const cli_command command_bench_passkey, command_bench_ppl, command_bench_fetch, command_bench_decode,
    command_bench_attend, command_bench_recall, command_bench_ingest, command_bench_resume, command_bench_all;

#endif
