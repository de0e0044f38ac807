// Threads: those of torch's own OpenMP runtime where it is loaded, so that two pools never compete
// for the cores (idle OpenMP threads spin for a while); else threads of our own.
#pragma once

namespace sparseloom {

// Runs body(context, worker) for worker = 0 ... workers - 1, at once; returns when all are done.
// Bodies must not throw. Which thread runs which worker is not fixed; all workers run even if there
// are fewer threads than workers.
void run_workers(int workers, void (*body)(void* context, int worker), void* context);

template <class Body>
void parallel(int workers, Body&& body) {
  auto* held = &body;
  run_workers(
      workers, [](void* context, int worker) { (*static_cast<decltype(held)>(context))(worker); },
      held);
}

}  // namespace sparseloom
