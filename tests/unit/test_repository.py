import json
from pathlib import Path

import pytest

from models import repository
from models.checkpoint import CONFIG, WEIGHTS
from models.errors import CheckpointError
from models.refs import parse_ref
from models.repository import (
    LABELS,
    bundled_root,
    labels,
    load,
    names,
    promote,
    resolve,
    rollback,
    save,
    versions,
)
from tests.unit.test_checkpoint import bundle


def test_versions_are_numbers_and_the_highest_is_taken(tmp_path: Path) -> None:
    for seed in range(11):
        save(tmp_path, "m", bundle(seed))
    assert versions(tmp_path, "m") == list(range(1, 12))  # as text, 9 would come after 10 and 11
    assert load(tmp_path, "m").ref == "m@11"
    assert load(tmp_path, "m@9").training.seed == 8
    (tmp_path / "m" / "3").rename(tmp_path / "elsewhere")
    assert save(tmp_path, "m", bundle()).name == "12"  # a number is not used twice
    with pytest.raises(CheckpointError, match=r"no checkpoint 'm@3' .* it has versions \[1, 2, 4"):
        load(tmp_path, "m@3")


def test_roots_are_searched_in_order(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    save(theirs, "both", bundle(1))
    save(theirs, "both", bundle(2))
    save(theirs, "other", bundle(3))
    save(mine, "both", bundle(4))
    roots = [mine, theirs, tmp_path / "absent"]
    assert names(roots) == ["both", "other"]
    assert load(roots, "both").training.seed == 4
    assert load(roots, "both@2").training.seed == 2
    assert load(roots, "other").training.seed == 3
    assert versions(roots, "both") == [1]
    with pytest.raises(CheckpointError, match="models here: both, other"):
        load(roots, "third")


def test_what_is_no_version_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, "m", bundle())
    for name in (".draft-7", "07", "v8", "9.old", "0"):
        (tmp_path / "m" / name).mkdir()
    (tmp_path / "m" / "10").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("a file")
    assert versions(tmp_path, "m") == [1]
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "absent") == [] and versions(tmp_path / "absent", "m") == []


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        if path.name == CONFIG:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "_write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, "m", bundle())
    assert list((tmp_path / "m").iterdir()) == []


def test_a_version_taken_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = repository._versions_in
    first = save(tmp_path, "m", bundle(1))
    answers = [list[int]()]  # once, the other writer's version is not seen yet
    monkeypatch.setattr(repository, "_versions_in", lambda place: answers.pop() if answers else real(place))
    assert save(tmp_path, "m", bundle(2)).name == "2"
    assert load(tmp_path, "m@1").path == first and load(tmp_path, "m@1").training.seed == 1


@pytest.mark.parametrize(
    "name", ["../m", "a/b", "", ".", "..", ".m", "-m", "M", "m\n", "é", "a" * 101, "m\x00", "/etc/passwd"]
)
def test_names_that_could_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    for act in (lambda: load(tmp_path, name), lambda: versions(tmp_path, name), lambda: save(tmp_path, name, bundle())):
        with pytest.raises(CheckpointError, match="is not the name of a model"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ref", ["m@", "m@0", "m@01", "m@-1", "m@1.0", "m@Latest", "m@1@2", "m@../2", "m@a/b"])
def test_references_that_are_none_are_refused(ref: str) -> None:
    with pytest.raises(CheckpointError, match="is no version and no label"):
        parse_ref(ref)


def test_references() -> None:
    assert parse_ref("a_b.c-9") == ("a_b.c-9", None)
    assert parse_ref("m@12") == ("m", 12)
    assert parse_ref("m@canary") == ("m", "canary")


def test_the_bundled_root_is_this_checkout() -> None:
    assert bundled_root().name == "checkpoints" and bundled_root().is_dir()


# -- labels ------------------------------------------------------------------------------------------------------------


def of_three(root: Path) -> None:
    for seed in range(3):
        save(root, "m", bundle(seed))


def test_a_name_alone_is_what_is_stable(tmp_path: Path) -> None:
    of_three(tmp_path)
    assert load(tmp_path, "m").version == 3  # the highest, as long as nothing is
    assert promote(tmp_path, "m@1") is None
    assert promote(tmp_path, "m@3", "canary") is None
    assert [load(tmp_path, ref).version for ref in ("m", "m@stable", "m@canary")] == [1, 1, 3]
    assert load(tmp_path, "m@2").version == 2
    assert promote(tmp_path, "m@2") == 1
    assert promote(tmp_path, "m@2") == 2  # once more changes nothing
    assert promote(tmp_path, "m@canary") == 2
    assert labels(tmp_path, "m") == {"stable": [3, 2, 1], "canary": [3]}
    assert rollback(tmp_path, "m") == (3, 2) and rollback(tmp_path, "m") == (2, 1)
    assert load(tmp_path, "m").version == 1
    with pytest.raises(CheckpointError, match="no version had 'stable' before"):
        rollback(tmp_path, "m")
    with pytest.raises(CheckpointError, match=r"'m@old' .* versions \[1, 2, 3\] and labels canary 3, stable 1"):
        load(tmp_path, "m@old")
    assert names(tmp_path) == ["m"] and versions(tmp_path, "m") == [1, 2, 3]


def test_what_cannot_be_used_is_not_promoted(tmp_path: Path) -> None:
    of_three(tmp_path)
    promote(tmp_path, "m@1")
    (tmp_path / "m" / "2" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        promote(tmp_path, "m@2")
    with pytest.raises(CheckpointError, match="no checkpoint 'm@9'"):
        promote(tmp_path, "m@9")
    with pytest.raises(CheckpointError, match="is not a label"):
        promote(tmp_path, "m@3", "../x")
    assert labels(tmp_path, "m") == {"stable": [1]}


def test_a_rollback_to_what_was_damaged_meanwhile_changes_nothing(tmp_path: Path) -> None:
    of_three(tmp_path)
    promote(tmp_path, "m@1")
    promote(tmp_path, "m@2")
    (tmp_path / "m" / "1" / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        rollback(tmp_path, "m")
    assert labels(tmp_path, "m") == {"stable": [2, 1]}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stable": ["1"]}', b'{"stable": 1}', b"\xff", b" " * 2**17])
def test_labels_that_are_none_are_refused_by_their_file(tmp_path: Path, content: bytes) -> None:
    of_three(tmp_path)
    (tmp_path / "m" / LABELS).write_bytes(content)
    with pytest.raises(CheckpointError, match=LABELS):
        load(tmp_path, "m")
    assert load(tmp_path, "m@2").version == 2  # a number needs no labels


def test_a_label_of_a_version_that_is_gone_names_those_that_are_there(tmp_path: Path) -> None:
    of_three(tmp_path)
    (tmp_path / "m" / LABELS).write_text(json.dumps({"stable": [7], "empty": []}))
    with pytest.raises(CheckpointError, match=r"'stable' is version 7, .* it has versions \[1, 2, 3\]"):
        resolve(tmp_path, "m")
    with pytest.raises(CheckpointError, match="no checkpoint 'm@empty'"):
        resolve(tmp_path, "m@empty")


def test_labels_are_those_of_the_root_that_has_the_model(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    of_three(theirs)
    promote(theirs, "m@1")
    assert load([mine, theirs], "m").version == 1
    save(mine, "m", bundle(7))
    save(mine, "m", bundle(8))
    assert load([mine, theirs], "m").training.seed == 8
    assert labels([mine, theirs], "m") == {}
