// Memory that a worker's tasks use one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace jax_natten {

class Scratch {
 public:
  // At least so many bytes of any content, aligned to the longest vectors; what was handed out
  // before is lost.
  std::byte* take(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      memory_.reset(
          static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

  static constexpr std::align_val_t kAlignment{64};

 private:
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };

  std::unique_ptr<std::byte, Delete> memory_;
  int64_t size_ = 0;
};

// Parts of one piece of memory: the same sequence of calls first counts bytes, then hands them out.
class Parts {
 public:
  explicit Parts(std::byte* memory) : memory_(memory) {}

  template <typename T>
  T* of(int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + size_);
    constexpr auto kAlignment = static_cast<int64_t>(Scratch::kAlignment);
    size_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  int64_t size() const { return size_; }

 private:
  std::byte* memory_;
  int64_t size_ = 0;
};

}  // namespace jax_natten
