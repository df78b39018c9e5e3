"""Whether a grammar can be compiled within limits, found out in a process that may die of it.

llguidance bounds its work by numbers of expressions and states, and not by what these take: 300
characters of Lark, or `\\w*` written 15,000 times, take gigabytes within seconds, and an allocation
that fails there ends the process. So each grammar that is new is compiled once by a forked child
with a limit on memory and processor time, before `grammar` compiles it where requests are served.

The parent talks to one small process, which holds the tokenizer and little else, and which forks a
child a grammar. Run as a module this file is that process; it imports neither torch nor transformers.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import NoReturn

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_COMPILE_S = 1.0
"""Processor time: large schemas take a tenth of it."""
MAX_COMPILE_BYTES = 256 << 20
"""Memory that compiling may take at its peak: large schemas take a tenth of it."""
NUM_REHEARSED = 8
"""Tokens that are walked into a grammar, as some outgrow their limits only then."""

LIMITS = LLParserLimits(verbose_errors=False)

_FITS, _TOO_LARGE, _TOO_SLOW, _CRASHES = b"fits", b"too large", b"too slow", b"crashes"
REASONS = {
    _TOO_LARGE: f"compiling it takes more memory than the limit of {MAX_COMPILE_BYTES >> 20} MiB",
    _TOO_SLOW: f"compiling it takes longer than the limit of {MAX_COMPILE_S:g} s",
    _CRASHES: "it crashes its compiler",
}


class GrammarProver:
    """Proves grammars, one after the other, on whichever thread asks."""

    def __init__(self, tokenizer_json: str, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer_json.encode()
        self._eos = ",".join(map(str, eos_token_ids)).encode()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._end: Callable[[], object] = lambda: None

    def refusal(self, grammar: str) -> str | None:
        """Why a grammar must not be compiled here; None if it may be, whether or not it is right.

        Raises OSError where the process cannot be started.
        """
        with self._lock:
            for _ in range(2):  # once more with a new process, if somebody ended the old one
                try:
                    connection = self._connection or self._start()
                    connection.send_bytes(grammar.encode())
                    return REASONS.get(connection.recv_bytes())
                except (EOFError, OSError) as error:
                    self._stop()
                    problem = error
        raise OSError(f"the process that compiles grammars first does not run: {problem!r}")

    def close(self) -> None:
        """End the process; it would be started again."""
        with self._lock:
            self._stop()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # Rust's last words when memory ends
            start_new_session=True,  # an interrupt of the terminal is the server's business
        )
        theirs.close()
        self._connection = ours
        self._end = weakref.finalize(self, _end, ours, process)
        ours.send_bytes(self._tokenizer)
        ours.send_bytes(self._eos)
        return ours

    def _stop(self) -> None:
        self._end()
        self._connection = None


def rehearse(matcher: LLMatcher, eos_tokens: list[int]) -> str | None:
    """Walk a few tokens into a grammar. What llguidance says if it gives up on the way."""
    ends = set(eos_tokens)
    for _ in range(NUM_REHEARSED):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error()
        if matcher.is_stopped():
            return None
        token_id = next(
            (
                8 * index + bit
                for index, byte in enumerate(mask)
                if byte
                for bit in range(8)
                if byte >> bit & 1 and 8 * index + bit not in ends
            ),
            None,
        )
        if token_id is None:
            return None
        if not matcher.consume_token(token_id):
            return matcher.get_error()
    return None


def _end(connection: Connection, process: "subprocess.Popen[bytes]") -> None:
    connection.close()
    process.kill()
    process.wait()


def _serve(connection: Connection) -> None:
    """Answer grammars until the parent is gone."""
    tokenizer_json = connection.recv_bytes().decode()
    eos = [int(token_id) for token_id in connection.recv_bytes().split(b",") if token_id]
    tokenizer = LLTokenizer(tokenizer_json, eos_token=eos or None)
    while True:
        try:
            grammar = connection.recv_bytes().decode()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _compile(grammar, tokenizer)
        _, status = os.waitpid(child, 0)
        how: dict[int, bytes] = {
            signal.SIGPROF: _TOO_SLOW,
            signal.SIGABRT: _TOO_LARGE,  # how Rust ends when memory does
            signal.SIGKILL: _TOO_LARGE,  # how Linux ends whoever takes the last of it
        }
        is_killed = os.WIFSIGNALED(status)
        connection.send_bytes(how.get(os.WTERMSIG(status), _CRASHES) if is_killed else _FITS)


def _compile(grammar: str, tokenizer: LLTokenizer) -> NoReturn:
    """In the child: what the server will do, within limits, one of which may end the process."""
    try:
        _limit_memory(MAX_COMPILE_BYTES)
        signal.setitimer(signal.ITIMER_PROF, MAX_COMPILE_S)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            rehearse(matcher, tokenizer.eos_tokens)
    finally:
        os._exit(0)


def _limit_memory(more: int) -> None:
    """Bytes that this process may still take. Where there is no /proc (macOS) nothing limits them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
