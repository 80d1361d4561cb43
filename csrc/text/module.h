#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void add_minhash(py::module_& m);       // minhash.cpp
void add_sample_index(py::module_& m);  // sample_index.cpp
