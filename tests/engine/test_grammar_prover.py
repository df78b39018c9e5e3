"""Grammars that take gigabytes or minutes are refused, and the process that serves never notices."""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from llguidance import grammar_from

from server.engine import grammar as grammar_module
from server.engine.grammar import GrammarCompiler
from server.errors import BadRequest, GenerationError, GrammarFailed, QueueFull
from tests.engine.test_grammar import TOKENIZER, allowed, make_compiler

DOUBLING = (
    "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(14)) + "\nT14: /\\w*/"
)
"""300 characters that stand for `\\w*` sixteen thousand times."""
HUGE = {
    "terminals that double": DOUBLING,
    "a long expression": grammar_from("regex", r"\w*" * 15_000),
    "classes": grammar_from("regex", "[^a]*" * 10_000),
    "words of any script": grammar_from("regex", r"(\p{L}*\p{N}*)" * 3000),
    "repeats": "start: /((a{900}){900}){900}/",
}
MB = 1 << 20
LIMIT_S = 60


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = make_compiler()
    compiler.check('start: "a"')
    yield compiler
    compiler.close()


def process_of() -> int:
    """The one that was started last."""
    provers = [
        child
        for child in psutil.Process().children()
        if any("grammar_prover" in word for word in child.cmdline())
    ]
    return max(provers, key=lambda child: child.create_time()).pid


@pytest.mark.parametrize("name", HUGE)
def test_a_grammar_that_takes_too_much_is_refused(compiler: GrammarCompiler, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRequest, match=r"more memory than|longer than the limit") as refusal:
        compiler.check(HUGE[name])
    assert refusal.value.code == "invalid_grammar"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 16 * MB
    compiler.check('start: "the next one"')


def test_without_the_proof_such_a_grammar_ends_the_process() -> None:
    """The control: what would happen to a server with 700 MiB and six seconds."""
    script = (
        "import resource, sys; from llguidance import LLMatcher, LLTokenizer;"
        "resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20));"
        "resource.setrlimit(resource.RLIMIT_CPU, (6, 6));"
        "tokenizer, grammar = sys.stdin.read().split(chr(0));"
        "LLMatcher(LLTokenizer(tokenizer), grammar, log_level=0).compute_bitmask()"
    )
    backend = TOKENIZER.backend_tokenizer.to_str()
    ended = subprocess.run(
        [sys.executable, "-c", script],
        input=f"{backend}\0{DOUBLING}", text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (-signal.SIGABRT, -signal.SIGXCPU, -signal.SIGKILL), ended.stderr


def test_a_proof_is_made_once(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    assert compiler._prover is not None
    monkeypatch.setattr(compiler._prover, "refusal", asked.append)
    for _ in range(3):
        compiler.check('start: "b"')
        compiler.matcher('start: "b"')
    assert asked == ['start: "b"']


def test_the_process_is_started_again_if_it_ends(compiler: GrammarCompiler) -> None:
    pid = process_of()
    os.kill(pid, signal.SIGKILL)
    compiler.check('start: "c"')
    assert process_of() != pid


def test_a_process_that_cannot_be_started_is_no_fault_of_the_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.close()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(GenerationError, match="does not run"):
        compiler.check('start: "e"')
    monkeypatch.undo()
    compiler.check('start: "e"')


def test_closing_ends_the_process(compiler: GrammarCompiler) -> None:
    pid = process_of()
    compiler.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_grammar_too_many_is_refused_and_does_not_wait(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_SUBMITTED", 3)
    may_go_on = threading.Event()
    monkeypatch.setattr(compiler, "check", lambda _: may_go_on.wait(LIMIT_S))
    waiting = [compiler.submit_check(f'start: "{i}"') for i in range(3)]
    with pytest.raises(QueueFull, match="3 grammars"):
        compiler.submit_check('start: "d"')
    may_go_on.set()
    assert all(future.result(LIMIT_S) for future in waiting)
    assert compiler.submit_check('start: "d"').result(LIMIT_S)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: " + " ".join("a?" for _ in range(5000)) + '\na: "x"',
        grammar_from("regex", "(a*)*" * 3000),
    ],
)
def test_what_fails_after_the_first_token_is_refused_at_the_door(
    compiler: GrammarCompiler, grammar: str
) -> None:
    with pytest.raises(BadRequest, match="grammar failed"):
        compiler.check(grammar)


def test_what_fails_later_is_the_grammars_fault_and_said_so(compiler: GrammarCompiler) -> None:
    grammar = grammar_from("regex", "((((a{0,30}){0,30}){0,30}){0,30}){1,30}")
    compiler.check(grammar)
    matcher, a = compiler.matcher(grammar), TOKENIZER.encode("a")[0]

    def write() -> None:
        for _ in range(500):
            assert a in allowed(matcher)
            matcher.advance(a)

    with pytest.raises(GrammarFailed, match="too many expressions") as failure:
        write()
    assert (failure.value.status, failure.value.code) == (400, "grammar_failed")
