"""One part of a comparison, and the figures that follow from what its engines found."""

from dataclasses import dataclass

import numpy as np

from comparison.job import Job
from comparison.trainers import CONTROLS


@dataclass(frozen=True)
class JobResults:
    """One job, and what each engine found on it: results by name, in the order of LABELS."""

    job: Job
    results: dict[str, dict]
    own_steps: int = 0  # max_steps of the configuration; 0: the job's

    @property
    def trained(self) -> dict[str, dict]:
        """The results of those that trained."""
        return {e: r for e, r in self.results.items() if "error" not in r}

    @property
    def proper(self) -> dict[str, dict]:
        """Of these, the engines proper."""
        return {e: r for e, r in self.trained.items() if e not in CONTROLS}

    @property
    def controls(self) -> dict[str, dict]:
        """Of these, the controls."""
        return {e: r for e, r in self.trained.items() if e in CONTROLS}

    def whole(self, result: dict) -> bool:
        """Whether all steps of the job were run."""
        return result["steps"] >= self.job.steps

    def train_s(self, result: dict) -> float:
        """Seconds for all steps of the job, in proportion where fewer were run."""
        return step_s(result) * self.job.steps

    def speed_up(self, result: dict) -> float:
        """How many times as fast as the slowest engine."""
        slowest = max(map(step_s, (self.proper or self.trained).values()))
        return slowest / step_s(result)

    def gap(self, step: int) -> float | None:
        """The largest difference of the engines proper in the loss at a step (from 1)."""
        at = [r["losses"][step - 1] for r in self.proper.values() if r["steps"] >= step]
        return max(at) - min(at) if len(at) > 1 else None

    def gradient_gap(self) -> float | None:
        """The largest difference of the first step's gradients, over the largest gradient."""
        gradients = [r["gradients"] for r in self.proper.values() if "gradients" in r]
        if len(gradients) < 2:
            return None
        gaps, sizes = [], []
        for name in gradients[0]:
            arrays = np.array([gradient[name] for gradient in gradients])
            gaps.append(np.ptp(arrays, 0).max())
            sizes.append(np.abs(arrays).max())
        return float(max(gaps) / max(sizes))


def step_s(result: dict) -> float:
    """Seconds a step takes, of all the job has: by its tokens, where not all steps were run."""
    return sum(parts_of_a_step(result).values())


def parts_of_a_step(result: dict) -> dict[str, float]:
    """Seconds of its forward pass, backward pass and update; together they are `step_s`."""
    steps = result["share"] * result["of_steps"]
    return {name: seconds / steps for name, seconds in result["seconds"].items()}


def tenths(result: dict) -> tuple[float, float]:
    """The mean loss of the first tenth of the steps, and of the last."""
    tenth = max(1, len(result["losses"]) // 10)
    return float(np.mean(result["losses"][:tenth])), float(np.mean(result["losses"][-tenth:]))
