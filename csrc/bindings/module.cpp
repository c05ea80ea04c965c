// longrope._C: loads the ops and tells what was built. The ops themselves are torch.ops.longrope.*.
#include <torch/extension.h>
#include <torch/version.h>

#include <string>

#include "attention/attention.h"
#include "bindings/cuda.h"
#include "common/cpu/isa.h"
#ifdef LONGROPE_CUDA
#include "bindings/perplexity_chunks.h"
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = LONGROPE_VERSION;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef LONGROPE_CUDA
  info["cuda"] = LONGROPE_CUDA;
  info["wgmma"] = longrope::attention_cuda_has_wgmma();
#else
  info["cuda"] = pybind11::none();
  info["wgmma"] = false;
#endif
  info["isa"] = longrope::isa_name(longrope::isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("MAX_HEAD_DIM") = longrope::kMaxHeadDim;  // of attention
  m.def("build_info", &build_info,
        "What this extension was built from and for: version, torch, compiler, openmp, cuda "
        "(toolkit version or None), wgmma (whether it has the attention kernels of compute "
        "capability 9.0), and isa, the CPU instruction set in use.");
  m.def(
      "cuda_launches",
      [] {
#ifdef LONGROPE_CUDA
        return longrope::cuda_launches.load();
#else
        return int64_t{0};
#endif
      },
      "How often an op has gone to a CUDA device in this process.");
#ifdef LONGROPE_CUDA
  m.def(
      "set_nll_chunks",
      [](int64_t rows, int64_t columns) {
        if (rows < 1 || columns < 1)
          throw pybind11::value_error("chunks: expected sizes from 1 on");
        longrope::nll_chunks() = {rows, columns};
      },
      pybind11::arg("rows"), pybind11::arg("columns"),
      "Let linear_nll on CUDA make so many rows and columns of logits at a time: for benchmarks.");
  m.def("cuda_attention", &longrope::attention_cuda_kernel,
        "Which kernel attends on CUDA: auto, mma or wgmma.");
  m.def("set_cuda_attention", &longrope::set_attention_cuda_kernel, pybind11::arg("kernel"),
        "Use one of them from now on: wgmma (compute capability 9.0) wherever it can be, mma never "
        "that one, auto (at first) the one that is expected to be faster; ValueError for others.");
#endif
  m.def(
      "isa", [] { return std::string(longrope::isa_name(longrope::isa())); },
      "The CPU instruction set in use: scalar, avx2 or avx512.");
  m.def(
      "set_isa", [](const std::string& name) { longrope::set_isa(name.c_str()); },
      pybind11::arg("name"),
      "Use another CPU instruction set from now on; ValueError where the processor lacks it.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(longrope::best_isa()); ++i) {
          names.emplace_back(longrope::isa_name(static_cast<longrope::Isa>(i)));
        }
        return names;
      },
      "The CPU instruction sets that this processor has.");
}
