// One `bind_<op>` per file of csrc/; bindings.cpp calls them all.
// Tensors arrive as addresses: see mimir_fast/_native.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace mimir {

// The address of a tensor's first element; the caller guarantees device, dtype, layout and lifetime.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Native functions touch no Python object, so they run without the interpreter lock.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_crop_resize(pybind11::module_& module);
void bind_bf16_attention(pybind11::module_& module);
void bind_bf16_layers(pybind11::module_& module);
void bind_fp32_attention(pybind11::module_& module);
void bind_fp32_layers(pybind11::module_& module);
void bind_linf_step(pybind11::module_& module);
void bind_masked_loss(pybind11::module_& module);
void bind_noisy_patches(pybind11::module_& module);
void bind_pair_tiles(pybind11::module_& module);
void bind_patches(pybind11::module_& module);
void bind_processor(pybind11::module_& module);
void bind_random_masks(pybind11::module_& module);
void bind_random_uniform(pybind11::module_& module);
void bind_tokens(pybind11::module_& module);

}  // namespace mimir
