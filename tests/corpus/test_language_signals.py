"""Signals of single languages: values worked out by hand in both modes, and texts made to be slow. The published filter's own
answers: test_oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest

from opencoder.corpus import signals
from opencoder.corpus.signals.document import Document
from opencoder.corpus.signals.languages import LANGUAGE_SIGNALS, javascript, python
from opencoder.native import text_engine
from opencoder.tools.bench_hostile import DECLARATIONS, scanners

from .hostile import grows_evenly

pytestmark = pytest.mark.skipif(text_engine() is None, reason="needs the text engine")


def document(text: str, language: str, *, compat: bool = False, path: str = "") -> Document:
    name = path or f"file.{language}"
    stem, _, extension = name.rpartition(".")
    return Document(
        text,
        len(text.encode("utf-8", "surrogatepass")),
        file_name=stem if compat else name,
        extension=extension,
        language=language,
        compat=compat,
    )


def values(text: str, language: str, *, compat: bool = False, path: str = "") -> dict[str, Any]:
    """Signals without their common prefix."""
    d = document(text, language, compat=compat, path=path)
    return {name.split("_", 2)[2]: function(d) for name, function in LANGUAGE_SIGNALS[language].items()}


def check(found: dict[str, Any], **expected: Any) -> None:
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


@pytest.mark.fast
def test_all_published_names_are_there() -> None:
    sizes = {language: len(own) for language, own in LANGUAGE_SIGNALS.items()}
    assert sizes == {"python": 8, "c": 8, "cpp": 8, "csharp": 4, "go": 5, "html": 3, "java": 8, "javascript": 9}
    for language, own in LANGUAGE_SIGNALS.items():
        assert all(name.startswith(f"qsc_code{language}_") for name in own)


PYTHON = '''\
"""Doc."""
import password  # import
from a import b

class C:
    x: int = 1
    y = z = 2

    async def f(self):
        pass

    def g(self):
        """Doc."""
        return print_all(1)

    def h(self): return 1

def bypass():
    return
'''


@pytest.mark.fast
def test_python() -> None:
    lines = 12  # that hold code: doc strings and comments are out
    check(
        values(PYTHON, "python", compat=True),
        cate_ast=True,
        frac_lines_func_ratio=3 / lines,
        cate_var_zero=False,
        frac_lines_pass=3 / lines,  # password, pass, bypass
        frac_lines_import=2 / lines,
        frac_lines_simplefunc=2 / lines,  # h and bypass; the doc string of g counts
        score_lines_no_logic=(3 + 2 + 1 + 2 + 3) / lines,
        frac_lines_print=1 / lines,
    )
    check(
        values(PYTHON, "python"),
        cate_ast=True,
        frac_lines_func_ratio=4 / lines,
        cate_var_zero=False,
        frac_lines_pass=1 / lines,
        frac_lines_import=2 / lines,
        frac_lines_simplefunc=3 / lines,
        score_lines_no_logic=(4 + 2 + 1 + 3 + 3) / lines,
        frac_lines_print=0.0,
    )


@pytest.mark.fast
def test_python_that_does_not_parse() -> None:
    found = values("print 'x'\nimport a\n", "python", compat=True)
    assert found["cate_ast"] is False
    assert found["frac_lines_func_ratio"] is None
    assert found["frac_lines_import"] == 0.5
    assert values("a = 1\0\n", "python")["cate_ast"] is False


@pytest.mark.fast
def test_python_variables() -> None:
    for text, compat, default in [
        ("f()\n", True, True),
        ("a = 1\n", False, False),
        ("a.b = 1\n", True, False),
        ("a, b = 1, 2\n", True, False),
        ("a: int = 1\n", True, False),
        ("for a in b: pass\n", False, False),
        ("def f(a): pass\n", False, False),
        ("def f(*, a): pass\n", True, False),
        ("async def f(a): pass\n", True, False),
        ("with a as b: pass\n", True, False),
    ]:
        assert values(text, "python", compat=True)["cate_var_zero"] is compat, text
        assert values(text, "python")["cate_var_zero"] is default, text


@pytest.mark.fast
def test_python_too_large_or_too_deep_is_an_error_and_not_a_verdict() -> None:
    with pytest.raises(ValueError, match="limit is 3000000"):
        python.parse("a\n" * (python.MAX_CHARACTERS // 2 + 1))
    deep = "-" * 50_000 + "1"
    with pytest.raises(ValueError, match="nested too deeply"):
        python.parse(deep)
    assert python.parse(deep, True) is None


C = """\
#include <stdio.h>
  # include "a.h"
struct destruct *s;
class A : public B {
int x;
unsigned char y ;
static const char * name(int a) {
  return f(1);
  return "a;b";
  return;
  fprintf(stderr, "x"); goto_x();
  printf("goto");
}
#define X(a) a
int main(int argc) {
  x = 1; #if
}
"""


@pytest.mark.fast
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_c_and_cpp(language: str) -> None:
    lines = 17
    check(
        values(C, language, compat=True),
        frac_lines_func_ratio=4 / lines,  # name, `return f(1)`, `define X(a)`, main
        cate_bitsstdc=False,
        nums_lines_main=1,
        frac_lines_goto=2 / lines,
        cate_var_zero=False,
        score_lines_no_logic=(4 + 2 + 2 + 2 + 1) / lines,
        frac_lines_preprocessor_directives=5 / lines,
        frac_lines_print=2 / lines,
    )
    check(
        values(C, language),
        frac_lines_func_ratio=2 / lines,
        cate_bitsstdc=False,
        nums_lines_main=1,
        frac_lines_goto=1 / lines,  # the string still counts
        cate_var_zero=False,
        score_lines_no_logic=(2 + 2 + 2 + 2 + 1) / lines,
        frac_lines_preprocessor_directives=4 / lines,
        frac_lines_print=1 / lines,
    )


@pytest.mark.fast
def test_c_family_by_language_and_extension() -> None:
    text = "#include <bits/stdc++.h>\nstd::cout << 1;\n"
    assert values(text, "cpp")["frac_lines_print"] == 0.5
    assert values(text, "c")["frac_lines_print"] == 0.0
    assert values(text, "cpp")["cate_bitsstdc"] is True
    assert values(text, "cpp", path="a.hpp")["frac_lines_preprocessor_directives"] is None
    assert values("f();\n", "c")["cate_var_zero"] is True
    assert values("", "c")["frac_lines_func_ratio"] is None


CSHARP = """\
using System.Text;
public sealed class A {
  internal A() { }
  public static int F(string a) { Console.WriteLine(a); }
  int x;
  return G(a);
  return
    b;
}
"""


@pytest.mark.fast
def test_csharp() -> None:
    check(
        values(CSHARP, "csharp", compat=True),
        frac_lines_func_ratio=3 / 9,  # the constructor, F, `return G(a)`
        cate_var_zero=False,
        score_lines_no_logic=(3 + 1 + 1 + 2 + 1) / 9,
        frac_lines_print=1 / 9,
    )
    found = values(CSHARP, "csharp")
    assert found["frac_lines_func_ratio"] == pytest.approx(2 / 9)
    assert found["cate_var_zero"] is False
    for text, zero in [
        ("class A { }\n", True),
        ("namespace A;\nusing B;\nclass C { object F(D d) { return d; } }\n", True),
        ("class A { void F() { B b = new B(); } }\n", False),
        ("class A { public List<int> B { get; set; } }\n", False),
        ("class A { B[] c; }\n", False),
    ]:
        assert values(text, "csharp")["cate_var_zero"] is zero, text
    assert values("class A { }\n", "csharp", compat=True)["cate_var_zero"] is False


GO = """\
package a
import "b"
import (
	"fmt"

	c "d/e"
)
type T struct { a int }
var x int
func (t *T) F(a int) (int, error) {
	fmt.Println(a)
	return 1, nil
}
func G()
func H()
"""


@pytest.mark.fast
def test_go() -> None:
    check(
        values(GO, "go", compat=True, path="a_test.go"),
        cate_testfile=False,
        frac_lines_func_ratio=2 / 14,  # the word `func` of H is taken for the result of G
        cate_var_zero=False,
        score_lines_no_logic=(2 + 2 + 1 + 1 + 1) / 14,
        frac_lines_print=1 / 14,
    )
    found = values(GO, "go", path="A_Test.go")
    assert found["cate_testfile"] is True
    assert found["score_lines_no_logic"] == pytest.approx((2 + 4 + 1 + 1 + 1) / 14)
    for text, zero in [
        ("func f() {}\n", True),
        ("var x int\n", False),
        ("\tx, y := f()\n", False),
        ("const (\n a = 1\n)\n", False),
    ]:
        assert values(text, "go")["cate_var_zero"] is zero, text
        assert values(text, "go", compat=True)["cate_var_zero"] is False


JAVA = """\
package a;
import a.b.C;
import static a.b;
public final class Foo<T> {
  private int x;
  String name = "a;b";
  public static int f(int a) throws E, F {
    return g(1);
    return "a";
    return x ;
  }
  static void my_name() { System.out.println(1); }
}
class lower {
}
"""


@pytest.mark.fast
def test_java() -> None:
    check(
        values(JAVA, "java", compat=True),
        cate_var_zero=False,
        frac_lines_func_ratio=3 / 15,
        score_lines_no_logic=(3 + 1 + 1 + 2 + 2) / 15,
        frac_words_no_modifier=1 / 5,
        frac_words_legal_var_name=1.0,  # rivate, tring
        frac_words_legal_func_name=1.0,
        frac_words_legal_class_name=0.0,  # Foo<T> has signs in it
        frac_lines_print=1 / 15,
    )
    check(
        values(JAVA, "java"),
        cate_var_zero=False,
        frac_lines_func_ratio=2 / 15,
        score_lines_no_logic=(2 + 1 + 1 + 2 + 2) / 15,
        frac_words_no_modifier=2 / 4,
        frac_words_legal_var_name=1.0,
        frac_words_legal_func_name=1 / 2,
        frac_words_legal_class_name=0.0,
        frac_lines_print=1 / 15,
    )
    assert values("f();\n", "java")["cate_var_zero"] is True


JAVASCRIPT = """\
import a from 'b';
var x, y = 1, z = f(), g = function () { return; };
const h = () => { return x; };
let k = async function () { return x + 1; };
function Foo() { console.log(1); }
class bar {}
module.exports.q = function () {};
module.exports.r = -1;
"""


@pytest.mark.fast
def test_javascript() -> None:
    check(
        values(JAVASCRIPT, "javascript", compat=True),
        cate_ast=True,
        cate_var_zero=False,
        frac_lines_func_ratio=3 / 8,  # g, Foo, q
        num_statement_line=1.0,
        score_lines_no_logic=(3 + 1 + 3 + 2 + 1) / 8,  # simple: x, y, r
        frac_words_legal_var_name=1.0,
        frac_words_legal_func_name=1.0,
        frac_words_legal_class_name=0.0,
        frac_lines_print=1 / 8,
    )
    check(
        values(JAVASCRIPT, "javascript"),
        cate_ast=True,
        cate_var_zero=False,
        frac_lines_func_ratio=5 / 8,  # h and k, too
        num_statement_line=1.0,
        score_lines_no_logic=(5 + 1 + 3 + 2 + 1) / 8,
        frac_words_legal_var_name=1.0,
        frac_words_legal_func_name=1.0,
        frac_words_legal_class_name=0.0,
        frac_lines_print=1 / 8,
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "compat"),
    [
        ("a?.b;\n", False),
        ("class A { x = 1; #y; static { } }\n", False),
        ("try { } catch { }\n", False),
        ("a ??= b;\n", False),
        ("#!/usr/bin/env node\na;\n", False),
        ("x = <div className='a'>{b}</div>;\n", False),
        ("async () => { for await (const x of y) { } };\n", False),
        ("export default { ...a };\n", True),
        ("const f = async () => import('b');\n", True),
    ],
)
def test_modern_javascript_parses_in_default_mode(text: str, compat: bool) -> None:
    assert values(text, "javascript")["cate_ast"] is True
    assert values(text, "javascript", compat=True)["cate_ast"] is compat
    assert values("var = ;\n", "javascript")["cate_ast"] is False


@pytest.mark.fast
def test_javascript_that_takes_the_parser_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, parsed = javascript._parse, []
    monkeypatch.setattr(javascript, "_parse", lambda parser, source: (parsed.append(source), parse(parser, source))[1])
    monkeypatch.setattr(javascript, "MAX_SECONDS", 0.0)
    text = "x=/[" * 20_000
    with pytest.raises(TimeoutError, match=r"more than 0\.0 s"):
        javascript.declarations(text, False)
    found = signals.compute_document(document(text, "javascript"))
    assert {"TimeoutError: parsing took more than 0.0 s of CPU time"} == set(found.errors.values())
    assert len(found.errors) == len(LANGUAGE_SIGNALS["javascript"]) - 1  # all but frac_lines_print, which needs no tree
    assert len(parsed) == 1, "the failure is remembered"
    monkeypatch.setattr(javascript, "MAX_SECONDS", 5.0)
    assert values("a = 1;\n", "javascript")["cate_ast"] is True
    with pytest.raises(ValueError, match="limit is 3000000"):
        javascript.declarations("a;\n" * 1_000_001, False)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("page", "length"),
    [
        ("<p>abc</p>", 3),
        ("<html>\n\n  <p> a </p>\n</html>\n", 1 + 3 + 1 + 1),  # white space between marks is one character
        ("<pre>\n\n  </pre>", 4),
        ("a<script>var b;</script><style>c</style><template><b>d</b></template><!-- e -->f", 2),
        ("&amp;&nbsp;&#65;&#x41;&unknown;x&ampy", 1 + 1 + 1 + 1 + len("&unknown") + len("x&ampy")),
        ("<![CDATA[abc]]>d", 4),
        ("<br>a<br/>b</br>c", 3),
        ("a < b <", 7),
        ("<!DOCTYPE html><?php echo ?>a<!b>c", 2),
        ("<p title='a>b' c=\"d\">e", 1),
        ("<p title='a>b</p>", len("<p title='a>b")),  # an unfinished tag is text
        ("</>a</ b>c</d e>f", 3),
        ("<script>never closed", 0),
        ("a&#xyz; <b>c</b>", len("a&#xyz; c")),
        ("a&#xyz;&#q; <b>c</b>", len("a&#xyz;&#q; <b>c</b>")),  # the second time html.parser takes the rest for text
    ],
)
def test_html(page: str, length: int) -> None:
    found = values(page, "html")
    assert found == {"cate_ast": True, "frac_words_text": pytest.approx(length / len(page)), "num_chars_text": length}
    assert found == values(page, "html", compat=True)


@pytest.mark.fast
def test_html_that_is_refused_or_empty() -> None:
    assert values("<p>a</p><![foo[b]]>", "html") == {"cate_ast": False, "frac_words_text": None, "num_chars_text": None}
    assert values("", "html") == {"cate_ast": True, "frac_words_text": None, "num_chars_text": 0}


@pytest.mark.parametrize(("name", "function"), scanners().items(), ids=scanners())
def test_texts_full_of_declarations_are_counted_evenly_at_any_length(name: str, function: Any) -> None:
    for hostile in DECLARATIONS:
        assert grows_evenly(
            lambda text: (function(text),) if name == "visible characters" else function(text), hostile
        ), hostile


@pytest.mark.fast
def test_random_texts_do_not_break_a_signal() -> None:
    generator = random.Random(3)
    pieces = [*(hostile.piece for hostile in DECLARATIONS), "\x00", "漢", "𝔘", "<script>", "]]>", "-->"]
    for _ in range(40):
        text = "".join(generator.choices(pieces, k=generator.randrange(300)))
        for language in LANGUAGE_SIGNALS:
            values(text, language)
