"""Bodies from hypothesis for every route that takes one: near enough to right ones to get far.

A body starts from one that is served. Some of its fields are replaced by values that are right for
them, by values that are right for others, or by anything; sometimes its bytes are damaged at last.
"""

import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

from server.api.schemas import ChatRequest, CompletionRequest
from tests.containment.served import ADAPTERS


class Sent(NamedTuple):
    """One request as it is sent."""

    method: str
    path: str
    content: bytes
    headers: dict[str, str]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["tiny", *ADAPTERS, "auto", "full", "user", "text", "function", "x" * 3000])
)
WORDS = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "schema", "json_schema", "regex"]
) | st.text(max_size=4)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)

PATTERNS = st.text("ab()[]{}*+?|\\^$.-,0123wdpLé", max_size=14) | st.sampled_from(
    ["[a-z]{1,9}", "(a|b)*a(a|b){25}", "(a{0,30}){0,30}", r"\p{L}+", "(a*)*", r"\w*" * 40]
)
_SCHEMAS = st.deferred(
    lambda: st.dictionaries(
        st.sampled_from(
            [
                *("type", "properties", "items", "enum", "pattern", "minLength", "anyOf", "$ref"),
                *("required", "additionalProperties", "maxItems", "multipleOf", "const", "format"),
            ]
        ),
        st.sampled_from(["object", "string", "integer", "array", "date-time", "#", "#/a"])
        | PATTERNS
        | st.integers(-2, 40)
        | st.lists(st.sampled_from(["a", "b", 1, None]), max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b"]), _SCHEMAS, max_size=2)
        | _SCHEMAS
        | st.lists(_SCHEMAS, max_size=2),
        max_size=3,
    )
)
_LARK = st.lists(
    st.sampled_from(
        [
            *("start: a", "a: /[a-z]+/", 'a: "x" | a a', "B: /b*/ B", 'root ::= "a" root?'),
            *("start: a{3,9}", "a: <eos>", "%json {}", "start: %regex {}", "\n\n"),
            "a[max_tokens=3]: /.*/",
        ]
    )
    | st.text(max_size=9),
    max_size=4,
).map("\n".join)
_MODELS = st.builds(
    "{}{}".format,
    st.sampled_from(["tiny", "tiny:tuned", "nobody", *ADAPTERS]),
    st.sampled_from(["", "@0", "@2", "@4", "@full", "@auto", "@5", "@", "@-1"]),
)
_TEXTS = st.text(max_size=30)
_IDS = st.lists(st.integers(-1, 270), max_size=9)
_TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["look", "wait"]), "parameters": _SCHEMAS}
        ),
    }
)
_CALL = st.fixed_dictionaries(
    {
        "id": _TEXTS,
        "function": st.fixed_dictionaries(
            {"name": st.just("look"), "arguments": _TEXTS | st.just('{"at": "\\ud800"}') | PATTERNS}
        ),
    }
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "king"])},
        optional={"content": _TEXTS, "name": _TEXTS, "tool_calls": st.lists(_CALL, max_size=2)},
    ),
    max_size=3,
)
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "model": _MODELS,
    "lora_depth": st.sampled_from([0, 1, 4, "auto", "full"]),
    "prompt": _TEXTS | _IDS | st.lists(_TEXTS, max_size=3) | st.lists(_IDS, max_size=3),
    "messages": _MESSAGES,
    "tools": st.lists(_TOOL, min_size=1, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required"])
    | st.just({"type": "function", "function": {"name": "look"}}),
    "structured_outputs": st.fixed_dictionaries({"regex": PATTERNS})
    | st.fixed_dictionaries({"grammar": _LARK})
    | st.fixed_dictionaries({"json": _SCHEMAS | _TEXTS})
    | st.fixed_dictionaries({"choice": st.lists(_TEXTS, max_size=3)}),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}])
    | st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries({"name": st.just("x"), "schema": _SCHEMAS}),
        }
    ),
    "max_tokens": st.integers(0, 9),
    "max_completion_tokens": st.integers(0, 9),
    "min_tokens": st.integers(0, 9),
    "temperature": st.floats(0, 5),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63),
    "n": st.integers(0, 4),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stop_token_ids": _IDS,
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(1e-6, 10),
    "logit_bias": st.dictionaries(st.integers(0, 270).map(str), st.floats(-100, 100), max_size=4),
    "logprobs": st.integers(0, 6) | st.booleans(),
    "top_logprobs": st.integers(0, 6),
    "prompt_logprobs": st.integers(0, 6),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "metadata": st.dictionaries(_TEXTS, _TEXTS, max_size=2),
    "lora_name": _TEXTS | st.sampled_from(["new", "../x", "a/b"]),
    "lora_path": _TEXTS | st.sampled_from(["tuned", "deep", "..", "/etc", "/dev/zero", "."]),
    "path": _TEXTS | st.sampled_from(["tuned", "deep", "..", "/etc/passwd", "tuned/.."]),
    "load_inplace": st.booleans(),
    "dataset": st.fixed_dictionaries({"file": _TEXTS | st.sampled_from(["fathom.db", "..", "/"])})
    | st.fixed_dictionaries(
        {
            "samples": st.lists(
                st.fixed_dictionaries({"prompt": _TEXTS, "completion": _TEXTS}), max_size=3
            )
        }
    ),
    "metric": st.sampled_from(["log_likelihood", "kl_to_full", "regex_answer", "rouge_l"]),
    "pattern": PATTERNS,
    "tolerance": st.floats(0, 1) | st.just({"share_of_gain": 0.1}),
    "depth": st.integers(-1, 6),
    "reason": _TEXTS,
    "tokens": _IDS,
}


class _Route(NamedTuple):
    method: str
    path: str
    body: dict[str, Any]
    fields: tuple[str, ...]
    weight: int = 1


_LOAD = ("lora_name", "lora_path", "load_inplace", "lora_int_id")
_RECALIBRATE = ("dataset", "metric", "pattern", "tolerance", "max_tokens", "seed", "dry_run")
ROUTES = [
    _Route(
        "POST",
        "/v1/completions",
        {"model": "tuned", "prompt": "a", "max_tokens": 4},
        (*CompletionRequest.model_fields, *CompletionRequest.unsupported),
        weight=8,
    ),
    _Route(
        "POST",
        "/v1/chat/completions",
        {"model": "tuned", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
        (*ChatRequest.model_fields, *ChatRequest.unsupported),
        weight=8,
    ),
    _Route("POST", "/tokenize", {"prompt": "a"}, ("prompt", "messages", "tools", "model")),
    _Route("POST", "/detokenize", {"tokens": [65]}, ("tokens", "model")),
    _Route("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "tuned"}, _LOAD),
    _Route("POST", "/v1/unload_lora_adapter", {"lora_name": "new"}, _LOAD),
    _Route("PUT", "/admin/adapters/new", {"path": "deep"}, ("path", "replace")),
    _Route(
        "PUT", "/admin/adapters/deep/boundary", {"depth": 4, "reason": "x"}, ("depth", "reason")
    ),
    _Route(
        "POST",
        "/admin/adapters/tuned/recalibrate",
        {"dataset": {"samples": []}, "dry_run": True},
        _RECALIBRATE,
    ),
    _Route("POST", "/admin/adapters/tuned/boundaries/1/activate", {}, ("reason",)),
]


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """One request to any of the routes."""
    route = draw(st.sampled_from([route for route in ROUTES for _ in range(route.weight)]))
    body = dict(route.body)
    known = [name for name in route.fields if name in RIGHT]
    for name in draw(st.lists(st.sampled_from(known), max_size=4)):
        body[name] = draw(RIGHT[name] if draw(st.integers(0, 7)) else ANYTHING)
    if not draw(st.integers(0, 9)):
        body[draw(st.sampled_from(route.fields) | WORDS)] = draw(ANYTHING)
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if not draw(st.integers(0, 11)):  # the same with damage
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4) | st.just(b"[" * 9000)) + content[at:]
        headers |= draw(
            st.sampled_from(
                [
                    {},
                    {"content-type": "text/plain"},
                    {"content-type": "application/json; charset=x"},
                    {"x-request-id": "a b"},
                    {"accept-encoding": "nothing", "range": "bytes=0-"},
                ]
            )
        )
    return Sent(route.method, route.path, content, headers)
