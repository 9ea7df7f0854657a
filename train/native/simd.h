/* Vectors of floats, exp and tanh on them, and small matrix products: shared by scan.c, attention.c and passes.c.

   A vector is as wide as the processor's registers; gcc and clang turn the vector type into instructions. exp and tanh
   are good to about two units in the last place; their coefficients are least-squares fits at Chebyshev nodes of
   2^f on [-1/2, 1/2] (relative error 4e-9) and (tanh(y)/y - 1)/y^2 in y^2 on [0, 0.55^2] (4e-9). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define TILE_ROWS 8
#else
#define LANES 8
#define TILE_ROWS 6
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef V Vu __attribute__((aligned(4), may_alias)); /* at any address */

static inline V load(const float *p) { return *(const Vu *)p; }
static inline void store(float *p, V x) { *(Vu *)p = x; }
static inline V all(float x) { return x - (V){0}; }
static inline V choose(I mask, V yes, V no) { return (V)(((I)yes & mask) | ((I)no & ~mask)); }
static inline V at_least(V x, float low) { return choose(x < all(low), all(low), x); } /* both return NaN for NaN */
static inline V at_most(V x, float high) { return choose(x > all(high), all(high), x); }
static inline I lane_numbers(void) {
  I n;
  for (int i = 0; i < LANES; i++) n[i] = i;
  return n;
}
/* Lane i of the result is x[m[i]] if m[i] < LANES, else y[m[i] - LANES]: one or two instructions if m is constant. */
static inline V mix(V x, V y, I m) {
#ifdef __clang__
  V out;
  for (int i = 0; i < LANES; i++) out[i] = m[i] < LANES ? x[m[i]] : y[m[i] - LANES];
  return out;
#else
  return __builtin_shuffle(x, y, m);
#endif
}
/* Sum from the first lane to the last: used once per line of attention or of a norm. */
static inline float sum_of(V x) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += x[i];
  return s;
}
/* Sum by halves, in fewer steps: for the scan, which needs several sums per token. */
static inline float sum_by_halves(V x) {
  for (int half = LANES / 2; half > 0; half /= 2) x += mix(x, x, (lane_numbers() + half) & (LANES - 1));
  return x[0];
}

/* Lanes without bit `half` get the sums of x's halves, the others those of y's. */
static inline V fold(V x, V y, const int half) {
  const I n = lane_numbers(), from_y = ((n & half) != 0) & LANES;
  return mix(x, y, (n & ~half) + from_y) + mix(x, y, (n | half) + from_y);
}
/* Lane i is sum_by_halves(x[i]), bit by bit. Overwrites x. */
#define FOLD_ALL(half) _Pragma("GCC unroll 16") for (int i = 0; i < (half); i++) x[i] = fold(x[i], x[i + (half)], half);
static inline V sums_by_halves(V x[LANES]) {
#if LANES == 16
  FOLD_ALL(8)
#endif
  FOLD_ALL(4)
  FOLD_ALL(2)
  FOLD_ALL(1)
  return x[0];
}

static inline float highest_of(V x) {
  for (int half = LANES / 2; half > 0; half /= 2) {
    const V other = mix(x, x, (lane_numbers() + half) & (LANES - 1));
    x = choose(other > x, other, x);
  }
  return x[0];
}

/* e^x for x in [-87, 88]; outside, the value at the end of that range. */
static inline V exp_of(V x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const V magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  V n = x * all(1.44269504f) + magic;
  I power = (I)n << 23;
  n -= magic;
  V f = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f); /* ln 2 in two parts */
  f *= all(1.44269504f);
  V p = all(1.53453075e-4f);
  p = p * f + all(1.34088460e-3f);
  p = p * f + all(9.61856823e-3f);
  p = p * f + all(5.55030107e-2f);
  p = p * f + all(2.40226448e-1f);
  p = p * f + all(6.93147242e-1f);
  p = p * f + all(1.0f);
  return (V)((I)p + power);
}

static inline V tanh_of(V x) {
  I negative = x < all(0.0f);
  V a = choose(negative, -x, x);
  V large = all(1.0f) - all(2.0f) / (exp_of(at_most(a + a, 40.0f)) + all(1.0f));
  V z = x * x;
  V p = all(-6.61575468e-3f);
  p = p * z + all(2.13127453e-2f);
  p = p * z + all(-5.39100654e-2f);
  p = p * z + all(1.33331180e-1f);
  p = p * z + all(-3.33333313e-1f);
  V small = x + x * z * p;
  return choose(a < all(0.55f), small, choose(negative, -large, large));
}

/* 1 / (1 + e^-x) */
static inline V sigmoid_of(V x) { return all(1.0f) / (all(1.0f) + exp_of(-x)); }

/* Products C (+)= A B of small matrices in the cache. A's element (i, k) is a[i * a_row + k * a_col], so A may be
   transposed; B and C have contiguous rows, their widths are multiples of LANES.

   part: FULL; LOWER if A is zero right of its diagonal (k > i); UPPER if it is zero left of it (k < i); BELOW if only C on
   and left of the diagonal is needed (right of it, within a tile, the values of C are undefined). */
enum { FULL = 0, LOWER = 1, UPPER = 2, BELOW = 3 };

#define INLINE static inline __attribute__((always_inline))

INLINE void tile(const int rows, const int vectors, int64_t first, int64_t last, const float *restrict a, int64_t a_row,
                 int64_t a_col, const float *restrict b, int64_t b_row, float *restrict c, int64_t c_row, int add) {
  V sum[TILE_ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : (V){0};
  for (int64_t k = first; k < last; k++) {
    const float *column = a + k * a_col, *row = b + k * b_row;
    V right[2];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) right[j] = load(row + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      V left = all(column[i * a_row]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

#define TILE(R, N) tile(R, N, first, last, a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, add)
#define TILES(N)              \
  switch (rows) {             \
    case 1: TILE(1, N); break; \
    case 2: TILE(2, N); break; \
    case 3: TILE(3, N); break; \
    case 4: TILE(4, N); break; \
    case 5: TILE(5, N); break; \
    case 6: TILE(6, N); break; \
    case 7: TILE(7 <= TILE_ROWS ? 7 : 1, N); break; \
    default: TILE(TILE_ROWS, N); \
  }

static inline void product(int part, int64_t height, int64_t width, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
  for (int64_t i = 0; i < height; i += TILE_ROWS) {
    int64_t rows = height - i < TILE_ROWS ? height - i : TILE_ROWS;
    int64_t first = part == UPPER ? i : 0;
    int64_t last = part == LOWER && i + rows < depth ? i + rows : depth;
    int64_t right = part == BELOW && i + rows < width ? i + rows : width, j = 0;
    for (; j + 2 * LANES <= width && j < right; j += 2 * LANES) TILES(2)
    if (j < right) TILES(1)
  }
}

/* Rows i and i + block of a square of LANES vectors exchange their off-diagonal blocks. */
#define EXCHANGE(block)                                                                                       \
  for (int i = 0; i < LANES; i++)                                                                             \
    if (!(i & (block))) {                                                                                     \
      const I n = lane_numbers(), is_right = (n & (block)) != 0;                                              \
      const I upper = (n & ~is_right) | ((n + LANES - (block)) & is_right);                                   \
      const I lower = ((n + (block)) & ~is_right) | ((n + LANES) & is_right);                                 \
      const V x = square[i], y = square[i + (block)];                                                         \
      square[i] = mix(x, y, upper);                                                                           \
      square[i + (block)] = mix(x, y, lower);                                                                 \
    }

/* out[j][i] = in[i][j] for i < height, zero for height <= i < padded; width and padded are multiples of LANES. */
static inline void transpose(int64_t height, int64_t width, const float *in, int64_t in_row, float *out, int64_t padded) {
  for (int64_t i0 = 0; i0 < padded; i0 += LANES)
    for (int64_t j0 = 0; j0 < width; j0 += LANES) {
      V square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) square[i] = i0 + i < height ? load(in + (i0 + i) * in_row + j0) : (V){0};
#if LANES == 16
#pragma GCC unroll 16
      EXCHANGE(8)
#endif
#pragma GCC unroll 16
      EXCHANGE(4)
#pragma GCC unroll 16
      EXCHANGE(2)
#pragma GCC unroll 16
      EXCHANGE(1)
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) store(out + (j0 + j) * padded + i0, square[j]);
    }
}

/* ---- tensors in fp32 or bf16 */

typedef uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

/* LANES numbers from element i of a tensor; get_some: the first n of them, padded with zeros. */
INLINE V get(const void *p, int64_t i, int bf16) {
  if (!bf16) return load((const float *)p + i);
  return (V)(__builtin_convertvector(*(const Half *)((const uint16_t *)p + i), U) << 16);
}
INLINE V get_some(const void *p, int64_t i, int64_t n, int bf16) {
  float rest[LANES] = {0};
  for (int64_t j = 0; j < n; j++) {
    if (bf16) {
      uint32_t bits = (uint32_t)((const uint16_t *)p)[i + j] << 16;
      memcpy(rest + j, &bits, 4);
    } else rest[j] = ((const float *)p)[i + j];
  }
  return load(rest);
}

/* bf16 by rounding to nearest, ties to even, as torch does. */
INLINE Half narrow(V x) {
  U bits = (U)x;
  U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  I is_nan = x != x;
  rounded = (rounded & (U)~is_nan) | ((U)is_nan & 0x7fc0);
  return __builtin_convertvector(rounded, Half);
}
INLINE void put(void *p, int64_t i, V x, int bf16) {
  if (bf16) *(Half *)((uint16_t *)p + i) = narrow(x);
  else store((float *)p + i, x);
}
INLINE void put_some(void *p, int64_t i, int64_t n, V x, int bf16) {
  if (bf16) {
    Half h = narrow(x);
    for (int64_t j = 0; j < n; j++) ((uint16_t *)p)[i + j] = h[j];
  } else for (int64_t j = 0; j < n; j++) ((float *)p)[i + j] = x[j];
}

/* Runs `whole` for full vectors of a line and `part` for the remaining n numbers; j is the index of the first number. */
#define EACH(width, whole, part)                         \
  {                                                      \
    int64_t j = 0;                                       \
    for (; j + LANES <= (width); j += LANES) { whole; }  \
    const int64_t n = (width) - j;                       \
    if (n > 0) { part; }                                 \
  }

/* ---- activation functions */

enum { SQUARED_RELU = 0, GELU = 1, SILU = 2 };

/* f(x), and its derivative. */
INLINE V activated(int function, V x, V *slope) {
  if (function == SQUARED_RELU) {
    V positive = at_least(x, 0.0f);
    *slope = positive + positive;
    return positive * positive;
  }
  /* GELU by tanh is x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3); SiLU is x sigmoid(x). */
  V s, bend;
  if (function == GELU) {
    V square = x * x;
    s = sigmoid_of(x * (square * 0.0713548163f + 1.59576912f));
    bend = square * 0.214064449f + 1.59576912f;
  } else {
    s = sigmoid_of(x);
    bend = all(1.0f);
  }
  *slope = s + x * s * (1.0f - s) * bend;
  return x * s;
}
