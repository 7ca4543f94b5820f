"""The runs of a study, in the order in which they can be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .configurations import EQUAL_SECONDS, Configuration
from .settings import RunSettings

__all__ = ["Budget", "Job", "StudyPlan", "settings_of_job"]

type Budget = Literal["steps", "seconds"]
#: Epochs of a run that only its seconds end.
ENDLESS = 1_000_000


@dataclass(frozen=True, order=True)
class Job:
    """One run of a study.

    Attributes:
        task: name of the label.
        n_records: to train and validate on; 0 for all.
        seed: of cohort, weights, order and draws.
        configuration: its letter.
        budget: "steps", as many as every configuration; "seconds", as many as D took.

    Examples:
        >>> Job("MI", 500, 3, "A", "seconds").name
        'MI/n500/A_seconds/seed_3'
    """

    task: str
    n_records: int
    seed: int
    configuration: str
    budget: Budget = "steps"

    @property
    def name(self) -> str:
        """Its folder in that of the study."""
        size = f"n{self.n_records}" if self.n_records else "all"
        suffix = "" if self.budget == "steps" else f"_{self.budget}"
        return f"{self.task}/{size}/{self.configuration}{suffix}/seed_{self.seed}"

    @property
    def needs(self) -> tuple[Job, ...]:
        """The jobs whose seconds this one has to know."""
        if self.budget == "seconds" or self.configuration == "J":
            return (replace(self, configuration="D", budget="steps"),)
        return ()


@dataclass(frozen=True)
class StudyPlan:
    """What a study runs.

    Attributes:
        base: settings that all runs share.
        configurations: by letter.
        tasks: names of the labels.
        n_records: cohort sizes; 0 for all records.
        seeds: of the runs, the same for every configuration.
        equal_seconds: also train what needs no policy for as long as "D" takes.

    Examples:
        >>> from pyhealth.bilevel.study.configurations import chosen
        >>> plan = StudyPlan(RunSettings(), chosen("AD"), ["MI"], [500], [0])
        >>> for job in plan.jobs():
        ...     print(job.name)
        MI/n500/A/seed_0
        MI/n500/D/seed_0
        MI/n500/A_seconds/seed_0
    """

    base: RunSettings
    configurations: Mapping[str, Configuration]
    tasks: Sequence[str]
    n_records: Sequence[int]
    seeds: Sequence[int]
    equal_seconds: bool = True

    def jobs(self) -> list[Job]:
        """Return all jobs: seed after seed, and after those that they need."""
        found = []
        for task in self.tasks:
            for size in self.n_records:
                for seed in self.seeds:
                    jobs = [Job(task, size, seed, key) for key in self.configurations]
                    if self.equal_seconds and "D" in self.configurations:
                        jobs += [
                            Job(task, size, seed, key, "seconds")
                            for key in EQUAL_SECONDS
                            if key in self.configurations
                        ]
                    found += sorted(jobs, key=lambda job: len(job.needs))
        return found


def settings_of_job(job: Job, plan: StudyPlan, folder: Path) -> RunSettings:
    """Return the settings of a run.

    Args:
        job: one of the plan's.
        plan: of the study.
        folder: of the study, where the jobs that this one needs have written.

    Raises:
        FileNotFoundError: if one of those is not done.

    Examples:
        >>> from pyhealth.bilevel.study.configurations import chosen
        >>> plan = StudyPlan(RunSettings(), chosen("A"), ["MI"], [500], [7])
        >>> settings_of_job(plan.jobs()[0], plan, Path()).seed
        7
    """
    base = replace(plan.base, seed=job.seed)
    for needed in job.needs:
        metrics = json.loads((folder / needed.name / "metrics.json").read_text())
        if job.budget == "seconds":
            base = replace(base, epochs=ENDLESS, max_seconds=metrics["seconds"])
        else:
            base = replace(base, search_seconds=metrics["seconds"])
    return plan.configurations[job.configuration].settings(base)
