/* The part of onnxruntime's C interface that these operators use.
 *
 * The interface is a table of functions to which newer versions only append, so a function has the same place in all of
 * them (onnxruntime_c_api.h, "struct OrtApi"). The places are those of version 18, which is the oldest that is asked for.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define ORT_ABI_VERSION 18

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtShape;
typedef struct {
  const void *slots[276];
} OrtApi;
typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT64 = 7 };

#define ORT_CALL(place, result, ...) ((result (*)(__VA_ARGS__))api->slots[place])
#define CreateStatus ORT_CALL(0, OrtStatus *, int, const char *)
#define CreateCustomOpDomain ORT_CALL(26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define CustomOpDomain_Add ORT_CALL(27, OrtStatus *, OrtCustomOpDomain *, const struct OrtCustomOp *)
#define AddCustomOpDomain ORT_CALL(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define GetTensorMutableData ORT_CALL(51, OrtStatus *, OrtValue *, void **)
#define GetDimensionsCount ORT_CALL(61, OrtStatus *, const OrtShape *, size_t *)
#define GetDimensions ORT_CALL(62, OrtStatus *, const OrtShape *, int64_t *, size_t)
#define GetTensorTypeAndShape ORT_CALL(65, OrtStatus *, const OrtValue *, OrtShape **)
#define KernelInfoGetAttribute_float ORT_CALL(85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define KernelInfoGetAttribute_int64 ORT_CALL(86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define KernelContext_GetInput ORT_CALL(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define KernelContext_GetOutput \
  ORT_CALL(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ReleaseTensorTypeAndShapeInfo ORT_CALL(99, void, OrtShape *)
#define KernelInfoGetConstantInput_tensor \
  ORT_CALL(249, OrtStatus *, const OrtKernelInfo *, size_t, int *, const OrtValue **)
#define KernelContext_ParallelFor \
  ORT_CALL(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)

typedef struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const struct OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const struct OrtCustomOp *);
  int (*GetInputType)(const struct OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const struct OrtCustomOp *);
  int (*GetOutputType)(const struct OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const struct OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const struct OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const struct OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const struct OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const struct OrtCustomOp *, void *);
  int (*GetStartVersion)(const struct OrtCustomOp *);
  int (*GetEndVersion)(const struct OrtCustomOp *);
  size_t (*GetMayInplace)(int **, int **);
  void (*ReleaseMayInplace)(int *, int *);
  size_t (*GetAliasMap)(int **, int **);
  void (*ReleaseAliasMap)(int *, int *);
} OrtCustomOp;
