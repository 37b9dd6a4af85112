#!/usr/bin/env python
"""Times training steps and evaluation against the same work as other tools do it, interleaved in one run.

    .venv/bin/python scripts/benchmark.py                  every workload
    .venv/bin/python scripts/benchmark.py --only W1 W5     some of them
    pip install higher==0.2.1                              for the column `higher`; without it that column stays empty

Every round runs ours and each peer once, one after the other (A B A B). The table shows the median over the rounds, and the
median of the ratios within a round, which a short slow phase of the machine hardly changes. `floor` is the time that the
arithmetic of the plain loop would take at the machine's matrix-multiply rate, as a share of our time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peak import peak
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from workloads import NAMES, Bench, Step, with_threads

from fsl_cli import device, speed, tuning


def seconds(step: Step, place: torch.device) -> float:
    """The seconds that one call takes."""
    if place.type == "cuda":
        torch.cuda.synchronize()  # wait for earlier work
    start = time.perf_counter()
    step()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fair(step: Step, place: torch.device) -> int:
    """The number of CPU threads with which a peer is fastest: for our step it is measured too."""
    step()
    candidates = tuning.halvings(torch.get_num_threads())
    times = {threads: min(seconds(with_threads(step, threads), place) for _ in range(2)) for threads in candidates}
    return min(times, key=times.__getitem__)


def matmul_rate(place: torch.device, precision: str) -> float:
    """Floating-point operations per second of a large matrix product in the precision of our step: the best of ten."""
    n = 4096 if place.type == "cuda" else 1536
    settled = device.arithmetic(place, precision)
    a = torch.randn(n, n, device=place, dtype=torch.bfloat16 if settled == "bf16" else torch.float32)
    times = [seconds(lambda: torch.mm(a, a), place) for _ in range(12)]
    return 2 * n**3 / min(times[2:])


def step_of(name: str, which: str, arguments: argparse.Namespace) -> Step:
    """The step of one implementation of a workload, whose memory `peak` measures."""
    workload = Bench(device.choose(arguments.device), arguments).build(name)
    step = workload.ours if which == "ours" else workload.peers[which]
    assert step is not None
    return step


def measure(name: str, arguments: argparse.Namespace, place: torch.device, rate: float) -> dict[str, Any]:
    """Measures one workload and returns its row of the table; `rate`: that of `matmul_rate`."""
    bench = Bench(place, arguments)
    workload = bench.build(name)
    runs: dict[str, Step] = {"ours": workload.ours, **{n: s for n, s in workload.peers.items() if s is not None}}
    done = {n: workload.scale.get(n, workload.tasks) for n in runs}
    threads = {n: fair(step, place) for n, step in runs.items() if n != "ours"}
    runs |= {n: with_threads(runs[n], threads[n]) for n in threads}
    calls = speed.WARM_UP + 1 if arguments.graph else 1  # a graph is captured in the last of them
    for step in runs.values():
        for _ in range(calls):
            step()  # warms up
    rounds = [{n: seconds(step, place) / done[n] for n, step in runs.items()} for _ in tqdm(range(arguments.repeats), desc=name)]
    per_task = {n: median(r[n] for r in rounds) for n in runs}
    row: dict[str, Any] = {
        "name": name,
        "what": workload.what,
        "chosen": bench.chosen.get(name),
        "peer_threads": threads,
        "tasks_per_s": {n: 1 / t for n, t in per_task.items()},
        "ratio": {n: median(r[n] / r["ours"] for r in rounds) for n in runs if n != "ours"},
    }
    if workload.data is not None:
        drawing = median(seconds(workload.data, place) for _ in range(20))
        row["data_share"] = drawing / (drawing + per_task["ours"] * workload.tasks)
    if workload.floor is not None:
        with FlopCounterMode(display=False) as counter:
            workload.floor()
        row["gflop"] = counter.get_total_flops() / 1e9
        row["floor_share"] = counter.get_total_flops() / rate / (per_task["ours"] * workload.tasks)
    if arguments.memory:
        chosen = bench.chosen.get(name, {})
        settled = argparse.Namespace(**vars(arguments) | {"chunk": chosen.get("task_chunk"), **chosen})
        peaks = {n: peak(step_of, name, n, settled, calls=calls) for n in runs}
        row["peak_mib"] = {n: None if mib is None else round(mib) for n, mib in peaks.items()}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ("", "ours, tasks/s", "loop, tasks/s", "`higher`, tasks/s", "ours : loop", "ours : `higher`", "data", "floor",
             "chunk", "threads", "workers", "layout", "peak, MiB (ours, loop)")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        speeds, ratio, chosen = row["tasks_per_s"], row["ratio"], row["chosen"] or {}
        cells = [f"{row['name']} {row['what']}"]
        cells += [f"{speeds[n]:.3g}" if n in speeds else "-" for n in ("ours", "loop", "higher")]
        cells += [f"{ratio[n]:.2f}" if n in ratio else "-" for n in ("loop", "higher")]
        cells += [f"{100 * row[n]:.1f} %" if n in row else "-" for n in ("data_share", "floor_share")]
        cells += [str(chosen.get("task_chunk") or "-"), str(chosen.get("threads") or "all"), str(chosen.get("workers", "-"))]
        cells.append("channels last" if chosen.get("channels_last") else "contiguous" if chosen else "-")
        cells.append(", ".join(str(row["peak_mib"][n]) for n in ("ours", "loop")) if "peak_mib" in row else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, and writes every number to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="W", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="of our step on a CPU (measured)")
    parser.add_argument("--workers", type=int, help="that share out the tasks of our step on a CPU (measured)")
    parser.add_argument("--chunk", type=int, help="tasks that our step maps at once (measured)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "tf32", "bf16"), help="of our step")
    parser.add_argument("--compile", action="store_true", help="our step through torch.compile")
    parser.add_argument("--graph", action="store_true", help="our step as a CUDA graph")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    parser.add_argument("--out", default="benchmark.json", help="where the numbers go (benchmark.json)")
    parser.set_defaults(channels_last="auto")
    arguments = parser.parse_args()
    place = device.choose(arguments.device)
    rate = matmul_rate(place, arguments.precision)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "device": torch.cuda.get_device_name() if place.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflop_per_s": rate / 1e9,
        "commit": commit,
        "command": " ".join(sys.argv),
    }
    print(json.dumps(machine))
    rows = []
    for name in arguments.only:
        rows.append(measure(name, arguments, place, rate))
        Path(arguments.out).write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
