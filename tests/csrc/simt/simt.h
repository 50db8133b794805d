// A GPU of one block at a time: every thread of a block is a fiber, and fibers change where threads
// wait for one another. Which of them runs first, and how late copies arrive, is set for a run, so
// that a missing barrier or wait shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "guarded.h"

#define __global__
#define __device__
#define __constant__ const
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct float4 {
  float x, y, z, w;
};

namespace simt {

struct Index {
  uint32_t x, y;
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;  // null: zeros
};

// A thread's part of a warpgroup's product.
struct Product {
  void* sums;
  const uint32_t* left;
  std::function<void(const Product* const* parts)> act;  // for the parts of all 128 threads
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  bool done;
  std::vector<std::vector<Copy>> groups;  // of copies that have not arrived; the last is open
  bool hides_copies;  // they have arrived, but warpgroups' products may not see them yet
  std::vector<std::vector<Product>> products;  // groups of those that may run; the last is open
};

// Threads that wait for one another, and what each has brought.
struct Meeting {
  uint32_t size = 0, arrived = 0, number = 0;
  void* brought[256];
};

struct Machine {
  bool late;      // copies arrive when they are waited for, else at once; products the other way
  bool backward;  // the last thread and the last block run first
  std::vector<Fiber> fibers;
  Meeting block, warps[32], warpgroups[8];
  Guarded* shared;
  ucontext_t scheduler;
  std::function<void()> kernel;
};
inline Machine machine;
inline uint32_t current;  // the running thread

inline void enter() {
  machine.kernel();
  machine.fibers[current].done = true;
  swapcontext(&machine.fibers[current].context, &machine.scheduler);
}

inline void others() { swapcontext(&machine.fibers[current].context, &machine.scheduler); }

// Waits for all threads of a meeting; the last one to come calls `act` for all.
template <typename Act>
void meet(Meeting& meeting, uint32_t place, void* mine, Act act) {
  meeting.brought[place] = mine;
  if (++meeting.arrived == meeting.size) {
    act(meeting.brought);
    meeting.arrived = 0;
    ++meeting.number;
    return;
  }
  const uint32_t number = meeting.number;
  while (meeting.number == number) others();
}

template <typename Act>
void meet_warp(void* mine, Act act) {
  meet(machine.warps[current / 32], current % 32, mine, act);
}

template <typename Act>
void meet_warpgroup(void* mine, Act act) {
  meet(machine.warpgroups[current / 128], current % 128, mine, act);
}

inline void perform(const Copy& copy) {
  copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
}

}  // namespace simt

inline simt::Index threadIdx, blockIdx, gridDim;

namespace simt {

// Runs one block; false where it wrote beside its shared memory.
inline bool run_block(uint32_t threads, uint32_t shared_bytes, Index block,
                      std::function<void()> kernel) {
  constexpr size_t kStackBytes = 64 << 10;
  Guarded shared(shared_bytes, 0);  // nothing of an earlier block
  std::memset(shared.data(), 0xff, shared_bytes);
  machine.shared = &shared;
  machine.kernel = std::move(kernel);
  machine.fibers.resize(threads);
  machine.block = {threads};
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.stack == nullptr) fiber.stack.reset(new uint8_t[kStackBytes]);
    fiber.done = false;
    fiber.groups.assign(1, {});
    fiber.hides_copies = false;
    fiber.products.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    machine.warps[i / 32] = {32};
    machine.warpgroups[i / 128] = {128};
  }
  for (uint32_t done = 0; done < threads;) {
    done = 0;
    for (uint32_t i = 0; i < threads; ++i) {
      current = machine.backward ? threads - 1 - i : i;
      threadIdx = {current, 0};
      blockIdx = block;
      Fiber& fiber = machine.fibers[current];
      if (!fiber.done) swapcontext(&machine.scheduler, &fiber.context);
      done += fiber.done;
    }
  }
  return shared.guards_hold();
}

// Runs a grid, block by block.
template <typename Kernel>
bool run_grid(Index grid, uint32_t threads, uint32_t shared_bytes, Kernel kernel) {
  const uint32_t blocks = grid.x * grid.y;
  gridDim = grid;
  bool holds = true;
  for (uint32_t i = 0; i < blocks; ++i) {
    const uint32_t block = machine.backward ? blocks - 1 - i : i;
    const Index index{block % grid.x, block / grid.x};
    holds = run_block(threads, shared_bytes, index, kernel) && holds;
  }
  return holds;
}

}  // namespace simt
