/* A linear layer for few rows, with what surrounds it: out = residual + post_norm(f(W norm(x))), each part but W optional.

   The weight is packed once: by parts of PART inputs, panels of LANES outputs, and then by input. A step reads it from the first
   byte to the last. Each output is a sum over one lane: in the order of the inputs within a block (`block_of`), then the blocks in
   order. Its bits depend on its own row and column only: a text's numbers are the same whatever else is in the batch. Definitions:
   train/model/norm.py, activation.py, linear.py. Tensors are fp32 or bf16 (`bf16`), arithmetic is fp32, rounded to bf16 where
   the definitions are. */

#include "simd.h"

#define PART 256 /* inputs whose panel (16 KiB in fp32) and rows fit the first cache together */
#if LANES == 16
#define MOST_ROWS 16 /* rows times panels at once: their sums are registers; AVX-512 has 32 of them, AVX2 16 */
#else
#define MOST_ROWS 12
#endif

typedef struct {
  int64_t rows, inputs, outputs, groups; /* of the product; groups: of the norm before it */
  int32_t bf16, function, gated, wide; /* function -1: none; gated: f(gate) * up of outputs [gate | up]; wide: out is fp32 */
  float eps, offset, post_eps, post_offset, softcap; /* softcap 0: none */
} Few;

static inline V rounded(V x, int bf16) {
  if (!bf16) return x;
  return (V)(__builtin_convertvector(narrow(x), U) << 16);
}

/* Inputs of a block of a sum: those of oneDNN's fp32 products (found by comparing bits), so that few rows and many have the same. */
static inline int64_t block_of(const Few *k) { return k->inputs > 1024 ? 1024 : 512; }
static inline int64_t panels_of(const Few *k) { return (k->outputs + LANES - 1) / LANES; }
/* Floats from a row of the input to the next: not a power of two, or all rows would share the same lines of the cache. */
static inline int64_t stride_of(const Few *k) { return (k->inputs + LANES - 1) / LANES * LANES + LANES; }

/* The products of `rows` rows with `panels` panels, which lie `step` numbers apart, over `depth` inputs. first: the sums begin with 0,
   else with `to`. */
INLINE void panels_of_rows(const int rows, const int panels, int64_t depth, const float *x, int64_t x_row, const void *w, int64_t at,
                           int64_t step, float *to, int64_t to_row, int first, int bf16) {
  V sum[MOST_ROWS][4];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) sum[r][p] = first ? (V){0} : load(to + r * to_row + p * LANES);
  for (int64_t k = 0; k < depth; k++) {
    V right[4];
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) right[p] = get(w, at + p * step + k * LANES, bf16);
    /* Many rows are limited by arithmetic, and then the processor does not read ahead far enough by itself. */
    if (rows > 4) __builtin_prefetch((const char *)w + (at + (k + PART) * LANES) * (bf16 ? 2 : 4), 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const V left = all(x[r * x_row + k]);
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) sum[r][p] += left * right[p];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) store(to + r * to_row + p * LANES, sum[r][p]);
}

#define PANELS(R, N) \
  for (; panel + N <= end; panel += N) \
    panels_of_rows(R, N, depth, x, x_row, w, at + panel * step, step, to + panel * LANES, to_row, first, bf16);
#define ROWS(R)                                                               \
  case R:                                                                     \
    if (R <= MOST_ROWS) {                                                     \
      if (4 * R <= MOST_ROWS) PANELS(R <= MOST_ROWS ? R : 1, 4)               \
      if (2 * R <= MOST_ROWS) PANELS(R <= MOST_ROWS ? R : 1, 2)               \
      PANELS(R <= MOST_ROWS ? R : 1, 1)                                       \
    }                                                                         \
    break;

/* Panels [panel, end) of one part for at most MOST_ROWS rows. at: the part's first number; step: numbers of one panel. */
INLINE void part_of_rows(int64_t rows, int64_t panel, int64_t end, int64_t depth, const float *x, int64_t x_row, const void *w,
                         int64_t at, int64_t step, float *to, int64_t to_row, int first, int bf16) {
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
    ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14) ROWS(15) ROWS(16)
  }
}

/* Products of all rows with panels [begin, end). x: rows of stride_of(k); to: rows of whole panels; sums: scratch like it, for more
   than one block. */
INLINE void products_of(const Few *k, const float *x, const void *w, float *to, float *sums, int64_t begin, int64_t end, int bf16) {
  const int64_t panels = panels_of(k), batches = (k->rows + MOST_ROWS - 1) / MOST_ROWS, stride = stride_of(k), block = block_of(k);
  for (int64_t part = 0; part < k->inputs; part += PART) {
    float *into = part < block ? to : sums;
    const int64_t depth = part + PART < k->inputs ? PART : k->inputs - part;
    /* Several batches of rows use a panel while it is in the first cache. */
    for (int64_t panel = begin; panel < end; panel += batches > 1 ? 1 : end - begin) {
      const int64_t last = batches > 1 ? panel + 1 : end;
      for (int64_t b = 0, row = 0; b < batches; b++) {
        const int64_t rows = (k->rows - row) / (batches - b);
        part_of_rows(rows, panel, last, depth, x + row * stride + part, stride, w, part * panels * LANES, depth * LANES,
                     into + row * panels * LANES, panels * LANES, part % block == 0, bf16);
        row += rows;
      }
    }
    if (part >= block && ((part + PART) % block == 0 || part + PART >= k->inputs))
      for (int64_t row = 0; row < k->rows; row++)
        for (int64_t i = (row * panels + begin) * LANES; i < (row * panels + end) * LANES; i += LANES)
          store(to + i, load(to + i) + load(sums + i));
  }
}

INLINE void pack(const Few *k, const void *w, void *packed, int threads, int bf16) {
  const int64_t panels = panels_of(k);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t part = 0; part < k->inputs; part += PART) {
      const int64_t depth = part + PART < k->inputs ? PART : k->inputs - part;
      const int64_t to = part * panels * LANES + panel * depth * LANES;
      for (int64_t lane = 0; lane < LANES; lane++) {
        const int64_t output = panel * LANES + lane, from = output * k->inputs + part;
        const int exists = output < k->outputs;
        for (int64_t i = 0; i < depth; i++) {
          if (bf16) ((uint16_t *)packed)[to + i * LANES + lane] = exists ? ((const uint16_t *)w)[from + i] : 0;
          else ((float *)packed)[to + i * LANES + lane] = exists ? ((const float *)w)[from + i] : 0;
        }
      }
    }
}

/* Writes the weight [outputs, inputs] as the product reads it: stratum_packed(k) numbers of its own format. -> 0 */
int stratum_pack(const Few *k, const void *w, void *packed, int threads) {
  if (k->bf16) pack(k, w, packed, threads, 1);
  else pack(k, w, packed, threads, 0);
  return 0;
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
  const int64_t panels = panels_of(k), stride = stride_of(k), width = k->gated ? k->outputs / 2 : k->outputs;
  const int out_bf16 = bf16 && !k->wide;
  float *in = scratch, *products = scratch + k->rows * stride, *sums = products + k->rows * panels * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < k->rows; row++)
      normed(k->inputs, k->groups, x, row * k->inputs, norm, k->eps, k->offset, in + row * stride, bf16, bf16);
#pragma omp for schedule(static)
    for (int64_t thread = 0; thread < threads; thread++)
      products_of(k, in, w, products, sums, panels * thread / threads, panels * (thread + 1) / threads, bf16);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < k->rows; row++) {
      float *line = products + row * panels * LANES;
      const float *up = line + width;
      V unused;
      if (bf16) EACH(k->outputs, store(line + j, rounded(load(line + j), bf16)),
                     put_some(line, j, n, rounded(get_some(line, j, n, 0), bf16), 0))
      if (k->function >= 0)
        EACH(width,
             V v = activated(k->function, load(line + j), &unused); if (k->gated) v *= load(up + j);
             store(line + j, rounded(v, bf16)),
             V v = activated(k->function, get_some(line, j, n, 0), &unused); if (k->gated) v *= get_some(up, j, n, 0);
             put_some(line, j, n, rounded(v, bf16), 0))
      if (k->softcap > 0)
        EACH(width, store(line + j, tanh_of(load(line + j) * (1.0f / k->softcap)) * k->softcap),
             put_some(line, j, n, tanh_of(get_some(line, j, n, 0) * (1.0f / k->softcap)) * k->softcap, 0))
      if (post != NULL) normed(width, 1, line, 0, post, k->post_eps, k->post_offset, line, 0, bf16);
      if (residual == NULL) EACH(width, put(out, row * width + j, load(line + j), out_bf16),
                                 put_some(out, row * width + j, n, get_some(line, j, n, 0), out_bf16))
      else EACH(width, put(out, row * width + j, get(residual, row * width + j, bf16) + load(line + j), out_bf16),
                put_some(out, row * width + j, n, get_some(residual, row * width + j, n, bf16) + get_some(line, j, n, 0), out_bf16))
    }
  }
}

/* norm, post, residual: null if there is none. w: packed. scratch: stratum_few_scratch(k) floats a row. -> 0 */
int stratum_few_rows(const Few *k, const void *x, const void *norm, const void *w, const void *post, const void *residual,
                     float *scratch, void *out, int threads) {
  if (k->bf16) few_rows(k, x, norm, w, post, residual, scratch, out, threads, 1);
  else few_rows(k, x, norm, w, post, residual, scratch, out, threads, 0);
  return 0;
}

int64_t stratum_packed(const Few *k) { return panels_of(k) * LANES * k->inputs; }
int64_t stratum_few_scratch(const Few *k) { return stride_of(k) + panels_of(k) * LANES * (k->inputs > block_of(k) ? 2 : 1); }

/* Of each line [lines, width]: the index of its largest number, the first among equals, and log(sum(exp)); NaN if it has a NaN. */
int stratum_line_sums(const int64_t *sizes, const float *logits, int64_t *best, float *log_sums, int threads) {
  const int64_t lines = sizes[0], width = sizes[1];
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t line = 0; line < lines; line++) {
    const float *x = logits + line * width;
    V most = all(-INFINITY), sum = {0};
    I is_nan = {0};
    EACH(width, V v = load(x + j); most = choose(v > most, v, most); is_nan |= v != v,
         for (int64_t i = 0; i < n; i++) { V v = all(x[j + i]); most = choose(v > most, v, most); is_nan |= v != v; })
    const float top = highest_of(most);
    int64_t at = 0;
    while (at + 1 < width && x[at] != top) at++;
    best[line] = at;
    EACH(width, sum += exp_of(load(x + j) - top), for (int64_t i = 0; i < n; i++) sum[i] += exp_of(all(x[j + i] - top))[0])
    log_sums[line] = top + logf(sum_of(sum));
    for (int i = 0; i < LANES; i++)
      if (is_nan[i]) log_sums[line] = NAN;
  }
  return 0;
}

/* Floats of a vector. */
int stratum_lanes(void) { return LANES; }
