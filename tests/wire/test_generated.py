"""A change of a .proto that forgets a client turns `make check` red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2, tokenizer_service_pb2
from wire.programs import ROOT, program

FILES = (chat_pb2, chat_service_pb2, model_service_pb2, tokenizer_service_pb2)
STUBS = "clients/python/src/tokenwire"
PROTO = "protos/tokenwire/v1/chat.proto"

# A client whose code is the list of the contract's fields; its toolchain is the file `toolchain`.
TOY = r"""
available:
	@test -e toolchain
generate:
	@rm -rf gen && mkdir gen
	@cd ../../protos/tokenwire/v1; for proto in *.proto; do \
		grep ' = ' $$proto >../../../clients/toy/gen/$$proto.txt; done
"""


def git(folder: Path, *arguments: str) -> str:
    command = ("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Tree:
    """A repository of the contract, the Python stubs and a toy client, all of it committed."""

    folder: Path

    def check(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """That part of `make check`."""
        environ = {name: value for name, value in os.environ.items() if name != "CI"}
        return subprocess.run(
            ("make", "--no-print-directory", "check-generated"),
            cwd=self.folder,
            env={**environ, "MAKEFLAGS": "", **variables},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def commit(self) -> None:
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "--message=x")

    def add_field(self) -> None:
        """A field more in the contract, and nothing else."""
        proto = self.folder / PROTO
        text = proto.read_text()
        changed = text.replace("message Usage {", "message Usage {\n  int32 forgotten = 14;")
        assert changed != text
        proto.write_text(changed)
        self.commit()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    program("contract/venv/bin/buf")
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    for version in ("v1", "admin/v1"):
        shutil.copytree(
            ROOT / STUBS / version,
            tmp_path / STUBS / version,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy2(ROOT / "Makefile", tmp_path)
    shutil.copy2(ROOT / ".gitignore", tmp_path)
    toy = tmp_path / "clients/toy"
    toy.mkdir()
    (toy / "Makefile").write_text(TOY)
    (toy / "toolchain").touch()
    subprocess.run(("make", "-C", toy, "generate"), check=True, env={**os.environ, "MAKEFLAGS": ""})
    (tmp_path / "build").mkdir()
    (tmp_path / "build/contract").symlink_to(ROOT / "build/contract")
    git(tmp_path, "init", "--quiet")
    made = Tree(tmp_path)
    made.commit()
    yield made
    shutil.rmtree(tmp_path)


def test_what_is_committed_is_what_is_generated(tree: Tree) -> None:
    ran = tree.check(CI="1")
    assert ran.returncode == 0, ran.stdout


def test_a_field_that_was_not_generated_is_told_for_each_client(tree: Tree) -> None:
    tree.add_field()
    ran = tree.check(CI="1")
    assert ran.returncode != 0
    changed = re.findall(r"^ M (\S+)$", ran.stdout, re.MULTILINE)
    stub = f"{STUBS}/v1/chat_pb2"
    assert changed == [f"{stub}.py", f"{stub}.pyi", "clients/toy/gen/chat.proto.txt"]
    git(tree.folder, "add", "clients/python")
    git(tree.folder, "commit", "--quiet", "--message=x")
    ran = tree.check(CI="1")  # one of them is still forgotten
    assert ran.returncode != 0
    assert re.findall(r"^ M (\S+)$", ran.stdout, re.MULTILINE) == changed[-1:]
    tree.commit()  # as the message says
    assert tree.check(CI="1").returncode == 0


def test_files_that_are_new_or_gone_are_told(tree: Tree) -> None:
    text = 'syntax = "proto3";\npackage tokenwire.v1;\nmessage New {\n  int32 a = 1;\n}\n'
    (tree.folder / "protos/tokenwire/v1/new.proto").write_text(text)
    stale = tree.folder / STUBS / "v1/old_pb2.py"
    stale.touch()
    tree.commit()
    ran = tree.check(CI="1")
    assert ran.returncode != 0
    assert f" D {STUBS}/v1/old_pb2.py" in ran.stdout
    assert f"?? {STUBS}/v1/new_pb2.py" in ran.stdout
    assert "?? clients/toy/gen/new.proto.txt" in ran.stdout


def test_a_client_without_its_toolchain_is_red_in_ci_and_told_elsewhere(tree: Tree) -> None:
    (tree.folder / "clients/toy/toolchain").unlink()
    tree.commit()
    assert tree.check(CI="1").returncode != 0
    ran = tree.check()
    assert ran.returncode == 0, ran.stdout
    assert "SKIPPED clients/toy" in ran.stdout


def test_every_client_is_in_the_loop_and_has_its_code_committed() -> None:
    """What git ignores, or a folder that the root's Makefile does not find, would not be missed."""
    tracked = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "clients")
    files = [ROOT / name for name in tracked.split("\0") if name]
    clients = {path.relative_to(ROOT / "clients").parts[0] for path in files}
    assert "python" in clients
    messages = {name for file in FILES for name in file.DESCRIPTOR.message_types_by_name}
    for client in clients:
        folder = ROOT / "clients" / client
        assert client == "python" or (folder / "Makefile") in files
        code = b"".join(p.read_bytes() for p in files if folder in p.parents and p.is_file())
        assert [name for name in messages if name.encode() not in code] == [], client
