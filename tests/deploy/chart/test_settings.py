"""The server takes the settings that the chart writes, as they were meant."""

import tomllib
from pathlib import Path

import pytest

from server.config import CONFIG_VARIABLE, ENV_PREFIX, Settings, variable
from server.environment import load_settings
from tests.deploy.chart import manifests as look
from tests.deploy.chart.container import settings_of
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.values import FILES, at, load, merged


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_server_takes_the_settings(helm: Helm, path: Path, tmp_path: Path) -> None:
    """Every variable, and a file that `load_settings` reads to what the values say."""
    values = load(path)
    made = helm.manifests(values)
    given = {
        name for name in look.environment(look.container_of(made)) if name.startswith(ENV_PREFIX)
    }
    assert given <= {CONFIG_VARIABLE, *map(variable, Settings.model_fields)}
    settings = settings_of(made, tmp_path).model_dump()
    for name, value in values.get("settings", {}).items():
        found = settings[name]
        if name in ("adapter_root", "adapter_cache", "data_root"):
            assert found == tmp_path / value.lstrip("/")
        elif name == "adapter":
            assert found == {key: tmp_path / each.lstrip("/") for key, each in value.items()}
        elif name == "model" and value.startswith("/"):
            assert found == str(tmp_path / value.lstrip("/"))
        elif name.endswith("_bytes") and isinstance(value, str):
            assert found == int(value.removesuffix("iB")[:-1]) << {"M": 20, "G": 30}[value[-3]]
        else:
            assert found == (tuple(value) if isinstance(value, list) else value), name
    secrets = values.get("secrets", {})
    assert (settings["admin_key"] is not None) == ("adminKey" in secrets)
    assert (settings["keys_file"] is not None) == ("keysFile" in secrets)
    assert (settings["database"] is not None) == ("database" in secrets)


def test_a_file_says_what_toml_says_also_of_words_that_need_quotes(helm: Helm) -> None:
    words = 'a "quoted" \\ <b> & \u00e9 \u65e5 line\nnext'
    values = at("settings.served_model_name", words)
    read = tomllib.loads(
        look.toml_of(helm.manifests(merged(values, at("settings.adapter", {words: words}))))
    )
    assert read["served_model_name"] == words
    assert read["adapter"] == {words: words}
    assert read["log_format"] == "json"


def test_load_settings_would_refuse_a_setting_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "fathom.toml"
    file.write_text("max_num_seq = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is no setting"):
        load_settings(config_file=file, environ={})
