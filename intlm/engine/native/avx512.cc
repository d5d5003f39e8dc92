// AVX512 with VNNI: one instruction for sixteen dot products of four bytes.
#include <immintrin.h>

#define INTLM_ISA avx512
#include "preamble.inc"

namespace avx512 {
constexpr int DOT_EXCESS = 128, COLUMNS = 16;
INLINE v16 dot4(v16 acc, v16 stored, v16 weights) {
  return (v16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)stored, (__m512i)weights);
}
INLINE v16 lookup(const int32_t *table, v16 index) {
  return (v16)_mm512_i32gather_epi32((__m512i)index, table, 4);
}
INLINE v16 lookup(const int8_t *table, v16 index) {
  v16 r;
  for (int i = 0; i < 16; ++i) r[i] = table[index[i]];
  return r;
}
INLINE v16 widen(const int8_t *p) { return (v16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE v16 widen(const int16_t *p) { return (v16)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void narrow(int8_t *p, v16 x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x)); }
INLINE void narrow(int16_t *p, v16 x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)x)); }

// The table of 256 entries stays in registers, its low and its high 16 bits in eight vectors each; two rows of
// logits are looked up at once. Unpacking sorts lanes 0-3 and 8-11 of both rows into one sum, the rest into the
// other.
INLINE v16 exp2_sum(const int32_t *table, const int16_t *logits, int count, v16 top) {
  __m512i low[8], high[8];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = _mm512_loadu_si512(table + 32 * i), b = _mm512_loadu_si512(table + 32 * i + 16);
    low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
    high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                                 _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
  }
  const __m256i narrow_top = _mm512_cvtepi32_epi16((__m512i)top);
  const __m512i tops = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_top), narrow_top, 1);
  const __m512i one = _mm512_set1_epi32(1), zero = _mm512_setzero_si512();
  __m512i first = zero, second = zero;
  for (int m = 0; m < count; m += 2) {
    // A row past the end is as far below the top as can be, 31 bits and more, and rounds to nothing.
    const bool both = m + 1 < count;
    __m512i rows = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(logits + size_t(m) * 16))),
        both ? _mm256_loadu_si256((const __m256i *)(logits + size_t(m + 1) * 16)) : _mm256_setzero_si256(), 1);
    __m512i below = _mm512_sub_epi16(tops, rows);
    if (!both) below = _mm512_inserti64x4(below, _mm256_set1_epi16(0x1F00), 1);
    const __mmask32 bit6 = _mm512_test_epi16_mask(below, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(below, _mm512_set1_epi16(128));
    const auto entry = [&](const __m512i *part) {  // vpermi2w reads six bits of the index
      const __m512i a = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[0], below, part[1]),
                                                _mm512_permutex2var_epi16(part[2], below, part[3]));
      const __m512i b = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[4], below, part[5]),
                                                _mm512_permutex2var_epi16(part[6], below, part[7]));
      return _mm512_mask_blend_epi16(bit7, a, b);
    };
    const __m512i l = entry(low), h = entry(high), bits = _mm512_srli_epi16(below, 8);
    const auto add = [&](__m512i sum, __m512i term, __m512i shift) {
      const __m512i half = _mm512_srli_epi32(_mm512_sllv_epi32(one, shift), 1);
      return _mm512_add_epi32(sum, _mm512_srlv_epi32(_mm512_add_epi32(term, half), shift));
    };
    first = add(first, _mm512_unpacklo_epi16(l, h), _mm512_unpacklo_epi16(bits, zero));
    second = add(second, _mm512_unpackhi_epi16(l, h), _mm512_unpackhi_epi16(bits, zero));
  }
  // Rows m and m + 1 are the lower and the upper halves.
  const __m256i a = _mm256_add_epi32(_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64(first, 1));
  const __m256i b = _mm256_add_epi32(_mm512_castsi512_si256(second), _mm512_extracti64x4_epi64(second, 1));
  const __m256i lanes_0_7 = _mm256_permute2x128_si256(a, b, 0x20), lanes_8_15 = _mm256_permute2x128_si256(a, b, 0x31);
  return (v16)_mm512_inserti64x4(_mm512_castsi256_si512(lanes_0_7), lanes_8_15, 1);
}
}  // namespace avx512
#include "population.inc"
