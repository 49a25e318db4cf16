// The operations, once for each vector unit; includes `vector_unit.h`, whose choice of intrinsics is a macro.
#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_unit.h"

#define BVIT_ALWAYS __attribute__((always_inline))

namespace bvit {
namespace {

constexpr int64_t kTile = 64;  // rows per task; their signs and one block of
                               // weights fit the first cache

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Signs of some rows.
class Rows {
 public:
  Rows(int64_t rows, int64_t words) : words_(words), negative_(rows * words), nonzero_(rows * words), zeros_(rows) {}

  // Sets one word of a row, whose bits are those of `lanes` values.
  BVIT_INLINE void set(int64_t row, int64_t word, Signs signs, int64_t lanes, bool bit) {
    const uint32_t all = lanes >= kBlock ? ~0u : (1u << lanes) - 1;
    if (bit) signs.nonzero = all;
    negative_[row * words_ + word] = signs.negative;
    nonzero_[row * words_ + word] = signs.nonzero;
    zeros_[row] |= signs.nonzero != all;
  }

  void clear() { std::fill(zeros_.begin(), zeros_.end(), 0); }
  const uint32_t* negative(int64_t row) const { return &negative_[row * words_]; }
  const uint32_t* nonzero(int64_t row) const { return &nonzero_[row * words_]; }
  bool zeros(int64_t row) const { return zeros_[row]; }
  int64_t words() const { return words_; }

 private:
  int64_t words_;
  std::vector<uint32_t> negative_, nonzero_;
  std::vector<char> zeros_;
};

template <typename T>
BVIT_INLINE void pack_row(const T* x, const T* move, int64_t channels, bool bit, int64_t row, Rows& rows) {
  using V = Vectors<T>;
  for (int64_t first = 0; first < channels; first += kBlock) {
    Signs signs{0, 0};
    const int64_t lanes = std::min<int64_t>(kBlock, channels - first);
    for (int i = 0; i < lanes; i += V::kLanes) {
      const Signs some = V::signs(V::load(x + first + i, lanes - i) + V::load(move + first + i, lanes - i));
      signs.negative |= some.negative << i;
      signs.nonzero |= some.nonzero << i;
    }
    rows.set(row, first / kBlock, signs, lanes, bit);
  }
}

// 32 outputs of a matrix of signs, word after word.
class Block {
 public:
  explicit Block(int64_t words) : negative_(words * kBlock), nonzero_(words * kBlock) {}

  void load(const uint32_t* negative, const uint32_t* nonzero, int64_t words, int64_t outputs, int64_t first) {
    lanes_ = std::min<int64_t>(kBlock, outputs - first);
    zeros_ = nonzero != nullptr;
    copy(negative, words, outputs, first, negative_);
    if (zeros_) copy(nonzero, words, outputs, first, nonzero_);
  }

  int64_t lanes() const { return lanes_; }
  bool zeros() const { return zeros_; }
  const uint32_t* negative() const { return negative_.data(); }
  const uint32_t* nonzero() const { return nonzero_.data(); }

 private:
  void copy(const uint32_t* from, int64_t words, int64_t outputs, int64_t first, std::vector<uint32_t>& to) {
    for (int64_t word = 0; word < words; ++word) {
      std::copy_n(from + word * outputs + first, lanes_, &to[word * kBlock]);
      std::fill_n(&to[word * kBlock] + lanes_, kBlock - lanes_, 0);
    }
  }

  int64_t lanes_ = 0;
  bool zeros_ = false;
  std::vector<uint32_t> negative_, nonzero_;
};

// The product of one row with a block where signs of either may be zero.
inline void product_with_zeros(const uint32_t* negative, const uint32_t* nonzero, const uint32_t* block_negative,
                               const uint32_t* block_nonzero, int64_t words, int32_t* y) {
  std::fill_n(y, kBlock, 0);
  for (int64_t word = 0; word < words; ++word) {
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t both = block_nonzero ? nonzero[word] & block_nonzero[word * kBlock + i] : nonzero[word];
      const uint32_t unequal = both & (negative[word] ^ block_negative[word * kBlock + i]);
      y[i] += count_ones(both) - 2 * count_ones(unequal);
    }
  }
}

// Pointers to the signs of a group of rows; the last one is repeated where there are fewer.
struct Group {
  Group(const Rows& rows, int64_t first, int64_t count) {
    for (int64_t r = 0; r < kGroup; ++r) pointers[r] = rows.negative(first + std::min(r, count - 1));
    for (int64_t r = 0; r < count; ++r) zeros |= rows.zeros(first + r);
  }

  const uint32_t* pointers[kGroup];
  bool zeros = false;
};

// Calls then(first output, lanes) for every block of outputs, and what it returns, (first row, rows, counts), for every
// group of rows.
template <typename T, typename Then>
void for_products(const Rows& rows, int64_t count, const Product<T>& p, Then&& then) {
  Block block(p.words());
  for (int64_t first = 0; first < p.outputs; first += kBlock) {
    block.load(p.negative, p.nonzero, p.words(), p.outputs, first);
    auto&& each = then(first, block.lanes());
    for (int64_t row = 0; row < count; row += kGroup) {
      const int64_t size = std::min<int64_t>(kGroup, count - row);
      const Group group(rows, row, size);
      if (!block.zeros() && !group.zeros) {
        each(row, size, count_bits<Xor>(group.pointers, block.negative(), p.words(), static_cast<int32_t>(p.inputs)));
        continue;
      }
      int32_t y[kGroup * kBlock];
      for (int64_t r = 0; r < size; ++r)
        product_with_zeros(rows.negative(row + r), rows.nonzero(row + r), block.negative(),
                           block.zeros() ? block.nonzero() : nullptr, p.words(), y + r * kBlock);
      each(row, size, Stored{y});
    }
  }
}

// Calls prepare(first lane, how many are left), and what it returns, (row), for the vectors of a group of rows.
template <typename T, typename Prepare>
BVIT_INLINE void each_vector(int64_t rows, int64_t lanes, Prepare&& prepare) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; i += Vectors<T>::kLanes) {
    if (i >= lanes) break;
    auto&& body = prepare(i, lanes - i);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (r < rows) body(r);
  }
}

// The same, with code of its own for what is whole.
template <typename T, typename Prepare>
BVIT_INLINE void for_vectors(int64_t rows, int64_t lanes, Prepare&& prepare) {
  if (rows == kGroup && lanes == kBlock) {
    each_vector<T>(kGroup, kBlock, prepare);
  } else {
    each_vector<T>(rows, lanes, prepare);
  }
}

// RPReLU(product * factor + shift + shortcut) of one vector.
template <typename T>
struct Activation {
  using V = Vectors<T>;
  using Vector = typename V::Vector;

  BVIT_INLINE Activation(const Unit<T>& u, int64_t first, int64_t lanes)
      : factor(V::load(u.factor + first, lanes)),
        shift(V::load(u.shift + first, lanes)),
        slope(V::load(u.slope + first, lanes)),
        move2(V::load(u.move2 + first, lanes)) {}

  BVIT_INLINE Vector operator()(Vector product, Vector shortcut) const {
    const Vector sum = product * factor + shift + shortcut;
    return (sum > 0 ? sum : sum * slope) + move2;
  }

  Vector factor, shift, slope, move2;
};

// The end of a branch of one vector.
template <typename T>
struct Ending {
  using V = Vectors<T>;
  using Vector = typename V::Vector;

  BVIT_INLINE Ending(const End<T>& end, int64_t first, int64_t lanes)
      : alpha(V::load(end.alpha + first, lanes)),
        move(V::load(end.move + first, lanes)),
        factor(V::load(end.factor + first, lanes)),
        shift(V::load(end.shift + first, lanes)) {}

  BVIT_INLINE void operator()(Vector y, const T* residual, int64_t lanes, T* r, T* n) const {
    const Vector sum = V::load(residual, lanes) + (y * alpha + move);
    V::store(r, sum, lanes);
    V::store(n, sum * factor + shift, lanes);
  }

  Vector alpha, move, factor, shift;
};

// The rows of a shortcut of `width` channels, tiled, at the outputs of one block.
template <typename T>
class Shortcut {
 public:
  Shortcut(const T* values, int64_t width, int64_t first, int64_t lanes)
      : values_(values), width_(width), first_(first % width), lanes_(lanes), whole_(first_ + lanes <= width) {}

  // Sets pointers to the rows; those that are no part of memory are made in `scratch`.
  void at(int64_t row, int64_t rows, T* scratch, const T** pointers) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* own = values_ + (row + r) * width_;
      pointers[r] = whole_ ? own + first_ : scratch + r * kBlock;
      if (whole_) continue;
      for (int64_t i = 0; i < lanes_; ++i) scratch[r * kBlock + i] = own[(first_ + i) % width_];
    }
  }

 private:
  const T* values_;
  int64_t width_, first_, lanes_;
  bool whole_;
};

// Splits rows into tiles of a size that keeps all threads busy.
template <typename Body>
void for_tiles(const ParallelFor& parallel, int64_t rows, int64_t largest, Body&& body) {
  const int64_t size = std::clamp<int64_t>((rows / 8 + kGroup - 1) / kGroup * kGroup, kGroup, largest);
  parallel((rows + size - 1) / size, [&](int64_t tile) { body(tile * size, std::min(size, rows - tile * size)); });
}

// Packs all rows with pack(row, index in its tile, signs), and calls `then` as `for_products` does.
template <typename T, typename Pack, typename Then>
void for_packed(const ParallelFor& parallel, const Product<T>& p, int64_t rows, Pack&& pack, Then&& then) {
  for_tiles(parallel, rows, kTile, [&](int64_t start, int64_t count) {
    Rows signs(count, p.words());
    for (int64_t row = 0; row < count; ++row) pack(start + row, row, signs);
    for_products(signs, count, p, [&](int64_t first, int64_t lanes) {
      return [&, start, each = then(first, lanes)](int64_t row, int64_t size, const auto& counts)
                 BVIT_ALWAYS { each(start + row, size, counts); };
    });
  });
}

// Packs the rows of x.
template <typename T>
auto packing(const T* x, const Product<T>& p) {
  return [x, &p](int64_t row, int64_t index, Rows& signs) {
    pack_row(x + row * p.inputs, p.move, p.inputs, p.bit, index, signs);
  };
}

template <typename T>
void count(const ParallelFor& parallel, const T* x, const Product<T>& p, int64_t rows, T* out) {
  for_packed(parallel, p, rows, packing(x, p), [&](int64_t first, int64_t lanes) {
    return [&, first, lanes](int64_t row, int64_t size, const auto& counts) BVIT_ALWAYS {
      for_vectors<T>(size, lanes, [&](int i, int64_t left) BVIT_ALWAYS {
        return [&, i, left](int r) BVIT_ALWAYS {
          Vectors<T>::store(out + (row + r) * p.outputs + first + i, counts.template get<T>(r, i), left);
        };
      });
    };
  });
}

// Computes a unit of packed rows, vector by vector: calls prepare(first output, how many are left), and what it
// returns, (row, vector), for the rows of a group.
template <typename T, typename Pack, typename Prepare>
void for_units(const ParallelFor& parallel, const Unit<T>& u, const T* shortcut, int64_t width, int64_t rows,
               Pack&& pack, Prepare&& prepare) {
  for_packed(parallel, u.product, rows, pack, [&](int64_t first, int64_t lanes) {
    const Shortcut<T> own(shortcut, width, first, lanes);
    return [&, first, lanes, own](int64_t row, int64_t size, const auto& counts) BVIT_ALWAYS {
      T scratch[kGroup * kBlock];
      const T* shortcuts[kGroup];
      own.at(row, size, scratch, shortcuts);
      for_vectors<T>(size, lanes, [&](int i, int64_t left) BVIT_ALWAYS {
        const Activation<T> activate(u, first + i, left);
        return [&, i, left, activate, finish = prepare(first + i, left)](int r) BVIT_ALWAYS {
          finish(row + r, activate(counts.template get<T>(r, i), Vectors<T>::load(shortcuts[r] + i, left)));
        };
      });
    };
  });
}

template <typename T>
void unit(const ParallelFor& parallel, const T* x, const Unit<T>& u, const T* shortcut, int64_t width, int64_t rows,
          T* out) {
  for_units(parallel, u, shortcut, width, rows, packing(x, u.product), [&](int64_t first, int64_t left) BVIT_ALWAYS {
    return [&, first, left](int64_t row, auto y)
               BVIT_ALWAYS { Vectors<T>::store(out + row * u.product.outputs + first, y, left); };
  });
}

// A unit and the end of its branch; the residual's rows begin again after `period` of them.
template <typename T, typename Pack>
void for_ends(const ParallelFor& parallel, const Unit<T>& u, const T* shortcut, int64_t width, const T* residual,
              int64_t period, const End<T>& end, int64_t rows, Pack&& pack, T* r, T* n) {
  for_units(parallel, u, shortcut, width, rows, pack, [&](int64_t first, int64_t left) BVIT_ALWAYS {
    return [&, first, left, ended = Ending<T>(end, first, left)](int64_t row, auto y) BVIT_ALWAYS {
      const int64_t outputs = u.product.outputs, place = row * outputs + first;
      const int64_t same = row < period ? row : row % period;
      ended(y, residual + same * outputs + first, left, r + place, n + place);
    };
  });
}

template <typename T>
void unit_end(const ParallelFor& parallel, const T* x, const Unit<T>& u, const T* shortcut, int64_t width,
              const T* residual, const End<T>& end, int64_t rows, T* r, T* n) {
  for_ends(parallel, u, shortcut, width, residual, rows, end, rows, packing(x, u.product), r, n);
}

// Adds the sums of each `size` neighbours of a block to those of their groups; the block begins with value `first`,
// which belongs to group `group`.
template <typename T>
BVIT_INLINE void add_groups(const T* y, int64_t first, int64_t group, int64_t lanes, int64_t size, T* sums) {
  if (lanes == kBlock && set_group_sums(y, size, sums + group)) return;
  for (int64_t i = 0; i < lanes; ++i) sums[(first + i) / size] += y[i];
}

template <typename T>
void feed_forward(const ParallelFor& parallel, const T* x, const Unit<T>& expand, const Unit<T>& contract,
                  const T* residual, const End<T>& end, int64_t rows, T* r_out, T* n_out) {
  using V = Vectors<T>;
  const Product<T>&wide = expand.product, &narrow = contract.product;
  const int64_t width = wide.inputs, outputs = narrow.outputs, size = narrow.inputs / outputs;
  for_tiles(parallel, rows, kTile, [&](int64_t start, int64_t count) {
    Rows signs(count, wide.words()), hidden(count, narrow.words());
    std::vector<T> shortcuts(count * outputs);
    for (int64_t row = 0; row < count; ++row)
      pack_row(x + (start + row) * width, wide.move, width, wide.bit, row, signs);
    for_products(signs, count, wide, [&](int64_t first, int64_t lanes) {
      return [&, first, lanes, first_group = first / size, own = Shortcut<T>(x + start * width, width, first, lanes)](
                 int64_t row, int64_t group, const auto& counts) BVIT_ALWAYS {
        T scratch[kGroup * kBlock];
        alignas(64) T value[kGroup * kBlock];
        const T* inputs[kGroup];
        Signs of_hidden[kGroup] = {};
        own.at(row, group, scratch, inputs);
        for_vectors<T>(group, lanes, [&](int i, int64_t left) BVIT_ALWAYS {
          return [&, i, left, activate = Activation<T>(expand, first + i, left),
                  move = V::load(narrow.move + first + i, left)](int r) BVIT_ALWAYS {
            const auto y = activate(counts.template get<T>(r, i), V::load(inputs[r] + i, left));
            const Signs some = V::signs(y + move);
            V::store(value + r * kBlock + i, y);
            of_hidden[r].negative |= some.negative << i;
            of_hidden[r].nonzero |= some.nonzero << i;
          };
        });
        for (int64_t r = 0; r < group; ++r) {
          hidden.set(row + r, first / kBlock, of_hidden[r], lanes, narrow.bit);
          add_groups(value + r * kBlock, first, first_group, lanes, size, &shortcuts[(row + r) * outputs]);
        }
      };
    });
    const T share = 1 / static_cast<T>(size);
    for_products(hidden, count, narrow, [&](int64_t first, int64_t lanes) {
      return [&, first, lanes](int64_t row, int64_t group, const auto& counts) BVIT_ALWAYS {
        for_vectors<T>(group, lanes, [&](int i, int64_t left) BVIT_ALWAYS {
          return [&, i, left, activate = Activation<T>(contract, first + i, left),
                  ended = Ending<T>(end, first + i, left)](int r) BVIT_ALWAYS {
            const T* sums = &shortcuts[(row + r) * outputs + first + i];
            const int64_t place = (start + row + r) * outputs + first + i;
            const auto y = activate(counts.template get<T>(r, i), V::load(sums, left) * share);
            ended(y, residual + place, left, r_out + place, n_out + place);
          };
        });
      };
    });
  });
}

// The keys and values of one head of one image as matrices of signs: (words of a head, keys), (words of keys, head).
struct Head {
  Head(int64_t size, int64_t keys)
      : key_words(blocks_of(size)),
        value_words(blocks_of(keys)),
        key_negative(value_words * key_words * kBlock),
        key_nonzero(key_negative.size()),
        value_negative(key_words * value_words * kBlock),
        value_nonzero(value_negative.size()) {}

  template <typename T>
  void load(const T* k, const T* v, const T* key_move, const T* value_move, int64_t keys, int64_t channels,
            int64_t size) {
    std::fill(value_negative.begin(), value_negative.end(), 0);
    std::fill(value_nonzero.begin(), value_nonzero.end(), 0);
    key_zeros = value_zeros = false;
    Rows row(1, key_words);
    for (int64_t key = 0; key < keys; ++key) {
      row.clear();
      pack_row(k + key * channels, key_move, size, false, 0, row);
      key_zeros |= row.zeros(0);
      for (int64_t word = 0; word < key_words; ++word) {
        const int64_t place = (key / kBlock * key_words + word) * kBlock + key % kBlock;
        key_negative[place] = row.negative(0)[word];
        key_nonzero[place] = row.nonzero(0)[word];
      }
    }
    for (int64_t block = 0; block < key_words; ++block)
      for (int64_t word = 0; word < value_words; ++word)
        load_values(v + word * kBlock * channels + block * kBlock, value_move + block * kBlock, channels,
                    std::min<int64_t>(kBlock, keys - word * kBlock), std::min<int64_t>(kBlock, size - block * kBlock),
                    (block * value_words + word) * kBlock);
  }

  // Sets the words of up to 32 channels, a bit for each of up to 32 keys.
  template <typename T>
  void load_values(const T* v, const T* move, int64_t channels, int64_t keys, int64_t lanes, int64_t place) {
    alignas(64) int32_t negative[kBlock] = {}, nonzero[kBlock] = {};
    T shift[kBlock] = {};
    std::copy_n(move, lanes, shift);
    for (int64_t key = 0; key < keys; ++key) {
      const T* values = v + key * channels;
      const auto bit = static_cast<int32_t>(1u << key);
      const auto add = [&](int64_t i) {
        const T shifted = values[i] + shift[i];
        negative[i] |= shifted < 0 ? bit : 0;
        nonzero[i] |= shifted != 0 ? bit : 0;
      };
      if (lanes == kBlock) {
#pragma GCC ivdep
        for (int i = 0; i < kBlock; ++i) add(i);
      } else {
        for (int64_t i = 0; i < lanes; ++i) add(i);
      }
    }
    const uint32_t all = keys == kBlock ? ~0u : (1u << keys) - 1;
    for (int64_t i = 0; i < lanes; ++i) {
      value_negative[place + i] = static_cast<uint32_t>(negative[i]);
      value_nonzero[place + i] = static_cast<uint32_t>(nonzero[i]);
      value_zeros |= value_nonzero[place + i] != all;
    }
  }

  int64_t key_words, value_words;
  std::vector<uint32_t> key_negative, key_nonzero, value_negative, value_nonzero;
  bool key_zeros = false, value_zeros = false;
};

// Sums of the values, whose signs are a block, at the keys of each of four masks.
inline void sum_values(const uint32_t* const* masks, const uint32_t* negative, const uint32_t* nonzero, bool zeros,
                       int64_t words, const int32_t* attended, int32_t* y) {
  alignas(64) int32_t pairs[kGroup * kBlock];
  count_bits<And>(masks, negative, words, 0).store(y, kBlock);
  if (zeros) count_bits<And>(masks, nonzero, words, 0).store(pairs, kBlock);
  for (int r = 0; r < kGroup; ++r)
    for (int i = 0; i < kBlock; ++i)
      y[r * kBlock + i] = (zeros ? pairs[r * kBlock + i] : attended[r]) - 2 * y[r * kBlock + i];
}

// e^-(i / sqrt(size)) of whole numbers up to twice the size.
template <typename T>
class Exponentials {
 public:
  explicit Exponentials(int64_t size) : values_(2 * size + 1), tables_(32) {
    const T unit = 1 / std::sqrt(static_cast<T>(size));
    for (int64_t i = 0; i <= 2 * size; ++i) values_[i] = std::exp(-unit * i);
    for (int64_t i = 0; i < 16; ++i) {
      tables_[i] = std::exp(-unit * i);
      tables_[16 + i] = std::exp(-unit * 16 * i);
    }
  }

  typename Vectors<T>::Vector operator()(typename Vectors<T>::Integers i) const {
#if defined(BVIT_AVX512)
    if constexpr (std::is_same_v<T, float>)
      if (values_.size() <= 256) return exponentials(i, tables_.data());
#endif
    typename Vectors<T>::Vector y;
    for (int lane = 0; lane < Vectors<T>::kLanes; ++lane) y[lane] = values_[i[lane]];
    return y;
  }

 private:
  std::vector<T> values_, tables_;
};

// Which keys a query attends to: those whose probability is over half the scale. The scores, in whole blocks, are
// followed by the first one where there are no more keys.
template <typename T>
int32_t attend(int32_t* scores, int64_t keys, const Exponentials<T>& exponentials, T scale, T* scratch,
               uint32_t* mask) {
  const int64_t padded = blocks_of(keys) * kBlock;
  for (int64_t key = keys; key < padded; ++key) scores[key] = scores[0];
  using V = Vectors<T>;
  auto maxima = V::integers(scores);
  for (int64_t key = V::kLanes; key < padded; key += V::kLanes) {
    const auto others = V::integers(scores + key);
    maxima = others > maxima ? others : maxima;
  }
  const int32_t largest = largest_of<T>(maxima);
  typename V::Vector partial = {};
  for (int64_t key = 0; key < padded; key += V::kLanes) {
    auto x = exponentials(largest - V::integers(scores + key));
    if (key + V::kLanes > keys)
      for (int64_t i = std::max<int64_t>(0, keys - key); i < V::kLanes; ++i) x[i] = 0;
    V::store(scratch + key, x);
    partial += x;
  }
  const T sum = sum_of<T>(partial);
  const T limit = scale > 0 ? scale * sum / 2 : std::numeric_limits<T>::infinity();
  int32_t attended = 0;
  for (int64_t word = 0; word < padded / kBlock; ++word) {
    mask[word] = 0;
    for (int i = 0; i < kBlock; i += V::kLanes)
      mask[word] |= V::signs(limit - V::load(scratch + word * kBlock + i)).negative << i;
    attended += count_ones(mask[word]);
  }
  return attended;
}

template <typename T>
void attention(const ParallelFor& parallel, const T* q, const T* k, const T* v, const Attention<T>& a, T* out) {
  constexpr int64_t kQueries = 512;
  const int64_t size = a.channels / a.heads, parts = (a.queries + kQueries - 1) / kQueries;
  const auto side = static_cast<int64_t>(std::llround(std::sqrt(static_cast<double>(a.queries))));
  using V = Vectors<T>;
  const Unit<T> after{{}, a.factor, a.shift, a.slope, a.move2};
  const Exponentials<T> exponentials(size);
  std::vector<int64_t> key_of(a.queries);  // whose key and value are its shortcut
  for (int64_t token = 0; token < a.queries; ++token)
    key_of[token] =
        a.reduction == 1 ? token : token / side / a.reduction * (side / a.reduction) + token % side / a.reduction;

  parallel(a.images * a.heads * parts, [&](int64_t task) {
    const int64_t part = task % parts, head = task / parts % a.heads, image = task / parts / a.heads;
    const int64_t offset = head * size, start = part * kQueries, end = std::min(start + kQueries, a.queries);
    const T *keys = k + image * a.keys * a.channels + offset, *values = v + image * a.keys * a.channels + offset;
    Head own(size, a.keys);
    own.load(keys, values, a.key_move + offset, a.value_move + offset, a.keys, a.channels, size);
    Rows rows(kGroup, own.key_words);
    const int64_t padded = own.value_words * kBlock;
    std::vector<T> scratch(padded);
    std::vector<int32_t> scores(kGroup * padded);
    std::vector<uint32_t> masks(kGroup * own.value_words);
    alignas(64) int32_t y[kGroup * kBlock];
    const uint32_t* pointers[kGroup];
    for (int r = 0; r < kGroup; ++r) pointers[r] = &masks[r * own.value_words];

    for (int64_t query = start; query < end; query += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, end - query);
      rows.clear();
      for (int64_t r = 0; r < count; ++r)
        pack_row(q + (image * a.queries + query + r) * a.channels + offset, a.query_move + offset, size, false, r,
                 rows);
      const Group group(rows, 0, count);
      for (int64_t block = 0; block < own.value_words; ++block) {
        const int64_t place = block * own.key_words * kBlock;
        if (!own.key_zeros && !group.zeros) {
          count_bits<Xor>(group.pointers, &own.key_negative[place], own.key_words, static_cast<int32_t>(size))
              .store(&scores[block * kBlock], padded);
          continue;
        }
        for (int64_t r = 0; r < count; ++r)
          product_with_zeros(rows.negative(r), rows.nonzero(r), &own.key_negative[place],
                             own.key_zeros ? &own.key_nonzero[place] : nullptr, own.key_words,
                             &scores[r * padded + block * kBlock]);
      }
      int32_t attended[kGroup] = {};
      for (int64_t r = 0; r < count; ++r)
        attended[r] = attend(&scores[r * padded], a.keys, exponentials, *a.prob_scale, scratch.data(),
                             &masks[r * own.value_words]);
      for (int64_t block = 0; block < own.key_words; ++block) {
        const int64_t place = block * own.value_words * kBlock, first = offset + block * kBlock;
        const int64_t lanes = std::min<int64_t>(kBlock, size - block * kBlock);
        sum_values(pointers, &own.value_negative[place], &own.value_nonzero[place], own.value_zeros, own.value_words,
                   attended, y);
        for_vectors<T>(count, lanes, [&](int i, int64_t left) BVIT_ALWAYS {
          return [&, i, left, activate = Activation<T>(after, first + i, left)](int r) BVIT_ALWAYS {
            const int64_t shared = (image * a.keys + key_of[query + r]) * a.channels + first + i;
            const int64_t to = (image * a.queries + query + r) * a.channels + first + i;
            const auto shortcut = V::load(q + to, left) + (V::load(k + shared, left) + V::load(v + shared, left));
            V::store(out + to, activate(Stored{y}.get<T>(r, i), shortcut), left);
          };
        });
      }
    }
  });
}

template <typename T>
void pool(const ParallelFor& parallel, const T* x, int64_t images, int64_t side, int64_t channels, int64_t size,
          T* out) {
  const int64_t fewer = side / size;
  const T count = static_cast<T>(size * size);
  parallel(images * fewer, [&](int64_t task) {
    T* sums = out + task * fewer * channels;
    std::fill_n(sums, fewer * channels, 0);
    for (int64_t line = 0; line < size; ++line) {
      const T* from = x + (task * size + line) * side * channels;
      for (int64_t column = 0; column < fewer * size; ++column) {
        T* y = sums + column / size * channels;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) y[c] += from[column * channels + c];
      }
    }
    for (int64_t i = 0; i < fewer * channels; ++i) sums[i] /= count;
  });
}

template <typename T>
void downsample(const ParallelFor& parallel, const T* n, const Unit<T>& u, const T* positions, const T* factor,
                const T* shift, int64_t images, int64_t side, T* x_out, T* n_out) {
  const int64_t outputs = u.product.outputs, channels = u.product.inputs / 4, fewer = side / 2, tokens = fewer * fewer;
  const std::vector<T> ones(outputs, 1), zeros(outputs, 0);
  const End<T> end{ones.data(), zeros.data(), factor, shift};
  std::vector<T> means(images * tokens * channels);
  const auto pack = [&](int64_t row, int64_t index, Rows& signs) {
    const int64_t image = row / tokens, line = row % tokens / fewer, column = row % fewer;
    const T* corner = n + ((image * side + 2 * line) * side + 2 * column) * channels;
    const T* below = corner + side * channels;
    std::vector<T> patch(4 * channels);
    std::copy_n(corner, 2 * channels, patch.data());
    std::copy_n(below, 2 * channels, &patch[2 * channels]);
    T* mean = &means[row * channels];
    for (int64_t c = 0; c < channels; ++c)
      mean[c] = (corner[c] + corner[channels + c] + below[c] + below[channels + c]) / 4;
    pack_row(patch.data(), u.product.move, 4 * channels, false, index, signs);
  };
  for_ends(parallel, u, means.data(), channels, positions, tokens, end, images * tokens, pack, x_out, n_out);
}

template <typename T>
void branches(const ParallelFor& parallel, const T* n, const T* x, const T* taps, int64_t images, int64_t side,
              int64_t channels, T* out) {
  const std::vector<T> border(channels);
  const T *one_row = taps + channels, *two_rows = one_row + channels;
  const T *one_column = two_rows + channels, *two_columns = one_column + channels;
  parallel(images * side, [&](int64_t task) {
    const int64_t line = task % side;
    for (int64_t column = 0; column < side; ++column) {
      const T* centre = n + (task * side + column) * channels;
      const auto at = [&](int64_t down, int64_t right) {
        const bool inside = line + down >= 0 && line + down < side && column + right >= 0 && column + right < side;
        return inside ? centre + (down * side + right) * channels : border.data();
      };
      const T *up1 = at(-1, 0), *up2 = at(-2, 0), *down1 = at(1, 0), *down2 = at(2, 0);
      const T *left1 = at(0, -1), *left2 = at(0, -2), *right1 = at(0, 1), *right2 = at(0, 2);
      const T* base = x + (task * side + column) * channels;
      T* y = out + (task * side + column) * channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        y[c] = base[c] + taps[c] * centre[c] + one_row[c] * (up1[c] + down1[c]) + two_rows[c] * (up2[c] + down2[c]) +
               one_column[c] * (left1[c] + right1[c]) + two_columns[c] * (left2[c] + right2[c]);
      }
    }
  });
}

template <typename T>
constexpr Operations<T> kOperations{count<T>,     unit<T>, unit_end<T>,   feed_forward<T>,
                                    attention<T>, pool<T>, downsample<T>, branches<T>};

}  // namespace

#define BVIT_CONCAT_(a, b) a##b
#define BVIT_CONCAT(a, b) BVIT_CONCAT_(a, b)

const Operations<float>& BVIT_CONCAT(float_operations_, BVIT_NAME)() { return kOperations<float>; }
const Operations<double>& BVIT_CONCAT(double_operations_, BVIT_NAME)() { return kOperations<double>; }

}  // namespace bvit
