"""Saving over another classifier: whatever stops the process, no mixture is loaded and nothing is lost."""

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from fact_peft import Adapter, FacTConfig, save_as_lora

pytest.importorskip("PIL")
pytest.importorskip("torchvision")

from benchmarks.interruption.saving import Saver, backbone, loaded_number, run

OLD, NEW = 2, 3  # which differ in labels, weights and image processor


class Killed(BaseException):
    """The process ends here."""


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("renamed", range(5))
def test_a_process_killed_between_two_renames_is_noticed_and_completed_by_the_command_of_the_error(
    renamed, tmp_path, monkeypatch
):
    saver, count, rename = Saver(tmp_path / "classifier"), 0, os.replace
    saver.save(OLD)

    def counted(*arguments):
        nonlocal count
        count += 1
        if count > renamed:
            raise Killed
        rename(*arguments)

    with monkeypatch.context() as patch:  # a killed process cleans nothing up
        patch.setattr("fact_peft.adapter.files.os.replace", counted)
        patch.setattr("fact_peft.adapter.files.shutil.rmtree", lambda *_, **__: None)
        if renamed == 4:
            saver.save(NEW)
        else:
            with pytest.raises(Killed):
                saver.save(NEW)
    if renamed in (0, 1):  # nothing yet, or the card
        assert loaded_number(saver.folder) == OLD
        return
    if renamed < 4:
        with pytest.raises(ValueError, match="two different saves") as error:
            loaded_number(saver.folder)
        with pytest.raises(ValueError, match="two different saves"):
            Adapter.read(saver.folder)
        command = re.search(r"Complete the save with: (mv .*)\.$", str(error.value))[1]
        subprocess.run(command, shell=True, check=True)
    assert loaded_number(saver.folder) == NEW


def test_killed_at_random_moments():
    found = run(kills=4, seed=1)
    assert found["mixed or lost"] == 0 and found["the last one saved"] + found["the one being saved"] == 4


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    saver = Saver(tmp_path / "classifier")
    saver.save(OLD)
    before = files(saver.folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fact_peft.adapter.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saver.save(NEW)
    assert files(saver.folder) == before and loaded_number(saver.folder) == OLD
    assert not list(saver.folder.glob(".saving-*"))


def in_processes(count, work):
    """Run `work(number)` in forked processes at the same time; returns their exit statuses."""
    processes = []
    for number in range(count):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


@pytest.mark.parametrize("how", ["classifier", "lora"])
def test_two_processes_may_save_into_one_folder_at_once(how, tmp_path):
    saver = Saver(tmp_path / "classifier")

    def work(number):
        for _ in range(10):
            if how == "classifier":
                saver.save(NEW)
            else:
                save_as_lora(saver.model, saver.folder)

    assert in_processes(2, work) == [0, 0]
    if how == "classifier":
        assert loaded_number(saver.folder) == NEW
    else:
        PeftModel.from_pretrained(backbone(), saver.folder)
    assert not list(saver.folder.glob(".saving-*"))


def test_a_config_that_was_edited_alone_is_refused(tmp_path):
    Adapter.of(Saver(tmp_path).model).write(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scale": 3.0}))
    for read in (Adapter.read, lambda folder: PeftModel.from_pretrained(backbone(), folder)):
        with pytest.raises(ValueError, match=r"Adapter\.read, replace, write"):
            read(tmp_path)


def test_an_edited_image_processor_is_not_refused(tmp_path):
    Saver(tmp_path).save(NEW)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [float(NEW)] * 3, "note": "edited"}))
    assert loaded_number(tmp_path) == NEW


def test_equal_adapters_are_equal_files(tmp_path):
    """safetensors writes the keys of the metadata in random order."""
    adapter = Adapter.of(get_peft_model(backbone(), FacTConfig(rank=2, storage="int4", init_weights=False)))
    for number in range(6):
        adapter.write(tmp_path / str(number))
    assert len({(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(6)}) == 1


def test_files_of_others_stay(tmp_path):
    (tmp_path / "folder" / "runs").mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    Saver(tmp_path / "folder").save(1)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
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
    Saver(tmp_path / "a").save(NEW)
    assert loaded_number(tmp_path / "a") == NEW
    save_as_lora(Saver(tmp_path / "b").model, tmp_path / "a")
    assert isinstance(PeftModel.from_pretrained(backbone(), tmp_path / "a").peft_config["default"], LoraConfig)
