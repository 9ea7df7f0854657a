/* Rows of tokens in one pass: the compiled form of best-fit packing (data/pack.py, `best_fit`, which is the definition) and
   of reading a batch (data/fill.py). What goes wrong is only noticed here: the plain form then does it again and says what.

   A shard entry's tokens lie in a file; where its documents begin, as byte offsets, in memory or in a second file. Files are
   read with pread. Places are tokens from the start of the entry unless said otherwise. */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STRETCH 64 /* most rows packed together: data/pack.py, STRETCH_ROWS */

typedef struct {
  int64_t fd, size, mtime_ns, may_vanish;          /* the tokens' file, and what it was when it was opened */
  int64_t first_byte, shift, is_signed, documents; /* shift: a token has 1 << shift bytes; documents -1: not known */
  const int64_t *starts;                           /* NULL: in the index, from byte index_at on */
  int64_t index_fd, index_size, index_mtime_ns, index_at;
} Shard;

typedef struct {
  const Shard *shard;
  int64_t start;         /* of the row's first label; of a packed row: of its stretch's */
  const int64_t *packed; /* the stretch, as `stratum_pack` writes it; NULL: labels start ... start + row_tokens */
  int64_t rows, place;   /* of a packed row: rows of its stretch, and which it is */
  int64_t out;           /* row of the batch */
} Row;

/* Fills `out` with `bytes` from byte `at` on. -> whether the file had them. */
static int fetch(int64_t fd, int64_t at, int64_t bytes, char *out) {
  while (bytes > 0) {
    ssize_t got = pread(fd, out, bytes, at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return 0;
    out += got, at += got, bytes -= got;
  }
  return 1;
}

static int is_as_opened(int64_t fd, int64_t size, int64_t mtime_ns, int64_t may_vanish) {
  struct stat found;
  return !fstat(fd, &found) && found.st_size == size && (found.st_nlink || may_vanish) &&
         found.st_mtim.tv_sec * 1000000000ll + found.st_mtim.tv_nsec == mtime_ns;
}

static int is_index_as_opened(const Shard *s) {
  return s->starts || is_as_opened(s->index_fd, s->index_size, s->index_mtime_ns, 1);
}

/* Where documents first ... first + count begin. -> whether that could be read. */
static int begins(const Shard *s, int64_t first, int64_t count, int64_t *out) {
  const int64_t *bytes = out;
  if (s->starts) bytes = s->starts + first;
  else if (!fetch(s->index_fd, s->index_at + 8 * first, 8 * count, (char *)out)) return 0;
  for (int64_t i = 0; i < count; i++) out[i] = (bytes[i] - s->first_byte) >> s->shift;
  return 1;
}

/* Number of the first document that begins at `place` or after; -1 where that cannot be read. */
static int64_t first_from(const Shard *s, int64_t place) {
  int64_t low = 0, left = s->documents, begin;
  while (left > 0) {
    int64_t half = left / 2;
    if (!begins(s, low + half, 1, &begin)) return -1;
    if (begin < place) low += half + 1, left -= half + 1;
    else left = half;
  }
  return left < 0 ? -1 : low;
}

/* Orders 0..count-1 by falling size, equal ones as they come: least significant digits first. -> `order` or `other`. */
static int32_t *by_size(const int64_t *size, int64_t count, int64_t largest, int32_t *order, int32_t *other) {
  int bits = 1;
  while (largest >> bits) bits++;
  int digits = (bits + 7) / 8, width = (bits + digits - 1) / digits;
  int64_t mask = (1 << width) - 1;
  for (int64_t i = 0; i < count; i++) order[i] = i;
  for (int digit = 0; digit < digits; digit++) {
    int shift = digit * width;
    int32_t at[256] = {0};
    for (int64_t i = 0; i < count; i++) at[(largest - size[i]) >> shift & mask]++;
    for (int32_t i = 0, sum = 0; i <= mask; i++) {
      int32_t here = at[i];
      at[i] = sum, sum += here;
    }
    for (int64_t i = 0; i < count; i++) other[at[(largest - size[order[i]]) >> shift & mask]++] = order[i];
    int32_t *swap = order;
    order = other, other = swap;
  }
  return order;
}

typedef struct {
  int64_t start, size;
  int32_t document, row;
} Part;

/* The row with the least room that holds `want`, as (room << 6 | row), the first of equal ones; below 0: none. What lies
   below `want` wraps round to be the largest. Written with vectors: compilers unroll the plain loop instead. */
typedef uint32_t Sixteen __attribute__((vector_size(64)));
typedef uint32_t Eight __attribute__((vector_size(32)));
typedef uint32_t Four __attribute__((vector_size(16)));
#define LEAST(a, b) (((a) & ((a) < (b))) | ((b) & ((a) >= (b))))

static inline int32_t fitting(const Sixteen *gap, int32_t want) {
  Sixteen a = gap[0] - want, b = gap[1] - want, c = gap[2] - want, d = gap[3] - want;
  a = LEAST(a, b), c = LEAST(c, d);
  union { Sixteen all; Eight half[2]; } sixteen = {LEAST(a, c)};
  union { Eight all; Four half[2]; } eight = {LEAST(sixteen.half[0], sixteen.half[1])};
  Four four = LEAST(eight.half[0], eight.half[1]);
  uint32_t x = four[0] < four[1] ? four[0] : four[1], y = four[2] < four[3] ? four[2] : four[3];
  x = x < y ? x : y;
  return x >> 31 ? -1 : (int32_t)(x + want);
}

static inline int32_t roomiest(const int32_t *gap) {
  int32_t best = -1;
  for (int r = 0; r < STRETCH; r++) best = gap[r] > best ? gap[r] : best;
  return best;
}

/* Packs `rows` rows (at most 64, of fewer than 2^24 tokens) from `low` on. `out`: numbers of the first piece of each row,
   and the end, then (start, size) of each piece, counted from `low`, by row. -> numbers written; minus those there must be
   room for; 0 where it cannot be done. */
int64_t stratum_pack(const Shard *s, int64_t low, int64_t rows, int64_t row_tokens, int64_t *out, int64_t room) {
  int64_t total = rows * row_tokens, first = first_from(s, low + 1), count = first_from(s, low + total) - first + 1;
  int64_t needed = rows + 1 + 2 * (count + 3 * STRETCH);
  if (first < 0 || count < 1) return 0;
  if (room < needed) return -needed;
  char *memory = malloc(count * (2 * sizeof(int64_t) + 4 * sizeof(int32_t)));
  if (!memory) return 0;
  int64_t *start = (int64_t *)memory, *size = start + count;
  int32_t *row_of = (int32_t *)(size + count), *one = row_of + count, *two = one + count, *waiting = two + count;

  int64_t whole[STRETCH], filled = 0; /* documents longer than a row give whole rows first */
  int is_good = begins(s, first, count - 1, start) && is_index_as_opened(s);
  for (int64_t i = 0, begin = 0; i < count; i++) {
    int64_t end = i + 1 < count ? start[i] - low : total;
    if (!is_good || end < begin || end > total) {
      free(memory);
      return 0;
    }
    for (; end - begin > row_tokens; begin += row_tokens) whole[filled++] = begin;
    start[i] = begin, size[i] = end - begin;
    begin = end;
  }

  union {
    int32_t of[STRETCH];
    Sixteen all[STRETCH / 16];
  } gap; /* (room << 6 | row) of rows with room left, -1 of the others */
  for (int r = 0; r < STRETCH; r++) gap.of[r] = -1;
  const int32_t *order = by_size(size, count, row_tokens, one, two);
  int64_t opened = filled, left = 0, used = 0, next[STRETCH] = {0};
  for (int64_t i = 0; i < count; i++) {
    int32_t document = order[i], tokens = size[document], best = fitting(gap.all, tokens << 6);
    if (best < 0 && opened == rows) {
      waiting[left++] = document, row_of[document] = -1;
      continue;
    }
    if (best < 0) best = (int32_t)(row_tokens << 6 | opened++);
    int32_t row = best & 63, space = (best >> 6) - tokens;
    gap.of[row] = space ? space << 6 | row : -1;
    row_of[document] = row, next[row]++;
  }

  Part parts[2 * STRETCH]; /* what fits nowhere is as long as all gaps together, and each of it longer than any of them */
  int64_t done = 0;
  for (int32_t best; (best = roomiest(gap.of)) >= 0;) {
    int32_t row = best & 63;
    gap.of[row] = -1;
    for (int64_t space = best >> 6; space;) {
      int32_t document = waiting[left - 1];
      int64_t rest = size[document] - done, taken = rest < space ? rest : space;
      if (taken) parts[used++] = (Part){start[document] + done, taken, document, row}, next[row]++;
      space -= taken, done += taken;
      if (taken == rest) left--, done = 0;
    }
  }

  int64_t pieces = 0; /* rows in order, and the pieces of each by where they begin */
  for (int64_t row = 0; row < rows; row++) {
    int64_t here = row < filled ? 1 : next[row];
    out[row] = next[row] = pieces, pieces += here;
  }
  out[rows] = pieces;
  int64_t *places = out + rows + 1;
  for (int64_t row = 0; row < filled; row++) places[2 * row] = whole[row], places[2 * row + 1] = row_tokens;
  int32_t *part_of = one; /* the first part of each document that was cut; `order` is not needed any more */
  for (int64_t p = used - 1; p >= 0; p--) part_of[parts[p].document] = p;
  for (int64_t i = 0; i < count; i++) {
    if (row_of[i] >= 0) {
      int64_t at = 2 * next[row_of[i]]++;
      places[at] = start[i], places[at + 1] = size[i];
    } else if (size[i]) {
      for (int64_t p = part_of[i]; p < used && parts[p].document == i; p++) {
        int64_t at = 2 * next[parts[p].row]++;
        places[at] = parts[p].start, places[at + 1] = parts[p].size;
      }
    }
  }
  free(memory);
  return rows + 1 + 2 * pieces;
}

#define WIDEN(type)                                                          \
  {                                                                          \
    const type *in = narrow;                                                 \
    for (int64_t i = 0; i < count; i++) out[i] = in[i];                      \
  }
#define LARGEST(type)                                                        \
  {                                                                          \
    const type *in = narrow;                                                 \
    type most = 0;                                                           \
    for (int64_t i = 0; i < count; i++) most = in[i] > most ? in[i] : most;  \
    return most;                                                             \
  }

static void widen(const Shard *s, const void *restrict narrow, int64_t count, int64_t *restrict out) {
  switch (s->shift << 1 | s->is_signed) {
    case 0: WIDEN(uint8_t) break;
    case 1: WIDEN(int8_t) break;
    case 2: WIDEN(uint16_t) break;
    case 3: WIDEN(int16_t) break;
    case 4: WIDEN(uint32_t) break;
    case 5: WIDEN(int32_t) break;
    default: WIDEN(int64_t)
  }
}

/* The largest id, negative ones counted as their bits say: larger than any that is not. */
static uint64_t largest(const Shard *s, const void *narrow, int64_t count) {
  switch (s->shift) {
    case 0: LARGEST(uint8_t)
    case 1: LARGEST(uint16_t)
    case 2: LARGEST(uint32_t)
    default: LARGEST(uint64_t)
  }
}

static void number(int32_t *out, int64_t count, int32_t document) {
  for (int64_t i = 0; i < count; i++) out[i] = document;
}

/* Reads `count` rows. Row r of the batch: labels at labels + r stride, the token before each at tokens + r stride, the
   document each label belongs to at documents + r row_tokens (NULL: not wanted). labels NULL: they are tokens + 1, one more
   number a row. `current` is set to each row's number while it is read. -> 0; 1 where the plain form must look. */
int64_t stratum_read(const Row *rows, int64_t count, int64_t row_tokens, int64_t vocab, int64_t *tokens, int64_t *labels,
                     int64_t stride, int32_t *documents, volatile int64_t *current) {
  char *narrow = malloc((row_tokens + 1) * 8);
  if (!narrow) return 1;
  int64_t failed = 0;
  for (int64_t r = 0; r < count && !failed; r++) {
    const Row *row = rows + r;
    const Shard *s = row->shard;
    *current = r;
    int64_t whole[2] = {0, row_tokens}, first = 0, stop = 1;
    const int64_t *places = whole;
    if (row->packed) {
      first = row->packed[row->place], stop = row->packed[row->place + 1];
      places = row->packed + row->rows + 1;
    }
    uint64_t limit = vocab, bits = 8 << s->shift;
    if (s->is_signed && limit > 1ull << (bits - 1)) limit = 1ull << (bits - 1);
    int64_t slot = 0;
    for (int64_t p = first; p < stop && !failed; p++) {
      int64_t start = row->start + places[2 * p], size = places[2 * p + 1];
      int64_t *inputs = tokens + row->out * stride + slot;
      failed = slot + size > row_tokens || !fetch(s->fd, s->first_byte + ((start - 1) << s->shift), (size + 1) << s->shift, narrow) || largest(s, narrow, size + 1) >= limit;
      if (failed) break;
      widen(s, narrow, labels ? size : size + 1, inputs);
      if (labels) widen(s, narrow + (1 << s->shift), size, labels + row->out * stride + slot);
      if (documents && row->packed) number(documents + row->out * row_tokens + slot, size, p - first);
      slot += size;
    }
    failed |= slot != row_tokens;
    if (documents && !row->packed && !failed) {
      int32_t *out = documents + row->out * row_tokens, document = 0;
      int64_t done = 0, begin[64], many = 64;
      int64_t d = first_from(s, row->start + 1);
      for (failed = d < 0; many == 64 && !failed; d += many) {
        many = s->documents - d < 64 ? s->documents - d : 64;
        failed = !begins(s, d, many, begin);
        for (int64_t i = 0; i < many && !failed; i++, document++) {
          int64_t next = begin[i] - row->start;
          if (next >= row_tokens) {
            many = 0;
            break;
          }
          failed = next < done;
          if (!failed) number(out + done, next - done, document), done = next;
        }
      }
      number(out + done, row_tokens - done, document);
    }
  }
  free(narrow);
  for (int64_t r = 0; r < count && !failed; r++) { /* what was read is good if the files are still what was opened */
    const Shard *s = rows[r].shard;
    if (r && s == rows[r - 1].shard) continue;
    failed = !is_as_opened(s->fd, s->size, s->mtime_ns, s->may_vanish) || !is_index_as_opened(s);
  }
  return failed;
}
