// The configuration of a launch, in plain C++.
#pragma once

#include <cstdint>

namespace lka::cuda {

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;  // beside what the kernel declares itself
};

}  // namespace lka::cuda
