// Turns FFI buffers and attributes into a Problem and Tensors, once per call, re-checking all that
// protects memory: ranks, dimensions, dtypes, the window.
//
// Every operand is described by the names of its axes. A name is bound to the sizes with which it
// first appears, and must have the same ones wherever it appears again, so matching dimensions
// need no further rule. The first mistake is kept; nothing is thrown.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cpu/problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

namespace ffi = ::xla::ffi;

// The attributes that every handler has; `scale` is 1 where there is none.
struct Attributes {
  ffi::Span<const int64_t> kernel_size;
  ffi::Span<const int64_t> stride;
  ffi::Span<const int64_t> dilation;
  ffi::Span<const int64_t> is_causal;
  bool tf32;
  double scale;
};

// What an operand's axes can be. The spatial ones and kTable stand for as many axes as the window
// has, kBatch for any number.
enum class Axis {
  kBatch,
  kQueries,
  kKeys,
  kTable,   // 2 k - 1
  kParts,   // tables that are summed to one
  kDeltas,  // 1, or 0 for kernels that keep no such array
  kSums,    // the same
  kHeads,
  kHeadsKv,
  kDim,
  kValueDim,
  kSlots,      // product of the kernel sizes
  kFrameRows,  // of a frame
  kRank,       // the window's number of axes
};

inline constexpr int kAxisNames = static_cast<int>(Axis::kRank) + 1;
inline constexpr int kMaxRank = 3;

class Decoder {
 public:
  explicit Decoder(const Attributes& attributes) : attributes_(attributes) {
    check_window();
    if (failed()) return;
    std::vector<int64_t> table;
    int64_t slots = 1;
    for (int64_t k : attributes_.kernel_size) {
      table.push_back(2 * k - 1);
      slots *= k;
    }
    bind(Axis::kTable, table);
    bind(Axis::kSlots, {slots});
    bind(Axis::kFrameRows, {kFrameRows});
    bind(Axis::kRank, {rank()});
  }

  // Requires a buffer of this type and these axes.
  void expect(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
              std::initializer_list<Axis> axes) {
    if (failed()) return;
    if (buffer.element_type() != type) {
      fail(name, "has another dtype than expected");
      return;
    }
    const ffi::Span<const int64_t> sizes = buffer.dimensions();
    size_t others = 0;
    for (Axis axis : axes) others += width(axis);
    if (sizes.size() < others) {
      fail(name, "has too few axes");
      return;
    }
    const size_t batch = sizes.size() - others;
    size_t at = 0;
    for (Axis axis : axes) {
      const size_t next = at + (axis == Axis::kBatch ? batch : width(axis));
      match(name, axis, std::vector<int64_t>(sizes.begin() + at, sizes.begin() + next));
      at = next;
    }
  }

  // A bias that is not there has a table without entries. Returns whether it is there.
  bool has_table(const ffi::AnyBuffer& bias) {
    const ffi::Span<const int64_t> sizes = bias.dimensions();
    if (failed() || sizes.size() < width(Axis::kTable)) return false;
    const std::vector<int64_t> table(sizes.end() - width(Axis::kTable), sizes.end());
    for (int64_t size : table) {
      if (size == 0) {
        bind(Axis::kTable, table);
        return false;
      }
    }
    return true;
  }

  // The problem, after all operands. Names that no operand has are sizes of 1, except the keys
  // where there is no array of them: then there are as many as a token's number can tell apart.
  template <int Rank>
  Problem<Rank> problem(const ffi::AnyBuffer& frame) {
    expect("frame", frame, ffi::DataType::S32, {Axis::kBatch, Axis::kFrameRows, Axis::kRank});
    Problem<Rank> result{};
    if (failed()) return result;
    for (int a = 0; a < Rank; ++a) {
      result.window[a] = {attributes_.kernel_size[a], attributes_.stride[a],
                          attributes_.dilation[a], attributes_.is_causal[a] != 0};
      result.query_shape[a] = size(Axis::kQueries, a, 1);
      result.key_shape[a] = size(Axis::kKeys, a, int64_t{1} << (60 / Rank));
    }
    result.samples = 1;
    for (int64_t size : sizes_[index(Axis::kBatch)]) result.samples *= size;
    result.heads = size(Axis::kHeads, 0, 1);
    result.heads_kv = size(Axis::kHeadsKv, 0, result.heads);
    result.dim = size(Axis::kDim, 0, 1);
    result.value_dim = size(Axis::kValueDim, 0, 1);
    result.scale = attributes_.scale;
    result.tf32 = attributes_.tf32;
    result.frame = static_cast<const int32_t*>(frame.untyped_data());
    const bool divides =
        result.heads_kv == 0 ? result.heads == 0 : result.heads % result.heads_kv == 0;
    if (!divides) fail("heads", "are not a multiple of the heads of keys");
    return result;
  }

  int64_t parts() const { return size(Axis::kParts, 0, 0); }
  int64_t rank() const { return static_cast<int64_t>(attributes_.kernel_size.size()); }
  bool failed() const { return !message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument("jax_natten: " + message_); }

 private:
  static constexpr int64_t kSettingEnd = int64_t{1} << 31;
  // Larger windows are refused, so that the number of a bias table's entries fits in an int64.
  static constexpr int64_t kMostBiases = int64_t{1} << 62;

  static int index(Axis axis) { return static_cast<int>(axis); }

  size_t width(Axis axis) const {
    switch (axis) {
      case Axis::kBatch:
        return 0;
      case Axis::kQueries:
      case Axis::kKeys:
      case Axis::kTable:
        return static_cast<size_t>(rank());
      default:
        return 1;
    }
  }

  void check_window() {
    const size_t rank = attributes_.kernel_size.size();
    if (rank < 1 || rank > kMaxRank) {
      fail("kernel_size", "must have one to three entries");
    } else if (attributes_.stride.size() != rank || attributes_.dilation.size() != rank ||
               attributes_.is_causal.size() != rank) {
      fail("stride, dilation and is_causal", "must have as many entries as kernel_size");
    } else {
      int64_t most = kMostBiases;
      for (size_t a = 0; a < rank; ++a) {
        check_axis(a);
        if (!failed()) most /= 2 * attributes_.kernel_size[a] - 1;
      }
      if (most == 0) fail("kernel_size", "is too large");
    }
  }

  void check_axis(size_t a) {
    const int64_t k = attributes_.kernel_size[a];
    const int64_t t = attributes_.stride[a];
    const int64_t d = attributes_.dilation[a];
    if (k < 1 || k >= kSettingEnd) fail("kernel_size", "must lie between 1 and 2^31 - 1");
    if (t < 1 || t > k) fail("stride", "must lie between 1 and kernel_size");
    if (d < 1 || d >= kSettingEnd) fail("dilation", "must lie between 1 and 2^31 - 1");
  }

  void bind(Axis axis, std::vector<int64_t> sizes) {
    sizes_[index(axis)] = std::move(sizes);
    bound_[index(axis)] = true;
  }

  void match(const char* name, Axis axis, const std::vector<int64_t>& sizes) {
    if (!bound_[index(axis)]) bind(axis, sizes);
    if (sizes_[index(axis)] == sizes) return;
    fail(name,
         "has shape " + text(sizes) + " where " + text(sizes_[index(axis)]) + " was expected");
  }

  int64_t size(Axis axis, size_t at, int64_t otherwise) const {
    return bound_[index(axis)] ? sizes_[index(axis)][at] : otherwise;
  }

  static std::string text(const std::vector<int64_t>& sizes) {
    std::string result = "(";
    for (int64_t size : sizes) {
      if (result.size() > 1) result += ", ";
      result += std::to_string(size);
    }
    return result + ")";
  }

  void fail(const std::string& name, const std::string& what) {
    if (!failed()) message_ = name + " " + what;
  }

  const Attributes attributes_;
  std::vector<int64_t> sizes_[kAxisNames];
  bool bound_[kAxisNames] = {};
  std::string message_;
};

}  // namespace jax_natten
