/* Attention of tokens of any number of sequences over their cached keys and values, for CPUs with AVX-512.
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

enum { ATTENTION_MOST_SIZE = 512 };

int attention_usable(void);
/* Put a token's key and value of one head, [size], into the cache, the key turned. */
void attention_keep(const Heads *heads, Cache cache, Place at, int64_t kv_head, const float *key, const float *value,
                    Tables tables);
/* Floats that attention_read needs beside. */
size_t attention_scratch(const Heads *heads, Cache cache);
/* What a token sees through the queries that share the head `kv_head`; `queries`, not turned, and `out` are
 * [heads][size]. */
void attention_read(const Heads *heads, Cache cache, Place at, int64_t kv_head, const float *queries, Tables tables,
                    float *out, float *scratch);
