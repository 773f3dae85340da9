"""Benchmark results on disk."""

import json
import subprocess

from benchmarks.reporting import results
from benchmarks.reporting.results import Results


def test_a_setting_is_kept_once_and_found_again_after_a_restart(tmp_path):
    file = tmp_path / "sub" / "results.json"
    kept = Results(file)
    kept.add({"method": "a", "ranks": (1, 2)}, {"seconds": 1.0})
    kept.add({"method": "b", "ranks": (1, 2)}, {"seconds": 2.0})
    kept.add({"method": "a", "ranks": (1, 2)}, {"seconds": 3.0})
    reread = Results(file)
    assert reread.find(method="a", ranks=(1, 2)) == {"seconds": 3.0}
    assert reread.find(method="a", ranks=(1,)) is None
    assert sorted(reread.frame()["seconds"]) == [2.0, 3.0]
    assert {"git", "date", "hardware", "torch"} <= set(json.loads(file.read_text())[0]["provenance"])
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_commit_is_dirty_when_code_differs_and_not_when_results_do(tmp_path, monkeypatch):
    code = tmp_path / "benchmarks" / "reporting" / "results.py"
    numbers = tmp_path / "benchmarks" / "speed" / "results" / "speed.json"
    for file in (code, numbers):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(results, "__file__", str(code))
    assert results.git_hash() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    commit = git("rev-parse", "HEAD").stdout[:12]
    numbers.write_text("2\n")
    assert results.git_hash() == commit
    code.write_text("2\n")
    assert results.git_hash() == f"{commit}-dirty"
