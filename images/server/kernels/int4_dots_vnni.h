/* Dot products of 4 bytes in one instruction, DOT(sums, unsigned, signed). */
#pragma once
#include "int4.h"

/* Add to `products`, for each of `rows` rows, `size` of its values times WIDTH columns. What lies `ahead` of the weights
 * is fetched meanwhile. */
INLINE void dots(Ints *products, const uint8_t *weights, int64_t ahead, const int8_t *values, int64_t step, int64_t size,
                 const int rows) {
  Ints more[INT4_TILE]; /* a second sum of each row, because a product waits for the one before in its sum */
  for (int r = 0; r < rows; r++) more[r] = int_zeros();
  for (int64_t at = 0; at < size; at += 8, weights += 4 * LANES) {
    _mm_prefetch((const char *)weights + ahead, _MM_HINT_T0);
    const Ints pairs = load_bytes(weights), even = low_nibbles(pairs), odd = high_nibbles(pairs);
    for (int r = 0; r < rows; r++) {
      const FourBytes *four = (const FourBytes *)(values + r * step + at);
      products[r] = DOT(products[r], even, int_spread(four[0]));
      more[r] = DOT(more[r], odd, int_spread(four[1]));
    }
  }
  for (int r = 0; r < rows; r++) products[r] = int_add(products[r], more[r]);
}
