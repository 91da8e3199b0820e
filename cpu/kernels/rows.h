// Rows of arrays as the products take them: in the accumulation type and in panels of channels,
// each panel's rows one after the other, padded with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/kernels/simd.h"
#include "cpu/number.h"
#include "cpu/problem.h"
#include "cpu/tile.h"

namespace jax_natten::JAX_NATTEN_TARGET {

inline constexpr int kPanel = 32;          // channels
inline constexpr int64_t kLineBytes = 64;  // of caches

JAX_NATTEN_INLINE int64_t panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Rows in panels.
template <typename Sum>
struct Rows {
  Sum* data;
  int64_t channels;
  int64_t panel;  // from a panel to the next

  Sum* row(int64_t index) const { return data + index * kPanel; }
  int64_t size() const { return panels(channels) * panel; }
};

template <typename Sum>
Rows<Sum> make_rows(Parts& parts, int64_t rows, int64_t channels) {
  const int64_t panel = rows * kPanel;
  return {parts.of<Sum>(panels(channels) * panel), channels, panel};
}

template <typename Sum>
JAX_NATTEN_INLINE void clear(const Rows<Sum>& rows) {
  std::fill_n(rows.data, rows.size(), Sum{0});
}

template <typename Sum>
JAX_NATTEN_INLINE void clear_row(const Rows<Sum>& rows, int64_t index) {
  Sum* to = rows.row(index);
  for (int64_t p = 0; p < panels(rows.channels); ++p, to += rows.panel) {
    for (int c = 0; c < kPanel; ++c) to[c] = 0;
  }
}

// Whether all entries are.
template <typename Sum>
bool is_finite(const Rows<Sum>& rows) {
  Vector<Sum> zeros{};
  for (int64_t i = 0; i < rows.size(); i += kWidth<Sum>) zeros += load(rows.data + i) * Sum{0};
  Sum sum = 0;
  for (int l = 0; l < kWidth<Sum>; ++l) sum += zeros[l];
  return sum == 0;
}

// What is fetched ahead: for a read soon or one after many others, or for a write.
enum class Fetch { kSoon, kLater, kWrite };

// Fetches a row ahead of its use. The address may be any.
template <Fetch kFetch, typename Element>
JAX_NATTEN_INLINE void prefetch_row(const Element* row, int64_t channels) {
  constexpr int64_t kLine = kLineBytes / sizeof(Element);
  constexpr int kCaches = kFetch == Fetch::kLater ? 2 : 3;  // from the second on, or all
  for (int64_t c = 0; c < channels; c += kLine) {
    __builtin_prefetch(row + c, kFetch == Fetch::kWrite, kCaches);
  }
}

// The rows of the next tile's queries, which after a head's last tile are those of the head after.
template <Fetch kFetch, typename T>
void prefetch_queries(const Tensor<T>& from, int64_t sample, int64_t head, const Tile& next,
                      int64_t channels) {
  const auto rows = from.head(sample, head + (next.is_first() ? 1 : 0));
  for (int64_t token : next.token) prefetch_row<kFetch>(rows.row(token), channels);
}

// ---- a panel's channels to and from the accumulation type

// to = scale * from
template <typename Element, typename Sum>
JAX_NATTEN_INLINE void widen_panel(Sum* to, const Element* from, Sum scale) {
  if constexpr (kConvertsFloat16 && std::is_same_v<Element, Float16>) {
    for (int c = 0; c < kPanel; c += kWidth<Sum>) {
      Halves halves;
      std::memcpy(&halves, from + c, sizeof(halves));
      store(to + c, scale * widen_halves(halves));
    }
  } else {
    for (int c = 0; c < kPanel; ++c) to[c] = scale * widen(from[c]);
  }
}

template <typename Element, typename Sum>
JAX_NATTEN_INLINE void narrow_panel(Element* to, const Sum* from, Sum scale) {
  if constexpr (kConvertsFloat16 && std::is_same_v<Element, Float16>) {
    for (int c = 0; c < kPanel; c += kWidth<Sum>) {
      const Halves halves = narrow_to_halves(scale * load(from + c));
      std::memcpy(to + c, &halves, sizeof(halves));
    }
  } else {
    for (int c = 0; c < kPanel; ++c) to[c] = narrow(scale * from[c], Element{});
  }
}

// ---- rows

// row = scale * from
template <typename Element, typename Sum>
JAX_NATTEN_INLINE void pack_row(const Rows<Sum>& rows, int64_t index, const Element* from,
                                Sum scale) {
  Sum* to = rows.row(index);
  int64_t left = rows.channels;
  for (; left >= kPanel; left -= kPanel, from += kPanel, to += rows.panel) {
    widen_panel(to, from, scale);
  }
  if (left > 0) {
    for (int64_t c = 0; c < left; ++c) to[c] = scale * widen(from[c]);
    for (int64_t c = left; c < kPanel; ++c) to[c] = 0;
  }
}

// to = scale * row
template <typename Element, typename Sum>
JAX_NATTEN_INLINE void unpack_row(Element* to, const Rows<Sum>& rows, int64_t index, Sum scale) {
  const Sum* from = rows.row(index);
  int64_t left = rows.channels;
  for (; left >= kPanel; left -= kPanel, from += rows.panel, to += kPanel) {
    narrow_panel(to, from, scale);
  }
  for (int64_t c = 0; c < left; ++c) to[c] = narrow(scale * from[c], Element{});
}

// The same past the caches, of whole lines.
template <typename Element, typename Sum>
JAX_NATTEN_INLINE void unpack_row_past_caches(Element* to, const Rows<Sum>& rows, int64_t index,
                                              Sum scale) {
  constexpr int64_t kStep = JAX_NATTEN_VECTOR_BYTES / sizeof(Element);
  const Sum* from = rows.row(index);
  for (int64_t left = rows.channels; left > 0; left -= kPanel, from += rows.panel, to += kPanel) {
    Element panel[kPanel];
    narrow_panel(panel, from, scale);
    const int64_t count = std::min<int64_t>(left, kPanel);
    for (int64_t c = 0; c < count; c += kStep) copy_past_caches(to + c, panel + c);
  }
}

// to += scale * row
template <typename Sum>
JAX_NATTEN_INLINE void add_row(Sum* to, const Rows<Sum>& rows, int64_t index, Sum scale) {
  const Sum* from = rows.row(index);
  int64_t left = rows.channels;
  for (; left >= kPanel; left -= kPanel, from += rows.panel, to += kPanel) {
    for (int c = 0; c < kPanel; ++c) to[c] += scale * from[c];
  }
  for (int64_t c = 0; c < left; ++c) to[c] += scale * from[c];
}

// Packs rows of keys, head after head, while tiles need them, and fetches those ahead meanwhile.
template <typename Element, typename Sum>
class KeyStream {
 public:
  KeyStream(const BlockView& block, const Place& place)
      : tokens_(block.key_tokens()),
        size_(block.keys()),
        share_(size_ / std::max<int64_t>(2 * block.tiles(), 1) + 1),
        place_(place),
        head_(place.heads_kv.begin - 1) {}

  void add(const Rows<Sum>& rows, const Tensor<const Element>& from) {
    arrays_[count_++] = {rows, from};
  }

  void next_head() {
    ++head_;
    packed_ = 0;
    fetched_ = std::max<int64_t>(fetched_ - size_, 0);
  }

  // Packs all that precede the end of a tile's box.
  void pack(int64_t end) {
    for (int a = 0; a < count_; ++a) {
      const Rows<Sum>& rows = arrays_[a].rows;
      const auto from = arrays_[a].from.head(place_.sample, head_);
      for (int64_t i = packed_; i < end; ++i) {
        const int64_t ahead = std::min(i + kAhead, size_ - 1);
        if (ahead >= fetched_) prefetch_row<Fetch::kLater>(from.row(tokens_[ahead]), rows.channels);
        pack_row(rows, i, from.row(tokens_[i]), Sum{1});
      }
    }
    packed_ = std::max(packed_, end);
    fetched_ = std::max(fetched_, std::min(end + kAhead, size_));
  }

  // Half of a tile's share of what is ahead, also in the next head: as many rows as the processor
  // fetches at a time.
  void fetch_some() {
    const int64_t end = std::min(fetched_ + share_, 2 * size_);
    for (; fetched_ < end; ++fetched_) {
      const bool is_next = fetched_ >= size_;
      if (is_next && head_ + 1 == place_.heads_kv.end) return;
      for (int a = 0; a < count_; ++a) {
        const auto from = arrays_[a].from.head(place_.sample, head_ + (is_next ? 1 : 0));
        prefetch_row<Fetch::kLater>(from.row(tokens_[is_next ? fetched_ - size_ : fetched_]),
                                    arrays_[a].rows.channels);
      }
    }
  }

 private:
  static constexpr int64_t kAhead = 48;

  struct Array {
    Rows<Sum> rows;
    Tensor<const Element> from;
  };

  const std::vector<int64_t>& tokens_;
  const int64_t size_;
  const int64_t share_;
  const Place& place_;
  int64_t head_;
  Array arrays_[4];
  int count_ = 0;
  int64_t packed_ = 0;
  int64_t fetched_ = 0;  // of this head and the next
};

// The queries of a tile that see a key, the others as zeros: whatever they hold never matters.
template <typename Element, typename Sum>
void pack_queries(const Rows<Sum>& rows, const Tile& tile, const bool (&sees)[kTileQueries],
                  const typename Tensor<const Element>::Head& from, Sum scale) {
  for (int l = 0; l < kTileQueries; ++l) {
    if (sees[l]) {
      pack_row(rows, l, from.row(tile.token[l]), scale);
    } else {
      clear_row(rows, l);
    }
  }
}

// The rows of a result, one for each query. Those of a large result are stored past the caches,
// where they are whole lines.
template <typename Element>
class QueryResult {
 public:
  QueryResult(const Tensor<Element>& tensor, const Problem<kAxes>& problem, int64_t channels)
      : tensor_(tensor), channels_(channels) {
    constexpr int64_t kLarge = 4 << 20;
    const int64_t row = channels * static_cast<int64_t>(sizeof(Element));
    const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.data) % kLineBytes == 0;
    past_caches_ = problem.samples * problem.heads * problem.queries() * row >= kLarge &&
                   row % kLineBytes == 0 && is_aligned;
  }

  // Before the first row of the next tile.
  void prefetch(int64_t sample, int64_t head, const Tile& next) const {
    if (!past_caches_) {
      prefetch_queries<Fetch::kWrite>(tensor_, sample, head, next, channels_);
    }
  }

  // A tile's rows, scaled one by one.
  template <typename Sum>
  void write(int64_t sample, int64_t head, const Tile& tile, const Rows<Sum>& rows,
             const Sum* scale) const {
    const auto to = tensor_.head(sample, head);
    for (int l = 0; l < kTileQueries; ++l) {
      if (tile.token[l] < 0) continue;
      if (past_caches_) {
        unpack_row_past_caches(to.row(tile.token[l]), rows, l, scale[l]);
      } else {
        unpack_row(to.row(tile.token[l]), rows, l, scale[l]);
      }
    }
  }

  // After the last row.
  void finish() const {
    if (past_caches_) fence_past_caches();
  }

 private:
  const Tensor<Element> tensor_;
  const int64_t channels_;
  bool past_caches_;
};

// A tile's rows with the queries as lanes: channel after channel, panel after panel.
template <typename Sum>
void transpose_queries(Sum* to, const Rows<Sum>& rows) {
  constexpr int kLanes = kWidth<Sum>;
  for (int64_t p = 0; p < panels(rows.channels); ++p) {
    for (int first = 0; first < kTileQueries; first += kLanes) {
      for (int c = 0; c < kPanel; c += kLanes) {
        Vector<Sum> block[kLanes];
        const Sum* from = rows.row(first) + p * rows.panel + c;
        JAX_NATTEN_UNROLL
        for (int l = 0; l < kLanes; ++l) block[l] = load(from + l * kPanel);
        transpose<Sum>(block);
        Sum* into = to + (p * kPanel + c) * kTileQueries + first;
        JAX_NATTEN_UNROLL
        for (int l = 0; l < kLanes; ++l) store(into + l * kTileQueries, block[l]);
      }
    }
  }
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
