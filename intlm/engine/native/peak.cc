// The int8 peak of this processor: each instruction set's own dot product in registers, without a load or a
// store, in more independent chains than its latency needs, on every thread at once. What an engine reaches is
// told as a share of it.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>

#define INTLM_ISA tiles
#include "preamble.inc"
#include "tiles.inc"
#endif

namespace {

// Multiply-adds of an iteration: one of each product that is added into a 32-bit sum.
struct Kernel {
  int64_t multiply_adds;
  int32_t (*run)(int64_t);
};

// What the compiler makes of 32-bit products and sums, on the target's baseline; the scalar engine has no other.
typedef int32_t four __attribute__((vector_size(16)));

int32_t run_scalar(int64_t iterations) {
  volatile int32_t seed = 1;
  four sum[8] = {}, b[8], a = four{} + seed;
  for (four &x : b) x = four{} + seed;
  const four flip = four{} + seed;
  for (int64_t n = 0; n < iterations; ++n) {
    a ^= flip;  // products of constants would leave the loop
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += a * b[i];
  }
  four total = {};
  for (const four &x : sum) total += x;
  return total[0];
}
constexpr Kernel SCALAR = {8 * 4, run_scalar};

#if defined(__x86_64__)
// An empty statement that the compiler must believe to change x, so that no product leaves the loop.
#define INTLM_OPAQUE(x) asm volatile("" : "+x"(x))

// Two products into 16 bits, two of those into 32, an addition: 32 multiply-adds in three instructions.
__attribute__((target("avx2"))) int32_t run_avx2(int64_t iterations) {
  __m256i sum[8], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
  const __m256i one = _mm256_set1_epi16(1);
  for (__m256i &x : sum) x = _mm256_setzero_si256();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      INTLM_OPAQUE(a);
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one));
    }
  __m256i total = sum[0];
  for (int i = 1; i < 8; ++i) total = _mm256_add_epi32(total, sum[i]);
  return _mm_cvtsi128_si32(_mm256_castsi256_si128(total));
}
constexpr Kernel AVX2 = {8 * 32, run_avx2};

// One instruction for 64 multiply-adds.
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int32_t run_avx512(int64_t iterations) {
  __m512i sum[16], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  for (__m512i &x : sum) x = _mm512_setzero_si512();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      INTLM_OPAQUE(a);
      sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    }
  __m512i total = sum[0];
  for (int i = 1; i < 16; ++i) total = _mm512_add_epi32(total, sum[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(total));
}
constexpr Kernel AVX512 = {16 * 64, run_avx512};

// One instruction for 16 by 16 sums of 64 products; four squares of sums, as the engine has them.
int32_t run_amx(int64_t iterations) {
  using namespace tiles;
  const Tiles shaped{};
  (void)shaped;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  for (int64_t n = 0; n < iterations; ++n) tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>(), tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
  return 0;
}
constexpr Kernel AMX = {4 * 16 * 16 * 64, run_amx};
#endif

int64_t peak(const Kernel &kernel, int64_t iterations, int threads) {
  std::vector<std::thread> others;
  const auto work = [&] {
    volatile int32_t kept = kernel.run(iterations);
    (void)kept;
  };
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread &other : others) other.join();
  return iterations * threads * kernel.multiply_adds;
}

}  // namespace

// Multiply-adds done: `iterations` of the loop on each of `threads`. The caller has asked intlm_isas first.
extern "C" {
int64_t intlm_peak_scalar(int64_t iterations, int threads) { return peak(SCALAR, iterations, threads); }
#if defined(__x86_64__)
int64_t intlm_peak_avx2(int64_t iterations, int threads) { return peak(AVX2, iterations, threads); }
int64_t intlm_peak_avx512(int64_t iterations, int threads) { return peak(AVX512, iterations, threads); }
int64_t intlm_peak_amx(int64_t iterations, int threads) { return peak(AMX, iterations, threads); }
#endif
}
