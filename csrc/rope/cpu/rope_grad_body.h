// The gradients of RopeGradParams for one instruction set (no include guard: part of a body).

// Adds A and B of one token and head.
template <bool kInterleaved, typename T, typename Value>
void add_products(const T* x, const T* g, Value* cross, Value* dot, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i;
    const int64_t second = kInterleaved ? 2 * i + 1 : i + pairs;
    const Value x1 = load(x[first]), x2 = load(x[second]);
    const Value g1 = load(g[first]), g2 = load(g[second]);
    cross[i] += x1 * g2 - x2 * g1;
    dot[i] += x1 * g1 + x2 * g2;
  }
}

template <typename T, bool kInterleaved>
void add_block(const RopeParams& p, const RopeTensor& in, const RopeTensor& grad, int64_t row,
               int64_t begin, int64_t count, const RopeScratch& scratch) {
  using Value = typename ValueOf<T>::type;
  const T* x0 = static_cast<const T*>(in.data) + row * in.batch_stride + begin * in.token_stride;
  const T* g0 =
      static_cast<const T*>(grad.data) + row * grad.batch_stride + begin * grad.token_stride;
  for_heads_and_tokens(in, count, [&](int64_t head, int64_t token, int64_t) {
    add_products<kInterleaved>(x0 + head * in.head_stride + token * in.token_stride,
                               g0 + head * grad.head_stride + token * grad.token_stride,
                               static_cast<Value*>(scratch.cross) + token * p.pairs,
                               static_cast<Value*>(scratch.dot) + token * p.pairs, p.pairs);
  });
}

template <typename T, bool kInterleaved>
void rope_grad_typed(const RopeGradParams& params, const RopeScratch& scratch, int64_t begin,
                     int64_t end) {
  using Value = typename ValueOf<T>::type;
  const RopeParams& p = params.forward;
  const int64_t width = 2 * p.pairs + 1,
                blocks = (p.tokens + rope_block_tokens(p) - 1) / rope_block_tokens(p);
  const double sign = p.turn.inv_freq ? 1.0 : -1.0;
  const RopeFrequencies& used = p.turn.inv_freq ? p.turn : p.undo;
  for_items<Value>(p, scratch, begin, end, false, table_slot<Value, kInterleaved>,
                   [&](int64_t row, int64_t block, int64_t first, int64_t count) {
                     std::memset(scratch.cross, 0, count * p.pairs * sizeof(Value));
                     std::memset(scratch.dot, 0, count * p.pairs * sizeof(Value));
                     add_block<T, kInterleaved>(p, p.q, params.grad_q, row, first, count, scratch);
                     add_block<T, kInterleaved>(p, p.k, params.grad_k, row, first, count, scratch);
                     double* partial = params.partial + (row * blocks + block) * width;
                     std::memset(partial, 0, width * sizeof(double));
                     const double factor = factor_of(p, row);
                     double factor_sum = 0;
                     for (int64_t token = 0; token < count; ++token) {
                       const Value* cos = static_cast<const Value*>(scratch.cos) + token * p.pairs;
                       const Value* sin = static_cast<const Value*>(scratch.sin) + token * p.pairs;
                       const Value* cross =
                           static_cast<const Value*>(scratch.cross) + token * p.pairs;
                       const Value* dot = static_cast<const Value*>(scratch.dot) + token * p.pairs;
                       const int64_t position = position_of(p, row, first + token);
                       double* sums = partial + (below_start(used, row, position) ? p.pairs : 0);
                       const double scale = sign * factor * static_cast<double>(position);
                       for (int64_t i = 0; i < p.pairs; ++i) {
                         const double a = cross[i], b = dot[i], c = cos[i], s = sin[i];
                         sums[i] += scale * (a * c - b * s);
                         factor_sum += b * c + a * s;
                       }
                     }
                     partial[2 * p.pairs] = factor_sum;
                   });
}

inline void rope_grad(const RopeGradParams& params, const RopeScratch& scratch, int64_t begin,
                      int64_t end) {
  for_dtype(params.forward.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (params.forward.interleaved) {
      rope_grad_typed<T, true>(params, scratch, begin, end);
    } else {
      rope_grad_typed<T, false>(params, scratch, begin, end);
    }
  });
}
