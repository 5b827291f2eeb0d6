"""Two processes side by side give the parameters of one: DDP, and FSDP by configuration alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.trainer.world import config, largest_difference, llama, parameters, rollouts, value_model

from charter.trainer import state
from charter.trainer.update import Updater

STEPS = 2


def _updater(accelerator=None):
    return Updater(llama(), value_model(), llama(), config(micro_batch_tokens=50), accelerator)


def _sharded():
    """FSDP2 over gloo. accelerate offers FSDP on accelerators alone, so it is told that there is one."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    return Accelerator(fsdp_plugin=plugin)


def _run(folder: Path) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    frozen = rollouts(llama(), 9, noise=0.1)
    accelerator = _sharded() if os.environ.get("SHARDED") else None
    updater = _updater(accelerator)
    assert updater.accelerator.num_processes == 2
    for _ in range(STEPS):
        updater.update(frozen)
    if updater.accelerator.is_main_process:
        (folder / "kind").write_text(str(updater.accelerator.distributed_type.value))
        (folder / "saved").mkdir()
    updater.accelerator.wait_for_everyone()
    state.save(updater, folder / "saved")
    updater.accelerator.wait_for_everyone()
    resumed = _updater(accelerator)
    state.load(resumed, folder / "saved")
    resumed.update(frozen)
    updater.update(frozen)
    if updater.accelerator.is_main_process:
        (folder / "went-on").mkdir()
        (folder / "resumed").mkdir()
    updater.accelerator.wait_for_everyone()
    state.save(updater, folder / "went-on")
    state.save(resumed, folder / "resumed")
    updater.accelerator.end_training()


def _launch(folder: Path, **environment: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = f"from tests.trainer.test_several_devices import _run, Path; _run(Path({str(folder)!r}))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(o[-3000:] for o in outputs)


@pytest.mark.parametrize(("kind", "environment"), [("MULTI_CPU", {}), ("FSDP", {"SHARDED": "1"})])
def test_two_processes_give_the_parameters_of_one(tmp_path, kind, environment):
    _launch(tmp_path, **environment)
    assert (tmp_path / "kind").read_text() == kind
    alone = _updater()
    frozen = rollouts(llama(), 9, noise=0.1)
    for _ in range(STEPS):
        alone.update(frozen)
    together = _updater()
    state.load(together, tmp_path / "saved")
    assert together.step == STEPS
    assert largest_difference(parameters(alone), parameters(together)) < 1e-5
    went_on, resumed = _updater(), _updater()
    state.load(went_on, tmp_path / "went-on")
    state.load(resumed, tmp_path / "resumed")
    assert largest_difference(parameters(went_on), parameters(resumed)) == 0.0
