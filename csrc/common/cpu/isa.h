// The CPU instruction sets that every op's body is compiled for, and the one in use.
#pragma once

namespace longrope {

// Ordered: each set contains the ones before it.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set that both this processor and this build have.
Isa best_isa();

// The set in use: best_isa(), unless the environment variable LONGROPE_ISA or set_isa() says less.
Isa isa();

// Uses `name` ("scalar", "avx2", "avx512") from now on. Throws std::invalid_argument naming the
// supported sets where the processor or the build lacks it.
void set_isa(const char* name);

const char* isa_name(Isa isa);

}  // namespace longrope
