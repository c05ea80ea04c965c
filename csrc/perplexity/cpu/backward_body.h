// Backward (no include guard: part of a body): the logits are computed again, a block of vocabulary
// rows by a block of tokens at a time; from them the gradient G of that block, and from G the two
// products
//
//   d weight[v, :] = sum_t G[v, t] hidden[t, :]        d hidden[t, :] = sum_v G[v, t] weight[v, :]
//
// G is written in the layouts that the products read. Sums run in the accumulators' type over all
// blocks and are rounded once. Every phase writes to disjoint memory, so the result does not depend
// on the number of threads.

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
        block_tokens_(std::min(kBlockTokens, panels_.padded)),
        weight_(problem, params_.grad_hidden != nullptr),
        sum_(problem, params_.grad_hidden ? panels_ : Panels(0, 32)),
        hidden_(pack_hidden(problem, pick, panels_)),
        hidden_rows_(params_.grad_weight ? embed_padded_ * panels_.padded : 0),
        gradient_rows_(params_.grad_weight ? weight_.most() * block_tokens_ : 0),
        gradient_panels_(params_.grad_hidden ? weight_.most() * block_tokens_ : 0),
        grad_weight_(params_.grad_weight ? weight_.most() * embed_padded_ : 0),
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
      weight_.load(v);
      for (int64_t t = 0; t < panels_.padded; t += kBlockTokens) {
        first_panel_ = t / kPanel;
        last_panel_ = std::min(ceil_div(t + kBlockTokens, kPanel), panels_.panels);
        tokens_ = std::min(kBlockTokens, panels_.padded - t);
        compute_gradient();
        if (params_.grad_weight) add_to_weight();
        if (params_.grad_hidden) {
          sum_.add(weight_, gradient_panels_, first_panel_, last_panel_, [](auto...) {});
        }
      }
      if (params_.grad_weight) store_weight();
    }
    if (params_.grad_hidden) sum_.store(pick_, [](auto...) {});
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

  void compute_gradient() {
    const int64_t panels = last_panel_ - first_panel_;
    const int64_t count = weight_.count(), height = weight_.padded();
    for_each(ceil_div(count, kTileRows) * panels, [&](int64_t task) {
      const int64_t v = task / panels * kTileRows, p = first_panel_ + task % panels;
      const int64_t m = std::min(kTileRows, count - v), n = panels_.width(p);
      const Buffer<Real> tile(kTileRows * kPanel);
      problem_.multiply(m, n, embed_, weight_.stride(), n, false, weight_.row(v),
                        hidden_ + p * kPanel * embed_, tile);
      Real target[kPanel];  // row of the tile, or none of them
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = p * kPanel + c;
        const int64_t row =
            token < panels_.count ? params_.targets[pick_[token]] - weight_.first() - v : -1;
        target[c] = row >= 0 && row < m ? row : -1;
      }
      const int64_t at = p * kPanel;
      gradient_tile<Real>(tile, m, n, &max_[at], &log_sum_[at], &grad_[at], target,
                          params_.softcap);
      // Padding must be zero, also where the weight holds infinities.
      const int64_t tokens = panels_.tokens(p);
      for (int64_t i = 0; i < m && tokens < n; ++i)
        std::fill(tile + i * n + tokens, tile + (i + 1) * n, Real{0});
      const int64_t padded = std::min(kTileRows, height - v);
      std::fill(tile + m * n, tile + padded * n, Real{0});
      const int64_t column = (p - first_panel_) * kPanel;
      store_gradient<Operand>(
          tile, padded, n, params_.grad_weight ? gradient_rows_ + (v * tokens_ + column) : nullptr,
          tokens_, params_.grad_hidden ? gradient_panels_ + (column * height + v * n) : nullptr);
      problem_.end_of_task();
    });
  }

  void add_to_weight() {
    const int64_t columns = ceil_div(embed_padded_, kPanel), token = first_panel_ * kPanel;
    const int64_t count = weight_.count();
    for_each(ceil_div(count, kTileRows) * columns, [&](int64_t task) {
      const int64_t v = task / columns * kTileRows, e = task % columns * kPanel;
      problem_.multiply(std::min(kTileRows, count - v), std::min(kPanel, embed_padded_ - e),
                        tokens_, tokens_, embed_padded_, token > 0, gradient_rows_ + v * tokens_,
                        hidden_panel(token, tokens_, e), grad_weight_ + (v * embed_padded_ + e));
      problem_.end_of_task();
    });
  }

  void store_weight() {
    for_each(ceil_div(weight_.count(), kCopyRows), [&](int64_t i) {
      const int64_t end = std::min((i + 1) * kCopyRows, weight_.count());
      for (int64_t v = i * kCopyRows; v < end; ++v) {
        store_row(grad_weight_ + v * embed_padded_,
                  static_cast<T*>(params_.grad_weight) + (weight_.first() + v) * embed_, embed_);
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
  const int64_t block_tokens_;
  WeightBlock<T, Operand> weight_;
  HiddenSum<T, Operand> sum_;              // d hidden
  const Buffer<Operand> hidden_;           // panels over the embedding
  const Buffer<Operand> hidden_rows_;      // panels over the tokens
  const Buffer<Operand> gradient_rows_;    // G [padded][tokens_]
  const Buffer<Operand> gradient_panels_;  // G in panels over the vocabulary
  const Buffer<Real> grad_weight_;         // [count][embed_padded]
  std::vector<Real> max_, log_sum_, grad_;
  int64_t first_panel_ = 0, last_panel_ = 0, tokens_ = 0;  // of the block of tokens in hand
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
