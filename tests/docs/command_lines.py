"""What a shell block names, looked up without running it: commands, flags, make targets, modules, tests.

So that a block which cannot run on a test machine is at least one that could.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from cyclopts import CycloptsError

from server.cli import app
from tests.docs.page import ROOT

_SKIPPED = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?<!\S)#[^\n]*|\\\n""")
_HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n.*?^\s*\2$", re.DOTALL | re.MULTILINE)
_WORDS_BEFORE = ("do", "then", "else", "if", "while", "until", "!", "{", "exec", "time", "nohup")


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell block as words, without assignments and redirections."""
    code = _HERE_DOCUMENT.sub(r"\3", code)
    code = _SKIPPED.sub(lambda found: found[0] if found[0][0] in "'\"" else " ", code)
    lexer = shlex.shlex(code, posix=True, punctuation_chars="();<>|&\n`")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    is_target = False
    for word in [*lexer, "\n"]:
        if set(word) <= set("<>&") and set(word) & set("<>"):
            if words and words[-1].isdigit():
                words.pop()
            is_target = True
        elif set(word) <= set("();|&\n`"):
            if words := _bare(words):
                yield words
            words, is_target = [], False
        elif is_target:
            is_target = False
        else:
            words.append(word)


def _bare(words: list[str]) -> list[str]:
    while words and (words[0] in _WORDS_BEFORE or re.match(r"[A-Za-z_]\w*=", words[0])):
        words = words[1:]
    return words


def problems(code: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the commands of a block that are ours."""
    return [problem for words in commands(code) if (problem := _problem(words, root))]


def _problem(words: list[str], root: Path) -> str | None:
    name, *arguments = words
    match Path(name).name, arguments:
        case "fathom", _:
            return _refused(arguments)
        case "make", _:
            targets = re.findall(r"^([\w./-]+):", (root / "Makefile").read_text(), re.MULTILINE)
            wanted = [word for word in arguments if "=" not in word and not word.startswith("-")]
            return next((f"make has no target {w!r}" for w in wanted if w not in targets), None)
        case "python" | "python3", ["-m", "server", *rest]:
            return _refused(rest)
        case "python" | "python3", ["-m", module, *_] if module.split(".")[0] in (
            "server",
            "boundary",
            "tests",
        ):
            path = root.joinpath(*module.split("."))
            if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
                return f"there is no module {module!r} to run"
        case "pytest", _:
            wanted = [word for word in arguments if word.startswith("tests")]
            return next((f"there is no {w!r}" for w in wanted if not (root / w).exists()), None)
    return None


def _refused(arguments: list[str]) -> str | None:
    """What `fathom` says of its arguments before it runs anything."""
    try:
        app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        return f"fathom {shlex.join(arguments)}: {error}"
    return None
