"""Settings: where they come from, which are refused and what is said of them."""

from pathlib import Path
from typing import Any

import pytest

from dsg.cli.main import run
from dsg.service.settings import Settings

LONG = "long enough for a key"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_PORT", "9000")
    monkeypatch.setenv("DSG_MODEL", "one, two")
    monkeypatch.setenv("DSG_MODEL_DIR", "")
    settings = Settings(port=9001)
    assert (settings.port, settings.models, settings.model_dir) == (9001, ["one", "two"], None)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "70000", "DSG_PORT: "),
        ("MAX_PIXELS", "1000000000", "DSG_MAX_PIXELS: "),
        ("MAX_PICTURES", "200", "wrong setting, DSG_MAX_PICTURES (200) is above DSG_MAX_QUEUE (128)"),
        ("MAX_BYTES_IN_FLIGHT", "1000", "wrong setting, DSG_MAX_BYTES (32000000) is above DSG_MAX_BYTES_IN_FLIGHT"),
        ("MODEL", "a,,b", "DSG_MODEL: name at least one, and no empty one"),
        ("DEVICES", "cpu,,", "DSG_DEVICES: name at least one, and no empty one"),
        ("MODEL_DIR", "/no/such/folder", "DSG_MODEL_DIR (/no/such/folder) is no folder"),
        ("MODEL_DIR", __file__, f"DSG_MODEL_DIR ({__file__}) is no folder"),
        ("RELOAD_KEY", "short", "DSG_RELOAD_KEY: each key has at least 16 characters"),
        ("RELOAD_KEY", f"{LONG} é", "DSG_RELOAD_KEY: a key is of ASCII letters"),
        ("RELOAD_KEY", f"{LONG} ", "no space at its ends"),
        ("API_KEYS", f"{LONG},{LONG} Ж", "DSG_API_KEYS: a key is of ASCII letters"),
        ("API_KEYS", f"{LONG},short", "DSG_API_KEYS: each key has at least 16 characters"),
        ("CORS_ORIGINS", "not a url", "DSG_CORS_ORIGINS: 'not a url' is no origin"),
        ("CORS_ORIGINS", "https://example.org/", "'https://example.org/' is no origin"),
        ("CORS_ORIGINS", "https://example.org, example.org", "'example.org' is no origin"),
        ("REPLICAS", "2", "DSG_REPLICAS are for the engine ray"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsg.service.run.serve", lambda settings: pytest.fail("nothing is started"))
    monkeypatch.setenv(f"DSG_{name}", value)
    assert run(["serve"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dsg: error: wrong setting, ") and said in told and told.count("\n") == 1
    assert "Value error" not in told and LONG not in told


@pytest.mark.parametrize("option", ["--host", "--device", "--devices", "--model"])
def test_an_option_without_a_word_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", option, ""]) == 2
    assert f"DSG_{option[2:].upper()}: name " in capsys.readouterr().err


def test_no_number_is_larger_than_a_machine() -> None:
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in (int, int | None)]
    numbers += ["proposals", "decode_workers", "encode_workers"]
    assert len(set(numbers)) == 17
    for name in numbers:
        with pytest.raises(ValueError, match=f"(?s){name}.*less than or equal to"):
            Settings(**{name: 10**399})


def test_what_may_work_is_taken(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "cors_origins": "*, http://localhost:5173,https://example.org,null",
        "api_keys": f" {LONG} ,{LONG}!",
        "reload_key": f"{LONG}, and ~ more",
        "model_dir": tmp_path,
        "drain_ms": 0,
    }
    settings = Settings(**given)
    assert settings.origins == ["*", "http://localhost:5173", "https://example.org", "null"]
    assert settings.keys == [LONG, f"{LONG}!"]
    on_others = Settings(engine="ray", model_dir="/shared/by/the/cluster")  # which is not this machine's
    assert on_others.model_dir == Path("/shared/by/the/cluster")


def test_every_setting_says_its_default_and_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        assert f"`DSG_{name.upper()}`" in readme, name
        assert field.description and "default" in field.description, name
        if isinstance(field.default, (int, str)):
            assert str(field.default) in field.description, name
