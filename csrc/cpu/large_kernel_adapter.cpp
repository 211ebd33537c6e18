// Launchers of the fused adapter on the CPU: tensors to params, packed weights, images to torch's
// thread pool.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../stable.h"
#include "adapter_params.h"
#include "kernel_table.h"
#include "operators.h"
#include "rounding.h"
#include "scratch.h"

namespace lka::cpu {
namespace {

// Parts of the batch whose weight gradients are summed apart: a constant, so that the bits of the
// result do not depend on the number of threads.
constexpr int64_t kMaxParts = 16;
// Tokens that one task of a projection takes when a batch has fewer images than there are threads.
constexpr int64_t kTokensPerTask = 96;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "none", "unknown activation ", name);
  return Activation::none;
}

PrefixMode prefix_mode_of(const std::string& name) {
  if (name == "skip") return PrefixMode::skip;
  if (name == "zero") return PrefixMode::zero;
  STD_TORCH_CHECK(name == "center_tap", "unknown prefix_mode ", name);
  return PrefixMode::center_tap;
}

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, what); }

// Weights as dense tensors of x's dtype, and their packed forms.
struct Weights {
  Tensor down, down_bias, conv, conv_bias, up, up_bias;
  bool has_down_bias, has_conv_bias, has_up_bias;
};

Weights dense_weights(const Tensor& x, const Tensor& down, const std::optional<Tensor>& down_bias,
                      const Tensor& conv, const std::optional<Tensor>& conv_bias, const Tensor& up,
                      const std::optional<Tensor>& up_bias) {
  const auto dense = [&](const Tensor& t) {
    check(t.scalar_type() == x.scalar_type(), "weights must have the dtype of x");
    return torch::stable::contiguous(t);
  };
  Weights w;
  w.down = dense(down);
  w.conv = dense(conv);
  w.up = dense(up);
  w.has_down_bias = down_bias.has_value();
  w.has_conv_bias = conv_bias.has_value();
  w.has_up_bias = up_bias.has_value();
  if (w.has_down_bias) w.down_bias = dense(*down_bias);
  if (w.has_conv_bias) w.conv_bias = dense(*conv_bias);
  if (w.has_up_bias) w.up_bias = dense(*up_bias);
  return w;
}

// Reads weights of any storage type.
struct Reader {
  Storage storage;
  const void* data;
  Reader(const Tensor& t, Storage s) : storage(s), data(t.data_ptr()) {}
  double operator()(int64_t i) const { return load_rounded(storage, data, i); }
};

const AdapterKernels& choose(Storage storage, int64_t rank) {
  const AdapterKernels &full = kernels(storage).adapter_full, &half = kernels(storage).adapter_half;
  const int64_t idle_full = round_up(rank, full.lanes) - rank;
  return idle_full >= half.lanes ? half : full;
}

AdapterParams make_params(const Tensor& x, const Weights& w, const std::optional<Tensor>& seed,
                          int64_t height, int64_t width, int64_t num_prefix_tokens,
                          const std::string& prefix_mode, int64_t dilation,
                          const std::string& activation, const std::string& activation_position,
                          double dropout_p, double scale) {
  AdapterParams p = {};
  p.storage = storage_of(x, "x");
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.num_prefix_tokens = num_prefix_tokens;
  p.height = height;
  p.width = width;
  check(p.tokens == num_prefix_tokens + height * width, "x must have P + H·W tokens");
  p.rank = w.down.size(0);
  check(w.down.size(1) == p.dim && w.up.size(0) == p.dim && w.up.size(1) == p.rank &&
            w.conv.size(0) == p.rank && w.conv.size(1) == 1,
        "weights must be (r, C), (r, 1, kH, kW) and (C, r)");
  p.kernel_h = w.conv.size(2);
  p.kernel_w = w.conv.size(3);
  p.dilation = dilation;
  p.activation = activation_of(activation);
  p.activate_before = activation_position != "post";
  p.activate_after = activation_position != "pre";
  p.prefix_mode = prefix_mode_of(prefix_mode);
  p.scale = scale;
  p.dropout = seed.has_value() && dropout_p > 0;
  if (p.dropout) {
    p.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    const double threshold = std::floor(dropout_p * 4294967296.0);
    p.drop_threshold = uint64_t(std::min(threshold, 4294967296.0));
    p.keep_factor = dropout_p >= 1.0 ? 0.0 : 1.0 / (1.0 - dropout_p);
  }
  const AdapterKernels& k = choose(p.storage, p.rank);
  p.lanes = k.lanes;
  p.rank_blocks = (p.rank + p.lanes - 1) / p.lanes;
  p.rank_padded = p.rank_blocks * p.lanes;
  p.dim_padded = round_up(p.dim, k.wide_lanes);
  p.pad_top = dilation * (p.kernel_h - 1) / 2;
  p.pad_left = dilation * (p.kernel_w - 1) / 2;
  p.buffer_rows = height + dilation * (p.kernel_h - 1);
  p.buffer_columns = width + dilation * (p.kernel_w - 1);
  return p;
}

// Lays packed arrays one after the other, each on a cache line of its own.
template <class T>
class Packer {
 public:
  explicit Packer(T* data) : next_(data) {}

  // [rank block][inner][V] from element(rank index, inner index).
  template <class F>
  const T* blocks(const AdapterParams& p, int64_t inner, F element) {
    T* out = take(p.rank_padded * inner);
    const int64_t lanes = p.lanes;
    for (int64_t block = 0; block < p.rank_blocks; ++block)
      for (int64_t i = 0; i < inner; ++i)
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t k = block * lanes + l;
          out[(block * inner + i) * lanes + l] = k < p.rank ? T(element(k, i)) : T(0);
        }
    return out;
  }

  // [rows][columns padded] from element(row, column).
  template <class F>
  const T* rows(int64_t rows, int64_t columns, int64_t padded, F element) {
    T* out = take(rows * padded);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < padded; ++c)
        out[r * padded + c] = c < columns ? T(element(r, c)) : T(0);
    return out;
  }

 private:
  T* take(int64_t count) {
    T* piece = next_;
    next_ += round_up(count, 64 / sizeof(T));
    return piece;
  }
  T* next_;
};

int64_t packed_elements(const AdapterParams& p) {
  return 2 * (p.rank_padded * p.dim + p.rank * p.dim_padded) +
         2 * p.rank_padded * p.kernel_h * p.kernel_w + 4 * p.rank_padded + 2 * p.dim_padded +
         16 * 16;
}

template <class T>
void pack_forward(AdapterParams& p, const Weights& w, Packer<T>& packer) {
  const Storage s = p.storage;
  const Reader down(w.down, s), conv(w.conv, s), up(w.up, s);
  const int64_t taps = p.kernel_h * p.kernel_w;
  p.down_in = packer.blocks(p, p.dim, [&](int64_t k, int64_t c) { return down(k * p.dim + c); });
  p.conv = packer.blocks(p, taps, [&](int64_t k, int64_t i) { return conv(k * taps + i); });
  p.up_out = packer.rows(p.rank, p.dim, p.dim_padded,
                         [&](int64_t k, int64_t c) { return p.scale * up(c * p.rank + k); });
  const auto bias = [&](const Tensor& t, bool present, int64_t i) {
    return present ? load_rounded(s, t.data_ptr(), i) : 0.0;
  };
  p.down_bias = packer.rows(1, p.rank, p.rank_padded, [&](int64_t, int64_t k) {
    return bias(w.down_bias, w.has_down_bias, k);
  });
  p.conv_bias = packer.rows(1, p.rank, p.rank_padded, [&](int64_t, int64_t k) {
    return bias(w.conv_bias, w.has_conv_bias, k);
  });
  p.up_bias = packer.rows(1, p.dim, p.dim_padded, [&](int64_t, int64_t c) {
    return p.scale * bias(w.up_bias, w.has_up_bias, c);
  });
}

template <class T>
void pack_backward(const AdapterParams& p, const Weights& w, Packer<T>& packer,
                   AdapterGradients& g) {
  const Storage s = p.storage;
  const Reader down(w.down, s), conv(w.conv, s), up(w.up, s);
  const int64_t taps = p.kernel_h * p.kernel_w;
  g.up_in =
      packer.blocks(p, p.dim, [&](int64_t k, int64_t c) { return p.scale * up(c * p.rank + k); });
  g.down_out = packer.rows(p.rank, p.dim, p.dim_padded,
                           [&](int64_t k, int64_t c) { return down(k * p.dim + c); });
  g.conv_flipped =
      packer.blocks(p, taps, [&](int64_t k, int64_t i) { return conv(k * taps + taps - 1 - i); });
}

void run_forward(const AdapterParams& p, const AdapterKernels& k, int64_t element) {
  const size_t scratch_bytes = size_t(k.scratch_elements(p) * element);
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const double work = double(p.tokens) * double(p.rank_padded) *
                      double(2 * p.dim + p.kernel_h * p.kernel_w) / double(p.lanes);
  if (p.batch >= threads || work < 50000.0) {
    const int64_t grain = std::max<int64_t>(1, int64_t(20000.0 / (work + 1)));
    torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
      void* scratch = task_scratch().get(scratch_bytes);
      for (int64_t image = begin; image < end; ++image) {
        k.down(p, image, 0, p.tokens, scratch);
        k.convolve(p, image, scratch);
        k.up(p, image, 0, p.tokens, scratch);
      }
    });
    return;
  }
  // Fewer images than threads: step by step, tokens side by side.
  const int64_t per_image = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
  const auto over_tokens = [&](auto step) {
    torch::stable::parallel_for(0, p.batch * per_image, 1, [&](int64_t begin, int64_t end) {
      void* scratch = task_scratch().get(scratch_bytes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % per_image * kTokensPerTask;
        step(p, task / per_image, first, std::min(first + kTokensPerTask, p.tokens), scratch);
      }
    });
  };
  over_tokens(k.down);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    void* scratch = task_scratch().get(scratch_bytes);
    for (int64_t image = begin; image < end; ++image) k.convolve(p, image, scratch);
  });
  over_tokens(k.up);
}

// Sum the parts in order and lay the result out as the parameter is.
template <class T>
void reduce_parts(const AdapterParams& p, const AdapterGradients& g, int64_t offset, int64_t rows,
                  int64_t columns, double factor, Tensor& out,
                  int64_t (*at)(const AdapterParams&, int64_t, int64_t)) {
  const T* parts = static_cast<const T*>(g.parts);
  void* data = out.data_ptr();
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, 4096 / (columns + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          for (int64_t c = 0; c < columns; ++c) {
            const int64_t index = offset + at(p, r, c);
            T sum = 0;
            for (int64_t part = 0; part < g.num_parts; ++part)
              sum += parts[part * g.part_elements + index];
            store_rounded(T(sum * factor), p.storage, data, r * columns + c);
          }
      });
}

int64_t at_block(const AdapterParams& p, int64_t k, int64_t inner, int64_t inner_size) {
  return (k / p.lanes * inner_size + inner) * p.lanes + k % p.lanes;
}

template <class T>
void reduce_all(const AdapterParams& p, const AdapterGradients& g, Tensor* grads,
                const std::vector<bool>& mask) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const auto down_at = [](const AdapterParams& q, int64_t k, int64_t c) {
    return at_block(q, k, c, q.dim);
  };
  const auto conv_at = [](const AdapterParams& q, int64_t k, int64_t i) {
    return at_block(q, k, i, q.kernel_h * q.kernel_w);
  };
  const auto up_at = [](const AdapterParams& q, int64_t c, int64_t k) {
    return at_block(q, k, c, q.dim);
  };
  const auto vector_at = [](const AdapterParams&, int64_t k, int64_t) { return k; };
  int64_t offset = 0;
  if (mask[1]) reduce_parts<T>(p, g, offset, p.rank, p.dim, 1.0, grads[1], down_at);
  offset += p.rank_padded * p.dim;
  if (mask[2]) reduce_parts<T>(p, g, offset, p.rank, 1, 1.0, grads[2], vector_at);
  offset += p.rank_padded;
  if (mask[3]) reduce_parts<T>(p, g, offset, p.rank, taps, 1.0, grads[3], conv_at);
  offset += p.rank_padded * taps;
  if (mask[4]) reduce_parts<T>(p, g, offset, p.rank, 1, 1.0, grads[4], vector_at);
  offset += p.rank_padded;
  if (mask[5]) reduce_parts<T>(p, g, offset, p.dim, p.rank, p.scale, grads[5], up_at);
  offset += p.rank_padded * p.dim;
  if (mask[6]) reduce_parts<T>(p, g, offset, p.dim, 1, p.scale, grads[6], vector_at);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> large_kernel_adapter_forward(
    const Tensor& x_any, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& seed, int64_t height, int64_t width, int64_t num_prefix_tokens,
    const std::string& prefix_mode, int64_t dilation, const std::string& activation,
    const std::string& activation_position, double dropout_p, double scale) {
  const Tensor x = torch::stable::contiguous(x_any);
  const Weights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterParams p = make_params(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                                activation, activation_position, dropout_p, scale);
  const bool wide = p.storage == Storage::float64;
  const ScalarType accumulation = wide ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty(x, {p.batch, p.tokens, p.dim}, x.scalar_type());
  Tensor z = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
  Tensor c = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
  if (y.numel() == 0) return {y, z, c};
  Tensor dense_residual;
  if (residual.has_value()) {
    check(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
    dense_residual = torch::stable::contiguous(*residual);
    p.residual = dense_residual.data_ptr();
  }
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.z = z.data_ptr();
  p.c = c.data_ptr();
  const int64_t element = wide ? 8 : 4;
  void* packed = call_scratch().get(size_t(packed_elements(p) * element));
  if (wide) {
    Packer<double> packer(static_cast<double*>(packed));
    pack_forward(p, w, packer);
  } else {
    Packer<float> packer(static_cast<float*>(packed));
    pack_forward(p, w, packer);
  }
  run_forward(p, choose(p.storage, p.rank), element);
  return {y, z, c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_adapter_backward(
    const Tensor& grad_output_any, const Tensor& x_any, const Tensor& z, const Tensor& c,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const Tensor& conv_weight,
    const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& seed, int64_t height,
    int64_t width, int64_t num_prefix_tokens, const std::string& prefix_mode, int64_t dilation,
    const std::string& activation, const std::string& activation_position, double dropout_p,
    double scale, const std::vector<bool>& output_mask) {
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor grad_output = torch::stable::contiguous(grad_output_any);
  check(grad_output.scalar_type() == x.scalar_type(), "grad_output must have the dtype of x");
  const Weights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterParams p = make_params(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                                activation, activation_position, dropout_p, scale);
  const ScalarType dtype = x.scalar_type();
  Tensor grads[7];
  const auto want = [&](int i, std::initializer_list<int64_t> sizes) {
    grads[i] = output_mask[size_t(i)] ? empty(x, sizes, dtype) : empty(x, {0}, dtype);
  };
  want(0, {p.batch, p.tokens, p.dim});
  want(1, {p.rank, p.dim});
  want(2, {p.rank});
  want(3, {p.rank, 1, p.kernel_h, p.kernel_w});
  want(4, {p.rank});
  want(5, {p.dim, p.rank});
  want(6, {p.dim});
  const auto results = [&] {
    return std::make_tuple(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]);
  };
  if (x.numel() == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return results();
  }

  const Tensor dense_z = torch::stable::contiguous(z), dense_c = torch::stable::contiguous(c);
  p.x = x.data_ptr();
  p.z = dense_z.data_ptr();
  p.c = dense_c.data_ptr();
  AdapterGradients g = {};
  g.grad_output = grad_output.data_ptr();
  g.grad_x = output_mask[0] ? grads[0].data_ptr() : nullptr;
  g.need_down = output_mask[1] || output_mask[2];
  g.need_conv = output_mask[3] || output_mask[4];
  g.need_up = output_mask[5] || output_mask[6];
  g.num_parts = std::min(p.batch, kMaxParts);
  g.part_elements = round_up(p.rank_padded * (2 * p.dim + p.kernel_h * p.kernel_w + 2) + p.dim, 16);

  const AdapterKernels& k = choose(p.storage, p.rank);
  const bool wide = p.storage == Storage::float64;
  const int64_t element = wide ? 8 : 4;
  const int64_t packed = round_up(packed_elements(p), 16);
  char* shared = static_cast<char*>(
      call_scratch().get(size_t((packed + g.num_parts * g.part_elements) * element)));
  g.parts = shared + packed * element;
  if (wide) {
    Packer<double> packer(reinterpret_cast<double*>(shared));
    pack_forward(p, w, packer);
    pack_backward(p, w, packer, g);
  } else {
    Packer<float> packer(reinterpret_cast<float*>(shared));
    pack_forward(p, w, packer);
    pack_backward(p, w, packer, g);
  }
  const double work = double(p.batch) / double(g.num_parts) * double(p.tokens * p.rank_padded) *
                      double(4 * p.dim + 2 * p.kernel_h * p.kernel_w) / double(p.lanes);
  torch::stable::parallel_for(
      0, g.num_parts, std::max<int64_t>(1, int64_t(20000.0 / (work + 1))),
      [&](int64_t begin, int64_t end) {
        k.backward(p, g, begin, end, task_scratch().get(size_t(k.scratch_elements(p) * element)));
      });
  if (wide)
    reduce_all<double>(p, g, grads, output_mask);
  else
    reduce_all<float>(p, g, grads, output_mask);
  return results();
}

}  // namespace lka::cpu
