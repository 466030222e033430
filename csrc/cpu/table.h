// The kernels of one instruction set level, as function pointers.
#pragma once

#include "ops.h"

#define DZ_JOIN2(a, b) a##_##b
#define DZ_JOIN(a, b) DZ_JOIN2(a, b)
// The one external symbol of <op>.cpp compiled for level DZ_ISA, for example conv2d_tap_v3.
#define DZ_KERNEL(op) DZ_JOIN(op, DZ_ISA)

namespace dz {

struct Table {
#define DZ_FIELD(op, signature) void(*op) signature;
  DZ_CPU_OPS(DZ_FIELD)
#undef DZ_FIELD
};

#ifdef DZ_ISA
#define DZ_DECLARE(op, signature) void DZ_KERNEL(op) signature;
DZ_CPU_OPS(DZ_DECLARE)
#undef DZ_DECLARE
const Table* DZ_KERNEL(table)();
#endif

}  // namespace dz
