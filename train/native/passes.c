/* Norms, activations and the loss, each in one pass over memory, forward and backward. Definitions: train/model/norm.py,
   activation.py, cross_entropy.py.

   Tensors are fp32 or bf16 (`bf16` says which), arithmetic is fp32. One thread computes each line of a matrix; the gradient
   of a norm's weight is summed over stretches of lines that depend on shapes only: the same bits for any number of threads. */

#include "simd.h"

typedef struct {
  int64_t lines, width, groups, stretch; /* lines of `width`, of which `groups` make a row; lines of a stretch */
  int32_t bf16;
  float eps, offset;
} Norm;

typedef struct {
  int64_t lines, width; /* of the output */
  int32_t bf16, function, gated;
} Activation;

typedef struct {
  int64_t lines, width, pitch; /* `width` logits of each line count; lines begin `pitch` numbers apart */
  int32_t bf16;
  float cap; /* 0: none */
} Loss;

/* ---- RMSNorm: out = x r (weight + offset), r = 1 / sqrt(mean(x^2) + eps) of each line */

INLINE void norm_forward(const Norm *k, const void *x, const float *weight, void *out, float *roots, int threads, int bf16) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->lines; line++) {
    const int64_t at = line * k->width;
    const float *w = weight + line % k->groups * k->width;
    V sum = {0};
    EACH(k->width, V v = get(x, at + j, bf16); sum += v * v, V v = get_some(x, at + j, n, bf16); sum += v * v)
    const float root = 1.0f / sqrtf(sum_of(sum) / (float)k->width + k->eps);
    roots[line] = root;
    EACH(k->width, put(out, at + j, get(x, at + j, bf16) * root * (load(w + j) + k->offset), bf16),
         put_some(out, at + j, n, get_some(x, at + j, n, bf16) * root * (get_some(w, j, n, 0) + k->offset), bf16))
  }
}

/* grad_x = r (h - x r^2 mean(h x)) with h = grad (weight + offset); sums [stretches, groups * width] of grad x r. */
INLINE void norm_backward(const Norm *k, const void *x, const float *weight, const float *roots, const void *grad, void *grad_x,
                          float *sums, int threads, int bf16) {
  const int64_t stretches = (k->lines + k->stretch - 1) / k->stretch;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < stretches; s++) {
    float *own = sums + s * k->groups * k->width;
    memset(own, 0, (size_t)(k->groups * k->width) * 4);
    const int64_t end = (s + 1) * k->stretch < k->lines ? (s + 1) * k->stretch : k->lines;
    for (int64_t line = s * k->stretch; line < end; line++) {
      const int64_t at = line * k->width, place = line % k->groups * k->width;
      const float root = roots[line], *w = weight + place;
      float *total = own + place;
      V dot = {0};
      EACH(k->width,
           V v = get(x, at + j, bf16); V g = get(grad, at + j, bf16);
           dot += v * g * (load(w + j) + k->offset); store(total + j, load(total + j) + g * v * root),
           V v = get_some(x, at + j, n, bf16); V g = get_some(grad, at + j, n, bf16);
           dot += v * g * (get_some(w, j, n, 0) + k->offset);
           put_some(total, j, n, get_some(total, j, n, 0) + g * v * root, 0))
      const float mean = sum_of(dot) / (float)k->width * root * root;
      EACH(k->width,
           put(grad_x, at + j, (get(grad, at + j, bf16) * (load(w + j) + k->offset) - get(x, at + j, bf16) * mean) * root, bf16),
           put_some(grad_x, at + j, n,
                    (get_some(grad, at + j, n, bf16) * (get_some(w, j, n, 0) + k->offset) - get_some(x, at + j, n, bf16) * mean) *
                        root, bf16))
    }
  }
}

/* ---- activations: out = f(x), or f(gate) * up if gated (a line of x is then [gate | up]) */

INLINE void activation_forward(const Activation *k, const void *x, void *out, int threads, int bf16, int function, int gated) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->lines; line++) {
    const int64_t to = line * k->width, at = gated ? 2 * to : to, up = at + k->width;
    V slope;
    EACH(k->width,
         V y = activated(function, get(x, at + j, bf16), &slope);
         if (gated) y *= get(x, up + j, bf16);
         put(out, to + j, y, bf16),
         V y = activated(function, get_some(x, at + j, n, bf16), &slope);
         if (gated) y *= get_some(x, up + j, n, bf16);
         put_some(out, to + j, n, y, bf16))
  }
}

INLINE void activation_backward(const Activation *k, const void *x, const void *grad, void *grad_x, int threads, int bf16,
                                int function, int gated) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->lines; line++) {
    const int64_t to = line * k->width, at = gated ? 2 * to : to, up = at + k->width;
    V slope;
    EACH(k->width,
         V g = get(grad, to + j, bf16); V y = activated(function, get(x, at + j, bf16), &slope);
         if (gated) { put(grad_x, up + j, g * y, bf16); slope *= get(x, up + j, bf16); }
         put(grad_x, at + j, g * slope, bf16),
         V g = get_some(grad, to + j, n, bf16); V y = activated(function, get_some(x, at + j, n, bf16), &slope);
         if (gated) { put_some(grad_x, up + j, n, g * y, bf16); slope *= get_some(x, up + j, n, bf16); }
         put_some(grad_x, at + j, n, g * slope, bf16))
  }
}

/* ---- cross-entropy over the logits of a line, with a cap of c tanh(x / c) */

INLINE V capped(V x, float cap) { return cap == 0 ? x : tanh_of(x * (1.0f / cap)) * cap; }

/* log-sum-exp of each line, and the (capped) logit at its label, 0 if the label is negative. */
INLINE void loss_forward(const Loss *k, const void *logits, const int64_t *labels, float *log_sums, float *targets, int threads,
                         int bf16, int has_cap) {
  const float cap = has_cap ? k->cap : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->lines; line++) {
    const int64_t at = line * k->pitch;
    V highest = all(-INFINITY), sum = {0};
    EACH(k->width, V x = get(logits, at + j, bf16); highest = choose(x > highest, x, highest),
         for (int64_t i = 0; i < n; i++) { V x = get_some(logits, at + j + i, 1, bf16); if (x[0] > highest[0]) highest[0] = x[0]; })
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
    top = capped(all(top), cap)[0];
    float rest = 0;
    EACH(k->width, sum += exp_of(capped(get(logits, at + j, bf16), cap) - top),
         V e = exp_of(capped(get_some(logits, at + j, n, bf16), cap) - top); for (int64_t i = 0; i < n; i++) rest += e[i])
    log_sums[line] = top + logf(sum_of(sum) + rest);
    targets[line] = labels[line] < 0 ? 0 : capped(get_some(logits, at + labels[line], 1, bf16), cap)[0];
  }
}

/* In place: logits become grad (softmax - onehot(label)), times the cap's slope. */
INLINE void loss_backward(const Loss *k, void *logits, const int64_t *labels, const float *log_sums, const float *grad, int threads,
                          int bf16, int has_cap) {
  const float inner = has_cap ? 1.0f / k->cap : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < k->lines; line++) {
    const int64_t at = line * k->pitch;
    const float g = grad[line], log_sum = log_sums[line];
    const V own = labels[line] < 0 ? all(0.0f) : get_some(logits, at + labels[line], 1, bf16);
    EACH(k->width,
         V x = get(logits, at + j, bf16); V d;
         if (has_cap) { V t = tanh_of(x * inner); d = exp_of(t * k->cap - log_sum) * (1.0f - t * t) * g; }
         else d = exp_of(x - log_sum) * g;
         put(logits, at + j, d, bf16),
         V x = get_some(logits, at + j, n, bf16); V d;
         if (has_cap) { V t = tanh_of(x * inner); d = exp_of(t * k->cap - log_sum) * (1.0f - t * t) * g; }
         else d = exp_of(x - log_sum) * g;
         put_some(logits, at + j, n, d, bf16))
    if (labels[line] >= 0) {
      const V t = has_cap ? tanh_of(own * inner) : all(0.0f);
      const V p = exp_of((has_cap ? t * k->cap : own) - log_sum);
      put_some(logits, at + labels[line], 1, (p - 1.0f) * (1.0f - t * t) * g, bf16);
    }
  }
}

/* ---- one specialised copy for each format, function and cap */

int stratum_norm_forward(const Norm *k, const void *x, const float *weight, void *out, float *roots, int threads) {
  if (k->bf16) norm_forward(k, x, weight, out, roots, threads, 1);
  else norm_forward(k, x, weight, out, roots, threads, 0);
  return 0;
}

int stratum_norm_backward(const Norm *k, const void *x, const float *weight, const float *roots, const void *grad, void *grad_x,
                          float *sums, float *grad_weight, int threads) {
  if (k->bf16) norm_backward(k, x, weight, roots, grad, grad_x, sums, threads, 1);
  else norm_backward(k, x, weight, roots, grad, grad_x, sums, threads, 0);
  const int64_t stretches = (k->lines + k->stretch - 1) / k->stretch, width = k->groups * k->width;
  for (int64_t j = 0; j < width; j++) {
    double sum = 0;
    for (int64_t s = 0; s < stretches; s++) sum += sums[s * width + j];
    grad_weight[j] = (float)sum;
  }
  return 0;
}

#define FOR_FUNCTION(call, bf16)                                           \
  switch (k->function * 2 + k->gated) {                                    \
    case 2 * SQUARED_RELU: call(bf16, SQUARED_RELU, 0); break;             \
    case 2 * SQUARED_RELU + 1: call(bf16, SQUARED_RELU, 1); break;         \
    case 2 * GELU: call(bf16, GELU, 0); break;                             \
    case 2 * GELU + 1: call(bf16, GELU, 1); break;                         \
    case 2 * SILU: call(bf16, SILU, 0); break;                             \
    case 2 * SILU + 1: call(bf16, SILU, 1); break;                         \
    default: return 1;                                                     \
  }

int stratum_activation_forward(const Activation *k, const void *x, void *out, int threads) {
#define CALL(bf16, function, gated) activation_forward(k, x, out, threads, bf16, function, gated)
  if (k->bf16) FOR_FUNCTION(CALL, 1) else FOR_FUNCTION(CALL, 0)
#undef CALL
  return 0;
}

int stratum_activation_backward(const Activation *k, const void *x, const void *grad, void *grad_x, int threads) {
#define CALL(bf16, function, gated) activation_backward(k, x, grad, grad_x, threads, bf16, function, gated)
  if (k->bf16) FOR_FUNCTION(CALL, 1) else FOR_FUNCTION(CALL, 0)
#undef CALL
  return 0;
}

#define FOR_CAP(call)                                               \
  if (k->bf16) { if (k->cap != 0) call(1, 1); else call(1, 0); }    \
  else { if (k->cap != 0) call(0, 1); else call(0, 0); }

int stratum_loss_forward(const Loss *k, const void *logits, const int64_t *labels, float *log_sums, float *targets, int threads) {
#define CALL(bf16, has_cap) loss_forward(k, logits, labels, log_sums, targets, threads, bf16, has_cap)
  FOR_CAP(CALL)
#undef CALL
  return 0;
}

int stratum_loss_backward(const Loss *k, void *logits, const int64_t *labels, const float *log_sums, const float *grad,
                          int threads) {
#define CALL(bf16, has_cap) loss_backward(k, logits, labels, log_sums, grad, threads, bf16, has_cap)
  FOR_CAP(CALL)
#undef CALL
  return 0;
}

/* Floats of a vector. */
int stratum_lanes(void) { return LANES; }
