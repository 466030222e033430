// Which instruction set levels were compiled, which of them this CPU runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace dz {

std::vector<std::string> isa_built();
// Empty if this build and this CPU can run `level`, else the reason why not.
std::string isa_refusal(const std::string& level);
// The best level this CPU runs.
std::string isa_best();
std::string isa();
// Throws std::invalid_argument with the reason if `level` cannot run here.
void set_isa(const std::string& level);

std::vector<std::string> kernel_names();
// The kernel at every level; throws std::invalid_argument if there is none of that name.
const Kernel* const* kernel_levels(const std::string& name);
const Kernel& at_level_in_use(const Kernel* const* levels);

}  // namespace dz
