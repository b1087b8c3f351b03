// The module _host tells Python which instruction sets the compiled kernels have and this CPU runs. It takes no
// tensors, and includes no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "simd/isa.h"

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const lumos::IsaInfo& info : lumos::kIsas) {
    if (info.isa != lumos::Isa::amx_model && info.supported()) names.emplace_back(info.name);
  }
  return names;
}

std::vector<std::string> supported_models() {
  std::vector<std::string> names;
  for (const lumos::IsaInfo& info : lumos::kIsas) {
    if (info.isa == lumos::Isa::amx_model && info.supported()) names.emplace_back(info.name);
  }
  return names;
}

std::map<std::string, int> isa_values() {
  std::map<std::string, int> values;
  for (const lumos::IsaInfo& info : lumos::kIsas) values[info.name] = static_cast<int>(info.isa);
  return values;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What the compiled library offers on this CPU.";
  m.def("supported_isas", supported_isas, "Instruction sets with compiled kernels that this CPU runs, best first.");
  m.def("supported_models", supported_models, "Instruction sets in software that this CPU runs, for tests.");
  m.attr("ISA_VALUES") = isa_values();  // the values that the ops of _ops.so take for `isa`
  m.attr("COMPILER") = compiler();
}
