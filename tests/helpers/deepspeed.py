"""A small network under DeepSpeed on a CPU, and the same training by Lightning alone. Imported where DeepSpeed is installed."""

from __future__ import annotations

import logging
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
os.environ["CLIP_CALLBACKS_INJECT"] = "1"  # some tests poison gradients

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers.collectives import counting

# else DeepSpeed would compile an operator of its own for ranks on one machine
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ROWS = 8
"""Of a batch, over all ranks."""
LIMIT = 3.0
"""Below most norms of these trainings, and above some."""


class OnCpu(DeepSpeedStrategy):
    """Lightning's strategy refuses CPUs in ``setup_environment``, which else makes the process group."""

    def __init__(self, config):
        micro_batch = {"train_micro_batch_size_per_gpu": ROWS}
        untested = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        super().__init__(
            config=micro_batch | untested | config,
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="gloo",
            logging_level=logging.ERROR,
        )

    @property
    def root_device(self):
        return torch.device("cpu", 0)

    def setup_environment(self):
        self.accelerator.setup_device(torch.device("cpu"))
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Net(LightningModule):
    """Shapes that two ranks cannot halve, and some that one of them does not hold at all.

    Args:
        factors: What the losses of batches are multiplied by, by (rank, number of the batch).
        optimizer: The optimizer's class.
        schedule: If True, the learning rate is halved every fourth step.
    """

    def __init__(self, factors=None, optimizer=torch.optim.AdamW, schedule=False):
        super().__init__()
        torch.manual_seed(5)
        self.factors, self.make_optimizer, self.schedule = factors or {}, optimizer, schedule
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.register_buffer("largest", torch.zeros(()))
        self.number = 0

    def training_step(self, batch, batch_idx):
        outputs = self.run(batch)
        factor = self.factors.get((self.trainer.global_rank, self.number), 1.0)
        self.number += 1
        if factor != factor:  # noqa: PLR0124
            self.largest.fill_(factor)  # a forward pass that writes what it sees
        else:
            self.largest.copy_(torch.maximum(self.largest, outputs.detach().abs().amax()))
        return outputs.square().mean() * 30 * factor

    def run(self, batch):
        return self.net(batch)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), lr=0.01)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Grouped(Net):
    """The same with two parameter groups, and a frozen parameter between the others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net[0].bias.requires_grad_(False)

    def configure_optimizers(self):
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = {"params": [each for each in learning if each.ndim > 1], "weight_decay": 0.1}
        vectors = {"params": [each for each in learning if each.ndim == 1], "weight_decay": 0.0}
        return torch.optim.AdamW([matrices, vectors], lr=0.01)


class SmallFirst(Net):
    """The same behind a parameter of one entry, of which all ranks but the first hold nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        net, self.net = self.net, None
        self.scale, self.behind = nn.Parameter(torch.ones(1)), net

    def run(self, batch):
        return self.behind(batch) * self.scale


class SeldomUsed(Net):
    """The same with a layer that the batches 4 and 5 do not use."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beside = nn.Linear(5, 3)
        self.unused = [batch.sum().item() for batch in self.own_batches()[4:6]]

    def own_batches(self):
        return batches(6, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def run(self, batch):
        if batch.sum().item() in self.unused:
            return self.net(batch)
        return self.net(batch) + self.beside(batch)


class WithMuon(Net):
    """The same with DeepSpeed's Muon for matrices."""

    def configure_optimizers(self):
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        groups = []
        for use_muon in (True, False):
            parameters = [each for each in self.parameters() if (each.ndim > 1) == use_muon]
            for each in parameters:
                each.use_muon = use_muon
            groups.append({"params": parameters, "use_muon": use_muon, "lr": 0.01})
        return MuonWithAuxAdam(groups)


class WithExperts(Net):
    """The same behind two of DeepSpeed's experts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experts = MoE(5, nn.Linear(5, 5), num_experts=2)

    def run(self, batch):
        return self.net(self.experts(batch)[0])

    def configure_optimizers(self):
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(self.parameters()), "name": "all"})
        return torch.optim.AdamW(groups, lr=0.01)


class MasterWeights(Net):
    """The same in bf16, as DeepSpeed trains it: weights in float32, of which each pass makes a copy in bf16."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.bfloat16())  # DeepSpeed casts first

    def run(self, batch):
        low = {name: parameter.bfloat16() for name, parameter in self.net.named_parameters()}
        return torch.func.functional_call(self.net, low, (batch.bfloat16(),))


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, seen):
        self.seen = seen

    def __iter__(self):
        return iter(self.seen)


class Recorder(Callback):
    """The report of each step of a gradient callback."""

    def __init__(self, watched):
        self.watched, self.reports, self.steps = watched, [], None

    def on_train_batch_start(self, trainer, *_):
        self.steps = trainer.strategy.model.global_steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.strategy.model.global_steps > self.steps:
            self.reports.append(self.watched.last_report)


class PlainRecorder(Callback):
    """Total norm and clip coefficient of each step of a training by Lightning alone, from the gradients before its own clip."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norms.append(torch.nn.utils.get_total_norm([each.grad for each in module.parameters()]).item())


def batches(count, rank=0, world_size=1):
    """This rank's rows of so many batches."""
    generator = torch.Generator().manual_seed(3)
    rows = ROWS // world_size
    return [torch.randn(ROWS, 5, generator=generator)[rank * rows : (rank + 1) * rows] for _ in range(count)]


def fit(module, loader, callbacks=(), *, ckpt_path=None, **options):
    """Train on given batches; return the Trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, "log_every_n_steps": 1}
    trainer = Trainer(**quiet | defaults | options, callbacks=list(callbacks))
    trusting = {"weights_only": False} if ckpt_path else {}
    trainer.fit(module, DataLoader(loader, batch_size=None), ckpt_path=ckpt_path, **trusting)
    return trainer


def weights(module, stage=0):
    """All weights, whole, as numbers."""
    parameters = list(module.parameters())
    if stage != 3:
        return _numbers(parameters)
    with deepspeed.zero.GatheredParameters(parameters):
        return _numbers(parameters)


def _numbers(parameters):
    return torch.cat([parameter.detach().float().flatten() for parameter in parameters]).tolist()


def plain(precision, window, steps=20, *, left_out=(), **options):
    """Norms, coefficients and weights of a training by Lightning alone, in one process."""
    module = (MasterWeights if "bf16" in precision else Net)(**options)
    recorder = PlainRecorder()
    seen = [batch for number, batch in enumerate(batches(steps * window)) if number not in left_out]
    fit(module, seen, [recorder], gradient_clip_val=LIMIT, accumulate_grad_batches=window)
    coefficients = [min(1.0, LIMIT / (norm + 1e-6)) for norm in recorder.norms]
    if isinstance(module, MasterWeights):
        module.bfloat16()  # DeepSpeed's module has the copy
    return recorder.norms, coefficients, weights(module)


def trained(
    stage, callbacks, *, precision="32-true", window=1, steps=20, left_out=(), config=None, epochs=1, network=Net,
    has_length=True, **options,
):  # fmt: skip
    """Train under DeepSpeed with callbacks, as one of the ranks; return what a test may compare.

    Args:
        stage: The stage of ZeRO.
        callbacks: The callbacks; the reports are those of the first.
        precision: The precision of the Trainer.
        window: The number of micro-batches of a window.
        steps: The number of optimizer steps.
        left_out: Numbers of batches that are not drawn.
        config: More of DeepSpeed's configuration.
        epochs: The number of epochs; each has all batches.
        network: The class of the network.
        has_length: If False, nobody knows the length of an epoch.
        options: Arguments of the network, and of ``fit``.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    net = {key: options.pop(key) for key in ("factors", "optimizer", "schedule") if key in options}
    module, recorder = network(**net), Recorder(callbacks[0])
    strategy = OnCpu({"zero_optimization": {"stage": stage}} | (config or {}))
    seen = [batch for number, batch in enumerate(batches(steps * window, rank, world_size)) if number not in left_out]
    if not has_length:
        seen = Stream(seen)
    trainer = fit(
        module, seen, [*callbacks, recorder], strategy=strategy, devices=world_size, precision=precision,
        accumulate_grad_batches=window, max_epochs=epochs, **options,
    )  # fmt: skip
    engine = trainer.strategy.model
    return {
        "norms": [float(report.total_norm) for report in recorder.reports],
        "coefficients": [float(report.clip_coef) for report in recorder.reports],
        "limits": [float(report.max_norm) for report in recorder.reports],
        "outcomes": [report.outcome.value for report in recorder.reports],
        "weights": weights(module, stage),
        "largest": float(module.largest),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "skipped": (engine.skipped_steps, getattr(callbacks[0], "skipped_steps", None)),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "engine": float(engine.get_global_grad_norm()),
        "checks_overflow": getattr(engine.optimizer, "check_grad_overflow", None),
    }


def collectives(stage, callbacks):
    """The collectives of each step that callbacks take, counted by torch."""
    counted, counts = counting(callbacks)
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    strategy = OnCpu({"zero_optimization": {"stage": stage}})
    fit(Net(), batches(4, rank, world_size), counted, strategy=strategy, devices=world_size)
    return counts


def each(cells):
    """Train several times, in one process group: a result, or an error's text, for each."""
    return [_trained_or_error(*args, **kwargs) for args, kwargs in cells]


def _trained_or_error(*args, **kwargs):
    try:
        return trained(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _half(stage, callbacks, path, *, resume, config=None):
    """Six steps, and a checkpoint; or the six after them."""
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    module, recorder = Net(), Recorder(callbacks[0])
    strategy = OnCpu({"zero_optimization": {"stage": stage}} | (config or {}))
    seen = batches(12, rank, world_size)
    options = {"strategy": strategy, "devices": world_size, "max_epochs": 2 if resume else 1}
    trainer = fit(module, seen[6:] if resume else seen[:6], [*callbacks, recorder], ckpt_path=path if resume else None, **options)
    if not resume:
        trainer.save_checkpoint(path)
    return module, recorder, trainer


def interrupted(stage, path):
    """A training in two fits."""
    from clip_callbacks import GradientClipping, ZScoreLimit

    _half(stage, [GradientClipping(ZScoreLimit(z=0.1, decay=0.5, warmup=3))], path, resume=False)
    clipping = GradientClipping(ZScoreLimit(z=0.1, decay=0.5, warmup=3))
    module, recorder, _ = _half(stage, [clipping], path, resume=True)
    limits = [float(report.max_norm) for report in recorder.reports]
    (history,) = clipping.state_dict()["history"].values()
    return {"weights": weights(module, stage), "limits": limits, "steps": history["steps"]}


def resumed_from_its_clip(path):
    """The warnings of a fit from a checkpoint of a run with ``gradient_clipping`` in DeepSpeed's configuration."""
    import warnings

    from clip_callbacks import GradientClipping, GradientNormMonitor

    _half(2, [GradientNormMonitor()], path, resume=False, config={"gradient_clipping": LIMIT})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, trainer = _half(2, [GradientClipping(LIMIT)], path, resume=True)
    assert trainer.strategy.model.optimizer.clip_grad == 0.0
    return [str(each.message) for each in caught if "second time" in str(each.message)]


class Without(Callback):
    """Removes an attribute of the engine's optimizer, as another version of DeepSpeed may lack it."""

    def on_fit_start(self, trainer, module):
        del trainer.strategy.model.optimizer.grad_start_offset


def with_an_attribute_less():
    """The error of a fit with an optimizer that is not as it is expected to be."""
    from clip_callbacks import GradientClipping

    strategy = OnCpu({"zero_optimization": {"stage": 2}})
    try:
        fit(Net(), batches(2), [Without(), GradientClipping()], strategy=strategy, devices=1)
    except RuntimeError as error:
        return str(error)
    return ""
