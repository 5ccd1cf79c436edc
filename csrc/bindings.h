// What each file of csrc/ needs to offer its functions to Python; bindings.cpp lists the files.
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

}  // namespace mimir
