/* Products of float activations and 4-bit weights.
 *
 * A number of the result is computed by the same operations in the same order however many rows a call has, so a row is
 * bit for bit what it is alone. Activations are rounded to 8 bits, with a scale for each row and block, as in
 * onnxruntime's MatMulNBits with accuracy level 4.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct {
  int64_t k, n, block; /* y[m, n] = x[m, k] w[k, n]; weights of a column share a scale for each `block` of k */
  int64_t blocks;      /* of a column */
  int64_t groups;      /* of INT4_GROUP columns, the last one filled up with zeros */
  uint8_t *weights;    /* [groups][blocks][block / 8][INT4_GROUP][4]: low nibbles are k 0, 2, 4, 6 of eight, high ones 1, 3, 5, 7 */
  float *scales;       /* [groups][blocks][INT4_GROUP] */
  uint8_t *zeros;      /* [groups][blocks][INT4_GROUP]: zero points; NULL: all are 8 */
} Int4;

/* Rows as the product takes them. */
typedef struct {
  int8_t *values; /* [rows][blocks * block], within eight in the order 0 2 4 6 1 3 5 7 */
  float *scales;  /* [rows][blocks] */
  int32_t *zeros; /* [rows][blocks]: what a zero point of 8 adds to each product, negated */
} Rounded;

enum {
  INT4_GROUP = 16,
  INT4_ROWS = 32,     /* that are multiplied by all columns before others are, because they fit in the cache */
  INT4_AHEAD = 16384, /* bytes of weights that are fetched beforehand */
};
typedef int32_t __attribute__((may_alias)) FourBytes; /* of a rounded row */

/* Fill the matrix, whose sizes are set, from `weights` [n][blocks][block / 2], `scales` [n][blocks] and `zeros`
 * [n][blocks / 2, rounded up], or NULL, as MatMulNBits has them. 0 when there is no memory. */
int int4_pack(Int4 *matrix, const uint8_t *weights, const float *scales, const uint8_t *zeros);
void int4_free(Int4 *matrix);
/* Bytes that `rows` rows need when rounded, and pointers into such a buffer, which begins at a multiple of 64. */
size_t int4_rounded_bytes(const Int4 *matrix, int64_t rows);
Rounded int4_rounded(const Int4 *matrix, int64_t rows, void *buffer);
