"""A small GPT-2 of Hugging Face, fine-tuned on lines of Python source: accumulation weighted by tokens, clipping, warm-up.

    python examples/transformer.py
    clip-callbacks report logs/transformer

The model is made from its configuration and reads text byte by byte: nothing is downloaded. Its embeddings are frozen in the first
epoch. With --poison one micro-batch of the third window is NaN: that step is skipped.
"""

import argparse
import inspect
import json
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, LabelTokens

WINDOW, LINES, LENGTH, PADDING = 4, 16, 96, -100


def collate(lines):
    """Encode lines as bytes; padding has no part in the loss."""
    rows = [torch.tensor(list(line)) for line in lines]
    labels = pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return BatchEncoding({"input_ids": labels.clamp(min=0), "attention_mask": (labels != PADDING).long(), "labels": labels})


class FineTuned(LightningModule):
    def __init__(self, poison):
        super().__init__()
        config = GPT2Config(
            vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=False, loss_type="ForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.model, self.poison = GPT2LMHeadModel(config), poison

    def on_train_epoch_start(self):
        for embedding in (self.model.transformer.wte, self.model.transformer.wpe):
            embedding.requires_grad_(self.current_epoch > 0)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss * math.nan if self.poison and batch_idx == 2 * WINDOW and self.current_epoch == 0 else loss

    def configure_optimizers(self):
        decayed = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        plain = [parameter for parameter in self.parameters() if parameter.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        schedule = get_cosine_schedule_with_warmup(optimizer, 10, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batches", type=int, default=120, help="micro-batches in each of the two epochs")
parser.add_argument("--poison", action="store_true", help="make one micro-batch of the third window NaN")
parser.add_argument("--folder", default="logs/transformer")

if __name__ == "__main__":
    arguments = parser.parse_args()
    seed_everything(0)
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, json)).encode("ascii", "replace")
    lines = [line[:LENGTH] for line in text.splitlines() if len(line) > 1]
    weighted = AccumulationRescaling(LabelTokens("labels", shifted=True))  # GPT-2 shifts its labels itself
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=arguments.batches, accumulate_grad_batches=WINDOW, log_every_n_steps=1,
        callbacks=[weighted, GradientClipping(1.0), GradientNormMonitor()], logger=CSVLogger(arguments.folder, name=""),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(FineTuned(arguments.poison), DataLoader(lines, LINES, shuffle=True, collate_fn=collate))
    print(json.dumps({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}))
