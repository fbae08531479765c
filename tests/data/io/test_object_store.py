from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rayvaec.cli import main
from rayvaec.data import Loader, open_store
from rayvaec.data.io import object_store
from rayvaec.data.io.object_store import open_reader
from rayvaec.errors import ConfigError, StoreError
from rayvaec.util.location import location


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(object_store, "MAX_RETRIES", 3)
    monkeypatch.setattr(object_store, "RETRY_TIMEOUT_S", 20)


def minibatches(store, **options):
    loader = Loader(store, batch_size=64, lanes=4, block_rows=16, buffer_rows=256, **options)
    return list(loader.epoch(0))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("indptr", "indices", "counts", "labels", "batches", "cells"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_store_in_a_bucket_is_the_store_on_disk(random_store, bucket):
    url = bucket(random_store.path, "deep/er/store")
    here, there = open_store(random_store.path), open_store(url)
    assert there.hash == here.hash
    assert str(there.path) == url
    assert_same(minibatches(there), minibatches(here))
    assert_same(minibatches(there, shuffle=False), minibatches(here, shuffle=False))
    assert there.obs_names(100, 2300) == here.obs_names(100, 2300)
    there.verify()
    assert pickle.loads(pickle.dumps(there)).hash == here.hash


def test_a_changed_file_in_a_bucket_is_found(make_store, bucket):
    made = make_store(n_cells=20)
    file = made.path / "dataset_1/X/data/c/0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    url = bucket(made.path, "changed")
    named = rf"the file {url}/dataset_1/X/data/c/0"
    with pytest.raises(StoreError, match=f"{named} does not match its checksum"):
        open_store(url).verify()
    file.unlink()
    url = bucket(made.path, "missing")
    named = rf"the file {url}/dataset_1/X/data/c/0 is missing"
    with pytest.raises(StoreError, match=named):
        open_store(url).verify()
    with pytest.raises(StoreError, match=named):
        open_store(url).read(0, 20)


def test_nothing_there(random_store, bucket):
    url = bucket(random_store.path, "store")
    with pytest.raises(StoreError, match=f"there is no store at {url}x: it has no zarr.json"):
        open_store(f"{url}x")
    with pytest.raises(StoreError, match="there is no bucket nowhere .*; correct the URL"):
        open_store("s3://nowhere/store")


def test_a_web_server_will_do(random_store, serve_files):
    server = serve_files(random_store.path.parent)
    here, there = open_store(random_store.path), open_store(f"{server.url}/store/")
    assert there.hash == here.hash
    assert_same(minibatches(there), minibatches(here))


def test_a_bucket_of_google_will_do(random_store, serve_files, monkeypatch):
    server = serve_files(random_store.path.parent.parent)
    key = {"gcs_base_url": server.url, "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    there = open_store(f"gs://{random_store.path.parent.name}/store")
    assert there.hash == open_store(random_store.path).hash
    assert len(there.read(0, 100)) == 100


@pytest.mark.parametrize("etags", [True, False], ids=["etags", "no etags"])
@pytest.mark.parametrize("fault", ["503", "500", "429", "drop", "cut"])
def test_what_passes_is_tried_again(random_store, serve_files, fault, etags):
    server = serve_files(random_store.path)
    server.etags = etags
    store = open_store(server.url)
    whole = store.read(0, 50)
    server.requests.clear()
    store.read(0, 50)
    usual = len(server.requests)
    server.requests.clear()
    server.faults += [fault, fault]
    again = store.read(0, 50)
    np.testing.assert_array_equal(again.counts, whole.counts)
    np.testing.assert_array_equal(again.labels, whole.labels)
    assert len(server.requests) == usual + 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "cannot be read: the server answers 503; check the URL and the network"),
        ("400", "cannot be read: the server answers 400;"),
        ("drop", "cannot be read: the connection broke; check the URL"),
        ("cut", "cannot be read: the answer broke off, 5 times; check the URL"),
        ("403", r"access to .* is denied \(403\); make it readable without a login"),
        ("401", r"access to .* is denied \(401\); make it readable without a login"),
    ],
)
def test_what_does_not_pass_is_said(random_store, serve_files, fault, message, monkeypatch):
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    server = serve_files(random_store.path)
    server.faults += [fault] * 1000
    with pytest.raises(StoreError, match=message) as caught:
        open_store(server.url)
    assert f"{server.url}/zarr.json" in str(caught.value)
    assert (len(server.requests) == 1) == fault.startswith("40")


def test_a_server_that_is_not_there(serve_files, tmp_path):
    server = serve_files(tmp_path)
    url = f"{server.url}/store"
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(StoreError, match=r"zarr.json cannot be read: no connection to the server"):
        open_store(url)


def test_a_server_that_knows_no_ranges(random_store, serve_files):
    server = serve_files(random_store.path)
    server.ranges = False
    with pytest.raises(StoreError, match="does not answer requests for a part of a file; use one"):
        open_store(server.url).read(0, 10)


def test_a_file_that_is_cut_short(make_store, serve_files):
    made = make_store(n_cells=200)
    server = serve_files(made.path)
    store = open_store(server.url)
    store.read(0, 200)
    file = made.path / "dataset_0/X/data/c/0"
    for end in (file.stat().st_size // 2, 0):
        file.write_bytes(file.read_bytes()[:end])
        with pytest.raises(StoreError, match=rf"X/data/c/0 is cut short: it ends at byte {end} "):
            store.read(0, 200)


def test_credentials_do_not_get_into_messages(random_store, serve_files, bucket, monkeypatch):
    bucket(random_store.path / "dataset_0/var", "x")
    server = serve_files(random_store.path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.faults += ["403"]
    with pytest.raises(StoreError, match="is denied") as caught:
        open_store("s3://atlases/store")
    error: BaseException | None = caught.value
    assert "set AWS_ACCESS_KEY_ID" in str(error)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_requests_are_made_together(random_store, serve_files):
    server = serve_files(random_store.path)
    store = open_store(server.url)
    whole = store.read(0, 2345)
    server.gather, server.most_at_once = 2, 0  # counts and indices
    np.testing.assert_array_equal(store.read(0, 2345).counts, whole.counts)
    assert server.most_at_once >= 2
    server.gather, server.most_at_once = 6, 0  # offsets, labels and batches of three partitions
    store.fetch(span for part in store.partitions for span in part.annotation_spans(0, 9))
    assert server.most_at_once >= 6
    server.requests.clear()
    for part in store.partitions:
        part.labels.read(0, 9)
    assert not server.requests  # they are in memory now


def test_large_files_are_asked_for_in_pieces(tmp_path, serve_files, monkeypatch):
    monkeypatch.setattr(object_store, "PIECE_BYTES", 1000)
    content = np.random.default_rng(0).integers(0, 256, 9_500).astype(np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    server = serve_files(tmp_path)
    blobs = open_reader(location(server.url))
    out = np.empty(9_000, np.uint8)
    blobs.read("file", 300, out)
    np.testing.assert_array_equal(out, content[300:9300])
    assert len(server.requests) == 9
    assert blobs.checksum("file") == open_reader(tmp_path).checksum("file")
    assert blobs.checksum("no") is open_reader(tmp_path).checksum("no") is None


def test_without_obstore_the_extra_is_named():
    script = (
        "import sys; sys.modules['obstore'] = sys.modules['obstore.exceptions'] = None\n"
        "from rayvaec.cli import main\n"
        "sys.exit(main(['inspect', 's3://atlases/store']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    expected = (
        "rayvaec: error: s3://atlases/store is read through obstore, which is not installed; "
        'pip install "rayvaec[remote]"\n'
    )
    assert done.stderr == expected


def test_plain_http_is_for_endpoints_that_say_so(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert object_store._endpoint(location("s3://bucket/x")) == ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert object_store._endpoint(location("s3://bucket/x")) == "http://127.0.0.1:1"
    for wrong in ("", "127.0.0.1:9000"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", wrong)
        with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL does not start with http://"):
            open_store("s3://bucket/x")


@pytest.mark.ray
def test_workers_train_from_a_bucket(store_path, bucket, tmp_path):
    """In a process of its own: the workers of a local Ray inherit the environment."""
    url, out = bucket(store_path, "trained"), tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rayvaec", "train", url, "--out", str(out)),
            *("--max-epochs", "1", "--batch-size", "256"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={name: v for name, v in os.environ.items() if not name.startswith("RAY_AUTH")},
    )
    assert done.returncode == 0, done.stderr
    assert f"rayvaec sample {out}/model {url} --out" in done.stdout
    run = json.loads((out / "run.json").read_text())
    assert (run["store"], run["store_hash"]) == (url, open_store(store_path).hash)
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for secret in ("example-secret", "AKIAEXAMPLE"):
        assert secret.encode() not in kept
        assert secret not in done.stdout + done.stderr


def test_commands_on_a_url(store_path, bucket, capsys):
    url = bucket(store_path, "inspected")
    assert main(["inspect", "--verify", url]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"store {url}\n")
    assert "files in 1 partition\n" in shown
    assert shown.endswith("every checksum is right\n")
    assert main(["train", url, "--out", "s3://atlases/run"]) == 2
    refused = capsys.readouterr().err
    assert "error: s3://atlases/run is a URL, and only the store" in refused
    assert "give a path of this machine" in refused
    assert "aws s3 cp --recursive" in refused
