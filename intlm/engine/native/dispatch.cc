// Which instruction sets this processor has, and the layout of what is handed over.
#include <initializer_list>

#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
// Tile registers: in the processor, kept by the system between threads, and permitted to this process.
static bool has_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;  // AMX-TILE, AMX-INT8
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;               // OSXSAVE
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl
  return (low >> 17 & 3) == 3 && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
  return false;
#endif
}
#endif

extern "C" int intlm_isas(void) {
#if defined(INTLM_EMULATED_TILES)
  return 8;  // a test's build has nothing else
#endif
  int found = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found |= 2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2"))
    found |= has_tiles() ? 4 | 8 : 4;
#endif
  return found;
}

// Of the sizes of the jobs, 12 bits each.
extern "C" int64_t intlm_layout(void) {
  int64_t layout = 0;
  for (size_t size : {sizeof(ModelJob), sizeof(StepJob), sizeof(UpdateJob), sizeof(SampleJob)})
    layout = layout << 12 | int64_t(size);
  return layout;
}
