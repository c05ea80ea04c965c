// Operands of the bfloat16 product of the caller's library, which knows the processor's matrix
// instructions (no include guard: part of a body). A lies in rows, B in pairs of rows,
// [rows / 2][columns][2], as those instructions read them.

constexpr int64_t kPanel = 64;  // keys per panel: one of B stays in the first-level cache

// The product takes whole steps of 32 along the sum.
inline int64_t library_padded(int64_t columns) { return round_up(columns, 32); }

template <typename T>
inline void read_bfloat16(const Tokens<T>& x, int64_t token, int64_t padded, BFloat16* row) {
  if (x.turns()) {
    float values[kMaxHeadDim];
    x.read(token, values);
    store_row(values, row, x.head_dim);
  } else {
    __builtin_memcpy(row, x.data + token * x.token_stride, x.head_dim * sizeof(BFloat16));
  }
  for (int64_t d = x.head_dim; d < padded; ++d) row[d].bits = 0;
}

// Up to kPanel of `left` tokens, and zeros.
template <typename T>
inline void read_panel(const Tokens<T>& x, int64_t first, int64_t left, int64_t padded,
                       BFloat16* rows) {
  const int64_t here = left < kPanel ? left : kPanel;
  for (int64_t i = 0; i < here; ++i) read_bfloat16(x, first + i, padded, rows + i * padded);
  __builtin_memset(rows + here * padded, 0, (kPanel - here) * padded * sizeof(BFloat16));
}

// The transpose of [kPanel, padded] in pairs of rows, [padded / 2][kPanel][2]: pairs move as
// floats.
inline void pack_transposed_pairs(const BFloat16* rows, int64_t padded, BFloat16* pairs) {
  transpose(reinterpret_cast<const float*>(rows), padded / 2, kPanel, padded / 2,
            reinterpret_cast<float*>(pairs), kPanel);
}

// [kPanel, padded] in pairs of rows, [kPanel / 2][padded][2].
inline void pack_pairs(const BFloat16* rows, int64_t padded, BFloat16* pairs) {
  for (int64_t i = 0; i < kPanel; i += 2) {
    const BFloat16* const row = rows + i * padded;
    BFloat16* const pair = pairs + i * padded;
    for (int64_t d = 0; d < padded; ++d) {
      pair[2 * d] = row[d];
      pair[2 * d + 1] = row[padded + d];
    }
  }
}
