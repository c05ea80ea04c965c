// The forward pass where few rows share the keys, as in decoding (no include guard: part of a
// body). Nothing is packed: every key and value is read from where it lies, once, widened in
// registers and used by all rows. Such passes wait for memory, so while the products of the keys
// are computed the block's values are fetched, and meanwhile of these the next block's keys. Keys
// that turn (by offsets: attention.h) are widened and turned into a block of floats first.

// At most, of one key/value head. On Zen 4 with AVX2 this is 1.2 to 1.7 times as fast as packing at
// 8 and 16 rows, 1.1 to 1.2 times at 32, and even from 48 on; at 64 rows that turn, 1.1 times.
constexpr int64_t kStreamedRows = 32;
constexpr int64_t kStreamedRowsThatTurn = 64;
// Where the library multiplies bfloat16, twice as fast as float32 or more. Not measured.
constexpr int64_t kStreamedRowsByLibrary = 16;

template <typename T>
struct StreamedProducts {
  static_assert(!std::is_same_v<T, double>);
  static constexpr int64_t kStep = 1;
  static constexpr int64_t kKeys = 128;  // whose keys and values fit a second-level cache
  static constexpr int64_t kTileRows = 4;

  int64_t head_dim, padded;  // padded: to whole chunks
  Chunks<T> chunks;
  float* q;  // [rows, padded], arranged; so is the output
  float* s;  // [kTileRows, kKeys]: scores, then probabilities
  float* row;
  RowState<float> state;
  const Tokens<T>* values = nullptr;
  const T* keys = nullptr;  // of the block
  int64_t key_stride = 0;

  // Where keys turn.
  Chunks<float> turned_chunks;             // of rows that were turned before
  Chunks<float> pair_chunks, rest_chunks;  // of rows that turn in registers
  bool turns, in_registers = false;
  float *queries, *turned;       // [rows, head_dim]; [kOffsetKeys, head_dim]
  float *query_cos, *query_sin;  // [pairs]
  AttentionTable table{};
  const float *cos = nullptr, *sin = nullptr;  // of the table, for the block
  int64_t rows = 0, first_row = 0, group = 1;

  StreamedProducts(const AttentionParams& p, const AttentionPlan& plan, void* memory, size_t* bytes)
      : head_dim(p.head_dim),
        padded(round_up(p.head_dim, int64_t{Chunk<T>::kElements})),
        chunks(p.head_dim),
        turned_chunks(p.head_dim),
        pair_chunks(pairs_of(p)),
        rest_chunks(p.head_dim - 2 * pairs_of(p)),
        turns(p.tiers) {
    Carver carver(memory);
    q = carver.take<float>(plan.block_rows * padded);
    s = carver.take<float>(kTileRows * kKeys);
    row = carver.take<float>(head_dim);
    state.carve(carver, plan.block_rows, padded);
    const int64_t turning = turns ? head_dim : 0;
    queries = carver.take<float>(plan.block_rows * turning);
    turned = carver.take<float>(kOffsetKeys * turning);
    query_cos = carver.take<float>(turning);
    query_sin = carver.take<float>(turning);
    if (bytes) *bytes = carver.bytes();
  }

  // At most, from `first` on: those that turn do so by one part of the table.
  static int64_t block_keys(const AttentionTable& table, int64_t first) {
    if (!table.offsets) return kKeys;
    const int64_t start = table.offsets->start_keys;
    return first < start && start - first < kOffsetKeys ? start - first : kOffsetKeys;
  }

  void pack_queries(const AttentionParams& p, const Task& t, int64_t count, float sign) {
    rows = count;
    first_row = t.rows.begin;
    group = t.group;
    for (int64_t i = 0; i < rows; ++i) {
      float* const x = turns ? queries + i * head_dim : row;
      if (state.range[i].begin < state.range[i].end) {
        const RowIndex index(p, t, i);
        load_row(index.in<const T>(p.q), x, head_dim);
        for (int64_t d = 0; d < head_dim; ++d) x[d] *= sign;
      } else {
        for (int64_t d = 0; d < head_dim; ++d) x[d] = 0;
      }
      if (!turns) chunks.arrange(x, q + i * padded);
    }
  }

  void pack_keys(const Tokens<T>& k, const Tokens<T>& v, int64_t first, int64_t count) {
    values = &v;
    keys = k.data + first * k.token_stride;
    key_stride = k.token_stride;
    if (!turns) return;
    table = k.table;
    const bool below = first < table.offsets->start_keys;
    in_registers = rows <= kTileRows && turns_in_registers(table, head_dim);
    turn_queries(first, below);
    cos = static_cast<const float*>(table.cos) + below * kOffsetKeys * table.pairs;
    sin = static_cast<const float*>(table.sin) + below * kOffsetKeys * table.pairs;
    for (int64_t j = 0; !in_registers && j < count; ++j) {
      turn_key(keys + j * key_stride, table, cos + j * table.pairs, sin + j * table.pairs, head_dim,
               turned + j * head_dim);
    }
  }

  float* output(int64_t r) const {
    chunks.restore(state.o + r * padded, row);
    return row;
  }

  void add_block(int64_t r, int64_t count, Range block, const Softmax<float>& softmax) const {
    for (int64_t i = 0; i < count; i += kTileRows) {
      switch (count - i) {
        case 1:
          add_rows<1>(r + i, block, softmax);
          break;
        case 2:
          add_rows<2>(r + i, block, softmax);
          break;
        case 3:
          add_rows<3>(r + i, block, softmax);
          break;
        default:
          add_rows<4>(r + i, block, softmax);
      }
    }
  }

 private:
  // Of every table.
  static int64_t pairs_of(const AttentionParams& p) { return p.tiers ? p.tiers->keys[0].pairs : 0; }

  // By their phases less those of the block's first key.
  void turn_queries(int64_t first, bool below) const {
    const AttentionOffsets& offsets = *table.offsets;
    const int64_t pairs = table.pairs;
    const uint64_t* const turns = offsets.key_turns + below * pairs;
    const uint64_t position =
        static_cast<uint64_t>(offsets.position) + static_cast<uint64_t>(first);
    const float factor = static_cast<float>(offsets.factor);
    int64_t last = -1;
    for (int64_t i = 0; i < rows; ++i) {
      if (state.range[i].begin >= state.range[i].end) continue;
      const int64_t query = (first_row + i) / group;
      if (query != last) {
        const uint64_t* const phases = offsets.query_phases + query * pairs;
#pragma omp simd
        for (int64_t pair = 0; pair < pairs; ++pair) {
          float c, s;
          cos_sin(phases[pair] - position * turns[pair], c, s);
          query_cos[pair] = factor * c;
          query_sin[pair] = factor * s;
        }
        last = query;
      }
      float* const turned_query = in_registers ? q + i * padded : row;
      __builtin_memcpy(turned_query, queries + i * head_dim, head_dim * sizeof(float));
      rotate_row(turned_query, query_cos, query_sin, pairs, table.interleaved);
      if (!in_registers) turned_chunks.arrange(row, q + i * padded);
    }
  }

  // So many sums hide the latency of the multiply-add and stay in registers.
  template <int kRows, typename E>
  static constexpr int kTileVectors =
      kRows == 1                                              ? 8
      : kRows == 4 || (kRows == 3 && Chunk<E>::kVectors == 2) ? (LONGROPE_ISA_BYTES == 64 ? 4 : 2)
                                                              : 4;

  // Calls visit(first key, the keys) for every tile of visible keys, whose values it fetches. The
  // last tile repeats its last key.
  template <int kTileKeys, typename Visit>
  void for_tiles(int64_t r, Range here, const T* v, const Visit& visit) const {
    for (int64_t j = here.begin; j < here.end; j += kTileKeys) {
      int64_t at[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) {
        at[i] = j + i < here.end ? j + i : here.end - 1;
        if (r == 0) fetch_row(v + at[i] * values->token_stride, head_dim * sizeof(T));
      }
      visit(j, at);
    }
  }

  // q . k for the visible keys of a block of keys, [tokens, stride].
  template <int kRows, typename E>
  void score(const Chunks<E>& row_chunks, const E* k, int64_t stride, int64_t r, Range here,
             const T* v) const {
    constexpr int kTileKeys = kTileVectors<kRows, E>;
    for_tiles<kTileKeys>(r, here, v, [&](int64_t j, const int64_t (&at)[kTileKeys]) {
      const E* tile[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) tile[i] = k + at[i] * stride;
      streamed_scores<kRows, kTileKeys>(row_chunks, q + r * padded, padded, tile, s + j, kKeys);
    });
  }

  template <int kRows>
  void score_turning(int64_t r, Range here, const T* v) const {
    // So few that both halves of them, the sums and the addresses of their rows stay in registers.
    constexpr int kTileKeys = LONGROPE_ISA_BYTES == 64 || kRows == 1 ? 4 : 2;
    for_tiles<kTileKeys>(r, here, v, [&](int64_t j, const int64_t (&at)[kTileKeys]) {
      const T* tile[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) tile[i] = keys + at[i] * key_stride;
      turned_scores<kRows, kTileKeys>(pair_chunks, rest_chunks, table.pairs, q + r * padded, padded,
                                      tile, cos + j * table.pairs, sin + j * table.pairs, s + j,
                                      kKeys);
    });
  }

  template <int kRows>
  void add_rows(int64_t r, Range block, const Softmax<float>& softmax) const {
    const Range here = group_range(state.range + r, kRows, block);
    if (here.begin >= here.end) return;
    const int64_t stride = values->token_stride, count = here.end - here.begin;
    const T* const v = values->data + block.begin * stride;
    if (!turns) {
      score<kRows>(chunks, keys, key_stride, r, here, v);
    } else if (in_registers) {
      score_turning<kRows>(r, here, v);
    } else {
      score<kRows>(turned_chunks, static_cast<const float*>(turned), head_dim, r, here, v);
    }
    for (int i = 0; i < kRows; ++i) {
      softmax(s + i * kKeys, block_range(state.range[r + i], block), here, state.m[r + i],
              state.l[r + i], state.alpha[r + i], s + i * kKeys);
    }
    const char* const next =
        reinterpret_cast<const char*>(keys + (block.end - block.begin) * key_stride);
    const auto add = [&](auto tile_chunks, int64_t c, int64_t at) {
      streamed_values<kRows, decltype(tile_chunks)::value>(
          v + here.begin * stride + at, stride, count, s + here.begin, kKeys,
          state.o + r * padded + c * Chunk<T>::kElements, padded, state.alpha + r,
          r == 0 ? next + at * count * static_cast<int64_t>(sizeof(T)) : nullptr);
    };
    add_chunks<kTileVectors<kRows, T> / Chunk<T>::kVectors>(0, add);
    if (chunks.overlap > 0) add(std::integral_constant<int, 1>(), chunks.whole, chunks.last);
  }

  // Calls add(chunks of the tile, the first, its element) for all whole chunks, in tiles of as many
  // as there are.
  template <int kTileChunks, typename Add>
  void add_chunks(int64_t c, const Add& add) const {
    for (; c + kTileChunks <= chunks.whole; c += kTileChunks) {
      add(std::integral_constant<int, kTileChunks>(), c, c * Chunk<T>::kElements);
    }
    if constexpr (kTileChunks > 1) add_chunks<kTileChunks / 2>(c, add);
  }
};
