// The choice of the instruction set: what set_isa takes, and that dispatch follows it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "common/cpu/isa.h"
#define LONGROPE_BODY "isa_body.h"
#include "common/cpu/foreach_isa.h"

namespace {

std::string refusal(const char* name) {
  try {
    longrope::set_isa(name);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  // The environment variable is read at the first use.
  setenv("LONGROPE_ISA", "scalar", 1);
  CHECK(longrope::isa() == longrope::Isa::kScalar);

  int bytes_before = 0;
  check::for_each_isa([&] {
    const int bytes = LONGROPE_DISPATCH(vector_bytes)();
    CHECK(bytes > bytes_before);  // each set is wider than the one before
    bytes_before = bytes;
    float x[37], y[37];
    for (int i = 0; i < 37; ++i) x[i] = y[i] = static_cast<float>(i);
    LONGROPE_DISPATCH(twice)(x, 37);
    for (int i = 0; i < 37; ++i) CHECK_NEAR(x[i], 2 * y[i], 0);
  });
  CHECK(longrope::isa() == longrope::best_isa());

  CHECK(refusal("scalar").empty());
  CHECK(refusal("sse9").find("expected one of scalar") != std::string::npos);
  CHECK(refusal("sse9").find("got \"sse9\"") != std::string::npos);
  CHECK(!refusal("").empty());
  CHECK(longrope::isa() == longrope::Isa::kScalar);  // a refused name changes nothing
  if (longrope::best_isa() < longrope::Isa::kAvx512) CHECK(!refusal("avx512").empty());
  return check::result();
}
