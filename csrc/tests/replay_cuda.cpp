// Runs recorded calls of the CUDA kernels again as plain C++, launchers included, and holds what they write against
// what the reference gave:
//
//   replay_cuda FILE   made by tests/ops/record.py
//
// cuda_on_host.h chooses sizes and orders of blocks. Built with the sanitizers by .ci/run.
#include <cstring>
#include <set>
#include <utility>

#include "cuda_list.h"  // includes csrc/cuda/<op>.cuh for every op; written by setup.py
#include "tests/recorded.h"

namespace {

// A launcher dz_<op> as a kernel: a null stream comes after the arguments, and anything but success is an error.
template <auto kLauncher>
struct Launcher;
template <typename... Args, cudaError_t (*kLauncher)(Args...)>
struct Launcher<kLauncher> {
  static constexpr char codes[] = {dz::Argument<Args>::code..., '\0'};

  template <size_t... kAt>
  static void unpack(const dz::Word* words, std::index_sequence<kAt...>) {
    const cudaError_t error = kLauncher(dz::Argument<Args>::get(words[kAt])...);
    if (error != cudaSuccess) fail("a launch gave error " + std::to_string(error));
  }
  static void call(const dz::Word* words) { unpack(words, std::index_sequence_for<Args...>()); }
};

constexpr dz::Kernel kKernels[] = {
#define DZ_ROW(op) {#op, Launcher<&dz_##op>::codes, &Launcher<&dz_##op>::call},
    DZ_CUDA_KERNELS(DZ_ROW)};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) fail("replay_cuda takes one file of recorded calls");
  Reader reader(arguments[1]);
  std::set<std::string> missing;
  for (const dz::Kernel& kernel : kKernels) missing.insert(kernel.name);
  size_t calls = 0;
  for (Call call; reader.next(call); ++calls) {
    missing.erase(call.op);
    call.arguments.push_back({'n'});
    for (const dz::Kernel& kernel : kKernels) {
      if (call.op == kernel.name) replay(call, kernel, "CUDA on the host", false);
    }
  }
  for (const std::string& name : missing) fail("no call of " + name + " was recorded");
  std::printf("%zu calls of CUDA kernels replayed\n", calls);
  return 0;
}
