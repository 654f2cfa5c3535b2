#include "int4.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) VNNI
enum { ALIGNED = 64, TILE = 8 };
static const float SMALLEST = 1e-36f; /* of a block that is not taken for zeros: 127 / SMALLEST is a number */
typedef int32_t __attribute__((may_alias)) Four; /* four values of a row */

int int4_usable(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

static size_t aligned(size_t bytes) { return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED; }

int int4_pack(Int4 *m, const uint8_t *weights, const float *scales) {
  m->groups = (m->n + LANES - 1) / LANES;
  const int64_t bytes = m->blocks * m->block / 2; /* of a column */
  m->weights = aligned_alloc(ALIGNED, aligned((size_t)(m->groups * LANES * bytes)));
  m->scales = aligned_alloc(ALIGNED, aligned((size_t)(m->groups * LANES * m->blocks) * sizeof(float)));
  if (!m->weights || !m->scales) {
    int4_free(m);
    return 0;
  }
  for (int64_t column = 0; column < m->groups * LANES; column++) {
    const int64_t group = column / LANES, lane = column % LANES;
    uint8_t *to = m->weights + group * LANES * bytes + lane * 4;
    float *scale = m->scales + group * LANES * m->blocks + lane;
    if (column >= m->n) {
      for (int64_t at = 0; at < bytes; at += 4) memset(to + at * LANES, 0, 4);
      for (int64_t block = 0; block < m->blocks; block++) scale[block * LANES] = 0;
      continue;
    }
    for (int64_t at = 0; at < bytes; at += 4) memcpy(to + at * LANES, weights + column * bytes + at, 4);
    for (int64_t block = 0; block < m->blocks; block++) scale[block * LANES] = scales[column * m->blocks + block];
  }
  return 1;
}

void int4_free(Int4 *m) {
  free(m->weights);
  free(m->scales);
  m->weights = NULL;
  m->scales = NULL;
}

size_t int4_rounded_bytes(const Int4 *m, int64_t rows) {
  const size_t all = (size_t)(rows * m->blocks);
  return aligned(all * (size_t)m->block) + 2 * aligned(all * 4);
}

Rounded int4_rounded(const Int4 *m, int64_t rows, void *buffer) {
  const size_t all = (size_t)(rows * m->blocks), values = aligned(all * (size_t)m->block);
  char *at = buffer;
  return (Rounded){(int8_t *)at, (float *)(at + values), (int32_t *)(at + values + aligned(all * 4))};
}

VNNI void int4_round(const Int4 *m, const float *x, int64_t first, int64_t rows, Rounded to) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m512i positive = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32(-127);
  for (int64_t row = first; row < first + rows; row++) {
    for (int64_t block = 0; block < m->blocks; block++) {
      const float *from = x + row * m->k + block * m->block;
      const int64_t size = m->k - block * m->block < m->block ? m->k - block * m->block : m->block;
      __m512i most = _mm512_setzero_si512(); /* compared as integers, so that a NaN is the largest */
      for (int64_t at = 0; at < size; at += LANES) {
        const __mmask16 within = size - at < LANES ? (__mmask16)((1u << (size - at)) - 1) : 0xffff;
        const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(within, from + at));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, positive));
      }
      const float largest = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most))));
      const __m512 inverse = _mm512_set1_ps(largest > SMALLEST ? 127.0f / largest : 0.0f);
      int8_t *values = to.values + (row * m->blocks + block) * m->block;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t at = 0; at < m->block; at += LANES) {
        const int64_t left = size - at;
        const __mmask16 within = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        const __m512 part = _mm512_mul_ps(_mm512_maskz_loadu_ps(within, from + at), inverse);
        const __m512i ordered = _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32(part));
        const __m512i whole = _mm512_max_epi32(ordered, least); /* NaN and infinity are the least integer */
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128((__m128i *)(values + at), _mm512_cvtsepi32_epi8(whole));
      }
      to.scales[row * m->blocks + block] = largest / 127.0f;
      to.zeros[row * m->blocks + block] = -8 * _mm512_reduce_add_epi32(sum);
    }
  }
}

/* `rows` rows by one group of columns. What the next group needs is fetched meanwhile. */
INLINE void tile(const Int4 *m, int64_t group, Rounded x, int64_t row, const int rows, float *y) {
  const int64_t blocks = m->blocks, width = blocks * m->block, ahead = width / 8 * 64;
  const uint8_t *w = m->weights + group * ahead;
  const float *scales = m->scales + group * blocks * LANES;
  const int8_t *values = x.values + row * width;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[TILE];
  for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block++) {
    __m512i products[TILE], more[TILE];
    for (int r = 0; r < rows; r++) {
      products[r] = _mm512_set1_epi32(x.zeros[(row + r) * blocks + block]);
      more[r] = _mm512_setzero_si512();
    }
    for (int64_t at = 0; at < m->block; at += 8, w += 64) {
      _mm_prefetch((const char *)w + ahead, _MM_HINT_T0);
      const __m512i pairs = _mm512_load_si512(w);
      const __m512i even = _mm512_and_si512(pairs, low), odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
      const int8_t *from = values + block * m->block + at;
      for (int r = 0; r < rows; r++) {
        const Four *four = (const Four *)(from + r * width);
        products[r] = _mm512_dpbusd_epi32(products[r], even, _mm512_set1_epi32(four[0]));
        more[r] = _mm512_dpbusd_epi32(more[r], odd, _mm512_set1_epi32(four[1]));
      }
    }
    const __m512 scale = _mm512_load_ps(scales + block * LANES);
    for (int r = 0; r < rows; r++) {
      const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(products[r], more[r]));
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[(row + r) * blocks + block]));
      sums[r] = _mm512_fmadd_ps(product, both, sums[r]);
    }
  }
  const int64_t column = group * LANES, left = m->n - column;
  const __mmask16 within = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
  for (int r = 0; r < rows; r++) _mm512_mask_storeu_ps(y + (row + r) * m->n + column, within, sums[r]);
}

VNNI void int4_multiply(const Int4 *m, int64_t first, int64_t end, Rounded x, int64_t rows, float *y) {
  for (int64_t from = 0; from < rows; from += ROW_BLOCK) {
    const int64_t to = rows - from < ROW_BLOCK ? rows : from + ROW_BLOCK;
    for (int64_t group = first; group < end; group++) {
      int64_t row = from;
      for (; row + 8 <= to; row += 8) tile(m, group, x, row, 8, y);
      switch (to - row) {
        case 7: tile(m, group, x, row, 7, y); break;
        case 6: tile(m, group, x, row, 6, y); break;
        case 5: tile(m, group, x, row, 5, y); break;
        case 4: tile(m, group, x, row, 4, y); break;
        case 3: tile(m, group, x, row, 3, y); break;
        case 2: tile(m, group, x, row, 2, y); break;
        case 1: tile(m, group, x, row, 1, y); break;
        default: break;
      }
    }
  }
}
