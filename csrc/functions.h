// Every function of csrc/ that Python can call; bindings.cpp offers them. What each does is said where it is defined.
//
// Tensors arrive as addresses: see mimir_fast/_native.py. pybind11 is included in bindings.cpp only, since reading it
// takes longer than compiling most of these files.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

// What this compiler can build.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define MIMIR_BF16_MATRIX
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MIMIR_VECTORS
#endif
#endif

namespace mimir {

// The address of a tensor's first element; the caller guarantees device, dtype, layout and lifetime.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// bf16_attention.cpp
// What computes bf16_attention here: amx, avx512 or nothing.
std::string bf16_unit(int);
#ifdef MIMIR_BF16_MATRIX
void bf16_attention(Address q, Address k, Address v, Address out, Address lse, std::int64_t B, std::int64_t T,
                    std::int64_t S, std::int64_t H, std::int64_t E, const std::vector<std::int64_t>& strides, bool amx,
                    int threads);
void bf16_attention_backward(Address grad, Address q, Address k, Address v, Address out, Address lse, Address dq,
                             Address dk, Address dv, std::int64_t B, std::int64_t T, std::int64_t S, std::int64_t H,
                             std::int64_t E, const std::vector<std::int64_t>& strides, bool amx, int threads);
#endif

// bf16_layers.cpp
#ifdef MIMIR_BF16_MATRIX
void bf16_pack(Address weight, bool wide, std::int64_t N, std::int64_t K, Address forward, Address backward,
               int threads);
void bf16_linear(Address x, bool wide, Address gamma, Address beta, double eps, Address panels, Address bias,
                 Address residual, bool residual_wide, Address out, bool out_wide, Address statistics, std::int64_t M,
                 std::int64_t K, std::int64_t N, bool amx, int threads);
void bf16_linear_backward(Address grad, bool grad_wide, Address x, bool wide, Address gamma, Address beta,
                          Address statistics, Address panels, Address along, Address dx, Address dgamma, Address dbeta,
                          Address dweight, Address dbias, std::int64_t M, std::int64_t K, std::int64_t N, bool amx,
                          int threads);
void bf16_mlp(Address x, bool wide, Address gamma, Address beta, double eps, Address panels1, Address bias1,
              Address panels2, Address bias2, bool residual, Address out, Address hidden, Address statistics,
              std::int64_t M, std::int64_t K, std::int64_t H, bool amx, int threads);
void bf16_mlp_backward(Address grad, Address x, bool wide, Address gamma, Address beta, Address statistics,
                       Address hidden, Address panels1, Address panels2, bool residual, Address dx,
                       const std::vector<Address>& parameters, std::int64_t M, std::int64_t K, std::int64_t H, bool amx,
                       int threads);
#endif

// crop_resize.cpp
void crop_resize(Address pixels_address, Address plan_address, Address out_address, std::int64_t batch,
                 std::int64_t height, std::int64_t width, std::int64_t channels, int threads);

// fp32_attention.cpp
#ifdef MIMIR_VECTORS
// Numbers in the widest vector that fp32_attention can use here.
int fp32_lanes(int);
void fp32_attention(Address q, Address k, Address v, Address out, Address lse, std::int64_t B, std::int64_t T,
                    std::int64_t S, std::int64_t H, std::int64_t E, const std::vector<std::int64_t>& strides, int lanes,
                    int threads);
void fp32_attention_backward(Address grad, Address q, Address k, Address v, Address out, Address lse, Address dq,
                             Address dk, Address dv, std::int64_t B, std::int64_t T, std::int64_t S, std::int64_t H,
                             std::int64_t E, const std::vector<std::int64_t>& strides, int lanes, int threads);
#endif

// fp32_layers.cpp
void fp32_gelu(Address u, Address bias, Address out, std::int64_t M, std::int64_t H, int threads);
void fp32_gelu_backward(Address u, Address bias, Address grad, Address activated, Address sums, std::int64_t M,
                        std::int64_t H, int threads);
void fp32_norm(Address x, Address gamma, Address beta, double eps, bool known, Address statistics, Address out,
               std::int64_t M, std::int64_t K, int threads);
void fp32_norm_backward(Address x, Address gamma, Address statistics, Address along, Address grad, Address sums,
                        std::int64_t M, std::int64_t K, int threads);

// linf_step.cpp
void linf_step(Address x_adv_address, Address grad_address, Address x_address, Address eps_address, Address out_address,
               std::int64_t n, std::int64_t num_eps, std::int64_t inner, float alpha, float low, float high,
               int threads);

// masked_loss.cpp
double masked_loss(Address images, Address ids, Address prediction, Address gradient, std::int64_t B, std::int64_t M,
                   std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                   std::array<std::int64_t, 4> stride, bool is_uint8, bool is_bf16, bool normalized, bool absolute,
                   float eps, float slope, int threads);

// noisy_patches.cpp
void noisy_patches(Address images, Address ids_address, Address samples_address, Address steps_address,
                   Address clean_address, Address noisy_address, std::int64_t B, std::int64_t K, std::int64_t channels,
                   std::int64_t patch_size, std::int64_t columns, std::array<std::int64_t, 4> stride, bool is_uint8,
                   std::uint64_t seed, std::uint32_t stream, float eps, int threads);

// pair_tiles.cpp
void kernel_from_gram(Address gram_address, std::int64_t stride, std::int64_t rows, std::int64_t cols,
                      Address norms_i_address, Address norms_j_address, float gamma, bool diagonal,
                      Address row_sums_address, Address column_sums_address, int threads);
double inner_product(Address k_address, std::int64_t stride_k, Address l_address, std::int64_t stride_l,
                     std::int64_t rows, std::int64_t cols, int threads);
void pair_weights(Address k_address, std::int64_t stride_k, Address l_address, std::int64_t stride_l, std::int64_t rows,
                  std::int64_t cols, float grad_s, Address half_i_address, Address half_j_address, Address out_address,
                  Address row_sums_address, Address column_sums_address, int threads);

// patches.cpp
void patchify_gather(Address images, Address ids_address, Address out_address, std::int64_t B, std::int64_t K,
                     std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                     std::array<std::int64_t, 4> stride, bool is_uint8, bool normalized, float eps, int threads);
void unpatchify_visible(Address patches_address, Address ids_address, Address images_address, std::int64_t B,
                        std::int64_t K, std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                        std::array<std::int64_t, 4> stride, int threads);

// processor.cpp
// The unit in use and the widest of this processor, as named in kNames; use this one and none that is wider, before any
// kernel has run.
std::string unit_name(int);
std::string widest_unit(int);
void use_unit(const std::string& name);

// random_masks.cpp
void random_masks(Address samples_address, Address steps_address, Address keep_address, Address masked_address,
                  std::int64_t num_samples, std::int64_t num_patches, std::int64_t num_keep, std::uint64_t seed,
                  std::uint32_t stream, bool shuffled, int threads);

// random_uniform.cpp
void random_uniform(Address samples, Address steps, Address out_address, std::int64_t num_samples, std::int64_t num,
                    std::uint64_t seed, std::uint32_t stream, int threads);
void random_start_linf(Address x_address, Address samples, Address steps, Address out_address, std::int64_t num_samples,
                       std::int64_t num, std::uint64_t seed, std::uint32_t stream, float eps, float low, float high,
                       int threads);

// tokens.cpp
std::string check_ids(Address ids_address, std::int64_t B, std::int64_t K, std::int64_t N, int);
void place_patches(Address y_address, Address ids_address, Address out_address, std::int64_t B, std::int64_t K,
                   std::int64_t N, std::int64_t row_bytes, int threads);
void add_positions(Address tokens, Address ids, Address positions, Address prefix, Address out, std::int64_t B,
                   std::int64_t T, std::int64_t num_prefix, std::int64_t D, std::int64_t batch_stride,
                   std::int64_t row_stride, bool is_bf16, int threads);
void scatter_patches(Address visible, Address ids, Address mask_token, Address pos_embed, Address out, std::int64_t B,
                     std::int64_t K, std::int64_t N, std::int64_t D, std::int64_t batch_stride, std::int64_t row_stride,
                     bool is_bf16, int threads);

}  // namespace mimir
