"""Benchmark results on disk."""

import json

from benchmarks.results import Results


def test_a_setting_is_kept_once_and_found_again_after_a_restart(tmp_path):
    file = tmp_path / "sub" / "results.json"
    results = Results(file)
    results.add({"method": "a", "ranks": (1, 2)}, {"seconds": 1.0})
    results.add({"method": "b", "ranks": (1, 2)}, {"seconds": 2.0})
    results.add({"method": "a", "ranks": (1, 2)}, {"seconds": 3.0})
    reread = Results(file)
    assert reread.find(method="a", ranks=(1, 2)) == {"seconds": 3.0}
    assert reread.find(method="a", ranks=(1,)) is None
    assert sorted(reread.frame()["seconds"]) == [2.0, 3.0]
    assert {"git", "date", "hardware", "torch"} <= set(json.loads(file.read_text())[0]["provenance"])
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
