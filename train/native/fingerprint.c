/* Order-independent sum of a box of a tensor. Definition and plain version: train/checkpoint/fingerprint.py.

   sums[lane] += rho_lane(row) * sum over columns of alpha_lane(column) * bits(row, column)      mod 2^64

   A 64-bit word has 2, 4 or 8 elements; plane p is the p-th element of each word, shifted down. Coefficients are stored plane
   by plane, one per word, so that each product is one multiplication of 32 by 32 bits:

       word      | element 3 | element 2 | element 1 | element 0 |       (16 bits each; lowest address right)
       plane 1   |           |           |           | element 1 |

   NaN and infinity are counted in the same pass: three operations per loaded word detect whether any of its elements has an
   exponent of all ones; only blocks with such an element are counted element by element.

   The box is processed in tiles of rows that fit the second-level cache, a tile in blocks of columns whose coefficients fit the
   first-level cache. The coefficients are made once for all tiles: wide rows make tiles of few rows. While one tile is summed
   the next one is prefetched in memory order: blocks jump from row to row, which the hardware prefetcher does not follow. */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "planes are taken from little-endian words"
#endif

#define LANES 2
#define BLOCK 1024       /* columns: 16 KB of coefficients */
#define TILE (512 << 10) /* bytes */
#define BLOCKS 64        /* blocks of columns whose coefficients are kept for all tiles: 1 MB */
#define ALWAYS static inline __attribute__((always_inline))

#if defined(__AVX512F__)
typedef uint64_t V __attribute__((vector_size(64)));
#define MULTIPLY(x, y) ((V)_mm512_mul_epu32((__m512i)(x), (__m512i)(y)))
#elif defined(__AVX2__)
typedef uint64_t V __attribute__((vector_size(32)));
#define MULTIPLY(x, y) ((V)_mm256_mul_epu32((__m256i)(x), (__m256i)(y)))
#elif defined(__SSE2__)
typedef uint64_t V __attribute__((vector_size(16)));
#define MULTIPLY(x, y) ((V)_mm_mul_epu32((__m128i)(x), (__m128i)(y)))
#else
typedef uint64_t V __attribute__((vector_size(16)));
#define MULTIPLY(x, y) (((x) & 0xFFFFFFFFull) * (y))
#endif
#define WORDS ((int64_t)(sizeof(V) / 8))
/* The exponent's bits of an element (of a format without infinities: those of its NaN), and its lowest one, both repeated through
   the word: (bits & mask) + one has the element's top bit where the element is NaN or infinite. Both 0 for whole numbers. */
typedef struct {
    uint64_t mask, one;
} NonFinite;

static inline uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

ALWAYS V loaded(const void *at)
{
    V value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* alpha of n columns of the whole from `first` on, [lane][plane][BLOCK / planes]. */
static void make_alpha(int64_t n, int planes, int64_t first, uint64_t alpha[LANES][BLOCK])
{
    for (int lane = 0; lane < LANES; lane++)
        for (int64_t p = 0; p < planes; p++)
            for (int64_t i = 0; i < (n - p + planes - 1) / planes; i++)
                alpha[lane][p * (BLOCK / planes) + i] =
                    (mix(LANES * (uint64_t)(first + i * planes + p) + lane) >> 32) | 1u;
}

/* The top bit of an element, or of a word's elements, that is not finite. */
#define NONFINITE(bits, mask, one) (((bits) & (mask)) + (one))

/* How many of n columns are not finite; the first is an even one of the whole. */
static __attribute__((noinline)) uint64_t count_nonfinite(const char *x, int64_t n, int width, NonFinite nonfinite)
{
    uint64_t count = 0;
    for (int64_t c = 0; c < n; c++) {
        const int shift = 8 * (int)(c * width % 8);
        uint64_t bits = 0;
        memcpy(&bits, x + c * width, width);
        count += NONFINITE(bits, nonfinite.mask >> shift, nonfinite.one >> shift) >> (8 * width - 1) & 1;
    }
    return count;
}

/* Adds n columns, from x on, of row `row` of the whole tensor. ahead: n columns to prefetch, if is_far. found, rest: collect the
   top bits of elements that are not finite. */
ALWAYS void add_row(const char *x, int64_t n, int width, uint64_t alpha[LANES][BLOCK], uint64_t row, const char *ahead, int is_far,
                    NonFinite nonfinite, V *found, uint64_t *rest, uint64_t *sums)
{
    const int planes = 8 / width;
    const int64_t plane = BLOCK / planes, vectors = n / (planes * WORDS);
    uint64_t total[LANES] = {0};
    V s[LANES] = {{0}};
    const V mask = nonfinite.mask + (V){0}, one = nonfinite.one + (V){0};
    const int high = 64 - 8 * width; /* only the halves of an 8-byte element differ */
    const uint64_t masks[2] = {nonfinite.mask << high >> high, nonfinite.mask >> high}, ones[2] = {nonfinite.one << high >> high, nonfinite.one >> high};
    for (int64_t i = 0; i < vectors; i++) {
        const V word = loaded(x + i * (int64_t)sizeof(V));
        if (is_far)
            __builtin_prefetch(ahead + i * (int64_t)sizeof(V), 0, 2);
        *found |= NONFINITE(word, mask, one);
        for (int p = 0; p < planes; p++) {
            V bits = word >> (8 * width * p);
            if (width < 4)
                bits &= (1ull << (8 * width)) - 1;
            for (int lane = 0; lane < LANES; lane++)
                s[lane] += MULTIPLY(bits, loaded(&alpha[lane][p * plane + i * WORDS]));
        }
    }
    for (int lane = 0; lane < LANES; lane++)
        for (int64_t k = 0; k < WORDS; k++)
            total[lane] += s[lane][k];
    for (int64_t c = vectors * planes * WORDS; c < n; c++) {
        uint64_t bits = 0;
        memcpy(&bits, x + c * width, width);
        *rest |= NONFINITE(bits, masks[c & 1], ones[c & 1]);
        for (int lane = 0; lane < LANES; lane++)
            total[lane] += bits * alpha[lane][(c % planes) * plane + c / planes];
    }
    for (int lane = 0; lane < LANES; lane++)
        sums[lane] += total[lane] * (mix(~(LANES * row + lane)) | 1u);
}

/* A box: rows of `columns` elements, starting at column `first` of the whole tensor; the outer dimensions locate its rows. */
typedef struct {
    int outer; /* dimensions before the last */
    int width; /* bytes an element: 4, 2, 1 */
    const int64_t *whole, *offset, *shape;
    int64_t rows, columns, first;
    uint64_t (*alpha)[LANES][BLOCK]; /* of each block of columns; NULL: to be made when needed */
} Box;

/* Index in the whole tensor of the box's row r. */
ALWAYS uint64_t row_of(const Box *box, int64_t r)
{
    int64_t row = 0, stride = 1;
    for (int d = box->outer - 1; d > 0; d--) {
        row += (box->offset[d] + r % box->shape[d]) * stride;
        r /= box->shape[d];
        stride *= box->whole[d];
    }
    return (uint64_t)(box->outer ? row + (box->offset[0] + r) * stride : 0);
}

/* Adds rows from..end of a box; data: of row `from`; is_far: they are in memory, not yet in a cache. */
ALWAYS void add_width(const char *data, int width, const Box *box, int64_t from, int64_t end, char *copy, int is_far,
                      NonFinite nonfinite, uint64_t *sums)
{
    const int64_t stride = box->columns * width, tile = TILE / stride > 0 ? TILE / stride : 1;
    const uint64_t tops = width == 4 ? 0x8000000080000000ull : width == 2 ? 0x8000800080008000ull : 0x8080808080808080ull;
    uint64_t made[LANES][BLOCK];
    for (int64_t top = from; top < end; top += tile) {
        const int64_t below = end - top < tile ? end : top + tile;
        const char *x = data + (top - from) * stride, *ahead = x + (below - top) * stride;
        if (copy)
            memcpy(copy + (top - from) * stride, x, (below - top) * stride);
        for (int64_t start = 0; start < box->columns; start += BLOCK) {
            const int64_t n = box->columns - start < BLOCK ? box->columns - start : BLOCK;
            uint64_t(*alpha)[BLOCK] = box->alpha ? box->alpha[start / BLOCK] : made;
            if (!box->alpha && (top == from || box->columns > BLOCK))
                make_alpha(n, 8 / width, box->first + start, made);
            V found = {0};
            uint64_t any = 0;
            for (int64_t r = top; r < below; r++, ahead += n * width)
                add_row(x + (r - top) * stride + start * width, n, width, alpha, row_of(box, r), ahead, is_far, nonfinite, &found, &any,
                        sums);
            for (int64_t k = 0; k < WORDS; k++)
                any |= found[k];
            for (int64_t r = top; r < below && any & tops; r++)
                sums[LANES] += count_nonfinite(x + (r - top) * stride + start * width, n, width, nonfinite);
        }
    }
}

ALWAYS void add_rows(const char *data, const Box *box, int64_t from, int64_t end, char *copy, int is_far, NonFinite nonfinite,
                     uint64_t *sums)
{
    if (box->width == 4)
        add_width(data, 4, box, from, end, copy, is_far, nonfinite, sums);
    else if (box->width == 2)
        add_width(data, 2, box, from, end, copy, is_far, nonfinite, sums);
    else
        add_width(data, 1, box, from, end, copy, is_far, nonfinite, sums);
}

static Box box_of(int width, int dims, const int64_t *whole, const int64_t *offset, const int64_t *shape)
{
    Box box = {dims ? dims - 1 : 0, width, whole, offset, shape, 1, 1, 0, NULL};
    if (dims) {
        box.columns = shape[dims - 1];
        box.first = offset[dims - 1];
    }
    for (int d = 0; d < box.outer; d++)
        box.rows *= shape[d];
    if (width == 8) {
        box.width = 4;
        box.columns *= 2;
        box.first *= 2;
    }
    if (box.columns == 0)
        box.rows = 0;
    return box;
}

/* Makes the coefficients of all columns once, if more than one tile needs them and they are not too many. Free box->alpha. */
static void keep_alpha(Box *box)
{
    const int64_t blocks = (box->columns + BLOCK - 1) / BLOCK;
    if (blocks > BLOCKS || box->rows * box->columns * box->width <= TILE)
        return;
    box->alpha = malloc(blocks * sizeof *box->alpha);
    for (int64_t b = 0; box->alpha && b < blocks; b++) {
        const int64_t n = box->columns - b * BLOCK < BLOCK ? box->columns - b * BLOCK : BLOCK;
        make_alpha(n, 8 / box->width, box->first + b * BLOCK, box->alpha[b]);
    }
}

/* A box in memory. width: bytes per element, 8 counts as two columns of 4. whole, offset, shape: `dims` numbers each. copy: NULL, or
   the destination of a copy of the box. mask, one: see `NonFinite`. sums: one sum per lane, then the number of non-finite elements. */
void stratum_fingerprint(const char *data, int width, int dims, const int64_t *whole, const int64_t *offset,
                         const int64_t *shape, char *copy, uint64_t mask, uint64_t one, uint64_t *sums)
{
    Box box = box_of(width, dims, whole, offset, shape);
    keep_alpha(&box);
    add_rows(data, &box, 0, box.rows, copy, 1, (NonFinite){mask, one}, sums);
    free(box.alpha);
}

static int read_all(int file, char *into, int64_t size, int64_t at)
{
    while (size > 0) {
        const ssize_t got = pread(file, into, size, at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : -1;
        into += got, at += got, size -= got;
    }
    return 0;
}

/* The same for a box stored in a file from byte `at` on, read through `room` bytes of scratch. -> 0, errno, or -1 if the file is
   too short. */
int stratum_fingerprint_file(int file, int64_t at, char *scratch, int64_t room, int width, int dims, const int64_t *whole,
                             const int64_t *offset, const int64_t *shape, uint64_t mask, uint64_t one, uint64_t *sums)
{
    Box box = box_of(width, dims, whole, offset, shape);
    const NonFinite nonfinite = {mask, one};
    const int64_t stride = box.columns * box.width;
    int problem = 0;
    if (stride <= room) {
        const int64_t step = stride ? room / stride : 1;
        keep_alpha(&box);
        for (int64_t r = 0; r < box.rows && !problem; r += step, at += step * stride) {
            const int64_t end = box.rows - r < step ? box.rows : r + step;
            if ((problem = read_all(file, scratch, (end - r) * stride, at)) == 0)
                add_rows(scratch, &box, r, end, NULL, 0, nonfinite, sums);
        }
        free(box.alpha);
        return problem;
    }
    const int64_t most = room / box.width & ~(int64_t)1; /* the halves of an 8-byte element stay together */
    for (int64_t r = 0; r < box.rows; r++)
        for (int64_t c = 0; c < box.columns && !problem; c += most) {
            Box part = box;
            part.columns = box.columns - c < most ? box.columns - c : most;
            part.first = box.first + c;
            if ((problem = read_all(file, scratch, part.columns * box.width, at)) == 0)
                add_rows(scratch, &part, r, r + 1, NULL, 0, nonfinite, sums);
            at += part.columns * box.width;
        }
    return problem;
}
