/* The Mamba-2 core of train/model/ssd.py (its docstring has the formulas and the letters) in one pass over memory.

   A task is a row and some heads of a group. It processes the row chunk by chunk with the state in the cache; the data of a
   chunk (Q x Q matrices, decays, scaled copies) is in scratch memory that fits the cache too. Backward runs the chunks in
   reverse with the state's gradient. A group's heads are split over as many tasks (`splits`) as the threads need; each task
   computes the group's C B^T again. Sums over heads (the gradients of B and C) follow one binary tree over the group's
   `parts` (a power of two, of equally many heads, in order); a task is a subtree: the same bits for any number of threads.

   Layouts: zxbcdt [L, B, width]; pre, grad_pre [B, L, C] (C = HP + 2GN channels: x, B, C); dt, s [B, L, H]; y [B, L, HP];
   out [L, B, HP]; states [B, chunks, H, N, P]; first [B, L] place of the first token of each token's document, or null. */

#include "simd.h"

typedef struct {
  int64_t rows, length, width, heads, head_dim, state, groups, chunk, splits, parts, taps;
  int64_t stepwise; /* segments up to this length run token by token: their bits do not depend on how a text is cut into them */
} Shape;

typedef struct {
  int64_t inner, channels, per_group, chunks, padded;
} Sizes;

static Sizes sizes_of(const Shape *h) {
  Sizes s;
  s.inner = h->heads * h->head_dim;
  s.channels = s.inner + 2 * h->groups * h->state;
  s.per_group = h->heads / h->groups;
  s.chunks = (h->length + h->chunk - 1) / h->chunk;
  s.padded = (h->chunk + LANES - 1) / LANES * LANES;
  return s;
}

/* Size of the sums over the heads of a group for a chunk: gradients of the scores [Q, Qp], and of B and C, [Q, N] each. */
static int64_t shared_floats(const Shape *h, const Sizes *z) { return h->chunk * (z->padded + 2 * h->state); }

static void add_to(float *sum, const float *more, int64_t floats) {
  for (int64_t i = 0; i < floats; i++) sum[i] += more[i];
}

/* Allocates from a task's scratch memory, in units of 64 bytes. */
static inline float *take(float **memory, int64_t floats) {
  float *here = *memory;
  *memory += (floats + 15) / 16 * 16;
  return here;
}

static inline V silu_of(V x) { return x * sigmoid_of(x); }
static inline V silu_slope(V x) {
  V s = sigmoid_of(x);
  return s * (all(1.0f) + x * (all(1.0f) - s));
}

/* The input of one chunk for one group. */
typedef struct {
  int64_t start, tokens;
  float *B, *C, *BT, *scores; /* [Q, N], [Q, N], [N, Qp], tril(C B^T) within documents [Q, Qp] */
  int64_t *skip;              /* tokens of the chunk before each token's document; negative where that began earlier */
} Chunk;

static void place_chunk(const Shape *h, const Sizes *z, const float *pre, const int64_t *first, int64_t b, int64_t g, int64_t c,
                        Chunk *k) {
  const int64_t N = h->state;
  k->start = c * h->chunk;
  k->tokens = h->length - k->start < h->chunk ? h->length - k->start : h->chunk;
  for (int64_t i = 0; i < k->tokens; i++) {
    const float *row = pre + (b * h->length + k->start + i) * z->channels + z->inner + g * N;
    for (int64_t n = 0; n < N; n += LANES) {
      store(k->B + i * N + n, silu_of(load(row + n)));
      store(k->C + i * N + n, silu_of(load(row + h->groups * N + n)));
    }
    k->skip[i] = first == NULL ? -1 : first[b * h->length + k->start + i] - k->start;
  }
}

static void read_chunk(const Shape *h, const Sizes *z, const float *pre, const int64_t *first, int64_t b, int64_t g, int64_t c,
                       Chunk *k) {
  const int64_t N = h->state, Qp = z->padded;
  place_chunk(h, z, pre, first, b, g, c, k);
  transpose(k->tokens, N, k->B, N, k->BT, Qp);
  product(BELOW, k->tokens, Qp, N, k->C, N, 1, k->BT, Qp, k->scores, Qp, 0);
  for (int64_t i = 0; i < k->tokens; i++) {
    for (int64_t j = 0; j < k->skip[i]; j++) k->scores[i * Qp + j] = 0;
    for (int64_t j = i + 1; j < Qp; j++) k->scores[i * Qp + j] = 0;
  }
}

/* Running sums s of dt A of one head within a chunk, as two floats: s = near + rest. A single float would lose small steps
   after a large one: s_i - s_j of two sums near -1000 would have an error of 6e-5, and e^(s_i - s_j) as well.
   Sums restart at zero at each document, so that a document's numbers do not depend on the one before it. */
typedef struct {
  float *near, *rest;
} Sums;

/* s_i - s_j of one i and a vector of j. */
static inline V between(V near, V rest, Sums s, int64_t j) { return (near - load(s.near + j)) + (rest - load(s.rest + j)); }

/* Decays of one head within a chunk, [Qp] each: s; carry = e^s, 0 for tokens that do not see the state before the chunk
   (later documents); gain = e^(s_Q - s), 0 for tokens that the state after the chunk does not see. -> decay of the state
   over the chunk. */
static float read_head(const Shape *h, const Chunk *k, const float *dt, float A, int64_t b, int64_t head, Sums s, float *step,
                       float *carry, float *gain, int64_t padded) {
  const int64_t last = k->tokens - 1;
  double sum = 0;
  for (int64_t i = 0; i < k->tokens; i++) {
    step[i] = dt[(b * h->length + k->start + i) * h->heads + head];
    if (k->skip[i] == i) sum = 0;
    sum += (double)step[i] * A;
    s.near[i] = (float)sum;
    s.rest[i] = (float)(sum - s.near[i]);
  }
  for (int64_t i = k->tokens; i < padded; i++) s.near[i] = s.near[last], s.rest[i] = s.rest[last], step[i] = 0;
  for (int64_t i = 0; i < padded; i += LANES) {
    store(carry + i, exp_of(load(s.near + i)));
    store(gain + i, exp_of(between(all(s.near[last]), all(s.rest[last]), s, i)));
  }
  for (int64_t i = 0; i < k->tokens; i++)
    if (k->skip[i] >= 0) carry[i] = 0;
  for (int64_t i = 0; i < k->skip[last]; i++) gain[i] = 0;
  return carry[last];
}

/* out = scores * exp(s_i - s_j) on and left of the diagonal, zero right of it within the vectors that cross it. Between two
   documents s_i - s_j can be positive; exp_of is finite there, and the scores are zero. */
static void decayed(int64_t tokens, int64_t padded, const float *scores, Sums s, float *decays, float *out) {
  const I lanes = lane_numbers();
  for (int64_t i = 0; i < tokens; i++) {
    const V near = all(s.near[i]), rest = all(s.rest[i]);
    for (int64_t j = 0; j <= i; j += LANES) {
      V d = exp_of(between(near, rest, s, j));
      d = choose(lanes + (int32_t)j <= (int32_t)i, d, all(0.0f));
      if (decays != NULL) store(decays + i * padded + j, d);
      store(out + i * padded + j, d * load(scores + i * padded + j));
    }
  }
}

static int64_t chunk_floats(const Shape *h, const Sizes *z) {
  return 2 * h->chunk * h->state + h->state * z->padded + h->chunk * z->padded + h->chunk * 2 + 16 * 8;
}

static Chunk new_chunk(const Shape *h, const Sizes *z, float **memory) {
  Chunk k;
  k.B = take(memory, h->chunk * h->state);
  k.C = take(memory, h->chunk * h->state);
  k.BT = take(memory, h->state * z->padded);
  k.scores = take(memory, h->chunk * z->padded);
  k.skip = (int64_t *)take(memory, h->chunk * 2);
  return k;
}

/* One task of the forward pass: a row's heads of one split of a group, chunk by chunk. running: the heads' states [H, N, P] of
   a text that is continued, updated; null: the row begins, and its last state is not needed. states: as above, or null.
   -> 0, or 1 if memory is short. */
static int scan_task(const Shape *h, const float *zxbcdt, const float *pre, const float *dt, const float *A, const float *D,
                     const int64_t *first, float *y, float *out, float *states, float *running, int64_t b, int64_t g,
                     int64_t split) {
  const Sizes z = sizes_of(h);
  const int64_t P = h->head_dim, N = h->state, Q = h->chunk, Qp = z.padded, heads_here = z.per_group / h->splits;
  int64_t floats = chunk_floats(h, &z) + Q * Qp + 2 * Q * P + Q * N + heads_here * N * P + 5 * Qp + 16 * 16;
  float *memory = aligned_alloc(64, (size_t)(floats + 15) / 16 * 64), *all_memory = memory;
  if (memory == NULL) return 1;
  Chunk k = new_chunk(h, &z, &memory);
  float *M = take(&memory, Q * Qp), *x = take(&memory, Q * P), *xdt = take(&memory, Q * P), *scaled = take(&memory, Q * N);
  const Sums s = {take(&memory, Qp), take(&memory, Qp)};
  float *step = take(&memory, Qp), *carry = take(&memory, Qp), *gain = take(&memory, Qp);
  float *own = take(&memory, heads_here * N * P);
  float *state = running == NULL ? own : running + (g * z.per_group + split * heads_here) * N * P;
  if (running == NULL) memset(state, 0, (size_t)(heads_here * N * P) * 4);
  memset(M, 0, (size_t)(Q * Qp) * 4); /* right of the diagonal's vectors it stays zero: never written again */
  for (int64_t c = 0; c < z.chunks; c++) {
    read_chunk(h, &z, pre, first, b, g, c, &k);
    for (int64_t local = 0; local < heads_here; local++) {
      const int64_t head = g * z.per_group + split * heads_here + local;
      float *S = state + local * N * P;
      if (states != NULL) memcpy(states + ((b * z.chunks + c) * h->heads + head) * N * P, S, (size_t)(N * P) * 4);
      const float left = read_head(h, &k, dt, A[head], b, head, s, step, carry, gain, Qp);
      for (int64_t i = 0; i < k.tokens; i++) {
        const float *row = pre + (b * h->length + k.start + i) * z.channels + head * P;
        for (int64_t p = 0; p < P; p += LANES) {
          V value = silu_of(load(row + p));
          store(x + i * P + p, value);
          store(xdt + i * P + p, value * step[i]);
        }
        for (int64_t n = 0; n < N; n += LANES) store(scaled + i * N + n, load(k.C + i * N + n) * carry[i]);
      }
      decayed(k.tokens, Qp, k.scores, s, NULL, M);
      float *Y = y + (b * h->length + k.start) * z.inner + head * P;
      product(LOWER, k.tokens, P, k.tokens, M, Qp, 1, xdt, P, Y, z.inner, 0);
      product(FULL, k.tokens, P, N, scaled, N, 1, S, P, Y, z.inner, 1);
      for (int64_t i = 0; i < k.tokens; i++) {
        const float *gate = zxbcdt + ((k.start + i) * h->rows + b) * h->width + head * P;
        float *result = out + ((k.start + i) * h->rows + b) * z.inner + head * P;
        for (int64_t p = 0; p < P; p += LANES) {
          V value = load(Y + i * z.inner + p) + load(x + i * P + p) * D[head];
          store(Y + i * z.inner + p, value);
          store(result + p, value * silu_of(load(gate + p)));
        }
        for (int64_t n = 0; n < N; n += LANES) store(scaled + i * N + n, load(k.B + i * N + n) * gain[i]);
      }
      for (int64_t i = 0; i < N * P; i += LANES) store(S + i, load(S + i) * left);
      product(FULL, N, P, k.tokens, scaled, 1, N, xdt, P, S, P, 1);
    }
  }
  free(all_memory);
  return 0;
}

/* -> 0, or 1 if memory is short. A = -exp(A_log). Writes y, out and states. */
int stratum_scan_forward(const Shape *h, const float *zxbcdt, const float *pre, const float *dt, const float *A, const float *D,
                         const int64_t *first, float *y, float *out, float *states, int threads) {
  const int64_t tasks = h->rows * h->groups * h->splits;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t b = task / (h->groups * h->splits), g = task / h->splits % h->groups, split = task % h->splits;
    if (scan_task(h, zxbcdt, pre, dt, A, D, first, y, out, states, NULL, b, g, split)) failed = 1;
  }
  return failed;
}

/* ---- a step of inference: texts (segments of the row [T, width]) that continue from their slots' states */

typedef struct {
  int64_t begin, tokens, before, slot;
} Segment;

/* Adds dt_bias and applies softplus as torch computes it. */
static inline float softplus_of(float raw, float bias) {
  const float x = raw + bias;
  return x > 20 ? x : log1pf(expf(x));
}

/* Convolution and dt of one segment; updates the last inputs in its slot, past [taps - 1, C], unless it is a trial.
   weight [taps, C]. */
static void segment_inputs(const Shape *h, const Sizes *z, const Segment *s, const float *zxbcdt, const float *weight,
                           const float *bias, const float *dt_bias, float *past, float *pre, float *dt, int is_trial) {
  const int64_t W = h->taps, C = z->channels;
  if (s->before == 0) memset(past, 0, (size_t)((W - 1) * C) * 4);
  for (int64_t l = 0; l < s->tokens; l++) {
    float *to = pre + (s->begin + l) * C;
    memcpy(to, bias, (size_t)C * 4);
    for (int64_t k = 0; k < W; k++) {
      const float *from = l >= k ? zxbcdt + (s->begin + l - k) * h->width + z->inner : past + (W - 1 + l - k) * C;
      const float *w = weight + (W - 1 - k) * C;
      for (int64_t c = 0; c < C; c += LANES) store(to + c, load(to + c) + load(from + c) * load(w + c));
    }
    const float *raw = zxbcdt + (s->begin + l) * h->width + z->inner + C;
    for (int64_t i = 0; i < h->heads; i++) dt[(s->begin + l) * h->heads + i] = softplus_of(raw[i], dt_bias[i]);
  }
  if (is_trial) return;
  for (int64_t j = 0; j < W - 1; j++) { /* ascending: an input moves to a place that was read already */
    const int64_t at = s->tokens + j;
    memcpy(past + j * C, at < W - 1 ? past + at * C : zxbcdt + (s->begin + at - (W - 1)) * h->width + z->inner, (size_t)C * 4);
  }
}

/* One token of the recurrence for the heads of a group: number `token` of pre, dt and y (which may be null), number `line` of
   zxbcdt and out. B and C: scratch of N floats. */
static void single_step(const Shape *h, const Sizes *z, const float *zxbcdt, const float *pre, const float *dt, const float *A,
                        const float *D, int64_t token, int64_t line, int64_t g, float *state, float *saved, float *out, float *B,
                        float *C) {
  const int64_t P = h->head_dim, N = h->state;
  const float *row = pre + token * z->channels;
  for (int64_t n = 0; n < N; n += LANES) {
    store(B + n, silu_of(load(row + z->inner + g * N + n)));
    store(C + n, silu_of(load(row + z->inner + (h->groups + g) * N + n)));
  }
  for (int64_t head = g * z->per_group; head < (g + 1) * z->per_group; head++) {
    const float step = dt[token * h->heads + head], decay = expf(step * A[head]);
    float *S = state + head * N * P;
    for (int64_t p = 0; p < P; p += LANES) {
      const V x = silu_of(load(row + head * P + p)), xdt = x * step;
      V even = {0}, odd = {0};
      for (int64_t n = 0; n < N; n += 2) { /* N is a multiple of the lanes */
        const V first = load(S + n * P + p) * decay + xdt * B[n], second = load(S + (n + 1) * P + p) * decay + xdt * B[n + 1];
        store(S + n * P + p, first);
        store(S + (n + 1) * P + p, second);
        even += first * C[n];
        odd += second * C[n + 1];
      }
      const V y = even + odd + x * D[head];
      if (saved != NULL) store(saved + token * z->inner + head * P + p, y);
      store(out + line * z->inner + head * P + p, y * silu_of(load(zxbcdt + line * h->width + head * P + p)));
    }
  }
}

/* table: a Segment for each of h->rows texts; h->length tokens in all. conv [slots, taps - 1, C] and scan [slots, H, N, P] are
   updated, but not by the texts whose number in trial [texts] is 1 (null: none). Scratch: turned [taps, C], pre [T, C], dt [T, H], y [T, HP]. Writes out [T, HP]. -> 0, or 1 if memory is short. */
int stratum_scan_segments(const Shape *h, const float *zxbcdt, const Segment *table, const float *weight, const float *bias,
                          const float *dt_bias, const float *A_log, const float *D, float *conv, float *scan, float *turned,
                          float *pre, float *dt, float *y, float *out, const int64_t *trial, int threads) {
  const Sizes z = sizes_of(h);
  const int64_t P = h->head_dim, N = h->state, tasks = h->rows * h->groups * h->splits, states = h->heads * N * P;
  float A[h->heads];
  for (int64_t i = 0; i < h->heads; i++) A[i] = -expf(A_log[i]);
  for (int64_t c = 0; c < z.channels; c++)
    for (int64_t k = 0; k < h->taps; k++) turned[k * z.channels + c] = weight[c * h->taps + k];
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < h->rows; i++) {
    const Segment *s = table + i;
    segment_inputs(h, &z, s, zxbcdt, turned, bias, dt_bias, conv + s->slot * (h->taps - 1) * z.channels, pre, dt,
                   trial != NULL && trial[i]);
    if (s->before == 0) memset(scan + s->slot * states, 0, (size_t)states * 4);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; task++) {
    const Segment *s = table + task / (h->groups * h->splits);
    const int64_t g = task / h->splits % h->groups, split = task % h->splits;
    float *state = scan + s->slot * states, *copy = NULL, both[2 * N];
    if (s->tokens <= h->stepwise && split > 0) continue;
    if (trial != NULL && trial[s - table]) { /* works on a copy of the group's states */
      const int64_t first = g * z.per_group * N * P;
      copy = aligned_alloc(64, (size_t)(states + 15) / 16 * 64);
      if (copy == NULL) { failed = 1; continue; }
      memcpy(copy + first, state + first, (size_t)(z.per_group * N * P) * 4);
      state = copy;
    }
    if (s->tokens <= h->stepwise) {
      for (int64_t l = 0; l < s->tokens; l++)
        single_step(h, &z, zxbcdt, pre, dt, A, D, s->begin + l, s->begin + l, g, state, NULL, out, both, both + N);
      free(copy);
      continue;
    }
    Shape own = *h;
    own.rows = 1, own.length = s->tokens, own.chunk = s->tokens < h->chunk ? s->tokens : h->chunk;
    if (scan_task(&own, zxbcdt + s->begin * h->width, pre + s->begin * z.channels, dt + s->begin * h->heads, A, D, NULL,
                  y + s->begin * z.inner, out + s->begin * z.inner, NULL, state, 0, g, split))
      failed = 1;
    free(copy);
  }
  return failed;
}

/* stratum_scan_forward token by token: the numbers are those of stratum_scan_segments for single tokens, bit by bit. Computes dt
   [B, L, H] and A too, as that function does. */
int stratum_scan_steps(const Shape *h, const float *zxbcdt, const float *pre, const float *dt_bias, const float *A_log, const float *D,
                       const int64_t *first, float *dt, float *y, float *out, float *states, int threads) {
  const Sizes z = sizes_of(h);
  const int64_t N = h->state, floats = N * h->head_dim, L = h->length;
  float A[h->heads];
  for (int64_t i = 0; i < h->heads; i++) A[i] = -expf(A_log[i]);
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < h->rows * h->groups; task++) {
    const int64_t b = task / h->groups, g = task % h->groups, own = g * z.per_group;
    float *state = aligned_alloc(64, (size_t)(h->heads * floats + 15) / 16 * 64), both[2 * N];
    if (state == NULL) { failed = 1; continue; }
    memset(state + own * floats, 0, (size_t)(z.per_group * floats) * 4);
    for (int64_t l = 0; l < L; l++) {
      const int64_t token = b * L + l, line = l * h->rows + b;
      const float *raw = zxbcdt + line * h->width + z.inner + z.channels;
      if (l % h->chunk == 0)
        memcpy(states + ((b * z.chunks + l / h->chunk) * h->heads + own) * floats, state + own * floats, (size_t)(z.per_group * floats) * 4);
      if (first != NULL && first[token] == l) memset(state + own * floats, 0, (size_t)(z.per_group * floats) * 4);
      for (int64_t i = own; i < own + z.per_group; i++) dt[token * h->heads + i] = softplus_of(raw[i], dt_bias[i]);
      single_step(h, &z, zxbcdt, pre, dt, A, D, token, line, g, state, y, out, both, both + N);
    }
    free(state);
  }
  return failed;
}

/* Gradients given grad_out [L, B, HP]. Writes grad_z and grad_dt (of dt after softplus) into grad_zxbcdt [L, B, width] and
   [B, L, H], grad_pre's x channels (through their SiLU), shared [splits, B, G, chunks, shared_floats] (for
   stratum_scan_finish), and sums over a row of the gradients of A and D, [B, H] each. */
int stratum_scan_backward(const Shape *h, const float *zxbcdt, const float *pre, const float *dt, const float *A, const float *D,
                          const int64_t *first, const float *y, const float *states, const float *grad_out, float *grad_zxbcdt,
                          float *grad_pre, float *shared, float *grad_dt, float *grad_A, float *grad_D, int threads) {
  const Sizes z = sizes_of(h);
  const int64_t P = h->head_dim, N = h->state, Q = h->chunk, Qp = z.padded, heads_here = z.per_group / h->splits;
  const int64_t tasks = h->rows * h->groups * h->splits, parts_here = h->parts / h->splits, leaf = z.per_group / h->parts;
  const int64_t sums = shared_floats(h, &z);
  int64_t depth = 1;
  for (int64_t n = parts_here; n > 1; n /= 2) depth++;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t b = task / (h->groups * h->splits), g = task / h->splits % h->groups, split = task % h->splits;
    int64_t floats = chunk_floats(h, &z) + 3 * Q * Qp + 7 * Q * P + Q * N + P * Qp + 2 * N * P + heads_here * N * P + 9 * Qp;
    float *memory = aligned_alloc(64, (size_t)(floats + depth * sums + 16 * 40 + 15) / 16 * 64), *all_memory = memory;
    if (memory == NULL) { failed = 1; continue; }
    Chunk k = new_chunk(h, &z, &memory);
    float *M = take(&memory, Q * Qp), *decays = take(&memory, Q * Qp), *pairs = take(&memory, Q * Qp);
    float *xdtT = take(&memory, P * Qp), *stack = take(&memory, depth * sums);
    float *x = take(&memory, Q * P), *slope = take(&memory, Q * P), *xdt = take(&memory, Q * P), *dy = take(&memory, Q * P);
    float *grad_xdt = take(&memory, Q * P), *weighted = take(&memory, Q * P);
    float *piece = take(&memory, Q * (N > P ? N : P));
    float *beforeT = take(&memory, N * P), *builtT = take(&memory, N * P);
    const Sums s = {take(&memory, Qp), take(&memory, Qp)};
    float *step = take(&memory, Qp), *carry = take(&memory, Qp), *gain = take(&memory, Qp);
    float *ga = take(&memory, Qp), *run = take(&memory, Qp), *left_of = take(&memory, Qp), *entered = take(&memory, Qp);
    float *built = take(&memory, heads_here * N * P); /* gradient of the state after the chunk at hand */
    memset(built, 0, (size_t)(heads_here * N * P) * 4);
    memset(M, 0, (size_t)(Q * Qp) * 4);
    for (int64_t local = 0; local < heads_here; local++)
      grad_A[b * h->heads + g * z.per_group + split * heads_here + local] = 0,
      grad_D[b * h->heads + g * z.per_group + split * heads_here + local] = 0;
    for (int64_t c = z.chunks - 1; c >= 0; c--) {
      read_chunk(h, &z, pre, first, b, g, c, &k);
      const int64_t T = k.tokens;
      int64_t open = 0; /* subtrees whose sibling is not done yet */
      for (int64_t local = 0; local < heads_here; local++) {
        float *grad_scores = stack + open * sums, *gB = grad_scores + Q * Qp, *gC = gB + Q * N;
        if (local % leaf == 0) memset(grad_scores, 0, (size_t)sums * 4);
        const int64_t head = g * z.per_group + split * heads_here + local;
        float *dS = built + local * N * P;
        const float *before = states + ((b * z.chunks + c) * h->heads + head) * N * P;
        const float left = read_head(h, &k, dt, A[head], b, head, s, step, carry, gain, Qp);
        V sum_D = {0};
        for (int64_t i = 0; i < T; i++) {
          const int64_t token = b * h->length + k.start + i, line = (k.start + i) * h->rows + b;
          const float *row = pre + token * z.channels + head * P, *value = y + token * z.inner + head * P;
          const float *gate = zxbcdt + line * h->width + head * P, *grad = grad_out + line * z.inner + head * P;
          float *grad_gate = grad_zxbcdt + line * h->width + head * P;
          for (int64_t p = 0; p < P; p += LANES) {
            V before_silu = load(row + p), sx = sigmoid_of(before_silu), vx = before_silu * sx;
            V zz = load(gate + p), sz = sigmoid_of(zz), gg = load(grad + p), d = gg * zz * sz;
            store(x + i * P + p, vx);
            store(slope + i * P + p, sx * (all(1.0f) + before_silu * (all(1.0f) - sx)));
            store(xdt + i * P + p, vx * step[i]);
            store(dy + i * P + p, d);
            store(grad_gate + p, gg * load(value + p) * sz * (all(1.0f) + zz * (all(1.0f) - sz)));
            sum_D += d * vx;
          }
        }
        grad_D[b * h->heads + head] += sum_by_halves(sum_D);

        /* Inside the chunk: y = M (dt x), M = scores * decays. */
        transpose(T, P, xdt, P, xdtT, Qp);
        product(BELOW, T, Qp, P, dy, P, 1, xdtT, Qp, pairs, Qp, 0);
        decayed(T, Qp, k.scores, s, decays, M);
        for (int64_t i = 0; i < T; i++)
          for (int64_t j = 0; j <= i; j += LANES) {
            const int64_t at = i * Qp + j;
            V d = load(pairs + at);
            store(grad_scores + at, load(grad_scores + at) + d * load(decays + at));
            store(pairs + at, d * load(M + at));
          }
        /* ga[k]: all pairs i >= k > j. Going down from the last k, run[j] gathers row k of the pairs. */
        memset(run, 0, (size_t)Qp * 4);
        const I lanes = lane_numbers();
        for (int64_t i = T - 1; i >= 0; i--) {
          V sum = {0};
          for (int64_t j = 0; j <= i; j += LANES) {
            V r = load(run + j) + load(pairs + i * Qp + j);
            store(run + j, r);
            sum += choose(lanes + (int32_t)j < (int32_t)i, r, all(0.0f));
          }
          ga[i] = sum_by_halves(sum);
        }
        product(UPPER, T, P, T, M, 1, Qp, dy, P, grad_xdt, P, 0);

        /* Through the state before: y = carry C before. */
        transpose(N, P, before, P, beforeT, N);
        for (int64_t i = 0; i < T; i++)
          for (int64_t p = 0; p < P; p += LANES) store(weighted + i * P + p, load(dy + i * P + p) * carry[i]);
        product(FULL, T, N, P, weighted, P, 1, beforeT, N, piece, N, 0);
        for (int64_t i = 0; i < T; i++) {
          V sum = {0};
          for (int64_t n = 0; n < N; n += LANES) {
            V part = load(piece + i * N + n);
            store(gC + i * N + n, load(gC + i * N + n) + part);
            sum += part * load(k.C + i * N + n);
          }
          entered[i] = sum_by_halves(sum);
        }

        /* Through the state built here: added = (gain B)' (dt x); and on to the state before. */
        product(FULL, T, P, N, k.B, N, 1, dS, P, piece, P, 0);
        V through_left = {0};
        for (int64_t i = 0; i < N * P; i += LANES) through_left += load(dS + i) * load(before + i);
        const float total = sum_by_halves(through_left) * left;
        transpose(N, P, dS, P, builtT, N);
        float *gx = grad_pre + (b * h->length + k.start) * z.channels + head * P;
        double sum_A = 0;
        for (int64_t i = 0; i < T; i++) {
          V sum_left = {0};
          for (int64_t p = 0; p < P; p += LANES) {
            V value = load(x + i * P + p), d = load(piece + i * P + p) * gain[i];
            V whole = load(grad_xdt + i * P + p) + d;
            sum_left += d * value;
            store(grad_xdt + i * P + p, whole);
          }
          left_of[i] = sum_by_halves(sum_left) * step[i];
        }
        float suffix = 0, prefix = 0;
        for (int64_t i = T - 1; i >= 0; i--) suffix += entered[i], ga[i] += suffix + total;
        for (int64_t i = 0; i < T; i++) ga[i] += prefix, prefix += left_of[i];
        for (int64_t i = 0; i < T; i++) {
          V through = {0};
          for (int64_t p = 0; p < P; p += LANES) {
            V value = load(x + i * P + p), d = load(grad_xdt + i * P + p);
            through += d * value;
            V result = d * step[i] + load(dy + i * P + p) * D[head];
            store(gx + i * z.channels + p, result * load(slope + i * P + p));
            store(xdt + i * P + p, load(xdt + i * P + p) * gain[i]);
          }
          grad_dt[(b * h->length + k.start + i) * h->heads + head] = ga[i] * A[head] + sum_by_halves(through);
          sum_A += (double)(ga[i] * step[i]);
        }
        grad_A[b * h->heads + head] += (float)sum_A;
        product(FULL, T, N, P, xdt, P, 1, builtT, N, gB, N, 1);
        for (int64_t i = 0; i < N * P; i += LANES) store(dS + i, load(dS + i) * left);
        product(FULL, N, P, T, k.C, 1, N, weighted, P, dS, P, 1);
        if ((local + 1) % leaf) continue;
        open++;
        for (int64_t part = (local + 1) / leaf; part % 2 == 0; part /= 2, open--)
          add_to(stack + (open - 2) * sums, stack + (open - 1) * sums, sums);
      }
      memcpy(shared + (((split * h->rows + b) * h->groups + g) * z.chunks + c) * sums, stack, (size_t)sums * 4);
    }
    free(all_memory);
  }
  return failed;
}

/* Sums `shared` of stratum_scan_backward over the splits, in place, and writes grad_pre's B and C channels (through SiLU). */
int stratum_scan_finish(const Shape *h, const float *pre, const int64_t *first, float *shared, float *grad_pre, int threads) {
  const Sizes z = sizes_of(h);
  const int64_t N = h->state, Q = h->chunk, Qp = z.padded, sums = shared_floats(h, &z), places = h->rows * h->groups * z.chunks;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t place = 0; place < places; place++) {
    float *memory = aligned_alloc(64, (size_t)(chunk_floats(h, &z) + 15) / 16 * 64), *all_memory = memory;
    if (memory == NULL) { failed = 1; continue; }
    const int64_t b = place / z.chunks / h->groups, g = place / z.chunks % h->groups, c = place % z.chunks;
    Chunk k = new_chunk(h, &z, &memory);
    place_chunk(h, &z, pre, first, b, g, c, &k);
    for (int64_t step = 1; step < h->splits; step *= 2)
      for (int64_t split = 0; split < h->splits; split += 2 * step)
        add_to(shared + (split * places + place) * sums, shared + ((split + step) * places + place) * sums, sums);
    float *grad_scores = shared + place * sums, *gB = grad_scores + Q * Qp, *gC = gB + Q * N;
    for (int64_t i = 0; i < k.tokens; i++) {
      for (int64_t j = 0; j < k.skip[i]; j++) grad_scores[i * Qp + j] = 0;
      for (int64_t j = i + 1; j < Qp; j++) grad_scores[i * Qp + j] = 0;
    }
    product(UPPER, k.tokens, N, k.tokens, grad_scores, 1, Qp, k.C, N, gB, N, 1);
    product(LOWER, k.tokens, N, k.tokens, grad_scores, Qp, 1, k.B, N, gC, N, 1);
    for (int64_t i = 0; i < k.tokens; i++) {
      const int64_t at = (b * h->length + k.start + i) * z.channels + z.inner + g * N, to_C = h->groups * N;
      for (int64_t n = 0; n < N; n += LANES) {
        store(grad_pre + at + n, load(gB + i * N + n) * silu_slope(load(pre + at + n)));
        store(grad_pre + at + to_C + n, load(gC + i * N + n) * silu_slope(load(pre + at + to_C + n)));
      }
    }
    free(all_memory);
  }
  return failed;
}

/* Causal convolution of the x, B, C channels of zxbcdt (after z). Writes pre [B, L, C]. weight: [taps, C]. */
int stratum_conv_forward(const Shape *h, const float *zxbcdt, const float *weight, const float *bias, const int64_t *first,
                          float *pre, int threads) {
  const Sizes z = sizes_of(h);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < h->rows * h->length; line++) {
    const int64_t b = line / h->length, l = line % h->length, begin = first == NULL ? 0 : first[line];
    float *to = pre + line * z.channels;
    memcpy(to, bias, (size_t)z.channels * 4);
    for (int64_t k = 0; k < h->taps && l - k >= begin; k++) {
      const float *from = zxbcdt + ((l - k) * h->rows + b) * h->width + z.inner;
      const float *w = weight + (h->taps - 1 - k) * z.channels; /* given as [taps, C] */
      for (int64_t c = 0; c < z.channels; c += LANES) store(to + c, load(to + c) + load(from + c) * load(w + c));
    }
  }
  return 0;
}

/* Backward of the convolution: writes grad_zxbcdt's x, B, C channels, grad_weight [taps, C] and grad_bias [C]. */
int stratum_conv_backward(const Shape *h, const float *zxbcdt, const float *weight, const int64_t *first, const float *grad_pre,
                           float *grad_zxbcdt, float *grad_weight, float *grad_bias, int threads) {
  const Sizes z = sizes_of(h);
  const int64_t strip = 4 * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c0 = 0; c0 < z.channels; c0 += strip) {
    const int64_t end = c0 + strip < z.channels ? c0 + strip : z.channels;
    for (int64_t k = 0; k < h->taps; k++) memset(grad_weight + k * z.channels + c0, 0, (size_t)(end - c0) * 4);
    memset(grad_bias + c0, 0, (size_t)(end - c0) * 4);
    for (int64_t b = 0; b < h->rows; b++) {
      for (int64_t l = 0; l < h->length; l++) {
        const int64_t line = b * h->length + l, begin = first == NULL ? 0 : first[line];
        const float *grad = grad_pre + line * z.channels;
        float *into = grad_zxbcdt + (l * h->rows + b) * h->width + z.inner;
        for (int64_t c = c0; c < end; c += LANES) {
          V g = load(grad + c);
          store(grad_bias + c, load(grad_bias + c) + g);
          V sum = {0};
          for (int64_t k = 0; k < h->taps && l + k < h->length; k++) {
            if (first != NULL && first[line + k] > l) break;
            sum += load(grad + k * z.channels + c) * load(weight + (h->taps - 1 - k) * z.channels + c);
          }
          store(into + c, sum);
          for (int64_t k = 0; k < h->taps && l - k >= begin; k++) {
            float *gw = grad_weight + (h->taps - 1 - k) * z.channels + c;
            store(gw, load(gw) + g * load(zxbcdt + ((l - k) * h->rows + b) * h->width + z.inner + c));
          }
        }
      }
    }
  }
  return 0;
}

/* Floats of a vector: widths must be multiples of it. */
int stratum_lanes(void) { return LANES; }
