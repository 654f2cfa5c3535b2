/* Attention of tokens of any number of sequences over their cached keys and values.
 *
 * A token's result is computed by the same operations in the same order whatever else a call holds, so it is bit for bit
 * what it is alone, however a prompt is cut.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct {
  int64_t heads, kv_heads, size; /* of queries, of keys and values, of one head: a multiple of 16 */
  int64_t rotated;               /* the first numbers of a head, which are turned by their position; even, 0: none */
  int64_t window;                /* tokens that one sees, itself among them; 0: all before it */
  float scale;
} Heads;

/* Where a layer keeps them: [slots][kv_heads][length / 16][size][16] keys, [slots][kv_heads][length][size] values. */
typedef struct {
  float *keys, *values;
  int64_t length; /* of a slot, a multiple of 16 */
} Cache;

/* One token of a call, and the tables of its layer: [positions][rotated / 2]. */
typedef struct {
  int64_t slot, position;
} Place;
typedef struct {
  const float *cosines, *sines;
} Tables;

enum {
  ATTENTION_MOST_SIZE = 512,
  ATTENTION_QUERIES = 7, /* most that are computed together */
  ATTENTION_AHEAD = 64,  /* positions whose keys and values are fetched beforehand */
};

/* Floats that a token's reading needs beside. */
static inline size_t attention_scratch(const Heads *heads, Cache cache) {
  return (size_t)(ATTENTION_QUERIES * cache.length + heads->heads / heads->kv_heads * heads->size);
}
