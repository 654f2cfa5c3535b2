/* Vectors of 16 numbers, for the code that is written for any width. TARGET says what CPU it is compiled for. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "vector.h"

enum { WIDTH = 16, LANES = 16 };
typedef __m512 Floats;
typedef __m512i Ints;

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= WIDTH ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

/* What is summed up in a loop stays in a register and in order: else compilers may sum up at the end, for which there are
 * not enough of them, or keep copies in memory. */
#define IN_REGISTER(x) __asm__("" : "+v"(x))

INLINE Floats zeros(void) { return _mm512_setzero_ps(); }
INLINE Floats spread(float x) { return _mm512_set1_ps(x); }
INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
/* The first `count` numbers, which may be more than there are lanes or none; zeros for the others. */
INLINE Floats load_first(const float *from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
INLINE void store_first(float *to, Floats x, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats multiply_off(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); } /* b where one is a NaN */
INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
INLINE Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); } /* x 2^n, n whole and at least -126 */
/* Of 16 lanes, LANES / WIDTH vectors; in the same order for every width. */
INLINE float largest_lane(const Floats *x) {
  return fold_largest(_mm256_max_ps(_mm512_castps512_ps256(*x), _mm512_extractf32x8_ps(*x, 1)));
}
INLINE float all_lanes(const Floats *x) {
  return fold_sum(_mm256_add_ps(_mm512_castps512_ps256(*x), _mm512_extractf32x8_ps(*x, 1)));
}

INLINE Ints int_zeros(void) { return _mm512_setzero_si512(); }
INLINE Ints int_spread(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints load_bytes(const uint8_t *from) { return _mm512_load_si512(from); }
INLINE Ints int_add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints int_multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Ints int_eighth(Ints x) { return _mm512_srai_epi32(x, 3); }
INLINE Ints bytes_as_ints(const uint8_t *from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE Ints int_larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE int32_t int_largest_lane(Ints x) { return _mm512_reduce_max_epi32(x); }
INLINE int32_t int_all_lanes(Ints x) { return _mm512_reduce_add_epi32(x); }
INLINE Ints low_nibbles(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
/* The numbers' bits without the sign: as integers they are in the numbers' order, and a NaN is the largest. */
INLINE Ints magnitude(Floats x) { return _mm512_and_si512(_mm512_castps_si512(x), int_spread(0x7fffffff)); }
INLINE Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); } /* a NaN and what is too large: the least integer */
INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
/* Within eight the order 0 2 4 6 1 3 5 7. */
INLINE Ints evens_first(Ints x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15), x);
}
INLINE void store_as_bytes(int8_t *to, Ints x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(x)); }
