// Attention of 16-bit elements on compute capability 9.0 (wgmma, bulk copies of tensor tiles).
//
// Formula and accumulation: those of ../forward.cu, by the algorithm of FlashAttention-3
// (arXiv 2407.08608).
// Mapping: a block takes 128 queries of one head (192 for head_dim to 64), 64 to each of its
// consumer warpgroups, and walks through the keys that they see from the last one down, in tiles of
// 128 (64 for head_dim beyond 128). One more warpgroup copies: the queries once, and keys and
// values into rings of tiles, each of which has a barrier that says it is full (one arrival and the
// bytes of the copy) and one that says it is empty (one arrival of each consumer warpgroup).
//
//   begin S = Q K(j)^T    begin O += P V(j - 1)    wait for S, free K(j)    P = softmax S
//   wait for K(j + 1)    wait for O, free V(j - 1)    rescale O, round P
//
// so that a softmax runs beside the product of its own warpgroup, and, as warpgroups take turns at
// beginning products (head_dim to 128), beside those of the others.
//
// Tiles end where the keys that the block sees do; the first of them, the last one visited, begins
// before. Keys before the tensor are zeros; values that exist and are not for this block are made
// zeros (0 times NaN is NaN), and scores there are masked as those beyond a bound of their row are.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/sm90/forward_tiles.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope {
namespace cuda {
namespace sm90 {
namespace {

// One warp copies.
template <int kHeadDim>
__device__ __forceinline__ void copy_tiles(ForwardShared<kHeadDim>& shared,
                                           const ForwardWork<kHeadDim>& work, const TensorMap& q,
                                           const TensorMap& k, const TensorMap& v) {
  using Shared = ForwardShared<kHeadDim>;
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    arrive_expecting(&shared.q_full, Shared::QueryTile::kBytes);
    shared.q.copy(q, &shared.q_full, work.first_query, work.head, work.batch);
  }
  Place<ForwardTile<kHeadDim>::kStages> at;
  for (int step = 0; step < work.steps; ++step, at.advance()) {
    const int key = work.first_key(step);
    const bool is_cut = key < work.keys.begin && work.keys.begin > 0;
    uint64_t* const v_full = is_cut ? &shared.edge_full : &shared.v_full[at.stage];
    if (lane == 0) {
      wait_barrier(&shared.k_empty[at.stage], at.parity ^ 1);
      arrive_expecting(&shared.k_full[at.stage], Shared::KeyTile::kBytes);
      shared.k[at.stage].copy(k, &shared.k_full[at.stage], key, work.kv_head, work.batch);
      wait_barrier(&shared.v_empty[at.stage], at.parity ^ 1);
      arrive_expecting(v_full, Shared::KeyTile::kBytes);
      shared.v[at.stage].copy(v, v_full, key, work.kv_head, work.batch);
    }
    if (!is_cut) continue;
    sync_warp();
    wait_barrier(&shared.edge_full, 0);
    shared.v[at.stage].clear(0, work.keys.begin - key, lane, 32);
    publish_stores();
    sync_warp();
    if (lane == 0) arrive(&shared.v_full[at.stage]);
  }
}

// Warpgroups begin their products one after another, in a circle.
template <int kHeadDim>
struct Turn {
  static constexpr int kCount = ForwardTile<kHeadDim>::kConsumers;
  static constexpr bool kTaken = ForwardTile<kHeadDim>::kTakesTurns;
  const int me;

  __device__ __forceinline__ void wait() const {
    if (kTaken) bar_sync(1 + me, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass() const {
    if (kTaken) bar_arrive(1 + (me + 1 == kCount ? 0 : me + 1), 2 * kWarpgroup);
  }
  __device__ __forceinline__ bool is_last() const { return me + 1 == kCount; }
};

// What a thread keeps of its warpgroup's 64 rows.
template <typename T, int kHeadDim>
class Rows {
 public:
  using Size = ForwardTile<kHeadDim>;
  using QueryTile = typename ForwardShared<kHeadDim>::QueryTile;
  using KeyTile = typename ForwardShared<kHeadDim>::KeyTile;
  static constexpr int kKeys = Size::kKeys;

  __device__ __forceinline__ Rows(const AttentionParams& p, ForwardShared<kHeadDim>& shared,
                                  const ForwardWork<kHeadDim>& work)
      : shared_(shared),
        work_(work),
        score_(p),
        // The same in all lanes, which the compiler sees by the shuffle alone: what follows from it
        // lies in uniform registers, as products want their matrices.
        turn_{shfl(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0) - 1},
        rows_(shared.q.bytes + turn_.me * 64 * kPanelBytes),
        q_(moved(along(shared.q), turn_.me * 64 * kPanelBytes)),
        first_query_(work.first_query + turn_.me * 64),
        row_(static_cast<int>(threadIdx.x % kWarpgroup) / 32 * 16 +
             static_cast<int>(threadIdx.x) % 32 / 4) {}

  __device__ __forceinline__ void attend() {
    if (work_.steps == 0) return;
    // Keys that every row sees.
    const Keys every{work_.keys_of(first_query_ + 63).begin, work_.keys_of(first_query_).end};
    auto is_plain = [&](int step) {
      const int key = work_.first_key(step);
      return score_.is_product && key >= every.begin && key + kKeys <= every.end;
    };
    if (turn_.is_last() && work_.steps > 1) turn_.pass();
    begin();
    int step = 1;
    while (step < work_.steps) {
      for (; step < work_.steps && !is_plain(step); ++step) next<false>(step);
      for (; step < work_.steps && is_plain(step); ++step) next<true>(step);
    }
    wait_barrier(&shared_.v_full[v_at_.stage], v_at_.parity);
    begin_sum<T>(o_[0], weights_, across<KeyTile>(along(shared_.v[v_at_.stage])));
    wait_products<0>(o_[0]);
  }

  __device__ __forceinline__ void write(const AttentionParams& p, bool packed) {
    float inverse[1][2], lse[1][2];
    softmax_.finish(score_.unit, inverse, lse);
    bar_sync(4 + turn_.me, kWarpgroup);  // no warp needs the queries: their place takes the output
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_ + 8 * half, query = first_query_ + row;
      if (lane % 4 == 0 && query >= work_.queries.begin && query < work_.queries.end) {
        const int64_t head = static_cast<int64_t>(work_.batch) * p.heads + work_.head;
        static_cast<float*>(p.lse)[head * p.queries + query] = lse[0][half];
      }
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const float pair[2] = {o_[0][j][2 * half] * inverse[0][half],
                               o_[0][j][2 * half + 1] * inverse[0][half]};
        store(reinterpret_cast<T*>(unit(row, j)) + lane % 4 * 2, pack<T>(pair));
      }
    }
    sync_warp();
    const int head_dim = static_cast<int>(p.head_dim), begin = row_ / 16 * 16;
    for (int i = lane; i < 16 * kHeadDim / 8; i += 32) {
      const int row = begin + i / (kHeadDim / 8), j = i % (kHeadDim / 8);
      const int query = first_query_ + row;
      if (8 * j >= head_dim || query < work_.queries.begin || query >= work_.queries.end) continue;
      const auto values = load<8>(reinterpret_cast<const T*>(unit(row, j)));
      T* const out = row_of<T>(p.out, work_.batch, work_.head, query) + 8 * j;
      if (packed) {
        store(out, values);
      } else {
        for (int e = 0; e < 8 && 8 * j + e < head_dim; ++e) out[e] = values.values[e];
      }
    }
  }

 private:
  // The j-th eight columns of a row of the output, in an order that keeps the banks apart.
  __device__ __forceinline__ unsigned char* unit(int row, int j) const {
    return rows_ + j / 8 * QueryTile::kStride + row * kPanelBytes + (j ^ row) % 8 * 16;
  }

  // One thread speaks for the warpgroup, all of whose products have ended.
  __device__ __forceinline__ void release(uint64_t* empty) const {
    if (threadIdx.x % kWarpgroup == 0) arrive(empty);
  }

  __device__ __forceinline__ void mask(float (&s)[kKeys / 8][4], int first_key) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Keys seen = work_.keys_of(first_query_ + row_ + 8 * half);
      const int behind = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int e = 0; e < kKeys / 4; ++e) {
        const int key = behind + e / 2 * 8 + e % 2;
        float& x = s[e / 2][2 * half + e % 2];
        if (key < seen.begin || key >= seen.end) x = -INFINITY;
      }
    }
  }

  // The first tile has no values to multiply meanwhile.
  __device__ __forceinline__ void begin() {
    float s[1][kKeys / 8][4], before[1][2];
    wait_barrier(&shared_.q_full, 0);
    wait_barrier(&shared_.k_full[0], 0);
    begin_transposed<T, QueryTile, KeyTile, kHeadDim>(s[0], q_, along(shared_.k[0]));
    wait_products<0>(s[0]);
    release(&shared_.k_empty[0]);
    k_at_.advance();
    if (!score_.is_product) score_.apply(s);
    mask(s[0], work_.first_key(0));
    softmax_.weigh(s, before, score_.unit);
    round_to_left<T>(s[0], weights_);
    wait_for_keys(1);
  }

  // Comes between a softmax and the wait for the product beside it: ptxas moves that wait upwards
  // as far as there is no branch, and would have the softmax run beside nothing.
  __device__ __forceinline__ void wait_for_keys(int step) {
    if (step < work_.steps) wait_barrier(&shared_.k_full[k_at_.stage], k_at_.parity);
  }

  // kPlain: scores are products and every row sees all keys.
  template <bool kPlain>
  __device__ __forceinline__ void next(int step) {
    float s[1][kKeys / 8][4], before[1][2];
    turn_.wait();
    begin_transposed<T, QueryTile, KeyTile, kHeadDim>(s[0], q_, along(shared_.k[k_at_.stage]));
    wait_barrier(&shared_.v_full[v_at_.stage], v_at_.parity);
    begin_sum<T>(o_[0], weights_, across<KeyTile>(along(shared_.v[v_at_.stage])));
    if (!turn_.is_last() || step + 1 < work_.steps) turn_.pass();
    wait_products<1>(s[0]);
    release(&shared_.k_empty[k_at_.stage]);
    k_at_.advance();
    if (!kPlain) {
      if (!score_.is_product) score_.apply(s);
      mask(s[0], work_.first_key(step));
    }
    const bool grows = softmax_.weigh(s, before, score_.unit);
    wait_for_keys(step + 1);
    wait_products<0>(o_[0]);
    release(&shared_.v_empty[v_at_.stage]);
    v_at_.advance();
    if (any(kAllLanes, grows)) Softmax<1>::rescale(o_, before);
    round_to_left<T>(s[0], weights_);
  }

  ForwardShared<kHeadDim>& shared_;
  const ForwardWork<kHeadDim>& work_;
  const Score score_;
  const Turn<kHeadDim> turn_;
  unsigned char* const rows_;  // of the queries, and of the output in their place
  const uint64_t q_;
  const int first_query_, row_;  // row_ and the eighth behind it are this thread's
  float o_[1][kHeadDim / 8][4] = {};
  Softmax<1> softmax_;
  uint32_t weights_[kKeys / 16][4];
  Place<Size::kStages> k_at_, v_at_;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardTile<kHeadDim>::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                          const __grid_constant__ TensorMap v, bool packed) {
  ForwardShared<kHeadDim>& shared = shared_as<ForwardShared<kHeadDim>>();
  const ForwardWork<kHeadDim> work(p);
  if (work.is_idle()) return;
  if (threadIdx.x == 0) {
    prefetch_map(q), prefetch_map(k), prefetch_map(v);
    shared.init_barriers();
  }
  sync_threads();
  if (threadIdx.x < kWarpgroup) {
    shrink_registers<ForwardTile<kHeadDim>::kProducerRegisters>();
    if (threadIdx.x < 32 && work.steps > 0) copy_tiles<kHeadDim>(shared, work, q, k, v);
  } else {
    grow_registers<ForwardTile<kHeadDim>::kConsumerRegisters>();
    Rows<T, kHeadDim> rows(p, shared, work);
    rows.attend();
    rows.write(p, packed);
  }
}

LONGROPE_MAX_REGISTERS(attention_sm90_kernel, 168)

template <typename T, int kHeadDim>
void run(const AttentionParams& p, cudaStream_t stream) {
  using Size = ForwardTile<kHeadDim>;
  constexpr size_t kBytes = kBytesOf<ForwardShared<kHeadDim>>;
  const int64_t tiles = ceil_div<int64_t>(p.queries, Size::kRows) * p.heads * p.batch;
  launch("attention_sm90", attention_sm90_kernel<T, kHeadDim>, tiles, Size::kThreads, kBytes,
         stream, p, map_of(p.q, p, p.heads, p.queries, Size::kRows),
         map_of(p.k, p, p.kv_heads, p.keys, Size::kKeys),
         map_of(p.v, p, p.kv_heads, p.keys, Size::kKeys), is_packed(p.out, p));
}

}  // namespace
}  // namespace sm90

void forward_sm90(const AttentionParams& p, cudaStream_t stream) {
  auto run_for = [&](auto type) {
    using T = decltype(type);
    if (p.head_dim <= 64) return sm90::run<T, 64>(p, stream);
    p.head_dim <= 128 ? sm90::run<T, 128>(p, stream) : sm90::run<T, 256>(p, stream);
  };
  p.dtype == DType::kBFloat16 ? run_for(bf16{}) : run_for(f16{});
}

}  // namespace cuda
}  // namespace longrope
