#include "table.h"

namespace dz {

const Table* DZ_KERNEL(table)() {
  static const Table table = {
#define DZ_ENTRY(op, signature) &DZ_KERNEL(op),
      DZ_CPU_OPS(DZ_ENTRY)
#undef DZ_ENTRY
  };
  return &table;
}

}  // namespace dz
