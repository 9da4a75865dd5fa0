"""The cache folder, memory limits and CPU features."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, assert_same, expected, inputs

from fhopt.codegen import build, build_kernel
from fhopt.codegen.build import build_torch

SYSTEM = importlib.import_module("fhopt.system")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other users")


def test_an_unwritable_cache_folder_is_replaced_by_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"  # permissions would not stop a test that runs as root
    blocked.write_text("")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(blocked))
    case = CASES["one token"]
    x = inputs(case)
    with pytest.warns(RuntimeWarning, match=r"is unusable.*Set FHOPT_CACHE_DIR"):
        kernel = build_torch(case.spec())
    assert_same(kernel(*x, None, **case.options()), expected(case, x, None))


def test_what_is_run_from_the_cache_folder_cannot_be_changed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o002)  # new folders are group-writable
    try:
        monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "new"))
        build.load_module("made", "x = 1")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_no_code_is_loaded_from_a_folder_that_others_may_write_to(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fhopt.system._warned", set())
    left = str(build.load_module("left", "x = 1").__file__)
    Path(left).write_text("x = 'of somebody else'")
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        assert build.load_module("left", "x = 1").x == 1


def test_the_working_directory_stays_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_kernel(CASES["one token"].spec())
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- parents


def assert_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(folder))
    monkeypatch.setattr("fhopt.system._warned", set())
    with pytest.warns(RuntimeWarning, match=reason):
        made = build.load_module("made", "x = 1")
    assert made.x == 1 and not Path(str(made.__file__)).is_relative_to(folder)


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_parent_that_others_may_write_to_is_refused(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open" / "mine" / "cache").mkdir(parents=True)
    (tmp_path / "open").chmod(mode)
    assert_not_used(tmp_path / "open" / "mine" / "cache", monkeypatch, "others may write to it")


def test_a_sticky_parent_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "open" / "cache"))
    made = build.load_module("made", "x = 1")
    assert Path(str(made.__file__)).parent == tmp_path / "open" / "cache"


@needs_root
def test_a_parent_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs" / "cache").mkdir(parents=True)
    os.chown(tmp_path / "theirs", 12345, 12345)
    assert_not_used(tmp_path / "theirs" / "cache", monkeypatch, "belongs to another user")


@needs_root
def test_a_group_of_others_may_not_write_to_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared" / "cache").mkdir(parents=True)
    os.chown(tmp_path / "shared", 0, 12345)
    (tmp_path / "shared").chmod(0o770)
    assert_not_used(tmp_path / "shared" / "cache", monkeypatch, "others may write to it")


def test_a_symlink_to_a_folder_is_resolved_before_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "real")
    (tmp_path / "open").chmod(0o777)
    assert_not_used(tmp_path / "link", monkeypatch, "others may write to it")
    (tmp_path / "open").chmod(0o755)
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "link"))
    assert Path(str(build.load_module("made", "x = 1").__file__)).parent == tmp_path / "open" / "real"


def test_parents_are_created_for_this_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "a" / "b" / "c"))
        made = Path(str(build.load_module("made", "x = 1").__file__))
        modes = [p.stat().st_mode & 0o777 for p in (tmp_path / "a", tmp_path / "a" / "b", made.parent)]
        assert modes == [0o700] * 3 and made.stat().st_mode & 0o022 == 0
    finally:
        os.umask(before)


def test_a_file_that_others_may_write_to_or_a_link_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    left = Path(str(build.load_module("left", "x = 1").__file__))
    left.write_text("x = 'of somebody else'")
    left.chmod(0o666)
    assert build.load_module("left", "x = 1").x == 1 and left.read_text() == "x = 1"
    other = tmp_path / "other.py"
    other.write_text("x = 'behind a link'")
    left.unlink()
    left.symlink_to(other)
    assert build.load_module("left", "x = 1").x == 1 and not left.is_symlink() and "behind" in other.read_text()


def test_bytecode_next_to_a_kernel_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    build.load_module("left", "x = 1")
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_lacks_native_gemm_without_onednn_instructions(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SYSTEM.platform, "machine", lambda: "x86_64")  # other architectures are not checked
    SYSTEM.multiplies_by_loops.cache_clear()
    assert not SYSTEM.multiplies_by_loops(torch.float32)
    for supported in (False, True):
        SYSTEM.multiplies_by_loops.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, SYSTEM._ASKED[str(dtype)], lambda answer=supported: answer, raising=False)
        assert SYSTEM.multiplies_by_loops(dtype) == (not supported and torch.backends.mkldnn.is_available())
    SYSTEM.multiplies_by_loops.cache_clear()


def test_memory_is_limited_by_the_system_or_its_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SYSTEM, "_GROUP", tmp_path)
    total, free = SYSTEM.memory_bytes()
    assert 0 < free <= total
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 500\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert SYSTEM.memory_bytes() == (1000, 400)
    (tmp_path / "memory.max").write_text("max\n")
    assert SYSTEM.memory_bytes()[0] == total


def test_a_cache_folder_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    assert SYSTEM.cache_fault() == "" and SYSTEM.generated_bytes() == 0
    (tmp_path / "cache" / "kernel.so").write_bytes(b"1234")
    assert SYSTEM.generated_bytes() == 4
    (tmp_path / "cache").chmod(0o777)
    assert "others may write to it" in SYSTEM.cache_fault()
    (tmp_path / "cache").chmod(0o700)
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache" / "kernel.so"))
    assert "kernel.so" in SYSTEM.cache_fault()
