// SPDX-License-Identifier: Apache-2.0
// A block of CUDA threads on one host thread: each is a fibre that runs until it ends, or until it
// waits for others.
//
// Blocks run one after the other. Between two waits a fibre runs alone, so what a kernel reads
// before a barrier that it should have read behind it is reliably stale, in one of the two orders
// at least. Shared memory is filled with garbage before each block. A thread that waits for one
// that has ended, or for nobody, is an error.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;  // AddressSanitizer clears its map of one at every switch

enum class State { kReady, kAtBarrier, kInWarp, kEnded };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kEnded;
};

// The lanes of a warp meet in a shuffle. Two buffers, because
// a lane may be one shuffle ahead of another's reading.
struct Meeting {
  int arrived = 0;
  unsigned round = 0;
  uint64_t value[2][kWarp];
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  // Runs `body` once for each of `threads` threads; `enter(i)` makes thread i's threadIdx current.
  void run(int threads, bool backwards, const std::function<void()>& body,
           const std::function<void(int)>& enter) {
    while (int(fibres_.size()) < threads) create();
    body_ = &body, threads_ = threads, at_barrier_ = 0;
    warps_.assign(size_t(threads + kWarp - 1) / kWarp, Meeting{});
    for (int i = 0; i < threads; ++i) fibres_[i]->state = State::kReady;
    for (bool moved = true; moved;) {
      moved = false;
      for (int turn = 0; turn < threads; ++turn) {
        const int i = backwards ? threads - 1 - turn : turn;
        if (fibres_[i]->state != State::kReady) continue;
        moved = true;
        running_ = i;
        enter(i);
        switch_to_fibre();
      }
    }
    for (int i = 0; i < threads; ++i)
      if (fibres_[i]->state != State::kEnded)
        fail("thread %d waits for a thread that never comes", i);
  }

  void barrier() {
    if (++at_barrier_ == threads_) {
      at_barrier_ = 0;
      for (int i = 0; i < threads_; ++i)
        if (fibres_[i]->state == State::kAtBarrier) fibres_[i]->state = State::kReady;
      return;
    }
    wait(State::kAtBarrier);
  }

  int lane() const { return running_ % kWarp; }

  // What lane `from` of the warp brought, or one's own value if there is no such lane.
  uint64_t shuffle(uint64_t value, int from) {
    const int lane = running_ % kWarp, warp = running_ / kWarp;
    Meeting& meeting = warps_[warp];
    uint64_t* const values = meeting.value[meeting.round % 2];
    values[lane] = value;
    if (++meeting.arrived == kWarp) {
      meeting.arrived = 0, ++meeting.round;
      for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
        if (fibres_[i]->state == State::kInWarp) fibres_[i]->state = State::kReady;
    } else {
      wait(State::kInWarp);
    }
    return values[from < kWarp ? from : lane];
  }

 private:
  template <class... Arguments>
  [[noreturn]] static void fail(const char* format, Arguments... arguments) {
    std::fprintf(stderr, format, arguments...);
    std::fprintf(stderr, "\n");
    std::exit(2);
  }

  void create() {
    fibres_.push_back(std::make_unique<Fibre>());
    Fibre& fibre = *fibres_.back();
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Block::live, 0);
  }

  static void live() {
    Block& block = current();
    block.arrived_in_fibre(nullptr);
    for (;;) {
      (*block.body_)();
      block.wait(State::kEnded);
    }
  }

  void wait(State state) {
    Fibre& fibre = *fibres_[running_];
    fibre.state = state;
    void* fake_stack = nullptr;
    leave_for(&fake_stack, host_stack_, host_stack_size_);
    swapcontext(&fibre.context, &host_);
    arrived_in_fibre(fake_stack);
  }

  void switch_to_fibre() {
    Fibre& fibre = *fibres_[running_];
    void* fake_stack = nullptr;
    leave_for(&fake_stack, fibre.stack.get(), kStack);
    swapcontext(&host_, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // AddressSanitizer wants to know which stack is in use.
  static void leave_for(void** fake_stack, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, size);
#else
    (void)fake_stack, (void)stack, (void)size;
#endif
  }
  void arrived_in_fibre(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &host_stack_, &host_stack_size_);
#else
    (void)fake_stack;
#endif
  }

  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Meeting> warps_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t host_;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
  int threads_ = 0, running_ = 0, at_barrier_ = 0;
};

}  // namespace shim
