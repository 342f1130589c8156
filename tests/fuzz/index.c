/* index.c - any bytes as the files of a landmark index.
 *
 *   byte 0   % 3: 0 = a manifest; 1 = an index file whose hash is not the one the store holds; 2 = what follows FAISS's
 *            bytes in an index file, behind good ones, the hash being right
 *   byte 1   of 0: how many files the manifest should name; else the kind of index
 *   then     the file
 *
 * A file that is refused leaves an index that answers exactly as one that never had a file. One that is accepted
 * answers with rows that exist and their own scores.
 *
 * FAISS's own bytes are not changed with their hash put right: FAISS believes the lengths it reads, so a file that only
 * looks like Cairn's must be told by its hash, which is in the segment record (docs/hardness.md). */
#include "fuzz.h"
#include "support.h"

#include "context_internal.h"
#include "index_internal.h"

enum { DIM = 8, ROWS = 48, K = 4 };
static const char *const kinds[] = {"flat", "sq8", "IVF4,Flat:nprobe=2", "HNSW4", "PCA4,Flat", "PQ2x2"};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static float rows[ROWS * DIM];
static struct {
    cairn_index *index; /* loads every file: making one takes FAISS longer than all the rest */
    uint8_t *bytes;     /* what FAISS writes, and then the foot */
    size_t n;
} good[N_KINDS];

static cairn_index *filled(unsigned kind)
{
    cairn_index *index;
    must(cairn_index_new(kinds[kind], DIM, CAIRN_F32, &index) == CAIRN_OK);
    must(cairn_index_add(index, ROWS, rows) == CAIRN_OK);
    return index;
}

static void begin(void)
{
    uint64_t state = 1;
    char *dir = test_make_dir(), *path = test_path(dir, "file");
    for (size_t i = 0; i < ROWS * DIM; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        rows[i] = (float)(int32_t)(state >> 32) * 0x1p-30f;
    }
    for (unsigned i = 0; i < N_KINDS; i++) {
        cairn_index *index = good[i].index = filled(i);
        uint64_t hash;
        must(cairn_index_seal(index, ROWS) == CAIRN_OK);
        must(cairn_index_save(index, path, &hash) == CAIRN_OK);
        FILE *f = fopen(path, "rb");
        must(f != NULL);
        good[i].bytes = malloc(1 << 16);
        must(good[i].bytes != NULL);
        good[i].n = fread(good[i].bytes, 1, 1 << 16, f);
        must(good[i].n > 8 + DIM * 4 && good[i].n < 1 << 16);
        fclose(f);
    }
    free(path);
    test_remove_dir(dir);
}

static void check_answers(const cairn_index *index)
{
    cairn_index_scratch *scratch;
    const cairn_index_query queries[] = {{rows, 0, ROWS}, {rows + 5 * DIM, 10, 40}, {rows + 30 * DIM, 47, 48}};
    cairn_index_hit hits[3 * K];
    uint32_t found[3];
    must(cairn_index_scratch_new(&scratch) == CAIRN_OK);
    must(cairn_index_search(index, scratch, queries, 3, K, hits, found, NULL) == CAIRN_OK);
    for (size_t q = 0; q < 3; q++)
        for (uint32_t i = 0; i < found[q]; i++) {
            float score;
            uint32_t id = hits[q * K + i].id;
            must(id >= queries[q].lo && id < queries[q].hi);
            cairn_index_scores(index, queries[q].q, id, id + 1, &score);
            must(hits[q * K + i].score == score);
        }
    cairn_index_scratch_free(scratch);
}

static void manifest(unsigned n, const uint8_t *bytes, size_t size)
{
    uint64_t hashes[8] = {0};
    n = n % 8 + 1;
    cairn_status st = manifest_read(fuzz_file(bytes, size), cairn_hash64(bytes, size), n, hashes);
    if (st == CAIRN_OK) must(size == 16 + 8 * (size_t)n && cairn_get_le64(bytes + 16) == hashes[0]);
    must(manifest_read(fuzz_file(bytes, size), cairn_hash64(bytes, size) ^ 1, n, hashes) == CAIRN_CORRUPT);
}

static void index_file(unsigned kind, const uint8_t *bytes, size_t size, uint64_t hash, bool refused)
{
    cairn_index *index = good[kind].index;
    const char *path = fuzz_file(bytes, size);
    cairn_status st = cairn_index_load(index, path, hash, ROWS, false);
    must(!refused || st == CAIRN_CORRUPT);
    must(cairn_index_sealed(index) == (st == CAIRN_OK ? ROWS : 0));
    check_answers(index);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) return 0;
    if (good[0].bytes == NULL) begin();
    unsigned what = data[0] % 3, kind = data[1] % N_KINDS;
    const uint8_t *bytes = data + 2;
    size -= 2;
    if (what == 0) {
        manifest(data[1], bytes, size);
    } else if (what == 2) {
        size_t faiss = good[kind].n - 8 - DIM * 4;
        uint8_t *file = malloc(faiss + size);
        must(file != NULL);
        memcpy(file, good[kind].bytes, faiss);
        memcpy(file + faiss, bytes, size);
        index_file(kind, file, faiss + size, cairn_hash64(file, faiss + size), false);
        free(file);
    } else {
        index_file(kind, bytes, size, ~cairn_hash64(bytes, size), true);
    }
    return 0;
}
