"""A ninth operation is one entry of the registry: nothing else has to be touched."""

from __future__ import annotations

import json
import subprocess
import sys

#: Registers before anything else is imported, as an entry in the file would.
SCRIPT = """
import json, sys
from types import MappingProxyType

import torch
from pyhealth.models import ecg_augmentations
from pyhealth.models.ecg_draws import signed_noise


def offset(x, magnitude, draw, rate):
    return x + (magnitude * draw.reshape(len(x)))[:, None, None]


ninth = ecg_augmentations.Augmentation("offset", offset, signed_noise, 0.0, 2.0, "mV")
ecg_augmentations.AUGMENTATIONS = MappingProxyType(
    {**ecg_augmentations.AUGMENTATIONS, "offset": ninth}
)

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
