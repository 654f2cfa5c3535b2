/* What the operators share. */
#pragma once
#include "ort_abi.h"

#define TRY(call)                  \
  do {                             \
    OrtStatus *failed_ = (call);   \
    if (failed_) return failed_;   \
  } while (0)

enum { MOST_DIMENSIONS = 8 };
typedef struct {
  int64_t sizes[MOST_DIMENSIONS];
  size_t count;
} Shape;

extern const OrtApi *api;
extern const OrtCustomOp int4_matmul, row_attention;

/* A buffer of the calling thread, which keeps it for later calls of the same `use`, 0 or 1. NULL: no memory. */
void *thread_buffer(int use, size_t bytes);
/* An input's data and shape; *data is NULL where an optional one is absent. */
OrtStatus *input(const OrtKernelContext *context, size_t at, const void **data, Shape *shape);
OrtStatus *tensor(const OrtValue *value, const void **data, Shape *shape);
OrtStatus *output(OrtKernelContext *context, Shape shape, float **data);
OrtStatus *refused(const char *why);
int64_t elements(Shape shape);

/* Members of an OrtCustomOp that say the same of all. */
const char *op_provider(const OrtCustomOp *op);
int op_float(const OrtCustomOp *op, size_t at);
size_t op_one(const OrtCustomOp *op);
int op_zero(const OrtCustomOp *op, size_t at);
int op_first_version(const OrtCustomOp *op);
int op_last_version(const OrtCustomOp *op);
size_t op_no_pairs(int **from, int **to);
#define OP_COMMON                                                                                              \
  .version = ORT_ABI_VERSION, .GetExecutionProviderType = op_provider, .GetOutputType = op_float,              \
  .GetOutputTypeCount = op_one, .GetOutputCharacteristic = op_zero, .GetInputMemoryType = op_zero,             \
  .GetStartVersion = op_first_version, .GetEndVersion = op_last_version, .GetMayInplace = op_no_pairs,         \
  .GetAliasMap = op_no_pairs
