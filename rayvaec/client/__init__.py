"""Client of a served model: AnnData in, AnnData out.

::

    from rayvaec.client import Client

    with Client("http://127.0.0.1:8000") as client:
        drawn = client.sample(adata, labels_key="cell_type", n_samples=10, seed=0)

`AsyncClient` has the same methods to be awaited. Needs neither torch nor ray. Cells travel as Arrow
streams; genes are sent by name, so that the server aligns them, and cells by their obs names, so
that a cell's draws do not depend on what else is in a request. That is why a request over the
server's limits can be sent as several, and one whose answer broke off be taken up where it broke.
"""

from __future__ import annotations

from rayvaec.client.async_client import AsyncClient
from rayvaec.client.sync_client import Client

__all__ = ["AsyncClient", "Client"]
