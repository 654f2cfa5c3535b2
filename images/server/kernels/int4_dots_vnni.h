/* Dot products of 4 bytes in one instruction, DOT(sums, unsigned, signed). */
#pragma once
#include "int4.h"

/* Add to products[vector][row] `size` of the row's values times the columns of a vector; groups of columns lie `apart`. */
INLINE void dots(Ints products[][INT4_TILE], const uint8_t *weights, int64_t apart, const int8_t *values, int64_t step,
                 int64_t size, const int rows, const int vectors) {
  /* A product waits for the one before in its sum; but registers are few. */
  const int chains = rows * vectors < (WIDTH == LANES ? 8 : 4) ? 2 : 1;
  Ints sums[2][INT4_VECTORS][INT4_TILE];
  for (int chain = 0; chain < chains; chain++)
    for (int v = 0; v < vectors; v++)
      for (int r = 0; r < rows; r++) sums[chain][v][r] = int_zeros();
  for (int64_t at = 0; at < size; at += 8, weights += 4 * LANES) {
    Ints even[INT4_VECTORS], odd[INT4_VECTORS];
    for (int v = 0; v < vectors; v++) {
      const uint8_t *from = weights + v * WIDTH / LANES * apart + v * WIDTH % LANES * 4;
      if (at % 32 == 0 && v * WIDTH % LANES == 0) fetch(from + INT4_AHEAD);
      const Ints pairs = load_bytes(from);
      even[v] = low_nibbles(pairs);
      odd[v] = high_nibbles(pairs);
    }
    for (int r = 0; r < rows; r++) {
      const FourBytes *four = (const FourBytes *)(values + r * step + at);
      const Ints first = int_spread(four[0]), second = int_spread(four[1]);
      for (int v = 0; v < vectors; v++) {
        sums[0][v][r] = DOT(sums[0][v][r], even[v], first);
        sums[chains - 1][v][r] = DOT(sums[chains - 1][v][r], odd[v], second);
        for (int chain = 0; chain < chains; chain++) IN_REGISTER(sums[chain][v][r]);
      }
    }
  }
  for (int chain = 0; chain < chains; chain++)
    for (int v = 0; v < vectors; v++)
      for (int r = 0; r < rows; r++) products[v][r] = int_add(products[v][r], sums[chain][v][r]);
}
