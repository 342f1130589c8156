/* twins_internal.h - the tables behind the getters of dispatch.c; touch one only after its CPU check. */
#ifndef CAIRN_KERNELS_TWINS_INTERNAL_H
#define CAIRN_KERNELS_TWINS_INTERNAL_H

#include "kernels_internal.h"

extern const cairn_kernels cairn_kernels_avx2_table;
extern const cairn_kernels cairn_kernels_avx512_table;
extern const cairn_kernels cairn_kernels_avx512_vnni_table; /* the same but for the scan */

#endif
