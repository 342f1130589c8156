/* packed.c - any bytes as a packed scan (index/packed.c), the hash put right.
 *
 *   byte 0   bit 0: images are wanted; bit 1: of more than 40 rows the first
 *   then     the pack; its last 8 bytes are overwritten by the hash of the others
 *
 * What is refused leaves an empty index that works. What is accepted answers with rows that exist and their own scores:
 * a sketch is a claim about rows, and one that lies may hide some, but reads nothing that is not there. */
#include "fuzz.h"
#include "support.h"

#include "index_internal.h"

enum { DIM = 16, K = 4, QUERIES = 3 };

typedef struct pack {
    const uint8_t *data;
    size_t n, at;
} pack;

static bool read_pack(void *arg, void *data, size_t bytes)
{
    pack *p = arg;
    if (bytes > p->n - p->at) return false;
    memcpy(data, p->data + p->at, bytes);
    p->at += bytes;
    return true;
}

static void check_answers(const cairn_index *index)
{
    cairn_index_scratch *scratch;
    cairn_index_hit hits[QUERIES * K];
    uint32_t found[QUERIES];
    float q[QUERIES * DIM];
    cairn_index_query queries[QUERIES];
    const uint32_t n = (uint32_t)cairn_index_count(index);
    for (size_t i = 0; i < QUERIES * DIM; i++) q[i] = (float)((int)(i * 37 % 19) - 9) * 0.1f;
    for (size_t i = 0; i < QUERIES; i++) queries[i] = (cairn_index_query){q + i * DIM, (uint32_t)i * n / 8, n};
    must(cairn_index_scratch_new(&scratch) == CAIRN_OK);
    must(cairn_index_search(index, scratch, queries, QUERIES, K, hits, found, NULL) == CAIRN_OK);
    for (size_t i = 0; i < QUERIES; i++)
        for (uint32_t h = 0; h < found[i]; h++) {
            float score;
            const uint32_t id = hits[i * K + h].id;
            must(id >= queries[i].lo && id < queries[i].hi);
            cairn_index_scores(index, queries[i].q, id, id + 1, &score);
            must(hits[i * K + h].score == score);
        }
    cairn_index_scratch_free(scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    cairn_index *index;
    const uint16_t row[DIM] = {0x3c00, 0x4000}; /* f16 */
    if (size < 9) return 0;
    uint8_t *bytes = fuzz_copy(data + 1, size - 1);
    cairn_put_le64(bytes + size - 9, cairn_hash64(bytes, size - 9));
    pack p = {bytes, size - 1, 0};
    must(cairn_index_new("scan", DIM, CAIRN_F16, &index) == CAIRN_OK);
    const size_t upto = (data[0] & 2) != 0 ? 40 : 1 << 16; /* as many as a store has */
    cairn_status st = cairn_index_unpack(index, upto, (data[0] & 1) != 0, read_pack, &p);
    must(st == CAIRN_OK || st == CAIRN_CORRUPT);
    must(st == CAIRN_OK ? cairn_index_count(index) != 0 : cairn_index_count(index) == 0);
    must(cairn_index_add(index, 1, row) == CAIRN_OK);
    check_answers(index);
    cairn_index_free(index);
    free(bytes);
    return 0;
}
