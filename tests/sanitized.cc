// Runs every CUDA kernel on small problems, on plain device buffers: the program that
// tests/sanitize.sh puts under compute-sanitizer.
//
// Numbers are not compared, but every element of every result must have been written: results and
// workspace are full of NaN before each call and have none after it. With the argument
// `unpoisoned` they are left as they were allocated, so that initcheck sees what nobody wrote.
// Where sets of kernels are named (naive, sm80, sm90), only these run.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/buffers.h"
#include "cuda/dispatch.h"

namespace jax_natten {
namespace {

using Sizes = std::vector<int64_t>;

// ---- problems

struct Dims {
  int64_t dim, value_dim;
};

// Rows that are no multiple of what a lane copies at once, and those that are; short and long ones,
// too long ones for matrix units.
const std::vector<Dims> kDims = {{5, 3}, {16, 24}, {64, 64}, {128, 72}, {40, 300}};

struct Window {
  const char* name;
  std::vector<Dims> dims;
  Sizes spatial, kernel_size, stride, dilation, is_causal;
  Sizes margin;                // of a clipped border: the global axis goes on so far on each side
  std::vector<Sizes> lengths;  // of each sample; none where all samples fill their arrays
  int64_t heads, heads_kv;
  bool has_bias;

  Sizes biases() const {
    Sizes result;
    for (int64_t k : kernel_size) result.push_back(has_bias ? 2 * k - 1 : 0);
    return result;
  }
};

const Window kWindows[] = {
    {"1d", kDims, {19}, {5}, {4}, {2}, {1}, {0}, {}, 2, 1, true},
    {"2d", kDims, {9, 7}, {4, 3}, {2, 3}, {2, 1}, {0, 0}, {0, 0}, {{5, 2}, {3, 6}}, 2, 2, false},
    {"2d of several tiles",
     {{32, 32}, {64, 64}, {80, 96}, {128, 128}},
     {19, 18},
     {13, 14},
     {1, 1},
     {1, 1},
     {0, 0},
     {0, 0},
     {},
     1,
     1,
     true},
    {"2d without biases",
     {{32, 32},
      {40, 24},
      {64, 64},
      {64, 128},
      {96, 96},
      {128, 128},
      {192, 128},
      {192, 192},
      {256, 256}},
     {19, 18},
     {6, 7},
     {1, 2},
     {1, 2},
     {0, 1},
     {0, 0},
     {{19, 18}, {11, 5}},
     2,
     1,
     false},
    {"2d of long windows",
     {{40, 48}, {64, 64}, {80, 112}, {128, 128}},
     {16, 24},
     {12, 20},
     {3, 1},
     {1, 1},
     {0, 0},
     {0, 0},
     {{16, 24}, {11, 17}},
     4,
     2,
     false},
    {"3d of long windows",
     {{64, 64}, {128, 128}},
     {8, 6, 32},
     {4, 5, 30},
     {1, 1, 1},
     {2, 1, 1},
     {0, 0, 0},
     {0, 0, 3},
     {},
     2,
     2,
     false},
    {"1d of tiles seen whole",
     {{64, 64}, {128, 128}},
     {420},
     {400},
     {1},
     {1},
     {0},
     {0},
     {},
     1,
     1,
     false},
    {"3d",
     kDims,
     {6, 4, 5},
     {3, 2, 4},
     {2, 1, 1},
     {2, 1, 1},
     {0, 1, 0},
     {0, 0, 2},
     {{5, 4, 3}, {2, 3, 5}},
     4,
     2,
     true},
};

constexpr int64_t kSamples = 2, kParts = 3;

// ---- device arrays

bool poisons = true;
std::set<std::string> only;  // these sets of kernels; all where there are none

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Every array is an allocation of its own, so that overruns are seen.
class Array {
 public:
  template <typename T>
  static Array uninitialized(Sizes sizes) {
    return Array(kDataType<T>, std::move(sizes));
  }

  template <typename T>
  static Array random(Sizes sizes) {
    Array result(kDataType<T>, std::move(sizes));
    static std::mt19937 generator;
    std::vector<T> values(result.count_);
    for (T& x : values) {
      x = narrow(std::uniform_real_distribution<Accumulator<T>>(-1, 1)(generator), T{});
    }
    result.copy_from(values.data());
    return result;
  }

  static Array of(Sizes sizes, const std::vector<int32_t>& values) {
    Array result(ffi::DataType::S32, std::move(sizes));
    result.copy_from(values.data());
    return result;
  }

  ffi::AnyBuffer buffer() const { return ffi::AnyBuffer(buffer_.get()); }

  void poison() const { check(cudaMemset(data_.get(), 0xff, bytes())); }

  bool has_nan() const {
    switch (buffer().element_type()) {
      case ffi::DataType::F64:
        return has_nan_of<double>();
      case ffi::DataType::F32:
        return has_nan_of<float>();
      case ffi::DataType::F16:
        return has_nan_of<Float16>();
      default:
        return has_nan_of<BFloat16>();
    }
  }

 private:
  Array(ffi::DataType type, Sizes sizes)
      : sizes_(std::make_unique<Sizes>(std::move(sizes))), count_(1), data_(nullptr, cudaFree) {
    for (int64_t size : *sizes_) count_ *= size;
    width_ = ffi::ByteWidth(type);
    void* data = nullptr;
    if (count_ > 0) check(cudaMalloc(&data, bytes()));
    data_.reset(data);
    buffer_ = std::make_unique<XLA_FFI_Buffer>(
        XLA_FFI_Buffer{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, static_cast<XLA_FFI_DataType>(type),
                       data, static_cast<int64_t>(sizes_->size()), sizes_->data()});
  }

  size_t bytes() const { return count_ * width_; }

  void copy_from(const void* values) {
    check(cudaMemcpy(data_.get(), values, bytes(), cudaMemcpyHostToDevice));
  }

  template <typename T>
  bool has_nan_of() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_.get(), bytes(), cudaMemcpyDeviceToHost));
    for (T x : values) {
      if (std::isnan(widen(x))) return true;
    }
    return false;
  }

  std::unique_ptr<Sizes> sizes_;
  int64_t count_;
  size_t width_;
  std::unique_ptr<void, cudaError_t (*)(void*)> data_;
  std::unique_ptr<XLA_FFI_Buffer> buffer_;
};

Array frames(const Window& window) {
  const size_t rank = window.spatial.size();
  std::vector<int32_t> rows;
  for (int64_t sample = 0; sample < kSamples; ++sample) {
    const Sizes& counts = window.lengths.empty() ? window.spatial : window.lengths[sample];
    for (int row = 0; row < kFrameRows; ++row) {
      for (size_t a = 0; a < rank; ++a) {
        const int64_t extent = counts[a] + 2 * window.margin[a], origin = window.margin[a];
        const int64_t values[] = {extent, origin, counts[a], origin, counts[a]};
        rows.push_back(static_cast<int32_t>(values[row]));
      }
    }
  }
  return Array::of({kSamples, kFrameRows, static_cast<int64_t>(rank)}, rows);
}

// ---- calls

// One operation's results, by name for messages; workspace among them need not be written.
struct Call {
  const char* operation;
  std::vector<const Array*> results;
  std::vector<const Array*> workspace;
};

struct Runner {
  const Window& window;
  Dims dims;
  const char* dtype;
  bool tf32;
  std::map<std::string, int>& calls;  // of each set of kernels
  bool& failed;

  // One operation on one set of kernels, where it serves the problem.
  template <typename Operands>
  void run_on(const char* kernels, cudaError_t (*run)(cudaStream_t, const Operands&),
              const Call& call, const Operands& operands) const {
    if (!only.empty() && only.count(kernels) == 0) return;
    if (poisons) {
      for (const Array* array : call.results) array->poison();
      for (const Array* array : call.workspace) array->poison();
    }
    const cudaError_t error = run(nullptr, operands);
    if (error == kNotServed) return;
    check(error);
    check(cudaDeviceSynchronize());
    ++calls[kernels];
    for (const Array* array : call.results) {
      if (!array->has_nan()) continue;
      std::fprintf(stderr, "%s %s, %s, %s, dims %d and %d: elements were not written\n", kernels,
                   call.operation, window.name, dtype, static_cast<int>(dims.dim),
                   static_cast<int>(dims.value_dim));
      failed = true;
    }
  }

  // The same on every set; the naive kernels are last, which serve everything: later operations
  // read what they leave.
  template <template <typename, int> class Operands, typename Element, int Rank>
  void run_all(const Call& call, const Operands<Element, Rank>& operands) const {
    if constexpr (kHasSm90<Operands> && sizeof(Element) == 2) {
      run_on<Operands<Element, Rank>>("sm90", sm90::run, call, operands);
    }
    if constexpr (kHasSm80<Operands> && !std::is_same_v<Element, double>) {
      run_on<Operands<Element, Rank>>("sm80", sm80::run, call, operands);
    }
    run_on<Operands<Element, Rank>>("naive", naive::run, call, operands);
  }

  template <typename Element, typename Buffers>
  void run(const Call& call, const Buffers& buffers, double scale) const {
    const Attributes attributes{window.kernel_size, window.stride, window.dilation,
                                window.is_causal,   tf32,          scale};
    with_operands<Element>(
        attributes, buffers, [&](const auto& operands) { run_all(call, operands); },
        [&](const ffi::Error& error) {
          std::fprintf(stderr, "%s, %s: %s\n", call.operation, window.name,
                       error.message().c_str());
          failed = true;
        });
  }
};

Sizes concatenate(Sizes first, const Sizes& middle, const Sizes& last) {
  first.insert(first.end(), middle.begin(), middle.end());
  first.insert(first.end(), last.begin(), last.end());
  return first;
}

template <typename Element>
void run_fused(const Runner& runner) {
  using Sum = Accumulator<Element>;
  const Window& w = runner.window;
  const auto rows = [&](int64_t heads, int64_t dim) {
    return concatenate({kSamples}, w.spatial, {heads, dim});
  };
  const Sizes queries = rows(w.heads, runner.dims.dim), keys = rows(w.heads_kv, runner.dims.dim);
  const Sizes values = rows(w.heads_kv, runner.dims.value_dim);
  const Sizes outs = rows(w.heads, runner.dims.value_dim);
  const Sizes tokens = concatenate({kSamples}, w.spatial, {w.heads});
  const Sizes tables = concatenate({kSamples, w.heads}, w.biases(), {});
  // Sums that only CPU kernels keep.
  const auto none = [&](int64_t heads, int64_t dim) {
    return concatenate({kSamples, 0}, w.spatial, {heads, dim});
  };
  const double scale = 1 / std::sqrt(static_cast<double>(runner.dims.dim));

  const Array frame = frames(w);
  const auto q = Array::random<Element>(queries), k = Array::random<Element>(keys);
  const auto v = Array::random<Element>(values), bias = Array::random<Sum>(tables);
  const auto out = Array::uninitialized<Element>(outs), lse = Array::uninitialized<Sum>(tokens);
  runner.run<Element>({"forward", {&out, &lse}, {}},
                      ForwardBuffers{q.buffer(), k.buffer(), v.buffer(), bias.buffer(),
                                     frame.buffer(), out.buffer(), lse.buffer()},
                      scale);

  const auto dq = Array::random<Element>(queries), dk = Array::random<Element>(keys);
  const auto dv = Array::random<Element>(values), dbias = Array::random<Sum>(tables);
  const auto dout = Array::uninitialized<Element>(outs), dlse = Array::uninitialized<Sum>(tokens);
  runner.run<Element>(
      {"tangent", {&dout, &dlse}, {}},
      TangentBuffers{q.buffer(), k.buffer(), v.buffer(), bias.buffer(), frame.buffer(),
                     out.buffer(), lse.buffer(), dq.buffer(), dk.buffer(), dv.buffer(),
                     dbias.buffer(), dout.buffer(), dlse.buffer()},
      scale);

  const auto ct_out = Array::random<Element>(outs), ct_lse = Array::random<Sum>(tokens);
  const auto q_grad = Array::uninitialized<Element>(queries);
  const auto k_grad = Array::uninitialized<Element>(keys);
  const auto v_grad = Array::uninitialized<Element>(values);
  const auto bias_grad = Array::uninitialized<Sum>(tables);
  const auto delta = Array::uninitialized<Sum>(concatenate({kSamples, 1}, w.spatial, {w.heads}));
  const auto parts =
      Array::uninitialized<Sum>(concatenate({kSamples, w.heads, kParts}, w.biases(), {}));
  const auto k_sums = Array::uninitialized<Sum>(none(w.heads_kv, runner.dims.dim));
  const auto v_sums = Array::uninitialized<Sum>(none(w.heads_kv, runner.dims.value_dim));
  runner.run<Element>(
      {"backward", {&q_grad, &k_grad, &v_grad, &bias_grad, &delta}, {&parts}},
      BackwardBuffers{q.buffer(), k.buffer(), v.buffer(), bias.buffer(), frame.buffer(),
                      out.buffer(), lse.buffer(), ct_out.buffer(), ct_lse.buffer(), q_grad.buffer(),
                      k_grad.buffer(), v_grad.buffer(), bias_grad.buffer(), delta.buffer(),
                      parts.buffer(), k_sums.buffer(), v_sums.buffer()},
      scale);
}

template <typename Element>
void run_unfused(const Runner& runner) {
  const Window& w = runner.window;
  int64_t slots = 1;
  for (int64_t size : w.kernel_size) slots *= size;
  const auto rows = [&](int64_t heads, int64_t row) {
    return concatenate({kSamples, heads}, w.spatial, {row});
  };
  const Array frame = frames(w);
  const auto query = Array::random<Element>(rows(w.heads, runner.dims.dim));
  const auto key = Array::random<Element>(rows(w.heads_kv, runner.dims.dim));
  const auto value = Array::random<Element>(rows(w.heads_kv, runner.dims.value_dim));
  const auto weights = Array::random<Element>(rows(w.heads, slots));
  const auto attn = Array::uninitialized<Element>(rows(w.heads, slots));
  const auto out = Array::uninitialized<Element>(rows(w.heads, runner.dims.value_dim));
  const auto x = Array::random<Element>(rows(w.heads, runner.dims.value_dim));
  const auto sums = Array::uninitialized<Element>(rows(w.heads_kv, runner.dims.value_dim));
  const auto no_sums = Array::uninitialized<Accumulator<Element>>(
      concatenate({kSamples, 0, w.heads_kv}, w.spatial, {runner.dims.value_dim}));
  runner.run<Element>({"qk", {&attn}, {}},
                      QkBuffers{query.buffer(), key.buffer(), frame.buffer(), attn.buffer()}, 1);
  runner.run<Element>({"av", {&out}, {}},
                      AvBuffers{weights.buffer(), value.buffer(), frame.buffer(), out.buffer()}, 1);
  runner.run<Element>(
      {"inverse", {&sums}, {}},
      InverseBuffers{weights.buffer(), x.buffer(), frame.buffer(), sums.buffer(), no_sums.buffer()},
      1);
  if (!w.has_bias) return;
  const Sizes tables = concatenate({kSamples, w.heads}, w.biases(), {});
  const auto table = Array::random<Element>(tables);
  const auto collected = Array::uninitialized<Element>(tables);
  runner.run<Element>({"spread", {&attn}, {}},
                      SpreadBuffers{table.buffer(), frame.buffer(), attn.buffer()}, 1);
  runner.run<Element>({"collect", {&collected}, {}},
                      CollectBuffers{weights.buffer(), frame.buffer(), collected.buffer()}, 1);
}

template <typename Element>
void run(const Runner& runner) {
  run_fused<Element>(runner);
  run_unfused<Element>(runner);
}

bool run_all() {
  std::map<std::string, int> calls;
  bool failed = false;
  for (const Window& window : kWindows) {
    for (const Dims dims : window.dims) {
      run<double>({window, dims, "float64", false, calls, failed});
      run<float>({window, dims, "float32", false, calls, failed});
      run<float>({window, dims, "float32 as TF32", true, calls, failed});
      run<Float16>({window, dims, "float16", false, calls, failed});
      run<BFloat16>({window, dims, "bfloat16", false, calls, failed});
      std::printf("%s, dims %d and %d\n", window.name, static_cast<int>(dims.dim),
                  static_cast<int>(dims.value_dim));
      std::fflush(stdout);
    }
  }
  for (const auto& [kernels, count] : calls) std::printf("%s: %d calls\n", kernels.c_str(), count);
  return !failed;
}

}  // namespace
}  // namespace jax_natten

int main(int argc, char** argv) {
  const std::set<std::string> sets = {"naive", "sm80", "sm90"};
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "unpoisoned") == 0) {
      jax_natten::poisons = false;
    } else if (sets.count(argv[i]) > 0) {
      jax_natten::only.insert(argv[i]);
    } else {
      std::fprintf(stderr, "%s is no set of kernels: naive, sm80 or sm90\n", argv[i]);
      return 2;
    }
  }
  return jax_natten::run_all() ? 0 : 1;
}
