// The operations as targets of XLA's foreign function interface, in a Python module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "operations.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace bvit {

#define BVIT_DECLARE(name)                            \
  const Operations<float>& float_operations_##name(); \
  const Operations<double>& double_operations_##name();
BVIT_DECLARE(scalar)
#if defined(__x86_64__)
BVIT_DECLARE(avx2)
BVIT_DECLARE(avx512)
#elif defined(__aarch64__)
BVIT_DECLARE(neon)
#endif

namespace {

namespace nb = nanobind;
namespace ffi = xla::ffi;
using ffi::AnyBuffer;
template <typename T>
using Out = ffi::Result<T>;

// --- which vector unit ---------------------------------------------------------------------------

enum class VectorUnit { kScalar, kAvx2, kAvx512, kNeon };

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "neon"};

bool supported(VectorUnit unit) {
  switch (unit) {
    case VectorUnit::kScalar:
      return true;
#if defined(__x86_64__)
    case VectorUnit::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case VectorUnit::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vpopcntdq");
#elif defined(__aarch64__)
    case VectorUnit::kNeon:
      return true;
#endif
    default:
      return false;
  }
}

VectorUnit best() {
  for (VectorUnit unit : {VectorUnit::kAvx512, VectorUnit::kAvx2, VectorUnit::kNeon})
    if (supported(unit)) return unit;
  return VectorUnit::kScalar;
}

std::atomic<VectorUnit> current{VectorUnit::kScalar};

template <typename T>
const Operations<T>& operations() {
#define BVIT_OF(name) \
  (sizeof(T) == 4 ? (const void*)&float_operations_##name() : (const void*)&double_operations_##name())
  const void* table = BVIT_OF(scalar);
#if defined(__x86_64__)
  if (current == VectorUnit::kAvx2) table = BVIT_OF(avx2);
  if (current == VectorUnit::kAvx512) table = BVIT_OF(avx512);
#elif defined(__aarch64__)
  if (current == VectorUnit::kNeon) table = BVIT_OF(neon);
#endif
  return *static_cast<const Operations<T>*>(table);
}

// --- threads -------------------------------------------------------------------------------------

// Never destroyed: its threads may outlive the module.
Team& team() {
  static Team* const kTeam = new Team;
  return *kTeam;
}

ParallelFor parallel_on(const ffi::ThreadPool& pool) {
  return [threads = pool.num_threads()](int64_t count, const std::function<void(int64_t)>& task) {
    team().run(threads, count, task);
  };
}

// --- arguments -----------------------------------------------------------------------------------

int64_t last(const AnyBuffer& x) { return x.dimensions().back(); }

int64_t rows_of(const AnyBuffer& x) { return static_cast<int64_t>(x.element_count()) / last(x); }

template <typename T>
const T* data(const AnyBuffer& x) {
  return static_cast<const T*>(x.untyped_data());
}

template <typename T>
T* data(Out<AnyBuffer>& x) {
  return static_cast<T*>(x->untyped_data());
}

template <typename T>
Product<T> product_of(const AnyBuffer& move, const AnyBuffer& negative, const AnyBuffer& nonzero, bool bit) {
  return {data<T>(move), data<uint32_t>(negative), nonzero.element_count() ? data<uint32_t>(nonzero) : nullptr,
          last(move),    last(negative),           bit};
}

template <typename T>
Unit<T> unit_of(const AnyBuffer& move, const AnyBuffer& negative, const AnyBuffer& nonzero, const AnyBuffer& factor,
                const AnyBuffer& shift, const AnyBuffer& slope, const AnyBuffer& move2) {
  return {product_of<T>(move, negative, nonzero, false), data<T>(factor), data<T>(shift), data<T>(slope),
          data<T>(move2)};
}

// Calls a function with a value of the type of the engine's numbers.
template <typename Call>
ffi::Error for_type(const AnyBuffer& x, Call&& call) {
  if (x.element_type() == ffi::F32) {
    call(float{});
  } else if (x.element_type() == ffi::F64) {
    call(double{});
  } else {
    return ffi::Error::InvalidArgument("expected float32 or float64");
  }
  return ffi::Error::Success();
}

// --- targets -------------------------------------------------------------------------------------

ffi::Error count(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer move, AnyBuffer negative, AnyBuffer nonzero,
                 Out<AnyBuffer> y, bool bit) {
  return for_type(x, [&](auto zero) {
    using T = decltype(zero);
    operations<T>().count(parallel_on(pool), data<T>(x), product_of<T>(move, negative, nonzero, bit), rows_of(x),
                          data<T>(y));
  });
}

ffi::Error unit(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer move, AnyBuffer negative, AnyBuffer nonzero,
                AnyBuffer factor, AnyBuffer shift, AnyBuffer slope, AnyBuffer move2, AnyBuffer shortcut,
                Out<AnyBuffer> y) {
  return for_type(x, [&](auto zero) {
    using T = decltype(zero);
    operations<T>().unit(parallel_on(pool), data<T>(x),
                         unit_of<T>(move, negative, nonzero, factor, shift, slope, move2), data<T>(shortcut),
                         last(shortcut), rows_of(x), data<T>(y));
  });
}

ffi::Error unit_end(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer move, AnyBuffer negative, AnyBuffer nonzero,
                    AnyBuffer factor, AnyBuffer shift, AnyBuffer slope, AnyBuffer move2, AnyBuffer shortcut,
                    AnyBuffer residual, AnyBuffer alpha, AnyBuffer end_move, AnyBuffer end_factor, AnyBuffer end_shift,
                    Out<AnyBuffer> r, Out<AnyBuffer> n) {
  return for_type(x, [&](auto zero) {
    using T = decltype(zero);
    const End<T> end{data<T>(alpha), data<T>(end_move), data<T>(end_factor), data<T>(end_shift)};
    operations<T>().unit_end(parallel_on(pool), data<T>(x),
                             unit_of<T>(move, negative, nonzero, factor, shift, slope, move2), data<T>(shortcut),
                             last(shortcut), data<T>(residual), end, rows_of(x), data<T>(r), data<T>(n));
  });
}

ffi::Error feed_forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer move, AnyBuffer negative, AnyBuffer nonzero,
                        AnyBuffer factor, AnyBuffer shift, AnyBuffer slope, AnyBuffer move2, AnyBuffer narrow_move,
                        AnyBuffer narrow_negative, AnyBuffer narrow_nonzero, AnyBuffer narrow_factor,
                        AnyBuffer narrow_shift, AnyBuffer narrow_slope, AnyBuffer narrow_move2, AnyBuffer residual,
                        AnyBuffer alpha, AnyBuffer end_move, AnyBuffer end_factor, AnyBuffer end_shift,
                        Out<AnyBuffer> r, Out<AnyBuffer> n) {
  return for_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto expand = unit_of<T>(move, negative, nonzero, factor, shift, slope, move2);
    const auto contract = unit_of<T>(narrow_move, narrow_negative, narrow_nonzero, narrow_factor, narrow_shift,
                                     narrow_slope, narrow_move2);
    const End<T> end{data<T>(alpha), data<T>(end_move), data<T>(end_factor), data<T>(end_shift)};
    operations<T>().feed_forward(parallel_on(pool), data<T>(x), expand, contract, data<T>(residual), end, rows_of(x),
                                 data<T>(r), data<T>(n));
  });
}

ffi::Error attention(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer moves, AnyBuffer factor,
                     AnyBuffer shift, AnyBuffer slope, AnyBuffer move2, AnyBuffer prob_scale, Out<AnyBuffer> y,
                     int64_t heads, int64_t reduction) {
  return for_type(q, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = last(q), images = q.dimensions()[0];
    const T* shifts = data<T>(moves);
    const Attention<T> a{shifts,         shifts + channels, shifts + 2 * channels, data<T>(factor),
                         data<T>(shift), data<T>(slope),    data<T>(move2),        data<T>(prob_scale),
                         images,         q.dimensions()[1], k.dimensions()[1],     channels,
                         heads,          reduction};
    operations<T>().attention(parallel_on(pool), data<T>(q), data<T>(k), data<T>(v), a, data<T>(y));
  });
}

ffi::Error pool(ffi::ThreadPool threads, AnyBuffer x, Out<AnyBuffer> y, int64_t side, int64_t size) {
  return for_type(x, [&](auto zero) {
    using T = decltype(zero);
    operations<T>().pool(parallel_on(threads), data<T>(x), x.dimensions()[0], side, last(x), size, data<T>(y));
  });
}

ffi::Error downsample(ffi::ThreadPool pool, AnyBuffer n, AnyBuffer move, AnyBuffer negative, AnyBuffer nonzero,
                      AnyBuffer factor, AnyBuffer shift, AnyBuffer slope, AnyBuffer move2, AnyBuffer positions,
                      AnyBuffer norm_factor, AnyBuffer norm_shift, Out<AnyBuffer> x_out, Out<AnyBuffer> n_out,
                      int64_t side) {
  return for_type(n, [&](auto zero) {
    using T = decltype(zero);
    operations<T>().downsample(parallel_on(pool), data<T>(n),
                               unit_of<T>(move, negative, nonzero, factor, shift, slope, move2), data<T>(positions),
                               data<T>(norm_factor), data<T>(norm_shift), n.dimensions()[0], side, data<T>(x_out),
                               data<T>(n_out));
  });
}

ffi::Error branches(ffi::ThreadPool pool, AnyBuffer n, AnyBuffer x, AnyBuffer taps, Out<AnyBuffer> y, int64_t side) {
  return for_type(n, [&](auto zero) {
    using T = decltype(zero);
    operations<T>().branches(parallel_on(pool), data<T>(n), data<T>(x), data<T>(taps), n.dimensions()[0], side, last(n),
                             data<T>(y));
  });
}

}  // namespace

#define ARGS1 .Arg<AnyBuffer>()
#define ARGS2 ARGS1 ARGS1
#define ARGS4 ARGS2 ARGS2
#define ARGS8 ARGS4 ARGS4
#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

XLA_FFI_DEFINE_HANDLER(kCount, count, BIND ARGS4.Ret<AnyBuffer>().Attr<bool>("bit"));
XLA_FFI_DEFINE_HANDLER(kUnit, unit, BIND ARGS8 ARGS1.Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(kUnitEnd, unit_end, BIND ARGS8 ARGS4 ARGS2.Ret<AnyBuffer>().Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(kFeedForward, feed_forward, BIND ARGS8 ARGS8 ARGS4.Ret<AnyBuffer>().Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(kAttention, attention,
                       BIND ARGS8 ARGS1.Ret<AnyBuffer>().Attr<int64_t>("heads").Attr<int64_t>("reduction"));
XLA_FFI_DEFINE_HANDLER(kPool, pool, BIND ARGS1.Ret<AnyBuffer>().Attr<int64_t>("side").Attr<int64_t>("size"));
XLA_FFI_DEFINE_HANDLER(kDownsample, downsample,
                       BIND ARGS8 ARGS2 ARGS1.Ret<AnyBuffer>().Ret<AnyBuffer>().Attr<int64_t>("side"));
XLA_FFI_DEFINE_HANDLER(kBranches, branches, BIND ARGS2 ARGS1.Ret<AnyBuffer>().Attr<int64_t>("side"));

namespace {

template <typename Handler>
nb::capsule capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

using Floats = nb::ndarray<const float, nb::numpy, nb::ndim<2>, nb::c_contig>;
using Words = nb::ndarray<const uint32_t, nb::numpy, nb::ndim<2>, nb::c_contig>;
using Result = nb::ndarray<float, nb::numpy, nb::ndim<2>, nb::c_contig>;

void count_here(Floats x, Words negative, Words nonzero, Result y) {
  const std::vector<float> move(x.shape(1));
  const Product<float> p{move.data(),
                         negative.data(),
                         nonzero.size() ? nonzero.data() : nullptr,
                         static_cast<int64_t>(x.shape(1)),
                         static_cast<int64_t>(y.shape(1)),
                         false};
  const ParallelFor serial = [](int64_t count, const std::function<void(int64_t)>& task) {
    for (int64_t i = 0; i < count; ++i) task(i);
  };
  operations<float>().count(serial, x.data(), p, static_cast<int64_t>(x.shape(0)), y.data());
}

void choose(const std::string& name) {
  for (VectorUnit unit : {VectorUnit::kScalar, VectorUnit::kAvx2, VectorUnit::kAvx512, VectorUnit::kNeon}) {
    if (name != kNames[static_cast<int>(unit)]) continue;
    if (!supported(unit)) throw nb::value_error(("this CPU has no " + name).c_str());
    current = unit;
    return;
  }
  throw nb::value_error(("no vector unit " + name).c_str());
}

}  // namespace

NB_MODULE(_native, m) {
  current = best();
  m.def("vector_unit", [] { return kNames[static_cast<int>(current.load())]; });
  m.def("vector_units", [] {
    nb::list names;
    for (VectorUnit unit : {VectorUnit::kScalar, VectorUnit::kAvx2, VectorUnit::kAvx512, VectorUnit::kNeon})
      if (supported(unit)) names.append(kNames[static_cast<int>(unit)]);
    return names;
  });
  m.def("choose", &choose);
  m.def("count", &count_here);
  m.def("targets", [] {
    nb::dict targets;
    targets["bvit_count"] = capsule(kCount);
    targets["bvit_unit"] = capsule(kUnit);
    targets["bvit_unit_end"] = capsule(kUnitEnd);
    targets["bvit_feed_forward"] = capsule(kFeedForward);
    targets["bvit_attention"] = capsule(kAttention);
    targets["bvit_pool"] = capsule(kPool);
    targets["bvit_downsample"] = capsule(kDownsample);
    targets["bvit_branches"] = capsule(kBranches);
    return targets;
  });
}

}  // namespace bvit
