"""The scripts that measure, run as a developer runs them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_measures_ours_against_its_peers(tmp_path: Path):
    script = Path(__file__).parents[1] / "scripts" / "benchmark.py"
    words = shlex.split("--only W7 W9 --repeats 1 --threads 1 --workers 1 --chunk 5 --device cpu --out b.json")
    done = subprocess.run([sys.executable, str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["machine"]["matmul_gflop_per_s"] > 1
    reptile, drawing = found["rows"]
    assert set(reptile["tasks_per_s"]) == {"ours", "loop"}
    assert reptile["ratio"]["loop"] > 0
    assert 0 < reptile["data_share"] < 1
    assert 0 < reptile["floor_share"] < 1
    assert drawing["tasks_per_s"]["ours"] > 0
    assert "| W7 Reptile" in done.stdout


@pytest.mark.slow
def test_memory_is_bounded_by_the_chunk_and_halved_by_computing_steps_again():
    script = Path(__file__).parents[1] / "scripts" / "memory.py"
    done = subprocess.run([sys.executable, str(script), "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| `algo", "| in"))]
    kept, again, cut, whole = ([float(cell) for cell in row[2:-1]] for row in rows)
    assert again[-1] < 0.6 * kept[-1]
    assert cut[-1] < 1.5 * cut[1]
    assert whole[-1] > 5 * cut[-1]
