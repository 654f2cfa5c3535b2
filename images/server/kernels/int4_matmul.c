/* Int4MatMul(A float [.., K], B uint8 [N, blocks, block / 2], scales float [N, blocks], zeros uint8 [N, blocks / 2
 * rounded up]) -> float [.., N]
 *
 * Attributes K, N, block_size, and zero_points: 1 where there are zeros, else all are 8. B, scales and zeros are constant
 * and as MatMulNBits has them with 4 bits.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"
#include "operators.h"

enum { PARTS = 32, INLINE_ROWS = 16, ROWS_OF_PART = 8, MOST_BLOCK = 1 << 16 /* whose products fit into 32 bits */ };

typedef struct {
  const Int4 *matrix;
  const float *x;
  float *y;
  Rounded rounded;
  int64_t rows, parts;
} Product;

static void round_part(void *data, size_t part) {
  const Product *p = data;
  const int64_t first = (int64_t)part * ROWS_OF_PART, left = p->rows - first;
  kernels->round(p->matrix, p->x, first, left < ROWS_OF_PART ? left : ROWS_OF_PART, p->rounded);
}

static void multiply_part(void *data, size_t part) {
  const Product *p = data;
  const int64_t groups = p->matrix->groups, pairs = (groups + 1) / 2, at = (int64_t)part;
  const int64_t first = pairs * at / p->parts * 2, end = pairs * (at + 1) / p->parts * 2;
  kernels->multiply(p->matrix, first, end < groups ? end : groups, p->rounded, p->rows, p->y);
}

static OrtStatus *multiply(void *kernel, OrtKernelContext *context) {
  const Int4 *matrix = kernel;
  Shape shape;
  Product p = {.matrix = matrix};
  TRY(input(context, 0, (const void **)&p.x, &shape));
  if (shape.count == 0 || shape.sizes[shape.count - 1] != matrix->k) return refused("Int4MatMul: A is not [.., K]");
  p.rows = elements(shape) / matrix->k;
  shape.sizes[shape.count - 1] = matrix->n;
  TRY(output(context, shape, &p.y));
  if (p.rows == 0) return NULL;
  void *scratch = thread_buffer(0, int4_rounded_bytes(matrix, p.rows));
  if (!scratch) return CreateStatus(ORT_FAIL, "Int4MatMul: no memory");
  p.rounded = int4_rounded(matrix, p.rows, scratch);
  const int64_t pairs = (matrix->groups + 1) / 2; /* of groups, which are multiplied together */
  p.parts = pairs < PARTS ? pairs : PARTS;
  if (p.rows < INLINE_ROWS)
    kernels->round(matrix, p.x, 0, p.rows, p.rounded);
  else
    TRY(KernelContext_ParallelFor(context, round_part, (size_t)((p.rows + ROWS_OF_PART - 1) / ROWS_OF_PART), 0, &p));
  return KernelContext_ParallelFor(context, multiply_part, (size_t)p.parts, 0, &p);
}

/* What was copied need not stay in memory: of a mapped file its pages are dropped, of anything else nothing happens. */
static void give_back(const void *data, size_t bytes) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t first = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + bytes) / page * page;
  if (first < end) madvise((void *)first, end - first, MADV_PAGEOUT);
}

static OrtStatus *constant(const OrtKernelInfo *info, size_t at, const void **data, Shape *shape) {
  int is_constant = 0;
  const OrtValue *value;
  TRY(KernelInfoGetConstantInput_tensor(info, at, &is_constant, &value));
  if (!is_constant) return refused("Int4MatMul: B, scales and zeros are to be constant");
  return tensor(value, data, shape);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *given, const OrtKernelInfo *info, void **kernel) {
  (void)op, (void)given;
  Int4 matrix = {0};
  const void *weights, *scales, *zeros = NULL;
  Shape of_weights, of_scales, of_zeros;
  int64_t has_zeros = 0;
  TRY(KernelInfoGetAttribute_int64(info, "K", &matrix.k));
  TRY(KernelInfoGetAttribute_int64(info, "N", &matrix.n));
  TRY(KernelInfoGetAttribute_int64(info, "block_size", &matrix.block));
  TRY(KernelInfoGetAttribute_int64(info, "zero_points", &has_zeros));
  if (matrix.k < 1 || matrix.n < 1 || matrix.block < 16 || matrix.block > MOST_BLOCK || matrix.block % 16)
    return refused("Int4MatMul: K, N or block_size");
  TRY(constant(info, 1, &weights, &of_weights));
  TRY(constant(info, 2, &scales, &of_scales));
  matrix.blocks = (matrix.k - 1) / matrix.block + 1;
  if (of_weights.count != 3 || of_weights.sizes[0] != matrix.n || of_weights.sizes[1] != matrix.blocks ||
      of_weights.sizes[2] != matrix.block / 2 || elements(of_scales) != matrix.n * matrix.blocks)
    return refused("Int4MatMul: B is not [N, blocks, block / 2], or scales are not [N * blocks]");
  if (has_zeros) TRY(constant(info, 3, &zeros, &of_zeros));
  if (has_zeros && elements(of_zeros) != matrix.n * ((matrix.blocks + 1) / 2))
    return refused("Int4MatMul: zeros are not [N, blocks / 2 rounded up]");
  Int4 *made = malloc(sizeof *made);
  if (!made || !int4_pack(&matrix, weights, scales, zeros)) {
    free(made);
    return CreateStatus(ORT_FAIL, "Int4MatMul: no memory");
  }
  give_back(weights, (size_t)(matrix.n * matrix.blocks * matrix.block / 2));
  give_back(scales, (size_t)(matrix.n * matrix.blocks) * sizeof(float));
  *made = matrix;
  *kernel = made;
  return NULL;
}

static void destroy(void *kernel) {
  int4_free(kernel);
  free(kernel);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Int4MatMul"; }
static int type(const OrtCustomOp *op, size_t at) { return (void)op, at == 1 || at == 3 ? ORT_UINT8 : ORT_FLOAT; }
static size_t inputs(const OrtCustomOp *op) { return (void)op, 4; }
static int optional(const OrtCustomOp *op, size_t at) { return (void)op, at == 3; }

const OrtCustomOp int4_matmul = {
    OP_COMMON,
    .GetName = name,
    .GetInputType = type,
    .GetInputTypeCount = inputs,
    .GetInputCharacteristic = optional,
    .CreateKernelV2 = create,
    .KernelComputeV2 = multiply,
    .KernelDestroy = destroy,
};
