// build_info(): what this library was compiled with. Nothing here touches tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_config.h"  // written by repdeg_fast/native/build.py next to the objects

static std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

static std::string instruction_set() {
  std::string found;
#ifdef __AVX2__
  found += "avx2 ";
#endif
#ifdef __FMA__
  found += "fma ";
#endif
#ifdef __AVX512F__
  found += "avx512f ";
#endif
#ifdef __AVX512BF16__
  found += "avx512_bf16 ";
#endif
#ifdef __ARM_NEON
  found += "neon ";
#endif
#ifdef __ARM_FEATURE_SVE
  found += "sve ";
#endif
  return found.empty() ? "baseline" : found.substr(0, found.size() - 1);
}

static std::map<std::string, std::string> build_info() {
  return {{"compiler", compiler()},
          {"flags", REPDEG_FAST_FLAGS},
          {"instruction_set", instruction_set()},
          {"cuda_architectures", REPDEG_FAST_CUDA_ARCHITECTURES}};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "Compiler, flags, instruction set and CUDA architectures of this build.");
}
