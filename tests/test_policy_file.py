"""A policy's JSON file: exact, readable, and every damage named."""

import json

import pytest
import torch

from pyhealth.models.taskaug_policy import TaskAugPolicy


class Touch:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_policy(stages=2, **settings):
    return TaskAugPolicy(stages, **settings).randomize_(seeded(0))


def damaged(tmp_path, change):
    """Save a policy, change its content and return the file."""
    path = tmp_path / "mi.json"
    random_policy().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_numbers_come_back_to_the_bit(tmp_path, dtype, shared):
    policy = random_policy(shared_magnitudes=shared).to(dtype)
    with torch.no_grad():  # numbers that a short decimal would not tell apart
        policy.logits[0, 0] = -0.0
        policy.logits[0, 1] = torch.nextafter(policy.logits[0, 2], policy.logits[0, 3])
        policy.logits[1, 0] = torch.finfo(dtype).tiny
    policy.save(tmp_path / "mi.json")
    again = TaskAugPolicy.load(tmp_path / "mi.json")
    assert dict(again.named_parameters()).keys() == (
        dict(policy.named_parameters()).keys()
    )
    for name, value in policy.state_dict().items():
        other = again.state_dict()[name]
        assert other.dtype == dtype
        assert other.view(torch.uint8).equal(value.view(torch.uint8)), name


def test_a_policy_without_stages_comes_back(tmp_path):
    TaskAugPolicy(0).save(tmp_path / "none.json")
    assert TaskAugPolicy.load(tmp_path / "none.json").logits.shape == (0, 8)


def test_people_can_read_the_file(tmp_path):
    policy = random_policy(1, sampling_rate=100, operations=["time_mask", "no_op"])
    policy.save(tmp_path / "mi.json", provenance={"seed": 3, "data_digest": "ab"})
    content = json.loads((tmp_path / "mi.json").read_text())
    assert content["stages"] == policy.to_frame().to_dict("records")
    assert content["settings"]["sampling_rate"] == 100
    assert content["provenance"] == {"seed": 3, "data_digest": "ab"}
    assert torch.__version__.startswith(content["written_by"]["torch"])
    assert content["written_by"]["pyhealth-taskaug"]


def test_provenance_is_kept_when_a_loaded_policy_is_saved_again(tmp_path):
    random_policy().save(tmp_path / "a.json", provenance={"seed": 3, "task": "MI"})
    policy = TaskAugPolicy.load(tmp_path / "a.json")
    policy.save(tmp_path / "b.json", provenance={"seed": 4})
    again = TaskAugPolicy.load(tmp_path / "b.json")
    assert again.provenance == {"seed": 4, "task": "MI"}
    assert policy.provenance == {"seed": 3, "task": "MI"}


@pytest.mark.parametrize("value", [torch.tensor(1), float("nan")])
def test_provenance_of_other_than_plain_values_is_refused(tmp_path, value):
    with pytest.raises((TypeError, ValueError), match="provenance must be plain"):
        random_policy().save(tmp_path / "mi.json", provenance={"seed": value})
    assert not (tmp_path / "mi.json").exists()


def test_a_policy_that_is_not_finite_is_not_saved(tmp_path):
    policy = random_policy()
    policy.mag_pos.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="mag_pos are not finite"):
        policy.save(tmp_path / "mi.json")
    assert not (tmp_path / "mi.json").exists()


def test_a_file_of_torch_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"config": Touch(tmp_path / "owned")}, tmp_path / "evil.json")
    with pytest.raises(ValueError, match=r"evil.json is not a policy file"):
        TaskAugPolicy.load(tmp_path / "evil.json")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "evil.json", weights_only=False)
    assert (tmp_path / "owned").exists()  # the trap does work


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_file_cut_short_is_named(tmp_path, share):
    path = tmp_path / "mi.json"
    random_policy().save(path)
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=r"mi.json is not a policy file, or it is cut"):
        TaskAugPolicy.load(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        TaskAugPolicy.load(tmp_path / "absent.json")


DAMAGES = {
    "another format": (
        lambda c: c.pop("format"),
        "is JSON, but not a policy",
    ),
    "another version": (
        lambda c: c.update(version=2),
        r"has version 2 of the policy file, and this program reads 1",
    ),
    "no parameters": (lambda c: c.pop("parameters"), "it has no parameters"),
    "no dtype": (lambda c: c.update(dtype="int8"), "dtype must be one of"),
    "an unknown setting": (
        lambda c: c["settings"].update(colour=1),
        r"have the unknown \['colour'\]",
    ),
    "a missing setting": (
        lambda c: c["settings"].pop("selection"),
        r"lack \['selection'\]",
    ),
    "a setting of another type": (
        lambda c: c["settings"].update(num_stages="2"),
        "num_stages must be int, found '2'",
    ),
    "a truth value for a number": (
        lambda c: c["settings"].update(num_stages=True),
        "num_stages must be int, found True",
    ),
    "a setting out of range": (
        lambda c: c["settings"].update(temperature=-1),
        r"mi.json: temperature must be positive, got -1",
    ),
    "an unknown operation": (
        lambda c: c["settings"]["operations"].__setitem__(0, "squeeze"),
        r"mi.json: operations must be .*'squeeze'",
    ),
    "another number of stages": (
        lambda c: c["settings"].update(num_stages=3),
        r"'logits': \(2, 8\).* but 3 stages of 8 operations need",
    ),
    "no stages": (
        lambda c: c["settings"].update(num_stages=0),
        "but 0 stages of 8 operations need",
    ),
    "a missing parameter": (
        lambda c: c["parameters"].pop("mag_pos"),
        r"'mag_pos': \(2, 8\)",
    ),
    "rows of different lengths": (
        lambda c: c["parameters"]["logits"][0].pop(),
        "logits is not a table of numbers",
    ),
    "text for a number": (
        lambda c: c["parameters"]["logits"][0].__setitem__(0, "1"),
        "logits is not a table of numbers",
    ),
    "not a number": (
        lambda c: c["parameters"]["mag_neg"][1].__setitem__(0, float("nan")),
        "mag_neg has numbers that are not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named(tmp_path, name):
    change, words = DAMAGES[name]
    with pytest.raises(ValueError, match=words):
        TaskAugPolicy.load(damaged(tmp_path, change))
