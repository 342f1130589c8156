/* train_internal.h - forward and backward of a landmark transformer over one training window.
 *
 * Every routine that computes exists twice, compiled from one source (body_*.h): *_f32 over our kernels and OpenBLAS,
 * which trains, and *_f64 in plain loops, the witness: central differences in double say whether a gradient is right,
 * and the same text in float is then right too, up to rounding.
 *
 * One object works on one window in one thread. Threads train by having an object and a gradient each, summed in a
 * fixed order, so that a run depends on its seed and number of threads alone.
 */
#ifndef CAIRN_TRAIN_INTERNAL_H
#define CAIRN_TRAIN_INTERNAL_H

#include <cairn/attention.h>

#include "base_internal.h"

#define real        float
#define TRAIN(name) cairn_train_##name##_f32
#include "body_decls.h"
#undef real
#undef TRAIN

#define real        double
#define TRAIN(name) cairn_train_##name##_f64
#include "body_decls.h"
#undef real
#undef TRAIN

#endif
