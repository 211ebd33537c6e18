// The adapter's options as kernels take them: plain data.
#pragma once

namespace lka {

enum class Activation : int { gelu, gelu_tanh, relu, silu, none };
enum class PrefixMode : int { center_tap, skip, zero };

}  // namespace lka
