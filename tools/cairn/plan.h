/* plan.h - the file of a training run: the model, the seed and the stages, as JSON (docs/training.md). */
#ifndef CAIRN_CLI_PLAN_H
#define CAIRN_CLI_PLAN_H

#include "cli.h"

#include <cairn/train.h>

typedef struct plan {
    char name[64]; /* of the model */
    cairn_trainer_options options;
    cairn_train_stage *stages; /* a stage starts from what the one before had */
    size_t n;
} plan;

/* Returns -1 to go on, or the exit code after saying what is wrong: a field no plan has, a value that is no number. */
int plan_read(cli *c, const char *path, plan *out);
void plan_wipe(plan *p);

#endif
