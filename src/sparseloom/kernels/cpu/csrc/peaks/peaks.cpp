#include "peaks/peaks.hpp"

#include <atomic>
#include <chrono>
#include <ctime>

#include "threads.hpp"

namespace sparseloom {
namespace {

double wall_seconds() {
  const std::chrono::duration<double> now = std::chrono::steady_clock::now().time_since_epoch();
  return now.count();
}

// Time that this thread has run: what other programs take is not counted.
double own_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return wall_seconds();
#endif
}

// The slowest worker's own time in `body`.
template <class Body>
double slowest(int threads, Body&& body) {
  std::atomic<double> most{0};
  parallel(threads, [&](int worker) {
    const double began = own_seconds();
    body(worker);
    const double took = own_seconds() - began;
    double seen = most.load();
    while (seen < took && !most.compare_exchange_weak(seen, took)) {
    }
  });
  return most.load();
}

}  // namespace

// Kinds are 0: fp32, 1: bf16, 2: int8. Operations per count and thread, 0 where there are none.
int64_t peak_ops(int kind) {
  const PeakKernels& kernels = active_peak_kernels();
  return kind == 0 ? kernels.fp32_ops : kind == 1 ? kernels.bf16_ops : kernels.int8_ops;
}

// Seconds that `count` rounds take on every thread.
double peak_arithmetic(int kind, int64_t count, int threads) {
  const PeakKernels& kernels = active_peak_kernels();
  const auto run = kind == 0 ? kernels.fp32 : kind == 1 ? kernels.bf16 : kernels.int8;
  if (run == nullptr) return 0;
  return slowest(threads, [&](int) {
    alignas(64) char out[64];
    run(count, out);
  });
}

// Seconds to read `bytes` in equal parts, `rounds` times. Each core has caches of its own, so their
// time is the slowest thread's; memory is shared, so its time is that on the wall.
double peak_read(const char* from, int64_t bytes, int rounds, int threads, bool shared) {
  const PeakKernels& kernels = active_peak_kernels();
  const int64_t part = bytes / threads / 512 * 512;
  auto body = [&](int worker) {
    alignas(64) char out[64];
    for (int i = 0; i < rounds; ++i) kernels.read(from + worker * part, part, out);
  };
  if (!shared) return slowest(threads, body);
  const double began = wall_seconds();
  parallel(threads, body);
  return wall_seconds() - began;
}

}  // namespace sparseloom
