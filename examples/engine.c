/* engine.c - what an inference engine of your own does: per layer it hands over k and v and asks for the attention of
 * q. Here q, k and v are random, the memory is a session without a store, and the result is compared with the library's
 * plain reference: the two agree when every block is visible. */
#include <cairn/cairn.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define TRY(call) ((call) == CAIRN_OK ? (void)0 : (fprintf(stderr, "engine: %s\n", cairn_last_error()), exit(1)))

enum { HEADS = 4, KV_HEADS = 2, DIM = 32, C = 15, ROWS = 100, CHUNK = 7 };

static float *noise(size_t n)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; x != NULL && i < n; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return x != NULL ? x : (perror("engine"), exit(1), NULL);
}

int main(void)
{
    cairn_attention_shape shape;
    cairn_attention_shape_init(&shape, sizeof shape);
    shape.layers = 1, shape.heads = HEADS, shape.kv_heads = KV_HEADS, shape.head_dim = DIM, shape.block_tokens = C;
    shape.rope_theta = 10000, shape.scheme = CAIRN_POSITION_CLAMPED, shape.clamp_blocks = 3, shape.window_blocks = 1;

    cairn_session_options use;
    cairn_session_options_init(&use, sizeof use, &shape);
    use.policy.top_k = CAIRN_TOP_K_ALL; /* 4 would fetch the four best blocks of each head */
    cairn_session *session;
    TRY(cairn_session_begin(NULL, &shape, NULL, 0, &use, &session));

    float *q = noise(ROWS * HEADS * DIM), *k = noise(ROWS * KV_HEADS * DIM), *v = noise(ROWS * KV_HEADS * DIM);
    float *out = noise(ROWS * HEADS * DIM), *expected = noise(ROWS * HEADS * DIM);
    cairn_token ids[CHUNK] = {0};
    for (size_t row = 0, n; row < ROWS; row += n) {
        n = ROWS - row < CHUNK ? ROWS - row : CHUNK; /* every (C + 1)-th row is a landmark's */
        TRY(cairn_session_append(session, 0, n, k + row * KV_HEADS * DIM, v + row * KV_HEADS * DIM));
        TRY(cairn_session_attend(session, 0, n, q + row * HEADS * DIM, out + row * HEADS * DIM));
        TRY(cairn_session_advance(session, ids, n));
    }
    cairn_session_end(session);

    double worst = 0;
    TRY(cairn_attention_reference(&shape, 0, ROWS, q, k, v, NULL, expected));
    for (size_t i = 0; i < (size_t)ROWS * HEADS * DIM; i++)
        worst = fmax(worst, fabs((double)out[i] - (double)expected[i]));
    printf("%d rows in chunks of %d: largest difference from the reference %.1e\n", ROWS, CHUNK, worst);
    free(q), free(k), free(v), free(out), free(expected);
    return worst < 1e-5 ? 0 : 1;
}
