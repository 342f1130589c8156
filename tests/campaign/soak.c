/* soak.c - a long mixed life of one store: contexts read, asked, forked, dropped, indexed, compacted, round after
 * round.
 *
 *   campaign_soak [--minutes M | --rounds N] [--seed N] [--dir DIR] [--csv FILE] [--tokens N]
 *
 * One round: a new context of about N (2,000) tokens of this project's own texts is read; a context is forked in its
 * middle and reads on; two contexts are asked; contexts beyond KEEP are dropped; every fifth round one is indexed
 * anew, the store compacted and every byte of it verified, in the others the structure. What is asked for the second
 * time must give the same logits bit for bit, whatever happened to the store since.
 *
 * A second store is made at the beginning and never written again. Each answer that is timed is followed by the same
 * question to a context of the same size in that store: what the machine does beside us slows both down, what drifts is
 * their ratio. The work of reading is counted in processor time.
 *
 * At the end the rounds of the second quarter are compared with those of the last (the first is left out: it fills
 * the store): anonymous memory may have grown by a tenth and 4 MiB, the median of that ratio and the median processor
 * time of a token read by half; after every compact the file holds no more than twice what is in use. The exit status
 * is 0 only if that is so and no check failed. --csv writes a line per round. */
#include "support.h"

#include <cairn/cairn.h>

#include <dirent.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { KEEP = 6, ROUNDS_MAX = 200000, EVERY = 5, PROMPT = 24, VOCAB_MAX = 512 };

#define must(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition,               \
                    cairn_last_error());                                                                               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

typedef struct kept { /* a context, and what it answered the first time */
    char name[32];
    uint64_t tokens;
    bool asked;
    uint64_t answer;
} kept;

typedef struct sample {                                               /* one round */
    double ingest_per_s, token_us, ask_ms, still_ms, ratio, verify_s; /* still: the store nobody writes */
    uint64_t file, used, free, anon;
} sample;

typedef struct soak {
    cairn_model *model;
    cairn_store *store, *still;
    uint8_t *text;
    size_t text_bytes;
    size_t tokens; /* of a new context */
    test_random random;
    kept contexts[KEEP + 2];
    kept unchanged; /* the one of `still` */
    size_t n;
    uint64_t made, dropped, asked, again, compacts, ingested;
} soak;

static double since(uint64_t began)
{
    return (double)(cairn_now_ns() - began) * 1e-9;
}

static double processor_seconds(void)
{
    struct timespec t;
    must(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t) == 0);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t anonymous_bytes(void)
{
    char line[256];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/self/status", "re");
    must(f != NULL);
    while (fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "RssAnon: %llu", &kib) == 1) break;
    fclose(f);
    return kib * 1024;
}

/* ---- texts ---- */

static void add_texts(soak *s, const char *folder)
{
    DIR *dir = opendir(folder);
    must(dir != NULL);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        size_t n, length = strlen(e->d_name);
        if (length < 3 || (strcmp(e->d_name + length - 2, ".h") != 0 && strcmp(e->d_name + length - 3, ".md") != 0))
            continue;
        char *path = test_path(folder, e->d_name);
        char *bytes = test_read_file(path, &n);
        must(bytes != NULL);
        s->text = realloc(s->text, s->text_bytes + n);
        must(s->text != NULL);
        memcpy(s->text + s->text_bytes, bytes, n);
        s->text_bytes += n;
        free(bytes);
        free(path);
    }
    closedir(dir);
}

static cairn_token *some_text(soak *s, size_t n)
{
    cairn_token *tokens = malloc(n * sizeof *tokens);
    size_t got, at = test_random_below(&s->random, (uint32_t)(s->text_bytes - n));
    must(tokens != NULL);
    must(cairn_model_encode(s->model, s->text + at, n, tokens, n, &got) == CAIRN_OK && got == n); /* a byte a token */
    return tokens;
}

/* ---- what is done ---- */

static void session(soak *s, cairn_store *store, const char *context, bool write, cairn_fetch_mode fetch,
                    cairn_session **out, cairn_runtime **rt)
{
    cairn_session_options opt;
    cairn_session_options_init(&opt, sizeof opt, cairn_model_shape(s->model));
    opt.write = write;
    opt.ram_bytes = 32 << 20;
    opt.fetch = fetch;
    must(cairn_session_begin(store, cairn_model_shape(s->model), &context, 1, &opt, out) == CAIRN_OK);
    must(cairn_runtime_begin(s->model, *out, 0, rt) == CAIRN_OK);
}

static cairn_fetch_mode some_mode(soak *s)
{
    return test_random_below(&s->random, 2) == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ;
}

static void read_text(soak *s, cairn_store *store, kept *k, size_t n)
{
    cairn_session *session_of;
    cairn_runtime *rt;
    cairn_token *tokens = some_text(s, n);
    session(s, store, k->name, true, some_mode(s), &session_of, &rt);
    for (size_t at = 0; at < n;) {
        size_t some = 1 + test_random_below(&s->random, 900);
        if (some > n - at) some = n - at;
        must(cairn_runtime_feed(rt, tokens + at, some, NULL) == CAIRN_OK);
        must(cairn_session_commit(session_of, NULL) == CAIRN_OK);
        at += some;
    }
    cairn_runtime_end(rt);
    cairn_session_end(session_of);
    free(tokens);
    k->tokens += n;
    k->asked = false;
    s->ingested += n;
}

static double ask(soak *s, cairn_store *store, kept *k, cairn_fetch_mode fetch)
{
    cairn_session *session_of;
    cairn_runtime *rt;
    cairn_step_stats stats;
    cairn_token prompt[PROMPT];
    float logits[VOCAB_MAX];
    cairn_model_info info;
    cairn_model_info_get(s->model, &info);
    must(info.vocab <= VOCAB_MAX);
    for (size_t i = 0; i < PROMPT; i++) prompt[i] = 3 + (cairn_token)("What is the pass key? It is"[i]);
    uint64_t began = cairn_now_ns();
    session(s, store, k->name, false, fetch, &session_of, &rt);
    must(cairn_runtime_feed(rt, prompt, PROMPT, logits) == CAIRN_OK);
    double took = since(began);
    cairn_session_stats(session_of, &stats);
    must(stats.stored_tiles > 0); /* what was stored is used */
    cairn_runtime_end(rt);
    cairn_session_end(session_of);
    uint64_t answer = cairn_hash64(logits, info.vocab * sizeof *logits);
    must(!k->asked || k->answer == answer);
    s->again += k->asked;
    s->asked++;
    k->asked = true;
    k->answer = answer;
    return took * 1e3;
}

static kept *new_context(soak *s)
{
    kept *k = &s->contexts[s->n++];
    *k = (kept){0};
    snprintf(k->name, sizeof k->name, "round/%llu", (unsigned long long)s->made++);
    return k;
}

static void fork_one(soak *s)
{
    const kept from = s->contexts[test_random_below(&s->random, (uint32_t)s->n)];
    kept *k = new_context(s);
    uint64_t at = from.tokens / 4 + test_random_below(&s->random, (uint32_t)(from.tokens / 2));
    must(cairn_context_fork(s->store, from.name, k->name, at, NULL) == CAIRN_OK);
    k->tokens = at;
    read_text(s, s->store, k, 1 + test_random_below(&s->random, 500));
}

static void drop_one(soak *s)
{
    size_t i = test_random_below(&s->random, (uint32_t)s->n);
    must(cairn_context_drop(s->store, s->contexts[i].name) == CAIRN_OK);
    s->contexts[i] = s->contexts[--s->n];
    s->dropped++;
}

static sample one_round(soak *s, uint64_t number)
{
    sample x = {0};
    cairn_store_stat st;
    cairn_verify_report report;
    kept *k = new_context(s);
    must(cairn_context_create(s->store, k->name, NULL) == CAIRN_OK);
    uint64_t began = cairn_now_ns();
    double used = processor_seconds();
    read_text(s, s->store, k, s->tokens);
    x.token_us = (processor_seconds() - used) * 1e6 / (double)s->tokens;
    x.ingest_per_s = (double)s->tokens / since(began);
    x.ask_ms = ask(s, s->store, k, CAIRN_FETCH_MAP); /* the same size in every round */
    x.still_ms = ask(s, s->still, &s->unchanged, CAIRN_FETCH_MAP);
    x.ratio = x.ask_ms / x.still_ms;
    fork_one(s);
    ask(s, s->store, &s->contexts[test_random_below(&s->random, (uint32_t)s->n)], some_mode(s));
    while (s->n > KEEP - 1) drop_one(s);
    bool whole = number % EVERY == 0;
    if (whole) {
        static const char *const kinds[] = {"scan", "flat", "exact"};
        const kept *some = &s->contexts[test_random_below(&s->random, (uint32_t)s->n)];
        must(cairn_context_reindex(s->store, cairn_model_shape(s->model), some->name,
                                   kinds[test_random_below(&s->random, 3)], NULL, NULL) == CAIRN_OK);
        must(cairn_store_compact(s->store, NULL, NULL) == CAIRN_OK);
        s->compacts++;
    }
    for (size_t i = 0; whole && i < s->n; i++) ask(s, s->store, &s->contexts[i], some_mode(s));
    began = cairn_now_ns();
    must(cairn_store_verify(s->store, whole, NULL, NULL, NULL, &report) == CAIRN_OK && report.damaged == 0);
    x.verify_s = since(began);
    must(cairn_store_stat_get(s->store, &st) == CAIRN_OK);
    must(st.contexts == s->n && st.readers == 0);
    x.file = st.file_bytes, x.used = st.used_bytes, x.free = st.free_bytes, x.anon = anonymous_bytes();
    if (whole) must(x.file <= 2 * x.used + (1 << 20)); /* space came back */
    return x;
}

/* ---- drift ---- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const sample *from, size_t n, size_t at)
{
    double *values = malloc(n * sizeof *values);
    must(values != NULL && n > 0);
    for (size_t i = 0; i < n; i++) memcpy(&values[i], (const char *)&from[i] + at, sizeof(double));
    qsort(values, n, sizeof *values, ascending);
    double middle = values[n / 2];
    free(values);
    return middle;
}

static uint64_t most_anon(const sample *from, size_t n)
{
    uint64_t most = 0;
    for (size_t i = 0; i < n; i++) most = from[i].anon > most ? from[i].anon : most;
    return most;
}

static int report(const soak *s, const sample *samples, size_t rounds, double seconds)
{
    const double MiB = 1048576;
    const sample *last = &samples[rounds - 1];
    printf(
        "soak: %.1f min, %zu rounds, %llu tokens read, %llu contexts made and %llu dropped, %llu answers (%llu again, "
        "the same bits), %llu compacts; file %.1f MiB, %.1f used, %.1f free; peak memory %.1f MiB\n",
        seconds / 60, rounds, (unsigned long long)s->ingested, (unsigned long long)s->made,
        (unsigned long long)s->dropped, (unsigned long long)s->asked, (unsigned long long)s->again,
        (unsigned long long)s->compacts, (double)last->file / MiB, (double)last->used / MiB, (double)last->free / MiB,
        (double)cairn_peak_rss_bytes() / MiB);
    size_t quarter = rounds / 4;
    if (quarter < 5) {
        printf("soak: too few rounds to tell a drift\n");
        return 0;
    }
    const sample *early = samples + quarter, *late = samples + rounds - quarter;
    double ask[] = {median(early, quarter, offsetof(sample, ask_ms)), median(late, quarter, offsetof(sample, ask_ms))};
    double ratio[] = {median(early, quarter, offsetof(sample, ratio)), median(late, quarter, offsetof(sample, ratio))};
    double token[] = {median(early, quarter, offsetof(sample, token_us)),
                      median(late, quarter, offsetof(sample, token_us))};
    uint64_t anon[] = {most_anon(early, quarter), most_anon(late, quarter)};
    printf(
        "soak: second and last quarter: an answer %.1f and %.1f ms, %.2f and %.2f of one from the store nobody writes; "
        "%.0f and %.0f us of processor time to read a token; anonymous memory %.1f and %.1f MiB\n",
        ask[0], ask[1], ratio[0], ratio[1], token[0], token[1], (double)anon[0] / MiB, (double)anon[1] / MiB);
    bool drifts =
        ratio[1] > 1.5 * ratio[0] || token[1] > 1.5 * token[0] || anon[1] > anon[0] + anon[0] / 10 + (4 << 20);
    if (drifts) printf("soak: this drifts\n");
    return drifts ? 1 : 0;
}

static void begin(soak *s, const char *dir)
{
    cairn_store_options opt;
    must(cairn_model_open(CAIRN_SOURCE_DIR "/models/cairn-tiny-f16.gguf", &s->model) == CAIRN_OK);
    add_texts(s, CAIRN_SOURCE_DIR "/include/cairn");
    add_texts(s, CAIRN_SOURCE_DIR "/docs");
    must(s->text_bytes > 2 * s->tokens);
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    cairn_model_geometry(s->model, CAIRN_F16, &opt.geometry);
    must(cairn_model_identity(s->model, &opt.model) == CAIRN_OK);
    cairn_store **const stores[] = {&s->store, &s->still};
    static const char *const names[] = {"store", "still"};
    for (size_t i = 0; i < 2; i++) {
        char *path = test_path(dir, names[i]);
        must(cairn_store_open(path, &opt, stores[i]) == CAIRN_OK);
        free(path);
    }
    snprintf(s->unchanged.name, sizeof s->unchanged.name, "unchanged");
    must(cairn_context_create(s->still, s->unchanged.name, NULL) == CAIRN_OK);
    read_text(s, s->still, &s->unchanged, s->tokens);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"minutes", 1, NULL, 'm'},
                                          {"rounds", 1, NULL, 'r'},
                                          {"seed", 1, NULL, 'x'},
                                          {"dir", 1, NULL, 'd'},
                                          {"csv", 1, NULL, 'c'},
                                          {"tokens", 1, NULL, 't'},
                                          {0}};
    static sample samples[ROUNDS_MAX];
    soak s = {.tokens = 2000, .random = {1}};
    double seconds = 1e9;
    size_t rounds = ROUNDS_MAX, done = 0;
    FILE *csv = NULL;
    for (int o; (o = getopt_long(argc, argv, "", longs, NULL)) != -1;) switch (o) {
        case 'm': seconds = 60 * strtod(optarg, NULL); break;
        case 'r': rounds = strtoul(optarg, NULL, 10); break;
        case 'x': s.random.state = strtoull(optarg, NULL, 10); break;
        case 'd': setenv("TMPDIR", optarg, 1); break;
        case 'c': csv = fopen(optarg, "w"); break;
        case 't': s.tokens = strtoul(optarg, NULL, 10); break;
        default:
            fprintf(stderr, "usage: campaign_soak [--minutes M | --rounds N] [--seed N] [--dir DIR] [--csv FILE] "
                            "[--tokens N]\n");
            return 2;
        }
    if (rounds < 1 || rounds > ROUNDS_MAX || s.tokens < 100) {
        fprintf(stderr, "soak: 1 to %d rounds of 100 tokens and more\n", ROUNDS_MAX);
        return 2;
    }
    char *dir = test_make_dir();
    begin(&s, dir);
    if (csv != NULL)
        fprintf(
            csv,
            "round,tokens_per_s,token_us,ask_ms,still_ms,verify_s,file_bytes,used_bytes,free_bytes,anonymous_bytes\n");
    uint64_t began = cairn_now_ns();
    while (done < rounds && since(began) < seconds) {
        sample x = samples[done] = one_round(&s, done + 1);
        done++;
        if (csv == NULL) continue;
        fprintf(csv, "%zu,%.0f,%.1f,%.2f,%.2f,%.3f,%llu,%llu,%llu,%llu\n", done, x.ingest_per_s, x.token_us, x.ask_ms,
                x.still_ms, x.verify_s, (unsigned long long)x.file, (unsigned long long)x.used,
                (unsigned long long)x.free, (unsigned long long)x.anon);
        fflush(csv);
    }
    int code = report(&s, samples, done, since(began));
    if (csv != NULL) fclose(csv);
    cairn_store_close(s.store);
    cairn_store_close(s.still);
    cairn_model_close(s.model);
    free(s.text);
    test_remove_dir(dir);
    return code;
}
