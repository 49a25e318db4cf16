// Threads that share the tasks of an operation, and stay awake between the operations of a network.
//
// An operation takes some ten microseconds and the next one follows at once, while waking a thread takes as long on
// many machines. So a thread waits for work in a loop before it goes to sleep. There is one team in a process; who
// finds it busy, because two programs run at a time, works alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bvit {

class Team {
 public:
  // Runs tasks 0 to count - 1 on at most `threads` threads, the caller's among them, and returns when all are done.
  void run(int64_t threads, int64_t count, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads < 2 || count < 2 || !turn.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    while (static_cast<int64_t>(size_) < threads - 1) start();
    helpers_ = threads - 1;
    task_ = &task;
    count_ = count;
    next_ = 0;
    open_ = true;
    {
      std::lock_guard<std::mutex> lock(sleep_);  // so that nobody falls asleep between looking and waiting
      ++number_;
    }
    if (asleep_ > 0) wake_.notify_all();
    work();
    open_ = false;
    while (inside_ > 0) relax();
  }

 private:
  static constexpr std::chrono::microseconds kAwake{300};

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  void work() {
    for (int64_t i; (i = next_++) < count_;) (*task_)(i);
  }

  void start() {
    std::thread([this, index = static_cast<int64_t>(size_)] { help(index); }).detach();
    ++size_;
  }

  void help(int64_t index) {
    for (int64_t seen = 0;;) {
      seen = await(seen);
      // The caller waits until nobody is inside before it takes the task away.
      ++inside_;
      if (open_ && index < helpers_) work();
      --inside_;
    }
  }

  // Returns the number of the next piece of work after one.
  int64_t await(int64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kAwake;
    do {
      for (int i = 0; i < 64; ++i) {
        if (const int64_t number = number_; number != seen) return number;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(sleep_);
    ++asleep_;
    wake_.wait(lock, [&] { return number_ != seen; });
    --asleep_;
    return number_;
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<int64_t> number_{0}, next_{0}, inside_{0}, asleep_{0}, helpers_{0}, count_{0}, size_{0};
  std::atomic<bool> open_{false};
  std::atomic<const std::function<void(int64_t)>*> task_{nullptr};
};

}  // namespace bvit
