// Backward (no include guard: part of a body): the logits are computed again, a block of vocabulary
// rows by a block of tokens at a time; from them the gradient G of that block, and from G the two
// products
//
//   d weight[v, :] = sum_t G[v, t] hidden[t, :]        d hidden[t, :] = sum_v G[v, t] weight[v, :]
//
// G is written in the layouts that the products read. Sums run in the accumulators' type over all
// blocks and are rounded once. Every phase writes to disjoint memory, so the result does not depend
// on the number of threads.

constexpr int64_t kBlockVocab = 1024;  // vocabulary rows of one G; with kBlockTokens 8 MiB of float
constexpr int64_t kTileRows = 128;     // vocabulary rows per tile
constexpr int64_t kCopyRows = 32;      // rows that a thread copies at a time

template <class T, class Operand>
class Backward {
 public:
  using Real = RealOf<T>;

  Backward(const Problem<T, Operand>& problem, const int64_t* pick, int64_t count)
      : problem_(problem),
        params_(problem.params),
        pick_(pick),
        panels_(count, 32),
        embed_(params_.embed),
        embed_padded_(round_up(embed_, 16)),
        block_vocab_(round_up(std::min(kBlockVocab, params_.vocab), 32)),
        block_tokens_(std::min(kBlockTokens, panels_.padded)),
        in_place_(problem.weight_in_place()),
        hidden_(pack_hidden(problem, pick, panels_)),
        hidden_rows_(params_.grad_weight ? embed_padded_ * panels_.padded : 0),
        weight_(in_place_ ? 0 : block_vocab_ * embed_),
        weight_transposed_(params_.grad_hidden ? embed_ * block_vocab_ : 0),
        gradient_rows_(params_.grad_weight ? block_vocab_ * block_tokens_ : 0),
        gradient_panels_(params_.grad_hidden ? block_vocab_ * block_tokens_ : 0),
        grad_weight_(params_.grad_weight ? block_vocab_ * embed_padded_ : 0),
        grad_hidden_(params_.grad_hidden ? embed_ * panels_.padded : 0),
        max_(panels_.padded),
        log_sum_(panels_.padded),
        grad_(panels_.padded) {
    const Real* stats = static_cast<const Real*>(params_.stats);
    const Real* grad = static_cast<const Real*>(params_.grad_nll);
    for (int64_t t = 0; t < count; ++t) {
      max_[t] = stats[pick[t]];
      log_sum_[t] = stats[params_.rows + pick[t]];
      grad_[t] = grad[pick[t]];
    }
  }

  void run() {
    if (params_.grad_weight) pack_hidden_rows();
    for (int64_t v = 0; v < params_.vocab; v += kBlockVocab) {
      first_ = v;
      count_ = std::min(kBlockVocab, params_.vocab - v);
      padded_ = round_up(count_, 32);
      load_weight();
      for (int64_t t = 0; t < panels_.padded; t += kBlockTokens) {
        first_panel_ = t / kPanel;
        last_panel_ = std::min(ceil_div(t + kBlockTokens, kPanel), panels_.panels);
        tokens_ = std::min(kBlockTokens, panels_.padded - t);
        compute_gradient();
        if (params_.grad_weight) add_to_weight();
        if (params_.grad_hidden) add_to_hidden();
      }
      if (params_.grad_weight) store_weight();
    }
    if (params_.grad_hidden) store_hidden();
  }

 private:
  // The hidden states once more, k running over the tokens of a block: [block][embed panel].
  void pack_hidden_rows() {
    for_each(ceil_div(panels_.padded, kBlockTokens), [&](int64_t block) {
      const int64_t t = block * kBlockTokens;
      const int64_t have = std::min(kBlockTokens, panels_.count - t);
      const int64_t padded = std::min(kBlockTokens, panels_.padded - t);
      const Buffer<Operand> rows(have * embed_);
      problem_.read_rows(params_.hidden, pick_, t, have, rows);
      for (int64_t e = 0; e < embed_padded_; e += kPanel) {
        panel_of_rows<Operand>(rows, have, padded, embed_, e, std::min(kPanel, embed_padded_ - e),
                               hidden_panel(t, padded, e));
      }
    });
  }

  Operand* hidden_panel(int64_t token, int64_t padded, int64_t column) const {
    return hidden_rows_ + (token * embed_padded_ + column * padded);
  }

  // Rows first_ .. first_ + count_ of the weight as an operand, and their transpose.
  void load_weight() {
    if (!in_place_) {
      for_each(ceil_div(count_, kCopyRows), [&](int64_t i) {
        const int64_t v = i * kCopyRows;
        problem_.read_rows(params_.weight, nullptr, first_ + v, std::min(kCopyRows, count_ - v),
                           weight_ + v * embed_);
      });
    }
    if (!params_.grad_hidden) return;
    for_each(ceil_div(embed_, kPanel), [&](int64_t i) {
      const int64_t e = i * kPanel;
      transpose(weight_row(0) + e, weight_stride(), count_, std::min(kPanel, embed_ - e),
                weight_transposed_ + e * padded_, padded_, padded_);
    });
  }

  const Operand* weight_row(int64_t v) const {
    return in_place_ ? problem_.weight_row(first_ + v) : weight_ + v * embed_;
  }
  int64_t weight_stride() const { return in_place_ ? params_.weight.row_stride : embed_; }

  void compute_gradient() {
    const int64_t panels = last_panel_ - first_panel_;
    for_each(ceil_div(count_, kTileRows) * panels, [&](int64_t task) {
      const int64_t v = task / panels * kTileRows, p = first_panel_ + task % panels;
      const int64_t m = std::min(kTileRows, count_ - v), n = panels_.width(p);
      const Buffer<Real> tile(kTileRows * kPanel);
      problem_.multiply(m, n, embed_, weight_stride(), n, false, weight_row(v),
                        hidden_ + p * kPanel * embed_, tile);
      Real target[kPanel];  // row of the tile, or none of them
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = p * kPanel + c;
        const int64_t row = token < panels_.count ? params_.targets[pick_[token]] - first_ - v : -1;
        target[c] = row >= 0 && row < m ? row : -1;
      }
      const int64_t at = p * kPanel;
      gradient_tile<Real>(tile, m, n, &max_[at], &log_sum_[at], &grad_[at], target,
                          params_.softcap);
      // Padding must be zero, also where the weight holds infinities.
      const int64_t tokens = panels_.tokens(p);
      for (int64_t i = 0; i < m && tokens < n; ++i)
        std::fill(tile + i * n + tokens, tile + (i + 1) * n, Real{0});
      const int64_t padded = std::min(kTileRows, padded_ - v);
      std::fill(tile + m * n, tile + padded * n, Real{0});
      const int64_t column = (p - first_panel_) * kPanel;
      store_gradient<Operand>(
          tile, padded, n, params_.grad_weight ? gradient_rows_ + (v * tokens_ + column) : nullptr,
          tokens_, params_.grad_hidden ? gradient_panels_ + (column * padded_ + v * n) : nullptr);
      problem_.end_of_task();
    });
  }

  void add_to_weight() {
    const int64_t columns = ceil_div(embed_padded_, kPanel), token = first_panel_ * kPanel;
    for_each(ceil_div(count_, kTileRows) * columns, [&](int64_t task) {
      const int64_t v = task / columns * kTileRows, e = task % columns * kPanel;
      problem_.multiply(std::min(kTileRows, count_ - v), std::min(kPanel, embed_padded_ - e),
                        tokens_, tokens_, embed_padded_, token > 0, gradient_rows_ + v * tokens_,
                        hidden_panel(token, tokens_, e), grad_weight_ + (v * embed_padded_ + e));
      problem_.end_of_task();
    });
  }

  void add_to_hidden() {
    constexpr int64_t kRows = 256;
    const int64_t blocks = ceil_div(embed_, kRows);
    for_each((last_panel_ - first_panel_) * blocks, [&](int64_t task) {
      const int64_t p = first_panel_ + task / blocks, e = task % blocks * kRows;
      const int64_t n = panels_.width(p);
      problem_.multiply(std::min(kRows, embed_ - e), n, padded_, padded_, n, first_ > 0,
                        weight_transposed_ + e * padded_,
                        gradient_panels_ + (p - first_panel_) * kPanel * padded_,
                        grad_hidden_ + (p * kPanel * embed_ + e * n));
      problem_.end_of_task();
    });
  }

  void store_weight() {
    for_each(ceil_div(count_, kCopyRows), [&](int64_t i) {
      const int64_t end = std::min((i + 1) * kCopyRows, count_);
      for (int64_t v = i * kCopyRows; v < end; ++v) {
        store_row(grad_weight_ + v * embed_padded_,
                  static_cast<T*>(params_.grad_weight) + (first_ + v) * embed_, embed_);
      }
    });
  }

  void store_hidden() {
    for_each(panels_.panels, [&](int64_t p) {
      const int64_t n = panels_.width(p);
      const Buffer<Real> rows(n * embed_);
      transpose<Real>(grad_hidden_ + p * kPanel * embed_, n, embed_, n, rows, embed_);
      for (int64_t c = 0; c < panels_.tokens(p); ++c) {
        store_row(rows + c * embed_,
                  static_cast<T*>(params_.grad_hidden) + pick_[p * kPanel + c] * embed_, embed_);
      }
    });
  }

  template <class Body>
  void for_each(int64_t count, const Body& body) const {
    problem_.runtime.for_each(count, body);
  }

  const Problem<T, Operand>& problem_;
  const LinearNllParams& params_;
  const int64_t* pick_;  // the rows of hidden that are scored
  const Panels panels_;
  const int64_t embed_, embed_padded_;
  const int64_t block_vocab_, block_tokens_;
  const bool in_place_;
  const Buffer<Operand> hidden_;             // panels over the embedding
  const Buffer<Operand> hidden_rows_;        // panels over the tokens
  const Buffer<Operand> weight_;             // [count_][embed], where the weight is no operand
  const Buffer<Operand> weight_transposed_;  // [embed][padded_]
  const Buffer<Operand> gradient_rows_;      // G [padded_][tokens_]
  const Buffer<Operand> gradient_panels_;    // G in panels over the vocabulary
  const Buffer<Real> grad_weight_;           // [count_][embed_padded]
  const Buffer<Real> grad_hidden_;           // by panel: [embed][width]
  std::vector<Real> max_, log_sum_, grad_;
  // The block in hand.
  int64_t first_ = 0, count_ = 0, padded_ = 0;             // of the vocabulary
  int64_t first_panel_ = 0, last_panel_ = 0, tokens_ = 0;  // of the tokens
};

template <class T, class Operand>
void backward_all(const Problem<T, Operand>& problem) {
  const LinearNllParams& params = problem.params;
  const std::vector<int64_t> rows = problem.scored_rows();
  const int64_t count = static_cast<int64_t>(rows.size());
  if (params.grad_hidden && count < params.rows) {
    std::fill_n(static_cast<T*>(params.grad_hidden), params.rows * params.embed, T{});
  }
  if (params.grad_weight && count == 0) {
    std::fill_n(static_cast<T*>(params.grad_weight), params.vocab * params.embed, T{});
  }
  // The gradient of the weight sums over all tokens; without it they can go block by block.
  const int64_t step = params.grad_weight ? count : kBlockTokens;
  for (int64_t r = 0; r < count; r += step) {
    Backward<T, Operand>(problem, rows.data() + r, std::min(step, count - r)).run();
  }
}
