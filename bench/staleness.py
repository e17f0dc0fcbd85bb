"""The demo under different staleness bounds K: accuracy reached, seconds of training, staleness seen.

    python bench/staleness.py [--bounds 0 4] [--seeds 0 1 2] [--steps 70]

Runs are interleaved (every bound with one seed, then with the next), each as the two processes of `outrider demo`.
Prints a table and, last, one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from about import about
from rich.console import Console
from rich.table import Table


def run_demo(bound: int, seed: int, steps: int, directory: str) -> dict[str, float]:
    """One demo run; the JSON object that it ends with."""
    command = [sys.executable, "-m", "outrider.cli.main", "demo", "--max_staleness", str(bound), "--seed", str(seed),
               "--steps", str(steps), "--output_dir", directory]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode != 0:
        raise SystemExit(f"demo with K={bound}, seed {seed} ended with status {output.returncode}:\n{output.stderr}")
    return json.loads(output.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run all combinations and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bounds", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=70, help="of each run")
    options = parser.parse_args()
    results: dict[int, list[dict[str, float]]] = {bound: [] for bound in options.bounds}
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:
            for bound in options.bounds:
                results[bound].append(run_demo(bound, seed, options.steps, directory))
                print(f"K={bound} seed={seed}: {results[bound][-1]}", file=sys.stderr, flush=True)
    table = Table("K", "seed", "before", "after", "train seconds", "max staleness seen")
    for bound, runs in results.items():
        for seed, run in zip(options.seeds, runs, strict=True):
            table.add_row(
                str(bound),
                str(seed),
                f"{run['accuracy_before']:.3f}",
                f"{run['accuracy_after']:.3f}",
                f"{run['train_seconds']:.1f}",
                str(run["max_staleness_seen"]),
            )
    Console(highlight=False).print(table)
    summary = {
        f"k{bound}": {
            "accuracy_after_mean": round(statistics.mean(run["accuracy_after"] for run in runs), 4),
            "accuracy_after_min": min(run["accuracy_after"] for run in runs),
            "train_seconds_median": statistics.median(run["train_seconds"] for run in runs),
            "max_staleness_seen": max(run["max_staleness_seen"] for run in runs),
        }
        for bound, runs in results.items()
    }
    print(json.dumps({**summary, **about()}))


if __name__ == "__main__":
    main()
