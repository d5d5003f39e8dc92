// AVX512 with VNNI.
#include <immintrin.h>

#define INTLM_ISA avx512
#include "preamble.inc"

#include "avx512.inc"
#include "population.inc"
