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

/* `rows` rows by the columns of `vectors` vectors. */
INLINE void tile(const Int4 *m, int64_t group, Rounded x, int64_t row, const int rows, const int vectors, float *y) {
  const int64_t blocks = m->blocks, width = blocks * m->block, apart = width / 2 * LANES;
  const uint8_t *weights = m->weights + group * apart;
  const float *scales = m->scales + group * blocks * LANES;
  Floats sums[INT4_VECTORS][INT4_TILE];
  for (int v = 0; v < vectors; v++)
    for (int r = 0; r < rows; r++) sums[v][r] = zeros();
  for (int64_t block = 0; block < blocks; block++) {
    Ints products[INT4_VECTORS][INT4_TILE];
    for (int v = 0; v < vectors; v++)
      for (int r = 0; r < rows; r++) products[v][r] = int_spread(x.zeros[(row + r) * blocks + block]);
    for (int v = 0; m->zeros && v < vectors; v++) {
      const int64_t at = ((group + v * WIDTH / LANES) * blocks + block) * LANES + v * WIDTH % LANES;
      const Ints zero = bytes_as_ints(m->zeros + at);
      for (int r = 0; r < rows; r++) products[v][r] = int_eighth(int_multiply(products[v][r], zero));
    }
    dots(products, weights + block * m->block / 2 * LANES, apart, x.values + row * width + block * m->block, width,
         m->block, rows, vectors);
    for (int v = 0; v < vectors; v++) {
      const float *from = scales + (v * WIDTH / LANES * blocks + block) * LANES + v * WIDTH % LANES;
      if (v * WIDTH % LANES == 0) _mm_prefetch((const char *)from + INT4_AHEAD * 8 / m->block, _MM_HINT_T0);
      const Floats scale = load(from);
      for (int r = 0; r < rows; r++) {
        const Floats both = multiply(scale, spread(x.scales[(row + r) * blocks + block]));
        sums[v][r] = multiply_add(to_floats(products[v][r]), both, sums[v][r]);
      }
    }
  }
  for (int v = 0; v < vectors; v++) {
    const int64_t column = group * LANES + v * WIDTH;
    for (int r = 0; r < rows; r++) store_first(y + (row + r) * m->n + column, sums[v][r], m->n - column);
  }
}

INLINE void tiles(const Int4 *m, int64_t group, Rounded x, int64_t from, int64_t to, const int vectors, float *y) {
  int64_t row = from;
  for (; row + INT4_TILE <= to; row += INT4_TILE) tile(m, group, x, row, INT4_TILE, vectors, y);
#define CASE(n) \
  case n: \
    if (n < INT4_TILE) tile(m, group, x, row, n, vectors, y); \
    break;
  switch (to - row) {
    CASE(7) CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
  }
#undef CASE
}

static TARGET void multiply_rows(const Int4 *m, int64_t first, int64_t end, Rounded x, int64_t rows, float *y) {
  enum { GROUPS = INT4_VECTORS * WIDTH / LANES }; /* at once, so that values of many rows are loaded less often */
  for (int64_t from = 0; from < rows; from += INT4_ROWS) {
    const int64_t to = rows - from < INT4_ROWS ? rows : from + INT4_ROWS;
    int64_t group = first;
    if (GROUPS > 1 && to - from == INT4_ROWS)
      for (; group + GROUPS <= end; group += GROUPS) tiles(m, group, x, from, to, INT4_VECTORS, y);
    for (; group < end; group++) tiles(m, group, x, from, to, LANES / WIDTH, y);
  }
}
