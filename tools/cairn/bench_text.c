/* bench_text.c - one long text that grows in the store of a bench (bench.h). */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

int bench_lengths_check(cli *c, cli_numbers tokens)
{
    for (size_t i = 1; i < tokens.n; i++)
        if (tokens.items[i] <= tokens.items[i - 1])
            return cli_usage(c, "--tokens: lengths ascend, %llu does not follow %llu",
                             (unsigned long long)tokens.items[i], (unsigned long long)tokens.items[i - 1]);
    return -1;
}

int bench_text_open(bench *b, uint64_t tokens, bench_text *out)
{
    uint64_t bytes = tokens - bench_has_bos(b);
    *out = (bench_text){.b = b};
    int code = bench_needs_bytes(b, bytes);
    if (code >= 0) return code;
    char *text = malloc(bytes);
    if (text == NULL)
        return cli_fail(b->c, EXIT_FAILED, "out of memory: a text of %llu bytes", (unsigned long long)bytes);
    cairn_status st = cairn_corpus_read(b->corpus, CAIRN_SPLIT_HELD_OUT, 0, bytes, text);
    if (st != CAIRN_OK)
        code = cli_fail_status(b->c, st);
    else if ((out->tokens = bench_encode(b, true, text, bytes, &out->n)) == NULL)
        code = EXIT_FAILED;
    free(text);
    return code;
}

void bench_text_close(bench_text *t)
{
    free(t->tokens);
    *t = (bench_text){0};
}

int bench_text_grow(bench_text *t, uint64_t to, progress *bar, bench_costs *costs)
{
    bench *b = t->b;
    cairn_session_options opt = b->options;
    cairn_step_stats stats;
    bench_stream stream = {0};
    bench_costs sum = {.tokens = to - t->stored};
    cairn_policy_init(&opt.policy, sizeof opt.policy,
                      b->model.shape); /* the options' policy is of what is asked later */
    uint64_t start = cli_now_ns();
    int code = bench_stream_begin(b, &opt, &stream);
    const size_t piece = bench_piece(b);
    while (code < 0 && t->stored < to) {
        size_t n = to - t->stored < piece ? (size_t)(to - t->stored) : piece;
        code = bench_stopped(b);
        cairn_status st = code < 0 ? cairn_runtime_feed(stream.runtime, t->tokens + t->stored, n, NULL) : CAIRN_OK;
        t->stored += n;
        /* As ingest does: a sixteenth of the budget, so that a commit's second copy stays within it. */
        if (code < 0 && st == CAIRN_OK &&
            (t->stored == to || cairn_session_pending_bytes(stream.session) >= b->options.ram_bytes / 16)) {
            uint64_t before = cli_now_ns();
            st = cairn_session_commit(stream.session, t->stored == to ? &(cairn_input){.complete = true} : NULL);
            sum.commit += (double)(cli_now_ns() - before) * 1e-9;
        }
        if (st != CAIRN_OK) code = cli_fail_status(b->c, st);
        if (bar != NULL) progress_show(bar, t->stored, t->n);
    }
    sum.all = (double)(cli_now_ns() - start) * 1e-9;
    if (code < 0) {
        cairn_session_stats(stream.session, &stats);
        sum.search = (double)stats.search_ns * 1e-9;
        sum.fetch = (double)stats.fetch_ns * 1e-9;
        sum.attend = (double)stats.attend_ns * 1e-9;
    }
    bench_stream_end(&stream);
    if (costs != NULL) *costs = sum;
    return code;
}
