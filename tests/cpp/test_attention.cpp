// Attention without torch: the forward against the definition in double, over odd sizes, ragged
// rows, shared key heads, windows and caps, with every row computed once by some task; and tiers.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/tables.h"
#include "check.h"

namespace {

struct Case {
  int64_t heads, kv_heads, queries, keys, head_dim;
  int64_t query_start, key_start, key_length, window;
  bool causal;
  double softcap;
  int64_t query_begin = -1, query_end = 1 << 20;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> aligned(size_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
}

constexpr int64_t kBatch = 2;

template <typename T>
longrope::AttentionParams parameters(const Case& c, T* q, T* k, T* v, T* out, float* lse) {
  const auto view = [&](T* x, int64_t heads, int64_t tokens) {
    const int64_t head = tokens * c.head_dim;
    return longrope::AttentionTensor{x, heads * head, head, c.head_dim};
  };
  longrope::AttentionParams params{};
  params.q = view(q, c.heads, c.queries);
  params.k = view(k, c.kv_heads, c.keys);
  params.v = view(v, c.kv_heads, c.keys);
  params.out = view(out, c.heads, c.queries);
  params.lse = lse;
  params.dtype = sizeof(T) == 4 ? longrope::DType::kFloat32 : longrope::DType::kBFloat16;
  params.batch = kBatch;
  params.heads = c.heads;
  params.kv_heads = c.kv_heads;
  params.queries = c.queries;
  params.keys = c.keys;
  params.head_dim = c.head_dim;
  params.query_start = {nullptr, c.query_start};
  params.key_start = {nullptr, c.key_start};
  params.key_length = {nullptr, c.key_length};
  params.query_begin = {nullptr, c.query_begin};
  params.query_end = {nullptr, c.query_end};
  params.causal = c.causal;
  params.window = c.window;
  params.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
  params.softcap = c.softcap;
  return params;
}

void attend(const longrope::AttentionParams& params) {
  const longrope::AttentionPlan plan = longrope::attention_plan(params);
  const auto workspace = aligned(plan.workspace), scratch = aligned(plan.scratch);
  for (int64_t task = plan.tasks - 1; task >= 0; --task) {  // any order
    longrope::attention_cpu(params, plan, task, workspace.get(), scratch.get());
  }
  if (plan.splits > 1) {
    const int64_t rows = kBatch * params.heads * params.queries;
    longrope::attention_merge_splits_cpu(params, plan, workspace.get(), 0, rows);
  }
}

// Gradients of the sum of out.
template <typename T>
std::vector<T> gradients(const longrope::AttentionParams& params, T one, int64_t elements_of_k) {
  const int64_t rows = kBatch * params.heads * params.queries,
                elements_of_q = rows * params.head_dim;
  std::vector<T> grad_out(elements_of_q, one), grads(elements_of_q + 2 * elements_of_k);
  longrope::AttentionBackwardParams g{};
  g.forward = params;
  g.grad_out = g.grad_q = params.q;
  g.grad_k = g.grad_v = params.k;
  g.grad_out.data = grad_out.data();
  g.grad_q.data = grads.data();
  g.grad_k.data = grads.data() + elements_of_q;
  g.grad_v.data = grads.data() + elements_of_q + elements_of_k;
  const longrope::AttentionPlan plan = longrope::attention_backward_plan(params);
  const auto workspace = aligned(plan.workspace), scratch = aligned(plan.scratch);
  for (int64_t task = plan.tasks - 1; task >= 0; --task) {
    longrope::attention_backward_cpu(g, plan, task, workspace.get(), scratch.get());
  }
  longrope::attention_backward_finish_cpu(g, plan, workspace.get(), 0, rows);
  return grads;
}

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What a library does by the processor's instructions.
void bfloat16_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                      bool add, const void* a, const void* b, float* c) {
  CHECK(k % 32 == 0);
  const auto* rows = static_cast<const uint16_t*>(a);
  const auto* pairs = static_cast<const uint16_t*>(b);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += widen(rows[i * lda + p]) * widen(pairs[(p / 2 * ldb + j) * 2 + p % 2]);
      }
      c[i * ldc + j] = sum;
    }
  }
}

// bfloat16, multiplied in bfloat16 and in float32: the same but for the rounding of probabilities.
void compare_products(const Case& c) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> q(kBatch * c.heads * c.queries * c.head_dim);
  std::vector<uint16_t> k(kBatch * c.kv_heads * c.keys * c.head_dim), v(k.size());
  for (auto* values : {&q, &k, &v}) {
    for (uint16_t& x : *values) {
      const float value = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      x = static_cast<uint16_t>(bits >> 16);
    }
  }
  std::vector<uint16_t> out(q.size()), expected(q.size());
  std::vector<float> lse(kBatch * c.heads * c.queries), expected_lse(lse.size());
  const auto plain =
      parameters(c, q.data(), k.data(), v.data(), expected.data(), expected_lse.data());
  attend(plain);
  auto params = parameters(c, q.data(), k.data(), v.data(), out.data(), lse.data());
  params.bfloat16_product = bfloat16_product;
  attend(params);
  for (size_t i = 0; i < lse.size(); ++i) {
    CHECK(lse[i] == expected_lse[i] || std::abs(lse[i] - expected_lse[i]) < 1e-4);
  }
  for (size_t i = 0; i < out.size(); ++i) CHECK_NEAR(widen(out[i]), widen(expected[i]), 2e-2);
  const uint16_t one = 0x3f80;
  const int64_t elements = static_cast<int64_t>(k.size());
  const auto grads = gradients(params, one, elements);
  const auto expected_grads = gradients(plain, one, elements);
  for (size_t i = 0; i < grads.size(); ++i) {
    CHECK_NEAR(widen(grads[i]), widen(expected_grads[i]), 5e-2);
  }
}

void run(const Case& c) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(kBatch * c.heads * c.queries * c.head_dim);
  std::vector<float> k(kBatch * c.kv_heads * c.keys * c.head_dim), v(k.size());
  for (auto* values : {&q, &k, &v}) {
    for (float& x : *values) x = normal(random);
  }
  std::vector<float> out(q.size(), std::nanf("")), lse(kBatch * c.heads * c.queries, std::nanf(""));
  const longrope::AttentionParams params =
      parameters(c, q.data(), k.data(), v.data(), out.data(), lse.data());
  attend(params);

  for (int64_t row = 0; row < kBatch * c.heads * c.queries; ++row) {
    const int64_t i = row % c.queries, h = row / c.queries % c.heads;
    const int64_t b = row / c.queries / c.heads;
    const int64_t kv = (b * c.kv_heads + h / (c.heads / c.kv_heads)) * c.keys;
    std::vector<double> weights(c.keys), expected(c.head_dim);
    double total = 0;
    for (int64_t j = c.key_start; j < c.key_length; ++j) {
      if (i < c.query_begin || i >= c.query_end) continue;
      if (c.causal && j > c.query_start + i) continue;
      if (c.window > 0 && j <= c.query_start + i - c.window) continue;
      double score = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        score += static_cast<double>(q[row * c.head_dim + d]) * k[(kv + j) * c.head_dim + d];
      }
      score *= params.scale;
      if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
      weights[j] = std::exp(score);
      total += weights[j];
    }
    for (int64_t j = 0; j < c.keys && total > 0; ++j) {
      for (int64_t d = 0; d < c.head_dim; ++d) {
        expected[d] += weights[j] / total * v[(kv + j) * c.head_dim + d];
      }
    }
    if (total > 0) {
      CHECK_NEAR(lse[row], std::log(total), 1e-5);
    } else {
      CHECK(lse[row] == -std::numeric_limits<float>::infinity());
    }
    for (int64_t d = 0; d < c.head_dim; ++d) {
      CHECK_NEAR(out[row * c.head_dim + d], expected[d], 1e-5);
    }
  }
}

// bfloat16 as the same numbers in float32, but for the rounding of the result.
void compare_bfloat16(const Case& c) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> q(kBatch * c.heads * c.queries * c.head_dim);
  std::vector<uint16_t> k(kBatch * c.kv_heads * c.keys * c.head_dim), v(k.size()), out(q.size());
  std::vector<float> wide_q, wide_k, wide_v, wide_out(q.size());
  for (const auto& [values, wide] :
       {std::pair{&q, &wide_q}, std::pair{&k, &wide_k}, std::pair{&v, &wide_v}}) {
    for (uint16_t& x : *values) {
      const float value = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      x = static_cast<uint16_t>(bits >> 16);
      wide->push_back(widen(x));
    }
  }
  std::vector<float> lse(kBatch * c.heads * c.queries), wide_lse(lse.size());
  attend(parameters(c, q.data(), k.data(), v.data(), out.data(), lse.data()));
  attend(
      parameters(c, wide_q.data(), wide_k.data(), wide_v.data(), wide_out.data(), wide_lse.data()));
  for (size_t i = 0; i < lse.size(); ++i) CHECK_NEAR(lse[i], wide_lse[i], 1e-5);
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK_NEAR(widen(out[i]), wide_out[i], 1e-5 + std::abs(wide_out[i]) / 256);
  }
}

// Queries of two tiers, crossed inside a block of rows, as if each tier's had keys turned by hand.
void run_tiers(int64_t queries, int64_t keys, int64_t crossing, bool interleaved) {
  const Case c{2, 1, queries, keys, 12, keys - queries, 0, keys, 0, true, 0};
  constexpr int64_t kTiers = 2, kPairs = 5;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> q(kBatch * c.heads * queries * c.head_dim);
  std::vector<float> k(kBatch * keys * c.head_dim), v(k.size());
  for (auto* values : {&q, &k, &v}) {
    for (float& x : *values) x = normal(random);
  }
  std::vector<double> inv_freq(kTiers * kPairs);
  for (double& f : inv_freq) f = std::abs(normal(random));
  std::vector<int64_t> positions(keys);
  for (int64_t i = 0; i < keys; ++i) positions[i] = i;
  const int64_t limits[kTiers] = {keys - queries + crossing, keys};

  std::vector<float> out(q.size(), std::nanf("")), lse(kBatch * c.heads * queries, std::nanf(""));
  longrope::AttentionParams params =
      parameters(c, q.data(), k.data(), v.data(), out.data(), lse.data());
  const auto turn = [&](const longrope::AttentionTensor& x, int64_t heads, int64_t tokens) {
    longrope::RopeParams p{};
    p.q = {x.data, heads, x.batch_stride, x.head_stride, x.token_stride};
    p.dtype = longrope::DType::kFloat32;
    p.batch = kBatch;
    p.tokens = tokens;
    p.head_dim = c.head_dim;
    p.pairs = kPairs;
    p.interleaved = interleaved;
    p.positions = positions.data() + keys - tokens;
    p.positions_token_stride = 1;
    p.turn.inv_freq = inv_freq.data();
    p.turn.tiers = kTiers;
    p.attention_factor = 1.5;
    return p;
  };
  const longrope::AttentionRotation rotation{turn(params.q, c.heads, queries),
                                             turn(params.k, c.kv_heads, keys), limits};
  params.rotation = &rotation;
  std::vector<int64_t> query_begin;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (const int64_t begin : {int64_t{0}, crossing, queries}) query_begin.push_back(begin);
  }
  const longrope::AttentionTables tables(params, query_begin.data());
  for (int64_t piece = tables.pieces() - 1; piece >= 0; --piece) tables.fill(piece);
  const longrope::AttentionTiers tiers = tables.tiers();
  params.tiers = &tiers;
  attend(params);

  for (int64_t tier = 0; tier < kTiers; ++tier) {
    std::vector<float> turned_q(q), turned_k(k), expected(q.size()), expected_lse(lse.size());
    for (auto* x : {&turned_q, &turned_k}) {
      const bool is_q = x == &turned_q;
      longrope::RopeParams p = is_q ? rotation.q : rotation.k;
      p.q_out = p.q;
      p.q.data = p.q_out.data = x->data();
      p.turn.inv_freq += tier * kPairs;
      p.turn.tiers = 1;
      longrope::rope_cpu(p, 0, kBatch * longrope::rope_blocks(p));
    }
    attend(parameters(c, turned_q.data(), turned_k.data(), v.data(), expected.data(),
                      expected_lse.data()));
    for (size_t row = 0; row < lse.size(); ++row) {
      const int64_t query = static_cast<int64_t>(row) % queries;
      if ((query < crossing) != (tier == 0)) continue;
      CHECK_NEAR(lse[row], expected_lse[row], 1e-5);
      for (int64_t d = 0; d < c.head_dim; ++d) {
        CHECK_NEAR(out[row * c.head_dim + d], expected[row * c.head_dim + d], 1e-5);
      }
    }
  }
}

}  // namespace

int main() {
  check::for_each_isa([] {
    run({2, 2, 33, 33, 64, 0, 0, 33, 0, true, 0});
    run({4, 2, 17, 90, 40, 73, 5, 88, 0, true, 0});      // a chunk on a padded cache
    run({4, 1, 1, 300, 128, 299, 0, 300, 0, true, 0});   // a decode step
    run({2, 1, 70, 129, 96, 59, 0, 129, 16, true, 30});  // sliding window, soft cap
    run({1, 1, 9, 40, 7, -4, 3, 40, 0, true, 0});        // rows that see no key
    run({2, 2, 19, 65, 256, 0, 0, 65, 0, false, 0});
    run({4, 2, 50, 60, 24, 10, 0, 60, 0, true, 0, 7, 31});  // some of the queries
    run({6, 2, 1, 131, 64, 130, 0, 131, 0, true, 0});       // decode steps: three rows to a key,
    run({7, 1, 1, 260, 33, 259, 2, 259, 0, true, 0});       // seven, of an odd size,
    run({2, 1, 5, 2500, 80, 2495, 0, 2500, 700, true, 0});  // ten, keys in parts
    compare_bfloat16({6, 2, 1, 131, 64, 130, 0, 131, 0, true, 0});
    compare_bfloat16({8, 1, 2, 300, 72, 298, 3, 299, 0, true, 0});
    run_tiers(3, 2100, 1, false);
    run_tiers(300, 300, 101, false);
    run_tiers(40, 2100, 1, true);  // keys in parts
    run_tiers(1, 70, 0, false);    // all in the second
  });
  compare_products({2, 1, 130, 300, 40, 150, 7, 290, 0, true, 0});
  compare_products({4, 2, 1, 2100, 33, 2099, 0, 2100, 0, true, 0});
  compare_products({1, 1, 40, 600, 64, 560, 0, 600, 100, true, 20});
  compare_products({1, 1, 9, 40, 7, -4, 3, 40, 0, true, 0});
  compare_products({2, 1, 130, 300, 40, 150, 7, 290, 0, true, 0, 33, 129});
  return check::result();
}
