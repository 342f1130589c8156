/* checkpoint.c - a trainer's state in one file, and back.
 *
 *   offset  size   field
 *        0     8   magic          "CRNTRAIN"
 *        8     4   version        1
 *       12     4   lanes          workers: part of what a run depends on
 *       16     8   seed
 *       24     8   step           updates done
 *       32     8   updates        of the optimizer
 *       40     8   shape          XXH3-64 of the model's shape
 *       48     8   stages         XXH3-64 of all stages
 *       56     8   parameters     P
 *       64     8   remembered     counters and keys of one lane, in numbers of 8 and of 4 bytes, 32 bits each
 *       72     .   parameters f32 (P), first moments (P), second moments (P); for each lane counters u64, keys f32
 *      end     8   XXH3-64 of all before
 */
#include "trainer_internal.h"

#include <assert.h>
#include <errno.h>

enum { VERSION = 1, HEADER = 72 };
static const char magic[8] = "CRNTRAIN";

/* What of a stage makes a run: all fields after its name, up to the last. There is no gap between them. */
#define STAGE_BYTES (offsetof(cairn_train_stage, alike) + sizeof(float) - offsetof(cairn_train_stage, steps))
static_assert(STAGE_BYTES == 8 + 23 * 4, "a field of a stage is missing here, or there is a gap");

typedef struct lane_memory {
    size_t *counters;
    size_t n_counters;
    float *keys;
    size_t n_keys;
} lane_memory;

static lane_memory memory_of(const cairn_lane *lane)
{
    lane_memory m = {0};
    cairn_train_attention_f32 *attention = cairn_train_model_attention_f32(lane->model);
    if (attention != NULL) cairn_train_attention_memory_f32(attention, &m.counters, &m.n_counters, &m.keys, &m.n_keys);
    return m;
}

static uint64_t hash_shape(const cairn_trainer *t)
{
    const cairn_trainer_options *o = &t->opt;
    uint32_t theta; /* its bits */
    memcpy(&theta, &o->rope_theta, sizeof theta);
    const uint32_t numbers[] = {o->width,
                                o->layers,
                                o->heads,
                                o->kv_heads,
                                o->head_dim,
                                o->hidden,
                                o->block_tokens,
                                o->clamp_blocks,
                                o->local_layers,
                                o->window_blocks,
                                o->local_window_blocks,
                                (uint32_t)o->attention,
                                o->segment,
                                theta};
    uint8_t bytes[sizeof numbers];
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) cairn_put_le32(bytes + 4 * i, numbers[i]);
    return cairn_hash64(bytes, sizeof bytes);
}

/* What is trained for: which heads are guided, and the stages. */
static uint64_t hash_stages(const cairn_trainer *t)
{
    const uint32_t guided[] = {t->opt.guided_layer, t->opt.guided_heads, t->opt.guided_apart};
    uint8_t bytes[sizeof guided];
    for (size_t i = 0; i < sizeof guided / sizeof *guided; i++) cairn_put_le32(bytes + 4 * i, guided[i]);
    uint64_t hash = cairn_hash64(bytes, sizeof bytes);
    for (size_t i = 0; i < t->n_stages; i++) {
        const cairn_train_stage *s = &t->stages[i];
        uint8_t so_far[8];
        cairn_put_le64(so_far, hash);
        hash = cairn_hash64_two(so_far, sizeof so_far, &s->steps, STAGE_BYTES);
    }
    return hash;
}

static void put_header(const cairn_trainer *t, uint8_t *h)
{
    const lane_memory m = memory_of(&t->lanes[0]);
    memcpy(h, magic, sizeof magic);
    cairn_put_le32(h + 8, VERSION);
    cairn_put_le32(h + 12, (uint32_t)t->n_lanes);
    cairn_put_le64(h + 16, t->opt.seed);
    cairn_put_le64(h + 24, t->step);
    cairn_put_le64(h + 32, t->optimizer.updates);
    cairn_put_le64(h + 40, hash_shape(t));
    cairn_put_le64(h + 48, hash_stages(t));
    cairn_put_le64(h + 56, t->layout->total);
    cairn_put_le64(h + 64, (uint64_t)m.n_counters << 32 | m.n_keys);
}

/* ---- out ---- */

typedef struct sink {
    FILE *file;
    cairn_hasher *hasher;
    bool good;
} sink;

static void put(sink *s, const void *data, size_t bytes)
{
    if (!s->good || bytes == 0) return;
    cairn_hasher_add(s->hasher, data, bytes);
    s->good = fwrite(data, 1, bytes, s->file) == bytes;
}

static bool write_state(FILE *file, const void *arg)
{
    const cairn_trainer *t = arg;
    const size_t floats = t->layout->total * sizeof(float);
    uint8_t header[HEADER], end[8];
    sink s = {file, cairn_hasher_new(), true};
    if (s.hasher == NULL) {
        errno = ENOMEM;
        return false;
    }
    put_header(t, header);
    put(&s, header, sizeof header);
    put(&s, t->params, floats);
    put(&s, t->optimizer.first, floats);
    put(&s, t->optimizer.second, floats);
    for (size_t i = 0; i < t->n_lanes; i++) {
        const lane_memory m = memory_of(&t->lanes[i]);
        for (size_t c = 0; c < m.n_counters; c++) {
            cairn_put_le64(end, m.counters[c]);
            put(&s, end, sizeof end);
        }
        put(&s, m.keys, m.n_keys * sizeof *m.keys);
    }
    cairn_put_le64(end, cairn_hasher_value(s.hasher));
    put(&s, end, sizeof end);
    cairn_hasher_free(s.hasher);
    return s.good;
}

cairn_status cairn_trainer_save(const cairn_trainer *t, const char *path)
{
    return cairn_replace_file(path, write_state, t);
}

/* ---- in ---- */

static cairn_status read_all(const char *path, uint8_t **out, size_t *out_bytes)
{
    FILE *f = fopen(path, "rbe");
    long bytes = -1;
    uint8_t *data = NULL;
    cairn_status st = CAIRN_OK;
    if (f == NULL || fseek(f, 0, SEEK_END) != 0 || (bytes = ftell(f)) < 0 || fseek(f, 0, SEEK_SET) != 0)
        st = cairn_fail_errno(errno, "checkpoint '%s'", path);
    else if ((data = cairn_alloc((size_t)bytes)) == NULL)
        st = cairn_fail(CAIRN_NO_MEMORY, "checkpoint '%s' of %ld bytes", path, bytes);
    else if (fread(data, 1, (size_t)bytes, f) != (size_t)bytes)
        st = cairn_fail_errno(ferror(f) != 0 ? errno : EIO, "reading checkpoint '%s'", path);
    if (f != NULL) fclose(f);
    if (st != CAIRN_OK) {
        cairn_free(data);
        return st;
    }
    *out = data;
    *out_bytes = (size_t)bytes;
    return CAIRN_OK;
}

static cairn_status check(const cairn_trainer *t, const char *path, const uint8_t *data, size_t bytes,
                          bool other_stages)
{
    const lane_memory m = memory_of(&t->lanes[0]);
    const size_t want =
        HEADER + 3 * t->layout->total * sizeof(float) + t->n_lanes * (8 * m.n_counters + m.n_keys * sizeof(float)) + 8;
    uint8_t ours[HEADER];
    if (bytes < HEADER + 8 || memcmp(data, magic, sizeof magic) != 0)
        return cairn_fail(CAIRN_INVALID, "'%s' is no checkpoint of a trainer", path);
    if (cairn_get_le32(data + 8) != VERSION)
        return cairn_fail(CAIRN_UNSUPPORTED, "checkpoint '%s' has version %u, this build reads %d", path,
                          (unsigned)cairn_get_le32(data + 8), VERSION);
    if (cairn_get_le64(data + bytes - 8) != cairn_hash64(data, bytes - 8))
        return cairn_fail(CAIRN_CORRUPT, "checkpoint '%s' of %zu bytes is damaged: its hash does not fit", path, bytes);
    put_header(t, ours);
    if (memcmp(data + 40, ours + 40, 8) != 0 || memcmp(data + 56, ours + 56, 8) != 0)
        return cairn_fail(CAIRN_MISMATCH,
                          "checkpoint '%s' is of a model of another shape: %llu parameters, the one to train has %zu",
                          path, (unsigned long long)cairn_get_le64(data + 56), t->layout->total);
    if (cairn_get_le32(data + 12) != t->n_lanes)
        return cairn_fail(CAIRN_MISMATCH,
                          "checkpoint '%s' was made with %u threads, not %zu: a run goes on with as many", path,
                          (unsigned)cairn_get_le32(data + 12), t->n_lanes);
    if (cairn_get_le64(data + 16) != t->opt.seed)
        return cairn_fail(CAIRN_MISMATCH, "checkpoint '%s' was made with seed %llu, not %llu", path,
                          (unsigned long long)cairn_get_le64(data + 16), (unsigned long long)t->opt.seed);
    if (!other_stages && memcmp(data + 48, ours + 48, 8) != 0)
        return cairn_fail(CAIRN_MISMATCH, "checkpoint '%s' was made with other stages or other guided heads", path);
    if (memcmp(data + 64, ours + 64, 8) != 0 || bytes != want)
        return cairn_fail(CAIRN_MISMATCH, "checkpoint '%s' remembers another number of landmark keys", path);
    if (cairn_get_le64(data + 24) > t->steps)
        return cairn_fail(CAIRN_MISMATCH, "checkpoint '%s' is at step %llu, the stages have %llu", path,
                          (unsigned long long)cairn_get_le64(data + 24), (unsigned long long)t->steps);
    return CAIRN_OK;
}

static const uint8_t *take(void *to, const uint8_t *from, size_t bytes)
{
    if (bytes > 0) memcpy(to, from, bytes);
    return from + bytes;
}

cairn_status cairn_trainer_load(cairn_trainer *t, const char *path, bool other_stages)
{
    uint8_t *data = NULL;
    size_t bytes = 0;
    cairn_status st = read_all(path, &data, &bytes);
    if (st == CAIRN_OK) st = check(t, path, data, bytes, other_stages);
    if (st == CAIRN_OK) {
        const size_t floats = t->layout->total * sizeof(float);
        const uint8_t *at = data + HEADER;
        t->step = cairn_get_le64(data + 24);
        t->optimizer.updates = cairn_get_le64(data + 32);
        at = take(t->params, at, floats);
        at = take(t->optimizer.first, at, floats);
        at = take(t->optimizer.second, at, floats);
        for (size_t i = 0; i < t->n_lanes; i++) {
            const lane_memory m = memory_of(&t->lanes[i]);
            for (size_t c = 0; c < m.n_counters; c++, at += 8) m.counters[c] = (size_t)cairn_get_le64(at);
            at = take(m.keys, at, m.n_keys * sizeof *m.keys);
        }
    }
    cairn_free(data);
    return st;
}
