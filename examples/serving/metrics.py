"""The metrics of Ray Serve in the text format of Prometheus."""

from urllib.request import urlopen

import ray


def exposition() -> str:
    """The counters, gauges and histograms of Ray Serve from the metrics agents of all machines.

    Replicas report to the agent of their machine every ten seconds.
    """
    families: dict[str, list[str]] = {}  # the lines of each metric, which must be consecutive
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            known = set(families)
            for line in lines:
                is_comment = line.startswith("#")
                if is_comment:
                    name = line.split()[2]
                if name.startswith("ray_serve_") and not (is_comment and name in known):
                    families.setdefault(name, []).append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
