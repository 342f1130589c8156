/* ask.c - a prompt over stored contexts; the answer alone on stdout, as it is generated.
 *
 * The prompt's last token is fed by itself, after the statistics were reset: sources and figures then speak of the
 * steps that produced the answer, not of reading the question.
 */
#include "sources.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct {
    const char *model;
    cli_texts contexts, stops;
    uint32_t n, sources;
    double temperature, top_p;
    uint64_t seed;
    bool fresh, keep, stats;
    policy_flags policy;
    session_flags session;
} flags = {.n = 64, .top_p = 1, .policy = POLICY_FLAGS_INIT, .session = SESSION_FLAGS_INIT};

static const cli_option options[] = {
    OPT_NEEDED(CLI_TEXT, "model", 'm', &flags.model, "FILE", "the model the store was made with"),
    OPT_NEEDED(CLI_TEXTS, "context", 'c', &flags.contexts, "NAMES",
               "a context, several by commas, or a glob: 'docs/*'"),
    OPT_NUMBER(CLI_U32, "tokens", 'n', &flags.n, "N", "at most this many tokens of answer (64)", 1, 1000000),
    OPT_TEXTS("stop", 0, &flags.stops, "TEXT", "end before this text ('\\n'); '' = only at -n; may be repeated"),
    POLICY_OPTIONS(flags.policy),
    OPT_REAL("temperature", &flags.temperature, "T", "0 = always the likeliest token (0)", 0, 100),
    OPT_REAL("top-p", &flags.top_p, "P", "sample among the likeliest tokens that make up P (1)", 0.0001, 1),
    OPT_NUMBER(CLI_U64, "seed", 0, &flags.seed, "N", "of the sampling (0)", 0, UINT64_MAX),
    OPT_FLAG("fresh", 0, &flags.fresh, "a stream of its own even over one context"),
    OPT_FLAG("keep", 0, &flags.keep, "add prompt and answer to the context (one context only)"),
    OPT_OPTIONAL("sources", &flags.sources, "N", "then, on stderr, the N spans of text most looked at (5)", 1, 1000, 5),
    OPT_FLAG("stats", 0, &flags.stats, "then, on stderr, times, blocks, bytes, mass and memory"),
    SESSION_OPTIONS(flags.session),
};

/* ---- the answer: bytes that may still turn out to be a stop are held back ---- */

typedef struct answer {
    char *text; /* [0, printed) is out, [printed, bytes) is held */
    size_t bytes, cap, printed;
    bool stopped;
    bool print;
} answer;

static bool answer_add(answer *a, const char *bytes, size_t n)
{
    if (a->cap - a->bytes < n) {
        size_t cap = 2 * a->cap + n + 256;
        char *grown = realloc(a->text, cap);
        if (grown == NULL) return false;
        a->text = grown;
        a->cap = cap;
    }
    memcpy(a->text + a->bytes, bytes, n);
    a->bytes += n;

    size_t safe = a->bytes; /* nothing before it can belong to a stop */
    for (size_t s = 0; s < flags.stops.n; s++) {
        const char *stop = flags.stops.items[s];
        size_t length = strlen(stop);
        if (length == 0) continue;
        char *hit = memmem(a->text + a->printed, a->bytes - a->printed, stop, length);
        if (hit != NULL && (size_t)(hit - a->text) <= safe) {
            safe = (size_t)(hit - a->text);
            a->stopped = true;
            continue;
        }
        for (size_t part = length - 1; part > 0; part--) {
            if (part > a->bytes - a->printed || memcmp(a->text + a->bytes - part, stop, part) != 0) continue;
            if (a->bytes - part < safe) safe = a->bytes - part;
            break;
        }
    }
    if (a->stopped) a->bytes = safe;
    if (a->print && safe > a->printed) {
        fwrite(a->text + a->printed, 1, safe - a->printed, stdout);
        fflush(stdout);
    }
    a->printed = safe;
    return true;
}

/* No stop came: what was held is part of the answer. */
static void answer_end(answer *a)
{
    if (a->print) {
        fwrite(a->text + a->printed, 1, a->bytes - a->printed, stdout);
        putchar('\n');
        fflush(stdout);
    }
    a->printed = a->bytes;
}

/* ---- a run ---- */

typedef struct run_state {
    cli *c;
    model_ref model;
    cairn_store *store;
    name_list contexts;
    cairn_session *session;
    cairn_runtime *runtime;
    cairn_token *prompt;
    size_t prompt_tokens;
    answer answer;
    uint64_t tokens; /* generated */
    bool end_token;
    double first_token_s; /* since the process began */
    double prefill_s, decode_s;
    cairn_step_stats stats;
    bool own_stream;    /* several contexts, or --fresh */
    bool stream_begins; /* nothing comes before the prompt: BOS does */
} run_state;

/* "\n", "\t", "\r" and "\\" in --stop are what C takes them for: a shell has no easy way to type them. */
static int read_stops(cli *c)
{
    static const char *newline[] = {"\n"};
    if (flags.stops.n == 0) flags.stops = (cli_texts){newline, 1};
    for (size_t i = 0; i < flags.stops.n; i++) {
        char *text = strdup(flags.stops.items[i]), *to = text;
        if (text == NULL) return cli_fail(c, EXIT_FAILED, "out of memory");
        for (const char *from = text; *from != 0; from++) {
            char next = from[0] == '\\' ? from[1] : 0;
            bool escape = next == 'n' || next == 't' || next == 'r' || next == '\\';
            *to++ = !escape ? *from : (char)(next == 'n' ? '\n' : next == 't' ? '\t' : next == 'r' ? '\r' : '\\');
            from += escape;
        }
        *to = 0;
        flags.stops.items[i] = text;
    }
    return -1;
}

static char *read_stdin(cli *c, size_t *out_bytes)
{
    size_t cap = 1 << 16, n = 0;
    char *text = malloc(cap);
    for (ssize_t got = 1; text != NULL && got > 0;) {
        if (n == cap) {
            cap *= 2;
            char *grown = realloc(text, cap);
            if (grown == NULL) free(text);
            text = grown;
            continue;
        }
        got = read(STDIN_FILENO, text + n, cap - n);
        if (got < 0 && errno != EINTR) {
            cli_fail(c, EXIT_FAILED, "cannot read the prompt from standard input: %s", strerror(errno));
            free(text);
            return NULL;
        }
        if (got < 0)
            got = 1;
        else
            n += (size_t)got;
    }
    if (text == NULL) cli_fail(c, EXIT_FAILED, "out of memory: the prompt");
    *out_bytes = n;
    return text;
}

static int read_prompt(run_state *r, const char *argument)
{
    size_t bytes = strlen(argument), n = 0;
    char *text = strcmp(argument, "-") == 0 ? read_stdin(r->c, &bytes) : strdup(argument);
    if (text == NULL) return EXIT_FAILED;
    if (bytes == 0) {
        free(text);
        return cli_usage(r->c, "PROMPT is empty");
    }
    bool bos = r->stream_begins && r->model.info.add_bos && r->model.info.bos >= 0;
    cairn_status st = cairn_model_encode(r->model.model, text, bytes, NULL, 0, &n);
    if (st == CAIRN_OK) {
        r->prompt = malloc((n + 1) * sizeof *r->prompt);
        if (r->prompt == NULL) {
            free(text);
            return cli_fail(r->c, EXIT_FAILED, "out of memory: %zu tokens of prompt", n);
        }
        if (bos) r->prompt[r->prompt_tokens++] = r->model.info.bos;
        st = cairn_model_encode(r->model.model, text, bytes, r->prompt + r->prompt_tokens, n, &n);
        r->prompt_tokens += n;
    }
    free(text);
    if (st != CAIRN_OK) return cli_fail_status(r->c, st);
    return r->prompt_tokens > 0 ? -1 : cli_usage(r->c, "PROMPT has no tokens");
}

/* Names the contexts and says what a person should know about them before trusting the answer. */
static int find_contexts(run_state *r)
{
    cairn_snapshot *snap = NULL;
    cairn_status st = cairn_snapshot_begin(r->store, &snap);
    if (st != CAIRN_OK) return cli_fail_status(r->c, st);
    int code = names_find(r->c, snap, &flags.contexts, &r->contexts);
    for (size_t i = 0; code < 0 && i < r->contexts.n; i++) {
        cairn_context_info info;
        if (cairn_snapshot_context(snap, r->contexts.items[i], &info) != CAIRN_OK) continue;
        human bytes, tokens;
        bool partial = info.input.bytes > 0 && !info.input.complete;
        r->stream_begins = info.tokens == 0;
        if (partial && flags.keep) /* tokens between the parts of a text could never be told from it */
            code = cli_fail(r->c, EXIT_FAILED,
                            "'%s' is not complete: --keep adds to it after its text is ingested to the end", info.name);
        else if (partial)
            cli_warn(r->c, "'%s' is not complete: %s tokens of a text of %s bytes are stored", info.name,
                     human_count(&tokens, info.tokens), human_count(&bytes, info.input.bytes));
    }
    cairn_snapshot_end(snap);
    if (code < 0 && flags.keep && r->contexts.n != 1)
        code = cli_usage(r->c, "--keep: adds to one context, not to %zu", r->contexts.n);
    r->own_stream = flags.fresh || r->contexts.n > 1;
    r->stream_begins |= r->own_stream;
    return code;
}

static int begin(run_state *r)
{
    cairn_session_options opt;
    int code = session_options(r->c, &flags.session, &r->model, &opt);
    if (code >= 0) return code;
    policy_set(&flags.policy, &opt.policy);
    opt.fresh = flags.fresh;
    opt.write = flags.keep;
    const char *const *items = (const char *const *)r->contexts.items;
    cairn_status st = cairn_session_begin(r->store, r->model.shape, items, r->contexts.n, &opt, &r->session);
    cairn_session_info info = {0};
    if (st == CAIRN_OK) cairn_session_info_get(r->session, &info);
    if (info.warning[0] != 0) cli_warn(r->c, "%s", info.warning);
    if (st == CAIRN_OK && r->own_stream)
        st = cairn_model_adopt_tails(r->model.model, r->store, items, r->contexts.n, r->session);
    if (st == CAIRN_OK) st = cairn_runtime_begin(r->model.model, r->session, flags.session.chunk_blocks, &r->runtime);
    return st == CAIRN_OK ? -1 : cli_fail_status(r->c, st);
}

static int generate(run_state *r)
{
    float *logits = malloc(r->model.info.vocab * sizeof *logits);
    if (logits == NULL) return cli_fail(r->c, EXIT_FAILED, "out of memory: %u logits", r->model.info.vocab);
    uint64_t start = cli_now_ns();
    cairn_status st = CAIRN_OK;
    if (r->prompt_tokens > 1) st = cairn_runtime_feed(r->runtime, r->prompt, r->prompt_tokens - 1, NULL);
    cairn_session_stats_reset(r->session);
    cairn_session_sources_enable(r->session, flags.sources > 0 || flags.stats || r->c->json);
    cairn_session_mass_enable(r->session, flags.stats); /* weighing all landmarks takes longer than finding the best */
    if (st == CAIRN_OK) st = cairn_runtime_feed(r->runtime, r->prompt + r->prompt_tokens - 1, 1, logits);
    uint64_t first = cli_now_ns();
    r->prefill_s = (double)(first - start) * 1e-9;
    cairn_sampler sampler = {(float)flags.temperature, (float)flags.top_p, flags.seed};
    while (st == CAIRN_OK && r->tokens < flags.n && !r->answer.stopped && !r->end_token) {
        cairn_token token = -1;
        char bytes[256];
        if ((st = cairn_model_sample(r->model.model, logits, &sampler, &token)) != CAIRN_OK) break;
        r->tokens++;
        r->end_token = token == r->model.info.eos;
        size_t n = r->end_token ? 0 : cairn_model_decode(r->model.model, token, bytes, sizeof bytes);
        if (!answer_add(&r->answer, bytes, n)) {
            free(logits);
            return cli_fail(r->c, EXIT_FAILED, "out of memory: the answer");
        }
        if (r->tokens == 1) r->first_token_s = (double)(cli_now_ns() - r->c->start_ns) * 1e-9;
        /* The last token need not be run, unless the stream goes on from it another day. */
        bool last = r->tokens == flags.n || r->answer.stopped || r->end_token;
        if (!last || (flags.keep && !r->end_token)) st = cairn_runtime_feed(r->runtime, &token, 1, logits);
    }
    r->decode_s = (double)(cli_now_ns() - first) * 1e-9;
    free(logits);
    if (st == CAIRN_OK) answer_end(&r->answer);
    cairn_session_stats(r->session, &r->stats);
    if (st == CAIRN_OK && flags.keep) {
        st = cairn_session_commit(r->session, NULL);
        if (st == CAIRN_OK && cairn_runtime_keep_tail(r->runtime) != CAIRN_OK)
            cli_warn(r->c, "asked together with others the context takes longer: %s", cairn_last_error());
    }
    return st == CAIRN_OK ? -1 : cli_fail_status(r->c, st);
}

/* ---- figures ---- */

typedef struct figures {
    cairn_session_info info;
    cairn_store_stat store;
    double tokens_per_s, mass_mean, bytes_per_token;
    uint64_t stored_bytes;
    uint64_t peak;
    double steps;
} figures;

static void gather_figures(const run_state *r, figures *f)
{
    *f = (figures){0};
    cairn_session_info_get(r->session, &f->info);
    cairn_store_stat_get(r->store, &f->store);
    f->peak = cairn_peak_rss_bytes();
    f->steps = (double)(r->tokens + (flags.keep ? 1 : 0)); /* one for the prompt's last token, none for the last one */
    f->stored_bytes = r->stats.tier_bytes + r->stats.map_bytes + r->stats.read_bytes;
    f->bytes_per_token = r->tokens > 0 ? (double)f->stored_bytes / (double)r->tokens : 0;
    f->mass_mean = r->stats.mass_rows > 0 ? r->stats.mass_sum / (double)r->stats.mass_rows : 0;
    /* The first token belongs to the prompt's step. */
    f->tokens_per_s = r->decode_s > 0 && r->tokens > 1 ? (double)(r->tokens - 1) / r->decode_s : 0;
}

static const char *mass_words(cairn_mass_kind kind)
{
    return kind == CAIRN_MASS_EXACT ? "exact" : kind == CAIRN_MASS_BOUND ? "lower bound" : "unknown";
}

static void print_figures(const run_state *r, const figures *f, const sources *s)
{
    human a, b, d, e;
    fprintf(stderr, "first token  %s after the process began (prompt of %zu tokens: %s)\n",
            human_seconds(&a, r->first_token_s), r->prompt_tokens, human_seconds(&b, r->prefill_s));
    fprintf(stderr, "answer       %llu tokens, %.1f tokens/s\n", (unsigned long long)r->tokens, f->tokens_per_s);
    fprintf(stderr, "blocks       %s of %s stored ones were used\n", human_count(&a, s->blocks),
            human_count(&b, f->info.old_blocks));
    fprintf(stderr, "bytes        %s per token: %s from the map, %s read, %s from the RAM tier\n",
            human_bytes(&a, (uint64_t)f->bytes_per_token), human_bytes(&b, r->stats.map_bytes),
            human_bytes(&d, r->stats.read_bytes), human_bytes(&e, r->stats.tier_bytes));
    if (r->stats.mass_rows > 0 && r->stats.mass_kind != CAIRN_MASS_UNKNOWN)
        fprintf(stderr, "mass         %.4f retained on average, least %.4f (%s)\n", f->mass_mean,
                (double)r->stats.mass_min, mass_words(r->stats.mass_kind));
    else
        fprintf(stderr, "mass         unknown: landmarks were left unscored\n");
    fprintf(stderr, "time         search %s, fetch %s, attend %s per token\n",
            human_seconds(&a, (double)r->stats.search_ns * 1e-9 / f->steps),
            human_seconds(&b, (double)r->stats.fetch_ns * 1e-9 / f->steps),
            human_seconds(&d, (double)r->stats.attend_ns * 1e-9 / f->steps));
    fprintf(stderr, "tiers        %s; index %s; %u threads, kernels %s\n", f->info.fetch_reason, f->info.index,
            f->info.threads, f->info.kernels != NULL ? f->info.kernels : "?");
    fprintf(stderr, "memory       %s peak (VmHWM), store %s; landmarks %s, RAM tier %s, own blocks %s\n",
            human_bytes(&a, f->peak), human_bytes(&b, f->store.file_bytes), human_bytes(&d, f->info.landmark_bytes),
            human_bytes(&e, f->info.tier_bytes), human_bytes(&(human){{0}}, f->info.own_bytes));
    if (s->n_idle > 0) {
        fprintf(stderr, "unused       ");
        size_t most = s->n_idle < 8 ? s->n_idle : 8;
        for (size_t i = 0; i < most; i++) fprintf(stderr, "%s%s", i > 0 ? ", " : "", s->idle[i]);
        if (s->n_idle > most) fprintf(stderr, " and %zu more", s->n_idle - most);
        fprintf(stderr, ": no block of %s contributed\n", s->n_idle == 1 ? "it" : "these");
    }
}

static json_t *figures_json(const run_state *r, const figures *f, const sources *s)
{
    json_t *idle = json_array();
    for (size_t i = 0; i < s->n_idle; i++) json_array_append_new(idle, json_string(s->idle[i]));
    json_t *mass = r->stats.mass_rows > 0 && r->stats.mass_kind != CAIRN_MASS_UNKNOWN
                       ? json_pack("{s:f, s:f, s:s}", "mean", f->mass_mean, "least", (double)r->stats.mass_min, "kind",
                                   mass_words(r->stats.mass_kind))
                       : json_null();
    json_t *root =
        json_pack("{s:f, s:f, s:f, s:f, s:i, s:o, s:o, s:f, s:o, s:o}", "first_token_seconds", r->first_token_s,
                  "prompt_seconds", r->prefill_s, "decode_seconds", r->decode_s, "tokens_per_second", f->tokens_per_s,
                  "prompt_tokens", (int)r->prompt_tokens, "stored_blocks", json_count(f->info.old_blocks),
                  "stored_blocks_used", json_count(s->blocks), "stored_bytes_per_token", f->bytes_per_token,
                  "retained_mass", mass, "unused_contexts", idle);
    json_t *more =
        json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "map_bytes", json_count(r->stats.map_bytes),
                  "read_bytes", json_count(r->stats.read_bytes), "tier_bytes", json_count(r->stats.tier_bytes),
                  "search_ns", json_count(r->stats.search_ns), "fetch_ns", json_count(r->stats.fetch_ns), "attend_ns",
                  json_count(r->stats.attend_ns), "landmark_bytes", json_count(f->info.landmark_bytes), "own_bytes",
                  json_count(f->info.own_bytes), "peak_rss_bytes", json_count(f->peak), "store_bytes",
                  json_count(f->store.file_bytes));
    json_t *words = json_pack("{s:s, s:s, s:s, s:i}", "fetch", f->info.fetch_reason, "index", f->info.index, "kernels",
                              f->info.kernels != NULL ? f->info.kernels : "", "threads", (int)f->info.threads);
    json_object_update_missing(root, more);
    json_object_update_missing(root, words);
    json_decref(more);
    json_decref(words);
    return root;
}

static int report(run_state *r)
{
    cli *c = r->c;
    if (flags.sources == 0 && !flags.stats && !c->json) return -1;
    sources found = {0};
    figures f;
    size_t top = flags.sources > 0 ? flags.sources : c->json ? 5 : 0;
    int code = sources_gather(c, r->store, &r->model, &r->contexts, r->session, top, &found);
    if (code >= 0) return code;
    gather_figures(r, &f);
    if (c->json) {
        json_t *root = json_pack("{s:o, s:o, s:s, s:o, s:o}", "answer", json_bytes(r->answer.text, r->answer.bytes),
                                 "tokens", json_count(r->tokens), "ended",
                                 r->answer.stopped ? "stop"
                                 : r->end_token    ? "end of text"
                                                   : "length",
                                 "sources", sources_json(&found), "stats", figures_json(r, &f, &found));
        code = cli_answer(c, root);
    } else {
        if (flags.sources > 0) sources_print(&found);
        if (flags.stats) print_figures(r, &f, &found);
    }
    sources_wipe(&found);
    return code;
}

static int run(cli *c, int argc, char **argv)
{
    (void)argc;
    run_state r = {.c = c, .answer.print = !c->json};
    if (flags.fresh && flags.keep) return cli_usage(c, "--fresh and --keep exclude each other");
    int code = policy_check(c, &flags.policy);
    if (code < 0) code = read_stops(c);
    if (code < 0) code = model_open(c, flags.model, true, &r.model);
    if (code < 0) code = store_open(c, argv[0], &r.model, !flags.keep, &r.store);
    if (code < 0) code = find_contexts(&r);
    if (code < 0) code = read_prompt(&r, argv[1]);
    if (code < 0) code = begin(&r);
    if (code < 0) code = generate(&r);
    if (code < 0) code = report(&r);
    cairn_runtime_end(r.runtime);
    cairn_session_end(r.session);
    names_wipe(&r.contexts);
    cairn_store_close(r.store);
    model_close(&r.model);
    free(r.prompt);
    free(r.answer.text);
    return code < 0 ? EXIT_DONE : code;
}

const cli_command command_ask = {
    .name = "ask",
    .summary = "an answer out of stored contexts, and where it came from",
    .usage = "STORE -m MODEL.gguf -c NAME[,NAME...] [options] PROMPT   (- is standard input)",
    .about =
        "Continues a stored context with PROMPT and prints what the model says next, alone, on stdout. The context\n"
        "is not changed (see --keep). With several contexts, a glob, or --fresh, the prompt begins a stream of its\n"
        "own and the blocks of all attached contexts compete in one search; their order counts only for ties.\n"
        "\n"
        "--sources and --stats follow on stderr; --json holds answer, sources and stats in one object. Only with\n"
        "--stats is the retained mass measured: weighing all landmarks takes longer than finding the best.",
    .example =
        "  cairn ask library -m models/cairn-tiny-f16.gguf -c book \"What is the pass key? The pass key is\"\n"
        "  cairn ask library -m models/cairn-tiny-f16.gguf -c 'docs/*' --sources=3 --stats \"The commit command\"\n"
        "  cairn ask library -m models/cairn-tiny-f16.gguf -c book --json - <prompt.txt",
    CLI_OPTIONS(options),
    .args = (const char *const[]){"STORE", "PROMPT"},
    .min_args = 2,
    .max_args = 2,
    .run = run,
};
