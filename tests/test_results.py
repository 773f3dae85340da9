"""Benchmark results on disk."""

import json
import subprocess

from benchmarks import results
from benchmarks.results import Results


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
    package = tmp_path / "benchmarks"
    (package / "results").mkdir(parents=True)
    for file in ("results.py", "results/speed.json"):
        (package / file).write_text("1\n")

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results.git_hash() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    commit = git("rev-parse", "HEAD").stdout[:12]
    (package / "results" / "speed.json").write_text("2\n")
    assert results.git_hash() == commit
    (package / "results.py").write_text("2\n")
    assert results.git_hash() == f"{commit}-dirty"
