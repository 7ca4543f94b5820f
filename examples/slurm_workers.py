"""Start workers for a study under SLURM, and say where the study finds them.

    python examples/slurm_workers.py --jobs 20 --queue cpu --walltime 08:00:00

needs ``pip install dask-jobqueue``, and runs on a node that may call sbatch until it is
stopped. It prints the address to give to the study:

    python examples/ptbxl_ecg_classification_taskaug_resnet.py --mode study ... \
        --scheduler tcp://...

Data, cache and output must be in folders that all nodes see under the same path.
"""

from __future__ import annotations

import argparse
import sys
import threading

import dask
from dask_jobqueue import SLURMCluster

#: Ends of a job that a run survives. At the walltime SLURM kills a worker, which is no
#: fault of the run that is in it: the next worker goes on from its last epoch.
ENDS_OF_A_JOB = 20


def cluster_of(arguments: argparse.Namespace) -> SLURMCluster:
    """Return a cluster each of whose SLURM jobs is one worker that runs one run."""
    with dask.config.set({"distributed.scheduler.allowed-failures": ENDS_OF_A_JOB}):
        return SLURMCluster(
            queue=arguments.queue,
            account=arguments.account,
            cores=1,  # one run at a time: two would share torch's generators
            processes=1,
            job_cpu=arguments.cores,
            memory=arguments.memory,
            walltime=arguments.walltime,
            job_extra_directives=arguments.directive,
            python=sys.executable,
            log_directory="slurm_logs",
            job_script_prologue=[
                "export OMP_WAIT_POLICY=PASSIVE",
                "export LITDATA_DISABLE_VERSION_CHECK=1",
            ],
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Start workers for a study under SLURM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--jobs", type=int, default=10, help="SLURM jobs, each with one worker")
    add("--queue", help="SLURM's partition")
    add("--account", help="SLURM's account")
    add("--cores", type=int, default=1, help="cores of a job")
    add("--memory", default="8GB", help="memory of a job")
    add("--walltime", default="08:00:00", help="of a job")
    add(
        "--directive",
        action="append",
        default=[],
        help="another line for sbatch, such as --directive=--gres=gpu:1",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Start the workers and wait."""
    arguments = parse_arguments(argv)
    with cluster_of(arguments) as cluster:
        cluster.adapt(maximum_jobs=arguments.jobs)
        print(f"--scheduler {cluster.scheduler_address}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
