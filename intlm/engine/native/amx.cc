// AMX: matmuls in tiles of 16 by 64 bytes; all else as with AVX512.
#include <immintrin.h>

#define INTLM_ISA amx
#include "preamble.inc"

#include "avx512.inc"
#include "tiles.inc"
#include "population.inc"
