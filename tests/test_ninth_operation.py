"""A ninth operation is one entry of the registry: nothing else has to be touched."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Adds the entry as soon as the module has run, as a line in its file would: before any
#: other module, PyHealth's own included, can take the registry from it.
SCRIPT = """
import importlib.util, json, sys
from types import MappingProxyType

import torch


def offset(x, magnitude, draw, rate):
    return x + (magnitude * draw.reshape(len(x)))[:, None, None]


class Entry:
    def find_spec(self, name, path=None, target=None):
        if name != "pyhealth.models.ecg_augmentations":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_add(module):
            from pyhealth.models.ecg_draws import signed_noise

            execute(module)
            ninth = module.Augmentation("offset", offset, signed_noise, 0.0, 2.0, "mV")
            module.AUGMENTATIONS = MappingProxyType(
                {**module.AUGMENTATIONS, "offset": ninth}
            )

        spec.loader.exec_module = execute_and_add
        return spec


sys.meta_path.insert(0, Entry())

from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.models.learned_augmentation import LearnedAugmentation
from pyhealth.models.taskaug_policy import TaskAugPolicy

torch.manual_seed(0)
policy = TaskAugPolicy(num_stages=2, sampling_rate=100)
x, y = torch.randn(8, 12, 300), torch.arange(8) % 2
out = policy(x, y)
out.square().mean().backward()
path = sys.argv[1] + "/policy.json"
policy.save(path)
loaded = LearnedAugmentation.load(path)
only = TaskAugPolicy(num_stages=1, operations=["offset"], sampling_rate=100)
change = only(x, y) - x
planted = sys.argv[1] + "/planted"
write_synthetic_ptbxl(planted, 10, sampling_rates=[100], nuisance={"offset": 1})
print(json.dumps({
    "names": policy.to_frame()["operation"].unique().tolist(),
    "gradients": [p.grad.isfinite().all().item() for p in policy.parameters()],
    "loaded": list(loaded(x, y).shape),
    "change": change.std(dim=(1, 2)).max().item(),
    "moved": change.abs().max().item(),
}))
"""


@pytest.mark.slow
def test_a_ninth_operation_is_one_entry_of_the_registry(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["names"]) == 9
    assert found["names"][-1] == "offset"
    assert all(found["gradients"])
    assert found["loaded"] == [8, 12, 300]
    assert found["change"] < 1e-5  # an offset moves all samples alike
    assert found["moved"] > 0.01
