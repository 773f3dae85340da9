"""A folder saved over is the old one or the new one, at whatever step the process is stopped or the disk is full."""

import errno
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from fact_peft.storage.replacing import INCOMING, PENDING, RECORD, finish_replacing, replace_files
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.interruption.saving import Saver, backbone, loaded_number, numbers_of, run
from fact_peft import save_as_lora

STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


class Stop(BaseException):
    """The process ends here."""


class Steps:
    """Counts what changes files below a folder, and raises at the step where it is to."""

    def __init__(self):
        self.folder, self.count, self.at, self.error, self.once = None, 0, None, None, False

    def __call__(self, event, args):
        if self.folder is None or not self.changes_files(event, args):
            return
        self.count += 1
        if self.count == self.at or (self.at is not None and self.count > self.at and not self.once):
            raise self.error

    def changes_files(self, event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        flushes = event == "open" and args[1] is None  # os.open, before os.fsync
        return (event in STEPS or writes or flushes) and any(str(self.folder) in str(arg) for arg in args[:2])

    @contextmanager
    def watching(self, folder, at=None, error=None, once=False):
        self.folder, self.count, self.at, self.error, self.once = folder, 0, at, error, once
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope="session")
def steps():
    watcher = Steps()
    sys.addaudithook(watcher)  # for the rest of the process; without a folder it does nothing
    return watcher


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# From one to another: the config differs too; only weights and image processor; from nothing.
@pytest.mark.parametrize(
    "old, new", [(2, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, 2), (3, 4), (None, 1)])]
)
@pytest.mark.parametrize("how", ["killed", "full"])
def test_old_or_new_at_every_step(how, old, new, steps, tmp_path):
    # As in a process that is killed, nothing that comes after can clean up; on a full disk it can.
    error = {"killed": Stop(), "full": OSError(errno.ENOSPC, "No space left on device")}[how]
    saver, found, at = Saver(tmp_path / "old"), [], 0
    if old is not None:
        saver.save(old)
    while True:
        at += 1
        saver.folder = tmp_path / str(at)
        if old is not None:
            shutil.copytree(tmp_path / "old", saver.folder)
        try:
            with steps.watching(saver.folder, at, error, once=how == "full"):
                saver.save(new)
            stopped = False
        except (Stop, OSError, ValueError) as raised:
            stopped = error in (raised, raised.__cause__)
            assert stopped
        if old is None and not (saver.folder / "adapter_config.json").exists():
            assert stopped
            found.append(None)
        else:
            found.append(loaded_number(saver.folder))
            assert found[-1] in (old, new)
        if steps.count < at:
            assert not stopped
            break
        saver.save(new)  # whatever was left behind is in nobody's way
        assert not (saver.folder / INCOMING).exists() and not (saver.folder / PENDING).exists()
        assert loaded_number(saver.folder) == new
    assert at > 15 and found[0] == old and found[-1] == new
    if how == "killed":  # once new, it stays new; a full disk that keeps us from tidying up stops nothing
        assert found == sorted(found, key=[old, new].index)


@pytest.mark.parametrize("old, new", [(1, 2), (2, 3)])
def test_a_reader_that_knows_nothing_of_this_meets_no_half_unless_the_config_changes(old, new, steps, tmp_path):
    saver, plain, at = Saver(tmp_path / "old"), set(), 0
    saver.save(old)
    while True:
        at += 1
        saver.folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "old", saver.folder)
        before = files(saver.folder)
        try:
            with steps.watching(saver.folder, at, Stop()):
                saver.save(new)
        except Stop:
            pass
        else:
            break
        now = files(saver.folder)
        same = [now[name] == before[name] for name in ("adapter_config.json", "adapter_model.safetensors")]
        plain.add(tuple(same))
    whole_old, whole_new = (True, True), ((old % 3 == 0) == (new % 3 == 0), False)
    assert {whole_old, whole_new} <= plain
    assert plain - {whole_old, whole_new} == (set() if whole_new[0] else {(False, True)})


def test_killed_at_random_moments():
    found = run(kills=4, seed=1)
    assert found["mixed or lost"] == 0 and found["the last one saved"] + found["the one being saved"] == 4


def stopped_after_the_decision(folder, steps):
    """A folder in which the config is number 3's and all else is number 2's, with the rest to come."""
    saver = Saver(folder)
    saver.save(2)
    for at in range(1, 100):
        try:
            with steps.watching(folder, at, Stop()):
                saver.save(3)
        except Stop:
            pass
        if "number 3" in (folder / "adapter_config.json").read_text():
            return saver
        saver.save(2)
    raise AssertionError


def test_what_somebody_wrote_since_is_not_written_over(steps, tmp_path):
    saver = stopped_after_the_decision(tmp_path / "a", steps)
    saver.model.peft_config["default"].labels = ["number 3", "other"]
    for parameter in saver.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(9)
    saver.model.save_pretrained(saver.folder)  # PEFT's own, which knows nothing of the rest to come
    assert numbers_of(PeftModel.from_pretrained(backbone(), saver.folder)) == {9}


def test_a_folder_that_cannot_be_written_is_refused(steps, tmp_path, monkeypatch):
    saver = stopped_after_the_decision(tmp_path / "a", steps)
    with steps.watching(saver.folder, 1, OSError(errno.EROFS, "Read-only file system")):
        with pytest.raises(ValueError, match=r"was interrupted and cannot be finished.*Load it once where"):
            PeftModel.from_pretrained(backbone(), saver.folder)
    assert loaded_number(saver.folder) == 3


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"config": 1, "replaces": 2}', None])
def test_foreign_records_are_left_alone(record, tmp_path):
    folder = tmp_path / "folder"
    Saver(folder).save(1)
    (folder / PENDING).mkdir()
    (tmp_path / "outside").write_text("outside")
    (folder / PENDING / "adapter_model.safetensors").write_text("hostile")
    if record is None:
        import hashlib

        config = hashlib.sha256((folder / "adapter_config.json").read_bytes()).hexdigest()
        outside = hashlib.sha256(b"outside").hexdigest()
        record = json.dumps({"config": config, "replaces": {"../outside": outside, "adapter_model.safetensors": None}})
    (folder / PENDING / RECORD).write_text(record)
    before = files(folder)
    finish_replacing(folder)
    assert files(folder) == before and (tmp_path / "outside").read_text() == "outside"
    assert loaded_number(folder) == 1


def test_files_of_others_stay(tmp_path):
    (tmp_path / "folder" / "runs").mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    Saver(tmp_path / "folder").save(1)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine" and (tmp_path / "folder" / "runs").is_dir()
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {
        *("notes.txt", "runs", "README.md"),
        *("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"),
    }


def test_saving_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Saver(Path(".")).save(1)
    Saver(Path(".")).save(2)
    assert loaded_number(Path(".")) == 2


def test_adapters_of_other_methods_are_replaced_whole(tmp_path):
    lora = get_peft_model(backbone(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "a")
    Saver(tmp_path / "a").save(3)
    assert loaded_number(tmp_path / "a") == 3
    save_as_lora(tmp_path / "a", Saver(tmp_path / "b").model)
    assert isinstance(PeftModel.from_pretrained(backbone(), tmp_path / "a").peft_config["default"], LoraConfig)


def test_nothing_to_do_is_nothing_done(tmp_path):
    Saver(tmp_path / "a").save(1)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    Saver(tmp_path / "a").save(1)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times


def test_a_folder_of_new_files_is_used_up(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "one.txt").write_text("1")
    (tmp_path / "old").mkdir()
    replace_files(tmp_path / "old", tmp_path / "new")
    assert files(tmp_path / "old") == {"one.txt": b"1"}
