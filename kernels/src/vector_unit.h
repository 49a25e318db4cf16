// What differs between vector units: counting bits and packing signs. A block is 32 outputs.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(BVIT_AVX512) || defined(BVIT_AVX2)
#include <immintrin.h>
#elif defined(BVIT_NEON)
#include <arm_neon.h>
#endif

#define BVIT_INLINE inline __attribute__((always_inline))

namespace bvit {
namespace {

constexpr int kBlock = 32;
constexpr int kGroup = 4;  // rows that share the loads of a block

#if defined(BVIT_AVX512)
constexpr int kBytes = 64;
#elif defined(BVIT_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct Signs {
  uint32_t negative, nonzero;
};

// As many numbers as the vector unit takes at once.
template <typename T>
struct Vectors {
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

  static BVIT_INLINE Vector load(const T* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static BVIT_INLINE Integers integers(const int32_t* from) {
    Integers x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static BVIT_INLINE void store(T* to, Vector x) { __builtin_memcpy(to, &x, sizeof(x)); }

  // The same for the first `lanes` only, of which there may be fewer than a vector has.
  static BVIT_INLINE Vector load(const T* from, int64_t lanes) {
    if (lanes >= kLanes) return load(from);
    T values[kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) values[i] = from[i];
    return load(values);
  }
  static BVIT_INLINE void store(T* to, Vector x, int64_t lanes) {
    if (lanes >= kLanes) return store(to, x);
    for (int64_t i = 0; i < lanes; ++i) to[i] = x[i];
  }

  static BVIT_INLINE Signs signs(Vector x) {
#if defined(BVIT_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      const __m512 zero = _mm512_setzero_ps();
      return {_mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), _mm512_cmp_ps_mask(x, zero, _CMP_NEQ_UQ)};
    }
#elif defined(BVIT_AVX2)
    if constexpr (std::is_same_v<T, float>) {
      const __m256 zero = _mm256_setzero_ps();
      return {static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, zero, _CMP_LT_OQ))),
              static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, zero, _CMP_NEQ_UQ)))};
    }
#endif
    Signs signs{0, 0};
    for (int i = 0; i < kLanes; ++i) {
      signs.negative |= static_cast<uint32_t>(x[i] < 0) << i;
      signs.nonzero |= static_cast<uint32_t>(x[i] != 0) << i;
    }
    return signs;
  }
};

template <typename T>
BVIT_INLINE T sum_of(typename Vectors<T>::Vector x) {
#if defined(BVIT_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps(x);
#endif
  T sum = x[0];
  for (int i = 1; i < Vectors<T>::kLanes; ++i) sum += x[i];
  return sum;
}

template <typename T>
BVIT_INLINE int32_t largest_of(typename Vectors<T>::Integers x) {
#if defined(BVIT_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(x));
#endif
  int32_t largest = x[0];
  for (int i = 1; i < Vectors<T>::kLanes; ++i) largest = largest > x[i] ? largest : x[i];
  return largest;
}

// The population count in arithmetic that a compiler makes vectors of; recognised where there is an instruction.
inline int32_t count_ones(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  x += x >> 8;
  return static_cast<int32_t>((x + (x >> 16)) & 63u);
}

// --- counting ------------------------------------------------------------------------------------

// What is counted of the bits of a row and of 32 outputs, word by word: with `Xor` the product of signs, `terms` less
// twice the bits that differ; with `And` the bits that both have.
struct Xor {};
struct And {};

// Integers in memory, (rows, 32).
struct Stored {
  const int32_t* y;

  template <typename T>
  BVIT_INLINE typename Vectors<T>::Vector get(int row, int first) const {
    return __builtin_convertvector(Vectors<T>::integers(y + row * kBlock + first), typename Vectors<T>::Vector);
  }
};

#if defined(BVIT_AVX512)

// Those of a group of rows in registers.
struct Counts {
  __m512i low[kGroup], high[kGroup];

  template <typename T>
  BVIT_INLINE typename Vectors<T>::Vector get(int row, int first) const {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_cvtepi32_ps(first == 0 ? low[row] : high[row]);
    } else {
      const __m512i half = first < 16 ? low[row] : high[row];
      return _mm512_cvtepi32_pd(first % 16 == 0 ? _mm512_castsi512_si256(half) : _mm512_extracti64x4_epi64(half, 1));
    }
  }

  BVIT_INLINE void store(int32_t* y, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      _mm512_storeu_si512(y + r * stride, low[r]);
      _mm512_storeu_si512(y + r * stride + 16, high[r]);
    }
  }
};

template <typename Op>
BVIT_INLINE __m512i combine(__m512i a, __m512i b) {
  if constexpr (std::is_same_v<Op, Xor>) return _mm512_xor_si512(a, b);
  return _mm512_and_si512(a, b);
}

template <typename Op>
BVIT_INLINE Counts count_bits(const uint32_t* const* rows, const uint32_t* block, int64_t words, int32_t terms) {
  Counts counts;
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) counts.low[r] = counts.high[r] = _mm512_setzero_si512();
  for (int64_t word = 0; word < words; ++word) {
    const __m512i a = _mm512_loadu_si512(block + word * kBlock), b = _mm512_loadu_si512(block + word * kBlock + 16);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(rows[r][word]));
      counts.low[r] = _mm512_add_epi32(counts.low[r], _mm512_popcnt_epi32(combine<Op>(x, a)));
      counts.high[r] = _mm512_add_epi32(counts.high[r], _mm512_popcnt_epi32(combine<Op>(x, b)));
    }
  }
  if constexpr (std::is_same_v<Op, Xor>) {
    const __m512i all = _mm512_set1_epi32(terms);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      counts.low[r] = _mm512_sub_epi32(all, _mm512_add_epi32(counts.low[r], counts.low[r]));
      counts.high[r] = _mm512_sub_epi32(all, _mm512_add_epi32(counts.high[r], counts.high[r]));
    }
  }
  return counts;
}

// Returns e^-(i / sqrt(size)) of 16 whole numbers i below 256, from tables of i % 16 and of i / 16.
BVIT_INLINE Vectors<float>::Vector exponentials(Vectors<float>::Integers i, const float* tables) {
  const auto index = reinterpret_cast<__m512i>(i);
  const __m512 low = _mm512_permutexvar_ps(index, _mm512_loadu_ps(tables));
  return low * _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), _mm512_loadu_ps(tables + 16));
}

#else

// Those of a group of rows, of which the first `rows` are wanted.
struct Counts {
  alignas(64) int32_t y[kGroup * kBlock];

  template <typename T>
  BVIT_INLINE typename Vectors<T>::Vector get(int row, int first) const {
    return Stored{y}.get<T>(row, first);
  }

  void store(int32_t* to, int64_t stride) const {
    for (int r = 0; r < kGroup; ++r)
      for (int i = 0; i < kBlock; ++i) to[r * stride + i] = y[r * kBlock + i];
  }
};

#if defined(BVIT_AVX2)

template <typename Op>
BVIT_INLINE __m256i combine(__m256i a, __m256i b) {
  if constexpr (std::is_same_v<Op, Xor>) return _mm256_xor_si256(a, b);
  return _mm256_and_si256(a, b);
}

// The bits of each byte are looked up; sums of bytes are widened before they overflow.
template <typename Op>
BVIT_INLINE Counts count_bits(const uint32_t* const* rows, const uint32_t* block, int64_t words, int32_t terms) {
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15), ones8 = _mm256_set1_epi8(1);
  // The sums of bytes are multiplied as they are widened.
  const __m256i factor = _mm256_set1_epi16(std::is_same_v<Op, Xor> ? -2 : 1);
  constexpr int kRows = 2, kLongest = 31;
  Counts counts;
  for (int first = 0; first < kGroup; first += kRows) {
    const uint32_t* const* own = rows + first;
    __m256i sums[4 * kRows];
    const __m256i before = _mm256_set1_epi32(std::is_same_v<Op, Xor> ? terms : 0);
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kRows; ++i) sums[i] = before;
    for (int64_t start = 0; start < words; start += kLongest) {
      const int64_t end = words < start + kLongest ? words : start + kLongest;
      __m256i bytes[4 * kRows];
#pragma GCC unroll 8
      for (int i = 0; i < 4 * kRows; ++i) bytes[i] = _mm256_setzero_si256();
      for (int64_t word = start; word < end; ++word) {
        const auto* other = reinterpret_cast<const __m256i*>(block + word * kBlock);
#pragma GCC unroll 8
        for (int i = 0; i < 4 * kRows; ++i) {
          const __m256i x = _mm256_set1_epi32(static_cast<int>(own[i / 4][word]));
          const __m256i bits = combine<Op>(x, _mm256_loadu_si256(other + i % 4));
          const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble));
          const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
          bytes[i] = _mm256_add_epi8(bytes[i], _mm256_add_epi8(low, high));
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 4 * kRows; ++i)
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(bytes[i], ones8), factor));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kRows; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts.y + first * kBlock + 8 * i), sums[i]);
  }
  return counts;
}

#else

template <typename Op>
inline Counts count_bits(const uint32_t* const* rows, const uint32_t* block, int64_t words, int32_t terms) {
  Counts counts = {};
  for (int r = 0; r < kGroup; ++r) {
    int32_t* sums = counts.y + r * kBlock;
    for (int64_t word = 0; word < words; ++word) {
      const uint32_t x = rows[r][word];
      const uint32_t* other = block + word * kBlock;
#if defined(BVIT_NEON)
      const uint32x4_t repeated = vdupq_n_u32(x);
      for (int i = 0; i < kBlock; i += 4) {
        const uint32x4_t y = vld1q_u32(other + i);
        const uint32x4_t bits = std::is_same_v<Op, Xor> ? veorq_u32(repeated, y) : vandq_u32(repeated, y);
        const uint32x4_t ones = vpaddlq_u16(vpaddlq_u8(vcntq_u8(vreinterpretq_u8_u32(bits))));
        vst1q_s32(sums + i, vaddq_s32(vld1q_s32(sums + i), vreinterpretq_s32_u32(ones)));
      }
#else
      for (int i = 0; i < kBlock; ++i) sums[i] += count_ones(std::is_same_v<Op, Xor> ? x ^ other[i] : x & other[i]);
#endif
    }
    if (std::is_same_v<Op, Xor>)
      for (int i = 0; i < kBlock; ++i) sums[i] = terms - 2 * sums[i];
  }
  return counts;
}

#endif
#endif

// --- sums of neighbours --------------------------------------------------------------------------

#if defined(BVIT_AVX512) || defined(BVIT_AVX2)

// Sets the sums of each `size` neighbours of a block, and returns whether it knows that size.
BVIT_INLINE bool set_group_sums(const float* y, int64_t size, float* sums) {
  if (size != 2 && size != 4 && size != 8) return false;
  const __m256 a = _mm256_loadu_ps(y), b = _mm256_loadu_ps(y + 8), c = _mm256_loadu_ps(y + 16),
               d = _mm256_loadu_ps(y + 24);
  const __m256 ab = _mm256_hadd_ps(a, b),
               cd = _mm256_hadd_ps(c, d);  // in each half: two of the first, two of the second
  if (size == 2) {
    const auto ordered = [](__m256 x) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0b11011000));
    };
    _mm256_storeu_ps(sums, ordered(ab));
    _mm256_storeu_ps(sums + 8, ordered(cd));
    return true;
  }
  const __m256 fours = _mm256_hadd_ps(ab, cd);
  if (size == 4) {
    _mm256_storeu_ps(sums, _mm256_permutevar8x32_ps(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  } else {
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
  }
  return true;
}

#endif

template <typename T>
inline bool set_group_sums(const T*, int64_t, T*) {
  return false;
}

}  // namespace
}  // namespace bvit
