"""Real tokens per second in the update phase: ours beside TRL 1.12.0's PPO, on the same frozen rollouts.

`python bench/trainer.py --trl PYTHON` (`make bench-trainer`). Prompts of 16-64 tokens, answers of 8-128 with
a mean of 48. Each round runs each side in a process of its own, TRL with every micro-batch size (its best
counts); a side's number is the median over rounds of its fastest update in the process. The update phase is
the epochs: from the first permutation to the last optimizer step. What both do before (log-probs of policy
and reference, values) is not in it. TRL computes the entropy again in every micro-batch, we once before the
epochs. TRL's garbage collection, half of its wall time, is switched off: what is compared is arithmetic.

Memory: the process's peak, and what ours is made of by counting tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from frozen import Shape, read, write

SHAPES = {
    "seed-like, 1.1M": Shape(
        vocabulary=2048, width=128, inner=344, layers=4, heads=4, rollouts=64,
        prompt=(16, 64), answer=(8, 128), answer_mean=48.0,
    ),
    "wider, 8M": Shape(
        vocabulary=4096, width=320, inner=864, layers=6, heads=5, rollouts=64,
        prompt=(16, 64), answer=(8, 128), answer_mean=48.0,
    ),
}  # fmt: skip


def ours(folder: Path, threads: int, epochs: int, updates: int, budget: int) -> dict[str, Any]:
    """Our side, in this process."""
    import torch

    torch.set_num_threads(threads)
    import compare

    policy, value, reference = compare.load(folder)
    rollouts = compare.frozen_rollouts(folder, policy, 1.0)
    base = rss_bytes()
    config = compare.PPOConfig(
        learning_rate=1e-5, epochs=epochs, max_grad_norm=None, micro_batch_tokens=budget
    )
    updater = compare.Updater(policy, value, reference, config)
    metrics = [updater.update(rollouts) for _ in range(updates)]
    parameters = sum(p.numel() for m in (policy, value) for p in m.parameters())
    shape = read_shape(folder)
    answer_tokens = budget * sum(len(r.answer_ids) for r in rollouts) // sum(r.tokens for r in rollouts)
    per_token = 4 * shape["layers"] * (14 * shape["width"] + 4 * shape["inner"])
    return {
        "update_seconds": [m.seconds["epochs"] for m in metrics],
        "prepare_seconds": [m.seconds["prepare"] for m in metrics],
        "padding_waste": metrics[-1].padding_waste,
        "peak_bytes": peak_bytes(),
        "made_of": {
            "python, torch and models before the first update": base,
            "gradients (policy and value)": 4 * parameters,
            "Adam's moments (policy and value)": 8 * parameters,
            "logits of one micro-batch": 4 * answer_tokens * shape["vocabulary"],
            "activations of one micro-batch, one model (estimated)": per_token * budget,
        },
    }


def read_shape(folder: Path) -> dict[str, int]:
    """The shape that the folder was written with."""
    shape: dict[str, int] = json.loads((folder / "rollouts.json").read_text())["shape"]
    return shape


def rss_bytes() -> int:
    """Resident size now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Largest resident size of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours_apart(folder: Path, threads: int, epochs: int, updates: int, budget: int) -> dict[str, Any]:
    """Our side, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--ours",
        folder,
        str(threads),
        str(epochs),
        str(updates),
        str(budget),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"our side failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare_shape(title: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds over one model; prints and returns the medians."""
    import compare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, shape)
        rollouts = read(folder)
        real = sum(len(r["prompt"]) + len(r["answer"]) for r in rollouts)  # type: ignore[arg-type]
        answers = [len(r["answer"]) for r in rollouts]  # type: ignore[arg-type]
        mean = statistics.mean(answers)
        print(f"{title}: {real} real tokens in {len(rollouts)} rollouts, mean answer {mean:.1f}, "
              f"{options.epochs} epochs, {options.threads} thread(s)")  # fmt: skip
        speeds: dict[str, list[float]] = {"ours": []}
        last: dict[str, dict[str, Any]] = {}
        for _ in range(options.rounds):
            found = ours_apart(folder, options.threads, options.epochs, options.updates, options.budget)
            speeds["ours"].append(real * options.epochs / min(found["update_seconds"]))
            last["ours"] = found
            for micro in options.micro:
                theirs = compare.run_trl(
                    options.trl.absolute(),
                    folder,
                    {
                        "temperature": 1.0, "learning_rate": 1e-5, "num_ppo_epochs": options.epochs,
                        "updates": options.updates, "micro_batch": micro, "threads": options.threads,
                        "no_garbage_collection": True,
                    },
                    folder / "trl.json",
                )  # fmt: skip
                side = f"TRL, micro-batches of {micro}"
                speeds.setdefault(side, []).append(real * options.epochs / min(theirs["update_seconds"]))
                last[side] = theirs
        medians = {side: statistics.median(s) for side, s in speeds.items()}
        best = max((s for s in medians if s != "ours"), key=medians.__getitem__)
        for side, speed in medians.items():
            print(f"  {side:26}{speed:9.0f} real tokens/s   peak {last[side]['peak_bytes'] / 2**20:6.0f} MiB")
        ratio = medians["ours"] / medians[best]
        waste = last["ours"]["padding_waste"]
        print(f"  ratio to TRL's best: {ratio:.2f}   padding waste {waste:.1%}   our prepare phase "
              f"{min(last['ours']['prepare_seconds']):.2f} s")  # fmt: skip
        for part, size in last["ours"]["made_of"].items():
            print(f"    {size / 2**20:8.1f} MiB  {part}")
    return {"medians": medians, "ratio": ratio, "padding_waste": waste, "memory": last["ours"]["made_of"]}


def main(arguments: Sequence[str]) -> int:
    """Both shapes; writes JSON when asked."""
    if arguments[:1] == ["--ours"]:
        print(json.dumps(ours(Path(arguments[1]), *map(int, arguments[2:]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, required=True, help="python of the environment with trl 1.12.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="updates in each process; the fastest counts")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=int, default=2048, help="our micro_batch_tokens")
    parser.add_argument("--micro", type=int, nargs="+", default=[8, 16], help="TRL's micro-batch sizes")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = {title: compare_shape(title, SHAPES[title], options) for title in options.shapes}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
