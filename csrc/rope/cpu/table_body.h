// Cosines and sines of phases, for one instruction set (no include guard: part of a body).

// x, negated where the first bit of a word is set.
inline float with_sign(float x, uint32_t word) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits ^= word & uint32_t{1} << 31;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// cos and sin of a phase in fixed point turns, to float32 rounding: within 1.2 ulp at every phase.
// The two words of the phase apart, so that nothing here is wider than the floats beside it.
inline void cos_sin(uint32_t upper, uint32_t lower, float& cos, float& sin) {
  // The nearest quarter turn, in the two first bits, and the rest in [-1/8, 1/8) turns as a float
  // with all its bits: the upper word alone would lose small angles.
  const uint32_t quarters = upper + (uint32_t{1} << 29);
  const int32_t rest = static_cast<int32_t>(upper << 2) >> 2;
  const float t = static_cast<float>(rest) * 0x1p-32f +
                  static_cast<float>(static_cast<int32_t>(lower >> 1)) * 0x1p-63f;
  // Minimax polynomials on [-1/8, 1/8] (Remez): sin(2 pi t) to 3.6e-9 relative, with 2 pi in two
  // parts, and cos(2 pi t) to 5.4e-11.
  const float z = t * t;
  const float s_low =
      ((-75.4533964115f * z + 81.5939369558f) * z - 41.3416731616f) * z - 1.74845560e-7f;
  const float s = t * 6.28318548f + t * s_low;
  const float c =
      (((59.2459642889f * z - 85.4437417324f) * z + 64.9393264717f) * z - 19.7392086937f) * z +
      1.0f;
  // Quarter turns swap the two and set signs.
  const bool swapped = quarters & uint32_t{1} << 30;
  const float x = swapped ? s : c, y = swapped ? c : s;
  cos = with_sign(x, quarters + (uint32_t{1} << 30));
  sin = with_sign(y, quarters);
}

inline void cos_sin(uint64_t phase, float& cos, float& sin) {
  cos_sin(static_cast<uint32_t>(phase >> 32), static_cast<uint32_t>(phase), cos, sin);
}

// The same to double rounding (libm).
inline void cos_sin(uint64_t phase, double& cos, double& sin) {
  constexpr double kTwoPi = 6.283185307179586476925;
  const double angle = static_cast<double>(static_cast<int64_t>(phase)) * (0x1p-64 * kTwoPi);
  cos = std::cos(angle);
  sin = std::sin(angle);
}

inline void cos_sin(uint32_t upper, uint32_t lower, double& cos, double& sin) {
  cos_sin(static_cast<uint64_t>(upper) << 32 | lower, cos, sin);
}

// Adds or subtracts the fixed point frequencies of one row, [pairs], pair i at slot(pairs, i).
template <typename Slot>
void add_frequencies(const RopeFrequencies& f, int64_t row, int64_t tier, bool base, bool subtract,
                     int64_t pairs, const Slot& slot, uint64_t* total) {
  if (!f.inv_freq || tier < 0) return;
  const double* inv_freq = frequencies_of(f, row, tier, base, pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    const uint64_t turns = turns_per_token(inv_freq[i]);
    total[slot(pairs, i)] += subtract ? -turns : turns;
  }
}

// [4, pairs] net frequencies of a row: 1 is added to the index of positions below the start tokens
// of `turn`, 2 below those of `undo`. Sets that no position can use are left alone.
template <typename Slot>
void row_frequencies(const RopeParams& p, int64_t row, const Slot& slot, uint64_t* frequencies) {
  const RowTiers tiers = tiers_of(p, row);
  for (int set = 0; set < 4; ++set) {
    const bool below_turn = set & 1, below_undo = set & 2;
    if ((below_turn && start_tokens_of(p.turn, row, tiers.turn) <= 0) ||
        (below_undo && start_tokens_of(p.undo, row, tiers.undo) <= 0)) {
      continue;
    }
    uint64_t* total = frequencies + set * p.pairs;
    std::memset(total, 0, p.pairs * sizeof(uint64_t));
    add_frequencies(p.turn, row, tiers.turn, below_turn, false, p.pairs, slot, total);
    add_frequencies(p.undo, row, tiers.undo, below_undo, true, p.pairs, slot, total);
  }
}

// cos and sin [count, pairs] of tokens at consecutive positions, times a factor. Each phase is the
// one before it and the frequency: exact, and an addition where a processor has no product of 64
// bits.
template <typename Value>
void fill_run(uint64_t position, int64_t count, int64_t pairs, Value factor,
              const uint64_t* frequencies, Value* cos, Value* sin) {
  constexpr int64_t kChunk = 64;
  uint32_t upper[kChunk], lower[kChunk], upper_step[kChunk], lower_step[kChunk];
  for (int64_t first = 0; first < pairs; first += kChunk) {
    const int64_t chunk = pairs - first < kChunk ? pairs - first : kChunk;
    for (int64_t i = 0; i < chunk; ++i) {
      const uint64_t step = frequencies[first + i], phase = position * step;
      upper[i] = static_cast<uint32_t>(phase >> 32);
      lower[i] = static_cast<uint32_t>(phase);
      upper_step[i] = static_cast<uint32_t>(step >> 32);
      lower_step[i] = static_cast<uint32_t>(step);
    }
    for (int64_t token = 0; token < count; ++token) {
      Value *const cos_row = cos + token * pairs + first, *const sin_row =
                                                              sin + token * pairs + first;
#pragma omp simd
      for (int64_t i = 0; i < chunk; ++i) {
        Value c, s;
        cos_sin(upper[i], lower[i], c, s);
        cos_row[i] = factor * c;
        sin_row[i] = factor * s;
        const uint32_t sum = lower[i] + lower_step[i];
        upper[i] += upper_step[i] + (sum < lower_step[i]);
        lower[i] = sum;
      }
    }
  }
}

// The same for elements of 16 bits, at a fraction of the work: phases of one position in kSpacing,
// and from there turns by 0 to kSpacing - 1 tokens, products of two rows of cosines and sines. The
// positions with a phase are multiples of kSpacing wherever a run begins, so that a position has
// one value; it is within 4e-7 of the angle's.
class SpacedRuns {
 public:
  static constexpr int64_t kSpacing = kPhaseSpacing;

  static int64_t floats(int64_t pairs) { return 2 * (kSpacing + 1) * pairs; }

  // `memory` of floats(pairs); `tokens` that are to come by the same frequencies tell whether to
  // keep all turns.
  SpacedRuns(float* memory, int64_t pairs, int64_t tokens)
      : memory_(memory), pairs_(pairs), keep_(tokens >= kSpacing) {}

  // To be called where the numbers behind the pointers to frequencies have changed.
  void forget() { kept_ = nullptr; }

  void fill(uint64_t position, int64_t count, float factor, const uint64_t* frequencies, float* cos,
            float* sin) {
    if (keep_ && kept_ != frequencies) {
      fill_run(0, kSpacing, pairs_, 1.0f, frequencies, turn(0), turn(0) + pairs_ * kSpacing);
      kept_ = frequencies;
    }
    float *const base_cos = memory_ + 2 * kSpacing * pairs_, *const base_sin = base_cos + pairs_;
    for (int64_t token = 0; token < count; ++token, cos += pairs_, sin += pairs_) {
      const uint64_t steps = (position + token) % kSpacing;
      if (token == 0 || steps == 0) {
        fill_run(position + token - steps, 1, pairs_, factor, frequencies, base_cos, base_sin);
      }
      float *const turn_cos = turn(steps), *const turn_sin = turn_cos + pairs_ * kSpacing;
      if (!keep_) fill_run(steps, 1, pairs_, 1.0f, frequencies, turn_cos, turn_sin);
#pragma omp simd
      for (int64_t i = 0; i < pairs_; ++i) {
        cos[i] = base_cos[i] * turn_cos[i] - base_sin[i] * turn_sin[i];
        sin[i] = base_sin[i] * turn_cos[i] + base_cos[i] * turn_sin[i];
      }
    }
  }

 private:
  // Cosines of a turn; its sines are kSpacing rows behind.
  float* turn(uint64_t steps) const { return memory_ + steps * pairs_; }

  float* memory_;  // [2, kSpacing, pairs] turns, [2, pairs] of the last position with a phase
  int64_t pairs_;
  bool keep_;
  const uint64_t* kept_ = nullptr;  // whose turns these are
};

// Calls fill(position, tokens, frequencies, first) for each run of consecutive positions that turn
// by the same frequencies, among the tokens [begin, end) of a row; `first` counts from `begin`.
template <typename Fill>
void for_runs(const RopeParams& p, int64_t row, int64_t begin, int64_t end,
              const uint64_t* frequencies, const Fill& fill) {
  const RowTiers tiers = tiers_of(p, row);
  const int64_t turn_start = start_tokens_of(p.turn, row, tiers.turn);
  const int64_t undo_start = start_tokens_of(p.undo, row, tiers.undo);
  const auto set_of = [&](int64_t position) {
    return is_below(turn_start, position) + 2 * is_below(undo_start, position);
  };
  for (int64_t token = begin; token < end;) {
    const int64_t position = position_of(p, row, token), set = set_of(position);
    int64_t stop = token + 1;
    const auto follows = [&](int64_t next) {
      return static_cast<uint64_t>(next) - static_cast<uint64_t>(position) ==
             static_cast<uint64_t>(stop - token);
    };
    while (stop < end && follows(position_of(p, row, stop)) &&
           set_of(position_of(p, row, stop)) == set) {
      ++stop;
    }
    fill(static_cast<uint64_t>(position), stop - token, frequencies + set * p.pairs, token - begin);
    token = stop;
  }
}
