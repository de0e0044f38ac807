// Memory for one thread's work, aligned to a cache line and not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace sparseloom {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T) + 64,
                                             std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

}  // namespace sparseloom
