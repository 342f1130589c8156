/* body_attend.h - one layer's attention over a window, forth and back, out of the pieces of body_attention.h and, for
 * rows that are told what they need, of body_guide.h.
 */

void TRAIN(attend)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in, const real *bias,
                   const cairn_train_guide *guide, real *out)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld_out = att->heads * D;
    const size_t distractors = distractors_of(att, layer, rows, guide);
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const size_t ring = layer * att->kv_heads + h / group;
        if (h % group == 0) take_head(att, rows, in->k + h / group * D, in->v + h / group * D, in->ld, false);
        for (size_t I = 0, next = 0; I * B < rows; I++) {
            const query_block qb = query_block_of(att, layer, rows, I);
            const size_t from = next;
            real *to = out + qb.first * ld_out + h * D;
            if (distractors > 0) next = guided_in(guide, qb.first + qb.n, next);
            take_queries(att, &qb, in->q + h * D, in->ld);
            weigh_groups(att, &qb, bias[h]);
            for (size_t i = from; i < next; i++)
                meet_distractors(att, &qb, guide->rows[i].row, distractors, ring, in, h, bias[h]);
            for (size_t j = 0; j < qb.n; j++) vec_scale(att->kernels, att->own + j * B, att->own_gate[j], qb.own);
            own_times(att, &qb, att->own, att->values + qb.first * D, to, ld_out, false);
            for (size_t b = qb.lo; b < I; b++) {
                weigh_block(att, &qb, b, att->gates + (b - qb.lo) * B);
                product(att->kernels, qb.n, D, B - 1, att->scores, B, 1, att->values + b * B * D, D, to, ld_out, true);
            }
            for (size_t i = from; i < next; i++)
                add_distractors(att, guide->rows[i].row - qb.first, ring, out + guide->rows[i].row * ld_out + h * D);
        }
    }
}

/* att->scores and dscores, which hold weights and gradients of scores of the past block b, into gradients of its values
 * and keys and of the queries turned by its age. */
static void block_backward(TRAIN(attention) * att, const query_block *qb, size_t b, const real *dout, size_t ld)
{
    const size_t D = att->D, B = att->B, n = qb->n, first = b * B * D, turned = age_of(att, qb, b) * B * D;
    product(att->kernels, B - 1, D, n, att->scores, 1, B, dout, ld, att->dvalues + first, D, true);
    product(att->kernels, B - 1, D, n, att->dscores, 1, B, att->queries + turned, D, att->dkeys + first, D, true);
    product(att->kernels, n, D, B - 1, att->dscores, B, 1, att->keys + first, D, att->dqueries + turned, D, true);
}

static void own_backward(TRAIN(attention) * att, const query_block *qb, const real *dout, size_t ld)
{
    const size_t D = att->D, first = qb->first * D;
    own_transposed_times(att, qb, att->own, dout, ld, att->dvalues + first);
    own_transposed_times(att, qb, att->down, att->queries, D, att->dkeys + first);
    own_times(att, qb, att->down, att->keys + first, att->dqueries, D, true);
}

/* dgates of past blocks into gradients of landmark keys and turned queries. */
static void landmarks_backward(TRAIN(attention) * att, const query_block *qb)
{
    const size_t D = att->D, B = att->B, n = qb->n;
    for (size_t b = qb->lo, some; b < qb->I; b += some) { /* those of an age at once */
        const size_t a = age_of(att, qb, b), landmark = (b * B + B - 1) * D;
        const real *dz = att->dgates + (b - qb->lo) * B;
        some = a < att->A ? 1 : qb->I - att->A - b + 1;
        product(att->kernels, some, D, n, dz, B, 1, att->queries + a * B * D, D, att->dkeys + landmark, B * D, true);
        product(att->kernels, n, D, some, dz, 1, B, att->keys + landmark, B * D, att->dqueries + a * B * D, D, true);
    }
}

/* The gradients of turned queries, turned back and summed, are dq. */
static void queries_backward(TRAIN(attention) * att, const query_block *qb, real *dq, size_t ld)
{
    const size_t D = att->D, B = att->B, oldest = age_of(att, qb, qb->lo);
    for (size_t j = 0; j < qb->n; j++) {
        real *to = dq + (qb->first + j) * ld;
        turn(att, &att->of_queries, to, att->dqueries + j * D, j, true);
        for (size_t a = 1; a <= oldest; a++) {
            turn(att, &att->of_queries, att->turned, att->dqueries + (a * B + j) * D, a * B + j, true);
            for (size_t i = 0; i < D; i++) to[i] += att->turned[i];
        }
    }
}

/* Gradients of all that a block of queries sees, `guided` rows of it distractors too, but for guidance: att->own and
 * down end as weights and dscores of own tokens, dgates as those of the landmarks' scores, of which the sum is
 * returned. */
static real groups_backward(TRAIN(attention) * att, const query_block *qb, const cairn_train_guided *guided, size_t n,
                            size_t ring, const real *dout, size_t ld)
{
    const size_t B = att->B, past = qb->I - qb->lo;
    real *total = att->own_means, sum = 0;
    own_by_columns(att, qb, dout, ld, att->values_t, att->down);
    for (size_t j = 0; j < qb->n; j++)
        total[j] = att->own_gate[j] *
                   vec_dot(att->kernels, att->own + j * B, att->down + j * B, j < qb->own ? j + 1 : qb->own);
    for (size_t b = 0; b < past; b++) {
        const real *gates = att->gates + b * B;
        real *means = att->means + b * B;
        weigh_block(att, qb, qb->lo + b, NULL);
        by_columns(att, qb, dout, ld, att->values_t, (qb->lo + b) * B, B, att->dscores);
        vec_row_softmax_backward(att->kernels, att->scores, att->dscores, B, qb->n, B - 1, false, gates, means, false);
        block_backward(att, qb, qb->lo + b, dout, ld);
        for (size_t j = 0; j < qb->n; j++) total[j] += gates[j] * means[j];
    }
    for (size_t i = 0; i < n; i++) {
        const size_t j = guided[i].row - qb->first;
        total[j] += distractors_mean(att, j, ring, dout + j * ld);
        sum += distractors_backward(att, j, ring, total[j]);
    }
    for (size_t b = 0; b < past; b++) {
        const real *gates = att->gates + b * B, *means = att->means + b * B;
        real *dgates = att->dgates + b * B;
        for (size_t j = 0; j < qb->n; j++) sum += dgates[j] = gates[j] * (means[j] - total[j]);
    }
    vec_row_softmax_backward(att->kernels, att->own, att->down, B, qb->n, qb->own, true, att->own_gate, total, true);
    return sum;
}

double TRAIN(attend_backward)(TRAIN(attention) * att, uint32_t layer, size_t rows, const TRAIN(qkv) * in,
                              const real *bias, const real *dout, const cairn_train_guide *guide, double scale,
                              real *dq, real *dk, real *dv, real *dbias)
{
    const size_t D = att->D, B = att->B, group = att->heads / att->kv_heads, ld = in->ld, ld_out = att->heads * D;
    const bool local = att->local_layers != NULL && att->local_layers[layer] != 0;
    const bool guides = guide != NULL && !local && layer >= guide->from_layer && rows > att->A * B;
    const size_t distractors = distractors_of(att, layer, rows, guide);
    const bool remembers = guide != NULL && guide->remember && !local && att->memory.rings > 0;
    double guided = 0;
    assert(rows <= att->rows_max);
    for (size_t h = 0; h < att->heads; h++) {
        const size_t kv = h / group * D, ring = layer * att->kv_heads + h / group;
        const bool tells = guides && h < guide->heads;
        const real *q = in->q + h * D;
        const TRAIN(rivals) rivals = tells ? rivals_of(att, ring, guide) : (TRAIN(rivals)){0};
        if (h % group == 0) {
            take_head(att, rows, in->k + kv, in->v + kv, ld, true);
            memset(att->dkeys, 0, rows * D * sizeof *att->dkeys);
            memset(att->dvalues, 0, rows * D * sizeof *att->dvalues);
        }
        for (size_t I = 0, next = 0; I * B < rows; I++) {
            const query_block qb = query_block_of(att, layer, rows, I);
            const size_t from = next;
            const real *dout_block = dout + qb.first * ld_out + h * D;
            if (tells || distractors > 0) next = guided_in(guide, qb.first + qb.n, next);
            const cairn_train_guided *told = next > from ? guide->rows + from : NULL;
            take_queries(att, &qb, q, ld);
            memset(att->dqueries, 0, (age_of(att, &qb, qb.lo) + 1) * B * D * sizeof *att->dqueries);
            weigh_groups(att, &qb, bias[h]);
            for (size_t i = from; i < next; i++) {
                const size_t j = guide->rows[i].row - qb.first;
                memset(att->guided + j * D, 0, D * sizeof *att->guided);
                att->inside[j] = 1;
                if (distractors > 0) meet_distractors(att, &qb, guide->rows[i].row, distractors, ring, in, h, bias[h]);
            }
            dbias[h] += groups_backward(att, &qb, told, distractors > 0 ? next - from : 0, ring, dout_block, ld_out);
            if (tells && next > from) meet_rivals(att, &qb, told, next - from, &rivals, q, ld, bias[h]);
            for (size_t i = from; i < next; i++)
                if (tells && cairn_train_tells(guide, &guide->rows[i], h))
                    guided += (double)guide->weight * guide_row(att, &qb, &guide->rows[i], i - from,
                                                                (real)(scale * (double)guide->weight), &dbias[h]);
            own_backward(att, &qb, dout_block, ld_out);
            landmarks_backward(att, &qb);
            queries_backward(att, &qb, dq + h * D, ld);
            add_guided(att, &qb, told, next - from, dq + h * D, ld);
        }
        if (remembers && (h + 1) % group == 0 && (att->memory.kept > 0 || (guides && h / group * group < guide->heads)))
            remember(att, guide, ring, rows, in->v + kv, ld);
        if ((h + 1) % group == 0)
            for (size_t r = 0; r < rows; r++) {
                turn(att, &att->of_keys, dk + r * ld + kv, att->dkeys + r * D, r % B, true);
                memcpy(dv + r * ld + kv, att->dvalues + r * D, D * sizeof *dv);
            }
    }
    return guided;
}
