// opencoder._text: the text engine. No torch in here, so it builds and loads without it. Each subject has its own file
// and adds its functions through one `add_...` function declared in module.h.
#include "module.h"

PYBIND11_MODULE(_text, m) {
    m.doc() = "Text engine of OpenCoder (csrc/text)";
    add_anchors(m);
    add_characters(m);
    add_code_lines(m);
    add_html_text(m);
    add_lexer(m);
    add_minhash(m);
    add_ngram_index(m);
    add_prose(m);
    add_sample_index(m);
    add_scan_c(m);
    add_scan_go(m);
    add_scan_java(m);
    add_strings(m);
    add_words(m);
}
