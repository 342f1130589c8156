/* amx.h - how a thread's tile registers are shaped: eight of up to 16 rows of 64 bytes. */
#ifndef CAIRN_KERNELS_AMX_H
#define CAIRN_KERNELS_AMX_H

#include <stdbool.h>
#include <stdint.h>

/* What ldtilecfg reads. Byte products take row_bytes of A and four times as many rows of B. */
typedef struct amx_shapes {
    uint8_t palette, first_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_shapes;

/* What this thread loaded last and has not released, as far as this room knows. */
extern _Thread_local const amx_shapes *cairn_amx_shapes;

/* What tiles are about to load is in memory: the intrinsics that load do not tell the compiler that they read it. */
#define WRITTEN() __asm__ volatile("" ::: "memory")

/* Asks Linux, once in a process, for the state of tiles, 8 KB a thread; false if it refuses. Only where
 * cairn_kernels_amx gives a table. */
bool cairn_amx_allowed(void);

#endif
