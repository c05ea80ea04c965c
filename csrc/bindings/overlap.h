// Whether tensors that are written in place share elements.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace longrope {

struct OverlapDim {
  int64_t size_a, size_b, stride;
};

// Whether two boxes with nested strides (each at least the extent of the dimensions after it) meet,
// `delta` elements apart. Exact: the dimensions after one add less than its stride, so that only
// the two neighbouring multiples can fit.
inline bool boxes_meet(const std::vector<OverlapDim>& dims, size_t from, int64_t delta) {
  if (from == dims.size()) return delta == 0;
  const auto& dim = dims[from];
  int64_t steps = delta / dim.stride;
  if (steps * dim.stride > delta) --steps;  // rounds down
  for (const int64_t n : {steps, steps + 1}) {
    // element i of a is element j of b where i - j = n
    if (-dim.size_b < n && n < dim.size_a && boxes_meet(dims, from + 1, delta - n * dim.stride)) {
      return true;
    }
  }
  return false;
}

// Strides of dimensions longer than one, largest first; empty `dims` for a single element.
inline std::vector<OverlapDim> overlap_dims(const at::Tensor& a, const at::Tensor& b) {
  std::vector<OverlapDim> dims;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) == 1 && b.size(d) == 1) continue;
    const int64_t stride = a.size(d) == 1 ? b.stride(d) : a.stride(d);
    dims.push_back({a.size(d), b.size(d), stride});
  }
  std::sort(dims.begin(), dims.end(),
            [](const OverlapDim& x, const OverlapDim& y) { return x.stride > y.stride; });
  return dims;
}

inline bool nested(const std::vector<OverlapDim>& dims) {
  int64_t extent = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->stride < extent) return false;
    extent += (std::max(dim->size_a, dim->size_b) - 1) * dim->stride;
  }
  return true;
}

// Whether two indices of the tensor may be one element (as in an expanded tensor). Sufficient test:
// strides that are not nested count as overlap.
inline bool may_overlap_itself(const at::Tensor& tensor) {
  return tensor.numel() > 0 && !nested(overlap_dims(tensor, tensor));
}

// Whether two tensors may share an element. Exact for slices of one parent (a fused projection, a
// cache); where strides differ, by the range of addresses.
inline bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.device() != b.device()) return false;
  const auto begin = [](const at::Tensor& t) { return reinterpret_cast<intptr_t>(t.data_ptr()); };
  const auto end = [&](const at::Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  if (end(a) <= begin(b) || end(b) <= begin(a)) return false;
  const int64_t delta = begin(b) - begin(a), size = static_cast<int64_t>(a.element_size());
  bool comparable = a.scalar_type() == b.scalar_type() && a.dim() == b.dim() && delta % size == 0;
  for (int64_t d = 0; comparable && d < a.dim(); ++d) {
    comparable = a.stride(d) == b.stride(d) || a.size(d) == 1 || b.size(d) == 1;
  }
  if (!comparable) return true;
  const auto dims = overlap_dims(a, b);
  return !nested(dims) || boxes_meet(dims, 0, delta / size);
}

}  // namespace longrope
