"""torch's compiler waits, and whoever needs it has it, marks and all. Each runs in a Python of its own."""

import subprocess
import sys

import pytest

from server.model import waiting_compiler

WAIT = """
import sys
sys.modules["torchao"] = None  # as if it were not installed: transformers imports it, and it compiles
from server.model import waiting_compiler
assert waiting_compiler.wait()
assert waiting_compiler.is_waiting()
"""

MARKED = """
import torch
@torch._dynamo.assume_constant_result
def constant():
    return 3
def allowed(x):
    return x + 1
torch._dynamo.allow_in_graph(MARK)
@torch.compiler.disable
def disabled(x):
    assert not torch.compiler.is_compiling()
    return x + 1
def plain(x):
    return x
"""

COMPILED = """
compiled = torch.compile(lambda x: disabled(allowed(x)) * constant(), backend="eager")
assert compiled(torch.zeros(2)).tolist() == [6, 6]
assert not waiting_compiler.is_waiting()
assert torch._dynamo is sys.modules["torch._dynamo"]
assert constant._dynamo_marked_constant
from torch._dynamo.trace_rules import is_callable_allowed
assert is_callable_allowed(allowed)
assert not is_callable_allowed(plain)
"""


def marked(argument: str = "allowed") -> str:
    """`MARKED` with its second mark called so."""
    return MARKED.replace("MARK", argument)


def run(*code: str) -> str:
    words = [sys.executable, "-c", "".join(code)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_marks_are_kept_for_who_compiles() -> None:
    run(WAIT, marked(), "assert waiting_compiler.is_waiting()\n", COMPILED)


def test_without_waiting_they_are_the_same() -> None:
    run("import sys\nfrom server.model import waiting_compiler\n", marked(), COMPILED)


@pytest.mark.parametrize("marks", ["()", "('allow_in_graph',)"])
def test_a_mark_that_is_not_known_is_no_mark(marks: str) -> None:
    run(
        WAIT,
        f"waiting_compiler._MARKS = {marks}\n",
        marked(),
        "assert not waiting_compiler.is_waiting()\n",
        COMPILED,
    )


def test_a_mark_by_keyword_is_the_real_ones_business() -> None:
    run(
        WAIT,
        marked("fn=allowed"),
        "assert not waiting_compiler.is_waiting()\n",
        COMPILED,
    )


def test_a_function_that_is_not_to_be_compiled_runs() -> None:
    run(WAIT, marked(), "assert disabled(torch.zeros(1)).item() == 1\n", COMPILED)


@pytest.mark.parametrize("name", ["config", "variables.builder", "_trace_wrapped_higher_order_op"])
def test_a_module_of_it_is_imported_once(name: str) -> None:
    run(
        WAIT,
        f"import torch._dynamo.{name} as first\n",
        f"spec = first.__spec__.origin\nimport torch\nimport torch._dynamo.{name} as second\n",
        "import gc\nmodules = [o for o in gc.get_objects() if isinstance(o, type(sys))]\n",
        f"assert sum(m.__dict__.get('__name__') == 'torch._dynamo.{name}' for m in modules) == 1\n",
        "from torch._dynamo import eval_frame\n",
        f"assert first is second is sys.modules['torch._dynamo.{name}'] is torch._dynamo.{name}\n",
        "assert spec == first.__file__ == first.__spec__.origin\n",
        "assert not waiting_compiler.is_waiting()\n",
    )


def test_who_holds_what_waits_has_the_real_one() -> None:
    run(
        WAIT,
        "from torch import _dynamo as held\n",
        "assert not hasattr(held, '__of_no_module__') and waiting_compiler.is_waiting()\n",
        "import torch\nassert held.config is torch._dynamo.config\n",
        "assert held.disable(len)([1]) == 1\n",
        "assert not hasattr(held, 'of_no_module')\n",
    )


def test_where_its_module_is_not_alone_it_is_imported_as_ever() -> None:
    run(
        "import sys\nfrom server.model import waiting_compiler\n",
        "waiting_compiler._ALONE = 'utils'\nassert not waiting_compiler.wait()\n",
        "assert 'torch._dynamo' not in sys.modules\n",
        "assert not any(isinstance(f, waiting_compiler._Finder) for f in sys.meta_path)\n",
        marked(),
        COMPILED,
    )


def test_transformers_alone_is_told_that_nothing_is_distributed() -> None:
    run(
        WAIT,
        "import torch\nfrom transformers.utils import is_torch_distributed_available as ask\n",
        "assert torch.distributed.is_available() and not ask()\n",
        "from transformers import LlamaForCausalLM\n",
        "assert waiting_compiler.is_waiting() and 'sympy' not in sys.modules\n",
    )


def test_it_does_not_wait_where_transformers_has_it() -> None:
    import transformers.modeling_utils  # noqa: F401 -- as another test may or may not have

    assert not waiting_compiler.wait()
    assert not waiting_compiler.is_waiting()
