// What the forward and the backward of linear cross-entropy share: the arguments with their types,
// blocks of tokens as panels (no include guard: part of a body).

constexpr int64_t kPanel = 64;          // tokens per panel
constexpr int64_t kBlockTokens = 2048;  // tokens packed at a time: bounds the memory

// Elements T, multiplied as Operand: T itself, or float where no product takes T.
template <class T, class Operand>
struct Problem {
  using Real = RealOf<T>;  // of the products' sums

  const LinearNllParams& params;
  const Runtime& runtime;

  // C[m, n] (+)= A[m, k] B[k, n], B a panel of n columns.
  void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add,
                const Operand* a, const Operand* b, Real* c) const {
    if constexpr (std::is_same_v<Operand, double>) {
      multiply_doubles(m, n, k, lda, ldc, add, a, b, c);
    } else if (k > 0) {
      const bool is_float = std::is_same_v<Operand, float>;
      const Product product = is_float ? runtime.float_product : runtime.bfloat16_product;
      product(m, n, k, lda, n, ldc, add, a, b, c);
    } else if (!add) {
      for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, Real{0});
    }
  }

  void end_of_task() const {
    if (runtime.end_of_task) runtime.end_of_task();
  }

  // Whether rows of the weight can be an operand as they lie.
  bool weight_in_place() const {
    return std::is_same_v<T, Operand> && params.weight.column_stride == 1 &&
           params.weight.row_stride >= params.embed;
  }

  // Rows of the weight as they lie; only where weight_in_place().
  const Operand* weight_row(int64_t row) const {
    return static_cast<const Operand*>(params.weight.data) + row * params.weight.row_stride;
  }

  // Rows first .. first + count of a matrix (through the index `pick`, if given) as [count][embed].
  void read_rows(const MatrixView& matrix, const int64_t* pick, int64_t first, int64_t count,
                 Operand* to) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = pick ? pick[first + r] : first + r;
      convert_row(static_cast<const T*>(matrix.data) + row * matrix.row_stride,
                  matrix.column_stride, to + r * params.embed, params.embed);
    }
  }

  // The rows that are not ignored: only these are computed.
  std::vector<int64_t> scored_rows() const {
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < params.rows; ++r) {
      if (params.targets[r] != params.ignore_index) rows.push_back(r);
    }
    return rows;
  }
};

// `count` tokens in panels of kPanel, the last as narrow as whole groups of `group` allow.
struct Panels {
  Panels(int64_t count, int64_t group)
      : count(count),
        panels(ceil_div(count, kPanel)),
        padded(panels ? (panels - 1) * kPanel + round_up(count - (panels - 1) * kPanel, group)
                      : 0) {}
  int64_t width(int64_t panel) const { return std::min(kPanel, padded - panel * kPanel); }
  int64_t tokens(int64_t panel) const { return std::min(kPanel, count - panel * kPanel); }

  int64_t count;
  int64_t panels;
  int64_t padded;
};

// The hidden states of the picked tokens as panels whose k runs over the embedding.
template <class T, class Operand>
inline Buffer<Operand> pack_hidden(const Problem<T, Operand>& problem, const int64_t* pick,
                                   const Panels& panels) {
  const int64_t embed = problem.params.embed;
  Buffer<Operand> packed(panels.padded * embed);
  problem.runtime.for_each(panels.panels, [&](int64_t p) {
    const Buffer<Operand> rows(kPanel * embed);
    problem.read_rows(problem.params.hidden, pick, p * kPanel, panels.tokens(p), rows);
    panel_of_columns<Operand>(rows, panels.tokens(p), embed, panels.width(p),
                              packed + p * kPanel * embed);
  });
  return packed;
}
