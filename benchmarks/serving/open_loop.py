"""An open-loop load: requests leave at a fixed rate, whether or not earlier ones were answered.

A client that waits for answers slows down with the server and so measures too little; here the latency of a request
counts from the moment it was due to leave.
"""

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlencode

import aiohttp
import numpy as np

PATIENCE = 10.0  # seconds after which a request is given up


def zipf(num_names: int, count: int, seed: int) -> np.ndarray:
    """`count` indices below `num_names`, index k with a probability in proportion to 1 / (k + 1)."""
    weights = 1 / np.arange(1, num_names + 1)
    return np.random.default_rng(seed).choice(num_names, count, p=weights / weights.sum())


def uniform(num_names: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_names, size=count)


async def send(url: str, images: Sequence[bytes], names: Sequence[str], rate: float) -> dict:
    """One request for each of the `names`, `rate` a second.

    Returns:
        Milliseconds at three quantiles, answers a second from the first departure to the last answer, and how many
        requests were not answered with status 200 within `PATIENCE`.
    """
    latencies: list[float] = []
    refused = 0

    async def one(session: aiohttp.ClientSession, image: bytes, name: str, due: float) -> None:
        nonlocal refused
        try:
            async with session.post(f"{url}/predict?{urlencode({'adapter': name})}", data=image) as answer:
                await answer.read()
                good = answer.status == 200
        except (asyncio.TimeoutError, aiohttp.ClientError):
            good = False
        if good:
            latencies.append(time.perf_counter() - due)
        else:
            refused += 1

    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter() + 0.1
        sent = []
        for number, name in enumerate(names):
            due = start + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent.append(asyncio.create_task(one(session, images[number % len(images)], name, due)))
        await asyncio.gather(*sent)
    took = time.perf_counter() - start
    quantiles = [float(value) * 1000 for value in np.percentile(latencies, [50, 95, 99])] if latencies else [None] * 3
    measured = dict(zip(("p50", "p95", "p99"), quantiles, strict=True))
    return {**measured, "throughput": len(latencies) / took, "unanswered": refused}
