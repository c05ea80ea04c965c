// How the bindings run a CUDA kernel: on the tensor's device, on torch's current stream.
#pragma once

#ifdef LONGROPE_CUDA

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <atomic>
#include <cstdint>

namespace longrope {

// How often an op has gone to a CUDA device: tests read it, to know that they did.
inline std::atomic<int64_t> cuda_launches{0};

// Calls f(stream) with the device of `like` current. A launch that is refused throws (the launchers
// check), which Python sees as a RuntimeError.
template <typename F>
void on_device_of(const at::Tensor& like, const F& f) {
  const c10::cuda::CUDAGuard guard(like.device());
  ++cuda_launches;
  f(static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace longrope

#endif
