"""Train scvi-tools' CondSCVI with its own train(), and save it along the way.

The peer's side of `time_to_elbo.py`, in a process of its own: scvi-tools need not be installed
beside rayvaec. Minibatch 128 and all other defaults, but a KL weight of 1 from the first step on.
The last line of the output is JSON: for every saved epoch its seconds since the first step began,
without the saving.

    python benchmarks/train_condscvi.py train.h5ad OUT --labels-key cell_type --epochs 50 \
        --save-at 5 10 25 50

"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import lightning
import scvi
import torch

WITHOUT_WARMUP = {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": None}
"""scvi-tools raises the KL weight over 400 epochs; with neither set it is max_kl_weight, 1."""


class Saver(lightning.pytorch.Callback):
    """Saves the model after some epochs, and stops the clock meanwhile."""

    def __init__(self, model: scvi.model.CondSCVI, out: Path, epochs: list[int]) -> None:
        self.model, self.out, self.epochs = model, out, set(epochs)
        self.saved: list[dict[str, Any]] = []
        self.kl_weights: set[float] = set()
        self._began = 0.0

    def on_train_start(self, *_: object) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, plan: Any) -> None:
        """Save the model where that is due."""
        self.kl_weights.add(float(plan.kl_weight))
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            ended = time.perf_counter()
            folder = self.out / f"epoch_{epoch}"
            self.model.save(str(folder), overwrite=True)
            seconds = round(ended - self._began, 3)
            self.saved.append({"epoch": epoch, "seconds": seconds, "folder": str(folder)})
            self._began += time.perf_counter() - ended


def main() -> None:
    """Train, and print what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("h5ad", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels-key", required=True)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--save-at", type=int, nargs="+", default=[])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = options.seed
    if options.threads:
        torch.set_num_threads(options.threads)
    adata = anndata.read_h5ad(options.h5ad)
    scvi.model.CondSCVI.setup_anndata(adata, labels_key=options.labels_key)
    model = scvi.model.CondSCVI(adata)
    saver = Saver(model, options.out, [*options.save_at, options.epochs])
    model.train(
        max_epochs=options.epochs,
        accelerator="cpu",
        plan_kwargs=dict(WITHOUT_WARMUP),
        callbacks=[saver],
        enable_progress_bar=False,
        logger=False,
    )
    line = {
        "saved": saver.saved,
        "kl_weights": sorted(saver.kl_weights),
        "threads": torch.get_num_threads(),
        "versions": {"scvi-tools": scvi.__version__, "torch": torch.__version__},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
