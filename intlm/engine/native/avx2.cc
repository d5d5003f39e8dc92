// AVX2. Its dot product adds two products in 16 bits, and saturates. In general magnitudes (at most 127) meet weights
// that have taken the sign over, and two products make at most 2 * 127 * 127. Weights that are read many times are made
// such that stored activations (at most 255) can meet them as they are: no two neighbours pass 128 together, and the
// rest is added apart.
#include <immintrin.h>

#define INTLM_ISA avx2
#define INTLM_PART_BYTES 32
#include "preamble.inc"

namespace avx2 {
typedef __m256i y;
constexpr int DOT_EXCESS = 0, WEIGHTS_EXCESS = 128, PAIR_LIMIT = 128, COLUMNS = 4;
constexpr bool PAIRS_SATURATE = true;
#define INTLM_UNARY(To, name, From, expression)  \
  INLINE To name(From x) {                       \
    To r;                                        \
    INTLM_EACH {                                 \
      const y p = (y)x.parts[i];                 \
      r.parts[i] = (To::part)(expression);       \
    }                                            \
    return r;                                    \
  }
#define INTLM_BINARY(To, name, From, instruction)                                                             \
  INLINE To name(From a, From b) {                                                                            \
    To r;                                                                                                     \
    INTLM_EACH r.parts[i] = (To::part)instruction((y)a.parts[i], (y)b.parts[i]);                              \
    return r;                                                                                                 \
  }

INLINE v16 dot4(v16 acc, b64 stored, v16 weights) {
  INTLM_EACH {
    const y value = _mm256_xor_si256((y)stored.parts[i], _mm256_set1_epi8(char(0x80)));
    const y products = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8((y)weights.parts[i], value));
    acc.parts[i] += (v16::part)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
  return acc;
}
INLINE v16 dot4_weights(v16 acc, b64 stored, v16 weights) {
  INTLM_EACH {
    const y products = _mm256_maddubs_epi16((y)stored.parts[i], (y)weights.parts[i]);
    acc.parts[i] += (v16::part)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
  return acc;
}
INLINE v16 dot2(v16 acc, v16 a, v16 b) {
  INTLM_EACH acc.parts[i] += (v16::part)_mm256_madd_epi16((y)a.parts[i], (y)b.parts[i]);
  return acc;
}
// Whether the magnitudes of two neighbours in `count` numbers (a multiple of 16) pass `limit` together.
INLINE bool pairs_exceed(const int8_t *p, int count, int limit) {
  __m128i any = _mm_setzero_si128();
  for (int i = 0; i < count; i += 16) {
    const __m128i sums = _mm_maddubs_epi16(_mm_abs_epi8(_mm_loadu_si128((const __m128i *)(p + i))), _mm_set1_epi8(1));
    any = _mm_or_si128(any, _mm_cmpgt_epi16(sums, _mm_set1_epi16(int16_t(limit))));
  }
  return _mm_movemask_epi8(any) != 0;
}
INLINE v16 add_magnitudes(v16 total, b64 x) {
  INTLM_EACH {
    const y pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((y)x.parts[i]), _mm256_set1_epi8(1));
    total.parts[i] += (v16::part)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  return total;
}
INLINE v16 lookup(const int32_t *table, v16 index) {
  INTLM_EACH index.parts[i] = (v16::part)_mm256_i32gather_epi32(table, (y)index.parts[i], 4);
  return index;
}
INLINE v16 widen(const int8_t *p) {
  v16 r;
  INTLM_EACH r.parts[i] = (v16::part)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
  return r;
}
INLINE v16 widen(const uint16_t *p) {
  v16 r;
  INTLM_EACH r.parts[i] = (v16::part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
  return r;
}
INTLM_BINARY(w32, pack, v16, _mm256_packs_epi32)
INTLM_BINARY(b64, pack, w32, _mm256_packs_epi16)
INTLM_UNARY(w32, low, b64, _mm256_srai_epi16(_mm256_unpacklo_epi8(p, p), 8))
INTLM_UNARY(w32, high, b64, _mm256_srai_epi16(_mm256_unpackhi_epi8(p, p), 8))
INTLM_UNARY(v16, low, w32, _mm256_srai_epi32(_mm256_unpacklo_epi16(p, p), 16))
INTLM_UNARY(v16, high, w32, _mm256_srai_epi32(_mm256_unpackhi_epi16(p, p), 16))
INTLM_UNARY(b64, turn, b64,
            _mm256_shuffle_epi8(p, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14,
                                                                             3, 7, 11, 15))))
INTLM_UNARY(w32, swap_halves, w32, _mm256_shuffle_epi32(p, 0x4E))
INTLM_UNARY(v16, swap_neighbours, v16, _mm256_shuffle_epi32(p, 0xB1))
INTLM_BINARY(b64, mix_low, b64, _mm256_unpacklo_epi8)
INTLM_BINARY(b64, mix_high, b64, _mm256_unpackhi_epi8)
INTLM_BINARY(w32, mix_low, w32, _mm256_unpacklo_epi16)
INTLM_BINARY(w32, mix_high, w32, _mm256_unpackhi_epi16)
INTLM_BINARY(v16, mix_low, v16, _mm256_unpacklo_epi32)
INTLM_BINARY(v16, mix_high, v16, _mm256_unpackhi_epi32)
INTLM_BINARY(v16, join_low, v16, _mm256_unpacklo_epi64)
INTLM_BINARY(v16, join_high, v16, _mm256_unpackhi_epi64)
template <int q> INTLM_UNARY(v16, repeat_lane, v16, _mm256_shuffle_epi32(p, q * 0x55))
INTLM_BINARY(w32, add_saturated, w32, _mm256_adds_epi16)
INTLM_BINARY(b64, add_saturated, b64, _mm256_adds_epi8)
INTLM_BINARY(b64, subtract_saturated, b64, _mm256_subs_epi8)
INTLM_BINARY(w32, high_product, w32, _mm256_mulhi_epi16)
INLINE w32 each_block(const void *p) {
  w32 r;
  INTLM_EACH r.parts[i] = (w32::part)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
  return r;
}
INLINE uint32_t top_bits(v16 x) {
  uint32_t bits = 0;
  INTLM_EACH bits |= uint32_t(_mm256_movemask_ps((__m256)x.parts[i])) << (8 * i);
  return bits;
}
// c where a number of x is positive, -c where it is negative.
INLINE w32 with_sign(w32 c, w32 x) {
  INTLM_EACH c.parts[i] = (w32::part)_mm256_sign_epi16((y)c.parts[i], (y)x.parts[i]);
  return c;
}
INLINE v16 with_sign(v16 c, v16 x) {
  INTLM_EACH c.parts[i] = (v16::part)_mm256_sign_epi32((y)c.parts[i], (y)x.parts[i]);
  return c;
}
}  // namespace avx2
#include "bytes.inc"
#include "population.inc"
