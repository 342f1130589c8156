/* prompt.c - any bytes as a prompt, UTF-8 or not.
 *
 *   byte 0   bit 0: a vocabulary of pieces instead of one of bytes
 *   then     the prompt
 *
 * Every prompt has tokens, none out of range, and they spell the prompt again byte for byte (a vocabulary of pieces
 * puts a space before it and reads its space mark as a space). Shown to a person it is one line without control
 * characters, as JSON it is a string of valid UTF-8. */
#include "fuzz.h"

#include "output.h"
#include "support.h"
#include "tiny_vocab.h"

static cairn_model *models[2];

static void begin(void)
{
    char *dir = test_make_dir(), *path = test_path(dir, "file");
    for (int i = 0; i < 2; i++) {
        tiny_model m = tiny_model_default();
        m.width = 8;
        m.layers = 1;
        m.hidden = 8;
        m.block_tokens = 0;
        m.vocab = i == 1 ? TINY_PIECES : 0;
        cairn_gguf_writer *w = tiny_model_begin(&m);
        if (i == 1) tiny_put_spm(w, "<last>");
        must(cairn_gguf_writer_save(w, path) == CAIRN_OK);
        cairn_gguf_writer_free(w);
        must(cairn_model_open(path, &models[i]) == CAIRN_OK);
    }
    free(path);
    test_remove_dir(dir);
}

static void check_tokens(const cairn_model *model, bool pieces, const uint8_t *text, size_t size)
{
    size_t n = 0, short_n = 0, at = 0;
    must(cairn_model_encode(model, text, size, NULL, 0, &n) == CAIRN_OK);
    cairn_token *tokens = malloc((n + 1) * sizeof *tokens);
    char *spelled = malloc(64 * n + 1);
    must(tokens != NULL && spelled != NULL);
    must(cairn_model_encode(model, text, size, tokens, n, &short_n) == CAIRN_OK && short_n == n);
    for (size_t i = 0; i < n; i++) {
        must(tokens[i] >= 0);
        size_t bytes = cairn_model_decode(model, tokens[i], spelled + at, 64);
        must(bytes <= 64);
        at += bytes;
    }
    if (!pieces) {
        must(at == size && memcmp(spelled, text, size) == 0);
    } else if (size != 0) {
        bool fixed = size >= 6 && memcmp(text, "<tool>", 6) == 0; /* no space before a piece that is never joined */
        size_t j = 0;
        must(fixed || (at > 0 && spelled[j++] == ' '));
        for (size_t i = 0; i < size; i++, j++) {
            must(j < at);
            bool mark = size - i >= 3 && memcmp(text + i, TINY_MARK, 3) == 0;
            must(spelled[j] == (mark ? ' ' : (char)text[i]));
            if (mark) i += 2;
        }
        must(j == at);
    }
    free(tokens);
    free(spelled);
}

static void check_shown(const uint8_t *text, size_t size)
{
    enum { MOST = 40 };
    char *line = printable_text((const char *)text, size, MOST);
    must(line != NULL && strlen(line) <= MOST + 3);
    for (const uint8_t *p = (const uint8_t *)line; *p != 0; p++) must(*p >= 0x20 && *p != 0x7f);
    json_t *check = json_string(line); /* refuses what is not UTF-8 */
    must(check != NULL);
    json_decref(check);
    free(line);
    json_t *value = json_bytes((const char *)text, size);
    must(value != NULL);
    json_t *valid = json_stringn(json_string_value(value), json_string_length(value));
    must(valid != NULL);
    char *dumped = json_dumps(value, JSON_ENCODE_ANY);
    must(dumped != NULL);
    json_t *again = json_loads(dumped, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    must(again != NULL && json_equal(value, again));
    json_decref(again);
    json_decref(valid);
    json_decref(value);
    free(dumped);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    if (models[0] == NULL) begin();
    bool pieces = (data[0] & 1) != 0;
    uint8_t *text = fuzz_copy(data + 1, size - 1);
    check_tokens(models[pieces], pieces, text, size - 1);
    check_shown(text, size - 1);
    free(text);
    return 0;
}
