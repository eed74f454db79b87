"""``rso-ds doctor``: checks of one process, in made-up surroundings (several ranks: tests/cli/test_doctor_ranks.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from support.environment import ROOT
from support.progress import run_command

from rso_ds.cli import main
from rso_ds.comm.launch import Launch
from rso_ds.doctor import disks, extensions, gpus, ops, resources, software
from rso_ds.doctor.limits import checked, limited
from rso_ds.doctor.report import FAILED, NOT_CHECKED, OK, WARNING, Finding, as_json, failed, merged, table

ALONE = Launch("none", 0, 0, 1, 1, "127.0.0.1", 29500)
ONE_NODE = Launch("torchrun", 0, 0, 2, 2, "127.0.0.1", 29500)
TWO_NODES = Launch("torchrun", 1, 0, 2, 1, "10.0.0.1", 29500)


def status(findings: list[Finding], name: str) -> str:
    return one(findings, name).status


def one(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def make_lock(folder: Path, age: float = 0) -> Path:
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    return lock


# --- builds


def test_stale_lock_fails_with_the_command_and_is_left_alone(tmp_path):
    lock = make_lock(tmp_path / "with space", age=3 * 3600)
    found = one(extensions.check_extensions(tmp_path / "with space"), "lock of cpu_adam")
    assert found.status == FAILED
    assert found.remedy == f"rm '{lock}'"
    assert "3 hours" in found.found
    assert lock.exists()


def test_lock_that_a_process_holds_open_is_a_build(tmp_path):
    lock = make_lock(tmp_path, age=3 * 3600)
    with open(lock):
        found = one(extensions.check_extensions(tmp_path), "lock of cpu_adam")
    assert found.status == OK
    assert str(os.getpid()) in found.found
    assert status(extensions.check_extensions(tmp_path), "lock of cpu_adam") == FAILED


def test_compiler_that_outlives_its_build_does_not_count(tmp_path):
    """Only the process that made the lock removes it."""
    lock = make_lock(tmp_path)
    name = lock.parent / "ninja"
    name.symlink_to("/bin/sleep")
    with subprocess.Popen([str(name), "60"], cwd=lock.parent) as process:
        try:
            assert status(extensions.check_extensions(tmp_path), "lock of cpu_adam") == FAILED
        finally:
            process.kill()


@pytest.mark.parametrize(("age", "expected"), [(60, WARNING), (7200, FAILED)])
def test_young_lock_of_another_user_may_be_a_build(tmp_path, monkeypatch, age, expected):
    make_lock(tmp_path, age)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert status(extensions.check_extensions(tmp_path), "lock of cpu_adam") == expected


@pytest.mark.parametrize(("age", "expected"), [(60, WARNING), (7200, FAILED)])
def test_young_lock_on_a_shared_disk_may_be_another_nodes(tmp_path, monkeypatch, age, expected):
    make_lock(tmp_path, age)
    monkeypatch.setattr(extensions, "mount_of", lambda path: ("/home", "nfs4"))
    findings = extensions.check_extensions(tmp_path)
    assert status(findings, "lock of cpu_adam") == expected
    assert status(findings, "extensions shared") == WARNING


def test_no_lock_and_the_folder_torch_uses(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from torch.utils.cpp_extension import _get_build_directory

    assert Path(_get_build_directory("x", False)).parent == extensions.extensions_folder()
    assert status(extensions.check_extensions(tmp_path), "build locks") == OK


def test_ops_of_a_json(tmp_path, monkeypatch):
    adam = {"optimizer": {"type": "RSO", "params": {}}}
    offload = {**adam, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert ops.needed_ops(adam, on_gpu=False, toolkit=True) == []
    assert ops.needed_ops(adam, on_gpu=True, toolkit=True) == ["fused_adam"]
    assert ops.needed_ops(adam, on_gpu=True, toolkit=False) == []
    assert ops.needed_ops(offload, on_gpu=False, toolkit=False) == ["cpu_adam"]
    assert ops.needed_ops({"optimizer": {"type": "SGD"}}, True, True) == []
    pytest.importorskip("deepspeed")
    assert status(ops.check_ops(None, False, tmp_path), "ops") == NOT_CHECKED
    assert status(ops.check_ops(offload, False, tmp_path), "op cpu_adam") == WARNING
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = ops.check_ops(offload, False, tmp_path)
    assert status(findings, "ninja") == status(findings, "C++ compiler") == FAILED
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    findings = ops.check_ops(offload, False, tmp_path)
    assert status(findings, "op cpu_adam") == status(findings, "C++ compiler") == OK
    assert status(findings, "ninja") == FAILED  # torch asks for it even then


def test_build_that_takes_too_long_is_interrupted_so_that_it_can_remove_its_lock(tmp_path, monkeypatch):
    waits = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
lock = open({str(tmp_path / "lock")!r}, "w")
try: time.sleep(60)
finally: import os; os.remove(lock.name)
"""
    monkeypatch.setattr(ops, "_BUILD", waits.replace("{", "{{").replace("}", "}}"))
    found = ops._build("cpu_adam", 2)
    assert found.status == FAILED
    assert "not done after 2 s" in found.found
    assert not (tmp_path / "lock").exists()


# --- software


def test_versions_against_the_packages_metadata(monkeypatch):
    assert all(finding.status == OK for finding in software.check_software())
    monkeypatch.setattr(software, "versions", lambda: {"Python": "3.9.1", "torch": "2.5.1+cu121", "deepspeed": None})
    findings = software.check_software()
    assert status(findings, "Python") == status(findings, "torch") == FAILED
    assert one(findings, "torch").remedy == 'pip install "torch>=2.6"'
    assert status(findings, "deepspeed") == WARNING
    wanted = [line for line in metadata.requires("rso_ds") or [] if line.startswith("deepspeed")]
    assert one(findings, "deepspeed").remedy == f'pip install "{wanted[0].split(";")[0]}"'


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.6.0+cpu", ">=2.6", True),
        ("2.13.0", ">=2.6", True),
        ("2.5.9", ">=2.6", False),
        ("5.0rc1", ">=5.0,<6", True),
        ("6.0", ">=5.0,<6", False),
        ("1.0", "", True),
    ],
)
def test_ranges(version, wanted, expected):
    assert software.satisfies(version, wanted) is expected


def test_gpus(monkeypatch):
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "_driver", lambda: None)
    assert one(gpus.check_gpus(ALONE, None), "GPUs").found == "none: CPU, gloo"
    monkeypatch.setattr(gpus, "_driver", lambda: "550.54.15")
    monkeypatch.setattr(gpus.torch.version, "cuda", "13.0")
    assert status(gpus.check_gpus(ALONE, None), "GPUs") == FAILED
    monkeypatch.setattr(gpus.torch.version, "cuda", None)
    assert status(gpus.check_gpus(ALONE, None), "GPUs") == WARNING


# --- disks, memory, limits


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert status(disks.check_output(str(tmp_path / "file" / "runs"), None), "output") == FAILED
    assert status(disks.check_output("/proc/runs", None), "output") == FAILED
    assert status(disks.check_output(None, None), "output") == NOT_CHECKED
    assert status(disks.check_output(str(tmp_path / "a" / "b"), 1), "output") == OK
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("free", "checkpoint", "expected"),
    [(11e9, None, OK), (9e9, None, WARNING), (9e9, 10e9, FAILED), (20e9, 10e9, WARNING), (31e9, 10e9, OK)],
)
def test_room_for_checkpoints(tmp_path, monkeypatch, free, checkpoint, expected):
    stat = os.statvfs_result((1, 1, 10**12, int(free), int(free), 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    assert status(disks.check_output(str(tmp_path), checkpoint and int(checkpoint)), "output") == expected


@pytest.mark.parametrize(("size", "ranks", "expected"), [(64, 8, FAILED), (64, 1, WARNING), (16384, 8, OK)])
def test_shared_memory_of_a_container(tmp_path, monkeypatch, size, ranks, expected):
    stat = os.statvfs_result((2**20, 2**20, size, size, size, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    assert disks.check_shared_memory(ranks, str(tmp_path))[0].status == expected


def test_mounts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda / ext4 rw 0 0\nfs:/home /home nfs4 rw 0 0\nx /home/a\\040b fuse.sshfs rw 0 0\n")
    assert disks.mount_of(Path("/home/me"), str(mounts)) == ("/home", "nfs4")
    assert disks.mount_of(Path("/home/a b/c"), str(mounts)) == ("/home/a b", "fuse.sshfs")
    assert disks.mount_of(Path("/homes"), str(mounts)) == ("/", "ext4")
    assert [disks.on_network(kind) for kind in ("nfs4", "lustre", "fuse.sshfs", "ext4", "fuse.overlayfs", "tmpfs")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_memory_limit_of_control_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    step = tmp_path / "fs" / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    assert resources.memory_limit(tmp_path / "fs", own) is None
    (step.parent / "memory.max").write_text("4000000000\n")
    assert resources.memory_limit(tmp_path / "fs", own) == 4_000_000_000
    (step / "memory.max").write_text("5000000000\n")
    assert resources.memory_limit(tmp_path / "fs", own) == 4_000_000_000
    own.write_text("3:cpu:/x\n4:memory:/job\n")
    group = tmp_path / "fs" / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert resources.memory_limit(tmp_path / "fs", own) == 1000


def test_threads_and_open_files(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert resources.check_threads(1)[0].status == OK
    assert resources.check_threads(4)[0].remedy == "export OMP_NUM_THREADS=2"
    for value, expected in (("2", OK), ("4", WARNING), ("many", WARNING)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert resources.check_threads(4)[0].status == expected
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    assert resources.check_open_files(8)[0].status == OK
    assert resources.check_open_files(512)[0].status == WARNING


def test_nothing_waits_for_ever():
    began = time.monotonic()
    (found,) = checked("disk", lambda: time.sleep(30), 0.2)
    assert (found.status, time.monotonic() - began < 5) == (FAILED, True)
    (found,) = checked("disk", lambda: 1 // 0, 5)
    assert (found.status, "ZeroDivisionError" in found.found) == (NOT_CHECKED, True)
    assert limited(lambda: 3, 5) == 3


# --- the report


def test_rows_of_equal_and_unequal_ranks():
    same, bad = Finding("a", OK, "x"), Finding("b", FAILED, "full", "rm big")
    by_rank = [[same, Finding("b", OK, "9 GB")], [same, Finding("b", OK, "8 GB")], [same, bad], [same, bad]]
    rows = merged(by_rank, ["n1", "n1", "n2", "n2"], [Finding("c", WARNING, "slow")])
    assert [(row.finding.name, row.where, row.same_elsewhere) for row in rows] == [
        ("a", "all ranks", 0),
        ("b", "rank 0 on n1", 1),
        ("b", "ranks 2-3 on n2", 0),
        ("c", "", 0),
    ]
    assert failed(rows)
    lines = table("title", rows).splitlines()
    assert lines[1].split("  ")[0] == "ok"
    assert lines[3].endswith("ranks 2-3 on n2: full")
    assert lines[4].strip() == "-> rm big"
    assert lines[4].index("->") == lines[3].index("ranks")
    assert lines[-1] == "1 failed, 1 warning, 0 not checked, 2 ok"
    assert json.loads(as_json("title", rows))["findings"][2]["ranks"] == [2, 3]


def run_alone(capsys, *flags: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *flags])
    return int(end.value.code or 0), capsys.readouterr().out


def test_command_in_one_process(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")  # undone at the end: adopt() exports them
        monkeypatch.delenv(key)
    code, text = run_alone(capsys, "--output", str(tmp_path))
    assert code == 0
    assert "rso-ds doctor: one process" in text
    make_lock(tmp_path)
    code, text = run_alone(capsys, "--json")
    assert code == 1
    assert json.loads(text)["findings"][0]["name"] == "lock of cpu_adam"
    (tmp_path / "cpu_adam" / "lock").unlink()
    code, text = run_alone(capsys, "--deepspeed", str(tmp_path / "absent.json"))
    assert (code, "absent.json cannot be read" in " ".join(text.split())) == (1, True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    code, text = run_alone(capsys)
    assert (code, "launcher" in text) == (1, True)
    with pytest.raises(SystemExit, match="not a rate"):
        main(["doctor", "--link", "fast"])
    with pytest.raises(SystemExit, match="--checkpoint-size 'many' is not a size"):
        main(["doctor", "--checkpoint-size", "many"])


def test_nothing_that_builds_is_imported():
    assert importlib.util.find_spec("deepspeed") is not None
    code = """
import sys
from rso_ds.cli import main
try: main(["doctor", "--deepspeed", sys.argv[1]])
except SystemExit: pass
print([name for name in ("deepspeed", "transformers", "accelerate") if name in sys.modules])
"""
    path = ROOT / "ds_configs" / "rso_offload.json"
    done = run_command([sys.executable, "-c", code, str(path)])
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
