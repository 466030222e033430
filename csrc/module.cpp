// Python bindings of the CPU kernels. dzkernels prepares and checks the arguments. Kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "build_config.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// The address in an integer, None (null), or a tensor (its data_ptr()).
const void* address_of(PyObject* value) {
  if (value == Py_None) return nullptr;
  if (PyLong_Check(value)) return PyLong_AsVoidPtr(value);
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  const py::object address = py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(value, name, nullptr));
  return address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
}

dz::Word word_of(char code, PyObject* value) {
  dz::Word word;
  switch (code) {
    case 'p':
      word.address = address_of(value);
      break;
    case 'd':
      word.real = PyFloat_AsDouble(value);
      break;
    case 'b':
      word.integer = PyObject_IsTrue(value);
      break;
    default:
      word.integer = PyLong_AsLongLong(value);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return word;
}

void call(const dz::Kernel* const* levels, const py::args& args) {
  constexpr size_t max_arguments = 64;
  const dz::Kernel& kernel = dz::at_level_in_use(levels);
  const size_t count = std::strlen(kernel.codes);
  if (args.size() != count || count > max_arguments) {
    throw py::type_error(std::string(kernel.name) + " takes " + std::to_string(count) + " arguments, got " +
                         std::to_string(args.size()));
  }
  dz::Word words[max_arguments];
  for (size_t i = 0; i < count; ++i) words[i] = word_of(kernel.codes[i], PyTuple_GET_ITEM(args.ptr(), i));
  py::gil_scoped_release release;
  kernel.call(words);
}

py::cpp_function kernel(const std::string& name) {
  const dz::Kernel* const* levels = dz::kernel_levels(name);
  return py::cpp_function([levels](const py::args& args) { call(levels, args); });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("kernel", &kernel);
  module.def("kernels", &dz::kernel_names);
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
