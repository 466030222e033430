// How a kernel registers itself: <op>.cpp ends with
//
//   DZ_KERNEL(<op>, (const float* x, float* out, int64_t P, double eps, bool relu)) { ... }
//
// which defines a record, the only external symbol of the file at level DZ_ISA: conv2d_tap_v3, for example. The record
// is a compile-time constant, so no code of a level runs before that level is chosen. setup.py finds the files,
// dispatch.cpp collects the records, and every call goes through a record.
//
// In signatures: P perturbations, N samples, [H, W] input plane, [Ho, Wo] output plane. Strides are in elements.
// Tensors without strides are contiguous. `half`, or a name ending in it, says that a tensor is bfloat16.
// dzkernels/ops/<op>.py checks the arguments and holds the contract of the op.
#pragma once

#include <cstdint>

namespace dz {

// One argument of a kernel, passed from Python.
union Word {
  const void* address;
  int64_t integer;  // or bool
  double real;
};

struct Kernel {
  const char* name;
  const char* codes;  // one letter per argument: p pointer, i integer, d double, b bool
  void (*call)(const Word* arguments);
};

namespace {

// In an unnamed namespace because every level instantiates these templates itself: see common.h.
template <typename T>
struct Argument;
template <typename T>
struct Argument<T*> {
  static constexpr char code = 'p';
  static T* get(Word word) { return static_cast<T*>(const_cast<void*>(word.address)); }
};
template <>
struct Argument<int64_t> {
  static constexpr char code = 'i';
  static int64_t get(Word word) { return word.integer; }
};
template <>
struct Argument<double> {
  static constexpr char code = 'd';
  static double get(Word word) { return word.real; }
};
template <>
struct Argument<bool> {
  static constexpr char code = 'b';
  static bool get(Word word) { return word.integer != 0; }
};

template <int... kAt>
struct Indices {};
template <int kCount, int... kAt>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kAt...> {};
template <int... kAt>
struct MakeIndices<0, kAt...> {
  using type = Indices<kAt...>;
};

template <typename Function>
struct Signature;
template <typename... Args>
struct Signature<void(Args...)> {
  static constexpr char codes[] = {Argument<Args>::code..., '\0'};

  template <void (*kKernel)(Args...), int... kAt>
  static void unpack(const Word* words, Indices<kAt...>) {
    kKernel(Argument<Args>::get(words[kAt])...);
  }
  template <void (*kKernel)(Args...)>
  static void call(const Word* words) {
    unpack<kKernel>(words, typename MakeIndices<sizeof...(Args)>::type());
  }
};

}  // namespace
}  // namespace dz

#define DZ_JOIN2(a, b) a##_##b
#define DZ_JOIN(a, b) DZ_JOIN2(a, b)
#define DZ_KERNEL(op, parameters)                                                  \
  static void op parameters;                                                       \
  extern const Kernel DZ_JOIN(op, DZ_ISA);                                         \
  constexpr Kernel DZ_JOIN(op, DZ_ISA) = {#op, Signature<void parameters>::codes,  \
                                          &Signature<void parameters>::call<&op>}; \
  static void op parameters
