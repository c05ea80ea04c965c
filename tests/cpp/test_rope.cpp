// The CPU rope kernels without torch: against the definition in double, over odd sizes, strides,
// splits of the work and every element type.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/phase.h"
#include "elements.h"
#include "rope/rope.h"

namespace {

using longrope::DType;

struct Case {
  DType dtype;
  int64_t batch, heads, key_heads, tokens, head_dim, pairs;
  bool interleaved, rows, token_major;
  int64_t start_tokens;
  bool consecutive = false;  // positions
};

// A tensor with a margin behind every token, which must stay as it was.
struct Tensor {
  Tensor(const Case& c, int64_t heads, std::mt19937& random) : dtype(c.dtype) {
    const int64_t row = c.head_dim + kMargin;
    view.heads = heads;
    view.token_stride = c.token_major ? heads * row : row;
    view.head_stride = c.token_major ? row : c.tokens * row;
    view.batch_stride = c.tokens * heads * row;
    std::normal_distribution<double> normal;
    values.resize(c.batch * view.batch_stride);
    for (double& value : values) value = elements::round_to(dtype, normal(random));
    bytes = elements::encode(dtype, values);
    view.data = bytes.data();
  }

  // Of the same shape, filled with one value.
  Tensor(const Tensor& other, double value) : dtype(other.dtype), view(other.view) {
    values.assign(other.values.size(), value);
    bytes = elements::encode(dtype, values);
    view.data = bytes.data();
  }

  int64_t at(int64_t batch, int64_t head, int64_t token, int64_t i) const {
    return batch * view.batch_stride + head * view.head_stride + token * view.token_stride + i;
  }

  static constexpr int64_t kMargin = 3;
  DType dtype;
  longrope::RopeTensor view;
  std::vector<double> values;
  std::vector<unsigned char> bytes;
};

// Distance that rounding the result, and arithmetic in float32, may bring about.
double tolerance(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-12 : 4 * elements::epsilon(dtype) + 2e-6;
}

// Random inputs of a case, its params, and the rotation by the definition.
class Problem {
 public:
  explicit Problem(const Case& the_case)
      : c(the_case), q(c, c.heads, random), k(c, c.key_heads, random) {
    for (int64_t i = 0; i < (c.rows ? c.batch : 1) * c.pairs; ++i) {
      base_.push_back(std::pow(10000.0, -static_cast<double>(i % c.pairs) / c.pairs));
      inv_freq_.push_back(base_.back() / (1.0 + 0.37 * i));
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
      positions.push_back(c.consecutive ? t - 2 : t < 3 ? t - 1 : t * 40009);
    }
    for (int64_t b = 0; b < c.batch; ++b) {
      factors_.push_back(1.0 + 0.25 * b);
      start_rows_.push_back(c.start_tokens + b);
    }
    p.q = q.view;
    p.k = k.view;
    p.dtype = c.dtype;
    p.batch = c.batch;
    p.tokens = c.tokens;
    p.head_dim = c.head_dim;
    p.pairs = c.pairs;
    p.interleaved = c.interleaved;
    p.positions = positions.data();
    p.positions_token_stride = 1;
    p.turn.inv_freq = inv_freq_.data();
    p.turn.inv_freq_stride = c.rows ? c.pairs : 0;
    p.turn.base_inv_freq = c.start_tokens ? base_.data() : nullptr;
    p.turn.base_inv_freq_stride = c.rows ? c.pairs : 0;
    p.turn.start_tokens_rows = c.rows && c.start_tokens ? start_rows_.data() : nullptr;
    p.turn.start_tokens = c.start_tokens;
    p.attention_factor_rows = c.rows ? factors_.data() : nullptr;
    p.attention_factor_stride = 1;
    p.attention_factor = 1.25;
    p.turn.tiers = p.turn.start_tokens_stride = 1;
  }

  double factor(int64_t batch) const { return c.rows ? factors_[batch] : 1.25; }

  bool below_start(int64_t batch, int64_t token) const {
    const int64_t start = p.turn.start_tokens_rows ? start_rows_[batch] : c.start_tokens;
    return start > 0 && positions[token] < start;
  }

  // Angles reach 1.5e6 rad, where a double product is off by 1e-10.
  long double angle(int64_t batch, int64_t token, int64_t i) const {
    const std::vector<double>& used = below_start(batch, token) ? base_ : inv_freq_;
    return static_cast<long double>(positions[token]) * used[(c.rows ? batch * c.pairs : 0) + i];
  }

  int64_t first(int64_t i) const { return c.interleaved ? 2 * i : i; }
  int64_t second(int64_t i) const { return c.interleaved ? 2 * i + 1 : i + c.pairs; }

  // Calls work(begin, end) for all items, as several threads would split them.
  template <typename Work>
  void in_parts(const Work& work) const {
    const int64_t items = longrope::rope_blocks(p) * p.batch;
    for (int64_t begin = 0; begin < items; begin += 2) {
      work(begin, begin + 2 < items ? begin + 2 : items);
    }
  }

  // Calls visit(batch, head, token) for all.
  template <typename Visit>
  void for_tokens(const Tensor& x, const Visit& visit) const {
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < x.view.heads; ++h) {
        for (int64_t t = 0; t < c.tokens; ++t) visit(b, h, t);
      }
    }
  }

  std::mt19937 random{7};
  const Case c;
  Tensor q, k;
  std::vector<int64_t> positions;
  longrope::RopeParams p{};

 private:
  std::vector<double> inv_freq_, base_, factors_;
  std::vector<int64_t> start_rows_;
};

void forward(const Problem& problem) {
  const Case& c = problem.c;
  Tensor q_out(problem.q, 7.0), k_out(problem.k, 7.0);
  longrope::RopeParams p = problem.p;
  p.q_out = q_out.view;
  p.k_out = k_out.view;
  problem.in_parts([&](int64_t begin, int64_t end) { longrope::rope_cpu(p, begin, end); });

  const auto compare = [&](const Tensor& in, const Tensor& out) {
    std::vector<double> expected = out.values;  // what is not written stays
    problem.for_tokens(in, [&](int64_t b, int64_t h, int64_t t) {
      const int64_t x = in.at(b, h, t, 0);
      for (int64_t i = 2 * c.pairs; i < c.head_dim; ++i) expected[x + i] = in.values[x + i];
      for (int64_t i = 0; i < c.pairs; ++i) {
        const double cos = problem.factor(b) * std::cos(problem.angle(b, t, i));
        const double sin = problem.factor(b) * std::sin(problem.angle(b, t, i));
        const double x1 = in.values[x + problem.first(i)], x2 = in.values[x + problem.second(i)];
        expected[x + problem.first(i)] = x1 * cos - x2 * sin;
        expected[x + problem.second(i)] = x2 * cos + x1 * sin;
      }
    });
    const std::vector<double> got = elements::decode(out.dtype, out.bytes);
    for (size_t i = 0; i < got.size(); ++i) {
      CHECK_NEAR(got[i], expected[i], tolerance(c.dtype) * (1 + std::fabs(expected[i])));
    }
  };
  compare(problem.q, q_out);
  compare(problem.k, k_out);
}

// The sums over blocks against the derivative of sum(gradient * output), term by term.
void gradients(Problem& problem) {
  const Case& c = problem.c;
  Tensor grad_q(c, c.heads, problem.random), grad_k(c, c.key_heads, problem.random);
  const int64_t width = 2 * c.pairs + 1, blocks = longrope::rope_blocks(problem.p);
  std::vector<double> partial(c.batch * blocks * width, 7.0);
  longrope::RopeBackwardParams params{problem.p, grad_q.view, grad_k.view, partial.data()};
  problem.in_parts(
      [&](int64_t begin, int64_t end) { longrope::rope_backward_cpu(params, begin, end); });

  std::vector<double> expected(c.batch * width), magnitude(c.batch * width);
  const auto add = [&](const Tensor& in, const Tensor& grad) {
    problem.for_tokens(in, [&](int64_t b, int64_t h, int64_t t) {
      const double* x = &in.values[in.at(b, h, t, 0)];
      const double* g = &grad.values[grad.at(b, h, t, 0)];
      for (int64_t i = 0; i < c.pairs; ++i) {
        const double cos = std::cos(problem.angle(b, t, i));
        const double sin = std::sin(problem.angle(b, t, i));
        const double x1 = x[problem.first(i)], x2 = x[problem.second(i)];
        const double g1 = g[problem.first(i)], g2 = g[problem.second(i)];
        const double by_factor = g1 * (x1 * cos - x2 * sin) + g2 * (x2 * cos + x1 * sin);
        const double by_angle = g1 * (-x1 * sin - x2 * cos) + g2 * (x1 * cos - x2 * sin);
        const double scale = problem.factor(b) * static_cast<double>(problem.positions[t]);
        const int64_t set = b * width + (problem.below_start(b, t) ? c.pairs : 0) + i;
        expected[set] += scale * by_angle;
        magnitude[set] +=
            std::fabs(scale) * (std::fabs(x1) + std::fabs(x2)) * (std::fabs(g1) + std::fabs(g2));
        expected[b * width + 2 * c.pairs] += by_factor;
        magnitude[b * width + 2 * c.pairs] +=
            (std::fabs(x1) + std::fabs(x2)) * (std::fabs(g1) + std::fabs(g2));
      }
    });
  };
  add(problem.q, grad_q);
  add(problem.k, grad_k);
  const double relative = c.dtype == DType::kFloat64 ? 1e-12 : 2e-6;  // products in float32
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      double got = 0;
      for (int64_t block = 0; block < blocks; ++block)
        got += partial[(b * blocks + block) * width + i];
      CHECK_NEAR(got, expected[b * width + i], relative * magnitude[b * width + i]);
    }
  }
}

void run(const Case& c) {
  Problem problem(c);
  forward(problem);
  gradients(problem);
}

// Phases of consecutive tokens are sums of frequencies: the same bits as each token's by itself,
// also where positions pass zero and the lower words carry.
void runs() {
  constexpr int64_t kTokens = 40, kPairs = 70;
  std::vector<double> inv_freq(kPairs);
  for (int64_t i = 0; i < kPairs; ++i)
    inv_freq[i] = std::pow(1e4, -static_cast<double>(i) / kPairs);
  for (int64_t from : {int64_t{-7}, int64_t{1} << 40, std::numeric_limits<int64_t>::max() - 20}) {
    std::vector<int64_t> positions(kTokens);
    for (int64_t t = 0; t < kTokens; ++t) {
      positions[t] = static_cast<int64_t>(static_cast<uint64_t>(from) + static_cast<uint64_t>(t));
    }
    longrope::RopeParams p{};
    p.dtype = DType::kFloat32;
    p.batch = 1;
    p.tokens = kTokens;
    p.pairs = kPairs;
    p.head_dim = 2 * kPairs;
    p.positions = positions.data();
    p.positions_token_stride = 1;
    p.turn.inv_freq = inv_freq.data();
    p.turn.tiers = 1;
    p.attention_factor = 1;
    std::vector<float> cos(kTokens * kPairs), sin(cos), cos_alone(cos), sin_alone(cos);
    longrope::rope_table_cpu(p, 0, kTokens, cos.data(), sin.data());
    for (int64_t t = 0; t < kTokens; ++t) {
      longrope::rope_table_cpu(p, t, t + 1, &cos_alone[t * kPairs], &sin_alone[t * kPairs]);
    }
    CHECK(cos == cos_alone);
    CHECK(sin == sin_alone);
  }
}

// inv_freq of one turn per 2^k tokens is exact in fixed point up to the rounding of the double.
void phases() {
  const double two_pi = 6.283185307179586476925;
  CHECK(longrope::turns_per_token(0.0) == 0);
  for (int k = 1; k < 40; ++k) {
    const uint64_t turns = longrope::turns_per_token(std::ldexp(two_pi, -k));
    const double error =
        static_cast<double>(static_cast<int64_t>(turns - (uint64_t{1} << (64 - k))));
    CHECK_NEAR(std::ldexp(error, k - 64), 0, 1.2e-16);  // half a unit in the last place of 2 pi
    CHECK(longrope::turns_per_token(-std::ldexp(two_pi, -k)) == -turns);
  }
}

}  // namespace

int main() {
  phases();
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  check::for_each_isa([&] {
    runs();
    for (DType dtype : dtypes) {
      for (bool interleaved : {false, true}) {
        //         batch, heads, of keys, tokens, head_dim, pairs
        run({dtype, 1, 1, 1, 1, 2, 1, interleaved, false, false, 0});
        run({dtype, 2, 3, 1, 37, 24, 9, interleaved, false, true, 0});   // partial, token major
        run({dtype, 3, 2, 2, 19, 40, 17, interleaved, true, false, 2});  // per row, start tokens
        run({dtype, 1, 2, 1, 37, 160, 80, interleaved, false, false, 3, true});  // runs
        run({dtype, 1, 2, 1, 37, 64, 32, interleaved, false, true, 3, true});
      }
    }
  });
  return check::result();
}
