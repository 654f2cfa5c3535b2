/* For CPUs with AVX-512 VNNI. */
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define DOT _mm512_dpbusd_epi32
enum { INT4_TILE = 8, INT4_VECTORS = 2, QUERIES = 7, SCORE_VECTORS = 2, VALUE_VECTORS = 4 };

#include "vector512.h"
#include "int4_dots_vnni.h"
#include "int4_kernels.h"
#include "attention_kernels.h"
#include "kernels.h"

const Kernels avx512_kernels = {round_rows, multiply_rows, keep_token, read_token};
