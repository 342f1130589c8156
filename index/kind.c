/* kind.c - what the name of a kind means, and which FAISS recipes are let in.
 *
 * FAISS reports mistakes by exceptions, which the C API turns into codes; but an exception inside one of its OpenMP
 * regions, a failed FAISS_ASSERT or a division by zero ends the process. So a factory string is first looked at as text
 * (no number FAISS would divide by or allocate for without asking), then given to FAISS, whose refusal is passed on,
 * and then compared with a list of recipes whose training, adding, searching, writing and reading were read in FAISS's
 * source and are tested (tests/test_index.c). */
#include "index_internal.h"

#include <ctype.h>
#include <errno.h>
#include <regex.h>
#include <stdlib.h>

enum { NUMBER_MAX = 1 << 20, BITS_MAX = 16 };

static cairn_status check_text(const char *text)
{
    for (const char *p = text; *p != 0;) {
        if (isdigit((unsigned char)*p)) {
            bool bits = p != text && p[-1] == 'x'; /* "PQ16x8": 2^8 centroids */
            unsigned long most = bits ? BITS_MAX : NUMBER_MAX;
            char *end;
            unsigned long value = strtoul(p, &end, 10);
            if (end - p > 8 || value == 0 || value > most)
                return cairn_fail(CAIRN_INVALID, "index kind '%s': %.*s is not in 1..%lu", text, (int)(end - p), p,
                                  most);
            p = end;
        } else if (isalpha((unsigned char)*p) || strchr(",_+", *p) != NULL) {
            p++;
        } else {
            return cairn_fail(CAIRN_INVALID, "index kind '%s': '%c' does not belong in a factory string", text, *p);
        }
    }
    return CAIRN_OK;
}

/* "nprobe=32,efSearch=64": names ParameterSpace knows and that are safe, whole numbers. */
static cairn_status check_params(const char *kind, const char *params)
{
    static const char *const names[] = {"nprobe", "max_codes", "efSearch", "efConstruction", "ht", "k_factor_rf"};
    for (const char *p = params;; p++) {
        const char *name = p;
        while (strncmp(name, "quantizer_", 10) == 0) name += 10;
        size_t length = strcspn(name, "=,");
        bool known = false;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
            known = known || (strlen(names[i]) == length && strncmp(names[i], name, length) == 0);
        if (!known || name[length] != '=')
            return cairn_fail(CAIRN_INVALID,
                              "index kind '%s': '%.*s' is not one of nprobe, max_codes, efSearch, efConstruction, ht, "
                              "k_factor_rf = number",
                              kind, (int)strcspn(p, ","), p);
        char *end;
        const char *digits = name + length + 1;
        unsigned long value = strtoul(digits, &end, 10);
        if (!isdigit((unsigned char)*digits) || (*end != ',' && *end != 0) || value > NUMBER_MAX ||
            (value == 0 && strncmp(name, "ht", 2) != 0 && strncmp(name, "max", 3) != 0))
            return cairn_fail(CAIRN_INVALID, "index kind '%s': %.*s is not a number in 1..%d", kind,
                              (int)strcspn(p, ","), p, NUMBER_MAX);
        p = end;
        if (*p == 0) return CAIRN_OK;
    }
}

cairn_status cairn_kind_parse(const char *text, cairn_kind *out)
{
    if (text == NULL || *text == 0) text = "scan";
    *out = (cairn_kind){.type = CAIRN_KIND_OTHER};
    size_t length = strlen(text);
    if (length >= CAIRN_KIND_TEXT / 2)
        return cairn_fail(CAIRN_INVALID, "index kind of %zu characters: at most %d", length, CAIRN_KIND_TEXT / 2 - 1);
    memcpy(out->name, text, length + 1);
    memcpy(out->factory, text, length + 1);
    char *colon = strchr(out->factory, ':');
    if (colon != NULL) {
        memcpy(out->params, colon + 1, strlen(colon + 1) + 1);
        *colon = 0;
    }
    static const struct {
        const char *name;
        cairn_kind_type type;
        const char *factory;
    } known[] = {
        {"scan", CAIRN_KIND_SCAN, ""},        {"exact", CAIRN_KIND_EXACT, ""},
        {"flat", CAIRN_KIND_FLAT, "Flat"},    {"Flat", CAIRN_KIND_FLAT, "Flat"},
        {"sq8", CAIRN_KIND_OTHER, "SQ8"},     {"ivf", CAIRN_KIND_IVF, "IVF1,Flat"}, /* lists: see cairn_kind_for */
        {"hnsw", CAIRN_KIND_OTHER, "HNSW32"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(out->factory, known[i].name) == 0) {
            out->type = known[i].type;
            memcpy(out->factory, known[i].factory, strlen(known[i].factory) + 1);
            break;
        }
    if (out->type == CAIRN_KIND_SCAN || out->type == CAIRN_KIND_EXACT) {
        if (colon != NULL)
            return cairn_fail(CAIRN_INVALID, "index kind '%s': %s has no parameters", text, out->factory);
        return CAIRN_OK;
    }
    if (strcmp(out->factory, "auto") == 0)
        return cairn_fail(CAIRN_INVALID, "index kind 'auto' stands for a calibration, not for an index");
    if (colon != NULL) {
        cairn_status st = check_params(out->name, out->params);
        if (st != CAIRN_OK) return st;
    }
    return check_text(out->factory);
}

/* Left out on purpose: IDMap (rows are numbered already), NSG and NNDescent (cannot be extended), LSH, RQ, LSQ and the
 * other additive quantizers (not read), everything in parentheses (FAISS_ASSERT on what is inside). */
cairn_status cairn_kind_check(const cairn_kind *kind)
{
    static const char allowed[] =
        "^((PCAW?R?[0-9]+|OPQ[0-9]+(_[0-9]+)?|RR[0-9]*|ITQ[0-9]*|Pad[0-9]+|L2[nN]orm),)*"
        "(Flat|SQ(4|6|8|fp16)|PQ[0-9]+(x[0-9]+)?(np)?|PQ[0-9]+x4fs(_[0-9]+)?"
        "|HNSW[0-9]*([,_](Flat|SQ(4|6|8|fp16)))?"
        "|IVF[0-9]+(_HNSW[0-9]*)?,(Flat|SQ(4|6|8|fp16)|PQ[0-9]+(x[0-9]+)?(np)?|PQ[0-9]+x4fsr?(_[0-9]+)?))"
        "(,RFlat)?$";
    regex_t pattern;
    if (regcomp(&pattern, allowed, REG_EXTENDED | REG_NOSUB) != 0)
        return cairn_fail(CAIRN_NO_MEMORY, "checking index kind '%s'", kind->name);
    errno = 0; /* glibc's regexec says "no match" when it runs out of memory, too */
    int differs = regexec(&pattern, kind->factory, 0, NULL, 0);
    bool starved = differs != 0 && errno == ENOMEM;
    regfree(&pattern);
    if (differs == 0) return CAIRN_OK;
    if (starved) return cairn_fail(CAIRN_NO_MEMORY, "checking index kind '%s'", kind->name);
    return cairn_fail(CAIRN_UNSUPPORTED,
                      "index kind '%s' is known to FAISS but not let in here: use Flat, SQ, PQ, HNSW or IVF with them, "
                      "PCA, OPQ, RR, ITQ, Pad or L2norm before, RFlat after",
                      kind->name);
}

static void append_default(char params[CAIRN_KIND_TEXT], const char *name, size_t value)
{
    if (strstr(params, name) != NULL) return;
    size_t length = strlen(params);
    snprintf(params + length, CAIRN_KIND_TEXT - length, "%s%s=%zu", length != 0 ? "," : "", name, value);
}

/* ivf: about 4 sqrt(n) lists, a power of two, 39 rows or more each (fewer and k-means complains), and a quarter of them
 * probed: on three heads of the demo model (19,047 rows, 512 lists, k 4) 16, 64 and 128 probes hold 63-85, 96-99 and
 * 99.3-99.9 % of the exact hits' gate mass. hnsw: efSearch 128 instead of 16, for the same reason (64: 94-99 %). */
void cairn_kind_for(const cairn_kind *kind, size_t rows, char factory[CAIRN_KIND_TEXT], char params[CAIRN_KIND_TEXT])
{
    memcpy(factory, kind->factory, CAIRN_KIND_TEXT);
    memcpy(params, kind->params, CAIRN_KIND_TEXT);
    if (kind->type == CAIRN_KIND_IVF) {
        size_t lists = 1;
        while (lists < 65536 && lists * lists < 8 * rows && 2 * lists * 39 <= rows) lists *= 2;
        snprintf(factory, CAIRN_KIND_TEXT, "IVF%zu,Flat", lists);
        append_default(params, "nprobe", lists < 4 ? 1 : lists / 4);
    } else if (strstr(factory, "HNSW") == factory) {
        append_default(params, "efSearch", 128);
    }
}

size_t cairn_kind_clusters(const char *factory)
{
    size_t most = 0;
    const char *lists = strstr(factory, "IVF");
    if (lists != NULL) most = strtoul(lists + 3, NULL, 10);
    for (const char *p = strstr(factory, "PQ"); p != NULL; p = strstr(p + 2, "PQ")) { /* OPQ trains a PQ too */
        const char *after = p + 2 + strspn(p + 2, "0123456789");
        size_t bits = *after == 'x' ? strtoul(after + 1, NULL, 10) : 8;
        if (bits <= BITS_MAX && (size_t)1 << bits > most) most = (size_t)1 << bits;
    }
    return most;
}
