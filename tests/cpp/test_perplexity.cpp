// Linear cross-entropy without torch: forward and backward against the definition in double, with
// plain loops as matrix products, over odd sizes, strides, element types and splits of the work.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "elements.h"
#include "perplexity/perplexity.h"

namespace {

using elements::epsilon;
using longrope::DType;

struct Case {
  DType dtype;
  int64_t rows, embed, vocab, threads;
  double softcap;
  bool columns_apart;  // strides of 2 along the embedding
};

void float_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                   const void* a, const void* b, float* c) {
  const float* x = static_cast<const float*>(a);
  const float* y = static_cast<const float*>(b);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p) sum += x[i * lda + p] * y[p * ldb + j];
      c[i * ldc + j] = sum;
    }
  }
}

float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void bfloat16_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                      bool add, const void* a, const void* b, float* c) {
  CHECK(k % 2 == 0);
  const uint16_t* x = static_cast<const uint16_t*>(a);
  const uint16_t* y = static_cast<const uint16_t*>(b);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p) {
        sum += widen(x[i * lda + p]) * widen(y[(p / 2 * ldb + j) * 2 + p % 2]);
      }
      c[i * ldc + j] = sum;
    }
  }
}

// A matrix with a margin behind each row that is NaN.
struct Matrix {
  Matrix(const Case& c, int64_t rows, std::mt19937& random) : step(c.columns_apart ? 2 : 1) {
    stride = c.embed * step + 3;
    std::normal_distribution<double> normal;
    values.assign(rows * stride, std::nan(""));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t e = 0; e < c.embed; ++e) {
        values[r * stride + e * step] = elements::round_to(c.dtype, normal(random));
      }
    }
    std::vector<double> plain = values;  // encode() knows no NaN
    std::replace_if(plain.begin(), plain.end(), [](double x) { return x != x; }, 0.0);
    bytes = elements::encode(c.dtype, plain);
    const size_t size = elements::size(c.dtype);
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] != values[i]) std::memset(bytes.data() + i * size, 0xff, size);
    }
  }
  double at(int64_t row, int64_t e) const { return values[row * stride + e * step]; }
  longrope::MatrixView view() const { return {bytes.data(), stride, step}; }

  int64_t step, stride;
  std::vector<double> values;
  std::vector<unsigned char> bytes;
};

// The definition: nll and both gradients.
struct Expected {
  Expected(const Case& c, const Matrix& hidden, const Matrix& weight,
           const std::vector<int64_t>& targets, const std::vector<double>& grad)
      : nll(c.rows), grad_hidden(c.rows * c.embed), grad_weight(c.vocab * c.embed) {
    for (int64_t t = 0; t < c.rows; ++t) {
      if (targets[t] < 0) continue;
      std::vector<double> logits(c.vocab), slope(c.vocab, 1.0);
      for (int64_t v = 0; v < c.vocab; ++v) {
        for (int64_t e = 0; e < c.embed; ++e) logits[v] += hidden.at(t, e) * weight.at(v, e);
        if (c.softcap != 0.0) {
          const double capped = std::tanh(logits[v] / c.softcap);
          slope[v] = 1.0 - capped * capped;
          logits[v] = c.softcap * capped;
        }
      }
      const double top = *std::max_element(logits.begin(), logits.end());
      double sum = 0.0;
      for (double x : logits) sum += std::exp(x - top);
      nll[t] = top + std::log(sum) - logits[targets[t]];
      for (int64_t v = 0; v < c.vocab; ++v) {
        const double p = std::exp(logits[v] - top) / sum;
        const double g = (p - (v == targets[t] ? 1.0 : 0.0)) * slope[v] * grad[t];
        for (int64_t e = 0; e < c.embed; ++e) {
          grad_hidden[t * c.embed + e] += g * weight.at(v, e);
          grad_weight[v * c.embed + e] += g * hidden.at(t, e);
        }
      }
    }
  }
  std::vector<double> nll, grad_hidden, grad_weight;
};

void check_close(const std::vector<double>& got, const std::vector<double>& expected,
                 double tolerance) {
  double largest = 1.0;
  for (double x : expected) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK_NEAR(got[i], expected[i], tolerance * largest);
  }
}

void check_case(const Case& c) {
  std::mt19937 random(7);
  const Matrix hidden(c, c.rows, random), weight(c, c.vocab, random);
  std::vector<int64_t> targets(c.rows);
  std::vector<double> grad(c.rows);
  for (int64_t t = 0; t < c.rows; ++t) {
    targets[t] = t % 5 == 3 ? -100 : static_cast<int64_t>(random() % c.vocab);
    grad[t] = elements::round_to(DType::kFloat32, 0.5 + 0.01 * t);
  }
  const DType wide = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const std::vector<unsigned char> grad_bytes = elements::encode(wide, grad);
  std::vector<unsigned char> nll(c.rows * elements::size(wide)), stats(2 * nll.size());
  std::vector<unsigned char> grad_hidden(c.rows * c.embed * elements::size(c.dtype), 0xff);
  std::vector<unsigned char> grad_weight(c.vocab * c.embed * elements::size(c.dtype), 0xff);

  longrope::LinearNllParams p = {};
  p.dtype = c.dtype;
  p.hidden = hidden.view();
  p.weight = weight.view();
  p.targets = targets.data();
  p.rows = c.rows;
  p.embed = c.embed;
  p.vocab = c.vocab;
  p.ignore_index = -100;
  p.softcap = c.softcap;
  p.nll = nll.data();
  p.stats = stats.data();
  p.grad_nll = grad_bytes.data();
  p.grad_hidden = grad_hidden.data();
  p.grad_weight = grad_weight.data();

  longrope::Runtime runtime;
  runtime.threads = c.threads;
  runtime.for_each = [](int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = count; i-- > 0;) body(i);  // no order is promised
  };
  runtime.float_product = float_product;
  runtime.bfloat16_product = bfloat16_product;
  longrope::linear_nll_cpu(p, runtime);
  longrope::linear_nll_backward_cpu(p, runtime);

  const Expected expected(c, hidden, weight, targets, grad);
  const double arithmetic = wide == DType::kFloat64 ? 1e-13 : 3e-6;
  check_close(elements::decode(wide, nll), expected.nll, arithmetic);
  const double tolerance = arithmetic + 2 * epsilon(c.dtype);
  check_close(elements::decode(c.dtype, grad_hidden), expected.grad_hidden, tolerance);
  check_close(elements::decode(c.dtype, grad_weight), expected.grad_weight, tolerance);

  // The same for a head that is frozen: the gradient with the loss, then scaled.
  std::fill(nll.begin(), nll.end(), 0xff);
  std::vector<unsigned char> gradient(grad_hidden.size(), 0xff);
  std::fill(grad_hidden.begin(), grad_hidden.end(), 0xff);
  p.stats = p.grad_weight = nullptr;
  p.grad_hidden = gradient.data();
  longrope::linear_nll_with_gradient_cpu(p, runtime);
  const longrope::LinearNllScaleParams scale = {
      c.dtype, gradient.data(),   grad_bytes.data(), targets.data(), c.rows, c.embed,
      -100,    grad_hidden.data()};
  longrope::linear_nll_scale_cpu(scale, 0, c.rows / 2);
  longrope::linear_nll_scale_cpu(scale, c.rows / 2, c.rows);
  check_close(elements::decode(wide, nll), expected.nll, arithmetic);
  check_close(elements::decode(c.dtype, grad_hidden), expected.grad_hidden, tolerance);
}

void check_candidate_sums() {
  const float nll[] = {1.0f, 2.0f, 4.0f, 8.0f};
  const int64_t targets[] = {0, -1, 2, 3}, candidate[] = {2, 2, 0, 2};
  double sums[3];
  int64_t counts[3];
  longrope::candidate_sums_cpu(nll, false, targets, candidate, 4, 3, -1, sums, counts);
  CHECK(sums[0] == 4.0 && sums[1] == 0.0 && sums[2] == 9.0);
  CHECK(counts[0] == 1 && counts[1] == 0 && counts[2] == 2);
}

}  // namespace

int main() {
  check::for_each_isa([] {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      check_case({dtype, 1, 1, 1, 1, 0.0, false});
      check_case({dtype, 5, 3, 257, 3, 0.0, false});
      check_case({dtype, 70, 32, 33, 2, 0.0, false});
      check_case({dtype, 70, 32, 300, 5, 2.0, false});
      check_case({dtype, 20, 32, 41, 2, 0.0, true});
      check_case({dtype, 3, 2, 1030, 16, 0.0, false});  // two blocks of the vocabulary
      check_case({dtype, 2600, 2, 9, 2, 0.0, false});   // two blocks of tokens
    }
  });
  check_candidate_sums();
  return check::result();
}
