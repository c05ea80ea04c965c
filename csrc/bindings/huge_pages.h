// Memory that is about to be written for the first time.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace longrope {

// Asks for huge pages under a fresh tensor. Writing fresh memory takes a page fault every 4 KiB,
// which costs several times as much as the writing itself; huge pages take one every 2 MiB. A
// refusal (no support, no memory) changes nothing, so it is not an error.
inline void prefer_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (!tensor.is_cpu() || tensor.storage().nbytes() < 2 * kPage) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.storage().data());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + tensor.storage().nbytes()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace longrope
