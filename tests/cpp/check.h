// Checks of the C++ tests: a failed one says where and what, and the program goes on and fails.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "common/cpu/isa.h"

namespace check {

inline int failures = 0;

// What main() returns.
inline int result() {
  std::printf("%s, %d failures\n", failures == 0 ? "passed" : "failed", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

inline void fail(const char* file, int line, const char* what) {
  if (++failures > 20) return;  // the first ones tell enough
  std::printf("%s:%d: [%s] %s\n", file, line, longrope::isa_name(longrope::isa()), what);
}

// Runs body once for every instruction set that this processor has.
template <typename Body>
void for_each_isa(const Body& body) {
  for (int i = 0; i <= static_cast<int>(longrope::best_isa()); ++i) {
    longrope::set_isa(longrope::isa_name(static_cast<longrope::Isa>(i)));
    body();
  }
}

}  // namespace check

#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)

// Fails also where one of the two is NaN.
#define CHECK_NEAR(got, expected, tolerance)                                                     \
  do {                                                                                           \
    const double got_ = (got), expected_ = (expected), tolerance_ = (tolerance);                 \
    if (!(std::fabs(got_ - expected_) <= tolerance_)) {                                          \
      char what_[256];                                                                           \
      std::snprintf(what_, sizeof(what_), "%s: got %.9g, expected %.9g within %.3g", #got, got_, \
                    expected_, tolerance_);                                                      \
      check::fail(__FILE__, __LINE__, what_);                                                    \
    }                                                                                            \
  } while (false)
