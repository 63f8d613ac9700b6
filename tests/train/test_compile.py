"""`train.model.compile`: a compiled trunk trains as an uncompiled one does, under the same names."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from loop_factory import settings, train_in_this_process
from train.checkpoint import CheckpointWriter, State, checkpoint_folders, load_checkpoint
from train.distributed import World
from train.trainer import make_train_state
from trainer_factory import losses

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"),
]

ALONE = World(0, 1, torch.device("cpu"))


def test_a_compiled_trunk_trains_as_an_uncompiled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = settings("model.compile=true", "model.trunk_args={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}")
    eager = compiled.model_copy(update={"model": compiled.model.model_copy(update={"compile": False})})
    train_state, tensors = train_in_this_process(tmp_path / "compiled", compiled, ALONE)
    assert train_state.model.trunk._compiled_call_impl is not None  # type: ignore[union-attr]
    _, others = train_in_this_process(tmp_path / "eager", eager, ALONE)
    for (step, loss, lr), (other_step, other, other_lr) in zip(
        losses(tmp_path / "compiled"), losses(tmp_path / "eager"), strict=True
    ):
        assert (step, lr) == (other_step, other_lr) and math.isclose(loss, other, rel_tol=1e-5)
    assert {file: named.keys() for file, named in tensors.items()} == {
        file: named.keys() for file, named in others.items()
    }
    # A checkpoint of the one is a checkpoint of the other.
    state = State(samples_seen=96, number=1, labels="", idf="", betons="", options="", vocabulary=31)
    with CheckpointWriter(tmp_path, 1, 0) as writer:
        writer.save(tensors, state)
    resumed = make_train_state(eager, torch.ones(31), ALONE)
    load_checkpoint(checkpoint_folders(tmp_path)[-1], resumed, state)
    assert all(
        torch.equal(tensor, train_state.model.state_dict()[name]) for name, tensor in resumed.model.state_dict().items()
    )
