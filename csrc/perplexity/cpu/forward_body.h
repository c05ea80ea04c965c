// Forward (no include guard: part of a body): each thread owns a range of the vocabulary (or of the
// tokens, where the vocabulary is small) and runs through it in chunks of weight rows that stay in
// its L2 cache while all tokens pass. A tile of logits is reduced to two numbers per token as soon
// as it is complete.

// Weight rows per tile: half a megabyte of them (half of a common L2), at most 256 (a tile of 64
// KiB).
inline int64_t chunk_rows(int64_t row_bytes) {
  const int64_t rows = (512 << 10) / std::max<int64_t>(row_bytes, 1);
  return std::clamp<int64_t>(rows / 32 * 32, 64, 256);
}

// How many parts the vocabulary and the tokens are cut into, to occupy all threads.
struct Split {
  Split(int64_t threads, int64_t vocab, int64_t chunk, int64_t panels) {
    if (vocab < 4 * chunk * threads && panels >= 4 * threads) {
      by_vocab = 1;
    } else {
      by_vocab = std::clamp<int64_t>(vocab / 128, 1, threads);
    }
    by_tokens = std::clamp<int64_t>(threads / by_vocab, 1, panels);
  }
  int64_t by_vocab;
  int64_t by_tokens;
};

template <class T, class Operand>
void forward_block(const Problem<T, Operand>& problem, const int64_t* pick, int64_t count) {
  using Real = RealOf<T>;
  constexpr Real kLowest = -std::numeric_limits<Real>::infinity();
  const LinearNllParams& params = problem.params;
  const int64_t embed = params.embed;
  const Panels panels(count, 16);
  const Buffer<Operand> hidden = pack_hidden(problem, pick, panels);
  const int64_t chunk = chunk_rows(embed * sizeof(Operand));
  const Split split(problem.runtime.threads, params.vocab, chunk, panels.panels);

  const int64_t padded = panels.padded;
  std::vector<Real> max(split.by_vocab * padded, kLowest);
  std::vector<Real> sum(split.by_vocab * padded, Real{0});
  std::vector<Real> target_logit(padded);
  const bool in_place = problem.weight_in_place();

  problem.runtime.for_each(split.by_vocab * split.by_tokens, [&](int64_t task) {
    const int64_t part = task / split.by_tokens, share = task % split.by_tokens;
    const int64_t units = ceil_div(params.vocab, 32);
    const int64_t first = units * part / split.by_vocab * 32;
    const int64_t last = std::min(units * (part + 1) / split.by_vocab * 32, params.vocab);
    const int64_t first_panel = panels.panels * share / split.by_tokens;
    const int64_t last_panel = panels.panels * (share + 1) / split.by_tokens;
    // Equal chunks instead of a small one at the end.
    const int64_t chunks = std::max<int64_t>(ceil_div(last - first, chunk), 1);
    const int64_t step = round_up(ceil_div(last - first, chunks), 32);

    const Buffer<Real> tile(step * kPanel);
    const Buffer<Operand> converted(in_place ? 0 : step * embed);
    for (int64_t v = first; v < last; v += step) {
      const int64_t m = std::min(step, last - v);
      if (!in_place) problem.read_rows(params.weight, nullptr, v, m, converted);
      const Operand* const weight = in_place ? problem.weight_row(v) : converted;
      const int64_t stride = in_place ? params.weight.row_stride : embed;
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t n = panels.width(p);
        problem.multiply(m, n, embed, stride, n, false, weight, hidden + p * kPanel * embed, tile);
        if (params.softcap != 0.0) softcap_tile<Real>(tile, m, n, params.softcap);
        const int64_t at = part * padded + p * kPanel;
        add_to_statistics<Real>(tile, m, n, &max[at], &sum[at]);
        for (int64_t c = 0; c < panels.tokens(p); ++c) {
          const int64_t row = params.targets[pick[p * kPanel + c]] - v;
          if (row >= 0 && row < m) target_logit[p * kPanel + c] = tile[row * n + c];
        }
      }
    }
    problem.end_of_task();
  });

  Real* nll = static_cast<Real*>(params.nll);
  Real* stats = static_cast<Real*>(params.stats);
  problem.runtime.for_each(panels.panels, [&](int64_t p) {
    for (int64_t t = p * kPanel; t < p * kPanel + panels.tokens(p); ++t) {
      Real most = max[t];
      for (int64_t part = 1; part < split.by_vocab; ++part) {
        most = std::max(most, max[part * padded + t]);
      }
      Real total = 0;
      for (int64_t part = 0; part < split.by_vocab; ++part) {
        const Real top = max[part * padded + t], partial = sum[part * padded + t];
        // A part of which every logit is -inf adds nothing (and -inf - -inf must not be formed).
        const bool empty = top == kLowest && partial == Real{0};
        if (!empty) total += partial * natural_exp(top - most);
      }
      const Real log_sum = natural_log(total);
      stats[pick[t]] = most;
      stats[params.rows + pick[t]] = log_sum;
      nll[pick[t]] = (most - target_logit[t]) + log_sum;
    }
  });
}

template <class T, class Operand>
void forward_all(const Problem<T, Operand>& problem) {
  const LinearNllParams& params = problem.params;
  std::fill_n(static_cast<RealOf<T>*>(params.nll), params.rows, 0);
  std::fill_n(static_cast<RealOf<T>*>(params.stats), 2 * params.rows, 0);
  const std::vector<int64_t> rows = problem.scored_rows();
  const int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t r = 0; r < count; r += kBlockTokens) {
    forward_block(problem, rows.data() + r, std::min(kBlockTokens, count - r));
  }
}
