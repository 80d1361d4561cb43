// Sample index and blending indices of Megatron's GPT datasets, from their description: where each sample starts in the
// shuffled sequence of documents, and which member of a blend gives each sample.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// sizes (sequences,) tokens; document_index (entries,) positions in sizes. Row k of the result is (position in
// document_index, offset in that document) of the first token of sample k; neighbours share `extra` tokens.
template <typename Out>
py::array_t<Out> sample_index(const Array<int32_t>& sizes, const Array<int32_t>& document_index, int64_t seq_len,
                              int64_t num_samples, int64_t extra) {
    const int32_t* size = sizes.data();
    const int32_t* documents = document_index.data();
    const int64_t entries = document_index.size(), sequences = sizes.size();
    py::array_t<Out> result({num_samples + 1, int64_t(2)});
    Out* row = result.mutable_data();
    {
        py::gil_scoped_release release;
        int64_t position = 0, offset = 0;
        row[0] = row[1] = 0;
        for (int64_t k = 1; k <= num_samples; ++k) {
            int64_t need = seq_len + extra;
            while (true) {
                if (position >= entries) throw std::out_of_range("the documents hold fewer tokens than the samples need");
                const int32_t document = documents[position];
                if (document < 0 || document >= sequences) throw std::out_of_range("document_index points beyond sizes");
                const int64_t available = size[document] - offset;
                need -= available;
                if (need <= 0) {
                    offset += need + available - extra;
                    break;
                }
                if (position == entries - 1) {  // the last sample may be short; it ends with the last document
                    if (k != num_samples) throw std::out_of_range("the documents hold fewer tokens than the samples need");
                    offset = size[document] - extra;
                    break;
                }
                ++position;
                offset = 0;
            }
            row[2 * k] = static_cast<Out>(position);
            row[2 * k + 1] = static_cast<Out>(offset);
        }
    }
    return result;
}

// Sample t goes to the member whose share so far falls shortest of its weight; ties to the first.
py::tuple blending(const Array<double>& weights, int64_t size) {
    const int64_t members = weights.size();
    py::array_t<int16_t> dataset(size);
    py::array_t<int64_t> sample(size);
    const double* w = weights.data();
    int16_t* d = dataset.mutable_data();
    int64_t* s = sample.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<int64_t> count(members, 0);
        for (int64_t t = 0; t < size; ++t) {
            const double r = static_cast<double>(std::max<int64_t>(t, 1));
            int64_t best = 0;
            double highest = w[0] * r - static_cast<double>(count[0]);
            for (int64_t m = 1; m < members; ++m) {
                const double error = w[m] * r - static_cast<double>(count[m]);
                if (error > highest) {
                    highest = error;
                    best = m;
                }
            }
            d[t] = static_cast<int16_t>(best);
            s[t] = count[best]++;
        }
    }
    return py::make_tuple(dataset, sample);
}

// Every sample of every member once: weights are the sizes, and a member leaves when it is spent.
py::tuple exhaustive_blending(const Array<int64_t>& sizes) {
    const int64_t members = sizes.size();
    const int64_t* size = sizes.data();
    int64_t total = 0;
    for (int64_t m = 0; m < members; ++m) total += size[m];
    py::array_t<int16_t> dataset(total);
    py::array_t<int64_t> sample(total);
    int16_t* d = dataset.mutable_data();
    int64_t* s = sample.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<int64_t> count(members, 0);
        std::vector<double> weight(members);
        for (int64_t m = 0; m < members; ++m) weight[m] = static_cast<double>(size[m]) / static_cast<double>(total);
        for (int64_t t = 0; t < total; ++t) {
            const double r = static_cast<double>(std::max<int64_t>(t, 1));
            int64_t best = -1;
            double highest = 0;
            for (int64_t m = 0; m < members; ++m) {
                if (count[m] == size[m]) continue;
                const double error = weight[m] * r - static_cast<double>(count[m]);
                if (best < 0 || error > highest) {
                    highest = error;
                    best = m;
                }
            }
            d[t] = static_cast<int16_t>(best);
            s[t] = count[best]++;
        }
    }
    return py::make_tuple(dataset, sample);
}

}  // namespace

void add_sample_index(py::module_& m) {
    m.def("sample_index_int32", &sample_index<int32_t>, py::arg("sizes"), py::arg("document_index"), py::arg("seq_len"),
          py::arg("num_samples"), py::arg("extra"));
    m.def("sample_index_int64", &sample_index<int64_t>, py::arg("sizes"), py::arg("document_index"), py::arg("seq_len"),
          py::arg("num_samples"), py::arg("extra"));
    m.def("blending", &blending, py::arg("weights"), py::arg("size"));
    m.def("exhaustive_blending", &exhaustive_blending, py::arg("sizes"));
}
