// Cosines and sines of phases, for one instruction set (no include guard: part of a body).

// cos and sin of a phase in fixed point turns, to float32 rounding: within 1.2 ulp at every phase.
inline void cos_sin(uint64_t phase, float& cos, float& sin) {
  // The nearest quarter turn, and the rest in [-1/8, 1/8) turns as a float with all its bits: the
  // upper word alone would lose small angles.
  const uint64_t rounded = phase + (uint64_t{1} << 61);
  const int32_t quadrant = static_cast<int32_t>(rounded >> 62);
  const int64_t rest = static_cast<int64_t>(phase - (rounded & uint64_t{3} << 62));
  const int32_t upper = static_cast<int32_t>(rest >> 32);
  const int32_t lower = static_cast<int32_t>(static_cast<uint32_t>(rest) >> 1);
  const float t = static_cast<float>(upper) * 0x1p-32f + static_cast<float>(lower) * 0x1p-63f;
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
  const float x = quadrant & 1 ? s : c;
  const float y = quadrant & 1 ? c : s;
  cos = (quadrant + 1) & 2 ? -x : x;
  sin = quadrant & 2 ? -y : y;
}

// The same to double rounding (libm).
inline void cos_sin(uint64_t phase, double& cos, double& sin) {
  constexpr double kTwoPi = 6.283185307179586476925;
  const double angle = static_cast<double>(static_cast<int64_t>(phase)) * (0x1p-64 * kTwoPi);
  cos = std::cos(angle);
  sin = std::sin(angle);
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

// cos and sin [end - begin, pairs] of the tokens [begin, end) of a row, times its factor if asked.
template <typename Value>
void fill_table(const RopeParams& p, int64_t row, int64_t begin, int64_t end, Value factor,
                const uint64_t* frequencies, Value* cos, Value* sin) {
  const RowTiers tiers = tiers_of(p, row);
  const int64_t turn_start = start_tokens_of(p.turn, row, tiers.turn);
  const int64_t undo_start = start_tokens_of(p.undo, row, tiers.undo);
  for (int64_t token = begin; token < end; ++token, cos += p.pairs, sin += p.pairs) {
    const int64_t position = position_of(p, row, token);
    const int set = is_below(turn_start, position) + 2 * is_below(undo_start, position);
    const uint64_t* net = frequencies + set * p.pairs;
#pragma omp simd
    for (int64_t i = 0; i < p.pairs; ++i) {
      Value c, s;
      cos_sin(static_cast<uint64_t>(position) * net[i], c, s);
      cos[i] = factor * c;
      sin[i] = factor * s;
    }
  }
}
