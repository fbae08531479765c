"""Open a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.io.object_store import open_reader
from rayvaec.data.store.description import DESCRIPTION, Description, read_description, share
from rayvaec.data.store.manifest import COLLECTION, Manifest, group_attributes
from rayvaec.data.store.store import SPLITS, Partition, Rows, Store
from rayvaec.errors import StoreError
from rayvaec.util.location import Location, Url, location

__all__ = [
    "DESCRIPTION",
    "SPLITS",
    "Partition",
    "Rows",
    "Store",
    "is_external",
    "open_again",
    "open_store",
    "share",
]


def open_store(path: Path | str | Url, keys: ObsKeys | None = None) -> Store:
    """Open a store.

    Parameters
    ----------
    path : Path, str or Url
        Folder that `rayvaec prepare` wrote, or a URL (``s3://``, ``gs://``, ``https://``) of one;
        with `keys` also an AnnData Zarr or an annbatch collection, which is then surveyed; or what
        `share` returned. ``STORE::LAYER`` reads a layer of a store that rayvaec did not
        write.
    keys : ObsKeys, optional
        The obs columns of a store that rayvaec did not write.

    Returns
    -------
    Store

    Raises
    ------
    StoreError
        If there is nothing, something else, or an unfinished, damaged or newer store, or it
        cannot be reached.
    ConfigError
        If a URL is of an unknown kind, or the extra ``remote`` is not installed.
    """
    where, layer = split_store_layer(location(path))
    if layer is not None and keys is not None:
        keys = replace(keys, layer=None if layer == "X" else layer)
    if isinstance(where, Path):
        where = where.absolute()
        if where.suffix == ".json" and where.is_file():
            return _open_described(read_description(where))
        _check_folder(where)
    blobs = open_reader(where)
    attributes = group_attributes(blobs)
    if attributes is None and isinstance(where, Url):
        raise StoreError(f"there is no store at {where}: it has no zarr.json", "correct the URL")
    attributes = attributes or {}
    if "rayvaec" in attributes:
        if layer is not None:
            raise StoreError(
                f"the store {where} has no layer {layer!r}: `prepare` has chosen its counts",
                f"leave out ::{layer}",
            )
        return Store(where, Manifest.from_json(attributes["rayvaec"], str(where)), blobs)
    if attributes.get("encoding-type") in FOREIGN:
        if keys is None:
            raise StoreError(
                f"{where} is not a store that rayvaec wrote",
                "name its obs column of cell types with --labels-key to train on it as it is, or "
                f"make a store of it with `{_PREPARE} STORE --labels-key KEY`",
            )
        from rayvaec.data.store.external_scan import scan_external_store  # brings scipy as well

        return scan_external_store(where, keys)
    if any(where.glob("dataset_*") if isinstance(where, Path) else ()):
        raise StoreError(
            f"the store {where} is unfinished: it has no manifest",
            f"write it again with `{_PREPARE} {where} --labels-key KEY --overwrite`",
        )
    raise StoreError(
        f"{where} is no store, no AnnData Zarr and no annbatch collection",
        f"write a store with `{_PREPARE} STORE --labels-key KEY`",
    )


def split_store_layer(where: Location) -> tuple[Location, str | None]:
    """Tell where a store lies from the layer that ``STORE::LAYER`` asks for.

    Parameters
    ----------
    where : Path or Url
        A store, or one with a layer.

    Returns
    -------
    tuple of Path or Url, and str or None
        None where no layer is named.
    """
    text, colons, layer = (where.path if isinstance(where, Url) else str(where)).rpartition("::")
    if not (text and colons and layer) or (isinstance(where, Path) and where.exists()):
        return where, None
    return (replace(where, path=text) if isinstance(where, Url) else Path(text)), layer


def open_again(described: Path, where: Location, keys: ObsKeys | None = None) -> Store:
    """Open a store that work has begun on, with the cells that it had then.

    Parameters
    ----------
    described : Path
        What `share` wrote when the work began.
    where : Path or Url
        Where the store lies now: where it lay, or another place; or `described` itself.
    keys : ObsKeys, optional
        As in `open_store`, for an external store at another place.

    Returns
    -------
    Store
        Another store if there is one at another place.

    Raises
    ------
    StoreError, ConfigError
        As `open_store`; and if another store lies where that one lay.
    """
    description = read_description(described)
    place, layer = split_store_layer(where)
    place = place.absolute() if isinstance(place, Path) else place
    known = description.manifest.sources[0].get("layer") or "X"
    if place in (described, description.location) and layer in (None, known):
        return _open_described(description)
    store = open_store(where, keys)
    moved = description.findings is None and description.fits(store)
    return description.cells_of(store) if moved else store


def _open_described(description: Description) -> Store:
    if description.findings is None:
        return description.cells_of(open_store(description.location))
    from rayvaec.data.store.external import ExternalStore  # brings anndata and pandas

    return ExternalStore(description.location, description.manifest, description.findings)


def is_external(where: Location) -> bool:
    """Return whether there is an AnnData Zarr or a collection that rayvaec did not write.

    Parameters
    ----------
    where : Path or Url
        A folder, which need not exist.

    Returns
    -------
    bool

    Raises
    ------
    StoreError, ConfigError
        As `open_store`, where it cannot be reached.
    """
    attributes = group_attributes(open_reader(where)) or {}
    return "rayvaec" not in attributes and attributes.get("encoding-type") in FOREIGN


FOREIGN = ("anndata", COLLECTION)
_PREPARE = "rayvaec prepare INPUT... --out"


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise StoreError(
            f"there is no store at {path}",
            f"correct the path, or write one with `{_PREPARE} {path} --labels-key KEY`",
        )
    if not path.is_dir():
        raise StoreError(
            f"{path} is a file and not a store",
            f"make a store of it with `rayvaec prepare {path} --out STORE --labels-key KEY`",
        )
