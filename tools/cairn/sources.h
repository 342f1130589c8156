/* sources.h - where an answer came from: blocks by attention mass, as spans of the original text. */
#ifndef CAIRN_CLI_SOURCES_H
#define CAIRN_CLI_SOURCES_H

#include "work.h"

typedef struct source_span {
    const char *context; /* name; NULL = the session's own tokens (the prompt and the answer) */
    uint64_t token;      /* first token, counted in that context */
    uint32_t tokens;
    double share; /* of the attention mass that went to blocks */
    char *text;   /* printable, malloc'ed */
} source_span;

typedef struct sources {
    source_span *spans; /* best first, own tokens left out */
    size_t n;
    uint64_t blocks;   /* distinct stored blocks that got any mass */
    const char **idle; /* attached contexts none of whose blocks got any */
    size_t n_idle;
} sources;

/* The `top` best spans of what the session looked at since its statistics were reset. -1 or the exit code. */
int sources_gather(cli *c, cairn_store *store, const model_ref *model, const name_list *contexts,
                   const cairn_session *session, size_t top, sources *out);
void sources_wipe(sources *s);
void sources_print(const sources *s); /* to stderr */
json_t *sources_json(const sources *s);

#endif
