"""The load generator of benchmarks/serving, against servers whose latency is known, and its table."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason='the load generator needs aiohttp: pip install ".[serving]"')

from benchmarks.reporting.results import Results
from benchmarks.serving import open_loop
from benchmarks.serving.report import plot, report


@contextmanager
def server(
    seconds: float = 0.0, one_at_a_time: bool = False, refuse: str = "", all_of: int = 1
) -> Iterator[tuple[str, list[str]]]:
    """Answers every request after so many seconds, and none before it has `all_of` them.

    Yields:
        Its address and the paths it was asked for.
    """
    asked, lock, has_all = [], threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            if len(asked) >= all_of:
                has_all.set()
            has_all.wait()
            if one_at_a_time:
                with lock:
                    time.sleep(seconds)
            else:
                time.sleep(seconds)
            self.send_response(503 if self.path.endswith(f"={refuse}") else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", asked
    finally:
        has_all.set()
        listening.shutdown()
        listening.server_close()
        thread.join()


def test_requests_leave_at_their_rate_whether_or_not_earlier_ones_were_answered():
    with server(all_of=40) as (url, asked):  # who waits for the first answer before asking again waits in vain
        measured = asyncio.run(open_loop.send(url, [b"image"], ["a", "b"] * 20, rate=40))
    assert Counter(asked) == {"/predict?adapter=a": 20, "/predict?adapter=b": 20}
    assert measured["unanswered"] == 0
    assert measured["throughput"] <= 40 / (39 / 40)  # the last one is due after 39 / 40 s
    assert measured["p50"] > 400  # the twentieth is due half a second before the last one


def test_waiting_behind_others_counts_as_latency():
    with server(0.05, one_at_a_time=True) as (url, _):
        measured = asyncio.run(open_loop.send(url, [b"image"], ["a"] * 20, rate=200))
    assert measured["p99"] > 800  # 20 x 50 ms after another, all due within 100 ms


def test_what_is_refused_or_late_is_counted(monkeypatch):
    with server(0.0, refuse="b") as (url, _):
        assert asyncio.run(open_loop.send(url, [b"image"], ["a", "b", "b"], rate=50))["unanswered"] == 2
    monkeypatch.setattr(open_loop, "PATIENCE", 0.2)
    with server(0.5) as (url, _):
        measured = asyncio.run(open_loop.send(url, [b"image"], ["a"], rate=50))
    assert (measured["unanswered"], measured["p50"], measured["throughput"]) == (1, None, 0)


def test_draws_follow_their_laws():
    few = np.bincount(open_loop.uniform(10, 10_000, seed=0), minlength=10)
    assert 800 < few.min() < few.max() < 1200  # 1,000 each, give or take six standard deviations
    ranked = np.bincount(open_loop.zipf(1000, 10_000, seed=0), minlength=1000)
    expected = 10_000 / sum(1 / rank for rank in range(1, 1001))
    assert ranked[0] == pytest.approx(expected, rel=0.1)
    assert ranked[1] == pytest.approx(expected / 2, rel=0.15)


def test_the_table_has_a_row_for_every_rate(tmp_path):
    results = Results(tmp_path / "results.json")
    measured = {"p50": 10.0, "p95": 1234.5, "p99": None, "throughput": 4.95, "unanswered": 3, "batch": 1.26}
    for rate in (5, 10):
        results.add({"served": "pool", "requests": "Zipf", "num_adapters": 9, "rate": rate, "seconds": 1}, measured)
    assert "| pool | Zipf | 10 | 5.0 | 10 | 1,234 | - | 3 | 1.3 |" in report(results)
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_batches_grow_when_the_service_is_asked_for_more_than_it_can_do_singly(tmp_path, run_module):
    pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install ".[serving]"')
    options = ["--served", "pool", "--rates", 150, "--seconds", 1, "--adapters", 8, "--port", 8766]
    assert "| pool | Zipf | 150 |" in run_module("benchmarks.serving", *options, "--results", tmp_path / "r.json")
    measured = Results(tmp_path / "r.json").frame()
    assert (measured["unanswered"] < 150).all()  # how many are answered in time is up to the machine
    assert (measured["batch"] > 2).all()
