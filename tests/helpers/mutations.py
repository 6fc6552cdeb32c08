"""Do the tests bite? Plants small faults one at a time in a copy of the tree, and runs the tests that must fail.

``python -m tests.helpers.mutations`` plants all of them, about ten minutes; with numbers, those only. Each is looked
for in one folder of the fast suite, and then, if nothing there has failed, in all of it. With ``--texts`` it only says
which faults no longer fit the sources; otherwise it says so first, and plants the others.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[2]
PACKAGE = "clip_callbacks"
TEXTS = "tests/package/test_mutations.py"
"""Finds every fault, by its text."""


@dataclass(frozen=True)
class Fault:
    """A piece of text that stands once in a file, and what takes its place.

    Attributes:
        file: In the package.
        right: The text as it is.
        wrong: The text with the fault.
        folder: Of the tests that should find it.
    """

    file: str
    right: str
    wrong: str
    folder: str


# ruff: noqa: E501
FAULTS = [
    # the core
    Fault("core/coefficients.py", "c_float(norm + EPS_FLOAT32)", "c_float(norm)", "core"),
    Fault("core/measurement.py", "return sums.pow(1.0 / norm_type).to(norms.dtype)", "return sums.to(norms.dtype)", "core"),
    Fault("core/measurement.py", "finite = total < math.inf", "finite = total > -math.inf", "guard"),
    Fault("core/measurement.py", "is_finite = is_loss_finite and math", "is_finite = math", "guard"),
    Fault("core/apply.py", "        parameter.grad = None", "        parameter.grad = torch.zeros_like(parameter)", "guard"),
    Fault("core/apply.py", "(factors != 1.0).float()", "(factors > 1.0).float()", "core"),
    Fault("core/apply.py", "if gradients.is_complete and extremes(factors)[1] < 1.0:", "if extremes(factors)[1] < 1.0:", "distributed"),
    Fault("core/fused.py", "isinstance(optimizer, SGD) and any(", "isinstance(optimizer, Adam) and any(", "guard"),
    Fault("core/fused.py", 'if self._stage == "in use":', 'if self._stage == "never":', "core"),
    Fault("core/reduction.py", "    dist.all_reduce(together, dist.ReduceOp.MAX)\n", "", "distributed"),
    Fault("core/limits/zscore.py", "is_warm = count >= self.warmup\n", "is_warm = count > self.warmup\n", "limits"),
    Fault("core/limits/_window.py", "position = share * last.double()", "position = share * (last + 1).double()", "limits"),
    Fault("accumulation/window.py", "return weight * divisor / self.divisor", "return weight", "accumulation"),
    Fault("accumulation/weights.py", "0.0 <= number < math.inf", "-1.0 <= number < math.inf", "accumulation"),
    Fault("stats/sketch.py", "torch.lerp(lower, upper, ranks.frac())", "lower", "publishing"),
    # losses
    Fault("core/spikes.py", "            return norm.logical_and(loss)", "            return norm.logical_or(loss)", "guard"),
    Fault("core/spikes.py", "torch.where(counts.reshape(()), value, before[key])", "value", "guard"),
    Fault("core/reduction.py", "own / math.prod(sizes)", "own", "distributed"),
    Fault("accumulation/rescaler.py", "return 1.0 if self._is_manual or not count else 1.0 / count", "return 1.0", "guard"),
    Fault("engine/engine.py", "self._guard.checks_losses and not self._guard.takes_bad_steps", "self._guard.checks_losses", "distributed"),
    Fault("core/limits/_tail.py", "h = CAUTION * 2.0 *", "h = 0.0 *", "limits"),
    # statistics
    Fault("stats/vanishing.py", "is_zero = (reached > 0) & ~learns", "is_zero = ~learns", "publishing"),
    Fault("stats/gradient_statistics.py", "    sums[:, 2].index_add_(0, blocks, counts * (means - sums[blocks, 1]).square())\n", "", "publishing"),
    Fault("stats/gradient_statistics.py", "moments[:, [0, 2, 3]] *=", "moments[:, [0, 2, 3]] +=", "distributed"),
    Fault("bundles/bundle.py", 'if hash_of(file) != known.get("sha256"):', "if False:", "bundles"),
    # the callbacks
    Fault("trainer/tensor_copies.py", "torch.where(flag.to(flat.device), self.kept, flat, out=flat)", "torch.where(flag.to(flat.device), flat, self.kept, out=flat)", "guard"),
    Fault("trainer/scheduler_hold.py", "self.skipped_batches += self._seen - self._window_start", "self.skipped_batches += 1", "guard"),
    Fault("guard/line_search.py", "[tensor.detach().clone() for tensor in", "[tensor.detach() for tensor in", "guard"),
    Fault("trainer/grad_scaler.py", "finite.logical_not().float()", "finite.float()", "integration"),
    Fault("guard/bad_steps.py", "streak >= self._options.max_consecutive", "streak > self._options.max_consecutive", "guard"),
    Fault("guard/counts.py", "if self.last_bad != number - 1 or not self.streak:", "if not self.streak:", "guard"),
    Fault("trainer/learning_rates.py", "if id(value) not in done:", "if True:", "guard"),
    Fault("accumulation/microbatches.py", "            self._buffers.restore()\n", "", "accumulation"),
    Fault("stats/run_history.py", "return clipped / steps if", "return clipped / (steps + 1) if", "publishing"),
    Fault("publishing/publisher.py", "for key, value in values.items() if math.isfinite(value)}", "for key, value in values.items()}", "publishing"),
    Fault("publishing/publisher.py", "fit_loop.epoch_loop._batches_that_stepped - 1", "fit_loop.epoch_loop._batches_that_stepped", "publishing"),
    Fault("publishing/publisher.py", "                values |= counts", "                pass", "publishing"),
    Fault("trainer/nonfinite_metrics.py", "callback.check_finite:", "True:", "guard"),
    Fault("guard/guard.py", 'if options.policy not in {"skip", "ignore"} or options', "if options", "guard"),
    Fault("guard/buffers_in_manual.py", "self._foreign_is_last = not is_ours", "self._foreign_is_last = True", "guard"),
    Fault("guard/buffers_in_manual.py", "self._window.keep_from(self._common.at_step)", "self._window.keep_from(self._common.last)", "guard"),
    Fault("guard/counts.py", "self.streak += not self.streak or batch != tuple(self.last_batch)", "self.streak += 1", "guard"),
    Fault("guard/rewritten_parameters.py", "        self._copies.restore()\n        if isinstance", "        if isinstance", "guard"),
    Fault("trainer/buffer_tracker.py", "self._mark(slot, Replaced(then))", "self._mark(slot)", "guard"),
    Fault("trainer/grad_scaler.py", "    _growth_counter(scaler).sub_(1)\n", "", "guard"),
    Fault("trainer/averages.py", "_latest_update_step = self._trainer.global_step + 1", "_latest_update_step = self._trainer.global_step", "guard"),
    Fault("trainer/later_hooks.py", "self.runs_after_module = overrides(module, HOOK)", "self.runs_after_module = False", "integration"),
    Fault("accumulation/optimizer_window.py", "self.discarded = reason", "pass", "guard"),
    Fault("trainer/buffer_tracker.py", "            self._await_lazy()\n", "", "integration"),
    Fault("guard/written_buffers.py", "return dict(before)", "pass", "integration"),
    Fault("trainer/bypassing_steps.py", "return len(written) > len(others)", "return bool(written)", "integration"),
    Fault("guard/options.py", "hold_schedulers=False,\n            deferred", "deferred", "integration"),
    Fault("engine/engine.py", "loss_scale=step.loss_scale.clone())", "loss_scale=step.loss_scale)", "guard"),
    # a straight line
    Fault("trainer/idle_hooks.py", " and getattr(type(callback), name) in inherited", "", "integration"),
    Fault("guard/restore.py", "            self._has_skipped = True\n            self._bind()\n", "            self._bind()\n", "guard"),
    Fault("engine/step_measurer.py", "bound is None or bound[0] is not table", "bound is None", "integration"),
    Fault("core/piecewise_norms.py", "    if norm_type % 2.0:\n", "    if norm_type % 1.0:\n", "core"),
    Fault("core/limits/_window_of_one.py", "        if held % 2:\n", "        if not held % 2:\n", "limits"),
    Fault("core/spikes.py", "counts and value > found", "value > found", "limits"),
    Fault("stats/norm_history.py", "        self._length *= 2\n", "", "publishing"),
    # resumed, copied, launched
    Fault("clipping/limit_memory.py", " or not carry_over(each, [source]).missing_blocks", "", "limits"),
    Fault("core/limit_state.py", "        and old.dtype == new.dtype\n", "", "limits"),
    Fault("trainer/run_identity.py", " and self._module() is module", "", "integration"),
    Fault("engine/resume.py", "renumbered |= {-1 - key", "by_number |= {-1 - key", "integration"),
    Fault("trainer/launched_processes.py", "identity is None or identity in _LIVING", "identity is None", "distributed"),
]  # fmt: skip


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows of, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def outdated() -> dict[int, str]:
    """By number, the faults that cannot be planted, with a line about each."""
    lines = {}
    for number, fault in enumerate(FAULTS):
        path = ROOT / PACKAGE / fault.file
        times = path.read_text().count(fault.right) if path.exists() else 0
        if times != 1:
            where = f"stands {times} times in {fault.file}" if path.exists() else f"has no file {fault.file}"
            lines[number] = f"{number}: must stand once, {where}: {fault.right!r}"
    return lines


def plant(tree: Path, fault: Fault) -> str:
    """Write the fault; the file as it was."""
    path = tree / PACKAGE / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.right, fault.wrong))
    return text


def first_failure(tree: Path, where: str) -> str | None:
    """Which test fails first; None if all pass."""
    command = [sys.executable, "-m", "pytest", where, "-x", "-q", "-p", "no:cacheprovider", f"--ignore={TEXTS}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else done.stdout[-500:]


def look_for(fault: Fault, trees: Queue[Path]) -> tuple[str | None, float]:
    """The test that finds a fault in one of the trees, and the seconds that took."""
    tree, begin = trees.get(), time.monotonic()
    original = plant(tree, fault)
    try:
        found = first_failure(tree, f"tests/{fault.folder}") or first_failure(tree, "tests")
    finally:
        (tree / PACKAGE / fault.file).write_text(original)
        trees.put(tree)
    return found, time.monotonic() - begin


def main(numbers: list[int]) -> int:
    """A line for each fault, two at a time; how many were not found, or could not be planted."""
    numbers = numbers or [*range(len(FAULTS))]
    lost = [line for number, line in outdated().items() if number in numbers]
    sys.stdout.writelines(f"OUTDATED  {line}\n" for line in lost)
    numbers = [number for number in numbers if number not in outdated()]
    missed, trees = len(lost), Queue()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second, ThreadPoolExecutor(2) as pool:
        for scratch in (first, second):
            trees.put(copy_of_the_tree(Path(scratch)))
        looked = pool.map(lambda number: look_for(FAULTS[number], trees), numbers)
        for number, (found, took) in zip(numbers, looked, strict=True):
            fault = FAULTS[number]
            missed += found is None
            sys.stdout.write(f"{number}: {took:.0f} s  {fault.file}: {fault.wrong.strip()[:60]!r}: {found or 'NOT FOUND'}\n")
            sys.stdout.flush()
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int, help="which faults; all by default")
    parser.add_argument("--texts", action="store_true", help="plant nothing: say which faults no longer fit the sources")
    options = parser.parse_args()
    if options.texts:
        sys.exit("\n".join(outdated().values()) or 0)
    sys.exit(main(options.numbers))
