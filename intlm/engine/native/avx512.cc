// AVX512 with VNNI: one instruction for sixteen dot products of four bytes.
#include <immintrin.h>

#define INTLM_ISA avx512
#include "preamble.inc"

namespace avx512 {
typedef __m512i z;
constexpr int DOT_EXCESS = 128, COLUMNS = 16, QUAD_BYTES = 8, LANE_BYTES = 2;

INLINE v16 dot4(v16 acc, b64 stored, v16 weights) {
  return (v16)_mm512_dpbusd_epi32((z)acc, (z)stored, (z)weights);
}
INLINE v16 add_magnitudes(v16 total, b64 x) {
  return (v16)_mm512_dpbusd_epi32((z)total, _mm512_abs_epi8((z)x), _mm512_set1_epi8(1));
}
INLINE v16 lookup(const int32_t *table, v16 index) { return (v16)_mm512_i32gather_epi32((z)index, table, 4); }
INLINE v16 lookup16(const uint32_t *table, v16 index) {  // of sixteen entries
  return (v16)_mm512_permutexvar_epi32((z)index, _mm512_loadu_si512(table));
}
INLINE v16 widen(const uint16_t *p) { return (v16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE v16 rotate(v16 x, int bits) { return (v16)_mm512_rolv_epi32((z)x, _mm512_set1_epi32(bits)); }
INLINE v16 widen(const int8_t *p) { return (v16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }

INLINE w32 pack(v16 a, v16 b) { return (w32)_mm512_packs_epi32((z)a, (z)b); }
INLINE b64 pack(w32 a, w32 b) { return (b64)_mm512_packs_epi16((z)a, (z)b); }
INLINE w32 low(b64 x) { return (w32)_mm512_srai_epi16(_mm512_unpacklo_epi8((z)x, (z)x), 8); }
INLINE w32 high(b64 x) { return (w32)_mm512_srai_epi16(_mm512_unpackhi_epi8((z)x, (z)x), 8); }
INLINE v16 low(w32 x) { return (v16)_mm512_srai_epi32(_mm512_unpacklo_epi16((z)x, (z)x), 16); }
INLINE v16 high(w32 x) { return (v16)_mm512_srai_epi32(_mm512_unpackhi_epi16((z)x, (z)x), 16); }
INLINE b64 turn(b64 x) {
  return (b64)_mm512_shuffle_epi8(
      (z)x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}
INLINE w32 swap_halves(w32 x) { return (w32)_mm512_shuffle_epi32((z)x, _MM_PERM_BADC); }
INLINE v16 swap_neighbours(v16 x) { return (v16)_mm512_shuffle_epi32((z)x, _MM_PERM_CDAB); }
INLINE b64 mix_low(b64 a, b64 b) { return (b64)_mm512_unpacklo_epi8((z)a, (z)b); }
INLINE b64 mix_high(b64 a, b64 b) { return (b64)_mm512_unpackhi_epi8((z)a, (z)b); }
INLINE w32 mix_low(w32 a, w32 b) { return (w32)_mm512_unpacklo_epi16((z)a, (z)b); }
INLINE w32 mix_high(w32 a, w32 b) { return (w32)_mm512_unpackhi_epi16((z)a, (z)b); }
INLINE v16 mix_low(v16 a, v16 b) { return (v16)_mm512_unpacklo_epi32((z)a, (z)b); }
INLINE v16 mix_high(v16 a, v16 b) { return (v16)_mm512_unpackhi_epi32((z)a, (z)b); }
INLINE v16 join_low(v16 a, v16 b) { return (v16)_mm512_unpacklo_epi64((z)a, (z)b); }
INLINE v16 join_high(v16 a, v16 b) { return (v16)_mm512_unpackhi_epi64((z)a, (z)b); }
template <int q> INLINE v16 repeat_lane(v16 x) { return (v16)_mm512_shuffle_epi32((z)x, (_MM_PERM_ENUM)(q * 0x55)); }
INLINE w32 each_block(const void *p) { return (w32)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }

INLINE w32 add_saturated(w32 a, w32 b) { return (w32)_mm512_adds_epi16((z)a, (z)b); }
INLINE b64 add_saturated(b64 a, b64 b) { return (b64)_mm512_adds_epi8((z)a, (z)b); }
INLINE b64 subtract_saturated(b64 a, b64 b) { return (b64)_mm512_subs_epi8((z)a, (z)b); }
INLINE w32 high_product(w32 a, w32 b) { return (w32)_mm512_mulhi_epi16((z)a, (z)b); }
INLINE uint32_t top_bits(v16 x) { return _mm512_movepi32_mask((z)x); }

// The eight bits of eight pairs, one for each of their two lanes: 16 bits.
INLINE uint32_t both_lanes(uint32_t pairs) { return _pdep_u32(pairs, 0x5555) * 3; }
// Directions of four features and 16 lanes: a bit for each number of two w32, set where it is negative.
INLINE void put_quad(uint8_t *to, const uint8_t *pairs) {
  uint32_t words[2];
  for (int i = 0; i < 2; ++i)
    words[i] = _pdep_u32(both_lanes(pairs[2 * i]), 0x0F0F0F0F) | _pdep_u32(both_lanes(pairs[2 * i + 1]), 0xF0F0F0F0);
  memcpy(to, words, 8);
}
INLINE void perturb(w32 &a, w32 &b, const uint8_t *quad, w32 c) {
  uint32_t words[2];
  memcpy(words, quad, 8);
  a = (w32)_mm512_mask_subs_epi16(_mm512_adds_epi16((z)a, (z)c), words[0], (z)a, (z)c);
  b = (w32)_mm512_mask_subs_epi16(_mm512_adds_epi16((z)b, (z)c), words[1], (z)b, (z)c);
}
// Directions of one feature and 16 lanes.
INLINE void put_lanes(uint8_t *to, uint8_t pairs) {
  const uint16_t bits = uint16_t(both_lanes(pairs));
  memcpy(to, &bits, 2);
}
INLINE v16 perturb(v16 sum, const uint8_t *lanes, v16 c) {
  uint16_t bits;
  memcpy(&bits, lanes, 2);
  return (v16)_mm512_mask_sub_epi32(_mm512_add_epi32((z)sum, (z)c), bits, (z)sum, (z)c);
}

// The table of 256 entries stays in registers, its low and its high 16 bits in eight vectors each.
INLINE v16 exp2_sum(const int32_t *table, const int16_t *logits, int pairs, w32 top) {
  z low[8], high[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const z a = _mm512_loadu_si512(table + 32 * i), b = _mm512_loadu_si512(table + 32 * i + 16);
    low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
    high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                                 _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
  }
  const z one = _mm512_set1_epi32(1), zero = _mm512_setzero_si512();
  z first = zero, second = zero;
  for (int m = 0; m < pairs; ++m) {
    const z below = _mm512_sub_epi16((z)top, _mm512_loadu_si512(logits + size_t(m) * 32));
    const __mmask32 bit6 = _mm512_test_epi16_mask(below, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(below, _mm512_set1_epi16(128));
    const auto entry = [&](const z *part) __attribute__((always_inline)) {  // vpermi2w reads six bits of the index
      const z a = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[0], below, part[1]),
                                          _mm512_permutex2var_epi16(part[2], below, part[3]));
      const z b = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[4], below, part[5]),
                                          _mm512_permutex2var_epi16(part[6], below, part[7]));
      return _mm512_mask_blend_epi16(bit7, a, b);
    };
    const z l = entry(low), h = entry(high), bits = _mm512_srli_epi16(below, 8);
    const auto add = [&](z sum, z term, z shift) __attribute__((always_inline)) {  // a shift by 32 or more leaves 0
      const z half = _mm512_srli_epi32(_mm512_sllv_epi32(one, shift), 1);
      return _mm512_add_epi32(sum, _mm512_srlv_epi32(_mm512_add_epi32(term, half), shift));
    };
    first = add(first, _mm512_unpacklo_epi16(l, h), _mm512_unpacklo_epi16(bits, zero));
    second = add(second, _mm512_unpackhi_epi16(l, h), _mm512_unpackhi_epi16(bits, zero));
  }
  return (v16)_mm512_add_epi32(first, second);
}
}  // namespace avx512
#include "population.inc"
