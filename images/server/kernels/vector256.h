/* Vectors of 8 numbers: the same names as in vector512.h, where they are explained. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "vector.h"

enum { WIDTH = 8, LANES = 16 };
typedef __m256 Floats;
typedef __m256i Ints;

INLINE Ints first_lanes(int64_t count) {
  const int32_t most = count >= WIDTH ? WIDTH : count > 0 ? (int32_t)count : 0;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(most), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

#define IN_REGISTER(x) __asm__("" : "+x"(x))

INLINE Floats zeros(void) { return _mm256_setzero_ps(); }
INLINE Floats spread(float x) { return _mm256_set1_ps(x); }
INLINE Floats load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
INLINE Floats load_first(const float *from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
INLINE void store_first(float *to, Floats x, int64_t count) { _mm256_maskstore_ps(to, first_lanes(count), x); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats multiply_off(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power(Floats x, Floats n) {
  const Ints exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
INLINE float largest_lane(const Floats *x) { return fold_largest(_mm256_max_ps(x[0], x[1])); }
INLINE float all_lanes(const Floats *x) { return fold_sum(_mm256_add_ps(x[0], x[1])); }

INLINE Ints int_zeros(void) { return _mm256_setzero_si256(); }
INLINE Ints int_spread(int32_t x) { return _mm256_set1_epi32(x); }
INLINE Ints load_bytes(const uint8_t *from) { return _mm256_load_si256((const __m256i *)from); }
INLINE Ints int_add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints int_multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
INLINE Ints int_eighth(Ints x) { return _mm256_srai_epi32(x, 3); }
INLINE Ints bytes_as_ints(const uint8_t *from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
INLINE Ints int_larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
INLINE int32_t int_largest_lane(Ints x) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 1)));
}
INLINE int32_t int_all_lanes(Ints x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
}
INLINE Ints low_nibbles(Ints x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
INLINE Ints magnitude(Floats x) { return _mm256_and_si256(_mm256_castps_si256(x), int_spread(0x7fffffff)); }
INLINE Ints to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
INLINE Ints evens_first(Ints x) {
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
INLINE void store_as_bytes(int8_t *to, Ints x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(words, words));
}
