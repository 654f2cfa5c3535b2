/* Attention of one token, of vectors of any width. */
#pragma once
#include <math.h>
#include <string.h>

#include "attention.h"

INLINE void turn(const Heads *h, int64_t position, const float *from, Tables tables, float *to) {
  const int64_t half = h->rotated / 2;
  const float *cosines = tables.cosines + position * half, *sines = tables.sines + position * half;
  for (int64_t at = 0; at < half; at++) { /* what is fused is said, else a compiler chooses */
    const float first = from[at], second = from[at + half];
    to[at] = __builtin_fmaf(first, cosines[at], -(second * sines[at]));
    to[at + half] = __builtin_fmaf(second, cosines[at], first * sines[at]);
  }
  memcpy(to + h->rotated, from + h->rotated, (size_t)(h->size - h->rotated) * sizeof(float));
}

static TARGET void keep_token(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *key,
                              const float *value, Tables tables) {
  float turned[ATTENTION_MOST_SIZE];
  turn(h, at.position, key, tables, turned);
  const int64_t begin = (at.slot * h->kv_heads + kv_head) * cache.length * h->size;
  float *keys = cache.keys + begin + at.position / LANES * LANES * h->size + at.position % LANES;
  for (int64_t d = 0; d < h->size; d++) keys[d * LANES] = turned[d];
  memcpy(cache.values + begin + at.position * h->size, value, (size_t)h->size * sizeof(float));
}

/* e to the x for x at most 0; by Cody and Waite's reduction and a polynomial of degree 6 (Cephes, expf). */
INLINE Floats exponential(Floats x) {
  x = larger(spread(-87.0f), x); /* in this order a NaN stays one */
  const Floats n = nearest(multiply(x, spread(1.44269504f)));
  x = multiply_off(n, spread(0.693359375f), x);
  x = multiply_off(n, spread(-2.12194440e-4f), x);
  Floats y = spread(1.9875691500e-4f);
  y = multiply_add(y, x, spread(1.3981999507e-3f));
  y = multiply_add(y, x, spread(8.3334519073e-3f));
  y = multiply_add(y, x, spread(4.1665795894e-2f));
  y = multiply_add(y, x, spread(1.6666665459e-1f));
  y = multiply_add(y, x, spread(5.0000001201e-1f));
  y = multiply_add(multiply(x, x), y, add(x, spread(1.0f)));
  return times_power(y, n);
}

/* Scores of `count` queries and `vectors` times WIDTH positions. As much as their keys take is fetched from `ahead`. */
INLINE void scores(const float *keys, const float *ahead, int64_t size, const float *queries, const int count,
                   Floats scale, float *to, int64_t stride, const int vectors) {
  Floats sums[SCORE_VECTORS][QUERIES];
  for (int v = 0; v < vectors; v++)
    for (int q = 0; q < count; q++) sums[v][q] = zeros();
  for (int64_t d = 0; d < size; d++) {
    Floats key[SCORE_VECTORS];
    for (int block = 0; block < vectors * WIDTH / LANES; block++)
      _mm_prefetch((const char *)(ahead + (block * size + d) * LANES), _MM_HINT_T0);
    for (int v = 0; v < vectors; v++) key[v] = load(keys + (v * WIDTH / LANES * size + d) * LANES + v * WIDTH % LANES);
    for (int q = 0; q < count; q++) {
      const Floats query = spread(queries[q * size + d]);
      for (int v = 0; v < vectors; v++) sums[v][q] = multiply_add(query, key[v], sums[v][q]);
    }
  }
  for (int q = 0; q < count; q++)
    for (int v = 0; v < vectors; v++) store(to + q * stride + v * WIDTH, multiply(sums[v][q], scale));
}

/* The scores first .. last - 1 of whole vectors become weights; the sum of these. */
INLINE float weights(float *of, int64_t first, int64_t last) {
  enum { VECTORS = LANES / WIDTH };
  const int64_t end = (last + LANES - 1) / LANES * LANES;
  Floats most[VECTORS], sums[VECTORS];
  for (int64_t at = 0; at < first; at++) of[at] = -INFINITY;
  for (int64_t at = last; at < end; at++) of[at] = -INFINITY;
  for (int v = 0; v < VECTORS; v++) {
    most[v] = spread(-INFINITY);
    sums[v] = zeros();
  }
  for (int64_t at = 0; at < end; at += LANES)
    for (int v = 0; v < VECTORS; v++) most[v] = larger(most[v], load(of + at + v * WIDTH));
  const Floats top = spread(largest_lane(most));
  for (int64_t at = 0; at < end; at += LANES) {
    for (int v = 0; v < VECTORS; v++) {
      const Floats weight = exponential(subtract(load(of + at + v * WIDTH), top));
      store(of + at + v * WIDTH, weight);
      sums[v] = add(sums[v], weight);
    }
  }
  return all_lanes(sums);
}

/* out[q] = sum of weights[q][position] x values[position], for `parts` vectors of the head. */
INLINE void mixed(const float *values, int64_t size, const float *of, int64_t stride, int64_t positions, const int count,
                  const int parts, const float *sums, float *out) {
  Floats all[QUERIES][VALUE_VECTORS];
  for (int q = 0; q < count; q++)
    for (int p = 0; p < parts; p++) all[q][p] = zeros();
  for (int64_t position = 0; position < positions; position++) {
    Floats value[VALUE_VECTORS];
    const int64_t later = position + ATTENTION_AHEAD;
    const float *ahead = values + (later < positions ? later : positions - 1) * size;
    for (int p = 0; p < parts; p += LANES / WIDTH) _mm_prefetch((const char *)(ahead + p * WIDTH), _MM_HINT_T0);
    for (int p = 0; p < parts; p++) value[p] = load(values + position * size + p * WIDTH);
    for (int q = 0; q < count; q++) {
      const Floats weight = spread(of[q * stride + position]);
      for (int p = 0; p < parts; p++) all[q][p] = multiply_add(weight, value[p], all[q][p]);
    }
  }
  for (int q = 0; q < count; q++) {
    const Floats share = spread(1.0f / sums[q]);
    for (int p = 0; p < parts; p++) store(out + q * size + p * WIDTH, multiply(all[q][p], share));
  }
}

INLINE void read_queries(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *queries, const int count,
                         float *out, float *scratch) {
  const int64_t begin = (at.slot * h->kv_heads + kv_head) * cache.length * h->size;
  const int64_t first = h->window > 0 && at.position >= h->window ? at.position - h->window + 1 : 0;
  const int64_t from = first / LANES * LANES, end = at.position / LANES * LANES + LANES, stride = cache.length;
  const Floats scale = spread(h->scale);
  float sums[QUERIES];
  const float *keys = cache.keys + begin, *values = cache.values + begin;
  int64_t block = from;
  while (block < end) {
    const int64_t later = block + ATTENTION_AHEAD;
    const float *of = keys + block * h->size;
    const float *ahead = later < end ? keys + later * h->size : values + (from + later - end) * h->size;
    if (block + SCORE_VECTORS * WIDTH <= end) {
      scores(of, ahead, h->size, queries, count, scale, scratch + block - from, stride, SCORE_VECTORS);
      block += SCORE_VECTORS * WIDTH;
    } else {
      scores(of, ahead, h->size, queries, count, scale, scratch + block - from, stride, LANES / WIDTH);
      block += LANES;
    }
  }
  for (int q = 0; q < count; q++)
    sums[q] = weights(scratch + q * stride, first - from, at.position + 1 - from);
  const float *weighing = scratch + first - from;
  const int64_t positions = at.position + 1 - first;
  values += first * h->size;
  int64_t d = 0;
  for (; d + VALUE_VECTORS * WIDTH <= h->size; d += VALUE_VECTORS * WIDTH)
    mixed(values + d, h->size, weighing, stride, positions, count, VALUE_VECTORS, sums, out + d);
  for (; VALUE_VECTORS > 2 && d + 2 * WIDTH <= h->size; d += 2 * WIDTH)
    mixed(values + d, h->size, weighing, stride, positions, count, 2, sums, out + d);
  for (; d < h->size; d += WIDTH)
    mixed(values + d, h->size, weighing, stride, positions, count, 1, sums, out + d);
}

static TARGET void read_token(const Heads *h, Cache cache, Place at, int64_t kv_head, const float *queries,
                              Tables tables, float *out, float *scratch) {
  const int64_t shared = h->heads / h->kv_heads, size = h->size;
  float *turned = scratch + ATTENTION_QUERIES * cache.length;
  queries += kv_head * shared * size;
  out += kv_head * shared * size;
  for (int64_t head = 0; head < shared; head++)
    turn(h, at.position, queries + head * size, tables, turned + head * size);
  for (int64_t head = 0; head < shared;) { /* in parts of about the same size */
    const int64_t left = shared - head, parts = (left + QUERIES - 1) / QUERIES, count = (left + parts - 1) / parts;
    const float *of = turned + head * size;
    float *to = out + head * size;
#define CASE(n) \
  case n: \
    if (n <= QUERIES) read_queries(h, cache, at, kv_head, of, n, to, scratch); \
    break;
    switch (count) {
      CASE(7) CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
    }
#undef CASE
    head += count;
  }
}
