"""When a file of keys is taken, when it is not, and what is said about it, in virtual time."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation.vtime import run

from tokenwire_service import keyfiles
from tokenwire_service.keyfiles import (
    CUT,
    RESTLESS,
    RESTLESS_LOOKS,
    Change,
    FileState,
    FileUnusable,
    FileUsable,
    KeyFiles,
    KeysChanged,
    Look,
    look_at,
    look_in_thread,
    watch,
)
from tokenwire_service.keyset import NOT_A_KEY, resolved
from tokenwire_service.secret import Secret
from tokenwire_service.settings import KeyEntry, KeySource, Upstream

A, B = Path("/keys/a"), Path("/keys/b")
MISSING = Look(problem="unreadable (No such file or directory)")


def upstream(name: str, *entries: tuple[Path | None, str], **source: object) -> Upstream:
    """One whose entries hold these keys, separated by spaces."""
    made = tuple(
        KeyEntry(
            source=KeySource(file="f", **source),
            path=path,
            secrets=tuple(map(Secret, text.split())),
        )
        for path, text in entries
    )
    return Upstream(name=name, base_url="http://u", keys=resolved(made), key_entries=made)


def files_of(*upstreams: Upstream) -> KeyFiles:
    return KeyFiles(upstreams or [upstream("u", (A, "sk-1 sk-2"), id="k")])


def look(text: str | bytes | Look, path: Path = A) -> dict[Path, Look]:
    if isinstance(text, Look):
        return {path: text}
    return {path: Look(text.encode() if isinstance(text, str) else text)}


def settle(files: KeyFiles, text: str | bytes | Look, path: Path = A) -> list[Change]:
    """Two looks that find the same."""
    assert files.see(look(text, path)) == []
    return files.see(look(text, path))


def texts(change: Change) -> list[str]:
    assert isinstance(change, KeysChanged)
    return [key.secret.reveal() for key in change.keys]


# --- what is taken ----------------------------------------------------------------------


def test_a_change_is_taken_when_two_looks_in_a_row_find_it() -> None:
    files = files_of()
    assert files.see(look("sk-2\nsk-3")) == []
    (change,) = files.see(look("sk-2\nsk-3"))
    assert texts(change) == ["sk-2", "sk-3"]
    assert isinstance(change, KeysChanged)
    assert (change.added, change.removed, change.changed) == ((), (), ("k-1",))
    assert files.see(look("sk-2\nsk-3")) == []


def test_what_is_added_removed_and_changed_is_told_by_id() -> None:
    files = files_of(upstream("u", (A, "sk-1 sk-2"), id="k"))
    (change,) = settle(files, "sk-1\nsk-2\nsk-3")
    assert isinstance(change, KeysChanged)
    assert (change.added, change.removed, change.changed) == (("k-3",), (), ())
    (change,) = settle(files, "sk-2")
    assert isinstance(change, KeysChanged)
    assert (change.added, change.removed, change.changed) == ((), ("k-1", "k-3"), ())
    (change,) = settle(files, "sk-4\nsk-2\nsk-5")
    assert isinstance(change, KeysChanged)
    assert (change.added, change.removed, change.changed) == (("k-1", "k-3"), (), ())


def test_other_words_for_the_same_keys_change_nothing() -> None:
    files = files_of()
    for text in ("sk-1,sk-2", "\ufeffsk-1\r\nsk-2\r\n", "# c\n sk-1 #x\n\n sk-2 \nsk-1"):
        assert settle(files, text) == []


def test_what_changes_between_two_looks_is_not_taken() -> None:
    files = files_of()
    for text in ("sk-3", "sk-3\nsk-4", "sk-3", "", "sk-3"):
        assert files.see(look(text)) == []
    (change,) = files.see(look("sk-3"))
    assert texts(change) == ["sk-3"]


def test_other_upstreams_and_entries_keep_theirs() -> None:
    files = files_of(
        upstream("u", (None, "sk-env"), (A, "sk-1")),
        upstream("v", (B, "sk-1")),
        upstream("w", (B, "sk-9"), (A, "sk-1")),
    )
    changes = settle(files, "sk-2")
    assert [c.upstream for c in changes if isinstance(c, KeysChanged)] == ["u", "w"]
    assert [texts(change) for change in changes] == [["sk-env", "sk-2"], ["sk-9", "sk-2"]]


def test_another_configuration_leaves_what_was_settled_and_the_ids() -> None:
    files = files_of(upstream("u", (A, "sk-1 sk-2"), id="k"))
    settle(files, "sk-2\nsk-3")
    assert files.see(look("sk-2\nsk-")) == []  # it is being written, just now
    (found,) = files.replace([upstream("u", (A, "sk-2 sk-"), id="k")])
    assert [(k.id, k.secret.reveal()) for k in found.keys] == [("k-2", "sk-2"), ("k-1", "sk-3")]
    (change,) = settle(files, "sk-2\nsk-4")
    assert texts(change) == ["sk-2", "sk-4"]


def test_a_key_that_is_named_otherwise_has_its_new_name() -> None:
    files = files_of(upstream("u", (A, "sk-1 sk-2"), id="k"))
    (found,) = files.replace([upstream("u", (A, "sk-1 sk-2"), id="team")])
    assert [key.id for key in found.keys] == ["team-1", "team-2"]


def test_files_come_and_go_with_the_configuration() -> None:
    files = files_of(upstream("u", (A, "sk-1")))
    files.replace([upstream("u", (B, "sk-2")), upstream("v", (None, "sk-3"))])
    assert files.paths == (B,)
    (change,) = settle(files, "sk-4", B)
    assert texts(change) == ["sk-4"]


def test_a_file_named_twice_is_one_file() -> None:
    files = files_of(upstream("u", (A, "sk-1"), (A, "sk-1")))
    assert files.paths == (A,)
    (change,) = settle(files, "sk-2")
    assert texts(change) == ["sk-2"]
    assert files.states == (FileState(A, ("u",), ""),)


def test_two_files_that_change_at_once_change_an_upstream_once() -> None:
    files = files_of(upstream("u", (A, "sk-1"), (B, "sk-2")))
    assert files.see(look("sk-3", A) | look("sk-4", B)) == []
    (change,) = files.see(look("sk-3", A) | look("sk-4", B))
    assert texts(change) == ["sk-3", "sk-4"]


# --- what is wrong ----------------------------------------------------------------------

PROBLEMS = {
    "missing": (MISSING, MISSING.problem),
    "empty": ("", "empty"),
    "comments alone": ("# sk-1", "empty"),
    "no key": ("sk-1 sk-2", NOT_A_KEY),
    "not UTF-8": (b"\xff\xfe", "unreadable (not UTF-8)"),
    "half of it": ("sk-1\nsk", CUT),
    "a folder in its place": (Look(problem="unreadable (Is a directory)", lasting=True), None),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_broken_file_is_told_once_and_its_keys_stay(name: str) -> None:
    broken, problem = PROBLEMS[name]
    files = files_of()
    assert settle(files, "sk-1\nsk-2") == []
    (told,) = settle(files, broken)
    assert isinstance(told, FileUnusable)
    assert told.problem == (problem or told.problem)
    assert all(files.see(look(broken)) == [] for _ in range(100))
    assert files.states[0].problem == told.problem
    assert settle(files, "sk-1\nsk-2") == [FileUsable(A)]
    assert files.states[0].problem == ""


def test_it_is_told_again_when_it_is_broken_in_another_way_or_anew() -> None:
    files = files_of()
    said = [
        change
        for text in ("", "#", MISSING, "", "sk-1", "")
        for change in settle(files, text)
        if not isinstance(change, KeysChanged)
    ]
    assert said == [
        FileUnusable(A, "empty"),
        FileUnusable(A, MISSING.problem),
        FileUnusable(A, "empty"),
        FileUsable(A),
        FileUnusable(A, "empty"),
    ]


def test_good_again_with_other_keys_says_both() -> None:
    files = files_of()
    settle(files, MISSING)
    usable, changed = settle(files, "sk-3")
    assert usable == FileUsable(A)
    assert texts(changed) == ["sk-3"]


def test_while_one_file_is_broken_the_other_changes() -> None:
    files = files_of(upstream("u", (A, "sk-1"), (B, "sk-2")))
    settle(files, "", A)
    (change,) = settle(files, "sk-3", B)
    assert texts(change) == ["sk-1", "sk-3"]


def test_a_file_that_never_rests_is_told() -> None:
    files = files_of()
    said = [change for n in range(5 * RESTLESS_LOOKS) for change in files.see(look(f"sk-{n}"))]
    assert said == [FileUnusable(A, RESTLESS)]
    usable, changed = settle(files, "sk-7")
    assert usable == FileUsable(A)
    assert texts(changed) == ["sk-7"]


def test_what_is_no_regular_file_from_the_start_is_left_alone() -> None:
    files = files_of()
    assert files.see(look(Look(problem="unreadable (not a regular file)", lasting=True))) == []
    assert files.paths == ()
    assert files.see(look("sk-3")) == []


# --- any file ---------------------------------------------------------------------------

contents = st.sampled_from(
    [
        b"sk-1\nsk-2",
        b"sk-1\nsk-2\n",
        b"sk-1\nsk",
        b"sk-3",
        b"sk-3\nsk-4",
        b"",
        b"\xff",
        b"a b",
        None,
    ]
)


@given(st.lists(st.tuples(contents, st.integers(1, 3)), max_size=30))
def test_only_what_rested_is_in_force_and_every_change_is_told_once(
    history: list[tuple[bytes | None, int]],
) -> None:
    files = files_of()
    looks = [
        MISSING if data is None else Look(data) for data, times in history for _ in range(times)
    ]
    in_force = ["sk-1", "sk-2"]
    problem = ""
    previous: Look | None = None
    for found in looks:
        changes = files.see({A: found})
        if found != previous:
            assert changes == []
        previous = found
        for change in changes:
            if isinstance(change, FileUnusable):
                assert change.problem != problem
                problem = change.problem
            elif isinstance(change, FileUsable):
                assert problem != ""
                problem = ""
            else:
                assert texts(change) != in_force
                assert problem == ""
                in_force = texts(change)
                assert "\n".join(in_force) == found.content.decode().strip()
    assert files.states[0].problem == problem
    # Whatever went before, what stays in the end is taken.
    files.see(look("sk-9"))
    files.see(look("sk-9"))
    assert settle(files, "sk-1\nsk-8") != []


# --- looking ----------------------------------------------------------------------------


def test_the_watch_looks_at_every_interval_and_tells() -> None:
    async def main() -> None:
        disk = {A: Look(b"sk-1\nsk-2")}
        looked: list[float] = []
        told: list[tuple[float, Change]] = []
        clock = asyncio.get_running_loop().time

        async def looking(paths: tuple[Path, ...]) -> Mapping[Path, Look]:
            looked.append(clock())
            return {path: disk[path] for path in paths}

        start = clock()
        task = asyncio.ensure_future(
            watch(
                files_of(),
                lambda change: told.append((clock() - start, change)),
                interval=2.0,
                look=looking,
            )
        )
        await asyncio.sleep(5.0)
        disk[A] = Look(b"sk-2")
        await asyncio.sleep(20.0)
        assert [at - start for at in looked] == [2.0 * n for n in range(13)]
        ((at, change),) = told
        assert at == 8.0  # seen first at 6
        assert texts(change) == ["sk-2"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_without_files_there_is_nothing_to_watch() -> None:
    run(watch(KeyFiles([]), lambda change: None, interval=1.0))


async def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    good, folder, pipe = tmp_path / "good", tmp_path / "folder", tmp_path / "pipe"
    good.write_bytes(b"sk-1\n")
    folder.mkdir()
    os.mkfifo(pipe)  # whoever opens it to read waits for a writer
    large = tmp_path / "large"
    large.write_bytes(b"x" * (2**20 + 1))
    locked = tmp_path / "a" / "b"
    looks = await look_in_thread((good, folder, pipe, large, locked))
    assert looks[good] == Look(b"sk-1\n")
    assert looks[folder] == Look(problem="unreadable (Is a directory)", lasting=True)
    assert looks[pipe] == Look(problem="unreadable (not a regular file)", lasting=True)
    assert looks[large] == Look(problem="unreadable (larger than 1MiB)")
    assert looks[locked] == MISSING
    assert look_at(Path("/dev/null")).lasting


def test_a_file_system_that_never_answers_holds_up_neither_calls_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = threading.Event()

    def hangs(_path: Path) -> Look:
        answers.wait()
        return MISSING

    async def main() -> None:
        watching = asyncio.ensure_future(watch(files_of(), lambda change: None, interval=1.0))
        await asyncio.sleep(0.05)  # the loop goes on meanwhile
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    monkeypatch.setattr(keyfiles, "look_at", hangs)
    try:
        asyncio.run(main())  # returns though the thread does not
    finally:
        answers.set()


async def test_a_defect_while_reading_reaches_whoever_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_path: Path) -> Look:
        raise MemoryError("no room")

    monkeypatch.setattr(keyfiles, "look_at", broken)
    with pytest.raises(MemoryError, match="no room"):
        await look_in_thread((A,))
