/* store_swap.h - two tiles of a store in each other's place, as flipped page numbers in a leaf of LMDB would put them.
 */
#ifndef CAIRN_TESTS_STORE_SWAP_H
#define CAIRN_TESTS_STORE_SWAP_H

#include "support.h"

#include <store_internal.h>

#include <stdlib.h>

static inline void swap_tiles(cairn_store *store, cairn_tile_id a, cairn_tile_id b)
{
    uint8_t keys[2][KEY_TILE_BYTES];
    void *copies[2];
    MDB_val value;
    MDB_txn *txn;
    store_key_tile(keys[0], a);
    store_key_tile(keys[1], b);
    assert_ok(store_write_begin(store, "swap", &txn));
    for (int i = 0; i < 2; i++) {
        MDB_val key = {KEY_TILE_BYTES, keys[i]};
        assert_int_equal(mdb_get(txn, store->env->data.dbi[DB_TILE], &key, &value), 0);
        copies[i] = malloc(value.mv_size);
        memcpy(copies[i], value.mv_data, value.mv_size);
    }
    for (int i = 0; i < 2; i++) {
        MDB_val key = {KEY_TILE_BYTES, keys[i]}, other = {value.mv_size, copies[1 - i]};
        assert_int_equal(mdb_put(txn, store->env->data.dbi[DB_TILE], &key, &other, 0), 0);
    }
    assert_ok(store_write_commit(store, "swap", &txn));
    free(copies[0]), free(copies[1]);
}

#endif
