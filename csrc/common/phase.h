// Rotation angles as 64-bit fixed point: one turn is 2^64, so integer arithmetic reduces them.
//
//   frequency = turns_per_token(inv_freq)       round(inv_freq / (2 pi) * 2^64) mod 2^64
//   phase     = uint64_t(position) * frequency  mod one turn, any position of either sign
//
// The product is exact; the frequency is off by up to half a unit of 2^-64 turns, the phase by that
// times the position: 7e-13 rad at position 2^22, 8e-7 at 2^42, 0.2 at 2^60. Float32 products of
// position and inv_freq are off by 0.16 rad at 2^21. More bits would say little: an inv_freq of one
// radian per token, rounded to double, is off by up to 1e-16, 650 times half such a unit.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace longrope {

// The upper half of the 128-bit product.
LONGROPE_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// The 64 bits of 1 / (2 pi) from the bit of weight 2^-first on; bits before the point are zero.
LONGROPE_HOST_DEVICE inline uint64_t inverse_two_pi_bits(int first) {
  // 1152 bits, enough for every finite double (largest exponent 971, 128 bits from there on).
  constexpr int kWords = 18;
  static constexpr uint64_t words[kWords] = {
      0x28be60db9391054a, 0x7f09d5f47d4d3770, 0x36d8a5664f10e410, 0x7f9458eaf7aef158,
      0x6dc91b8e909374b8, 0x01924bba82746487, 0x3f877ac72c4a69cf, 0xba208d7d4baed121,
      0x3a671c09ad17df90, 0x4e64758e60d4ce7d, 0x272117e2ef7e4a0e, 0xc7fe25fff7816603,
      0xfbcbc462d6829b47, 0xdb4d9fb3c9f2c26d, 0xd3d18fd9a797fa8b, 0x5d49eeb1faf97c5e,
      0xcf41ce7de294a4ba, 0x9afed7ec47e35742};
  const int bit = first - 1;
  const int word = bit >> 6;  // rounds down, also below zero
  const int shift = bit & 63;
  const uint64_t here = word >= 0 && word < kWords ? words[word] : 0;
  const uint64_t next = word + 1 >= 0 && word + 1 < kWords ? words[word + 1] : 0;
  return shift == 0 ? here : here << shift | next >> (64 - shift);
}

// Turns per token, 2^64 to the turn, of a finite inv_freq in radians per token.
//
// inv_freq = m 2^e with an integer m < 2^53, so the result is m X mod 2^64 with X = 2^(e+64) / (2
// pi), and of X only the bits 2^63 ... 2^-64 matter (Payne and Hanek's reduction).
LONGROPE_HOST_DEVICE inline uint64_t turns_per_token(double inv_freq) {
  uint64_t bits;
  std::memcpy(&bits, &inv_freq, sizeof(bits));
  const int biased = static_cast<int>(bits >> 52 & 0x7ff);
  const uint64_t fraction = bits & 0xfffffffffffff;
  const uint64_t m = biased == 0 ? fraction : fraction | uint64_t{1} << 52;
  const int e = (biased == 0 ? 1 : biased) - 1075;
  const uint64_t whole = inverse_two_pi_bits(e + 1);   // X mod 2^64
  const uint64_t below = inverse_two_pi_bits(e + 65);  // the next 64 bits of X
  const uint64_t turns = m * whole + multiply_high(m, below) + (m * below >> 63);
  return bits >> 63 ? -turns : turns;
}

}  // namespace longrope
