#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "kernel_list.h"  // written by setup.py: DZ_KERNELS(KERNEL) is KERNEL(op) for every op

#ifdef DZ_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dz {

#ifdef DZ_X86
#define DZ_LEVELS(LEVEL, op) LEVEL(base, op) LEVEL(v3, op) LEVEL(v4, op) LEVEL(amx, op)
#else
#define DZ_LEVELS(LEVEL, op) LEVEL(base, op)
#endif

// The records that the files <op>.cpp define.
#define DZ_RECORD(level, op) extern const Kernel op##_##level;
#define DZ_RECORDS(op) DZ_LEVELS(DZ_RECORD, op)
DZ_KERNELS(DZ_RECORDS)

namespace {

constexpr const char* kLevels[] = {
#define DZ_NAME(level, op) #level,
    DZ_LEVELS(DZ_NAME, )};
constexpr size_t kLevelCount = sizeof(kLevels) / sizeof(kLevels[0]);

// One row per op, one column per level.
constexpr const Kernel* kKernels[][kLevelCount] = {
#define DZ_ADDRESS(level, op) &op##_##level,
#define DZ_ROW(op) {DZ_LEVELS(DZ_ADDRESS, op)},
    DZ_KERNELS(DZ_ROW)};

#ifdef DZ_X86
// Why this process cannot use AMX for bfloat16; empty if it can. Besides the CPU feature it needs permission from the
// operating system, which saves the tile registers only for processes that request them (Linux 5.16).
std::string amx_refusal() {
  unsigned a, b, c, d;
  const bool found = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0;
  if (!found || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return "this CPU has no amx-bf16";  // AMX-BF16, AMX-TILE
#ifdef __linux__
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted ? "" : "the operating system refused permission to use amx-bf16";
#else
  return "this operating system has no permission for amx-bf16 to request";
#endif
}
#endif

// Why this machine cannot run a level that was built; empty if it can.
std::string unsupported(const std::string& level) {
#ifdef DZ_X86
  __builtin_cpu_init();
#define DZ_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return "this CPU has no " feature;
  if (level != "base") {
    DZ_NEED("avx2") DZ_NEED("fma") DZ_NEED("bmi") DZ_NEED("bmi2")
  }
  if (level == "v4" || level == "amx") {
    DZ_NEED("avx512f") DZ_NEED("avx512bw") DZ_NEED("avx512vl") DZ_NEED("avx512dq") DZ_NEED("avx512cd")
  }
  if (level == "amx") {
    DZ_NEED("avx512bf16")
    return amx_refusal();
  }
#undef DZ_NEED
#else
  (void)level;
#endif
  return "";
}

// Index of a level among those built, or -1.
int find(const std::string& name) {
  for (size_t i = 0; i < kLevelCount; ++i) {
    if (name == kLevels[i]) return static_cast<int>(i);
  }
  return -1;
}

std::atomic<int>& current() {
  static std::atomic<int> level{find(isa_best())};
  return level;
}

}  // namespace

std::vector<std::string> isa_built() {
  std::vector<std::string> names;
  for (const char* level : kLevels) names.emplace_back(level);
  return names;
}

std::string isa_refusal(const std::string& name) {
  if (find(name) < 0) {
    std::string known;
    for (const char* level : kLevels) known += (known.empty() ? "" : ", ") + std::string(level);
    return "'" + name + "' is not one of the levels built: " + known;
  }
  return unsupported(name);
}

std::string isa_best() {
  std::string best = "base";
  for (const char* level : kLevels) {
    if (unsupported(level).empty()) best = level;
  }
  return best;
}

std::string isa() { return kLevels[current()]; }

void set_isa(const std::string& name) {
  const std::string refusal = isa_refusal(name);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
  current() = find(name);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& levels : kKernels) names.emplace_back(levels[0]->name);
  return names;
}

const Kernel* const* kernel_levels(const std::string& name) {
  for (const auto& levels : kKernels) {
    if (name == levels[0]->name) return levels;
  }
  throw std::invalid_argument("no kernel is named '" + name + "'");
}

const Kernel& at_level_in_use(const Kernel* const* levels) { return *levels[current()]; }

}  // namespace dz
