"""`python -m server.docs`: write the pages and the picture that are made, or check them.

They are what the OpenAPI document, the settings and the picture's own numbers say, and a test holds
them to it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from server import command_line
from server.docs.api_reference import api_reference, openapi_document
from server.docs.depth_picture import depth_picture
from server.docs.settings_reference import settings_reference

FOLDER = Path(__file__).parent

app = App(name="docs", help="Write the documents that are made from the code.")


def made() -> Mapping[str, str]:
    """Every file that is made, by name. Loads the demo, whose server has every route."""
    return {
        "api.md": api_reference(openapi_document()),
        "settings.md": settings_reference(),
        "depth.svg": depth_picture(),
    }


@app.default
def docs(
    *,
    out: Annotated[Path, Parameter(help="Directory to write to.")] = FOLDER,
    check: Annotated[
        bool, Parameter(negative=(), help="Write nothing; name what differs, status 1.")
    ] = False,
) -> int:
    """Write what is made, or check it."""
    wrong = 0
    for name, text in made().items():
        path = out / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{path}: differs from what `python -m server.docs` writes\n")
            wrong = 1
    return wrong


if __name__ == "__main__":
    command_line.run(app)
