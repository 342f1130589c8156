/* work.h - the things subcommands work on: a model, a store, names of contexts, the tokens of a context. */
#ifndef CAIRN_CLI_WORK_H
#define CAIRN_CLI_WORK_H

#include "cli.h"
#include "output.h"

#include <cairn/context.h>
#include <cairn/model.h>
#include <cairn/store.h>

/* Every function that returns an int answers -1 to go on, or the exit code after the failure was said. */

typedef struct model_ref {
    const char *path;
    cairn_model *model;
    cairn_model_info info;
    cairn_model_id id;
    const cairn_attention_shape *shape;
} model_ref;
int model_open(cli *c, const char *path, bool landmarks, model_ref *out); /* landmarks: it must be a landmark model */
void model_close(model_ref *m);

/* An existing store; NULL model = any. With a model its fingerprint and geometry must be the store's. */
int store_open(cli *c, const char *path, const model_ref *model, bool read_only, cairn_store **out);

int context_find(cli *c, cairn_snapshot *snap, const char *name, cairn_context_info *out);

/* The contexts that -c names: each text is a name, or several separated by commas, or a glob (fnmatch). In the order
 * given, a glob's in order of name, none twice. NULL-safe to wipe. */
typedef struct name_list {
    char **items;
    size_t n;
} name_list;
int names_find(cli *c, cairn_snapshot *snap, const cli_texts *texts, name_list *out);
void names_wipe(name_list *list);

/* Tokens of one context by position; whole blocks come from the segments, the rest is the tail. */
typedef struct token_reader {
    cairn_snapshot *snap; /* borrowed */
    cairn_context_info info;
    uint32_t block_tokens;
    cairn_range *ranges;
    size_t n_ranges;
    cairn_token *blocks; /* scratch for READ_BLOCKS blocks */
} token_reader;
int reader_init(cli *c, cairn_store *store, cairn_snapshot *snap, const cairn_context_info *info, token_reader *out);
void reader_wipe(token_reader *r);
/* Up to n tokens from position `from`; *out_n fewer only at the end of the context. */
cairn_status reader_tokens(token_reader *r, uint64_t from, size_t n, cairn_token *out, size_t *out_n);
/* Where block `block` of the context is stored. */
bool reader_block(const token_reader *r, uint64_t block, uint64_t *segment, uint32_t *number);

/* Text of tokens, malloc'ed with a 0 after it; NULL when out of memory. */
char *tokens_text(const cairn_model *model, const cairn_token *tokens, size_t n, size_t *out_bytes);

/* ---- options of every command that begins a session ---- */

typedef struct session_flags {
    int fetch; /* cairn_fetch_mode */
    bool read_ahead;
    uint64_t ram_bytes;
    uint32_t threads;
    uint32_t top_k; /* TOP_K_MODEL = the model's */
    uint32_t chunk_blocks;
    const char *index;
} session_flags;
#define TOP_K_MODEL (UINT32_MAX - 1)
#define SESSION_FLAGS_INIT                                                                                             \
    {                                                                                                                  \
        .ram_bytes = UINT64_C(256) << 20, .top_k = TOP_K_MODEL                                                         \
    }
#define SESSION_OPTIONS(f)                                                                                             \
    SESSION_OPTIONS_BUT_K(f), OPT_NUMBER(CLI_COUNT, "top-k", 0, &(f).top_k, "N|all",                                   \
                                         "blocks retrieved per step and head (the model's)", 0, 1000000)
#define SESSION_OPTIONS_BUT_K(f) /* for a command that takes a list of them */                                         \
    OPT_CHOICE("fetch", &(f).fetch, "auto|map|read", "how tiles are reached: map suits a store that fits free RAM"),   \
        OPT_FLAG("read-ahead", 0, &(f).read_ahead, "read tiles of the next layer before its query is known"),          \
        OPT_NUMBER(CLI_SIZE, "ram", 0, &(f).ram_bytes, "SIZE", "RAM budget of the session (256M)", 1 << 20,            \
                   UINT64_C(1) << 50),                                                                                 \
        OPT_NUMBER(CLI_U32, "threads", 0, &(f).threads, "N", "worker threads; 0 = one per core (0)", 0, 256),          \
        OPT_TEXT("index", 0, &(f).index, "KIND",                                                                       \
                 "auto, scan, exact, flat, sq8, ivf, hnsw, or a FAISS factory string"),                                \
        OPT_NUMBER(CLI_U32, "chunk-blocks", 0, &(f).chunk_blocks, "N", "blocks run through the model at once (16)", 1, \
                   4096)
/* Library options from the flags. A --index that FAISS refuses is a usage error. */
int session_options(cli *c, const session_flags *flags, const model_ref *model, cairn_session_options *out);

/* Which blocks a row sees, beside their number. */
typedef struct policy_flags {
    int scope;       /* cairn_scope */
    double mass;     /* 0 = no target */
    uint32_t window; /* WINDOW_MODEL = the model's */
} policy_flags;
#define WINDOW_MODEL UINT32_MAX
#define POLICY_FLAGS_INIT                                                                                              \
    {                                                                                                                  \
        .window = WINDOW_MODEL                                                                                         \
    }
#define POLICY_OPTIONS(f)                                                                                              \
    OPT_REAL("mass", &(f).mass, "P", "fewest blocks (at most --top-k) that retain this attention mass", 0.0001, 1),    \
        OPT_CHOICE("scope", &(f).scope, "token+head|head|token", "which rows share one choice of blocks"),             \
        OPT_NUMBER(CLI_U32, "window", 0, &(f).window, "N", "newest blocks always visible (the model's)", 0, 1000000)
int policy_check(cli *c, const policy_flags *flags); /* a usage error if they exclude each other */
void policy_set(const policy_flags *flags, cairn_policy *policy);

int index_kind_check(cli *c, const char *kind, const model_ref *model); /* NULL and "auto" are fine */

#endif
