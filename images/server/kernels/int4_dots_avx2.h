/* Dot products of 4 bytes by sums of 16 bits: eight sums of two products fit, 8 x 2 x 15 x 127 = 30480. */
#pragma once
#include "int4.h"

INLINE void dots_of(Ints *products, const uint8_t *weights, int64_t ahead, const int8_t *values, int64_t step,
                    const int size, const int rows) {
  Ints sums[INT4_TILE];
  for (int r = 0; r < rows; r++) sums[r] = int_zeros();
  for (int at = 0; at < size; at += 8, weights += 4 * LANES) {
    _mm_prefetch((const char *)weights + ahead, _MM_HINT_T0);
    const Ints pairs = load_bytes(weights), even = low_nibbles(pairs), odd = high_nibbles(pairs);
    for (int r = 0; r < rows; r++) {
      const FourBytes *four = (const FourBytes *)(values + r * step + at);
      sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(even, int_spread(four[0])));
      sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(odd, int_spread(four[1])));
    }
  }
  for (int r = 0; r < rows; r++)
    products[r] = int_add(products[r], _mm256_madd_epi16(sums[r], _mm256_set1_epi16(1)));
}

/* As in int4_dots_vnni.h. */
INLINE void dots(Ints *products, const uint8_t *weights, int64_t ahead, const int8_t *values, int64_t step, int64_t size,
                 const int rows) {
  int64_t at = 0;
  for (; at + 32 <= size; at += 32)
    dots_of(products, weights + at / 8 * 4 * LANES, ahead, values + at, step, 32, rows);
  if (at < size) dots_of(products, weights + at / 8 * 4 * LANES, ahead, values + at, step, 16, rows);
}
