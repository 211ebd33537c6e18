// Depthwise convolution as functions that Python calls: planned and launched in the order of the
// operators, run by fibers.
#include <string>

#include "cuda/device_code.h"
#include "launches.h"

namespace {

using lka::ConvParams;
using on_fibers::describe;
using on_fibers::keep;
using on_fibers::range_of;
using on_fibers::Runner;
namespace cuda = lka::cuda;

// What a block may have on compute capability 9.0.
constexpr int64_t kMostSharedOf90 = 227 * 1024;

// Runs order(runner) with the memory of a correlation.
template <class Order>
const char* correlate(const ConvParams& call, bool backward, const void* weight, const void* bias,
                      Order order) {
  const int64_t bytes = on_fibers::size_of(call.storage);
  Runner runner(call.storage);
  runner.add(range_of("input", call.input, call.batch, call.channels, bytes, backward));
  runner.add(range_of("output", call.output, call.batch, call.channels, bytes, !backward));
  runner.add("weight", weight, call.channels * call.kernel_h * call.kernel_w * bytes, false);
  runner.add("bias", bias, call.channels * bytes, false);
  return runner.said(order(runner));
}

// Runs order(runner) with the memory of a weight gradient.
template <class Order>
const char* weight_gradient(const ConvParams& call, void* grad_weight, void* grad_bias,
                            Order order) {
  const int64_t bytes = on_fibers::size_of(call.storage);
  Runner runner(call.storage);
  runner.add(range_of("input", call.input, call.batch, call.channels, bytes, false));
  runner.add(range_of("grad_output", call.output, call.batch, call.channels, bytes, false));
  const int64_t taps = call.channels * call.kernel_h * call.kernel_w;
  runner.add("grad_weight", grad_weight, taps * bytes, true);
  runner.add("grad_bias", grad_bias, call.channels * bytes, true);
  return runner.said(order(runner));
}

}  // namespace

// Each returns what went wrong, or an empty text.
extern "C" const char* toeplitz_correlate(const ConvParams* call, bool backward, const void* weight,
                                          const void* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    return cuda::run_toeplitz_correlate(*call, backward, weight, bias, runner);
  });
}

extern "C" const char* dense_correlate(const ConvParams* call, bool backward, const void* weight,
                                       const void* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    return cuda::run_dense_correlate(*call, backward, weight, bias, runner);
  });
}

extern "C" const char* plane_correlate(const ConvParams* call, bool backward, const void* weight,
                                       const void* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    return cuda::run_plane_correlate(*call, backward, weight, bias, runner);
  });
}

// Images that a warp has side by side, of the input's or output's and of a weight gradient's; 0
// where the form refuses, -1 where a slot would be taken for one of another image.
extern "C" int plane_images(const ConvParams* call, const char* direction, int multiprocessors) {
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::PlaneWeightGradientParams p;
    const cuda::Plan plan = cuda::plan_plane_weight_gradient(*call, multiprocessors, p);
    return plan.refusal == nullptr ? p.images : 0;
  }
  cuda::PlaneCorrelateParams p;
  const cuda::Plan plan =
      cuda::plan_plane_correlate(cuda::correlation_of(*call, wanted == "backward_input"), p);
  if (plan.refusal != nullptr) return 0;
  for (int slot = 0; slot < p.images * p.band_rows + cuda::PlaneCorrelate::kSlots; ++slot)
    if (slot * p.inverse_rows >> 16 != slot / p.band_rows) return -1;
  return p.images;
}

extern "C" const char* plane_weight_gradient(const ConvParams* call, int multiprocessors,
                                             void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_plane_weight_gradient(*call, multiprocessors, grad_weight, grad_bias, runner);
  });
}

extern "C" const char* dense_weight_gradient(const ConvParams* call, int multiprocessors,
                                             void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_dense_weight_gradient(*call, multiprocessors, grad_weight, grad_bias, runner);
  });
}

// The form that the operators would take.
extern "C" const char* tensor_core_correlate(const ConvParams* call, bool backward,
                                             const void* weight, const void* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    return cuda::run_tensor_core_correlate(*call, backward, weight, bias, runner);
  });
}

extern "C" const char* tensor_core_weight_gradient(const ConvParams* call, int multiprocessors,
                                                   void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_tensor_core_weight_gradient(*call, multiprocessors, grad_weight, grad_bias,
                                                 runner);
  });
}

// Where channels are neighbours, `weight` is in the order (kW, kH, C).
extern "C" const char* float_correlate(const ConvParams* call, bool backward, const float* weight,
                                       const float* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    const auto taps = [&](bool) { return weight; };
    return cuda::run_float_correlate(*call, backward, taps, bias, runner);
  });
}

extern "C" const char* toeplitz_weight_gradient(const ConvParams* call, int multiprocessors,
                                                void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_toeplitz_weight_gradient(*call, multiprocessors, grad_weight, grad_bias,
                                              runner);
  });
}

extern "C" const char* float_weight_gradient(const ConvParams* call, int multiprocessors,
                                             void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_float_weight_gradient(*call, multiprocessors, grad_weight, grad_bias, runner);
  });
}

extern "C" const char* fft_correlate(const ConvParams* call, bool backward, const void* weight,
                                     const void* bias) {
  return correlate(*call, backward, weight, bias, [&](Runner& runner) {
    return cuda::run_fft_correlate(*call, backward, weight, bias, runner);
  });
}

extern "C" const char* fft_weight_gradient(const ConvParams* call, int multiprocessors,
                                           void* grad_weight, void* grad_bias) {
  return weight_gradient(*call, grad_weight, grad_bias, [&](Runner& runner) {
    return cuda::run_fft_weight_gradient(*call, multiprocessors, kMostSharedOf90, grad_weight,
                                         grad_bias, runner);
  });
}

extern "C" const char* plan(const ConvParams* call, const char* direction, int multiprocessors,
                            int64_t* shape) {
  cuda::Plan plan;
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::WeightGradientParams p;
    plan = cuda::plan_weight_gradient(*call, multiprocessors, p);
  } else {
    cuda::CorrelateParams p;
    plan = cuda::plan_correlate(cuda::correlation_of(*call, wanted == "backward_input"), p);
  }
  return describe(plan, shape);
}

extern "C" const char* dense_plan(const ConvParams* call, const char* direction,
                                  int multiprocessors, int64_t* shape) {
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::DenseWeightGradientParams p;
    return describe(cuda::plan_dense_weight_gradient(*call, multiprocessors, p), shape);
  }
  cuda::DenseCorrelateParams p;
  return describe(
      cuda::plan_dense_correlate(cuda::correlation_of(*call, wanted == "backward_input"), p),
      shape);
}

extern "C" const char* fft_plan(const ConvParams* call, const char* direction, int multiprocessors,
                                int64_t* shape) {
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::FftWeightGradientParams p;
    return describe(cuda::plan_fft_weight_gradient(*call, multiprocessors, kMostSharedOf90, p),
                    shape);
  }
  cuda::FftCorrelateParams p;
  return describe(cuda::plan_fft_correlate(*call, wanted == "backward_input", p), shape);
}

extern "C" const char* why_device_cannot(int capability, int compiled, bool tensor_cores) {
  return keep(cuda::why_device_cannot(cuda::DeviceCode{capability, compiled}, tensor_cores));
}
