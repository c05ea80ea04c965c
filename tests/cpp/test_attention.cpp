// Attention without torch: the forward against the definition in double, over odd sizes, ragged
// rows, shared key heads, windows and caps, with every row computed once by some task.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "check.h"

namespace {

struct Case {
  int64_t heads, kv_heads, queries, keys, head_dim;
  int64_t query_start, key_start, key_length, window;
  bool causal;
  double softcap;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> aligned(size_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
}

void run(const Case& c) {
  constexpr int64_t kBatch = 2;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(kBatch * c.heads * c.queries * c.head_dim);
  std::vector<float> k(kBatch * c.kv_heads * c.keys * c.head_dim), v(k.size());
  for (auto* values : {&q, &k, &v}) {
    for (float& x : *values) x = normal(random);
  }
  std::vector<float> out(q.size(), std::nanf("")), lse(kBatch * c.heads * c.queries, std::nanf(""));
  const auto view = [&](std::vector<float>& x, int64_t heads, int64_t tokens) {
    const int64_t head = tokens * c.head_dim;
    return longrope::AttentionTensor{x.data(), heads * head, head, c.head_dim};
  };
  longrope::AttentionParams params{};
  params.q = view(q, c.heads, c.queries);
  params.k = view(k, c.kv_heads, c.keys);
  params.v = view(v, c.kv_heads, c.keys);
  params.out = view(out, c.heads, c.queries);
  params.lse = lse.data();
  params.dtype = longrope::DType::kFloat32;
  params.batch = kBatch;
  params.heads = c.heads;
  params.kv_heads = c.kv_heads;
  params.queries = c.queries;
  params.keys = c.keys;
  params.head_dim = c.head_dim;
  params.query_start = {nullptr, c.query_start};
  params.key_start = {nullptr, c.key_start};
  params.key_length = {nullptr, c.key_length};
  params.causal = c.causal;
  params.window = c.window;
  params.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
  params.softcap = c.softcap;
  const longrope::AttentionPlan plan = longrope::attention_plan(params);
  const auto workspace = aligned(plan.workspace), scratch = aligned(plan.scratch);
  for (int64_t task = plan.tasks - 1; task >= 0; --task) {  // any order
    longrope::attention_cpu(params, plan, task, workspace.get(), scratch.get());
  }
  if (plan.splits > 1) {
    const int64_t rows = kBatch * c.heads * c.queries;
    longrope::attention_merge_splits_cpu(params, plan, workspace.get(), 0, rows);
  }

  for (int64_t row = 0; row < kBatch * c.heads * c.queries; ++row) {
    const int64_t i = row % c.queries, h = row / c.queries % c.heads;
    const int64_t b = row / c.queries / c.heads;
    const int64_t kv = (b * c.kv_heads + h / (c.heads / c.kv_heads)) * c.keys;
    std::vector<double> weights(c.keys), expected(c.head_dim);
    double total = 0;
    for (int64_t j = c.key_start; j < c.key_length; ++j) {
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

}  // namespace

int main() {
  check::for_each_isa([] {
    run({2, 2, 33, 33, 64, 0, 0, 33, 0, true, 0});
    run({4, 2, 17, 90, 40, 73, 5, 88, 0, true, 0});      // a chunk on a padded cache
    run({4, 1, 1, 300, 128, 299, 0, 300, 0, true, 0});   // a decode step
    run({2, 1, 70, 129, 96, 59, 0, 129, 16, true, 30});  // sliding window, soft cap
    run({1, 1, 9, 40, 7, -4, 3, 40, 0, true, 0});        // rows that see no key
    run({2, 2, 19, 65, 256, 0, 0, 65, 0, false, 0});
  });
  return check::result();
}
