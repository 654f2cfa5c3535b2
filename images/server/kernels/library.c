/* The library of operators: what onnxruntime calls when it is registered. */
#include <stdlib.h>

#include "kernels.h"
#include "operators.h"

const OrtApi *api;

void *thread_buffer(int use, size_t bytes) {
  static _Thread_local void *kept[2];
  static _Thread_local size_t size[2];
  if (!kept[use] || bytes > size[use]) {
    free(kept[use]);
    kept[use] = aligned_alloc(64, (bytes / 64 + 1) * 64);
    size[use] = kept[use] ? bytes : 0;
  }
  return kept[use];
}

OrtStatus *refused(const char *why) { return CreateStatus(ORT_INVALID_ARGUMENT, why); }

int64_t elements(Shape shape) {
  int64_t product = 1;
  for (size_t at = 0; at < shape.count; at++) product *= shape.sizes[at];
  return product;
}

OrtStatus *tensor(const OrtValue *value, const void **data, Shape *shape) {
  OrtShape *told;
  TRY(GetTensorTypeAndShape(value, &told));
  OrtStatus *failed = GetDimensionsCount(told, &shape->count);
  if (!failed && shape->count > MOST_DIMENSIONS) failed = refused("slmops: an input has too many dimensions");
  if (!failed) failed = GetDimensions(told, shape->sizes, shape->count);
  ReleaseTensorTypeAndShapeInfo(told);
  TRY(failed);
  return GetTensorMutableData((OrtValue *)value, (void **)data);
}

OrtStatus *input(const OrtKernelContext *context, size_t at, const void **data, Shape *shape) {
  const OrtValue *value = NULL;
  *data = NULL;
  TRY(KernelContext_GetInput(context, at, &value));
  if (!value) return NULL;
  TRY(tensor(value, data, shape));
  if (!*data) *data = ""; /* it is there, without elements */
  return NULL;
}

OrtStatus *output(OrtKernelContext *context, Shape shape, float **data) {
  OrtValue *value;
  TRY(KernelContext_GetOutput(context, 0, shape.sizes, shape.count, &value));
  return GetTensorMutableData(value, (void **)data);
}

const char *op_provider(const OrtCustomOp *op) { return (void)op, (const char *)NULL; }
int op_float(const OrtCustomOp *op, size_t at) { return (void)op, (void)at, ORT_FLOAT; }
size_t op_one(const OrtCustomOp *op) { return (void)op, 1; }
int op_zero(const OrtCustomOp *op, size_t at) { return (void)op, (void)at, 0; }
int op_first_version(const OrtCustomOp *op) { return (void)op, 1; }
int op_last_version(const OrtCustomOp *op) { return (void)op, 0x7fffffff; }
size_t op_no_pairs(int **from, int **to) { return (void)from, (void)to, 0; }

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  OrtCustomOpDomain *domain;
  api = base->GetApi(ORT_ABI_VERSION);
  if (!kernels) return CreateStatus(ORT_FAIL, "slmops: this CPU lacks AVX2 or FMA");
  TRY(CreateCustomOpDomain("slmops", &domain));
  TRY(CustomOpDomain_Add(domain, &int4_matmul));
  TRY(CustomOpDomain_Add(domain, &row_attention));
  return AddCustomOpDomain(options, domain);
}
