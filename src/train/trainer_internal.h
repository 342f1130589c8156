/* trainer_internal.h - the trainer's own parts, for trainer.c and checkpoint.c. */
#ifndef CAIRN_TRAINER_INTERNAL_H
#define CAIRN_TRAINER_INTERNAL_H

#include "lesson_internal.h"

#include "kernels_internal.h"

/* One worker's: windows i, i + lanes, ... of an update run here, one after the other. */
typedef struct cairn_lane {
    cairn_train_model_f32 *model;
    cairn_lesson lesson;
    cairn_lesson_window window;
    float *grads; /* (total) */
    float *nll;
    uint8_t *right;
    double loss;   /* sum of weight * -ln p, and of guidance */
    double weight; /* sum of weights */
    cairn_train_report report;
    cairn_status status; /* of making lessons */
    char error[256];
} cairn_lane;

struct cairn_trainer {
    cairn_trainer_options opt;
    const cairn_model *source; /* the model it began with, or NULL */
    cairn_lesson_vocab vocab;
    const cairn_corpus *corpus;
    double bytes_per_token; /* of lessons */
    cairn_train_stage *stages;
    size_t n_stages;
    uint64_t steps; /* of all stages */
    uint64_t step;  /* updates done */
    uint32_t window_max;
    uint8_t *local_layers;
    cairn_train_layout *layout;
    float *params;
    cairn_train_rates rates;
    cairn_train_optimizer optimizer;
    cairn_pool *pool;
    const cairn_kernels *kernels; /* that make opt.products */
    cairn_lane *lanes;
    size_t n_lanes;
};

#endif
