"""The harness fails a page that fails: each kind of mistake is made on purpose, and seen."""

from pathlib import Path

import psutil
import pytest

from tests.docs.command_lines import problems
from tests.docs.page import Block, PageError, blocks
from tests.docs.session import BlockFailed, run_page

# Answers `/ready` like a server does, and takes note of how it ends.
SERVE = """
import http.server, signal, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"here")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))
open("pid", "w").write(str(__import__("os").getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Ready).serve_forever()
"""


def page(tmp_path: Path, text: str) -> list[Block]:
    (tmp_path / "page.md").write_text(text)
    return blocks("page.md", tmp_path)


def run(tmp_path: Path, text: str) -> str:
    return run_page(page(tmp_path, text), tmp_path)


def fenced(*blocks: str) -> str:
    return "\n".join(f"```{block}\n```\n" for block in blocks)


def test_blocks_share_a_shell_an_interpreter_and_a_directory(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        fenced(
            "sh\nA=kept; export B=given; mkdir sub; cd sub; echo x > file",
            "python\nimport os\nseen = open('file').read().strip() + os.environ['B']",
            'sh\necho "$A"',
            "python\nprint(seen + ' too')",
        ),
    )
    assert output.split() == ["kept", "xgiven", "too"]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sh\nfalse\ntrue", "failed: false"),
        ("sh\nfalse | cat\ntrue", "failed: "),
        ("sh\nx=$(false)\ntrue", "failed: x="),
        ("sh\necho $NOWHERE", "unbound"),
        ("sh\nfathom doctor --no-such-flag", "no-such-flag"),
        ("sh\nno-such-command", "not found"),
        ("sh\nexit 3", ""),
        ("python\nassert 1 == 2", "AssertionError"),
        ("python\nimport nowhere", "ModuleNotFoundError"),
        ("python\nraise SystemExit", ""),
    ],
)
def test_a_block_that_fails_fails_the_page(tmp_path: Path, block: str, reason: str) -> None:
    with pytest.raises(BlockFailed, match=r"page\.md:6: this block failed") as failure:
        run(tmp_path, fenced("sh\necho before", block, "sh\necho after"))
    assert reason in str(failure.value)
    assert "after" not in str(failure.value)


def server(*, status: int = 0, last: str = "") -> str:
    code = f"sh\ncat > serve.py <<'EOF'{SERVE.replace('STATUS', str(status))}EOF"
    return fenced(code, f"sh\npython serve.py --port 8000 &\ncurl -s http://127.0.0.1:8000/x{last}")


def has_ended(tmp_path: Path) -> bool:
    try:
        server = psutil.Process(int((tmp_path / "work" / "pid").read_text()))
        _, alive = psutil.wait_procs([server], timeout=10)
        return alive == [] or server.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_server_is_waited_for_and_ended_on_a_port_of_its_own(tmp_path: Path) -> None:
    assert run(tmp_path, server()) == "here"
    assert has_ended(tmp_path)


def test_a_server_is_ended_when_a_block_fails(tmp_path: Path) -> None:
    with pytest.raises(BlockFailed, match="failed: false"):
        run(tmp_path, server(last="; false"))
    assert has_ended(tmp_path)


def test_a_server_that_ends_badly_fails_the_page(tmp_path: Path) -> None:
    with pytest.raises(BlockFailed, match="a server ended with status 7"):
        run(tmp_path, server(status=7))


def test_a_server_that_does_not_start_fails_the_page(tmp_path: Path) -> None:
    with pytest.raises(BlockFailed, match="ended before it was ready"):
        run(tmp_path, fenced("sh\npython serve.py --port 8000 \\\n  --more &\necho on"))


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("```\nfathom serve\n```\n", "in no language"),
        ("```bash\nfathom serve\n```\n", "in bash"),
        ("Text:\n\n    fathom serve\n", "indented"),
        ("<!-- not run: -->\n```sh\nx\n```\n", "should be"),
        ("<!-- not run -->\n```sh\nx\n```\n", "should be"),
        ("<!-- not run: no GPU -->\n\n```sh\nx\n```\n", "not right above"),
        ("<!-- not run: no GPU -->\nText\n", "not right above"),
        ("<!-- not run: no GPU -->\n\nText\n", "not right above"),
        ("<!-- not run: no GPU -->\n", "not right above"),
        ("<!-- not run: no GPU -->\n```text\nx\n```\n", "only shown"),
    ],
)
def test_a_page_whose_blocks_cannot_be_told_apart_is_refused(
    tmp_path: Path, text: str, mistake: str
) -> None:
    with pytest.raises(PageError, match=mistake):
        page(tmp_path, text)


def test_a_marked_block_is_not_run_and_keeps_its_reason(tmp_path: Path) -> None:
    text = "<!-- not run: needs a GPU -->\n```sh\nfalse\n```\n" + fenced("sh\necho ran")
    assert [block.not_run for block in page(tmp_path, text)] == ["needs a GPU", None]
    assert run(tmp_path, text) == "ran\n"


def test_a_command_may_stand_in_for_a_block(tmp_path: Path) -> None:
    text = "<!-- not run: installs;\ninstead: echo stood in -->\n```sh\nfalse\n```\n"
    assert run(tmp_path, text) == "stood in\n"
    text = text.replace("echo stood in", "false")
    (tmp_path / "again").mkdir()
    with pytest.raises(BlockFailed, match=r"page\.md:4: this block failed"):
        run(tmp_path / "again", text)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("fathom serve ./llama --max-lora 3", "--max-lora"),
        ("A=b nohup fathom serve --dtype float99 > log 2>&1 &", "float99"),
        ("KEY=$(fathom keys ad ada)", "keys ad"),
        (".venv/bin/fathom calibrate \\\n  --no-such 3", "--no-such"),
        ("for x in 1 2; do fathom export $x --depth 3; done", "--out"),
        ("echo 'it' && python -m server doctor --jsn", "--jsn"),
        ("make serv", "no target 'serv'"),
        ("python -m server.bench.scalin depth", "server.bench.scalin"),
        ("pytest tests/no_such.py -m slow", "tests/no_such.py"),
    ],
)
def test_a_command_that_could_not_run_is_found(line: str, problem: str) -> None:
    (found,) = problems(line)
    assert problem in found


def test_what_is_no_command_is_left_alone() -> None:
    assert problems("# it's fathom --nonsense\nfathom doctor --json  # fathom --x\n") == []
    assert problems('curl x -d \'{\n"fathom": "--x"}\' | grep fathom\nmake test PYTHON=x') == []
    assert (
        problems("cat > a <<EOF\nfathom --nonsense isn't\nEOF\nfathom --version > fathom\n") == []
    )
