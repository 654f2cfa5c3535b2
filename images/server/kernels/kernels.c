/* Which of the kernels run on this CPU. */
#include "kernels.h"

#include <string.h>

const Kernels *kernels;

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avxvnni(void) { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

static const struct {
  const char *name;
  int (*has)(void);
  const Kernels *kernels;
} best_first[] = {{"avx512", has_avx512, &avx512_kernels},
                  {"avxvnni", has_avxvnni, &avxvnni_kernels},
                  {"avx2", has_avx2, &avx2_kernels}};

/* For tests: take the kernels of that name, or the best of all for NULL. Whether the CPU has them. */
int slmops_pretend(const char *name) {
  for (size_t at = 0; at < sizeof best_first / sizeof *best_first; at++) {
    if ((name && strcmp(name, best_first[at].name)) || !best_first[at].has()) continue;
    kernels = best_first[at].kernels;
    return 1;
  }
  return 0;
}

__attribute__((constructor)) static void choose(void) {
  __builtin_cpu_init();
  slmops_pretend(NULL);
}

/* Whether this CPU has what the operators need. */
int slmops_usable(void) { return kernels != NULL; }
