// The operations of the engine, on plain arrays: rows of channels, the channels contiguous.
//
// Signs are packed 32 to a word, in two planes: which are negative, and which are not zero. The planes of a
// weight matrix are word-major, (words, outputs). One source, `operations.cpp`, is compiled for each vector unit
// into a table of these functions.
#pragma once

#include <cstdint>
#include <functional>

namespace bvit {

// Runs tasks 0 to count - 1, possibly at once, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>&)>;

template <typename T>
struct Product {
  const T* move;             // (inputs)
  const uint32_t* negative;  // (words, outputs)
  const uint32_t* nonzero;   // the same, or null where no weight is zero
  int64_t inputs, outputs;
  bool bit;  // the sign of an input of zero is 1
  int64_t words() const { return (inputs + 31) / 32; }
};

template <typename T>
struct Unit {
  Product<T> product;
  const T *factor, *shift, *slope, *move2;  // (outputs)
};

template <typename T>
struct End {
  const T *alpha, *move, *factor, *shift;  // (outputs)
};

template <typename T>
struct Attention {
  const T *query_move, *key_move, *value_move;  // (channels)
  const T *factor, *shift, *slope, *move2;      // (channels)
  const T* prob_scale;                          // one value
  int64_t images, queries, keys, channels, heads, reduction;
};

template <typename T>
struct Operations {
  // The exact product of signs, (rows, outputs).
  void (*count)(const ParallelFor&, const T* x, const Product<T>&, int64_t rows, T* y);
  // RPReLU(product * factor + shift + shortcut); the shortcut has a divisor of the outputs, and is tiled.
  void (*unit)(const ParallelFor&, const T* x, const Unit<T>&, const T* shortcut, int64_t width, int64_t rows, T* y);
  // The same, scaled and added to the residual, r, and normalised, n.
  void (*unit_end)(const ParallelFor&, const T* x, const Unit<T>&, const T* shortcut, int64_t width, const T* residual,
                   const End<T>&, int64_t rows, T* r, T* n);
  // Two units, whose hidden layer stays in cache.
  void (*feed_forward)(const ParallelFor&, const T* x, const Unit<T>& expand, const Unit<T>& contract,
                       const T* residual, const End<T>&, int64_t rows, T* r, T* n);
  void (*attention)(const ParallelFor&, const T* q, const T* k, const T* v, const Attention<T>&, T* y);
  // The average of each square of tokens.
  void (*pool)(const ParallelFor&, const T* x, int64_t images, int64_t side, int64_t channels, int64_t size, T* y);
  // A unit of the 2x2 patches of n, whose shortcut is their average, with positions added, x, and normalised, n.
  void (*downsample)(const ParallelFor&, const T* n, const Unit<T>&, const T* positions, const T* factor,
                     const T* shift, int64_t images, int64_t side, T* x_out, T* n_out);
  // x plus a stencil of n: taps are (centre, rows 1 and 2 away, columns 1 and 2 away), each (channels).
  void (*branches)(const ParallelFor&, const T* n, const T* x, const T* taps, int64_t images, int64_t side,
                   int64_t channels, T* y);
};

}  // namespace bvit
