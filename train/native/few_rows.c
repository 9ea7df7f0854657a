/* A linear layer for few rows, with what surrounds it: out = residual + post_norm(f(W norm(x))), each part but W optional.

   Each output is one dot product: partial sums in the lanes of one vector, added in a fixed tree. Its bits depend on its own
   row and column only: a text's numbers are the same whatever else is in the batch. The weight is read once, where it is; for
   few rows this is all that counts. Definitions: train/model/norm.py, activation.py, linear.py. Tensors are fp32 or bf16
   (`bf16`), arithmetic is fp32, rounded to bf16 where the definitions are. */

#include "simd.h"

typedef struct {
  int64_t rows, inputs, outputs, groups; /* of the product; groups: of the norm before it */
  int32_t bf16, function, gated, unused; /* function -1: none; gated: f(gate) * up of outputs [gate | up] */
  float eps, offset, post_eps, post_offset;
} Few;

static inline V rounded(V x, int bf16) {
  if (!bf16) return x;
  return (V)(__builtin_convertvector(narrow(x), U) << 16);
}

/* Lanes without bit `half` get the sums of x's halves, the others those of y's. */
INLINE V fold(V x, V y, const int half) {
  const I n = lane_numbers(), from_y = ((n & half) != 0) & LANES;
  return mix(x, y, (n & ~half) + from_y) + mix(x, y, (n | half) + from_y);
}
#define FOLD_ALL(half)                                                              \
  _Pragma("GCC unroll 16") for (int i = 0; i < (half); i++) sum[i] = fold(sum[i], sum[i + (half)], half);

/* rows x columns = LANES dot products of x [rows, K] and w [.., K]; store [rows][columns]. Columns beyond the last repeat it. */
INLINE void dots(const int rows, const int columns, int64_t K, const float *x, const void *w, int64_t column, int64_t last,
                 float *to, int64_t to_row, int bf16) {
  V sum[LANES];
  int64_t at[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) sum[i] = (V){0};
#pragma GCC unroll 16
  for (int c = 0; c < columns; c++) at[c] = (column + c < last ? column + c : last - 1) * K;
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    V right[LANES];
#pragma GCC unroll 16
    for (int c = 0; c < columns; c++) right[c] = get(w, at[c] + k, bf16);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const V left = load(x + r * K + k);
#pragma GCC unroll 16
      for (int c = 0; c < columns; c++) sum[r * columns + c] += left * right[c];
    }
  }
  if (k < K)
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns; c++)
        sum[r * columns + c] += get_some(x, r * K + k, K - k, 0) * get_some(w, at[c] + k, K - k, bf16);
#if LANES == 16
  FOLD_ALL(8)
#endif
  FOLD_ALL(4)
  FOLD_ALL(2)
  FOLD_ALL(1)
  float all_sums[LANES];
  store(all_sums, sum[0]);
  for (int r = 0; r < rows; r++) {
    if (column + columns <= last) memcpy(to + r * to_row + column, all_sums + r * columns, (size_t)columns * 4);
    else memcpy(to + r * to_row + column, all_sums + r * columns, (size_t)(last - column) * 4);
  }
}

INLINE void block(const Few *k, const float *x, const void *w, float *to, int64_t column, int64_t end, int bf16) {
  int64_t row = 0;
  for (; row + 4 <= k->rows; row += 4)
    for (int64_t c = column; c < end; c += LANES / 4)
      dots(4, LANES / 4, k->inputs, x + row * k->inputs, w, c, end, to + row * k->outputs, k->outputs, bf16);
  if (row + 2 <= k->rows) {
    for (int64_t c = column; c < end; c += LANES / 2)
      dots(2, LANES / 2, k->inputs, x + row * k->inputs, w, c, end, to + row * k->outputs, k->outputs, bf16);
    row += 2;
  }
  if (row < k->rows) dots(1, LANES, k->inputs, x + row * k->inputs, w, column, end, to + row * k->outputs, k->outputs, bf16);
}

/* One row of the norm, in fp32; weight NULL: only widened. */
INLINE void normed(int64_t width, int64_t groups, const void *x, int64_t at, const void *weight, float eps, float offset, float *to,
                   int x_bf16, int bf16) {
  if (weight == NULL) {
    EACH(width, store(to + j, get(x, at + j, x_bf16)), put_some(to, j, n, get_some(x, at + j, n, x_bf16), 0))
    return;
  }
  const int64_t each = width / groups;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = at + g * each, own = g * each;
    V sum = {0};
    EACH(each, V v = get(x, first + j, x_bf16); sum += v * v, V v = get_some(x, first + j, n, x_bf16); sum += v * v)
    const float root = 1.0f / sqrtf(sum_of(sum) / (float)each + eps);
    EACH(each, store(to + own + j, rounded(get(x, first + j, x_bf16) * root * (get(weight, own + j, bf16) + offset), bf16)),
         put_some(to, own + j, n,
                  rounded(get_some(x, first + j, n, x_bf16) * root * (get_some(weight, own + j, n, bf16) + offset), bf16), 0))
  }
}

INLINE void few_rows(const Few *k, const void *x, const void *norm, const void *w, const void *post, const void *residual,
                     float *scratch, void *out, int threads, int bf16) {
  float *in = scratch, *products = scratch + k->rows * k->inputs;
  const int64_t blocks = (k->outputs + LANES - 1) / LANES, width = k->gated ? k->outputs / 2 : k->outputs;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < k->rows; row++)
      normed(k->inputs, k->groups, x, row * k->inputs, norm, k->eps, k->offset, in + row * k->inputs, bf16, bf16);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t end = (b + 1) * LANES < k->outputs ? (b + 1) * LANES : k->outputs;
      block(k, in, w, products, b * LANES, end, bf16);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < k->rows; row++) {
      float *line = products + row * k->outputs;
      V unused;
      EACH(k->outputs, store(line + j, rounded(load(line + j), bf16)),
           put_some(line, j, n, rounded(get_some(line, j, n, 0), bf16), 0))
      if (k->function >= 0) {
        const float *up = line + width;
        EACH(width,
             V v = activated(k->function, load(line + j), &unused); if (k->gated) v *= load(up + j);
             store(line + j, rounded(v, bf16)),
             V v = activated(k->function, get_some(line, j, n, 0), &unused); if (k->gated) v *= get_some(up, j, n, 0);
             put_some(line, j, n, rounded(v, bf16), 0))
      }
      if (post != NULL) normed(width, 1, line, 0, post, k->post_eps, k->post_offset, line, 0, bf16);
      if (residual == NULL) EACH(width, put(out, row * width + j, load(line + j), bf16),
                                 put_some(out, row * width + j, n, get_some(line, j, n, 0), bf16))
      else EACH(width, put(out, row * width + j, get(residual, row * width + j, bf16) + load(line + j), bf16),
                put_some(out, row * width + j, n, get_some(residual, row * width + j, n, bf16) + get_some(line, j, n, 0), bf16))
    }
  }
}

/* norm, post, residual: null if there is none. scratch: rows * (inputs + outputs) floats. -> 0 */
int stratum_few_rows(const Few *k, const void *x, const void *norm, const void *w, const void *post, const void *residual,
                     float *scratch, void *out, int threads) {
  if (k->bf16) few_rows(k, x, norm, w, post, residual, scratch, out, threads, 1);
  else few_rows(k, x, norm, w, post, residual, scratch, out, threads, 0);
  return 0;
}

/* Floats of a vector. */
int stratum_lanes(void) { return LANES; }
