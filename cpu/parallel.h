// Runs a kernel's tasks on XLA's own threads.
//
// A job is a list of phases; a phase is a number of independent tasks, and starts when the one
// before it is complete. Each output element is computed by one task alone, so results don't
// depend on the number of threads.
//
// The pool may only be spoken to while the handler's call lasts, so all workers are scheduled by
// then; each takes tasks until none is left. A worker waits at the end of a phase only for tasks
// that others are running at that moment, never for one that has yet to start, so any number of
// jobs and threads makes progress. The job is complete with its last task: a worker that
// starts later finds nothing to do and touches no buffer.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/scratch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

namespace ffi = ::xla::ffi;

struct Phase {
  int64_t tasks;
  double flops;                                             // of all tasks, roughly
  std::function<void(int64_t task, Scratch& scratch)> run;  // the scratch is the worker's
};

using Job = std::vector<Phase>;

inline constexpr double kTaskFlops = 1 << 18;    // some 50 us: far above the cost of taking a task
inline constexpr double kInlineFlops = 1 << 16;  // below it waking a thread costs more

// A phase over the tokens of every (sample, head), in tasks of about kTaskFlops:
// run(sample, head, begin, end). With `whole_heads` a task is one (sample, head), even one without
// a token, for kernels that also sum over tokens.
template <typename Run>
Phase over_tokens(int64_t samples, int64_t heads, int64_t tokens, double flops_per_token,
                  bool whole_heads, Run run) {
  const double per_task = std::min(kTaskFlops / std::max(flops_per_token, 1.0), 1e9);
  const int64_t chunk = whole_heads ? tokens : std::max<int64_t>(static_cast<int64_t>(per_task), 1);
  const int64_t chunks = whole_heads ? 1 : (tokens + chunk - 1) / chunk;
  const double flops = flops_per_token * static_cast<double>(samples * heads * tokens);
  return {samples * heads * chunks, flops, [=](int64_t task, Scratch&) {
            const int64_t head = task / chunks;
            const int64_t begin = task % chunks * chunk;
            run(head / heads, head % heads, begin, std::min(begin + chunk, tokens));
          }};
}

inline ffi::Future failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

namespace parallel {

// A phase's progress.
struct Progress {
  std::atomic<int64_t> taken{0};
  std::atomic<int64_t> done{0};
};

// What the workers of one job share.
class Work {
 public:
  explicit Work(Job job) : job_(std::move(job)), progress_(job_.size()) {}

  // Call once, before the first worker.
  ffi::Future future() { return ffi::Future(promise_); }

  void work() {
    Scratch scratch;
    for (size_t phase = 0; phase < job_.size(); ++phase) {
      run_tasks(phase, scratch);
      wait_for(phase);
    }
    if (!completed_.exchange(true)) complete();
  }

 private:
  void run_tasks(size_t phase, Scratch& scratch) {
    const int64_t tasks = job_[phase].tasks;
    Progress& progress = progress_[phase];
    for (int64_t task; (task = progress.taken.fetch_add(1)) < tasks;) {
      try {
        job_[phase].run(task, scratch);
      } catch (...) {  // what tasks can throw is std::bad_alloc
        failed_.store(true);
      }
      if (progress.done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(mutex_);
        phase_done_.notify_all();
      }
    }
  }

  void wait_for(size_t phase) {
    const auto done = [&] { return progress_[phase].done.load() == job_[phase].tasks; };
    if (done()) return;
    std::unique_lock<std::mutex> lock(mutex_);
    phase_done_.wait(lock, done);
  }

  void complete() {
    if (failed_.load()) {
      promise_.SetError(ffi::Error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                                   "jax_natten: out of memory in a CPU kernel"));
    } else {
      promise_.SetAvailable();
    }
  }

  const Job job_;
  std::vector<Progress> progress_;
  std::mutex mutex_;
  std::condition_variable phase_done_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> completed_{false};
  ffi::Promise promise_;
};

}  // namespace parallel

// Starts a job; the future is ready when it is complete.
inline ffi::Future start(ffi::ThreadPool& pool, Job job) {
  double flops = 0;
  int64_t most_tasks = 0;
  for (const Phase& phase : job) {
    flops += phase.flops;
    most_tasks = std::max(most_tasks, phase.tasks);
  }
  auto work = std::make_shared<parallel::Work>(std::move(job));
  ffi::Future future = work->future();
  const int64_t workers = flops < kInlineFlops ? 1 : std::min(pool.num_threads(), most_tasks);
  if (workers <= 1) {
    work->work();
  } else {
    for (int64_t i = 0; i < workers; ++i) pool.Schedule([work] { work->work(); });
  }
  return future;
}

}  // namespace jax_natten
