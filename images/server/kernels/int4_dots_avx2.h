/* Dot products of 4 bytes by sums of 16 bits: eight sums of two products fit, 8 x 2 x 15 x 127 = 30480. */
#pragma once
#include "int4.h"

INLINE void dots_of(Ints products[][INT4_TILE], const uint8_t *weights, const int8_t *values, int64_t step,
                    const int size, const int rows, const int vectors) {
  Ints sums[INT4_VECTORS][INT4_TILE];
  for (int v = 0; v < vectors; v++)
    for (int r = 0; r < rows; r++) sums[v][r] = int_zeros();
  fetch(weights + INT4_AHEAD);
  for (int at = 0; at < size; at += 8, weights += 4 * LANES) {
    Ints even[INT4_VECTORS], odd[INT4_VECTORS];
    for (int v = 0; v < vectors; v++) {
      const Ints pairs = load_bytes(weights + v * 4 * WIDTH);
      even[v] = low_nibbles(pairs);
      odd[v] = high_nibbles(pairs);
    }
    for (int r = 0; r < rows; r++) {
      const FourBytes *four = (const FourBytes *)(values + r * step + at);
      const Ints first = int_spread(four[0]), second = int_spread(four[1]);
      for (int v = 0; v < vectors; v++) {
        sums[v][r] = _mm256_add_epi16(sums[v][r], _mm256_maddubs_epi16(even[v], first));
        sums[v][r] = _mm256_add_epi16(sums[v][r], _mm256_maddubs_epi16(odd[v], second));
        IN_REGISTER(sums[v][r]);
      }
    }
  }
  for (int v = 0; v < vectors; v++)
    for (int r = 0; r < rows; r++)
      products[v][r] = int_add(products[v][r], _mm256_madd_epi16(sums[v][r], _mm256_set1_epi16(1)));
}

/* As in int4_dots_vnni.h. */
INLINE void dots(Ints products[][INT4_TILE], const uint8_t *weights, int64_t apart, const int8_t *values, int64_t step,
                 int64_t size, const int rows, const int vectors) {
  (void)apart; /* the vectors are of one group */
  int64_t at = 0;
  for (; at + 32 <= size; at += 32)
    dots_of(products, weights + at / 2 * LANES, values + at, step, 32, rows, vectors);
  if (at < size) dots_of(products, weights + at / 2 * LANES, values + at, step, 16, rows, vectors);
}
