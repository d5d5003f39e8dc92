// No vector units: any processor. The compiler may use what the target offers anyway.
#define INTLM_ISA scalar
#define INTLM_PART_BYTES 16
#include "preamble.inc"

namespace scalar {
constexpr int DOT_EXCESS = 0, COLUMNS = 4;
INLINE v16 dot4(v16 acc, v16 stored, v16 weights) {
  for (int j = 0; j < 4; ++j) {
    const v16 w = (weights << (24 - 8 * j)) >> 24;
    acc += (((stored >> (8 * j)) & 255) - 128) * w;
  }
  return acc;
}
template <class T>
INLINE v16 lookup(const T *table, v16 index) {
  v16 r;
  for (int i = 0; i < 16; ++i) r[i] = table[index[i]];
  return r;
}
template <class T>
INLINE v16 widen(const T *p) {
  v16 x;
  for (int i = 0; i < 16; ++i) x[i] = p[i];
  return x;
}
INLINE v16 exp2_sum(const int32_t *table, const int16_t *logits, int count, v16 top) {
  return exp2_sum_by_lookup(
      logits, count, top, [&](v16 i) { return lookup(table, i); }, [](const int16_t *p) { return widen(p); });
}
}  // namespace scalar
#include "population.inc"
