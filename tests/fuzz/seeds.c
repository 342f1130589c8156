/* seeds.c - what the fuzzing of each entry starts from: valid objects of every kind. fuzz_seeds DIR writes them to
 * DIR/<entry>/. Those of the tree (data/fuzz) were made so, run through libFuzzer for some minutes and thinned out. */
#include "fuzz.h"

#include "context_internal.h"
#include "index_internal.h"
#include "store_internal.h"

#include <sys/stat.h>

static const char *root;

static void put(const char *entry, const char *name, const void *head, size_t head_bytes, const void *body,
                size_t body_bytes)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", root, entry);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/%s", root, entry, name);
    FILE *f = fopen(path, "wb");
    must(f != NULL);
    must(fwrite(head, 1, head_bytes, f) == head_bytes && fwrite(body, 1, body_bytes, f) == body_bytes);
    must(fclose(f) == 0);
}

static void put_record(const char *name, unsigned kind, unsigned flags, unsigned geometry, const void *record,
                       size_t bytes)
{
    put("records", name, (uint8_t[]){(uint8_t)kind, (uint8_t)flags, (uint8_t)geometry}, 3, record, bytes);
}

static void records(void)
{
    static const cairn_geometry shapes[] = {
        {.layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16},
        {.layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 8, .block_tokens = 7, .dtype = CAIRN_Q8},
    };
    static const cairn_token tokens[8] = {1, 2, 3, 50000, 0, 7, 8, 9};
    uint8_t payload[512];
    uint8_t out[4096];
    for (size_t i = 0; i < sizeof payload; i++) payload[i] = (uint8_t)(i * 7);
    store_identity identity = {.geometry = shapes[0], .model = {0x1234, "a model"}, .uuid = {1, 2, 3}};
    store_identity_encode(&identity, out);
    put_record("identity", 0, 0, 0, out, IDENTITY_RECORD_BYTES);
    store_ids_encode(3, 9, out);
    put_record("ids", 1, 0, 0, out, IDS_RECORD_BYTES);
    context_record context = {
        .id = 7, .parent = 2, .own_segment = 4, .name = "K\xc3\xa4se/1", .input = {10, 20, 30, true}};
    cairn_range ranges[] = {{4, 0, 2}, {5, 1, 9}};
    store_context_encode(&context, ranges, 2, tokens, 3, out);
    put_record("context", 2, 0, 0, out, store_context_bytes(context.name, 2, 3));
    segment_record segment = {.info = {.id = 7,
                                       .blocks = 4,
                                       .references = 1,
                                       .generation = 2,
                                       .index_kind = "ivf",
                                       .index_made = "scan",
                                       .index_why = "few rows",
                                       .index_blocks = 3},
                              .state = SEGMENT_OPEN,
                              .owner = 7};
    store_segment_encode(&segment, out);
    put_record("segment", 3, 0, 0, out, SEGMENT_RECORD_BYTES);
    for (unsigned i = 0; i < 2; i++) {
        const cairn_geometry *g = &shapes[i];
        const cairn_tile_id id = {7, 3, 1, 1};
        char name[32];
        store_tokens_encode(g, 7, 3, tokens, out);
        snprintf(name, sizeof name, "tokens-%u", i);
        put_record(name, 4, 0, i, out, store_tokens_bytes(g));
        store_landmark_encode(g, 7, 3, payload, out);
        snprintf(name, sizeof name, "landmark-%u", i);
        put_record(name, 5, 0, i, out, store_landmark_bytes(g));
        for (unsigned bare = 0; bare < 2; bare++) {
            size_t bytes = store_tile_bytes(bare ? 0 : 4096, g->dtype, g->block_tokens, g->head_dim);
            store_tile_encode(g, id, 99, payload, out, bytes);
            snprintf(name, sizeof name, "tile-%u%s", i, bare ? "-bare" : "");
            put_record(name, 6, bare ? 2 : 0, i, out, bytes);
        }
    }
    put_record("name", 7, 0, 0, "a/\xe2\x82\xac b", 8);
}

static void archives(const char *dir)
{
    const cairn_geometry g = {
        .layers = 2, .first_layer = 1, .kv_heads = 2, .head_dim = 4, .block_tokens = 5, .dtype = CAIRN_F16};
    uint8_t payload[512] = {1, 2, 3};
    cairn_token tokens[5] = {5, 4, 3, 2, 1};
    cairn_store_options opt;
    cairn_store *store;
    cairn_writer *writer;
    char path[4096];
    uint64_t id;
    snprintf(path, sizeof path, "%s/store", dir);
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.geometry = g;
    opt.model = (cairn_model_id){.fingerprint = 0x1234, .name = "fuzz"};
    must(cairn_store_open(path, &opt, &store) == CAIRN_OK);
    must(cairn_context_create(store, "a", &id) == CAIRN_OK);
    must(cairn_writer_begin(store, "a", &writer) == CAIRN_OK);
    for (int i = 0; i < 3; i++) {
        const cairn_input input = {.bytes = 12, .hash = 34, .complete = true};
        char name[32];
        must(cairn_writer_commit(writer, &(cairn_block_data){tokens, payload, payload}, i > 0, tokens, (size_t)i,
                                 i == 2 ? &input : NULL) == CAIRN_OK);
        snprintf(path, sizeof path, "%s/file", dir);
        must(cairn_context_export(store, "a", path, NULL, NULL) == CAIRN_OK);
        uint8_t bytes[8192];
        FILE *f = fopen(path, "rb");
        must(f != NULL);
        size_t n = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
        snprintf(name, sizeof name, "blocks-%d", i);
        put("archive", name, (uint8_t[]){0}, 1, bytes, n);
    }
    cairn_writer_end(writer);
    cairn_store_close(store);
}

static void index_files(void)
{
    uint8_t text[16 + 16] = "CRNM";
    cairn_put_le32(text + 4, 1);
    cairn_put_le32(text + 8, 2);
    put("index", "manifest", (uint8_t[]){0, 1}, 2, text, sizeof text);
    uint8_t foot[8 + 8 * 4] = "CRNI";
    cairn_put_le32(foot + 4, 8);
    for (uint8_t kind = 0; kind < 6; kind++) {
        char name[32];
        snprintf(name, sizeof name, "foot-%u", kind);
        put("index", name, (uint8_t[]){2, kind}, 2, foot, sizeof foot);
    }
    put("index", "stale", (uint8_t[]){1, 0}, 2, foot, sizeof foot);
}

typedef struct pack {
    uint8_t data[1 << 18];
    size_t n, at;
} pack;

static bool write_pack(void *arg, const void *data, size_t bytes)
{
    pack *p = arg;
    must(bytes <= sizeof p->data - p->n);
    memcpy(p->data + p->n, data, bytes);
    p->n += bytes;
    return true;
}

static bool read_pack(void *arg, void *data, size_t bytes)
{
    pack *p = arg;
    must(bytes <= p->n - p->at);
    memcpy(data, p->data + p->at, bytes);
    p->at += bytes;
    return true;
}

/* The first rows of an index of so many that a sketch pays. */
static void packs(void)
{
    enum { DIM = 16, ROWS = 4000, QUERIES = 32, FIRST = 70 };
    static float rows[ROWS * DIM], queries[QUERIES * DIM];
    static uint16_t narrow[ROWS * DIM];
    static pack whole, first;
    uint64_t state = 5;
    for (size_t i = 0; i < ROWS * DIM; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        rows[i] = (float)(int32_t)(state >> 32) * 0x1p-30f / (float)(1 + i % DIM * 2) * (i / DIM % 50 == 7 ? 40 : 1);
    }
    for (size_t i = 0; i < QUERIES * DIM; i++) queries[i] = rows[i * 31 % (ROWS * DIM) / DIM * DIM + i % DIM];
    cairn_kernels_best()->narrow(narrow, rows, CAIRN_F16, ROWS * DIM);
    for (int learnt = 0; learnt < 2; learnt++) {
        cairn_index *index, *part;
        must(cairn_index_new("scan", DIM, CAIRN_F16, &index) == CAIRN_OK);
        must(cairn_index_new("scan", DIM, CAIRN_F16, &part) == CAIRN_OK);
        must(cairn_index_add(index, ROWS, narrow) == CAIRN_OK);
        if (learnt) must(cairn_index_learn(index, queries, QUERIES, 1, 64) == CAIRN_OK && cairn_index_learnt(index));
        whole.n = whole.at = first.n = 0;
        must(cairn_index_pack(index, write_pack, &whole) == CAIRN_OK);
        must(cairn_index_unpack(part, FIRST, false, read_pack, &whole) == CAIRN_OK);
        must(cairn_index_pack(part, write_pack, &first) == CAIRN_OK);
        for (uint8_t how = 0; how < 4; how++) {
            char name[32];
            snprintf(name, sizeof name, "pack-%d-%u", learnt, how);
            put("packed", name, &how, 1, first.data, first.n);
        }
        cairn_index_free(index);
        cairn_index_free(part);
    }
}

static void lines(void)
{
    static const struct {
        uint8_t command;
        const char *name;
        const char *text; /* blanks separate */
    } each[] = {
        {0, "ingest", "store -m m.gguf -c book --append --block-batch=4 book.txt"},
        {1, "ask", "store --model m.gguf -c book --top-k all --mass 0.99 --ram 64M --sources=3 --json what?"},
        {2, "list", "store --json"},
        {3, "stat", "store book --nonsense=1 --json"},
        {4, "show", "store book --count 3 --from 0"},
        {5, "fork", "store a b --at 100"},
        {8, "verify", "--deep -- store"},
        {12, "train", "plan.json --minutes 1e3 --threads=2 -q"},
        {15, "passkey", "-m m.gguf --length 4k,64K,1MiB --top-k 1,2,all --prompts 5 --json"},
        {31, "ppl", "--corpus dir --tokens 0x10 --json"},
    };
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        char text[256];
        size_t n = strlen(each[i].text);
        memcpy(text, each[i].text, n + 1);
        for (size_t j = 0; j < n; j++)
            if (text[j] == ' ') text[j] = 0;
        put("options", each[i].name, &each[i].command, 1, text, n);
    }
}

static void texts(void)
{
    static const char *const each[] = {
        "the heat in the tin <tool> then",        "\xe2\x96\x81the \xe2\x96",  "K\xc3\xa4se \xff\xc3",
        "\xed\xa0\x80 \xf4\x90\x80\x80 \xc0\xaf", "a\tb\r\n\x1b[31m \xc2\x9b", "  two  blanks "};
    for (size_t i = 0; i < sizeof each / sizeof *each; i++)
        for (uint8_t kind = 0; kind < 2; kind++) {
            char name[32];
            snprintf(name, sizeof name, "text-%zu-%u", i, kind);
            put("prompt", name, &kind, 1, each[i], strlen(each[i]));
        }
    static const char plan[] =
        "{\"name\": \"x\", \"model\": {\"width\": 64, \"layers\": 2, \"attention\": \"xl\", \"seed\": 1},"
        " \"stages\": [{\"name\": \"one\", \"steps\": 10, \"adam\": 1e-3}, {\"window\": 64}]}";
    static const char unknown[] = "{\"stages\": [{\"stepz\": 1}]}";
    static const char negative[] = "{\"model\": {\"width\": -1}, \"stages\": [{}]}";
    put("plan", "two-stages", "", 0, plan, sizeof plan - 1);
    put("plan", "unknown", "", 0, unknown, sizeof unknown - 1);
    put("plan", "negative", "", 0, negative, sizeof negative - 1);
}

int main(int argc, char **argv)
{
    char dir[] = "/tmp/cairn-seeds-XXXXXX";
    char remove[64];
    if (argc != 2) {
        fprintf(stderr, "usage: fuzz_seeds DIR\n");
        return 2;
    }
    root = argv[1];
    mkdir(root, 0777);
    must(mkdtemp(dir) != NULL);
    records();
    archives(dir);
    index_files();
    packs();
    lines();
    texts();
    snprintf(remove, sizeof remove, "rm -r %s", dir);
    return system(remove) == 0 ? 0 : 1;
}
