/* Products of float activations and 4-bit weights, of vectors of any width. */
#pragma once
#include "int4.h"

static TARGET void round_rows(const Int4 *m, const float *x, int64_t first, int64_t rows, Rounded to) {
  const float smallest = 1e-36f; /* of a block that is not taken for zeros: 127 / smallest is a number */
  for (int64_t row = first; row < first + rows; row++) {
    for (int64_t block = 0; block < m->blocks; block++) {
      const float *from = x + row * m->k + block * m->block;
      const int64_t size = m->k - block * m->block < m->block ? m->k - block * m->block : m->block;
      int8_t *values = to.values + (row * m->blocks + block) * m->block;
      Ints most = int_zeros(), sum = int_zeros();
      for (int64_t at = 0; at < size; at += WIDTH) most = int_larger(most, magnitude(load_first(from + at, size - at)));
      const union { int32_t bits; float number; } largest = {int_largest_lane(most)};
      const Floats inverse = spread(largest.number > smallest ? 127.0f / largest.number : 0.0f);
      for (int64_t at = 0; at < m->block; at += WIDTH) {
        const Floats scaled = multiply(load_first(from + at, size - at), inverse);
        const Ints whole = int_larger(to_ints(scaled), int_spread(-127)); /* also of what is no number */
        sum = int_add(sum, whole);
        store_as_bytes(values + at, evens_first(whole));
      }
      to.scales[row * m->blocks + block] = largest.number / 127.0f;
      to.zeros[row * m->blocks + block] = -8 * int_all_lanes(sum);
    }
  }
}

/* `rows` rows by one group of columns. */
INLINE void tile(const Int4 *m, int64_t group, Rounded x, int64_t row, const int rows, float *y) {
  const int64_t blocks = m->blocks, width = blocks * m->block, bytes = width / 2 * LANES, column = group * LANES;
  const uint8_t *weights = m->weights + group * bytes;
  const float *scales = m->scales + group * blocks * LANES;
  Floats sums[LANES / WIDTH][INT4_TILE];
  for (int part = 0; part < LANES / WIDTH; part++)
    for (int r = 0; r < rows; r++) sums[part][r] = zeros();
  for (int64_t block = 0; block < blocks; block++) {
    const int8_t *values = x.values + row * width + block * m->block;
    for (int part = 0; part < LANES / WIDTH; part++) {
      Ints products[INT4_TILE];
      for (int r = 0; r < rows; r++) products[r] = int_spread(x.zeros[(row + r) * blocks + block]);
      dots(products, weights + block * m->block / 2 * LANES + part * 4 * WIDTH, bytes, values, width, m->block, rows);
      const Floats scale = load(scales + block * LANES + part * WIDTH);
      for (int r = 0; r < rows; r++) {
        const Floats both = multiply(scale, spread(x.scales[(row + r) * blocks + block]));
        sums[part][r] = multiply_add(to_floats(products[r]), both, sums[part][r]);
      }
    }
  }
  for (int part = 0; part < LANES / WIDTH; part++) {
    const int64_t at = column + part * WIDTH;
    for (int r = 0; r < rows; r++) store_first(y + (row + r) * m->n + at, sums[part][r], m->n - at);
  }
}

static TARGET void multiply_rows(const Int4 *m, int64_t first, int64_t end, Rounded x, int64_t rows, float *y) {
  for (int64_t from = 0; from < rows; from += ROW_BLOCK) {
    const int64_t to = rows - from < ROW_BLOCK ? rows : from + ROW_BLOCK;
    for (int64_t group = first; group < end; group++) {
      int64_t row = from;
      for (; row + INT4_TILE <= to; row += INT4_TILE) tile(m, group, x, row, INT4_TILE, y);
#define CASE(n) \
  case n: tile(m, group, x, row, n < INT4_TILE ? n : 1, y); break;
      switch (to - row) {
        CASE(7) CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
      }
#undef CASE
    }
  }
}
