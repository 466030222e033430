#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "kernel_list.h"  // DZ_KERNELS(KERNEL), a KERNEL(op) for every op: written by setup.py

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
// Whether the CPU multiplies tiles of bfloat16 and the system saves them; it wants to be asked, once a process.
bool has_tiles() {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;  // AMX-BF16, AMX-TILE
#ifdef __linux__
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool lent = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return lent;
#else
  return false;
#endif
}
#endif

// The first feature of `level` that this CPU lacks, or null.
const char* missing_feature(const std::string& level) {
#ifdef DZ_X86
  __builtin_cpu_init();
#define DZ_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return feature;
  if (level != "base") {
    DZ_NEED("avx2") DZ_NEED("fma") DZ_NEED("bmi") DZ_NEED("bmi2")
  }
  if (level == "v4" || level == "amx") {
    DZ_NEED("avx512f") DZ_NEED("avx512bw") DZ_NEED("avx512vl") DZ_NEED("avx512dq") DZ_NEED("avx512cd")
  }
  if (level == "amx") {
    DZ_NEED("avx512bf16")
    if (!has_tiles()) return "amx-bf16, or its system does not lend it";
  }
#undef DZ_NEED
#else
  (void)level;
#endif
  return nullptr;
}

// The place of a level among those built, or -1.
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
  const char* missing = missing_feature(name);
  return missing == nullptr ? "" : "this CPU has no " + std::string(missing);
}

std::string isa_best() {
  std::string best = "base";
  for (const char* level : kLevels) {
    if (missing_feature(level) == nullptr) best = level;
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
  throw std::invalid_argument("there is no kernel '" + name + "'");
}

const Kernel& at_level_in_use(const Kernel* const* levels) { return *levels[current()]; }

}  // namespace dz
