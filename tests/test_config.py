"""Settings: which layer wins, and that every bad or unknown value is refused by its own name."""

from pathlib import Path

import pytest

from server.config import ConfigError, Settings, flag, variable
from server.environment import default_database, load_settings


def problems(**layers: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(**{"environ": {}, **layers})
    return str(caught.value).splitlines()


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "fathom.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_need_no_environment_and_no_file() -> None:
    assert load_settings(environ={}) == Settings()


def test_construction_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_PORT", "1234")
    assert Settings().port == 8000
    assert load_settings().port == 1234


def test_command_line_beats_environment_beats_toml_beats_default(toml) -> None:
    file = toml("port = 1\nmax_n = 1\nmax_logprobs = 1\n")
    environ = {"FATHOM_PORT": "2", "FATHOM_MAX_N": "2"}
    settings = load_settings({"port": "3"}, config_file=file, environ=environ)
    assert (settings.port, settings.max_n, settings.max_logprobs) == (3, 2, 1)
    assert settings.max_num_seqs == Settings().max_num_seqs


def test_the_file_may_be_named_by_the_environment(toml) -> None:
    environ = {"FATHOM_CONFIG": str(toml("port = 7\n"))}
    assert load_settings(environ=environ).port == 7


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_read_from_each_layer(name: str, toml, tmp_path: Path) -> None:
    texts = {
        "adapter": "a=x",
        "adapter_root": str(tmp_path),
        "console": "false",
        "adapter_source": "hf://my-org,s3://bucket/adapters",
        "cors_origin": "https://a.example,http://localhost:3000",
        "data_root": str(tmp_path),
        "device": "cpu",
        "dtype": "bfloat16",
        "calibration_share": "0.5",
        "default_depth": "full",
        "resident_depth": "auto",
        "log_format": "json",
        "log_level": "error",
        "log_prompts": "true",
        "prefix_caching": "false",
        "quantization": "int8",
        "cuda_graphs": "false",
        "insecure": "true",
        "kv_cache_bytes": "2GiB",
        "max_body_bytes": "1MiB",
    }
    annotation = str(Settings.model_fields[name].annotation)
    text = texts.get(name, "99" if "int" in annotation or "float" in annotation else "word")
    from_env = load_settings(environ={variable(name): text})
    from_flag = load_settings({name: text}, environ={})
    from_toml = load_settings(environ={}, config_file=toml(f'{name} = "{text}"\n'))
    assert from_env == from_flag == from_toml
    assert from_env != Settings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("65536", 65536),
        ("100kb", 100_000),
        ("64 KiB", 65536),
        ("1.5GiB", 3 << 29),
        ("2tib", 2 << 40),
    ],
)
def test_sizes_take_units(text: str, expected: int) -> None:
    assert load_settings({"kv_cache_bytes": text}, environ={}).kv_cache_bytes == expected


@pytest.mark.parametrize("text", ["2G", "1,5GiB", "2GiB ram", "-1GiB", "", "GiB"])
def test_a_size_that_cannot_be_read_is_refused(text: str) -> None:
    (problem,) = problems(flags={"kv_cache_bytes": text})
    assert problem.startswith("--kv-cache-bytes: should be a number of bytes")


@pytest.mark.parametrize(
    "value", ["a=x,b=y/z", '{"a": "x", "b": "y/z"}', ["a=x", "b=y/z"], {"a": "x", "b": "y/z"}]
)
def test_adapters_are_named_paths(value: object) -> None:
    settings = load_settings({"adapter": value}, environ={})
    assert settings.adapter == {"a": Path("x"), "b": Path("y/z")}


@pytest.mark.parametrize("value", ["a", "a=", "=x", "a=x,a=y", "a@3=x", "two words=x", "{nope"])
def test_an_adapter_that_cannot_be_asked_for_is_refused(value: str) -> None:
    (problem,) = problems(environ={"FATHOM_ADAPTER": value})
    assert problem.startswith("FATHOM_ADAPTER: ")


def test_a_bad_value_names_the_layer_it_came_from(toml) -> None:
    file = toml("port = 1\nmax_n = 0\n[adapter]\na = 3\n")
    found = problems(flags={"device": "tpu"}, environ={"FATHOM_PORT": "70000"}, config_file=file)
    assert sorted(line.partition(": ")[0] for line in found) == sorted(
        ["--device", "FATHOM_PORT", str(file), str(file)]
    )
    text = "\n".join(found)
    assert f"{file}: max_n: should be greater than or equal to 1 (given 0)" in text
    assert f"{file}: adapter.a: " in text
    assert "FATHOM_PORT: should be less than or equal to 65535 (given '70000')" in text
    assert "--device: should be 'auto', 'cpu' or 'cuda' (given 'tpu')" in text


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    assert problems(environ={"FATHOM_PROT": "1"}) == [
        "FATHOM_PROT: is no setting; did you mean FATHOM_PORT?"
    ]


def test_a_kubernetes_service_link_is_explained() -> None:
    (problem,) = problems(environ={"FATHOM_SERVICE_HOST": "10.0.0.1"})
    assert "enableServiceLinks" in problem


def test_an_unknown_toml_key_is_refused_with_the_nearest_name(toml) -> None:
    file = toml("max-model-len = 64\n")
    assert problems(config_file=file) == [
        f"{file}: max-model-len: is no setting; did you mean max_model_len?"
    ]


def test_a_toml_file_that_cannot_be_read_is_refused(toml, tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert problems(config_file=missing) == [
        f"{missing}: cannot be read: No such file or directory"
    ]
    broken = toml("port =")
    assert problems(config_file=broken)[0].startswith(f"{broken}: is not valid TOML")
    assert problems(environ={"FATHOM_CONFIG": ""})[0].startswith("FATHOM_CONFIG: is empty")


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_an_empty_key_is_refused_and_no_key_is_ever_shown(name: str, toml) -> None:
    assert problems(environ={variable(name): ""})[0].startswith(variable(name))
    (problem,) = problems(config_file=toml(f"{name} = 90210\n"))
    assert "90210" not in problem
    assert "hush" not in repr(load_settings({name: "hush"}, environ={}))


def test_a_boolean_is_not_taken_for_a_number(toml) -> None:
    file = toml("port = true\n")
    assert problems(config_file=file) == [f"{file}: port: should not be a boolean (given True)"]


@pytest.mark.parametrize("name", ["adapter_root", "data_root"])
def test_a_root_must_be_a_directory(name: str, tmp_path: Path) -> None:
    (problem,) = problems(flags={name: str(tmp_path / "missing")})
    assert problem.startswith(f"{flag(name)}: ")


def test_a_database_may_hold_a_password_and_is_never_shown() -> None:
    url = "postgresql://fathom:hunter2@host/fathom"
    settings = Settings(database=url)
    assert settings.database is not None
    assert settings.database.get_secret_value() == url
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("state", "folder"), [("/var/state", Path("/var/state")), ("relative", None), (None, None)]
)
def test_the_default_database_lies_in_the_users_state_directory(
    state: str | None, folder: Path | None
) -> None:
    environ = {} if state is None else {"XDG_STATE_HOME": state}
    expected = (folder or Path.home() / ".local" / "state") / "fathom" / "fathom.db"
    assert default_database(environ) == expected


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_flags_are_spelled_with_hyphens() -> None:
    assert flag("max_model_len") == "--max-model-len"
    assert flag("model") == "MODEL"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter": ["x=hf://org"]}, "--adapter.x: should be hf://ORG/NAME"),
        ({"adapter": ["x=s3://key:secret@bucket/x"]}, "--adapter.x: should be s3://BUCKET"),
        ({"adapter": ["x=gs://bucket/x"]}, "adapter_scheme does not allow"),
        ({"adapter_source": ["hf://"]}, "--adapter-source: should name an organisation"),
        ({"adapter_scheme": ["s3"]}, "--adapter-scheme: is known already"),
        ({"adapter_scheme": ["gs://"]}, "--adapter-scheme: should be schemes such as gs"),
    ],
)
def test_a_place_that_is_none_is_refused_without_what_may_be_a_key(given, words: str) -> None:
    (found,) = problems(flags=given)
    assert words in found
    assert "secret" not in found


def test_an_adapter_lies_here_or_elsewhere() -> None:
    settings = load_settings(
        {"adapter": ["a=x", "b=hf://org/name@v1", "c=gs://bucket/x"], "adapter_scheme": ["gs"]},
        environ={},
    )
    assert [str(place) for place in settings.adapter.values()] == [
        "x",
        "hf://org/name@v1",
        "gs://bucket/x",
    ]
    with pytest.raises(ConfigError, match="'b' must be a directory here"):
        settings.adapter_paths()
