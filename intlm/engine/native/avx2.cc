// AVX2. Its dot product saturates in 16 bits, so magnitudes (at most 127) meet signed weights: two products
// make at most 2 * 127 * 127, which fits.
#include <immintrin.h>

#define INTLM_ISA avx2
#define INTLM_PART_BYTES 32
#include "preamble.inc"

namespace avx2 {
constexpr int DOT_EXCESS = 0, COLUMNS = 4;
INLINE v16 dot4(v16 acc, v16 stored, v16 weights) {
  for (int i = 0; i < 2; ++i) {
    const __m256i value = _mm256_xor_si256((__m256i)stored.parts[i], _mm256_set1_epi8(char(0x80)));
    const __m256i sign = _mm256_sign_epi8((__m256i)weights.parts[i], value);
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(value), sign);
    acc.parts[i] += (part)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
  return acc;
}
INLINE v16 lookup(const int32_t *table, v16 index) {
  for (int i = 0; i < 2; ++i) index.parts[i] = (part)_mm256_i32gather_epi32(table, (__m256i)index.parts[i], 4);
  return index;
}
INLINE v16 lookup(const int8_t *table, v16 index) {
  v16 r;
  for (int i = 0; i < 16; ++i) r[i] = table[index[i]];
  return r;
}
INLINE v16 widen(const int8_t *p) {
  v16 x;
  for (int i = 0; i < 2; ++i) x.parts[i] = (part)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
  return x;
}
INLINE v16 widen(const int16_t *p) {
  v16 x;
  for (int i = 0; i < 2; ++i) x.parts[i] = (part)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
  return x;
}
INLINE v16 exp2_sum(const int32_t *table, const int16_t *logits, int count, v16 top) {
  return exp2_sum_by_lookup(
      logits, count, top, [&](v16 i) { return lookup(table, i); }, [](const int16_t *p) { return widen(p); });
}
}  // namespace avx2
#include "population.inc"
