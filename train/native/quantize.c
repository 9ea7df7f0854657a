/* Block quantisation on a CPU in one pass over memory: the same bits as train/precision/quantize.py.

   Every function reads a contiguous [rows, columns] matrix of fp32 or bf16 and writes fp32: the values after rounding to
   a small format, times the block's decoding scale. Compile without fused multiply-add and without fast math.

   Rounding to nearest even uses the adder: a number of exponent E plus 2^(E + 23 - mantissa) loses exactly the bits that the
   small format does not have. The sum's and the format's last bits have the same parity, so ties go to even. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RULE_FP32 = 0, RULE_POWER_OF_TWO = 1, RULE_E8M0 = 2, RULE_NVFP4 = 3 };
enum { BF16 = 1 };

typedef struct {
  int32_t mantissa, min_exponent;
  float max;
  int32_t rule, stochastic;
  uint32_t seed;
  float tensor_multiplier, tensor_decode; /* nvfp4: the fp32 scale of the whole tensor */
} Spec;

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
static inline float load(const void *data, int64_t i, int kind) {
  return kind == BF16 ? float_of((uint32_t)((const uint16_t *)data)[i] << 16) : ((const float *)data)[i];
}

/* |x| as an ordered integer; NaN as 0, so that it does not affect the scale of a block. */
static inline uint32_t magnitude(float x) {
  int32_t b = (int32_t)(bits_of(x) & 0x7FFFFFFFu);
  return (uint32_t)(b > 0x7F800000 ? 0 : b);
}

static inline float round_nearest(float y, int mantissa, int min_exponent, float max) {
  uint32_t b = bits_of(y), sign = b & 0x80000000u;
  float a = float_of(b & 0x7FFFFFFFu);
  a = a > max ? max : a; /* false for NaN, which stays */
  int32_t e = (int32_t)(bits_of(a) >> 23);
  e = e < min_exponent + 127 ? min_exponent + 127 : e;
  e = e > 232 ? 232 : e; /* only NaN is above */
  float c = float_of((uint32_t)(e + 23 - mantissa) << 23);
  return float_of(bits_of((a + c) - c) | sign);
}

/* 24 random bits of element `index` as a number in [0, 1). */
static inline float uniform(uint32_t index, uint32_t seed) {
  uint32_t h = index * 0x9E3779B9u ^ seed;
  h ^= h >> 16; h *= 0x21F0AAADu;
  h ^= h >> 15; h *= 0x735A2D97u;
  h ^= h >> 15;
  return (float)(int32_t)(h >> 8) * 0x1p-24f;
}

static inline float round_stochastic(float y, float u, int mantissa, int min_exponent, float max) {
  uint32_t b = bits_of(y), sign = b & 0x80000000u;
  float a = float_of(b & 0x7FFFFFFFu);
  a = a > max ? max : a;
  int32_t e = (int32_t)(bits_of(a) >> 23);
  e = e < min_exponent + 127 ? min_exponent + 127 : e;
  e = e > 232 ? 232 : e;
  float quantum = float_of((uint32_t)(e - mantissa) << 23), per = float_of((uint32_t)(254 - e + mantissa) << 23);
  float t = a * per, whole = (float)(int32_t)(t < 1e6f ? t : 0.0f); /* t is below 2^(mantissa+1) unless NaN */
  float up = t - whole > u ? 1.0f : 0.0f;
  float r = a == a ? (whole + up) * quantum : a;
  return float_of(bits_of(r) | sign);
}

/* Scale to multiply by and scale to decode with, from a block's amax. */
static inline void scales(float amax, const Spec *s, float *encode, float *decode) {
  if (s->rule == RULE_NVFP4) {
    float stored = round_nearest(fminf(amax * s->tensor_multiplier, 3.4028234663852886e38f), 3, -6, 448.0f);
    *encode = fminf(1.0f / (stored * s->tensor_decode), 3.4028234663852886e38f);
    *decode = stored; /* the tensor's share is applied to the product, in fp32 */
    return;
  }
  if (s->rule == RULE_E8M0) {
    uint32_t v = bits_of(amax * (1.0f / s->max)), e = v >> 23, m = v & 0x7FFFFFu;
    if (e >= 254) e = 254;
    else if (m > 0 && !(e == 0 && m <= 0x400000u)) e += 1;
    *encode = float_of(e == 254 ? 0x00400000u : (254u - e) << 23);
    *decode = float_of(e == 0 ? 0x00400000u : e << 23);
    return;
  }
  float scale = 1.0f;
  if (amax > 0.0f && amax <= 3.4028234663852886e38f) {
    scale = s->max / amax;
    scale = scale > 3.4028234663852886e38f ? 3.4028234663852886e38f : scale;
    if (s->rule == RULE_POWER_OF_TWO) scale = float_of(bits_of(scale) & 0xFF800000u);
  }
  *encode = scale;
  *decode = 1.0f / scale;
}

/* Constant format parameters let the compiler unroll and vectorise: one instance per format. */
#define APPLY(MANTISSA, MIN_EXPONENT, MAX)                                                                       \
  if (s->stochastic)                                                                                             \
    for (int64_t j = 0; j < n; j++)                                                                              \
      out[j] = round_stochastic(load(x, start + j, kind) * encode[j], uniform((uint32_t)(start + j), s->seed),   \
                                MANTISSA, MIN_EXPONENT, MAX) * decode[j];                                        \
  else                                                                                                           \
    for (int64_t j = 0; j < n; j++)                                                                              \
      out[j] = round_nearest(load(x, start + j, kind) * encode[j], MANTISSA, MIN_EXPONENT, MAX) * decode[j];

static inline __attribute__((always_inline)) void apply_kind(const void *x, int64_t start, int64_t n, int kind,
    const float *restrict encode, const float *restrict decode, float *restrict out, const Spec *s) {
  if (s->mantissa == 3) { APPLY(3, -6, 448.0f) }
  else if (s->mantissa == 2) { APPLY(2, -14, 57344.0f) }
  else { APPLY(1, 0, 6.0f) }
}
static void apply(const void *x, int64_t start, int64_t n, int kind, const float *encode, const float *decode,
                  float *out, const Spec *s) {
  if (kind == BF16) apply_kind(x, start, n, BF16, encode, decode, out, s);
  else apply_kind(x, start, n, 0, encode, decode, out, s);
}

static inline __attribute__((always_inline)) uint32_t amax_kind(const void *x, int64_t start, int64_t n, int kind) {
  uint32_t lane[16] = {0}, m = 0;
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)
    for (int k = 0; k < 16; k++) {
      uint32_t b = magnitude(load(x, start + j + k, kind));
      lane[k] = b > lane[k] ? b : lane[k];
    }
  for (; j < n; j++) { uint32_t b = magnitude(load(x, start + j, kind)); m = b > m ? b : m; }
  for (int k = 0; k < 16; k++) m = lane[k] > m ? lane[k] : m;
  return m;
}
static uint32_t amax_of(const void *x, int64_t start, int64_t n, int kind) {
  return kind == BF16 ? amax_kind(x, start, n, BF16) : amax_kind(x, start, n, 0);
}
static inline __attribute__((always_inline)) void column_kind(const void *x, int64_t start, int64_t n, int kind,
                                                              uint32_t *restrict m) {
  for (int64_t j = 0; j < n; j++) { uint32_t b = magnitude(load(x, start + j, kind)); m[j] = b > m[j] ? b : m[j]; }
}

enum { WIDTH = 2048 }; /* columns processed at once: their scales fit the first-level cache */

/* Largest magnitude of the whole matrix. */
float stratum_amax(const void *x, int64_t count, int kind, int threads) {
  uint32_t m = 0;
  int64_t piece = 65536, pieces = (count + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) reduction(max : m) if (pieces > 1)
  for (int64_t p = 0; p < pieces; p++) {
    int64_t start = p * piece, n = count - start < piece ? count - start : piece;
    uint32_t b = amax_of(x, start, n, kind);
    m = b > m ? b : m;
  }
  return float_of(m);
}

/* One scale for the whole tensor: out = round(x * encode). -> amax of x. */
float stratum_tensor(const void *x, int64_t count, int kind, float encode, const Spec *s, float *out, int threads) {
  uint32_t m = 0;
  int64_t piece = 2048, pieces = (count + piece - 1) / piece;
  float encodes[2048], ones[2048];
  for (int64_t j = 0; j < piece; j++) { encodes[j] = encode; ones[j] = 1.0f; }
#pragma omp parallel for num_threads(threads) reduction(max : m) if (pieces > 8)
  for (int64_t p = 0; p < pieces; p++) {
    int64_t start = p * piece, n = count - start < piece ? count - start : piece;
    uint32_t b = amax_of(x, start, n, kind);
    m = b > m ? b : m;
    apply(x, start, n, kind, encodes, ones, out + start, s);
  }
  return float_of(m);
}

/* Blocks of `height` x `width`; blocks at the edges may be smaller. */
void stratum_blocks(const void *x, int64_t rows, int64_t columns, int kind, int64_t height, int64_t width,
                    const Spec *s, float *out, int threads) {
  int64_t bands = (rows + height - 1) / height, span = WIDTH / width * width;
  if (span < width) span = width;
  int64_t spans = (columns + span - 1) / span;
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * columns > 16384)
  for (int64_t band = 0; band < bands; band++)
    for (int64_t part = 0; part < spans; part++) {
      int64_t top = band * height, bottom = top + height < rows ? top + height : rows;
      int64_t left = part * span, n = columns - left < span ? columns - left : span;
      uint32_t m[n];
      float encode[n], decode[n];
      if (height == 1) {
        for (int64_t j = 0; j < n; j += width) {
          int64_t k = n - j < width ? n - j : width;
          m[j] = amax_of(x, top * columns + left + j, k, kind);
        }
      } else {
        memset(m, 0, sizeof m);
        for (int64_t i = top; i < bottom; i++) {
          if (kind == BF16) column_kind(x, i * columns + left, n, BF16, m);
          else column_kind(x, i * columns + left, n, 0, m);
        }
        for (int64_t j = 0; width > 1 && j < n; j += width) {
          int64_t end = j + width < n ? j + width : n;
          uint32_t most = 0;
          for (int64_t k = j; k < end; k++) most = m[k] > most ? m[k] : most;
          m[j] = most;
        }
      }
      if (width == 1) {
        for (int64_t j = 0; j < n; j++) scales(float_of(m[j]), s, &encode[j], &decode[j]);
      } else {
        for (int64_t j = 0; j < n; j += width) {
          int64_t end = j + width < n ? j + width : n;
          float e, d;
          scales(float_of(m[j]), s, &e, &d);
          for (int64_t k = j; k < end; k++) { encode[k] = e; decode[k] = d; }
        }
      }
      for (int64_t i = top; i < bottom; i++)
        apply(x, i * columns + left, n, kind, encode, decode, out + i * columns + left, s);
    }
}

/* out[16 r + i, :] = sum over k of matrix[k, i] x[16 r + k, :], in the order of k, rounded to bf16 where x is bf16. */
void stratum_rotate(const void *x, int64_t rows, int64_t columns, int kind, const float *matrix, float *out,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > 16384)
  for (int64_t top = 0; top < rows; top += 16)
    for (int64_t left = 0; left < columns; left += 256) {
      int64_t n = columns - left < 256 ? columns - left : 256;
      float block[16][256];
      for (int64_t k = 0; k < 16; k++)
        for (int64_t j = 0; j < n; j++) block[k][j] = load(x, (top + k) * columns + left + j, kind);
      for (int64_t i = 0; i < 16; i++) {
        float *to = out + (top + i) * columns + left;
        for (int64_t j = 0; j < n; j++) to[j] = matrix[i] * block[0][j];
        for (int64_t k = 1; k < 16; k++) {
          float w = matrix[k * 16 + i];
          for (int64_t j = 0; j < n; j++) to[j] = to[j] + w * block[k][j];
        }
        if (kind == BF16)
          for (int64_t j = 0; j < n; j++) {
            uint32_t b = bits_of(to[j]);
            to[j] = to[j] == to[j] ? float_of((b + 0x7FFFu + ((b >> 16) & 1u)) & 0xFFFF0000u) : to[j];
          }
      }
    }
}

/* Compares values * factor with x, over the finite elements of x. sums: sum of x^2, sum of squared differences, number of
   elements that were not zero and became zero, number of elements with |x| > limit. Pieces are summed in order: the same
   result for any number of threads. */
int stratum_compare(const void *x, const float *values, int64_t count, int kind, float factor, float limit, double *sums,
                    int threads) {
  enum { PIECE = 8192, LANES = 8 };
  int64_t pieces = (count + PIECE - 1) / PIECE;
  double(*part)[4] = malloc(pieces * sizeof *part);
  if (part == NULL && pieces > 0) return 1;
#pragma omp parallel for num_threads(threads) if (pieces > 4)
  for (int64_t p = 0; p < pieces; p++) {
    int64_t start = p * PIECE, n = count - start < PIECE ? count - start : PIECE;
    double signal[LANES] = {0}, noise[LANES] = {0};
    int32_t zero = 0, over = 0;
    for (int64_t j = 0; j < n; j++) {
      float a = load(x, start + j, kind), d = values[start + j] * factor;
      int32_t finite = (bits_of(a) & 0x7F800000u) != 0x7F800000u;
      zero += (d == 0.0f) & (a != 0.0f);
      over += fabsf(a) > limit;
      double e = finite ? (double)(d - a) : 0.0, s = finite ? (double)a : 0.0;
      signal[j % LANES] += s * s;
      noise[j % LANES] += e * e;
    }
    part[p][0] = part[p][1] = 0.0;
    for (int k = 0; k < LANES; k++) { part[p][0] += signal[k]; part[p][1] += noise[k]; }
    part[p][2] = zero;
    part[p][3] = over;
  }
  for (int k = 0; k < 4; k++) sums[k] = 0.0;
  for (int64_t p = 0; p < pieces; p++)
    for (int k = 0; k < 4; k++) sums[k] += part[p][k];
  free(part);
  return 0;
}
