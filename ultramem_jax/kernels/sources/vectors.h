// Vectors of the CPU in GCC's and Clang's own notation, which both compile for x86-64 and for arm64.
//
// Only what that notation cannot say, one bit for each lane, has a version for each CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ultramem {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ULTRAMEM_AVX512 1
constexpr int kLanes = 16;
constexpr const char* kInstructions = "AVX-512";
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr const char* kInstructions = "AVX2";
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr const char* kInstructions = "NEON";
#else
constexpr int kLanes = 4;
constexpr const char* kInstructions = "portable vectors";
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// bfloat16, as its bits.
using Bfloat16 = uint16_t;

template <class V, class T>
inline V load_vector(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline void store_vector(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }
inline Words splat(uint32_t x) { return x - Words{}; }

inline Floats load(const float* p) { return load_vector<Floats>(p); }
inline Floats load(const Bfloat16* p) {
  return (Floats)(__builtin_convertvector(load_vector<Halves>(p), Words) << 16);
}
inline float load_one(const float* p) { return *p; }
inline float load_one(const Bfloat16* p) {
  uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline Words nearest_bfloat16(Floats x) {
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : (bits >> 16 | 0x40);
}
inline Bfloat16 nearest_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return static_cast<Bfloat16>(bits >> 16 | 0x40);
  return static_cast<Bfloat16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store(float* p, Floats x) { store_vector(p, x); }
inline void store(int32_t* p, Ints x) { store_vector(p, x); }
inline void store(Bfloat16* p, Words bits) { store_vector(p, __builtin_convertvector(bits, Halves)); }
inline void store(Bfloat16* p, Floats x) { store(p, nearest_bfloat16(x)); }
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(Bfloat16* p, float x) { *p = nearest_bfloat16(x); }

// The lanes of a vector that count: all, or the first ones, at the end of a row whose width is no multiple of kLanes.
struct Whole {};
struct Some {
  int64_t count;
};

template <class T>
inline Floats load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline Floats load(const T* p, Some some) {  // the other lanes are zero
  T lanes[kLanes] = {};
  memcpy(lanes, p, some.count * sizeof(T));
  return load(lanes);
}
template <class T, class V>
inline void store(T* p, V x, Whole) {
  store(p, x);
}
template <class T, class V>
inline void store(T* p, V x, Some some) {
  T lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, some.count * sizeof(T));
}
// Masks of the CPU, where it has some, are several times as fast: rows that a mesh splits by width are short.
#if defined(ULTRAMEM_AVX512)
inline __mmask16 mask_of(Some some) { return static_cast<__mmask16>((1u << some.count) - 1); }
inline Floats load(const float* p, Some some) { return (Floats)_mm512_maskz_loadu_ps(mask_of(some), p); }
inline Floats load(const Bfloat16* p, Some some) {
  return (Floats)(__builtin_convertvector((Halves)_mm256_maskz_loadu_epi16(mask_of(some), p), Words) << 16);
}
inline void store(float* p, Floats x, Some some) { _mm512_mask_storeu_ps(p, mask_of(some), (__m512)x); }
#elif defined(__AVX2__)
inline __m256i mask_of(Some some) {
  static const int32_t ones_and_zeros[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return load_vector<__m256i>(ones_and_zeros + kLanes - some.count);
}
inline Floats load(const float* p, Some some) { return (Floats)_mm256_maskload_ps(p, mask_of(some)); }
inline void store(float* p, Floats x, Some some) { _mm256_maskstore_ps(p, mask_of(some), (__m256)x); }
#endif
// x, with zeros in the lanes that do not count
inline Floats only(Floats x, Whole) { return x; }
inline Floats only(Floats x, Some some) {
  float lanes[kLanes];
  store(lanes, x);
  return load(lanes, some);
}

// Calls body(e, lanes) for the vectors that begin at e = begin, begin + kLanes, ... and end before `end`.
template <class Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t e = begin;
  for (; e + kLanes <= end; e += kLanes) body(e, Whole{});
  if (e < end) body(e, Some{end - e});
}

// Sums, the lowest and the highest of all lanes.
#if defined(ULTRAMEM_AVX512)
inline float sum(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline int32_t lowest(Ints x) { return _mm512_reduce_min_epi32((__m512i)x); }
inline int32_t highest(Ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
#else
template <class Lane, class V, class Join>
inline Lane joined(V x, Join join) {
  Lane lanes[kLanes];
  store_vector(lanes, x);
  for (int n = kLanes / 2; n >= 1; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] = join(lanes[i], lanes[i + n]);
  return lanes[0];
}
#if defined(__AVX2__)
inline float sum(Floats x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#elif defined(__aarch64__)
inline float sum(Floats x) { return vaddvq_f32((float32x4_t)x); }
#else
inline float sum(Floats x) {
  return joined<float>(x, [](float a, float b) { return a + b; });
}
#endif
inline int32_t sum(Ints x) {
  return joined<int32_t>(x, [](int32_t a, int32_t b) { return a + b; });
}
inline int32_t lowest(Ints x) {
  return joined<int32_t>(x, [](int32_t a, int32_t b) { return a < b ? a : b; });
}
inline int32_t highest(Ints x) {
  return joined<int32_t>(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
}
#endif

// Writes the sums of all lanes of four vectors.
inline void sums(Floats a, Floats b, Floats c, Floats d, float* to) {
#if defined(__AVX2__)
#if defined(ULTRAMEM_AVX512)
  const auto half = [](Floats x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
#else
  const auto half = [](Floats x) { return (__m256)x; };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

inline Ints max(Ints a, Ints b) { return a > b ? a : b; }
inline Ints min(Ints a, Ints b) { return a < b ? a : b; }

inline Floats square_root(Floats x) {
#if defined(ULTRAMEM_AVX512)
  return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // GCC 12 warns of the one without a mask
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Bit i tells whether lane i of a is greater than that of b.
inline uint32_t greater_bits(Ints a, Ints b) {
#if defined(ULTRAMEM_AVX512)
  uint32_t bits = _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
  asm("" : "+r"(bits));  // GCC 12 spills the mask as 16 bits and reads 32 (found by AddressSanitizer's build)
  return bits;
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a > b)));
#else
  const Ints bit = {1, 2, 4, 8};
  return static_cast<uint32_t>(sum((a > b) & bit));
#endif
}

// Writes the lanes of x whose bits are set, one after the other; up to kLanes numbers are overwritten.
inline void store_chosen(int32_t* to, Ints x, uint32_t bits) {
#if defined(ULTRAMEM_AVX512)
  store_vector(to, (Ints)_mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)x));
#else
  for (; bits; bits &= bits - 1) *to++ = x[__builtin_ctz(bits)];
#endif
}

// The number of the lane in each lane.
inline Ints lane_numbers() {
  Ints n;
  for (int i = 0; i < kLanes; i++) n[i] = i;
  return n;
}

// Transposes 4 × 4 numbers; rows of `from` and `to` are so many numbers apart.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define ULTRAMEM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int32_t Places __attribute__((vector_size(16)));
#define ULTRAMEM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif
  const Four a = load_vector<Four>(from), b = load_vector<Four>(from + from_stride);
  const Four c = load_vector<Four>(from + 2 * from_stride), d = load_vector<Four>(from + 3 * from_stride);
  const Four ab_low = ULTRAMEM_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = ULTRAMEM_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = ULTRAMEM_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = ULTRAMEM_SHUFFLE(c, d, 2, 6, 3, 7);
  store_vector(to, ULTRAMEM_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  store_vector(to + to_stride, ULTRAMEM_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  store_vector(to + 2 * to_stride, ULTRAMEM_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  store_vector(to + 3 * to_stride, ULTRAMEM_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
#undef ULTRAMEM_SHUFFLE
}

// to[e] = from[e], between float32 and bfloat16 if they differ
template <class To, class From>
inline void copy_values(To* to, const From* from, int64_t count) {
  for_vectors(0, count, [&](int64_t e, auto lanes) { store(to + e, load(from + e, lanes), lanes); });
}

// total[e] += weight · x[e]
template <class T>
inline void add_scaled(float* total, float weight, const T* x, int64_t width) {
  const Floats w = splat(weight);
  for_vectors(0, width, [&](int64_t e, auto lanes) {
    store(total + e, load(total + e, lanes) + w * load(x + e, lanes), lanes);
  });
}

// total[e] += weights[slice of e] · x[e]
template <class X, class T>
inline void add_slices(float* total, const T* weights, int64_t slices, const X* x, int64_t width) {
  const int64_t slice = width / slices;
  for (int64_t c = 0; c < slices; c++) add_scaled(total + c * slice, load_one(weights + c), x + c * slice, slice);
}

// Σ a[e] · b[e]
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t width) {
  Floats sums = {};
  for_vectors(0, width, [&](int64_t e, auto lanes) { sums += load(a + e, lanes) * load(b + e, lanes); });
  return sum(sums);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }
template <class T>
inline void prefetch_row(const T* row, int64_t width) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) prefetch(p + i);
}

}  // namespace ultramem
