"""Which scvi-tools release's form weights have, from their names and shapes.

Version numbers do not tell: scvi-tools 1.4.0.post1 saved the form that 1.4.1 brought.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rayvaec.errors import ConfigError, ModelError
from rayvaec.model.vaec import VAEC

State = Mapping[str, Tensor]

SOFTPLUS = "the softplus form (scvi-tools 0.11 to 1.4.0)"
SOFTMAX = "the softmax form (scvi-tools 1.4.1 on)"
UNKNOWN, NO_VAEC = "an unknown form of VAEC", "no VAEC"

_HIDDEN_LAYER = re.compile(r"decoder\.fc_layers\.Layer \d+\.0\.weight")
_FIRST_ENCODED = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
_FIRST_DECODED = "decoder.fc_layers.Layer 0.0.weight"
_HEAD = "z_encoder.mean_encoder.weight"


def form_of(state: State) -> str:
    """Say in words which form weights look like.

    Parameters
    ----------
    state : Mapping of str to Tensor
        A state dict.

    Returns
    -------
    str
        Such as ``"the softmax form (scvi-tools 1.4.1 on) with a mixture prior"``.
    """
    names = set(state)
    if not {"px_r", _FIRST_ENCODED, _FIRST_DECODED} <= names:
        return NO_VAEC
    if "px_decoder.0.weight" in names:
        return SOFTPLUS
    if not {"px_decoder.weight", "per_ct_bias", "_embeddings_dict.batch.weight"} <= names:
        return UNKNOWN
    extras = [
        *(["a mixture prior"] if "prior_means" in names else []),
        *(["fine labels"] if "classifier.classifier.0.weight" in names else []),
    ]
    return f"{SOFTMAX} with {' and '.join(extras)}" if extras else SOFTMAX


def arguments_of(state: State) -> dict[str, Any]:
    """Read the arguments of VAEC off its weights.

    Parameters
    ----------
    state : Mapping of str to Tensor
        The state dict of a VAEC of either form.

    Returns
    -------
    dict
        All arguments that shapes tell; not ``dropout_rate``, ``log_variational`` and ``library``.
        In the softplus form one batch is told from none by nothing: ``n_batch`` is 0 for both.

    Raises
    ------
    ModelError
        If the weights are of no known form, or their shapes do not go together.
    """
    form = form_of(state)
    if form in (NO_VAEC, UNKNOWN):
        raise ModelError(f"the weights look like {form}", "install a newer rayvaec if there is one")
    try:
        return _arguments(state)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"the weights look like {form} and do not go together: {error}", "save the model anew"
        ) from error


def _arguments(state: State) -> dict[str, Any]:
    softmax = "per_ct_bias" in state
    n_input, n_labels = len(state["px_r"]), len(state["ct_weight"])
    n_latent, n_hidden = state[_HEAD].shape
    label_columns = n_labels if n_labels > 1 else 0
    beside_genes = state[_FIRST_ENCODED].shape[1] - n_input - label_columns
    beside_z = state[_FIRST_DECODED].shape[1] - n_latent - label_columns
    weights = state["ct_weight"].tolist()
    arguments = {
        "generative": "softmax" if softmax else "softplus",
        "n_input": n_input,
        "n_labels": n_labels,
        "n_hidden": n_hidden,
        "n_latent": n_latent,
        "n_layers": sum(1 for name in state if _HIDDEN_LAYER.fullmatch(name)),
        "n_batch": len(state["_embeddings_dict.batch.weight"]) if softmax else beside_z,
        "encode_covariates": beside_genes > 0,
        "ct_weight": None if all(weight == 1 for weight in weights) else weights,
    }
    if "prior_means" in state:
        arguments |= {"prior": "mog", "num_classes_mog": state["prior_means"].shape[1]}
    if "classifier.classifier.0.weight" in state:
        arguments["n_fine_labels"] = len(state["classifier.classifier.0.weight"])
    return arguments


def standard_mixture(n_labels: int, n_latent: int) -> dict[str, Tensor]:
    """Return the weights of a mixture prior that is one standard normal per label.

    Parameters
    ----------
    n_labels, n_latent : int

    Returns
    -------
    dict
        ``prior_means`` and ``prior_log_std`` (Tensor[n_labels, 1, n_latent]) and ``prior_logits``
        (Tensor[n_labels, 1]).
    """
    # A component's deviation is exp(prior_log_std) + 1e-4.
    return {
        "prior_means": torch.zeros(n_labels, 1, n_latent, dtype=torch.float32),
        "prior_log_std": torch.full(
            (n_labels, 1, n_latent), math.log1p(-1e-4), dtype=torch.float32
        ),
        "prior_logits": torch.zeros(n_labels, 1, dtype=torch.float32),
    }


def without_standard_mixture(state: State) -> dict[str, Tensor]:
    """Drop the prior's weights if they are those of `standard_mixture`: the prior is normal then.

    Parameters
    ----------
    state : Mapping of str to Tensor
        A state dict.

    Returns
    -------
    dict
        Without ``prior_means``, ``prior_log_std`` and ``prior_logits``, or unchanged.
    """
    if "prior_means" not in state or state["prior_means"].dim() != 3:
        return dict(state)
    n_labels, _, n_latent = state["prior_means"].shape
    standard = standard_mixture(n_labels, n_latent)
    if not all(name in state and torch.equal(state[name], standard[name]) for name in standard):
        return dict(state)
    return {name: value for name, value in state.items() if name not in standard}


def build(arguments: Mapping[str, Any], state: State) -> VAEC:
    """Make a VAEC that holds these very weights.

    Parameters
    ----------
    arguments : Mapping
        Arguments of VAEC.
    state : Mapping of str to Tensor
        Its state dict; floating-point weights become float32.

    Returns
    -------
    VAEC
        In evaluation mode.

    Raises
    ------
    ModelError
        If an argument is out of range, a weight is missing, unknown, of another shape or not
        finite.
    """
    try:
        module = without_memory(arguments)
    except ConfigError as error:
        raise ModelError(f"the weights are of no VAEC: {error}") from error
    expected = module.state_dict()
    unknown, missing = sorted(set(state) - set(expected)), sorted(set(expected) - set(state))
    if unknown or missing:
        raise ModelError(
            f"the weights look like {form_of(state)}; "
            + " and ".join(
                f"{len(names)} are {what}, such as {names[0]!r}"
                for what, names in (("unknown", unknown), ("missing", missing))
                if names
            ),
            "install a newer rayvaec, or save the model anew",
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ModelError(
                f"the weight {name!r} has shape {tuple(value.shape)} where the others ask for "
                f"{tuple(expected[name].shape)}",
                "save the model anew",
            )
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"the weight {name!r} holds values that are not finite")
    fill(module, state)
    return module.eval()


_RANDOM_INIT = {
    Tensor.uniform_,
    Tensor.normal_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
}


class _SkipRandomInit(TorchFunctionMode):
    """Leaves out random start values; on `meta`, torch loads half a second of modules for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def without_memory(arguments: Mapping[str, Any]) -> VAEC:
    """Make a VAEC whose weights have shapes and no values, on torch's `meta` device.

    Sizes that do not go together could ask for any amount of memory, and start values would be
    drawn from the caller's generator.

    Parameters
    ----------
    arguments : Mapping
        Arguments of VAEC.

    Returns
    -------
    VAEC
        For `fill`.
    """
    with torch.device("meta"), _SkipRandomInit():
        return VAEC(**arguments)


def fill(module: VAEC, state: State) -> None:
    """Give a VAEC from `without_memory` its weights: copies, in float32.

    Parameters
    ----------
    module : VAEC
    state : Mapping of str to Tensor
        All of its weights.

    Raises
    ------
    RuntimeError
        If a weight is missing, unknown or of another shape.
    """
    copies = {}
    for name, value in state.items():
        dtype = torch.float32 if value.is_floating_point() else torch.int64
        copies[name] = value.detach().to(dtype, copy=True)
    module.load_state_dict(copies, assign=True)
