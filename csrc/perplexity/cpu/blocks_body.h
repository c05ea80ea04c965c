// What the two ways to d hidden share: blocks of the weight's rows, and the sum that they add to
// (no include guard: part of a body).

constexpr int64_t kBlockVocab = 1024;  // rows of a block; with kBlockTokens 8 MiB of float logits
constexpr int64_t kTileRows = 128;     // vocabulary rows per tile of them
constexpr int64_t kCopyRows = 32;      // rows that a thread copies at a time

// Rows [first, first + count) of the weight as an operand, and where asked for their transpose.
template <class T, class Operand>
class WeightBlock {
 public:
  WeightBlock(const Problem<T, Operand>& problem, bool with_transpose)
      : problem_(problem),
        params_(problem.params),
        with_transpose_(with_transpose),
        in_place_(problem.weight_in_place()),
        rows_(in_place_ ? 0 : most() * params_.embed),
        transposed_(with_transpose ? most() * params_.embed : 0) {}

  void load(int64_t first) {
    first_ = first;
    count_ = std::min(kBlockVocab, params_.vocab - first);
    padded_ = round_up(count_, 32);
    const int64_t embed = params_.embed;
    if (!in_place_) {
      problem_.runtime.for_each(ceil_div(count_, kCopyRows), [&](int64_t i) {
        const int64_t v = i * kCopyRows;
        problem_.read_rows(params_.weight, nullptr, first_ + v, std::min(kCopyRows, count_ - v),
                           rows_ + v * embed);
      });
    }
    if (!with_transpose_) return;
    problem_.runtime.for_each(ceil_div(embed, kPanel), [&](int64_t i) {
      const int64_t e = i * kPanel;
      transpose(row(0) + e, stride(), count_, std::min(kPanel, embed - e),
                transposed_ + e * padded_, padded_, padded_);
    });
  }

  int64_t most() const { return round_up(std::min(kBlockVocab, params_.vocab), 32); }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t padded() const {
    return padded_;
  }  // count in whole groups; the transpose has zeros there

  const Operand* row(int64_t v) const {
    return in_place_ ? problem_.weight_row(first_ + v) : rows_ + v * params_.embed;
  }
  int64_t stride() const { return in_place_ ? params_.weight.row_stride : params_.embed; }

  // Rows of the transpose [embed][padded].
  const Operand* transposed(int64_t e) const { return transposed_ + e * padded_; }

 private:
  const Problem<T, Operand>& problem_;
  const LinearNllParams& params_;
  const bool with_transpose_, in_place_;
  const Buffer<Operand> rows_;        // [count][embed], where the weight is no operand
  const Buffer<Operand> transposed_;  // [embed][padded]
  int64_t first_ = 0, count_ = 0, padded_ = 0;
};

// sum_v G[v, t] weight[v, :] over the blocks, for tokens in panels.
template <class T, class Operand>
class HiddenSum {
 public:
  using Real = RealOf<T>;

  HiddenSum(const Problem<T, Operand>& problem, const Panels& panels)
      : problem_(problem), panels_(panels), sum_(problem.params.embed * panels.padded) {}

  // Adds a block's part; `gradient` is its G for panels [first, last), each a panel over the
  // vocabulary. before(panel, sums, rows) sees what is added to: [rows][width of the panel].
  template <class Before>
  void add(const WeightBlock<T, Operand>& weight, const Operand* gradient, int64_t first,
           int64_t last, const Before& before) {
    constexpr int64_t kRows = 256;
    const int64_t embed = problem_.params.embed, blocks = ceil_div(embed, kRows);
    const int64_t padded = weight.padded();
    const bool more = weight.first() > 0;
    problem_.runtime.for_each((last - first) * blocks, [&](int64_t task) {
      const int64_t p = first + task / blocks, e = task % blocks * kRows;
      const int64_t n = panels_.width(p), rows = std::min(kRows, embed - e);
      Real* const sums = sum_ + (p * kPanel * embed + e * n);
      if (more) before(p, sums, rows);
      problem_.multiply(rows, n, padded, padded, n, more, weight.transposed(e),
                        gradient + (p - first) * kPanel * padded, sums);
      problem_.end_of_task();
    });
  }

  // Writes the row of each token of `pick`, after finish(row, token), to grad_hidden.
  template <class Finish>
  void store(const int64_t* pick, const Finish& finish) const {
    const int64_t embed = problem_.params.embed;
    problem_.runtime.for_each(panels_.panels, [&](int64_t p) {
      const int64_t n = panels_.width(p);
      const Buffer<Real> rows(n * embed);
      transpose<Real>(sum_ + p * kPanel * embed, n, embed, n, rows, embed);
      for (int64_t c = 0; c < panels_.tokens(p); ++c) {
        const int64_t token = p * kPanel + c;
        finish(rows + c * embed, token);
        store_row(rows + c * embed,
                  static_cast<T*>(problem_.params.grad_hidden) + pick[token] * embed, embed);
      }
    });
  }

 private:
  const Problem<T, Operand>& problem_;
  const Panels panels_;
  const Buffer<Real> sum_;  // by panel: [embed][width]
};
