#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void add_anchors(py::module_& m);       // anchors.cpp
void add_characters(py::module_& m);    // characters.cpp
void add_code_lines(py::module_& m);    // code_lines.cpp
void add_html_text(py::module_& m);     // html_text.cpp
void add_lexer(py::module_& m);         // lexer.cpp
void add_minhash(py::module_& m);       // minhash.cpp
void add_ngram_index(py::module_& m);  // ngram_index.cpp
void add_prose(py::module_& m);         // prose.cpp
void add_sample_index(py::module_& m);  // sample_index.cpp
void add_scan_c(py::module_& m);        // scan_c.cpp
void add_scan_go(py::module_& m);       // scan_go.cpp
void add_scan_java(py::module_& m);     // scan_java.cpp
void add_strings(py::module_& m);       // strings.cpp
void add_words(py::module_& m);         // words.cpp
