/* The same computations for each kind of CPU, bit for bit. */
#pragma once
#include "attention.h"
#include "int4.h"

typedef struct {
  /* Rows first .. first + rows - 1 of x[.., k] as int4_rounded() places them. */
  void (*round)(const Int4 *matrix, const float *x, int64_t first, int64_t rows, Rounded to);
  /* y[rows, n] of the columns of groups first .. end - 1. */
  void (*multiply)(const Int4 *matrix, int64_t first, int64_t end, Rounded x, int64_t rows, float *y);
  /* Put a token's key and value of one head, [size], into the cache, the key turned. */
  void (*keep)(const Heads *heads, Cache cache, Place at, int64_t kv_head, const float *key, const float *value,
               Tables tables);
  /* What a token sees through the queries that share the head `kv_head`; `queries`, not turned, and `out` are
   * [heads][size]. `scratch` has attention_scratch() floats. */
  void (*read)(const Heads *heads, Cache cache, Place at, int64_t kv_head, const float *queries, Tables tables,
               float *out, float *scratch);
} Kernels;

extern const Kernels avx512_kernels, avxvnni_kernels, avx2_kernels;
extern const Kernels *kernels; /* the best of this CPU; NULL where it has none of them */
