// A batch of texts as Python hands it over: a sequence of str, or the buffers of an Arrow column (offsets, bytes), of which
// no Python object is made per text.
#pragma once
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "module.h"
#include "tokens.h"

// Views of UTF-8 that stay valid as long as this object and the argument it was made from. Needs the GIL.
class Texts {
public:
    explicit Texts(const py::object& given) {
        if (py::isinstance<py::tuple>(given))
            from_buffers(given.cast<py::tuple>());
        else
            from_strings(given.cast<py::sequence>());
    }
    size_t size() const { return views_.size(); }
    std::string_view operator[](size_t i) const { return views_[i]; }

private:
    void from_strings(const py::sequence& strings) {
        const size_t n = strings.size();
        views_.reserve(n);
        for (size_t i = 0; i < n; ++i) {
            py::object item = strings[i];
            if (!PyUnicode_Check(item.ptr())) throw py::type_error("texts must be str");
            Py_ssize_t size;
            // ASCII text is its own UTF-8; for other text Python keeps the encoded form beside it.
            const char* data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
            if (data == nullptr) {  // surrogates have no strict UTF-8
                PyErr_Clear();
                item = item.attr("lower")().attr("encode")("utf-8", "surrogatepass");
                add_bytes(std::move(item));
                continue;
            }
            add(std::string_view(data, static_cast<size_t>(size)), item);
            owners_.push_back(std::move(item));  // a sequence may make its items as they are asked for
        }
    }

    void from_buffers(const py::tuple& buffers) {
        const auto offsets = buffers[0].cast<py::array_t<int64_t, py::array::c_style | py::array::forcecast>>();
        const py::buffer_info bytes = buffers[1].cast<py::buffer>().request();
        const auto limit = static_cast<int64_t>(bytes.size * bytes.itemsize);
        const int64_t* at = offsets.data();
        for (py::ssize_t i = 0; i + 1 < offsets.size(); ++i) {
            if (at[i] < 0 || at[i] > at[i + 1] || at[i + 1] > limit) throw py::value_error("offsets do not fit the bytes");
            const std::string_view view(static_cast<const char*>(bytes.ptr) + at[i], static_cast<size_t>(at[i + 1] - at[i]));
            add(view, py::object());
        }
        owners_.push_back(buffers);
    }

    // Python lowers a text with a capital sigma; every other is lowered as it is read.
    void add(std::string_view view, const py::object& item) {
        // memmem, not find: the bytes of the pair are rare in other text, and this is the only pass with the GIL held
        if (memmem(view.data(), view.size(), tokens::kCapitalSigma.data(), tokens::kCapitalSigma.size()) == nullptr) {
            views_.push_back(view);
            return;
        }
        const py::object text = item ? item : py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
                                                  view.data(), static_cast<Py_ssize_t>(view.size()), "surrogatepass"));
        if (!text) throw py::error_already_set();
        add_bytes(text.attr("lower")().attr("encode")("utf-8", "surrogatepass"));
    }

    void add_bytes(py::object bytes) {
        char* data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
        views_.emplace_back(data, static_cast<size_t>(size));
        owners_.push_back(std::move(bytes));
    }

    std::vector<std::string_view> views_;
    std::vector<py::object> owners_;
};
