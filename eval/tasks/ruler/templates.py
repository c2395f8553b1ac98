"""RULER's wording, read from the source of the installed `lm-eval`, whose modules would download on import.

Wording alone is read there: where `lm-eval` departs from RULER's own program, what we make follows the program.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple

from ..sources import lm_eval_file, python_constant


class Wording(NamedTuple):
    """A prompt's wording, with fields in braces.

    Attributes:
        before: what precedes the context.
        after: what follows the context: the question.
        prefix: how the answer begins.
    """

    before: str
    after: str
    prefix: str


def needle() -> str:
    """Return the sentence that is hidden, with fields `type_needle_v`, `key` and `value`."""
    return _text(_file("prepare_niah.py"), python_constant(_file("prepare_niah.py"), "NEEDLE"))


def niah(*, one: bool) -> Wording:
    """Return the wording of the needle tasks, with fields `type_needle_v` and `query`.

    Args:
        one: a single value is asked for: RULER rewords the template for it.
    """
    path = _file("niah_utils.py")
    template = _text(path, python_constant(path, "TEMPLATE"))
    if one:
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(plural, singular)
    prefixes = _gen_prefixes(_file("prepare_niah.py"))
    return _wording(path, template, prefixes[0 if one else 1])


def variable_tracking() -> Wording:
    """Return the wording of `vt`, with fields `query` and `num_v`."""
    path = _file("vt_utils.py")
    return _configured(path, python_constant(path, "CONFIG")["variable_tracking"])


def word_extraction(task: str) -> Wording:
    """Return the wording of `cwe` or `fwe`."""
    path = _file(f"{task}_utils.py")
    return _configured(path, python_constant(path, "CONFIG"))


def question_answering() -> tuple[Wording, str]:
    """Return the wording of the questions, with field `query`, and of a document, with fields `i` and `document`."""
    path = _file("qa_utils.py")
    document = _text(path, python_constant(path, "DOCUMENT_PROMPT"))
    return _configured(path, python_constant(path, "CONFIG")), document


def noise() -> str:
    """Return the sentences that say nothing, of which RULER makes a haystack."""
    path = _file("prepare_niah.py")
    for node in ast.walk(_tree(path)):
        match node:
            case ast.Assign(targets=[ast.Name(id="haystack")], value=ast.Constant(value=str(text))):
                return text
    raise _unknown(path)


def _file(name: str) -> Path:
    return lm_eval_file(f"tasks/ruler/{name}")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _unknown(path: Path) -> ValueError:
    return ValueError(f"{path} is not written as expected; RULER's wording is read from lm-eval 0.4.13 or near it")


def _text(path: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise _unknown(path)
    return value


def _configured(path: Path, config: Any) -> Wording:
    return _wording(path, _text(path, config["template"]), _text(path, config["answer_prefix"]))


def _wording(path: Path, template: str, prefix: str) -> Wording:
    before, context, after = template.partition("{context}")
    if not context:
        raise _unknown(path)
    # RULER's prefixes begin with a space, which lm-eval drops from some.
    return Wording(before, after, f" {prefix.removeprefix(' ')}")


def _gen_prefixes(path: Path) -> tuple[str, str]:
    """Return how answers of one value and of several begin: two f-strings inside a function, as templates."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                match key, value:
                    case ast.Constant(value="gen_prefix"), ast.IfExp(body=ast.JoinedStr(), orelse=ast.JoinedStr()):
                        return _as_template(path, value.body), _as_template(path, value.orelse)
    raise _unknown(path)


def _as_template(path: Path, text: ast.expr) -> str:
    """Return an f-string as a template for `str.format`: of `{name}` and `{name[:-1]}`, the name."""
    parts = []
    for part in text.values if isinstance(text, ast.JoinedStr) else ():
        match part:
            case ast.Constant(value=str(piece)):
                parts.append(piece)
            case ast.FormattedValue(value=ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name))):
                parts.append(f"{{{name}}}")
            case _:
                raise _unknown(path)
    return "".join(parts)
