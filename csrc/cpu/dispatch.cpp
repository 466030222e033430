#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#ifdef DZ_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dz {

const Table* table_base();
#ifdef DZ_X86
const Table* table_v3();
const Table* table_v4();
const Table* table_amx();
#endif

namespace {

struct Level {
  const char* name;
  const Table* (*table)();
};

constexpr Level kLevels[] = {
    {"base", &table_base},
#ifdef DZ_X86
    {"v3", &table_v3},
    {"v4", &table_v4},
    {"amx", &table_amx},
#endif
};

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

const Level* find(const std::string& name) {
  for (const Level& level : kLevels) {
    if (name == level.name) return &level;
  }
  return nullptr;
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{find(isa_best())};
  return level;
}

}  // namespace

std::vector<std::string> isa_built() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.emplace_back(level.name);
  return names;
}

std::string isa_refusal(const std::string& name) {
  if (find(name) == nullptr) {
    std::string known;
    for (const Level& level : kLevels) known += (known.empty() ? "" : ", ") + std::string(level.name);
    return "'" + name + "' is not one of the levels built: " + known;
  }
  const char* missing = missing_feature(name);
  return missing == nullptr ? "" : "this CPU has no " + std::string(missing);
}

std::string isa_best() {
  std::string best = "base";
  for (const Level& level : kLevels) {
    if (missing_feature(level.name) == nullptr) best = level.name;
  }
  return best;
}

std::string isa() { return current().load()->name; }

void set_isa(const std::string& name) {
  const std::string refusal = isa_refusal(name);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
  current() = find(name);
}

const Table& kernels() { return *current().load()->table(); }

}  // namespace dz
