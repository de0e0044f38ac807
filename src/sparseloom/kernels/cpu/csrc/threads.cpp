#include "threads.hpp"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace sparseloom {
namespace {

struct Job {
  void (*body)(void*, int);
  void* context;
  int workers;
  std::atomic<int> next{0};
};

void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  for (int worker; (worker = job.next.fetch_add(1)) < job.workers;) job.body(job.context, worker);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp() {
#if !defined(_WIN32)
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void run_workers(int workers, void (*body)(void*, int), void* context) {
  if (workers <= 1) {
    if (workers == 1) body(context, 0);
    return;
  }
  Job job{body, context, workers};
  if (GompParallel run = gomp()) {
    run(work, &job, static_cast<unsigned>(workers), 0);
    return;
  }
  std::vector<std::thread> threads;
  for (int i = 1; i < workers; ++i) threads.emplace_back(work, &job);
  work(&job);
  for (auto& thread : threads) thread.join();
}

}  // namespace sparseloom
