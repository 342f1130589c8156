/* test_foresight.c - tiles read for a guess of the next layer's query: whatever the guess, every answer has the same
 * bits.
 *
 * labels: threads
 */
#include "world.h"

#include <stdio.h>

enum { STORED = 9, TIGHT = 5 << 18 };

typedef enum guess { NONE, RIGHT, WRONG, MIXED } guess;

/* Rows after the stored blocks, one at a time. Returns what the session counted. */
static cairn_step_stats feed(const world *w, cairn_session *s, guess kind, record *rec)
{
    const size_t kv = (size_t)w->shape.kv_heads * w->shape.head_dim, from = STORED * world_slots(w);
    cairn_step_stats stats;
    assert_ok(cairn_session_trace_enable(s, true));
    for (size_t at = from; at < w->rows; at++) {
        for (uint32_t l = 0; l < w->shape.layers; l++) {
            const size_t id = at * w->shape.heads * rec->k;
            assert_ok(cairn_session_append(s, l, 1, w->k[l] + at * kv, w->v[l] + at * kv));
            assert_ok(cairn_session_attend(s, l, 1, w->q[l] + at * world_width(w), rec->out[l] + at * world_width(w)));
            assert_ok(cairn_session_trace(s, 1, rec->k, rec->picked[l] + id, rec->slots[l] + id));
            if (kind == NONE) assert_false(cairn_session_foresees(s, l + 1));
            if (l + 1 == w->shape.layers || !cairn_session_foresees(s, l + 1)) continue;
            const guess now = kind == MIXED ? (guess)(at % 3) : kind;
            if (now == NONE) continue;
            const size_t like = now == RIGHT ? at : (at * 7) % w->rows;
            cairn_session_foresee(s, l + 1, w->q[l + 1] + like * world_width(w));
            cairn_session_foresee(s, l, w->q[l] + like * world_width(w)); /* too late: nothing comes of it */
        }
        assert_ok(cairn_session_advance(s, w->ids + at, 1));
    }
    cairn_session_stats(s, &stats);
    return stats;
}

static void guesses_right_and_wrong_change_no_bit(void **state)
{
    (void)state;
    test_random r = {31};
    for (int n = 0; n < 8; n++) {
        const world_spec spec = {3,     4,    2,
                                 16,    6,    n % 2 == 0 ? CAIRN_POSITION_CLAMPED : CAIRN_POSITION_STINGY,
                                 false, true, (size_t)(STORED + 3) * 7};
        const char *context = "book";
        char *dir = test_make_dir();
        world w;
        record want, got;
        world_init(&w, &r, &spec);
        w.shape.clamp_blocks = 2;
        record_init(&want, &w, 2);
        record_init(&got, &w, 2);
        cairn_store *store = world_store(&w, dir, "store", CAIRN_F32);
        uint64_t id;
        assert_ok(cairn_context_create(store, context, &id));
        world_write_blocks(&w, store, context, 0, STORED);
        session_spec session = {.contexts = &context,
                                .n = 1,
                                .top_k = 2,
                                .threads = 1 + (uint32_t)n % 2,
                                .measure = n % 4 >= 2,
                                .fetch = n / 2 % 2 == 0 ? CAIRN_FETCH_MAP : CAIRN_FETCH_READ,
                                .ram_bytes = n == 6 ? TIGHT : 0};
        for (guess kind = NONE; kind <= MIXED; kind++) {
            session.read_ahead = kind != NONE;
            cairn_session *s = world_session(&w, store, &session);
            cairn_step_stats stats = feed(&w, s, kind, kind == NONE ? &want : &got);
            if (kind == NONE) {
                assert_int_equal(stats.ahead_tiles + stats.ahead_used + stats.foresee_ns, 0);
            } else {
                record_same(&want, &got, STORED * world_slots(&w), w.rows);
                assert_true(stats.foresee_ns > 0 && stats.ahead_used <= stats.ahead_tiles);
            }
            if (kind == RIGHT) assert_true(stats.ahead_used > 0 && stats.ahead_used == stats.ahead_tiles);
            cairn_session_end(s);
        }
        record_wipe(&want), record_wipe(&got);
        world_wipe(&w);
        cairn_store_close(store);
        test_remove_dir(dir);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(guesses_right_and_wrong_change_no_bit)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
