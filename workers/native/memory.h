// Memory for weights and for what is computed.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

constexpr int64_t HUGE_PAGE = 2 << 20;

// Zeros, on huge pages where the system has some.
class Zeros {
  public:
    explicit Zeros(int64_t bytes) : size_(round_up(bytes, HUGE_PAGE) + HUGE_PAGE) {
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(base_, size_, MADV_HUGEPAGE);
#endif
    }
    ~Zeros() { munmap(base_, size_); }
    Zeros(const Zeros&) = delete;

    char* at() const { return reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(base_), HUGE_PAGE)); }

  private:
    int64_t size_;
    void* base_;
};

// Memory that only grows.
template <class T>
class Buffer {
  public:
    T* fit(int64_t count) {
        if (count > size_) {
            size_ = count + count / 2;
            memory_.reset(static_cast<T*>(aligned_alloc(64, round_up(size_ * sizeof(T), 64))));
            if (!memory_) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* memory) const { free(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};
