"""Kernels called from several Python threads at once, as a server calls them."""

from __future__ import annotations

import threading

import numpy as np
import torch

from rayvaec.kernels.cpu.decoded_draws import draw_decoded
from rayvaec.kernels.cpu.sparse_linear import sparse_linear
from rayvaec.kernels.nb_loss import nb_reconstruction
from rayvaec.kernels.nb_sample import draw_counts, join_rows
from rayvaec.kernels.rng import normal_noise, position_keys


def work(x, seed):
    """Call every kernel, with weights drawn from the seed; return all results."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    h, weight, px_r = normal(x.n_cells, 8).relu(), normal(x.n_genes, 8), normal(x.n_genes)
    first = normal(16, x.n_genes).requires_grad_()
    bias = (normal(x.n_genes) - 5).requires_grad_()
    library, keys = x.library(), position_keys(0, x.n_cells)
    samples = np.zeros(x.n_cells, np.uint64)
    encoded = sparse_linear(x, first, None, log1p=True)
    encoded.square().sum().backward()
    total, each = nb_reconstruction(h, weight, bias, px_r, library, x, torch.ones(x.n_cells))
    total.backward()
    decoded = join_rows(draw_decoded(h, weight, bias, px_r, library, seed, keys, samples))
    drawn = draw_counts(library.expand(-1, x.n_genes) * 1e-3, px_r, seed, keys, samples)
    noise = normal_noise(seed, keys, samples, 5)
    tensors = [encoded.detach(), first.grad, each, bias.grad]
    return [tensor.numpy() for tensor in tensors] + [noise, *decoded, *drawn]


def test_threads_do_not_disturb_each_other(make_counts):
    x = make_counts(150, 700)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = [work(x, seed) for seed in range(4)]
        found = {}

        def caller(seed):
            for _ in range(5):
                found.setdefault(seed, []).append(work(x, seed))

        callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
        for each in callers:
            each.start()
        for each in callers:
            each.join(120)
    finally:
        torch.set_num_threads(threads)
    for seed, arrays in enumerate(expected):
        assert len(found[seed]) == 5
        for repeat in found[seed]:
            for a, b in zip(repeat, arrays, strict=True):
                np.testing.assert_array_equal(a, b)
