// Runs recorded calls of the CPU kernels again, without torch, at every instruction set level of this machine, and
// holds what they write against what the reference gave:
//
//   replay FILE        made by tests/ops/record.py
//
// Each call runs with its tensors where `new` puts them and once more an element further, where a load that needs
// alignment fails. Built with the address and undefined-behaviour sanitizers by .ci/run.
#include <set>

#include "cpu/dispatch.h"
#include "tests/recorded.h"

int main(int count, char** arguments) {
  if (count != 2) fail("replay takes one file of recorded calls");
  std::vector<std::string> levels;
  for (const std::string& level : dz::isa_built()) {
    const std::string refusal = dz::isa_refusal(level);
    refusal.empty() ? levels.push_back(level)
                    : static_cast<void>(std::printf("level %s skipped: %s\n", level.c_str(), refusal.c_str()));
  }
  Reader reader(arguments[1]);
  std::set<std::string> missing;
  for (const std::string& name : dz::kernel_names()) missing.insert(name);
  size_t calls = 0;
  for (Call call; reader.next(call); ++calls) {
    missing.erase(call.op);
    for (const std::string& level : levels) {
      dz::set_isa(level);
      for (const bool shifted : {false, true}) {
        replay(call, dz::at_level_in_use(dz::kernel_levels(call.op)), "level " + level, shifted);
      }
    }
  }
  for (const std::string& name : missing) fail("no call of " + name + " was recorded");
  std::printf("%zu calls replayed at %zu levels\n", calls, levels.size());
  return 0;
}
