// Arrays of any element type as doubles and back, one bit at a time: slow and plainly right.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtype.h"

namespace elements {

using longrope::DType;

inline size_t size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

// Bits of the mantissa, the leading one included.
inline int precision(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 24;
    case DType::kBFloat16:
      return 8;
    case DType::kFloat16:
      return 11;
    default:
      return 53;
  }
}

inline double epsilon(DType dtype) { return std::ldexp(1.0, 1 - precision(dtype)); }

// The nearest value of the type, for normal numbers in its range (for float16, magnitudes above
// 2^-14 and multiples of 2^-24 below).
inline double round_to(DType dtype, double value) {
  if (value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  int unit = exponent - precision(dtype);
  if (dtype == DType::kFloat16 && unit < -24) unit = -24;
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

inline std::vector<unsigned char> encode(DType dtype, const std::vector<double>& values) {
  std::vector<unsigned char> bytes(values.size() * size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    unsigned char* target = bytes.data() + i * size(dtype);
    const double value = values[i];
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == DType::kFloat64) {
      std::memcpy(target, &value, 8);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(target, &single, 4);
    } else {
      uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16
      if (dtype == DType::kFloat16) {
        const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
        const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
        half = exponent >= -14 ? static_cast<uint16_t>((exponent + 15) << 10 | (bits >> 13 & 0x3ff))
                               : static_cast<uint16_t>(std::ldexp(std::fabs(value), 24));
        half = static_cast<uint16_t>(half | sign);
      }
      std::memcpy(target, &half, 2);
    }
  }
  return bytes;
}

inline std::vector<double> decode(DType dtype, const std::vector<unsigned char>& bytes) {
  std::vector<double> values(bytes.size() / size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const unsigned char* source = bytes.data() + i * size(dtype);
    float single;
    uint16_t half;
    if (dtype == DType::kFloat64) {
      std::memcpy(&values[i], source, 8);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(&single, source, 4);
      values[i] = single;
    } else if (dtype == DType::kBFloat16) {
      std::memcpy(&half, source, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&single, &bits, 4);
      values[i] = single;
    } else {
      std::memcpy(&half, source, 2);
      const int exponent = half >> 10 & 0x1f;
      const int mantissa = half & 0x3ff;
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      values[i] = half >> 15 ? -magnitude : magnitude;
    }
  }
  return values;
}

}  // namespace elements
