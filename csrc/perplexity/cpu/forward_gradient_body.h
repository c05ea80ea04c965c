// Forward with d nll / d hidden of every token (no include guard: part of a body), for a head that
// is frozen: two matrix products instead of the three that a forward and a backward take. With
// E[v, t] = exp(logit - largest logit so far), R[t] its sum over all rows but the target's, and
// S[t] over all of them,
//
//   d nll[t] / d hidden[t, :] = (sum_{v != target} E[v, t] weight[v, :]) / S[t]
//                               - R[t] / S[t] weight[target, :]
//
// (times softcap's slope). E of a block of the vocabulary is made in two steps, the logits and
// their maxima first, and multiplies the block while it is in the caches; where a maximum grew,
// what is summed already is scaled, as in flash attention. The target is apart because p - 1
// cancels: of a token that is all but certain neither E in 16 bits nor a sum that holds its 1 would
// keep anything.

template <class T, class Operand>
class ForwardWithGradient {
 public:
  using Real = RealOf<T>;

  ForwardWithGradient(const Problem<T, Operand>& problem, const int64_t* pick, int64_t count)
      : problem_(problem),
        params_(problem.params),
        pick_(pick),
        panels_(count, 16),
        hidden_(pack_hidden(problem, pick, panels_)),
        weight_(problem, true),
        gradient_(problem, panels_),
        logits_(weight_.most() * panels_.padded),
        rounded_(kInPlace ? 0 : weight_.most() * panels_.padded),
        tile_max_(ceil_div(weight_.most(), kTileRows) * panels_.padded),
        tile_sum_(tile_max_.size()),
        max_(panels_.padded, kLowest),
        next_max_(panels_.padded),
        scale_(panels_.padded),
        others_(panels_.padded),
        target_logit_(panels_.padded),
        target_(panels_.padded, -1),
        odd_(panels_.padded) {
    for (int64_t t = 0; t < count; ++t) target_[t] = params_.targets[pick[t]];
  }

  // Returns the rows whose target's weights are not all finite: their gradient is wrong, since in
  // its two parts an infinity meets a zero.
  std::vector<int64_t> run() {
    for (int64_t v = 0; v < params_.vocab; v += kBlockVocab) {
      weight_.load(v);
      for_tiles([&](const Tile& tile) { compute_logits(tile); });
      for_tiles([&](const Tile& tile) { exponentiate(tile); });
      gradient_.add(weight_, exponentials(), 0, panels_.panels,
                    [&](int64_t p, Real* sums, int64_t rows) {
                      scale_columns(sums, rows, panels_.width(p), &scale_[p * kPanel]);
                    });
      advance();
    }
    finish();
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < panels_.count; ++t) {
      if (odd_[t]) rows.push_back(pick_[t]);
    }
    return rows;
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<Real, Operand>;
  static constexpr Real kLowest = -std::numeric_limits<Real>::infinity();

  // [m vocabulary rows][n tokens] of the block in hand.
  struct Tile {
    int64_t index, panel, row;  // row counts from the block's first
    int64_t m, n;
    int64_t at;  // where it lies in panels over the vocabulary
  };

  template <class Body>
  void for_tiles(const Body& body) const {
    const int64_t tiles = ceil_div(weight_.count(), kTileRows);
    problem_.runtime.for_each(tiles * panels_.panels, [&](int64_t task) {
      const int64_t i = task / panels_.panels, p = task % panels_.panels, row = i * kTileRows;
      const int64_t n = panels_.width(p);
      body({i, p, row, std::min(kTileRows, weight_.count() - row), n,
            p * kPanel * weight_.padded() + row * n});
    });
  }

  // Which row of the tile is the target of column c; or none of them.
  int64_t target_row(const Tile& tile, int64_t c) const {
    return target_[tile.panel * kPanel + c] - weight_.first() - tile.row;
  }

  Operand* exponentials() const {
    if constexpr (kInPlace) {
      return logits_;
    } else {
      return rounded_;
    }
  }

  void compute_logits(const Tile& tile) {
    Real* const logits = logits_ + tile.at;
    problem_.multiply(tile.m, tile.n, params_.embed, weight_.stride(), tile.n, false,
                      weight_.row(tile.row), hidden_ + tile.panel * kPanel * params_.embed, logits);
    problem_.end_of_task();
    if (params_.softcap != 0.0) softcap_tile<Real>(logits, tile.m, tile.n, params_.softcap);
    const int64_t first = tile.panel * kPanel;
    maxima_of_tile<Real>(logits, tile.m, tile.n, &tile_max_[tile.index * panels_.padded + first]);
    for (int64_t c = 0; c < tile.n; ++c) {
      const int64_t row = target_row(tile, c);
      if (row < 0 || row >= tile.m) continue;
      Real& logit = logits[row * tile.n + c];
      target_logit_[first + c] = logit;
      logit = kLowest;  // not of the others
    }
  }

  void exponentiate(const Tile& tile) {
    const int64_t first = tile.panel * kPanel, tiles = ceil_div(weight_.count(), kTileRows);
    Real most[kPanel], scale[kPanel];
    grown_maxima<Real>(&tile_max_[first], panels_.padded, tiles, tile.n, &max_[first], most, scale);
    if (tile.index == 0) {
      std::copy_n(most, tile.n, &next_max_[first]);
      std::copy_n(scale, tile.n, &scale_[first]);
    }
    Real* const logits = logits_ + tile.at;
    exponentiate_tile<Real>(logits, tile.m, tile.n, most, params_.softcap,
                            &tile_sum_[tile.index * panels_.padded + first]);
    for (int64_t c = 0; c < tile.n; ++c) {
      const int64_t row = target_row(tile, c);
      if (row >= 0 && row < tile.m) logits[row * tile.n + c] = 0;
    }
    // Padding must be zero, also where the weight holds infinities.
    const int64_t padded = std::min(kTileRows, weight_.padded() - tile.row);
    std::fill(logits + tile.m * tile.n, logits + padded * tile.n, Real{0});
    if constexpr (!kInPlace) {
      store_gradient<Operand>(logits, padded, tile.n, nullptr, 0, exponentials() + tile.at);
    }
  }

  // Takes the block's maxima and sums into those of all blocks.
  void advance() {
    const int64_t tiles = ceil_div(weight_.count(), kTileRows);
    for (int64_t t = 0; t < panels_.padded; ++t) {
      Real sum = others_[t] * scale_[t];
      for (int64_t i = 0; i < tiles; ++i) sum += tile_sum_[i * panels_.padded + t];
      others_[t] = sum;
      max_[t] = next_max_[t];
    }
  }

  void finish() {
    Real* const nll = static_cast<Real*>(params_.nll);
    const int64_t embed = params_.embed;
    gradient_.store(pick_, [&](Real* row, int64_t t) {
      const Real top = max_[t], target = target_logit_[t];
      const Real total = others_[t] + natural_exp(target - top);
      const bool likeliest =
          target == top && top > kLowest && top < std::numeric_limits<Real>::infinity();
      nll[pick_[t]] = likeliest ? natural_log1p(others_[t]) : (top - target) + natural_log(total);
      Real of_target = -others_[t] / total;  // p - 1
      if (params_.softcap != 0.0) {
        const Real capped = target / static_cast<Real>(params_.softcap);
        of_target *= 1 - capped * capped;
      }
      const Buffer<Operand> weight(embed);
      problem_.read_rows(params_.weight, nullptr, target_[t], 1, weight);
      const Real inverse = 1 / total;
      Real not_finite = 0;
      for (int64_t e = 0; e < embed; ++e) {
        const Real w = load(weight[e]);
        not_finite += w * 0;
        row[e] = row[e] * inverse + of_target * w;
      }
      Real* const stats = static_cast<Real*>(params_.stats);
      stats[pick_[t]] = top;
      stats[params_.rows + pick_[t]] = natural_log(total);
      if (not_finite != 0) odd_[t] = true;
    });
  }

  const Problem<T, Operand>& problem_;
  const LinearNllParams& params_;
  const int64_t* pick_;  // the rows of hidden that are scored
  const Panels panels_;
  const Buffer<Operand> hidden_;  // panels over the embedding
  WeightBlock<T, Operand> weight_;
  HiddenSum<T, Operand> gradient_;
  const Buffer<Real> logits_;      // of the block, in panels over the vocabulary; then E
  const Buffer<Operand> rounded_;  // E, where it is no operand as it is
  // By token; those of tiles [tile][token].
  std::vector<Real> tile_max_, tile_sum_;
  std::vector<Real> max_, next_max_, scale_;  // before and after the block, and what that scales by
  std::vector<Real> others_, target_logit_;
  std::vector<int64_t> target_;
  std::vector<char> odd_;  // what run() returns
};

template <class T, class Operand>
void forward_with_gradient_all(const Problem<T, Operand>& given) {
  using Real = RealOf<T>;
  // What a backward pass wants, for the few rows that may need one.
  LinearNllParams params = given.params;
  std::vector<Real> stats(2 * params.rows);
  params.stats = stats.data();
  params.grad_weight = nullptr;
  const Problem<T, Operand> problem{params, given.runtime};

  const std::vector<int64_t> rows = problem.scored_rows();
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count < params.rows) {
    std::fill_n(static_cast<Real*>(params.nll), params.rows, 0);
    std::fill_n(static_cast<T*>(params.grad_hidden), params.rows * params.embed, T{});
  }
  for (int64_t r = 0; r < count; r += kBlockTokens) {
    const std::vector<int64_t> odd =
        ForwardWithGradient<T, Operand>(problem, &rows[r], std::min(kBlockTokens, count - r)).run();
    if (odd.empty()) continue;
    const std::vector<Real> ones(params.rows, 1);
    params.grad_nll = ones.data();
    Backward<T, Operand>(problem, odd.data(), static_cast<int64_t>(odd.size())).run();
  }
}

// Rows [begin, end) of the gradient for an upstream gradient; ignored ones are 0 whatever comes.
template <class T>
void scale_gradient(const LinearNllScaleParams& params, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t embed = params.embed;
  const Buffer<Real> row(embed);
  for (int64_t t = begin; t < end; ++t) {
    T* const out = static_cast<T*>(params.grad_hidden) + t * embed;
    if (params.targets[t] == params.ignore_index) {
      std::fill_n(out, embed, T{});
      continue;
    }
    load_row(static_cast<const T*>(params.gradient) + t * embed, row, embed);
    const Real by = static_cast<const Real*>(params.grad_nll)[t];
    for (int64_t e = 0; e < embed; ++e) row[e] *= by;
    store_row(row, out, embed);
  }
}
