// A buffer of numbers, aligned to cache lines and not initialised.
#pragma once

#include <cstdint>
#include <new>

namespace sparseloom::decoding {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  void resize(int64_t size) {
    release();
    data_ = static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T) + 1, ALIGNMENT));
    size_ = size;
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  void release() {
    if (data_) ::operator delete(data_, ALIGNMENT);
    data_ = nullptr;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sparseloom::decoding
