/* The elementwise work of train/model/capped.py on a block of scores, in one pass over it.

   A block is [pairs, lines, keys]: pairs of a row and a key/value head, lines of a query and one of the query heads that
   share the key/value head. A line sees the keys from its query's first one to its own place; the others become zero. */

#include "simd.h"

typedef struct {
  int64_t pairs, lines, keys;
  int64_t first_pair, first_query, first_key; /* of the block */
  int64_t groups, per_group, queries;         /* of the whole */
  int64_t offset, sums_row;
  float scale, softcap;
} Block;

static void visible(const Block *k, const int32_t *first_key, int64_t line, int64_t *from, int64_t *to) {
  const int64_t row = (k->first_pair + line / k->lines) / k->groups;
  const int64_t query = k->first_query + line % k->lines / k->per_group;
  *from = first_key[row * k->queries + query] - k->first_key;
  *to = k->offset + query + 1 - k->first_key;
  if (*from < 0) *from = 0;
  if (*to > k->keys) *to = k->keys;
  if (*from > *to) *from = *to;
}

/* Raw products -> exp(c tanh(product scale / c)) in place; their sums are added to sums. */
int stratum_capped_exponentials(const Block *k, const int32_t *first_key, float *scores, float *sums, int threads) {
  const float inner = k->scale / k->softcap;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->pairs * k->lines; line++) {
    int64_t from, to, j;
    visible(k, first_key, line, &from, &to);
    float *p = scores + line * k->keys, rest[LANES] = {0};
    memset(p, 0, (size_t)from * 4);
    V sum = {0};
    for (j = from; j + LANES <= to; j += LANES) {
      V e = exp_of(tanh_of(load(p + j) * inner) * k->softcap);
      store(p + j, e);
      sum += e;
    }
    float total = sum_of(sum);
    if (j < to) {
      memcpy(rest, p + j, (size_t)(to - j) * 4);
      store(rest, exp_of(tanh_of(load(rest) * inner) * k->softcap));
      for (int64_t i = 0; i < to - j; i++) p[j + i] = rest[i], total += rest[i];
    }
    memset(p + to, 0, (size_t)(k->keys - to) * 4);
    sums[line / k->lines * k->sums_row + line % k->lines] += total;
  }
  return 0;
}

static inline void gradients(const Block *k, V *score, V *grad, float constant, float inner) {
  V t = tanh_of(*score * inner), e = exp_of(t * k->softcap);
  *score = e;
  *grad = (*grad - constant) * e * (all(k->scale) - t * t * k->scale);
}

/* Raw products -> exp(...) as above; gradients of those, given without the constant of each line -> of the products. */
int stratum_capped_gradients(const Block *k, const int32_t *first_key, float *scores, float *grads, const float *constant,
                              int threads) {
  const float inner = k->scale / k->softcap;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->pairs * k->lines; line++) {
    int64_t from, to, j;
    visible(k, first_key, line, &from, &to);
    float *p = scores + line * k->keys, *g = grads + line * k->keys, rest_p[LANES] = {0}, rest_g[LANES] = {0};
    const float own = constant[line / k->lines * k->sums_row + line % k->lines];
    memset(p, 0, (size_t)from * 4);
    memset(g, 0, (size_t)from * 4);
    for (j = from; j + LANES <= to; j += LANES) {
      V e = load(p + j), d = load(g + j);
      gradients(k, &e, &d, own, inner);
      store(p + j, e);
      store(g + j, d);
    }
    if (j < to) {
      memcpy(rest_p, p + j, (size_t)(to - j) * 4);
      memcpy(rest_g, g + j, (size_t)(to - j) * 4);
      V e = load(rest_p), d = load(rest_g);
      gradients(k, &e, &d, own, inner);
      store(rest_p, e);
      store(rest_g, d);
      memcpy(p + j, rest_p, (size_t)(to - j) * 4);
      memcpy(g + j, rest_g, (size_t)(to - j) * 4);
    }
    memset(p + to, 0, (size_t)(k->keys - to) * 4);
    memset(g + to, 0, (size_t)(k->keys - to) * 4);
  }
  return 0;
}

/* Floats of a vector: widths must be multiples of it. */
int stratum_lanes(void) { return LANES; }
