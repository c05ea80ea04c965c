// Constants and the arithmetic of counts, on the host and on the device.
#pragma once

#include "common/host_device.h"

namespace longrope {

constexpr double kLog2E = 1.4426950408889634;  // log2(e)
constexpr double kLn2 = 0.6931471805599453;    // ln 2

// Of whole numbers that are not negative; `b` is positive.
template <typename A, typename B>
constexpr LONGROPE_HOST_DEVICE auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// To a multiple of b.
template <typename A, typename B>
constexpr LONGROPE_HOST_DEVICE auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace longrope
