// Python bindings of the CPU kernels. Pointers come in as integers, made and checked by dzkernels; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// How one kernel argument travels from Python.
template <typename T>
struct Wire {
  using type = T;
  static T get(T value) { return value; }
};
template <typename T>
struct Wire<T*> {
  using type = std::uintptr_t;
  static T* get(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <typename... Args>
void bind(py::module_& module, const char* name, void (*dz::Table::*kernel)(Args...)) {
  module.def(name, [kernel](typename Wire<Args>::type... args) {
    py::gil_scoped_release release;
    (dz::kernels().*kernel)(Wire<Args>::get(args)...);
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
#define DZ_BIND(op, signature) bind(module, #op, &dz::Table::op);
  DZ_CPU_OPS(DZ_BIND)
#undef DZ_BIND
  module.def("isa_built", &dz::isa_built);
  module.def("isa_refusal", &dz::isa_refusal);
  module.def("isa_best", &dz::isa_best);
  module.def("isa", &dz::isa);
  module.def("set_isa", &dz::set_isa);
  module.attr("compiler") = __VERSION__;
  module.attr("version") = DZ_VERSION;
  module.attr("cuda") = DZ_BUILT_CUDA;
  module.attr("cuda_archs") = DZ_BUILT_CUDA_ARCHS;
}
