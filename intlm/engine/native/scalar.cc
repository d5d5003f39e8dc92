// No vector units: any processor. The compiler may use what the target offers anyway.
#define INTLM_ISA scalar
#define INTLM_PART_BYTES 16
#include "preamble.inc"

namespace scalar {
#ifdef INTLM_EMULATED_TILES
constexpr int WEIGHTS_EXCESS = 128;
#else
constexpr int WEIGHTS_EXCESS = 0;
#endif
constexpr int DOT_EXCESS = 0, PAIR_LIMIT = 256, COLUMNS = 4;
constexpr bool PAIRS_SATURATE = false;
// `r[i] = expression` for the numbers i of each block of sixteen bytes of r; a and b are the operands' blocks.
#define INTLM_BLOCKS(To, name, From, expression)                           \
  INLINE To name(From first, From second) {                                \
    To r;                                                                  \
    for (int block = 0; block < 4; ++block) {                              \
      const auto a = first.parts[block], b = second.parts[block];          \
      constexpr int half = From::EACH / 2;                                 \
      (void)half, (void)b;                                                 \
      for (int i = 0; i < To::EACH; ++i) r.parts[block][i] = (expression); \
    }                                                                      \
    return r;                                                              \
  }
#define INTLM_BLOCK(To, name, From, expression) \
  INTLM_BLOCKS(To, name, From, expression)      \
  INLINE To name(From x) { return name(x, x); }

template <class T> INLINE T limited(int32_t x) {
  constexpr int32_t limit = sizeof(T) == 1 ? 127 : 32767;
  return T(x < -limit - 1 ? -limit - 1 : x > limit ? limit : x);
}
INLINE v16 dot4(v16 acc, b64 stored, v16 weights) {
  const v16 bytes = as<v16>(stored);
  for (int j = 0; j < 4; ++j) acc += (((bytes >> (8 * j)) & 255) - 128) * ((weights << (24 - 8 * j)) >> 24);
  return acc;
}
// Plus the products of two numbers of 16 bits in each lane.
INLINE v16 dot2(v16 acc, v16 a, v16 b) {
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
INLINE bool pairs_exceed(const int8_t *, int, int) { return false; }
INLINE v16 dot4_weights(v16 acc, b64 stored, v16 weights) { return dot4(acc, stored, weights); }
INLINE v16 add_magnitudes(v16 total, b64 x) {
  for (int i = 0; i < 64; ++i) total[i / 4] += std::abs(int(x[i]));
  return total;
}
template <class T>
INLINE v16 lookup(const T *table, v16 index) {
  v16 r;
  for (int i = 0; i < 16; ++i) r[i] = table[index[i]];
  return r;
}
template <class T>
INLINE v16 widen(const T *p) {
  v16 r;
  for (int i = 0; i < 16; ++i) r[i] = p[i];
  return r;
}
INTLM_BLOCKS(w32, pack, v16, limited<int16_t>(i < 4 ? a[i] : b[i - 4]))
INTLM_BLOCKS(b64, pack, w32, limited<int8_t>(i < 8 ? a[i] : b[i - 8]))
INTLM_BLOCK(w32, low, b64, a[i])
INTLM_BLOCK(w32, high, b64, a[i + 8])
INTLM_BLOCK(v16, low, w32, a[i])
INTLM_BLOCK(v16, high, w32, a[i + 4])
INTLM_BLOCK(b64, turn, b64, a[i % 4 * 4 + i / 4])
INTLM_BLOCK(w32, swap_halves, w32, a[(i + 4) % 8])
INTLM_BLOCK(v16, swap_neighbours, v16, a[i ^ 1])
#define INTLM_MIX(V)                                                                  \
  INTLM_BLOCKS(V, mix_low, V, i % 2 ? b[i / 2] : a[i / 2])                            \
  INTLM_BLOCKS(V, mix_high, V, i % 2 ? b[half + i / 2] : a[half + i / 2])
INTLM_MIX(b64) INTLM_MIX(w32) INTLM_MIX(v16)
INTLM_BLOCKS(v16, join_low, v16, i < 2 ? a[i] : b[i - 2])
INTLM_BLOCKS(v16, join_high, v16, i < 2 ? a[i + 2] : b[i])
template <int q> INTLM_BLOCKS(v16, repeat_lane_of, v16, a[q])
template <int q> INLINE v16 repeat_lane(v16 x) { return repeat_lane_of<q>(x, x); }
INTLM_BLOCKS(w32, add_saturated, w32, limited<int16_t>(a[i] + b[i]))
INTLM_BLOCKS(b64, add_saturated, b64, limited<int8_t>(a[i] + b[i]))
INTLM_BLOCKS(b64, subtract_saturated, b64, limited<int8_t>(a[i] - b[i]))
INTLM_BLOCKS(w32, high_product, w32, int16_t((int32_t(a[i]) * b[i]) >> 16))
INLINE w32 each_block(const void *p) {
  w32 r;
  INTLM_EACH memcpy(&r.parts[i], p, 16);
  return r;
}
INLINE uint32_t top_bits(v16 x) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(x[i] < 0) << i;
  return bits;
}
template <class V> INLINE V with_sign(V c, V x) { return c * x; }  // x is -1 or 1
}  // namespace scalar
#include "bytes.inc"
#ifdef INTLM_EMULATED_TILES
#include "tiles.inc"
#endif
#include "population.inc"
