/* Rows of tokens in one pass: the compiled form of best-fit packing (data/rows/packing.py, `best_fit`, which is the definition) and
   of reading a batch (data/rows/batch_memory.py). What goes wrong is only noticed here: the plain form then does it again and says what.

   A shard entry's tokens lie in a file; where its documents begin, as byte offsets, in memory or in a second file. Files are
   read with pread. Places are tokens from the start of the entry unless said otherwise. */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STRETCH 64 /* most rows packed together: data/rows/packing.py, STRETCH_ROWS */
#define TOGETHER 4 /* stretches packed side by side */

typedef struct {
  int64_t fd, size, mtime_ns, may_vanish;          /* the tokens' file, and what it was when it was opened */
  int64_t first_byte, shift, is_signed, documents; /* shift: a token has 1 << shift bytes; documents -1: not known */
  const int64_t *starts;                           /* NULL: in the index, from byte index_at on */
  int64_t index_fd, index_size, index_mtime_ns, index_at;
} Shard;

typedef struct {
  const Shard *shard;
  int64_t start;         /* of the row's first label; of a packed row: of its stretch's */
  const int32_t *packed; /* the stretch, as `stratum_pack` writes it; NULL: labels start ... start + row_tokens */
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

/* Sorts keys by their upper halves, equal ones as they come: least significant digits first. -> `keys` or `other`. */
static uint64_t *sorted(uint64_t *keys, uint64_t *other, int64_t count, int64_t largest) {
  int bits = 1;
  while (largest >> bits) bits++;
  int digits = (bits + 7) / 8, width = (bits + digits - 1) / digits;
  uint64_t mask = (1 << width) - 1;
  for (int shift = 32; shift < 32 + digits * width; shift += width) {
    int32_t at[256] = {0};
    for (int64_t i = 0; i < count; i++) at[keys[i] >> shift & mask]++;
    for (int32_t i = 0, sum = 0; i <= (int32_t)mask; i++) {
      int32_t here = at[i];
      at[i] = sum, sum += here;
    }
    for (int64_t i = 0; i < count; i++) other[at[keys[i] >> shift & mask]++] = keys[i];
    uint64_t *swap = keys;
    keys = other, other = swap;
  }
  return keys;
}

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

typedef struct {
  int32_t start, size, document, row;
} Part;

/* A stretch that is to be packed, and what came of it. */
typedef struct {
  const Shard *shard;
  int64_t low, rows;   /* where it begins, and how many rows (at most 64) it has */
  int64_t at, numbers; /* set: where in `out` it was written, and how much; numbers 0: it cannot be packed here */
} Stretch;

/* A stretch while it is packed. Places are counted from `low`. */
typedef struct {
  union {
    int32_t of[STRETCH];
    Sixteen all[STRETCH / 16];
  } gap; /* (room << 6 | row) of rows with room left, -1 of the others */
  int64_t first, count; /* of its documents; the first may begin before it */
  int64_t rows, filled, opened, left;
  int32_t *start, *size, *row_of, *waiting;
  uint64_t *keys, *other;
  int32_t whole[STRETCH], next[STRETCH];
} Packing;

#define BYTES_A_DOCUMENT (2 * sizeof(uint64_t) + 4 * sizeof(int32_t))

/* Cuts documents longer than a row into whole rows and orders what is left of each. -> whether the index makes sense. */
static int order(Packing *p, const Stretch *stretch, int64_t row_tokens, char *memory) {
  int64_t count = p->count, total = stretch->rows * row_tokens, *begin = (int64_t *)memory;
  p->keys = (uint64_t *)memory, p->other = p->keys + count;
  p->start = (int32_t *)(p->other + count), p->size = p->start + count, p->row_of = p->size + count, p->waiting = p->row_of + count;
  p->rows = stretch->rows, p->filled = p->left = 0;
  if (!begins(stretch->shard, p->first, count - 1, begin) || !is_index_as_opened(stretch->shard)) return 0;
  int64_t low = 0;
  for (int64_t i = 0; i < count; i++) { /* keys take the place of what was read into them */
    int64_t end = i + 1 < count ? begin[i] - stretch->low : total;
    if (end < low || end > total) return 0;
    for (; end - low > row_tokens; low += row_tokens) p->whole[p->filled++] = low;
    p->start[i] = low, p->size[i] = end - low;
    p->keys[i] = (uint64_t)(row_tokens - (end - low)) << 32 | i;
    low = end;
  }
  p->opened = p->filled;
  for (int r = 0; r < STRETCH; r++) p->gap.of[r] = -1, p->next[r] = 0;
  p->keys = sorted(p->keys, p->other, count, row_tokens);
  return 1;
}

/* Finds a place for the document that is next by size. */
static inline void place(Packing *p, int64_t which, int32_t row_tokens) {
  int32_t document = (int32_t)p->keys[which], tokens = row_tokens - (int32_t)(p->keys[which] >> 32);
  int32_t best = fitting(p->gap.all, tokens << 6);
  if (best < 0 && p->opened == p->rows) {
    p->waiting[p->left++] = document, p->row_of[document] = -1;
    return;
  }
  if (best < 0) best = (int32_t)(row_tokens << 6 | p->opened++);
  int32_t row = best & 63, space = (best >> 6) - tokens;
  p->gap.of[row] = space ? space << 6 | row : -1;
  p->row_of[document] = row, p->next[row]++;
}

/* Cuts what fits nowhere into the gaps, and writes the pieces. -> numbers written. */
static int64_t finish(Packing *p, int32_t row_tokens, int32_t *out) {
  Part parts[2 * STRETCH]; /* what fits nowhere is as long as all gaps together, and each of it longer than any of them */
  int64_t used = 0, left = p->left;
  int32_t done = 0;
  for (int32_t best; (best = roomiest(p->gap.of)) >= 0;) {
    int32_t row = best & 63;
    p->gap.of[row] = -1;
    for (int32_t space = best >> 6; space;) {
      int32_t document = p->waiting[left - 1];
      int32_t rest = p->size[document] - done, taken = rest < space ? rest : space;
      if (taken) parts[used++] = (Part){p->start[document] + done, taken, document, row}, p->next[row]++;
      space -= taken, done += taken;
      if (taken == rest) left--, done = 0;
    }
  }
  int32_t pieces = 0, *places = out + p->rows + 1; /* rows in order, and the pieces of each by where they begin */
  for (int64_t row = 0; row < p->rows; row++) {
    int32_t here = row < p->filled ? 1 : p->next[row];
    out[row] = p->next[row] = pieces, pieces += here;
  }
  out[p->rows] = pieces;
  for (int64_t row = 0; row < p->filled; row++) places[2 * row] = p->whole[row], places[2 * row + 1] = row_tokens;
  int32_t *part_of = (int32_t *)p->keys; /* the first part of each document that was cut; keys are not needed any more */
  for (int64_t part = used - 1; part >= 0; part--) part_of[parts[part].document] = part;
  for (int64_t i = 0; i < p->count; i++) {
    if (p->row_of[i] >= 0) {
      int32_t *at = places + 2 * p->next[p->row_of[i]]++;
      at[0] = p->start[i], at[1] = p->size[i];
    } else if (p->size[i]) {
      for (int64_t part = part_of[i]; part < used && parts[part].document == i; part++) {
        int32_t *at = places + 2 * p->next[parts[part].row]++;
        at[0] = parts[part].start, at[1] = parts[part].size;
      }
    }
  }
  return p->rows + 1 + 2 * pieces;
}

/* Packs stretches of rows of fewer than 2^24 tokens. Each is written to `out` as: number of the first piece of each row, and
   the end, then (start, size) of each piece, counted from its `low`, by row. A document's place depends on the one before:
   four stretches at once, so that the processor need not wait. -> 0, or numbers that there must be room for. */
int64_t stratum_pack(Stretch *stretches, int64_t count, int64_t row_tokens, int32_t *out, int64_t room) {
  int64_t used = 0;
  for (int64_t begin = 0; begin < count; begin += TOGETHER) {
    Packing packings[TOGETHER];
    int64_t many = count - begin < TOGETHER ? count - begin : TOGETHER, documents = 0, longest = 0, needed = 0;
    for (int64_t k = 0; k < many; k++) {
      Stretch *s = stretches + begin + k;
      Packing *p = packings + k;
      p->first = first_from(s->shard, s->low + 1);
      p->count = p->first < 0 ? 0 : first_from(s->shard, s->low + s->rows * row_tokens) - p->first + 1;
      if (p->count < 0) p->count = 0;
      documents += p->count, needed += s->rows + 1 + 2 * (p->count + 3 * STRETCH);
      s->at = s->numbers = 0;
    }
    if (used + needed > room) return (used + needed) * count / (begin + many) + needed;
    char *memory = malloc(documents * BYTES_A_DOCUMENT + 1), *next = memory;
    for (int64_t k = 0; k < many; k++) {
      Packing *p = packings + k;
      if (p->count && !(memory && order(p, stretches + begin + k, row_tokens, next))) p->count = 0;
      else next += p->count * BYTES_A_DOCUMENT;
      longest = p->count > longest ? p->count : longest;
    }
    for (int64_t i = 0; i < longest; i++)
      for (int64_t k = 0; k < many; k++)
        if (i < packings[k].count) place(packings + k, i, row_tokens);
    for (int64_t k = 0; k < many; k++) {
      Stretch *s = stretches + begin + k;
      if (!packings[k].count) continue;
      s->at = used, s->numbers = finish(packings + k, row_tokens, out + used);
      used += s->numbers;
    }
    free(memory);
  }
  return 0;
}

#define WIDEN(type)                                                          \
  {                                                                          \
    const type *in = narrow;                                                 \
    if (!labels) for (int64_t i = 0; i <= count; i++) tokens[i] = in[i];     \
    else for (int64_t i = 0; i < count; i++) tokens[i] = in[i], labels[i] = in[i + 1]; \
  }
#define LARGEST(type)                                                        \
  {                                                                          \
    const type *in = narrow;                                                 \
    type most = 0;                                                           \
    for (int64_t i = 0; i < count; i++) most = in[i] > most ? in[i] : most;  \
    return most;                                                             \
  }

/* `count` labels and the token before each; labels NULL: into `tokens` alone, one more. */
static void widen(const Shard *s, const void *restrict narrow, int64_t count, int64_t *restrict tokens, int64_t *restrict labels) {
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
    int32_t whole[2] = {0, row_tokens}, first = 0, stop = 1;
    const int32_t *places = whole;
    if (row->packed) {
      first = row->packed[row->place], stop = row->packed[row->place + 1];
      places = row->packed + row->rows + 1;
    }
    uint64_t limit = vocab, bits = 8 << s->shift;
    if (s->is_signed && limit > 1ull << (bits - 1)) limit = 1ull << (bits - 1);
    int64_t slot = 0;
    for (int64_t p = first; p < stop && !failed; p++) {
      int64_t start = row->start + places[2 * p], size = places[2 * p + 1];
      failed = slot + size > row_tokens || !fetch(s->fd, s->first_byte + ((start - 1) << s->shift), (size + 1) << s->shift, narrow) || largest(s, narrow, size + 1) >= limit;
      if (failed) break;
      int64_t at = row->out * stride + slot;
      widen(s, narrow, size, tokens + at, labels ? labels + at : NULL);
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
