"""The cache folder: where it is, what broken files, foreign files and locks do."""

import logging
import os
import stat
import threading

import pytest

from lumos_kernels import cache


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path / "a" / "b"))
    return tmp_path / "a" / "b"


def test_the_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("LUMOS_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "lumos_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "lumos_kernels"
    monkeypatch.setenv("LUMOS_CACHE_DIR", "~/mine")
    assert cache.folder() == tmp_path / "mine"


def test_a_user_without_a_home_has_a_folder(monkeypatch):
    monkeypatch.setenv("LUMOS_CACHE_DIR", "~nobody-of-this-name/x")
    assert cache.folder().is_absolute()
    assert "lumos_kernels" in cache.folder().name


def test_what_is_written_is_read(folder):
    assert cache.read("x.json") == {}
    assert cache.write("x.json", {"a": [1, 2]})
    assert cache.read("x.json") == {"a": [1, 2]}
    assert [file.name for file in folder.iterdir()] == ["x.json"]


def test_other_users_may_read_it(folder):
    cache.write("x.json", {})
    assert stat.S_IMODE(os.stat(folder / "x.json").st_mode) == 0o644


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"7"])
def test_a_broken_file_is_empty(folder, content):
    folder.mkdir(parents=True)
    (folder / "x.json").write_bytes(content)
    assert cache.read("x.json") == {}


def test_what_cannot_be_written_is_said(folder, caplog):
    folder.parent.mkdir(parents=True)
    folder.touch()
    assert not cache.write("x.json", {})
    assert "cannot be written" in caplog.text
    with cache.locked("x.json"):
        pass


def test_a_lock_is_waited_for_and_not_for_ever(folder, monkeypatch, caplog):
    monkeypatch.setattr(cache, "QUIET_WAIT", 0.05)
    monkeypatch.setattr(cache, "LONGEST_WAIT", 0.1)
    caplog.set_level(logging.WARNING, "lumos_kernels")
    entered = []

    def second():
        with cache.locked("x"):
            entered.append(True)

    with cache.locked("x"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(20)
        assert entered
    assert "waiting for another process" in caplog.text
