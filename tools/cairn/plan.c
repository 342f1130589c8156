/* plan.c - reads the file of a training run. Fields are checked by name and kind here, by value in the library. */
#include "plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct field {
    const char *name;
    size_t at;
    enum { FIELD_U32, FIELD_U64, FIELD_REAL } kind;
} field;

#define MODEL(kind, name)                                                                                              \
    {                                                                                                                  \
#name, offsetof(cairn_trainer_options, name), kind                                                             \
    }
#define STAGE(kind, name)                                                                                              \
    {                                                                                                                  \
#name, offsetof(cairn_train_stage, name), kind                                                                 \
    }

static const field model_fields[] = {
    MODEL(FIELD_U32, width),        MODEL(FIELD_U32, layers),       MODEL(FIELD_U32, heads),
    MODEL(FIELD_U32, kv_heads),     MODEL(FIELD_U32, head_dim),     MODEL(FIELD_U32, hidden),
    MODEL(FIELD_U32, block_tokens), MODEL(FIELD_U32, clamp_blocks), MODEL(FIELD_U32, window_blocks),
    MODEL(FIELD_U32, top_k),        MODEL(FIELD_U32, local_layers), MODEL(FIELD_U32, local_window_blocks),
    MODEL(FIELD_U32, guided_layer), MODEL(FIELD_U32, guided_heads), MODEL(FIELD_U32, remembered),
    MODEL(FIELD_U32, segment),      MODEL(FIELD_U64, seed),         MODEL(FIELD_U32, threads),
    MODEL(FIELD_REAL, rope_theta),  MODEL(FIELD_U32, kept_blocks),  MODEL(FIELD_U32, guided_apart),
};

static const field stage_fields[] = {
    STAGE(FIELD_U64, steps),          STAGE(FIELD_U32, window),       STAGE(FIELD_U32, windows),
    STAGE(FIELD_U32, warmup),         STAGE(FIELD_REAL, adam),        STAGE(FIELD_REAL, muon),
    STAGE(FIELD_REAL, floor),         STAGE(FIELD_REAL, dense),       STAGE(FIELD_REAL, text),
    STAGE(FIELD_U32, facts),          STAGE(FIELD_U32, questions),    STAGE(FIELD_REAL, plain),
    STAGE(FIELD_REAL, said),          STAGE(FIELD_REAL, interleaved), STAGE(FIELD_REAL, short_form),
    STAGE(FIELD_REAL, grass),         STAGE(FIELD_REAL, numbers),     STAGE(FIELD_REAL, text_weight),
    STAGE(FIELD_REAL, answer_weight), STAGE(FIELD_REAL, guide),       STAGE(FIELD_U32, distractors),
    STAGE(FIELD_U32, rivals),         STAGE(FIELD_REAL, cut),         STAGE(FIELD_REAL, alike),
};

static int read_fields(cli *c, const char *path, const char *where, const json_t *object, const field *fields, size_t n,
                       void *out)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
    {
        const char *names[32];
        size_t i = 0;
        for (size_t f = 0; f < n; f++) names[f] = fields[f].name;
        while (i < n && strcmp(fields[i].name, key) != 0) i++;
        if (i == n) {
            const char *nearest = cli_nearest(key, names, n);
            return cli_fail(c, EXIT_FAILED, "'%s': %s has a field '%s' that is not known%s%s%s", path, where, key,
                            nearest != NULL ? " (did you mean '" : "", nearest != NULL ? nearest : "",
                            nearest != NULL ? "'?)" : "");
        }
        char *at = (char *)out + fields[i].at;
        const json_int_t whole = json_integer_value(value);
        const bool count = json_is_integer(value) && whole >= 0;
        if (fields[i].kind == FIELD_REAL && json_is_number(value) && isfinite(json_number_value(value)))
            *(float *)at = (float)json_number_value(value);
        else if (fields[i].kind == FIELD_U64 && count)
            *(uint64_t *)at = (uint64_t)whole;
        else if (fields[i].kind == FIELD_U32 && count && whole <= UINT32_MAX)
            *(uint32_t *)at = (uint32_t)whole;
        else
            return cli_fail(c, EXIT_FAILED, "'%s': %s: '%s' should be a %snumber that is not negative", path, where,
                            key, fields[i].kind == FIELD_REAL ? "" : "whole ");
    }
    return -1;
}

/* "attention" is a word: takes it out of the model's fields. */
static int read_attention(cli *c, const char *path, json_t *model, cairn_trainer_options *out)
{
    static const char *const words[] = {"landmark", "dense", "xl"};
    const json_t *value = json_object_get(model, "attention");
    if (value == NULL) return -1;
    for (int i = 0; i < 3; i++) {
        if (!json_is_string(value) || strcmp(json_string_value(value), words[i]) != 0) continue;
        out->attention = (cairn_train_attention)i;
        json_object_del(model, "attention");
        return -1;
    }
    return cli_fail(c, EXIT_FAILED, "'%s': model: 'attention' should be \"landmark\", \"dense\" or \"xl\"", path);
}

static int read_stage(cli *c, const char *path, size_t number, json_t *stage, plan *p)
{
    char where[64];
    const char *name = json_string_value(json_object_get(stage, "name"));
    cairn_train_stage *s = &p->stages[number];
    snprintf(where, sizeof where, "stage %zu", number + 1);
    if (!json_is_object(stage)) return cli_fail(c, EXIT_FAILED, "'%s': %s is no object", path, where);
    if (number == 0)
        cairn_train_stage_init(s);
    else
        *s = p->stages[number - 1];
    snprintf(s->name, sizeof s->name, "%.31s", name != NULL ? name : where);
    json_object_del(stage, "name");
    return read_fields(c, path, where, stage, stage_fields, CLI_COUNT_OF(stage_fields), s);
}

void plan_wipe(plan *p)
{
    free(p->stages);
    *p = (plan){0};
}

int plan_read(cli *c, const char *path, plan *out)
{
    json_error_t error;
    json_t *root = strcmp(path, "-") == 0 ? json_loadf(stdin, JSON_REJECT_DUPLICATES, &error)
                                          : json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    *out = (plan){0};
    if (root == NULL) return cli_fail(c, EXIT_FAILED, "plan '%s': %s (line %d)", path, error.text, error.line);
    json_t *model = json_object_get(root, "model"), *stages = json_object_get(root, "stages");
    const char *name = json_string_value(json_object_get(root, "name"));
    int code = -1;
    cairn_trainer_options_init(&out->options, sizeof out->options);
    snprintf(out->name, sizeof out->name, "%s", name != NULL ? name : "cairn");
    out->n = json_array_size(stages); /* 0 for what is no array */
    out->stages = calloc(out->n + 1, sizeof *out->stages);
    if (out->stages == NULL)
        code = cli_fail(c, EXIT_FAILED, "out of memory: %zu stages", out->n);
    else if (out->n == 0)
        code = cli_fail(c, EXIT_FAILED, "plan '%s' has no list of \"stages\"", path);
    if (code < 0 && model != NULL) code = read_attention(c, path, model, &out->options);
    if (code < 0 && model != NULL)
        code = read_fields(c, path, "model", model, model_fields, CLI_COUNT_OF(model_fields), &out->options);
    for (size_t i = 0; code < 0 && i < out->n; i++) code = read_stage(c, path, i, json_array_get(stages, i), out);
    json_decref(root);
    if (code >= 0) plan_wipe(out);
    return code;
}
