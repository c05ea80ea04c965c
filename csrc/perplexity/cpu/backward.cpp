// Backward: the logits are computed again, a block of vocabulary rows by a block of tokens at a
// time; from them the gradient G of that block, and from G the two products
//
//   d weight[v, :] = sum_t G[v, t] hidden[t, :]        d hidden[t, :] = sum_v G[v, t] weight[v, :]
//
// G is written in the layouts that the products read. Sums run in the accumulators' type over all
// blocks and are rounded once. Every phase writes to disjoint memory, so the result does not depend
// on the number of threads.
#include "perplexity/cpu/blocks.h"

namespace longrope {
namespace perplexity {
namespace {

constexpr int64_t kBlockVocab = 1024;  // vocabulary rows of one G; with kBlockTokens 8 MiB of float
constexpr int64_t kTileRows = 128;     // vocabulary rows per tile

template <class Real>
class Backward {
 public:
  Backward(const LinearNllParams& params, const Arithmetic& arithmetic, const int64_t* pick,
           int64_t count)
      : params_(params),
        arithmetic_(arithmetic),
        pick_(pick),
        panels_(count, 32),
        bytes_(arithmetic.operand_bytes),
        embed_(params.embed),
        embed_padded_(round_up(params.embed, 16)),
        block_vocab_(round_up(std::min(kBlockVocab, params.vocab), 32)),
        block_tokens_(std::min(kBlockTokens, panels_.padded)),
        in_place_(weight_in_place(params, arithmetic)),
        hidden_(pack_hidden(params, arithmetic, pick, panels_)),
        hidden_rows_(params.grad_weight ? embed_padded_ * panels_.padded * bytes_ : 0),
        weight_(in_place_ ? 0 : block_vocab_ * embed_ * bytes_),
        weight_transposed_(params.grad_hidden ? embed_ * block_vocab_ * bytes_ : 0),
        gradient_rows_(params.grad_weight ? block_vocab_ * block_tokens_ * bytes_ : 0),
        gradient_panels_(params.grad_hidden ? block_vocab_ * block_tokens_ * bytes_ : 0),
        grad_weight_(params.grad_weight ? block_vocab_ * embed_padded_ * sizeof(Real) : 0),
        grad_hidden_(params.grad_hidden ? embed_ * panels_.padded * sizeof(Real) : 0),
        max_(panels_.padded),
        log_sum_(panels_.padded),
        grad_(panels_.padded) {
    const Real* stats = static_cast<const Real*>(params.stats);
    const Real* grad = static_cast<const Real*>(params.grad_nll);
    for (int64_t t = 0; t < count; ++t) {
      max_[t] = stats[pick[t]];
      log_sum_[t] = stats[params.rows + pick[t]];
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
    const int64_t blocks = ceil_div(panels_.padded, kBlockTokens);
    arithmetic_.runtime.for_each(blocks, [&](int64_t block) {
      const int64_t t = block * kBlockTokens;
      const int64_t have = std::min(kBlockTokens, panels_.count - t);
      const int64_t padded = std::min(kBlockTokens, panels_.padded - t);
      Buffer rows(have * embed_ * bytes_);
      convert_rows(params_.dtype, params_.hidden, pick_, t, have, embed_, arithmetic_.operand,
                   rows.as<void>());
      for (int64_t e = 0; e < embed_padded_; e += kPanel) {
        panel_of_rows(arithmetic_.operand, rows.as<void>(), have, padded, embed_, e,
                      std::min(kPanel, embed_padded_ - e), hidden_panel(t, padded, e));
      }
    });
  }

  char* hidden_panel(int64_t token, int64_t padded, int64_t column) const {
    return hidden_rows_.at((token * embed_padded_ + column * padded) * bytes_);
  }

  // Rows first_ .. first_ + count_ of the weight as an operand, and their transpose.
  void load_weight() {
    if (!in_place_) {
      arithmetic_.runtime.for_each(ceil_div(count_, 32), [&](int64_t i) {
        convert_rows(params_.dtype, params_.weight, nullptr, first_ + i * 32,
                     std::min<int64_t>(32, count_ - i * 32), embed_, arithmetic_.operand,
                     weight_.at(i * 32 * embed_ * bytes_));
      });
    }
    if (!params_.grad_hidden) return;
    arithmetic_.runtime.for_each(ceil_div(embed_, kPanel), [&](int64_t i) {
      const int64_t e = i * kPanel;
      transpose(arithmetic_.operand, weight_row(0) + e * bytes_, weight_stride(), count_,
                std::min(kPanel, embed_ - e), weight_transposed_.at(e * padded_ * bytes_), padded_);
    });
  }

  const char* weight_row(int64_t v) const {
    return in_place_ ? weight_at(params_, first_ + v) : weight_.at(v * embed_ * bytes_);
  }
  int64_t weight_stride() const { return in_place_ ? params_.weight.row_stride : embed_; }

  void compute_gradient() {
    const int64_t panels = last_panel_ - first_panel_;
    arithmetic_.runtime.for_each(ceil_div(count_, kTileRows) * panels, [&](int64_t task) {
      const int64_t v = task / panels * kTileRows, p = first_panel_ + task % panels;
      const int64_t m = std::min(kTileRows, count_ - v), n = panels_.width(p);
      Buffer tile(kTileRows * kPanel * sizeof(Real));
      arithmetic_.multiply(m, n, embed_, weight_stride(), n, false, weight_row(v),
                           hidden_.at(p * kPanel * embed_ * bytes_), tile.as<void>());
      int32_t target[kPanel];
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = p * kPanel + c;
        const int64_t row = token < panels_.count ? params_.targets[pick_[token]] - first_ - v : -1;
        target[c] = row >= 0 && row < m ? static_cast<int32_t>(row) : -1;
      }
      const int64_t at = p * kPanel;
      gradient_tile(arithmetic_.wide, tile.as<void>(), m, n, &max_[at], &log_sum_[at], &grad_[at],
                    target, params_.softcap);
      // Padding must be zero, also where the weight holds infinities.
      for (int64_t i = 0; i < m && panels_.tokens(p) < n; ++i) {
        std::fill(tile.as<Real>() + i * n + panels_.tokens(p), tile.as<Real>() + (i + 1) * n,
                  Real{0});
      }
      const int64_t padded = std::min(kTileRows, padded_ - v);
      std::fill(tile.as<Real>() + m * n, tile.as<Real>() + padded * n, Real{0});
      const int64_t column = (p - first_panel_) * kPanel;
      store_gradient(
          arithmetic_.operand, tile.as<void>(), padded, n,
          params_.grad_weight ? gradient_rows_.at((v * tokens_ + column) * bytes_) : nullptr,
          tokens_,
          params_.grad_hidden ? gradient_panels_.at((column * padded_ + v * n) * bytes_) : nullptr);
      arithmetic_.end_of_task();
    });
  }

  void add_to_weight() {
    const int64_t columns = ceil_div(embed_padded_, kPanel);
    const int64_t token = first_panel_ * kPanel;
    arithmetic_.runtime.for_each(ceil_div(count_, kTileRows) * columns, [&](int64_t task) {
      const int64_t v = task / columns * kTileRows, e = task % columns * kPanel;
      arithmetic_.multiply(std::min(kTileRows, count_ - v), std::min(kPanel, embed_padded_ - e),
                           tokens_, tokens_, embed_padded_, token > 0,
                           gradient_rows_.at(v * tokens_ * bytes_), hidden_panel(token, tokens_, e),
                           grad_weight_.at((v * embed_padded_ + e) * sizeof(Real)));
      arithmetic_.end_of_task();
    });
  }

  void add_to_hidden() {
    constexpr int64_t kRows = 256;
    const int64_t blocks = ceil_div(embed_, kRows);
    arithmetic_.runtime.for_each((last_panel_ - first_panel_) * blocks, [&](int64_t task) {
      const int64_t p = first_panel_ + task / blocks, e = task % blocks * kRows;
      const int64_t n = panels_.width(p);
      arithmetic_.multiply(std::min(kRows, embed_ - e), n, padded_, padded_, n, first_ > 0,
                           weight_transposed_.at(e * padded_ * bytes_),
                           gradient_panels_.at((p - first_panel_) * kPanel * padded_ * bytes_),
                           grad_hidden_.at((p * kPanel * embed_ + e * n) * sizeof(Real)));
      arithmetic_.end_of_task();
    });
  }

  void store_weight() {
    arithmetic_.runtime.for_each(ceil_div(count_, 32), [&](int64_t i) {
      const int64_t v = i * 32;
      const MatrixView rows = {grad_weight_.at(v * embed_padded_ * sizeof(Real)), embed_padded_, 1};
      convert_rows(arithmetic_.accumulator, rows, nullptr, 0, std::min<int64_t>(32, count_ - v),
                   embed_, params_.dtype,
                   static_cast<char*>(params_.grad_weight) +
                       (first_ + v) * embed_ * bytes_of(params_.dtype));
    });
  }

  void store_hidden() {
    arithmetic_.runtime.for_each(panels_.panels, [&](int64_t p) {
      const int64_t n = panels_.width(p);
      Buffer rows(n * embed_ * sizeof(Real));
      transpose(arithmetic_.accumulator, grad_hidden_.at(p * kPanel * embed_ * sizeof(Real)), n,
                embed_, n, rows.as<void>(), embed_);
      for (int64_t c = 0; c < panels_.tokens(p); ++c) {
        const MatrixView row = {rows.at(c * embed_ * sizeof(Real)), embed_, 1};
        convert_rows(arithmetic_.accumulator, row, nullptr, 0, 1, embed_, params_.dtype,
                     static_cast<char*>(params_.grad_hidden) +
                         pick_[p * kPanel + c] * embed_ * bytes_of(params_.dtype));
      }
    });
  }

  const LinearNllParams& params_;
  const Arithmetic& arithmetic_;
  const int64_t* pick_;  // the rows of hidden that are scored
  const Panels panels_;
  const int64_t bytes_;  // of an operand's element
  const int64_t embed_, embed_padded_;
  const int64_t block_vocab_, block_tokens_;
  const bool in_place_;
  const Buffer hidden_;             // panels over the embedding
  const Buffer hidden_rows_;        // panels over the tokens
  const Buffer weight_;             // [count_][embed], where the weight itself is no operand
  const Buffer weight_transposed_;  // [embed][padded_]
  const Buffer gradient_rows_;      // G [padded_][tokens_]
  const Buffer gradient_panels_;    // G in panels over the vocabulary
  const Buffer grad_weight_;        // [count_][embed_padded]
  const Buffer grad_hidden_;        // by panel: [embed][width]
  std::vector<Real> max_, log_sum_, grad_;
  // The block in hand.
  int64_t first_ = 0, count_ = 0, padded_ = 0;             // of the vocabulary
  int64_t first_panel_ = 0, last_panel_ = 0, tokens_ = 0;  // of the tokens
};

template <class Real>
void backward(const LinearNllParams& params, const Arithmetic& arithmetic) {
  const std::vector<int64_t> rows = scored_rows(params);
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t row_bytes = params.embed * bytes_of(params.dtype);
  if (params.grad_hidden && count < params.rows) {
    std::fill_n(static_cast<char*>(params.grad_hidden), params.rows * row_bytes, 0);
  }
  if (count == 0) {
    if (params.grad_weight) {
      std::fill_n(static_cast<char*>(params.grad_weight), params.vocab * row_bytes, 0);
    }
    return;
  }
  // The gradient of the weight sums over all tokens; without it they can go block by block.
  const int64_t step = params.grad_weight ? count : kBlockTokens;
  for (int64_t r = 0; r < count; r += step) {
    Backward<Real>(params, arithmetic, rows.data() + r, std::min(step, count - r)).run();
  }
}

}  // namespace
}  // namespace perplexity

void linear_nll_backward(const LinearNllParams& params, const Runtime& runtime) {
  const perplexity::Arithmetic arithmetic(params, runtime);
  if (arithmetic.wide) return perplexity::backward<double>(params, arithmetic);
  perplexity::backward<float>(params, arithmetic);
}

}  // namespace longrope
