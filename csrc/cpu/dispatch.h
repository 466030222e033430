// The instruction set levels: which were compiled, which this CPU can run, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace dz {

std::vector<std::string> isa_built();
// Why `level` cannot run here; empty if it can.
std::string isa_refusal(const std::string& level);
// The best level that this CPU can run.
std::string isa_best();
std::string isa();
// Throws std::invalid_argument with the reason if `level` cannot run here.
void set_isa(const std::string& level);

std::vector<std::string> kernel_names();
// The records of kernel `name` at every level; throws std::invalid_argument if no kernel has that name.
const Kernel* const* kernel_levels(const std::string& name);
const Kernel& at_level_in_use(const Kernel* const* levels);

}  // namespace dz
