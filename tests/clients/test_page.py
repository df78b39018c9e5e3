"""The page on clients and the README: blocks that need these tools run in order, against this server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import server.docs
from tests.live.process import LiveServer

PAGE = Path(server.docs.__file__).with_name("clients.md")
README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(
    r"^<!-- not run: needs the extra `clients`[^\n]*-->\n```(sh|python)\n(.*?)^```$", re.M | re.S
)


@pytest.mark.parametrize(("page", "num_blocks"), [(PAGE, 5), (README, 1)], ids=["page", "README"])
def test_its_blocks_run(server: LiveServer, tmp_path: Path, page: Path, num_blocks: int) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) == num_blocks
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks:
        if code.startswith("pip install"):
            continue  # which is how this environment was made
        # This server, unlike a reader's, wants a key; where code names none it is in the environment.
        code = code.replace("http://127.0.0.1:8000", server.url)
        code = code.replace('api_key="none", ', "").replace(', api_key="none"', "")
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
