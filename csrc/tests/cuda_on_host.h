// Just enough of CUDA to run a kernel as plain C++: blocks one after another, each thread of a block on a stack of its
// own. It checks what a kernel computes and, under the sanitizers, where it reads and writes. It is as unkind as a GPU
// may be: a warp runs until it waits for the others, first to last or last to first; shared memory holds NaN until it
// is written; an asynchronous copy spoils its destination at once and is done when somebody waits for it, no sooner.
// Races of two writes that a barrier does not order stay unseen.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ inline
#define __host__
#define __device__
#define __launch_bounds__(...)
#define DZ_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_host::shared.data())
#define DZ_EXPORT extern "C" inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1) : x(x_), y(y_) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx(0, 0);

// The calls of CUDA that launchers make, of a GPU with few multiprocessors.
using cudaStream_t = void*;
using cudaError_t = int;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 163 * 1024;  // a block of an A100 can have so much
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* resident, Kernel, int, size_t) {
  *resident = 1;
  return cudaSuccess;
}

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

inline std::vector<double> shared;

[[noreturn]] inline void wrong(const char* what) {
  std::fprintf(stderr, "block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  std::exit(1);
}

inline void require(bool holds, const char* what) {
  if (!holds) wrong(what);
}

// A place to switch to and from: a thread of the block, or the scheduler. The address sanitizer is told of each switch,
// but says all the same that it knows little of swapcontext.
class Fiber {
 public:
  void start(void (*body)()) {
    stack_.reset(new char[kStack]);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
  }

  void switch_to(Fiber& next, [[maybe_unused]] bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, next.bottom(), next.size());
#endif
    next.from_ = this;
    swapcontext(&context_, &next.context_);
    arrived();
  }

  // To be called first on a new stack.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_, &bottom, &size);
    if (from_->stack_ == nullptr) from_->bottom_ = bottom, from_->size_ = size;  // the stack of main
#endif
  }

 private:
  const void* bottom() const { return stack_ == nullptr ? bottom_ : stack_.get(); }
  size_t size() const { return stack_ == nullptr ? size_ : kStack; }

  ucontext_t context_;
  std::unique_ptr<char[]> stack_;
  Fiber* from_ = nullptr;
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

struct Copy {
  uint32_t to;
  const void* from;
};

// What all threads of a warp do together, given the arguments of each; at a barrier none.
using Together = void (*)(void* const* arguments);

struct Thread {
  Fiber fiber;
  bool done = false;
  Together together = nullptr;
  void* arguments = nullptr;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

inline Fiber scheduler;
inline std::vector<Thread> threads;
inline std::function<void()> body;

inline Thread& current() { return threads[threadIdx.x]; }

inline void wait(Together together, void* arguments) {
  Thread& thread = current();
  thread.together = together;
  thread.arguments = arguments;
  thread.fiber.switch_to(scheduler);
}

inline void run_thread() {
  Thread& thread = current();
  thread.fiber.arrived();
  body();
  thread.done = true;
  thread.fiber.switch_to(scheduler, true);
}

// Runs the warp that begins at `first` until it waits for the block or is done; false when it is done.
inline bool run_warp(unsigned first) {
  const unsigned lanes = blockDim.x - first < kWarp ? blockDim.x - first : kWarp;
  for (;;) {
    for (unsigned lane = 0; lane < lanes; ++lane) {
      threadIdx.x = first + lane;
      scheduler.switch_to(current().fiber);
    }
    const Thread& leader = threads[first];
    void* arguments[kWarp];
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Thread& thread = threads[first + lane];
      require(thread.done == leader.done && thread.together == leader.together, "the warp is not together");
      arguments[lane] = thread.arguments;
    }
    if (leader.done) return false;
    if (leader.together == nullptr) return true;
    require(lanes == kWarp, "a part of a warp");
    leader.together(arguments);
  }
}

inline void run_block(bool backwards) {
  const unsigned warps = (blockDim.x + kWarp - 1) / kWarp;
  for (unsigned running = warps; running > 0;) {
    running = 0;
    for (unsigned w = 0; w < warps; ++w) running += run_warp((backwards ? warps - 1 - w : w) * kWarp);
    require(running == 0 || running == warps, "some warps left while others wait");
  }
}

// What csrc/cuda/warp.cuh has for the device.
namespace warp {

inline char* in_shared(uint32_t address) {
  require(address % 16 == 0 && address + 16 <= shared.size() * sizeof(double), "not 16 bytes of shared memory");
  return reinterpret_cast<char*>(shared.data()) + address;
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(shared.data()));
}

inline void copy_async(uint32_t to, const void* from, bool inside) {
  require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy from memory that is not aligned to 16 bytes");
  std::memset(in_shared(to), 0xff, 16);
  current().open.push_back({to, inside ? from : nullptr});
}

inline void commit_copies() {
  current().groups.push_back(std::move(current().open));
  current().open.clear();
}

template <int PENDING>
void wait_for_copies() {
  std::vector<std::vector<Copy>>& groups = current().groups;
  while (groups.size() > PENDING) {
    for (const Copy& copy : groups.front()) {
      copy.from == nullptr ? std::memset(in_shared(copy.to), 0, 16) : std::memcpy(in_shared(copy.to), copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Rows of 16 bytes that load_matrices read in more than one go: rows of a matrix in the same four of the 32 banks.
inline int64_t conflicts = 0;

inline void load_matrices(uint32_t (&out)[4], uint32_t row) {
  struct Arguments {
    uint32_t* out;
    uint32_t row;
  } mine{out, row};
  wait(
      [](void* const* arguments) {
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
          unsigned banks = 0;
          for (unsigned i = 0; i < 8; ++i)
            banks |= 1u << static_cast<Arguments*>(arguments[8 * matrix + i])->row / 16 % 8;
          for (unsigned i = 0; i < 8; ++i) conflicts += (banks >> i & 1u) == 0;
        }
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const Arguments& owner = *static_cast<Arguments*>(arguments[8 * matrix + lane / 4]);
            std::memcpy(static_cast<Arguments*>(arguments[lane])->out + matrix, in_shared(owner.row) + lane % 4 * 4, 4);
          }
        }
      },
      &mine);
}

struct Product {
  float* sum;
  const uint32_t *a, *b;
};

// Products of matrices whose registers hold COUNT values, value(register, i) the i-th of them; one rounding an element.
template <int COUNT, float (*value)(uint32_t, int)>
void multiply(void* const* arguments) {
  constexpr unsigned depth = 8 * COUNT;
  double a[16][depth], b[8][depth];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Product& part = *static_cast<Product*>(arguments[lane]);
    for (unsigned i = 0; i < 2 * COUNT; ++i) {
      const unsigned half = i / COUNT, k = (half * 4 + lane % 4) * COUNT + i % COUNT;
      for (unsigned upper = 0; upper < 2; ++upper)
        a[upper * 8 + lane / 4][k] = value(part.a[half * 2 + upper], i % COUNT);
      b[lane / 4][k] = value(part.b[half], i % COUNT);
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      float& sum = static_cast<Product*>(arguments[lane])->sum[i];
      const double *row = a[i / 2 * 8 + lane / 4], *column = b[lane % 4 * 2 + i % 2];
      double total = sum;
      for (unsigned k = 0; k < depth; ++k) total += row[k] * column[k];
      sum = static_cast<float>(total);
    }
  }
}

inline float bfloat16_of(uint32_t word, int i) { return as_float(i == 0 ? word << 16 : word & 0xffff0000u); }
inline float tf32_of(uint32_t word, int) { return as_float(word & 0xffffe000u); }  // the bits that a tensor core reads

inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  Product mine{sum, a, b};
  wait(multiply<2, bfloat16_of>, &mine);
}

inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  Product mine{sum, a, b};
  wait(multiply<1, tf32_of>, &mine);
}

inline uint32_t round_to_bfloat16(float low, float high) {
  const auto rounded = [](float value) {
    const uint32_t bits = as_bits(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

template <size_t N>
void store_words(void* to, const uint32_t (&words)[N]) {
  require(reinterpret_cast<uintptr_t>(to) % sizeof(words) == 0, "a store to memory that is not aligned to its size");
  std::memcpy(to, words, sizeof(words));
}

}  // namespace warp
}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(nullptr, nullptr); }

// kernel<<<grid, threads, shared_bytes>>>(args...). Shared memory has exactly that size (rounded up to doubles).
template <typename Kernel, typename... Args>
void launch_on_host(Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes, bool backwards, Args... args) {
  gridDim = grid;
  blockDim = dim3(threads);
  cuda_on_host::body = [&] { kernel(args...); };
  double nan;
  std::memset(&nan, 0xff, sizeof(nan));  // each of its words and halves is a NaN
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_host::shared = std::vector<double>((shared_bytes + sizeof(double) - 1) / sizeof(double), nan);
      cuda_on_host::threads = std::vector<cuda_on_host::Thread>(threads);
      for (cuda_on_host::Thread& thread : cuda_on_host::threads) thread.fiber.start(cuda_on_host::run_thread);
      cuda_on_host::run_block(backwards);
    }
  }
}

namespace dz {

// Threads of a block, and their order, are other ones at each launch.
inline unsigned chosen() {
  static unsigned state = 1;
  return (state = state * 1664525 + 1013904223) >> 16;
}

inline unsigned block_of(unsigned) { return 1u << chosen() % 7; }

template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t,
                   Args... args) {
  launch_on_host(kernel, grid, threads, shared, chosen() % 2 == 0, args...);
  return cudaSuccess;
}

}  // namespace dz
