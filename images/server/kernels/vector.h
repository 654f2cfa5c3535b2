/* What vectors of all widths share. */
#pragma once
#include <immintrin.h>

/* Sum of eight numbers and the largest of them, in an order that is the same for all widths. */
INLINE float fold_sum(__m256 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float fold_largest(__m256 x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/* Four lines of the cache at once: as fast as one after the other or faster, by a third with one row of a product. */
INLINE void fetch(const void *from) {
  for (int line = 0; line < 4; line++) _mm_prefetch((const char *)from + 64 * line, _MM_HINT_T0);
}
