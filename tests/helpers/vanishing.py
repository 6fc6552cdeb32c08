"""Fits in which blocks of parameters do not learn, with spans short enough for tests."""

from __future__ import annotations

import re
import warnings

from torch import nn

from clip_callbacks import GradientNormMonitor
from tests.helpers.training import SAFELY, Regression, data

STEPS = 24
"""As many as the shortest span that is judged, in these tests: each other length is shorter in proportion, too."""

SPANS = {"MIN_STEPS": STEPS, "MIN_STEPS_BETWEEN_CHECKS": 2}

WARNING = "do(es)? not learn"


def vanished(fit):
    prefix = "grad_vanished/"
    return {key.removeprefix(prefix): float(value) for key, value in fit.callback_metrics.items() if key.startswith(prefix)}


def fit(trainer, module, *callbacks, batches=STEPS, loader=None, scope="layer", ckpt_path=None, **options):
    """Train, and return the Trainer and the texts of the warnings."""
    made = trainer(GradientNormMonitor(scope), *callbacks, **({"log_every_n_steps": 4} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=f"(?s).*{WARNING}")
        resumed = {"ckpt_path": ckpt_path, **SAFELY} if ckpt_path else {}
        made.fit(module, loader or data(batches), **resumed)
    return made, [str(each.message) for each in caught if re.search(WARNING, str(each.message))]


def two_layers(activation):
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 1))


def dead_relu():
    net = two_layers(nn.ReLU())
    nn.init.constant_(net[0].bias, -1e4)
    # the input of the second layer is 0, and the gradient of its bias is not
    return Regression(net=net, lr=1e-3), {"net.0": 1.0, "net.2": 8 / 9}
