/* f32.c - the bodies in float, over our kernels and OpenBLAS: what trains. */
#include "train_internal.h"

#include "kernels_internal.h"

#include <assert.h>
#include <math.h>

#define real        float
#define TRAIN(name) cairn_train_##name##_f32

/* The arithmetic the bodies are written in. */
typedef const cairn_kernels *kernels_of_real;
#define best_kernels                 cairn_kernels_best
#define vec_dot(kn, a, b, n)         (kn)->dot(a, b, n)
#define vec_scale(kn, x, a, n)       (kn)->scale(x, a, n)
#define vec_max(kn, x, n)            (kn)->max(x, n)
#define vec_exp(kn, x, m, n)         (kn)->exp_shift(x, m, n)
#define vec_norm(kn, ...)            (kn)->rms_norm(__VA_ARGS__)
#define vec_norm_backward(kn, ...)   (kn)->rms_norm_backward(__VA_ARGS__)
#define vec_swiglu(kn, ...)          (kn)->swiglu(__VA_ARGS__)
#define vec_swiglu_backward(kn, ...) (kn)->swiglu_backward(__VA_ARGS__)
#define vec_rotate(kn, ...)          (kn)->rotate(__VA_ARGS__)
#define vec_transpose(kn, ...)       (kn)->transpose(__VA_ARGS__)
/* y (n) = x (n, D) w */
#define vec_matvec(kn, y, x, D, n, w)     (kn)->matvec(y, x, CAIRN_W_F32, D, 0, n, w)
#define vec_row_softmax(kn, ...)          (kn)->row_softmax(__VA_ARGS__)
#define vec_row_softmax_backward(kn, ...) (kn)->row_softmax_backward(__VA_ARGS__)
#define product                           cairn_product
#define gemm                              cairn_gemm
enum { GEMM_SCRATCH = CAIRN_GEMM_SCRATCH };
#define gemm_nt cairn_gemm_nt
#define gemm_nn cairn_gemm_nn
#define gemm_tn cairn_gemm_tn

#include "body_softmax.h"

#include "body_attention.h"

#include "body_guide.h"

#include "body_attend.h"

#include "body_dense.h"

#include "body_model.h"
