"""The card of a published policy, written from its file and from nothing else."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from markdown_table import markdown

#: The diagnostic superclasses, for people.
LABELS = {
    "MI": "myocardial infarction",
    "STTC": "ST/T change",
    "CD": "conduction disturbance",
    "HYP": "hypertrophy",
}
SCALED = {"dataset": "(one scale, fitted on the training records: voltage is kept)"}
#: Training settings that say how the policy was learned.
SHOWN = (
    "policy_stages",
    "hypergradient",
    "outer_loss",
    "outer_lr",
    "outer_every",
    "alignment_records",
    "epochs",
    "warmup_epochs",
    "batch_size",
    "lr",
    "base_width",
    "precision",
)
TEXT = """# {label}: a learned augmentation for {meaning}

A policy of {stages} stages for {task} against the rest, learned with
`BiLevelTrainer` from clean validation records and published as it was after the last
epoch.

```python
import torch

from pyhealth.models.learned_augmentation import LearnedAugmentation

augment = LearnedAugmentation.published("{label}", sampling_rate=500)
signals, labels = torch.randn(8, 12, 5000), torch.arange(8) % 2
augmented = augment(signals, labels)
```

## What it was learned on

- **Corpus.** {corpus}, {records:,} records of folds {folds}.
- **Label.** 1 if a record has a diagnostic statement of the superclass {label}.
- **Cohort.** {cohort_size} records drawn by patient, prevalence kept, seed {seed}:
  {train} trained the network, {val} validated: they moved the policy, and picked the
  epoch of each network below. Fold {test_fold} ({test:,} records, {patients:,}
  patients) tested, once, after training.
- **Signals.** {seconds:g} s of {leads} leads at {rate:g} Hz, scaling `{normalize}`
  {scaled}.
- **Training.** {settings}; torch threads: {threads}. The policy is that of epoch
  {epoch}, counted from 0.
- **Versions.** {versions}. Digest of records and labels: `{digest}`.

## How it did

{scores}

{note}

## The policy

{policy}

Every operation began at a probability of {start:.3f} and a magnitude in the middle of
its interval.

## Limits

- One seed. It says neither that augmentation helps nor that learning it does. Over
  several seeds augmentation helped with few labels; that a learned policy does better
  than a random one was not shown ([results](../docs/results.md)).
- For MI and STTC the policies of several seeds agree hardly more than chance has it,
  for HYP they do (tau in the results). The table above is one of many that may do as
  well, and no finding about ECGs.
- The seed was fixed before any score was seen. Fold {test_fold} has also tested the
  studies of the results. Rounding differs between machines and training makes it
  grow: the same seed elsewhere gives another policy and another score.
- The magnitudes of the two classes differ, so an augmented signal can give its label
  away (leak AUROC; 0.5: not at all). Where that matters use `magnitudes="mean"`, which
  needs no labels.
- Learned on the twelve standard leads of ten-second ECGs; on others it was not tried.
- Not a medical device.

Learned by `benchmarks/published_policies.py`. MIT licence. The records: Wagner et al.,
PTB-XL, a large publicly available electrocardiography dataset, Scientific Data 7:154,
2020 (CC BY 4.0). The method: Raghu et al., Data Augmentation for Electrocardiograms,
CHIL 2022.
"""


def card(path: Path) -> str:
    """Return the card of a policy file that ``published_policies.py`` has written."""
    from pyhealth.models.taskaug_policy import TaskAugPolicy

    policy = TaskAugPolicy.load(path)
    of = policy.provenance
    corpus, cohort, signals = of["corpus"], of["cohort"], of["signals"]
    text = TEXT.format(
        label=path.stem,
        meaning=LABELS[path.stem],
        task=of["task"],
        stages=policy.num_stages,
        corpus=corpus["name"],
        records=corpus["records"],
        folds=", ".join(map(str, corpus["folds"])),
        cohort_size=cohort["records_train"] + cohort["records_val"],
        seed=of["seed"],
        train=cohort["records_train"],
        val=cohort["records_val"],
        test=cohort["records_test"],
        test_fold=cohort["test_fold"],
        patients=of["test_patients"],
        seconds=signals["length"] / signals["sampling_rate"],
        leads=len(signals["leads"]),
        rate=signals["sampling_rate"],
        normalize=signals["normalize"],
        scaled=SCALED[signals["normalize"]],
        settings=", ".join(f"`{key}={of['training'][key]}`" for key in SHOWN),
        threads=of["threads"],
        epoch=of["epoch"],
        versions=", ".join(f"{name} {v}" for name, v in of["versions"].items()),
        digest=of["data_digest"],
        scores=_scores(of["test_scores"]),
        note=_note(of),
        policy=_table(policy),
        start=1 / len(policy.op_names),
    )
    return _wrapped(text)


def overview(paths: Iterable[Path]) -> str:
    """Return one row a policy, for docs/policies.md."""
    from pyhealth.models.taskaug_policy import TaskAugPolicy

    rows = []
    for path in paths:
        of = TaskAugPolicy.load(path).provenance
        scores, cohort = of["test_scores"], of["cohort"]
        rows.append(
            [
                f"[`{path.stem}`](../policies/{path.stem}.md)",
                str(cohort["records_train"] + cohort["records_val"]),
                _auroc(scores["this policy"]),
                _difference(of["differences"]["no augmentation"]),
                _difference(of["differences"]["random policy"]),
                f"{of['leak_auroc']:.3f}",
                f"{of['policy_p_value']:.3f}",
            ]
        )
    header = ["name", "records", "test AUROC", "over none", "over random"]
    return markdown([*header, "leak", "p"], rows)


def _wrapped(text: str) -> str:
    """Break the lines of prose anew; headings, tables and code stay as they are."""
    code = re.compile(r"(```.*?```\n)", re.DOTALL)
    parts = code.split(text)  # every second one is code
    return "".join(
        part if code.match(part) else "\n\n".join(map(_paragraph, part.split("\n\n")))
        for part in parts
    )


def _paragraph(text: str) -> str:
    if not text.strip() or text.lstrip().startswith(("#", "|")):
        return text
    head = text[: len(text) - len(text.lstrip())]
    items = re.split(r"\n(?=- )", text.strip())
    lines = [
        textwrap.fill(
            " ".join(item.split()),
            width=88,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    ]
    return head + "\n".join(lines) + ("\n" if text.endswith("\n") else "")


def _scores(scores: Mapping) -> str:
    rows = [
        [name, _auroc(of)]
        + [f"{of[key]:.3f}" for key in ("pr_auc", "brier", "calibration_error")]
        for name, of in scores.items()
    ]
    header = ["trained with", "test AUROC", "AUPRC", "Brier", "calibration error"]
    return markdown(header, rows)


def _note(of: Mapping) -> str:
    counts, p_value = of["test_scores"]["this policy"], of["policy_p_value"]
    told = "" if p_value < 0.05 else ": **the policy cannot be told from its start**"
    none, random = (_difference(interval) for interval in of["differences"].values())
    return (
        f"{counts['n']:,} test records, {counts['positives']:,} positive; records, "
        "initial weights and order are the same in all rows. In the first three "
        "nothing is learned but the network. AUROC with the 90 % interval of a "
        "bootstrap by patient. This policy over no augmentation, paired, with the 95 % "
        "interval: "
        f"{none}; over the random policy: {random}. Leak AUROC {of['leak_auroc']:.3f}. "
        "That the policy's derivative had no direction at all has "
        f"p = {p_value:.3f}{told}."
    )


def _auroc(scores: Mapping) -> str:
    low, high = scores["roc_auc_low"], scores["roc_auc_high"]
    return f"{scores['roc_auc']:.3f} ({low:.3f} to {high:.3f})"


def _difference(interval: Mapping) -> str:
    ends = f"{interval['low']:+.3f} to {interval['high']:+.3f}"
    return f"{interval['roc_auc']:+.3f} ({ends})"


def _table(policy) -> str:
    header = ["stage", "operation", "probability", "label 0", "label 1", "unit"]
    rows = [
        [
            str(row.stage),
            row.operation,
            f"{row.probability:.3f}",
            f"{row.magnitude_neg:.3f}",
            f"{row.magnitude_pos:.3f}",
            row.unit,
        ]
        for row in policy.to_frame().itertuples()
    ]
    return markdown(header, rows)
