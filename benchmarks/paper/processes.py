"""Runs missing jobs, each in a process of its own, one at a time on each GPU; the parent alone writes results."""

import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from benchmarks.paper.training import Job, run
from benchmarks.reporting.results import Results

Key = TypeVar("Key", bound=Hashable)

# Children are forked from a server that has imported torch and transformers but never touched a GPU.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.paper.training"])


def devices(workers: int) -> list[str]:
    """A value of CUDA_VISIBLE_DEVICES per worker: one for each visible GPU, or `workers` times none."""
    if not torch.cuda.is_available():
        return [""] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def run_missing(jobs: Mapping[Key, Job], results: Results, workers: int) -> dict[Key, dict[str, Any]]:
    """Run the jobs that have no result yet, keep each result as it comes, and return the results of all.

    Raises:
        FileNotFoundError, ValueError: If a list of a missing job is wrong, before anything is run; see `read_list`.
        RuntimeError: If jobs failed, after all others are done; it tells which and why.
    """
    missing = [job for job in dict.fromkeys(jobs.values()) if results.find(**asdict(job)) is None]
    check_lists(missing)
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices(workers):
        free.put(device)

    def run_on_a_free_device(job: Job) -> dict[str, Any]:
        device = free.get()
        try:
            return in_own_process(job, device)
        finally:
            free.put(device)

    failures = []
    pool = ThreadPoolExecutor(free.qsize())
    try:
        futures = {pool.submit(run_on_a_free_device, job): job for job in missing}
        for future in tqdm(as_completed(futures), "jobs", len(futures), disable=not futures):
            try:
                results.add(asdict(futures[future]), future.result())
            except RuntimeError as error:
                failures.append(f"{futures[future]}\n{error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(missing)} jobs failed:\n" + "\n".join(failures))
    return {key: results.find(**asdict(job)) or {} for key, job in jobs.items()}


def check_lists(jobs: Iterable[Job]) -> None:
    """Read every list once, so that a wrong one is reported before hours of training."""
    lists = {(job.train_list, job.val_list, job.test_list): job for job in jobs}
    for names, job in lists.items():
        for name in filter(None, names):
            job.read(name)


def in_own_process(job: Job, device: str) -> dict[str, Any]:
    """Run a job with CUDA_VISIBLE_DEVICES=`device`.

    Raises:
        RuntimeError: If the job raised, with its traceback, or if its process died.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(job, device, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    if isinstance(outcome, dict):
        return outcome
    raise RuntimeError(outcome or f"The process ended with exit code {process.exitcode} and without a result.")


def _work(job: Job, device: str, sender: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Raised inside peft and transformers about each other.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    try:
        sender.send(run(job))
    except Exception:
        sender.send(traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
