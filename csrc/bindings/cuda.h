// How the bindings run a CUDA kernel: on the tensor's device, on torch's current stream.
#pragma once

#ifdef LONGROPE_CUDA

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace longrope {

// Calls f(stream) with the device of `like` current. A launch that is refused throws (the launchers
// check), which Python sees as a RuntimeError.
template <typename F>
void on_device_of(const at::Tensor& like, const F& f) {
  const c10::cuda::CUDAGuard guard(like.device());
  f(static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace longrope

#endif
