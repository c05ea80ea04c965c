// The longer C++ twins of ptx.cuh, written from the PTX ISA's description of each instruction.
#pragma once

#include "common/cuda/types.cuh"

#ifndef __CUDACC__

namespace longrope::cuda::twin {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3FF;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return as_float(sign | wide << 23 | mantissa << 13);
}

// To nearest, ties to even; NaN becomes the one NaN that the hardware gives.
inline bf16 to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline f16 to_f16(float x) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7FFFFFFF;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return {0x7FFF};
  uint32_t half;
  if (magnitude >= 0x477FF000) {  // 65520 and more round to infinity
    half = 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, rounded by the addition
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// What lane i receives is the value of lane source(i), or poison where that lane is absent.
template <typename T, typename Source>
T shuffle(const char* name, uint32_t mask, T value, Site site, Source source) {
  struct Exchange {
    T value, result;
    int source;
  } mine;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  mine.value = value;
  mine.source = source(emulation::lane());
  emulation::join_warp(
      name, mask, &mine,
      [](void** lanes, uint32_t) {
        for (int i = 0; i < 32; ++i) {
          auto* to = static_cast<Exchange*>(lanes[i]);
          if (!to) continue;
          const int j = to->source;
          auto* from = j >= 0 && j < 32 ? static_cast<Exchange*>(lanes[j]) : nullptr;
          if (from) {
            to->result = from->value;
          } else {
            std::memset(&to->result, emulation::kPoisonByte, sizeof(T));
          }
        }
      },
      site);
  return mine.result;
}

struct Vote {
  bool predicate;
  uint32_t yes, no;
};

inline Vote vote(const char* name, uint32_t mask, bool predicate, Site site) {
  Vote mine{predicate, 0, 0};
  emulation::join_warp(
      name, mask, &mine,
      [](void** lanes, uint32_t) {
        uint32_t yes = 0, no = 0;
        for (int i = 0; i < 32; ++i) {
          auto* vote = static_cast<Vote*>(lanes[i]);
          if (vote) (vote->predicate ? yes : no) |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          auto* vote = static_cast<Vote*>(lanes[i]);
          if (vote) vote->yes = yes, vote->no = no;
        }
      },
      site);
  return mine;
}

inline void load_matrices(uint32_t* registers, int count, bool transpose, const void* row,
                          Site site) {
  struct Load {
    uint32_t* registers;
    int count;
    bool transpose;
    const void* row;
    Site site;
  } mine{registers, count, transpose, row, site};
  if (emulation::lane() < 8 * count) {
    emulation::check_aligned(row, 16, "ldmatrix", site);
    emulation::check_shared(row, 16, "ldmatrix", site);
  }
  emulation::join_warp(
      "ldmatrix", 0xFFFFFFFFu, &mine,
      [](void** lanes, uint32_t present) {
        auto lane = [&](int i) -> Load& { return *static_cast<Load*>(lanes[i]); };
        if (~present) emulation::fail("ldmatrix in a warp that has lost lanes", Site::here());
        for (int matrix = 0; matrix < lane(0).count; ++matrix) {
          uint16_t elements[8][8];
          for (int r = 0; r < 8; ++r) std::memcpy(elements[r], lane(8 * matrix + r).row, 16);
          for (int t = 0; t < 32; ++t) {
            const int r = t / 4, c = 2 * (t % 4);
            const bool flip = lane(t).transpose;
            const uint32_t low = flip ? elements[c][r] : elements[r][c];
            const uint32_t high = flip ? elements[c + 1][r] : elements[r][c + 1];
            lane(t).registers[matrix] = low | high << 16;
          }
        }
      },
      site);
}

// Products are exact in float; sums are taken in float from k = 0 up. (Hardware adds in another
// order and truncates: no closer than this.)
template <typename T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4], Site site) {
  struct Fragment {
    float* d;
    const uint32_t *a, *b;
    const float* c;
  } mine{d, a, b, c};
  emulation::join_warp(
      "mma.sync", 0xFFFFFFFFu, &mine,
      [](void** lanes, uint32_t present) {
        if (~present) emulation::fail("mma.sync in a warp that has lost lanes", Site::here());
        float a[16][16], b[16][8], sum[16][8];
        auto element = [](uint32_t pair, int which) {
          return twin::to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
        };
        for (int t = 0; t < 32; ++t) {
          const auto& from = *static_cast<Fragment*>(lanes[t]);
          const int group = t / 4, pair = 2 * (t % 4);
          for (int e = 0; e < 2; ++e) {
            for (int r = 0; r < 4; ++r) {
              a[group + 8 * (r & 1)][pair + e + 8 * (r >> 1)] = element(from.a[r], e);
            }
            for (int r = 0; r < 2; ++r) b[pair + e + 8 * r][group] = element(from.b[r], e);
            for (int r = 0; r < 2; ++r) sum[group + 8 * r][pair + e] = from.c[2 * r + e];
          }
        }
        for (int i = 0; i < 16; ++i) {
          for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) sum[i][j] += a[i][k] * b[k][j];
          }
        }
        for (int t = 0; t < 32; ++t) {
          auto& to = *static_cast<Fragment*>(lanes[t]);
          const int group = t / 4, pair = 2 * (t % 4);
          for (int r = 0; r < 4; ++r) to.d[r] = sum[group + 8 * (r >> 1)][pair + (r & 1)];
        }
      },
      site);
}

}  // namespace longrope::cuda::twin

#endif
