// Vectors of floats, elements in fp32 or bf16, and dropout, for the instruction set that lora.inl is compiled for.
//
// KLOSS_LANES: floats in a vector register; the compiler would keep wider vectors in memory. KLOSS_ROWS: rows of a register tile,
// as many as keep all sums in registers. KLOSS_BF16: whether elements are bf16.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "lora.h"

namespace kloss::cpu::KLOSS_NAME {
namespace {

constexpr int W = KLOSS_LANES;    // numbers in a vector
constexpr int ROWS = KLOSS_ROWS;  // register tile: ROWS x (VECTORS * W)
constexpr int VECTORS = 2;
constexpr int COLUMNS = VECTORS * W;
static_assert(LANES % COLUMNS == 0);

typedef float Floats __attribute__((vector_size(4 * W)));
typedef uint32_t Ints __attribute__((vector_size(4 * W)));

#if KLOSS_BF16
using Scalar = uint16_t;
using Unit = uint32_t;
constexpr int PER = 2;  // elements of a unit

inline Floats dot(Floats sum, Unit a, Ints b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline Floats load(const Scalar* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void store(Scalar* p, Floats v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
inline Scalar narrow(float v) {
  Floats all = Floats{} + v;
  Scalar out[W];
  store(out, all);
  return out[0];
}
#else
using Scalar = float;
using Unit = float;
constexpr int PER = 1;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Floats dot(Floats sum, Unit a, Floats b) { return sum + a * b; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Scalar narrow(float v) { return v; }
#endif

inline int64_t units(int64_t elements) { return (elements + PER - 1) / PER; }

// A buffer of this thread and slot, 64-byte aligned, kept for the next job. Its contents are arbitrary.
template <int SLOT, class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
  if (bytes > size) {
    memory.reset(std::aligned_alloc(64, bytes));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return static_cast<T*>(memory.get());
}

// Masks of 2 * W features, all ones where a feature is kept.
struct Keep {
  Ints first, second;
};

// The draws of kloss/kernels/dropout.py. counter: feature / 2. low, high: the halves of the row's key.
inline Ints draws(Ints counter, Ints low, Ints high) {
  Ints h = counter * 0x9E3779B1u ^ low;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15) ^ high) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

// Those of one row for W pairs of features from `column` on.
inline Ints draws(int64_t key, int64_t column) {
  Ints counter;
  for (int i = 0; i < W; ++i) counter[i] = i;
  return draws(counter + (uint32_t)(column / 2), Ints{} + (uint32_t)key, Ints{} + (uint32_t)((uint64_t)key >> 32));
}

// limit: as RowDropout's threshold, shifted by -2^15. column: the first feature, even.
inline Keep keep(int64_t key, int16_t limit, int64_t column) {
  Ints h = draws(key, column), threshold = Ints{} + (uint32_t)(limit + 32768);
  Ints even = (Ints)((h & 0xFFFF) >= threshold), odd = (Ints)((h >> 16) >= threshold);
  Ints low, high;
  for (int i = 0; i < W; ++i) low[i] = i % 2 * W + i / 2, high[i] = low[i] + W / 2;
  return {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
}

inline Keep keep(const Lora& l, int64_t row, int64_t column) { return keep(l.keys[row], l.threshold[row], column); }

inline Floats select(Floats v, Ints mask) { return (Floats)((Ints)v & mask); }

// drop(x) of one row without its scale: dropped elements are 0 whatever they held.
inline void drop_row(const Lora& l, int64_t row, Scalar* out) {
  const Scalar* x = (const Scalar*)l.x + row * l.inputs;
  for (int64_t c = 0; c < l.inputs; c += 2 * W) {
#if KLOSS_BF16
    Ints h = draws(l.keys[row], c), threshold = Ints{} + (uint32_t)(l.threshold[row] + 32768), v;
    Ints mask = ((Ints)((h & 0xFFFF) >= threshold) & 0xFFFF) | ((Ints)((h >> 16) >= threshold) & 0xFFFF0000);
    std::memcpy(&v, x + c, sizeof v);
    v &= mask;
    std::memcpy(out + c, &v, sizeof v);
#else
    Keep k = keep(l, row, c);
    store(out + c, select(load(x + c), k.first));
    store(out + c + W, select(load(x + c + W), k.second));
#endif
  }
}

// The first `live` elements, zeros behind them. WHOLE: the width is a multiple of 2 * W, so that none are missing.
template <bool WHOLE>
inline Floats load(const Scalar* p, int64_t live) {
  if (WHOLE || live >= W) return load(p);
  Scalar part[W] = {};
  if (live > 0) std::memcpy(part, p, live * sizeof(Scalar));
  return load(part);
}

template <bool WHOLE>
inline void store(Scalar* p, Floats v, int64_t live) {
  if (WHOLE || live >= W) return store(p, v);
  Scalar part[W];
  store(part, v);
  if (live > 0) std::memcpy(p, part, live * sizeof(Scalar));
}

inline float total(Floats v) {
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2) {
    Ints other;
    for (int i = 0; i < W; ++i) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// e^v, off by at most two units in the last place; 0 where it is below the smallest normal number.
inline Floats exponential(Floats v) {
  Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which its last bits hold
  Floats rounded = v * 1.44269504f + magic, n = rounded - magic;
  Floats r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p *= (Floats)(((Ints)rounded - (Ints)magic + 127u) << 23);
  return select(p, ~(Ints)(v < -87.0f));
}

}  // namespace
}  // namespace kloss::cpu::KLOSS_NAME
