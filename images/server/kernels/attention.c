#include "attention.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX512
enum { LANES = 16, MOST_QUERIES = 7, MOST_PARTS = 4, MOST_SIZE = ATTENTION_MOST_SIZE };

int attention_usable(void) { return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }

INLINE void turn(const Heads *h, int64_t position, const float *from, Tables tables, float *to) {
  const int64_t half = h->rotated / 2;
  const float *cosines = tables.cosines + position * half, *sines = tables.sines + position * half;
  for (int64_t at = 0; at < half; at++) {
    const float first = from[at], second = from[at + half];
    to[at] = first * cosines[at] - second * sines[at];
    to[at + half] = second * cosines[at] + first * sines[at];
  }
  memcpy(to + h->rotated, from + h->rotated, (size_t)(h->size - h->rotated) * sizeof(float));
}

AVX512 void attention_keep(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *key, const float *value,
                           Tables tables) {
  float turned[MOST_SIZE];
  turn(h, at.position, key, tables, turned);
  const int64_t begin = (at.slot * h->kv_heads + kv_head) * cache.length * h->size;
  float *keys = cache.keys + begin + at.position / LANES * LANES * h->size + at.position % LANES;
  for (int64_t d = 0; d < h->size; d++) keys[d * LANES] = turned[d];
  memcpy(cache.values + begin + at.position * h->size, value, (size_t)h->size * sizeof(float));
}

size_t attention_scratch(const Heads *h, Cache cache) {
  return (size_t)(MOST_QUERIES * cache.length + h->heads / h->kv_heads * h->size);
}

/* e to the x for x at most 0; by Cody and Waite's reduction and a polynomial of degree 6 (Cephes, expf). */
INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* in this order a NaN stays one */
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(_mm512_mul_ps(x, x), y, _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

/* Scores of `count` queries and two blocks of 16 positions; the second one may be past the end, where nobody looks. */
INLINE void scores(const float *keys, int64_t size, const float *queries, const int count, __m512 scale, float *to,
                   int64_t stride, const int blocks) {
  __m512 sums[2 * MOST_QUERIES];
  for (int q = 0; q < blocks * count; q++) sums[q] = _mm512_setzero_ps();
  for (int64_t d = 0; d < size; d++) {
    const __m512 first = _mm512_loadu_ps(keys + d * LANES);
    const __m512 second = blocks > 1 ? _mm512_loadu_ps(keys + (size + d) * LANES) : first;
    for (int q = 0; q < count; q++) {
      const __m512 query = _mm512_set1_ps(queries[q * size + d]);
      sums[q] = _mm512_fmadd_ps(query, first, sums[q]);
      if (blocks > 1) sums[count + q] = _mm512_fmadd_ps(query, second, sums[count + q]);
    }
  }
  for (int q = 0; q < count; q++) {
    _mm512_storeu_ps(to + q * stride, _mm512_mul_ps(sums[q], scale));
    if (blocks > 1) _mm512_storeu_ps(to + q * stride + LANES, _mm512_mul_ps(sums[count + q], scale));
  }
}

/* Scores become weights, those outside first .. last become 0; the sum of the weights. */
INLINE float weights(float *of, int64_t begin, int64_t first, int64_t last) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t at = begin; at <= last; at += LANES) {
    const __m512i position = _mm512_add_epi32(_mm512_set1_epi32((int)at), lane);
    const __mmask16 seen = _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32((int)first)) &
                           _mm512_cmple_epi32_mask(position, _mm512_set1_epi32((int)last));
    most = _mm512_mask_max_ps(most, seen, most, _mm512_loadu_ps(of + at - begin));
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t at = begin; at <= last; at += LANES) {
    const __m512i position = _mm512_add_epi32(_mm512_set1_epi32((int)at), lane);
    const __mmask16 seen = _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32((int)first)) &
                           _mm512_cmple_epi32_mask(position, _mm512_set1_epi32((int)last));
    const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(_mm512_loadu_ps(of + at - begin), top)));
    _mm512_storeu_ps(of + at - begin, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

/* out[q] = sum of weights[q][position] x values[position], for `parts` times 16 numbers of the head. */
INLINE void mixed(const float *values, int64_t size, const float *of, int64_t stride, int64_t positions, const int count,
                  const int parts, const float *sums, float *out) {
  __m512 all[MOST_QUERIES * MOST_PARTS];
  for (int at = 0; at < count * parts; at++) all[at] = _mm512_setzero_ps();
  for (int64_t position = 0; position < positions; position++) {
    __m512 value[MOST_PARTS];
    for (int p = 0; p < parts; p++) value[p] = _mm512_loadu_ps(values + position * size + p * LANES);
    for (int q = 0; q < count; q++) {
      const __m512 weight = _mm512_set1_ps(of[q * stride + position]);
      for (int p = 0; p < parts; p++) all[q * parts + p] = _mm512_fmadd_ps(weight, value[p], all[q * parts + p]);
    }
  }
  for (int q = 0; q < count; q++) {
    const __m512 share = _mm512_set1_ps(1.0f / sums[q]);
    for (int p = 0; p < parts; p++) _mm512_storeu_ps(out + q * size + p * LANES, _mm512_mul_ps(all[q * parts + p], share));
  }
}

INLINE void read_queries(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *queries, const int count,
                         float *out, float *scratch) {
  const int64_t begin = (at.slot * h->kv_heads + kv_head) * cache.length * h->size;
  const int64_t first = h->window > 0 && at.position >= h->window ? at.position - h->window + 1 : 0;
  const int64_t from = first / LANES * LANES, stride = cache.length;
  const __m512 scale = _mm512_set1_ps(h->scale);
  float sums[MOST_QUERIES];
  int64_t block = from;
  for (; block + LANES <= at.position; block += 2 * LANES)
    scores(cache.keys + begin + block * h->size, h->size, queries, count, scale, scratch + block - from, stride, 2);
  if (block <= at.position)
    scores(cache.keys + begin + block * h->size, h->size, queries, count, scale, scratch + block - from, stride, 1);
  for (int q = 0; q < count; q++) sums[q] = weights(scratch + q * stride, from, first, at.position);
  const float *values = cache.values + begin + first * h->size;
  const float *weighing = scratch + first - from;
  const int64_t positions = at.position - first + 1;
  int64_t d = 0;
  for (; d + 4 * LANES <= h->size; d += 4 * LANES)
    mixed(values + d, h->size, weighing, stride, positions, count, 4, sums, out + d);
  if (d + 2 * LANES <= h->size) {
    mixed(values + d, h->size, weighing, stride, positions, count, 2, sums, out + d);
    d += 2 * LANES;
  }
  if (d < h->size) mixed(values + d, h->size, weighing, stride, positions, count, 1, sums, out + d);
}

AVX512 void attention_read(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *queries, Tables tables,
                           float *out, float *scratch) {
  const int64_t shared = h->heads / h->kv_heads, size = h->size;
  float *turned = scratch + MOST_QUERIES * cache.length;
  queries += kv_head * shared * size;
  out += kv_head * shared * size;
  for (int64_t head = 0; head < shared; head++)
    turn(h, at.position, queries + head * size, tables, turned + head * size);
  int64_t head = 0;
  for (; head + 7 <= shared; head += 7)
    read_queries(h, cache, at, kv_head, turned + head * size, 7, out + head * size, scratch);
  for (; head + 4 <= shared; head += 4)
    read_queries(h, cache, at, kv_head, turned + head * size, 4, out + head * size, scratch);
  for (; head + 2 <= shared; head += 2)
    read_queries(h, cache, at, kv_head, turned + head * size, 2, out + head * size, scratch);
  if (head < shared) read_queries(h, cache, at, kv_head, turned + head * size, 1, out + head * size, scratch);
}
