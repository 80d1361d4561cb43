// opencoder._text: the text engine. No torch in here, so it builds and loads without it. Each subject has its own file
// and adds its functions through one `add_...` function declared in module.h.
#include "module.h"

PYBIND11_MODULE(_text, m) {
    m.doc() = "Text engine of OpenCoder (csrc/text)";
    add_minhash(m);
    add_sample_index(m);
}
