// A language's comments and strings as data (opencoder/corpus/comment_syntax.yaml), and the lexer that reads them.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "lexer.h"

namespace lex {

// Where the mark of a line comment counts.
enum class Where : uint8_t {
    anywhere,
    word,    // not behind a character that makes it part of a word: `$#`, `a#b`
    indent,  // first on its line
    column,  // in the first column
    column7,
};

struct LineRule {
    std::string mark;
    Where where;
};
struct BlockRule {
    std::string open, close;
    bool nested;
    bool lines;  // both marks stand in the first column, and the closing line belongs to the comment
};
struct StringRule {
    std::string open, close;
    bool escape;     // a backslash takes the next character along
    bool multiline;  // may run over line ends; else it ends with its line
    bool doc;        // counts as a comment where it starts a statement
    std::string insert;  // opens an expression inside, up to its matching bracket: `${`
};

struct Syntax {
    std::vector<LineRule> lines;
    std::vector<BlockRule> blocks;
    std::vector<StringRule> strings;
    bool ignore_case = false;
    bool escape_outside = false;   // a backslash in code takes the next character along
    bool character = false;        // 'x' is a character; a lone quote is nothing
    bool regex = false;            // a slash behind an operator opens a regular expression
    bool cpp_raw = false, rust_raw = false, verbatim = false, long_brackets = false;
    bool pod = false;
    char here = 0;  // here documents: s shell, r Ruby, p Perl, h PHP
    std::string only_between;  // "php": code between <?php and ?> alone; else empty

    void prepare();  // after the rules are set
    // By first character: whether anything starts with it.
    std::array<bool, 128> interesting{};
};

template <class C>
void lex_table(const Text<C>& t, const Syntax& syntax, Spans& out);

}  // namespace lex
