"""The watch over a PPO run: looks at held-out prompts, keeps best/, and goes back to it when the policy collapses."""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from rewards.guard import ALARM, Guard
from rewards.scores import ScoreRules
from rollout.experience import Experience, describe_functions, measure_for_guard
from rollout.policy_files import PolicyFiles
from utils.console import say
from utils.files import saving, write_json

BEST = "best"


class Watch:
    """Shows the guard what a policy responds, and acts on what it says."""

    def __init__(
        self,
        guard: Guard,
        score_rules: ScoreRules,
        held_out: Callable[[int], Sequence[Experience]] | None,
        every: int,
        last: int,
        may_stop: bool,
        policy_files: PolicyFiles,
        accelerator: Accelerator,
        output_dir: str,
        record: dict[str, Any],
        prompts: int,
    ) -> None:
        """held_out: iteration -> responses to held-out prompts, None where nothing is watched; every: iterations between
        two looks at them; last: the run's last iteration; may_stop: whether a collapse ends the run; record: run.json, for
        the one in best/; prompts: how many held-out ones there are."""
        self.guard = guard
        self.score_rules = score_rules
        self.held_out = held_out
        self.every, self.last = every, last
        self.may_stop = may_stop
        self.policy_files = policy_files
        self.accelerator = accelerator
        self.output_dir, self.best_folder = output_dir, os.path.join(output_dir, BEST)
        self.record = record
        self.prompts = prompts

    @property
    def is_on(self) -> bool:
        return self.held_out is not None

    @property
    def stopped(self) -> bool:
        """Whether a collapse ends, or has ended, the run."""
        return self.may_stop and self.guard.verdict is not None

    def look(self, iteration: int, rollouts: Experience | None = None) -> dict[str, float]:
        """Look at the state after `iteration`; keep best/, or go back to it.  Returns metrics for the log.

        rollouts: the iteration's own responses; None where there were none, or none that can be measured.
        """
        measures, metrics = {}, {}
        if rollouts is not None:
            measures["rollouts"] = measure_for_guard([rollouts], self.score_rules)
            metrics |= {f"guard/{name}": value for name, value in measures["rollouts"].items()}
        looks = iteration % self.every == 0 or iteration == self.last
        if looks:
            parts = self.held_out(iteration)
            measures["held-out"] = measure_for_guard(parts, self.score_rules)
            metrics |= {f"heldout/{name}": value for name, value in measures["held-out"].items()}
            metrics |= {f"heldout/{name}": value for name, value in describe_functions(parts).items()}
            if parts[0].gold is not None:  # for the log alone: neither a sign nor best/ may depend on it
                metrics["heldout/gold"] = float(torch.cat([part.gold for part in parts]).mean())
        signs = self.guard.check(iteration, measures)
        for level, sentence in signs:
            say(f"{level}: iteration {iteration}: {sentence}")
        if looks and self.guard.is_best(iteration, measures["held-out"], signs):
            self.save_best()
        if self.guard.collapse_at == iteration:
            say(f"collapse: {self.guard.verdict}")
            if self.may_stop:
                self.roll_back()
        counts = {"signs": len(signs), "alarms": sum(level == ALARM for level, _ in signs)}
        counts["recent_alarms"] = len(self.guard.alarms)
        return metrics | {f"guard/{name}": float(count) for name, count in counts.items()}

    def save_best(self) -> None:
        """Write the policy as it is to best/, which is never half written."""
        state = self.policy_files.gather()
        if self.accelerator.is_main_process:
            with saving(self.best_folder):
                aside = self.best_folder + ".new"
                self.policy_files.write(aside, state)
                write_json({**self.record, "best": self.guard.best}, aside, "run.json")
                shutil.rmtree(self.best_folder, ignore_errors=True)
                os.replace(aside, self.best_folder)

    def roll_back(self) -> None:
        """Put the policy of best/ in the place of the collapsed one."""
        say(f"stopped, and rolled back to {BEST}/: the policy of iteration {self.guard.best['iteration']}")
        self.accelerator.wait_for_everyone()
        self.policy_files.load(self.best_folder)

    def outcome(self) -> dict[str, Any]:
        """What run.json says about the end of the run; None for what did not happen."""
        guard = self.guard
        rolled_back_to = guard.best["iteration"] if self.stopped else None
        verdict = {"verdict": guard.verdict, "collapse_at": guard.collapse_at, "stopped": self.stopped}
        told = {"best": guard.best, "guard": {**verdict, "rolled_back_to": rolled_back_to}}
        return {**told, "what_to_take": self.what_to_take()}

    def what_to_take(self) -> str:
        """The sentence with which a run ends: the folder to use, and what its policy gained over the SFT model."""
        if not self.is_on:
            return (
                f"what to take: {self.output_dir}, the policy of the last iteration; whether it is better than the SFT "
                "model was not measured (--guard off)"
            )
        best, sft, last = self.guard.best, self.guard.baselines["held-out"]["score"], self.output_dir
        on = f"on {self.prompts} held-out prompts"
        if best["iteration"] > 0:
            return (
                f"what to take: {self.best_folder}, the policy of iteration {best['iteration']}: {on} its normalised score "
                f"is {best['score']:.3f}, the SFT model's {sft:.3f}, a gain of {best['score'] - sft:.3f}"
            )
        holds = f"{last} and {self.best_folder} hold" if self.stopped else f"{self.best_folder} holds"
        rest = "" if self.stopped else f", and {last} the one of the last iteration"
        return (
            f"what to take: the SFT adapter, which nothing beat: {on} no iteration had a higher normalised score than its "
            f"{sft:.3f} without a warning of the guard; {holds} the SFT policy, from before the first update "
            f"(iteration 0){rest}"
        )

    # ---- Checkpoints ----

    def add_to_checkpoint(self, folder: str) -> None:
        if self.guard.best is not None:
            shutil.copytree(self.best_folder, os.path.join(folder, BEST))

    def restore(self, state: dict[str, Any], checkpoint: str) -> None:
        """Go on from a checkpoint, with its best/: a later one is of iterations that are now done again."""
        self.guard.restore(state)
        if self.accelerator.is_main_process:
            with saving(self.best_folder):
                shutil.rmtree(self.best_folder, ignore_errors=True)
                if self.guard.best is not None:
                    shutil.copytree(os.path.join(checkpoint, BEST), self.best_folder)
