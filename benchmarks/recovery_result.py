"""What training with a learned policy ends in: probabilities and test scores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from recovery_data import TEST_SEED, VAL_SEED, Cohort
from recovery_truth import EPOCHS, TestScores, new_model
from rows import Rows
from tqdm import tqdm

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.bilevel.study.training import random_signs

#: What each configuration changes in the settings. The control's hypergradients have
#: random signs, so what moves there moves by chance; it enumerates fewer records,
#: because Adam takes the scale out of a hypergradient and the signs are random anyway.
#: "one_step" is the derivative through the augmented signal, of the model's own loss.
CONFIGURATIONS = {
    "learned": {},
    "sign-shuffled": {"alignment_records": 4},
    "one_step": {"hypergradient": "one_step", "outer_loss": "model"},
}
#: Planted validation records a step.
POLICY_BATCH = 128


def run_result(
    cohort: Cohort,
    plants: Mapping[str, float],
    rows: Rows,
    seeds: int,
    configurations: Iterable[str] = CONFIGURATIONS,
    epochs: int = EPOCHS,
    **settings,
) -> None:
    """Train with every plant in the validation records; score on the planted test.

    Args:
        cohort: the clean data.
        plants: magnitude by operation.
        rows: where the results go.
        seeds: runs of each.
        configurations: of :data:`CONFIGURATIONS`.
        epochs: of a run.
        **settings: of ``BiLevelTrainer.train`` where they are not the default.
    """
    jobs = [
        {"plant": f"{operation}/{magnitude:g}", "configuration": name, "seed": seed}
        for seed in range(seeds)
        for operation, magnitude in plants.items()
        for name in configurations
    ]
    for job in tqdm([job for job in jobs if job not in rows], desc="result"):
        started, seed = time.perf_counter(), job["seed"]
        operation, magnitude = job["plant"].split("/")
        val = cohort.val.planted(operation, float(magnitude), VAL_SEED)
        test = cohort.test.planted(operation, float(magnitude), TEST_SEED)
        scores = TestScores({"clean": cohort.test, "planted": test}, epochs)
        model = new_model(cohort, seed, shared_magnitudes=True)
        trainer = BiLevelTrainer(
            model, metrics=["roc_auc"], device="cpu", enable_logging=False, seed=seed
        )
        changed = CONFIGURATIONS[job["configuration"]]
        control = job["configuration"] == "sign-shuffled"
        trainer.train(
            cohort.train.loader(seed),
            val.loader(),
            policy_dataloader=val.loader(seed, POLICY_BATCH),
            epochs=epochs,
            load_best_model_at_last=False,
            on_epoch=scores,
            on_hypergradient=random_signs if control else None,
            **{**settings, **changed},
        )
        policy = trainer.policy.to_frame().set_index("operation")
        rows.append(
            {
                **job,
                "auroc": scores.mean(),
                "probability": policy["probability"].to_dict(),
                "magnitude": policy["magnitude_neg"].to_dict(),
                "p_value": trainer.policy_p_value,
                "snr": [row["hypergradient_snr"] for row in trainer.history],
                "seconds": time.perf_counter() - started,
            }
        )
