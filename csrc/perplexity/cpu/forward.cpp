// Forward: each thread owns a range of the vocabulary (or of the tokens, where the vocabulary is
// small) and runs through it in chunks of weight rows that stay in its L2 cache while all tokens
// pass. A tile of logits is reduced to two numbers per token as soon as it is complete.
#include <cmath>
#include <limits>

#include "perplexity/cpu/blocks.h"

namespace longrope {
namespace perplexity {
namespace {

// Weight rows per tile: half a megabyte of them (half of a common L2), at most 256 (a tile of 64
// KiB).
int64_t chunk_rows(int64_t embed, int64_t operand_bytes) {
  const int64_t rows = (512 << 10) / std::max<int64_t>(embed * operand_bytes, 1);
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

template <class Real>
void forward_block(const LinearNllParams& params, const Arithmetic& arithmetic, const int64_t* pick,
                   int64_t count) {
  const Panels panels(count, 16);
  const Buffer hidden = pack_hidden(params, arithmetic, pick, panels);
  const int64_t chunk = chunk_rows(params.embed, arithmetic.operand_bytes);
  const Split split(arithmetic.runtime.threads, params.vocab, chunk, panels.panels);

  const int64_t padded = panels.padded;
  std::vector<Real> max(split.by_vocab * padded, -std::numeric_limits<Real>::infinity());
  std::vector<Real> sum(split.by_vocab * padded, Real{0});
  std::vector<Real> target_logit(padded);
  const bool in_place = weight_in_place(params, arithmetic);

  arithmetic.runtime.for_each(split.by_vocab * split.by_tokens, [&](int64_t task) {
    const int64_t part = task / split.by_tokens, share = task % split.by_tokens;
    const int64_t units = ceil_div(params.vocab, 32);
    const int64_t first = units * part / split.by_vocab * 32;
    const int64_t last = std::min(units * (part + 1) / split.by_vocab * 32, params.vocab);
    const int64_t first_panel = panels.panels * share / split.by_tokens;
    const int64_t last_panel = panels.panels * (share + 1) / split.by_tokens;
    // Equal chunks instead of a small one at the end.
    const int64_t chunks = std::max<int64_t>(ceil_div(last - first, chunk), 1);
    const int64_t step = round_up(ceil_div(last - first, chunks), 32);

    Buffer tile(step * kPanel * sizeof(Real));
    Buffer converted(in_place ? 0 : step * params.embed * arithmetic.operand_bytes);
    for (int64_t v = first; v < last; v += step) {
      const int64_t m = std::min(step, last - v);
      const void* weight = weight_at(params, v);
      int64_t stride = params.weight.row_stride;
      if (!in_place) {
        convert_rows(params.dtype, params.weight, nullptr, v, m, params.embed, arithmetic.operand,
                     converted.as<void>());
        weight = converted.as<void>();
        stride = params.embed;
      }
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t n = panels.width(p);
        arithmetic.multiply(m, n, params.embed, stride, n, false, weight,
                            hidden.at(p * kPanel * params.embed * arithmetic.operand_bytes),
                            tile.as<void>());
        if (params.softcap != 0.0) {
          softcap_tile(arithmetic.wide, tile.as<void>(), m, n, params.softcap);
        }
        const int64_t at = part * padded + p * kPanel;
        add_to_statistics(arithmetic.wide, tile.as<void>(), m, n, &max[at], &sum[at]);
        for (int64_t c = 0; c < panels.tokens(p); ++c) {
          const int64_t row = params.targets[pick[p * kPanel + c]] - v;
          if (row >= 0 && row < m) target_logit[p * kPanel + c] = tile.as<Real>()[row * n + c];
        }
      }
    }
    arithmetic.end_of_task();
  });

  Real* nll = static_cast<Real*>(params.nll);
  Real* stats = static_cast<Real*>(params.stats);
  arithmetic.runtime.for_each(panels.panels, [&](int64_t p) {
    for (int64_t t = p * kPanel; t < p * kPanel + panels.tokens(p); ++t) {
      Real most = max[t];
      for (int64_t part = 1; part < split.by_vocab; ++part) {
        most = std::max(most, max[part * padded + t]);
      }
      Real total = 0;
      for (int64_t part = 0; part < split.by_vocab; ++part) {
        const Real top = max[part * padded + t], partial = sum[part * padded + t];
        // A part of which every logit is -inf adds nothing (and -inf - -inf must not be formed).
        const bool empty = top == -std::numeric_limits<Real>::infinity() && partial == Real{0};
        if (!empty) total += partial * std::exp(top - most);
      }
      const Real log_sum = std::log(total);
      stats[pick[t]] = most;
      stats[params.rows + pick[t]] = log_sum;
      nll[pick[t]] = (most - target_logit[t]) + log_sum;
    }
  });
}

template <class Real>
void forward(const LinearNllParams& params, const Arithmetic& arithmetic) {
  std::fill_n(static_cast<Real*>(params.nll), params.rows, Real{0});
  std::fill_n(static_cast<Real*>(params.stats), 2 * params.rows, Real{0});
  const std::vector<int64_t> rows = scored_rows(params);
  const int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t r = 0; r < count; r += kBlockTokens) {
    forward_block<Real>(params, arithmetic, rows.data() + r, std::min(kBlockTokens, count - r));
  }
}

}  // namespace
}  // namespace perplexity

void linear_nll_forward(const LinearNllParams& params, const Runtime& runtime) {
  const perplexity::Arithmetic arithmetic(params, runtime);
  if (arithmetic.wide) return perplexity::forward<double>(params, arithmetic);
  perplexity::forward<float>(params, arithmetic);
}

void candidate_sums(const void* nll, bool wide, const int64_t* targets, const int64_t* candidate,
                    int64_t rows, int64_t candidates, int64_t ignore_index, double* sums,
                    int64_t* counts) {
  std::fill_n(sums, candidates, 0.0);
  std::fill_n(counts, candidates, int64_t{0});
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] == ignore_index) continue;
    sums[candidate[r]] +=
        wide ? static_cast<const double*>(nll)[r] : static_cast<const float*>(nll)[r];
    ++counts[candidate[r]];
  }
}

}  // namespace longrope
