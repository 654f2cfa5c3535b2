/* For CPUs with AVX2, FMA and AVX-VNNI. */
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define DOT _mm256_dpbusd_avx_epi32
enum { INT4_TILE = 4, INT4_VECTORS = 2, QUERIES = 4, SCORE_VECTORS = 2, VALUE_VECTORS = 2 };

#include "vector256.h"
#include "int4_dots_vnni.h"
#include "int4_kernels.h"
#include "attention_kernels.h"
#include "kernels.h"

const Kernels avxvnni_kernels = {round_rows, multiply_rows, keep_token, read_token};
