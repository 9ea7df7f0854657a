/* Order-free sum of a box of a tensor: see fingerprint.py, which says what is computed and holds the plain form.

   sums[lane] += rho_lane(row) * sum over columns of alpha_lane(column) * bits(row, column)      mod 2^64

   rows: index of each row of the box in the whole tensor; columns first .. first + count - 1 of the whole.
   copy: NULL, or where the box's bytes are copied to on the way. */

#include <stdint.h>
#include <string.h>

#define LANES 2
#define BLOCK 16384

static inline uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

#define ROW(NAME, WORD)                                                                                              \
    static void NAME(const WORD *restrict x, int64_t n, const uint32_t *restrict a, const uint32_t *restrict b,      \
                     uint64_t *restrict s)                                                                           \
    {                                                                                                                \
        uint64_t s0 = 0, s1 = 0;                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                            \
            uint64_t v = x[i];                                                                                       \
            s0 += v * a[i];                                                                                          \
            s1 += v * b[i];                                                                                          \
        }                                                                                                            \
        s[0] = s0;                                                                                                   \
        s[1] = s1;                                                                                                   \
    }

ROW(row8, uint8_t)
ROW(row16, uint16_t)
ROW(row32, uint32_t)

void stratum_fingerprint(const char *data, int width, int64_t row_count, int64_t column_count, const int64_t *rows,
                         int64_t first, char *copy, uint64_t *sums)
{
    /* Coefficients of a block of columns are made once and used for every row of the box. */
    for (int64_t start = 0; start < column_count; start += BLOCK) {
        int64_t n = column_count - start < BLOCK ? column_count - start : BLOCK;
        uint32_t a[BLOCK], b[BLOCK];
        for (int64_t i = 0; i < n; i++) {
            uint64_t column = (uint64_t)(first + start + i);
            a[i] = (uint32_t)(mix(LANES * column) >> 32) | 1u;
            b[i] = (uint32_t)(mix(LANES * column + 1) >> 32) | 1u;
        }
        for (int64_t r = 0; r < row_count; r++) {
            const char *x = data + (r * column_count + start) * width;
            uint64_t s[LANES];
            if (width == 4)
                row32((const uint32_t *)x, n, a, b, s);
            else if (width == 2)
                row16((const uint16_t *)x, n, a, b, s);
            else
                row8((const uint8_t *)x, n, a, b, s);
            if (copy)
                memcpy(copy + (r * column_count + start) * width, x, n * width);
            uint64_t row = (uint64_t)rows[r];
            sums[0] += s[0] * (mix(~(LANES * row)) | 1u);
            sums[1] += s[1] * (mix(~(LANES * row + 1)) | 1u);
        }
    }
}
