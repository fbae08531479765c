from __future__ import annotations

import numpy as np
import pytest


# scvi-tools warns of many things that are its own, and so does Ray Train.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.ray
def test_destvi_recovers_the_proportions_of_simulated_spots(run_document):
    scvi = pytest.importorskip("scvi", exc_type=ImportError)
    if scvi.__version__ < "1.4.1":
        pytest.skip("the softmax form came with 1.4.1")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its many small products are slower on several
    try:
        names = run_document("destvi.md")
    finally:
        torch.set_num_threads(threads)
    found, truth = names["found"], names["truth"]
    assert found.shape == truth.shape == (200, 5)
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.8
    for kind in range(5):
        assert np.corrcoef(found[:, kind], truth[:, kind])[0, 1] > 0.7
