"""The Trainer of transformers is not Lightning's: our functions stand where it clips."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from clip_callbacks import ClipRule, clip_step

EPOCHS, STEPS = 2, 3
"""Optimizer steps are those of one epoch."""


class Clipping(TrainerCallback):
    """Clips and skips in place of ``max_grad_norm``."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm, self.skipped = max_norm, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        report, _ = clip_step(given["model"].named_parameters(), rules=[ClipRule(self.max_norm)])
        self.skipped += int(report.skipped)


def trainer_of(folder: Path, *callbacks: TrainerCallback, max_grad_norm: float = 0.0, nan_step: int | None = None) -> Trainer:
    """A fit of a small GPT-2, which saves after each epoch; the loss of one optimizer step may be NaN."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    rows = torch.randint(16, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))

    class Poisoned(Trainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Tensor:
            loss: Tensor = super().compute_loss(*arguments, **options)
            return loss * math.nan if self.state.global_step == nan_step else loss

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=4, learning_rate=0.01,
        max_grad_norm=max_grad_norm, save_strategy="epoch", logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return Poisoned(GPT2LMHeadModel(config), arguments, train_dataset=examples, callbacks=list(callbacks))
