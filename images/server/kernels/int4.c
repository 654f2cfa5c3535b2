#include "int4.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNED = 64, LANES = INT4_GROUP };

static size_t aligned(size_t bytes) { return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED; }

int int4_pack(Int4 *m, const uint8_t *weights, const float *scales, const uint8_t *zeros) {
  m->groups = (m->n + LANES - 1) / LANES;
  const int64_t bytes = m->blocks * m->block / 2; /* of a column */
  m->weights = aligned_alloc(ALIGNED, aligned((size_t)(m->groups * LANES * bytes)));
  m->scales = aligned_alloc(ALIGNED, aligned((size_t)(m->groups * LANES * m->blocks) * sizeof(float)));
  m->zeros = zeros ? calloc((size_t)(m->groups * LANES), (size_t)m->blocks) : NULL;
  if (!m->weights || !m->scales || (zeros && !m->zeros)) {
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
    for (int64_t block = 0; zeros && block < m->blocks; block++) {
      const uint8_t two = zeros[column * ((m->blocks + 1) / 2) + block / 2];
      m->zeros[(group * m->blocks + block) * LANES + lane] = block % 2 ? two >> 4 : two & 15;
    }
  }
  return 1;
}

void int4_free(Int4 *m) {
  free(m->weights);
  free(m->scales);
  free(m->zeros);
  m->weights = m->zeros = NULL;
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
