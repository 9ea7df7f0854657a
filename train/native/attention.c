/* Attention with or without a soft cap (formulas and letters: train/model/capped.py), forward and backward, one block of scores
   in the cache at a time. Without a cap exponentials are relative to the largest score of the line so far, and the sums are
   rescaled when a larger score comes (FlashAttention, arXiv 2205.14135).

   A pair is a row and a key/value head. Its lines are (query, query head), query by query. A line sees the keys from its
   query's first key to the query's own index. A task is a block of lines of a pair and loops over its blocks of keys. In the
   backward pass the line blocks of a pair are distributed over `stretches` tasks; each has its own gradients of keys and
   values, and the caller adds these up. The split depends on shapes only: the same bits for any number of threads.

   Layouts: q, out [pairs, lines, D]; k, v [pairs, keys, D]; sums [pairs, lines]; first_key [rows, queries]. */

#include "simd.h"

enum { LINES = 128, KEYS = 128 };

typedef struct {
  int64_t pairs, lines, keys, width;
  int64_t groups, per_group, queries, offset, stretches, window; /* window, without first_key: keys a query sees; 0: no limit */
  float scale, softcap; /* softcap 0: no cap */
} Attention;

static void visible(const Attention *k, const int32_t *first_key, int64_t pair, int64_t line, int64_t *from, int64_t *to) {
  const int64_t query = line / k->per_group;
  *to = k->offset + query + 1;
  if (first_key != NULL) *from = first_key[pair / k->groups * k->queries + query];
  else *from = k->window > 0 && *to > k->window ? *to - k->window : 0;
}

/* A block of lines and a block of keys. */
typedef struct {
  int64_t pair, line, lines, key, keys, padded;
} Block;

static int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

static Block block_of(const Attention *k, int64_t pair, int64_t line_block, int64_t key_block) {
  Block b = {.pair = pair, .line = line_block * LINES, .key = key_block * KEYS};
  b.lines = k->lines - b.line < LINES ? k->lines - b.line : LINES;
  b.keys = k->keys - b.key < KEYS ? k->keys - b.key : KEYS;
  b.padded = blocks_of(b.keys, LANES) * LANES;
  return b;
}

/* First key block and one past the last that any line of a block sees. */
static void seen(const Attention *k, const int32_t *first_key, int64_t pair, int64_t line_block, int64_t *first, int64_t *end) {
  const Block b = block_of(k, pair, line_block, 0);
  int64_t from, to, unused;
  visible(k, first_key, pair, b.line, &from, &unused);
  visible(k, first_key, pair, b.line + b.lines - 1, &unused, &to);
  *first = from / KEYS;
  *end = blocks_of(to, KEYS);
}

/* out[pair][key block] = that block of x [pairs, keys, D] transposed to [D, KEYS], padded with zeros. */
static void turn(const Attention *k, const float *x, float *out, int threads) {
  const int64_t blocks = blocks_of(k->keys, KEYS);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < k->pairs * blocks; i++) {
    const Block b = block_of(k, i / blocks, 0, i % blocks);
    transpose(b.keys, k->width, x + (b.pair * k->keys + b.key) * k->width, k->width, out + i * k->width * KEYS, KEYS);
  }
}

static inline V within(V x, int64_t j, int64_t from, int64_t to) {
  if (j >= from && j + LANES <= to) return x;
  const I place = lane_numbers() + (int32_t)j;
  return choose((place >= (int32_t)from) & (place < (int32_t)to), x, all(0.0f));
}

/* The keys [from, to) of a block that a line sees; [start, stop) is the same in whole vectors. Zeroes `p` outside of these. */
static void span(const Attention *k, const int32_t *first_key, const Block *b, int64_t line, float *p, int64_t *from, int64_t *to,
                 int64_t *start, int64_t *stop) {
  visible(k, first_key, b->pair, b->line + line, from, to);
  *from = *from - b->key < 0 ? 0 : *from - b->key;
  *to = *to - b->key > b->keys ? b->keys : *to - b->key;
  if (*to <= *from) *from = *to = 0; /* it sees none of them */
  *start = *from / LANES * LANES;
  *stop = blocks_of(*to, LANES) * LANES;
  memset(p, 0, (size_t)*start * 4);
  memset(p + *stop, 0, (size_t)(b->padded - *stop) * 4);
}

/* Prefetch floats of the next product: data outside the core's own caches would stall each tile at its start. */
static inline void ask_for(const float *x, int64_t width) {
  for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(x + d);
}

static float *scratch(int64_t floats) { return aligned_alloc(64, (size_t)((floats + 15) / 16 * 64)); }

/* In place: q k^T of a line becomes p (with a cap). -> sum of p. */
static float capped_line(const Attention *k, float *p, int64_t from, int64_t to, int64_t start, int64_t stop) {
  const float inner = k->scale / k->softcap;
  V sum = {0};
  for (int64_t j = start; j < stop; j += LANES) {
    V e = within(exp_of(tanh_of(load(p + j) * inner) * k->softcap), j, from, to);
    store(p + j, e);
    sum += e;
  }
  return sum_of(sum);
}

/* The same without a cap, relative to the largest score. Updates *highest; earlier sums must be multiplied by *factor. */
static float plain_line(const Attention *k, float *p, int64_t from, int64_t to, int64_t start, int64_t stop, float *highest,
                        float *factor) {
  float top = *highest;
  *factor = 1;
  if (start == stop) return 0;
  V most = all(top), sum = {0};
  for (int64_t j = start; j < stop; j += LANES) {
    V x = load(p + j) * k->scale;
    if (j < from || j + LANES > to) {
      const I place = lane_numbers() + (int32_t)j;
      x = choose((place >= (int32_t)from) & (place < (int32_t)to), x, all(-INFINITY));
    }
    store(p + j, x);
    most = choose(x > most, x, most);
  }
  top = highest_of(most);
  for (int64_t j = start; j < stop; j += LANES) {
    V e = within(exp_of(load(p + j) - top), j, from, to);
    store(p + j, e);
    sum += e;
  }
  *factor = *highest == -INFINITY ? 0 : exp_of(all(*highest - top))[0];
  *highest = top;
  return sum_of(sum);
}

/* Keys and values of one text and key/value head in pages: token j is token j % page_tokens of page pages[j / page_tokens]. */
typedef struct {
  const void *keys, *values; /* [pages, page_tokens, groups, D] */
  const int32_t *pages;
  int64_t page_tokens, groups, group;
  int bf16;
} Pages;

/* A block of keys, transposed, and of values, as whole tensors have them. */
static void fetch(const Pages *from, const Block *b, int64_t D, float *turned, float *values) {
  for (int is_value = 0; is_value < 2; is_value++) {
    for (int64_t j = 0; j < b->keys; j++) {
      const int64_t token = b->key + j, page = from->pages[token / from->page_tokens];
      const int64_t at = ((page * from->page_tokens + token % from->page_tokens) * from->groups + from->group) * D;
      for (int64_t d = 0; d < D; d += LANES) store(values + j * D + d, get(is_value ? from->values : from->keys, at + d, from->bf16));
    }
    if (!is_value) transpose(b->keys, D, values, D, turned, KEYS);
  }
}

/* One block of lines of a pair, over all its keys. q, out [lines, D] and sums are those of the block. turned, values: those of the
   pair; with pages scratch for one block of each. scores: scratch. Writes out, and sums: the sums of p, or without a cap log-sum-exp. */
static void forward_lines(const Attention *k, const int32_t *first_key, int64_t pair, int64_t line_block, const float *q,
                          const Pages *pages, float *turned, const float *values, float *scores, float *out, float *sums) {
  const int64_t D = k->width;
  float highest[LINES];
  int64_t first, end, lines = 0;
  seen(k, first_key, pair, line_block, &first, &end);
  for (int64_t i = 0; i < LINES; i++) highest[i] = -INFINITY;
  for (int64_t key_block = first; key_block < end; key_block++) {
    const Block b = block_of(k, pair, line_block, key_block);
    const float *own_keys = pages == NULL ? turned + key_block * D * KEYS : turned;
    const float *own_values = pages == NULL ? values + b.key * D : values;
    if (pages != NULL) fetch(pages, &b, D, turned, (float *)values);
    lines = b.lines;
    product(FULL, lines, b.padded, D, q, D, 1, own_keys, KEYS, scores, KEYS, 0);
    for (int64_t i = 0; i < lines; i++) {
      float *p = scores + i * KEYS;
      int64_t from, to, start, stop;
      span(k, first_key, &b, i, p, &from, &to, &start, &stop);
      if (i < b.keys) ask_for(own_values + i * D, D);
      if (pages == NULL && key_block + 1 < end) ask_for(own_keys + D * KEYS + i * D, D);
      float *total = sums + i, *row = out + i * D, factor = 1;
      if (key_block == first) *total = 0;
      if (k->softcap > 0) *total += capped_line(k, p, from, to, start, stop);
      else {
        const float added = plain_line(k, p, from, to, start, stop, highest + i, &factor);
        *total = *total * factor + added;
      }
      if (factor != 1 && key_block != first)
        for (int64_t d = 0; d < D; d += LANES) store(row + d, load(row + d) * factor);
    }
    product(FULL, lines, D, b.keys, scores, KEYS, 1, own_values, D, out, D, key_block != first);
  }
  for (int64_t i = 0; i < lines; i++) {
    const float factor = 1.0f / sums[i];
    for (int64_t d = 0; d < D; d += LANES) store(out + i * D + d, load(out + i * D + d) * factor);
    if (k->softcap == 0) sums[i] = highest[i] + logf(sums[i]);
  }
}

/* -> 0, or 1 if memory is short. turned: scratch for [pairs, key blocks, D, KEYS]. Writes out, and sums: the sums of p, or
   without a cap log-sum-exp. */
int stratum_capped_forward(const Attention *k, const float *q, const float *keys, const float *values, const int32_t *first_key,
                           float *turned, float *out, float *sums, int threads) {
  const int64_t D = k->width, line_blocks = blocks_of(k->lines, LINES), key_blocks = blocks_of(k->keys, KEYS);
  int failed = 0;
  turn(k, keys, turned, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < k->pairs * line_blocks; task++) {
    const int64_t pair = task / line_blocks, line_block = line_blocks - 1 - task % line_blocks; /* the longest first */
    const int64_t line = pair * k->lines + line_block * LINES;
    float *scores = scratch(LINES * KEYS);
    if (scores == NULL) { failed = 1; continue; }
    forward_lines(k, first_key, pair, line_block, q + line * D, NULL, turned + pair * key_blocks * D * KEYS,
                  values + pair * k->keys * D, scores, out + line * D, sums + line);
    free(scores);
  }
  return failed;
}

/* Gradients from grad [pairs, lines, D] of out (with a cap: divided by the sums), constant = <grad, out> [pairs, lines] and
   the forward pass's sums. Writes grad_q, and grad_k and grad_v [stretches, pairs, keys, D]. turned: scratch, twice as large
   as in the forward pass. */
int stratum_capped_backward(const Attention *k, const float *q, const float *keys, const float *values, const int32_t *first_key,
                            const float *sums, const float *grad, const float *constant, float *turned, float *grad_q, float *grad_k, float *grad_v,
                            int threads) {
  const int64_t D = k->width, line_blocks = blocks_of(k->lines, LINES), key_blocks = blocks_of(k->keys, KEYS);
  const float inner = k->softcap > 0 ? k->scale / k->softcap : 0;
  float *turned_values = turned + k->pairs * key_blocks * D * KEYS;
  int failed = 0;
  turn(k, keys, turned, threads);
  turn(k, values, turned_values, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < k->pairs * k->stretches; task++) {
    const int64_t pair = task / k->stretches, stretch = task % k->stretches;
    float *scores = scratch(2 * LINES * KEYS), *slopes = scores + LINES * KEYS;
    if (scores == NULL) { failed = 1; continue; }
    float *own_k = grad_k + (stretch * k->pairs + pair) * k->keys * D, *own_v = grad_v + (stretch * k->pairs + pair) * k->keys * D;
    memset(own_k, 0, (size_t)(k->keys * D) * 4);
    memset(own_v, 0, (size_t)(k->keys * D) * 4);
    for (int64_t line_block = stretch; line_block < line_blocks; line_block += k->stretches) {
      int64_t first, end;
      seen(k, first_key, pair, line_block, &first, &end);
      const int64_t line = pair * k->lines + line_block * LINES;
      for (int64_t key_block = first; key_block < end; key_block++) {
        const Block b = block_of(k, pair, line_block, key_block);
        const int64_t at = (pair * key_blocks + key_block) * D * KEYS, key = (pair * k->keys + b.key) * D;
        product(FULL, b.lines, b.padded, D, q + line * D, D, 1, turned + at, KEYS, scores, KEYS, 0);
        product(FULL, b.lines, b.padded, D, grad + line * D, D, 1, turned_values + at, KEYS, slopes, KEYS, 0);
        for (int64_t i = 0; i < b.lines; i++) {
          float *p = scores + i * KEYS, *g = slopes + i * KEYS;
          int64_t from, to, start, stop;
          span(k, first_key, &b, i, p, &from, &to, &start, &stop);
          if (i < b.keys) {
            ask_for(own_v + (b.key + i) * D, D);
            ask_for(own_k + (b.key + i) * D, D);
            ask_for(keys + key + i * D, D);
          }
          if (key_block + 1 < end) {
            ask_for(turned + at + D * KEYS + i * D, D);
            ask_for(turned_values + at + D * KEYS + i * D, D);
          }
          memset(g, 0, (size_t)start * 4);
          memset(g + stop, 0, (size_t)(b.padded - stop) * 4);
          const float own = constant[line + i], log_sum = sums[line + i];
          if (k->softcap == 0) {
            for (int64_t j = start; j < stop; j += LANES) {
              V e = within(exp_of(load(p + j) * k->scale - log_sum), j, from, to);
              store(p + j, e);
              store(g + j, (load(g + j) - own) * e * k->scale);
            }
            continue;
          }
          for (int64_t j = start; j < stop; j += LANES) {
            V t = tanh_of(load(p + j) * inner), e = within(exp_of(t * k->softcap), j, from, to);
            store(p + j, e);
            store(g + j, (load(g + j) - own) * e * (all(k->scale) - t * t * k->scale));
          }
        }
        product(FULL, b.keys, D, b.lines, scores, 1, KEYS, grad + line * D, D, own_v + b.key * D, D, 1);
        product(FULL, b.keys, D, b.lines, slopes, 1, KEYS, q + line * D, D, own_k + b.key * D, D, 1);
        product(FULL, b.lines, D, b.keys, slopes, KEYS, 1, keys + key, D, grad_q + line * D, D, key_block != first);
      }
    }
    free(scores);
  }
  return failed;
}

/* ---- a step of inference: new tokens of texts, keys and values in pages (train/model/paged.py is the definition) */

typedef struct {
  int64_t texts, heads, groups, width, page_tokens, pages, window; /* pages: entries of a line of the table; window 0: none */
  int32_t bf16;
  float scale, softcap;
} Paged;

typedef struct {
  int64_t begin, tokens, before, slot;
} Segment;

/* Rotates one head in place by an angle for each pair (i, i + D/2). */
static void rotate(float *x, const float *cosine, const float *sine, int64_t D, int bf16) {
  for (int64_t i = 0; i < D / 2; i++) {
    const float a = x[i], b = x[i + D / 2];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + D / 2] = b * cosine[i] + a * sine[i];
  }
  if (bf16)
    for (int64_t d = 0; d < D; d += LANES) {
      put(x, d, (V)(__builtin_convertvector(narrow(load(x + d)), U) << 16), 0);
    }
}

/* The queries q [R, D] of one text and key/value head. scores: scratch of R lines of `line` floats. Writes out [R, D], and
   log_sums [R] if it is not null. */
INLINE void attend_pages(const Paged *k, const float *q, const void *keys, const void *values, const int32_t *pages, int64_t from,
                         int64_t to, int64_t group, float *scores, int64_t line, float *out, float *log_sums, int bf16) {
  const int64_t R = k->heads / k->groups, D = k->width, seen = to - from, stride = k->groups * D;
  for (int64_t key = from, end; key < to; key = end) {
    const int64_t page = key / k->page_tokens, last = (page + 1) * k->page_tokens < to ? (page + 1) * k->page_tokens : to;
    const int64_t at = ((int64_t)pages[page] * k->page_tokens + key % k->page_tokens) * stride + group * D;
    end = key + LANES <= last ? key + LANES : last;
    for (int64_t r = 0; r < R; r++) {
      float *p = scores + r * line + key - from;
      if (end - key == LANES) {
        V sum[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) sum[j] = (V){0};
        for (int64_t d = 0; d < D; d += LANES) {
          const V own = load(q + r * D + d);
#pragma GCC unroll 16
          for (int j = 0; j < LANES; j++) sum[j] += own * get(keys, at + j * stride + d, bf16);
        }
        store(p, sums_by_halves(sum));
        continue;
      }
      for (int64_t j = 0; j < end - key; j++) {
        V sum = {0};
        for (int64_t d = 0; d < D; d += LANES) sum += load(q + r * D + d) * get(keys, at + j * stride + d, bf16);
        p[j] = sum_by_halves(sum);
      }
    }
  }
  float weight[R];
  for (int64_t r = 0; r < R; r++) {
    float *p = scores + r * line;
    for (int64_t j = seen; j < line; j++) p[j] = -INFINITY;
    V most = all(-INFINITY), sum = {0};
    for (int64_t j = 0; j < line; j += LANES) {
      V x = load(p + j) * k->scale;
      if (k->softcap > 0) x = tanh_of(x * (1.0f / k->softcap)) * k->softcap;
      store(p + j, x);
      most = choose(x > most, x, most);
    }
    const float top = highest_of(most);
    for (int64_t j = 0; j < line; j += LANES) {
      V e = within(exp_of(load(p + j) - top), j, 0, seen);
      store(p + j, e);
      sum += e;
    }
    const float total = sum_of(sum);
    weight[r] = 1.0f / total;
    if (log_sums != NULL) log_sums[r] = top + logf(total);
    memset(out + r * D, 0, (size_t)D * 4);
  }
  for (int64_t key = from, end; key < to; key = end) { /* sums of a page, so that rounding does not grow with the number of keys */
    const int64_t page = key / k->page_tokens;
    const int64_t at = ((int64_t)pages[page] * k->page_tokens + key % k->page_tokens) * stride + group * D;
    end = (page + 1) * k->page_tokens < to ? (page + 1) * k->page_tokens : to;
    for (int64_t r = 0; r < R; r++)
      for (int64_t d = 0; d < D; d += LANES) {
        V part = {0};
        for (int64_t j = 0; j < end - key; j++) part += all(scores[r * line + key - from + j]) * get(values, at + j * stride + d, bf16);
        store(out + r * D + d, load(out + r * D + d) + part);
      }
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t d = 0; d < D; d += LANES) store(out + r * D + d, load(out + r * D + d) * weight[r]);
}

/* qkv: [texts, G, (R queries, key, value), D], as Megatron's projection gives it. cosine, sine: [positions, D / 2], or null for
   no rotation. texts: a line for each token (begin, 1, tokens before it, slot). Stores the new keys and values in their pages, then
   writes out [texts, H, D], fp32, and log_sums [texts, H] if it is not null. */
INLINE int paged_step(const Paged *k, const void *qkv, const float *cosine, const float *sine, const int32_t *table,
                      const Segment *texts, void *keys, void *values, float *out, float *log_sums, int threads, int bf16) {
  const int64_t R = k->heads / k->groups, D = k->width;
  int failed = 0;
  for (int64_t task = 0; task < k->texts * k->groups; task++) { /* first all keys: a text may have several tokens here */
    const Segment *s = texts + task / k->groups;
    const int64_t group = task % k->groups, own = s->before;
    const int32_t *pages = table + s->slot * k->pages;
    float key[2 * D];
    for (int64_t d = 0; d < 2 * D; d += LANES) store(key + d, get(qkv, (task * (R + 2) + R) * D + d, bf16));
    if (cosine != NULL) rotate(key, cosine + own * (D / 2), sine + own * (D / 2), D, bf16);
    const int64_t at =
        (((int64_t)pages[own / k->page_tokens] * k->page_tokens + own % k->page_tokens) * k->groups + group) * D;
    for (int64_t d = 0; d < D; d += LANES) {
      put(keys, at + d, load(key + d), bf16);
      put(values, at + d, load(key + D + d), bf16);
    }
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t task = 0; task < k->texts * k->groups; task++) {
    const Segment *s = texts + task / k->groups;
    const int64_t group = task % k->groups, own = s->before;
    const int32_t *pages = table + s->slot * k->pages;
    const int64_t from = k->window > 0 && own - k->window + 1 > 0 ? own - k->window + 1 : 0;
    const int64_t line = blocks_of(own + 1 - from, LANES) * LANES;
    float *memory = scratch(R * D + R * line), *scores = memory + R * D;
    if (memory == NULL) { failed = 1; continue; }
    for (int64_t d = 0; d < R * D; d += LANES) store(memory + d, get(qkv, task * (R + 2) * D + d, bf16));
    if (cosine != NULL)
      for (int64_t r = 0; r < R; r++) rotate(memory + r * D, cosine + own * (D / 2), sine + own * (D / 2), D, bf16);
    attend_pages(k, memory, keys, values, pages, from, own + 1, group, scores, line, out + task * R * D,
                 log_sums == NULL ? NULL : log_sums + task * R, bf16);
    free(memory);
  }
  return failed;
}

/* -> 0, or 1 if memory is short. */
int stratum_paged_step(const Paged *k, const void *qkv, const float *cosine, const float *sine, const int32_t *table,
                       const Segment *texts, void *keys, void *values, float *out, float *log_sums, int threads) {
  return k->bf16 ? paged_step(k, qkv, cosine, sine, table, texts, keys, values, out, log_sums, threads, 1)
                 : paged_step(k, qkv, cosine, sine, table, texts, keys, values, out, log_sums, threads, 0);
}

/* Attention of the texts of a step with any numbers of new tokens, whose keys and values are stored. q, out: [T, H, D], fp32. Keys and
   values are read from their pages a block at a time: memory does not grow with the text. -> 0, or 1 if memory is short. */
int stratum_paged_parts(const Paged *k, const float *q, const int32_t *table, const Segment *texts, const void *keys,
                        const void *values, float *out, int threads) {
  const int64_t R = k->heads / k->groups, D = k->width;
  int failed = 0;
  for (int64_t text = 0; text < k->texts; text++) {
    const Segment *s = texts + text;
    const int64_t begin = k->window > 0 && s->before >= k->window ? s->before - k->window + 1 : 0;
    const int64_t first_page = begin / k->page_tokens, first = first_page * k->page_tokens;
    const Attention part = {
        .pairs = k->groups, .lines = s->tokens * R, .keys = s->before + s->tokens - first, .width = D, .groups = k->groups,
        .per_group = R, .queries = s->tokens, .offset = s->before - first, .window = k->window, .scale = k->scale, .softcap = k->softcap,
    };
    const int64_t line_blocks = blocks_of(part.lines, LINES);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < part.pairs * line_blocks; task++) {
      const int64_t group = task / line_blocks, line_block = line_blocks - 1 - task % line_blocks;
      const Block b = block_of(&part, group, line_block, 0);
      float *scores = scratch(LINES * KEYS + 2 * KEYS * D + 2 * LINES * D + LINES);
      if (scores == NULL) { failed = 1; continue; }
      float *turned = scores + LINES * KEYS, *rows = turned + KEYS * D, *own = rows + KEYS * D, *result = own + LINES * D;
      const Pages pages = {keys, values, table + s->slot * k->pages + first_page, k->page_tokens, k->groups, group, k->bf16};
      for (int is_result = 0; is_result < 2; is_result++) {
        for (int64_t i = 0; i < b.lines; i++) {
          const int64_t line = b.line + i, at = ((s->begin + line / R) * k->heads + group * R + line % R) * D;
          if (is_result) memcpy(out + at, result + i * D, (size_t)D * 4);
          else memcpy(own + i * D, q + at, (size_t)D * 4);
        }
        if (!is_result) forward_lines(&part, NULL, group, line_block, own, &pages, turned, rows, scores, result, result + LINES * D);
      }
      free(scores);
    }
  }
  return failed;
}

/* Floats of a vector: widths must be multiples of it. */
int stratum_lanes(void) { return LANES; }
/* Keys of a block. */
int stratum_keys(void) { return KEYS; }
