// The adapter step after step over the whole batch, its convolution by the depthwise kernels: what
// serves where these use Fourier transforms, whose weights' spectra are then made once for all
// images, or sum more than 7 taps in a row in place, and where there are too few images for the
// threads.
#pragma once

#include "adapter_params.h"
#include "depthwise_planner.h"

namespace lka::cpu {

// The convolution as that of a channels_last map, in the arithmetic type.
ConvParams adapter_convolution(const AdapterParams& p);

// Whether to take steps where depthwise kernels of this name would serve. Looks at sizes only, as
// the two ways round differently.
bool takes_steps(const AdapterParams& p, const char* kernel_name);

// Parts of the batch whose gradients of the projections are summed apart.
int64_t parts_of_steps(const AdapterParams& p, int64_t most);

// For both, p.conv is (rank, kernel_h·kernel_w) T and p.conv_bias is null if there is none.
void run_forward_steps(const AdapterParams& p, const AdapterKernels& k,
                       PlannedConvolution& planned);

// Gradients of the convolution's weights and bias go to grad_conv and grad_conv_bias, T.
void run_backward_steps(const AdapterParams& p, const AdapterGradients& g, const AdapterKernels& k,
                        PlannedConvolution& input, PlannedWeightGradient& weight, void* grad_conv,
                        void* grad_conv_bias);

}  // namespace lka::cpu
