/* vocab_words.c - the words a byte-pair vocabulary was trained on, by the pattern each model family has in its
 * tokenizer.json; GGUF names them in tokenizer.ggml.pre. A near miss would be silent damage, so a name that is not in
 * the table is not guessed at.
 *
 * PCRE2 knows Unicode. Its \s is not that of the patterns (U+180E is in it), so white space is spelled out. */
#include "vocab_internal.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#define SPACE                                                                                                          \
    "\\t\\n\\x0b\\f\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define TRAILING_SPACE "[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+"
#define CONTRACTION    "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define GPT2           "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|" TRAILING_SPACE
#define AFTER_LETTERS(digits, ends)                                                                                    \
    digits "| ?[^" SPACE "\\p{L}\\p{N}]+[" ends "]*|[" SPACE "]*[\\r\\n]+|" TRAILING_SPACE
#define LLAMA3(digits) CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" AFTER_LETTERS(digits, "\\r\\n")
#define UPPER          "\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}"
#define LOWER          "\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}"
#define TEKKEN                                                                                                         \
    "[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]*[" LOWER "]+|[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]+[" LOWER                         \
    "]*|" AFTER_LETTERS("\\p{N}", "\\r\\n/")

enum { STAGES = 2 };

typedef struct family {
    const char *patterns[STAGES]; /* one after the other: what the first one cut is cut by the next */
    bool whole_first, after_bos;
    const char *names[8];
} family;

static const family families[] = {
    {{LLAMA3("\\p{N}{1,3}")}, true, true, {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"}},
    {{LLAMA3("\\p{N}{1,3}")}, false, false, {"dbrx", "smaug-bpe"}},
    {{LLAMA3("\\p{N}")}, false, false, {"qwen2", "deepseek-r1-qwen", "stablelm2"}},
    {{GPT2}, false, false, {"gpt-2", "olmo", "mpt", "phi-2"}},
    {{"\\p{N}", GPT2}, false, false, {"smollm", "starcoder", "refact", "command-r"}},
    {{TEKKEN}, true, true, {"tekken"}},
};

struct words {
    const family *family;
    pcre2_general_context *memory;
    pcre2_match_context *limits;
    pcre2_code *codes[STAGES];
};

static void *take_memory(size_t bytes, void *tag)
{
    (void)tag;
    return cairn_alloc(bytes);
}
static void give_memory(void *p, void *tag)
{
    (void)tag;
    cairn_free(p);
}

static const family *find_family(gguf_text pre)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        for (size_t j = 0; j < sizeof families[i].names / sizeof *families[i].names; j++)
            if (families[i].names[j] != NULL && gguf_text_is(pre, families[i].names[j])) return &families[i];
    return NULL;
}

cairn_status words_new(gguf_text pre, words **out)
{
    const family *known = find_family(pre);
    *out = NULL;
    if (known == NULL) return CAIRN_OK;
    words *w = cairn_calloc(1, sizeof *w);
    if (w == NULL) return cairn_fail(CAIRN_NO_MEMORY, "the pattern of '%s'", known->names[0]);
    w->family = known;
    w->memory = pcre2_general_context_create(take_memory, give_memory, NULL);
    w->limits = w->memory != NULL ? pcre2_match_context_create(w->memory) : NULL;
    bool made = w->limits != NULL;
    pcre2_compile_context *compiling = made ? pcre2_compile_context_create(w->memory) : NULL;
    made = compiling != NULL;
    for (int i = 0; made && i < STAGES && known->patterns[i] != NULL; i++) {
        int error;
        PCRE2_SIZE at;
        w->codes[i] = pcre2_compile((PCRE2_SPTR)known->patterns[i], PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                                    &error, &at, compiling);
        made = w->codes[i] != NULL;
        if (made) pcre2_jit_compile(w->codes[i], PCRE2_JIT_COMPLETE); /* or slowly */
    }
    pcre2_compile_context_free(compiling);
    if (!made) {
        words_free(w);
        return cairn_fail(CAIRN_NO_MEMORY, "the pattern of '%s'", known->names[0]);
    }
    /* No pattern can go astray: a run of a kind is read once, and at most once back. */
    pcre2_set_match_limit(w->limits, UINT32_MAX);
    pcre2_set_depth_limit(w->limits, UINT32_MAX);
    pcre2_set_heap_limit(w->limits, UINT32_MAX);
    *out = w;
    return CAIRN_OK;
}

void words_free(words *w)
{
    if (w == NULL) return;
    for (int i = 0; i < STAGES; i++) pcre2_code_free(w->codes[i]);
    pcre2_match_context_free(w->limits);
    pcre2_general_context_free(w->memory);
    cairn_free(w);
}

bool words_whole_first(const words *w)
{
    return w->family->whole_first;
}
bool words_after_bos(const words *w)
{
    return w->family->after_bos;
}

typedef struct cutter {
    const words *w;
    pcre2_match_data *match;
    words_take take;
    void *state;
    token_sink *out;
} cutter;

static cairn_status failed_match(int code)
{
    char why[128] = "";
    pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
    return cairn_fail(code == PCRE2_ERROR_NOMEMORY ? CAIRN_NO_MEMORY : CAIRN_UNSUPPORTED, "text into words: %s", why);
}

/* Valid UTF-8 by the patterns from `stage` on; what lies between two matches is cut by the next one too. */
static cairn_status cut(const cutter *c, int stage, const uint8_t *text, size_t bytes)
{
    if (bytes == 0) return CAIRN_OK;
    if (stage == STAGES || c->w->codes[stage] == NULL) return c->take(c->state, text, bytes, c->out);
    cairn_status st = CAIRN_OK;
    for (size_t at = 0, begin, end; st == CAIRN_OK && at < bytes; at = end) {
        int found = pcre2_match(c->w->codes[stage], text, bytes, at, PCRE2_NO_UTF_CHECK, c->match, c->w->limits);
        if (found < 0 && found != PCRE2_ERROR_NOMATCH) return failed_match(found);
        const PCRE2_SIZE *place = pcre2_get_ovector_pointer(c->match);
        begin = found < 0 ? bytes : place[0];
        end = found < 0 ? bytes : place[1];
        st = cut(c, stage + 1, text + at, begin - at);
        if (st == CAIRN_OK) st = cut(c, stage + 1, text + begin, end - begin);
    }
    return st;
}

cairn_status words_each(const words *w, const uint8_t *text, size_t bytes, words_take take, void *state,
                        token_sink *out)
{
    cutter c = {w, pcre2_match_data_create(1, w->memory), take, state, out};
    cairn_status st = CAIRN_OK;
    if (c.match == NULL) return cairn_fail(CAIRN_NO_MEMORY, "encoding %zu bytes of text", bytes);
    while (st == CAIRN_OK && bytes != 0) {
        /* Only for what it says of the text: where the first byte is that is no UTF-8. */
        int found = pcre2_match(w->codes[0], text, bytes, 0, PCRE2_ANCHORED, c.match, w->limits);
        bool broken = found <= PCRE2_ERROR_UTF8_ERR1 && found >= PCRE2_ERROR_UTF8_ERR21;
        size_t valid = broken ? pcre2_get_startchar(c.match) : bytes;
        st = cut(&c, 0, text, valid);
        if (st == CAIRN_OK && broken) st = take(state, text + valid++, 1, out);
        text += valid;
        bytes -= valid;
    }
    pcre2_match_data_free(c.match);
    return st;
}
