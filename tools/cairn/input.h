/* input.h - the text to ingest: one stream of tokens out of one or more files, and the identity of that stream.
 *
 * Files are read in pieces, never whole, when the vocabulary is one of bytes: the memory of an ingest does not grow
 * with its text. Other vocabularies merge across any cut, so there each file is encoded in one go.
 * What is not a regular file (-, a pipe) is first copied into an unlinked temporary file, because it is read twice.
 */
#ifndef CAIRN_CLI_INPUT_H
#define CAIRN_CLI_INPUT_H

#include "cli.h"

#include <cairn/model.h>

typedef struct input input;

/* Opens the files and reads them once for their length and hash. Returns -1 or the exit code; on failure *out is NULL.
 * CTRL-C during the reading fails too. */
int input_open(cli *c, const char *const *paths, size_t n, const cairn_model *model, input **out);
void input_close(input *in);           /* NULL is fine */
uint64_t input_bytes(const input *in); /* of all files */
/* XXH3-64 of the file; for several files, of their hashes and lengths in order (their borders are part of the text). */
uint64_t input_hash(const input *in);
/* The next at most `cap` tokens of the stream, BOS before each file if the model has one. *out_n = 0 at the end.
 * At the end the text is compared with its hash: a file that changed meanwhile is an error. -1 or the exit code. */
int input_next(cli *c, input *in, cairn_token *tokens, size_t cap, size_t *out_n);
uint64_t input_position(const input *in); /* bytes consumed so far */

#endif
