"""README's program runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

README = Path(__file__).parents[1] / "README.md"


def test_program():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(program, names)
    shape = names["shape"]
    assert names["out"].shape == names["grads"].shape == shape
    assert names["y"].shape == (*shape[:3], shape[3] * shape[4])
    assert all(np.isfinite(names[name]).all() for name in ("out", "grads", "y"))
