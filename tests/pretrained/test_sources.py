"""Names of models: which folder they mean, and what an unknown or unreachable one says."""

import json
import os
import subprocess
import sys

import pytest

from jtl.pretrained import UnknownModelError, UnreachableHubError, resolve
from jtl.pretrained.sources import read_config


def test_short_names_hold_the_real_files():
    folder = resolve("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    assert read_config("minilm", folder)["model_type"] == "bert"
    assert (
        read_config("efficientnet-lite0", resolve("efficientnet-lite0"))["model_type"] == "efficientnet_lite"
    )


def test_an_existing_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_tokens_that_are_not_to_be_written(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "whisper", "suppress_tokens": [1], "d_model": 8})
    )
    assert read_config(tmp_path, tmp_path)["suppress_tokens"] == [1]
    generation = {"suppress_tokens": [2, 3], "d_model": 9, "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path, tmp_path) == {
        "model_type": "whisper",
        "suppress_tokens": [2, 3],
        "d_model": 8,
    }


@pytest.mark.parametrize("name", ["minilm", "."])
def test_a_revision_is_for_hub_ids(name):
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        resolve(name, revision="main")


@pytest.mark.parametrize(
    "name, says",
    [
        ("minlm", "Did you mean 'minilm'"),
        ("efficientnet", "Did you mean 'efficientnet-lite0'"),
        ("./nowhere/model", "not an existing folder"),
        ("a/b/c", "not a hub id"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(UnknownModelError, match=says):
        resolve(name)


def test_two_revisions():
    with pytest.raises(ValueError, match="names revision 'v1', and revision='v2' another"):
        resolve("org/name@v1", revision="v2")


def without_hub(folder, *names):
    """What a process without a network answers to hub ids; the hub's settings are read once, at import."""
    code = """
import sys
from jtl.pretrained import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment
    )
    return run.stdout.strip().splitlines()


def test_without_the_hub_its_cache_serves_and_else_the_ways_out_are_named(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--org--name"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    minilm = "sentence-transformers/all-MiniLM-L6-v2"
    latest, pinned, other, unknown = without_hub(
        tmp_path, "org/name", f"org/name@{commit}", "org/name@v2", minilm
    )
    assert latest == pinned == str(model / "snapshots" / commit)
    assert other.startswith("UnreachableHubError") and "org/name@v2" in other
    assert unknown.startswith("UnreachableHubError") and minilm in unknown
    for way in ("path of a folder", "HF_HOME", "efficientnet-lite0", "'minilm' is this very model"):
        assert way in unknown


def test_folder_without_config_and_broken_config(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*model\.safetensors"):
        read_config(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert read_config(tmp_path, tmp_path) == {"model_type": "bert"}


def test_a_client_that_cannot_connect(monkeypatch):
    """A proxy that refuses, or a connection that breaks, is an error of the HTTP client's own."""
    import huggingface_hub

    class TransportError(Exception):
        """The base of such errors in httpx."""

    class ProxyError(TransportError):
        pass

    def refuse(*args, **kwargs):
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UnreachableHubError, match="cannot be reached"):
        resolve("org/name")
