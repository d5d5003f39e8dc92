// Which instruction sets this processor has, and the layout of what is handed over.
#include "native.h"

extern "C" int intlm_isas(void) {
  int found = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found |= 2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    found |= 4;
#endif
  return found;
}

extern "C" int intlm_layout(void) { return int((sizeof(ModelJob) << 20) + (sizeof(StepJob) << 10) + sizeof(SampleJob)); }
