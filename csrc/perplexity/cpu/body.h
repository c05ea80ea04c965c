// The body that foreach_isa.h compiles per instruction set: from types as values (kernels.h) to
// the templates.
#include "common/cpu/elements_body.h"
#include "perplexity/cpu/pack_body.h"
#include "perplexity/cpu/tile_body.h"

// Calls f with a null pointer to the element type.
template <class F>
static inline void with_type(DType type, const F& f) {
  switch (type) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

static inline void run_convert_rows(DType from, const MatrixView& matrix, const int64_t* pick,
                                    int64_t first, int64_t count, int64_t columns, DType type,
                                    void* to) {
  with_type(from, [&](auto* source) {
    with_type(type, [&](auto* result) {
      using From = std::remove_pointer_t<decltype(source)>;
      using To = std::remove_pointer_t<decltype(result)>;
      constexpr bool kWide = std::is_same_v<From, double> || std::is_same_v<To, double>;
      constexpr bool kFloat = std::is_same_v<From, float> || std::is_same_v<To, float>;
      if constexpr (std::is_same_v<From, To> || (kFloat && !kWide)) {
        convert_rows<To, From>(matrix, pick, first, count, columns, static_cast<To*>(to));
      }
    });
  });
}

static inline void run_panel_of_columns(DType type, const void* from, int64_t rows, int64_t columns,
                                        int64_t n, void* to) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    panel_of_columns(static_cast<const T*>(from), rows, columns, n, static_cast<T*>(to));
  });
}

static inline void run_panel_of_rows(DType type, const void* from, int64_t rows, int64_t padded,
                                     int64_t columns, int64_t first, int64_t n, void* to) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    panel_of_rows(static_cast<const T*>(from), rows, padded, columns, first, n,
                  static_cast<T*>(to));
  });
}

static inline void run_transpose(DType type, const void* from, int64_t from_ld, int64_t rows,
                                 int64_t columns, void* to, int64_t ld) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    transpose(static_cast<const T*>(from), from_ld, rows, columns, static_cast<T*>(to), ld);
  });
}

static inline void run_softcap_tile(bool wide, void* tile, int64_t m, int64_t n, double softcap) {
  if (wide) return softcap_tile(static_cast<double*>(tile), m, n, softcap);
  softcap_tile(static_cast<float*>(tile), m, n, softcap);
}

static inline void run_add_to_statistics(bool wide, const void* tile, int64_t m, int64_t n,
                                         void* max, void* sum) {
  if (wide) {
    return add_to_statistics(static_cast<const double*>(tile), m, n, static_cast<double*>(max),
                             static_cast<double*>(sum));
  }
  add_to_statistics(static_cast<const float*>(tile), m, n, static_cast<float*>(max),
                    static_cast<float*>(sum));
}

static inline void run_gradient_tile(bool wide, void* tile, int64_t m, int64_t n, const void* max,
                                     const void* log_sum, const void* grad, const int32_t* target,
                                     double softcap) {
  if (wide) {
    return gradient_tile(static_cast<double*>(tile), m, n, static_cast<const double*>(max),
                         static_cast<const double*>(log_sum), static_cast<const double*>(grad),
                         target, softcap);
  }
  gradient_tile(static_cast<float*>(tile), m, n, static_cast<const float*>(max),
                static_cast<const float*>(log_sum), static_cast<const float*>(grad), target,
                softcap);
}

static inline void run_store_gradient(DType type, const void* tile, int64_t m, int64_t n,
                                      void* rows, int64_t ld, void* panel) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using Acc = typename ValueOf<T>::type;
    if constexpr (!std::is_same_v<T, Float16>) {  // never an operand
      store_gradient(static_cast<const Acc*>(tile), m, n, static_cast<T*>(rows), ld,
                     static_cast<T*>(panel));
    }
  });
}

static inline void run_float64_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc,
                                       bool add, const void* a, const void* b, void* c) {
  double_product(m, n, k, lda, ldc, add, static_cast<const double*>(a),
                 static_cast<const double*>(b), static_cast<double*>(c));
}
